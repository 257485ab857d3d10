"""Blocks -> numbers, for every format that says how its blocks come apart.

`weight = scale * code + offset`, in float32: one multiplication and one addition, each rounded by itself, so that
the bits are gguf-py's. Rows are done a cache-sized chunk at a time.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from math import prod
from threading import Barrier
from typing import TYPE_CHECKING

from ..errors import LabError, UnknownName
from .bits import words
from .plain import STORED
from .registry import FORMATS, Format

if TYPE_CHECKING:
    import numpy
    import torch

CHUNK = 1 << 21     # weights that a thread takes apart at a time: enough that calls cost little, few enough to stay in a cache
SHARE = 1 << 18     # weights that are worth a thread of their own
CHUNK_DEVICE = 1 << 24      # weights at a time elsewhere: launches are what costs


def dequantize(blocks: torch.Tensor | numpy.ndarray, type: str, dtype: torch.dtype | None = None,
               out: torch.Tensor | None = None) -> torch.Tensor:
    """The numbers in `blocks`: uint8 [..., row_bytes] -> `dtype` (float32 where None) [..., cols], into `out` where given.

    `blocks` is a tensor on any device, or a numpy array (mapped and read-only ones too; neither copied nor written).
    Bit-equal to gguf-py in float32; other dtypes are that, rounded. Raises UnknownName for a type that is not known,
    LabError for one without a dequantizer, for anything but bytes, for blocks cut short, and for an `out` that does not fit.
    """
    import torch
    known = find(type)
    data = as_bytes(blocks, known)
    dtype = dtype or torch.float32
    shape = (*data.shape[:-1], data.shape[-1] // known.block_bytes * known.block)
    if out is None:
        out = _empty(shape, dtype, data.device)
    elif tuple(out.shape) != shape or out.dtype != dtype or not out.is_contiguous():
        raise LabError(f"{known.name}: out is {out.dtype} {list(out.shape)}; a contiguous {dtype} {list(shape)} is needed")
    if known.name in STORED:
        _stored(words(data, getattr(torch, STORED[known.name])), out)
        return out
    flat, into = data.reshape(-1, known.block_bytes), out.view(-1, known.block)
    if data.device.type == "cpu" and (workers := min(torch.get_num_threads(), into.numel() // SHARE)) > 1:
        share = -(-len(flat) // workers)
        inference = torch.is_inference_mode_enabled()        # a thread has its own, and must write what was made in this one's

        def work(start: int) -> None:
            with torch.inference_mode(inference):
                chunks(known, flat[start:start + share], into[start:start + share], workers)

        list(_pool(torch.get_num_threads()).map(work, range(0, len(flat), share)))
    else:
        chunks(known, flat, into)
    return out


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for the numbers. numpy asks Linux for large pages, torch does not: first touching small ones costs most."""
    import numpy
    import torch
    if device.type == "cpu" and prod(shape) >= SHARE:
        return torch.from_numpy(numpy.empty(prod(shape) * dtype.itemsize, numpy.uint8)).view(dtype).view(shape)
    return torch.empty(shape, dtype=dtype, device=device)


