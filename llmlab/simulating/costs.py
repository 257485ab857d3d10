"""What one step of a server takes in seconds: weights read once for all of its rows, or multiplied by each; a cache read.

A step is few large kernels after each other, and in a matrix multiplication reading and arithmetic overlap: of the two the
longer one counts (the roofline: Williams, Waterman and Patterson, 2009), for the blocks, their experts and the output matrix
separately, as they come one after another. The cache that generated tokens look at is read besides, the attention of prompts
is arithmetic, kernels are started and sequences looked after whatever the rest is. All modelled, in bands of seconds (slow,
usual, fast) as in `speed`, whose figures these are: for one sequence alone both say the same.

Experts: n rows touch the share 1 - (1 - k/E)^n of them, as if each chose k of E evenly and apart from the others. Sliding
windows: a row looks at no more than the window's cells of such a layer. Not modelled: speculation, cards that wait for each
other (only the kernels of their exchanges), and adapters.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import LabError
from ..fitting import Report, fit
from ..memory import PAGE, cache_bytes
from ..rates import Band, half_attention, halves
from ..speed import EXPERT_PREFILL, reading
from ..units import GIB

HOST = (25e-6, 12e-6, 6e-6)            # seconds a sequence a step: scheduling, sampling and text in vLLM's Python; the first
                                       # one's is hidden behind the kernels. Two rows of gpt-oss with and without asynchronous
                                       # scheduling differ by 6 ms at some 500 sequences (gpustack/gpustack, performance-lab)
LARGE = 70 * GIB                       # vLLM's defaults (vllm/engine/arg_utils.py): rows and sequences of a step on cards with
LARGE_STEP, SMALL_STEP = (8192, 1024), (2048, 256)     # at least that and newer than the A100, and on others


class Load(NamedTuple):
    """What one step asks for. `rows`: tokens that go through the blocks, padding too; `sequences` they are of; `wanted`: rows
    of logits. `cells`: cached tokens that generated ones look at, summed over them; `pairs`: the same of a prompt's tokens.
    Those of sliding layers apart, where a window hides the rest. `looked`: cells that each sequence looks at, once for all of
    its rows."""

    rows: int
    sequences: int
    wanted: int
    cells: int = 0
    pairs: int = 0
    window_cells: int = 0
    window_pairs: int = 0
    looked: int = 0


def load_of(parts: Iterable[tuple[int, int, bool]], window: int = 0) -> Load:
    """The load of a step from its parts: (tokens that came before, tokens computed now, whether the logits after the last are
    wanted). A token looks at itself too."""
    rows = sequences = wanted = cells = pairs = window_cells = window_pairs = looked = 0
    for first, count, last in parts:
        rows += count
        sequences += 1
        wanted += last
        looked += first + count
        if count == 1:
            cells += first + 1
            if window:
                window_cells += min(first + 1, window)
        else:
            pairs += count * first + count * (count + 1) // 2
            if window:
                grows = min(max(window - first, 0), count)       # rows that see all before them
                window_pairs += grows * first + grows * (grows + 1) // 2 + (count - grows) * window
    return Load(rows, sequences, wanted, cells, pairs, window_cells, window_pairs, looked)


class Matrices(NamedTuple):
    """Weights that every row is multiplied with: seconds to read them all once, and of one row's arithmetic. `share`: of them,
    what one row uses (below 1: experts)."""

    read: Band
    row: Band
    share: float = 1.0

    def seconds(self, rows: int, band: int) -> float:
        """Of a step with that many rows."""
        touched = 1.0 if self.share == 1.0 else 1 - (1 - self.share) ** rows
        return max(self.read[band] * touched, self.row[band] * rows) if rows else 0.0


NONE: Band = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, each as (slow, usual, fast). `step`: whatever is in it; `sequence`: each beyond the first; `state`:
    what each sequence keeps besides a cache, read and written; `cell`, `pair` as in Load, of all layers together. `why` says
    what it rests on, `kind` whether that is "modelled" or "measured"."""

    blocks: Matrices
    head: Matrices
    experts: Matrices = Matrices(NONE, NONE)
    step: Band = NONE
    sequence: Band = NONE
    state: Band = NONE
    cell: Band = NONE
    pair: Band = NONE
    window_cell: Band = NONE
    window_pair: Band = NONE
    window: int = 0
    kind: str = "modelled"
    why: str = ""

    def seconds(self, load: Load, band: int = 1) -> float:
        """Seconds of a step: band 0 slow, 1 usual, 2 fast."""
        rows, sequences, wanted, cells, pairs, window_cells, window_pairs, _ = load
        return (self.step[band] + self.sequence[band] * max(sequences - 1, 0) + self.state[band] * sequences
                + self.blocks.seconds(rows, band) + self.experts.seconds(rows, band) + self.head.seconds(wanted, band)
                + self.cell[band] * cells + self.pair[band] * pairs
                + self.window_cell[band] * window_cells + self.window_pair[band] * window_pairs)


