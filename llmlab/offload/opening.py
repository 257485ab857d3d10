"""Opening a model whose pieces live in several tiers: everything is counted first, then made, and gone again with `close`."""

import contextlib
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..errors import LabError
from ..gguf import GGUFFile, read_gguf
from ..gguf.words import show_path
from ..kernels.pages import BLOCK
from ..memory import cache_types
from ..runtime.decoder import Decoder, quick_dtype
from ..runtime.heap import give_back
from ..runtime.layers import Matmul
from ..runtime.weights import Weights
from ..units import format_bytes
from .aside import Aside, Deviation, in_ram, label
from .budget import Budget, Line, OverBudget, least, needs, ring_bytes, total
from .caching import ROOMS, Turns
from .experts import ExpertCache
from .moving import Mover, Order
from .outlining import outline
from .pieces import HEAD, Piece
from .placement import MODES, TIERS, Placement
from .reading import Readers, buffer
from .slots import Slots
from .store import Store, in_place
from .streaming import Handing, Streamed
from .trace import Trace

if TYPE_CHECKING:
    from ..runtime.compiled import Compiled

Progress = Callable[[str], None]
_SHORT = 512            # tokens of the context that is proposed where there is too little room


class Offloaded(Decoder):
    """A decoder whose layers are brought when they are needed. Its logits are those of `Decoder.open(..., strategy="compact")`
    to the bit, wherever its pieces lie; in fast mode beside a card (`aside` then says how) they deviate.

    placement: where they do. trace: what was read, copied, waited for and computed, and when. budget: what is held, by what.
    experts: of a mixture, its `ExpertCache`, else None. `close`, or leaving it as a context, ends its threads and gives all
    memory back; using it afterwards raises LabError.
    """

    def __init__(self, weights: Streamed, parts: "_Parts", placement: Placement, file: GGUFFile, dtype: torch.dtype, **cache):
        self.parts, self.placement, self.trace, self.budget = parts, placement, parts.trace, parts.budget
        self.experts, self.aside, self._alone, self._exactly = parts.experts, parts.aside, False, False
        at_home = placement.kv == "device"
        super().__init__(weights, dtype, min(placement.context, weights.trained), file, placement.kv_types, fixed=True,
                         cache_device=None if at_home else torch.device("cpu"), **cache)
        self._turns = parts.turns
        self.graphed = False
        self._end = weakref.finalize(self, parts.close)     # it knows the parts, and so not this
        self.why = f"{_told(parts.store, placement)}; {self.why}"
        if placement.mode == "fast":
            here = any(placement.tier(name) == "ram" for name in parts.store.pieces)
            self.why = f"{label(self.aside) if here else 'fast mode: nothing lies in RAM, so nothing differs'}; {self.why}"
            self.strategy += " in fast mode" * here

    @property
    def resident_bytes(self) -> int:
        """What all of it holds on the device and in RAM, workspace and cache among it."""
        return sum(self.budget.used.values())

    @property
    def card_peak(self) -> int | None:
        """The most bytes that torch held of the card since this was opened, what it keeps for later among them, measured; None
        on a processor. A budget is kept to by torch itself there."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None

    @property
    def closed(self) -> bool:
        return self.parts.closed

    def close(self) -> None:
        """End its threads and give its memory back. Twice is no harm."""
        if self.closed:
            return
        with self.lock:
            self.parts.close()
            self._end.detach()
            self.weights = self.lock = _Gone()
            self.caches, self.tables, self.tokens, self.compiled, self.experts = [], [], [], None, None
            self._turns = None
            self.budget = Budget()
        give_back()

    def __enter__(self) -> "Offloaded":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def deviation(self, tokens: list[int]) -> Deviation:
        """How far logits of fast mode are from those of the exact mode, of a text of these tokens read one after another: two
        passes. What was read before is forgotten. Raises LabError as `read_each` does, and where the mode is exact."""
        if self.placement.mode != "fast":
            raise LabError("this decoder is in exact mode; open it with mode='fast' to compare")
        with self.lock:
            if self.aside is None:
                return Deviation(len(tokens), kind="exact")
            few, found = self.experts and self.experts.few, []
            for exactly in (False, True):
                self.forget()
                try:
                    self._exactly = exactly
                    if exactly and self.experts:
                        self.experts.few = 0
                    size = 4 * len(found) * len(tokens) * self.weights.embedding.rows
                    with self.budget.lent("ram", "logits to compare", size):
                        found.append(self.read_each(tokens).cpu())
                finally:
                    self._exactly = False
                    if self.experts:
                        self.experts.few = few
            self.forget()
            self.parts.hold(0)
            return Deviation.of(*found)

    # ---- a pass --------------------------------------------------------------------------------------------------

    def _read(self, tokens: list[int], wanted: int) -> torch.Tensor:
        self.parts.hold(0)
        with self._pass(wanted):
            return super()._read(tokens, wanted)

    def _read_each(self, tokens: list[int]) -> torch.Tensor:
        if self._alone:
            return super()._read_each(tokens)
        self._alone = True
        self.parts.hold(0)
        try:
            with self._pass(len(tokens)):
                found = super()._read_each(tokens)
        finally:
            self._alone = False
        self.parts.hold((len(tokens) - 1) * 4 * self.weights.embedding.rows)
        return found

    @contextlib.contextmanager
    def _pass(self, rows: int) -> Iterator[None]:
        """What surrounds one: files are as they were, the logits have room, and afterwards nothing is left half-done."""
        parts = self.parts
        parts.store.check()
        extra = (rows - 1) * 2 * 4 * self.weights.embedding.rows
        with parts.budget.lent("device", f"logits of {rows:,} tokens", extra, "ask for those of fewer tokens at once"):
            try:
                yield
            except BaseException:
                parts.settle()
                raise
            finally:
                for file in self.file.sources:      # the rows of the embedding that were looked up
                    file.let_go()
        if self.aside is not None:
            self.weights.layers.choose(not self._exactly)       # most likely a token comes next
        parts.slots.rest()
        if parts.mover.clock is not None:
            parts.mover.clock.tell()

    def _through(self, stop: int, head: bool = True) -> Iterator[tuple]:
        start, turns = len(self.tokens), self._turns
        many = stop - start > 1
        self._mark(start, stop)
        if self.aside is not None:
            self.weights.layers.choose(not self._exactly and (self._alone or stop - start <= self.aside.few))
        if turns is not None:
            turns.start(self.caches, [shape.window for shape in self.weights.shapes], start)
        for number, (layer, shape, turning, cache) in enumerate(super()._through(stop, head)):
            if turns is None:
                yield layer, shape, turning, cache
            else:
                yield layer, shape, turning, turns.begin(number)
                turns.end(number, start, stop)
            if many:        # what a prompt's layer took goes back before the next one: the C library would keep twice of it
                give_back()
        if turns is not None:
            turns.finish()

    def _compiled(self, x: torch.Tensor, start: int) -> torch.Tensor:
        self._mark(start, start + len(x))
        return super()._compiled(x, start)

    def _mark(self, start: int, stop: int) -> None:
        self.trace.mark(f"token {start}" if stop == start + 1 else f"tokens {start} to {stop - 1}")

    def _head(self, x: torch.Tensor, multiply: Matmul | None = None) -> torch.Tensor:
        found = super()._head(x, multiply)
        self.weights.layers.ended()
        return found


class _Gone:
    """In place of what a closed decoder had."""

    def __getattr__(self, name: str):
        raise LabError("this decoder was closed; open the model again")

    def __enter__(self):
        raise LabError("this decoder was closed; open the model again")

    def __exit__(self, *_: object) -> None:
        pass


class _Parts:
    """What an offloaded decoder holds beside its weights: made one after another, undone together."""

    def __init__(self, store: Store, budget: Budget, trace: Trace):
        self.store, self.budget, self.trace, self.closed = store, budget, trace, False
        self.readers: Readers | None = None
        self.mover: Mover | None = None
        self.slots: Slots | None = None
        self.experts: ExpertCache | None = None
        self.turns: Turns | None = None
        self.aside: Aside | None = None
        self.rooms, self.held = ROOMS, 0
        self.taken: list[Line] = []
        self.undo: list[Callable[[], None]] = []

    def hold(self, bytes: int) -> None:
        """Logits after guesses are held until their tokens have come, which is until the next pass."""
        self.budget.give_back("device", "logits of guesses", self.held)
        self.held = 0
        if bytes:
            self.budget.take("device", "logits of guesses", bytes)
            self.held = bytes

    def settle(self) -> None:
        if self.turns is not None:
            self.turns.settle()
        self.mover.settle()
        self.slots.settle()

    def close(self) -> None:
        self.closed = True
        for part in (self.turns, self.experts, self.mover, self.readers):
            if part is not None:
                part.close()
        for undo in self.undo:
            undo()
        for line in self.taken:
            self.budget.give_back(line.tier, line.what, line.bytes)
        self.hold(0)
        self.slots = self.experts = self.turns = None
        self.taken, self.undo = [], []


def open_decoder(file: str | os.PathLike | GGUFFile, placement: Placement, budget: Budget | int | str | None = None,
                 dtype: torch.dtype | None = None, device: torch.device | str = "cpu", trace: Trace | None = None,
                 progress: Progress | None = None, store: Store | None = None, sinks: int = 0, recent: int = 0,
                 rotate: bool = False, aside: Aside | None = None) -> Offloaded:
    """The decoder of a GGUF with its pieces where `placement` says. `budget`: bytes or words ("300 MiB") for the device, or a
    `Budget` for both tiers; None: no limit. `dtype`, `sinks`, `recent`, `rotate` as in `Decoder.open`. `store`: where pieces
    are read from (None: the GGUF itself; of layout "words" a store in llmlab's cache, written where there is none). `progress`
    is told what is being read, written or compiled. `aside`: of fast mode, how RAM layers are computed for another device
    (None: beside a card as the processor is quickest; on a processor as all others are, without copies). Raises OverBudget
    where the budget is too small, saying how much is the least and what to change; LabError and BadFile as `Decoder.open` does,
    and NotCompiled where a model cannot have layout "words"."""
    file = file if isinstance(file, GGUFFile) else read_gguf(file)
    near = {"sinks": sinks, "recent": recent, "rotate": rotate}
    looked = look(file, placement, dtype, device, store, progress, **near, aside=aside)
    _check(placement, looked.store)
    parts = _Parts(looked.store, budget if isinstance(budget, Budget) else Budget(budget), trace or Trace())
    try:
        _take(parts, looked, placement, near)
        weights, compiled = _weights(parts, looked, placement, progress or (lambda said: None), near)
        return Offloaded(weights, parts, placement, file, looked.held, compiled=compiled, **near)
    except BaseException:
        parts.close()
        raise


class Looked(NamedTuple):
    """A model before anything of it is read. dtype: in which many tokens at once are multiplied."""

    like: Weights
    store: Store
    dtype: torch.dtype
    device: torch.device
    words: bool
    aside: Aside | None = None

    def needs(self, placement: Placement, **near) -> list[Line]:
        """What a decoder of such a placement will hold."""
        return needs(self.like, self.store.pieces, placement, self.held, self.device, **near, aside=self.aside)

    def least(self, placement: Placement, **near) -> list[Line]:
        return least(self.like, self.store.pieces, placement, self.held, self.device, **near, rooms=1)

    @property
    def held(self) -> torch.dtype:
        """What keys and values that are plain numbers follow."""
        return torch.float32 if self.words else self.dtype


def look(file: GGUFFile, placement: Placement, dtype: torch.dtype | None = None, device: torch.device | str = "cpu",
         store: Store | None = None, progress: Progress | None = None, sinks: int = 0, recent: int = 0,
         rotate: bool = False, aside: Aside | None = None) -> Looked:
    """See `open_decoder`."""
    if file.is_projector:
        raise LabError(f"{show_path(file.paths[0])} is the projector of a model, not a model; give the model's own file")
    device = torch.empty(0, device=device).device
    dtype = dtype or quick_dtype(device)
    if placement.layout == "gguf":
        like = outline(file, in_place(file).pieces, dtype, device)
        if placement.mode == "fast" and aside is None and device.type != "cpu":
            aside = Aside(quick_dtype(torch.device("cpu")))
        return Looked(like, store or in_place(file), dtype, device, False, aside if placement.mode == "fast" else None)
    if placement.layout != "words":
        raise LabError(f"the placement's layout is {placement.layout!r:.40}; give 'gguf' or 'words'")
    from ..runtime.compiled import NotCompiled
    from . import words

    if placement.kv == "ram":
        raise NotCompiled("the layout 'words' has its KV cache on the device; use the layout 'gguf'")
    if device.type != "cpu" or sinks or recent:
        raise NotCompiled("the layout 'words' is for processors, and has no tokens in full precision beside a packed cache; "
                          "use the layout 'gguf'")

    kv = None if placement.kv_types is None else cache_types(placement.kv_types)
    like = words.described_model(file, kv, min(placement.context, file.metadata.get(f"{file.architecture}.context_length",
                                                                                    placement.context)))
    if store is None:
        store = words.kept(file, progress=progress and _by_tenths(progress))
    return Looked(like, store, dtype, device, True)


def _by_tenths(progress: Progress) -> Callable[[float, str], None]:
    """Tells a tenth of it at a time."""
    told = set()

    def tell(share: float, said: str) -> None:
        if (tenth := int(10 * share)) not in told:
            told.add(tenth)
            progress(f"laying the weights out anew, once: {share:.0%}")

    return tell


def _check(placement: Placement, store: Store) -> None:
    for name, tier in placement.where.items():
        if name not in store.pieces:
            raise LabError(f"the placement names {name[:60]!r}, which this model does not have; its pieces are "
                           f"{', '.join([*store.pieces][:3])}, ... and {[*store.pieces][-1]}")
        if tier not in TIERS:
            raise LabError(f"the placement puts {name} on {tier!r:.40}; give one of {', '.join(TIERS)}")
    if placement.mode not in MODES:
        raise LabError(f"the placement's mode is {placement.mode!r:.40}; give one of {', '.join(MODES)}")
    if placement.kv not in ("device", "ram"):
        raise LabError(f"the placement puts the KV cache on {placement.kv!r:.40}; give 'device' or 'ram'")
    if isinstance(placement.slots, bool) or not isinstance(placement.slots, int) or placement.slots < 1:
        raise LabError(f"slots is {placement.slots!r:.40}; give 1 at least, 2 to read ahead")


def _take(parts: _Parts, looked: Looked, placement: Placement, near: dict) -> None:
    """Everything is taken from the budget before any of it is there."""
    budget = parts.budget
    left = {tier: limit - budget.used[tier] for tier, limit in budget.limits.items() if limit is not None}
    lines = looked.needs(placement, **near)
    if any(total(lines, tier) > size for tier, size in left.items()):
        parts.rooms = 1         # a cache in RAM then comes when it is wanted, and not ahead
        lines = looked.needs(placement, **near, rooms=1)
    for tier, size in left.items():
        if total(lines, tier) > size:
            raise OverBudget(_too_little(looked, placement, near, lines, tier, size))
    for line in lines:
        budget.take(line.tier, line.what, line.bytes, line.kind)
        parts.taken.append(line)


def _too_little(looked: Looked, placement: Placement, near: dict, lines: list[Line], tier: str, left: int) -> str:
    """How much is the least, and what to change."""
    def size(other: Placement) -> int:
        return total(looked.least(other, **near), tier)

    where = "on the device" if tier == "device" else "in RAM"
    most = sorted((line for line in lines if line.tier == tier), key=lambda line: -line.bytes)
    said = ", ".join(f"{line.what} {format_bytes(line.bytes)}" for line in most[:4])
    text = f"this placement takes {format_bytes(total(lines, tier))} {where} ({said}) and the budget has {format_bytes(left)}"
    least = size(placement)
    if least <= left:
        return f"{text}; the least is {format_bytes(least)}: let fewer layers stay, or use fewer slots"
    context, changes = min(placement.context, looked.like.trained), {}
    if context > _SHORT:
        changes[f"a context of {_SHORT}"] = replace(placement, context=_SHORT)
    if placement.kv_types is None and all(shape.head_dim % BLOCK == 0 for shape in looked.like.shapes):
        changes["kv='q8_0'"] = replace(placement, kv_types="q8_0")
    ways = [f"{words} ({format_bytes(smaller)})" for words, other in changes.items() if (smaller := size(other)) < least]
    return (f"{text}; the least for a context of {context:,} is {format_bytes(least)}: give that, or "
            f"{', or '.join([*ways, 'a file that is quantized harder'])}")


def _weights(parts: _Parts, looked: Looked, placement: Placement, progress: Progress,
             near: dict) -> tuple[Streamed, "Compiled | None"]:
    """All that is made; what is compiled of it, in the layout "words"."""
    store, trace, device, like = parts.store, parts.trace, looked.device, looked.like
    make = partial(_on_device, device=device)
    tier = {piece.name: placement.tier(piece.name) for piece in store.pieces.values()}
    whole = [piece for piece in store.pieces.values() if piece.expert is None]
    parts.readers = Readers(store.files, placement.readers, placement.direct, trace)
    _limit_card(parts, device)
    ring = [] if device.type == "cpu" else [_host(size, device, parts) for size in ring_bytes(store.pieces, placement)]
    held = {name: _host(store.pieces[name].bytes, device, parts) for name in tier if tier[name] == "ram"}
    _tell(progress, held, "in RAM")
    tickets = [parts.readers.fetch(store.pieces[name], into) for name, into in held.items()]
    for ticket in tickets:
        ticket.wait()
    parts.aside, fast = looked.aside, placement.mode == "fast"
    copied = {name: made for name, made in held.items() if placement.brought(name, looked.aside is not None)}
    parts.mover = Mover(parts.readers, copied, device, ring, trace)
    if placement.kv == "ram":
        parts.turns = Turns(device, trace, parts.mover.clock, parts.rooms)
    buffers = {piece.name: make(piece.bytes) for piece in whole if tier[piece.name] == "device"}
    _tell(progress, buffers, "on the device")
    orders = [_bring(parts.mover, store.pieces[name], into) for name, into in buffers.items()]
    for order in orders:
        order.wait()
    turns, few = ([piece for piece in whole if placement.brought(piece.name, many)]
                  for many in (looked.aside is not None, False))
    parts.slots = Slots(turns, placement.slots, len(like.layers) + 1, make, parts.mover, trace, few)
    here = {name: made for name, made in held.items() if fast}
    few_buffers = buffers | parts.slots.few_buffers | here
    buffers = buffers | here | parts.slots.buffers
    if len(whole) < len(store.pieces):
        parts.experts = ExpertCache(store.pieces, placement, looked.dtype, partial(_bring, parts.mover), make, trace, here,
                                    looked.aside)
    if looked.words:
        from .words import seen as over
    else:
        from .outlining import over

    def part(of: dict, name: str, buffers: dict[str, torch.Tensor]) -> dict:
        found = over(of, store.pieces[name], buffers[name], str(store.path))
        return {key: in_ram(value, looked.aside) for key, value in found.items()} if buffers[name] is here.get(name) else found

    def all(buffers: dict[str, torch.Tensor]) -> tuple[tuple[dict, ...], dict]:
        return (tuple({**part(layer, f"blk.{number}", buffers), **(parts.experts.layer(number) if parts.experts else {})}
                      for number, layer in enumerate(like.layers)), part(like.head, HEAD, buffers))

    ways = all(buffers), None if looked.aside is None else all(few_buffers)
    weights = Streamed.of(like, Handing(*ways[0], parts.slots, trace, parts.mover.clock, ways[1]))
    if not looked.words:
        return weights, None
    from ..runtime.compiled import Compiled, NotCompiled, NotPackaged

    kv = None if placement.kv_types is None else cache_types(placement.kv_types)
    try:
        return weights, Compiled(weights, looked.dtype, progress, True, kv, near["rotate"], unlock=bool(turns))
    except NotPackaged as error:
        raise NotCompiled(f"{error}; use the layout 'gguf'") from error


def _tell(progress: Progress, buffers: dict[str, torch.Tensor], where: str) -> None:
    if buffers:
        size = sum(buffer.nbytes for buffer in buffers.values())
        progress(f"reading {len(buffers):,} pieces that stay {where}, {format_bytes(size)}")


def _bring(mover: Mover, piece: Piece, into: torch.Tensor) -> Order:
    order = Order(piece, into[:piece.bytes], mover.moment())
    mover.bring(order)
    return order


def _on_device(bytes: int, device: torch.device) -> torch.Tensor:
    return buffer(bytes) if device.type == "cpu" else torch.empty(bytes, dtype=torch.uint8, device=device)


def _host(bytes: int, device: torch.device, parts: _Parts) -> torch.Tensor:
    """Memory that readers fill; for a card pinned, exactly so much (torch's own pinned memory is rounded up to a power of
    two)."""
    made = buffer(bytes)
    if device.type == "cuda":
        found = torch.cuda.cudart().cudaHostRegister(made.data_ptr(), made.nbytes, 0)
        if int(found) != 0:
            raise LabError(f"{format_bytes(bytes)} of RAM cannot be pinned for the card (CUDA error {int(found)}); raise the "
                           "limit on locked memory (ulimit -l), or keep less in RAM")
        parts.undo.append(partial(_unpin, made))
    return made


def _unpin(made: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(made.data_ptr())


def _limit_card(parts: _Parts, device: torch.device) -> None:
    """On a card torch itself keeps to the budget: what goes over raises torch.OutOfMemoryError."""
    limit = parts.budget.limits["device"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if device.type != "cuda" or limit is None:
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    before = torch.cuda.memory_allocated(device)
    limit -= parts.budget.used["device"] - total(parts.taken)       # what others took of it is there
    torch.cuda.set_per_process_memory_fraction(min(1.0, (before + limit) / whole), device)
    parts.undo.append(partial(torch.cuda.set_per_process_memory_fraction, 1.0, device))


def _told(store: Store, placement: Placement) -> str:
    whole = Counter(placement.tier(piece.name) for piece in store.pieces.values() if piece.expert is None)
    verbs = {"device": "stay", "ram": "come from RAM", "ssd": "come from SSD"}
    if placement.mode == "fast":
        verbs["ram"] = "are in RAM"
    said = [f"{whole[tier]} {verbs[tier]}" for tier in TIERS if whole[tier]]
    slots = "" if whole.total() == whole["device"] else f" through {placement.slots} slots"
    experts = [piece.name for piece in store.pieces.values() if piece.expert is not None]
    if not experts:
        return f"of {whole.total()} pieces {', '.join(said)}{slots}"
    stay = sum(placement.tier(name) == "device" for name in experts)
    return (f"of {whole.total()} pieces {', '.join(said)}{slots}; of {len(experts):,} experts {stay:,} stay, the others share "
            f"{placement.expert_slots:,} slots")


__all__ = ["Offloaded", "open_decoder"]
