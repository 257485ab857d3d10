"""Packed pages of a cache: what is written is what the formats' own encoders write, wherever it lies, however it came there."""

import numpy as np
import pytest
import torch

from llmlab import formats
from llmlab.errors import LabError, UnknownName
from llmlab.formats import FORMATS
from llmlab.formats.iq4 import LEVELS
from llmlab.kernels import Pages
from llmlab.kernels.pages import NUMBERS, PAGE, cell_type, in_order, slots, write_both
from llmlab.memory import CACHE_TYPES

TYPES = list(CACHE_TYPES)
QUANTIZED = [name for name in TYPES if name not in NUMBERS]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def odd(*shape: int) -> torch.Tensor:
    """Blocks where rounding is delicate: ties, zeros with either sign, numbers of one size, one outlier, tiny, huge."""
    x = random(*shape, seed=1)
    flat = x.view(-1, 32)
    flat[0] = 0
    flat[1] = -0.0
    flat[2] = 0.5
    flat[3] = -0.25
    flat[4] = flat[4].round() / 4
    flat[5, 1:] = 0
    flat[6, 7] = 1000
    flat[7] *= 1e-7
    flat[8] *= 1e4
    flat[9] = flat[9].bfloat16().float()
    flat[10, 3], flat[10, 9] = 4, -4
    flat[11, 3], flat[11, 9] = -4, 4
    flat[12] = torch.arange(32) - 15.5
    flat[13] = 1 + 1e-3 * flat[13]
    flat[14] *= 1e-16
    flat[15] = torch.arange(32) / 127
    return x


def one_scale(x: torch.Tensor) -> torch.Tensor:
    """float32 [..., cols] -> blocks of IQ4_NL, number by number: the levels that are nearest where the largest number lies on
    the lowest, and the scale that then fits best."""
    out = []
    for block in x.reshape(-1, 32).numpy():
        far = block[np.abs(block).argmax()]
        inverse = np.float32(0) if far == 0 else 1 / (far / np.float32(LEVELS[0]))
        codes = [min(range(16), key=lambda i, at=at: (abs(LEVELS[i] - at), -i)) for at in (inverse * block).tolist()]
        with_x = squares = np.float32(0)
        for number, code in zip(block, codes, strict=True):
            weighed = number * number * np.float32(LEVELS[code])
            with_x, squares = with_x + weighed * number, squares + weighed * np.float32(LEVELS[code])
        scale = np.float16(with_x / squares if squares > 0 else 0)
        out.append([*scale.tobytes(), *(low | high << 4 for low, high in zip(codes[:16], codes[16:], strict=True))])
    return torch.tensor(out, dtype=torch.uint8).view(*x.shape[:-1], -1)


def encoded(x: torch.Tensor, name: str) -> torch.Tensor:
    return one_scale(x) if name == "iq4_nl" else formats.quantize(x, CACHE_TYPES[name])


def stands_for(x: torch.Tensor, name: str) -> torch.Tensor:
    """x [..., head_dim] after one rounding, by way of `formats`."""
    if name in NUMBERS:
        most = 448.0
        return (x.clamp(-most, most) if name == "fp8" else x).to(NUMBERS[name]).float()
    return formats.dequantize(encoded(x, name), CACHE_TYPES[name]).float()


def by_cell(pages: Pages) -> torch.Tensor:
    """[batch, heads, cells, head_dim]"""
    return pages.numbers().permute(0, 2, 1, 4, 3).flatten(2, 3)


def filled(name: str, x: torch.Tensor, cells: torch.Tensor, room: int = PAGE) -> Pages:
    pages = Pages(name, x.shape[0], x.shape[1], x.shape[3], room)
    pages.write(cells, x)
    return pages


def same(one: Pages, other: Pages) -> bool:
    """Byte for byte."""
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one.tensors, other.tensors, strict=True))


