"""The rooms of the house and the one way imports run between them, read from the source; and proof that it bites."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
PACKAGE = TOP / "llmlab"

# Lowest first. A room may import from its own row and from those above it in this list.
ROOMS = (
    {"errors", "units", "places", "intervals"},
    {"catalog"},
    {"formats", "gguf", "shapes", "architectures", "hf_config", "hub", "verified", "wheels",
     "stores", "sources"},
    {"memory", "retyping", "activations", "graphs", "rates", "drivers", "calibrated", "hardware"},
    {"projectors", "settings", "speed", "overhead", "repacking", "placing", "beside", "reserving", "searching", "wording",
     "fitting", "fitmap", "exports", "levers", "workloads", "clustering"},
    # -- torch from here on --
    {"kernels"},
    {"runtime", "vocabulary"},
    {"offload"},
    {"calibration", "loading", "starting", "probes", "converting"},
    {"quality", "lossless", "requantizing", "reconcile", "benching", "roofline", "advice", "endpoints", "server",
     "simulating", "sweeps", "evaluation", "verdicts"},
    {"lab", "terminal", "cli", "__init__", "__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
TORCH_LEVEL = LEVEL["kernels"]
TORCH = {"torch", "transformers", "bitsandbytes", "accelerate"}
JUPYTER = {"ipywidgets", "plotly", "anywidget"}
LIGHT = {"numpy", "psutil"}  # what a room below the torch line may import as it is imported itself
LAZY = {("figure", "lab"), ("calibrate", "calibration"), ("doctor", "offload")}  # (function, room) of the calls upward

PUBLIC = {"model", "models", "gpu", "gpus", "machine", "fit", "measured", "size", "mix", "load", "quantize_gguf",
          "fetch", "decoder", "perplexity", "divergence", "importance", "read_importance", "plan", "best", "sweep", "serve",
          "doctor", "claims", "evaluate"}


def imports(tree: ast.Module, package: list[str]):
    """Every import as (dotted name, enclosing function or None, line), relative ones made absolute.

    `from a import b` is "a.b": b may be a module. `package` is the folder the module lies in, as names.
    """
    def visit(node, function):
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
            if isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
                inside = "TYPE_CHECKING"  # never run: a name for a type, from wherever it is defined
            if isinstance(child, ast.Import):
                yield from ((alias.name, function, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[:len(package) - child.level + 1] if child.level else []
                start = ".".join([*base, *([child.module] if child.module else [])])
                yield from ((f"{start}.{alias.name}", function, child.lineno) for alias in child.names)
            elif (isinstance(child, ast.Call) and child.args and isinstance(child.args[0], ast.Constant)
                  and getattr(child.func, "attr", getattr(child.func, "id", "")) in ("import_module", "__import__")):
                name = str(child.args[0].value)
                yield (".".join(package) + name if name.startswith(".") else name), function, child.lineno
            yield from visit(child, inside)

    yield from visit(tree, None)


def faults(package: Path) -> list[str]:
    """What breaks the rules in a package named llmlab, a line each."""
    found, uses = [], {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        where, room = str(path.relative_to(package)), parts[0]
        if room not in LEVEL:
            found.append(f"{where}: no room is called {room}; give it a place in ROOMS and in the README's map")
            continue
        for name, function, line in imports(ast.parse(path.read_text()), ["llmlab", *parts[:-1]]):
            found += [f"{where}:{line}: {fault}" for fault in _faults(room, name.split("."), function)]
            library, _, target = name.partition(".")
            target = target.split(".")[0]
            if library == "llmlab" and function != "TYPE_CHECKING" and (function, target) not in LAZY:
                uses.setdefault(room, set()).add(target)
        if len(parts) == 1 and room in PUBLIC:
            found.append(f"{where}: a module named like the public function llmlab.{room} hides it")
    return found + list(_hidden(package)) + list(_circles(uses))


def _faults(room: str, name: list[str], function: str | None):
    library = name[0]
    if library == "llmlab":
        target = name[1] if len(name) > 1 and name[1] in LEVEL else "__init__"
        if LEVEL[target] > LEVEL[room] and (function, target) not in LAZY:
            yield f"{room} imports {target}, which lies above it"
        return
    if library == "triton":
        yield "imports triton; plain torch only"
    if library in JUPYTER and room != "lab":
        yield f"imports {library}; only lab/ knows Jupyter"
    if LEVEL[room] < TORCH_LEVEL:
        if library in TORCH and function != "TYPE_CHECKING" and not (room == "formats" and function):
            yield f"imports {library} below the torch line"
        elif not function and library not in LIGHT | set(sys.stdlib_module_names):
            yield f"imports {library} as it is imported; below the torch line that is for {', '.join(sorted(LIGHT))}"
    if room in ("cli", "__init__", "__main__") and library in TORCH and not function:
        yield f"imports {library} before it is known to be needed"


def _circles(uses: dict[str, set[str]]):
    """Rooms of one row that use each other, directly or by way of others."""
    for room in uses:
        seen, ahead = set(), list(uses[room] - {room})
        while ahead:
            if (at := ahead.pop()) not in seen:
                seen.add(at)
                ahead += uses.get(at, set()) - {at}
        if room in seen:
            yield f"{room} imports itself by way of {', '.join(sorted(seen & set(uses) - {room}))}"


def _hidden(package: Path):
    """A module in a folder and a function of the folder's __init__ may not share a name."""
    for init in sorted(package.rglob("__init__.py")):
        modules = {p.stem for p in init.parent.glob("*.py")} | {p.name for p in init.parent.iterdir() if p.is_dir()}
        for node in ast.parse(init.read_text()).body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [alias.asname or alias.name for alias in node.names]
            yield from (f"{init.relative_to(package)}:{node.lineno}: {name} is a function and a module"
                        for name in names if name in modules)


