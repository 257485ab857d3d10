"""The graphs of transformers: attention, then feed-forward, in the ways that architectures differ.

One function, `decoder`, told apart by a `Style`; what a model's own tensors already say (fused projections, biases, norms,
experts) is not said again. Follows src/models/*.cpp of llama-cpp-python 0.3.36.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..shapes import ModelSpec
from .ggml import HOST, Graph, Tensor
from .parts import At, Builder


@dataclass(frozen=True, slots=True)
class Style:
    """How an architecture differs from llama's plain decoder.

    `norm`: "rms" or "layer". `act`: "silu" stands for any one that is not squared. `parallel`: "" (one after the other),
    "falcon" (feed-forward on the attention's norm, and attention added to it), "phi2" (it added to attention), "command-r"
    (the input added to it first).
    `flat_qk_norm`: over all heads at once, before they are split. `late`: the outputs' rows are picked after the last layer.
    """

    norm: str = "rms"
    act: str = "silu"
    parallel: str = ""
    scale_input: bool = False
    scale_query: bool = False
    flat_qk_norm: bool = False
    norm_after_rope: bool = False
    gating: str = "softmax"            # "given": as the metadata says
    expert_norm: bool | None = True    # None: as the metadata says
    late: bool = False
    residual_first: bool = False       # phi3: x + f(x), which overwrites x, where others' f(x) + x overwrites f(x)
    cap_logits: bool = False
    scale_logits: bool = False
    temperature: bool = False          # a scale by position, on Q
    shared_gate: bool = False          # shared expert behind a sigmoid
    head_gate: bool = False            # step35: attention behind a sigmoid
    plain_norms: bool = False          # olmo: norms without weights
    deep: bool = False                 # qwen3vl: what the projector gives is added to the first layers, too
    rope: Callable[[ModelSpec, int], bool] | None = None      # whether block i has rope; None: all have

    def kind(self, spec: ModelSpec, index: int) -> tuple[bool, bool]:
        """What tells layers apart beside their hyperparameters and tensors."""
        return (self.rope is not None and self.rope(spec, index),
                self.deep and index < (spec.metadata.get("n_deepstack_layers") or 0))


def _most(spec: ModelSpec, index: int) -> bool:
    """Rope in all but each fourth layer (smollm3, llama4)."""
    return (index + 1) % 4 != 0


def _never(spec: ModelSpec, index: int) -> bool:
    return False


def _in_windows(spec: ModelSpec, index: int) -> bool:
    """Rope where a layer slides (cohere2)."""
    return bool(spec.layers[index].window)


def _in_windows_if_any(spec: ModelSpec, index: int) -> bool:
    return bool(spec.layers[index].window) or not any(b.window for b in spec.layers)


_LLAMA = Style()
STYLES: dict[str, Style] = {
    **dict.fromkeys(("llama", "mistral3", "qwen2", "qwen2vl", "qwen3", "qwen3moe", "internlm2", "ernie4_5", "arcee",
                     "seed_oss"), _LLAMA),
    **dict.fromkeys(("qwen3vl", "qwen3vlmoe"), Style(deep=True)),
    "olmo": Style(norm="layer", plain_norms=True),
    "gpt2": Style(norm="layer", rope=_never),
    "gptneox": Style(norm="layer"),
    "qwen2moe": Style(expert_norm=False, shared_gate=True),
    "olmoe": Style(expert_norm=False, flat_qk_norm=True),
    "smollm3": Style(rope=_most),
    **dict.fromkeys(("granite", "granitemoe"), Style(scale_logits=True)),
    "gemma": Style(scale_input=True, scale_query=True),
    "gemma2": Style(scale_input=True, scale_query=True, cap_logits=True),
    "gemma3": Style(scale_input=True, scale_query=True),
    "phi3": Style(scale_query=True, residual_first=True),
    "phi2": Style(norm="layer", parallel="phi2", scale_query=True),
    "olmo2": Style(flat_qk_norm=True),
    "exaone4": Style(rope=_in_windows_if_any),
    "gpt-oss": Style(gating="softmax_weight", expert_norm=False, late=True),
    "glm4": Style(),
    "glm4moe": Style(gating="given", expert_norm=None),
    "minimax-m2": Style(flat_qk_norm=True, gating="given"),
    "falcon": Style(norm="layer", parallel="falcon"),
    "command-r": Style(norm="layer", parallel="command-r", scale_logits=True),
    "cohere2": Style(norm="layer", parallel="command-r", scale_logits=True, rope=_in_windows),
    "starcoder2": Style(norm="layer"),
    "stablelm": Style(norm="layer"),
    "nemotron": Style(norm="layer", act="relu2"),
    "llama4": Style(gating="sigmoid", expert_norm=False, temperature=True, rope=_most),
    "step35": Style(gating="given", expert_norm=None, late=True, head_gate=True),
    "hunyuan-dense": Style(norm_after_rope=True),
    "deepseek2": Style(gating="given", expert_norm=None),
}


def decoder(b: Builder, style: Style) -> Graph:
    """The whole graph of a model in that style."""
    g = b.g
    cur = b.embedded()
    if style.scale_input:
        cur = g.scale(cur)
    table = b.outer("position_embd.weight", HOST)
    if table is not None:
        cur = g.add(cur, g.get_rows(table, b.positions))
    for at in b.layers:
        g.at = at.index
        cur = _layer(b, at, cur, style)
    if style.late:
        cur.output = True          # the hidden state a draft model would take
        cur = g.get_rows(cur, b.output_ids)
    scaled = style.scale_logits and (b.spec.architecture.startswith("granite") or bool(b.said("logit_scale", 0.0)))
    capped = style.cap_logits or bool(b.said("final_logit_softcapping", 0.0))
    return b.finish(cur, kind=style.norm, capped=capped, scaled=scaled)


def _layer(b: Builder, at: At, x: Tensor, style: Style) -> Tensor:
    g = b.g
    g.label = "norm"
    normed = b.norm(at, "attn_norm", x, style.norm) if b.has(at, "attn_norm") or style.plain_norms else x
    source = b.norm(at, "attn_norm_2", x, style.norm) if b.has(at, "attn_norm_2") else normed
    g.label = "attention"
    cur = latent_attention(b, at, source) if at.layer.mixer == "mla" else _attention(b, at, source, style)
    if style.parallel:
        return _parallel(b, at, x, normed, cur, style)
    if not style.late:
        cur, x = b.picked(at, cur, x)
    if b.said("use_parallel_residual", False) and b.spec.architecture == "gptneox":
        wide = b.feed_forward(at, b.norm(at, "ffn_norm", x, style.norm), style.act)
        return g.add(g.add(wide, x), cur)
    after = b.has(at, "post_attention_norm") and (b.has(at, "ffn_norm") or b.has(at, "post_ffw_norm"))
    if after:
        cur = b.norm(at, "post_attention_norm", cur)
    residual_scale = bool(b.said("residual_scale", 0.0))
    if residual_scale:
        cur = g.scale(cur)
    x = g.add(cur, x)
    before = "ffn_norm" if b.has(at, "ffn_norm") or style.plain_norms else "" if after else "post_attention_norm"
    cur = b.norm(at, before, x, style.norm) if before else x
    cur = mixture(b, at, cur, style) if at.layer.experts else b.feed_forward(at, cur, style.act)
    if b.has(at, "post_ffw_norm"):
        cur = b.norm(at, "post_ffw_norm", cur, pin=False)
    if residual_scale:
        cur = g.scale(cur)
    g.label = "layer output"
    cur = g.add(x, cur) if style.residual_first else g.add(cur, x)
    if style.deep and at.index < b.said("n_deepstack_layers", 0):
        cur = g.add(cur, g.view(b.projected, b.width, b.tokens))
    return cur


def _parallel(b: Builder, at: At, x: Tensor, normed: Tensor, cur: Tensor, style: Style) -> Tensor:
    g = b.g
    cur, x, normed = b.picked(at, cur, x, normed)
    wide = b.feed_forward(at, normed, style.act)
    if style.parallel == "command-r":
        return g.add(g.add(wide, x), cur)
    return g.add(g.add(wide, cur) if style.parallel == "falcon" else g.add(cur, wide), x)


def _attention(b: Builder, at: At, cur: Tensor, style: Style) -> Tensor:
    g, block, T = b.g, at.layer, b.tokens
    q, k, v = b.qkv(at, cur, style.flat_qk_norm)
    norms = b.has(at, "attn_q_norm") and not style.norm_after_rope
    if norms:
        q = b.norm(at, "attn_q_norm", q, style.norm)
        k = b.norm(at, "attn_k_norm", k, style.norm)
    if style.flat_qk_norm:
        q = g.reshape(q, block.key_dim, block.heads, T)
        k = g.reshape(k, block.key_dim, block.kv_heads, T)
        v = g.reshape(v, block.value_dim, block.kv_heads, T)
    ropes = style.rope is None or style.rope(b.spec, at.index)
    if ropes:
        factors = b.rope_factors(at)
        q, k = g.rope(q, b.positions, factors), g.rope(k, b.positions, factors)
    if b.has(at, "attn_q_norm") and style.norm_after_rope:
        q, k = b.norm(at, "attn_q_norm", q), b.norm(at, "attn_k_norm", k)
    if style.temperature and not ropes or b.said("attention.temperature_scale", 0.0):
        q = g.mul(q, b.input("attention scale", (1, 1, T), "f32"))
    if style.temperature and ropes:
        q, k = g.rms_norm(q), g.rms_norm(k)
    if style.scale_query:
        q = g.scale(q)
    sinks = b.weight(at, "attn_sinks")
    if not (style.head_gate and b.has(at, "attn_gate")):
        return b.attention(at, q, k, v, sinks=sinks)
    out = b.attention(at, q, k, v, output=None)
    gate = g.unary(g.mul_mat(b.weight(at, "attn_gate"), cur))
    heads = g.reshape(out, block.value_dim, block.heads, T)
    heads = g.mul(heads, g.reshape(gate, 1, block.heads, T))
    return b.linear(at, "attn_output", g.reshape(heads, block.value_dim * block.heads, T))


def latent_attention(b: Builder, at: At, cur: Tensor) -> Tensor:
    """Multi-head latent attention with its matrices absorbed: one latent row a token is K and V (deepseek2.cpp)."""
    g, T, setup = b.g, b.tokens, b.setup
    heads = at.layer.heads
    dim, rope = b.said("attention.key_length_mla"), b.said("rope.dimension_count")
    nope, rank = dim - rope, b.said("attention.kv_lora_rank")
    if b.has(at, "attn_q_a"):
        q = g.mul_mat(b.weight(at, "attn_q_a"), cur)
        q = b.norm(at, "attn_q_a_norm", q)
        q = g.mul_mat(b.weight(at, "attn_q_b"), q)
    else:
        q = g.mul_mat(b.weight(at, "attn_q"), cur)
    q = g.reshape(q, dim, heads, T)
    latent = g.mul_mat(b.weight(at, "attn_kv_a_mqa"), cur)
    k_rope = g.rope(g.view(latent, rope, 1, T), b.positions)
    latent = b.norm(at, "attn_kv_a_norm", g.view(latent, rank, T))
    q_nope, q_rope = g.view(q, nope, heads, T), g.view(q, rope, heads, T)
    q_rope = g.rope(q_rope, b.positions)
    absorbed = g.mul_mat(b.weight(at, "attn_k_b"), g.permute(q_nope, 0, 2, 1, 3))
    q = g.concat(g.permute(absorbed, 0, 2, 1, 3), q_rope, (rank + rope, heads, T))
    latent = g.reshape(latent, rank, 1, T)
    k = g.concat(latent, k_rope, (rank + rope, 1, T))
    if b.said("attention.temperature_scale", 0.0):
        q = g.mul(q, b.input("attention scale", (1, 1, T), "f32"))
    for tensor in (q, latent, k):
        g.expand(tensor)
    keys = b.cache(at, "k", rank + rope, False)
    ids = b.input("cells of K", (T,), "i64")
    g.expand(g.set_rows(b._merged(keys), g.view(k, rank + rope, T), ids))
    k = g.view(keys, rank + rope, 1, b.cells, setup.streams, bytes=keys.size())
    v = g.view(k, rank, 1, b.cells, setup.streams, bytes=keys.size())
    cur = b.mha(q, k, v, b.mask(), v_up=b.weight(at, "attn_v_b"))
    return b.linear(at, "attn_output", cur, bias=False)


def mixture(b: Builder, at: At, cur: Tensor, style: Style) -> Tensor:
    """Routed experts, and shared ones beside them."""
    g = b.g
    gating = style.gating
    if gating == "given":
        gating = {0: "softmax", 1: "softmax", 2: "sigmoid", 3: "softmax_weight"}.get(b.said("expert_gating_func", 0), "softmax")
    normed = bool(b.said("expert_weights_norm", False)) if style.expert_norm is None else style.expert_norm
    out = b.experts(at, cur, gating, normed, act=style.act)
    if not b.has(at, "ffn_up_shexp"):
        return out
    names = ("ffn_up_shexp", "ffn_gate_shexp", "ffn_down_shexp")
    if style.shared_gate:
        gate = g.mul_mat(b.weight(at, "ffn_gate_inp_shexp"), cur)
        gate = g.div(g.unary(gate), gate)
        return g.add(out, g.mul(b.feed_forward(at, cur, style.act, names), gate))
    return g.add(out, b.feed_forward(at, cur, style.act, names))


def outline(b: Builder) -> Graph:
    """The graph of a model of which only the sizes are known: in each block what attends, then the widest matrices that
    take or give an activation. It stands for architectures nobody has described."""
    g, width = b.g, b.width
    cur = b.embedded()
    for at in b.layers:
        g.at = at.index
        block, x = at.layer, cur
        cur = g.rms_norm(x)
        g.label = "attention"
        if block.attends and block.heads and block.kv_heads and block.mixer != "mla" and block.owns_kv:
            def heads(dim: int, count: int, cur: Tensor = cur) -> Tensor:
                return g.reshape(g.op("mul_mat", (dim * count, b.tokens), "f32", cur), dim, count, b.tokens)
            q = g.like("rope", heads(block.key_dim, block.heads), b.positions)
            k = g.like("rope", heads(block.key_dim, block.kv_heads), b.positions)
            cur = b.attention(at, q, k, heads(block.value_dim, block.kv_heads), output=None)
            cur = g.op("mul_mat", (width, b.tokens), "f32", cur)
        if block.conv_state or block.ssm_state or block.mixer == "mla":
            wide = _widest(b, at, lambda name: not name.startswith(".ffn"))
            cur = g.op("mul_mat", (width, b.tokens), "f32", g.like("mixed", g.op("mul_mat", (wide, b.tokens), "f32", cur)))
        cur, x = b.picked(at, cur, x)
        x = g.add(cur, x)
        g.label = "feed-forward"
        wide = block.ff or block.expert_ff * block.experts_used + block.shared_ff
        cur = g.rms_norm(x)
        if wide:
            up, gate = (g.op("mul_mat", (wide, cur.shape[1]), "f32", cur) for _ in range(2))
            cur = g.op("mul_mat", (width, cur.shape[1]), "f32", g.glu(gate, up))
        cur = g.add(cur, x)
    return b.finish(cur)


def _widest(b: Builder, at: At, wanted: Callable[[str], bool]) -> int:
    """The most numbers a token that a matrix of the block gives."""
    return max((t.shape[1] for t in b.spec.tensors if t.layer == at.index and len(t.shape) == 2 and t.shape[0] == b.width
                and wanted(t.bare)), default=b.width)
