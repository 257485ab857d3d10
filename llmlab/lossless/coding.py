"""A tensor of floats as bytes: exponents coded, sign and mantissa beside them as they are; every bit pattern comes back.

Only the exponent compresses: signs and mantissas of trained weights are all but evenly distributed (`measure` shows it). So
BF16 takes 8 bits and the exponent's entropy, F16 11 and F32 24.
"""

import json
import os
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from ..errors import BadFile, LabError
from . import rans

SEGMENT = 1 << 23       # weights coded by themselves: bounded memory, and work for a thread
_MAGIC = b"llmlab-lossless-1\n"
_LENGTHS = struct.Struct("<QQ")


class Layout(NamedTuple):
    """Where a float's exponent lies: `bits` of it above `mantissa` bits of fraction; the sign is above both."""

    name: str               # as formats and safetensors call it
    dtype: torch.dtype
    words: type             # numpy's unsigned integer of the size
    bits: int
    mantissa: int

    @property
    def rest(self) -> int:
        """Bits a weight that are kept as they are: the sign and the mantissa."""
        return 1 + self.mantissa


LAYOUTS = {layout.dtype: layout for layout in (
    Layout("BF16", torch.bfloat16, np.uint16, 8, 7), Layout("F16", torch.float16, np.uint16, 5, 10),
    Layout("F32", torch.float32, np.uint32, 8, 23))}
_NAMED = {layout.name: layout for layout in LAYOUTS.values()}


@dataclass(frozen=True, eq=False)
class Coded:
    """A tensor without loss: its `type` ("BF16", "F16", "F32"), its `shape`, and `data`, uint8 [n], which is all of it."""

    type: str
    shape: tuple[int, ...]
    data: np.ndarray = field(repr=False)

    @property
    def bits(self) -> float:
        """Bits a weight; exact. nan where there are none."""
        return 8 * self.data.nbytes / prod(self.shape) if prod(self.shape) else float("nan")

    @property
    def ratio(self) -> float:
        """Coded bytes over the tensor's own; exact."""
        layout = _NAMED[self.type]
        return self.bits / (layout.bits + layout.rest)


def encode(tensor: torch.Tensor) -> Coded:
    """A float tensor of any shape (bfloat16, float16, float32) without loss: NaNs, infinities, denormals and signed zeros come
    back to the bit. Segments are done by as many threads as torch uses. Raises LabError for another dtype."""
    layout = LAYOUTS.get(tensor.dtype) if isinstance(tensor, torch.Tensor) else None
    if layout is None:
        raise LabError(f"{getattr(tensor, 'dtype', type(tensor).__name__)} has no exponent to code; give a tensor of bfloat16, "
                       "float16 or float32")
    words = words_of(tensor)
    coded = list(_threads()(lambda at: _encode_segment(words[at:at + SEGMENT], layout), range(0, len(words), SEGMENT)))
    body = b"".join(part for segment in coded for part in (_LENGTHS.pack(*map(len, segment)), *segment))
    head = json.dumps({"type": layout.name, "shape": list(tensor.shape), "crc32": zlib.crc32(body)}).encode() + b"\n"
    return Coded(layout.name, tuple(tensor.shape), np.frombuffer(_MAGIC + head + body, np.uint8))


def decode(coded: "Coded | np.ndarray | torch.Tensor | bytes") -> torch.Tensor:
    """The tensor that was encoded, to the bit; `coded` is what `encode` gave, or its `data`.

    Raises BadFile where the bytes are cut short or damaged: a checksum is held against all of them first.
    """
    data = memoryview(_bytes(coded))
    layout, shape, crc, at = _head(data)
    if zlib.crc32(data[at:]) != crc:
        raise BadFile("coded weights are not the bytes that were written (their checksum differs): they are damaged or cut "
                      "short; encode the original again")
    out = np.empty(prod(shape), layout.words)
    work = []
    for start in range(0, len(out), SEGMENT):
        if len(data) - at < _LENGTHS.size:
            raise BadFile("coded weights end too early: they are cut short")
        exponents, rest = _LENGTHS.unpack(data[at:at + _LENGTHS.size])
        at += _LENGTHS.size
        work.append((out[start:start + SEGMENT], data[at:at + exponents], data[at + exponents:at + exponents + rest]))
        at += exponents + rest
    if at != len(data):
        raise BadFile("coded weights are not as long as their shape asks for: they are damaged")
    for _ in _threads()(lambda part: _decode_segment(*part, layout), work):
        pass
    return torch.from_numpy(out.view(f"<i{out.itemsize}")).view(layout.dtype).reshape(shape)


