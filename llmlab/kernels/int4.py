"""Int4: torch's own 4-bit matmul for the CPU, which multiplies by nibbles without ever writing weights down.

`nibbles` says what it can hold. Its layout in memory differs from processor to processor; it is never written to a file.
"""

from collections.abc import Callable

import torch

from .arithmetic import multiply_in, quicker
from .nibbles import Nibbles, passes
from .tuning import remembered
from .unpacking import levels

TRIED = (1, 8, 32, 128, 512)    # tokens


class Int4(Nibbles):
    """Nibbles uint8 [padded rows, planes * cols / 2] in the processor's layout."""

    ROWS = 16

    def __init__(self, blocks: torch.Tensor, type: str, cols: int, dtype: torch.dtype):
        super().__init__(blocks, type, cols, dtype, levels(type), tokens(dtype, passes(levels(type))))

    def _room(self, rows: int, width: int) -> torch.Tensor:
        return torch.zeros(rows, width // 2, dtype=torch.uint8)

    def _lay(self, start: int, nibbles: torch.Tensor) -> None:
        self.nibbles[start:start + len(nibbles)] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 2)

    def _multiply(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.nibbles, self.group, scales)


@remembered
def tokens(dtype: torch.dtype, passes: int) -> int:
    """Up to how many tokens at once that many passes of the operator are quicker here than unpacking bytes to numbers and
    multiplying those; 0 where they are not even for one (processors without the instructions) or would be too coarse.
    Measured, once on a machine.
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
