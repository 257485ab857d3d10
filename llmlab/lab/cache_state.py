"""CacheState: a model, a context and the types its keys and values are kept in; what that costs beside a card."""

from dataclasses import dataclass

import traitlets as t

from .. import catalog, hardware
from ..catalog import Gpu, Table
from ..errors import LabError
from ..fitting import Report, fit
from ..hardware import Machine
from ..memory import CACHE_TYPES, cache_types, checked_integer, size_of
from ..shapes import ModelSpec, model_spec
from ..units import format_bytes
from .cache_costs import (
    ARCHITECTURES,
    Cost,
    Curve,
    Pair,
    architecture,
    cost,
    curves,
    kv_words,
    layer_words,
    row_words,
    steps,
)
from .settable import settable
from .state import THIS_MACHINE

TYPES = tuple(name for name in CACHE_TYPES if name != "fp8")      # those that llama.cpp has too
MOST_KEPT = 4096
DEFAULTS = {"model": "llama-3.1-8b", "context": 32768, "k": "f16", "v": "f16", "recent": 0, "sinks": 0,
            "card": "rtx-3060-12gb", "quant": None}


@dataclass(frozen=True, eq=False)
class Look:
    """What follows from the settings. `cost` exact; `curves`: those of `cache_costs.SHOWN`, then that of the settings;
    `report`: the fit at this context, modelled but for weights and cache. `beside`: the same context and types in one model of
    each architecture, {architecture: Cost, or why it cannot be}, the chosen model last where it is none of them."""

    spec: ModelSpec
    cost: Cost
    curves: tuple[Curve | None, ...]
    report: Report
    beside: dict[str, Cost | str]

    @property
    def longest(self) -> int:
        return self.curves[-1].longest


class CacheState(settable(DEFAULTS)):
    """The settings as traits; `look` follows, and in words `answer` and `error`.

    model: what llmlab.model takes. context: tokens. k, v: the cache types of keys and values (`kv=` is both, a type or a pair).
    recent, sinks: how many of the last and of the first tokens are kept in 16 bits beside. card: a card's id, "this machine",
    or None for this computer's RAM alone. quant: of the weights (None: as stored in a GGUF, Q4_K_M for a config). A value that
    cannot be used leaves the last good look in place and says why in `error`; several changes in `update(...)` make one look.
    """

    look = t.Instance(Look, allow_none=True, read_only=True)
    answer = t.Unicode(read_only=True)
    error = t.Unicode(read_only=True)

    def __init__(self, **settings):
        """Raises LabError for settings that cannot be used: there is no last good look yet."""
        self._asked = self._read = self._here = None
        super().__init__(**self._known(settings))
        self._follow()
        if self.look is None:
            raise LabError(self.error)

    def _known(self, settings: dict) -> dict:
        settings = dict(settings)
        if "kv" in settings:
            kv = settings.pop("kv")
            settings |= dict(zip("kv", kv if isinstance(kv, (tuple, list)) and len(kv) == 2 else (kv, kv), strict=True))
        return super()._known(settings)

    @property
    def kv(self) -> Pair:
        """Cache types of K and V, of the present look."""
        return self.look.cost.kv

    @property
    def table(self) -> Table:
        """The architectures side by side."""
        return Table([_row(name, found) for name, found in self.look.beside.items()])

    @t.observe(*DEFAULTS)
    def _follow(self, _=None) -> None:
        asked, before = {name: getattr(self, name) for name in DEFAULTS}, self._asked or {}
        if asked == before:                  # changes made together arrive one by one, all of them in place
            return
        self._asked = asked
        if asked["card"] != before.get("card"):
            self._here = None                # what is free now is looked up once, when the machine is chosen
        try:
            spec = self._spec(asked["model"])
            if before and asked["model"] != before["model"] and asked["quant"] == before["quant"]:
                asked["quant"] = None        # each model in its own: a file as it is
            look = self._look(spec, **{name: asked[name] for name in DEFAULTS if name != "model"})
        except LabError as error:
            self.set_trait("error", str(error))
            return
        asked |= dict(zip("kv", look.cost.kv, strict=True))      # one latent row has one type
        self._asked = asked
        with self.hold_trait_notifications():
            for name, value in asked.items():
                setattr(self, name, value)
            for name, value in {"error": "", "look": look, "answer": words(look)}.items():
                self.set_trait(name, value)

    def _spec(self, model) -> ModelSpec:
        if self._read is None or self._read[0] is not model:
            self._read = model, model_spec(model)
        return self._read[1]

    def _look(self, spec: ModelSpec, context, k, v, recent, sinks, card, quant) -> Look:
        kv = cache_types((k, v))
        kept = sum(checked_integer(name, value, 0, MOST_KEPT, f"give how many tokens, 0 to {MOST_KEPT:,}")
                   for name, value in (("recent", recent), ("sinks", sinks)))
        found = cost(spec, context, kv, kept)
        card = self._card(card)
        return Look(spec, found, curves(spec, card, quant, found.kv, steps(spec, context), kept),
                    fit(spec, card, quant=quant, context=context, kv=found.kv), _beside(spec, context, kv, found))

    def _card(self, card) -> Gpu | Machine | None:
        if card == THIS_MACHINE:
            self._here = self._here or hardware.machine()
            return self._here
        return None if card is None else catalog.gpu(card)


