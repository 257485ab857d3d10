"""The graphs of Gemma 3n and Gemma 4: caches that later layers share, and embeddings of their own for every layer.

Follows src/models/gemma3n.cpp and gemma4.cpp of llama-cpp-python 0.3.36.
"""

from ..shapes import ModelSpec
from .families import family
from .ggml import HOST, Graph, Tensor
from .parts import At, Builder
from .recurrent import finish_with_hidden

_SPARSE_LAYERS = 10          # n_layer_sparsity
_GEMMA3N_OWN_CACHES = 20     # layers of a Gemma 3n that own a cache


def _own_caches(spec: ModelSpec) -> int:
    """Layers from the first on that own their cache."""
    if spec.architecture == "gemma3n":
        return _GEMMA3N_OWN_CACHES
    return len(spec.blocks) - (spec.metadata.get("attention.shared_kv_layers") or 0)


def _source(spec: ModelSpec, at: At) -> int:
    """The block whose cache a layer without one reads: the last of its kind that owns one."""
    return _own_caches(spec) - (2 if at.layer.window else 1)


def _kind(spec: ModelSpec, index: int) -> int:
    """Blocks whose cache others read are unlike any; and all are where each has embeddings of its own, for every block's part
    of them is copied to its card, and a pipeline over cards keeps those copies."""
    own = _own_caches(spec)
    alone = spec.metadata.get("embedding_length_per_layer_input") or own < len(spec.blocks) and own - 2 <= index < own
    return index if alone else -1


