"""QuantizationState: which block of which tensor is looked at, and the toy format its weights are rounded to."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import traitlets as t

from ..errors import LabError
from ..formats import FORMATS, Format, dequantize
from ..formats.looking import Part, take_apart
from ..formats.toy import Toy
from ..gguf import GGUFFile, TensorInfo, read_gguf
from ..memory import Size
from ..quality.weights import WeightError, weight_error
from ..retyping import as_stored, is_block_matrix, retyped
from ..runtime import GGUFSource
from ..shapes import ModelSpec, model_spec
from ..sources import fetch, find_local
from ..units import format_bytes
from .settable import settable

SMALL_MODEL = "smollm2-135m"
MOST = 1 << 20           # weights that an error is taken over: more would not be redrawn at once
PLAIN = 32               # weights shown of a tensor without blocks
PLACE = ("file", "tensor", "row", "block")
TOY = {"bits": "bits", "block_size": "block", "minimum": "minimum", "scale": "scale"}      # setting: field of a Toy
DEFAULTS = {"file": None, "tensor": None, "row": 0, "block": 0, "bits": 4, "block_size": 32, "minimum": False, "scale": "F16"}


@dataclass(frozen=True, eq=False)
class Look:
    """One block as it lies in the file, its weights before and after rounding, and the error over its tensor.

    `original`, `rounded` float32 [n]: weights `start` to `start + n` of the row, those of the stored block. `levels`: what the
    toy format could have said instead, [(first weight, past the last, float32 levels)] of its blocks there. `of`: what share of
    the tensor's weights `error` is taken over. `size`, `stored_size`: the whole file with its block matrices in the toy format,
    and as it is.
    """

    tensor: TensorInfo
    format: Format
    toy: Toy
    start: int
    parts: list[Part] = field(repr=False)
    original: np.ndarray = field(repr=False)
    rounded: np.ndarray = field(repr=False)
    levels: list[tuple[int, int, np.ndarray]] = field(repr=False)
    error: WeightError
    of: float
    size: Size | None
    stored_size: Size
    size_problem: str


class QuantizationState(settable(DEFAULTS)):
    """What is looked at and the toy format as traits; `look` follows, and in words `answer` and `error`.

    file: a GGUF's path, a model of `llmlab.local_models()`, None for the small model llmlab uses everywhere. tensor: a
    matrix of it by its GGUF name (None: the first block's first). row, block: which block of which row. bits, block_size,
    minimum, scale: of a formats.toy.Toy. A value that cannot be used leaves the last good look in place and says why in
    `error`; several changes in `update(...)` make one look.
    """

    look = t.Instance(Look, allow_none=True, read_only=True)
    answer = t.Unicode(read_only=True)
    error = t.Unicode(read_only=True)

    def __init__(self, **settings):
        """Raises LabError for settings that cannot be used: there is no last good look yet."""
        self._asked = self._opened = self._sampled = self._measured = None
        super().__init__(**self._known(settings))
        self._follow()
        if self.look is None:
            raise LabError(self.error)

    @property
    def toy(self) -> Toy:
        """The toy format of the present look."""
        return self.look.toy

    @property
    def gguf(self) -> GGUFFile:
        """The file of the present look."""
        return self._good.file

    @property
    def stored(self) -> str:
        """What the file's matrices are stored in, by its name for the mix."""
        return str(self._good.spec.stored)

    def tensors(self) -> list[TensorInfo]:
        """The file's matrices."""
        return self._good.matrices

    def places(self) -> tuple[int, int]:
        """How many rows the tensor has, and how many blocks each."""
        return _places(self.look.tensor)

    @t.observe(*DEFAULTS)
    def _follow(self, _=None) -> None:
        asked = {name: getattr(self, name) for name in DEFAULTS}
        if asked == self._asked:             # changes made together arrive one by one, all of them in place
            return
        before, self._asked = self._asked or {}, asked
        try:
            opened = self._open(asked["file"])
            asked = self._asked = _consequences(opened, asked, before)
            look = self._look(opened, **asked)
        except LabError as error:
            self.set_trait("error", str(error))
            return
        self._good = opened
        with self.hold_trait_notifications():
            for name, value in asked.items():
                setattr(self, name, value)
            for name, value in {"error": "", "look": look, "answer": words(look)}.items():
                self.set_trait(name, value)

    def _open(self, file) -> "_Opened":
        if self._opened is None or self._opened.asked != file:
            found = read_gguf(path_of(file))
            matrices = [tensor for tensor in found.tensors.values() if len(tensor.shape) > 1]
            if not matrices:
                raise LabError(f"{Path(found.paths[0]).name} holds no matrix; give the GGUF of a model")
            self._opened = _Opened(file, found, matrices, model_spec(found.paths[0]))
        return self._opened

    def _look(self, opened: "_Opened", tensor: str, row: int, block: int, **more) -> Look:
        info, toy = opened.file.tensors[tensor], Toy(**{name: more[setting] for setting, name in TOY.items()})
        known = FORMATS[info.type]
        for what, at, most in zip(("row", "block"), (row, block), _places(info), strict=True):
            if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < most:
                raise LabError(f"{tensor} has no {what} {at!r:.40}; there are {most:,}, from 0")
        stored = GGUFSource(opened.file).blocks(tensor).flatten(0, -2)
        original, share = self._sample(opened, info, stored)
        if self._measured is None or self._measured[0] != toy or self._measured[1] is not original:
            self._measured = toy, original, weight_error(original, _back(toy, original))
        error = self._measured[2]            # another block of the same tensor: nothing new
        line = dequantize(stored[row:row + 1].contiguous(), info.type)
        start, wide = block * _width(known), _width(known)
        here = slice(start, start + wide)
        data = stored[row, start // known.block * known.block_bytes:][:known.block_bytes]
        size, problem = None, ""
        try:
            size = retyped(opened.spec, toy.format)
        except LabError as wrong:
            problem = str(wrong)
        return Look(tensor=info, format=known, toy=toy, start=start, parts=take_apart(data.contiguous(), info.type),
                    original=line[0, here].numpy(), rounded=_back(toy, line)[0, here].numpy(),
                    levels=_levels(toy, line, here), error=error, of=share, size=size,
                    stored_size=as_stored(opened.spec), size_problem=problem)

    def _sample(self, opened: "_Opened", info: TensorInfo, stored: torch.Tensor) -> tuple[torch.Tensor, float]:
        """(weights [rows, cols], their share): the whole tensor, or rows evenly spread over it."""
        key = opened.file.paths, info.name
        if self._sampled is None or self._sampled[0] != key:
            rows = max(1, min(len(stored), MOST // info.shape[0]))
            chosen = torch.linspace(0, len(stored) - 1, rows, dtype=torch.float64).long()
            self._sampled = key, dequantize(stored[chosen], info.type), rows / len(stored)
        return self._sampled[1:]


@dataclass(frozen=True, eq=False)
class _Opened:
    asked: object
    file: GGUFFile
    matrices: list[TensorInfo]
    spec: ModelSpec


def path_of(file) -> Path:
    """The GGUF that is meant. Raises LabError."""
    if file is None:
        return fetch(SMALL_MODEL)
    try:
        path = Path(os.fsdecode(file)).expanduser()
    except TypeError:
        raise LabError(f"file is {file!r:.60}; give the path of a GGUF, or the name of a model on this computer") from None
    if not path.exists() and (found := find_local(str(file))) is not None:
        path = found.path
    return path


def _consequences(opened: _Opened, asked: dict, before: dict) -> dict:
    """What else changes with a setting, where the reader did not change it too: another tensor is looked at from its start."""
    asked = dict(asked)
    names = [tensor.name for tensor in opened.matrices]
    moved = bool(before) and asked["file"] != before["file"]
    if asked["tensor"] is None or moved and asked["tensor"] == before["tensor"] and asked["tensor"] not in names:
        asked["tensor"] = next((t.name for t in opened.matrices if is_block_matrix(t.name, t.shape)), names[0])
    if asked["tensor"] not in names:
        raise LabError(f"{str(asked['tensor'])[:60]!r} is no matrix of {Path(opened.file.paths[0]).name}; it has {len(names)}, "
                       f"such as {', '.join(names[:3])}")
    if before and asked["tensor"] != before["tensor"]:
        for name, most in zip(("row", "block"), _places(opened.file.tensors[asked["tensor"]]), strict=True):
            if asked[name] == before[name] and isinstance(asked[name], int) and asked[name] >= most:
                asked[name] = 0
    return asked


def _width(known: Format) -> int:
    return known.block if known.block > 1 else PLAIN


def _places(tensor: TensorInfo) -> tuple[int, int]:
    rows = 1
    for n in tensor.shape[1:]:
        rows *= n
    return rows, -(-tensor.shape[0] // _width(FORMATS[tensor.type]))


def _back(toy: Toy, weights: torch.Tensor) -> torch.Tensor:
    """Rounded: into blocks of bytes and out again."""
    return dequantize(toy.quantize(weights), toy.format.name)


def _levels(toy: Toy, row: torch.Tensor, here: slice) -> list[tuple[int, int, np.ndarray]]:
    """The numbers that each toy block touching `here` can say."""
    blocks = toy.quantize(row).view(-1, toy.format.block_bytes)
    first, last = here.start // toy.block, -(-min(here.stop, row.shape[1]) // toy.block)
    found = toy.unpack(blocks[first:last])
    lowest = -128 if toy.bits == 8 else 0 if toy.minimum else -(1 << toy.bits - 1)
    codes = torch.arange(lowest, lowest + (1 << toy.bits)).float()
    levels = found.scale * codes + (0 if found.offset is None else found.offset)
    return [(max(here.start, at * toy.block), min(here.stop, (at + 1) * toy.block), one.numpy())
            for at, one in zip(range(first, last), levels, strict=True)]


# ---- in words -----------------------------------------------------------------------------------------------

def words(look: Look) -> str:
    """A look in three sentences: how it is stored, what rounding costs, how large the file would be."""
    return " ".join(filter(None, (stored_words(look), error_words(look), size_words(look))))


def stored_words(look: Look) -> str:
    known = look.format
    if known.block == 1:
        return f"{look.tensor.name} is stored in {known.name}: {known.block_bytes} bytes a weight, no blocks."
    return (f"{look.tensor.name} is stored in {known.name}: {known.block_bytes} bytes for {known.block} weights, "
            f"{known.bits:.2f} bits each.")


def error_words(look: Look) -> str:
    error, toy = look.error, look.toy
    over = f"all {error.weights:,} weights" if look.of == 1 else f"{error.weights:,} weights ({look.of:.1%}, evenly spread)"
    if error.largest == 0:
        return f"Rounded to {toy.name} ({toy}) every one of {over} comes back to the bit, at {toy.format.bits:.2f} bits each."
    return (f"Rounded to {toy.name} ({toy}) at {toy.format.bits:.2f} bits each, weights are {error.relative_rms:.2%} off (RMS "
            f"error over RMS weight), at most {error.largest / error.rms:.2f} RMS weights; exact, over {over}.")


def size_words(look: Look) -> str:
    if look.size is None:
        return f"The whole model cannot be so: {look.size_problem}."
    return (f"With all block matrices so, the file's tensors take {format_bytes(look.size.tensor_bytes)} "
            f"({look.size.bits_per_weight:.2f} bits per weight) instead of {format_bytes(look.stored_size.tensor_bytes)} "
            f"({look.stored_size.bits_per_weight:.2f}), exact.")
