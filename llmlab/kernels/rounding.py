"""Keys and values to a cache type's codes and scales: a dozen operations for any number of blocks, on any device.

What they give is what llama.cpp writes into its cache, byte for byte: the plain C of ggml-quants.c (quantize_row_*_ref).
`formats` has encoders of these types too, for whole matrices: they look at what they find and take other ways, which is many
small operations more, and waits for a card. The two agree but for IQ4_NL, of which a cache takes the first scale that
llama-quantize tries, and for the codes of blocks of numbers below 1e-36, which stand for zeros whatever their codes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from ..errors import LabError
from ..formats.encoders.legacy import HALF_AT_MOST
from ..formats.encoders.searching import in_order, number
from ..formats.iq4 import LEVELS

if TYPE_CHECKING:
    from .pages import CellType

BLOCK = 32          # numbers that share a scale
LARGEST = 65504.0   # of float16


def rounded(x: torch.Tensor, known: CellType) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """x [n, 32] of any float dtype -> codes uint8 [n, rows] as llama.cpp packs them, and float16 [n, 1] each: the scales and,
    where the type has them, the minimums. Raises LabError where a scale is no float16 number (not on a card)."""
    x = x.detach().float()
    if known.bits == 8:
        codes, halves = _bytes(x)
    elif known.name == "iq4_nl":
        codes, halves = _uneven(x)
    else:
        codes, halves = (_with_minimum if known.floats == 2 else _symmetric)(x, known.bits)
    stored = tuple(half.half() for half in halves)
    if x.device.type == "cpu":
        for half, found in zip(halves, stored, strict=True):
            one = half.view(-1)
            # one product instead of a look at each: only where it is large, or no number, are they looked at
            if not float(one.dot(one)) < LARGEST * LARGEST and not found.isfinite().all():
                largest = float(x.abs().nan_to_num(torch.inf).max())
                raise LabError(f"a {known.name} cache holds no numbers as large as {largest:.4g}; choose bf16")
    return codes, stored


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, 0 for 0 and for what is too small to have one."""
    return scale.reciprocal().nan_to_num_(0.0, 0.0, 0.0)


def _largest(x: torch.Tensor) -> torch.Tensor:
    """[n, 1] of each block the number farthest from zero, the first of several; zeros have no sign."""
    return x.gather(1, x.abs().argmax(1, keepdim=True)).add_(0.0)


def _bytes(x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """q8_0. Halves go away from zero, as C's roundf has it."""
    scale = x.abs().amax(1, keepdim=True).div_(number(127, x.device))
    codes = x * _inverse(scale)
    codes.add_(torch.copysign(number(HALF_AT_MOST, x.device), codes))
    return codes.to(torch.int8).view(torch.uint8), (scale,)


def _symmetric(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """q4_0, q5_0: the number farthest from zero gets the lowest code."""
    top = 1 << bits - 1
    scale = _largest(x).mul_(-1 / top)
    codes = (x * _inverse(scale)).add_(top + 0.5)
    return _packed(codes.to(torch.int8).clamp_(max=2 * top - 1).view(torch.uint8), bits), (scale,)


def _with_minimum(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """q4_1, q5_1: the smallest number gets code 0, the largest the highest."""
    top = (1 << bits) - 1
    least, most = x.aminmax(dim=1, keepdim=True)
    scale = most.sub_(least).div_(number(top, x.device))
    codes = (x - least).mul_(_inverse(scale)).add_(0.5)
    return _packed(codes.to(torch.int8).clamp_(max=top).view(torch.uint8), bits), (scale, least)


def _uneven(x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """iq4_nl: the level nearest to each number where the largest is put on the lowest; then the scale that fits these best, an
    error weighed by the number's square (quantize_row_iq4_nl_impl with ntry -1)."""
    levels, borders = levels_of(x.device), _borders(x.device)
    far = _largest(x)
    codes = torch.bucketize(x * _inverse(far / levels[0]), borders, out_int32=True, right=True)
    level = levels.index_select(0, codes.view(-1)).view(x.shape)
    weighed = (x * x).mul_(level)
    terms = torch.stack([weighed * x, weighed * level]).permute(2, 0, 1)
    with_x, squares = in_order(terms) if x.device.type == "cpu" else terms.sum(0)
    scale = torch.where(squares > 0, with_x / squares, far.view(-1) * 0)      # times 0: what is no number stays none
    return _packed(codes.to(torch.uint8), 4), (scale[:, None],)


@cache
def levels_of(device: torch.device) -> torch.Tensor:
    """iq4_nl's 16 levels, float32."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


@cache
def _borders(device: torch.device) -> torch.Tensor:
    """The middles between them."""
    levels = levels_of(device)
    return (levels[1:] + levels[:-1]) / 2


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [n, 32] -> [n, 16 or 20]: numbers 0-15 in low halves, 16-31 in high ones, before them fifth bits. Eight at a time:
    a product gathers the lowest bits of eight bytes in the highest of them."""
    eights = codes.view(torch.int64)
    if bits == 4:
        return eights[:, 2:].bitwise_left_shift(4).bitwise_or_(eights[:, :2]).view(torch.uint8)
    fifth = (eights >> 4 & 0x0101010101010101).mul_(0x0102040810204080).bitwise_right_shift_(56).to(torch.uint8)
    low = eights & 0x0F0F0F0F0F0F0F0F
    return torch.cat([fifth, (low[:, 2:] << 4).bitwise_or_(low[:, :2]).view(torch.uint8)], 1)
