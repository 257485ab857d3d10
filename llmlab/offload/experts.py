"""A mixture's experts one by one: slots on the device that all layers share, filled with those that tokens choose.

`layers.mixture` says which it chose and is handed them one after another, while those that were not there are still being
brought; which of the others have to go is decided by `hits.Directory`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

import torch

from ..errors import LabError
from ..kernels import Packed, pack
from ..units import format_bytes, format_seconds
from .aside import Aside, in_ram
from .hits import Directory, Found
from .pieces import Piece
from .placement import Placement

if TYPE_CHECKING:
    from .trace import Trace

_STEM, _END = "ffn_", "_exps.weight"        # blk.3.ffn_gate_up_exps.weight is "gate_up"


class Ticket(Protocol):
    """A piece that is on its way, as `reading.Ticket` is."""

    @property
    def done(self) -> bool: ...
    def wait(self) -> None: ...
    def cancel(self) -> None: ...


Load = Callable[[Piece, torch.Tensor], Ticket]          # begins to bring a piece into uint8 [its bytes, or more]


@dataclass(frozen=True)
class Stats:
    """Of an expert cache since it was made, measured. layers: what each wanted and found, by its number in the model; loads
    that failed are among them. bytes: of the buffers that were filled; waited: seconds that computing stood still for it."""

    slots: int
    layers: dict[int, Found]
    bytes: int
    waited: float

    @property
    def total(self) -> Found:
        """All layers together."""
        return Found(*(sum(getattr(one, name) for one in self.layers.values()) for name in ("wanted", "pinned", "loads")))

    @property
    def answer(self) -> str:
        all = self.total
        if not all.wanted:
            return "No expert was wanted yet."
        pinned = f", {all.pinned:,} are always there" if all.pinned else ""
        return (f"Of {all.wanted:,} experts wanted{pinned}, {all.hits:,} were in one of {self.slots:,} slots (hit rate "
                f"{all.rate:.0%}) and {all.loads:,} were brought, {format_bytes(self.bytes)} in all; "
                f"{format_seconds(self.waited)} of waiting (measured).")


def expert_bytes(pieces: Mapping[str, Piece], placement: Placement, many: bool = True) -> dict[str, int]:
    """What an expert cache holds, by what it is for: "experts that stay", "expert slots" on the device; "experts in RAM".
    `many` as in `Placement.brought`."""
    experts = [piece for piece in pieces.values() if piece.expert is not None]
    by_tier = {tier: [piece for piece in experts if placement.tier(piece.name) == tier] for tier in ("device", "ram", "ssd")}
    return {"experts that stay": sum(piece.bytes for piece in by_tier["device"]),
            "expert slots": _slots(experts, placement, many) * _largest(experts, placement, many),
            "experts in RAM": sum(piece.bytes for piece in by_tier["ram"])}


def _largest(experts: list[Piece], placement: Placement, many: bool) -> int:
    return max((piece.bytes for piece in experts if placement.brought(piece.name, many)), default=0)


def _slots(experts: list[Piece], placement: Placement, many: bool) -> int:
    """As many as are asked for, and no more than there are experts to put there."""
    return min(placement.expert_slots, sum(placement.brought(piece.name, many) for piece in experts))


class ExpertCache:
    """The experts of all layers of a model.

    `load` brings a piece from wherever it lies into a buffer of `allocate(bytes)`, uint8 on the device and at a page's start;
    matrices are over its bytes themselves ("compact"), for inputs of `dtype`. held: the buffers of experts that are computed
    where they lie; with `aside` that is so in turns of few tokens, while `few` says so, and in others they come as all do.
    Raises LabError where no slot is asked for and some experts do not stay, and what `load` raises for those that do. One pass
    at a time.
    """

    def __init__(self, pieces: Mapping[str, Piece], placement: Placement, dtype: torch.dtype, load: Load,
                 allocate: Callable[[int], torch.Tensor], trace: "Trace | None" = None,
                 held: Mapping[str, torch.Tensor] | None = None, aside: Aside | None = None):
        experts = [piece for piece in pieces.values() if piece.expert is not None]
        self.pieces = {(piece.layer, piece.expert): piece for piece in experts}
        self.dtype, self.trace, self._load = dtype, trace, load
        self._numbers = {layer: number for number, layer in enumerate(sorted({piece.layer for piece in experts}))}
        many, held = aside is not None, held or {}
        stay = {key for key, piece in self.pieces.items() if not placement.brought(piece.name, many)}
        if not isinstance(placement.expert_slots, int) or placement.expert_slots < 0:
            raise LabError(f"expert_slots is {placement.expert_slots!r:.40}; give a whole number of slots, from 0 up")
        slots, each = _slots(experts, placement, many), _largest(experts, placement, many)
        if not slots and len(stay) < len(experts):
            raise LabError(f"{len(experts) - len(stay):,} experts are not to stay on the device and expert_slots is "
                           f"{placement.expert_slots}; give one slot at least")
        self.directory = Directory(len(self._numbers), max((piece.expert for piece in experts), default=-1) + 1, slots,
                                   frozenset((self._numbers[layer], expert) for layer, expert in stay))
        self._slots = [allocate(each) for _ in range(slots)]
        self._views: list[tuple[tuple, dict[str, Packed]]] = [((), {})] * slots
        self._inside: list[tuple[int, int] | None] = [None] * slots          # whose views a slot has, there or on its way
        self._tickets: dict[int, Ticket] = {}           # of slots that are being filled
        self._there: dict[int, dict[int, dict[str, Packed]]] = {layer: {} for layer in self._numbers}
        self._here: dict[int, dict[int, dict[str, Packed]]] = {layer: {} for layer in self._numbers}
        self._turn: dict[int, dict[int, dict[str, Packed]]] = {}       # of those here what this turn uses there
        self.few = 0 if aside is None else aside.few
        self._whole = True                      # whether the last turn came to its end
        self._bytes, self._waited = 0, 0.0
        under_way = []
        for (layer, expert), piece in sorted(self.pieces.items()):
            if (memory := held.get(piece.name)) is not None:
                where = self._there if (layer, expert) in stay else self._here
                where[layer][expert] = {name: in_ram(value, aside) for name, value in _matrices(piece, memory, dtype).items()}
            elif (layer, expert) in stay:
                memory = allocate(piece.bytes)
                under_way.append(load(piece, memory))
                self._there[layer][expert] = _matrices(piece, memory, dtype)
        for ticket in under_way:
            ticket.wait()

    def layer(self, number: int) -> dict:
        """What `layers.mixture` takes of a layer's experts: "<matrix>.experts" of each kind, and "fetch"; nothing for a layer
        without experts."""
        if number not in self._numbers:
            return {}
        piece = next(piece for (layer, _), piece in self.pieces.items() if layer == number)
        names = [_name(tensor.name) for tensor in piece.tensors]
        places = self._turn.setdefault(number, {}), self._there[number]
        return {**{f"{name}.experts": _Each(name, *places) for name in names}, "fetch": partial(self._fetch, number)}

    def stats(self) -> Stats:
        """What was wanted and found so far."""
        found = {layer: Found(one.wanted, one.pinned, one.loads)
                 for layer, one in zip(self._numbers, self.directory.found, strict=True)}
        return Stats(len(self._slots), found, self._bytes, self._waited)

    def close(self) -> None:
        """Wait for whoever still writes into a slot, and let go of all memory."""
        self._empty()
        self._slots, self._views = [], []
        for there in (*self._there.values(), *self._here.values(), *self._turn.values()):
            there.clear()

    # ---- one layer's turn ----------------------------------------------------------------------------------------

    def _fetch(self, layer: int, wanted: list[int], chosen: torch.Tensor) -> Iterator[int]:
        """The experts of `wanted`, rising, each to be used before the next is asked for: of several tokens (`chosen`, int
        [tokens, used]) in this order, of one those first that are there. Reading begins at once."""
        if not self._whole:
            self._empty()
        self._whole = False     # an interrupt may come between any two lines from here to the end of the turn
        tokens, turn = len(chosen), self._turn[layer]
        turn.clear()
        if tokens <= self.few:      # those that are computed where they lie
            turn.update((expert, self._here[layer][expert]) for expert in wanted if expert in self._here[layer])
            found = self.directory.found[self._numbers[layer]]
            found.wanted, found.pinned = found.wanted + len(turn), found.pinned + len(turn)
            wanted = [expert for expert in wanted if expert not in turn]
        counts = [1] * len(wanted) if tokens == 1 else torch.bincount(chosen.flatten())[wanted].tolist()
        steps = self.directory.serve(self._numbers[layer], wanted, counts, tokens)
        return chain(list(turn), self._handed_out(layer, steps, self._next(layer, steps)))

    def _handed_out(self, layer: int, steps: Iterator, turn: tuple[int, int | None] | None) -> Iterator[int]:
        while turn is not None:
            expert, slot = turn
            if slot in self._tickets:
                self._wait(slot)
            yield expert
            turn = self._next(layer, steps)
        self._whole = True

    def _next(self, layer: int, steps: Iterator) -> tuple[int, int | None] | None:
        """The next expert to use and its slot, after beginning to bring what there is room for."""
        for what, expert, slot in steps:
            if what == "use":
                return expert, slot
            self._begin(slot, (layer, expert))
        return None

    def _begin(self, slot: int, key: tuple[int, int]) -> None:
        self._leave(slot)
        piece, memory = self.pieces[key], self._slots[slot]
        self._inside[slot] = key
        kind = tuple((_name(one.name), one.type, one.shape, one.offset) for one in piece.tensors)
        if self._views[slot][0] != kind:
            self._views[slot] = kind, _matrices(piece, memory, self.dtype)
        self._tickets[slot] = self._load(piece, memory)
        self._bytes += piece.bytes
        self._there[key[0]][key[1]] = self._views[slot][1]

    def _wait(self, slot: int) -> None:
        ticket = self._tickets[slot]
        if ticket.done:
            ticket.wait()       # it may raise
        else:
            start = perf_counter()
            try:
                ticket.wait()
            finally:
                end = perf_counter()
                self._waited += end - start
                if self.trace is not None:
                    self.trace.add("wait", self.pieces[self._inside[slot]].name, start, end)
        del self._tickets[slot]

    def _empty(self) -> None:
        """After a turn that was broken off: nobody writes into any slot, and nothing is in one, whatever was being written down
        when it happened. What is known of the text stays."""
        for ticket in list(self._tickets.values()):
            ticket.cancel()
        self._tickets.clear()
        before, self._inside = self.directory, [None] * len(self._slots)
        self.directory = Directory(before.layers, before.experts, before.slots, before.pinned)
        self.directory.rates, self.directory.found = before.rates, before.found
        for layer, number in self._numbers.items():
            for expert in [expert for expert in self._there[layer] if (number, expert) not in before.pinned]:
                self._there[layer].pop(expert, None)

    def _leave(self, slot: int) -> None:
        if self._inside[slot] is not None:
            layer, expert = self._inside[slot]
            self._there[layer].pop(expert, None)
            self._inside[slot] = None


class _Each:
    """One of the matrices of a layer's experts, by expert: of those that were handed out last, or stay."""

    def __init__(self, name: str, *places: dict[int, dict[str, Packed]]):
        self.name, self.places = name, places

    def __getitem__(self, expert: int) -> Packed:
        return next(place for place in self.places if expert in place)[expert][self.name]


def _name(tensor: str) -> str:
    return tensor.rpartition(f".{_STEM}")[2].removesuffix(_END)


def _matrices(piece: Piece, memory: torch.Tensor, dtype: torch.dtype) -> dict[str, Packed]:
    """An expert's matrices over the bytes of a buffer, by what `layers.mixture` calls them."""
    return {_name(one.name): pack(memory[one.offset:one.offset + one.bytes].view(one.shape[0], -1), one.type, "compact", dtype,
                                  f"{one.name}[{piece.expert}]", mapped=False) for one in piece.tensors}
