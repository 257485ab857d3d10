"""Searches that several families share: the scale, or the scale and minimum, that fit a block best.

A block is a column: x is float32 [n, blocks], a vector operation does one step for all blocks, and a search is a loop over
candidates. Algorithms are those of ggml's ggml-quants.c (make_qx_quants, make_qkx2_quants, make_qkx3_quants, make_qp_quants,
make_q3_quants), operation for operation: each product and each sum rounded to float32 by itself, sums in the blocks' order.
That is what ggml is where it is compiled for any x86-64, as llama.cpp's builds compile this file; a compiler that may fuse
a product with a sum (as on ARM) gets other last bits there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy

from ...errors import LabError

if TYPE_CHECKING:
    import torch

NOTHING = 1e-15     # ggml's GROUP_MAX_EPS: a block without larger weights is all zero


class TooLarge(LabError):
    """A scale that the format cannot hold; `formats.quantize` says where."""


# ---- arithmetic as C does it ----------------------------------------------------------------------------

def in_order(terms: torch.Tensor) -> torch.Tensor:
    """The sum of each column, float32 [n, ...] -> [...], added from the first row to the last, each sum rounded."""
    return _tensor(_sum(terms.contiguous().numpy()))


def _sum(terms):
    """`in_order` of arrays. numpy adds whole rows to each other where the first axis is not the fastest, which is this order;
    a lone column it adds by pairs, and torch's own sum makes four at a time.
    """
    return numpy.add.reduce(terms, 0) if terms[0].size > 1 else numpy.add.accumulate(terms, 0)[-1]


def _products(*parts):
    """The sum of each column's products (from the left), [n, blocks] arrays -> [blocks], each product and each sum rounded.

    einsum makes no array of products, which halves the time; a numpy compiled for machines that fuse a product with a sum
    rounds once less.
    """
    if parts[0].shape[1] > 1 and _rounds_products():
        return numpy.einsum(",".join(["ij"] * len(parts)) + "->j", *parts)
    terms = parts[0]
    for part in parts[1:]:
        terms = terms * part
    return _sum(terms)


@lru_cache
def _rounds_products() -> bool:
    """Whether einsum rounds each product and adds row by row, here."""
    some = numpy.random.default_rng(0).standard_normal((3, 32, 256)).astype(numpy.float32)
    return (numpy.array_equal(numpy.einsum("ij,ij->j", *some[:2]), _sum(some[0] * some[1])) and
            numpy.array_equal(numpy.einsum("ij,ij,ij->j", *some), _sum(some[0] * some[1] * some[2])))


def running_total(rows: torch.Tensor) -> torch.Tensor:
    """The sum of each row, float32 [rows, cols] -> [rows], added from left to right, each sum rounded."""
    return _tensor(numpy.add.accumulate(rows.numpy(), 1)[:, -1].copy())


def root_(x: torch.Tensor) -> torch.Tensor:
    """The square roots of x, in its place, rounded once; one in five of torch's own, where it has Intel's MKL, is a bit off."""
    numbers = x.numpy()
    numpy.sqrt(numbers, out=numbers)
    return x


@lru_cache
def number(value: float, device: torch.device | None = None) -> torch.Tensor:
    """A float32 [1]: torch divides by, and into, a Python number by way of its reciprocal, which rounds once more."""
    import torch
    return torch.tensor([value], dtype=torch.float32, device=device)


def over(value: float, divisor: torch.Tensor) -> torch.Tensor:
    """value / divisor, rounded once."""
    return number(value, divisor.device) / divisor


def f32(value: float) -> float:
    """A constant as C's float has it."""
    return float(numpy.float32(value))


def largest(x: torch.Tensor, axis: int = 0) -> torch.Tensor:
    """Of each column of [n, blocks] (or row, with axis 1) the weight farthest from zero, the first of several.

    All zeros have zero without a sign, whatever theirs.
    """
    import torch
    high, low = x.amax(axis), x.amin(axis)
    found = torch.where(high >= -low, high, low).add_(0.0)      # -0 + 0 is 0
    both = (high == -low).nonzero()[:, 0]
    if len(both):
        some = x.index_select(1 - axis, both)
        found[both] = some.gather(axis, some.abs().argmax(axis, keepdim=True)).view(-1) + 0.0
    return found


