"""A Hugging Face config.json in GGUF's words: what llama.cpp's converter would write for it.

`translate` returns the architecture, its metadata without the architecture prefix, and the traits that
decide which optional tensors exist. Field names are those of transformers' configuration classes; fields
that a saved config leaves out because they equal the class default come from data/config_defaults.json.
"""

from functools import cache
from json import loads

from .architectures import Traits, whole_number
from .errors import BadConfig
from .places import folder

ARCHITECTURES = {  # model_type -> GGUF architecture
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "yi": "llama", "aquila": "llama",
    "mistral3": "mistral3", "ministral3": "mistral3", "ministral": "mistral3",
    "qwen2": "qwen2", "qwen2_moe": "qwen2moe", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
    "qwen2_vl": "qwen2vl", "qwen2_vl_text": "qwen2vl", "qwen2_5_vl": "qwen2vl", "qwen2_5_vl_text": "qwen2vl",
    "qwen3_vl": "qwen3vl", "qwen3_vl_text": "qwen3vl", "qwen3_vl_moe": "qwen3vlmoe", "qwen3_vl_moe_text": "qwen3vlmoe",
    "qwen3_next": "qwen3next", "qwen3_5": "qwen35", "qwen3_5_text": "qwen35",
    "qwen3_5_moe": "qwen35moe", "qwen3_5_moe_text": "qwen35moe",
    "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3", "gemma3_text": "gemma3",
    "gemma3n": "gemma3n", "gemma3n_text": "gemma3n", "gemma4": "gemma4", "gemma4_text": "gemma4",
    "gemma4_unified": "gemma4", "gemma4_unified_text": "gemma4",
    "phi3": "phi3", "phi": "phi2", "granite": "granite", "granitemoe": "granitemoe",
    "granitemoeshared": "granitemoe", "granitemoehybrid": "granitehybrid",
    "gpt_oss": "gpt-oss", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "kimi_k2": "deepseek2",
    "glm4_moe_lite": "deepseek2", "glm4": "glm4", "glm4_moe": "glm4moe", "glm4v_moe": "glm4moe",
    "glm4v_moe_text": "glm4moe", "glm4v": "glm4", "glm4v_text": "glm4", "minimax_m2": "minimax-m2",
    "smollm3": "smollm3", "olmo": "olmo", "olmo2": "olmo2",
    "olmo3": "olmo2", "olmoe": "olmoe", "falcon": "falcon", "cohere": "command-r", "cohere2": "cohere2",
    "nemotron": "nemotron", "nemotron_h": "nemotron_h", "lfm2": "lfm2", "lfm2_moe": "lfm2moe",
    "llama4": "llama4", "llama4_text": "llama4", "starcoder2": "starcoder2", "stablelm": "stablelm",
    "internlm2": "internlm2", "step3p5": "step35", "exaone4": "exaone4", "seed_oss": "seed_oss",
    "ernie4_5": "ernie4_5", "hunyuan_v1_dense": "hunyuan-dense", "arcee": "arcee", "falcon_h1": "falcon-h1",
    "gpt2": "gpt2", "gpt_neox": "gptneox", "mamba": "mamba", "falcon_mamba": "mamba", "mamba2": "mamba2", "jamba": "jamba",
}

_TIED_BY_DEFAULT = {"gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text",
                    "cohere", "cohere2", "gpt2", "lfm2", "lfm2_moe", "mamba", "falcon", "starcoder2"}


_KINDS = {"full_attention", "sliding_attention", "chunked_attention", "linear_attention", "attention", "mamba", "conv", "moe",
          "mlp", "hybrid", "recurrent"}


@cache
def _defaults() -> dict[str, dict]:
    path = folder("data") / "config_defaults.json"
    return loads(path.read_text("utf-8"))["model_types"] if path.exists() else {}


