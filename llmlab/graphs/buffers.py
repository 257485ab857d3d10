"""The compute buffers of a llama.cpp context: which layers are built, for which batch, and what is remembered."""

from dataclasses import dataclass, replace

from ..memory import Weights, llama_cells
from ..shapes import ModelSpec, remembered
from .allocator import Irregular, Peak, Plan, compile_plan
from .decoders import outline
from .families import FAMILIES, Family
from .ggml import HOST
from .parts import At, Builder, Setup
from .scheduler import OFFLOAD_BATCH, schedule

MOST_PLANS = 512       # kept a model
MOST_PERIOD = 16       # layers after which a model's pattern may start again
KEPT = 4               # turns of a pattern that are built: the first, two alike that stand for many, the last


@dataclass(frozen=True, slots=True)
class Request:
    """What llama.cpp would be asked for. `outputs`: rows of logits a batch may ask for (None: all, as llama-cli and
    llama-cpp-python; llama-server asks for fewer)."""

    context: int
    ubatch: int = 512
    flash: bool = True
    kv: tuple[str, str] = ("f16", "f16")
    sequences: int = 1
    unified: bool = False
    swa_full: bool = False
    outputs: int | None = None


@dataclass(frozen=True, slots=True)
class Buffers:
    """Compute buffers: one a card, and the host's. `verified`: the architecture's graph was checked against llama.cpp."""

    cards: tuple[Peak, ...]
    host: Peak
    tokens: int
    outputs: int
    verified: bool


