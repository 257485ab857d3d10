"""A source's tensors packed one after another: each checked and accounted for, freed memory given back on the way."""

import math
import re

import torch

from ..errors import BadFile, LabError
from ..formats import FORMATS
from ..kernels import Packed, choose, pack
from ..units import MIB
from .heap import give_back
from .keys import Keys
from .tensors import Source, Tensors

_ELSEWHERE = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.(attn_)?rot_embd\..*")    # rope.py's
_PIECE = 16 * MIB       # packed bytes between two times that freed memory is given back


def start(source: Source, keys: Keys, strategy: str, dtype: torch.dtype, device: torch.device) -> "tuple[Packer, str]":
    """A packer of a model's tensors, and how "auto" was decided: once for all of them. Raises BadFile where there is no
    embedding."""
    chosen = ""
    if "token_embd.weight" not in source:
        raise BadFile(f"{keys.file} lacks tensor 'token_embd.weight', which every model needs; download it again or convert "
                      "the model again")
    if strategy == "auto":
        strategy, _, chosen = choose([(source.type(n), math.prod(source.shape(n))) for n in source.names()
                                      if len(source.shape(n)) > 1], dtype, device)
    return Packer(Tensors(source, {}), keys.architecture, strategy, dtype, device), chosen


class Packer:
    """Packs the tensors of a source by one strategy, for inputs of one dtype, onto one device."""

    def __init__(self, tensors: Tensors, architecture: str, strategy: str, dtype: torch.dtype, device: torch.device):
        self.tensors, self.architecture = tensors, architecture
        self.strategy, self.dtype, self.device = strategy, dtype, device
        self.done: dict[tuple[str, ...], Packed] = {}
        source = tensors.source
        self._piece, self._since = max(_PIECE, sum(FORMATS[source.type(n)].bytes(math.prod(source.shape(n)))
                                                   for n in source.names()) // 32), 0

    def packed(self, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...], strategy: str | None = None,
               leave: bool = True) -> Packed:
        """One matrix or stack, or several of one format whose rows are put one after another. Each is packed once. `leave` as
        in `kernels.pack`. Raises BadFile, naming tensor and file."""
        if names not in self.done:
            parts = [self.tensors.blocks(name, shape) for name, shape in zip(names, shapes, strict=True)]
            blocks, type, mapped = parts[0]
            if len(parts) > 1:
                blocks, mapped = torch.cat([part for part, _, _ in parts], -2), False
            name = " + ".join(names)
            try:
                self.done[names] = pack(blocks, type, strategy=strategy or self.strategy, dtype=self.dtype, name=name,
                                        mapped=mapped, device=self.device, leave=leave)
            except LabError as error:
                raise BadFile(f"{self.tensors.source.where(names[0])}: tensor {name!r:.80}: "
                              f"{str(error).removeprefix(f'{name}: ')}") from error
            self._since += blocks.nbytes
            if self._since > self._piece:
                give_back()
                self._since = 0
        return self.done[names]

    def embedding(self, shape: tuple[int, int], tied: bool) -> Packed:
        """Looked up only, it gains nothing by what "fast" holds; tied to the output it is multiplied by as well. Where a source
        says that it `stays`, its rows are looked up where they are, and only they come to the device."""
        if getattr(self.tensors.source, "stays", False):
            blocks, type, _ = self.tensors.blocks("token_embd.weight", shape)
            found = pack(blocks, type, strategy="compact", dtype=self.dtype, name="token_embd.weight", mapped=True)
            found.kernels[0].device = torch.empty(0, device=self.device).device
            return found
        alone = "compact" if self.strategy == "fast" and not tied else None
        return self.packed(("token_embd.weight",), (shape,), alone, leave=False)

    def dense(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """A small tensor as numbers, in memory of its own. Raises BadFile."""
        return self.tensors.dense(name, shape).to(self.device, dtype or self.dtype)

    def finish(self) -> None:
        """Raises BadFile where the source holds a tensor that nobody asked for."""
        give_back()
        if left := [name for name in self.tensors.left() if not _ELSEWHERE.fullmatch(name)]:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise BadFile(f"{self.tensors.source.where(left[0])} holds tensor {left[0]!r:.80}{more}, for which a "
                          f"{self.architecture} model has no place: a variant that llmlab does not know. Run it with llama.cpp")
