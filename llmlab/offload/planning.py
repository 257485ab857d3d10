"""`llmlab.plan`: where each piece of a model should live under budgets, and how many tokens per second that gives, before
anything runs. Thinks in seconds: what the drive, the link and the device take for one token, and which of them binds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..catalog import Table
from ..errors import LabError
from ..gguf import GGUFFile
from ..memory import Term, cache_types, check_settings, checked_integer, default_quant, exact, find_mix, modelled
from ..rates import Band
from ..shapes import ModelSpec, from_gguf, model_spec
from ..units import GIB, MIB, format_bytes, parse_bytes
from . import planned_words as words
from .arranging import Arrangement, Needs, Times, arrangements, best, timed, too_little
from .costs import tokens_a_pass
from .placement import Placement
from .shaping import (
    AT_ONCE,
    Shape,
    Work,
    as_measured,
    cache_needs,
    cache_turns,
    decode_work,
    prefill_work,
    shape_of,
    workspace,
    workspace_in_ram,
)
from .ways import Site, site

if TYPE_CHECKING:
    from ..exports import Command
    from .planned_levers import Steps

MODES = ("exact", "fast")
WEAR = 600e12                   # bytes that a drive of 1 TB is promised to take (Samsung 990 PRO 1 TB, data sheet: 600 TBW)


@dataclass(frozen=True)
class Prediction:
    """Tokens per second, low, best, high: modelled. decode: of one token after the context is full; prefill: of a prompt as
    long as the context. seconds: what one token takes on each way, usual, most first: "SSD", "link", "compute", "KV", and
    "waiting", the time in which the device has nothing to do. `binds`: the way that is busiest, and for which share of the
    time."""

    decode: Band
    prefill: Band
    seconds: dict[str, float]
    binds: tuple[str, float]
    why: str
    times: Times
    prefill_times: Times
    tokens_a_pass: float = 1.0

    @property
    def first_token(self) -> float:
        """Usual seconds of a pass over a prompt's batch: none comes sooner."""
        return self.prefill_times.usual.seconds

    def __repr__(self) -> str:
        return f"<{words.rate(self.decode)} decode, {words.rate(self.prefill)} prefill; {words.binding(self)}>"


