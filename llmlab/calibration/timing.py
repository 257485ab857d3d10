"""Rounds of the same work until the time is up: the slowest, the median and the fastest are the figure."""

import statistics
import time
from collections.abc import Callable

from ..calibrated import Figure

LEAST, MOST = 3, 9  # rounds: a median needs three; more than nine only cost time


def rounds(call: Callable[[], object], seconds: float, least: int = LEAST, most: int = MOST) -> list[float]:
    """Seconds of each round, after one that is not counted (it allocates, packs, wakes threads).

    Stops at `most` rounds, or after `least` once `seconds` are spent; where even those would take three times as long,
    with what there is, one at least.
    """
    end = time.perf_counter() + seconds
    call()
    took: list[float] = []
    while not took or len(took) < most:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        took.append(now - start)
        if now > end and (len(took) >= least or now > end + 2 * seconds):
            break
    return took


def rate(work: float, took: list[float]) -> tuple[float, float, float]:
    """(low, median, high) of `work` units a round, each round in its seconds."""
    return work / max(took), work / statistics.median(took), work / min(took)


def figure(part: str, device: str, name: str, work: float, took: list[float], unit: str, how: str, **more) -> Figure:
    low, best, high = rate(work, took)
    return Figure(part, device, name, low, best, high, unit, len(took), f"{how}; {count(len(took))}", **more)


def count(rounds: int) -> str:
    return f"{rounds} round{'s' * (rounds != 1)}"
