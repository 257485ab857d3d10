"""One place that knows which block formats exist.

A format is how a run of numbers is laid out in bytes: `block` elements in `block_bytes` bytes, rows
independent, the row length a multiple of `block`. A new format is one file in this folder that calls
`register`; sizes, panels and checks find it by itself.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Format:
    """A per-tensor block layout.

    `name` in capitals as everywhere in llmlab (`"Q4_K"`), `id` the type number in a GGUF header (None
    for formats GGUF does not have), `block` elements in `block_bytes` bytes.
    """

    name: str
    id: int | None
    block: int
    block_bytes: int
    family: str

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return self.block_bytes * 8 / self.block

    def bytes(self, elements: int) -> int:
        """Bytes of `elements` weights; the caller has checked that rows divide into blocks."""
        return elements // self.block * self.block_bytes


FORMATS: dict[str, Format] = {}
BY_ID: dict[int, Format] = {}


def register(name: str, id: int | None, block: int, block_bytes: int, family: str) -> Format:
    """Add a format. Raises ValueError where the name or the number is taken by a different layout."""
    new = Format(name, id, block, block_bytes, family)
    if FORMATS.get(name, new) != new or (id is not None and BY_ID.get(id, new) != new):
        raise ValueError(f"a format named {name} or numbered {id} is registered already")
    FORMATS[name] = new
    if id is not None:
        BY_ID[id] = new
    return new
