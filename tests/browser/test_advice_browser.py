"""The notebook on smaller models in a real browser: run all, limits dragged by keyboard, a row chosen, reload, both themes."""

import pytest

from llmlab.lab.advice_figures import advice_picture
from llmlab.lab.advice_state import DEFAULTS, AdviceState

pytestmark = pytest.mark.browser
BOOK = {"name": "07_smaller_not_bigger.ipynb", "seconds": 400, "height": 3000}
PANEL = ".llmlab-advice"
START = dict(DEFAULTS)


@pytest.fixture(scope="module")
def ours():
    return AdviceState()


@pytest.fixture(autouse=True)
def fresh(book, ours):
    """The panel as it was made, every fold closed."""
    book.run(f"panel.state.update(**{START!r})\nfor button in panel.folds.buttons.values(): button.value = False")
    book.show("Advisor()")
    book.page.locator(PANEL).first.wait_for(timeout=60_000)
    shown(book, ours)


def shown(book, ours, **settings) -> None:
    """Wait until the points, the rows and the words are what llmlab says without a page."""
    ours.update(**{**START, **settings})
    picture = advice_picture(ours.look, "GiB", ours.choice)
    counts = [len(trace["x"]) for trace in picture["data"]]
    book.page.wait_for_function("""([where, counts]) => {
        const chart = document.querySelector(where + ' .js-plotly-plot');
        return chart && chart.data && `${chart.data.map(trace => (trace.x || []).length)}` === `${counts}`; }""",
                                arg=[PANEL, counts], timeout=60_000)
    words = ours.advice.answer.partition(". By ")[0]
    book.page.locator(f"{PANEL} [role=status]").first.get_by_text(words[:200]).wait_for(timeout=60_000)


def test_every_cell_runs(book):
    cells = book.cells()
    assert len(cells) >= 10 and [cell for cell in cells if not cell["count"] or cell["errors"]] == []


def test_limits_are_dragged_by_keyboard(book, ours):
    page, panel, cells = book.page, book.page.locator(PANEL), len(book.cells())
    book.handle(PANEL, "tokens/s").focus()
    page.keyboard.press("ArrowRight")
    shown(book, ours, min_speed=7.0)
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    shown(book, ours, min_speed=20.0)
    book.run("panel.state.min_speed = 5.0")
    panel.get_by_label("task", exact=True).focus()
    page.keyboard.type("maths")
    page.keyboard.press("Enter")
    shown(book, ours, task="maths")
    panel.get_by_role("button", name="8 GB laptop, chat").focus()
    page.keyboard.press("Enter")
    shown(book, ours, card="rtx-4060-laptop-8gb", host="16 GiB", task="chat", min_speed=10.0)
    page.keyboard.type("xdd")                 # letters for a button; as JupyterLab's commands they would cut and delete
    assert len(book.cells()) == cells


def test_a_row_is_chosen(book, ours):
    panel = book.page.locator(PANEL)
    panel.get_by_role("button", name="▸ get and run it").click()
    second = ours.advice.leaders[1]
    panel.get_by_role("button", name=f"choose: {second.entry.name}", exact=True).click()
    panel.locator(".llmlab-copy pre").get_by_text(second.get.splitlines()[0]).wait_for(timeout=60_000)
    shown(book, ours, chosen=second.model)
    assert panel.get_by_role("button", name="chosen: ").count() == 1


def test_errors_are_said_and_code_moves_the_panel(book, ours):
    panel = book.page.locator(PANEL)
    book.run("panel.state.min_speed = -3")
    panel.get_by_role("status").first.get_by_text("min_speed is '-3'").wait_for()
    book.run("panel.state.min_speed = 30.0")
    shown(book, ours, min_speed=30.0)
    book.run("panel.state.quality_floor = 95")
    panel.get_by_role("status").first.get_by_text("No model scored in HumanEval").wait_for()
    assert panel.locator(".llmlab-rows:visible tbody tr").count() == 0
    shown(book, ours, min_speed=30.0, quality_floor=95)


def test_a_reloaded_page_shows_the_present(book, ours):
    book.handle(PANEL, "tokens/s").focus()
    book.page.keyboard.press("ArrowRight")
    shown(book, ours, min_speed=7.0)
    book.save()
    book.reload()
    book.show("Advisor()")
    book.page.locator(PANEL).first.wait_for(timeout=60_000)
    shown(book, ours, min_speed=7.0)
    book.handle(PANEL, "tokens/s").focus()
    book.page.keyboard.press("ArrowRight")    # and it is still live
    shown(book, ours, min_speed=10.0)


def test_a_drag_follows_at_once(book, ours):
    """Each step of a drag is answered before the next: the kernel never falls behind."""
    handle = book.handle(PANEL, "tokens/s")
    handle.focus()
    for _ in range(8):
        book.page.keyboard.press("ArrowRight")
    for _ in range(8):
        book.page.keyboard.press("ArrowLeft")
    shown(book, ours)


@pytest.mark.parametrize("width,across", [(1400, 2), (700, 1)])
def test_it_can_be_read_in_both_themes(book, ours, shots, width, across):
    book.page.set_viewport_size({"width": width, "height": 5200})
    panel = book.page.locator(PANEL)
    for title in ("get and run it", "old 13B, new 7B", "a tenth of the memory"):
        panel.get_by_role("button", name=f"▸ {title}").click()
    panel.get_by_role("status").get_by_text("Llama 2 13B (2023) takes").wait_for(timeout=60_000)
    book.run("panel.state.update(task='chat')")
    shown(book, ours, task="chat")
    book.readable(PANEL, shots / f"advice-{width}", 60, across)
    book.page.set_viewport_size({"width": 1400, "height": 3000})
