"""llama.cpp's own quantizers, by ctypes: numbers -> the bytes that llama-quantize would write."""

import ctypes
from functools import lru_cache
from pathlib import Path

import numpy as np

from llmlab.formats import FORMATS


@lru_cache
def library() -> ctypes.CDLL:
    import llama_cpp
    folder = Path(llama_cpp.__file__).parent / "lib"
    found = ctypes.CDLL(str(next(p for p in sorted(folder.iterdir()) if "ggml-base" in p.name)))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
                                          ctypes.c_int64, ctypes.c_void_p]
    return found


def quantize(weights: np.ndarray, name: str, importance: np.ndarray | None = None,
             into: np.ndarray | None = None, first: int = 0, rows: int | None = None) -> np.ndarray:
    """float32 [rows, cols] -> uint8 [rows, row_bytes]; where `into` is given, `rows` rows of it from row `first` on."""
    known = FORMATS[name]
    assert weights.dtype == np.float32 and weights.flags.c_contiguous
    out = np.zeros((len(weights), known.bytes(weights.shape[1])), np.uint8) if into is None else into
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
    library().ggml_quantize_chunk(
        known.id, weights.ctypes.data, out.ctypes.data, first * weights.shape[1], len(weights) if rows is None else rows,
        weights.shape[1], None if importance is None else importance.ctypes.data)
    return out
