"""Where a model's pieces lie on disk: in the GGUF itself, or in a store written from it once, where one read moves a piece.

A store is one file: a page that says what it is, each piece's blob on whole pages, then an index (JSON), and at the very end
where the index begins. Each blob and the index have a checksum; the index says which GGUF it was made of. The file appears
whole or not at all.
"""

import glob
import hashlib
import json
import os
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import places
from ..errors import BadFile, LabError
from ..gguf import GGUFFile
from ..gguf.local import LocalFile
from ..gguf.words import show, show_path
from ..gguf.writing import write_whole
from ..units import MIB, align
from .pieces import PAGE, Extent, Piece, Tensor, pieces_of

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None

MAGIC = b"llmlab store 1\n".ljust(PAGE, b"\0")        # the whole first page
LINE = 64               # bytes: tensors lie against the lines of a processor's cache as they do in the GGUF
BLOCK = 8 * MIB         # bytes read, summed and written at once
_END = struct.Struct("<QQI8s")        # offset, bytes and checksum of the index; a mark
_MARK = b"llmstore"
_OLD = 24 * 3600        # seconds after which nobody still writes a file, where the system has no locks to tell

Progress = Callable[[float, str], None]         # share done, what is being done


class Part(NamedTuple):
    """A tensor of a piece that is to be written (a plain tuple will do).

    about: what the index is to say of it, as JSON has it: its "type" and "shape" where it has them, which `Tensor` has by name,
    and what else is wanted. data: bytes-like, or a callable that returns bytes-like or an iterator of chunks, called when its
    turn comes. lean: its offset in the piece will be this modulo 64.
    """

    name: str
    about: dict[str, Any]
    data: Any
    lean: int = 0


Pieces = Iterable[tuple[str, Iterable[tuple]]]          # name, and a `Part` for each tensor


@dataclass(frozen=True)
class Store:
    """pieces: by name, in the order a pass uses them. files: that their extents are numbers of. layout: "gguf", the GGUF's own
    bytes, or another's name."""

    pieces: dict[str, Piece]
    files: tuple[LocalFile, ...]
    layout: str = "gguf"

    @property
    def path(self) -> Path:
        """Its file; the first of several."""
        return Path(self.files[0].name)

    @property
    def bytes(self) -> int:
        """Of its files."""
        return sum(file.size for file in self.files)

    def check(self) -> None:
        """Raises BadFile where a file is gone, or is not as it was when it was opened."""
        for file in self.files:
            if LocalFile.look(file.name) != file:
                raise file._changed()

    def verify(self, progress: Progress | None = None) -> None:
        """Read every piece and hold it against its checksum. Raises BadFile naming the pieces that are damaged, and LabError
        for a GGUF in place, which has no checksums."""
        if any(piece.checksum is None for piece in self.pieces.values()):
            raise LabError(f"{show_path(str(self.path))} is read in place and has no checksums; write a store to have some")
        damaged, done, total = [], 0, sum(piece.bytes for piece in self.pieces.values())
        for name, piece in self.pieces.items():
            found = 0
            for extent in piece.extents:
                for start in range(0, extent.bytes, BLOCK):
                    size = min(BLOCK, extent.bytes - start)
                    found = zlib.crc32(self.files[extent.file].read(extent.offset + start, size), found)
                    done += size
                    if progress:
                        progress(done / total, name)
            if found != piece.checksum:
                damaged.append(name)
        if damaged:
            raise BadFile(damage(self.files[0], damaged))


def damage(file: LocalFile, pieces: list[str]) -> str:
    """What is said of a store whose pieces do not have their checksums."""
    said = ", ".join(map(show, pieces[:3])) + (f" and {len(pieces) - 3} more do" if len(pieces) > 3 else
                                               " do" if len(pieces) > 1 else " does")
    return (f"{show_path(file.name)} is damaged: {said} not have the bytes that were written; delete it, and it will be "
            "written again")


def in_place(file: GGUFFile) -> Store:
    """A GGUF on this computer as it lies. Raises BadFile for one that is not, or that holds no layers."""
    if not file.sources:
        raise BadFile(f"{show_path(file.paths[0])} is not a local file; download it to run it")
    pieces = pieces_of(file)
    if not pieces:
        raise BadFile(f"{show_path(file.paths[0])} has no layers to offload; give a model's .gguf file")
    return Store(pieces, file.sources)


def folder_of(folder: str | os.PathLike | None = None) -> Path:
    """Where stores lie: `folder`, or llmlab's cache."""
    return places.cache() / "stores" if folder is None else Path(folder).expanduser()


def path_of(file: GGUFFile, folder: str | os.PathLike | None = None, layout: str = "gguf") -> Path:
    """Where `write_store` puts the store of a GGUF: in `folder`, or llmlab's cache; one a file and layout, so that the store of
    a GGUF that was changed since takes the place of the old one."""
    path = os.path.realpath(file.paths[0])
    stem = re.sub(r"[^\w.+-]+", "_", os.path.basename(path).removesuffix(".gguf"))[:60]
    return folder_of(folder) / f"{stem}.{hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()}.{layout}.store"


