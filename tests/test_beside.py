"""A projector, a draft model and multi-token prediction: terms of their own, by what llama.cpp loads."""

import numpy as np
import pytest

from llmlab.errors import LabError
from llmlab.fitting import fit
from llmlab.gguf import write_gguf
from llmlab.memory import cache_bytes, weights
from llmlab.projectors import projector
from llmlab.shapes import model_spec
from llmlab.units import GIB, MIB

METADATA = {"general.architecture": "clip", "clip.vision.image_size": 336, "clip.vision.patch_size": 14,
            "clip.vision.embedding_length": 1024, "clip.vision.feed_forward_length": 4096,
            "clip.vision.attention.head_count": 16}


def write(path, metadata=METADATA):
    write_gguf(path, metadata, [("v.patch_embd.weight", (10, 10), "F32", lambda: np.zeros(100, np.float32).tobytes()),
                                ("mm.0.bias", (7,), "F32", lambda: np.zeros(7, np.float32).tobytes())])
    return path


def test_a_projector_from_its_file_or_its_size(tmp_path):
    found = projector(write(tmp_path / "mmproj.gguf"))
    assert found.weights == 416 + 32
    low, best, high = found.compute
    assert best == 4 * (24 * 24 * (4096 + 3 * 1024) + 3 * 336 * 336) and low < best and high > 4 * 16 * (24 * 24) ** 2
    assert projector("850 MiB").weights == projector(850 * MIB).weights == 850 * MIB
    assert projector(found) is found
    report = fit("gemma-3-12b", ["rtx-3060-12gb"] * 2, projector=tmp_path / "mmproj.gguf")
    term = next(t for t in report.terms if t.name == "projector")
    assert term.device == "gpu0" and term.kind == "modelled" and term.low >= found.weights
    assert report.to_dict()["devices"]["gpu0"]["projector"] == term.bytes
    assert fit("gemma-3-12b", None, projector="1 GiB", host="64 GiB").total("projector", "host") > GIB


@pytest.mark.parametrize("given", ["lots", 0, -1, "", "gone.gguf", 2**50, 3.5j, ["a"]])
def test_no_projector(given):
    with pytest.raises(LabError) as refused:
        fit("gemma-3-12b", "rtx-3060-12gb", projector=given)
    assert "\n" not in str(refused.value)


def test_a_model_is_no_projector(tmp_path):
    with pytest.raises(LabError, match="no projector"):
        projector(write(tmp_path / "model.gguf", METADATA | {"general.architecture": "llama"}))


def test_a_draft_model_has_weights_and_a_cache_of_its_own():
    spec, draft = model_spec("qwen2.5-7b"), model_spec("qwen2.5-0.5b")
    report = fit(spec, "rtx-3060-12gb", context=16384, kv="q8_0", draft=draft, draft_quant="Q8_0")
    w = weights(draft, "Q8_0")
    assert report.total("draft", "gpu0") == sum(w.by_layer) + w.output + sum(w.card_padding)
    assert report.total("draft", "host") == w.embedding
    assert report.total("draft_cache") == cache_bytes(draft, 16384).kv            # f16 whatever the model's own cache is
    without = fit(spec, "rtx-3060-12gb", context=16384, kv="q8_0")
    more = sum(t.bytes for t in report.terms if t.name.startswith("draft") and t.device == "gpu0")
    assert report.devices["gpu0"].used == without.devices["gpu0"].used + more
    assert fit(spec, None, draft=draft, host="64 GiB").total("draft", "host") == weights(draft, "Q4_K_M").padded


def test_a_draft_takes_room_from_the_layers():
    alone, drafted = (fit("qwen2.5-32b", "rtx-3060-12gb", draft=d) for d in (None, "qwen2.5-1.5b"))
    assert drafted.gpu_layers < alone.gpu_layers
    device = drafted.devices["gpu0"]
    assert device.high <= device.free


def test_multi_token_prediction_is_loaded_where_asked():
    spec = model_spec("glm-4.5-air")
    w = weights(spec, "Q4_K_M")
    report = fit(spec, ["rtx-pro-6000-blackwell-96gb"] * 2, mtp=True, context=4096)
    block = next(layer for layer in spec.layers if layer.mtp)
    cache = 4096 * 2 * block.kv_heads * (block.key_dim + block.value_dim)
    assert report.total("mtp") == w.by_layer[-1] + w.card_padding[-2] + cache
    assert fit(spec, ["rtx-pro-6000-blackwell-96gb"] * 2, context=4096).total("mtp") == 0


def test_drafting_keeps_rows_of_state_to_go_back_to():
    plain = fit("qwen3.5-9b", "rtx-4090-24gb", context=4096)
    spec = plain.spec
    if any(layer.mtp for layer in spec.layers):
        assert fit(spec, "rtx-4090-24gb", context=4096, mtp=True).total("recurrent") == 4 * plain.total("recurrent")
    assert cache_bytes(spec, 4096, drafted=3).recurrent == 4 * plain.total("recurrent")


@pytest.mark.parametrize("settings, says", [
    (dict(draft="llama-3-8b"), "vocabulary"), (dict(mtp=True), "no multi-token"), (dict(draft_quant="Q8_0"), "draft"),
    (dict(draft="qwen2.5-0.5b", draft_quant="NF4"), "llama.cpp"), (dict(draft="no-such-model"), "did you mean|no model"),
    (dict(draft="qwen2.5-0.5b", engine="vllm", quant="BF16"), "vllm has no draft"),
    (dict(projector="1 GiB", engine="transformers", quant="NF4"), "projector")])
def test_what_cannot_be_is_said(settings, says):
    with pytest.raises(LabError, match=says) as refused:
        fit("qwen2.5-7b", "rtx-4090-24gb", **settings)
    assert "\n" not in str(refused.value)


def test_one_way_to_draft():
    with pytest.raises(LabError, match="choose draft or mtp"):
        fit("glm-4.5-air", "rtx-4090-24gb", draft="glm-4.5-air", mtp=True)
