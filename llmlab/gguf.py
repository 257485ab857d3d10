"""The GGUF container file: a header that says what the tensors are, then the tensors' bytes.

A header comes from strangers. Every length in it is held against what is left of the file before anything
is allocated, counts and nesting are bounded, and a vocabulary is walked, not decoded. The header is read
through one small moving window with ordinary reads: a file cut short under us is then one clear error,
where a memory map would end the process. Layout: the GGUF specification, versions 2 and 3 (little endian).
"""

import errno
import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import index
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from .errors import BadFile, LabError, UnknownName
from .formats import BY_ID, FORMATS
from .units import KIB, MIB, align, format_bytes

if TYPE_CHECKING:
    import numpy as np

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32

HELD_ITEMS = 4096  # an array up to this long is held as a tuple; a longer one becomes an Array

# Far above every published model (its largest header is some 20 MiB, its longest vocabulary under a million strings),
# and low enough that the worst header costs a second or two and some hundred MiB.
_HEADER_LIMIT = 256 * MIB
_HELD_LIMIT = 32 * MIB  # keys, names, strings and held items of one header, each with 64 bytes for its object
_WALKED_LIMIT = 8_000_000  # items of long arrays; one of arrays counts 16, being slower to walk
_STRING_LIMIT, _KEY_LIMIT, _NAME_LIMIT = 4 * MIB, 65535, 1024
_KEYS_LIMIT, _TENSORS_LIMIT = 2**16, 2**18
_DEPTH_LIMIT, _DIMENSIONS_LIMIT, _ALIGNMENT_LIMIT = 4, 4, 64 * KIB
_KEY_BYTES, _TENSOR_BYTES = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8  # the least that one entry takes
_FIRST_BLOCK, _LAST_BLOCK = 1 * MIB, 8 * MIB  # a remote file is asked for more each time: fewer round trips
_WRITTEN_NAME_LIMIT = 63  # ggml keeps 64 bytes for a name and its terminator
_INT64 = 2**63 - 1

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array",
          "uint64", "int64", "float64")  # in the order of their numbers
_CODES = {"uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i", "float32": "f",
          "bool": "B", "uint64": "Q", "int64": "q", "float64": "d"}
_SCALARS = {name: struct.Struct("<" + code) for name, code in _CODES.items()}

_ENTRIES = [struct.Struct(f"<{dimensions}QIQ") for dimensions in range(_DIMENSIONS_LIMIT + 1)]  # shape, type, offset

_SHARD = re.compile(r"(.*)-[0-9]{5}-of-[0-9]{5}\.gguf", re.DOTALL)


class Reader(Protocol):
    """What `read_header` reads from: a local file, a remote one by range requests, bytes in a test."""

    name: str
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; never asked for bytes past `size`."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `shape` in ggml's order (shape[0] is the contiguous row length), `type` a name of
    `llmlab.formats.FORMATS`, `offset` in bytes from the start of its shard's file, `bytes` exact, without padding."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    bytes: int
    shard: int = 0

    @property
    def elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Array:
    """A metadata array too long to hold (a vocabulary), or one of arrays: `count` items of `type`, left in the file."""

    type: str
    count: int
    offset: int  # of the first item, in bytes from the start of the file
    bytes: int
    source: "_LocalFile | None" = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.count

    def values(self) -> tuple:
        """The items, read and decoded now. Raises BadFile where the file is not local or has changed since."""
        walk = _Walker(self._local(), self.offset)
        walk.held_limit = _INT64  # asked for by name, and the walk that found this array has bounded it
        return walk.items(self.type, self.count)

    def raw(self) -> Iterator[bytes]:
        """The items as they lie in the file, in chunks. Raises as `values` does."""
        source, end = self._local(), self.offset + self.bytes
        for start in range(self.offset, end, _LAST_BLOCK):
            yield source.read(start, min(_LAST_BLOCK, end - start))

    def _local(self) -> "_LocalFile":
        if self.source is None:
            raise BadFile("a long metadata array can be read from local files only; download the file first")
        return self.source