def write_store(file: GGUFFile, folder: str | os.PathLike | None = None, layout: str = "gguf", progress: Progress | None = None,
                pieces: Pieces | None = None, total: int | None = None) -> Store:
    """Write the store of a GGUF to `path_of(file, folder, layout)`, whole or not at all, in place of one that was there.

    `pieces`, of another layout than "gguf", yields (name, parts) in the order a pass uses them, and each is let go of before
    the next is asked for. total: bytes they take (the file's own, if not given), as the free space is looked at first. Of
    layouts whose names differ after the last "-" alone, the others' stores go. What a killed process left in the folder goes
    first. `progress(share, text)` may raise to stop it; that, and what `pieces` raises, passes through. Raises BadFile for a
    GGUF that is not local, or changes meanwhile; LabError where there is no room, or no right to write. Then nothing is left.
    """
    if pieces is None:
        if layout != "gguf":
            raise LabError(f"the layout {show(layout)} has pieces of its own; give them")
        plain = in_place(file)
        pieces, total = _parts(file, plain), sum(_packed(piece, file) for piece in plain.pieces.values())
    total = file.file_bytes if total is None else total
    target = path_of(file, folder, layout)
    index = {"layout": layout, "origin": _origin(file), "sources": _sources(file)}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"{show_path(str(target.parent))} cannot be made ({error.strerror or error}); give another folder, or "
                       "set LLMLAB_CACHE to one that can be written") from None
    with _alone(target.parent, progress) as alone:
        _sweep(target.parent, alone)
        write_whole(os.path.realpath(target), _chunks(pieces, index, total, progress), PAGE + total)
        if "-" in layout:
            for other in target.parent.glob(glob.escape(path_of(file, folder, layout.rpartition("-")[0]).stem) + "-*.store"):
                if other != target:
                    with suppress(OSError):     # on Windows, while a program reads it
                        other.unlink()
    return open_store(target, file, layout)


def open_store(path: str | os.PathLike, file: GGUFFile, layout: str | None = None) -> Store:
    """A store that `write_store` wrote of this GGUF. Raises BadFile for anything else: none there, one that is truncated or
    whose index is damaged (`Store.verify` looks at the pieces), made of another file or of the file as it was before it
    changed, or of another layout where one is given."""
    shown, again = show_path(os.fsdecode(path)), "write the store again"
    source, index = read_index(path)
    if index["origin"] != _origin(file):
        raise BadFile(f"{shown} was made of another file than {show_path(file.paths[0])}, or of that one before it changed; "
                      f"{again}")
    if layout not in (None, index["layout"]):
        raise BadFile(f"{shown} is of the layout {show(index['layout'])}, not {show(layout)}; {again}")
    pieces = {name: Piece(name, length, tuple(_tensor(*entry) for entry in tensors), (Extent(0, start, length, 0),),
                          checksum)
              for name, start, length, checksum, tensors in index["pieces"]}
    return Store(pieces, (source,), index["layout"])


def read_index(path: str | os.PathLike) -> tuple[LocalFile, dict[str, Any]]:
    """The file of a store, and what its index says. Raises BadFile for what is no store, is truncated, or whose index is
    damaged."""
    shown, again = show_path(os.fsdecode(path)), "write the store again"
    if not os.path.exists(path):
        raise BadFile(f"{shown} does not exist; write the store first")
    source = LocalFile.look(path)
    if source.size < PAGE + _END.size or source.read(0, PAGE) != MAGIC:
        raise BadFile(f"{shown} is no store of this version of llmlab; {again}")
    offset, size, checksum, mark = _END.unpack(source.read(source.size - _END.size, _END.size))
    if mark != _MARK or offset % PAGE or offset + size + _END.size != source.size:
        raise BadFile(f"{shown} is not whole; {again}")
    text = source.read(offset, size)
    if zlib.crc32(text) != checksum:
        raise BadFile(f"{shown} is damaged: its index does not have the bytes that were written; {again}")
    return source, json.loads(text)


def _tensor(name: str, offset: int, bytes: int, about: dict[str, Any]) -> Tensor:
    return Tensor(name, about.pop("type", ""), tuple(about.pop("shape", ())), offset, bytes, about)


def kept_store(file: GGUFFile, folder: str | os.PathLike | None = None, layout: str = "gguf", progress: Progress | None = None,
               pieces: Pieces | None = None, total: int | None = None) -> Store:
    """The store that is there, else one written now: arguments and errors are `write_store`'s. `pieces` is gone through only if
    one is written."""
    try:
        return open_store(path_of(file, folder, layout), file, layout)
    except BadFile:
        return write_store(file, folder, layout, progress, pieces, total)


# ---- what is written ----------------------------------------------------------------------------------------

