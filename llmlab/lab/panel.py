"""What every panel does: widgets bound to a state's traits, and one place where errors of callbacks are caught and shown."""

import contextlib
import logging
from collections.abc import Callable, Iterable
from html import escape

import ipywidgets as w

from ..errors import LabError
from . import options
from .style import BLUE, RED

_STYLE = {"description_width": "76px"}
_FILL = {"width": "100%", "min_width": "0", "margin": "2px 0"}
_HEADLINE = "font-size:1.15em;font-weight:600"
_BLOCK = "line-height:1.45;padding:2px 0 2px 10px;margin:2px 0;border-left:4px solid;white-space:normal;"


class Panel(w.VBox):
    """Widgets over `state`. What a panel is made of shows itself in `_show`; `_say` shows a line that something is wrong;
    `folds`, where there are any, hold what not everybody needs."""

    def __init__(self, state, **more):
        self.state, self._showing = state, False
        super().__init__(layout=w.Layout(width="100%"), **more)
        self.add_class("llmlab-panel")

    @property
    def answer(self) -> str:
        """What the panel says in words: the state's answer, or what is wrong."""
        return self.state.error or self.state.answer

    def unfold(self, title: str) -> w.Widget:
        """Open one of the folds by its title, as its button does; the box that it holds."""
        return self.folds.unfold(title)

    def __repr__(self) -> str:
        return f"<{self.answer}>"

    def _say(self, problem: str) -> None:
        raise NotImplementedError

    def guarded(self, callback: Callable) -> Callable:
        """Errors in callbacks vanish in JupyterLab: all of them are caught here and shown. While the panel is showing
        what the state says, widgets have nothing to pass on."""
        def run(*args):
            if self._showing:
                return
            try:
                callback(*args)
            except LabError as error:
                self._say(str(error))
            except Exception as error:
                logging.getLogger(__name__).exception("in a callback of a panel")
                self._say(f"Something is wrong in llmlab itself: {type(error).__name__}: {error}")
        return run

    @contextlib.contextmanager
    def showing(self):
        """While the state is shown."""
        before, self._showing = self._showing, True
        try:
            yield
        finally:
            self._showing = before

    def bound(self, setting: str, kind: type, description: str, tooltip: str, **more) -> w.Widget:
        """A widget whose value is passed on to a trait of the state."""
        widget = described(kind, description, tooltip, **more)
        widget.observe(self.guarded(lambda change: setattr(
            self.state, setting, None if change["new"] == options.NOTHING else change["new"])), "value")
        return widget

    def button(self, description: str, tooltip: str, run: Callable[[], object], **more) -> w.Button:
        """A button as wide as its words."""
        button = w.Button(description=description, tooltip=tooltip, layout=w.Layout(width="auto", flex="0 0 auto"), **more)
        button.on_click(self.guarded(lambda _: run()))
        return button

    def entered(self, text: w.Text, run: Callable[[str], object]) -> w.Text:
        """Enter hands what stands in `text` to `run`, and empties it."""
        def enter(_widget, content, _buffers):
            if content.get("event") == "submit" and text.value.strip():
                run(text.value.strip())
                text.value = ""
        text.on_msg(self.guarded(enter))
        return text


def told(headline: str, more: Iterable[str], problem: str = "", edge: str = BLUE) -> str:
    """What a panel says as HTML: a headline (of HTML), lines of text below it, and before it what is wrong."""
    wrong = f"<b>{escape(problem)}</b><br>Below is the last answer that could be given." if problem else ""
    return blocks((RED, wrong), (edge, headlined(headline, more)))


def headlined(headline: str, more: Iterable[str]) -> str:
    """HTML: a headline (of HTML), and lines of text below it, as many as are not empty."""
    return f'<div style="{_HEADLINE}">{headline}</div>' + "".join(f"<div>{escape(text)}</div>" for text in more if text)


def blocks(*found: tuple[str, str]) -> str:
    """HTML, one under another, each beside a line of its colour; empty ones are left out."""
    return "".join(f'<div style="{_BLOCK}border-color:{edge}">{text}</div>' for edge, text in found if text)


def described(kind: type, description: str, tooltip: str, **more) -> w.Widget:
    """A widget with its words, as wide as there is room, or as `width` says."""
    fill = _FILL | {"width": more.pop("width", "100%")}
    return kind(description=description, tooltip=tooltip, style=dict(_STYLE), layout=w.Layout(**fill), **more)


def grid(least: int, *widgets: w.Widget) -> w.GridBox:
    """As many side by side as have `least` pixels each."""
    return w.GridBox(widgets, layout=w.Layout(grid_template_columns=f"repeat(auto-fit, minmax({least}px, 1fr))",
                                              grid_gap="0 20px", width="100%"))


def put(widget, **values) -> None:
    """Set what is not so yet, in the order given: a slider's range before its value."""
    for name, value in values.items():
        if getattr(widget, name) != value:
            setattr(widget, name, value)


def offer(widget, offered: options.Options, value, label: str) -> None:
    """Let `widget` offer these, and `value` too, and choose it."""
    value = options.NOTHING if value is None else value
    if all(value != known for _, known in offered):
        offered = [(label, value), *offered]
    if tuple(widget.options) != tuple(offered):
        # A page clamps a slider to the range it has and sends that back as if the reader had moved it; so the place comes
        # into the old range first, then the range changes, then the place: three messages, never an index out of range.
        widget.index = 0 if widget.options else None
        widget.options = offered
    if widget.value != value:
        widget.value = value


def visible(widget, shown: bool) -> None:
    """Show a widget, or take it out of the page's flow."""
    put(widget.layout, display=None if shown else "none")
