"""What one layer of a decoder computes, as one pure function of its input, its weights and the keys and values seen so far.

The residual stream, norms, rotary embedding and softmax are in float32; matrices are multiplied in the layer's dtype, and
attention in the cache's. Matrices are multiplied by whatever `matmul` does, so that the same function runs eagerly over packed
weights and is traced by a compiler over another layout.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

Matmul = Callable[[torch.Tensor, object], torch.Tensor]     # x [tokens, cols], a matrix [rows, cols] -> [tokens, rows]
# q [tokens, heads, head_dim] float32, turned and not scaled -> what each head of each token finds, the same shape.
Attend = Callable[[torch.Tensor], torch.Tensor]
# New keys and values [2, kv_heads, tokens, head_dim] float32 -> those to look at, [kv_heads, cells, head_dim] each, the new
# ones at their end; or, of a cache that is no plain numbers, the function that looks at it.
Remember = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor] | Attend]
ROWS = 64       # tokens whose attention is computed together on a processor: of 32 to 512 the quickest for a text of 512


@dataclass(frozen=True)
class LayerShape:
    """What is fixed about a layer.

    heads, kv_heads, head_dim: of attention. turned: of each head's numbers those that positions turn, in adjacent pairs
    (`pairs`, as llama.cpp has it for llama) or in halves. scale: of the scores. softcap: scores are bent to stay below it (0:
    not). window: tokens that a token looks back on, itself among them (0: all). inputs: names of the matrices whose rows
    together are Q, K and V; ff: those of gate and up, or of up alone (`gated` False), of each expert where there are some;
    shared: those of the expert that every token uses. activation: "silu", "gelu" (by tanh) or "clamped" (gpt-oss). experts: how
    many; used: by each token; normalized: whether the shares of those sum to one. dtype: in which matrices are multiplied.
    """

    heads: int
    kv_heads: int
    head_dim: int
    turned: int
    pairs: bool
    scale: float
    dtype: torch.dtype
    softcap: float = 0.0
    window: int = 0
    inputs: tuple[str, ...] = ("qkv",)
    ff: tuple[str, ...] = ("gate_up",)
    gated: bool = True
    activation: str = "silu"
    experts: int = 0
    used: int = 0
    normalized: bool = True
    shared: tuple[str, ...] = ()


def block(x: torch.Tensor, weights: dict, shape: LayerShape, matmul: Matmul, remember: Remember, cos: torch.Tensor,
          sin: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """x [tokens, width] float32 -> the same after one layer.

    weights: matrices by the names in `shape`, "out", "down", "down_shared"; where there is one a bias as "<name>.bias"; of
    experts tuples as "<name>.experts", biases [experts, rows]; "router" and "shared_gate" [experts, width] float32; norms as
    `norm` takes them; "sinks" [heads]. cos, sin: [tokens, 1, turned] float32 of the tokens' positions, as `rope.table` gives
    them. mask: bool [tokens, cells], true where a token looks; one token may do without and looks at every cell.
    """
    y = attention(norm(x, weights, "attn_norm").to(shape.dtype), weights, shape, matmul, remember, cos, sin, mask)
    if "attn_post_norm" in weights:
        y = norm(y, weights, "attn_post_norm")
    x = x + y
    y = norm(x, weights, "ffn_norm").to(shape.dtype)
    y = mixture(y, weights, shape, matmul) if shape.experts else feed_forward(y, weights, shape, matmul)
    if "ffn_post_norm" in weights:
        y = norm(y, weights, "ffn_post_norm")
    return x + y


def norm(x: torch.Tensor, weights: dict, name: str) -> torch.Tensor:
    """x [..., n] over its root mean square, times a weight, in float32; with a bias the mean is taken off first (LayerNorm).

    weights[name] is the weight times sqrt(n), weights["<name>.eps"] is sqrt(n * epsilon): x / sqrt(mean(x^2) + epsilon) is
    sqrt(n) * x / hypot(|x|, sqrt(n * epsilon)), which is four operations instead of six. On a card it is one: there the weight
    is itself and "<name>.eps" is epsilon, a float.
    """
    if (bias := weights.get(f"{name}.bias")) is not None:
        return functional.layer_norm(x.float(), x.shape[-1:], weights[name], bias, weights[f"{name}.eps"])
    if isinstance(eps := weights[f"{name}.eps"], float):
        one = weights[name] if weights[name].ndim == 1 else None
        y = functional.rms_norm(x.float(), x.shape[-1:], one, eps)
        return y * weights[name] if one is None else y
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return x / torch.hypot(length, eps) * weights[name]


def attention(y: torch.Tensor, weights: dict, shape: LayerShape, matmul: Matmul, remember: Remember, cos: torch.Tensor,
              sin: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """y [tokens, width], normed -> [tokens, width]."""
    tokens, heads, kv_heads, head_dim = y.shape[0], shape.heads, shape.kv_heads, shape.head_dim
    qkv = joined(y, weights, shape.inputs, matmul).view(tokens, heads + 2 * kv_heads, head_dim).float()
    qk = qkv[:, :heads + kv_heads]
    if "qk_norm" in weights:
        qk.copy_(norm(qk, weights, "qk_norm"))
    turn(qk, shape, cos, sin)
    held = remember(qkv[:, heads:].view(tokens, 2, kv_heads, head_dim).permute(1, 2, 0, 3))
    if callable(held):
        found = held(qkv[:, :heads])
    else:
        keys, values = held
        q = qkv[:, :heads].mul_(shape.scale).view(tokens, kv_heads, heads // kv_heads, head_dim).to(keys.dtype)
        sinks = weights.get("sinks")
        found = one(q[0], keys, values, shape, mask, sinks) if tokens == 1 else many(q, keys, values, shape, mask, sinks)
    return project(found.reshape(tokens, -1).to(shape.dtype), weights, "out", matmul)


def turn(x: torch.Tensor, shape: LayerShape, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn each pair of numbers of x [tokens, heads, head_dim] float32 by its position's angle, in place."""
    if shape.turned < shape.head_dim:
        x = x[..., :shape.turned]
    other = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if shape.pairs else x.roll(shape.turned // 2, -1)
    x.mul_(cos).addcmul_(other, sin)


def one(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, shape: LayerShape, mask: torch.Tensor | None,
        sinks: torch.Tensor | None) -> torch.Tensor:
    """Attention of one token: q [kv_heads, group, head_dim], scaled -> the same."""
    scores = torch.bmm(q, keys.mT)
    if shape.softcap:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    if mask is not None:
        scores = torch.where(mask, scores, float("-inf"))
    return torch.bmm(shares(scores, sinks, shape), values)


def many(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, shape: LayerShape, mask: torch.Tensor,
         sinks: torch.Tensor | None) -> torch.Tensor:
    """Attention of many: q [tokens, kv_heads, group, head_dim], scaled -> the same. On a processor some tokens at a time, each
    with the cells that any of them looks at: of a text read from its beginning half of the work."""
    tokens, before, found = q.shape[0], keys.shape[1] - q.shape[0], []
    for start in range(0, tokens, step := ROWS if q.device.type == "cpu" else tokens):
        rows, first = slice(start, start + step), max(0, before + start + 1 - shape.window) if shape.window else 0
        cells = slice(first, before + min(start + step, tokens))
        found.append(_together(q[rows], keys[:, cells], values[:, cells], shape, mask[rows, cells], sinks))
    return found[0] if len(found) == 1 else torch.cat(found)


def _together(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, shape: LayerShape, mask: torch.Tensor,
              sinks: torch.Tensor | None) -> torch.Tensor:
    tokens, kv_heads, group, head_dim = q.shape
    if not shape.softcap and sinks is None:
        q = q.permute(1, 2, 0, 3)
        keys, values = (one[:, None].expand(-1, group, -1, -1) for one in (keys, values))
        return functional.scaled_dot_product_attention(q, keys, values, mask, scale=1.0).permute(2, 0, 1, 3)
    q = q.permute(1, 2, 0, 3).reshape(kv_heads, group * tokens, head_dim)
    scores = torch.bmm(q, keys.mT)
    if shape.softcap:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    scores = scores.view(kv_heads, group, tokens, -1).masked_fill(~mask, float("-inf"))
    found = torch.bmm(shares(scores, sinks, shape).view(kv_heads, group * tokens, -1), values)
    return found.view(kv_heads, group, tokens, head_dim).permute(2, 0, 1, 3)


def shares(scores: torch.Tensor, sinks: torch.Tensor | None, shape: LayerShape) -> torch.Tensor:
    """Softmax over the last dimension in float32; a head's sink takes its share and gives nothing. In the scores' dtype."""
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    sinks = sinks.view(shape.kv_heads, -1, *[1] * (scores.ndim - 2)).expand(*scores.shape[:-1], 1)
    return torch.cat([scores.float(), sinks], -1).softmax(-1)[..., :-1].to(scores.dtype)


def project(x: torch.Tensor, weights: dict, name: str, matmul: Matmul) -> torch.Tensor:
    """x times a matrix, plus its bias where it has one."""
    y, bias = matmul(x, weights[name]), weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def joined(x: torch.Tensor, weights: dict, names: tuple[str, ...], matmul: Matmul) -> torch.Tensor:
    """x times several matrices, side by side."""
    found = [project(x, weights, name, matmul) for name in names]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def feed_forward(y: torch.Tensor, weights: dict, shape: LayerShape, matmul: Matmul, names: tuple[str, ...] = (),
                 down: str = "down") -> torch.Tensor:
    """y [tokens, width], normed -> [tokens, width]. `names` in place of the layer's own `ff`."""
    found = [project(y, weights, name, matmul) for name in names or shape.ff]
    return project(activated(found, shape), weights, down, matmul)


def activated(found: list[torch.Tensor], shape: LayerShape) -> torch.Tensor:
    """What lies between a layer's inner matrices: the activation, times `up` where there is a gate."""
    if not shape.gated:
        return functional.gelu(found[0], approximate="tanh")
    gate, up = found if len(found) == 2 else found[0].chunk(2, -1)
    if shape.activation == "clamped":       # gpt-oss: transformers' swiglu_alpha and swiglu_limit
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    return (functional.silu(gate) if shape.activation == "silu" else functional.gelu(gate, approximate="tanh")) * up


def mixture(y: torch.Tensor, weights: dict, shape: LayerShape, matmul: Matmul) -> torch.Tensor:
    """Experts: y [tokens, width], normed -> [tokens, width] float32. Those that no token chose are not touched.

    Where they come one by one weights["fetch"] is given those that were chosen, rising, and the choices int [tokens, used];
    it hands them out, each to be used before the next is asked for: of several tokens in this order, of one in any.
    """
    chances = functional.linear(y.float(), weights["router"], weights.get("router.bias")).softmax(-1)
    found, chosen = chances.topk(shape.used, -1)
    if shape.normalized:
        found = found / found.sum(-1, keepdim=True)
    wanted, fetch, common = chosen.unique().tolist(), weights.get("fetch"), None
    handed = wanted if fetch is None else fetch(wanted, chosen)
    if shape.shared:        # while the first of them are on their way
        share = torch.sigmoid(functional.linear(y.float(), weights["shared_gate"]))
        common = share * feed_forward(y, weights, shape, matmul, shape.shared, "down_shared")
    out = torch.zeros(y.shape, dtype=torch.float32, device=y.device)
    if y.shape[0] == 1:
        parts = {expert: _expert(y, weights, expert, shape, matmul) * found[chosen == expert] for expert in handed}
        for expert in wanted:       # summed in one order, whichever came first
            out += parts[expert]
    else:
        for expert in handed:
            token, place = torch.where(chosen == expert)
            out.index_add_(0, token, _expert(y[token], weights, expert, shape, matmul) * found[token, place, None])
    return out if common is None else out.add_(common)


def _expert(y: torch.Tensor, weights: dict, expert: int, shape: LayerShape, matmul: Matmul) -> torch.Tensor:
    def part(x: torch.Tensor, name: str) -> torch.Tensor:
        found, bias = matmul(x, weights[f"{name}.experts"][expert]), weights.get(f"{name}.experts.bias")
        return found if bias is None else found + bias[expert]

    return part(activated([part(y, name) for name in shape.ff], shape), "down")
