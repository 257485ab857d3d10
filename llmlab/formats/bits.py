"""Small steps that unpackers share: parts of blocks as words, four bytes shifted at once, half-precision scales."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def words(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes [..., k] of blocks as wider numbers; copied only where they do not lie on such a boundary."""
    size = dtype.itemsize
    if part.storage_offset() % size or any(step % size for step in part.stride()[:-1]) or part.stride(-1) != 1:
        part = part.clone(memory_format=_contiguous())
    return part.view(dtype)


def _contiguous():
    import torch
    return torch.contiguous_format


def packed(part: torch.Tensor) -> torch.Tensor:
    """Bytes [n, k] cut out of longer blocks, without gaps and on a boundary of 16."""
    part = part.contiguous()        # one block is contiguous as it lies, with the steps of longer ones
    return part.clone(memory_format=_contiguous()) if part.storage_offset() % 16 or part.stride(0) % 16 else part


def halves(part: torch.Tensor) -> torch.Tensor:
    """Half-precision numbers [n, 2k bytes] as float32 [n, k].

    Gathered first, as only what is contiguous is widened fast, and into whole vectors: torch widens what is left behind the
    last eight by other means, that make one NaN of all.
    """
    import torch
    half = words(part, torch.int16)
    room = torch.zeros(-(-half.numel() // 32) * 32, dtype=torch.int16, device=part.device)
    room[:half.numel()].view(half.shape).copy_(half)
    return room.view(torch.float16).float()[:half.numel()].view(half.shape)


def signed(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [n, ...] as int8 [n, block]; the same memory."""
    import torch
    return codes.view(torch.int8).flatten(1)


def apart(part: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [n, k] -> uint8 [8 / bits, n, k]: the lowest bits of every byte, then the next."""
    import torch
    word = packed(part).view(torch.int32)
    out = torch.empty(8 // bits, *word.shape, dtype=torch.int32, device=part.device)
    for i, plane in enumerate(out):
        torch.bitwise_right_shift(word, i * bits, out=plane)
    return out.bitwise_and_(((1 << bits) - 1) * 0x01010101).view(torch.uint8)


def planes(part: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """Codes that share bytes: [n, k] -> uint8 [n, k / run, 8 / bits, run]. In every `run` bytes the lowest bits are the
    first `run` codes, the next bits the next.

    All bytes are shifted at once, then each plane goes to its place in pieces as wide as a number can be: what costs is the
    count of calls and of short loops, not that of bytes.
    """
    import torch
    wide = torch.complex128 if run % 16 == 0 else torch.int64 if run % 8 == 0 else torch.int32
    out = torch.empty(len(part), part.shape[1] // run, 8 // bits, run, dtype=torch.uint8, device=part.device)
    target = out.view(wide).view(-1, 8 // bits, run // wide.itemsize)
    for i, plane in enumerate(apart(part, bits).view(wide)):
        target[:, i] = plane.view(-1, run // wide.itemsize)
    return out


def spread(part: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes that lie one behind the other in a byte, lowest bits first: [n, k] -> uint8 [n, 8 k / bits]."""
    import torch
    index = part.to(torch.int32)
    return _table(bits, part.device).index_select(0, index.view(-1)).view(len(part), -1).view(torch.uint8)


@lru_cache
def _table(bits: int, device: torch.device) -> torch.Tensor:
    """What each byte holds, as one int64 (8 codes of a bit) or int32 (4 codes of two)."""
    import torch
    codes = (torch.arange(256)[:, None] >> torch.arange(0, 8, bits)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).view({1: torch.int64, 2: torch.int32, 4: torch.int16}[bits]).flatten().to(device)
