"""llama.cpp's attention of one token in one layer, alone: ggml's flash attention, over caches laid as it lays them.

Structures are those of the ggml in llama-cpp-python 0.3.36 (ggml.h, ggml-cpu.h).
"""

import ctypes
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import lru_cache
from pathlib import Path

import llama_cpp
import torch

F32, F16 = 0, 1          # enum ggml_type
_SPARE = 2**22           # bytes of a context for what is no cache


class _Params(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Plan(ctypes.Structure):
    """struct ggml_cplan"""

    _fields_ = [("work_size", c_size_t), ("work_data", c_void_p), ("n_threads", c_int), ("threadpool", c_void_p),
                ("abort_callback", c_void_p), ("abort_callback_data", c_void_p), ("use_ref", c_bool)]


_CALLS = {  # name -> (library, result, arguments)
    "ggml_init": ("base", c_void_p, (_Params,)),
    "ggml_free": ("base", None, (c_void_p,)),
    "ggml_new_tensor_3d": ("base", c_void_p, (c_void_p, c_int, c_int64, c_int64, c_int64)),
    "ggml_get_data": ("base", c_void_p, (c_void_p,)),
    "ggml_permute": ("base", c_void_p, (c_void_p, c_void_p, c_int, c_int, c_int, c_int)),
    "ggml_flash_attn_ext": ("base", c_void_p, (c_void_p,) * 5 + (c_float,) * 3),
    "ggml_new_graph": ("base", c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": ("base", None, (c_void_p, c_void_p)),
    "ggml_graph_plan": ("cpu", _Plan, (c_void_p, c_int, c_void_p)),
    "ggml_graph_compute": ("cpu", c_int, (c_void_p, ctypes.POINTER(_Plan))),
}


@lru_cache
def _call(name: str):
    part, result, arguments = _CALLS[name]
    folder = Path(llama_cpp.__file__).parent / "lib"
    found = getattr(ctypes.CDLL(str(next(p for p in sorted(folder.iterdir()) if f"ggml-{part}" in p.name))), name)
    found.restype, found.argtypes = result, arguments
    return found


class Layer:
    """One layer's cache and the graph of one token's attention over it; calling it computes `result`.

    q: float32 [heads, head_dim]. keys, values: uint8 [cells, kv_heads, row_bytes], in blocks of `type`, a number of enum
    ggml_type.
    """

    def __init__(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, type: int, threads: int):
        (heads, head_dim), (cells, kv_heads, _) = q.shape, keys.shape
        self._context = context = _call("ggml_init")(_Params(keys.nbytes + values.nbytes + _SPARE, None, False))

        def laid(kind: int, data: torch.Tensor, *shape: int):
            made, data = _call("ggml_new_tensor_3d")(context, kind, *shape), data.contiguous()
            ctypes.memmove(_call("ggml_get_data")(made), data.data_ptr(), data.nbytes)
            return made

        sides = (laid(F32, q, head_dim, heads, 1), laid(type, keys, head_dim, kv_heads, cells),
                 laid(type, values, head_dim, kv_heads, cells))
        mask = laid(F16, torch.zeros(cells, dtype=torch.float16), cells, 1, 1)
        sides = [_call("ggml_permute")(context, side, 0, 2, 1, 3) for side in sides]       # as llama-graph.cpp does
        found = _call("ggml_flash_attn_ext")(context, *sides, mask, head_dim ** -0.5, 0.0, 0.0)
        self._graph = _call("ggml_new_graph")(context)
        _call("ggml_build_forward_expand")(self._graph, found)
        self._plan = _call("ggml_graph_plan")(self._graph, threads, None)
        self._work = ctypes.create_string_buffer(self._plan.work_size)
        self._plan.work_data = ctypes.addressof(self._work)
        self._found, self._shape = found, (heads, head_dim)

    def __call__(self) -> None:
        if code := _call("ggml_graph_compute")(self._graph, ctypes.byref(self._plan)):
            raise RuntimeError(f"ggml_graph_compute gave {code}")

    @property
    def result(self) -> torch.Tensor:
        """float32 [heads, head_dim]"""
        found = torch.empty(self._shape)
        ctypes.memmove(found.data_ptr(), _call("ggml_get_data")(self._found), found.nbytes)
        return found

    def __del__(self):
        _call("ggml_free")(self._context)
