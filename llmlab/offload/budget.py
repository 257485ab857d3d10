"""A budget that is kept: whatever a decoder holds is taken from it first, and what does not fit is never allocated.

Tiers: "device", where it is computed (a card's memory, or on a processor an arena in RAM), and "ram".
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from ..errors import LabError
from ..kernels import Packed, scratch
from ..kernels.arithmetic import multiply_in
from ..kernels.words import Words
from ..memory import cache_types
from ..runtime.cache import LayerCache, cells_of
from ..runtime.weights import Weights
from ..units import format_bytes, parse_bytes
from .aside import Aside
from .caching import ROOMS, room_bytes
from .experts import expert_bytes
from .pieces import Piece
from .placement import Placement
from .slots import slot_bytes

BATCH = 512         # tokens of a prompt that are read at once (runtime/decoder.py)


class OverBudget(LabError):
    """More is wanted than the budget has left."""


class Line(NamedTuple):
    """What something takes of a tier. kind: "exact" or "modelled"."""

    tier: str
    what: str
    bytes: int
    kind: str = "exact"


class Budget:
    """Bytes that may be held on the device and in RAM, and what holds them. None: no limit, but all is counted.

    device, ram: bytes or words such as "300 MiB". used: bytes taken, by tier; most: at the worst moment so far. lines: by whom.
    Raises LabError for no sizes.
    """

    def __init__(self, device: int | str | None = None, ram: int | str | None = None):
        self.limits = {"device": None if device is None else parse_bytes(device),
                       "ram": None if ram is None else parse_bytes(ram)}
        self._taken: dict[tuple[str, str], list] = {}
        self._lock = threading.Lock()
        self.most = {"device": 0, "ram": 0}

    def take(self, tier: str, what: str, bytes: int, kind: str = "exact", remedy: str = "") -> None:
        """Set bytes aside. Raises OverBudget where they are not left; `remedy` then says what to change."""
        with self._lock:
            used, limit = self.used[tier], self.limits[tier]
            if limit is not None and used + bytes > limit:
                remedy = remedy or "give a larger one, or let go of something"
                raise OverBudget(f"{what} would take {format_bytes(bytes)} and of the budget of {format_bytes(limit)} "
                                 f"({_place(tier)}) {format_bytes(limit - used)} are left; {remedy}")
            held = self._taken.setdefault((tier, what), [0, kind])
            held[0] += bytes
            self.most[tier] = max(self.most[tier], used + bytes)

    def give_back(self, tier: str, what: str, bytes: int | None = None) -> None:
        """Bytes that are held no longer (None: all of these)."""
        with self._lock:
            held = self._taken.get((tier, what))
            if held is not None:
                held[0] -= held[0] if bytes is None else bytes
                if not held[0]:
                    del self._taken[tier, what]

    @contextlib.contextmanager
    def lent(self, tier: str, what: str, bytes: int, remedy: str = "") -> Iterator[None]:
        """For as long as it lasts."""
        self.take(tier, what, bytes, "modelled", remedy)
        try:
            yield
        finally:
            self.give_back(tier, what, bytes)

    @property
    def used(self) -> dict[str, int]:
        taken = list(self._taken.items())       # at once: another thread may take some
        return {tier: sum(held for (where, _), (held, _) in taken if where == tier) for tier in self.limits}

    @property
    def lines(self) -> tuple[Line, ...]:
        return tuple(Line(tier, what, held, kind) for (tier, what), (held, kind) in list(self._taken.items()))

    def __repr__(self) -> str:
        said = [f"{tier}: {format_bytes(used)}" + (f" of {format_bytes(limit)}" if (limit := self.limits[tier]) is not None
                                                   else "") for tier, used in self.used.items() if used or self.limits[tier]]
        return f"Budget({'; '.join(said) or 'nothing is taken'})"


def _place(tier: str) -> str:
    return "on the device" if tier == "device" else "in RAM"


# ---- what a decoder takes ----------------------------------------------------------------------------------------------

def needs(outline: Weights, pieces: dict[str, Piece], placement: Placement, dtype: torch.dtype, device: torch.device,
          sinks: int = 0, recent: int = 0, rotate: bool = False, aside: Aside | None = None, rooms: int = ROOMS) -> list[Line]:
    """Everything that a decoder of this placement will hold, before any of it is there. `outline` as `outlining.outline` gives
    it for this dtype and device. `aside`: of fast mode; `rooms` as `caching.Turns` has them."""
    whole = [piece for piece in pieces.values() if piece.expert is None]
    at = {tier: [piece for piece in whole if placement.tier(piece.name) == tier] for tier in ("device", "ram", "ssd")}
    turns, few = ([piece for piece in whole if placement.brought(piece.name, many)] for many in (aside is not None, False))
    experts = expert_bytes(pieces, placement, aside is not None)
    kv = multiply_in(dtype, device.type), sinks, recent, rotate
    cells, tables = sum(map(_held, caches(outline, placement, *kv))), table_bytes(outline, placement)
    found = [Line("device", "layers that stay", sum(piece.bytes for piece in at["device"])),
             Line("device", "slots", sum(slot_bytes(turns, placement.slots, few)) if turns else 0),
             Line("device", "experts that stay", experts["experts that stay"]),
             Line("device", "expert slots", experts["expert slots"]),
             Line("ram", "layers in RAM", sum(piece.bytes for piece in at["ram"])),
             Line("ram", "experts in RAM", experts["experts in RAM"]),
             Line("device", "small tensors", small_bytes(outline)),
             *([Line("device", "KV cache", cells + tables)] if placement.kv == "device" else
               [Line("ram", "KV cache", cells),
                Line("device", "KV cache's turns", room_bytes(caches(outline, placement, *kv), rooms) + tables)]),
             Line("device", "workspace", workspace(outline, placement, dtype, device), "modelled")]
    if aside is not None:
        found.append(Line("ram", "workspace in RAM", workspace_in_ram(outline, aside), "modelled"))
    if device.type != "cpu":
        found.append(Line("ram", "staging ring", sum(ring_bytes(pieces, placement))))
    return [line for line in found if line.bytes]


def ring_bytes(pieces: dict[str, Piece], placement: Placement) -> list[int]:
    """Of the buffers in pinned memory that a card's pieces are read into: two, so that one is filled while one is copied."""
    largest = max((piece.bytes for piece in pieces.values()), default=0)
    return [largest, largest]


