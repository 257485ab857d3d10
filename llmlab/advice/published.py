"""Published scores: which were made in one setting, and so may be compared; how far chance alone moves each of them.

A setting is one benchmark, run one way, in one publication: a benchmark's name says too little (HumanEval of the same model
differs by ten points between publications). What differs only in the number of a table, or in the votes of one leaderboard's
rows, is one setting. Nothing here compares across settings.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

from .. import catalog
from ..errors import LabError, UnknownName

Band = tuple[float, float, float]

SURE = 1.96          # standard errors of a 95 % interval, which is what leaderboards publish


@dataclass(frozen=True)
class Benchmark:
    """`items`: questions, None where the score is no share of them; `chance`: the score of one who guesses; `step`: what is
    too little to choose by; `written`: the answer is a text, not one token."""

    name: str
    items: int | None
    chance: float = 0.0
    top: float = 100.0
    step: float = 1.0
    written: bool = True

    @property
    def elo(self) -> bool:
        """Whether differences mean shares of won comparisons, as on LMArena."""
        return self.top > 1000

    def band(self, score: float) -> Band:
        """The score and its 95 % interval from the number of questions; without one where that says nothing."""
        if not self.items:
            return score, score, score
        share = min(max(score / 100, 0.0), 1.0)
        error = 100 * SURE * math.sqrt(share * (1 - share) / self.items)
        return max(score - error, 0.0), score, min(score + error, 100.0)


TASKS: Mapping[str, tuple[Benchmark, ...]] = {
    "coding": (Benchmark("HumanEval", 164), Benchmark("HumanEval+", 164), Benchmark("MBPP", None), Benchmark("MBPP+", 378)),
    "tools": (Benchmark("BFCL v3", None), Benchmark("BFCL", None), Benchmark("BFCL v4", None)),
    "reasoning": (Benchmark("GPQA Diamond", 198, 25), Benchmark("GPQA", 448, 25)),
    "maths": (Benchmark("MATH-500", 500), Benchmark("MATH", 5000), Benchmark("GSM8K", 1319)),
    "knowledge": (Benchmark("MMLU", 14042, 25, written=False), Benchmark("MMLU-Pro", 12032, 10)),
    "instructions": (Benchmark("IFEval", 541),),
    "chat": (Benchmark("LMArena text", None, 0, 2000, 10), Benchmark("MT-Bench", None, 1, 10, 0.1)),
}
"""What speaks for a task, first what is looked at first. Questions as the benchmarks' authors count them; MBPP is run on 378,
399, 427 or 500 of its tasks, and BFCL's and MT-Bench's scores are no share of their questions: no interval for those."""


@dataclass(frozen=True)
class Setting:
    """Scores that may be compared: {model id: (low, published, high)}. `said`: how it was run, in the publication's words."""

    benchmark: Benchmark
    said: str
    source: str
    scores: Mapping[str, Band] = field(hash=False)

    @property
    def name(self) -> str:
        return f"{self.benchmark.name} ({self.said})"

    @property
    def base(self) -> bool:
        """Of models before they were taught to follow instructions, or of checkpoints on the way."""
        return self.said.startswith("base") or "intermediate checkpoint" in self.source

    @property
    def sampled(self) -> bool:
        """Whether its bands count what chance does: which questions were asked, or whose votes came in."""
        return any(low < score for low, score, _ in self.scores.values())

    @cached_property
    def known(self) -> int:
        """How many of its models are in the catalogue."""
        return len(self.scores.keys() & catalog.entries().keys())

    @cached_property
    def date(self) -> str:
        """When, as far as the source says: "2025-08-06", "2025"; or "2024-09 or later", when its newest model came out."""
        text = f"{self.said} {self.source}"
        if found := re.search(r"\b20[12]\d-[01]\d(-[0-3]\d)?\b", text):
            return found[0]
        if found := re.search(r"arXiv (2\d)([01]\d)\.\d{5}", text):
            return f"20{found[1]}-{found[2]}"
        if found := re.search(r"\b(?:paper|ICML) (20[12]\d)\b", text):
            return found[1]
        released = [catalog.entries()[model].release for model in self.scores.keys() & catalog.entries().keys()]
        return f"{max(released)} or later" if released else "not stated"


