"""What a value or a function is, as a hash of its content: the same in every process, another where a result may be another."""

import contextlib
import dis
import functools
import hashlib
import inspect
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from enum import Enum, Flag
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType

import numpy as np

from ..errors import LabError

_PLAIN = (type(None), bool, int, float, complex, bytes, range, slice, type(...))
_HELD = (tuple, list, dict, set, frozenset, Enum, type, os.PathLike, np.ndarray, np.generic, functools.partial)
_EMPTY = CellType()
_TAKES_MORE = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
_LIBRARIES = tuple(os.path.join(sysconfig.get_paths()[name], "") for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_INSTALLED = {"site-packages", "dist-packages"}          # a user's own, a system's: not all are among those paths


def key_of(*values: tuple[str, object]) -> str:
    """32 hex digits that stand for named values, given as (name for an error, value).

    Plain values, tuples, lists, sets, dicts (in any order), enums, dataclasses, numpy's and torch's arrays and dtypes count by
    what is in them. A path, or a string that is the path of a file here, counts by where it lies, its size and its time; a
    folder by its entries. A function of your own counts by its compiled code (comments do not), its defaults, what it closes
    over and the globals it reads, further functions and classes of yours among them, to the last, and the files of your modules
    that it imports as it runs; what comes from a library, and llmlab itself, by name and version. Raises LabError for anything
    else: whose content cannot be told.
    """
    told = _Told()
    for name, value in values:
        try:
            told.tell(value, name)
        except RecursionError:
            raise LabError(f"{name} holds itself, or is nested too deep, and its content cannot be told; say key= "
                           "yourself") from None
    return told.digest.hexdigest()[:32]


class _Told:
    """A hash that is fed; what was told once is only named again, as functions may name each other."""

    def __init__(self, seen: dict[int, tuple] | None = None):
        self.digest, self.seen = hashlib.sha256(), dict(seen or {})      # id -> (number, what keeps its id)
        self.files: set[str] = set()

    def say(self, *parts: object) -> None:
        for part in parts:
            data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
            self.digest.update(b"%d:" % len(data) + data)

    def each(self, values: Iterable, name: str) -> None:
        for value in values:
            self.tell(value, name)

    def unordered(self, groups: Iterable[tuple], name: str) -> None:
        parts = []
        for group in groups:
            part = _Told(self.seen)
            part.each(group, name)
            parts.append(part.digest.digest())
        self.say(*sorted(parts))

    def tell(self, value: object, name: str) -> None:
        """`name` says in an error where the value was found."""
        kind = type(value)
        self.say(f"{kind.__module__}.{kind.__qualname__}")
        if isinstance(value, Enum):
            self.say(value.name, value.value if isinstance(value, Flag) else "")
            if is_own(kind.__module__):
                self.tell(kind, name)
        elif kind in _PLAIN:
            self.say(value if kind is bytes else repr(value))
        elif isinstance(value, str):
            self.say(value, *_stamp(value))
        elif isinstance(value, os.PathLike):
            self.say(os.path.abspath(value), *_stamp(os.fspath(value), folders=True))
        elif isinstance(value, (tuple, list)):
            self.say(len(value))
            self.each(value, name)
        elif isinstance(value, (dict, MappingProxyType)):
            self.unordered(value.items(), name)
        elif isinstance(value, (set, frozenset)):
            self.unordered(((one,) for one in value), name)
        elif isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
            self.say(value.dtype.str, value.shape, value.tobytes())
        elif isinstance(value, np.dtype) or (kind.__module__, kind.__name__) in (("torch", "dtype"), ("torch", "device")):
            self.say(str(value))
        elif "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor):
            torch, flat = sys.modules["torch"], value.detach().cpu().contiguous().reshape(-1)
            self.say(value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, ModuleType):
            self.say(value.__name__, _version(value.__name__))
        elif isinstance(value, (CodeType, MethodType, functools.partial)) or callable(value) and hasattr(value, "__name__"):
            self.once(value, name)
        elif is_dataclass(value):
            self.tell(kind, name)
            for field in fields(value):
                self.say(field.name)
                self.tell(getattr(value, field.name), f"{name}.{field.name}")
        else:
            raise _untold(value, name)

    def once(self, value: object, name: str) -> None:
        """Functions and classes, each told in full the first time."""
        if id(value) in self.seen:
            self.say("as before", self.seen[id(value)][0])
            return
        self.seen[id(value)] = len(self.seen), value
        if isinstance(value, CodeType):
            self.say(value.co_code, value.co_names, value.co_varnames, value.co_freevars, value.co_exceptiontable)
            self.say(value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags & _TAKES_MORE)
            self.each(value.co_consts, name)
        elif isinstance(value, functools.partial):
            self.each((value.func, value.args, value.keywords), name)
        elif isinstance(value, MethodType):
            self.each((value.__self__, value.__func__), name)
        else:
            module, qualified = getattr(value, "__module__", None) or "builtins", getattr(value, "__qualname__", value.__name__)
            self.say(module, qualified)
            if not is_own(module):
                self.say(_version(module))
                if not _named(value, module, qualified):
                    self.of_made(value, name)
            elif isinstance(value, type):
                self.of_class(value, name)
            elif isinstance(value, FunctionType):
                self.of_function(value, name)
            elif hasattr(value, "__wrapped__"):          # functools.cache
                self.tell(value.__wrapped__, name)
            else:
                raise _untold(value, name)

    def of_function(self, function: FunctionType, name: str) -> None:
        self.each((function.__code__, function.__defaults__, function.__kwdefaults__), name)
        for free, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.say(free)
            try:
                inside = cell.cell_contents
            except ValueError:                           # not filled yet
                continue
            self.tell(inside, f"{free}, which {function.__name__}() closes over,")
        for used in sorted(_globals(function.__code__)):
            if used in function.__globals__:
                self.say(used)
                self.tell(function.__globals__[used], f"{used}, which {function.__name__}() reads,")
        self.of_imports(function.__code__, _package(function.__globals__))
        for chain in sorted(_chains(function.__code__)):
            inner = function.__globals__.get(chain[0])
            for at, attribute in enumerate(chain[1:], 1):
                if not isinstance(inner, ModuleType) or not is_own(inner.__name__) or attribute not in vars(inner):
                    break
                inner = vars(inner)[attribute]
                if at == len(chain) - 1:
                    self.say(*chain)
                    self.tell(inner, f"{'.'.join(chain)}, which {function.__name__}() reads,")

    def of_imports(self, code: CodeType, package: str) -> None:
        """Modules of your own that code imports as it runs, by their files: so it does not matter whether they are imported."""
        for module, *names in sorted(_imports(code, package)):
            above = (module[:at] for at, letter in enumerate(module) if letter == ".")
            for one in (*above, module, *(f"{module}.{name}" for name in names)):
                if one in self.files or not (file := _source(one)):
                    continue
                self.files.add(one)
                self.say(one)
                with contextlib.suppress(OSError, SyntaxError, ValueError):      # it fails when it is imported
                    inner = compile(Path(file).read_bytes(), one, "exec", dont_inherit=True)
                    self.tell(inner, one)
                    self.of_imports(inner, one if file.endswith("__init__.py") else one.rpartition(".")[0])

    def of_made(self, value: object, name: str) -> None:
        """What a library made of something of yours, and has no name for: a method of a dict, what a factory returned."""
        bound = getattr(value, "__self__", None)
        if isinstance(value, FunctionType):
            self.each((value.__defaults__, value.__kwdefaults__), name)
            self.each((cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY), name)
        elif isinstance(value, BuiltinMethodType) and not isinstance(bound, (type(None), ModuleType, type)):
            self.tell(bound, name)
        elif isinstance(value, np.vectorize):
            self.tell(value.pyfunc, name)
        elif isinstance(value, np.ufunc) and value.__name__.endswith("(vectorized)"):        # np.frompyfunc
            raise _untold(value, name)

    def of_class(self, kind: type, name: str) -> None:
        """Its methods, and attributes of plain values and containers; what else hangs on a class says nothing about results."""
        self.each((base for base in kind.__bases__ if base is not object), name)
        if issubclass(kind, Enum):
            self.each(((member, one.value) for member, one in kind.__members__.items()), name)
        for attribute, value in sorted(vars(kind).items()):
            value = _unwrapped(value)
            dunder = attribute.startswith("__") and attribute.endswith("__")
            if isinstance(value, (*_PLAIN, str, FunctionType)) and attribute not in ("__doc__", "__firstlineno__") or (
                    isinstance(value, _HELD) and not dunder and not (issubclass(kind, Enum) and attribute.startswith("_"))):
                self.say(attribute)
                self.tell(value, f"{name}.{attribute}")


def _unwrapped(value: object) -> object:
    """The function in a method of a class, a property, a cached one."""
    if isinstance(value, functools.partialmethod):
        return functools.partial(value.func, *value.args, **value.keywords)
    for inner in ("__func__", "fget", "func", "__wrapped__"):
        if not isinstance(value, (FunctionType, functools.partial, type)):
            value = getattr(value, inner, value)
    return value


def _untold(value: object, name: str) -> LabError:
    return LabError(f"{name} is of type {type(value).__name__}, whose content cannot be told, so results could not be found "
                    "again; give plain values, arrays, dataclasses or paths, open what is large inside the function, or say "
                    "key= yourself")


def _globals(code: CodeType) -> set[str]:
    """Names of globals that code reads, in functions inside it too."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(_globals(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _chains(code: CodeType) -> set[tuple[str, ...]]:
    """Globals and the attributes that code reads of them, as ("module", "function"), in functions inside it too."""
    found, chain = set(), ()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            chain = (step.argval,)
        else:
            chain = (*chain, step.argval) if chain and step.opname in ("LOAD_ATTR", "LOAD_METHOD") else ()
        found |= {chain} if len(chain) > 1 else set()
    return found.union(*(_chains(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _imports(code: CodeType, package: str) -> set[tuple[str, ...]]:
    """Modules that code imports as it runs, each with the names it takes from it, in functions inside it too."""
    found, before = set(), [None, None]                  # two constants come first: how far up, and the names
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            up, names = before
            with contextlib.suppress(ImportError):       # beyond the top: it fails when it runs
                module = resolve_name("." * up + step.argval, package) if up else step.argval
                found.add((module, *(names or ())))
        if step.opname != "EXTENDED_ARG":
            before = [before[1], step.argval]
    return found.union(*(_imports(inner, package) for inner in code.co_consts if isinstance(inner, CodeType)))


def _source(module: str) -> str:
    """The file of a module of your own, found without importing anything; "" of any other."""
    paths: Iterable[str] = ()
    for at in range(1, len(parts := module.split(".")) + 1):
        try:                                             # of what is at the top find_spec imports nothing
            spec = PathFinder.find_spec(".".join(parts[:at]), paths) if at > 1 else find_spec(parts[0])
        except (ImportError, ValueError):
            return ""
        if spec is None:
            return ""
        paths = spec.submodule_search_locations or ()
    own = parts[0] != "llmlab" and _own_file(spec.origin) and spec.origin.endswith(".py")
    return spec.origin if own else ""


def _package(names: dict) -> str:
    """Of a module, or of what is in one, by its globals."""
    return names.get("__package__") or (names.get("__name__") or "").rpartition(".")[0]


def bring(function: Callable, module: str) -> None:
    """Imports a module if a function's own code names it, or its package; else does nothing."""
    while isinstance(function, functools.partial):
        function = function.func
    inner = inspect.unwrap(function)
    named = {getattr(inner, "__module__", None) or ""}
    if isinstance(inner, FunctionType):
        for one, *names in _imports(inner.__code__, _package(inner.__globals__)):
            named |= {one} | {f"{one}.{name}" for name in names if f"{one}.{name}" == module}
    for one in sorted(named & {module}) or sorted(name for name in named if name.partition(".")[0] == module.partition(".")[0]):
        import_module(one)


def _named(value: object, module: str, qualified: str) -> bool:
    """Whether a module has it under its name."""
    inner = sys.modules.get(module)
    for part in qualified.split("."):
        inner = getattr(inner, part, None)
    return inner is value


def is_own(module: str) -> bool:
    """Whether a module is the user's: neither llmlab's nor from where libraries are installed."""
    if module == "__main__":
        return True
    return module.partition(".")[0] != "llmlab" and _own_file(getattr(sys.modules.get(module), "__file__", None))


def _own_file(file: str | None) -> bool:
    return bool(file) and not file.startswith(_LIBRARIES) and _INSTALLED.isdisjoint(Path(file).parts)


def _version(module: str) -> str:
    return str(getattr(sys.modules.get(module.partition(".")[0]), "__version__", ""))


def _stamp(path: str | bytes, folders: bool = False) -> tuple:
    """Size and time of a file, of a folder's entries; nothing where neither is."""
    try:
        if os.path.isfile(path):
            found = os.stat(path)
            return os.path.abspath(path), found.st_size, found.st_mtime_ns
        if folders and os.path.isdir(path):
            return tuple((one.name, *_stamp(str(one))) for one in sorted(Path(os.fsdecode(path)).iterdir()))
    except (OSError, ValueError):
        pass
    return ()


def name_of(function: Callable) -> str:
    """What a function is called, for folders and sentences."""
    inner = function.func if isinstance(function, functools.partial) else function
    return str(getattr(inner, "__name__", type(inner).__name__))
