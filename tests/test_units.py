"""Sizes and durations, read and written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.errors import LabError
from llmlab.units import GIB, align, format_bytes, format_count, format_seconds, parse_bytes


@pytest.mark.parametrize("text, size", [("8 GiB", 8 * GIB), ("512MB", 512_000_000), ("24g", 24 * GIB), ("1.5 TiB", 3 * 2**39),
                                        ("100", 100), (7, 7), (2.5, 2), ("0", 0)])
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "eight", "8 parsecs", "-1 GiB", -1, float("nan"), float("inf"), True, None, "1e9999"])
def test_what_is_no_size_is_refused_in_one_line(text):
    with pytest.raises(LabError) as refused:
        parse_bytes(text)
    assert "\n" not in str(refused.value) and "size" in str(refused.value)


@given(st.integers(0, 2**50), st.integers(1, 2**20))
def test_align_reaches_the_next_multiple(size, to):
    up = align(size, to)
    assert up % to == 0 and 0 <= up - size < to


def test_words():
    assert format_bytes(4912898048) == "4.58 GiB" and format_bytes(12) == "12 B" and format_bytes(1536) == "1.50 KiB"
    assert format_count(8030261248) == "8.03 B" and format_count(134515008) == "134.5 M"
    assert [format_seconds(s) for s in (0.012, 3.4, 130, 3850)] == ["12 ms", "3.4 s", "2 min 10 s", "1 h 04 min"]
