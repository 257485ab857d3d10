"""IQ2 formats: eight weights at once become a point of a codebook, under signs of their own and a 4-bit block scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import LabError
from . import encodes
from .closest import at_signed, better_of, longer, scales, signed, values
from .codebooks import (
    Places,
    Runs,
    again,
    columns,
    evened,
    fit,
    in_bits,
    in_parts,
    nibbles,
    places,
    signs,
    tries,
    weighing,
)
from .joining import joined
from .searching import NOTHING, f32, half, in_order, number, over, root_

if TYPE_CHECKING:
    import torch


@encodes("IQ2_XXS")
def iq2_xxs(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    """Seven signs are stored for eight weights."""
    return in_parts(_xxs if effort == "normal" else _longer_xxs, x, needed("IQ2_XXS", importance))


@encodes("IQ2_XS")
def iq2_xs(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    """Seven signs are stored for eight weights."""
    return in_parts(_xs if effort == "normal" else _longer_xs, x, needed("IQ2_XS", importance))


@encodes("IQ2_S")
def iq2_s(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    """Every weight has its sign."""
    return in_parts(_s if effort == "normal" else _longer_s, x, needed("IQ2_S", importance))


def needed(type: str, importance: torch.Tensor | None) -> torch.Tensor:
    """The importances. Raises LabError where there are none: so few bits go where they matter, or the model is lost."""
    if importance is None:
        raise LabError(f"{type} needs an importance matrix, as in llama.cpp: so few bits must go where they matter; "
                       "measure one with llmlab.importance, or take a type from IQ3_XXS up")
    return importance


def _xxs(x: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    import torch
    known, weight = places("IQ2_XXS", 2, x.device), columns(weighing(x, importance, 1), 32, 8)
    size, bits = evened(columns(x, 32, 8), weight)
    runs = Runs(size, weight, root_(weight.clone()))
    far = size.flatten(0, 1).amax(0)
    some = far >= NOTHING
    start = _scale_of_four(_flat(size), torch.where(some, far, 1), _flat(weight))
    some &= start * 3 > 0
    start = torch.where(some, start, 1)
    found = fit(known, runs, tries(5, 0.1, 6, start * 3), start)
    found = again(known, runs, found, torch.ones_like(found.own))
    bits = torch.where(found.scale < 0, ~bits & 127, bits)
    four, d = in_bits(torch.where(some, found.scale.abs(), 0).view(8, -1), 1)
    some &= (d > 0).repeat(8)
    return _packed_xxs(half(d), four, found.code * some, bits * some)


def _longer_xxs(x: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    normal, at = _xxs(x, importance), at_signed(values("IQ2_XXS", x.device), signed(x, importance, 32, all_stored=False))
    return better_of("IQ2_XXS", x, importance, normal, _packed_xxs(*longer(at, scales("IQ2_XXS", normal), 0.125)))


def _packed_xxs(d: torch.Tensor, four: torch.Tensor, code: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Superblocks [n, 66] of scales float16 [n] and 4 bits a block [8, n], points and signs [4, blocks]."""
    import torch
    code, bits = code.view(4, 8, -1), bits.int().view(4, 8, -1)
    words = torch.stack((code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24,
                         bits[0] | bits[1] << 7 | bits[2] << 14 | bits[3] << 21 | four << 28), 1)
    return joined(d, words.permute(2, 0, 1))


