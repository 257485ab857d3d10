"""What llmlab.best answers with: ranked choices, each with its reason and what would change it; what is unknown, what failed.

Ranked by the score to expect, rounded to whole steps (one point of a hundred): within a step the quicker one comes first, then
the smaller. The order of two choices depends on nothing but the two.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .. import catalog
from ..catalog import Entry, Gpu
from ..errors import LabError, UnknownName
from ..exports import Command
from ..fitting import Report, left_to_models
from ..memory import weights
from ..units import GIB, format_bytes
from .configurations import decode, held, placement
from .published import Band, Setting

CONVERTED = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "gemma3",
             "gemma3_text")
"""Families (model_type) that llmlab itself makes a GGUF of: `converting` says so, and imports torch."""


@dataclass(frozen=True)
class Asked:
    """The question, checked."""

    task: str
    setting: Setting
    context: int
    min_speed: float
    quality_floor: float | None
    languages: tuple[str, ...]
    license: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Choice:
    """A model in a quant, a cache and a placement that keeps to every limit. Bands are low, usual, high.

    `published`: the score in `setting`, with its 95 % interval; `quality`: what is left of it in this quant and cache; `lost`:
    the points they cost. `unnamed`: languages asked for that its maker only counts. `why` it is here and what `changes` its
    place, a line each.
    """

    entry: Entry
    report: Report
    setting: Setting
    published: Band
    quality: Band
    lost: Band
    unnamed: str = ""
    why: str = ""
    changes: str = ""

    @property
    def model(self) -> str:
        return self.entry.id

    @property
    def quant(self) -> str:
        return self.report.settings.quant

    @property
    def kv(self) -> tuple[str, str]:
        return self.report.settings.kv

    @property
    def placement(self) -> str:
        return placement(self.report)

    @property
    def decode(self) -> float:
        """Tokens per second, the usual guess with the context full; 0 where the card's rates are not known."""
        return decode(self.report)

    @property
    def speed(self) -> Band | None:
        """Tokens per second: low and usual with the context full, high while it is empty."""
        return self.report.speed.decode_tps

    @property
    def bytes(self) -> int:
        """What it needs on cards and in RAM together."""
        return held(self.report)

    @property
    def generation(self) -> str:
        """The model's year and family: "2024 Qwen2.5"."""
        return f"{self.entry.release[:4]} {self.entry.family}"

    @property
    def rank(self) -> tuple:
        """Sorts choices, the best first."""
        step = self.setting.benchmark.step
        return -round(self.quality[1] / step), -self.decode, self.bytes, self.model, self.quant, self.kv

    @property
    def repository(self) -> str:
        """The checkpoint on the hub: the one that was taught to follow instructions, or, where the scores are of models before
        that, the one that was not; the catalogue's first where it knows no such."""
        names = (self.entry.hub_id, *(alias for alias in self.entry.aliases if "/" in alias))
        alike = [name for name in names if _taught(name) is not self.setting.base]
        return alike[0] if alike else names[0]

    @property
    def get(self) -> str:
        """Shell lines that get the model and make the file that `command` runs: by llmlab, or by llama.cpp's own programs where
        llmlab does not convert the family."""
        folder, file, spec = self.repository.split("/")[-1], file_of(self.command()), self.report.spec
        matrix = self.report.settings.importance
        lines = [f"llmlab fetch {self.repository} --folder {folder}"]
        if self.entry.config.get("model_type") in CONVERTED:
            full = weights(spec, spec.dtype).padded
            if matrix and self.report.host and full > left_to_models(self.report.host):
                lines.append(f"# takes {format_bytes(full, 0)} of RAM; an imatrix.gguf that others made of it does as well")
            lines += [f"llmlab importance {folder} --out imatrix.gguf"] * matrix
            lines.append(f"llmlab quantize {folder} {file} {self.quant}{' --importance imatrix.gguf' * matrix}")
        elif self.quant == spec.published:
            lines.append(f"convert_hf_to_gguf.py {folder} --outfile {file}")
        else:
            full = file.replace(f"-{self.quant}.gguf", f"-{spec.dtype}.gguf")
            lines.append(f"convert_hf_to_gguf.py {folder} --outtype {spec.dtype.lower()} --outfile {full}")
            lines += [f"llama-imatrix -m {full} -f calibration.txt -o imatrix.gguf"] * matrix
            if full != file:
                lines.append(f"llama-quantize {'--imatrix imatrix.gguf ' * matrix}{full} {file} {self.quant}")
        return "\n".join(lines) + "\n"

    def command(self, engine: str | None = None) -> Command:
        """What runs it in an engine: `report.command`."""
        return self.report.command(engine)

    def to_dict(self) -> dict:
        """For `llmlab best --json`."""
        s = self.report.settings
        return {"model": self.model, "generation": self.generation, "quant": s.quant, "importance": s.importance,
                "kv": list(s.kv), "placement": self.placement, "gpu_layers": self.report.gpu_layers,
                "n_cpu_moe": self.report.n_cpu_moe, "quality": list(self.quality), "published": list(self.published),
                "lost": list(self.lost), "decode_tps": self.speed and list(self.speed), "bytes": self.bytes, "why": self.why,
                "changes": self.changes, "get": self.get, "command": self.command().text}

    def __repr__(self) -> str:
        return f"<{self.model} {self.quant}: {self.why}>"


