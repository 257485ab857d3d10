"""IQ1 formats: eight weights at once become a point of -1, 0 and 1, an eighth more or less each, times a 3-bit block scale.

With three levels the best codes without a codebook are known: weights in order of size are cut in three by two borders, of
which there are few enough to try all. Then points of the codebook are found for them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from . import encodes
from .closest import Chosen, better_of, chosen, closest, longer, scales, values
from .codebooks import Runs, columns, in_bits, in_parts, nearest_points, nibbles, places, weighing
from .iq2 import needed
from .joining import joined
from .searching import f32, half, in_order

if TYPE_CHECKING:
    import torch

EIGHTH = 0.125
ONCE = 512         # blocks whose borders are sought at a time: a few hundred pairs of sums each


@encodes("IQ1_S")
def iq1_s(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    """32 weights share a scale, and whether an eighth is added or taken away."""
    return in_parts(_s if effort == "normal" else _longer_s, x, needed("IQ1_S", importance))


@encodes("IQ1_M")
def iq1_m(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    """16 weights share a scale, 8 whether an eighth is added or taken away."""
    return in_parts(_m if effort == "normal" else _longer_m, x, needed("IQ1_M", importance))


def _s(x: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    found = _blocks(x, weighing(x, importance, 2), 32, 1e-12)
    bits, d = in_bits(found.scale.view(8, -1), f32(1.125), 15)
    return _packed_s(half(d), bits, found.code, (found.shift[0] < 0) & (d > 0).repeat(8))


def _longer_s(x: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    import torch
    normal, weight = _s(x, importance), columns(importance, 32, 8)
    eights, points = columns(x, 32, 8), values("IQ1", x.device)

    def at(scale: torch.Tensor) -> Chosen:
        both = []
        for q in (points + EIGHTH, points - EIGHTH):
            found = chosen(q, eights, weight, closest(q, eights, weight, scale))
            both.append((*found.parts, found.with_x, found.squares, scale * (scale * found.squares - 2 * found.with_x)))
        minus = both[1][-1] < both[0][-1]
        code, with_x, squares = (torch.where(minus, two, one) for one, two in zip(*(of[:3] for of in both), strict=True))
        return Chosen((code, minus), with_x, squares)

    return better_of("IQ1_S", x, importance, normal, _packed_s(*longer(at, scales("IQ1_S", normal) / EIGHTH, 1, 15)))


def _packed_s(d: torch.Tensor, bits: torch.Tensor, code: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
    """Superblocks [n, 50] of scales float16 [n] and 3 bits a block [8, n], points [4, blocks], what to take away [blocks]."""
    import torch
    n, code = len(d), code.view(4, 8, -1)
    word = code[0] >> 8 | code[1] >> 8 << 3 | code[2] >> 8 << 6 | code[3] >> 8 << 9
    word |= bits << 12 | minus.view(8, n).int() << 15
    low = (code & 255).permute(2, 1, 0).reshape(n, 32).to(torch.uint8)
    return joined(d, low, word.t().to(torch.int16))


def _m(x: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    import torch
    n, weight = len(x), weighing(x, importance, 2)
    found = _blocks(x, weight, 16, 1e-7)
    bits, d = in_bits(found.scale.view(16, n), 1, 15)
    q = (found.q.view(8, 2, 16, n) * (2 * bits + 1)).permute(2, 1, 0, 3).reshape(256, n)
    weighed = weight.t() * q
    with_x, squares = in_order(weighed * x.t()), in_order(weighed * q)
    d = torch.where(d > 0, torch.where(squares > 0, with_x / squares, d), 0)
    return _packed_m(half(d * f32(1.1125)), bits, found.code, (found.shift < 0) & (d > 0).repeat(16))


def _longer_m(x: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    import torch
    normal, weight = _m(x, importance), columns(importance, 16, 8)
    eights, points = columns(x, 16, 8), values("IQ1", x.device)
    points, many = torch.cat((points + EIGHTH, points - EIGHTH), 1), points.shape[1]

    def at(scale: torch.Tensor) -> Chosen:
        return chosen(points, eights, weight, closest(points, eights, weight, scale))

    d, bits, code = longer(at, scales("IQ1_M", normal) / EIGHTH, 1, 15)
    return better_of("IQ1_M", x, importance, normal, _packed_m(d, bits, code % many, code >= many))


def _packed_m(d: torch.Tensor, bits: torch.Tensor, code: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
    """Superblocks [n, 56] of scales float16 [n] and 3 bits a block [16, n], points and whether to take away [2, blocks]."""
    import torch
    n, code = len(d), code.view(2, 16, -1)
    four, scale = code >> 8 | minus.view(2, 16, n).int() << 3, d.view(torch.int16).int()
    sixteen = bits[0::4] | bits[1::4] << 3 | bits[2::4] << 6 | bits[3::4] << 9
    sixteen |= torch.stack([scale << 12, scale << 8, scale << 4, scale]) & 0xF000
    low = (code & 255).permute(2, 1, 0).reshape(n, 32).to(torch.uint8)
    return joined(low, nibbles(four.transpose(0, 1).reshape(32, n)), sixteen.t().to(torch.int16))


class _Found(NamedTuple):
    scale: torch.Tensor     # float32 [blocks]
    code: torch.Tensor      # int32 [runs, blocks]: points of the codebook
    shift: torch.Tensor     # float32 [runs, blocks]: an eighth, or minus an eighth
    q: torch.Tensor         # float32 [8, runs, blocks]: what the scale is multiplied by


def _blocks(x: torch.Tensor, weight: torch.Tensor, size: int, nothing: float) -> _Found:
    """Scales and points of superblocks [n, 256], in blocks of `size`."""
    import torch
    known = places("IQ1", 3, x.device)
    x, weight = columns(x, size, 8), columns(weight, size, 8)
    flat, matters = (of.transpose(0, 1).reshape(size, -1) for of in (x, weight))
    some = flat.abs().amax(0) >= nothing
    parts = [_cut(*part) for part in zip(flat.split(ONCE, 1), matters.split(ONCE, 1), strict=True)]
    scale, level, shift = (torch.cat(each, -1) for each in zip(*parts, strict=True))
    some &= ~scale.isnan()
    level = level.view(-1, 8, level.shape[1])
    flip = scale < 0
    level, shift, scale = torch.where(flip, 2 - level, level), torch.where(flip, -shift, shift), scale.abs()
    place = torch.zeros(level[:, 0].shape, dtype=torch.int32, device=x.device)
    for i in range(8):
        place += level[:, i].int() * 3 ** i
    code, own = nearest_points(known, Runs(x, weight, weight), place, scale, shift)
    q = torch.stack([row.index_select(0, code.view(-1)).view(code.shape) for row in known.values]) + shift
    weighed = weight * q
    with_x, squares = (in_order(of.transpose(0, 1).reshape(size, -1)) for of in (weighed * x, weighed * q))
    anew = ~own.all(0) & (with_x > 0) & (squares > 0)
    scale = torch.where(anew, with_x / squares, scale)
    code = torch.where(some, code, 0)
    shift = torch.where(some, shift, EIGHTH)
    first = known.values[:, :1, None]
    return _Found(torch.where(some, scale, 0), code, shift, torch.where(some, q, first + shift))


@lru_cache
def _borders(size: int, device: torch.device) -> torch.Tensor:
    """All pairs of borders in `size` weights, the second not below the first, int64 [2, pairs]."""
    import torch
    return torch.triu_indices(size + 1, size + 1, device=device)


def _cut(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The borders and shifts that leave the smallest weighted error: scale [blocks] (NaN where all weights count nothing),
    levels 0 to 2 [size, blocks], shifts [runs, blocks]. In float32, operation for operation as ggml, so that equals fall alike.
    """
    import torch
    size, blocks = x.shape
    ranked, order = x.sort(stable=True, dim=0)
    weight = weight.gather(0, order)
    one, two = _borders(size, x.device)
    if size == 32:
        with_x, squares = _thirty_two(weight * ranked, weight, one, two)
        shifts = torch.tensor([[EIGHTH], [-EIGHTH]], device=x.device).expand(2, 4)
    else:
        with_x, squares = _sixteen(weight * ranked, weight, order < 8, one, two)
        shifts = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], device=x.device) * EIGHTH
    which, scale = _first_best(with_x, squares)
    kinds = len(shifts)
    rank = torch.arange(size, device=x.device)[:, None]
    pair = which // kinds
    level = (rank >= one[pair]).to(torch.uint8) + (rank >= two[pair]).to(torch.uint8)
    return scale, torch.empty_like(level).scatter_(0, order, level), shifts[which % kinds].t()


