"""The graphs of models with recurrent layers: gated delta nets, state spaces and short convolutions, beside attention.

A recurrent layer reads its state of every sequence, writes it back, and computes in between on tensors of
[channels, tokens a sequence, sequences]. Follows src/models/delta-net-base.cpp, mamba-base.cpp and the architectures' own
files of llama-cpp-python 0.3.36, whose delta net is always the fused operator.
"""

from math import prod

from .decoders import Style, mixture
from .families import family
from .ggml import Dim, Graph, Tensor, symbol
from .parts import At, Builder, strided

_SHARED = Style(gating="softmax", expert_norm=True)


class Recurrence:
    """What all recurrent layers of one graph share: the sequences' states, convolutions over them, and shapes."""

    def __init__(self, b: Builder):
        self.b, self.g = b, b.g
        self.each, self.sequences = symbol("t"), b.setup.sequences
        order = b.input("states' order", (self.sequences,), "i32")
        self.ids = self.g.view(order, self.sequences, contiguous=True)          # which state each sequence goes on from
        self.others = self.g.view(order, 0, contiguous=True)                    # those of sequences that no token is of

    def stored(self, at: At, which: str, width: int) -> Tensor:
        """The states of a layer, a row a sequence: "conv" (r) or "state" (s)."""
        return self.g.stored((width, self.sequences), "f32", at.place, f"{which} of the sequences", weight=False)

    def read(self, states: Tensor, rows=None) -> Tensor:
        """build_rs: clear a fresh state, take every sequence's (by `rows`, an operator in place of get_rows), and move
        those that no token is of: none in a reserved graph, but tensors of no bytes leave traces in the allocator."""
        g = self.g
        width = states.shape[0]
        flat = g.reshape(states, width, self.sequences)
        cleared = g.view(flat, width, contiguous=True)
        cleared = g.view(cleared, width, contiguous=True, op="scale")
        g.expand(cleared)
        taken = rows(flat, self.ids) if rows else g.get_rows(flat, self.ids)
        g.expand(taken)
        g.expand(g.copy(g.get_rows(flat, self.others), g.view(states, width, 0)))
        return taken

    def convolved(self, at: At, state: Tensor, states: Tensor, x: Tensor, name: str) -> Tensor:
        """A causal convolution of x [channels, tokens, sequences] after the columns before it, which are kept."""
        g, kernel = self.g, self.b.weight(at, name)
        taps, channels = kernel.shape[:2]
        before = g.reshape(state, taps - 1, channels, self.sequences)
        columns = g.symbol(f"columns_{taps}", f"t+{taps - 1}")
        whole = g.concat(before, g.transpose(x), (columns, channels, self.sequences))
        extent = f"({channels * self.sequences}-1)*4*({columns})+{4 * (taps - 1)}"          # of rows with gaps between them
        last = g.view(whole, taps - 1, channels, self.sequences, bytes=extent)
        g.expand(g.copy(last, g.view(states, (taps - 1) * channels, self.sequences)))
        return g.op("ssm_conv", (channels, self.each, self.sequences), "f32", whole, kernel)

    def split(self, cur: Tensor) -> Tensor:
        """[channels, all tokens] by sequence."""
        return self.g.reshape(cur, cur.shape[0], self.each, self.sequences)

    def part(self, whole: Tensor, *shape: int) -> Tensor:
        """Some of every token's channels, of that shape: a view whose copy takes the gaps between them, too."""
        extent = strided(prod(shape), whole.shape[0], self.b.tokens)
        return self.g.view(whole, *shape, self.each, self.sequences, bytes=extent)

    def bare(self, at: At, name: str) -> Tensor:
        """A tensor whose name ends with itself (ssm_a, ssm_d)."""
        return self.b.outer(f"blk.{at.index}.{name}", at.place)

    def followed(self, name: str, by: int) -> Dim:
        """Rows of all tokens and, behind them, `by` rows a sequence of new states."""
        return self.g.symbol(name, f"{self.sequences}*(t+{by})")


def _widths(at: At) -> tuple[int, int]:
    """Elements a sequence of a layer's two states."""
    return at.layer.conv_state, at.layer.ssm_state


def finish_with_hidden(b: Builder, cur: Tensor, capped: bool = False) -> Graph:
    """The end of models that a draft head may follow: the last norm of all tokens stays, and only then rows are picked."""
    g = b.g
    g.at, g.label = -1, "output"
    cur = b.normed(cur, b.outer("output_norm.weight", b.output_place))
    cur.output = True
    cur = g.get_rows(cur, b.output_ids)
    cur.output = True
    g.label = "logits"
    cur = g.mul_mat(b.outer("output.weight", b.output_place) or b.outer("token_embd.weight", b.output_place), cur)
    if capped:
        cur = g.scale(g.unary(g.scale(cur)))
    cur.output = True
    g.expand(cur)
    return g


