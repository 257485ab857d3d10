"""Dequantizing, beside gguf-py's numpy and beside what memory allows.

    python tests/bench/bench_formats.py [--json FILE] [--rows 2048] [FORMAT ...]

The floor is written down first: bytes read and 4 bytes written a weight, over what a plain copy moves here. Then each
format in turn: rounds of gguf-py (one thread: it has no more), of ours with fresh memory and of ours into memory that is there
already, alternating, minima. gguf-py has a process of its own: ours has malloc keep its memory, which makes gguf-py in the same
process up to half as fast again. The last column is the processor time of one thread beside gguf-py's: what is left to
compare where other work takes the cores. Nothing here fails for being slow.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from datetime import date
from multiprocessing.pool import Pool
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import llmlab  # noqa: E402
from llmlab import formats  # noqa: E402
from llmlab.formats import FORMATS, dequantizing  # noqa: E402

pytestmark = pytest.mark.bench

ROUNDS, COLUMNS = 7, 4096


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    call()
    return clock() - start


def blocks(name: str, rows: int) -> np.ndarray:
    """Random bytes with scales that are numbers: not-a-numbers take other paths, and no model holds them."""
    known = FORMATS[name]
    return np.random.default_rng(0).integers(0, 60, (rows, COLUMNS // known.block * known.block_bytes), dtype=np.uint8)


def theirs(name: str, rows: int) -> tuple[float, float]:
    """Seconds that gguf-py takes by the clock, and seconds of the processor: another round of it."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize
    data, type = blocks(name, rows), GGMLQuantizationType[name]
    with np.errstate(all="ignore"):
        return (seconds(lambda: dequantize(data, type)), seconds(lambda: dequantize(data, type), time.thread_time))


def copied() -> float:
    """Bytes a second that a copy of 256 MB reads and writes, all threads."""
    source, target = torch.ones(1 << 26), torch.zeros(1 << 26)
    return 2 * 4 * (1 << 26) / min(seconds(lambda: target.copy_(source)) for _ in range(ROUNDS))


def one_format(name: str, rows: int, bandwidth: float, other: Pool) -> dict:
    data, known = blocks(name, rows), FORMATS[name]
    out = torch.zeros(rows, COLUMNS)
    flat, into = torch.from_numpy(data).view(-1, known.block_bytes), out.view(-1, known.block)
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for who, taken in zip(("gguf-py", "gguf-py cpu"), other.apply(theirs, (name, rows)), strict=True):
            times.setdefault(who, []).append(taken)
        times.setdefault("fresh", []).append(seconds(lambda: formats.dequantize(data, name)))
        times.setdefault("into", []).append(seconds(lambda: formats.dequantize(data, name, out=out)))
        if known.unpack is not None:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            times.setdefault("one", []).append(seconds(lambda: dequantizing.chunks(known, flat, into), time.thread_time))
            torch.set_num_threads(threads)
    best = {who: rows * COLUMNS / min(taken) for who, taken in times.items()}
    return {"weights_per_second": best, "floor": bandwidth / (known.bits / 8 + 4),
            "ratio_fresh": best["fresh"] / best["gguf-py"], "ratio_into": best["into"] / best["gguf-py"],
            "ratio_one_core": best["one"] / best["gguf-py cpu"] if "one" in best else None}


def measure(rows: int, names: list[str]) -> dict:
    from gguf.quants import _type_traits
    here = llmlab.machine()
    known = [t.name for t in _type_traits] + ["F16"]
    names = names or [n for n in FORMATS if n in known and (FORMATS[n].unpack or FORMATS[n].block == 1)]
    before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    bandwidth = copied()
    with multiprocessing.get_context("spawn").Pool(1) as other:
        cases = {name: one_format(name, rows, bandwidth, other) for name in names}
    return {"date": date.today().isoformat(), "cpu": here.cpu.name,
            "threads": torch.get_num_threads(), "torch": torch.__version__,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "weights": rows * COLUMNS, "load_before": before, "copy_bytes_per_second": bandwidth, "cases": cases}


def show(found: dict) -> None:
    print(f"{found['date']}, {found['cpu']}, {found['threads']} threads, {found['capability']}, "
          f"load {found['load_before']} before; "
          f"{found['weights'] / 1e6:.0f} M weights; a copy moves {found['copy_bytes_per_second'] / 1e9:.1f} GB/s")
    print("million weights/s  gguf-py  floor   fresh    into   fresh: into: one core:  (times gguf-py)")
    for name, case in found["cases"].items():
        best = case["weights_per_second"]
        one = f"{case['ratio_one_core']:8.1f}" if case["ratio_one_core"] else ""
        print(f"{name:<16} {best['gguf-py'] / 1e6:9.0f} {case['floor'] / 1e6:6.0f} {best['fresh'] / 1e6:7.0f}"
              f" {best['into'] / 1e6:7.0f}"
              f"   {case['ratio_fresh']:6.1f} {case['ratio_into']:5.1f} {one}", flush=True)


def test_formats_beside_gguf_py():
    show(measure(512, []))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    result = measure(asked.rows, asked.formats)
    show(result)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
