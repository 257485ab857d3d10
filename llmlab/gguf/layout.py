"""What a GGUF file is made of: value types, tensors, and the bounds that reading and writing share.

Layout: the GGUF specification, versions 2 and 3 (little endian).
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import LabError
from ..formats import FORMATS
from ..units import KIB

MAGIC, ALIGNMENT = b"GGUF", 32
KEY_LIMIT, DIMENSIONS_LIMIT, ALIGNMENT_LIMIT = 65535, 4, 64 * KIB
_INT64 = 2**63 - 1

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array",
         "uint64", "int64", "float64")  # in the order of their numbers
CODES = {"uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i", "float32": "f",
         "bool": "B", "uint64": "Q", "int64": "q", "float64": "d"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `shape` in ggml's order (shape[0] is the contiguous row length), `type` a name of
    `llmlab.formats.FORMATS`, `offset` in bytes from the start of its shard's file, `bytes` exact, without padding."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    bytes: int
    shard: int = 0

    @property
    def elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)


def tensor_bytes(shape: Sequence[int], kind: str) -> int:
    """Bytes of a tensor. Raises LabError, the end of a sentence, for a shape that cannot be."""
    layout = FORMATS[kind]
    if min(shape) < 1:
        raise LabError(f"has a dimension of {min(shape)}")
    elements = math.prod(shape)
    if elements > _INT64 or layout.bytes(elements) > _INT64:
        raise LabError(f"has a shape of {elements.bit_length()}-bit size, more than fits in 64 bits")
    if shape[0] % layout.block:
        raise LabError(f"has rows of {shape[0]}, not a multiple of {kind}'s block of {layout.block}")
    return layout.bytes(elements)
