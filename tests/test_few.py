"""Few rows by codes: to the bit what many rows are by numbers, or not at all."""

import pytest
import torch
from kernel_checks import blocks as sane_blocks

from llmlab import kernels
from llmlab.formats import dequantize
from llmlab.runtime import few
from llmlab.runtime.compiling import NotPackaged
from llmlab.runtime.few import MOST, Few

MEASURE = few._quick.__wrapped__
MANY = 64
SIZES = ((192, 576), (576, 1536), (100, 800))


def even(count):
    """What all are filled up to here."""
    return MANY


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Codes are quicker, whatever this machine is just doing."""
    monkeypatch.setattr(few, "_quick", lambda *kind: (1 << MOST + 1) - 1)


@pytest.fixture(scope="module")
def matrices():
    found = []
    for rows, cols in SIZES:
        blocks = sane_blocks("Q4_1", rows, cols)
        found.append((dequantize(blocks, "Q4_1"), [kernels.pack(blocks, "Q4_1", "compact")]))
    return found


def test_few_rows_are_what_many_are(matrices):
    made = Few(matrices, even)
    assert f"{len(made.found)} of {len(SIZES)}" in made.why
    for (numbers, _) in matrices:
        if both := made.found.get(id(numbers)):
            x = torch.randn(MANY, numbers.shape[1], generator=torch.Generator().manual_seed(9))
            many = torch.mm(x, numbers.T)
            for count in range(1, MOST + 1):
                assert torch.equal(both.few(x[:count]), many[:count])
            assert both.few(x[:MOST + 1]) is None
    assert made.bytes == sum(both.codes.bytes for both in made.found.values())


def test_one_other_bit_and_numbers_are_taken(matrices, monkeypatch):
    true = few._many

    def other(x, numbers, even):
        y = true(x, numbers, even)
        if numbers.shape == SIZES[1]:
            y[0, 7] = torch.nextafter(y[0, 7], torch.tensor(torch.inf))
        return y

    before = set(Few(matrices, even).found)
    monkeypatch.setattr(few, "_many", other)
    assert set(Few(matrices, even).found) == before - {id(matrices[1][0])}


def test_numbers_that_are_not_the_codes_stay(matrices):
    numbers, sources = matrices[0]
    rounded = numbers.bfloat16().float()
    assert not Few([(rounded, sources), (numbers.bfloat16(), sources), (numbers, [numbers])], even).found


def test_without_a_compiler_numbers_are_taken(matrices, monkeypatch):
    def refuse(*args):
        raise NotPackaged("no C++ compiler was found")

    monkeypatch.setattr(few, "package", refuse)
    made = Few(matrices, even)
    assert not made.found and not made.bytes and "no C++ compiler was found" in made.why


def test_what_takes_longer_is_not_used(matrices, monkeypatch):
    monkeypatch.setattr(few, "_quick", lambda *kind: 1 << 4 | 1 << 8)
    made = Few(matrices, even)
    assert made.most == (8 if made.found else 0)
    for both in made.found.values():
        assert list(both.packages) == [4] and both.few(torch.ones(9, both.codes.cols)) is None
        one = both.few(torch.ones(1, both.codes.cols))
        assert torch.equal(one, both.few(torch.ones(7, both.codes.cols))[-1:])
    monkeypatch.setattr(few, "_quick", lambda *kind: 0)
    made = Few(matrices, even)
    assert not made.found and not made.most


def test_what_is_quicker_is_measured():
    """Whatever comes out: numbers of rows that there is code for, without gaps where they go by fours."""
    found = MEASURE(192, 576, 4, 32, 192)
    counts = [n for n in range(MOST + 2) if found >> n & 1]
    assert set(counts) <= set(few._MEASURED)
    fours = [n for n in counts if n > 4]
    assert fours == list(few._MEASURED[len(few.COUNTS):][:len(fours)])
