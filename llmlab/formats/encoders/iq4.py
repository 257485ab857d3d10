"""IQ4_NL and IQ4_XS: a scale for 32 weights, each of which takes the nearest of 16 uneven levels.

llama.cpp tries fifteen scales a group and takes for each the one that fits its codes best by least squares, a weight's error
weighed by its own square, or by `importance` times its distance from zero (ggml-quants.c, quantize_row_iq4_nl_impl). A longer
search puts the largest weight at a hundred places, on either side of the levels, as these are not symmetric.

A group is a column: all lies as [32, groups, blocks].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..iq4 import LEVELS
from . import encodes
from .joining import joined
from .levels import Levels, both_sides, counted, inverse_of
from .searching import NOTHING, half, in_order, largest, number, over, root_

if TYPE_CHECKING:
    import torch

TABLE = Levels(LEVELS, both_sides(60, 250))
TRIES = range(-7, 8)        # where the largest weight may lie beside the lowest level
LOWEST = 32                 # IQ4_XS: block scales are -32 to 31 steps
FEWEST = 20                 # what the largest block scale is tried to be at least


@encodes("IQ4_NL")
def _iq4_nl(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    groups, weights = _laid(x, importance, 1)
    scale = _scales(groups, weights)
    if effort == "high":
        weights = counted(groups, importance)
        scale = _better(groups, weights, half(scale).float(), half(TABLE.best_scales(groups, weights, scale)).float())
    return joined(half(scale[0]), _nibbles(TABLE.codes(groups, inverse_of(scale)))).view(len(x), -1)


@encodes("IQ4_XS")
def _iq4_xs(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    groups, weights = _laid(x, importance, 8)
    scales = _scales(groups, weights)
    scale = -largest(scales) / LOWEST
    stored = half(scale)
    steps = _steps(scales, scale)
    if effort == "high":
        weights = counted(groups, importance)
        scale, steps = _best_steps(groups, weights, TABLE.best_scales(groups, weights, scales), stored.float(), steps)
        stored = half(scale)
    codes = TABLE.codes(groups, inverse_of(steps * scale))
    return joined(stored, *_sixes(steps), _nibbles(codes)).view(len(x), -1)


def _laid(x: torch.Tensor, importance: torch.Tensor | None, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights as [32, groups, blocks], and how much each one's error counts."""
    laid = x.view(-1, groups, 32).permute(2, 1, 0).contiguous()
    squares = laid.square()
    if importance is None:
        return laid, squares
    mean = in_order(squares.transpose(0, 1).reshape(32 * groups, -1)).mul_(2 / (32 * groups))
    counts = importance.view(-1, groups, 32).permute(2, 1, 0)[:, :, None]
    weights = root_(squares.add_(mean)).view(32, groups, len(x), -1).mul_(counts)
    return laid, weights.view(laid.shape)


def _scales(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The scale that llama.cpp's search finds for each group: [groups, blocks], 0 where all is nothing."""
    import torch
    far = largest(x.flatten(1)).view(x.shape[1:])
    some = far.abs() >= NOTHING
    far = torch.where(some, far, 1)
    with_x, squares = TABLE.sums(x, weights, over(1, far / number(-LEVELS[0], x.device)))
    scale = torch.where(squares > 0, with_x / squares, 0)
    best = scale * with_x
    for step in TRIES:
        with_x, squares = TABLE.sums(x, weights, over(LEVELS[0] + step, far))
        better = (squares > 0) & (with_x * with_x > best * squares)
        found = with_x / squares
        scale = torch.where(better, found, scale)
        best = torch.where(better, found * with_x, best)
    return torch.where(some, scale, 0)


def _better(x: torch.Tensor, weights: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of two scales of a group the one with the smaller error."""
    import torch
    return torch.where(TABLE.errors(x, weights, other) < TABLE.errors(x, weights, one), other, one)


def _steps(scales: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (scales * inverse_of(scale)).round_().clamp_(-LOWEST, LOWEST - 1)


def _best_steps(x: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, scale: torch.Tensor,
                steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A scale for each block, [blocks], and steps of its groups, [8, blocks], that err less than those given.

    They come close to `scales`: the largest of a block is tried at each step from -32 to -20, then each group's neighbouring
    steps, then the scale that fits all codes best.
    """
    import torch
    error = TABLE.errors(x, weights, steps * scale)

    def take(new: torch.Tensor, tried: torch.Tensor) -> None:
        nonlocal scale, steps, error
        found = TABLE.errors(x, weights, tried * new)
        better = found.sum(0) < error.sum(0)
        scale, steps, error = (torch.where(better, *each) for each in ((new, scale), (tried, steps), (found, error)))

    for lowest in range(LOWEST, FEWEST - 1, -1):
        new = half(-largest(scales) / lowest).float()
        take(new, _steps(scales, new))
    for _ in range(2):
        for move in (-1, 1):
            tried = (steps + move).clamp_(-LOWEST, LOWEST - 1)
            found = TABLE.errors(x, weights, tried * scale)
            steps, error = torch.where(found < error, tried, steps), torch.minimum(found, error)
        with_x, squares = TABLE.sums(x, weights, inverse_of(steps * scale))
        divisor = (squares * steps.square()).sum(0)
        fit = torch.where(divisor > 0, (with_x * steps).sum(0) / divisor, scale)
        take(half(fit).float(), steps)
    return scale, steps


# ---- bytes ------------------------------------------------------------------------------------------------

def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes [32, groups, blocks] -> [blocks, groups * 16]: the first 16 of a group in the low halves."""
    pairs = codes[:16] | codes[16:] << 4
    return pairs.permute(2, 1, 0).reshape(codes.shape[2], -1)


def _sixes(steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps of -32..31, [8, blocks], plus 32: their two high bits [blocks, 2] and their low halves [blocks, 4]."""
    import torch
    codes = (steps + LOWEST).to(torch.uint8).t()
    pairs = codes.reshape(-1, 4, 2)
    low = pairs[..., 0] & 15 | pairs[..., 1] << 4
    fours = codes.reshape(-1, 2, 4) >> 4
    high = fours[..., 0] | fours[..., 1] << 2 | fours[..., 2] << 4 | fours[..., 3] << 6
    return high, low
