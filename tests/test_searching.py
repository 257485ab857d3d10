"""The search for how much goes on the cards finds what trying every number would."""

from hypothesis import given
from hypothesis import strategies as st

from llmlab.searching import _largest


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(0, 1500), st.integers(0, 60), st.integers(0, 400),
       st.integers(0, 5))
def test_as_if_every_number_were_tried(layers, room, working, guess, slope):
    """Weights that only grow with n, and a working part that grows or stays: one answer, whatever is guessed first."""
    def needs(n: int) -> int:
        return working + slope * n

    def fits(n: int, taken: list[int] | None = None) -> bool:
        return sum(layers[:n]) + (needs(n) if taken is None else taken[0]) <= room

    most = len(layers)
    best = max((n for n in range(most + 1) if fits(n)), default=0)
    found = _largest(most, fits, lambda n: [needs(n)], [guess], 0)
    assert found <= best and (found == 0 or fits(found))
    if not slope:
        assert found == best


def test_further_finds_what_lies_beyond_a_gap():
    def fits(n, taken=None):
        return n in (0, 1, 2, 3, 5)
    assert _largest(8, fits, lambda n: [0], [0], 4) == 5
    assert _largest(8, fits, lambda n: [0], [0], 0) in (3, 5)
