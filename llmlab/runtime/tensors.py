"""A model's tensors as blocks of bytes: where they come from (a GGUF here, another source elsewhere), and pieces of them."""

from collections.abc import Callable
from typing import Protocol

import torch

from ..errors import BadFile, LabError
from ..formats import FORMATS, dequantize
from ..formats.dequantizing import as_bytes
from ..gguf import GGUFFile
from ..gguf.words import show, show_path


class Source(Protocol):
    """Where a model's blocks come from. `mapped`: whether `blocks` gives pages of a file, read as they are touched."""

    mapped: bool

    def __contains__(self, name: str) -> bool: ...

    def names(self) -> list[str]: ...

    def type(self, name: str) -> str:
        """The format's name, as in `llmlab.formats.FORMATS`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """In torch's order: rows before columns, experts first."""

    def blocks(self, name: str) -> torch.Tensor:
        """uint8 [..., rows, row_bytes], the bytes as the source holds them."""

    def where(self, name: str) -> str:
        """The file that holds it, or that would, for messages."""


class GGUFSource:
    """The tensors of a GGUF file or set, mapped: bytes are read from disk as they are touched, and never copied."""

    mapped = True

    def __init__(self, file: GGUFFile):
        self.file = file

    def __contains__(self, name: str) -> bool:
        return name in self.file.tensors

    def names(self) -> list[str]:
        return list(self.file.tensors)

    def type(self, name: str) -> str:
        return self.file.tensors[name].type

    def shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[name].shape[::-1]

    def blocks(self, name: str) -> torch.Tensor:
        tensor = self.file.tensors[name]
        known = FORMATS[tensor.type]
        return as_bytes(self.file.data(name), known).view(*tensor.shape[:0:-1], known.bytes(tensor.shape[0]))

    def where(self, name: str) -> str:
        tensor = self.file.tensors.get(name)
        return show_path(self.file.paths[tensor.shard if tensor else 0])


class Tensors:
    """What building asks a source: a tensor by name, its shape checked, each one accounted for, and fused ones in their parts.

    llama.cpp's converter can write Q, K and V as one `attn_qkv` and the experts' gate and up as one `ffn_gate_up_exps`:
    their rows lie one after another, so a part is a view. `split` says how many rows each part has.
    """

    _FUSED = {"attn_q": ("attn_qkv", 0), "attn_k": ("attn_qkv", 1), "attn_v": ("attn_qkv", 2),
              "ffn_gate_exps": ("ffn_gate_up_exps", 0), "ffn_up_exps": ("ffn_gate_up_exps", 1)}

    def __init__(self, source: Source, split: dict[str, tuple[int, ...]]):
        self.source, self.split, self.used = source, split, set()

    def __contains__(self, name: str) -> bool:
        return name in self.source or self._part(name) is not None

    def blocks(self, name: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, str, bool]:
        """(uint8 [..., rows, row_bytes], format, mapped) of a matrix or stack that must have `shape`. Raises BadFile."""
        part = None if name in self.source else self._part(name)
        if part is None:
            return self._whole(name, shape), self.source.type(name), self.source.mapped
        whole, start, rows, total = part
        blocks = self._whole(whole, (*shape[:-2], total, shape[-1]))
        return blocks[..., start:start + rows, :], self.source.type(whole), self.source.mapped

    def dense(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A small tensor (a norm, a bias, a router) as float32, in memory of its own. Raises BadFile."""
        part = None if name in self.source else self._part(name)
        if part is None:
            return self._numbers(name, shape)
        whole, start, rows, total = part
        return self._numbers(whole, (total, *shape[1:]))[start:start + rows].clone()

    def left(self) -> list[str]:
        """What nobody asked for."""
        return [name for name in self.source.names() if name not in self.used]

    def _numbers(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        blocks = self._whole(name, shape)
        try:
            return dequantize(blocks, self.source.type(name)).reshape(shape)
        except LabError as error:
            raise BadFile(f"{self.source.where(name)}: tensor {show(name)}: {error}") from error

    def _whole(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        where = self.source.where(name)
        if name not in self.source:
            raise BadFile(f"{where} lacks tensor {show(name)}, which this model needs; download it again or convert the model "
                          "again")
        found = self.source.shape(name)
        if [n for n in found if n != 1] != [n for n in shape if n != 1]:      # a gate of one row may be a vector
            raise BadFile(f"{where}: tensor {show(name)} is {'x'.join(map(str, found))}, and by the file's own hyperparameters "
                          f"it is {'x'.join(map(str, shape))}; download it again or convert the model again")
        self.used.add(name)
        return self.source.blocks(name).reshape(*shape[:-1], -1)

    def _part(self, name: str) -> tuple[str, int, int, int] | None:
        """(the fused tensor that holds it, first row, rows, rows of the whole), or None."""
        stem, _, end = name.rpartition(".")
        block, _, bare = stem.rpartition(".")
        fused, number = self._FUSED.get(bare, ("", 0))
        whole = f"{block}.{fused}.{end}"
        if fused not in self.split or whole not in self.source:
            return None
        rows = self.split[fused]
        return whole, sum(rows[:number]), rows[number], sum(rows)


def reader(source: Source) -> Callable[[str], torch.Tensor | None]:
    """A function that gives a small tensor's numbers, or None where the source does not hold it."""
    def read(name: str) -> torch.Tensor | None:
        return dequantize(source.blocks(name), source.type(name)).reshape(source.shape(name)) if name in source else None

    return read
