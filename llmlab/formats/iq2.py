"""IQ2 formats: a code names 8 weights at once, magnitudes from a codebook and a sign each; 4-bit block scales.

A block's scale is d (2 s + 1) / 8 for its 4 bits s: d times half of s plus a half, divided by 4, as llama.cpp has it.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

from .bits import halves, spread, words
from .grids import grid, look_up, masks, negate, odd, pick, signed_grid
from .registry import Field, Unpacked, register

if TYPE_CHECKING:
    import torch


@cache
def _shifts(device: torch.device) -> torch.Tensor:
    import torch
    return torch.tensor([0, 7, 14, 21], dtype=torch.int32, device=device)


def _read_xxs(part: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch
    parts = words(part, torch.int32).unflatten(1, (8, 2))
    tail = parts[..., 1]
    return {"grid index": parts.view(torch.uint8).unflatten(2, (2, 4))[:, :, 0],
            "signs": (tail[..., None] >> _shifts(part.device)).bitwise_and_(127), "block scales": tail >> 28 & 15}


def _unpack_xxs(blocks: torch.Tensor) -> Unpacked:
    import torch
    parts, device = _read_xxs(blocks[:, 2:]), blocks.device
    index = torch.add(parts["grid index"], parts["signs"], alpha=256)
    return Unpacked(look_up(signed_grid("IQ2_XXS", device), index),
                    halves(blocks[:, :2]) * pick(odd(0.125, device), parts["block scales"]))


def _read_xs(part: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch
    word = words(part, torch.int16).int()
    return {"grid index": word & 511, "signs": word >> 9 & 127}


def _unpack_xs(blocks: torch.Tensor) -> Unpacked:
    import torch
    index = words(blocks[:, 2:66], torch.uint16).int()      # 9 bits of code, 7 of signs
    return Unpacked(look_up(signed_grid("IQ2_XS", blocks.device), index), _scales(blocks, 66))


def _unpack_s(blocks: torch.Tensor) -> Unpacked:
    import torch
    index = torch.add(blocks[:, 2:34], spread(blocks[:, 66:74], 2).int(), alpha=256)
    codes = look_up(grid("IQ2_S", blocks.device), index)
    return Unpacked(negate(codes, look_up(masks(8, blocks.device), blocks[:, 34:66])), _scales(blocks, 74))


def _scales(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The scales [n, 16] of 16 weights each, from the block's own and the 4-bit numbers from byte `start` on."""
    return halves(blocks[:, :2]) * pick(odd(0.125, blocks.device), spread(blocks[:, start:start + 8], 4))


_D = Field("scale", 0, 2, "float16: multiplies all block scales")
_NIBBLES = "4 bits each 16 weights, low ones first: s means scale x (2 s + 1) / 8"

IQ2_XXS = register("IQ2_XXS", 16, 256, 2 + 64, "iq", unpack=_unpack_xxs, fields=(
    _D,
    Field("grid index, signs, block scales", 2, 66,
          "8 bytes each 32 weights: 4 codebook numbers of a byte, then 4 x 7 signs (the eighth makes the minuses even) and 4 "
          "bits s of scale x (2 s + 1) / 8", _read_xxs)))
IQ2_XS = register("IQ2_XS", 17, 256, 2 + 64 + 8, "iq", unpack=_unpack_xs, fields=(
    _D,
    Field("grid index, signs", 2, 66,
          "16 bits each 8 weights: 9 of codebook number, 7 signs (the eighth makes the minuses even)", _read_xs),
    Field("block scales", 66, 74, _NIBBLES, partial(spread, bits=4))))
IQ2_S = register("IQ2_S", 22, 256, 2 + 64 + 16, "iq", unpack=_unpack_s, fields=(
    _D,
    Field("grid index", 2, 34, "uint8: low 8 bits of the codebook number, one each 8 weights"),
    Field("signs", 34, 66, "a bit a weight, lowest first: 1 is minus", partial(spread, bits=1)),
    Field("grid index, high bits", 66, 74, "2 bits each 8 weights, lowest first", partial(spread, bits=2)),
    Field("block scales", 74, 82, _NIBBLES, partial(spread, bits=4))))
