"""What the advisor unfolds: how to get and run the chosen one, what has no score, and two claims about smaller models."""

import ipywidgets as w

from ..advice.generations import against, against_table, against_words, tenths, tenths_table, tenths_words
from ..catalog import Table
from ..errors import LabError
from ..exports import WRITERS
from .advice_figures import against_picture, tenths_picture
from .boxes.box import Box
from .copying import CopyBox
from .live import Chart, Words
from .panel import described, put
from .table import Rows


class RunBox(Box):
    """Shell lines that get the chosen one, and the command that runs it."""

    def make(self) -> list[w.Widget]:
        self.engine = described(w.Dropdown, "run by", "the program that shall run it", width="min(100%, 380px)",
                                options=[(name, name) for name in WRITERS])
        self.engine.observe(self.panel.guarded(lambda _: self.show()), "value")
        self.words = Words(layout=w.Layout(width="100%"))
        self.text = CopyBox(label="commands")
        return [self.engine, self.words, self.text]

    def show(self) -> None:
        choice = self.state.choice
        if choice is None:
            self.words.say("Nothing keeps to all limits.")
            put(self.text, text="")
            return
        try:
            text, said = choice.get + str(choice.command(self.engine.value)), choice.changes
        except LabError as error:
            text, said = choice.get, str(error)
        self.words.say(f"{choice.entry.name} in {choice.quant}: {choice.why}. {said[:1].upper()}{said[1:]}.")
        put(self.text, text=text)


class UnknownBox(Box):
    """What fits and has no score in this setting."""

    def make(self) -> list[w.Widget]:
        self.rows = Rows(caption="they keep to every limit but the score; theirs here are not known, which is not zero")
        self.words = Words(layout=w.Layout(width="100%"))
        return [self.words, self.rows]

    def show(self) -> None:
        advice = self.state.advice
        higher = sorted((one for one in advice.comparisons if one.ahead), key=lambda one: one.ahead != "ahead")
        beside = [f"{one} ({one.ahead})" for one in higher]
        ahead = f"Before the first choice where another setting scores both: {'; '.join(beside[:3])}." if beside else ""
        none = "None of them comes before the first choice in a setting that scores both." if advice.choices else ""
        self.words.say(ahead or none)
        self.rows.show(list(self.state.unknown))


class _Claim(Box):
    """A claim asked of published scores: words, a chart, the rows."""

    found, words_of, table_of, picture, alt, caption = (None,) * 6

    def make(self) -> list[w.Widget]:
        found = type(self).found()
        words = Words(layout=w.Layout(width="100%"))
        words.say(type(self).words_of(found))
        rows = Rows(caption=self.caption)
        rows.show(texts(type(self).table_of(found)))
        return [words, Chart(type(self).picture(found), self.alt), rows]

    def show(self) -> None:
        """It is of published scores alone: nothing of it changes."""


class AgainstBox(_Claim):
    """An old 13B beside every newer and smaller model."""

    found, words_of, table_of, picture = against, against_words, against_table, against_picture
    alt = "chart: how far newer and smaller models are ahead of Llama 2 13B, published"
    caption = "published scores, each row within one setting; GiB of weights in Q4_K_M: exact; chance: 95 %"


class TenthBox(_Claim):
    """About 7B beside about 70B."""

    found, words_of, table_of, picture = tenths, tenths_words, tenths_table, tenths_picture
    alt = "chart: which share of a 70B's score the best of about 7B has, published"
    caption = "published scores, each row within one setting; bytes: weights in Q4_K_M, exact; range: 95 % of chance"


def texts(table: Table) -> list[dict]:
    """A table's rows as it would print them."""
    columns, cells = table.texts()
    return [dict(zip(columns, row, strict=True)) for row in cells]
