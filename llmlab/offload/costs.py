"""What one pass over an offloaded model takes: a schedule of its layers over a drive, a link and the device. Pure functions.

Layers are computed one after another; while one is, a drive fills the slots of those that come next, and a link copies what has
come from the drive or waits in RAM. So a pass takes at least what the busiest of the three takes, and at most the sum of all:
where in between follows from how many slots there are and where the resident layers stand. Experts are wanted only once the
router has spoken: what the cache lacks is waited for. Rates are known as bands no wider than a factor of two, and so is what
follows from them: a schedule of stages that all take twice as long takes twice as long.
"""

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from ..rates import Band, banded
from ..units import MIB
from .hits import expected_hits

PASSES = 4              # until a pass takes as long as the one before it
CHUNK = 4 * MIB         # bytes of one read, as `reading` asks for them
FLASH, SATA, HEAD = 75e-6, 150e-6, 12e-3      # seconds until a read begins: NVMe, what gives 0.78 and 3.17 GB/s in 68 KB reads
#                                               by one and four threads (data/links.csv, nvme-python-threads), of a SATA drive,
#                                               and a head's way over a turning disk, which a large piece takes once
MEASURED = (0.70, 0.92, 1.15)                 # of a drive's rate as it was measured once: other runs of the same drives gave
#                                               0.87 to 1.15 of it (Samsung 9100 PRO, 8.7 to 11.5 GB/s)
RATED = (0.45, 0.70, 0.90)                    # of what a maker promises: those measured too reach 0.43 (P3) to 0.84 (980 PRO)
COPIED = (0.70, 0.92, 1.0)                    # of a link's pinned rate, where pieces of a few MB are copied one after another
PAGEABLE = (4.2e9, 6.0e9, 7.0e9)              # bytes a second from memory that is not pinned (PCIe 4.0 x16, data/links.csv)
IN_RAM = (0.35, 0.50, 0.60)                   # of the rate at which weights are read from RAM: a copy reads and writes bytes
SKEW = (0.4, 0.85, 1.25)                      # of experts' popularity, see `expected`


class Stage(NamedTuple):
    """One layer of a pass, in seconds. read: on the drive, and copy: on the link, before it can begin (0: it is resident, or
    not on that way). work: on the device, of which `before` until the router has chosen; then misses are read and copied.
    slot: whether it takes its turn in the slots."""

    read: float = 0.0
    copy: float = 0.0
    work: float = 0.0
    slot: bool = False
    before: float = 0.0
    missed: float = 0.0
    fetched: float = 0.0


class Pass(NamedTuple):
    """Seconds of a pass, once one takes as long as the next; and how long each way was busy in it."""

    seconds: float
    drive: float
    link: float
    device: float

    @property
    def waiting(self) -> float:
        """Seconds in which the device has nothing to do."""
        return max(self.seconds - self.device, 0.0)


def bounds(stages: Sequence[Stage]) -> tuple[float, float]:
    """The least and the most seconds that a pass of these stages can take: the busiest way alone, and all ways one after
    another."""
    drive, link, device = busy(stages)
    return max(drive, link, device), drive + link + device


def busy(stages: Sequence[Stage]) -> tuple[float, float, float]:
    """Seconds of drive, link and device in one pass."""
    return (sum(s.read + s.missed for s in stages), sum(s.copy + s.fetched for s in stages), sum(s.work for s in stages))