def _origin(file: GGUFFile) -> list[dict[str, Any]]:
    """What tells a GGUF from another, and from itself once it was written to: of each of its files."""
    if not file.sources:
        raise BadFile(f"{show_path(file.paths[0])} is not a local file; download it to run it")
    ends = [source.size for source in file.sources]
    for tensor in file.tensors.values():
        ends[tensor.shard] = min(ends[tensor.shard], tensor.offset)
    return [{"bytes": source.size, "changed_ns": source.stamp[1],
             "header": hashlib.blake2b(source.read(0, end), digest_size=16).hexdigest()}
            for source, end in zip(file.sources, ends, strict=True)]


def _sources(file: GGUFFile) -> list[dict[str, Any]]:
    """Where the files of a GGUF lie: on which disk, as long as the system calls it so."""
    paths = [os.path.realpath(source.name) for source in file.sources]
    return [{"path": path, "disk": os.stat(path).st_dev} for path in paths]


def _parts(file: GGUFFile, plain: Store) -> Iterator[tuple[str, list[Part]]]:
    """The pieces of a GGUF, read by blocks as they are written: a map would count as memory, and fall with a file cut short."""
    for name, piece in plain.pieces.items():
        parts = []
        for tensor in piece.tensors:
            extent, offset = _place(piece, tensor)
            source = file.sources[extent.file]
            parts.append(Part(tensor.name, {"type": tensor.type, "shape": tensor.shape},
                              partial(_blocks, source, offset, offset + tensor.bytes), offset % LINE))
        yield name, parts


def _blocks(source: LocalFile, start: int, end: int) -> Iterator[bytes]:
    return (source.read(at, min(BLOCK, end - at)) for at in range(start, end, BLOCK))


def _place(piece: Piece, tensor: Tensor) -> tuple[Extent, int]:
    """The extent that holds a tensor, and its offset in that file."""
    extent = max((extent for extent in piece.extents if extent.at <= tensor.offset), key=lambda extent: extent.at)
    return extent, extent.offset + tensor.offset - extent.at


def _packed(piece: Piece, file: GGUFFile) -> int:
    """Bytes of its blob in a store."""
    end = 0
    for tensor in piece.tensors:
        end = _begin(end, _place(piece, tensor)[1] % LINE) + tensor.bytes
    return align(end, PAGE)


def _begin(end: int, lean: int) -> int:
    """Where a tensor begins that comes after `end`."""
    return end + (lean - end) % LINE


def _chunks(pieces: Iterable[tuple[str, Iterable[Part]]], index: dict, total: int, progress: Progress | None) -> Iterator[Any]:
    """All bytes of a store's file in order."""
    yield MAGIC
    start, entries = PAGE, []
    for name, parts in pieces:
        end = checksum = 0
        tensors, part, view = [], None, None
        for part in (Part(*part) for part in parts):
            at = _begin(end, part.lean)
            checksum = zlib.crc32(pad := bytes(at - end), checksum)
            yield pad
            end = at
            for view in _views(part.data):
                checksum, end = zlib.crc32(view, checksum), end + view.nbytes
                yield view
                if progress:
                    progress(min(1.0, (start + end) / max(1, PAGE + total)), name)
            tensors.append((part.name, at, end - at, part.about))
        pad = bytes(-end % PAGE)
        entries.append((name, start, end + len(pad), zlib.crc32(pad, checksum), tensors))
        yield pad
        start += end + len(pad)
        del parts, part, view       # before the next piece is made: two would be in memory
    text = json.dumps({**index, "pieces": entries}).encode()
    yield text
    yield _END.pack(start, len(text), zlib.crc32(text), _MARK)
    if progress:
        progress(1.0, "flushing to the disk")


def _views(data: Any) -> Iterator[memoryview]:
    """Bytes-like data, or chunks of it, by blocks."""
    data = data() if callable(data) else data
    try:
        whole = [memoryview(data)]
    except TypeError:
        whole = map(memoryview, data)
    for view in whole:
        if view.nbytes:         # an empty view cannot be cast
            flat = view.cast("B")
            for start in range(0, len(flat), BLOCK):
                yield flat[start:start + BLOCK]


# ---- what others do in the folder ---------------------------------------------------------------------------

@contextmanager
def _alone(folder: Path, progress: Progress | None) -> Iterator[bool]:
    """One writer at a time in a folder: waits for another's end, which its death is too. False where there are no locks."""
    if fcntl is None:
        yield False
        return
    try:
        handle = os.open(folder, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError:         # a folder that may be written and not read
        yield False
        return
    try:
        held = False
        while not held:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if progress:
                    progress(0.0, f"waiting for another program that writes a store in {show_path(str(folder))}")
                time.sleep(0.1)
            except OSError:         # some network file systems
                break
        yield held
    finally:
        os.close(handle)


def _sweep(folder: Path, alone: bool) -> None:
    """Remove what a killed process left. A file that another program writes cannot be removed on Windows."""
    for left in folder.glob(".*.store.*.part"):
        with suppress(OSError):
            if alone or fcntl is None or time.time() - left.stat().st_mtime > _OLD:
                left.unlink()
