"""How quick a packed matrix multiplies: against dense float32 and bfloat16 matmuls of the same shape, and against its bytes.

    python tests/bench/bench_kernels.py [--json FILE] [formats...]

`x dense` above 1 is quicker than torch's linear on numbers of the input's type. `floor` is the time that reading the GGUF bytes
takes at the bandwidth measured here, as a part of the time taken: 1 is as fast as memory allows. All take turns, several
rounds, the best of each. pytest does a few formats and one shape. Nothing here fails for being slow.
"""

import argparse
import json
import os
import sys
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter

import pytest

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

from llmlab import kernels, machine  # noqa: E402
from llmlab.formats import FORMATS  # noqa: E402
from llmlab.kernels.unpacking import levels  # noqa: E402

pytestmark = pytest.mark.bench
SHAPES = ((2048, 2048), (5632, 2048))
TOKENS = (1, 512)
TYPES = (torch.float32, torch.bfloat16)


def noise(format: str, rows: int, cols: int) -> torch.Tensor:
    """Blocks of small random bytes: what is in them takes no more or less time."""
    layout = FORMATS[format]
    return torch.randint(0, 48, (rows, cols // layout.block * layout.block_bytes), dtype=torch.uint8)


def interleaved(works: dict, rounds: int = 5) -> dict:
    """{name: seconds}: the best of some rounds in which everything takes its turn."""
    best = dict.fromkeys(works, float("inf"))
    for turn in range(rounds + 1):
        for name, work in works.items():
            start = perf_counter()
            work()
            if turn:
                best[name] = min(best[name], perf_counter() - start)
    return best


def bandwidth() -> float:
    """Bytes a second that a sum over 256 MiB reads."""
    data = torch.ones(1 << 26)
    return data.nbytes / interleaved({"sum": data.sum})["sum"]


@torch.inference_mode()
def measure(format: str, rows: int, cols: int, tokens: int, dtype: torch.dtype, strategies=("compact", "fast"),
            rounds: int = 5) -> dict:
    """{strategy or "dense": seconds} of one shape, and the packed matrices under "packed"."""
    blocks, x = noise(format, rows, cols), torch.randn(tokens, cols).to(dtype)
    packed = {name: kernels.pack(blocks, format, name, dtype) for name in strategies}
    weights = torch.randn(rows, cols).to(dtype)
    works = {name: lambda made=made: kernels.linear(x, made) for name, made in packed.items()}
    return interleaved(works | {"dense": lambda: functional.linear(x, weights)}, rounds) | {"packed": packed}


def report(formats, shapes=SHAPES, tokens=TOKENS, types=TYPES, strategies=("compact", "fast"), rounds: int = 5) -> dict:
    """Prints a line for each and gives them back, with what ran them."""
    rate, lines = bandwidth(), []
    head = {"date": date.today().isoformat(), "processor": machine().cpu.name, "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__, "bandwidth": rate}
    print(f"\n{head['processor']}, {head['capability']}, {head['threads']} threads, {rate / 1e9:.1f} GB/s")
    print(f"{'format':8}{'shape':>12}{'tokens':>7} {'type':9}{'strategy':9}{'ms':>8}{'x dense':>9}{'floor':>6}{'bits':>6}  why")
    for format in formats:
        for rows, cols in shapes:
            for count in tokens:
                for dtype in types:
                    took = measure(format, rows, cols, count, dtype, strategies, rounds)
                    for name in strategies:
                        made = took["packed"][name]
                        line = {"format": format, "rows": rows, "cols": cols, "tokens": count, "type": str(dtype)[6:],
                                "strategy": name, "seconds": took[name], "dense": took["dense"] / took[name],
                                "floor": FORMATS[format].bytes(rows * cols) / rate / took[name],
                                "bits": made.bytes * 8 / (rows * cols)}
                        lines.append(line)
                        print(f"{format:8}{rows:>7}x{cols}{count:>7} {line['type']:9}{name:9}{took[name] * 1e3:>8.2f}"
                              f"{line['dense']:>9.2f}{line['floor']:>6.2f}{line['bits']:>6.2f}  {made.why}", flush=True)
    return head | {"load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None, "lines": lines}


def runnable() -> list[str]:
    return [name for name in FORMATS if levels(name)]


def test_packed_against_dense():
    lines = report(("Q4_0", "Q4_K", "Q6_K", "IQ4_XS"), shapes=SHAPES[:1], rounds=2)["lines"]
    for strategy in ("compact", "fast"):
        ratios = [line["dense"] for line in lines if line["strategy"] == strategy and line["tokens"] == 1]
        print(f"{strategy}: one token, median {median(ratios):.2f} of dense")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("formats", nargs="*", default=runnable())
    parser.add_argument("--json", type=Path, help="where to keep what was measured")
    asked = parser.parse_args()
    answer = report(asked.formats or runnable())
    if asked.json:
        asked.json.write_text(json.dumps(answer, indent=1) + "\n")
