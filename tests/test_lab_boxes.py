"""What the fit panel's folds hold: engines, two configurations side by side, commands, levers, files to take away."""

import re

import ipywidgets as w
import pytest

import llmlab
from llmlab.errors import LabError
from llmlab.lab import FitExplorer, FitState, compare, engines, options, saving
from llmlab.lab.copying import CopyBox
from llmlab.lab.figures import fit_picture
from llmlab.lab.state import DEFAULTS
from llmlab.lab.table import Rows
from llmlab.settings import LADDERS
from llmlab.units import parse_bytes

FOLDS = ["engine settings", "levers", "compare", "command", "share and save"]


@pytest.fixture
def panel() -> FitExplorer:
    return FitExplorer()


def shown(widget: w.Widget) -> bool:
    return widget.layout.display != "none"


def click(rows: Rows, key: str) -> None:
    """What the page sends when a row's button is pressed."""
    rows._handle_custom_msg({"key": key}, [])


# ---- folds --------------------------------------------------------------------------------------------------

def test_folds_are_closed_and_empty_at_first(panel):
    assert list(panel.folds.buttons) == FOLDS and panel.folds.content == {}
    assert not any(b.value for b in panel.folds.buttons.values())


def test_what_is_closed_computes_nothing(panel, monkeypatch):
    for title in FOLDS:
        box = panel.unfold(title)
        monkeypatch.setattr(box, "show", lambda title=title: seen.append(title))
    seen = []
    panel.state.context = 4096
    assert seen == FOLDS
    for title in ("levers", "command"):
        panel.folds.buttons[title].value = False
    seen.clear()
    panel.state.context = 2048
    assert seen == ["engine settings", "compare", "share and save"] and not shown(panel.folds.content["levers"])
    panel.folds.buttons["levers"].value = True
    assert seen[-1] == "levers" and shown(panel.folds.content["levers"])


def test_every_widget_in_a_fold_is_described(panel):
    for title in FOLDS:
        box = panel.unfold(title)
        inside = [x for x in every(box) if isinstance(x, (w.ValueWidget, w.Button)) and not isinstance(x, w.Box)]
        assert [x for x in inside if not x.description or not x.tooltip] == []
        assert panel.folds.buttons[title].tooltip


def every(top) -> list[w.Widget]:
    return [top, *(found for child in getattr(top, "children", ()) for found in every(child))]


# ---- engines ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("engine", engines.ENGINES)
@pytest.mark.parametrize("before", [{}, {"gpu_layers": 7, "kv": "q4_0", "ubatch": 64, "quant": "IQ2_XS", "swa_full": True}],
                         ids=["usual", "unusual"])
def test_an_engine_is_chosen_and_left_again(panel, engine, before):
    box = panel.unfold("engine settings")
    panel.state.update(**before)
    box.engine.value = engine
    assert not panel.state.error and panel.state.report.settings.engine == engine
    quants = [value for _, value in panel.quant.options]
    assert panel.quant.value in quants and (engine == "llama.cpp") == ("Q4_K_M" in quants)
    assert set(quants) <= set(LADDERS[engine]) or engine == "llama.cpp"
    for name, widget in {"ubatch": box.ubatch, "utilization": box.utilization, "gpu_layers": panel._layers,
                         "swa_full": box.switches["swa_full"], "flash_attention": box.switches["flash_attention"]}.items():
        assert shown(widget) == (name in engines.CONTROLS[engine]), name
    layouts = [x.layout for x in every(panel)]
    assert len(set(map(id, layouts))) == len(layouts)          # one that is shared would hide more than is meant
    for name, value in panel.kv.options:
        panel.kv.value = value
        assert not panel.state.error, name
    box.engine.value = "llama.cpp"
    assert not panel.state.error and panel.state.report.settings.engine == "llama.cpp"


def test_the_quant_next_in_size_follows_the_engine():
    state = FitState(quant="Q8_0")
    state.engine = "vllm"
    assert state.quant == "FP8"
    state.update(engine="transformers", quant="BF16")          # what is asked together is not touched
    assert state.quant == "BF16" and not state.error
    state.engine = "llama.cpp"
    assert state.report.settings.quant in ("BF16", "Q4_K_M") and not state.error


