"""Which points of a codebook stand for runs of weights: their own levels where those are a point, else the best near.

A block is a column, as in `searching`: x is float32 [width, runs, blocks], the weights' magnitudes, run by run of `width` that
a code names at once. Weights over a scale, rounded to levels 0, 1, 2 ... (that stand for 1, 3, 5 ...), are a place. Of a
place that is no point of the codebook the nearest points are listed once and for all (ggml_quantize_init does that); a search
weighs those few, not all. The search is that of ggml's quantize_row_iq3_xxs_impl and its kin, operation for operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from ..grids import CODEBOOKS
from .searching import f32, in_order, number, over, root_

if TYPE_CHECKING:
    import torch

ONCE = 512          # superblocks at a time
SEEN = 1 << 20      # runs x tries at a time: enough that calls cost little, and memory is bounded
SLICE = 1 << 16     # of those weighed at a time: what there is of each stays near a core


class Places(NamedTuple):
    """A codebook seen from every place. A place's number: the sum of level x levels ** i over the weights of a run."""

    levels: int                 # that a weight can have
    width: int                  # weights of a run
    code: torch.Tensor          # int32 [places]: the point there, -1 where there is none
    first: torch.Tensor         # int32 [places]: where its list begins in `near`
    count: torch.Tensor         # int32 [places]: how many points are listed, 0 where there is a point
    near: torch.Tensor          # int32: points, each list's nearest first
    values: torch.Tensor        # float32 [width, points]: what a block's scale is multiplied by: 2 level + 1; of IQ1 level - 1
    listed: torch.Tensor        # float32 [width, listed points]: theirs


@lru_cache
def places(name: str, distances: int, device: torch.device) -> Places:
    """The places of a codebook; a list has all the points at the `distances` smallest distances."""
    import torch
    book = CODEBOOKS[name]
    base, width = len(book.levels), book.width
    levels = torch.tensor([[book.levels.index(value) for value in point] for point in book.points()], dtype=torch.float64)
    every = torch.tensor(list(product(range(base), repeat=width)), dtype=torch.float64).flip(1)
    code = torch.full((len(every),), -1, dtype=torch.int32)
    numbers = levels @ torch.tensor([float(base ** i) for i in range(width)], dtype=torch.float64)
    code[numbers.long()] = torch.arange(len(levels), dtype=torch.int32)
    counts, lists = [], []
    for some in every.split(1 << 10):
        far = (some.square().sum(1)[:, None] + levels.square().sum(1) - 2 * some @ levels.T).to(torch.int16)
        limit = far.amin(1, keepdim=True)
        off = limit > 0
        for _ in range(distances - 1):
            limit = torch.where(far > limit, far, 1 << 14).amin(1, keepdim=True)
        row, point = ((far <= limit) & off).nonzero(as_tuple=True)
        counts.append(torch.bincount(row, minlength=len(some)))
        lists.append(point[(row * (1 << 15) + far[row, point]).argsort(stable=True)])
    count = torch.cat(counts)
    near, values = torch.cat(lists).int(), (levels - 1 if name == "IQ1" else 2 * levels + 1).T.float().contiguous()
    tensors = code, (count.cumsum(0) - count).int(), count.int(), near, values, values[:, near]
    return Places(base, width, *(tensor.to(device) for tensor in tensors))


class Runs(NamedTuple):
    """Weights of blocks and how they are weighed, each float32 [width, runs, blocks]."""

    x: torch.Tensor
    weight: torch.Tensor        # of an error's square in a block's sums
    near: torch.Tensor          # of an error's square where a place has no point: the root of `weight`


