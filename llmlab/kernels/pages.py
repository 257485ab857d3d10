"""One side of a layer's KV cache, keys or values, as packed pages: llama.cpp's own blocks, turned so that cells lie innermost.

A block is 32 numbers of a head that share a scale. Here the same byte of the blocks of 256 cells lies side by side: what one
query meets is then one code of many cells at once, which is what vector registers want, and a new cell is one column. Bytes,
codes and scales are llama.cpp's, cell by cell; only their order is another, and `blocks` gives them back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ..errors import LabError
from ..formats import FORMATS
from ..memory import CACHE_TYPES, cache_types
from .rounding import BLOCK, levels_of, rounded

PAGE = 256      # cells of a page: what llama.cpp pads a context to
_LANES = 4      # bytes of a row lie so that a word of four has the cells w, 64 + w, 128 + w and 192 + w
_QUARTER = PAGE // _LANES
AT_ONCE = 1 << 20       # numbers rounded together: a dozen passes over 4 MiB stay in a third-level cache
FEW = 1 << 14           # numbers up to which both sides are rounded together: beyond, joining them costs more than it saves
NUMBERS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class CellType:
    """How a cache type lies. name: as in `memory.CACHE_TYPES`. format: of its blocks, or "" where it is numbers of `dtype`.
    rows: bytes of a block's codes. floats: float16 numbers before them, a scale or a scale and a minimum. bits: of a code."""

    name: str
    format: str
    dtype: torch.dtype
    rows: int = 0
    floats: int = 0
    bits: int = 0


@cache
def cell_type(name: str) -> CellType:
    """The layout of a cache type. Raises UnknownName for one that is none."""
    name = cache_types(name)[0]
    if name in NUMBERS:
        return CellType(name, "", NUMBERS[name])
    format = CACHE_TYPES[name]
    floats = 2 if name.endswith("_1") else 1
    rows = FORMATS[format].bytes(BLOCK) - 2 * floats
    return CellType(name, format, torch.uint8, rows, floats, {32: 8, 20: 5, 16: 4}[rows])


