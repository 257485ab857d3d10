"""What brings a piece to where it is computed with: read by the readers, or copied from RAM, by threads ahead of use.

On a processor "the device" is memory like any other and files are read straight into it. A card gets everything through pinned
memory and a stream of its own: a reader fills one part of a ring while another is copied, and events say in which order.
Whoever asks may be interrupted at any moment (Ctrl-C in a notebook), so everything is begun by these threads, who are not.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..errors import LabError
from .gate import Gate
from .pieces import Piece
from .reading import Readers, Ticket
from .trace import Trace

_TIDY = 64              # orders of which those that are through are looked for


class Order:
    """A piece that is wanted in `into`, uint8 on the device. `after`: a moment of the device before which nothing may be
    written there (None: any)."""

    __slots__ = ("_error", "_over", "after", "begun", "into", "piece", "ready", "ticket")

    def __init__(self, piece: Piece, into: torch.Tensor, after: "torch.cuda.Event | None" = None):
        self.piece, self.into, self.after, self.begun = piece, into, after, False
        self.ticket: Ticket | None = None       # the rest is that a reader is through
        self.ready: torch.cuda.Event | None = None
        self._over, self._error = Gate(), None

    @property
    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._over.is_open and (self.ticket is None or self.ticket.done)

    def wait(self) -> None:
        """Return when what is computed from now on finds the piece there. Raises BadFile or LabError."""
        while not self._over.wait():
            pass
        if self._error:
            kind, text = self._error
            raise kind(text)
        if self.ticket is not None:
            self.ticket.wait()
        if self.ready is not None:
            torch.cuda.current_stream(self.into.device).wait_event(self.ready)

    def cancel(self) -> None:
        """Leave out what can be left out; returns when nobody writes there any more."""
        if self.ticket is not None:
            self.ticket.cancel()
        self.arrived()

    def arrived(self) -> bool:
        """Whether the piece came; returns when nobody writes there any more."""
        try:
            self.wait()
        except LabError:
            return False
        return True

    def end(self, error: BaseException | None = None) -> None:
        if error is not None:       # as text: the exception would hold a thread's frames
            text = " ".join(str(error).split())
            self._error = ((type(error), text) if isinstance(error, LabError) else
                           (LabError, f"bringing {self.piece.name} failed ({type(error).__name__}: {text[:200]}); try again"))
        self._over.open()


class Mover:
    """Carries out orders, in turn. held: pieces that are in RAM, by name, pinned for a card. ring: buffers in pinned memory
    that files are read into on their way to a card; none on a processor. `close` leaves no thread behind."""

    def __init__(self, readers: Readers | None, held: dict[str, torch.Tensor], device: torch.device,
                 ring: Sequence[torch.Tensor], trace: Trace):
        self.readers, self.held, self.device, self.trace = readers, held, device, trace
        self.closed = False
        self.fetching: queue.SimpleQueue = queue.SimpleQueue()
        self.copying: queue.SimpleQueue = queue.SimpleQueue()
        self.ring: queue.SimpleQueue = queue.SimpleQueue()      # of (buffer, when its last copy is through)
        for part in ring:
            self.ring.put((part, None))
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.clock = Clock(device, trace) if self.stream else None
        self.threads: list[tuple[threading.Thread, queue.SimpleQueue]] = []
        self.under_way: set[Order] = set()
        try:
            if readers is not None:
                self._start(self._fetch_all, "fetcher", self.fetching)
            if held or self.stream:
                self._start(self._copy_all, "copier", self.copying)
        except BaseException:
            self.close()
            raise

    def _start(self, work: Callable[[], None], name: str, orders: queue.SimpleQueue) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise LabError(f"the system starts no thread ({error}); close other programs") from None
        self.threads.append((thread, orders))

    def bring(self, order: Order) -> None:
        """Begin it; nothing where that was done before."""
        if order.begun:
            return
        if len(self.under_way) > _TIDY:
            self.under_way = {one for one in self.under_way if not one.done}
        self.under_way.add(order)
        if order.piece.name in self.held:
            self.copying.put((order, self.held[order.piece.name], None))
        else:
            self.fetching.put(order)
        if self.closed:
            order.end(_closed())

    def settle(self) -> None:
        """After an interrupt: returns when nobody writes anywhere."""
        for order in list(self.under_way):
            self.bring(order)
            order.arrived()
        self.under_way.clear()

    def moment(self) -> "torch.cuda.Event | None":
        """Now, as the device counts: after all that was begun there."""
        if self.stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def close(self) -> None:
        """End the threads; whoever waits gets a LabError. Twice is no harm."""
        self.closed = True
        self.ring.put((None, None))
        for thread, orders in self.threads:     # who fetches hands on to who copies, and so ends first
            orders.put(None)
            if thread is not threading.current_thread():
                thread.join()
        if self.stream is not None:
            self.stream.synchronize()
        self.held = {}
        self.under_way.clear()

    # ---- the threads ---------------------------------------------------------------------------------------------

    def _fetch_all(self) -> None:
        while (order := self.fetching.get()) is not None:
            if order.begun:
                continue
            order.begun = True
            try:
                if self.closed:
                    raise _closed()
                if self.stream is None:
                    order.ticket = self.readers.fetch(order.piece, order.into)
                    order.end()
                    continue
                part, last = self.ring.get()
                if part is None:
                    raise _closed()
                if last is not None:
                    last.synchronize()
                try:
                    ticket = self.readers.fetch(order.piece, part)
                except BaseException:
                    self.ring.put((part, None))
                    raise
                self.copying.put((order, part, ticket))
            except BaseException as error:
                order.end(error)
            order = None

    def _copy_all(self) -> None:
        while (job := self.copying.get()) is not None:
            order, part, ticket = job
            if ticket is None and order.begun:
                continue
            order.begun, event = True, None
            try:
                if ticket is not None:
                    ticket.wait()
                if self.closed:
                    raise _closed()
                if self.stream is None:
                    with self.trace.span("copy", order.piece.name, order.piece.bytes):
                        np.copyto(order.into.numpy(), part[:order.piece.bytes].numpy())
                else:
                    event = self._copy(order, part)
                order.end()
            except BaseException as error:
                order.end(error)
            if ticket is not None:
                self.ring.put((part, event))
            job = order = part = ticket = None

    def _copy(self, order: Order, part: torch.Tensor) -> torch.cuda.Event:
        """From pinned memory to a card, on a stream of its own; when it will be through."""
        with torch.cuda.stream(self.stream):
            if order.after is not None:
                self.stream.wait_event(order.after)
            start = self.clock.now()
            order.into.copy_(part[:order.piece.bytes], non_blocking=True)
            order.ready = torch.cuda.Event()
            order.ready.record(self.stream)
            self.clock.add("copy", order.piece.name, start, self.clock.now(), order.piece.bytes)
        return order.ready


class Clock:
    """A card's own times as seconds of time.perf_counter, added to a trace when they are known."""

    def __init__(self, device: torch.device, trace: Trace):
        self.device, self.trace, self.lock, self.pending = device, trace, threading.Lock(), []
        self.began = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        self.began.record(torch.cuda.current_stream(device))
        self.began.synchronize()
        self.at = time.perf_counter()

    def now(self) -> torch.cuda.Event:
        """An event on the present stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def add(self, kind: str, what: str, start: torch.cuda.Event, end: torch.cuda.Event, bytes: int = 0) -> None:
        with self.lock:
            self.pending.append((kind, what, start, end, bytes, f"cuda {kind}"))

    def tell(self) -> None:
        """What is over by now goes to the trace."""
        with self.lock:
            over, left = [], []
            for one in self.pending:
                (over if one[3].query() else left).append(one)
            self.pending = left
        for kind, what, start, end, size, track in over:
            self.trace.add(kind, what, self.at + self.began.elapsed_time(start) / 1e3,
                           self.at + self.began.elapsed_time(end) / 1e3, size, track)


def _closed() -> LabError:
    return LabError("the model was closed; open it again")
