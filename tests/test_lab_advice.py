"""The advisor without a browser: settings, words, rows, frontiers drawn, old against new and a tenth of the memory by hand."""

import numpy as np
import pytest

import llmlab
from llmlab import LabError, catalog
from llmlab.advice import TASKS, settings_of
from llmlab.advice.generations import LARGE, SMALL, Match, against, against_words, size, tenths, tenths_words
from llmlab.evaluation import Evaluation, Outcome
from llmlab.lab.advice_figures import AGES, advice_figure, advice_picture, against_picture, tenths_picture
from llmlab.lab.advice_panel import MOST_ROWS, PRESETS, Advisor
from llmlab.lab.advice_state import DEFAULTS, AdviceState, key_of, left_out_words, quality_words
from llmlab.lab.evaluation_figures import evaluation_figure
from llmlab.shapes import model_spec
from llmlab.units import GIB


@pytest.fixture(scope="module")
def shared():
    return AdviceState()


@pytest.fixture
def state(shared):
    shared.update(**DEFAULTS)
    return shared


@pytest.fixture(scope="module")
def made(shared):
    return Advisor(shared)


@pytest.fixture
def panel(made):
    made.state.update(**DEFAULTS)
    return made


# ---- the state ------------------------------------------------------------------------------------------------------

def test_it_says_what_llmlab_best_says(state):
    found = llmlab.best("rtx-3060-12gb", task="coding")
    assert state.answer.startswith(found.answer) and "published" in state.answer and "modelled" in state.answer
    assert [row["model"] for row in state.table] == [c.entry.name for c in found.leaders]
    assert state.choice.model == found[0].model and state.table[0]["score to expect"] == quality_words(found[0])
    state.update(task="chat", min_speed=30.0, license="open")
    found = llmlab.best("rtx-3060-12gb", task="chat", min_speed=30, license="open")
    assert [key_of(c) for c in state.advice.choices] == [key_of(c) for c in found.choices]


def test_what_cannot_be_leaves_the_last_answer(state):
    for wrong, says in (({"min_speed": -1}, "min_speed is"), ({"task": "cooking"}, "cooking"), ({"card": "rtx-9999"}, "9999"),
                        ({"languages": "Klingon"}, "klingon"), ({"setting": "nobody"}, "nobody"), ({"context": 0}, "context")):
        before = state.look
        state.update(**wrong)
        assert says in state.error.casefold() and state.look is before
        state.update(**DEFAULTS)
        assert not state.error and state.answer.startswith(before.advice.answer)
    with pytest.raises(LabError, match="no setting"):
        state.update(colour="red")
    with pytest.raises(LabError, match="9999"):
        AdviceState(card="rtx-9999")


def test_another_task_has_other_points(state):
    state.update(quality_floor=80, setting="EvalPlus")
    state.update(task="chat")
    assert state.setting is None and state.quality_floor is None and state.advice.setting.benchmark.elo
    state.update(task="coding", quality_floor=80)
    assert state.quality_floor == 80 and all(c.quality[1] >= 80 for c in state.advice.choices)
    state.setting = settings_of("coding")[1]
    assert state.quality_floor is None and state.advice.setting == settings_of("coding")[1]


def test_the_chosen_one_stays_while_it_keeps_to_the_limits(state):
    second = state.advice.leaders[1]
    state.chosen = second.model
    assert state.choice.model == second.model
    state.chosen = key_of(state.advice.choices[5])
    assert key_of(state.choice) == state.chosen
    state.update(chosen=second.model, min_speed=max(c.decode for c in state.advice.choices if c.model == second.model) + 1)
    assert state.choice is state.advice.choices[0]
    state.update(quality_floor=99)
    assert state.choice is None and "No model scored" in state.answer


def test_unknown_is_listed_as_unknown(state):
    rows = list(state.unknown)
    assert len(rows) == len(state.advice.unknown) > 20 and {row["score here"] for row in rows} == {"unknown"}
    assert not {row["model"] for row in rows} & {row["model"] for row in state.table}
    words = left_out_words(state.look)
    assert f"{len(rows)} fit and have no score in this setting: unknown, not zero" in words
    assert sum(state.advice.refused.values()) + len(rows) + len(state.table) == state.advice.looked_at == len(catalog.entries())


