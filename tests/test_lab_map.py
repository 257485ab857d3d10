"""The live map: its state, its view, the pair that is pointed at."""

import json
import types

import pytest

import llmlab
from llmlab.errors import LabError
from llmlab.lab import FitExplorer, FitMapExplorer, MapState, options
from llmlab.lab.figures import map_picture
from llmlab.lab.map_state import ASKED, CARDS

FEW = {"family": ["llama-3-8b", "llama-3-70b", "smollm2-135m"], "cards": ["rtx-3060-12gb", "rtx-3090-24gb", "h200-sxm-141gb"]}


@pytest.fixture
def state() -> MapState:
    return MapState(**FEW)


def test_the_state_is_the_map_it_says(state):
    state.update(context=32768, kv="q8_0", floor="Q4_K_M")
    ladder = llmlab.fitting.QUANT_LADDER
    found = llmlab.fit_map(FEW["family"], FEW["cards"], 32768, "q8_0", ladder[:ladder.index("Q4_K_M") + 1])
    assert state.found.best == found.best and found.answer in state.answer and "Q4_K_M or better" in state.answer


@pytest.mark.parametrize(("name", "value"), [("context", 0), ("context", "x"), ("kv", "x"), ("cards", "y"), ("family", "z"),
                                             ("floor", "Q9"), ("floor", None), ("cards", ["rtx-9999"])])
def test_what_cannot_be_used_is_said_and_the_last_good_map_stays(state, name, value):
    good, before = state.found, getattr(state, name)
    setattr(state, name, value)
    assert state.found is good and state.error and "\n" not in state.error
    setattr(state, name, before)
    assert not state.error and state.found.best == good.best
    with pytest.raises(LabError):
        MapState(**FEW | {name: value})


def test_names_are_checked(state):
    with pytest.raises(LabError, match="contxt"):
        state.update(contxt=1)
    with pytest.raises(LabError, match="contxt"):
        MapState(contxt=1)


def test_groups_of_cards_and_families_are_there():
    rows = llmlab.gpus()
    assert all(any(chosen(row) for row in rows) for chosen in CARDS.values())
    assert len(set(options.families())) > 20
    state = MapState(family="Qwen3", cards="laptop")
    assert len(state.found.models) == sum(e.family == "Qwen3" for e in llmlab.catalog.entries().values())
    assert {c.kind for c in state.found.cards} == {"laptop"}


def test_a_pair_is_looked_at_in_words(state):
    assert state.picked == "" and state.quant is None
    state.update(model="llama-3-70b", card="rtx-3060-12gb", floor="Q4_K_M")
    assert state.picked == "Llama 3 70B does not fit in Q4_K_M or better on GeForce RTX 3060 12GB (12 GiB)."
    state.update(model="llama-3-8b", card="rtx-3090-24gb")
    assert state.quant == state.found.best[1][1] and f"fits in {state.quant} on GeForce RTX 3090" in state.picked
    state.family = ["smollm2-135m"]                            # it is no longer there
    assert state.picked == "" and state.quant is None


def click(panel: FitMapExplorer, row: int, column: int) -> None:
    """What plotly calls when a cell is clicked."""
    points = types.SimpleNamespace(xs=[column], ys=[row], trace_name="", point_inds=[[row, column]])
    for callback in panel.chart.figure.data[0]._click_callbacks:
        callback(panel.chart.figure.data[0], points, None)


def test_a_click_goes_to_the_fit_panel(state):
    fit = FitExplorer(n_cpu_moe=3, gpu_layers=2, card=["rtx-3090-24gb"] * 2, split=(1, 1))
    panel = FitMapExplorer(state, fit=fit, context=4096, kv="q8_0")
    click(panel, 1, 0)                                         # Llama 3 8B on the smallest card
    now = fit.state.report
    assert (now.spec.name, now.cards[0].id, now.settings.context, now.settings.kv) == (
        "llama-3-8b", "rtx-3060-12gb", 4096, ("q8_0", "q8_0"))
    assert now.settings.quant == state.quant and now.fits and len(now.cards) == 1
    assert (panel.model.value, panel.card.value) == ("llama-3-8b", "rtx-3060-12gb") and state.picked in panel.said.html
    click(panel, 2, 2)
    assert fit.state.report.spec.name == "llama-3-70b" and "H200" in fit.answer


def test_every_cell_keeps_its_promise(state):
    """The map and the panel give the same verdict for each pair."""
    fit = FitExplorer()
    for model in state.found.models:
        for card in state.found.cards:
            state.update(model=model.name, card=card.id)
            state.take(fit.state)
            assert fit.state.report.fits == (state.quant is not None), state.picked


def test_by_keyboard_the_same(state):
    fit = FitExplorer()
    panel = FitMapExplorer(state, fit=fit)
    panel.take.click()
    assert "point at a cell" in panel.said.html and "RTX 3060" in fit.answer
    panel.model.value, panel.card.value = "llama-3-8b", "rtx-3090-24gb"
    assert state.picked in panel.answer and "RTX 3090" not in fit.answer
    panel.take.click()
    assert "RTX 3090" in fit.answer and "point at" not in panel.said.html
    assert panel.take not in [x for box in FitMapExplorer(**FEW).children for x in getattr(box, "children", ())]


def test_the_widgets_and_the_state_agree(state):
    panel = FitMapExplorer(state)
    panel.context.value, panel.kv.value, panel.floor.value = 32768, "q8_0", "Q6_K"
    assert (state.context, state.kv, state.floor) == (32768, "q8_0", "Q6_K")
    assert panel.answer == state.answer in panel.said.html
    panel.family.value, panel.cards.value = "Qwen3", "laptop"
    assert panel.chart.figure.data[0].z[0] is not None and len(panel.chart.figure.data[0].z) == len(state.found.models)
    state.update(context=4096, family="all")
    assert panel.context.value == 4096 and panel.family.value == "all"
    state.kv = "x"
    assert "is no cache type" in panel.said.html and panel.answer == state.error


def test_a_reloaded_page_is_handed_plain_lists(state):
    panel = FitMapExplorer(state)
    state.update(context=131072, kv="q8_0")
    handed = panel.chart.figure.get_state()["_widget_data"][0]
    assert json.loads(json.dumps(handed["z"], allow_nan=False)) == panel.chart.figure.data[0].z.tolist()
    assert 0 in handed["z"][2] and handed["text"] == [[q or "no quant fits" for q in row] for row in state.found.best]


def test_several_changes_make_one_map(state):
    seen = []
    state.observe(lambda change: seen.append(change["new"]), "found")
    state.update(context=4096, kv="q8_0", floor="Q8_0")
    assert len(seen) == 1 and set(ASKED) <= set(state.class_traits())


def test_colours_stay_where_the_ladder_is_cut():
    whole = llmlab.fit_map(FEW["family"], FEW["cards"])
    cut = llmlab.fit_map(FEW["family"], FEW["cards"], ladder=whole.ladder[:6])
    one, other = (map_picture(found)["data"][0] for found in (whole, cut))
    assert one["colorscale"] == other["colorscale"] and (one["zmin"], one["zmax"]) == (other["zmin"], other["zmax"])
    same = [(i, j) for i, row in enumerate(cut.best) for j, quant in enumerate(row) if quant]
    assert same and all(one["z"][i][j] == other["z"][i][j] for i, j in same)
