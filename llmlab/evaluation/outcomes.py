"""What a model answered, item by item, and what that says of it: shares with intervals, in words, as a table, as a file."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ..catalog import Table
from ..errors import BadFile
from ..gguf.words import show_path
from ..intervals import wilson
from ..quality.remembered import write_whole
from .pairing import Comparison, paired

_FORM = 1
_LARGEST = 100_000_000      # bytes of a file


@dataclass(frozen=True)
class Outcome:
    """One item, measured.

    digest: of the item, so that two evaluations know whether it was the same. right: see `evaluate`. chance: of guessing it.
    said: the text written, or the choice taken. verdict: of a call, what it was. logprob: the log-likelihood of the right
    answer in nats, None where none is reckoned. plain: of a choice, whether the likeliest text is the right one, its length not
    counted (lm-eval's acc). logprobs: of all choices.
    """

    task: str
    id: str
    kind: str
    digest: str
    right: bool
    chance: float = 0.0
    said: str = ""
    verdict: str = ""
    logprob: float | None = None
    plain: bool | None = None
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Score:
    """A task's items together. low, high: Wilson's 95 % interval of the share. chance: what guessing gives. plain: lm-eval's
    acc, of choices; logprob: mean log-likelihood of the right answers, in nats; None where there are none of these."""

    right: int
    n: int
    share: float
    low: float
    high: float
    chance: float
    plain: float | None
    logprob: float | None

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> "Score":
        outcomes = list(outcomes)
        right, n = sum(one.right for one in outcomes), len(outcomes)
        return cls(right, n, right / n, *wilson(right, n), sum(one.chance for one in outcomes) / n,
                   _mean(one.plain for one in outcomes), _mean(one.logprob for one in outcomes))

    def __str__(self) -> str:
        guessing = f", guessing gives {_percent(self.chance)}" if self.chance else ""
        band = f"95 %: {_percent(self.low)} to {_percent(self.high)}"
        return f"{self.right} of {self.n} ({_percent(self.share)}, {band}{guessing})"


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What a model scored, all of it measured on this computer.

    outcomes: item by item. how: what ran it. seconds, tokens: by task, tokens that went through the model. date, versions: when
    and with what. notes: what a reader should know. whole: whether nobody stopped it.
    """

    model: str
    how: str
    outcomes: tuple[Outcome, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    whole: bool = True

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.task for one in self.outcomes))

    @property
    def scores(self) -> dict[str, Score]:
        """By task, in the order they were asked."""
        return {task: Score.of(self.of(task)) for task in self.tasks}

    def of(self, task: str) -> tuple[Outcome, ...]:
        """A task's outcomes."""
        return tuple(one for one in self.outcomes if one.task == task)

    @property
    def answer(self) -> str:
        """The scores in words."""
        if not self.outcomes:
            return f"{self.model}: stopped before the first item."
        told = "; ".join(f"{task} {score}" for task, score in self.scores.items())
        like = [task for task, score in self.scores.items() if score.chance and score.low <= score.chance <= score.high]
        below = [task for task, score in self.scores.items() if score.high < score.chance]
        said = f"{self.model}, measured: {told}."
        if like:
            said += f" In {_listed(like)} it cannot be told from guessing."
        if below:
            said += f" In {_listed(below)} it is worse than guessing, beyond chance."
        return said + ("" if self.whole else " It was stopped before all items were asked.")

    @property
    def table(self) -> Table:
        """A row a task."""
        scores = self.scores
        return Table([{"task": task, "right": one.right, "n": one.n, "share": one.share, "low": one.low, "high": one.high,
                       "chance": one.chance or None, "plain": one.plain, "logprob": one.logprob,
                       "tokens": self.tokens.get(task), "seconds": self.seconds.get(task)} for task, one in scores.items()],
                     dict.fromkeys(("share", "low", "high", "chance", "plain"), _percent)
                     | {"logprob": "{:.3f}".format, "seconds": "{:.1f}".format})

    @property
    def verdicts(self) -> Table:
        """What the calls were, right and wrong: a row a verdict."""
        counts = Counter((one.task, one.verdict) for one in self.outcomes if one.verdict)
        return Table([{"task": task, "verdict": verdict, "items": count} for (task, verdict), count in counts.most_common()])

    def to_frame(self):
        """A pandas DataFrame, a row an item. Raises LabError where pandas is not installed."""
        return Table(map(asdict, self.outcomes)).to_frame()

    def beside(self, other: "Evaluation") -> Comparison:
        """This one beside another of the same items, paired: what it gained and lost against `other`. Raises LabError where
        they share no item."""
        return paired(self.model, self.outcomes, other.model, other.outcomes)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        scores = {task: asdict(score) for task, score in self.scores.items()}
        return {"llmlab_evaluation": _FORM, "scores": scores} | asdict(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write it as JSON, whole or not at all. Raises LabError where that cannot be."""
        told = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        write_whole(Path(path), told.encode("utf-8", "replace").decode("utf-8"))       # a model may write half a character

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Evaluation":
        """What `save` wrote. Raises BadFile for anything else."""
        try:
            if Path(path).stat().st_size > _LARGEST:
                raise ValueError("it is too large")
            told = json.loads(Path(path).read_text(encoding="utf-8"))
            if told.pop("llmlab_evaluation") != _FORM:
                raise ValueError("it is of another version")
            told.pop("scores")
            outcomes = tuple(_outcome(one) for one in told.pop("outcomes"))
            _fits(told, cls)
            _check_head(told)
            return cls(outcomes=outcomes, **told | {"notes": tuple(told["notes"])})
        except (OSError, ValueError, OverflowError, AttributeError, TypeError, KeyError, RecursionError) as error:
            raise BadFile(f"{show_path(str(path))} is no evaluation that llmlab saved ({str(error)[:80]}); give another "
                          "file") from None

    def __repr__(self) -> str:
        return f"{self.answer}\n{self.table}" if self.outcomes else self.answer


def _outcome(told: Mapping) -> Outcome:
    _fits(told, Outcome)
    one = Outcome(**told | {"logprobs": tuple(told["logprobs"])})
    numbers = [one.chance, *one.logprobs, *([] if one.logprob is None else [one.logprob])]
    texts = (one.task, one.id, one.kind, one.digest, one.said, one.verdict)
    if (not isinstance(one.right, bool) or one.plain not in (None, True, False)
            or not all(isinstance(text, str) for text in texts) or not all(
                isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)):
        raise ValueError("an outcome holds what is none")
    return one


def _check_head(told: Mapping) -> None:
    """Of an evaluation, all but its outcomes."""
    texts = [told["model"], told["how"], told["date"], *told["versions"].values(), *told["notes"]]
    numbers = [*told["seconds"].values(), *told["tokens"].values()]
    if (not all(isinstance(text, str) for text in texts) or not isinstance(told["notes"], list)
            or not isinstance(told["whole"], bool) or not all(isinstance(one, (int, float)) for one in numbers)):
        raise ValueError("it holds what is none")


def _fits(told: Mapping, kind: type) -> None:
    if missing := {one.name for one in fields(kind)} ^ {*told, *(["outcomes"] if kind is Evaluation else [])}:
        raise ValueError(f"{min(missing)!r} is missing or unknown")


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


