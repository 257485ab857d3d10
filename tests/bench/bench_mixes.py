"""Mixes chosen by measurement beside llama.cpp's at the same bytes, on the real model.

    python tests/bench/bench_mixes.py [--json FILE] [--importance] [--measure Q4_0] [--quants Q4_K_M,...] [--chunks 8]

SmolLM2 can be had only quantized, so the original is `quality.unrounded` of it. Costs come from the first two chunks of 256
tokens of the text llmlab ships (one pass back; `--measure` runs every tensor in that type as well, a quarter of an hour), every
mix is then run on `--chunks` others. A line a quant: bytes of all matrices, padded; KL divergence of llama.cpp's mix, of ours
at the same bytes, and of ours at nine tenths; in brackets what the sum of the tensors' costs said. With `--importance` every
quantization, theirs and ours, uses an importance matrix of 16 chunks that come after those.
"""

import argparse
import json
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

import torch  # noqa: E402

import llmlab  # noqa: E402
from llmlab import quality  # noqa: E402
from llmlab.quality.corpus import Tokens  # noqa: E402

pytestmark = pytest.mark.bench

TYPES = ("Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
CONTEXT, CHUNKS = 256, 2


def measure(quants: list[str], chunks: int, run: str | None, with_importance: bool, cache: Path | None = None) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "original.gguf"
        quality.unrounded(llmlab.fetch("smollm2-135m"), path)
        spec = llmlab.model(path)
        model, tokenizer = llmlab.load(path, device="cpu", dtype="float32", strategy="compact")
        whole = quality.tokens_of(tokenizer)
        told, asked = CHUNKS * CONTEXT, chunks * CONTEXT
        fresh = Tokens(whole.ids[told:told + asked + CONTEXT], whole.bos)
        weighed = quality.importance(model, None, Tokens(whole.ids[told + asked:], whole.bos), CONTEXT, False,
                                     chunks=16) if with_importance else None
        start = time.perf_counter()
        costs = quality.sensitivity(model, whole, TYPES, measure=run or False, importance=weighed, context=CONTEXT,
                                    chunks=CHUNKS, cache=cache)
        taken = time.perf_counter() - start

        def kld(types) -> dict:
            found = quality.divergence(quality.in_types(model, types, weighed), model, fresh, CONTEXT, chunks=chunks,
                                       progress=False)
            return {"kld": found.mean_kld.value, "error": found.mean_kld.error, "top1": found.top1.value,
                    "ratio": found.ratio.value}

        rows = []
        for quant in quants:
            theirs = {name: type for name, type in llmlab.mix(spec, quant).items() if name in costs.elements}
            size = costs.bytes(theirs)
            row = {"quant": quant, "bytes": size, "theirs": kld(theirs) | {"predicted": costs.predicted(theirs)}}
            for share in (1.0, 0.9):
                best = quality.best_mix(costs, int(size * share))
                row[f"ours {share}"] = kld(best.types) | {"bytes": best.bytes, "predicted": best.predicted,
                                                          "proven": best.proven, "counts": best.counts()}
            show(row)
            rows.append(row)
    return {"date": date.today().isoformat(), "threads": torch.get_num_threads(), "importance": with_importance,
            "measured": run, "seconds": taken, "tokens": chunks * (CONTEXT // 2 - 1), "correlation": costs.correlation(),
            "rows": rows}


def show(row: dict) -> None:
    def one(part: dict) -> str:
        return f"{part['kld']:.4f} ± {part['error']:.4f} [{part['predicted']:.4f}]"

    ours, less = row["ours 1.0"], row["ours 0.9"]
    print(f"{row['quant']:<8} {row['bytes']:>12,}  KLD {one(row['theirs'])}   ours {one(ours)}, {ours['bytes']:,} bytes, "
          f"{ours['kld'] / row['theirs']['kld']:.2f} times   ours at 0.9: {one(less)}", flush=True)


def test_a_mix_beside_llama_cpps():
    measure(["Q4_K_M"], 2, None, False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quants", default="Q4_0,IQ4_NL,Q4_K_S,Q4_K_M,Q5_K_M")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--measure")
    parser.add_argument("--importance", action="store_true")
    parser.add_argument("--cache", type=Path, help="keeps the costs, so that a second run is quick")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result = measure(given.quants.split(","), given.chunks, given.measure, given.importance, given.cache)
    print(f"costs took {result['seconds']:.0f} s")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
