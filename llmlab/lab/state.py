"""FitState: what a reader can change about a fit, and the one report that follows from it."""

import inspect

import traitlets as t

from .. import catalog, hardware, wording
from ..errors import LabError
from ..fitting import Report, fit
from ..shapes import ModelSpec, model_spec
from . import compare, share
from .engines import suited
from .settable import settable

THIS_MACHINE = "this machine"
MOST_CARDS = 16
DEFAULTS = {"model": "llama-3-8b", "card": "rtx-3060-12gb", "cards": 1} | {
    name: one.default for name, one in list(inspect.signature(fit).parameters.items())[2:]}
SETTINGS = tuple(DEFAULTS)


class FitState(settable(DEFAULTS)):
    """The settings of a fit as traits; `report` follows, and in words `answer`, `hint`, `trust`, `speed` and `error`.

    Any value may be set: one that cannot be used leaves the last good report in place and says why in `error`. Several
    changes inside `update(...)` or `with state.hold_trait_notifications():` make one report.

    model: what llmlab.model takes. card: a card's id, "this machine", or None for this computer's RAM alone. cards: how
    many of that card. Every other setting is one of `llmlab.fit`, by its name: quant, context, kv, engine, gpu_layers...
    `longest` is the largest context that fits (0: none) and `best` the most faithful quant that does ("": none).
    `keep()` remembers the present configuration as A; `difference` says how the present one differs from it.
    `share()` is the configuration as a short string, and FitState.from_shared(string) brings it back.
    """

    report = t.Instance(Report, allow_none=True, read_only=True)
    longest = t.Int(read_only=True)
    best = t.Unicode(read_only=True)
    answer = t.Unicode(read_only=True)
    speed = t.Unicode(read_only=True)
    hint = t.Unicode(read_only=True)
    trust = t.Unicode(read_only=True)
    error = t.Unicode(read_only=True)
    kept = t.Instance(compare.Kept, allow_none=True, read_only=True)

    def __init__(self, **settings):
        """Raises LabError for settings that cannot be used: there is no last good report yet."""
        self._asked = self._read = self._here = None
        super().__init__(**self._known(settings))
        self._follow()
        if self.report is None:
            raise LabError(self.error)

    @classmethod
    def from_shared(cls, text: str) -> "FitState":
        """The state that `share()` wrote as `text`. Raises LabError in one line for anything else."""
        return cls(**share.read(text))

    def share(self) -> str:
        """This configuration as a string that can be read, and pasted: see lab/share.py. Raises LabError where it cannot be
        said so."""
        return share.write(self._good, self.report)

    def open_shared(self, text: str) -> None:
        """Take the configuration of a shared string; whatever it does not name goes back to its default."""
        self.update(**{**DEFAULTS, **share.read(text)})

    @property
    def settings(self) -> dict:
        """What is asked now, by name."""
        return {name: getattr(self, name) for name in SETTINGS}

    # ---- two configurations side by side ----------------------------------------------------------------

    def keep(self) -> None:
        """Remember the present configuration as A."""
        self.set_trait("kept", compare.Kept(self._good, self.report))

    def forget(self) -> None:
        """Compare with nothing."""
        self.set_trait("kept", None)

    def exchange(self) -> None:
        """Back to A; the present configuration becomes A."""
        if self.kept is not None:
            kept = self.kept
            self.keep()
            self.update(**kept.settings)

    @property
    def difference(self) -> str:
        """How the present configuration differs from A, in words; "" where none is kept."""
        return compare.words(self.kept.report, self.report) if self.kept else ""

    # ---- from settings to a report ----------------------------------------------------------------------

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
            if before:
                asked = self._asked = _consequences(spec, asked, before)
            report = self._fit(spec, **{name: asked[name] for name in SETTINGS if name != "model"})
            said = {"answer": report.answer, "speed": wording.speed(report), "hint": wording.hint(report),
                    "trust": wording.trust(report), "longest": report.whole.largest_context(),
                    "best": report.whole.best_quant() or ""}
        except LabError as error:
            self.set_trait("error", str(error))
            return
        self._good = asked
        with self.hold_trait_notifications():
            for name, value in asked.items():
                setattr(self, name, value)
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


def _consequences(spec: ModelSpec, asked: dict, before: dict) -> dict:
    """What else changes with a setting, where the reader did not change it too."""
    asked = dict(asked)
    if asked["engine"] != before["engine"]:
        asked = suited(spec, asked, before, DEFAULTS)
    if asked["model"] != before["model"] and asked["quant"] == before["quant"] and spec.stored:
        asked["quant"] = None                # a file is looked at as it is, until another quant is asked for
    if (asked["card"], asked["cards"]) != (before["card"], before["cards"]) and asked["split"] == before["split"]:
        asked["split"] = None                # a share a card, of the cards before
    return asked
