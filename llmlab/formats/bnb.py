"""bitsandbytes' formats, which keep codes and maxima in tensors of their own: NF4, FP4, INT8; both ways.

Four bits: the first weight of a byte is its high half; a code picks one of 16 numbers between -1 and 1, times the largest
magnitude of its run of `blocksize` weights, counted through the whole tensor. Double quantization stores these maxima as
bytes of their own. INT8: a byte is code * maximum of its row / 127.

What for. NF4: weights of any network to 4.5 bits (4.13 doubly quantized) at once, without data, on a card; its levels are as
dense as normal weights are, and QLoRA trains adapters upon it. FP4: as large, for weights that are not normal; on those that
are it errs a third more. INT8: where 8 bits fit it is the safest, as LLM.int8() multiplies the few large inputs in 16 bits
instead. To run on a processor, or to publish, K types and IQ4 err less in the same bytes. Off by, in root mean square beside
normal weights (measured, and with `effort="high"`): NF4 9.2 % (8.5 %), FP4 12.2 % (11.3 %), INT8 with rows of 2048 0.8 %;
Q4_K 7.1 % (7.0 %).
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ..errors import LabError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

CHUNK = 1 << 18     # weights at a time
TINY = 1e-38        # what a run's maximum is divided by at least

# Quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
# A sign, then twelfths of these eight: there is a -0.0, as in bitsandbytes' compiled kernels (its fallback for odd widths has
# 0.0 there).
FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


class Nested(NamedTuple):
    """Maxima that are quantized themselves (double quantization): maximum = table[code] * of its run + `offset`."""

    maxima: torch.Tensor    # float32 [ceil(runs / blocksize)]
    table: torch.Tensor     # float32 [256], stored beside the weights
    offset: float | torch.Tensor
    blocksize: int = 256


def dequantize_4bit(packed: torch.Tensor, maxima: torch.Tensor, kind: str, shape: Sequence[int], blocksize: int = 64,
                    nested: Nested | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """NF4 or FP4 -> `dtype` (float32 where None) of `shape`, bit-equal to bitsandbytes in float32.

    `packed` uint8, two weights a byte; `maxima` float32, one for `blocksize` weights (uint8 codes with `nested`).
    Raises LabError for another kind and where bytes or maxima are too few or too many for the shape.
    """
    import torch
    count, dtype = prod(shape), dtype or torch.float32
    runs = -(-count // _positive(blocksize, kind))
    data = packed.view(torch.uint8).reshape(-1)
    if data.numel() != -(-count // 2) or maxima.numel() != runs:
        raise LabError(f"{kind}: shape {list(shape)} in runs of {blocksize} needs {-(-count // 2)} bytes and {runs} maxima, "
                       f"not {data.numel()} and {maxima.numel()}")
    pairs = byte_pairs(str(kind).lower(), data.device)
    if nested is not None:
        maxima = _maxima(maxima, nested)
    out = torch.empty(count, dtype=dtype, device=data.device)
    step = max(1, CHUNK // blocksize) * blocksize   # even, or all of it
    if step % 2:
        step *= 2
    for start in range(0, count, step):
        index = data[start // 2:(start + step) // 2].to(torch.int32)
        floats = pairs.index_select(0, index).view(torch.float32)[:count - start]     # an odd count ends in half a byte
        _multiply(floats, maxima[start // blocksize:][:step // blocksize].float(), blocksize)
        out[start:start + step] = floats
    return out.view(*shape)


def dequantize_int8(codes: torch.Tensor, maxima: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """INT8 codes [rows, cols] and the float32 maximum of each row -> `dtype` (float32 where None), bit-equal to bitsandbytes.

    Raises LabError where codes are not int8 or there is not one maximum a row.
    """
    import torch
    if codes.dtype != torch.int8 or codes.ndim != 2 or maxima.numel() != codes.shape[0]:
        raise LabError(f"INT8: int8 [rows, cols] and a maximum a row are needed, not {codes.dtype} {list(codes.shape)} "
                       f"and {maxima.numel()} maxima")
    floats = codes.float().mul_(maxima.float().view(-1, 1)).mul_(1 / 127)     # in this order, as bitsandbytes rounds
    return floats.to(dtype or torch.float32)


class FourBit(NamedTuple):
    """What `quantize_4bit` makes and `dequantize_4bit` takes: codes, a maximum for each run, and how the maxima are packed."""

    packed: torch.Tensor            # uint8 [ceil(weights / 2)]
    maxima: torch.Tensor            # float32 [runs]; uint8 where nested
    nested: Nested | None = None


def quantize_4bit(weights: torch.Tensor, kind: str, blocksize: int = 64, nested: bool = False, *,
                  importance: torch.Tensor | None = None, effort: str = "normal") -> FourBit:
    """NF4 ("nf4") or FP4 ("fp4") of a tensor of any shape, as bitsandbytes quantizes it on the CPU, byte for byte.

    The largest magnitude of each run of `blocksize` weights is its maximum, and each weight becomes the nearest of 16 levels
    times it. `nested`: maxima are quantized, too (double quantization: 8 bits each, about their mean, in runs of 256).
    `effort="high"` searches for what each run's codes are best multiplied by, in place of the maximum: a smaller squared
    error in the same bytes, each weight's times its column's `importance` [last axis] where given; the processor does this,
    wherever the weights are. bitsandbytes reads the result as its own. On SmolLM2-135M in NF4 importances and this search
    halve the KL divergence (0.32 to 0.15); without importances the error falls by 15 %, and the divergence does not (0.33,
    +- 0.01). Measured as `encoders.levels.counted` says.

    Raises LabError for another kind or effort, weights that are not finite, and importances of another length.
    """
    import torch
    kind, flat = str(kind).lower(), weights.detach().reshape(-1)
    borders, order = _borders(kind, weights.device)
    if effort not in ("normal", "high"):
        raise LabError(f"effort is {effort!r:.40}; there are 'normal' and 'high'")
    if importance is not None and importance.shape != weights.shape[-1:]:
        raise LabError(f"{kind}: importance is {list(importance.shape)} for rows of {weights.shape[-1]} weights")
    count, even = len(flat), len(flat) + len(flat) % 2
    maxima = torch.empty(-(-count // _positive(blocksize, kind)), device=flat.device)
    packed = torch.empty(even // 2, dtype=torch.uint8, device=flat.device)
    step = max(1, CHUNK // blocksize) * blocksize * 2
    for start in range(0, count, step):
        floats = flat[start:start + step].float()
        if not floats.isfinite().all():
            at = start + int((~floats.isfinite()).nonzero()[0])
            raise LabError(f"{kind}: weight {at} is {float(flat[at])}, which no code can stand for; is the file damaged?")
        short = -len(floats) % blocksize        # the last run may be
        runs = torch.nn.functional.pad(floats, (0, short)).view(-1, blocksize)
        largest = runs.abs().amax(1)
        if effort == "high":
            at = torch.arange(start, start + len(floats), device=flat.device) % weights.shape[-1]
            counts = torch.ones_like(floats) if importance is None else importance[at].float()
            counts = torch.nn.functional.pad(counts, (0, short)).view(-1, blocksize)
            largest = _best_maxima(runs.cpu(), counts.cpu(), largest.cpu(), kind).to(flat.device)
        elif short:
            largest[-1].clamp_(min=TINY)
        shares = runs * (1 / largest.clamp(min=TINY))[:, None]
        if short:
            shares[-1] = runs[-1] / largest[-1].clamp(min=TINY)       # bitsandbytes divides here and multiplies there
        codes = order[torch.bucketize(shares.clamp_(-1, 1), borders, out_int32=True).view(-1)[:len(floats)]]
        if len(codes) % 2:
            codes = torch.cat([codes, order[torch.bucketize(borders.new_zeros(1), borders)]])
        maxima[start // blocksize:][:len(largest)] = largest
        packed[start // 2:][:len(codes) // 2] = codes[::2] << 4 | codes[1::2]
    return FourBit(packed, *_nest(maxima)) if nested else FourBit(packed, maxima)


def quantize_int8(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [rows, cols] and the float32 maximum of each row, as LLM.int8() makes them of weights, byte for byte.

    It rounds weights to float16 first, as bitsandbytes does where a model is loaded in eight bits. Raises LabError for
    anything but a matrix, and where a number is not finite or beyond float16.
    """
    import torch
    if weights.ndim != 2:
        raise LabError(f"INT8: weights are {list(weights.shape)}; a matrix [rows, cols] is needed")
    codes = torch.empty(weights.shape, dtype=torch.int8, device=weights.device)
    maxima = torch.empty(len(weights), device=weights.device)
    step = max(1, CHUNK // max(1, weights.shape[1]))
    for start in range(0, len(weights), step):
        rows = weights.detach()[start:start + step].to(torch.float16).float()
        if not rows.isfinite().all():
            row, column = map(int, (~rows.isfinite()).nonzero()[0])
            raise LabError(f"INT8: weight {column} of row {start + row} is {float(weights[start + row, column])}; finite "
                           "numbers up to 65504 are needed")
        largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
        codes[start:start + step] = (rows * torch.where(largest > 0, 127.0 / largest, 0)[:, None]).round_()
        maxima[start:start + step] = largest
    return codes, maxima


def _best_maxima(runs: torch.Tensor, counts: torch.Tensor, largest: torch.Tensor, kind: str) -> torch.Tensor:
    """What each run's codes are best multiplied by: the maximum, or something about it where that lowers the error."""
    import torch

    from .encoders.levels import Levels
    values = sorted({float(value) for value in _values(kind)})
    places = tuple(0.5 * 1.04 ** step for step in range(31))        # to 1.6
    table = Levels(tuple(values), places, fineness=1 << 11, signed=False)
    columns, counts = runs.t().contiguous(), counts.t().contiguous()
    found = table.best_scales(columns, counts, largest)
    better = table.errors(columns, counts, found) < table.errors(columns, counts, largest)
    return torch.where(better, found, largest)


def _nest(maxima: torch.Tensor) -> tuple[torch.Tensor, Nested]:
    """Maxima as codes of their own. bitsandbytes looks their shares of a run's largest up among 65536 even steps."""
    import torch
    offset = maxima.mean() if len(maxima) else maxima.new_zeros(())
    runs = torch.nn.functional.pad(maxima - offset, (0, -len(maxima) % 256)).view(-1, 256)
    largest = runs.abs().amax(1)
    shares = (runs * (1 / largest)[:, None]).nan_to_num_(-1)        # a run of zeros has code 0
    steps = shares.add_(1).mul_(32767.5).add_(0.5).clamp_(0, 65535).int()
    table = dynamic_table().to(maxima.device)
    borders = ((table[1:].double() + table[:-1].double()) / 2)
    lookup = torch.bucketize(torch.arange(65536, dtype=torch.float64, device=maxima.device) / 32767.5 - 1, borders)
    codes = lookup.to(torch.uint8)[steps].view(-1)[:len(maxima)]
    return codes, Nested(largest, table, offset)


@lru_cache
def dynamic_table() -> torch.Tensor:
    """The 256 numbers of bitsandbytes' dynamic 8-bit type (arXiv 1511.04561): float32, rising, dense about zero.

    For each power of ten from 1e-6 to 1, 1 to 64 evenly spaced numbers between a tenth of it and it, with either sign; 0 and 1.
    """
    import torch
    numbers = [0.0, 1.0]
    for power in range(7):
        bounds = torch.linspace(0.1, 1, (1 << power) + 1, dtype=torch.float32)
        middles = (10 ** (power - 6)) * ((bounds[:-1] + bounds[1:]) / 2)
        numbers += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(numbers), dtype=torch.float32)