def codes(known: Places, runs: Runs, inverse: torch.Tensor,
          scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The points chosen at each of several scales [tries, blocks] with these inverses, int32 [runs, tries, blocks], and
    where they are the weights' own levels."""
    import torch
    place = _places(known, runs, inverse)
    code = known.code.index_select(0, place.view(-1)).view(place.shape)
    own = code >= 0
    _, tries, blocks = place.shape
    block = torch.arange(blocks, dtype=torch.int32, device=place.device).repeat(tries)
    once = max(1, SEEN // (tries * blocks))
    for start in range(0, len(place), once):
        part = Runs(*(of[:, start:start + once].flatten(1) for of in runs))
        many = place[start:start + once].shape[0]
        whose = torch.cat([block + run * blocks for run in range(many)]) if many > 1 else block
        d = scale.expand(many, -1, -1).reshape(-1)
        _settle(known, part, place[start:start + once].view(-1), whose, d, code[start:start + once].view(-1))
    return code, own


def _longest_first(count: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The order in which lists become shorter, and for n = 0, 1 ... how many are longer than n."""
    import torch
    longest = int(count.max())
    key = (longest - count).to(torch.uint8 if longest < 256 else torch.int16)
    order = torch.from_numpy(key.numpy().argsort(kind="stable")) if key.device.type == "cpu" else key.sort(stable=True).indices
    lengths = torch.bincount(count, minlength=longest + 1)
    return order, (len(count) - lengths.cumsum(0)).tolist()


def nearest_points(known: Places, runs: Runs, place: torch.Tensor, scale: torch.Tensor,
                   shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The points for places [runs, blocks] at scales [blocks], shifts [runs, blocks] added to all values: int32, and where
    they are the places' own."""
    import torch
    code = known.code.index_select(0, place.view(-1))
    own = code >= 0
    whose = torch.arange(len(code), dtype=torch.int32, device=place.device)
    every = Runs(*(of.flatten(1) for of in runs))
    _settle(known, every, place.view(-1), whose, scale.expand(place.shape).reshape(-1), code, shift.reshape(-1))
    return code.view(place.shape), own.view(place.shape)


def _places(known: Places, runs: Runs, inverse: torch.Tensor) -> torch.Tensor:
    """int32 [runs, tries, blocks]: levels are round((x inverse - 1) / 2), half to even, no less than 0."""
    import torch
    half = 0.5 * runs.x
    inverse = torch.where(inverse.isfinite(), inverse, 0)       # ggml rounds infinity to less than 0
    place = torch.empty((half.shape[1], *inverse.shape), dtype=torch.int32, device=half.device)
    total, level = torch.empty_like(inverse), torch.empty_like(inverse)
    for run in range(half.shape[1]):
        for i in range(known.width):
            torch.mul(inverse, half[i, run], out=level).sub_(0.5).round_().clamp_(0, known.levels - 1)
            total.copy_(level) if i == 0 else total.add_(level, alpha=known.levels ** i)
        place[run].copy_(total)
    return place


def _settle(known: Places, runs: Runs, place: torch.Tensor, whose: torch.Tensor, scale: torch.Tensor,
            code: torch.Tensor, shift: torch.Tensor | None = None) -> None:
    """Puts the listed points that come nearest into `code` [n], where places [n] have no point; of runs `whose` of [width, m].

    The least sum of weight (scale (value + shift) - x)^2, one weight of the run after the other; of equal ones the first.
    """
    import torch
    for some, longer in _slices(known.count.index_select(0, place)):
        mine, d = whose.index_select(0, some), scale.index_select(0, some)
        more = None if shift is None else shift.index_select(0, some)
        x, weight = [row.index_select(0, mine) for row in runs.x], [row.index_select(0, mine) for row in runs.near]
        first = known.first.index_select(0, place.index_select(0, some))
        best, win, at = torch.full_like(d, torch.inf), torch.zeros_like(first, dtype=torch.int16), first.clone()
        q, error, total = torch.empty_like(d), torch.empty_like(d), torch.empty_like(d)
        for n, live in enumerate(longer):
            if live < len(q):
                q, error, total, d, at = q[:live], error[:live], total[:live], d[:live], at[:live]
                x, weight = [row[:live] for row in x], [row[:live] for row in weight]
            for i in range(known.width):
                torch.index_select(known.listed[i], 0, at, out=q)
                if more is not None:
                    q.add_(more[:live])
                q.mul_(d).sub_(x[i])
                if i == 0:
                    torch.mul(weight[i], q, out=total).mul_(q)
                else:
                    total.add_(torch.mul(weight[i], q, out=error).mul_(q))
            torch.maximum(win[:live], (total < best[:live]).to(torch.int16) * n, out=win[:live])
            torch.minimum(best[:live], total, out=best[:live])
            at.add_(1)
        code.index_copy_(0, some, known.near.index_select(0, first.add_(win)))


def _slices(count: torch.Tensor) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Entries of [n] that have lists so long, the longest first, as many at a time as stay in a cache; and for each n from 0 on
    how many of them have lists longer than n."""
    order, longer = _longest_first(count)
    for start in range(0, longer[0], SLICE):
        stop = min(start + SLICE, longer[0])
        yield order[start:stop], [min(n, stop) - start for n in longer if n > start]


def sums(known: Places, runs: Runs, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of codes [runs, tries, blocks] the sums over each block of weight x q and weight q q, [tries, blocks], in order."""
    import torch
    weighed = runs.weight * runs.x
    q, term = torch.empty(code.shape[1:], device=code.device), torch.empty(code.shape[1:], device=code.device)
    with_x, squares = torch.zeros_like(q), torch.zeros_like(q)
    for run in range(len(code)):
        flat = code[run].reshape(-1)
        for i in range(known.width):
            torch.index_select(known.values[i], 0, flat, out=q.view(-1))
            with_x.add_(torch.mul(q, weighed[i, run], out=term))
            squares.add_(torch.mul(q, runs.weight[i, run], out=term).mul_(q))
    return with_x, squares


class Fit(NamedTuple):
    """What was found for each block."""

    scale: torch.Tensor     # float32 [blocks]
    code: torch.Tensor      # int32 [runs, blocks]: points
    own: torch.Tensor       # bool [runs, blocks]: where they are the weights' own levels
    any: torch.Tensor       # bool [blocks]: whether any scale was good; none is where all weights count nothing


def fit(known: Places, runs: Runs, inverse: torch.Tensor, start: torch.Tensor) -> Fit:
    """Of scales with these inverses [tries, blocks] the one whose points leave the smallest weighted error, by least squares.

    The first of equal ones. Where none is any good the scale is `start`, and the points are the first.
    """
    import torch
    tried, own = codes(known, runs, inverse, inverse.reciprocal())
    with_x, squares = sums(known, runs, tried)
    scale, best, which = start, torch.zeros_like(start), torch.full_like(start, -1, dtype=torch.int64)
    for i, (one, two) in enumerate(zip(with_x.unbind(), squares.unbind(), strict=True)):
        found = one / two
        better = (two > 0) & (one * one > best * two)
        scale, best = torch.where(better, found, scale), torch.where(better, found * one, best)
        which.masked_fill_(better, i)
    at = which.clamp(min=0).expand(len(tried), 1, -1)
    return Fit(scale, tried.gather(1, at)[:, 0].masked_fill_(which < 0, 0), own.gather(1, at)[:, 0], which >= 0)


def again(known: Places, runs: Runs, found: Fit, which: torch.Tensor) -> Fit:
    """The points of the runs that `which` [runs, blocks] says chosen anew at the scale found, and the scale best then."""
    import torch
    which = which & (found.scale > 0)
    scale = torch.where(found.scale > 0, found.scale, 1)[None]
    code = torch.where(which, codes(known, runs, over(1, scale), scale)[0][:, 0], found.code)
    with_x, squares = sums(known, runs, code[:, None])
    better = which.any(0) & (squares[0] > 0)
    return Fit(torch.where(better, with_x[0] / squares[0], found.scale), code, found.own, found.any)


def columns(rows: torch.Tensor, size: int, width: int) -> torch.Tensor:
    """Superblocks of 256 weights [n, 256] as columns of blocks of `size`, contiguous [width, size / width, 256 / size x n].

    The first blocks of all superblocks come first, then the second ones.
    """
    parts = rows.view(len(rows), 256 // size, size // width, width)
    return parts.permute(3, 2, 1, 0).reshape(width, size // width, -1)


def signs(x: torch.Tensor) -> torch.Tensor:
    """Bits of weights [8, ...], uint8 [...]: bit i where the i-th is below zero."""
    import torch
    bits = torch.zeros(x.shape[1:], dtype=torch.uint8, device=x.device)
    for i, row in enumerate(x.unbind()):
        bits |= (row < 0).to(torch.uint8) << i
    return bits


def evened(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Magnitudes [8, ...] of weights, and their signs, where a code has only 7 of them, the minuses being even in number.

    Where they are odd the weight that matters least (the first of several) becomes its own opposite: a magnitude below zero.
    """
    import torch
    bits, cost = signs(x), weight * x * x
    least, which = cost[0].clone(), torch.zeros_like(bits)
    for i in range(1, 8):
        which.masked_fill_(cost[i] < least, i)
        torch.minimum(least, cost[i], out=least)
    odd = torch.zeros_like(bits)
    for i in range(8):
        odd ^= bits >> i & 1
    flip = torch.ones_like(bits).bitwise_left_shift_(which) * odd
    size = torch.where(x < 0, -x, x)
    for i, row in enumerate(size.unbind()):
        row.copy_(torch.where((flip >> i & 1).bool(), -row, row))
    return size, (bits ^ flip) & 127


def in_bits(scale: torch.Tensor, fudge: float, most: int = 31) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [blocks, n] as bits s of d (2 s + 1), int32, and d x fudge, float32 [n]: a superblock's largest is most x d."""
    import torch
    d = scale.amax(0) / number(most, scale.device)
    bits = ((over(1, d) * scale - 1) * 0.5).nan_to_num_(0, 0, 0).round_().clamp_(0, most // 2).int()
    return torch.where(d > 0, bits, 0), d * fudge


def nibbles(four: torch.Tensor) -> torch.Tensor:
    """4-bit numbers int32 [2 k, n] -> bytes [n, k], of each two the first one low."""
    import torch
    return (four[0::2] | four[1::2] << 4).t().to(torch.uint8)


def tries(most: int, step: float, steps: int, far: torch.Tensor) -> torch.Tensor:
    """Inverses of scales [2 steps + 1, blocks], with which the largest number of each block is most - steps x step ... to
    most + steps x step, of levels counted 1, 3, 5 ..."""
    import torch
    return torch.stack([over(f32(most + f32(f32(step) * i)), far) for i in range(-steps, steps + 1)])


def weighing(x: torch.Tensor, importance: torch.Tensor, times: int) -> torch.Tensor:
    """How much errors of superblocks [n, 256] count: their columns' importance x sqrt(times x mean square + x^2)."""
    mean = in_order((x * x).t().contiguous()) * times / 256
    return importance * root_(x * x + mean[:, None])


def in_parts(encode: Callable, x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Rows [rows, cols] by `encode`, which takes superblocks [n, 256] and their importances, as many as memory shall hold."""
    import torch
    superblocks = x.reshape(-1, 256).split(ONCE)
    if importance is None:
        return torch.cat([encode(some, None) for some in superblocks]).view(len(x), -1)
    matters = importance.expand(x.shape).reshape(-1, 256).split(ONCE)
    return torch.cat([encode(*part) for part in zip(superblocks, matters, strict=True)]).view(len(x), -1)
