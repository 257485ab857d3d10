"""Reading pieces of files into buffers by several threads at once, and past the page cache where that is wanted.

A piece is cut into chunks that all threads take in turn, first come first served, so one large piece keeps them all busy and
the pieces asked for first are there first. What goes wrong in a thread is told to whoever waits for that piece, in one line.
"""

import errno
import io
import mmap
import os
import queue
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..errors import BadFile, LabError
from ..gguf.local import LocalFile
from ..gguf.words import show, show_path
from ..units import MIB
from .gate import Gate
from .pieces import PAGE, Extent, Piece
from .store import damage

if TYPE_CHECKING:
    from .trace import Trace

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None

CHUNK = 4 * MIB             # bytes of one read; tests/bench/bench_reading.py shows 1 to 8 MiB
_HUGE = 2 * MIB             # bytes of a huge page
_AT = hasattr(os, "preadv")     # reads at an offset, so threads share a descriptor; without it each has its own


def buffer(bytes: int) -> torch.Tensor:
    """uint8 [bytes] at a page's start, zeros, in memory that no other allocation shares and that goes back to the system with
    the last tensor that looks at it. Raises LabError where there is no room."""
    size = max(PAGE, -(-bytes // PAGE) * PAGE)
    try:
        if hasattr(mmap, "MAP_PRIVATE"):        # by default it would be shared memory, which has other limits and no huge pages
            area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            area = mmap.mmap(-1, size)
    except (OSError, OverflowError, ValueError) as error:
        raise LabError(f"the system gives no buffer of {bytes} bytes ({getattr(error, 'strerror', None) or error}); "
                       "ask for a smaller budget or close other programs") from None
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            area.madvise(mmap.MADV_HUGEPAGE)
        except OSError:         # a kernel without them
            pass
    return torch.frombuffer(area, dtype=torch.uint8)[:bytes]


class Ticket:
    """A fetch under way. `piece`: the name of what is read."""

    def __init__(self, piece: str, parts: int, check: "Callable[[], str] | None" = None):
        self.piece = piece
        self._check = check     # looks at the whole, once it is there; says what is wrong with it
        self._left, self._busy = parts, 0       # chunks not read; of them those that a thread reads now
        self._error: tuple[type[LabError], str] | None = None       # no exception: it would hold a thread's frames
        self._lock, self._over = threading.Lock(), Gate()
        if not parts:
            self._over.open()

    @property
    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once: from then on nobody writes into the buffer."""
        return self._over.is_open

    def wait(self) -> None:
        """Return when the piece is in its buffer. Raises BadFile or LabError for what went wrong; an interrupt leaves the fetch
        under way, to be waited for again or cancelled."""
        while not self._over.wait():
            pass
        if self._error:
            kind, text = self._error
            raise kind(text)

    def cancel(self) -> None:
        """Leave out what no thread has begun; returns when nobody writes into the buffer any more."""
        self._fail(LabError, f"reading {show(self.piece)} was cancelled; fetch it again")
        while not self._over.wait():
            pass

    def _begin(self) -> bool:
        """Whether a chunk is still wanted."""
        with self._lock:
            if self._error:
                return False
            self._busy += 1
            return True

    def _end(self, error: tuple[type[LabError], str] | None) -> None:
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            whole = not self._left and not self._error
        if whole and self._check is not None and (wrong := self._check()):
            error = BadFile, wrong
        with self._lock:        # busy until now, so that nobody else found it over
            self._busy -= 1
            self._error = self._error or error
            over = not self._busy and (self._error or not self._left)
        if over:
            self._finish()

    def _fail(self, kind: type[LabError], text: str) -> None:
        with self._lock:
            if self._left and not self._error:
                self._error = kind, text
            over = not self._busy and self._error
        if over:
            self._finish()

    def _finish(self) -> None:
        self._check = None      # it holds the buffer
        self._over.open()


class _Chunk(NamedTuple):
    ticket: Ticket
    file: int
    offset: int
    bytes: int              # that must come
    into: memoryview        # whole pages: O_DIRECT asks for them at the end of a file too


class Readers:
    """`threads` threads that read from `files` (see `Store.files`), which are opened here, one descriptor each.

    direct: past the page cache where the system can; `direct` says whether it does and `why` why not. trace: has each chunk
    added as it is read, ("read", piece, start, end, bytes). A piece of a store is held against its checksum when it is read for
    the first time. A context manager; `close` leaves no thread and no descriptor behind, and so does forgetting it. Raises
    BadFile for a file that cannot be opened or has changed since it was looked at.
    """

    def __init__(self, files: Sequence[LocalFile], threads: int, direct: bool = False, trace: "Trace | None" = None):
        if not isinstance(threads, int) or threads < 1:
            raise LabError(f"{show(str(threads))} reader threads cannot read; give 1 or more")
        self._crew = _Crew(tuple(files), direct, trace)
        self._end = weakref.finalize(self, self._crew.end)      # the threads know the crew alone, and so not this
        try:
            self._crew.start(threads)
        except BaseException:
            self.close()
            raise

    @property
    def direct(self) -> bool:
        """Whether reads go past the page cache."""
        return self._crew.direct

    @property
    def why(self) -> str:
        """Why they do not though it was asked for; "" where they do, or nobody asked."""
        return self._crew.why

    def fetch(self, piece: Piece, into: torch.Tensor) -> Ticket:
        """Begin to read a piece into `into`, uint8 [piece.bytes] or longer, on a page's start where reads are direct (as what
        `buffer` gives). Nobody else may use it until the ticket is done. Raises LabError for another buffer, or once closed."""
        if into.dtype != torch.uint8 or into.ndim != 1 or not into.is_contiguous() or into.device.type != "cpu":
            raise LabError(f"{show(piece.name)} cannot be read into {into.dtype} {tuple(into.shape)} on {into.device}; give "
                           "uint8 [bytes] in the computer's memory")
        if len(into) < piece.bytes:
            raise LabError(f"{show(piece.name)} takes {piece.bytes} bytes and the buffer has {len(into)}; give a larger one")
        if self._crew.direct and into.data_ptr() % PAGE:
            raise LabError(f"{show(piece.name)} cannot be read past the page cache into a buffer that begins inside a page; "
                           "make it by llmlab.offload.reading.buffer")
        view, cuts = memoryview(into.numpy()), []
        for extent in piece.extents:
            for start in range(0, extent.bytes, CHUNK):
                size = min(CHUNK, extent.bytes - start)
                cuts.append((extent.file, extent.offset + start, size, extent.at + start))
        first = piece.checksum is not None and piece.extents[0] not in self._crew.checked
        ticket = Ticket(piece.name, len(cuts), partial(self._crew.check, piece, view) if first else None)
        self._crew.take([_Chunk(ticket, file, offset, size, view[at:at + -(-size // PAGE) * PAGE])
                         for file, offset, size, at in cuts])
        return ticket

    def close(self) -> None:
        """End the threads, when each is through with the chunk it reads; whoever waits gets a LabError. Twice is no harm."""
        self._crew.close()
        self._end.detach()

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Crew:
    """What the threads share: a queue of chunks and the open files."""

    def __init__(self, files: tuple[LocalFile, ...], direct: bool, trace: "Trace | None"):
        self.files, self.trace, self.why = files, trace, ""
        self.queue: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self.lock, self.closed = threading.RLock(), False       # garbage may be collected while one holds it
        self.threads: list[threading.Thread] = []
        self.working = 0        # threads that have yet to leave, once it is closed
        self.handles: list[list[int]] = []      # [lane][file]; threads share the only lane, or each has one
        self.past_cache = [direct] * len(files)
        self.checked: set[Extent] = set()       # those of a store's that had their checksum

    @property
    def direct(self) -> bool:
        return any(self.past_cache)

    def start(self, threads: int) -> None:
        for lane in range(1 if _AT else threads):
            self.handles.append([])
            for number, file in enumerate(self.files):
                self.handles[lane].append(file._open())
                if self.past_cache[number] and (why := _past_cache(self.handles[lane][number])):
                    self._give_up(number, why)
        for number in range(threads):
            thread = threading.Thread(target=self._work, args=(self.handles[number % len(self.handles)],), daemon=True,
                                      name=f"reader {number}")
            try:
                thread.start()
            except RuntimeError as error:
                raise LabError(f"the system starts no reader thread ({error}); ask for fewer readers") from None
            self.threads.append(thread)

    def take(self, chunks: list[_Chunk]) -> None:
        with self.lock:         # no chunk may come after what ends the threads
            if self.closed:
                raise LabError("the readers are closed; open the model again")
            for chunk in chunks:
                self.queue.put(chunk)

    def check(self, piece: Piece, view: memoryview) -> str:
        """What is wrong with a piece of a store that is there for the first time; "" where nothing is."""
        if zlib.crc32(view[:piece.bytes]) != piece.checksum:
            return damage(self.files[piece.extents[0].file], [piece.name])
        self.checked.add(piece.extents[0])
        return ""

    def end(self) -> None:
        """Tell the threads to leave. Waits for nothing, as whoever collects the garbage may hold any lock."""
        with self.lock:
            if not self.closed:
                self.closed, self.working = True, len(self.threads)
                for _ in self.threads:
                    self.queue.put(None)

    def close(self) -> None:
        self.end()
        for thread in self.threads:
            thread.join()
        if not self.threads:
            self._shut()

    def _shut(self) -> None:
        handles, self.handles = self.handles, []
        for handle in (handle for lane in handles for handle in lane):
            os.close(handle)

    def _work(self, handles: list[int]) -> None:
        self._read_all(handles)
        with self.lock:
            self.working -= 1
            if not self.working:        # the last one out
                self._shut()

    def _read_all(self, handles: list[int]) -> None:
        while (chunk := self.queue.get()) is not None:
            ticket = chunk.ticket
            if self.closed:
                ticket._fail(LabError, f"the readers were closed before {show(ticket.piece)} was read; open the model again")
            elif ticket._begin():
                error = None
                try:
                    self._read(chunk, handles)
                except LabError as raised:
                    error = type(raised), str(raised)
                except BaseException as raised:     # whatever it is, somebody waits
                    text = " ".join(str(raised).split())
                    error = LabError, (f"reading {show(ticket.piece)} of {show_path(self.files[chunk.file].name)} failed "
                                       f"({type(raised).__name__}{': ' if text else ''}{text[:200]}); try again")
                chunk = None        # before it is done: its view would keep the buffer
                ticket._end(error)
            del chunk, ticket       # while this thread waits for the next

    def _read(self, chunk: _Chunk, handles: list[int]) -> None:
        file, handle, got, start = self.files[chunk.file], handles[chunk.file], 0, time.perf_counter()
        while got < chunk.bytes:
            aligned = self.past_cache[chunk.file]
            try:
                more = _read_at(handle, chunk.offset + got, chunk.into[got:None if aligned else chunk.bytes])
            except OSError as error:
                if aligned and error.errno == errno.EINVAL:
                    self._give_up(chunk.file, f"{show_path(file.name)}: its file system refuses O_DIRECT ({error.strerror})")
                    continue
                _same(file)
                raise BadFile(f"{show_path(file.name)} cannot be read ({error.strerror or error}); check its disk") from None
            if not more:
                _same(file)
                raise BadFile(f"{show_path(file.name)} ends before {show(chunk.ticket.piece)} does; get it again")
            got += more
        _same(file)         # after, so that what was read is of the file as it was looked at
        if self.trace is not None:
            self.trace.add("read", chunk.ticket.piece, start, time.perf_counter(), chunk.bytes)

    def _give_up(self, number: int, why: str) -> None:
        """Read a file through the page cache from now on, for all threads."""
        with self.lock:
            if self.past_cache[number]:
                self.past_cache[number], self.why = False, self.why or why
                for lane in self.handles:
                    if number < len(lane):
                        _past_cache(lane[number], False)


def _past_cache(handle: int, wanted: bool = True) -> str:
    """Turn reads past the page cache on or off for a descriptor; why it cannot be, or ""."""
    try:
        if fcntl is not None and hasattr(os, "O_DIRECT"):
            flags = fcntl.fcntl(handle, fcntl.F_GETFL)
            fcntl.fcntl(handle, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
        elif hasattr(fcntl, "F_NOCACHE"):       # macOS
            fcntl.fcntl(handle, fcntl.F_NOCACHE, int(wanted))
        else:
            return "this system has no O_DIRECT"
    except OSError as error:
        return f"this file system refuses O_DIRECT ({error.strerror or error})"
    return ""


def _read_at(handle: int, offset: int, into: memoryview) -> int:
    """How many bytes came; 0 at the end of the file."""
    if _AT:
        return os.preadv(handle, [into], offset)
    os.lseek(handle, offset, os.SEEK_SET)
    with io.FileIO(handle, closefd=False) as file:
        return file.readinto(into) or 0


def _same(file: LocalFile) -> None:
    """Raises BadFile where the file at that path is not, or no longer, the one that was looked at."""
    if LocalFile.look(file.name) != file:
        raise file._changed()
