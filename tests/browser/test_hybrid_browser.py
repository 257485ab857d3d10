"""The notebook on rare calls out in a real page: what would leave follows the typing, asking, the switch, both themes."""

import pytest

pytestmark = pytest.mark.browser
BOOK = {"name": "08_hybrid.ipynb", "seconds": 240}
PANEL = ".llmlab-hybrid"


@pytest.fixture(scope="module")
def book(book):
    """Where the panel is."""
    book.show("HybridPanel(here")
    book.page.locator(f"{PANEL} .js-plotly-plot .main-svg .xtick text").first.wait_for(timeout=60_000)
    return book


def test_every_cell_runs(book):
    cells = book.cells()
    assert len(cells) >= 12 and [cell for cell in cells if not cell["count"] or cell["errors"]] == []


def test_what_would_leave_follows_what_is_typed(book):
    page, panel = book.page, book.page.locator(PANEL)
    box = panel.locator("textarea")
    box.fill("Write to bo@d.example, please")
    panel.locator("ins", has_text="[EMAIL_1]").wait_for(timeout=60_000)
    assert panel.locator("del").all_inner_texts() == ["bo@d.example"]
    panel.get_by_role("button", name="the bytes").click()
    panel.locator("pre", has_text="[EMAIL_1]").wait_for(timeout=60_000)
    assert "bo@d.example" not in panel.locator("pre").inner_text()
    panel.get_by_label("take out what looks private").click()
    page.wait_for_function("where => !document.querySelector(where + ' del')", arg=PANEL, timeout=60_000)
    panel.locator("pre", has_text="bo@d.example").wait_for(timeout=60_000)
    panel.get_by_label("take out what looks private").click()
    panel.locator("del").first.wait_for(timeout=60_000)


def test_the_diamond_follows_the_slider(book):
    page = book.page
    where = "where => document.querySelector(where + ' .js-plotly-plot').data[3].x[0]"
    before = page.evaluate(where, PANEL)
    handle = book.handle(PANEL, "at most")
    handle.focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"([panel, before]) => ({where})(panel) !== before", arg=[PANEL, before], timeout=60_000)
    assert page.evaluate(where, PANEL) < before


def test_asking_shows_where_it_was_answered(book):
    panel = book.page.locator(PANEL)
    book.run("panel.state.update(share=1.0, offline=False); panel.state.router.threshold = -1.0")
    panel.get_by_role("button", name="the decisions").click()
    rows = panel.locator(".llmlab-rows tbody tr")
    rows.first.wait_for(timeout=60_000)
    count = rows.count()
    panel.get_by_role("button", name="ask", exact=True).click()
    more = "([where, count]) => document.querySelectorAll(where + ' .llmlab-rows tbody tr').length > count"
    book.page.wait_for_function(more, arg=[PANEL, count], timeout=60_000)
    assert rows.first.locator("td").first.inner_text() == "there"
    panel.get_by_label("offline: nothing leaves").click()
    panel.get_by_text("nothing does: calling out is switched off").wait_for(timeout=60_000)
    book.run("panel.state.router.threshold = -1.0")
    panel.get_by_role("button", name="ask", exact=True).click()
    book.page.wait_for_function(more, arg=[PANEL, count + 1], timeout=60_000)
    assert rows.first.locator("td").first.inner_text() == "here"
    panel.get_by_text("answered here: unsure, but calling out is switched off").wait_for(timeout=60_000)


@pytest.mark.parametrize("size", [(1400, 1000), (1000, 800)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_it_can_be_read_in_both_themes(book, shots, size):
    book.page.set_viewport_size({"width": size[0], "height": size[1]})
    book.readable(PANEL, shots / f"hybrid-{size[0]}", 30)
