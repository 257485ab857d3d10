"""What each GGUF architecture is called in transformers, and which tensor is which module's: one entry an architecture.

To add one: a function from the file's keys to the fields of transformers' configuration, and a `Family` in FAMILIES. What
llama.cpp's converter changes on the way (conversion/*.py) is undone by a field of the entry: rows of Q and K that are
interleaved, norm weights with 1 added. Keys follow llama.cpp's loaders (src/models/*.cpp), read at the version of
llama-cpp-python 0.3.36.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LabError
from . import rope
from .keys import Keys

Read = Callable[[str], torch.Tensor | None]      # a small tensor's numbers, None where the file lacks it


@dataclass(frozen=True)
class Family:
    """One GGUF architecture.

    `model_type` is transformers'. `config` gives the fields of its configuration. `block` maps modules and parameters of a
    transformers layer to the names of a GGUF block's tensors (without .weight and .bias). `interleaved`: modules whose rows
    the converter interleaved for llama.cpp's rope. `norm_shift`: what the converter added to the norms' weights. `experts`:
    what an expert computes, "swiglu" or "clamped" (gpt-oss).
    """

    model_type: str
    config: Callable[[Keys, Read], dict[str, Any]]
    block: dict[str, str]
    interleaved: tuple[str, ...] = ()
    norm_shift: float = 0.0
    experts: str = "swiglu"


TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ATTENTION = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
              "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
_DENSE = {"post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
          "mlp.down_proj": "ffn_down"}
_MOE = {"post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp", "mlp.experts": "ffn_{}_exps"}
_QK_NORM = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_SHARED = {"mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
           "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp"}
_SANDWICH = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
             "post_feedforward_layernorm": "post_ffw_norm"}
_QK = ("self_attn.q_proj", "self_attn.k_proj")


def common(keys: Keys, read: Read, partial: bool = False) -> dict[str, Any]:
    """The fields every configuration has. `partial`: whether rope may turn a part of each head only."""
    width, heads = keys.number("embedding_length", high=2**24), keys.number("attention.head_count", high=65536)
    kv_heads = keys.number("attention.head_count_kv", heads, high=65536)
    if heads % kv_heads:
        raise keys.bad("attention.head_count_kv", kv_heads, f"a divisor of {heads} heads")
    head_dim = keys.number("attention.key_length", width // heads or 1, high=65536)
    if (other := keys.number("attention.value_length", head_dim)) != head_dim:
        raise keys.bad("attention.value_length", other, f"{head_dim}, the length of the keys")
    return {"hidden_size": width, "num_hidden_layers": keys.number("block_count", high=1024), "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": head_dim,
            "intermediate_size": keys.number("feed_forward_length", low=0),
            "max_position_embeddings": keys.number("context_length", high=2**40),
            "rope_parameters": rope.parameters(keys, head_dim, partial)}


def _rms(keys: Keys) -> dict[str, Any]:
    return {"rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon")}


def _llama(keys: Keys, read: Read) -> dict[str, Any]:
    biased = {"attention_bias": read("blk.0.attn_q.bias") is not None, "mlp_bias": read("blk.0.ffn_up.bias") is not None}
    return {**common(keys, read), **_rms(keys), **biased}


def _experts(keys: Keys) -> dict[str, Any]:
    count = keys.number("expert_count", high=65536)
    return {"num_experts_per_tok": keys.number("expert_used_count", high=count), "num_local_experts": count,
            "num_experts": count}


def _mixtral(keys: Keys, read: Read) -> dict[str, Any]:
    return {**common(keys, read), **_rms(keys), **_experts(keys)}


def _qwen(keys: Keys, read: Read) -> dict[str, Any]:
    return {**common(keys, read), **_rms(keys)}


def _qwen_moe(keys: Keys, read: Read) -> dict[str, Any]:
    """Qwen3's experts' weights are made to sum to one and Qwen2's are not; the files do not say it."""
    normalized = bool(keys.raw("expert_weights_norm", keys.architecture == "qwen3moe"))
    found = {**common(keys, read), **_rms(keys), **_experts(keys), "norm_topk_prob": normalized}
    found["moe_intermediate_size"] = keys.number("expert_feed_forward_length", found["intermediate_size"])
    if keys.architecture == "qwen2moe":
        gate = read("blk.0.ffn_gate_shexp.weight") if not keys.has("expert_shared_feed_forward_length") else None
        found["shared_expert_intermediate_size"] = gate.shape[0] if gate is not None else keys.number(
            "expert_shared_feed_forward_length")
    return found


def _windows(keys: Keys, layers: int, period: int, window: int = 0) -> dict[str, Any]:
    """Which layers look only `sliding_window` tokens back: the file's list, or all but the last of each `period`."""
    window = keys.number("attention.sliding_window", window, low=0, high=2**40)
    pattern = keys.raw("attention.sliding_window_pattern")
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        period, pattern = pattern, None
    if pattern is None:
        pattern = [period and (i + 1) % period for i in range(layers)]
    if not isinstance(pattern, (tuple, list)) or len(pattern) < layers:
        raise keys.bad("attention.sliding_window_pattern", pattern, f"a list of {layers} layers")
    slides = [bool(p) and bool(window) for p in pattern[:layers]]
    # Without a window one as long as the context: transformers makes its mask even where no layer uses it.
    return {"sliding_window": window or keys.number("context_length", high=2**40),
            "layer_types": ["sliding_attention" if s else "full_attention" for s in slides]}


