"""IQ3 formats: four weights at once become a point of a codebook, under signs of their own and a 4-bit block scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import encodes
from .closest import at_signed, better_of, longer, mattering, scales, signed, values
from .codebooks import (
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
from .searching import f32, half, number, root_

if TYPE_CHECKING:
    import torch


@encodes("IQ3_XXS")
def iq3_xxs(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    """Seven signs are stored for eight weights."""
    return in_parts(_xxs if effort == "normal" else _longer_xxs, x, importance)


@encodes("IQ3_S")
def iq3_s(x: torch.Tensor, importance: torch.Tensor | None, effort: str) -> torch.Tensor:
    """Every weight has its sign."""
    return in_parts(_s if effort == "normal" else _longer_s, x, importance)


def _weighing(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """How much errors of superblocks [n, 256] count: without importance, the weights' squares."""
    return x * x if importance is None else weighing(x, importance, 2)


def _xxs(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    import torch
    known, weight = places("IQ3_XXS", 2, x.device), _weighing(x, importance)
    eights, bits = evened(columns(x, 32, 8), columns(weight, 32, 8))
    fours = eights.unflatten(0, (2, 4)).permute(1, 2, 0, 3).reshape(4, 8, -1)
    weight = columns(weight, 32, 4)
    runs = Runs(fours, weight, root_(weight.clone()))
    far = fours.flatten(0, 1).amax(0)
    some = far >= 1e-8
    far = torch.where(some, far, 1)
    found = fit(known, runs, tries(15, 0.2, 15, far), far / number(15, x.device))
    found = again(known, runs, found, ~found.own & found.any)
    bits = torch.where(found.scale < 0, ~bits & 127, bits)
    scale = torch.where(some, found.scale.abs(), 0)
    four, d = in_bits(scale.view(8, -1), f32(1.0125))
    some &= (d > 0).repeat(8)
    return _packed_xxs(half(d), four, found.code * some, bits * some)


def _longer_xxs(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    normal, weight = _xxs(x, importance), mattering(x, importance)
    at = at_signed(values("IQ3_XXS", x.device), signed(x, weight, 32, all_stored=False))
    return better_of("IQ3_XXS", x, weight, normal, _packed_xxs(*longer(at, scales("IQ3_XXS", normal), 0.25)))


def _packed_xxs(d: torch.Tensor, four: torch.Tensor, code: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Superblocks [n, 98] of scales float16 [n] and 4 bits a block [8, n], points [8, blocks], signs [4, blocks]."""
    import torch
    code, bits = code.view(8, 8, -1), bits.view(4, 8, -1).int()      # runs, blocks, superblocks
    words = bits[0] | bits[1] << 7 | bits[2] << 14 | bits[3] << 21 | four << 28
    return joined(d, code.permute(2, 1, 0).to(torch.uint8), words.t())


def _s(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    import torch
    known, weight = places("IQ3_S", 3, x.device), columns(_weighing(x, importance), 32, 4)
    runs = Runs(columns(x.abs(), 32, 4), weight, root_(weight.clone()))
    bits = signs(columns(x, 32, 8))
    far = runs.x.flatten(0, 1).amax(0)
    some = far > 0
    far = torch.where(some, far, 1)
    found = fit(known, runs, tries(15, 0.2, 9, far), far / number(15, x.device))
    found = again(known, runs, found, (~(found.own.all(0) & found.any)).expand_as(found.own))
    bits = torch.where(found.scale < 0, ~bits, bits) * some
    scale = torch.where(some, found.scale.abs(), 0)
    four, d = in_bits(scale.view(8, -1), f32(1.033))
    return _packed_s(half(d), four, found.code * some, bits)


def _longer_s(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    normal, weight = _s(x, importance), mattering(x, importance)
    at = at_signed(values("IQ3_S", x.device), signed(x, weight, 32, all_stored=True))
    return better_of("IQ3_S", x, weight, normal, _packed_s(*longer(at, scales("IQ3_S", normal), 1)))


def _packed_s(d: torch.Tensor, four: torch.Tensor, code: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Superblocks [n, 110] of scales float16 [n] and 4 bits a block [8, n], points [8, blocks], signs [4, blocks].

    (ggml writes the points and signs behind a block of zeros in that block's stead, and leaves out the last.)
    """
    import torch
    code = code.view(8, 8, -1)
    high = torch.zeros_like(four)
    for i in range(8):
        high |= code[i] >> 8 << i
    return joined(d, (code & 255).permute(2, 1, 0).to(torch.uint8), high.t().to(torch.uint8),
                  bits.view(4, 8, -1).permute(2, 1, 0), nibbles(four))
