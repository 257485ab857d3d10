"""One block taken apart for people who look at it: each field's bytes, what they mean and the numbers in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import LabError
from .bits import halves, words
from .dequantizing import as_bytes, dequantize, find

if TYPE_CHECKING:
    import numpy
    import torch

    from .registry import Field


class Part(NamedTuple):
    """A field of one block, or (`bytes` empty) what comes out of all of them.

    `values`: the numbers in it by their name, in order; a field in which two things are interleaved has two. Empty where
    the format's file does not say how the field is read.
    """

    name: str                                   # "block scales"
    bytes: str                                  # "3f 80 01", as they lie in the file
    what: str                                   # "4 bits each 32 weights, low ones first"
    values: dict[str, tuple[int | float, ...]]


def take_apart(block: bytes | torch.Tensor | numpy.ndarray, type: str) -> list[Part]:
    """The fields of a block in the order of its bytes, then what they make: codes, scales, offsets and the weights.

    `block`: the bytes of exactly one block. weight = scale x code + offset, scales and offsets for equal runs of
    neighbours. Raises UnknownName, or LabError where the format cannot be taken apart or `block` is not one block.
    """
    import torch
    known = find(type)
    data = torch.tensor(list(block), dtype=torch.uint8) if isinstance(block, bytes | bytearray) else as_bytes(block, known)
    if data.numel() != known.block_bytes:
        raise LabError(f"{known.name}: one block is {known.block_bytes} bytes, not {data.numel()}")
    data = data.reshape(1, -1).cpu()
    parts = []
    for field in known.fields:
        piece = data[:, field.start:field.stop]
        parts.append(Part(field.name, bytes(piece[0].tolist()).hex(" "), field.what, _values(field, piece)))
    return parts + _made(known, data)


def _values(field: Field, piece: torch.Tensor) -> dict[str, tuple[int | float, ...]]:
    import torch
    plain = field.what.partition(":")[0]
    if field.read is not None:
        found = field.read(piece)
    elif plain == "float16":
        found = halves(piece)
    elif plain in ("uint8", "int8", "int16", "float32"):
        found = words(piece, getattr(torch, plain))
    else:
        return {}
    found = found if isinstance(found, dict) else {field.name: found}
    return {name: tuple(numbers.flatten().tolist()) for name, numbers in found.items()}


def _made(known, data: torch.Tensor) -> list[Part]:
    made = []
    if known.unpack is not None:
        codes, scale, offset = known.unpack(data)
        run = known.block // scale.shape[1]
        made = [("codes", f"what is multiplied, one for each of {known.block} weights", codes),
                ("scales", f"float32: one for each {run} weights", scale)]
        if offset is not None:
            made.append(("offsets", f"float32: added, one for each {run} weights", offset))
    made.append(("weights", "float32: scale x code" + (" + offset" if len(made) == 3 else ""), dequantize(data, known.name)))
    return [Part(name, "", what, {name: tuple(numbers.flatten().tolist())}) for name, what, numbers in made]
