"""OffloadExplorer: widgets over an OffloadState and a RunState: budgets, layers in their tiers, tokens per second, a run."""

from html import escape

import ipywidgets as w

from ..offload.planned_words import binding, number, rate
from . import options
from .boxes.box import line
from .cache_state import TYPES
from .folds import Folds
from .live import Chart, Keys, Words
from .offload_boxes import AheadBox, CheckBox, ClaimBox, ExportBox, LeverBox
from .offload_figures import speed_picture, tiers_picture
from .offload_presets import PRESETS, drives, machines, sizes, slots
from .offload_run import SETTINGS, RunState, told
from .offload_state import OffloadState, shown
from .panel import Panel, blocks, described, grid, headlined, offer, put, visible
from .panel import told as told_html
from .style import BLUE, GREEN, GREY, ORANGE, RED
from .trace_figures import Timeline

_FOLDS = {"an SSD as VRAM": (ClaimBox, "what is promised, and what a drive's rate allows"),
          "levers": (LeverBox, "what would make it faster, by predicted tokens per second"),
          "predicted against measured": (CheckBox, "every placement that was run, beside what was predicted"),
          "reading ahead": (AheadBox, "what a second and a third slot are worth: measured"),
          "for other engines": (ExportBox, "the same split for llama.cpp, accelerate and vLLM")}
TOKENS = (8, 16, 24, 48, 96)
MODES = [("come to the device: exact", "exact"), ("are computed there: fast, logits deviate", "fast")]
HOW = [("as quickly as llama.cpp", "tuned"), ("by llmlab, as the file is", "gguf"), ("by llmlab, compiled", "words")]


