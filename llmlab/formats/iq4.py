"""IQ4 formats: 4-bit codes are places in a table of 16 uneven levels, denser near zero as weights are."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

from .bits import halves, planes, spread, words
from .grids import joined, look_up
from .registry import Field, Unpacked, register

if TYPE_CHECKING:
    import torch

# kvalues_iq4nl in llama.cpp's ggml/src/ggml-common.h.
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@cache
def _fours(device: torch.device) -> torch.Tensor:
    """The levels in two bytes of codes, int32 [65536]: of the low half of either byte, then of the high halves."""
    import torch
    word, levels = torch.arange(1 << 16), torch.tensor(LEVELS, dtype=torch.int8)
    return joined(torch.stack([levels[word >> at & 15] for at in (0, 8, 4, 12)], -1)).to(device)


def _levels(part: torch.Tensor) -> torch.Tensor:
    """Bytes [n, k] of codes, 16 low halves before their 16 high ones -> int8 levels [n, 2 k]."""
    import torch
    found = look_up(_fours(part.device), words(part, torch.int16).int().bitwise_and_(0xFFFF))
    pairs = found.view(torch.int16).unflatten(1, (-1, 8, 2))
    return torch.stack((pairs[..., 0], pairs[..., 1]), 2).view(torch.int8).flatten(1)


def _unpack_nl(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(_levels(blocks[:, 2:]), halves(blocks[:, :2]))


def _unpack_xs(blocks: torch.Tensor) -> Unpacked:
    import torch
    six = spread(blocks[:, 4:8], 4) | spread(blocks[:, 2:4], 2) << 4
    return Unpacked(_levels(blocks[:, 8:]), halves(blocks[:, :2]) * six.view(torch.int8).sub_(32))


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
