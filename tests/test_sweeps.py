"""Sweeps: the same results however they are computed, nothing computed twice, and nothing lost when something dies.

Dask and Ray are real clusters here, of two worker processes each.
"""

import contextlib
import functools
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import uuid
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import psutil
import pytest
from joblib.externals.loky import get_reusable_executor

import llmlab
from llmlab.errors import LabError
from llmlab.sweeps import backends, sweep
from llmlab.sweeps.contents import is_own, key_of
from llmlab.sweeps.keeping import Kept

TOP = Path(__file__).resolve().parent.parent
GRID = {"x": [3, 1, 2], "y": [10, 20]}


@dataclass(frozen=True)
class Pair:
    total: int
    label: str
    numbers: np.ndarray


def pair(x: int, y: int = 1) -> Pair:
    return Pair(x + y, f"{x}|{y}", np.arange(x))


def counted(x: int, calls: str) -> int:
    """Leaves a file behind for each call."""
    Path(calls, f"{x}-{uuid.uuid4().hex}").touch()
    return x * x


def failing(x: int) -> float:
    return 1 / (x - 1)


def deadly(x: int, marks: str, deaths: dict) -> int:
    """Kills its process when it is called with some x, so many times: `deaths`, {x: times}."""
    if len(list(Path(marks).glob(f"{x}-*"))) < deaths.get(x, 0):
        Path(marks, f"{x}-{uuid.uuid4().hex}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return x * x


@functools.cache
def opened(path: str) -> str:
    """Something large that a worker opens once."""
    Path(path, name := uuid.uuid4().hex).touch()
    return name


def studied(x: int, path: str) -> dict:
    time.sleep(0.02)
    return {"pair": pair(x), "inverse": 1 / (x - 1), "opened": opened(path)}


def slow_import(x: int) -> bool:
    return "torch" in sys.modules


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path_factory.mktemp("cache")))


def children() -> set[psutil.Process]:
    return {one for one in psutil.Process().children(recursive=True) if one.is_running()}


def tracker(process: psutil.Process) -> bool:
    """loky's own, which stays as long as this process does."""
    with contextlib.suppress(psutil.Error):
        return "resource_tracker" in " ".join(process.cmdline())
    return False


def gone(processes: set[psutil.Process], seconds: float = 30) -> bool:
    return not psutil.wait_procs(processes, seconds)[1]


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left():
    before = children()
    yield
    get_reusable_executor().shutdown(wait=True, kill_workers=True)
    left = {one for one in children() - before if not tracker(one)}
    assert gone(left), left


@pytest.fixture(scope="module")
def dask():
    import dask
    from dask.distributed import Client, LocalCluster

    folder = tempfile.mkdtemp()
    settings = {"temporary-directory": folder, "distributed.worker.memory.terminate": False}
    with dask.config.set(settings), LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50,
            memory_limit=0) as cluster, Client(cluster) as client:
        yield client
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def ray():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    folder = tempfile.mkdtemp(prefix="r")                # short: sockets lie in it
    try:
        for last in (False, False, True):                # it gives a busy computer 30 seconds for its first process
            try:
                ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False,
                         _temp_dir=folder, configure_logging=False)
                break
            except Exception:
                ray.shutdown()
                if last:
                    raise
        yield ray
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


CLUSTERS = ("dask", "ray")


@pytest.fixture(params=CLUSTERS)
def cluster(request):
    request.getfixturevalue(request.param)
    return request.param


# -- the grid and the table ------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_in_its_order_and_the_table_is_tidy():
    done = sweep(pair, GRID, progress=False)
    assert [tuple(point.values()) for point in done.points] == [(3, 10), (3, 20), (1, 10), (1, 20), (2, 10), (2, 20)]
    assert done.table[:2] == [{"x": 3, "y": 10, "total": 13, "label": "3|10"}, {"x": 3, "y": 20, "total": 23, "label": "3|20"}]
    assert [len(one.numbers) for one in done.results] == [3, 3, 1, 1, 2, 2]
    assert len(done) == 6 and done[0] == done.table[0] and list(done.to_frame()["total"]) == [13, 23, 11, 21, 12, 22]
    assert done.answer.startswith("6 of 6 points, 0 from before, 0 failed; ") and "label" in repr(done)


