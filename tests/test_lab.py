"""The panel without a browser: pure figures, the state, the view over it, and what the page is sent."""

import ast
import json
import re
from pathlib import Path

import ipywidgets as w
import pytest

import llmlab
from llmlab import wording
from llmlab.errors import LabError
from llmlab.fitting import Report
from llmlab.lab import Chart, FitExplorer, FitState, LiveFigure, live, options
from llmlab.lab.figures import fit_figure, fit_picture, map_figure
from llmlab.lab.presets import PRESETS
from llmlab.lab.state import DEFAULTS, SETTINGS, THIS_MACHINE
from llmlab.lab.style import TERMS
from llmlab.units import parse_bytes

LAB = Path(llmlab.__file__).parent / "lab"
GIB = 2**30


@pytest.fixture
def state() -> FitState:
    return FitState()


@pytest.fixture
def panel() -> FitExplorer:
    return FitExplorer()


def bars(picture) -> dict[str, list[float]]:
    """{legend name up to its kind: lengths} of the bars of a picture or a figure."""
    data = picture["data"] if isinstance(picture, dict) else [t.to_plotly_json() for t in picture.data]
    return {t["name"].split(" (")[0]: list(t["x"]) for t in data if t["type"] == "bar"}


# ---- figures ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("card", ["rtx-3060-12gb", ["rtx-3090-24gb", "rtx-4090-24gb"], None])
@pytest.mark.parametrize("model", ["llama-3-8b", "mixtral-8x22b", "qwen3-next-80b-a3b"])
def test_bars_add_up_to_what_each_device_uses(model, card):
    report = llmlab.fit(model, card)
    found = bars(fit_picture(report))
    assert list(found) == [label for label, _ in TERMS.values()]
    for row, device in enumerate(report.devices.values()):
        assert sum(lengths[row] for lengths in found.values()) == pytest.approx(device.used / GIB, abs=1e-9)
    for term in report.terms:
        assert term.name in TERMS


def test_the_range_and_the_capacity_are_those_of_the_devices():
    report = llmlab.fit("llama-3-8b", "rtx-3060-12gb")
    traces = {t["name"]: t for t in fit_picture(report)["data"]}
    band, device = traces["range"], report.devices["gpu0"]
    assert band["x"][0] + band["error_x"]["array"][0] == pytest.approx(device.high / GIB)
    assert band["x"][0] - band["error_x"]["arrayminus"][0] == pytest.approx(device.low / GIB)
    assert traces["capacity"]["x"][:2] == [12, 12]
    assert traces["capacity"]["x"][3] is None                  # RAM that is not known has no end
    assert max(traces["capacity"]["x"][:2]) < fit_picture(report)["layout"]["xaxis"]["range"][1]


def test_a_figure_has_the_same_traces_whatever_it_shows():
    reports = [llmlab.fit("llama-3-8b", "rtx-3060-12gb"), llmlab.fit("qwen3-next-80b-a3b", ["rtx-3090-24gb"] * 3),
               llmlab.fit("llama-3-8b", None)]
    assert len({tuple((t["type"], set(t).__len__()) for t in fit_picture(r)["data"]) for r in reports}) == 1


def test_hover_says_bytes_kind_and_why():
    report = llmlab.fit("llama-3-8b", "rtx-3060-12gb")
    weights = fit_picture(report)["data"][0]
    assert f"{report.total('weights', 'gpu0'):,} bytes" in weights["customdata"][0] and "exact" in weights["customdata"][0]
    overhead = next(t for t in fit_picture(report)["data"] if t["name"].startswith("overhead"))
    assert "(modelled)" in overhead["name"] and "modelled" in overhead["customdata"][0]


def test_names_are_shown_as_text_not_as_markup():
    config = dict(llmlab.model("smollm2-135m").config)
    spec = llmlab.shapes.from_config(config, "<img src=x onerror=alert(1)>")
    panel = FitExplorer(model=spec)
    assert "&lt;img" in panel.said.html and "<img" not in panel.said.html
    assert "<img" not in str(map_figure(llmlab.fit_map([spec], ["rtx-3090-24gb"])).data[0].customdata)


@pytest.mark.parametrize("figure", [lambda: llmlab.fit("llama-3-8b", "rtx-3060-12gb").figure(),
                                    lambda: llmlab.fit_map(["llama-3-8b"], ["rtx-3090-24gb", "a40-48gb"]).figure()])
