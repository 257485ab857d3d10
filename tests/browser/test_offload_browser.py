"""The notebook on offload in a real browser: run all, budgets dragged by keyboard, a run watched and stopped, both themes."""

import json
import statistics

import pytest

from llmlab.lab.offload_figures import tiers_picture
from llmlab.lab.offload_state import DEFAULTS, OffloadState
from llmlab.units import GIB

pytestmark = pytest.mark.browser
BOOK = {"name": "03_offload.ipynb", "seconds": 400, "height": 3000}
PANEL = ".llmlab-offload"
START = dict(DEFAULTS)


@pytest.fixture(autouse=True)
def fresh(book):
    """The panel as it was made, every fold closed, nothing running."""
    book.run("panel.run.end(); panel.run.wait(); panel.run._set(tries=(), ahead=(), error='', progress='', text='')\n"
             f"panel.run.update(tokens=24); panel.state.update(**{START!r})\n"
             "for button in panel.folds.buttons.values(): button.value = False")
    book.show("OffloadExplorer()")
    book.page.locator(PANEL).first.wait_for(timeout=60_000)
    book.page.locator(f"{PANEL} .js-plotly-plot .main-svg .bars path").first.wait_for(timeout=60_000)
    shown(book)


def shown(book, **settings) -> None:
    """Wait until blocks and words are what llmlab says without a page."""
    state = OffloadState(**{**START, **settings})
    counts = [len(trace["x"]) for trace in tiers_picture(state.look)["data"]]
    book.page.wait_for_function("""([where, counts]) => {
        const chart = document.querySelector(where + ' .js-plotly-plot');
        return chart && counts.every((count, i) => chart.data[i].x.length === count); }""", arg=[PANEL, counts], timeout=60_000)
    book.page.locator(f"{PANEL} [role=status]").first.get_by_text(state.answer.partition(". ")[0]).wait_for(timeout=60_000)


def test_every_cell_runs(book):
    cells = book.cells()
    assert len(cells) >= 14 and [cell for cell in cells if not cell["count"] or cell["errors"]] == []


def test_budgets_are_dragged_by_keyboard(book):
    page, panel, cells = book.page, book.page.locator(PANEL), len(book.cells())
    look = OffloadState(**START).look
    for label, setting, stops in (("on device", "gpu_budget", look.device), ("in RAM", "ram_budget", look.ram)):
        book.handle(PANEL, label).focus()
        page.keyboard.press("ArrowLeft")
        shown(book, **{setting: stops[-2]})
        page.keyboard.press("ArrowRight")
        shown(book, **{setting: stops[-1]})
        book.run(f"panel.state.update(**{START!r})")
        shown(book)
    panel.get_by_label("drive", exact=True).select_option(label="SATA 6 Gb/s SSD class · 0.56 GB/s")
    shown(book, drive="sata3-class")
    panel.get_by_role("button", name="with 64 GB of RAM").focus()
    page.keyboard.press("Enter")
    shown(book, ram="64 GB DDR5-6000")
    page.keyboard.type("xdd")                 # letters for a button; as JupyterLab's commands they would cut and delete
    assert len(book.cells()) == cells


def test_errors_are_said_and_code_moves_the_panel(book):
    panel = book.page.locator(PANEL)
    book.run("panel.state.gpu_budget = '1 GiB'")
    panel.get_by_role("status").first.get_by_text("1.00 GiB are too little").wait_for()
    book.run("panel.state.update(gpu_budget='12 GiB')")
    shown(book, gpu_budget=12 * GIB)
    assert "too little" not in panel.get_by_role("status").first.inner_text()
    panel.get_by_role("status").nth(1).get_by_text("It cannot be run: this is another computer").wait_for()
    assert panel.get_by_role("button", name="run", exact=True).is_disabled()


def test_a_reloaded_page_shows_the_present(book):
    stops = OffloadState(**START).look.ram
    book.handle(PANEL, "in RAM").focus()
    book.page.keyboard.press("ArrowLeft")
    shown(book, ram_budget=stops[-2])
    book.save()
    book.reload()
    book.show("OffloadExplorer()")
    book.page.locator(PANEL).first.wait_for(timeout=60_000)
    shown(book, ram_budget=stops[-2])
    book.handle(PANEL, "in RAM").focus()
    book.page.keyboard.press("ArrowLeft")     # and it is still live
    shown(book, ram_budget=stops[-3])


