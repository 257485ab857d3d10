"""K types as llama.cpp writes them: a search for each run's scale (and minimum), those quantized in turn, then the codes.

Numbers are held as [n, runs, super-blocks], n the weights of a run, so that each step does all runs at once. What an error
counts: without importances a number that grows with the weight, with them importance x sqrt(2 or 1 x mean square of the
super-block + weight^2). Algorithms: ggml's ggml-quants.c (quantize_row_q*_K_ref, _impl).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from . import encodes, harder
from .harder import Levels
from .joining import joined
from .searching import (
    NOTHING,
    Affine,
    Symmetric,
    affine,
    half,
    in_order,
    largest,
    number,
    over,
    positive,
    refined,
    root_,
    symmetric,
)

if TYPE_CHECKING:
    import torch

BLOCK = 256


# ---- rows <-> runs as columns ---------------------------------------------------------------------------

def _runs(x: torch.Tensor, n: int) -> torch.Tensor:
    """[rows, cols] -> [n, 256 / n, super-blocks], contiguous."""
    return x.view(-1, BLOCK // n, n).permute(2, 1, 0).contiguous()


def _flat(codes: torch.Tensor) -> torch.Tensor:
    """float32 codes [n, runs, super-blocks] -> uint8 [super-blocks, 256]."""
    import torch
    return codes.to(torch.int8).view(torch.uint8).permute(2, 1, 0).reshape(-1, BLOCK)


def _weighed(x: torch.Tensor, runs: torch.Tensor, importance: torch.Tensor, times: int) -> torch.Tensor:
    """importance x sqrt(times x mean square of the super-block + weight^2), [n, runs, super-blocks]."""
    n = len(runs)
    mean = in_order((x * x).view(-1, BLOCK).t().contiguous())
    mean = mean * times / number(BLOCK, x.device)
    each = root_((runs * runs).add_(mean))
    matters = importance.view(-1, BLOCK // n, n).permute(2, 1, 0)[:, :, None]      # the same for every row
    return each.view(n, BLOCK // n, len(x), -1).mul_(matters).view(runs.shape)


def _together(codes: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """The lowest `bits` of codes [super-blocks, 256] -> bytes: in every `run` of them the lowest bits are the first codes'.

    Eight at a time: the other way round is bits.planes.
    """
    import torch
    count = 8 // bits
    eights = codes.view(torch.int64).view(len(codes), -1, count, run // 8) & (((1 << bits) - 1) * 0x0101010101010101)
    out = eights[:, :, 0]
    for plane in range(1, count):
        out = out | eights[:, :, plane] << bits * plane
    return out.contiguous().view(torch.uint8).view(len(codes), -1)


def _six_bits(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """Eight scales and eight minima below 64, [8, super-blocks] -> 12 bytes each, uint8 [super-blocks, 12]."""
    import torch
    scales, minima = scales.to(torch.uint8), minima.to(torch.uint8)
    return torch.cat([scales[:4] | scales[4:] >> 4 << 6, minima[:4] | minima[4:] >> 4 << 6,
                      scales[4:] & 15 | minima[4:] << 4]).t()


def _sixteen_of_six_bits(scales: torch.Tensor) -> torch.Tensor:
    """Sixteen scales below 64, [16, super-blocks] -> 12 bytes each."""
    import torch
    scales = scales.to(torch.uint8)
    high = scales.view(4, 4, -1) >> 4
    return torch.cat([scales[:8] & 15 | scales[8:] << 4, high[0] | high[1] << 2 | high[2] << 4 | high[3] << 6]).t()


# ---- with minima: Q2_K, Q4_K, Q5_K ----------------------------------------------------------------------

def _nearest(runs: torch.Tensor, found: Affine, scale: torch.Tensor, minimum: torch.Tensor, top: int) -> torch.Tensor:
    """Codes for the scales and minima as they are stored, [runs, super-blocks]; where a scale is zero those of the search."""
    codes = ((runs + minimum) / scale).round_().clamp_(0, top).view(len(runs), -1)
    return _left(codes, runs, found, scale, top)


def _left(codes: torch.Tensor, runs: torch.Tensor, found: Affine | Symmetric, scale: torch.Tensor, top: int) -> torch.Tensor:
    nothing = (scale == 0).view(-1).nonzero()[:, 0]
    if len(nothing):
        codes[:, nothing] = found.at(nothing).codes(runs.view(len(runs), -1)[:, nothing], top)
    return codes.view(runs.shape)


def _shared(numbers: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[runs, super-blocks] from zero on -> the scale that gives the largest code `most`, and the codes."""
    import torch
    high = numbers.amax(0).clamp_(min=0).add_(0.0)      # -0 + 0 is 0
    inverse = over(most, high)
    codes = (torch.where(inverse.isfinite(), inverse, 0) * numbers).round_().clamp_(0, most)
    return high / number(most, high.device), codes


