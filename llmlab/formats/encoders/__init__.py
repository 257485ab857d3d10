"""Numbers -> blocks, one file a family, found by themselves; `formats.quantize` checks, cuts in chunks and calls.

An encoder gets clean work: few rows, float32, contiguous, every number finite, whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module as _import_module
from pkgutil import iter_modules as _iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EFFORTS = ("normal", "high")    # what llama.cpp's own search finds; a better search at the same format

# (float32 [rows, cols], float32 [cols] or None, effort) -> uint8 [rows, row_bytes]
Encoder = Callable[["torch.Tensor", "torch.Tensor | None", str], "torch.Tensor"]

ENCODERS: dict[str, Encoder] = {}


def encodes(type: str) -> Callable[[Encoder], Encoder]:
    """Says that the function beneath it writes blocks of that type: `@encodes("Q4_0")`."""
    def add(encoder: Encoder) -> Encoder:
        if type in ENCODERS:
            raise ValueError(f"two encoders of {type}")
        ENCODERS[type] = encoder
        return encoder

    return add


for _module in _iter_modules(__path__):
    _import_module(f"{__name__}.{_module.name}")
