"""A scale for a table of uneven levels: each weight takes the nearest level, and the scale is searched for.

Groups are columns: x is float32 [n, ...], and a step is done for thousands of groups at once. Levels are found in a table of
where x / scale lies, in halves of a unit: with whole levels, what is nearest changes there only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from .searching import in_order, largest, number, over

if TYPE_CHECKING:
    import torch

MOST = 1e38         # a scale's inverse, at most: infinity times 0 is no number
CLOSER = (0.04, 0.02, 0.01)     # shares by which the best place of the largest weight is moved at last


@dataclass(frozen=True)
class Levels:
    """`values`, rising. `places`: where `best_scales` puts the largest weight, from well inside the values' ends, which spends
    levels on it, to well beyond them, which cuts it off; each 1.06 times the one before, as finer ones gain less than 0.1 %.

    `fineness`: halves of 1 / fineness are told apart; 1 is exact for whole values. `signed`: a scale may be below zero, which
    is of use where the values are not symmetric.
    """

    values: tuple[float, ...]
    places: tuple[float, ...] = ()
    fineness: int = 1
    signed: bool = True

    @property
    def edge(self) -> int:
        """How many halves the tables reach on either side of zero."""
        return 2 * self.fineness * (int(max(map(abs, self.values))) + 1)

    def _at(self, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        import torch
        steps = (2 * self.fineness * inverse).clamp_(-MOST, MOST)
        halves = (x * steps).floor_().clamp_(-self.edge, self.edge - 1)
        return halves.add_(self.edge).to(torch.int32).view(-1)

    def nearest(self, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        """The level nearest to each x * inverse, float32; in the middle between two the upper one."""
        return _tables(self, x.device)[0].index_select(0, self._at(x, inverse)).view(x.shape)

    def codes(self, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        """Its place in `values`, uint8."""
        return _tables(self, x.device)[1].index_select(0, self._at(x, inverse)).view(x.shape)

    def sums(self, x: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """With the nearest levels, for each column: the sums of weight * level * x and of weight * level^2, in order."""
        found = self.nearest(x, inverse)
        weighed = weights * found
        return in_order(weighed * x), in_order(weighed.mul_(found))

    def errors(self, x: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The weighted squared error of each column with that scale."""
        off = self.nearest(x, inverse_of(scales)).mul_(scales).sub_(x)
        return off.square_().mul_(weights).sum(0)

    def best_scales(self, x: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """For each column a scale whose error is no larger than that of `scale` (before either is rounded).

        The largest weight is put at each of `places`, then closer about the best, and with the codes that gives the scale is
        solved by least squares: sum(w x l) / sum(w l l), which lowers the error by sum(w x l)^2 / sum(w l l).
        """
        import torch
        far = largest(x.flatten(1)).view(x.shape[1:])
        far = torch.where(far != 0, far if self.signed else far.abs(), 1)
        place, gain = torch.where(scale != 0, far / scale, self.values[0]), torch.full_like(far, -1)

        def take(tried: torch.Tensor) -> None:
            nonlocal scale, gain, place
            with_x, squares = self.sums(x, weights, tried / far)
            found = with_x / squares
            won = found * with_x
            better = (squares > 0) & (won > gain)
            scale, gain, place = (torch.where(better, *each) for each in ((found, scale), (won, gain), (tried, place)))

        take(place)
        for at in self.places:
            take(number(at, x.device))
        for share in CLOSER:
            around = place
            take(around * (1 - share))
            take(around * (1 + share))
        take(far * inverse_of(scale))
        return scale


def counted(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """How much each weight's error counts in a longer search: its column's importance, or the same for all.

    x is [n, groups] or [n, groups of a block, blocks], blocks in the order they have in rows of as many weights as there are
    importances. That is what the error of a product is, but for correlations; llama.cpp weighs large weights more beside, or
    instead. Of SmolLM2-135M in IQ4_NL these weights lower the KL divergence further than its own do, searched as long: with
    importances by 27 % (its own: 19 %), without by 10 % (5 %); of a quarter of its matrices in Q5_0 with importances by 33 %
    (21 %), in Q4_0 by 16 % (11 %). Measured on 1,020 tokens, of the quarters on 765, +- 3 % each, with the weights of its
    published file moved at random within that file's steps. (In K types it makes no difference beyond what that tells apart.)
    """
    import torch
    if importance is None:
        return torch.ones_like(x)
    groups = x.shape[1] if x.ndim == 3 else 1
    counts = importance.view(-1, groups, len(x)).permute(2, 1, 0)
    return counts[:, :, None].expand(-1, -1, x.shape[-1] // counts.shape[2], -1).reshape(x.shape)


def inverse_of(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, 0 for 0."""
    import torch
    return torch.where(scale != 0, over(1, scale), 0)


def both_sides(low: float, high: float) -> tuple[float, ...]:
    """Places from `low` to `high`, each 1.06 of the one before, below zero and above."""
    sizes = [low]
    while sizes[-1] < high:
        sizes.append(1.06 * sizes[-1])
    return (*(-size for size in sizes), *sizes)


@lru_cache
def _tables(levels: Levels, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest level (float32) and its code (uint8) in each half from -edge on."""
    import torch
    values = torch.tensor(levels.values, dtype=torch.float64)
    borders = (values[1:] + values[:-1]) * levels.fineness      # in halves
    codes = torch.bucketize(torch.arange(-levels.edge, levels.edge, dtype=torch.float64), borders, right=True)
    return values.float()[codes].to(device), codes.to(torch.uint8).to(device)
