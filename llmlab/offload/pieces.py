"""What is moved between tiers: a model as pieces, each one contiguous buffer that one read and one copy move.

A piece is a layer's matrices, one expert's, or the output matrix. Wherever it lies its tensors are at the same offsets from a
page-aligned address, so that arithmetic over them is the same to the bit. Norms, biases and routers are small and in none.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..gguf import GGUFFile
from ..gguf.layout import TensorInfo
from ..units import KIB, align

PAGE = 4096             # bytes: buffers begin at a multiple, and so do reads, as O_DIRECT wants it
GAP = 64 * KIB          # bytes between two tensors of a piece that are read along: less time than a second read takes
HEAD = "head"
_LAYER = re.compile(r"(blk\.\d+)\.(.+)\.weight")
_SMALL = re.compile(r"ffn_gate_inp(_shexp)?|.*norm|rope_.*|attn_(sinks|rot_embd)")      # few numbers, held as numbers


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies in its piece's buffer: `offset` and `bytes`. `shape` in torch's order, without the expert. `about`:
    what else whoever laid it out wants to know of it, as JSON has it (see `store.Part`)."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    about: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a file that go to `at` of the buffer. `offset` and `at` are multiples of PAGE, so is `bytes`, but at the end of
    the file, where fewer are there (`file`: number of the file in its set)."""

    file: int
    offset: int
    bytes: int
    at: int


@dataclass(frozen=True)
class Piece:
    """`bytes`: of the buffer it needs, a multiple of PAGE. checksum: CRC-32 of them all, where it is one extent of a store."""

    name: str
    bytes: int
    tensors: tuple[Tensor, ...]
    extents: tuple[Extent, ...]
    checksum: int | None = None

    @cached_property
    def payload(self) -> int:
        """Bytes of its tensors alone."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def layer(self) -> int | None:
        """The number of its layer; None for the head."""
        return int(self.name.split(".")[1]) if self.name.startswith("blk.") else None

    @property
    def expert(self) -> int | None:
        """The number of its expert; None for what every token uses."""
        return int(self.name.rpartition(".")[2]) if ".expert." in self.name else None


def pieces_of(file: GGUFFile) -> dict[str, Piece]:
    """The pieces of a GGUF as it lies on disk, by name, in the order a pass uses them: "blk.0", its experts "blk.0.expert.0"
    and on, "blk.1", ..., "head". The output matrix is the embedding where the file has none of its own."""
    found: dict[str, list[tuple[TensorInfo, int, int]]] = {}        # piece -> tensor, offset in its file, bytes
    for name, tensor in file.tensors.items():
        matched = _LAYER.fullmatch(name)
        if not matched or len(tensor.shape) < 2 or _SMALL.fullmatch(matched[2]):
            continue
        block = matched[1]
        if matched[2].endswith("_exps"):
            each = tensor.bytes // tensor.shape[-1]
            for expert in range(tensor.shape[-1]):
                found.setdefault(f"{block}.expert.{expert}", []).append((tensor, tensor.offset + expert * each, each))
        else:
            found.setdefault(block, []).append((tensor, tensor.offset, tensor.bytes))
    output = file.tensors.get("output.weight") or file.tensors.get("token_embd.weight")
    if output is not None:
        found[HEAD] = [(output, output.offset, output.bytes)]
    made = [_piece(name, parts, file) for name, parts in found.items()]
    made.sort(key=_order)
    return {piece.name: piece for piece in made}


def _order(piece: Piece) -> tuple[float, int]:
    return (float("inf") if piece.layer is None else piece.layer, -1 if piece.expert is None else piece.expert)


def _piece(name: str, parts: list[tuple[TensorInfo, int, int]], file: GGUFFile) -> Piece:
    """Tensors in the order of the file, those that lie close together in one extent."""
    parts = sorted(parts, key=lambda part: (part[0].shard, part[1]))
    tensors, extents, at = [], [], 0
    for tensor, offset, size in parts:
        first, end = offset // PAGE * PAGE, align(offset + size, PAGE)
        last = extents[-1] if extents else None
        if last is not None and last[0] == tensor.shard and first - (last[1] + last[2]) <= GAP:
            last[2] = max(last[2], end - last[1])
        else:
            if last is not None:
                at = last[3] + last[2]
            extents.append([tensor.shard, first, end - first, at])
        last = extents[-1]
        shape = tensor.shape[::-1][1:] if ".expert." in name else tensor.shape[::-1]
        tensors.append(Tensor(tensor.name, tensor.type, shape, last[3] + offset - last[1], size))
    sizes = [source.size for source in file.sources]
    kept = [Extent(shard, first, min(size, sizes[shard] - first) if sizes else size, place)
            for shard, first, size, place in extents]
    return Piece(name, extents[-1][3] + extents[-1][2], tuple(tensors), tuple(kept))
