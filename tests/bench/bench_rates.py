"""Rate and distortion of the real model: every quant, with and without an importance matrix, and mixes by measurement.

    python tests/bench/bench_rates.py [--csv FILE] [--folder FOLDER] [--plain QUANTS] [--important QUANTS] [--mixes QUANTS]

Makes data/quality_smollm2_135m.csv, a row as soon as it is measured; rows that are there already are not measured again.
SmolLM2 can be had only quantized, so the original is `quality.unrounded` of it in F16. The text that llmlab ships is cut in
three, so that nothing is measured on what it was chosen by: its first 512 tokens say what each tensor's type costs (for the
mixes), the next two chunks of 512 are what is measured on, and the importance matrix is of eight chunks after those. A mix
has at most the bytes of the quant it is named after and uses the importance matrix. `--folder` keeps what takes long.
"""

import argparse
import csv
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

import llmlab  # noqa: E402
from llmlab import quality  # noqa: E402
from llmlab.quality.corpus import Tokens  # noqa: E402
from llmlab.quality.swapping import blocks_in, matrices, packed_in, swapped  # noqa: E402
from llmlab.requantizing import planned  # noqa: E402

pytestmark = pytest.mark.bench

CONTEXT, CHUNKS, TOLD, CALIBRATED = 512, 2, 512, 8
PLAIN = "Q8_0 Q4_K_M Q4_0 IQ4_XS Q3_K_S IQ3_S Q5_K_M Q4_K_S Q3_K_M Q6_K Q3_K_L Q2_K"
IMPORTANT = "Q4_K_M IQ4_XS Q4_0 Q3_K_S IQ3_S Q4_K_S Q3_K_M Q5_K_M Q3_K_L Q2_K"
MIXES = "Q4_K_M Q3_K_M Q3_K_S"
TYPES = ("Q4_0", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S")
COLUMNS = ("quant", "imatrix", "bytes", "bits_per_weight", "perplexity", "ratio", "ratio_error", "mean_kld", "mean_kld_error",
           "p99_kld", "rms_delta_p_percent", "same_top_percent", "source", "note")


class Lab:
    """The original, loaded, and what it is measured against; made in a folder where it is not there yet."""

    def __init__(self, folder: Path, name: str = "smollm2-135m"):
        self.folder, self.path = folder, folder / "original.gguf"
        if not self.path.exists():
            quality.unrounded(llmlab.fetch(name), self.path)
        self.model, tokenizer = llmlab.load(self.path, device="cpu", dtype="float32", strategy="compact")
        self.tokens = quality.tokens_of(tokenizer)
        self.found = matrices(self.model)
        self.reference = folder / "reference.safetensors"
        if not self.reference.exists():
            quality.save_reference(self.model, self._part(TOLD, CHUNKS * CONTEXT + 1), self.reference, CONTEXT, chunks=CHUNKS,
                                   precision="float32", progress=False)

    def _part(self, start: int, count: int) -> Tokens:
        return Tokens(self.tokens.ids[start:start + count], self.tokens.bos)

    def importance(self) -> quality.Importance:
        kept = self.folder / "importance.gguf"
        if not kept.exists():
            quality.importance(self.model, None, self._part(TOLD + CHUNKS * CONTEXT, CALIBRATED * CONTEXT), CONTEXT, False,
                               chunks=CALIBRATED, dataset="alice.txt").save(kept)
        return quality.read_importance(kept)

    def costs(self, importance: Mapping) -> quality.Sensitivity:
        return quality.sensitivity(self.model, self._part(0, TOLD), TYPES, importance=importance, context=256, chunks=2,
                                   cache=self.folder / "costs.json", progress=False)

    def measured(self, types: Mapping[str, str], made: Callable) -> quality.Divergence:
        with ExitStack() as stack:
            for name, type in types.items():
                if name in self.found and type != self.found[name].packed.format:
                    stack.enter_context(swapped(self.found[name], made(name, type)))
            return quality.divergence(self.model, self.reference, progress=False)


def maker(lab: Lab, importance: Mapping | None) -> Callable:
    """(tensor, type) -> packed; quants share many, and each is made once."""
    kept = {}

    def made(name: str, type: str):
        if (name, type) not in kept:
            matrix = lab.found[name]
            kept[name, type] = packed_in(matrix, type, blocks_in(matrix, type, importance))
        return kept[name, type]

    return made


def row_of(name: str, important: bool, plan, found: quality.Divergence) -> dict:
    """A row of the table; sizes exact, the rest measured."""
    counts = Counter(row.type for row in plan.rows if row.type != "F32")
    return dict(zip(COLUMNS, (
        name, f"{CALIBRATED} chunks" if important else "None", plan.file_bytes, f"{plan.bits_per_weight:.4f}",
        f"{found.perplexity.value:.4f}", f"{found.ratio.value:.5f}", f"{found.ratio.error:.5f}", f"{found.mean_kld.value:.6f}",
        f"{found.mean_kld.error:.6f}", f"{found.p99_kld:.5f}", f"{100 * found.rms_dp.value:.3f}",
        f"{100 * found.top1.value:.2f}",
        f"tests/bench/bench_rates.py, alice.txt, {found.tokens} tokens in {found.chunks} chunks of {found.context}",
        ", ".join(f"{count} {type}" for type, count in counts.most_common())), strict=True))


def measure(lab: Lab, target: Path, plain: list[str], important: list[str], mixes: list[str]) -> list[dict]:
    """Every row asked for that the file lacks, written as it is found; quants of the very same types are measured once."""
    rows, known = (list(csv.DictReader(target.open())) if target.exists() else []), {}
    done = {(row["quant"], row["imatrix"] != "None") for row in rows}

    def one(name: str, plan, made: Callable, weighed: bool) -> None:
        if (name, weighed) in done:
            return
        types = {row.name: row.type for row in plan.rows}
        key = weighed, tuple(types.items())
        if key not in known:
            known[key] = lab.measured(types, made)
        rows.append(row_of(name, weighed, plan, known[key]))
        new = not target.exists()
        with target.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(rows[-1])
        print(f"{name:<16} {'importance' if weighed else '':<11} {rows[-1]['bits_per_weight']} bits  {known[key]}", flush=True)

    made = maker(lab, None)
    for quant in plain:
        one(quant, planned(lab.path, quant), made, False)
    if important or mixes:
        weighed = lab.importance()
        made = maker(lab, weighed)
        for quant in important:
            one(quant, planned(lab.path, quant, weighed), made, True)
    if mixes:
        costs = lab.costs(weighed)
        for quant in mixes:
            theirs = {row.name: row.type for row in planned(lab.path, quant, weighed).rows}
            best = quality.best_mix(costs, costs.bytes({name: theirs[name] for name in costs.elements}))
            one(f"mix at {quant}", planned(lab.path, quant, weighed, types=best.types), made, True)
    return rows


def test_rates_of_two(tmp_path):
    rows = measure(Lab(tmp_path), tmp_path / "rates.csv", ["Q8_0", "Q4_0"], [], [])
    low, high = (float(row["mean_kld"]) for row in rows)
    assert 0 < low < high


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=TOP / "data" / "quality_smollm2_135m.csv")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--plain", default=PLAIN)
    parser.add_argument("--important", default=IMPORTANT)
    parser.add_argument("--mixes", default=MIXES)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as own:
        measure(Lab(given.folder or Path(own)), given.csv, given.plain.split(), given.important.split(), given.mixes.split())