@pytest.mark.parametrize("count", [1, 3, 40, 130])
@pytest.mark.parametrize("name", QUANTIZED)
def test_blocks_are_those_of_the_formats(name, count):
    x = odd(2, 3, count, 96)
    if name == "iq4_nl":        # where all is nearly nothing llama.cpp leaves codes to chance
        x.view(-1, 32)[[0, 1, 14]] = 0.125
    cells = torch.randperm(600, generator=torch.Generator().manual_seed(count))[:count]
    pages = filled(name, x, cells, 600)
    assert torch.equal(pages.blocks(cells), encoded(x, name))
    assert torch.equal(by_cell(pages)[:, :, cells], stands_for(x, name))


@pytest.mark.parametrize("count", [8, 40])
@pytest.mark.parametrize("name", list(NUMBERS))
def test_numbers_are_rounded_once(name, count):
    x = odd(2, 3, count, 80)
    cells = torch.randperm(300, generator=torch.Generator().manual_seed(count))[:count]
    pages = filled(name, x, cells, 300)
    assert torch.equal(by_cell(pages)[:, :, cells], stands_for(x, name))
    assert torch.equal(pages.blocks(cells).view(NUMBERS[name]).float(), stands_for(x, name))


def test_the_one_scale_of_iq4_nl_is_nearly_the_best_of_sixteen():
    x = random(1, 4, 64, 128)
    off, best = (float(((formats.dequantize(blocks, "IQ4_NL") - x) ** 2).sum())
                 for blocks in (filled("iq4_nl", x, torch.arange(64)).blocks(torch.arange(64)), formats.quantize(x, "IQ4_NL")))
    print(f"{off / best:.3f}")
    assert best <= off < 1.15 * best


@pytest.mark.parametrize("name", TYPES)
def test_one_cell_is_written_as_many_are(name):
    x = odd(2, 2, 24, 64)
    cells = torch.tensor([0, 63, 64, 127, 128, 191, 192, 255, 256, 511, *range(100, 114)])
    whole, single, paired = filled(name, x, cells, 512), Pages(name, 2, 2, 64, 512), Pages(name, 2, 2, 64, 512)
    other = Pages(name, 2, 2, 64, 512)
    for i in range(24):
        single.write(cells[i:i + 1], x[:, :, i:i + 1])
        write_both(paired, other, cells[i:i + 1], x[:, :, i:i + 1], -x[:, :, i:i + 1])
    assert same(single, whole) and same(paired, whole) and same(other, filled(name, -x, cells, 512))


@pytest.mark.parametrize(("k", "v"), [("q8_0", "q4_0"), ("q5_1", "f16"), ("q8_0", "q8_0")])
def test_both_sides_at_once_whatever_their_types_and_widths(k, v):
    keys, values, cells = random(1, 2, 7, 192), random(1, 2, 7, 128, seed=3), torch.arange(7) * 40
    one, other = Pages(k, 1, 2, 192, 512), Pages(v, 1, 2, 128, 512)
    write_both(one, other, cells, keys, values)
    assert torch.equal(by_cell(one)[:, :, cells], stands_for(keys, k))
    assert torch.equal(by_cell(other)[:, :, cells], stands_for(values, v))


@pytest.mark.parametrize("name", TYPES)
def test_blocks_go_back_where_they_came_from(name):
    x, cells = random(2, 2, 30, 64), torch.arange(30) * 13
    pages = filled(name, x, cells, 400)
    again = Pages(name, 2, 2, 64, 400)
    again.set_blocks(cells, pages.blocks(cells))
    assert same(again, pages)
    width = FORMATS[CACHE_TYPES[name]].bytes(64)
    assert pages.blocks(cells).shape == (2, 2, 30, width)
    assert pages.bytes == 2 * 2 * 512 * width == sum(t.nbytes for t in pages.tensors)


@pytest.mark.parametrize("name", TYPES)
def test_room_grows_and_nothing_moves(name):
    x, cells = random(1, 2, 200, 64), torch.arange(200)
    pages = filled(name, x, cells)
    before = pages.numbers()
    pages.grow(100)
    assert pages.cells == PAGE
    pages.grow(700)
    assert pages.cells == 3 * PAGE and torch.equal(pages.numbers(0, 1), before) and not pages.numbers(1).any()
    late = torch.tensor([600])
    pages.write(late, x[:, :, :1])
    assert torch.equal(by_cell(pages)[:, :, late], by_cell(pages)[:, :, :1])


