"""Writing a GGUF file (version 3), whole or not at all."""

import errno
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from operator import index
from typing import Any

from ..errors import LabError
from ..formats import BY_ID, FORMATS
from ..units import align, format_bytes
from .contents import Array
from .layout import ALIGNMENT, ALIGNMENT_LIMIT, CODES, DIMENSIONS_LIMIT, KEY_LIMIT, MAGIC, TYPES, TensorInfo, tensor_bytes
from .words import show, show_path

_VERSION, _NAME_LIMIT = 3, 63  # ggml keeps 64 bytes for a name and its terminator

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
        raise LabError(f"{show(str(path))} is not a path; give the path of the file to write") from None
    header, plans, length, alignment = _laid_out(metadata, tensors, alignment)
    write_whole(target, _chunks(header, plans, alignment), len(header) + length)


def gguf_bytes(metadata: Mapping[str, Any], tensors: Iterable[tuple[str, Sequence[int], str]],
               alignment: int | None = None) -> int:
    """How long the file is that `write_gguf` writes of the same, to the byte: `tensors` without their data. Raises as it does
    for what cannot be written."""
    header, _, length, _ = _laid_out(metadata, ((*tensor, b"") for tensor in tensors), alignment)
    return len(header) + length


def _laid_out(metadata: Mapping[str, Any], tensors: Iterable[tuple[str, Sequence[int], str, Data]],
              alignment: int | None) -> tuple[bytes, list[tuple[TensorInfo, Data]], int, int]:
    """The header, each tensor's place and data, bytes of all data, the alignment."""
    metadata = dict(metadata)
    told = metadata.pop("general.alignment", None)
    told = told[1] if isinstance(told, tuple) else told
    alignment = told or ALIGNMENT if alignment is None else alignment
    if told not in (None, alignment):
        raise LabError(f"general.alignment is {show(str(told))} and the argument alignment {alignment}; give one")
    if not isinstance(alignment, int) or not 0 < alignment <= ALIGNMENT_LIMIT or alignment & (alignment - 1):
        raise LabError(f"alignment {show(str(alignment))} is not a power of two up to {ALIGNMENT_LIMIT}; use 32")
    if alignment != ALIGNMENT:
        metadata["general.alignment"] = ("uint32", alignment)
    plans: dict[str, tuple[TensorInfo, Data]] = {}
    infos, length = [], 0
    for name, shape, kind, data in tensors:
        plan = _plan(name, shape, kind, length)
        if name in plans:
            raise LabError(f"two tensors have the name {show(name)}; give each its own")
        plans[name] = plan, data
        infos.append(_encode_tensor(plan))
        length += align(plan.bytes, alignment)
    pairs = [_encode_pair(key, value) for key, value in metadata.items()]
    header = MAGIC + struct.pack("<IQQ", _VERSION, len(plans), len(pairs)) + b"".join(pairs) + b"".join(infos)
    header += bytes(-len(header) % alignment if plans else 0)
    return header, list(plans.values()), length, alignment


def _plan(name: str, shape: Sequence[int], kind: str, offset: int) -> TensorInfo:
    """Where a tensor will lie, `offset` from the start of the data. Raises LabError for one that cannot be written."""
    if not isinstance(name, str) or not 0 < len(_utf8(name, "a tensor name")) <= _NAME_LIMIT:
        raise LabError(f"tensor name {show(str(name))} is not 1 to {_NAME_LIMIT} bytes of text; rename it")
    layout = FORMATS.get(kind) if isinstance(kind, str) else None
    if layout is None or layout.id is None:
        raise LabError(f"tensor {show(name)} has type {show(str(kind))}, which GGUF does not have; "
                       f"choose one of {', '.join(layout.name for layout in BY_ID.values())}")
    try:
        shape = tuple(map(index, shape))
    except TypeError:
        raise LabError(f"tensor {show(name)} has shape {show(str(shape))}; give whole numbers") from None
    if not 1 <= len(shape) <= DIMENSIONS_LIMIT:
        raise LabError(f"tensor {show(name)} has {len(shape)} dimensions, GGUF has 1 to {DIMENSIONS_LIMIT}")
    try:
        return TensorInfo(name, shape, kind, offset, tensor_bytes(shape, kind))
    except LabError as error:
        raise LabError(f"tensor {show(name)} {error}; choose another type or shape") from None


