"""What the cache panel unfolds: the numbers in a real cache, a measurement on this machine, and the quality of each type."""

import ipywidgets as w

from .. import catalog
from .boxes.box import Box, line
from .cache_costs import kv_words
from .cache_figures import channels_picture, heat_picture, measured_picture, quality_picture
from .cache_heat import SIDES
from .live import Chart, Words
from .panel import described, offer, put
from .table import Rows


class HeatBox(Box):
    """Three heat maps of one head: as given, as it comes back, the error."""

    def make(self) -> list[w.Widget]:
        panel, heat = self.panel, self.panel.heat

        def bound(setting: str, kind: type, description: str, tooltip: str, **more) -> w.Widget:
            widget = described(kind, description, tooltip, **more)
            widget.observe(panel.guarded(lambda change: setattr(heat, setting, change["new"])), "value")
            return widget

        self.text = bound("text", w.Text, "text", "what the small model reads, its first 96 tokens; Enter reads",
                          width="min(100%, 640px)")
        self.text.on_msg(panel.guarded(lambda _, content, __: heat.start() if content.get("event") == "submit" else None))
        self.start = panel.button("read", "run the small model over the text", heat.start, button_style="primary")
        self.side = bound("side", w.Dropdown, "of", "keys or values", options=[("keys", "K"), ("values", "V")])
        self.layer = bound("layer", w.IntSlider, "layer", "which layer", min=0, max=1)
        self.head = bound("head", w.IntSlider, "KV head", "which of its KV heads", min=0, max=1)
        self.rotated = bound("rotated", w.Checkbox, "rotated", "each head's numbers turned by a Hadamard matrix before they "
                             "are quantized, and back after", indent=True)
        self.outlier = panel.button("where it is worst", "the layer and head whose largest channel stands out the most",
                                    self._worst)
        self.words = Words(layout=w.Layout(width="100%"))
        self.maps = Chart(heat_picture(heat.heat, heat.tokens), "chart: keys or values, a row a cell, a column a channel")
        self.channels = Chart(channels_picture(heat.heat), "chart: root mean square of each channel, and of its error")
        grid = w.Layout(grid_template_columns="repeat(auto-fit, minmax(280px, 1fr))", grid_gap="0 20px", width="100%")
        self._shown = heat.heat
        return [line(self.text, self.start, self.outlier),
                w.GridBox([self.side, self.layer, self.head, self.rotated], layout=grid), self.words, self.maps, self.channels]

    def _worst(self) -> None:
        heat = self.panel.heat
        layer, head = heat.extreme()
        heat.update(layer=layer, head=head)

    def show(self) -> None:
        heat = self.panel.heat
        layers, heads = heat.shape
        put(self.text, value=heat.text)
        put(self.start, disabled=heat.running)
        put(self.outlier, disabled=heat.running or not layers)
        if heat.side in SIDES:
            put(self.side, value=heat.side)
        for slider, most, value in ((self.layer, layers, heat.layer), (self.head, heads, heat.head)):
            put(slider, max=max(most - 1, 1), disabled=not most)
            if isinstance(value, int) and 0 <= value <= slider.max:
                put(slider, value=value)
        put(self.rotated, value=bool(heat.rotated))
        self.words.say(heat.error or heat.progress or (heat.answer if heat.heat else _UNREAD))
        if heat.heat is not self._shown:
            self._shown = heat.heat
            self.maps.present(heat_picture(heat.heat, heat.tokens))
            self.channels.present(channels_picture(heat.heat))


class MeasureBox(Box):
    """The small model on this machine: milliseconds a token against context, and bytes beside the predicted."""

    def make(self) -> list[w.Widget]:
        panel, measure = self.panel, self.panel.measure

        def choice(setting: str, description: str, tooltip: str, offered: dict) -> w.Dropdown:
            widget = described(w.Dropdown, description, tooltip, options=list(offered), width="260px")
            widget.observe(panel.guarded(lambda change: change["new"] in offered and setattr(
                measure, setting, offered[change["new"]])), "value")
            return widget

        self.types = choice("types", "caches", "cache types that take turns", _TYPES)
        self.contexts = choice("contexts", "contexts", "tokens that lie behind the timed ones", _CONTEXTS)
        self.start = panel.button("measure", "run the small model on this machine", measure.start, button_style="primary")
        self.stop = panel.button("stop", "end it after the present step", measure.end)
        self.words = Words(layout=w.Layout(width="100%"))
        self.rows = Rows(caption="")
        self.chart = Chart(measured_picture(measure), "chart: milliseconds a token against context, measured")
        return [line(self.types, self.contexts, self.start, self.stop), self.words, self.chart, self.rows]

    def show(self) -> None:
        measure = self.panel.measure
        for widget, offered, value in ((self.types, _TYPES, measure.types), (self.contexts, _CONTEXTS, measure.contexts)):
            name = next((name for name, known in offered.items() if known == tuple(value)), "as set in code")
            offer(widget, [(one, one) for one in offered], name, name)
        put(self.start, disabled=measure.running)
        put(self.stop, disabled=not measure.running)
        found = f"{measure.answer} {measure.allowed}" if measure.points else _UNMEASURED
        self.words.say(measure.error or measure.progress or found)
        self.chart.present(measured_picture(measure))
        put(self.rows, caption="bytes of the cache and a token's time, measured beside predicted" if measure.points else "")
        self.rows.show(list(measure.table))


class QualityBox(Box):
    """Divergence by cache type: Llama 3 8B as published, SmolLM2 as measured by llmlab."""

    def make(self) -> list[w.Widget]:
        self.words = Words(layout=w.Layout(width="100%"))
        self.chart = Chart(quality_picture(), "chart: divergence against bits a number of the cache")
        return [self.words, self.chart]

    def show(self) -> None:
        self.words.say(quality_words())


def quality_words() -> str:
    """The chart in words."""
    rows = catalog.kv_quality()
    ours, rotated = (catalog.measured_kv_quality(rotate=turned) for turned in (False, True))
    said = (f"Llama 3 8B, mean KL divergence by cache type of K and V, as llama.cpp's authors published it (before llama.cpp "
            f"rotated quantized caches): {_said(rows)}.")
    if ours:
        said += f" SmolLM2 135M, measured by llmlab: {_said(ours)}"
        said += f"; rotated {_said(rotated)}." if rotated else "."
    return f"{said} Compare within one table only."


def _said(rows: dict[tuple[str, str], catalog.Quality]) -> str:
    return "; ".join(f"{kv_words(pair)} {rows[pair].mean_kld:.2g}" for pair in _SAID if pair in rows)


_SAID = (("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0"))
_UNREAD = ("No text was read yet: press read. SmolLM2 135M reads the text; keys and values of every layer are then here to be "
           "looked at, and quantized in the types chosen above.")
_UNMEASURED = ("Nothing was measured yet: press measure. SmolLM2 135M is run by llmlab's lean decoder with each cache type at "
               "each context: what its cache holds, and how long a token takes with all of it behind (as noise, which takes as "
               "long to look at as a text).")
_TYPES = {", ".join(types): types for types in (("f16", "q8_0", "q4_0"), ("f16", "q8_0"), ("q8_0", "q5_1", "q5_0"),
                                                ("q4_0", "q4_1", "iq4_nl"))}
_CONTEXTS = {f"{first:,} to {last:,}": (first, *more, last) for first, *more, last in (
    (256, 512, 1024), (256, 1024, 4096), (512, 2048, 4096, 8192))}