def _own_or_shared(b: Builder, at: At, q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
    source = None
    if k is None:
        index = _source(b.spec, at)
        source = next((one for one in b.layers if one.index == index), None) or At(
            index, b.spec.layers[index], at.place, at.experts, False)
    return b.attention(at, q, k, v, source=source)


def _heads(b: Builder, at: At, cur: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Q, K and V, normed and turned; no K and V where another layer's are read."""
    g, block, T = b.g, at.layer, b.tokens
    q = g.reshape(b.linear(at, "attn_q", cur), block.key_dim, block.heads, T)
    q = g.rope(b.norm(at, "attn_q_norm", q), b.positions, factors)
    if not block.owns_kv:
        return q, None, None
    k = b.linear(at, "attn_k", cur)
    v = b.linear(at, "attn_v", cur) if b.has(at, "attn_v") else k
    k = b.norm(at, "attn_k_norm", g.reshape(k, block.key_dim, block.kv_heads, T))
    v = g.rms_norm(g.reshape(v, block.value_dim, block.kv_heads, T))
    return q, g.rope(k, b.positions, factors), v


def _embeddings_of_layers(b: Builder, embedded: Tensor) -> Tensor | None:
    """What each layer adds of its own, [width, tokens, layers]; None where a model has no such embeddings."""
    table = b.outer("per_layer_token_embd.weight", HOST)
    if table is None:
        return None
    g, T, layers, place = b.g, b.tokens, len(b.spec.blocks), b.layers[0].place
    width = table.shape[0] // layers
    g.label = "layers' embeddings"
    own = g.get_rows(table, g.input((T,), "i32", "tokens for the layers"))
    own = g.scale(g.reshape(own, width, layers, T))
    g.expand(own)
    projected = g.scale(g.mul_mat(b.outer("per_layer_model_proj.weight", place), embedded))
    projected = b.normed(g.reshape(projected, width, layers, T), b.outer("per_layer_proj_norm.weight", place))
    both = g.scale(g.add(projected, own))
    return g.cont(g.permute(both, 0, 2, 1, 3))


def gemma4(b: Builder) -> Graph:
    """gemma4.cpp."""
    g = b.g
    cur = g.scale(b.embedded())
    own = _embeddings_of_layers(b, cur)
    for at in b.layers:
        x, cur = cur, b.entered(at, cur)
        factors = None if at.layer.window else b.outer("rope_freqs.weight", at.place)
        cur = _own_or_shared(b, at, *_heads(b, at, cur, factors))
        x = g.add(b.norm(at, "post_attention_norm", cur), x)
        cur = _with_experts(b, at, x) if b.has(at, "ffn_gate_inp") else b.feed_forward(at, b.norm(at, "ffn_norm", x))
        cur = g.add(b.norm(at, "post_ffw_norm", cur, pin=False), x)
        if own is not None:
            x = cur
            cur = g.unary(g.mul_mat(b.weight(at, "inp_gate"), x))
            cur = g.mul(cur, g.view(own, own.shape[0], b.tokens))
            cur = b.norm(at, "post_norm", g.mul_mat(b.weight(at, "proj"), cur))
            cur = g.add(x, cur)
        g.label = "layer output"
        if b.has(at, "layer_output_scale"):
            cur = g.mul(cur, b.weight(at, "layer_output_scale"))
    return finish_with_hidden(b, cur, capped=bool(b.said("final_logit_softcapping", 0.0)))


def _with_experts(b: Builder, at: At, x: Tensor) -> Tensor:
    """A dense feed-forward and experts side by side, each between norms of its own."""
    g = b.g
    dense = b.feed_forward(at, b.norm(at, "ffn_norm", x))
    dense = b.norm(at, "post_ffw_norm_1", dense)
    cur = b.norm(at, "pre_ffw_norm_2", x)
    routed = g.mul(g.scale(g.rms_norm(x)), b.weight(at, "ffn_gate_inp", "scale"))
    logits = g.mul_mat(b.weight(at, "ffn_gate_inp"), routed)
    cur = b.norm(at, "post_ffw_norm_2", b.experts(at, cur, scaled=False, logits_from=logits))
    return g.add(dense, cur)


def gemma3n(b: Builder) -> Graph:
    """gemma3n.cpp: several copies of the hidden state, of which one runs through a layer and corrects the others."""
    g, T, width = b.g, b.tokens, b.width
    inputs = b.said("altup.num_inputs", 4)
    cur = g.scale(b.embedded())
    own = _embeddings_of_layers(b, cur)
    g.label = "hidden states"
    added = g.repeat(cur, width, T, inputs - 1)
    added = g.mul_mat(b.outer("altup_proj.weight", b.output_place), added)
    added = g.div(g.mul(added, _magnitude(b, cur)), _magnitude(b, added))
    cur = g.concat(cur, added, (width, T, inputs))
    for at in b.layers:
        g.at = at.index
        cur = _altup_layer(b, at, cur, own, inputs)
    g.at, g.label = -1, "hidden states"
    target = _magnitude(b, g.view(cur, width, T))
    others = g.mul_mat(b.outer("altup_unembd_proj.weight", b.output_place), g.view(cur, width, T, inputs - 1))
    others = g.div(g.mul(others, target), _magnitude(b, others))
    cur = g.view(cur, width, T)
    for _ in range(inputs - 1):
        cur = g.add(cur, g.view(others, width, T))
    cur = g.get_rows(g.scale(cur), b.output_ids)
    return b.finish(cur, capped=True)


def _altup_layer(b: Builder, at: At, states: Tensor, own: Tensor, inputs: int) -> Tensor:
    g, T, width = b.g, b.tokens, b.width
    g.label = "hidden states"
    predictions = _predicted(b, at, states, inputs)
    active = g.view(predictions, width, T)
    cur = b.norm(at, "attn_norm", active)
    laurel = g.mul_mat(b.weight(at, "laurel_r"), g.mul_mat(b.weight(at, "laurel_l"), cur))
    laurel = g.add(b.norm(at, "laurel_post_norm", laurel), cur)
    g.label = "attention"
    cur = _own_or_shared(b, at, *_heads(b, at, cur, None))
    cur = g.add(b.norm(at, "post_attention_norm", cur), active)
    x = g.scale(g.add(cur, laurel))
    cur = b.norm(at, "ffn_norm", x)
    g.label = "feed-forward"
    up, gate = b.linear(at, "ffn_up", cur), b.linear(at, "ffn_gate", cur)
    if at.index < _SPARSE_LAYERS:
        gate = _largest_kept(b, gate)
    cur = b.linear(at, "ffn_down", g.mul(up, g.unary(gate)))
    g.label = "hidden states"
    activated = g.add(b.norm(at, "post_ffw_norm", cur, pin=False), x)
    corrected = _corrected(b, at, predictions, activated, inputs)
    first = g.mul(g.view(corrected, width, T), b.weight(at, "altup_correct_scale"))
    first = g.unary(g.mul_mat(b.weight(at, "inp_gate"), first))
    first = g.mul(first, g.view(own, own.shape[0], T))
    first = b.norm(at, "post_norm", g.mul_mat(b.weight(at, "proj"), first))
    rest = g.add(g.view(corrected, width, T, inputs - 1), first)
    return g.concat(g.view(corrected, width, T), rest, (width, T, inputs))


def _magnitude(b: Builder, x: Tensor) -> Tensor:
    g = b.g
    return g.like("sqrt", g.sum_rows(g.like("sqr", x)))


def _largest_kept(b: Builder, x: Tensor) -> Tensor:
    """gaussian_topk."""
    g = b.g
    mean = g.op("mean", (1, *x.shape[1:]), "f32", x)
    spread = g.like("sqrt", g.scale(g.sum_rows(g.like("sqr", g.sub(x, mean)))))
    return g.unary(g.sub(x, g.add(mean, g.scale(spread))))


def _modalities(b: Builder, at: At, x: Tensor) -> Tensor:
    g = b.g
    x = g.scale(b.norm(at, "altup_router_norm", x))
    return g.unary(g.mul_mat(b.weight(at, "altup_router"), x))


def _predicted(b: Builder, at: At, states: Tensor, inputs: int) -> Tensor:
    g, T = b.g, b.tokens
    modalities = _modalities(b, at, g.view(states, b.width, T))
    coefficients = g.reshape(b.linear(at, "altup_predict_coef", modalities), inputs, inputs, T)
    turned = g.cont(g.permute(states, 1, 2, 0, 3))
    predictions = g.mul_mat(turned, coefficients)
    return g.add(g.cont(g.permute(predictions, 0, 2, 1, 3)), states)


def _corrected(b: Builder, at: At, predictions: Tensor, activated: Tensor, inputs: int) -> Tensor:
    g, T = b.g, b.tokens
    modalities = _modalities(b, at, activated)
    innovation = g.sub(activated, g.view(predictions, b.width, T))
    coefficients = g.scale(b.linear(at, "altup_correct_coef", modalities))
    coefficients = g.cont(g.transpose(coefficients), 1, T, inputs)
    innovation = g.repeat(innovation, b.width, T, inputs)
    return g.add(g.mul(innovation, coefficients), predictions)


family("gemma3n", gemma3n, _kind)
family("gemma4", gemma4, _kind)