# ---- gated delta net: Qwen3-Next, Qwen3.5 -----------------------------------------------------------------------


def delta_nets(b: Builder) -> Graph:
    """Qwen3-Next and Qwen3.5: three layers of gated delta net, one of gated attention (qwen3next.cpp, qwen35.cpp)."""
    g, recurrence = b.g, Recurrence(b)
    cur = b.embedded()
    for at in b.layers:
        x, cur = cur, b.entered(at, cur, "attention" if b.has(at, "attn_q") else "recurrence")
        g.expand(cur)
        cur = _gated_attention(b, at, cur) if b.has(at, "attn_q") else _delta_net(recurrence, at, cur)
        x = g.add(cur, x)
        cur = b.norm(at, "post_attention_norm", x)
        cur = _gated_experts(b, at, cur) if b.has(at, "ffn_gate_inp") else b.feed_forward(at, cur)
        g.label = "layer output"
        cur = g.add(cur, x)
    return finish_with_hidden(b, cur)


def _gated_experts(b: Builder, at: At, cur: Tensor) -> Tensor:
    g = b.g
    out = b.experts(at, cur)
    if not b.has(at, "ffn_up_shexp"):
        return out
    shared = b.feed_forward(at, cur, names=("ffn_up_shexp", "ffn_gate_shexp", "ffn_down_shexp"))
    gate = g.unary(g.mul_mat(b.weight(at, "ffn_gate_inp_shexp"), cur))
    return g.add(out, g.mul(shared, gate))


def _gated_attention(b: Builder, at: At, cur: Tensor) -> Tensor:
    """Attention whose query projection gives a gate for each of its heads, too."""
    g, block, T = b.g, at.layer, b.tokens
    plain = b.spec.architecture == "qwen3next"
    positions = b.positions if plain else b.input("positions", (4 * T,), "i32")          # MRoPE
    both, k, v = (b.linear(at, name, cur) for name in ("attn_q", "attn_k", "attn_v"))
    q = b.norm(at, "attn_q_norm", _half(b, both, block.key_dim, block.heads * T, block.heads, T))
    k = b.norm(at, "attn_k_norm", g.reshape(k, block.key_dim, block.kv_heads, T))
    v = g.reshape(v, block.value_dim, block.kv_heads, T)
    gate = g.cont(_half(b, both, block.key_dim, block.heads * T, block.heads, T), block.key_dim * block.heads, T)
    cur = b.attention(at, g.rope(q, positions), g.rope(k, positions), v, output=None)
    return b.linear(at, "attn_output", g.mul(cur, g.unary(gate)))


def _half(b: Builder, both: Tensor, row: int, rows: Dim, *shape: Dim | int) -> Tensor:
    """Every other `row` numbers of a projection, as [row, *shape]."""
    return b.g.view(both, row, *shape, bytes=strided(row, 2 * row, rows))


