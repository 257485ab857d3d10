"""Slots: a few buffers in which the pieces of a pass take turns, filled ahead of use, in the order of the pass, over and over.

The k-th of the pieces that take turns always has slot k % slots, so what looks at a piece is made once. What lies where is
remembered: where there are as many slots as pieces nothing is ever brought twice.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .moving import Mover, Order
from .pieces import HEAD, Piece
from .trace import Trace


def slot_bytes(pieces: Sequence[Piece], slots: int, *others: Sequence[Piece]) -> list[int]:
    """Bytes of each slot for pieces that take turns in this order: each has room for the largest of its own. `others`: fewer
    pieces each, that do so in other passes."""
    count = min(slots, len(pieces))
    return [max(piece.bytes for way in (pieces, *others) for piece in way[slot::count]) for slot in range(count)]


class _Way(NamedTuple):
    """What takes turns in one kind of pass, at which steps (rising), and where each piece will lie."""

    pieces: list[Piece]
    at: list[int]
    buffers: dict[str, torch.Tensor]


class Slots:
    """The slots of the pieces of a pass that are not on the device. `make(bytes)`: a uint8 buffer there.

    buffers: where each of those pieces will lie, by name. steps: how many steps a pass has; a layer's step is its number, the
    head's is the last. few: those of the pieces that take turns in passes of few tokens (None: all do), with `few_buffers`.
    """

    def __init__(self, pieces: Sequence[Piece], slots: int, steps: int, make: Callable[[int], torch.Tensor], mover: Mover,
                 trace: Trace, few: Sequence[Piece] | None = None):
        self.mover, self.trace = mover, trace
        self._slots = [make(size) for size in slot_bytes(pieces, slots, *([] if few is None else [few]))]
        self._ways = [_Way(list(way), [steps - 1 if piece.name == HEAD else piece.layer for piece in way],
                           {piece.name: self._slots[number % len(self._slots)][:piece.bytes]
                            for number, piece in enumerate(way)}) for way in (pieces, pieces if few is None else few)]
        self.choose(False)
        self._orders: list[Order | None] = [None] * len(self._slots)
        self._busy: int | None = None       # the slot that is being computed with
        self._settled = True
        self._freed = [None] * len(self._slots)

    @property
    def bytes(self) -> int:
        return sum(slot.nbytes for slot in self._slots)

    @property
    def few_buffers(self) -> dict[str, torch.Tensor]:
        return self._ways[1].buffers

    def choose(self, few: bool) -> None:
        """Whether the pass that begins, or comes next, is one of few tokens."""
        self.pieces, self._at, self.buffers = self._ways[few]
        self._has_head = bool(self.pieces) and self.pieces[-1].name == HEAD

    def turn(self, step: int, head: bool = True) -> None:
        """A step of the pass begins: what the one before used may be overwritten, its own piece is there when this returns, and
        the next ones are on their way. `head`: whether this pass comes to it. Raises what bringing the piece raised."""
        if not self.pieces:
            return
        if not self._settled:
            self.settle()
        self._rest()
        first = bisect_left(self._at, step)
        wanted = first if first < len(self.pieces) and self._at[first] == step else None
        order = self._ahead(first, head, wanted)
        if order is None:
            return
        slot = wanted % len(self._slots)
        if not order.done:
            with self.trace.span("wait", order.piece.name):
                order.wait()
        else:
            order.wait()
        self._busy = slot

    def rest(self, head: bool = True) -> None:
        """The pass is over: the first pieces of the next one are on their way."""
        if self.pieces:
            self._rest()
            self._ahead(0, head, None)

    def settle(self) -> None:
        """After something went wrong: when this returns nothing is under way, and what did not come counts as not there."""
        self._busy, self._settled = None, False
        for slot, order in enumerate(self._orders):
            if order is not None:
                self.mover.bring(order)     # where an interrupt came between: twice is no harm
                if not order.arrived():
                    self._orders[slot] = None
        self._settled = True

    def _rest(self) -> None:
        if self._busy is not None:
            self._freed[self._busy] = self.mover.moment()
            self._busy = None

    def _ahead(self, first: int, head: bool, wanted: int | None) -> Order | None:
        """Have the pieces from number `first` on brought, as far as there are slots; the order of the wanted one."""
        count, claimed, found = len(self._slots), set(), None
        for step in range(len(self.pieces)):
            number = (first + step) % len(self.pieces)
            if self._has_head and not head and number == len(self.pieces) - 1 and number >= first:
                continue
            slot = number % count
            if slot in claimed:
                break
            claimed.add(slot)
            order = self._orders[slot]
            if order is None or order.piece is not self.pieces[number]:
                if order is not None and not order.done:
                    order.arrived()         # after an interrupt, or for another kind of pass: nobody else may write there
                order = self._orders[slot] = Order(self.pieces[number], self.buffers[self.pieces[number].name],
                                                   self._freed[slot])
                self.mover.bring(order)
            if number == wanted:
                found = order
            if len(claimed) == count:
                break
        return found
