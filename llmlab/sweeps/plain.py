"""Results as bytes and back, safely: JSON in which every value is of a kind listed here, so that opening bytes runs nothing.

What comes back is what was kept: None, numbers, texts, bytes, lists, tuples, sets, dicts, ranges, dates, paths, enums, numpy's
arrays and scalars, torch's tensors, dataclasses and named tuples of these, and what llmlab itself answers, tables with formats
aside. Objects come back by their attributes, without their __init__, of a class that is here already; what a cached_property
holds is left out, and computed again.
"""

import base64
import io
import json
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from datetime import date, datetime, timedelta
from enum import Enum, Flag
from functools import cached_property
from importlib import import_module
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any

import numpy as np

from ..catalog import Listed, Table
from ..exports import Command

_ITSELF = (type(None), bool, int, float, str)
_GROUPS = {tuple: "tuple", set: "set", frozenset: "frozenset"}
_PAIRS = {dict: "dict", MappingProxyType: "mappingproxy", OrderedDict: "OrderedDict", Counter: "Counter"}
_TEXTS = {type(Path()): "path", PurePosixPath: "PurePosixPath", PureWindowsPath: "PureWindowsPath", np.str_: "str_"}
_HEAPTYPE = 1 << 9          # Py_TPFLAGS_HEAPTYPE: a class that Python code made
_INSTEAD = {"DataFrame": 'return its .to_dict("list")', "Series": "return its .to_list()", "Table": "some of its columns are "
            "written by functions; return list(table)", "Tensor": "return a dense tensor", "defaultdict": "return dict(of it)"}


def encoded(value: object) -> bytes:
    """Raises TypeError (rarely another) for what is none of the above; it says what to return in its place."""
    return json.dumps(_Out().of(value)).encode()


def decoded(data: bytes, bring: Callable[[str], object] = lambda module: None) -> Any:
    """`bring` may import a module that is named and not imported; without it nothing is imported but llmlab's own modules
    (and what they import).

    Raises ValueError (or another, of damaged bytes) for what is no result, or is of a class that is not here."""
    return _In(bring).of(json.loads(data))


def _refused(kind: type, instead: str = "") -> TypeError:
    instead = instead or _INSTEAD.get(kind.__name__) or "return numbers, texts, lists, dicts, arrays, or dataclasses of them"
    return TypeError(f"{kind.__qualname__} cannot be kept; {instead}")


class _Out:
    """Of one result. An object that is met again is only named by its number: one stays one."""

    def __init__(self):
        self.met: dict[int, tuple[int, object]] = {}           # id -> (number, what keeps its id)

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ITSELF:
            return value
        if kind is list:
            return [self.of(one) for one in value]
        if kind in _GROUPS:
            return {_GROUPS[kind]: [self.of(one) for one in value]}
        if kind in _PAIRS:
            return {_PAIRS[kind]: [[self.of(key), self.of(one)] for key, one in value.items()]}
        if kind in _TEXTS:
            return {_TEXTS[kind]: str.__str__(value) if kind is np.str_ else str(value)}        # str() would end at a NUL
        if kind in (bytes, np.bytes_):
            return {kind.__name__: base64.b64encode(value).decode()}
        if kind is complex:
            return {"complex": [value.real, value.imag]}
        if kind is range:
            return {"range": [value.start, value.stop, value.step]}
        if kind is timedelta:
            return {"timedelta": [value.days, value.seconds, value.microseconds]}
        if kind in (date, datetime):
            if repr(kind.fromisoformat(value.isoformat())) != repr(value):
                raise _refused(kind, "return it in UTC: .astimezone(datetime.UTC)")
            return {kind.__name__: value.isoformat()}
        if kind is np.ndarray or isinstance(value, np.generic):
            return {"array" if kind is np.ndarray else "scalar": _npy(np.asarray(value))}
        if kind.__module__ == "torch" and kind.__name__ == "Tensor":
            return _tensor_out(value)
        if isinstance(value, Flag):
            return {"flag": [*_named(kind), value.value]}
        if isinstance(value, Enum):
            return {"enum": [*_named(kind), value.name]}
        if kind is Command:
            return {"command": [value.text, value.engine, *value.notes]}
        if kind is Table and not value._shown:
            return {"table": [self.of(row) for row in value]}
        if is_dataclass(kind) or isinstance(value, Listed):
            return self.object(value, kind)
        if isinstance(value, tuple) and hasattr(kind, "_fields") and not getattr(value, "__dict__", None):
            return {"named": [*_named(kind), [self.of(one) for one in value]]}
        raise _refused(kind)

    def object(self, value: Any, kind: type) -> dict:
        if next(one for one in kind.__mro__ if not one.__flags__ & _HEAPTYPE) is not object:
            raise _refused(kind)                               # a dict or list too, which its attributes do not tell
        if id(value) in self.met:
            return {"again": self.met[id(value)][0]}
        self.met[id(value)] = len(self.met), value
        held, slots = _state(value)
        own = [one.name for one in fields(kind)] if is_dataclass(kind) else []
        if lost := sorted(slots.keys() - own):
            raise _refused(kind, f"{lost[0]} is a slot and no field of it; make it a field")
        told, beyond = {name: self.of(getattr(value, name)) for name in own}, {}
        for name in held:
            if name in own or name == "__orig_class__" or isinstance(getattr(kind, name, None), cached_property):
                continue
            if own and name.startswith("_") and kind.__module__.startswith("llmlab."):
                continue                                       # what a ModelSpec remembers
            try:
                beyond[name] = self.of(held[name])
            except TypeError as error:
                raise TypeError(f"{kind.__qualname__}.{name}: {error}") from None
        return {"object": [*_named(kind), told, beyond]}


