"""Advisor: widgets over an AdviceState: my card, my task, my patience; ranked choices with reasons, and two frontiers."""

from html import escape

import ipywidgets as w

from ..advice import TASKS, settings_of
from ..advice.limits import LANGUAGES
from . import options
from .advice_boxes import AgainstBox, RunBox, TenthBox, UnknownBox
from .advice_figures import advice_picture
from .advice_state import DEFAULTS, AdviceState, left_out_words, row_of, source_words
from .boxes.box import line
from .folds import Folds
from .live import Chart, Keys, Words
from .options import NOTHING
from .panel import Panel, grid, offer, put, told
from .table import Rows

PRESETS = (("RTX 3060, coding", "12 GB, at a pace one can read", {}),
           ("8 GB laptop, chat", "8 GB and 16 GiB of RAM",
            {"card": "rtx-4060-laptop-8gb", "host": "16 GiB", "task": "chat", "min_speed": 10.0}),
           ("24 GB, reasoning", "an RTX 3090 and long answers",
            {"card": "rtx-3090-24gb", "task": "reasoning", "context": 16384, "min_speed": 15.0}),
           ("16 GB, tools", "an RTX 4060 Ti 16GB that calls functions",
            {"card": "rtx-4060-ti-16gb", "task": "tools", "context": 16384}),
           ("two cards, maths", "what 2 × 12 GB reach", {"card": ("rtx-3060-12gb", "rtx-3060-12gb"), "task": "maths"}),
           ("Russian, open licence", "Apache-2.0 or MIT, and its maker names Russian",
            {"languages": "ru", "license": "open", "task": "knowledge"}))
SPEEDS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0, 60.0, 80.0, 100.0, 150.0)
CONTEXTS = tuple(2**k for k in range(11, 18))
LICENSES = (("any", NOTHING), ("open: Apache-2.0 or MIT", "open"), ("Apache-2.0", "Apache-2.0"), ("MIT", "MIT"),
            ("Llama's", "Llama"), ("Gemma's", "Gemma"))
STEPS = 20                        # of the slider that asks for a least score
MOST_ROWS = 10
_FOLDS = {"get and run it": (RunBox, "the commands that get the chosen one and run it"),
          "not scored here": (UnknownBox, "what fits and has no score in this setting"),
          "old 13B, new 7B": (AgainstBox, "Llama 2 13B beside newer and smaller models, in every setting that scores both"),
          "a tenth of the memory": (TenthBox, "the best of about 7B beside the best of about 70B, setting by setting")}