class OffloadExplorer(Panel):
    """Pick a model, a card, RAM and a drive, drag the budgets: layers move between tiers, predicted tokens per second follow;
    run what is on this machine. `panel.state` is the same in code, `panel.run` the run.

    `OffloadExplorer(model="model.gguf", card=None, ram=None, drive=None, gpu_budget="200 MiB")`, or over an OffloadState.
    Raises LabError for settings that cannot be used.
    """

    def __init__(self, state: OffloadState | str | None = None, **settings):
        if isinstance(state, OffloadState):
            state.update(**settings)
        else:
            state = OffloadState(**settings if state is None else {"model": state, **settings})
        super().__init__(state)
        self.run = RunState(state)
        self._make()
        self.children = self._arranged()
        self.add_class("llmlab-offload")
        self._show()
        self.state.observe(self._show, ["look", "error"])
        self.run.observe(self._show_run, ["text", "rate", "tries", "ahead", "progress", "running", "error", *SETTINGS])

    # ---- making the widgets -----------------------------------------------------------------------------

    def _make(self) -> None:
        look, run, bound = self.state.look, self.run, self.bound
        self.model = bound("model", w.Dropdown, "model", "found on this computer first, then the catalogue",
                           options=options.models())
        self.quant = bound("quant", w.Dropdown, "quant", "the quantization, with the size of all weights")
        self.card = bound("card", w.Dropdown, "card", "the device; no card: this computer's processor, with a part of its RAM",
                          options=options.cards())
        self.ram = bound("ram", w.Dropdown, "RAM", "the computer's memory beside the card", options=machines())
        self.drive = bound("drive", w.Dropdown, "drive", "where the file lies", options=drives(None))
        self.kv = bound("kv", w.Dropdown, "KV cache", "the type of the KV cache", options=options.named(TYPES))
        self.slots = bound("slots", w.Dropdown, "slots", "buffers on the device that layers take turns in", options=slots())
        self.mode = bound("mode", w.Dropdown, "RAM layers", "what lies in RAM comes to the device for each token, or is "
                          "computed by the processor where it lies", options=MODES)
        self.computed = bound("way", w.Dropdown, "computed", "by whom; for compiled code weights are laid out anew: a store is "
                              "written once, and compiling takes a minute or two", options=HOW)
        self.context = self._slider("context", "context", "tokens that the KV cache has room for")
        self.device = self._slider("gpu_budget", "on device", "how much of the device may be used: weights, slots, cache, "
                                   "workspace")
        self.host = self._slider("ram_budget", "in RAM", "how much RAM may be used for layers, and what they pass through")
        self.said = Words(layout=w.Layout(width="100%", margin="8px 0 0"))
        self.tiers = Chart(tiers_picture(look), "chart: every layer as a block in its tier")
        self.speed = Chart(speed_picture(look), "chart: tokens per second against the device's budget, modelled and measured")
        self.prompt = described(w.Text, "continue", "the text that the model continues", continuous_update=False,
                                width="min(100%, 420px)")
        self.tokens = described(w.Dropdown, "tokens", "how many new ones at most", options=[(f"{n}", n) for n in TOKENS],
                                width="160px")
        for widget, setting in ((self.prompt, "prompt"), (self.tokens, "tokens")):
            widget.observe(self.guarded(lambda change, setting=setting: setattr(run, setting, change["new"])), "value")
        self.start = self.button("run", "really run it, within these budgets", run.start, button_style="primary")
        self.stop = self.button("stop", "end it after the present token", run.end)
        self.ran = Words(layout=w.Layout(width="100%", margin="4px 0 0"))
        self.timeline = Timeline(run.trace)
        self.folds = Folds(self, {title: kind for title, (kind, _) in _FOLDS.items()},
                           {title: why for title, (_, why) in _FOLDS.items()})

    def _slider(self, setting: str, description: str, tooltip: str) -> w.SelectionSlider:
        return self.bound(setting, w.SelectionSlider, description, tooltip, options=[("", 0)])

    def _arranged(self) -> list[w.Widget]:
        presets = line(*(self.button(one.label, one.why, lambda one=one: one.apply(self.state)) for one in PRESETS))
        return [presets, grid(300, self.model, self.card, self.quant, self.ram, self.kv, self.drive, self.slots,
                     self.mode, self.computed, self.context),
                self.device, self.host, self.said, self.tiers, self.speed,
                line(self.prompt, self.tokens, self.start, self.stop), self.ran, self.timeline, self.folds, Keys()]

    # ---- from the state to the reader -------------------------------------------------------------------

    def _show(self, change=None) -> None:
        """Bring everything up to date. Where there is an error the widgets keep what the reader asked for."""
        if not self.state.error:
            with self.showing():
                self._show_settings()
            if change is None or change["name"] == "look":
                self.tiers.present(tiers_picture(self.state.look))
        self._say(self.state.error)
        self._show_run()

    def _show_settings(self) -> None:
        state, plan = self.state, self.state.plan
        spec, site = plan.spec, plan.site
        model = spec.name if spec.source == "catalogue" else spec.path or state.model
        offer(self.model, options.models(), model, spec.title)
        offer(self.quant, options.quants(spec), plan.quant, plan.quant)
        offer(self.card, options.cards(), state.card, str(state.card))
        offer(self.ram, machines(), state.ram, str(state.ram))
        offer(self.drive, drives(state.drive), state.drive, site.drive.name)
        offer(self.kv, options.named(TYPES), plan.kv[0] if plan.kv[0] == plan.kv[1] else plan.kv, "K {}, V {}".format(*plan.kv))
        offer(self.slots, slots(), state.slots, f"{state.slots}")
        put(self.mode, value=state.mode)
        put(self.computed, value=state.way)
        offer(self.context, options.contexts(spec, plan.context), plan.context, "")
        for slider, found, now in ((self.device, state.look.device, site.device), (self.host, state.look.ram, site.ram)):
            offer(slider, sizes(found), shown(found, now), "")

    def _show_run(self, change=None) -> None:
        """What is run, or was."""
        run, state = self.run, self.state
        with self.showing():
            put(self.prompt, value=run.prompt)
            offer(self.tokens, [(f"{n}", n) for n in TOKENS], run.tokens, f"{run.tokens}")
        put(self.start, disabled=run.running or bool(state.hindrance))
        put(self.stop, disabled=not run.running)
        put(self.ran, html=self._ran())
        visible(self.timeline, self._mine)
        self.timeline.update()
        running = run.rate if run.running and run.planned is state.plan and run.rate else None
        self.speed.present(speed_picture(state.look, run.near(), running))
        self.folds.show()

    @property
    def _mine(self) -> bool:
        """Whether what was run last is the model that is shown."""
        planned = self.run.planned
        return planned is not None and planned.spec.path == self.state.plan.spec.path

    def _ran(self) -> str:
        run = self.run
        here = [one for one in run.tries if not one.saved]
        last = here[-1] if here and self._mine and not run.running else None
        found = headlined(escape(f"{number(last.measured)} tokens/s, measured: {last.verdict}"), (told(last),)) if last else ""
        text = f'<span style="white-space:pre-wrap">{escape(run.prompt + run.text)}</span>' if run.text and self._mine else ""
        idle = "" if run.running or last or run.error or run.progress else self.state.unable or _IDLE
        return blocks((RED, escape(run.error)), (ORANGE, escape(run.progress)), (GREEN if last and last.inside else RED, found),
                      (GREY, text or escape(idle)))

    def _say(self, problem: str) -> None:
        plan = self.state.plan
        found = plan.predict()
        headline = f"{escape(rate(found.decode))}, modelled: {escape(binding(found))}"
        more = self.state.answer, found.why, self.state.paced, *plan.warnings
        put(self.said, html=told_html(headline, more, problem, BLUE))


_IDLE = "Press run: the model itself, on this machine, within these budgets."
