"""Weights off their grid: within half a step, evenly, the same for a seed, everything else as it was."""

import numpy as np
import pytest
import torch

from llmlab import formats, quality
from llmlab.errors import LabError
from llmlab.gguf import read_gguf, write_gguf

COLS = 512


def blocks_of(type, rows=16):
    weights = torch.randn(rows, COLS, generator=torch.Generator().manual_seed(1)) * 0.02
    return formats.quantize(weights, type)


def file_of(path, type):
    norm = np.linspace(0, 1, COLS, dtype=np.float32)
    write_gguf(path, {"general.architecture": "llama", "general.file_type": 2, "llama.word": "ü"}, [
        ("norm", (COLS,), "F32", norm), ("w", (COLS, 16), type, blocks_of(type).numpy())])
    return path


def numbers(path, name="w"):
    file = read_gguf(path)
    return formats.dequantize(file.data(name).reshape(16, -1), file.tensors[name].type)


@pytest.mark.parametrize("type", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K"])
def test_weights_are_moved_evenly_within_half_a_step(tmp_path, type):
    source = file_of(tmp_path / "a.gguf", type)
    quality.unrounded(source, tmp_path / "b.gguf", type="F32")
    before, after = numbers(source), numbers(tmp_path / "b.gguf")
    scale = formats.FORMATS[type].unpack(blocks_of(type).reshape(-1, formats.FORMATS[type].block_bytes)).scale.abs()
    step = scale.reshape(-1)[:, None].expand(-1, before.numel() // scale.numel()).reshape(before.shape)
    share = ((after - before) / step)[step > 0]
    assert float(share.abs().max()) <= 0.5 + 1e-3
    assert float(share.mean()) == pytest.approx(0, abs=0.02) and float(share.std()) == pytest.approx(12 ** -0.5, rel=0.03)


def test_nothing_else_changes_and_a_seed_says_all(tmp_path):
    source = file_of(tmp_path / "a.gguf", "Q4_1")
    for name, seed in (("b", 0), ("c", 0), ("d", 1)):
        quality.unrounded(source, tmp_path / f"{name}.gguf", seed)
    read = {name: read_gguf(tmp_path / f"{name}.gguf") for name in "abcd"}
    assert read["b"].metadata == read["a"].metadata | {"general.file_type": 1}
    assert bytes(read["b"].data("norm")) == bytes(read["a"].data("norm")) and read["b"].tensors["w"].type == "F16"
    assert bytes(read["b"].data("w")) == bytes(read["c"].data("w")) != bytes(read["d"].data("w"))


def test_a_format_finds_its_own_levels_again_and_not_those_of_moved_weights(tmp_path):
    """Why it is there."""
    source = file_of(tmp_path / "a.gguf", "Q4_1")
    quality.unrounded(source, tmp_path / "b.gguf", type="F32")

    def error(weights):
        back = formats.dequantize(formats.quantize(weights, "Q4_1"), "Q4_1")
        return float((back - weights).norm() / weights.norm())

    assert error(numbers(source)) < 0.001 < 0.05 < error(numbers(tmp_path / "b.gguf"))


@pytest.mark.parametrize(("type", "says"), [("IQ4_NL", "tensor 'w' is IQ4_NL, whose levels do not lie evenly")])
def test_uneven_levels_are_refused(tmp_path, type, says):
    with pytest.raises(LabError, match=says):
        quality.unrounded(file_of(tmp_path / "a.gguf", type), tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()


def test_types_that_hold_no_moved_weights(tmp_path):
    with pytest.raises(LabError, match="give F16 or F32"):
        quality.unrounded(file_of(tmp_path / "a.gguf", "Q8_0"), tmp_path / "b.gguf", type="Q8_0")
