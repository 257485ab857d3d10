"""llama.cpp as the peer: quantize, load and make contexts through llama-cpp-python's C interface, log captured."""

import ctypes
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

try:
    import llama_cpp
except ImportError:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip("llama-cpp-python is not installed; install the extra `peers`", allow_module_level=True)

FTYPES = {name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_"): getattr(llama_cpp, name)
          for name in dir(llama_cpp) if name.startswith("LLAMA_FTYPE_") and "GUESSED" not in name}
TYPES = {name.removeprefix("GGML_TYPE_").lower(): getattr(llama_cpp, name)
         for name in dir(llama_cpp) if name.startswith("GGML_TYPE_")}

TYPES.setdefault("bf16", 30)       # the library has no name for it

_lines: list[str] = []


@llama_cpp.llama_log_callback
def _collect(level, text, user_data):
    _lines.append(text.decode("utf-8", "replace"))


def listen() -> None:
    """Have llama.cpp tell this module; again after somebody else was told."""
    llama_cpp.llama_log_set(_collect, ctypes.c_void_p(0))


listen()
llama_cpp.llama_backend_init()


def log() -> str:
    """What llama.cpp said since the last call."""
    text = "".join(_lines)
    _lines.clear()
    return text


def importance_of(tensors) -> ctypes.Array:
    """An importance matrix of ones for every tensor of two dimensions or more."""
    shapes = [(t.name, t.shape[0] * (t.shape[2] if len(t.shape) > 2 else 1)) for t in tensors if len(t.shape) > 1]
    entries = (llama_cpp.llama_model_imatrix_data * (len(shapes) + 1))()
    ones = np.ones(max(n for _, n in shapes), dtype=np.float32)
    entries.ones = ones             # lives as long as the array that points to it
    for entry, (name, size) in zip(entries, shapes, strict=False):
        entry.name, entry.data, entry.size = name.encode(), ones.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), size
    return entries


def quantize(source, target, quant: str, importance=None, **settings) -> bool:
    """llama_model_quantize; False where llama.cpp refuses (the reason is in the log)."""
    log()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = os.cpu_count()
    params.ftype = FTYPES[quant]
    if importance is not None:
        params.imatrix = importance
    for name, value in settings.items():
        setattr(params, name, value)
    return llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) == 0


@contextmanager
def loaded(path, **settings):
    """A llama_model, weights and all. Fails with llama.cpp's own words."""
    log()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False
    for name, value in settings.items():
        setattr(params, name, value)
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    said = log()
    assert model, "llama.cpp did not load it:\n" + "\n".join(said.splitlines()[-6:])
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


@dataclass(frozen=True)
class CacheLine:
    """One line that a cache prints: MiB with two decimals."""

    total: float
    cells: int
    layers: int
    sequences: int
    streams: int
    k_type: str
    k: float
    v_type: str
    v: float


@dataclass(frozen=True)
class ContextLog:
    """What llama.cpp printed as it made a context."""

    text: str
    caches: tuple[CacheLine, ...]
    kv_buffers: tuple[float, ...]
    recurrent_buffers: tuple[float, ...]
    recurrent: tuple[tuple[float, float, float], ...]    # total, R, S
    compute: dict[str, float]


_CACHE = re.compile(r"size =\s+([\d.]+) MiB \(\s*(\d+) cells,\s*(\d+) layers,\s*(\d+)/(\d+) seqs\), "
                    r"K \((\w+)\):\s+([\d.]+) MiB, V \((\w+)\):\s+([\d.]+) MiB")
_STATE = re.compile(r"size =\s+([\d.]+) MiB \(\s*\d+ cells,\s*\d+ layers,\s*\d+ seqs[^)]*\), "
                    r"R \(f32\):\s+([\d.]+) MiB, S \(f32\):\s+([\d.]+) MiB")


def context_log(model, **settings) -> ContextLog | None:
    """Make a context with these llama_context_params, read its log, free it. None where llama.cpp refuses."""
    log()
    params = llama_cpp.llama_context_default_params()
    for name, value in settings.items():
        assert hasattr(params, name), name
        setattr(params, name, value)
    context = llama_cpp.llama_init_from_model(model, params)
    text = log()
    if not context:
        return None
    llama_cpp.llama_free(context)
    caches = tuple(CacheLine(float(a), int(b), int(c), int(d), int(e), f, float(g), h, float(i))
                   for a, b, c, d, e, f, g, h, i in _CACHE.findall(text))
    return ContextLog(
        text, caches, tuple(map(float, re.findall(r"KV buffer size =\s+([\d.]+) MiB", text))),
        tuple(map(float, re.findall(r"RS buffer size =\s+([\d.]+) MiB", text))),
        tuple(tuple(map(float, found)) for found in _STATE.findall(text)),
        {name: float(size) for name, size in re.findall(r"(\S+) compute buffer size =\s+([\d.]+) MiB", text)})
