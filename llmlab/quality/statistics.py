"""Means with their standard errors, and percentiles, by llama-perplexity's formulas."""

from dataclasses import dataclass
from math import exp, isfinite, nan, sqrt

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A measured value and its standard error (nan where too few tokens were scored to say)."""

    value: float
    error: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} ± {self.error:{spec}}"

    def __str__(self) -> str:
        return f"{self:.6g}"


def mean(values: np.ndarray) -> Estimate:
    """Mean of float64 [n] and its standard error sqrt((E[x²] - E[x]²) / (n - 1))."""
    count = len(values)
    middle = float(values.mean())
    if not isfinite(middle):
        return Estimate(middle, nan)
    # The same as E[x²] - E[x]², without the cancellation.
    return Estimate(middle, sqrt(float(np.square(values - middle).mean()) / (count - 1)) if count > 1 else nan)


def covariance(a: np.ndarray, b: np.ndarray) -> float:
    """Of the two means."""
    return float(((a - a.mean()) * (b - b.mean())).mean()) / (len(a) - 1) if len(a) > 1 else nan


def exponential(log: Estimate) -> Estimate:
    """exp of an estimate, the error carried to first order."""
    return Estimate(exp(log.value), exp(log.value) * log.error)


def percentile(ordered: np.ndarray, percent: float) -> float:
    """Of ascending values [n]: linear between the two neighbours of percent/100 * (n - 1), which is reckoned in float32."""
    place = np.float32(percent / 100) * np.float32(len(ordered) - 1)
    below = min(int(place), len(ordered) - 1)
    part = float(place) - below
    return float((1 - part) * ordered[below] + part * ordered[min(below + 1, len(ordered) - 1)])
