"""Attention through block tables: the one-token queries of many texts, all together, over blocks of pools.

What a query looks at is cut into runs of a few blocks. Every run is scored, weighed and summed up by itself, whosever it is, so
work grows with the blocks in use and not with the longest text; then each query's runs are weighed against each other
(flash-decoding). What a query finds depends on its own blocks alone. `attend_each` is written to be compiled: numbers come
through the block table into registers, and nothing gathered is ever written down. `attend_runs` does the same without a
compiler, some runs at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from . import scratch
from .attending_once import LOG2E, NOWHERE, power
from .pages import BLOCK, CellType
from .pools import WORD, Pool
from .words import level

RUN = 4                 # blocks of a run: what a run leaves to be merged is then a fortieth of the float32 cells it looks at
NUMBERS = 1 << 19       # numbers of each side that are gathered at once without a compiler: 2 MiB
AT_ONCE = 4             # queries of a group whose sums are in registers together
_TINY = torch.finfo(torch.float32).tiny
Settle = Callable[[torch.Tensor], torch.Tensor]


class Runs(NamedTuple):
    """What one-token queries look at, of one window.

    table: int64 [runs, RUN], blocks; owner: int64 [runs], whose; hidden: float32 [runs, RUN, size], 0 where it looks and
    NOWHERE where not; of: int64 [queries, most], each query's runs, filled up by the last, which is hidden all over; first:
    int64 [queries], where each query's begin, all of them lying side by side in order. Two of each at least.
    """

    table: torch.Tensor
    owner: torch.Tensor
    hidden: torch.Tensor
    of: torch.Tensor
    first: torch.Tensor


def runs(tables: Sequence[Sequence[int]], at: Sequence[int], size: int, window: int = 0,
         device: torch.device | str = "cpu") -> Runs:
    """tables: each query's blocks, from its text's beginning; at: its position. Of a `window` only the blocks in it."""
    table, owner, starts, first, counts = [], [], [], [], []
    for query, (blocks, place) in enumerate(zip(tables, at, strict=True)):
        begin = max(0, place + 1 - window) // size if window else 0
        stop = place // size + 1
        count = -(-(stop - begin) // RUN)
        table += blocks[begin:stop]
        table += [blocks[begin]] * (count * RUN - (stop - begin))
        owner += [query] * count
        starts += range(begin * size, stop * size, RUN * size)
        first.append(len(owner) - count)
        counts.append(count)
    while len(counts) < 2:          # sizes that may change are two at least
        first.append(len(owner))
        counts.append(0)
    spare = len(owner)
    table += [table[0]] * RUN
    owner.append(0)
    starts.append(max(at) + 1)
    most = max(2, *counts)
    first, counts = (torch.tensor(one, device=device) for one in (first, counts))
    order = torch.arange(most, device=device)
    of = torch.where(order < counts[:, None], first[:, None] + order, spare)
    owner = torch.tensor(owner, device=device)
    cells = torch.tensor(starts, device=device)[:, None] + torch.arange(RUN * size, device=device)
    place = torch.tensor(at, device=device)[owner][:, None]
    out = cells > place
    if window:
        out |= cells <= place - window
    hidden = torch.zeros(cells.shape, device=device).masked_fill_(out, NOWHERE).view(-1, RUN, size)
    return Runs(torch.tensor(table, device=device).view(-1, RUN), owner, hidden, of, first)


# ---- one token each, without a compiler --------------------------------------------------------------------------

def attend_runs(q: torch.Tensor, keys: Pool, values: Pool, runs: Runs, *, scale: float, softcap: float = 0.0,
                sinks: torch.Tensor | None = None) -> torch.Tensor:
    """q [queries, heads, head_dim] -> what each finds, the same shape, float32. softcap: scores are bent to stay below it (0:
    not). sinks: [heads], scores that take a share and bring nothing."""
    count, heads, head_dim = q.shape
    kv_heads, group, size = keys.heads, heads // keys.heads, keys.size
    q = q.float().mul(scale).view(count, kv_heads, group, head_dim)
    many = len(runs.owner) - 1                          # the last is hidden all over, and there for compiled code
    most, total = (q.new_empty(many, kv_heads, group) for _ in range(2))
    found = q.new_empty(many, kv_heads, group, head_dim)
    step = max(1, NUMBERS // (RUN * kv_heads * head_dim * size))
    room = scratch.borrow(2, min(step, many) * RUN * kv_heads * head_dim * size, torch.float32, q.device)
    for start in range(0, many, step):
        part = slice(start, min(start + step, many))
        blocks = runs.table[part].reshape(-1)
        own = q.index_select(0, runs.owner[part])[:, None].expand(-1, RUN, -1, -1, -1)
        scores = torch.bmm(own.reshape(-1, group, head_dim), keys.numbers(blocks, room[0]).flatten(0, 1))
        scores = scores.view(-1, RUN, kv_heads, group, size)
        if softcap:
            scores.div_(softcap).tanh_().mul_(softcap)
        scores.add_(runs.hidden[part][:, :, None, None])
        torch.amax(scores.amax(4), 1, out=most[part])
        shares = scores.sub_(most[part][:, None, :, :, None]).exp_()
        torch.sum(shares.sum(4), 1, out=total[part])
        brought = torch.bmm(shares.view(-1, group, size), values.numbers(blocks, room[1]).flatten(0, 1))
        torch.sum(brought.view(-1, RUN, kv_heads, group, head_dim), 1, out=found[part])
    return _joined(most.flatten(1), total.flatten(1), found.view(many, heads, head_dim), runs, sinks)[:count]


def _joined(most: torch.Tensor, total: torch.Tensor, found: torch.Tensor, runs: Runs,
            sinks: torch.Tensor | None) -> torch.Tensor:
    """Runs' largest scores and sums of shares [runs, heads], and what these brought [runs, heads, head_dim] -> [queries, heads,
    head_dim]. Each query's runs are added one after another, so that no other query's can matter."""
    many, heads = most.shape
    owner, first = runs.owner[:many], runs.first
    top = most.new_full((len(first), heads), NOWHERE)
    top.scatter_reduce_(0, owner[:, None].expand(-1, heads), most, "amax")
    if sinks is not None:
        top = torch.maximum(top, sinks.float())
    weights = (most - top.index_select(0, owner)).exp_().T.reshape(-1)
    # Of each head of each query one bag.
    head = torch.arange(heads, device=most.device)[:, None]
    rows = (torch.arange(many, device=most.device) * heads + head).view(-1)
    begins = (first + head * many).view(-1)

    def summed(x: torch.Tensor) -> torch.Tensor:
        bags = functional.embedding_bag(rows, x.view(many * heads, -1), begins, mode="sum", per_sample_weights=weights)
        return bags.view(heads, len(first), -1).transpose(0, 1)

    whole = summed(total)
    if sinks is not None:
        whole = whole + (sinks.float() - top).exp_()[..., None]
    return summed(found) / whole.clamp(min=_TINY)


# ---- one token each, written to be compiled ----------------------------------------------------------------------

class Side(NamedTuple):
    """Keys or values of one layer as a package takes them: numbers as `Pool` has them; of a quantized type `words` float32, the
    codes' bits without their last dimension, and float16 `halves`."""

    type: CellType
    words: torch.Tensor
    halves: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(cls, known: CellType, tensors: Iterator[torch.Tensor]) -> "Side":
        """From the next of `tensors`, as `flat` has them."""
        return cls(known, next(tensors), tuple(next(tensors) for _ in range(known.floats)))


