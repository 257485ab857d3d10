"""Shapes: every catalogue model's parameters follow from its config; layers are of the right kind; bad names are told."""

import json

import pytest
from hub_server import HubServer

from llmlab.catalog import entries, entry
from llmlab.errors import BadConfig, BadFile, LabError, UnknownName, Unreachable
from llmlab.gguf import write_gguf
from llmlab.shapes import from_config, model_spec

# The converter drops the 64 padding rows of Gemma 3's multimodal checkpoints, so a GGUF has that much less.
ROWS_DROPPED = {"gemma-3-4b": 64 * 2560, "gemma-3-12b": 64 * 3840, "gemma-3-27b": 64 * 5376}


@pytest.mark.parametrize("name", list(entries()))
def test_parameter_counts_follow_from_shapes(name):
    row, spec = entry(name), model_spec(name)
    dropped = ROWS_DROPPED.get(name, 0)
    assert spec.architecture == row.architecture
    assert spec.params == row.params_total - dropped
    assert spec.params_active == row.params_active - dropped


@pytest.mark.parametrize("name, elements", [  # float32 elements, from the difference of published BF16 and Q8_0 files
    ("llama-4-scout", 4428864), ("ministral-3-8b", 282624), ("qwen3-0.6b", 65536), ("qwen3-14b", 424960), ("phi-4", 414720),
    ("qwen3.5-122b-a10b", 39979008), ("qwen3.6-35b-a3b", 22213248), ("glm-4.5-air", 25198336), ("glm-4.7-flash", 6286976),
    ("minimax-m2", 49603072)])
def test_which_tensors_stay_float32(name, elements):
    assert sum(t.elements for t in model_spec(name).tensors if t.type == "F32") == elements


def test_a_multi_token_prediction_block_is_counted_where_the_file_holds_it():
    with_block = model_spec("qwen3.8-27b", mtp=True)
    assert sum(t.elements for t in with_block.tensors if t.type == "F32") == 2671616    # its published files hold it
    assert sum(t.elements for t in with_block.tensors) == 27320697856
    assert [b.mtp for b in with_block.layers].count(True) == 1
    assert with_block.params == model_spec("qwen3.8-27b").params


def kinds(name):
    found = {}
    for layer in model_spec(name).blocks:
        found[layer.mixer] = found.get(layer.mixer, 0) + 1
    return found


@pytest.mark.parametrize("name, expected", [
    ("llama-3-8b", {"full": 32}), ("gemma-2-2b", {"sliding": 13, "full": 13}), ("gemma-3-270m", {"sliding": 15, "full": 3}),
    ("gpt-oss-20b", {"sliding": 12, "full": 12}), ("llama-4-scout", {"chunked": 36, "full": 12}), ("deepseek-v3", {"mla": 61}),
    ("qwen3-next-80b-a3b", {"recurrent": 36, "full": 12}), ("nemotron-nano-9b-v2", {"recurrent": 27, "full": 4, "none": 25}),
    ("granite-4.0-h-micro", {"recurrent": 36, "full": 4}), ("lfm2-1.2b", {"recurrent": 10, "full": 6}),
    ("olmo-3-7b", {"sliding": 24, "full": 8}), ("phi-3.5-mini", {"full": 32}), ("gemma-4-e2b", {"sliding": 28, "full": 7})])
def test_layer_kinds(name, expected):
    assert kinds(name) == expected


def test_shared_kv_layers_own_no_cache():
    spec = model_spec("gemma-4-e2b")
    assert sum(layer.owns_kv for layer in spec.blocks) == 15
    assert not any(t.name.endswith("attn_k.weight") for t in spec.tensors if t.layer >= 15)


def test_explicit_head_dim_is_not_derived():
    layer = model_spec("mistral-nemo-12b").layers[0]
    assert (layer.heads, layer.key_dim, layer.kv_heads) == (32, 128, 8) and 5120 // 32 != 128


