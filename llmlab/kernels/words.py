"""Words: codes laid out so that torch.compile's C++ multiplies by them straight from memory, one token at a time.

Vectorized code loads whole registers of 32-bit numbers best: partial loads of bytes go through the stack and are twenty times
slower. So codes lie in words, 8 nibbles or 4 bytes each, and neighbouring words, one a lane of the processor's registers,
belong to neighbouring groups of weights: one scale serves a lane. A nibble is masked where it lies, not shifted down; the power
of two by which it is too large is taken from the input, which is exact. Words travel as float32 and are seen as int32 inside,
for only loads of floats are whole ones in torch 2.13's code.

y = sum over groups of s * (codes . x) + z * sum(x) of the group, with w = s * code + z, all in float32.
"""

from functools import cache
from typing import NamedTuple

import torch

from . import scratch
from .unpacking import apart, levels

GROUPS = (16, 32, 64, 128, 256)


class Layout(NamedTuple):
    """How a format's codes lie: `bits` a code (4 or 8), counted from `low`; a scale for every `group` (16 or 32); whether
    groups have offsets of their own; how many groups lie side by side."""

    bits: int
    group: int
    low: int
    offset: bool
    lanes: int

    @property
    def per(self) -> int:
        """Codes a word."""
        return 32 // self.bits

    @property
    def words(self) -> int:
        """Words a group."""
        return self.group // self.per

    @property
    def tile(self) -> int:
        """Weights that lie side by side; rows are filled up to a multiple of them."""
        return self.group * self.lanes

    def bits_per_weight(self, cols: int) -> float:
        """What is held for each weight of a row."""
        padded = -(-cols // self.tile) * self.tile
        return padded / cols * (self.bits + 32 * (1 + self.offset) / self.group)


def lanes() -> int:
    """32-bit numbers in a register here."""
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


@cache
def layout(format: str, side: int | None = None) -> Layout | None:
    """How that format's codes lie here, or with `side` lanes; None where they are no integers or groups are of an odd size."""
    known = levels(format)
    if known is None or known.group not in GROUPS:
        return None
    return Layout(4 if known.high - known.low < 16 else 8, min(known.group, 32), known.low, known.offset, side or lanes())


class Words(NamedTuple):
    """A matrix [rows, cols]: words float32 [rows, tiles, words, lanes], scales and, where the format has offsets, zeros float32
    [rows, tiles, lanes]."""

    layout: Layout
    rows: int
    cols: int
    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.words, self.scales) if self.zeros is None else (self.words, self.scales, self.zeros)


def lay_out(blocks: torch.Tensor, format: str, cols: int, known: Layout | None = None) -> Words | None:
    """Blocks uint8 [rows, row_bytes] as words; None for a format that cannot lie so."""
    known = known or layout(format)
    if known is None:
        return None
    rows, tiles = blocks.shape[0], -(-cols // known.tile)
    words = torch.empty(rows, tiles, known.words, known.lanes)
    scales = torch.empty(rows, tiles, known.lanes)
    zeros = torch.empty_like(scales) if known.offset else None
    step = scratch.rows_at_once(cols, blocks.device)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes, scale, offset = apart(blocks[part], format)
        words[part] = _words(codes, known, tiles)
        scales[part] = scale = _groups(scale, cols, known, tiles)
        if zeros is not None:
            torch.add(_groups(offset, cols, known, tiles), scale, alpha=known.low, out=zeros[part])
    return Words(known, rows, cols, words, scales, zeros)


def _groups(values: torch.Tensor, cols: int, known: Layout, tiles: int) -> torch.Tensor:
    """[n, groups of any size] -> [n, tiles, lanes], groups of the layout's size, zero beyond the row's end."""
    values = values.repeat_interleave(cols // values.shape[1] // known.group, 1)
    return torch.nn.functional.pad(values, (0, tiles * known.lanes - values.shape[1])).view(-1, tiles, known.lanes)


def _words(codes: torch.Tensor, known: Layout, tiles: int) -> torch.Tensor:
    """int8 codes [n, cols] -> float32 [n, tiles, words, lanes]; the first code of a word lies in its lowest bits."""
    codes = (codes.to(torch.int16) - known.low).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, tiles * known.tile - codes.shape[1]))
    if known.bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return codes.view(torch.float32).view(-1, tiles, known.lanes, known.words).transpose(2, 3)


def arrange(x: torch.Tensor, known: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """One token's input [cols] as the words want it: [tiles, words, per, lanes], powers of two taken away, and the sums of its
    groups [tiles, lanes]."""
    x = torch.nn.functional.pad(x, (0, -x.shape[0] % known.tile)).view(-1, known.lanes, known.words, known.per)
    down = x.new_tensor([2.0 ** (-known.bits * j) for j in range(known.per - 1)] + [1.0])
    return (x * down).permute(0, 2, 3, 1).contiguous(), x.sum((2, 3))


def code(word: torch.Tensor, j: int, known: Layout) -> torch.Tensor:
    """The j-th codes of int32 words, as float32, times 2^(bits * j); the last, where the sign would be, come as they are."""
    mask = (1 << known.bits) - 1
    return ((word >> 32 - known.bits) & mask if j == known.per - 1 else word & mask << known.bits * j).float()


def multiply(x: tuple[torch.Tensor, torch.Tensor], by: Words) -> torch.Tensor:
    """An arranged input times the weights' transpose -> [rows]. Written to be compiled: one loop, nothing in between."""
    (x, sums), known = x, by.layout
    words, total = by.words.view(torch.int32), None
    for i in range(known.words):
        dot = None
        for j in range(known.per):      # a chain for each word: one alone would wait for its own additions
            term = code(words[:, :, i], j, known) * x[:, i, j]
            dot = term if dot is None else dot + term
        total = dot if total is None else total + dot
    if by.zeros is None:
        return (by.scales * (total + known.low * sums)).sum((1, 2))
    return (by.scales * total + by.zeros * sums).sum((1, 2))


def unpack(by: Words, shifts: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weights as they lie, [rows, tiles, words, per, lanes] flat in each row: what `side_by_side` inputs are multiplied by.
    `shifts` is int32 [per, 1], 0, bits, 2 bits ... Written to be compiled: whole registers from end to end."""
    known = by.layout
    zeros = by.scales * known.low if by.zeros is None else by.zeros
    codes = (by.words.view(torch.int32)[:, :, :, None] >> shifts) & (1 << known.bits) - 1
    return (codes.float() * by.scales[:, :, None, None] + zeros[:, :, None, None]).to(dtype).flatten(1)


def shifts(known: Layout) -> torch.Tensor:
    return torch.arange(0, 32, known.bits, dtype=torch.int32)[:, None]


def side_by_side(x: torch.Tensor, known: Layout) -> torch.Tensor:
    """Inputs [tokens, cols] in the order in which `unpack` gives weights, zero where rows are filled up."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % known.tile)).view(len(x), -1, known.lanes, known.words, known.per)
    return x.permute(0, 1, 3, 4, 2).flatten(1)
