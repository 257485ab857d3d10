"""How fast a device streams its memory and multiplies, by type: the operations that models here are run with.

The same code measures the CPU and a card: `device` is torch's. Weights are 4096 wide; for one row they are so many that
no cache holds them, as in decoding; 512 rows are a usual ubatch, as in prefill.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .. import drivers
from ..calibrated import Figure
from ..units import GIB, MIB, format_bytes
from .timing import figure, rounds

WIDTH, ROWS, GROUP, BLOCK = 4096, 512, 32, 64
CARD_HEIGHT = 8 * WIDTH  # of a card's matrix for one row: starting a kernel takes as long as reading a small one
LEAST_ROOM = 512 * MIB  # bytes that the matrices and what packs them take at once
TYPES = ("float32", "bfloat16", "float16", "int8", "int4")
CARD_TYPES = ("float32", "tf32", "bfloat16", "float16", "int8", "int4", "fp8")
Say = Callable[[float, str], None]
Found = tuple[list[Figure], list[tuple[str, str]]]


class NotHere(Exception):
    """This device or this torch lacks the operation."""


def last_cache(root: Path = Path("/")) -> int | None:
    """Bytes of the last level of the CPU's caches, all of them together; None where the system does not say."""
    if sys.platform == "darwin":
        sizes = [drivers.sysctl(name) for name in ("hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize")]
        return max((int(size) for size in sizes if size.isdigit()), default=None) or None
    found: dict[tuple[int, str], int] = {}
    for index in root.glob("sys/devices/system/cpu/cpu[0-9]*/cache/index*"):
        level, size = drivers.read(index / "level"), drivers.read(index / "size")
        scale = {"K": 1024, "M": MIB}.get(size[-1:])
        if level.isdigit() and scale and size[:-1].isdigit():
            found[int(level), drivers.read(index / "shared_cpu_list")] = int(size[:-1]) * scale
    top = max((level for level, _ in found), default=None)
    return sum(size for (level, _), size in found.items() if level == top) or None


# -- RAM ---------------------------------------------------------------------------------------------------------------


