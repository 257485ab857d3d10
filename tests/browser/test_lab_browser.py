"""Every notebook with a fit panel in a real browser: run all, drive the panel by keyboard, reload, both themes."""

import json
import statistics

import labpage
import pytest

import llmlab
from llmlab.lab.figures import fit_picture

pytestmark = pytest.mark.browser
BOOKS = sorted(path.name for path in (labpage.TOP / "notebooks").glob("*.ipynb") if "FitExplorer(" in path.read_text())


@pytest.fixture(scope="module", params=BOOKS)
def book(request, lab, browser):
    """A notebook, open, all of it run; what the console said is checked at the end."""
    notebook = labpage.Notebook(browser, lab, request.param).open()
    notebook.run_all()
    notebook.alone()
    yield notebook
    notebook.page.close()
    assert notebook.errors == []


def drawn(context: int) -> list[list[float]]:
    """What the chart must show for Llama 3 8B on an RTX 3060 in this context, by llmlab without a page."""
    report = llmlab.fit("llama-3-8b", "rtx-3060-12gb", quant="Q4_K_M", context=context)
    return [trace["x"] for trace in fit_picture(report)["data"] if trace["type"] == "bar"]


def needed(context: int) -> str:
    """What the words must say it needs."""
    report = llmlab.fit("llama-3-8b", "rtx-3060-12gb", quant="Q4_K_M", context=context)
    return f"RTX 3060 12GB: {report.devices['gpu0'].used / 2**30:.2f} GiB"


def named(context: int) -> list[str]:
    """What its legend must name."""
    report = llmlab.fit("llama-3-8b", "rtx-3060-12gb", quant="Q4_K_M", context=context)
    return [trace["name"] for trace in fit_picture(report)["data"] if trace.get("showlegend", True)]


@pytest.fixture(autouse=True)
def legend_is_true(book):
    """Whatever was done to the panel, back at a preset its legend names what the preset has."""
    yield
    book.settle()
    preset(book, "8B on 12 GB")
    book.wait_bars(drawn(8192))
    book.settle()
    assert book.legend() == named(8192)


def near(bars: list[list[float]], wanted: list[list[float]]) -> bool:
    return len(bars) == len(wanted) and all(a == pytest.approx(b, abs=1e-6) for a, b in zip(bars, wanted, strict=True))


def preset(book, words: str) -> None:
    """Press a preset by keyboard and wait for the answer."""
    panel = book.panel()
    panel.get_by_role("button", name=words, exact=True).focus()
    book.page.keyboard.press("Enter")


def test_every_cell_runs(book):
    cells = book.cells()
    assert len(cells) >= 5
    assert [cell for cell in cells if not cell["count"] or cell["errors"]] == []


def test_the_panel_is_driven_by_keyboard(book):
    page, panel, cells = book.page, book.panel(), len(book.cells())
    preset(book, "8B on 12 GB")
    book.wait_words(needed(8192))
    assert near(book.bars(), drawn(8192))

    handle = panel.locator(".widget-slider [role=slider]:visible").nth(book.slider("context"))
    handle.focus()
    at = float(handle.get_attribute("aria-valuenow"))
    for wanted, key in ((12288, "ArrowRight"), (16384, "ArrowRight"), (12288, "ArrowLeft"), (512, "Home")):
        page.keyboard.press(key)
        book.wait_bars(drawn(wanted))
        book.wait_words(f"{wanted:,} tokens")
    assert float(handle.get_attribute("aria-valuenow")) == 0 != at
    page.keyboard.press("ArrowRight")
    book.wait_bars(drawn(768))

    card = panel.get_by_label("card", exact=True)
    card.focus()
    page.keyboard.type("GeForce RTX 4090")
    page.keyboard.press("Enter")
    book.wait_words("RTX 4090: ")
    assert "24.0 GiB" in book.axis()[0]
    page.keyboard.type("xdd")                 # letters for a list; as JupyterLab's commands they would cut and delete
    assert len(book.cells()) == cells


def test_dragging_moves_the_chart_before_the_mouse_is_let_go(book):
    panel, mouse = book.panel(), book.page.mouse
    preset(book, "8B on 12 GB")
    book.wait_bars(drawn(8192))
    box = panel.locator(".widget-slider [role=slider]:visible").nth(book.slider("context")).bounding_box()
    mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    mouse.down()
    for step in range(20):
        mouse.move(box["x"] - 10 * step, box["y"] + box["height"] / 2)
    book.page.wait_for_function("() => document.querySelector('.llmlab-fit .js-plotly-plot').data[1].x[0] < 0.9")
    mouse.up()
    book.settle()
    shown = panel.locator(".widget-readout:visible").nth(book.slider("context")).inner_text()
    book.wait_bars(drawn(int(shown.replace(",", ""))))