def _running(rows: torch.Tensor) -> torch.Tensor:
    """Sums of the rows before each, [n, blocks] -> [n + 1, blocks]."""
    import torch
    total = torch.zeros(len(rows) + 1, rows.shape[1], device=rows.device)
    for i, row in enumerate(rows.unbind()):
        torch.add(total[i], row, out=total[i + 1])
    return total


def _thirty_two(weighed: torch.Tensor, weight: torch.Tensor, one: torch.Tensor,
                two: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of weight x q and weight q q for all borders, an eighth added and taken away: [pairs, 2, blocks]."""
    import torch
    shifts, (x, w) = (EIGHTH, -EIGHTH), (_parts(of, one, two) for of in (weighed, weight))
    return (torch.stack([x[0] * (d - 1) + x[1] * d + x[2] * (d + 1) for d in shifts], 1),
            torch.stack([w[0] * (d - 1) * (d - 1) + w[1] * d * d + w[2] * (d + 1) * (d + 1) for d in shifts], 1))


def _parts(rows: torch.Tensor, one: torch.Tensor, two: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sums below the first border, between the two, above the second: [pairs, blocks] each."""
    total = _running(rows)
    low, high = total[one], total[two]
    return low, high - low, total[-1] - high


def _sixteen(weighed: torch.Tensor, weight: torch.Tensor, lower: torch.Tensor, one: torch.Tensor,
             two: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of weight x q and weight q q for all borders, and shifts of either half: [pairs, 4, blocks]."""
    import torch
    with_x, squares = [], []
    for mine in (lower, ~lower):
        x, w = _running(weighed * mine), _running(weight * mine)
        pairs = x[one] + x[two]
        with_x.append([x[-1] * (1 + shift) - pairs for shift in (EIGHTH, -EIGHTH)])
        squares.append([w[-1] * (1 + shift) * (1 + shift) + w[one] * ((shift - 1) ** 2 - shift ** 2)
                        + w[two] * (shift ** 2 - (shift + 1) ** 2) for shift in (EIGHTH, -EIGHTH)])
    return tuple(torch.stack([a + b for a in of[0] for b in of[1]], 1) for of in (with_x, squares))


def _first_best(with_x: torch.Tensor, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of [pairs, kinds, blocks] which lowers the error most, int64 [blocks], and its scale: with_x / squares.

    One after the other takes the place of the best so far where with_x^2 > best x squares. Who cannot be the best, by
    far more than roundings make, is left out before.
    """
    import torch
    with_x, squares = with_x.flatten(0, 1), squares.flatten(0, 1)
    blocks = with_x.shape[1]
    gain = torch.where(squares > 0, with_x * with_x / squares, -1)
    most = gain.amax(0)
    tiny = (with_x * with_x).amax(0) < 1e-30        # of so few bits that roundings make all the difference
    near = (gain >= most - 1e-5 * most.abs()).logical_or_(tiny).logical_and_(squares > 0)
    block, which = near.t().nonzero(as_tuple=True)
    many = torch.bincount(block, minlength=blocks)
    start = many.cumsum(0) - many
    best = torch.full((blocks,), -torch.finfo(torch.float32).max, device=with_x.device)
    scale, chosen = torch.full_like(best, torch.nan), torch.zeros(blocks, dtype=torch.int64, device=with_x.device)
    for i in range(int(many.max())):
        mine = (many > i).nonzero()[:, 0]
        number = which[start[mine] + i]
        x, square = with_x[number, mine], squares[number, mine]
        better = x * x > best[mine] * square
        mine, number, x, square = mine[better], number[better], x[better], square[better]
        found = x / square
        scale[mine], best[mine], chosen[mine] = found, found * x, number
    return chosen, scale
