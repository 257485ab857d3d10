"""llama.cpp, through llama-cpp-python's C interface: the buffers it prints, its time and its peak.

Log lines and structures are those of llama-cpp-python 0.3.36.
"""

import contextlib
import ctypes
import os
import re
import time
from pathlib import Path

from ..errors import LabError
from . import free_on_cards, peak_resident, reset_peak, resident, serve

# ggml.h's numbers of the cache types
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
_BUFFER = re.compile(r":\s*(\S+)\s+(model|KV|RS|compute|output) buffer size =\s*([\d.]+) MiB")
NO_MAP = 0                          # LLAMA_LOAD_MODE_NONE
SLOW = 0.5                          # seconds of a first token beyond which a shorter prompt is timed
_GPU_KINDS = (1, 2)                 # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU
_EXPERTS = r"blk\.%d\.ffn_(up|down|gate|gate_up)_(ch|)exps"      # what --n-cpu-moe keeps on the host (common.h)


class _Override(ctypes.Structure):
    _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]


def run(job: dict) -> dict:
    """Load `job["path"]`, make a context, take in a prompt and write a few tokens.

    Returns buffers ([name, kind, bytes] as printed), tensors (bytes of the model's tensors), mapped (whether the file was
    mapped: beside a card it is read, so that a buffer on the host holds its tensors and nothing between), load_s, prompt,
    written, prefill_tps, decode_tps, resident (growth of the peak), used (bytes each card lost).
    Raises LabError with llama.cpp's words where it refuses.
    """
    try:
        import llama_cpp as lib
    except ImportError:
        raise LabError("measuring llama.cpp needs llama-cpp-python, which is not installed: pip install llama-cpp-python "
                       "(built from source: some minutes), or measure a report with engine='transformers'") from None
    lines: list[str] = []
    keep = lib.llama_log_callback(lambda level, text, data: lines.append(text.decode("utf-8", "replace")))
    lib.llama_log_set(keep, ctypes.c_void_p(0))
    lib.llama_backend_init()
    before = free_on_cards() if job["cards"] else []
    base = _settle()
    params, alive = _model_params(lib, job)
    start = time.perf_counter()
    with _model(lib, job, params, lines) as model:
        found = {"load_s": time.perf_counter() - start, "tensors": lib.llama_model_size(model), "mapped": not job["gpu_layers"]}
        with _context(lib, job, model, lines) as context:
            found |= _timed(lib, job, model, context)
            found["resident"] = max((peak_resident() or base) - base, 0)
            after = free_on_cards() if job["cards"] else []
            found["used"] = [b - a if a is not None and b is not None else None for b, a in zip(before, after, strict=True)]
    text = "".join(lines)
    found["buffers"] = _buffers(text)
    del alive
    return found


def _settle() -> int:
    reset_peak()
    return resident()


def _buffers(text: str) -> list[list]:
    """[name, kind, bytes] of each buffer, the last of a kind where it was sized again (a context is reserved once or twice)."""
    found: dict[tuple, int] = {}
    many: list[list] = []
    for name, kind, mib in _BUFFER.findall(text):
        size = round(float(mib) * 2**20)
        if kind == "compute":
            found[name, kind] = size
        else:
            many.append([name, kind, size])          # a model of several files, a cache of two kinds of layers: each its own
    return many + [[*key, size] for key, size in found.items()]


def _model_params(lib, job: dict):
    """llama_model_params, and what must outlive it."""
    params = lib.llama_model_default_params()
    params.n_gpu_layers = job["gpu_layers"]
    if job["gpu_layers"]:
        params.load_mode = NO_MAP
    alive: list = []
    if job["gpu_layers"] and not lib.llama_supports_gpu_offload():
        raise LabError("this llama-cpp-python was built without a GPU backend; reinstall it with one (for NVIDIA: "
                       "CMAKE_ARGS=-DGGML_CUDA=on pip install --force-reinstall --no-cache-dir llama-cpp-python), "
                       "or measure a report with gpu=None")
    ggml = _ggml(lib)
    devices = (ctypes.c_void_p * (len(job["cards"]) + 1))(*_devices(ggml, job["cards"]), None)
    params.devices = ctypes.cast(devices, ctypes.c_void_p)
    alive.append(devices)
    if job["split"]:
        shares = (ctypes.c_float * max(lib.llama_max_devices(), len(job["split"])))(*job["split"])
        params.tensor_split = shares
        alive.append(shares)
    if job["n_cpu_moe"] and job["gpu_layers"]:
        ggml.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
        host = ggml.ggml_backend_cpu_buffer_type()
        overrides = (_Override * (job["n_cpu_moe"] + 1))(
            *(_Override((_EXPERTS % i).encode(), host) for i in range(job["n_cpu_moe"])), _Override(None, None))
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
        alive.append(overrides)
    return params, alive


