"""One place that knows which block formats exist.

A format is how a run of numbers is laid out in bytes: `block` elements in `block_bytes` bytes, rows
independent, the row length a multiple of `block`. A new format is one file in this folder that calls
`register`; sizes, panels, the reference kernel and the property tests find it by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Unpacked(NamedTuple):
    """Blocks taken apart: weight = scale * code + offset, scale and offset shared by runs of neighbours.

    `codes` int8 [n, block] (float32 where a format's levels are no integers), `scale` float32 [n, groups],
    `offset` float32 [n, groups] or None where every group's zero is zero. A group is block // groups weights.
    """

    codes: "torch.Tensor"
    scale: "torch.Tensor"
    offset: "torch.Tensor | None" = None


class Field(NamedTuple):
    """A part of a block, for people who look at one: bytes start <= i < stop, and what they hold."""

    name: str       # "scale", "minimum", "codes", "high bits", "block scales", "signs", "grid index"
    start: int
    stop: int
    what: str       # "float16: multiplies every code of the block"; numbers that lie there plainly by their dtype's name
    # The numbers in it, from uint8 [n, stop - start]: a tensor [n, ...], or several by name where they are interleaved.
    read: "Callable[[torch.Tensor], torch.Tensor | dict[str, torch.Tensor]] | None" = None


@dataclass(frozen=True, slots=True)
class Format:
    """A per-tensor block layout.

    `name` in capitals as everywhere in llmlab (`"Q4_K"`), `id` the type number in a GGUF header (None
    for formats GGUF does not have), `block` elements in `block_bytes` bytes. `unpack` takes uint8
    [n, block_bytes] apart; None where nobody wrote it (sizes are known all the same). `fields` lists the
    parts of a block in the order of its bytes.
    """

    name: str
    id: int | None
    block: int
    block_bytes: int
    family: str
    unpack: "Callable[[torch.Tensor], Unpacked] | None" = field(default=None, compare=False, repr=False)
    fields: tuple[Field, ...] = field(default=(), compare=False, repr=False)

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return self.block_bytes * 8 / self.block

    def bytes(self, elements: int) -> int:
        """Bytes of `elements` weights; the caller has checked that rows divide into blocks."""
        return elements // self.block * self.block_bytes


FORMATS: dict[str, Format] = {}
BY_ID: dict[int, Format] = {}


def register(name: str, id: int | None, block: int, block_bytes: int, family: str,
             unpack: "Callable[[torch.Tensor], Unpacked] | None" = None, fields: tuple[Field, ...] = ()) -> Format:
    """Add a format. Raises ValueError where the name or the number is taken by a different layout."""
    new = Format(name, id, block, block_bytes, family, unpack, fields)
    if FORMATS.get(name, new) != new or (id is not None and BY_ID.get(id, new) != new):
        raise ValueError(f"a format named {name} or numbered {id} is registered already")
    FORMATS[name] = new
    if id is not None:
        BY_ID[id] = new
    return new