def test_points_may_be_a_list_and_lack_what_has_a_default():
    done = sweep(pair, [{"x": 1}, {"x": 2, "y": 5}, {"x": 1}], progress=False)
    assert [row["total"] for row in done.table] == [2, 7, 2] and [row["y"] for row in done.table] == [None, 5, None]
    assert sweep(pair, [], progress=False).answer == "0 of 0 points, 0 from before, 0 failed."
    assert len(sweep(lambda: 7, [{}], progress=False).table) == 1


@pytest.mark.parametrize(("result", "columns"), [
    (5, {"result": 5}), (None, {"result": None}), ({"a": 1, "x": 2}, {"a": 1, "result x": 2}), ({"a": 1, "x": 0}, {"a": 1}),
    (np.float32(2), {"result": 2})])
def test_what_is_returned_becomes_columns(result, columns):
    assert sweep(lambda x: result, {"x": [0]}, progress=False).table == [{"x": 0} | columns]


@pytest.mark.parametrize(("grid", "said"), [
    ({"x": "Q4_0"}, "x is 'Q4_0', not several values"), ({"x": 3}, "x is 3, not several values"), (5, "grid is 5"),
    ({}, "the grid is empty; "),
    ([3], "point 0 is 3"), ({"z": [1]}, "does not take z=1"), ([{}], "missing a required argument: 'x'"),
    ({"x": [object()]}, "x of x=<object object"), ({"x": [open]}, None)])
def test_a_grid_that_is_none_is_one_clear_line(grid, said):
    if said is None:                                     # a library's function counts by its name
        assert sweep(lambda x: 1, grid, progress=False).table[0]["result"] == 1
        return
    with pytest.raises(LabError) as error:
        sweep(pair, grid, progress=False)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("options", "said"), [
    ({"backend": "slurm"}, "there are loky, threading, dask, ray"), ({"n_jobs": 0}, "n_jobs is 0"),
    ({"on_error": "stop"}, '"keep" or "raise"'), ({"folder": "/dev/null/x"}, "cannot be written"),
    ({"folder": 3}, "folder is 3; give a path"),
    ({"folder": "a\0b"}, "cannot be written"), ({"folder": "~nobody-at-all/x"}, "give a path"),
    ({"name": 3}, "name is 3; give a text"), ({"n_jobs": np.float64(1)}, "n_jobs is"), ({"n_jobs": True}, "n_jobs is True")])
def test_an_option_that_cannot_be_is_one_clear_line(options, said):
    with pytest.raises(LabError, match=said):
        sweep(pair, GRID, progress=False, **options)


