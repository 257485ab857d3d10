"""What the panels hold beyond the sliders, in a real browser, by keyboard and by mouse: engines, levers, two configurations,
commands to copy, strings to share, files to save, the live map."""

import re

import labpage
import pytest

import llmlab
from llmlab.lab.figures import fit_picture

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def book(lab, browser):
    notebook = labpage.Notebook(browser, lab, "01_fit.ipynb").open()
    notebook.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    notebook.run_all()
    notebook.alone()
    yield notebook
    notebook.page.close()
    assert notebook.errors == []


@pytest.fixture(autouse=True)
def fresh(book):
    """The panel as a preset leaves it, every fold closed."""
    book.run("panel.state.forget(); from llmlab.lab.presets import PRESETS; PRESETS[0].apply(panel.state)\n"
             "for button in panel.folds.buttons.values(): button.value = False")
    book.panel()
    book.wait_words("8,192 tokens of context fits GeForce RTX 3060 12GB")
    book.settle()


def report(**settings):
    return llmlab.fit("llama-3-8b", "rtx-3060-12gb", **{"quant": "Q4_K_M", **settings})


def lengths(*reports) -> list[list[float]]:
    return [trace["x"] for trace in fit_picture(*reports)["data"] if trace["type"] == "bar"]


def unfold(book, title: str):
    """Open a fold by keyboard; the panel."""
    panel = book.panel()
    panel.get_by_role("button", name=f"▸ {title}").focus()
    book.page.keyboard.press("Enter")
    panel.get_by_role("button", name=f"▾ {title}").wait_for()
    return panel


def test_an_engine_by_keyboard(book):
    panel, page = unfold(book, "engine settings"), book.page
    panel.get_by_label("engine", exact=True).focus()
    page.keyboard.press("End")
    book.wait_words("AWQ_INT4")
    assert panel.get_by_label("quant", exact=True).input_value().startswith("AWQ_INT4")
    assert not panel.get_by_label("ubatch", exact=True).is_visible() and panel.get_by_label("share", exact=True).is_visible()
    assert not panel.get_by_role("button", name="auto").first.is_visible()
    page.keyboard.press("Home")
    book.wait_words("in Q4_K_M")
    book.settle()
    panel.get_by_label("ubatch", exact=True).select_option("2,048")
    book.wait_bars(lengths(report(ubatch=2048)))
    panel.get_by_label("flash attention").uncheck()
    book.wait_bars(lengths(report(ubatch=2048, flash_attention=False)))
    assert panel.get_by_label("desktop", exact=True).input_value() == "not known"


def test_the_longest_context_and_the_best_quant(book):
    panel = book.panel()
    book.run("panel.state.context = 2048")
    book.wait_words("2,048 tokens")
    panel.get_by_role("button", name="longest: 8,192").click()
    book.wait_words("8,192 tokens")
    best = report().best_quant()
    panel.get_by_role("button", name=f"best: {best}").focus()
    book.page.keyboard.press("Enter")
    book.wait_words(f"in {best} with 8,192 tokens of context fits")


def test_a_lever_by_keyboard(book):
    book.run("panel.state.update(model='llama-2-13b', quant='Q3_K_S', card='rtx-4060-8gb', context=4096)")
    panel = unfold(book, "levers")
    book.wait_words("does not fit")
    wanted = llmlab.fit("llama-2-13b", "rtx-4060-8gb", quant="Q3_K_S", context=4096).levers()
    table = panel.locator(".llmlab-rows:visible table").first
    assert table.locator("tbody tr").count() == len(wanted) > 5
    first = table.get_by_role("button").first
    assert wanted[0].name in first.get_attribute("aria-label") and wanted[0].fits
    first.focus()
    book.page.keyboard.press("Enter")
    book.page.wait_for_function("() => !document.querySelector('.llmlab-fit [role=status]').innerText.includes('does not fit')")
    book.page.wait_for_function("() => document.activeElement.closest('.llmlab-rows')")      # the keyboard stays in the table
    table.get_by_role("button").nth(1).click()
    book.settle()
    assert "Below is the last answer" not in panel.get_by_role("status").first.inner_text()


def test_two_configurations_side_by_side(book):
    panel, page = unfold(book, "compare"), book.page
    panel.get_by_role("button", name="keep this as A").focus()
    page.keyboard.press("Enter")
    book.wait_bars(lengths(report(), report()))
    book.run("panel.state.update(context=16384, kv='q8_0')")
    book.wait_bars(lengths(report(context=16384, kv="q8_0"), report()))
    assert [row.startswith("A: ") for row in book.axis()] == [False, False, True, True]
    rows = panel.locator(".llmlab-rows:visible tbody tr")
    page.wait_for_function("() => document.querySelectorAll('.llmlab-fit .llmlab-rows tbody tr').length > 5")
    assert rows.first.inner_text().split("\t")[:3] == ["context", "8,192", "16,384"]
    assert "context 16,384 instead of 8,192" in panel.inner_text()
    panel.get_by_role("button", name="exchange").click()
    book.wait_bars(lengths(report(), report(context=16384, kv="q8_0")))
    panel.get_by_role("button", name="stop comparing").click()
    book.wait_bars(lengths(report()))


