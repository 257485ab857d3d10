"""Bytes against published files, llama.cpp's printed buffers, and storage layouts that can be counted by hand."""

import csv
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.catalog import entries, entry
from llmlab.errors import LabError
from llmlab.formats import FORMATS
from llmlab.formats.mixes import MIXES
from llmlab.memory import cache_bytes, card_bytes, loaded_bytes, mix_of, size_of, tensor_bytes, weights
from llmlab.shapes import from_config, model_spec
from llmlab.units import MIB

PUBLISHED = list(csv.DictReader((Path(__file__).parent / "golden" / "gguf_file_sizes.csv").open()))
MODEL_OF = {
    "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF": "llama-3.1-8b", "unsloth/Llama-3.2-3B-Instruct-GGUF": "llama-3.2-3b",
    "Qwen/Qwen3-4B-GGUF": "qwen3-4b", "Qwen/Qwen3-8B-GGUF": "qwen3-8b",
    "Qwen/Qwen2.5-Coder-7B-Instruct-GGUF": "qwen2.5-coder-7b",
    "Qwen/Qwen2.5-1.5B-Instruct-GGUF": "qwen2.5-1.5b", "Qwen/Qwen2.5-3B-Instruct-GGUF": "qwen2.5-3b",
    "Qwen/Qwen2.5-0.5B-Instruct-GGUF": "qwen2.5-0.5b", "unsloth/Qwen3-30B-A3B-GGUF": "qwen3-30b-a3b"}


def published_spec(row):
    fields = dict(entry(MODEL_OF[row["repo"]]).config)
    if "BOTH" in row["shape"]:                 # Qwen's own files hold the head apart though the config ties it
        fields["tie_word_embeddings"] = False
    return from_config(fields, row["repo"], source="catalogue")


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda r: f"{r['repo'].split('/')[1]}-{r['quant']}")
def test_published_files_to_the_byte(row):
    size = size_of(published_spec(row), row["quant"], row["imatrix"] == "yes")
    assert size.tensor_bytes == int(row["tensor_bytes"])


def test_published_headers_agree_within_a_repository():
    """file - tensors is the header: equal for all quants of a repository but for the length of a few strings. One file
    is 9,723,904 bytes above: its token embedding is in Q4_K where the recipe says IQ4_XS (311,164,928 weights, 8 bytes
    more a block of 256), an override of its maker's."""
    headers = {}
    for row in PUBLISHED:
        headers.setdefault(row["repo"], {})[row["quant"]] = int(row["file_bytes"]) - int(row["tensor_bytes"])
    odd = headers["unsloth/Qwen3-30B-A3B-GGUF"]
    assert odd["IQ4_XS"] - odd["IQ4_NL"] == 9_723_904 == 151936 * 2048 // 256 * (144 - 136)
    odd["IQ4_XS"] -= 9_723_904
    for repo, found in headers.items():
        assert max(found.values()) - min(found.values()) < 1024, repo
        assert all(0 < h < 16 * MIB for h in found.values())


BITS = {  # bits per weight of Llama 3.1 8B, llama.cpp tools/quantize/README.md
    "IQ1_S": 2.0042, "IQ1_M": 2.1460, "IQ2_XXS": 2.3824, "IQ2_XS": 2.5882, "IQ2_S": 2.7403, "IQ2_M": 2.9294, "IQ3_XXS": 3.2548,
    "IQ3_XS": 3.4977, "IQ3_S": 3.6606, "IQ3_M": 3.7628, "IQ4_XS": 4.4597, "IQ4_NL": 4.6818, "Q2_K_S": 2.9697, "Q2_K": 3.1593,
    "Q3_K_S": 3.6429, "Q3_K_M": 3.9960, "Q3_K_L": 4.2979, "Q4_K_S": 4.6672, "Q4_K_M": 4.8944, "Q5_K_S": 5.5704,
    "Q5_K_M": 5.7036, "Q6_K": 6.5633, "Q8_0": 8.5008, "F16": 16.0005}


@pytest.mark.parametrize("quant", BITS)
def test_published_bits_per_weight(quant):
    """The table was made with an importance matrix where a mix needs one, without for the rest."""
    spec = model_spec("llama-3.1-8b")
    size = size_of(spec, quant, importance=size_of(spec, quant).needs_importance)
    assert round(size.bits_per_weight, 4) == BITS[quant]


def test_which_mixes_need_an_importance_matrix():
    spec = model_spec("llama-3.1-8b")
    needing = {q for q, m in MIXES.items() if m.engine == "llama.cpp" and q != "Q2_0" and size_of(spec, q).needs_importance}
    assert needing == {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2.5-0.5b", "gpt-oss-20b", "deepseek-v2-lite", "gemma-4-e2b", "glm-4.5-air",
                                  "qwen3.5-35b-a3b", "nemotron-3-nano-30b-a3b"])
