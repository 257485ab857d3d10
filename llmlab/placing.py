"""Where things go: which card holds which block, and the terms that follow on every device.

Pure functions from shapes, sizes and settings to terms; nothing here judges.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from struct import pack, unpack

from .activations import cache_type, compute_term, recurrent_bytes
from .catalog import Gpu
from .graphs import Request, compute_terms
from .memory import (
    CacheBytes,
    Term,
    Weights,
    cache_bytes,
    exact,
    loaded_bytes,
    output_bytes,
)
from .overhead import Measured, overhead_term
from .repacking import repacked_term
from .settings import Settings
from .shapes import ModelSpec

_STATE = "float32 state of recurrent layers, a row a sequence"


@dataclass(frozen=True)
class Here:
    """What is known of the very computer: its processor's features, and what was measured on its cards, by name.
    None: not known, or not measured."""

    features: tuple[str, ...] | None = None
    measured: tuple[tuple[str, Measured], ...] = ()

    def measured_on(self, card: Gpu) -> Measured | None:
        return next((found for name, found in self.measured if name == card.name), None)


NOWHERE = Here()


def free_bytes(card: Gpu) -> int:
    """Bytes a model may use: what is free on a live card, all of a catalogued one (overhead is its own term)."""
    return card.memory if card.free is None else card.free


def assignment(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, gpu_layers: int) -> list[int]:
    """The card of each block and, last, of the output; -1 is the host.

    llama.cpp's rule (llama-model.cpp): the last layers first, spread over the cards by the cumulative split, free memory
    where none is given; in single precision, which decides at the edges.
    """
    count = len(spec.layers)
    first = max(count + 1 - gpu_layers, 0)
    if not cards or not gpu_layers:
        return [-1] * (count + 1)
    if len(cards) == 1:
        return [-1] * first + [0] * (count + 1 - first)
    return [-1] * first + [*_cards_of(s.split or tuple(free_bytes(card) for card in cards), count + 1 - first)]


@lru_cache(maxsize=4096)
def _cards_of(shares: tuple[float, ...], layers: int) -> tuple[int, ...]:
    """The card of each of `layers`, spread over cards by their shares: a search asks for the same ones again and again."""
    edges, running = [], 0.0
    for share in shares:
        running = _single(running + _single(share))
        edges.append(running)
    edges = [_single(edge / running) if running else 0.0 for edge in edges]
    places = (_single(_single(i) / layers) for i in range(layers))
    return tuple(next((k for k, edge in enumerate(edges) if at < edge), len(shares) - 1) for at in places)


def _single(number: float) -> float:
    return unpack("f", pack("f", number))[0]


def placed_terms(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, w: Weights, c: CacheBytes, gpu_layers: int,
                 here: Here, compute: list[Term]) -> list[Term]:
    """The terms of a llama.cpp run with that many layers on the cards. `compute`: its `buffers`."""
    count, n = len(spec.layers), len(cards)
    where = assignment(spec, cards, s, gpu_layers)
    held, cache, state = [0] * (n + 1), [0] * (n + 1), [0] * (n + 1)      # the last, [-1], is the host
    for i, layer in enumerate(spec.layers):
        if layer.mtp:
            continue                     # in the file, not loaded unless drafting is on
        at = where[i]
        bytes = w.by_layer[i]
        if at >= 0 and i < s.n_cpu_moe:
            held[-1] += w.experts_by_layer[i]
            bytes -= w.experts_by_layer[i]
        held[at] += bytes + (w.card_padding[i] if at >= 0 else 0)
        cache[at] += c.by_layer[i]
        state[at] += c.recurrent_by_layer[i]
    output_at = where[count]
    held[-1] += w.embedding
    held[output_at] += w.output + w.card_padding[count] if output_at >= 0 else w.output - w.tied
    terms = []
    for i, card in enumerate(cards):
        device = f"gpu{i}"
        terms += [exact("weights", device, held[i], "tensors of its layers, each padded as the file and the card pad it"),
                  exact("kv_cache", device, cache[i], _cache_why(s, c))]
        if c.recurrent:
            terms.append(exact("recurrent", device, state[i], _STATE))
        if compute[i].bytes or gpu_layers:
            terms.append(compute[i])
        terms.append(overhead_term(card, device, s.engine, n, s.display, here.measured_on(card)))
    terms += [exact("weights", "host", held[-1], "the embedding, and whatever layers stay in RAM (mapped from the file)"),
              exact("kv_cache", "host", cache[-1], _cache_why(s, c))]
    if c.recurrent:
        terms.append(exact("recurrent", "host", state[-1], _STATE))
    terms += [compute[-1],
              exact("output", "host", output_bytes(spec, s.sequences), "logits, float32, one row a sequence")]
    if copies := repacked_term(spec, s.quant, s.importance, cards, [at < 0 for at in where], here.features):
        terms.append(copies)
    return terms


@dataclass(frozen=True, slots=True)
class Sums:
    """Running sums over the layers, first 0: bytes a card takes with each of them, and those of its experts; the output's."""

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    output: int


