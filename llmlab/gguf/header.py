"""From the first bytes of a file to a GGUFFile: start, metadata, tensor entries, each held against the file's size."""

import struct
from typing import Any

from ..errors import LabError
from ..formats import BY_ID
from ..units import align
from .contents import Array, GGUFFile
from .layout import ALIGNMENT, ALIGNMENT_LIMIT, DIMENSIONS_LIMIT, KEY_LIMIT, MAGIC, U32, U64, TensorInfo, tensor_bytes
from .local import LocalFile
from .walker import Reader, Walker
from .words import show

HELD_ITEMS = 4096  # an array up to this long is held as a tuple; a longer one becomes an Array

_NAME_LIMIT, _KEYS_LIMIT, _TENSORS_LIMIT = 1024, 2**16, 2**18  # far above every published model
_KEY_BYTES, _TENSOR_BYTES = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8  # the least that one entry takes
_ENTRIES = [struct.Struct(f"<{dimensions}QIQ") for dimensions in range(DIMENSIONS_LIMIT + 1)]  # shape, type, offset


def read_header(reader: Reader) -> GGUFFile:
    """The header of one file (one shard), asking `reader` for growing blocks from the start, never past its size.

    Raises BadFile, in one line that names the file and the remedy, for whatever cannot be used.
    """
    walk = Walker(reader)
    version, tensor_count, key_count = _read_start(walk)
    metadata, types = _read_metadata(walk, key_count)
    alignment = _alignment(walk, metadata, types)
    entries = [_read_tensor(walk) for _ in range(tensor_count)]
    data = align(walk.pos, alignment) if entries else walk.pos
    tensors = _place(walk, entries, data, alignment)
    source = (reader,) if isinstance(reader, LocalFile) else ()
    return GGUFFile((reader.name,), version, alignment, metadata, tensors, data, reader.size, types, source)


def _read_start(walk: Walker) -> tuple[int, int, int]:
    """Magic, version and counts -> version, number of tensors, number of keys."""
    if walk.size == 0:
        raise walk.fail("is empty; download it again")
    walk.need(min(16, walk.size))
    if not walk.window.startswith(MAGIC):
        raise walk.fail(_not_gguf(walk.window[:16]))
    walk.pos = len(MAGIC)
    version = walk.number(U32)
    if version & 0xFFFF == 0 and version:
        raise walk.fail("is a big-endian GGUF file, and llmlab reads little-endian ones; "
                        "download the little-endian file or convert it with gguf-py's gguf-convert-endian")
    if version not in (2, 3):
        raise walk.fail(f"is GGUF version {version}, and llmlab reads versions 2 and 3; "
                        + ("update llmlab" if 3 < version < 100 else "download it again or convert the model again"))
    tensors, keys = walk.number(U64), walk.number(U64)
    for count, least, limit, what in ((tensors, _TENSOR_BYTES, _TENSORS_LIMIT, "tensors"),
                                      (keys, _KEY_BYTES, _KEYS_LIMIT, "keys")):
        if count > limit:
            raise walk.damaged(f"it claims {count} {what}, the most is {limit}")
        if count * least > walk.size - walk.pos:
            raise walk.fail(f"is truncated or damaged: it claims {count} {what}, which need at least "
                            f"{count * least} bytes, the file has {walk.size}; download it again")
    return version, tensors, keys


def _read_metadata(walk: Walker, count: int) -> tuple[dict[str, Any], dict[str, str]]:
    metadata: dict[str, Any] = {}
    types: dict[str, str] = {}
    for number in range(count):
        walk.what, walk.name = f"key {number + 1} of {count}", ""
        key = walk.text(KEY_LIMIT)
        if not key:
            raise walk.damaged(f"{walk.where} has no name")
        if key in metadata:
            raise walk.damaged(f"key {show(key)} appears twice")
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
        source = walk.reader if isinstance(walk.reader, LocalFile) else None
        metadata[key] = Array(kind, items, start, walk.pos - start, source)
    _check_metadata(walk, metadata, types)
    return metadata, types


def _check_metadata(walk: Walker, metadata: dict, types: dict) -> None:
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


def _alignment(walk: Walker, metadata: dict, types: dict) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if types.get("general.alignment", "uint32") != "uint32":
        raise walk.damaged(f"general.alignment is of type {types['general.alignment']}, not uint32")
    if not 0 < alignment <= ALIGNMENT_LIMIT or alignment & (alignment - 1):
        raise walk.damaged(f"general.alignment is {alignment}, not a power of two up to {ALIGNMENT_LIMIT}")
    return alignment


def _read_tensor(walk: Walker) -> tuple[str, tuple[int, ...], str, int, int]:
    """One tensor's entry -> name, shape, type, offset within the data, bytes."""
    walk.what, walk.name = "the list of tensors", ""
    name = walk.text(_NAME_LIMIT)
    walk.what, walk.name = "tensor", name
    if not name:
        raise walk.damaged("a tensor has no name")
    dimensions = walk.number(U32)
    if not 1 <= dimensions <= DIMENSIONS_LIMIT:
        raise walk.damaged(f"{walk.where} has {dimensions} dimensions, GGUF has 1 to {DIMENSIONS_LIMIT}")
    *shape, number, offset = walk.numbers(_ENTRIES[dimensions])
    kind = BY_ID.get(number)
    if kind is None:
        raise walk.fail(f"has {walk.where} of type number {number}, which llmlab does not know; update llmlab, "
                        "or download a file made by a current llama.cpp")
    try:
        return name, tuple(shape), kind.name, offset, tensor_bytes(shape, kind.name)
    except LabError as error:
        raise walk.damaged(f"{walk.where} {error}") from None


def _place(walk: Walker, entries: list, data: int, alignment: int) -> dict[str, TensorInfo]:
    """Entries with offsets from `data` -> TensorInfo by name; none outside the file, none over another."""
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset, size in entries:
        if name in tensors:
            raise walk.damaged(f"tensor {show(name)} appears twice")
        if offset % alignment:
            raise walk.damaged(f"tensor {show(name)} begins at {offset}, not a multiple of the alignment {alignment}")
        if data + offset + size > walk.size:
            raise walk.fail(f"is truncated: tensor {show(name)} ends at byte {data + offset + size}, "
                            f"the file has {walk.size}; download it again")
        tensors[name] = TensorInfo(name, shape, kind, data + offset, size)
    end, before = data, None
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise walk.damaged(f"tensors {show(before.name)} and {show(tensor.name)} overlap at byte {tensor.offset}")
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
