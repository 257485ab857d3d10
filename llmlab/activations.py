"""What transformers allocates beyond weights: the tensors alive at the worst moment of a prefill and of a decode step.

The model is run with tensors that have a size and nothing else. Python frees them where it frees the real ones, because the
functions here keep and drop names in the order in which transformers' modules do (transformers 5.23: modeling files,
cache_utils.py, masking_utils.py, integrations/sdpa_attention.py and moe.py). Layers of one kind cost the same, so one of
each is run. Scratch inside a kernel (packed matrices, attention on the CPU) is no tensor and is not in here.
"""

from dataclasses import dataclass, replace

from .architectures import Layer
from .memory import Term, modelled
from .shapes import ModelSpec, remembered
from .units import MIB, format_bytes

ITEM = {"F32": 4, "F16": 2, "BF16": 2}
SCRATCH = 64 * MIB        # beside tensors: up to 45 MiB of resident memory was seen (SmolLM2 on two cores, 512 and 2048 tokens)


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes of tensors alive at the worst moment, cache included and weights not, the moment's name, and the cache alone."""

    bytes: int
    at: str
    cache: int


@dataclass(frozen=True, slots=True)
class _Style:
    """How a family's modules differ from Llama's, in what they keep alive."""

    order: str = "pre"            # norms: "pre" each half, "sandwich" around each half, "post" each half, "parallel" halves
    norm: str = "llama"           # "llama" multiplies by the weight in the model's type, "wide" and "gemma" in float32;
                                  # "cohere" subtracts a mean by hand, "layer" is one operation
    qk_norm: str = ""             # "early" one projection at a time, "late" after all three, "full" over all heads
    fused_qkv: bool = False
    fused_mlp: bool = False
    rope: str = "halves"          # "halves" rotate_half, "float" with float32 tables, "upcast" in float32, "chunks" gpt-oss
    scores: str = ""              # "softcap" gemma2, "sinks" gpt-oss
    gated: bool = True
    scaled_embedding: bool = False
    gated_attention: bool = False  # the query's projection is twice as wide, half of it gates the output
    deltanet: bool = False         # recurrent blocks are gated delta rules, in chunks of 64 tokens
    sdpa: bool = True             # transformers' sdpa attention is not offered for some
    both_masks: bool = False      # a full mask is made even where every layer slides
    spare_mask: bool = False      # and a sliding one that no layer uses
    routing: str = "softmax"      # "topk" before the softmax
    wide_routing: bool = False    # routing weights stay float32
    shared_last: bool = False     # shared experts run after the routed ones
    exact: bool = True            # followed to the tensor; others borrow Llama's, and are within a factor of 2


_LLAMA = _Style()
_QWEN35 = _Style(norm="gemma", qk_norm="early", gated_attention=True, deltanet=True)
_CHUNK = 64                       # tokens that torch_chunk_gated_delta_rule takes at once
_STYLES = {
    "llama": _LLAMA, "mistral3": _LLAMA, "qwen2": _Style(both_masks=True), "smollm3": _Style(both_masks=True),
    "granite": _LLAMA, "seed_oss": _LLAMA,
    "qwen2moe": _Style(both_masks=True, spare_mask=True),
    "qwen3": _Style(qk_norm="early", both_masks=True), "qwen3moe": _Style(qk_norm="early"),
    "gemma": _Style(norm="gemma", scaled_embedding=True),
    "gemma2": _Style("sandwich", "gemma", scores="softcap", scaled_embedding=True, sdpa=False, both_masks=True),
    "gemma3": _Style("sandwich", "gemma", "late", scaled_embedding=True, both_masks=True),
    "phi3": _Style(fused_qkv=True, fused_mlp=True),
    "olmo2": _Style("post", "wide", "full", rope="float"),
    "command-r": _Style("parallel", "cohere", rope="upcast"),
    "cohere2": _Style("parallel", "cohere", rope="upcast", both_masks=True, exact=False),
    "granitemoe": _LLAMA, "olmoe": _Style(qk_norm="full"), "minimax-m2": _Style(qk_norm="full", wide_routing=True),
    "starcoder2": _Style(norm="layer", gated=False),
    "glm4": _Style("sandwich", fused_mlp=True), "glm4moe": _Style(wide_routing=True, shared_last=True),
    "qwen35": _QWEN35, "qwen35moe": _QWEN35, "qwen3next": replace(_QWEN35, fused_qkv=True),
    "deepseek2": _Style(wide_routing=True, shared_last=True, exact=False),
    "gpt-oss": _Style(norm="wide", rope="chunks", scores="sinks", sdpa=False, routing="topk", both_masks=True),
}
_OTHER = _Style(exact=False)


