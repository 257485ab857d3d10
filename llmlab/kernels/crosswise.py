"""Crosswise: codes laid out with a matrix's rows in a register's lanes, so that a result is a sum over its inputs, in order.

So a library sums that multiplies many rows of x by plain numbers: registers hold results, and input after input is added to
them, product and sum in one instruction; after each block of inputs, 192 of them in MKL on AVX2, sums begin anew, and those of
the blocks are added. In the same order the same bits come out, from a fifth of the bytes: a weight is made of its code on the
way, scale * code + zero, exactly as it was when it was made a number.

A word of 32 bits holds the codes of four of the matrix's rows, of as many inputs as there is room for; neighbouring words, one
a lane, belong to neighbouring rows. A code is masked where it lies, and the power of two by which it is too large is taken from
its scale, which is exact. Four rows of a lane are four sums that need not wait for one another. Words travel as float32 and are
seen as int32 inside, for only loads of floats are whole ones in torch 2.13's code.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from ..formats.iq4 import LEVELS
from . import words
from .packed import Packed
from .unpacking import apart, levels
from .words import Words

ROWS = 4            # of the matrix, in one word
BITS = (2, 4, 8)
GROUPS = (16, 32)


class Layout(NamedTuple):
    """`bits` of a code; a scale and a zero for every `group` inputs; so many inputs are summed in a `block`; how many lanes lie
    side by side."""

    bits: int
    group: int
    block: int
    lanes: int

    @property
    def groups(self) -> int:
        """Of a block."""
        return self.block // self.group

    @property
    def inputs(self) -> int:
        """Of a word."""
        return 8 // self.bits

    @property
    def tile(self) -> int:
        """Rows that lie side by side."""
        return ROWS * self.lanes


class Apart(NamedTuple):
    """A matrix's codes uint8 [rows, cols], less than 2^`bits`, and for every `group` of a row's weights scale and zero float32
    [rows, groups]: weight = scale * code + zero."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group: int


