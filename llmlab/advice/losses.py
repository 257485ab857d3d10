"""What a quant and a quantized cache are expected to cost of a score, from four tables that somebody measured.

The chain, each link with its spread; `expected` puts it together:

1. How far answers drift (mean KL divergence) by quant and by cache type: Llama 3 8B, data/quality_llama3_8b.csv and
   data/kv_quality_llama3_8b.csv, less what the 16-bit rows drift there. Weights and cache err independently: drifts add.
2. What share of what is above guessing goes with it: MMLU of the same model and quants, data/mmlu_by_quant_llama3.csv. The
   share is 0.65 times the divergence, from 0.45 to 0.81, in a straight line from Q6_K down to IQ1_M.
3. How that grows for smaller models and shrinks for larger: as a power of the parameters. Downwards from the divergence of
   SmolLM2 135M (data/quality_smollm2_135m.csv; the two quants that are there what they are called), upwards from MMLU of
   Llama 3 70B. Beyond those two nothing was measured, and nothing more is assumed.

What is not measured and taken for granted: that other families lose what Llama 3 does, and other tasks what MMLU does. Answers
of many tokens may lose more (one slip spoils a program), so for those the far end of the share is twice as far: a choice.
"""

import math
import statistics
from functools import cache

from .. import catalog
from .published import Band, Benchmark

FEWEST, MOST = "smollm2-135m", "llama-3-70b"     # the models the growth is known between
MEASURED = "llama-3-8b"
CERTAIN = 0.005            # a share of what is above guessing that 14,042 questions, the same ones, tell from nothing
CERTAIN_OF_FEWER = 0.02    # and 2,850
SPENT = 0.95               # beyond it nothing is left to lose: guessing
WRITTEN = 2.0              # times the far end of the share, for answers of many tokens: assumed


def importance_of(quant: str) -> bool | None:
    """Whether the row of a quant is of one with an importance matrix: without, where both were measured; None: no row."""
    rows = catalog.quality()
    return False if (quant, False) in rows else True if (quant, True) in rows else None


def drift(quant: str, kv: tuple[str, str] = ("f16", "f16"), published: str | None = None) -> float | None:
    """Mean KL divergence in nats of Llama 3 8B in a quant, with a cache of those types, from 16 bits; None where nobody
    measured it. `published`: the quant a model came in, which is its own original."""
    rows, caches = catalog.quality(), catalog.kv_quality()
    if kv not in caches:
        return None
    of_cache = max(caches[kv].mean_kld - caches["f16", "f16"].mean_kld, 0.0)
    if quant in (published, "F32", "BF16", "F16"):
        return of_cache
    importance = importance_of(quant)
    if importance is None:
        return None
    return max(rows[quant, importance].mean_kld - rows["F16", False].mean_kld, 0.0) + of_cache


@cache
def share_of_drift() -> Band:
    """What share of the points above guessing goes for each nat of divergence: low, usual, high over the quants measured."""
    rows = catalog.mmlu_by_quant()
    top = rows[MEASURED, "F16"]
    shares = []
    for (model, quant), score in rows.items():
        nats = _drift_with_matrix(quant)
        if model == MEASURED and nats and CERTAIN < (lost := (top - score) / (top - 25)) < SPENT:
            shares.append(lost / nats)
    return min(shares), statistics.median(shares), max(shares)


def _drift_with_matrix(quant: str) -> float | None:
    """As `drift`, but of the files that MMLU was measured on: quantized with an importance matrix where there is a row."""
    rows = catalog.quality()
    row = rows.get((quant, True)) or rows.get((quant, False))
    return row and row.mean_kld - rows["F16", False].mean_kld


@cache
def growth() -> tuple[Band, Band]:
    """Powers by which losses grow as a model is smaller than Llama 3 8B, and shrink as it is larger: low, usual, high."""
    entries, ours, theirs = catalog.entries(), catalog.measured_quality(), catalog.quality()
    smaller = math.log(entries[MEASURED].params_total / entries[FEWEST].params_total)
    larger = math.log(entries[MOST].params_total / entries[MEASURED].params_total)
    down = [math.log(ours[key].mean_kld / theirs[key].mean_kld) / smaller for key in (("Q4_0", False), ("IQ4_XS", True))]
    rows = catalog.mmlu_by_quant()
    # 70B was not measured in 16 bits: Q5_K_M, of which 8B loses three quarters of a percent, stands for it
    top, top_large = rows[MEASURED, "F16"], rows[MOST, "Q5_K_M"]
    up = []
    for (model, quant), score in rows.items():
        if model == MOST:
            large, small = (top_large - score) / (top_large - 25), (top - rows[MEASURED, quant]) / (top - 25)
            if large > CERTAIN_OF_FEWER and small < SPENT:
                up.append(math.log(small / large) / larger)
    return (min(down), statistics.mean(down), max(down)), (min(up), statistics.median(up), max(up))


def times(entry: catalog.Entry) -> Band:
    """How many times Llama 3 8B's loss a model's is: low, usual, high. Of a mixture of experts the low end is that of a dense
    model of all its parameters, the high end of one of the active ones, and between them their geometric mean."""
    sizes = entry.params_total, math.sqrt(entry.params_total * entry.params_active), entry.params_active
    if not entry.params_experts:
        sizes = (entry.params_total,) * 3
    low, best, high = map(_times, sizes)
    return low[0], best[1], high[2]


def _times(params: float) -> Band:
    entries, (down, up) = catalog.entries(), growth()
    measured = entries[MEASURED].params_total
    params = min(max(params, entries[FEWEST].params_total), entries[MOST].params_total)
    powers = down if params < measured else up
    return tuple(sorted((measured / params) ** power for power in powers))


def share_lost(entry: catalog.Entry, nats: float, written: bool) -> Band:
    """What share of the points above guessing a model loses: low, usual, high; `nats`: its quant's and cache's `drift`."""
    low, best, high = (min(nats * share * grown, 1.0) for share, grown in zip(share_of_drift(), times(entry), strict=True))
    return low, best, min(high * WRITTEN, 1.0) if written else high


def points_lost(benchmark: Benchmark, score: float, share: float) -> float:
    """Points of a score that go with a share of what is above guessing. For ratings (Elo): as if that share of answers lost
    against the unquantized model's, and the rest drew with them."""
    if benchmark.elo:
        return 400 * math.log10((1 + share) / (1 - min(share, 0.999)))
    return share * max(score - benchmark.chance, 0.0)


def expected(entry: catalog.Entry, benchmark: Benchmark, published: Band, nats: float) -> tuple[Band, Band]:
    """The score to expect and the points lost, each low, usual, high. The low score is the low end of what was published, less
    the most that may be lost of that."""
    shares = share_lost(entry, nats, benchmark.written)
    left = tuple(score - points_lost(benchmark, score, share) for score, share in zip(published, shares[::-1], strict=True))
    return left, tuple(points_lost(benchmark, published[1], share) for share in shares)