def test_the_house_keeps_its_rules():
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(("path", "text", "fault"), [
    ("memory.py", "from .fitting import fit", "memory imports fitting, which lies above"),
    ("memory.py", "from . import lab", "memory imports lab, which lies above"),
    ("memory.py", "def f():\n    import llmlab.offload.plans", "memory imports offload, which lies above"),
    ("memory.py", "def figure(self):\n    from . import loading", "memory imports loading, which lies above"),
    ("memory.py", "import llmlab", "memory imports __init__, which lies above"),
    ("memory.py", "from importlib import import_module\nimport_module('llmlab.cli')", "memory imports cli, which"),
    ("formats/k.py", "from ..memory import x", "formats imports memory, which lies above"),
    ("units.py", "from . import catalog", "units imports catalog, which lies above"),
    ("memory.py", "import torch", "imports torch below the torch line"),
    ("fitting.py", "def f():\n    from transformers import AutoConfig", "imports transformers below the torch line"),
    ("formats/k.py", "import torch", "imports torch below the torch line"),
    ("memory.py", "import pandas", "imports pandas as it is imported"),
    ("fitting.py", "def figure():\n    import plotly.graph_objects", "only lab/ knows Jupyter"),
    ("quality.py", "from ipywidgets import HTML", "only lab/ knows Jupyter"),
    ("kernels/linear.py", "def f():\n    import triton.language as tl", "plain torch only"),
    ("cli.py", "import torch", "before it is known to be needed"),
    ("fit.py", "", "no room is called fit"),
    ("kernels/__init__.py", "from .linear import linear", "linear is a function and a module"),
])
def test_it_bites(tmp_path, path, text, fault):
    for name in {path, "kernels/linear.py", "offload/plans.py"}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / path).write_text(text)
    assert [f for f in faults(tmp_path) if fault in f], faults(tmp_path)


def test_a_module_named_like_a_public_function_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(LEVEL, "mix", 3)
    (tmp_path / "mix.py").touch()
    assert any("hides it" in fault for fault in faults(tmp_path))


def test_rooms_of_one_row_do_not_go_in_circles(tmp_path):
    (tmp_path / "gguf.py").write_text("from . import hub")
    (tmp_path / "hub.py").write_text("from .formats import x")
    assert faults(tmp_path) == []
    (tmp_path / "formats.py").write_text("def f():\n    from .gguf import read_header")
    assert [f for f in faults(tmp_path) if "gguf imports itself by way of formats, hub" in f]


