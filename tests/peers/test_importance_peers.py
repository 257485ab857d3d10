"""Importance matrices against llama.cpp's own: the same tensors, counts and sums on the same tokens, and files it takes.

llama-cpp-python has no llama-imatrix, but llama.cpp calls back at every matmul: `llama_sums` adds up there what llama-imatrix
would. A real llama-imatrix of this version, built once by hand, gave the same (SmolLM2 in F32, 2 chunks of 512, cache in F32:
each tensor's sums within 1.4e-6 of ours, single columns within 6e-5; its file read and saved again is equal to the byte).
"""

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch
from llama_engine import llama_cpp, quantize
from llama_sums import llama_sums
from runtime_models import VOCAB, make

import llmlab
from llmlab import quality
from llmlab.gguf import read_gguf
from llmlab.runtime.decoder import Decoder

pytestmark = pytest.mark.peers

CONTEXT = 80
IDS = np.random.default_rng(3).integers(3, VOCAB, 2 * CONTEXT)
KINDS = ("llama-biased", "mixtral", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "starcoder2",
         "gpt-oss")
SAME = 2e-6         # of a tensor's sums: the two engines add in other orders
BY_TABLE = 1e-3     # ggml looks gelu up in a table of half-precision numbers


def apart(ours: quality.Importance, sums, counts) -> float:
    """The largest difference of any tensor, all its columns together, as a share of its sums; names and counts are the same."""
    assert set(ours) == set(sums)
    for name, count in counts.items():
        assert ours.counts[name].tolist() == count.tolist(), name
    return max(float(np.abs(ours.sums[name] - sums[name]).sum() / sums[name].sum()) for name in sums)


def without(found: quality.Importance, name: str) -> quality.Importance:
    return replace(found, sums={n: sums for n, sums in found.sums.items() if n != name})


def as_llama_cpp_turns(model):
    """gpt-oss: llama.cpp rounds the bounds of YaRN, which OpenAI's code and transformers do not."""
    model.config.rope_parameters["truncate"] = True
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model


@pytest.mark.parametrize("name", KINDS)
def test_tiny_models_of_every_kind(tmp_path, name):
    """The packed model, the lean decoder and transformers' own model: all three give llama.cpp's sums."""
    path = tmp_path / "tiny.gguf"
    dense = make(name, path, "F32")
    theirs = llama_sums(path, IDS.reshape(2, CONTEXT), output=True)
    packed, _ = llmlab.load(path, device="cpu", dtype="float32", strategy="compact")
    models = [packed, dense, Decoder.open(path, torch.float32, "fast")]
    if name == "gpt-oss":
        models = [as_llama_cpp_turns(model) for model in models[:2]]
    for model in models:
        found = quality.importance(model, None, IDS, CONTEXT, progress=False, output=True)
        assert (found.chunks, found.context) == (2, CONTEXT)
        assert ("token_embd.weight" in found) == dense.config.tie_word_embeddings       # which llama-imatrix leaves out
        off = apart(without(found, "token_embd.weight"), *theirs)
        print(name, type(model).__name__, off)
        assert off < (BY_TABLE if name.startswith(("gemma", "starcoder")) else SAME)


@pytest.fixture(scope="module")
def unpacked(smollm2, tmp_path_factory):
    """SmolLM2's weights in F32, before which llama.cpp rounds no activation."""
    target = tmp_path_factory.mktemp("importance") / "f32.gguf"
    assert quantize(smollm2, target, "F32", allow_requantize=True)
    yield target
    target.unlink()


def test_a_chunk_of_the_real_model(unpacked):
    model, tokenizer = llmlab.load(unpacked, device="cpu", dtype="float32")
    tokens = quality.tokens_of(tokenizer)
    found = quality.importance(model, None, tokens, chunks=1, progress=False)
    sums, counts = llama_sums(unpacked, [tokens.chunk(0, 512)])
    print(f"\nsums apart {apart(found, sums, counts):.1e}, the worst column "
          f"{max(float(np.abs(found.sums[name] / sums[name] - 1).max()) for name in sums):.1e}")
    assert len(found) == 210 and apart(found, sums, counts) < SAME


def entries_of(importance: quality.Importance) -> ctypes.Array:
    """As llama-quantize hands it to llama_model_quantize."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    entries.kept = [np.ascontiguousarray(importance[name]) for name in importance]
    for entry, name, values in zip(entries, importance, entries.kept, strict=False):
        entry.name, entry.data, entry.size = name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size
    return entries


def test_llama_cpp_quantizes_with_our_file_as_with_its_own_sums(tmp_path):
    """Codes that lie at an edge may go the other way: few of the bytes."""
    make("mixtral", tmp_path / "tiny.gguf", "F32")
    model, _ = llmlab.load(tmp_path / "tiny.gguf", device="cpu", dtype="float32", strategy="compact")
    quality.importance(model, None, IDS, CONTEXT, progress=False).save(tmp_path / "ours.gguf")
    sums, counts = llama_sums(tmp_path / "tiny.gguf", IDS.reshape(2, CONTEXT))
    theirs = quality.Importance(sums, counts, 2, CONTEXT)
    made = {}
    for name, given in (("ours", quality.read_importance(tmp_path / "ours.gguf")), ("theirs", theirs), ("none", None)):
        assert quantize(tmp_path / "tiny.gguf", tmp_path / name, "Q4_K_S", given and entries_of(given)), name
        file = read_gguf(tmp_path / name)
        made[name] = np.concatenate([file.data(tensor) for tensor in sorted(theirs) if "inp" not in tensor])
    off, without = (float((made["ours"] != made[name]).mean()) for name in ("theirs", "none"))
    print(f"\nbytes that differ: {off:.2%}; from quantizing without importance: {without:.1%}")
    assert off < 0.001 and without > 0.2