def test_a_folder_may_lie_in_the_home_and_a_number_of_workers_be_numpy_s(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = sweep(pair, {"x": [1]}, folder="~/sw", n_jobs=np.int64(1), progress=False)
    assert done.folder == tmp_path / "sw" and len(list(done.folder.iterdir())) == 1


# -- what a result is found by ----------------------------------------------------------------------------------------


def test_what_was_computed_is_found_again_and_fresh_computes_it(tmp_path):
    grid = {"x": [1, 2, 3], "calls": [str(tmp_path)]}
    sweep(counted, grid, progress=False)
    again = sweep(counted, {"x": [3, 4, 2], "calls": [str(tmp_path)]}, progress=False)
    assert (again.found, again.results, len(list(tmp_path.glob("*-*")))) == (2, (9, 16, 4), 4)
    assert sweep(counted, grid, progress=False, fresh=True).found == 0 and len(list(tmp_path.glob("*-*"))) == 7


def made(body: str, **names):
    exec(f"def f(x):\n    return {body}", space := {"__name__": "__main__", **names})
    return space["f"]


def test_another_function_has_another_key_wherever_the_difference_lies():
    def inner(step):
        return lambda x: x + step

    helper = made("x + 1")
    functions = [made("x"), made("x + 1"), made("x + 2"), made("x + C", C=1), made("x + C", C=2), made("g(x)", g=helper),
                 made("g(x)", g=made("x + 3")), made("[y for y in g(x)]", g=helper), inner(1), inner(2),
                 functools.partial(pair, y=1), functools.partial(pair, y=2), pair, np.square, np.sqrt, functools.cache(helper)]
    keys = [key_of(("f", one)) for one in functions]
    assert len(set(keys)) == len(keys)
    assert keys == [key_of(("f", one)) for one in functions]
    assert key_of(("f", made("x + 1"))) == keys[1] and key_of(("f", inner(2))) == keys[9]


def defined(text: str, name: str = "f"):
    """What a text defines, as if it were in a notebook."""
    exec(textwrap.dedent(text), space := {"__name__": "__main__"})
    return space[name]


@pytest.mark.parametrize(("one", "other"), [
    ("def f(x, kw): return kw", "def f(x, **kw): return kw"), ("def f(x, kw): return kw", "def f(x, *kw): return kw"),
    ("def f(x, y): return x", "def f(x, /, y): return x"), ("def f(x, y): return x", "def f(x, *, y): return x"),
    ("""
     def f(x):
        try:
            y = g(x)
            return h(y)
        except ValueError:
            return 0""", """
     def f(x):
        try:
            y = g(x)
        except ValueError:
            return 0
        else:
            return h(y)"""),
    ("""
     class Conf:
         TABLE = {"a": 1}
     def f(x): return Conf.TABLE[x]""", """
     class Conf:
         TABLE = {"a": 2}
     def f(x): return Conf.TABLE[x]"""),
    *((f"class C:\n    A = {one}\ndef f(x): return C.A", f"class C:\n    A = {other}\ndef f(x): return C.A")
      for one, other in (("(1, 2)", "(1, 3)"), ("[1]", "[2]"), ("{1}", "{2}"), ("__import__('functools').partial(len, 1)",
                         "__import__('functools').partial(len, 2)"), ("__import__('re').I", "__import__('re').M"),
                         ("__import__('functools').partialmethod(len, 1)", "__import__('functools').partialmethod(len, 2)"),
                         ("__import__('functools').cache(lambda self: 1)", "__import__('functools').cache(lambda self: 2)"))),
    ("import enum\nclass C(enum.Enum):\n    A = 1\ndef f(x): return C.A",
     "import enum\nclass C(enum.Enum):\n    A = 2\ndef f(x): return C.A")])
def test_an_edit_of_a_signature_a_clause_or_a_class_has_another_key(one, other):
    assert key_of(("f", defined(one))) == key_of(("f", defined(one))) != key_of(("f", defined(other)))


def test_a_class_whose_content_cannot_be_told_is_refused():
    with pytest.raises(LabError, match="C, which f.. reads,.TABLE is of type object, whose content cannot be told"):
        key_of(("f", defined("class C:\n    TABLE = [object()]\ndef f(x): return C.TABLE")))


def imports_inside(x: int):
    import inside_of_mine.scaling as scaling
    from inside_of_mine.deeper import other

    return scaling.scaled(x) + scaling.SCALE + other.ONE


def test_what_a_function_imports_as_it_runs_counts(tmp_path, monkeypatch):
    """By its file, and the files that one imports; whether it is imported already makes no difference."""
    package = tmp_path / "inside_of_mine"
    (package / "deeper").mkdir(parents=True)
    texts = {"__init__": "", "scaling": "def scaled(x): return x * SCALE\nfrom .scale import SCALE", "scale": "SCALE = 2",
             "deeper/__init__": "", "deeper/other": "from .. import one\nONE = one.ONE", "one": "ONE = 1"}
    for name, text in texts.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    first = key_of(("f", imports_inside))
    assert "inside_of_mine" not in sys.modules
    assert imports_inside(1) == 5 and key_of(("f", imports_inside)) == first
    keys = {first}
    for name, text in texts.items():
        (package / f"{name}.py").write_text(f"{text}  # said otherwise")
        assert key_of(("f", imports_inside)) in keys
        (package / f"{name}.py").write_text(f"{text}\nMORE = 1")
        keys.add(key_of(("f", imports_inside)))
    assert len(keys) == 7
    (package / "one.py").write_text("not Python")
    assert key_of(("f", imports_inside)) not in keys


@pytest.mark.parametrize(("file", "own"), [
    ("/home/a/.local/lib/python3.11/site-packages/x.py", False), ("/usr/lib/python3/dist-packages/x/y.py", False),
    (os.__file__, False), (os.path.dirname(os.__file__) + "-mine/x.py", True), ("/home/a/study.py", True), (None, False)])
def test_libraries_are_told_from_your_own_by_where_they_lie(file, own, monkeypatch):
    monkeypatch.setitem(sys.modules, "some_module", types.SimpleNamespace(__file__=file))
    assert is_own("some_module") == own


class Colour(Enum):
    RED = 1


def test_what_a_function_reads_of_a_module_of_your_own_counts(tmp_path, monkeypatch):
    (tmp_path / "helpers_of_mine.py").write_text("SCALE = 2\nOTHER = object()\ndef scaled(x): return x * SCALE\n")
    monkeypatch.syspath_prepend(tmp_path)
    helpers = importlib.import_module("helpers_of_mine")
    function = made("helpers.scaled(x)", helpers=helpers)
    keys = [key_of(("f", function)), key_of(("f", function))]
    helpers.SCALE = 3
    keys.append(key_of(("f", function)))
    helpers.scaled = lambda x: x
    keys.append(key_of(("f", function)))
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_what_a_library_made_of_something_of_yours_counts_by_that():
    pairs = [({"a": 1}.get, {"a": 2}.get), (np.vectorize(lambda x: x), np.vectorize(lambda x: x + 1))]
    assert all(key_of(("f", one)) != key_of(("f", other)) for one, other in pairs)
    assert key_of(("f", {"a": 1}.get)) == key_of(("f", {"a": 1}.get))
    import torch

    endless = []
    endless.append(endless)
    for value in (np.frompyfunc(lambda x: x, 1, 1), endless):
        with pytest.raises(LabError, match="content cannot be told"):
            key_of(("f", value))
    for value in (len, np.add, np.linalg.norm, torch.relu, torch.no_grad, str.upper, torch.nn.functional.max_pool2d):
        assert key_of(("f", value))


class Unsaid(Exception):
    def __str__(self):
        raise ValueError


def measured_error(x: int) -> dict:
    if x == 2:
        raise Unsaid
    return {"error": x / 8}


def test_a_result_named_error_stays_and_an_exception_may_fail_itself():
    found = sweep(measured_error, {"x": [1, 2]}, progress=False)
    assert [row["error"] for row in found.table] == [0.125, None]
    assert [row["failure"] for row in found.table] == [None, "Unsaid"]


def test_values_count_by_their_content(tmp_path):
    one, other, folder = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    one.write_text("1")
    other.write_text("1")
    folder.mkdir()
    values = [None, 1, 1.0, True, "1", b"1", (1,), [1], {1}, {"a": 1}, {"a": 2}, Colour.RED, np.int64(1), np.arange(3),
              np.arange(3.0), np.arange(3).reshape(3, 1), one, other, str(one), folder, range(3), np.dtype("f4"), Pair, np]
    keys = [key_of(("x", value)) for value in values]
    assert len(set(keys)) == len(keys)
    assert key_of(("x", {"b": 1, "a": pair})) == key_of(("x", {"a": pair, "b": 1}))
    assert key_of(("x", {3, 1, 2})) == key_of(("x", {1, 2, 3}))
    before = [key_of(("x", value)) for value in (one, str(one), folder)]
    one.write_text("22")
    (folder / "new").touch()
    assert not set(before) & {key_of(("x", value)) for value in (one, str(one), folder)}


def test_tensors_count_by_their_content():
    import torch

    values = [torch.zeros(2), torch.ones(2), torch.zeros(2, 1), torch.zeros(2).bfloat16(), torch.float16, torch.float32]
    assert len({key_of(("x", value)) for value in values}) == len(values)
    assert key_of(("x", torch.zeros(2))) == key_of(("x", torch.zeros(2)))


def test_keys_are_the_same_in_another_process():
    """Sets and dicts are told in an order of their own, whatever a process' hashes are."""
    code = "import test_sweeps as t\nprint(t.key_of(('f', t.deadly), ('x', {'a', 'b', 'c', 'd'}), ('y', t.Pair)))"
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
                           env=os.environ | {"PYTHONPATH": f"{TOP}{os.pathsep}{TOP / 'tests'}", "PYTHONHASHSEED": seed}).stdout
            for seed in ("1", "2")}
    assert len(said) == 1 and len(said.pop().strip()) == 32


