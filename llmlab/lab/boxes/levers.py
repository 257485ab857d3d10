"""The lever table: what one step of each setting frees and costs, a button a row that takes it."""

import ipywidgets as w

from ..levers import rows, words
from ..live import Words
from ..table import Rows
from .box import Box


class LeverBox(Box):
    """Each lever's next step; those that make it fit first."""

    def make(self) -> list[w.Widget]:
        self._levers = {}
        self.words = Words(layout=w.Layout(width="100%"))
        self.rows = Rows(self.panel.guarded(self._take))
        return [self.words, self.rows]

    def show(self) -> None:
        found = self.state.report.levers()
        self._levers = {f"{one.name} {one.after}": one for one in found}
        self.words.say(words(self.state.report, found))
        actions = iter(self._levers.items())
        self.rows.show(rows(found), lambda _: _button(*next(actions)))

    def _take(self, key: str) -> None:
        self.state.update(**self._levers[key].change)


def _button(key: str, lever) -> tuple[str, str, str]:
    return key, "take", f"{lever.name}: {lever.before} to {lever.after}; then it {lever.verdict}"