def flat(pool: Pool) -> list[torch.Tensor]:
    """A pool as a package takes it."""
    first, *halves = pool.tensors
    return [first.view(torch.float32)[..., 0] if pool.type.format else first, *halves]


def attend_each(q: torch.Tensor, keys: Side, values: Side, runs: Runs, *, scale: float, softcap: float = 0.0,
                sinks: torch.Tensor | None = None, settle: Settle = lambda value: value) -> torch.Tensor:
    """As `attend_runs`. `settle`: what writes a value down before others read it, for the compiler."""
    count, heads, head_dim = q.shape
    kv_heads = keys.words.shape[1]
    group = heads // kv_heads
    together = max(n for n in range(1, AT_ONCE + 1) if group % n == 0)
    q = settle(q * (scale if softcap else scale * LOG2E)).view(count, kv_heads, -1, together, head_dim)
    hidden = runs.hidden[:, :, None, None]                                      # [runs, RUN, 1, 1, size]
    most, total, shares = [], [], []
    for scores in _scores(q, keys, runs, settle):                                       # [runs, RUN, kv_heads, others, size]
        if softcap:
            scores = torch.tanh(scores / softcap) * (softcap * LOG2E)
        scores = scores + hidden
        most.append(settle(scores.amax((1, 4))))
        shares.append(settle(power((scores - most[-1][:, None, :, :, None]).clamp(min=-126.0))))
        total.append(shares[-1].sum((1, 4)))
    found = _brought(shares, values, runs, settle)                                      # [runs, kv_heads, others, head_dim]
    sinks = None if sinks is None else sinks.view(kv_heads, -1, together) * LOG2E
    out = []
    for i in range(together):
        each = _at(most[i], runs.of)                                            # [queries, most, kv_heads, others]
        top = each.amax(1)
        if sinks is not None:
            top = torch.maximum(top, sinks[..., i])
        weights = settle(power((each - top[:, None]).clamp(min=-126.0)) * (each > NOWHERE / 2))
        whole = (_at(total[i], runs.of) * weights).sum(1)
        if sinks is not None:
            whole = whole + power((sinks[..., i] - top).clamp(min=-126.0))
        brought = (_at(found[i], runs.of) * weights[..., None]).sum(1)
        out.append(brought / whole.clamp(min=_TINY)[..., None])
    return torch.stack(out, 3).reshape(count, heads, head_dim)


