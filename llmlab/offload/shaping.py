"""A model as the planner sees it: its pieces with their bytes, in the order of a pass, and the seconds each layer computes.

Pieces of a GGUF have the very bytes of their buffers (`pieces.pieces_of`); those of a model that is only a shape are as large
as llama-quantize would make them, to a page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..catalog import Gpu
from ..errors import LabError
from ..formats.plain import STORED
from ..gguf import read_gguf
from ..memory import Weights, cache_bytes, weights
from ..rates import ATTEND, CACHE, CORE_BAND, CORE_WEIGHTS, Band, Rates, arithmetic, banded, kind_of
from ..shapes import ModelSpec, remembered
from ..speed import EXPERT_PREFILL, HOST_KERNEL, reading
from ..units import align
from .costs import touched
from .pieces import _LAYER, _SMALL, HEAD, PAGE, pieces_of

AT_ONCE = 512                   # tokens of a prompt that one pass reads (runtime/decoder.py)
CHUNK, CARD_CHUNK = 2**20, 2**23        # weights that are unpacked at once (kernels/scratch.py)
TURNS, FEW = 2, 31              # rooms for each kind of layer (caching.py), rows that fast mode multiplies in RAM (aside.py)
PACKED = 2**22                  # numbers that attention over packed pages holds
BENT = ("gemma2", "gpt-oss")    # architectures whose attention holds its scores: they are bent, or have sinks


# Bytes a weight as compiled code takes them ("words", small), in rows of whole tiles (kernels/words.py); of other formats no
# way is known.
WORDS = {"Q4_0": 0.625, "Q4_1": 0.625, "Q5_0": 0.75, "Q5_1": 0.75, "Q8_0": 1.125, "Q2_K": 0.34375, "Q3_K": 0.453125,
         "Q4_K": 0.59375, "Q5_K": 0.71875, "Q6_K": 0.828125, "IQ4_NL": 0.625, "IQ4_XS": 0.578125, "F32": 4.0}
LANE = 32                       # weights of one lane of a tile
PAIRED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")     # whose tiles share words of scales, two and two


class Layer(NamedTuple):
    """One step of a pass: a block, or the head. Bytes of its own buffer (0: it has no matrices but experts'); of how many
    experts a token uses how many, and how large the largest one's buffer is."""

    name: str
    bytes: int
    experts: int = 0
    used: int = 0
    expert: int = 0
    payload: int = 0          # of an expert: what one read moves, on average

    @property
    def held(self) -> int:
        """Bytes of all of it."""
        return self.bytes + self.experts * self.expert


@dataclass(frozen=True, eq=False)
class Shape:
    """A model's layers in the order of a pass, the head last; `small`: bytes of what is always on the device as numbers (norms,
    biases, routers); `exact`: whether these are the bytes of a file as it lies there."""

    layers: tuple[Layer, ...]
    small: int
    exact: bool

    @cached_property
    def bytes(self) -> int:
        return sum(layer.held for layer in self.layers)

    @cached_property
    def experts(self) -> int:
        """Of all layers together."""
        return sum(layer.experts for layer in self.layers)

    @cached_property
    def wanted(self) -> int:
        """Experts that a token uses in all layers together."""
        return sum(layer.used for layer in self.layers)

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest piece."""
        return max(max(layer.bytes, layer.expert) for layer in self.layers)

    @cached_property
    def largest_expert(self) -> int:
        return max((layer.expert for layer in self.layers), default=0)


@remembered
def shape_of(spec: ModelSpec, quant: str, importance: bool = False, lanes: int = 0) -> Shape:
    """The layers of a model in a quant. A GGUF in its own quant that is here: its file's. lanes: of the processor that they are
    laid out for as words (0: as the file has them); raises LabError where no way is known to."""
    w = weights(spec, quant, importance)
    if lanes:
        return _as_words(spec, w, lanes)
    blocks = [i for i, layer in enumerate(spec.layers) if not layer.mtp]
    own, held, small = dict.fromkeys(blocks, 0), dict.fromkeys(blocks, 0), 0
    for tensor, size in zip(spec.tensors, w.bytes, strict=True):
        at = tensor.layer
        if at not in own:
            if at < 0 and tensor.name not in ("token_embd.weight", "output.weight") and len(tensor.shape) < 2:
                small += 4 * tensor.elements
        elif not _in_piece(tensor.name, len(tensor.shape)):
            small += 4 * tensor.elements
        elif tensor.name.removesuffix(".weight").endswith("_exps"):
            held[at] += align(size, 32)
        else:
            own[at] += align(size, 32)
    real = {}
    if spec.source == "gguf" and spec.path and quant == spec.stored:
        for piece in pieces_of(read_gguf(spec.path)).values():
            if piece.expert is None:
                real[piece.name] = piece.bytes
            else:
                real[piece.layer] = max(real.get(piece.layer, 0), piece.bytes)
    layers = []
    for i in blocks:
        block, experts = spec.layers[i], spec.layers[i].experts if held[i] else 0
        each = held[i] // experts if experts else 0
        size = align(own[i], PAGE) + PAGE if own[i] else 0             # begins within a page
        pages = align(each, PAGE) + 3 * PAGE if each else 0            # gate, up and down, each begins within one
        layers.append(Layer(f"blk.{i}", real.get(f"blk.{i}", size), experts, block.experts_used if experts else 0,
                            real.get(i, pages) if experts else 0, each))
    layers.append(Layer(HEAD, real.get(HEAD, align(w.head, PAGE) + PAGE)))
    return Shape(tuple(layers), small, bool(real))


def _in_piece(name: str, dimensions: int) -> bool:
    """Whether a block's tensor is moved with its piece, as `pieces_of` chooses."""
    matched = _LAYER.fullmatch(name)
    return bool(matched) and dimensions > 1 and not _SMALL.fullmatch(matched[2])


def _as_words(spec: ModelSpec, w: Weights, lanes: int) -> Shape:
    """The same laid out for compiled code, each row in whole tiles."""
    head = "token_embd.weight" if spec.tied else "output.weight"
    sizes, small = {}, 0
    for tensor, type in zip(spec.tensors, w.types, strict=True):
        block = tensor.layer >= 0 and not spec.layers[tensor.layer].mtp and _in_piece(tensor.name, len(tensor.shape))
        if not block and tensor.name != head:
            small += 4 * tensor.elements if len(tensor.shape) < 2 or tensor.layer >= 0 else 0
            continue
        if type not in WORDS or "_exps." in tensor.name:
            what = "experts" if "_exps." in tensor.name else f"{type}, as {tensor.name} is,"
            raise LabError(f"no way is known to lay out {what} for compiled code; use the layout 'gguf', or another quant")
        cols = align(tensor.shape[0], LANE * lanes * (2 if type in PAIRED else 1))
        place = HEAD if tensor.name == head else f"blk.{tensor.layer}"
        sizes[place] = sizes.get(place, 0) + align(int(tensor.elements // tensor.shape[0] * cols * WORDS[type]), 64)
    names = [f"blk.{i}" for i, layer in enumerate(spec.layers) if not layer.mtp] + [HEAD]
    return Shape(tuple(Layer(name, align(sizes.get(name, 0), PAGE)) for name in names), small, False)


class Work(NamedTuple):
    """Seconds that a layer computes, slow, usual, fast: what every token uses, its share of experts, and its cache; and for the
    processor in place. `cache`: bytes of it that one token reads."""

    dense: Band
    experts: Band
    attention: Band
    cache: int
    host: Band          # where the processor computes it in place, all together


def _each(sums: tuple[tuple[float, ...], ...], at: int) -> list[float]:
    return [row[at + 1] - row[at] for row in sums]


# How many billion weights one core unpacks and multiplies in a second for one token ("compact", uncompiled), `CHUNK` at once:
# the quickest of 14 runs of a 2048 x 2048 matrix each, one thread of an AMD EPYC with AVX2. `START` of a chunk does not shrink
# with it: 192, 576 and 1536 rows of 576 Q4_1 weights take 0.31, 0.47 and 0.85 ms there.
COMPACT = {"Q4_0": 1.17, "Q4_1": 1.01, "Q5_0": 0.85, "Q5_1": 0.78, "Q8_0": 1.72, "Q2_K": 0.90, "Q3_K": 0.66, "Q4_K": 0.78,
           "Q5_K": 0.50, "Q6_K": 0.77, "IQ4_NL": 0.74, "IQ4_XS": 0.77, "IQ3_XXS": 0.79, "IQ3_S": 0.72, "IQ2_XXS": 0.86,
           "IQ2_XS": 1.18, "IQ2_S": 0.73, "IQ1_S": 1.06, "IQ1_M": 0.91, "MXFP4": 0.81, "F16": 3.61, "BF16": 2.74, "F32": 3.77}
USUAL_COMPACT = 0.7
START = 0.25e-3
SHARED = 0.25       # n cores unpack n**0.25 times as fast: many short passes over a few MB. A second core made it 1.05 to 1.25
NOTHING = (0.0, 0.0, 0.0)
WAYS = ("gguf", "words", "tuned")
"""How matrices are multiplied: the file's own bytes, unpacked a piece at a time; compiled, on a processor; or as quickly as
llama.cpp does, which shows what the hardware allows."""
CORE = (0.70, 1.0, 1.3)         # of that, other processors
# Seconds an operation of a layer beside its matrices, of one token: 0.77 ms a layer of 25. A card only has to be told.
EAGER = (43e-6, 31e-6, 22e-6)
EAGER_CARD = (28e-6, 20e-6, 14.2e-6)
UNPACKED = (21.2, 15.0, 10.6)   # bytes that a card moves to unpack a weight into 16 bits and multiply by it: four passes,
#                                 counted in kernels/unpacking.py, not measured
PAGED = {False: 0.5e-3, True: 1.3e-3}   # seconds a layer more, uncompiled, of packed pages: of numbers, or of blocks
# Numbers of packed pages that a core attends to in a second: q8_0; f16 and q4_0 within a third (tests/bench/results,
# cache-2026-11-23, two cores).
ATTENDED = {"gguf": 0.65e9, "words": 3.2e9}
COMPILED = 0.75                 # of llama.cpp's speed, compiled ("words"): 0.65 to 0.89 on 2026-11-22 (tests/bench/results)
MEASURED_PACE = (1.1, 1.0, 0.95)        # other moments of the same machine
MULTIPLIED = (0.35, 0.50, 0.70)         # of a card's half-precision rate, a prompt's matrices once they are unpacked


@remembered
def _units(spec: ModelSpec, quant: str, importance: bool) -> tuple[tuple[tuple[float, float], ...], float]:
    """Of each block (its own matrices, one token's experts), and of the output: seconds of one core, as `COMPACT` has it."""
    w, head = weights(spec, quant, importance), "token_embd.weight" if spec.tied else "output.weight"
    own, experts, output = [0.0] * len(spec.layers), [0.0] * len(spec.layers), 0.0
    for tensor, type in zip(spec.tensors, w.types, strict=True):
        if len(tensor.shape) < 2:
            continue
        if tensor.name == head:
            output = _core_seconds(tensor.shape[0], tensor.elements, type)
        elif tensor.layer >= 0 and "_exps." in tensor.name:
            block = spec.layers[tensor.layer]
            experts[tensor.layer] += block.experts_used * _core_seconds(tensor.shape[0], tensor.elements // block.experts, type)
        elif tensor.layer >= 0:
            own[tensor.layer] += _core_seconds(tensor.shape[0], tensor.elements, type)
    return tuple(zip(own, experts, strict=True)), output


def _core_seconds(cols: int, elements: int, type: str) -> float:
    """What one core takes to unpack a matrix and to multiply it by one token."""
    step = max(1, CHUNK // cols)
    chunks = -(-(elements // cols) // (step if step < 16 else step // 16 * 16))
    started = 0.0 if type in STORED else START * max(0.0, chunks - elements / CHUNK)
    return elements / 1e9 / COMPACT.get(type, USUAL_COMPACT) + started


@remembered
def decode_work(spec: ModelSpec, quant: str, importance: bool, card: Gpu | None, rates: Rates, kv: tuple[str, str],
                context: int, way: str = "gguf", paged: bool = False) -> tuple[Work, ...]:
    """Seconds of each layer of one token after `context` others, the head last; modelled. way: how matrices are multiplied, one
    of `WAYS`. paged: whether keys and values lie in packed pages; else they are plain numbers."""
    r, c = reading(spec, quant, importance), cache_bytes(spec, max(context, 1), kv)
    numbers = cache_bytes(spec, max(context, 1), ("f32", "f32"))
    units, output = _units(spec, quant, importance)
    found = []
    for i, block in enumerate(spec.layers):
        if block.mtp:
            continue
        cells = c.by_layer[i] if context else 0
        dense, experts, (own, routed) = _each(r.dense, i), _each(r.experts, i), units[i]
        looked = _cache(cells, None, rates)
        if paged and way in ATTENDED:
            looked = _paged(numbers.by_layer[i] / 4 if context else 0, kv, way, rates, looked)
        host = _plus(_token(dense, own, None, rates, way), _token(experts, routed, None, rates, way), looked)
        found.append(Work(_token(dense, own, card, rates, way), _token(experts, routed, card, rates, way),
                          looked if card is None else _cache(cells, card, rates), cells, host))
    last = list(r.output)
    found.append(Work(_token(last, output, card, rates, way), NOTHING, NOTHING, 0, _token(last, output, None, rates, way)))
    return tuple(found)


def _token(work: Sequence[float], units: float, card: Gpu | None, rates: Rates, way: str) -> Band:
    """Seconds of one token's work of some matrices, of which one core takes `units` seconds uncompiled."""
    amount, unpack, weighed, count, _, kernels = work
    if not count:
        return NOTHING
    if way == "tuned" and card is not None:                      # as `speed` models llama.cpp
        kind = kind_of(card)
        read, numbers = rates.card("stream", 0) or banded(card.bandwidth, kind.stream), banded(arithmetic(card), kind.unpack)
        return tuple(max(amount / read[k], unpack / numbers[k]) + kernels * kind.launch[k] for k in range(3))
    if way == "gguf" or card is not None:
        starts = tuple(kernels * one for one in (EAGER if card is None else EAGER_CARD))
        return _plus(_unpacking(units, count, card, rates), starts)
    numbers, share = banded(rates.cores * CORE_WEIGHTS, CORE_BAND), COMPILED if way == "words" else 1.0
    return tuple((max(amount / rates.ram[k], weighed / numbers[k]) + kernels * HOST_KERNEL[k]) / share for k in range(3))


def _cache(cells: int, card: Gpu | None, rates: Rates) -> Band:
    rate = rates.ram if card is None else banded(card.bandwidth, CACHE)
    return tuple(cells / r for r in rate)


def _paged(numbers: float, kv: tuple[str, str], way: str, rates: Rates, read: Band) -> Band:
    """Seconds of a layer's attention over so many numbers of packed pages, no less than reading them."""
    starts = PAGED[any(name[0] in "qi" for name in kv)] if way == "gguf" else 0.0
    usual = numbers / (ATTENDED[way] * rates.cores) + starts
    return tuple(max(usual / share, one) for share, one in zip(CORE, read, strict=True))


def _plus(*bands: Band) -> Band:
    return tuple(map(sum, zip(*bands, strict=True)))


@remembered
def prefill_work(spec: ModelSpec, quant: str, importance: bool, card: Gpu | None, rates: Rates, context: int,
                 tokens: int, way: str = "gguf") -> tuple[Work, ...]:
    """Seconds of each layer of `tokens` tokens of a prompt, read at once in the middle of `context`; of the head one token's.
    Matrices are unpacked once for all of them."""
    r = reading(spec, quant, importance)
    units, output = _units(spec, quant, importance)
    if card is None:
        rate = attend = rates.matmul
    elif way == "tuned":
        rate, attend = (banded(card.fp32_flops or arithmetic(card), share) for share in (kind_of(card).prefill, ATTEND))
    else:
        rate = banded(card.fp16_flops or arithmetic(card), MULTIPLIED)
        attend = banded(card.fp32_flops or arithmetic(card), ATTEND)
    once = way == "gguf" or way == "words" and card is not None      # else unpacking is part of the rate
    found = []
    for i, block in enumerate(spec.layers):
        if block.mtp:
            continue
        dense, experts = _each(r.dense, i), _each(r.experts, i)
        cells = min(context / 2, block.window or context / 2)
        attended = (r.attention[i + 1] - r.attention[i] + r.windowed[i + 1] - r.windowed[i]) * cells * tokens
        every = touched(block.experts, block.experts_used, tokens) / block.experts_used if block.experts_used else 0.0
        own, routed = _divided(2 * dense[3] * tokens, rate), _divided(2 * experts[3] * tokens / EXPERT_PREFILL, rate)
        if once:
            own = _plus(own, _unpacking(units[i][0], dense[3], card, rates))
            routed = _plus(routed, _unpacking(units[i][1] * every, experts[3] * every, card, rates))
        attention = _divided(attended, attend)
        found.append(Work(own, routed, attention, 0, _plus(own, routed, attention)))
    last = _token(list(r.output), output, card, rates, way)
    found.append(Work(last, NOTHING, NOTHING, 0, last))
    return tuple(found)


def _divided(amount: float, rate: Band) -> Band:
    return tuple(amount / one for one in rate)


def as_measured(work: Sequence[Work], seconds: float) -> tuple[Work, ...]:
    """The same work at the pace at which a token of the whole model was measured to take so long on the device."""
    pace = seconds / sum(w.dense[1] + w.experts[1] + w.attention[1] for w in work)

    def paced(band: Band) -> Band:
        return tuple(band[1] * pace * share for share in MEASURED_PACE)

    return tuple(w._replace(dense=paced(w.dense), experts=paced(w.experts), attention=paced(w.attention)) for w in work)


def _unpacking(units: float, count: float, card: Gpu | None, rates: Rates) -> Band:
    """Seconds to unpack weights and multiply them by one token: `units` of a core's, or `count` weights by a card."""
    if card is None:
        return tuple(units / (rates.cores ** SHARED * share) for share in CORE)
    return tuple(count * bytes / card.bandwidth for bytes in UNPACKED)


def workspace(spec: ModelSpec, context: int, card: bool) -> tuple[int, int, int]:
    """Bytes of the device while it computes, low, usual, high, modelled: a chunk of a matrix as it is unpacked with what that
    takes beside it, activations of a piece of a prompt, what attention holds of them, logits. `budget.workspace` without a
    file."""
    tokens = min(AT_ONCE, context)
    attending = [b for b in spec.blocks if b.attends]
    heads = max((b.heads * b.value_dim + 2 * b.kv_heads * b.key_dim for b in attending), default=0)
    inner = max((max(b.ff, b.expert_ff, b.shared_ff, b.heads * b.key_dim) for b in spec.blocks), default=spec.width)
    largest = max(t.shape[0] * t.shape[1] for t in spec.tensors if len(t.shape) > 1)
    best = 16 * min(CARD_CHUNK if card else CHUNK, largest)
    best += 4 * tokens * (4 * spec.width + 3 * heads + 4 * max(inner, spec.width))
    best += tokens * context + 4 * PACKED + 8 * spec.vocab
    if spec.architecture in BENT:
        best += 64 * 4 * context * 4 * max((b.heads for b in attending), default=0)
    return int(0.6 * best), best, int(1.05 * best)


def cache_needs(spec: ModelSpec, context: int, kv: tuple[str, str]) -> tuple[int, int]:
    """Bytes of the KV cache of so many tokens with the positions of its cells and the sines of every position, and of recurrent
    state; exact for the architectures that the decoder runs."""
    c = cache_bytes(spec, context, kv)
    attending = [(i, b) for i, b in enumerate(spec.layers) if b.attends and b.owns_kv and not b.mtp]
    cells = sum(c.cells_sliding if b.window else c.cells for _, b in attending)
    turned = {(b.key_dim, bool(b.window)) for _, b in attending}
    ways = len({bool(b.window) for _, b in attending}) if spec.architecture.startswith("gemma3") else 1
    width = max((dim for dim, _ in turned), default=0)
    return c.kv + 4 * cells + ways * 2 * 4 * context * width, c.recurrent


def cache_turns(spec: ModelSpec, context: int, kv: tuple[str, str]) -> int:
    """Bytes of the rooms on the device that layers of a cache in RAM take turns in, two for each kind of layer; exact where all
    of a kind are alike."""
    c = cache_bytes(spec, context, kv)
    windows = [bool(b.window) for b in spec.layers if b.attends and b.owns_kv and not b.mtp]
    kinds = ((windows.count(False), c.full, c.cells), (windows.count(True), c.sliding, c.cells_sliding))
    return sum(min(TURNS, count) * (size // count + 4 * cells) for count, size, cells in kinds if count)


def workspace_in_ram(spec: ModelSpec) -> int:
    """Bytes of RAM while the processor multiplies for a card, modelled: `budget.workspace_in_ram` without a file."""
    matrices = [t.shape for t in spec.tensors if len(t.shape) > 1]
    largest, sides = max(a * b for a, b, *_ in matrices), max(a + b for a, b, *_ in matrices)
    return 16 * min(CHUNK, largest) + 8 * FEW * sides


__all__ = ["AT_ONCE", "WAYS", "Layer", "Shape", "Work", "as_measured", "cache_needs", "cache_turns", "decode_work",
           "prefill_work", "shape_of", "workspace", "workspace_in_ram"]
