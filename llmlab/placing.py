"""Where things go: which card holds which block, and the terms that follow on every device.

Pure functions from shapes, sizes and settings to terms; nothing here judges.
"""

from struct import pack, unpack

from .catalog import Gpu
from .memory import (
    CONTEXT_OVERHEAD,
    REPACKED,
    CacheBytes,
    Term,
    Weights,
    compute_bytes,
    exact,
    host_compute_bytes,
    loaded_bytes,
    modelled,
    output_bytes,
)
from .settings import Settings
from .shapes import ModelSpec
from .units import MIB

DESKTOP_DISPLAY = 850 * MIB       # a desktop's own use of its card, usual; data/overheads.csv disp-linux-desktop
_STATE = "float32 state of recurrent layers, a row a sequence"


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
    edges, running = [], 0.0
    for share in s.split or tuple(free_bytes(card) for card in cards):
        running = _single(running + _single(share))
        edges.append(running)
    edges = [_single(edge / running) if running else 0.0 for edge in edges]
    where = [-1] * first
    for i in range(first, count + 1):
        at = _single(_single(i - first) / min(gpu_layers, count + 1))
        where.append(next((k for k, edge in enumerate(edges) if at < edge), len(cards) - 1))
    return where


def _single(number: float) -> float:
    return unpack("f", pack("f", number))[0]


def placed_terms(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, w: Weights, c: CacheBytes,
                 gpu_layers: int) -> list[Term]:
    """The terms of a llama.cpp run with that many layers on the cards."""
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
        if gpu_layers or i == 0:
            terms.append(_compute(spec, s, w, device, i == output_at, output_at < 0))
        terms.append(_overhead(card, device))
    terms += [exact("weights", "host", held[-1], "the embedding, and whatever layers stay in RAM (mapped from the file)"),
              exact("kv_cache", "host", cache[-1], _cache_why(s, c))]
    if c.recurrent:
        terms.append(exact("recurrent", "host", state[-1], _STATE))
    terms += [_host_compute(spec, s, bool(cards)),
              exact("output", "host", output_bytes(spec, s.sequences), "logits, float32, one row a sequence")]
    if not cards and (copies := _repackable(spec, w)):
        terms.append(modelled("repacked", "host", 0, 0, copies,
                              "copies that the CPU backend may lay out for its kernels; the processor decides"))
    return terms


def card_needs(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, w: Weights, c: CacheBytes, gpu_layers: int) -> list[int]:
    """Bytes, high estimate, that `gpu_layers` put on each card beside its overhead: the sums of `placed_terms`, cheaper."""
    count = len(spec.layers)
    where = assignment(spec, cards, s, gpu_layers)
    need = [0] * len(cards)
    for i in range(max(count + 1 - gpu_layers, 0), count):
        if not spec.layers[i].mtp:
            need[where[i]] += w.by_layer[i] + w.card_padding[i] + c.by_layer[i] + c.recurrent_by_layer[i] - (
                w.experts_by_layer[i] if i < s.n_cpu_moe else 0)
    if where[count] >= 0:
        need[where[count]] += w.output + w.card_padding[count]
    return [n + (_compute(spec, s, w, "", k == where[count], where[count] < 0).high if gpu_layers or k == 0 else 0)
            for k, n in enumerate(need)]


def whole_terms(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, c: CacheBytes) -> list[Term]:
    """The terms of transformers and vLLM, which load a model whole: evenly over the cards, or all of it in RAM."""
    total, n = loaded_bytes(spec, s.quant), max(len(cards), 1)
    tokens = s.context if s.engine == "transformers" else min(s.context, max(s.batch, 2048))
    widest = max((b.ff or b.expert_ff * b.experts_used + b.shared_ff for b in spec.blocks), default=0)
    activations = 2 * tokens * (2 * widest + 6 * spec.width) + 4 * spec.vocab * s.sequences
    terms = []
    for i in range(n):
        device = f"gpu{i}" if cards else "host"
        def share(bytes: int, i: int = i) -> int:
            return bytes * (i + 1) // n - bytes * i // n
        terms += [exact("weights", device, share(total), f"parameters as {s.engine} holds them"),
                  exact("kv_cache", device, share(c.kv), _cache_why(s, c))]
        if c.recurrent:
            terms.append(exact("recurrent", device, share(c.recurrent), _STATE))
        terms.append(modelled("compute", device, activations, activations * 0.5, activations * 2,
                              f"activations of {tokens} prompt tokens and a row of logits a sequence"))
        if cards:
            terms.append(_overhead(cards[i], device))
    if cards:
        terms.append(exact("weights", "host", 0, "nothing stays in RAM once loaded"))
    return terms


def overhead_high(card: Gpu) -> int:
    """The most bytes of a card that are not a model's to use."""
    return _overhead(card, "").high


def compute_high(spec: ModelSpec, context: int, ubatch: int) -> int:
    """The high estimate of the compute buffer on a card that holds the whole model, flash attention on."""
    return int(compute_bytes(spec, context, ubatch) * 1.1)


def _cache_why(s: Settings, c: CacheBytes) -> str:
    cells = f"{c.cells} cells" + (f", {c.cells_sliding} in sliding layers" if c.sliding else "")
    return f"{cells}, K {s.kv[0]}, V {s.kv[1]}"


def _repackable(spec: ModelSpec, w: Weights) -> int:
    return sum(size for tensor, type, size in zip(spec.tensors, w.types, w.bytes, strict=True)
               if type in REPACKED and len(tensor.shape) == 2 and tensor.name != "token_embd.weight")


def _compute(spec: ModelSpec, s: Settings, w: Weights, device: str, with_output: bool, output_on_host: bool) -> Term:
    tokens = min(s.context, s.micro)
    full = compute_bytes(spec, s.context, s.micro, s.flash_attention, s.sequences)
    least = 4 * tokens * 2 * spec.width
    copied = w.head if output_on_host else 0
    best = (full if with_output or output_on_host else max(least, full - 4 * tokens * spec.vocab)) + copied
    why = f"largest working buffer for {tokens} tokens at a time, closed form"
    if copied:
        why += "; and the output matrix, which large batches copy to the card"
    experts = w.largest_expert if s.n_cpu_moe else 0
    return modelled("compute", device, best, min(least, best), max(best * 1.1, best + experts), why)


def _host_compute(spec: ModelSpec, s: Settings, beside_card: bool) -> Term:
    if beside_card:
        best = host_compute_bytes(spec, s.context, s.micro)
        return modelled("compute", "host", best, best * 0.9, best * 1.1, "attention mask and input for one such batch")
    best = compute_bytes(spec, s.context, s.micro, s.flash_attention, s.sequences)
    return modelled("compute", "host", best, best * 0.9, best * 1.15,
                    f"largest working buffer for {min(s.context, s.micro)} tokens at a time, closed form")


def _overhead(card: Gpu, device: str) -> Term:
    """Driver context; and for a catalogued card what the driver keeps and a desktop may use (a live card's free memory
    already leaves those out)."""
    low, best, high = CONTEXT_OVERHEAD
    if card.free is not None:
        return modelled("overhead", device, best, low, high, "driver context and kernels")
    kept_low, kept, kept_high = card.reserved
    display = DESKTOP_DISPLAY if card.kind in ("desktop", "laptop") and not card.unified else 0
    return modelled("overhead", device, best + kept, low + kept_low, high + kept_high + display,
                    "driver context and kernels, what the driver keeps; the high end with a desktop on the same card")
