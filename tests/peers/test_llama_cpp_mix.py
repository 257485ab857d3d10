"""llama.cpp quantizes tiny models of every family; each tensor's type and the file's bytes are as `mix` and `size` say."""

import os
import zlib

import pytest
from llama_engine import FTYPES, importance_of, llama_cpp, loaded, log, quantize
from tiny_gguf import write_tiny
from tiny_models import CONFIGS, tiny_spec

from llmlab.errors import LabError
from llmlab.formats import FORMATS
from llmlab.formats.mixes import MIXES
from llmlab.gguf import read_gguf
from llmlab.memory import mix_of, size_of

pytestmark = [pytest.mark.peers, pytest.mark.slow]

QUANTS = [name for name, mix in MIXES.items() if mix.engine == "llama.cpp"]
WHOLE = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma3", "llama-odd-288")     # these in every quant, with and without
CORE = (("Q4_K_M", False), ("Q3_K_M", False), ("IQ4_XS", False), ("Q2_K", True), ("IQ2_M", True), ("IQ3_XXS", True))
SHARE = 5                              # of the other models' further combinations, one in so many


def combinations(name: str) -> list[tuple[str, bool]]:
    """(quant, with an importance matrix) to try on a model: all, or the core and a share that differs by model."""
    every = [(quant, importance) for quant in QUANTS for importance in (False, True) if (quant, importance) != ("F32", True)]
    if name in WHOLE or os.environ.get("LLMLAB_PEERS_ALL"):
        return every
    core = CORE if "80" not in name and "70b" not in name else CORE[:3]
    return [*core, *(one for one in every if one not in core and zlib.crc32(f"{name}{one}".encode()) % (
        SHARE if core is CORE else 4 * SHARE) == 0)]


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_loads_and_quantizes_as_we_say(name, tmp_path):
    spec = tiny_spec(name)
    source = tmp_path / "f16.gguf"
    write_tiny(spec, source)
    with loaded(source) as model:      # llama.cpp checks every name and shape
        assert llama_cpp.llama_model_n_params(model) == sum(t.elements for t in spec.tensors)
        assert llama_cpp.llama_model_size(model) == sum(
            FORMATS[t.type or "F16"].bytes(t.elements) for t in spec.tensors)
    matrix = importance_of(spec.tensors)
    todo = combinations(name)
    found = [line for quant, importance in todo if quant != "F32"
             for line in differences(spec, source, tmp_path / "out.gguf", quant, matrix if importance else None)]
    if ("F32", False) in todo:         # llama-quantize widens no tensor that it leaves alone; the converter does
        write_tiny(spec, source, "F32")
        found += differences(spec, source, tmp_path / "out.gguf", "F32", None)
    assert not found, f"{len(found)} differences:\n" + "\n".join(found[:40])


def differences(spec, source, target, quant: str, matrix) -> list[str]:
    """What llama.cpp does otherwise than we say, a line each."""
    importance = matrix is not None
    label = f"{spec.name} {quant}{' with importance' if importance else ''}"
    done = quantize(source, target, quant, matrix)
    try:
        said = size_of(spec, quant, importance)
    except LabError as error:
        return [] if not done else [f"{label}: llama.cpp does it, we say {error}"]
    if not importance and said.needs_importance:
        return [f"{label}: we say it needs an importance matrix, llama.cpp does without"] if done else []
    if not done:
        return [f"{label}: llama.cpp refuses: {log().strip().splitlines()[-1]}"]
    return compare(spec, read_gguf(target), quant, importance)


def compare(spec, file, quant: str, importance: bool) -> list[str]:
    """Where types, names and bytes of a quantized file differ from what we say."""
    label = f"{spec.name} {quant}{' with importance' if importance else ''}"
    types, said = mix_of(spec, quant, importance), size_of(spec, quant, importance)
    lines = [f"{label}: {tensor.name} {tensor.shape} is {tensor.type}, we say {types.get(tensor.name)}"
             for tensor in file.tensors.values() if tensor.type != types.get(tensor.name)]
    if set(types) != set(file.tensors):
        lines.append(f"{label}: names differ: {sorted(set(types) ^ set(file.tensors))[:4]}")
    elements = sum(t.elements for t in file.tensors.values())
    bits = sum(t.bytes for t in file.tensors.values()) * 8 / elements
    for what, theirs, ours in (("bytes of all tensors", file.file_bytes - file.header_bytes, said.tensor_bytes),
                               ("bits per weight", bits, said.bits_per_weight)):
        if theirs != ours:
            lines.append(f"{label}: {what} {theirs}, we say {ours}")
    return lines


def test_every_file_type_is_tried():
    from_llama = set(FTYPES) - {"NVFP4"}        # llama-quantize makes none: no quantizer for it
    assert from_llama == set(QUANTS)
    tried = {one for name in CONFIGS for one in combinations(name)}
    assert len(tried) == 2 * len(QUANTS) - 1


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_source_type_does_not_matter(dtype, tmp_path):
    spec = tiny_spec("qwen3moe")
    source = tmp_path / "source.gguf"
    write_tiny(spec, source, dtype)
    found = [line for quant in ("Q4_K_M", "Q8_0", "F16", "F32", "BF16") for line in differences(
        spec, source, tmp_path / "out.gguf", quant, None)]
    assert not found, "\n".join(found)


def test_the_comparison_bites(tmp_path):
    """A file of another mix is told apart, tensor by tensor."""
    spec = tiny_spec("llama")
    source, target = tmp_path / "f16.gguf", tmp_path / "out.gguf"
    write_tiny(spec, source)
    assert quantize(source, target, "Q4_K_S")
    found = compare(spec, read_gguf(target), "Q4_K_M", False)
    assert any("blk.15.ffn_down.weight" in line and "is Q4_K, we say Q6_K" in line for line in found)
    assert any("bytes of all tensors" in line for line in found)


def test_a_format_without_a_quantizer_has_a_size_all_the_same(tmp_path):
    """NVFP4 is a file type that llama-quantize cannot make (ModelOpt's files come in it): a format is a recipe by itself."""
    spec = tiny_spec("qwen2", num_hidden_layers=2)
    source = tmp_path / "f16.gguf"
    write_tiny(spec, source)
    assert not quantize(source, tmp_path / "out.gguf", "NVFP4")
    types = mix_of(spec, "NVFP4")
    assert types["blk.0.ffn_up.weight"] == "NVFP4"
    assert size_of(spec, "Q3_K").tensor_bytes < size_of(spec, "NVFP4").tensor_bytes < size_of(spec, "Q5_K").tensor_bytes
