"""One option for every item, at the least cost in all, within a budget of bytes: solved exactly, or within a gap that is said.

The multiple-choice knapsack problem. A price a byte (Lagrange's multiplier) makes it easy: every item takes the option whose
cost and price are least. The best such price gives a bound from below, and a choice within the budget from above. What lies
between is searched item by item: of all part choices only those are kept that no other beats in both bytes and cost, and whose
bound is still below the best choice known. With hundreds of items the gap is a thousandth, and few are left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import LabError
from ..units import format_bytes

MOST = 1 << 18      # part choices that are kept at a time; with more the answer is the best found, its gap said


class Option(NamedTuple):
    """One thing an item may be."""

    name: str
    bytes: int
    cost: float


@dataclass(frozen=True)
class Choice:
    """`picked` {item: option's name}; `bytes` and `cost` in all. No choice within the budget costs less than `bound`; `exact`
    says that none costs less than this one."""

    picked: dict[str, str]
    bytes: int
    cost: float
    bound: float
    exact: bool


def choose(items: Mapping[str, Sequence[Option]], budget: int) -> Choice:
    """The cheapest choice of one option an item with at most `budget` bytes. Raises LabError where there is no such choice, an
    item has no option, or a cost is no number."""
    names = list(items)
    options = [_undominated(name, items[name]) for name in names]
    least = sum(int(sizes[0]) for sizes, _, _ in options)
    if least > budget:
        raise LabError(f"the smallest choice takes {least:,} bytes ({format_bytes(least)}), and the budget is {int(budget):,}: "
                       "allow more, or smaller types")
    price, bound = _price(options, budget)
    first = _repaired(options, price, budget)
    picked, exact = _searched(options, price, budget, first)
    cost = sum(float(costs[at]) for (_, costs, _), at in zip(options, picked, strict=True))
    return Choice({name: marks[at] for name, (_, _, marks), at in zip(names, options, picked, strict=True)},
                  sum(int(sizes[at]) for (sizes, _, _), at in zip(options, picked, strict=True)), cost,
                  cost if exact else min(bound, cost), exact)


def _undominated(name: str, options: Sequence[Option]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Sizes ascending, costs descending, names: without options that another beats in both."""
    kept: list[Option] = []
    for one in sorted(options, key=lambda one: (one.bytes, one.cost)):
        if not np.isfinite(one.cost):
            raise LabError(f"{name} as {one.name} costs {one.cost}, which is no number")
        if not kept or one.cost < kept[-1].cost:
            kept.append(one)
    if not kept:
        raise LabError(f"{name} has nothing to be chosen from; give it a type")
    return np.array([one.bytes for one in kept]), np.array([one.cost for one in kept]), [one.name for one in kept]


def _at(options: list, price: float) -> tuple[list[int], int, float]:
    """What every item takes at that price a byte; bytes and cost of all."""
    picked = [int((costs + price * sizes).argmin()) for sizes, costs, _ in options]      # the first: the smallest
    return (picked, sum(int(sizes[at]) for (sizes, _, _), at in zip(options, picked, strict=True)),
            sum(float(costs[at]) for (_, costs, _), at in zip(options, picked, strict=True)))


def _price(options: list, budget: int) -> tuple[float, float]:
    """The price a byte whose bound is highest, and that bound."""
    _, size, cost = _at(options, 0.0)
    if size <= budget:
        return 0.0, cost
    low, high = 0.0, 1e-30
    while _at(options, high)[1] > budget:
        low, high = high, high * 16
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _at(options, middle)[1] > budget else (low, middle)
    _, size, cost = _at(options, high)
    return high, cost + high * (size - budget)


def _repaired(options: list, price: float, budget: int) -> list[int]:
    """A choice within the budget: what that price gives, then the steps that buy the most for a byte, while there is room."""
    picked, size, _ = _at(options, price)
    while True:
        best = None
        for item, (sizes, costs, _) in enumerate(options):
            for to in range(picked[item] + 1, len(sizes)):
                more, less = int(sizes[to] - sizes[picked[item]]), float(costs[picked[item]] - costs[to])
                if size + more <= budget and (best is None or less / more > best[0]):
                    best = less / more, item, to, more
        if best is None:
            return picked
        _, item, to, more = best
        picked[item], size = to, size + more


def _searched(options: list, price: float, budget: int, known: list[int]) -> tuple[list[int], bool]:
    """The best choice, and whether it was proven: part choices grow by an item at a time."""
    best = sum(float(costs[at]) for (_, costs, _), at in zip(options, known, strict=True))
    tiny = 1e-12 * (abs(best) + 1e-300)
    regrets = [costs + price * sizes - (costs + price * sizes).min() for sizes, costs, _ in options]
    order = sorted(range(len(options)), key=lambda item: -float(np.sort(regrets[item])[1:2].sum()))
    rest_size = np.cumsum([0, *(int(options[item][0][0]) for item in reversed(order))])[::-1][1:]
    rest_bound = np.cumsum([0.0, *(float((options[item][1] + price * options[item][0]).min())
                                   for item in reversed(order))])[::-1][1:]
    sizes, costs = np.zeros(1, np.int64), np.zeros(1)
    trail, exact = [], True
    for item, later_size, later_bound in zip(order, rest_size, rest_bound, strict=True):
        own_sizes, own_costs, _ = options[item]
        all_sizes = (sizes[:, None] + own_sizes).reshape(-1)
        all_costs = (costs[:, None] + own_costs).reshape(-1)
        bounds = all_costs + price * (all_sizes - budget) + later_bound
        fits = np.flatnonzero((all_sizes + later_size <= budget) & (bounds < best - tiny))
        if not len(fits):
            return known, exact         # nothing is better than what is known
        order_in = fits[np.lexsort((all_costs[fits], all_sizes[fits]))]
        ahead = np.minimum.accumulate(np.concatenate([[np.inf], all_costs[order_in][:-1]]))
        kept = order_in[all_costs[order_in] < ahead]
        if len(kept) > MOST:
            exact = False
            kept = kept[np.sort(np.argpartition(bounds[kept], MOST)[:MOST])]
        trail.append((item, kept // len(own_sizes), kept % len(own_sizes)))
        sizes, costs = all_sizes[kept], all_costs[kept]
    at, picked = int(costs.argmin()), list(known)
    if costs[at] >= best:
        return known, exact
    for item, parents, chosen in reversed(trail):
        picked[item], at = int(chosen[at]), int(parents[at])
    return picked, exact
