"""What the offload panel unfolds: levers, predicted beside measured, reading ahead, an SSD as VRAM, other engines."""

from html import escape

import ipywidgets as w

from ..errors import LabError
from ..offload.planned_export import WRITERS
from ..offload.planned_words import number, rate
from .boxes.box import Box, line
from .copying import CopyBox
from .live import Chart, Words
from .offload_claim import PROMISE, allowed, band, by_drive, by_quant, needed, worn
from .offload_figures import ahead_picture, checked_picture, drives_picture
from .panel import blocks, described, headlined, put, visible
from .style import BLUE, GREY
from .table import Rows

_TAKES = {"quant": "quant", "gpu_budget": "gpu_budget", "ram_budget": "ram_budget", "context": "context", "kv": "kv",
          "drive": "drive", "mode": "mode", "spec": "model"}
_CHOSEN = "mapped", "readers"                    # which a plan chooses by itself


class LeverBox(Box):
    """What would make it faster, the best first."""

    def make(self) -> list[w.Widget]:
        self._steps, self._look = {}, None
        self.words = Words(layout=w.Layout(width="100%"))
        self.rows = Rows(self.panel.guarded(self._take))
        return [self.words, self.rows]

    def show(self) -> None:
        look = self.state.look
        if look is self._look:
            return
        self._look, found = look, look.plan.levers()
        self._steps = {f"{step.name} {step.after}": step for step in found}
        self.words.say(lever_words(look.plan, found))
        actions = iter(self._steps.items())
        self.rows.show([{"lever": s.name, "from": s.before, "to": s.after, "tokens/s, modelled": band(s.decode),
                         "times": f"× {s.times:.2f}", "then binds": s.binds, "costs": s.costs} for s in found],
                       lambda _: _action(*next(actions)))

    def _take(self, key: str) -> None:
        self.state.update(**settings_of(self._steps[key].change))


def settings_of(change) -> dict:
    """A lever's change as settings of the panel; {} where it has none for it."""
    asked = {name: value for name, value in change.items() if name not in _CHOSEN}
    return {_TAKES[name]: value for name, value in asked.items()} if all(name in _TAKES for name in asked) else {}


def _action(key: str, step) -> tuple[str, str, str]:
    return (key, "take", f"{step.name}: {step.after}") if settings_of(step.change) else (key, "", "")


def lever_words(plan, found) -> str:
    """What the table is about."""
    now = f"Now {rate(plan.predict().decode)}. "
    if not len(found):
        return f"{now}No lever that is tried here makes a token more than one per cent faster."
    best = found[0]
    return (f"{now}What gives the most is {best.name}, {best.before} to {best.after}: {number(best.decode[1])} tokens/s. All "
            "modelled; each lever is pulled alone.")


class CheckBox(Box):
    """Every placement that was run, predicted against measured."""

    def make(self) -> list[w.Widget]:
        self.words = Words(layout=w.Layout(width="100%"))
        self.chart = Chart(checked_picture(()), "chart: tokens per second measured against predicted")
        self.rows = Rows(caption="")
        return [self.words, self.chart, self.rows]

    def show(self) -> None:
        tries = self.panel.run.tries
        self.words.say(self.panel.run.checked)
        visible(self.chart, bool(tries))
        self.chart.present(checked_picture(tries))
        put(self.rows, caption="tokens per second, predicted (modelled) beside measured" if tries else "")
        self.rows.show(list(self.panel.run.table))


class AheadBox(Box):
    """A token with 1, 2 and 3 slots."""

    def make(self) -> list[w.Widget]:
        run = self.panel.run
        self.start = self.panel.button("compare 1, 2 and 3 slots", "the same layers resident; some tokens with each, in turns",
                                       run.start_ahead, button_style="primary")
        self.stop = self.panel.button("stop", "end it after the present token", run.end)
        self.words = Words(layout=w.Layout(width="100%"))
        self.chart = Chart(ahead_picture(run.ahead), "chart: milliseconds a token by number of slots, measured")
        return [line(self.start, self.stop), self.words, self.chart]

    def show(self) -> None:
        run = self.panel.run
        put(self.start, disabled=run.running or bool(self.state.hindrance))
        put(self.stop, disabled=not run.running)
        said = run.ahead_answer if run.ahead or run.error else f"{_AHEAD} {self.state.unable}".strip()
        self.words.say(run.progress if run.running else said)
        visible(self.chart, bool(run.ahead))
        self.chart.present(ahead_picture(run.ahead))


class ClaimBox(Box):
    """What is promised of an SSD as VRAM, and what its rate allows."""

    def make(self) -> list[w.Widget]:
        self._look = None
        self.words = Words(layout=w.Layout(width="100%"))
        self.chart = Chart(drives_picture(()), "chart: tokens per second by drive, modelled")
        self.rows = Rows(caption="with all that is not on the device on the chosen drive, RAM a passage only: modelled")
        return [self.words, self.chart, self.rows]

    def show(self) -> None:
        look = self.state.look
        if look is self._look:
            return
        self._look, plan = look, look.plan
        first, _, rest = allowed(plan).partition(" Of ")
        more = (f"Of {rest}" if rest else "", needed(plan), worn(plan))
        put(self.words, html=blocks((GREY, escape(PROMISE)), (BLUE, headlined(escape(first), more))))
        self.chart.present(drives_picture(by_drive(plan)))
        self.rows.show(list(by_quant(plan)))


class ExportBox(Box):
    """The same split as other engines say it."""

    def make(self) -> list[w.Widget]:
        self.engine = described(w.Dropdown, "for", "the program that shall split it so", options=[*WRITERS], width="260px")
        self.engine.observe(self.panel.guarded(lambda _: self.show()), "value")
        self.problem = Words(layout=w.Layout(width="100%"))
        self.text = CopyBox(label="split")
        return [self.engine, self.problem, self.text]

    def show(self) -> None:
        try:
            text, problem = str(self.state.plan.export(self.engine.value)), ""
        except LabError as error:
            text, problem = "", str(error)
        put(self.text, text=text)
        self.problem.say(problem)


_AHEAD = ("Not measured yet. With one slot a layer is read when it is wanted, and computing waits; with two the next one is "
          "read meanwhile. What that is worth depends on which of the two takes longer.")
