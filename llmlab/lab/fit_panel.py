"""FitExplorer: widgets over a FitState. They show what the state says and pass on what the reader does; they compute
nothing."""

import logging
from collections.abc import Callable
from html import escape

import ipywidgets as w

from ..errors import LabError
from . import options
from .figures import fit_picture
from .live import Chart, Keys, Words
from .presets import PRESETS
from .state import MOST_CARDS, THIS_MACHINE, FitState
from .style import RED, VERDICTS

_STYLE = {"description_width": "76px"}
_FILL = {"width": "100%", "min_width": "0", "margin": "2px 0"}


class FitExplorer(w.VBox):
    """Pick a model and a card, move sliders, see memory fill up; `panel.state` is the same in code.

    `FitExplorer(model="qwen2.5-7b", card="rtx-4090-24gb")`, or over a FitState that exists already. Raises LabError for
    settings that cannot be used.
    """

    def __init__(self, state: FitState | None = None, **settings):
        self.state = FitState(**settings) if state is None else state
        if state is not None:
            state.update(**settings)
        self._models, self._cards = options.models(), options.cards()
        self._showing, self._shown = False, (None, None)
        self._make()
        super().__init__(children=self._arranged(), layout=w.Layout(width="100%"))
        self.add_class("llmlab-panel").add_class("llmlab-fit")
        self._show()
        self.state.observe(self._show, ["report", "error"])

    @property
    def answer(self) -> str:
        """What the panel says in words: the state's answer, or what is wrong."""
        return self.state.error or self.state.answer

    def __repr__(self) -> str:
        return f"<{self.answer}>"

    # ---- making the widgets -----------------------------------------------------------------------------

    def _make(self) -> None:
        self.find_model = self._search("model", self._models, "part of a name, or a path",
                                       "words of a name; Enter takes the first match, or opens a file or hub name")
        self.model = self._bound("model", w.Dropdown, "model", "found on this computer first, then the catalogue",
                                 options=self._models)
        self.quant = self._bound("quant", w.Dropdown, "quant", "the quantization, with the size of all weights")
        self.kv = self._bound("kv", w.Dropdown, "KV cache", "the type of the KV cache", options=options.CACHES)
        self.context = self._bound("context", w.SelectionSlider, "context", options=[("", 0)],
                                   tooltip="tokens of context, up to twice what the model was trained for")
        self.find_card = self._search("card", self._cards, "part of a name", "words of a name; Enter takes the first match")
        self.card = self._bound("card", w.Dropdown, "card", "a graphics card, or this machine with what is free on it now",
                                options=self._cards)
        self.cards = self._bound("cards", w.BoundedIntText, "how many", "how many of this card", min=1, max=MOST_CARDS)
        self.sequences = self._bound("sequences", w.BoundedIntText, "requests", "requests at once: they share the context",
                                     min=1, max=256)
        self.gpu_layers = self._bound("gpu_layers", w.IntSlider, "layers",
                                      "layers on the card, the output counted as one", min=0, max=1)
        self.auto = w.ToggleButton(description="auto", tooltip="as many layers on the card as fit for certain",
                                   layout=w.Layout(width="60px", flex="0 0 auto"))
        self.auto.observe(self._guarded(self._toggled), "value")
        self.n_cpu_moe = self._bound("n_cpu_moe", w.IntSlider, "experts", "blocks whose experts stay in RAM", min=0, max=1)
        self.said = Words(layout=w.Layout(width="100%", margin="8px 0 0"))
        self.chart = Chart(fit_picture(self.state.report), "chart: memory on each device, stacked by what it is for")

    def _bound(self, setting: str, kind: type, description: str, tooltip: str, **more) -> w.Widget:
        """A widget whose value is passed on to a trait of the state."""
        widget = kind(description=description, tooltip=tooltip, style=dict(_STYLE), layout=w.Layout(**_FILL), **more)
        widget.observe(self._guarded(lambda change: setattr(self.state, setting, change["new"])), "value")
        return widget

    def _search(self, setting: str, offered: options.Options, placeholder: str, tooltip: str) -> w.Text:
        """A text that narrows the dropdown below it as one types; Enter takes what was meant."""
        text = w.Text(description=f"find {setting}", placeholder=placeholder, tooltip=tooltip, style=dict(_STYLE),
                      layout=w.Layout(**_FILL))
        text.observe(self._guarded(self._show_settings), "value")

        def enter(_widget, content, _buffers):
            if content.get("event") == "submit" and text.value.strip():
                found = options.matching(offered, text.value)
                self._take(setting, found[0][1] if found else text.value.strip())
                text.value = ""

        text.on_msg(self._guarded(enter))
        return text

    def _preset(self, preset) -> w.Button:
        button = w.Button(description=preset.label, tooltip=preset.why, layout=w.Layout(width="auto"))
        button.on_click(self._guarded(lambda _: preset.apply(self.state)))
        return button

    def _arranged(self) -> list[w.Widget]:
        line = w.Layout(width="100%", align_items="center")
        narrow = w.Layout(min_width="0", width="100%")
        left = w.VBox([self.find_model, self.model, self.quant, self.kv], layout=narrow)
        right = w.VBox([self.find_card, self.card, w.HBox([self.cards, self.sequences], layout=line),
                        w.HBox([self.gpu_layers, self.auto], layout=line)], layout=narrow)
        grid = w.GridBox([left, right], layout=w.Layout(grid_template_columns="repeat(auto-fit, minmax(330px, 1fr))",
                                                        grid_gap="0 20px", width="100%"))
        presets = w.HBox([self._preset(p) for p in PRESETS], layout=w.Layout(flex_flow="row wrap", width="100%"))
        return [presets, grid, self.context, self.n_cpu_moe, self.said, self.chart, Keys()]

    # ---- from the reader to the state -------------------------------------------------------------------

    def _guarded(self, callback: Callable) -> Callable:
        """Errors in callbacks vanish in JupyterLab: all of them are caught here and shown. While the panel is showing
        what the state says, widgets have nothing to pass on."""
        def run(*args):
            if self._showing:
                return
            try:
                callback(*args)
            except LabError as error:
                self._say(str(error))
            except Exception as error:
                logging.getLogger(__name__).exception("in a callback of the fit panel")
                self._say(f"Something is wrong in llmlab itself: {type(error).__name__}: {error}")
        return run

    def _take(self, setting: str, value: str) -> None:
        """Set what was typed; where it is nothing, say so and keep what there was, which is what the lists show."""
        before = getattr(self.state, setting)
        setattr(self.state, setting, value)
        if problem := self.state.error:
            setattr(self.state, setting, before)
            self._say(problem)

    def _toggled(self, change) -> None:
        self.state.gpu_layers = "auto" if change["new"] else self.state.report.gpu_layers

    # ---- from the state to the reader -------------------------------------------------------------------

    def _show(self, _=None) -> None:
        """Bring everything up to date. Where there is an error the widgets keep what the reader asked for."""
        now = self.state.report, self.state.error
        if now == self._shown:               # report and error changed together: one of two notifications
            return
        self._shown = now
        if not self.state.error:
            self._show_settings()
            self.chart.present(fit_picture(self.state.report))
        self._say(self.state.error)

    def _show_settings(self, _=None) -> None:
        report, state = self.state.report, self.state
        spec, now = report.spec, report.settings
        self._showing = True
        try:
            model = spec.name if spec.source == "catalogue" else spec.path or state.model
            _offer(self.model, options.matching(self._models, self.find_model.value), model, spec.title)
            _offer(self.quant, options.quants(spec), now.quant, now.quant)
            key, value = now.kv
            _offer(self.kv, options.CACHES, key if key == value else now.kv, f"K {key}, V {value}")
            _offer(self.context, options.contexts(spec, now.context), now.context, "")
            one = isinstance(state.card, str) and state.card != THIS_MACHINE
            card = report.cards[0].id if one else state.card
            several = " and ".join(c.name for c in report.cards)
            _offer(self.card, options.matching(self._cards, self.find_card.value), card, several)
            _put(self.cards, value=len(report.cards) if one else 1, disabled=not one)
            _put(self.sequences, value=now.sequences)
            _put(self.gpu_layers, max=report.layers, value=report.gpu_layers, disabled=not report.cards)
            _put(self.auto, value=now.gpu_layers == "auto", disabled=not report.cards)
            _put(self.n_cpu_moe, max=len(spec.layers), value=min(now.n_cpu_moe, len(spec.layers)))
            _put(self.n_cpu_moe.layout, display=None if spec.experts and report.cards else "none")
        finally:
            self._showing = False

    def _say(self, problem: str) -> None:
        state = self.state
        mark, colour = VERDICTS[state.report.verdict]
        lines = [f'<div style="{_HEADLINE}"><span aria-hidden="true">{mark}</span> {escape(state.answer)}</div>',
                 *(f"<div>{escape(line)}</div>" for line in (state.hint, state.trust, state.speed) if line)]
        wrong = f"<b>{escape(problem)}</b><br>Below is the last answer that could be given." if problem else ""
        self.said.html = "".join(f'<div style="{_BLOCK}border-color:{edge}">{text}</div>' for edge, text in (
            (RED, wrong), (colour, "".join(lines))) if text)


_HEADLINE = "font-size:1.15em;font-weight:600"
_BLOCK = "line-height:1.45;padding:2px 0 2px 10px;margin:2px 0;border-left:4px solid;white-space:normal;"


def _put(widget, **values) -> None:
    for name, value in values.items():       # in the order given: a slider's range before its value
        if getattr(widget, name) != value:
            setattr(widget, name, value)


def _offer(widget, offered, value, label: str) -> None:
    """Let `widget` offer these, and `value` too, and choose it."""
    if all(value != known for _, known in offered):
        offered = [(label, value), *offered]
    if tuple(widget.options) != tuple(offered):
        # A page clamps a slider to the range it has and sends that back as if the reader had moved it; so the place comes
        # into the old range first, then the range changes, then the place: three messages, never an index out of range.
        widget.index = 0 if widget.options else None
        widget.options = offered
    if widget.value != value:
        widget.value = value
