"""Weights off their grid: an original to quantize, where only a quantized file is to be had.

The numbers of a quantized file lie on a few levels a block, and a format of the same levels finds them again: Q4_1 of Q4_1 has
no error at all, and Q4_K of it a quarter of what it has on trained weights, so that nothing measured on them says what formats
cost. Moved evenly within the step that rounding left open, they are as weights that were never rounded; it is another
model, about as far from the file's as the file is from its original, and the same for whatever is compared on it.
"""

import os
from collections.abc import Callable, Iterator

import numpy as np
import torch

from ..errors import LabError
from ..formats import FORMATS, dequantize
from ..formats.dequantizing import as_bytes
from ..formats.plain import STORED
from ..gguf import GGUFFile, read_gguf, write_gguf
from ..gguf.words import show, show_path

ONCE = 1 << 16      # blocks at a time


def unrounded(source: str | os.PathLike, target: str | os.PathLike, seed: int = 0, type: str = "F16") -> None:
    """Write a GGUF with the quantized tensors of `source` as `type` ("F16", "F32"), each weight moved by up to half a step of
    its block, evenly and the same for the same seed; all else as it is. Formats of evenly spaced levels only (Q4_0 to Q8_0,
    K types): raises LabError naming the tensor for others, and as `write_gguf` does."""
    if type not in ("F16", "F32"):
        raise LabError(f"type is {str(type)[:40]!r}; give F16 or F32")
    file = read_gguf(source)
    metadata, tensors = {key: value for key, value in file.typed_metadata().items() if not key.startswith("split.")}, []
    metadata["general.file_type"] = ("uint32", {"F32": 0, "F16": 1}[type])
    for place, (name, tensor) in enumerate(file.tensors.items()):
        if tensor.type in STORED:
            tensors.append((name, tensor.shape, tensor.type, _as_it_is(file, name)))
            continue
        known = FORMATS[tensor.type]
        if known.unpack is None or not _even(known):
            raise LabError(f"{show_path(file.paths[0])}: tensor {show(name)} is {tensor.type}, whose levels do not lie evenly; "
                           "take a file of Q4_0 to Q8_0 or K types")
        tensors.append((name, tensor.shape, type, _moved(file, name, np.random.default_rng([seed, place]), type)))
    write_gguf(target, metadata, tensors)


def _even(known) -> bool:
    """Whether a format's codes are whole numbers that its scale spaces evenly."""
    return known.family in ("legacy", "k")


def _as_it_is(file: GGUFFile, name: str) -> Callable[[], np.ndarray]:
    return lambda: file.data(name)


def _moved(file: GGUFFile, name: str, rng: np.random.Generator, type: str) -> Callable[[], Iterator[np.ndarray]]:
    known = FORMATS[file.tensors[name].type]

    def make() -> Iterator[np.ndarray]:
        blocks = as_bytes(file.data(name).reshape(-1, known.block_bytes), known)
        for start in range(0, len(blocks), ONCE):
            part = blocks[start:start + ONCE]
            step = known.unpack(part).scale.float().abs()
            steps = step.repeat_interleave(known.block // step.shape[1], 1)
            move = torch.from_numpy(rng.random(steps.shape, dtype=np.float32)) - 0.5
            weights = dequantize(part, known.name) + move * steps
            yield weights.to(torch.float16 if type == "F16" else torch.float32).numpy().reshape(-1)

    return make
