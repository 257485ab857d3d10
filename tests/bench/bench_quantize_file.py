"""A whole file quantized, beside llama.cpp's llama_model_quantize: the same file, the same threads, taking turns.

    python tests/bench/bench_quantize_file.py [--json FILE] [--layers 4] [--rounds 3] [--threads N] [QUANT ...]

The source is SmolLM2's first layers, its file's numbers in float16. Ratios are of minima: ours over theirs, by the clock and by
the processor time of all threads, which is what can be compared where other work takes the cores. Whether the two files are the
same to the byte is said too. Nothing here fails for being slow.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TOP), str(TOP / "tests" / "peers")]

import torch  # noqa: E402
from llama_engine import quantize  # noqa: E402

import llmlab  # noqa: E402
from llmlab import formats  # noqa: E402
from llmlab.gguf import read_gguf, write_gguf  # noqa: E402

pytestmark = pytest.mark.bench

QUANTS = ("Q8_0", "Q4_0", "Q5_1", "Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ3_S")


def halved(path: Path, layers: int) -> int:
    """Write the source; how many weights it has."""
    file = read_gguf(llmlab.fetch("smollm2-135m", progress=False))
    kept = [t for t in file.tensors.values() if not t.name.startswith("blk.") or int(t.name.split(".")[1]) < layers]

    def numbers(t):
        rows = file.data(t.name).reshape(-1, formats.FORMATS[t.type].bytes(t.shape[0]))
        return formats.dequantize(rows, t.type, torch.float16 if len(t.shape) > 1 else torch.float32).numpy()

    write_gguf(path, file.typed_metadata() | {"llama.block_count": ("uint32", layers), "general.file_type": ("uint32", 1)},
               [(t.name, t.shape, "F16" if len(t.shape) > 1 else "F32", lambda t=t: numbers(t)) for t in kept])
    return sum(t.elements for t in kept)


def timed(call) -> tuple[float, float]:
    """Seconds by the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - clock, time.process_time() - processor


def measure(quants, layers: int, rounds: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    before = os.getloadavg()
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        source, ours, theirs = (Path(folder) / f"{name}.gguf" for name in ("source", "ours", "theirs"))
        weights = halved(source, layers)
        for quant in quants:
            runs = {"llmlab": [], "llama.cpp": []}
            for _ in range(rounds):
                runs["llama.cpp"].append(timed(lambda q=quant: quantize(source, theirs, q, nthread=threads)))
                runs["llmlab"].append(timed(lambda q=quant: llmlab.quantize_gguf(source, ours, q)))
            best = {name: tuple(map(min, zip(*times, strict=True))) for name, times in runs.items()}
            cases[quant] = {"seconds": {name: clock for name, (clock, _) in best.items()},
                            "processor_seconds": {name: processor for name, (_, processor) in best.items()},
                            "ratio": best["llmlab"][0] / best["llama.cpp"][0],
                            "ratio_processor": best["llmlab"][1] / best["llama.cpp"][1],
                            "same_bytes": ours.read_bytes() == theirs.read_bytes()}
    return {"date": str(date.today()), "threads": threads, "weights": weights, "rounds": rounds, "load_before": before,
            "load_after": os.getloadavg(), "cases": cases}


def show(found: dict) -> None:
    print(f"{found['date']}, {found['threads']} threads, {found['weights'] / 1e6:.0f} M weights, load "
          f"{found['load_before'][0]:.1f} before and {found['load_after'][0]:.1f} after; minima of {found['rounds']} rounds")
    print("quant     llama.cpp  llmlab   ratio   ratio of processor time   same bytes")
    for quant, case in found["cases"].items():
        print(f"{quant:<9} {case['seconds']['llama.cpp']:9.2f} {case['seconds']['llmlab']:7.2f} {case['ratio']:7.2f} "
              f"{case['ratio_processor']:12.2f} {'':13} {'yes' if case['same_bytes'] else 'no'}", flush=True)


def test_quantizing_beside_llama_cpp():
    show(measure(("Q8_0", "Q4_0", "Q4_K_M"), 1, 2, os.cpu_count() or 1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quants", nargs="*", default=QUANTS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    result = measure(asked.quants, asked.layers, asked.rounds, asked.threads)
    show(result)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
