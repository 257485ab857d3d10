"""Safetensors files with coded exponents: the same container, a fifth to a third smaller, and back to the same bytes.

In a coded file each tensor that is worth it is uint8, holding what `encode` gave; the rest lie as they were. Its metadata names
the coded ones and keeps the header of the original, so that the original comes back to the byte, header and all.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import BadFile, LabError
from ..gguf.words import show_path
from ..units import format_bytes
from .coding import LAYOUTS, decode, encode
from .measuring import opened, shards

FORMAT = "llmlab-lossless-1"
LEAST = 1 << 14         # weights of a tensor that coding pays for
_HEADER_LIMIT = 100 * 10**6     # bytes, the safetensors library's own


@dataclass(frozen=True)
class Saved:
    """What `save` made of a file or folder: `coded` of `tensors` tensors, bytes of the safetensors files before and after; all
    exact."""

    path: Path
    tensors: int
    coded: int
    source_bytes: int
    bytes: int

    @property
    def ratio(self) -> float:
        return self.bytes / self.source_bytes

    def __str__(self) -> str:
        return (f"{self.path.name}: {format_bytes(self.bytes)} instead of {format_bytes(self.source_bytes)} "
                f"({self.ratio:.1%}), {self.coded} of {self.tensors} tensors coded without loss")


def save(source: str | os.PathLike, target: str | os.PathLike, progress: bool = True) -> Saved:
    """Write a .safetensors file, or each of a folder, with the exponents of its bfloat16, float16 and float32 tensors coded.

    The target (a file for a file, a new folder for a folder, whose other files but no subfolders are copied) appears whole
    or not at all. `restore` gives the source back to the byte. A tensor at a time is in memory. Raises LabError: a source
    that is no safetensors, or coded already; no room on the disk, a target that is in the way.
    """
    return _each(source, target, _save_file, progress, "coding")


def restore(source: str | os.PathLike, target: str | os.PathLike, progress: bool = True) -> Saved:
    """Write the file or folder that `save` was given, every byte of it as it was (held against its checksum). Raises BadFile
    for a file that `save` did not write, or that is damaged; then nothing is written."""
    return _each(source, target, _restore_file, progress, "restoring")


def read(source: str | os.PathLike) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a file or folder that `save` wrote, decoded one after another. Raises BadFile as `restore` does."""
    for path in shards(_path(source)):
        with opened(path) as file:
            coded, _, _ = _about(file, path)
            for name in file.keys():        # no mapping: it cannot be gone through itself
                yield name, _decoded(file, name, coded, path)


# ---- one file -----------------------------------------------------------------------------------------------

def _save_file(source: Path, target: Path, step) -> tuple[int, int]:
    """(tensors, coded)."""
    header, digest = _header(source), hashlib.sha256()
    with opened(source) as file, open(target, "wb") as out:
        if (file.metadata() or {}).get("format") == FORMAT:
            raise LabError(f"{show_path(str(source))} is coded already; lossless.restore gives the original back")
        entries = _in_order(header, source)
        digest.update(struct.pack("<Q", len(header)) + header)
        room = len(_text(header, digest.hexdigest(), {name: ("BF16", [1 << 50] * max(1, len(told["shape"])), 1 << 50, 1 << 50)
                                                      for name, told in entries}, [name for name, _ in entries]))
        out.write(bytes(8 + room))
        made, coded, end = {}, [], 0
        for name, told in entries:
            tensor = file.get_tensor(name)
            raw = _raw(tensor)
            digest.update(raw)
            found = encode(tensor) if tensor.dtype in LAYOUTS and tensor.numel() >= LEAST else None
            if found is not None and found.data.nbytes < tensor.nbytes:
                coded.append(name)
                told, raw = {"dtype": "U8", "shape": [found.data.nbytes]}, found.data
            out.write(raw)
            made[name] = told["dtype"], told["shape"], end, end + raw.nbytes
            end += raw.nbytes
            step(name)
        text = _text(header, digest.hexdigest(), made, coded)
        out.seek(0)
        out.write(struct.pack("<Q", room) + text + b" " * (room - len(text)))
    return len(entries), len(coded)


def _restore_file(source: Path, target: Path, step) -> tuple[int, int]:
    with opened(source) as file, open(target, "wb") as out:
        coded, header, digest = _about(file, source)
        entries, found = _in_order(header, source), hashlib.sha256()
        if {name for name, _ in entries} != set(file.keys()):
            raise BadFile(f"{show_path(str(source))} does not hold the tensors that its original had: it is damaged")
        for part in _parts(header, entries, lambda name: _decoded(file, name, coded, source), step):
            found.update(part)
            out.write(part)
        if found.hexdigest() != digest:
            raise BadFile(f"{show_path(str(source))} does not give its original back (the checksum differs): it is damaged; "
                          "get it again")
    return len(entries), len(coded)


