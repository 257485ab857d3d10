"""The safetensors of a folder: which tensor lies in which file, its shape and dtype, and some of its rows."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..errors import BadFile, LabError
from ..gguf.words import show, show_path

TYPES = {"F64": "F64", "F32": "F32", "F16": "F16", "BF16": "BF16"}
_MOST_INDEX = 64 * 2**20      # bytes of an index; the largest published one has 9 MB


class Entry(NamedTuple):
    """One tensor of a folder: `shape` in torch's order."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """All tensors of a folder's safetensors, by name; none of them is read before rows are asked for."""

    def __init__(self, folder: Path):
        self.folder, self.entries, self._open = folder, {}, {}
        for path in _paths(folder):
            opened = self._file(path)
            for name in opened.keys():
                part = opened.get_slice(name)
                self.entries[name] = Entry(path, tuple(part.get_shape()), str(part.get_dtype()))
        self.paths = tuple(sorted({str(entry.file) for entry in self.entries.values()}))

    def rows(self, name: str, start: int, stop: int, expert: int | None = None) -> torch.Tensor:
        """Rows of a tensor, float32 [stop - start, cols]; of one of several stacked in it by number. A vector is one row."""
        entry = self.entries[name]
        try:
            part = self._file(entry.file).get_slice(name)
            found = part[:][None] if len(entry.shape) == 1 else part[start:stop] if expert is None else part[expert, start:stop]
        except (SafetensorError, OSError) as error:
            raise BadFile(f"{show_path(str(entry.file))}: tensor {show(name)} cannot be read ({error}); download it "
                          "again") from None
        return found.to(torch.float32)

    def let_go(self) -> None:
        """Of the files, and with them of the pages that were read; they are opened again when asked."""
        self._open.clear()

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise BadFile(f"{show_path(str(path))} is missing; download it into the same folder") from None
            except (SafetensorError, OSError) as error:
                raise BadFile(f"{show_path(str(path))} is no safetensors file or is cut short ({error}); download it "
                              "again") from None
        return self._open[path]


def _paths(folder: Path) -> list[Path]:
    """The files that the index names, else those called model..., else all."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
            raise BadFile(f"{show_path(str(index))} has no weight_map; download it again")
        if wrong := [name for name in named.values() if Path(name).name != name]:
            raise BadFile(f"{show_path(str(index))} names {show(wrong[0])}, which is not in its folder; download it again")
        return [folder / name for name in sorted(set(named.values()))]
    every = sorted(folder.glob("*.safetensors"))
    return [path for path in every if path.name.startswith("model")] or every


def read_json(path: Path) -> dict:
    """A JSON object. Raises BadFile naming the file."""
    try:
        if path.stat().st_size > _MOST_INDEX:
            raise BadFile(f"{show_path(str(path))} is {path.stat().st_size} bytes, beyond any; download it again")
        found = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadFile(f"{show_path(str(path))} cannot be read ({str(error)[:100]}); download it again") from None
    if not isinstance(found, dict):
        raise BadFile(f"{show_path(str(path))} holds no JSON object; download it again")
    return found


def check_floating(entry: Entry, name: str, shown: str) -> None:
    """Raises LabError for weights that are no plain numbers."""
    if entry.dtype not in TYPES:
        raise LabError(f"{shown}: tensor {show(name)} is {entry.dtype}: this checkpoint is quantized already; give the "
                       "original in bfloat16, float16 or float32")
