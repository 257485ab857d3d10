"""The KV cache of many texts at once: fixed blocks of a few cells in one pool, and block tables that say whose they are.

A step's rows are the next tokens of several texts, laid into their cells with one write a layer. Then the texts that are one
token further look at their blocks all together, and those that read a piece of a prompt one after another.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional

from ..errors import LabError
from ..kernels import attending_paged, pools
from ..kernels.attending_once import power
from ..kernels.attending_paged import RUN, Runs, Side, attend_each, attend_runs, flat, runs
from ..kernels.attending_pieces import attend_piece
from ..kernels.pages import CellType, cell_type
from ..kernels.pools import Pool, write_both
from ..kernels.words import level
from ..memory import cache_types, checked_integer
from .compiling import NotPackaged, Package, package, settle
from .generating import out_of_memory
from .layers import Attend, LayerShape, Remember

_UNEVEN = 8     # a run merged for nothing costs a fortieth of one looked at: at most a fifth in all


class Part(NamedTuple):
    """A text's next `count` tokens, from position `first` on. blocks: its blocks from its beginning on, those of these tokens
    among them. prompt: whether they are a prompt's, which look as pieces of any length do even where it is one token: what a
    prompt comes out as is then the same to the bit however it is cut."""

    blocks: list[int]
    first: int
    count: int
    prompt: bool = False


class Piece(NamedTuple):
    """A part that goes by itself: its `rows` of the step, its blocks int64, its first position."""

    rows: slice
    blocks: torch.Tensor
    first: int


def block_bytes(shapes: Iterable[LayerShape], size: int = 16, kv: str | tuple[str, str] = "f32") -> int:
    """Bytes of one block of `size` cells in all layers, exactly. Raises LabError for heads that do not divide into the type's
    blocks, UnknownName for a type there is not."""
    return sum(torch.Size(one).numel() * dtype.itemsize for shape in shapes for side in (0, 1)
               for one, dtype in _laid_out(shape, size, cache_types(kv), side, False))


def _laid_out(shape: LayerShape, size: int, kv: tuple[str, str], side: int,
              narrow: bool) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return pools.shapes(cell_type(kv[side]), not side, shape.kv_heads, shape.head_dim, size, narrow)


class PagedCache:
    """Room for `blocks` blocks of `size` cells in each of the layers.

    shapes: of the layers. kv: cache type, or one for keys and one for values (`memory.CACHE_TYPES`). layers: (keys, values) of
    each layer. A layer with a sliding window has all blocks too, and looks at those in its window only. compile: whether those
    that are one token further look by compiled code, where there is a compiler; `why` says how it came out. It takes half a
    minute, once for each kind of layer on this machine; `progress` is told of it. sinks: whether layers have them.

    Raises LabError for heads that do not divide into blocks, numbers that cannot be and memory that there is not, UnknownName
    for a type there is not.
    """

    def __init__(self, shapes: Sequence[LayerShape], blocks: int, size: int = 16, kv: str | tuple[str, str] = "f32",
                 device: torch.device | str = "cpu", compile: bool = False, sinks: bool = False,
                 progress: Callable[[str], None] | None = None):
        self.blocks = checked_integer("blocks", blocks, 1, 2**31 - 1, "give a whole number of blocks")
        self.size = checked_integer("size", size, 2, 2**16, "give a whole number of cells a block, such as 16")
        self.shapes, self.kv, self.device = list(shapes), cache_types(kv), torch.device(device)
        self._packages: dict[tuple, Package] = {}
        self.why = "one-token queries look by torch's own operations"
        if compile:
            try:
                self._compile(sinks, progress)
                self.why = "one-token queries look by compiled code"
            except NotPackaged as error:
                self.why += f"; not compiled: {error}"
        kinds = [(shape.kv_heads, shape.head_dim) for shape in self.shapes]
        self._rooms: list[torch.Tensor] = []        # of layers alike one [layers, blocks, ..]: copied together
        self.layers: list[tuple[Pool, Pool]] = [()] * len(kinds)
        for kind in dict.fromkeys(kinds):
            numbers = [number for number, other in enumerate(kinds) if other == kind]
            sides = [self._room(self.shapes[numbers[0]], len(numbers), side, bool(self._packages)) for side in (0, 1)]
            for place, number in enumerate(numbers):
                self.layers[number] = tuple(Pool(cell_type(self.kv[side]), not side, [t[place] for t in tensors])
                                            for side, tensors in enumerate(sides))
        self._flats = [[*flat(keys), *flat(values)] for keys, values in self.layers] if self._packages else []

    def _room(self, shape: LayerShape, layers: int, side: int, narrow: bool) -> list[torch.Tensor]:
        try:
            made = [torch.zeros(layers, self.blocks, *one, dtype=dtype, device=self.device)
                    for one, dtype in _laid_out(shape, self.size, self.kv, side, narrow)]
        except RuntimeError as error:
            if out_of_memory(error):
                raise LabError(f"memory does not suffice for {self.blocks:,} blocks; give fewer, or a narrower kv") from None
            raise
        self._rooms += made
        return made

    @property
    def bytes(self) -> int:
        """Of keys and values in all blocks, exactly."""
        return sum(room.nbytes for room in self._rooms)

    @property
    def block_bytes(self) -> int:
        """Of one block in all layers."""
        return self.bytes // self.blocks

    def copy(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copy blocks, (source, target) each, in all layers."""
        copies = list(copies)
        if not copies:
            return
        self._check(block for pair in copies for block in pair)
        sources, targets = (torch.tensor(one, device=self.device) for one in zip(*copies, strict=True))
        for room in self._rooms:
            room.index_copy_(1, targets, room.index_select(1, sources))

    def look(self, parts: Sequence[Part]) -> "Look":
        """Where the rows of a step go and what they look at, once for all layers. Raises LabError for blocks there are not, and
        for a part whose tokens its blocks have no room for."""
        for part in parts:
            if part.count < 1 or part.first < 0 or part.first + part.count > len(part.blocks) * self.size:
                raise LabError(f"{part.count} tokens from position {part.first} do not fit {len(part.blocks)} blocks of "
                               f"{self.size}; extend the table first")
            self._check(part.blocks)
        if not parts:
            raise LabError("there is nothing to read; give one part at least")
        return Look(parts, self.size, self.device)

    def _check(self, blocks: Iterable[int]) -> None:
        blocks = list(blocks)
        if min(blocks) < 0 or max(blocks) >= self.blocks:
            raise LabError(f"there is no block {min(blocks) if min(blocks) < 0 else max(blocks)}; blocks are counted from 0 to "
                           f"{self.blocks - 1}")

    def remember(self, number: int, look: "Look", shape: LayerShape, sinks: torch.Tensor | None = None) -> Remember:
        """What `layers.block` remembers the rows of a step with in layer `number`. sinks: [heads], scores that take a share and
        bring nothing."""
        keys, values = self.layers[number]

        def remember(new: torch.Tensor) -> Attend:
            write_both(keys, values, look.blocks, look.cells, new.to(self.device))
            return attend

        def attend(q: torch.Tensor) -> torch.Tensor:
            alike = look.alike(shape.window)
            if not look.pieces and len(alike) == 1:
                return self._ones(number, q, alike[0][1], shape, sinks)
            found = torch.empty(q.shape, dtype=torch.float32, device=q.device)
            for rows, each in alike:
                found[rows] = self._ones(number, q[rows], each, shape, sinks)
            for piece in look.pieces:
                found[piece.rows] = attend_piece(q[piece.rows], keys, values, piece.blocks, piece.first, scale=shape.scale,
                                                 window=shape.window, softcap=shape.softcap, sinks=sinks)
            return found

        return remember

    def _ones(self, number: int, q: torch.Tensor, runs: Runs, shape: LayerShape, sinks: torch.Tensor | None) -> torch.Tensor:
        """Tokens that come one of a text."""
        made = self._packages.get(_kind(shape, sinks is not None))
        if made is None:
            return attend_runs(q, *self.layers[number], runs, scale=shape.scale, softcap=shape.softcap, sinks=sinks)
        few = q if len(q) > 1 else functional.pad(q, (0, 0, 0, 0, 0, 1))       # sizes that may change are two at least
        return made(few.contiguous(), *runs[:4], *self._flats[number], *([] if sinks is None else [sinks]))[0][:len(q)]

    def _compile(self, sinks: bool, progress: Callable[[str], None] | None) -> None:
        """Packages for all kinds of layers. Raises NotPackaged."""
        if self.device.type != "cpu" or self.blocks < 2:
            raise NotPackaged("this is for processors" if self.device.type != "cpu" else "one block is too few")
        types, made = tuple(cell_type(name) for name in self.kv), {}
        for shape in self.shapes:
            if (kind := _kind(shape, sinks)) not in made:
                example = _example(shape, self.kv, self.size, sinks)
                sizes = [{0: "queries"}, {0: "runs"}, {0: "runs"}, {0: "runs"}, {0: "queries", 1: "most"}]
                sizes += [{0: "blocks"}] * (len(example) - len(sizes) - sinks)
                made[kind] = package(partial(_together, types, shape.scale, shape.softcap), example,
                                     f"paged_attention {types} {kind} {self.size} {RUN}",
                                     (attending_paged, power, level, _together, settle), dict(enumerate(sizes)), progress)
        self._packages = made