def test_engine_settings_reach_the_report(panel):
    box = panel.unfold("engine settings")
    panel.state.update(card="rtx-3090-24gb", cards=2)
    box.batch.value, box.ubatch.value = 4096, 1024
    box.switches["flash_attention"].value = False
    box.split.value, box.host.value, box.display.value = "3,1", "32 GiB", "windows"
    box.draft.value = next(value for _, value in box.draft.options if value)
    now = panel.state.report.settings
    assert (now.batch, now.ubatch, now.flash_attention, now.split, now.display) == (4096, 1024, False, (3.0, 1.0), "windows")
    assert panel.state.report.host == 32 * 2**30 and now.draft and now.draft.vocab == panel.state.report.spec.vocab
    panel.state.update(**DEFAULTS)
    assert (box.batch.value, box.split.value, box.host.value, box.draft.value) == (2048, "", "", "")
    assert shown(box.split) is False                           # one card


def test_a_split_goes_with_the_cards_it_was_for():
    state = FitState(card="rtx-3090-24gb", cards=2, split=(3, 1))
    state.cards = 3
    assert not state.error and state.split is None


def test_a_list_shows_what_is_chosen_where_that_is_none(panel):
    box = panel.unfold("engine settings")
    assert box.display.label == "not known" and box.draft.label == "none"
    panel.card.value = options.NOTHING
    assert panel.state.card is None and "RAM alone" in panel.card.label and " of RAM" in panel.answer
    panel.state.card = "rtx-3060-12gb"
    panel.state.card = None
    assert "RAM alone" in panel.card.label and panel.state.card is None


def test_experts_are_left_to_llmlab_or_taken_over(panel):
    panel.state.update(model="mixtral-8x22b", card="rtx-3090-24gb")
    panel.auto_moe.value = True
    assert panel.state.n_cpu_moe == "auto" and panel.n_cpu_moe.value == panel.state.report.n_cpu_moe > 10
    panel.auto_moe.value = False
    assert panel.state.n_cpu_moe == panel.n_cpu_moe.value == panel.state.report.n_cpu_moe > 10


# ---- the longest context and the best quant ------------------------------------------------------------------

@pytest.mark.parametrize("card", ["rtx-3060-12gb", "rtx-4090-24gb", "rtx-4060-8gb"])
def test_the_longest_context_and_the_best_quant_are_taken(card):
    panel = FitExplorer(model="llama-3.1-8b", card=card, context=2048)
    longest, best = panel.state.report.largest_context(), panel.state.report.best_quant()
    assert (panel.state.longest, panel.state.best) == (longest, best) and longest and best
    assert f"{longest:,}" in panel.longest.description and best in panel.best.description
    panel.longest.click()
    assert panel.state.context == panel.context.value == longest and panel.state.report.fits and panel.longest.disabled
    panel.best.click()
    assert panel.state.report.settings.quant == panel.quant.value and panel.state.report.fits


def test_what_never_fits_is_no_button():
    panel = FitExplorer(model="deepseek-v3", card="rtx-3060-12gb")
    assert panel.longest.disabled and panel.best.disabled and panel.longest.description == "none fits"


# ---- two configurations ---------------------------------------------------------------------------------------

def test_a_configuration_is_kept_and_compared(panel):
    box = panel.unfold("compare")
    assert box.exchange.disabled and box.rows.rows == []
    before = panel.state.report
    box.keep.click()
    panel.state.update(context=32768, kv="q8_0")
    after = panel.state.report
    rows = {row["cells"][0]: row["cells"][1:] for row in box.rows.rows}
    assert rows["context"][:2] == ["8,192", "32,768"] and rows["kv"][:2] == ["f16", "q8_0"] and "quant" not in rows
    more = after.total("kv_cache") - before.total("kv_cache")
    assert parse_bytes(rows["KV cache"][2].strip("+−")) == pytest.approx(abs(more), rel=0.01)
    assert rows["verdict"] == [before.verdict, after.verdict, ""]
    assert box.words.html == panel.state.difference and "context 32,768 instead of 8,192" in panel.state.difference
    assert len(panel.chart.figure.data[0].x) == len(before.devices) + len(after.devices)
    box.exchange.click()
    assert panel.state.report.terms == before.terms and panel.state.kept.report is after
    box.stop.click()
    assert panel.state.kept is None and panel.state.difference == "" and box.rows.rows == []
    assert len(panel.chart.figure.data[0].x) == len(before.devices)


def test_the_bars_of_a_stand_below_and_are_named():
    a, b = llmlab.fit("llama-3-8b", ["rtx-3090-24gb"] * 2), llmlab.fit("llama-3-70b", "rtx-3060-12gb")
    picture = fit_picture(b, a)
    ticks = picture["layout"]["yaxis"]["ticktext"]
    assert [t.startswith("A: ") for t in ticks] == [False, False, True, True, True]
    weights = picture["data"][0]
    assert weights["x"] == [r.total("weights", d) / 2**30 for r in (b, a) for d in r.devices]
    alone = fit_picture(b)
    assert [t["type"] for t in alone["data"]] == [t["type"] for t in picture["data"]]
    assert picture["layout"]["xaxis"]["range"][1] >= 24


