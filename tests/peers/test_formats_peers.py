"""Formats that gguf-py cannot read, beside llama.cpp's own C."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from llmlab import formats

llama_cpp = pytest.importorskip("llama_cpp")


@pytest.mark.parametrize("name", ["Q1_0", "Q2_0", "Q4_K", "MXFP4"])
def test_llama_cpp_reads_the_same_numbers(name):
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(p for p in sorted(folder.iterdir()) if "ggml-base" in p.name)))
    known = formats.FORMATS[name]
    data = np.random.default_rng(0).integers(0, 256, (512, known.block_bytes), dtype=np.uint8)
    out = np.empty(512 * known.block, np.float32)
    read = library[f"dequantize_row_{name.lower() if name[-1] == '0' or name == 'MXFP4' else name[:-1].lower() + 'K'}"]
    read(ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.size))
    ours = formats.dequantize(data.reshape(1, -1), name).numpy().ravel()
    numbers = ~np.isnan(out)    # C compilers order the operands of a NaN as they like
    assert numbers.mean() > 0.9 and np.array_equal(np.isnan(ours), ~numbers)
    assert np.array_equal(ours[numbers], out[numbers])
