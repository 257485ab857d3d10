"""What each type of KV cache costs the real model: divergence from an exact cache, by depth, and needles found in a haystack.

    python tests/bench/bench_cache_quality.py [--csv FILE] [--needles FILE] [--only divergence|depth|needles] [--jobs N]

Makes data/kv_quality_smollm2_135m.csv and data/kv_needles_smollm2_135m.csv; rows that are there already are not measured again,
and what was measured before it was stopped is kept by `llmlab.sweep`. SmolLM2 135M Instruct with the weights of its file (Q4_1,
Q8_0), multiplied in float32, so that nothing differs but the cache; the text is the beginning of the one llmlab ships, read as
one chunk of `CONTEXT` tokens (`LONG` for those of `DEEP`), and every token but the last is scored.
"""

import argparse
import csv
import functools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

import llmlab  # noqa: E402
from llmlab.quality import CacheDivergence, CacheSettings, Needles, cache_divergences, find_needles  # noqa: E402
from llmlab.runtime.decoder import Decoder  # noqa: E402

pytestmark = pytest.mark.bench

CONTEXT, LONG = 1024, 4096
PLAIN = [CacheSettings.of(kind) for kind in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "fp8", "bf16", "f16")]
PAIRS = [CacheSettings(k, v) for k, v in (("q8_0", "q4_0"), ("q4_0", "q8_0"), ("f16", "q4_0"), ("q4_0", "f16"))]
ROTATED = [CacheSettings(k, v, rotate=True) for k, v in (
    ("q8_0", "q8_0"), ("q5_1", "q5_1"), ("q5_0", "q5_0"), ("q4_1", "q4_1"), ("q4_0", "q4_0"), ("iq4_nl", "iq4_nl"),
    ("fp8", "fp8"), ("q8_0", "q4_0"))]
NEAR = [CacheSettings("q4_0", "q4_0", rotate, recent, sinks)
        for rotate, recent, sinks in ((False, 0, 4), (False, 128, 0), (False, 128, 4), (True, 128, 4))]
GROUPS = (PLAIN[:6] + PAIRS[:2], ROTATED[:6] + PAIRS[2:],                # read side by side
          [PLAIN[6], PLAIN[8], *NEAR[2:]], [PLAIN[7], *ROTATED[6:], *NEAR[:2], CacheSettings("f16", "q5_1")])
DEEP = [CacheSettings.of("q8_0"), CacheSettings.of("q4_0"), CacheSettings("q4_0", "q4_0", rotate=True)]
SEARCHED = [CacheSettings.of(kind) for kind in ("f32", "q4_0", "q8_0")] + [
    ROTATED[4], *PAIRS[:2], CacheSettings.of("q5_1"), CacheSettings.of("iq4_nl")]
HIDDEN, TRIALS, PLACES = 1024, 1, tuple(place / 8 for place in range(9))     # tokens, haystacks of so many, depths
EDGES = (0, 512, 1024, 2048, 4096)
SETTINGS = ("k", "v", "rotate", "recent", "sinks")
COLUMNS = (*SETTINGS, "bits_per_value", "context", "tokens", "perplexity", "ratio", "ratio_error", "mean_kld", "mean_kld_error",
           "p99_kld", "rms_delta_p_percent", "same_top_percent", *(f"kld_to_{edge}" for edge in EDGES[1:]), "source", "note")
NEEDLES = (*SETTINGS, "length", "depth", "needles", "found", "preferred", "log_likelihood", "margin", "source")


class Rows:
    """A table on disk that grows a row at a time; `of` are the columns that tell rows apart."""

    def __init__(self, path: Path, columns: Sequence[str], of: Sequence[str]):
        self.path, self.columns, self.of = path, columns, of
        self.rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []

    def has(self, **values) -> bool:
        return any(all(row[name] == str(values[name]) for name in self.of) for row in self.rows)

    def add(self, row: dict) -> None:
        new = not self.path.exists()
        self.rows.append({name: str(value) for name, value in row.items()})
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


def settings_of(cache: CacheSettings) -> dict:
    return {name: getattr(cache, name) for name in SETTINGS}


