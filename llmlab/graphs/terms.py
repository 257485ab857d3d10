"""Compute buffers as terms of a report: an interval, and what fills them."""

from collections.abc import Sequence

from ..catalog import Gpu
from ..memory import Term, Weights, modelled
from ..shapes import ModelSpec
from ..units import format_bytes
from .allocator import Peak
from .buffers import Buffers, Request, compute_buffers

EXACT = (0.98, 1.02)         # of architectures whose graph was compared with llama.cpp's figures
UNSURE = (0.7, 1.5)          # of those built from the nearest graph there is
_OF_BLOCKS = ("feed-forward", "attention scores", "experts", "attention", "recurrence", "attention and the cache it unpacks")
OTHER_CARDS = 1.15           # Metal's, Vulkan's and SYCL's kernels keep more beside their results than CUDA's


def compute_terms(spec: ModelSpec, request: Request, where: Sequence[int], n_cpu_moe: int, cards: Sequence[Gpu],
                  weights: Weights) -> list[Term]:
    """The terms "compute", one a card and last the host's."""
    buffers = compute_buffers(spec, request, tuple(where), n_cpu_moe, len(cards), weights)
    terms = [_term(f"gpu{i}", peak, buffers, _further(cards[i]), _older(spec, peak, buffers))
             for i, peak in enumerate(buffers.cards)]
    return [*terms, _term("host", buffers.host, buffers)]


def compute_high(spec: ModelSpec, request: Request, cards: Sequence[Gpu]) -> list[int]:
    """For each card the high estimate of the compute buffer where it holds the whole model."""
    buffers = compute_buffers(spec, request, (0,) * (len(spec.layers) + 1), 0, 1)
    peak = buffers.cards[0]
    older = _older(spec, peak, buffers)
    return [_most(peak, buffers, _further(card), older) for card in cards]


def _further(card: Gpu) -> float:
    return 1.0 if card.vendor in ("NVIDIA", "AMD") else OTHER_CARDS


def _older(spec: ModelSpec, peak: Peak, buffers: Buffers) -> int:
    """What builds of 2025 held more on a card beside logits: one activation (three printed logs of that year)."""
    return 4 * buffers.tokens * spec.width if any(label == "logits" for label, *_ in peak.held) else 0


def _band(buffers: Buffers) -> tuple[float, float]:
    return EXACT if buffers.verified else UNSURE


def _most(peak: Peak, buffers: Buffers, further: float, older: int) -> int:
    return int(max(peak.bytes * _band(buffers)[1] * further, peak.bytes + older)) if peak.bytes else 0


def _term(device: str, peak: Peak, buffers: Buffers, further: float = 1.0, older: int = 0) -> Term:
    return modelled("compute", device, peak.bytes, peak.bytes * _band(buffers)[0], _most(peak, buffers, further, older),
                    why(peak, buffers, further != 1.0, older))


def why(peak: Peak, buffers: Buffers, other: bool = False, older: int = 0) -> str:
    """What fills a buffer, and what is not certain about it."""
    if not peak.bytes:
        return "nothing is computed there"
    named: dict[str, int] = {}
    for label, layer, bytes in peak.held:
        name = f"{label} of a block" if layer >= 0 and label in _OF_BLOCKS else label
        named[name] = named.get(name, 0) + bytes
    order = sorted(named.items(), key=lambda one: -one[1])
    largest = [f"{name} {format_bytes(bytes)}" for name, bytes in order if bytes * 20 >= peak.bytes][:3]
    text = f"llama.cpp's graph of {buffers.tokens} tokens, fullest with {', '.join(largest)}"
    if sum(bytes for _, _, bytes in peak.held) < 0.8 * peak.bytes:
        text += ", and gaps between what came and went"
    if not buffers.verified:
        text += "; this architecture's graph is not known, the nearest one stands for it"
    elif "logits" in named and buffers.outputs > 1:
        text += "; logits for all of them (llama-server asks for fewer)"
    if older:
        text += f"; builds of 2025 held {format_bytes(older)} more"
    return text + ("; laid out by CUDA's rules, other kernels keep more" if other else "")