def test_every_mix_holds_together(name):
    """A mix's types hold the rows they are given; blocks, embedding and output add up to the whole; the fast sum agrees."""
    spec = model_spec(name)
    for quant, mix in MIXES.items():
        if quant in ("Q1_0", "Q2_0"):
            continue
        w = weights(spec, quant)
        assert sum(w.by_layer) + w.embedding + w.output - w.tied == w.padded
        if mix.engine == "llama.cpp":
            for tensor, type in zip(spec.tensors, w.types, strict=True):
                assert tensor.shape[0] % FORMATS[type].block == 0, (quant, tensor.name)
            trunk = sum(b for b, layer in zip(w.by_layer, spec.layers, strict=True) if not layer.mtp)
            padding = sum(p for p, layer in zip(w.card_padding, spec.layers, strict=False) if not layer.mtp)
            assert card_bytes(spec, quant) == trunk + w.output + padding + w.card_padding[-1]


def test_a_mix_names_every_tensor():
    found = mix_of(model_spec("llama-3-8b"), "Q4_K_M")
    assert found["blk.0.attn_v.weight"] == "Q6_K" and found["blk.4.attn_v.weight"] == "Q4_K"
    assert found["output.weight"] == "Q6_K" and found["blk.0.attn_norm.weight"] == "F32"
    assert set(found) == {t.name for t in model_spec("llama-3-8b").tensors}


def test_rows_that_do_not_divide_fall_back():
    found = mix_of(model_spec("smollm2-135m"), "Q4_K_M")           # 576 wide: not a multiple of 256
    assert found["blk.0.attn_q.weight"] == "Q5_0" and found["blk.0.ffn_down.weight"] == "Q6_K"
    assert found["token_embd.weight"] == "Q8_0"
    narrow = from_config({**entry("llama-3-8b").config, "hidden_size": 4112, "head_dim": 128}, "odd", source="catalogue")
    assert mix_of(narrow, "Q4_K_M")["blk.0.attn_q.weight"] == "F16"   # nor of 32
    with pytest.raises(LabError, match="Q1_0"):
        size_of(narrow, "Q1_0")


@pytest.mark.parametrize("quant, bits", [("NF4", 4.5), ("FP4", 4.5), ("NF4_DQ", 4 + 8 / 64 + 32 / (64 * 256)), ("INT8", 8),
                                         ("FP8", 8)])
def test_linear_layers_of_other_engines(quant, bits):
    shape = (4096, 16384)
    assert tensor_bytes(quant, shape) * 8 / (shape[0] * shape[1]) == pytest.approx(bits, rel=1.1e-3)


def test_bitsandbytes_leaves_embedding_and_head():
    spec = model_spec("llama-3-8b")
    found = mix_of(spec, "NF4")
    assert {n for n, t in found.items() if t != "NF4"} == {t.name for t in spec.tensors if len(t.shape) == 1} | {
        "token_embd.weight", "output.weight"}
    linear = sum(t.elements for t in spec.tensors if found[t.name] == "NF4")
    assert sum(weights(spec, "NF4").bytes) == linear // 2 + linear // 64 * 4 + 2 * (spec.params - linear)


def test_norms_are_no_linear_layers_of_whatever_shape():
    """Mamba-2's norm is a matrix in a GGUF, a vector in a checkpoint; nobody quantizes it."""
    for name in entries():
        found = mix_of(model_spec(name), "NF4")
        assert not [n for n, type in found.items() if "_norm." in n and type == "NF4"]
    assert len(model_spec("nemotron-nano-9b-v2").by_name["blk.0.ssm_norm.weight"].shape) == 2


def test_a_checkpoint_as_other_engines_hold_it():
    spec = model_spec("llama-3.1-8b")
    assert loaded_bytes(spec, "BF16") == 2 * spec.params == 2 * 8030261248        # no rope table, vectors in 16 bits
    assert loaded_bytes(spec, "F32") == 4 * spec.params
    air = model_spec("glm-4.5-air")
    assert loaded_bytes(air, "F16") == 2 * air.params < 2 * sum(t.elements for t in air.tensors)


# ---- cache -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, settings, mib", [   # printed by llama.cpp, public logs
    ("llama-3-8b", dict(context=512), 64), ("llama-3-8b", dict(context=8192), 1024),
    ("qwen3-30b-a3b", dict(context=32768), 3072), ("qwen2.5-3b", dict(context=4096), 144),
    ("command-r-35b", dict(context=4096), 5120), ("qwen3.6-27b", dict(context=262144), 16384)])
def test_printed_caches(name, settings, mib):
    assert cache_bytes(model_spec(name), **settings).kv == mib * MIB