class Pages:
    """Room for `cells` cells (whole pages) of `heads` heads of `head_dim` numbers, for each of `batch` texts.

    codes: uint8 [batch, pages, heads, blocks, rows, 256], or numbers [batch, pages, heads, head_dim, 256] for f32, f16, bf16
    and fp8; scales (and minimums): float16 [batch, pages, heads, blocks, 256], or None. Raises LabError for heads that do not
    divide into blocks.
    """

    def __init__(self, type: str, batch: int, heads: int, head_dim: int, cells: int, device: torch.device | str = "cpu"):
        self.type, self.batch, self.heads, self.head_dim = cell_type(type), batch, heads, head_dim
        if self.type.format and head_dim % BLOCK:
            raise LabError(f"a {self.type.name} cache needs heads of a multiple of {BLOCK} numbers, and here they have "
                           f"{head_dim}; choose f16")
        self.device, self.pages = torch.device(device), -(-cells // PAGE)
        self.codes, self.scales, self.minimums = self._room(self.pages)

    def _room(self, pages: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Zeros, which stand for zeros: what lies in cells that nobody wrote is multiplied by zero, and must be finite."""
        known, shape = self.type, (self.batch, pages, self.heads)
        if not known.format:
            return torch.zeros(*shape, self.head_dim, PAGE, dtype=known.dtype, device=self.device), None, None
        blocks = self.head_dim // BLOCK
        codes = torch.zeros(*shape, blocks, known.rows, PAGE, dtype=torch.uint8, device=self.device)
        halves = [torch.zeros(*shape, blocks, PAGE, dtype=torch.float16, device=self.device) for _ in range(known.floats)]
        return codes, halves[0], halves[1] if known.floats == 2 else None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All there is of it: what is written to disk, and what compiled code is given."""
        return tuple(t for t in (self.codes, self.scales, self.minimums) if t is not None)

    @property
    def cells(self) -> int:
        return self.pages * PAGE

    @property
    def bytes(self) -> int:
        """What it holds, exactly."""
        return sum(t.nbytes for t in self.tensors)

    def grow(self, cells: int) -> None:
        """Room for so many cells; what is there stays."""
        if (pages := -(-cells // PAGE)) > self.pages:
            before = self.codes, self.scales, self.minimums
            self.codes, self.scales, self.minimums = self._room(pages)
            for old, new in zip(before, (self.codes, self.scales, self.minimums), strict=True):
                if new is not None:
                    new[:, :self.pages] = old
            self.pages = pages

    # ---- writing -------------------------------------------------------------------------------------------------

    def write(self, cells: torch.Tensor, x: torch.Tensor) -> None:
        """Lay x [batch, heads, n, head_dim] into cells int64 [n]: rounded once, as llama.cpp rounds what goes into its cache.

        Raises LabError for numbers that no float16 scale holds, or that are none; f32, f16 and bf16 take all, as in any
        engine, and on a card nobody looks, as looking would wait for it.
        """
        known = self.type
        if not known.format:
            self._lay(cells, _clamped(x, known.dtype), ())
            return
        step = max(1, AT_ONCE // (self.batch * self.heads * self.head_dim))
        for start in range(0, len(cells), step):
            part = x if len(cells) <= step else x[:, :, start:start + step]
            codes, halves = rounded(part.reshape(-1, BLOCK), known)
            shape = (*part.shape[:3], self.head_dim // BLOCK)
            self._lay(cells[start:start + step], codes.view(*shape, -1), [half.view(shape) for half in halves])

    def set_blocks(self, cells: torch.Tensor, blocks: torch.Tensor) -> None:
        """Lay llama.cpp's blocks, uint8 [batch, heads, n, row_bytes], into cells int64 [n]."""
        known = self.type
        if not known.format:
            self._lay(cells, blocks.contiguous().view(known.dtype), ())
            return
        parts = blocks.unflatten(-1, (self.head_dim // BLOCK, -1))
        halves = parts[..., :2 * known.floats].contiguous().view(torch.float16)
        self._lay(cells, parts[..., 2 * known.floats:], halves.unbind(-1))

    def _lay(self, cells: torch.Tensor, codes: torch.Tensor, halves: Sequence[torch.Tensor]) -> None:
        """codes [batch, heads, n, blocks, rows] (or numbers [batch, heads, n, head_dim]) and [batch, heads, n, blocks] each."""
        lie = (bool(self.type.format), False, False)
        pairs = list(zip(self.tensors, (codes, *halves), lie, strict=False))
        if self.device.type != "cpu":       # no cell's number is known here: indices stay there
            page, plain, turned = cells // PAGE, cells % PAGE, slots(cells)
            for room, new, lie in pairs:
                at = (slice(None), page, *[slice(None)] * (room.ndim - 3), turned if lie else plain)
                room[at] = new.movedim(2, 0)
            return
        for start, count, cell in _stretches(cells.tolist()):
            page, slot = divmod(cell, PAGE)
            turned = slot % _QUARTER * _LANES + slot // _QUARTER
            for room, new, lie in pairs:
                at, step = (turned, _LANES) if lie else (slot, 1)
                if count == 1:
                    room.select(1, page).select(-1, at).copy_(new.select(2, start))
                else:
                    room.select(1, page)[..., at:at + step * count - step + 1:step].copy_(
                        new.narrow(2, start, count).movedim(2, -1))

    def blocks(self, cells: torch.Tensor) -> torch.Tensor:
        """What lies in cells int64 [n], as llama.cpp's blocks: uint8 [batch, heads, n, row_bytes]."""
        page, known = cells // PAGE, self.type
        if not known.format:
            found = self.codes[:, page, :, :, cells % PAGE].permute(1, 2, 0, 3)
            return found.contiguous().view(torch.uint8)
        halves = [half[:, page, :, :, cells % PAGE][..., None].view(torch.uint8) for half in self.tensors[1:]]
        found = torch.cat([*halves, self.codes[:, page, :, :, :, slots(cells)]], -1)
        return found.permute(1, 2, 0, 3, 4).flatten(-2)

    # ---- reading -------------------------------------------------------------------------------------------------

    def numbers(self, first: int = 0, last: int | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What some pages stand for: [batch, pages, heads, head_dim, 256], cells in order."""
        codes, halves = self.part(first, last)
        if not self.type.format:
            return codes.to(dtype)
        found = in_order(levels(codes, self.type)) * halves[0].float()[..., None, :]
        if len(halves) == 2:
            found += halves[1].float()[..., None, :]
        return found.flatten(3, 4).to(dtype)

    def part(self, first: int = 0, last: int | None = None) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Views of some pages: (codes, (scales, minimums))."""
        rows = slice(first, last)
        return self.codes[:, rows], tuple(t[:, rows] for t in self.tensors[1:])


def slots(cells: torch.Tensor) -> torch.Tensor:
    """Where in a row of 256 bytes a cell's lies: 64 i + w is byte 4 w + i."""
    at = cells % PAGE
    return at % (PAGE // _LANES) * _LANES + at // (PAGE // _LANES)


def in_order(x: torch.Tensor) -> torch.Tensor:
    """[..., 256] in the order of a row's bytes -> in the order of cells."""
    return x.unflatten(-1, (-1, _LANES)).transpose(-1, -2).flatten(-2)


def as_bytes_lie(x: torch.Tensor) -> torch.Tensor:
    """[..., 256] in the order of cells -> in that of a row's bytes."""
    return x.unflatten(-1, (_LANES, -1)).transpose(-1, -2).flatten(-2)


def levels(codes: torch.Tensor, known: CellType) -> torch.Tensor:
    """uint8 [..., rows, 256] -> float32 [..., 32, 256]: what codes stand for before their scale, as their bytes lie."""
    if known.bits == 8:
        return codes.view(torch.int8).float()
    high = None
    if known.bits == 5:
        bits = torch.arange(8, dtype=torch.uint8, device=codes.device)[:, None]
        high = (codes[..., :4, None, :] >> bits & 1).flatten(-3, -2) << 4
        codes = codes[..., 4:, :]
    found = torch.cat([codes & 15, codes >> 4], -2)
    if known.name == "iq4_nl":
        return levels_of(codes.device)[found.int()]
    if high is not None:
        found |= high
    found = found.float()
    return found if known.floats == 2 else found.sub_(1 << known.bits - 1)


def write_both(keys: Pages, values: Pages, cells: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Both sides of a layer, [batch, heads, n, head_dim] each, into the same cells: where they are of one type they are
    rounded together, as for a single token the number of operations is what it costs."""
    known = keys.type
    if not known.format or values.type != known or k.numel() + v.numel() > FEW:
        keys.write(cells, k)
        values.write(cells, v)
        return
    codes, halves = rounded(torch.cat([k.reshape(-1, BLOCK), v.reshape(-1, BLOCK)]), known)
    sizes = k.numel() // BLOCK, v.numel() // BLOCK
    parts = [part.split(sizes) for part in (codes, *halves)]
    for side, (pages, x) in enumerate(((keys, k), (values, v))):
        shape = (*x.shape[:3], pages.head_dim // BLOCK)
        pages._lay(cells, parts[0][side].view(*shape, -1), [part[side].view(shape) for part in parts[1:]])


def _stretches(cells: list[int]) -> Iterator[tuple[int, int, int]]:
    """(place in the list, count, cell) of runs of neighbouring cells that lie alike: none crosses a quarter of a page."""
    start = 0
    for i in range(1, len(cells) + 1):
        if i == len(cells) or cells[i] != cells[i - 1] + 1 or not cells[i] % _QUARTER:
            yield start, i - start, cells[start]
            start = i


def _clamped(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In `dtype`; what lies beyond its largest number becomes that, where the type has no infinity."""
    if dtype == torch.float8_e4m3fn:
        most = torch.finfo(dtype).max
        return x.float().clamp(-most, most).to(dtype)
    return x.to(dtype)

