"""What rounding does to weights: the error against the numbers they were, before any model is run."""

from dataclasses import dataclass, field
from math import sqrt

import numpy as np
import torch

from ..errors import LabError

BINS = 61


@dataclass(frozen=True, eq=False)
class WeightError:
    """Weights that were rounded against what they were; exact arithmetic on the numbers given.

    `relative_rms`: root mean square of the error over that of the weights (0.08 is 8 %). `largest`: the largest error, and
    `rms` of the weights themselves, to hold it against. `unchanged`: the share of weights that came back to the bit.
    `counts` int64 [bins] of the errors between `edges` float64 [bins + 1], symmetric about zero.
    """

    weights: int
    relative_rms: float
    largest: float
    rms: float
    unchanged: float
    counts: np.ndarray = field(repr=False)
    edges: np.ndarray = field(repr=False)


def weight_error(original: torch.Tensor, rounded: torch.Tensor, bins: int = BINS) -> WeightError:
    """The error of `rounded` against `original`, float tensors of one shape. Raises LabError where they are of two, or where
    there are none."""
    if original.shape != rounded.shape or not original.numel():
        raise LabError(f"rounded weights are held against as many originals: {list(original.shape)} and {list(rounded.shape)}")
    original = original.reshape(-1).float()
    errors = rounded.reshape(-1).float() - original
    square, error = float(original.square().sum(dtype=torch.float64)), float(errors.square().sum(dtype=torch.float64))
    largest = float(errors.abs().max())
    ends = largest or sqrt(square / original.numel()) or 1.0
    place = (errors * (bins / (2 * ends)) + bins / 2).long().clamp_(0, bins - 1)        # four times as fast as histc
    return WeightError(weights=original.numel(), relative_rms=sqrt(error / square) if square else 0.0, largest=largest,
                       rms=sqrt(square / original.numel()), unchanged=float((errors == 0).float().mean()),
                       counts=torch.bincount(place, minlength=bins).cpu().numpy(), edges=np.linspace(-ends, ends, bins + 1))
