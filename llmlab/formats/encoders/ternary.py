"""Formats of two, three or four levels: Q1_0 (-1, 1), TQ1_0 and TQ2_0 (-1, 0, 1), Q2_0 (-1, 0, 1, 2), times a scale.

They are for models trained to such weights: llama.cpp makes the largest magnitude the scale, which then is exact (the mean
magnitude for Q1_0; ggml-quants.c, quantize_row_tq1_0_ref and its neighbours). It has no use for importances. A longer search
finds the scale with the smallest squared error, each weight's times its importance: of TQ1_0 and TQ2_0 the best there is.

No other model survives them: beside normal weights TQ2_0 is off by 81 % in root mean square, at best by 43 %. Measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import encodes
from .joining import joined
from .levels import Levels, both_sides, counted, inverse_of
from .searching import half, in_order, number, over

if TYPE_CHECKING:
    import torch

FOUR = Levels((-1, 0, 1, 2), both_sides(0.6, 8))
HALF = 0.5      # from here on away from zero is the next level: C's roundf


@encodes("TQ1_0")
def _tq1_0(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    scale, digits = _ternary(x, importance, effort)
    return joined(*(_fives(part) for part in (digits[:, :160].view(-1, 5, 32), digits[:, 160:240].view(-1, 5, 16),
                                              digits[:, 240:].view(-1, 4, 4))), scale).view(len(x), -1)


@encodes("TQ2_0")
def _tq2_0(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    scale, digits = _ternary(x, importance, effort)
    return joined(_twos(digits.view(-1, 2, 4, 32)), scale).view(len(x), -1)


@encodes("Q1_0")
def _q1_0(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    import torch
    blocks = x.view(-1, 128)
    size = blocks.abs().t().contiguous()
    scale = in_order(size) / number(128, x.device)     # without importances there is none better
    if effort == "high" and importance is not None:
        counts = counted(size, importance)
        whole = counts.sum(0)
        scale = torch.where(whole > 0, (size * counts).sum(0) / whole, scale)
    return joined(half(scale), _eights(blocks >= 0)).view(len(x), -1)


@encodes("Q2_0")
def _q2_0(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    import torch
    blocks = x.view(-1, 64)
    scale = blocks.abs().amax(1)
    if effort == "high":
        columns = blocks.t().contiguous()
        counts = counted(columns, importance)
        usual, found = half(scale).float(), half(FOUR.best_scales(columns, counts, scale)).float()
        scale = torch.where(FOUR.errors(columns, counts, found) < FOUR.errors(columns, counts, usual), found, usual)
        digits = FOUR.codes(columns, inverse_of(scale)).t()
    else:
        digits = _digits(blocks, scale)
        digits.masked_fill_((over(1, scale).isinf() & (scale > 0))[:, None], 0)      # what C makes of infinity
    return joined(half(scale), _twos(digits.reshape(-1, 16, 4, 1))).view(len(x), -1)


def _ternary(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale of each block, float16, and uint8 codes 0, 1, 2 of its weights."""
    import torch
    blocks = x.view(-1, 256)
    scale = blocks.abs().amax(1)
    if effort == "high":
        counts = counted(blocks.t(), importance).t()
        usual, found = half(scale).float(), half(_best_ternary(blocks, counts)).float()
        scale = torch.where(_error(blocks, counts, found) < _error(blocks, counts, usual), found, usual)
    return half(scale), _digits(blocks, scale)


def _best_ternary(blocks: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The scale with the smallest error: whatever it is, the weights that are not zero are the largest so many.

    If these are k, the scale is their mean and lowers the error by (their sum)^2 / k (with importances, both weighed): so all
    k from 1 to 256 are looked at.
    """
    import torch
    size, order = blocks.abs().sort(1, descending=True)
    count = counts.gather(1, order).double()
    sums, whole = (size * count).cumsum(1), count.cumsum(1)
    means = torch.where(whole > 0, sums / whole, 0)
    return means.gather(1, (means * sums).argmax(1, keepdim=True))[:, 0].float()


def _error(blocks: torch.Tensor, counts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    off = (_digits(blocks, scale).float() - 1).mul_(scale[:, None]).sub_(blocks)
    return off.square_().mul_(counts).sum(1)


def _digits(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """0, 1 or 2: which of -scale, 0, scale is nearest to each weight; uint8. 1 where the scale has no finite inverse."""
    import torch
    inverse = over(1, scale)
    shares = blocks * torch.where(inverse.isfinite(), inverse, 0)[:, None]
    return (shares > -HALF).view(torch.uint8) + (shares >= HALF).view(torch.uint8)


# ---- bytes ------------------------------------------------------------------------------------------------

def _fives(digits: torch.Tensor) -> torch.Tensor:
    """Base-3 digits [blocks, 4 or 5, n], the first the highest -> the smallest bytes of which 256ths they are the start."""
    import torch
    number = torch.zeros_like(digits[:, 0], dtype=torch.int32)
    for digit in digits.unbind(1):
        number = number * 3 + digit
    if digits.shape[1] == 4:
        number *= 3
    return ((number * 256 + 242) // 243).to(torch.uint8)


def _twos(digits: torch.Tensor) -> torch.Tensor:
    """[blocks, m, 4, n] of two bits each -> bytes [blocks, m, n], the first the lowest."""
    first, second, third, fourth = digits.unbind(2)
    return first | second << 2 | third << 4 | fourth << 6


def _eights(bits: torch.Tensor) -> torch.Tensor:
    """Truths [blocks, n] -> bytes [blocks, n / 8], the first the lowest bit. A product gathers eight of them in one byte."""
    import torch
    return (bits.view(torch.uint8).view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)