def test_what_cannot_be_told_is_refused_unless_a_key_says_it():
    model = object()
    with pytest.raises(LabError, match="model, which <lambda>.* closes over, is of type object, whose content cannot be told"):
        sweep(lambda x: str(model)[:1], {"x": [1]}, progress=False)
    first = sweep(lambda x: str(model)[:1], {"x": [1]}, key="of today", progress=False)
    assert first.found == 0 and sweep(lambda x: "other", {"x": [1]}, key="of today", progress=False).results == ("<",)
    assert sweep(lambda x: "other", {"x": [1]}, key="of tomorrow", progress=False).results == ("other",)


def test_a_damaged_file_is_computed_again_and_said(tmp_path):
    grid = {"x": [1, 2, 3, 4]}
    folder = sweep(pair, grid, progress=False).folder
    cut, changed, foreign, old = sorted(folder.iterdir())
    cut.write_bytes(cut.read_bytes()[:-3])
    changed.write_bytes(changed.read_bytes()[:-3] + b"abc")
    foreign.write_bytes(b"")
    old.write_bytes(b"llmlab result 1\n" + bytes(50))
    again = sweep(pair, grid, progress=False)
    assert again.found == 0 and [row["total"] for row in again.table] == [2, 3, 4, 5]
    assert len(again.notes) == 4 and again.answer.count("was computed again") == 4 and cut.name in again.answer
    assert "an older llmlab kept it otherwise" in again.answer
    assert sweep(pair, grid, progress=False).found == 4


