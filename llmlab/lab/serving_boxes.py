"""What the serving panel unfolds: the claim of 2 to 4 times, more people at once, a prompt that all begin with, and a card."""

from html import escape

import ipywidgets as w

from . import options
from .boxes.box import Box, line
from .live import Chart, Words
from .panel import blocks, grid, headlined, offer, put, visible
from .serving_figures import people_picture, points_of, race_picture, sharing_picture
from .serving_run import AT_ONCE
from .serving_state import MIXES, bears_words, there_words
from .style import BLUE, GREY
from .table import Rows

PEOPLE = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256)
MODELS = ("llama-3-8b", "llama-2-7b", "llama-2-13b", "qwen2.5-7b", "qwen3-14b", "llama-3-70b")
SETUPS = (("8B on a 4090", {"model": "llama-3-8b", "card": "rtx-4090-24gb"}),
          ("13B on an A100", {"model": "llama-2-13b", "card": "a100-sxm4-40gb"}),
          ("8B in 4 bits on a 4090", {"model": "llama-3-8b", "card": "rtx-4090-24gb", "quant": "AWQ_INT4"}),
          ("14B on an H100", {"model": "qwen3-14b", "card": "h100-sxm5-80gb"}))


class _Measuring(Box):
    """A measurement of the panel's run: buttons, words, a chart, rows. Subclasses say which, and draw it."""

    WHAT = DRAWN = CAPTION = UNTIL = ""

    def make(self) -> list[w.Widget]:
        run, self._shown = self.panel.run, None
        self.start = self.panel.button(self.WHAT, self.UNTIL, self.begin, button_style="primary")
        self.stop = self.panel.button("stop", "end it after the present step", run.end)
        self.words = Words(layout=w.Layout(width="100%"))
        self.chart = Chart(self.picture(), self.DRAWN)
        self.rows = Rows(caption="")
        return [line(self.start, self.stop), self.words, self.chart, self.rows]

    def show(self) -> None:
        run, found = self.panel.run, self.found()
        put(self.start, disabled=run.running)
        put(self.stop, disabled=not run.running)
        self.words.say(run.progress if run.running else run.error or (self.answer() if len(found) > 1 else self.UNTIL))
        visible(self.chart, bool(found))
        if found is not self._shown:           # it is looked at ten times a second while something runs
            self._shown = found
            self.chart.present(self.picture())
            put(self.rows, caption=self.CAPTION if found else "")
            self.rows.show(self.table())

    def begin(self) -> None:
        raise NotImplementedError

    def found(self):
        raise NotImplementedError

    def answer(self) -> str:
        raise NotImplementedError

    def picture(self) -> dict:
        raise NotImplementedError

    def table(self) -> list[dict]:
        raise NotImplementedError


class RaceBox(_Measuring):
    """The policies in the same memory."""

    WHAT, DRAWN = "compare", "chart: tokens per second and wasted cache by policy, measured"
    CAPTION = "the same requests in the same bytes of cache, measured"
    UNTIL = ("Not measured yet: as many requests that have nothing in common, served paged, in static padded batches and one "
             "by one, in the same bytes of cache.")

    def make(self) -> list[w.Widget]:
        self.beside = Rows(caption="")
        return [*super().make(), self.beside]

    def begin(self) -> None:
        self.panel.run.start_race()

    def found(self):
        return self.panel.run.race

    def answer(self) -> str:
        return self.panel.run.race_answer

    def picture(self) -> dict:
        run = self.panel.run
        return race_picture(run.race, run.beside)

    def table(self) -> list[dict]:
        found = self.panel.run.beside_table
        put(self.beside, caption="predicted beside measured: the simulator knows what the paged run's steps took" if len(found)
            else "")
        self.beside.show([{name: found._text(name, value) for name, value in row.items()} for row in found])
        return list(self.panel.run.race_table)


class LoadBox(_Measuring):
    """More and more at once."""

    WHAT, DRAWN = "measure", "chart: throughput and waiting against how many are at once, measured and predicted"
    CAPTION = "each asks again as soon as it has its answer: measured, and predicted by what steps took"
    UNTIL = f"Not measured yet: {', '.join(map(str, AT_ONCE))} at once, each asking again as soon as it has its answer."

    def begin(self) -> None:
        self.panel.run.start_load()

    def found(self):
        return self.panel.run.load

    def answer(self) -> str:
        return self.panel.run.load_answer

    def picture(self) -> dict:
        run = self.panel.run
        said = points_of(run.predicted)
        return people_picture([(one, one, one) for one in said],
                              points_of({one.serving.clients: one.found for one in run.load}), kind="predicted")

    def table(self) -> list[dict]:
        return list(self.panel.run.load_table)


