"""ServingRun: the requests of a ServingState really served by the small model on this machine: blocks as they fill and free,
requests along time, and what paging, more people at once and a shared prompt are worth, measured."""

import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import traitlets as t

from ..catalog import Table
from ..errors import LabError
from ..gguf import read_gguf
from ..memory import checked_integer
from ..runtime.decoder import Decoder
from ..runtime.engine import Engine, View
from ..runtime.generating import Options
from ..runtime.jobs import Answer, Job
from ..runtime.paged import block_bytes
from ..runtime.scheduling import POLICIES
from ..simulating import Beside, Fitted, Serving, Simulation, beside_measured, learnt, measured
from ..units import format_seconds
from ..vocabulary import words_of
from ..workloads import Arrival
from .background import PAUSE, Background, Stopped
from .quantization_state import path_of
from .serving_asking import KV, SIZE, arriving, counted, prompts, reserved
from .serving_state import NAMES, PEOPLE, ServingState, There, bears_words, serving_of

LOOK = 0.01                       # seconds between two looks at the engine
AT_ONCE = (1, 2, 4, 8)            # of the measurement of load
FURTHER = (1, 2, 4, 8, 16, 32)    # and what is predicted from it
MOST = 32                         # at once
WARM = 4                          # tokens made before anything is measured
QUEUED, READING, WRITING, PREEMPTED, KEPT = STATES = ("queued", "reading", "writing", "preempted", "kept")


class Held(NamedTuple):
    """A block of the pool. whose: number of the request from 1, 0 nobody's, -1 cached; holders: requests that hold it; cells:
    of it, that hold something."""

    whose: int
    holders: int
    cells: int


class Span(NamedTuple):
    """A request in one of STATES, seconds from the start. "kept": it has ended and its blocks are still held."""

    request: int
    state: str
    start: float
    end: float


class Told(NamedTuple):
    """A request now: its state ("done" when nothing is left), tokens of the prompt and those of it that were there already, new
    ones, blocks it holds, how often preempted, and its text once it has ended."""

    request: int
    state: str
    prompt: int
    reused: int
    new: int
    blocks: int
    preempted: int
    text: str = ""


@dataclass(frozen=True)
class Frame:
    """All of it at one moment, `at` seconds after the start."""

    at: float
    blocks: tuple[Held, ...]
    spans: tuple[Span, ...]
    requests: tuple[Told, ...]


@dataclass(frozen=True)
class Ran:
    """Requests that were served: how, and what came, measured."""

    arrivals: tuple[Arrival, ...]
    serving: Serving
    found: Simulation