def test_several_processes_may_write_the_same_result(tmp_path):
    kept, stop = Kept(tmp_path), time.monotonic() + 0.5

    def write(byte: bytes):
        while time.monotonic() < stop:
            kept.put("k", 1.0, byte * 100_000)

    threads = [threading.Thread(target=write, args=(byte,)) for byte in (b"a", b"b")]
    kept.put("k", 1.0, b"a" * 100_000)
    [one.start() for one in threads]
    while time.monotonic() < stop:
        assert set(kept.get("k")[1]) in ({97}, {98})
    [one.join() for one in threads]
    assert [one.name for one in tmp_path.iterdir()] == ["k.result"]


LATE = """
from dataclasses import dataclass
@dataclass
class Thing:
    x: int
"""


def late(x: int, folder: str):
    """Returns what is of a module that only it imports, in a worker perhaps."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from late_of_mine.things import Thing

    return Thing(x)


def later(x: int):
    return importlib.import_module("late_of_mine.things").Thing(x)


@pytest.fixture
def late_module(tmp_path, monkeypatch):
    (tmp_path / "late_of_mine").mkdir()
    (tmp_path / "late_of_mine" / "__init__.py").touch()
    (tmp_path / "late_of_mine" / "things.py").write_text(LATE)
    monkeypatch.syspath_prepend(tmp_path)
    yield str(tmp_path)
    forgotten()


def forgotten() -> None:
    for name in [name for name in sys.modules if name.startswith("late_of_mine")]:
        del sys.modules[name]


@pytest.mark.parametrize("options", [{}, {"n_jobs": 2}], ids=["here", "loky"])
def test_a_result_of_a_module_that_is_not_imported_yet_is_kept_and_found(options, late_module):
    grid = {"x": [1, 2], "folder": [late_module]}
    for found in (0, 2):
        done = sweep(late, grid, progress=False, **options)
        assert ([one.x for one in done.results], done.found, done.notes) == ([1, 2], found, ())
        assert type(done.results[0]) is sys.modules["late_of_mine.things"].Thing
        forgotten()


def test_what_could_not_be_opened_stays_where_it_is_not_computed_anew(late_module):
    folder = sweep(later, {"x": [1]}, key=1, progress=False).folder
    forgotten()
    assert sweep(failing, {"x": [1]}, key=1, folder=folder, progress=False).failures and len(list(folder.iterdir())) == 2


def test_finding_a_result_imports_nothing_that_the_function_does_not_name(late_module):
    sweep(later, {"x": [1]}, progress=False)
    forgotten()
    done = sweep(later, {"x": [1, 2]}, progress=False)
    assert done.found == 0 and [one.x for one in done.results] == [1, 2]
    assert "which is not imported here; import late_of_mine.things first" in done.notes[0]


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"n_jobs": 2}], ids=["here", "loky"])
def test_failures_are_kept_beside_results_and_tried_again(options):
    done = sweep(failing, {"x": [0, 1, 2]}, progress=False, **options)
    assert done.results == (-1.0, None, 1.0) and done.done == (True, False, True)
    assert [row["error"] for row in done.table] == [None, "ZeroDivisionError: division by zero", None]
    [failure] = done.failures
    assert failure.point == {"x": 1} and "return 1 / (x - 1)" in failure.traceback
    assert "2 of 3 points, 0 from before, 1 failed" in done.answer and "x=1 failed: ZeroDivisionError" in done.answer
    [told] = done.folder.glob("*.failure")
    assert "x=1" in told.read_text() and "Traceback" in told.read_text()
    again = sweep(failing, {"x": [0, 1, 2]}, progress=False)
    assert again.found == 2 and len(again.failures) == 1


def test_a_failure_that_goes_leaves_nothing_behind(tmp_path):
    def early(x):
        return len(os.listdir(marks))

    marks = str(tmp_path / "marks")
    assert sweep(early, {"x": [1]}, progress=False, key=1).failures
    os.mkdir(marks)
    done = sweep(early, {"x": [1]}, progress=False, key=1)
    assert done.results == (0,) and [one.suffix for one in done.folder.iterdir()] == [".result"]


def test_the_first_failure_is_raised_if_asked_for_and_what_is_done_stays():
    with pytest.raises(LabError) as error:
        sweep(failing, {"x": [0, 1, 2]}, progress=False, on_error="raise")
    assert str(error.value) == "x=1: ZeroDivisionError: division by zero"
    assert "return 1 / (x - 1)" in error.value.__notes__[0]
    assert sweep(failing, {"x": [0, 2]}, progress=False).found == 1


def test_what_leaves_is_a_failure_too():
    done = sweep(lambda x: sys.exit("enough") if x else 1, {"x": [0, 1]}, progress=False)
    assert [one.error for one in done.failures] == ["SystemExit: enough"]


def unkeepable(x: int):
    """A function, which travels and is not kept; a lock, which does neither; a number."""
    return (lambda: x + 5) if x == 0 else threading.Lock() if x == 1 else x


@pytest.mark.parametrize("options", [{}, {"n_jobs": 2}], ids=["here", "loky"])
def test_what_cannot_be_kept_is_there_all_the_same_and_said(options):
    done = sweep(unkeepable, {"x": [0, 1, 2]}, progress=False, **options)
    assert done.results[0]() == 5 and done.results[2] == 2
    if options:
        assert "is lost: lock cannot be kept; return numbers" in done.failures[0].error and (
            "; TypeError: cannot pickle" in done.failures[0].error)
    else:
        assert done.results[1].acquire() and not done.failures
    assert [one for one in done.notes if "could not be kept (function cannot be kept; return numbers, " in one] and (
        "the next call computes them again" in done.answer)
    assert len(list(done.folder.glob("*.result"))) == 1
    again = sweep(unkeepable, {"x": [0, 2]}, progress=False)
    assert (again.found, again.results[0]()) == (1, 5) and again.notes[0].startswith("1 result could not be kept")


def test_what_is_new_and_fails_or_is_not_kept_hides_behind_no_old_result(tmp_path):
    def now(x):
        return {"good": 1, "worse": object()}.get(mode[0]) or 1 / 0

    mode, grid = ["good"], {"x": [1]}
    for mode[0] in ("bad", "worse"):
        sweep(lambda x: 1, grid, key=1, folder=tmp_path, progress=False)
        sweep(now, grid, key=1, folder=tmp_path, fresh=True, progress=False)
        assert sweep(now, grid, key=1, folder=tmp_path, progress=False).found == 0


def test_an_interrupt_keeps_what_is_done_and_says_how_to_go_on():
    def stopping(x):
        if x == 2 and not again:
            raise KeyboardInterrupt
        return x

    again = []
    with pytest.raises(KeyboardInterrupt, match="2 of 4 points are kept in .*; the same call goes on"):
        sweep(stopping, {"x": range(4)}, key=1, progress=False)
    again.append(1)
    assert sweep(stopping, {"x": range(4)}, key=1, progress=False).found == 2


# -- workers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"n_jobs": 2}, {"n_jobs": 2, "backend": "threading"}], ids=["loky", "threading"])
def test_workers_of_this_computer_give_what_one_process_gives(options, tmp_path):
    serial = sweep(pair, GRID, progress=False)
    done = sweep(pair, GRID, progress=False, folder=tmp_path, **options)
    assert done.found == 0 and done.table == serial.table and done.points == serial.points
    assert all(np.array_equal(a.numbers, b.numbers) and type(b) is Pair
               for a, b in zip(serial.results, done.results, strict=True))
    mine = f":{os.getpid()}"
    assert all(one.endswith(mine) == ("backend" in options) for one in done.workers)
    assert sweep(pair, GRID, progress=False, folder=tmp_path).found == 6


def test_progress_is_told_as_it_is_made():
    said = []
    sweep(pair, GRID, n_jobs=2, progress=said.append)
    assert [sum(one.done) for one in said] == [1, 2, 3, 4, 5, 6] and len(said[0].table) == 6
    assert [row["total"] for row in said[-1].table] == [13, 23, 11, 21, 12, 22]
    sweep(pair, GRID, progress=said.append)
    assert len(said) == 7 and said[-1].found == 6        # all from before: once


def test_a_bar_counts_what_was_there(capsys):
    sweep(pair, {"x": [1, 2]}, progress=False)
    sweep(pair, {"x": [1, 2, 3]}, name="pair")
    assert "pair: 100%" in (said := capsys.readouterr().err) and "2/3" in said and "3/3" in said


def test_a_local_function_travels_and_a_lock_does_not():
    step, lock = 5, threading.Lock()
    assert sweep(lambda x: x + step, {"x": [1, 2]}, n_jobs=2, progress=False).results == (6, 7)
    with pytest.raises(LabError, match=r"<lambda>\(\) cannot be sent to other processes \(TypeError: .*use n_jobs=1$"):
        sweep(lambda x: bool(lock) + x, {"x": [1, 2]}, key=1, n_jobs=2, progress=False)


def test_threads_get_their_part_of_the_cores_and_processes_start_light():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        done = sweep(lambda x: torch.get_num_threads(), {"x": [1, 2]}, n_jobs=2, backend="threading", progress=False)
        assert done.results == (2, 2) and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert sweep(slow_import, {"x": [1, 2]}, n_jobs=2, progress=False).results == (False, False)


def test_a_worker_that_is_killed_costs_only_what_it_was_at(tmp_path):
    done = sweep(deadly, {"x": range(8), "marks": [str(tmp_path)], "deaths": [{3: 1}]}, n_jobs=2, progress=False)
    assert done.results == tuple(x * x for x in range(8)) and len(os.listdir(tmp_path)) == 1 and not done.failures


def test_a_point_that_kills_its_worker_each_time_has_failed(tmp_path):
    done = sweep(deadly, {"x": range(8), "marks": [str(tmp_path)], "deaths": [{3: 9, 6: 1}]}, n_jobs=2, progress=False)
    assert done.results == tuple(None if x == 3 else x * x for x in range(8))
    # Twice alone; before that in company, where it may have died of another's death first.
    assert 2 <= len(list(tmp_path.glob("3-*"))) <= 4 and len(list(tmp_path.glob("6-*"))) == 1
    assert [one.point["x"] for one in done.failures] == [3] and "its worker died each time" in done.failures[0].error


SCRIPT = """
import os, sys, time, uuid
from pathlib import Path
from llmlab.sweeps import sweep

