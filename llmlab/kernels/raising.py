"""Packed pages as float32 numbers in a buffer: codes raised to what they stand for, a few passes over bytes in a cache."""

from functools import cache

import torch

from . import scratch
from .pages import BLOCK, PAGE, Pages, as_bytes_lie
from .rounding import levels_of

_FP8 = 2.0 ** 8         # what an e4m3 number's bits, taken for a float16's, are too small by: its exponent's bias is 7, not 15


def unpacked(pages: Pages, first: int, last: int, buffer: torch.Tensor, few: bool):
    """(numbers, scale, shift) of some pages. numbers: in `buffer`, [batch, pages, heads, head_dim, 256]; what they are to be
    multiplied by and what is then to be added, [batch, pages, heads, blocks, 256] each, or None. Cells of a quantized type lie
    as bytes do in all three."""
    codes, halves = pages.part(first, last)
    known, shape = pages.type, (*codes.shape[:3], pages.head_dim, PAGE)
    numbers = buffer[:codes.shape[0] * codes.shape[1] * codes.shape[2] * pages.head_dim * PAGE].view(shape)
    if not known.format:
        _numbers(codes, known.name, numbers)
        return numbers, None, None
    _raised(codes, known, blocks := numbers.unflatten(3, (-1, BLOCK)))
    scale, *least = (as_bytes_lie(half.float()) for half in halves)
    shift = least[0] if least else None
    if few:
        return numbers, scale, shift
    blocks.mul_(scale[..., None, :])
    if shift is not None:
        blocks.add_(shift[..., None, :])
    return numbers, None, None


def _numbers(codes: torch.Tensor, name: str, into: torch.Tensor) -> None:
    """Numbers of any dtype as float32. Those of eight bits by way of float16, of which they are the upper half but for the
    exponent's bias: torch converts them one by one."""
    if name != "fp8":
        into.copy_(codes)
        return
    wide = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4001)       # the sign came twice
    into.copy_(wide.view(torch.float16)).mul_(_FP8)


def _raised(codes: torch.Tensor, known, into: torch.Tensor) -> None:
    """uint8 [..., rows, 256] -> float32 [..., 32, 256]: what codes stand for before their scale."""
    if known.bits == 8:
        into.copy_(codes.view(torch.int8))
        return
    if known.name == "iq4_nl":
        low, high = _both_halves(codes.device)
        index = codes.to(torch.int32).view(-1)
        half = (*codes.shape[:-2], 16, PAGE)
        into[..., :16, :].copy_(low.index_select(0, index).view(half))
        into[..., 16:, :].copy_(high.index_select(0, index).view(half))
        return
    # Halves of bytes first, all of them in one buffer, then the fifth bits, then numbers: each a pass over bytes in a cache.
    whole = scratch.borrow(1, into.numel(), torch.uint8, codes.device).view(into.shape)
    pairs = codes[..., -16:, :]
    torch.bitwise_and(pairs, 15, out=whole[..., :16, :])
    torch.bitwise_right_shift(pairs, 4, out=whole[..., 16:, :])
    if known.bits == 5:
        fifth = torch.bitwise_right_shift(codes[..., :4, None, :], _bits(codes.device)).bitwise_and_(1).bitwise_left_shift_(4)
        whole.bitwise_or_(fifth.view(into.shape))
    if known.floats == 1:
        whole = whole.view(torch.int8).sub_(1 << known.bits - 1)
    into.copy_(whole)


@cache
def _bits(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)[:, None]


@cache
def _both_halves(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What the low and the high half of a byte stand for, [256] each."""
    levels, codes = levels_of(device), torch.arange(256, device=device)
    return levels[codes & 15].contiguous(), levels[codes >> 4].contiguous()