@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file (or a sharded set) holds, by its header.

    `metadata` has Python values: arrays of up to 4096 items as tuples, longer and nested ones as `Array`; `types`
    has their stored types (`"uint32"`, `"array:string"`). `tensors` is in file order over all shards.
    `header_bytes` (all before the tensor data) and `file_bytes` are summed over shards.
    """

    paths: tuple[str, ...]
    version: int
    alignment: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    header_bytes: int
    file_bytes: int
    types: dict[str, str] = field(default_factory=dict, repr=False)
    sources: "tuple[_LocalFile, ...]" = field(default=(), repr=False, compare=False)  # empty for a remote file

    @property
    def architecture(self) -> str:
        """`general.architecture`. Raises BadFile where there is none (an importance matrix, a later shard)."""
        name = self.metadata.get("general.architecture")
        if not name:
            raise BadFile(f"{_show_path(self.paths[0])} has no general.architecture, so it is no model; "
                          "download it again or convert the model again")
        return name

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, each rounded up to `alignment`."""
        return sum(align(tensor.bytes, self.alignment) for tensor in self.tensors.values())

    @property
    def is_projector(self) -> bool:
        """Whether this is a vision or audio projector that accompanies a model, not a model."""
        return self.metadata.get("general.architecture") == "clip" or self.metadata.get("general.type") == "mmproj"

    @property
    def shards(self) -> int:
        """How many files the set has, by `split.count`; 1 for a file that stands alone."""
        return self.metadata.get("split.count") or 1

    def data(self, name: str) -> "np.ndarray":
        """The bytes of one tensor: uint8 [bytes], read-only, mapped from the file.

        Raises UnknownName for a tensor that is not there, BadFile where the file is not local, is gone or has changed.
        """
        import numpy as np

        if name not in self.tensors:
            import difflib

            near = difflib.get_close_matches(str(name), self.tensors, 1, 0)
            hint = f"; the nearest name is {_show(near[0])}" if near else "; it has no tensors"
            raise UnknownName(f"{_show_path(self.paths[0])} has no tensor {_show(str(name))}{hint}")
        tensor = self.tensors[name]
        if not self.sources:
            raise BadFile(f"{_show_path(self.paths[tensor.shard])} is not a local file; download it to read tensors")
        return np.frombuffer(self.sources[tensor.shard].map(), np.uint8, tensor.bytes, tensor.offset)

    def typed_metadata(self) -> dict[str, Any]:
        """The metadata as `write_gguf` takes it, stored types kept."""
        return {key: value if isinstance(value, Array) else (self.types[key], value)
                for key, value in self.metadata.items()}


def read_gguf(path: str | os.PathLike) -> GGUFFile:
    """The header of a GGUF file, or of a whole sharded set given its first file (NAME-00001-of-00003.gguf).

    Raises BadFile, in one line that names the file and the remedy, for whatever cannot be used.
    """
    first = _read_local(path)
    count, number = first.shards, first.metadata.get("split.no", 0)
    if count == 1:
        return first
    shown = f"{_show_path(first.paths[0])} is file {number + 1} of a set of {count}"
    folder, name = os.path.split(first.paths[0])
    if not _SHARD.fullmatch(name):
        raise BadFile(f"{shown} but is not named like one; "
                      f"rename it to NAME-{number + 1:05d}-of-{count:05d}.gguf, the others alike")
    names = shard_names(name, count)
    if number > 0:
        raise BadFile(f"{shown}; open the first, {_show_path(names[0])}")
    if name != names[0]:
        raise BadFile(f"{shown} but is not named so; rename it to {_show_path(names[0])}")
    paths = [os.path.join(folder, name) for name in names]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        more = f", and {len(missing) - 1} more, are" if len(missing) > 1 else " is"
        raise BadFile(f"{shown}, and {_show_path(missing[0])}{more} missing; download it into the same folder")
    return join_shards([first, *map(_read_local, paths[1:])])


def read_header(reader: Reader) -> GGUFFile:
    """The header of one file (one shard), asking `reader` for growing blocks from the start, never past its size.

    Raises BadFile, in one line that names the file and the remedy, for whatever cannot be used.
    """
    walk = _Walker(reader)
    version, tensor_count, key_count = _read_start(walk)
    metadata, types = _read_metadata(walk, key_count)
    alignment = _alignment(walk, metadata, types)
    entries = [_read_tensor(walk) for _ in range(tensor_count)]
    data = align(walk.pos, alignment) if entries else walk.pos
    tensors = _place(walk, entries, data, alignment)
    source = (reader,) if isinstance(reader, _LocalFile) else ()
    return GGUFFile((reader.name,), version, alignment, metadata, tensors, data, reader.size, types, source)


def shard_names(name: str, count: int) -> list[str]:
    """The `count` file names of the set that the file called `name` belongs to. Raises BadFile for another name."""
    match = _SHARD.fullmatch(name)
    if not match:
        raise BadFile(f"{_show_path(name)} is not named like one of a set, NAME-00001-of-00003.gguf")
    return [f"{match[1]}-{number + 1:05d}-of-{count:05d}.gguf" for number in range(count)]


