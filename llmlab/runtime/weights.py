"""A model's weights by what the lean decoder does with them: plain dicts, one a layer, and the shape that goes with each.

Matrices that are multiplied by the same input are fused where that is quicker and their formats agree: the rows of one lie
after those of the other, packed once. Their bytes are then a copy, so "compact", which holds the file's own pages, fuses none.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..kernels import Packed
from . import rope
from .families import Family, family_of
from .keys import Keys
from .layers import LayerShape
from .packer import Packer, start
from .tensors import Source, reader


@dataclass(frozen=True)
class Turning:
    """How positions turn Q and K in some of the layers: `pairs` and tables as `rope.table` has them.

    frequencies, scale: up to `limit` tokens; longer texts go by `long` (Phi-3), (frequencies, scale) too.
    """

    frequencies: torch.Tensor
    scale: float
    pairs: bool
    limit: int | None = None
    long: tuple[torch.Tensor, float] | None = None


@dataclass(frozen=True)
class Weights:
    """All of a model: `layers` is a dict for each (see `layers.block`), `shapes` what goes with it, `turning` the index of the
    entry of `turnings` that is its own. `head` has the last norm, "norm", and the output matrix, "output".

    scale: the embedding is multiplied by it. softcap: the logits are bent to stay below it (0: not). trained: tokens of
    context. chosen: how "auto" was decided.
    """

    embedding: Packed
    layers: tuple[dict, ...]
    shapes: tuple[LayerShape, ...]
    turning: tuple[int, ...]
    turnings: tuple[Turning, ...]
    head: dict
    scale: float
    softcap: float
    trained: int
    chosen: str

    def packed(self) -> list[Packed]:
        """Every packed matrix, each once."""
        values = [self.embedding]
        for value in (value for part in (*self.layers, self.head) for value in part.values()):
            values += value if isinstance(value, tuple) else [value]
        return list({id(value): value for value in values if isinstance(value, Packed)}.values())

    def handed(self, head: bool = True) -> Iterable[dict]:
        """The layers, one after another: each is there until the next is asked for. Here all of them always are; where layers
        come and go, `head` says whether `last` is asked for after them."""
        return self.layers

    def each(self) -> tuple[dict, ...]:
        """What `handed` hands out, all of it at once: what is where, but whatever numbers are there just now."""
        return self.layers

    def last(self) -> dict:
        """The head, asked for after the layers; there until layers are asked for again."""
        return self.head

    @property
    def bytes(self) -> int:
        """Bytes held, the pages of the file that running touches among them."""
        small = {id(value): value.nbytes for part in (*self.layers, self.head) for value in part.values()
                 if isinstance(value, torch.Tensor)}
        return sum(p.bytes + p.mapped for p in self.packed()) + sum(small.values())


def read(source: Source, keys: Keys, dtype: torch.dtype, strategy: str = "auto",
         device: torch.device | str = "cpu") -> Weights:
    """The weights of a source, packed for inputs of `dtype` by `strategy` as `kernels.pack` has it ("auto": decided once).

    Raises LabError (an architecture that is not run) and BadFile (a tensor that is missing, of another shape than the
    hyperparameters say, or that the model has no place for), naming tensor and file.
    """
    family, device = family_of(keys), torch.device(device)
    packer, chosen = start(source, keys, strategy, dtype, device)
    config = family.config(keys, reader(source))
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    made = _Layers(family, config, packer)
    kinds = config.get("layer_types") or [""] * config["num_hidden_layers"]
    found = [made.layer(number, kind) for number, kind in enumerate(kinds)]
    turnings, turning = _turnings(config, keys, reader(source), bool(family.interleaved), kinds, device)
    embedding, head = made.ends(source.shape("token_embd.weight")[0])
    packer.finish()
    gemma = family.model_type.startswith("gemma")
    return Weights(embedding=embedding, layers=tuple(weights for weights, _ in found), turning=turning, turnings=turnings,
                   shapes=tuple(shape for _, shape in found), head=head, softcap=config.get("final_logit_softcapping") or 0.0,
                   # Rounded as transformers rounds it: Gemma was trained so.
                   scale=float(torch.tensor(config["hidden_size"] ** 0.5, dtype=dtype)) if gemma else 1.0,
                   trained=config["max_position_embeddings"], chosen=chosen)


def _turnings(config: dict, keys: Keys, numbers, pairs: bool, kinds: list[str],
              device: torch.device) -> tuple[tuple[Turning, ...], tuple[int, ...]]:
    """The ways that positions turn heads, and the number of each layer's."""
    parameters, factors = config["rope_parameters"], numbers("rope_freqs.weight")
    ways = {kind: parameters[kind] for kind in dict.fromkeys(kinds)} if "rope_theta" not in parameters else {"": parameters}
    made = []
    for way in ways.values():
        (found, scale), limit, long = rope.frequencies(way, config["head_dim"], config["max_position_embeddings"]), None, None
        if factors is not None:
            found = rope.divided(found, factors, keys.file)
        if way["rope_type"] == "longrope":
            limit = way["original_max_position_embeddings"]
            other, by = rope.frequencies(way, config["head_dim"], config["max_position_embeddings"], long=True)
            long = other.to(device), by
        made.append(Turning(found.to(device), scale, pairs, limit, long))
    order = list(ways)
    return tuple(made), tuple(order.index(kind) if kind in ways else 0 for kind in kinds)