def _affine(x: torch.Tensor, importance: torch.Tensor | None, effort: str, bits: int) -> torch.Tensor:
    import torch
    n, top, most, plain, times = _AFFINE[bits]
    runs = _runs(x, n)
    if importance is None:
        size = runs.abs()
        weight = size if bits == 2 else size.add_(root_(in_order(runs * runs) / number(n, x.device)))
        found = affine(runs.view(n, -1), top, weight.view(n, -1), *plain, absolute=bits == 2)
        (scale, scales), (minimum, minima) = (_shared(part.view(BLOCK // n, -1), most) for part in found[:2])
    else:
        weight = _weighed(x, runs, importance, times)
        found = affine(runs.view(n, -1), top, weight.view(n, -1), -0.9, 0.05, 36)
        counts = in_order(weight)
        both = torch.cat([part.view(BLOCK // n, -1) for part in found[:2]], 1)
        both, codes = positive(both, most, torch.cat([counts, counts], 1))
        (scale, minimum), (scales, minima) = both.chunk(2), codes.chunk(2, 1)
    stored = half(torch.stack([scale, minimum], 1))
    if effort == "high":
        weight = _evenly(runs) if importance is None and bits == 2 else weight
        stored, scales, minima = _harder(runs, weight, stored, torch.stack([scales, minima]), torch.stack(found[:2]),
                                         Levels(0, top, "positive"), 0, most)
    scale, minimum = stored.float().unbind(1)
    codes = _flat(_nearest(runs, found, scale * scales, minimum * minima, top))
    if bits == 2:
        return joined((scales + 16 * minima).to(torch.uint8).t(), _together(codes, 2, 32), stored).view(len(x), -1)
    head = [stored, _six_bits(scales, minima)]
    if bits == 5:
        return joined(*head, _together(codes >> 4, 1, 32), _together(codes, 4, 32)).view(len(x), -1)
    return joined(*head, _together(codes, 4, 32)).view(len(x), -1)


def _evenly(runs: torch.Tensor) -> torch.Tensor:
    """What an error counts in a longer search without importances, where the usual one counts weight^2 or |weight| alone and
    so gives small weights away: with the super-block's mean square beside it both ways of counting find less."""
    squares = runs * runs
    return squares + in_order(in_order(squares)) / BLOCK


def _harder(runs: torch.Tensor, weight: torch.Tensor, stored: torch.Tensor, inner: torch.Tensor, alone: torch.Tensor,
            levels: Levels, least: int, most: int) -> tuple[torch.Tensor, ...]:
    """float16 numbers and whole ones with a smaller error than those given have: scales alone, or scales and minima.

    `stored` is [super-blocks] or [super-blocks, 2], `inner` [runs, super-blocks] or two of them, `alone` what the search found
    for each run, [runs x super-blocks] or two of them.
    """
    import torch
    count, minima = runs.shape[2], bool(levels.minimum)
    outer, inner, alone = ((part if minima else torch.stack([part, torch.zeros_like(part)])).view(2, -1, count)
                           for part in (stored.float().t(), inner, alone))
    best = harder.super_blocks(runs, weight, outer[:, 0], inner, alone, levels, least, most)
    return (best.outer.t().half(), *best.inner) if minima else (best.outer[0].half(), best.inner[0])


# bits: weights of a run, highest code, highest block scale, the search without importances (start, step, steps), factor of the
# super-block's mean square in what an error counts with them
_AFFINE = {2: (16, 3, 15, (-0.5, 0.1, 15), 1), 4: (32, 15, 63, (-1.0, 0.1, 20), 2), 5: (32, 31, 63, (-0.5, 0.1, 15), 2)}
for _bits in _AFFINE:
    encodes(f"Q{_bits}_K")(partial(_affine, bits=_bits))


# ---- symmetric: Q3_K, Q6_K ------------------------------------------------------------------------------

@encodes("Q6_K")
def _q6_k(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    import torch
    runs = _runs(x, 16)
    flat = runs.view(16, -1)
    if importance is None:
        weight = flat * flat
    else:
        weight = importance.view(-1, 16, 16).permute(2, 1, 0)[:, :, None].expand(16, 16, len(x), -1).reshape(16, -1)
    found = symmetric(flat, 32, weight)
    scales = found.scale.view(16, -1)
    far = largest(scales)
    some = far.abs() >= NOTHING
    inverse = torch.where(some, over(-128, torch.where(some, far, 1)), 0)
    stored = half(torch.where(some, over(1, inverse), 0))
    scales = (inverse * scales).round_().clamp_(-128, 127)
    if effort == "high":
        weight = _evenly(runs) if importance is None else weight.view(runs.shape)
        stored, scales = _harder(runs, weight, stored, scales, found.scale, Levels(-32, 31), -128, 127)
    scale = stored.float() * scales
    codes = (runs / scale).round_().clamp_(-32, 31).add_(32).view(16, -1)
    codes = _flat(_left(codes, runs, found, scale, 32).mul_(some))
    return joined(_together(codes, 4, 64), _together(codes >> 4, 2, 32), scales.to(torch.int8).t(), stored).view(len(x), -1)


@encodes("Q3_K")
def _q3_k(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    import torch
    runs = _runs(x, 16)
    flat = runs.view(16, -1)
    if importance is None:
        far, weight = largest(flat), runs * runs
        some = far.abs() >= NOTHING
        left = (flat * over(-4, torch.where(some, far, 1))).round_().clamp_(-4, 3)
        alone = torch.where(some, refined(flat, weight.view(16, -1), left, -4, 3, strict=False), 0)
        left = torch.where(some, left.add_(4), 0)
        block = alone.view(16, -1)
        far = largest(block)
        inverse = torch.where(far != 0, over(-32, far), 0)
        scales = torch.where(far != 0, (inverse * block).round_().clamp_(-32, 31), -32)
        stored = half(torch.where(far != 0, over(1, inverse), 0))
    else:
        weight = _weighed(x, runs, importance, 2)
        found = symmetric(flat, 4, weight.view(16, -1))
        alone, left = found.scale, found.codes(flat, 4)
        block = alone.view(16, -1)
        both = symmetric(block, 32, in_order(weight))
        scales, stored = both.codes(block, 32).sub_(32), half(both.scale)
    if effort == "high":
        weight = _evenly(runs) if importance is None else weight
        stored, scales = _harder(runs, weight, stored, scales, alone, Levels(-4, 3), -32, 31)
    scale = stored.float() * scales
    codes = (runs / scale).round_().clamp_(-4, 3).add_(4).view(16, -1)
    codes = _flat(torch.where(scale.view(-1) == 0, left, codes).view(runs.shape))
    return joined(_together(codes >> 2, 1, 32), _together(codes, 2, 32), _sixteen_of_six_bits(scales + 32),
                  stored).view(len(x), -1)