def slowly(x, calls):
    Path(calls, uuid.uuid4().hex).touch()
    time.sleep(0.1)
    return x * x

if __name__ == "__main__":
    done = sweep(slowly, {"x": range(14), "calls": [sys.argv[2]]}, n_jobs=2, folder=sys.argv[1], progress=False)
    print(done.found, *done.results)
"""


def test_a_sweep_that_is_killed_goes_on_where_it_was(tmp_path):
    script, kept, calls = tmp_path / "study.py", tmp_path / "kept", tmp_path / "calls"
    script.write_text(textwrap.dedent(SCRIPT))
    calls.mkdir()
    command = [sys.executable, script, kept, calls]
    env = os.environ | {"PYTHONPATH": str(TOP)}
    first = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        limit = time.monotonic() + 60
        while len(list(kept.glob("*.result"))) < 4 and time.monotonic() < limit:
            time.sleep(0.02)
        first.kill()
        first.wait()
        done = len(list(kept.glob("*.result")))
        assert 4 <= done < 14
    finally:
        os.killpg(first.pid, signal.SIGKILL)             # its workers, which would wait for more for some seconds
    before = len(list(calls.iterdir()))
    said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    assert list(map(int, said)) == [done, *(x * x for x in range(14))]
    assert len(list(calls.iterdir())) - before == 14 - done


# -- clusters ---------------------------------------------------------------------------------------------------------


def test_a_cluster_gives_what_one_process_gives(cluster, tmp_path):
    """Results, failures told in full, progress as it is made, a function's own classes and caches, what was kept."""
    grid, said = {"x": range(6), "path": [str(tmp_path)]}, []
    serial = sweep(studied, grid, progress=False)
    before = set(os.listdir(tmp_path))
    done = sweep(studied, grid, progress=said.append, fresh=True, backend=cluster)
    assert [{**row, "opened": 0, "pair": str(row["pair"])} for row in done.table] == [
        {**row, "opened": 0, "pair": str(row["pair"])} for row in serial.table]
    assert [type(one["pair"]) for one in done.results if one] == [Pair] * 5
    assert done.failures[0].error == "ZeroDivisionError: division by zero" and "in studied" in done.failures[0].traceback
    assert [sum(one.done) + len(one.failures) for one in said] == [1, 2, 3, 4, 5, 6]
    assert done.workers and not any(one.endswith(f":{os.getpid()}") for one in done.workers)
    mine = {one["opened"] for one in done.results if one}
    assert len(mine) == len(set(os.listdir(tmp_path)) - before) == len(done.workers) <= 2
    assert sweep(studied, grid, progress=False).found == 5


