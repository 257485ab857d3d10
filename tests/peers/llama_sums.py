"""What llama.cpp's own matmuls read: sums of squares by the rule of llama-imatrix, through its callback for each node."""

import ctypes
from pathlib import Path

import numpy as np
from llama_engine import llama_cpp, loaded, log

_LIBRARY = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base*"))))
_LIBRARY.ggml_op_name.restype, _LIBRARY.ggml_op_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
_LIBRARY.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]


class _Tensor(ctypes.Structure):
    """struct ggml_tensor (ggml.h), as far as is read here."""


_Tensor._fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4),
                    ("nb", ctypes.c_size_t * 4), ("op", ctypes.c_int),
                    ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
                    ("src", ctypes.POINTER(_Tensor) * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
                    ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64)]


def _numbers(tensor: _Tensor, dtype) -> np.ndarray:
    """A copy of a tensor of three dimensions, [ne2, ne1, ne0]; it need not lie in one piece."""
    ne, nb = tensor.ne, tensor.nb
    assert ne[3] == 1
    size = sum((n - 1) * step for n, step in zip(ne[:3], nb[:3], strict=True)) + 4
    raw = np.empty(size, np.uint8)
    _LIBRARY.ggml_backend_tensor_get(ctypes.byref(tensor), raw.ctypes.data, 0, size)
    return np.ndarray((ne[2], ne[1], ne[0]), dtype, raw, 0, (nb[2], nb[1], nb[0])).copy()


def llama_sums(path, chunks, output=False) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(sums [matrices, cols] float64, counts [matrices]) by tensor after llama.cpp read each of `chunks` (ids of one length),
    its cache in float32, no flash attention: all that it rounds there is arithmetic."""
    sums, counts, failed = {}, {}, []

    def collect(node):
        src, read = node.src[0].contents, node.src[1].contents
        name, x, many = src.name.decode(), _numbers(read, np.float32).astype(np.float64) ** 2, src.ne[2]
        if name not in sums:
            sums[name], counts[name] = np.zeros((many, x.shape[-1])), np.zeros(many, np.int64)
        if _op(node) == "MUL_MAT":
            sums[name] += x.reshape(-1, x.shape[-1]).sum(0)
            counts[name] += x.shape[0] * x.shape[1]
            return
        for token, chosen in enumerate(_numbers(node.src[2].contents, np.int32)[0]):
            for place, expert in enumerate(chosen):
                sums[name][expert] += x[token, place % x.shape[1]]
                counts[name][expert] += 1

    @ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(_Tensor), ctypes.c_bool, ctypes.c_void_p)
    def watch(node, asked, _):
        node = node.contents
        if asked:
            return _op(node) == "MUL_MAT_ID" or _op(node) == "MUL_MAT" and _wanted(node, output)
        try:
            collect(node)
        except Exception as error:      # ctypes would print it and go on
            failed.append(error)
        return True

    with loaded(path, use_extra_bufts=True) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(256, len(chunks[0]))
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cb_eval = ctypes.cast(watch, type(params.cb_eval))
        context = llama_cpp.llama_init_from_model(model, params)
        assert context, log()
        try:
            for ids in chunks:
                _read(context, ids)
        finally:
            llama_cpp.llama_free(context)
    assert not failed, failed[0]
    return sums, counts


def _op(node: _Tensor) -> str:
    return _LIBRARY.ggml_op_name(node.op).decode()


def _wanted(node: _Tensor, output: bool) -> bool:
    """imatrix.cpp: matrices of the layers, 16 tokens or more at once, in float32."""
    name, read = node.src[0].contents.name, node.src[1].contents
    return read.ne[1] >= 16 and read.type == 0 and (name.startswith(b"blk.") or output and name == b"output.weight")


def _read(context, ids) -> None:
    """One chunk anew, logits of every token wanted, so that the last layer sees all of them."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.seq_id[place][0] = int(token), place, 1, 0
        batch.logits[place] = True
    try:
        assert llama_cpp.llama_decode(context, batch) == 0, log()
    finally:
        llama_cpp.llama_batch_free(batch)
