"""Compact: the GGUF bytes themselves, unpacked a cache-sized chunk of rows at a time into scratch, then multiplied.

Nothing is kept but the blocks, which may be pages of the mapped file. Several tokens share each unpacking.
"""

from collections.abc import Iterator

import torch

from .. import formats
from ..formats.plain import STORED
from . import scratch
from .arithmetic import multiply_in
from .unpacking import unpack


class Compact:
    """One matrix as blocks: uint8 [rows, row_bytes] of format `type`, [rows, cols] weights.

    It multiplies on the `device` where the blocks were when it was made. A kind that seldom reads them (`LEAVES`) may have them
    taken to another one afterwards; they come back a chunk at a time.
    """

    LEAVES = False

    def __init__(self, blocks: torch.Tensor, type: str, cols: int):
        self.blocks, self.type, self.rows, self.cols, self.device = blocks, type, blocks.shape[0], cols, blocks.device
        self.plain = _as_numbers(blocks, STORED.get(type))

    def bytes(self) -> int:
        """What is held besides the blocks."""
        return 0

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, cols] times the weights' transpose -> [tokens, rows] in x.dtype."""
        dtype = multiply_in(x.dtype, x.device.type)
        y = x.new_empty(x.shape[0], self.rows)
        direct, x = dtype == x.dtype, x.to(dtype)
        for start, weights in self.chunks(dtype):
            part = y[:, start:start + weights.shape[0]]
            if direct:
                torch.mm(x, weights.T, out=part)
            else:
                part.copy_(torch.mm(x, weights.T))
        return y

    def matmul_each(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, cols] -> [tokens, rows], each row to the bit as `matmul` of it alone gives it; where that unpacks the
        weights, they are unpacked once for all of them."""
        lone = [row.clone() for row in x.split(1)]       # in memory of its own: what a sum is may depend on where it begins
        if type(self).matmul is not Compact.matmul:
            return torch.cat([self.matmul(row) for row in lone])
        dtype = multiply_in(x.dtype, x.device.type)
        found, direct = [x.new_empty(1, self.rows) for _ in lone], dtype == x.dtype
        lone = [row.to(dtype) for row in lone]
        for start, weights in self.chunks(dtype):
            for row, y in zip(lone, found, strict=True):
                part = y[:, start:start + weights.shape[0]]
                if direct:
                    torch.mm(row, weights.T, out=part)
                else:
                    part.copy_(torch.mm(row, weights.T))
        return torch.cat(found)

    def transposed(self, g: torch.Tensor) -> torch.Tensor:
        """g [tokens, rows] times the weights -> [tokens, cols] in g.dtype, summed in float32 at least."""
        dtype = multiply_in(g.dtype, g.device.type)
        total = torch.zeros(g.shape[0], self.cols, dtype=dtype if dtype == torch.float64 else torch.float32, device=g.device)
        for start, weights in self.chunks(dtype):
            part = g[:, start:start + weights.shape[0]].to(dtype)
            if total.dtype == dtype:
                total.addmm_(part, weights)
            else:
                total += torch.mm(part, weights)
        return total.to(g.dtype)

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, weights [some rows, cols]), in order; each is overwritten by the next."""
        if self.plain is not None and self.plain.dtype == dtype:
            yield 0, self.plain
            return
        step = min(self.rows, scratch.rows_at_once(self.cols, self.device))
        for start in range(0, self.rows, step or 1):
            blocks = self.blocks[start:start + step].to(self.device)
            yield start, unpack(blocks, self.type, scratch.borrow(blocks.shape[0], self.cols, dtype, blocks.device))

    def take(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows of a 1-D index -> [k, cols]; no others are unpacked."""
        step, index = scratch.rows_at_once(self.cols, self.device), index.to(self.blocks.device)
        out = torch.empty(index.numel(), self.cols, dtype=dtype, device=self.device)
        for start in range(0, index.numel(), step):
            blocks = self.blocks.index_select(0, index[start:start + step]).to(self.device)
            unpack(blocks, self.type, out[start:start + step])
        return out

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """All the weights, [rows, cols]."""
        blocks = self.blocks.to(self.device)
        if dtype == torch.float64:
            return formats.dequantize(blocks, self.type).double()
        return formats.dequantize(blocks, self.type, dtype)


def _as_numbers(blocks: torch.Tensor, dtype: str | None) -> torch.Tensor | None:
    """The blocks read as numbers in place, where the format is a number an element and the address is even enough."""
    size = getattr(torch, dtype).itemsize if dtype else 0
    if not dtype or any(place % size for place in (blocks.data_ptr(), blocks.storage_offset(), *blocks.stride()[:-1])):
        return None
    return blocks.view(getattr(torch, dtype))