@lru_cache
def _borders(kind: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Between which numbers, float32 [15], lie those that become each code, uint8 [16], a border itself with those below."""
    import torch
    levels, order = _values(kind).sort(stable=True)
    return ((levels[1:] + levels[:-1]) / 2).to(device), order.to(torch.uint8).to(device)


def _maxima(codes: torch.Tensor, nested: Nested) -> torch.Tensor:
    """The maxima that byte codes stand for."""
    import torch
    runs = -(-codes.numel() // _positive(nested.blocksize, "nested"))
    if codes.dtype != torch.uint8 or nested.maxima.numel() != runs or nested.table.numel() != 256:
        raise LabError(f"double quantization: {codes.numel()} uint8 codes need {runs} maxima and a table of 256, not "
                       f"{codes.dtype}, {nested.maxima.numel()} and {nested.table.numel()}")
    floats = nested.table.index_select(0, codes.reshape(-1).to(torch.int32)).float()
    _multiply(floats, nested.maxima.float(), nested.blocksize)
    return floats.add_(nested.offset)


def _multiply(floats: torch.Tensor, maxima: torch.Tensor, blocksize: int) -> None:
    """Each run of floats [n] by its maximum, in place; the last run may be short."""
    whole = len(floats) // blocksize
    floats[:whole * blocksize].view(-1, blocksize).mul_(maxima[:whole, None])
    if whole * blocksize < len(floats):
        floats[whole * blocksize:].mul_(maxima[whole])


def _positive(blocksize: int, kind: str) -> int:
    if blocksize < 1:
        raise LabError(f"{kind}: a run of {blocksize} weights")
    return blocksize


def _values(kind: str) -> torch.Tensor:
    """The 16 numbers of a kind by code, float32."""
    import torch
    if kind not in ("nf4", "fp4"):
        raise LabError(f"{kind[:60]!r} is no four-bit kind of bitsandbytes; there are nf4 and fp4")
    values = NF4 if kind == "nf4" else [*FP4, *(-v for v in FP4)]
    return torch.tensor(values, dtype=torch.float32) / (1 if kind == "nf4" else 12)


@lru_cache
def byte_pairs(kind: str, device: torch.device) -> torch.Tensor:
    """The two float32 of each byte, as 256 int64."""
    import torch
    values, byte = _values(kind), torch.arange(256)
    return torch.stack([values[byte >> 4], values[byte & 15]], 1).view(torch.int64).flatten().to(device)