def _taught(name: str) -> bool:
    """Whether a checkpoint follows instructions, by its name."""
    return bool({"instruct", "chat", "it"} & {*name.casefold().split("/")[-1].split("-")})


def file_of(command: Command) -> str:
    """The GGUF that a llama.cpp command loads."""
    words = command.text.split()
    return words[words.index("--model") + 1]


@dataclass(frozen=True, repr=False)
class Unknown:
    """A model that keeps to every limit but the score asked, and that the setting does not score: in its most faithful quant
    that does. `elsewhere`: the task's settings that do score it; `unnamed`: as of a Choice."""

    entry: Entry
    report: Report
    setting: Setting
    elsewhere: tuple[Setting, ...]
    unnamed: str = ""

    @property
    def model(self) -> str:
        return self.entry.id

    @property
    def order(self) -> tuple:
        """Those with scores somewhere first, then the newest: no judgement of quality."""
        return not self.elsewhere, *(-ord(c) for c in self.entry.release), self.model

    def beside(self, others: Sequence[str]) -> "list[Beside]":
        """Comparisons with other models in settings that score both."""
        return [Beside(self.model, other, setting) for setting in self.elsewhere for other in others if other in setting.scores]

    def __repr__(self) -> str:
        scores = "".join(f", {points(s.scores[self.model][1])} in {s.name}" for s in self.elsewhere[:3])
        said = f"; {self.unnamed}" if self.unnamed else ""
        return f"<{self.model} {self.report.settings.quant}: not scored in {self.setting.name}{scores}{said}>"


@dataclass(frozen=True)
class Beside:
    """Two models that one setting scores, unquantized."""

    model: str
    other: str
    setting: Setting

    @property
    def scores(self) -> tuple[float, float]:
        return self.setting.scores[self.model][1], self.setting.scores[self.other][1]

    @property
    def ahead(self) -> str:
        """Whether the first has the higher score, and by more than chance (95 % of both): "ahead", "higher, within chance",
        "higher, chance not counted" where the setting has no intervals; "" where it has not."""
        (low, one, high), (least, other, most) = (self.setting.scores[name] for name in (self.model, self.other))
        chance = math.hypot(high - low, most - least) / 2
        if one <= other:
            return ""
        return "higher, chance not counted" if not chance else "ahead" if one - other > chance else "higher, within chance"

    def __str__(self) -> str:
        (first, second), names = self.scores, catalog.entries()
        return (f"{names[self.model].name} {points(first)} to {names[self.other].name}'s {points(second)} "
                f"in {self.setting.name}, {_cut(self.setting.source)}")


@dataclass(frozen=True)
class Near:
    """What failed by one limit ("memory", "speed", "quality") and came nearest to it, of one model."""

    limit: str
    entry: Entry
    report: Report
    quality: Band | None


