"""Quantizing, beside llama.cpp's own C on as many threads.

    python tests/bench/bench_quantizing.py [--json FILE] [--rows 512] [--threads N] [TYPE ...]

The floor is written down first: 4 bytes read and the block's bytes written a weight, over what a plain copy moves here. Then
each type in turn, without importances and with them: rounds of ggml_quantize_chunk (rows shared among so many Python threads;
it lets go of the interpreter) and of ours alternate, minima; processor time beside, which is what can be compared where
other work takes the cores. Blocks are compared too. The last columns are the longer search: how much longer it takes, and
what is left of the squared error (times the importances). Nothing here fails for being slow.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
sys.path[:0] = [folder for folder in (str(TOP), str(TOP / "tests" / "peers")) if folder not in sys.path]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import llmlab  # noqa: E402
from llmlab import formats  # noqa: E402
from llmlab.formats import FORMATS  # noqa: E402
from llmlab.formats.encoders import ENCODERS  # noqa: E402

pytestmark = pytest.mark.bench

ROUNDS, COLUMNS = 3, 2048
ALWAYS_WEIGHED = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")
SLOW = 64       # rows of the types whose search takes long


def taken(call) -> tuple[float, float]:
    """Seconds by the clock, and of the processor's time by all threads of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def theirs(weights: np.ndarray, name: str, importance: np.ndarray | None, pool: ThreadPoolExecutor, threads: int) -> np.ndarray:
    import llama_quantize
    out = np.zeros((len(weights), FORMATS[name].bytes(COLUMNS)), np.uint8)
    share = -(-len(weights) // threads)

    def work(at: int) -> None:
        llama_quantize.quantize(weights, name, importance, out, at, min(share, len(weights) - at))

    list(pool.map(work, range(0, len(weights), share)))
    return out


def copied() -> float:
    """Bytes a second that a copy of 128 MB reads and writes."""
    source, target = torch.ones(1 << 25), torch.zeros(1 << 25)
    return 2 * 4 * (1 << 25) / min(taken(lambda: target.copy_(source))[0] for _ in range(ROUNDS))


def left(blocks, name: str, weights: np.ndarray, importance: np.ndarray | None) -> float:
    off = (formats.dequantize(blocks, name).numpy().astype(np.float64) - weights) ** 2
    return float((off if importance is None else off * importance).sum())


def one_type(name: str, rows: int, weighed: bool, pool: ThreadPoolExecutor, threads: int) -> dict:
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal((min(rows, SLOW) if name.startswith("IQ") else rows, COLUMNS)) * 0.02).astype(np.float32)
    importance = (rng.random(COLUMNS) ** 3 + 1e-3).astype(np.float32) if weighed else None
    same = np.array_equal(theirs(weights, name, importance, pool, threads), formats.quantize(weights, name, importance).numpy())
    times: dict[str, list[tuple[float, float]]] = {"theirs": [], "ours": []}
    for _ in range(ROUNDS):
        times["theirs"].append(taken(lambda: theirs(weights, name, importance, pool, threads)))
        times["ours"].append(taken(lambda: formats.quantize(weights, name, importance)))
    some = weights[:SLOW]
    usual = taken(lambda: formats.quantize(some, name, importance))[1]
    longer = taken(lambda: formats.quantize(some, name, importance, "high"))[1]
    errors = {effort: left(formats.quantize(some, name, importance, effort), name, some, importance)
              for effort in ("normal", "high")}
    wall = {who: min(each[0] for each in these) for who, these in times.items()}
    cpu = {who: min(each[1] for each in these) for who, these in times.items()}
    return {"same": same, "ns_a_weight": {who: seconds * 1e9 / weights.size for who, seconds in wall.items()},
            "ratio": wall["ours"] / wall["theirs"], "ratio_cpu": cpu["ours"] / cpu["theirs"],
            "longer": longer / usual, "error_left": errors["high"] / errors["normal"] if errors["normal"] else 1.0}


def measure(rows: int, threads: int, names: list[str]) -> dict:
    names = names or [name for name in ENCODERS if FORMATS[name].id is not None]
    before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    torch.set_num_threads(threads)
    bandwidth = copied()
    with ThreadPoolExecutor(threads) as pool:
        cases = {f"{name}{' weighed' if weighed else ''}": {
            "floor_ns": (FORMATS[name].bits / 8 + 4) / bandwidth * 1e9, **one_type(name, rows, weighed, pool, threads)}
            for name in names for weighed in (False, True) if weighed or name not in ALWAYS_WEIGHED}
    return {"date": date.today().isoformat(), "cpu": llmlab.machine().cpu.name, "threads": threads, "torch": torch.__version__,
            "load_before": before, "weights": rows * COLUMNS, "copy_bytes_per_second": bandwidth, "cases": cases}


def show(found: dict) -> None:
    print(f"{found['date']}, {found['cpu']}, {found['threads']} threads, load {found['load_before']} before; "
          f"{found['weights'] / 1e6:.1f} M weights; a copy moves {found['copy_bytes_per_second'] / 1e9:.1f} GB/s")
    print("ns a weight        floor  llama.cpp    ours  ratio  of cpu  bytes     | high: times  error left")
    for name, case in found["cases"].items():
        ns = case["ns_a_weight"]
        print(f"{name:<17} {case['floor_ns']:6.2f} {ns['theirs']:10.2f} {ns['ours']:7.2f} {case['ratio']:6.2f} "
              f"{case['ratio_cpu']:7.2f}  {'the same ' if case['same'] else 'others   '} | {case['longer']:11.1f} "
              f"{case['error_left']:11.4f}", flush=True)


def test_quantizing_beside_llama_cpp():
    pytest.importorskip("llama_cpp")
    show(measure(128, torch.get_num_threads(), ["Q8_0", "Q4_0", "Q4_K", "Q6_K"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("types", nargs="*")
    given = parser.parse_args()
    result = measure(given.rows, given.threads, given.types)
    show(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