def style(spec: ModelSpec) -> _Style:
    return _STYLES.get(spec.architecture, _OTHER)


def modelled_exactly(spec: ModelSpec) -> bool:
    """Whether the family's own modules were followed to the tensor; others, roughly, keep a wide band."""
    family = style(spec)
    return family.exact and all(b.mixer in ("full", "sliding") and b.owns_kv or family.deltanet and b.mixer == "recurrent"
                                for b in spec.blocks)


def attention(spec: ModelSpec, wanted: bool) -> str:
    """"sdpa" or "eager": what the model runs where sdpa (`wanted`) is or is not asked for."""
    return "sdpa" if wanted and style(spec).sdpa else "eager"


@remembered
def peaks(spec: ModelSpec, quant: str, tokens: int, batch: int, sdpa: bool, card: bool = False,
          inside: bool = True, every: bool = False) -> tuple[Peak, Peak]:
    """The peaks of a prefill of `tokens` a sequence and of the decode step after it, `batch` sequences.

    quant: F32, F16, BF16, or what bitsandbytes makes of the checkpoint (NF4, INT8...). `card`: on a GPU, where generate()
    gathers the experts' weights to decode. `inside`: with what bitsandbytes' operations take inside themselves, an unpacked
    matrix or sums in 32 bits. `every`: logits of all tokens, as a plain forward call makes; generate() asks for the last.
    """
    run = _Run(spec, quant, batch, attention(spec, sdpa) == "sdpa", card, inside)
    return run.forward(tokens, every), run.forward(1)


class _Memory:
    __slots__ = ("live", "peak", "at", "stage")

    def __init__(self):
        self.live = self.peak = 0
        self.at = self.stage = ""


class _T:
    """A tensor: so many bytes from here until nobody names it."""

    __slots__ = ("memory", "size")

    def __init__(self, memory: _Memory, size: int):
        self.memory, self.size = memory, size
        memory.live += size
        if memory.live > memory.peak:
            memory.peak, memory.at = memory.live, memory.stage

    def __del__(self):
        self.memory.live -= self.size


