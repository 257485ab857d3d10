"""bitsandbytes' formats, which keep codes and maxima in tensors of their own: NF4, FP4, INT8.

Four bits: the first weight of a byte is its high half; a code picks one of 16 numbers between -1 and 1, times the largest
magnitude of its run of `blocksize` weights, counted through the whole tensor. Double quantization stores these maxima as
bytes of their own. INT8: a byte is code * maximum of its row / 127.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ..errors import LabError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

CHUNK = 1 << 18     # weights at a time

# Quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
# A sign, then twelfths of these eight: there is a -0.0, as in bitsandbytes' compiled kernels (its fallback for odd widths has
# 0.0 there).
FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


class Nested(NamedTuple):
    """Maxima that are quantized themselves (double quantization): maximum = table[code] * of its run + `offset`."""

    maxima: torch.Tensor    # float32 [ceil(runs / blocksize)]
    table: torch.Tensor     # float32 [256], stored beside the weights
    offset: float | torch.Tensor
    blocksize: int = 256


def dequantize_4bit(packed: torch.Tensor, maxima: torch.Tensor, kind: str, shape: Sequence[int], blocksize: int = 64,
                    nested: Nested | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """NF4 or FP4 -> `dtype` (float32 where None) of `shape`, bit-equal to bitsandbytes in float32.

    `packed` uint8, two weights a byte; `maxima` float32, one for `blocksize` weights (uint8 codes with `nested`).
    Raises LabError for another kind and where bytes or maxima are too few or too many for the shape.
    """
    import torch
    count, dtype = prod(shape), dtype or torch.float32
    runs = -(-count // _positive(blocksize, kind))
    data = packed.view(torch.uint8).reshape(-1)
    if data.numel() != -(-count // 2) or maxima.numel() != runs:
        raise LabError(f"{kind}: shape {list(shape)} in runs of {blocksize} needs {-(-count // 2)} bytes and {runs} maxima, "
                       f"not {data.numel()} and {maxima.numel()}")
    pairs = _pairs(str(kind).lower(), data.device)
    if nested is not None:
        maxima = _maxima(maxima, nested)
    out = torch.empty(count, dtype=dtype, device=data.device)
    step = max(1, CHUNK // blocksize) * blocksize   # even, or all of it
    if step % 2:
        step *= 2
    for start in range(0, count, step):
        index = data[start // 2:(start + step) // 2].to(torch.int32)
        floats = pairs.index_select(0, index).view(torch.float32)[:count - start]     # an odd count ends in half a byte
        _multiply(floats, maxima[start // blocksize:][:step // blocksize].float(), blocksize)
        out[start:start + step] = floats
    return out.view(*shape)


def dequantize_int8(codes: torch.Tensor, maxima: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """INT8 codes [rows, cols] and the float32 maximum of each row -> `dtype` (float32 where None), bit-equal to bitsandbytes.

    Raises LabError where codes are not int8 or there is not one maximum a row.
    """
    import torch
    if codes.dtype != torch.int8 or codes.ndim != 2 or maxima.numel() != codes.shape[0]:
        raise LabError(f"INT8: int8 [rows, cols] and a maximum a row are needed, not {codes.dtype} {list(codes.shape)} "
                       f"and {maxima.numel()} maxima")
    floats = codes.float().mul_(maxima.float().view(-1, 1)).mul_(1 / 127)     # in this order, as bitsandbytes rounds
    return floats.to(dtype or torch.float32)


def _maxima(codes: torch.Tensor, nested: Nested) -> torch.Tensor:
    """The maxima that byte codes stand for."""
    import torch
    runs = -(-codes.numel() // _positive(nested.blocksize, "nested"))
    if codes.dtype != torch.uint8 or nested.maxima.numel() != runs or nested.table.numel() != 256:
        raise LabError(f"double quantization: {codes.numel()} uint8 codes need {runs} maxima and a table of 256, not "
                       f"{codes.dtype}, {nested.maxima.numel()} and {nested.table.numel()}")
    floats = nested.table.index_select(0, codes.reshape(-1).to(torch.int32)).float()
    _multiply(floats, nested.maxima.float(), nested.blocksize)
    return floats.add_(nested.offset)


def _multiply(floats: torch.Tensor, maxima: torch.Tensor, blocksize: int) -> None:
    """Each run of floats [n] by its maximum, in place; the last run may be short."""
    whole = len(floats) // blocksize
    floats[:whole * blocksize].view(-1, blocksize).mul_(maxima[:whole, None])
    if whole * blocksize < len(floats):
        floats[whole * blocksize:].mul_(maxima[whole])


def _positive(blocksize: int, kind: str) -> int:
    if blocksize < 1:
        raise LabError(f"{kind}: a run of {blocksize} weights")
    return blocksize


@lru_cache
def _pairs(kind: str, device: torch.device) -> torch.Tensor:
    """The two float32 of each byte, as 256 int64."""
    import torch
    if kind not in ("nf4", "fp4"):
        raise LabError(f"{kind[:60]!r} is no four-bit kind of bitsandbytes; there are nf4 and fp4")
    values = NF4 if kind == "nf4" else [*FP4, *(-v for v in FP4)]
    values = torch.tensor(values, dtype=torch.float32) / (1 if kind == "nf4" else 12)
    byte = torch.arange(256)
    return torch.stack([values[byte >> 4], values[byte & 15]], 1).view(torch.int64).flatten().to(device)
