"""A vision or audio projector beside a model: its weights, counted from its GGUF, and the room an image takes."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from .errors import LabError
from .gguf import read_gguf
from .units import MIB, align, parse_bytes

_UNKNOWN = (0, 128 * MIB, 1132 * MIB)     # a projector of which only the size is known; the most: 4096 patches, 16 heads


@dataclass(frozen=True, slots=True)
class Projector:
    """Bytes of its weights, and of the working buffer for one image (low, best, high; modelled)."""

    name: str
    weights: int
    compute: tuple[int, int, int]

    def __str__(self) -> str:
        return self.name


def projector(source: "Projector | str | Path | int") -> Projector:
    """A projector from its GGUF (mmproj), or from its size alone: "850 MiB", or bytes. Raises LabError.

    llama.cpp loads every tensor of the file; the working buffer is that of one image at the file's own size, all heads'
    scores at once where the card has no flash attention for it (the high end).
    """
    if isinstance(source, Projector):
        return source
    if isinstance(source, (str, Path)) and (path := Path(source).expanduser()).suffix == ".gguf":
        file = read_gguf(path)
        if not file.is_projector:
            raise LabError(f"{path} is no projector; give the mmproj file that comes with the model")
        return Projector(path.name, sum(align(t.bytes, 32) for t in file.tensors.values()), _compute(file.metadata))
    try:
        size = parse_bytes(source)
    except LabError:
        size = 0
    if not 0 < size <= 2**40:
        raise LabError(f"projector is {str(source)[:60]!r}; give an mmproj GGUF, or its size like '850 MiB'")
    return Projector(f"projector of {size / MIB:.0f} MiB", size, _UNKNOWN)


def _compute(metadata: dict) -> tuple[int, int, int]:
    """float32 activations of one image's patches: what a block holds at its widest, and without flash attention the
    scores of all heads."""
    keys = ("image_size", "patch_size", "embedding_length", "feed_forward_length", "attention.head_count")
    found = [metadata.get(f"clip.vision.{key}") for key in keys]
    if not all(isinstance(value, int) and value > 0 for value in found):
        return _UNKNOWN
    image, patch, width, ff, heads = found
    patches = (image // patch) ** 2
    best = 4 * (patches * (ff + 3 * width) + prod((3, image, image)))
    return best // 2, best, 2 * best + 4 * heads * patches**2
