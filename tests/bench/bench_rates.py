"""Rate and distortion of the real model: every quant, with and without an importance matrix, and mixes by measurement.

    python tests/bench/bench_rates.py [--csv FILE] [--folder FOLDER] [--plain QUANTS] [--important QUANTS] [--mixes QUANTS]
                                      [--high-plain QUANTS] [--high QUANTS] [--high-mixes QUANTS] [--jobs N]
    python tests/bench/bench_rates.py --speeds --folder FOLDER

Makes data/quality_smollm2_135m.csv; rows that are there already are not measured again, and what was measured before it was
stopped is kept by `llmlab.sweep`.
"Q4_K_M high" is Q4_K_M of the longer search, effort="high": the same types, as many bytes. `--speeds` measures nothing but how
fast each row's types write a token, on a machine that should be idle, and fills in two columns.
SmolLM2 can be had only quantized, so the original is `quality.unrounded` of it in F16. The text that llmlab ships is cut in
three, so that nothing is measured on what it was chosen by: its first 512 tokens say what each tensor's type costs (for the
mixes), the next two chunks of 512 are what is measured on, and the importance matrix is of eight chunks after those. A mix
has at most the bytes of the quant it is named after and uses the importance matrix. `--folder` keeps what takes long; it is
in llmlab's cache where none is given.
"""

import argparse
import csv
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from datetime import date
from functools import cached_property, lru_cache
from pathlib import Path

import psutil
import pytest

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

import llmlab  # noqa: E402
from llmlab import hardware, places, quality  # noqa: E402
from llmlab.benching.children import Child  # noqa: E402
from llmlab.quality.corpus import Tokens  # noqa: E402
from llmlab.quality.swapping import blocks_in, matrices, packed_in, swapped  # noqa: E402
from llmlab.requantizing import Plan, planned  # noqa: E402

pytestmark = pytest.mark.bench