def test_figures_suit_both_themes(figure):
    layout = figure().layout
    assert layout.paper_bgcolor == "rgba(0,0,0,0)" and layout.font.color == "#808080"
    assert "128,128,128" in layout.plot_bgcolor or layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert layout.xaxis.title.text


def test_the_map_shows_what_fits_best_where():
    found = llmlab.fit_map(["llama-3-70b", "llama-3-8b"], ["rtx-3060-12gb", "rtx-3090-24gb", "h200-sxm-141gb"])
    heat = map_figure(found).data[0]
    rank = {quant: len(found.ladder) - at for at, quant in enumerate(found.ladder)}
    for i, row in enumerate(found.best):
        assert [rank.get(quant) for quant in row] == levels(heat.z[i])
        assert all((quant or "no quant fits") in text for quant, text in zip(row, heat.text[i], strict=True))
    assert levels(heat.z[1])[0] is None and heat.z[0][2] == len(found.ladder)
    assert found.models[0].title in heat.customdata[0][0] and found.cards[2].name in heat.customdata[0][2]


def levels(row) -> list[float | None]:
    return [level or None for level in row]


# ---- the state ----------------------------------------------------------------------------------------------

def test_the_state_is_the_fit_it_says(state):
    state.update(model="qwen2.5-7b", quant="IQ4_XS", card="rtx-4060-ti-16gb", context=32768, kv=("q8_0", "q4_0"))
    report = llmlab.fit("qwen2.5-7b", "rtx-4060-ti-16gb", quant="IQ4_XS", context=32768, kv=("q8_0", "q4_0"))
    assert state.report.terms == report.terms and state.answer == report.answer and not state.error


def test_several_changes_make_one_report(state):
    seen = []
    state.observe(lambda change: seen.append(change["new"]), "report")
    state.update(model="llama-3-70b", card="rtx-3090-24gb", context=4096, quant="IQ2_XS")
    with state.hold_trait_notifications():
        state.model, state.context = "llama-3-8b", 2048
    assert len(seen) == 2 and [r.settings.context for r in seen] == [4096, 2048]


BAD = {"model": ["gpt-9", "", 3, None, "/nowhere/x.gguf"], "quant": ["Q9_9", 4, "AWQ_INT4"],
       "context": [0, -5, 2.5, "many", True], "kv": ["x", 8, ("f16",), "fp8"],
       "card": ["rtx-9999", 3.5, ["rtx-9999"]], "cards": [0, -1, 1.5, "two", 99],
       "gpu_layers": [-1, "all", 1.5], "n_cpu_moe": [-1, "all"], "sequences": [0, -2, "two"],
       "engine": ["x", 3, None], "batch": [0, "many"], "ubatch": [0, 1.5], "split": ["a,b", (3, 1), (-1,)],
       "host": ["much", -1, 0], "display": ["amiga"], "utilization": [0, 2, "all", 0.9], "projector": ["x", -1],
       "draft": ["gpt-9", "qwen2.5-7b"], "draft_quant": ["Q4_K_M"], "mtp": [True]}
SWITCHES = {"flash_attention", "importance", "swa_full", "unified"}      # on or off: nothing is wrong


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_what_cannot_be_used_is_said_and_the_last_good_report_stays(state, name, value):
    good, before = state.report, state.settings[name]
    setattr(state, name, value)
    assert state.report is good and state.error and "\n" not in state.error and "Error" not in state.error
    setattr(state, name, before)
    assert not state.error and state.report.terms == good.terms


def test_every_setting_is_tried_with_something_bad():
    assert set(BAD) | SWITCHES == set(SETTINGS)


def test_results_cannot_be_set_and_names_are_checked(state):
    for name in ("report", "answer", "error", "hint", "speed", "trust"):
        with pytest.raises(Exception, match="read-only"):
            setattr(state, name, "")
    with pytest.raises(LabError, match="contxt"):
        state.update(contxt=1)
    with pytest.raises(LabError, match="gpt-9"):
        FitState(model="gpt-9")


def test_several_cards_and_this_machine(state):
    state.update(model="llama-3-70b", card="rtx-3090-24gb", cards=2)
    assert len(state.report.cards) == 2 and state.report.verdict == "fits"
    state.update(card=THIS_MACHINE, model="smollm2-135m")
    assert len(state.report.cards) == len(llmlab.machine().cards) and state.report.host


def test_a_file_is_looked_at_as_it_is_stored(state, tmp_path):
    path = small_gguf(tmp_path)
    state.quant = "IQ4_XS"
    state.model = path
    assert state.report.settings.quant == state.report.spec.stored and state.quant is None
    state.quant = "Q8_0"
    assert state.report.settings.quant == "Q8_0"