def test_a_printed_sliding_cache():
    found = cache_bytes(model_spec("gpt-oss-120b"), 65536, sequences=4, unified=True, ubatch=512)
    assert (found.full, found.sliding, found.cells_sliding) == (2304 * MIB, 36 * MIB, 1024)


def test_cache_by_hand():
    spec = model_spec("llama-3-8b")
    per_token = 2 * 32 * 8 * 128                                       # K and V, layers, heads, width
    assert cache_bytes(spec, 1000).kv == per_token * 2 * 1024           # padded to 256 cells
    assert cache_bytes(spec, 1000, engine="transformers").kv == per_token * 2 * 1000
    assert cache_bytes(spec, 1000, engine="vllm").kv == per_token * 2 * 1008
    assert cache_bytes(spec, 1024, "q8_0").kv == per_token * 1024 * 34 // 32
    assert cache_bytes(spec, 1024, ("q8_0", "q4_0")).kv == per_token // 2 * 1024 * (34 + 18) // 32
    assert cache_bytes(spec, 1024, "fp8", engine="vllm").kv == per_token * 1024
    assert cache_bytes(spec, 1000, sequences=3).cells == 3 * 512        # each sequence's share padded
    assert cache_bytes(spec, 1000, sequences=3, unified=True).cells == 1024


def test_latent_attention_keeps_one_row():
    spec = model_spec("deepseek-v3")
    assert cache_bytes(spec, 4096).kv == 61 * 4096 * 576 * 2
    assert cache_bytes(spec, 4096, engine="transformers").kv == 61 * 4096 * 576 * 2     # measured with transformers 5.23


def test_a_model_that_shares_caches_pays_once():
    spec = model_spec("gemma-4-e2b")
    found = cache_bytes(spec, 32768)
    owning = [layer for layer in spec.blocks if layer.owns_kv]
    assert found.full == sum(2 * 2 * layer.kv_heads * layer.key_dim * 32768 for layer in owning if not layer.window)
    assert found.sliding == sum(2 * 2 * layer.kv_heads * layer.key_dim * 1024 for layer in owning if layer.window)


def test_recurrent_state_does_not_grow():
    spec = model_spec("qwen3.5-9b")
    short, long, many = (cache_bytes(spec, c, sequences=n) for c, n in ((1024, 1), (65536, 1), (65536, 4)))
    assert short.recurrent == long.recurrent > 0 and many.recurrent == 4 * long.recurrent
    layer = next(b for b in spec.layers if b.mixer == "recurrent")
    kernel, inner, groups, state = (
        spec.metadata[f"ssm.{k}"] for k in ("conv_kernel", "inner_size", "group_count", "state_size"))
    assert (layer.conv_state, layer.ssm_state) == ((kernel - 1) * (inner + 2 * groups * state), state * inner)


@pytest.mark.parametrize("settings, says", [
    (dict(context=0), "context"), (dict(context=-5), "context"), (dict(context=2.5), "context"),
    (dict(context=True), "context"),
    (dict(context=2**40), "context"), (dict(context=8, sequences=9), "sequences"), (dict(context=512, ubatch=0), "ubatch"),
    (dict(context=512, kv="q9"), "q9"), (dict(context=512, kv=("f16",)), "pair"), (dict(context=512, kv=None), "kv"),
    (dict(context=512, engine="ollama"), "ollama"), (dict(context=512, kv="fp8"), "fp8"),
    (dict(context=512, kv=("f16", "q8_0"), flash_attention=False), "flash attention")])
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(LabError, match=says) as refused:
        cache_bytes(model_spec("llama-3-8b"), **settings)
    assert "\n" not in str(refused.value)


def test_heads_that_a_cache_type_cannot_hold():
    spec = from_config({**entry("llama-3-8b").config, "head_dim": 80}, "odd heads")
    with pytest.raises(LabError, match="80"):
        cache_bytes(spec, 512, "q8_0")


@given(st.sampled_from(list(entries())), st.integers(1, 2**20), st.integers(1, 8), st.booleans(),
       st.sampled_from(["f32", "f16", "q8_0", "q4_0"]))
@settings(max_examples=150, deadline=None)
def test_a_longer_context_never_costs_less(name, context, sequences, unified, kv):
    spec = model_spec(name)
    context = max(context, sequences)
    try:
        here = cache_bytes(spec, context, kv, sequences=sequences, unified=unified)
        more = cache_bytes(spec, context + 256, kv, sequences=sequences, unified=unified)
    except LabError:
        return
    assert 0 <= here.kv <= more.kv and here.recurrent == more.recurrent
    assert sum(here.by_layer) == here.kv and here.cells >= context - sequences + 1
