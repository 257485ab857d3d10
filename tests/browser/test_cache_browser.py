"""The notebook on attention and the KV cache in a real browser: run all, drive the panel by keyboard, reload, both themes."""

import json
import statistics

import pytest

from llmlab.lab.cache_figures import memory_picture
from llmlab.lab.cache_state import CacheState

pytestmark = pytest.mark.browser
BOOK = {"name": "04_attention_and_kv_cache.ipynb", "seconds": 300, "height": 2600}
PANEL = ".llmlab-cache"
START = {"model": "llama-3.1-8b", "context": 32768, "k": "f16", "v": "f16", "recent": 0, "sinks": 0, "card": "rtx-3060-12gb",
         "quant": None}


@pytest.fixture(autouse=True)
def fresh(book):
    """The panel as it was made, every fold closed."""
    book.run(f"panel.state.update(**{START!r})\nfor button in panel.folds.buttons.values(): button.value = False")
    book.show("CacheExplorer(model")
    book.page.locator(PANEL).first.wait_for(timeout=60_000)
    book.page.locator(f"{PANEL} .js-plotly-plot .main-svg .bars path").first.wait_for(timeout=60_000)
    shown(book)


def shown(book, **settings) -> None:
    """Wait until chart and words are what llmlab says without a page."""
    state = CacheState(**{**START, **settings})
    now = memory_picture(state.look)["data"][-1]
    book.page.wait_for_function("""([where, x, y]) => {
        const chart = document.querySelectorAll(where + ' .js-plotly-plot')[1], now = chart && chart.data.at(-1);
        return now && now.x.length === 1 && now.x[0] === x && Math.abs(now.y[0] - y) < 1e-6; }""",
                                arg=[PANEL, now["x"][0], now["y"][0]], timeout=60_000)
    book.page.locator(f"{PANEL} [role=status]").first.get_by_text(state.answer.partition(": exact")[0]).wait_for(timeout=60_000)


def test_every_cell_runs(book):
    cells = book.cells()
    assert len(cells) >= 14 and [cell for cell in cells if not cell["count"] or cell["errors"]] == []


def test_the_panel_is_driven_by_keyboard(book):
    page, panel, cells = book.page, book.page.locator(PANEL), len(book.cells())
    book.handle(PANEL, "context").focus()
    page.keyboard.press("ArrowRight")
    shown(book, context=49152)
    page.keyboard.press("ArrowLeft")
    shown(book)
    for label, setting in (("K in", "k"), ("V in", "v")):
        panel.get_by_label(label, exact=True).focus()
        page.keyboard.type("q8")
        page.keyboard.press("Enter")
        shown(book, k="q8_0", v="q8_0" if setting == "v" else "f16")
    panel.get_by_role("button", name="sliding window").focus()
    page.keyboard.press("Enter")
    shown(book, model="gemma-3-12b", k="q8_0", v="q8_0")
    panel.get_by_role("button", name="longest:").focus()
    page.keyboard.press("Enter")
    shown(book, model="gemma-3-12b", k="q8_0", v="q8_0", context=70912)
    page.keyboard.type("xdd")                 # letters for a button; as JupyterLab's commands they would cut and delete
    assert len(book.cells()) == cells


def test_errors_are_said_and_code_moves_the_panel(book):
    panel = book.page.locator(PANEL)
    book.run("panel.state.k = 'q9'")
    panel.get_by_role("status").first.get_by_text("'q9' is no cache type").wait_for()
    book.run("panel.state.update(kv='q4_0', model='qwen3.5-9b')")
    shown(book, k="q4_0", v="q4_0", model="qwen3.5-9b")
    assert "is no cache type" not in panel.get_by_role("status").first.inner_text()
    rows = panel.locator(".llmlab-rows tbody tr").all_inner_texts()
    assert rows[4].split("\t")[:3] == ["hybrid", "Qwen3.5 9B", "8 full + 24 recurrent"] and rows[4].split("\t")[4] == "9.00 KiB"