class SharingBox(_Measuring):
    """What all begin with, kept once or by each."""

    WHAT, DRAWN = "measure both", "chart: blocks in use along time, the beginning kept once and by each, measured"
    CAPTION = "the same requests twice, measured"
    UNTIL = ("Not measured yet: the requests above twice, what they begin with kept once, found by a hash over all tokens up "
             "to a block's end; and kept by each.")

    def begin(self) -> None:
        self.panel.run.start_sharing()

    def found(self):
        return self.panel.run.sharing

    def answer(self) -> str:
        return self.panel.run.sharing_answer

    def picture(self) -> dict:
        return sharing_picture(self.panel.run.sharing)

    def table(self) -> list[dict]:
        return list(self.panel.run.sharing_table)


class CardBox(Box):
    """People at a model on a card: modelled."""

    def make(self) -> list[w.Widget]:
        panel, self._shown = self.panel, None
        self.model = panel.bound("model", w.Dropdown, "model", "the model that is served, by vLLM", options=options.models())
        self.card = panel.bound("card", w.Dropdown, "card", "the card that serves it", options=self._cards())
        self.quant = panel.bound("quant", w.Dropdown, "weights", "the quant, as vLLM has it")
        self.mix = panel.bound("mix", w.Dropdown, "they ask", "how long prompts and answers are",
                               options=[(f"{name}: {why}", name) for name, why in MIXES.items()])
        self.people = panel.bound("people", w.SelectionSlider, "people", "each asks again as soon as the answer is there",
                                  options=[("1", 1)], continuous_update=False)
        self.start = panel.button("simulate 1 to 256", "how throughput and waiting go with the number of people: modelled",
                                  panel.run.start_card, button_style="primary")
        self.stop = panel.button("stop", "end it", panel.run.end)
        self.progress = Words(layout=w.Layout(width="100%"))
        self.words = Words(layout=w.Layout(width="100%"))
        self.chart = Chart(people_picture(()), "chart: throughput and waiting against people at once, modelled")
        self.rows = Rows(caption="")
        self.ways = Rows(caption="")
        setups = line(*(panel.button(label, "a setup of the catalogue", lambda settings=settings: self.state.update(
            **{"quant": None, **settings})) for label, settings in SETUPS))
        return [setups, grid(300, self.model, self.card, self.quant, self.mix), self.people, self.words,
                line(self.start, self.stop), self.progress, self.chart, self.rows, self.ways]

    def show(self) -> None:
        state, run, there = self.state, self.panel.run, self.state.there
        put(self.start, disabled=run.running)
        put(self.stop, disabled=not run.running)
        self.progress.say(run.progress if run.running else run.error)
        drawn = there is run.card
        if not state.error and (there, drawn) != self._shown:
            self._shown = there, drawn
            self._show_settings()
            self._show_card(drawn)

    def _show_settings(self) -> None:
        state, there = self.state, self.state.there
        spec = there.spec
        model = spec.name if spec.source == "catalogue" else spec.path or state.model
        offer(self.model, options.models(), model, spec.title)
        offer(self.card, self._cards(), state.card, str(state.card))
        offer(self.quant, options.quants(spec, "vllm"), there.quant, there.quant)
        put(self.mix, value=state.mix)
        offer(self.people, [(f"{n}", n) for n in sorted({*PEOPLE, there.people})], there.people, "")

    def _show_card(self, drawn: bool) -> None:
        there = self.state.there
        headline = bears_words(there) if drawn else there_words(there)
        put(self.words, html=blocks((BLUE, headlined(escape(headline), (there_words(there) if drawn else "",))),
                                    (GREY, escape(there.setup.cost.why + "."))))
        curve = there.curve if drawn else ()
        visible(self.chart, drawn)
        self.chart.present(people_picture(curve, now=there.point))
        put(self.rows, caption="each asks again as soon as the answer is there, modelled" if drawn else "")
        put(self.ways, caption=f"{there.people} people at the same memory, modelled" if drawn else "")
        self.rows.show(list(there.table) if drawn else [])
        self.ways.show([{"served": name, "tokens/s": f"{one.tokens:,.0f}", "for each": f"{1 / one.each:.0f}",
                         "texts at once": f"{one.running:.0f}", "wasted": f"{one.wasted:.0%}"}
                        for name, one in (there.ways.items() if drawn else ())])

    def _cards(self) -> options.Options:
        return options.cards()[2:]             # without this machine