def schedule(stages: Sequence[Stage], slots: int) -> Pass:
    """A pass in the steady state: reads are asked for as soon as a slot is free, in the order of the layers, and served first
    come first served; those for the next pass begin before this one ends."""
    turns = [(stage.read, stage.copy) for stage in stages if stage.slot]
    used = busy(stages)
    if not turns and not any(stage.missed or stage.fetched for stage in stages):
        return Pass(used[2], *used)
    drive = link = device = 0.0                       # when each is free
    ready: deque[float] = deque()                     # when the slots that are asked for will be full, in order
    asked, ends = 0, [0.0]

    def ask(now: float) -> None:
        nonlocal drive, link, asked
        read, copy = turns[asked % len(turns)]
        if read:
            now = drive = (drive if drive > now else now) + read
        if copy:
            now = link = (link if link > now else now) + copy
        ready.append(now)
        asked += 1

    for _ in range(min(max(slots, 1), PASSES * len(turns))):
        ask(0.0)
    for _ in range(PASSES):
        for _, _, work, slot, before, missed, fetched in stages:
            begin = device
            if slot and (full := ready.popleft()) > begin:
                begin = full
            device = begin + work
            if missed or fetched:
                came = begin + before
                if missed:
                    came = drive = (drive if drive > came else came) + missed
                if fetched:
                    came = link = (link if link > came else came) + fetched
                device = max(device, came + work - before)
            if slot:
                ask(device)
        ends.append(device)
    # the last two passes together: a read that falls into one pass now and into the next then evens out
    return Pass((ends[-1] - ends[-3]) / 2, *used)


def costing(one: Pass, hidden: float) -> Pass:
    """The same pass where only this share of what the drive and the device do at once is for nothing: for the rest each waits
    while the other has what both need, such as the processor's cores."""
    return one._replace(seconds=one.seconds + (1 - hidden) * max(0.0, one.drive + one.device - one.seconds))


# ---- rates -----------------------------------------------------------------------------------------------------------

def reading_rate(rate: float, readers: int, wait: float, block: float = CHUNK) -> float:
    """Bytes per second that so many readers get from a drive of `rate`, each asking for `block` bytes and waiting `wait`
    seconds until they begin to come: one at a time leaves the drive idle in between."""
    if not rate or rate <= 0:
        return 0.0
    alone = block / (wait + block / rate)
    return min(rate, max(readers, 1) * alone)


def seconds(amount: float, rate: Band | None) -> Band:
    """Slow, usual and fast seconds of so many bytes; nothing where there is no such way or nothing to move."""
    if not amount or rate is None:
        return 0.0, 0.0, 0.0
    return amount / rate[0], amount / rate[1], amount / rate[2]


def within_two(slow: float, usual: float, fast: float) -> Band:
    """A band no wider than a factor of two, around the usual: as it is, where it is none already."""
    if slow <= 2 * fast:
        return slow, usual, fast
    fast = max(fast, usual / 2 ** 0.5)
    return min(slow, 2 * fast), usual, fast


def drive_band(rate: float, measured: bool) -> Band:
    """What a drive gives, from one figure: measured somewhere, or only promised."""
    return banded(rate, MEASURED if measured else RATED)


# ---- experts ---------------------------------------------------------------------------------------------------------

@lru_cache(maxsize=4096)
def expected(experts: int, used: int, slots: int, layers: int) -> Band:
    """The share of wanted experts that a cache of so many slots, of all layers together, holds: few, usual, many. Modelled.

    By `hits.expected_hits`: the k-th most popular expert of a layer is wanted with a weight of k ** -skew. All alike is the
    worst case. Public hit rates of real texts, of five models (tests/golden/expert_hits.csv), lie between those of `SKEW`.
    """
    if slots >= experts * layers:
        return 1.0, 1.0, 1.0
    return tuple(expected_hits(experts, used, slots, skew, layers) for skew in SKEW)


def touched(experts: int, used: int, tokens: float) -> float:
    """Experts of a layer that so many tokens want together, each choosing for itself and all alike: an upper estimate."""
    return experts * (1 - (1 - used / experts) ** tokens) if experts else 0.0


# ---- more tokens a pass ----------------------------------------------------------------------------------------------

def tokens_a_pass(drafted: int, accepted: float) -> float:
    """Tokens that a pass yields when so many are drafted and each is right with that chance: (1 - a^(k+1)) / (1 - a), the
    model's own token among them (Leviathan, Kalman and Matias, 2023, equation 1)."""
    if accepted >= 1:
        return drafted + 1.0
    return (1 - accepted ** (drafted + 1)) / (1 - accepted)


__all__ = ["Pass", "Stage", "bounds", "busy", "costing", "drive_band", "expected", "reading_rate", "schedule", "seconds",
           "tokens_a_pass", "touched", "within_two"]
