"""The codebooks of the IQ formats are llama.cpp's, and every code, sign and scale of each format is read as gguf-py does."""

import numpy as np
import pytest

from llmlab.formats import FORMATS, grids, iq1, iq4

torch = pytest.importorskip("torch")
quants = pytest.importorskip("gguf.quants")
from gguf.constants import GGMLQuantizationType  # noqa: E402

CPU = torch.device("cpu")
BOOKS = {"IQ1": ("IQ1_S", "IQ1_M"), "IQ2_XXS": ("IQ2_XXS",), "IQ2_XS": ("IQ2_XS",), "IQ2_S": ("IQ2_S",),
         "IQ3_XXS": ("IQ3_XXS",), "IQ3_S": ("IQ3_S",)}
TYPES = [name for name, known in FORMATS.items() if known.family in ("iq", "ternary")]


def theirs(name: str, blocks: torch.Tensor) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(blocks.numpy(), GGMLQuantizationType[name])


def ours(name: str, blocks: torch.Tensor) -> np.ndarray:
    codes, scale, offset = FORMATS[name].unpack(blocks)
    assert offset is None and codes.dtype == torch.int8 and scale.dtype == torch.float32
    return (codes.view(len(blocks), scale.shape[1], -1) * scale[..., None]).view(len(blocks), -1).numpy()


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.int32), b.view(np.int32))


@pytest.mark.parametrize("book", BOOKS)
def test_a_codebook_is_gguf_pys(book):
    points = grids.CODEBOOKS[book].points()
    for name in BOOKS[book]:
        known = getattr(quants, name)
        known.init_grid()
        assert np.array_equal(points, known.grid[0, 0])
    width = grids.CODEBOOKS[book].width
    joined = grids.grid(book, CPU)
    assert np.array_equal(joined.view(torch.int8).view(-1, width), points) and len(joined) == len(set(points))
    assert joined is grids.grid(book, CPU)      # made once


def test_every_format_with_a_grid_is_looked_at():
    gridded = {name for name in GGMLQuantizationType.__members__ if getattr(getattr(quants, name, None), "grid_hex", None)}
    assert gridded == {name for names in BOOKS.values() for name in names}
    assert set(grids.CODEBOOKS) == set(BOOKS)


def test_the_eighth_sign_makes_the_minuses_even():
    assert bytes(grids.even_signs(seven) for seven in range(128)) == quants.IQ2_XXS.ksigns


def test_levels_of_four_bits_are_gguf_pys():
    assert iq4.LEVELS == quants.IQ4_NL.kvalues


def test_a_sign_mask_negates_each_weight_its_bit_names():
    codes = torch.arange(-127, 128, dtype=torch.int8)
    for minus in (0, -1):
        assert torch.equal(grids.negate(codes.clone(), torch.full_like(codes, minus)), -codes if minus else codes)
    masks = grids.masks(8, CPU).view(torch.int8).view(256, 8)
    for signs in range(256):
        assert [-m for m in masks[signs].tolist()] == [signs >> i & 1 for i in range(8)]


def test_an_eighth_is_added_to_the_first_half_and_taken_from_the_second():
    eighths = iq1._shifted_grid(CPU).view(torch.int8).view(2, 2048, 8).float() / 8
    points = torch.tensor(grids.CODEBOOKS["IQ1"].points())
    assert torch.equal(eighths[0], points + 0.125) and torch.equal(eighths[1], points - 0.125)


def counted(name: str) -> torch.Tensor:
    """Blocks in which every 16-bit word stands at every even place, so that every code meets every sign and block scale.

    Words at even places move on by unlike odd steps, or high bits would always meet the same low ones. The scale is then
    set to a third, with its sign alternating.
    """
    size = FORMATS[name].block_bytes
    words = torch.arange(1 << 16)[:, None] * torch.arange(1, size, 2) * 40503 + torch.arange(size // 2) * 977
    blocks = words.to(torch.int16).view(torch.uint8).clone()
    if name == "IQ1_M":     # its scale is spread over the top bits of four words; in the least of them any will do
        blocks[:, 55] = blocks[:, 55] & 0x8F | 0x30
        return blocks
    at = next(part.start for part in FORMATS[name].fields if part.name == "scale")
    blocks[:, at:at + 2] = torch.tensor([1 / 3], dtype=torch.float16).view(torch.uint8)
    blocks[::2, at + 1] |= 0x80
    return blocks


@pytest.mark.parametrize("name", TYPES)
def test_every_word_at_every_place_is_read_as_gguf_py_reads_it(name):
    blocks = counted(name)
    for part in blocks.split(1 << 13):
        mine = ours(name, part)
        assert np.isfinite(mine).all() and same_bits(mine, theirs(name, part))


@pytest.mark.parametrize("name", TYPES)
def test_scales_of_every_kind_keep_their_bits(name):
    """Every fourth half-precision number as scale: not-a-numbers, infinities, subnormals, both zeros."""
    blocks = torch.randint(0, 256, (1 << 16, FORMATS[name].block_bytes), dtype=torch.uint8, generator=torch.manual_seed(2))
    every = torch.arange(1 << 16)
    if name == "IQ1_M":
        for i in range(4):
            blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | (every >> 4 * i & 15) << 4
    else:
        at = next(part.start for part in FORMATS[name].fields if part.name == "scale")
        blocks[:, at:at + 2] = every.to(torch.int16).view(torch.uint8).view(-1, 2)
    for part in blocks[::4].split(1 << 13):     # whole vectors: torch widens what is left over to other not-a-numbers
        assert same_bits(ours(name, part), theirs(name, part))


@pytest.mark.parametrize("name", TYPES)
def test_blocks_may_lie_anywhere_and_are_not_written(name):
    size = FORMATS[name].block_bytes
    memory = torch.randint(0, 100, (9 * size + 3,), dtype=torch.uint8, generator=torch.manual_seed(3))
    before = memory.clone()
    codes, scale, _ = FORMATS[name].unpack(memory[:9 * size].clone().view(9, size))
    for start in (1, 2, 3):
        moved = torch.cat((memory.new_zeros(start), memory))[start:][:9 * size].view(9, size)
        for at, count in ((0, 9), (4, 1)):
            some, their_scale, _ = FORMATS[name].unpack(moved[at:at + count])
            assert torch.equal(some, codes[at:at + count])
            assert torch.equal(their_scale.view(torch.int32), scale[at:at + count].view(torch.int32))
        strided = FORMATS[name].unpack(moved[::2])
        assert torch.equal(strided.codes, codes[::2])
    for count in (9, 1):
        FORMATS[name].unpack(memory[:count * size].view(count, size))
    assert torch.equal(memory, before)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_ternary_weights_come_back_as_they_were(name):
    weights = np.random.default_rng(4).integers(-1, 2, (64, 256)).astype(np.float32) * 0.25
    weights[:, 0] = 0.25
    blocks = torch.from_numpy(quants.quantize(weights, GGMLQuantizationType[name]))
    assert np.array_equal(ours(name, blocks), weights)