class _Run:
    """One model with its cache: `forward` a prompt, then a token."""

    def __init__(self, spec: ModelSpec, quant: str, batch: int, sdpa: bool, card: bool, inside: bool):
        self.spec, self.style, self.batch, self.sdpa, self.card, self.inside = spec, style(spec), batch, sdpa, card, inside
        self.kinds, self.order = _kinds(spec)
        self.quant = quant if quant not in ITEM else None
        self.item = ITEM.get(quant) or ITEM[spec.dtype]
        self.width = spec.width
        self.past = 0
        self.rows = [0] * len(self.kinds)              # tokens whose K and V the storages of a block hold

    # ---- the whole model ------------------------------------------------------------------------------------

    def forward(self, tokens: int, every: bool = False) -> Peak:
        """Simulate the embedding, one layer of each kind, and the head; add what the other layers' caches hold."""
        self.n, self.seen = tokens, self.past + tokens
        m = self.m = _Memory()
        ids = self.new(8 * self.batch * self.seen)                 # noqa: F841  names keep tensors alive
        m.stage = "embedding"
        embedded = self.new(self.hidden())
        if self.style.scaled_embedding:
            embedded = self.new(self.hidden())
        position = self._positions()
        m.stage = "attention mask"
        masks = self._masks()
        m.stage = "rotary table"
        rotary = [self._rotary() for _ in self._rotary_kinds()]
        old = [self._cache(b, rows) for b, rows in zip(self.kinds, self.rows, strict=True)]
        held, worst, where = sum(old[k] for k in self.order), m.peak, m.at
        worst += held
        kept = [self._kept(b) if b.attends else 1 for b in self.kinds]
        grown = [self._cache(b, rows) - was for b, rows, was in zip(self.kinds, kept, old, strict=True)]
        base, hidden, known = m.live, embedded, {}
        for i, k in enumerate(self.order):
            first = i == 0                             # whose input is the embedding itself
            if (first, k) not in known:
                m.peak, before = 0, m.live
                after = self._layer(self.kinds[k], self.rows[k], hidden, masks)
                m.live += old[k]                       # the cache, old and new, is counted in `held`
                known[first, k] = m.peak - before, m.at
                hidden = after
                del after
            above, at = known[first, k]
            total = base + (0 if first else self.hidden()) + above + held
            if total > worst:
                worst, where = total, at
            held += grown[k]
        self.rows, self.past = kept, self.seen
        m.peak, m.stage = 0, "last norm"
        normed = self.norm(hidden, self.hidden())
        del embedded, hidden, position, masks, rotary
        if m.peak + held > worst:
            worst, where = m.peak + held, m.at
        m.peak, m.stage = 0, "logits"
        rows = self.batch * (tokens if every else 1)
        logits = self.linear(normed, rows, self.width, self.spec.vocab, False)            # noqa: F841
        if m.peak + held > worst:
            worst, where = m.peak + held, m.at
        return Peak(worst, where, held)

    def new(self, size: int, *_) -> _T:
        """A tensor of `size` bytes; what it is computed from is named so that it lives until then."""
        return _T(self.m, size)

    def hidden(self) -> int:
        """Bytes of one activation of the width of the model."""
        return self.batch * self.n * self.width * self.item

    def _positions(self) -> _T:
        arange = self.new(8 * self.n)
        return self.new(8 * self.n, arange)

    def _rotary_kinds(self) -> tuple:
        """Gemma 3 and OLMo 3 turn full and sliding layers by tables of their own."""
        return tuple({b.mixer for b in self.kinds}) if self.spec.architecture in ("gemma3", "olmo2") else ("all",)

    def _rotary(self) -> tuple[_T, _T]:
        block = next((b for b in self.kinds if b.attends), None)
        dim = self._rotated(block) if block else 0
        table = self.n * dim * 4
        if self.style.rope == "chunks":
            table //= 2
            both = self.new(table, self.new(4 * self.n))
        else:
            half = self.new(table // 2, self.new(4 * self.n))
            both = self.new(table, half)
        cos = self.new(table, self.new(table, both))
        sin = self.new(table, self.new(table, both))
        return (cos, sin) if self.item == 4 or self.style.rope == "float" else (self.new(table // 2), self.new(table // 2))

    def _rotated(self, block: Layer) -> int:
        return min(self.spec.metadata.get("rope.dimension_count") or block.key_dim, block.key_dim)

    def _masks(self) -> dict[int, _T | None]:
        """window (0: none) -> mask."""
        windows = {_window(b) for b in self.kinds if b.attends}
        if self.style.both_masks:
            windows |= {0}
        masks = {window: self._mask(window) for window in sorted(windows)}
        if self.style.spare_mask and not any(windows):
            masks[-1] = self._mask(self.seen)
        return masks

    def _mask(self, window: int) -> _T | None:
        columns = self._visible(window)
        if self.sdpa and not (window and columns >= window):
            return None                                     # a causal prompt or one token needs none
        size = self.n * columns
        positions = self.new(8 * (self.n + columns))        # noqa: F841
        if window:
            near = self.new(size)
            near = self.new(size, near)
            mask = self.new(size, near, self.new(size))
            del near
        else:
            mask = self.new(size)
        return mask if self.sdpa else self.new(self.batch * size * self.item, mask)

    def _visible(self, window: int) -> int:
        """K and V rows that attention sees."""
        if window and self.past >= window:
            return window - 1 + self.n
        return self.seen

    # ---- the cache ------------------------------------------------------------------------------------------

    def _cache(self, block: Layer, rows: int) -> int:
        """Bytes that so many rows of K and V take."""
        if block.mixer == "mla":                       # the latent row, which every step unpacks
            return self.batch * rows * self.spec.metadata["attention.key_length"] * self.item
        state = state_bytes(self.spec, block, self.item, self.batch) if rows else 0
        if not (block.attends and block.owns_kv):
            return state
        return state + self.batch * rows * block.kv_heads * (block.key_dim + block.value_dim) * self.item

    def _kept(self, block: Layer) -> int:
        """Rows in a block's storages after this step: a sliding layer keeps a view of all it was given."""
        return self._visible(_window(block)) if _window(block) else self.seen

    def _update(self, block: Layer, rows: int, key: _T, value: _T) -> tuple[_T, _T]:
        """K and V with the new rows: concatenation keeps old and new for a moment, then the old are gone."""
        m = self.m
        k_row, v_row = (self.batch * block.kv_heads * dim * self.item for dim in (block.key_dim, block.value_dim))
        total = self._kept(block)
        if block.mixer == "mla":
            latent = self.new(self._cache(block, total))
            self.m.live -= self._cache(block, rows)
            return self.new(total * k_row, latent), self.new(total * v_row)
        keys = self.new(total * k_row)
        if _window(block):
            values = self.new(total * v_row)
            m.live -= rows * (k_row + v_row)
        else:
            m.live -= rows * k_row
            values = self.new(total * v_row)
            m.live -= rows * v_row
        return keys, values

    # ---- one layer ------------------------------------------------------------------------------------------

    def _layer(self, block: Layer, rows: int, hidden: _T, masks: dict) -> _T:
        """One block: its output. Its cache stays alive until the end."""
        order, size = self.style.order, self.hidden()
        residual = hidden
        if order in ("pre", "sandwich", "parallel"):
            hidden = self.norm(hidden, size)
        if order == "parallel":
            attended, weights, cached = self.attention(block, rows, hidden, masks)
            fed = self.feed(block, hidden)
            return self.new(size, self.new(size, residual, attended), fed)
        hidden, weights, cached = self.attention(block, rows, hidden, masks)     # eager's weights live on
        if order in ("sandwich", "post"):
            hidden = self.norm(hidden, size)
        hidden = self.new(size, residual, hidden)
        residual = hidden
        if order in ("pre", "sandwich"):
            hidden = self.norm(hidden, size)
        hidden = self.feed(block, hidden)
        if order in ("sandwich", "post"):
            hidden = self.norm(hidden, size)
        hidden = self.new(size, residual, hidden)
        return hidden

    def norm(self, x: _T, size: int, vectors: int | None = None) -> _T:
        """A norm over `size` bytes, `vectors` of them."""
        wide = size * 4 // self.item
        row = 4 * (vectors or self.batch * self.n)
        if self.style.norm == "layer":
            return self.new(size, self.new(2 * row))
        if self.style.norm == "cohere":
            return self._centred(x, size, wide, row)
        single = self.item == 4
        up = x if single else self.new(wide)
        scale = self.new(row, self.new(row, self.new(row, self.new(wide, up))))
        out = self.new(wide, up, scale)
        del scale
        if self.style.norm != "llama":
            del up
            weight = 0 if self.style.norm == "wide" else 4 * size // self.item // (vectors or self.batch * self.n)
            out = self.new(wide, out, self.new(weight, self.new(weight)))
            return out if single else self.new(size, out)
        up = out
        del out
        return self.new(size, up if single else self.new(size, up))

    def _centred(self, x: _T, size: int, wide: int, row: int) -> _T:
        up = x if self.item == 4 else self.new(wide)
        mean = self.new(row)
        variance = self.new(row, self.new(wide, self.new(wide, mean)))
        up = self.new(wide, self.new(wide, up), self.new(row, self.new(row, variance)))
        up = self.new(wide, up)
        return up if self.item == 4 else self.new(size, up)

    def linear(self, x: _T, rows: int, width: int, out: int, quantized: bool = True) -> _T:
        """x @ W.T; bitsandbytes unpacks W for it, or packs x."""
        size = rows * out * self.item
        if not quantized or not self.quant:
            return self.new(size, x)
        if self.quant != "INT8":
            unpacked = self.new(width * out * self.item) if self.inside else None
            return self.new(size, x, unpacked)
        half = self.new(2 * rows * width) if self.spec.dtype != "F16" else None
        packed = self.new(rows * (width + 4), half)
        del half
        sums = self.new(rows * out * 4) if self.inside else None
        return self.new(size, packed, sums)

    # ---- attention ------------------------------------------------------------------------------------------

    def attention(self, block: Layer, rows: int, hidden: _T, masks: dict):
        """(output, eager's weights, cached tensors)."""
        self.m.stage = "attention"
        if not block.attends and self.style.deltanet:
            return self._delta_rule(block, hidden), None, ()
        if not block.attends:
            return self._recurrent(block, hidden), None, ()
        n, item = self.batch * self.n, self.item
        q_width, k_width, v_width = (block.heads * block.key_dim, block.kv_heads * block.key_dim,
                                     block.kv_heads * block.value_dim)
        late = self.style.qk_norm == "late"
        beside = self._recurrent(block, hidden) if block.ssm_state else None      # noqa: F841  Falcon-H1 does both
        self.m.stage = "attention"
        if self.style.fused_qkv and not self.style.gated_attention:
            query = key = value = self.linear(hidden, n, self.width, q_width + k_width + v_width)
            fused = query                                          # noqa: F841
        else:
            query, gate = self._query(hidden, n, q_width, block.heads)
            key = self._projected(hidden, n, k_width, block.kv_heads)
            value = self.linear(hidden, n, self.width, v_width)
        if late:
            query = self.norm(query, n * q_width * item, n * block.heads)
            key = self.norm(key, n * k_width * item, n * block.kv_heads)
        query, key = self._rotate(block, query, key, n)
        key, value = self._update(block, rows, key, value)
        mask = masks[_window(block)]
        run = self._sdpa if self.sdpa else self._eager
        out, weights = run(block, query, key, value, mask)
        if self.style.gated_attention:
            out = self.new(out.size, out, self.new(gate.size))
        out = self.linear(out, n, block.heads * block.value_dim, self.width)
        return out, weights, (key, value)

    def _query(self, hidden: _T, n: int, width: int, heads: int) -> tuple[_T, _T | None]:
        if not self.style.gated_attention:
            return self._projected(hidden, n, width, heads), None
        both = self.linear(hidden, n, self.width, 2 * width)
        gate = self.new(n * width * self.item)
        return self.norm(both, n * width * self.item, n * heads), gate

    def _recurrent(self, block: Layer, hidden: _T) -> _T:
        """Other recurrent mixers, roughly: a wide projection in, Mamba 2's chunks in float32 as torch runs them (four
        tensors of a weight for each pair of tokens in a chunk), a projection out."""
        kv, n = self.spec.metadata, self.batch * self.n
        inner, heads, state = (kv.get(f"ssm.{key}") or 0 for key in ("inner_size", "time_step_rank", "state_size"))
        if not (block.ssm_state and inner and heads and "ssm.group_count" in kv):
            return self.linear(self.linear(hidden, n, self.width, 4 * self.width), n, 4 * self.width, self.width)
        self.m.stage = "chunk scan"
        mixed = self.linear(hidden, n, self.width, 2 * inner + 2 * kv["ssm.group_count"] * state + heads)
        if self.n == 1:
            parts = self.new(4 * 4 * self.batch * inner * state)
        else:
            config = self.spec.config or {}
            usual = 128 if self.spec.architecture.startswith("nemotron_h") else 256       # the classes' own defaults
            chunk = config.get("mamba_chunk_size") or config.get("chunk_size") or usual
            padded = self.batch * -(-self.n // chunk) * chunk
            parts = self.new(4 * padded * (4 * chunk * heads + 3 * inner + 3 * heads * state))
        return self.linear(self.new(n * inner * self.item, mixed, parts), n, inner, self.width)

    def _delta_rule(self, block: Layer, hidden: _T) -> _T:
        """A gated delta rule in torch, as without flash-linear-attention: all of its float32 parts live to its end."""
        kv = self.spec.metadata
        k_dim, k_heads, v_heads, values = (kv[f"ssm.{key}"] for key in (
            "state_size", "group_count", "time_step_rank", "inner_size"))
        n, item, state = self.batch * self.n, self.item, 4 * self.batch * v_heads * k_dim * (values // v_heads)
        channels = 2 * k_heads * k_dim + values
        self.m.stage = "delta rule"
        if self.style.fused_qkv:
            whole = self.linear(hidden, n, self.width, channels + values)
            gate = self.new(n * values * item)
            mixed = self.new(n * channels * item, whole, self.new(n * values * item))
        else:
            mixed = self.linear(hidden, n, self.width, channels)
            gate = self.linear(hidden, n, self.width, values)
        small = self.new(n * v_heads * (3 * item + 4))                     # noqa: F841
        mixed = self.new(n * channels * item, self.new(n * channels * item, mixed))
        if self.n == 1:
            parts = self.new(4 * n * (3 * v_heads * k_dim + 3 * values))
            out = self.new(n * values * item, self.new(state), self.new(state), self.new(state), parts)
        else:
            padded = self.batch * -(-self.n // _CHUNK) * _CHUNK
            keys, vals, pairs = 4 * padded * v_heads * k_dim, 4 * padded * values, 4 * padded * v_heads * _CHUNK
            chunk = 4 * self.batch * _CHUNK * values
            parts = self.new(5 * keys + 3 * vals + 3 * pairs + state + 2 * chunk), self.new(vals)      # its local names
            laid_out = self.new(max(vals, 2 * state + chunk))
            parts = parts[0]
            out = self.new(n * values * item, laid_out)
            del parts, laid_out
        del mixed
        out = self.new(n * values * item, self.new(4 * n * values, out, self.new(4 * n * values)), gate)
        return self.linear(out, n, values, self.width)

    def _projected(self, hidden: _T, n: int, width: int, heads: int) -> _T:
        size = n * width * self.item
        if self.style.qk_norm == "early":
            return self.norm(self.linear(hidden, n, self.width, width), size, n * heads)
        if self.style.qk_norm == "full":
            return self.norm(self.linear(hidden, n, self.width, width), size, n)
        return self.linear(hidden, n, self.width, width)

    def _rotate(self, block: Layer, query: _T, key: _T, n: int) -> tuple[_T, _T]:
        if self.style.rope == "upcast" and self.item < 4:
            query, key = self.new(2 * query.size), self.new(2 * key.size)
            turned = [self.new(x.size, self.new(x.size), self.new(x.size, self.new(x.size, self.new(x.size // 2))))
                      for x in (query, key)]
            return self.new(turned[0].size // 2), self.new(turned[1].size // 2)
        turned = self._turned(query, n * block.heads, block), self._turned(key, n * block.kv_heads, block)
        if self.style.rope == "float" and self.item < 4:
            return self.new(turned[0].size // 2), self.new(turned[1].size // 2)
        return turned

    def _turned(self, x: _T, vectors: int, block: Layer) -> _T:
        item = 4 if self.style.rope == "float" else self.item
        whole, turned = (vectors * dim * item for dim in (block.key_dim, self._rotated(block)))
        if self.style.rope == "chunks":
            def half() -> _T:
                return self.new(whole // 2, self.new(whole // 2), self.new(whole // 2))
            first, second = half(), half()
            return self.new(whole, first, second)

        def rotate_half() -> _T:
            size = turned * self.item // item
            return self.new(size, self.new(size // 2))
        total = self.new(turned, self.new(turned), self.new(turned, rotate_half()))
        return self.new(whole, total) if self.style.fused_mlp or turned < whole else total

    def _sdpa(self, block: Layer, query: _T, key: _T, value: _T, mask: _T | None):
        groups = block.heads // block.kv_heads
        b, n, item = self.batch, self.n, self.item
        seen = self._visible(_window(block))
        if mask is not None and groups > 1 and block.kv_heads > 1 and n > 1:      # one head repeats as a view
            key = self.new(b * seen * block.heads * block.key_dim * item, key)
            value = self.new(b * seen * block.heads * block.value_dim * item, value)
        if block.key_dim != block.value_dim and not self.card:
            return self._plain_sdpa(block, query, key, value), None
        added = self.new(b * n * seen * item) if mask is not None else None
        sums = self.new(4 * b * n * block.heads)
        out = self.new(b * n * block.heads * block.value_dim * item, sums, added)
        return out, None

    def _plain_sdpa(self, block: Layer, query: _T, key: _T, value: _T) -> _T:
        """sdpa where no fast kernel of the CPU takes the heads: scores and all in float32."""
        b, n, seen = self.batch, self.n, self._visible(_window(block))
        q_size, k_size, v_size = (4 * b * block.heads * rows * dim for rows, dim in (
            (n, block.key_dim), (seen, block.key_dim), (seen, block.value_dim)))
        if self.item < 4:
            query, key, value = self.new(q_size, query), self.new(k_size, key), self.new(v_size, value)
        query, key = self.new(q_size, query), self.new(k_size, key)
        mask = self.new(5 * n * seen) if n > 1 else None
        scores = 4 * b * block.heads * n * seen
        weights = self.new(scores, self.new(scores), mask)
        out = 4 * b * n * block.heads * block.value_dim
        wide = self.new(out, weights, self.new(v_size))
        return wide if self.item == 4 else self.new(out * self.item // 4, wide)

    def _eager(self, block: Layer, query: _T, key: _T, value: _T, mask: _T):
        groups = block.heads // block.kv_heads
        b, n, item = self.batch, self.n, self.item
        seen = self._visible(_window(block))
        scores = b * block.heads * n * seen * item
        k_size, v_size = (b * seen * block.heads * dim * item for dim in (block.key_dim, block.value_dim))
        if groups > 1 and block.kv_heads > 1:
            key, value = self.new(k_size, key), self.new(v_size, value)
        view = groups > 1 and block.kv_heads == 1 and b > 1      # a product over a batch lays such a view out, for its time
        weights = self.new(scores, self._product(scores, b * n * block.heads * block.key_dim * item, k_size * view))
        if self.style.scores == "softcap":
            for _ in range(3):
                weights = self.new(scores, weights)
        weights = self.new(scores, weights)                       # the mask
        if self.style.scores == "sinks":
            more = b * block.heads * n * (seen + 1) * item
            both = self.new(more, weights)
            both = self.new(more, both, self.new(b * block.heads * n * (item + 8)))
            weights = probabilities = self.new(more, both)        # noqa: F841
        else:
            wide = scores * 4 // item
            soft = self.new(wide) if item == 4 else self.new(wide, self.new(wide))
            weights = soft if item == 4 else self.new(scores, soft)
            del soft
        size = b * n * block.heads * block.value_dim * item
        out = self.new(size, weights, self.new(v_size * view))
        if n > 1:
            out = self.new(size, out)
        return out, weights

    def _product(self, scores: int, query: int, key: int) -> _T:
        """query @ key: a batch of several prompts is laid out anew for it."""
        copied = self.new(query) if self.batch > 1 and self.n > 1 else None
        return self.new(scores, copied, self.new(key))

    # ---- feed forward ---------------------------------------------------------------------------------------

    def feed(self, block: Layer, x: _T) -> _T:
        n = self.batch * self.n
        if block.experts:
            self.m.stage = "experts"
            shared = self._dense(x, n, block.shared_ff) if block.shared_ff and not self.style.shared_last else None
            out = self._experts(block, x, n)
            if block.shared_ff and self.style.shared_last:
                shared = self._dense(x, n, block.shared_ff)
            return self.new(self.hidden(), out, shared) if shared else out
        self.m.stage = "feed forward"
        return self._dense(x, n, block.ff) if block.ff else x

    def _dense(self, x: _T, n: int, ff: int) -> _T:
        size = n * ff * self.item
        if self.style.fused_mlp:
            both = self.linear(x, n, self.width, 2 * ff)
            up = self.new(size, both, self.new(size))
            return self.linear(up, n, ff, self.width)
        if not self.style.gated:
            return self.linear(self.new(size, self.linear(x, n, self.width, ff)), n, ff, self.width)
        gated = self.new(size, self._activated(x, n, ff), self.linear(x, n, self.width, ff))
        return self.linear(gated, n, ff, self.width)

    def _activated(self, x: _T, n: int, ff: int) -> _T:
        return self.new(n * ff * self.item, self.linear(x, n, self.width, ff))

    def _experts(self, block: Layer, x: _T, n: int) -> _T:
        """Routing, then the fused experts in one grouped product (or, decoding on a card, their weights gathered)."""
        item, e, k, ff, w = self.item, block.experts, block.experts_used, block.expert_ff, self.width
        logits = self.new(n * e * item)
        if self.style.routing == "softmax":
            probabilities = self.new(n * e * 4, logits if item == 4 else self.new(n * e * 4))
            chosen = self.new(n * k * 12)                                   # float32 and index
            del probabilities
        else:
            chosen = self.new(n * k * (item + 8))                           # noqa: F841
            scores = self.new(n * k * item)                                 # noqa: F841
        s = n * k
        if self.card and self.n == 1:
            picked = self.new(s * 2 * ff * w * item)
            up = self.new(s * 2 * ff * item, self.new(s * w * item), picked)
            up = self.new(s * ff * item, up, self.new(s * ff * item))
            picked = self.new(s * ff * w * item)
            down = self.new(s * w * item, up, picked)
            return self.new(n * w * item, self.new(s * w * item, down))
        order = self.new(s * 16)                                            # noqa: F841  sorted ids and permutation
        given = self.new(s * w * item, self.new(s * 8))                     # noqa: F841
        wide = 4 if self.style.wide_routing or self.spec.architecture == "llama" else item      # Mixtral's stay float32
        weight = self.new(s * wide)                                         # noqa: F841
        biased = self.style.scores == "sinks"
        bias = self.new(s * 2 * ff * item) if biased else None
        out = self.new(s * 2 * ff * item)
        out = self._gate(out, s * ff * item)
        bias = self.new(s * w * item, bias) if biased else None
        out = self.new(s * w * item, out)
        del bias
        weighted = self.new(s * w * wide, out)
        index = self.new(s * 8)                                             # noqa: F841
        weighted = self.new(s * w * wide, weighted)
        total = self.new(n * w * wide, weighted)
        return total if wide == item else self.new(n * w * item, total)

    def _gate(self, both: _T, size: int) -> _T:
        if self.style.scores != "sinks":
            return self.new(size, self.new(size))
        gate = self.new(size)
        up = self.new(size)
        glu = self.new(size, gate, self.new(size, self.new(size, gate)))
        return self.new(size, self.new(size, up), glu)


def _unpacked(spec: ModelSpec, block: Layer) -> Layer:
    """Latent attention as transformers' modules run it: a key and a value for every head."""
    if block.mixer != "mla":
        return block
    return replace(block, kv_heads=block.heads, key_dim=spec.metadata["attention.key_length_mla"],
                   value_dim=spec.metadata["attention.value_length_mla"])


def state_bytes(spec: ModelSpec, block: Layer, item: int, batch: int) -> int:
    """What a recurrent block keeps for `batch` sequences: transformers holds the convolution's last inputs, one column more
    than llama.cpp, in the model's type, and the state in float32."""
    kernel = spec.metadata.get("ssm.conv_kernel") or 0
    conv = block.conv_state // (kernel - 1) * kernel * item if kernel > 1 else block.conv_state * item
    return batch * (conv + 4 * block.ssm_state)


def _window(block: Layer) -> int:
    """transformers keeps the window that a config declares, also where llama.cpp ignores it."""
    return block.window or block.declared_window


@remembered
def _kinds(spec: ModelSpec) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    """The blocks that differ in more than their number, and which of them each block is."""
    seen: dict[Layer, int] = {}
    order = tuple(seen.setdefault(replace(_unpacked(spec, block), index=0), len(seen)) for block in spec.blocks)
    return tuple(seen), order


# ---- the terms of a report ------------------------------------------------------------------------------------------

def cache_type(spec: ModelSpec, quant: str) -> str:
    """The type of the cache: that of the activations."""
    return {"F32": "f32", "F16": "f16", "BF16": "bf16"}[quant if quant in ITEM else spec.dtype]


@remembered
def recurrent_bytes(spec: ModelSpec, quant: str, sequences: int) -> int:
    """The state of recurrent blocks as transformers keeps it."""
    return sum(state_bytes(spec, b, ITEM.get(quant) or ITEM[spec.dtype], sequences) for b in spec.blocks)


def prompt_tokens(context: int, sequences: int) -> int:
    """Tokens a sequence takes in at once where it uses its context up: all but the one it writes."""
    return max(context // sequences - 1, 1)


def compute_term(spec: ModelSpec, quant: str, context: int, sequences: int, sdpa: bool, device: str, card: bool) -> Term:
    """The term "compute": what lives at the worst moment beside weights and the full cache."""
    tokens = prompt_tokens(context, sequences)
    prefill, decode = peaks(spec, quant, tokens, sequences, sdpa, card)
    step, worst = max(("prefill", prefill), ("decode", decode), key=lambda one: one[1].bytes)
    best = max(worst.bytes - decode.cache, 0)
    how = attention(spec, sdpa)
    why = f"peak in the {worst.at} of {'a' if step == 'prefill' else 'the'} {step}"
    why += f" of {tokens} tokens" + (f" in each of {sequences} sequences" if sequences > 1 else "") if step == "prefill" else \
        f" after {tokens} tokens, where the cache is copied to grow"
    why += f", {how} attention" + (" (this family has no other)" if sdpa and how == "eager" else "")
    every = tokens * sequences * spec.vocab * (ITEM.get(quant) or ITEM[spec.dtype])
    why += f"; logits of every token, which a plain forward call keeps, would be {format_bytes(every)}"
    low, high = (0.97, 1.03) if not card else (0.9, 1.25)
    scratch = SCRATCH
    why += "; the high end with what kernels take inside" if not card else "; kernels of a card take another share"
    if not modelled_exactly(spec):
        low, high = 0.5, 2.0
        why += f"; {spec.architecture}'s modules are followed roughly"
    least = best
    if quant not in ITEM:
        if quant == "INT8":
            least = best // 2
            why += "; with bitsandbytes' sums in 32 bits, which are no tensors on the CPU"
        else:
            matrix = _largest_matrix(spec) * ITEM[spec.dtype]
            scratch += matrix
            least = max(best - matrix, best // 4)
            why += (f"; with the matrix that bitsandbytes unpacks for a product, {format_bytes(matrix)} the largest: no tensor "
                    "on the CPU, and on a card not for a few tokens")
    return modelled("compute", device, best, least * low, best * high + scratch, why)


@remembered
def _largest_matrix(spec: ModelSpec) -> int:
    """Elements of the largest matrix of a block that bitsandbytes packs."""
    return max((t.elements for t in spec.tensors if t.layer >= 0 and len(t.shape) == 2), default=0)