class Crosswise(NamedTuple):
    """A matrix [rows, cols]: `tensors` float32, the words [tiles, blocks, groups, group / inputs, lanes], then scales and zeros
    [tiles, blocks, groups, 4, lanes]. It is filled up with zeros to whole tiles and blocks, two at least."""

    layout: Layout
    rows: int
    cols: int
    tensors: tuple[torch.Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


# ---- laying out -------------------------------------------------------------------------------------------------

def parted(matrix: Packed | Words | torch.Tensor) -> Apart | None:
    """None where there are no codes, they are no integers, or groups of an odd size."""
    if isinstance(matrix, Words):
        return _parted_words(matrix)
    known = levels(matrix.format) if isinstance(matrix, Packed) else None
    if known is None or known.group not in words.GROUPS:
        return None
    codes, scale, offset = apart(matrix.blocks, matrix.format)
    codes = (codes.to(torch.int16) - known.low).to(torch.uint8)
    zero = scale * known.low if offset is None else torch.add(offset, scale, alpha=known.low)
    group = min(known.group, words.RUN)
    scale, zero = (one.repeat_interleave(known.group // group, 1) for one in (scale, zero))
    return Apart(codes, scale, zero, _bits(known.high - known.low), group)


def _parted_words(by: Words) -> Apart:
    known, tensors = by.layout, by.tensors
    codes, at, base, shifts = 0, 0, 0, words.shifts(known).split([words.RUN // bits for bits in known.planes])
    held = tensors[0].view(torch.int32) ^ -1 << 31
    for bits, shift in zip(known.planes, shifts, strict=True):
        part = held[:, :, at:at + bits, None] >> shift & (1 << bits) - 1
        codes = codes + (part.flatten(2, 3) << base)
        at, base = at + bits, base + bits
    low, most = known.low, (1 << base) - 1
    if known.table:
        low, most = LEVELS[0], LEVELS[-1] - LEVELS[0]
        codes = words.level(codes.float(), 0).to(torch.int32) - low

    def along(x: torch.Tensor) -> torch.Tensor:
        """[rows, tiles, n, lanes] -> [rows, ..], in the order of the inputs."""
        return x.transpose(2, 3).flatten(1)

    scales, zeros, numbers = words._factors(by)
    scale, zero = (along(torch.stack(one, 2)) if one else None for one in (scales, zeros))
    if numbers:
        number = [along(one[:, :, None].expand(-1, -1, known.halves, -1)) for one in numbers]
        scale, zero = scale * number[0], zero * number[1] if zeros else None
    many = by.cols // known.group
    scale = scale[:, :many]
    zero = zero[:, :many] if zeros else scale * low
    return Apart(along(codes).to(torch.uint8)[:, :by.cols], scale, zero, _bits(most), known.group)


def _bits(most: int) -> int:
    return next(bits for bits in BITS if most < 1 << bits)


def under(parts: list[Apart]) -> Apart:
    """Matrices of one width under one another, in the finest groups and the widest codes of any of them."""
    group = min(part.group for part in parts)
    scale, zero = (torch.cat([one[at].repeat_interleave(one.group // group, 1) for one in parts]) for at in (1, 2))
    return Apart(torch.cat([part.codes for part in parts]), scale, zero, max(part.bits for part in parts), group)


def lay_out(parts: Apart, block: int, lanes: int | None = None) -> Crosswise:
    """`block`: a multiple of the group. `lanes`: of a register here where it is not given."""
    rows, cols = parts.codes.shape
    known = Layout(parts.bits, parts.group, block, lanes or words.lanes())
    tiles, blocks = max(2, -(-rows // known.tile)), max(2, -(-cols // block))
    more = tiles * known.tile - rows
    codes = functional.pad(parts.codes, (0, blocks * block - cols, 0, more))
    scale, zero = (functional.pad(one, (0, blocks * known.groups - one.shape[1], 0, more)) for one in (parts.scale, parts.zero))
    part = codes.view(tiles, ROWS, known.lanes, blocks, known.groups, -1, known.inputs).permute(0, 3, 4, 5, 2, 6, 1).flatten(5)
    for wide in (bits for bits in (2, 4) if bits >= known.bits):      # two neighbours become one of twice the width
        part = part[..., ::2] | part[..., 1::2] << wide
    held = part.contiguous().view(torch.int32)[..., 0].view(torch.float32)
    down = torch.tensor([2.0 ** -at for at in _places(known)])[:, None]
    scale, zero = (one.view(tiles, ROWS, known.lanes, blocks, -1).permute(0, 3, 4, 1, 2) for one in (scale, zero))
    return Crosswise(known, rows, cols, (held, (scale * down).contiguous(), zero.contiguous()))


def _places(known: Layout) -> list[int]:
    """At which bit each of a word's rows is masked: the last of four bytes, where the sign is, one byte further down."""
    return [min(known.bits * j, 32 - 2 * known.bits) if known.bits == 8 else known.bits * j for j in range(ROWS)]


# ---- multiplying ------------------------------------------------------------------------------------------------

def weights(by: Crosswise) -> list[torch.Tensor]:
    """Of each of the words' rows, [tiles, blocks, groups, group / inputs, inputs, lanes]."""
    (held, scale, zero), known = by.tensors, by.layout
    held = held.view(torch.int32)[:, :, :, :, None]
    if known.inputs > 1:
        held = held >> torch.arange(0, 32, ROWS * known.bits, dtype=torch.int32, device=held.device)[:, None]
    found = []
    for j, place in enumerate(_places(known)):
        codes = (held >> 8 if place < known.bits * j else held) & (1 << known.bits) - 1 << place
        found.append(codes.float() * scale[:, :, :, j, None, None] + zero[:, :, :, j, None, None])
    return found


def arranged(x: torch.Tensor, by: Crosswise, count: int) -> torch.Tensor:
    """x [n, cols] as `multiply` wants it: [cols, 2 at least], both filled up. Were a row's numbers neighbours, the compiler
    would lay those across the lanes."""
    known, blocks = by.layout, by.tensors[0].shape[1]
    return functional.pad(x.T, (0, max(2, count) - len(x), 0, blocks * known.block - by.cols)).contiguous()


def multiply(x: torch.Tensor, by: Crosswise, count: int) -> torch.Tensor:
    """The first `count` rows of an arranged x times the weights' transpose -> [count, rows, filled up]. Written to be compiled,
    for a few rows: one loop, whose sums stay in registers. Only so are they in order."""
    known = by.layout
    x = x.view(1, -1, known.groups, known.group // known.inputs, known.inputs, 1, x.shape[1])
    found = weights(by)
    # [count, tiles, 4, blocks, lanes]
    blocks = torch.stack([torch.stack([(one * x[..., at]).sum((2, 3, 4)) for one in found], 1) for at in range(count)])
    return blocks.sum(3).flatten(1)


def unpack(by: Crosswise) -> torch.Tensor:
    """The weights [rows, cols]."""
    found = torch.stack(weights(by), 1)         # [tiles, 4, blocks, groups, group / inputs, inputs, lanes]
    return found.movedim(6, 2).flatten(3).flatten(0, 2)[:by.rows, :by.cols].contiguous()