def ranked(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """The choices in order, with their reasons."""
    ordered = sorted(choices, key=lambda choice: choice.rank)
    first: dict[str, Choice] = {}
    for choice in ordered:
        first.setdefault(choice.model, choice)
    leaders = list(first.values())
    return tuple(replace(choice, why=_why(choice), changes=_changes(choice, leaders)) for choice in ordered)


def _why(c: Choice) -> str:
    name, best = c.setting.benchmark.name, points(c.quality[1])
    cache = "" if c.kv == ("f16", "f16") else f" with a {'/'.join(dict.fromkeys(c.kv))} cache"
    scored = (f"{name} {points(c.published[1])} as published" if c.lost[1] < 0.05 else
              f"{name} {best} to expect, {points(c.published[1])} as published less {points(c.lost[1])} for {c.quant}{cache}")
    speed = f"{pace(c.decode)} tokens/s" if c.decode else "speed not known"
    in_ram = c.report.devices["host"].needed
    ram = f" ({format_bytes(in_ram, 1)} in RAM)" if c.report.cards and not c.placement.startswith("all") else ""
    said = f"; {c.unnamed}" if c.unnamed else ""
    return f"{scored}; {speed}; {format_bytes(c.bytes, 1)}, {c.placement}{ram}{said}"


def _changes(c: Choice, leaders: Sequence[Choice]) -> str:
    """Whom it cannot be told from, and the limits that would put it out."""
    rivals = [one for one in leaders if one.model != c.model and _overlap(one.quality, c.quality)]
    said = []
    if rivals:
        names = [one.entry.name for one in rivals[:2]]
        more = f" and {len(rivals) - 2} more" if len(rivals) > 2 else ""
        said.append(f"within the uncertainty of {', '.join(names)}{more}")
    if c.decode:
        said.append(f"out above {pace(c.decode)} tokens/s asked")
    spare = {name: max(d.free - d.high + d.returned, 0) for name, d in c.report.devices.items() if d.capacity}
    ram, whole = spare.pop("host", None), c.placement.startswith("all")
    if spare:
        least = format_bytes(min(spare.values()), 1)
        said.append(f"{'no longer all there' if whole else 'slower'} with {least} less on the card{'s'[:len(spare) - 1]}")
    if ram is not None and not (spare and whole):
        said.append(f"out with {format_bytes(ram, 1)} less RAM")
    return "; ".join(said)


def _overlap(one: Band, other: Band) -> bool:
    return one[0] <= other[2] and other[0] <= one[2]


COSTS: dict[str, tuple[str, Callable[[Choice], float]]] = {
    "GiB": ("GiB", lambda choice: choice.bytes / GIB), "speed": ("tokens/s", lambda choice: -choice.decode)}


class Advice(catalog.Listed):
    """Ranked choices: `advice[0]`, `.answer`, `.table`; shown as the table.

    `choices` are all, `leaders` each model's first; `unknown` fit and are not scored in the setting; `refused` counts models by
    the limit they fail. Leaders, unknown and refused add up to the models looked at.
    """

    def __init__(self, asked: Asked, cards: tuple[Gpu, ...], host: int | None, choices: tuple[Choice, ...],
                 unknown: tuple[Unknown, ...], refused: dict[str, int], near: tuple[Near, ...], looked_at: int):
        super().__init__(choices)
        self.asked, self.cards, self.host = asked, cards, host
        self.choices, self.unknown, self.refused, self.near, self.looked_at = choices, unknown, refused, near, looked_at

    def _some(self, rows: Sequence[Choice]) -> "Advice":
        return Advice(self.asked, self.cards, self.host, tuple(rows), self.unknown, self.refused, self.near, self.looked_at)

    @property
    def setting(self) -> Setting:
        """The setting the scores are of: its name, source and date."""
        return self.asked.setting

    @property
    def best(self) -> Choice:
        """The first choice. Raises LabError, with the least that would do, where there is none."""
        if not self.choices:
            raise LabError(self.answer)
        return self.choices[0]

    @cached_property
    def leaders(self) -> tuple[Choice, ...]:
        """Each model's first choice, in order."""
        first: dict[str, Choice] = {}
        for choice in self.choices:
            first.setdefault(choice.model, choice)
        return tuple(first.values())

    def frontier(self, against: str = "GiB") -> "Advice":
        """The choices than which no other has more of quality and as little of memory (against="GiB"), or as many tokens per
        second (against="speed"); cheapest first."""
        if against not in COSTS:
            raise UnknownName(f"frontier(against={str(against)[:40]!r}): there are {' and '.join(map(repr, COSTS))}")
        cost = COSTS[against][1]
        kept: list[Choice] = []
        for choice in sorted(self.choices, key=lambda one: (cost(one), -one.quality[1], one.rank)):
            if not kept or choice.quality[1] > kept[-1].quality[1]:
                kept.append(choice)
        return self._some(kept)

    @cached_property
    def comparisons(self) -> tuple[Beside, ...]:
        """How the models that are not scored here did beside the first choice's where another setting scores both."""
        return tuple(one for each in self.unknown for one in each.beside([self.choices[0].model])) if self.choices else ()

    @cached_property
    def table(self) -> catalog.Table:
        """A row a model, in its first choice; the quality to expect and its range."""
        return self.table_of(self.leaders)

    def table_of(self, choices: Sequence[Choice]) -> catalog.Table:
        """These choices as rows."""
        return catalog.Table(({
            "model": c.model, "generation": c.generation, "quant": c.quant, "cache": "/".join(dict.fromkeys(c.kv)),
            "quality": c.quality[1], "range": f"{points(c.quality[0])} to {points(c.quality[2])}", "published": c.published[1],
            "tokens/s": c.decode or None, "GiB": c.bytes / GIB, "placement": c.placement} for c in choices),
            {"quality": "{:.1f}".format, "published": "{:g}".format, "tokens/s": pace, "GiB": "{:.1f}".format})

    @cached_property
    def answer(self) -> str:
        """Two or three sentences: what to take, how sure that is; or the least that would do."""
        if not self.choices:
            return self._nothing()
        c, s = self.choices[0], self.setting
        told = (f"For {self.asked.task} on {self._where()} take {c.entry.name} in {c.quant}: {c.why}. By {s.name}, {s.date}, "
                f"it is between {points(c.quality[0])} and {points(c.quality[2])}{'' if s.sampled else ', chance not counted'}")
        rivals = [one for one in self.leaders[1:] if one.quality[2] >= c.quality[0]]
        if rivals:
            told += f", too near to tell it from {rivals[0].entry.name} ({points(rivals[0].quality[1])})"
            told += f" and {len(rivals) - 1} more" if len(rivals) > 1 else ""
        higher = sorted((one for one in self.comparisons if one.ahead), key=lambda one: one.ahead != "ahead")
        return f"{told}. Not scored there; elsewhere {higher[0].ahead}: {higher[0]}." if higher else f"{told}."

    def _where(self) -> str:
        names = ", ".join(card.name for card in self.cards)
        if shared := [card.memory for card in self.cards if card.unified]:
            return f"{names} with {format_bytes(min(*shared, self.host or shared[0]), 0)} of memory"
        ram = f"{format_bytes(self.host, 0)} of RAM" if self.host else "RAM"
        return f"{names} with {ram}" if names else ram

    def _nothing(self) -> str:
        """Which limit it failed by in the end, and the least that would do; of models without a score only where none of them
        keeps to the limits either."""
        a, scores = self.asked, self.setting.scores
        found = [one for one in self.near if one.entry.id in scores]
        others = "" if found else " of those it does not score"
        if not found and not self.unknown:
            found = list(self.near)
        near = {limit: [one for one in found if one.limit == limit] for limit in ("quality", "speed", "memory")}
        told = f"No model scored in {self.setting.name} keeps to all limits on {self._where()}: "
        if near["quality"]:
            one = max(near["quality"], key=lambda one: one.quality[1])
            told += f"the best to expect is {points(one.quality[1])}, {_called(one)}, not {a.quality_floor:g}."
        elif near["speed"]:
            one = max(near["speed"], key=lambda one: decode(one.report))
            rate = f"{pace(decode(one.report))} tokens/s" if decode(one.report) else "a speed that is not known"
            told += f"the quickest{others} that fits is {_called(one)} with {rate}, not {a.min_speed:g}."
        elif near["memory"]:
            one = min(near["memory"], key=lambda one: held(one.report))
            devices = *one.report.lent, one.report.devices["host"]
            short = max(devices, key=lambda d: d.high - d.returned - d.free)
            told += (f"the smallest{others} is {_called(one)}, which needs {format_bytes(short.high - short.returned)} of "
                     f"{format_bytes(short.free)} ({short.title}).")
        else:
            told += f"{self._failed()}."
        if self.unknown:
            told += f" {len(self.unknown)} that it does not score fit, {self.unknown[0].entry.name} among them: `.unknown`."
        return told

    def _failed(self) -> str:
        failed = [f"{count} fail{'s' * (count == 1)} by {limit}" for limit, count in self.refused.items() if count]
        return ", ".join(failed) or "it scores none of those looked at"

    def to_dict(self) -> dict:
        """What `llmlab best --json` prints: a choice a model, and the frontiers by model and quant."""
        a, s = self.asked, self.setting
        return {"answer": self.answer, "task": a.task, "context": a.context, "min_speed": a.min_speed,
                "quality_floor": a.quality_floor, "languages": list(a.languages), "license": list(a.license),
                "setting": {"benchmark": s.benchmark.name, "said": s.said, "source": s.source, "date": s.date},
                "looked_at": self.looked_at, "choices": [choice.to_dict() for choice in self.leaders],
                "frontiers": {name: [[c.model, c.quant, list(c.kv), c.quality[1], abs(cost(c))] for c in self.frontier(name)]
                              for name, (_, cost) in COSTS.items()},
                "unknown": [{"model": one.model, "quant": one.report.settings.quant, "decode_tps": one.report.speed.decode_tps,
                             "elsewhere": [[each.name, each.source, each.scores[one.model][1]] for each in one.elsewhere]}
                            for one in self.unknown],
                "refused": self.refused, "comparisons": list(map(str, self.comparisons))}


def _called(one: Near) -> str:
    return f"{one.entry.name} in {one.report.settings.quant}"


def points(value: float) -> str:
    """A score as one writes it."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}".removesuffix(".0")


def pace(rate: float) -> str:
    """Tokens per second as one writes them."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
