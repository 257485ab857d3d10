"""Many experiments: a function called with every point of a grid, on this computer or a cluster, and found again later."""

import inspect
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from importlib import import_module
from itertools import product
from numbers import Number
from pathlib import Path

from .. import places
from ..catalog import Listed, Table
from ..errors import LabError
from ..gguf.words import show_path
from ..units import format_seconds
from .backends import Backend, backend_of
from .contents import bring, key_of, name_of
from .keeping import Kept
from .plain import decoded
from .travelling import Done, by_value, called, line_of, packed

__all__ = ["Failure", "Sweep", "sweep"]

Progress = bool | Callable[["Sweep"], None]


@dataclass(frozen=True)
class Failure:
    """A point whose call raised something, or whose worker died under it each time: `error` is one line."""

    point: dict
    error: str
    traceback: str = field(default="", repr=False)


@dataclass(frozen=True, repr=False, eq=False)
class Sweep(Listed):
    """What a function returned for each point of a grid, in the grid's order.

    `points`: what it was called with; `results`: what it returned, None where it failed or is not done; `failures`; `folder`:
    where results are kept; `found`: points that were there already; `work`: seconds that the others took, all workers
    together; `seconds`: how long it all took; `workers`: the processes that computed, "host:id"; `notes`: what else was met.
    """

    name: str
    points: tuple[dict, ...]
    results: tuple
    done: tuple[bool, ...]
    failures: tuple[Failure, ...]
    folder: Path
    found: int = 0
    work: float = 0.0
    seconds: float = 0.0
    workers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def table(self) -> Table:
        """A row a point: its parameters, then what came out; an `error` where a point failed (`failure`, where
        an "error" is among the parameters or results)."""
        errors = [next((one.error for one in self.failures if one.point is point), None) for point in self.points]
        made = [_row(point, result, done) for point, result, done in zip(self.points, self.results, self.done, strict=True)]
        columns = dict.fromkeys(name for point in self.points for name in point)
        columns |= dict.fromkeys(name for row in made for name in row)
        if self.failures:
            label = "failure" if "error" in columns else "error"         # which may be what a function measures
            columns[label] = None
            made = [row | {label: error} for row, error in zip(made, errors, strict=True)]
        return Table({name: row.get(name) for name in columns} for row in made)

    @property
    def answer(self) -> str:
        many = f"{sum(self.done)} of {len(self.points)} point{'s' if len(self.points) != 1 else ''}"
        said = f"{many}, {self.found} from before, {len(self.failures)} failed"
        if self.workers:
            said += f"; {format_seconds(self.work)} of work in {format_seconds(self.seconds)}"
            said += f", {len(self.workers)} workers" if len(self.workers) > 1 else ""
        first = f"{_shown(self.failures[0].point)} failed: {self.failures[0].error}" if self.failures else ""
        return ". ".join(filter(None, (said, first, *self.notes))).rstrip(".") + "."

    @property
    def _rows(self) -> Table:
        return self.table

    def _some(self, rows: Table) -> Table:
        return rows

    def __repr__(self) -> str:
        return f"{self.name}: {self.answer}\n{self.table!r}"


