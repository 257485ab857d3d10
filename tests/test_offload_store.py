import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_files import KINDS, matches, write

from llmlab.errors import BadFile, LabError
from llmlab.gguf import read_gguf
from llmlab.offload import store as storing
from llmlab.offload.pieces import PAGE
from llmlab.offload.reading import Readers, buffer
from llmlab.offload.store import LINE, Part, in_place, kept_store, open_store, path_of, write_store

TOP = Path(__file__).resolve().parent.parent
LINUX = os.path.isdir("/proc/self/fd")


def holds(file, store, threads: int = 2) -> bool:
    """Whether every piece of a store is what it should be, as readers read it."""
    found = []
    with Readers(store.files, threads, direct=True) as readers:
        for piece in store.pieces.values():
            into = buffer(piece.bytes)
            readers.fetch(piece, into).wait()
            found.append(matches(file, piece, into.numpy().tobytes()))
    return bool(found) and all(found)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what is written ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_store_has_each_piece_in_one_blob(tmp_path, kind):
    file, told = write(tmp_path, kind), []
    store = write_store(file, tmp_path / "stores", progress=lambda share, text: told.append((share, text)))
    plain = in_place(file)
    assert list(store.pieces) == list(plain.pieces) and store.layout == plain.layout == "gguf"
    assert store.path == path_of(file, tmp_path / "stores") and names(tmp_path / "stores") == [store.path.name]
    for name, piece in store.pieces.items():
        extent, = piece.extents
        assert (extent.file, extent.at) == (0, 0) and extent.offset % PAGE == extent.bytes % PAGE == 0
        assert extent.bytes == piece.bytes <= plain.pieces[name].bytes
        assert piece.bytes - piece.payload < PAGE + LINE * len(piece.tensors)
        for tensor, there in zip(piece.tensors, plain.pieces[name].tensors, strict=True):
            assert (tensor.name, tensor.type, tensor.shape, tensor.bytes) == (there.name, there.type, there.shape, there.bytes)
            assert (tensor.offset - there.offset) % LINE == 0 and not tensor.about
    assert holds(file, store) and holds(file, plain)
    store.verify()
    store.check()
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and 0 < shares[0] < 0.5 and shares[-1] == 1
    assert [text for _, text in told][:1] == ["blk.0"] and told[-1][1] == "flushing to the disk"
    assert store.bytes == store.path.stat().st_size


def test_a_store_is_opened_again_and_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    file = write(tmp_path, "experts")
    store = kept_store(file)
    assert store.path.parent == tmp_path / "cache" / "stores"
    before = store.path.stat()
    assert kept_store(file) == store == open_store(store.path, file) and store.path.stat().st_mtime_ns == before.st_mtime_ns
    assert kept_store(read_gguf(file.paths[0])) == store


def test_any_layout_can_be_written(tmp_path):
    """Tensors of its own, as bytes, arrays, calls or chunks; a piece is let go of before the next one is made."""
    file, living = write(tmp_path, "dense"), []
    arrays = [np.arange(5000, dtype=np.float32) + number for number in range(3)]

    class Held(np.ndarray):
        pass

    def pieces():
        for number, array in enumerate(arrays):
            gc.collect()
            assert not any(ref() is not None for ref in living), "the piece before is still held"
            held = array.view(Held)
            living.append(weakref.ref(held))
            about = {"shape": [50, 100], "rows": 50, "layout": {"planes": [4, 2]}}
            yield f"blk.{number}", [("q.0", about, held), ("q.1", {}, lambda: b"abc"), ("q.3", {}, memoryview(b"")),
                                    Part("q.2", {"type": "F16"}, lambda: iter([b"d", b"", b"ef"]), 7)]
            del held
        yield "head", iter([("output", {}, bytes(3 * PAGE))])

    store = write_store(file, tmp_path / "stores", "words-8", pieces=pieces(), total=sum(a.nbytes for a in arrays) + 4 * PAGE)
    assert store.layout == "words-8" and list(store.pieces) == ["blk.0", "blk.1", "blk.2", "head"]
    store.verify()
    with Readers(store.files, 2) as readers:
        for piece, array in zip(store.pieces.values(), arrays, strict=False):
            into = buffer(piece.bytes)
            readers.fetch(piece, into).wait()
            raw = into.numpy().tobytes()
            q, *rest = piece.tensors
            assert (q.name, q.shape, q.type, q.offset) == ("q.0", (50, 100), "", 0)
            assert q.about == {"rows": 50, "layout": {"planes": [4, 2]}}
            assert raw[:q.bytes] == array.tobytes()
            assert [raw[t.offset:t.offset + t.bytes] for t in rest] == [b"abc", b"", b"def"]
            assert [t.offset % LINE for t in rest] == [0, 0, 7] and rest[2].type == "F16"
    assert store.pieces["head"].bytes == 3 * PAGE
    with pytest.raises(LabError, match="layout 'words-8' has pieces of its own"):
        write_store(file, tmp_path / "stores", "words-8")


