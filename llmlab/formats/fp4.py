"""Four-bit floating point: a table of 16 values and a scale for each small group.

MXFP4 (OCP Microscaling): 32 weights and one power-of-two byte. NVFP4: 4 groups of 16 weights, one E4M3 byte each.
Codes are twice the values (0, 1, 2, 3, 4, 6, 8, 12 with a sign), so that they are whole numbers, and the scale is half
of what the byte says, as ggml does. NF4 and FP4 are bitsandbytes' (bnb.py): 64 weights and one float32 maximum. It keeps the
maxima in a tensor of their own; here each lies before its codes, which no file does.

What for. MXFP4 (4.25 bits) and NVFP4 (4.5) are what Blackwell cards multiply without unpacking, and what models trained in
them (gpt-oss) are exact in: convert such a checkpoint to its own format, any other loses. Of weights trained in 16 bits, IQ4_XS
keeps more in MXFP4's bytes. Off by, in root mean square beside normal weights (measured, and with `effort="high"`): MXFP4
11.5 % (11.1 %), NVFP4 9.6 % (8.2 %), IQ4_XS 7.7 % (7.4 %).
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

from .bits import levelled, packed, planes, words
from .bnb import byte_pairs
from .registry import Field, Unpacked, register

if TYPE_CHECKING:
    import torch


LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)      # twice the values of E2M1


@lru_cache
def e8m0(device: torch.device) -> torch.Tensor:
    """Half of 2^(byte - 127), exactly; bytes 0 and 1 are below the smallest normal float32."""
    import torch
    return torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - 128).float().to(device)


@lru_cache
def e4m3(device: torch.device) -> torch.Tensor:
    """Half of the E4M3 number of a byte, its sign bit left out; 0x7F (not a number) counts as zero, as ggml has it."""
    import torch
    byte = torch.arange(256)
    exponent, mantissa = (byte >> 3) & 15, (byte & 7).double()
    value = torch.where(exponent == 0, mantissa * 2.0 ** -10, (1 + mantissa / 8) * 2.0 ** (exponent - 8).double())
    return value.where(byte != 0x7F, 0).float().to(device)


def _scales(table: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, packed(part).view(-1).int()).view(part.shape)


def _mxfp4(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(levelled(blocks[:, 1:], LEVELS, 16), _scales(e8m0(blocks.device), blocks[:, :1]))


def _nvfp4(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(levelled(blocks[:, 4:], LEVELS, 8), _scales(e4m3(blocks.device), blocks[:, :4]))


def _bitsandbytes(blocks: torch.Tensor, kind: str) -> Unpacked:
    import torch
    codes = byte_pairs(kind, blocks.device).index_select(0, packed(blocks[:, 4:]).view(-1).int())
    return Unpacked(codes.view(torch.float32).view(len(blocks), 64), words(blocks[:, :4], torch.float32))


def _highs_first(part: torch.Tensor) -> torch.Tensor:
    """Codes of bytes [n, k] whose first weight is the high half: uint8 [n, 2 k]."""
    import torch
    return torch.stack([part >> 4, part & 15], 2).flatten(1)


E2M1 = "4-bit floats (sign, 2 exponent bits, 1 mantissa bit): 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign; "

MXFP4 = register("MXFP4", 39, 32, 1 + 16, "fp4", _mxfp4, (
    Field("scale", 0, 1, "a power of two: 2^(byte - 127)", lambda part: 2 * _scales(e8m0(part.device), part)),
    Field("codes", 1, 17, E2M1 + "low halves of the bytes are weights 0-15, high halves 16-31",
          partial(planes, bits=4, run=16))))
NVFP4 = register("NVFP4", 40, 64, 4 + 32, "fp4", _nvfp4, (
    Field("block scales", 0, 4, "8-bit floats (4 exponent bits, 3 mantissa bits, the sign not used): one for 16 weights",
          lambda part: 2 * _scales(e4m3(part.device), part)),
    Field("codes", 4, 36, E2M1 + "8 bytes for 16 weights, low halves the first 8", partial(planes, bits=4, run=8))))
NF4, FP4 = (register(kind.upper(), None, 64, 4 + 32, "fp4", partial(_bitsandbytes, kind=kind), (
    Field("maximum", 0, 4, "float32: multiplies every level of the block"),
    Field("codes", 4, 36, f"4 bits a weight, the first in the high half: {what} times the maximum", _highs_first)))
    for kind, what in (("nf4", "one of 16 quantiles of a normal distribution, from -1 to 1,"),
                       ("fp4", "a sign and 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3 or 1")))
