"""Legacy types, byte for byte as llama.cpp writes them, and numbers stored as they are.

Without importances scales follow from a block's ends; with them each block's scale is searched for, its weights' errors
weighed by importance x sqrt(mean square of the row + weight^2). Algorithms: ggml's ggml-quants.c (quantize_row_q*_ref, _impl).
A longer search weighs by importance alone, or not at all.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from . import encodes, harder
from .harder import Levels
from .joining import joined
from .levels import counted, inverse_of
from .searching import TooLarge, affine, half, largest, number, root_, running_total, symmetric

if TYPE_CHECKING:
    import torch

BLOCK = 32


# ---- one number, one element ----------------------------------------------------------------------------

def _stored(x: torch.Tensor, importance: torch.Tensor | None, effort: str, dtype: str) -> torch.Tensor:
    import torch
    kind = getattr(torch, dtype)
    numbers = x.to(kind)
    if kind != torch.float32 and not torch.stack([numbers.amax(), numbers.amin()]).isfinite().all():
        raise TooLarge(f"the largest {dtype} is {torch.finfo(kind).max:.6g}")
    return numbers.view(torch.uint8)


for _name, _dtype in (("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")):
    encodes(_name)(partial(_stored, dtype=_dtype))


# ---- blocks of 32 ---------------------------------------------------------------------------------------

def _cut(x: torch.Tensor, offset: float, inverse: torch.Tensor, top: int) -> torch.Tensor:
    """uint8 codes floor(x * inverse + offset) up to `top` of numbers [blocks, 32] that are not below zero.

    Where a scale is so small that its inverse is infinite C's conversion of infinity gives code 0.
    """
    import torch
    codes = (x * inverse).add_(offset)
    if not inverse.isfinite().all():
        codes.masked_fill_(~inverse.isfinite(), 0)
    return codes.to(torch.int8).clamp_(max=top).view(torch.uint8)       # several times as fast as to uint8


def _pairs(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks, 32] below 16 -> [blocks, 16]: weights 0-15 in low halves, 16-31 in high ones. Eight at a time."""
    import torch
    eights = codes.view(torch.int64)
    return (eights[:, :2] | eights[:, 2:] << 4).view(torch.uint8)


def _bits(codes: torch.Tensor, bit: int) -> torch.Tensor:
    """That bit of uint8 [blocks, 32] -> [blocks, 4], a bit a weight, lowest first.

    A product gathers the eight lowest bits of eight bytes in the highest byte: byte i's bit is moved to bit 56 + i.
    """
    import torch
    eights = (codes.view(torch.int64) >> bit) & 0x0101010101010101
    return (eights * 0x0102040810204080 >> 56).to(torch.uint8)


def _fours(codes: torch.Tensor) -> list[torch.Tensor]:
    return [_pairs(codes)]


def _fives(codes: torch.Tensor) -> list[torch.Tensor]:
    return [_bits(codes, 4), _pairs(codes & 15)]


PARTS = {4: _fours, 5: _fives}      # how codes of so many bits are stored


def _symmetric(x: torch.Tensor, importance: torch.Tensor | None, effort: str, bits: int) -> torch.Tensor:
    """Q4_0, Q5_0: the weight farthest from zero gets the lowest code."""
    top = 1 << bits - 1
    if importance is None:
        blocks = x.view(-1, BLOCK)
        scale = largest(blocks, 1)[:, None] / -top
        codes = _cut(blocks, top + 0.5, inverse_of(scale), 2 * top - 1)
    else:
        columns, weight = _weighed(x, importance)
        found = symmetric(columns, top, weight)
        scale, codes = found.scale[:, None], _rows(found.codes(columns, top))
    stored = half(scale)
    if effort == "high":
        stored, codes = _harder(x, importance, stored, Levels(-top, top - 1))
    return joined(stored, *PARTS[bits](codes)).view(len(x), -1)


def _with_minimum(x: torch.Tensor, importance: torch.Tensor | None, effort: str, bits: int) -> torch.Tensor:
    """Q4_1, Q5_1: the smallest weight gets code 0, the largest the highest."""
    import torch
    top = (1 << bits) - 1
    if importance is None:
        blocks = x.view(-1, BLOCK)
        least = blocks.amin(1, keepdim=True)
        scale = (blocks.amax(1, keepdim=True) - least) / number(top, x.device)
        codes = _cut(blocks - least, 0.5, inverse_of(scale), top)
    else:
        columns, weight = _weighed(x, importance)
        found = affine(columns, top, weight, -0.9, 0.05, 36)
        scale, least, codes = found.scale[:, None], -found.minimum[:, None], _rows(found.codes(columns, top))
    stored = half(torch.cat([scale, least], 1))
    if effort == "high":
        stored, codes = _harder(x, importance, stored, Levels(0, top, "free"))
    return joined(stored, *PARTS[bits](codes)).view(len(x), -1)


def _harder(x: torch.Tensor, importance: torch.Tensor | None, stored: torch.Tensor,
            levels: Levels) -> tuple[torch.Tensor, torch.Tensor]:
    """float16 [blocks, 1 or 2] (scale, what code 0 stands for) and uint8 codes [blocks, 32] with a smaller error."""
    import torch
    columns = x.view(-1, BLOCK).t().contiguous()
    weight = counted(columns, importance)
    scale = stored[:, 0].float()
    minimum = -stored[:, 1].float() if levels.minimum else torch.zeros_like(scale)
    found = harder.runs(columns, weight, scale, minimum, levels)
    codes = harder.coded(columns, found.scale, found.minimum, levels).sub_(levels.low)
    parts = [found.scale, -found.minimum] if levels.minimum else [found.scale]
    return torch.stack(parts, 1).half(), _rows(codes)


def _weighed(x: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [rows, cols] as columns of blocks [32, rows x blocks], and what each weight's error counts."""
    columns = x.view(-1, BLOCK).t().contiguous()
    mean = running_total(x * x) / number(x.shape[1], x.device)
    each = root_((columns * columns).view(BLOCK, len(x), -1).add_(mean[:, None]))
    return columns, each.mul_(importance.view(-1, BLOCK).t()[:, None]).view(BLOCK, -1)


def _rows(codes: torch.Tensor) -> torch.Tensor:
    """float32 codes [32, blocks] -> uint8 [blocks, 32]."""
    import torch
    return codes.to(torch.int16).to(torch.uint8).t().contiguous()


@encodes("Q8_0")
def _q8_0(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    """The weight farthest from zero gets code 127 or -127; halves go away from zero, as C's roundf has it.

    llama.cpp has no use for importances here; a longer search has.
    """
    import torch
    blocks = x.view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / number(127, x.device)
    if effort == "high":
        stored, codes = _harder(x, importance, half(scale), Levels(-127, 127))
        return joined(stored, codes - 127).view(len(x), -1)       # uint8 wraps round: bytes are int8's
    inverse = inverse_of(scale)
    codes = blocks * inverse
    codes.add_(torch.copysign(number(HALF_AT_MOST, x.device), codes))
    if not inverse.isfinite().all():
        codes.masked_fill_(~inverse.isfinite(), 0)
    return joined(half(scale), codes.to(torch.int8)).view(len(x), -1)


HALF_AT_MOST = 0.5 - 2 ** -25       # the largest float32 below a half: what is added before cutting, so that 0.49999997 stays 0

for _bits_a_code in (4, 5):
    encodes(f"Q{_bits_a_code}_0")(partial(_symmetric, bits=_bits_a_code))
    encodes(f"Q{_bits_a_code}_1")(partial(_with_minimum, bits=_bits_a_code))
