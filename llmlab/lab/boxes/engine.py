"""The engine and the settings only some engines have; what does not apply is hidden."""

import ipywidgets as w

from .. import options
from ..engines import CONTROLS, ENGINES
from ..panel import described, offer, put, visible
from .box import Box, line

_SWITCHES = {
    "flash_attention": ("flash attention", "no matrix of scores is held; a quantized V cache needs it"),
    "importance": ("importance matrix", "quantize with an importance matrix: some tensors get other types"),
    "swa_full": ("full sliding-window cache", "sliding layers keep the whole context, so that a prompt's prefix can be reused"),
    "mtp": ("multi-token prediction", "load the model's own blocks that predict several tokens, to draft with"),
    "unified": ("one cache for all", "conversations share one pool of cells instead of having equal parts"),
}
_DESKTOPS = [("not known", options.NOTHING), ("none", False), ("Linux", "linux"), ("Windows", "windows")]
_SIZES = [(f"{n:,}", n) for n in (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)]


class EngineBox(Box):
    """Engine, batch and ubatch, switches, a split over cards, RAM."""

    def make(self) -> list[w.Widget]:
        bound = self.panel.bound
        self.engine = bound("engine", w.Dropdown, "engine", "the program that runs the model", options=ENGINES)
        self.batch = bound("batch", w.Dropdown, "batch", "most tokens of a prompt that are handed over at once", options=_SIZES)
        self.ubatch = bound("ubatch", w.Dropdown, "ubatch", "tokens that are computed at once: the working buffer grows "
                            "with them", options=_SIZES)
        self.utilization = bound("utilization", w.Dropdown, "share", "the share of the card's memory that vLLM takes for "
                                 "itself, whatever the model needs")
        self.display = bound("display", w.Dropdown, "desktop", "whether the card also shows a desktop, which takes memory",
                             options=_DESKTOPS)
        self.draft = bound("draft", w.Dropdown, "draft", "a smaller model with the same words, to draft with (speculative "
                           "decoding); it lies in memory too")
        self.switches = {name: bound(name, w.Checkbox, label, why, indent=False, width="auto")
                         for name, (label, why) in _SWITCHES.items()}
        self.split = self._typed("split", "split", "one share a card, like 3,1; empty: by free memory")
        self.host = self._typed("host", "RAM", "RAM for the model, like 32 GiB; empty: this computer's, or without a limit")
        self.projector = self._typed("projector", "projector", "for pictures: an mmproj file, or its size like 850 MiB")
        fields = [self.engine, self.batch, self.ubatch, self.utilization, self.display, self.split, self.host, self.draft,
                  self.projector]
        return [w.GridBox(fields, layout=w.Layout(grid_template_columns="repeat(auto-fill, minmax(240px, 1fr))",
                                                  grid_gap="0 20px", width="100%")), line(*self.switches.values())]

    def _typed(self, setting: str, description: str, why: str) -> w.Text:
        text = described(w.Text, description, why, continuous_update=False)
        text.observe(self.panel.guarded(lambda change: self.state.update(**{setting: change["new"].strip() or None})), "value")
        return text

    def show(self) -> None:
        report, now, state = self.state.report, self.state.report.settings, self.state
        put(self.engine, value=now.engine)
        for widget, value in ((self.batch, now.batch), (self.ubatch, now.ubatch)):
            offer(widget, _SIZES, value, f"{value:,}")
        offer(self.display, _DESKTOPS, now.display, "")
        offer(self.draft, options.drafts(report.spec), state.draft, str(now.draft and now.draft.title))
        for name, box in self.switches.items():
            put(box, value=getattr(now, name))
        offer(self.utilization, options.utilizations(), now.utilization, f"{now.utilization}")
        put(self.split, value=options.shares(now.split))
        put(self.host, value=options.memory(state.host))
        put(self.projector, value=options.memory(state.projector))
        can = CONTROLS[now.engine] - ({"split"} if len(report.cards) < 2 else set()) - (
            set() if any(layer.mtp for layer in report.spec.layers) else {"mtp"})
        for name, widget in {"batch": self.batch, "ubatch": self.ubatch, "utilization": self.utilization, "split": self.split,
                             "draft": self.draft, "projector": self.projector, **self.switches}.items():
            visible(widget, name in can)
        visible(self.display, bool(report.cards))
