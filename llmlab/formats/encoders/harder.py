"""`effort="high"`: from what the usual search found on, a lower error in the same bytes.

Three moves, each kept only where the error, with every number as it will be stored, falls: scale and minimum solved by least
squares with the codes fixed, and the codes rounded anew, in turn (alternating least squares); many more starting scales, of
either sign; in K types each run's whole-number scale and minimum moved by one together, and the super-block's two float16
numbers solved for all its runs at once. What an error counts is the caller's weight: in K types what the usual search counts,
in blocks of 32 what `levels.counted` says.

Numbers are [n, ...] as elsewhere here: weight = scale * code - minimum, low <= code <= top. Sums are made in order, so that a
run's numbers depend on nothing beside it.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from .searching import in_order

if TYPE_CHECKING:
    import torch


PIECE = 1 << 16     # weights that are searched at a time: what is held of them stays in a core's cache


class Levels(NamedTuple):
    """The codes of a format, and whether there is a minimum: none, any ("free"), or one from zero on ("positive")."""

    low: int
    top: int
    minimum: str = ""


class Fit(NamedTuple):
    """Scale and minimum of each run (no minimum: zero), and the weighted squared error with them."""

    scale: torch.Tensor
    minimum: torch.Tensor
    error: torch.Tensor


def coded(x: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, levels: Levels) -> torch.Tensor:
    """The nearest codes; 0, or the nearest to it, where the scale is zero or next to it."""
    return _coded(x + minimum, scale, levels)


def _coded(above: torch.Tensor, scale: torch.Tensor, levels: Levels) -> torch.Tensor:
    import torch
    inverse = 1 / scale
    return (above * torch.where(inverse.isfinite(), inverse, 0)).round_().clamp_(levels.low, levels.top)


def tried(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, levels: Levels) -> Fit:
    """These scales and minima, with their errors."""
    above = x + minimum if levels.minimum else x
    off = _coded(above, scale, levels).mul_(scale).sub_(above)
    return Fit(scale, minimum, in_order(off.square_().mul_(weight)).nan_to_num_(float("inf")))


def lower(one: Fit, other: Fit) -> Fit:
    """Of each run the better of two."""
    import torch
    better = other.error < one.error
    return Fit(*(torch.where(better, new, old) for old, new in zip(one, other, strict=True)))


def stored(fit: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum as float16 has them; what it cannot hold is the largest it can (and hardly the best)."""
    return tuple(part.clamp(-65504, 65504).half().float() for part in fit[:2])


def solved(x: torch.Tensor, weight: torch.Tensor, codes: torch.Tensor, levels: Levels) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum with the smallest error for these codes."""
    import torch
    counted = weight * codes
    with_x, squares = in_order(counted * x), in_order(counted * codes)
    alone = torch.where(squares > 0, with_x / squares, 0)
    if not levels.minimum:
        return alone, torch.zeros_like(alone)
    ones, all_weight, all_x = in_order(counted), in_order(weight), in_order(weight * x)
    divisor = all_weight * squares - ones * ones
    scale, minimum = (all_weight * with_x - all_x * ones) / divisor, (ones * with_x - squares * all_x) / divisor
    usual = (divisor > 0) & (minimum >= 0 if levels.minimum == "positive" else divisor > 0)
    return torch.where(usual, scale, alone), torch.where(usual, minimum, 0)


def alternated(x: torch.Tensor, weight: torch.Tensor, found: Fit, levels: Levels, rounds: int, half: bool) -> Fit:
    """Codes for the scale and minimum, scale and minimum for the codes, and so on; as float16 has them where `half`."""
    for _ in range(rounds):
        new = solved(x, weight, coded(x, found.scale, found.minimum, levels), levels)
        found = lower(found, tried(x, weight, *(stored(new) if half else new), levels))
    return found


def searched(x: torch.Tensor, weight: torch.Tensor, found: Fit, levels: Levels, half: bool, starts: int = 24) -> Fit:
    """The best of many starting scales, each solved once, and that alternated further; x is [n, runs]."""
    import torch
    high, least = x.amax(0), x.amin(0)
    steps = levels.top - levels.low
    zero = torch.zeros_like(high)
    if levels.minimum:
        if levels.minimum == "positive":
            least = least.clamp(max=0)
        span = high - least
        for i in range(starts):
            # From a range wider than the weights to one that cuts off both ends.
            cut = -0.04 + 0.5 * i / starts / steps ** 0.25
            start = (span * ((1 - cut) / steps), -(least + span * cut / 2))
            found = _onwards(x, weight, found, start, levels, half)
    else:
        far = torch.maximum(high, -least)
        for i, side in product(range(starts // 2), (levels.low, -levels.low)):
            found = _onwards(x, weight, found, (far / (side * (0.75 + 0.5 * i / starts * 2)), zero), levels, half)
    return alternated(x, weight, found, levels, 3, half)


def runs(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, levels: Levels) -> Fit:
    """float16 scales and minima of runs [n, runs] with a smaller error than those given have, or those."""
    import torch
    step = max(1, PIECE // len(x))
    found = [searched(*(part.contiguous() for part in piece[:2]), tried(*piece, levels), levels, half=True)
             for piece in zip(*(part.split(step, -1) for part in (x, weight, scale, minimum)), strict=True)]
    return Fit(*(torch.cat(part) for part in zip(*found, strict=True)))


def _onwards(x: torch.Tensor, weight: torch.Tensor, found: Fit, start: tuple, levels: Levels, half: bool) -> Fit:
    new = solved(x, weight, coded(x, *start, levels), levels)
    return lower(found, tried(x, weight, *(stored(new) if half else new), levels))


# ---- K types: whole-number scales and minima of runs, times two float16 numbers of the super-block ---------

class Shared(NamedTuple):
    """What a super-block holds besides codes: `outer` [2, super-blocks], float16 scale and minimum; `inner` [2, runs,
    super-blocks], whole numbers; and each run's error [runs, super-blocks]."""

    outer: torch.Tensor
    inner: torch.Tensor
    error: torch.Tensor


