"""Tiny models of every architecture that runs packed: random weights in transformers' own class, and the GGUF that llama.cpp's
converter would write of them, put together here by hand (independent of llmlab.runtime) and quantized by gguf-py.

The reference of a GGUF is the same class in float32 with the weights as gguf-py dequantizes them.
"""

import math
from dataclasses import dataclass, field

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 320
_BASE = {"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}
_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 40 for i in range(32)],
         "long_factor": [1.0 + i / 4 for i in range(32)], "original_max_position_embeddings": 64}
_MILLION = {"rope_type": "default", "rope_theta": 1e6}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


@dataclass(frozen=True)
class Case:
    """`model_type` and fields of transformers' configuration, the GGUF architecture, keys that say it in GGUF's words."""

    architecture: str
    model_type: str
    fields: dict = field(default_factory=dict)
    keys: dict = field(default_factory=dict)


CASES = {
    "llama": Case("llama", "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "llama-tied": Case("llama", "llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-biased": Case("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": Case("llama", "llama", {"head_dim": 96}),
    "llama3": Case("llama", "llama", {"rope_parameters": _LLAMA3}, {"rope.freq_base": 500000.0}),
    "llama-linear": Case("llama", "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0}},
                         {"rope.freq_base": 100000.0, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "llama-yarn": Case("llama", "llama", {"rope_parameters": _YARN}, {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}),
    "mixtral": Case("llama", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _MILLION},
                    {"rope.freq_base": 1e6}),
    "qwen2": Case("qwen2", "qwen2", {"rope_parameters": _MILLION}, {"rope.freq_base": 1e6}),
    "qwen2moe": Case("qwen2moe", "qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 320, "norm_topk_prob": False},
                     {"expert_feed_forward_length": 256, "expert_shared_feed_forward_length": 320}),
    "qwen3": Case("qwen3", "qwen3", {"head_dim": 128, "tie_word_embeddings": True, "rope_parameters": _MILLION},
                  {"rope.freq_base": 1e6}),
    "qwen3moe": Case("qwen3moe", "qwen3_moe", {**_MOE, "head_dim": 64, "norm_topk_prob": True},
                     {"expert_feed_forward_length": 256}),
    "gemma": Case("gemma", "gemma", {"head_dim": 64, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "gemma2": Case("gemma2", "gemma2", {
        "head_dim": 64, "num_hidden_layers": 4, "sliding_window": 8, "query_pre_attn_scalar": 64, "tie_word_embeddings": True,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
                   {"attention.sliding_window": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    "gemma3": Case("gemma3", "gemma3_text", {
        "head_dim": 64, "num_hidden_layers": 7, "sliding_window": 8, "query_pre_attn_scalar": 64, "tie_word_embeddings": True,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        {"attention.sliding_window": 8, "rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}),
    "phi3": Case("phi3", "phi3", {"num_key_value_heads": 4}, {"rope.scaling.original_context_length": 512,
                                                               "attention.sliding_window": 0}),
    "phi3-longrope": Case("phi3", "phi3", {"rope_parameters": _LONG, "original_max_position_embeddings": 64}, {
        "rope.scaling.type": "longrope", "rope.scaling.original_context_length": 64, "attention.sliding_window": 0,
        "rope.scaling.attn_factor": math.sqrt(1 + math.log(8) / math.log(64))}),
    "phi3-partial": Case("phi3", "phi3", {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}, {
        "rope.dimension_count": 48, "rope.scaling.original_context_length": 512, "attention.sliding_window": 0}),
    "starcoder2": Case("starcoder2", "starcoder2", {"use_bias": True, "norm_epsilon": 1e-5, "tie_word_embeddings": True,
                                                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
                       {"rope.freq_base": 1e5, "attention.layer_norm_epsilon": 1e-5}),
    "gpt-oss": Case("gpt-oss", "gpt_oss", {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 8, "intermediate_size": 256,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 128,
                            "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}},
        {"rope.freq_base": 150000.0, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "attention.sliding_window": 8,
         "rope.scaling.original_context_length": 128, "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
         "expert_feed_forward_length": 256}),
}

ARCHITECTURES = sorted({case.architecture for case in CASES.values()})

MIXES = {  # tensor name without the block -> type; "" the rest
    "F32": {"": "F32"},
    "F16": {"": "F16"},
    "Q8_0": {"": "Q8_0"},
    "few": {"": "Q4_0", "attn_v": "BF16", "ffn_down": "Q6_K"},      # nibbles, numbers, bytes with groups of 16
    "small": {"": "Q4_1", "ffn_down": "Q6_K"},      # scales in halves of words; two planes, scales in bytes
    "mixed": {"": "Q8_0", "attn_q": "Q4_0", "attn_k": "Q5_1", "attn_v": "BF16", "ffn_down": "Q6_K", "ffn_up": "Q4_K",
              "ffn_gate": "Q5_0", "token_embd": "Q6_K", "ffn_gate_exps": "MXFP4", "ffn_up_exps": "MXFP4",
              "ffn_down_exps": "Q4_1", "output": "Q4_1", "attn_qkv": "Q4_K"},
}


def config_of(case: Case, **changes):
    return AutoConfig.for_model(case.model_type, **{**_BASE, **case.fields, **changes})


def random_model(case: Case, seed: int = 0, **changes):
    """transformers' own class with weights that make every part matter: attention peaks, norms differ from one."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(case, **changes), dtype=torch.float32).eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            around = 0.0 if case.model_type.startswith("gemma") else 1.0
            p.data = around + 0.2 * torch.randn_like(p) if name.endswith("weight") else 0.2 * torch.randn_like(p)
        elif p.ndim == 1:
            p.data = 0.3 * torch.randn_like(p)
        elif "embed_tokens" in name:
            p.data = 0.7 * torch.randn_like(p) / (16 if case.model_type.startswith("gemma") else 1)
        else:
            inner = p.shape[-2] if case.model_type == "gpt_oss" and "experts" in name and p.ndim == 3 else p.shape[-1]
            p.data = (0.3 if p.ndim == 2 and name.endswith("proj_bias") else 1.6 / math.sqrt(inner)) * torch.randn_like(p)
    return model


# ---- from transformers' tensors to a GGUF's and back ---------------------------------------------------------

_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "mlp.gate_proj": "ffn_gate",
          "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
          "mlp.gate_up_proj": "ffn_up", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
          "mlp.router": "ffn_gate_inp", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
          "input_layernorm": "attn_norm", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
          "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
          "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "pre_feedforward_layernorm": "ffn_norm",
          "post_feedforward_layernorm": "post_ffw_norm", "self_attn.sinks": "attn_sinks"}


def _permute(w: np.ndarray, heads: int) -> np.ndarray:
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _pieces(case: Case, config, name: str):
    """[(GGUF name, transformers' array -> GGUF's, (transformers' array, GGUF's) -> transformers' anew)] of one tensor."""
    same = (lambda a: a, lambda a, g: g)
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
           "model.norm.bias": "output_norm.bias", "lm_head.weight": "output.weight"}
    gemma = case.model_type.startswith("gemma")
    shift = (lambda a: a + 1, lambda a, g: g - 1) if gemma and name.endswith("norm.weight") else same
    if name in top:
        return [(top[name], *shift)]
    _, _, layer, rest = name.split(".", 3)
    block = f"blk.{layer}."
    if rest.startswith("mlp.experts."):
        return [(block + part, *ways) for part, *ways in _experts(case, rest.removeprefix("mlp.experts."))]
    stem, _, end = rest.rpartition(".")
    if end not in ("weight", "bias"):
        return [(block + _NAMES[rest] + ".weight", *same)]
    if stem == "post_attention_layernorm":
        stem = "post_attention_norm" if case.model_type in ("gemma2", "gemma3_text", "gpt_oss") else "ffn_norm"
    else:
        stem = _NAMES[stem]
    if stem == "ffn_gate_inp_shexp":
        return [(f"{block}{stem}.weight", lambda a: a[0], lambda a, g: g[None])]
    if case.architecture == "llama" and stem in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if stem == "attn_q" else config.num_key_value_heads
        return [(f"{block}{stem}.{end}", lambda a: _permute(a, heads), lambda a, g: _unpermute(g, heads))]
    return [(f"{block}{stem}.{end}", *(shift if stem.endswith("norm") else same))]


def _experts(case: Case, name: str):
    same = (lambda a: a, lambda a, g: g)

    def put(index):
        def back(a, g):
            a = a.copy()
            a[index] = g
            return a
        return back

    if case.model_type != "gpt_oss":
        if name == "down_proj":
            return [("ffn_down_exps.weight", *same)]
        return [("ffn_gate_exps.weight", lambda a: a[:, :a.shape[1] // 2], lambda a, g: put(np.s_[:, :a.shape[1] // 2])(a, g)),
                ("ffn_up_exps.weight", lambda a: a[:, a.shape[1] // 2:], lambda a, g: put(np.s_[:, a.shape[1] // 2:])(a, g))]
    if name == "down_proj":
        return [("ffn_down_exps.weight", lambda a: a.swapaxes(1, 2), lambda a, g: g.swapaxes(1, 2))]
    if name == "down_proj_bias":
        return [("ffn_down_exps.bias", *same)]
    end = "bias" if name.endswith("bias") else "weight"
    turn = (lambda a: a) if end == "bias" else (lambda a: a.swapaxes(1, 2))
    return [(f"ffn_gate_exps.{end}", lambda a: turn(a[..., ::2]), lambda a, g: put(np.s_[..., ::2])(a, turn(g))),
            (f"ffn_up_exps.{end}", lambda a: turn(a[..., 1::2]), lambda a, g: put(np.s_[..., 1::2])(a, turn(g)))]


def _random_k(shape: tuple[int, ...], type: str, rng) -> np.ndarray:
    """Blocks of a k-quant, which gguf-py cannot make: random codes under scales that give weights of about 0.1."""
    kind = gguf.GGMLQuantizationType[type]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (math.prod(shape) // block, size), dtype=np.uint8)
    half = np.float16(1.6 / math.sqrt(shape[-1]) / {"Q4_K": 230, "Q6_K": 1350}[type] * np.ones(len(raw)))
    if type == "Q4_K":
        raw[:, 0:2] = half.view(np.uint8).reshape(-1, 2)
        raw[:, 2:4] = (half * np.float16(7.5)).view(np.uint8).reshape(-1, 2)
    else:
        raw[:, -2:] = half.view(np.uint8).reshape(-1, 2)
    return raw.reshape(*shape[:-1], -1)


def _stored(name: str, values: np.ndarray, mix: dict, rng) -> tuple[str, np.ndarray, np.ndarray]:
    """(type, bytes or numbers as gguf-py writes them, the numbers they stand for)."""
    bare = name.removesuffix(".weight").rpartition(".")[2] if name.startswith("blk.") else name.removesuffix(".weight")
    if values.ndim == 1 or not name.endswith(".weight") or bare in ("ffn_gate_inp",):
        return "F32", values.astype(np.float32), values.astype(np.float32)
    type = mix.get(bare, mix[""])
    if type in ("F32", "F16"):
        data = values.astype(np.float32 if type == "F32" else np.float16)
        return type, data, data.astype(np.float32)
    kind = gguf.GGMLQuantizationType[type]
    if values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind, type = gguf.GGMLQuantizationType.Q8_0, "Q8_0"
    if type.endswith("_K"):
        data = _random_k(values.shape, type, rng)
    else:
        data = gguf.quants.quantize(np.ascontiguousarray(values), kind)
    return type, data, gguf.quants.dequantize(data, kind)


def make(name: str, path, mix: str = "mixed", seed: int = 0, extra: dict | None = None, **changes):
    """Write the GGUF of a case; returns the reference model, whose weights are those of the file."""
    case = CASES[name]
    model = random_model(case, seed, **changes)
    config, rng = model.config, np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, case.architecture)
    for key, value in {**_metadata(case, config), **case.keys, **(extra or {})}.items():
        _add(writer, f"{case.architecture}.{key}", value)
    writer.add_tokenizer_model("no_vocab")
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    state, anew = model.state_dict(), {}
    for tensor, value in state.items():
        if tensor == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.numpy()
        for stem, there, back in _pieces(case, config, tensor):
            type, data, numbers = _stored(stem, there(array), MIXES[mix], rng)
            writer.add_tensor(stem, np.ascontiguousarray(data), raw_dtype=None if data.dtype != np.uint8 else
                              gguf.GGMLQuantizationType[type])
            array = np.ascontiguousarray(back(array, numbers))
        anew[tensor] = torch.from_numpy(array)
    for stem, values in _rope_tensors(config):
        writer.add_tensor(stem, np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(anew, strict=False, assign=True)
    model.tie_weights()
    return model


def _rope_tensors(config):
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", rope["long_factor"]
        yield "rope_factors_short.weight", rope["short_factor"]
    if rope.get("rope_type") == "llama3":
        dim, low, high = config.head_dim, rope["low_freq_factor"], rope["high_freq_factor"]
        old, factors = rope["original_max_position_embeddings"], []
        for i in range(0, dim, 2):
            length = 2 * math.pi * rope["rope_theta"] ** (i / dim)
            if length < old / high:
                factors.append(1.0)
            elif length > old / low:
                factors.append(rope["factor"])
            else:
                smooth = (old / length - low) / (high - low)
                factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
        yield "rope_freqs.weight", factors


def _metadata(case: Case, config) -> dict:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {"block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
             "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size, "vocab_size": VOCAB,
             "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
             "rope.dimension_count": head_dim, "rope.freq_base": 10000.0,
             "attention.key_length": head_dim, "attention.value_length": head_dim}
    if case.model_type != "starcoder2":
        found["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        found |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
    return found


def _add(writer, key: str, value) -> None:
    if isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, (list, tuple)):
        writer.add_array(key, list(value))
    else:
        writer.add_uint32(key, value)


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """The largest Kullback-Leibler divergence of any position, in nats, in float64. reference, logits [..., vocabulary]."""
    p, q = (torch.log_softmax(x.double(), -1) for x in (reference, logits))
    return float((p.exp() * (p - q)).sum(-1).max())
