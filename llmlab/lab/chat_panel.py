"""ChatPanel: widgets over a ChatState: a text box, the conversation, how the answers are chosen."""

import threading
from html import escape

import ipywidgets as w

from .boxes.box import Box, line
from .chat_state import SAMPLING, ChatState
from .folds import Folds
from .live import Keys, Words
from .panel import Panel, described, put
from .style import RED
from .talk import Talk

_NAMES = {"user": "you", "assistant": "model"}
_SLIDERS = {  # option: (label, most, step, what it does)
    "temperature": ("temp", 2.0, 0.05, "temperature: 0 takes the likeliest token each time, higher is more varied"),
    "top_p": ("top p", 1.0, 0.01, "only the likeliest tokens that have this share together; 1: all"),
    "min_p": ("min p", 1.0, 0.01, "only tokens at least this share as likely as the likeliest; 0: all"),
    "repeat_penalty": ("repeat", 2.0, 0.01, "above 1: less of the last 64 tokens again"),
}
_NUMBERS = {
    "top_k": ("top k", "only so many of the likeliest tokens; 0: all"),
    "seed": ("seed", "the same seed gives the same text; empty: a new one each time"),
    "max_tokens": ("at most", "new tokens; empty: until the answer ends"),
}


class ChatPanel(Panel):
    """Talk with a model: `ChatPanel(*llmlab.load(file))`, or over a ChatState; `panel.state` is the same in code.

    Other names are settings of a ChatState, such as temperature=0 or system="Be brief.". The answer comes in a thread, so
    the notebook goes on. Raises LabError for settings that cannot be used.
    """

    def __init__(self, model, tokenizer=None, **settings):
        if isinstance(model, ChatState):
            state = model
            state.update(**settings)
        else:
            state = ChatState(model, tokenizer, **settings)
        self._thread, self._one_at_a_time = threading.local(), threading.RLock()
        super().__init__(state)
        self._make()
        asking = line(self.text, self.send_button, self.stop_button, self.clear_button)
        self.children = [self.talk, asking, self.said, self.folds, Keys()]
        self.add_class("llmlab-chat")
        self._show()
        self.state.observe(self._show, ["messages", "coming", "running", "stats", "error", "system", *SAMPLING])

    @property
    def answer(self) -> str:
        """The last answer in words, or what is wrong."""
        return self.state.answer

    # An answer is shown from its own thread. What the reader does meanwhile, in the kernel's, must not be taken for an echo.
    @property
    def _showing(self) -> bool:
        return getattr(self._thread, "showing", False)

    @_showing.setter
    def _showing(self, value: bool) -> None:
        self._thread.showing = value

    def _make(self) -> None:
        chat = self.state.chat
        self.talk = Talk()
        self.text = self.entered(described(
            w.Text, "ask" if chat else "text", "Enter sends it" if chat else "Enter has it continued; empty: what stands there",
            placeholder="a question" if chat else "a text to continue", width="min(100%, 560px)"), self.state.send)
        self.send_button = self.button("send", "ask the model", self._ask, button_style="primary")
        self.stop_button = self.button("stop", "end the answer here", self.state.end)
        self.clear_button = self.button("clear", "a new conversation", self.state.clear)
        self.said = Words(layout=w.Layout(width="100%"))
        self.folds = Folds(self, {"sampling": SamplingBox}, {"sampling": "how the next token is chosen, and when to end"})

    def _ask(self) -> None:
        self.state.send(self.text.value.strip())
        self.text.value = ""

    def _show(self, _=None) -> None:
        with self._one_at_a_time:
            self._show_now()

    def _show_now(self) -> None:
        state = self.state
        turns = [[_NAMES.get(message["role"], message["role"]), message["content"]] for message in state.messages]
        coming = []
        if state.running:
            turns, coming = [*turns, ["you", state.asking]], ["model", state.coming or "…"]
        with self.showing():
            put(self.talk, turns=turns, coming=coming)
            put(self.send_button, disabled=state.running)
            put(self.stop_button, disabled=not state.running)
            put(self.clear_button, disabled=state.running or not state.messages)
        self._say(state.error)
        self.folds.show()

    def _say(self, problem: str) -> None:
        wrong = f'<b style="border-left:4px solid {RED};padding-left:8px">{escape(problem)}</b>' if problem else ""
        plain = "" if self.state.chat or self.state.messages else "No chat template: what you type is continued as it is."
        said = escape(str(self.state.stats)) if self.state.stats else plain
        put(self.said, html="<br>".join(filter(None, (wrong, said))))


class SamplingBox(Box):
    """The system message, the options of sampling, the texts that end an answer."""

    def make(self) -> list[w.Widget]:
        bound, fields = self.panel.bound, {}
        for name, (label, most, step, why) in _SLIDERS.items():
            fields[name] = bound(name, w.FloatSlider, label, why, min=0, max=most, step=step, continuous_update=False)
        for name, (label, why) in _NUMBERS.items():
            fields[name] = self._typed(label, why, lambda text, name=name: self._number(name, text))
        self.stop = self._typed("stop at", "a text that ends the answer", lambda text: self.state.update(stop=text or ()))
        self.system = self._typed("system", "the system message: who the model is to be",
                                  lambda text: self.state.update(system=text))
        self.fields = fields
        grid = w.Layout(grid_template_columns="repeat(auto-fit, minmax(260px, 1fr))", grid_gap="0 20px", width="100%")
        return [*[self.system] * self.state.chat, w.GridBox([*fields.values(), self.stop], layout=grid)]

    def _typed(self, label: str, why: str, changed) -> w.Text:
        text = described(w.Text, label, why, continuous_update=False)
        text.observe(self.panel.guarded(lambda change: changed(change["new"])), "value")
        return text

    def _number(self, name: str, text: str) -> None:
        text = text.strip()
        value = int(text) if text.isdecimal() and len(text) < 20 else text or (0 if name == "top_k" else None)
        self.state.update(**{name: value})

    def show(self) -> None:
        state = self.state
        for name in _SLIDERS:
            put(self.fields[name], value=float(getattr(state.options, name)))
        for name in _NUMBERS:
            put(self.fields[name], value=_written(getattr(state, name)))
        put(self.stop, value=" ".join(state.options.stop))
        put(self.system, value=state.system)


def _written(value) -> str:
    return "" if value is None else str(value)
