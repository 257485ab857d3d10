"""IQ3 formats: a code names 4 weights at once, magnitudes from a codebook and a sign each; 4-bit block scales."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

from .bits import halves, spread, words
from .grids import grid, look_up, masks, negate, odd, pick
from .registry import Field, Unpacked, register

if TYPE_CHECKING:
    import torch


@cache
def _shifts(device: torch.device) -> torch.Tensor:
    import torch
    return torch.tensor([0, 7, 14, 21], dtype=torch.int32, device=device)


def _read_xxs(part: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch
    tail = words(part, torch.int32)
    return {"signs": (tail[..., None] >> _shifts(part.device)).bitwise_and_(127), "block scales": tail >> 28 & 15}


def _unpack_xxs(blocks: torch.Tensor) -> Unpacked:
    device, tail = blocks.device, _read_xxs(blocks[:, 66:])
    codes = negate(look_up(grid("IQ3_XXS", device), blocks[:, 2:66]), look_up(masks(7, device), tail["signs"]))
    return Unpacked(codes, halves(blocks[:, :2]) * pick(odd(0.25, device), tail["block scales"]))


def _unpack_s(blocks: torch.Tensor) -> Unpacked:
    import torch
    device = blocks.device
    index = torch.add(blocks[:, 2:66], spread(blocks[:, 66:74], 1).int(), alpha=256)
    codes = negate(look_up(grid("IQ3_S", device), index), look_up(masks(8, device), blocks[:, 74:106]))
    return Unpacked(codes, halves(blocks[:, :2]) * pick(odd(1, device), spread(blocks[:, 106:], 4)))


_D = Field("scale", 0, 2, "float16: multiplies all block scales")

IQ3_XXS = register("IQ3_XXS", 18, 256, 2 + 64 + 32, "iq", unpack=_unpack_xxs, fields=(
    _D,
    Field("grid index", 2, 66, "uint8: a codebook number each 4 weights"),
    Field("signs, block scales", 66, 98,
          "4 bytes each 32 weights: 4 x 7 signs (the eighth makes the minuses even) and 4 bits s of scale x (2 s + 1) / 4",
          _read_xxs)))
IQ3_S = register("IQ3_S", 21, 256, 2 + 64 + 32 + 8 + 4, "iq", unpack=_unpack_s, fields=(
    _D,
    Field("grid index", 2, 66, "uint8: low 8 bits of the codebook number, one each 4 weights"),
    Field("grid index, high bits", 66, 74, "a bit each 4 weights, lowest first", partial(spread, bits=1)),
    Field("signs", 74, 106, "a bit a weight, lowest first: 1 is minus", partial(spread, bits=1)),
    Field("block scales", 106, 110, "4 bits each 32 weights, low ones first: s means scale x (2 s + 1)",
          partial(spread, bits=4))))
