"""llama.cpp as a model that `llmlab.quality` can run: ids in, logits out; and what its matmuls read and gave."""

import ctypes
import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from llama_engine import llama_cpp, loaded


class LlamaModel:
    """A context of llama.cpp's over one file. Called with ids [1, n], it answers `.logits` [1, n, vocabulary] for the second
    half of the positions, which is all that is scored; the first half is zeros. `exact`: its cache in float32, not float16."""

    def __init__(self, model, context: int, exact=False, watch=None):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = os.cpu_count()
        if exact:
            params.type_k, params.type_v = llama_cpp.GGML_TYPE_F32, llama_cpp.GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if watch is not None:
            params.cb_eval = ctypes.cast(watch, type(params.cb_eval))
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self.vocabulary, self._model = llama_cpp.llama_vocab_n_tokens(self._vocab), model
        self._context = llama_cpp.llama_init_from_model(model, params)
        assert self._context

    def __call__(self, ids: torch.Tensor) -> SimpleNamespace:
        ids = ids[0].tolist()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.seq_id[place][0] = token, place, 1, 0
            batch.logits[place] = place >= len(ids) // 2
        assert llama_cpp.llama_decode(self._context, batch) == 0
        llama_cpp.llama_batch_free(batch)
        rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (len(ids) - len(ids) // 2, self.vocabulary))
        logits = torch.zeros(1, len(ids), self.vocabulary)
        logits[0, len(ids) // 2:] = torch.from_numpy(rows)
        return SimpleNamespace(logits=logits)

    def tokens(self, text: str) -> np.ndarray:
        """int64 [n], with the vocabulary's own BOS where it adds one, as llama-perplexity reads a text."""
        raw = text.encode()
        found = (llama_cpp.llama_token * (len(raw) + 1))()
        return np.array(found[:llama_cpp.llama_tokenize(self._vocab, raw, len(raw), found, len(found), True, False)], np.int64)

    def close(self) -> None:
        llama_cpp.llama_free(self._context)


@contextmanager
def llama_model(path, context: int, exact=False):
    """A LlamaModel of a file, freed afterwards."""
    with loaded(path, use_extra_bufts=True) as model:
        made = LlamaModel(model, context, exact)
        try:
            yield made
        finally:
            made.close()


def watched(path, ids: torch.Tensor, names: set[str]) -> dict[str, np.ndarray]:
    """What the graph's tensors of these names held, float32 and flat, as the first node of each name gave it."""
    library = ctypes.CDLL(_ggml_base())
    library.ggml_get_name.restype, library.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    library.ggml_nbytes.restype, library.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    library.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    seen = {}

    @ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
    def watch(tensor, asked, _):
        name = library.ggml_get_name(tensor).decode()
        if asked:
            return name in names
        if name not in seen:
            seen[name] = np.empty(library.ggml_nbytes(tensor) // 4, np.float32)
            library.ggml_backend_tensor_get(tensor, seen[name].ctypes.data, 0, seen[name].nbytes)
        return True

    with loaded(path, use_extra_bufts=True) as model:
        made = LlamaModel(model, ids.shape[1], watch=watch)
        made(ids)
        made.close()
    return seen


def _ggml_base() -> str:
    return str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base*")))
