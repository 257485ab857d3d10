"""A real run in the words of a simulated one, so that the two stand side by side: what each request became and each step took,
measured; what steps cost is learnt from these records, and what was predicted by it is set beside what came."""

from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..catalog import Table
from ..runtime.blocks import Blocks
from ..workloads import Arrival
from .events import Served, Simulation, StepCost, simulate
from .fitted import Fitted, fit_cost

if TYPE_CHECKING:
    from ..runtime.engine import Record
    from ..runtime.jobs import Answer

CLOSE = 0.15           # how near a prediction is to be


@dataclass(frozen=True)
class Serving:
    """How requests are served, by an engine and by its simulation alike. blocks: in the pool, of `size` tokens; rows,
    sequences: most of a step; context: of one text, what "static" reserves; share: whether texts that begin alike share blocks;
    clients: so many ask one after another (None: all come when they say)."""

    blocks: int
    sequences: int
    policy: str = "paged"
    context: int | None = None
    share: bool = True
    rows: int = 256
    size: int = 16
    clients: int | None = None

    def simulated(self, arrivals: Many[Arrival], cost: StepCost, band: str = "best") -> Simulation:
        """The same without the model. Raises LabError as `simulate`."""
        return simulate(arrivals, cost, self.blocks, self.size, self.rows, self.sequences, self.policy, context=self.context,
                        share=self.share, clients=self.clients, band=band)


def measured(answers: Iterable[tuple[float, "Answer"]], history: "Iterable[Record]", pool: Blocks, policy: str) -> Simulation:
    """A run of the engine: (second at which it was asked for, its answer) of every request, and the engine's records of the
    steps since the first."""
    served = [Served(at, at + (one.first_seconds or one.seconds), at + one.seconds, one.prompt_tokens, len(one.tokens),
                     one.reused_tokens, one.preempted) for at, one in answers]
    return Simulation(tuple(sorted(served, key=lambda one: one.ended)), 0, tuple(history), pool.size, pool.count, policy,
                      kind="measured")


def learnt(*runs: Simulation) -> Fitted:
    """What a step takes here, from measured runs. Raises LabError for too few steps, or steps that are all alike."""
    return fit_cost([step for run in runs for step in run.history])


@dataclass(frozen=True)
class Beside:
    """One run as it was predicted and as it was measured. new: whether its own steps were not among those that were learnt
    from."""

    name: str
    predicted: Simulation
    measured: Simulation
    new: bool = True

    @property
    def off(self) -> float:
        """How far the measured throughput is from the predicted one, as a share of that."""
        return self.measured.tokens_per_second / self.predicted.tokens_per_second - 1

    @property
    def close(self) -> bool:
        return abs(self.off) <= CLOSE


def beside_measured(runs: Iterable[Beside]) -> Table:
    """A row a run: throughput and the first token, predicted beside measured."""
    return Table([{"": one.name, "tokens/s predicted": one.predicted.tokens_per_second,
                   "measured": one.measured.tokens_per_second, "off": one.off, "first token s predicted":
                   one.predicted.mean("first_seconds"), "first token s measured": one.measured.mean("first_seconds"),
                   "steps": f"{len(one.predicted.history)} and {len(one.measured.history)}",
                   "learnt from": "others" if one.new else "itself too"} for one in runs],
                 {"tokens/s predicted": "{:.1f}".format, "measured": "{:.1f}".format, "off": "{:+.0%}".format,
                  "first token s predicted": "{:.2f}".format, "first token s measured": "{:.2f}".format})
