"""A packed matrix, or a stack of experts: what it is, what holds it, what it costs and why it was made so."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ..errors import LabError


class Kernel(Protocol):
    """What a strategy makes of one matrix [rows, cols]."""

    blocks: torch.Tensor
    device: torch.device

    def bytes(self) -> int: ...
    def matmul(self, x: torch.Tensor) -> torch.Tensor: ...
    def transposed(self, g: torch.Tensor) -> torch.Tensor: ...
    def take(self, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...
    def dense(self, dtype: torch.dtype) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class Packed:
    """Packed weights [rows, cols], or [experts, rows, cols] of which `packed[e]` is one.

    `format` as in `"Q4_K"`; `strategy` "compact" | "fast" | "reference", what was chosen; `why` says in a line what was
    made and why. `bytes` are held in memory of their own; `mapped` are pages of a file, read when they are touched.
    """

    name: str
    format: str
    strategy: str
    rows: int
    cols: int
    experts: int | None
    dtype: torch.dtype
    why: str
    blocks: torch.Tensor
    kernels: tuple[Kernel, ...]
    is_mapped: bool

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes() for kernel in self.kernels) + (0 if self.is_mapped else self.blocks.nbytes)

    @property
    def mapped(self) -> int:
        return self.blocks.nbytes if self.is_mapped else 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.cols) if self.experts is None else (self.experts, self.rows, self.cols)

    @property
    def device(self) -> torch.device:
        """Where it is multiplied; `blocks` may lie elsewhere."""
        return self.kernels[0].device if self.kernels else self.blocks.device

    def to(self, device: torch.device | str) -> "Packed":
        """The same on another device, packed anew there by the same strategy; itself where it is there already."""
        from .packing import pack
        device = torch.device(device)
        if torch.empty(0, device=device).device == self.device:
            return self
        return pack(self.blocks, self.format, self.strategy, self.dtype, self.name, self.is_mapped, device)

    def __deepcopy__(self, memo) -> "Packed":
        return self         # nothing in it ever changes, so copies of a model share it

    def __len__(self) -> int:
        return self.experts or 1

    def __getitem__(self, expert: int) -> "Packed":
        """One expert's matrix, sharing what the stack holds. Raises LabError where there is no such expert."""
        if self.experts is None:
            raise LabError(f"{self.name} is one matrix of {self.rows} x {self.cols}, not a stack of experts")
        if not 0 <= expert < self.experts:
            raise LabError(f"{self.name}: there is no expert {expert} of {self.experts}")
        return replace(self, name=f"{self.name}[{expert}]", experts=None, blocks=self.blocks[expert],
                       kernels=(self.kernels[expert],))

    def __repr__(self) -> str:
        return f"Packed({self.name}: {self.format} {list(self.shape)}, {self.strategy}: {self.why})"
