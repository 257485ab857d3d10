"""What a step takes on this machine: learnt from steps that were measured, with what is left over said.

A sum of terms that none of them makes a step shorter: one for the step itself; for its rows, more a row at first and less
later (or the other way round), as weights are read once for all of them and kernels change with their number; for each
sequence whose next token is wanted; for each cell of the cache that is looked at. The factors are those of least squares that
are not negative (Lawson and Hanson, 1974), of relative errors, so that short steps count as much as long ones.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

from ..errors import LabError
from .costs import Load

KNEES = (2, 4, 8, 16, 32, 64, 128)     # rows at which the seconds of one more row may change
_NAMES = ("rows", "padded", "logits", "cells", "seconds")      # of a record
_FEWEST = 20                           # steps; fewer say nothing
_FAR = 6.0                             # times the usual error: steps in which something else had the processor


class Step(NamedTuple):
    """What one step was, and what it took in seconds. rows: with padding; wanted: rows of logits; looked: cells of the cache
    that its sequences looked at, each once."""

    rows: int
    wanted: int
    looked: int
    seconds: float


def steps_of(records: Iterable) -> list[Step]:
    """Steps of `engine.history`, of a simulation's, or of either written down as dicts."""
    def each(r):
        rows, padded, logits, cells, seconds = (
            [r[name] for name in _NAMES] if isinstance(r, Mapping) else [getattr(r, name) for name in _NAMES])
        return Step(rows + padded, logits, cells, seconds)
    return [r if isinstance(r, Step) else each(r) for r in records]


@dataclass(frozen=True)
class Fitted:
    """Seconds of a step of this machine: `factors` times `_terms`. `low` and `high`: what nine of ten steps take at least and
    at most, over what this says. `error`: median of the relative errors; `total`: seconds said over seconds measured, of all
    steps, those left out too; `steps`: how many were learnt from; `dropped`: those left out, as something else had the
    processor."""

    factors: tuple[float, ...]
    low: float
    high: float
    error: float
    total: float
    steps: int
    dropped: int
    kind: str = "measured"
    window: int = 0

    def seconds(self, load: Load, band: int = 1) -> float:
        """Of a step: band 0 slow, 1 usual, 2 fast."""
        return self.predicted(load.rows, load.wanted, load.looked) * (self.high, 1.0, self.low)[band]

    def predicted(self, rows: int, wanted: int, looked: int) -> float:
        """Usual seconds of a step."""
        return sum(factor * term for factor, term in zip(self.factors, _terms(rows, wanted, looked), strict=True))

    @property
    def why(self) -> str:
        """What it rests on, in a sentence."""
        return (f"Fitted to {self.steps:,} measured steps ({self.dropped:,} left out that something else held up): half of "
                f"them within {self.error:.1%}, all together {self.total - 1:+.1%}.")


def fit_cost(records: Iterable) -> Fitted:
    """Learn what a step takes from `engine.history`, or whatever `steps_of` takes. Raises LabError for too few steps, or steps
    of one or two sizes: those say nothing of others."""
    steps = [s for s in steps_of(records) if s.rows > 0 and s.seconds > 0]
    if len(steps) < _FEWEST or len({s.rows for s in steps}) < 3:
        raise LabError(f"{len(steps)} steps of {len({s.rows for s in steps})} sizes are too few to learn from; serve some "
                       f"requests of different lengths first, {_FEWEST} steps at least")
    terms = np.array([_terms(*s[:3]) for s in steps], dtype=float)
    seconds = np.array([s.seconds for s in steps])
    kept = np.ones(len(steps), dtype=bool)
    for _ in range(3):                          # what lies far off is left out, then learnt anew
        factors = _not_negative(terms[kept] / seconds[kept, None], np.ones(kept.sum()))
        ratios = seconds / np.maximum(terms @ factors, 1e-12)
        usual = median(ratios[kept])
        far = _FAR * max(float(np.median(np.abs(ratios[kept] / usual - 1))), 0.02)
        kept = ratios <= usual * (1 + far)      # only steps that took too long: nothing makes one faster than it is
    # relative errors make a mean of ratios: a short step counts as much as a long one; but the sum of a run should be right
    factors = factors * (seconds[kept].sum() / (terms[kept] @ factors).sum())
    said = terms @ factors
    ratios = (seconds / said)[kept]
    return Fitted(tuple(map(float, factors)), float(np.quantile(ratios, 0.05)), float(np.quantile(ratios, 0.95)),
                  float(np.median(np.abs(ratios - 1))), float(said.sum() / seconds.sum()), int(kept.sum()), int((~kept).sum()))


def _terms(rows: int, wanted: int, looked: int) -> tuple[float, ...]:
    """The step itself; rows, those up to each knee, and those beyond it; logits; cells."""
    return (1.0, rows, *(min(rows, knee) for knee in KNEES), *(max(rows - knee, 0) for knee in KNEES), wanted, looked)


def _not_negative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x without negative entries that makes |a x - b| least: Lawson and Hanson's active sets."""
    scale = np.linalg.norm(a, axis=0)
    a = a / np.where(scale > 0, scale, 1.0)
    x, free = np.zeros(a.shape[1]), np.zeros(a.shape[1], dtype=bool)
    for _ in range(6 * a.shape[1]):
        gain = np.where(free, -np.inf, a.T @ (b - a @ x))
        best = int(np.argmax(gain))
        if gain[best] <= 1e-9 * len(b):
            break
        free[best] = True
        while free.any():
            tried = np.zeros_like(x)
            tried[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            if (tried[free] > 0).all():
                x = tried
                break
            down = free & (tried <= 0)
            step = np.min(x[down] / np.maximum(x[down] - tried[down], 1e-300))
            x = x + step * (tried - x)
            free &= x > 1e-12
            x[~free] = 0.0
    return x / np.where(scale > 0, scale, 1.0)
