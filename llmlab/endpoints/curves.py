"""Quality and cost against the share of calls sent out: by a signal, by chance, and by an oracle that knows both answers."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..catalog import Table
from ..errors import LabError
from ..places import folder

RECORDED = "hybrid_routing.csv"


@dataclass(frozen=True, eq=False)
class Curve:
    """Of n questions, arrays of n + 1, the k-th with k of them sent out. share: k / n. quality: the mean score, the k most
    unsure sent out; by_chance: in the mean over all ways to send k; oracle: the k that gain most. cost: of the k most unsure,
    a question in the mean. gains, doubt: of each question."""

    signal: str
    share: np.ndarray
    quality: np.ndarray
    by_chance: np.ndarray
    oracle: np.ndarray
    cost: np.ndarray
    gains: np.ndarray
    doubt: np.ndarray

    @cached_property
    def luck(self) -> float:
        """How far `gained` strays from 0 where doubt says nothing: a standard deviation, over 400 shuffles of it."""
        best = float((self.oracle - self.by_chance).mean())
        if best <= 0:
            return 0.0
        draw, line, n = np.random.default_rng(0), self.by_chance - self.by_chance[0], len(self.gains)
        found = [(_summed(self.gains, draw.permutation(self.doubt)) / n - line).mean() / best for _ in range(400)]
        return float(np.std(found))

    @cached_property
    def gained(self) -> float:
        """Of what an oracle gains over chance, the part that the signal does, over all shares: 1 is the oracle, 0 chance."""
        best = float((self.oracle - self.by_chance).mean())
        return float((self.quality - self.by_chance).mean()) / best if best > 0 else 0.0

    def at(self, share: float) -> int:
        """The most questions that lie within a share."""
        return int(np.floor(share * (len(self.share) - 1) + 1e-9))

    @property
    def local(self) -> float:
        """Quality with nothing sent out."""
        return float(self.quality[0])

    @property
    def remote(self) -> float:
        """With everything."""
        return float(self.quality[-1])

    def to_table(self, shares: Sequence[float] = (0, 0.1, 0.2, 0.3, 0.5, 1)) -> Table:
        """At these shares."""
        return Table([{"sent out": share, self.signal: self.quality[k], "by chance": self.by_chance[k],
                       "oracle": self.oracle[k], "cost": self.cost[k]} for share in shares for k in [self.at(share)]],
                     {"sent out": "{:.0%}".format, self.signal: "{:.3f}".format, "by chance": "{:.3f}".format,
                      "oracle": "{:.3f}".format, "cost": "{:.6f}".format})

    @property
    def answer(self) -> str:
        """In words."""
        k = self.at(0.3)
        others = f"by chance {self.by_chance[k]:.0%}, by an oracle {self.oracle[k]:.0%}"
        return (f"{len(self.share) - 1} questions: {self.local:.0%} right here, {self.remote:.0%} there. With 30% sent out by "
                f"{self.signal} {self.quality[k]:.0%} are, {others}; over all shares the signal has {self.gained:.0%} of what "
                f"an oracle gains over chance (luck alone: up to {2 * self.luck:.0%}).")


def route_curve(local: Sequence[float], remote: Sequence[float], signal: Sequence[float], cost: Sequence[float] | float = 0.0,
                name: str = "signal") -> Curve:
    """From each question's score here and there, how unsure the local model was, and what the call costs. Of questions that are
    equally unsure, any may go first: they count in the mean. Raises LabError for lists of different lengths, or of none."""
    local, remote, signal = (np.asarray(one, dtype=float) for one in (local, remote, signal))
    costs = np.full(local.shape, float(cost)) if np.ndim(cost) == 0 else np.asarray(cost, dtype=float)
    if not len(local) == len(remote) == len(signal) == len(costs) or not len(local):
        raise LabError("a curve needs a score here, a score there, a signal and a cost for each question")
    n, gain = len(local), remote - local
    share = np.arange(n + 1) / n
    return Curve(name, share, local.mean() + _summed(gain, signal) / n, local.mean() + share * gain.mean(),
                 local.mean() + _summed(gain, gain) / n, _summed(costs, signal) / n, gain, signal)


def _summed(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Sums of the k first by falling order, ties in the mean over their orders."""
    _, group = np.unique(-order, return_inverse=True)
    means = np.bincount(group, weights=values) / np.bincount(group)
    return np.concatenate([[0.0], np.cumsum(means[np.sort(group)])])


@dataclass(frozen=True)
class Recorded:
    """A question of the recorded pair. local, remote: 1 where right. entropy, logprob, agreement: how unsure the local model
    was. prompt, answer: tokens of the remote call."""

    question: str
    task: str
    local: float
    remote: float
    entropy: float
    logprob: float
    agreement: float
    prompt: int
    answer: int


def recorded() -> list[Recorded]:
    """data/hybrid_routing.csv: SmolLM2 135M here, Qwen2.5 Coder 1.5B there. Raises FileNotFoundError."""
    with open(folder("data") / RECORDED, newline="", encoding="utf-8") as file:
        return [Recorded(row["question"], row["task"], *(float(row[name]) for name in
                         ("local", "remote", "entropy", "logprob", "agreement")), int(row["prompt"]), int(row["answer"]))
                for row in csv.DictReader(file)]


def recorded_curve(signal: str = "entropy", price: Sequence[float] = (0.1, 0.4),
                   rows: Iterable[Recorded] | None = None) -> Curve:
    """The recorded pair's curve at prices for a million tokens. Raises LabError for a signal that was not recorded."""
    rows = list(recorded() if rows is None else rows)
    if signal not in ("entropy", "logprob", "agreement"):
        raise LabError(f"{signal!r:.40} was not recorded; give entropy, logprob or agreement")
    costs = [(price[0] * one.prompt + price[1] * one.answer) / 1e6 for one in rows]
    return route_curve([one.local for one in rows], [one.remote for one in rows], [getattr(one, signal) for one in rows], costs,
                       signal)
