"""A layer's KV cache: packed pages that are only ever added to, what is near in full precision, and where each token lies.

A full layer has a cell for every position; one with a sliding window has a ring of cells that are written again once no window
reaches them. The order of cells means nothing to attention: each cell's position says who looks at it.
"""

from collections.abc import Callable
from functools import cache

import torch

from ..errors import LabError
from ..kernels.attending import attention
from ..kernels.pages import PAGE, Pages, write_both
from ..memory import cache_types, checked_integer
from ..units import align

BATCH = 512             # tokens that are written at once, at most: a ring has room for so many beside its window
_MASKED = 64            # queries whose mask is held at once
_NEAR = ("near_keys", "near_values", "near_positions")
_TOKENS = (2, 2, 1)     # dimension of the tokens in near keys, values and positions


def cells_of(context: int, window: int = 0) -> int:
    """Cells that a layer of a text of up to `context` tokens keeps (llama-context.cpp, llama-kv-cache-iswa.cpp): padded to
    256; with a window no more than that and a batch need."""
    padded = align(context, PAGE)
    return align(min(padded, window + BATCH), PAGE) if window else padded


class LayerCache:
    """Keys and values of one layer, of `batch` texts that are read side by side.

    kv: cache type, or one for keys and one for values (`memory.CACHE_TYPES`). window: tokens a token looks back on, itself
    among them (0: all). cells: room now (it grows to `capacity`); capacity: most cells there may be (None: no limit); both are
    rounded up to whole pages. sinks, recent: the first and the last so many tokens stay in float16 beside the pages, the last
    ones until they are pushed out and quantized, once. rotate: keys, values and queries are multiplied by an orthonormal
    Hadamard matrix, and what attention finds once more, so that no number of a block stands out.

    Tokens are counted as they come; the one of number o lies in cell o % capacity. keys, values: `Pages`. positions: int32
    [batch or 1, cells], what a token was said to be at, -1 for an empty cell. near: None, or (keys [batch, kv_heads, sinks +
    recent, key_dim], values, positions int32) in float16. length: the number of the next token.

    Raises LabError for heads that do not divide into blocks and numbers that cannot be, UnknownName for a type there is not.
    """

    def __init__(self, kv: str | tuple[str, str], kv_heads: int, key_dim: int, value_dim: int, *, batch: int = 1,
                 window: int = 0, cells: int = PAGE, capacity: int | None = None, sinks: int = 0, recent: int = 0,
                 rotate: bool = False, device: torch.device | str = "cpu"):
        self.kv = cache_types(kv)
        for name, value in (("sinks", sinks), ("recent", recent), ("window", window)):
            checked_integer(name, value, 0, 2**31 - 1, "give a whole number of tokens, from 0 up")
        self.window, self.sinks, self.recent, self.rotate = window, sinks, recent, bool(rotate)
        self.capacity = None if capacity is None else align(max(capacity, 1), PAGE)
        cells = self._padded(max(cells, 1))
        self.keys, self.values = (Pages(type, batch, kv_heads, dim, cells, device)
                                  for type, dim in zip(self.kv, (key_dim, value_dim), strict=True))
        self.batch, self.device = batch, self.keys.device
        self.positions = torch.full((1, cells), -1, dtype=torch.int32, device=self.device)
        self.near = None
        if sinks + recent:
            self.near = (*(torch.zeros(batch, kv_heads, sinks + recent, dim, dtype=torch.float16, device=self.device)
                           for dim in (key_dim, value_dim)),
                         torch.full((1, sinks + recent), -1, dtype=torch.int32, device=self.device))
        self.length = 0
        self._first = 0         # number of the first token that still counts: those before were dropped
        self._unpacked = 0      # tokens from this number on lie in `near`, not in pages
        self._lowest = 0        # of those before this number some were written over
        self._fresh = None      # of several tokens that just came, what each of them looks at beside the pages

    # ---- what it holds -------------------------------------------------------------------------------------------

    @property
    def cells(self) -> int:
        """Room for so many tokens in pages now."""
        return self.keys.cells

    @property
    def bytes(self) -> int:
        """Of keys and values, exactly, near ones among them. Beside them each cell's position takes 4."""
        return self.keys.bytes + self.values.bytes + sum(t.nbytes for t in (self.near or ())[:2])

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All there is of it."""
        return (*self.keys.tensors, *self.values.tensors, self.positions, *(self.near or ()))

    def cell(self, numbers: torch.Tensor) -> torch.Tensor:
        """The cells of tokens int64 [n] by their numbers."""
        return numbers if self.capacity is None else numbers % self.capacity

    def grow(self, cells: int) -> None:
        """Room for so many tokens, as far as there may be."""
        cells = self._padded(cells)
        if (more := cells - self.cells) > 0:
            self.keys.grow(cells)
            self.values.grow(cells)
            self.positions = torch.cat([self.positions, self.positions.new_full((self.positions.shape[0], more), -1)], 1)

    def _padded(self, cells: int) -> int:
        return min(align(cells, PAGE), self.capacity or align(cells, PAGE))

    # ---- writing -------------------------------------------------------------------------------------------------

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        """keys, values [batch, kv_heads, n, dim], turned by RoPE, of the next n tokens, which are at `positions` int [n] or, of
        texts side by side, [batch, n], -1 for a token that is none. Raises LabError for more than there is room for, and for
        so many at once that a ring would lose what the first of them looks at."""
        first, last = self.length, self.length + keys.shape[2]
        packed = max(self._unpacked, last - self.recent)        # tokens before this number lie in pages afterwards
        self._check(first, last, packed)
        if last > self.cells:
            self.grow(max(last, 2 * self.cells))
        if self.rotate:
            keys, values = turned(keys), turned(values)
        positions = positions[None] if positions.ndim == 1 else positions
        positions = positions.to(self.positions)
        if positions.shape[0] > self.positions.shape[0]:        # each text has its own from here on
            self.positions = self.positions.repeat(self.batch, 1)
            self.near = self.near and (*self.near[:2], self.near[2].repeat(self.batch, 1))
        if self.near is None:
            self._pack(first, last, keys, values, positions)
        else:
            self._append_near(first, last, packed, keys.to(torch.float16), values.to(torch.float16), positions)
        self._lowest = max(self._lowest, packed - (self.capacity or packed))
        self.length, self._unpacked = last, packed

    def _check(self, first: int, last: int, packed: int) -> None:
        """Raises LabError where `append` would write over a cell that is still looked at."""
        if self.capacity is None or (lost := packed - self.capacity) <= self._first:
            return
        if not self.window:
            raise LabError(f"the cache holds {self.capacity:,} tokens and {last - self._first:,} would be in it; make it with "
                           "more cells, or drop some")
        if lost > max(self._first, first + 1 - self.window):
            raise LabError(f"{last - first:,} tokens at once are more than a window of {self.window:,} in {self.capacity:,} "
                           f"cells takes; append {BATCH} at most")

    def next_cell(self) -> int:
        """Where the next token goes, with room for it: compiled code lays it there itself, and `count_one` is told so. Raises
        as `append` does; not for a cache with anything near."""
        last = self.length + 1
        self._check(self.length, last, last)
        if last > self.cells:
            self.grow(max(last, 2 * self.cells))
        return self.length if self.capacity is None else self.length % self.capacity

    def count_one(self) -> None:
        """The next token lies in its cell, at its position."""
        self.length = self._unpacked = self.length + 1
        self._lowest = max(self._lowest, self.length - (self.capacity or self.length))

    def _pack(self, first: int, last: int, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        """Lay tokens into pages."""
        cells = self.cell(torch.arange(first, last, device=self.device))
        write_both(self.keys, self.values, cells, keys, values)
        self.positions[:, cells] = positions

    def _append_near(self, first: int, last: int, packed: int, keys: torch.Tensor, values: torch.Tensor,
                     positions: torch.Tensor) -> None:
        sinks, recent = self.sinks, self.recent
        if first < sinks or positions.shape[0] > 1:
            rest = self._lay_sinks(keys, values, positions)
        else:
            rest = positions
        held = self._unpacked
        slots = sinks + torch.arange(held, first, device=self.device) % max(recent, 1)
        # Of the tokens from number `held` on, those that lie near and those that come.
        new = [torch.cat([near.index_select(dim, slots), x], dim)
               for near, x, dim in zip(self.near, (keys, values, rest), _TOKENS, strict=True)]
        if recent and last - first > 1:
            # Each looks at the last `recent` before it as they are, whichever others come with it.
            self._fresh = (*(torch.cat([near.narrow(dim, 0, sinks), x], dim)
                             for near, x, dim in zip(self.near, new, _TOKENS, strict=True)), held, packed)
        if out := packed - held:
            self._pack(held, packed, new[0][:, :, :out], new[1][:, :, :out], new[2][:, :out])
        if stay := last - max(first, packed):
            slots = sinks + torch.arange(last - stay, last, device=self.device) % recent
            for near, x, dim in zip(self.near, new, _TOKENS, strict=True):
                near.index_copy_(dim, slots, x.narrow(dim, x.shape[dim] - stay, stay))

    def _lay_sinks(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Put the first tokens of each text where they stay; the positions of the rest, -1 for what was put."""
        which = (positions >= 0) & (positions < self.sinks)
        text, token = which.nonzero(as_tuple=True)
        slot = positions[text, token].long()
        texts = slice(None) if positions.shape[0] == 1 else text
        if positions.shape[0] == 1:
            self.near[0][:, :, slot], self.near[1][:, :, slot] = keys[:, :, token], values[:, :, token]
        else:
            self.near[0][text, :, slot], self.near[1][text, :, slot] = keys[text, :, token], values[text, :, token]
        self.near[2][texts, slot] = slot.to(torch.int32)
        return positions.masked_fill(which, -1)

    # ---- reading -------------------------------------------------------------------------------------------------

    def attend(self, q: torch.Tensor, at: torch.Tensor, *, scale: float = 1.0, softcap: float = 0.0,
               sinks: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        """q [batch, heads, n, key_dim] of the n tokens that were appended last, at positions int [n] or [batch, n] -> what
        they find, [batch, heads, n, value_dim] float32. `scale`, `softcap`, `sinks` (scores) and `mask` as in
        `kernels.attending.attention`; a mask goes with pages alone."""
        at = at[None] if at.ndim == 1 else at
        if self.rotate:
            q = turned(q)
        given = {"scale": scale, "window": self.window, "softcap": softcap, "sinks": sinks}
        if self.near is None:
            found = attention(q, self.keys, self.values, self.positions, at, mask=mask, **given)
        elif mask is not None:
            raise LabError("a mask names cells of pages, and some tokens lie beside them; make the cache without sinks and "
                           "recent")
        elif self._fresh is None:
            found = attention(q, self.keys, self.values, self.positions, at, beside=self.near, **given)
        else:
            found = torch.cat([self._of_many(q[:, :, rows], at[:, rows], given)
                               for rows in (slice(i, i + _MASKED) for i in range(0, q.shape[2], _MASKED))], 2)
            self._fresh = None
        return turned(found) if self.rotate else found

    def _of_many(self, q: torch.Tensor, at: torch.Tensor, given: dict) -> torch.Tensor:
        """Each token looks at what was nearest to it in full precision, though it is in pages by now."""
        keys, values, near, held, packed = self._fresh
        at = at[:, :, None]
        cells = self.cell(torch.arange(held, packed, device=self.device))
        late = torch.zeros(self.cells, dtype=torch.int32, device=self.device)
        late[cells] = self.recent

        def seen(positions: torch.Tensor, late: torch.Tensor | int = 0) -> torch.Tensor:
            positions = positions[:, None]
            found = (positions >= 0) & (positions + late <= at)
            return found & (positions > at - self.window) if self.window else found

        beside = seen(near)
        beside[:, :, self.sinks:] &= near[:, None, self.sinks:] > at - self.recent
        return attention(q, self.keys, self.values, self.positions, at[..., 0], mask=seen(self.positions, late)[:, None],
                         beside=(keys, values, beside), **given)

    # ---- as a file has it ----------------------------------------------------------------------------------------

    def saved(self) -> tuple[tuple[int, ...], list[tuple[str, torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]]]:
        """Of one text: numbers that say where it stands, and its tensors by name, dtype, shape and a function that makes them:
        positions int32 [m] of the cells in use, their keys and values in llama.cpp's blocks, uint8 [kv_heads, m, row_bytes],
        and what is near. `restore` takes them whatever room there is."""
        cells = (self.positions[0] >= 0).nonzero().flatten()
        cells = cells[self.positions[0, cells].argsort()]
        found = [("positions", torch.int32, (len(cells),), lambda: self.positions[0, cells])]
        for name, pages in (("keys", self.keys), ("values", self.values)):
            shape = pages.heads, len(cells), pages.bytes // (pages.cells * pages.heads)
            found.append((name, torch.uint8, shape, lambda pages=pages: pages.blocks(cells)[0]))
        for name, near in zip(_NEAR, self.near or (), strict=False):
            found.append((name, near.dtype, tuple(near.shape[1:]), lambda near=near: near[0]))
        return (self.length, self._first, self._unpacked, self._lowest), found

    def restore(self, stands: tuple[int, ...], saved: Callable[[str], torch.Tensor]) -> None:
        """Into an empty cache what `saved` of a like one gave: its numbers, and a tensor by its name."""
        self.length, self._first, self._unpacked, lowest = stands
        self.grow(self._unpacked)
        positions = saved("positions").to(self.device)
        cells = self.cell(positions.long())
        for pages, name in ((self.keys, "keys"), (self.values, "values")):
            pages.set_blocks(cells, saved(name)[None].to(self.device))
        self.positions[0, cells] = positions
        self._lowest = max(lowest, self._unpacked - (self.capacity or self._unpacked))
        for name, near in zip(_NEAR, self.near or (), strict=False):
            near[0] = saved(name).to(self.device)

    # ---- forgetting ----------------------------------------------------------------------------------------------

    def holds(self, length: int) -> bool:
        """Whether the next token could be of this number: what it looks back on must not have been written over."""
        return length >= self.length or not self.window or max(self._first, length + 1 - self.window) >= self._lowest

    def crop(self, length: int) -> None:
        """Forget the tokens from number `length` on (texts side by side: at that position)."""
        if length < self.length:
            for positions in self._all_positions():
                positions.masked_fill_(positions >= length, -1)
            self.length, self._unpacked, self._fresh = length, min(self._unpacked, length), None

    def drop(self, first: int, last: int) -> None:
        """Forget the tokens with numbers from `first` up to `last`; those after stay as and where they are."""
        for positions in self._all_positions():
            positions.masked_fill_((positions >= first) & (positions < last), -1)
        self._first, self._fresh = max(self._first, last), None

    def move(self, count: int, by: int, turn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move the first `count` tokens, all among `sinks`, on by so many positions; `turn` turns keys [..., key_dim] float32
        by as many."""
        if count > self.sinks:
            raise LabError(f"{count:,} first tokens are to stay and {self.sinks:,} lie in full precision; make the cache with "
                           f"sinks={count}")
        keys, _, positions = self.near
        part = keys[:, :, :count].float()
        part = turned(turn(turned(part))) if self.rotate else turn(part)
        keys[:, :, :count] = part.to(keys.dtype)
        positions[:, :count] += torch.where(positions[:, :count] >= 0, by, 0).to(positions.dtype)

    def _all_positions(self) -> tuple[torch.Tensor, ...]:
        return (self.positions, *(self.near or ())[2:])


# ---- rotation --------------------------------------------------------------------------------------------------------

def turned(x: torch.Tensor) -> torch.Tensor:
    """x [..., dim] times an orthonormal Hadamard matrix of the largest power of two that divides dim, block by block. It is its
    own inverse."""
    matrix = hadamard(x.shape[-1] & -x.shape[-1], x.device)
    return (x.float().unflatten(-1, (-1, matrix.shape[0])) @ matrix).flatten(-2)


@cache
def hadamard(size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Sylvester's Hadamard matrix of a power of two, over its root: float32 [size, size], symmetric."""
    found = torch.ones(1, 1)
    while found.shape[0] < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return (found / size ** 0.5).to(device)
