"""Blocks into a buffer that is there already, and what a format's blocks come apart into."""

from functools import cache
from typing import NamedTuple

import torch

from ..formats import FORMATS
from ..formats.bits import words
from ..formats.dequantizing import weights
from ..formats.plain import STORED


def unpack(blocks: torch.Tensor, type: str, out: torch.Tensor) -> torch.Tensor:
    """Fills `out` [rows, cols] with the weights of `blocks` [rows, row_bytes], all in one go: the caller minds the cache.

    float64 gets the float32 values.
    """
    layout = FORMATS[type]
    if layout.unpack is None:
        return out.copy_(words(blocks, getattr(torch, STORED[type])))
    if out.numel():
        weights(layout, blocks.reshape(-1, layout.block_bytes), out.view(-1, layout.block))
    return out


class Levels(NamedTuple):
    """What a format's codes are: weight = scale * code + offset, a scale for every `group` of the `block` weights."""

    low: int
    high: int
    block: int
    group: int
    offset: bool

    @property
    def middle(self) -> int:
        """The code that is taken for zero: half the levels lie below it."""
        return (self.low + self.high + 1) // 2


@cache
def levels(type: str) -> Levels | None:
    """The codes of a format, seen on a thousand blocks of every byte; None where they are no 8-bit integers."""
    layout = FORMATS[type]
    if layout.unpack is None:
        return None
    noise = torch.randint(0, 256, (1024, layout.block_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes, scale, offset = layout.unpack(noise)
    if codes.dtype != torch.int8:
        return None
    return Levels(int(codes.min()), int(codes.max()), layout.block, layout.block // scale.shape[1], offset is not None)


def apart(blocks: torch.Tensor, type: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows of blocks as codes int8 [rows, cols], scale and offset float32 [rows, groups] (offset may be None)."""
    layout, rows = FORMATS[type], blocks.shape[0]
    codes, scale, offset = layout.unpack(blocks.reshape(-1, layout.block_bytes))
    return codes.reshape(rows, -1), scale.reshape(rows, -1), None if offset is None else offset.reshape(rows, -1)