class Config:
    """A config.json with its defaults: reading a field by any of its names, checked to be a sane number."""

    def __init__(self, fields: dict, where: str = "config.json", complete: bool = False):
        if not isinstance(fields, dict):
            raise BadConfig(f"{where} holds {type(fields).__name__}, not a JSON object")
        for inner in ("text_config", "llm_config", "language_config"):
            nested = fields.get(inner)
            if isinstance(nested, dict) and ("hidden_size" in nested or "num_hidden_layers" in nested
                                             or "model_type" in nested):
                outer = {k: fields[k] for k in ("tie_word_embeddings", "torch_dtype", "dtype") if k in fields}
                fields = {**outer, **nested, "model_type": nested.get("model_type") or fields.get("model_type")}
                break
        self.where = where
        self.given = fields
        model_type = fields.get("model_type")
        if not isinstance(model_type, str):
            raise BadConfig(f"{where} has no model_type; is it the config.json of a language model?")
        self.model_type = model_type
        self.defaults = {} if complete else _defaults().get(model_type, {})

    def raw(self, *names: str, default=None):
        """The first field given under one of `names`; else a class default; else `default`. An explicit null is a
        field that is left out on purpose: no class default replaces it."""
        for source in (self.given, self.defaults):
            for name in names:
                if source.get(name) is not None:
                    return source[name]
            if any(name in source for name in names):
                break
        return default

    def number(self, *names: str, default: int | None = None, low: int = 1, high: int = 2**31) -> int:
        """A whole number in [low, high]. Raises BadConfig naming the field."""
        value = self.raw(*names, default=default)
        if value is None:
            raise BadConfig(f"{self.where} has no {names[0]} ({self.model_type})")
        return whole_number(f"{self.where}: {names[0]}", value, low, high)

    def flag(self, *names: str, default: bool = False) -> bool:
        return bool(self.raw(*names, default=default))

    def listed(self, name: str, length: int, of: type = str) -> list | None:
        """A list with one entry a layer, or None where absent. Raises BadConfig on another length."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, (list, tuple, str)) or (of is not str and isinstance(value, str)):
            raise BadConfig(f"{self.where}: {name} is not a list")
        if len(value) < length:
            raise BadConfig(f"{self.where}: {name} has {len(value)} entries for {length} layers")
        return list(value[:length])

    def kinds(self, length: int) -> list[str] | None:
        """layer_types, each a kind that is known. Raises BadConfig."""
        found = self.listed("layer_types", length)
        for kind in found or ():
            if kind not in _KINDS:
                raise BadConfig(f"{self.where}: layer_types holds {kind!r:.60}, which is no kind of layer known here")
        return found


def translate(fields: dict, where: str = "config.json", mtp: bool | None = None,
              complete: bool = False) -> tuple[str, dict, Traits]:
    """(architecture, metadata without prefix, traits) of a config. `complete`: the config leaves no field to its class.

    `mtp`: whether the GGUF holds the multi-token-prediction blocks; None as published files do
    (GLM-4.5 and 4.6 yes, others no). Raises BadConfig with one line naming the field.
    """
    c = Config(fields, where, complete)
    architecture = ARCHITECTURES.get(c.model_type)
    if c.model_type == "granitemoehybrid" and not _has_state(c):
        architecture = "granitemoe" if c.raw("num_local_experts") else "granite"   # no state anywhere: the plain one
    if c.model_type == "nemotron_h" and _has_experts(c):
        architecture = "nemotron_h_moe"
    if architecture is None:
        raise BadConfig(f"{where}: model_type {c.model_type!r:.60} is not known; give a GGUF of the model instead, "
                        "or add a row to llmlab/hf_config.py and llmlab/architectures.py")
    count = _layer_count(c)
    width = c.number("hidden_size", "n_embd", "d_model", "dim", high=2**24)
    kv: dict = {"block_count": count, "embedding_length": width,
                "context_length": c.number("max_position_embeddings", "n_positions", "max_seq_len", default=2048, high=2**40),
                "vocab_size": _vocabulary(c, architecture)}
    if architecture in ("mamba", "mamba2"):
        heads = 0
    else:
        heads = c.number("num_attention_heads", "n_head", "n_heads", high=65536)
    if heads:
        kv_heads = _kv_heads(c, heads)
        head_dim = c.number("head_dim", "attention_head_dim", default=width // heads or 1, high=65536)
        kv |= {"attention.head_count": heads, "attention.head_count_kv": kv_heads, "attention.key_length": head_dim,
               "attention.value_length": head_dim,
               "rope.dimension_count": _rotary(c, head_dim)}
    if not isinstance(c.raw("intermediate_size"), (list, tuple)):
        kv["feed_forward_length"] = c.number("intermediate_size", "n_inner", "ffn_hidden_size", "d_ff",
                                             default=4 * width, low=0)
    _experts(c, architecture, kv)
    _windows(c, architecture, kv, count)
    special = _SPECIAL.get(architecture)
    if special:
        special(c, kv, count)
    blocks = c.number("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", default=0, low=0, high=64)
    if blocks and (architecture == "glm4moe" if mtp is None else mtp):
        kv["block_count"] = count + blocks
        kv["nextn_predict_layers"] = blocks
        for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
            if isinstance(kv[name], tuple):          # such a block attends and feeds forward at once
                kv[name] += (max(kv[name]),) * blocks
    _epsilon(c, kv)
    return architecture, kv, _traits(c, architecture, kv)


def _layer_count(c: Config) -> int:
    if c.model_type == "nemotron_h" and "num_hidden_layers" not in c.given:     # transformers 5 saves the pattern alone
        listed = c.raw("layers_block_type", "hybrid_override_pattern", "layer_types")
        if isinstance(listed, (list, tuple, str)) and 0 < len(listed) <= 1024:
            return len(listed)
    return c.number("num_hidden_layers", "n_layer", "num_layers", "n_layers", high=1024)


def _has_state(c: Config) -> bool:
    """Whether any layer of a Granite 4 is recurrent; all are where the config lists none but has the sizes for it."""
    kinds = c.raw("layer_types", "layers_block_type")
    if kinds is None:
        return c.raw("mamba_n_heads") is not None
    return any(kind in ("mamba", "linear_attention") for kind in kinds)


def _has_experts(c: Config) -> bool:
    """Whether a Nemotron-H has expert layers: its pattern says, whatever the class default of the expert count."""
    return any(kind in ("E", "moe") for kind in c.raw("hybrid_override_pattern", "layers_block_type", "layer_types") or ())


def _vocabulary(c: Config, architecture: str) -> int:
    vocab = c.number("vocab_size", high=2**28)
    if architecture == "gemma3" and vocab == 262208:
        return 262144            # the converter drops the 64 rows that pad the multimodal checkpoints
    return vocab


def _kv_heads(c: Config, heads: int) -> int:
    if c.model_type == "falcon":
        if c.flag("new_decoder_architecture"):
            return c.number("num_kv_heads", "num_key_value_heads", default=heads, high=65536)
        return 1 if c.flag("multi_query", default=True) else heads
    return c.number("num_key_value_heads", "num_kv_heads", "n_head_kv", default=heads, high=65536)


def _rope(c: Config) -> dict:
    """Rope parameters, from the old or the new field; per-layer-kind ones as their full-attention part."""
    rope = c.raw("rope_scaling", "rope_parameters") or {}
    if not isinstance(rope, dict):
        return {}
    return rope.get("full_attention", rope) if isinstance(rope.get("full_attention"), dict) else rope


def _rotary(c: Config, head_dim: int) -> int:
    part = c.raw("partial_rotary_factor", "rotary_pct") or _rope(c).get("partial_rotary_factor") or 1.0
    if not isinstance(part, (int, float)) or not 0 < part <= 1:
        raise BadConfig(f"{c.where}: partial_rotary_factor is {part!r:.40}, expected a number in (0, 1]")
    return max(2, int(head_dim * part))


def _experts(c: Config, architecture: str, kv: dict) -> None:
    n = c.number("n_routed_experts", "num_local_experts", "num_experts", default=0, low=0, high=65536)
    if not n or architecture == "nemotron_h" or (architecture == "gemma4" and not c.flag("enable_moe_block", default=True)):
        return
    ff = c.number("moe_intermediate_size", default=kv["feed_forward_length"])
    kv |= {"expert_count": n,
           "expert_used_count": c.number("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "experts_per_token",
                                         "moe_top_k", default=2, high=n),
           "expert_feed_forward_length": ff}
    shared = c.number("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", default=0, low=0)
    if not shared:
        shared = ff * c.number("n_shared_experts", "num_shared_experts", default=0, low=0, high=1024)
    if architecture == "llama4":
        shared = ff = kv["feed_forward_length"]
        kv["expert_feed_forward_length"] = ff
        kv["feed_forward_length"] = c.number("intermediate_size_mlp", default=ff)
        kv["interleave_moe_layer_step"] = c.number("interleave_moe_layer_step", default=1, high=1024)
    if architecture in ("granitemoe", "granitehybrid"):
        shared = c.number("shared_intermediate_size", default=0, low=0)
    if shared:
        kv["expert_shared_feed_forward_length"] = shared
    lead = c.number("first_k_dense_replace", "num_dense_layers", default=0, low=0, high=1024)
    if lead:
        kv["leading_dense_block_count"] = lead


_PERIOD = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "olmo2": 4, "gemma4": 6, "exaone4": 4}


def _windows(c: Config, architecture: str, kv: dict, count: int) -> None:
    window = c.number("sliding_window", default=0, low=0, high=2**40)
    if architecture == "llama4":
        kv["attention.sliding_window"] = c.number("attention_chunk_size", default=8192)
        return
    if c.raw("use_sliding_window") is False or not window or (architecture == "olmo2" and c.model_type != "olmo3"):
        return
    kv["attention.sliding_window"] = window
    kinds = c.kinds(count)
    if kinds is not None:
        slides = tuple(kind == "sliding_attention" for kind in kinds)
        if not any(slides):
            del kv["attention.sliding_window"]
            return
    elif architecture in _PERIOD:
        period = c.number("sliding_window_pattern", "_sliding_window_pattern", default=_PERIOD[architecture], high=1024)
        slides = tuple(i % period < period - 1 and not (architecture == "gemma4" and i == count - 1) for i in range(count))
    else:
        return
    kv["attention.sliding_window_pattern"] = slides


def _epsilon(c: Config, kv: dict) -> None:
    """Loaders insist on an epsilon; the value does not matter for counting."""
    epsilon = c.raw("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "layer_norm_rms_eps")
    epsilon = epsilon if isinstance(epsilon, (int, float)) else 1e-6
    kv["attention.layer_norm_rms_epsilon"] = kv["attention.layer_norm_epsilon"] = float(epsilon)


# ---- what single architectures add ---------------------------------------------------------------------------

def _deepseek(c: Config, kv: dict, count: int) -> None:
    rank = c.number("kv_lora_rank")
    rope, nope = c.number("qk_rope_head_dim"), c.number("qk_nope_head_dim")
    kv |= {"attention.head_count_kv": 1, "attention.kv_lora_rank": rank, "attention.key_length": rank + rope,
           "attention.value_length": rank, "attention.key_length_mla": nope + rope,
           "attention.value_length_mla": c.number("v_head_dim"), "rope.dimension_count": rope,
           "expert_shared_count": c.number("n_shared_experts", default=0, low=0, high=1024)}
    if q_rank := c.number("q_lora_rank", default=0, low=0):
        kv["attention.q_lora_rank"] = q_rank


def _glm4moe(c: Config, kv: dict, count: int) -> None:
    kv["expert_shared_count"] = c.number("n_shared_experts", default=1, low=0, high=1024)


def _deltanet(c: Config, kv: dict, count: int) -> None:
    values, dim = c.number("linear_num_value_heads"), c.number("linear_value_head_dim")
    kv |= {"ssm.conv_kernel": c.number("linear_conv_kernel_dim"), "ssm.state_size": c.number("linear_key_head_dim"),
           "ssm.group_count": c.number("linear_num_key_heads"), "ssm.time_step_rank": values, "ssm.inner_size": values * dim}
    kinds = c.kinds(count)
    every = c.number("full_attention_interval", default=4, high=1024)
    kv["full_attention_interval"] = every
    if kinds is not None and [k == "full_attention" for k in kinds] != [(i + 1) % every == 0 for i in range(count)]:
        kv["attention.recurrent_layers"] = tuple(k != "full_attention" for k in kinds)


def _granite_hybrid(c: Config, kv: dict, count: int) -> None:
    heads, dim = c.number("mamba_n_heads"), c.number("mamba_d_head", "mamba_head_dim", default=64)
    kinds = c.kinds(count) or c.listed("layers_block_type", count) or ["mamba"] * count
    kv |= {"ssm.conv_kernel": c.number("mamba_d_conv", default=4), "ssm.state_size": c.number("mamba_d_state"),
           "ssm.group_count": c.number("mamba_n_groups", default=1), "ssm.time_step_rank": heads, "ssm.inner_size": heads * dim,
           "attention.head_count_kv": tuple(kv["attention.head_count_kv"] if k in ("attention", "full_attention") else 0
                                            for k in kinds)}
    _granite(c, kv, count)


def _granite(c: Config, kv: dict, count: int) -> None:
    """Granite 4 calls the width of its one MLP "shared" where it has no experts."""
    if c.model_type == "granitemoehybrid" and not kv.get("expert_count"):
        kv["feed_forward_length"] = c.number("shared_intermediate_size", "intermediate_size")


def _nemotron_h(c: Config, kv: dict, count: int) -> None:
    pattern = next((found for name in ("hybrid_override_pattern", "layers_block_type", "layer_types")
                    if (found := c.listed(name, count))), None)
    if pattern is None:
        raise BadConfig(f"{c.where} has no hybrid_override_pattern (nemotron_h)")
    attention = [p in ("*", "attention", "full_attention") for p in pattern]
    feed = [p in ("-", "E", "mlp", "moe") for p in pattern]
    heads, dim = c.number("mamba_num_heads"), c.number("mamba_head_dim")
    ff = kv["expert_feed_forward_length"] if kv.get("expert_count") else kv["feed_forward_length"]
    kv |= {"ssm.conv_kernel": c.number("conv_kernel", default=4), "ssm.state_size": c.number("ssm_state_size"),
           "ssm.group_count": c.number("n_groups", "mamba_n_groups", default=1), "ssm.time_step_rank": heads,
           "ssm.inner_size": heads * dim,
           "attention.head_count_kv": tuple(kv["attention.head_count_kv"] if a else 0 for a in attention),
           "feed_forward_length": tuple(ff if f else 0 for f in feed)}
    if latent := c.number("moe_latent_size", default=0, low=0):
        kv["moe_latent_size"] = latent


def _lfm2(c: Config, kv: dict, count: int) -> None:
    kinds = c.kinds(count)
    if kinds is None:
        full = c.raw("full_attn_idxs", default=range(count))
        kinds = ["full_attention" if i in full else "conv" for i in range(count)]
    kv |= {"shortconv.l_cache": c.number("conv_L_cache", default=3),
           "attention.head_count_kv": tuple(kv["attention.head_count_kv"] if k == "full_attention" else 0 for k in kinds)}
    if c.raw("block_auto_adjust_ff_dim") and c.raw("block_ff_dim", "intermediate_size"):
        ff = int(2 * c.number("block_ff_dim", "intermediate_size") / 3)
        factor = float(c.raw("block_ffn_dim_multiplier") or 1.0)
        if not 0 < factor < 100:
            raise BadConfig(f"{c.where}: block_ffn_dim_multiplier is {factor}, expected a number near 1")
        ff = int(factor * ff)
        step = c.number("block_multiple_of", default=256)
        kv["feed_forward_length"] = step * -(-ff // step)


def _gemma4(c: Config, kv: dict, count: int) -> None:
    sliding_dim = c.number("head_dim")
    slides = kv.get("attention.sliding_window_pattern") or (False,) * count
    special = c.raw("per_layer_config")        # transformers 5 saves what differs in full layers by layer number
    special = next((v for k, v in special.items() if str(k).isdigit() and int(k) < count and not slides[int(k)]
                    and isinstance(v, dict)), {}) if isinstance(special, dict) else {}
    full_dim = whole_number("head_dim", special.get("head_dim") or c.number("global_head_dim", default=sliding_dim), 1, 65536)
    full_kv = whole_number("num_key_value_heads", special.get("num_key_value_heads") or c.number(
        "num_global_key_value_heads", default=kv["attention.head_count_kv"], high=65536), 1, 65536)
    shared = c.number("num_kv_shared_layers", default=0, low=0, high=count)
    kv |= {"attention.key_length": full_dim, "attention.value_length": full_dim, "attention.key_length_swa": sliding_dim,
           "attention.value_length_swa": sliding_dim, "attention.shared_kv_layers": shared,
           "attention.head_count_kv": tuple(kv["attention.head_count_kv"] if s else full_kv for s in slides),
           "rope.dimension_count": full_dim, "rope.dimension_count_swa": sliding_dim}
    if per_layer := c.number("hidden_size_per_layer_input", default=0, low=0):
        kv["embedding_length_per_layer_input"] = per_layer
    if c.flag("attention_k_eq_v"):
        kv["attention.k_eq_v"] = True
    if c.flag("use_double_wide_mlp"):
        ff = kv["feed_forward_length"]
        kv["feed_forward_length"] = tuple(ff if i < count - shared else 2 * ff for i in range(count))


def _gemma3n(c: Config, kv: dict, count: int) -> None:
    if isinstance(c.raw("intermediate_size"), (list, tuple)):
        kv["feed_forward_length"] = tuple(c.listed("intermediate_size", count, of=int))
    kv |= {"embedding_length_per_layer_input": c.number("hidden_size_per_layer_input"),
           "altup.num_inputs": c.number("altup_num_inputs", default=4, low=2, high=64),
           "laurel_rank": c.number("laurel_rank", default=64),
           "attention.shared_kv_layers": c.number("num_kv_shared_layers", default=0, low=0, high=count)}


def _step35(c: Config, kv: dict, count: int) -> None:
    other = c.raw("attention_other_setting") or {}
    slides = kv.get("attention.sliding_window_pattern")
    if isinstance(other, dict) and slides:
        heads, groups = other.get("num_attention_heads"), other.get("num_attention_groups")
        full_heads, full_kv = kv["attention.head_count"], c.number("num_attention_groups", "num_key_value_heads")
        kv["attention.head_count"] = tuple((heads or full_heads) if s else full_heads for s in slides)
        kv["attention.head_count_kv"] = tuple((groups or full_kv) if s else full_kv for s in slides)
    n = c.number("moe_num_experts", "num_experts", default=0, low=0, high=65536)
    if n:
        moe = c.raw("moe_layers_enum")
        first = 3
        if isinstance(moe, str) and moe.split(",")[0].strip().isdigit():
            first = int(moe.split(",")[0])
        kv |= {"expert_count": n, "expert_used_count": c.number("moe_top_k", "num_experts_per_tok", high=n),
               "expert_feed_forward_length": c.number("moe_intermediate_size"), "leading_dense_block_count": first,
               "expert_shared_feed_forward_length": c.number("share_expert_dim", "share_expert_dims")}


def _mamba(c: Config, kv: dict, count: int) -> None:
    inner = c.number("intermediate_size", "d_inner", default=c.number("expand", default=2) * kv["embedding_length"])
    rank = c.raw("time_step_rank", default="auto")
    rank = -(-kv["embedding_length"] // 16) if rank == "auto" else c.number("time_step_rank")
    kv |= {"ssm.conv_kernel": c.number("conv_kernel", "d_conv", default=4), "ssm.inner_size": inner,
           "ssm.state_size": c.number("state_size", "d_state", default=16), "ssm.time_step_rank": rank,
           "feed_forward_length": 0}


def _mamba2(c: Config, kv: dict, count: int) -> None:
    inner = c.number("intermediate_size", "d_inner", default=c.number("expand", default=2) * kv["embedding_length"])
    kv |= {"ssm.conv_kernel": c.number("conv_kernel", default=4), "ssm.inner_size": inner, "feed_forward_length": 0,
           "ssm.state_size": c.number("state_size", default=128), "ssm.group_count": c.number("n_groups", default=8),
           "ssm.time_step_rank": c.number("num_heads", default=inner // c.number("head_dim", default=64))}


def _jamba(c: Config, kv: dict, count: int) -> None:
    width = kv["embedding_length"]
    period, offset = c.number("attn_layer_period", default=8, high=1024), c.number("attn_layer_offset", default=4, low=0)
    rank = c.raw("mamba_dt_rank", default="auto")
    kv |= {"ssm.conv_kernel": c.number("mamba_d_conv", default=4), "ssm.state_size": c.number("mamba_d_state", default=16),
           "ssm.inner_size": c.number("mamba_expand", default=2) * width,
           "ssm.time_step_rank": -(-width // 16) if rank == "auto" else c.number("mamba_dt_rank"),
           "attention.head_count_kv": tuple(kv["attention.head_count_kv"] if i % period == offset else 0 for i in range(count))}
    if kv.get("expert_count", 0) > 1:
        kv["llmlab.expert_period"] = c.number("expert_layer_period", default=2, high=1024)
        kv["llmlab.expert_offset"] = c.number("expert_layer_offset", default=1, low=0)
    else:
        kv.pop("expert_count", None)


def _falcon_h1(c: Config, kv: dict, count: int) -> None:
    heads, dim = c.number("mamba_n_heads"), c.number("mamba_d_head", default=64)
    kv |= {"ssm.conv_kernel": c.number("mamba_d_conv", default=4), "ssm.state_size": c.number("mamba_d_state"),
           "ssm.group_count": c.number("mamba_n_groups", default=1), "ssm.time_step_rank": heads,
           "ssm.inner_size": c.number("mamba_d_ssm", default=heads * dim), "ssm.rms_norm": c.flag("mamba_rms_norm")}


def _plain_dense(c: Config, kv: dict, count: int) -> None:
    """The plain MLP of Phi-2, GPT-2 and GPT-NeoX may leave its width to the class: four times the model's."""
    if not kv["feed_forward_length"]:
        kv["feed_forward_length"] = 4 * kv["embedding_length"]


