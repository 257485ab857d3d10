"""Two evaluations of the same items, item by item: what was lost and gained, and whether that is more than chance.

Two quants of a model answer most items alike, so their shares do not vary as two independent ones would: only items that
changed say anything. The right answer's log-likelihood moves on every item, and shows what right and wrong cannot.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..catalog import Table
from ..errors import LabError
from ..intervals import LEVEL, least_shown, mcnemar, tango
from ..quality.statistics import Estimate, mean
from .student import student

if TYPE_CHECKING:
    from .outcomes import Outcome


@dataclass(frozen=True, repr=False)
class Comparison:
    """One model beside another, `other`, on the items that both were asked; all measured.

    pairs: (one's outcome, the other's). left_out: items that only one of them was asked.
    """

    model: str
    other: str
    pairs: tuple[tuple["Outcome", "Outcome"], ...]
    left_out: int = 0

    @property
    def n(self) -> int:
        return len(self.pairs)

    @property
    def lost(self) -> int:
        """Items that the other has right and this one wrong."""
        return sum(other.right and not one.right for one, other in self.pairs)

    @property
    def gained(self) -> int:
        """Items that this one has right and the other wrong."""
        return sum(one.right and not other.right for one, other in self.pairs)

    @property
    def difference(self) -> float:
        """Of the two shares, this one's less the other's."""
        return (self.gained - self.lost) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Tango's 95 % interval of the difference."""
        return tango(self.gained, self.lost, self.n)

    @property
    def p(self) -> float:
        """McNemar's exact test: how often chance alone parts so many changed items so unevenly."""
        return mcnemar(self.lost, self.gained)

    @property
    def shown(self) -> bool:
        """Whether the difference is more than chance, at 5 %."""
        return self.p < LEVEL

    @property
    def least(self) -> float:
        """The smallest difference of shares that these items could have shown, with as many changed as did (with 6 at
        least); above 1 where they are too few to show any."""
        return least_shown(self.lost + self.gained) / self.n

    @property
    def logprob(self) -> Estimate | None:
        """Mean difference of the right answers' log-likelihoods in nats, with its standard error; None where none is known."""
        return mean(np.array(found)) if (found := self._moved) else None

    @property
    def _moved(self) -> list[float]:
        return [one.logprob - other.logprob for one, other in self.pairs
                if one.logprob is not None and other.logprob is not None]

    @property
    def by_task(self) -> Table:
        """A row a task."""
        rows = []
        for task in dict.fromkeys(one.task for one, _ in self.pairs):
            part = Comparison(self.model, self.other, tuple(pair for pair in self.pairs if pair[0].task == task))
            (low, high), moved = part.interval, part.logprob
            rows.append({"task": task, "n": part.n, "share": sum(one.right for one, _ in part.pairs) / part.n,
                         "other": sum(other.right for _, other in part.pairs) / part.n, "difference": part.difference,
                         "low": low, "high": high, "lost": part.lost, "gained": part.gained, "p": part.p,
                         "logprob": moved and moved.value,
                         "error": moved.error if moved and moved.error == moved.error else None})
        return Table(rows, dict.fromkeys(("share", "other"), "{:.0%}".format)
                     | dict.fromkeys(("difference", "low", "high"), lambda share: f"{100 * share:+.1f}")
                     | dict.fromkeys(("p", "error"), "{:.2g}".format) | {"logprob": "{:+.3f}".format})

    @property
    def answer(self) -> str:
        """In words: the difference, whether it is more than chance, what so many items could have shown, and what the
        log-likelihoods say."""
        low, high = (100 * edge for edge in self.interval)
        points = 100 * self.difference
        said = (f"{self.model} scores {abs(points):.1f} points {'above' if points > 0 else 'below'} {self.other}"
                if self.gained != self.lost else f"{self.model} scores as {self.other} does")
        said += (f" on the same {_count(self.n, 'item')} (measured; 95 %: {low:+.1f} to {high:+.1f}): {self.lost} lost, "
                 f"{self.gained} gained")
        if self.shown:
            said += f"; chance alone does that {_often(self.p)} of the time (McNemar's exact test)."
        else:
            changed, least = self.lost + self.gained, least_shown(self.lost + self.gained)
            edge = "; the interval leaves out 0, but the test is the stricter and counts" if low > 0 or high < 0 else ""
            said += ("; that is no more than chance" + (f" (McNemar's exact test: p = {self.p:.2g}{edge})" if changed else "")
                     + (f". So few items can show no difference: {least} would have to change, all one way." if least > self.n
                        else f". Where {_count(max(changed, least), 'item')} of {self.n} change, nothing below "
                        f"{100 * self.least:.1f} points can be shown."))
        if (moved := self.logprob) is not None:
            known = moved.error == moved.error          # of one item it is not
            sure = student(moved, len(self._moved)) < LEVEL
            said += (f" The right answers' log-likelihood {'rose' if moved.value > 0 else 'fell'} by "
                     f"{abs(moved.value):.3f}{f' ± {moved.error:.3f}' if known else ''} nats on average"
                     f"{', which is more than chance' if sure else ', within chance'}."
                     if moved.value else " The right answers are exactly as likely.")
        if self.left_out:
            said += f" {_count(self.left_out, 'item')} that only one of them was asked, or asked otherwise, left out."
        return said

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return {"model": self.model, "other": self.other, "n": self.n, "lost": self.lost, "gained": self.gained,
                "difference": self.difference, "interval": list(self.interval), "p": self.p, "shown": self.shown,
                "least": self.least, "logprob": self.logprob and asdict(self.logprob), "left_out": self.left_out,
                "answer": self.answer, "tasks": list(self.by_task)}

    def __repr__(self) -> str:
        return f"{self.answer}\n{self.by_task}"


def paired(model: str, mine: Iterable["Outcome"], other: str, theirs: Iterable["Outcome"]) -> Comparison:
    """Outcomes of two models, joined where task, id and all that the item says agree. Raises LabError where none does."""
    mine = {(one.task, one.id, one.digest): one for one in mine}
    theirs = {(one.task, one.id, one.digest): one for one in theirs}
    if not (common := [key for key in mine if key in theirs]):
        raise LabError(f"{model} and {other} were asked no item alike; evaluate both on the same tasks, with the same version "
                       "of them")
    left_out = len({key[:2] for key in mine.keys() | theirs.keys()} - {key[:2] for key in common})
    return Comparison(model, other, tuple((mine[key], theirs[key]) for key in common), left_out)


def _count(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _often(p: float) -> str:
    return f"{100 * p:.2g} %" if p >= 1e-4 else "less than 0.01 %"