def _gemma(keys: Keys, read: Read) -> dict[str, Any]:
    """All of Gemma. The 27B models of 2 and 3 divide attention by their width per head, not by the length of a key (llama.cpp
    knows them by their blocks, as nothing in the file says it)."""
    found = {**common(keys, read), **_rms(keys)}
    largest = found["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}.get(keys.architecture)
    found["query_pre_attn_scalar"] = found["hidden_size"] // found["num_attention_heads"] if largest else found["head_dim"]
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        found[name] = keys.real(name) if keys.has(name) else None
    found["hidden_activation"] = "gelu_pytorch_tanh"
    return found


def _gemma2(keys: Keys, read: Read) -> dict[str, Any]:
    found = _gemma(keys, read)
    found["attn_logit_softcapping"] = found["attn_logit_softcapping"] or 50.0      # llama.cpp's defaults, the paper's
    found["final_logit_softcapping"] = found["final_logit_softcapping"] or 30.0
    return {**found, **_windows(keys, found["num_hidden_layers"], 2, 4096)}


def _gemma3(keys: Keys, read: Read) -> dict[str, Any]:
    found = {**_gemma(keys, read), **_windows(keys, keys.number("block_count", high=1024), 6)}
    local = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base_swa", 10000.0)}      # never scaled
    found["rope_parameters"] = {"full_attention": found["rope_parameters"], "sliding_attention": local}
    return found


def _phi3(keys: Keys, read: Read) -> dict[str, Any]:
    found = {**common(keys, read, partial=True), **_rms(keys)}
    if found.pop("head_dim") * found["num_attention_heads"] != found["hidden_size"]:
        raise keys.bad("attention.head_count", found["num_attention_heads"], "the width divided by the length of a key")
    found["rope_parameters"] |= rope.longrope(keys, read)
    found["original_max_position_embeddings"] = keys.number(
        "rope.scaling.original_context_length", found["max_position_embeddings"], high=2**40)
    window = keys.number("attention.sliding_window", 0, low=0, high=2**40)
    return {**found, "sliding_window": window or None}


def _starcoder2(keys: Keys, read: Read) -> dict[str, Any]:
    found = common(keys, read)
    if found.pop("head_dim") * found["num_attention_heads"] != found["hidden_size"]:
        raise keys.bad("attention.head_count", found["num_attention_heads"], "the width divided by the length of a key")
    window = keys.number("attention.sliding_window", 0, low=0, high=2**40)
    return {**found, "norm_epsilon": keys.real("attention.layer_norm_epsilon"), "use_bias": True,
            "sliding_window": window or None}


def _gpt_oss(keys: Keys, read: Read) -> dict[str, Any]:
    """transformers keeps YaRN's bounds as OpenAI's code does; llama.cpp rounds them, and the file does not say which."""
    found = {**common(keys, read), **_rms(keys), **_experts(keys)}
    found["intermediate_size"] = keys.number("expert_feed_forward_length", found["intermediate_size"])
    if found["rope_parameters"]["rope_type"] == "yarn":
        found["rope_parameters"]["truncate"] = False
    return {**found, **_windows(keys, found["num_hidden_layers"], 2, 128), "attention_bias": True}


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", _llama, _ATTENTION | _DENSE, _QK),
    "llama with experts": Family("mixtral", _mixtral, _ATTENTION | _MOE, _QK),
    "qwen2": Family("qwen2", _qwen, _ATTENTION | _DENSE),
    "qwen3": Family("qwen3", _qwen, _ATTENTION | _QK_NORM | _DENSE),
    "qwen2moe": Family("qwen2_moe", _qwen_moe, _ATTENTION | _MOE | _SHARED),
    "qwen3moe": Family("qwen3_moe", _qwen_moe, _ATTENTION | _QK_NORM | _MOE),
    "gemma": Family("gemma", _gemma, _ATTENTION | _DENSE, norm_shift=1.0),
    "gemma2": Family("gemma2", _gemma2, _ATTENTION | _DENSE | _SANDWICH, norm_shift=1.0),
    "gemma3": Family("gemma3_text", _gemma3, _ATTENTION | _QK_NORM | _DENSE | _SANDWICH, norm_shift=1.0),
    "phi3": Family("phi3", _phi3, {"input_layernorm": "attn_norm", "self_attn.qkv_proj": "attn_qkv",
                                   "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
                                   "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}),
    "starcoder2": Family("starcoder2", _starcoder2, _ATTENTION | {
        "post_attention_layernorm": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}),
    "gpt-oss": Family("gpt_oss", _gpt_oss, _ATTENTION | {
        "post_attention_layernorm": "post_attention_norm", "self_attn.sinks": "attn_sinks", "mlp.router": "ffn_gate_inp",
        "mlp.experts": "ffn_{}_exps"}, experts="clamped"),
}

_ALSO = {"llama": "Llama, Mistral, Mixtral, CodeLlama, Yi, DeepSeek Coder, TinyLlama, SmolLM2"}


def family_of(keys: Keys) -> Family:
    """The family of a GGUF. Raises LabError naming the architecture and what can be run."""
    name = keys.architecture
    if name == "llama" and keys.raw("expert_count", 0):
        name = "llama with experts"
    if name not in FAMILIES:
        known = ", ".join(f"{a} ({_ALSO[a]})" if a in _ALSO else a for a in FAMILIES if " " not in a)
        raise LabError(f"{keys.file} is a {name!r:.60} model, which llmlab does not run packed; it runs {known}. llama.cpp may "
                       "run this one; for a safetensors folder llmlab.load uses transformers and knows all its models")
    return FAMILIES[name]
