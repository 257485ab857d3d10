"""llama.cpp through llama-cpp-python's C interface, set as its own tools set it (weights repacked for the processor).

Structures are those of llama-cpp-python 0.3.36.
"""

import ctypes
import os
import re
import struct

import numpy as np

from ..errors import LabError


def prepare(job: dict) -> None:
    """Import what loading needs. Raises LabError where it is not installed."""
    _library()


def _library():
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:      # not there, or its shared library does not load
        raise LabError(f"llama-cpp-python cannot be used here: {' '.join(str(error).split())[:200]}") from None
    return llama_cpp


def warm(job: dict) -> None:
    """Nothing: its library is there once it is imported."""


_LISTENING: list = []


class open:
    """A model and a context of llama.cpp's."""

    def __init__(self, job: dict):
        llama_cpp = _library()
        self._lib, self._lines, self._threads = llama_cpp, (lines := []), job["threads"]
        kv = job.get("kv") or ("f16", "f16")
        self._kv = tuple(_type(llama_cpp, name) for name in kv)
        listens = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text.decode("utf-8", "replace")))
        llama_cpp.llama_log_set(listens, ctypes.c_void_p(0))
        _LISTENING.append(listens)      # llama.cpp goes on telling it
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers, params.use_extra_bufts = 0, job.get("repack", True)
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(job["path"]), params)
        if not self._model:
            raise LabError(f"llama.cpp did not load it: {self._said()}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context = None
        self.room(job["context"])
        version = getattr(llama_cpp, "__version__", "")
        self.about = {"dtype": "its own", "held": None, "why": f"llama-cpp-python {version}, "
                      f"{self._features()}cache in {'/'.join(dict.fromkeys(kv))}, weights repacked where it does so by itself"}

    def _features(self) -> str:
        """What this build of llama.cpp computes with: "AVX2, FMA, " and the like."""
        info = self._lib.llama_print_system_info().decode("utf-8", "replace")
        found = re.findall(r"(AVX\w*|AMX\w*|NEON|SVE|DOTPROD|FMA|F16C|OPENMP) = 1", info)
        return ", ".join([*dict.fromkeys(found), ""])

    def _said(self) -> str:
        lines = [line.strip() for line in "".join(self._lines).splitlines() if line.strip(" .\n")]
        wrong = [line for line in lines if re.search("error|fail|unknown|invalid|not support", line, re.IGNORECASE)]
        return (wrong or lines or ["it gave no reason"])[-1][:200]

    def room(self, tokens: int) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = tokens, tokens, min(512, tokens)
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k, params.type_v = self._kv          # flash attention is on by itself where it can be, as these need it
        self._context, self._read = self._lib.llama_init_from_model(self._model, params), 0
        if not self._context:
            raise LabError(f"llama.cpp made no context of {tokens} tokens: {self._said()}")

    def forget(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._read = 0

    def read(self, tokens: list[int]) -> int:
        numbers = (self._lib.llama_token * len(tokens))(*tokens)
        self._decode(self._lib.llama_batch_get_one(numbers, len(tokens)))
        self._read += len(tokens)
        return int(np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, -1), (self._vocabulary,)).argmax())

    def scores(self, tokens: list[int]) -> np.ndarray:
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for place, token in enumerate(tokens):
                batch.token[place], batch.pos[place], batch.logits[place] = token, self._read + place, True
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            self._decode(batch)
        finally:
            self._lib.llama_batch_free(batch)
        self._read += len(tokens)
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (len(tokens), self._vocabulary)).copy()

    def deepen(self, tokens: int) -> None:
        """As if so many tokens had been read: the cells of those that were read, over and over, through a saved state. What is
        in them takes it no more or less time."""
        lib, context = self._lib, self._context
        held = np.empty(lib.llama_state_seq_get_size(context, 0), np.uint8)
        lib.llama_state_seq_get_data(context, _bytes(held), held.nbytes, 0)
        laid = np.frombuffer(_longer(held.tobytes(), tokens), np.uint8).copy()
        lib.llama_memory_clear(lib.llama_get_memory(context), False)
        if not lib.llama_state_seq_set_data(context, _bytes(laid), laid.nbytes, 0):
            raise LabError(f"llama.cpp took no state of {tokens} tokens: {self._said()}")
        self._read = tokens

    def _decode(self, batch) -> None:
        if code := self._lib.llama_decode(self._context, batch):
            raise LabError(f"llama.cpp could not compute (llama_decode gave {code}): {self._said()}")
        self._lib.llama_synchronize(self._context)


def _type(llama_cpp, name: str) -> int:
    """The number of a cache type. Raises LabError."""
    if (found := getattr(llama_cpp, f"GGML_TYPE_{name.upper()}", {"bf16": 30}.get(name))) is None:
        raise LabError(f"llama.cpp has no cache in {name}")
    return found


def _bytes(array: np.ndarray):
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def _longer(state: bytes, tokens: int) -> bytes:
    """A saved sequence's state with so many cells instead of those it has (llama_kv_cache::state_write): after a magic number,
    the sequence, the number of streams (1) and that of cells each cell's position, number of sequences (1) and sequence; then
    whether values are transposed (0), the number of layers, and for each its keys' type, row size and rows; the same of values.
    Raises LabError for a state of another kind."""
    magic, sequence, streams, cells = struct.unpack_from("=Iiii", state)
    at = 16 + 12 * cells
    transposed, layers = struct.unpack_from("=II", state, at)
    if streams != 1 or transposed or struct.unpack_from("=iI", state, 16) != (0, 1):
        raise LabError("llama.cpp keeps this model's state in another way than one row a token, so it has to read all of them")
    made = [struct.pack("=Iiii", magic, sequence, 1, tokens), *(struct.pack("=iIi", n, 1, sequence) for n in range(tokens)),
            struct.pack("=II", transposed, layers)]
    at += 8
    for _ in range(2 * layers):
        size, = struct.unpack_from("=Q", state, at + 4)
        rows = state[at + 12:at + 12 + cells * size]
        made += [state[at:at + 12], rows * (tokens // cells), rows[:tokens % cells * size]]
        at += 12 + cells * size
    return b"".join(made)
