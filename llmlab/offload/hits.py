"""Which experts stay where all layers share a few slots, and how many of the wanted ones are found there.

A token uses few of a layer's experts, and layers take turns: what is wanted next is not what was wanted last (an LRU with fewer
slots than a pass wants finds nothing at all, as in any scan that goes round) but experts of the layers that come next, of those
first who are chosen often. So of what is held that goes whose next use is expected last: Belady's rule (IBM Systems Journal
5(2), 1966) on an estimate.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

LIVES = 4, 32, 256      # tokens after which a choice counts half, of the averages; chosen by tests/bench/bench_experts.py
FITTED = 32             # tokens after which an error counts half in their weights
AT_ONCE = 2             # slots that take turns at least while a prompt wants more experts than there are slots
Key = tuple[int, int]   # layer, expert


class Rates:
    """How likely a token is to choose each expert of each layer, by what tokens before it chose: averages in which older
    choices count less and less, over few tokens and over many (LRFU's idea, recency and frequency as one: Lee et al., IEEE
    Transactions on Computers 50(12), 2001). How much each average counts is fitted to the text as it goes on, by least
    squares, because some models choose again what they just chose and others have favourites. A prompt's tokens count as if
    they had come one by one, so that one pass over nearly all experts makes none of them seem wanted.
    """

    def __init__(self, layers: int, experts: int):
        count = len(LIVES)
        self.layers, self.averages = layers, np.zeros((count, layers, experts))
        self.weights = np.full(count, 1 / count)
        self._lives, self._keep = np.array(LIVES)[:, None], 0.5 ** (1 / (FITTED * max(layers, 1)))
        self._squares, self._products = np.eye(count) * 1e-3, np.full(count, 1e-3 / count)      # as if seen: all count alike

    def chose(self, layer: int, chosen: Sequence[int], counts: Sequence[int], tokens: int) -> None:
        """`tokens` tokens chose, `counts` of them each of `chosen`."""
        averages = self.averages[:, layer]
        if tokens == 1:
            self._squares = self._squares * self._keep + averages @ averages.T
            self._products = self._products * self._keep + averages[:, chosen].sum(1)
            if layer == 0:
                self.weights = np.linalg.solve(self._squares + np.eye(len(LIVES)) * 1e-6, self._products)
        left = 0.5 ** (tokens / self._lives)
        averages *= left
        averages[:, chosen] += np.array(counts) / tokens * (1 - left)

    def until(self, now: int, layers: np.ndarray, experts: np.ndarray) -> np.ndarray:
        """Layers to go until the next use of each, as expected in layer `now` after its choice."""
        rate = self.weights @ self.averages[:, layers, experts]
        return (layers - now - 1) % self.layers + self.layers / np.maximum(rate, 1e-6)


@dataclass
class Found:
    """What a layer wanted so far: `wanted` experts, of which `pinned` are always there, `hits` were in a slot and `loads` were
    brought to one."""

    wanted: int = 0
    pinned: int = 0
    loads: int = 0

    @property
    def hits(self) -> int:
        return self.wanted - self.pinned - self.loads

    @property
    def rate(self) -> float:
        """Of those that are not pinned the share that was in a slot; 0 where nothing was wanted."""
        free = self.wanted - self.pinned
        return self.hits / free if free else 0.0


@dataclass
class Directory:
    """Which expert lies in which of so many slots, 1 at least, and which must go when another is wanted."""

    layers: int
    experts: int
    slots: int
    pinned: frozenset[Key] = frozenset()
    rates: Rates = field(init=False)
    held: dict[Key, int] = field(init=False, default_factory=dict)      # the slot of each expert that has one
    found: list[Found] = field(init=False)

    def __post_init__(self) -> None:
        self.rates, self.found = Rates(self.layers, self.experts), [Found() for _ in range(self.layers)]
        self._free = list(range(self.slots))[::-1]
        self._layer, self._expert = np.zeros(self.slots, dtype=np.int64), np.zeros(self.slots, dtype=np.int64)
        self._until, self._own = None, {}       # of each slot, and of what this turn wants

    def serve(self, layer: int, wanted: Sequence[int], counts: Sequence[int] | None = None,
              tokens: int = 1) -> Iterator[tuple[str, int, int | None]]:
        """What to do for the experts that a layer's tokens chose (`wanted`, rising): ("load", expert, slot) when one is to be
        brought to a slot, whatever was there, and ("use", expert, slot) when it is an expert's turn, whose slot stays as it is
        until the next step is asked for (None: pinned). Loads come as early as there is room, so that later experts are read
        while one is used. One token's come in the order that waits least, those that are there first; those of several as
        `wanted` has them.
        """
        self.rates.chose(layer, wanted, counts or [1] * len(wanted), tokens)
        found = self.found[layer]
        found.wanted += len(wanted)
        order, self._until = [(layer, expert) for expert in wanted], None
        found.pinned += sum(key in self.pinned for key in order)
        if tokens == 1:
            order.sort(key=lambda key: not self.there(key))
        ahead = 0
        for at, key in enumerate(order):
            while ahead < len(order):
                if not self.there(order[ahead]):
                    slot = self._room(order, at, ahead)
                    if slot is None:
                        break
                    self._put(order[ahead], slot)
                    found.loads += 1
                    yield "load", order[ahead][1], slot
                ahead += 1
            yield "use", key[1], self.held.get(key)

    def there(self, key: Key) -> bool:
        return key in self.held or key in self.pinned

    def _put(self, key: Key, slot: int) -> None:
        self.held[key] = slot
        self._layer[slot], self._expert[slot] = key
        if self._until is not None:
            self._until[slot] = self._own[key[1]]

    def _room(self, order: list[Key], at: int, ahead: int) -> int | None:
        """A slot for order[ahead] while order[at:ahead] are there or on their way; None where it must wait for one of them."""
        if self._free:
            return self._free.pop()
        keep = [self.held[key] for key in order[at:] if key in self.held]
        if len(keep) < self.slots:
            if self._until is None:         # once a turn: choices do not change in it
                layer, wanted = order[0][0], np.array([expert for _, expert in order])
                self._until = self.rates.until(layer, self._layer, self._expert)
                own = self.rates.until(layer, np.full_like(wanted, layer), wanted)
                self._own = dict(zip(wanted.tolist(), own, strict=True))
            until = self._until.copy()
            until[keep] = -1
            slot = int(until.argmax())
            del self.held[int(self._layer[slot]), int(self._expert[slot])]
            return slot
        busy = sum(key in self.held for key in order[at:ahead])
        later = [key for key in order[ahead + 1:] if key in self.held]
        if later and busy < AT_ONCE:        # the last one's turn is farthest away
            return self.held.pop(later[-1])
        return None


def replay(passes: Iterable[Sequence[Sequence[int]]], experts: int, slots: int, pinned: Iterable[Key] = ()) -> Directory:
    """What a cache of so many slots would have found: passes of one token each, of each layer the experts it chose. The counts
    are exact, in `.found`."""
    directory = None
    for layers in passes:
        directory = directory or Directory(len(layers), experts, slots, frozenset(pinned))
        for layer, wanted in enumerate(layers):
            for _ in directory.serve(layer, sorted(wanted)):
                pass
    return directory or Directory(0, experts, slots)


def expected_hits(experts: int, used: int, slots: float, skew: float = 0.0, layers: int = 1) -> float:
    """The share of wanted experts that is in one of `slots` slots, which all layers share, once the cache is warm: modelled.

    Tokens are taken to choose `used` of a layer's `experts` independently of one another, the k-th most popular with a weight
    of k ** -skew (0: all alike, the worst case). The chance of each to be among those chosen is
    that of being among the first `used` of exponential clocks with these weights, 1 - exp(-weight * t) (Rosen, Annals of
    Mathematical Statistics 43(3), 1972); the most popular stay, but for the slots that misses pass through. Real texts repeat
    themselves besides, which a larger skew stands for: what was published of real models (tests/golden/expert_hits.csv) is
    given back by skews of some 0.5 to 1.7.
    """
    if not 0 < used <= experts:
        return 0.0
    weights = np.arange(1, experts + 1) ** -float(skew)
    low, high = 0.0, 1.0
    while used < experts and (1 - np.exp(-weights * high)).sum() < used:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-weights * middle)).sum() < used else (low, middle)
    chances = np.ones(experts) if used == experts else 1 - np.exp(-weights * high)
    known = np.concatenate([[0.0], np.cumsum(chances)]) / chances.sum()

    def found(free: float) -> float:
        return float(np.interp(max(free, 0.0) / layers, np.arange(experts + 1), known))

    if slots >= experts * layers:
        return 1.0
    low, high = 0.0, 1.0            # hits, of which depends how many slots misses pass through
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if found(slots - used * (1 - middle)) > middle else (low, middle)
    return low