def test_a_store_of_a_layouts_last_version_goes(tmp_path):
    file, folder = write(tmp_path, "dense"), tmp_path / "stores"

    def made(layout):
        return write_store(file, folder, layout, pieces=[("blk.0", [("q", {}, b"abc")])], total=3).path

    kept = {write_store(file, folder).path, made("words-16-aaaa"), made("other")}
    old = made("words-8-aaaa")
    assert old.exists() and set(folder.iterdir()) == kept | {old}
    new = made("words-8-bbbb")
    assert set(folder.iterdir()) == kept | {new}


def test_a_changed_gguf_gets_a_new_store_in_the_place_of_the_old(tmp_path):
    file = write(tmp_path, "dense")
    old = write_store(file, tmp_path / "stores")
    file = write(tmp_path, "dense", seed=1)
    with pytest.raises(BadFile, match="before it changed; write the store again"):
        open_store(old.path, file)
    new = kept_store(file, tmp_path / "stores")
    assert names(tmp_path / "stores") == [old.path.name] and holds(file, new)
    with pytest.raises(BadFile, match="has changed since it was opened"):
        old.check()
    with pytest.raises(BadFile, match="made of another file"):
        open_store(new.path, write(tmp_path, "tied"))
    with pytest.raises(BadFile, match="is of the layout 'gguf', not 'words'"):
        open_store(new.path, file, "words")


def test_what_is_no_model_on_this_computer(tmp_path):
    from dataclasses import replace

    file = write(tmp_path, "dense")
    for call in (in_place, write_store):
        with pytest.raises(BadFile, match="is not a local file; download it"):
            call(replace(file, sources=()))
        with pytest.raises(BadFile, match="has no layers to offload"):
            call(replace(file, tensors={}))
    with pytest.raises(LabError, match="read in place and has no checksums; write a store"):
        in_place(file).verify()
    with pytest.raises(BadFile, match="does not exist; write the store first"):
        open_store(tmp_path / "none.store", file)
    with pytest.raises(BadFile, match="no store of this version"):
        open_store(file.paths[0], file)


def test_check_sees_a_file_that_changed_or_is_gone(tmp_path):
    file = write(tmp_path, "set")
    store = in_place(file)
    store.check()
    os.utime(file.paths[1], ns=(5, 5))
    with pytest.raises(BadFile, match="00002-of-00002.gguf has changed"):
        store.check()
    os.unlink(file.paths[1])
    with pytest.raises(BadFile, match="00002-of-00002.gguf does not exist"):
        store.check()


# ---- damage -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(GGUF, its store)."""
    folder = tmp_path_factory.mktemp("whole")
    file = write(folder, "experts", layers=2)
    store = write_store(file, folder / "stores")
    return file, store


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_flipped_bit_is_found_wherever_it_is(whole, tmp_path_factory, data):
    file, store = whole
    damaged = bytearray(store.path.read_bytes())
    place = data.draw(st.one_of(st.integers(0, len(damaged) - 1), st.integers(len(damaged) - 30, len(damaged) - 1),
                                st.integers(0, PAGE)))
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flipped") / "some.store"
    path.write_bytes(damaged)
    inside = [name for name, piece in store.pieces.items()
              if piece.extents[0].offset <= place < piece.extents[0].offset + piece.bytes]
    if inside:          # as quick to open as ever, and verify says which
        with pytest.raises(BadFile, match=f"some.store is damaged: '{inside[0]}' does not have"):
            open_store(path, file).verify()
        with pytest.raises(BadFile, match=f"some.store is damaged: '{inside[0]}' does not have"):
            holds(file, open_store(path, file))
    else:
        with pytest.raises(BadFile, match="write the store again"):
            open_store(path, file)
    shutil.rmtree(path.parent)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_truncated_store_is_not_opened(whole, tmp_path_factory, data):
    file, store = whole
    path = tmp_path_factory.mktemp("cut") / "some.store"
    shutil.copyfile(store.path, path)
    os.truncate(path, data.draw(st.one_of(st.integers(0, store.bytes - 1), st.integers(store.bytes - 60, store.bytes - 1))))
    with pytest.raises(BadFile, match="some.store is .*; write the store again"):
        open_store(path, file)
    shutil.rmtree(path.parent)


