"""What of a disk's reading hides behind computing: both at once, beside each alone.

A drive that brings its bytes by itself costs the processor next to nothing, and both go on at full speed. Behind a page cache,
encryption or a virtual disk somebody copies each byte, and reads and computing take from each other: what they get done
together is then hardly more than one after the other.
"""

import threading
import time
from collections.abc import Callable

import torch

from ..calibrated import Figure
from ..units import MIB

ROUNDS = 5
STREAMED = 128 * MIB      # bytes that all threads read again and again meanwhile, more than a processor's caches hold


def measure(read: Callable[[float], float], threads: int, room: int, seconds: float, how: str) -> Figure | None:
    """`read(seconds)` reads the disk for so long with threads of its own and gives bytes per second; `threads` those that
    compute. The share of the shorter of both that is hidden when both are done at once: 1 all of it, 0 nothing. None where
    `room`, bytes of free memory, is too little."""
    if room < 4 * STREAMED:
        return None
    before, each, shares = torch.get_num_threads(), seconds / (3 * ROUNDS), []
    weights = torch.ones(STREAMED // 4, dtype=torch.float32, device="cpu")
    try:
        torch.set_num_threads(threads)
        weights.sum()
        for _ in range(ROUNDS):
            alone, end = read(each), time.perf_counter() + each
            passes = _streamed(weights, lambda end=end: time.perf_counter() < end)
            both = _together(read, weights, each)
            shares.append(min(1.0, max(0.0, both[0] / alone + both[1] / passes - 1.0)))
    finally:
        torch.set_num_threads(before)
    shares.sort()
    return Figure("together", "disk", "hidden", shares[0], shares[ROUNDS // 2], shares[-1], "share", ROUNDS,
                  f"{how}, while {threads} threads read RAM", threads=threads)


def _streamed(weights: torch.Tensor, going: Callable[[], bool]) -> float:
    """Passes over the weights per second."""
    start, passes = time.perf_counter(), 0
    while going() or not passes:
        weights.sum()
        passes += 1
    return passes / (time.perf_counter() - start)


def _together(read: Callable[[float], float], weights: torch.Tensor, seconds: float) -> tuple[float, float]:
    found: list[float | BaseException] = []

    def reads() -> None:
        try:
            found.append(read(seconds))
        except BaseException as error:      # for the thread that waits
            found.append(error)

    reader = threading.Thread(target=reads, daemon=True)
    reader.start()
    try:
        passes = _streamed(weights, reader.is_alive)
    finally:
        reader.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0], passes
