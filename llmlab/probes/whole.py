"""transformers: one prefill and one decode step, its tensors counted as they come and go, and the process's memory.

On the CPU a dispatch mode counts tensors (probes/tracker.py); on a card torch's own allocator does.
"""

import ctypes
import gc
import logging
import time
from pathlib import Path

from ..errors import LabError
from . import free_on_cards, peak_resident, reset_peak, resident, serve


def run(job: dict) -> dict:
    """Load `job["path"]` (a folder, a GGUF, or None: random weights of `job["config"]`), take in `job["tokens"]` tokens
    a sequence and write one.

    Returns bytes: weights, buffers, cache, state (of recurrent layers), prefill and decode (peaks over the buffers and
    weights, cache included, with the operation each was at), load (growth of resident memory while loading), resident
    (growth from there while it runs); speeds; on a card also allocated, reserved and used. Raises LabError.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise LabError(f"measuring transformers needs {error.name}: pip install {error.name}") from None
    import_all(transformers)
    torch.set_num_threads(job["threads"])
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)         # INT8 warns at every product
    card = job["cards"][0] if job["cards"] else None
    before = free_on_cards() if card is not None else []
    device = torch.device("cpu" if card is None else f"cuda:{card}")
    if card is not None and not torch.cuda.is_available():
        raise LabError("torch sees no card here (it is built for the CPU, or the driver is missing); measure a report with "
                       "gpu=None")
    reset_peak()
    base, start = resident(), time.perf_counter()
    model = _model(torch, transformers, job, device)
    found = {"load_s": time.perf_counter() - start, "load": max((peak_resident() or base) - base, 0)}
    kept = _weights(model), list(model.buffers())
    from .tracker import storage_bytes
    found["weights"], found["buffers"] = storage_bytes(kept[0]), storage_bytes(kept[1])
    settled = _settle(torch, transformers, model, job, device)
    found |= (_on_card if card is not None else _on_cpu)(torch, transformers, model, kept, job, device)
    found["resident"] = max((peak_resident() or settled) - settled, 0)
    if card is not None:
        found["reserved"] = torch.cuda.max_memory_reserved(device)
        after = free_on_cards()
        found["used"] = [b - a if a is not None and b is not None else None for b, a in zip(before, after, strict=True)]
    return found


def _settle(torch, transformers, model, job: dict, device) -> int:
    """Resident bytes once the kernels' code has been touched and what loading left over was given back."""
    with torch.no_grad():
        for _ in _steps(torch, transformers, model, job | {"tokens": min(job["tokens"], 2), "batch": 1}, device, lambda: None):
            pass
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):       # glibc alone keeps what was freed
        pass
    reset_peak()
    return resident()


def import_all(transformers) -> None:
    """Import now what from_pretrained imports lazily, so that loading is not charged for code."""
    transformers.AutoModelForCausalLM, transformers.AutoConfig, transformers.DynamicCache      # noqa: B018


def _model(torch, transformers, job: dict, device):
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype, settings = getattr(torch, job["dtype"]), {"attn_implementation": job["attention"]}
    if job["path"] is None:
        config = dict(job["config"])
        config = AutoConfig.for_model(config.pop("model_type"), **config)
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, **settings).eval()
    path = Path(job["path"])
    settings |= {"dtype": dtype, "device_map": {"": str(device)}, "local_files_only": True}
    if path.is_file():
        settings["gguf_file"] = path.name
        path = path.parent
    if job["quant"]:
        settings["quantization_config"] = _quantization(torch, transformers, job["quant"], dtype)
    return AutoModelForCausalLM.from_pretrained(str(path), **settings).eval()


def _quantization(torch, transformers, quant: str, dtype):
    if quant == "INT8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant[:3].lower(),
                                           bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=quant.endswith("_DQ"))


def _weights(model) -> list:
    """Parameters, and the scales that bitsandbytes keeps beside them."""
    found = list(model.parameters())
    for parameter in list(found):
        state = getattr(parameter, "quant_state", None)
        for one in (state, getattr(state, "state2", None)):
            found += [t for t in (getattr(one, "absmax", None), getattr(one, "offset", None)) if t is not None]
        if (scale := getattr(parameter, "SCB", None)) is not None:
            found.append(scale)
    return found


def cache_tensors(cache) -> tuple[list, list]:
    """Keys and values, and the states of recurrent layers, that a cache holds."""
    kv, states = [], []
    for layer in cache.layers:
        attends = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        kv += [t for t in attends if t is not None]
        for name in ("conv_states", "recurrent_states"):
            held = getattr(layer, name, None)
            held = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else [held]
            states += [t for t in held if t is not None]
    return kv, states


def _cache_bytes(cache) -> dict:
    from .tracker import storage_bytes
    kv, states = cache_tensors(cache)
    return {"cache": storage_bytes(kv), "state": storage_bytes(states)}


def _steps(torch, transformers, model, job: dict, device, between):
    """Yield after the prefill and after one decode step, the cache each time: (name, cache)."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (job["batch"], job["tokens"]), generator=generator).to(device)
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    for name, given in (("prefill", ids), ("decode", ids[:, :1].clone())):
        between()
        logits = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield name, cache, given
        del logits


def _on_cpu(torch, transformers, model, kept, job: dict, device) -> dict:
    from .tracker import Tracker

    found: dict = {}
    known = [*kept[0], *kept[1]]
    with torch.no_grad(), Tracker(known, device="cpu") as tracker:
        base = tracker.live
        start = time.perf_counter()
        for name, cache, given in _steps(torch, transformers, model, job, device, tracker.reset):
            took = time.perf_counter() - start
            found[name] = tracker.peak - base
            found[f"{name}_at"] = tracker.at
            found[f"{name}_tps"] = given.numel() / took
            found |= _cache_bytes(cache)
            start = time.perf_counter()
    with torch.no_grad():         # without the mode, which slows a token down
        found["decode_tps"] = _decoded(model, cache, given, job)
    return found


def _decoded(model, cache, given, job: dict) -> float:
    start = time.perf_counter()
    for _ in range(job["written"]):
        model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return given.shape[0] * job["written"] / (time.perf_counter() - start)


def _on_card(torch, transformers, model, kept, job: dict, device) -> dict:
    from .tracker import storage_bytes

    found: dict = {}
    with torch.no_grad():
        for _ in range(2):                  # cuBLAS takes its workspace the first time
            torch.cuda.synchronize(device)
            base = storage_bytes([*kept[0], *kept[1]])
            start = time.perf_counter()
            for name, cache, given in _steps(torch, transformers, model, job, device,
                                             lambda: torch.cuda.reset_peak_memory_stats(device)):
                found[f"{name}_tps"] = given.numel() / (time.perf_counter() - start)
                found[name] = torch.cuda.max_memory_allocated(device) - base
                found[f"{name}_at"] = "torch.cuda.max_memory_allocated"
                found |= _cache_bytes(cache)
                start = time.perf_counter()
        found["decode_tps"] = _decoded(model, cache, given, job)
        found["allocated"] = torch.cuda.memory_allocated(device)
    return found


if __name__ == "__main__":
    serve(run)