def half(numbers: torch.Tensor) -> torch.Tensor:
    """float32 -> float16, to the nearest. Raises TooLarge in place of infinity, which llama.cpp writes."""
    import torch
    halves = numbers.half()
    if halves.numel() and not torch.isfinite(halves).all():
        worst = float(numbers.abs().nan_to_num(torch.inf).max())
        raise TooLarge(f"its block's scale or minimum, {worst:.4g}, is above float16's largest number, 65504")
    return halves


# ---- symmetric: weight = scale * code, -top <= code < top -----------------------------------------------

class Symmetric(NamedTuple):
    """What a search found for each block: `scale`, and 1 / scale that chose the codes (0 where all are nothing)."""

    scale: torch.Tensor
    inverse: torch.Tensor

    def at(self, blocks: torch.Tensor) -> Symmetric:
        return Symmetric(*(part[blocks] for part in self))

    def codes(self, x: torch.Tensor, top: int) -> torch.Tensor:
        """Codes as they are stored, float32 [n, blocks]: `top` more than what the scale multiplies; 0 where all is nothing."""
        return (x * self.inverse).round_().clamp_(-top, top - 1).add_(top).mul_(self.inverse != 0)


def symmetric(x: torch.Tensor, top: int, weight: torch.Tensor) -> Symmetric:
    """The scale of each block, of 19 about the one that gives the largest weight code -top, that leaves the smallest
    weighted squared error. x and weight are [n, blocks].

    With the codes fixed the best scale is sum(w x c) / sum(w c c), and lowers the error by sum(w x c)^2 / sum(w c c).
    """
    far = largest(x).numpy()
    found = [numpy.empty_like(far) for _ in Symmetric._fields]
    for some in _pieces(x):
        _symmetric(x[:, some], far[some], weight[:, some], top, *(part[some] for part in found))
    return Symmetric(*map(_tensor, found))


def _symmetric(x: torch.Tensor, far, weight: torch.Tensor, top: int, scale, inverse) -> None:
    """`symmetric` for some blocks; the arrays `scale` and `inverse` are written to."""
    import torch
    x, weight = x.contiguous(), weight.contiguous()
    weighed, weights, codes = (weight * x).numpy(), weight.numpy(), torch.empty_like(x)
    far = numpy.where(numpy.abs(far) >= NOTHING, far, 0)
    best, new = numpy.empty((2, 3, len(far)), numpy.float32)        # scale, error taken away, inverse

    def tries(level: float) -> tuple:
        torch.mul(x, _tensor(numpy.divide(level, far, out=new[2])), out=codes).round_().clamp_(-top, top - 1)
        with_x, squares = _products(weighed, codes.numpy()), _products(weights, codes.numpy(), codes.numpy())
        numpy.multiply(numpy.divide(with_x, squares, out=new[0]), with_x, out=new[1])
        return with_x, squares

    with numpy.errstate(all="ignore"):
        _, squares = tries(-top)
        best[:] = new
        best[:2, squares == 0] = 0
        for step in (*range(-9, 0), *range(1, 10)):
            with_x, squares = tries(-f32(top + f32(f32(0.1) * step)))
            better = with_x * with_x > best[1] * squares
            better &= squares > 0
            _take(best, new, better)
    best[:, far == 0] = 0
    scale[:], inverse[:] = best[0], best[2]


def refined(x: torch.Tensor, weight: torch.Tensor, codes: torch.Tensor, low: int, top: int, strict: bool) -> torch.Tensor:
    """The scale of each block after up to five rounds over its codes, in which each in turn becomes the one that is best
    with the scale the others ask for, where that lowers the error. x, weight, codes are [n, blocks]; codes are changed.

    `strict`: a code whose others have no weight stays as it is (make_qp_quants asks that, make_q3_quants does not).
    """
    x, weight, codes = x.numpy(), weight.numpy(), codes.numpy()
    sums, where = numpy.empty((2, x.shape[1]), numpy.float32), []       # with x, of squares; blocks that change
    with numpy.errstate(all="ignore"):
        for some in _pieces(x):
            these = [numpy.ascontiguousarray(part[:, some]) for part in (x, weight, codes)]
            these.insert(2, these[0] * these[1])
            sums[:, some] = _sum(these[2] * these[3]), _sum(these[1] * these[3] * these[3])
            where.append(_wanted(*these, sums[:, some], low, top, strict)[0].any(0).nonzero()[0] + some.start)
        where = numpy.concatenate(where)
        _one_by_one(x, weight, codes, sums, where, low, top, strict)
        return _tensor(numpy.where(sums[1] > 0, sums[0] / sums[1], 0))


