"""FitExplorer: widgets over a FitState. They show what the state says and pass on what the reader does; they compute
nothing."""

import os
from html import escape
from pathlib import Path

import ipywidgets as w

from . import options, saving
from .boxes import CommandBox, CompareBox, EngineBox, LeverBox, ShareBox
from .engines import CONTROLS
from .figures import fit_picture
from .folds import Folds
from .live import Chart, Keys, Words
from .panel import Panel, described, grid, offer, put, told, visible
from .presets import PRESETS
from .state import MOST_CARDS, THIS_MACHINE, FitState
from .style import VERDICTS

_FOLDS = {  # title: (what it holds, what for)
    "engine settings": (EngineBox, "the engine, its batch sizes, flash attention, RAM"),
    "levers": (LeverBox, "what one step of each setting frees and costs; those that make it fit first"),
    "compare": (CompareBox, "keep this configuration as A, and see the next one beside it"),
    "command": (CommandBox, "the command that runs exactly this, for llama.cpp, Ollama, vLLM, transformers, LM Studio"),
    "share and save": (ShareBox, "this configuration as a string to paste; the chart as a file"),
}


class FitExplorer(Panel):
    """Pick a model and a card, move sliders, see memory fill up; `panel.state` is the same in code.

    `FitExplorer(model="qwen2.5-7b", card="rtx-4090-24gb")`, over a FitState that exists already, or from a shared string,
    `FitExplorer("llmlab:llama-3-8b@rtx-3060-12gb?context=16384")`. Raises LabError for settings that cannot be used.
    """

    def __init__(self, state: FitState | str | None = None, **settings):
        if isinstance(state, str):
            state = FitState.from_shared(state)
        if state is None:
            state = FitState(**settings)
        else:
            state.update(**settings)
        super().__init__(state)
        self._models, self._cards, self._shown = options.models(), options.cards(), ()
        self._make()
        self.children = self._arranged()
        self.add_class("llmlab-fit")
        self._show()
        self.state.observe(self._show, ["report", "error", "kept"])

    def export(self, path: str | os.PathLike, overwrite: bool = False) -> Path:
        """The chart and its words as one HTML file that needs no network. Raises LabError where it cannot be written, or
        is there already."""
        state = self.state
        words = [state.answer, state.hint, state.trust, state.speed, state.difference]
        return saving.save_page(path, fit_picture(state.report, self._kept), words, overwrite)

    @property
    def _kept(self):
        return self.state.kept.report if self.state.kept else None

    # ---- making the widgets -----------------------------------------------------------------------------

    def _make(self) -> None:
        self.find_model = self._search("model", self._models, "part of a name, or a path",
                                       "words of a name; Enter takes the first match, or opens a file or hub name")
        self.model = self.bound("model", w.Dropdown, "model", "found on this computer first, then the catalogue",
                                options=self._models)
        self.quant = self.bound("quant", w.Dropdown, "quant", "the quantization, with the size of all weights")
        self.best = self.button("best", "the most faithful quant with which all of it fits for certain",
                                lambda: self.state.update(quant=self.state.best))
        self.kv = self.bound("kv", w.Dropdown, "KV cache", "the type of the KV cache")
        self.context = self.bound("context", w.SelectionSlider, "context", options=[("", 0)],
                                  tooltip="tokens of context, up to twice what the model was trained for")
        self.longest = self.button("longest", "the longest context with which all of it fits for certain, as far as the "
                                   "model was trained", lambda: self.state.update(context=self.state.longest))
        self.find_card = self._search("card", self._cards, "part of a name", "words of a name; Enter takes the first match")
        self.card = self.bound("card", w.Dropdown, "card", "a graphics card, or this machine with what is free on it now",
                               options=self._cards)
        self.cards = self.bound("cards", w.BoundedIntText, "how many", "how many of this card", min=1, max=MOST_CARDS)
        self.sequences = self.bound("sequences", w.BoundedIntText, "at once",
                                    "conversations answered at the same time; they share the context", min=1, max=256)
        self.gpu_layers = self.bound("gpu_layers", w.IntSlider, "GPU layers", "layers on the card", min=0, max=1)
        self.auto = self._automatic("gpu_layers", "as many layers on the card as fit for certain")
        self.n_cpu_moe = self.bound("n_cpu_moe", w.IntSlider, "experts", "blocks whose experts stay in RAM", min=0, max=1)
        self.auto_moe = self._automatic("n_cpu_moe", "as few blocks' experts in RAM as let the rest fit the card")
        self.said = Words(layout=w.Layout(width="100%", margin="8px 0 0"))
        self.chart = Chart(fit_picture(self.state.report), "chart: memory on each device, stacked by what it is for")
        self.folds = Folds(self, {title: kind for title, (kind, _) in _FOLDS.items()},
                           {title: why for title, (_, why) in _FOLDS.items()})

    def _automatic(self, setting: str, tooltip: str) -> w.ToggleButton:
        """Beside a slider: leave the number to llmlab, or take over what it found."""
        toggle = w.ToggleButton(description="auto", tooltip=tooltip, layout=w.Layout(width="60px", flex="0 0 auto"))
        toggle.observe(self.guarded(lambda change: setattr(
            self.state, setting, "auto" if change["new"] else getattr(self.state.report, setting))), "value")
        return toggle

    def _search(self, setting: str, offered: options.Options, placeholder: str, tooltip: str) -> w.Text:
        """A text that narrows the dropdown below it as one types; Enter takes what was meant."""
        text = described(w.Text, f"find {setting}", tooltip, placeholder=placeholder)
        text.observe(self.guarded(self._show_settings), "value")

        def meant(words: str) -> None:
            found = options.matching(offered, words)
            self._take(setting, found[0][1] if found else words)

        return self.entered(text, meant)

    def _arranged(self) -> list[w.Widget]:
        def line(*side_by_side: w.Widget) -> w.HBox:
            return w.HBox(side_by_side, layout=w.Layout(width="100%", align_items="center"))

        def column(*below: w.Widget) -> w.VBox:
            return w.VBox(below, layout=w.Layout(min_width="0", width="100%"))

        self._layers, self._experts = line(self.gpu_layers, self.auto), line(self.n_cpu_moe, self.auto_moe)
        left = column(self.find_model, self.model, line(self.quant, self.best), self.kv)
        right = column(self.find_card, self.card, line(self.cards, self.sequences), self._layers)
        presets = w.HBox([self.button(p.label, p.why, lambda p=p: p.apply(self.state)) for p in PRESETS],
                         layout=w.Layout(flex_flow="row wrap", width="100%"))
        return [presets, grid(330, left, right), line(self.context, self.longest), self._experts, self.said, self.chart,
                self.folds, Keys()]

    # ---- from the reader to the state -------------------------------------------------------------------

    def _take(self, setting: str, value: str) -> None:
        """Set what was typed; where it is nothing, say so and keep what there was, which is what the lists show."""
        before = getattr(self.state, setting)
        setattr(self.state, setting, value)
        if problem := self.state.error:
            setattr(self.state, setting, before)
            self._say(problem)

    # ---- from the state to the reader -------------------------------------------------------------------

    def _show(self, _=None) -> None:
        """Bring everything up to date. Where there is an error the widgets keep what the reader asked for."""
        now = self.state.report, self.state.error, self.state.kept
        if now == self._shown:               # report and error changed together: one of two notifications
            return
        self._shown = now
        if not self.state.error:
            self._show_settings()
            self.chart.present(fit_picture(self.state.report, self._kept))
        self._say(self.state.error)
        self.folds.show()

    def _show_settings(self, _=None) -> None:
        report, state = self.state.report, self.state
        spec, now = report.spec, report.settings
        with self.showing():
            model = spec.name if spec.source == "catalogue" else spec.path or state.model
            offer(self.model, options.matching(self._models, self.find_model.value), model, spec.title)
            offer(self.quant, options.quants(spec, now.engine), now.quant, now.quant)
            put(self.best, description=f"best: {state.best}" if state.best else "none fits",
                disabled=state.best in ("", now.quant))
            key, value = now.kv
            offer(self.kv, options.caches(now.engine), key if key == value else now.kv, f"K {key}, V {value}")
            offer(self.context, options.contexts(spec, now.context), now.context, "")
            put(self.longest, description=f"longest: {state.longest:,}" if state.longest else "none fits",
                disabled=state.longest in (0, now.context))
            one = isinstance(state.card, str) and state.card != THIS_MACHINE
            card = report.cards[0].id if one else state.card
            several = " and ".join(c.name for c in report.cards)
            offer(self.card, options.matching(self._cards, self.find_card.value), card, several)
            put(self.cards, value=len(report.cards) if one else 1, disabled=not one)
            put(self.sequences, value=now.sequences)
            can = CONTROLS[now.engine]
            visible(self._layers, "gpu_layers" in can)
            put(self.gpu_layers, max=report.layers, value=report.gpu_layers, disabled=not report.cards,
                tooltip=f"how many of the {report.layers} layers ({len(spec.layers)} blocks, and the output as one more) "
                        "lie on the card; the others stay in RAM")
            put(self.auto, value=now.gpu_layers == "auto", disabled=not report.cards)
            put(self.n_cpu_moe, max=len(spec.layers), value=min(report.n_cpu_moe, len(spec.layers)))
            put(self.auto_moe, value=now.n_cpu_moe == "auto")
            visible(self._experts, bool(spec.experts and report.cards and "n_cpu_moe" in can))

    def _say(self, problem: str) -> None:
        state = self.state
        mark, colour = VERDICTS[state.report.verdict]
        headline = f'<span aria-hidden="true">{mark}</span> {escape(state.answer)}'
        self.said.html = told(headline, (state.hint, state.trust, state.speed), problem, colour)
