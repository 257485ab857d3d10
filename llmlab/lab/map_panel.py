"""FitMapExplorer: widgets over a MapState, the heat map of models and cards. A cell that is clicked goes to a fit panel."""

from html import escape

import ipywidgets as w

from . import options
from .boxes.box import line
from .figures import map_picture
from .fit_panel import FitExplorer
from .live import Chart, Keys, Words
from .map_state import CARDS, MapState
from .panel import Panel, offer
from .state import FitState
from .style import RED


class FitMapExplorer(Panel):
    """The best quant that fits, for many models on many cards; `panel.state` is the same in code.

    `FitMapExplorer(fit=panel)`: a click on a cell, or the button, shows that model and card in this FitExplorer (or
    FitState). Other names are settings of a MapState. Raises LabError for settings that cannot be used.
    """

    def __init__(self, state: MapState | None = None, fit: FitExplorer | FitState | None = None, **settings):
        if state is None:
            state = MapState(**settings)
        else:
            state.update(**settings)
        super().__init__(state)
        self._fit = fit.state if isinstance(fit, FitExplorer) else fit
        self._make()
        self.children = self._arranged()
        self.add_class("llmlab-map")
        self._show()
        self.state.observe(self._show, ["found", "error", "picked"])

    @property
    def answer(self) -> str:
        """What the map says in words, and of the pair that is looked at; or what is wrong."""
        return self.state.error or " ".join(filter(None, (self.state.answer, self.state.picked)))

    def _make(self) -> None:
        self.cards = self.bound("cards", w.Dropdown, "cards", "which cards stand along the top", options=list(CARDS))
        self.family = self.bound("family", w.Dropdown, "models", "all models, or one family", options=options.families())
        self.context = self.bound("context", w.SelectionSlider, "context", "tokens of context",
                                  options=options.map_contexts(self.state.context), continuous_update=False)
        self.kv = self.bound("kv", w.Dropdown, "KV cache", "the type of the KV cache", options=options.caches("llama.cpp"))
        self.floor = self.bound("floor", w.Dropdown, "at least", "the least faithful quant that counts",
                                options=options.floors())
        self.model = self.bound("model", w.Dropdown, "model", "the row that is looked at")
        self.card = self.bound("card", w.Dropdown, "card", "the column that is looked at")
        self.take = self.button("show in the fit panel", "this model on this card, in the best quant that fits",
                                lambda: self.state.take(self._fit))
        self.said = Words(layout=w.Layout(width="100%", margin="8px 0 0"))
        self.chart = Chart(map_picture(self.state.found), "heat map: models by cards, best quant that fits")
        self.chart.figure.data[0].on_click(self.guarded(self._clicked))

    def _arranged(self) -> list[w.Widget]:
        grid = w.Layout(grid_template_columns="repeat(auto-fit, minmax(280px, 1fr))", grid_gap="0 20px", width="100%")
        pair = [self.model, self.card, *[line(self.take)] * (self._fit is not None)]
        return [w.GridBox([self.cards, self.family, self.kv, self.floor], layout=grid), self.context, self.said,
                w.GridBox(pair, layout=grid), self.chart, Keys()]

    def _clicked(self, _trace, points, _device) -> None:
        if not points.xs:
            return
        found = self.state.found
        self.state.update(model=found.models[int(points.ys[0])].name, card=found.cards[int(points.xs[0])].id)
        if self._fit is not None:
            self.state.take(self._fit)

    def _show(self, change=None) -> None:
        state = self.state
        if not state.error:
            with self.showing():
                self._show_settings()
            if change is None or change["name"] == "found":
                self.chart.present(map_picture(state.found))
        self._say(state.error)

    def _show_settings(self) -> None:
        state = self.state
        offer(self.cards, options.named(CARDS), state.cards, "a list of cards")
        offer(self.family, options.families(), state.family, "a list of models")
        offer(self.context, options.map_contexts(state.context), state.context, "")
        offer(self.kv, options.caches("llama.cpp"), state.kv, str(state.kv))
        offer(self.floor, options.floors(), state.floor, state.floor)
        models = [(model.title, model.name) for model in state.found.models]
        offer(self.model, [("none yet", options.NOTHING), *models], state.model, str(state.model))
        cards = [(card.name, card.id) for card in state.found.cards]
        offer(self.card, [("none yet", options.NOTHING), *cards], state.card, str(state.card))

    def _say(self, problem: str) -> None:
        wrong = f'<b style="border-left:4px solid {RED};padding-left:8px">{escape(problem)}</b><br>' if problem else ""
        self.said.html = wrong + "<br>".join(map(escape, filter(None, (self.state.answer, self.state.picked))))
