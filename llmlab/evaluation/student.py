"""How often chance alone moves a mean so far from 0: Student's t test, exact at any number of values.

Source: M. Abramowitz and I. A. Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4.
"""

from math import atan2, cos, pi, sin, sqrt

from ..quality.statistics import Estimate


def student(moved: Estimate, count: int) -> float:
    """The chance of a mean of `count` values so far from 0 or further, two-sided, where they are drawn around 0; 1 of one
    value, whose error nobody knows."""
    freedom = count - 1
    if freedom < 1:
        return 1.0
    angle = atan2(abs(moved.value), moved.error * sqrt(freedom))
    odd = freedom % 2
    inside, term = 0.0, cos(angle) ** odd
    for power in range(odd, freedom - 1, 2):
        inside += term
        term *= (power + 1) / (power + 2) * cos(angle) ** 2
    inside *= sin(angle)
    return max(0.0, 1 - (2 / pi * (angle + inside) if odd else inside))