_SPECIAL = {"deepseek2": _deepseek, "glm4moe": _glm4moe, "qwen3next": _deltanet, "qwen35": _deltanet, "qwen35moe": _deltanet,
            "granitehybrid": _granite_hybrid, "granite": _granite, "nemotron_h": _nemotron_h, "nemotron_h_moe": _nemotron_h,
            "lfm2": _lfm2, "lfm2moe": _lfm2, "gemma4": _gemma4,
            "gemma3n": _gemma3n, "step35": _step35, "mamba": _mamba, "mamba2": _mamba2, "falcon-h1": _falcon_h1,
            "jamba": _jamba, "gpt2": _plain_dense, "phi2": _plain_dense, "gptneox": _plain_dense, "falcon": _plain_dense}


def _traits(c: Config, architecture: str, kv: dict) -> Traits:
    all_biased = c.flag("attention_bias", "use_bias")
    qkv = {"qwen2": True, "qwen2vl": True, "qwen2moe": True, "phi2": True, "gpt2": True, "gptneox": True}.get(
        architecture, c.flag("use_qkv_bias") or c.flag("qkv_bias") or all_biased)
    qkv = qkv or c.model_type in ("glm4v", "glm4v_text")
    if c.model_type == "falcon":
        qkv = c.flag("bias")
    output = architecture in ("phi2", "gpt2", "gptneox") or (
        all_biased and architecture not in ("glm4moe", "seed_oss", "glm4", "qwen2", "qwen2vl", "qwen2moe", "deepseek2"))
    if c.raw("attention_out_bias") is not None:
        output = c.flag("attention_out_bias")
    mlp = architecture in ("phi2", "gpt2", "gptneox") or c.flag("mlp_bias") or (
        architecture in ("starcoder2", "ernie4_5") and c.flag("use_bias", default=architecture == "starcoder2"))
    if architecture == "falcon":
        mlp = output = qkv
    qk = {"qwen3": "head", "qwen3moe": "head", "qwen3vl": "head", "qwen3vlmoe": "head", "gemma3": "head",
          "gemma3n": "head", "gemma4": "head", "olmo2": "full",
          "olmoe": "full", "minimax-m2": "full", "lfm2": "head", "lfm2moe": "head", "step35": "head", "exaone4": "head",
          "hunyuan-dense": "head", "qwen3next": "head", "qwen35": "head", "qwen35moe": "head"}.get(architecture, "")
    if architecture == "glm4moe" and c.flag("use_qk_norm"):
        qk = "head"
    if architecture == "command-r" and c.flag("use_qk_norm"):
        qk = "each"
    rope = _rope(c)
    kind = rope.get("rope_type") or rope.get("type")
    freqs = factors = 0
    if kind == "llama3" and architecture != "qwen3":
        freqs = kv["rope.dimension_count"] // 2
    if architecture == "gemma4":
        freqs = kv["attention.key_length"] // 2
    if kind in ("longrope", "su") and architecture in ("phi3",):
        factors = kv["rope.dimension_count"] // 2
    tied = c.raw("tie_word_embeddings")
    return Traits(
        tied=bool(tied) if tied is not None else c.model_type in _TIED_BY_DEFAULT,
        qkv_bias=qkv, output_bias=output, mlp_bias=mlp, qk_norm=qk, rope_freqs=freqs, rope_factors=factors,
        second_norm=c.model_type == "falcon" and c.flag("new_decoder_architecture"),
        router_bias=_router_bias(c, architecture), mtp_own_embeddings=architecture == "glm4moe")


def _router_bias(c: Config, architecture: str) -> bool:
    """Whether each MoE block has exp_probs_b: models that balance experts by a bias (DeepSeek-V3 and after)."""
    if architecture == "deepseek2":
        return c.model_type != "deepseek_v2" and c.raw("topk_method", default="noaux_tc") == "noaux_tc"
    if architecture == "ernie4_5-moe":
        return c.flag("moe_use_aux_free")
    return architecture in ("glm4moe", "minimax-m2", "nemotron_h_moe", "lfm2moe", "step35", "dots1")