def copied(book) -> str:
    return book.page.evaluate("() => navigator.clipboard.readText()")


def test_the_command_is_copied(book):
    panel = unfold(book, "command")
    box = panel.locator(".llmlab-copy").first
    wanted = str(report().command("llama.cpp"))
    assert box.locator("pre").inner_text() == wanted
    box.get_by_role("button", name="copy").focus()
    book.page.keyboard.press("Enter")
    box.get_by_text("copied", exact=True).wait_for()
    assert copied(book) == wanted
    panel.get_by_label("for", exact=True).select_option("Ollama")
    book.page.wait_for_function("() => document.querySelector('.llmlab-copy pre').innerText.includes('FROM')")
    box.get_by_role("button", name="copy").click()
    book.settle()
    assert copied(book) == str(report().command("ollama"))


def test_without_a_clipboard_the_text_is_selected(book):
    """As on a page served over plain http from another computer."""
    panel = unfold(book, "command")
    box, page = panel.locator(".llmlab-copy").first, book.page
    page.evaluate("""() => { Object.defineProperty(navigator, 'clipboard', {value: undefined, configurable: true});
        window.execCommand = document.execCommand; document.execCommand = () => false; }""")
    try:
        box.get_by_role("button", name="copy").click()
        box.get_by_text("selected: press Ctrl+C").wait_for()
        assert page.evaluate("() => getSelection().toString()").strip() == box.locator("pre").inner_text().strip()
    finally:
        page.evaluate("() => { delete navigator.clipboard; delete document.execCommand; }")
    box.locator("pre").focus()                                 # and by keyboard it can be selected and taken
    page.keyboard.press("Control+a")
    page.keyboard.press("Control+c")
    assert copied(book).strip() == box.locator("pre").inner_text().strip()


def test_a_shared_configuration_is_shown_and_opened(book):
    panel, page = unfold(book, "share and save"), book.page
    box = panel.locator(".llmlab-copy").last
    assert box.locator("pre").inner_text() == "llmlab:llama-3-8b@rtx-3060-12gb?quant=Q4_K_M&context=8192"
    panel.get_by_label("open", exact=True).focus()
    page.keyboard.insert_text("llmlab:qwen2.5-7b@rtx-4090-24gb?quant=Q8_0&context=4096&kv=q8_0")
    page.keyboard.press("Enter")
    book.wait_words("Qwen2.5 7B in Q8_0 with 4,096 tokens")
    page.wait_for_function("() => [...document.querySelectorAll('.llmlab-copy pre')].at(-1).innerText.includes('kv=q8_0')")
    panel.get_by_label("open", exact=True).focus()
    page.keyboard.insert_text("llmlab:<img src=x onerror=window.hacked=1>@none")
    page.keyboard.press("Enter")
    book.wait_words("<img src=x")                              # as text
    assert page.evaluate("() => window.hacked") is None and panel.locator("img").count() == 0
    assert "Qwen2.5 7B in Q8_0" in panel.get_by_role("status").first.inner_text()


