"""hf_config against transformers itself: the same parameters, counted on its models built without memory."""

import json
import os
import signal
import tracemalloc
from contextlib import contextmanager
from functools import cache

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import make_config_defaults
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmlab.errors import LabError
from llmlab.hf_config import ARCHITECTURES, translate
from llmlab.shapes import model_spec

# ---- the table of defaults --------------------------------------------------------------------------------

TABLE = json.loads(make_config_defaults.TABLE.read_text("utf-8"))


def same_transformers() -> bool:
    return transformers.__version__.split(".")[:2] == TABLE["transformers"].split(".")[:2]


def test_the_committed_table_is_what_transformers_says():
    if not same_transformers():
        pytest.skip(f"the table was made with transformers {TABLE['transformers']}, here is {transformers.__version__}")
    made = make_config_defaults.make()
    assert made["model_types"] == TABLE["model_types"], "run python tests/make_config_defaults.py"


def test_the_table_is_small_and_holds_scalars_only():
    written = make_config_defaults.TABLE.read_text("utf-8")
    assert len(written) < 60_000
    assert sorted(TABLE["model_types"]) == list(TABLE["model_types"])
    for fields in TABLE["model_types"].values():
        assert all(isinstance(value, (bool, int, float, str)) for value in fields.values())


def test_what_a_class_computes_from_other_fields_is_no_default():
    types = TABLE["model_types"]
    for model_type in ("llama", "phi3", "olmo", "cohere", "stablelm"):
        assert "head_dim" not in types[model_type]
    for model_type in ("llama", "phi3", "olmo2", "cohere2", "granite"):
        assert "num_key_value_heads" not in types[model_type]
    assert types["mistral"]["num_key_value_heads"] == 8
    assert types["gemma3"]["num_attention_heads"] == 8          # of the text configuration inside
    assert types["gemma4_text"]["global_head_dim"] == 512       # a keyword of __post_init__, no declared field
    assert not any(make_config_defaults.NEVER & fields.keys() for fields in types.values())


# ---- parameter counts -------------------------------------------------------------------------------------

BASE = {"vocab_size": 320, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None}
NO_KV = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
TIED, LOOSE = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
WIDE = {"head_dim": 24}                                         # not hidden_size / heads
MHA = {"num_key_value_heads": 6}
MOE = {"moe_intermediate_size": 56, "num_experts_per_tok": 2}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 24, "linear_value_head_dim": 16,
         "linear_conv_kernel_dim": 4, "num_hidden_layers": 4}
MLA = {"kv_lora_rank": 40, "q_lora_rank": 56, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 24,
       "num_key_value_heads": 6, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, **MOE}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
SSD = {"mamba_n_heads": 8, "mamba_d_head": 24, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_d_conv": 4,
       "mamba_expand": 2}
HYBRID = ["linear_attention", "full_attention", "linear_attention"]