def test_code_moves_the_panel(book):
    """A change of model and context together: the slider's range and place come to the page one after the other."""
    book.run("panel.state.update(model='qwen2.5-7b', quant='IQ4_XS', card='rtx-4060-ti-16gb', context=65536)")
    panel = book.panel()
    book.wait_words("65,536 tokens")
    for model, context in (("llama-2-13b", 4096), ("qwen2.5-7b", 65536), ("llama-3-8b", 512)):
        book.run(f"panel.state.update(model='{model}', context={context})")
        book.wait_words(f"{context:,} tokens")
        book.settle()
        assert panel.locator(".widget-readout:visible").nth(book.slider("context")).inner_text() == f"{context:,}"
        assert f"{context:,} tokens" in panel.get_by_role("status").inner_text()
    book.run("panel.state.kv = 'x'")
    book.wait_words("'x' is no cache type")
    preset(book, "8B on 12 GB")
    book.wait_bars(drawn(8192))


def test_finding_a_model_by_keyboard(book):
    page, panel = book.page, book.panel()
    preset(book, "8B on 12 GB")
    panel.get_by_label("find model").focus()
    page.keyboard.type("qwen2.5 7b")
    page.wait_for_function("() => document.querySelectorAll('.llmlab-fit select')[0].options.length < 6")
    page.keyboard.press("Enter")
    book.wait_words("Qwen2.5 7B in Q4_K_M")
    assert panel.get_by_label("model", exact=True).input_value() == "Qwen2.5 7B · 7.62 B"


def test_a_reloaded_page_shows_the_present(book):
    preset(book, "8B on 12 GB")
    book.wait_bars(drawn(8192))
    handle = book.panel().locator(".widget-slider [role=slider]:visible").nth(book.slider("context"))
    handle.focus()
    book.page.keyboard.press("ArrowLeft")
    book.wait_bars(drawn(6144))
    book.save()
    book.reload()
    panel = book.panel()
    assert "6,144 tokens" in panel.get_by_role("status").inner_text()
    assert panel.locator(".widget-readout:visible").nth(book.slider("context")).inner_text() == "6,144"
    book.wait_bars(drawn(6144))
    book.page.keyboard.press("Escape")
    preset(book, "8B on 12 GB")               # and it is still live
    book.wait_bars(drawn(8192))


def test_a_chart_is_as_wide_as_its_panel_whatever_came_first(book):
    """A new height and a new width at once: plotly would keep the old width."""
    def wide() -> bool:
        chart, panel = (book.page.locator(f".llmlab-fit{part}").first.bounding_box() for part in (" .main-svg", ""))
        return chart["width"] > 0.97 * panel["width"]
    for words, side in (("70B on 2 × 24 GB", "collapseLeft"), ("8B on 12 GB", "expandLeft"), ("70B on 24 GB", "collapseLeft")):
        preset(book, words)
        book.page.evaluate(f"() => window.jupyterapp.shell.{side}()")
        for _ in range(40):
            book.settle()
            if wide():
                break
        assert wide(), words


@pytest.mark.parametrize("size", [(1400, 1000), (1000, 800)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_it_can_be_read_in_both_themes(book, shots, size):
    book.page.set_viewport_size({"width": size[0], "height": size[1]})
    for words in ("70B on 2 × 24 GB", "8B on 12 GB"):
        preset(book, words)
    book.wait_bars(drawn(8192))
    for theme in labpage.THEMES:
        book.theme(theme)
        book.panel()
        book.page.wait_for_timeout(300)       # the chart follows its new width in the next frames
        book.page.screenshot(path=shots / f"{book.name.split('.')[0]}-{size[0]}-{theme.split()[1].lower()}.png")
        seen = book.contrast(".llmlab-fit")
        assert len(seen) > 20 and [pair for pair in seen if pair[1] < labpage.READABLE] == [], theme
        assert book.overflow(".llmlab-fit") == []
        chart, panel = (book.page.locator(f".llmlab-fit{part}").first.bounding_box() for part in (" .main-svg", ""))
        assert chart["width"] > 0.97 * panel["width"]
    book.theme(labpage.THEMES[0])


def test_a_slider_redraws_the_chart_at_once(book):
    """Prints what it took; tests/bench holds the number."""
    preset(book, "8B on 12 GB")
    book.wait_bars(drawn(8192))
    times = book.latencies(20)
    print(f"\n{book.name}: slider to redrawn chart, median {statistics.median(times):.0f} ms of {len(times)}, "
          f"{json.dumps([round(t) for t in times])}")
    assert len(times) == 20
