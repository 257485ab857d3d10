"""NF4, double quant and INT8 against bitsandbytes itself: small models are really loaded and their bytes counted."""

import pytest

from llmlab.memory import types, weights
from llmlab.shapes import model_spec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

SMALL = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=32, vocab_size=512, tie_word_embeddings=False)
MODELS = {"llama": {}, "qwen3": {}, "phi3": {"pad_token_id": 0}, "gemma3_text": {},
          "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
          "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}}
QUANTS = {"NF4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
          "FP4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
          "NF4_DQ": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
          "INT8": dict(load_in_8bit=True)}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = transformers.AutoConfig.for_model(request.param, **SMALL, **MODELS[request.param])
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def bytes_held(model) -> int:
    """Weights, maxima and row scales; not the 16-entry tables each layer keeps beside them."""
    total = 0
    for weight in model.parameters():
        total += weight.numel() * weight.element_size()
        state = getattr(weight, "quant_state", None)
        if state is not None:
            total += state.absmax.numel() * state.absmax.element_size()
            if state.nested:
                total += 4 * state.state2.absmax.numel() + 4 * state.offset.numel()
        if getattr(weight, "SCB", None) is not None:
            total += 4 * weight.SCB.numel()
    return total


@pytest.mark.parametrize("quant", QUANTS)
def test_bytes_are_bitsandbytes_own(saved, quant):
    dtype = torch.float16 if quant == "INT8" else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved, quantization_config=transformers.BitsAndBytesConfig(**QUANTS[quant]), dtype=dtype)
    assert sum(weights(model_spec(saved), quant).bytes) == bytes_held(model)


def test_experts_stay_in_sixteen_bits():
    spec = model_spec("qwen3-30b-a3b")
    held = {t.name: type for t, type in zip(spec.tensors, types(spec, "NF4"), strict=True)}
    assert held["blk.0.ffn_up_exps.weight"] == "BF16" and held["blk.0.attn_q.weight"] == "NF4"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_torchs_default_dtype_changes_no_table(kind):
    from llmlab.formats import bnb
    before, wanted = torch.get_default_dtype(), bnb.byte_pairs(kind, torch.device("cpu"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(bnb.byte_pairs.__wrapped__(kind, torch.device("cpu")), wanted)
    finally:
        torch.set_default_dtype(before)