def sweep(function: Callable, grid: Mapping[str, Sequence] | Sequence[Mapping], *, n_jobs: int | None = None,
          backend: str | None = None, folder: str | os.PathLike | None = None, name: str | None = None, key: object = None,
          fresh: bool = False, on_error: str = "keep", progress: Progress = True) -> Sweep:
    """Calls `function(**point)` for every point of a grid, and keeps what it returns, so that it is not computed again.

    Args:
        grid: {parameter: values}, for every combination of them, the last one changing fastest; or a list of points, as dicts.
        n_jobs: workers: 1 is this process, -1 one a core; a cluster's are all used. Each of this computer's processes gets
            its part of the cores' threads.
        backend: joblib's: "loky" (processes here) where None, "threading", "dask" (the `Client` that is open) or "ray" (what
            `ray.init` connected to). The last two come with `pip install llmlab[cluster]`. A function of your own module or
            notebook travels there with all it reads; libraries, and files, must be there.
        folder: where results are kept, a file a point; LLMLAB's cache, sweeps/NAME, where None. `plain` says what may be kept:
            numbers, texts, arrays, dataclasses of them, what llmlab answers. Anything else is in `results` all the same, said
            in `notes`, and computed again next time. Written by this process alone, as each result arrives: workers need no
            common disk.
        name: of that folder, and of the progress bar; the function's where None.
        key: stands for the function where its content cannot be told or should not count, and for whatever else a result
            depends on. A result is found again where the function (its compiled code, what it closes over and reads, the
            versions of libraries) and the point (see `contents.key_of`; a file counts by path, size and time) are the same.
        fresh: computes everything again. Failures are tried again in any case.
        on_error: "keep" notes what a call raises beside the results and goes on; "raise" raises it.
        progress: a bar; or called with the Sweep as it stands whenever something is done.

    A worker that dies (killed, out of memory) costs what it was at: that is computed again, alone, and a point that kills its
    worker again and again has failed. A sweep that is interrupted or killed goes on where it was when it is called again.

    Raises LabError for a grid that is none, a point the function does not take, content that cannot be told, a backend that
    is missing or lost, a folder that cannot be written, and with on_error="raise".

    Example:
        >>> llmlab.sweep(lambda quant: llmlab.size("llama-3-8b", quant).tensor_bytes, {"quant": ["Q4_K_M", "Q8_0"]}).table
    """
    if on_error not in ("keep", "raise"):
        raise LabError(f'on_error is {on_error!r:.40}; it is "keep" or "raise"')
    if name is not None and not isinstance(name, str):
        raise LabError(f"name is {name!r:.40}; give a text, or leave it out")
    points = _points(function, grid)
    used = backend_of(backend, n_jobs)
    whose = key_of(("key", key)) if key is not None else key_of(("the function", function))
    keys = [key_of(("the function", whose), *((f"{parameter} of {_shown(point)}", (parameter, value))
                                              for parameter, value in sorted(point.items()))) for point in points]
    kept = Kept(_folder(folder) if folder else places.cache() / "sweeps" / _safe(name or name_of(function)))
    run = _Run(name or name_of(function), points, keys, kept, progress, fresh)
    if not fresh:
        run.find(partial(bring, function))
    try:
        run.compute(function, used, on_error == "raise")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{run.kept_words()}; the same call goes on from there") from None
    done = run.so_far()
    if callable(progress) and not done.workers:          # all from before: it has not been called yet
        progress(done)
    return done