def words_of(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a float tensor as unsigned integers [n], not copied where it lies in one piece in memory."""
    layout = LAYOUTS[tensor.dtype]
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.int16 if layout.words is np.uint16 else torch.int32).numpy().view(layout.words)


def _bytes(coded) -> np.ndarray | bytes:
    data = coded.data if isinstance(coded, Coded) else coded
    if isinstance(data, torch.Tensor) and data.dtype == torch.uint8:
        data = data.cpu().contiguous().numpy()
    if not isinstance(data, bytes) and not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 1):
        raise LabError(f"coded weights are bytes, not {type(coded).__name__}; give what lossless.encode returned, or its data")
    return np.ascontiguousarray(data) if isinstance(data, np.ndarray) else data


def _head(data: memoryview) -> tuple[Layout, tuple[int, ...], int, int]:
    """(layout, shape, checksum, where the body begins). Raises BadFile."""
    start = bytes(data[:len(_MAGIC) + 4096])
    line, newline, _ = start[len(_MAGIC):].partition(b"\n")
    if not start.startswith(_MAGIC) or not newline:
        raise BadFile("these bytes are no weights that lossless.encode wrote, or are cut short")
    try:
        told = json.loads(line)
        layout, shape, crc = _NAMED[told["type"]], tuple(told["shape"]), told["crc32"]
        if not all(type(size) is int and size >= 0 for size in (*shape, crc)):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise BadFile("the head of coded weights is damaged: encode the original again") from None
    if prod(shape) > 1 << 50 or -(-prod(shape) // SEGMENT) * _LENGTHS.size > len(data):
        raise BadFile("the head of coded weights names a shape that their bytes cannot hold: they are damaged")
    return layout, shape, crc, len(_MAGIC) + len(line) + 1


# ---- a segment ----------------------------------------------------------------------------------------------

def _encode_segment(words: np.ndarray, layout: Layout) -> tuple[bytes, bytes]:
    """(exponents coded, the rest)."""
    exponents = (words >> layout.mantissa).astype(np.uint8)
    if layout.bits < 8:
        exponents &= (1 << layout.bits) - 1
    signs = words >> (layout.bits + layout.mantissa)
    return rans.encode(exponents), _REST[layout.name][0](words, signs).tobytes()


def _decode_segment(out: np.ndarray, exponents: memoryview, rest: memoryview, layout: Layout) -> None:
    symbols = rans.decode(exponents, len(out))
    if len(symbols) != len(out) or len(rest) != -(-len(out) * layout.rest // 8):
        raise BadFile(f"a segment of {len(out)} coded weights has {len(symbols)} exponents: it is damaged")
    np.copyto(out, symbols)
    out <<= layout.mantissa
    _REST[layout.name][1](np.frombuffer(rest, np.uint8), out)


def _bf16_rest(words: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """A byte a weight: sign, mantissa."""
    return (signs << 7).astype(np.uint8) | words.astype(np.uint8) & 0x7F


def _bf16_back(rest: np.ndarray, out: np.ndarray) -> None:
    out |= rest & 0x7F
    high = (rest & 0x80).astype(np.uint16)
    high <<= 8
    out |= high


def _f16_rest(words: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """A byte a weight, the mantissa's low 8 bits; then 3 bits a weight, sign and mantissa's high two, plane after plane."""
    planes = np.concatenate([signs, words >> 9 & 1, words >> 8 & 1]).astype(np.uint8)
    return np.concatenate([words.astype(np.uint8), np.packbits(planes)])


def _f16_back(rest: np.ndarray, out: np.ndarray) -> None:
    out |= rest[:len(out)]
    planes = np.unpackbits(rest[len(out):], count=3 * len(out)).reshape(3, -1).astype(np.uint16)
    for plane, shift in zip(planes, (15, 9, 8), strict=True):
        plane <<= shift
        out |= plane


def _f32_rest(words: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Three bytes a weight, a plane of each: sign and mantissa's high 7 bits, the middle 8, the low 8."""
    high = (signs << 7).astype(np.uint8) | (words >> 16).astype(np.uint8) & 0x7F
    return np.concatenate([high, (words >> 8).astype(np.uint8), words.astype(np.uint8)])


def _f32_back(rest: np.ndarray, out: np.ndarray) -> None:
    high, middle, low = rest.reshape(3, -1)
    out |= (high & 0x80).astype(np.uint32) << 24
    out |= (high & 0x7F).astype(np.uint32) << 16
    out |= middle.astype(np.uint32) << 8
    out |= low


_REST = {"BF16": (_bf16_rest, _bf16_back), "F16": (_f16_rest, _f16_back), "F32": (_f32_rest, _f32_back)}


# ---- threads ------------------------------------------------------------------------------------------------

def _threads() -> Callable:
    """A map over as many threads as torch uses: numpy's long operations let others run meanwhile."""
    return _pool(torch.get_num_threads()).map if torch.get_num_threads() > 1 else map


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "lossless")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)       # threads do not come along
