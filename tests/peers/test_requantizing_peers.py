"""llama.cpp quantizes the same files: ours are the same to the byte, header included; and it runs what we convert."""

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoints
import runtime_models
import vocabularies
from llama_engine import TYPES, llama_cpp, quantize
from llama_model import llama_model
from test_requantizing import importance_of

import llmlab
from llmlab.gguf import read_gguf, write_gguf
from llmlab.requantizing import planned, quantize_gguf
from llmlab.vocabulary import tokenizer_of

pytestmark = [pytest.mark.peers, pytest.mark.slow]

LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")
OTHERS = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_S", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "TQ1_0", "TQ2_0", "MXFP4_MOE")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    known, folder = {}, tmp_path_factory.mktemp("sources")

    def make(name, mix="F32"):
        path = folder / f"{name}-{mix}.gguf"
        if path not in known:
            runtime_models.make(name, path, mix, num_hidden_layers=1, intermediate_size=256)
            known[path] = path
        return path

    return make


def theirs(source, target, quant: str, matrix=None, file: str = "", types=None, **settings) -> None:
    """llama_model_quantize with what llama-quantize would hand it."""
    if matrix is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()
        kept = {name: np.ascontiguousarray(matrix[name], np.float32).ravel() for name in matrix}
        for entry, (name, numbers) in zip(entries, kept.items(), strict=False):
            entry.name, entry.size = name.encode(), numbers.size
            entry.data = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        keys = {"file": file, "dataset": matrix.datasets[0], "entries_count": len(matrix), "chunks_count": matrix.chunks}
        said = (llama_cpp.llama_model_kv_override * (len(keys) + 1))()
        for one, (key, value) in zip(said, keys.items(), strict=False):
            one.key, one.tag = f"quantize.imatrix.{key}".encode(), 3 if isinstance(value, str) else 0
            if isinstance(value, str):
                one.value.val_str = value.encode()
            else:
                one.value.val_i64 = value
        settings |= {"importance": entries, "kv_overrides": said}
    if types:
        overrides = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
        for one, (pattern, type) in zip(overrides, types.items(), strict=False):
            one.pattern, one.type = pattern.encode(), TYPES[type.lower()]
        settings["tt_overrides"] = overrides
    assert quantize(source, target, quant, **settings), quant


def differences(one: Path, two: Path) -> list[str]:
    """Where two files differ, in words."""
    if one.read_bytes() == two.read_bytes():
        return []
    a, b = read_gguf(one), read_gguf(two)
    found = [name for name in {**a.tensors, **b.tensors} if name not in a.tensors or name not in b.tensors
             or a.tensors[name].type != b.tensors[name].type or not np.array_equal(a.data(name), b.data(name))]
    return found or [f"{list(a.metadata.items())[-6:]} and {list(b.metadata.items())[-6:]}"]


@pytest.mark.parametrize(("name", "quants"), [("llama", (*LEGACY, *OTHERS)), ("mixtral", ("Q4_0", "Q4_K_M", "MXFP4_MOE"))])
def test_the_same_file_to_the_byte(sources, tmp_path, name, quants):
    source, wrong = sources(name), {}
    for quant in quants:
        theirs(source, tmp_path / "theirs.gguf", quant)
        quantize_gguf(source, tmp_path / "ours.gguf", quant)
        if found := differences(tmp_path / "ours.gguf", tmp_path / "theirs.gguf"):
            wrong[quant] = found
    assert not wrong


@pytest.mark.parametrize(("name", "quants"), [
    ("llama", ("Q4_0", "Q4_K_M", "Q2_K", "Q6_K", "IQ4_XS", "IQ3_XXS", "IQ2_XS", "IQ1_S")), ("mixtral", ("Q5_0", "Q4_K_M"))])
def test_the_same_file_with_an_importance_matrix(sources, tmp_path, name, quants):
    source, wrong, matrix = sources(name), {}, importance_of(sources(name))
    matrix.save(tmp_path / "imatrix.gguf")
    file = str(tmp_path / "imatrix.gguf")
    for quant in quants:
        theirs(source, tmp_path / "theirs.gguf", quant, matrix, file)
        quantize_gguf(source, tmp_path / "ours.gguf", quant, file)
        if found := differences(tmp_path / "ours.gguf", tmp_path / "theirs.gguf"):
            wrong[quant] = found
    assert not wrong


