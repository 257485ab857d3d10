"""Where numbers come from, whatever holds them: a GGUF file (or a set of them), or a safetensors folder seen as one."""

import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from ..errors import BadFile
from ..formats import FORMATS, dequantize
from ..formats.mixes import Mix
from ..gguf import GGUFFile, read_gguf
from ..gguf.words import show_path
from ..stores import place_of

NUMBERS = ("F64", "F32", "F16", "BF16")      # types without blocks
COPY = 1 << 24      # bytes of a tensor copied at a time


class Source(Protocol):
    """A model that can be read a piece of a tensor at a time.

    `file`: names, shapes and types as a GGUF has them. `metadata`: as `write_gguf` takes it. `paths`: the files the numbers
    lie in; `shown`: how to call it in a message.
    """

    file: GGUFFile
    metadata: dict[str, Any]
    paths: tuple[str, ...]
    shown: str

    def numbers(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor, float32 [stop - start, cols]; those of the second expert follow those of the first."""

    def stored(self, name: str) -> Iterator[Any]:
        """The bytes of a tensor in its own type, in pieces."""

    def done(self, name: str) -> None:
        """Nobody will ask for this tensor again."""


def open_source(source, mix: Mix) -> Source:
    """A source by its path or name. Raises LabError for what is no model."""
    place = place_of(source, "a .gguf file or of a safetensors folder")
    if not place.is_dir():
        return PackedSource(read_gguf(place))
    if not any(place.glob("*.safetensors")):
        inside = ", ".join(sorted(p.name for p in place.glob("*.gguf"))[:5])
        raise BadFile(f"{show_path(str(place))} has no safetensors; " + (f"give one of its files, {inside}" if inside else
                      "give a .gguf, or a folder with config.json and safetensors; pickles are never read"))
    from ..converting import Checkpoint

    return Checkpoint(place, mix.name if mix.name in ("F32", "F16", "BF16") else None)


class PackedSource:
    """A GGUF file, or a set of them given its first."""

    def __init__(self, file: GGUFFile):
        self.file, self.paths = file, tuple(os.path.abspath(path) for path in file.paths)
        self.metadata, self.shown = file.typed_metadata(), show_path(file.paths[0])

    def numbers(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self.file.tensors[name]
        width = FORMATS[tensor.type].bytes(tensor.shape[0])
        data = self.file.data(name)[start * width:stop * width]
        return dequantize(data.reshape(stop - start, width), tensor.type)

    def stored(self, name: str) -> Iterator[Any]:
        data = self.file.data(name)
        yield from (data[start:start + COPY] for start in range(0, len(data), COPY))

    def done(self, name: str) -> None:
        self.file.sources[self.file.tensors[name].shard].let_go()
