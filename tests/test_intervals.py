"""Intervals and tests of a few items: published values, what can be reckoned by hand, the definitions taken at their word, and
how often an interval holds the truth, summed over all that can happen."""

from itertools import pairwise
from math import comb, log, sqrt

import numpy as np
import pytest

from llmlab.intervals import Z, least_shown, mcnemar, tango, wilson


@pytest.mark.parametrize(("right", "n", "low", "high"), [     # Newcombe, Stat. Med. 17 (1998) 857, table I, method 3
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_as_published(right, n, low, high):
    assert wilson(right, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert wilson(n - right, n) == (pytest.approx(1 - high, abs=5e-5), pytest.approx(1 - low, abs=5e-5))


def test_wilson_holds_the_truth_as_often_as_it_says():
    shares = np.linspace(0.05, 0.95, 91)
    for n in (24, 40):
        held = np.array([[low <= share <= high for low, high in (wilson(k, n) for k in range(n + 1))] for share in shares])
        chances = np.array([[comb(n, k) * share**k * (1 - share)**(n - k) for k in range(n + 1)] for share in shares])
        covered = (held * chances).sum(1)
        assert covered.min() > 0.91 and 0.945 < covered.mean() < 0.965
    assert wilson(0, 0) == (0, 1)


@pytest.mark.parametrize(("lost", "gained", "p"), [(0, 0, 1), (3, 3, 1), (5, 0, 2 / 32), (6, 0, 2 / 64), (0, 6, 2 / 64),
                                                   (10, 2, 2 * (1 + 12 + 66) / 4096), (1, 8, 2 * (1 + 9) / 512)])
def test_mcnemar_by_hand(lost, gained, p):
    assert mcnemar(lost, gained) == pytest.approx(p)


def test_the_least_that_can_be_shown():
    assert [least_shown(changed) for changed in (0, 5, 6, 7, 8, 9, 12)] == [6, 6, 6, 7, 8, 7, 8]
    for changed in range(6, 60):
        few = (changed - least_shown(changed)) // 2
        assert mcnemar(changed - few, few) < 0.05 <= mcnemar(changed - few - 1, few + 1)


def score(gained, lost, n, difference):
    """Tango's statistic from its definition: the variance is that of the likeliest shares whose difference is this."""
    few = np.linspace(max(0.0, -difference), (1 - difference) / 2, 400_001)[1:-1]      # of lost items
    with np.errstate(divide="ignore"):
        rest = np.clip(1 - 2 * few - difference, 1e-300, None)
        likely = gained * np.log(np.clip(few + difference, 1e-300, None)) + lost * np.log(few)
        likely += (n - gained - lost) * np.log(rest)
    share = few[likely.argmax()]
    return (gained - lost - n * difference) / sqrt(n * (2 * share + difference - difference**2))


@pytest.mark.parametrize(("gained", "lost", "n"), [(12, 2, 50), (1, 3, 40), (9, 8, 30), (0, 5, 24)])
def test_tango_is_where_the_score_is_z(gained, lost, n):
    low, high = tango(gained, lost, n)
    assert low < (gained - lost) / n < high
    assert [score(gained, lost, n, edge) for edge in (low, high)] == pytest.approx([Z, -Z], abs=0.01)
    assert tango(lost, gained, n) == (pytest.approx(-high), pytest.approx(-low))


def test_tango_does_not_close_where_nothing_changed():
    for n in (10, 40, 200):         # (n d)² = z² n (|d| - d²): d = z² / (n + z²)
        edge = Z * Z / (n + Z * Z)
        assert tango(0, 0, n) == (pytest.approx(-edge), pytest.approx(edge))
    assert tango(5, 0, 5)[1] == 1 and tango(0, 5, 5)[0] == -1 and tango(0, 0, 0) == (-1, 1)
    widths = [high - low for low, high in (tango(n // 10, n // 20, n) for n in (20, 40, 80, 160))]
    assert all(wide > narrow for wide, narrow in pairwise(widths))


@pytest.mark.parametrize(("up", "down"), [(0.05, 0.05), (0.1, 0.05), (0.2, 0.05), (0.02, 0.1), (0.15, 0.3)])
def test_tango_holds_the_truth_as_often_as_it_says(up, down):
    n, covered, whole = 30, 0.0, 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            chance = np.exp(log(comb(n, gained)) + log(comb(n - gained, lost)) + gained * log(up) + lost * log(down)
                            + (n - gained - lost) * log(1 - up - down))
            if chance > 1e-7:
                low, high = tango(gained, lost, n)
                covered, whole = covered + chance * (low <= up - down <= high), whole + chance
    assert whole > 0.9999 and 0.935 < covered < 0.985
