"""The pieces that llama.cpp's graphs are made of: inputs, norms, attention with its cache, feed-forward, experts, output.

A `Builder` holds one graph under construction and mirrors llm_graph_context (src/llama-graph.cpp of llama-cpp-python
0.3.36), node for node. Whether an optional tensor takes part is asked of the model's own tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..architectures import Layer
from ..memory import cuda_padding, tensor_bytes
from ..shapes import ModelSpec
from .ggml import HOST, Dim, Graph, Tensor, block_of, symbol

_POSITIONS_IN_FOUR = ("qwen2vl", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe")       # multimodal rope, also of text


@dataclass(frozen=True, slots=True)
class Setup:
    """What a graph's structure depends on besides model and layers; batch and context are symbols of its sizes.

    `sequences` share one batch; `streams` of them have a cache of their own (1 where it is unified). `pinned`: norms are
    put on their layer's device by hand (whole model on cards, or a batch under 32).
    """

    flash: bool = True
    kv: tuple[str, str] = ("f16", "f16")
    sequences: int = 1
    streams: int = 1
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class At:
    """One layer of a graph: block `index` of the model on `place`, its routed experts on `experts`."""

    index: int
    layer: Layer
    place: int
    experts: int
    last: bool


class Builder:
    """One graph under construction. Symbols: t tokens a sequence, n and w cells a stream (whole context and window), o
    outputs; `tokens`, `cells`, `window_cells`, `outputs` are their dims."""

    def __init__(self, spec: ModelSpec, setup: Setup, layers: Sequence[At], output_place: int,
                 types: Mapping[str, str] = MappingProxyType({})):
        """types: the weights' by name, where any of them may be copied to a card; otherwise their sizes do not matter."""
        self.spec, self.setup, self.layers, self.output_place, self.types = spec, setup, layers, output_place, types
        self.g = Graph()
        self.width = spec.width
        self.tokens = setup.sequences * symbol("t")
        self.cells, self.window_cells, self.outputs = symbol("n"), symbol("w"), symbol("o")
        self.windows = any(b.window for b in spec.blocks)
        self._inputs: dict[str, Tensor] = {}
        self._stored: dict[tuple, Tensor] = {}

    # ---- what the model says --------------------------------------------------------------------------------

    def said(self, key: str, default=0):
        """A value of the metadata, `default` where it is missing or None."""
        found = self.spec.metadata.get(key)
        return default if found is None else found

    def has(self, at: At, name: str, part: str = "weight") -> bool:
        return f"blk.{at.index}.{name}.{part}" in self.spec.by_name

    def weight(self, at: At, name: str, part: str = "weight", place: int | None = None) -> Tensor | None:
        """A tensor of a block, where it lies; None where the model has none of that name."""
        tensor = self.spec.by_name.get(f"blk.{at.index}.{name}.{part}")
        if tensor is None:
            return None
        if place is None:
            place = at.experts if "_exps" in name else at.place
        return self._weight(tensor, name if part == "weight" else f"{name}'s {part}", place)

    def outer(self, name: str, place: int) -> Tensor | None:
        """A tensor outside the blocks."""
        tensor = self.spec.by_name.get(name)
        return None if tensor is None else self._weight(tensor, name.removesuffix(".weight"), place)

    def _weight(self, tensor, name: str, place: int) -> Tensor:
        key = tensor.name, place
        if key not in self._stored:
            shape = (*tensor.shape, 1, 1, 1)[:4]
            made = self.g.stored(shape, "f32", place, name)
            if tensor.name in self.types:
                type = self.types[tensor.name]
                made.bytes = tensor_bytes(type, tensor.shape) + cuda_padding(type, tensor.shape)
            made.at = tensor.layer
            self._stored[key] = made
        return self._stored[key]

    # ---- inputs ---------------------------------------------------------------------------------------------

    def input(self, name: str, shape: tuple, type: str) -> Tensor:
        """An input by its name, made once."""
        if name not in self._inputs:
            self._inputs[name] = self.g.input(shape, type, name)
        return self._inputs[name]

    @property
    def positions(self) -> Tensor:
        per = 4 if self.said("rope.dimension_sections", ()) or self.spec.architecture in _POSITIONS_IN_FOUR else 1
        return self.input("positions", (self.tokens * per,), "i32")

    @property
    def output_ids(self) -> Tensor:
        return self.input("output rows", (self.outputs,), "i32")

    def mask(self, window: bool = False) -> Tensor:
        cells, streams = self.window_cells if window else self.cells, self.setup.streams
        return self.input("window mask" if window else "attention mask", (cells, self.tokens // streams, 1, streams),
                          "f16" if self.setup.flash else "f32")

    def embedded(self) -> Tensor:
        """build_inp_embd: rows of the table, and beside them room for embeddings given instead of tokens."""
        g = self.g
        tokens = self.input("tokens", (self.tokens,), "i32")
        wide = self.width * (1 + self.said("n_deepstack_layers", 0))         # Qwen3-VL takes more of a picture than its width
        given = self.input("input embeddings", (wide, self.tokens), "f32")
        g.label = "input embeddings"
        cur = g.get_rows(self.outer("token_embd.weight", HOST), tokens)
        if wide != self.width:
            cur = g.pad(cur, wide, self.tokens)
        g.expand(cur)
        g.expand(given)
        if wide != self.width:
            self.projected = cur
            cur = g.view(cur, self.width, self.tokens, bytes=strided(self.width, wide, self.tokens))
        if self.said("embedding_scale", 0.0):
            cur = g.scale(cur)
        g.expand(cur)
        return cur

    # ---- norms and projections ------------------------------------------------------------------------------

    def normed(self, cur: Tensor, weight: Tensor | None, bias: Tensor | None = None, kind: str = "rms",
               at: At | None = None) -> Tensor:
        """build_norm. `at` pins it to its layer's device where the setup says so."""
        g = self.g
        cur = g.rms_norm(cur) if kind == "rms" else g.norm(cur)
        if at is not None and self.setup.pinned and (weight is not None or bias is not None):
            cur.pinned = at.place
        if weight is not None:
            cur = g.mul(cur, weight)
        return cur if bias is None else g.add(cur, bias)

    def entered(self, at: At, x: Tensor, label: str = "attention") -> Tensor:
        """The norm that a block begins with; what follows is labelled `label`."""
        self.g.at, self.g.label = at.index, "norm"
        cur = self.norm(at, "attn_norm", x)
        self.g.label = label
        return cur

    def norm(self, at: At, name: str, cur: Tensor, kind: str = "rms", pin: bool = True) -> Tensor:
        """build_norm with a block's tensors."""
        return self.normed(cur, self.weight(at, name), self.weight(at, name, "bias"), kind, at if pin else None)

    def linear(self, at: At, name: str, cur: Tensor, bias: bool = True) -> Tensor:
        """A block's matrix and, where there is one, its bias."""
        g = self.g
        cur = g.mul_mat(self.weight(at, name), cur)
        offset = self.weight(at, name, "bias") if bias else None
        return cur if offset is None else g.add(cur, offset)

    def qkv(self, at: At, cur: Tensor, flat: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """build_qkv: fused or separate; heads apart unless `flat`."""
        g, block, T = self.g, at.layer, self.tokens
        sizes = ((block.key_dim, block.heads), (block.key_dim, block.kv_heads), (block.value_dim, block.kv_heads))
        if self.has(at, "attn_qkv"):
            whole = self.linear(at, "attn_qkv", cur)
            if self.said("attention.clamp_kqv", 0.0) and not flat:
                whole = g.clamp(whole)
            if flat:
                return tuple(g.cont(g.view(whole, dim * heads, T)) for dim, heads in sizes)
            return tuple(g.view(whole, dim, heads, T, bytes=strided(dim * heads, whole.shape[0], T)) for dim, heads in sizes)
        found = []
        for name, (dim, heads) in zip(("attn_q", "attn_k", "attn_v"), sizes, strict=True):
            one = self.linear(at, name, cur)
            if self.said("attention.clamp_kqv", 0.0) and not flat:
                one = g.clamp(one)
            found.append(one if flat else g.reshape(one, dim, heads, T))
        return tuple(found)

    def rope_factors(self, at: At) -> Tensor | None:
        """Factors that stretch the rope: of the context (longrope) or of the frequencies (llama3)."""
        for name in ("rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"):
            if name in self.spec.by_name:
                return self.outer(name, at.place)
        return None

    # ---- attention ------------------------------------------------------------------------------------------

    def cache(self, at: At, which: str, row: int, window: bool) -> Tensor:
        """The K or V cache of a layer: [row, cells, streams]."""
        key = which, at.index
        if key not in self._stored:
            type = self.setup.kv[which == "v"]
            cells = self.window_cells if window else self.cells
            made = self.g.stored((row, cells, self.setup.streams), type, at.place, f"{which.upper()} cache", weight=False)
            self._stored[key] = made
        return self._stored[key]

    def _rotation(self, which: str, window: bool) -> Tensor | None:
        """The Hadamard matrix that a quantized cache turns its rows with (llama-kv-cache.cpp)."""
        if block_of(self.setup.kv[which == "v"])[0] == 1:
            return None
        own = [b for b in self.spec.layers if b.attends and b.owns_kv and bool(b.window) == window]
        dims = {b.value_dim if which == "v" else b.key_dim for b in own}
        dim = (self._first_dim(which))
        if len(dims) != 1 or dim % 64:
            return None
        n = 64
        if which == "k":
            all_dims = dims.pop()
            while all_dims % (n * 2) == 0:
                n *= 2
        return self.input(f"{which} rotation{' of windows' if window else ''}", (n, n), "f32")

    def _first_dim(self, which: str) -> int:
        """hparams.n_embd_head_k(): of layer 0."""
        first = next(b for b in self.spec.layers if b.attends)
        return first.value_dim if which == "v" else first.key_dim

    def rotated(self, cur: Tensor | None, rotation: Tensor | None) -> Tensor | None:
        """llama_mul_mat_hadamard."""
        if cur is None or rotation is None:
            return cur
        g, n = self.g, rotation.shape[0]
        a, b, c, d = cur.shape
        rows = a * b * c * d // n
        flat = g.reshape(cur, n, rows) if cur.contiguous else g.cont(cur, n, rows)
        return g.reshape(g.mul_mat(rotation, flat), *cur.shape)

    def attention(self, at: At, q: Tensor, k: Tensor | None, v: Tensor | None, output: str | None = "attn_output",
                  sinks: Tensor | None = None, source: At | None = None, v_first: bool | None = None) -> Tensor:
        """build_attn over a cache: store K and V, attend, project. Without k and v: over the cache of `source`.

        `v_first`: V is stored before K is computed, as the plain cache does; windows do not.
        """
        g, block, setup = self.g, at.layer, self.setup
        window = bool(block.window)
        rotate_k, rotate_v = (self._rotation(which, window) for which in "kv")
        q, k, v = self.rotated(q, rotate_k), self.rotated(k, rotate_k), self.rotated(v, rotate_v)
        for tensor in ((q, k, v) if self.windows else (q, v, k)):
            if tensor is not None:
                g.expand(tensor)
        owner = source or at
        keys = self.cache(owner, "k", block.key_dim * block.kv_heads, window)
        row = block.value_dim * block.kv_heads
        stored_row = row if setup.flash else self._widest_values() if self._uneven_values() else row
        values = self.cache(owner, "v", stored_row, window)
        if k is not None:
            ids = self.input("cells of window K" if window else "cells of K", (self.tokens,), "i64")
            g.expand(g.set_rows(self._merged(keys), g.view(k, keys.shape[0], self.tokens, bytes=k.bytes), ids))
        if v is not None:
            self._store_values(v, values, row, window)
        cells = self.window_cells if window else self.cells
        k = g.view(keys, block.key_dim, block.kv_heads, cells, setup.streams)
        if setup.flash:
            v = g.view(values, block.value_dim, block.kv_heads, cells, setup.streams)
        else:
            v = g.view(values, cells, block.kv_heads, block.value_dim, setup.streams)
        k.bytes, v.bytes = keys.size(), values.size()
        if stored_row != row:                # stored as wide as the widest layer's, read as wide as its own
            v.bytes = cells * (row + (setup.streams - 1) * stored_row) * block_of(v.type)[1]
        cur = self.mha(q, k, v, self.mask(window), sinks, transposed=not setup.flash)
        cur = self.rotated(cur, rotate_v)
        return cur if output is None else self.linear(at, output, cur)

    def _merged(self, cache: Tensor) -> Tensor:
        row, cells, streams = cache.shape[:3]
        return cache if streams == 1 else self.g.reshape(cache, row, cells * streams)

    def _store_values(self, v: Tensor, values: Tensor, row: int, window: bool) -> None:
        g, T = self.g, self.tokens
        name = "cells of window V" if window else "cells of V"
        if self.setup.flash:
            ids = self.input(name, (T,), "i64")
            g.expand(g.set_rows(self._merged(values), g.view(v, row, T, bytes=v.bytes), ids))
            return
        ids = self.input(name, (T * self._widest_values(),), "i64")       # one index an element, V lying on its side
        v = g.reshape(v, row, T) if v.contiguous else g.cont(v, row, T)
        if row != values.shape[0]:
            v = g.pad(v, values.shape[0], T)
        each = values.shape[0] * values.shape[1] * values.shape[2]
        g.expand(g.set_rows(g.reshape(values, 1, each), g.reshape(v, 1, values.shape[0] * T), ids))

    def _widest_values(self) -> int:
        return max(b.kv_heads * b.value_dim for b in self.spec.layers if b.attends)

    def _uneven_values(self) -> bool:
        return len({b.kv_heads * b.value_dim for b in self.spec.layers}) > 1

    def mha(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None = None,
            transposed: bool = False, v_up: Tensor | None = None) -> Tensor:
        """build_attn_mha: q [dim, heads, tokens], k [dim, kv heads, cells, streams], v alike or, `transposed`,
        [cells, kv heads, dim, streams]. `v_up`: MLA's matrix from latent to heads. Returns [dim * heads, tokens]."""
        g, streams = self.g, k.shape[3]
        label, g.label = g.label, "attention"
        per = q.shape[2] // streams if streams != 1 else q.shape[2]
        q = g.permute(g.view(q, q.shape[0], q.shape[1], per, streams, bytes=q.size()), 0, 2, 1, 3)
        k, v = g.permute(k, 0, 2, 1, 3), g.permute(v, 0, 2, 1, 3)
        if self.setup.flash:
            if transposed:
                v = g.transpose(v)
            if k.type == "f32":
                k = g.cast(k, "f16")
            if v.type == "f32":
                v = g.cast(v, "f16")
            cur = g.flash_attention(q, k, v, mask, sinks)
            if v_up is not None:
                cur = g.permute(cur, 0, 2, 1, 3)
                cur = g.mul_mat(v_up, cur)
                cur = g.cont(g.permute(cur, 0, 2, 1, 3))
            cur = g.reshape(cur, cur.shape[0] * cur.shape[1], cur.shape[2] * cur.shape[3])
        else:
            g.label = "attention scores"
            scores = g.mul_mat(k, q)
            if self.spec.architecture == "gemma2":
                scores = g.scale(g.unary(g.scale(scores)))
            scores = g.soft_max(scores, mask, sinks)
            g.label = "attention"
            if not transposed:
                v = g.cont(g.transpose(v))
            cur = g.mul_mat(v, scores)
            if v_up is not None:
                cur = g.mul_mat(v_up, cur)
            cur = g.permute(cur, 0, 2, 1, 3)
            cur = g.cont(cur, cur.shape[0] * cur.shape[1], cur.shape[2] * cur.shape[3])
        g.expand(cur)
        g.label = label
        return cur

    # ---- feed-forward ---------------------------------------------------------------------------------------

    def feed_forward(self, at: At, cur: Tensor, act: str = "silu",
                     names: tuple[str, str, str] = ("ffn_up", "ffn_gate", "ffn_down")) -> Tensor:
        """build_ffn: gated where there is a gate, or `up` is twice as wide as `down` takes; squared for "relu2"."""
        g = self.g
        label, g.label = g.label, "feed-forward"
        up_name, gate_name, down_name = names
        up = self.linear(at, up_name, cur)
        if self.has(at, gate_name):
            cur = g.glu(self.linear(at, gate_name, cur), up)
        elif up.shape[0] == 2 * self.weight(at, down_name).shape[0]:
            cur = g.glu(up)
        else:
            cur = g.unary(up)
            if act == "relu2":
                cur = g.like("sqr", cur)
        cur = self.linear(at, down_name, cur)
        g.label = label
        return cur

    def experts(self, at: At, cur: Tensor, gating: str = "softmax", normed: bool = True, scaled: bool | None = None,
                act: str = "silu", logits_from: Tensor | None = None) -> Tensor:
        """build_moe_ffn. `gating`: "softmax", "sigmoid" or "softmax_weight" (after the choice); `normed`: weights are made
        to sum to one; `scaled`: by expert_weights_scale, asked of the metadata where None."""
        g, T, block = self.g, self.tokens_of(cur), at.layer
        label, g.label = g.label, "experts"
        first = self.spec.architecture == "llama4"          # weighs before the experts
        n, used = block.experts, block.experts_used
        logits = logits_from if logits_from is not None else g.mul_mat(self.weight(at, "ffn_gate_inp"), cur)
        bias = self.weight(at, "ffn_gate_inp", "bias")
        if bias is not None:
            logits = g.add(logits, bias)
        probs = {"softmax": g.soft_max, "sigmoid": g.unary, "softmax_weight": lambda x: x}[gating](logits)
        choice = probs
        bias = self.weight(at, "exp_probs_b", "bias")
        if bias is not None:
            choice = g.add(probs, bias)
        if first:
            choice = logits
        groups = self.said("expert_group_count", 0)
        if groups > 1:
            choice = self._best_groups(choice, groups, self.said("expert_group_used_count", 1), n, T)
        chosen = g.top_k(choice, used)
        weights = g.get_rows(g.reshape(probs, 1, n, T), chosen)
        if gating == "softmax_weight":
            weights = g.reshape(g.soft_max(g.reshape(weights, used, T)), 1, used, T)
        if normed:
            flat = g.reshape(weights, used, T)
            weights = g.reshape(g.div(flat, g.clamp(g.sum_rows(flat))), 1, used, T)
        if scaled is None:
            scaled = self.said("expert_weights_scale", 0.0) not in (0.0, 1.0)
        if scaled:
            weights = g.scale(weights)
        g.expand(weights)
        cur = g.reshape(cur, cur.shape[0], 1, T)
        if first:
            cur = g.mul(g.repeat(cur, cur.shape[0], used, T), weights)
        if self.has(at, "ffn_gate_up_exps"):
            both = self._expert(at, "ffn_gate_up_exps", cur, chosen)
            half = both.shape[0] // 2
            cur, up = g.view(both, half, *both.shape[1:3]), g.view(both, half, *both.shape[1:3])
            gated = True
        else:
            up = self._expert(at, "ffn_up_exps", cur, chosen)
            gated = self.has(at, "ffn_gate_exps")
            cur = self._expert(at, "ffn_gate_exps", cur, chosen) if gated else up
        if gated:
            cur = g.glu(cur, up)
        else:
            cur = g.unary(cur)
            if act == "relu2":
                cur = g.like("sqr", cur)
        out = self._expert(at, "ffn_down_exps", cur, chosen)
        if not first:
            out = g.mul(out, weights)
        g.expand(out)
        rows = [g.view(out, out.shape[0], T) for _ in range(used)]
        for row in rows:
            g.expand(row)
        cur = rows[0]
        for row in rows[1:]:
            cur = g.add(cur, row)
            g.expand(cur)
        if used == 1:
            cur = g.cont(cur)
        g.label = label
        return cur

    def _expert(self, at: At, name: str, cur: Tensor, chosen: Tensor) -> Tensor:
        g = self.g
        scale = self.weight(at, name, "scale")
        cur = g.mul_mat_id(self.weight(at, name), cur, chosen)
        if scale is not None:
            scale = g.repeat(g.reshape(scale, 1, scale.shape[0]), 1, scale.shape[0], chosen.shape[1])
            cur = g.mul(cur, g.get_rows(scale, chosen))
        bias = self.weight(at, name, "bias")
        return cur if bias is None else g.add_id(cur, bias, chosen)

    def _best_groups(self, choice: Tensor, groups: int, used: int, n: int, T: Dim | int) -> Tensor:
        g, each = self.g, n // groups
        by_group = g.reshape(choice, each, groups, T)
        best = g.top_k(by_group, 2)
        scores = g.get_rows(g.reshape(by_group, 1, each, groups, T), best)
        scores = g.sum_rows(g.reshape(scores, scores.shape[1], scores.shape[2], scores.shape[3]))
        chosen = g.top_k(g.reshape(scores, scores.shape[1], scores.shape[2]), used)
        kept = g.get_rows(by_group, chosen)
        return g.reshape(g.set_rows(g.like("fill", by_group), kept, chosen), n, T)

    def tokens_of(self, cur: Tensor) -> Dim | int:
        """Rows of an activation: all tokens, or once the last layer has picked them, the outputs."""
        return cur.shape[1]

    # ---- output ---------------------------------------------------------------------------------------------

    def picked(self, at: At, *tensors: Tensor) -> tuple[Tensor, ...]:
        """In the last layer only the rows that are asked for go on."""
        return tuple(self.g.get_rows(tensor, self.output_ids) for tensor in tensors) if at.last else tensors

    def finish(self, cur: Tensor, norm: str = "output_norm", kind: str = "rms", capped: bool = False,
               scaled: bool = False) -> Graph:
        """The last norm, the logits, and the graph; both stay until it ends."""
        g = self.g
        g.at, g.label = -1, "output"
        place = self.output_place
        cur = self.normed(cur, self.outer(f"{norm}.weight", place) if norm else None,
                          self.outer(f"{norm}.bias", place) if norm else None, kind)
        cur.output = True
        g.label = "logits"
        head = self.outer("output.weight", place) or self.outer("token_embd.weight", place)
        cur = g.mul_mat(head, cur)
        bias = self.outer("output.bias", place)
        if bias is not None:
            cur = g.add(cur, bias)
        if capped:
            cur = g.scale(g.unary(g.scale(cur)))
        if scaled:
            cur = g.scale(cur)
        cur.output = True
        g.expand(cur)
        return g


def strided(row: int, stride: int, rows: Dim | int) -> str:
    """Bytes from the first to the last float32 of `rows` parts of longer rows: what a copy of such a view takes."""
    return f"({rows}-1)*{4 * stride}+{4 * row}"