def test_verify_names_what_is_damaged_and_the_store_is_written_anew(tmp_path):
    file = write(tmp_path, "experts", layers=4)
    store = write_store(file, tmp_path / "stores")
    with open(store.path, "r+b") as raw:
        for name in ("blk.0", "blk.1", "blk.1.expert.2", "blk.3", "head"):
            raw.seek(store.pieces[name].extents[0].offset + 100)
            raw.write(b"damage")
    store, told = open_store(store.path, file), []
    with pytest.raises(BadFile, match="'blk.0', 'blk.1', 'blk.1.expert.2' and 2 more do not have the bytes that were written; "
                                      "delete it, and it will be written again"):
        store.verify(lambda share, text: told.append((share, text)))
    assert told[-1] == (1.0, "head") and told == sorted(told, key=lambda each: each[0])
    store.path.unlink()
    again = kept_store(file, tmp_path / "stores")
    again.verify()
    assert holds(file, again)
    os.truncate(again.path, again.path.stat().st_size - 1)
    assert holds(file, kept_store(file, tmp_path / "stores"))


def test_a_store_cut_short_under_a_running_model_is_a_clear_error(tmp_path):
    file = write(tmp_path, "dense")
    store = write_store(file, tmp_path / "stores")
    piece = store.pieces["blk.2"]
    with Readers(store.files, 2) as readers:
        os.truncate(store.path, piece.extents[0].offset + 10)
        with pytest.raises(BadFile, match="store has changed since it was opened"):
            readers.fetch(piece, buffer(piece.bytes)).wait()
    assert holds(file, kept_store(file, tmp_path / "stores"))


# ---- what stops a writer ------------------------------------------------------------------------------------

def test_too_little_room_is_said_before_the_first_byte(tmp_path, monkeypatch):
    file, told = write(tmp_path, "dense"), []
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**40, 2**40 - 100_000, 100_000))
    with pytest.raises(LabError, match=r"store needs 6.* KiB and its disk has 97.66 KiB free; free some space or write else"):
        write_store(file, tmp_path / "stores", progress=lambda *each: told.append(each))
    assert not told and names(tmp_path / "stores") == []


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on file sizes here")
def test_a_disk_that_is_full_half_way_leaves_nothing_but_what_was_there(tmp_path):
    """By the system's own limit on the size of a file, whose error is a full disk's but for the number."""
    import resource

    file = write(tmp_path, "experts")
    store = write_store(file, tmp_path / "stores")
    content, limits = store.path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (store.bytes // 2, limits[1]))
        with pytest.raises(LabError, match=r"store cannot be written \(File too large\); free some space or write elsewhere"):
            write_store(file, tmp_path / "stores")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path / "stores") == [store.path.name] and store.path.read_bytes() == content
    assert holds(file, open_store(store.path, file))


def test_a_folder_that_cannot_be_written(tmp_path):
    file = write(tmp_path, "dense")
    (tmp_path / "taken").write_bytes(b"a file")
    with pytest.raises(LabError, match="cannot be made .*LLMLAB_CACHE"):
        write_store(file, tmp_path / "taken" / "stores")


class Stopped(Exception):
    pass


