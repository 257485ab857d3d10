"""One process that measures the cards and prints what it found: `python -m llmlab.calibration.card SECONDS`.

A process of its own, so that the caller keeps no memory of a card, and a card that fails takes nothing with it. What a
first context costs is seen from outside: this process watches the card's free memory while a second one, started for
that alone, makes its context and multiplies once.

Prints JSON, two lines a step: {"done": 0.4, "text": "..."} before it, and after it all that is known by then:
{"figures": [...], "skipped": [...], "cards": 1}.
"""

import json
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace

import torch

from ..calibrated import Figure
from ..units import GIB, MIB, format_bytes
from .rates import CARD_TYPES, multiply
from .timing import figure, rounds

BUFFER = 256 * MIB  # of a copy: far more than starting one costs


def measure(seconds: float, say, save) -> None:
    """Every card that torch sees, in its order; of cards of one name the rates of the first count for all.

    say(share done, text) before a step, save(figures so far, what was skipped) after it.
    """
    figures, skipped, known = [], [], {}
    cards, end = torch.cuda.device_count(), time.perf_counter() + seconds
    for index in range(cards):
        name, device = torch.cuda.get_device_name(index), f"gpu{index}"
        first = known.setdefault(name, index)

        def report(done: float, text: str, index=index):
            say((index + done) / cards, text)

        def left(part: float, index=index) -> float:
            return max(0.5, part * (end - time.perf_counter()) / (cards - index))

        steps = {"context": lambda i=index: _context(i), "copies": lambda i=index, left=left: _copies(i, cards, left(0.25))}
        if first == index:
            steps |= {"memory": lambda i=index, left=left: _memory(i, left(0.15)),
                      "types": lambda i=index, left=left, report=report: multiply(
                          _device(i), f"gpu{i}", CARD_TYPES, None, _free(i), left(0.9), lambda d, t: report(0.5 + d / 2, t))}
        else:
            skipped.append((f"{device} rates", f"a second {name}: taken from gpu{first}"))
            figures += [replace(f, device=device, how=f"as gpu{first}: {f.how}") for f in figures
                        if f.device == f"gpu{first}" and f.part in ("memory", "decode", "matmul")]
        for at, (what, step) in enumerate(steps.items()):
            report(at / 8, f"{device}: {what}")
            try:
                found, missed = step()
                figures, skipped = figures + found, skipped + missed
            except (RuntimeError, NotImplementedError, OSError, ValueError) as error:
                skipped.append((f"{device} {what}", (str(error).splitlines() or [type(error).__name__])[0][:200]))
            save(figures, skipped)
            torch.cuda.empty_cache()


def _device(index: int) -> str:
    return f"cuda:{index}"


def _wait(index: int) -> None:
    torch.cuda.synchronize(index)


def _free(index: int) -> int:
    return torch.cuda.mem_get_info(index)[0]


# -- copies and memory -------------------------------------------------------------------------------------------------


