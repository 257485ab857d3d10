"""What a token of context costs in an architecture: its cache by kind of layer, and curves of bytes and speed against context.

Bytes are exact (`memory.cache_bytes`), speeds and what fits beside the weights are modelled (`fit`). Pure functions.
"""

from dataclasses import dataclass, field
from functools import lru_cache

from ..catalog import Gpu
from ..errors import LabError
from ..fitting import fit
from ..hardware import Machine
from ..memory import cache_bytes
from ..rates import Band
from ..shapes import ModelSpec

Pair = tuple[str, str]      # cache types of K and V
ARCHITECTURES = {  # one of each, of about a size
    "MHA": "llama-2-7b", "GQA": "llama-3.1-8b", "MLA": "deepseek-v2-lite", "sliding window": "gemma-3-12b",
    "hybrid": "qwen3.5-9b",
}
KINDS = ("full", "latent", "sliding", "state")      # of what a layer keeps
NEAR = 2                    # bytes a number of the tokens that are kept beside the packed ones (runtime.cache)
SHOWN: tuple[Pair, ...] = (("f16", "f16"), ("q8_0", "q8_0"), ("q5_1", "q5_1"), ("q4_0", "q4_0"))
LEAST = 512                 # where curves begin, tokens


@dataclass(frozen=True)
class Cost:
    """Bytes that llama.cpp, and llmlab's own packed cache, keep of a context: exact.

    kinds: {kind of KINDS: bytes}; the state of recurrent layers is in float32, whatever the cache is in. layers: {kind: how
    many layers}. beside: of the first and last tokens kept in 16 bits beside the packed ones. further: of one token more, with
    this context behind it. first: of a token while every window still fills. kv: as kept; a latent row has one type.
    """

    spec: ModelSpec
    kv: Pair
    context: int
    kinds: dict[str, int]
    layers: dict[str, int]
    beside: int
    further: int
    first: int

    @property
    def bytes(self) -> int:
        return sum(self.kinds.values()) + self.beside

    @property
    def each(self) -> float:
        """Bytes a token, all of it shared among the tokens of the context."""
        return self.bytes / self.context


@dataclass(frozen=True)
class Curve:
    """One cache type over contexts: bytes exact, tokens/s with the context full (low, best, high) modelled, None where rates
    are not known. longest: the largest context, as far as the model was trained, with which all of it fits for certain (0:
    none); longest_bytes: of its cache."""

    kv: Pair
    contexts: tuple[int, ...]
    bytes: tuple[int, ...]
    speed: tuple[Band | None, ...] = field(repr=False)
    longest: int
    longest_bytes: int


def suited(spec: ModelSpec, kv: Pair) -> Pair:
    """`kv` as this model can have it: a latent row that is both K and V has K's type."""
    return (kv[0], kv[0]) if any(layer.mixer == "mla" for layer in spec.blocks) else kv


def cost(spec: ModelSpec, context: int, kv: Pair, kept: int = 0) -> Cost:
    """What `context` tokens cost in cache types `kv`, with `kept` of them in 16 bits beside. Raises LabError for types this
    model's heads do not divide into."""
    kv = suited(spec, kv)
    found, plain = cache_bytes(spec, context, kv), cache_bytes(spec, context, "f16")
    kinds, layers = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    numbers = 0                              # of one cell, in all layers
    for layer, bytes, state, halves in zip(spec.layers, found.by_layer, found.recurrent_by_layer, plain.by_layer, strict=True):
        if bytes:
            kind = "latent" if layer.mixer == "mla" else "sliding" if layer.window else "full"
            kinds[kind] += bytes
            layers[kind] += 1
            numbers += halves // (2 * (plain.cells_sliding if layer.window else plain.cells))
        if state:
            kinds["state"] += state
            layers["state"] += 1
    always = found.full // found.cells
    windowed = found.sliding // found.cells_sliding if found.cells_sliding else 0
    filling = found.cells_sliding == found.cells
    return Cost(spec, kv, context, kinds, layers, NEAR * numbers * kept, always + windowed * filling, always + windowed)


