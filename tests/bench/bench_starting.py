"""How long after a command is given the first word of an answer comes: whole cold processes, SmolLM2 from its file.

    python tests/bench/bench_starting.py [--json FILE] [--rounds 5]

The clock starts as the process is started and stops at the first byte it prints; the page cache is warm. Every case once a
round, minima and medians; beside them the processor time of the whole process, which other work on the machine changes less.
The floor is what importing torch takes here. llama.cpp's Python binding is asked the same where it is installed. The last table
splits the lean way's time, measured inside one process, by wall clock and by processor.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

import llmlab  # noqa: E402

pytestmark = pytest.mark.bench

ROUNDS, QUESTION = 5, "What is the capital of France?"
PRINT = "print('.', flush=True)"

LLAMA = f"""
import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=2048, n_threads=int(sys.argv[2]), n_threads_batch=int(sys.argv[2]), verbose=False)
asked = [{{"role": "user", "content": {QUESTION!r}}}]
for part in model.create_chat_completion(asked, max_tokens=1, temperature=0, stream=True):
    if text := part["choices"][0]["delta"].get("content"):
        print(text, flush=True)
"""

SPLIT = f"""
import gc, json, sys, time
gc.disable()                # as llmlab run does while it starts
def lap(name):
    global wall, cpu
    laps[name], wall, cpu = (time.perf_counter() - wall, time.process_time() - cpu), time.perf_counter(), time.process_time()
laps, wall, cpu = {{}}, time.perf_counter(), time.process_time()
from llmlab.starting import gguf_of
lap("import of llmlab's reader")
file = gguf_of(sys.argv[1])
lap("the file's header")
from llmlab.vocabulary import templates, words_of
templates.warm()
lap("import of tokenizers and numpy")
import torch
lap("import of torch")
from llmlab import loading
from llmlab.runtime import decoder
lap("import of llmlab's runtime")
words = words_of(file)
lap("vocabulary")
made = decoder.Decoder.open(file, loading._dtype(None, torch.device("cpu"))[0])
lap("weights")
asked = [{{"role": "user", "content": {QUESTION!r}}}]
ids = words.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
lap("template and tokens")
token = int(made.read(ids).argmax())
lap("prompt, the first token")
made.read([token])
lap("the second token")
print(json.dumps(laps))
"""


def cases(model: Path, threads: int) -> dict[str, list[str]]:
    """Command lines by name."""
    python = [sys.executable, "-c"]
    run = [sys.executable, "-m", "llmlab", "run", str(model), "-p", QUESTION, "--temp", "0", "-n", "1"]
    found = {"python": [*python, PRINT], "import llmlab": [*python, f"import llmlab; {PRINT}"],
             "import numpy": [*python, f"import numpy; {PRINT}"], "import torch": [*python, f"import torch; {PRINT}"],
             "llmlab run": run, "llmlab run --no-chat": [*run, "--no-chat"],
             "llmlab run --engine transformers": [*run, "--engine", "transformers"]}
    if importlib.util.find_spec("llama_cpp"):
        found["import llama_cpp"] = [*python, f"import llama_cpp; {PRINT}"]
        found["llama-cpp-python"] = [*python, LLAMA, str(model), str(threads)]
    return found


def first_byte(command: list[str], env: dict[str, str]) -> tuple[float, float, str]:
    """Seconds from start to the first byte on stdout, processor seconds of the whole process, and all that was printed."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, env=env, bufsize=0)
        with child.stdout:
            one = child.stdout.read(1)
            took = time.perf_counter() - start
            out = one + child.stdout.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode or not one:
            errors.seek(0)
            raise RuntimeError(f"{command[:4]} ended with {child.returncode}: {errors.read().decode()[-500:]}")
    return took, used.ru_utime + used.ru_stime, out.decode().strip()


def measure(rounds: int = ROUNDS) -> dict:
    threads = os.cpu_count() or 1
    env = {"GOMP_SPINCOUNT": "1000"} | os.environ | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": str(threads)}
    model = llmlab.fetch("smollm2-135m", progress=False)
    asked = cases(model, threads)
    before = load()
    for command in asked.values():          # bytecode, page cache, what a first call keeps on disk
        first_byte(command, env)
    took, used, said = {name: [] for name in asked}, {name: [] for name in asked}, {}
    for _ in range(rounds):
        for name, command in asked.items():
            wall, processor, said[name] = first_byte(command, env)
            took[name].append(wall)
            used[name].append(processor)
    inside = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", SPLIT, str(model)], capture_output=True, text=True, env=env, check=True)
        inside.append(json.loads(done.stdout))
    return {"date": date.today().isoformat(), "threads": threads, "load_before": before, "load_after": load(),
            "model": model.name, "rounds": rounds,
            "seconds": {name: {"least": min(times), "median": statistics.median(times), "processor": min(used[name]),
                               "said": said[name]} for name, times in took.items()},
            "split": {name: {"wall": min(one[name][0] for one in inside), "processor": min(one[name][1] for one in inside)}
                      for name in inside[0]}}


def load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def show(found: dict) -> None:
    seconds, floor = found["seconds"], found["seconds"]["import torch"]["least"]
    print(f"\nfirst byte of a cold process, {found['model']}, {found['threads']} threads, load {found['load_before']} before "
          f"and {found['load_after']} after; {found['rounds']} rounds")
    for name, times in seconds.items():
        said = f"  {times['said']!r}" if times["said"] != "." else ""
        print(f"{name:33} least {times['least']:6.3f} s  median {times['median']:6.3f} s  "
              f"processor {times['processor']:6.3f} s  {times['least'] / floor:5.2f} x torch{said}")
    lean = seconds["llmlab run"]["least"]
    for other in ("llmlab run --engine transformers", "llama-cpp-python"):
        if other in seconds:
            print(f"llmlab run takes {lean / seconds[other]['least']:.2f} of {other}")
    print("inside one process, least of each: wall, processor")
    for name, times in found["split"].items():
        print(f"  {name:32} {times['wall']:6.3f} s  {times['processor']:6.3f} s")


def test_starting():
    found = measure(3)
    show(found)
    said = found["seconds"]
    assert said["llmlab run"]["said"] == said["llmlab run --engine transformers"]["said"] == "The"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    result = measure(arguments.rounds)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
