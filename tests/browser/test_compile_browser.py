"""The notebook on compiling in a real page: ways measured while the kernel stays free, charts that follow, both themes."""

import pytest

pytestmark = pytest.mark.browser
BOOK = {"name": "06_compile.ipynb", "seconds": 180}
PANEL = ".llmlab-compile"


@pytest.fixture(scope="module")
def book(book):
    """Where the panel is."""
    book.show("CompileExplorer(context")
    book.page.locator(f"{PANEL} .js-plotly-plot .main-svg .xtick text").first.wait_for(timeout=60_000)
    return book


def test_every_cell_runs(book):
    cells = book.cells()
    assert len(cells) >= 10 and [cell for cell in cells if not cell["count"] or cell["errors"]] == []


def test_it_measures_while_the_kernel_is_free_and_can_be_stopped(book):
    page, panel = book.page, book.page.locator(PANEL)
    start = panel.get_by_role("button", name="measure", exact=True)
    start.focus()
    page.keyboard.press("Enter")
    panel.get_by_role("status").first.get_by_text("easuring").wait_for(timeout=60_000)
    book.run("assert panel.state.running, 'the kernel is free meanwhile'")
    assert start.is_disabled()
    panel.get_by_role("button", name="stop").first.click()
    panel.get_by_role("status").first.get_by_text("Stopped.").wait_for(timeout=60_000)
    assert start.is_enabled()
    book.run("panel.state.context = 16")      # what was measured of another is not shown any more
    panel.get_by_role("status").first.get_by_text("Nothing was measured yet").wait_for(timeout=60_000)
    assert panel.locator(".llmlab-rows tbody tr").count() == 0
    start.click()
    panel.get_by_role("status").first.get_by_text("tokens/s lean").wait_for(timeout=120_000)
    assert panel.locator(".llmlab-rows tbody tr").count() >= 4


def test_the_charts_show_what_was_measured(book):
    page, panel = book.page, book.page.locator(PANEL)
    panel.get_by_label("roofline of").select_option("lean: llmlab's own decoder, in plain torch")
    page.wait_for_function("""where => [...document.querySelectorAll(where + ' .llmlab-rows th[scope=row]')]
        .some(cell => cell.textContent === 'attention')""", arg=PANEL, timeout=60_000)
    shown = page.evaluate("""where => [...document.querySelectorAll(where + ' .js-plotly-plot')].map(chart => chart.data
        .map(trace => [trace.name, trace.type, [...(trace.x || [])], [...(trace.y || [])]]))""", PANEL)
    bars = {name: x for name, kind, x, _ in shown[0] if kind == "bar"}
    points = {name: (x, y) for name, _, x, y in shown[1]}
    assert bars["gate, up"][-1] > 0 and len(bars["gate, up"]) >= 2       # the ways from below: eager is last
    assert len(points["what the machine allows"][0]) > 50
    assert all(len(points[name][0]) == 1 for name in ("qkv", "attention", "out", "gate, up", "down", "output"))
    assert points["layers"] == ([], [])
    book.run("panel.state.strategy = 'nothing'")
    panel.get_by_role("status").first.get_by_text("strategy is 'nothing'; give one of auto").wait_for(timeout=60_000)
    book.run("panel.state.strategy = 'auto'")


@pytest.mark.parametrize("size", [(1400, 1000), (1000, 800)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_it_can_be_read_in_both_themes(book, shots, size):
    book.page.set_viewport_size({"width": size[0], "height": size[1]})
    book.readable(PANEL, shots / f"compile-{size[0]}", 30)