@pytest.mark.parametrize("mix", ["F16", "Q8_0", "few"])
def test_the_type_of_the_source_does_not_matter(sources, tmp_path, mix):
    source = sources("gemma3", mix)
    theirs(source, tmp_path / "theirs.gguf", "Q5_0", allow_requantize=True)
    quantize_gguf(source, tmp_path / "ours.gguf", "Q5_0", allow_requantize=True)
    assert not differences(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def test_types_of_ones_own_are_its_tensor_types(tmp_path):
    """Also what counts on through the layers behind those that were chosen, and what stands for --pure and the like."""
    source = tmp_path / "source.gguf"
    runtime_models.make("llama", source, "F16", num_hidden_layers=8)
    types = {r"blk\.(0|2)\.attn_v": "Q8_0", "attn_v": "Q5_0", "ffn_down": "Q4_1", r"blk\.3\.": "Q5_1", "attn_output": "Q8_0"}
    for ours, settings in ((types, {"types": types}), ({r"blk\.(0|2)\.": "Q8_0"}, {"types": {r"blk\.(0|2)\.": "Q8_0"}}),
                           ({"": "Q4_0"}, {"pure": True}), ({"^output.weight": "keep"}, {"quantize_output_tensor": False}),
                           ({"^output.weight": "Q5_0"}, {"output_tensor_type": TYPES["q5_0"]}),
                           ({"token_embd": "Q5_1"}, {"token_embedding_type": TYPES["q5_1"]})):
        theirs(source, tmp_path / "theirs.gguf", "Q4_0" if "pure" in settings else "Q3_K_M", **settings)
        found = {t.name: t.type for t in read_gguf(tmp_path / "theirs.gguf").tensors.values()}
        plan = planned(source, "Q4_0" if "pure" in settings else "Q3_K_M", types=ours)
        assert {row.name: row.type for row in plan.rows} == found, settings
        assert plan.file_bytes == (tmp_path / "theirs.gguf").stat().st_size


@pytest.fixture(scope="module")
def real(smollm2, tmp_path_factory):
    """SmolLM2's first layers in float16: the numbers of its file, for no other weights of it are at hand."""
    file, target = read_gguf(smollm2), tmp_path_factory.mktemp("real") / "smollm2-f16.gguf"
    kept = [t for t in file.tensors.values() if not t.name.startswith("blk.") or int(t.name.split(".")[1]) < 3]

    def half(t):
        rows = file.data(t.name).reshape(-1, llmlab.formats.FORMATS[t.type].bytes(t.shape[0]))
        numbers = llmlab.formats.dequantize(rows, t.type)
        return numbers.to(torch.float16 if len(t.shape) > 1 else torch.float32).numpy()

    write_gguf(target, file.typed_metadata() | {"llama.block_count": ("uint32", 3), "general.file_type": ("uint32", 1)},
               [(t.name, t.shape, "F16" if len(t.shape) > 1 else "F32", lambda t=t: half(t)) for t in kept])
    return target


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K_M"])
def test_real_weights_give_the_same_file(real, tmp_path, quant):
    theirs(real, tmp_path / "theirs.gguf", quant)
    quantize_gguf(real, tmp_path / "ours.gguf", quant)
    assert not differences(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.parametrize("name", ["llama", "llama3", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_llama_cpp_runs_what_was_converted(tmp_path, name):
    """Its logits are those of transformers, its tokens those of the tokenizer."""
    words = checkpoints.sentencepiece_model(vocabularies.spm()) if name.startswith(("mis", "gem")) else checkpoints.byte_level()
    reference = checkpoints.folder(tmp_path / "model", name, words)
    quantize_gguf(tmp_path / "model", tmp_path / "model.gguf", "F32")
    tokenizer = tokenizer_of(read_gguf(tmp_path / "model.gguf"))
    ids = torch.randint(5, reference.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), llama_model(tmp_path / "model.gguf", 64, exact=True) as model:
        expected, found = (one(ids).logits[0, 32:].double().log_softmax(-1) for one in (reference, model))
        texts = [text for text in vocabularies.TEXTS if len(tokenizer(text)["input_ids"]) <= len(text.encode()) + 1
                 and not any(word in text for word in ("<|", "<tool", "<unk>", "<s>"))]      # which it does not look for here
        assert len(texts) > 15      # of the others the model has no room for all tokens
        assert [model.tokens(text).tolist() for text in texts] == [tokenizer(text)["input_ids"] for text in texts]
    assert float((expected.exp() * (expected - found)).sum(-1).mean()) < 1e-6
