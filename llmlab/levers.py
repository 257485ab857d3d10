"""What one more step of each lever buys in bytes and costs in speed and published quality: the inverse questions, priced.

A lever is a change of settings; its row says what the report would be. The price adds up what is lost, as shares of what
there is: of speed (decode or prefill, whichever loses more; against now, and among levers that make it fit against the
fastest that keeps the context), of context or requests, and four times the mean KL divergence published for Llama 3 8B
(there close to the growth of perplexity): a choice, not a law. It ranks; it measures nothing about another model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from . import catalog
from .errors import LabError
from .exports import kernel_missing
from .memory import size_of, weights
from .settings import LADDERS, quants_to_try
from .units import GIB

if TYPE_CHECKING:
    from .fitting import Report

KV_LADDER = ("f32", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")      # by size, and by harm (llama.cpp PR #7412)
LEAST_CONTEXT, LEAST_UBATCH = 512, 32
UTILIZATIONS = (0.80, 0.85, 0.90, 0.92, 0.95, 0.97)                     # steps of vLLM's gpu_memory_utilization
ABOUT = "Llama 3 8B, wikitext-2"
UNKNOWN = "not published here"
SAME = "same answers"
HARM = 4.0       # a nat of divergence, beside a share of speed or context: 0.1 (Q3_K_S) counts as much as 40 % slower

Band = tuple[float, float, float]


@dataclass(frozen=True)
class Lever:
    """One change of settings and what follows; `report.with_(**lever.change)` makes it.

    `saves`: bytes less needed on `device`, the tightest one (less than 0: more), and `saves_host` in RAM. `decode` and
    `prefill`: tokens per second afterwards over now as low, best, high; None where not modelled; of what fits only in part,
    now and afterwards, with about as many layers on the cards as fit then. `quality` says what is known of the
    answers; `kld` is the published difference of mean KL divergence for Llama 3 8B, 0 where the answers stay the same, None
    where nothing is published here. `lost`: the share of the context or the requests given up. `price`: see the module; None
    where `kld` is.
    """

    name: str
    before: str
    after: str
    change: Mapping = field(hash=False)
    device: str
    saves: int
    saves_host: int
    verdict: str
    decode: Band | None
    prefill: Band | None
    quality: str
    kld: float | None
    lost: float = 0.0
    price: float | None = None

    @property
    def fits(self) -> bool:
        return self.verdict == "fits"

    def __repr__(self) -> str:
        return f"<{self.name}: {self.before} to {self.after}, {self.verdict}>"


class Levers(catalog.Listed):
    """The levers of a report, those that make it fit first, then by price; shown as a table."""

    def __init__(self, report: "Report", rows: Sequence[Lever]):
        super().__init__(rows)
        self.report = report

    def _some(self, rows: Sequence[Lever]) -> "Levers":
        return Levers(self.report, rows)

    @cached_property
    def table(self) -> catalog.Table:
        """The levers as rows; GiB saved on the tightest device and in RAM, speed afterwards over now."""
        return catalog.Table(({
            "lever": one.name, "from": one.before, "to": one.after, "saves GiB": one.saves / GIB, "on": one.device,
            "saves in RAM": one.saves_host / GIB, "then it": one.verdict.replace("may spill", "may fit"),
            "decode": one.decode and one.decode[1], "prefill": one.prefill and one.prefill[1],
            "quality": one.quality, "price": one.price} for one in self._rows),
            {"saves GiB": "{:+.2f}".format, "saves in RAM": "{:+.2f}".format, "decode": "x{:.2f}".format,
             "prefill": "x{:.2f}".format, "price": "{:.3f}".format})


def levers(report: "Report") -> Levers:
    """Every lever's next step in either useful direction and, where the report does not fit, the first step that does."""
    return _pulled(report, only_remedies=False)


def remedies(report: "Report") -> Levers:
    """The levers that make a report fit which does not, cheapest first; empty where it fits."""
    return Levers(report, ()) if report.fits else _pulled(report, only_remedies=True)


def cheapest(report: "Report") -> Lever | None:
    """The cheapest lever that makes a report fit; None where it fits already or no single lever does."""
    return next(iter(remedies(report)), None)


def _pulled(report: "Report", only_remedies: bool) -> Levers:
    ask = _Asked(report)
    rows: dict[tuple, Lever] = {}
    for steps in _ladders(report, ask):
        for change in ask.chosen(steps):
            if only_remedies and not ask.whole_after(change).fits:
                continue
            if row := ask.lever(steps, change):
                rows.setdefault((steps.name, row.after), row)
    fastest = [1.0, 1.0]
    for row in rows.values():
        if row.fits and not report.fits and not {"context", "sequences"} & set(row.change):
            fastest = [max(most, band[1]) if band else most
                       for most, band in zip(fastest, (row.decode, row.prefill), strict=True)]
    priced = [replace(row, price=_price(row, fastest if row.fits else (1.0, 1.0))) for row in rows.values()]
    return Levers(report, sorted(priced, key=lambda row: _rank(report, row)))


