"""CompileExplorer: widgets over a CompileState: three ways to run a model, a token's milliseconds, its operations' roofline."""

from html import escape

import ipywidgets as w

from ..kernels.packing import STRATEGIES
from .boxes.box import Box, line
from .compile_figures import roofline_picture, time_picture
from .compile_state import ABOUT, CONTEXTS, SETTINGS, WAYS, CompileState
from .folds import Folds
from .live import Chart, Keys, Words
from .panel import Panel, blocks, described, headlined, offer, put
from .style import BLUE, ORANGE, RED
from .table import Rows

_RACE = "beside other engines"


class CompileExplorer(Panel):
    """Measure where a token's time goes, eager, lean and compiled; `panel.state` is the same in code.

    `CompileExplorer("model.gguf", strategy="compact", context=256)`, or over a CompileState; without a file the small model
    llmlab uses everywhere. Raises LabError for settings that cannot be used.
    """

    def __init__(self, state: CompileState | str | None = None, **settings):
        if isinstance(state, CompileState):
            state.update(**settings)
        else:
            state = CompileState(**settings if state is None else {"file": state, **settings})
        super().__init__(state)
        self._make()
        self.children = self._arranged()
        self.add_class("llmlab-compile")
        self._show()
        self.state.observe(self._show, ["profiles", "notes", "progress", "running", "race", "problem", "error", *SETTINGS])

    @property
    def answer(self) -> str:
        """What the panel says in words."""
        return self.state.answer

    # ---- making the widgets -----------------------------------------------------------------------------

    def _make(self) -> None:
        state = self.state
        self.file = self.entered(described(w.Text, "open file", "the path of a GGUF, or a model of this computer; Enter opens "
                                           "it", placeholder="a path, or a name"), self._take_file)
        self.strategy = self.bound("strategy", w.Dropdown, "strategy", "how the eager and the lean way hold the weights: "
                                   "compact as in the file, fast in more memory; compiled code has layouts of its own",
                                   options=STRATEGIES)
        self.context = self.bound("context", w.SelectionSlider, "context", "tokens that were read before: attention looks at "
                                  "each of them", options=[(f"{n:,}", n) for n in CONTEXTS], continuous_update=False)
        self.way = self.bound("way", w.Dropdown, "roofline of", "whose operations are shown below",
                              options=[(f"{way}: {ABOUT[way]}", way) for way in WAYS])
        self.start = self.button("measure", "the ways that are ready, in turns; some seconds", state.start,
                                 button_style="primary")
        self.compile = self.button("compile and measure", "makes the compiled code for this processor where it is not here "
                                   "yet: once, a minute or two", lambda: state.start(compile=True))
        self.stop = self.button("stop", "end it after the present step", state.end)
        self.said = Words(layout=w.Layout(width="100%", margin="8px 0 0"))
        self.times = Chart(time_picture({}), "chart: a token's milliseconds by operation, for each way")
        self.roof = Chart(roofline_picture(None, None), "chart: each operation under the roofline")
        self.rows = Rows(caption="")
        self.folds = Folds(self, {_RACE: RaceBox}, {_RACE: "prompt and decode beside llama.cpp, in processes of their own"})

    def _arranged(self) -> list[w.Widget]:
        grid = w.Layout(grid_template_columns="repeat(auto-fit, minmax(300px, 1fr))", grid_gap="0 20px", width="100%")
        return [w.GridBox([self.file, self.strategy, self.context, self.way], layout=grid),
                line(self.start, self.compile, self.stop), self.said, self.times, self.roof, self.rows, self.folds, Keys()]

    # ---- from the reader to the state -------------------------------------------------------------------

    def _take_file(self, path: str) -> None:
        """Open what was typed; where it is nothing, say so and keep what there was."""
        before = self.state.file
        self.state.file = path
        if problem := self.state.problem:
            self.state.file = before
            self._say(problem)

    # ---- from the state to the reader -------------------------------------------------------------------

    def _show(self, change=None) -> None:
        """Bring up to date what a change concerns. Where there is an error the widgets keep what the reader asked for."""
        state, what = self.state, change["name"] if change else None
        if not state.problem:
            with self.showing():
                put(self.file, placeholder=state.name)
                put(self.strategy, value=state.strategy)
                offer(self.context, [(f"{n:,}", n) for n in CONTEXTS], state.context, f"{state.context:,}")
                put(self.way, value=state.way)
        for button, off in ((self.start, state.running), (self.compile, state.running), (self.stop, not state.running)):
            put(button, disabled=off)
        if what in (None, "profiles", "way"):
            self.times.present(time_picture(state.profiles))
            self.roof.present(roofline_picture(state.shown, state.ceilings if state.shown else None))
            put(self.rows, caption=f"the operations of a token, {state.way}: reads and operations exact, times measured"
                if state.shown else "")
            self.rows.show(list(state.table))
        self._say(state.problem or state.error)
        self.folds.show()

    def _say(self, problem: str) -> None:
        state = self.state
        wrong, doing, found = f"<b>{escape(problem)}</b>" if problem else "", escape(state.progress), ""
        if state.profiles and not problem:
            first, _, rest = state.answer.partition(". ")
            found = headlined(f"{escape(first)}.", (rest, state.allowed))
        elif not (doing or problem):
            found = _INVITATION
        put(self.said, html=blocks((RED, wrong), (ORANGE, doing), (BLUE, found)))


class RaceBox(Box):
    """`llmlab bench --quick` on this machine: the same file by llama.cpp and by llmlab's ways."""

    def make(self) -> list[w.Widget]:
        self.start = self.panel.button("race", "each in a process of its own, in turns: a minute or so", self.state.start_race)
        self.stop = self.panel.button("stop", "end it after the present step", self.state.end)
        self.words = Words(layout=w.Layout(width="100%"))
        self.table = w.HTML(layout=w.Layout(width="100%", margin="0", overflow="auto"))
        return [line(self.start, self.stop), self.words, self.table]

    def show(self) -> None:
        state = self.state
        put(self.start, disabled=state.running)
        put(self.stop, disabled=not state.running)
        self.words.say(state.progress if state.running else (state.race.answer if state.race else _RACING))
        put(self.table, value=state.race._repr_html_() if state.race else "")


_INVITATION = "Nothing was measured yet: press measure."
_RACING = ("Not run yet. Each loads the file in a process of its own; then all take turns at a prompt and at single tokens. "
           "Without llama-cpp-python, llmlab's own ways run alone. More of it in a shell: llmlab bench FILE.")
