"""How long each control takes: from the key to the redrawn chart, in a real browser, in the page's own time.

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

PRESSES, FEWER, BAR = 40, 12, 100.0        # ms: what is aimed at
FOLDS = ("engine settings", "levers", "compare", "command", "share and save")


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
            found[f"{name}, context slider"] = book.latencies(PRESSES)
            if name == "01_fit.ipynb":
                found |= each_control(book)
            book.page.close()
        browser.close()
    return found


def each_control(book) -> dict[str, list[float]]:
    """Milliseconds of every control by the keyboard; then of the context slider with each fold open, and with all."""
    found, panel = {}, book.panel()
    book.run("panel.state.forget()\npanel.state.update(model='llama-3.1-8b', quant='Q4_K_M', card='rtx-3060-12gb', "
             "context=8192)\npanel.unfold('engine settings')")
    book.settle()
    lists = {name: panel.get_by_label(name, exact=True) for name in ("model", "quant", "KV cache", "card", "engine", "ubatch",
                                                                     "desktop", "how many", "at once")}
    for name, control in lists.items():
        found[f"  {name}"] = book.latencies(FEWER, control, ("ArrowDown", "ArrowUp") if name not in ("how many", "at once")
                                            else ("ArrowUp", "ArrowDown"))
    layers = panel.locator(".widget-slider [role=slider]:visible").nth(book.slider("GPU layers"))
    found["  GPU layers"] = book.latencies(FEWER, layers, ("ArrowLeft", "ArrowRight"))
    found["  flash attention"] = book.latencies(FEWER, panel.get_by_label("flash attention"), ("Space", "Space"))
    book.run("panel.state.update(gpu_layers='auto')")
    for fold in FOLDS:
        book.run(f"for button in panel.folds.buttons.values(): button.value = False\npanel.unfold({fold!r})")
        if fold == "compare":
            book.run("panel.state.keep()")
        book.settle()
        found[f"  context slider, {fold} open"] = book.latencies(FEWER)
    book.run(f"for title in {FOLDS!r}: panel.unfold(title)")
    book.settle()
    found["  context slider, all open"] = book.latencies(FEWER)
    for model, card in (("llama-3-70b", "rtx-3090-24gb"), ("mixtral-8x22b", "rtx-3090-24gb")):
        book.run(f"panel.state.forget(); panel.state.update(model={model!r}, quant='Q4_K_M', card={card!r}, context=8192)\n"
                 "for button in panel.folds.buttons.values(): button.value = False")
        book.settle()
        found[f"  context slider, {model}"] = book.latencies(FEWER)
    book.show("FitMapExplorer(")
    whole = book.page.locator(".llmlab-map").first
    whole.locator(".js-plotly-plot .hm image").wait_for()
    slider = whole.locator("[role=slider]:visible").first
    found["map, context slider"] = book.latencies(FEWER, slider, where=".llmlab-map")
    cache = whole.get_by_label("KV cache", exact=True)
    found["map, KV cache"] = book.latencies(FEWER, cache, ("ArrowDown", "ArrowUp"), ".llmlab-map")
    return found


def measure() -> dict[str, list[float]]:
    return {"state alone, Python": changes(FitState()), "panel, Python": changes(FitExplorer().state), **in_browser()}


def report(found: dict[str, list[float]]) -> None:
    print(f"\n{'':<40}{'median':>10}{'min':>10}{'max':>10}  ms; the aim is {BAR:.0f} in the browser")
    for what, took in found.items():
        print(f"{what:<40}{statistics.median(took):>10.1f}{min(took):>10.1f}{max(took):>10.1f}")


def test_bench_slider():
    found = measure()
    report(found)
    assert all(len(took) in (PRESSES, FEWER) for took in found.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    path = parser.parse_args().json
    figures = measure()
    report(figures)
    if path:
        path.write_text(json.dumps({"date": str(date.today()), "unit": "ms", **figures}, indent=1) + "\n")
