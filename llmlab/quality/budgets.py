"""The mix that costs least in quality within a budget of bytes: tensor by tensor, by what is known of each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..errors import LabError
from .knapsack import Option, choose
from .sensitivities import Cost, Sensitivity


@dataclass(frozen=True)
class BestMix:
    """`types` {tensor: type} as `quantize_gguf(types=...)` and `quality.in_types` take them. `bytes` of these tensors, padded
    as in a file: exact. `predicted`: the sum of the tensors' costs in nats a token: modelled, as if the errors of different
    tensors had nothing to do with each other. `proven`: no choice has a smaller sum; else none has one below `bound`."""

    types: dict[str, str]
    bytes: int
    predicted: float
    bound: float
    proven: bool

    def counts(self) -> dict[str, int]:
        """How many tensors are in each type."""
        found: dict[str, int] = {}
        for type in self.types.values():
            found[type] = found.get(type, 0) + 1
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def best_mix(found: Sensitivity, budget: int, types: Iterable[str] | None = None,
             groups: Callable[[str], str] | None = None) -> BestMix:
    """The types that cost least in all, with at most `budget` bytes of these tensors (padded to 32; `Sensitivity.bytes` of
    another mix says what it takes). Other tensors of the file stay as they are.

    `types`: among these only. `groups`: tensors of which it says the same get one type. A tensor whose rows divide into none
    of them stays as stored. Raises LabError where the smallest choice takes more than the budget, and for tensors whose cost
    is not known: stacks of experts that were not measured.
    """
    allowed = set(types) if types is not None else None
    members: dict[str, list[str]] = {}
    for name in found.elements:
        members.setdefault(groups(name) if groups else name, []).append(name)
    by: dict[str, dict[str, Cost]] = {name: {} for name in found.elements}
    for one in found.costs:
        if allowed is None or one.type in allowed:
            by[one.tensor][one.type] = one
    items = {group: _options(found, names, by) for group, names in members.items()}
    chosen = choose(items, budget)
    types_of = {name: chosen.picked[group] or found.stored[name][0] for group, names in members.items() for name in names}
    # quantize_gguf takes the first pattern that is found in a name, and "output.weight" is in "blk.0.attn_output.weight".
    ordered = sorted(types_of, key=lambda name: (-len(name), name))
    return BestMix({name: types_of[name] for name in ordered}, chosen.bytes, chosen.cost, chosen.bound, chosen.exact)


def _options(found: Sensitivity, names: list[str], by: dict[str, dict[str, Cost]]) -> list[Option]:
    """What a group may be: the types that all of its tensors were looked at in, or as they are stored."""
    shared = [type for type in by[names[0]] if all(type in by[name] for name in names)]
    options = []
    for type in shared:
        costs = [found.cost(name, type) for name in names]
        if None in costs:
            raise LabError(f"{names[costs.index(None)]} in {type} is neither predicted (stacks of experts are not) nor "
                           f"measured: ask sensitivity for measure={type!r}")
        options.append(Option(type, sum(by[name][type].bytes for name in names), sum(costs)))
    return options or [Option("", sum(found.stored[name][1] for name in names), 0.0)]