def row_of(found: CacheDivergence) -> dict:
    """A row of the table: bits exact, the rest measured."""
    depths = {row["to"]: row["mean_kld"] for row in found.by_depth(EDGES)}
    return settings_of(found.cache) | {
        "bits_per_value": f"{found.cache.bits:g}", "context": found.context, "tokens": found.tokens,
        "perplexity": f"{found.perplexity.value:.4f}", "ratio": f"{found.ratio.value:.5f}",
        "ratio_error": f"{found.ratio.error:.5f}", "mean_kld": f"{found.mean_kld.value:.4g}",
        "mean_kld_error": f"{found.mean_kld.error:.2g}", "p99_kld": f"{found.p99_kld:.4g}",
        "rms_delta_p_percent": f"{100 * found.rms_dp.value:.3f}", "same_top_percent": f"{100 * found.top1.value:.2f}",
        **{f"kld_to_{edge}": f"{depths[edge]:.4g}" if edge in depths else "" for edge in EDGES[1:]},
        "source": f"tests/bench/bench_cache_quality.py, alice.txt, {found.tokens} tokens in {found.chunks} chunk"
                  f"{'s' if found.chunks > 1 else ''} of {found.context}",
        "note": "" if not found.cache.recent + found.cache.sinks else "bits without the tokens kept in f16"}


def diverging(model: Path, caches: tuple, context: int, chunks: int) -> list[CacheDivergence]:
    """Side by side on one reading of the reference."""
    return cache_divergences(model, caches, None, context, chunks=chunks, progress=False)


def measure(target: Path, model: Path, groups: Iterable[Sequence[CacheSettings]], context: int = CONTEXT, chunks: int = 1,
            jobs: int = 1, folder: Path | None = None) -> list[dict]:
    """Rows of every cache that the table lacks, a group a point."""
    table = Rows(target, COLUMNS, (*SETTINGS, "context"))
    missing = [tuple(one for one in group if not table.has(context=context, **settings_of(one))) for group in groups]
    points = [{"model": model, "caches": group, "context": context, "chunks": chunks} for group in missing if group]
    for group in llmlab.sweep(diverging, points, n_jobs=jobs, folder=folder, on_error="raise").results:
        for found in group:
            table.add(row_of(found))
            print(found, flush=True)
    return table.rows


@functools.cache
def opened(model: Path) -> Decoder:
    return Decoder.open(model, torch.float32, "compact")


def searched(model: Path, cache: CacheSettings, length: int, places: tuple, trials: int) -> Needles:
    return find_needles(opened(model), cache, length, places, trials=trials)


def search(target: Path, model: Path, caches: Iterable[CacheSettings], length: int = HIDDEN, trials: int = TRIALS,
           places: Sequence[float] = PLACES, jobs: int = 1, folder: Path | None = None) -> list[dict]:
    """Rows of every cache that the table of needles lacks, one for each depth."""
    table = Rows(target, NEEDLES, (*SETTINGS, "length"))
    source = f"tests/bench/bench_cache_quality.py, {trials} haystack{'s' if trials > 1 else ''} of {length} tokens"
    points = [{"model": model, "cache": cache, "length": length, "places": tuple(places), "trials": trials}
              for cache in caches if not table.has(length=length, **settings_of(cache))]
    done = llmlab.sweep(searched, points, n_jobs=jobs, folder=folder, on_error="raise")
    for point, found in zip(points, done.results, strict=True):
        print(found, flush=True)
        for row in found.by_depth():
            table.add(settings_of(point["cache"]) | {
                "length": length, "depth": row["depth"], "needles": row["needles"], "found": f"{row['found']:g}",
                "preferred": f"{row['preferred']:g}", "log_likelihood": f"{row['log_likelihood']:.3f}",
                "margin": f"{row['margin']:.3f}", "source": source})
    return table.rows


def test_divergence_of_two(tmp_path):
    rows = measure(tmp_path / "rows.csv", llmlab.fetch("smollm2-135m"), [PLAIN[:5:4]], 128, folder=tmp_path / "kept")
    low, high = (float(row["mean_kld"]) for row in rows)
    assert 0 < 10 * low < high


def test_needles_of_two_depths(tmp_path):
    rows = search(tmp_path / "rows.csv", llmlab.fetch("smollm2-135m"), SEARCHED[:1], 256, 1, (0.0, 1.0),
                  folder=tmp_path / "kept")
    assert [row["found"] for row in rows] == ["1", "1"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=TOP / "data" / "kv_quality_smollm2_135m.csv")
    parser.add_argument("--needles", type=Path, default=TOP / "data" / "kv_needles_smollm2_135m.csv")
    parser.add_argument("--only", choices=("divergence", "depth", "needles"))
    parser.add_argument("--jobs", type=int, default=1, help="processes; each holds the model")
    given = parser.parse_args()
    path = llmlab.fetch("smollm2-135m")
    if given.only in (None, "divergence"):
        measure(given.csv, path, GROUPS, jobs=given.jobs)
    if given.only in (None, "needles"):
        search(given.needles, path, SEARCHED, jobs=given.jobs)
    if given.only in (None, "depth"):
        measure(given.csv, path, [DEEP], LONG)