def join_shards(parts: Sequence[GGUFFile]) -> GGUFFile:
    """One GGUFFile from the headers of a whole set, in order. Metadata is the first's. Raises BadFile."""
    first = parts[0]
    shown = [_show_path(part.paths[0]) for part in parts]
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        told = part.metadata.get("split.no", 0), part.shards
        if told != (number, len(parts)):
            raise BadFile(f"{shown[number]} should be file {number + 1} of {len(parts)} but says inside that it is "
                          f"{told[0] + 1} of {told[1]}; download the set again")
        for tensor in part.tensors.values():
            if tensor.name in tensors:
                raise BadFile(f"{shown[number]} repeats tensor {_show(tensor.name)} of "
                              f"{shown[tensors[tensor.name].shard]}; download the set again")
            tensors[tensor.name] = replace(tensor, shard=number)
    total = first.metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise BadFile(f"{shown[0]} says that its set has {total} tensors, and its {len(parts)} files "
                      f"have {len(tensors)}; download the set again")
    return replace(first, paths=tuple(part.paths[0] for part in parts), tensors=tensors,
                   header_bytes=sum(part.header_bytes for part in parts),
                   file_bytes=sum(part.file_bytes for part in parts),
                   sources=tuple(source for part in parts for source in part.sources))


def _show(text: str, limit: int = 80) -> str:
    """A name from a file, quoted, on one line, cut to `limit` characters."""
    shown = _printable(text[: limit + 1])
    return f"'{shown if len(shown) <= limit else shown[: limit - 1] + '…'}'"


def _show_path(path: str) -> str:
    """A path on one line; of a very long one the end, which tells more."""
    shown = _printable(path)
    return shown if len(shown) <= 300 else "…" + shown[-299:]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# -- local files ------------------------------------------------------------------------------------------------


_OPEN = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_maps: "WeakValueDictionary[tuple, mmap.mmap]" = WeakValueDictionary()  # a map lives as long as an array looks at it