# ---- figures --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("against_what", ["GiB", "speed"])
def test_frontiers_are_drawn(state, against_what):
    look = state.look
    picture = advice_picture(look, against_what, state.choice)
    line, *ages, chosen = picture["data"]
    assert [trace["name"] for trace in ages] == [name for name, *_ in AGES]
    points = {(x, y) for trace in ages for x, y in zip(trace["x"], trace["y"], strict=True)}
    last = min(c.quality[1] for c in look.advice.leaders)
    assert set(zip(line["x"], line["y"], strict=True)) <= points
    assert len(points) == len({key_of(c) for c in look.shown if c.quality[1] >= last})
    assert {c.entry.name for c in look.advice.leaders} <= {t.split("<b>")[1].split("</b>")[0] for trace in ages
                                                           for t in trace["customdata"]}
    for x, y in points:                           # nothing lies beyond the frontier
        better = [a for a, b in zip(line["x"], line["y"], strict=True) if b >= y]
        assert min(better) <= x if against_what == "GiB" else max(better) >= x
    assert len(chosen["x"]) == 1 and advice_figure(look, against_what).layout.height == 400


def test_generations_are_told_apart(state):
    state.update(task="chat", min_speed=0.0)
    ages = advice_picture(state.look)["data"][1:-1]
    assert sum(bool(trace["x"]) for trace in ages) >= 4 and len({trace["marker"]["symbol"] for trace in ages}) == len(AGES)
    for trace, (_, last, *_) in zip(ages, AGES, strict=True):
        assert all(not last or text.split(", ")[1][:7] <= last for text in trace["customdata"])


# ---- old against new, and a tenth of the memory ---------------------------------------------------------------------

def test_old_13b_against_new_7b_by_hand():
    found = {(m.smaller.id, m.setting.name): m for m in against()}
    match = found["llama-3-8b", "MMLU (instruct/chat, 5-shot)"]
    assert match.scores[0][1] == 47.8 and match.scores[1][1] == 68.4 and match.gap == pytest.approx(20.6)
    error = 196 * np.sqrt(0.478 * 0.522 / 14042 + 0.684 * 0.316 / 14042)
    assert match.chance == pytest.approx(error) and match.verdict == "ahead" and match.lead[0] == pytest.approx(20.6 - error)
    assert match.bytes == (size("llama-2-13b"), size("llama-3-8b"))
    assert size("llama-3-8b") == llmlab.size(model_spec("llama-3-8b"), "Q4_K_M").tensor_bytes < 5 * GIB
    mistral = next(m for (name, _), m in found.items() if name == "mistral-7b-v0.1" and m.setting.benchmark.elo)
    assert mistral.verdict == "behind" and -15 < mistral.lead[1] < 0 and mistral.share is None
    assert "The claim fails for" in against_words(against()) and "Mistral 7B v0.1" in against_words(against())


def test_no_comparison_crosses_settings():
    for m in (*against(), *tenths()):
        assert {m.larger.id, m.smaller.id} <= m.setting.scores.keys() and m.setting in settings_of(m.task)
        assert m.smaller.params_total < m.larger.params_total and m.bytes[1] < m.bytes[0]
    compared = {(m.setting.name, m.setting.source) for m in against()}
    for one in (one for task in TASKS for one in settings_of(task) if "llama-2-13b" in one.scores):
        newer = [e for name, e in catalog.entries().items() if name in one.scores and e.release > "2023-07"
                 and e.params_total < 13e9]
        assert ((one.name, one.source) in compared) == bool(newer)


def test_a_tenth_of_the_memory_by_hand():
    found = [m for m in tenths() if m.smaller.id == "deepseek-coder-6.7b" and m.setting.name == "HumanEval (instruct)"]
    assert [m.scores for m in found][0][1][1] == 74.4 and found[0].larger.id == "llama-3-70b"
    assert found[0].share[1] == pytest.approx(74.4 / 77.4) and 0.09 < found[0].part < 0.11
    assert found[0].reached == "too near to tell"
    failing = next(m for m in tenths() if m.setting.name == "MMLU (instruct/chat, 5-shot)")
    assert failing.reached == "no" and failing.share[2] < 0.9
    words = tenths_words(tenths())
    assert f"in {len(tenths())} settings" in words and all(LARGE[0] <= m.larger.params_total <= LARGE[1]
                                                           and SMALL[0] <= m.smaller.params_total <= SMALL[1] for m in tenths())


def test_chance_decides_what_is_ahead():
    setting = next(s for s in settings_of("coding") if s.benchmark.items and len(s.scores) > 3)
    one, *others = [catalog.entries()[name] for name in setting.scores if name in catalog.entries()]
    for other in others:
        match = Match("coding", setting, one, other)
        assert (match.verdict == "too near to tell") == (abs(match.gap) <= match.chance)
        assert match.lead[0] < match.gap < match.lead[2]