def sums(spec: ModelSpec, w: Weights, c: CacheBytes) -> Sums:
    """What `card_held` adds up, once for all placements."""
    loaded = [not layer.mtp for layer in spec.layers]           # else: in the file, not loaded unless drafting is on
    each = zip(loaded, w.by_layer, w.card_padding, c.by_layer, c.recurrent_by_layer, strict=False)
    return Sums((0, *accumulate(is_loaded * sum(bytes) for is_loaded, *bytes in each)),
                (0, *accumulate(a * b for a, b in zip(loaded, w.experts_by_layer, strict=True))),
                w.output + w.card_padding[len(loaded)])


def card_held(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, of: Sums, gpu_layers: int) -> list[int]:
    """Bytes of weights, cache and state that `gpu_layers` put on each card: the sums of `placed_terms`, cheaper."""
    count = len(spec.layers)
    start = max(count + 1 - gpu_layers, 0)
    if not cards or start > count:
        return [0] * len(cards)
    where = assignment(spec, cards, s, gpu_layers)
    held = []
    for card in range(len(cards)):
        end = min(bisect_right(where, card, start), count)           # a card's layers lie together, in the cards' order
        out = min(s.n_cpu_moe, end), min(s.n_cpu_moe, start)
        held.append(of.layers[end] - of.layers[start] - of.experts[out[0]] + of.experts[out[1]])
        start = end
    held[where[count]] += of.output
    return held


def buffers(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, w: Weights, gpu_layers: int) -> list[Term]:
    """The compute buffer of each card, and last the host's."""
    return compute_terms(spec, request(s), assignment(spec, cards, s, gpu_layers), s.n_cpu_moe, cards, w)


def whole_terms(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, c: CacheBytes, here: Here = NOWHERE) -> list[Term]:
    """The terms of transformers, which loads a model whole: evenly over the cards, or all of it in RAM."""
    total, n = loaded_bytes(spec, s.quant), max(len(cards), 1)
    kv, why = _grown_cache(spec, s, c)
    state = recurrent_bytes(spec, s.quant, s.sequences)
    terms = []
    for i in range(n):
        device = f"gpu{i}" if cards else "host"
        def share(bytes: int, i: int = i) -> int:
            return bytes * (i + 1) // n - bytes * i // n
        terms += [exact("weights", device, share(total), f"parameters as {s.engine} holds them" + (
                      "; while they load, their shards' pages beside them, which the system takes back" if not cards else
                      "; one block of this size is reserved before they load")),
                  exact("kv_cache", device, share(kv), why)]
        if state:
            terms.append(exact("recurrent", device, share(state), "state of recurrent layers, a row a sequence"))
        terms.append(compute_term(spec, s.quant, s.context, s.sequences, s.flash_attention, device, bool(cards)))
        if cards:
            terms.append(overhead_term(cards[i], device, s.engine, n, s.display, here.measured_on(cards[i])))
    if cards:
        terms.append(exact("weights", "host", 0, "nothing stays in RAM once loaded"))
    return terms


def _grown_cache(spec: ModelSpec, s: Settings, c: CacheBytes) -> tuple[int, str]:
    """transformers' cache has the type of the activations, unless a quantized one is asked for."""
    type = cache_type(spec, s.quant)
    if {*s.kv} <= {"f32", "f16", "bf16"}:
        c = cache_bytes(spec, s.context, type, engine=s.engine, sequences=s.sequences, flash_attention=s.flash_attention)
        return c.kv, f"{c.cells} tokens, K and V in {type} as the activations are"
    return c.kv, _cache_why(s, c)


def request(s: Settings) -> Request:
    """What the compute buffers depend on."""
    return Request(s.context, s.micro, s.flash_attention, s.kv, s.sequences, s.unified, s.swa_full)


def _cache_why(s: Settings, c: CacheBytes) -> str:
    cells = f"{c.cells} cells" + (f", {c.cells_sliding} in sliding layers" if c.sliding else "")
    return f"{cells}, K {s.kv[0]}, V {s.kv[1]}"
