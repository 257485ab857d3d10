"""A GGUF's hyperparameters by their short names, each checked as it is read."""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import BadFile

_MISSING = object()


class Keys:
    """The metadata of one architecture: `keys.number("block_count")` reads `llama.block_count`.

    Every reader raises BadFile naming the key and the file where the value is missing (and no default is given) or
    cannot be.
    """

    def __init__(self, metadata: Mapping[str, Any], architecture: str, file: str):
        self.metadata, self.architecture, self.file = metadata, architecture, file

    def raw(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.architecture}.{name}", default)

    def number(self, name: str, default: Any = _MISSING, low: int = 1, high: int = 2**31) -> int:
        """A whole number in [low, high]; of a list, the one value that all its entries share."""
        value = self._value(name, default)
        if isinstance(value, tuple):
            if len(set(value)) != 1:
                raise self.bad(name, value, "the same number for every layer; layers of different sizes are not supported")
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(name, value, f"a whole number from {low} to {high}")
        return value

    def real(self, name: str, default: Any = _MISSING, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number in (low, high]."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and low < value <= high):
            raise self.bad(name, value, f"a number above {low:g}")
        return float(value)

    def has(self, name: str) -> bool:
        return f"{self.architecture}.{name}" in self.metadata

    def bad(self, name: str, value: Any, wanted: str) -> BadFile:
        return BadFile(f"{self.file} is damaged: {self.architecture}.{name} is {value!r:.60}, not {wanted}; "
                       "download it again or convert the model again")

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw(name, default)
        if value is _MISSING:
            raise BadFile(f"{self.file} has no {self.architecture}.{name}; download it again or convert the model again")
        return value