def steps(spec: ModelSpec, context: int = LEAST) -> tuple[int, ...]:
    """Contexts that curves are drawn over: powers of two and what lies halfway, to twice what the model was trained for, and
    past `context`."""
    most = max(2 * (spec.context_train or 4096), 1 << (context - 1).bit_length())
    return tuple(sorted({n for k in range(9, 32) for n in (2**k, 3 * 2 ** (k - 1)) if LEAST <= n <= most} | {LEAST, most}))


@lru_cache(maxsize=256)
def curve(spec: ModelSpec, card: Gpu | Machine | None, quant: str | None, kv: Pair, contexts: tuple[int, ...],
          kept: int) -> Curve:
    """One cache type over contexts, beside the weights in `quant`. Raises LabError as `fit` does."""
    kv = suited(spec, kv)
    report = fit(spec, card, quant=quant, context=contexts[0], kv=kv)
    longest = report.largest_context()
    return Curve(kv, contexts, tuple(cost(spec, n, kv, kept).bytes for n in contexts),
                 tuple(report.with_(context=n).speed.decode_tps for n in contexts), longest,
                 cost(spec, longest, kv, kept).bytes if longest else 0)


def curves(spec: ModelSpec, card: Gpu | Machine | None, quant: str | None, kv: Pair, contexts: tuple[int, ...],
           kept: int = 0) -> tuple[Curve | None, ...]:
    """Those of SHOWN, None where the model's heads do not divide into a type's blocks; then that of `kv`."""
    found = []
    for pair in SHOWN:
        try:
            found.append(curve(spec, card, quant, pair, contexts, 0))
        except LabError:
            found.append(None)
    return (*found, curve(spec, card, quant, kv, contexts, kept))


# ---- in words -----------------------------------------------------------------------------------------------

def architecture(spec: ModelSpec) -> str:
    """How a model's layers remember: "MHA", "GQA", "MQA", "MLA", "sliding window", "hybrid"."""
    attending = [layer for layer in spec.blocks if layer.attends]
    if any(layer.conv_state or layer.ssm_state for layer in spec.blocks):
        return "hybrid" if attending else "recurrent"
    if any(layer.mixer == "mla" for layer in attending):
        return "MLA"
    if any(layer.window for layer in attending):
        return "sliding window"
    if all(layer.kv_heads == layer.heads for layer in attending):
        return "MHA"
    return "MQA" if all(layer.kv_heads == 1 for layer in attending) else "GQA"


def row_words(spec: ModelSpec) -> str:
    """What a layer keeps of a token, in words: heads and their widths; of each different kind of layer."""
    said = []
    for layer in spec.blocks:
        if layer.attends and layer.owns_kv:
            text = (f"one row of {layer.key_dim} numbers for K and V" if layer.mixer == "mla" else
                    f"{layer.kv_heads} KV head{'s' * (layer.kv_heads != 1)} × ({layer.key_dim} + {layer.value_dim}) numbers")
            if text not in said:
                said.append(text)
    return " or ".join(said) or "no keys and values"


def layer_words(found: Cost) -> str:
    """How many layers keep what."""
    spec, count = found.spec, found.layers
    window = max((layer.window for layer in spec.blocks), default=0)
    named = {"full": "full", "latent": "latent", "sliding": f"sliding ({window:,} tokens)", "state": "recurrent"}
    shared = sum(layer.attends and not layer.owns_kv for layer in spec.blocks)
    return " + ".join([f"{count[kind]} {named[kind]}" for kind in KINDS if count[kind]]
                      + [f"{shared} that read another's"] * bool(shared))


def kv_words(kv: Pair) -> str:
    """"q8_0", or "K q8_0, V q4_0"."""
    return kv[0] if kv[0] == kv[1] else f"K {kv[0]}, V {kv[1]}"
