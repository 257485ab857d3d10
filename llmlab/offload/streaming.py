"""Weights whose layers come and go: what a decoder is handed a layer of, while the next ones are on their way."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from time import perf_counter

from ..kernels import Packed
from ..runtime.weights import Weights
from .moving import Clock
from .slots import Slots
from .trace import Trace


class Handing:
    """A model's layers, one after another, each there from when it is handed out until the next is asked for.

    all, head: the dicts themselves, over buffers that may hold another layer's bytes just now. few: (all, head) of passes of
    few tokens, where those are others.
    """

    def __init__(self, all: tuple[dict, ...], head: dict, slots: Slots, trace: Trace, clock: Clock | None = None,
                 few: tuple[tuple[dict, ...], dict] | None = None):
        self.all, self.head, self.slots, self.trace, self.clock = all, head, slots, trace, clock
        self._ways = (all, head), few or (all, head)
        self.choose(False)

    def choose(self, few: bool) -> None:
        """Whether the pass that begins, or comes next, is one of few tokens."""
        self._layers, self._last = self._ways[few]
        self.slots.choose(few)

    def __len__(self) -> int:
        return len(self.all)

    def __iter__(self) -> Iterator[dict]:
        return self.passing()

    def passing(self, head: bool = True) -> Iterator[dict]:
        """`head`: whether this pass comes to the head. Raises what bringing a layer raised."""
        for number, layer in enumerate(self._layers):
            self.slots.turn(number, head)
            start = self._now()
            yield layer
            self._computed(f"blk.{number}", start)
        if not head:
            self.slots.rest(head)

    def last(self) -> dict:
        """The head, when it is there."""
        self.slots.turn(len(self.all))
        self._began = self._now()
        return self._last

    def ended(self) -> None:
        """What was to be computed with the head is."""
        self._computed("head", self._began)

    def _now(self):
        return perf_counter() if self.clock is None else self.clock.now()

    def _computed(self, what: str, start) -> None:
        (self.trace if self.clock is None else self.clock).add("compute", what, start, self._now())


@dataclass(frozen=True)
class Streamed(Weights):
    """Weights whose `layers` are a `Handing`, and whose head is handed out too."""

    layers: Handing

    @classmethod
    def of(cls, outline: Weights, layers: Handing) -> "Streamed":
        values = {field.name: getattr(outline, field.name) for field in fields(Weights)}
        return cls(**{**values, "layers": layers, "head": layers.head})

    def handed(self, head: bool = True) -> Iterator[dict]:
        return self.layers.passing(head)

    def each(self) -> tuple[dict, ...]:
        return self.layers.all

    def last(self) -> dict:
        return self.layers.last()

    def packed(self) -> list[Packed]:
        """Every packed matrix of every layer, each once, and whatever lies in its buffer just now."""
        values = [value for part in (*self.layers.all, self.head) for value in part.values() if isinstance(value, Packed)]
        return list({id(value): value for value in (self.embedding, *values)}.values())