class _Layers:
    """Makes the weights and the shape of one layer after another."""

    def __init__(self, family: Family, config: dict, packer: Packer):
        self.family, self.config, self.packer, self.tensors = family, config, packer, packer.tensors
        self.model = family.model_type
        self.width, self.dim = config["hidden_size"], config["head_dim"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.eps = config.get("rms_norm_eps") or config["norm_epsilon"]

    def layer(self, number: int, kind: str) -> tuple[dict, LayerShape]:
        """`kind`: "sliding_attention", "full_attention", or "" where all layers are alike."""
        config, block, weights = self.config, f"blk.{number}.", {}
        width, dim, heads, kv_heads = self.width, self.dim, self.heads, self.kv_heads
        rows = {"attn_q": heads * dim, "attn_k": kv_heads * dim, "attn_v": kv_heads * dim}
        inputs = self.matrices(weights, block, "attn_qkv", {"q": "attn_q", "k": "attn_k", "v": "attn_v"}, rows)
        self.matrix(weights, "out", [f"{block}attn_output"], [width], heads * dim)
        self.norm(weights, "attn_norm", f"{block}attn_norm", width)
        sandwich = "pre_feedforward_layernorm" in self.family.block
        self.norm(weights, "ffn_norm", block + ("ffn_norm" if sandwich else self.family.block["post_attention_layernorm"]),
                  width)
        if sandwich:
            self.norm(weights, "attn_post_norm", f"{block}post_attention_norm", width)
            self.norm(weights, "ffn_post_norm", f"{block}post_ffw_norm", width)
        if "self_attn.q_norm" in self.family.block:
            self.qk_norm(weights, block)
        if "self_attn.sinks" in self.family.block:
            weights["sinks"] = self.packer.dense(f"{block}attn_sinks.weight", (heads,), torch.float32)
        experts = config["num_experts"] if "mlp.experts" in self.family.block else 0
        ff = self.experts(weights, block, experts) if experts else self.feed_forward(weights, block)
        shared = self.shared(weights, block) if "mlp.shared_expert_gate" in self.family.block else ()
        windowed = kind == "sliding_attention" or self.model in ("phi3", "starcoder2")
        kind = "clamped" if self.family.experts == "clamped" else "gelu" if self.model.startswith(("gemma", "star")) else "silu"
        return weights, LayerShape(
            heads=heads, kv_heads=kv_heads, head_dim=dim, pairs=bool(self.family.interleaved), dtype=self.packer.dtype,
            turned=int(dim * config["rope_parameters"].get("partial_rotary_factor", 1.0)),
            scale=(config.get("query_pre_attn_scalar") or dim) ** -0.5, inputs=inputs, ff=ff, shared=shared,
            # Gemma 3's files may name a cap that its attention does not use.
            softcap=config["attn_logit_softcapping"] if self.model == "gemma2" else 0.0,
            window=config.get("sliding_window") or 0 if windowed else 0, activation=kind, gated=self.model != "starcoder2",
            experts=experts, used=config["num_experts_per_tok"] if experts else 0,
            normalized=config.get("norm_topk_prob", True))

    def ends(self, vocabulary: int) -> tuple[Packed, dict]:
        """The embedding, and the head: the embedding again where the file has no output matrix."""
        tied, shape, head = "output.weight" not in self.tensors, (vocabulary, self.width), {}
        embedding = self.packer.embedding(shape, tied)
        head["output"] = embedding if tied else self.packer.packed(("output.weight",), (shape,))
        if "output.bias" in self.tensors:
            head["output.bias"] = self.packer.dense("output.bias", (vocabulary,))
        self.norm(head, "norm", "output_norm", self.width)
        return embedding, head

    def feed_forward(self, weights: dict, block: str) -> tuple[str, ...]:
        ff = self.config["intermediate_size"]
        self.matrix(weights, "down", [f"{block}ffn_down"], [self.width], ff)
        if self.model in ("phi3", "starcoder2"):        # Phi-3's ffn_up holds both, StarCoder 2 has no gate
            name = "gate_up" if self.model == "phi3" else "up"
            self.matrix(weights, name, [f"{block}ffn_up"], [2 * ff if self.model == "phi3" else ff], self.width)
            return (name,)
        return self.matrices(weights, block, "", {"gate": "ffn_gate", "up": "ffn_up"}, {"ffn_gate": ff, "ffn_up": ff})

    def experts(self, weights: dict, block: str, count: int) -> tuple[str, ...]:
        width, ff = self.width, self.config.get("moe_intermediate_size") or self.config["intermediate_size"]
        self.router(weights, "router", f"{block}ffn_gate_inp", count)
        names = ("gate_up",) if f"{block}ffn_gate_up_exps.weight" in self.tensors else ("gate", "up")
        shapes = {"gate_up": (count, 2 * ff, width), "gate": (count, ff, width), "up": (count, ff, width),
                  "down": (count, width, ff)}
        for name in (*names, "down"):
            stem = f"{block}ffn_{name}_exps"
            stack = self.packer.packed((f"{stem}.weight",), (shapes[name],))
            weights[f"{name}.experts"] = tuple(stack[expert] for expert in range(count))
            if f"{stem}.bias" in self.tensors:
                weights[f"{name}.experts.bias"] = self.packer.dense(f"{stem}.bias", shapes[name][:2])
        return names

    def shared(self, weights: dict, block: str) -> tuple[str, ...]:
        ff = self.config["shared_expert_intermediate_size"]
        self.router(weights, "shared_gate", f"{block}ffn_gate_inp_shexp", 1)
        self.matrix(weights, "down_shared", [f"{block}ffn_down_shexp"], [self.width], ff)
        rows = {"ffn_gate_shexp": ff, "ffn_up_shexp": ff}
        return self.matrices(weights, block, "", {"gate_shared": "ffn_gate_shexp", "up_shared": "ffn_up_shexp"}, rows)

    def router(self, weights: dict, name: str, stem: str, rows: int) -> None:
        weights[name] = self.packer.dense(f"{stem}.weight", (rows, self.width), torch.float32)
        if f"{stem}.bias" in self.tensors:
            weights[f"{name}.bias"] = self.packer.dense(f"{stem}.bias", (rows,), torch.float32)

    def matrices(self, weights: dict, block: str, whole: str, parts: dict[str, str], rows: dict[str, int]) -> tuple[str, ...]:
        """Matrices with the layer's width as input, fused as far as neighbours' formats agree (`whole`: the name of one that
        the file may hold fused); the names they have in `weights`. parts: name -> tensor, rows: of the tensors."""
        if whole and f"{block}{whole}.weight" in self.tensors:
            groups = [[*parts]]
            self.matrix(weights, _name(groups[0]), [f"{block}{whole}"], [sum(rows.values())], self.width)
            return (_name(groups[0]),)
        groups = []
        for part, stem in parts.items():
            before = parts[groups[-1][-1]] if groups else ""
            if before and self.packer.strategy == "fast" and self.alike(f"{block}{before}.weight", f"{block}{stem}.weight"):
                groups[-1].append(part)
            else:
                groups.append([part])
        for group in groups:
            stems = [parts[part] for part in group]
            self.matrix(weights, _name(group), [f"{block}{stem}" for stem in stems], [rows[stem] for stem in stems], self.width)
        return tuple(_name(group) for group in groups)

    def alike(self, one: str, other: str) -> bool:
        source = self.tensors.source
        return one in source and other in source and source.type(one) == source.type(other)

    def matrix(self, weights: dict, name: str, stems: list[str], rows: list[int], cols: int) -> None:
        """A matrix of the rows of several tensors, and its bias where any of them has one."""
        weights[name] = self.packer.packed(tuple(f"{stem}.weight" for stem in stems), tuple((many, cols) for many in rows))
        biases = [f"{stem}.bias" for stem in stems]
        if any(bias in self.tensors for bias in biases):
            found = [self.packer.dense(bias, (many,)) if bias in self.tensors else
                     torch.zeros(many, dtype=self.packer.dtype, device=self.packer.device)
                     for bias, many in zip(biases, rows, strict=True)]
            weights[f"{name}.bias"] = torch.cat(found)

    def norm(self, weights: dict, name: str, stem: str, size: int) -> None:
        """As `layers.norm` wants it."""
        weight, eps = self.packer.dense(f"{stem}.weight", (size,), torch.float32), self.eps
        if f"{stem}.bias" in self.tensors:
            weights[name], weights[f"{name}.eps"] = weight, eps
            weights[f"{name}.bias"] = self.packer.dense(f"{stem}.bias", (size,), torch.float32)
        elif weight.device.type != "cpu":
            weights[name], weights[f"{name}.eps"] = weight, float(eps)
        else:
            weights[name] = weight * size ** 0.5
            weights[f"{name}.eps"] = torch.tensor((size * eps) ** 0.5, device=weight.device)

    def qk_norm(self, weights: dict, block: str) -> None:
        """Q's and K's norms side by side, [heads + kv_heads, head_dim]."""
        parts = []
        for stem, count in (("attn_q_norm", self.heads), ("attn_k_norm", self.kv_heads)):
            self.norm(weights, "qk_norm", f"{block}{stem}", self.dim)
            parts.append(weights["qk_norm"].expand(count, -1))
        weights["qk_norm"] = torch.cat(parts)


def _name(parts: list[str]) -> str:
    """"qkv" of q, k and v; "gate_up" of gate and up."""
    return ("" if len(parts[0]) == 1 else "_").join(parts)