def test_every_cell_of_the_map_that_fits_is_coloured():
    found = llmlab.fit_map(["gpt-oss-20b", "llama-3-8b"], ["gtx-1060-6gb", "rtx-4060-ti-16gb"])
    assert "MXFP4_MOE" in found.best[1]
    drawn = map_figure(found).data[0].z
    assert [[z is not None for z in levels(row)] for row in drawn] == [[bool(quant) for quant in row] for row in found.best]


# ---- words --------------------------------------------------------------------------------------------------

def test_the_hint_is_true():
    for model, card, quant in (("llama-3-8b", "rtx-3060-12gb", "Q4_K_M"), ("llama-2-13b", "rtx-4060-8gb", "Q3_K_S"),
                               ("llama-3-70b", "rtx-3090-24gb", "Q4_K_M")):
        report = llmlab.fit(model, card, quant=quant)
        said = wording.hint(report)
        for context in [int(n.replace(",", "")) for n in said.split() if n.replace(",", "").isdigit()]:
            assert report.with_(context=context).fits and not report.with_(context=context + 256).fits
        for name in report_quants(said):
            assert report.with_(quant=name).fits
    assert "No quant" in wording.hint(llmlab.fit("deepseek-v3", "rtx-3060-12gb"))


def report_quants(said: str) -> list[str]:
    return [word.strip(".") for word in said.split() if word.strip(".") in llmlab.fitting.QUANT_LADDER]


def test_what_is_exact_and_what_is_modelled_add_up():
    report = llmlab.fit("llama-3-8b", "rtx-3060-12gb")
    said, device = wording.trust(report), report.devices["gpu0"]
    exact, modelled, low, high = (parse_bytes(size) for size in re.findall(r"[\d.]+ [GM]iB", said))
    on_card = [t for t in report.terms if t.device == "gpu0"]
    assert exact == pytest.approx(sum(t.bytes for t in on_card if t.kind == "exact"), abs=0.01 * GIB)
    assert [exact + modelled, low, high] == pytest.approx([device.used, device.low, device.high], abs=0.02 * GIB)
    low, best, high = report.speed.decode_tps
    said = wording.speed(report)
    assert said.startswith(f"Speed, modelled: decode about {best:.0f} tokens/s") and f"({low:.0f} to {high:.0f})" in said


# ---- the view -----------------------------------------------------------------------------------------------

def widgets(top) -> list[w.Widget]:
    return [top, *(found for child in getattr(top, "children", ()) for found in widgets(child))]


SHOWN = ("model", "quant", "context", "kv", "card", "cards", "gpu_layers", "n_cpu_moe", "sequences")      # at first sight


def test_the_state_moves_the_widgets(panel):
    panel.state.update(model="mixtral-8x22b", quant="Q3_K_S", context=5000, kv=("q8_0", "f16"), card="rtx-3090-24gb",
                       cards=3, gpu_layers=20, n_cpu_moe=7, sequences=2)
    shown = {name: getattr(panel, name).value for name in SHOWN}
    assert shown == {name: panel.state.settings[name] for name in SHOWN} and not panel.auto.value
    assert bars(panel.chart.figure) == bars(fit_picture(panel.state.report))
    assert panel.context.label == "5,000" and panel.gpu_layers.max == 57 and panel._experts.layout.display is None
    panel.state.model = "llama-3-8b"
    assert panel._experts.layout.display == "none"


def test_the_widgets_move_the_state(panel):
    panel.model.value, panel.card.value = "qwen2.5-7b", "rtx-3090-24gb"
    panel.quant.value, panel.kv.value, panel.cards.value, panel.sequences.value = "IQ4_XS", "q8_0", 2, 3
    panel.context.value = 32768
    panel.gpu_layers.value = 11
    asked = {"model": "qwen2.5-7b", "card": "rtx-3090-24gb", "quant": "IQ4_XS", "kv": "q8_0", "cards": 2, "sequences": 3,
             "context": 32768, "gpu_layers": 11, "n_cpu_moe": 0}
    assert panel.state.settings == DEFAULTS | asked and not panel.auto.value
    panel.auto.value = True
    assert panel.state.gpu_layers == "auto" and panel.gpu_layers.value == panel.state.report.gpu_layers == 29
    assert panel.answer == panel.state.answer in panel.said.html


