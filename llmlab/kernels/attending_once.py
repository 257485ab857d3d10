"""One token's attention over packed pages, and its own keys and values laid into them: pure functions, written to be compiled.

A token meets each byte of the cache once, so it should take about as long as reading it does. Compiled, every number is two or
three operations away from its word, is multiplied by its scale and then by each query of the group, in registers; nothing
unpacked is ever written down. What makes inductor write such loops: words travel as float32 and are seen as int32 inside (torch
2.13 loads whole registers of floats alone); shifts lie in a table, which makes them a loop of their own; and a loop has eight
sums, each fed by one multiply-add, for which sixteen registers suffice. Each page has a maximum of its own, and pages are
weighed against each other at the end (flash-decoding). The token itself is looked at beside the pages, as what its codes stand
for: what is read and what is written need not wait for each other.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..formats.encoders.legacy import HALF_AT_MOST
from ..formats.iq4 import LEVELS
from .pages import BLOCK, PAGE, CellType, Pages, slots
from .words import level

LOG2E = 1.4426950408889634
NOWHERE = -1e30         # a score that leaves no share; finite, so that a page without any cell in view is weighed by 0, not NaN
LANES = 4               # cells of a word
# 2^x for |x| <= 1/2, off by 1.02e-7 of itself at most: interpolated at Chebyshev's nodes.
POWER = (1.0000000754548972, 0.6931471880262273, 0.2402210748530968, 0.05550357114222094,
         0.009676031918255982, 0.001339086336353527)


class Side(NamedTuple):
    """Keys or values of one layer as a package takes them: `words` float32 [pages, heads, blocks, rows, 64] (numbers as they
    are: [pages, heads, head_dim, 256]), `halves` float16 [pages, heads, blocks, 256], and `bytes`, uint8 [pages, heads, blocks,
    rows, 256], the same memory as `words`, to be written to."""

    type: CellType
    words: torch.Tensor
    halves: tuple[torch.Tensor, ...] = ()
    bytes: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.words, *self.halves, *(() if self.bytes is None else (self.bytes,))

    @classmethod
    def of(cls, known: CellType, tensors: Iterator[torch.Tensor]) -> "Side":
        """From the next of `tensors`, as `tensors` has them."""
        words = next(tensors)
        return cls(known, words, tuple(next(tensors) for _ in range(known.floats)), next(tensors) if known.format else None)


def side(pages: Pages, count: int) -> Side:
    """The first `count` pages of one text."""
    codes, halves = pages.codes[0, :count], tuple(t[0, :count] for t in pages.tensors[1:])
    if not pages.type.format:
        return Side(pages.type, codes)
    return Side(pages.type, codes.view(torch.float32), halves, codes)


def shifts() -> torch.Tensor:
    """By how many bits each of a word's cells is shifted: int32 [4, 1]."""
    return torch.arange(0, 8 * LANES, 8, dtype=torch.int32)[:, None]


