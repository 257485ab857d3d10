"""A model without its matrices: small tensors, shapes, and descriptions that become matrices over a piece's buffer."""

from dataclasses import replace

import torch

from ..errors import BadFile
from ..formats import FORMATS
from ..gguf import GGUFFile
from ..gguf.words import show_path
from ..kernels import Packed, pack
from ..runtime.keys import Keys
from ..runtime.tensors import GGUFSource
from ..runtime.weights import Weights, read
from .pieces import Piece


class Outline(GGUFSource):
    """A GGUF whose matrices are one row of nothing, as often as there are rows: they take no memory and nothing of them is
    read. The embedding stays where it is, in the file."""

    mapped, stays = False, True

    def __init__(self, file: GGUFFile, matrices: set[str], device: torch.device):
        super().__init__(file)
        self.matrices, self.device = matrices - {"token_embd.weight"}, device

    def blocks(self, name: str) -> torch.Tensor:
        if name not in self.matrices:
            return super().blocks(name)
        tensor = self.file.tensors[name]
        row = torch.zeros(FORMATS[tensor.type].bytes(tensor.shape[0]), dtype=torch.uint8, device=self.device)
        return row.expand(*tensor.shape[:0:-1], -1)


def outline(file: GGUFFile, pieces: dict[str, Piece], dtype: torch.dtype, device: torch.device) -> Weights:
    """The weights of a GGUF as "compact" has them, their matrices (those of `pieces`, read in place) without bytes. Raises as
    `weights.read` does."""
    names = {tensor.name for piece in pieces.values() for tensor in piece.tensors}
    keys = Keys(file.metadata, file.architecture, show_path(file.paths[0]))
    found = read(Outline(file, names, device), keys, dtype, "compact", device)
    for part in file.sources:
        part.let_go()
    return found


def over(part: dict, piece: Piece, buffer: torch.Tensor, where: str) -> dict:
    """A layer of an outline, or its head, with matrices over a buffer uint8 [piece.bytes] that its piece is read into, before
    or after it is; experts stay as they are. `where`: the store's path. Raises BadFile where the piece is not of this layer."""
    places = {tensor.name: tensor for tensor in piece.tensors}

    def one(value):
        if not isinstance(value, Packed):
            return value
        tensor = places.get(value.name)
        if tensor is None or tensor.type != value.format or tensor.bytes != value.blocks.numel():
            raise BadFile(f"{show_path(where)}: {piece.name} is not of this model; delete it and make it again")
        blocks = buffer[tensor.offset:tensor.offset + tensor.bytes].view(value.rows, -1)
        return replace(pack(blocks, value.format, "compact", value.dtype, value.name, mapped=False), why=value.why)

    return {name: one(value) for name, value in part.items()}
