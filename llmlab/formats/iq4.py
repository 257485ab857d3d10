"""IQ4 formats: 4-bit codes are places in a table of 16 uneven levels, denser near zero as weights are."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from .bits import halves, levelled, planes, spread
from .registry import Field, Unpacked, register

if TYPE_CHECKING:
    import torch

# kvalues_iq4nl in llama.cpp's ggml/src/ggml-common.h.
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _unpack_nl(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(levelled(blocks[:, 2:], LEVELS, 16), halves(blocks[:, :2]))


def _unpack_xs(blocks: torch.Tensor) -> Unpacked:
    import torch
    six = spread(blocks[:, 4:8], 4) | spread(blocks[:, 2:4], 2) << 4
    return Unpacked(levelled(blocks[:, 8:], LEVELS, 16), halves(blocks[:, :2]) * six.view(torch.int8).sub_(32))


_CODES = "4 bits a weight, places in the table of 16 levels; of every 16 bytes the low halves first"

IQ4_NL = register("IQ4_NL", 20, 32, 2 + 16, "iq", unpack=_unpack_nl, fields=(
    Field("scale", 0, 2, "float16: multiplies every level of the block"),
    Field("codes", 2, 18, _CODES, partial(planes, bits=4, run=16))))
IQ4_XS = register("IQ4_XS", 23, 256, 2 + 2 + 128 + 4, "iq", unpack=_unpack_xs, fields=(
    Field("scale", 0, 2, "float16: multiplies all block scales"),
    Field("block scales, high bits", 2, 4, "2 bits each 32 weights, lowest first", partial(spread, bits=2)),
    Field("block scales", 4, 8, "4 low bits each 32 weights; 32 less than the 6 bits multiplies the scale",
          partial(spread, bits=4)),
    Field("codes", 8, 136, _CODES, partial(planes, bits=4, run=16))))
