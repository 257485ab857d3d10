"""How fast the disk gives a file that is not in the page cache: by method, and by how many threads read at once.

A read counts as cold where the page cache held none of the file before it, which mincore says; every figure carries
what it said. A virtual disk or a controller may have a cache of its own below, which nothing here can see or empty.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch

from ..calibrated import Figure
from ..offload.reading import buffer
from ..units import GIB, MIB, format_bytes
from . import together
from .timing import count

METHODS = ("buffered", "direct", "mmap")
THREADS = (1, 2, 4, 8)
MOST_BYTES, LEAST_BYTES = 512 * MIB, 16 * MIB  # of the file that is written
SPAN = 2 * GIB  # of a file that is there already: mincore takes some 25 ms a GiB
ROUNDS = 3
BESIDE = 0.15  # share of the time for reading beside computing
COLD = 0.01  # share of the file in the page cache; what the system reads ahead by itself stays below
_PAGE = mmap.PAGESIZE


class Skipped(Exception):
    """The disk cannot be measured; the text says why and what would help."""


@dataclass
class _Reads:
    """What the rounds of one method and thread count gave."""

    rates: list[float] = field(default_factory=list)
    resident: list[float | None] = field(default_factory=list)
    bytes: int = 0


def measure(folder: Path, kind: str, seconds: float, say: Callable[[float, str], None],
            most: int = MOST_BYTES) -> tuple[list[Figure], list[tuple[str, str]]]:
    """Figures and what was skipped, in about `seconds`; `kind` is `hardware.Disk.kind`. `say(share done, text)`.

    Reads the largest model in `folder` where it has one big enough, else writes a file of up to `most` bytes (a quarter
    of the time at most goes into that), which is gone afterwards, whatever happens.
    """
    end = time.perf_counter() + seconds
    try:
        if kind == "memory":
            raise Skipped("llmlab's cache lies in RAM (tmpfs); set LLMLAB_CACHE to a folder on the disk")
        with _file(folder, most, seconds / 4, say) as (path, size, what):
            return _read_all(path, size, f"{what}; {kind} disk" if kind != "unknown" else what, end, say)
    except Skipped as reason:
        return [], [("disk", str(reason))]
    except OSError as error:
        return [], [("disk", _words(error, folder))]


def _words(error: OSError, folder: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{folder} is full; free some, or set LLMLAB_CACHE to a folder on a bigger disk"
    return f"{folder}: {error.strerror or error}"


# -- the file ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _file(folder: Path, most: int, seconds: float, say) -> Iterator[tuple[str, int, str]]:
    """(path to open, bytes, words) of a file on this disk that nobody has mapped and whose pages are on the disk."""
    if there := _model(folder, most):
        size = there.stat().st_size
        yield str(there), min(size, SPAN), f"a model of {format_bytes(size)}"
        return
    folder = _made(folder / "calibration")
    _sweep(folder)
    free = shutil.disk_usage(folder).free
    size = min(most, free // 8) // MIB * MIB
    if size < LEAST_BYTES:
        raise Skipped(f"{folder} has {format_bytes(free)} free and a test file needs an eighth of it to be at least "
                      f"{format_bytes(LEAST_BYTES)}; free some, or set LLMLAB_CACHE to a folder on a bigger disk")
    with _scratch(folder) as (file, path):
        size = _fill(file, size, seconds, say)
        yield path, size, f"a file of {format_bytes(size)}"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _model(folder: Path, least: int) -> Path | None:
    """The largest model file of llmlab's cache: reading it tells as much as writing one, and wears nothing. None where all
    are small, or where that one stays in the page cache because a program has it mapped."""
    sizes = {}
    for path in (folder / "models").rglob("*"):
        with contextlib.suppress(OSError):
            if path.suffix in (".gguf", ".safetensors") and path.is_file() and not path.is_symlink():
                sizes[path] = path.stat().st_size
    best = max(sizes, key=sizes.__getitem__, default=None)
    if not best or sizes[best] < least:
        return None
    return best if (drop(str(best), min(sizes[best], SPAN)) or 0.0) < COLD else None


_NAME = ".reading-"


@contextlib.contextmanager
def _scratch(folder: Path):
    """(open file, path to open it again). On Linux the file never has a name, so no end of ours can leave it behind;
    elsewhere it is removed, and what a killed process left goes at the next calibration."""
    if sys.platform == "linux" and os.path.isdir("/proc/self/fd"):
        with tempfile.TemporaryFile(dir=folder, prefix=_NAME, buffering=0) as file:
            yield file, f"/proc/self/fd/{file.fileno()}"
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix=_NAME, buffering=0, delete=False) as file:
        try:
            yield file, file.name
        finally:
            file.close()
            Path(file.name).unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    for left in folder.glob(f"{_NAME}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 600:  # nobody's any more: a run takes half a minute
                left.unlink()


def _fill(file, size: int, seconds: float, say) -> int:
    """Writes up to `size` bytes that do not compress, as many as `seconds` allow (4 MiB at least); returns how many are on
    the disk."""
    block, end, written, step = np.random.default_rng(0).bytes(32 * MIB), time.perf_counter() + seconds, 0, 4 * MIB
    while written < size and (not written or time.perf_counter() < end):
        start, part = time.perf_counter(), memoryview(block)[:min(step, size - written)]
        while part:  # a raw file may take less than it is given
            taken = file.write(part)
            written, part = written + taken, part[taken:]
        os.fsync(file.fileno())
        if time.perf_counter() - start < 0.1:
            step = min(2 * step, len(block))
        say(0.25 * written / size, f"disk: writing a test file, {format_bytes(written)}")
    return written


# -- the reads ---------------------------------------------------------------------------------------------------------


def _read_all(path: str, size: int, what: str, end: float, say) -> tuple[list[Figure], list[tuple[str, str]]]:
    cases, skipped = [(method, threads) for method in METHODS for threads in THREADS], []
    if refused := _no_direct(path):
        cases = [case for case in cases if case[0] != "direct"]
        skipped.append(("disk, direct", refused))
    chunk, found = _chunk(path, size), {case: _Reads() for case in cases}
    begin, at, last = time.perf_counter(), 0, end
    end -= BESIDE * max(0.0, end - begin)
    each = max(0.0, end - begin) / (len(cases) * ROUNDS)
    for _ in range(ROUNDS):
        for method, threads in cases:
            now = time.perf_counter()
            if now >= end and found[cases[0]].rates:  # late as it may be, one is read
                break
            say(0.25 + 0.65 * min(1.0, (now - begin) / (end - begin)), f"disk: {method}, {_threads(threads)}")
            resident = drop(path, size)
            # Dropping and looking takes its part of the time; a round reads at least one chunk a thread.
            seconds = max(0.01, each - (time.perf_counter() - now))
            read, took, at = _round(path, method, threads, size, chunk, at, seconds)
            mine = found[method, threads]
            mine.rates.append(read / took)
            mine.resident.append(resident)
            mine.bytes += read
    figures = [_figure(case, reads, what) for case, reads in found.items() if reads.rates]
    late = [f"{method}, {_threads(threads)}" for (method, threads), reads in found.items() if not reads.rates]
    if late:
        skipped.append(("disk", f"no time was left for {' and '.join(late)}" if figures else
                        "no time was left to read it"))
    if figures and not hasattr(os, "posix_fadvise"):
        skipped.append(("disk, cold", "this system has no call that empties a file's page cache, so reads may be warm"))
    plain = [f for f in figures if f.method != "mmap"]
    if plain and time.perf_counter() < last:
        figures += _beside(path, size, chunk, at, max(plain, key=lambda f: f.best), last - time.perf_counter(), what, say)
    return figures, skipped


def _beside(path: str, size: int, chunk: int, at: int, fastest: Figure, seconds: float, what: str, say) -> list[Figure]:
    """What of the fastest way of reading hides behind computing."""
    def read(seconds: float) -> float:
        nonlocal at
        drop(path, size)
        read, took, at = _round(path, fastest.method, fastest.threads, size, chunk, at, seconds)
        return read / took

    say(0.9, "disk: while the processor computes")
    found = together.measure(read, torch.get_num_threads(), psutil.virtual_memory().available, seconds,
                             f"{fastest.method}, {_threads(fastest.threads)}, of {what}")
    return [found] if found else []


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def _figure(case: tuple[str, int], reads: _Reads, what: str) -> Figure:
    method, threads = case
    seen = [share for share in reads.resident if share is not None]
    resident = max(seen, default=None)
    cold = None if len(seen) < len(reads.resident) or resident is None else resident < COLD
    return Figure("disk", "disk", method, min(reads.rates), statistics.median(reads.rates), max(reads.rates), "B/s",
                  len(reads.rates), f"{format_bytes(reads.bytes)} of {what}; {count(len(reads.rates))}", threads=threads,
                  cold=cold, resident=resident)


def _chunk(path: str, size: int) -> int:
    """Bytes of one read: what the disk gives in some 20 ms, 256 KiB to 8 MiB, so that a slow disk ends in time."""
    drop(path, size)
    probe = min(MIB, size)
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        file.seek((size - probe) // 2 // _PAGE * _PAGE)
        file.read(probe)
    wanted = int(probe / max(1e-9, time.perf_counter() - start) * 0.02)
    chunk = 8 * MIB
    while chunk > 256 * 1024 and (chunk > wanted or chunk > size // 16):
        chunk //= 2
    return chunk


def _round(path: str, method: str, threads: int, size: int, chunk: int, at: int,
           seconds: float) -> tuple[int, float, int]:
    """(bytes read, seconds, where the next round goes on). Threads take the chunks in the file's order, from `at` on and
    round the end, but no chunk twice: the second time it would be warm."""
    lock, errors, done = threading.Lock(), [], [0]
    chunks = size // chunk  # whole ones: O_DIRECT takes no odd end
    taken = [0]

    def next_chunk() -> int | None:
        with lock:
            if taken[0] >= chunks or (taken[0] >= threads and time.perf_counter() > end):
                return None
            taken[0] += 1
            return (at + taken[0] - 1) % chunks * chunk

    def work(reader):
        try:
            mine = 0
            while (offset := next_chunk()) is not None:
                mine += reader(offset)
            with lock:
                done[0] += mine
        except BaseException as error:  # shown by the thread that waits
            errors.append(error)

    with contextlib.ExitStack() as stack:
        if method == "mmap":
            mapped = stack.enter_context(_mapped(path, size))
            readers = [_toucher(mapped, chunk)] * threads
        else:
            readers = [stack.enter_context(_reader(path, method == "direct", chunk)) for _ in range(threads)]
        workers = [threading.Thread(target=work, args=(reader,), daemon=True) for reader in readers]
        start = time.perf_counter()
        end = start + seconds
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        except BaseException:
            taken[0] = chunks  # interrupted: no thread takes another chunk
            for worker in workers:
                if worker.ident:
                    worker.join()
            raise
        took = time.perf_counter() - start
        del readers
    if errors:
        raise errors[0]
    return done[0], max(took, 1e-9), (at + taken[0]) % chunks


@contextlib.contextmanager
def _reader(path: str, direct: bool, chunk: int):
    """A function that reads the chunk at an offset into a buffer of its own; page-aligned, as O_DIRECT wants it."""
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0) | getattr(os, "O_BINARY", 0)
    with (open(os.open(path, flags), "rb", buffering=0) as file,
          memoryview(buffer(chunk).numpy()) as view):      # as weights are read: on huge pages a drive is up to twice as fast
        def read(offset: int) -> int:
            file.seek(offset)
            got = 0
            while got < chunk and (more := file.readinto(view[got:])):
                got += more
            return got

        yield read


@contextlib.contextmanager
def _mapped(path: str, size: int):
    """The file's bytes as an array; pages come in as they are touched. Closed after: a mapping keeps its pages."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as area:
        holder = [np.frombuffer(area, np.uint8)]
        try:
            yield holder
        finally:
            holder.clear()


