"""HybridPanel: widgets over a HybridState: a question, what of it would leave, where it was answered, what a share buys."""

from html import escape

import ipywidgets as w

from ..endpoints import Endpoint
from ..endpoints.signals import NAMES
from .boxes.box import Box, line
from .folds import Folds
from .hybrid_figures import curve_picture, decisions_picture
from .hybrid_state import SETTINGS, HybridState
from .live import Chart, Keys, Words
from .panel import Panel, blocks, grid, headlined, offer, put
from .style import BLUE, GREEN, GREY, ORANGE, RED
from .table import Rows

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
_ABOUT = {"entropy": "how spread its next tokens are", "logprob": "how unlikely what it wrote is",
          "agreement": "five drawn answers differ"}
_BODY, _DECIDED = "the bytes", "the decisions"
_OUT = f"text-decoration:line-through;border-bottom:2px solid {RED}"
_INSTEAD = f"font-weight:600;text-decoration:none;border-bottom:2px solid {GREEN}"


class HybridPanel(Panel):
    """Ask, and see where it is answered; `panel.state` is the same in code.

    `HybridPanel(local, remote, share=0.2)`, with `local` and `remote` as `llmlab.router` takes them, or over a HybridState.
    Raises LabError for settings that cannot be used.
    """

    def __init__(self, state: HybridState | object, remote: Endpoint | None = None, **settings):
        if isinstance(state, HybridState):
            state.update(**settings)
        else:
            state = HybridState(state, remote, **settings)
        super().__init__(state)
        self._make()
        self.children = self._arranged()
        self.add_class("llmlab-hybrid")
        self._show()
        self.state.observe(self._show, ["leaving", "calibration", "decisions", "text", "note", "progress", "running", "problem",
                                        "error", *SETTINGS])

    @property
    def answer(self) -> str:
        """What the panel says in words."""
        return self.state.answer

    # ---- making the widgets -----------------------------------------------------------------------------

    def _make(self) -> None:
        state = self.state
        self.question = self.bound("question", w.Textarea, "question", "what is asked; below, what of it would leave",
                                   rows=2, continuous_update=True)
        self.unsure = self.bound("unsure", w.Dropdown, "unsure", "how the local model's doubt is told",
                                 options=[(f"{name}: {_ABOUT[name]}", name) for name in NAMES])
        self.share = self.bound("share", w.SelectionSlider, "at most", "the share of questions that may go out; it holds, "
                                "whatever is asked", options=_shares(SHARES), continuous_update=True)
        self.cap = self.bound("cap", w.Text, "cap", "the most a month may cost, in the currency of the prices; empty: no cap",
                              continuous_update=False, placeholder="no cap")
        self.redact = self.bound("redact", w.Checkbox, "take out what looks private", "addresses, numbers, secrets and paths "
                                 "leave as placeholders, and are put back in the answer", indent=False)
        self.offline = self.bound("offline", w.Checkbox, "offline: nothing leaves", "the router calls nobody", indent=False)
        self.start = self.button("ask", "here first; out, where the local model is unsure and it is allowed", state.start,
                                 button_style="primary")
        self.calibrate = self.button("calibrate", f"asks the local model {len(state.questions)} questions; nothing leaves",
                                     state.start_calibrating)
        self.stop = self.button("stop", "end it after the present question", state.end)
        self.said = Words(layout=w.Layout(width="100%", margin="8px 0 0"))
        self.leaves = Words(layout=w.Layout(width="100%", margin="4px 0 0"))
        self.curve = Chart(curve_picture(state.curve, 0.0), "chart: quality against the share of questions sent out, measured")
        self.points = Chart(decisions_picture((), None), "chart: how unsure each question was, and where it was answered")
        self.folds = Folds(self, {_DECIDED: DecidedBox, _BODY: BodyBox}, {
            _DECIDED: "each question: where, why, what left, what it cost",
            _BODY: "the request as it would be sent, to the byte"})

    def _arranged(self) -> list[w.Widget]:
        return [self.question, grid(300, self.unsure, self.share, self.cap), line(self.redact, self.offline),
                line(self.start, self.calibrate, self.stop), self.said, self.leaves, self.curve, self.points, self.folds,
                Keys()]

    # ---- from the state to the reader -------------------------------------------------------------------

    def _show(self, change=None) -> None:
        """Bring up to date what a change concerns. Where there is an error the widgets keep what the reader asked for."""
        state, what = self.state, change["name"] if change else None
        if not state.problem:
            with self.showing():
                put(self.question, value=state.question)
                put(self.unsure, value=state.unsure)
                offer(self.share, _shares(sorted({*SHARES, state.share})), state.share, f"{state.share:.0%}")
                put(self.cap, value="" if state.cap is None else f"{state.cap}")
                put(self.redact, value=state.redact)
                put(self.offline, value=state.offline)
        for button, off in ((self.start, state.running or state.calibration is None), (self.calibrate, state.running),
                            (self.stop, not state.running)):
            put(button, disabled=off)
        if what in (None, "share") and not state.problem:
            self.curve.present(curve_picture(state.curve, state.share))
        if what in (None, "decisions", "calibration"):
            self.points.present(decisions_picture(state.decisions, state.router.threshold))
        put(self.leaves, html=blocks((GREY if state.offline else ORANGE, f"{_marked(state)}<div>{escape(state.leaves)}</div>")))
        self._say(state.problem or state.error)
        self.folds.show()

    def _say(self, problem: str) -> None:
        state = self.state
        wrong, doing, found = f"<b>{escape(problem)}</b>" if problem else "", escape(state.progress), ""
        if state.decisions:
            found = headlined(escape(f"“{state.text}”"), (state.note, state.answer if not problem else ""))
        elif not (doing or problem):
            found = escape(state.calibration.answer if state.calibration else _INVITATION)
        put(self.said, html=blocks((RED, wrong), (ORANGE, doing), (BLUE, found)))


