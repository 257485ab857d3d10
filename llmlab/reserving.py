"""vLLM's memory: a share of each card is reserved, and what weights and a profiled batch leave of it holds KV pages.

Read in vLLM 0.33 (v1/worker/gpu_worker.py, v1/worker/utils.py, v1/kv_cache_interface.py, v1/core/kv_cache_planning.py):
requested = utilization x the memory CUDA shows; the pool = requested - (weights + what else the process took + the peak of a
dummy batch + CUDA graphs). The context and NCCL's buffers exist before the first look at the card: they lie outside.
Several cards work tensor-parallel.
"""

from dataclasses import dataclass
from typing import NamedTuple

from .architectures import Tensor
from .catalog import Gpu, overheads
from .errors import LabError
from .formats import FORMATS
from .formats.mixes import find_mix
from .memory import PAGE, CacheBytes, Term, exact, loaded_bytes, modelled, weights
from .overhead import Measured, overhead_term, parts
from .settings import Settings
from .shapes import ModelSpec, remembered

SEQUENCES_PROFILED = 256             # max_num_seqs: rows of logits in the dummy batch
_REPLICATED = ("ffn_gate_inp.", "attn_kv_a_mqa.", "attn_q_a.")


@dataclass(frozen=True, slots=True)
class Reservation:
    """What vLLM asks of one card and what of it is left for KV pages, bytes (low, best, high of the pool)."""

    requested: int
    free_at_start: tuple[int, int, int]
    pool: tuple[int, int, int]
    concurrent: float                    # requests of the whole context that the pool (best) holds at once
    outside: int                         # of the overhead, what lies beside the reservation

    def room(self, free: int) -> int:
        """Bytes of a card that count for the verdict: the reservation and what lies beside it."""
        return min(free, self.requested + self.outside)

    @property
    def starts(self) -> str:
        """vLLM refuses to start where less than its share is free: "fits", "may spill" or "does not fit"."""
        low, _, high = self.free_at_start
        return "fits" if self.requested <= low else "may spill" if self.requested <= high else "does not fit"


def check_parallel(spec: ModelSpec, cards: tuple[Gpu, ...]) -> None:
    """Raise LabError where the heads do not divide over the cards."""
    heads = max((b.heads for b in spec.blocks if b.attends), default=0)
    if len(cards) > 1 and heads % len(cards):
        raise LabError(f"vLLM gives each card the same number of heads; {heads} heads do not divide over {len(cards)} cards")


class Stage(NamedTuple):
    """Blocks `first` to before `last`, on `cards` cards that share each of them; the first stage embeds, the last one
    makes logits."""

    first: int
    last: int
    cards: int
    embeds: bool = True
    ends: bool = True

    def holds(self, spec: ModelSpec, tensor: Tensor) -> bool:
        """Whether a tensor lies here; a table that is embedding and output lies in both stages."""
        if tensor.layer >= 0:
            return self.first <= tensor.layer < self.last
        if tensor.name.startswith("output"):
            return self.ends
        return self.embeds or self.ends and spec.tied and tensor.name == "token_embd.weight"


