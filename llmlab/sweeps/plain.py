"""Results as bytes and back in JSON, arrays in numpy's npy within: opening a file runs nothing, whoever wrote it.

What may be kept: None, numbers, texts, bytes, lists, tuples, sets, dicts, ranges, paths, enums, numpy's arrays and scalars,
torch's tensors, and dataclasses and named tuples of these. Dataclasses come back by their fields, without their __init__, of
a class that is here already.
"""

import base64
import io
import json
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

import numpy as np

_ITSELF = (type(None), bool, int, float, str)
_GROUPS: dict[str, Callable] = {"tuple": tuple, "set": set, "frozenset": frozenset}


def encoded(value: object) -> bytes:
    """Raises TypeError for a value that is none of the above, ValueError for arrays of objects."""
    return json.dumps(_out(value)).encode()


def decoded(data: bytes) -> Any:
    """Raises ValueError (or another, of damaged bytes) for what is no result, or is of a class that is not here."""
    return _in(json.loads(data))


def _out(value: Any) -> Any:
    kind = type(value)
    if kind in _ITSELF:
        return value
    if kind is list:
        return [_out(one) for one in value]
    if kind.__name__ in _GROUPS and kind is _GROUPS[kind.__name__]:
        return {kind.__name__: [_out(one) for one in value]}
    if kind is dict:
        return {"dict": [[_out(key), _out(one)] for key, one in value.items()]}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, PurePath):
        return {"path": str(value)}
    if isinstance(value, np.generic):
        return {"scalar": _npy(np.asarray(value))}
    if kind is np.ndarray:
        return {"array": _npy(value)}
    if kind.__module__ == "torch" and kind.__name__ == "Tensor":
        return _tensor_out(value)
    if isinstance(value, Enum):
        return {"enum": [*_named(kind), value.name]}
    if is_dataclass(kind):
        return {"dataclass": [*_named(kind), {one.name: _out(getattr(value, one.name)) for one in fields(value)}]}
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return {"named": [*_named(kind), [_out(one) for one in value]]}
    raise TypeError(f"{kind.__qualname__} cannot be kept; return numbers, texts, lists, dicts, arrays, or dataclasses of them")


def _in(value: Any) -> Any:
    if type(value) in _ITSELF:
        return value
    if isinstance(value, list):
        return [_in(one) for one in value]
    (kind, held), = value.items()
    if kind in _GROUPS:
        return _GROUPS[kind](_in(one) for one in held)
    if kind == "dict":
        return {_in(key): _in(one) for key, one in held}
    if kind in _SIMPLE:
        return _SIMPLE[kind](held)
    cls = _class(*held[:2])
    if kind == "enum" and issubclass(cls, Enum):
        return cls[held[2]]
    if kind == "dataclass" and is_dataclass(cls) and [one.name for one in fields(cls)] == list(held[2]):
        made = object.__new__(cls)
        for name, one in held[2].items():
            object.__setattr__(made, name, _in(one))
        return made
    if kind == "named" and issubclass(cls, tuple) and len(getattr(cls, "_fields", ())) == len(held[2]):
        return tuple.__new__(cls, map(_in, held[2]))
    raise ValueError(f"{held[1]} has changed since")


def _named(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _class(module: str, name: str) -> type:
    """A class that is here: nothing is imported for a file's sake but llmlab's own."""
    if module.startswith("llmlab.") and ".__" not in module:       # __main__ is the shell command
        import_module(module)
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise ValueError(f"{module}.{name} cannot be found by its name; define it at the top of a module or notebook")
    return found


def _npy(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def _array(text: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def _tensor_out(value) -> dict:
    import torch

    plain = value.detach().cpu().contiguous()
    return {"tensor": [str(plain.dtype).removeprefix("torch."), list(plain.shape),
                       _npy(plain.reshape(-1).view(torch.uint8).numpy())]}


def _tensor(held: list):
    import torch

    dtype, shape, data = held
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"{dtype!r:.40} is no dtype")
    return torch.from_numpy(_array(data)).view(kind).reshape(shape) if 0 not in shape else torch.empty(shape, dtype=kind)


_SIMPLE: dict[str, Callable] = {
    "bytes": base64.b64decode, "complex": lambda held: complex(*held), "range": lambda held: range(*held), "path": Path,
    "scalar": lambda held: _array(held)[()], "array": _array, "tensor": _tensor}