def test_it_runs_while_the_kernel_is_free_and_can_be_stopped(book, shots):
    page, panel = book.page, book.page.locator(PANEL)
    panel.get_by_role("button", name="run here: SmolLM2").click()
    start, stop = (panel.get_by_role("button", name=name, exact=True).first for name in ("run", "stop"))
    page.wait_for_function("where => !document.querySelector(where + ' button.mod-primary').disabled", arg=PANEL,
                           timeout=60_000)
    book.run("panel.run.update(tokens=96)")
    start.click()
    panel.get_by_role("status").get_by_text("tokens/s so far").wait_for(timeout=120_000)
    book.run("assert panel.run.running, 'the kernel is free meanwhile'")
    assert start.is_disabled()
    timeline = """where => { const chart = document.querySelectorAll(where + ' .js-plotly-plot')[2];
        return chart && chart.data.some(trace => trace.name === 'reading' && trace.x.length)
            && chart.data.some(trace => trace.name === 'computing' && trace.x.length); }"""
    page.wait_for_function(timeline, arg=PANEL, timeout=60_000)
    panel.screenshot(path=shots / "offload-running.png")
    stop.focus()
    page.keyboard.press("Enter")
    panel.get_by_role("status").get_by_text("Stopped.").wait_for(timeout=60_000)
    book.run("assert panel.run.tries == () and not panel.run.running; panel.run.update(tokens=6)")
    start.click()
    panel.get_by_role("status").get_by_text("measured over 6 tokens").wait_for(timeout=180_000)
    panel.get_by_role("button", name="▸ predicted against measured").click()
    panel.get_by_role("status").get_by_text("Of 1 placement").wait_for(timeout=60_000)
    assert panel.locator(".llmlab-rows:visible").locator("tbody tr").count() == 1
    page.wait_for_function("where => document.querySelectorAll(where + ' .js-plotly-plot')[1].data[3].y.length === 1",
                           arg=PANEL, timeout=60_000)
    panel.screenshot(path=shots / "offload-ran.png")
    assert book.overflow(PANEL) == []


def test_slots_are_compared(book, shots):
    page, panel = book.page, book.page.locator(PANEL)
    panel.get_by_role("button", name="run here: SmolLM2").click()
    panel.get_by_role("button", name="▸ reading ahead").click()
    start = panel.get_by_role("button", name="compare 1, 2 and 3 slots")
    start.click()
    panel.get_by_role("status").get_by_text("round 1 of").first.wait_for(timeout=60_000)
    panel.get_by_role("status").get_by_text("A token with 1 slot").wait_for(timeout=240_000)
    page.wait_for_timeout(400)
    panel.screenshot(path=shots / "offload-ahead.png")
    assert book.overflow(PANEL) == []


@pytest.mark.parametrize("width", [1400, 700])
def test_it_can_be_read_in_both_themes(book, shots, width):
    book.page.set_viewport_size({"width": width, "height": 3000})
    panel = book.page.locator(PANEL)
    for fold in ("an SSD as VRAM", "levers", "for other engines"):
        panel.get_by_role("button", name=f"▸ {fold}").click()
    book.run("panel.state.update(gpu_budget='16 GiB', ram_budget='8 GiB')")
    shown(book, gpu_budget=16 * GIB, ram_budget=8 * GIB)
    book.readable(PANEL, shots / f"offload-{width}", 60)
    book.page.set_viewport_size({"width": 1400, "height": 3000})


def test_the_budget_redraws_the_blocks_at_once(book):
    """Prints what it took."""
    times = book.latencies(20, book.handle(PANEL, "on device"), ("ArrowLeft", "ArrowRight"), PANEL)
    print(f"\nbudget to redrawn blocks, median {statistics.median(times):.0f} ms of {len(times)}, "
          f"{json.dumps([round(t) for t in times])}")
    assert len(times) == 20