def ram(threads: tuple[int, ...], room: int, seconds: float, say: Say) -> Found:
    """Bytes per second streamed from RAM by each number of threads: the better of two readers, a sum and a matrix times a
    vector, over a buffer of eight times the last cache: 512 MiB to 2 GiB, less where time is short, an eighth of `room`
    (free bytes of RAM) at most."""
    cache = last_cache()
    size = min(max(8 * (cache or 64 * MIB), 512 * MIB), 2 * GIB, room // 8, int(seconds * GIB)) // MIB * MIB
    if size < 32 * MIB:
        return [], [("RAM", f"{format_bytes(room)} of RAM are free, too little to measure it; close something and try again")]
    about = f"{format_bytes(size)} of float32, " + (f"last cache {format_bytes(cache)}" if cache else "last cache unknown")
    if size < 4 * (cache or 0):
        about += " (partly read from it: little time or RAM)"
    figures, before = [], torch.get_num_threads()
    plain = dict(dtype=torch.float32, device="cpu")  # whatever the caller's defaults are
    buffer = torch.ones(size // 4, **plain)  # written, so that every page is its own
    matrix, vector = buffer.view(-1, WIDTH), torch.ones(WIDTH, **plain)
    readers = {"a sum": buffer.sum, "a matrix times a vector": lambda: matrix @ vector}
    try:
        for turn, number in enumerate(threads):
            torch.set_num_threads(number)
            say(turn / len(threads), f"RAM: {number} thread{'s' * (number != 1)}")
            took = {name: rounds(call, seconds / len(threads) / len(readers)) for name, call in readers.items()}
            name = min(took, key=lambda n: sorted(took[n])[len(took[n]) // 2])
            figures.append(figure("ram", "cpu", "read", size, took[name], "B/s", f"{name} over {about}", threads=number))
    finally:
        torch.set_num_threads(before)
    return figures, []


# -- multiplying -------------------------------------------------------------------------------------------------------


def multiply(device: str, name: str, types: tuple[str, ...], threads: int | None, room: int, seconds: float,
             say: Say) -> Found:
    """One row ("decode") and 512 rows ("matmul") by each type. `name` is the figures' device, `device` torch's; `room` its
    bytes of free memory."""
    if room < LEAST_ROOM:
        return [], [(f"{name} multiplication",
                     f"{format_bytes(room)} of memory are free, and it takes {format_bytes(LEAST_ROOM)}")]
    figures, skipped, before, precision = [], [], torch.get_num_threads(), torch.get_float32_matmul_precision()
    end = time.perf_counter() + seconds
    try:
        if threads:
            torch.set_num_threads(threads)
        for turn, kind in enumerate(types):
            say(turn / len(types), f"{'CPU' if name == 'cpu' else name}: {kind}")
            share = (end - time.perf_counter()) / (len(types) - turn)
            if share <= 0.01:
                skipped.append((f"{name} {kind}", "no time was left"))
                continue
            try:
                figures += _kind(device, name, kind, threads, room, share)
            except NotHere as why:
                skipped.append((f"{name} {kind}", str(why)))
            except (RuntimeError, NotImplementedError, AttributeError, MemoryError) as error:
                skipped.append((f"{name} {kind}", f"torch says: {(str(error).splitlines() or ['nothing'])[0][:160]}"))
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)
    return figures, skipped


def _kind(device: str, name: str, kind: str, threads: int | None, room: int, seconds: float) -> list[Figure]:
    least = _LEAST_ROWS.get(kind, 1) if device != "cpu" else 1
    product, weights, words = _PREPARE[kind](device, _height(device, room))
    one = sum(w.nbytes for w in weights)
    copies = [weights, *(tuple(w.clone() for w in weights) for _ in range(_matrices(device, room, one) - 1))]
    x = product.input(least)

    def decode():
        for each in copies:
            product(x, each)
        _wait(device)

    took = rounds(decode, seconds * 0.3)
    rows = "one row" if least == 1 else f"{least} rows, the fewest it takes,"
    many = f"{len(copies)} matrices" if len(copies) > 1 else "a matrix"
    figures = [figure("decode", name, kind, one * len(copies), took, "B/s",
                      f"{rows} times {many} of {format_bytes(one)} ({words})", threads=threads)]
    copies.clear()
    if device != "cpu":
        product, weights, words = _PREPARE[kind](device, WIDTH)
    return [*figures, _many(device, name, kind, product, weights, words, least, threads, seconds * 0.6)]


def _many(device, name, kind, product, weights, words, least, threads, seconds) -> Figure:
    """512 rows; fewer where the type is so slow here that three rounds would not end in time, and that is said."""
    def once(rows: int) -> float:
        x = product.input(rows)
        start = time.perf_counter()
        product(x, weights)
        _wait(device)
        return time.perf_counter() - start

    once(least)
    rows, took = least, once(least)
    while rows < ROWS and took * 2 * 4 < seconds:
        rows, took = rows * 2, once(rows * 2)
    x, repeat = product.input(rows), 1
    if device != "cpu":  # a card takes microseconds: many products a round, so that waiting for it does not count
        repeat = max(1, min(200, round(0.01 / once(rows))))

    def run():
        for _ in range(repeat):
            product(x, weights)
        _wait(device)

    took = rounds(run, seconds)
    slow = "" if rows == ROWS else f" ({ROWS} would take too long)"
    return figure("matmul", name, kind, 2 * rows * WIDTH * WIDTH * repeat, took, "op/s",
                  f"{rows} rows{slow} times {WIDTH} x {WIDTH} ({words})", threads=threads)


def _height(device: str, room: int) -> int:
    """Rows of a matrix that one row is multiplied with; on a card fewer where a float32 one takes a quarter of its memory."""
    height = WIDTH if device == "cpu" else CARD_HEIGHT
    while height > WIDTH and height * WIDTH * 4 > room // 4:
        height //= 2
    return height


def _matrices(device: str, room: int, one: int) -> int:
    """How many matrices no cache can hold: four times the last cache, in a sixteenth of what is free at most."""
    wanted = 4 * (last_cache() or 64 * MIB) if device == "cpu" else 512 * MIB  # ten times the largest cache of a card
    return max(1, min(max(wanted, 128 * MIB), room // 16) // one)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


class _Product:
    """x times the transpose of the weights: `input(rows)` makes x, a call multiplies. Weights are a tuple of tensors."""

    def __init__(self, call, make):
        self._call, self.input = call, make

    def __call__(self, x, weights):
        return self._call(x, *weights)


def _tall(block: torch.Tensor, height: int) -> torch.Tensor:
    """`height` rows that repeat a block: drawing every number would take longer than measuring with them."""
    return block.repeat(height // len(block), 1)


def _floats(dtype: torch.dtype, precision: str = "highest"):
    def prepare(device: str, height: int):
        if precision == "high" and torch.cuda.get_device_capability(device) < (8, 0):
            raise NotHere("TF32 needs compute capability 8.0")
        if dtype == torch.float32:
            torch.set_float32_matmul_precision(precision)
        weight = _tall(torch.randn(BLOCK, WIDTH, device=device).to(dtype), height)
        return (_Product(torch.nn.functional.linear, lambda rows: torch.randn(rows, WIDTH, device=device).to(dtype)),
                (weight,), "linear")

    return prepare


def _int8(device: str, height: int):
    weight = _tall(torch.randint(-127, 128, (BLOCK, WIDTH), device=device, dtype=torch.int8), height)
    return (_Product(lambda x, w: torch._int_mm(x, w.t()),
                     lambda rows: torch.randint(-127, 128, (rows, WIDTH), device=device, dtype=torch.int8)),
            (weight,), "_int_mm")


def _int4(device: str, height: int):
    scales = torch.ones(WIDTH // GROUP, height, 2, device=device, dtype=torch.bfloat16)
    if device == "cpu":
        codes = _tall(torch.randint(0, 16, (BLOCK, WIDTH), dtype=torch.int32), height)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        call = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        if torch.cuda.get_device_capability(device) < (8, 0) and not torch.version.hip:
            raise NotHere("the int4 operation needs compute capability 8.0")
        codes = _tall(torch.randint(0, 256, (BLOCK, WIDTH // 2), device=device, dtype=torch.uint8), height)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        call = torch.ops.aten._weight_int4pack_mm
    return (_Product(lambda x, w, s: call(x, w, GROUP, s),
                     lambda rows: torch.randn(rows, WIDTH, device=device).bfloat16()),
            (packed, scales), f"int4pack_mm, bfloat16 rows, groups of {GROUP}")


def _fp8(device: str, height: int):
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        raise NotHere("fp8 needs compute capability 8.9")
    one = torch.ones((), device=device)
    weight = _tall(torch.randn(BLOCK, WIDTH, device=device).to(torch.float8_e4m3fn), height)
    return (_Product(lambda x, w: torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16),
                     lambda rows: torch.randn(rows, WIDTH, device=device).to(torch.float8_e4m3fn)),
            (weight,), "_scaled_mm, e4m3")


_PREPARE = {"float32": _floats(torch.float32), "tf32": _floats(torch.float32, "high"), "bfloat16": _floats(torch.bfloat16),
            "float16": _floats(torch.float16), "int8": _int8, "int4": _int4, "fp8": _fp8}
_LEAST_ROWS = {"int8": 32, "fp8": 16}  # of a card: _int_mm wants more than 16, _scaled_mm multiples of 16
