"""Tinygemm: torch's 4-bit matmul for NVIDIA cards, tensor cores fed with nibbles; and when it is the right thing for one token.

A token reads every weight once, so what counts is bits a weight over the share of the card's bandwidth that an operation
reaches. Published for one A100 of 1.7 TB/s measured, 70 billion weights: 4-bit groups of 32 by this operator 65 %, and plain
bfloat16 (of 7 billion) 82 % (pytorch-labs/gpt-fast, README). So, in bits as long as the time they take:

    one plane, groups of 32 (Q4_0, Q4_1, Q4_K)        4 +  1 = 5, at 65 %:     8
    one plane, groups of 16 (Q2_K, Q3_K), two passes  4 +  2 = 6, of which the nibbles come from the second-level cache the
                                                      second time where a matrix fits, at 65 %: 10 to 15
    two planes, groups of 32 (Q8_0, Q5_K, IQ4_XS)     8 +  2 = 10, at 65 %:   15
    bfloat16 numbers, one operation                   16, at 82 %:            20
    two planes, groups of 16 (Q6_K), two passes       8 +  4 = 12, at 65 %, 8 of them twice: 18 to 31, and more steps
    bytes unpacked into cached scratch, then multiplied: 8 and scales read, 16 written and 16 read again near the cores, in two
    operations a chunk: some 30; `codes` does it, and holds the least

Inside, a weight is q * s + z rounded to bfloat16, scale and zero are bfloat16, sums are float32.

The layout is what the operator's public source has (aten/src/ATen/native/cuda/int4mm.cu): int32 [rows / 8][cols / (16 * inner)]
[32][inner / 2]; the 32 lanes of a warp hold the 8 rows x 16 columns that one tensor core instruction takes, and one word two of
these tiles. The operator that lays them so takes bytes whose high half is the even column. `inner` tiles of 16 columns lie
together: 8 make loads of 16 bytes a lane, the widest; a width that is no multiple of 128 takes 4 or 2.
"""

from collections.abc import Callable, Iterator

import torch

from . import scratch
from .arithmetic import quicker
from .nibbles import Nibbles, passes
from .tuning import remembered
from .unpacking import levels

