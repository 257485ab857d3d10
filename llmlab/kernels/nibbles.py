"""Nibbles: codes cut into 4-bit planes with scales and zeros beside them, as torch's 4-bit matmuls of both kinds want them.

They know w = s * (q - 8) + z with q in 0..15, and s and z for each group of 32, 64, 128 or 256 weights. A format whose
codes span 16 levels fits as it is. One with up to 256 levels fits twice: with code - middle + 128 = low + 16 * high,
w = s * (low - 8) + 16 * s * (high - 8) + s * (middle + 8) + offset, two planes side by side along the width, times the
input twice. Groups of 16 fit as groups of 32 by going over the same nibbles twice: with the scales of every first 16 and an
input that is zero on every second 16, and the other way round.
"""

import torch

from ..errors import LabError
from . import scratch
from .compact import Compact
from .unpacking import Levels, apart

GROUPS = (16, 32, 64, 128, 256)


def planes(known: Levels | None) -> int:
    """How many nibbles a weight takes: 1, 2, or 0 where the format does not fit."""
    if known is None or known.group not in GROUPS or known.block % 32:
        return 0
    return 1 if known.high - known.low < 16 else 2


def halves(known: Levels) -> int:
    """How often the same nibbles are gone over: twice where a group is half of the operators' smallest."""
    return 2 if known.group == 16 else 1


def passes(known: Levels | None) -> int:
    """How many nibbles a weight are gone over."""
    return planes(known) * halves(known) if known else 0


def bits(known: Levels, dtype: torch.dtype) -> float:
    """Bits a weight of the nibbles and of their scales and zeros in `dtype`."""
    return 4 * planes(known) + passes(known) * 2 * 8 * dtype.itemsize / max(32, known.group)


class Nibbles(Compact):
    """One matrix as nibbles, in the layout of an operator, and scales with zeros [halves, planes, groups, padded rows, 2] in
    `dtype`, besides its blocks, which serve more than `limit` tokens at once and inputs of other types.

    A kind of it says how many `ROWS` the operator wants a multiple of (the rest are padding that nobody reads), how it lays
    rows of nibbles down, and how it multiplies by them.
    """

    ROWS: int

    def __init__(self, blocks: torch.Tensor, type: str, cols: int, dtype: torch.dtype, known: Levels, limit: int):
        super().__init__(blocks, type, cols)
        self.dtype, self.limit, self.planes, self.halves = dtype, limit, planes(known), halves(known)
        self.group, padded = max(32, known.group), -(-self.rows // self.ROWS) * self.ROWS
        self.nibbles = self._room(padded, self.planes * cols)
        self.scales = torch.zeros(self.halves, self.planes, cols // self.group, padded, 2, dtype=dtype, device=blocks.device)
        step = scratch.rows_at_once(cols * self.planes, blocks.device)
        step = max(64, step // 64 * 64)         # what is packed in 64s is packed alike in one
        for start in range(0, self.rows, step):
            self._fill(start, known, *apart(blocks[start:start + step], type))
        self.by_half = tuple(half.flatten(0, 1) for half in self.scales)        # views
        # ones for the first 16 of 32 and zeros for the others, and the other way round
        self.only = torch.eye(2, dtype=dtype, device=blocks.device).view(2, 1, 1, 1, 2, 1) if self.halves == 2 else None

    def _fill(self, start: int, known: Levels, *parts: torch.Tensor | None) -> None:
        """Lays down some rows; scales are rounded to the operator's type once, from float32."""
        nibbles, scales = cut(self.type, known, *parts)
        self.scales[:, :, :, start:start + len(nibbles)] = scales
        if short := -len(nibbles) % self.ROWS:
            nibbles = torch.cat([nibbles, nibbles.new_zeros(short, nibbles.shape[1])])
        self._lay(start, nibbles)

    def _room(self, rows: int, width: int) -> torch.Tensor:
        """Where the nibbles of all rows will lie."""
        raise NotImplementedError

    def _lay(self, start: int, nibbles: torch.Tensor) -> None:
        """Puts rows of nibbles int32 [rows, planes * cols] there, from row `start` on."""
        raise NotImplementedError

    def _multiply(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """x [tokens, planes * cols] times all nibbles with one half's scales [planes * groups, padded, 2]."""
        raise NotImplementedError

    def bytes(self) -> int:
        return self.nibbles.nbytes + self.scales.nbytes

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.dtype or not self.rows or not 0 < x.shape[0] <= self.limit:
            return super().matmul(x)
        if self.halves == 1:
            y = self._multiply(x.contiguous() if self.planes == 1 else torch.cat([x, x], 1), self.by_half[0])
        else:
            apart = x.reshape(1, x.shape[0], 1, -1, 2, 16) * self.only
            wide = apart.expand(2, -1, self.planes, -1, 2, 16).reshape(2, x.shape[0], -1)
            first, second = map(self._multiply, wide.unbind(0), self.by_half)
            y = first + second
        return y if y.shape[1] == self.rows else y.narrow(1, 0, self.rows).contiguous()


def cut(type: str, known: Levels, codes: torch.Tensor, scale: torch.Tensor,
        offset: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of codes int8 [rows, cols] with scale and offset [rows, groups] -> nibbles int32 [rows, planes * cols], 0 to 15,
    and scales with zeros float32 [halves, planes, groups / halves, rows, 2].

    Raises LabError where codes lie beyond the `known` levels: they would be cut off.
    """
    if codes.numel() and not known.low <= int(codes.min()) <= int(codes.max()) <= known.high:
        raise LabError(f"{type} blocks hold codes beyond {known.low} to {known.high}, which is all that random ones "
                       "showed; use strategy=\"compact\"")
    middle, count, parts = known.middle, planes(known), halves(known)
    code = codes.int()
    if count == 1:
        nibbles, zero = code - (middle - 8), scale * middle
    else:
        code += 128 - middle
        nibbles, zero = torch.cat([code & 15, code >> 4], 1), scale * (middle + 8)
    if offset is not None:
        zero = zero + offset
    both = scale.new_zeros(parts, count, scale.shape[1] // parts, len(scale), 2)
    for half in range(parts):
        both[half, 0, :, :, 0], both[half, 0, :, :, 1] = scale[:, half::parts].T, zero[:, half::parts].T
        if count == 2:
            both[half, 1, :, :, 0] = 16 * scale[:, half::parts].T
    return nibbles, both