def _parts(header: bytes, entries: list, decoded, step) -> Iterator:
    yield struct.pack("<Q", len(header)) + header
    for name, _ in entries:
        yield _raw(decoded(name))
        step(name)


def _decoded(file, name: str, coded: frozenset[str], path: Path) -> torch.Tensor:
    tensor = file.get_tensor(name)
    if name not in coded:
        return tensor
    try:
        return decode(tensor)
    except BadFile as error:
        raise BadFile(f"{show_path(str(path))}: tensor {name!r:.100}: {error}") from None


def _raw(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes as they lie in a file."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _header(path: Path) -> bytes:
    """The text of a safetensors header; the library has found it whole, or will."""
    with open(path, "rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < size <= _HEADER_LIMIT:
            raise BadFile(f"{show_path(str(path))} is no whole safetensors file: its header would take {size} bytes")
        return file.read(size)


def _in_order(header: bytes, path: Path) -> list[tuple[str, dict]]:
    """(name, entry) of every tensor by its place in the file."""
    try:
        entries = {name: told for name, told in json.loads(header).items() if name != "__metadata__"}
        return sorted(entries.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadFile(f"{show_path(str(path))} has a header that is no safetensors header: it is damaged") from None


def _about(file, path: Path) -> tuple[frozenset[str], bytes, str]:
    """(names of what is coded, the original's header, its sha256). Raises BadFile."""
    told = file.metadata() or {}
    if told.get("format") != FORMAT:
        raise BadFile(f"{show_path(str(path))} is not coded: lossless.save writes what can be read here")
    try:
        return frozenset(json.loads(told["coded"])), told["header"].encode(), told["sha256"]
    except (KeyError, ValueError, TypeError):
        raise BadFile(f"{show_path(str(path))} says it is coded and not how: it is damaged") from None


def _text(header: bytes, digest: str, made: dict, coded: list[str]) -> bytes:
    """The header of a coded file, a multiple of 8 bytes with the length before it."""
    about = {"format": FORMAT, "coded": json.dumps(coded), "header": header.decode(), "sha256": digest}
    told = {"__metadata__": about, **{name: {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
                                      for name, (dtype, shape, start, end) in made.items()}}
    text = json.dumps(told).encode()
    return text + b" " * (-len(text) % 8)


# ---- whole or not at all ------------------------------------------------------------------------------------

def _each(source, target, one_file, progress: bool, word: str) -> Saved:
    """`one_file` for a file, or for every safetensors file of a folder, under another name until all is done."""
    from tqdm.auto import tqdm

    source, target = _path(source), Path(os.fspath(target)).expanduser()
    files = shards(source)
    if target.exists() and (source.is_dir() or target.is_dir()):
        kind = "folder" if source.is_dir() else "file"
        raise LabError(f"{show_path(str(target))} is there already; give the name of a new {kind}")
    if not target.absolute().parent.is_dir():
        raise LabError(f"{show_path(str(target.parent))} is not a folder; make it first")
    part = target.absolute().with_name(f".{target.name[:100]}.{os.urandom(6).hex()}.part")
    tensors = coded = 0
    try:
        if source.is_dir():
            part.mkdir()
        names = sum(len(_in_order(_header(path), path)) for path in files)
        with tqdm(total=names, desc=word, unit="tensor", disable=not progress) as bar:
            for path in files:
                _room(path, part)
                found = one_file(path, part / path.name if source.is_dir() else part, lambda _: bar.update())
                tensors, coded = tensors + found[0], coded + found[1]
        for path in source.iterdir() if source.is_dir() else ():
            if path.is_file() and path not in files:
                shutil.copy2(path, part / path.name)
        size = sum((part / path.name if source.is_dir() else part).stat().st_size for path in files)
        os.replace(part, target)
    except OSError as error:
        raise LabError(f"{show_path(str(target))} cannot be written ({error.strerror or error}); check its folder and the room "
                       "on its disk") from None
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    return Saved(target, tensors, coded, sum(path.stat().st_size for path in files), size)


def _room(source: Path, part: Path) -> None:
    """Raises LabError where the disk has less room than the source takes: a coded file is smaller, a restored one is not known
    to be larger than half as much again."""
    needed, free = source.stat().st_size, shutil.disk_usage(part.parent).free
    if needed > free:
        raise LabError(f"{show_path(str(part.parent))} has {format_bytes(free)} free and up to {format_bytes(needed)} are "
                       "needed; free some space or write elsewhere")


def _path(source) -> Path:
    path = Path(os.fspath(source)).expanduser()
    if not path.exists() or (path.is_file() and path.suffix != ".safetensors"):
        raise BadFile(f"{show_path(str(path))} is no .safetensors file and no folder; give one that exists")
    return path
