"""Codes: one byte a weight, laid out row by row, and the scales beside them; two or three passes instead of a dozen.

The bits were picked apart when the matrix was packed. Codes count from the middle of the format's levels, so that what
an offset adds stays small; it is multiplied by the sums of the input's groups, not added to every weight. A card makes
numbers of a chunk in one operation and multiplies by them in a second; they stay in its cache in between.
"""

from collections.abc import Iterator

import torch

from . import scratch
from .arithmetic import multiply_in, quicker
from .compact import Compact
from .tuning import remembered
from .unpacking import Levels, apart, levels

SHAPE = (16384, 4096)       # of what is measured on a card: more than its cache


def bits(known: Levels) -> float:
    """Bits a weight of the codes, scales and offsets."""
    return 8 + 32 * (1 + known.offset) / known.group


class Codes(Compact):
    """One matrix as int8 codes [rows, cols], float32 scales and offsets [rows, groups], besides its blocks."""

    LEAVES = True

    def __init__(self, blocks: torch.Tensor, type: str, cols: int):
        super().__init__(blocks, type, cols)
        middle, group, has_offset = levels(type).middle, levels(type).group, levels(type).offset
        self.group, groups, self.in_one = group, cols // group, blocks.device.type != "cpu"
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
        dtype = multiply_in(x.dtype, x.device.type)
        if self.offset is None or dtype == torch.float64 or dtype != torch.float32 and not self.in_one:
            return super().matmul(x)
        wide = x.to(dtype)
        y = torch.mm(wide.view(x.shape[0], self.offset.shape[1], self.group).sum(-1, dtype=torch.float32), self.offset.T)
        for start, weights in self.scaled(dtype):
            part = y[:, start:start + weights.shape[0]]
            if dtype == torch.float32:
                part.addmm_(wide, weights.T)
            else:
                part += torch.mm(wide, weights.T)
        return y.to(x.dtype)

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        for start, weights in self.scaled(dtype if self.in_one and self.offset is None else torch.float32):
            if self.offset is not None:
                weights.view(len(weights), -1, self.group).add_(self.offset[start:start + len(weights), :, None])
            if dtype != weights.dtype:
                weights = scratch.borrow(*weights.shape, dtype, weights.device).copy_(weights)
            yield start, weights

    def scaled(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, scale * code [some rows, cols], computed in float32), in order; each is overwritten by the next."""
        step = scratch.rows_at_once(self.cols, self.codes.device)
        for start in range(0, self.rows, step):
            codes = self.codes[start:start + step]
            weights = scratch.borrow(*codes.shape, dtype, codes.device)
            groups, scale = weights.view(len(codes), -1, self.group), self.scale[start:start + step, :, None]
            if self.in_one:
                torch.mul(codes.view(groups.shape), scale, out=groups)
            else:       # a processor multiplies numbers of one type several times as fast
                groups.copy_(codes.view(groups.shape)).mul_(scale)
            yield start, weights


@remembered
def beat_numbers(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one token times codes, unpacked chunk by chunk, is quicker on this card than times numbers of `dtype`. Measured,
    once for a card."""
    rows, cols = SHAPE
    numbers, x = torch.ones(rows, cols, dtype=dtype, device=device), torch.ones(1, cols, dtype=dtype, device=device)
    packed = Codes(torch.zeros(rows, cols // 32 * 34, dtype=torch.uint8, device=device), "Q8_0", cols)
    return quicker(lambda: packed.matmul(x), lambda: torch.mm(x, numbers.T), times=5,
                   wait=lambda: torch.cuda.synchronize(device))
