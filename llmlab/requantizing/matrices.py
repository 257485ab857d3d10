"""An importance matrix held against the model it is to be used for: names, lengths, numbers."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import LabError
from ..gguf.words import show, show_path
from .sources import Source

_SHORT = 127      # llama-quantize keeps so many bytes of a path and of a data set's name


@dataclass(frozen=True)
class Matrix:
    """`values`: tensor name -> float32 [experts, cols], what an input's squares were on average. `file`, `dataset`, `chunks`:
    where it came from, as far as it says."""

    values: Mapping[str, np.ndarray] = field(repr=False)
    file: str = ""
    dataset: str = ""
    chunks: int = 0

    def metadata(self) -> dict[str, Any]:
        """The keys by which llama-quantize says what it has used, in its order."""
        found = {"quantize.imatrix.file": _cut(self.file), "quantize.imatrix.dataset": _cut(self.dataset),
                 "quantize.imatrix.entries_count": ("uint32", len(self.values)),
                 "quantize.imatrix.chunks_count": ("uint32", self.chunks)}
        return {key: value for key, value in found.items() if value not in ("", ("uint32", 0))}


def _cut(text: str) -> str:
    return text.encode()[:_SHORT].decode(errors="ignore")


def read_matrix(importance, source: Source) -> Matrix | None:
    """The matrix of an importance: a mapping from tensor names to [cols] or [experts, cols], or a file of one.

    Raises LabError for one of another model, of the wrong length, or with numbers that cannot be.
    """
    if importance is None:
        return None
    path = ""
    if isinstance(importance, str | os.PathLike):
        from ..quality import read_importance

        path, importance = os.fspath(importance), read_importance(importance)
    if not isinstance(importance, Mapping):
        raise LabError(f"importance is {type(importance).__name__}; give what llmlab.importance returns, a file of it, or a "
                       "mapping from tensor names to numbers")
    what = f"the importance matrix {show_path(path)}" if path else "the importance matrix"
    if not importance:
        raise LabError(f"{what} is empty; make one of this model with llmlab.importance")
    values = {name: _checked(name, numbers, source, what) for name, numbers in importance.items()}
    datasets = getattr(importance, "datasets", None) or ()
    return Matrix(values, str(path or getattr(importance, "file", None) or ""), str(datasets[0]) if datasets else "",
                  int(getattr(importance, "chunks", 0) or 0))


def _checked(name: str, numbers, source: Source, what: str) -> np.ndarray:
    tensor = source.file.tensors.get(name)
    if tensor is None:
        raise LabError(f"{what} is of another model: it has {show(str(name))}, which {source.shown} has not; make one of this "
                       "model with llmlab.importance")
    try:
        found = np.asarray(numbers, np.float32)
    except (TypeError, ValueError):
        raise LabError(f"{what} has no numbers for {name}; make it again with llmlab.importance") from None
    experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
    if found.size != experts * tensor.shape[0]:
        raise LabError(f"{what} has {found.size} numbers for {name}, and {source.shown} needs "
                       f"{f'{experts} times ' if experts > 1 else ''}{tensor.shape[0]}; it is of another model: make one of "
                       "this with llmlab.importance")
    if not np.isfinite(found).all() or (found < 0).any():
        wrong = found[~np.isfinite(found) | (found < 0)][0]
        raise LabError(f"{what} has {wrong} for {name}, and mean squares are finite and not below 0; make it again with "
                       "llmlab.importance")
    return found.reshape(experts, -1)