def _delta_net(r: Recurrence, at: At, cur: Tensor) -> Tensor:
    """build_layer_attn_linear: projections, a convolution over Q, K and V, and the fused gated delta net."""
    b, g, each, sequences = r.b, r.g, r.each, r.sequences
    inner, key_dim = b.said("ssm.inner_size"), b.said("ssm.state_size")
    key_heads, heads = b.said("ssm.group_count"), b.said("ssm.time_step_rank")
    dim = inner // heads
    mixed = r.split(g.mul_mat(b.weight(at, "attn_qkv"), cur))
    z = g.mul_mat(b.weight(at, "attn_gate"), cur)
    if b.has(at, "ssm_ba"):
        both = g.mul_mat(b.weight(at, "ssm_ba"), cur)
        beta, alpha = (_half(b, both, heads // key_heads, key_heads * b.tokens, key_heads, each, sequences) for _ in range(2))
        beta = g.reshape(g.unary(g.cont(beta)), 1, heads, each, sequences)
        alpha = g.cont(alpha, heads, each, sequences)
    else:
        beta = g.unary(g.reshape(g.mul_mat(b.weight(at, "ssm_beta"), cur), 1, heads, each, sequences))
        alpha = g.reshape(g.mul_mat(b.weight(at, "ssm_alpha"), cur), heads, each, sequences)
    gate = g.mul(g.unary(g.add(alpha, b.weight(at, "ssm_dt", "bias"))), r.bare(at, "ssm_a"))
    gate = g.reshape(gate, 1, heads, each, sequences)
    of_conv, of_state = _widths(at)
    columns, states = r.stored(at, "convolution", of_conv), r.stored(at, "state", of_state)
    cur = r.convolved(at, r.read(columns), columns, mixed, "ssm_conv1d")
    state = g.reshape(r.read(states), dim, dim, heads, sequences)
    cur = g.unary(cur)
    q, k = (g.scale(g.rms_norm(r.part(cur, key_dim, key_heads))) for _ in range(2))
    v = r.part(cur, dim, heads)
    if b.spec.architecture == "qwen3next" and key_heads != heads:
        q, k = (g.reshape(g.repeat(g.reshape(x, key_dim, 1, key_heads, each * sequences),
                                   key_dim, heads // key_heads, key_heads, each * sequences),
                          key_dim, heads, each, sequences) for x in (q, k))
    rows = r.followed(f"delta_rows_{dim}", dim)
    out = g.op("gated_delta_net", (dim * heads, rows), "f32", q, k, v, gate, beta, state)
    output, kept = g.view(out, dim, heads, each, sequences), g.view(out, dim, dim, heads, sequences)
    g.expand(g.copy(kept, g.view(states, of_state, sequences)))
    normed = b.norm(at, "ssm_norm", output)
    cur = g.mul(normed, g.unary(g.reshape(z, dim, heads, each, sequences)))
    cur = g.mul_mat(b.weight(at, "ssm_out"), g.reshape(cur, inner, each, sequences))
    return g.reshape(cur, b.width, b.tokens)


# ---- state spaces: Mamba, Jamba, Granite 4, Nemotron-H, Falcon-H1 ------------------------------------------------


def state_space(r: Recurrence, at: At, cur: Tensor) -> Tensor:
    """build_mamba2_layer."""
    b, g, each, sequences = r.b, r.g, r.each, r.sequences
    inner, dim = b.said("ssm.inner_size"), b.said("ssm.state_size")
    heads, groups = b.said("ssm.time_step_rank"), b.said("ssm.group_count")
    head, channels = inner // heads, inner + 2 * groups * dim
    label, g.label = g.label, "recurrence"
    of_conv, of_state = _widths(at)
    columns, states = r.stored(at, "convolution", of_conv), r.stored(at, "state", of_state)
    before = r.read(columns)
    whole = r.split(g.mul_mat(b.weight(at, "ssm_in"), cur))
    z, mixed, steps = r.part(whole, head, heads), r.part(whole, channels), r.part(whole, heads)
    mixed = r.convolved(at, before, columns, mixed, "ssm_conv1d")
    mixed = g.unary(g.add(mixed, b.weight(at, "ssm_conv1d", "bias")))
    x = r.part(mixed, head, heads)
    inward, outward = (r.part(mixed, dim, groups) for _ in range(2))
    steps = g.add(g.cont(steps), b.weight(at, "ssm_dt", "bias"))
    decay = r.bare(at, "ssm_a")
    rows = r.followed(f"scan_rows_{dim}", dim)

    def scan(flat: Tensor, ids: Tensor) -> Tensor:
        return g.op("ssm_scan", (inner * rows,), "f32", g.reshape(flat, dim, head, heads, sequences), x, steps, decay,
                    inward, outward, ids)

    out = r.read(states, scan)
    g.expand(g.copy(g.view(out, of_state, sequences), g.view(states, of_state, sequences)))
    y = g.add(g.view(out, head, heads, each, sequences), g.mul(x, r.bare(at, "ssm_d")))
    y = g.glu(g.cont(z), y)
    if b.has(at, "ssm_norm"):
        y = b.norm(at, "ssm_norm", g.reshape(y, inner // groups, groups, each, sequences))
    cur = g.mul_mat(b.weight(at, "ssm_out"), g.reshape(y, inner, b.tokens))
    g.label = label
    return cur


def selective_scan(r: Recurrence, at: At, cur: Tensor) -> Tensor:
    """build_mamba_layer: the first Mamba's."""
    b, g, each, sequences = r.b, r.g, r.each, r.sequences
    inner, dim, rank = b.said("ssm.inner_size"), b.said("ssm.state_size"), b.said("ssm.time_step_rank")
    label, g.label = g.label, "recurrence"
    of_conv, of_state = _widths(at)
    columns, states = r.stored(at, "convolution", of_conv), r.stored(at, "state", of_state)
    before = r.read(columns)
    whole = g.mul_mat(b.weight(at, "ssm_in"), r.split(cur))
    x, z = (r.part(whole, inner) for _ in range(2))
    x = r.convolved(at, before, columns, x, "ssm_conv1d")
    x = g.unary(g.add(x, b.weight(at, "ssm_conv1d", "bias")))
    mixed = g.mul_mat(b.weight(at, "ssm_x"), x)
    steps = r.part(mixed, rank)
    inward, outward = (r.part(mixed, dim, 1) for _ in range(2))
    if b.has(at, "ssm_dt_norm") or b.said("ssm.dt_b_c_rms", False):
        steps, inward, outward = (b.norm(at, f"ssm_{name}_norm", part)
                                  for name, part in (("dt", steps), ("b", inward), ("c", outward)))
    else:
        steps = g.cont(steps)
    steps = g.add(g.mul_mat(b.weight(at, "ssm_dt"), steps), b.weight(at, "ssm_dt", "bias"))
    decay = r.bare(at, "ssm_a")
    rows = r.followed(f"scan_rows_{dim}", dim)

    def scan(flat: Tensor, ids: Tensor) -> Tensor:
        return g.op("ssm_scan", (inner * rows,), "f32", g.reshape(flat, dim, 1, inner, sequences),
                    g.reshape(x, 1, inner, each, sequences), steps, decay, inward, outward, ids)

    out = r.read(states, scan)
    g.expand(g.copy(g.view(out, of_state, sequences), g.view(states, of_state, sequences)))
    y = g.add(g.view(out, inner, each, sequences), g.mul(x, r.bare(at, "ssm_d")))
    cur = g.mul_mat(b.weight(at, "ssm_out"), g.glu(g.cont(z), y))
    g.label = label
    return g.reshape(cur, b.width, b.tokens)


def mamba(b: Builder) -> Graph:
    """mamba.cpp: Mamba and Mamba-2."""
    g, recurrence = b.g, Recurrence(b)
    layer = state_space if b.spec.architecture == "mamba2" else selective_scan
    cur = b.embedded()
    for at in b.layers:
        g.at, x = at.index, cur
        g.label = "norm"
        cur, x = b.picked(at, layer(recurrence, at, b.norm(at, "attn_norm", x)), x)
        g.label = "layer output"
        cur = g.add(cur, x)
    return b.finish(cur)


def jamba(b: Builder) -> Graph:
    """jamba.cpp."""
    g, recurrence = b.g, Recurrence(b)
    cur = b.embedded()
    for at in b.layers:
        x, cur = cur, b.entered(at, cur)
        cur = selective_scan(recurrence, at, cur) if b.has(at, "ssm_in") else _attention(b, at, cur, rope=False)
        cur, x = b.picked(at, cur, x)
        x = g.add(x, cur)
        cur = b.norm(at, "ffn_norm", x)
        cur = b.experts(at, cur, normed=False) if b.has(at, "ffn_gate_inp") else b.feed_forward(at, cur)
        g.label = "layer output"
        cur = g.add(x, cur)
    return b.finish(cur)


def granite_hybrid(b: Builder) -> Graph:
    """granite-hybrid.cpp."""
    g, recurrence = b.g, Recurrence(b)
    scaled = bool(b.said("residual_scale", 0.0))
    cur = b.embedded()
    for at in b.layers:
        x, cur = cur, b.entered(at, cur)
        cur = state_space(recurrence, at, cur) if b.has(at, "ssm_in") else _attention(
            b, at, cur, rope=bool(b.said("rope.scaling.finetuned", True)))
        cur, x = b.picked(at, cur, x)
        x = g.add(g.scale(cur) if scaled else cur, x)
        cur = b.norm(at, "ffn_norm", x)
        cur = mixture(b, at, cur, _SHARED) if b.has(at, "ffn_gate_inp") else b.feed_forward(at, cur)
        g.label = "layer output"
        cur = g.add(g.scale(cur) if scaled else cur, x)
    return b.finish(cur, scaled=True)


def nemotron_hybrid(b: Builder) -> Graph:
    """nemotron-h.cpp: a layer is a state space, an attention or a feed-forward."""
    g, recurrence = b.g, Recurrence(b)
    cur = b.embedded()
    for at in b.layers:
        x, cur = cur, b.entered(at, cur)
        if b.has(at, "ssm_in"):
            cur = state_space(recurrence, at, cur)
        elif b.has(at, "attn_q"):
            cur = _attention(b, at, cur, rope=False)
        elif b.has(at, "ffn_gate_inp"):
            cur = _latent_experts(b, at, cur)
        else:
            cur = b.feed_forward(at, cur, "relu2")
        g.label = "layer output"
        cur = g.add(cur, x)
    return finish_with_hidden(b, cur)


def _latent_experts(b: Builder, at: At, cur: Tensor) -> Tensor:
    """Experts without gates, in some models between a projection down and one up; and a shared one."""
    g, latent = b.g, cur
    if b.has(at, "ffn_latent_down"):
        latent = g.mul_mat(b.weight(at, "ffn_latent_down"), cur)
    logits = g.mul_mat(b.weight(at, "ffn_gate_inp"), cur)
    out = b.experts(at, latent, "sigmoid", bool(b.said("expert_weights_norm", False)), act="relu2", logits_from=logits)
    if b.has(at, "ffn_latent_up"):
        out = g.mul_mat(b.weight(at, "ffn_latent_up"), out)
    return g.add(out, b.feed_forward(at, cur, "relu2", ("ffn_up_shexp", "ffn_gate_shexp", "ffn_down_shexp")))


def falcon_h1(b: Builder) -> Graph:
    """falcon-h1.cpp: attention and a state space side by side."""
    g, recurrence = b.g, Recurrence(b)
    cur = b.embedded()
    for at in b.layers:
        g.at, x = at.index, cur
        g.label = "attention"
        attended = _attention(b, at, b.norm(at, "attn_norm", x))
        cur = state_space(recurrence, at, b.norm(at, "attn_norm", x))
        x = g.add(g.add(attended, cur), x)
        (x,) = b.picked(at, x)
        g.label = "layer output"
        cur = g.add(b.feed_forward(at, b.norm(at, "ffn_norm", x)), x)
    return b.finish(cur)


def _attention(b: Builder, at: At, cur: Tensor, rope: bool = True) -> Tensor:
    q, k, v = b.qkv(at, cur)
    if b.has(at, "attn_q_norm"):
        q, k = b.norm(at, "attn_q_norm", q), b.norm(at, "attn_k_norm", k)
    if rope:
        factors = b.rope_factors(at)
        q, k = b.g.rope(q, b.positions, factors), b.g.rope(k, b.positions, factors)
    return b.attention(at, q, k, v)


# ---- short convolutions: LFM2 ------------------------------------------------------------------------------------


def short_convolutions(b: Builder) -> Graph:
    """lfm2.cpp: gated convolutions over three tokens, and attention."""
    g, recurrence = b.g, Recurrence(b)
    cur = b.embedded()
    for at in b.layers:
        x, cur = cur, b.entered(at, cur)
        cur = _attention(b, at, cur) if b.has(at, "attn_q") else _short_convolution(recurrence, at, cur)
        cur, x = b.picked(at, cur, x)
        x = g.add(x, cur)
        cur = b.norm(at, "ffn_norm", x)
        gating = {2: "sigmoid", 3: "softmax_weight"}.get(b.said("expert_gating_func", 2), "softmax")
        cur = b.experts(at, cur, gating) if b.has(at, "ffn_gate_inp") else b.feed_forward(at, cur)
        g.label = "layer output"
        cur = g.add(x, cur)
    return b.finish(cur, norm="token_embd_norm")


def _short_convolution(r: Recurrence, at: At, cur: Tensor) -> Tensor:
    b, g = r.b, r.g
    g.label = "recurrence"
    whole = g.mul_mat(b.weight(at, "shortconv.in_proj"), r.split(cur))
    first, second, x = (r.part(whole, whole.shape[0] // 3) for _ in range(3))
    x = g.mul(first, x)
    columns = r.stored(at, "convolution", _widths(at)[0])
    cur = r.convolved(at, r.read(columns), columns, x, "shortconv.conv")
    cur = g.mul_mat(b.weight(at, "shortconv.out_proj"), g.mul(second, cur))
    return g.reshape(cur, cur.shape[0], b.tokens)


for _name in ("qwen3next", "qwen35", "qwen35moe"):
    family(_name, delta_nets)
for _name in ("nemotron_h", "nemotron_h_moe"):
    family(_name, nemotron_hybrid)
for _name in ("lfm2", "lfm2moe"):
    family(_name, short_convolutions)
family("granitehybrid", granite_hybrid)
family("falcon-h1", falcon_h1)
for _name in ("mamba", "mamba2"):
    family(_name, mamba)
family("jamba", jamba)
