"""What would make an offloaded model faster: each lever pulled once, planned anew, ranked by predicted tokens per second."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from .. import catalog
from ..catalog import entries, links
from ..errors import LabError
from ..fitting import QUANT_LADDER
from ..levers import ABOUT, KV_LADDER, SAME, UNKNOWN
from ..memory import size_of
from ..rates import Band
from ..settings import quants_to_try
from ..units import GIB, format_bytes
from .planned_words import number
from .ways import next_drive, next_memory

if TYPE_CHECKING:
    from .planning import Plan

DRAFTED, ACCEPTED = 4, 0.6      # tokens drafted for a pass and the share that is right: a middling guess, between prompt lookup
#                                 on new text and a good draft of repeated text; what is right on a text only a run can say
QUANTS, MODELS = 4, 3           # how many harder quants and smaller models are tried


@dataclass(frozen=True)
class Step:
    """One change and what follows. `change` goes into `plan.with_`; decode: tokens per second afterwards, low, best, high;
    times: over now, usual. `costs`: what it costs, in words."""

    name: str
    before: str
    after: str
    change: Mapping = field(hash=False)
    decode: Band = (0.0, 0.0, 0.0)
    prefill: Band = (0.0, 0.0, 0.0)
    times: float = 1.0
    binds: str = ""
    costs: str = ""

    def __repr__(self) -> str:
        return f"<{self.name}: {self.before} to {self.after}, {number(self.decode[1])} tokens/s>"


class Steps(catalog.Listed):
    """The levers of a plan, the one that gives the most tokens per second first; shown as a table."""

    @cached_property
    def table(self) -> catalog.Table:
        return catalog.Table(({"lever": s.name, "from": s.before, "to": s.after, "tokens/s": s.decode[1], "low": s.decode[0],
                               "high": s.decode[2], "times": s.times, "then": s.binds, "costs": s.costs} for s in self._rows),
                             {"tokens/s": number, "low": number, "high": number, "times": "x{:.2f}".format})

    def __repr__(self) -> str:
        return super().__repr__() if len(self) else "(no lever makes a token quicker by more than one per cent)"

    def _repr_html_(self) -> str:
        return super()._repr_html_() if len(self) else f"<p>{self!r}</p>"


def steps(plan: "Plan") -> Steps:
    """Every lever that makes a token quicker, best first; those that change less than one per cent are left out."""
    now = plan.predict().decode[1]
    found = []
    for name, before, after, change, costs in _levers(plan):
        try:
            then = plan.with_(**change)
        except LabError:
            continue
        p = then.predict()
        way, share = p.binds
        if p.decode[1] > 1.01 * now:
            found.append(Step(name, before, after, change, p.decode, p.prefill, p.decode[1] / now, f"{way} {share:.0%}", costs))
    return Steps(sorted(found, key=lambda step: -step.times))


Lever = tuple[str, str, str, dict, str]


def _levers(p: "Plan") -> Iterator[Lever]:
    yield from _quants(p)
    yield from _room(p)
    drive = p.site.drive
    if p.used("ssd"):
        if faster := next_drive(drive):
            change = {"drive": faster, "mapped": False, "readers": None}
            yield "drive", drive.name, links()[faster].name, change, "another drive"
        if drive.mapped:
            yield "mmap", "page faults", "readers of their own", {"mapped": False}, SAME
    yield from _context(p)
    if not p.drafted:
        yield ("drafts", "one token a pass", f"{DRAFTED} drafted", {"drafted": DRAFTED, "accepted": ACCEPTED},
               f"{SAME}; if {ACCEPTED:.0%} are right, which depends on the text".replace("%", " %"))
    if p.mode == "exact" and (p.arrangement.on("ram") or p.arrangement.ram_experts) and p.site.card is not None:
        yield "mode", "exact", "fast", {"mode": "fast"}, "layers in RAM on the processor: logits differ a little"
    if p.site.card is None and p.layout == "gguf" and p.kernels == "own" and p.resident is None:
        yield ("layout", "unpacked at each use", "compiled", {"layout": "words"},
               "a store as large as the file is written once; logits differ in the last digits")
    yield from _models(p)


def _quants(p: "Plan") -> Iterator[Lever]:
    sizes = {quant: _bytes(p, quant) for quant in quants_to_try(p.spec, QUANT_LADDER)}
    now = size_of(p.spec, p.quant, p.importance).tensor_bytes
    known = catalog.quality()
    smaller = [quant for quant, size in sizes.items() if size and size < 0.98 * now]
    for quant in smaller[:QUANTS]:
        there = known.get((quant, p.importance)) or known.get((quant, True)) or known.get((quant, False))
        yield ("quant", p.quant, quant, {"quant": quant},
               f"mean KL divergence {there.mean_kld:.3f} ({ABOUT})" if there else f"quality: {UNKNOWN}")


def _bytes(p: "Plan", quant: str) -> int:
    try:
        return size_of(p.spec, quant, p.importance).tensor_bytes
    except LabError:
        return 0


def _room(p: "Plan") -> Iterator[Lever]:
    """More memory: what is asked for doubled, and the next size that cards come with."""
    a, site = p.arrangement, p.site
    if site.shared:
        if p.streamed:
            twice = 2 * site.device
            yield "device", format_bytes(site.device, 1), format_bytes(twice, 1), {"gpu_budget": twice}, "RAM"
        return
    if a.on("ssd") or p.used("ssd"):
        more = max(2 * site.ram, 8 * GIB)
        yield "RAM", format_bytes(site.ram, 1), format_bytes(more, 1), {"ram_budget": more}, "more RAM"
    if p.streamed and site.card is not None:
        if p.asked["gpu_budget"] is not None and site.device < (site.card.free or site.card.memory):
            yield ("VRAM budget", format_bytes(site.device, 1), format_bytes(site.card.memory, 1), {"gpu_budget": None},
                   "all of the card")
        elif size := next_memory(site.card):
            larger = replace(site.card, id="", name=f"{site.card.name} with {size // GIB} GiB", memory=size,
                             free=site.card.free and site.card.free + size - site.card.memory)
            change = {"gpu": larger, "gpu_budget": None}
            yield "VRAM", format_bytes(site.card.memory, 0), format_bytes(size, 0), change, "another card"


def _context(p: "Plan") -> Iterator[Lever]:
    if p.context >= 1024:
        yield "context", f"{p.context:,}", f"{p.context // 2:,}", {"context": p.context // 2}, "half the context"
    at = max(KV_LADDER.index({"bf16": "f16", "iq4_nl": "q4_0"}.get(one, one)) if one != "fp8" else 2 for one in p.kv)
    for kv in [one for one in ("q8_0", "q4_0") if KV_LADDER.index(one) > at]:
        there = catalog.kv_quality().get((kv, kv))
        yield ("KV cache", p.kv[0] if p.kv[0] == p.kv[1] else f"K {p.kv[0]}, V {p.kv[1]}", kv, {"kv": kv},
               f"mean KL divergence {there.mean_kld:.4f} ({ABOUT})" if there else f"quality: {UNKNOWN}")


def _models(p: "Plan") -> Iterator[Lever]:
    """The largest models of the same family that are clearly smaller, and the largest of all that use a quarter for a token."""
    family = next((e.family for e in entries().values() if e.id == p.spec.name), "").partition(" ")[0]
    smaller = sorted((e for e in entries().values() if 0.05 * p.spec.params < e.params_total < 0.7 * p.spec.params),
                     key=lambda e: (e.params_total, e.release), reverse=True)
    tried: dict[str, str] = {}                                   # size -> model, the newest of each size
    for e in smaller:
        if family and e.family.partition(" ")[0] == family:
            tried.setdefault(f"{e.params_total:.1e}", e.id)
    chosen = list(tried.values())[:MODELS]
    if not p.shape.experts:
        chosen += [e.id for e in smaller if e.params_active < 0.25 * p.spec.params_active and e.params_experts][:1]
    for name in dict.fromkeys(chosen):
        change = {"spec": name, "quant": None if p.spec.stored else p.quant}
        yield "model", p.spec.title, entries()[name].name, change, "another model"


__all__ = ["Step", "Steps", "steps"]
