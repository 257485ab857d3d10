"""K formats: super-blocks of 256 weights whose block scales are themselves quantized.

Block bytes are what the parts add up to: codes, high bits, packed scales and minima, one or two half-precision
numbers that scale them (Q8_K holds float32 and sums; it never reaches a file). Layouts as in ggml's ggml-common.h.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from .bits import apart, halves, packed, planes, signed, steps, words, woven
from .registry import Field, Unpacked, register

if TYPE_CHECKING:
    import torch


def _scaled(both: torch.Tensor, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset of each group: float16 pair [n, 2] times small whole numbers [2, n, groups], scales and then minima.

    The sign is turned on the whole number: turned on the product it would turn a NaN's too.
    """
    floats = parts.float()
    floats[1].neg_()
    floats.mul_(halves(both).t()[..., None])
    return floats[0], floats[1]


def _six_bits(part: torch.Tensor) -> torch.Tensor:
    """Eight scales and eight minima of 6 bits out of 12 bytes: uint8 [n, 12] -> uint8 [2, n, 8].

    Bytes 0-3 hold scales 0-3 and, above them, the top 2 bits of scales 4-7; bytes 4-7 the same for minima;
    bytes 8-11 the low 4 bits of scales 4-7 (low halves) and of minima 4-7 (high halves).
    """
    import torch
    word = words(part, torch.int32).t().clone(memory_format=torch.contiguous_format)   # one block lies so already
    low, rest = word[:2] & 0x3F3F3F3F, apart(word[2:].view(torch.uint8), 4).view(torch.int32)[:, 0]
    high = (word[:2] >> 2).bitwise_and_(0x30303030).bitwise_or_(rest)
    return torch.stack((low, high), 2).view(torch.uint8)       # scales and minima, 0-3 and 4-7


def _sixteen_of_six_bits(part: torch.Tensor) -> torch.Tensor:
    """Sixteen 6-bit scales, less 32, out of 12 bytes: 8 bytes of low halves, 4 of top bits: uint8 [n, 12] -> int8 [n, 16]."""
    import torch
    low = planes(part[:, :8], 4, 8).view(torch.int32).view(-1, 4)
    low |= planes(part[:, 8:], 2, 4).view(torch.int32).view(-1, 4).bitwise_left_shift_(4)
    return low.view(torch.int8).sub_(32)


