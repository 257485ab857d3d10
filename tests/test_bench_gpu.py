"""The parts of the card's benchmark that need none: the model it writes, the bytes it counts, the table it prints."""

import sys
from pathlib import Path

import pytest
import torch

from llmlab.formats import FORMATS, dequantize
from llmlab.gguf import read_gguf
from llmlab.runtime.decoder import Decoder

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import bench_gpu as bench

TINY = bench.LLAMA_3_8B | {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 512, "num_attention_heads": 4,
                           "num_key_value_heads": 2, "vocab_size": 384}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "Q4_K_M.gguf"
    bench.write_model(path, TINY, "Q4_K_M")
    return path


def test_the_model_has_the_mixes_types_and_usual_weights(file, tmp_path):
    types = {tensor.name: tensor.type for tensor in read_gguf(file).tensors.values()}
    assert types["output.weight"] == types["blk.0.attn_v.weight"] == types["blk.0.ffn_down.weight"] == "Q6_K"
    assert types["blk.1.ffn_down.weight"] == types["token_embd.weight"] == types["blk.7.ffn_gate.weight"] == "Q4_K"
    assert len(types) == 9 * 8 + 3 and types["output_norm.weight"] == "F32"
    bench.write_model(tmp_path / "again.gguf", TINY, "Q4_K_M")
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("type", ["Q4_K", "Q6_K", "Q5_K", "IQ4_XS", "Q3_K", "Q8_0", "Q4_0", "BF16"])
def test_random_blocks_are_valid_and_of_the_usual_spread(type):
    found = bench.blocks(type, bench.np.random.default_rng(0))
    weights = dequantize(torch.from_numpy(found), type)
    assert found.shape == (bench.POOL, FORMATS[type].block_bytes) and bool(weights.isfinite().all())
    assert abs(float(weights.std()) / bench.STD - 1) < 0.01
    rows = bench.tensor(4096 * 16, type, {}, bench.np.random.default_rng(0))
    assert len(rows) == FORMATS[type].bytes(4096 * 16)
    halves = torch.frombuffer(bytearray(rows), dtype=torch.uint8).view(16, -1)
    assert not torch.equal(halves[0], halves[1])


def test_the_bytes_a_token_reads(file):
    decoder, header = Decoder.open(file, strategy="compact"), read_gguf(file)
    read = [t for t in header.tensors.values() if t.type != "F32" and t.name != "token_embd.weight"]
    assert bench.file_bytes(decoder) == sum(t.bytes for t in read) == bench.held_bytes(decoder)
    bench.other_kernels(decoder, "bf16")
    weights = 8 * (256 * 256 * 2 + 2 * 128 * 256 + 3 * 256 * 512) + 384 * 256
    assert bench.held_bytes(decoder) == 2 * weights
    fast = Decoder.open(file, strategy="fast")
    assert bench.held_bytes(fast) > bench.file_bytes(fast) == sum(t.bytes for t in read)


def test_all_of_it_on_the_processor(capsys, tmp_path):
    """Everything but the card: the same lines, and divergences as small as elsewhere."""
    found = bench.report(CPU, TINY | {"num_hidden_layers": 2}, ("Q3_K_S", "IQ4_XS"), tokens=2, rounds=2,
                         fused=(False,), folder=tmp_path)
    assert [(line["name"], line["way"]) for line in found["lines"]] == [
        ("Q3_K_S", "llmlab fast"), ("IQ4_XS", "llmlab fast"), ("bf16", "in this decoder"), ("nf4", "in this decoder"),
        ("bf16", "transformers"), ("nf4", "transformers")]
    for line in found["lines"]:
        assert line["tokens_per_second"] == 1 / min(line["rounds"]) and len(line["rounds"]) == 2
        assert line["held"] == line["held_bytes"] / found["bandwidth"] / line["seconds"] > 0
    ours = found["lines"][:2]
    assert all(0 <= line["kld"] < 1e-4 for line in ours) and found["card"] == "cpu" and found["bitsandbytes"]
    matrix = 2 * (256 * 256 * 2 + 2 * 128 * 256 + 3 * 256 * 512)
    assert found["lines"][2]["held_bytes"] == found["lines"][4]["held_bytes"] == 2 * (matrix + 384 * 256)
    assert found["lines"][3]["held_bytes"] == found["lines"][5]["held_bytes"] == matrix * 4.5 / 8 + 2 * 384 * 256
    assert {one["matrix"] for one in found["ops"]} >= {"out", "down", "gate_up", "output"}
    text = capsys.readouterr().out
    assert "tokens/s" in text and "IQ4_XS   llmlab fast" in text and "nf4      in this decoder" in text
    assert list(tmp_path.iterdir()) == []


def test_without_a_card_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--json", str(tmp_path / "found.json")]) == 1
    assert "no GPU that torch can use: nothing is measured" in capsys.readouterr().err and not list(tmp_path.iterdir())