def test_the_latest_of_a_cell_stays():
    for name in TYPES:
        x = random(1, 1, 2, 32)
        pages = filled(name, x[:, :, :1], torch.tensor([9]))
        pages.write(torch.tensor([9]), x[:, :, 1:])
        assert torch.equal(by_cell(pages)[:, :, 9:10], stands_for(x[:, :, 1:], name))


def test_how_bytes_of_a_row_lie():
    cells = torch.arange(PAGE)
    assert torch.equal(in_order(torch.argsort(slots(cells))), cells)
    words = torch.arange(PAGE).view(64, 4)      # the bytes of a word are the cells w, 64 + w, 128 + w, 192 + w
    assert torch.equal(slots(cells).view(4, 64).T, words)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_written_as_their_float32(dtype):
    x = random(1, 2, 5, 64).to(dtype)
    for name in TYPES:
        pages = filled(name, x, torch.arange(5))
        assert torch.equal(by_cell(pages)[:, :, :5], stands_for(x.float(), name))


def test_views_and_inference_mode():
    strided = random(3, 5, 64, 2).permute(3, 0, 1, 2)[:, :, 1:3]       # [2, 3, 2, 64], not contiguous
    for name in TYPES:
        with torch.inference_mode():
            pages = filled(name, strided, torch.arange(2))
            pages.write(torch.tensor([7]), strided[:, :, :1])
            found = by_cell(pages)[:, :, [0, 1, 7]]
        assert torch.equal(found, stands_for(strided.contiguous(), name)[:, :, [0, 1, 0]])
        outside = Pages(name, 2, 3, 64, PAGE)
        with torch.inference_mode():        # made outside, written inside: what a decoder does whose cache was read from disk
            outside.write(torch.arange(2), strided)
        outside.write(torch.tensor([7]), strided[:, :, :1])
        assert torch.equal(by_cell(outside)[:, :, [0, 1, 7]], found)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e9])
def test_numbers_that_no_scale_holds_are_refused(name, wrong):
    pages, x = Pages(name, 1, 2, 64, PAGE), random(1, 2, 1, 64)
    pages.write(torch.tensor([3]), x)
    before = pages.numbers()
    bad = x.clone()
    bad[0, 1, 0, 40] = wrong
    for x in (bad, torch.cat([random(1, 2, 100, 64), bad], 2)):
        with pytest.raises(LabError, match=f"{name} cache .* choose bf16"):
            pages.write(torch.arange(x.shape[2]), x)
    assert torch.equal(pages.numbers(), before)


def test_fp8_takes_its_largest_number_for_larger_ones():
    pages = filled("fp8", torch.tensor([1e4, -1e4, 449, 0.1]).repeat(8).view(1, 1, 1, 32), torch.tensor([0]))
    assert by_cell(pages)[0, 0, 0, :4].tolist() == [448, -448, 448, torch.tensor(0.1).to(torch.float8_e4m3fn).float().item()]


def test_what_is_refused():
    with pytest.raises(LabError, match="80; choose f16"):
        Pages("q8_0", 1, 1, 80, PAGE)
    with pytest.raises(UnknownName, match="q3_0"):
        Pages("q3_0", 1, 1, 64, PAGE)
    assert cell_type("Q8_0").name == "q8_0" and Pages("f16", 1, 1, 80, 1).cells == PAGE


@pytest.mark.gpu
@pytest.mark.parametrize("name", TYPES)
def test_on_a_card(name):
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    x, cells = odd(2, 2, 40, 64), torch.arange(40) * 7
    here, there = filled(name, x, cells, 300), Pages(name, 2, 2, 64, 300, "cuda")
    there.write(cells.cuda(), x.cuda())
    same = there.blocks(cells.cuda()).cpu() == here.blocks(cells)
    assert same.float().mean() > (0.99 if name == "iq4_nl" else 0.9999)    # sums of 32 are added in another order there
    again = Pages(name, 2, 2, 64, 300, "cuda")
    for i in range(3):
        write_both(again, again, cells[i:i + 1].cuda(), x[:, :, i:i + 1].cuda(), x[:, :, i:i + 1].cuda())
    assert torch.equal(again.blocks(cells[:3].cuda()), there.blocks(cells[:3].cuda()))