def compute_buffers(spec: ModelSpec, request: Request, where: tuple[int, ...] = (), n_cpu_moe: int = 0, cards: int = 0,
                    weights: Weights | None = None, cuda: bool = True, whole: bool = False) -> Buffers:
    """The compute buffers of a llama.cpp context.

    where: the card of each block and, last, of the output, -1 for the host (placing.assignment); empty: all on the host.
    n_cpu_moe: blocks whose experts stay on the host. cards: how many there are, used or not. weights: their sizes, needed
    where a card takes over work on weights of the host. cuda: cards unpack a quantized cache for their attention, as CUDA's
    kernels do (llama.cpp's planning build does not). whole: build every layer, for tests; the answer is the same.
    """
    r, verified = request, family_of(spec).verified
    places = tuple(where) or (HOST,) * (len(spec.layers) + 1)
    tokens = min(r.context, r.ubatch)
    sequences, streams = r.sequences, 1 if r.unified else r.sequences
    cells, window = llama_cells(spec, r.context, sequences, tokens, r.swa_full, r.unified)
    batch, rows = -(-tokens // sequences) * sequences, max(tokens, sequences)     # generation asks for a row a sequence
    outputs = min(rows, r.outputs or rows)
    mixed = bool(cards) and (n_cpu_moe > 0 or HOST in places)          # some weights are copied to a card, or used on the host
    types = weights.types if mixed and weights is not None else ()
    key = Setup(r.flash, r.kv, sequences, streams), cards, n_cpu_moe, places, types, cuda, whole
    values = {"n": cells // streams, "w": window // streams, "t": batch // sequences, "o": outputs}
    peaks = _plan(spec, _few(batch, sequences), _few(outputs), *key).measure(values)
    if mixed and not (r.flash and batch * 8 * spec.width > _single_token(spec) * sequences):
        single = _plan(spec, sequences, _few(sequences), *key).measure({**values, "t": 1, "o": sequences})
        peaks = [max(pair, key=lambda peak: peak.bytes) for pair in zip(peaks, single, strict=True)]
    return Buffers(tuple(peaks[:-1]), peaks[-1], batch, outputs, verified)


@remembered
def _single_token(spec: ModelSpec) -> int:
    """More bytes than a host needs to compute one token, which it does where a prompt is computed on a card; attention
    scores without flash attention not counted."""
    widest = max(b.ff + b.expert_ff * b.experts_used + b.shared_ff + b.heads * max(b.key_dim, b.value_dim) + b.conv_state
                 + b.ssm_state for b in spec.blocks)
    return 4 * (spec.vocab + 8 * spec.width + 4 * widest)


def _few(rows: int, sequences: int = 1) -> int:
    """Rows of a batch as far as the structure of a graph depends on them: exactly where they, or those of one of its
    sequences, are too few to be taken over."""
    return min(rows, OFFLOAD_BATCH * sequences)


OUTLINE = Family(outline, None, False)


@remembered
def family_of(spec: ModelSpec) -> Family:
    """How to build a model's graph: its architecture's, or an outline for one that nobody has described and for a file
    that lacks what its architecture needs."""
    found = FAMILIES.get(spec.architecture, OUTLINE)
    if spec.source == "catalogue":       # looked at by tests: nothing is missing
        return found
    everywhere = (HOST,) * (len(spec.layers) + 1)
    try:
        ats = _layers(spec, everywhere, 0, _kinds(spec, found, ()))
        found.build(Builder(spec, Setup(), [ats[i][0] for i in representatives([kind for _, kind in ats])[0]], HOST))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
        return OUTLINE
    return found


def _plan(spec: ModelSpec, batch: int, outputs: int, setup: Setup, cards: int, n_cpu_moe: int, places: tuple[int, ...],
          types: tuple[str, ...], cuda: bool, whole: bool) -> Plan:
    """The plan of a graph, found again by the kinds of the layers that are built: moving one more layer changes little."""
    plans = spec.__dict__.setdefault("_plans", {})
    asked = batch, outputs, setup, cards, n_cpu_moe, places, types, cuda, whole
    if asked in plans:
        return plans[asked]
    if len(plans) > MOST_PLANS:
        plans.clear()
    family = family_of(spec)
    ats = _layers(spec, places, n_cpu_moe, _kinds(spec, family, types))
    full = min(places) >= 0
    kept, turns = (range(len(ats)), []) if whole else representatives([kind for _, kind in ats])
    key = (batch, outputs, setup, cards, tuple(ats[i][1] for i in kept), tuple(more for *_, more in turns), places[-1], full,
           n_cpu_moe > 0, types, cuda)
    if key not in plans:
        pinned = replace(setup, pinned=full or batch < OFFLOAD_BATCH)
        names = dict(zip((t.name for t in spec.tensors), types, strict=False))
        graph = family.build(Builder(spec, pinned, [ats[i][0] for i in kept], places[-1], names))
        values = {"t": max(batch // setup.sequences, 1), "o": outputs, "n": 256, "w": 256}
        nodes, leaves = schedule(graph, cards, values, cards > 1 and full and not n_cpu_moe)
        blocks = [spec.blocks[i].index for i in range(len(ats))]
        try:
            plans[key] = compile_plan(graph, nodes, leaves, cards, cuda,
                                      [(*(blocks[i] for i in where), more) for *where, more in turns])
        except Irregular:
            plans[key] = _plan(spec, batch, outputs, setup, cards, n_cpu_moe, places, types, cuda, True)
    plans[asked] = plans[key]
    return plans[asked]


def _layers(spec: ModelSpec, places: tuple[int, ...], n_cpu_moe: int, kinds: tuple[tuple[int, int, int], ...]
            ) -> list[tuple[At, tuple]]:
    """Every layer, and what tells it from others: its kind, its places, and the types of weights that stay on the host."""
    last = spec.blocks[-1]
    found = []
    for b in spec.blocks:
        place = places[b.index]
        experts = HOST if b.index < n_cpu_moe and b.experts else place
        kind, all_types, expert_types = kinds[b.index]
        types = all_types if place == HOST else expert_types if experts == HOST else 0
        found.append((At(b.index, b, place, experts, b is last), (kind, place, experts, b is last, types)))
    return found


def representatives(kinds: list) -> tuple[list[int], list[tuple[int, int, int, int]]]:
    """Indices to keep of a sequence: of a pattern that repeats, the first three turns and the last. And of each such pattern
    the indices where the second, third and last turn begin, and how many turns are left out."""
    kept, turns, i, n = [], [], 0, len(kinds)
    while i < n:
        best, times = 0, 0
        for period in range(1, min(MOST_PERIOD, n - i) + 1):
            count = 1
            while kinds[i + count * period:i + (count + 1) * period] == kinds[i:i + period]:
                count += 1
            if count > KEPT and count * period > best * times:
                best, times = period, count
        if best:
            kept += range(i, i + KEPT * best)
            end = i + best * times
            turns.append((i + best, i + 2 * best, end - best, times - KEPT))
            kept[-best:] = range(end - best, end)
            i = end
        else:
            kept.append(i)
            i += 1
    return kept, turns


@remembered
def _kinds(spec: ModelSpec, family: Family, types: tuple[str, ...]) -> tuple[tuple[int, int, int], ...]:
    """Three numbers for each block, the same where its graph, the types of its weights, those of its experts are the same."""
    tensors: list[list] = [[] for _ in spec.layers]
    typed: list[list] = [[] for _ in spec.layers]
    for i, t in enumerate(spec.tensors):
        if t.layer >= 0:
            tensors[t.layer].append((t.bare, t.shape, t.type == "F32"))
            if types:
                typed[t.layer].append((t.bare, types[i]))
    further = family.kind or (lambda spec, index: None)
    numbers: dict[tuple, int] = {}
    found = []
    for b in spec.layers:
        traits = tuple(getattr(b, name) for name in b.__slots__ if name != "index")
        all_types = tuple(sorted(typed[b.index]))
        keys = ((traits, tuple(sorted(tensors[b.index])), further(spec, b.index)), all_types,
                tuple(one for one in all_types if "_exps" in one[0]))
        found.append(tuple(numbers.setdefault(key, len(numbers)) for key in keys))
    return tuple(found)
