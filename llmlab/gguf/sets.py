"""A GGUF file by its path, and the sharded sets NAME-00001-of-00003.gguf that are one model in several files."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace

from ..errors import BadFile
from .contents import GGUFFile
from .header import read_header
from .layout import TensorInfo
from .local import LocalFile
from .words import show, show_path

_SHARD = re.compile(r"(.*)-[0-9]{5}-of-[0-9]{5}\.gguf", re.DOTALL)


def read_gguf(path: str | os.PathLike) -> GGUFFile:
    """The header of a GGUF file, or of a whole sharded set given its first file (NAME-00001-of-00003.gguf).

    Raises BadFile, in one line that names the file and the remedy, for whatever cannot be used.
    """
    first = _read_local(path)
    count, number = first.shards, first.metadata.get("split.no", 0)
    if count == 1:
        return first
    shown = f"{show_path(first.paths[0])} is file {number + 1} of a set of {count}"
    folder, name = os.path.split(first.paths[0])
    if not _SHARD.fullmatch(name):
        raise BadFile(f"{shown} but is not named like one; "
                      f"rename it to NAME-{number + 1:05d}-of-{count:05d}.gguf, the others alike")
    names = shard_names(name, count)
    if number > 0:
        raise BadFile(f"{shown}; open the first, {show_path(names[0])}")
    if name != names[0]:
        raise BadFile(f"{shown} but is not named so; rename it to {show_path(names[0])}")
    paths = [os.path.join(folder, name) for name in names]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        more = f", and {len(missing) - 1} more, are" if len(missing) > 1 else " is"
        raise BadFile(f"{shown}, and {show_path(missing[0])}{more} missing; download it into the same folder")
    return join_shards([first, *map(_read_local, paths[1:])])


def shard_names(name: str, count: int) -> list[str]:
    """The `count` file names of the set that the file called `name` belongs to. Raises BadFile for another name."""
    match = _SHARD.fullmatch(name)
    if not match:
        raise BadFile(f"{show_path(name)} is not named like one of a set, NAME-00001-of-00003.gguf")
    return [f"{match[1]}-{number + 1:05d}-of-{count:05d}.gguf" for number in range(count)]


def join_shards(parts: Sequence[GGUFFile]) -> GGUFFile:
    """One GGUFFile from the headers of a whole set, in order. Metadata is the first's. Raises BadFile."""
    first = parts[0]
    shown = [show_path(part.paths[0]) for part in parts]
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        told = part.metadata.get("split.no", 0), part.shards
        if told != (number, len(parts)):
            raise BadFile(f"{shown[number]} should be file {number + 1} of {len(parts)} but says inside that it is "
                          f"{told[0] + 1} of {told[1]}; download the set again")
        for tensor in part.tensors.values():
            if tensor.name in tensors:
                raise BadFile(f"{shown[number]} repeats tensor {show(tensor.name)} of "
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


def _read_local(path: str | os.PathLike) -> GGUFFile:
    return read_header(LocalFile.look(path))
