"""The quantization notebook in a real browser: run all, drive the panel by keyboard, reload, both themes, two models beside."""

import json
import statistics

import pytest

from llmlab.lab.quantization_figures import values_picture
from llmlab.lab.quantization_state import QuantizationState

pytestmark = pytest.mark.browser
BOOK = {"name": "02_quantization.ipynb", "seconds": 180}
PANEL = ".llmlab-quantization"
START = {"tensor": "blk.0.attn_q.weight", "row": 0, "block": 0, "bits": 4, "block_size": 32, "minimum": False, "scale": "F16"}


@pytest.fixture(autouse=True)
def fresh(book):
    """The panel as the notebook leaves it, every fold closed."""
    book.run(f"panel.state.update(**{START!r})\nfor button in panel.folds.buttons.values(): button.value = False")
    book.show("QuantizationExplorer(tensor")
    book.page.locator(PANEL).first.wait_for(timeout=60_000)
    book.page.locator(f"{PANEL} .js-plotly-plot .main-svg .points path").first.wait_for(timeout=60_000)
    shown(book)


def shown(book, **settings) -> None:
    """Wait until chart and words are what llmlab says without a page."""
    state = QuantizationState(**{**START, **settings})
    wanted = values_picture(state.look)["data"][2]["y"].tolist()
    book.page.wait_for_function("""([where, wanted]) => {
        const chart = document.querySelector(where + ' .js-plotly-plot'), drawn = chart && [...chart.data[2].y];
        return drawn && drawn.length === wanted.length && drawn.every((v, i) => Math.abs(v - wanted[i]) < 1e-6); }""",
                                arg=[PANEL, wanted], timeout=60_000)
    said = book.page.locator(f"{PANEL} [role=status]").first
    said.get_by_text(f"Rounded to {state.toy.name} ").wait_for(timeout=60_000)


def test_every_cell_runs(book):
    cells = book.cells()
    assert len(cells) >= 15 and [cell for cell in cells if not cell["count"] or cell["errors"]] == []


def test_the_panel_is_driven_by_keyboard(book):
    page, panel, cells = book.page, book.page.locator(PANEL), len(book.cells())
    book.handle(PANEL, "bits").focus()
    for bits, key in ((5, "ArrowRight"), (4, "ArrowLeft"), (3, "ArrowLeft")):
        page.keyboard.press(key)
        shown(book, bits=bits)
    book.handle(PANEL, "block size").focus()
    page.keyboard.press("ArrowRight")
    shown(book, bits=3, block_size=64)
    panel.get_by_label("a minimum").focus()
    page.keyboard.press("Space")
    shown(book, bits=3, block_size=64, minimum=True)
    book.handle(PANEL, "block").focus()
    page.keyboard.press("ArrowRight")
    shown(book, bits=3, block_size=64, minimum=True, block=1)
    tensor = panel.get_by_label("tensor", exact=True)
    tensor.focus()
    page.keyboard.type("blk.1.ffn_up")
    page.keyboard.press("Enter")
    shown(book, bits=3, block_size=64, minimum=True, block=1, tensor="blk.1.ffn_up.weight")
    page.keyboard.type("xdd")                 # letters for a list; as JupyterLab's commands they would cut and delete
    assert len(book.cells()) == cells


def test_errors_are_said_and_code_moves_the_panel(book):
    panel = book.page.locator(PANEL)
    book.run("panel.state.bits = 9")
    panel.get_by_role("status").first.get_by_text("bits is 9; a toy format has one of").wait_for()
    book.run("panel.state.update(bits=6, scale='E8M0')")
    shown(book, bits=6, scale="E8M0")
    assert "bits is 9" not in panel.get_by_role("status").first.inner_text()
    panel.get_by_label("open file").fill("nowhere.gguf")
    panel.get_by_label("open file").press("Enter")
    panel.get_by_role("status").first.get_by_text("nowhere.gguf does not exist").wait_for()
    assert panel.get_by_label("tensor", exact=True).input_value().startswith("blk.0.attn_q.weight")


def test_the_block_is_taken_apart(book):
    rows = book.page.locator(f"{PANEL} .llmlab-rows tbody tr")
    cells = [row.split("\t") for row in rows.all_inner_texts()]
    assert [cell[0] for cell in cells] == ["scale", "minimum", "codes", "codes", "scales", "offsets", "weights"]
    assert cells[0][1:3] == ["0f 30", "0.12683"] and cells[1][1:3] == ["d8 b9", "-0.73047"]
    assert cells[3][2].startswith("5 7 5 0 15 5 6 11")


def test_a_reloaded_page_shows_the_present(book):
    book.handle(PANEL, "bits").focus()
    book.page.keyboard.press("ArrowRight")
    shown(book, bits=5)
    book.save()
    book.reload()
    book.show("QuantizationExplorer(tensor")
    book.page.locator(PANEL).first.wait_for(timeout=60_000)
    shown(book, bits=5)
    book.handle(PANEL, "bits").focus()
    book.page.keyboard.press("ArrowRight")    # and it is still live
    shown(book, bits=6)


def test_two_models_answer_side_by_side(book, shots):
    page, panel = book.page, book.page.locator(PANEL)
    panel.get_by_role("button", name="▸ run it").focus()
    page.keyboard.press("Enter")
    book.run("panel.twin.update(tokens=12)")
    ask = panel.get_by_label("ask", exact=True)
    ask.fill("Why is the sky blue?")
    ask.press("Enter")
    coming = panel.locator("[aria-live=off] .llmlab-turn")
    coming.first.wait_for(timeout=60_000)
    book.run("assert panel.twin.running, 'the kernel is free meanwhile'")
    assert panel.get_by_role("button", name="run both").is_disabled()
    panel.get_by_role("status").get_by_text("measured over 254 tokens").wait_for(timeout=90_000)
    assert coming.count() == 0 and panel.get_by_role("log").locator(".llmlab-turn").count() == 2
    left, right = panel.get_by_role("log").all_inner_texts()
    assert left.startswith("as stored in Q4_1") and right.startswith("in TOY4_32_F16") and left[20:] != right[20:]
    panel.screenshot(path=shots / "quantization-twin.png")
    ask.press("Enter")
    panel.get_by_role("button", name="stop").click()
    panel.get_by_role("status").get_by_text("Stopped.").wait_for(timeout=60_000)
    assert book.overflow(PANEL) == []


@pytest.mark.parametrize("size", [(1400, 1000), (1000, 800)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_it_can_be_read_in_both_themes(book, shots, size):
    book.page.set_viewport_size({"width": size[0], "height": size[1]})
    panel = book.page.locator(PANEL)
    panel.get_by_role("button", name="▸ published quality").click()
    panel.locator(".js-plotly-plot").nth(2).locator(".main-svg text").first.wait_for(timeout=60_000)
    panel.get_by_label("up", exact=True).select_option("mean KL divergence, nats")
    panel.locator(".js-plotly-plot").nth(2).get_by_text("mean KL divergence, nats").wait_for()
    book.readable(PANEL, shots / f"quantization-{size[0]}", 40)


def test_a_slider_redraws_the_charts_at_once(book):
    """Prints what it took."""
    times = book.latencies(20, book.handle(PANEL, "bits"), where=PANEL)
    print(f"\nbits to redrawn chart, median {statistics.median(times):.0f} ms of {len(times)}, "
          f"{json.dumps([round(t) for t in times])}")
    assert len(times) == 20