def small_bytes(outline: Weights) -> int:
    """Norms, biases, routers and what else is held as numbers."""
    parts = [*outline.layers, outline.head]
    held = {id(value): value.nbytes for part in parts for value in part.values()
            if isinstance(value, torch.Tensor) and not value.is_meta}
    return sum(held.values())


def caches(outline: Weights, placement: Placement, dtype: torch.dtype, sinks: int = 0, recent: int = 0,
           rotate: bool = False) -> list[torch.Tensor | LayerCache]:
    """The KV cache of each layer for the whole context, without memory (on torch's "meta" device)."""
    context = min(placement.context, outline.trained)
    if placement.kv_types is None:
        return [torch.empty(2, shape.kv_heads, context, shape.head_dim, dtype=dtype, device="meta") for shape in outline.shapes]
    kv, widest, found = cache_types(placement.kv_types), max(shape.window for shape in outline.shapes), []
    for shape in outline.shapes:
        room = cells_of(context, widest if shape.window else 0)
        found.append(LayerCache(kv, shape.kv_heads, shape.head_dim, shape.head_dim, window=shape.window, cells=room,
                                capacity=room, sinks=sinks, recent=recent, rotate=rotate, device="meta"))
    return found


def _held(cache: torch.Tensor | LayerCache) -> int:
    return sum(t.nbytes for t in (cache.tensors if isinstance(cache, LayerCache) else (cache,)))


def table_bytes(outline: Weights, placement: Placement) -> int:
    """The cosines and sines of every position."""
    context, found = min(placement.context, outline.trained), 0
    for turning in range(len(outline.turnings)):
        turned = next(shape.turned for shape, way in zip(outline.shapes, outline.turning, strict=True) if way == turning)
        found += 2 * 4 * context * turned
    return found


def workspace_in_ram(outline: Weights, aside: Aside) -> int:
    """What multiplying in RAM holds meanwhile, modelled: a chunk of a matrix unpacked, with what that takes beside it, and what
    goes into a matrix and comes out."""
    return 4 * _chunk(outline, torch.device("cpu")) * 4 + 4 * aside.few * max(sum(sides) for sides in _matrices(outline)) * 2


def _matrices(outline: Weights) -> set[tuple[int, int]]:
    """(rows, cols) of all of them."""
    return {(packed.rows, packed.cols) for part in (*outline.layers, outline.head) for value in part.values()
            for packed in (value if type(value) is tuple else (value,)) if isinstance(packed, (Packed, Words))}


def _chunk(outline: Weights, device: torch.device) -> int:
    """Weights that are unpacked at a time."""
    return max((min(rows, scratch.rows_at_once(cols, device)) * cols for rows, cols in _matrices(outline)), default=0)


def workspace(outline: Weights, placement: Placement, dtype: torch.dtype, device: torch.device) -> int:
    """What computing holds meanwhile, modelled: a chunk of a matrix unpacked (kernels/scratch.py) with what that takes beside
    it, the activations of a piece of a prompt, what attention holds of them, and one row of logits."""
    matrices, chunk = _matrices(outline), _chunk(outline, device)
    context = min(placement.context, outline.trained)
    tokens, size = min(BATCH, context), 4
    width = outline.embedding.cols
    inner = max((rows for rows, _ in matrices if rows != outline.embedding.rows), default=width)
    heads = max(shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim for shape in outline.shapes)
    activations = tokens * size * (4 * width + 3 * heads + 4 * inner)
    scores = tokens * context
    if any(shape.softcap or "sinks" in layer for shape, layer in zip(outline.shapes, outline.layers, strict=True)):
        scores += 64 * 4 * context * 4 * max(shape.heads for shape in outline.shapes)
    if placement.kv_types is not None:
        scores += 4 << 22
    return int(4 * chunk * 4 + activations + scores + 2 * 4 * outline.embedding.rows)


def least(outline: Weights, pieces: dict[str, Piece], placement: Placement, dtype: torch.dtype, device: torch.device,
          **near: int) -> list[Line]:
    """What the least placement takes with the same context and cache: nothing stays, one slot, one of experts."""
    experts = any(piece.expert is not None for piece in pieces.values())
    return needs(outline, pieces, replace(placement, where={}, slots=1, expert_slots=int(experts)), dtype, device, **near)


def total(lines: Iterable[Line], tier: str = "device") -> int:
    return sum(line.bytes for line in lines if line.tier == tier)