class _In:
    """Of one file."""

    def __init__(self, bring: Callable[[str], object]):
        self.bring, self.met = bring, []

    def of(self, value: Any) -> Any:
        if type(value) in _ITSELF:
            return value
        if isinstance(value, list):
            return [self.of(one) for one in value]
        (kind, held), = value.items()
        if kind == "again":
            return self.met[held]
        if kind in _MADE_OF:
            return _MADE_OF[kind](self.of(one) for one in held)
        if kind in _MADE_OF_PAIRS:
            return _MADE_OF_PAIRS[kind]({self.of(key): self.of(one) for key, one in held})
        if kind in _SIMPLE:
            return _SIMPLE[kind](held)
        cls = self.found(*held[:2])
        if kind == "object" and (is_dataclass(cls) or issubclass(cls, Listed)):
            if not is_dataclass(cls) or [one.name for one in fields(cls)] == list(held[2]):
                made = object.__new__(cls)
                self.met.append(made)
                for name, one in held[2].items():
                    object.__setattr__(made, name, self.of(one))
                for name, one in held[3].items():
                    made.__dict__[name] = self.of(one)         # past any property: nothing of the class is run
                return made
        if kind == "flag" and issubclass(cls, Flag):
            return cls(held[2])
        if kind == "enum" and issubclass(cls, Enum):
            return cls[held[2]]
        if kind == "named" and issubclass(cls, tuple) and len(getattr(cls, "_fields", ())) == len(held[2]):
            return tuple.__new__(cls, map(self.of, held[2]))
        raise ValueError(f"{held[1]} has changed since")

    def found(self, module: str, name: str) -> type:
        """A class of a module that is here."""
        if module not in sys.modules:
            if module.startswith("llmlab.") and ".__" not in module:       # __main__ is the shell command
                import_module(module)
            else:
                self.bring(module)
        if module not in sys.modules:
            raise ValueError(f"it holds a {name:.60} of {module:.60}, which is not imported here; import {module:.60} first")
        found: object = sys.modules[module]
        for part in name.split("."):
            found = getattr(found, "__dict__", {}).get(part)   # a module's __getattr__ would import more
        if not isinstance(found, type):
            raise ValueError(f"{module}.{name} cannot be found by its name; define it at the top of a module or notebook")
        return found


def _named(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _state(value: object) -> tuple[dict, dict]:
    """What an object has in its __dict__, and in slots."""
    state = object.__getstate__(value)
    held, slots = state if isinstance(state, tuple) else (state, None)
    return held or {}, slots or {}


def _npy(array: np.ndarray) -> str:
    if array.dtype.hasobject:
        raise TypeError("an array of Python objects cannot be kept; return it as one of numbers or texts, or as a list")
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def _array(text: str) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def _tensor_out(value) -> dict:
    import torch

    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise _refused(type(value))
    plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return {"tensor": [str(plain.dtype).removeprefix("torch."), list(plain.shape),
                       _npy(plain.reshape(-1).view(torch.uint8).numpy())]}


def _tensor(held: list):
    import torch

    dtype, shape, data = held
    kind = vars(torch).get(dtype)                              # torch's __getattr__ would import more
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"{dtype!r:.40} is no dtype")
    return torch.from_numpy(_array(data)).view(kind).reshape(shape) if 0 not in shape else torch.empty(shape, dtype=kind)


_MADE_OF: dict[str, Callable] = {"tuple": tuple, "set": set, "frozenset": frozenset, "table": Table}
_MADE_OF_PAIRS: dict[str, Callable] = {"dict": dict, "mappingproxy": MappingProxyType, "OrderedDict": OrderedDict,
                                       "Counter": Counter}
_SIMPLE: dict[str, Callable] = {
    "bytes": base64.b64decode, "bytes_": lambda held: np.bytes_(base64.b64decode(held)), "str_": np.str_,
    "complex": lambda held: complex(*held), "range": lambda held: range(*held), "path": Path, "PurePosixPath": PurePosixPath,
    "PureWindowsPath": PureWindowsPath, "date": date.fromisoformat, "datetime": datetime.fromisoformat,
    "timedelta": lambda held: timedelta(*held), "scalar": lambda held: _array(held)[()], "array": _array, "tensor": _tensor,
    "command": lambda held: Command(*held[:2], held[2:])}