def test_a_writer_that_is_stopped_or_whose_gguf_changes_leaves_nothing(tmp_path):
    file = write(tmp_path, "dense")

    def stop(share, text):
        if share > 0.5:
            raise Stopped

    with pytest.raises(Stopped):
        write_store(file, tmp_path / "stores", progress=stop)
    assert names(tmp_path / "stores") == []

    def change(share, text):
        if text == "blk.1":
            os.utime(file.paths[0], ns=(7, 7))

    with pytest.raises(BadFile, match="dense.gguf has changed since it was opened"):
        write_store(file, tmp_path / "stores", progress=change)
    assert names(tmp_path / "stores") == []
    write_store(read_gguf(file.paths[0]), tmp_path / "stores").verify()


_WRITES = """
import sys, time
from llmlab.gguf import read_gguf
from llmlab.offload.store import write_store
def stop(share, text):
    if share > 0.5:
        print("half", flush=True)
        time.sleep(60)
write_store(read_gguf(sys.argv[1]), sys.argv[2], progress=stop)
"""


def test_a_writer_that_is_killed_harms_nothing_and_is_swept_up(tmp_path):
    file = write(tmp_path, "dense")
    store = write_store(file, tmp_path / "stores")
    content = store.path.read_bytes()
    child = subprocess.Popen([sys.executable, "-c", _WRITES, file.paths[0], str(store.path.parent)], cwd=TOP, text=True,
                             stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(TOP)})
    try:
        assert child.stdout.readline() == "half\n"
        left, = set(names(store.path.parent)) - {store.path.name}
        assert left.endswith(".part") and store.path.read_bytes() == content
        if storing.fcntl is not None:       # while it lives, nobody sweeps what it writes; whoever is stopped waiting, is
            def give_up(share, text):
                assert text.startswith("waiting for another program")
                raise Stopped
            with pytest.raises(Stopped):
                write_store(file, store.path.parent, progress=give_up)
            assert left in names(store.path.parent)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert left in names(store.path.parent) and holds(file, open_store(store.path, file))
    write_store(file, store.path.parent)
    assert names(store.path.parent) == [store.path.name] and holds(file, open_store(store.path, file))


@pytest.mark.skipif(storing.fcntl is None, reason="no locks here")
def test_two_writers_take_turns(tmp_path):
    file, first, go, said, made = write(tmp_path, "dense"), threading.Event(), threading.Event(), [], []

    def slow(share, text):
        first.set()
        assert go.wait(20)

    def other(share, text):
        said.append(text)
        go.set()

    one = threading.Thread(target=lambda: made.append(write_store(file, tmp_path / "stores", progress=slow)))
    one.start()
    assert first.wait(20)
    two = write_store(file, tmp_path / "stores", progress=other)
    one.join(20)
    assert len(made) == 1 and said[0].startswith("waiting for another program that writes a store in") and said[-1] != said[0]
    assert names(tmp_path / "stores") == [two.path.name] and holds(file, two)


def test_a_folder_without_locks_is_swept_of_old_things_alone(tmp_path, monkeypatch):
    file, folder = write(tmp_path, "dense"), tmp_path / "stores"
    folder.mkdir()
    if storing.fcntl is not None:
        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")
        monkeypatch.setattr(storing.fcntl, "flock", refuse)
    for name, age in ((".a.gguf.store.1.part", 0), (".b.gguf.store.2.part", 3 * 86400), ("notes.part", 3 * 86400)):
        (folder / name).write_bytes(b"left")
        os.utime(folder / name, (time.time() - age,) * 2)
    store = write_store(file, folder)
    assert names(folder) == sorted([*([".a.gguf.store.1.part"] if storing.fcntl else []), store.path.name, "notes.part"])


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_fifty_faults_of_writing_and_opening_leave_nothing_behind(tmp_path):
    file = write(tmp_path, "dense", layers=1)
    store = write_store(file, tmp_path / "stores")
    before = len(os.listdir("/proc/self/fd")), threading.active_count()

    def stop(share, text):
        raise Stopped

    for turn in range(50):
        with pytest.raises((LabError, Stopped)):
            if turn % 3 == 0:
                write_store(file, tmp_path / "stores", progress=stop)
            elif turn % 3 == 1:
                open_store(file.paths[0], file)
            else:
                in_place(file).verify()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert names(tmp_path / "stores") == [store.path.name]
    store.verify()
