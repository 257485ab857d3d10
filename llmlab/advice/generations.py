"""Newer and smaller against older and larger, one setting at a time: who scores more, whether chance would do, in which memory.

Two claims people make: that a new model of 7 billion parameters beats an old one of 13, and that a small one does 90 % of what
a model of 70 billion does in a tenth of the memory. Each is asked of every setting that scores both, never across settings.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property

from .. import catalog
from ..catalog import Entry
from ..memory import weights
from ..shapes import model_spec
from ..units import GIB
from .answer import points
from .published import TASKS, Band, Setting, settings_of

OLD = "llama-2-13b"
QUANT = "Q4_K_M"
SMALL, LARGE = (6e9, 10e9), (60e9, 80e9)        # parameters of "7B" and of "70B"
SHARE, PART = 0.9, 0.1                          # the claim: 90 % of the score, a tenth of the bytes


@dataclass(frozen=True)
class Match:
    """Two models that one setting scores, as published: the `larger`, and the `smaller` one."""

    task: str
    setting: Setting
    larger: Entry
    smaller: Entry

    @property
    def scores(self) -> tuple[Band, Band]:
        """Of the larger and of the smaller: low, published, high."""
        return self.setting.scores[self.larger.id], self.setting.scores[self.smaller.id]

    @property
    def gap(self) -> float:
        """Points by which the smaller one is ahead."""
        larger, smaller = self.scores
        return smaller[1] - larger[1]

    @property
    def chance(self) -> float | None:
        """How large a gap chance makes, 95 %; None where the setting does not say. As if each model had been asked questions of
        its own: asked the same ones, as they were, chance does less."""
        larger, smaller = self.scores
        if not self.setting.sampled:
            return None
        return math.hypot((larger[2] - larger[0]) / 2, (smaller[2] - smaller[0]) / 2)

    @property
    def lead(self) -> Band:
        """Of 100: the points by which the smaller one is ahead; of ratings, how many of 100 comparisons it wins beyond half.
        Low, published, high."""
        off = self.chance or 0.0
        gaps = self.gap - off, self.gap, self.gap + off
        return tuple(100 / (1 + 10 ** (-gap / 400)) - 50 for gap in gaps) if self.setting.benchmark.elo else gaps

    @property
    def verdict(self) -> str:
        if self.chance is not None and abs(self.gap) <= self.chance:
            return "too near to tell"
        return ("ahead" if self.gap > 0 else "behind") + ("" if self.chance is not None else ", chance not counted")

    @property
    def share(self) -> Band | None:
        """The smaller one's score over the larger one's; None where points are no share of anything (ratings)."""
        larger, smaller = self.scores
        if self.setting.benchmark.top != 100 or not larger[1]:
            return None
        usual = smaller[1] / larger[1]
        apart = [(high - low) / 2 / best if best else 0.0 for low, best, high in (larger, smaller)]
        error = usual * math.hypot(*apart)
        return max(usual - error, 0.0), usual, usual + error

    @property
    def reached(self) -> str:
        """Whether the share is SHARE: "yes", "no", or "too near to tell"."""
        low, usual, high = self.share
        if low < SHARE <= high and self.chance is not None:
            return "too near to tell"
        return ("yes" if usual >= SHARE else "no") + ("" if self.chance is not None else ", chance not counted")

    @cached_property
    def bytes(self) -> tuple[int, int]:
        """Weights of the larger and of the smaller in Q4_K_M: exact."""
        return size(self.larger.id), size(self.smaller.id)

    @property
    def part(self) -> float:
        """The smaller one's bytes over the larger one's."""
        return self.bytes[1] / self.bytes[0]

    def __str__(self) -> str:
        larger, smaller = self.scores
        return (f"{self.smaller.name} {points(smaller[1])} to {self.larger.name}'s {points(larger[1])} in {self.setting.name}: "
                f"{self.verdict}")


@cache
def size(model: str) -> int:
    """Bytes of a model's weights in Q4_K_M."""
    return weights(model_spec(model), QUANT).padded


