"""Codes as words: the same weights as the blocks', whatever the width of the registers."""

import pytest
import torch
from kernel_checks import blocks as sane_blocks

from llmlab.formats import FORMATS, dequantize
from llmlab.kernels import words

TYPES = [name for name, known in FORMATS.items() if known.unpack is not None]


@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("type", TYPES)
def test_words_hold_the_weights_of_the_blocks(type, side):
    known = words.layout(type, side)
    if known is None:
        pytest.fail(f"{type} has no layout") if type in ("Q4_K", "Q6_K", "Q4_0") else pytest.xfail("codes are no integers")
    rows, cols = 24, 768
    blocks = sane_blocks(type, rows, cols)
    held = words.lay_out(blocks, type, cols, known)
    weights, x = dequantize(blocks, type).double(), torch.randn(5, cols, generator=torch.Generator().manual_seed(3))
    true = x.double() @ weights.T

    one = torch.stack([words.multiply(words.arrange(row, known), held) for row in x])
    assert (one - true).norm() < 1e-6 * true.norm()
    several = words.side_by_side(x, known) @ words.unpack(held, words.shifts(known)).T
    assert (several - true).norm() < 1e-6 * true.norm()
    assert held.bytes == pytest.approx(rows * cols * known.bits_per_weight(cols) / 8)


def test_rows_are_filled_up_with_zeros():
    held = words.lay_out(sane_blocks("Q8_0", 3, 96), "Q8_0", 96, words.layout("Q8_0", 8))
    assert held.words.shape == (3, 1, 8, 8) and not held.scales[:, :, 3:].any()
    assert words.layout("Q8_0", 8).bits_per_weight(96) == pytest.approx((8 + 1) * 256 / 96)
