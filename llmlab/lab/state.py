"""FitState: what a reader can change about a fit, and the one report that follows from it."""

import traitlets as t

from .. import catalog, hardware, wording
from ..errors import LabError
from ..fitting import Report, fit
from ..shapes import ModelSpec, model_spec

SETTINGS = ("model", "quant", "context", "kv", "card", "cards", "gpu_layers", "n_cpu_moe", "sequences")
THIS_MACHINE = "this machine"
MOST_CARDS = 16


def _known(settings: dict) -> dict:
    for name in settings:
        if name not in SETTINGS:
            raise LabError(f"{name!r} is no setting; there are {', '.join(SETTINGS)}")
    return settings


class FitState(t.HasTraits):
    """The settings of a fit as traits; `report` follows, and in words `answer`, `hint`, `trust`, `speed` and `error`.

    Any value may be set: one that cannot be used leaves the last good report in place and says why in `error`. Several
    changes inside `update(...)` or `with state.hold_trait_notifications():` make one report.

    model: what llmlab.model takes. quant: None means as stored, or Q4_K_M. card: a card's id, "this machine", or None
    for this computer's RAM alone. cards: how many of that card. kv: a type, or a pair for K and V. gpu_layers: "auto"
    or a number; n_cpu_moe: blocks whose experts stay in RAM. sequences: requests that share the context.
    """

    model = t.Any("llama-3-8b")
    quant = t.Any(None, allow_none=True)
    context = t.Any(8192)
    kv = t.Any("f16")
    card = t.Any("rtx-3060-12gb")
    cards = t.Any(1)
    gpu_layers = t.Any("auto")
    n_cpu_moe = t.Any(0)
    sequences = t.Any(1)

    report = t.Instance(Report, allow_none=True, read_only=True)
    answer = t.Unicode(read_only=True)
    speed = t.Unicode(read_only=True)
    hint = t.Unicode(read_only=True)
    trust = t.Unicode(read_only=True)
    error = t.Unicode(read_only=True)

    def __init__(self, **settings):
        """Raises LabError for settings that cannot be used: there is no last good report yet."""
        self._asked = self._read = self._here = None
        super().__init__(**_known(settings))
        self._follow()
        if self.report is None:
            raise LabError(self.error)

    def update(self, **settings) -> None:
        """Change several settings and make one report. Raises LabError for a name that is no setting."""
        with self.hold_trait_notifications():
            for name, value in _known(settings).items():
                setattr(self, name, value)

    @property
    def settings(self) -> dict:
        """What is asked now, by name."""
        return {name: getattr(self, name) for name in SETTINGS}

    @t.observe(*SETTINGS)
    def _follow(self, _=None) -> None:
        asked, before = self.settings, self._asked or {}
        if asked == before:                  # changes made together arrive one by one, all of them in place
            return
        self._asked = asked
        if asked["card"] != before.get("card"):
            self._here = None                # what is free now is looked up once, when the machine is chosen
        try:
            spec = self._spec(asked["model"])
            if before and asked["model"] != before["model"] and asked["quant"] == before["quant"] and spec.stored:
                asked["quant"] = None        # a file is looked at as it is, until another quant is asked for
                self._asked = asked
            report = self._fit(spec, **{name: asked[name] for name in SETTINGS if name != "model"})
            said = {"answer": report.answer, "speed": wording.speed(report), "hint": wording.hint(report),
                    "trust": wording.trust(report)}
        except LabError as error:
            self.set_trait("error", str(error))
            return
        with self.hold_trait_notifications():
            self.quant = asked["quant"]
            for name, value in {"error": "", "report": report, **said}.items():
                self.set_trait(name, value)

    def _spec(self, model) -> ModelSpec:
        """The model's spec; a file's header is read once, not at each change of a slider."""
        if self._read is None or self._read[0] is not model:
            self._read = model, model_spec(model)
        return self._read[1]

    def _fit(self, spec: ModelSpec, card, cards, **settings) -> Report:
        if isinstance(cards, bool) or not isinstance(cards, int) or not 1 <= cards <= MOST_CARDS:
            raise LabError(f"cards is {cards!r:.40}; give how many of the card, 1 to {MOST_CARDS}")
        if card == THIS_MACHINE:
            card = self._here = self._here or hardware.machine()
        elif isinstance(card, (str, catalog.Gpu)) and cards > 1:
            card = [card] * cards
        return fit(spec, card, **settings)
