"""Makes tests/golden/llama_cpp_compute.json: compute buffers that llama.cpp plans on cards, without a card.

`--recurrent` makes llama_cpp_compute_recurrent.json instead: models with recurrent layers or shared caches, in more settings.

Run as `python tests/make_compute_golden.py BUILD [--recurrent] [MODEL...]` with the bin folder of a llama.cpp built with its
RPC backend (the source of llama-cpp-python 0.3.36), patched so that an RPC device plans as a CUDA card does:
  ggml-rpc.cpp      alignment 128; ggml_backend_rpc_device_offload_op as CUDA's (32 rows or more); a quantized tensor whose
                    rows are no multiple of 512 takes the rest of one such row more
  ggml-backend.cpp  ggml_backend_sched_reserve_size does not reset the scheduler, which would forget the nodes that
                    llama.cpp put on a device by hand (ggml_backend_sched_reserve keeps them)
Files are hollow and contexts planned only (no_alloc), so that models of any size take seconds. What the RPC backend cannot
show is the float16 copy of a quantized cache that CUDA's attention keeps behind its result: rows are measured without it.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PORT = 50661
CARDS = 3
GOLDEN = Path(__file__).resolve().parent / "golden" / "llama_cpp_compute.json"
SETTINGS = [
    {"gpu_layers": 99, "context": 4096}, {"gpu_layers": 99, "context": 16384, "flash": False},
    {"gpu_layers": 99, "context": 4096, "ubatch": 64, "flash": False}, {"gpu_layers": 0, "context": 4096},
    {"gpu_layers": 0, "context": 4096, "flash": False}, {"gpu_layers": 10, "context": 8192},
    {"gpu_layers": 10, "context": 8192, "flash": False, "ubatch": 1024}, {"gpu_layers": 10, "context": 4096, "ubatch": 16},
    {"gpu_layers": 99, "context": 8192, "split": [1, 1]},
    {"gpu_layers": 99, "context": 8192, "flash": False, "split": [2, 1, 1]},
    {"gpu_layers": 12, "context": 8192, "split": [3, 1]}, {"gpu_layers": 99, "context": 8192, "sequences": 4},
    {"gpu_layers": 99, "context": 8192, "kv": ["q8_0", "q8_0"]}]
EXPERTS = [
    {"gpu_layers": 99, "context": 8192, "n_cpu_moe": 99}, {"gpu_layers": 99, "context": 8192, "n_cpu_moe": 10, "ubatch": 2048},
    {"gpu_layers": 20, "context": 8192, "n_cpu_moe": 99, "flash": False},
    {"gpu_layers": 99, "context": 8192, "n_cpu_moe": 10, "split": [1, 1]},
    {"gpu_layers": 99, "context": 8192, "n_cpu_moe": 99, "ubatch": 16}]
MODELS = ["llama-3-8b", "smollm2-135m", "mistral-nemo-12b", "ministral-3-8b", "mixtral-8x7b", "qwen2.5-3b", "qwen3-4b",
          "qwen3-30b-a3b", "gemma-2-9b", "gemma-3-4b", "phi-3.5-mini", "phi-4", "gpt-oss-20b", "deepseek-v2-lite",
          "deepseek-v3", "glm-4.5-air", "minimax-m2", "granite-3.3-8b", "smollm3-3b", "olmo-2-7b",
          "olmo-3-7b", "falcon-7b", "command-r-35b", "llama-4-scout",
          "qwen3.5-4b", "qwen3.5-35b-a3b", "qwen3-next-80b-a3b", "gemma-4-e4b", "gemma-4-26b-a4b", "granite-4.0-h-tiny",
          "nemotron-nano-9b-v2", "nemotron-3-nano-30b-a3b", "lfm2-1.2b", "lfm2-8b-a1b"]
QUANT = "Q4_K_M"
RECURRENT = GOLDEN.with_name("llama_cpp_compute_recurrent.json")
RECURRENT_MODELS = ["qwen3-next-80b-a3b", "qwen3.5-0.8b", "qwen3.5-27b", "qwen3.5-122b-a10b", "granite-4.0-h-micro",
                    "granite-4.0-h-small", "nemotron-3-nano-4b", "nemotron-3-nano-30b-a3b", "lfm2-1.2b", "lfm2-8b-a1b",
                    "gemma-4-e2b", "gemma-4-26b-a4b", "gemma-4-31b", "tiny-mamba", "tiny-mamba2", "tiny-falcon-h1",
                    "tiny-gemma3n", "tiny-gemma4", "tiny-nemotron_h", "tiny-qwen35"]
HALF = -1                # so many layers as half the model has
RECURRENT_SETTINGS = [
    {"gpu_layers": 99, "context": 512, "ubatch": 64}, {"gpu_layers": HALF, "context": 512},
    {"gpu_layers": 99, "context": 8192, "ubatch": 2048, "flash": False},
    {"gpu_layers": HALF, "context": 8192, "ubatch": 2048, "flash": False}, {"gpu_layers": 99, "context": 65536},
    {"gpu_layers": 0, "context": 65536, "flash": False}, {"gpu_layers": HALF, "context": 65536, "kv": ["q8_0", "q8_0"]},
    {"gpu_layers": 99, "context": 8192, "sequences": 4, "flash": False}, {"gpu_layers": HALF, "context": 8192, "sequences": 2},
    {"gpu_layers": 99, "context": 65536, "sequences": 4, "kv": ["q8_0", "q8_0"], "ubatch": 2048},
    {"gpu_layers": 99, "context": 1000, "sequences": 3, "ubatch": 100},
    {"gpu_layers": HALF, "context": 8192, "split": [2, 1]},
    {"gpu_layers": 99, "context": 8192, "split": [1, 2, 1], "sequences": 2}]


class _Override(ctypes.Structure):
    _fields_ = [("pattern", ctypes.c_char_p), ("type", ctypes.c_void_p)]


def serve(folder: str, port: int) -> None:
    """One RPC server: one pretended card. Never returns."""
    libraries = [ctypes.CDLL(f"{folder}/lib{name}.so", mode=ctypes.RTLD_GLOBAL)
                 for name in ("ggml-base", "ggml-cpu", "ggml", "ggml-rpc")]
    libraries[2].ggml_backend_dev_by_type.restype = ctypes.c_void_p
    processor = (ctypes.c_void_p * 1)(libraries[2].ggml_backend_dev_by_type(0))
    start = libraries[3].ggml_backend_rpc_start_server
    start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    start(f"127.0.0.1:{port}".encode(), None, 1, 1, processor)


class Planner:
    """llama.cpp with pretended cards."""

    def __init__(self, folder: str, port: int):
        os.environ["LLAMA_CPP_LIB_PATH"] = folder
        sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
        import llama_engine
        self.engine = llama_engine
        rpc, ggml, base = (ctypes.CDLL(f"{folder}/lib{name}.so") for name in ("ggml-rpc", "ggml", "ggml-base"))
        for function in (rpc.ggml_backend_rpc_add_server, base.ggml_backend_reg_dev_get, ggml.ggml_backend_cpu_buffer_type):
            function.restype = ctypes.c_void_p
        rpc.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
        base.ggml_backend_reg_dev_get.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
        self.host_type = ggml.ggml_backend_cpu_buffer_type()
        self.cards = []
        for i in range(CARDS):
            registry = rpc.ggml_backend_rpc_add_server(f"127.0.0.1:{port + i}".encode())
            ggml.ggml_backend_register(registry)
            self.cards.append(base.ggml_backend_reg_dev_get(registry, 0))

    def plan(self, path: Path, s: dict) -> tuple[list[float], float]:
        """MiB of each card's compute buffer and of the host's, as printed."""
        split = s.get("split", [1])
        devices = (ctypes.c_void_p * (len(split) + 1))(*self.cards[:len(split)], None)
        shares = (ctypes.c_float * 128)(*split)
        moved = s.get("n_cpu_moe", 0)
        overrides = (_Override * (moved + 1))(*(
            _Override(rf"blk\.{i}\.ffn_(up|down|gate|gate_up)_(ch|)exps".encode(), self.host_type) for i in range(moved)))
        settings = {"no_alloc": True, "load_mode": 0, "n_gpu_layers": s["gpu_layers"],
                    "devices": ctypes.cast(devices, ctypes.c_void_p),
                    "tensor_split": ctypes.cast(shares, ctypes.POINTER(ctypes.c_float))}
        if moved:
            settings["tensor_buft_overrides"] = ctypes.cast(overrides, ctypes.c_void_p)
        kv = [self.engine.TYPES[type] for type in s.get("kv", ("f16", "f16"))]
        with self.engine.loaded(path, **settings) as model:
            told = self.engine.context_log(model, n_ctx=s["context"], n_batch=2048, n_ubatch=s.get("ubatch", 512),
                                           flash_attn_type=int(s.get("flash", True)), type_k=kv[0], type_v=kv[1],
                                           n_seq_max=s.get("sequences", 1), kv_unified=False, swa_full=False)
        named = sorted(name for name in told.compute if name != "CPU")
        cards = [told.compute[name] for name in named]
        return cards + [0.0] * (len(split) - len(cards)), told.compute["CPU"]


def spec_of(name: str):
    """A model of the catalogue, or a tiny one of tests/peers."""
    from tiny_models import tiny_spec

    from llmlab.shapes import model_spec
    return tiny_spec(name.removeprefix("tiny-")) if name.startswith("tiny-") else model_spec(name)


def main(folder: str, models: list[str], target: Path, chosen: list[dict], port: int) -> None:
    from llmlab.memory import weights
    servers = [subprocess.Popen([sys.executable, __file__, folder, "--serve", str(port + i)], stdout=subprocess.DEVNULL)
               for i in range(CARDS)]
    time.sleep(3)
    try:
        planner = Planner(folder, port)
        from tiny_gguf import write_hollow
        rows = []
        for name in models:
            spec = spec_of(name)
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "hollow.gguf"
                write_hollow(spec, path, weights(spec, QUANT).types)
                for settings in chosen + EXPERTS * bool(spec.experts):
                    if settings["gpu_layers"] == HALF:
                        settings = {**settings, "gpu_layers": len(spec.blocks) // 2}
                    cards, host = planner.plan(path, settings)
                    rows.append({"model": name, **settings, "cards": cards, "host": host})
            print(name, flush=True)
    finally:
        for server in servers:
            server.kill()
    about = ("MiB of compute buffers that llama.cpp (llama-cpp-python 0.3.36, planning build: see "
             f"tests/make_compute_golden.py) printed for {QUANT} files of these models")
    lines = ",\n".join(json.dumps(row) for row in rows)
    configs = {name: dict(spec_of(name).config) for name in models if name.startswith("tiny-")}
    configs = f'"configs": {json.dumps(configs)}, ' if configs else ""
    target.write_text(f'{{"about": {json.dumps(about)}, "quant": "{QUANT}", {configs}"rows": [\n{lines}\n]}}\n',
                      encoding="utf-8")


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve(sys.argv[1], int(sys.argv[3]))
    elif "--recurrent" in sys.argv:
        main(sys.argv[1], sys.argv[3:] or RECURRENT_MODELS, RECURRENT, RECURRENT_SETTINGS, PORT + CARDS)
    else:
        main(sys.argv[1], sys.argv[2:] or MODELS, GOLDEN, SETTINGS, PORT)
