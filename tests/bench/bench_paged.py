"""What the attention of many one-token queries costs in one layer of a paged cache, beside what reading the same bytes does.

    python tests/bench/bench_paged.py [--kv f32,f16,q8_0] [--texts 1,16,64] [--cells 300] [--threads N] [--cpu]

SmolLM2's shape (9 heads, 3 of keys, 64 numbers each), texts of lengths around `--cells`, their blocks anywhere; eight layers
take turns, so that they come from memory. "floor": the bytes that are looked at over the rate at which a sum reads memory here,
in the same run; "one by one": `layers.one` of each text over a plain cache of its own, which has no table to go through.
Microseconds a layer, the least of the rounds; --cpu counts the threads' own time, which is what is left to count on a machine
that does other things too. Nothing here fails for being slow.
"""

import argparse
import sys
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

import torch  # noqa: E402

from llmlab.runtime import layers  # noqa: E402
from llmlab.runtime.layers import LayerShape  # noqa: E402
from llmlab.runtime.paged import PagedCache, Part  # noqa: E402

SHAPE = LayerShape(9, 3, 64, 64, True, 0.125, torch.float32)
LAYERS, SIZE = 8, 16


def least(function, clock, rounds: int = 25) -> float:
    """Microseconds."""
    best = float("inf")
    for _ in range(rounds):
        began = clock()
        function()
        best = min(best, clock() - began)
    return best * 1e6


def measured(kv: str, texts: int, cells: int, clock=time.perf_counter) -> dict[str, float]:
    """Microseconds a layer by name, and the megabytes looked at."""
    seeded = torch.Generator().manual_seed(0)
    lengths = torch.randint(cells * 4 // 5, cells * 6 // 5 + 1, (texts,), generator=seeded).tolist()
    needed = [-(-length // SIZE) for length in lengths]
    order = torch.randperm(sum(needed), generator=seeded).tolist()
    parts = [Part([order.pop() for _ in range(count)], length - 1, 1) for count, length in zip(needed, lengths, strict=True)]
    q, new = torch.randn(texts, SHAPE.heads, SHAPE.head_dim), torch.randn(2, SHAPE.kv_heads, texts, SHAPE.head_dim)
    found = {}
    for name, compile in (("compiled", True), ("eager", False)):
        cache = PagedCache([SHAPE] * LAYERS, max(2, sum(needed)), SIZE, kv, compile=compile)
        if compile and cache.why != "one-token queries look by compiled code":
            continue
        look = cache.look(parts)
        remember = [cache.remember(number, look, SHAPE) for number in range(LAYERS)]
        attend = [one(new) for one in remember]
        found[name] = least(lambda attend=attend: [one(q) for one in attend], clock) / LAYERS
        found["writing"] = least(lambda remember=remember: [one(new) for one in remember], clock) / LAYERS
        found["a step's look"] = least(lambda cache=cache: cache.look(parts).alike(0), clock)
        found["MB"] = sum(needed) * cache.block_bytes / LAYERS / 1e6
    plain = [torch.randn(2, SHAPE.kv_heads, length, SHAPE.head_dim) for length in lengths]
    queries = q.view(texts, SHAPE.kv_heads, -1, SHAPE.head_dim)
    found["one by one f32"] = least(lambda: [layers.one(query, *both, SHAPE, None, None)
                                             for query, both in zip(queries, plain, strict=True)], clock)
    memory = torch.ones(1 << 25)
    found["floor"] = found["MB"] * 1e6 * least(memory.sum, clock, 10) / memory.nbytes
    return found


def test_attention_through_tables():
    found = measured("f32", 16, 300)
    print(", ".join(f"{name} {value:.0f}" for name, value in found.items()))
    assert found["eager"] > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kv", default="f32,f16,q8_0")
    parser.add_argument("--texts", default="1,16,64")
    parser.add_argument("--cells", type=int, default=300)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    clock = time.process_time if asked.cpu else time.perf_counter
    with torch.no_grad():
        for kv in asked.kv.split(","):
            for texts in map(int, asked.texts.split(",")):
                found = measured(kv, texts, asked.cells, clock)
                best = found.get("compiled", found["eager"])
                told = ", ".join(f"{name} {value:.0f}" for name, value in found.items() if name != "MB")
                print(f"{kv:5} {texts:3} texts, {found['MB']:.1f} MB a layer: {told} us; floor / best "
                      f"{found['floor'] / best:.2f}", flush=True)


if __name__ == "__main__":
    main()