def _one_by_one(x, weight, codes, sums, where, low: int, top: int, strict: bool) -> None:
    """Five rounds over the codes of the blocks `where`, in order; few codes change, so a block's next one is found at once."""
    n, all_codes, all_sums = len(x), codes, sums
    rows = numpy.arange(n)[:, None]
    x, weight, codes, sums = (part.take(where, -1) for part in (x, weight, codes, sums))
    at = numpy.zeros(len(where), int)       # steps done, of n a round
    while len(where):
        accepted, tried, new = _wanted(x, weight, weight * x, codes, sums, low, top, strict)
        later = accepted & (rows >= at % n)
        this_round = later.any(0)
        row = numpy.where(this_round, later.argmax(0), accepted.argmax(0))
        at = at - at % n + row + numpy.where(this_round, 0, n) + 1
        some = (accepted.any(0) & (at <= 5 * n)).nonzero()[0]
        where, row, at = where[some], row[some], at[some]
        x, weight, codes, sums = (part.take(some, -1) for part in (x, weight, codes, sums))
        codes[row, numpy.arange(len(some))], sums[:] = tried[row, some], new[:, row, some]
        all_codes[:, where], all_sums[:, where] = codes, sums


def _wanted(x, weight, weighed, codes, sums, low: int, top: int, strict: bool):
    """Of each code by itself: whether another one lowers the error; that one; the sums with it, [2, n, blocks]."""
    new = numpy.empty((2, *x.shape), numpy.float32)
    terms = numpy.empty_like(x)
    numpy.subtract(sums[0], numpy.multiply(weighed, codes, out=terms), out=new[0])
    numpy.multiply(numpy.multiply(weight, codes, out=terms), codes, out=terms)
    numpy.subtract(sums[1], terms, out=new[1])
    tried = x * new[1]
    tried /= new[0]
    _tensor(tried).round_().clamp_(low, top)
    accepted = tried != codes
    accepted &= new[0] > 0
    if strict:
        accepted &= new[1] > 0
    new[0] += numpy.multiply(weighed, tried, out=terms)
    numpy.multiply(numpy.multiply(weight, tried, out=terms), tried, out=terms)
    new[1] += terms
    numpy.multiply(numpy.multiply(new[0], new[0], out=terms), sums[1], out=terms)
    accepted &= terms > sums[0] * sums[0] * new[1]
    if not strict:
        accepted &= new[1] > 0
    return accepted, tried, new


