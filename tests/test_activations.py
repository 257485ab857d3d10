"""The peaks of transformers' prefill and decode, against the tensors of real modules followed by a dispatch mode."""

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, logging

from llmlab.activations import attention, modelled_exactly, peaks, prompt_tokens
from llmlab.fitting import fit
from llmlab.probes.tracker import Tracker, storage_bytes
from llmlab.probes.whole import cache_tensors
from llmlab.shapes import from_config, model_spec

logging.set_verbosity_error()

_BASE = {"vocab_size": 384, "max_position_embeddings": 4096, "hidden_size": 256, "intermediate_size": 448,
         "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
         "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 160}
_DELTANET = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_value_head_dim": 64, "linear_key_head_dim": 64,
             "linear_conv_kernel_dim": 4, "num_hidden_layers": 4,
             "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]}
_SLIDES = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama-mqa": {"model_type": "llama", "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "llama-mha-tied": {"model_type": "llama", "num_key_value_heads": 8, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-sliding": {"model_type": "mistral", "sliding_window": 128},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2moe": {"model_type": "qwen2_moe", **_MOE, "shared_expert_intermediate_size": 320, "sliding_window": None},
    "qwen3": {"model_type": "qwen3", "head_dim": 64},
    "qwen3moe": {"model_type": "qwen3_moe", **_MOE},
    "gemma": {"model_type": "gemma"},
    "gemma2": {"model_type": "gemma2", "sliding_window": 128, "layer_types": _SLIDES},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 128, "layer_types": _SLIDES},
    "phi3": {"model_type": "phi3", "sliding_window": None},
    "gpt-oss": {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128,
                "layer_types": _SLIDES},
    "olmo2": {"model_type": "olmo2"},
    "granite": {"model_type": "granite"},
    "smollm3": {"model_type": "smollm3"},
    "command-r": {"model_type": "cohere"},
    "glm4": {"model_type": "glm4", "partial_rotary_factor": 0.5},
    "glm4moe": {"model_type": "glm4_moe", **_MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
                "use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 0},
    "starcoder2": {"model_type": "starcoder2", "sliding_window": None},
    "olmo3": {"model_type": "olmo3", "sliding_window": 128, "layer_types": _SLIDES},
    "minimax-m2": {"model_type": "minimax_m2", "num_local_experts": 4, "num_experts_per_tok": 2, "use_qk_norm": True},
    "qwen3.5": {"model_type": "qwen3_5_text", **_DELTANET},
    "qwen3.5-moe": {"model_type": "qwen3_5_moe_text", **_DELTANET, **_MOE, "shared_expert_intermediate_size": 320},
    "qwen3-next": {"model_type": "qwen3_next", **_DELTANET, **_MOE, "shared_expert_intermediate_size": 320},
}
CASES = [(name, *case) for at, name in enumerate(FAMILIES) for case in
         (("sdpa", "BF16", 300, 1), ("eager", "F32", 150, 2))[at % 2 * (name not in ("gemma2", "gpt-oss")):]]


def build(config: dict, quant: str, attn: str):
    config = dict(config)
    torch.manual_seed(0)
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[quant]
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn).eval()


def measured(model, tokens: int, batch: int) -> tuple[int, int, int]:
    """(peak of a prefill, of the decode step after it, the cache at the end): bytes of tensors beside the weights."""
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens))
    known = [*model.parameters(), *model.buffers()]
    found = []
    with torch.no_grad(), Tracker(known) as tracker:
        base = tracker.live
        ids = ids.clone()
        cache = DynamicCache(config=model.config)
        for given in (ids, ids[:, :1].clone()):
            tracker.reset()
            model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            found.append(tracker.peak - base)
    kv, states = cache_tensors(cache)
    return *found, storage_bytes([*kv, *states])


@pytest.mark.parametrize("name,attn,quant,tokens,batch", CASES, ids=lambda v: str(v))
def test_peaks_are_those_of_the_real_modules(name, attn, quant, tokens, batch):
    config = {**_BASE, **FAMILIES[name]}
    spec = from_config(config, name)
    assert modelled_exactly(spec)
    run = attention(spec, attn == "sdpa")
    assert run == attn or name in ("gemma2", "gpt-oss")
    prefill, decode, cache = measured(build(config, quant, run), tokens, batch)
    ours = peaks(spec, quant, tokens, batch, attn == "sdpa")
    assert ours[0].bytes == pytest.approx(prefill, rel=0.01)
    assert ours[1].bytes == pytest.approx(decode, rel=0.01)
    assert ours[1].cache == pytest.approx(cache, rel=1e-3)       # a sliding layer's window is a tensor of its own


