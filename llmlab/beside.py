"""What llama.cpp loads beside the model: a projector, a draft model with its own cache, the blocks that draft for their model.

Read at llama-cpp-python 0.3.36: tools/mtmd/clip.cpp (the projector goes to the first card), common/speculative.cpp (a draft
keeps a context as long as its model's, in float16 unless told otherwise, and all of its layers on the cards), and the
models' loaders (multi-token-prediction blocks are skipped unless they are asked to draft).
"""

from dataclasses import replace

from .catalog import Gpu
from .graphs import Request, compute_terms
from .memory import CacheBytes, Term, Weights, cache_bytes, exact, modelled, mtp_cache, weights
from .placing import assignment
from .settings import Settings
from .shapes import ModelSpec

DRAFTED = 3            # tokens llama.cpp drafts at once (n_max)
# Recurrent models whose state llama.cpp can take back token by token: it then keeps a row a drafted token
_TAKES_BACK = ("qwen35", "qwen35moe", "nemotron_h", "nemotron_h_moe", "lfm2", "lfm2moe", "deepseek4")


def rows_drafted(spec: ModelSpec, s: Settings) -> int:
    """Rows of recurrent state that drafting adds for each sequence."""
    return DRAFTED if s.mtp and spec.architecture in _TAKES_BACK else 0


def anything(s: Settings) -> bool:
    return bool(s.projector or s.draft or s.mtp)


def beside_terms(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, gpu_layers: int) -> list[Term]:
    """The terms of what lies beside the model."""
    terms = []
    if s.projector:
        low, best, high = (s.projector.weights + size for size in s.projector.compute)
        terms.append(modelled("projector", "gpu0" if cards else "host", best, low, high,
                              f"{s.projector.name}: its weights, and a buffer for one image"))
    if s.draft:
        terms += _draft(cards, s)
    if s.mtp:
        terms += _mtp(spec, cards, s, gpu_layers)
    return terms


def beside_needs(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, gpu_layers: int) -> list[int]:
    """Bytes, high estimate, of `beside_terms` on each card."""
    terms = beside_terms(spec, cards, s, gpu_layers)
    return [sum(t.high for t in terms if t.device == f"gpu{i}") for i in range(len(cards))]


def _draft(cards: tuple[Gpu, ...], s: Settings) -> list[Term]:
    draft, n = s.draft, len(cards)
    count = len(draft.layers)
    where = assignment(draft, cards, s, count + 1)
    w = weights(draft, s.draft_quant, False)
    c: CacheBytes = cache_bytes(draft, s.context, "f16", sequences=s.sequences, ubatch=s.micro, swa_full=s.swa_full,
                                flash_attention=s.flash_attention, unified=s.unified)
    held, cached = [0] * (n + 1), [0] * (n + 1)           # the last is the host
    for i, layer in enumerate(draft.layers):
        if not layer.mtp:
            held[where[i]] += w.by_layer[i] + (w.card_padding[i] if cards else 0)
            cached[where[i]] += c.by_layer[i] + c.recurrent_by_layer[i]
    held[-1] += w.embedding
    held[where[count]] += w.output + w.card_padding[count] if cards else w.output - w.tied
    terms = []
    for i in range(n + 1):
        device = f"gpu{i}" if i < n else "host"
        terms.append(exact("draft", device, held[i], f"the draft model, {draft.title} in {s.draft_quant}"))
        if cached[i]:
            terms.append(exact("draft_cache", device, cached[i], f"the draft's own cache, {c.cells} cells in f16"))
    asked = _drafting(s)
    few, full = (compute_terms(draft, r, where, 0, cards, w) for r in (asked, replace(asked, outputs=None)))
    return terms + _working(few, full)


def _mtp(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, gpu_layers: int) -> list[Term]:
    where = assignment(spec, cards, s, gpu_layers)
    w, cache = weights(spec, s.quant, s.importance), mtp_cache(spec, s.context, s.sequences, s.unified, s.flash_attention)
    held = [0] * (len(cards) + 1)
    for i, layer in enumerate(spec.layers):
        if layer.mtp:
            at = where[i]
            moved = w.experts_by_layer[i] if at >= 0 and i < s.n_cpu_moe else 0
            held[-1] += moved
            held[at] += w.by_layer[i] - moved + cache + (w.card_padding[i] if at >= 0 else 0)
    terms = [exact("mtp", f"gpu{i}" if i < len(cards) else "host", bytes,
                   "multi-token-prediction blocks, and their cache in f16") for i, bytes in enumerate(held) if bytes]
    return [*terms, _mtp_working(spec, cards, s, where, w)]


def _working(terms: list[Term], most: list[Term]) -> list[Term]:
    """Working buffers of the drafting context: llama-server asks for a row of logits a sequence (the best guess), others for
    a row a token (the high end)."""
    return [replace(t, name="draft_compute", high=max(t.high, m.high), why=f"the drafting context's buffer: {t.why}")
            for t, m in zip(terms, most, strict=True) if m.bytes]


def _mtp_working(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, where: list[int], w: Weights) -> Term:
    """The drafting context's buffer: a block like the model's own, over a cache in float16. llama.cpp's was 0.67 to 0.88 of
    the model's own with as many rows of logits."""
    asked = _drafting(s)
    few, full = (compute_terms(spec, r, where, s.n_cpu_moe, cards, w)[where[-1] if cards else -1]
                 for r in (asked, replace(asked, outputs=None)))
    return modelled("draft_compute", few.device, 0.8 * few.bytes, 0.65 * few.low, full.high,
                    "the drafting context's buffer, by that of the model's own blocks; the high end with logits for all tokens")


def _drafting(s: Settings) -> Request:
    """What llama-server asks for a drafting context: a row of logits a sequence."""
    return Request(s.context, s.micro, s.flash_attention, ("f16", "f16"), s.sequences, s.unified, s.swa_full, s.sequences)
