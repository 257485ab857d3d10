"""llama.cpp over RPC servers, step by step: `python rpc_client.py MODEL CONTEXT SHARES [HOST:PORT ...]`.

Reads a word a line: connect, load, context, prompt N, decode N; does it, and answers with a line of JSON. A program of its own,
for servers that are added stay devices of the process. Without servers everything is computed here.
"""

import ctypes
import json
import os
import sys
import time

import llama_cpp
import numpy as np


def add_servers(endpoints: list[str]) -> None:
    """As llama.cpp's --rpc does: a device for each, in that order. The libraries are those that llama_cpp has loaded: by their
    sonames, for a wheel holds copies under other names."""
    ggml, rpc = ctypes.CDLL("libggml.so.0"), ctypes.CDLL("libggml-rpc.so.0")
    add, register = rpc.ggml_backend_rpc_add_server, ggml.ggml_backend_register
    add.restype, add.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    register.restype, register.argtypes = None, [ctypes.c_void_p]
    for endpoint in endpoints:
        register(add(endpoint.encode()))


class Run:
    """One model over these servers, evenly by layers unless `shares` says otherwise; greedy."""

    def __init__(self, model: str, context: str, shares: str, *servers: str):
        self.path, self.size, self.servers = model, int(context), servers
        self.shares = [float(share) for share in shares.split(",")]
        self.last, self.text = 1, []

    def connect(self) -> dict:
        add_servers(list(self.servers))
        return {}

    def load(self) -> dict:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 999 if self.servers else 0
        self.kept = (ctypes.c_float * 128)(*self.shares)
        params.tensor_split = self.kept if self.servers else None
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), params)
        assert self.model, "the model does not load"
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        return {}

    def context(self) -> dict:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = self.size, 512, 512, 1
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = 1
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        assert self.ctx, "there is no context"
        return {}

    def prompt(self, count: int) -> dict:
        """`count` tokens, the last of which gives logits."""
        return self._run([1 + i * 37 % 1000 for i in range(count)])

    def decode(self, count: int) -> dict:
        seconds = [self._run([self.last])["seconds"] for _ in range(count)]
        return {"text": self.text, "seconds": seconds}

    def _run(self, tokens: list[int]) -> dict:
        start = time.perf_counter()
        given = (llama_cpp.llama_token * len(tokens))(*tokens)         # the batch only points to it
        assert llama_cpp.llama_decode(self.ctx, llama_cpp.llama_batch_get_one(given, len(tokens))) == 0
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.ctx, -1), (self.vocab,))
        self.last = int(logits.argmax())
        self.text.append(self.last)
        return {"seconds": time.perf_counter() - start}


def main(*words: str) -> None:
    llama_cpp.llama_backend_init()
    run = Run(*words)
    print("ready", flush=True)
    for line in sys.stdin:
        what, *counts = line.split()
        print(json.dumps(getattr(run, what)(*map(int, counts))), flush=True)
    os._exit(0)               # the servers see the connection close


if __name__ == "__main__":
    main(*sys.argv[1:])