def vllm_terms(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, c: CacheBytes,
               measured: tuple[Measured | None, ...] = (), stages: tuple[Stage, ...] = ()) -> list[Term]:
    """The terms of each card (of the host where there is none): its shard of the weights, the pages one full use of the
    context needs, the profiled batch, and the rest. `stages`: of a pipeline, that of each card."""
    n = max(len(cards), 1)
    tokens = min(s.batch, s.context)
    row = overheads()["vllm-graphs"]
    graphs = (row.low, row.value, row.high) if cards else (0, 0, 0)
    terms = []
    for i in range(n):
        device = f"gpu{i}" if cards else "host"
        stage = stages[i] if stages else Stage(0, len(spec.layers), n)
        blocks = spec.layers[stage.first:stage.last]
        wide = max((_wide(b) for b in blocks if not b.mtp), default=0)
        best = 2 * tokens * (3 * wide // stage.cards + 3 * spec.width)
        best += 3 * 4 * spec.vocab * min(SEQUENCES_PROFILED, tokens) * stage.ends
        shard = f", one of {stage.cards} shards" if stage.cards > 1 else ""
        if stages:
            shard += f", of blocks {stage.first} to {stage.last - 1}"
        terms += [exact("weights", device, shard_bytes(spec, s.quant, stage.cards, stage),
                        f"parameters as vLLM holds them{shard}"),
                  exact("kv_cache", device, _cache_share(spec, c, stage),
                        f"pages of {PAGE} tokens for the whole context, K and V {s.kv[0]}")]
        if c.recurrent:
            state = sum(c.recurrent_by_layer[stage.first:stage.last])
            terms.append(exact("recurrent", device, -(-state // stage.cards), "state of recurrent layers, one a sequence"))
        terms.append(modelled("compute", device, best + graphs[1], best * 0.6 + graphs[0], best * 1.6 + graphs[2],
                              f"peak of a dummy batch of {tokens} tokens with its logits, and CUDA graphs"))
        if cards:
            terms.append(overhead_term(cards[i], device, "vllm", n, s.display, measured[i] if measured else None))
    if cards:
        terms.append(exact("weights", "host", 0, "nothing stays in RAM once loaded"))
    return terms


def _wide(block) -> int:
    experts = block.expert_ff * block.experts_used
    return max(block.ff, experts + block.shared_ff)


@remembered
def shard_bytes(spec: ModelSpec, quant: str, n: int, stage: Stage | None = None) -> int:
    """Bytes of weights on each of `n` cards: matrices split, vectors and routers whole, K and V heads repeated where there
    are fewer of them than cards. `stage`: only what lies there."""
    if n == 1 and (stage is None or stage == Stage(0, len(spec.layers), 1)):
        return loaded_bytes(spec, quant)
    mix = find_mix(quant)
    plain = FORMATS[mix.default].bytes(1) if mix.engine == "llama.cpp" else 0       # F16 and the like: vectors too
    total = whole = repeated = 0
    for tensor, size in zip(spec.tensors, weights(spec, quant).bytes, strict=True):
        if tensor.name.startswith("rope_") or spec.is_mtp(tensor) or stage and not stage.holds(spec, tensor):
            continue
        size = plain * tensor.elements or size
        total += size
        if len(tensor.shape) == 1 or any(part in tensor.name for part in _REPLICATED):
            whole += size
        elif tensor.layer >= 0 and tensor.bare.startswith(("attn_k.", "attn_v.")):
            heads = spec.layers[tensor.layer].kv_heads or 1
            repeated += size * max(n - heads, 0) // heads if heads < n else 0
    return -(-(total - whole + repeated) // n) + whole


def _cache_share(spec: ModelSpec, c: CacheBytes, stage: Stage) -> int:
    """KV bytes on each card of a stage: heads are split, and repeated where there are fewer than cards; MLA's one row is
    on every card."""
    share, n = 0, stage.cards
    for layer, bytes in zip(spec.layers[stage.first:stage.last], c.by_layer[stage.first:stage.last], strict=True):
        heads = 1 if layer.mixer == "mla" else layer.kv_heads or 1
        share += bytes * max(1, -(-heads // n)) // heads
    return share


def reservations(cards: tuple[Gpu, ...], s: Settings, terms: list[Term],
                 measured: tuple[Measured | None, ...] = ()) -> tuple[Reservation, ...]:
    """What vLLM reserves on each card and what it leaves for pages."""
    found = []
    for i, card in enumerate(cards):
        mine = [t for t in terms if t.device == f"gpu{i}"]
        kept, outside, inside = _split_overhead(card, s, len(cards), measured[i] if measured else None)
        visible = card.memory - (kept if card.free is None else card.reserved[1])
        requested = int(visible * s.share)
        need = sum(t.bytes for t in mine if t.name in ("kv_cache", "recurrent"))
        other = [t for t in mine if t.name in ("weights", "compute")]
        low, best, high = (requested - sum(getattr(t, what) for t in other) - inside[k]
                           for k, what in ((2, "high"), (1, "bytes"), (0, "low")))
        free = visible if card.free is None else card.free
        pool = tuple(max(size, 0) for size in (low, best, high))
        found.append(Reservation(requested, tuple(free - outside[k] for k in (2, 1, 0)), pool,
                                 pool[1] / need * s.sequences if need else 0.0, kept + outside[1]))
    return tuple(found)


def _split_overhead(card: Gpu, s: Settings, cards: int,
                    measured: Measured | None) -> tuple[int, tuple[int, int, int], tuple[int, int, int]]:
    """Of the overhead: what CUDA does not show (best), what lies beside the reservation, and what inside (low, best, high)."""
    hidden, sums = 0, [[0, 0, 0], [0, 0, 0]]
    for part in parts(card, "vllm", cards, s.display, measured):
        if part.hidden:
            hidden += part.best
            continue
        mine = sums[part.inside]
        for k, value in enumerate((part.low, part.best, part.high)):
            mine[k] += value
    return hidden, tuple(sums[0]), tuple(sums[1])
