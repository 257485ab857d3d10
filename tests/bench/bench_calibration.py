"""What machine.calibrate() measures, beside other programs that measure the same: RAM, a float32 product, cold reads.

    python tests/bench/bench_calibration.py [--json FILE]

Peers: a sum compiled by the C compiler (one and all cores), numpy, dd. Rounds of both sides alternate, so that other work
on the machine meets both; medians and ratios are printed. Nothing here fails for being slow.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import llmlab  # noqa: E402
from llmlab import places  # noqa: E402
from llmlab.calibration import disk, rates  # noqa: E402
from llmlab.units import MIB  # noqa: E402

pytestmark = pytest.mark.bench

ROUNDS, SIZE = 5, 1024 * MIB
SUM = """
double total(const double *x, long n, int threads) {
    double sum = 0;
    #pragma omp parallel for reduction(+:sum) num_threads(threads)
    for (long i = 0; i < n; i++) sum += x[i];
    return sum;
}
"""


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compiled(folder: Path):
    """total(address, count, threads) from the C compiler; None where there is none."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        return None
    (folder / "sum.c").write_text(SUM)
    done = subprocess.run([compiler, "-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC", "sum.c", "-o",
                           "sum.so"], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        return None
    total = ctypes.CDLL(str(folder / "sum.so")).total
    total.restype, total.argtypes = ctypes.c_double, [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
    return total


def ram(threads: int, folder: Path) -> dict[str, list[float]]:
    """Bytes per second by name."""
    data = np.ones(SIZE // 8)
    total, found = compiled(folder), {}
    peers: dict[str, Callable] = {"numpy sum": data.sum} if threads == 1 else {}
    if total:
        peers["compiled sum"] = lambda: total(data.ctypes.data, len(data), threads)
    if threads > 1:
        pool = ThreadPoolExecutor(threads)
        peers["numpy sum in threads"] = lambda: list(pool.map(np.sum, np.array_split(data, threads)))
    for call in peers.values():
        call()
    for _ in range(ROUNDS):
        figures, _ = rates.ram((threads,), 8 * SIZE, 1.0, lambda done, text: None)
        found.setdefault("llmlab", []).append(figures[0].best)
        for name, call in peers.items():
            found.setdefault(name, []).append(SIZE / seconds(call))
    return found


def product(threads: int) -> dict[str, list[float]]:
    """float32, 512 rows on a 4096-wide matrix: operations per second by name."""
    x, w = np.ones((512, 4096), np.float32), np.ones((4096, 4096), np.float32)
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        figures, _ = rates.multiply("cpu", "cpu", ("float32",), threads, 8 * SIZE, 2.0, lambda done, text: None)
        found.setdefault("llmlab", []).append(next(f.best for f in figures if f.part == "matmul"))
        x @ w.T
        found.setdefault("numpy", []).append(2 * x.size * len(w) / seconds(lambda: x @ w.T))
    return found


def cold(folder: Path) -> dict[str, list[float]]:
    """One thread's cold reads of a file, bytes per second; residency before each is printed."""
    size, path, found = 512 * MIB, folder / "file", {}
    if not shutil.which("dd"):
        return found
    with path.open("wb") as file:
        file.write(np.random.default_rng(0).bytes(size))
        os.fsync(file.fileno())
    peers = {"dd, buffered": [], "dd, direct": ["iflag=direct"]}
    for _ in range(ROUNDS):
        for method in ("buffered", "direct"):
            print(f"  in the page cache before llmlab's {method} read: {disk.drop(str(path), size):.4f}")
            read, took, _ = disk._round(str(path), method, 1, size, 8 * MIB, 0, 60.0)
            found.setdefault(f"llmlab, {method}", []).append(read / took)
        for name, flags in peers.items():
            print(f"  in the page cache before {name}: {disk.drop(str(path), size):.4f}")
            took = seconds(lambda flags=flags: subprocess.run(
                ["dd", f"if={path}", "of=/dev/null", "bs=8M", *flags], check=True, capture_output=True))
            found.setdefault(name, []).append(size / took)
    return found


def measure() -> dict:
    here, threads = llmlab.machine(), llmlab.machine().cpu.usable
    before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    places.cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=places.cache()) as name:
        folder = Path(name)
        cases = {"RAM read, 1 thread (GB/s)": ram(1, folder), f"RAM read, {threads} threads (GB/s)": ram(threads, folder),
                 f"float32 product, {threads} threads (GOP/s)": product(threads), "cold read, 1 thread (GB/s)": cold(folder)}
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as cache, contextlib.ExitStack() as stack:
        old = os.environ.get("LLMLAB_CACHE")
        stack.callback(lambda: os.environ.pop("LLMLAB_CACHE") if old is None else os.environ.update(LLMLAB_CACHE=old))
        os.environ["LLMLAB_CACHE"] = cache
        took = seconds(lambda: llmlab.machine().calibrate(progress=False))
    return {"date": date.today().isoformat(), "cpu": here.cpu.name, "cores": here.cpu.usable, "versions": here.versions,
            "load_before": before, "whole_calibration_seconds": round(took, 1),
            "cases": {case: {name: {"median": statistics.median(values), "low": min(values), "high": max(values)}
                             for name, values in found.items()} for case, found in cases.items()}}


def show(found: dict) -> None:
    print(f"{found['date']}, {found['cpu']}, {found['cores']} cores, load {found['load_before']} before; "
          f"a whole calibration took {found['whole_calibration_seconds']} s")
    for case, names in found["cases"].items():
        print(case)
        for name, value in names.items():
            kind = next((k for k in ("buffered", "direct") if k in name), None)
            ours = names[f"llmlab, {kind}" if kind else "llmlab"]["median"]
            ratio = "" if name.startswith("llmlab") else f"   llmlab / it: {ours / value['median']:.2f}"
            print(f"  {name:<22} {value['median'] / 1e9:8.2f}  ({value['low'] / 1e9:.2f} to {value['high'] / 1e9:.2f}){ratio}")


def test_calibration_beside_other_programs():
    show(measure())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    result = measure()
    show(result)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