def super_blocks(x: torch.Tensor, weight: torch.Tensor, outer: torch.Tensor, inner: torch.Tensor, alone: torch.Tensor,
                 levels: Levels, least: int, most: int) -> Shared:
    """Super-blocks' numbers with a smaller error than `outer` and `inner` have, or those. x, weight: [n, runs, super-blocks];
    `inner` lies in least ... most; `alone`, [2, runs, super-blocks], is what a search found for each run by itself."""
    import torch
    step = max(1, PIECE // x[..., 0].numel())
    pieces = zip(*(part.split(step, -1) for part in (x, weight, outer, inner, alone)), strict=True)
    found = [_super_blocks(*(part.contiguous() for part in piece), levels, least, most) for piece in pieces]
    return Shared(*(torch.cat(part, -1) for part in zip(*found, strict=True)))


def _super_blocks(x: torch.Tensor, weight: torch.Tensor, outer: torch.Tensor, inner: torch.Tensor, alone: torch.Tensor,
                  levels: Levels, least: int, most: int) -> Shared:
    import torch
    flat, counts = x.view(len(x), -1), weight.view(len(x), -1)
    runs = searched(flat, counts, tried(flat, counts, *alone.view(2, -1), levels), levels, half=False)
    wanted = torch.stack(runs[:2]).view(alone.shape)
    best = _descended(x, weight, _measured(x, weight, outer, inner, levels), levels, least, most)
    edge, reach = wanted.amax(1), most
    if least < 0:       # the farthest from zero gets the lowest number, one further than the highest
        lowest = wanted.amin(1)
        edge, reach = torch.where(-lowest > edge, lowest, edge), least
    for share in SHARES:
        outer = (edge / (reach * share)).clamp_(-65504, 65504).half().float()
        inner = (wanted / torch.where(outer != 0, outer, torch.inf)[:, None]).round_().clamp_(least, most)
        new = _descended(x, weight, _measured(x, weight, outer, inner, levels), levels, least, most)
        best = _lower_sum(best, new)
    for _ in range(2):
        best = _descended(x, weight, best, levels, least, most)
    return best


SHARES = (1.0, 0.97, 0.93, 0.86)        # of the largest whole number that the largest scale gets, to begin with


def _measured(x: torch.Tensor, weight: torch.Tensor, outer: torch.Tensor, inner: torch.Tensor, levels: Levels) -> Shared:
    return Shared(outer, inner, tried(x, weight, *(outer[:, None] * inner), levels).error)


def _lower_sum(one: Shared, other: Shared) -> Shared:
    """Of each super-block the better of two."""
    import torch
    better = in_order(other.error) < in_order(one.error)
    return Shared(*(torch.where(better, new, old) for old, new in zip(one, other, strict=True)))


def _descended(x: torch.Tensor, weight: torch.Tensor, best: Shared, levels: Levels, least: int, most: int) -> Shared:
    """Whole numbers moved by one, each run's by themselves, then the float16 pair solved."""
    import torch
    centre = best.inner
    for move in product((-1, 0, 1), (-1, 0, 1) if levels.minimum else (0,)):
        if any(move):
            step = torch.tensor(move, dtype=torch.float32, device=x.device)[:, None, None]
            new = _measured(x, weight, best.outer, (centre + step).clamp_(least, most), levels)
            better = new.error < best.error
            best = best._replace(inner=torch.where(better, new.inner, best.inner),
                                 error=torch.where(better, new.error, best.error))
    return _lower_sum(best, _measured(x, weight, _outer(x, weight, best, levels), best.inner, levels))


def _outer(x: torch.Tensor, weight: torch.Tensor, best: Shared, levels: Levels) -> torch.Tensor:
    """The float16 pair with the smallest error for these codes and whole numbers, by least squares over all runs."""
    import torch
    scales, minima = best.inner
    codes = coded(x, *(best.outer[:, None] * best.inner), levels)
    counted = weight * codes
    with_x, squares = in_order(scales * in_order(counted * x)), in_order(scales * scales * in_order(counted * codes))
    alone = torch.where(squares > 0, with_x / squares, best.outer[0])
    if not levels.minimum:
        return torch.stack([alone.clamp(-65504, 65504).half().float(), best.outer[1]])
    both = in_order(scales * minima * in_order(counted))
    minima_x, minima_squares = in_order(minima * in_order(weight * x)), in_order(minima * minima * in_order(weight))
    divisor = squares * minima_squares - both * both
    scale = (with_x * minima_squares - minima_x * both) / divisor
    minimum = (with_x * both - minima_x * squares) / divisor
    usual = (divisor > 0) & (minimum >= 0) & (scale > 0)
    pair = torch.stack([torch.where(usual, scale, best.outer[0]), torch.where(usual, minimum, best.outer[1])])
    return pair.clamp_(-65504, 65504).half().float()
