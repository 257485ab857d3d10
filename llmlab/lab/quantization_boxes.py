"""What the quantization panel unfolds: the model beside its twin in the toy format, and published quality."""

import ipywidgets as w

from .. import catalog
from .boxes.box import Box, line
from .live import Chart, Words
from .panel import described, put
from .quantization_figures import DAMAGES, SIZES, quality_picture
from .quantization_twin import MOST_TOKENS
from .talk import Talk


class TwinBox(Box):
    """Two columns that grow side by side, and how far they lie apart."""

    def make(self) -> list[w.Widget]:
        panel, twin = self.panel, self.panel.twin
        self.prompt = described(w.Text, "ask", "both answer it; Enter begins", placeholder="a question, or a text",
                                width="min(100%, 560px)")
        self.prompt.observe(panel.guarded(lambda change: setattr(twin, "prompt", change["new"])), "value")
        self.prompt.on_msg(panel.guarded(lambda _, content, __: twin.start() if content.get("event") == "submit" else None))
        self.tokens = described(w.BoundedIntText, "tokens", "how many new ones", min=1, max=MOST_TOKENS, width="180px")
        self.tokens.observe(panel.guarded(lambda change: setattr(twin, "tokens", change["new"])), "value")
        self.start = panel.button("run both", "the model as stored and in the toy format, the same question", twin.start,
                                  button_style="primary")
        self.stop = panel.button("stop", "end it here", twin.end)
        self.talks = Talk(), Talk()
        self.words = Words(layout=w.Layout(width="100%"))
        grid = w.Layout(grid_template_columns="repeat(auto-fit, minmax(260px, 1fr))", grid_gap="8px", width="100%")
        return [line(self.prompt, self.tokens, self.start, self.stop), w.GridBox(self.talks, layout=grid), self.words]

    def show(self) -> None:
        twin = self.panel.twin
        put(self.prompt, value=twin.prompt)
        put(self.tokens, value=twin.tokens)
        put(self.start, disabled=twin.running)
        put(self.stop, disabled=not twin.running)
        names = (f"as stored in {self.state.stored}", f"in {(twin.toy or self.state.toy).name}")
        for talk, name, text in zip(self.talks, names, twin.texts, strict=True):
            said = [name, text if text else "…" if twin.running else "not run yet"]
            finished = twin.drift is not None or not twin.running
            put(talk, turns=[said] if finished else [], coming=[] if finished else said)
        wrong = twin.error
        shown = twin.progress or (twin.answer if twin.toy and not twin.running else "")
        self.words.say(wrong or shown or f"Rounds every block matrix to {self.state.toy.name}, has both models answer "
                       "greedily, then measures how far they lie apart. The model is loaded the first time.")


class QualityBox(Box):
    """Llama 3 8B by quant, as llama.cpp's authors measured it: size along, damage up."""

    def make(self) -> list[w.Widget]:
        self.size = described(w.Dropdown, "along", "size", options=[(name, key) for key, name in SIZES.items()])
        self.damage = described(w.Dropdown, "up", "damage", options=[(name, key) for key, name in DAMAGES.items()])
        for widget in (self.size, self.damage):
            widget.observe(self.panel.guarded(lambda _: self.show()), "value")
        self.words = Words(layout=w.Layout(width="100%"))
        self.chart = Chart(quality_picture(), "chart: published quality of Llama 3 8B, damage against size")
        grid = w.Layout(grid_template_columns="repeat(auto-fit, minmax(280px, 1fr))", grid_gap="0 20px", width="100%")
        self._shown = self.size.value, self.damage.value
        return [w.GridBox([self.size, self.damage], layout=grid), self.words, self.chart]

    def show(self) -> None:
        self.words.say(quality_words())
        if self._shown != (self.size.value, self.damage.value):
            self._shown = self.size.value, self.damage.value
            self.chart.present(quality_picture(*self._shown))


def quality_words() -> str:
    """The chart in words: a step of each width."""
    rows = catalog.quality()
    steps = [rows[key] for key in (("Q8_0", False), ("Q6_K", False), ("Q5_K_M", False), ("Q4_K_M", False), ("IQ4_XS", True),
                                   ("Q3_K_M", False), ("Q3_K_S", False), ("Q2_K", False))]
    said = "; ".join(f"{row.what}{' (importance matrix)' if row.importance else ''} {row.bits:.2f} bits {row.loss:+.1%}"
                     for row in steps)
    return f"Llama 3 8B, perplexity against f16's, measured by llama.cpp on wikitext-2: {said}. Compare within this table only."
