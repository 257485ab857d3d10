"""ServingExplorer: widgets over a ServingState and a ServingRun: blocks filling and freeing, requests along time, what it is
worth, and how many people a card serves."""

from html import escape

import ipywidgets as w

from ..runtime.scheduling import POLICIES
from ..units import MIB
from .boxes.box import line
from .folds import Folds
from .live import Chart, Keys, Words
from .options import NOTHING
from .panel import Panel, blocks, grid, headlined, offer, put, told
from .serving_boxes import CardBox, LoadBox, RaceBox, SharingBox
from .serving_figures import STATES, along_picture, pool_picture
from .serving_run import Frame, ServingRun, ran_words
from .serving_state import DEFAULTS, NAMES, THERE, ServingState, here_words, there_words
from .style import GREEN, GREY, ORANGE, RED
from .table import Rows

HERE = {name: value for name, value in DEFAULTS.items() if name not in THERE}
PRESETS = (("a few at once", "16 requests in 16 MiB of cache, paged", {}),
           ("static batches", "the same, each reserving the longest there may be", {"policy": "static"}),
           ("one by one", "the same, one after another", {"policy": "alone"}),
           ("little memory", "24 requests in half the cache: most of them wait",
            {"requests": 24, "memory": "8 MiB", "prefix": 0}),
           ("one prompt for all", "96 tokens that all begin with", {"prefix": 96}),
           ("two a second", "they come one after another", {"rate": 2.0}))
REQUESTS, SEQUENCES, PREFIXES = (2, 4, 6, 8, 12, 16, 24, 32), (1, 2, 4, 8, 16, 32), (0, 16, 32, 48, 64, 96, 128)
MEMORIES = (8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)          # MiB
RATES = (0.5, 1.0, 2.0, 4.0, 8.0)
_FOLDS = {"the claim: 2 to 4 times": (RaceBox, "paged, static padded batches and one by one in the same bytes: measured"),
          "more people at once": (LoadBox, "throughput and waiting against how many are at once: measured and predicted"),
          "a prompt that all begin with": (SharingBox, "blocks and time to the first token, kept once and by each: measured"),
          "on a card": (CardBox, "how many people a card serves: modelled")}