def _beside(spec: ModelSpec, context: int, kv: Pair, mine: Cost) -> dict[str, Cost | str]:
    """One model of each architecture, and the chosen one."""
    found: dict[str, Cost | str] = {}
    for name, model in ARCHITECTURES.items():
        if model == spec.name:
            found[name] = mine
            continue
        try:
            found[name] = cost(model_spec(model), context, kv)
        except LabError as error:
            found[name] = str(error)
    return found if mine in found.values() else {**found, f"{architecture(spec)}, chosen": mine}


def _row(name: str, found: Cost | str) -> dict:
    if isinstance(found, str):
        return dict(zip(COLUMNS, (name, found, "", "", "", ""), strict=True))
    return dict(zip(COLUMNS, (name, found.spec.title, layer_words(found), row_words(found.spec),
                              format_bytes(found.further), format_bytes(found.bytes)), strict=True))


COLUMNS = ("architecture", "model", "layers", "of a token each keeps", "one token more", "in all")


# ---- in words -----------------------------------------------------------------------------------------------

def words(look: Look) -> str:
    """A look in a few sentences: what the context costs, what a token does, what fits, how fast."""
    return " ".join(filter(None, (whole_words(look), cost_words(look), longest_words(look), speed_words(look))))


def cost_words(look: Look) -> str:
    """What one token costs, and why."""
    found = look.cost
    text = f"A token costs {format_bytes(found.first)}"
    if found.layers["sliding"]:
        text += " while windows fill"
        if found.further != found.first:
            text += f", {format_bytes(found.further)} with {found.context:,} behind it"
    if found.kinds["state"]:
        text += f"; {format_bytes(found.kinds['state'])} of state whatever the context"
    kind = architecture(look.spec)
    return (f"{text}: exact. {kind[0].upper()}{kind[1:]}, layers: {layer_words(found)}; each that attends keeps "
            f"{row_words(look.spec)} a token.")


def whole_words(look: Look) -> str:
    """What the context costs."""
    found, report = look.cost, look.report
    device = next(iter(report.devices.values()))
    capacity = sum(card.memory for card in report.cards) or device.capacity
    of = f", {found.bytes / capacity:.0%} of {device.title}" if capacity else ""
    kept = f" ({format_bytes(found.beside)} of it kept in 16 bits)" if found.beside else ""
    return (f"{found.context:,} tokens of {look.spec.title} take {format_bytes(found.bytes)} in {kv_words(found.kv)}"
            f"{kept}{of}: exact.")


def longest_words(look: Look) -> str:
    """What fits beside the weights."""
    report, spec, most = look.report, look.spec, look.longest
    others = [one for one in look.curves[:-1] if one and one.kv != look.cost.kv]
    said = ", ".join(f"{one.longest:,} in {kv_words(one.kv)}" for one in others)
    if all(one.longest == most for one in others):
        said = "the same in every type drawn below"
    weights = format_bytes(size_of(spec, report.settings.quant).tensor_bytes)
    trained = ", all that the model was trained for" if most and most >= spec.context_train else ""
    fits = f"{most:,} tokens are the longest context that fits for certain{trained}" if most else "no context fits for certain"
    return (f"Beside {weights} of weights in {report.settings.quant} {fits}; {said} (weights and cache exact, the rest "
            "modelled).")


def speed_words(look: Look) -> str:
    """How fast it goes with the context full."""
    speed = look.report.speed
    if not speed.decode_tps:
        return ""
    low, best, high = speed.decode_tps
    partly = (f", with {look.report.layers - look.report.gpu_layers} of {look.report.layers} layers in RAM"
              if look.report.cards and look.report.gpu_layers < look.report.layers else "")
    return (f"Decode with {look.cost.context:,} tokens behind: about {best:.3g} tokens/s ({low:.3g} to {high:.3g}) instead of "
            f"{speed.start_tps[1]:.3g} with none{partly}: modelled for llama.cpp.")