def _kind(shape: LayerShape, sinks: bool) -> tuple:
    return shape.heads, shape.kv_heads, shape.head_dim, shape.scale, shape.softcap, sinks


def _together(types: tuple[CellType, CellType], scale: float, softcap: float, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
    """`attend_each` of flat tensors, to be compiled."""
    q, table, owner, hidden, of, *rest = tensors
    left = iter(rest)
    keys, values = (Side.of(known, left) for known in types)
    return (attend_each(q, keys, values, Runs(table, owner, hidden, of, of[:, 0]), scale=scale, softcap=softcap,
                        sinks=next(left, None), settle=settle),)


def _example(shape: LayerShape, kv: tuple[str, str], size: int, sinks: bool) -> list[torch.Tensor]:
    """Some texts that are one token further, of several lengths."""
    lengths = [40 + 7 * i for i in range(32)]
    needed = [-(-length // size) for length in lengths]
    many = sum(needed)
    blocks, cells = torch.arange(many).repeat_interleave(size), torch.arange(size).repeat(many)
    both = []
    for side in (0, 1):
        pool = Pool(cell_type(kv[side]), not side, [torch.zeros(many, *one, dtype=dtype)
                                                    for one, dtype in _laid_out(shape, size, kv, side, True)])
        pool.write(blocks, cells, _waves(1.0 + side, shape.kv_heads, len(blocks), shape.head_dim))
        both += flat(pool)
    ends = torch.tensor(needed).cumsum(0).tolist()
    tables = [list(range(end - count, end)) for count, end in zip(needed, ends, strict=True)]
    looked = runs(tables, [length - 1 for length in lengths], size)
    found = [_waves(2.0, len(lengths), shape.heads, shape.head_dim), *looked[:4], *both]
    return [*found, torch.linspace(-1, 1, shape.heads)] if sinks else found


def _waves(most: float, *shape: int) -> torch.Tensor:
    """Numbers up and down between -1 and 1."""
    return torch.linspace(-most, most, torch.Size(shape).numel()).mul_(1e4).sin_().view(shape)


class Look:
    """A step's rows, as all layers use them. blocks, cells: int64 [rows], where each is laid; ones: the parts of one row, and
    which that is; pieces: those of several, and of prompts."""

    def __init__(self, parts: Sequence[Part], size: int, device: torch.device):
        self.size, self.device = size, device
        blocks, cells, start = [], [], 0
        self.ones: list[tuple[int, Part]] = []
        self.pieces: list[Piece] = []
        for part in parts:
            stop = start + part.count
            if part.count == 1 and not part.prompt:
                self.ones.append((start, part))
                blocks.append(part.blocks[part.first // size])
                cells.append(part.first % size)
            else:
                places = range(part.first, part.first + part.count)
                blocks += [part.blocks[place // size] for place in places]
                cells += [place % size for place in places]
                self.pieces.append(Piece(slice(start, stop), torch.tensor(part.blocks, device=device), part.first))
            start = stop
        self.rows = start
        self.blocks, self.cells = torch.tensor(blocks, device=device), torch.tensor(cells, device=device)
        self._alike: dict[int, list[tuple[torch.Tensor, Runs]]] = {}

    def alike(self, window: int = 0) -> list[tuple[torch.Tensor, Runs]]:
        """Of the rows that come one of a text, in layers of that window, those that look at about as many blocks, int64, and
        what they look at: in rising order where they are all together."""
        if window not in self._alike:
            groups = _groups([part.first // self.size - (max(0, part.first + 1 - window) // self.size if window else 0) + 1
                              for _, part in self.ones])
            self._alike[window] = [self._of([self.ones[at] for at in group], window) for group in groups]
        return self._alike[window]

    def _of(self, ones: list[tuple[int, Part]], window: int) -> tuple[torch.Tensor, Runs]:
        rows, parts = zip(*ones, strict=True)
        return torch.tensor(rows, device=self.device), runs([part.blocks for part in parts], [part.first for part in parts],
                                                            self.size, window, self.device)


def _groups(counts: list[int]) -> list[list[int]]:
    """Numbers 0, .., in groups whose largest count is not beyond `_UNEVEN` times their mean: what runs found is merged for as
    many as the longest has."""
    found, total = [], 0
    for at in sorted(range(len(counts)), key=counts.__getitem__):
        if not found or counts[at] * (len(found[-1]) + 1) > _UNEVEN * (total + counts[at]):
            found.append([])
            total = 0
        found[-1].append(at)
        total += counts[at]
    return [sorted(group) for group in found]
