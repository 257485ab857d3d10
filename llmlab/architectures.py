"""From hyperparameters to layers and tensors: what a GGUF of each architecture holds.

Hyperparameters are GGUF metadata without the architecture prefix (`"block_count"`,
`"attention.head_count_kv"`, ...), whether they were read from a GGUF or translated from a config.json,
so that there is one way to count. Tensor names and shapes follow llama.cpp's loaders
(src/models/*.cpp) and converters (conversion/*.py), read at the version of llama-cpp-python 0.3.36.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from .errors import BadConfig

MAX_LAYERS = 1024
MAX_ELEMENTS = 2**50     # of a whole model: a thousand times the largest published one


@lru_cache(maxsize=2**15)
def _parted(name: str) -> tuple[int, str]:
    """(block, name without it) of a tensor; (-1, name) outside the blocks. Models share most names."""
    if name.startswith("blk."):
        number, dot, rest = name[4:].partition(".")
        if dot and number.isascii() and number.isdecimal() and len(number) < 8:
            return int(number), "." + rest
    return -1, name


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight. `shape` in ggml order: shape[0] is the row length. `type` is None where a quant chooses it.

    `layer` is its block's number (-1 outside the blocks) and `bare` its name without it, equal in all blocks.
    """

    name: str
    shape: tuple[int, ...]
    type: str | None = None
    layer: int = field(init=False, repr=False, compare=False, default=-1)
    bare: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self):
        layer, bare = _parted(self.name)             # read once here: a fit asks for it thousands of times
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "bare", bare)

    @property
    def elements(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count


@dataclass(frozen=True, slots=True)
class Layer:
    """One block. `mixer` says how tokens mix: "full", "sliding", "chunked", "mla", "recurrent" or "none".

    `key_dim` and `value_dim` are per head; `window` in tokens (0: none); `declared_window` is a window the
    config names and llama.cpp ignores. A layer without `owns_kv` reads another layer's cache.
    `conv_state` and `ssm_state` are float32 elements per sequence of a recurrent layer (both kinds at once
    in Falcon-H1). `mtp`: a multi-token-prediction block, in the file but not loaded unless drafting is on.
    """

    index: int
    mixer: str
    heads: int = 0
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int = 0
    declared_window: int = 0
    owns_kv: bool = True
    conv_state: int = 0
    ssm_state: int = 0
    ff: int = 0
    experts: int = 0
    experts_used: int = 0
    expert_ff: int = 0
    shared_ff: int = 0
    mtp: bool = False

    @property
    def attends(self) -> bool:
        return self.mixer in ("full", "sliding", "chunked", "mla")


@dataclass(frozen=True, slots=True)
class Traits:
    """What a config says and GGUF metadata does not: which optional tensors exist."""

    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""              # "", "head" (a vector of head_dim) or "full" (a vector over all heads)
    rope_freqs: int = 0            # elements of rope_freqs.weight
    rope_factors: int = 0          # elements of rope_factors_long and _short each
    router_bias: bool = False
    mtp_own_embeddings: bool = False
    second_norm: bool = False      # attn_norm_2 (Falcon 40B and later)


# ---- layers -------------------------------------------------------------------------------------------------

_SWA_PERIOD = {  # every n-th layer is full where the file does not say; llama.cpp load_swa_pattern
    "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "llama4": 4, "olmo2": 4, "exaone4": 4,
    "smallthinker": 4, "gemma-embedding": 6, "plamo3": 8, "mimo2": 0, "step35": 0, "gemma4": 0, "afmoe": 4,
    "exaone-moe": 4, "laguna": 4, "mellum": 4, "apertus": 0,
}
_DELTANET = ("qwen3next", "qwen35", "qwen35moe")
_RECURRENT_ONLY = ("mamba", "mamba2", "rwkv6", "rwkv7", "arwkv7", "rwkv6qwen2")


def _per_layer(value, layers: int, name: str) -> tuple[int, ...]:
    """A scalar for all layers or a list of one each, as llama.cpp's get_key_or_arr reads it."""
    if isinstance(value, (list, tuple)):
        if len(value) < layers:
            raise BadConfig(f"{name} lists {len(value)} values for {layers} layers")
        return tuple(int(v) for v in value[:layers])
    return (int(value),) * layers


def whole_number(name: str, value, low: int = 0, high: int = 2**31) -> int:
    """An integer in range, or BadConfig naming the field."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (
            isinstance(value, int) or value.is_integer()):       # is_integer: false for nan and infinities
        raise BadConfig(f"{name} is {value!r:.60}, expected a whole number")
    if not low <= value <= high:
        raise BadConfig(f"{name} is {value!r:.60}, expected {low} to {high}")
    return int(value)


def layers(architecture: str, kv: dict) -> tuple[Layer, ...]:
    """The blocks of a model, multi-token-prediction blocks last.

    `kv`: metadata without the architecture prefix. Raises BadConfig on missing or absurd values.
    """
    def get(name: str, default=0, low: int = 0) -> int:
        value = kv.get(name, default)
        if value is None:
            value = default
        return whole_number(name, value, low)

    for needed in ("block_count", "embedding_length"):
        if needed not in kv:
            raise BadConfig(f"{architecture} metadata has no {needed}")
    count = whole_number("block_count", kv["block_count"], 1, MAX_LAYERS)
    width = get("embedding_length", low=1)
    mtp = get("nextn_predict_layers")
    if mtp >= count and mtp:
        raise BadConfig(f"nextn_predict_layers is {mtp}, but there are {count} blocks")
    trunk = count - mtp
    heads = _per_layer(kv.get("attention.head_count", 0) or 0, count, "attention.head_count")
    kv_heads_given = kv.get("attention.head_count_kv")
    kv_heads = heads if kv_heads_given is None else _per_layer(kv_heads_given, count, "attention.head_count_kv")
    ff = _per_layer(kv.get("feed_forward_length", 0) or 0, count, "feed_forward_length")
    for name, values, high in (("attention.head_count", heads, 65536), ("attention.head_count_kv", kv_heads, 65536),
                               ("feed_forward_length", ff, 2**31)):
        for value in values:
            whole_number(name, value, 0, high)
    for i in range(count):
        if kv_heads[i] and heads[i] % kv_heads[i]:
            raise BadConfig(f"{heads[i]} heads do not share {kv_heads[i]} KV heads evenly")
    most_heads = max(heads) if heads else 0
    default_dim = width // most_heads if most_heads else 0
    key_dim = get("attention.key_length", default_dim)
    value_dim = get("attention.value_length", default_dim)
    key_swa = get("attention.key_length_swa", key_dim)
    value_swa = get("attention.value_length_swa", value_dim)
    mla = bool(kv.get("attention.key_length_mla"))
    recurrent = _recurrent(architecture, kv, count, trunk, kv_heads, ff)
    sliding, window, sliding_kind = _sliding(architecture, kv, count, trunk)
    declared = get("attention.sliding_window") if not window else 0
    shared_from = trunk
    if architecture in ("gemma3n", "gemma4"):
        shared = get("attention.shared_kv_layers", 0)
        if shared >= count:
            raise BadConfig(f"all {count} layers share another one's cache; at least one must own it")
        shared_from = 20 if architecture == "gemma3n" else count - shared
    conv_state, ssm_state = _state(kv, get, width, heads)
    experts = get("expert_count")
    used = _per_layer(kv.get("expert_used_count", 0) or 0, count, "expert_used_count")
    if experts and max(used) > experts:
        raise BadConfig(f"expert_used_count is {max(used)}, but there are {experts} experts")
    given_ff = kv.get("expert_feed_forward_length")
    expert_ff = ff if given_ff is None else _per_layer(given_ff, count, "expert_feed_forward_length")
    shared_ff = get("expert_shared_feed_forward_length")
    if not shared_ff and get("expert_shared_count") and experts:
        shared_ff = get("expert_shared_count") * max(expert_ff)
    dense_lead = get("leading_dense_block_count")
    step = get("interleave_moe_layer_step", 1) or 1
    built = []
    for i in range(count):
        is_mtp = i >= trunk
        moe = bool(experts) and i >= dense_lead and (step == 1 or (i + 1) % step == 0)
        if period := kv.get("llmlab.expert_period"):          # Jamba's files list it by which tensors they hold
            moe = i % period == kv["llmlab.expert_offset"]
        if architecture in ("nemotron_h", "nemotron_h_moe") and not is_mtp:
            moe = moe and not recurrent[i] and kv_heads[i] == 0
        attends = bool(kv_heads[i]) and not recurrent[i] and architecture not in _RECURRENT_ONLY
        if architecture in ("nemotron_h", "nemotron_h_moe") and ff[i] and not is_mtp:
            attends = False
        both = architecture == "falcon-h1"
        if attends or both:
            mixer = "mla" if mla else sliding_kind if sliding[i] else "full"
        else:
            mixer = "recurrent" if recurrent[i] else "none"
        state = recurrent[i] or both
        built.append(Layer(
            i, mixer, heads[i], kv_heads[i] if attends or both else 0,
            key_swa if sliding[i] else key_dim, value_swa if sliding[i] else value_dim,
            window if sliding[i] else 0, declared if attends else 0,
            owns_kv=(attends or both) and (i < shared_from or architecture not in ("gemma3n", "gemma4")),
            conv_state=conv_state if state else 0, ssm_state=ssm_state if state else 0,
            ff=0 if moe and architecture not in ("gemma4", "arctic") else ff[i],
            experts=experts if moe else 0, experts_used=used[i] if moe else 0,
            expert_ff=expert_ff[i] if moe else 0, shared_ff=shared_ff if moe or not experts else 0, mtp=is_mtp))
    return tuple(built)


def _recurrent(architecture: str, kv: dict, count: int, trunk: int, kv_heads, ff) -> tuple[bool, ...]:
    """Which blocks keep a state instead of a cache (llama.cpp's is_recr, by architecture)."""
    if architecture in _RECURRENT_ONLY:
        return (True,) * count
    if architecture == "falcon-h1":
        return (False,) * count
    if architecture in _DELTANET:
        listed = kv.get("attention.recurrent_layers")
        if isinstance(listed, (list, tuple)):
            return tuple(bool(v) for v in _per_layer(listed, count, "attention.recurrent_layers"))
        every = whole_number("full_attention_interval", kv.get("full_attention_interval", 4), 1)
        return tuple(i < trunk and (i + 1) % every != 0 for i in range(count))
    if architecture in ("nemotron_h", "nemotron_h_moe"):
        return tuple(i < trunk and kv_heads[i] == 0 and ff[i] == 0 for i in range(count))
    if "ssm.inner_size" in kv or "shortconv.l_cache" in kv or "kda.head_dim" in kv:
        return tuple(i < trunk and kv_heads[i] == 0 for i in range(count))
    return (False,) * count


def _sliding(architecture: str, kv: dict, count: int, trunk: int) -> tuple[tuple[bool, ...], int, str]:
    """Which blocks see a window only, how long it is, and whether it slides or is cut in chunks."""
    none = (False,) * count
    window = kv.get("attention.sliding_window")
    if architecture == "gemma2" and window is None:
        window = 4096
    if architecture == "llama4" and window != 0:
        window = 8192                # whatever the file says
    window = whole_number("attention.sliding_window", window or 0)
    if architecture == "exaone4" and trunk != 64:
        return none, 0, "sliding"   # llama.cpp gives windows to the model of 64 blocks alone
    if architecture not in _SWA_PERIOD and architecture not in ("lfm2", "lfm2moe"):
        return none, 0, "sliding"   # llama.cpp reads no window there (phi3, mistral's llama, qwen2)
    if not window:
        return none, 0, "sliding"
    pattern = kv.get("attention.sliding_window_pattern")
    if isinstance(pattern, (list, tuple)):
        slides = tuple(bool(v) for v in _per_layer(pattern, min(count, len(pattern)), "attention.sliding_window_pattern"))
        slides += (False,) * (count - len(slides))
    else:
        period = whole_number("attention.sliding_window_pattern", pattern or _SWA_PERIOD.get(architecture, 0))
        slides = tuple(i < trunk and (period == 0 or i % period < period - 1) for i in range(count))
    return slides, window, "chunked" if architecture == "llama4" else "sliding"


def _state(kv: dict, get: Callable, width: int, heads) -> tuple[int, int]:
    """(convolution, state) elements per sequence: llama.cpp's n_embd_r and n_embd_s."""
    if kv.get("wkv.head_size"):
        return get("token_shift_count", 2) * width, width * get("wkv.head_size")
    if kv.get("shortconv.l_cache"):
        return width * (get("shortconv.l_cache") - 1), 0
    kernel = get("ssm.conv_kernel")
    if kv.get("kda.head_dim"):
        inner = max(heads) * get("kda.head_dim")
        return 3 * (kernel - 1 if kernel else 3) * inner, get("kda.head_dim") * inner
    inner, state, groups = get("ssm.inner_size"), get("ssm.state_size"), get("ssm.group_count")
    return max(kernel - 1, 0) * (inner + 2 * groups * state), state * inner


# ---- tensors ------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class _Plan:
    """How an architecture arranges a block. Names are GGUF's."""

    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    norm_bias: bool = False
    fused_qkv: bool = False
    gate: str = "split"            # "split" (gate and up), "fused" (up is twice as wide), "none" (plain MLP)
    query_gate: bool = False       # q carries an output gate, twice as wide
    shared_gate: bool = False      # shared expert behind a sigmoid gate
    sinks: bool = False
    expert_bias: bool = False
    head_gate: bool = False        # attn_gate [width, heads]
    separate_output: bool = True   # False: the architecture always ties
    output_bias: bool = False
    final_norm: str = "output_norm"
    positions: bool = False        # a learned table of positions


_SANDWICH = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_POST_AS_FFN = ("attn_norm", "post_attention_norm")

PLANS: dict[str, _Plan] = {
    **dict.fromkeys(("llama", "mistral3", "qwen2", "qwen3", "qwen3moe", "minimax-m2", "smollm3", "granite", "granitemoe",
                     "olmoe", "internlm2", "ernie4_5", "hunyuan-dense", "qwen2vl", "qwen3vl", "qwen3vlmoe"), _Plan()),
    "arcee": _Plan(gate="none"),
    "qwen2moe": _Plan(shared_gate=True),
    "gemma": _Plan(separate_output=False),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3n", "gemma4"), _Plan(norms=_SANDWICH)),
    "olmo": _Plan(norms=(), final_norm=""),
    "olmo2": _Plan(norms=("post_attention_norm", "post_ffw_norm")),
    "exaone4": _Plan(norms=("post_attention_norm", "post_ffw_norm")),
    "glm4": _Plan(norms=_SANDWICH, gate="fused"),
    "glm4moe": _Plan(norms=_POST_AS_FFN),
    "seed_oss": _Plan(norms=_POST_AS_FFN),
    "gpt-oss": _Plan(norms=_POST_AS_FFN, sinks=True, expert_bias=True),
    **dict.fromkeys(_DELTANET, _Plan(norms=_POST_AS_FFN, query_gate=True, shared_gate=True)),
    "phi3": _Plan(fused_qkv=True, gate="fused"),
    "phi2": _Plan(norms=("attn_norm",), norm_bias=True, fused_qkv=True, gate="none", output_bias=True),
    "falcon": _Plan(norms=("attn_norm",), norm_bias=True, fused_qkv=True, gate="none"),
    "command-r": _Plan(norms=("attn_norm",), separate_output=False),
    "cohere2": _Plan(norms=("attn_norm",), separate_output=False),
    "starcoder2": _Plan(norm_bias=True, gate="none"),
    "stablelm": _Plan(norm_bias=True),
    "nemotron": _Plan(norm_bias=True, gate="none"),
    "gptneox": _Plan(norm_bias=True, fused_qkv=True, gate="none"),
    "gpt2": _Plan(norm_bias=True, fused_qkv=True, gate="none", positions=True),
    "deepseek2": _Plan(),
    "llama4": _Plan(),
    "step35": _Plan(head_gate=True),
    **dict.fromkeys(("lfm2", "lfm2moe"), _Plan(final_norm="token_embd_norm")),
    "granitehybrid": _Plan(),
    **dict.fromkeys(("nemotron_h", "nemotron_h_moe"), _Plan(norms=("attn_norm",), gate="none")),
    "falcon-h1": _Plan(),
    "jamba": _Plan(),
    **dict.fromkeys(("mamba", "mamba2"), _Plan(norms=("attn_norm",))),
}


def tensors(architecture: str, kv: dict, traits: Traits) -> tuple[Tensor, ...]:
    """Every tensor of the GGUF that llama.cpp's converter would write, in no particular order.

    Types are set only where the converter fixes them (float32 for vectors, norms, routers, convolutions).
    Raises BadConfig for an architecture without a plan, and on shapes that overflow.
    """
    if architecture not in PLANS:
        raise BadConfig(f"architecture {architecture!r:.60} has no tensor plan; give a GGUF of it, which says its own tensors")
    plan = PLANS[architecture]
    blocks = layers(architecture, kv)
    width, vocab = kv["embedding_length"], whole_number("vocab_size", kv.get("vocab_size"), 1)
    built = [Tensor("token_embd.weight", (width, vocab))]
    if plan.final_norm:
        built.append(Tensor(f"{plan.final_norm}.weight", (width,)))
    if plan.norm_bias:
        built.append(Tensor(f"{plan.final_norm}.bias", (width,)))
    if plan.separate_output and not traits.tied:
        built.append(Tensor("output.weight", (width, vocab)))
    if plan.output_bias:
        built.append(Tensor("output.bias", (vocab,)))
    if plan.positions:
        built.append(Tensor("position_embd.weight", (width, kv["context_length"]), "F32"))
    if traits.rope_freqs:
        built.append(Tensor("rope_freqs.weight", (traits.rope_freqs,)))
    if traits.rope_factors:
        built += [Tensor(f"rope_factors_{which}.weight", (traits.rope_factors,)) for which in ("long", "short")]
    if per_layer := kv.get("embedding_length_per_layer_input"):
        built += [Tensor("per_layer_token_embd.weight", (per_layer * len(blocks), vocab)),
                  Tensor("per_layer_model_proj.weight", (width, per_layer * len(blocks)), "BF16"),
                  Tensor("per_layer_proj_norm.weight", (per_layer,))]
    if architecture == "gemma3n":
        built += [Tensor(f"{name}.weight", (width, width, kv.get("altup.num_inputs", 4) - 1), "BF16")
                  for name in ("altup_proj", "altup_unembd_proj")]
    for block in blocks:
        for name, shape, type in _block(architecture, kv, traits, plan, block):
            built.append(Tensor(f"blk.{block.index}.{name}", shape, type or _fixed(name, shape)))
    if sum(t.elements for t in built) > MAX_ELEMENTS:
        raise BadConfig(f"this would be a model of {sum(t.elements for t in built):.1e} weights; the config cannot be right")
    done = []
    for tensor in built:
        if min(tensor.shape) < 1:
            raise BadConfig(f"{tensor.name} would have the shape {tensor.shape}; the config leaves a size out")
        fixed = tensor.type or _fixed(tensor.name, tensor.shape)
        done.append(tensor if fixed == tensor.type else Tensor(tensor.name, tensor.shape, fixed))
    return tuple(done)


def _fixed(name: str, shape: tuple[int, ...]) -> str | None:
    """The type that the converter gives whatever the quant: vectors, norms and what is no weight stay in float32."""
    return "F32" if len(shape) == 1 or name.endswith("_norm.weight") or not name.endswith(".weight") else None


_Part = tuple[str, tuple[int, ...], str | None]


def _block(architecture: str, kv: dict, t: Traits, plan: _Plan, b: Layer) -> Iterator[_Part]:
    """(name, shape, fixed type) of one block's tensors."""
    width = kv["embedding_length"]
    for norm in plan.norms:
        bare = (architecture, norm) == ("falcon-h1", "ffn_norm")      # written without the suffix
        yield norm if bare else f"{norm}.weight", (width,), None
        if plan.norm_bias:
            yield f"{norm}.bias", (width,), None
    if t.second_norm:
        yield "attn_norm_2.weight", (width,), None
        yield "attn_norm_2.bias", (width,), None
    if b.mixer == "mla":
        yield from _mla(kv, b, width)
    elif b.attends:
        yield from _attention(architecture, kv, t, plan, b, width)
    if b.conv_state or b.ssm_state:
        yield from _recurrent_mixer(architecture, kv, width)
    if b.experts:
        yield from _experts(architecture, kv, t, plan, b, width)
    if b.ff and architecture not in _RECURRENT_ONLY:
        yield from _dense(t, plan, b, width)
    elif b.shared_ff and not b.experts:                  # Granite 4 without experts: the shared MLP is the dense one
        yield from _dense(t, plan, b, width, b.shared_ff)
    if architecture in ("gemma4", "gemma3n"):
        yield from _gemma_extras(architecture, kv, b, width)
    if b.mtp:
        yield "nextn.eh_proj.weight", (2 * width, width), None
        for name in ("enorm", "hnorm", "shared_head_norm"):
            yield f"nextn.{name}.weight", (width,), None
        if t.mtp_own_embeddings:
            for name in ("embed_tokens", "shared_head_head"):
                yield f"nextn.{name}.weight", (width, kv["vocab_size"]), None


def _attention(architecture: str, kv: dict, t: Traits, plan: _Plan, b: Layer, width: int) -> Iterator[_Part]:
    q, k, v = b.heads * b.key_dim, b.kv_heads * b.key_dim, b.kv_heads * b.value_dim
    q_wide = 2 * q if plan.query_gate else q
    own = b.owns_kv or architecture == "gemma3n"     # its files hold the unused K and V of blocks that share a cache
    if plan.fused_qkv:
        parts = [("attn_qkv", q + k + v)]
    else:
        parts = [("attn_q", q_wide)]
        if own:
            parts.append(("attn_k", k))
            if not (kv.get("attention.k_eq_v") and b.mixer == "full"):
                parts.append(("attn_v", v))
    for name, rows in parts:
        yield f"{name}.weight", (width, rows), None
        if t.qkv_bias:
            yield f"{name}.bias", (rows,), None
    yield "attn_output.weight", (b.heads * b.value_dim, width), None
    if t.output_bias:
        yield "attn_output.bias", (width,), None
    if t.qk_norm == "head":
        yield "attn_q_norm.weight", (b.key_dim,), None
        if own:
            yield "attn_k_norm.weight", (b.key_dim,), None
    elif t.qk_norm == "full":
        yield "attn_q_norm.weight", (q,), None
        yield "attn_k_norm.weight", (k,), None
    elif t.qk_norm == "each":                            # one vector for every head (Command R+)
        yield "attn_q_norm.weight", (b.key_dim, b.heads), None
        yield "attn_k_norm.weight", (b.key_dim, b.kv_heads), None
    if plan.sinks:
        yield "attn_sinks.weight", (b.heads,), None
    if plan.head_gate:
        yield "attn_gate.weight", (width, b.heads), None


def _mla(kv: dict, b: Layer, width: int) -> Iterator[_Part]:
    """Multi-head latent attention as new files hold it: k_b and v_b apart (DeepSeek-V2 paper, section 2.1)."""
    rank, rope = kv["attention.kv_lora_rank"], kv["rope.dimension_count"]
    key, value = kv["attention.key_length_mla"], kv["attention.value_length_mla"]
    if q_rank := kv.get("attention.q_lora_rank"):
        yield "attn_q_a.weight", (width, q_rank), None
        yield "attn_q_a_norm.weight", (q_rank,), None
        yield "attn_q_b.weight", (q_rank, b.heads * key), None
    else:
        yield "attn_q.weight", (width, b.heads * key), None
    yield "attn_kv_a_mqa.weight", (width, rank + rope), None
    yield "attn_kv_a_norm.weight", (rank,), None
    yield "attn_k_b.weight", (key - rope, rank, b.heads), None
    yield "attn_v_b.weight", (rank, value, b.heads), None
    yield "attn_output.weight", (b.heads * value, width), None


def _recurrent_mixer(architecture: str, kv: dict, width: int) -> Iterator[_Part]:
    if kv.get("shortconv.l_cache"):
        yield "shortconv.conv.weight", (kv["shortconv.l_cache"], width), "F32"
        yield "shortconv.in_proj.weight", (width, 3 * width), None
        yield "shortconv.out_proj.weight", (width, width), None
        return
    inner, state, kernel = kv["ssm.inner_size"], kv["ssm.state_size"], kv["ssm.conv_kernel"]
    rank, groups = kv.get("ssm.time_step_rank", 0), kv.get("ssm.group_count", 0)
    if architecture in _DELTANET:
        keys = state * groups
        yield "attn_qkv.weight", (width, 2 * keys + inner), None
        yield "attn_gate.weight", (width, inner), None
        yield "ssm_conv1d.weight", (kernel, 2 * keys + inner), "F32"
        yield "ssm_dt.bias", (rank,), None
        yield "ssm_a", (rank,), None
        if architecture == "qwen3next":
            yield "ssm_ba.weight", (width, 2 * rank), None
        else:
            yield "ssm_alpha.weight", (width, rank), None
            yield "ssm_beta.weight", (width, rank), None
        yield "ssm_norm.weight", (inner // rank,), None
        yield "ssm_out.weight", (inner, width), None
        return
    if architecture in ("mamba", "jamba"):
        yield "ssm_in.weight", (width, 2 * inner), None
        yield "ssm_conv1d.weight", (kernel, inner), "F32"
        yield "ssm_conv1d.bias", (inner,), None
        yield "ssm_x.weight", (inner, rank + 2 * state), None
        yield "ssm_dt.weight", (rank, inner), None
        yield "ssm_dt.bias", (inner,), None
        yield "ssm_a", (state, inner), None
        yield "ssm_d", (inner,), None
        yield "ssm_out.weight", (inner, width), None
        if architecture == "jamba":
            yield "ssm_dt_norm.weight", (rank,), None
            yield "ssm_b_norm.weight", (state,), None
            yield "ssm_c_norm.weight", (state,), None
        return
    conv = inner + 2 * groups * state                    # Mamba-2
    yield "ssm_in.weight", (width, 2 * inner + 2 * groups * state + rank), None
    yield "ssm_conv1d.weight", (kernel, conv), "F32"
    yield "ssm_conv1d.bias", (conv,), None
    yield "ssm_dt.bias", (rank,), None
    yield "ssm_a", (1, rank), None
    yield "ssm_d", (1, rank), None
    if not (architecture == "falcon-h1" and not kv.get("ssm.rms_norm", True)):
        yield "ssm_norm.weight", (inner // groups, groups), None
    yield "ssm_out.weight", (inner, width), None


def _experts(architecture: str, kv: dict, t: Traits, plan: _Plan, b: Layer, width: int) -> Iterator[_Part]:
    n, f = b.experts, b.expert_ff
    yield "ffn_gate_inp.weight", (width, n), "F32"
    inner = kv.get("moe_latent_size") or width
    if inner != width:
        yield "ffn_latent_down.weight", (width, inner), None
        yield "ffn_latent_up.weight", (inner, width), None
    gated = plan.gate != "none"
    if gated:
        yield "ffn_gate_exps.weight", (inner, f, n), None
    yield "ffn_up_exps.weight", (inner, f, n), None
    yield "ffn_down_exps.weight", (f, inner, n), None
    if plan.expert_bias:
        yield "ffn_gate_inp.bias", (n,), None
        yield "ffn_gate_exps.bias", (f, n), None
        yield "ffn_up_exps.bias", (f, n), None
        yield "ffn_down_exps.bias", (width, n), None
    if t.router_bias and not plan.expert_bias:
        yield "exp_probs_b.bias", (n,), None
    if b.shared_ff:
        if gated:
            yield "ffn_gate_shexp.weight", (width, b.shared_ff), None
        yield "ffn_up_shexp.weight", (width, b.shared_ff), None
        yield "ffn_down_shexp.weight", (b.shared_ff, width), None
        if plan.shared_gate:
            yield "ffn_gate_inp_shexp.weight", (width,), None


def _dense(t: Traits, plan: _Plan, b: Layer, width: int, ff: int = 0) -> Iterator[_Part]:
    f = ff or b.ff
    parts = [("ffn_up", (width, 2 * f if plan.gate == "fused" else f)), ("ffn_down", (f, width))]
    if plan.gate == "split":
        parts.append(("ffn_gate", (width, f)))
    for name, shape in parts:
        yield f"{name}.weight", shape, None
        if t.mlp_bias:
            yield f"{name}.bias", (shape[1],), None


def _gemma_extras(architecture: str, kv: dict, b: Layer, width: int) -> Iterator[_Part]:
    per_layer = kv.get("embedding_length_per_layer_input")
    if per_layer:
        yield "inp_gate.weight", (width, per_layer), None
        yield "proj.weight", (per_layer, width), None
        yield "post_norm.weight", (width,), None
    if architecture == "gemma4":
        yield "layer_output_scale.weight", (1,), None
        if b.experts:
            yield "ffn_gate_inp.scale", (width,), None
            yield "ffn_down_exps.scale", (b.experts,), None
            for name in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"):
                yield f"{name}.weight", (width,), "F32"
        return
    inputs, rank = kv.get("altup.num_inputs", 4), kv.get("laurel_rank", 64)
    yield "altup_correct_coef.weight", (inputs, inputs), "F32"
    yield "altup_correct_scale.weight", (width,), None
    yield "altup_predict_coef.weight", (inputs, inputs * inputs), "F32"
    yield "altup_router.weight", (width, inputs), "BF16"
    yield "altup_router_norm.weight", (width,), None
    yield "laurel_l.weight", (width, rank), "BF16"
    yield "laurel_r.weight", (rank, width), "BF16"
    yield "laurel_post_norm.weight", (width,), None