def _price(row: Lever, fastest: Sequence[float]) -> float | None:
    """What is lost, in shares: see the module. None where nothing is known of the answers."""
    if row.kld is None:
        return None
    slower = max(1 - band[1] / most if band else 0.0 for band, most in zip((row.decode, row.prefill), fastest, strict=True))
    return HARM * row.kld + row.lost + max(slower, 0.0)


def _rank(report: "Report", row: Lever) -> tuple:
    """Makes it fit; saves; or spends: and where there is room, what to spend it on comes first. Unknown prices come last."""
    spends = row.saves < 0 or row.saves == 0 and row.saves_host <= 0
    if not report.fits and row.fits:
        group = 0
    elif spends and row.fits:
        group = 1 if report.fits else 3
    else:
        group = 4 if spends else 2
    return group, row.price is None, row.price or 0.0, row.name


# ---- the steps ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Steps:
    """A lever's steps from the present setting outwards, each a change of settings. `shares`: what part of the context or
    the requests a step gives up, by step."""

    name: str
    before: str
    steps: tuple[dict, ...]
    saving: bool = True
    lost: tuple[float, ...] = ()


def _ladders(r: "Report", ask: "_Asked") -> Iterator[_Steps]:
    s, llama = r.settings, r.settings.engine == "llama.cpp"
    yield from _quants(r)
    if llama or s.engine == "vllm":
        yield from _caches(r)
    yield from _contexts(r, ask)
    if llama:
        yield _Steps("ubatch", str(s.micro), tuple({"ubatch": n} for n in _halves(s.micro, LEAST_UBATCH)))
        if 2 * s.micro <= s.batch:
            yield _Steps("ubatch", str(s.micro), ({"ubatch": 2 * s.micro},), saving=False)
        yield from _places(r, ask)
        if s.swa_full:
            yield _Steps("swa_full", "on", ({"swa_full": False},))
        if s.sequences > 1 and not s.unified:
            yield _Steps("unified", "off", ({"unified": True},))
    if s.engine == "vllm":
        yield _Steps("batch", str(s.batch), tuple({"batch": n} for n in _halves(s.batch, 256)))
        now = s.share
        yield _Steps("utilization", f"{now:g}", tuple({"utilization": u} for u in UTILIZATIONS if u > now + 1e-9), saving=False)
        yield _Steps("utilization", f"{now:g}", tuple({"utilization": u} for u in UTILIZATIONS[::-1] if u < now - 1e-9))
    elif not s.flash_attention:
        yield _Steps("flash_attention", "off", ({"flash_attention": True},))
    if s.sequences > 1:                                # fewer requests, each with as much context as before
        fewer = (s.sequences - 1, *_halves(s.sequences - 1, 1))
        yield _Steps("sequences", str(s.sequences),
                     tuple({"sequences": n, "context": s.context // s.sequences * n} for n in fewer),
                     lost=tuple(1 - n / s.sequences for n in fewer))
    for name, without in (("draft", {"draft": None, "draft_quant": None}), ("mtp", {"mtp": False}),
                          ("projector", {"projector": None})):
        if getattr(s, name):
            yield _Steps(name, str(getattr(s, name) if name == "projector" else "on"), (without,))


def _quants(r: "Report") -> Iterator[_Steps]:
    s = r.settings
    ladder = LADDERS[s.engine]
    if s.engine == "llama.cpp":
        ladder = quants_to_try(r.spec, ladder)
    now = _position(r, ladder)
    yield _Steps("quant", s.quant, tuple({"quant": q} for q in ladder[now.stop:]))
    if now.start:
        yield _Steps("quant", s.quant, ({"quant": ladder[now.start - 1]},), saving=False)
    if not s.importance and s.engine == "llama.cpp" and s.quant != r.spec.stored and (s.quant, True) in catalog.quality():
        yield _Steps("importance", "no matrix", ({"importance": True},))


def _position(r: "Report", ladder: Sequence[str]) -> range:
    """Where the present quant stands on the ladder: itself, or what is as large, between those larger and those smaller."""
    if r.settings.quant in ladder:
        at = ladder.index(r.settings.quant)
        return range(at, at + 1)
    now = size_of(r.spec, r.settings.quant, r.settings.importance).tensor_bytes
    sizes = [_size(r, quant) for quant in ladder]
    return range(sum(size > now for size in sizes), sum(size >= now for size in sizes))


def _size(r: "Report", quant: str) -> float:
    try:
        return size_of(r.spec, quant, r.settings.importance).tensor_bytes
    except LabError:
        return 0


def _caches(r: "Report") -> Iterator[_Steps]:
    s = r.settings
    if s.engine == "vllm":
        if s.kv != ("fp8", "fp8"):
            yield _Steps("kv", _pair(s.kv), ({"kv": ("fp8", "fp8")},))
        return
    at = [KV_LADDER.index({"bf16": "f16", "iq4_nl": "q4_0"}.get(cache, cache)) for cache in s.kv]
    down = [tuple(KV_LADDER[min(i + n, len(KV_LADDER) - 1)] for i in at) for n in range(1, len(KV_LADDER))]
    if not s.flash_attention:                          # a quantized V needs it, a quantized K does not
        down = [(k, s.kv[1]) for k, _ in down]
    yield _Steps("kv", _pair(s.kv), tuple({"kv": kv} for kv in dict.fromkeys(down) if kv != s.kv))
    if s.kv[0] == s.kv[1] == "q8_0":                   # V takes harm less than K does
        yield _Steps("kv", _pair(s.kv), ({"kv": ("q8_0", "q4_0")},))
    if max(at) > KV_LADDER.index("f16"):
        up = tuple(KV_LADDER[max(i - 1, KV_LADDER.index("f16"))] for i in at)
        yield _Steps("kv", _pair(s.kv), ({"kv": up},), saving=False)


def _contexts(r: "Report", ask: "_Asked") -> Iterator[_Steps]:
    s = r.settings
    halves = list(_halves(s.context, LEAST_CONTEXT * s.sequences))
    largest = ask.whole.largest_context() if not ask.whole.fits else 0
    down = halves[:1] + ([largest] if 0 < largest < s.context and largest not in halves[:1] else [])
    yield _Steps("context", f"{s.context:,}", tuple({"context": n} for n in down), lost=tuple(1 - n / s.context for n in down))
    trained = r.spec.context_train * s.sequences
    if s.context < trained:
        yield _Steps("context", f"{s.context:,}", ({"context": min(2 * s.context, trained)},), saving=False)


def _places(r: "Report", ask: "_Asked") -> Iterator[_Steps]:
    if not r.cards:
        return
    layers, blocks, moved = r.gpu_layers, len(r.spec.blocks), r.n_cpu_moe
    whole = r.layers if r.settings.gpu_layers == "auto" else layers
    if whole:                                          # in a part that fits already, that part is the step
        yield _Steps("gpu_layers", str(whole), ({"gpu_layers": layers if r.partial else whole - 1},))
    if layers < r.layers and r.settings.gpu_layers != "auto":
        yield _Steps("gpu_layers", str(layers), ({"gpu_layers": layers + 1},), saving=False)
    if not r.spec.experts:
        return
    if moved < blocks:
        fewest = ask.whole.with_(n_cpu_moe="auto").n_cpu_moe if not ask.whole.fits else 0
        more = dict.fromkeys((moved + 1, *[n for n in (fewest, blocks) if n > moved + 1]))
        yield _Steps("n_cpu_moe", str(moved), tuple({"n_cpu_moe": n} for n in more))
    if moved:
        yield _Steps("n_cpu_moe", str(moved), ({"n_cpu_moe": moved - 1},), saving=False)


def _halves(number: int, least: int) -> Iterator[int]:
    while (number := number // 2) >= least:
        yield number


def _pair(kv: tuple[str, str]) -> str:
    return kv[0] if kv[0] == kv[1] else f"K {kv[0]}, V {kv[1]}"


# ---- one row --------------------------------------------------------------------------------------------------------

class _Asked:
    """A report, the same with all layers on the cards where they were left to "auto", and the device where it is closest."""

    def __init__(self, report: "Report"):
        self.report = report
        self.pinned = {"gpu_layers": report.layers} if report.partial else {}
        self.whole = report.with_(**self.pinned) if self.pinned else report
        bounded = [d for d in self.whole.devices.values() if d.capacity] or list(self.whole.devices.values())
        self.tightest = max(bounded, key=lambda d: (d.high - d.returned) / max(d.free, 1)).name
        self._after: dict[str, Report | None] = {}

    def whole_after(self, change: Mapping) -> "Report | None":
        """The report after a change, all layers on the cards where that is asked; None where the change cannot be."""
        key = repr(change)
        if key not in self._after:
            try:
                self._after[key] = self.report.with_(**{**self.pinned, **change})
            except LabError:
                self._after[key] = None
        return self._after[key]

    def in_part(self, change: Mapping, whole: "Report") -> "Report":
        """The report after a change with which it still fits only in part, as it does now. With how many layers is told from
        the bytes a layer takes: to search for it as `with_` does would take longer than the rest of the table."""
        layers = self.report.gpu_layers + _room_for(whole) - _room_for(self.whole)
        return self.report.with_(**{"gpu_layers": min(max(layers, 0), len(self.report.spec.layers)), **change})

    def chosen(self, steps: _Steps) -> Iterator[dict]:
        """The next step that can be and, in a report that does not fit, the first that makes it fit; where nothing is
        published about that one, also the first of which something is."""
        first = fitting = True
        for change in steps.steps:
            after = self.whole_after(change)
            if after is None:
                continue
            known = _quality(self.report, change)[1] is not None
            if first or after.fits and (fitting or known):
                yield change
            if self.report.fits or not steps.saving or after.fits and known:
                return
            first, fitting = False, fitting and not after.fits

    def lever(self, steps: _Steps, change: dict) -> Lever | None:
        """The row of a change; None where it changes nothing that is counted here."""
        whole = self.whole_after(change)
        saves, saves_host = (self.whole.devices[name].needed - whole.devices[name].needed for name in (self.tightest, "host"))
        idle = not saves and not saves_host and whole.verdict == self.report.verdict
        if idle and steps.name not in ("importance", "utilization"):
            return None
        in_part = self.pinned and "gpu_layers" not in change and whole.verdict == "does not fit"
        after = self.in_part(change, whole) if in_part else whole
        decode, prefill = (_ratio(getattr(self.report.speed, name), getattr(after.speed, name))
                           for name in ("decode_tps", "prefill_tps"))
        quality, kld = _quality(self.report, change)
        if "kv" in change and whole.settings.engine == "llama.cpp" and kernel_missing(whole):
            quality += "; slow in CUDA builds as released"
        lost = steps.lost[steps.steps.index(change)] if steps.lost else 0.0
        return Lever(steps.name, steps.before, _shown(steps.name, change), change, self.tightest, saves, saves_host,
                     whole.verdict, decode, prefill, quality, kld, lost)


def _room_for(whole: "Report") -> int:
    """How many layers of a report with all of them on the cards would fit, were they all alike."""
    s, found = whole.settings, []
    output = weights(whole.spec, s.quant, s.importance).output
    for name, device in whole.devices.items():
        if name != "host":
            layers = sum(t.bytes for t in whole.terms if t.device == name and t.name in ("weights", "kv_cache", "recurrent"))
            layers -= output if name == f"gpu{len(whole.cards) - 1}" else 0
            found.append((device.free - device.high + layers) * len(whole.spec.blocks) / layers if layers > 0 else math.inf)
    return int(min(found))


def _shown(name: str, change: Mapping) -> str:
    value = change[name]
    if name == "kv":
        return _pair(value)
    if name == "importance":
        return "matrix"
    if isinstance(value, bool) or value is None:
        return "on" if value else "off"
    return f"{value:,}" if name == "context" else str(value)


def _ratio(now: Band | None, then: Band | None) -> Band | None:
    """Afterwards over now; what is not known of the machine is the same in both, so low goes with low."""
    if not now or not then or not all(now):
        return None
    low, best, high = (b / a for a, b in zip(now, then, strict=True))
    return min(low, best, high), best, max(low, best, high)


def _quality(r: "Report", change: Mapping) -> tuple[str, float | None]:
    """What is known of the answers: words, and the published difference of mean KL divergence."""
    s = r.settings
    if "quant" in change or "importance" in change:
        importance = change.get("importance", s.importance)
        pair = _published(s.quant, s.importance), _published(change.get("quant", s.quant), importance)
    elif "kv" in change:
        pair = tuple(catalog.kv_quality().get(kv) for kv in (_plain(s.kv), _plain(change["kv"])))
        if _plain(s.kv) == _plain(change["kv"]):
            return SAME, 0.0
    elif "context" in change and "sequences" not in change:
        return ("remembers more" if change["context"] > s.context else "remembers less"), 0.0
    elif "projector" in change:
        return "sees no images", None
    else:
        return SAME, 0.0
    if None in pair:
        return UNKNOWN, None
    before, after = pair
    kld = after.mean_kld - before.mean_kld
    matrix = ", with an importance matrix" if after.importance and not s.importance and "quant" in change else ""
    perplexity = (f", {after.perplexity - before.perplexity:+.3f} perplexity" if after.perplexity and before.perplexity else "")
    return f"{kld:+.4f} KLD{perplexity} ({ABOUT}{matrix})", kld


def _published(quant: str, importance: bool) -> catalog.Quality | None:
    """The row of a quant, with or without an importance matrix as asked, else the other."""
    rows = catalog.quality()
    return rows.get((quant, importance)) or rows.get((quant, not importance))


def _plain(kv: tuple[str, str]) -> tuple[str, str]:
    """Without what makes no difference to answers in the published rows: f32 and bf16 are no worse than f16."""
    return tuple("f16" if cache in ("f32", "bf16") else cache for cache in kv)


__all__ = ["Lever", "Levers", "cheapest", "levers", "remedies"]
