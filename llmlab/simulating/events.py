"""Serving as a sequence of events: requests come, the scheduler makes steps of them, and a cost says what each step takes.

The scheduler and the blocks are those of the engine (`runtime.scheduling`, `runtime.blocks`), step for step; only the model is
missing: a step takes the seconds its cost says, and every answer is as long as its request says. What a padded batch computes
for nothing counts as rows, but not as cells looked at, which favours it.
"""

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush
from statistics import fmean
from typing import NamedTuple, Protocol

from ..errors import LabError
from ..runtime.blocks import Blocks
from ..runtime.scheduling import Scheduler, Sequence, Step
from ..workloads import Arrival
from .costs import Load, Setup, load_of

BANDS = ("low", "best", "high")        # of speed: a step takes slow, usual or fast seconds
_FILLER = 0                            # every new token; what a text says decides nothing here


class StepCost(Protocol):
    """What a step takes: `costs.Cost` of a card, `fitted.Fitted` of this machine, or anything that says so."""

    window: int

    def seconds(self, load: Load, band: int = 1) -> float:
        """Of one step; band 0 slow, 1 usual, 2 fast."""
        ...


class Moment(NamedTuple):
    """One step, as `engine.history` records them. at: when it began; rows, padded, logits, cells: what was computed, cells
    those that each sequence looked at; running, waiting: texts after it; used, cached, free: blocks during it; wasted: cells
    of used blocks that hold nothing. `sequences`: those in the step."""

    at: float
    seconds: float
    rows: int
    padded: int
    logits: int
    cells: int
    running: int
    waiting: int
    used: int
    cached: int
    free: int
    wasted: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one request, seconds from the start: when it was asked for, its first token and its last. `reused`: tokens
    of its prompt that were there already."""

    arrived: float
    first: float
    ended: float
    prompt: int
    output: int
    reused: int
    preempted: int

    @property
    def first_seconds(self) -> float:
        """Seconds to the first token (time to first token)."""
        return self.first - self.arrived

    @property
    def each(self) -> float:
        """Seconds a token after the first (time per output token); 0 for an answer of one."""
        return (self.ended - self.first) / (self.output - 1) if self.output > 1 else 0.0

    @property
    def latency(self) -> float:
        """Seconds to the last token."""
        return self.ended - self.arrived

    @property
    def normalized(self) -> float:
        """Latency over the tokens of the answer: what the paper on PagedAttention compares at."""
        return self.latency / self.output


@dataclass(frozen=True, repr=False)
class Simulation:
    """A run that never was: modelled; or one that was, measured (`kind`; its history is then the engine's own). `requests` in
    the order they ended; `refused`: those too long for the memory or context; `history`: every step; `size`: cells of a
    block."""

    requests: tuple[Served, ...]
    refused: int
    history: tuple[Moment, ...]
    size: int
    blocks: int
    policy: str
    kind: str = "modelled"

    @property
    def seconds(self) -> float:
        """From the first request's coming to the last one's end."""
        return max((r.ended for r in self.requests), default=0.0) - min((r.arrived for r in self.requests), default=0.0)

    @property
    def requests_per_second(self) -> float:
        return len(self.requests) / self.seconds if self.requests else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second."""
        return sum(r.output for r in self.requests) / self.seconds if self.requests else 0.0

    @property
    def all_tokens_per_second(self) -> float:
        """Tokens of prompts and answers a second."""
        return sum(r.prompt + r.output for r in self.requests) / self.seconds if self.requests else 0.0

    @property
    def preemptions(self) -> int:
        return sum(r.preempted for r in self.requests)

    @property
    def reused(self) -> int:
        """Tokens of prompts that were in the cache already."""
        return sum(r.reused for r in self.requests)

    def percentile(self, what: str, percent: float) -> float:
        """Of the requests' "first_seconds", "each", "latency" or "normalized": the value that `percent` of them do not
        exceed."""
        if what not in ("first_seconds", "each", "latency", "normalized") or not 0 <= percent <= 100:
            raise LabError(f"percentile({what!r:.30}, {percent!r:.20}): there are first_seconds, each, latency, normalized; "
                           "percent from 0 to 100")
        found = sorted(getattr(r, what) for r in self.requests)
        return found[max(math.ceil(percent / 100 * len(found)) - 1, 0)] if found else 0.0

    def mean(self, what: str) -> float:
        """Mean of the same."""
        return fmean(getattr(r, what) for r in self.requests) if self.requests else 0.0

    @cached_property
    def _times(self) -> float:
        return sum(m.seconds for m in self.history)

    def over_time(self, what: str) -> float:
        """The mean over time of a field of the history ("running", "waiting", "used", ...) while anything ran."""
        return sum(getattr(m, what) * m.seconds for m in self.history) / self._times if self.history else 0.0

    @property
    def wasted_share(self) -> float:
        """Cells of held blocks that hold nothing, over all cells of held blocks, in the mean over time (the paper's figure 2
        shows 1 - this)."""
        reserved = self.over_time("used") * self.size
        return self.over_time("wasted") / reserved if reserved else 0.0

    @property
    def computing_share(self) -> float:
        """Rows that were not padding, of all rows computed."""
        rows, padded = sum(m.rows for m in self.history), sum(m.padded for m in self.history)
        return rows / (rows + padded) if rows else 1.0

    def row(self) -> dict:
        """The main figures, for a table."""
        return {"requests/s": self.requests_per_second, "tokens/s": self.tokens_per_second,
                "first token s": self.percentile("first_seconds", 50),
                "first token p99 s": self.percentile("first_seconds", 99),
                "s per token": self.percentile("each", 50), "latency s": self.percentile("latency", 50),
                "latency p99 s": self.percentile("latency", 99), "running": self.over_time("running"),
                "wasted": self.wasted_share, "preemptions": self.preemptions}

    def __repr__(self) -> str:
        how = "measured" if self.kind == "measured" else "simulated"
        return (f"<{how}, {self.policy}: {len(self.requests)} requests in {self.seconds:.4g} s, "
                f"{self.requests_per_second:.3g} requests and {self.tokens_per_second:.4g} tokens a second, "
                f"{self.wasted_share:.1%} of the held cache wasted, {self.preemptions} preemptions>")


def simulate(arrivals: Many[Arrival], cost: StepCost, blocks: int, size: int = 16, rows: int = 256, sequences: int = 64,
             policy: str = "paged", *, context: int | None = None, share: bool = True, clients: int | None = None,
             band: str = "best") -> Simulation:
    """Serve `arrivals` by a scheduler over `blocks` blocks of `size` tokens, at the cost of each step.

    rows, sequences, policy, context: as `runtime.scheduling.Scheduler` takes them. share: whether prompts that begin alike
    share blocks. clients: so many ask one request after another, each the next one when its last has ended (times of arrival
    do not count then); None: requests come when they say. band: "best", or the "low" or "high" end of the cost's speed. Raises
    LabError for what cannot work.
    """
    if band not in BANDS:
        raise LabError(f"band is {band!r:.30}; it is one of {', '.join(BANDS)}")
    if clients is not None and (isinstance(clients, bool) or not isinstance(clients, int) or clients < 1):
        raise LabError(f"clients is {clients!r:.30}; give how many ask at once, 1 at least, or None")
    return _Run(arrivals, cost, Scheduler(Blocks(blocks, size, share), rows, sequences, policy, context), clients,
                BANDS.index(band)).to_the_end()


def simulate_setup(setup: Setup, arrivals: Many[Arrival], policy: str = "paged", *, clients: int | None = None,
                   share: bool = True, band: str = "best") -> Simulation:
    """The same for a model on a card (`costs.setup`); its memory holds more where its cost is at the high end of speed."""
    return simulate(arrivals, setup.cost, setup.blocks[BANDS.index(band) if band in BANDS else 1], setup.size, setup.rows,
                    setup.sequences, policy, context=setup.context, share=share, clients=clients, band=band)


class _Run:
    """One simulation while it goes on."""

    def __init__(self, arrivals: Many[Arrival], cost: StepCost, scheduler: Scheduler, clients: int | None, band: int):
        self.cost, self.scheduler, self.band = cost, scheduler, band
        self.coming = [((0.0 if clients else a.at), i, a) for i, a in enumerate(arrivals)]
        self.later = self.coming[clients:][::-1] if clients else []
        self.coming = self.coming[:clients] if clients else self.coming
        heapify(self.coming)
        self.closed = clients is not None
        self.first: dict[Sequence, float] = {}
        self.ended: list[Served] = []
        self.history: list[Moment] = []
        self.refused, self.now = 0, 0.0

    def to_the_end(self) -> Simulation:
        scheduler = self.scheduler
        while True:
            while self.coming and self.coming[0][0] <= self.now:
                self._come(*heappop(self.coming))
            step = scheduler.step()
            if step is not None:
                self._compute(step)
            elif self.coming:
                self.now = self.coming[0][0]
            else:
                break
        blocks = scheduler.blocks
        return Simulation(tuple(self.ended), self.refused, tuple(self.history), blocks.size, blocks.count, scheduler.policy)

    def _come(self, at: float, _: int, arrival: Arrival) -> None:
        try:
            self.scheduler.add(Sequence(arrival.tokens(), arrival.output, at))
        except LabError:
            self.refused += 1
            self._next()

    def _next(self) -> None:
        """Where a number of clients ask, the one whose answer ended asks the next."""
        if self.later:
            _, i, arrival = self.later.pop()
            heappush(self.coming, (self.now, i, arrival))

    def _compute(self, step: Step) -> None:
        scheduler, pieces = self.scheduler, step.pieces
        load = load_of([piece[1:4] for piece in pieces], self.cost.window)
        usage = scheduler.blocks.usage()
        load = load._replace(rows=load.rows + step.padded) if step.padded else load
        seconds = self.cost.seconds(load, self.band)
        began, self.now = self.now, self.now + seconds
        new = {piece[0]: _FILLER for piece in pieces if piece[3]}
        for sequence in new:
            if sequence not in self.first:
                self.first[sequence] = self.now
        for sequence in scheduler.done(step, new):
            self.ended.append(Served(sequence.arrived, self.first.pop(sequence), self.now, len(sequence.prompt), sequence.most,
                                       sequence.reused, sequence.preempted))
            if self.closed:
                self._next()
        self.history.append(Moment(began, seconds, load.rows - step.padded, step.padded, load.wanted, load.looked,
                                   len(scheduler.running), len(scheduler.waiting), usage.used, usage.cached, usage.free,
                                   usage.wasted, load.sequences))
