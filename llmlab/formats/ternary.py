"""Ternary formats, for models trained with weights of -1, 0 and 1: one scale and 1.6 or 2 bits a weight."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

from .bits import halves, packed, planes, signed, woven
from .registry import Field, Unpacked, register

if TYPE_CHECKING:
    import torch


def _digits(part: torch.Tensor) -> torch.Tensor:
    """Weights of -1, 0 and 1, int8 [n, 256], in the order they have, from bytes [n, 52]."""
    import torch
    parts = part.clamp_min(1)         # 0 and 1 hold the same digits, and no power of 3 takes 1 to 0
    turns = []
    for run, count, start in ((32, 5, 0), (16, 5, 32), (4, 4, 48)):
        each = packed(parts[:, start:start + run]) * _powers(part.device)[:count]      # modulo 256: the digits before are gone
        turns.append(woven(each, run).view(len(part), -1))
    # The digit is the third of 0..255 that x lies in: with every border that it passes one more than 85 + 170, which is -1.
    x = torch.cat(turns, 1)
    return x.clamp(85, 86).add_(x.clamp_(170, 171)).view(torch.int8)


@lru_cache
def _powers(device: torch.device) -> torch.Tensor:
    import torch
    return torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=device)[:, None, None]


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