def _encode_tensor(plan: TensorInfo) -> bytes:
    dimensions = len(plan.shape)
    return _encode_text(plan.name, "a tensor name") + struct.pack(
        f"<I{dimensions}QIQ", dimensions, *plan.shape, FORMATS[plan.type].id, plan.offset)


def _encode_pair(key: str, value: Any) -> bytes:
    """One key with its value, typed or plain."""
    if not isinstance(key, str) or not 0 < len(_utf8(key, "a key")) <= KEY_LIMIT:
        raise LabError(f"metadata key {show(str(key))} is not 1 to {KEY_LIMIT} bytes of text")
    what = f"metadata {show(key)}"
    head = _encode_text(key, what)
    if isinstance(value, Array):
        kind, count, items = value.type, value.count, b"".join(value.raw())
    else:
        kind, value = _typed(value, what)
        if not kind.startswith("array:"):
            return head + struct.pack("<I", TYPES.index(kind)) + _encode(kind, (value,), what)
        kind = kind.removeprefix("array:")
        count, items = len(value), _encode(kind, value, what)
    return head + struct.pack("<IIQ", TYPES.index("array"), TYPES.index(kind), count) + items


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
        raise LabError(f"{what} is {show(repr(value))}, which is not {'a list' if not several else 'one ' + kind}")
    return kind, value


def _is_type(kind: str) -> bool:
    kind = kind.removeprefix("array:")
    return kind in CODES or kind == "string"


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
    raise LabError(f"{what} is {show(repr(values[0] if len(values) == 1 else values))}, which GGUF cannot store; "
                   "give numbers, texts, booleans, or a list of one of these")


def _encode(kind: str, values: Sequence, what: str) -> bytes:
    """Values of one type, one after the other. Raises LabError where one does not fit."""
    if kind == "string":
        return b"".join(_encode_text(value, what) for value in values)
    try:
        return struct.pack(f"<{len(values)}{CODES[kind]}", *values)
    except (struct.error, OverflowError, TypeError) as error:
        raise LabError(f"{what} does not fit in {kind}: {error}; choose another type") from None


def _encode_text(text: Any, what: str) -> bytes:
    data = _utf8(text, what)
    return struct.pack("<Q", len(data)) + data


def _utf8(text: Any, what: str) -> bytes:
    try:
        return text.encode()
    except (AttributeError, UnicodeEncodeError):
        raise LabError(f"{what} is not text that UTF-8 can store: {show(repr(text))}") from None


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
            raise LabError(f"tensor {show(plan.name)} as {plan.type} {plan.shape} has {plan.bytes} bytes, and "
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
            raise LabError(f"tensor {show(name)} was given {type(part).__name__} ({error}); "
                           "give bytes or a contiguous array") from None


def write_whole(target: str, chunks: Iterable[Any], total: int) -> None:
    """Write `chunks` to a temporary file beside `target`, flush it to the disk, then give it the name `target`."""
    import shutil

    folder, name = os.path.split(target)
    if os.path.exists(target) and not os.path.isfile(target):
        raise LabError(f"{show_path(target)} is not a regular file; give the path of a file to write")
    if not os.path.isdir(folder):
        raise LabError(f"{show_path(folder)} is not a folder; make it first")
    free = shutil.disk_usage(folder).free
    if total > free:
        raise LabError(f"{show_path(target)} needs {format_bytes(total)} and its disk has {format_bytes(free)} free; "
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
        raise LabError(f"{show_path(target)} cannot be written ({error.strerror}); {remedy}") from None