def settings_of(task: str) -> tuple[Setting, ...]:
    """Every setting that speaks for a task, those first that score most models of the catalogue; base models last."""
    if not isinstance(task, str) or task not in TASKS:
        raise catalog.unknown("task", task, TASKS, f"llmlab.best: {', '.join(TASKS)};")
    return _settings_of(task)


@cache
def _settings_of(task: str) -> tuple[Setting, ...]:
    names = {benchmark.name: at for at, benchmark in enumerate(TASKS[task])}
    found = [setting for setting in _settings() if setting.benchmark in TASKS[task]]
    return tuple(sorted(found, key=lambda s: (s.base, -s.known, names[s.benchmark.name], s.said, s.source)))


def setting_of(task: str, asked: str | Setting | None = None) -> Setting:
    """The setting a task's models are ranked in: the one that scores most of the catalogue, or the first with all the words
    of `asked` in its benchmark, its way or its source ("qwen3 thinking").

    It follows from the task and the data alone, never from what fits: a smaller card is judged by the same scores.
    """
    settings = settings_of(task)
    if asked is None:
        return settings[0]
    if isinstance(asked, Setting):
        if asked not in settings:
            raise LabError(f"setting is {asked.name[:60]}, which is not of {task}; llmlab.advice.settings_of lists what is")
        return asked
    words = re.findall(r"[a-z0-9.+-]+", asked.casefold()) if isinstance(asked, str) else ()
    if not words:
        raise LabError(f"setting is {asked!r:.60}; give words of a benchmark, of how it was run or of its source: 'EvalPlus'")
    for setting in settings:
        parts = re.findall(r"[a-z0-9.+-]+", f"{setting.name} {setting.source}".casefold())
        if all(any(part.startswith(word) for part in parts) for word in words):
            return setting
    names = dict.fromkeys(setting.name for setting in settings if setting.known > 1)
    raise UnknownName(f"no scores for {task} say {asked!r:.60}; there are {', '.join(list(names)[:6])}")


def setting_scores(source: str) -> list[Mapping[str, Band]]:
    """The scores of every setting whose source has these words, where they are shares of a hundred."""
    return [one.scores for one in _settings() if source in one.source and one.benchmark.top == 100]


@cache
def _settings() -> tuple[Setting, ...]:
    benchmarks = {benchmark.name: benchmark for task in TASKS.values() for benchmark in task}
    found: dict[tuple, dict[str, Band]] = {}
    for row in catalog.scores():
        benchmark = benchmarks[row.benchmark]
        band = _interval(row.setting, row.score) or benchmark.band(row.score)
        key = benchmark, _run(row.setting), re.sub(r" Table \d+\b", "", row.source)
        if found.setdefault(key, {}).setdefault(row.model, band) != band:
            raise LabError(f"data/benchmark_scores.csv: two scores of {row.model} for {row.benchmark} in {row.source}")
    return tuple(Setting(*key, scores) for key, scores in found.items())


_VOTES = re.compile(r"\d+ votes, 95% CI \+(\d+)/-(\d+), ")
_MADE_FOR = re.compile(r"; tool-calling (specialist|fine-tune)( \d+B)?$")


def _run(setting: str) -> str:
    """How it was run, without what is said of one row: its votes, or what its model was made for."""
    return _MADE_FOR.sub("", _VOTES.sub("", setting))


def _interval(setting: str, score: float) -> Band | None:
    """The 95 % interval a row publishes."""
    found = _VOTES.search(setting)
    return found and (score - int(found[2]), score, score + int(found[1]))