def test_a_reloaded_page_shows_the_present(book):
    book.handle(PANEL, "context").focus()
    book.page.keyboard.press("ArrowRight")
    shown(book, context=49152)
    book.save()
    book.reload()
    book.show("CacheExplorer(model")
    book.page.locator(PANEL).first.wait_for(timeout=60_000)
    shown(book, context=49152)
    book.handle(PANEL, "context").focus()
    book.page.keyboard.press("ArrowRight")    # and it is still live
    shown(book, context=65536)


def test_the_numbers_themselves_are_drawn(book, shots):
    page, panel = book.page, book.page.locator(PANEL)
    book.run("panel.state.update(kv='q4_0'); panel.heat.update(layer=0, head=0, side='K', rotated=False)")
    panel.get_by_role("button", name="▸ inside the cache").click()
    panel.get_by_role("button", name="where it is worst").click()
    panel.get_by_role("status").get_by_text("Keys of layer 19, KV head 0,").wait_for(timeout=60_000)
    page.wait_for_timeout(400)
    panel.screenshot(path=shots / "cache-heat.png")
    before = page.evaluate("where => document.querySelectorAll(where + ' .js-plotly-plot')[3].data[2].zmax", PANEL)
    panel.get_by_label("rotated").focus()
    page.keyboard.press("Space")
    panel.get_by_role("status").get_by_text("KV head 0 rotated").wait_for(timeout=60_000)
    page.wait_for_function("""([where, before]) => document.querySelectorAll(where + ' .js-plotly-plot')[3].data[2].zmax
        < 0.8 * before""", arg=[PANEL, before], timeout=60_000)
    panel.screenshot(path=shots / "cache-heat-rotated.png")
    panel.get_by_label("of", exact=True).select_option("values")
    panel.get_by_role("status").get_by_text("Values of layer 19").wait_for(timeout=60_000)
    assert book.overflow(PANEL) == []


def test_it_measures_while_the_kernel_is_free_and_can_be_stopped(book, shots):
    panel = book.page.locator(PANEL)
    book.run("panel.measure.update(contexts=(256, 512), types=('f16', 'q4_0'))")
    panel.get_by_role("button", name="▸ measure").click()
    start = panel.get_by_role("button", name="measure", exact=True)
    start.click()
    panel.get_by_role("status").get_by_text("cells filled").wait_for(timeout=60_000)
    book.run("assert panel.measure.running, 'the kernel is free meanwhile'")
    assert start.is_disabled()
    panel.get_by_role("button", name="stop").click()
    panel.get_by_role("status").get_by_text("Stopped.").wait_for(timeout=60_000)
    start.click()
    panel.get_by_role("status").get_by_text("to the byte, at each of 4 measurements").wait_for(timeout=180_000)
    assert panel.locator(".llmlab-rows").nth(1).locator("tbody tr").count() == 4
    panel.screenshot(path=shots / "cache-measured.png")
    assert book.overflow(PANEL) == []


@pytest.mark.parametrize("width", [1400, 1000])
def test_it_can_be_read_in_both_themes(book, shots, width):
    book.page.set_viewport_size({"width": width, "height": 2600})
    panel = book.page.locator(PANEL)
    panel.get_by_role("button", name="▸ quality").click()
    book.run("panel.state.update(kv=('q8_0', 'q5_0'))")
    shown(book, k="q8_0", v="q5_0")
    book.readable(PANEL, shots / f"cache-{width}", 60)
    book.page.set_viewport_size({"width": 1400, "height": 2600})


def test_the_slider_redraws_the_charts_at_once(book):
    """Prints what it took."""
    times = book.latencies(20, book.handle(PANEL, "context"), where=PANEL)
    print(f"\ncontext to redrawn chart, median {statistics.median(times):.0f} ms of {len(times)}, "
          f"{json.dumps([round(t) for t in times])}")
    assert len(times) == 20
