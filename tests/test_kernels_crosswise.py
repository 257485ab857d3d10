"""Codes crosswise: the same weights as the blocks' to the bit, and sums that are taken in order."""

import pytest
import torch
from kernel_checks import blocks as sane_blocks

from llmlab import kernels
from llmlab.formats import FORMATS, dequantize
from llmlab.kernels import crosswise, words

TYPES = [name for name, known in FORMATS.items() if known.unpack is not None]
HELD = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
ROWS, COLS, BLOCK = 150, 768, 160


def laid(type, lanes, block=BLOCK):
    blocks = sane_blocks(type, ROWS, COLS)
    parts = crosswise.parted(kernels.pack(blocks, type, "compact"))
    return (None if parts is None else crosswise.lay_out(parts, block, lanes)), dequantize(blocks, type)


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("type", TYPES)
def test_crosswise_holds_the_weights_of_the_blocks_to_the_bit(type, lanes):
    found, weights = laid(type, lanes)
    if found is None:
        if type in HELD:
            pytest.fail(f"{type} cannot be laid crosswise")
        pytest.xfail("codes are no integers, or groups are of an odd size")
    assert found.layout.lanes == lanes and (found.rows, found.cols) == (ROWS, COLS)
    assert torch.equal(crosswise.unpack(found), weights)
    x = torch.randn(3, COLS, generator=torch.Generator().manual_seed(3))
    true = x.double() @ weights.double().T
    y = crosswise.multiply(crosswise.arranged(x, found, 3), found, 3)[:, :ROWS]
    assert (y - true).norm() < 1e-6 * true.norm()
    bits = found.layout.bits + 64 / found.layout.group
    tiles, blocks = -(-ROWS // found.layout.tile), -(-COLS // BLOCK)
    assert found.bytes == tiles * found.layout.tile * blocks * BLOCK * bits / 8


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("type", HELD)
def test_words_come_apart_to_the_same_weights(type, small):
    """What a compiled decoder holds."""
    blocks, known = sane_blocks(type, 70, COLS), words.layout(type, 16, small)
    found = crosswise.lay_out(crosswise.parted(words.lay_out(blocks, type, COLS, known)), BLOCK)
    held = words.unpack(words.lay_out(blocks, type, COLS, known), words.shifts(known))
    held = held.view(70, -1, words.RUN, 16).transpose(2, 3).flatten(1)[:, :COLS]
    assert torch.equal(crosswise.unpack(found), held)


def test_matrices_under_one_another_keep_their_weights():
    """The finest groups, the widest codes."""
    types = ("Q4_1", "Q6_K", "Q2_K")
    blocks = [sane_blocks(type, rows, COLS) for type, rows in zip(types, (40, 8, 100), strict=True)]
    parts = [crosswise.parted(kernels.pack(one, type, "compact")) for one, type in zip(blocks, types, strict=True)]
    found = crosswise.lay_out(crosswise.under(parts), BLOCK)
    assert (found.layout.bits, found.layout.group) == (8, 16)
    assert torch.equal(crosswise.unpack(found), torch.cat([dequantize(one, type) for one, type in
                                                           zip(blocks, types, strict=True)]))


def test_numbers_have_no_codes():
    assert crosswise.parted(torch.ones(4, 64)) is None
    assert crosswise.parted(kernels.pack(torch.ones(4, 64).view(torch.uint8).view(4, -1), "F32", "compact")) is None


def in_order(x, weights, block):
    """Each block's sum as one chain: product and sum rounded together, input after input."""
    y = torch.zeros(len(x), len(weights))
    for some, others in zip(x.double().split(block, 1), weights.double().split(block, 1), strict=True):
        found = torch.zeros_like(y)
        for a, b in zip(some.T, others.T, strict=True):
            found = (found + a[:, None] * b).float()        # twice rounded, by way of float64: wrong once in 2^29
        y = y + found
    return y


@pytest.mark.parametrize("type", ["Q4_1", "Q6_K", "Q2_K"])
def test_compiled_it_sums_in_order(type):
    from llmlab.runtime import few

    found, weights = laid(type, words.lanes(), block=192)
    x = torch.randn(2, COLS, generator=torch.Generator().manual_seed(4))
    laid_x = crosswise.arranged(x, found, 2)
    y = few._package(found.layout, 2, None)(laid_x, *found.tensors)[0][:, :ROWS]
    assert torch.equal(y, in_order(x, weights, 192))
    assert not torch.equal(y, crosswise.multiply(laid_x, found, 2)[:, :ROWS])