def positive(x: torch.Tensor, top: int, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for several numbers from zero on, and their codes, 0 to top: float32 [blocks] and [n, blocks].

    Of 9 scales about the one that gives the largest number code top, that with the smallest weighted squared error; then
    `refined`.
    """
    numbers, matters = x.numpy(), weight.numpy()
    far = numbers.max(0)
    with numpy.errstate(all="ignore"):
        inverse, best = numpy.divide(top, far), None
        for step in (0, *range(-4, 0), *range(1, 5)):
            tried = numpy.divide(f32(f32(f32(0.1) * step) + top), far)
            codes = numpy.minimum(numpy.rint(numbers * tried), top)
            off = numbers - numpy.divide(1, tried) * codes
            found = _sum(matters * off * off)
            if best is None:
                best = found
                continue
            better = found < best
            numpy.copyto(best, found, where=better)
            numpy.copyto(inverse, tried, where=better)
        codes = numpy.minimum(numpy.rint(numbers * inverse), top)
    codes[:, far < NOTHING] = 0
    codes = _tensor(codes)
    return refined(x, weight, codes, 0, top, strict=True), codes


# ---- with a minimum: weight = scale * code - minimum, 0 <= code <= top, minimum >= 0 ----------------------

class Affine(NamedTuple):
    """What a search found for each block: `scale` and `minimum` (what is taken away, at least 0); codes were chosen by
    round((x - base) * inverse)."""

    scale: torch.Tensor
    minimum: torch.Tensor
    inverse: torch.Tensor
    base: torch.Tensor

    def at(self, blocks: torch.Tensor) -> Affine:
        return Affine(*(part[blocks] for part in self))

    def codes(self, x: torch.Tensor, top: int) -> torch.Tensor:
        """float32 codes [n, blocks]."""
        return (x - self.base).mul_(self.inverse).round_().clamp_(0, top)


def affine(x: torch.Tensor, top: int, weight: torch.Tensor, start: float, step: float, steps: int,
           absolute: bool = False) -> Affine:
    """Scale and minimum of each block with the smallest weighted error, squared or `absolute`. x and weight are [n, blocks].

    Candidates are top + start + step * i levels from the smallest weight (or from zero, or the minimum found so far) to the
    largest, i up to and with `steps`; for each the codes are fixed, and scale and minimum solved by least squares.
    """
    found = [numpy.empty(x.shape[1], numpy.float32) for _ in Affine._fields]
    levels = [f32(f32(f32(start) + f32(f32(step) * i)) + top) for i in range(steps + 1)]
    for some in _pieces(x):
        _affine(x[:, some], weight[:, some], top, levels, absolute, *(part[some] for part in found))
    return Affine(*map(_tensor, found))


def _affine(x: torch.Tensor, weight: torch.Tensor, top: int, levels: list[float], absolute: bool,
            scale, minimum, inverse, chosen_from) -> None:
    """`affine` for some blocks; the arrays are written to."""
    import torch
    x, weight = x.contiguous(), weight.contiguous()
    codes, terms = torch.empty_like(x), torch.empty_like(x)
    numbers, weights, coded, products = (part.numpy() for part in (x, weight, codes, terms))        # the same memory
    best, new = numpy.empty((2, 5, x.shape[1]), numpy.float32)      # error, scale, base; what chose the codes: inverse, base
    high = x.amax(0).numpy()
    all_weight, all_x = _sum(weights), _products(weights, numbers)
    best[2] = x.amin(0).clamp_(max=0)

    def encode(level: float) -> None:
        new[4] = best[2]
        numpy.divide(level, high - best[2], out=new[3])
        torch.sub(x, _tensor(new[4]), out=codes).mul_(_tensor(new[3])).round_().clamp_(0, top)

    def error(scale, base):
        torch.mul(codes, _tensor(scale), out=terms).add_(_tensor(base)).sub_(x)
        return _products(terms.abs_().numpy(), weights) if absolute else _products(products, products, weights)

    with numpy.errstate(all="ignore"):
        encode(top)
        some = numpy.isfinite(new[3])       # else one number, or numbers as close as no float's inverse tells apart
        best[3:] = new[3:]
        numpy.divide(1, best[3], out=best[1])
        best[0] = error(best[1], best[2])
        for level in levels:
            encode(level)
            torch.mul(weight, codes, out=terms)
            ones, squares, with_x = _sum(products), _products(products, coded), _products(products, numbers)
            divisor = all_weight * squares - ones * ones
            numpy.divide(all_weight * with_x - all_x * ones, divisor, out=new[1])
            offset = numpy.divide(squares * all_x - ones * with_x, divisor, out=new[2])
            above = offset > 0
            if above.any():
                new[1] = numpy.where(above, with_x / squares, new[1])
                numpy.minimum(offset, 0, out=offset)
            new[0] = error(new[1], offset)
            better = new[0] < best[0]
            better &= divisor > 0
            better &= some
            _take(best, new, better)
    best[1, ~some] = best[3, ~some] = 0
    scale[:], minimum[:], inverse[:], chosen_from[:] = best[1], -best[2], best[3], best[4]


def _take(best, new, better) -> None:
    """`new` into `best`, float32 [..., blocks], where `better`: by bits, as masked copies go number by number."""
    best, new = best.view(numpy.int32), new.view(numpy.int32)
    best ^= (best ^ new) & -better.view(numpy.int8).astype(numpy.int32)


# ---- pieces that a core's cache holds -------------------------------------------------------------------

PIECE = 1 << 17     # weights that a search holds at a time, in five or six arrays: fewer, and calls cost more than memory


def _pieces(x: torch.Tensor) -> list[slice]:
    step = max(1, PIECE // len(x))
    return [slice(at, at + step) for at in range(0, x.shape[1], step)]


def _tensor(array) -> torch.Tensor:
    import torch
    return torch.from_numpy(array)