def _ggml(lib):
    """libggml with its backends' functions."""
    folder = Path(lib.__file__).parent / "lib"
    names = [p for p in folder.iterdir() if re.fullmatch(r"(lib)?ggml(-base|-cpu)?\.(so|dylib|dll)", p.name)]
    opened = [ctypes.CDLL(str(p)) for p in sorted(names)]

    class Functions:
        def __getattr__(self, name):
            for one in opened:
                if hasattr(one, name):
                    return getattr(one, name)
            raise LabError(f"this llama-cpp-python has no {name}; install version 0.3.36")
    return Functions()


def _devices(ggml, wanted: list[int]) -> list[int]:
    """The handles of those cards, counted as the drivers count them."""
    if not wanted:
        return []
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    get, kind = ggml.ggml_backend_dev_get, ggml.ggml_backend_dev_type
    get.argtypes, kind.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    cards = [d for d in map(get, range(ggml.ggml_backend_dev_count())) if kind(d) in _GPU_KINDS]
    if max(wanted) >= len(cards):
        raise LabError(f"llama.cpp sees {len(cards)} cards and the report is for card {max(wanted)}; reinstall "
                       "llama-cpp-python for this card's backend, or measure a report with gpu=None")
    return [cards[i] for i in wanted]


@contextlib.contextmanager
def _model(lib, job: dict, params, lines: list[str]):
    model = lib.llama_model_load_from_file(os.fsencode(job["path"]), params)
    if not model:
        raise LabError(f"llama.cpp did not load {job['path']}: {_words(lines)}")
    try:
        yield model
    finally:
        lib.llama_model_free(model)


@contextlib.contextmanager
def _context(lib, job: dict, model, lines: list[str]):
    params = lib.llama_context_default_params()
    values = {"n_ctx": job["context"], "n_batch": job["batch"], "n_ubatch": job["ubatch"], "n_seq_max": job["sequences"],
              "type_k": TYPES[job["kv"][0]], "type_v": TYPES[job["kv"][1]], "flash_attn_type": int(job["flash_attention"]),
              "swa_full": job["swa_full"], "kv_unified": job["unified"], "n_threads": job["threads"],
              "n_threads_batch": job["threads"]}
    for name, value in values.items():
        setattr(params, name, value)
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise LabError(f"llama.cpp made no context with these settings: {_words(lines)}")
    try:
        yield context
    finally:
        lib.llama_free(context)


def _words(lines: list[str]) -> str:
    said = [line.strip() for line in "".join(lines).splitlines() if line.strip(" .\n")]
    wrong = [line for line in said if re.search(r"error|fail|requires|unable|not support|not divisible", line, re.IGNORECASE)]
    return (wrong or said or ["it gave no reason"])[-1][:200]


def _timed(lib, job: dict, model, context) -> dict:
    """Tokens per second of a prompt and of the tokens after it; once over first, so that the weights are in RAM."""
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    each = max(job["context"] // (1 if job["unified"] else job["sequences"]), 1)
    memory = lib.llama_get_memory(context)

    def feed(some: list[int]) -> None:
        for at in range(0, len(some), job["batch"]):
            part = some[at:at + job["batch"]]
            numbers = (lib.llama_token * len(part))(*part)          # the batch only points to them
            if code := lib.llama_decode(context, lib.llama_batch_get_one(numbers, len(part))):
                raise LabError(f"llama.cpp could not compute (llama_decode gave {code})")
        lib.llama_synchronize(context)

    def seconds(parts: list[list[int]]) -> float:
        start = time.perf_counter()
        for part in parts:
            feed(part)
        return time.perf_counter() - start

    first = seconds([[0]])                # the weights come from the disk
    prompt = max(1, min(job["prompt"] if first < SLOW else job["prompt"] // 4, each - job["written"]))
    written = max(0, min(job["written"], each - prompt))
    tokens = [7 + i * 7919 % (vocab - 8) for i in range(prompt)] if vocab > 16 else [0] * prompt
    lib.llama_memory_clear(memory, True)
    took = seconds([tokens])
    decode = seconds([[tokens[i % prompt]] for i in range(written)])
    return {"prompt": prompt, "written": written, "prefill_tps": prompt / took,
            "decode_tps": written / decode if written else None}


def on_host(name: str) -> bool:
    """Whether a buffer of that name is RAM: CPU, CPU_Mapped, CPU_REPACK, CUDA_Host..."""
    return name.startswith(("CPU", "BLAS", "AMX")) or name.endswith("_Host")


if __name__ == "__main__":
    serve(run)