@cache
def against(old: str = OLD) -> tuple[Match, ...]:
    """A model beside each that is newer and smaller, in every setting that scores both; task by task, the newest first."""
    before = catalog.entry(old)
    found = []
    for task in TASKS:
        for setting in settings_of(task):
            if before.id in setting.scores:
                found += [Match(task, setting, before, one) for one in _of(setting)
                          if one.release > before.release and one.params_total < before.params_total]
    return tuple(sorted(found, key=lambda m: (list(TASKS).index(m.task), m.setting.name, -_month(m.smaller), m.smaller.id)))


@cache
def tenths() -> tuple[Match, ...]:
    """In every setting whose scores are shares of something: the best model of about 7B beside the best of about 70B."""
    found = []
    for task in TASKS:
        for setting in settings_of(task):
            best = [max((one for one in _of(setting) if low <= one.params_total <= high), default=None,
                        key=lambda one: setting.scores[one.id][1]) for low, high in (LARGE, SMALL)]
            if all(best) and setting.benchmark.top == 100:
                found.append(Match(task, setting, *best))
    return tuple(found)


def _of(setting: Setting) -> list[Entry]:
    entries = catalog.entries()
    return [entries[model] for model in setting.scores if model in entries]


def _month(entry: Entry) -> int:
    year, month = entry.release.split("-")[:2]
    return 12 * int(year) + int(month)


# ---- in words and rows ----------------------------------------------------------------------------------------------

def against_words(found: tuple[Match, ...]) -> str:
    """What the numbers say, and where they do not."""
    old = found[0].larger
    count = {word: [m for m in found if m.verdict.startswith(word)] for word in ("ahead", "behind", "too near")}
    names = list(dict.fromkeys(m.smaller.name for m in found))
    ahead, behind, near = (len(count[word]) for word in ("ahead", "behind", "too near"))
    text = (f"{old.name} ({old.release[:4]}) takes {size(old.id) / GIB:.1f} GiB in {QUANT}. In {len(found)} comparisons with "
            f"{len(names)} newer and smaller models, each within one setting, the smaller one is ahead in {ahead}, behind in "
            f"{behind}, too near to tell in {near}.")
    failed = [f"{m.smaller.name} ({m.setting.benchmark.name} {points(m.scores[1][1])} to {points(m.scores[0][1])})"
              for m in count["behind"]]
    return f"{text} The claim fails for {', '.join(failed)}." if failed else text


def tenths_words(found: tuple[Match, ...]) -> str:
    """How often 90 % is reached, and how much memory that takes."""
    yes, no = ([m for m in found if m.reached.startswith(word)] for word in ("yes", "no"))
    parts = [m.part for m in found]
    worst = min(found, key=lambda m: m.share[1])
    return (f"The best of about 7B beside the best of about 70B in {len(found)} settings: {SHARE:.0%} of the score is reached "
            f"in {len(yes)}, not in {len(no)}, and too near to tell in {len(found) - len(yes) - len(no)}; in {min(parts):.0%} "
            f"to {max(parts):.0%} of the bytes. Furthest from it: {worst.smaller.name}, {worst.share[1]:.0%} of "
            f"{worst.larger.name} in {worst.setting.name}.")


def against_table(found: tuple[Match, ...]) -> catalog.Table:
    """A row a comparison."""
    return catalog.Table(({"setting": m.setting.name, "smaller": m.smaller.name, "released": m.smaller.release,
                           "GiB": m.bytes[1] / GIB, "score": m.scores[1][1], "larger": m.larger.name,
                           "its GiB": m.bytes[0] / GIB, "its score": m.scores[0][1], "chance": m.chance,
                           "the smaller is": m.verdict} for m in found),
                         {"GiB": "{:.1f}".format, "its GiB": "{:.1f}".format, "score": points, "its score": points,
                          "chance": "±{:.1f}".format})


def tenths_table(found: tuple[Match, ...]) -> catalog.Table:
    """A row a setting."""
    return catalog.Table(({"setting": m.setting.name, "about 7B": m.smaller.name, "score": m.scores[1][1],
                           "about 70B": m.larger.name, "its score": m.scores[0][1], "share": m.share[1],
                           "range": f"{m.share[0]:.0%} to {m.share[2]:.0%}" if m.chance else "", "bytes": m.part,
                           "90 %": m.reached} for m in found),
                         {"score": points, "its score": points, "share": "{:.0%}".format, "bytes": "{:.0%}".format})