@pytest.mark.parametrize(("path", "text"), [
    ("fitting.py", "def figure(self):\n    from .lab import figures"),
    ("hardware.py", "def calibrate(self):\n    from . import calibration"),
    ("formats/k.py", "def dequantize():\n    import torch"),
    ("kernels/linear.py", "import torch\nfrom ..formats import registry"),
    ("lab/panels.py", "import plotly, ipywidgets\nfrom ..fitting import fit"),
    ("shapes.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor"),
    ("memory.py", "import numpy as np\nimport math\nfrom .shapes import ModelSpec"),
])
def test_what_is_allowed_passes(tmp_path, path, text):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(text)
    assert faults(tmp_path) == []


def light_modules() -> list[str]:
    names = ["llmlab"]
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if LEVEL.get(parts[0], TORCH_LEVEL) < TORCH_LEVEL or parts == ("cli",):
            names.append(".".join(["llmlab", *parts]).removesuffix(".__init__"))
    return names


def test_nothing_below_the_torch_line_loads_anything_heavy():
    code = f"""
import importlib, sys
for name in {light_modules()!r}:
    importlib.import_module(name)
print(sorted(set(sys.modules) & {TORCH | JUPYTER | {"IPython", "jupyterlab", "pandas", "triton"}!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def committed() -> list[Path]:
    """What is in the repository or would be with `git add`; without git, every file that is not hidden."""
    done = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=TOP,
                          capture_output=True, text=True)
    if done.returncode == 0:
        return [TOP / name for name in done.stdout.split("\0") if name and (TOP / name).is_file()]
    return [p for p in TOP.rglob("[!.]*") if p.is_file() and "/." not in str(p.relative_to(TOP.parent))]


def too_big(paths: list[Path], limit: int = 1_000_000) -> list[str]:
    return [f"{p.name}: {p.stat().st_size} bytes" for p in paths if p.stat().st_size > limit]


def test_no_big_file_is_committed():
    assert len(committed()) > 20 and too_big(committed()) == []


def widget_state(paths: list[Path]) -> list[str]:
    notebooks = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in paths if p.suffix == ".ipynb"}
    return [name for name, book in notebooks.items() if "widgets" in book["metadata"]]


def test_no_notebook_carries_widget_state():
    assert widget_state(committed()) == []


def test_the_file_checks_bite(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(1_000_001))
    (tmp_path / "b.ipynb").write_text(json.dumps({"metadata": {"widgets": {}}, "cells": []}))
    assert too_big([tmp_path / "a.bin"]) and widget_state([tmp_path / "b.ipynb"]) == ["b.ipynb"]


SKIPS = """
import pytest
def test_library(): pytest.skip("no llama.cpp here")
def test_card(): pytest.skip("no GPU that torch can use")
@pytest.mark.gpu
def test_marked(): pytest.skip("whatever")
@pytest.mark.xfail(strict=True)
def test_expected(): assert False
@pytest.mark.skipif(True, reason="too old")
def test_condition(): pass
"""


@pytest.mark.parametrize(("ci", "counts"), [
    ("true", {"failed": 1, "errors": 2, "skipped": 2}), ("", {"failed": 0, "errors": 0, "skipped": 5})])
def test_a_skip_fails_under_ci(tmp_path, ci, counts):
    (tmp_path / "conftest.py").write_text((TOP / "tests" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_a.py").write_text(SKIPS)
    (tmp_path / "test_b.py").write_text("import pytest\npytest.importorskip('no_such_library')\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA",
                           "--continue-on-collection-errors", tmp_path], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"CI": ci})
    last = done.stdout.strip().splitlines()[-1]
    assert {word: (f"{count} {word.rstrip('s')}" in last) for word, count in counts.items() if count} == {
        word: True for word, count in counts.items() if count}, done.stdout
    assert (done.returncode != 0) == bool(ci)
    assert ("nothing may be missing but a GPU: no llama.cpp here" in done.stdout) == bool(ci)
