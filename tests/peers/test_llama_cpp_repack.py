"""Copies that llama.cpp's CPU backend lays out for this processor, against what it prints as it loads."""

import re

import pytest
from llama_engine import importance_of, llama_cpp, log, quantize
from tiny_gguf import write_tiny
from tiny_models import tiny_spec

from llmlab.fitting import fit
from llmlab.gguf import read_gguf
from llmlab.hardware import machine
from llmlab.shapes import from_gguf
from llmlab.units import MIB

pytestmark = pytest.mark.peers

_QUANTS = ("Q4_0", "Q4_K_M", "Q4_K_S", "IQ4_NL", "Q8_0", "Q6_K", "Q2_K", "Q5_K_M", "Q5_0", "IQ4_XS", "Q3_K_M", "F16")
_CASES = [("llama", quant, {}) for quant in _QUANTS] + [
    ("qwen3-tied", "Q4_0", {}), ("qwen3-tied", "Q4_K_M", {}), ("qwen3moe", "Q4_K_M", {}), ("qwen3moe", "IQ4_NL", {}),
    ("qwen3moe", "MXFP4_MOE", {}), ("gemma4", "Q4_0", {}), ("gemma3n", "Q4_0", {}), ("deepseek3", "Q4_0", {}),
    ("llama-odd-288", "Q4_0", {}), ("llama-odd-40", "Q4_0", {}), ("llama", "Q4_0", {"intermediate_size": 516}),
    ("qwen35", "Q4_K_M", {}), ("nemotron_h_moe", "Q4_0", {}), ("mamba2", "Q4_0", {}), ("lfm2", "Q4_0", {}),
    ("falcon", "Q4_K_M", {}), ("glm4moe-mtp", "Q4_0", {}), ("step35", "Q4_0", {})]


def printed(path) -> tuple[float, float]:
    """MiB of mapped weights and of copies, as llama.cpp prints them."""
    log()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    said = log()
    assert model, said[-600:]
    llama_cpp.llama_model_free(model)
    sizes = {name: float(size) for name, size in re.findall(r"(\S+) model buffer size =\s+([\d.]+) MiB", said)}
    return sizes.get("CPU_Mapped", 0.0), sizes.get("CPU_REPACK", 0.0) + sizes.get("AMX", 0.0)


@pytest.mark.parametrize("name,quant,changes", _CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v) or None)
def test_copies_are_those_printed(name, quant, changes, tmp_path):
    spec = tiny_spec(name, **changes)
    source, target = tmp_path / "f16.gguf", tmp_path / "small.gguf"
    write_tiny(spec, source)
    if quant == "F16":
        target = source
    else:
        assert quantize(source, target, quant, importance_of(spec.tensors)), log()[-400:]
    stored = from_gguf(read_gguf(target))
    report = fit(stored, machine() if not machine().cards else None)
    mapped, copies = printed(target)
    term = next((t for t in report.terms if t.name == "repacked"), None)
    assert round((term.bytes if term else 0) / MIB, 2) == copies
    assert term is None or term.kind == "exact"
    # what is copied stays in the mapped file as well, and the mapping reaches from the first tensor not copied to the last
    assert mapped <= (report.total("weights", "host") + 8192) / MIB + 0.005       # whole pages, two decimals
    if quant == "Q4_0" and name == "llama" and not changes and {"avx2", "dotprod"} & set(machine().cpu.features):
        assert copies > 0


def test_copies_of_a_real_model(smollm2, tmp_path):
    for quant in ("Q4_0", "Q4_K_M"):                  # rows of 576: Q4_K_M falls back to Q5_0 and others
        target = tmp_path / f"{quant}.gguf"
        assert quantize(smollm2, target, quant, allow_requantize=True)
        report = fit(from_gguf(read_gguf(target)))
        assert round(report.total("repacked") / MIB, 2) == printed(target)[1]
