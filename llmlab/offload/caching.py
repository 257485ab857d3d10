"""A KV cache that lies in RAM: each layer's comes to the device before its turn, and what is new of it goes back.

The same arithmetic then runs over the same numbers in the same order, in caches on the device that all layers of a kind share:
while one is computed with, a thread brings the next layer's into another, on a card by a stream of its own.
"""

import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from ..errors import LabError
from ..kernels.pages import PAGE
from ..runtime.cache import LayerCache
from .gate import Gate
from .moving import Clock
from .trace import Trace

Cache = torch.Tensor | LayerCache       # [2, kv_heads, cells, head_dim] of numbers, or packed pages
ROOMS = 2               # for each kind of layer: one to compute with, one to fill
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}      # numpy copies these, and knows no bfloat16


class Turns:
    """Room on the device for the caches of `rooms` layers of each kind. bytes: of it.

    For each pass `start` says which caches take their turns, `begin` and `end` follow for each of them in order, then `finish`.
    `close` leaves no thread behind.
    """

    def __init__(self, device: torch.device, trace: Trace, clock: Clock | None = None, rooms: int = ROOMS):
        self.device, self.trace, self.clock, self.count, self.rooms = device, trace, clock, rooms, {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.closed, self._settled = False, True
        self._homes: Sequence[Cache] = ()
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="cacher", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise LabError(f"the system starts no thread ({error}); close other programs") from None

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for room in self.rooms.values() for t in _tensors(room))

    # ---- a pass --------------------------------------------------------------------------------------------------

    def start(self, homes: Sequence[Cache], windows: Sequence[int], filled: int) -> None:
        """Layers with these caches, that look back on so many tokens (0: all), take their turns; `filled` cells of each have
        something in them."""
        if not self._settled:
            self.settle()
        self._settled = False
        self._homes, self._windows, self._filled = homes, windows, filled
        self._places, used = [], Counter()
        for home in homes:
            kind = _kind(home)
            self._places.append((kind, used[kind] % self.count))
            used[kind] += 1
        self._busy, self._brought = set(), []       # rooms of layers that were begun and have not ended; what brings each
        self._ahead()

    def begin(self, number: int) -> Cache:
        """The cache of a layer on the device, when what its own holds is there. Raises LabError where it does not come."""
        job = self._brought[number]
        if job.over.is_open:
            job.wait()          # it may raise
        else:
            with self.trace.span("wait", job.what):
                job.wait()
        if job.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(job.ready)
        return self._room(number)

    def end(self, number: int, start: int, stop: int) -> None:
        """What the tokens from number `start` up to `stop` left there goes back."""
        home, room = self._homes[number], self._room(number)
        if isinstance(home, torch.Tensor):
            parts = [(home[:, :, start:stop], room[:, :, start:stop])]
        else:
            first, last = home._unpacked, room._unpacked        # numbers of tokens that went to pages
            pages = {(at if home.capacity is None else at % home.capacity) // PAGE for at in range(first, last)}
            parts = []
            for (name, there), (_, here) in zip(_named(home), _named(room), strict=True):
                parts += [(there[:, page], here[:, page]) for page in sorted(pages)] if name == "pages" else [(there, here)]
            _stand(room, home)
        self._put(number, parts)
        self._busy.discard(self._places[number])
        self._ahead()

    def finish(self) -> None:
        """All went back. Raises LabError where it did not."""
        self._put(-1, []).wait()
        self._settled = True

    def settle(self) -> None:
        """After something went wrong: when this returns nobody writes anywhere."""
        if not self.closed:
            with contextlib.suppress(LabError):
                self._put(-1, []).wait()
        self._homes, self._settled = (), True

    def close(self) -> None:
        """End the thread. Twice is no harm."""
        self.closed = True
        self._jobs.put(None)
        self._thread.join()
        if self.stream is not None:
            self.stream.synchronize()
        self._homes, self.rooms = (), {}

    # ---- inside --------------------------------------------------------------------------------------------------

    def _ahead(self) -> None:
        """Have the next layers' caches brought, as far as there is room."""
        while (number := len(self._brought)) < len(self._homes) and self._places[number] not in self._busy:
            self._busy.add(self._places[number])
            home, room = self._homes[number], self._room(number)
            if isinstance(home, torch.Tensor):
                window = self._windows[number]
                cells = slice(max(0, self._filled + 1 - window) if window else 0, self._filled)
                parts = [(room[:, :, cells], home[:, :, cells])]
            else:
                _stand(home, room)
                pages = min(home.cells, -(-home.length // PAGE) * PAGE) // PAGE
                parts = [(here[:, :pages], there[:, :pages]) if name == "pages" else (here, there)
                         for (name, there), (_, here) in zip(_named(home), _named(room), strict=True)]
            self._brought.append(self._put(number, parts))

    def _put(self, number: int, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> "_Job":
        """Have the second of each pair copied to the first, after all that was begun on the device."""
        job = _Job(f"kv blk.{number}", parts)
        if self.stream is not None:
            job.after = torch.cuda.Event()
            job.after.record(torch.cuda.current_stream(self.device))
        self._jobs.put(job)
        return job

    def _room(self, number: int) -> Cache:
        place = self._places[number]
        if place not in self.rooms:
            self.rooms[place] = _like(self._homes[number], self.device)
        return self.rooms[place]

    def _work(self) -> None:
        failed = ""
        while (job := self._jobs.get()) is not None:
            try:
                if job.parts and not failed:
                    self._copy(job)
            except BaseException as error:      # as text: the exception would hold a thread's frames
                failed = f"bringing {job.what} failed ({type(error).__name__}: {' '.join(str(error).split())[:200]}); try again"
            job.error, failed = failed, failed if job.parts else ""     # all of that pass, up to its end
            job.over.open()
            job = None

    def _copy(self, job: "_Job") -> None:
        size = sum(source.nbytes for _, source in job.parts)
        if self.stream is None:
            with self.trace.span("copy", job.what, size):
                for into, source in job.parts:
                    whole = _WHOLE[into.dtype.itemsize]
                    np.copyto(into.view(whole).numpy(), source.view(whole).numpy())
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(job.after)
            start = self.clock.now()
            for into, source in job.parts:
                into.copy_(source, non_blocking=into.device.type == "cuda")
            job.ready = torch.cuda.Event()
            job.ready.record(self.stream)
            self.clock.add("copy", job.what, start, self.clock.now(), size)


class _Job:
    """Copies to make: pairs of what is written and what is read."""

    def __init__(self, what: str, parts: list[tuple[torch.Tensor, torch.Tensor]]):
        self.what, self.parts, self.over, self.error = what, parts, Gate(), ""
        self.after: torch.cuda.Event | None = None
        self.ready: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Return when it is done, on a card begun. Raises LabError."""
        while not self.over.wait():
            pass
        if self.error:
            raise LabError(self.error)


def room_bytes(caches: list[Cache], rooms: int = ROOMS) -> int:
    """What `Turns` will hold for such caches (of torch's "meta" device, too)."""
    count, kinds = Counter(map(_kind, caches)), {_kind(one): one for one in caches}
    return sum(min(rooms, count[kind]) * sum(t.nbytes for t in _tensors(one)) for kind, one in kinds.items())


def _kind(cache: Cache) -> tuple:
    return tuple((tuple(t.shape), t.dtype) for t in _tensors(cache)), getattr(cache, "window", 0)


def _like(home: Cache, device: torch.device) -> Cache:
    if isinstance(home, torch.Tensor):
        return torch.empty_strided(home.shape, home.stride(), dtype=home.dtype, device=device)
    keys, values = home.keys, home.values
    return LayerCache(home.kv, keys.heads, keys.head_dim, values.head_dim, batch=home.batch, window=home.window,
                      cells=home.cells, capacity=home.capacity, sinks=home.sinks, recent=home.recent, rotate=home.rotate,
                      device=device)


def _stand(one: LayerCache, other: LayerCache) -> None:
    """Where the other stands becomes what the first one says."""
    for name in ("length", "_first", "_unpacked", "_lowest", "_fresh"):
        setattr(other, name, getattr(one, name))


def _named(cache: LayerCache) -> list[tuple[str, torch.Tensor]]:
    """Its tensors, those of pages by that name."""
    pages = [*cache.keys.tensors, *cache.values.tensors]
    return [*(("pages", tensor) for tensor in pages), *(("rest", tensor) for tensor in cache.tensors[len(pages):])]


def _tensors(cache: Cache) -> tuple[torch.Tensor, ...]:
    return (cache,) if isinstance(cache, torch.Tensor) else cache.tensors
