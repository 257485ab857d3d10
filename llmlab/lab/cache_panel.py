"""CacheExplorer: widgets over a CacheState: what a token costs, memory and speed against context, the numbers themselves."""

from html import escape

import ipywidgets as w

from . import options
from .boxes.box import line
from .cache_boxes import HeatBox, MeasureBox, QualityBox
from .cache_costs import ARCHITECTURES
from .cache_figures import memory_picture, speed_picture, tokens_picture
from .cache_heat import PLACE, HeatState
from .cache_measuring import SETTINGS, MeasureState
from .cache_state import TYPES, CacheState, cost_words, longest_words, speed_words, whole_words
from .folds import Folds
from .live import Chart, Keys, Words
from .panel import Panel, grid, offer, put, told
from .table import Rows

KEPT = (0, 16, 32, 64, 128, 256, 512, 1024)
SINKS = (0, 1, 4, 16, 64)
_FOLDS = {"inside the cache": (HeatBox, "keys and values of a real text, as they are and as a quantized cache gives them back"),
          "measure": (MeasureBox, "the small model on this machine: bytes and speed beside what was predicted"),
          "quality": (QualityBox, "what each cache type costs in divergence, measured")}


class CacheExplorer(Panel):
    """Pick a model, a context and cache types; see what a token costs, what fits, how fast it goes, and what is lost;
    `panel.state` is the same in code, `panel.heat` the numbers of a real cache, `panel.measure` a measurement.

    `CacheExplorer(model="gemma-3-12b", context=65536, kv="q8_0")`, or over a CacheState. Raises LabError for settings that
    cannot be used.
    """

    def __init__(self, state: CacheState | str | None = None, **settings):
        if isinstance(state, CacheState):
            state.update(**settings)
        else:
            state = CacheState(**settings if state is None else {"model": state, **settings})
        super().__init__(state)
        self.heat, self.measure = HeatState(state), MeasureState()
        self._make()
        self.children = self._arranged()
        self.add_class("llmlab-cache")
        self._show()
        self.state.observe(self._show, ["look", "error"])
        self.heat.observe(self._show_folds, ["heat", "progress", "running", "error", *PLACE])
        self.measure.observe(self._show_folds, ["points", "progress", "running", "error", *SETTINGS])

    # ---- making the widgets -----------------------------------------------------------------------------

    def _make(self) -> None:
        look = self.state.look
        self.model = self.bound("model", w.Dropdown, "model", "found on this computer first, then the catalogue",
                                options=options.models())
        self.card = self.bound("card", w.Dropdown, "card", "what it has to fit beside the weights", options=options.cards())
        self.quant = self.bound("quant", w.Dropdown, "weights", "the quant of the weights, with the size of all of them")
        self.k = self.bound("k", w.Dropdown, "K in", "the cache type of the keys", options=options.named(TYPES))
        self.v = self.bound("v", w.Dropdown, "V in", "the cache type of the values", options=options.named(TYPES))
        self.recent = self.bound("recent", w.Dropdown, "recent", "the last tokens kept in 16 bits beside the packed ones",
                                 options=[(f"{n:,}", n) for n in KEPT])
        self.sinks = self.bound("sinks", w.Dropdown, "sinks", "the first tokens kept in 16 bits: many heads look at them",
                                options=[(f"{n:,}", n) for n in SINKS])
        self.context = self.bound("context", w.SelectionSlider, "context", options=[("", 0)],
                                  tooltip="tokens of context, up to twice what the model was trained for")
        self.longest = self.button("longest", "the longest context with which all of it fits for certain, as far as the model "
                                   "was trained", lambda: self.state.update(context=self.state.look.longest))
        self.said = Words(layout=w.Layout(width="100%", margin="8px 0 0"))
        self.tokens = Chart(tokens_picture(look), "chart: bytes a token by architecture")
        self.rows = Rows(caption="the same context and types in each architecture: exact")
        self.memory = Chart(memory_picture(look), "chart: cache in GiB against context")
        self.speed = Chart(speed_picture(look), "chart: tokens per second against context, modelled")
        self.folds = Folds(self, {title: kind for title, (kind, _) in _FOLDS.items()},
                           {title: why for title, (_, why) in _FOLDS.items()})

    def _arranged(self) -> list[w.Widget]:
        presets = line(*(self.button(name, f"{model}, with its own weights", lambda model=model: self.state.update(model=model))
                         for name, model in ARCHITECTURES.items()))
        near = w.HBox([self.recent, self.sinks], layout=w.Layout(width="100%"))
        context = w.HBox([self.context, self.longest], layout=w.Layout(width="100%", align_items="center"))
        return [presets, grid(300, self.model, self.quant, self.card, self.k, self.v, near), context, self.said,
                self.tokens, self.rows, grid(420, self.memory, self.speed), self.folds, Keys()]

    # ---- from the state to the reader -------------------------------------------------------------------

    def _show(self, change=None) -> None:
        """Bring everything up to date. Where there is an error the widgets keep what the reader asked for."""
        state, look = self.state, self.state.look
        if not state.error:
            with self.showing():
                self._show_settings()
            if change is None or change["name"] == "look":
                self.tokens.present(tokens_picture(look))
                self.memory.present(memory_picture(look))
                self.speed.present(speed_picture(look))
                self.rows.show(list(state.table))
        self._say(state.error)
        self.folds.show()

    def _show_settings(self) -> None:
        state, look = self.state, self.state.look
        spec, now = look.spec, look.report.settings
        model = spec.name if spec.source == "catalogue" else spec.path or state.model
        offer(self.model, options.models(), model, spec.title)
        offer(self.quant, options.quants(spec), now.quant, now.quant)
        offer(self.card, options.cards(), state.card, str(state.card))
        one_row = look.cost.layers["latent"] > 0
        put(self.k, value=state.k)
        put(self.v, value=state.v, disabled=one_row)
        offer(self.recent, [(f"{n:,}", n) for n in KEPT], state.recent, f"{state.recent:,}")
        offer(self.sinks, [(f"{n:,}", n) for n in SINKS], state.sinks, f"{state.sinks:,}")
        offer(self.context, options.contexts(spec, look.cost.context), look.cost.context, "")
        longest = look.longest
        put(self.longest, description=f"longest: {longest:,}" if longest else "none fits",
            disabled=longest in (0, look.cost.context))

    def _show_folds(self, _=None) -> None:
        self.folds.show()

    def _say(self, problem: str) -> None:
        look = self.state.look
        more = cost_words(look), longest_words(look), speed_words(look)
        put(self.said, html=told(escape(whole_words(look)), more, problem))
