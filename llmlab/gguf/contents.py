"""What a GGUF file holds: metadata, tensors, and the way from a tensor's name to its bytes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import BadFile, UnknownName
from ..units import align
from .layout import TensorInfo
from .local import LocalFile
from .walker import LAST_BLOCK, Walker
from .words import show, show_path

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Array:
    """A metadata array too long to hold (a vocabulary), or one of arrays: `count` items of `type`, left in the file."""

    type: str
    count: int
    offset: int  # of the first item, in bytes from the start of the file
    bytes: int
    source: "LocalFile | None" = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.count

    def values(self) -> tuple:
        """The items, read and decoded now. Raises BadFile where the file is not local or has changed since."""
        # No limit: asked for by name, and the walk that found this array has bounded it.
        return Walker(self._local(), self.offset, held_limit=math.inf).items(self.type, self.count)

    def raw(self) -> Iterator[bytes]:
        """The items as they lie in the file, in chunks. Raises as `values` does."""
        source, end = self._local(), self.offset + self.bytes
        for start in range(self.offset, end, LAST_BLOCK):
            yield source.read(start, min(LAST_BLOCK, end - start))

    def _local(self) -> "LocalFile":
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
    sources: "tuple[LocalFile, ...]" = field(default=(), repr=False, compare=False)  # empty for a remote file

    @property
    def architecture(self) -> str:
        """`general.architecture`. Raises BadFile where there is none (an importance matrix, a later shard)."""
        name = self.metadata.get("general.architecture")
        if not name:
            raise BadFile(f"{show_path(self.paths[0])} has no general.architecture, so it is no model; "
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
            hint = f"; the nearest name is {show(near[0])}" if near else "; it has no tensors"
            raise UnknownName(f"{show_path(self.paths[0])} has no tensor {show(str(name))}{hint}")
        tensor = self.tensors[name]
        if not self.sources:
            raise BadFile(f"{show_path(self.paths[tensor.shard])} is not a local file; download it to read tensors")
        return np.frombuffer(self.sources[tensor.shard].map(), np.uint8, tensor.bytes, tensor.offset)

    def typed_metadata(self) -> dict[str, Any]:
        """The metadata as `write_gguf` takes it, stored types kept."""
        return {key: value if isinstance(value, Array) else (self.types[key], value)
                for key, value in self.metadata.items()}