def _copies(index: int, cards: int, seconds: float):
    size = min(BUFFER, _free(index) // 8)
    here = torch.empty(size, dtype=torch.uint8, device=_device(index))
    there = torch.empty_like(here)
    figures, skipped, ends = [], [], {"d2d": (here, there)}
    pageable = torch.ones(size, dtype=torch.uint8)
    ends |= {"h2d_pageable": (pageable, here), "d2h_pageable": (here, pageable)}
    try:
        pinned = torch.ones(size, dtype=torch.uint8).pin_memory()
        ends |= {"h2d_pinned": (pinned, here), "d2h_pinned": (here, pinned)}
    except RuntimeError as error:
        skipped.append((f"gpu{index} pinned copies", f"no pinned memory: {str(error).splitlines()[0][:160]}"))
    for other in range(cards):
        if other != index:
            ends[f"p2p_gpu{other}"] = (here, torch.empty(size, dtype=torch.uint8, device=_device(other)))
    for name, (source, target) in ends.items():
        repeat = 8 if name == "d2d" else 1

        def run(source=source, target=target, repeat=repeat):
            for _ in range(repeat):
                target.copy_(source, non_blocking=True)
            _wait(index)

        took = rounds(run, seconds / len(ends))
        figures.append(figure("copy", f"gpu{index}", name, size * repeat, took, "B/s", format_bytes(size)))
    return figures, skipped


def _memory(index: int, seconds: float):
    """A sum reads every byte once and writes nothing."""
    size = min(GIB, _free(index) // 4 // MIB * MIB)
    buffer = torch.ones(size // 4, device=_device(index))

    def run():
        for _ in range(4):
            buffer.sum()
        _wait(index)

    took = rounds(run, seconds)
    return [figure("memory", f"gpu{index}", "read", 4 * size, took, "B/s", f"a sum over {format_bytes(size)} of float32")], []


# -- the first context -------------------------------------------------------------------------------------------------


def _context(index: int):
    """Bytes that a fresh process takes of the card: by its context, by the kernels of a first multiplication, and by the
    workspace that cuBLAS keeps (which torch allocates, so that its allocator reports it)."""
    torch.zeros(1, device=_device(index))
    _wait(index)
    torch.cuda.empty_cache()
    free = [_free(index)]
    child = subprocess.Popen([sys.executable, "-m", "llmlab.calibration.card", "--context", str(index)],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    said = []
    try:
        for _ in range(2):
            said.append(json.loads(child.stdout.readline()))
            free.append(_free(index))
            child.stdin.write("go\n")
            child.stdin.flush()
        child.wait(timeout=20)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return [], [(f"gpu{index} context", f"the process started for it failed ({type(error).__name__})")]
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
    left = abs(_free(index) - free[0])  # what other programs took or gave back meanwhile
    context = free[0] - free[1] - said[0]["reserved"]
    kernels = free[1] - free[2] - (said[1]["reserved"] - said[0]["reserved"])
    if context <= 0 or kernels < 0 or left > context / 4:
        return [], [(f"gpu{index} context", "other programs took or freed memory of the card meanwhile; try again")]
    how = "free memory of the card before and after, seen from another process"
    made = [("context", context, how), ("kernels", kernels, f"{how}; after a bfloat16 multiplication"),
            ("workspace", said[1]["workspace"], "torch's allocator after a multiplication, less the tensors")]
    return [Figure("context", f"gpu{index}", name, max(0, size - left * (name != "workspace")), size,
                   size + left * (name != "workspace"), "B", 1, how) for name, size, how in made], []


def _first_context(index: int) -> None:
    """The watched process: makes its context, says so, waits; multiplies, says so, waits."""
    device = _device(index)
    torch.zeros(1, device=device)
    _wait(index)
    print(json.dumps({"reserved": torch.cuda.memory_reserved(index)}), flush=True)
    sys.stdin.readline()
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    x = torch.ones(512, 512, device=device, dtype=dtype)
    y = torch.nn.functional.linear(x, x)
    _wait(index)
    workspace = torch.cuda.memory_allocated(index) - x.nbytes - y.nbytes
    print(json.dumps({"reserved": torch.cuda.memory_reserved(index), "workspace": max(0, workspace)}), flush=True)
    sys.stdin.readline()


def main(argv: list[str]) -> int:
    warnings.simplefilter("ignore")
    if argv[:1] == ["--context"]:
        _first_context(int(argv[1]))
        return 0

    def say(done: float, text: str):
        print(json.dumps({"done": done, "text": text}), flush=True)

    def save(figures: list[Figure], skipped: list[tuple[str, str]]):
        cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
        print(json.dumps({"figures": [asdict(f) for f in figures], "skipped": skipped, "cards": cards}), flush=True)

    if torch.cuda.is_available():
        with torch.inference_mode():
            measure(float(argv[0]), say, save)
    else:
        save([], [("cards", "torch can use no card here")])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
