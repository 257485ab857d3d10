import os
import pickle
import re
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import tracemalloc
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import gguf_raw as raw
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmlab.errors import LabError, UnknownName
from llmlab.formats import FORMATS
from llmlab.gguf import Array, TensorInfo, join_shards, read_gguf, read_header, write_gguf

MIB = 2**20
SMALL = raw.small()


@dataclass
class Memory:
    """A reader over bytes that holds read_header to its word: nothing is asked for past the size."""

    data: bytes
    name: str = "memory.gguf"
    size: int = -1
    asked: list = field(default_factory=list)

    def __post_init__(self):
        self.size = len(self.data) if self.size < 0 else self.size

    def read(self, offset, length):
        assert offset >= 0 and length > 0 and offset + length <= self.size
        self.asked.append(length)
        return self.data[offset : offset + length]


@contextmanager
def watchdog(seconds=10, memory=4 * MIB):
    """Fails the test where its block hangs or allocates more than `memory` bytes at once."""

    def bark(*_):
        pytest.fail(f"still reading after {seconds} s")

    before = signal.signal(signal.SIGALRM, bark)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert peak < memory


def problem(call, *arguments):
    """The message of the LabError that `call` raises, checked to be one line and no essay."""
    with pytest.raises(LabError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000, message
    return message


def put(folder, data, name="model.gguf"):
    path = folder / name
    path.write_bytes(data)
    return path


# -- what is in a file ------------------------------------------------------------------------------------------


def check_small(file):
    metadata = dict(file.metadata)
    tokens, scores, nested = metadata.pop("tokens"), metadata.pop("scores"), metadata.pop("nested")
    assert metadata == {"general.architecture": "llama", "u8": 200, "i8": -3, "u16": 60000, "i16": -300, "u32": 2**31,
                        "i32": -(2**31), "f32": 0.5, "b": True, "u64": 2**63, "i64": -(2**40), "f64": 1e300,
                        "short": (1, -2, 3), "words": ("a", "ß")}
    assert (tokens.type, tokens.count, len(scores), nested.type) == ("string", 5000, 5000, "array")
    assert file.types["u16"] == "uint16" and file.types["words"] == "array:string"
    data = file.header_bytes
    assert data % 32 == 0 and file.file_bytes == len(SMALL) and file.version == 3 and file.alignment == 32
    assert list(file.tensors.values()) == [
        TensorInfo("one", (3,), "F32", data, 12), TensorInfo("two", (32, 2), "Q4_0", data + 32, 36),
        TensorInfo("three", (256, 1, 2), "Q4_K", data + 96, 288),
        TensorInfo("four", (1, 2, 3, 4), "F16", data + 384, 48)]
    assert file.tensors["four"].elements == 24
    assert file.tensor_bytes == 32 + 64 + 288 + 64
    assert file.architecture == "llama" and not file.is_projector


def test_reads_a_file(tmp_path):
    file = read_gguf(put(tmp_path, SMALL))
    check_small(file)
    assert file.metadata["tokens"].values() == tuple(f"t{n}" for n in range(5000))
    assert file.metadata["scores"].values() == tuple(map(float, range(5000)))
    assert file.metadata["nested"].values() == ((1, 2), ("x",))
    for tensor in file.tensors.values():
        data = file.data(tensor.name)
        assert data.dtype == np.uint8 and data.shape == (tensor.bytes,) and not data.flags.writeable
        assert data.tobytes() == SMALL[tensor.offset : tensor.offset + tensor.bytes]


def test_reads_from_a_reader():
    file = read_header(Memory(SMALL))
    check_small(file)
    assert "local" in problem(file.data, "one") and "download" in problem(file.data, "one")
    assert "download" in problem(file.metadata["tokens"].values)


def test_version_2():
    assert read_header(Memory(raw.file(version=2))).version == 2


def test_remote_header_is_asked_for_in_growing_blocks():
    """Few round trips, and tensor data (10 MB here) not fetched beyond the last block."""
    words = b"".join(raw.text("x" * 50) for _ in range(100_000))
    tokens = raw.pair("tokens", raw.ARRAY, raw.array(raw.STRING, 100_000, words))
    reader = Memory(raw.file((raw.LLAMA, tokens), (raw.tensor("t", (2_500_000,), raw.F32, 0),), bytes(10_000_000)))
    read_header(reader)
    assert reader.asked == [MIB, 2 * MIB, 4 * MIB]


def test_survives_pickling(tmp_path):
    file = pickle.loads(pickle.dumps(read_gguf(put(tmp_path, SMALL))))
    assert file.metadata["tokens"].values()[7] == "t7" and file.data("one").nbytes == 12


def test_projector():
    clip = raw.pair("general.architecture", raw.STRING, raw.text("clip"))
    mmproj = raw.pair("general.type", raw.STRING, raw.text("mmproj"))
    assert read_header(Memory(raw.file((clip,)))).is_projector
    assert read_header(Memory(raw.file((raw.LLAMA, mmproj)))).is_projector


def test_file_without_architecture_is_read_but_is_no_model():
    file = read_header(Memory(raw.file(())))  # an importance matrix, for one
    assert "no general.architecture" in problem(lambda: file.architecture)
    assert not file.is_projector


def test_unknown_tensor_offers_the_nearest(tmp_path):
    file = read_gguf(put(tmp_path, SMALL))
    with pytest.raises(UnknownName, match="no tensor 'thre'; the nearest name is 'three'"):
        file.data("thre")


def test_file_cut_short_after_it_was_opened(tmp_path):
    """A map past the new end would end the process with SIGBUS."""
    path = put(tmp_path, SMALL)
    file = read_gguf(path)
    held = file.data("one")
    os.truncate(path, 100)
    assert "changed" in problem(file.data, "four") and "changed" in problem(file.metadata["tokens"].values)
    assert held.shape == (12,)


def test_file_that_gives_less_than_its_size():
    assert "try again" in problem(read_header, Memory(SMALL[:1000], size=len(SMALL)))


# -- sharded sets -----------------------------------------------------------------------------------------------


def shards(folder, count=3, total=None, prefix="m"):
    paths = [folder / f"{prefix}-{number + 1:05d}-of-{count:05d}.gguf" for number in range(count)]
    for number, path in enumerate(paths):
        split = {"split.no": ("uint16", number), "split.count": ("uint16", count),
                 "split.tensors.count": ("int32", 2 * count if total is None else total)}
        metadata = {"general.architecture": "llama", **split} if number == 0 else split
        write_gguf(path, metadata, [(f"t{number}.{n}", (4,), "F32", bytes([number, n] * 8)) for n in range(2)])
    return paths


def test_sharded_set(tmp_path):
    paths = shards(tmp_path)
    file = read_gguf(paths[0])
    assert file.paths == tuple(map(str, paths)) and file.shards == 3
    assert [(name, tensor.shard) for name, tensor in file.tensors.items()] == [
        (f"t{number}.{n}", number) for number in range(3) for n in range(2)]
    assert file.data("t2.1").tobytes() == bytes([2, 1] * 8)
    parts = [read_header(Memory(path.read_bytes(), str(path))) for path in paths]
    assert file.header_bytes == sum(part.header_bytes for part in parts)
    assert file.file_bytes == sum(path.stat().st_size for path in paths)
    assert join_shards(parts).tensors == file.tensors


def test_sharded_set_later_file_names_the_first(tmp_path):
    assert "file 2 of a set of 3; open the first, m-00001-of-00003.gguf" in problem(read_gguf, shards(tmp_path)[1])


def test_sharded_set_missing_files_are_named(tmp_path):
    paths = shards(tmp_path)
    paths[1].unlink()
    assert "m-00002-of-00003.gguf is missing; download" in problem(read_gguf, paths[0])
    paths[2].unlink()
    assert "m-00002-of-00003.gguf, and 1 more, are missing" in problem(read_gguf, paths[0])


def test_sharded_set_under_other_names(tmp_path):
    paths = shards(tmp_path)
    message = problem(read_gguf, paths[0].rename(tmp_path / "model.gguf"))
    assert "rename it to NAME-00001-of-00003.gguf" in message
    message = problem(read_gguf, (tmp_path / "model.gguf").rename(tmp_path / "m-00001-of-00004.gguf"))
    assert "rename it to m-00001-of-00003.gguf" in message


def test_sharded_set_with_files_swapped_repeated_or_foreign(tmp_path):
    paths = shards(tmp_path)
    second, third = paths[1].read_bytes(), paths[2].read_bytes()
    paths[2].write_bytes(second)
    assert "should be file 3 of 3 but says inside that it is 2 of 3" in problem(read_gguf, paths[0])
    paths[2].write_bytes(third.replace(b"t2.0", b"t1.0"))
    message = problem(read_gguf, paths[0])
    assert "00003-of-00003.gguf repeats tensor 't1.0' of " in message and "download the set again" in message


def test_sharded_set_with_wrong_total(tmp_path):
    assert "has 7 tensors, and its 3 files have 6" in problem(read_gguf, shards(tmp_path, total=7)[0])


def test_sharded_set_with_a_truncated_file_names_it(tmp_path):
    paths = shards(tmp_path)
    os.truncate(paths[2], paths[2].stat().st_size - 20)
    message = problem(read_gguf, paths[0])
    assert message.startswith(str(paths[2])) and "is truncated: tensor 't2.1' ends at byte" in message


# -- files that are not what they should be ---------------------------------------------------------------------


def one(**changes):
    """A file with one tensor, some field of which is changed."""
    entry = {"name": "t", "shape": (32,), "kind": raw.F32, "offset": 0} | changes
    return raw.file(tensors=(raw.tensor(**entry),), data=bytes(128))


def key(kind, value, name="k"):
    return raw.file((raw.LLAMA, raw.pair(name, kind, value)), data=bytes(64))


def alignment(kind, value):
    return raw.file((raw.pair("general.alignment", kind, value),))


def nest(depth):
    return raw.array(raw.ARRAY, 1, b"") * depth + raw.array(raw.UINT8, 1, b"\1")


def two(offset, name="u"):
    entries = raw.tensor("t", (32,), raw.F32, 0), raw.tensor(name, (32,), raw.F32, offset)
    return raw.file(tensors=entries, data=bytes(512))


HUGE = 10 * 10**9
HOSTILE = {
    "empty file": (b"", "is empty; download it again"),
    "another magic": (b"\x80\x02}q\x00" * 9, "is not a GGUF file: it begins with 80 02 7d 71, not 47 47 55 46; give"),
    "two bytes": (b"GG", "is not a GGUF file"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer.*git lfs pull"),
    "web page": (b"<!doctype html><html>", "is a web page.*download the file itself"),
    "zip": (b"PK\x03\x04" + bytes(40), "is a zip archive.*unpack"),
    "before gguf": (b"tjgg" + bytes(40), "before GGUF; download"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file.*convert"),
    "version 0": (raw.file(version=0), "is GGUF version 0.*again"),
    "version 1": (raw.file(version=1), "is GGUF version 1.*convert the model again"),
    "version 4": (raw.file(version=4), "is GGUF version 4.*update llmlab"),
    "magic alone": (b"GGUF", "is truncated or damaged: its header needs 4 bytes at byte 4, the file has 4; download"),
    "million tensors": (raw.file(tensor_count=10**6), "claims 1000000 tensors, the most is"),
    "tensors beyond the file": (raw.file(tensor_count=10**5), "claims 100000 tensors, which need at least 3300000"),
    "2**64 - 1 tensors": (raw.file(tensor_count=2**64 - 1), "claims 18446744073709551615 tensors"),
    "2**63 keys": (raw.file(pair_count=2**63), "claims 9223372036854775808 keys"),
    "keys beyond the file": (raw.file(pair_count=60000), "claims 60000 keys, which need at least 840000 bytes"),
    "one key too many": (raw.file(pair_count=2) + bytes(8), "key 2 of 2 has no name"),
    "duplicate key": (raw.file((raw.LLAMA, raw.LLAMA)), "key 'general.architecture' appears twice; download"),
    "key not utf-8": (raw.file((raw.pair(b"\xff\xfe", raw.UINT8, b"\0"),)), "key 1 of 1 is not UTF-8 text; download"),
    "key too long": (raw.file((raw.pair("k" * 70000, raw.UINT8, b"\0"),)), "key 1 of 1 has a string of 70000 bytes"),
    "key past the end": (raw.file((raw.text("k", HUGE) + bytes(9),)), "key 1 of 1 needs 10000000000 bytes at byte 32"),
    "value not utf-8": (key(raw.STRING, raw.text(b"\xc3")), "key 'k' is not UTF-8 text; download"),
    "string past the end": (key(raw.STRING, raw.text("v", HUGE)), "key 'k' needs 10000000000 bytes at byte"),
    "string of 2**64 - 1": (key(raw.STRING, raw.text("v", 2**64 - 1)), "key 'k' needs 18446744073709551615 bytes"),
    "string over the limit": (key(raw.STRING, raw.text("v" * (4 * MIB + 1))), "key 'k' has a string of 4194305 bytes"),
    "value type 13": (key(13, bytes(8)), "key 'k' has value type 13, which GGUF does not have"),
    "value type 2**32 - 1": (key(2**32 - 1, bytes(8)), "key 'k' has value type 4294967295"),
    "array of type 99": (key(raw.ARRAY, raw.array(99, 1, bytes(8))), "key 'k' has value type 99"),
    "numbers past the end": (key(raw.ARRAY, raw.array(raw.FLOAT64, 2**61, b"")), f"'k' needs {2**64} bytes"),
    "strings past the end": (key(raw.ARRAY, raw.array(raw.STRING, 2**60, b"")), f"'k' needs {2**63} bytes"),
    "arrays past the end": (key(raw.ARRAY, raw.array(raw.ARRAY, HUGE, b"")), "'k' needs 120000000000 bytes"),
    "last of many strings past the end": (
        key(raw.ARRAY, raw.array(raw.STRING, 5000, raw.text("v") * 4999 + raw.text("v", HUGE))),
        "a string in key 'k' ends at byte 100000.*, the file has"),
    "one of many strings of 2**64 - 1": (
        key(raw.ARRAY, raw.array(raw.STRING, 4100, raw.text("v") * 99 + raw.text("v", 2**64 - 1) + bytes(32000))),
        "a string in key 'k' ends at byte 18446744073709"),
    "short array of a string past the end": (
        key(raw.ARRAY, raw.array(raw.STRING, 2, raw.text("v") + raw.text("v", HUGE))), "key 'k' needs 10000000000"),
    "deeply nested arrays": (key(raw.ARRAY, nest(2000)), "key 'k' nests arrays deeper than 4"),
    "alignment 0": (alignment(raw.UINT32, raw.u32(0)), "general.alignment is 0, not a power of two"),
    "alignment 48": (alignment(raw.UINT32, raw.u32(48)), "general.alignment is 48, not a power of two"),
    "alignment 2**31": (alignment(raw.UINT32, raw.u32(2**31)), "general.alignment is 2147483648, not a power of two"),
    "alignment a string": (alignment(raw.STRING, raw.text("32")), "general.alignment is of type string, not uint32"),
    "alignment signed": (alignment(raw.INT32, struct.pack("<i", -32)), "general.alignment is of type int32"),
    "architecture a number": (
        raw.file((raw.pair("general.architecture", raw.UINT32, raw.u32(7)),)),
        "general.architecture is of type uint32, not a string"),
    "architecture an array": (
        raw.file((raw.pair("general.architecture", raw.ARRAY, raw.array(raw.STRING, 1, raw.text("llama"))),)),
        "general.architecture is of type array:string, not a string"),
    "split.count a string": (key(raw.STRING, raw.text("3"), "split.count"), "split.count is of type string"),
    "split.no negative": (key(raw.INT32, struct.pack("<i", -1), "split.no"), "says that it is file 0 of 1"),
    "split.no past the count": (key(raw.UINT16, b"\7\0", "split.no"), "says that it is file 8 of 1"),
    "split.count 2**32 - 1": (key(raw.UINT32, b"\xff" * 4, "split.count"), "says that it is file 1 of 4294967295"),
    "no tensor name": (one(name=""), "a tensor has no name"),
    "tensor name too long": (one(name="n" * 2000), "the list of tensors has a string of 2000 bytes"),
    "tensor name not utf-8": (one(name=b"\x80"), "the list of tensors is not UTF-8"),
    "no dimensions": (one(shape=()), "tensor 't' has 0 dimensions, GGUF has 1 to 4"),
    "five dimensions": (one(shape=(1, 1, 1, 1, 1)), "tensor 't' has 5 dimensions"),
    "a million dimensions": (one(dimensions=10**6), "tensor 't' has 1000000 dimensions"),
    "dimension 0": (one(shape=(32, 0)), "tensor 't' has a dimension of 0"),
    "dimension -1": (one(shape=(2**64 - 1,)), "tensor 't' has a shape of 64-bit size, more than fits"),
    "overflowing product": (one(shape=(2**40, 2**24)), "tensor 't' has a shape of 65-bit size, more than fits"),
    "overflowing to zero": (one(shape=(2**32, 2**32)), "tensor 't' has a shape of 65-bit size"),
    "overflowing bytes": (one(shape=(2**61,)), "tensor 't' has a shape of 62-bit size"),
    "rows not of whole blocks": (one(shape=(33,), kind=raw.Q4_0), "tensor 't' has rows of 33, not a multiple of Q4_0"),
    "removed type": (one(kind=4), "has tensor 't' of type number 4, which llmlab does not know; update llmlab"),
    "unknown type": (one(kind=2**32 - 1), "has tensor 't' of type number 4294967295, which llmlab does not know"),
    "unaligned offset": (one(offset=8), "tensor 't' begins at 8, not a multiple of the alignment 32"),
    "offset past the end": (one(offset=2**64 - 32), "is truncated: tensor 't' ends at byte 1844674407370955"),
    "claimed size far beyond the file": (one(shape=(2**40,)), "is truncated: tensor 't' ends at byte 4398046511.*has"),
    "duplicate tensor": (two(128, "t"), "tensor 't' appears twice; download"),
    "overlapping tensors": (two(96), "tensors 't' and 'u' overlap at byte"),
    "same place twice": (two(0), "tensors 't' and 'u' overlap at byte"),
    "control characters": (
        raw.file((raw.pair("a\nb\x1b[31m\u202e", 77, b""),), data=bytes(9)), r"key 'a\\nb\\x1b\[31m\\u202e' has value"),
    "long key in a message": (raw.file((raw.pair("\u0301" * 30000, 77, b""),), data=bytes(9)), "…' has value type 77"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header(case, tmp_path):
    data, expected = HOSTILE[case]
    path = put(tmp_path, data)
    with watchdog(memory=8 * MIB + 2 * len(data)):
        message = problem(read_gguf, path)
    assert message.startswith(str(path)) and len(message) < len(str(path)) + 300
    assert re.search(expected, message), message
    assert re.search("; (download|update|convert|rename|give|run|unpack)", message), message
    if data:
        assert problem(read_header, Memory(data, str(path))) == message


def test_neighbours_of_hostile_headers_are_read():
    """The same builders with honest fields, so that each case above fails for its own reason."""
    for data in (one(), two(128), two(160), key(raw.ARRAY, nest(3)), key(raw.UINT16, b"\0\0", "split.no"),
                 alignment(raw.UINT32, raw.u32(64)), key(raw.STRING, raw.text("v" * 4 * MIB)), one(shape=(1, 1, 1, 1)),
                 key(raw.ARRAY, raw.array(raw.STRING, 5000, raw.text("v") * 5000)), one(shape=(64,), kind=raw.Q4_0)):
        read_header(Memory(data))


def test_larger_alignment_moves_the_data():
    pairs = raw.pair("general.alignment", raw.UINT32, raw.u32(4096)), raw.LLAMA
    file = read_header(Memory(raw.file(pairs, (raw.tensor("t", (4,), raw.F32, 4096),), bytes(4112), alignment=4096)))
    assert (file.alignment, file.header_bytes, file.tensors["t"].offset) == (4096, 4096, 8192)
    assert file.tensor_bytes == 4096


def test_path_that_cannot_be_read(tmp_path, monkeypatch):
    assert "does not exist; check the path" in problem(read_gguf, tmp_path / "none.gguf")
    assert "is a folder; give" in problem(read_gguf, tmp_path)
    assert "cannot be reached (Not a directory)" in problem(read_gguf, put(tmp_path, b"") / "x")
    assert "cannot be reached (File name too long)" in problem(read_gguf, tmp_path / ("x" * 5000))
    for nothing in ("a\0b", None, 3.5):
        assert "is not a path; give" in problem(read_gguf, nothing)
    assert "no\\nline.gguf does not exist" in problem(read_gguf, tmp_path / "no\nline.gguf")
    assert "\\udcff does not exist" in problem(read_gguf, os.fsencode(tmp_path) + b"/\xff")
    os.mkfifo(tmp_path / "pipe")
    with watchdog():
        assert "is not a regular file" in problem(read_gguf, tmp_path / "pipe")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root may read everything, so chmod would prove nothing
    assert "may not be read by this user; change its permissions" in problem(read_gguf, put(tmp_path, SMALL))


def test_claims_beyond_the_limits_do_not_allocate(tmp_path):
    """Files that really are as large as they claim (sparse ones), read with little address space to spare."""
    size = 20 * 10**9
    heads = {
        "long string": (key(raw.STRING, raw.text("", 2 * 10**8)), "has a string of 200000000 bytes"),
        "longer string": (key(raw.STRING, raw.text("", HUGE)), "key 'k' reaches beyond 256 MiB"),
        "numbers": (key(raw.ARRAY, raw.array(raw.UINT8, 2 * 10**8, b"")), "beyond 8000000 items"),
        "more numbers": (key(raw.ARRAY, raw.array(raw.UINT8, HUGE, b"")), "beyond 256 MiB"),
        "strings": (key(raw.ARRAY, raw.array(raw.STRING, 3 * 10**7, b"")), "beyond 8000000 items"),
        "more strings": (key(raw.ARRAY, raw.array(raw.STRING, 10**9, b"")), "beyond 256 MiB"),
        "arrays": (key(raw.ARRAY, raw.array(raw.ARRAY, 2 * 10**7, b"")), "beyond 8000000 items"),
        "far strings": (key(raw.ARRAY, raw.array(raw.STRING, 5000, raw.text("", HUGE))), "beyond 256 MiB"),
        "tensors": (raw.file(tensor_count=2**18), "a tensor has no name"),
        "keys": (raw.file(pair_count=2**16), "key 2 of 65536 has no name"),
    }
    for name, (head, _) in heads.items():
        os.truncate(put(tmp_path, head, name), size)
    code = """
        import resource, sys
        from llmlab.gguf import read_gguf
        resource.setrlimit(resource.RLIMIT_AS, (256 * 2**20, 256 * 2**20))
        for path in sys.argv[1:]:
            try:
                read_gguf(path)
            except ValueError as error:
                print(error)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *(tmp_path / name for name in heads)],
                         capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == len(heads)
    for line, (name, (_, expected)) in zip(lines, heads.items(), strict=True):
        assert name in line and expected in line, line


def test_longest_header_is_bounded(tmp_path):
    """An honest header full of small things is refused before it fills the memory."""
    many = raw.array(raw.UINT8, 4096, bytes(4096))
    with watchdog(60, 128 * MIB):
        assert "beyond 32 MiB" in problem(read_header, Memory(
            raw.file(tuple(raw.pair(f"k{n}", raw.ARRAY, many) for n in range(300)))))


# -- fuzzing ----------------------------------------------------------------------------------------------------


def survives(data):
    """`data` is read, and then what was read lies inside it, or it is one clear line; quickly and in little memory."""
    with watchdog():
        try:
            file = read_header(Memory(data, "fuzz.gguf"))
        except LabError as error:
            message = str(error)
            assert message.startswith("fuzz.gguf ") and message.isprintable() and len(message) < 400
            return
    end = file.header_bytes
    for tensor in sorted(file.tensors.values(), key=lambda tensor: tensor.offset):
        assert end <= tensor.offset and tensor.bytes > 0 and tensor.elements > 0 and tensor.type in FORMATS
        end = tensor.offset + tensor.bytes
    assert end <= len(data)
    assert all(isinstance(key, str) and isinstance(value, str | int | float | bool | tuple | Array)
               for key, value in file.metadata.items())


TINY = raw.file((raw.LLAMA, raw.pair("n", raw.UINT32, raw.u32(7)),
                 raw.pair("a", raw.ARRAY, raw.array(raw.STRING, 2, raw.text("x") + raw.text("yz"))),
                 raw.pair("m", raw.ARRAY, raw.array(raw.ARRAY, 1, raw.array(raw.UINT16, 2, b"abcd")))),
                (raw.tensor("t", (32, 2), raw.Q4_0, 0), raw.tensor("u", (8,), raw.F32, 64)), bytes(96))
VALUES = st.integers(0, 2**64 - 1) | st.sampled_from([
    0, 1, 2, 3, 4, 5, 8, 9, 12, 13, 31, 32, 33, 64, 255, 4096, 2**16, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40,
    2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1])


def test_the_tiny_file_is_valid():
    assert len(read_header(Memory(TINY)).tensors) == 2


def test_every_truncation_is_one_clear_line():
    for length in range(len(TINY)):
        data = TINY[:length]
        message = problem(read_header, Memory(data))
        assert "; download it again" in message or length < 4, message


def test_every_byte_of_the_header_may_be_anything():
    for position in range(len(TINY) - 96):
        for value in (0, 1, 127, 128, 255, TINY[position] ^ 1, TINY[position] ^ 128):
            data = bytearray(TINY)
            data[position] = value
            try:
                read_header(Memory(bytes(data)))
            except LabError as error:
                assert str(error).isprintable()


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(TINY) - 1), st.integers(0, 255)), min_size=1, max_size=12),
       st.integers(0, len(TINY)))
def test_fuzz_bytes(changes, cut):
    data = bytearray(TINY)
    for position, value in changes:
        data[position] = value
    survives(bytes(data))
    survives(bytes(data[:cut]))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(TINY) - 97), VALUES, st.sampled_from([4, 8])), min_size=1, max_size=3),
       st.integers(0, 300))
@example([(8, 2**64 - 1, 8)], 0)
def test_fuzz_fields(changes, tail):
    data = bytearray(TINY)
    for position, value, width in changes:
        data[position : position + width] = (value % 256**width).to_bytes(width, "little")
    survives(bytes(data) + bytes(tail))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_fuzz_noise(noise):
    survives(noise)
    survives(b"GGUF" + noise)
    survives(b"GGUF" + raw.u32(3) + raw.u64(1) + raw.u64(2) + raw.LLAMA + noise + bytes(64))


names = st.sampled_from([*"abcdefghijklmnop", "general.alignment", "split.count", "split.no", "", b"\xff"]) | st.text()
values = st.one_of(
    st.tuples(st.integers(0, 13), st.binary(max_size=12)),
    st.tuples(st.just(raw.STRING), st.builds(raw.text, names, st.none() | VALUES)),
    st.tuples(st.just(raw.ARRAY), st.builds(raw.array, st.integers(0, 13), VALUES, st.binary(max_size=40))))
pairs = st.lists(st.builds(lambda name, value: raw.pair(name, *value), names, values), max_size=4).map(tuple)
entries = st.lists(st.builds(raw.tensor, names, st.lists(VALUES, max_size=5).map(tuple), st.integers(0, 45), VALUES,
                             st.none() | st.integers(0, 6)), max_size=4).map(tuple)


@settings(max_examples=400, deadline=None)
@given(pairs, entries, st.integers(0, 300), *[st.sampled_from([None] * 9 + [0, 3, 2**63])] * 2)
def test_fuzz_structure(pairs, entries, tail, pair_count, tensor_count):
    survives(raw.file(pairs, entries, bytes(tail), pair_count=pair_count, tensor_count=tensor_count))


# -- writing ----------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    metadata = {"general.architecture": "llama", "int": 7, "big": 2**40, "less": -1, "float": 0.25, "yes": True,
                "text": "wörld", "ints": [1, 2], "floats": [0.5, 1], "texts": ["a", ""], "flags": [True, False],
                "typed": ("int16", -5), "typed text": ("string", "x"), "empty": ("array:float32", []),
                "typed list": ("array:uint8", [1, 255]), "long": list(range(5000)), "number": np.float32(0.5),
                "vector": np.arange(3), "typed vector": ("array:int32", np.arange(3))}
    pieces = [bytes([n]) * 18 for n in range(4)]
    path = tmp_path / "new.gguf"
    write_gguf(path, metadata, [("a", (4, 2), "F32", np.arange(8, dtype=np.float32).reshape(2, 4)),
                                ("b", (32,), "Q8_0", lambda: bytearray(range(34))),
                                ("c", np.array([64, 2]), "Q4_0", lambda: iter(pieces))])
    file = read_gguf(path)
    assert os.listdir(tmp_path) == ["new.gguf"]
    assert file.metadata.pop("long").values() == tuple(range(5000))
    assert file.metadata == {
        "general.architecture": "llama", "int": 7, "big": 2**40, "less": -1, "float": 0.25, "yes": True,
        "text": "wörld", "ints": (1, 2), "floats": (0.5, 1.0), "texts": ("a", ""), "flags": (True, False), "typed": -5,
        "typed text": "x", "empty": (), "typed list": (1, 255), "number": 0.5, "vector": (0, 1, 2),
        "typed vector": (0, 1, 2)}
    types = {"int": "uint32", "big": "uint64", "less": "int64", "float": "float32", "yes": "bool",
             "ints": "array:uint32", "typed": "int16", "typed vector": "array:int32"}
    assert {key: file.types[key] for key in types} == types
    assert file.data("a").view(np.float32).tolist() == list(map(float, range(8)))
    assert file.data("b").tobytes() == bytes(range(34)) and file.data("c").tobytes() == b"".join(pieces)
    assert file.tensors["c"].shape == (64, 2) and file.tensors["b"].offset % 32 == 0
    assert file.file_bytes == file.header_bytes + file.tensor_bytes


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_round_trip_alignment(tmp_path, alignment):
    path = tmp_path / "new.gguf"
    tensors = [(f"t{n}", (3,), "F32", bytes(12)) for n in range(3)]
    write_gguf(path, {"general.architecture": "llama"}, tensors, alignment)
    file = read_gguf(path)
    assert file.alignment == alignment and file.tensor_bytes == 3 * max(alignment, 16)
    write_gguf(path, file.typed_metadata(), [])  # the metadata's own alignment stays
    assert read_gguf(path).alignment == alignment


def test_copy_keeps_every_byte(tmp_path):
    """typed_metadata gives back stored types, and long arrays as they lie in the file, nested ones too."""
    source = read_gguf(put(tmp_path, SMALL))
    copy = tmp_path / "copy.gguf"
    write_gguf(copy, source.typed_metadata(), [(t.name, t.shape, t.type, source.data(t.name))
                                               for t in source.tensors.values()])
    padded = SMALL[source.header_bytes :]
    assert copy.read_bytes()[: source.header_bytes] == SMALL[: source.header_bytes]
    copied = read_gguf(copy)
    assert all(copied.data(t.name).tobytes() == padded[t.offset - source.header_bytes :][: t.bytes]
               for t in source.tensors.values())


def test_copy_onto_itself(tmp_path):
    path = put(tmp_path, SMALL)
    source = read_gguf(path)
    held = source.data("two")
    write_gguf(path, source.typed_metadata(), [("two", (32, 2), "Q4_0", held)])
    assert read_gguf(path).data("two").tobytes() == held.tobytes() == SMALL[source.tensors["two"].offset :][:36]


@pytest.mark.parametrize("metadata, expected", [
    ({"k": None}, "metadata 'k' is 'None', which GGUF cannot store"),
    ({"k": [1, "a"]}, "which GGUF cannot store"),
    ({"k": [[1], [2]]}, "which GGUF cannot store"),
    ({"k": []}, "is an empty list, which has no type"),
    ({"k": {}}, "which GGUF cannot store"),
    ({"k": 2**64}, "does not fit in uint64"),
    ({"k": -(2**63) - 1}, "does not fit in int64"),
    ({"k": 1e300}, "does not fit in float32"),
    ({"k": ("uint8", 256)}, "does not fit in uint8"),
    ({"k": ("uint32", "a")}, "does not fit in uint32"),
    ({"k": ("string", 7)}, "is not text"),
    ({"k": ("uint32", [1])}, "is not one uint32"),
    ({"k": ("array:uint32", 1)}, "is not a list"),
    ({"k": ("array:uint32", np.int32(1))}, "is not a list"),
    ({"k": "\ud800"}, "is not text that UTF-8 can store"),
    ({"": 1}, "metadata key '' is not 1 to"),
    ({3: 1}, "metadata key '3' is not 1 to"),
    ({"general.alignment": 64}, "give one"),
])
def test_metadata_that_cannot_be_written(tmp_path, metadata, expected):
    assert expected in problem(write_gguf, tmp_path / "x.gguf", metadata, [], 32)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("tensor, expected", [
    (("", (4,), "F32", bytes(16)), "is not 1 to 63 bytes"),
    (("n" * 64, (4,), "F32", bytes(16)), "is not 1 to 63 bytes"),
    (("t", (4,), "Q9", bytes(16)), "has type 'Q9', which GGUF does not have"),
    (("t", (4,), "NF4", bytes(16)), "has type 'NF4', which GGUF does not have"),
    (("t", (4,), None, bytes(16)), "has type 'None'"),
    (("t", (), "F32", bytes(16)), "has 0 dimensions"),
    (("t", (1,) * 5, "F32", bytes(16)), "has 5 dimensions"),
    (("t", (0,), "F32", b""), "has a dimension of 0"),
    (("t", (-4,), "F32", b""), "has a dimension of -4"),
    (("t", (4.5,), "F32", b""), "give whole numbers"),
    (("t", 4, "F32", b""), "give whole numbers"),
    (("t", (2**62, 4), "F32", b""), "more than fits"),
    (("t", (33,), "Q4_0", b""), "has rows of 33, not a multiple of Q4_0's block of 32"),
    (("t", (4,), "F32", bytes(15)), "as F32 (4,) has 16 bytes, and 15 were given"),
    (("t", (4,), "F32", bytes(17)), "has 16 bytes, and more were given"),
    (("t", (4,), "F32", lambda: (bytes(8) for _ in range(10**9))), "has 16 bytes, and more were given"),
    (("t", (4,), "F32", "text"), "was given str"),
    (("t", (4,), "F32", 5), "was given int"),
    (("t", (4,), "F32", np.zeros((4, 2), np.float32)[:, 0]), "give bytes or a contiguous array"),
])
def test_tensor_that_cannot_be_written(tmp_path, tensor, expected):
    with watchdog():
        assert expected in problem(write_gguf, tmp_path / "x.gguf", {}, [("first", (4,), "F32", bytes(16)), tensor])
    assert os.listdir(tmp_path) == []


def test_two_tensors_of_one_name(tmp_path):
    tensors = [("t", (1,), "I8", b"1")] * 2
    assert "two tensors have the name 't'" in problem(write_gguf, tmp_path / "x.gguf", {}, tensors)


def broken():
    yield bytes(2**20)
    raise OSError(5, "the source broke")


def interrupted():
    yield bytes(2**20)
    raise KeyboardInterrupt


@pytest.mark.parametrize("chunks, error", [(broken, OSError), (interrupted, KeyboardInterrupt)])
def test_writing_is_atomic(tmp_path, chunks, error):
    path = tmp_path / "x.gguf"
    tensors = [("t", (2**20,), "F32", chunks)]
    with pytest.raises(error):
        write_gguf(path, {}, tensors)
    assert os.listdir(tmp_path) == []
    path.write_bytes(b"what was there before")
    with pytest.raises(error):
        write_gguf(path, {}, tensors)
    assert os.listdir(tmp_path) == ["x.gguf"] and path.read_bytes() == b"what was there before"


def test_nothing_has_the_final_name_until_all_is_written(tmp_path):
    seen = []

    def chunks():
        seen.append(sorted(name[-5:] for name in os.listdir(tmp_path)))
        yield bytes(16)

    write_gguf(tmp_path / "x.gguf", {}, [("t", (4,), "F32", chunks)])
    assert seen == [[".part"]] and os.listdir(tmp_path) == ["x.gguf"]


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments, call=call, name=name: calls.append(name) or call(*arguments))
    write_gguf(tmp_path / "x.gguf", {}, [])
    assert calls == ["fsync", "replace"]


def test_new_file_has_ordinary_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        write_gguf(tmp_path / "x.gguf", {}, [])
    finally:
        os.umask(before)
    assert (tmp_path / "x.gguf").stat().st_mode & 0o777 == 0o640


def test_places_that_cannot_be_written(tmp_path):
    assert "make it first" in problem(write_gguf, tmp_path / "none" / "x.gguf", {}, [])
    assert "not a regular file" in problem(write_gguf, tmp_path, {}, [])
    assert "not a regular file" in problem(write_gguf, "/dev/null", {}, [])
    assert "is not a path" in problem(write_gguf, None, {}, [])
    assert "is not a path" in problem(write_gguf, "a\0b", {}, [])
    assert "File name too long" in problem(write_gguf, tmp_path / ("x" * 255 + ".gguf"), {}, [])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("alignment", [0, 3, -32, 2**17, "32", 1.5])
def test_alignment_that_cannot_be_written(tmp_path, alignment):
    assert "is not a power of two" in problem(write_gguf, tmp_path / "x.gguf", {}, [], alignment)


def test_disk_too_small(tmp_path, monkeypatch):
    import shutil

    called = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 500, 500))
    tensors = [("t", (256,), "F32", lambda: called.append(1) or bytes(1024))]
    message = problem(write_gguf, tmp_path / "x.gguf", {}, tensors)
    assert "needs 1.06 KiB and its disk has 500 B free; free some space" in message
    assert not called and os.listdir(tmp_path) == []


def test_disk_that_fills_up(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        message = problem(write_gguf, tmp_path / "x.gguf", {}, [("t", (5000,), "F32", bytes(20_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written (File too large); free some space or write elsewhere" in message
    assert os.listdir(tmp_path) == []


# -- gguf-py, both ways -----------------------------------------------------------------------------------------


@pytest.fixture
def peer():
    return pytest.importorskip("gguf")


def test_gguf_py_reads_what_we_write(tmp_path, peer):
    rng = np.random.default_rng(0)
    known = [name for name in FORMATS if name in peer.GGMLQuantizationType.__members__]
    known.remove("Q8_1")  # an intermediate of ggml's that no file has; gguf-py still gives it its size of 2023
    assert len(known) > 30
    tensors = []
    for name in known:
        block, size = peer.GGML_QUANT_SIZES[peer.GGMLQuantizationType[name]]
        data = rng.integers(0, 256, 3 * 2 * size, dtype=np.uint8)
        tensors.append((f"t.{name}", (2 * block, 3), name, data.tobytes()))
    metadata = {"general.architecture": "llama", "an int": 7, "a float": ("float64", 0.1), "words": ["ä", "b"] * 3000,
                "flags": [True, False], "list": ("array:int16", [-1, 2]), "yes": False}
    write_gguf(tmp_path / "x.gguf", metadata, tensors)
    theirs = peer.GGUFReader(tmp_path / "x.gguf")
    contents = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert contents == metadata | {"a float": 0.1, "list": [-1, 2]}
    assert [(t.name, tuple(t.shape.tolist()), t.tensor_type.name, t.data.tobytes()) for t in theirs.tensors] == tensors


def test_we_read_what_gguf_py_writes(tmp_path, peer):
    rng = np.random.default_rng(1)
    writer = peer.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_context_length(4096)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_bool("yes", True)
    writer.add_token_list([f"token {n}" for n in range(5000)])
    writer.add_token_scores([n / 8 for n in range(5000)])
    writer.add_array("head counts", [1, 2, 3])
    weights = rng.standard_normal((6, 64)).astype(np.float32)
    packed = peer.quants.quantize(weights, peer.GGMLQuantizationType.Q8_0)
    writer.add_tensor("plain", weights)
    writer.add_tensor("packed", packed, raw_dtype=peer.GGMLQuantizationType.Q8_0)
    writer.add_tensor("deep", weights.reshape(2, 3, 2, 32).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "x.gguf")
    assert file.architecture == "qwen2" and file.metadata["qwen2.context_length"] == 4096
    assert file.metadata["yes"] is True
    assert file.metadata["qwen2.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert file.metadata["head counts"] == (1, 2, 3)
    assert file.metadata["tokenizer.ggml.tokens"].values()[4999] == "token 4999"
    assert file.metadata["tokenizer.ggml.scores"].values() == tuple(n / 8 for n in range(5000))
    assert {t.name: (t.shape, t.type) for t in file.tensors.values()} == {
        "plain": ((64, 6), "F32"), "packed": ((64, 6), "Q8_0"), "deep": ((32, 2, 3, 2), "F16")}
    assert file.data("plain").tobytes() == weights.tobytes() and file.data("packed").tobytes() == packed.tobytes()
    theirs = peer.GGUFReader(tmp_path / "x.gguf")
    assert [(t.name, t.data_offset, t.n_bytes) for t in theirs.tensors] == [
        (t.name, t.offset, t.bytes) for t in file.tensors.values()]
    assert file.header_bytes == theirs.data_offset


def test_we_read_the_shards_gguf_py_writes(tmp_path, peer):
    writer = peer.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for number in range(5):
        writer.add_tensor(f"t{number}", np.full(8, number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "m-00001-of-00003.gguf")
    assert [tensor.shard for tensor in file.tensors.values()] == [0, 0, 1, 1, 2]
    assert [file.data(name).view(np.float32)[0] for name in file.tensors] == [0, 1, 2, 3, 4]


def test_big_endian_file_of_gguf_py(tmp_path, peer):
    writer = peer.GGUFWriter(tmp_path / "x.gguf", "llama", endianess=peer.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "is a big-endian GGUF file" in problem(read_gguf, tmp_path / "x.gguf")


# -- the house --------------------------------------------------------------------------------------------------


def test_import_needs_neither_torch_nor_numpy():
    code = "import sys, llmlab.gguf; print({'torch', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.stdout.strip() == "set()", run.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is resident")
def test_touched_pages_can_be_let_go_and_come_back(tmp_path):
    path, size = tmp_path / "large.gguf", 32 * MIB
    write_gguf(path, {"general.architecture": "llama"}, [("x", (size // 4,), "F32", bytes(range(256)) * (size // 256))])

    def resident() -> int:
        return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    file = read_gguf(path)
    data = file.data("x")
    before, total = resident(), int(data.sum(dtype=np.int64))
    assert resident() - before > size * 0.9
    file.sources[0].let_go()
    assert resident() - before < size * 0.1
    assert int(data.sum(dtype=np.int64)) == total