@dataclass(frozen=True)
class Plan:
    """Where a model's pieces live, and what follows; made by `plan`. `site`: the device, RAM, drive and what they deliver.

    `asked`: the arguments, for `with_`. `terms`: bytes on "device", "ram" and "ssd", exact or modelled, as `fit` has them.
    """

    spec: ModelSpec
    quant: str
    importance: bool
    context: int
    kv: tuple[str, str]
    mode: str
    site: Site
    shape: Shape
    needs: Needs
    arrangement: Arrangement
    work: tuple[Work, ...] = field(hash=False, repr=False)
    asked: Mapping = field(hash=False, repr=False)
    drafted: int = 0
    accepted: float = 0.0
    hits: float | None = None
    layout: str = "gguf"
    resident: float | None = None
    kernels: str = "own"
    plain: bool = False

    # ---- what it decides --------------------------------------------------------------------------------

    @cached_property
    def placement(self) -> Placement:
        """Plain data for the stream: the tier of each piece by name. Names are those of `offload.pieces.pieces_of`."""
        a, where = self.arrangement, {}
        beside = a.ram_experts
        turn = spread_over(self.shape, beside)
        for layer, tier in zip(self.shape.layers, a.tiers, strict=True):
            if layer.bytes:
                where[layer.name] = tier
            for expert in range(layer.experts):
                name = f"{layer.name}.expert.{expert}"
                if a.resident_experts:
                    where[name] = "device"
                elif expert < turn.get(layer.name, 0):
                    where[name] = "ram"
        drive = self.site.drive
        types = None if self.plain else self.kv[0] if self.kv[0] == self.kv[1] else self.kv
        return Placement(where, a.slots, a.expert_slots, drive.readers, drive.direct, a.kv, self.context, types, self.layout,
                         self.mode)

    @property
    def way(self) -> str:
        """How matrices are multiplied: one of `shaping.WAYS`."""
        return "tuned" if self.kernels == "tuned" else self.layout

    @property
    def streamed(self) -> int:
        """Bytes of weights that are not on the device."""
        return self.shape.bytes - self._resident

    @property
    def _resident(self) -> int:
        a = self.arrangement
        own = sum(layer.bytes for layer, tier in zip(self.shape.layers, a.tiers, strict=True) if tier == "device")
        return own + (sum(layer.experts * layer.expert for layer in self.shape.layers) if a.resident_experts else 0)

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """What takes bytes where. On the device: resident weights, slots, the cache of experts, norms and the like, KV cache
        (or what it takes turns in), workspace, what the card loses; in RAM: weights, pinned ring, KV cache, workspace; on the
        SSD: weights."""
        a, needs, shape = self.arrangement, self.needs, self.shape
        file = "as they lie in the file, in whole pages" if shape.exact else (
            "laid out as compiled code takes them" if self.layout == "words" else
            "as llama-quantize would make them, to a page")

        def weights(name: str, device: str, size: int, why: str) -> Term:
            if shape.exact:
                return exact(name, device, size, why)
            return modelled(name, device, size, 0.999 * size, size, why)           # rounded up to pages

        def of(tier: str) -> int:
            return sum(layer.bytes for layer, where in zip(shape.layers, a.tiers, strict=True) if where == tier)

        experts = shape.largest_expert
        beside = a.ram_experts * experts
        rest = 0 if a.resident_experts else sum(layer.experts * layer.expert for layer in shape.layers) - beside
        found = [weights("weights", "device", self._resident, f"{a.on('device')} of {len(a.tiers)} layers stay there, {file}")]
        if a.slot_bytes:
            found.append(weights("slots", "device", a.slot_bytes, f"{a.slots} that the other layers take turns in"))
        if a.expert_slots:
            found.append(weights("experts", "device", a.expert_slots * experts,
                                 f"a cache of {a.expert_slots:,} of {shape.experts:,}"))
        found += [exact("small", "device", needs.small, "norms, biases and routers, as float32"),
                  exact("kv_cache", a.kv, needs.cache, f"{self.context:,} tokens, K {self.kv[0]}, V {self.kv[1]}")]
        if a.kv == "ram" and needs.turns:
            found.append(exact("kv_turns", "device", needs.turns, "what layers look at comes here from RAM, in turns"))
        if needs.state:
            found.append(exact("recurrent", "device", needs.state, "state of recurrent layers, float32"))
        low, usual_size, high = needs.workspace
        found.append(modelled("compute", "device", usual_size, low, high,
                              f"while {min(AT_ONCE, self.context)} tokens are computed"))
        low, usual_size, high = needs.overhead
        if high:
            found.append(Term("overhead", "device", usual_size, self.site.overhead_kind, low, high,
                              "context, driver, libraries"))
        found += [weights("weights", "ram", of("ram") + beside, f"{a.on('ram')} layers" + (
                      f", {a.ram_experts:,} experts" if a.ram_experts else "") + ", copied for each pass")]
        if needs.aside and a.on("ram"):
            found.append(modelled("compute", "ram", needs.aside, needs.aside // 2, needs.aside,
                                  "while layers are computed there"))
        if a.ring_bytes:
            found.append(weights("staging", "ram", a.ring_bytes, "pinned memory that reads pass through to the card"))
        found.append(weights("weights", "ssd", of("ssd") + rest, f"{a.on('ssd')} layers" + (
            f", {shape.experts - a.ram_experts:,} experts, some in the cache too" if rest else "") + ", read for each pass"))
        return tuple(term for term in found if term.bytes or term.high)

    def used(self, tier: str) -> int:
        """Bytes on "device", "ram" or "ssd", high estimate."""
        return sum(term.high for term in self.terms if term.device == tier)

    # ---- what follows -----------------------------------------------------------------------------------

    def predict(self) -> Prediction:
        """Tokens per second as bands at most a factor of two wide, what binds, and why: modelled, without running anything."""
        return self._prediction

    @cached_property
    def _prediction(self) -> Prediction:
        a, s, shape = self.arrangement, self.site, self.shape
        passes = self.drafted + 1.0
        fast = self.mode == "fast"
        hidden = s.drive.hidden if s.card is None else 1.0      # a processor has to bring what it computes with
        times = timed(shape, a, s, self.work, self.hits, 1, fast, passes, hidden)
        gained = tokens_a_pass(self.drafted, self.accepted)
        slow, middle, quick = (gained / one for one in times.seconds)
        tokens = min(AT_ONCE, self.context)
        prompt = timed(shape, a, s, self._prompt, self.hits, tokens, hidden=hidden)
        batches = [tokens / one for one in prompt.seconds]
        seconds = words.by_way(self, times)
        share = {way: took / times.usual.seconds for way, took in seconds.items() if way != "waiting"}
        way = max(share, key=share.get)
        return Prediction((slow, middle, quick), tuple(batches), seconds, (way, min(share[way], 1.0)), words.why(self, times),
                          times, prompt, gained)

    @property
    def _prompt(self):
        return prefill_work(self.spec, self.quant, self.importance, self.site.card, self.site.rates, self.context,
                            min(AT_ONCE, self.context), self.way)

    @cached_property
    def answer(self) -> str:
        """One or two sentences: what lives where, what that gives, and what binds."""
        return words.answer(self)

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What there is to look out for, a line each; empty where there is nothing."""
        return words.warnings(self)

    def levers(self) -> "Steps":
        """What would make it faster, by predicted tokens per second: a table whose rows' `change` goes into `with_`."""
        from .planned_levers import steps
        return steps(self)

    def with_(self, **changes) -> "Plan":
        """The same question with other arguments: `plan.with_(ram_budget="32 GiB")`. Raises LabError as `plan`."""
        return plan(changes.pop("spec", self.spec), **{**self.asked, **changes})

    def export(self, engine: str) -> "Command":
        """The same split for another engine: "llama.cpp" (llama-server's options), "accelerate" (a device_map, as Python),
        "vllm" (--cpu-offload-gb). A string with `.notes` on what it has no word for. Raises UnknownName for another engine."""
        from .planned_export import export
        return export(self, engine)

    def figure(self):
        """Two rows of bars (plotly): what lives in which tier, and what a token's seconds go to."""
        from ..lab.plan_figures import plan_figure
        return plan_figure(self)

    # ---- as tables --------------------------------------------------------------------------------------

    @cached_property
    def table(self) -> Table:
        """The terms as rows, and what each tier has."""
        rooms, rows = {"device": self.site.device, "ram": self.site.ram}, []
        name, unit = ("GiB", GIB) if self.used("device") >= GIB else ("MiB", MIB)
        for tier in ("device", "ram", "ssd"):
            mine = [term for term in self.terms if term.device == tier]
            rows += [{"tier": tier, "what": t.name, name: t.bytes / unit, "range": words.span(t, unit), "kind": t.kind,
                      "why": t.why} for t in mine]
            if mine and tier in rooms:
                of = f"of {format_bytes(rooms[tier])}" if tier == "device" or self.site.limited else ""
                rows.append({"tier": tier, "what": "in all", name: sum(t.bytes for t in mine) / unit, "range": "", "kind": "",
                             "why": of})
        return Table(rows, {name: "{:.2f}".format})

    def to_frame(self):
        """The table as a pandas DataFrame. Raises LabError where pandas is not installed."""
        return self.table.to_frame()

    def to_dict(self) -> dict:
        """What `llmlab plan --json` prints; rates are low, best, high, bytes are plain numbers."""
        p, a, drive = self.predict(), self.arrangement, self.site.drive
        tiers = {tier: {t.name: t.bytes for t in self.terms if t.device == tier} for tier in ("device", "ram", "ssd")}
        return {"model": self.spec.name, "quant": self.quant, "context": self.context, "kv": list(self.kv), "mode": self.mode,
                "device": self.site.title, "device_budget": self.site.device,
                "ram_budget": self.site.ram if self.site.limited else None, "tiers": tiers,
                "layers": {tier: a.on(tier) for tier in ("device", "ram", "ssd")},
                "slots": a.slots, "expert_slots": a.expert_slots, "ram_experts": a.ram_experts, "kv_tier": a.kv,
                "drive": {"name": drive.name, "rate": drive.rate, "readers": drive.readers, "direct": drive.direct,
                          "mapped": drive.mapped, "kind": drive.kind},
                "decode_tps": p.decode, "prefill_tps": p.prefill, "seconds": p.seconds, "moved": p.times.moved,
                "binds": {"way": p.binds[0], "share": p.binds[1]}, "hits": p.times.hits if self.shape.experts else None,
                "tokens_a_pass": p.tokens_a_pass, "answer": self.answer, "warnings": list(self.warnings)}

    def __repr__(self) -> str:
        return f"<plan: {self.answer}>"

    def _repr_html_(self) -> str:
        from html import escape
        lines = "".join(f"<p>{escape(line)}</p>" for line in (self.answer, *self.warnings))
        return lines + self.table._repr_html_()