class ServingExplorer(Panel):
    """Serve some requests at once by the small model and watch the blocks of its cache; measure what that is worth; and see how
    many people a larger model on a card would serve. `panel.state` is the same in code, `panel.run` the runs.

    `ServingExplorer(requests=16, memory="32 MiB", policy="static")`, or over a ServingState. Raises LabError for settings that
    cannot be used.
    """

    def __init__(self, state: ServingState | None = None, **settings):
        if isinstance(state, ServingState):
            state.update(**settings)
        else:
            state = ServingState(**settings if state is None else {"model": state, **settings})
        super().__init__(state)
        self.run = ServingRun(state)
        self._make()
        self.children = self._arranged()
        self.add_class("llmlab-serving")
        self._show()
        self.state.observe(self._show, ["here", "there", "error"])
        self.run.observe(self._show_run, ["frame", "ran", "race", "load", "sharing", "card", "progress", "running", "error"])

    def close(self) -> None:
        """Take the panel off the page; what it runs ends after the present step."""
        self.run.end()
        super().close()

    # ---- making the widgets -----------------------------------------------------------------------------

    def _make(self) -> None:
        bound, here = self.bound, self.state.here
        self.policy = bound("policy", w.Dropdown, "served", "how texts are put together, and what they reserve",
                            options=[(NAMES[one], one) for one in POLICIES])
        self.requests = bound("requests", w.Dropdown, "requests", "how many; their lengths are ShareGPT's made small",
                              options=[(f"{n}", n) for n in REQUESTS])
        self.rate = bound("rate", w.Dropdown, "they come", "all at once, or so many a second in the mean",
                          options=[("all at once", NOTHING), *((f"{rate:g} a second", rate) for rate in RATES)])
        self.prefix = bound("prefix", w.Dropdown, "prefix", "tokens that all prompts begin with",
                            options=[(f"{n} tokens", n) for n in PREFIXES])
        self.share = bound("share", w.Checkbox, "prefix kept once", "what prompts begin with is in the cache once, for all",
                           indent=True)
        self.sequences = bound("sequences", w.Dropdown, "at most", "texts that run at once, at most",
                               options=[(f"{n} at once", n) for n in SEQUENCES])
        self.memory = bound("memory", w.SelectionSlider, "KV cache", "memory for the keys and values of all of them",
                            options=[("", 0)], continuous_update=False)
        self.said = Words(layout=w.Layout(width="100%", margin="8px 0 0"))
        self.start = self.button("serve", "serve them by the small model, on this machine", self.run.start,
                                 button_style="primary")
        self.stop = self.button("stop", "end it after the present step", self.run.end)
        self.ran = Words(layout=w.Layout(width="100%", margin="4px 0 0"))
        self.pool = Chart(pool_picture(None, here.blocks), "chart: every block of the pool, in the colour of whose it is")
        self.along = Chart(along_picture(None, len(here.arrivals)), "chart: what each request did when, measured")
        self.rows = Rows(caption="")
        self.folds = Folds(self, {title: kind for title, (kind, _) in _FOLDS.items()},
                           {title: why for title, (_, why) in _FOLDS.items()})

    def _arranged(self) -> list[w.Widget]:
        presets = line(*(self.button(label, why, lambda more=more: self.state.update(**{**HERE, **more}))
                         for label, why, more in PRESETS))
        return [presets, grid(300, self.policy, self.requests, self.rate, self.prefix, self.share, self.sequences), self.memory,
                self.said, line(self.start, self.stop), self.ran, self.pool, self.along, self.rows, self.folds, Keys()]

    # ---- from the state to the reader -------------------------------------------------------------------

    def _show(self, change=None) -> None:
        """Bring everything up to date. Where there is an error the widgets keep what the reader asked for."""
        if not self.state.error:
            with self.showing():
                self._show_settings()
        self._say(self.state.error)
        self._show_run()

    def _show_settings(self) -> None:
        state, here = self.state, self.state.here
        serving = here.serving
        put(self.policy, value=serving.policy)
        offer(self.requests, [(f"{n}", n) for n in REQUESTS], len(here.arrivals), f"{len(here.arrivals)}")
        offer(self.rate, [("all at once", NOTHING), *((f"{rate:g} a second", rate) for rate in RATES)], state.rate,
              f"{state.rate} a second")
        offer(self.prefix, [(f"{n} tokens", n) for n in PREFIXES], state.prefix, f"{state.prefix} tokens")
        put(self.share, value=state.share)
        offer(self.sequences, [(f"{n} at once", n) for n in SEQUENCES], state.sequences, f"{state.sequences} at once")
        sizes = sorted({*(n * MIB for n in MEMORIES), here.memory})
        offer(self.memory, [(f"{size / MIB:g} MiB", size) for size in sizes], here.memory, "")

    def _show_run(self, change=None) -> None:
        """What is served, or was."""
        run, here = self.run, self.state.here
        put(self.start, disabled=run.running)
        put(self.stop, disabled=not run.running)
        put(self.ran, html=self._ran())
        if change is None or change["name"] in ("frame", "running"):
            frame = self._frame
            self.pool.present(pool_picture(frame, here.blocks))
            self.along.present(along_picture(frame, max(len(frame.requests), 1) if frame else len(here.arrivals)))
            put(self.rows, caption="what each holds: exact; and what it said" if frame else "")
            self.rows.show(self._told(frame))
        self.folds.show()

    @property
    def _frame(self) -> Frame | None:
        """What is seen of the run; nothing of one that is over and was of another pool."""
        frame = self.run.frame
        return frame if self.run.running or frame and len(frame.blocks) == self.state.here.blocks else None

    def _told(self, frame: Frame | None) -> list[dict]:
        return [{"request": f"{one.request}", "is": STATES[one.state][0] if one.state in STATES else one.state,
                 "prompt": f"{one.prompt} tokens", "of them there already": f"{one.reused}", "new": f"{one.new}",
                 "blocks": f"{one.blocks}", "preempted": f"{one.preempted}", "says": _short(one.text)}
                for one in (frame.requests if frame else ())]

    def _ran(self) -> str:
        run = self.run
        said = ran_words(run.ran) if run.ran and not run.running else ""
        first, _, rest = said.partition("; ")
        idle = "" if run.running or said or run.error or run.progress else _IDLE
        return blocks((RED, escape(run.error)), (ORANGE, escape(run.progress)),
                      (GREEN, headlined(escape(first), (rest,)) if said else ""), (GREY, escape(idle)))

    def _say(self, problem: str) -> None:
        state = self.state
        first, _, rest = here_words(state.here).partition(": ")
        put(self.said, html=told(escape(first), (rest[:1].upper() + rest[1:], there_words(state.there)), problem))


def _short(text: str, most: int = 60) -> str:
    """A text in one line."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}..."


_IDLE = "Press serve: SmolLM2 135M on this machine, and its cache's blocks as they fill and free."