def test_the_chart_is_saved(book, browser, tmp_path):
    panel, page = unfold(book, "share and save"), book.page
    with page.expect_download() as download:
        panel.get_by_role("button", name="save the chart as PNG").click()
    download.value.save_as(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG") and download.value.suggested_filename == "llmlab.png"
    book.run(f"from pathlib import Path; panel.export(Path({str(tmp_path)!r}) / 'fit.html')")
    saved = browser.new_context(offline=True).new_page()
    asked = []
    saved.on("request", lambda request: asked.append(request.url))
    saved.goto(f"file://{tmp_path / 'fit.html'}")
    saved.locator(".js-plotly-plot .bars path").first.wait_for()
    assert "fits GeForce RTX 3060 12GB" in saved.inner_text("body")
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    saved.close()


def the_map(book):
    book.show("FitMapExplorer(")
    found = book.page.locator(".llmlab-map").first
    found.wait_for(timeout=60_000)
    found.locator(".js-plotly-plot .hm image").wait_for(timeout=60_000)
    return found


SHOWN = """() => { const data = document.querySelector('.llmlab-map .js-plotly-plot').data[0];
    return [data.text.length, data.text[0].length, [...data.text].flat().filter(text => text !== 'no quant fits').length]; }"""


def wait_map(book, found) -> None:
    """Wait until the map's chart shows a FitMap."""
    book.page.wait_for_function(f"wanted => JSON.stringify(({SHOWN})()) === JSON.stringify(wanted)",
                                arg=[len(found.models), len(found.cards), found.count()], timeout=60_000)


def test_the_map_by_keyboard_and_by_mouse(book):
    found, page = the_map(book), book.page
    few = ["rtx-3060-12gb", "rtx-4090-24gb"]
    book.run(f"whole.state.update(context=8192, kv='f16', floor='IQ1_S', family='Qwen2.5', cards={few}, model=None)")
    ids = [e.id for e in llmlab.catalog.entries().values() if e.family == "Qwen2.5"]
    wait_map(book, llmlab.fit_map(ids, few))
    found.locator("[role=slider]:visible").first.focus()
    page.keyboard.press("ArrowRight")
    wait_map(book, llmlab.fit_map(ids, few, context=16384))
    found.get_by_label("at least", exact=True).select_option("Q4_K_M or better")
    ladder = llmlab.fitting.QUANT_LADDER
    wait_map(book, llmlab.fit_map(ids, few, context=16384, ladder=ladder[:ladder.index("Q4_K_M") + 1]))
    found.get_by_label("model", exact=True).select_option("Qwen2.5 7B")
    found.get_by_label("card", exact=True).select_option("GeForce RTX 4090")
    page.wait_for_function("() => document.querySelector('.llmlab-map [role=status]').innerText.includes('Qwen2.5 7B fits in')")
    found.get_by_role("button", name="show in the fit panel").focus()
    page.keyboard.press("Enter")
    book.settle()
    book.panel()
    book.wait_words("with 16,384 tokens of context fits GeForce RTX 4090")

    found = the_map(book)
    drawn = found.locator(".js-plotly-plot .nsewdrag").first
    drawn.scroll_into_view_if_needed()
    area = drawn.bounding_box()
    page.mouse.click(area["x"] + area["width"] * 0.25, area["y"] + area["height"] * (1 - 0.5 / len(ids)))      # smallest, 12 GB
    page.wait_for_function("() => document.querySelector('.llmlab-map [role=status]').innerText.includes('RTX 3060 12GB')")
    book.panel()
    book.wait_words("with 16,384 tokens of context fits GeForce RTX 3060 12GB")


@pytest.mark.parametrize("width", [1400, 900])
def test_everything_open_can_be_read_in_both_themes(book, shots, width):
    book.page.set_viewport_size({"width": width, "height": 1000})
    book.run("panel.state.keep(); panel.state.update(model='mixtral-8x22b', card='rtx-3090-24gb', cards=2)")
    for title in ("engine settings", "levers", "compare", "command", "share and save"):
        unfold(book, title)
    for theme in labpage.THEMES:
        book.theme(theme)
        panel = book.panel()
        book.page.wait_for_timeout(400)
        panel.screenshot(path=shots / f"folds-{width}-{theme.split()[1].lower()}.png")
        seen = book.contrast(".llmlab-fit")
        assert len(seen) > 100 and [pair for pair in seen if pair[1] < labpage.READABLE] == [], theme
        assert book.overflow(".llmlab-fit") == []
        the_map(book).screenshot(path=shots / f"map-{width}-{theme.split()[1].lower()}.png")
        assert [pair for pair in book.contrast(".llmlab-map") if pair[1] < labpage.READABLE] == [], theme
    book.theme(labpage.THEMES[0])
    book.page.set_viewport_size({"width": 1400, "height": 1000})


def test_no_script_of_ours_asks_the_network():
    from llmlab.lab import copying, live, saving, table
    for module in (copying, live, saving, table):
        for name, value in vars(module).items():
            script = getattr(value, "_esm", None)
            assert not (isinstance(script, str) and re.search(r"https?:|import\s|fetch\(|XMLHttp", script)), name


def test_a_reloaded_page_shows_the_present(book):
    """Folds, A, the table, the strings and the map: what a new page is handed is what was there."""
    the_map(book)
    book.run("whole.state.update(family='Qwen3', cards='laptop', context=4096, kv='q8_0', floor='IQ1_S', model=None)")
    ids = [e.id for e in llmlab.catalog.entries().values() if e.family == "Qwen3"]
    laptops = [row["id"] for row in llmlab.gpus() if row["kind"] == "laptop"]
    unfold(book, "compare")
    unfold(book, "share and save")
    book.run("panel.state.keep(); panel.state.update(context=12288, kv='q8_0')")
    book.wait_bars(lengths(report(context=12288, kv="q8_0"), report()))
    book.save()
    book.reload()
    panel = book.panel()
    book.wait_bars(lengths(report(context=12288, kv="q8_0"), report()))
    assert panel.get_by_role("button", name="▾ compare").is_visible()
    assert panel.locator(".llmlab-rows:visible tbody tr").first.inner_text().split("\t")[:3] == ["context", "8,192", "12,288"]
    assert "context=12288&kv=q8_0" in panel.locator(".llmlab-copy pre").last.inner_text()
    the_map(book)
    wait_map(book, llmlab.fit_map(ids, laptops, context=4096, kv="q8_0"))
    book.panel().get_by_role("button", name="stop comparing").click()        # and all of it is still live
    book.wait_bars(lengths(report(context=12288, kv="q8_0")))
    book.alone()
