"""The chat panel without a browser: its state, its thread, its view."""

import re
import subprocess
import sys
import threading

import pytest
import tiny_chat

from llmlab.errors import LabError
from llmlab.lab import ChatPanel, ChatState
from llmlab.lab.talk import Talk


@pytest.fixture
def tokenizer():
    return tiny_chat.tokenizer()


@pytest.fixture
def panel(tokenizer) -> ChatPanel:
    return ChatPanel(tiny_chat.Scripted(tokenizer, "Fine.<|im_end|>", "<b>Yes</b><|im_end|>"), tokenizer, temperature=0)


@pytest.fixture
def endless(tokenizer) -> ChatState:
    return ChatState(tiny_chat.Scripted(tokenizer, "for ever ", context=100_000), tokenizer, temperature=0)


def enter(text, value):
    """Type and press Enter, as a page says it."""
    text.value = value
    text._handle_custom_msg({"event": "submit"}, [])


def until(state, name, right) -> None:
    """Wait until a trait of the state is as it should be."""
    there = threading.Event()

    def look(_=None):
        if right(getattr(state, name)):
            there.set()
    state.observe(look, name)
    look()
    assert there.wait(60), f"{name} is {getattr(state, name)!r}"
    state.unobserve(look, name)


def test_a_question_is_answered_beside_the_kernels_thread(panel):
    threads = []
    panel.state.observe(lambda _: threads.append(threading.current_thread().name), "messages")
    enter(panel.text, "How are you?")
    assert panel.text.value == "" and panel.state.wait(60)
    assert panel.talk.turns == [["you", "How are you?"], ["model", "Fine."]] and panel.talk.coming == []
    assert panel.answer == "Asked “How are you?”, the model says: Fine. (5 tokens, end of turn)"
    assert threads == ["llmlab chat"] and "[measured]" in panel.said.html
    panel.text.value = "Really?"
    panel.send_button.click()
    assert panel.state.wait(60) and panel.text.value == ""
    assert len(panel.state.messages) == 4 and panel.talk.turns[-1] == ["model", "<b>Yes</b>"]
    assert panel.state.stats.reused_tokens > 20


def test_what_a_model_writes_is_never_html(panel):
    """Talk shows it by textContent; the words below it are escaped."""
    assert "innerHTML" not in Talk._esm and Talk._esm.count("textContent") >= 3
    panel._say("<img src=x>")
    assert "<img" not in panel.said.html


def test_an_answer_is_seen_coming_and_stopped(endless):
    panel = ChatPanel(endless)
    assert (panel.send_button.disabled, panel.stop_button.disabled, panel.clear_button.disabled) == (False, True, True)
    enter(panel.text, "Talk")
    until(endless, "coming", lambda text: text.startswith("for ever"))
    until(panel.talk, "coming", lambda coming: coming and coming[1].startswith("for ever"))
    assert panel.talk.turns == [["you", "Talk"]] and panel.send_button.disabled and not panel.stop_button.disabled
    enter(panel.text, "And more")
    assert "an answer is coming" in panel.said.html and panel.text.value == "And more"
    panel.clear_button.click()
    assert endless.running
    panel.stop_button.click()
    assert endless.wait(60) and endless.stats.ended == "stopped" and endless.messages[-1]["content"].startswith("for ever")
    assert not panel.send_button.disabled and panel.stop_button.disabled
    panel.clear_button.click()
    assert panel.talk.turns == [] and panel.answer == "Nothing was asked yet."


def test_what_the_reader_does_while_an_answer_is_shown_is_heard(endless):
    """It is shown from a thread of its own: a click at that moment is no echo of it."""
    panel = ChatPanel(endless)
    entered, go = threading.Event(), threading.Event()

    def hold(_):
        if threading.current_thread().name == "llmlab chat":
            entered.set()
            go.wait(60)
    panel.talk.observe(hold, "coming")
    endless.send("Talk")
    assert entered.wait(60)
    panel.stop_button.click()
    go.set()
    assert endless.wait(60) and endless.stats.ended == "stopped"


