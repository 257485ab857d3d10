"""llama.cpp's RPC server on the processor, as the program ggml-rpc-server starts it: `python rpc_server.py HOST:PORT [CACHE]`.

Waits for a line on its standard input first, so that whoever started it can give its network namespace an address.
"""

import ctypes
import os
import sys

import llama_cpp

CPU = 0                       # GGML_BACKEND_DEVICE_TYPE_CPU


def main(endpoint: str, cache: str | None = None) -> None:
    llama_cpp.llama_backend_init()
    ggml, rpc = ctypes.CDLL("libggml.so.0"), ctypes.CDLL("libggml-rpc.so.0")      # those that llama_cpp has loaded
    by_type = ggml.ggml_backend_dev_by_type
    by_type.restype, by_type.argtypes = ctypes.c_void_p, [ctypes.c_int]
    start = rpc.ggml_backend_rpc_start_server
    start.restype = None
    start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)]
    print("ready", flush=True)
    sys.stdin.readline()
    start(endpoint.encode(), cache.encode() if cache else None, 1, 1, (ctypes.c_void_p * 1)(by_type(CPU)))
    os._exit(1)               # it returns only where it could not listen


if __name__ == "__main__":
    main(*sys.argv[1:])
