"""Codes as words: the same weights as the blocks', whatever the width of the registers, as quick or as small as can be."""

import pytest
import torch
from kernel_checks import blocks as sane_blocks

from llmlab.formats import FORMATS, dequantize
from llmlab.formats.iq4 import LEVELS
from llmlab.kernels import words

TYPES = [name for name, known in FORMATS.items() if known.unpack is not None]
SMALL = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("small", [False, True])
def test_words_hold_the_weights_of_the_blocks(type, side, small):
    known = words.layout(type, side, small)
    if known is None:
        if type in SMALL:
            pytest.fail(f"{type} has no layout")
        pytest.xfail("codes are no integers, or no small way is known")
    rows, cols = 24, 768
    blocks = sane_blocks(type, rows, cols)
    held = words.lay_out(blocks, type, cols, known)
    weights, x = dequantize(blocks, type).double(), torch.randn(5, cols, generator=torch.Generator().manual_seed(3))
    true = x.double() @ weights.T

    one = torch.stack([words.multiply(words.arrange(row, known), held) for row in x])
    assert (one - true).norm() < 2e-6 * true.norm()         # codes of a byte are summed before their middle is taken away
    several = words.side_by_side(x, known) @ words.unpack(held, words.shifts(known)).T
    assert (several - true).norm() < 1e-6 * true.norm()
    assert held.bytes == pytest.approx(rows * cols * known.bits_per_weight(cols) / 8)
    assert len(held.tensors) == words.parts(known)
    if small:
        assert known.bits_per_weight(2048) <= words.ROOM * FORMATS[type].bits


def test_rows_are_filled_up_with_zeros():
    known = words.layout("Q8_0", 8)
    held = words.lay_out(sane_blocks("Q8_0", 3, 96), "Q8_0", 96, known)
    assert held.tensors[0].shape == (3, 1, 8, 8) and not held.tensors[1][..., 3:].any()
    assert known.bits_per_weight(96) == pytest.approx((8 + 1) * 256 / 96)
    pairs = words.layout("Q6_K", 8, True)       # two tiles share a word of scales
    assert (pairs.tiles(256), pairs.tiles(512), pairs.tiles(768)) == (2, 2, 4)


@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("cols", [32, 96, 256, 288, 352, 512, 576, 768, 1056])
def test_what_fills_rows_up_is_not_multiplied(cols, side):
    generator = torch.Generator().manual_seed(5)
    for type in ("Q4_0", "Q6_K") if cols % 256 == 0 else ("Q4_0",):
        known, blocks = words.layout(type, side, True), sane_blocks(type, 10, cols)
        x, out = torch.randn(4, cols, generator=generator), torch.empty(4, 10)
        columns = words.Columns(x, known)
        columns.times(words.unpack(words.lay_out(blocks, type, cols, known), words.shifts(known)), out)
        true = x @ dequantize(blocks, type).T
        assert (out - true).norm() < 1e-6 * true.norm()
        read = columns.x.shape[1] + (0 if columns.rest is None else columns.rest.shape[1])
        assert read < cols + known.tile // 2


@pytest.mark.parametrize("j", range(8))
def test_the_levels_of_iq4_are_a_rounded_curve(j):
    at = torch.arange(16)
    found = (at - 8 if j == 7 else at).float() * 16.0 ** j
    assert words.level(found, j).int().tolist() == list(LEVELS)
    near = torch.tensor([value * (1 + e) for e in (-1e-5, 1e-5) for value in found.tolist()])
    assert words.level(near, j).int().tolist() == 2 * list(LEVELS)      # no level lies at a rounding's edge


def test_halves_are_float16s():
    bits = torch.arange(1 << 16, dtype=torch.int32)
    true = bits.to(torch.int16).view(torch.float16).float()
    finite = true.isfinite()
    assert torch.equal(words._half(bits)[finite], true[finite])