class _Run:
    """One sweep as it goes on."""

    def __init__(self, name: str, points: list[dict], keys: list[str], kept: Kept, progress: Progress, fresh: bool):
        self.name, self.points, self.keys, self.kept = name, points, keys, kept
        self.progress, self.fresh = progress, fresh
        self.values: dict[str, object] = {}
        self.failed: dict[str, tuple[str, str]] = {}
        self.found, self.work, self.workers, self.damaged = 0, 0.0, {}, []
        self.unkept: dict[str, str] = {}                 # why, where `values` has what the folder has not
        self.began = time.perf_counter()

    def find(self, bring: Callable[[str], None]) -> None:
        """What the folder has; what is damaged there is computed again. `bring` may import what a result's class is of."""
        for key in dict.fromkeys(self.keys):
            try:
                if (got := self.kept.get(key)) is not None:
                    self.values[key] = decoded(got[1], bring)
            except Exception as error:                   # whatever damaged or foreign bytes do
                self.damaged.append(f"{show_path(str(self.kept.path(key)))} could not be used ({line_of(error)[:240]}) and was "
                                    "computed again")
        self.found = sum(key in self.values for key in self.keys)

    def compute(self, function: Callable, backend: Backend, strict: bool) -> None:
        missing = {key: point for key, point in zip(self.keys, self.points, strict=True) if key not in self.values}
        with _bar(self, len(self.points)) as tell:
            with closing(_computed(backend, _calls(function, missing, backend), self.kept_words)) as arriving:
                for key, done in arriving:
                    error = self._take(key, done)
                    tell()
                    if error and strict:
                        failed = LabError(f"{_shown(missing[key])}: {error}")
                        failed.add_note(self.failed[key][1])
                        raise failed

    def _take(self, key: str, done: Done) -> str:
        """Keeps what a call came to, on the disk too. Returns an error's line, or ""."""
        self.work += done.seconds
        self.workers[done.worker] = None
        error, lines, unkept = done.error, done.traceback, done.unkept
        if done.returned is not None:
            try:        # in this process too: what is found again is no other. Its classes are of the function's own modules
                value, unkept = decoded(done.returned, import_module), ""
            except Exception as wrong:
                unkept = line_of(wrong)
        if unkept and not error:
            try:
                value = done.brought()
            except Exception as wrong:
                error = f"what it returned is lost: {unkept}; {line_of(wrong).removeprefix('ValueError: ')}"
        if self.fresh and (error or unkept):
            self.kept.remove(key, ".result")             # an older one, which would hide this from the next call
        if error:
            self.failed[key] = error, lines
            self.kept.put_failure(key, f"{_shown(self.points[self.keys.index(key)])}\n{error}\n\n{lines}")
            return error
        if unkept:
            self.unkept[key] = unkept
            self.kept.remove(key, ".failure")
        else:
            self.kept.put(key, done.seconds, done.returned)
        self.values[key] = value
        return ""

    def so_far(self) -> Sweep:
        failures = tuple(Failure(point, *self.failed[key]) for key, point in zip(self.keys, self.points, strict=True)
                         if key in self.failed)
        return Sweep(self.name, tuple(self.points), tuple(self.values.get(key) for key in self.keys),
                     tuple(key in self.values for key in self.keys), failures, self.kept.folder, self.found, self.work,
                     time.perf_counter() - self.began, tuple(filter(None, self.workers)),
                     tuple(filter(None, (*self.damaged, self.unkept_words()))))

    def unkept_words(self) -> str:
        if not self.unkept:
            return ""
        many, why = sum(key in self.unkept for key in self.keys), next(iter(self.unkept.values()))
        return f"{many} result{'s' if many > 1 else ''} could not be kept ({why}); the next call computes them again"

    def kept_words(self) -> str:
        done = sum(key in self.values and key not in self.unkept for key in self.keys)
        return f"{done} of {len(self.keys)} points are kept in {show_path(str(self.kept.folder))}"


def _calls(function: Callable, points: Mapping[str, dict], backend: Backend) -> dict[str, tuple]:
    """What each call is made of; as bytes where it leaves this process. Raises LabError for what cannot."""
    if not backend.apart:
        return {key: (function, point) for key, point in points.items()}
    try:
        if not backend.cluster:
            sent = packed(function)
            return {key: (sent, packed(point)) for key, point in points.items()}
        with by_value(function):
            sent = packed(function)
            return {key: (sent, packed(point)) for key, point in points.items()}
    except Exception as error:
        raise LabError(f"{name_of(function)}() cannot be sent to other processes ({line_of(error)}); open what it needs inside "
                       "it, or use n_jobs=1") from None


def _computed(backend: Backend, calls: Mapping[str, tuple], kept: Callable[[], str],
              alone: bool = False) -> Iterator[tuple[str, Done]]:
    """Every call's outcome, as it arrives. Where a worker died, what was under way is called again, one `alone` after the
    other: its death was the fault of one of them, or of nobody here. Who kills a worker twice so has failed; a cluster has
    tried again by itself, and is asked once."""
    left, killed = dict(calls), dict.fromkeys(calls, 1 if backend.cluster else 0)
    while left:
        sent: list[str] = []
        try:
            with closing(backend.arriving(called, _given(dict(left), sent), alone)) as arriving:
                for key, done in arriving:
                    del left[key]
                    yield key, done
        except backend.deaths as error:
            suspects = {key: left.pop(key) for key in sent if key in left}
            if alone and suspects:                       # joblib may have taken more than it gave away
                culprit = next(iter(suspects))
                killed[culprit] += 1
                left = suspects | left
                if killed[culprit] == 2:
                    del left[culprit]
                    yield culprit, _died(error)
            elif suspects:
                yield from _computed(backend, suspects, kept, alone=True)
            else:
                raise LabError(f"{backend.name}'s workers die before they are given anything ({line_of(error)}); "
                               f"{kept()}") from None
        except Exception as error:                       # never the function's own: those are told, not raised
            raise LabError(f"{backend.name} gave up ({line_of(error)}); {kept()}, and the same call goes on from "
                           "there") from error