def _q2_k(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(signed(planes(blocks[:, 16:80], 2, 32)), *_scaled(blocks[:, 80:], apart(blocks[:, :16], 4)))


def _q3_k(blocks: torch.Tensor) -> Unpacked:
    import torch
    high = planes(blocks[:, :32], 4, 32).view(torch.int32).view(-1, 16).bitwise_left_shift_(2)      # bit 2 is the first plane's
    high = (high >> steps((0, 1, 2, 3), blocks.device)).bitwise_and_(0x04040404).view(torch.uint8)
    scale = _sixteen_of_six_bits(blocks[:, 96:108]).float().mul_(halves(blocks[:, 108:]))
    return Unpacked(signed(woven(apart(blocks[:, 32:96], 2).bitwise_or_(high), 32)).sub_(4), scale)


def _q4_k(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(signed(planes(blocks[:, 16:], 4, 32)), *_scaled(blocks[:, :4], _six_bits(blocks[:, 4:16])))


def _q5_k(blocks: torch.Tensor) -> Unpacked:
    import torch
    high = planes(blocks[:, 16:48], 2, 32).view(torch.int32).view(-1, 32)       # bit 0 is the first plane's, bit 1 the second's
    high = (high << steps((4, 3), blocks.device)).bitwise_and_(0x10101010).view(torch.uint8)
    codes = woven(apart(blocks[:, 48:], 4).bitwise_or_(high), 32)
    return Unpacked(signed(codes), *_scaled(blocks[:, :4], _six_bits(blocks[:, 4:16])))


def _q6_k(blocks: torch.Tensor) -> Unpacked:
    import torch
    device = blocks.device
    high = packed(blocks[:, 128:192]).view(torch.int32) >> steps((0, 2), device)
    high = woven(high.view(torch.uint8), 32).view(torch.int32).view(-1, 32)     # bits 0-1: the first plane's; 4-5: the second's
    high = (high << steps((4, 0), device)).bitwise_and_(0x30303030).view(torch.uint8)
    codes = woven(apart(blocks[:, :128], 4).bitwise_or_(high), 64)
    return Unpacked(signed(codes).sub_(32), blocks[:, 192:208].view(torch.int8).float().mul_(halves(blocks[:, 208:])))


def _four(start: int) -> tuple[Field, Field]:
    return (Field("scale", start, start + 2, "float16: multiplies the block scales"),
            Field("minimum", start + 2, start + 4, "float16: multiplies the block minima"))


def _pairs(numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(("block scales", "block minima"), numbers, strict=True))


PAIRS = Field("block scales", 4, 16, "6 bits each: 8 scales and 8 minima, a pair for 32 weights; the minimum is taken away",
              lambda part: _pairs(_six_bits(part)))
NIBBLES = "4 bits a weight: each 32 bytes hold 32 weights in their low halves and the next 32 in their high ones"
TWO_BITS = "{} bits of each code: each 32 bytes hold four runs of 32 weights, lowest bits first"
BIT = "highest bit of each code: bit i of byte j is for weight 32 i + j"
ONES, TWOS, FOURS, WIDE = (partial(planes, bits=bits, run=run) for bits, run in ((1, 32), (2, 32), (4, 32), (4, 64)))

Q2_K = register("Q2_K", 10, 256, 64 + 16 + 4, "k", _q2_k, (
    Field("block scales", 0, 16, "4 bits each: scale (low) and minimum (high) of 16 weights; the minimum is taken away",
          lambda part: _pairs(apart(part, 4))),
    Field("codes", 16, 80, TWO_BITS.format("both"), TWOS), *_four(80)))
Q3_K = register("Q3_K", 11, 256, 64 + 32 + 12 + 2, "k", _q3_k, (
    Field("high bits", 0, 32, f"{BIT}; the code is then less 4", ONES),
    Field("codes", 32, 96, TWO_BITS.format("low 2"), TWOS),
    Field("block scales", 96, 108, "6 bits each, less 32: 16 scales, one for 16 weights; 8 bytes of low halves, 4 of top bits",
          _sixteen_of_six_bits),
    Field("scale", 108, 110, "float16: multiplies the block scales")))
Q4_K = register("Q4_K", 12, 256, 128 + 12 + 4, "k", _q4_k, (*_four(0), PAIRS, Field("codes", 16, 144, NIBBLES, FOURS)))
Q5_K = register("Q5_K", 13, 256, 128 + 32 + 12 + 4, "k", _q5_k, (
    *_four(0), PAIRS, Field("high bits", 16, 48, BIT, ONES), Field("codes", 48, 176, NIBBLES, FOURS)))
Q6_K = register("Q6_K", 14, 256, 128 + 64 + 16 + 2, "k", _q6_k, (
    Field("codes", 0, 128, "low 4 bits of each code: each 64 bytes hold 64 weights in their low halves, 64 in the high", WIDE),
    Field("high bits", 128, 192, TWO_BITS.format("high 2") + "; the code is then less 32", TWOS),
    Field("block scales", 192, 208, "int8: one for 16 weights"),
    Field("scale", 208, 210, "float16: multiplies the block scales")))
Q8_K = register("Q8_K", 15, 256, 4 + 256 + 32, "k", fields=(
    Field("scale", 0, 4, "float32: multiplies every code of the block"), Field("codes", 4, 260, "int8: one weight a byte"),
    Field("sums", 260, 292, "int16: sums of the codes, 16 at a time; no weight needs them")))