def attend_once(q: torch.Tensor, new: tuple[torch.Tensor, torch.Tensor], keys: Side, values: Side, positions: torch.Tensor,
                at: torch.Tensor, shifts: torch.Tensor, *, scale: float, softcap: float = 0.0, window: int = 0,
                sinks: torch.Tensor | None = None, settle=lambda value: value) -> torch.Tensor:
    """q [kv_heads, group, head_dim] float32 of the token at position `at` int32 [1] -> what its heads find, the same shape.

    new: the token's own key and value [kv_heads, head_dim], as what is laid down of them stands for. positions: float32
    [pages, 256], the bits of int32, as `attending.attention` has them; of the pages only cells before `at` are looked at.
    `settle`: what writes a value down before others read it, for the compiler.
    """
    heads, group, head_dim = q.shape
    side_by_side = _at_once(group)
    q = settle(q * (scale if softcap else scale * LOG2E)).view(heads, -1, side_by_side, head_dim)   # powers of two are taken
    place = positions.view(torch.int32)
    seen = (place >= 0) & (place < at)
    if window:
        seen = seen & (place > at - window)
    hidden = settle(torch.where(seen, 0.0, NOWHERE))[:, None, None]             # [pages, 1, 1, 256]

    def bent(scores: torch.Tensor) -> torch.Tensor:
        return torch.tanh(scores / softcap) * (softcap * LOG2E) if softcap else scores

    # Of each query of those side by side [pages, heads, others] the largest score, the sum of shares, and [.., 256] the shares.
    most, total, shares = [], [], []
    for parts in _scores(q, keys, shifts, settle):
        parts = [bent(part) + hide for part, hide in zip(parts, hidden.chunk(len(parts), -1), strict=True)]
        most.append(_highest([part.amax(-1) for part in parts]))
        shares.append(settle(torch.cat([power((part - most[-1][..., None]).clamp(min=-126.0)) for part in parts], -1)))
        total.append(shares[-1].sum(-1))
    found = _brought(shares, values, shifts, settle)                            # [pages, heads, others, head_dim] of each
    own = bent((q * new[0][:, None, None]).sum(-1))                             # [heads, others, side_by_side]
    sinks = None if sinks is None else sinks.view(own.shape) * LOG2E
    out = []
    for i in range(side_by_side):
        highest = torch.maximum(most[i].amax(0), own[..., i])
        if sinks is not None:
            highest = torch.maximum(highest, sinks[..., i])
        weights = settle(power((most[i] - highest).clamp(min=-126.0)) * (most[i] > NOWHERE / 2))
        mine = power((own[..., i] - highest).clamp(min=-126.0))
        whole = (total[i] * weights).sum(0) + mine
        if sinks is not None:
            whole = whole + power((sinks[..., i] - highest).clamp(min=-126.0))
        brought = (found[i] * weights[..., None]).sum(0) + mine[..., None] * new[1][:, None]
        out.append(brought / whole[..., None])
    return torch.stack(out, 2).reshape(heads, group, -1)


def _at_once(group: int) -> int:
    """Of a group's queries those whose sums are in registers together: up to four where that divides them."""
    best = [max(n for n in range(1, most + 1) if group % n == 0) for most in (4, 7)]
    return best[0] if best[0] >= min(3, group) else best[1]


def _highest(found: list[torch.Tensor]) -> torch.Tensor:
    for other in found[1:]:
        found = [torch.maximum(found[0], other)]
    return found[0]


def power(x: torch.Tensor) -> torch.Tensor:
    """2^x for -126 <= x <= 0: a library's exponential takes as long as all the rest of a score."""
    whole = x.round()
    part, found = x - whole, POWER[-1]
    for factor in POWER[-2::-1]:
        found = found * part + factor
    return found * ((whole.to(torch.int32) + 127) << 23).view(torch.float32)


# ---- codes -----------------------------------------------------------------------------------------------------