def _xs(x: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    weight = columns(weighing(x, importance, 1), 16, 8)
    size, bits = evened(columns(x, 16, 8), weight)
    scale, *parts = _sixteens(places("IQ2_XS", 2, x.device), size, weight, bits, NOTHING)
    four, d = in_bits(scale.view(16, -1), 1)
    some = (d > 0).repeat(16)
    return _packed_xs(half(d), four, *(part * some for part in parts))


def _longer_xs(x: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    normal, at = _xs(x, importance), at_signed(values("IQ2_XS", x.device), signed(x, importance, 16, all_stored=False))
    return better_of("IQ2_XS", x, importance, normal, _packed_xs(*longer(at, scales("IQ2_XS", normal), 0.125)))


def _packed_xs(d: torch.Tensor, four: torch.Tensor, code: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Superblocks [n, 74] of scales float16 [n] and 4 bits a block [16, n], points and signs [2, blocks]."""
    import torch
    n = len(d)
    words = (code | (bits & 127).int() << 9).view(2, 16, n).permute(2, 1, 0).reshape(n, 32).to(torch.int16)
    return joined(d, words, nibbles(four))


def _s(x: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    weight, eights = columns(weighing(x, importance, 2), 16, 8), columns(x, 16, 8)
    scale, *parts = _sixteens(places("IQ2_S", 1, x.device), eights.abs(), weight, signs(eights), 1e-8)
    four, d = in_bits(scale.view(16, -1), f32(0.9875))
    return _packed_s(half(d), four, *parts)


def _longer_s(x: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    normal, at = _s(x, importance), at_signed(values("IQ2_S", x.device), signed(x, importance, 16, all_stored=True))
    return better_of("IQ2_S", x, importance, normal, _packed_s(*longer(at, scales("IQ2_S", normal), 0.125)))


def _packed_s(d: torch.Tensor, four: torch.Tensor, code: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Superblocks [n, 82] of scales float16 [n] and 4 bits a block [16, n], points and signs [2, blocks]."""
    import torch
    n = len(d)
    code, bits = (of.view(2, 16, n).permute(2, 1, 0).reshape(n, 32) for of in (code, bits))
    high = (code >> 8).view(n, 8, 4)
    high = high[..., 0] | high[..., 1] << 2 | high[..., 2] << 4 | high[..., 3] << 6
    return joined(d, (code & 255).to(torch.uint8), bits, high.to(torch.uint8), nibbles(four))


def _sixteens(known: Places, size: torch.Tensor, weight: torch.Tensor, bits: torch.Tensor,
              nothing: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales [blocks], points int32 and signs uint8 [2, blocks] of blocks of 16 weights [8, 2, blocks]."""
    import torch
    runs = Runs(size, weight, root_(weight.clone()))
    far = size.flatten(0, 1).amax(0)
    some = far >= nothing
    far = torch.where(some, far, 1)
    found = fit(known, runs, tries(5, 0.1, 9, far), far / number(5, far.device))
    found = again(known, runs, found, ~found.own & found.any)
    bits = torch.where(found.scale < 0, ~bits, bits)
    return torch.where(some, found.scale.abs(), 0), found.code * some, bits * some


def _flat(runs: torch.Tensor) -> torch.Tensor:
    """[width, runs, blocks] -> [weights of a block, blocks], in order."""
    return runs.transpose(0, 1).reshape(-1, runs.shape[-1])


def _scale_of_four(x: torch.Tensor, far: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The scale of codes 0 to 4 that fits blocks [32, blocks] best, as ggml's make_qp_quants finds it.

    Among the magnitudes may be some below zero (`evened`), whose codes ggml holds in bytes: -1 is 255 there, and here.
    """
    import torch
    inverse = over(4, far)
    codes = (x * inverse).round_().int().bitwise_and_(255)
    best = in_order(_squares(x, over(1, inverse) * codes, weight))
    for i in (*range(-4, 0), *range(1, 5)):
        tried = over(f32(f32(f32(0.1) * i) + 4), far)
        found = in_order(_squares(x, (x * tried).round_().clamp_(max=4) * over(1, tried), weight))
        better = found < best
        best, inverse = torch.where(better, found, best), torch.where(better, tried, inverse)
    level = (x * inverse).round_().clamp_(max=4)
    weighed = weight * x
    with_x, squares = in_order(weighed * level), in_order(weight * level * level)
    level = level.int().bitwise_and_(255).float()
    for _ in range(5):
        before = level.clone()
        for row, w, wx, code in zip(x.unbind(), weight.unbind(), weighed.unbind(), level.unbind(), strict=True):
            other_x, other_squares = with_x - wx * code, squares - w * code * code
            new = _nearest(row * other_squares / other_x).clamp_(max=4)
            better = (other_x > 0) & (other_squares > 0) & (new != code)
            other_x += wx * new
            other_squares += w * new * new
            better &= other_x * other_x * squares > with_x * with_x * other_squares
            code.copy_(torch.where(better, new.int().bitwise_and_(255).float(), code))
            with_x, squares = torch.where(better, other_x, with_x), torch.where(better, other_squares, squares)
        if torch.equal(before, level):
            break
    return torch.where(squares > 0, with_x / squares, 0)


def _squares(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    off = x - y
    return weight * off * off


def _nearest(x: torch.Tensor) -> torch.Tensor:
    """Rounded, half to even, by way of a float's last bits as ggml does it: what is out of range becomes what it does there."""
    import torch
    return ((x + 12582912).view(torch.int32) & 0x7FFFFF).sub_(0x400000).float()
