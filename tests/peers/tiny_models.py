"""Small configs of many families, in the words of their config.json, chosen so that rules bite.

Widths are multiples of 256 unless a model is there for its width; counts of blocks make eighths, sixteenths and
thirds differ. `VOCAB` is small: an embedding counts once.
"""

from llmlab.shapes import ModelSpec, from_config

VOCAB = 512
_BASE = {"vocab_size": VOCAB, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "hidden_size": 256,
         "intermediate_size": 256, "num_hidden_layers": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 64, "tie_word_embeddings": False}


def _alternate(period: int, count: int, often: str, seldom: str) -> list[str]:
    """Every `period`-th layer is `seldom`."""
    return [seldom if (i + 1) % period == 0 else often for i in range(count)]


_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
_MLA = {"q_lora_rank": None, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "head_dim": 64, "num_key_value_heads": 4}
_DELTANET = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_value_head_dim": 64, "linear_key_head_dim": 64,
             "linear_conv_kernel_dim": 4, "full_attention_interval": 4}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1, "mamba_d_conv": 4}
_GEMMA = {"tie_word_embeddings": True, "sliding_window": 512, "num_hidden_layers": 12}

CONFIGS: dict[str, dict] = {
    "llama": {"model_type": "llama"},
    "llama-tied-gqa4": {"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True,
                        "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_hidden_layers": 8},
    "llama-70b": {"model_type": "llama", "num_hidden_layers": 80, "num_key_value_heads": 1},
    "llama-80-gqa2": {"model_type": "llama", "num_hidden_layers": 80},
    "llama-80-mha": {"model_type": "llama", "num_hidden_layers": 80, "num_key_value_heads": 4},
    "llama-odd-288": {"model_type": "llama", "hidden_size": 288, "intermediate_size": 800, "num_attention_heads": 9,
                      "num_key_value_heads": 3, "head_dim": 32},
    "llama-odd-ffn-tied": {"model_type": "llama", "intermediate_size": 544, "tie_word_embeddings": True,
                           "num_key_value_heads": 1},
    "llama-odd-40": {"model_type": "llama", "hidden_size": 360, "intermediate_size": 520, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "head_dim": 40, "num_hidden_layers": 8},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 8},
    "mixtral-gqa4": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 8,
                     "num_key_value_heads": 1},
    "mixtral-80": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 80,
                   "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
                   "head_dim": 32},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-80": {"model_type": "qwen2", "num_hidden_layers": 80},
    "qwen2moe": {"model_type": "qwen2_moe", **_MOE, "shared_expert_intermediate_size": 512, "num_hidden_layers": 8},
    "qwen3": {"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 1},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 128, "tie_word_embeddings": True},
    "qwen3moe": {"model_type": "qwen3_moe", **_MOE, "num_hidden_layers": 12, "num_key_value_heads": 1},
    "qwen3moe-odd": {"model_type": "qwen3_moe", **_MOE, "moe_intermediate_size": 96, "num_hidden_layers": 8},
    "gemma": {"model_type": "gemma", "tie_word_embeddings": True, "num_hidden_layers": 8, "num_key_value_heads": 1},
    "gemma2": {"model_type": "gemma2", **_GEMMA},
    "gemma3": {"model_type": "gemma3_text", **_GEMMA, "sliding_window_pattern": 6, "num_hidden_layers": 16},
    "gemma3n": {"model_type": "gemma3n_text", **_GEMMA, "num_hidden_layers": 30, "num_kv_shared_layers": 10,
                "hidden_size_per_layer_input": 256, "laurel_rank": 64, "altup_num_inputs": 4,
                "vocab_size_per_layer_input": VOCAB,
                "layer_types": _alternate(5, 30, "sliding_attention", "full_attention")},
    "gemma4": {"model_type": "gemma4_text", **_GEMMA, "global_head_dim": 128, "num_key_value_heads": 1,
               "num_kv_shared_layers": 5, "hidden_size_per_layer_input": 64, "use_double_wide_mlp": True,
               "num_hidden_layers": 15,
               "layer_types": _alternate(5, 15, "sliding_attention", "full_attention"), "enable_moe_block": False},
    "gemma4-k-eq-v": {"model_type": "gemma4_text", **_GEMMA, "global_head_dim": 128, "num_key_value_heads": 2,
                      "num_global_key_value_heads": 1, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
                      "attention_k_eq_v": True, "layer_types": _alternate(6, 12, "sliding_attention", "full_attention"),
                      "enable_moe_block": False},
    "gemma4-moe": {"model_type": "gemma4_text", **_GEMMA, "global_head_dim": 128, "num_key_value_heads": 2,
                   "num_global_key_value_heads": 1, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
                   "attention_k_eq_v": True, "layer_types": _alternate(6, 12, "sliding_attention", "full_attention"),
                   "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 96},
    "phi3": {"model_type": "phi3", "num_key_value_heads": 4, "sliding_window": 2048},
    "phi3-longrope": {"model_type": "phi3", "num_key_value_heads": 1, "num_hidden_layers": 8,
                      "original_max_position_embeddings": 4096,
                      "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 32, "short_factor": [1.0] * 32}},
    "phi2": {"model_type": "phi", "num_key_value_heads": 4, "partial_rotary_factor": 0.5, "num_hidden_layers": 8},
    "falcon": {"model_type": "falcon", "multi_query": True, "new_decoder_architecture": False, "alibi": False,
               "num_kv_heads": None, "num_key_value_heads": None, "intermediate_size": None, "tie_word_embeddings": False},
    "gpt-oss": {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 12,
                "num_key_value_heads": 1, "sliding_window": 128, "attention_bias": True,
                "layer_types": _alternate(2, 12, "sliding_attention", "full_attention")},
    "deepseek2-lite": {"model_type": "deepseek_v2", **_MLA, "n_routed_experts": 4, "n_shared_experts": 2,
                       "num_experts_per_tok": 2, "moe_intermediate_size": 256, "first_k_dense_replace": 1,
                       "num_hidden_layers": 27},                       # llama.cpp knows the Lite models by their 27 blocks
    "deepseek3": {"model_type": "deepseek_v3", **_MLA, "q_lora_rank": 256, "n_routed_experts": 8, "n_shared_experts": 1,
                  "num_experts_per_tok": 2, "moe_intermediate_size": 256, "first_k_dense_replace": 3, "num_hidden_layers": 10,
                  "topk_method": "noaux_tc", "qk_nope_head_dim": 128, "v_head_dim": 128},
    "glm4": {"model_type": "glm4", "num_hidden_layers": 8, "attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4moe-mtp": {"model_type": "glm4_moe", "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
                    "moe_intermediate_size": 256, "first_k_dense_replace": 1, "num_hidden_layers": 10, "use_qk_norm": True,
                    "attention_bias": True, "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5},
    "qwen3next": {"model_type": "qwen3_next", **_MOE, **_DELTANET, "shared_expert_intermediate_size": 256,
                  "num_hidden_layers": 12, "partial_rotary_factor": 0.25, "head_dim": 128},
    "qwen35": {"model_type": "qwen3_5_text", **_DELTANET, "num_key_value_heads": 1, "head_dim": 128},
    "qwen35moe": {"model_type": "qwen3_5_moe_text", **_MOE, **_DELTANET, "shared_expert_intermediate_size": 256,
                  "num_hidden_layers": 12, "head_dim": 128},
    "granite": {"model_type": "granite", "num_hidden_layers": 8, "tie_word_embeddings": True},
    "granitemoe": {"model_type": "granitemoe", "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 8},
    "granitehybrid": {"model_type": "granitemoehybrid", **_MAMBA2, "num_local_experts": 4, "num_experts_per_tok": 2,
                      "shared_intermediate_size": 512, "num_hidden_layers": 12, "tie_word_embeddings": True,
                      "layer_types": _alternate(4, 12, "mamba", "attention")},
    "granitehybrid-dense": {"model_type": "granitemoehybrid", **_MAMBA2, "num_local_experts": 0, "num_experts_per_tok": 0,
                            "shared_intermediate_size": 512, "num_hidden_layers": 12, "tie_word_embeddings": True,
                            "layer_types": _alternate(4, 12, "mamba", "attention")},
    "nemotron_h": {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M-M*-M-M*-M-M*", "num_hidden_layers": 16,
                   "mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 64, "n_groups": 2, "conv_kernel": 4},
    "nemotron_h_moe": {"model_type": "nemotron_h", "hybrid_override_pattern": "MEMEM*EMEM*EMEME", "num_hidden_layers": 16,
                       "mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 64, "n_groups": 2, "conv_kernel": 4,
                       "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 256,
                       "moe_shared_expert_intermediate_size": 512},
    "lfm2": {"model_type": "lfm2", "conv_L_cache": 3, "num_hidden_layers": 12, "tie_word_embeddings": True,
             "block_auto_adjust_ff_dim": False, "layer_types": _alternate(3, 12, "conv", "full_attention")},
    "lfm2moe": {"model_type": "lfm2_moe", "conv_L_cache": 3, "num_hidden_layers": 12, "tie_word_embeddings": True, **_MOE,
                "num_dense_layers": 2, "layer_types": _alternate(3, 12, "conv", "full_attention")},
    "falcon-h1": {"model_type": "falcon_h1", **_MAMBA2, "num_hidden_layers": 8, "mamba_rms_norm": False,
                  "mamba_d_ssm": 512},
    "olmo2": {"model_type": "olmo2", "num_key_value_heads": 4, "head_dim": None},
    "olmo3": {"model_type": "olmo3", "num_key_value_heads": 4, "head_dim": None, "sliding_window": 512,
              "layer_types": _alternate(4, 16, "sliding_attention", "full_attention")},
    "olmoe": {"model_type": "olmoe", "num_key_value_heads": 4, **_MOE, "num_hidden_layers": 8, "head_dim": None},
    "command-r": {"model_type": "cohere", "tie_word_embeddings": True, "head_dim": None},
    "cohere2": {"model_type": "cohere2", "tie_word_embeddings": True, "sliding_window": 512, "num_hidden_layers": 12,
                "head_dim": None, "layer_types": _alternate(4, 12, "sliding_attention", "full_attention")},
    "starcoder2": {"model_type": "starcoder2", "use_bias": True, "tie_word_embeddings": True, "sliding_window": 512,
                   "head_dim": None},
    "llama4": {"model_type": "llama4_text", "num_local_experts": 4, "num_experts_per_tok": 1, "num_hidden_layers": 12,
               "intermediate_size": 256, "intermediate_size_mlp": 512, "interleave_moe_layer_step": 2,
               "attention_chunk_size": 512, "use_qk_norm": False},
    "minimax-m2": {"model_type": "minimax_m2", "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 8,
                   "use_qk_norm": True},
    "smollm3": {"model_type": "smollm3", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "step35": {"model_type": "step3p5", "num_attention_groups": 2, "moe_num_experts": 4, "moe_top_k": 2,
               "moe_intermediate_size": 256, "share_expert_dim": 256, "sliding_window": 512, "num_hidden_layers": 12,
               "layer_types": _alternate(4, 12, "sliding_attention", "full_attention"),
               "attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 2}},
    "exaone4": {"model_type": "exaone4", "sliding_window": 512, "num_hidden_layers": 8,
                "layer_types": _alternate(4, 8, "sliding_attention", "full_attention")},
    "seed_oss": {"model_type": "seed_oss", "attention_bias": True, "attention_out_bias": False, "num_hidden_layers": 8},
    "mamba": {"model_type": "mamba", "state_size": 16, "conv_kernel": 4, "expand": 2, "num_hidden_layers": 8,
              "tie_word_embeddings": True, "intermediate_size": 512},
    "mamba2": {"model_type": "mamba2", "state_size": 64, "conv_kernel": 4, "expand": 2, "num_hidden_layers": 8,
               "tie_word_embeddings": True, "num_heads": 8, "head_dim": 64, "n_groups": 1, "intermediate_size": 512},
}


def tiny_spec(name: str, **changes) -> ModelSpec:
    """The spec of a tiny model, its config changed."""
    return from_config({**_BASE, **CONFIGS[name], **changes}, f"tiny-{name}")
