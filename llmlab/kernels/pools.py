"""One side of a paged cache, keys or values: blocks of a few cells, each of any text, laid out as one query meets them.

A loop over a block is to read it from end to end, whole registers at a time, and each lane is to sum up something of its own.
Keys are summed over the numbers of a head, so cells lie innermost; values are summed over cells, so some numbers of a head lie
innermost, cell after cell. Codes of quantized types lie likewise, four bytes along the sum making one 32-bit word. Bytes, codes
and scales are llama.cpp's, cell by cell, as in `pages`.
"""

from collections.abc import Sequence
from math import gcd

import torch

from ..errors import LabError
from .pages import CellType, levels
from .rounding import BLOCK, LARGEST, rounded
from .words import lanes

WORD = 4            # bytes that lie side by side along the sum


class Pool:
    """`blocks` blocks of `size` cells of `heads` heads of `head_dim` numbers: keys, or values.

    tensors: of numbers one [blocks, heads, head_dim, size] of keys, [blocks, heads, parts, size, lanes] of values, where parts
    * lanes = head_dim; of a quantized type uint8 codes [blocks, heads, groups, rows / 4, size, 4] of keys, [blocks, heads,
    groups, size / 4, rows, 4] of values, and float16 scales (and minimums) [blocks, heads, groups, size]; 32 numbers a group.
    """

    def __init__(self, type: CellType, keys: bool, tensors: Sequence[torch.Tensor]):
        self.type, self.keys, self.tensors = type, keys, tuple(tensors)
        self.blocks, self.heads = self.tensors[0].shape[:2]

    @property
    def size(self) -> int:
        """Cells of a block."""
        return self.tensors[-1].shape[3]

    @property
    def head_dim(self) -> int:
        first = self.tensors[0]
        if self.type.format:
            return first.shape[2] * BLOCK
        return first.shape[2] if self.keys else first.shape[2] * first.shape[4]

    @property
    def bytes(self) -> int:
        """What it holds, exactly."""
        return sum(t.nbytes for t in self.tensors)

    def write(self, blocks: torch.Tensor, cells: torch.Tensor, x: torch.Tensor) -> None:
        """Lay x [heads, n, head_dim] float32 into cells `cells` of blocks `blocks`, int64 [n] each, all of them at once."""
        self._lay(blocks, cells, *_encoded(x.transpose(0, 1), self.type))

    def _lay(self, blocks: torch.Tensor, cells: torch.Tensor, first: torch.Tensor, *halves: torch.Tensor) -> None:
        """What `_encoded` gives of [n, heads, head_dim]."""
        if self.type.format and self.keys:
            first = first.unflatten(-1, (-1, WORD))
        elif not self.type.format and not self.keys:
            first = first.unflatten(-1, (-1, self.tensors[0].shape[-1]))
        for room, at, new in zip(self.tensors, self._places(blocks, cells), (first, *halves), strict=False):
            room[at] = new

    def _places(self, blocks: torch.Tensor, cells: torch.Tensor) -> list[tuple]:
        """Of each tensor the index of those cells; what lies there is then [n, ..]."""
        all_of = slice(None)
        plain = blocks, all_of, all_of, cells
        if not self.type.format:
            return [plain]
        codes = (blocks, all_of, all_of, all_of, cells) if self.keys else (
            blocks, all_of, all_of, cells // WORD, all_of, cells % WORD)
        return [codes, plain, plain]

    def numbers(self, blocks: torch.Tensor, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """What blocks int64 [n] stand for, float32: keys [n, heads, head_dim, size], values [n, heads, size, head_dim]; in the
        `buffer`, float32, where they are that already: memory that is new each time costs more than the copying."""
        if self.type.dtype == torch.float32 and buffer is not None:
            shape = len(blocks), *self.tensors[0].shape[1:]
            codes = buffer[:torch.Size(shape).numel()].view(shape)
            torch.index_select(self.tensors[0], 0, blocks, out=codes)
        else:
            codes, *halves = (t.index_select(0, blocks) for t in self.tensors)
        if not self.type.format:
            found = codes.float()
            return found if self.keys else found.transpose(2, 3).flatten(3)
        codes = codes.transpose(-1, -2).flatten(3, 4) if self.keys else codes.movedim(4, 3).flatten(4)   # [.., rows, size]
        found = levels(codes.contiguous(), self.type) * halves[0].float()[..., None, :]
        if len(halves) == 2:
            found += halves[1].float()[..., None, :]
        found = found.flatten(2, 3)
        return found if self.keys else found.mT


def write_both(keys: Pool, values: Pool, blocks: torch.Tensor, cells: torch.Tensor, new: torch.Tensor) -> None:
    """Lay keys and values, new [2, heads, n, head_dim] float32, into the same cells: rounded together where they are of one
    type, as for few tokens the number of operations is what it costs."""
    if keys.type != values.type:
        keys.write(blocks, cells, new[0])
        values.write(blocks, cells, new[1])
        return
    both = _encoded(new.transpose(1, 2), keys.type)
    for side, pool in enumerate((keys, values)):
        pool._lay(blocks, cells, *(part[side] for part in both))


def _encoded(x: torch.Tensor, known: CellType) -> tuple[torch.Tensor, ...]:
    """x [.., head_dim] as a type's numbers, or codes uint8 [.., groups, rows] and float16 [.., groups] each.

    What is no number or none that the type holds becomes zero or the largest there is: blocks go from text to text, and what
    one text leaves behind is multiplied by zero in the next.
    """
    if known.format:
        shape = *x.shape[:-1], x.shape[-1] // BLOCK
        codes, halves = rounded(x.reshape(-1, BLOCK).nan_to_num(0.0).clamp_(-LARGEST, LARGEST), known)
        return codes.view(*shape, -1), *(half.view(shape) for half in halves)
    most = torch.finfo(known.dtype).max
    x = x.nan_to_num(0.0, most, -most)
    return (x if known.dtype == torch.float32 else x.clamp_(-most, most).to(known.dtype),)


def shapes(type: CellType, keys: bool, heads: int, head_dim: int, size: int,
           narrow: bool) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of each tensor of one block its shape and dtype. `narrow`: whether values lie as compiled code wants them, a register of
    each cell together, or all numbers of a cell, as torch's own operations do. Raises LabError for what does not divide."""
    if not type.format:
        if keys:
            return [((heads, head_dim, size), type.dtype)]
        wide = gcd(lanes(), head_dim) if narrow else head_dim
        return [((heads, head_dim // wide, size, wide), type.dtype)]
    if head_dim % BLOCK:
        raise LabError(f"a {type.name} cache needs heads of a multiple of {BLOCK} numbers, and here they have {head_dim}; "
                       "choose f16")
    if size % WORD:
        raise LabError(f"blocks of a {type.name} cache have a multiple of {WORD} cells, not {size}; choose 16")
    groups = head_dim // BLOCK
    codes = (heads, groups, type.rows // WORD, size, WORD) if keys else (heads, groups, size // WORD, type.rows, WORD)
    return [(codes, torch.uint8), *[((heads, groups, size), torch.float16)] * type.floats]
