"""The notebook on serving in a real browser: run all, settings by keyboard, requests served, watched, stopped, both themes."""

import pytest

from llmlab.lab.serving_state import DEFAULTS, ServingState

pytestmark = pytest.mark.browser
BOOK = {"name": "05_serving.ipynb", "seconds": 400, "height": 3000}
PANEL = ".llmlab-serving"
START = dict(DEFAULTS)


@pytest.fixture(autouse=True)
def fresh(book):
    """The panel as it was made, every fold closed, nothing running."""
    book.run("panel.run.end(); panel.run.wait()\n"
             "panel.run._set(frame=None, ran=None, race={}, load=(), sharing={}, card=None, error='', progress='')\n"
             f"panel.state.update(**{START!r})\n"
             "for button in panel.folds.buttons.values(): button.value = False")
    book.show("ServingExplorer()")
    book.page.locator(PANEL).first.wait_for(timeout=60_000)
    book.page.locator(f"{PANEL} .js-plotly-plot .main-svg .heatmaplayer image").first.wait_for(timeout=60_000, state="attached")
    shown(book)


def shown(book, **settings) -> None:
    """Wait until the pool and the words are what llmlab says without a page."""
    state = ServingState(**{**START, **settings})
    book.page.wait_for_function("""([where, count]) => {
        const chart = document.querySelector(where + ' .js-plotly-plot');
        return chart && chart.data[0].z.flat().filter(code => code !== null).length === count; }""",
                                arg=[PANEL, state.here.blocks], timeout=60_000)
    book.page.locator(f"{PANEL} [role=status]").first.get_by_text(state.answer.partition(": ")[0]).wait_for(timeout=60_000)


def test_every_cell_runs(book):
    cells = book.cells()
    assert len(cells) >= 12 and [cell for cell in cells if not cell["count"] or cell["errors"]] == []


def test_settings_are_changed_by_keyboard(book):
    page, panel, cells = book.page, book.page.locator(PANEL), len(book.cells())
    book.handle(PANEL, "KV cache").focus()
    page.keyboard.press("ArrowRight")
    shown(book, memory="20 MiB")
    page.keyboard.press("ArrowLeft")
    shown(book)
    panel.get_by_label("served", exact=True).focus()
    page.keyboard.type("static")
    page.keyboard.press("Enter")
    shown(book, policy="static")
    panel.get_by_role("button", name="little memory").focus()
    page.keyboard.press("Enter")
    shown(book, requests=24, memory="8 MiB", prefix=0)
    page.keyboard.type("xdd")                 # letters for a button; as JupyterLab's commands they would cut and delete
    assert len(book.cells()) == cells


def test_errors_are_said_and_code_moves_the_panel(book):
    panel = book.page.locator(PANEL)
    book.run("panel.state.requests = -3")
    panel.get_by_role("status").first.get_by_text("requests is -3").wait_for()
    book.run("panel.state.memory = '2 MiB'; panel.state.requests = 8")
    panel.get_by_role("status").first.get_by_text("and the longest request has").wait_for()
    panel.get_by_role("button", name="serve", exact=True).click()
    panel.get_by_role("status").first.get_by_text("and the longest request has").wait_for()
    book.run("assert not panel.run.running; panel.state.memory = '24 MiB'")
    shown(book, requests=8, memory="24 MiB")
    assert "the longest request has" not in panel.get_by_role("status").first.inner_text()


def test_a_reloaded_page_shows_the_present(book):
    book.handle(PANEL, "KV cache").focus()
    book.page.keyboard.press("ArrowRight")
    shown(book, memory="20 MiB")
    book.save()
    book.reload()
    book.show("ServingExplorer()")
    book.page.locator(PANEL).first.wait_for(timeout=60_000)
    shown(book, memory="20 MiB")
    book.handle(PANEL, "KV cache").focus()
    book.page.keyboard.press("ArrowRight")    # and it is still live
    shown(book, memory="24 MiB")


