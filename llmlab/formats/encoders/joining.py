"""Parts of blocks, as numbers of any kind, one after the other in the blocks' bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def joined(*parts: torch.Tensor) -> torch.Tensor:
    """Parts [blocks, ...], each an even number of bytes a block -> uint8 [blocks, bytes]. Two bytes are moved at a time."""
    import torch
    pairs = [part.reshape(len(part), -1).contiguous().view(torch.uint8).view(torch.int16) for part in parts]
    return torch.cat(pairs, 1).view(torch.uint8)