def test_what_cannot_be_kept_comes_back_from_a_cluster(cluster):
    def local(x):
        @dataclass
        class Local:
            x: int

        return [Local(x), lambda: Local(x)]

    done = sweep(local, {"x": [1, 2]}, backend=cluster, progress=False)
    assert [(one.x, two().x) for one, two in done.results] == [(1, 1), (2, 2)] and not done.failures
    assert done.notes[0].startswith("2 results could not be kept (function cannot be kept")


def test_workers_of_a_cluster_that_are_killed_cost_only_what_they_were_at(cluster, tmp_path):
    """One is killed under 2, once; whoever computes 4 is killed each time, and that alone has failed."""
    grid = {"x": range(5), "marks": [str(tmp_path)], "deaths": [{2: 1, 4: 99}]}
    done = sweep(deadly, grid, backend=cluster, progress=False)
    assert len(list(tmp_path.glob("2-*"))) == 1 and len(list(tmp_path.glob("4-*"))) >= 2
    assert [one.point["x"] for one in done.failures] == [4] and "its worker died each time" in done.failures[0].error
    serial = sweep(deadly, {**grid, "x": range(4)}, fresh=True, progress=False)
    assert done.results == (*serial.results, None) == (0, 1, 4, 9, None)


def test_a_dask_worker_that_is_killed_in_the_middle_changes_nothing(dask, tmp_path):
    grid = {"x": range(8), "marks": [str(tmp_path)], "deaths": [{3: 1}]}
    done = sweep(deadly, grid, backend="dask", progress=False)
    assert len(os.listdir(tmp_path)) == 1 and not done.failures
    assert done.table == sweep(deadly, grid, fresh=True, progress=False).table