class ServingRun(Background):
    """Serves the requests of `state`, as it is when this starts, by the small model. `frame` follows while `running`; `ran` is
    what came of it; `race` {policy: Ran} compares the policies in the same memory, `load` numbers of people at once, `sharing`
    {True, False: Ran} a prompt that all begin with, kept once or not; `card` is what was simulated of a card.

    `start()` returns at once, `run()` waits and returns the answer; so do `start_race` and `run_race`, `start_load` and
    `run_load`, `start_sharing` and `run_sharing`, `start_card` and `run_card`. `end()` ends what is under way. Raises LabError
    for what cannot be served.
    """

    frame = t.Instance(Frame, allow_none=True, read_only=True)
    ran = t.Instance(Ran, allow_none=True, read_only=True)
    race = t.Dict(read_only=True)
    load = t.Tuple(read_only=True)
    sharing = t.Dict(read_only=True)
    card = t.Instance(There, allow_none=True, read_only=True)

    def __init__(self, state: ServingState):
        self.state, self._held, self._doing = state, None, ""
        super().__init__()

    # ---- in words -----------------------------------------------------------------------------------------------

    @property
    def answer(self) -> str:
        """What came of the last run, or what is wrong."""
        if self.error or self.ran is None:
            return self.error or "Nothing was served yet."
        return ran_words(self.ran)

    @property
    def race_answer(self) -> str:
        """What paging is worth here."""
        return self.error or (race_words(self.race) if len(self.race) > 1 else "Not measured yet.")

    @property
    def load_answer(self) -> str:
        """What more people at once cost and bring here."""
        return self.error or (load_words(self.load) if len(self.load) > 1 else "Not measured yet.")

    @property
    def sharing_answer(self) -> str:
        """What is saved where all begin alike."""
        return self.error or (sharing_words(self.sharing) if len(self.sharing) > 1 else "Not measured yet.")

    @property
    def beside(self) -> tuple[Beside, ...]:
        """Every run of the race as the simulator says it, with what steps of the paged one took."""
        if "paged" not in self.race:
            return ()
        cost = learnt(self.race["paged"].found)
        return tuple(Beside(NAMES[policy], one.serving.simulated(one.arrivals, cost), one.found, policy != "paged")
                     for policy, one in self.race.items())

    @property
    def race_table(self) -> Table:
        """The policies side by side, measured."""
        return Table([{"": NAMES[policy], **_row(one.found), "padded rows": f"{1 - one.found.computing_share:.0%}"}
                      for policy, one in self.race.items()])

    @property
    def beside_table(self) -> Table:
        return beside_measured(self.beside)

    @property
    def cost(self) -> Fitted | None:
        """What a step takes here, learnt from the measurement of load."""
        return learnt(*(one.found for one in self.load)) if self.load else None

    @property
    def predicted(self) -> dict[int, Simulation]:
        """{people: simulation} for FURTHER, by what steps took in the measurement of load."""
        if not self.load:
            return {}
        cost, first = self.cost, self.load[0]
        return {n: replace(first.serving, sequences=max(FURTHER), clients=n).simulated(_busy(n), cost)
                for n in sorted({*FURTHER, *(one.serving.clients for one in self.load)})}

    @property
    def load_table(self) -> Table:
        """People at once, measured, and predicted by what steps took."""
        said = self.predicted
        return Table([{"at once": one.serving.clients, **_row(one.found),
                       "tokens/s predicted": f"{said[one.serving.clients].tokens_per_second:.1f}"} for one in self.load])

    @property
    def sharing_table(self) -> Table:
        return Table([{"the same beginning": "kept once" if share else "kept by each", **_row(one.found),
                       "tokens read": sum(a.prompt for a in one.arrivals) - one.found.reused,
                       "most blocks": max(m.used for m in one.found.history)} for share, one in self.sharing.items()])

    # ---- running ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin, and return at once. Raises LabError while something runs, and for what cannot be served."""
        here = self._ready()
        self._set(error="", frame=None, ran=None, progress=_OPENING, running=True)
        self._begin("serving", self._through, "serving requests", self._live, here.arrivals, here.serving)

    def run(self) -> str:
        """Start, wait, and return the answer. Raises LabError where something went wrong."""
        self.start()
        self._finish()
        return self.answer

    def start_race(self, policies: Iterable[str] = POLICIES) -> None:
        """Begin to compare policies, "paged" first, each with the same requests (whose prompts have nothing in common) and the
        same memory."""
        here, policies = self._ready(), list(dict.fromkeys(("paged", *policies)))
        if unknown := [one for one in policies if one not in POLICIES]:
            raise LabError(f"policy is {unknown[0]!r:.40}; it is one of {', '.join(POLICIES)}")
        self._set(error="", race={}, progress=_OPENING, running=True)
        self._begin("serving race", self._through, "comparing policies", self._race, policies, len(here.arrivals), here.serving)

    def run_race(self, policies: Iterable[str] = POLICIES) -> str:
        self.start_race(policies)
        self._finish()
        return self.race_answer

    def start_load(self, at_once: Iterable[int] = AT_ONCE) -> None:
        """Begin to serve 1, 2, 4 and 8 at once, each asking again as soon as it has its answer."""
        here, numbers = self._ready(), sorted({checked_integer("at once", n, 1, MOST, f"give numbers from 1 to {MOST}")
                                               for n in at_once})
        if not numbers:
            raise LabError("nobody asks: give how many are to be at once, like (1, 4, 8)")
        self._set(error="", load=(), progress=_OPENING, running=True)
        self._begin("serving load", self._through, "measuring load", self._loaded, numbers, here.blocks)

    def run_load(self, at_once: Iterable[int] = AT_ONCE) -> str:
        self.start_load(at_once)
        self._finish()
        return self.load_answer

    def start_sharing(self) -> None:
        """Begin to serve the requests twice: what they begin with kept once, and by each."""
        here = self._ready()
        if not any(one.shared >= here.serving.size for one in here.arrivals) or len(here.arrivals) < 2:
            raise LabError(f"nothing is shared: give a prefix of {here.serving.size} tokens or more, and two requests")
        self._set(error="", sharing={}, progress=_OPENING, running=True)
        self._begin("serving prefix", self._through, "sharing a prompt", self._shared, here.arrivals, here.serving)

    def run_sharing(self) -> str:
        self.start_sharing()
        self._finish()
        return self.sharing_answer

    def start_card(self) -> None:
        """Begin to simulate 1 to 256 people at the model on its card, in which the measurements have no part."""
        self._ready()
        self._set(error="", progress="Simulating.", running=True)
        self._begin("serving card", self._through, "simulating a card", self._simulated, self.state.there)

    def run_card(self) -> str:
        self.start_card()
        self._finish()
        return bears_words(self.card)

    def _ready(self):
        if self.running:
            raise LabError("requests are being served; end that or wait for it first")
        if self.state.error:
            raise LabError(self.state.error)
        return self.state.here

    # ---- in the thread ------------------------------------------------------------------------------------------

    def _live(self, arrivals, serving: Serving) -> None:
        self._doing = f"{NAMES[serving.policy][:1].upper()}{NAMES[serving.policy][1:]}:"
        self.set_trait("ran", self._serve(arrivals, serving, self._show))

    def _race(self, policies: list[str], count: int, serving: Serving) -> None:
        arrivals = tuple(arriving(count))
        for policy in policies:
            self._doing = f"{NAMES[policy][:1].upper()}{NAMES[policy][1:]}:"
            one = serving_of(arrivals, serving.blocks, serving.sequences, policy, False)
            self.set_trait("race", {**self.race, policy: self._serve(arrivals, one, self._count)})

    def _loaded(self, numbers: list[int], blocks: int) -> None:
        blocks = max(blocks, numbers[-1] * reserved(_busy(numbers[-1])) // SIZE)        # nobody waits for memory
        for n in numbers:
            self._doing = f"{n} at once:"
            serving = Serving(blocks, numbers[-1], share=False, clients=n)
            self.set_trait("load", (*self.load, self._serve(_busy(n), serving, self._count)))

    def _shared(self, arrivals, serving: Serving) -> None:
        for share in (True, False):
            self._doing = f"The beginning kept {'once' if share else 'by each'}:"
            one = replace(serving, policy="paged", context=None, share=share)
            self.set_trait("sharing", {**self.sharing, share: self._serve(arrivals, one, self._count)})

    def _simulated(self, there: There) -> None:
        for people in PEOPLE:
            self._say(f"Simulating {people} at once.")
            there.bands_at(people)              # which is kept
        self.set_trait("card", there)

    def _show(self, followed: "_Followed") -> None:
        self.set_trait("frame", followed.frame())
        self._count(followed)

    def _count(self, followed: "_Followed") -> None:
        self._say(f"{self._doing} {len(followed.answers)} of {len(followed.arrivals)} answered.".strip())

    @contextmanager
    def _engine(self, serving: Serving):
        """An engine of this kind, closed afterwards."""
        if self._held is None:                  # the model stays open for the next run
            file = read_gguf(path_of(None))
            words = words_of(file)
            words.stop_ids = ()                 # answers are as long as they are asked for, whatever they say
            self._held = Decoder.open(file), words
        decoder, words = self._held
        each = block_bytes(decoder.weights.shapes, serving.size, KV)
        with Engine(decoder, words, memory=serving.blocks * each, kv=KV, sequences=serving.sequences, rows=serving.rows,
                    share=serving.share, policy=serving.policy, context=serving.context) as engine:
            yield engine, words

    def _serve(self, arrivals, serving: Serving, look) -> Ran:
        """Serve them to the end; `look` is called with what is followed, ten times a second."""
        with self._engine(serving) as (engine, words):
            engine.submit([1, 2, 3], Options(temperature=0, max_tokens=WARM)).result()
            engine.history.clear()
            followed = _Followed(engine, arrivals, prompts(words, arrivals), serving.clients)
            shown = 0.0
            while not followed.step():
                if time.perf_counter() - shown > PAUSE:
                    shown = time.perf_counter()
                    look(followed)              # raises Stopped where it is to end
                if self._stopping.is_set():
                    raise Stopped
                time.sleep(LOOK)
            look(followed)
            answers = [(at, answer) for at, answer in followed.answers.values()]
            return Ran(tuple(arrivals), serving, measured(answers, engine.history, engine.blocks, serving.policy))


class _Followed:
    """Requests handed to an engine when their time comes, and what is seen of them meanwhile."""

    def __init__(self, engine: Engine, arrivals, tokens: list[list[int]], clients: int | None):
        self.engine, self.arrivals, self.tokens, self.clients = engine, arrivals, tokens, clients
        self.jobs: dict[Job, tuple[int, float]] = {}            # -> request, when it was asked for
        self.answers: dict[int, tuple[float, Answer]] = {}
        self.numbers: dict[int, int] = {}                       # the engine's own number of a text -> request
        self.told: dict[int, Told] = {}
        self.spans: list[Span] = []
        self.states: dict[int, tuple[str, float]] = {}
        self.next, self.began, self.view = 0, time.perf_counter(), None

    def step(self) -> bool:
        """Ask for what is due, look at what came; whether all has ended."""
        now = time.perf_counter() - self.began
        self._ask(now)
        for job in [job for job in self.jobs if job.ended]:
            request, at = self.jobs.pop(job)
            self.answers[request] = at, job.result()
        self._ask(now)
        self._look(self.engine.view(), now)
        return self.next == len(self.arrivals) and not self.jobs

    def _ask(self, now: float) -> None:
        while self.next < len(self.arrivals):
            arrival, request = self.arrivals[self.next], self.next + 1
            if len(self.jobs) >= self.clients if self.clients else arrival.at > now:
                return
            job = self.engine.submit(self.tokens[self.next], Options(temperature=0, max_tokens=arrival.output))
            self.jobs[job] = request, time.perf_counter() - self.began
            self.told[request] = Told(request, QUEUED, arrival.prompt, 0, 0, 0, 0)
            self.next += 1

    def _look(self, view: View, now: float) -> None:
        self.view = view
        for seen in view.texts:
            if seen.job in self.jobs:
                request, _ = self.jobs[seen.job]
                self.numbers[seen.number] = request
                waits = PREEMPTED if seen.preempted else QUEUED
                state = waits if seen.state == "waiting" else READING if seen.state == "reading" else WRITING
                self.told[request] = Told(request, state, seen.prompt, min(seen.reused, seen.prompt), seen.new,
                                          len(seen.blocks), seen.preempted)
        held = {self.numbers.get(owner) for owner in view.owners if owner > 0}
        for request, (_, answer) in self.answers.items():
            state = KEPT if request in held else "done"
            self.told[request] = Told(request, state, answer.prompt_tokens, answer.reused_tokens, len(answer.tokens),
                                      self._kept(request), answer.preempted, answer.text)
        for request, one in self.told.items():
            self._follow(request, one.state, now)

    def _kept(self, request: int) -> int:
        return sum(self.numbers.get(owner) == request for owner in self.view.owners if owner > 0)

    def _follow(self, request: int, state: str, now: float) -> None:
        before, since = self.states.get(request, (state, now))
        if state != before:
            self.spans.append(Span(request, before, since, now))
            since = now
        self.states[request] = state, since

    def frame(self) -> Frame:
        """What is to be seen now."""
        now, view = time.perf_counter() - self.began, self.view
        going = [Span(request, state, since, now) for request, (state, since) in self.states.items() if state != "done"]
        return Frame(now, tuple(held(view, self.numbers)), tuple(self.spans + going),
                     tuple(self.told[request] for request in sorted(self.told)))


def held(view: View, numbers: dict[int, int]) -> list[Held]:
    """Every block of the pool; `numbers`: which request a text is, by the engine's number of it."""
    holders, cells = [0] * len(view.owners), [0] * len(view.owners)
    for seen in view.texts:
        left = seen.cells
        for block in seen.blocks:
            holders[block] += 1
            cells[block] = max(cells[block], min(view.usage.size, max(left, 0)))
            left -= view.usage.size
    return [Held(numbers.get(owner, 0) if owner > 0 else owner, count, full if owner > 0 else view.usage.size * (owner < 0))
            for owner, count, full in zip(view.owners, holders, cells, strict=True)]


def _busy(clients: int) -> tuple[Arrival, ...]:
    """As many requests as keep a number of clients busy for a while."""
    return tuple(arriving(min(2 * clients, clients + 4)))


def tail(spans: Iterable[Span]) -> float:
    """When the last of them ends."""
    return max((span.end for span in spans), default=0.0)


# ---- in words ---------------------------------------------------------------------------------------------------------

def _row(run: Simulation) -> dict:
    return {"tokens/s": f"{run.tokens_per_second:.1f}", "first token": format_seconds(run.mean("first_seconds")),
            "each token": format_seconds(run.percentile("each", 50)), "texts at once": f"{run.over_time('running'):.1f}",
            "wasted": f"{run.wasted_share:.0%}"}


def ran_words(ran: Ran) -> str:
    """What came of a run."""
    run = ran.found
    said = (f"{len(run.requests)} requests, {NAMES[run.policy]}: {sum(one.output for one in run.requests):,} tokens in "
            f"{format_seconds(run.seconds)}, {run.tokens_per_second:.1f} tokens/s, the first after "
            f"{format_seconds(run.mean('first_seconds'))} in the mean; {run.over_time('running'):.1f} texts at once, "
            f"{run.wasted_share:.0%} of the reserved cells held nothing")
    more = [f"{run.reused} tokens of prompts were there already"] * bool(run.reused)
    more += [f"{run.preemptions} times a request was preempted and read again"] * bool(run.preemptions)
    return f"{'; '.join([said, *more])}: measured."


def race_words(race: dict[str, Ran]) -> str:
    """Whether the 2 to 4 times are there."""
    paged = race["paged"].found
    said = [f"{paged.tokens_per_second / one.found.tokens_per_second:.1f} times {NAMES[policy]} "
            f"({one.found.tokens_per_second:.1f})" for policy, one in race.items() if policy != "paged"]
    static = race.get("static")
    text = f"Paged, {paged.tokens_per_second:.1f} tokens/s, is {' and '.join(said)} in the same bytes of cache"
    if static:
        times = paged.tokens_per_second / static.found.tokens_per_second
        claim = "less than promised" if times < 2 else "as promised" if times <= 4 else "more than promised"
        text += (f": {claim} (2 to 4). Of the reserved cells {static.found.wasted_share:.0%} held nothing in static batches "
                 f"and {paged.wasted_share:.0%} in pages (the paper: 60 to 80 %, and under 4)")
    return f"{text}. Measured."


def load_words(load: tuple[Ran, ...]) -> str:
    """What more people bring, and cost each."""
    one, most = load[0], load[-1]
    gain = most.found.tokens_per_second / one.found.tokens_per_second
    slower = most.found.percentile("each", 50) / one.found.percentile("each", 50)
    return (f"{most.serving.clients} at once get {most.found.tokens_per_second:.1f} tokens/s together, {gain:.1f} times what "
            f"{one.serving.clients} alone gets ({one.found.tokens_per_second:.1f}), and each waits {slower:.1f} times as long "
            "for a token. Measured.")


def sharing_words(sharing: dict[bool, Ran]) -> str:
    """What is saved where all begin alike."""
    once, apart = sharing[True], sharing[False]
    blocks = [max(m.used for m in one.found.history) for one in (once, apart)]
    first = [one.found.mean("first_seconds") for one in (once, apart)]
    shared = once.arrivals[0].shared
    counts = [max(m.used for m in counted(one.arrivals, one.serving).history) for one in (once, apart)]
    return (f"All {len(once.arrivals)} prompts begin with the same {shared} tokens. Kept once: {once.found.reused} tokens were "
            f"not read again, {blocks[0]} blocks at most instead of {blocks[1]} ({counts[0]} and {counts[1]} counted), the "
            f"first token after {format_seconds(first[0])} instead of {format_seconds(first[1])}. Measured.")


_OPENING = "Opening the model."