CASES = {  # model_type -> variations of a small configuration
    "llama": [BASE | TIED, BASE | LOOSE | WIDE | {"attention_bias": True, "mlp_bias": True},
              NO_KV | {"rope_parameters": LLAMA3}],
    "mistral": [BASE | {"sliding_window": None}, BASE | TIED | WIDE],
    "mixtral": [BASE | {"num_local_experts": 4}, BASE | TIED | {"num_local_experts": 3, "num_experts_per_tok": 1}],
    "ministral3": [BASE | WIDE, BASE | TIED | WIDE | {"num_hidden_layers": 2}],
    "ministral": [BASE | {"head_dim": 16, "layer_types": MIXED}, BASE | TIED | WIDE],
    "qwen2": [BASE, BASE | TIED | MHA,
              BASE | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}],
    "qwen2_moe": [BASE | MOE | {"num_experts": 6, "shared_expert_intermediate_size": 72},
                  BASE | MOE | TIED | {"num_experts": 4, "shared_expert_intermediate_size": 48}],
    "qwen3": [BASE | WIDE, BASE | TIED | {"head_dim": 16}, BASE | WIDE | {"attention_bias": True}],
    "qwen3_moe": [BASE | MOE | WIDE | {"num_experts": 6}, BASE | MOE | TIED | WIDE | {"num_experts": 4}],
    "qwen3_next": [BASE | MOE | WIDE | DELTA | {"num_experts": 6, "shared_expert_intermediate_size": 72},
                   BASE | MOE | TIED | WIDE | DELTA | {"num_experts": 4, "shared_expert_intermediate_size": 40,
                                                       "layer_types": ["full_attention", "linear_attention"] * 2}],
    "qwen3_5_text": [BASE | WIDE | DELTA, BASE | TIED | WIDE | DELTA | {"full_attention_interval": 2}],
    "qwen3_5_moe_text": [BASE | MOE | WIDE | DELTA | {"num_experts": 6, "shared_expert_intermediate_size": 72},
                         BASE | MOE | TIED | WIDE | DELTA | {"num_experts": 4, "shared_expert_intermediate_size": 40}],
    "gemma": [BASE | WIDE, BASE | WIDE | MHA | {"attention_bias": True}],
    "gemma2": [BASE | WIDE, BASE | WIDE | {"sliding_window": 16, "num_hidden_layers": 4}],
    "gemma3_text": [BASE | WIDE, BASE | LOOSE | WIDE | {"sliding_window": 16, "layer_types": MIXED}],
    "gemma3n_text": [
        BASE | WIDE | {"num_hidden_layers": 5, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8,
                       "laurel_rank": 4, "vocab_size_per_layer_input": 320, "activation_sparsity_pattern": None,
                       "altup_num_inputs": 2},
        BASE | WIDE | {"num_hidden_layers": 5, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16,
                       "laurel_rank": 8, "vocab_size_per_layer_input": 320, "activation_sparsity_pattern": None,
                       "intermediate_size": [160, 160, 192, 192, 192]}],
    "gemma4_text": [
        BASE | WIDE | {"num_hidden_layers": 6, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320,
                       "global_head_dim": 32, "num_kv_shared_layers": 0},
        BASE | WIDE | {"num_hidden_layers": 6, "hidden_size_per_layer_input": 0, "global_head_dim": 48,
                       "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 40},
        BASE | WIDE | {"num_hidden_layers": 6, "hidden_size_per_layer_input": 0, "global_head_dim": 48,
                       "attention_k_eq_v": True, "num_global_key_value_heads": 1}],
    "phi3": [BASE, BASE | TIED | MHA],
    "phi": [BASE | MHA, BASE | MHA | {"num_hidden_layers": 2, "intermediate_size": 200}],
    "granite": [BASE, BASE | TIED | MHA | {"attention_bias": True, "mlp_bias": True}],
    "granitemoe": [BASE | {"num_local_experts": 6}, BASE | TIED | {"num_local_experts": 4, "num_experts_per_tok": 1}],
    "granitemoeshared": [BASE | {"num_local_experts": 6, "shared_intermediate_size": 64},
                         BASE | TIED | {"num_local_experts": 4, "shared_intermediate_size": 0}],
    "granitemoehybrid": [
        BASE | SSD | {"num_local_experts": 4, "shared_intermediate_size": 64, "layer_types": HYBRID},
        BASE | SSD | TIED | {"num_local_experts": 0, "shared_intermediate_size": 80, "layer_types": HYBRID},
        BASE | SSD | {"num_local_experts": 0, "shared_intermediate_size": 80},
        BASE | SSD | {"num_local_experts": 4, "shared_intermediate_size": 64,
                      "layer_types": ["mamba", "attention", "mamba"]},
        BASE | {"num_local_experts": 0, "shared_intermediate_size": 80, "layer_types": ["attention"] * 3,
                "mamba_n_heads": 8}],
    "gpt_oss": [BASE | WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2},
                BASE | TIED | {"head_dim": 16, "num_local_experts": 3, "num_experts_per_tok": 1,
                               "num_hidden_layers": 2}],
    "deepseek_v2": [BASE | MLA, BASE | MLA | TIED | {"q_lora_rank": None, "first_k_dense_replace": 0}],
    "deepseek_v3": [BASE | MLA | {"num_nextn_predict_layers": 1},
                    BASE | MLA | {"q_lora_rank": None, "first_k_dense_replace": 2}],
    "glm4_moe_lite": [BASE | MLA, BASE | MLA | TIED | {"n_shared_experts": 1}],
    "glm4": [BASE | WIDE, BASE | TIED | {"head_dim": 16, "attention_bias": False}],
    "glm4_moe": [BASE | MOE | WIDE | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
                 BASE | MOE | TIED | WIDE | {"n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 2,
                                             "use_qk_norm": True, "attention_bias": True,
                                             "num_nextn_predict_layers": 1}],
    "minimax_m2": [BASE | WIDE | {"num_local_experts": 6, "num_experts_per_tok": 2},
                   BASE | TIED | WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}],
    "smollm3": [BASE, BASE | LOOSE | {"attention_bias": True, "mlp_bias": True}],
    "olmo": [BASE, NO_KV | TIED],
    "olmo2": [BASE, NO_KV | TIED],
    "olmo3": [BASE | {"num_hidden_layers": 4}, BASE | TIED | {"sliding_window": 16, "layer_types": MIXED}],
    "olmoe": [BASE | {"num_experts": 6, "num_experts_per_tok": 2},
              NO_KV | TIED | {"num_experts": 4, "num_experts_per_tok": 1}],
    "falcon": [{"vocab_size": 320, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6},
               {"vocab_size": 320, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
                "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
               {"vocab_size": 320, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
                "multi_query": False, "tie_word_embeddings": False}],
    "cohere": [BASE, NO_KV | {"use_qk_norm": True}],
    "cohere2": [BASE | {"num_hidden_layers": 4}, BASE | {"head_dim": 16, "layer_types": MIXED}],
    "nemotron": [BASE, BASE | TIED | WIDE],
    "nemotron_h": [
        {key: BASE[key] for key in BASE if key != "num_hidden_layers"} | {
            "layers_block_type": ["linear_attention", "mlp", "full_attention"], "head_dim": 24, "mamba_num_heads": 8,
            "mamba_head_dim": 12, "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4},
        {key: BASE[key] for key in BASE if key != "num_hidden_layers"} | {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "head_dim": 24,
            "mamba_num_heads": 8, "mamba_head_dim": 12, "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4,
            "n_routed_experts": 4, "moe_intermediate_size": 56, "moe_shared_expert_intermediate_size": 72,
            "num_experts_per_tok": 2},
        BASE | {"hybrid_override_pattern": "M-*", "head_dim": 24, "mamba_num_heads": 8, "mamba_head_dim": 12,
                "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4}],
    "lfm2": [BASE | {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
             BASE | LOOSE | {"full_attn_idxs": [0, 2], "conv_L_cache": 4, "intermediate_size": 600},
             BASE | {"num_hidden_layers": 2}],
    "lfm2_moe": [BASE | MOE | {"layer_types": ["conv", "full_attention", "conv"], "num_experts": 4,
                               "num_dense_layers": 1},
                 BASE | MOE | {"layer_types": ["full_attention", "conv", "conv"], "num_experts": 6,
                               "num_dense_layers": 2}],
    "llama4_text": [
        BASE | WIDE | {"num_local_experts": 4, "intermediate_size_mlp": 200, "num_hidden_layers": 4},
        BASE | TIED | WIDE | {"num_local_experts": 2, "intermediate_size_mlp": 200, "interleave_moe_layer_step": 2,
                              "num_hidden_layers": 4}],
    "starcoder2": [BASE, BASE | LOOSE | {"use_bias": False}],
    "stablelm": [BASE, BASE | TIED | MHA | {"use_qkv_bias": True}],
    "exaone4": [BASE | {"num_hidden_layers": 4}, BASE | TIED | {"layer_types": ["full_attention"] * 3}],
    "seed_oss": [BASE | WIDE, BASE | TIED | {"head_dim": 16, "attention_bias": False, "attention_out_bias": True}],
    "ernie4_5": [BASE | WIDE, BASE | LOOSE | {"head_dim": 16, "use_bias": True}],
    "hunyuan_v1_dense": [BASE | {"head_dim": 16}, BASE | TIED | WIDE],
    "arcee": [BASE, NO_KV | TIED | {"head_dim": 24}],
    "falcon_h1": [BASE | SSD | {"mamba_d_ssm": 192, "mamba_rms_norm": True},
                  BASE | SSD | TIED | {"mamba_d_ssm": 192, "mamba_n_groups": 1}],
    "gpt2": [{"vocab_size": 320, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 64},
             {"vocab_size": 320, "n_embd": 96, "n_layer": 2, "n_head": 6, "n_positions": 48, "n_inner": 200,
              "tie_word_embeddings": False}],
    "gpt_neox": [NO_KV, NO_KV | TIED | {"num_hidden_layers": 2, "intermediate_size": 200}],
    "mamba": [{"vocab_size": 320, "hidden_size": 96, "num_hidden_layers": 3, "state_size": 8},
              {"vocab_size": 320, "hidden_size": 96, "num_hidden_layers": 2, "expand": 3, "time_step_rank": 10,
               "tie_word_embeddings": False}],
    "falcon_mamba": [{"vocab_size": 320, "hidden_size": 96, "num_hidden_layers": 3, "state_size": 8},
                     {"vocab_size": 320, "hidden_size": 96, "num_hidden_layers": 2, "expand": 3,
                      "tie_word_embeddings": False}],
    "mamba2": [{"vocab_size": 320, "hidden_size": 96, "num_hidden_layers": 3, "state_size": 8, "num_heads": 8,
                "head_dim": 24, "n_groups": 2},
               {"vocab_size": 320, "hidden_size": 96, "num_hidden_layers": 2, "state_size": 16, "num_heads": 12,
                "head_dim": 16, "n_groups": 1, "tie_word_embeddings": True}],
    "jamba": [BASE | {"num_hidden_layers": 4, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
                      "mamba_d_state": 8},
              BASE | TIED | {"num_hidden_layers": 4, "num_experts": 2, "attn_layer_period": 4, "attn_layer_offset": 2}],
}

FORMS = ("saved", "lean", "given")
TEXT_MODELS = {  # the language half of a vision model: transformers has no causal head for it; it is added here
    "qwen2_vl_text": [BASE | LOOSE, BASE | TIED],
    "qwen2_5_vl_text": [BASE | LOOSE, BASE | TIED | MHA],
    "qwen3_vl_text": [BASE | LOOSE | WIDE, BASE | TIED | {"head_dim": 16}],
    "qwen3_vl_moe_text": [BASE | LOOSE | WIDE | MOE | {"num_experts": 6},
                          BASE | TIED | WIDE | MOE | {"num_experts": 4}],
    "glm4v_text": [BASE | LOOSE, BASE | TIED],
    "glm4v_moe_text": [
        BASE | LOOSE | MOE | WIDE | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1},
        BASE | TIED | MOE | WIDE | {"n_routed_experts": 6, "n_shared_experts": 2, "first_k_dense_replace": 2}],
    "gemma4_unified_text": [BASE | WIDE | {"num_hidden_layers": 6}],
}

@cache
def true_parameters(model_type: str, index: int) -> dict[str, int]:
    """Name -> elements of the language model transformers builds from a case, each tensor once."""
    fields = (CASES | TEXT_MODELS)[model_type][index]
    config = CONFIG_MAPPING[model_type](**fields)
    auto = transformers.AutoModel if model_type in TEXT_MODELS else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    counted = {name: p.numel() for name, p in model.named_parameters()}
    if model_type in TEXT_MODELS and not fields.get("tie_word_embeddings", True):
        counted["lm_head.weight"] = fields["vocab_size"] * fields["hidden_size"]
    # Checkpoints and GGUF hold these as tensors; transformers registers them as buffers.
    return counted | {name: b.numel() for name, b in model.named_buffers()
                      if name.endswith(("e_score_correction_bias", "layer_scalar", "expert_bias"))}


def written(model_type: str, index: int, form: str) -> dict:
    """A case as a config.json: saved by transformers, saved lean (as nested ones are), or as a hub author writes it."""
    fields = (CASES | TEXT_MODELS)[model_type][index]
    if form == "given":
        return {"model_type": model_type} | fields
    config = CONFIG_MAPPING[model_type](**fields)
    saved = json.loads(json.dumps(config.to_diff_dict()))
    if "tie_word_embeddings" in fields:
        saved["tie_word_embeddings"] = fields["tie_word_embeddings"]
    if form == "saved":
        return saved
    defaults = config.default_config_fields()
    return {key: value for key, value in saved.items() if key == "model_type" or defaults.get(key) != value}


@pytest.mark.parametrize(("model_type", "index", "form"), [
    (m, i, form) for m, cases in (CASES | TEXT_MODELS).items() for i in range(len(cases)) for form in FORMS])
def test_parameters_are_those_of_the_model_transformers_builds(model_type, index, form, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(written(model_type, index, form)))
    assert model_spec(tmp_path).params == sum(true_parameters(model_type, index).values())


def test_enough_kinds_of_models_are_counted():
    # What no case builds: outer names of the text configurations above, and one without a model class of its own.
    unbuilt = set(TABLE["model_types"]) - set(CASES) - set(TEXT_MODELS)
    assert unbuilt == {"mistral3", "qwen3_5", "qwen3_5_moe", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "llama4",
                       "step3p5",
                       "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe"}


def test_a_saved_folder_reads_like_its_fields(tmp_path):
    config = CONFIG_MAPPING["qwen3"](**CASES["qwen3"][0])
    config.save_pretrained(tmp_path)
    assert shapes_of(model_spec(tmp_path)) == shapes_of(model_spec(written("qwen3", 0, "saved")))


@pytest.mark.parametrize(("model_type", "index"), [
    (m, i) for m in CASES for i in range(len(CASES[m])) if CONFIG_MAPPING[m].attribute_map.keys() - {"head_dim"}])
def test_other_spellings_of_a_field_are_known(model_type, index):
    """transformers takes num_local_experts for n_routed_experts and so on; so does llmlab."""
    fields = written(model_type, index, "given")
    for other, usual in CONFIG_MAPPING[model_type].attribute_map.items():
        if usual in fields and other not in fields and other != "head_dim":   # GLM's head_dim is the rotary part only
            renamed = {other if key == usual else key: value for key, value in fields.items()}
            assert shapes_of(model_spec(renamed)) == shapes_of(model_spec(fields)), (other, usual)


def shapes_of(spec) -> dict:
    return {tensor.name: tensor.shape for tensor in spec.tensors}


# ---- nested and thin configs ------------------------------------------------------------------------------

def test_gemma3_4b_with_most_fields_missing():
    """google/gemma-3-4b-it's text_config names six fields; the rest are class defaults (published: 3.88 B)."""
    spec = model_spec({"model_type": "gemma3", "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}})
    block = spec.blocks[0]
    assert (block.heads, block.kv_heads, block.key_dim, block.window) == (8, 4, 256, 1024)
    assert spec.tied and spec.vocab == 262144 and spec.context_train == 131072
    assert [b.index for b in spec.blocks if b.mixer == "full"] == [5, 11, 17, 23, 29]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma3_text"](
            hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, vocab_size=262144))
    assert spec.params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("outer", "inner"), [
    ("gemma3", "gemma3_text"), ("gemma4", "gemma4_text"), ("llama4", "llama4_text"), ("mistral3", "mistral"),
    ("qwen3_5", "qwen3_5_text"), ("qwen3_5_moe", "qwen3_5_moe_text"), ("gemma3n", "gemma3n_text")])
@pytest.mark.parametrize("named", [True, False])
def test_a_nested_text_config_is_the_flat_one(outer, inner, named):
    flat = written(inner, 0, "given")
    if outer == "mistral3":
        flat = written("mistral", 0, "given")
    nested = {key: value for key, value in flat.items() if named or key != "model_type"}
    spec = model_spec({"model_type": outer, "text_config": nested, "vision_config": {"hidden_size": 7}})
    assert shapes_of(spec) == shapes_of(model_spec(flat))
    assert [b.mixer for b in spec.blocks] == [b.mixer for b in model_spec(flat).blocks]


KINDS = {"sliding_attention": "sliding", "full_attention": "full", "linear_attention": "recurrent", "conv": "recurrent",
         "chunked_attention": "chunked"}


@pytest.mark.parametrize(("model_type", "layers"), [
    (m, n) for m in ("gemma2", "gemma3_text", "gemma4_text", "cohere2", "gpt_oss", "olmo3", "exaone4", "qwen3_next",
                      "qwen3_5_text", "qwen3_5_moe_text", "llama4_text", "lfm2")
    for n in ((64,) if m == "exaone4" else (1, 4, 6, 7, 13))])
def test_layer_kinds_without_layer_types_are_transformers_own(model_type, layers):
    fields = dict(CASES[model_type][0], num_hidden_layers=layers)
    fields.pop("layer_types", None)
    config = CONFIG_MAPPING[model_type](**fields)
    spec = model_spec({"model_type": model_type} | fields)
    assert [b.mixer for b in spec.blocks] == [KINDS[kind] for kind in config.layer_types]


def test_only_the_exaone_of_64_blocks_has_windows_in_llama_cpp():
    spec = model_spec({"model_type": "exaone4"} | dict(CASES["exaone4"][0], num_hidden_layers=8))
    assert {(b.mixer, b.window) for b in spec.blocks} == {("full", 0)} and spec.blocks[0].declared_window


@pytest.mark.parametrize(("model_type", "field", "value"), [
    ("gemma3_text", "sliding_window_pattern", 3), ("cohere2", "sliding_window_pattern", 2),
    ("exaone4", "sliding_window_pattern", 3), ("qwen3_next", "full_attention_interval", 3)])
def test_a_given_period_is_heard(model_type, field, value):
    fields = dict(CASES[model_type][0], num_hidden_layers=64 if model_type == "exaone4" else 8) | {field: value}
    config = CONFIG_MAPPING[model_type](**fields)
    spec = model_spec({"model_type": model_type} | fields)
    assert [b.mixer for b in spec.blocks] == [KINDS[kind] for kind in config.layer_types]


NULLS = [("mistral", "sliding_window"), ("deepseek_v2", "q_lora_rank"), ("gemma3_text", "sliding_window"),
         ("granitemoehybrid", "num_local_experts"), ("falcon_h1", "mamba_d_ssm")]


@pytest.mark.parametrize(("model_type", "field"), NULLS)
def test_null_means_none_and_not_the_class_default(model_type, field):
    """A config that says null switches a thing off; only a field left out falls back on the class."""
    assert field in TABLE["model_types"][model_type]
    fields = written(model_type, 0, "given") | {field: None}
    if field == "num_local_experts":
        fields["layer_types"] = ["attention"] * 3
    with_null = model_spec(fields)
    switched_off = {"sliding_window": lambda: not any(b.window or b.declared_window for b in with_null.blocks),
                    "q_lora_rank": lambda: "blk.0.attn_q.weight" in with_null.by_name,
                    "num_local_experts": lambda: with_null.experts == 0,
                    "mamba_d_ssm": lambda: with_null.metadata["ssm.inner_size"] == 2 * with_null.width}
    assert switched_off[field]()


# ---- absurd configs: a spec or one clear line, quickly and in little memory -------------------------------

@contextmanager
def bounded(seconds: int = 10, peak: int | None = 64 * 2**20):
    """Fails where the block takes longer than `seconds` or more than `peak` bytes at once (None: not watched)."""
    def too_slow(*_):
        raise AssertionError(f"took longer than {seconds} s")
    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(seconds)
    if peak:
        tracemalloc.start()         # slows what it watches several times
    try:
        yield
        assert not peak or tracemalloc.get_traced_memory()[1] < peak
    finally:
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def spec_or_line(source, peak: int | None = 64 * 2**20):
    """The spec of a source; None where it is refused, after checking that the refusal is one short line."""
    with bounded(peak=peak):
        try:
            return model_spec(source)
        except LabError as error:
            line = str(error)
            assert line.strip() and len(line) < 300 and len(line.splitlines()) == 1, line[:400]
            return None


nested = st.recursive(st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=4),
                      lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8)
anything = st.one_of(
    st.sampled_from([
        0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**18, 10**30, -(10**18), 1e18, 0.5, -0.0, 1.5, 1e308, float("nan"),
        float("inf"), float("-inf"), True, False, None, "", "auto", "4096", "x" * 5000, "\n", "\ud800", [], {}, [1] * 3,
        ["full_attention"], ["full_attention"] * 3, [None] * 4, [[]] * 3, [10**18] * 4, [-1] * 4, [1.5] * 4, ["4"] * 4,
        {"rope_type": "llama3"}, {"full_attention": 3}, {"partial_rotary_factor": 0.5}, {"2": {"head_dim": 10**18}}]),
    st.integers(), st.floats(), nested)
FIELDS = sorted(make_config_defaults.names_read()
                | {"model_type", "text_config", "torch_dtype", "dtype", "per_layer_config", "rope_parameters"})
STARTS = [(m, i) for m in CASES for i in range(len(CASES[m]))]


@settings(max_examples=250, deadline=None, derandomize=True)
@given(start=st.sampled_from(STARTS),
       changes=st.dictionaries(st.sampled_from(FIELDS), anything, min_size=1, max_size=4),
       dropped=st.sets(st.sampled_from(sorted(BASE)), max_size=2), inside=st.booleans())
def test_absurd_fields_give_a_spec_or_one_line(start, changes, dropped, inside):
    fields = {k: v for k, v in written(*start, "given").items() if k not in dropped} | changes
    spec = spec_or_line({"model_type": "gemma3", "text_config": fields} if inside else fields)
    if spec is not None:
        assert 0 < spec.params_active and 0 < spec.params < 2**80
        assert all(min(t.shape) >= 1 and all(type(n) is int for n in t.shape) for t in spec.tensors)
        repr(spec)


@pytest.mark.parametrize(("model_type", "index"), STARTS)
def test_each_field_of_each_case_may_be_absurd(model_type, index):
    fields = written(model_type, index, "given")
    for name in fields:
        for value in (0, -1, 10**18, 1.5, float("nan"), True, "x", [], [1], {}, [[]], None):
            spec_or_line(fields | {name: value}, peak=None)
        spec_or_line({key: value for key, value in fields.items() if key != name}, peak=None)


@pytest.mark.parametrize("change", [
    {"num_hidden_layers": 10**6}, {"num_hidden_layers": 10**18}, {"hidden_size": 10**18}, {"vocab_size": 10**18},
    {"intermediate_size": 10**18}, {"num_attention_heads": 0}, {"num_key_value_heads": 0}, {"num_attention_heads": -4},
    {"head_dim": 10**18}, {"max_position_embeddings": 10**30}, {"num_hidden_layers": 0}, {"vocab_size": 1.5},
    {"num_hidden_layers": float("nan")}, {"hidden_size": float("inf")}, {"hidden_size": True}, {"hidden_size": "4096"},
    {"hidden_size": [96]}, {"model_type": None}, {"model_type": "no_such_model"}, {"model_type": 7},
    {"model_type": ["llama"]}, {"partial_rotary_factor": "half"}, {"partial_rotary_factor": float("nan")},
    {"rope_scaling": {"rope_type": ["llama3"]}}])
def test_what_no_model_can_be_is_refused_in_one_line(change):
    assert "rope_scaling" in change or spec_or_line(written("llama", 0, "given") | change) is None


@pytest.mark.parametrize("kinds", [["sliding_attention"], [], "full", 7, {"0": "full_attention"}, [None] * 3, [7] * 3])
def test_layer_types_that_do_not_fit(kinds):
    refused = isinstance(kinds, (int, dict)) or len(kinds) < 4
    spec = spec_or_line(written("gemma3_text", 0, "given") | {"num_hidden_layers": 4, "layer_types": kinds})
    assert spec is None or not refused


def test_files_that_are_no_config(tmp_path):
    path = tmp_path / "config.json"
    for content in (b"", b"{", b"[1, 2]", b"null", b"7", b'"text"', b"\x80\x81\xff\x00" * 64, b"\x89PNG\r\n\x1a\n",
                    b"{}", b'{"model_type": "llama"', b'{"a": NaN}', b"[" * 200_000, b'{"a":' * 200_000, b"1" * 10_000,
                    '{"model_type": "llama"}'.encode("utf-16"), b'{"model_type": "llama", "vocab_size": 1e999}'):
        path.write_bytes(content)
        assert spec_or_line(path) is None, content[:40]
        assert spec_or_line(tmp_path) is None, content[:40]


def test_a_config_of_100_mb_is_refused_unread(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.write(b'{"model_type": "llama", "padding": "')
        file.truncate(100 * 2**20)          # sparse: takes no disk
    assert spec_or_line(path) is None


def test_a_deep_config_is_refused_or_read():
    deep: object = "bottom"
    for _ in range(50_000):
        deep = {"text_config": deep}
    spec = spec_or_line({"model_type": "llama", "text_config": deep})
    assert spec is None or spec.params == model_spec({"model_type": "llama"}).params
    while isinstance(deep, dict):           # taken apart by hand: freeing it whole would recurse
        deep = deep["text_config"]


def test_every_architecture_with_defaults_is_read_or_says_what_is_missing():
    for model_type in ARCHITECTURES:
        try:
            _, metadata, _ = translate({"model_type": model_type})
        except LabError as error:
            assert len(str(error)) < 300 and "\n" not in str(error)
        else:
            assert metadata["block_count"] >= 1 and model_type in TABLE["model_types"]
