"""Codes: one byte a weight, laid out row by row, and the scales beside them; two or three passes instead of a dozen.

The bits were picked apart when the matrix was packed. Codes count from the middle of the format's levels, so that what
an offset adds stays small; it is multiplied by the sums of the input's groups, not added to every weight.
"""

from collections.abc import Iterator

import torch

from . import scratch
from .arithmetic import multiply_in
from .compact import Compact
from .unpacking import Levels, apart, levels


def bits(known: Levels) -> float:
    """Bits a weight of the codes, scales and offsets."""
    return 8 + 32 * (1 + known.offset) / known.group


class Codes(Compact):
    """One matrix as int8 codes [rows, cols], float32 scales and offsets [rows, groups], besides its blocks."""

    def __init__(self, blocks: torch.Tensor, type: str, cols: int):
        super().__init__(blocks, type, cols)
        middle, group, has_offset = levels(type).middle, levels(type).group, levels(type).offset
        self.group, groups = group, cols // group
        shift = has_offset and middle != 0 and levels(type).low >= middle - 128
        self.codes = torch.empty(self.rows, cols, dtype=torch.int8, device=blocks.device)
        self.scale = torch.empty(self.rows, groups, dtype=torch.float32, device=blocks.device)
        self.offset = torch.empty_like(self.scale) if has_offset else None
        step = scratch.rows_at_once(cols, blocks.device)
        for start in range(0, self.rows, step):
            part = slice(start, start + step)
            codes, scale, offset = apart(blocks[part], type)
            self.scale[part] = scale
            torch.sub(codes, middle if shift else 0, out=self.codes[part])
            if has_offset:
                torch.add(offset, scale, alpha=middle if shift else 0, out=self.offset[part])

    def bytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + (0 if self.offset is None else self.offset.nbytes)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        if self.offset is None or multiply_in(x.dtype, x.device.type) != torch.float32:
            return super().matmul(x)
        wide = x.float()
        y = torch.mm(wide.view(x.shape[0], self.offset.shape[1], self.group).sum(-1), self.offset.T)
        for start, weights in self.scaled():
            y[:, start:start + weights.shape[0]].addmm_(wide, weights.T)
        return y.to(x.dtype)

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        for start, weights in self.scaled():
            if self.offset is not None:
                weights.view(len(weights), -1, self.group).add_(self.offset[start:start + len(weights), :, None])
            if dtype != weights.dtype:
                weights = scratch.borrow(*weights.shape, dtype, weights.device).copy_(weights)
            yield start, weights

    def scaled(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, scale * code [some rows, cols] in float32), in order; each is overwritten by the next."""
        step = scratch.rows_at_once(self.cols, self.codes.device)
        for start in range(0, self.rows, step):
            codes = self.codes[start:start + step]
            weights = scratch.borrow(*codes.shape, torch.float32, codes.device).copy_(codes)
            weights.view(len(codes), -1, self.group).mul_(self.scale[start:start + step, :, None])
            yield start, weights