def chunks(known: Format, blocks: torch.Tensor, into: torch.Tensor, threads: int = 1) -> None:
    """All of the blocks, by one of so many threads that share a cache."""
    once = max(min(CHUNK, 2 * CHUNK // threads), CHUNK // 4) if blocks.device.type == "cpu" else CHUNK_DEVICE
    step = max(1, once // known.block)
    for start in range(0, len(blocks), step):
        weights(known, blocks[start:start + step], into[start:start + step])


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """So many threads, each of which does its own operations alone.

    Dozens of short operations a chunk would each wake torch's team of threads and wait for it; a thread with a chunk to itself
    waits for nobody. The number of threads is a thread's own, but setting it also sets what threads born later begin
    with: so it is set back at once.
    """
    import torch
    ready = Barrier(threads)

    def alone():
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(threads, "dequantize", alone)
    list(pool.map(int, range(threads)))
    torch.set_num_threads(threads)
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)     # threads do not come along


def weights(known: Format, blocks: torch.Tensor, into: torch.Tensor) -> None:
    """The weights of blocks [n, block_bytes] into [n, block] of any float type."""
    import torch
    _roomy()
    codes, scale, offset = known.unpack(blocks)
    floats = into if into.dtype == torch.float32 else torch.empty(into.shape, dtype=torch.float32, device=into.device)
    groups = floats.view(len(floats), scale.shape[1], -1)
    floats.copy_(codes)
    groups.mul_(scale[..., None])
    if offset is not None:      # the order of the sum: of two NaNs the product's stays, as in gguf-py
        torch.add(offset[..., None], groups, out=groups)
    if floats is not into:
        into.copy_(floats)


@lru_cache
def _roomy() -> None:
    """Makes malloc keep what is freed between one operation and the next.

    glibc returns pieces to Linux, and gets them back page by page at several times the arithmetic's cost, up to the size of
    the largest that it has seen freed: so it is shown one, which nobody writes to.
    """
    import torch
    torch.empty(8 * CHUNK, dtype=torch.uint8)


def _stored(numbers: torch.Tensor, out: torch.Tensor) -> None:
    """Numbers as they are stored, into `out`. A NaN of float16 keeps its bits, as in numpy; torch's widening changes some."""
    import torch
    out.copy_(numbers)
    if numbers.dtype != torch.float16 or out.dtype != torch.float32 or not numbers.sum().isnan():
        return
    for floats, halves in zip(out.view(-1).split(CHUNK), numbers.reshape(-1).view(torch.int16).split(CHUNK), strict=True):
        words = halves.int()
        bits = (words & 0x8000) << 16 | 0x7F800000 | (words & 0x3FF) << 13
        floats.view(torch.int32).copy_(torch.where(floats.isnan(), bits, floats.view(torch.int32)))


def find(type: str) -> Format:
    """The format of that name. Raises UnknownName, or LabError where nobody wrote how its blocks come apart."""
    known = FORMATS.get(type) if isinstance(type, str) else None
    if known is None:
        raise UnknownName(f"{str(type)[:60]!r} is no block format; there are {', '.join(FORMATS)}")
    if known.unpack is None and known.name not in STORED:
        raise LabError(f"{known.name} cannot be dequantized: its blocks' size is known, what is in them is not")
    return known


def as_bytes(blocks: torch.Tensor | numpy.ndarray, known: Format) -> torch.Tensor:
    """`blocks` as a uint8 tensor [..., row_bytes] of whole blocks; an array is wrapped, never copied."""
    import torch
    data = blocks if isinstance(blocks, torch.Tensor) else _wrapped(blocks, known)
    if data.dtype != torch.uint8:
        raise LabError(f"{known.name}: blocks are bytes (uint8), not {str(data.dtype).removeprefix('torch.')}")
    if data.ndim == 0 or data.shape[-1] % known.block_bytes:
        raise LabError(f"{known.name}: a row of {data.shape[-1] if data.ndim else 0} bytes is cut short; "
                       f"a block is {known.block_bytes} bytes for {known.block} weights")
    return data


class _Writable:
    """A read-only array's memory without its flag: torch would warn of writing, which nobody here does."""

    def __init__(self, array: numpy.ndarray):
        self.array = array
        self.__array_interface__ = array.__array_interface__ | {"data": (array.__array_interface__["data"][0], False)}


def _wrapped(array: numpy.ndarray, known: Format) -> torch.Tensor:
    import numpy
    import torch
    if not isinstance(array, numpy.ndarray) or array.dtype != numpy.uint8:
        raise LabError(f"{known.name}: blocks are bytes (uint8), not {getattr(array, 'dtype', array.__class__.__name__)}")
    if not array.flags.writeable:
        array = numpy.asarray(_Writable(array))
    return torch.from_numpy(array)
