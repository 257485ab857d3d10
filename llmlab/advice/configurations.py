"""In which quants, caches and placements a model fits and is quick enough: reports of llmlab.fit, the most faithful first.

Dear questions come last: whether the weights alone are more than there is room for, and whether RAM could be read quickly
enough, are asked before anything is laid out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from ..catalog import Entry
from ..errors import LabError
from ..fitting import Place, Report, left_to_models, place
from ..memory import cache_bytes, card_bytes, weights
from ..placing import free_bytes
from ..settings import LADDERS, Settings, check, quants_to_try
from ..shapes import ModelSpec, model_spec
from .losses import drift, importance_of

CACHES = (("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"))
"""Cache types of which the quality was measured and for which builds have kernels everywhere."""
IN_PART, CACHES_IN_PART = ("Q6_K", "Q4_K_M", "Q3_K_M"), CACHES[:2]
"""What is tried with a part in RAM: few quants, of those that processors multiply quickly; each takes time to lay out."""
USUAL_RAM = "32 GiB"
MOST = 10**6         # layers; more than any model has: all of them


@dataclass(frozen=True)
class Recipe:
    """A quant and a cache; `nats`: how far Llama 3 8B drifts with them."""

    quant: str
    importance: bool
    kv: tuple[str, str]
    nats: float

    @property
    def settings(self) -> dict:
        return {"quant": self.quant, "importance": self.importance, "kv": self.kv}


class Model:
    """A model asked for one machine and context; what fits is found as it is asked for.

    Raises LabError where the question itself cannot be (a context that is no number).
    """

    def __init__(self, entry: Entry, place: Place, context: int):
        self.entry, self.place = entry, place
        self.spec: ModelSpec = model_spec(entry.id)
        usual = Settings("Q4_K_M", gpu_layers=MOST)
        self.asked = check(self.spec, {**usual.__dict__, "context": context})
        self._whole: dict[Recipe, Report | None] = {}
        self._partly: dict[Recipe, Report | None] = {}

    def report(self, recipe: Recipe, **more) -> Report:
        """In a recipe, with `more` settings of a fit; as many layers on the cards as there are where they do not say."""
        return self.place.fit(self.spec, check(self.spec, {**self.asked.__dict__, **recipe.settings, **more}))

    @cached_property
    def recipes(self) -> tuple[Recipe, ...]:
        """Every quant and cache whose cost was measured, the least costly first. No quant larger than the model came in."""
        spec, found = self.spec, []
        for quant in quants_to_try(spec, LADDERS["llama.cpp"]):
            for kv in CACHES:
                if (nats := drift(quant, kv, spec.published)) is not None:
                    found.append(Recipe(quant, bool(importance_of(quant)) and quant != spec.published, kv, nats))
        return tuple(sorted(found, key=lambda recipe: recipe.nats))

    @cached_property
    def in_part(self) -> tuple[Recipe, ...]:
        """What is tried with a part in RAM, the smallest first."""
        if not self.place.cards:
            return ()
        few = [r for r in self.recipes if r.quant in (*IN_PART, self.spec.published) and r.kv in CACHES_IN_PART]
        return tuple(sorted(few, key=lambda r: (-r.nats, r.quant)))

    def whole(self, recipe: Recipe) -> Report | None:
        """The report with all of it on the cards, or, without any, in RAM; None where that does not fit."""
        if recipe not in self._whole:
            self._whole[recipe] = self._on_cards(recipe)
        return self._whole[recipe]

    def _on_cards(self, recipe: Recipe) -> Report | None:
        try:
            if self.place.cards and self._least(recipe) > self.place.room:
                return None
            report = self.report(recipe)
        except LabError:                     # a quant or a cache that this model's widths cannot have
            return None
        return report if report.fits else None

    def partly(self, least: float) -> "Iterator[tuple[Recipe, Report]]":
        """What fits with experts or layers in RAM, where not all of it fits the cards: one way of each of few recipes, the
        smallest first, until one is slower than `least` tokens per second: larger ones are slower still."""
        for recipe in self.in_part:
            if self.hopeless(recipe, least) or self.whole(recipe):
                continue
            if recipe not in self._partly:
                self._partly[recipe] = self._part(recipe)
            if report := self._partly[recipe]:
                yield recipe, report
                if decode(report) < least:
                    return

    def _part(self, recipe: Recipe) -> Report | None:
        """With as few experts in RAM as must be; where that is no way, as few layers, which take their attention along."""
        try:
            if self.spec.experts:
                moved = self.report(recipe, n_cpu_moe="auto")
                if moved.fits and (report := self.report(recipe, n_cpu_moe=moved.n_cpu_moe)).fits:
                    return report
            auto = self.report(recipe, gpu_layers="auto")
            most = auto.gpu_layers if auto.partial else self._certain(recipe)
            report = self.report(recipe, gpu_layers=most)
        except LabError:
            return None
        return report if report.fits else None

    def _certain(self, recipe: Recipe) -> int:
        """The most layers on the cards that certainly fit, where all of them may: "auto" then takes all."""
        low, high = 0, len(self.spec.layers)
        while low < high:
            middle = (low + high + 1) // 2
            if self.report(recipe, gpu_layers=middle).fits:
                low = middle
            else:
                high = middle - 1
        return low

    def _least(self, recipe: Recipe) -> int:
        """Bytes that certainly lie on the cards with all of it there: weights, cache and state."""
        s = self.asked
        cache = cache_bytes(self.spec, s.context, recipe.kv, ubatch=s.micro)
        held = sum(cache.by_layer) + sum(cache.recurrent_by_layer)
        return card_bytes(self.spec, recipe.quant, recipe.importance) + held

    @property
    def _room(self) -> int:
        return sum(map(free_bytes, self.place.cards))

    @cached_property
    def _ram(self) -> int | None:
        """Bytes of RAM that models may use, None: no limit; where a card shares it, what is left beside the model as asked."""
        if any(card.unified for card in self.place.cards):
            host = self.place.fit(self.spec, self.asked).devices["host"]
            return host.free if host.capacity else None
        return None if self.place.host is None else left_to_models(self.place.host)

    def hopeless(self, recipe: Recipe, least: float) -> bool:
        """Whether what is left to RAM at least is more than there is, or than can be read `least` times a second. Of experts
        only some are read."""
        spec, ram = self.spec, self._ram
        w = weights(spec, recipe.quant, recipe.importance)
        share = max(b.experts_used / b.experts for b in spec.blocks if b.experts) if spec.experts else 1.0
        left = w.padded - w.embedding - self._room
        return ram is not None and left > ram or left * share * least > self.place.rates.ram[1]


_kept: list[tuple[Place, int, dict[str, Model]]] = []
PLACES_KEPT = 4


def models_on(place: Place, context: int) -> Callable[[Entry], Model]:
    """What gives the model of an entry on a machine; what was laid out for the machines and contexts asked last is kept: other
    limits, tasks and settings choose among the same."""
    models = next((models for other, length, models in _kept if length == context and other == place), {})
    _kept[:] = [(place, context, models), *(one for one in _kept if one[2] is not models)][:PLACES_KEPT]

    def model(entry: Entry) -> Model:
        if entry.id not in models or models[entry.id].entry != entry:
            models[entry.id] = Model(entry, place, context)
        return models[entry.id]

    return model


def usual_place(gpu, host=None) -> Place:
    """As `fitting.place`; where nobody says how much RAM there is beside a card that is only named, the usual."""
    found = place(gpu, host)
    if host is not None or found.machine or not found.cards or any(card.unified for card in found.cards):
        return found
    return place(gpu, USUAL_RAM)


def placement(report: Report) -> str:
    """Where a report's layers are, in words."""
    if not report.cards:
        return "in RAM"
    card = "card" if len(report.cards) == 1 else "cards"
    if report.gpu_layers < report.layers:
        return f"{report.gpu_layers} of {report.layers} layers on the {card}"
    if report.n_cpu_moe:
        return f"experts of {report.n_cpu_moe} of {len(report.spec.blocks)} blocks in RAM"
    return f"all on the {card}"


def decode(report: Report) -> float:
    """Tokens per second, the usual guess; 0 where a card's rates are not known."""
    return report.speed.decode_tps[1] if report.speed.decode_tps else 0.0


def held(report: Report) -> int:
    """Bytes that have to be there on all devices together."""
    return sum(device.needed for device in (*report.lent, report.devices["host"]))
