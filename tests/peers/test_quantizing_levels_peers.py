"""Where rounding decides: scales and codes on, just below and just above a border, beside llama.cpp's own C."""

import platform

import numpy as np
import pytest

from llmlab import formats

pytest.importorskip("llama_cpp")
import llama_quantize


def same(weights: np.ndarray, name: str, importance: np.ndarray | None = None) -> None:
    theirs = llama_quantize.quantize(weights, name, importance)
    ours = formats.quantize(weights, name, importance).numpy()
    different = np.nonzero((ours != theirs).any(1))[0]
    assert not len(different), f"rows {different[:5]}, the first of weights {weights[different[0]][:8]}"


def around(numbers: np.ndarray, steps: int) -> np.ndarray:
    """These float32, and so many of their neighbours on either side."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.int32)[:, None] + np.arange(-steps, steps + 1, dtype=np.int32)
    return bits.view(np.float32).ravel()


def test_mxfp4s_exponent_about_powers_of_two():
    largest = around(2.0 ** np.arange(-124, 127), 40)
    rows = np.zeros((len(largest), 32), np.float32)
    rows[:, 3], rows[:, 4], rows[:, 30] = largest, -largest / 3, largest / 8
    same(rows, "MXFP4")


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_codes_about_the_middle_of_two(name):
    middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, 7.5])
    for scale in (1, 2.0 ** -9, 1.125, 0.3):
        near = around(middles * scale, 3)
        rows = np.zeros((4, 64), np.float32)
        rows.ravel()[:len(near)] = near
        rows.ravel()[128:128 + len(near)] = -near
        rows[:, ::16] = 6 * scale
        same(rows, name)


def test_nvfp4s_scale_about_its_borders():
    bytes_of_scale = np.arange(1, 0x77)
    value = np.where(bytes_of_scale < 8, bytes_of_scale * 2.0 ** -9,
                     (1 + (bytes_of_scale & 7) / 8) * 2.0 ** ((bytes_of_scale >> 3) - 7.0))
    largest = around(6 * (value[1:] + value[:-1]) / 2, 4)
    rows = np.zeros((len(largest), 64), np.float32)
    rows[:, ::8], rows[:, 1::8] = largest[:, None], -largest[:, None] / 5
    same(rows, "NVFP4")
    same(np.outer([1e-6, 1e-3, 1400, 1488, 1500, 2000, 2689, 1e5], np.linspace(-1, 1, 64)).astype(np.float32), "NVFP4")


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q2_0"])
def test_halves_of_a_largest(name):
    largest = np.random.default_rng(0).random(500).astype(np.float32) + 0.01
    rows = np.zeros((500, 256), np.float32)
    for at, row in enumerate(rows):
        row[:14] = around(np.array([largest[at] / 2]), 3).tolist() + (-around(np.array([largest[at] / 2]), 3)).tolist()
        row[20::60] = largest[at]
    same(rows, name)


@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS"])
@pytest.mark.parametrize("weighed", [False, True])
def test_many_blocks_of_few_numbers(name, weighed):
    """Weights of few values make scales that are as good as each other, but for the last bit of a sum."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.xfail("llama.cpp is compiled to fused products there, and its last bits differ")
    rng = np.random.default_rng(1)
    importance = (rng.random(512) + 0.01).astype(np.float32) if weighed else None
    for rows in (rng.integers(-8, 8, (100, 512)) * 0.01, rng.choice([-0.5, 0.1, 0.3], (100, 512)),
                 rng.standard_normal((100, 512)).astype(np.float16)):
        same(np.ascontiguousarray(rows, np.float32), name, importance)
