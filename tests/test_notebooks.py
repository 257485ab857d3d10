"""What every notebook keeps to; and proof that comparing their outputs bites."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

TOP = Path(__file__).resolve().parent.parent
FOLDER = TOP / "notebooks"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
LONGEST_CELL, LONGEST_FUNCTION, LARGEST = 8, 5, 100_000      # lines, lines, bytes
IGNORED = "nbval-ignore-output"
PRIVATE = re.compile(r"/(?:home|root|Users|tmp)/")


def faults(path: Path) -> list[str]:
    """What a notebook does that it should not, a line each."""
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    first = book.cells[0].source
    found = ["does not begin with a title and Run All first"] * (not re.match(r"# \w+[^#]+\*\*Run All first\*\*", first))
    found += ["holds widget state"] * ("widgets" in book.metadata)
    found += [f"is {path.stat().st_size} bytes"] * (path.stat().st_size > LARGEST)
    found += ["wants another kernel"] * (book.metadata["kernelspec"]["name"] != "python3")
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    for at, cell in enumerate(code, 1):
        tags = cell.metadata.get("tags", [])
        lines = cell.source.splitlines()
        say = f"cell {at} ({lines[0][:40]}) ".__add__
        found += [say(f"has {len(lines)} lines")] * (len(lines) > LONGEST_CELL)
        if IGNORED in tags:
            found += [say("stores what one machine said")] * bool(cell.outputs)
        else:
            found += [say("was not run in its turn")] * (cell.execution_count != at)
        found += [say("failed")] * any(o.output_type == "error" for o in cell.outputs)
        kinds = {kind for output in cell.outputs for kind in output.get("data", ())}
        found += [say(f"stores {kind}") for kind in sorted(kinds) if "plotly" in kind or kind.startswith("image")]
        found += [say("shows a private path")] * bool(PRIVATE.search(json.dumps(cell.outputs)))
        found += [say("defines a long function")] * any(
            len(body.splitlines()) > LONGEST_FUNCTION for body in re.findall(r"^def .*(?:\n[ \t].*)*", cell.source, re.M))
    for cell in book.cells:
        found += [f"links to {target}, which is not there" for target in re.findall(r"\]\(([^)#:]+)\)", cell.source)
                  if cell.cell_type == "markdown" and not (path.parent / target).exists()]
    return found


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_notebooks_keep_to_the_rules(path):
    assert faults(path) == []


def test_the_rules_bite(tmp_path):
    book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "other", "display_name": "x"}, "widgets": {}})
    cell = nbformat.v4.new_code_cell("def f():\n" + "    1\n" * 9, execution_count=7)
    cell.outputs = [nbformat.v4.new_output("error", ename="E", evalue="/home/me/x", traceback=[]),
                    nbformat.v4.new_output("display_data", {"application/vnd.plotly.v1+json": {}})]
    ignored = nbformat.v4.new_code_cell("1", metadata={"tags": [IGNORED]})
    ignored.outputs = [nbformat.v4.new_output("stream", text="x")]
    book.cells = [nbformat.v4.new_markdown_cell("see [a](nowhere.ipynb)" + "x" * LARGEST), cell, ignored]
    nbformat.write(book, tmp_path / "a.ipynb")
    said = " ".join(faults(tmp_path / "a.ipynb"))
    for word in ("Run All", "widget state", "bytes", "kernel", "lines", "turn", "failed", "plotly", "private path",
                 "long function", "one machine", "not there"):
        assert word in said, word


def test_the_map_lists_every_notebook_there_is():
    start = nbformat.read(FOLDER / "00_start.ipynb", 4)
    listed = re.findall(r"^\| \[(\w+)\]\((\w+)\.ipynb\) \|", "\n".join(c.source for c in start.cells), re.M)
    assert [name for name, _ in listed] == [target for _, target in listed] == [p.stem for p in BOOKS]


@pytest.mark.parametrize("path", [p for p in BOOKS if p.stem != "00_start"], ids=lambda p: p.stem)
def test_a_notebook_ends_with_something_to_try(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    assert "## What surprised us" in text and "## Try it yourself" in text


def compared(path: Path, startup: str, home: Path) -> subprocess.CompletedProcess:
    """nbval on one notebook, in kernels that run `startup` before anything else."""
    folder = home / "profile_default" / "startup"
    folder.mkdir(parents=True)
    (folder / "00.py").write_text(startup)
    env = os.environ | {"IPYTHONDIR": str(home),
                        "PYTHONPATH": os.pathsep.join(filter(None, [str(TOP), os.environ.get("PYTHONPATH")]))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", path, "--nbval", "--nbval-sanitize-with", FOLDER / "sanitize.cfg",
         "--nbval-current-env", "--nbval-cell-timeout=120", "-p", "no:cacheprovider", "-rN", "--color=no"],
        cwd=TOP, env=env, capture_output=True, text=True, timeout=300)


ONE_PERCENT = """
import llmlab.memory as memory
right = memory.tensor_bytes
memory.tensor_bytes = lambda type, shape: right(type, shape) * 101 // 100
"""
ONE_PERCENT_OF_NUMBERS = """
import llmlab.formats.dequantizing as dequantizing
right = dequantizing.weights
def wrong(known, blocks, into):
    right(known, blocks, into)
    into *= 1.01
dequantizing.weights = wrong
"""


@pytest.mark.slow
def test_one_percent_put_into_the_numbers_fails_the_comparison(tmp_path):
    """What a block says: by hand, and what is left when it is rounded once more. Without the model's run, which takes long."""
    book = nbformat.read(FOLDER / "02_quantization.ipynb", 4)
    upto = next(at for at, cell in enumerate(book.cells) if cell.source.startswith("## What a bit buys"))
    book.cells = book.cells[:upto]
    nbformat.write(book, tmp_path / "short.ipynb")
    (tmp_path / "conftest.py").write_text((FOLDER / "conftest.py").read_text())
    said = compared(tmp_path / "short.ipynb", ONE_PERCENT_OF_NUMBERS, tmp_path / "wrong").stdout
    assert "Cell execution caused an exception" in said and "assert np.array_equal(by_hand" in said, said[-3000:]
    assert "Cell outputs differ" in said and re.search(r"\d+ passed", said), said[-3000:]


@pytest.mark.slow
def test_one_percent_put_into_the_weights_fails_the_comparison(tmp_path):
    done = compared(FOLDER / "01_fit.ipynb", ONE_PERCENT, tmp_path)
    said = done.stdout
    assert done.returncode == 1, said[-3000:] + done.stderr[-1000:]
    count = int(re.search(r"(\d+) failed", said)[1])
    assert count >= 5 and said.count("Cell outputs differ") == count, said[-3000:]
    assert "Cell execution caused an exception" not in said and "Traceback (most" not in said
    assert " 0 passed" not in said and re.search(r"\d+ passed", said)      # what does not rest on weights still agrees
