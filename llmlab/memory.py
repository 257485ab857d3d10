"""What each thing costs in bytes: weights, KV cache and recurrent state.

All exact; what graphs need beside them is modelled in `graphs` and `activations`.
Sources: llama.cpp at the version of llama-cpp-python 0.3.36 (src/llama-kv-cache*.cpp, llama-memory-recurrent.cpp,
llama-context.cpp, llama-quant.cpp); bitsandbytes' and GPTQ's storage layouts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import index

from .architectures import Layer, Tensor
from .errors import LabError, UnknownName
from .formats import FORMATS
from .formats.mixes import MIXES, Circumstances, Mix, Role, chooser, find_mix, needs_importance, roles
from .shapes import ModelSpec, model_spec, remembered
from .units import align

GGUF_ALIGNMENT = 32      # GGUF_DEFAULT_ALIGNMENT: tensor data is padded to it
PAGE = 16                # tokens in one of vLLM's KV pages
CONTEXT_PAD = 256        # llama.cpp pads the cells of a cache to it (llama-context.cpp)
ENGINES = ("llama.cpp", "transformers", "vllm")
MAX_CONTEXT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Term:
    """One cost on one device. `kind`: "exact", "modelled" or "measured"; `low` and `high` bound a modelled one."""

    name: str
    device: str
    bytes: int
    kind: str = "exact"
    low: int = 0
    high: int = 0
    why: str = ""


def exact(name: str, device: str, bytes: int, why: str) -> Term:
    return Term(name, device, bytes, "exact", bytes, bytes, why)


def modelled(name: str, device: str, bytes: float, low: float, high: float, why: str) -> Term:
    return Term(name, device, int(bytes), "modelled", int(low), int(high), why)


# ---- weights ------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Size:
    """The size of a model in a quant.

    `tensor_bytes`: each tensor rounded up to 32 bytes, as in a GGUF. `bits_per_weight`: unpadded bytes * 8 over the
    elements of all tensors. `needs_importance`: llama-quantize refuses this mix without an importance matrix.
    """

    quant: str
    tensor_bytes: int
    bits_per_weight: float
    needs_importance: bool
    elements: int

    def __repr__(self) -> str:
        from .units import format_bytes
        return (f"<{self.quant}: {format_bytes(self.tensor_bytes)}, {self.bits_per_weight:.4f} bits per weight"
                f"{', needs an importance matrix' if self.needs_importance else ''}>")


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of every tensor of a model in a quant, padded and not, in the order of `spec.tensors`."""

    quant: str
    types: tuple[str, ...]
    bytes: tuple[int, ...]
    by_layer: tuple[int, ...]           # block i; padded to 32 bytes, as are the next four
    experts_by_layer: tuple[int, ...]   # routed experts of block i, contained in by_layer
    embedding: int                      # token (and per-layer) embedding: the input, always on the host in llama.cpp
    output: int                         # output matrix (the embedding's bytes where tied) and what goes with it
    padded: int                         # all of it, a tied table counted once
    tied: int                           # bytes of a table that is both: it exists twice once the output is on a card
    head: int                           # the output matrix alone, the tied table where there is none
    largest_expert: int                 # the largest tensor of routed experts
    card_padding: tuple[int, ...]       # what a CUDA allocation adds to block i; last: to the output
    active: int                         # bytes read for one generated token: experts by their share, the output once


