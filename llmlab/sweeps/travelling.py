"""How a function, its points and what it returns travel between processes: as bytes, opened and made nowhere else.

To a cluster a module of your own travels as it is (by value); libraries, llmlab among them, must be installed there.
"""

import functools
import io
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import cloudpickle

from .contents import is_own
from .plain import decoded, encoded

_CACHED = type(functools.lru_cache(len))


def _unsent(why: str = "it was sent as what is kept alone") -> None:
    raise ValueError(why)


@dataclass(frozen=True)
class Done:
    """A call that has ended: what it returned, as `plain.encoded` has it, or why there is nothing. Where it cannot be kept,
    `unkept` says why, and `brought()` returns it all the same."""

    seconds: float
    worker: str
    returned: bytes | None = None
    error: str = ""
    traceback: str = ""
    unkept: str = ""
    brought: Callable[[], object] = _unsent


class _Pickler(cloudpickle.Pickler):
    """cloudpickle names a cached function; here it goes along with what it caches, so that a worker opens a model once."""

    def reducer_override(self, value):
        if type(value) is _CACHED and getattr(value.__wrapped__, "__module__", None) in {
                "__main__", *cloudpickle.list_registry_pickle_by_value()}:
            return _cached, (value.__wrapped__, value.cache_parameters())
        return super().reducer_override(value)


def _cached(function: Callable, parameters: dict) -> Callable:
    return functools.lru_cache(**parameters)(function)


def packed(value: object) -> bytes:
    """Raises whatever pickling it does."""
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


@contextmanager
def by_value(function: Callable) -> Iterator[None]:
    """Here the function's own module is pickled as it is, not by its name."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__module__", None) or type(function).__module__
    module = sys.modules.get(name)
    if name == "__main__" or module is None or not is_own(name) or name in cloudpickle.list_registry_pickle_by_value():
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


@functools.lru_cache(4)
def _unpacked(function: bytes) -> Callable:
    """The same function for every point that a worker computes, with what it caches."""
    return cloudpickle.loads(function)


def called(key: str, function: bytes | Callable, point: bytes | dict) -> tuple[str, Done]:
    """Calls it; in the worker. What it raises is told, not raised."""
    began, worker = time.perf_counter(), f"{platform.node()}:{os.getpid()}"
    try:
        apart = isinstance(function, bytes)
        given = cloudpickle.loads(point) if apart else point
        value = (_unpacked(function) if apart else function)(**given)
        return key, _returned(value, apart, time.perf_counter() - began, worker)
    except (Exception, SystemExit) as error:
        lines = traceback.format_exception(error)
        return key, Done(time.perf_counter() - began, worker, None, line_of(error), "".join(lines))


def _returned(value: object, apart: bool, took: float, worker: str) -> Done:
    """Bytes to keep; where there can be none, or these may not open elsewhere, the value too: hours of work are not lost."""
    data, unkept, brought = None, "", _unsent
    try:
        data = encoded(value)
        if apart:
            decoded(data)
    except Exception as error:
        unkept = line_of(error).removeprefix("TypeError: ")
    try:
        if unkept and apart:
            brought = functools.partial(cloudpickle.loads, packed(value))
    except Exception as error:
        brought = functools.partial(_unsent, line_of(error))
    return Done(took, worker, data, unkept=unkept, brought=brought if apart else lambda: value)


def line_of(error: BaseException) -> str:
    """One line that says what an exception says."""
    try:
        said = " ".join(str(error).split())
    except Exception:           # an exception may fail too
        said = ""
    return f"{type(error).__name__}: {said}"[:500] if said else type(error).__name__
