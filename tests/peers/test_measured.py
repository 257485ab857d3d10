"""llmlab.measured with the real engines: what was called exact is exact, what was modelled lies in its band."""


import pytest
from llama_engine import quantize
from tiny_gguf import write_tiny
from tiny_models import tiny_spec

import llmlab
from llmlab.errors import LabError
from llmlab.units import MIB

pytestmark = pytest.mark.peers


def agrees(check, compute: float = 0.02) -> None:
    """Weights, cache, state, output and repacked copies to the printed 0.01 MiB; compute within 2 % and in its band."""
    assert {"weights", "kv_cache", "compute"} <= {r.term for r in check.bytes}
    for row in check.bytes:
        if row.measured is None:
            continue
        assert row.within, f"{row.term}: {row.measured / MIB:.2f} MiB, not {row.low / MIB:.2f} to {row.high / MIB:.2f}"
        if row.kind == "exact":
            assert abs(row.predicted - row.measured) < 0.011 * MIB and not row.error
        elif row.term == "compute" and "graph is not known" not in row.why:
            assert row.error is not None and abs(row.error) < compute, f"{row.error:+.2%}: {row.why}"
    assert "Every exact term agrees" in check.answer
    assert check.row("decode", "all").measured > 0 and check.row("prefill", "all").measured > 0
    assert check.row("resident").measured > 0


@pytest.mark.parametrize("changes", [
    {}, {"context": 3000, "kv": ("q8_0", "q5_1"), "batch": 256}, {"context": 2048, "flash_attention": False, "sequences": 3}],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "defaults")
def test_smollm2_on_llama_cpp(smollm2, changes):
    agrees(llmlab.measured(llmlab.fit(smollm2, None, **changes), smollm2))


@pytest.mark.parametrize("name,changes,settings", [
    ("llama", {"num_hidden_layers": 4}, {"context": 5000}),
    ("gemma3", {"num_hidden_layers": 8}, {"context": 8192, "ubatch": 128}),
    ("gemma3", {"num_hidden_layers": 8}, {"context": 4096, "swa_full": True}),
    ("qwen3moe", {}, {"context": 4096}),
    ("gpt-oss", {"num_hidden_layers": 6}, {"context": 8192}),
    ("qwen35", {}, {"context": 4096, "sequences": 2})], ids=str)
def test_files_of_our_own(name, changes, settings, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny(tiny_spec(name, **changes), path)
    agrees(llmlab.measured(llmlab.fit(path, None, **settings), path))


def test_a_repacked_copy_is_measured(smollm2, tmp_path):
    path = tmp_path / "q4_0.gguf"
    assert quantize(smollm2, path, "Q4_0", allow_requantize=True)
    check = llmlab.measured(llmlab.fit(path, None, context=2048), path)
    agrees(check)


def test_a_file_that_llama_cpp_refuses_is_one_line(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny(tiny_spec("llama", num_hidden_layers=2), path)
    report = llmlab.fit(path, None, context=512)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(LabError) as caught:
        llmlab.measured(report, path)
    assert "\n" not in str(caught.value)


def test_smollm2_on_transformers():
    """Its shapes, filled with random numbers."""
    check = llmlab.measured(llmlab.fit("smollm2-135m", None, quant="BF16", engine="transformers", context=256))
    assert check.row("weights").error == 0 and check.row("kv_cache").error == 0
    assert abs(check.row("compute").error) < 0.03
