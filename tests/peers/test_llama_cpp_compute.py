"""The compute buffers are those that llama.cpp prints as it makes a context: on the CPU, any context, batch and cache.

Contexts are planned and not allocated (no_alloc), so that files may be hollow and models of any size take a moment. Cards
are compared in tests/test_graphs.py, with what a planning build printed.
"""

from dataclasses import replace

import pytest
from llama_engine import TYPES, context_log, loaded
from test_llama_cpp_cache import engine_settings
from tiny_gguf import write_hollow, write_tiny
from tiny_models import _BASE, CONFIGS, tiny_spec

from llmlab.catalog import entries
from llmlab.gguf import read_gguf
from llmlab.graphs import Request, compute_buffers, family_of
from llmlab.shapes import from_config, from_gguf, model_spec
from llmlab.units import MIB

pytestmark = pytest.mark.peers

PRINTED = 0.0051 * MIB
PLAN = {"no_alloc": True, "load_mode": 0}
SETTINGS = [       # context, ubatch, flash attention, then what differs from one sequence and an f16 cache
    (4096, 512, True, {}), (4096, 512, False, {}), (32768, 512, True, {}), (16384, 512, False, {}), (300, 512, True, {}),
    (300, 512, False, {}), (1, 512, True, {}), (4096, 64, True, {}), (4096, 64, False, {}), (4096, 128, True, {}),
    (8192, 1024, True, {}), (8192, 1024, False, {}), (8192, 2048, True, {}), (8192, 2048, False, {}), (8192, 1, True, {}),
    (4096, 512, True, {"kv": ("q8_0", "q8_0")}), (16384, 512, True, {"kv": ("q4_0", "q8_0")}),
    (4096, 512, False, {"kv": ("q8_0", "f16")}), (8192, 256, True, {"kv": ("f32", "f32")}),
    (8192, 512, True, {"kv": ("bf16", "bf16")}),
    (8192, 512, True, {"sequences": 4}), (8192, 512, False, {"sequences": 4}), (10001, 100, True, {"sequences": 7}),
    (8192, 512, True, {"sequences": 4, "unified": True}), (8192, 512, False, {"sequences": 4, "unified": True}),
    (8192, 128, False, {"sequences": 2}), (8192, 512, True, {"swa_full": True}), (16384, 512, False, {"swa_full": True})]
WRITTEN = ["llama", "llama-odd-288", "llama-biased", "qwen2", "qwen3", "qwen3moe", "qwen2moe", "mixtral", "gemma2", "gemma3",
           "phi3", "gpt-oss", "olmo3", "deepseek3", "llama4", "cohere2"]
SOME = SETTINGS[::3]
FURTHER = {        # families without a tiny config of their own, and what llama.cpp wants said of them
    "arcee": {}, "ernie4_5": {}, "internlm2": {}, "nemotron": {}, "stablelm": {}, "olmo": {}, "gpt2": {},
    "hunyuan_v1_dense": {}, "gpt_neox": {"use_parallel_residual": True},
    "qwen2_vl": {"rope.dimension_sections": (16, 16, 0, 0)},
    "qwen3_vl": {"rope.dimension_sections": (16, 16, 0, 0), "n_deepstack_layers": 3}}


def differences(spec, model, settings) -> list[str]:
    """What differs from llama.cpp by more than its print rounds: setting, its MiB, ours."""
    found = []
    for context, ubatch, flash, more in settings:
        told = context_log(model, **engine_settings(context, ubatch=ubatch, flash_attention=flash, **more))
        if told is None:                # a cache this model cannot have
            continue
        ours = compute_buffers(spec, Request(context, ubatch, flash, **more)).host.bytes
        theirs = sum(told.compute.values())
        if abs(ours - theirs * MIB) > PRINTED:
            found.append(f"{context} {ubatch} {flash} {more}: {theirs:.2f} {ours / MIB:.2f}")
    return found


def test_smollm2_itself(smollm2):
    """The real file; allocated, not only planned."""
    spec = from_gguf(read_gguf(smollm2))
    with loaded(smollm2) as model:
        assert differences(spec, model, [s for s in SETTINGS if s[1] < 2048]) == []


@pytest.mark.parametrize("name", WRITTEN)
def test_written_models(name, tmp_path):
    """Of an ordinary vocabulary, so that logits, feed-forward and attention each are the peak somewhere."""
    assert name in CONFIGS
    spec = tiny_spec(name, vocab_size=4096)
    write_hollow(spec, tmp_path / "hollow.gguf")
    with loaded(tmp_path / "hollow.gguf", **PLAN) as model:
        assert differences(spec, model, SETTINGS) == []


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(WRITTEN)))
def test_every_other_family(name, tmp_path):
    spec = tiny_spec(name, vocab_size=4096)
    write_hollow(spec, tmp_path / "hollow.gguf")
    halves = any(b.key_dim % 32 for b in spec.layers if b.attends)           # llama.cpp aborts on such rows in blocks
    with loaded(tmp_path / "hollow.gguf", **PLAN) as model:
        assert differences(spec, model, [s for s in SOME if not (halves and s[3].get("kv"))]) == []


@pytest.mark.parametrize("model_type", FURTHER)
def test_families_of_checkpoints(model_type, tmp_path):
    fields = {**_BASE, "model_type": model_type, "vocab_size": 4096, "num_hidden_layers": 6}
    spec = from_config(fields, model_type)
    spec = replace(spec, metadata={**spec.metadata, **FURTHER[model_type]})
    write_hollow(spec, tmp_path / "hollow.gguf")
    with loaded(tmp_path / "hollow.gguf", **PLAN) as model:
        assert differences(spec, model, SOME) == []


def test_more_than_thirty_settings():
    assert len(SETTINGS) >= 28 and len(SETTINGS) * len(WRITTEN) > 400
    assert {ubatch for _, ubatch, _, _ in SETTINGS} >= {64, 128, 512, 1024, 2048}
    assert set(TYPES) >= {type for *_, more in SETTINGS for type in more.get("kv", ())}


def test_planned_is_allocated(tmp_path):
    """A plan and a real context are the same size; and only the latter counts that generation asks for a row a sequence."""
    spec = tiny_spec("qwen3moe")
    write_tiny(spec, tmp_path / "tiny.gguf")
    fewer = [(8192, 1, True, {"sequences": 2}), (8192, 3, False, {"sequences": 4}), (8192, 33, True, {"sequences": 40})]
    with loaded(tmp_path / "tiny.gguf") as model:
        assert differences(spec, model, [*SOME, *fewer]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", entries())
def test_catalogue_at_full_size(name, tmp_path):
    """Every model; two settings each, three for one in three."""
    spec = model_spec(name)
    assert family_of(spec).verified
    write_hollow(spec, tmp_path / "hollow.gguf")
    settings = [(8192, 512, True, {}), (4096, 256, False, {"sequences": 2})]
    if len(name) % 3 == 0:
        settings.append((32768, 1024, True, {"kv": ("q8_0", "q8_0")}))
    with loaded(tmp_path / "hollow.gguf", **PLAN) as model:
        assert differences(spec, model, settings) == []