def spread_over(shape: Shape, many: int) -> dict[str, int]:
    """How many experts of each layer, so many in all, as even as can be."""
    layers = [layer for layer in shape.layers if layer.experts]
    found, left = {}, many
    for k, layer in enumerate(layers):
        found[layer.name] = min(layer.experts, -(-left // (len(layers) - k)))
        left -= found[layer.name]
    return found


def plan(spec, machine=None, gpu_budget=None, ram_budget=None, context: int = 8192,
         kv: str | tuple[str, str] | None = "f16", quant: str | None = None, *, gpu=None, host=None, drive=None,
         readers: int | None = None, mapped: bool = False, mode: str = "exact", importance: bool = False,
         slots: int | None = None, kv_tier: str | None = None, drafted: int = 0, accepted: float = 0.6,
         hits: float | None = None, layout: str = "gguf", resident: float | None = None, kernels: str = "own",
         goal: str = "decode") -> Plan:
    """How should this run where it does not fit, and how fast? `llmlab.plan`.

    >>> llmlab.plan("llama-3-70b", gpu="rtx-4090-24gb", host="32 GiB DDR5-6000", drive="gen4", quant="Q4_K_M").answer

    spec: a ModelSpec, a GGUFFile or anything llmlab.model takes. machine: a Machine (None: this computer, with what calibration
    measured). Other hardware: gpu, a card or its name ("none": the processor alone, whose "device" is a part of RAM); host, RAM
    in words ("64 GB DDR5-6000"); drive, one of data/links.csv ("samsung-980-pro"), a class ("gen4", "sata", "hdd") or a rate
    ("5.9 GB/s"). gpu_budget and ram_budget: bytes or words ("8 GiB") for all that is needed there: weights, slots, staging, KV
    cache, workspace, what the card loses; None: all there is. kv, quant, context, importance: as in `fit`; kv None: plain
    numbers, as a decoder keeps them where nothing is said.
    readers: threads that read (None: what is fastest); mapped: by page faults, as mmap does. mode: "exact", all arithmetic on
    the device, or "fast", layers in RAM computed by the processor where they are. slots, kv_tier ("device", "ram"): None
    chooses. drafted, accepted: so many tokens are drafted for each pass, each right with that chance. hits: the share of wanted
    experts that the cache holds, where it was measured. layout: "gguf" or "words" (as compiled code takes them). resident:
    tokens per second of this model where all of it stays on the device, where that was measured: what it computes is then no
    guess. kernels: "own", as this package multiplies, or "tuned", as quickly as llama.cpp does: what the hardware allows. goal:
    of "decode" and "prefill" that which is to take the fewest seconds.
    Raises LabError in one line for what cannot be, such as a budget too small, with the least that would do.
    """
    asked = dict(machine=machine, gpu_budget=gpu_budget, ram_budget=ram_budget, context=context, kv=kv, quant=quant, gpu=gpu,
                 host=host, drive=drive, readers=readers, mapped=mapped, mode=mode, importance=importance, slots=slots,
                 kv_tier=kv_tier, drafted=drafted, accepted=accepted, hits=hits, layout=layout, resident=resident,
                 kernels=kernels, goal=goal)
    spec = _spec(spec)
    check_settings(context)
    context = int(context)
    quant = default_quant(spec, quant)
    if quant != spec.stored:
        mix = find_mix(quant)
        if mix.engine != "llama.cpp":
            raise LabError(f"offloaded models are GGUF files, and {mix.name} is none of their quants; choose one like Q4_K_M")
        quant = mix.name
    _checked(mode, slots, kv_tier, drafted, accepted, hits, readers, layout, resident, kernels, goal)
    where = site(machine, gpu, host, drive, readers, bool(mapped), _budget("gpu_budget", gpu_budget),
                 _budget("ram_budget", ram_budget))
    plain, kv = kv is None, cache_types(kv or ("f32" if where.card is None else "f16"))
    cache, state = cache_needs(spec, context, kv)
    if layout == "words" and where.card is not None:
        raise LabError("the layout 'words' is for processors; leave it out, or give gpu='none'")
    shape = shape_of(spec, quant, bool(importance), where.lanes if layout == "words" else 0)
    needs = Needs(shape.small, workspace(spec, context, where.card is not None), where.overhead, cache, state,
                  cache_turns(spec, context, kv), workspace_in_ram(spec) if mode == "fast" and where.card is not None else 0)
    way, tokens = "tuned" if kernels == "tuned" else layout, min(AT_ONCE, context)
    work = decode_work(spec, quant, bool(importance), where.card, where.rates, kv, context, way,
                       not plain and where.card is None)
    if resident is not None:
        work = as_measured(work, 1 / resident)
    candidates = arrangements(shape, needs, where, slots, kv_tier)
    if goal == "prefill":
        prompt = prefill_work(spec, quant, bool(importance), where.card, where.rates, context, tokens, way)
        chosen = best(candidates, shape, where, prompt, hits, tokens=tokens)
    else:
        chosen = best(candidates, shape, where, work, hits, mode == "fast")
    if chosen is None:
        raise too_little(shape, needs, where, kv_tier, slots)
    if where.card is not None and kernels == "own" and resident is None and set(chosen.tiers) == {"device"} and (
            chosen.resident_experts or not shape.experts):        # what stays whole is not opened so: quicker kernels serve it
        kernels, work = "tuned", decode_work(spec, quant, bool(importance), where.card, where.rates, kv, context, "tuned")
    return Plan(spec, quant, bool(importance), context, kv, mode, where, shape, needs, chosen, work, asked,
                int(drafted), float(accepted), hits, layout, resident, kernels, plain)


def _spec(given) -> ModelSpec:
    if not isinstance(given, GGUFFile):
        return model_spec(given)
    return model_spec(given.paths[0]) if given.paths and Path(given.paths[0]).is_file() else from_gguf(given)


def _budget(name: str, given) -> int | None:
    if given is None:
        return None
    size = parse_bytes(given)
    if size >= 2**60:
        raise LabError(f"{name} is {str(given)[:40]!r}; give how much memory there is, like '8 GiB'")
    return size


def _checked(mode, slots, kv_tier, drafted, accepted, hits, readers, layout, resident, kernels, goal) -> None:
    """LabError for settings that make no sense."""
    if mode not in MODES:
        raise LabError(f"mode is {str(mode)[:40]!r}; give 'exact', or 'fast', which computes layers in RAM where they are")
    if kv_tier not in (None, "device", "ram"):
        raise LabError(f"kv_tier is {str(kv_tier)[:40]!r}; give 'device' or 'ram', or leave it out")
    if layout not in ("gguf", "words"):
        raise LabError(f"layout is {str(layout)[:40]!r}; give 'gguf' or 'words'")
    if goal not in ("decode", "prefill"):
        raise LabError(f"goal is {str(goal)[:40]!r}; give 'decode', or 'prefill' for long prompts and short answers")
    if kernels not in ("own", "tuned"):
        raise LabError(f"kernels is {str(kernels)[:40]!r}; give 'own', or 'tuned' for what hardware allows")
    if resident is not None and not (isinstance(resident, (int, float)) and not isinstance(resident, bool)
                                     and 0 < resident < math.inf):
        raise LabError(f"resident is {str(resident)[:40]!r}; give the tokens per second that were measured")
    if slots is not None:
        checked_integer("slots", slots, 1, 4096, "give a whole number, 2 to read one layer ahead")
    if readers is not None:
        checked_integer("readers", readers, 1, 256, "give a whole number from 1 to 256")
    checked_integer("drafted", drafted, 0, 64, "give how many tokens are drafted for each pass, from 0 to 64")
    for name, value in (("accepted", accepted), ("hits", hits)):
        if value is not None and not (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
                                      and 0 <= value <= 1):
            raise LabError(f"{name} is {str(value)[:40]!r}; give a share from 0 to 1")


__all__ = ["Plan", "Prediction", "plan"]