class DecidedBox(Box):
    """Every decision, the last first."""

    def make(self) -> list[w.Widget]:
        self.rows = Rows(caption="")
        return [self.rows]

    def show(self) -> None:
        made = self.state.decisions
        put(self.rows, caption="decisions, the last first" if made else "nothing was asked yet")
        self.rows.show([{
            "question": f"{at}", "answered": "here" if one.where == "local" else "there", "why": one.why,
            "unsure": "" if one.signal is None else f"{one.signal:.3f}", "bytes out": f"{one.bytes_out:,}",
            "taken out": f"{one.redactions}", "cost": "not known" if one.cost is None else f"{one.cost:.6f}",
            "seconds": f"{one.seconds:.1f}"} for at, one in reversed(list(enumerate(made, 1)))])


class BodyBox(Box):
    """The request as it would be sent."""

    def make(self) -> list[w.Widget]:
        self.words = Words(layout=w.Layout(width="100%"))
        return [self.words]

    def show(self) -> None:
        sent = self.state.leaving.sent
        head = "".join(f"{name}: {value}\n" for name, value in sent.headers.items())
        text = f"{sent.method} {sent.url}\n{head}\n{sent.body.decode('utf-8', 'replace')}"
        put(self.words, html=f'<pre style="white-space:pre-wrap;overflow-wrap:anywhere">{escape(text)}</pre>')


def _shares(shares) -> list[tuple[str, float]]:
    return [(f"{share:.0%}", share) for share in shares]


def _marked(state: HybridState) -> str:
    """The question, what is taken out struck through beside what leaves instead."""
    said = []
    for text, other in state.leaving.pieces:
        said.append(escape(text) if other is None else
                    f'<del style="{_OUT}">{escape(text)}</del> <ins style="{_INSTEAD}">{escape(other)}</ins>')
    return f'<div style="white-space:pre-wrap">{"".join(said).strip()}</div>'


_INVITATION = "Press calibrate: the local model answers a few questions, and the threshold follows from how unsure it is."