def test_comparisons_in_words():
    fits, not_fits = llmlab.fit("llama-3-8b", "rtx-3060-12gb"), llmlab.fit("llama-3-70b", "rtx-3060-12gb")
    assert "A fits, this does not fit" in compare.words(fits, not_fits) and "more on the cards" in compare.words(fits, not_fits)
    assert "as before it fits" in compare.words(fits, fits.with_(context=4096)) and "less" in compare.words(
        fits, fits.with_(context=4096))
    assert compare.words(fits, fits) == "A and the present configuration are the same."
    assert [row["what"] for row in compare.rows(fits, fits)] == ["verdict"]
    ram = llmlab.fit("llama-3-8b", None, host="64 GiB")
    assert "of memory" in compare.words(fits, ram)
    assert {"cards", "overhead"} <= {row["what"] for row in compare.rows(fits, ram)}


# ---- commands -------------------------------------------------------------------------------------------------

def test_the_command_is_the_reports_own(panel):
    box = panel.unfold("command")
    assert box.text.text == str(panel.state.report.command("llama.cpp")) and "8192" in box.text.text
    panel.state.context = 12288
    assert "12288" in box.text.text
    for _, engine in box.engine.options:
        box.engine.value = engine
        try:
            wanted = str(panel.state.report.command(engine))
        except LabError as error:
            assert not shown(box.text) and str(error)[:30] in box.problem.html.replace("&#x27;", "'")
        else:
            assert box.text.text == wanted and shown(box.text) and not box.problem.html
    panel.state.engine = "vllm"
    assert box.engine.value == "vllm" and "vllm" in box.text.text


# ---- levers ---------------------------------------------------------------------------------------------------

def test_a_lever_is_taken_by_its_button():
    panel = FitExplorer(model="llama-2-13b", quant="Q4_K_M", card="rtx-3060-12gb", context=4096)
    assert not panel.state.report.fits
    box = panel.unfold("levers")
    rows = [row for row in box.rows.rows if row["action"]]
    assert len(rows) > 3
    first, key = rows[0], rows[0]["key"]
    change = box._levers[key].change
    click(box.rows, key)
    assert not panel.state.error and all(panel.state.settings[name] == value for name, value in change.items())
    assert panel.state.report.verdict in " ".join(first["cells"])
    before = panel.state.settings
    click(box.rows, "no such row")
    click(box.rows, "0; import os")
    assert panel.state.settings == before


# ---- what the page is sent ----------------------------------------------------------------------------------

def test_rows_are_plain_texts_and_one_message(monkeypatch):
    rows = Rows()
    sent = []
    monkeypatch.setattr(Rows, "send_state", lambda self, key=None: sent.append(key))
    rows.show([{"a": "<b>x</b>", "n": 3}], lambda row: ("k", "take", "why"))
    assert len(sent) == 1 and rows.rows[0]["cells"] == ["<b>x</b>", "3"]
    for widget in (Rows, CopyBox, saving.PictureButton):
        assert "innerHTML" not in str(widget._esm) and "http" not in str(widget._esm).replace("over plain http", "")


# ---- files ----------------------------------------------------------------------------------------------------

def test_the_chart_is_exported_as_one_page(panel, tmp_path):
    path = panel.export(tmp_path / "fit.html")
    page = path.read_text(encoding="utf-8")
    assert panel.answer in page and "plotly.js v" in page[:200_000] and list(tmp_path.iterdir()) == [path]
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)      # nothing is fetched
    with pytest.raises(LabError, match="overwrite=True"):
        panel.export(path)
    panel.state.context = 2048
    panel.export(path, overwrite=True)
    assert "2,048 tokens" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["fit.png", "fit", "nowhere/fit.html"])
def test_where_it_cannot_be_written_that_is_said(panel, tmp_path, name):
    with pytest.raises(LabError) as caught:
        panel.export(tmp_path / name)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_old_page(panel, tmp_path, monkeypatch):
    path = panel.export(tmp_path / "fit.html")
    before = path.read_bytes()
    monkeypatch.setattr(saving.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(LabError, match="No space left"):
        panel.export(path, overwrite=True)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_button_saves_under_a_free_name(panel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    box = panel.unfold("share and save")
    box.page.click()
    box.page.click()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama-3-8b-Q4_K_M-2.html", "llama-3-8b-Q4_K_M.html"]
    assert "llama-3-8b-Q4_K_M-2.html" in box.words.html
    assert saving.free_name("../../<evil>/x y").name == "evil-x-y.html"
