"""The first block formats: runs of 32 (or 64, 128) weights, a half-precision scale, sometimes a minimum.

Block bytes are what the parts add up to: scale (2), minimum (2), high bits (4), codes. Layouts as in ggml's
ggml-common.h. Q8_1 holds activations while a product is made and never reaches a file, so nothing takes it apart.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from .bits import halves, planes, signed, spread
from .registry import Field, Unpacked, register

if TYPE_CHECKING:
    import torch


def _q4_0(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(signed(planes(blocks[:, 2:], 4, 16)).sub_(8), halves(blocks[:, :2]))


def _q4_1(blocks: torch.Tensor) -> Unpacked:
    both = halves(blocks[:, :4])
    return Unpacked(signed(planes(blocks[:, 4:], 4, 16)), both[:, :1], both[:, 1:])


def _fifth_bit(low: torch.Tensor, high: torch.Tensor, values: tuple[int, int]) -> torch.Tensor:
    """16 bytes of low halves, 4 bytes of one more bit for each of the 32 weights, which means `values`: int8 [n, 32]."""
    return signed(planes(low, 4, 16).bitwise_or_(spread(high, 1, values).view(-1, 1, 2, 16)))


def _q5_0(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(_fifth_bit(blocks[:, 6:], blocks[:, 2:6], (0xF0, 0)), halves(blocks[:, :2]))      # 0xF0: less 16, in int8


def _q5_1(blocks: torch.Tensor) -> Unpacked:
    both = halves(blocks[:, :4])
    return Unpacked(_fifth_bit(blocks[:, 8:], blocks[:, 4:8], (0, 0x10)), both[:, :1], both[:, 1:])


def _q8_0(blocks: torch.Tensor) -> Unpacked:
    import torch
    return Unpacked(blocks[:, 2:].view(torch.int8), halves(blocks[:, :2]))


def _q1_0(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(signed(spread(blocks[:, 2:], 1, (0xFF, 1))), halves(blocks[:, :2]))


def _q2_0(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(signed(spread(blocks[:, 2:], 2, (0xFF, 0, 1, 2))), halves(blocks[:, :2]))


SCALE = Field("scale", 0, 2, "float16: multiplies every code of the block")
MINIMUM = Field("minimum", 2, 4, "float16: what code 0 stands for; added to every weight")
HALVES = "4 bits a weight{}: low halves of the bytes are weights 0-15, high halves 16-31"
SIXTEENS, BITS = partial(planes, bits=4, run=16), partial(spread, bits=1)
FIFTH = "the fifth, highest bit of the 32 codes, one bit a weight"

Q4_0 = register("Q4_0", 2, 32, 2 + 16, "legacy", _q4_0, (SCALE, Field("codes", 2, 18, HALVES.format(", less 8"), SIXTEENS)))
Q4_1 = register("Q4_1", 3, 32, 2 + 2 + 16, "legacy", _q4_1, (
    SCALE, MINIMUM, Field("codes", 4, 20, HALVES.format(""), SIXTEENS)))
Q5_0 = register("Q5_0", 6, 32, 2 + 4 + 16, "legacy", _q5_0, (
    SCALE, Field("high bits", 2, 6, f"{FIFTH}; the code is then less 16", BITS),
    Field("codes", 6, 22, HALVES.format(""), SIXTEENS)))
Q5_1 = register("Q5_1", 7, 32, 2 + 2 + 4 + 16, "legacy", _q5_1, (
    SCALE, MINIMUM, Field("high bits", 4, 8, FIFTH, BITS), Field("codes", 8, 24, HALVES.format(""), SIXTEENS)))
Q8_0 = register("Q8_0", 8, 32, 2 + 32, "legacy", _q8_0, (SCALE, Field("codes", 2, 34, "int8: one weight a byte")))
Q8_1 = register("Q8_1", 9, 32, 2 + 2 + 32, "legacy", fields=(
    SCALE, Field("sum", 2, 4, "float16: scale times the sum of the codes"), Field("codes", 4, 36, "int8: one number a byte")))
Q1_0 = register("Q1_0", 41, 128, 2 + 16, "legacy", _q1_0, (
    SCALE, Field("codes", 2, 18, "1 bit a weight, lowest bit first: 1 is the scale, 0 is minus the scale", BITS)))
Q2_0 = register("Q2_0", 42, 64, 2 + 16, "legacy", _q2_0, (
    SCALE, Field("codes", 2, 18, "2 bits a weight, lowest first, less 1: -1, 0, 1, 2", partial(spread, bits=2))))
