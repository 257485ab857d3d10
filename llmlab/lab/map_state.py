"""MapState: which models on which cards, asked how; the one map that follows from it, and the pair that was pointed at."""

import traitlets as t

from .. import catalog
from ..errors import LabError
from ..fitmap import FitMap, fit_map
from ..fitting import QUANT_LADDER
from ..units import format_bytes
from .settable import Settable
from .state import FitState

ALL = "all"
CARDS = {
    "desktop cards since 2020": lambda card: card["kind"] == "desktop" and card["year"] >= 2020,
    "desktop": lambda card: card["kind"] == "desktop",
    "laptop": lambda card: card["kind"] == "laptop",
    "workstation": lambda card: card["kind"] == "workstation",
    "data centre": lambda card: card["kind"] == "datacenter",
    "memory shared with the processor": lambda card: card["kind"] in ("apple", "igpu"),
    ALL: lambda card: True,
}
ASKED = ("context", "kv", "cards", "family", "floor")


class MapState(Settable):
    """The settings of a map as traits; `found` follows, and in words `answer`, `picked` and `error`.

    cards: a name in CARDS, or a list of cards. family: a family of the catalogue, "all", or a list of models. floor: the
    least faithful quant that counts. model, card: the pair that is looked at (an id, or None). A value that cannot be
    used leaves the last good map in place and says why in `error`.
    """

    SETTINGS, WHOSE = (*ASKED, "model", "card"), " of a map"
    context = t.Any(8192)
    kv = t.Any("f16")
    cards = t.Any("desktop cards since 2020")
    family = t.Any(ALL)
    floor = t.Any(QUANT_LADDER[-1])
    model = t.Any(None, allow_none=True)
    card = t.Any(None, allow_none=True)

    found = t.Instance(FitMap, allow_none=True, read_only=True)
    answer = t.Unicode(read_only=True)
    picked = t.Unicode(read_only=True)
    error = t.Unicode(read_only=True)

    def __init__(self, **settings):
        """Raises LabError for settings that cannot be used: there is no last good map yet."""
        self._asked = None
        super().__init__(**self._known(settings))
        self._follow()
        if self.found is None:
            raise LabError(self.error)

    @property
    def quant(self) -> str | None:
        """The best quant of the pair that is looked at; None where none fits, or nothing is looked at."""
        at = self._place()
        return self.found.best[at[0]][at[1]] if at else None

    def take(self, fit: FitState) -> None:
        """Show the pair in a fit's state, with the map's context and cache, in the best quant that fits."""
        if not self._place():
            raise LabError("point at a cell of the map, or choose a model and a card, first")
        key, value = self.found.kv
        fit.update(model=self.model, card=self.card, cards=1, quant=self.quant or self.floor, engine="llama.cpp",
                   gpu_layers="auto", split=None, context=self.found.context, kv=key if key == value else (key, value))

    @t.observe(*ASKED)
    def _follow(self, _=None) -> None:
        asked = {name: getattr(self, name) for name in ASKED}
        if asked == self._asked:             # changes made together arrive one by one, all of them in place
            return
        self._asked = asked
        try:
            found = fit_map(_models(self.family), _cards(self.cards), self.context, self.kv, _ladder(self.floor))
        except LabError as error:
            self.set_trait("error", str(error))
            return
        least = "" if self.floor == QUANT_LADDER[-1] else f" In {self.floor} or better."
        with self.hold_trait_notifications():
            for name, value in {"error": "", "found": found, "answer": found.answer + least}.items():
                self.set_trait(name, value)
        self._pick()

    @t.observe("model", "card")
    def _pick(self, _=None) -> None:
        if self.found is None:
            return
        at = self._place()
        if at is None:
            self.set_trait("picked", "")
            return
        model, card = self.found.models[at[0]], self.found.cards[at[1]]
        fits = f"fits in {self.quant}" if self.quant else f"does not fit in {self.floor} or better"
        self.set_trait("picked", f"{model.title} {fits} on {card.name} ({format_bytes(card.memory, 0)}).")

    def _place(self) -> tuple[int, int] | None:
        """Row and column of the pair that is looked at."""
        models = [m.name for m in self.found.models]
        cards = [c.id for c in self.found.cards]
        return (models.index(self.model), cards.index(self.card)) if self.model in models and self.card in cards else None


def _models(family):
    if family == ALL:
        return None
    if not isinstance(family, str):
        return family
    chosen = [entry.id for entry in catalog.entries().values() if entry.family == family]
    if not chosen:
        families = dict.fromkeys(entry.family for entry in catalog.entries().values())
        raise LabError(f"{family[:40]!r} is no family of the catalogue; there are {', '.join(families)}")
    return chosen


def _cards(chosen):
    if not isinstance(chosen, str):
        return chosen
    if chosen not in CARDS:
        raise LabError(f"{chosen[:40]!r} is no group of cards; there are {', '.join(CARDS)}")
    return [row["id"] for row in catalog.gpus() if CARDS[chosen](row)]


def _ladder(floor) -> tuple[str, ...]:
    if floor not in QUANT_LADDER:
        raise LabError(f"{str(floor)[:40]!r} is no step of the ladder; there are {', '.join(QUANT_LADDER)}")
    return QUANT_LADDER[:QUANT_LADDER.index(floor) + 1]