def _scores(q: torch.Tensor, keys: Side, shifts: torch.Tensor, settle) -> list[list[torch.Tensor]]:
    """q [heads, others, side_by_side, head_dim] times all keys -> of each of those side by side runs of scores that make up
    [pages, heads, others, 256]: eight sums at once, each of one query and one cell of the words."""
    known, found = keys.type, []
    if not known.format:
        numbers = keys.words.unflatten(2, (2, -1)).float()[:, :, None]
        return [[(numbers[:, :, :, 0] * q[None, :, :, i, :numbers.shape[4], None]
                  + numbers[:, :, :, 1] * q[None, :, :, i, numbers.shape[4]:, None]).sum(3)] for i in range(q.shape[2])]
    words = keys.words.view(torch.int32)
    scale, *least = (settle(half.float()).unflatten(3, (LANES, -1))[:, :, None, :, None, None] for half in keys.halves)
    runs = 1 if q.shape[2] > 4 else 2 if q.shape[2] > 2 else 4
    step = LANES // runs
    numbers = []
    for run in range(runs):
        lanes = slice(run * step, (run + 1) * step)
        codes = _both(words, known, shifts[lanes])[:, :, None] * scale[..., lanes, :]   # [.., 1, blocks, 2, 16, step, 64]
        numbers.append(codes + least[0][..., lanes, :] if least else codes)
    q = q.unflatten(-1, (-1, 2, BLOCK // 2))
    for i in range(q.shape[2]):
        by = q[None, :, :, i, :, :, :, None, None]
        found.append([(one * by).sum((3, 4, 5)).flatten(3) for one in numbers])
    return found


def _brought(shares: list[torch.Tensor], values: Side, shifts: torch.Tensor, settle) -> list[torch.Tensor]:
    """Shares [pages, heads, others, 256] times all values -> of each [pages, heads, others, head_dim]."""
    numbers = [one[:, :, None] for one in _numbers(values, shifts, settle)]
    lanes = numbers[0].shape[-2]
    found = []
    for part in shares:
        part = part.unflatten(3, (lanes, -1))[:, :, :, None, None]
        sums = [(one * part).sum((5, 6)) for one in numbers]                    # [pages, heads, others, blocks, rows]
        found.append(torch.stack(sums, 4 if values.type.format else 3).flatten(3))
    return found


def _numbers(side: Side, shifts: torch.Tensor, settle) -> list[torch.Tensor]:
    """What a side stands for, float32, two halves of each block: [pages, heads, blocks, 16, 4, 64]; of numbers as they are two
    halves of each head, [pages, heads, 1, head_dim / 2, 1, 256]."""
    known = side.type
    if not known.format:
        halves = side.words.unflatten(2, (2, -1)).float()
        return [halves[:, :, half, None, :, None] for half in range(2)]
    words = side.words.view(torch.int32)
    scale, *least = (settle(half.float()).unflatten(3, (LANES, -1))[:, :, :, None] for half in side.halves)
    found = []
    for half in range(2):
        codes = _codes(words, known, half, shifts) * scale
        found.append(codes + least[0] if least else codes)
    return found


def _both(words: torch.Tensor, known: CellType, shifts: torch.Tensor) -> torch.Tensor:
    """What codes stand for before their scale, float32 [pages, heads, blocks, 2, 16, lanes, 64]; both halves in one loop."""
    if known.bits == 8:
        words = words.unflatten(3, (2, -1))
        return (words[..., None, :] << 24 - shifts >> 24).float()
    low = words[:, :, :, None, known.rows - BLOCK // 2:, None]
    halves = torch.arange(0, 8, 4, dtype=torch.int32)[:, None, None, None]
    codes = low >> halves + shifts & 15
    if known.name == "iq4_nl":
        return level(codes.float(), 0)
    if known.bits == 5:
        codes = codes | _fifth(words[:, :, :, :4], shifts).unflatten(3, (2, 2)).flatten(4, 5)
    return (codes if known.floats == 2 else codes - (1 << known.bits - 1)).float()


def _codes(words: torch.Tensor, known: CellType, half: int, shifts: torch.Tensor) -> torch.Tensor:
    """Words int32 [.., rows, 64] -> what codes of half of each block stand for before their scale, float32 [.., 16, 4, 64]."""
    rows = BLOCK // 2
    if known.bits == 8:
        return (words[:, :, :, half * rows:(half + 1) * rows, None] << 24 - shifts >> 24).float()
    codes = words[:, :, :, known.rows - rows:, None] >> shifts + 4 * half & 15
    if known.name == "iq4_nl":
        return level(codes.float(), 0)
    if known.bits == 5:
        codes = codes | _fifth(words[:, :, :, 2 * half:2 * half + 2], shifts).flatten(3, 4)
    return (codes if known.floats == 2 else codes - (1 << known.bits - 1)).float()


def _fifth(words: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Words [.., n, 64] of fifth bits -> 16 or 0, [.., n, 8, lanes, 64]: of number 8 k + j that is bit j of byte k."""
    return (words[..., None, None, :] >> torch.arange(8, dtype=torch.int32)[:, None, None] + shifts & 1) << 4


# ---- the token's own -------------------------------------------------------------------------------------------

class Laid(NamedTuple):
    """A token's key or value in a cache's type: `bytes` uint8 [heads, blocks, rows] (numbers as they are: [heads, head_dim]),
    `halves` float16 [heads, blocks], and the `numbers` float32 [heads, head_dim] they stand for."""

    bytes: torch.Tensor
    halves: tuple[torch.Tensor, ...]
    numbers: torch.Tensor


def place(cell: int) -> torch.Tensor:
    """Where a cell lies: int64 [3], its page, its place in the page, and that of its bytes in a row."""
    return torch.tensor([cell // PAGE, cell % PAGE, int(slots(torch.tensor(cell)))])


def lay(laid: Laid, side: Side, place: torch.Tensor) -> None:
    """Write a token into its cell."""
    page, cell, byte = place[:1], place[1:2], place[2:]
    if not side.type.format:
        side.words[page, :, :, cell] = laid.bytes[None]
        return
    side.bytes[page, :, :, :, byte] = laid.bytes[None]
    for half, new in zip(side.halves, laid.halves, strict=True):
        half[page, :, :, cell] = new[None]


def encoded(x: torch.Tensor, known: CellType, settle=lambda value: value) -> Laid:
    """x [heads, head_dim] float32 as `rounding.rounded` rounds it, byte for byte."""
    if not known.format:
        if known.dtype == torch.float8_e4m3fn:      # which has no infinity
            x = x.clamp(-448.0, 448.0)
        numbers = settle(x.to(known.dtype))         # or a compiler would go on with those before they were rounded
        return Laid(numbers, (), numbers.float())
    x = settle(x.unflatten(-1, (-1, BLOCK)))
    if known.bits == 8:
        scale = x.abs().amax(-1, keepdim=True) / 127
        codes = _product(x, _inverse(scale))
        codes = (codes + torch.copysign(torch.full_like(codes, HALF_AT_MOST), codes)).to(torch.int32)
        return _laid(codes & 255, codes.float(), (scale,), settle)
    if known.name == "iq4_nl":
        return _uneven(x, settle)
    top = 1 << known.bits - 1
    if known.floats == 1:
        scale = _largest(x, settle) * (-1 / top)
        codes = _product(x, _inverse(scale)) + (top + 0.5)
        halves, low = (scale,), top
    else:
        least = x.amin(-1, keepdim=True)
        scale = (x.amax(-1, keepdim=True) - least) / (2 * top - 1)
        codes = _product(x - least, _inverse(scale)) + 0.5
        halves, low = (scale, least), 0
    codes = settle(codes.to(torch.int32).clamp(max=2 * top - 1))
    return _laid(_packed(codes, known.bits), (codes - low).float(), halves, settle)


def _laid(packed: torch.Tensor, levels: torch.Tensor, halves: tuple[torch.Tensor, ...], settle) -> Laid:
    halves = tuple(settle(half.to(torch.float16)) for half in halves)
    numbers = levels * halves[0].float()
    if len(halves) == 2:
        numbers = numbers + halves[1].float()
    return Laid(packed.to(torch.uint8), tuple(half[..., 0] for half in halves), numbers.flatten(-2))


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, 0 for 0 and for what is too small to have one."""
    found = 1.0 / scale
    return torch.where(found.abs() < float("inf"), found, 0.0)


def _product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Rounded before anything is added to it: of a product and a sum a compiler makes one operation that is rounded once."""
    return (one * other).clamp(min=-3.0e38)


def _largest(x: torch.Tensor, settle) -> torch.Tensor:
    """[.., 1] of each block the number farthest from zero, the first of several."""
    most = settle(x.abs().amax(-1, keepdim=True))
    at = torch.arange(x.shape[-1], dtype=torch.int32)
    above, below = (torch.where(x == one, at, x.shape[-1]).amin(-1, keepdim=True) for one in (most, -most))
    return torch.where(above <= below, most, -most)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [.., 32] -> [.., 16 or 20]: numbers 0-15 in low halves, 16-31 in high ones, before them fifth bits."""
    half = BLOCK // 2
    low = codes[..., :half] & 15 | (codes[..., half:] & 15) << 4
    if bits == 4:
        return low
    fifth = (codes >> 4).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.int32)
    return torch.cat([fifth.sum(-1).to(torch.int32), low], -1)


def _uneven(x: torch.Tensor, settle) -> Laid:
    """iq4_nl: see `rounding`; sums of 32 are taken one after another, as C takes them."""
    scaled = settle(x * _inverse(_largest(x, settle) / LEVELS[0]))
    codes = sum((scaled >= (one + other) / 2).to(torch.int32) for one, other in zip(LEVELS, LEVELS[1:], strict=False))
    codes = settle(codes)
    levels = settle(level(codes.float(), 0))
    weighed = x * x * levels
    with_x, squares = settle(_product(weighed, x)), settle(_product(weighed, levels))
    sums = []
    for terms in (with_x, squares):
        total = terms[..., :1]
        for i in range(1, BLOCK):
            total = total + terms[..., i:i + 1]
        sums.append(total)
    scale = torch.where(sums[1] > 0, sums[0] / sums[1], 0.0)
    return _laid(_packed(codes, 4), levels, (scale,), settle)
