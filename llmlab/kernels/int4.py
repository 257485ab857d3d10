"""Int4: torch's own 4-bit matmul for the CPU, which multiplies by nibbles without ever writing weights down.

It knows w = s * (q - 8) + z with q in 0..15, and s and z for each group of 32, 64, 128 or 256 weights. A format whose
codes span 16 levels fits as it is. One with up to 256 levels fits twice: with code - middle + 128 = low + 16 * high,
w = s * (low - 8) + 16 * s * (high - 8) + s * (middle + 8) + offset, two matrices side by side along the width, times the
input twice. Groups of 16 fit as groups of 32 by going over the same nibbles twice: with the scales of every first 16 and an
input that is zero on every second 16, and the other way round. The layout in memory differs from processor to processor; it
is never written to a file.
"""

from collections.abc import Callable
from functools import cache

import torch

from ..errors import LabError
from . import scratch
from .arithmetic import multiply_in, quicker
from .compact import Compact
from .unpacking import Levels, apart, levels

GROUPS = (16, 32, 64, 128, 256)
ROWS = 16                       # the operator wants a multiple of them; the rest are padding that nobody reads
TRIED = (1, 8, 32, 128, 512)    # tokens


def planes(known: Levels | None) -> int:
    """How many nibbles a weight takes: 1, 2, or 0 where the format does not fit."""
    if known is None or known.group not in GROUPS or known.block % 32:
        return 0
    return 1 if known.high - known.low < 16 else 2


def passes(known: Levels | None) -> int:
    """How many nibbles a weight are gone over: twice as many where groups are halves of the operator's."""
    return planes(known) * (1 + (known is not None and known.group == 16))


def bits(known: Levels, dtype: torch.dtype) -> float:
    """Bits a weight of the nibbles and their scales."""
    return 4 * planes(known) + passes(known) * 2 * 8 * dtype.itemsize / max(32, known.group)


class Int4(Compact):
    """One matrix as nibbles uint8 [rows, planes * cols / 2] in the processor's layout and scales [1 or 2, planes * groups,
    rows, 2] in `dtype`, besides its blocks, which serve many tokens at once and inputs of other types."""

    def __init__(self, blocks: torch.Tensor, type: str, cols: int, dtype: torch.dtype):
        super().__init__(blocks, type, cols)
        known = levels(type)
        self.dtype, self.planes, self.halves = dtype, planes(known), 2 if known.group == 16 else 1
        self.group, self.limit = max(32, known.group), tokens(dtype, passes(known))
        padded = -(-self.rows // ROWS) * ROWS
        self.nibbles = torch.zeros(padded, self.planes * cols // 2, dtype=torch.uint8)
        self.scales = torch.zeros(self.halves, self.planes, cols // self.group, padded, 2, dtype=dtype)
        step = scratch.rows_at_once(cols * self.planes, blocks.device)
        step = max(64, step // 64 * 64)         # what is packed in 64s is packed alike in one
        for start in range(0, self.rows, step):
            self._fill(start, *apart(blocks[start:start + step], type))

    def _fill(self, start: int, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> None:
        """Lays down some rows; scales are rounded to the operator's type once, from float32."""
        rows, known, middle = codes.shape[0], levels(self.type), levels(self.type).middle
        if codes.numel() and not known.low <= int(codes.min()) <= int(codes.max()) <= known.high:
            raise LabError(f"{self.type} blocks hold codes beyond {known.low} to {known.high}, which is all that random ones "
                           "showed; use strategy=\"compact\"")
        code = codes.int()
        if self.planes == 1:
            parts, zero = [code - (middle - 8)], scale * middle
        else:
            code += 128 - middle
            parts, zero = [code & 15, code >> 4], scale * (middle + 8)
        if offset is not None:
            zero = zero + offset
        nibbles = torch.cat(parts, 1)
        if short := -rows % ROWS:
            nibbles = torch.cat([nibbles, nibbles.new_zeros(short, nibbles.shape[1])])
        self.nibbles[start:start + len(nibbles)] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 2)
        for half in range(self.halves):
            into = self.scales[half, :, :, start:start + rows]
            into[0, :, :, 0], into[0, :, :, 1] = scale[:, half::self.halves].T, zero[:, half::self.halves].T
            if self.planes == 2:
                into[1, :, :, 0] = 16 * scale[:, half::self.halves].T

    def bytes(self) -> int:
        return self.nibbles.nbytes + self.scales.nbytes

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.dtype or not 0 < x.shape[0] <= self.limit:
            return super().matmul(x)
        if self.halves == 1:
            y = self._multiply(x, 0)
        else:
            sixteens = x.reshape(x.shape[0], -1, 2, 16)
            y = sum(self._multiply((sixteens * _only(half, x.dtype)).view(x.shape), half) for half in (0, 1))
        return y if y.shape[1] == self.rows else y[:, :self.rows].contiguous()

    def _multiply(self, x: torch.Tensor, half: int) -> torch.Tensor:
        x = x.contiguous() if self.planes == 1 else torch.cat([x, x], 1)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.nibbles, self.group, self.scales[half].flatten(0, 1))


@cache
def _only(half: int, dtype: torch.dtype) -> torch.Tensor:
    """Ones for the first or the second 16 of 32, zeros for the others."""
    with torch.inference_mode(False):
        return torch.tensor([1 - half, half], dtype=dtype).view(2, 1)


@cache
def tokens(dtype: torch.dtype, passes: int) -> int:
    """Up to how many tokens at once that many passes of the operator are quicker here than unpacking bytes to numbers and
    multiplying those; 0 where they are not even for one (processors without the instructions) or would be too coarse.
    Measured, once.
    """
    if dtype not in (torch.bfloat16, torch.float16):    # in float32 a rounded zero point costs more than its sums' rounding
        return 0
    most = 0
    for count in TRIED if passes == 1 else TRIED[:1]:
        # Long work is less easily disturbed: fewer rounds of it do.
        if not quicker(*_both_ways(dtype, passes, count), times=max(3, 20 // count)):
            break
        most = count
    return most if passes == 1 or not most else max(1, tokens(dtype, 1) // passes)


def _both_ways(dtype: torch.dtype, passes: int, count: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A chunk of weights times `count` tokens: by the operator, and from bytes by way of numbers."""
    rows, cols = 512, 2048
    nibbles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.ones(rows, passes * cols, dtype=torch.int32), 2)
    scales = torch.ones(passes * cols // 32, rows, 2, dtype=dtype)
    codes, scale, numbers = torch.ones(rows, cols, dtype=torch.int8), torch.ones(rows, cols // 32, 1), torch.empty(rows, cols)
    wide, other = torch.ones(count, passes * cols, dtype=dtype), torch.ones(count, cols, dtype=multiply_in(dtype, "cpu"))

    def unpacked():
        numbers.copy_(codes).view(rows, -1, 32).mul_(scale)
        return torch.mm(other, numbers.to(other.dtype).T)

    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(wide, nibbles, 32, scales), unpacked
