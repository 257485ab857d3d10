"""Costs of tensors kept in a JSON file, so that what took minutes is found again: by the model, the text and the settings."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import BadFile, LabError
from ..gguf.words import show_path
from .swapping import Matrix

EVERY = 16      # new ones between two times that the file is written


def identity(kind: str, found: Mapping[str, Matrix], read: list[np.ndarray], importance: Mapping | None, effort: str) -> str:
    """A hash of the weights (some thousand bytes of each matrix), the text, and how it is quantized."""
    digest = hashlib.sha256(f"{kind} {effort}".encode())
    for name, matrix in found.items():
        blocks = matrix.packed.blocks.reshape(-1)
        digest.update(f"{name} {matrix.packed.format} {matrix.packed.shape}".encode())
        digest.update(blocks[::max(1, len(blocks) // 4096)].cpu().contiguous().numpy().tobytes())
        if importance is not None and name in importance:
            digest.update(np.ascontiguousarray(importance[name]).tobytes())
    for ids in read:
        digest.update(ids.tobytes())
    return digest.hexdigest()


class Remembered:
    """Records by tensor and type, of one identity; those of others in the file stay. Without a path it only holds them."""

    def __init__(self, path: str | os.PathLike | None, identity: str):
        self.path, self.identity, self.fresh = Path(path) if path else None, identity, 0
        self.all: dict[str, list[dict]] = _read(self.path) if self.path and self.path.exists() else {}
        self.found = {(one["tensor"], one["type"]): one for one in self.all.get(identity, [])}

    def get(self, tensor: str, type: str) -> dict | None:
        return self.found.get((tensor, type))

    def put(self, one: dict) -> None:
        self.found[one["tensor"], one["type"]] = one
        self.fresh += 1
        if self.fresh >= EVERY:
            self.write()

    def write(self) -> None:
        """Raises LabError where the file cannot be written; the one that was there stays."""
        if self.path and self.fresh:
            write_whole(self.path, json.dumps(self.all | {self.identity: list(self.found.values())}))
            self.fresh = 0


def _read(path: Path) -> dict[str, list[dict]]:
    try:
        told = json.loads(path.read_text())
        for records in told.values():
            for one in records:
                if not {"tensor", "type", "bytes", "error", "predicted", "measured"} == set(one):
                    raise ValueError("a record has other parts")
        return told
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise BadFile(f"{show_path(str(path))} is no cache of sensitivities ({str(error)[:80]}); remove it, or give another "
                      "file") from None


def write_whole(path: Path, text: str) -> None:
    """The file appears whole or not at all. Raises LabError."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise LabError(f"{show_path(str(path))} cannot be written: {error.strerror or error}; check its folder") from None
    finally:
        part.unlink(missing_ok=True)