@pytest.mark.parametrize("seed", range(8))
def test_any_shape_of_llama(seed):
    pick = random.Random(seed)
    kv = pick.choice([1, 2, 3])
    config = {**_BASE, "model_type": "llama", "num_key_value_heads": kv, "num_attention_heads": kv * pick.choice([1, 2, 4]),
              "head_dim": pick.choice([16, 32, 64]), "hidden_size": 64 * pick.randint(1, 6),
              "intermediate_size": 32 * pick.randint(2, 30), "num_hidden_layers": pick.randint(1, 5),
              "vocab_size": pick.choice([300, 5000])}
    quant, sdpa = pick.choice(["F32", "BF16", "F16"]), pick.random() < 0.5
    tokens, batch = pick.randint(2, 400), pick.randint(1, 3)
    prefill, decode, _ = measured(build(config, quant, "sdpa" if sdpa else "eager"), tokens, batch)
    ours = peaks(from_config(config, "any"), quant, tokens, batch, sdpa)
    assert [p.bytes for p in ours] == pytest.approx([prefill, decode], rel=0.01, abs=2048)


def test_logits_of_every_token():
    """A plain forward call keeps them; generate() asks for the last."""
    config = {**_BASE, "model_type": "llama", "vocab_size": 20000}
    model, spec = build(config, "F32", "sdpa"), from_config(config, "tiny")
    ids = torch.zeros(1, 200, dtype=torch.long)
    with torch.no_grad(), Tracker([*model.parameters(), *model.buffers()]) as tracker:
        base = tracker.live
        model(ids.clone(), use_cache=True)
    (prefill, _), (last, _) = (peaks(spec, "F32", 200, 1, True, False, True, every) for every in (True, False))
    assert prefill.bytes == pytest.approx(tracker.peak - base, rel=0.01) and prefill.at == "logits"
    assert prefill.bytes - last.bytes > 0.7 * 4 * 200 * 20000


def test_the_term_is_the_worse_of_both_beside_a_full_cache():
    config = {**_BASE, "model_type": "llama"}
    report = fit(from_config(config, "tiny"), None, quant="F32", engine="transformers", context=400, sequences=2, host="4 GiB")
    assert prompt_tokens(400, 2) == 199
    prefill, decode, cache = measured(build(config, "F32", "sdpa"), 199, 2)
    term = next(t for t in report.terms if t.name == "compute")
    assert report.total("kv_cache") == cache                     # float32, as the activations are
    assert term.bytes == pytest.approx(max(prefill, decode) - cache, rel=0.01)
    assert term.low <= term.bytes <= term.high and "peak in the" in term.why and "sdpa" in term.why


def test_eager_scores_grow_with_the_square_of_the_context():
    def compute(context: int, flash: bool) -> int:
        return fit("llama-3-8b", "rtx-4090-24gb", quant="BF16", engine="transformers", context=context,
                   flash_attention=flash).total("compute")
    assert compute(16384, True) / compute(8192, True) == pytest.approx(2, rel=0.1)
    assert compute(16384, False) / compute(8192, False) == pytest.approx(4, rel=0.1)


def test_a_family_without_sdpa_says_so_and_an_unknown_one_is_wide():
    def term(model: str):
        return next(t for t in fit(model, "h100-sxm5-80gb", quant="BF16", engine="transformers").terms if t.name == "compute")
    assert "has no other" in term("gemma-2-9b").why
    unknown = "deepseek-v2-lite"
    assert not modelled_exactly(model_spec(unknown)) and term(unknown).high > 1.9 * term(unknown).bytes
    assert "followed roughly" in term(unknown).why


@pytest.mark.parametrize("config", [
    {"model_type": "deepseek_v2", "q_lora_rank": None, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
     "v_head_dim": 32, "num_key_value_heads": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
     "moe_intermediate_size": 128, "first_k_dense_replace": 1},
    {"model_type": "granitemoehybrid", "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_n_groups": 1,
     "mamba_d_conv": 4, "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 512,
     "num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "attention", "mamba"]},
    {"model_type": "phi", "partial_rotary_factor": 0.5}], ids=lambda c: c["model_type"])
def test_other_families_are_within_their_factor_of_two(config):
    config = {**_BASE, **config}
    spec = from_config(config, "tiny")
    assert not modelled_exactly(spec)
    prefill, decode, _ = measured(build(config, "BF16", "sdpa"), 200, 1)
    ours = peaks(spec, "BF16", 200, 1, True)
    assert 0.5 < ours[0].bytes / prefill < 2 and 0.5 < ours[1].bytes / decode < 2


def test_every_catalogue_model_has_a_peak():
    from llmlab.catalog import entries
    for name in entries():
        spec = model_spec(name)
        for quant in ("BF16", "NF4", "INT8"):
            prefill, decode = peaks(spec, quant, 512, 1, True)
            assert prefill.bytes > 512 * spec.width and decode.bytes >= decode.cache >= 0


def test_unpacking_a_matrix_is_part_of_the_peak():
    spec = model_spec("llama-3-8b")
    plain, packed = (peaks(spec, quant, 8, 1, True)[1] for quant in ("BF16", "NF4"))
    assert packed.bytes - plain.bytes > 0.9 * 2 * 4096 * 14336 and packed.cache == plain.cache


def test_it_is_remembered_with_the_model():
    spec = model_spec("gpt-oss-20b")
    assert peaks(spec, "BF16", 12345, 1, True) is peaks(spec, "BF16", 12345, 1, True)