def test_two_panels_over_one_state_agree(state):
    one, two = FitExplorer(state), FitExplorer(state)
    one.context.value = 2048
    assert two.context.value == state.context == 2048 and bars(one.chart.figure) == bars(two.chart.figure)


def test_what_is_wrong_is_shown_and_goes_away(panel):
    before = panel.answer
    panel.state.kv = "x"
    assert panel.answer == panel.state.error and panel.state.error in panel.said.html.replace("&#x27;", "'")
    assert before in panel.said.html
    panel.kv.value = "q8_0"
    assert panel.answer == panel.state.answer and "Below is the last answer" not in panel.said.html


def test_an_error_in_a_callback_is_caught_and_shown(panel, monkeypatch, caplog):
    monkeypatch.setattr(FitState, "update", lambda *_, **__: 1 / 0)
    presets = panel.children[0].children
    presets[0].click()
    assert "ZeroDivisionError" in panel.said.html and "ZeroDivisionError" in caplog.text


def test_finding_narrows_the_lists_and_enter_takes_the_first(panel):
    panel.find_card.value = "4090 laptop"
    assert {value for _, value in panel.card.options} == {"rtx-3060-12gb", "rtx-4090-laptop-16gb"}
    assert panel.card.value == "rtx-3060-12gb"                # what is chosen stays until another is
    enter(panel.find_card)
    assert panel.state.card == "rtx-4090-laptop-16gb" and panel.find_card.value == ""
    panel.find_model.value = "no such model"
    enter(panel.find_model)
    assert "no such model" in panel.said.html and panel.state.model == panel.model.value == "llama-3-8b"
    panel.context.value = 2048                                # nothing is left behind that would be in the way
    assert panel.state.report.settings.context == 2048 and "no such model" not in panel.said.html


def enter(text: w.Text) -> None:
    """What the page sends when Enter is pressed in a text."""
    text._handle_custom_msg({"event": "submit"}, [])


def test_a_path_opens_a_file(panel, tmp_path):
    path = small_gguf(tmp_path)
    panel.find_model.value = str(path)
    enter(panel.find_model)
    assert panel.model.value == str(path) and panel.quant.value == "Q4_1" and "as stored" in panel.quant.label


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.label)
def test_presets_are_what_they_say(panel, preset):
    panel.state.update(kv="q8_0", gpu_layers=3)
    button = next(b for b in panel.children[0].children if b.description == preset.label)
    button.click()
    report = panel.state.report
    assert not panel.state.error and report.settings.kv == ("f16", "f16") and report.settings.gpu_layers == "auto"
    assert report.settings.quant in preset.why and report.spec.title in preset.why.replace("RTX", "")
    size = preset.label.split(" on ")[1]
    count, each = ("1 × " + size).split(" × ")[-2:]
    assert [c.memory for c in report.cards] == [int(each.removesuffix(" GB")) * GIB] * int(count)


def test_every_widget_is_described(panel):
    asked = [x for x in widgets(panel) if isinstance(x, (w.ValueWidget, w.Button)) and not isinstance(x, w.Box)]
    assert len(asked) > 15
    assert [x for x in asked if not x.description or not x.tooltip] == []


def test_quants_are_offered_by_size_with_their_size(panel):
    sizes = [llmlab.size(panel.state.report.spec, value).tensor_bytes for _, value in panel.quant.options]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) > 25
    assert ("Q4_K_M · 4.58 GiB · 4.89 bits", "Q4_K_M") in panel.quant.options


def test_contexts_reach_twice_what_the_model_was_trained_for():
    steps = [n for _, n in options.contexts(llmlab.model("qwen2.5-7b"), 5000)]
    assert steps == sorted(steps) and steps[0] == 512 and steps[-1] == 65536 and {5000, 32768} <= set(steps)


# ---- what the page is sent ----------------------------------------------------------------------------------

def test_a_reloaded_page_is_handed_the_present_figure(panel):
    panel.state.context = 2048
    handed = panel.chart.figure.get_state()
    assert bars({"data": handed["_widget_data"]}) == bars(fit_picture(panel.state.report))
    assert handed["_widget_layout"]["xaxis"]["range"] == fit_picture(panel.state.report)["layout"]["xaxis"]["range"]


def test_a_reloaded_page_is_handed_what_plotly_forgot(panel):
    """plotly drops from its own record what a page reports back as a default; a new page would show other defaults."""
    for trace in panel.chart.figure._data:
        trace.pop("showlegend", None)
    handed, wanted = panel.chart.figure.get_state()["_widget_data"], fit_picture(panel.state.report)["data"]
    assert [t.get("showlegend") for t in handed] == [t.get("showlegend") for t in wanted]
    assert all("uid" in trace for trace in handed)             # by which the page tells the traces apart