def _at(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[index]; whoever made the index looked that it is in range."""
    return torch.ops.aten._unsafe_index(x, [index])


def _scores(q: torch.Tensor, keys: Side, runs: Runs, settle: Settle) -> list[torch.Tensor]:
    """q [queries, kv_heads, others, together, head_dim] times their runs' keys -> of each of those together [runs, RUN,
    kv_heads, others, size]."""
    owned = [_at(q[:, :, :, i], runs.owner)[:, None, :, :, :, None] for i in range(q.shape[3])]
    found, words = [], _at(keys.words, runs.table)
    if not keys.type.format:        # two sums at once, or each addition would wait for the last
        first, second = (one[:, :, :, None].float() for one in words.chunk(2, 3))
        for own in owned:
            parts = own.chunk(2, 4)
            found.append((first * parts[0] + second * parts[1]).sum(4))
        return found
    scale, *least = (settle(_at(half, runs.table).float())[:, :, :, None, :, None] for half in keys.halves)
    codes = [one[:, :, :, None] * scale for one in _along_keys(words.view(torch.int32), keys.type)]
    codes = [one + least[0] for one in codes] if least else codes               # [runs, RUN, kv_heads, 1, groups, words, size]
    for own in owned:
        parts = own.unflatten(4, (codes[0].shape[4], -1, codes[0].shape[5], WORD))
        terms = [one * parts[:, :, :, :, :, at // WORD, :, at % WORD] for at, one in enumerate(codes)]
        found.append(_sum(terms).sum((4, 5)))
    return found


def _brought(shares: list[torch.Tensor], values: Side, runs: Runs, settle: Settle) -> list[torch.Tensor]:
    """Shares [runs, RUN, kv_heads, others, size] times their runs' values -> of each [runs, kv_heads, others, head_dim]."""
    words = _at(values.words, runs.table)
    if not values.type.format:
        first, second = (one[:, :, :, None].float() for one in words.unflatten(4, (-1, 2)).unbind(5))
        found = []                                          # [runs, RUN, kv_heads, 1, parts, size / 2, lanes] each
        for part in shares:
            parts = part[:, :, :, :, None].unflatten(5, (-1, 2))[..., None]
            found.append((first * parts[..., 0, :] + second * parts[..., 1, :]).sum((1, 5)).flatten(3))
        return found
    scale, *least = (settle(_at(half, runs.table).float())[:, :, :, None] for half in values.halves)
    codes = [one[:, :, :, None] for one in _along_values(words.view(torch.int32), values.type)]
    found = []
    for part in shares:                                                         # a scale goes to the share: 1 product for 32
        weighed = settle(part[:, :, :, :, None] * scale).unflatten(5, (-1, WORD))[..., None]
        halves = [_sum([one * weighed[..., j, :] for j, one in enumerate(codes[at:at + WORD])]).sum((1, 5))
                  for at in range(0, len(codes), WORD)]                         # [runs, kv_heads, others, groups, 16 or 32]
        brought = torch.cat(halves, 4)
        if least:
            brought = brought + (part[:, :, :, :, None] * least[0]).sum((1, 5))[..., None]
        found.append(brought.flatten(3))
    return found


def _along_keys(words: torch.Tensor, known: CellType) -> list[torch.Tensor]:
    """Words int32 [.., rows / 4, size] -> what their codes stand for before the scale, float32 [.., n, size] each: the first of
    the words' four bytes, the second, ..; of half bytes the low ones of all four, then the high ones."""
    if known.bits == 8:
        return [(words << 24 - 8 * j >> 24).float() for j in range(WORD)]
    low, found = words[..., -WORD:, :], []
    for half in range(2):
        for j in range(WORD):
            codes = low >> 8 * j + 4 * half & 15
            if known.bits == 5:     # the first word's bits are those of numbers 0 to 31
                at = torch.arange(16 * half + j, 16 * half + j + 16, 4, dtype=torch.int32, device=words.device)[:, None]
                codes = codes | (words[..., :1, :] >> at & 1) << 4
            found.append(_level(codes, known))
    return found


def _along_values(words: torch.Tensor, known: CellType) -> list[torch.Tensor]:
    """Words int32 [.., size / 4, rows] -> float32 [.., size / 4, 16 or 32], likewise."""
    if known.bits == 8:
        return [(words << 24 - 8 * j >> 24).float() for j in range(WORD)]
    low, found = words[..., -BLOCK // 2:], []
    for half in range(2):
        for j in range(WORD):
            codes = low >> 8 * j + 4 * half & 15
            if known.bits == 5:     # number 8 k + i has bit i of byte k
                at = torch.arange(8 * j, 8 * j + 8, dtype=torch.int32, device=words.device)
                codes = codes | ((words[..., 2 * half:2 * half + 2, None] >> at & 1) << 4).flatten(-2)
            found.append(_level(codes, known))
    return found


def _level(codes: torch.Tensor, known: CellType) -> torch.Tensor:
    if known.name == "iq4_nl":
        return level(codes.float(), 0)
    return (codes if known.floats == 2 else codes - (1 << known.bits - 1)).float()


def _sum(found: list[torch.Tensor]) -> torch.Tensor:
    """By pairs, and pairs of pairs: none waits long for another."""
    while len(found) > 1:
        found = [one + other for one, other in zip(found[::2], found[1::2], strict=True)]
    return found[0]
