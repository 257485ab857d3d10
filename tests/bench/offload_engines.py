"""Engines that run a model larger than the memory they may use, each in a process of its own: the child of bench_offload.

`python offload_engines.py ENGINE` reads a command a line, as llmlab/benching/child.py does. What a token moved is what the
system read from the disk for this process, pages of mapped files among it; clocks are read here, beside the work.
"""

import json
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from llmlab.benching.child import obey


class Ours:
    """llmlab, its pieces where `placement` says (as offload.placement.Placement has it), or where it puts them itself for a
    `budget`, with `reading` in place of how it would read."""

    def __init__(self, job: dict):
        import torch

        from llmlab.gguf import read_gguf
        from llmlab.offload.budget import Budget
        from llmlab.offload.choosing import chosen
        from llmlab.offload.opening import open_decoder
        from llmlab.offload.placement import Placement

        torch.set_num_threads(job["threads"])
        file, budget = read_gguf(job["path"]), Budget(job.get("budget"))
        placed = (Placement(**job["placement"]) if "placement" in job else
                  chosen(file, budget, job["context"], layout=job["layout"], progress=say))
        self._model = model = open_decoder(file, replace(placed, **job.get("reading", {})), budget, progress=say)
        tiers = Counter(model.placement.tier(name) for name in model.parts.store.pieces)
        self.about = {"why": model.why, "placed": dict(tiers), "slots": model.placement.slots, "held": model.resident_bytes,
                      "readers": model.placement.readers, "direct": model.placement.direct,
                      "read_from": [file.name for file in model.parts.store.files]}

    def read(self, tokens: list[int]) -> np.ndarray:
        return self._model.read(tokens).numpy()

    def begin(self) -> None:
        self._model.trace.clear()

    def traced(self) -> dict:
        trace = self._model.trace
        return {"busy": {kind: trace.busy(kind) for kind in ("read", "copy", "wait", "compute")},
                "hidden": trace.overlap("read", "compute"), "rate": trace.rate("read"), "copy_rate": trace.rate("copy"),
                "totals": {kind: list(total) for kind, total in trace.totals().items()}}

    def close(self) -> None:
        self._model.close()


class Llama:
    """llama.cpp on the mapped file, nothing repacked: a copy would not fit."""

    def __init__(self, job: dict):
        from llmlab.benching import llama
        self._engine = llama.open(job | {"repack": False})
        self.about = {"why": self._engine.about["why"].partition(", cache")[0] + ", mapped file, nothing repacked"}

    def read(self, tokens: list[int]) -> np.ndarray:
        self._engine.read(tokens)
        lib, context = self._engine._lib, self._engine._context
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (self._engine._vocabulary,)).copy()

    def begin(self) -> None:
        pass

    def traced(self) -> None:
        return None

    def close(self) -> None:
        pass


class Accelerate:
    """transformers' Llama in bfloat16 from safetensors, the layers that do not fit on accelerate's "disk"."""

    def __init__(self, job: dict):
        import torch
        import transformers
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(job["threads"])
        layers = json.loads((Path(job["path"]) / "config.json").read_text())["num_hidden_layers"]
        where = {f"model.layers.{n}": "cpu" if n < job["resident"] else "disk" for n in range(layers)}
        where |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        self._torch = torch
        self._model = transformers.LlamaForCausalLM.from_pretrained(
            job["path"], dtype=torch.bfloat16, device_map=where, offload_folder=job["folder"], local_files_only=True).eval()
        self._cache = transformers.DynamicCache(config=self._model.config)
        import accelerate
        self.about = {"why": f"accelerate {accelerate.__version__}, bfloat16, {job['resident']} of {layers} layers in memory"}

    def read(self, tokens: list[int]) -> np.ndarray:
        with self._torch.inference_mode():
            out = self._model(self._torch.tensor([tokens]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            return out.logits[0, -1].float().numpy()

    def begin(self) -> None:
        pass

    def traced(self) -> None:
        return None

    def close(self) -> None:
        pass


ENGINES = {"ours": Ours, "llama": Llama, "accelerate": Accelerate}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def io() -> int:
    """Bytes that came from a disk for this process so far; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def held() -> dict:
    """Bytes resident now, and at the most."""
    from llmlab.probes import peak_resident, resident
    return {"resident": resident(), "peak": peak_resident()}


class Commands:
    def __init__(self, name: str):
        self._name, self.engine = name, None

    def open(self, job: dict) -> dict:
        start = time.perf_counter()
        self.engine = ENGINES[self._name](job)
        return {"seconds": time.perf_counter() - start, "about": self.engine.about, **held()}

    def write(self, tokens: list[int]) -> dict:
        """Tokens one at a time: seconds of each, and of all of them processor seconds and bytes that came from the disk."""
        self.engine.begin()
        cpu, moved, times = sum(os.times()[:2]), io(), []
        for token in tokens:
            start = time.perf_counter()
            self.engine.read([token])
            times.append(time.perf_counter() - start)
        return {"each": times, "cpu": sum(os.times()[:2]) - cpu, "moved": io() - moved, "trace": self.engine.traced(), **held()}

    def likeliest(self, tokens: list[int]) -> dict:
        """The likeliest next tokens after some that are read, best first, with their logits."""
        for token in tokens:
            logits = self.engine.read([token])
        best = logits.argsort()[::-1][:5]
        return {"tokens": best.tolist(), "logits": logits[best].tolist()}

    def close(self) -> dict:
        self.engine.close()
        return {}


if __name__ == "__main__":
    obey(Commands(sys.argv[1]))