def _toucher(holder: list, chunk: int):
    def touch(offset: int) -> int:
        holder[0][offset:offset + chunk:_PAGE].sum()  # one byte a page; numpy lets other threads run meanwhile
        return chunk

    return touch


def _no_direct(path: str) -> str | None:
    if not hasattr(os, "O_DIRECT"):
        return "this system has no O_DIRECT"
    try:
        with _reader(path, True, _PAGE) as read:
            read(0)
    except OSError as error:
        return f"this file system refuses O_DIRECT ({error.strerror or error})"
    return None


# -- the page cache ----------------------------------------------------------------------------------------------------


def drop(path: str, size: int) -> float | None:
    """Empties the page cache of the file's first `size` bytes, and gives the share that is in it all the same.

    The pages must be clean and nobody may have them mapped. None where the system does not say.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        for wait in (0.0, 0.002, 0.01, 0.05):  # pages still on their way from the disk are locked, and stay
            time.sleep(wait)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            share = residency(descriptor, size)
            if not share:
                break
        return share
    finally:
        os.close(descriptor)


def residency(descriptor: int, size: int) -> float | None:
    """The share of a file's first `size` bytes that lies in the page cache, by mincore(2); None where there is none."""
    if os.name != "posix" or not size:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        return None
    try:
        pages = ctypes.create_string_buffer(-(-size // _PAGE))
        if libc.mincore(address, size, pages):
            return None
        return float((np.frombuffer(pages, np.uint8) & 1).mean())
    finally:
        libc.munmap(address, size)
