"""Numbers: the weights unpacked for good in the type they are multiplied in, for cards with more room than time.

Sixteen bits a weight, read by one operation, take less time on a card than bytes that have to be unpacked first (`tinygemm` has
the sum).
"""

from collections.abc import Iterator

import torch

from . import scratch
from .compact import Compact
from .unpacking import unpack


class Numbers(Compact):
    """One matrix as numbers [rows, cols] of `dtype`, besides its blocks, which serve inputs of other types."""

    LEAVES = True

    def __init__(self, blocks: torch.Tensor, type: str, cols: int, dtype: torch.dtype):
        super().__init__(blocks, type, cols)
        self.numbers = torch.empty(self.rows, cols, dtype=dtype, device=blocks.device)
        step = scratch.rows_at_once(cols, blocks.device)
        for start in range(0, self.rows, step):
            unpack(blocks[start:start + step], type, self.numbers[start:start + step])

    def bytes(self) -> int:
        return self.numbers.nbytes

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, self.numbers.T) if x.dtype == self.numbers.dtype else super().matmul(x)

    def take(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.numbers.index_select(0, index) if dtype == self.numbers.dtype else super().take(index, dtype)

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        return iter([(0, self.numbers)]) if dtype == self.numbers.dtype else super().chunks(dtype)
