"""Four-bit floats times a power of two for 32 weights (MXFP4) or an eight-bit float for 16 (NVFP4); bitsandbytes' NF4 and FP4.

llama.cpp takes the scale from the largest magnitude: MXFP4's puts it between 4 and 8 where 6 is the largest there is, NVFP4's
at 6 (ggml-quants.c, quantize_row_mxfp4_ref and quantize_row_nvfp4_ref). It has no use for importances. A longer search tries
the scales about that one, and takes the one with the smallest squared error, each weight's times its importance. In MXFP4
SmolLM2-135M's KL divergence then is 0.44 in place of 0.55, with importances 0.35 (measured as `levels.counted` says).
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

from ..bnb import quantize_4bit
from ..fp4 import LEVELS, e4m3, e8m0
from . import encodes
from .levels import Levels, counted
from .searching import number, over

if TYPE_CHECKING:
    import torch

SIGNED = Levels((*LEVELS[:8:-1], *LEVELS[:8]))
BORDERS = tuple((low + high) / 2 for low, high in zip(LEVELS[:7], LEVELS[1:8], strict=True))    # on one the smaller is taken
NEAR_E8M0 = (1, -1, 2)              # steps from the usual scale's byte that are tried: doublings
NEAR_E4M3 = (*range(-8, 0), *range(1, 9))       # an eighth of an octave or so each


@encodes("MXFP4")
def _mxfp4(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    blocks, table = x.view(-1, 1, 32), e8m0(x.device)
    scales = _exponents(blocks.abs().amax(2))
    if effort == "high":
        scales = _best(blocks, importance, scales, table, NEAR_E8M0, 254)
    return _written(_codes_of_powers(blocks, table[scales.int()]), scales, x)


@encodes("NVFP4")
def _nvfp4(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    blocks, table = x.view(-1, 4, 16), e4m3(x.device)
    scales = _as_e4m3(blocks.abs().amax(2) / number(6, x.device))
    if effort == "high":
        scales = _best(blocks, importance, scales, table, NEAR_E4M3, 0x7E)
    return _written(_codes(blocks, table[scales.int()]), scales, x)


def _bitsandbytes(x: torch.Tensor, importance: torch.Tensor | None, effort: str, kind: str) -> torch.Tensor:
    import torch
    found = quantize_4bit(x, kind, importance=importance, effort=effort)
    return torch.cat([found.maxima.view(-1, 1).view(torch.uint8), found.packed.view(-1, 32)], 1).view(len(x), -1)


for _kind in ("nf4", "fp4"):
    encodes(_kind.upper())(partial(_bitsandbytes, kind=_kind))


def _best(blocks: torch.Tensor, importance: torch.Tensor | None, scales: torch.Tensor, table: torch.Tensor,
          near: tuple[int, ...], last: int) -> torch.Tensor:
    """Of each group's byte of scale, uint8 [n, groups], and those so many steps away, the one with the smallest error."""
    import torch
    columns = blocks.flatten(0, 1).t().contiguous()
    counts = counted(columns, importance)

    def errors(bytes: torch.Tensor) -> torch.Tensor:
        return SIGNED.errors(columns, counts, table.index_select(0, bytes))

    usual = best = scales.view(-1).int()
    found = errors(usual)
    for steps in near:
        tried = (usual + steps).clamp_(0, last)
        error = errors(tried)
        best, found = torch.where(error < found, tried, best), torch.minimum(error, found)
    return best.to(torch.uint8).view(scales.shape)


def _written(codes: torch.Tensor, scales: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Codes [n, groups, group] and a byte of scale for each group, uint8 [n, groups], as the formats lay them."""
    import torch
    low, high = codes.view(*scales.shape, 2, -1).unbind(2)
    return torch.cat([scales, (low | high << 4).flatten(1)], 1).view(len(x), -1)


def _codes(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Places in LEVELS of the nearest to each weight, uint8 [n, groups, group]; borders are exact. 0 where the scale is."""
    import torch
    scales = torch.where(scales > 0, scales, torch.inf)
    size, codes = blocks.abs(), torch.zeros_like(blocks, dtype=torch.uint8)
    for border in BORDERS:
        codes += (size > (border * scales)[..., None]).view(torch.uint8)
    return _with_signs(codes, blocks)


def _codes_of_powers(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The same for scales that are powers of two: what a weight is over its scale then is exact, and can be looked up."""
    import torch
    inverse = over(2, scales)
    if inverse.isinf().any():
        return _codes(blocks, scales)
    halves = (blocks.abs() * inverse[..., None]).ceil_().clamp_(max=2 * LEVELS[7]).to(torch.int32)
    return _with_signs(_half_table(blocks.device).index_select(0, halves.view(-1)).view(blocks.shape), blocks)


def _with_signs(codes: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    import torch
    return codes.add_(((blocks < 0) & (codes > 0)).view(torch.uint8), alpha=8)


@lru_cache
def _half_table(device: torch.device) -> torch.Tensor:
    """The code for each number of halves, rounded up."""
    import torch
    borders = 2 * torch.tensor(BORDERS)
    return torch.bucketize(torch.arange(2 * LEVELS[7] + 1).float(), borders).to(torch.uint8).to(device)


def _exponents(largest: torch.Tensor) -> torch.Tensor:
    """The byte of MXFP4's scale: 125 more than the largest's exponent, by a logarithm rounded to float32 as C's: just below 2^n
    it is n.

    A byte below zero (of weights below 2^-125) comes out as an x86's conversion has it, 256 more, and the codes zero; but for
    255, which is no scale.
    """
    import torch
    byte = torch.where(largest > 0, largest.double().log2().float().floor() + 125, 0).int() & 255
    return byte.masked_fill_(byte == 255, 0).to(torch.uint8)


def _as_e4m3(numbers: torch.Tensor) -> torch.Tensor:
    """The nearest eight-bit float (4 exponent bits, 3 mantissa bits, no sign), halves upward: its byte.

    From 248 on it is the largest, 448, as llama.cpp has it, and 15/2048 where 2^-7 would be nearer.
    """
    import torch
    bits = numbers.view(torch.int32)
    byte = (bits + (1 << 19) >> 20) - (120 << 3)        # half of what is cut off is added; it carries into the exponent
    byte = torch.where(byte >= 0x78, 0x7E, byte)
    small = (numbers * 512 + 0.5).int().clamp_(max=7)
    return torch.where(bits >> 23 <= 120, small, byte).to(torch.uint8)
