"""A real model file, SmolLM2-135M: its own bytes, its cache, and what llama-quantize makes of it (rows of 576 fall back)."""


import pytest
from llama_engine import context_log, importance_of, llama_cpp, loaded, quantize
from test_llama_cpp_cache import check, engine_settings, label
from test_llama_cpp_mix import compare

from llmlab.gguf import read_gguf
from llmlab.memory import cache_bytes, size_of
from llmlab.shapes import from_gguf

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def spec(smollm2):
    return from_gguf(read_gguf(smollm2))


@pytest.fixture(scope="module")
def model(smollm2):
    with loaded(smollm2) as model:
        yield model


def test_the_file_itself(smollm2, spec, model):
    file = read_gguf(smollm2)
    size = size_of(spec)
    assert size.tensor_bytes == file.file_bytes - file.header_bytes
    assert size.bits_per_weight * size.elements / 8 == llama_cpp.llama_model_size(model)
    assert size.elements == llama_cpp.llama_model_n_params(model) == spec.params
    assert not size.needs_importance
    assert spec.context_train == llama_cpp.llama_model_n_ctx_train(model)
    assert spec.width == llama_cpp.llama_model_n_embd(model)
    assert len(spec.blocks) == llama_cpp.llama_model_n_layer(model)
    assert spec.blocks[0].kv_heads == llama_cpp.llama_model_n_head_kv(model)


@pytest.mark.parametrize("case", [
    ("smollm2", 8192, {}), ("smollm2", 2000, {"kv": "q8_0"}), ("smollm2", 8192, {"kv": ("q8_0", "q4_0")}),
    ("smollm2", 4097, {"sequences": 3}), ("smollm2", 4096, {"sequences": 4, "unified": True, "kv": "q5_1"}),
    ("smollm2", 8192, {"flash_attention": False, "ubatch": 128})], ids=label)
def test_cache_is_what_llama_cpp_prints(case, spec, model):
    _, context, changes = case
    told = context_log(model, **engine_settings(context, **changes))
    ours = cache_bytes(spec, context, changes.get("kv", "f16"), **{k: v for k, v in changes.items() if k != "kv"})
    check(told, ours)
    assert told.caches[0].layers == 30


@pytest.mark.slow
@pytest.mark.parametrize("quant,importance", [
    ("Q4_K_M", False), ("Q3_K_S", False), ("IQ4_XS", False), ("Q2_K", False), ("Q4_0", True), ("TQ2_0", False),
    ("Q6_K", False)])
def test_requantized_it_is_what_we_say(quant, importance, smollm2, spec, tmp_path):
    target = tmp_path / "out.gguf"
    matrix = importance_of(spec.tensors) if importance else None
    assert quantize(smollm2, target, quant, matrix, allow_requantize=True)
    found = compare(spec, read_gguf(target), quant, importance)
    assert not found, "\n".join(found[:20])
    again = from_gguf(read_gguf(target))
    assert again.stored == quant and size_of(again).tensor_bytes == size_of(spec, quant, importance).tensor_bytes