class Advisor(Panel):
    """Choose a card, a task and how long you wait; see which model, in which quant, and why; `panel.state` is the same in code.

    `Advisor(card="rtx-4090-24gb", task="tools", min_speed=20)`, or over an AdviceState. Raises LabError for settings that
    cannot be used.
    """

    def __init__(self, state: AdviceState | str | None = None, **settings):
        if isinstance(state, AdviceState):
            state.update(**settings)
        else:
            state = AdviceState(**settings if state is None else {"card": state, **settings})
        super().__init__(state)
        self._make()
        self.children = self._arranged()
        self.add_class("llmlab-advice")
        self._show()
        self.state.observe(self._show, ["look", "error", "chosen"])

    # ---- making the widgets -----------------------------------------------------------------------------

    def _make(self) -> None:
        bound, look = self.bound, self.state.look
        self.card = bound("card", w.Dropdown, "card", "what it has to run on", options=options.cards())
        self.task = bound("task", w.Dropdown, "task", "whose published scores are looked at", options=options.named(TASKS))
        self.setting = bound("setting", w.Dropdown, "scores of", "one benchmark, run one way, by one publication: nothing is "
                             "compared across", options=[("", NOTHING)])
        self.languages = bound("languages", w.Dropdown, "language", "that its maker names", options=_languages())
        self.license = bound("license", w.Dropdown, "licence", "how its licence begins", options=list(LICENSES))
        self.context = bound("context", w.SelectionSlider, "context", "tokens of context", options=[("", 0)],
                             continuous_update=False)
        self.min_speed = bound("min_speed", w.SelectionSlider, "tokens/s", "the least while it answers, with the context full",
                               options=[("", 0.0)])
        self.quality_floor = bound("quality_floor", w.SelectionSlider, "score", "the least to expect, in the setting's points",
                                   options=[("any", NOTHING)])
        self.said = Words(layout=w.Layout(width="100%", margin="8px 0 0"))
        self.by_size = Chart(advice_picture(look, "GiB"), "chart: score to expect against memory")
        self.by_speed = Chart(advice_picture(look, "speed"), "chart: score to expect against tokens per second")
        self.rows = Rows(self.guarded(self._choose), caption="")
        self.folds = Folds(self, {title: kind for title, (kind, _) in _FOLDS.items()},
                           {title: why for title, (_, why) in _FOLDS.items()})

    def _arranged(self) -> list[w.Widget]:
        presets = line(*(self.button(label, why, lambda more=more: self.state.update(**{**DEFAULTS, **more}))
                         for label, why, more in PRESETS))
        return [presets, grid(300, self.card, self.task, self.setting, self.languages, self.license),
                grid(300, self.min_speed, self.quality_floor, self.context), self.said, grid(420, self.by_size, self.by_speed),
                self.rows, self.folds, Keys()]

    # ---- from the reader to the state -------------------------------------------------------------------

    def _choose(self, model: str) -> None:
        self.state.chosen = model

    # ---- from the state to the reader -------------------------------------------------------------------

    def _show(self, change=None) -> None:
        """Bring everything up to date. Where there is an error the widgets keep what the reader asked for."""
        state, look = self.state, self.state.look
        if not state.error:
            with self.showing():
                self._show_settings()
            if change is None or change["name"] in ("look", "chosen"):
                choice = state.choice
                self.by_size.present(advice_picture(look, "GiB", choice))
                self.by_speed.present(advice_picture(look, "speed", choice))
                self._show_rows()
        self._say(state.error)
        self.folds.show()

    def _show_settings(self) -> None:
        state, asked = self.state, self.state.advice.asked
        several = state.card if isinstance(state.card, str) else " and ".join(card.name for card in state.advice.cards)
        offer(self.card, options.cards(), state.card, several)
        put(self.task, value=asked.task)
        offer(self.setting, _settings(asked.task), state.setting, asked.setting.name)
        offer(self.languages, _languages(), state.languages, ", ".join(asked.languages))
        offer(self.license, list(LICENSES), state.license, ", ".join(asked.license))
        offer(self.context, [(f"{n:,}", n) for n in sorted({*CONTEXTS, asked.context})], asked.context, "")
        offer(self.min_speed, [(f"{n:g}" if n else "any", n) for n in sorted({*SPEEDS, asked.min_speed})], asked.min_speed, "")
        floors = sorted({*_floors(asked.setting.benchmark.top), *([asked.quality_floor] if asked.quality_floor else [])})
        offer(self.quality_floor, [("any", NOTHING), *((f"{n:g}", n) for n in floors)], asked.quality_floor or None, "")

    def _show_rows(self) -> None:
        leaders, choice = self.state.advice.leaders, self.state.choice
        shown = list(leaders[:MOST_ROWS])
        if choice and choice.model not in {one.model for one in shown}:
            shown.append(choice)
        more = f"; {len(leaders) - MOST_ROWS} more: panel.state.table" if len(leaders) > MOST_ROWS else ""
        put(self.rows, caption=f"a row a model, in its best choice{more}. Scores published, less what the quant is measured to "
            "cost; GiB: weights and cache exact, the rest modelled; tokens/s modelled" if leaders else "")
        models = {one.entry.name: one.model for one in shown}

        def action(row: dict) -> tuple[str, str, str]:
            model = models[row["model"]]
            return model, "chosen" if model == choice.model else "choose", "mark it, and show how to get and run it"

        self.rows.show(list(map(row_of, shown)), action)

    def _say(self, problem: str) -> None:
        look = self.state.look
        head, _, rest = look.advice.answer.partition(". By ")
        put(self.said, html=told(escape(head + "." * bool(rest)), (f"By {rest}" if rest else "", left_out_words(look),
                                                                   source_words(look)), problem))


def _languages() -> options.Options:
    return [("any", NOTHING), *sorted((name.capitalize(), code) for code, name in LANGUAGES.items())]


def _settings(task: str) -> options.Options:
    """The task's settings that score more than one model of the catalogue; nothing chosen: the first of them."""
    found = [one for one in settings_of(task) if one.known > 1]
    first = f"most models: {found[0].name}, {found[0].known} known" if found else "the usual"
    names = [f"{one.name}, {one.known} known, {one.source}" for one in found]
    return [(first, NOTHING), *zip((name if len(name) < 110 else f"{name[:107]}..." for name in names), found, strict=True)]


def _floors(top: float) -> list[float]:
    """Least scores to ask for."""
    low = 1000 if top > 1000 else 0
    high = 1500 if top > 1000 else top
    return [round(low + (high - low) * k / STEPS, 3) for k in range(1, STEPS)]
