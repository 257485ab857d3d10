"""How long a slider takes: from the arrow key to the redrawn chart, in a real browser, in the page's own time.

    python tests/bench/bench_slider.py [--json FILE]

Also the part of it that Python takes: one change of the state, with and without the widgets. Nothing here fails for
being slow.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
for folder in (TOP, TOP / "tests" / "browser"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import labpage  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from llmlab.lab import FitExplorer, FitState  # noqa: E402

pytestmark = pytest.mark.bench

PRESSES, BAR = 40, 100.0        # ms: what is aimed at


def changes(state: FitState) -> list[float]:
    """Milliseconds of each of 40 changes of the context."""
    took = []
    for step in range(PRESSES):
        start = time.perf_counter()
        state.context = 1024 + 256 * step
        took.append(1e3 * (time.perf_counter() - start))
    return took


def in_browser() -> dict[str, list[float]]:
    """Milliseconds of each press, by notebook."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, labpage.lab(Path(folder)) as address, sync_playwright() as playwright:
        browser = labpage.chromium(playwright)
        for name in ("00_start.ipynb", "01_fit.ipynb"):
            book = labpage.Notebook(browser, address, name).open()
            book.run_all()
            book.alone()
            book.latencies(5)       # the first ones warm up
            found[f"{name}, key to redrawn chart"] = book.latencies(PRESSES)
            book.page.close()
        browser.close()
    return found


def measure() -> dict[str, list[float]]:
    return {"state alone, Python": changes(FitState()), "panel, Python": changes(FitExplorer().state), **in_browser()}


def report(found: dict[str, list[float]]) -> None:
    print(f"\n{'':<40}{'median':>10}{'min':>10}{'max':>10}  ms of {PRESSES}, aim {BAR:.0f} in the browser")
    for what, took in found.items():
        print(f"{what:<40}{statistics.median(took):>10.1f}{min(took):>10.1f}{max(took):>10.1f}")


def test_bench_slider():
    found = measure()
    report(found)
    assert all(len(took) == PRESSES for took in found.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    path = parser.parse_args().json
    figures = measure()
    report(figures)
    if path:
        path.write_text(json.dumps({"date": str(date.today()), "unit": "ms", **figures}, indent=1) + "\n")
