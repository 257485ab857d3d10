"""What loading the real SmolLM2 costs: seconds (imports apart), resident memory against the file, the peak while loading.

Each strategy in a fresh process that has run a tiny model first, so that libraries are not counted. Memory is asserted, seconds
are printed. `python -m pytest tests/bench/bench_loading.py -s`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runtime_models import make
from test_loading import cost

import llmlab
from llmlab.units import MIB

pytestmark = pytest.mark.bench
TOP = Path(__file__).resolve().parents[2]

TIME = """
import json, sys
from time import perf_counter
start = perf_counter()
import llmlab.loading
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
imported = perf_counter()
model, tokenizer = llmlab.load(sys.argv[1], strategy=sys.argv[2], dtype=sys.argv[3], device="cpu")
first = perf_counter()
llmlab.load(sys.argv[1], strategy=sys.argv[2], dtype=sys.argv[3], device="cpu")
print(json.dumps([imported - start, first - imported, perf_counter() - first]))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    make("llama", path)
    return path


@pytest.mark.parametrize("strategy", ["compact", "fast", "reference"])
def test_memory(tiny, strategy):
    found = cost(tiny, llmlab.fetch("smollm2-135m", progress=False), strategy)
    print(f"\n{strategy:9}", ", ".join(f"{name} {size / MIB:.1f} MiB" for name, size in found.items()),
          f"-> {found['resident'] / found['file']:.2f} of the file, "
          f"peak of loading {found['peak of loading'] / found['resident']:.2f} of resident")
    assert found["peak of loading"] < 1.3 * found["resident"]
    if strategy == "compact":
        assert found["resident"] < 1.15 * found["file"]


@pytest.mark.parametrize(("strategy", "dtype"), [("compact", "float32"), ("fast", "float32"), ("fast", "bfloat16")])
def test_time(strategy, dtype):
    path = llmlab.fetch("smollm2-135m", progress=False)
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", TIME, path, strategy, dtype], capture_output=True, text=True, cwd=TOP,
                              env=os.environ | {"OMP_NUM_THREADS": "2"}, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    imports, first, again = map(min, zip(*runs, strict=True))
    print(f"\n{strategy} {dtype}: load with the tokenizer {first:.2f} s, again {again:.2f} s, "
          f"imports {imports:.2f} s (best of 3)")