@remembered
def circumstances(spec: ModelSpec) -> Circumstances:
    """What llama-quantize's rules ask of a model."""
    def first(name: str) -> int:
        value = spec.metadata.get(name, 0)
        return int(value[0] if isinstance(value, (tuple, list)) else value or 0)
    heads = first("attention.head_count")
    kv_heads = first("attention.head_count_kv") if "attention.head_count_kv" in spec.metadata else heads
    blocks = len(spec.layers)
    trunk = len(spec.blocks)
    is_70b = trunk == 80 and (spec.architecture in ("qwen2", "olmo", "deci")
                              or spec.architecture == "llama" and spec.experts != 8 and heads != kv_heads)
    return Circumstances(spec.architecture, blocks, heads // kv_heads if kv_heads else 0, spec.experts, spec.tied, is_70b)


def default_quant(spec: ModelSpec, quant: str | None, engine: str = "llama.cpp") -> str:
    """The quant meant by None: as stored for a GGUF, Q4_K_M otherwise; transformers and vLLM take the checkpoint as it is, in
    its 16 or 32 bits."""
    if quant is None and engine != "llama.cpp":
        return spec.dtype if spec.dtype in ("F32", "F16", "BF16") else "BF16"
    return quant or spec.stored or "Q4_K_M"


@remembered
def types(spec: ModelSpec, quant: str, importance: bool = False) -> tuple[str, ...]:
    """The format of every tensor, in the order of `spec.tensors`. A GGUF in its own quant: what is really inside."""
    if spec.stored is not None and quant == spec.stored:
        return tuple(t.type for t in spec.tensors)
    mix = find_mix(quant)
    if mix.engine != "llama.cpp":
        return tuple(_engine_type(spec, mix, t) for t in spec.tensors)
    return tuple(map(_rule(spec, mix, importance), _roles(spec)))


@remembered
def _roles(spec: ModelSpec) -> tuple[Role, ...]:
    return roles(spec.tensors, len(spec.layers))


def _rule(spec: ModelSpec, mix: Mix, importance: bool) -> Callable[[Role], str]:
    return chooser(mix, circumstances(spec), importance)


def _engine_type(spec: ModelSpec, mix: Mix, tensor: Tensor) -> str:
    """Engines that load a checkpoint quantize linear layers and leave embeddings, head, norms and routers as they are.
    transformers 5 holds the routed experts of a block as one parameter, which bitsandbytes leaves alone too (measured)."""
    if not _is_linear(tensor) or (mix.engine == "transformers" and "_exps." in tensor.name):
        return spec.dtype
    return mix.name


_NOT_LINEAR = (".token_embd.", ".output.", ".position_embd.", ".per_layer_token_embd.", ".ffn_gate_inp.", ".ssm_conv1d.",
               ".shortconv.conv.", "_norm.", ".nextn.embed_tokens.", ".nextn.shared_head_head.", ".altup_", ".rope_")


def _is_linear(tensor: Tensor) -> bool:
    name = tensor.bare if tensor.layer >= 0 else f".{tensor.bare}"
    return len(tensor.shape) >= 2 and name.endswith(".weight") and not any(part in name for part in _NOT_LINEAR)


def tensor_bytes(type: str, shape: tuple[int, ...]) -> int:
    """Unpadded bytes of one tensor: a GGUF format, or a linear layer in bitsandbytes', GPTQ's, AWQ's or fp8's storage.

    shape in ggml order: shape[0] is the input width. bitsandbytes: 4 bits a weight, a float32 maximum per 64
    (double quant: a byte, and a float32 per 256 of those, and a 4-byte offset). GPTQ and AWQ: 4 bits, and per group of 128
    inputs and output a half scale and a 4-bit zero (GPTQ: an int32 group index per input).
    """
    elements = 1
    for n in shape:
        elements *= n
    if type in FORMATS and type not in ("NF4", "FP4"):
        return FORMATS[type].bytes(elements)
    rows = elements // shape[0]
    if type in ("NF4", "FP4", "NF4_DQ", "FP4_DQ"):
        blocks = -(-elements // 64)
        packed = -(-elements // 2)
        return packed + (blocks + 4 * -(-blocks // 256) + 4 if type.endswith("_DQ") else 4 * blocks)
    if type in ("INT8", "FP8"):
        return elements + 4 * rows
    if type in ("GPTQ_INT4", "AWQ_INT4"):
        groups = -(-shape[0] // 128) * rows
        return elements // 2 + 2 * groups + -(-groups // 2) + (4 * shape[0] if type == "GPTQ_INT4" else 0)
    raise UnknownName(f"{type} is not a format")


@remembered
def weights(spec: ModelSpec, quant: str, importance: bool = False) -> Weights:
    """Bytes of every tensor, and by block."""
    chosen = types(spec, quant, importance)
    count = len(spec.layers)
    by_layer, experts, padding = [0] * count, [0] * count, [0] * (count + 1)
    embedding = output = total = table = head = largest = active = 0
    seen: dict[tuple, tuple[int, int]] = {}
    sizes = []
    for tensor, type, (layer, part) in zip(spec.tensors, chosen, _parts(spec), strict=True):
        key = (type, tensor.shape)
        known = seen.get(key)
        if known is None:
            size = tensor_bytes(type, tensor.shape)
            known = seen[key] = size, align(size, GGUF_ALIGNMENT), cuda_padding(type, tensor.shape)
        size, padded, extra = known
        sizes.append(size)
        total += padded
        if layer >= 0:
            by_layer[layer] += padded
            padding[layer] += extra
            if part == "experts":
                block = spec.layers[layer]
                experts[layer] += padded
                largest = max(largest, padded)
                active += size * block.experts_used // block.experts
            elif part != "mtp":
                active += size
        elif part == "output":                   # output matrix, last norm, and rope tables of a few hundred bytes
            output += padded
            padding[count] += extra
            active += size
            if tensor.name == "output.weight":
                head = padded
        else:
            embedding += padded
            if part == "table":
                table = padded
                if spec.tied:
                    padding[count] += extra
                    active += size
    tied = table if spec.tied else 0
    return Weights(quant, chosen, tuple(sizes), tuple(by_layer), tuple(experts), embedding, output + tied, total, tied,
                   head or table, largest, tuple(padding), active)


_INPUT = ("token_embd.", "per_layer_token_embd.", "position_embd.")     # what llama.cpp calls the input layer


@remembered
def _parts(spec: ModelSpec) -> tuple[tuple[int, str], ...]:
    """(block or -1, part) of each tensor: "mtp" (all of such a block), "experts", "block"; outside blocks "table",
    "input", "output".
    Gemma's projection of per-layer embeddings lives with block 0 (llama-arch.cpp calls it a repeating tensor)."""
    found = []
    for tensor in spec.tensors:
        layer, name = tensor.layer, tensor.name
        if name.startswith(("per_layer_model_proj.", "per_layer_proj_norm.")):
            layer, part = 0, "block"
        elif layer >= 0:
            part = "mtp" if spec.layers[layer].mtp else "experts" if "_exps." in name else "block"
        else:
            part = "table" if name == "token_embd.weight" else "input" if name.startswith(_INPUT) else "output"
        found.append((layer, part))
    return tuple(found)


def cuda_padding(type: str, shape: tuple[int, ...]) -> int:
    """What llama.cpp's CUDA backend adds to a quantized tensor whose rows are no multiple of 512 weights: the rest of
    one such row (ggml-cuda.cu, MATRIX_ROW_PADDING)."""
    if type not in FORMATS or FORMATS[type].block == 1 or shape[0] % 512 == 0:
        return 0
    return FORMATS[type].bytes(512 - shape[0] % 512)


@remembered
def _groups(spec: ModelSpec) -> tuple[tuple[Role, tuple[int, ...], int], ...]:
    """(role, shape, how many) of what a card holds when it holds the whole model: all but the input table."""
    counted: dict[tuple, int] = {}
    left_out = ("mtp", "input") if spec.tied else ("mtp", "input", "table")
    for tensor, role, (_, part) in zip(spec.tensors, _roles(spec), _parts(spec), strict=True):
        if part not in left_out:
            key = role, tensor.shape
            counted[key] = counted.get(key, 0) + 1
    return tuple((*key, n) for key, n in counted.items())


@remembered
def card_bytes(spec: ModelSpec, quant: str, importance: bool = False) -> int:
    """Bytes of weights on one card that holds all layers and the output: what `weights` adds up to, without the blocks."""
    rule = _rule(spec, find_mix(quant), importance)
    total = 0
    for role, shape, n in _groups(spec):
        type = rule(role)
        total += n * (align(tensor_bytes(type, shape), GGUF_ALIGNMENT) + cuda_padding(type, shape))
    return total


@remembered
def loaded_bytes(spec: ModelSpec, quant: str) -> int:
    """Bytes of weights as transformers or vLLM hold a checkpoint: its parameters, unpadded; no rope tables (they are
    computed) and no multi-token-prediction blocks. In F32, F16 and BF16 every parameter has that type, vectors too."""
    mix = find_mix(quant)
    if mix.engine == "llama.cpp":
        return spec.params * FORMATS[mix.default].block_bytes // FORMATS[mix.default].block
    w = weights(spec, quant)
    return sum(size for tensor, size in zip(spec.tensors, w.bytes, strict=True)
               if not tensor.name.startswith("rope_") and not spec.is_mtp(tensor))


def size_of(spec: ModelSpec | str, quant: str | None = None, importance: bool = False) -> Size:
    """How large a model is in a quant, from its shapes alone: `llmlab.size`.

    Raises UnknownName for a quant that does not exist, LabError where it cannot hold the model's widths.
    """
    spec = model_spec(spec)
    quant = _named(spec, quant)
    w = weights(spec, quant, bool(importance))
    elements = sum(t.elements for t in spec.tensors)
    mix = MIXES.get(quant)
    needed = bool(mix) and mix.engine == "llama.cpp" and quant != spec.stored and needs_importance(
        mix, [t.name for t in spec.tensors], w.types)
    return Size(quant, w.padded, sum(w.bytes) * 8 / elements, needed, elements)


def mix_of(spec: ModelSpec | str, quant: str | None = None, importance: bool = False) -> dict[str, str]:
    """{GGUF tensor name: format} of a model in a quant: `llmlab.mix`. Raises as `size_of`."""
    spec = model_spec(spec)
    return dict(zip((t.name for t in spec.tensors), types(spec, _named(spec, quant), bool(importance)), strict=True))


def _named(spec: ModelSpec, quant: str | None) -> str:
    quant = default_quant(spec, quant)
    return quant if quant == spec.stored else find_mix(quant).name


# ---- KV cache and recurrent state ---------------------------------------------------------------------------

CACHE_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q5_1": "Q5_1", "q5_0": "Q5_0", "q4_1": "Q4_1",
               "q4_0": "Q4_0", "iq4_nl": "IQ4_NL", "fp8": "I8"}


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Bytes a layer keeps for the context: growing cache (`full`, `sliding`, by block) and fixed recurrent state."""

    full: int
    sliding: int
    recurrent: int
    by_layer: tuple[int, ...]
    recurrent_by_layer: tuple[int, ...]
    cells: int           # of a full layer, all sequences
    cells_sliding: int

    @property
    def kv(self) -> int:
        return self.full + self.sliding


def cache_types(kv: str | tuple[str, str]) -> tuple[str, str]:
    """(K type, V type) from `"q8_0"` or `("q8_0", "q4_0")`. Raises UnknownName."""
    pair = (kv, kv) if isinstance(kv, str) else tuple(kv) if isinstance(kv, (tuple, list)) and len(kv) == 2 else None
    if pair is None:
        raise UnknownName(f"kv is {kv!r:.60}; give one type like 'q8_0', or a pair for K and V")
    found = []
    for one in pair:
        name = str(one).lower()
        if name not in CACHE_TYPES:
            raise UnknownName(f"{str(one)[:40]!r} is no cache type; there are {', '.join(CACHE_TYPES)}")
        found.append(name)
    return found[0], found[1]


def checked_integer(name: str, value, low: int, high: int, remedy: str) -> int:
    """A whole number of any kind (numpy's too, not a bool) in [low, high] as an int, or LabError with the remedy."""
    try:
        whole = None if isinstance(value, bool) else index(value)
    except TypeError:
        whole = None
    if whole is None or not low <= whole <= high:
        raise LabError(f"{name} is {value!r:.40}; {remedy}")
    return whole


def check_settings(context: int, sequences: int = 1, batch: int = 2048, ubatch: int = 512) -> None:
    """Raise LabError unless these are whole positive numbers in range, and sequences no more than the context."""
    for name, value, high in (("context", context, MAX_CONTEXT), ("sequences", sequences, 65536), ("batch", batch, 2**24),
                              ("ubatch", ubatch, 2**24)):
        checked_integer(name, value, 1, high, f"give a whole number from 1 to {high}")
    if sequences > context:
        raise LabError(f"{sequences} sequences share a context of {context} tokens; give each at least one")


def cache_bytes(spec: ModelSpec, context: int, kv: str | tuple[str, str] = "f16", *, engine: str = "llama.cpp",
                sequences: int = 1, ubatch: int = 512, flash_attention: bool = True, swa_full: bool = False,
                unified: bool = False, drafted: int = 0) -> CacheBytes:
    """Bytes of the KV cache and the recurrent state.

    `context` is what all sequences share (llama.cpp's -c; each gets context / sequences). llama.cpp pads the
    cells of a sequence to 256; a sliding-window layer keeps window + ubatch cells (padded) unless `swa_full`;
    `unified` is one pool for all sequences. transformers keeps exactly the tokens; vLLM whole pages of 16, and of a
    sliding window the pages of the window and of two batches of `ubatch` tokens. `drafted`: tokens a draft may take back,
    each a row of recurrent state more. Raises LabError for settings that engine refuses.
    """
    check_settings(context, sequences, ubatch=ubatch)
    types = cache_types(kv)
    return _cache_bytes(spec, context, types, known_engine(engine), sequences, ubatch, bool(flash_attention), bool(swa_full),
                        bool(unified), drafted)


def known_engine(name: str) -> str:
    """The name of an engine, or UnknownName."""
    if name not in ENGINES:
        raise UnknownName(f"{str(name)[:40]!r} is no engine; there are {', '.join(ENGINES)}")
    return name


@remembered
def _cache_bytes(spec: ModelSpec, context: int, kv: tuple[str, str], engine: str, sequences: int, ubatch: int,
                 flash: bool, swa_full: bool, unified: bool, drafted: int) -> CacheBytes:
    if engine == "llama.cpp":
        cells, sliding_cells = llama_cells(spec, context, sequences, ubatch, swa_full, unified)
    elif engine == "vllm":
        cells, sliding_cells = align(-(-context // sequences), PAGE) * sequences, None
    else:
        cells, sliding_cells = context, None
    rows, states = _rows(spec, kv, engine, flash), _states(spec)
    kept = {0: cells}                   # cells by window
    for window in {window for _, window in rows} - {0}:
        if engine == "llama.cpp":
            kept[window] = sliding_cells
        elif engine == "vllm":
            kept[window] = _window_pages(window, ubatch, -(-context // sequences)) * PAGE * sequences
        else:
            kept[window] = min(cells, window * sequences)
    by_layer = [row * kept[window] for row, window in rows]
    full = sum(row for row, window in rows if not window) * cells
    recurrent = tuple([4 * sequences * (1 + drafted) * state for state in states])
    seen_cells = next((kept[window] for _, window in reversed(rows) if window), 0)
    if engine == "vllm" and (spare := _spare_pages(rows, cells, seen_cells)):
        by_layer[max(i for i, bytes in enumerate(by_layer) if bytes)] += spare
    return CacheBytes(full, sum(by_layer) - full, sum(recurrent), tuple(by_layer), recurrent, cells, seen_cells)


@remembered
def _rows(spec: ModelSpec, kv: tuple[str, str], engine: str, flash: bool) -> tuple[tuple[int, int], ...]:
    """(bytes of one cell, window) of each layer; 0 bytes where it keeps no cache of its own, 0 where there is no window."""
    row = _row_of(spec, kv, engine, flash)
    rows: dict[tuple, int] = {}
    found = []
    for layer in spec.layers:
        if not layer.owns_kv or not layer.attends or layer.mtp:
            found.append((0, 0))
            continue
        key = (layer.kv_heads, layer.key_dim, layer.value_dim, layer.mixer == "mla", layer.heads)
        if key not in rows:
            rows[key] = row(layer)
        found.append((rows[key], layer.window or (layer.declared_window if engine != "llama.cpp" else 0)))
    return tuple(found)


@remembered
def _states(spec: ModelSpec) -> tuple[int, ...]:
    """Numbers that each layer keeps of a sequence, but for its cache."""
    return tuple(0 if layer.mtp else layer.conv_state + layer.ssm_state for layer in spec.layers)


@remembered
def _widest_window(spec: ModelSpec) -> int:
    return max((layer.window for layer in spec.layers), default=0)


def _window_pages(window: int, batch: int, context: int) -> int:
    """Pages vLLM keeps of a sliding window for one request: the window, two batches under way, and one page more as the
    window need not begin with a page (SlidingWindowSpec.max_admission_blocks_per_request)."""
    return -(-min(window - 1 + 2 * batch, context) // PAGE) + 1


def _spare_pages(rows: tuple[tuple[int, int], ...], cells: int, window_cells: int) -> int:
    """Bytes that vLLM's groups of layers waste: full and sliding layers are put into groups of equally many, the last of
    each kind filled up with layers there are none of (kv_cache_planning.py). One kind of layer, or cells of different
    size: none."""
    windows = sum(1 for row, window in rows if row and window)
    others = sum(1 for row, window in rows if row and not window)
    sizes = {row for row, _ in rows if row}
    if not windows or not others or len(sizes) > 1:
        return 0
    few, many = sorted((windows, others))
    size = many if many < 1.5 * few else few
    return sizes.pop() * ((-windows % size) * window_cells + (-others % size) * cells)


def mtp_cache(spec: ModelSpec, context: int, sequences: int = 1, unified: bool = False, flash_attention: bool = True) -> int:
    """Bytes of cache that each multi-token-prediction block keeps while llama.cpp drafts with it: full length, float16."""
    cells, _ = llama_cells(spec, context, sequences, 1, False, unified)
    row = _row_of(spec, ("f16", "f16"), "llama.cpp", flash_attention)
    return max((row(layer) * cells for layer in spec.layers if layer.mtp and layer.attends), default=0)


def llama_cells(spec: ModelSpec, context: int, sequences: int, ubatch: int, swa_full: bool, unified: bool) -> tuple[int, int]:
    """Cells of a full and of a sliding layer over all sequences (llama-context.cpp, llama-kv-cache-iswa.cpp)."""
    padded = align(context, CONTEXT_PAD)
    per_sequence = padded if unified or sequences == 1 else align(padded // sequences, CONTEXT_PAD)
    streams = 1 if unified else sequences
    kept = min(per_sequence, _widest_window(spec) * (sequences if unified else 1) + ubatch)
    sliding = per_sequence if swa_full else align(kept, CONTEXT_PAD)
    return per_sequence * streams, sliding * streams


def _row_of(spec: ModelSpec, kv: tuple[str, str], engine: str, flash: bool):
    """A function from layer to bytes of one cell (K and V)."""
    k_format, v_format = FORMATS[CACHE_TYPES[kv[0]]], FORMATS[CACHE_TYPES[kv[1]]]
    attending = [layer for layer in spec.layers if layer.attends and layer.owns_kv]
    if engine == "llama.cpp":
        if kv[1] not in ("f32", "f16", "bf16") and not flash:
            raise LabError(f"a {kv[1]} V cache needs flash attention; turn it on or keep V in f16")
        if "fp8" in kv:
            raise LabError("llama.cpp has no fp8 cache; choose q8_0, or engine='vllm'")
        if kv[0] != kv[1] and any(b.mixer == "mla" for b in attending):
            raise LabError(f"{spec.name} keeps one latent row for K and V; give both the same cache type")
        for layer in attending:          # flash attention reads head by head, without it whole rows are read
            heads = 1 if flash else layer.kv_heads
            for format, dim, which in ((k_format, layer.key_dim, "K"), (v_format, layer.value_dim, "V")):
                if heads * dim % format.block:
                    raise LabError(f"a {which} cache in {kv[which == 'V']} needs heads of a multiple of {format.block}; "
                                   f"{spec.name} has heads of {dim}")
    widest = max((b.kv_heads * b.value_dim for b in spec.layers if b.attends), default=0)
    uneven = len({b.kv_heads * b.value_dim for b in spec.layers}) > 1

    def row(layer: Layer) -> int:
        if layer.mixer == "mla":             # one latent row; transformers 5 too (measured)
            return k_format.bytes(layer.kv_heads * layer.key_dim)
        values = layer.kv_heads * layer.value_dim
        if engine == "llama.cpp" and not flash and uneven:
            values = widest
        return k_format.bytes(layer.kv_heads * layer.key_dim) + v_format.bytes(values)

    return row


def output_bytes(spec: ModelSpec, sequences: int = 1) -> int:
    """Logits kept on the host: float32, one row a sequence."""
    return 4 * spec.vocab * sequences