@dataclass(frozen=True)
class Setup:
    """A model served on cards: what a step costs, how many blocks of `size` tokens its memory holds (low, best, high), and how
    much of it is in one step. `context`: the longest sequence."""

    title: str
    cost: Cost
    blocks: tuple[int, int, int]
    rows: int
    sequences: int
    context: int
    cell_bytes: float
    size: int = PAGE

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values fit."""
        return self.blocks[1] * self.size


def setup(spec, gpu, quant: str | None = None, context: int = 2048, kv: str | tuple[str, str] = "f16",
          utilization: float | None = None, rows: int | None = None, sequences: int | None = None) -> Setup:
    """A model served by vLLM on a card or several (tensor-parallel), as modelled: `simulate_setup` runs it.

    spec, gpu, quant, kv, utilization: as `llmlab.fit` takes them. context: the longest sequence in tokens. rows, sequences:
    most in one step; None: vLLM's defaults for such a card. Raises LabError for what does not fit, or has no rates.
    """
    report = fit(spec, gpu, quant=quant, context=context, kv=kv, engine="vllm", utilization=utilization)
    return setup_of(report, rows, sequences)


def setup_of(report: Report, rows: int | None = None, sequences: int | None = None) -> Setup:
    """The same from a report of `llmlab.fit(engine="vllm")`; its context is the longest sequence."""
    cost, s = cost_of(report), report.settings
    needs = [report.total("kv_cache", f"gpu{i}") + report.total("recurrent", f"gpu{i}") for i in range(len(report.cards))]
    if not all(needs):
        raise LabError(f"{report.spec.name} keeps no cache that grows; there are no blocks to share out")
    low, best, high = (min(int(r.pool[k] / need * s.context) // PAGE for r, need in zip(report.reserved, needs, strict=True))
                       for k in range(3))
    names = f"{len(report.cards)} x {report.cards[0].name}" if len(report.cards) > 1 else report.cards[0].name
    if best * PAGE < s.context:
        raise LabError(f"{report.spec.name} in {s.quant} leaves {names} room for {best * PAGE:,} tokens, fewer than one "
                       f"sequence of {s.context:,}; choose a smaller quant, a shorter context, or more memory")
    large = all(card.memory >= LARGE and "a100" not in card.id for card in report.cards)
    usual = LARGE_STEP if large else SMALL_STEP
    return Setup(f"{report.spec.title} {s.quant} on {names}", cost, (low, best, high), rows or usual[0], sequences or usual[1],
                 s.context, sum(needs) / s.context)


def cost_of(report: Report) -> Cost:
    """What a step takes by the rates that `llmlab.fit(engine="vllm")` reports. Raises LabError for other engines and places,
    and where a card's rates are not known."""
    spec, s, cards = report.spec, report.settings, report.cards
    if s.engine != "vllm" or not cards:
        raise LabError("many requests at once are modelled as vLLM serves them on cards: fit(..., gpu, engine='vllm'); for "
                       "this machine fit_cost learns from measured steps")
    if not report.speed.parts or any(not card.fp16_flops for card in cards):
        raise LabError(f"the catalogue has no rates for {cards[0].name}; choose a card with bandwidth and half-precision rate")
    parts = {part.what: part for part in report.speed.parts}
    weak, n = min(cards, key=lambda card: card.bandwidth), len(cards)
    r = reading(spec, s.quant, s.importance)
    dense, held, head = r.dense[0][-1] / n, r.held[-1] / n, r.output.bytes / n
    byte = _each(parts["weights"])                            # seconds a byte, slow to fast
    operation = _inverse(halves(weak, s.quant))
    weight = {"blocks": r.dense[3][-1] / n, "experts": r.experts[3][-1] / n / EXPERT_PREFILL, "head": r.output.weights / n}
    row = {name: _times(2 * count, operation) for name, count in weight.items()}
    attend = _inverse(half_attention(weak))
    c = cache_bytes(spec, s.context, s.kv, engine="vllm", ubatch=s.batch)
    cached = _each(parts["cache"]) if "cache" in parts else NONE
    used = sum(r.experts[0]) and r.experts[0][-1] / r.held[-1]
    return Cost(
        blocks=Matrices(_times(dense, byte), row["blocks"]),
        head=Matrices(_times(head, byte), row["head"]),
        experts=Matrices(_times(held, byte), row["experts"], used or 1.0),
        step=parts["kernels"].seconds, sequence=HOST,
        state=_times(2 * c.recurrent / n, cached),
        cell=_times(c.full / c.cells / n, cached),
        window_cell=_times(c.sliding / c.cells_sliding / n if c.cells_sliding else 0.0, cached),
        pair=_times(r.attention[-1] / n, attend), window_pair=_times(r.windowed[-1] / n, attend), window=r.window,
        why=f"{spec.title} in {s.quant}: {(dense + held + head) * n / 1e9:.3g} GB of weights, read at "
            f"{1e-9 / byte[1]:,.0f} GB/s and multiplied at {1e-12 / operation[1]:.0f} TFLOP/s"
            + (f" on each of {n} cards" if n > 1 else ""))


def _each(part) -> Band:
    return _times(1 / part.amount, part.seconds)


def _inverse(rate: Band) -> Band:
    return 1 / rate[0], 1 / rate[1], 1 / rate[2]


def _times(amount: float, each: Band) -> Band:
    return amount * each[0], amount * each[1], amount * each[2]
