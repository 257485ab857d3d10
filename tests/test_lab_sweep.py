"""A sweep watched: its picture has every line from the start, and points as they are done."""

import pytest

from llmlab.errors import LabError
from llmlab.lab import SweepChart
from llmlab.lab.sweep_figures import sweep_picture
from llmlab.sweeps import sweep

GRID = {"kind": ["a", "b"], "x": [4, 1]}


def rising(kind: str, x: int) -> dict:
    return {"y": 1 / (x - 1) if kind == "b" else x * 10}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))


def test_lines_are_there_from_the_start_and_points_as_they_are_done():
    seen = []
    sweep(rising, GRID, progress=lambda so_far: seen.append(sweep_picture(so_far, "x", "y", by="kind")))
    assert [[(line["name"], line["x"]) for line in one["data"]] for one in seen] == [
        [("a", [4]), ("b", [])], [("a", [1, 4]), ("b", [])], [("a", [1, 4]), ("b", [4])], [("a", [1, 4]), ("b", [4])]]
    low, high = seen[0]["layout"]["xaxis"]["range"]
    assert low < 1 and high > 4 and seen[0]["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"


def test_words_along_an_axis_keep_their_order():
    done = sweep(rising, GRID, progress=False)
    picture = sweep_picture(done, "kind", "y")
    assert picture["layout"]["xaxis"]["categoryarray"] == ["a", "b"] and len(picture["data"]) == 1


def test_the_chart_follows_the_sweep_and_says_its_answer():
    chart = SweepChart("x", "y", by="kind", logarithmic=True)
    assert chart.answer == "nothing is done yet"
    done = sweep(rising, GRID, progress=chart)
    assert [list(line.x) for line in chart.children[0].figure.data] == [[1, 4], [4]]
    assert "3 of 4 points" in chart.answer and "1 failed" in done.answer and "ZeroDivisionError" in chart.children[1].html
    assert repr(chart) == "<chart of a sweep: y along x>"


def test_an_axis_that_is_none_is_one_clear_line():
    with pytest.raises(LabError, match="'z' is no parameter of rising; it has kind, x"):
        sweep_picture(sweep(rising, GRID, progress=False), "z", "y")
