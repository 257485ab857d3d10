"""Two configurations side by side: the one kept as A, and the present one."""

import ipywidgets as w

from .. import compare
from ..live import Words
from ..table import Rows
from .box import Box, line


class CompareBox(Box):
    """Keep as A, exchange, stop; in words and as a table. A's bars stand below the present ones in the chart."""

    def make(self) -> list[w.Widget]:
        button = self.panel.button
        self.keep = button("keep this as A", "remember the present configuration; its bars stay in the chart", self.state.keep)
        self.exchange = button("exchange", "back to A; the present configuration becomes A", self.state.exchange)
        self.stop = button("stop comparing", "forget A", self.state.forget)
        self.words, self.rows = Words(layout=w.Layout(width="100%")), Rows(caption="what differs")
        return [line(self.keep, self.exchange, self.stop), self.words, self.rows]

    def show(self) -> None:
        kept = self.state.kept
        for button in (self.exchange, self.stop):
            button.disabled = kept is None
        self.words.say(self.state.difference or "Keep a configuration as A, then change something: both stay in the chart.")
        self.rows.show(compare.rows(kept.report, self.state.report) if kept else [])