CONTEXT, CHUNKS, TOLD, CALIBRATED = 512, 2, 512, 8
PLAIN = "Q8_0 Q4_K_M Q4_0 IQ4_XS Q3_K_S IQ3_S Q5_K_M Q4_K_S Q3_K_M Q6_K Q3_K_L Q2_K"
IMPORTANT = "Q4_K_M IQ4_XS Q4_0 Q3_K_S IQ3_S Q4_K_S Q3_K_M Q5_K_M Q3_K_L Q2_K"
MIXES = "Q4_K_M Q3_K_M Q3_K_S"
HIGH_PLAIN = "Q4_0 Q4_K_M IQ4_XS"
HIGH = "Q4_K_M Q4_0 IQ4_XS Q3_K_S Q3_K_M Q5_K_M Q6_K Q8_0 IQ3_S"
HIGH_MIXES = "Q4_K_M Q3_K_M Q3_K_S"
TYPES = ("Q4_0", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S")
COLUMNS = ("quant", "imatrix", "bytes", "bits_per_weight", "perplexity", "ratio", "ratio_error", "mean_kld", "mean_kld_error",
           "p99_kld", "rms_delta_p_percent", "same_top_percent", "source", "note", "tokens_per_second", "timed")
ROUNDS, BEFORE, WRITTEN = 5, 8, 64      # of timing; tokens read first; tokens written a round


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

    @cached_property
    def importance(self) -> quality.Importance:
        kept = self.folder / "importance.gguf"
        if not kept.exists():
            quality.importance(self.model, None, self._part(TOLD + CHUNKS * CONTEXT, CALIBRATED * CONTEXT), CONTEXT, False,
                               chunks=CALIBRATED, dataset="alice.txt").save(kept)
        return quality.read_importance(kept)

    @cached_property
    def costs(self) -> quality.Sensitivity:
        return quality.sensitivity(self.model, self._part(0, TOLD), TYPES, importance=self.importance, context=256, chunks=2,
                                   cache=self.folder / "costs.json", progress=False)

    def plan(self, name: str, weighed: bool) -> Plan:
        """What a row of that name is made of."""
        quant, importance = name.removeprefix("mix at ").removesuffix(" high"), self.importance if weighed else None
        theirs = planned(self.path, quant, importance)
        if not name.startswith("mix at "):
            return theirs
        types = {row.name: row.type for row in theirs.rows}
        best = quality.best_mix(self.costs, self.costs.bytes({name: types[name] for name in self.costs.elements}))
        return planned(self.path, quant, importance, types=best.types)

    def measured(self, types: Mapping[str, str], made: Callable) -> quality.Divergence:
        with ExitStack() as stack:
            for name, type in types.items():
                if name in self.found and type != self.found[name].packed.format:
                    stack.enter_context(swapped(self.found[name], made(name, type)))
            return quality.divergence(self.model, self.reference, progress=False)


def maker(lab: Lab, importance: Mapping | None, effort: str) -> Callable:
    """(tensor, type) -> packed; quants share many, and each is made once."""
    kept = {}

    def made(name: str, type: str):
        if (name, type) not in kept:
            matrix = lab.found[name]
            kept[name, type] = packed_in(matrix, type, blocks_in(matrix, type, importance, effort))
        return kept[name, type]

    return made


def row_of(name: str, important: bool, plan: Plan, found: quality.Divergence) -> dict:
    """A row of the table; sizes exact, the rest measured; how fast it is comes later."""
    counts = Counter(row.type for row in plan.rows if row.type != "F32")
    return dict(zip(COLUMNS, (
        name, f"{CALIBRATED} chunks" if important else "None", plan.file_bytes, f"{plan.bits_per_weight:.4f}",
        f"{found.perplexity.value:.4f}", f"{found.ratio.value:.5f}", f"{found.ratio.error:.5f}", f"{found.mean_kld.value:.6f}",
        f"{found.mean_kld.error:.6f}", f"{found.p99_kld:.5f}", f"{100 * found.rms_dp.value:.3f}",
        f"{100 * found.top1.value:.2f}",
        f"tests/bench/bench_rates.py, alice.txt, {found.tokens} tokens in {found.chunks} chunks of {found.context}",
        ", ".join(f"{count} {type}" for type, count in counts.most_common()), "", ""), strict=True))


def read(target: Path) -> list[dict]:
    return list(csv.DictReader(target.open())) if target.exists() else []


def write(target: Path, rows: list[dict]) -> None:
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@lru_cache(1)
def laboratory(folder: str) -> Lab:
    return Lab(Path(folder))


@lru_cache(1)
def making(folder: str, weighed: bool, effort: str) -> Callable:
    lab = laboratory(folder)
    return maker(lab, lab.importance if weighed else None, effort)


def compared(folder: str, types: dict, weighed: bool, effort: str) -> quality.Divergence:
    return laboratory(folder).measured(types, making(folder, weighed, effort))


def measure(lab: Lab, target: Path, asked: Iterable[tuple[str, bool]], jobs: int = 1) -> list[dict]:
    """Every row asked for, (name, whether with the importance matrix), that the file lacks; quants of the very same types are
    one point of the sweep."""
    rows = read(target)
    done = {(row["quant"], row["imatrix"] != "None") for row in rows}
    plans = {row: lab.plan(*row) for row in asked if row not in done}
    points = [{"folder": str(lab.folder), "types": {row.name: row.type for row in plan.rows}, "weighed": weighed,
               "effort": "high" if name.endswith(" high") else "normal"} for (name, weighed), plan in plans.items()]
    found = llmlab.sweep(compared, points, n_jobs=jobs, folder=lab.folder / "compared", on_error="raise").results
    rows += [row_of(name, weighed, plan, one) for ((name, weighed), plan), one in zip(plans.items(), found, strict=True)]
    write(target, rows)
    for row, one in zip(rows[-len(found):] if found else (), found, strict=True):
        print(f"{row['quant']:<18} imatrix {row['imatrix']:<9} {row['bits_per_weight']} bits  {one}", flush=True)
    return rows


def speeds(lab: Lab, target: Path) -> list[dict]:
    """Fills in how many tokens a second the lean decoder writes of each row's file, uncompiled, one at a time.

    A file of each set of types is made (without importances: they cost no time later), each gets a process of its own, and all
    take turns; what counts is the fastest round. Rows that no run of this machine could tell apart have the same number.
    """
    began, rows, alike, took = time.perf_counter(), read(target), {}, {}
    for row in rows:
        plan = lab.plan(row["quant"], row["imatrix"] != "None")
        types = {row.name: row.type for row in plan.rows if row.type != "F32"}
        alike.setdefault(tuple(sorted(types.items(), key=lambda item: -len(item[0]))), []).append(row)
    cpu = hardware.machine().cpu
    threads = max(1, min(cpu.cores or cpu.usable, cpu.usable))
    tokens = [8 + i * 7919 % 49000 for i in range(BEFORE + WRITTEN)]
    with tempfile.TemporaryDirectory(dir=lab.folder) as folder, ExitStack() as stack:
        children = {}
        for at, types in enumerate(alike):
            path = Path(folder) / f"{at}.gguf"
            llmlab.quantize_gguf(lab.path, path, "Q8_0", types=dict(types))
            children[types] = child = Child(path.name, "lean", threads)
            stack.callback(child.close)
            child.ask("open", job={"path": str(path), "threads": threads, "born": time.time(), "context": len(tokens),
                                   "name": "auto", "way": "decoder", "strategy": "auto", "dtype": None})
            child.ask("write", tokens=tokens[:BEFORE], after=tokens[:BEFORE])
            print(f"{time.perf_counter() - began:4.0f} s  {', '.join(row['quant'] for row in alike[types])}", flush=True)
        load = psutil.getloadavg()[0]
        for _ in range(ROUNDS):
            for types, child in children.items():
                seconds = child.ask("write", tokens=tokens[BEFORE:], after=tokens[:BEFORE])["seconds"]
                took[types] = min(seconds, took.get(types, seconds))
    timed = f"{cpu.name}, {threads} threads, {date.today()}"
    for types, named in alike.items():
        for row in named:
            row |= {"tokens_per_second": f"{WRITTEN / took[types]:.1f}", "timed": timed}
            print(f"{row['quant']:<18} {row['imatrix']:<9} {row['tokens_per_second']} tokens/s")
    write(target, rows)
    print(f"{timed}; load {load:.1f} before; {time.perf_counter() - began:.0f} s in all")
    return rows


def test_rates_of_two(tmp_path):
    lab, target = laboratory(str(tmp_path)), tmp_path / "rates.csv"
    rows = measure(lab, target, [("Q8_0", False), ("Q4_0", False), ("Q4_0 high", False)])
    low, high, longer = (float(row["mean_kld"]) for row in rows)
    assert 0 < low < longer < high
    rows = speeds(lab, target)
    assert all(float(row["tokens_per_second"]) > 0 for row in rows) and rows == read(target)
    assert rows[1]["tokens_per_second"] == rows[2]["tokens_per_second"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=TOP / "data" / "quality_smollm2_135m.csv")
    parser.add_argument("--folder", type=Path)
    for option, usual in (("plain", PLAIN), ("important", IMPORTANT), ("mixes", MIXES), ("high-plain", HIGH_PLAIN),
                          ("high", HIGH), ("high-mixes", HIGH_MIXES)):
        parser.add_argument(f"--{option}", default=usual)
    parser.add_argument("--jobs", type=int, default=1, help="processes; each holds the model")
    parser.add_argument("--speeds", action="store_true")
    given = parser.parse_args()
    asked = [(quant, False) for quant in given.plain.split()] + [(quant, True) for quant in given.important.split()]
    asked += [(f"mix at {quant}", True) for quant in given.mixes.split()]
    asked += [(f"{quant} high", False) for quant in given.high_plain.split()]
    asked += [(f"{quant} high", True) for quant in given.high.split()]
    asked += [(f"mix at {quant} high", True) for quant in given.high_mixes.split()]
    folder = given.folder or places.cache() / "rates"
    folder.mkdir(parents=True, exist_ok=True)
    lab = laboratory(str(folder))
    speeds(lab, given.csv) if given.speeds else measure(lab, given.csv, asked, given.jobs)