def test_one_change_sends_the_chart_one_message_with_what_changed(panel, monkeypatch):
    sent = []
    monkeypatch.setattr(LiveFigure, "_send_update_msg", lambda self, *args, **more: sent.append((args, more)))
    for name in ("_send_restyle_msg", "_send_relayout_msg", "_send_addTraces_msg", "_send_deleteTraces_msg"):
        monkeypatch.setattr(LiveFigure, name, lambda self, *_, name=name, **__: sent.append(name))
    panel.state.context = 2048
    assert len(sent) == 1 and "height" not in str(sent)


def test_an_index_never_leaves_its_range(panel):
    """A page that is told an index before its options clamps it, and sends that back as if the reader had chosen."""
    sent = []
    panel.context.observe(lambda _: sent.append((panel.context.index, len(panel.context._options_labels))),
                          ["index", "_options_labels"])
    for model, context in (("qwen2.5-7b", 65536), ("llama-2-13b", 8192), ("llama-3-8b", 512)):
        panel.state.update(model=model, context=context)
        assert panel.context.value == context
    assert len(sent) > 5 and all(index < count for index, count in sent)


def test_plotlys_script_is_sent_once_for_all_figures():
    figures = [LiveFigure({"data": [], "layout": {}}) for _ in range(2)]
    (where,) = {figure.get_state()["_library"] for figure in figures}
    library = live._library()
    assert where == f"IPY_MODEL_{library.model_id}" and "export{" in library.script and len(library.script) > 1e6
    assert all(len(json.dumps(figure.get_state(), default=str)) < 50_000 for figure in figures)
    library.close()
    assert live._library() is not library and live._library() is live._library()


def test_texts_stand_in_for_what_cannot_be_drawn(panel):
    assert repr(panel) == f"<{panel.answer}>"
    assert repr(Chart(fit_figure(panel.state.report), "memory by device")) == "<memory by device>"
    assert len(repr(panel.chart.figure)) < 60


# ---- layers -------------------------------------------------------------------------------------------------

def test_the_three_layers_are_not_mixed():
    """figures, words, options, style: no widgets, no traits. state: no widgets. The view: no reports, no arithmetic."""
    def used(name):
        return {n for node in ast.walk(ast.parse((LAB / name).read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
                for n in [getattr(node, "module", None) or "", *(a.name for a in node.names)]}
    for pure in ("figures.py", "options.py", "style.py", "compare.py", "share.py", "engines.py"):
        assert not used(pure) & {"ipywidgets", "traitlets", "anywidget"}, pure
    for state in ("state.py", "map_state.py"):
        assert not used(state) & {"ipywidgets", "plotly", "anywidget"}, state
    for view in ("fit_panel.py", "map_panel.py", "panel.py", "folds.py", *(f"boxes/{p.name}" for p in LAB.glob("boxes/*.py"))):
        assert not used(view) & {"fit", "fitting", "fitmap", "memory", "units", "plotly"}, view
        maths = [n for n in ast.walk(ast.parse((LAB / view).read_text())) if isinstance(n, ast.BinOp)
                 and isinstance(n.op, (ast.Mult, ast.Div, ast.Pow)) and not isinstance(n.left, (ast.List, ast.ListComp))]
        assert not maths, view


def test_a_report_of_the_state_is_a_plain_report(state):
    assert isinstance(state.report, Report)


def small_gguf(folder: Path) -> Path:
    """A tiny llama as a GGUF whose header says Q4_1."""
    import gguf
    import numpy as np
    path = folder / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_file_type(3)
    for add, value in ((writer.add_context_length, 512), (writer.add_embedding_length, 64), (writer.add_block_count, 1),
                       (writer.add_feed_forward_length, 128), (writer.add_head_count, 2), (writer.add_head_count_kv, 2),
                       (writer.add_layer_norm_rms_eps, 1e-5)):
        add(value)
    shapes = {"token_embd": (96, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,),
              **{f"blk.0.attn_{part}": (64, 64) for part in ("q", "k", "v", "output")},
              "blk.0.ffn_gate": (128, 64), "blk.0.ffn_up": (128, 64), "blk.0.ffn_down": (64, 128)}
    for name, shape in shapes.items():
        data = np.zeros(shape, np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", data)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q4_1),
                              raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