def test_blocks_fill_and_free_while_the_kernel_is_free(book, shots):
    page, panel = book.page, book.page.locator(PANEL)
    start, stop = (panel.get_by_role("button", name=name, exact=True).first for name in ("serve", "stop"))
    start.click()
    held = """([where, least]) => new Set(document.querySelector(where + ' .js-plotly-plot').data[0].z.flat()
        .filter(code => code > 1)).size >= least"""
    page.wait_for_function(held, arg=[PANEL, 4], timeout=120_000)        # blocks of several requests, and what they share
    book.run("assert panel.run.running, 'the kernel is free meanwhile'")
    assert start.is_disabled() and panel.locator(".llmlab-rows:visible").first.locator("tbody tr").count() == 16
    page.wait_for_timeout(400)
    panel.screenshot(path=shots / "serving-running.png")
    stop.focus()
    page.keyboard.press("Enter")
    panel.get_by_role("status").get_by_text("Stopped.").wait_for(timeout=60_000)
    book.run("assert panel.run.ran is None and not panel.run.running; panel.state.update(requests=4)")
    shown(book, requests=4)
    start.click()
    panel.get_by_role("status").get_by_text("4 requests, paged: ").nth(0).wait_for(timeout=120_000)
    page.wait_for_function("""where => { const chart = document.querySelector(where + ' .js-plotly-plot');
        return chart.data[0].z.flat().every(code => code === null || code < 2); }""", arg=PANEL, timeout=60_000)
    bars = page.evaluate("""where => document.querySelectorAll(where + ' .js-plotly-plot')[1].data
        .map(trace => [trace.name, trace.x.length])""", PANEL)
    assert dict(bars)["writing"] >= 4
    panel.screenshot(path=shots / "serving-ran.png")
    assert book.overflow(PANEL) == []


def test_a_panel_is_closed_in_the_middle_of_a_run(book):
    book.run("from llmlab.lab import ServingExplorer as _Explorer\n_other = _Explorer(); _other.run.start()\nimport time\n"
             "until = time.time() + 60\nwhile not _other.run.frame and time.time() < until: time.sleep(0.1)\n"
             "assert _other.run.frame; _other.close(); assert _other.run.wait(60) and _other.run.progress == 'Stopped.'")


def test_what_it_is_worth_is_measured_and_simulated(book, shots):
    page, panel = book.page, book.page.locator(PANEL)
    book.run("panel.state.update(requests=4, prefix=32)")
    panel.get_by_role("button", name="▸ the claim").click()
    panel.get_by_role("button", name="compare", exact=True).click()
    panel.get_by_role("status").get_by_text("(the paper: 60 to 80 %").wait_for(timeout=240_000)
    panel.get_by_role("button", name="▸ a prompt that all begin with").click()
    panel.get_by_role("button", name="measure both").click()
    panel.get_by_role("status").get_by_text("All 4 prompts begin with").wait_for(timeout=120_000)
    panel.get_by_role("button", name="▸ more people at once").click()
    book.run("panel.run.start_load((1, 4))")
    panel.get_by_role("status").get_by_text("4 at once get").wait_for(timeout=120_000)
    panel.get_by_role("button", name="▸ on a card").click()
    panel.get_by_role("button", name="simulate 1 to 256").click()
    panel.get_by_role("status").get_by_text("tokens/s or more for each").wait_for(timeout=240_000)
    page.wait_for_timeout(400)
    assert panel.locator(".llmlab-rows:visible").count() == 7
    panel.screenshot(path=shots / "serving-folds.png")
    assert book.overflow(PANEL) == []


@pytest.mark.parametrize("width", [1400, 700])
def test_it_can_be_read_in_both_themes(book, shots, width):
    book.page.set_viewport_size({"width": width, "height": 3000})
    panel = book.page.locator(PANEL)
    panel.get_by_role("button", name="▸ on a card").click()
    book.run("panel.state.update(requests=6); panel.run.run(); panel.run.run_card()")
    panel.get_by_role("status").get_by_text("tokens/s or more for each").wait_for(timeout=240_000)
    book.readable(PANEL, shots / f"serving-{width}", 60)
    book.page.set_viewport_size({"width": 1400, "height": 3000})
