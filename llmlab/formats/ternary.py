"""Ternary formats, for models trained with weights of -1, 0 and 1: one scale and 1.6 or 2 bits a weight."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from .bits import halves, planes, signed
from .registry import Field, Unpacked, register

if TYPE_CHECKING:
    import torch


def _digits(part: torch.Tensor) -> torch.Tensor:
    """Weights of -1, 0 and 1, int8 [n, 256], in the order they have, from bytes [n, 52]."""
    import torch
    parts = part.clamp_min(1)         # 0 and 1 hold the same digits, and no power of 3 takes 1 to 0
    x = torch.empty(len(part), 256, dtype=torch.uint8, device=part.device)
    for i in range(5):
        x[:, 32 * i:][:, :32] = parts[:, :32]
        x[:, 160 + 16 * i:][:, :16] = parts[:, 32:48]
        if i < 4:
            x[:, 240 + 4 * i:][:, :4] = parts[:, 48:]
            parts *= 3                          # modulo 256: the digit before is gone
    # The digit is the third of 0..255 that x lies in. x - x // 4 - 1 is 63 at 85, 64 at 86, 127 at 170 and 128 at 171.
    return x.sub_(x >> 2).sub_(65).view(torch.int8).bitwise_right_shift_(6)


def _unpack_tq1(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(_digits(blocks[:, :52]), halves(blocks[:, 52:]))


def _unpack_tq2(blocks: torch.Tensor) -> Unpacked:
    return Unpacked(signed(planes(blocks[:, :64], 2, 32)).sub_(1), halves(blocks[:, 64:]))


TQ1_0 = register("TQ1_0", 34, 256, 2 + 52, "ternary", unpack=_unpack_tq1, fields=(
    Field("codes", 0, 52,
          "5 weights a byte (4 in the last 4 bytes), the base-3 digits of byte / 256: times 3 to the i, the overflow dropped, "
          "the third of 256 it lies in is weight i plus 1", _digits),
    Field("scale", 52, 54, "float16: multiplies every code of the block")))
TQ2_0 = register("TQ2_0", 35, 256, 2 + 64, "ternary", unpack=_unpack_tq2, fields=(
    Field("codes", 0, 64, "2 bits a weight: the weight plus 1; byte j of 32 holds weights j, 32 + j, 64 + j and 96 + j",
          partial(planes, bits=2, run=32)),
    Field("scale", 64, 66, "float16: multiplies every code of the block")))