@dataclass(frozen=True, slots=True)
class _LocalFile:
    """A regular file as it was when we first looked. Holds no descriptor; each access checks that it is unchanged."""

    name: str
    size: int
    stamp: tuple[int, int]  # inode, modification time in ns

    @classmethod
    def look(cls, path: str | os.PathLike) -> "_LocalFile":
        """Raises BadFile where `path` is nothing that can be read. A pipe or device is never opened: it might hang."""
        try:
            name = os.fsdecode(path)
            found = os.stat(name)
        except (TypeError, ValueError):
            raise BadFile(f"{_show(str(path))} is not a path; give the path of a .gguf file") from None
        except FileNotFoundError:
            raise BadFile(f"{_show_path(name)} does not exist; check the path, or try llmlab fetch") from None
        except OSError as error:
            raise BadFile(f"{_show_path(name)} cannot be reached ({error.strerror}); check the path") from None
        if stat.S_ISDIR(found.st_mode):
            raise BadFile(f"{_show_path(name)} is a folder; give the path of a .gguf file in it")
        if not stat.S_ISREG(found.st_mode):
            raise BadFile(f"{_show_path(name)} is not a regular file; give the path of a .gguf file")
        return cls(name, found.st_size, (found.st_ino, found.st_mtime_ns))

    def read(self, offset: int, length: int) -> bytes:
        handle = self._open()
        try:
            parts = []
            os.lseek(handle, offset, os.SEEK_SET)
            while length > 0 and (part := os.read(handle, length)):
                parts.append(part)
                length -= len(part)
        except OSError as error:
            raise BadFile(f"{_show_path(self.name)} cannot be read ({error.strerror}); check its disk") from None
        finally:
            os.close(handle)
        if length > 0:
            raise self._changed()
        return b"".join(parts)

    def map(self) -> mmap.mmap:
        key = (self.name, self.size, self.stamp)
        handle = self._open()  # even where a map is at hand: a file cut short since must not be touched through it
        try:
            found = _maps.get(key)
            if found is None:
                found = _maps[key] = mmap.mmap(handle, self.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise BadFile(f"{_show_path(self.name)} cannot be mapped ({error.strerror}); close other programs or raise "
                          "the limit on memory maps") from None
        finally:
            os.close(handle)
        return found

    def _open(self) -> int:
        """A descriptor of the very file we looked at. Raises BadFile."""
        try:
            handle = os.open(self.name, _OPEN)
        except PermissionError:
            raise BadFile(f"{_show_path(self.name)} may not be read by this user; change its permissions") from None
        except OSError as error:
            raise BadFile(f"{_show_path(self.name)} cannot be opened ({error.strerror}); check the path") from None
        found = os.fstat(handle)
        if (found.st_size, (found.st_ino, found.st_mtime_ns)) != (self.size, self.stamp):
            os.close(handle)
            raise self._changed()
        return handle

    def _changed(self) -> BadFile:
        return BadFile(f"{_show_path(self.name)} has changed since it was opened; "
                       "wait until it is complete, then open it again")


def _read_local(path: str | os.PathLike) -> GGUFFile:
    return read_header(_LocalFile.look(path))


# -- the header, piece by piece ---------------------------------------------------------------------------------


class _Walker:
    """Walks through a header by one window of bytes that moves forward; counts what it holds and walks over."""

    def __init__(self, reader: Reader, start: int = 0):
        self.reader, self.size = reader, reader.size
        self.pos = self.base = start  # where we are, and where the window begins, from the start of the file
        self.window = b""
        self.block = _FIRST_BLOCK
        self.what, self.name = "its header", ""  # what is being read, for messages
        self.held, self.held_limit, self.walked = 0, _HELD_LIMIT, 0

    @property
    def where(self) -> str:
        return f"{self.what} {_show(self.name)}" if self.name else self.what

    def fail(self, problem: str) -> BadFile:
        return BadFile(f"{_show_path(self.reader.name)} {problem}")

    def damaged(self, problem: str) -> BadFile:
        return self.fail(f"is damaged: {problem}; download it again")

    def check(self, length: int) -> None:
        """Raises BadFile unless the next `length` bytes are in the file and within a header's bounds."""
        if length > self.size - self.pos:
            raise self.fail(f"is truncated or damaged: {self.where} needs {length} bytes at byte {self.pos}, "
                            f"the file has {self.size}; download it again")
        if self.pos + length > _HEADER_LIMIT:
            raise self.damaged(f"{self.where} reaches beyond {format_bytes(_HEADER_LIMIT, 0)}, longer than any header")

    def need(self, length: int) -> int:
        """Where in the window the next `length` bytes begin; reads on where the window ends before them."""
        here = self.pos - self.base
        if here + length > len(self.window):
            self.check(length)
            want = min(max(self.block, length), self.size - self.pos)
            self.window = self.reader.read(self.pos, want)
            if len(self.window) != want:
                raise self.fail(f"gave {len(self.window)} of {want} bytes at byte {self.pos}; try again")
            self.base, here = self.pos, 0
            if not isinstance(self.reader, _LocalFile):
                self.block = min(self.block * 2, _LAST_BLOCK)
        return here

    def numbers(self, code: struct.Struct) -> tuple:
        here = self.need(code.size)
        self.pos += code.size
        return code.unpack_from(self.window, here)

    def number(self, code: struct.Struct) -> Any:
        return self.numbers(code)[0]

    def text(self, limit: int = _STRING_LIMIT) -> str:
        length = self.number(_U64)
        self.check(length)
        if length > limit:
            raise self.damaged(f"{self.where} has a string of {length} bytes, the most is {limit}")
        self.hold(length)
        here = self.need(length)
        self.pos += length
        try:
            return self.window[here : here + length].decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{self.where} is not UTF-8 text") from None

    def hold(self, length: int, items: int = 1) -> None:
        self.held += length + 64 * items
        if self.held > self.held_limit:
            raise self.damaged(f"{self.where} brings what the header holds beyond {format_bytes(_HELD_LIMIT, 0)}, "
                               "more than any model has")

    def walk(self, items: int) -> None:
        self.walked += items
        if self.walked > _WALKED_LIMIT:
            raise self.damaged(f"{self.where} brings the arrays beyond {_WALKED_LIMIT} items, more than any model has")

    def kind(self) -> str:
        number = self.number(_U32)
        if number >= len(_TYPES):
            raise self.damaged(f"{self.where} has value type {number}, which GGUF does not have")
        return _TYPES[number]

    def value(self, kind: str) -> Any:
        if kind == "string":
            return self.text()
        value = self.number(_SCALARS[kind])
        return value != 0 if kind == "bool" else value

    def items(self, kind: str, count: int) -> tuple:
        """The next `count` items of an array, decoded."""
        if kind == "string":
            return tuple(self.text() for _ in range(count))
        if kind == "array":
            return tuple(self.items(*self.array()) for _ in range(count))
        length = count * _SCALARS[kind].size
        here = self.need(length)
        self.pos += length
        self.hold(0, count)
        values = struct.unpack_from(f"<{count}{_CODES[kind]}", self.window, here)
        return tuple(value != 0 for value in values) if kind == "bool" else values

    def array(self) -> tuple[str, int]:
        """The type and count at the head of an array, the count possible in what is left of the file."""
        kind, count = self.kind(), self.number(_U64)
        self.check(count * (12 if kind == "array" else 8 if kind == "string" else _SCALARS[kind].size))
        return kind, count

    def skip(self, kind: str, count: int, depth: int = 1) -> None:
        """Walk over the items of an array."""
        if kind == "string":
            self.skip_strings(count)
        elif kind == "array":
            if depth >= _DEPTH_LIMIT:
                raise self.damaged(f"{self.where} nests arrays deeper than {_DEPTH_LIMIT}")
            self.walk(16 * count)
            for _ in range(count):
                self.skip(*self.array(), depth + 1)
        else:
            self.walk(count)
            self.pos += count * _SCALARS[kind].size

    def skip_strings(self, count: int) -> None:
        """Walk over `count` strings: a vocabulary has hundreds of thousands, so the loop does one thing."""
        self.walk(count)
        unpack = _U64.unpack_from
        while count:
            here, window, done = self.need(8), self.window, 0
            try:
                for done in range(count):  # noqa: B007 - after an error, how many were done
                    here += 8 + unpack(window, here)[0]
                done = count
            except (struct.error, OverflowError):  # the next length lies past the window
                pass
            self.pos = self.base + here
            if self.pos > self.size:
                raise self.fail(f"is truncated or damaged: a string in {self.where} ends at byte {self.pos}, "
                                f"the file has {self.size}; download it again")
            count -= done


def _read_start(walk: _Walker) -> tuple[int, int, int]:
    """Magic, version and counts -> version, number of tensors, number of keys."""
    if walk.size == 0:
        raise walk.fail("is empty; download it again")
    walk.need(min(16, walk.size))
    if not walk.window.startswith(MAGIC):
        raise walk.fail(_not_gguf(walk.window[:16]))
    walk.pos = len(MAGIC)
    version = walk.number(_U32)
    if version & 0xFFFF == 0 and version:
        raise walk.fail("is a big-endian GGUF file, and llmlab reads little-endian ones; "
                        "download the little-endian file or convert it with gguf-py's gguf-convert-endian")
    if version not in (2, 3):
        raise walk.fail(f"is GGUF version {version}, and llmlab reads versions 2 and 3; "
                        + ("update llmlab" if 3 < version < 100 else "download it again or convert the model again"))
    tensors, keys = walk.number(_U64), walk.number(_U64)
    for count, least, limit, what in ((tensors, _TENSOR_BYTES, _TENSORS_LIMIT, "tensors"),
                                      (keys, _KEY_BYTES, _KEYS_LIMIT, "keys")):
        if count > limit:
            raise walk.damaged(f"it claims {count} {what}, the most is {limit}")
        if count * least > walk.size - walk.pos:
            raise walk.fail(f"is truncated or damaged: it claims {count} {what}, which need at least "
                            f"{count * least} bytes, the file has {walk.size}; download it again")
    return version, tensors, keys


def _read_metadata(walk: _Walker, count: int) -> tuple[dict[str, Any], dict[str, str]]:
    metadata: dict[str, Any] = {}
    types: dict[str, str] = {}
    for number in range(count):
        walk.what, walk.name = f"key {number + 1} of {count}", ""
        key = walk.text(_KEY_LIMIT)
        if not key:
            raise walk.damaged(f"{walk.where} has no name")
        if key in metadata:
            raise walk.damaged(f"key {_show(key)} appears twice")
        walk.what, walk.name = "key", key
        kind = walk.kind()
        if kind != "array":
            walk.hold(0)
            metadata[key], types[key] = walk.value(kind), kind
            continue
        kind, items = walk.array()
        types[key] = f"array:{kind}"
        if items <= HELD_ITEMS and kind != "array":
            metadata[key] = walk.items(kind, items)
            continue
        start = walk.pos
        walk.skip(kind, items)
        source = walk.reader if isinstance(walk.reader, _LocalFile) else None
        metadata[key] = Array(kind, items, start, walk.pos - start, source)
    _check_metadata(walk, metadata, types)
    return metadata, types


def _check_metadata(walk: _Walker, metadata: dict, types: dict) -> None:
    """The keys that this module itself relies on have the types it takes for granted."""
    for key in ("general.architecture", "general.type"):
        if key in metadata and not isinstance(metadata[key], str):
            raise walk.damaged(f"{key} is of type {types[key]}, not a string")
    for key in ("split.count", "split.no", "split.tensors.count"):
        if key in metadata and type(metadata[key]) is not int:
            raise walk.damaged(f"{key} is of type {types[key]}, not a whole number")
    count, number = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if not (0 <= count <= 99999 and 0 <= number < max(count, 1)):
        raise walk.damaged(f"it says that it is file {number + 1} of {count}")


def _alignment(walk: _Walker, metadata: dict, types: dict) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if types.get("general.alignment", "uint32") != "uint32":
        raise walk.damaged(f"general.alignment is of type {types['general.alignment']}, not uint32")
    if not 0 < alignment <= _ALIGNMENT_LIMIT or alignment & (alignment - 1):
        raise walk.damaged(f"general.alignment is {alignment}, not a power of two up to {_ALIGNMENT_LIMIT}")
    return alignment


def _read_tensor(walk: _Walker) -> tuple[str, tuple[int, ...], str, int, int]:
    """One tensor's entry -> name, shape, type, offset within the data, bytes."""
    walk.what, walk.name = "the list of tensors", ""
    name = walk.text(_NAME_LIMIT)
    walk.what, walk.name = "tensor", name
    if not name:
        raise walk.damaged("a tensor has no name")
    dimensions = walk.number(_U32)
    if not 1 <= dimensions <= _DIMENSIONS_LIMIT:
        raise walk.damaged(f"{walk.where} has {dimensions} dimensions, GGUF has 1 to {_DIMENSIONS_LIMIT}")
    *shape, number, offset = walk.numbers(_ENTRIES[dimensions])
    kind = BY_ID.get(number)
    if kind is None:
        raise walk.fail(f"has {walk.where} of type number {number}, which llmlab does not know; update llmlab, "
                        "or download a file made by a current llama.cpp")
    try:
        return name, tuple(shape), kind.name, offset, _tensor_bytes(shape, kind.name)
    except LabError as error:
        raise walk.damaged(f"{walk.where} {error}") from None


def _tensor_bytes(shape: Sequence[int], kind: str) -> int:
    """Bytes of a tensor. Raises LabError, the end of a sentence, for a shape that cannot be."""
    layout = FORMATS[kind]
    if min(shape) < 1:
        raise LabError(f"has a dimension of {min(shape)}")
    elements = math.prod(shape)
    if elements > _INT64 or layout.bytes(elements) > _INT64:
        raise LabError(f"has a shape of {elements.bit_length()}-bit size, more than fits in 64 bits")
    if shape[0] % layout.block:
        raise LabError(f"has rows of {shape[0]}, not a multiple of {kind}'s block of {layout.block}")
    return layout.bytes(elements)


def _place(walk: _Walker, entries: list, data: int, alignment: int) -> dict[str, TensorInfo]:
    """Entries with offsets from `data` -> TensorInfo by name; none outside the file, none over another."""
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset, size in entries:
        if name in tensors:
            raise walk.damaged(f"tensor {_show(name)} appears twice")
        if offset % alignment:
            raise walk.damaged(f"tensor {_show(name)} begins at {offset}, not a multiple of the alignment {alignment}")
        if data + offset + size > walk.size:
            raise walk.fail(f"is truncated: tensor {_show(name)} ends at byte {data + offset + size}, "
                            f"the file has {walk.size}; download it again")
        tensors[name] = TensorInfo(name, shape, kind, data + offset, size)
    end, before = data, None
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise walk.damaged(f"tensors {_show(before.name)} and {_show(tensor.name)} overlap at byte {tensor.offset}")
        end, before = tensor.offset + tensor.bytes, tensor
    return tensors


_OTHERS = ((b"version http", "is a Git LFS pointer, not the model; run git lfs pull in its folder"),
           (b"<", "is a web page, not a model; download the file itself, not the page about it"),
           (b"PK\x03\x04", "is a zip archive, not a GGUF file; unpack it"),
           (b"lmgg", "is in the GGML format from before GGUF; download the GGUF file of this model"),
           (b"fmgg", "is in the GGML format from before GGUF; download the GGUF file of this model"),
           (b"tjgg", "is in the GGML format from before GGUF; download the GGUF file of this model"))


def _not_gguf(head: bytes) -> str:
    for begin, problem in _OTHERS:
        if head.startswith(begin):
            return problem
    return (f"is not a GGUF file: it begins with {head[:4].hex(' ')}, not {MAGIC.hex(' ')}; "
            "give a .gguf file or download it again")


# -- writing ----------------------------------------------------------------------------------------------------

Data = Any  # bytes-like, or a callable that returns bytes-like or an iterator of bytes-like chunks


def write_gguf(path: str | os.PathLike, metadata: Mapping[str, Any],
               tensors: Iterable[tuple[str, Sequence[int], str, Data]], alignment: int | None = None) -> None:
    """Write a GGUF file (version 3), whole or not at all.

    `metadata` values are Python values (int -> uint32 where it fits, else uint64 or int64; float -> float32; bool; str;
    lists of one kind), `Array` of another file, or `(type, value)` with the stored type: `("int32", 3)`,
    `("array:string", [...])`. `tensors` yields (name, shape in ggml's order, type name, data); data is bytes-like, or
    a callable that returns bytes-like or an iterator of chunks, called when its turn comes, so that one tensor at a
    time is in memory. `alignment` None is the metadata's general.alignment, or 32. The bytes go to a temporary file
    in the same folder that takes the name `path` when complete.

    Raises LabError for what cannot be written, a full disk among it; what a callable raises passes through. Either way
    nothing is left behind, and a file that was there before stays as it was.
    """
    try:
        target = os.path.realpath(os.fsdecode(path))
    except (TypeError, ValueError):
        raise LabError(f"{_show(str(path))} is not a path; give the path of the file to write") from None
    metadata = dict(metadata)
    told = metadata.pop("general.alignment", None)
    told = told[1] if isinstance(told, tuple) else told
    alignment = told or ALIGNMENT if alignment is None else alignment
    if told not in (None, alignment):
        raise LabError(f"general.alignment is {_show(str(told))} and the argument alignment {alignment}; give one")
    if not isinstance(alignment, int) or not 0 < alignment <= _ALIGNMENT_LIMIT or alignment & (alignment - 1):
        raise LabError(f"alignment {_show(str(alignment))} is not a power of two up to {_ALIGNMENT_LIMIT}; use 32")
    if alignment != ALIGNMENT:
        metadata["general.alignment"] = ("uint32", alignment)
    plans: dict[str, tuple[TensorInfo, Data]] = {}
    infos, length = [], 0
    for name, shape, kind, data in tensors:
        plan = _plan(name, shape, kind, length)
        if name in plans:
            raise LabError(f"two tensors have the name {_show(name)}; give each its own")
        plans[name] = plan, data
        infos.append(_encode_tensor(plan))
        length += align(plan.bytes, alignment)
    pairs = [_encode_pair(key, value) for key, value in metadata.items()]
    header = MAGIC + struct.pack("<IQQ", VERSION, len(plans), len(pairs)) + b"".join(pairs) + b"".join(infos)
    header += bytes(-len(header) % alignment if plans else 0)
    _write_whole(target, _chunks(header, plans.values(), alignment), len(header) + length)


def _plan(name: str, shape: Sequence[int], kind: str, offset: int) -> TensorInfo:
    """Where a tensor will lie, `offset` from the start of the data. Raises LabError for one that cannot be written."""
    if not isinstance(name, str) or not 0 < len(_utf8(name, "a tensor name")) <= _WRITTEN_NAME_LIMIT:
        raise LabError(f"tensor name {_show(str(name))} is not 1 to {_WRITTEN_NAME_LIMIT} bytes of text; rename it")
    layout = FORMATS.get(kind) if isinstance(kind, str) else None
    if layout is None or layout.id is None:
        raise LabError(f"tensor {_show(name)} has type {_show(str(kind))}, which GGUF does not have; "
                       f"choose one of {', '.join(layout.name for layout in BY_ID.values())}")
    try:
        shape = tuple(map(index, shape))
    except TypeError:
        raise LabError(f"tensor {_show(name)} has shape {_show(str(shape))}; give whole numbers") from None
    if not 1 <= len(shape) <= _DIMENSIONS_LIMIT:
        raise LabError(f"tensor {_show(name)} has {len(shape)} dimensions, GGUF has 1 to {_DIMENSIONS_LIMIT}")
    try:
        return TensorInfo(name, shape, kind, offset, _tensor_bytes(shape, kind))
    except LabError as error:
        raise LabError(f"tensor {_show(name)} {error}; choose another type or shape") from None


def _encode_tensor(plan: TensorInfo) -> bytes:
    dimensions = len(plan.shape)
    return _encode_text(plan.name, "a tensor name") + struct.pack(
        f"<I{dimensions}QIQ", dimensions, *plan.shape, FORMATS[plan.type].id, plan.offset)


def _encode_pair(key: str, value: Any) -> bytes:
    """One key with its value, typed or plain."""
    if not isinstance(key, str) or not 0 < len(_utf8(key, "a key")) <= _KEY_LIMIT:
        raise LabError(f"metadata key {_show(str(key))} is not 1 to {_KEY_LIMIT} bytes of text")
    what = f"metadata {_show(key)}"
    head = _encode_text(key, what)
    if isinstance(value, Array):
        kind, count, items = value.type, value.count, b"".join(value.raw())
    else:
        kind, value = _typed(value, what)
        if not kind.startswith("array:"):
            return head + _U32.pack(_TYPES.index(kind)) + _encode(kind, (value,), what)
        kind = kind.removeprefix("array:")
        count, items = len(value), _encode(kind, value, what)
    return head + struct.pack("<IIQ", _TYPES.index("array"), _TYPES.index(kind), count) + items


def _typed(value: Any, what: str) -> tuple[str, Any]:
    """A metadata value with its type, given or found. Raises LabError where it has none."""
    kind = None
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and _is_type(value[0]):
        kind, value = value
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy's scalars and arrays
    several = isinstance(value, list | tuple | range)
    if kind is None:
        if several and not value:
            raise LabError(f"{what} is an empty list, which has no type; give one, as in ('array:string', [])")
        kind = "array:" + _type_of(value, what) if several else _type_of([value], what)
    if kind.startswith("array:") != several:
        raise LabError(f"{what} is {_show(repr(value))}, which is not {'a list' if not several else 'one ' + kind}")
    return kind, value


def _is_type(kind: str) -> bool:
    kind = kind.removeprefix("array:")
    return kind in _CODES or kind == "string"


def _type_of(values: Sequence, what: str) -> str:
    """The one type that holds all `values`."""
    if all(isinstance(value, str) for value in values):
        return "string"
    if all(isinstance(value, bool) for value in values):
        return "bool"
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return "int64" if min(values) < 0 else "uint32" if max(values) < 2**32 else "uint64"
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return "float32"
    raise LabError(f"{what} is {_show(repr(values[0] if len(values) == 1 else values))}, which GGUF cannot store; "
                   "give numbers, texts, booleans, or a list of one of these")


def _encode(kind: str, values: Sequence, what: str) -> bytes:
    """Values of one type, one after the other. Raises LabError where one does not fit."""
    if kind == "string":
        return b"".join(_encode_text(value, what) for value in values)
    try:
        return struct.pack(f"<{len(values)}{_CODES[kind]}", *values)
    except (struct.error, OverflowError, TypeError) as error:
        raise LabError(f"{what} does not fit in {kind}: {error}; choose another type") from None


def _encode_text(text: Any, what: str) -> bytes:
    data = _utf8(text, what)
    return _U64.pack(len(data)) + data


def _utf8(text: Any, what: str) -> bytes:
    try:
        return text.encode()
    except (AttributeError, UnicodeEncodeError):
        raise LabError(f"{what} is not text that UTF-8 can store: {_show(repr(text))}") from None


def _chunks(header: bytes, plans: Iterable[tuple[TensorInfo, Data]], alignment: int) -> Iterator[Any]:
    """All bytes of the file in order. Raises LabError for a tensor whose data is not as long as its shape says."""
    yield header
    for plan, data in plans:
        written = 0
        for part in _views(data() if callable(data) else data, plan.name):
            written += part.nbytes
            if written > plan.bytes:
                break
            yield part
        if written != plan.bytes:
            raise LabError(f"tensor {_show(plan.name)} as {plan.type} {plan.shape} has {plan.bytes} bytes, and "
                           f"{'more' if written > plan.bytes else written} were given; check its shape and type")
        yield bytes(-plan.bytes % alignment)


def _views(data: Any, name: str) -> Iterator[memoryview]:
    """Bytes-like data, or chunks of it, as flat views of bytes."""
    try:
        parts: Iterable = (memoryview(data),)
    except TypeError:
        parts = data if isinstance(data, Iterable) else (data,)
    for part in parts:
        try:
            view = memoryview(part)
            if view.nbytes:  # an empty view cannot be cast
                yield view.cast("B")
        except TypeError as error:
            raise LabError(f"tensor {_show(name)} was given {type(part).__name__} ({error}); "
                           "give bytes or a contiguous array") from None


def _write_whole(target: str, chunks: Iterable[Any], total: int) -> None:
    """Write `chunks` to a temporary file beside `target`, flush it to the disk, then give it the name `target`."""
    import shutil

    folder, name = os.path.split(target)
    if os.path.exists(target) and not os.path.isfile(target):
        raise LabError(f"{_show_path(target)} is not a regular file; give the path of a file to write")
    if not os.path.isdir(folder):
        raise LabError(f"{_show_path(folder)} is not a folder; make it first")
    free = shutil.disk_usage(folder).free
    if total > free:
        raise LabError(f"{_show_path(target)} needs {format_bytes(total)} and its disk has {format_bytes(free)} free; "
                       "free some space or write elsewhere")
    part = os.path.join(folder, f".{name[:100]}.{os.urandom(6).hex()}.part")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        handle = _system(target, os.open, part, flags, 0o666)
        try:
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    view = view[_system(target, os.write, handle, view) :]
            _system(target, os.fsync, handle)
        finally:
            os.close(handle)
        _system(target, os.replace, part, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(part)
        raise


def _system(target: str, call: Callable, *arguments: Any) -> Any:
    """A call of the operating system on behalf of writing `target`; its errors as one line."""
    try:
        return call(*arguments)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        remedy = "free some space or write elsewhere" if full else "check the folder and its permissions"
        raise LabError(f"{_show_path(target)} cannot be written ({error.strerror}); {remedy}") from None
