import errno
import gc
import os
import signal
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_files import KINDS, matches, write

from llmlab.errors import BadFile, LabError
from llmlab.gguf.local import LocalFile
from llmlab.offload import reading
from llmlab.offload.pieces import PAGE, Extent, Piece
from llmlab.offload.reading import Readers, buffer
from llmlab.offload.store import in_place, open_store, write_store
from llmlab.offload.trace import Trace

LINUX = os.path.isdir("/proc/self/fd")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if LINUX else 0


def anonymous() -> int:
    """KiB of memory of its own."""
    if not LINUX:
        return 0
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def interrupt() -> None:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def raw(path: Path, size: int, seed: int = 0) -> tuple[bytes, LocalFile]:
    data = np.random.default_rng(seed).bytes(size)
    path.write_bytes(data)
    return data, LocalFile.look(path)


def whole(size: int, name: str = "blk.0", file: int = 0) -> Piece:
    """A file as one piece."""
    return Piece(name, -(-size // PAGE) * PAGE, (), (Extent(file, 0, size, 0),))


@pytest.fixture(autouse=True)
def nothing_left():
    before = descriptors()
    yield
    if readers() or descriptors() > before:
        gc.collect()
    assert not readers() and descriptors() <= before


@pytest.fixture
def held(monkeypatch):
    """Reads wait until this is set."""
    gate, plain = threading.Event(), reading._read_at

    def read_at(*arguments):
        assert gate.wait(20)
        return plain(*arguments)

    monkeypatch.setattr(reading, "_read_at", read_at)
    yield gate
    gate.set()


# ---- the buffer ---------------------------------------------------------------------------------------------

def test_a_buffer_begins_at_a_page_and_is_as_long_as_asked():
    for size in (1, 4095, 4096, 10_000, 5 << 20):
        made = buffer(size)
        assert made.shape == (size,) and made.dtype == torch.uint8 and made.data_ptr() % PAGE == 0 and not made.any()
    assert buffer(0).shape == (0,)
    with pytest.raises(LabError, match="no buffer of"):
        buffer(1 << 60)


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_a_buffer_goes_back_to_the_system_with_the_last_view_of_it():
    before, made = anonymous(), buffer(64 << 20)
    made.fill_(1)
    view = made[PAGE:2 * PAGE].view(torch.float32)
    assert anonymous() > before + (60 << 10)
    del made
    assert anonymous() > before + (60 << 10) and view.view(torch.uint8).sum() == PAGE
    del view
    assert anonymous() < before + (8 << 10)


# ---- what is read -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_bytes_of_the_file(tmp_path, monkeypatch, kind, direct):
    monkeypatch.setattr(reading, "CHUNK", 3 * PAGE)
    file = write(tmp_path, kind)
    store = in_place(file)
    for threads in (1, 3):
        with Readers(store.files, threads, direct) as made:
            buffers = {name: buffer(piece.bytes) for name, piece in store.pieces.items()}
            tickets = [made.fetch(piece, buffers[name]) for name, piece in store.pieces.items()]
            for ticket in tickets:
                ticket.wait()
                assert ticket.done
            assert not (made.direct and not direct) and bool(made.why) == (direct and not made.direct)
        for name, piece in store.pieces.items():
            assert matches(file, piece, buffers[name].numpy().tobytes()), (name, threads)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_extents(tmp_path_factory, data):
    size = data.draw(st.integers(1, 40 * PAGE))
    path = tmp_path_factory.mktemp("any") / "file"
    content, file = raw(path, size)
    extents, at = [], 0
    for first in data.draw(st.lists(st.integers(0, (size - 1) // PAGE), min_size=1, max_size=5)):
        length = min(data.draw(st.integers(1, 12)) * PAGE, size - first * PAGE)
        extents.append(Extent(0, first * PAGE, length, at))
        at += -(-length // PAGE) * PAGE
    piece, into = Piece("any", at, (), tuple(extents)), buffer(at)
    plain, reading.CHUNK = reading.CHUNK, data.draw(st.integers(1, 6)) * PAGE
    try:
        with Readers([file], data.draw(st.integers(1, 4)), data.draw(st.booleans())) as made:
            made.fetch(piece, into).wait()
    finally:
        reading.CHUNK = plain
    for extent in extents:
        assert into[extent.at:extent.at + extent.bytes].numpy().tobytes() == \
            content[extent.offset:extent.offset + extent.bytes]


def test_a_system_that_cannot_read_at_an_offset(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_AT", False)
    monkeypatch.setattr(reading, "CHUNK", PAGE)
    data, file = raw(tmp_path / "file", 50 * PAGE + 77)
    before = descriptors()
    with Readers([file], 3) as made:
        if LINUX:
            assert descriptors() == before + 3      # a position of its own for each thread
        into = buffer(51 * PAGE)
        made.fetch(whole(len(data)), into).wait()
    assert into.numpy().tobytes()[:len(data)] == data


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_threads_share_one_descriptor_a_file(tmp_path):
    files = [raw(tmp_path / f"{number}", PAGE)[1] for number in range(3)]
    before = descriptors()
    with Readers(files, 8):
        assert descriptors() == before + 3


def test_a_file_system_without_direct_reads_is_read_all_the_same_and_says_so(tmp_path, monkeypatch):
    data, file = raw(tmp_path / "file", 20 * PAGE)
    plain, refused = reading._read_at, []

    def read_at(handle, offset, into):
        import fcntl
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(handle, offset, into)

    monkeypatch.setattr(reading, "_read_at", read_at)
    monkeypatch.setattr(reading, "CHUNK", PAGE)
    with Readers([file], 2, direct=True) as made:
        for _ in range(2):
            into = buffer(20 * PAGE)
            made.fetch(whole(len(data)), into).wait()
            assert into.numpy().tobytes() == data
        if refused:         # where the temporary folder took O_DIRECT at first
            assert len(refused) <= 2 and not made.direct and "refuses O_DIRECT" in made.why and str(tmp_path) in made.why
        else:
            assert not made.direct and made.why


def test_a_system_without_direct_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "fcntl", None)
    data, file = raw(tmp_path / "file", 3 * PAGE + 5)
    with Readers([file], 2, direct=True) as made:
        assert not made.direct and made.why == "this system has no O_DIRECT"
        into = buffer(5 * PAGE)[8:4 * PAGE + 8]         # no matter where it begins
        made.fetch(whole(len(data)), into).wait()
    assert into.numpy().tobytes()[:len(data)] == data


def test_pieces_come_first_come_first_served_and_are_traced(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 2 * PAGE)
    data, file = raw(tmp_path / "file", 10 * PAGE)
    trace = Trace()
    start = time.perf_counter()
    with Readers([file], 1, trace=trace) as made:
        tickets = [made.fetch(whole(len(data), f"blk.{number}"), buffer(len(data))) for number in range(4)]
        for ticket in reversed(tickets):
            ticket.wait()
    events = trace.events
    assert [event.what for event in events] == [f"blk.{number}" for number in range(4) for _ in range(5)]
    assert {event.kind for event in events} == {"read"} and {event.track for event in events} == {"reader 0"}
    assert all(start <= event.start <= event.end <= time.perf_counter() for event in events)
    assert trace.totals()["read"].bytes == 4 * len(data)


def test_a_large_piece_keeps_all_threads_busy(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", PAGE)
    together, plain = threading.Barrier(4, timeout=20), reading._read_at

    def read_at(*arguments):
        together.wait()         # breaks if fewer than four read at once
        return plain(*arguments)

    monkeypatch.setattr(reading, "_read_at", read_at)
    data, file = raw(tmp_path / "file", 8 * PAGE)
    with Readers([file], 4) as made:
        into = buffer(len(data))
        made.fetch(whole(len(data)), into).wait()
    assert into.numpy().tobytes() == data


# ---- what cannot be asked for -------------------------------------------------------------------------------

def test_buffers_that_cannot_be_read_into(tmp_path):
    _, file = raw(tmp_path / "file", 4 * PAGE)
    piece = whole(4 * PAGE)
    with Readers([file], 1, direct=True) as made:
        for wrong in (torch.zeros(4 * PAGE), torch.zeros(4, PAGE, dtype=torch.uint8), buffer(8 * PAGE)[::2],
                      torch.zeros(4 * PAGE, dtype=torch.uint8, device="meta")):
            with pytest.raises(LabError, match="give uint8"):
                made.fetch(piece, wrong)
        with pytest.raises(LabError, match="give a larger one"):
            made.fetch(piece, buffer(3 * PAGE))
        if made.direct:
            with pytest.raises(LabError, match="begins inside a page"):
                made.fetch(piece, buffer(6 * PAGE)[512:])
        made.fetch(piece, buffer(4 * PAGE)).wait()
    with pytest.raises(LabError, match="closed"):
        made.fetch(piece, buffer(4 * PAGE))
    for threads in (0, -1, 1.5, "2"):
        with pytest.raises(LabError, match="reader threads"):
            Readers([file], threads)


def test_a_piece_of_nothing_is_there_at_once(tmp_path):
    _, file = raw(tmp_path / "file", PAGE)
    with Readers([file], 1) as made:
        ticket = made.fetch(Piece("blk.0", 0, (), ()), buffer(0))
        assert ticket.done
        ticket.wait()


# ---- what goes wrong ----------------------------------------------------------------------------------------

def _rewritten(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[::-1])
    os.utime(path, ns=(1, 1))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("change, says", [(_rewritten, "has changed"), (_cut, "has changed"), (_replaced, "has changed"),
                                          (Path.unlink, "does not exist")])
def test_a_file_that_changes_or_goes_is_one_clear_error_and_the_next_load_works(tmp_path, change, says, direct):
    data, file = raw(tmp_path / "model.gguf", 64 * PAGE + 5)
    other, second = raw(tmp_path / "second.gguf", 8 * PAGE, 1)
    with Readers([file, second], 2, direct) as made:
        into = buffer(65 * PAGE)
        made.fetch(whole(len(data)), into).wait()
        change(tmp_path / "model.gguf")
        for _ in range(3):
            with pytest.raises(BadFile, match=says) as raised:
                made.fetch(whole(len(data)), into).wait()
            assert "model.gguf" in str(raised.value) and "\n" not in str(raised.value)
        made.fetch(whole(len(other), file=1), into).wait()      # the others are as they were
        assert into.numpy().tobytes()[:len(other)] == other
    with pytest.raises(BadFile, match=r"model.gguf (has changed|cannot be opened)"):
        Readers([file], 2, direct)
    data, file = raw(tmp_path / "model.gguf", 64 * PAGE + 5, 2)
    with Readers([file], 2, direct) as made:
        made.fetch(whole(len(data)), into).wait()
    assert into.numpy().tobytes()[:len(data)] == data


def test_a_file_that_ends_too_early(tmp_path):
    """By what its piece says, though it never changed."""
    _, file = raw(tmp_path / "file", 4 * PAGE)
    with Readers([file], 2) as made, pytest.raises(BadFile, match="file ends before 'blk.0' does"):
        made.fetch(whole(6 * PAGE), buffer(6 * PAGE)).wait()


@pytest.mark.parametrize("raised, kind, says", [
    (OSError(errno.EIO, "Input/output error"), BadFile, "cannot be read .Input/output error.; check its disk"),
    (RuntimeError("of several\nlines"), LabError, "reading 'blk.1' of .*file failed .RuntimeError: of several lines."),
    (MemoryError(), LabError, "failed .MemoryError.; try again")])
def test_a_reader_that_raises_tells_whoever_waits_and_goes_on(tmp_path, monkeypatch, raised, kind, says):
    data, file = raw(tmp_path / "file", 16 * PAGE)
    monkeypatch.setattr(reading, "CHUNK", PAGE)
    plain, broken = reading._read_at, set()

    def read_at(handle, offset, into):
        if offset in broken:
            raise raised
        return plain(handle, offset, into)

    monkeypatch.setattr(reading, "_read_at", read_at)
    into = [buffer(len(data)) for _ in range(3)]
    with Readers([file], 2) as made:
        broken.add(5 * PAGE)
        ticket = made.fetch(whole(len(data), "blk.1"), into[1])
        for _ in range(2):          # again, if again asked for
            with pytest.raises(kind, match=says) as found:
                ticket.wait()
            assert type(found.value) is kind and "\n" not in str(found.value)
        broken.clear()
        for number in (1, 2):
            made.fetch(whole(len(data), f"blk.{number}"), into[number]).wait()
            assert into[number].numpy().tobytes() == data
        assert len(readers()) == 2


@pytest.mark.parametrize("threads", [1, 4])
def test_a_piece_of_a_store_is_held_against_its_checksum_once(tmp_path, monkeypatch, threads):
    monkeypatch.setattr(reading, "CHUNK", 2 * PAGE)
    file = write(tmp_path, "experts")
    store = write_store(file, tmp_path / "stores")
    spoilt = store.pieces["blk.1.expert.3"]
    with open(store.path, "r+b") as raw_file:
        raw_file.seek(spoilt.extents[0].offset + spoilt.bytes - 1)
        raw_file.write(b"\1")
    store, summed, plain = open_store(store.path, file), [], zlib.crc32

    def crc32(view):
        summed.append(len(view))
        return plain(view)

    monkeypatch.setattr(reading.zlib, "crc32", crc32)
    with Readers(store.files, threads) as made:
        for turn in range(3):
            buffers = {name: buffer(piece.bytes) for name, piece in store.pieces.items()}
            tickets = {name: made.fetch(piece, buffers[name]) for name, piece in store.pieces.items()}
            for name, ticket in tickets.items():
                if name == spoilt.name:
                    with pytest.raises(BadFile, match="store is damaged: 'blk.1.expert.3' does not have .*delete it"):
                        ticket.wait()
                else:
                    ticket.wait()
                    assert matches(file, store.pieces[name], buffers[name].numpy().tobytes())
            assert len(summed) == len(store.pieces) + turn      # what was wrong is looked at again
    assert sorted(summed[:len(store.pieces)]) == sorted(piece.bytes for piece in store.pieces.values())


def test_reads_that_give_less_than_asked_go_on_where_they_stopped(tmp_path, monkeypatch):
    data, file = raw(tmp_path / "file", 16 * PAGE + 100)
    plain = reading._read_at
    monkeypatch.setattr(reading, "_read_at", lambda handle, offset, into: plain(handle, offset, into[:1000]))
    into = buffer(17 * PAGE)
    with Readers([file], 3) as made:
        made.fetch(whole(len(data)), into).wait()
    assert into.numpy().tobytes()[:len(data)] == data


def test_an_interrupt_of_a_wait_leaves_the_fetch_under_way(tmp_path, held):
    data, file = raw(tmp_path / "file", 16 * PAGE)
    into = buffer(len(data))
    with Readers([file], 2) as made:
        ticket = made.fetch(whole(len(data)), into)
        timer = threading.Timer(0.05, interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            ticket.wait()
            time.sleep(20)
        timer.join()
        assert not ticket.done
        held.set()
        ticket.wait()
        assert into.numpy().tobytes() == data


def test_a_fetch_can_be_cancelled(tmp_path, monkeypatch):
    """Afterwards nobody writes into its buffer, and the others are not concerned."""
    monkeypatch.setattr(reading, "CHUNK", PAGE)
    data, file = raw(tmp_path / "file", 16 * PAGE)
    gate, started, plain = threading.Event(), threading.Event(), reading._read_at

    def read_at(handle, offset, into):
        started.set()
        assert gate.wait(20)
        return plain(handle, offset, into)

    monkeypatch.setattr(reading, "_read_at", read_at)
    with Readers([file], 1) as made:
        buffers = [buffer(len(data)) for _ in range(3)]
        tickets = [made.fetch(whole(len(data), f"blk.{number}"), into) for number, into in enumerate(buffers)]
        assert started.wait(20)
        tickets[1].cancel()         # none of it was begun
        assert tickets[1].done
        threading.Timer(0.05, gate.set).start()
        tickets[0].cancel()         # waits for the chunk that is being read
        after = buffers[0].clone()
        tickets[2].wait()
        assert buffers[2].numpy().tobytes() == data
        assert torch.equal(buffers[0], after) and after.count_nonzero() <= PAGE and not buffers[1].any()
        for ticket in tickets[:2]:
            with pytest.raises(LabError, match="cancelled; fetch it again"):
                ticket.wait()
        tickets[2].cancel()         # it is there: nothing to cancel
        tickets[2].wait()


def test_closing_tells_whoever_waits(tmp_path, held):
    data, file = raw(tmp_path / "file", 16 * PAGE)
    made, found = Readers([file], 2), []
    tickets = [made.fetch(whole(len(data), f"blk.{number}"), buffer(len(data))) for number in range(6)]

    def wait(ticket):
        try:
            ticket.wait()
            found.append(None)
        except LabError as error:
            found.append(str(error))

    waiting = [threading.Thread(target=wait, args=(ticket,)) for ticket in tickets]
    for thread in waiting:
        thread.start()
    closing = threading.Timer(0.05, made.close)
    closing.start()
    time.sleep(0.15)
    held.set()
    for thread in (*waiting, closing):
        thread.join(20)
        assert not thread.is_alive()
    assert len(found) == 6 and sum("closed before 'blk." in (text or "") for text in found) >= 4
    made.close()


def test_forgotten_readers_end_by_themselves(tmp_path):
    data, file = raw(tmp_path / "file", 16 * PAGE)
    before, made = descriptors(), Readers([file], 3)
    ticket = made.fetch(whole(len(data)), buffer(len(data)))
    assert len(readers()) == 3
    del made
    assert ticket.piece == "blk.0"
    gc.collect()
    end = time.monotonic() + 20
    while readers() and time.monotonic() < end:
        time.sleep(0.01)
    assert not readers() and descriptors() == before


def test_a_file_that_is_no_file_leaves_nothing_open(tmp_path):
    _, file = raw(tmp_path / "file", PAGE)
    _, gone = raw(tmp_path / "gone", PAGE)
    (tmp_path / "gone").unlink()
    with pytest.raises(BadFile, match="gone"):
        Readers([file, gone], 4)


def test_a_system_that_starts_no_more_threads(tmp_path, monkeypatch):
    _, file = raw(tmp_path / "file", PAGE)
    plain, started = threading.Thread.start, []

    def start(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        plain(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(LabError, match="can't start new thread.*fewer readers"):
        Readers([file], 4)


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_fifty_faults_leave_nothing_behind(tmp_path, monkeypatch):
    """A reader that raises, a wait that is interrupted, a file that is cut short, one that is closed under way."""
    monkeypatch.setattr(reading, "CHUNK", 16 * PAGE)
    plain, path, size = reading._read_at, tmp_path / "file", 256 * PAGE
    fault, pressed = "", []

    def read_at(handle, offset, into):
        if fault == "raises" and offset >= 64 * PAGE:
            raise RuntimeError("broken")
        if fault == "interrupted" and not pressed:
            pressed.append(interrupt())
        if fault == "interrupted":
            time.sleep(0.001)
        return plain(handle, offset, into)

    monkeypatch.setattr(reading, "_read_at", read_at)
    _, file = raw(path, size)
    before, memory, seen = None, 0, set()
    for turn in range(54):
        if turn == 4:           # the first ones warm things up
            gc.collect()
            before, memory = (descriptors(), threading.active_count()), anonymous()
        fault, outcome = ("raises", "interrupted", "cut", "closed")[turn % 4], "fine"
        pressed.clear()
        try:
            with Readers([file], 2, direct=turn % 8 > 3) as made:
                tickets = [made.fetch(whole(size), buffer(size)) for _ in range(3)]
                if fault == "cut":
                    os.truncate(path, size // 2)
                if fault == "closed":
                    made.close()
                for ticket in tickets:
                    ticket.wait()
        except (LabError, KeyboardInterrupt) as error:
            outcome = type(error).__name__
        seen.add((fault, outcome))
        tickets = ticket = made = None
        if fault == "cut":
            _, file = raw(path, size)
    gc.collect()
    assert {("raises", "LabError"), ("interrupted", "KeyboardInterrupt")} <= seen
    assert seen <= {("raises", "LabError"), ("interrupted", "KeyboardInterrupt"), ("cut", "BadFile"), ("cut", "fine"),
                    ("closed", "LabError"), ("closed", "fine")}
    assert (descriptors(), threading.active_count()) == before
    assert anonymous() < memory + 2560, "2.5 MiB are less than three of the 150 buffers"