def test_a_window_llama_cpp_ignores_is_remembered():
    layer = model_spec("mistral-7b-v0.1").layers[0]
    assert layer.mixer == "full" and layer.window == 0 and layer.declared_window == 4096


def test_rope_tables():
    names = {t.name: t.shape for t in model_spec("llama-3.1-8b").tensors}
    assert names["rope_freqs.weight"] == (64,)
    assert {t.shape for t in model_spec("phi-3.5-mini").tensors if t.name.startswith("rope_factors")} == {(48,)}
    assert "rope_freqs.weight" not in model_spec("llama-3-8b").by_name


def test_a_config_file_its_folder_and_its_fields_give_the_same_model(tmp_path):
    fields = dict(entry("qwen3-4b").config)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(fields))
    specs = [model_spec(fields), model_spec(tmp_path / "m"), model_spec(str(tmp_path / "m" / "config.json"))]
    assert len({tuple((t.name, t.shape) for t in s.tensors) for s in specs} | {
        tuple((t.name, t.shape) for t in model_spec("qwen3-4b").tensors)}) == 1
    assert specs[1].name == "m"


def test_a_path_means_the_path(tmp_path, monkeypatch):
    """A user's own folder named like a catalogue model is reached by ./name; a bare name is the catalogue."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-3-8b").mkdir()
    (tmp_path / "llama-3-8b" / "config.json").write_text(json.dumps({**entry("llama-3-8b").config, "num_hidden_layers": 3}))
    assert len(model_spec("./llama-3-8b").layers) == len(model_spec("llama-3-8b/").layers) == 3
    assert len(model_spec("llama-3-8b").layers) == 32


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "config.json"
    for layers in (2, 3):
        path.write_text(json.dumps({**entry("llama-3-8b").config, "num_hidden_layers": layers, "note": "x" * layers}))
        assert len(model_spec(path).layers) == layers
    assert model_spec(path) is model_spec(path)


def test_specs_are_shared_and_cannot_be_changed():
    with pytest.raises(TypeError):
        model_spec("llama-3-8b").metadata["vocab_size"] = 1


def test_a_gguf_is_its_own_tensors(tmp_path):
    spec = model_spec("smollm2-135m")
    path = tmp_path / "tiny.gguf"
    metadata = {"general.architecture": "llama", "general.file_type": 7, "llama.block_count": 1, "llama.embedding_length": 64,
                "llama.attention.head_count": 2, "llama.feed_forward_length": 128, "llama.context_length": 512}
    write_gguf(path, metadata, [("token_embd.weight", (64, 10), "Q8_0", bytes(680)), ("output_norm.weight", (64,), "F32",
                                                                                     bytes(256))])
    read = model_spec(path)
    assert (read.stored, read.vocab, read.context_train, read.tied) == ("Q8_0", 10, 512, True)
    assert read.file_bytes == path.stat().st_size and read.header_bytes < read.file_bytes
    assert {t.name: t.type for t in read.tensors} == {"token_embd.weight": "Q8_0", "output_norm.weight": "F32"}
    assert spec.architecture == read.architecture


def test_a_projector_is_told_from_a_model(tmp_path):
    path = tmp_path / "mmproj.gguf"
    write_gguf(path, {"general.architecture": "clip"}, [("v.patch_embd.weight", (4, 4), "F32", bytes(64))])
    with pytest.raises(BadFile, match="projector"):
        model_spec(path)


@pytest.mark.parametrize("name", ["lama-3-8b", "", "  ", "qwen", None, 3, "x" * 5000, "no such\nthing"])
def test_a_name_that_is_none_gets_one_line(name):
    with pytest.raises(LabError) as refused:
        model_spec(name)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_did_you_mean():
    with pytest.raises(UnknownName, match="llama-3-8b"):
        model_spec("lama-3-8b")


@pytest.mark.parametrize("change, says", [
    ({"num_hidden_layers": 10**6}, "num_hidden_layers"), ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"hidden_size": -4096}, "hidden_size"), ({"hidden_size": "big"}, "hidden_size"), ({"vocab_size": 10**18}, "vocab_size"),
    ({"num_attention_heads": 0}, "num_attention_heads"), ({"intermediate_size": float("nan")}, "intermediate_size"),
    ({"hidden_size": None}, "hidden_size"), ({"model_type": "mystery"}, "mystery"), ({"model_type": None}, "model_type"),
    ({"num_key_value_heads": True}, "num_key_value_heads"), ({"head_dim": 1.5}, "head_dim"),
    ({"num_key_value_heads": 7}, "evenly"), ({"num_key_value_heads": 64}, "evenly"),
    ({"num_local_experts": 65536, "moe_intermediate_size": 2**30}, "weights")])
def test_absurd_configs_are_refused_by_the_field(change, says):
    with pytest.raises(BadConfig, match=says) as refused:
        from_config({**entry("llama-3-8b").config, **change}, "absurd")
    assert "\n" not in str(refused.value)


def test_missing_files_and_wrong_files(tmp_path):
    (tmp_path / "x.json").write_text("[1, 2")
    (tmp_path / "empty").mkdir()
    for bad in (tmp_path / "x.json", tmp_path / "empty", tmp_path / "gone.gguf", "./gone/config.json"):
        with pytest.raises(LabError) as refused:
            model_spec(bad)
        assert "\n" not in str(refused.value)


# ---- hub ids, against a server on this machine --------------------------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def safetensors(spec) -> bytes:
    """A checkpoint of the right shapes: header, and data that nobody should read."""
    header, at = {}, 0
    for tensor in spec.tensors:
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + 2 * tensor.elements]}
        at += 2 * tensor.elements
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def test_a_hub_id_is_read_by_range_and_nothing_is_downloaded(hub):
    fields = {**entry("qwen3-0.6b").config, "num_hidden_layers": 2, "hidden_size": 512, "vocab_size": 8192}
    spec = from_config(fields, "small", source="catalogue")
    repo = hub.folder / "someone" / "small"
    repo.mkdir(parents=True)
    (repo / "config.json").write_text(json.dumps(fields))
    (repo / "model.safetensors").write_bytes(safetensors(spec))
    read = model_spec("someone/small")
    assert (read.source, read.params, read.checkpoint) == ("hub", spec.params, spec.params)
    assert sum(hub.sent.values()) < (repo / "model.safetensors").stat().st_size / 10


def test_a_gguf_on_a_hub_is_chosen_by_its_quant(hub):
    repo = hub.folder / "someone" / "small-GGUF"
    repo.mkdir(parents=True)
    metadata = {"general.architecture": "llama", "general.file_type": 7, "llama.block_count": 1, "llama.embedding_length": 256,
                "llama.attention.head_count": 2, "llama.feed_forward_length": 128}
    for quant in ("Q8_0", "Q4_0"):
        size = {"Q8_0": 34, "Q4_0": 18}[quant] * 8 * 16384
        write_gguf(repo / f"small-{quant}.gguf", {**metadata, "general.file_type": {"Q8_0": 7, "Q4_0": 2}[quant]},
                   [("token_embd.weight", (256, 16384), quant, bytes(size))])
    read = model_spec("someone/small-GGUF:Q4_0")
    assert (read.stored, read.vocab) == ("Q4_0", 16384) and read.file_bytes > 2 * 10**6
    assert model_spec("someone/small-GGUF/small-Q8_0.gguf").stored == "Q8_0"
    with pytest.raises(UnknownName, match="Q8_0"):
        model_spec("someone/small-GGUF")
    with pytest.raises(LabError):
        model_spec("someone/nothing-here")


def test_offline_it_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(Unreachable) as refused:
        model_spec("someone/small")
    assert "\n" not in str(refused.value) and "without a network" in str(refused.value)
