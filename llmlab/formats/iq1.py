"""IQ1 formats: a code names 8 weights of -1, 0 and 1 at once; an eighth is added to all eight, or taken away.

So that codes are integers they count eighths: 8 x level + 1 or - 1, and scales are an eighth of llama.cpp's.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from .bits import halves, spread, words
from .grids import CODEBOOKS, joined, look_up, odd, pick
from .registry import Field, Unpacked, register

if TYPE_CHECKING:
    import torch


@cache
def _shifted_grid(device: torch.device) -> torch.Tensor:
    """Codes in eighths, int64 [2 x 2048]: the codebook and 1/8, then the codebook and -1/8."""
    import torch
    points = 8 * torch.tensor(CODEBOOKS["IQ1"].points(), dtype=torch.int8)
    return joined(torch.stack((points + 1, points - 1))).to(device)


@cache
def _threes(device: torch.device) -> torch.Tensor:
    """By 12 bits, the four 3-bit numbers in them, lowest first, a byte each; by those and bit 15 too, 8 more each."""
    import torch
    word = torch.arange(0x9000, dtype=torch.int32)[:, None]
    return joined(word >> torch.arange(0, 12, 3) & 7 | word >> 12 & 8).to(device)


def _read_s(part: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch
    top = words(part, torch.int16).int()
    return {"grid index, high bits": look_up(_threes(part.device), top & 0xFFF), "block scales": top >> 12 & 7,
            "shift": top >> 15 & 1}


def _unpack_s(blocks: torch.Tensor) -> Unpacked:
    import torch
    device = blocks.device
    top = words(blocks[:, 34:], torch.int16).int()
    index = torch.add(blocks[:, 2:34], look_up(_threes(device), top & 0x8FFF).int(), alpha=256)
    return Unpacked(look_up(_shifted_grid(device), index), halves(blocks[:, :2]) * pick(odd(0.125, device), top >> 12 & 7))


def _read_m(part: torch.Tensor) -> dict[str, torch.Tensor]:
    four = spread(part, 4)
    return {"grid index, high bits": four & 7, "shift": four >> 3}


def _scales_m(part: torch.Tensor) -> dict[str, torch.Tensor]:
    """Block scales, as their bits, and the scale of bytes [n, 8]."""
    import torch
    high = part[:, 1::2]                            # their top halves are the scale's, lowest first
    return {"block scales": look_up(_threes(part.device), words(part, torch.int16).int() & 0xFFF),
            "scale": halves(high[:, 0::2] >> 4 | high[:, 1::2] & 0xF0)}


def _unpack_m(blocks: torch.Tensor) -> Unpacked:
    import torch
    device = blocks.device
    index = torch.add(blocks[:, :32], spread(blocks[:, 32:48], 4).int(), alpha=256)
    tail = _scales_m(blocks[:, 48:])
    return Unpacked(look_up(_shifted_grid(device), index), tail["scale"] * pick(odd(0.125, device), tail["block scales"]))


_CODES = "uint8: low 8 bits of the codebook number, one each 8 weights"

IQ1_S = register("IQ1_S", 19, 256, 2 + 32 + 16, "iq", unpack=_unpack_s, fields=(
    Field("scale", 0, 2, "float16: multiplies all block scales"),
    Field("grid index", 2, 34, _CODES),
    Field("grid index, high bits; block scales; shift", 34, 50,
          "16 bits each 32 weights: 4 x 3 high bits, 3 bits s of scale x (2 s + 1), 1 that an eighth is taken away",
          _read_s)))
IQ1_M = register("IQ1_M", 29, 256, 32 + 16 + 8, "iq", unpack=_unpack_m, fields=(
    Field("grid index", 0, 32, _CODES),
    Field("grid index, high bits; shift", 32, 48, "4 bits each 8 weights: 3 high, 1 that an eighth is taken away", _read_m),
    Field("block scales, scale", 48, 56,
          "4 x 16 bits: 4 x 3 bits s of scale x (2 s + 1), each 16 weights; the top 4 bits of all four are the float16 scale",
          _scales_m)))