def _given(calls: Mapping[str, tuple], sent: list[str]) -> Iterator[tuple]:
    """`sent` is told which calls were taken."""
    for key, (function, point) in calls.items():
        sent.append(key)
        yield key, function, point


def _died(error: BaseException) -> Done:
    return Done(0.0, "", None, "its worker died each time, with nothing else under way; was it out of memory? "
                               f"({line_of(error)[:200]})")


@contextmanager
def _bar(run: _Run, total: int) -> Iterator[Callable[[], None]]:
    """What to call whenever something is done."""
    if callable(run.progress):
        yield lambda: run.progress(run.so_far())
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, initial=run.found, desc=run.name, unit="point", disable=not run.progress) as bar:
        def tell() -> None:
            bar.n = sum(key in run.values or key in run.failed for key in run.keys)
            bar.set_postfix(failed=len(run.failed), refresh=False) if run.failed else None
            bar.refresh()

        yield tell


def _points(function: Callable, grid: Mapping | Iterable) -> list[dict]:
    """The points of a grid. Raises LabError for what is none, or what the function does not take."""
    if not callable(function):
        raise LabError(f"{str(function)!r:.60} cannot be called; sweep(function, grid)")
    if isinstance(grid, Mapping):
        if not grid:
            raise LabError("the grid is empty; give {parameter: values}, or [{}] for one call without any")
        for parameter, values in grid.items():
            if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
                raise LabError(f"{parameter} is {values!r:.60}, not several values; write {parameter}=[{values!r:.60}]")
        points = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    elif isinstance(grid, Iterable) and not isinstance(grid, (str, bytes)):
        points = list(grid)
    else:
        raise LabError(f"grid is {grid!r:.60}; it is {{parameter: values}} or a list of points, each {{parameter: value}}")
    try:
        takes = inspect.signature(function)
    except (TypeError, ValueError):                      # a builtin may not say
        takes = None
    for at, point in enumerate(points):
        if not isinstance(point, Mapping) or not all(isinstance(parameter, str) for parameter in point):
            raise LabError(f"point {at} is {point!r:.60}; it is {{parameter: value}}")
        points[at] = dict(point)
        try:
            if takes:
                takes.bind(**point)
        except TypeError as error:
            raise LabError(f"{name_of(function)}{takes} does not take {_shown(point)}: {error}") from None
    return points


def _row(point: dict, result: object, done: bool) -> dict:
    """One row: a result's fields, as far as they are numbers and words, beside the parameters; "result" where it has none."""
    found = _fields(result) if done else {}
    told = {name for name, value in point.items() if isinstance(value, (str, Number)) and found.get(name) is not None
            and type(found[name]) is type(value) and found[name] == value}
    return point | {f"result {name}" if name in point else name: value for name, value in found.items() if name not in told}


def _fields(result: object) -> dict:
    if isinstance(result, Mapping):
        return {str(name): value for name, value in result.items()}
    if not is_dataclass(result):
        return {"result": result}
    found = {}
    for one in fields(result):
        value = getattr(result, one.name)
        if value is None or isinstance(value, (Number, str)):
            found[one.name] = value
        elif is_dataclass(value):
            found |= {f"{one.name}.{inner}": inside for inner, inside in _fields(value).items()}
    return found


def _shown(point: Mapping) -> str:
    """`quant=Q4_K_M, context=8192`, on one line."""
    return show_path(", ".join(f"{name}={value!s:.60}" for name, value in point.items())) or "the only point"


def _folder(given: str | os.PathLike) -> Path:
    try:
        return Path(given).expanduser()
    except (TypeError, RuntimeError):                    # RuntimeError: no such user's home
        raise LabError(f"folder is {given!r:.60}; give a path") from None


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip(".")[:80] or "sweep"
