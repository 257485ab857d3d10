"""What a cache cell holds, beside what llama.cpp's own C writes into one.

Its cache is filled by `ggml_set_rows`, which rounds by each type's `from_float` of its CPU backend. That is the plain C of
ggml-quants.c, which ours is byte for byte, for all types but q8_0: there vector code multiplies by 127 / largest instead of
by the inverse of the scale, and rounds halves to even; a code in some hundred thousand is one off.
"""

import ctypes
import platform
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from llmlab import kernels
from llmlab.formats import FORMATS
from llmlab.memory import CACHE_TYPES

llama_cpp = pytest.importorskip("llama_cpp")

QUANTIZED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


class _Traits(ctypes.Structure):
    """struct ggml_type_traits_cpu (ggml-cpu.h), as far as is read here."""

    _fields_ = [("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64))]


@lru_cache
def library(part: str) -> ctypes.CDLL:
    folder = Path(llama_cpp.__file__).parent / "lib"
    return ctypes.CDLL(str(next(p for p in sorted(folder.iterdir()) if part in p.name)))


def theirs(x: torch.Tensor, name: str, plain: bool) -> torch.Tensor:
    """float32 [rows, cols] -> uint8 [rows, row_bytes]: by ggml-quants.c's plain C, or by what fills the cache here."""
    known = FORMATS[CACHE_TYPES[name]]
    rows = x.numpy()
    out = np.zeros((len(rows), known.bytes(rows.shape[1])), np.uint8)
    if plain:
        write = getattr(library("ggml-base"), f"quantize_row_{name}_ref")
        write.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    else:
        traits = library("ggml-cpu").ggml_get_type_traits_cpu
        traits.restype, traits.argtypes = ctypes.POINTER(_Traits), [ctypes.c_int]
        write = traits(known.id).contents.from_float
    for row, blocks in zip(rows, out, strict=True):
        write(row.ctypes.data, blocks.ctypes.data, rows.shape[1])
    return torch.from_numpy(out)


def rows(kind: str) -> torch.Tensor:
    random = torch.Generator().manual_seed(7)
    x = torch.randn(2000, 128, generator=random)
    if kind == "bfloat16":
        return x.bfloat16().float()
    if kind == "outliers":
        x[:, 5] *= 40
        return x * (0.98 * torch.rand(2000, 1, generator=random) + 0.02) ** 8 * 100      # all above ggml's "nothing", 1e-15
    return x


@pytest.mark.parametrize("kind", ["normal", "bfloat16", "outliers"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_cell_holds_what_llama_cpps_plain_c_writes(name, kind):
    x = rows(kind)
    pages = kernels.Pages(name, 1, 1, 128, len(x))
    pages.write(torch.arange(len(x)), x[None, None])
    ours = pages.blocks(torch.arange(len(x)))[0, 0]
    if platform.machine() in ("x86_64", "AMD64"):
        assert torch.equal(ours, theirs(x, name, plain=True))
    single = kernels.Pages(name, 1, 1, 128, 256)
    for cell in range(50):
        single.write(torch.tensor([cell]), x[None, None, cell:cell + 1])
    assert torch.equal(single.blocks(torch.arange(50))[0, 0], ours[:50])


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_cell_holds_what_llama_cpps_cache_holds(name):
    x = rows("bfloat16")
    pages = kernels.Pages(name, 1, 1, 128, len(x))
    pages.write(torch.arange(len(x)), x[None, None])
    ours, other = pages.blocks(torch.arange(len(x)))[0, 0], theirs(x, name, plain=False)
    if name != "q8_0":
        assert torch.equal(ours, other)
        return
    halves, codes = ours.view(-1, 34)[:, :2], ours.view(-1, 34)[:, 2:].view(torch.int8).int()
    assert torch.equal(halves, other.view(-1, 34)[:, :2])
    off = (codes - other.view(-1, 34)[:, 2:].contiguous().view(torch.int8).int()).abs()
    print(f"q8_0: {int(off.sum())} codes of {off.numel()} are one off")
    assert off.max() <= 1 and off.float().mean() < 5e-3