INNER = (8, 4, 2)
TILE = 16                               # one instruction takes as many tokens: up to here more cost nothing
TRIED = (1, 16, 32, 64, 128, 256, 512)     # tokens
LEAST = (8, 0)                          # compute capability
SHAPE = (16384, 4096)                   # of what is measured: as numbers more than a card's cache


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the operator cannot be used for inputs of `dtype` on this device; None where it can."""
    if device.type != "cuda":
        return f"no card, {device.type}"
    if dtype != torch.bfloat16:
        return "it multiplies bfloat16 alone"
    if torch.version.hip:
        return "its layout on AMD cards is another"
    if torch.cuda.get_device_capability(device) < LEAST:
        return f"it needs compute capability {LEAST[0]}.{LEAST[1]}"
    return None


class TinyGemm(Nibbles):
    """Nibbles int32 [padded rows / 8, planes * cols / (16 * inner), 32, inner / 2] in the tensor cores' layout."""

    ROWS = 8
    LEAVES = True

    def __init__(self, blocks: torch.Tensor, type: str, cols: int):
        known = levels(type)
        super().__init__(blocks, type, cols, torch.bfloat16, known, tokens(blocks.device, passes(known)))

    def _room(self, rows: int, width: int) -> torch.Tensor:
        inner = inner_tiles(width)
        return torch.zeros(rows // 8, width // (16 * inner), 32, inner // 2, dtype=torch.int32, device=self.blocks.device)

    def _lay(self, start: int, nibbles: torch.Tensor) -> None:
        laid = torch.ops.aten._convert_weight_to_int4pack(as_pairs(nibbles), inner_tiles(nibbles.shape[1]))
        self.nibbles[start // 8:start // 8 + len(laid)] = laid

    def _multiply(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, self.nibbles, self.group, scales)

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """From the nibbles, for many tokens of its own type: fewer steps than from the blocks, which need not be here."""
        if dtype != self.dtype:
            yield from super().chunks(dtype)
            return
        step = scratch.rows_at_once(self.cols * self.planes, self.device)
        step = max(8, step // 8 * 8)
        for start in range(0, self.rows, step):
            words = self.nibbles[start // 8:(start + step) // 8]
            weights = taken(words, scratch.borrow(8 * len(words), self.planes * self.cols, torch.float32, self.device))
            # [planes, groups, halves, rows, 2] beside weights [rows, planes, groups, halves, 32 or 16]
            both = self.scales[:, :, :, start:start + len(weights)].permute(3, 1, 2, 0, 4).float()
            scale, parts = both[..., :1], weights.view(*both.shape[:-1], -1)
            torch.addcmul(both[..., 1:] - 8 * scale, parts, scale, out=parts)
            found, planes = scratch.borrow(len(weights), self.cols, dtype, self.device), parts.flatten(2).unbind(1)
            torch.add(*planes, out=found) if self.planes == 2 else found.copy_(weights)
            yield start, found[:self.rows - start]


def taken(words: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Fills `out` [rows, width] with the nibbles that lie in the layout. A byte of a word holds one column's nibble and, in its
    high half, that of the eighth after it; the bytes are of the first tile and the second, and then of the next columns."""
    tiles, outer, _, wide = words.shape
    apart = words.view(torch.uint8).view(tiles, outer, 8, 4, wide, 2, 2)        # .., row, pair of columns, .., column, tile
    into = out.view(tiles, 8, outer, wide, 2, 2, 4, 2)                          # .., tile, eight columns, pair, column
    for eight, nibbles in enumerate((apart & 15, apart >> 4)):
        into[:, :, :, :, :, eight].copy_(nibbles.permute(0, 2, 1, 4, 6, 3, 5))
    return out


def inner_tiles(width: int) -> int:
    """How many tiles of 16 columns lie together: the most that divide the width, which is a multiple of 32."""
    return next(inner for inner in INNER if width % (16 * inner) == 0)


def as_pairs(nibbles: torch.Tensor) -> torch.Tensor:
    """Nibbles int32 [rows, width] as bytes uint8 [rows, width / 2], the even column in the high half."""
    return (nibbles[:, ::2] << 4 | nibbles[:, 1::2]).to(torch.uint8)


@remembered
def tokens(device: torch.device, passes: int) -> int:
    """Up to how many tokens at once that many passes of the operator are quicker on this card than the other ways: one token
    than bfloat16 numbers (0 where it is not), more than unpacking bytes to numbers and multiplying those. Measured, once for a
    card."""
    most = 0
    for count in TRIED:
        if not quicker(*_both_ways(device, passes, count), times=10, wait=lambda: torch.cuda.synchronize(device)):
            break
        most = count
    return max(most, TILE) if most else 0


def _both_ways(device: torch.device, passes: int, count: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Weights times `count` tokens: by the operator, and by numbers that are there already or come from bytes."""
    rows, cols = SHAPE
    pairs = torch.zeros(rows, passes * cols // 2, dtype=torch.uint8, device=device)
    nibbles = torch.ops.aten._convert_weight_to_int4pack(pairs, inner_tiles(passes * cols))
    scales = torch.ones(passes * cols // 32, rows, 2, dtype=torch.bfloat16, device=device)
    codes, scale = (torch.ones(rows, cols // 32, width, dtype=dtype, device=device)
                    for width, dtype in ((32, torch.int8), (1, torch.float32)))
    numbers = torch.ones(rows, cols, dtype=torch.bfloat16, device=device)
    wide, narrow = (torch.ones(count, width, dtype=torch.bfloat16, device=device) for width in (passes * cols, cols))

    def by_numbers():
        if count > 1:
            torch.mul(codes, scale, out=numbers.view(codes.shape))
        return torch.mm(narrow, numbers.T)

    return lambda: torch.ops.aten._weight_int4pack_mm(wide, nibbles, 32, scales), by_numbers
