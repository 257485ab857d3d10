"""K formats: super-blocks of 256 weights whose block scales are themselves quantized.

Block bytes are what the parts add up to: codes, high bits, packed scales and minima, one or two half-precision
numbers that scale them (Q8_K holds float32 and sums; it never reaches a file). Layouts as in ggml's ggml-common.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .bits import apart, halves, planes, signed, words
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


def _six_bits(packed: torch.Tensor) -> torch.Tensor:
    """Eight scales and eight minima of 6 bits out of 12 bytes: uint8 [n, 12] -> uint8 [2, n, 8].

    Bytes 0-3 hold scales 0-3 and, above them, the top 2 bits of scales 4-7; bytes 4-7 the same for minima;
    bytes 8-11 the low 4 bits of scales 4-7 (low halves) and of minima 4-7 (high halves).
    """
    import torch
    word = words(packed, torch.int32).t().clone(memory_format=torch.contiguous_format)   # one block lies so already
    six = torch.empty(2, word.shape[1], 2, dtype=torch.int32, device=word.device)     # scales and minima, 0-3 and 4-7
    torch.bitwise_and(word[:2], 0x3F3F3F3F, out=six[..., 0])
    high = word[:2].bitwise_right_shift_(2).bitwise_and_(0x30303030)
    high[0] |= word[2] & 0x0F0F0F0F
    high[1] |= word[2].bitwise_right_shift_(4).bitwise_and_(0x0F0F0F0F)
    six[..., 1] = high
    return six.view(torch.uint8)


def _sixteen_of_six_bits(packed: torch.Tensor) -> torch.Tensor:
    """Sixteen 6-bit scales, less 32, out of 12 bytes: 8 bytes of low halves, 4 of top bits: uint8 [n, 12] -> int8 [n, 16]."""
    import torch
    low = planes(packed[:, :8], 4, 8).view(torch.int32).view(-1, 4)
    low |= planes(packed[:, 8:], 2, 4).view(torch.int32).view(-1, 4).bitwise_left_shift_(4)
    return low.view(torch.int8).sub_(32)


def _q2_k(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(signed(planes(blocks[:, 16:80], 2, 32)), *_scaled(blocks[:, 80:], apart(blocks[:, :16], 4)))


def _q3_k(blocks: torch.Tensor) -> Unpacked:
    import torch
    codes = planes(blocks[:, :32], 1, 32).view(torch.int32).view(-1, 2, 4, 8).bitwise_left_shift_(2)
    codes |= planes(blocks[:, 32:96], 2, 32).view(torch.int32)
    scale = _sixteen_of_six_bits(blocks[:, 96:108]).float().mul_(halves(blocks[:, 108:]))
    return Unpacked(signed(codes).sub_(4), scale)


def _q4_k(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(signed(planes(blocks[:, 16:], 4, 32)), *_scaled(blocks[:, :4], _six_bits(blocks[:, 4:16])))


def _q5_k(blocks: torch.Tensor) -> Unpacked:
    import torch
    codes = planes(blocks[:, 16:48], 1, 32).view(torch.int32).view(-1, 4, 2, 8).bitwise_left_shift_(4)
    codes |= planes(blocks[:, 48:], 4, 32).view(torch.int32)
    return Unpacked(signed(codes), *_scaled(blocks[:, :4], _six_bits(blocks[:, 4:16])))


def _q6_k(blocks: torch.Tensor) -> Unpacked:
    import torch
    codes = planes(blocks[:, 128:192], 2, 32).view(torch.int32).bitwise_left_shift_(4)
    codes |= planes(blocks[:, :128], 4, 64).view(torch.int32).view(codes.shape)
    return Unpacked(signed(codes).sub_(32), blocks[:, 192:208].view(torch.int8).float().mul_(halves(blocks[:, 208:])))


def _four(start: int) -> tuple[Field, Field]:
    return (Field("scale", start, start + 2, "float16: multiplies the block scales"),
            Field("minimum", start + 2, start + 4, "float16: multiplies the block minima"))


PAIRS = Field("block scales", 4, 16, "6 bits each: 8 scales and 8 minima, a pair for 32 weights; the minimum is taken away")
NIBBLES = "4 bits a weight: each 32 bytes hold 32 weights in their low halves and the next 32 in their high ones"
TWO_BITS = "{} bits of each code: each 32 bytes hold four runs of 32 weights, lowest bits first"
BIT = "highest bit of each code: bit i of byte j is for weight 32 i + j"

Q2_K = register("Q2_K", 10, 256, 64 + 16 + 4, "k", _q2_k, (
    Field("block scales", 0, 16, "4 bits each: scale (low) and minimum (high) of 16 weights; the minimum is taken away"),
    Field("codes", 16, 80, TWO_BITS.format("both")), *_four(80)))
Q3_K = register("Q3_K", 11, 256, 64 + 32 + 12 + 2, "k", _q3_k, (
    Field("high bits", 0, 32, f"{BIT}; the code is then less 4"), Field("codes", 32, 96, TWO_BITS.format("low 2")),
    Field("block scales", 96, 108, "6 bits each, less 32: 16 scales, one for 16 weights; 8 bytes of low halves, 4 of top bits"),
    Field("scale", 108, 110, "float16: multiplies the block scales")))
Q4_K = register("Q4_K", 12, 256, 128 + 12 + 4, "k", _q4_k, (*_four(0), PAIRS, Field("codes", 16, 144, NIBBLES)))
Q5_K = register("Q5_K", 13, 256, 128 + 32 + 12 + 4, "k", _q5_k, (
    *_four(0), PAIRS, Field("high bits", 16, 48, BIT), Field("codes", 48, 176, NIBBLES)))
Q6_K = register("Q6_K", 14, 256, 128 + 64 + 16 + 2, "k", _q6_k, (
    Field("codes", 0, 128, "low 4 bits of each code: each 64 bytes hold 64 weights in their low halves, 64 in the high"),
    Field("high bits", 128, 192, TWO_BITS.format("high 2") + "; the code is then less 32"),
    Field("block scales", 192, 208, "int8: one for 16 weights"),
    Field("scale", 208, 210, "float16: multiplies the block scales")))
Q8_K = register("Q8_K", 15, 256, 4 + 256 + 32, "k", fields=(
    Field("scale", 0, 4, "float32: multiplies every code of the block"), Field("codes", 4, 260, "int8: one weight a byte"),
    Field("sums", 260, 292, "int16: sums of the codes, 16 at a time; no weight needs them")))
