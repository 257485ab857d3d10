"""Small steps that unpackers share: parts of blocks as words, four bytes shifted at once, half-precision scales."""

from __future__ import annotations

from functools import lru_cache
from math import gcd
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
    """Bytes [n, k] cut out of longer blocks, without gaps and on a boundary of 16; gathered in pieces as wide as they allow."""
    import torch
    wide = gcd(part.storage_offset(), part.stride(0), part.shape[1], 8) if part.stride(1) == 1 else 1
    wide = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[wide]
    # As one row, then cut anew: one block is contiguous as it lies, with the steps of longer ones.
    row = part.view(wide).contiguous().view(-1).view(torch.uint8)
    return (row.clone() if row.storage_offset() % 16 else row).view(part.shape)


def halves(part: torch.Tensor) -> torch.Tensor:
    """Half-precision numbers [n, 2k bytes] as float32 [n, k].

    Gathered first, as only what is contiguous is widened fast, and into whole vectors: torch widens what is left behind the
    last eight by other means, that make one NaN of all.
    """
    import torch
    half = packed(part).view(torch.int16)
    if short := -half.numel() % 32:
        whole = torch.cat([half.view(-1), half.new_zeros(short)]).view(torch.float16).float()
        return whole[:half.numel()].view(half.shape)
    return half.view(torch.float16).float()


def signed(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [n, ...] as int8 [n, block]; the same memory."""
    import torch
    return codes.view(torch.int8).flatten(1)


def apart(part: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [n, k] -> uint8 [8 / bits, n, k]: the lowest bits of every byte, then the next."""
    import torch
    return (packed(part).view(torch.int32) >> steps(tuple(range(0, 8, bits)), part.device)).bitwise_and_(
        ((1 << bits) - 1) * 0x01010101).view(torch.uint8)


@lru_cache
def steps(by: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """What [n, k] is shifted by to become [len(by), n, k]."""
    import torch
    return torch.tensor(by, dtype=torch.int32, device=device)[:, None, None]


def planes(part: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """Codes that share bytes: [n, k] -> uint8 [n, k / run, 8 / bits, run]. In every `run` bytes the lowest bits are the
    first `run` codes, the next bits the next.
    """
    return woven(apart(part, bits), run)


def woven(each: torch.Tensor, run: int) -> torch.Tensor:
    """Runs of bytes in turn from each plane: uint8 [planes, n, k] -> [n, k / run, planes, run].

    In pieces as wide as a number can be: what costs is the count of calls and of short loops, not that of bytes.
    """
    import torch
    wide = torch.complex128 if run % 16 == 0 else torch.int64 if run % 8 == 0 else torch.int32
    runs = each.view(wide).view(len(each), -1, run // wide.itemsize)
    return torch.stack(runs.unbind(), 1).view(torch.uint8).view(each.shape[1], -1, len(each), run)


def spread(part: torch.Tensor, bits: int, values: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes that lie one behind the other in a byte, lowest bits first: [n, k] -> uint8 [n, 8 k / bits]. In place of each code
    its entry in `values` (0 to 255), where given."""
    import torch
    table = _table(bits, values or tuple(range(1 << bits)), part.device)
    return table.index_select(0, packed(part).view(-1).int()).view(len(part), -1).view(torch.uint8)


@lru_cache
def _table(bits: int, values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """What each byte holds, as one int64 (8 codes of a bit), int32 (4 codes of two) or int16 (2 codes of four)."""
    import torch
    codes = (torch.arange(256)[:, None] >> torch.arange(0, 8, bits)) & ((1 << bits) - 1)
    codes = torch.tensor(values, dtype=torch.uint8)[codes]
    return codes.view({1: torch.int64, 2: torch.int32, 4: torch.int16}[bits]).flatten().to(device)


def levelled(part: torch.Tensor, levels: tuple[int, ...], run: int) -> torch.Tensor:
    """Bytes [n, k] of 4-bit places in a table of 16 levels, `run` low halves before their high ones -> int8 [n, 2 k]."""
    import torch
    index = words(part, torch.uint16).int()
    found = _fours(levels, part.device).index_select(0, index.view(-1))
    pairs = found.view(torch.int16).view(len(part), -1, run // 2, 2)
    return torch.stack(pairs.unbind(-1), 2).view(torch.int8).view(len(part), -1)


@lru_cache
def _fours(levels: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The levels in two bytes, int32 [65536]: of the low half of either byte, then of the high halves."""
    import torch
    word, table = torch.arange(1 << 16)[:, None], torch.tensor(levels, dtype=torch.int8)
    return table[word >> torch.tensor([0, 8, 4, 12]) & 15].view(torch.int32).flatten().to(device)
