"""The keys that say what a model is made of, from its configuration: those that the converter writes, family by family."""

from collections.abc import Mapping
from typing import Any

from ..errors import BadConfig
from ..gguf.words import show

_KINDS = {"linear", "yarn", "default", "llama3", None}


def hyperparameters(architecture: str, fields: Mapping[str, Any], spec_vocab: int, shown: str) -> dict[str, Any]:
    """Keys with the architecture's prefix, values as `write_gguf` takes them. `fields`: transformers' configuration of the text
    model as a dict. Raises BadConfig for one that is not carried over."""
    f = fields
    found = {"block_count": f["num_hidden_layers"], "context_length": f["max_position_embeddings"],
             "embedding_length": f["hidden_size"], "feed_forward_length": f["intermediate_size"],
             "attention.head_count": f["num_attention_heads"],
             "attention.head_count_kv": f.get("num_key_value_heads") or f["num_attention_heads"]}
    if architecture not in ("gemma", "gemma2"):      # llama.cpp knows these two's rope without being told
        found |= _rope(f, shown)
    else:
        _check_plain_rope(f, shown)
    found["attention.layer_norm_rms_epsilon"] = float(f["rms_norm_eps"])
    if experts := f.get("num_local_experts") or f.get("num_experts"):
        found |= {"expert_count": experts, "expert_used_count": f["num_experts_per_tok"]}
    if f.get("head_dim"):
        found |= {"attention.key_length": f["head_dim"], "attention.value_length": f["head_dim"]}
    found |= _OWN.get(architecture, lambda fields, vocab: {})(f, spec_vocab)
    return {f"{architecture}.{key}": value for key, value in found.items() if value is not None}


def _llama(f: Mapping[str, Any], vocab: int) -> dict[str, Any]:
    return {"vocab_size": vocab, "rope.dimension_count": f.get("head_dim") or f["hidden_size"] // f["num_attention_heads"]}


def _moe(f: Mapping[str, Any], vocab: int) -> dict[str, Any]:
    return {"expert_feed_forward_length": f.get("moe_intermediate_size"),
            "expert_shared_feed_forward_length": f.get("shared_expert_intermediate_size")}


def _gemma2(f: Mapping[str, Any], vocab: int) -> dict[str, Any]:
    return {"attn_logit_softcapping": _real(f["attn_logit_softcapping"]),
            "final_logit_softcapping": _real(f["final_logit_softcapping"]), "attention.sliding_window": f["sliding_window"]}


def _gemma3(f: Mapping[str, Any], vocab: int) -> dict[str, Any]:
    return {"final_logit_softcapping": _real(f.get("final_logit_softcapping") or None),
            "attention.sliding_window": f["sliding_window"] if f.get("sliding_window_pattern") != 1 else None}


_OWN = {"llama": _llama, "qwen2moe": _moe, "qwen3moe": _moe, "gemma2": _gemma2, "gemma3": _gemma3}


def _real(value: Any) -> float | None:
    return None if value is None else float(value)


def _rope(f: Mapping[str, Any], shown: str) -> dict[str, Any]:
    """How positions turn, of layers that see everything; Gemma 3's others have a base of their own."""
    every = f.get("rope_parameters") or {}
    rope = every.get("full_attention", every)
    kind, found = _kind(rope, shown), {}
    if kind in ("linear", "yarn"):
        found = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        found |= {f"rope.scaling.yarn_{ours}": float(rope[theirs]) for ours, theirs in (
            ("attn_factor", "attention_factor"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow"))
            if rope.get(theirs) is not None}
    found["rope.freq_base"] = _real(rope.get("rope_theta"))
    found["rope.freq_base_swa"] = _real((every.get("sliding_attention") or {}).get("rope_theta"))
    return found


def _kind(rope: Mapping[str, Any], shown: str) -> str | None:
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in _KINDS:
        raise BadConfig(f"{shown} scales positions by {show(str(kind))}, which llmlab does not convert; convert it with "
                        "llama.cpp's convert_hf_to_gguf.py and give the GGUF")
    return kind


def _check_plain_rope(f: Mapping[str, Any], shown: str) -> None:
    rope = f.get("rope_parameters") or {}
    if _kind(rope, shown) not in (None, "default") or float(rope.get("rope_theta") or 10000) != 10000:
        raise BadConfig(f"{shown} turns positions otherwise than {f.get('model_type')} does, and a GGUF of that family has no "
                        "key for it")