def test_more_workers_than_a_ray_cluster_has_is_one_clear_line(ray):
    with pytest.raises(LabError, match="ray gave up .*only 2 CPUs.*; 0 of 6 points are kept in .*same call goes on"):
        sweep(pair, GRID, backend="ray", n_jobs=9, progress=False)


def test_a_single_dask_worker_is_used_all_the_same():
    from dask.distributed import Client, LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0", silence_logs=50,
                      memory_limit=0) as cluster, Client(cluster):
        assert backends.backend_of("dask", None).settings["backend"].effective_n_jobs(-1) == 2


@pytest.mark.parametrize(("name", "said"), [("dask", "Client"), ("ray", "ray.init")])
def test_a_cluster_that_is_not_there_is_one_clear_line(name, said):
    code = f"import llmlab\ntry:\n    llmlab.sweep(abs, [], backend={name!r})\nexcept llmlab.LabError as e:\n    print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(TOP)})
    assert f'backend="{name}" needs a cluster' in done.stdout and said in done.stdout, done.stderr


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_s_package_that_is_missing_is_one_clear_line(name, monkeypatch):
    for module in ("distributed", "ray"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LabError, match=r"is not installed: pip install 'llmlab\[cluster\]'"):
        backends.backend_of(name, None)


def test_the_public_name():
    assert llmlab.sweep is sweep