def test_every_comparison_is_drawn_once():
    for picture, found in ((against_picture(against()), against()), (tenths_picture(tenths()), tenths())):
        rows = sorted(y for trace in picture["data"] for y in trace["y"])
        assert rows == list(range(len(found))) == list(picture["layout"]["yaxis"]["tickvals"])


# ---- the panel ------------------------------------------------------------------------------------------------------

def test_the_panel_shows_the_state(panel):
    assert panel.answer == panel.state.answer and panel.task.value == "coding" and panel.min_speed.value == 5.0
    assert [row["cells"][0] for row in panel.rows.rows] == [c.entry.name for c in panel.state.advice.leaders[:MOST_ROWS]]
    assert "unknown, not zero" in panel.said.html and "Scores: HumanEval" in panel.said.html
    panel.min_speed.value = 20.0
    assert panel.state.min_speed == 20.0 and all(c.decode >= 20 for c in panel.state.advice.choices)
    panel.quality_floor.value = 60
    assert all(c.quality[1] >= 60 for c in panel.state.advice.choices)
    panel.quality_floor.value = ""
    assert panel.state.quality_floor is None
    panel.license.value = "open"
    assert {c.entry.license for c in panel.state.advice.choices} <= {"Apache-2.0", "MIT"}


def test_a_wrong_value_is_said_and_the_last_answer_stays(panel):
    panel.state.min_speed = -3
    assert panel.answer.startswith("min_speed is") and "Below is the last answer" in panel.said.html
    panel.state.min_speed = 5.0
    assert "Below is the last answer" not in panel.said.html


@pytest.mark.parametrize("label,why,settings", PRESETS, ids=[label for label, *_ in PRESETS])
def test_presets_have_an_answer(panel, label, why, settings):
    panel.state.update(**{**DEFAULTS, **settings})
    assert not panel.state.error and panel.state.advice.choices and len(panel.rows.rows) >= 2


def test_a_row_is_chosen_and_its_commands_follow(panel):
    box = panel.unfold("get and run it")
    second = panel.state.advice.leaders[1]
    panel.rows._asked({"key": second.model})
    assert panel.state.chosen == second.model and second.quant in box.text.text and "llama-server" in box.text.text
    assert [row["action"] for row in panel.rows.rows][:2] == ["choose", "chosen"]
    assert len(panel.by_size.figure.data[-1].x) == 1
    box.engine.value = "ollama"
    assert "llama-server" not in box.text.text
    panel.state.quality_floor = 99
    assert box.text.text == "" and "No model scored" in panel.said.html and panel.rows.rows == []


def test_folds_say_what_their_charts_show(panel):
    boxes = [panel.unfold(title) for title in panel.folds.buttons]
    unknown, old, tenth = boxes[1:]
    assert len(unknown.rows.rows) == len(panel.state.advice.unknown)
    panel.state.min_speed = 60.0
    assert len(unknown.rows.rows) == len(panel.state.advice.unknown)
    assert len(old.children[2].rows) == len(against()) and len(tenth.children[2].rows) == len(tenths())
    assert old.children[0].html.startswith("Llama 2 13B (2023) takes 7.3 GiB")


def test_this_machine_and_ram_alone(panel):
    panel.state.update(card="this machine", min_speed=0.0)
    assert not panel.state.error and panel.card.value == "this machine"
    panel.state.update(card=None, host="16 GiB")
    assert not panel.state.error and panel.state.choice.placement == "in RAM"


# ---- evaluations ----------------------------------------------------------------------------------------------------

def test_evaluations_are_drawn_with_their_intervals():
    def made(model: str, right: int) -> Evaluation:
        return Evaluation(model, "by hand", tuple(Outcome(task, f"{i}", "choice", f"{i}", i < right, 0.25)
                                                  for task in ("english", "reasoning") for i in range(10)))

    one, other = made("small", 4), made("smaller", 2)
    figure = evaluation_figure(one, scores={"smaller": other.scores})
    first, second, guessing = figure.data
    assert [first.name, second.name] == ["small", "smaller"] and list(first.x) == [40, 40] and list(second.x) == [20, 20]
    score = one.scores["english"]
    assert first.error_x.array[0] == pytest.approx(100 * (score.high - score.share))
    assert first.error_x.arrayminus[0] == pytest.approx(100 * (score.share - score.low))
    assert {x for x in guessing.x if x is not None} == {25} and first.y[0] < second.y[0] < first.y[1]
