"""QuantizationExplorer: widgets over a QuantizationState: a block as it lies in the file, a toy format, what rounding costs."""

from html import escape

import ipywidgets as w

from ..formats.looking import Part
from ..formats.toy import BITS, BLOCKS, SCALES
from . import options
from .folds import Folds
from .live import Chart, Keys, Words
from .panel import Panel, described, grid, offer, put, told
from .quantization_boxes import QualityBox, TwinBox
from .quantization_figures import errors_picture, values_picture
from .quantization_state import QuantizationState, error_words, size_words, stored_words
from .quantization_twin import TwinState
from .table import Rows

MOST_NUMBERS, MOST_BYTES = 40, 24        # of a field, in the table
_SCALES = {"F16": "float16, 2 bytes", "F32": "float32, 4 bytes", "E8M0": "a power of two, 1 byte"}
_FOLDS = {"run it": (TwinBox, "the model and its twin in the toy format: the same text by both, and how far they lie apart"),
          "published quality": (QualityBox, "Llama 3 8B by quant, measured by llama.cpp: size against damage")}


class QuantizationExplorer(Panel):
    """Take a block of a model file apart, round its weights to a format of your own; `panel.state` is the same in code, and
    `panel.twin` runs the model with it.

    `QuantizationExplorer("model.gguf", tensor="blk.0.attn_q.weight", bits=3)`, or over a QuantizationState; without a file the
    small model llmlab uses everywhere. Raises LabError for settings that cannot be used.
    """

    def __init__(self, state: QuantizationState | str | None = None, **settings):
        if isinstance(state, QuantizationState):
            state.update(**settings)
        else:
            state = QuantizationState(**settings if state is None else {"file": state, **settings})
        super().__init__(state)
        self.twin = TwinState(state)
        self._make()
        self.children = self._arranged()
        self.add_class("llmlab-quantization")
        self._show()
        self.state.observe(self._show, ["look", "error"])
        self.twin.observe(self._show_twin, ["prompt", "tokens", "texts", "progress", "running", "drift", "error"])

    # ---- making the widgets -----------------------------------------------------------------------------

    def _make(self) -> None:
        self.file = self.entered(described(w.Text, "open file", "the path of a GGUF, or a model of this computer; Enter opens "
                                           "it", placeholder="a path, or a name"), self._take_file)
        self.tensor = self.bound("tensor", w.Dropdown, "tensor", "a matrix of the file")
        self.row = self.bound("row", w.BoundedIntText, "row", "which row of the matrix")
        self.block = self.bound("block", w.IntSlider, "block", "which block of the row", min=0, max=1)
        self.parts = Rows(caption="the block, field by field, as its bytes lie in the file; then what they make")
        self.bits = self.bound("bits", w.SelectionSlider, "bits", "of each code", options=options.named(BITS))
        self.block_size = self.bound("block_size", w.SelectionSlider, "block size", "weights that share a scale",
                                     options=options.named(BLOCKS))
        self.minimum = self.bound("minimum", w.Checkbox, "a minimum", "levels from the block's least weight to its largest, "
                                  "instead of about zero", indent=True)
        self.scale = self.bound("scale", w.Dropdown, "scale", "how a block's scale is stored",
                                options=[(_SCALES[name], name) for name in SCALES])
        self.said = Words(layout=w.Layout(width="100%", margin="8px 0 0"))
        look = self.state.look
        self.values = Chart(values_picture(look), "chart: the block's weights as stored and rounded")
        self.errors = Chart(errors_picture(look), "chart: how many weights are how far off")
        self.folds = Folds(self, {title: kind for title, (kind, _) in _FOLDS.items()},
                           {title: why for title, (_, why) in _FOLDS.items()})

    def _arranged(self) -> list[w.Widget]:
        return [grid(300, self.file, self.tensor, self.row, self.block), self.parts, _heading("a format of your own"),
                grid(300, self.bits, self.block_size, self.scale, self.minimum), self.said, self.values, self.errors,
                self.folds, Keys()]

    # ---- from the reader to the state -------------------------------------------------------------------

    def _take_file(self, path: str) -> None:
        """Open what was typed; where it is nothing, say so and keep what there was."""
        before = self.state.file
        self.state.file = path
        if problem := self.state.error:
            self.state.file = before
            self._say(problem)

    # ---- from the state to the reader -------------------------------------------------------------------

    def _show(self, change=None) -> None:
        """Bring everything up to date. Where there is an error the widgets keep what the reader asked for."""
        state, look = self.state, self.state.look
        if not state.error:
            with self.showing():
                self._show_settings()
            if change is None or change["name"] == "look":
                self.parts.show([part_row(part) for part in look.parts])
                self.values.present(values_picture(look))
                self.errors.present(errors_picture(look))
        self._say(state.error)
        self.folds.show()

    def _show_settings(self) -> None:
        state = self.state
        rows, blocks = state.places()
        put(self.file, placeholder=state.gguf.paths[0].rpartition("/")[2])
        offer(self.tensor, [(f"{one.name} · {one.type} · {' × '.join(map(str, one.shape[::-1]))}", one.name)
                            for one in state.tensors()], state.tensor, state.tensor)
        put(self.row, max=rows - 1, value=state.row, tooltip=f"which of {rows:,} rows, from 0")
        put(self.block, max=blocks - 1, value=state.block, disabled=blocks == 1)
        put(self.bits, value=state.bits)
        put(self.block_size, value=state.block_size)
        put(self.minimum, value=state.minimum)
        put(self.scale, value=state.scale)

    def _show_twin(self, _=None) -> None:
        self.folds.show()

    def _say(self, problem: str) -> None:
        look = self.state.look
        put(self.said, html=told(escape(error_words(look)), (stored_words(look), size_words(look)), problem))


def part_row(part: Part) -> dict:
    """A field as a row of texts."""
    pieces = part.bytes.split()
    shown = " ".join(pieces[:MOST_BYTES]) + (f" … {len(pieces)} bytes" if len(pieces) > MOST_BYTES else "")
    numbers = "; ".join(_numbers(name if len(part.values) > 1 else "", values) for name, values in part.values.items())
    return {"field": part.name, "bytes": shown, "numbers": numbers, "what it says": part.what}


def _numbers(name: str, values: tuple) -> str:
    said = " ".join(f"{value:.5g}" if isinstance(value, float) else str(value) for value in values[:MOST_NUMBERS])
    more = f" … {len(values)} in all" if len(values) > MOST_NUMBERS else ""
    return f"{name}: {said}{more}" if name else said + more


def _heading(text: str) -> w.HTML:
    return w.HTML(f'<div style="font-weight:600;padding:8px 0 2px">{escape(text)}</div>')