def test_in_code(panel):
    state = panel.state
    assert state.ask("How are you?") == "Fine." and panel.talk.turns[-1] == ["model", "Fine."]
    state.update(max_tokens=3)
    assert state.ask("Really?") == "<b>" and state.stats.ended == "limit"
    state.clear()
    assert state._conversation.memory.tokens == []
    state.update(system="Be brief.")
    asked = []
    state._conversation.model.register_forward_pre_hook(
        lambda _, args, named: asked.append(state._conversation.tokenizer.decode(named["input_ids"][0])), with_kwargs=True)
    state.ask("x")
    assert asked[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nx")
    with pytest.raises(LabError, match="nothing to ask"):
        state.ask(" ")
    with pytest.raises(LabError, match="the prompt is"):
        state.ask("x" * 600)
    assert "the prompt is" in panel.answer and "the prompt is" in panel.said.html and not state.running
    assert [m["content"] for m in state.messages] == ["x", "<b>"], "the question that could not be answered is taken back"


def test_options_are_those_of_the_state(panel):
    box = panel.unfold("sampling")
    box.fields["temperature"].value = 0.5
    box.fields["seed"].value = "7"
    box.fields["top_k"].value = ""
    box.fields["max_tokens"].value = "20"
    box.stop.value = "END"
    box.system.value = "Be brief."
    now = panel.state.options
    assert (now.temperature, now.seed, now.top_k, now.max_tokens, now.stop) == (0.5, 7, 0, 20, ("END",))
    assert panel.state.system == "Be brief."
    panel.state.update(temperature=1.0, seed=None)
    assert box.fields["temperature"].value == 1.0 and box.fields["seed"].value == ""


@pytest.mark.parametrize(("name", "value"), [("temperature", -1), ("top_p", 2), ("seed", "seven"), ("stop", 5)])
def test_what_cannot_be_used_is_said_and_the_last_good_stays(panel, name, value):
    good = panel.state.options
    setattr(panel.state, name, value)
    assert panel.state.options is good and name in panel.answer and name in panel.said.html
    setattr(panel.state, name, getattr(good, name))
    assert not panel.state.error and panel.state.options == good


def test_settings_are_checked(panel, tokenizer):
    with pytest.raises(LabError, match="heat"):
        panel.state.update(heat=1)
    with pytest.raises(LabError, match="temperature"):
        ChatPanel(panel.state._conversation.model, tokenizer, temperature=-1)
    with pytest.raises(LabError, match="context is 0"):
        ChatPanel(panel.state._conversation.model, tokenizer, context=0)


def test_an_error_of_ours_is_shown_too(panel, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("oh")
    monkeypatch.setattr(panel.state._conversation, "answer", broken)
    enter(panel.text, "x")
    assert panel.state.wait(60) and "ZeroDivisionError: oh" in panel.answer and "ZeroDivisionError" in panel.said.html


def test_without_a_template_a_text_is_continued():
    plain = tiny_chat.tokenizer(None)
    panel = ChatPanel(tiny_chat.Scripted(plain, " a time<|im_end|>"), plain, temperature=0)
    assert "No chat template" in panel.said.html
    assert panel.state.ask("Once upon") == " a time" and panel.answer.startswith("Once upon a time (7 tokens")
    with pytest.raises(LabError, match="chat template"):
        ChatPanel(tiny_chat.Scripted(plain, "x"), plain, system="Be brief.")


def test_torch_comes_with_the_first_chat_only():
    code = ("import sys, llmlab.lab; assert 'torch' not in sys.modules and 'ChatPanel' in dir(llmlab.lab); "
            "llmlab.lab.Nothing")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search("AttributeError: llmlab.lab has no 'Nothing'; it has AdviceState, ", done.stderr), done.stderr
