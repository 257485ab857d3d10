"""The hybrid panel without a browser, between two real servers: settings, what would leave, asking, words, figures, boxes."""

import threading
import time

import pytest
from endpoint_server import answer, far_server
from server_clients import serving, tiny

from llmlab import Endpoint, LabError
from llmlab.endpoints import route_curve
from llmlab.lab import HybridPanel, HybridState
from llmlab.lab.hybrid_figures import curve_picture, decisions_picture

CURVE = route_curve([0, 1, 0, 1], [1, 1, 1, 1], [0.9, 0.1, 0.8, 0.2], 0.001, "entropy")
QUESTIONS = ("hello", "one two", "What is it?", "abc", "why not", "tell me more", "go on", "x y z", "and then", "stop it")


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    for name in ("LLMLAB_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def near(tmp_path_factory):
    with serving(tiny(tmp_path_factory), name="tiny") as server:
        yield Endpoint(server.base_url, "tiny")


@pytest.fixture
def far():
    with far_server() as server:
        yield server


@pytest.fixture
def state(near, far):
    return HybridState(near, Endpoint(far.url, "m", price=(1, 2), retries=0), QUESTIONS, CURVE, max_tokens=4)


def unsure(state) -> HybridState:
    """Calibrated so that everything is."""
    state._signals["entropy"] = (-1.0,) * 10
    state._recalibrate("entropy")
    return state


def test_what_would_leave_follows_the_question(state, far):
    assert state.leaving.redactions == 2 and b"anna" not in state.leaving.body and far.connections == 0
    state.question = "nothing private"
    assert state.leaving.redactions == 0 and b"nothing private" in state.leaving.body
    state.update(question="a@b.example", redact=False)
    assert b"a@b.example" in state.leaving.body and "0 things taken out" in state.leaves
    state.offline = True
    assert "nothing does: calling out is switched off" in state.leaves


@pytest.mark.parametrize(("setting", "value", "said"), [
    ("question", " ", "there is no question"), ("unsure", "luck", "give one of entropy, logprob, agreement"),
    ("share", 2, "a share lies between 0 and 1"), ("share", "200 per month", "give a part of all questions"),
    ("cap", "much", "cap is 'much'"), ("redact", "no", "True or False"), ("offline", "no", "True or False")])
def test_what_cannot_be_used_leaves_what_was(state, setting, value, said):
    before, threshold = state.leaving, state.router.threshold
    setattr(state, setting, value)
    assert said in state.problem == state.answer and state.leaving is before and state.router.threshold == threshold
    with pytest.raises(LabError):
        state.start()
    with pytest.raises(LabError, match="no setting"):
        state.update(colour="red")


def test_it_must_be_calibrated_first_and_nothing_leaves_for_it(state, far):
    with pytest.raises(LabError, match="calibrate first"):
        state.ask()
    assert "30% lie above" in state.calibrate() and far.connections == 0
    kept = state.calibration.signals
    state.share = 0.5
    assert state.calibration.share == 0.5 and state.calibration.signals == kept
    state.unsure = "logprob"
    assert state.calibration is None
    state.unsure = "entropy"
    assert state.calibration.share == 0.5


def test_asking_is_told(state, far):
    unsure(state)
    state.share = 1.0
    far.always = answer("for [EMAIL_1]")
    assert state.ask("Who is a@b.example?") == "for a@b.example" and state.note == ""
    one, = state.decisions
    assert one.where == "remote" and b"a@b.example" not in far.asked[0].body and far.asked[0].body == state.leaving.body
    assert "1 went out" in state.answer and "answered there, the local model is unsure" in state.answer
    state.offline = True
    state.ask()
    assert state.note.startswith("answered here: unsure, but calling out is switched off") and len(far.asked) == 1
    state.update(offline=False, cap=0)
    state.ask()
    assert [one.reason for one in state.decisions] == ["unsure", "offline", "cap"] and len(far.asked) == 1


def test_while_it_asks_the_kernel_is_free_and_settings_wait(state, far):
    unsure(state)
    state.share, go = 1.0, threading.Event()
    far.always = lambda asked: go.wait(20) and answer("late")
    state.start()
    while not far.asked:
        time.sleep(0.01)
    assert state.running
    with pytest.raises(LabError, match="wait for it"):
        state.start()
    state.unsure = "logprob"
    assert "wait for it" in state.problem
    state.unsure = "entropy"
    go.set()
    assert state.wait(20) and state.text == "late" and state.problem == ""


def test_calibrating_can_be_stopped(state):
    state.observe(lambda change: state.end() if "2 of 10" in change["new"] else None, "progress")
    with pytest.raises(LabError, match="stopped"):
        state.calibrate()
    assert state.calibration is None and not state.running and state.progress == "Stopped."


def test_figures():
    drawn = curve_picture(CURVE, 0.5)
    assert drawn["data"][1]["y"] == [50, 75, 100, 100, 100] and drawn["data"][1]["name"] == "by entropy"
    assert drawn["data"][3]["x"] == [50] and drawn["data"][3]["y"] == [100]
    assert [one["x"] for one in curve_picture(None, 0.5)["data"]] == [[]] * 4
    assert [one["x"] for one in decisions_picture((), None)["data"]] == [[]] * 4


def test_the_panel_is_its_state(state, far):
    panel = HybridPanel(unsure(state))
    assert "[EMAIL_1]" in panel.leaves.html and "anna.b@example.org</del>" in panel.leaves.html and not panel.start.disabled
    panel.share.value = 1.0
    panel.question.value = "<b>x</b> c@d.example"
    assert state.share == 1.0 and "&lt;b&gt;" in panel.leaves.html and "<b>x" not in panel.leaves.html
    panel.cap.value = "no idea"
    assert "cap is" in panel.said.html and panel.cap.value == "no idea"
    panel.cap.value = "5"
    assert state.router.remote.cap == 5 and not state.problem
    far.always = answer("<i>hi</i>")
    panel.start.click()
    assert state.wait(20) and "&lt;i&gt;hi" in panel.said.html and len(panel.points.figure.data[1]["x"]) == 1
    rows, body = panel.unfold("the decisions"), panel.unfold("the bytes")
    assert rows.rows.rows[0]["cells"][1] == "there" and "[EMAIL_1]" in body.words.html and "c@d.example" not in body.words.html
    panel.offline.value = True
    panel.start.click()
    assert state.wait(20) and rows.rows.rows[0]["cells"][1] == "here" and "nothing left" in panel.answer
    assert panel.answer == state.answer in repr(panel)


def test_a_panel_makes_its_state(near, far):
    panel = HybridPanel(near, Endpoint(far.url, "m"), questions=QUESTIONS, share=0.2)
    assert panel.state.share == 0.2 and panel.start.disabled and "calibrate" in panel.said.html
    with pytest.raises(LabError, match="share"):
        HybridPanel(near, Endpoint(far.url, "m"), share=7)
