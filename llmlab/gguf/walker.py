"""A walk through a header by one small window of bytes: every length is checked before anything is allocated."""

import struct
from typing import Any, Protocol

from ..errors import BadFile
from ..units import MIB, format_bytes
from .layout import CODES, TYPES, U32, U64
from .local import LocalFile
from .words import show, show_path

# Far above every published model (its largest header is some 20 MiB, its longest vocabulary under a million strings),
# and low enough that the worst header costs a second or two and some hundred MiB.
_HEADER_LIMIT = 256 * MIB
_HELD_LIMIT = 32 * MIB  # keys, names, strings and held items of one header, each with 64 bytes for its object
_WALKED_LIMIT = 8_000_000  # items of long arrays; one of arrays counts 16, being slower to walk
_STRING_LIMIT, _DEPTH_LIMIT = 4 * MIB, 4
_FIRST_BLOCK, LAST_BLOCK = 1 * MIB, 8 * MIB  # a remote file is asked for more each time: fewer round trips
_SCALARS = {name: struct.Struct("<" + code) for name, code in CODES.items()}


class Reader(Protocol):
    """What `read_header` reads from: a local file, a remote one by range requests, bytes in a test."""

    name: str
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; never asked for bytes past `size`."""


class Walker:
    """Walks through a header by one window of bytes that moves forward; counts what it holds and walks over."""

    def __init__(self, reader: Reader, start: int = 0, held_limit: float = _HELD_LIMIT):
        self.reader, self.size = reader, reader.size
        self.pos = self.base = start  # where we are, and where the window begins, from the start of the file
        self.window = b""
        self.block = _FIRST_BLOCK
        self.what, self.name = "its header", ""  # what is being read, for messages
        self.held, self.held_limit, self.walked = 0, held_limit, 0

    @property
    def where(self) -> str:
        return f"{self.what} {show(self.name)}" if self.name else self.what

    def fail(self, problem: str) -> BadFile:
        return BadFile(f"{show_path(self.reader.name)} {problem}")

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
            if not isinstance(self.reader, LocalFile):
                self.block = min(self.block * 2, LAST_BLOCK)
        return here

    def numbers(self, code: struct.Struct) -> tuple:
        here = self.need(code.size)
        self.pos += code.size
        return code.unpack_from(self.window, here)

    def number(self, code: struct.Struct) -> Any:
        return self.numbers(code)[0]

    def text(self, limit: int = _STRING_LIMIT) -> str:
        length = self.number(U64)
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
        number = self.number(U32)
        if number >= len(TYPES):
            raise self.damaged(f"{self.where} has value type {number}, which GGUF does not have")
        return TYPES[number]

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
        values = struct.unpack_from(f"<{count}{CODES[kind]}", self.window, here)
        return tuple(value != 0 for value in values) if kind == "bool" else values

    def array(self) -> tuple[str, int]:
        """The type and count at the head of an array, the count possible in what is left of the file."""
        kind, count = self.kind(), self.number(U64)
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
        unpack = U64.unpack_from
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
