"""ServingState: requests to the small model here, counted; and people at a larger model on a card, modelled."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import traitlets as t

from ..catalog import Table, gpu
from ..errors import LabError
from ..fitting import fit
from ..memory import checked_integer
from ..runtime.scheduling import POLICIES
from ..shapes import ModelSpec, model_spec
from ..simulating import BANDS, WAYS, Serving, Setup, Simulation, serve, setup_of
from ..units import format_bytes, format_seconds, parse_bytes
from ..workloads import ALPACA, PREFIXES, SHAREGPT, Arrival, drawn, shared_prefix
from .quantization_state import SMALL_MODEL
from .serving_asking import ROWS, SIZE, arriving, bytes_of_block, counted, longest, reserved
from .settable import settable

DEFAULTS = {"policy": "paged", "requests": 16, "rate": None, "prefix": 32, "share": True, "sequences": 16, "memory": "16 MiB",
            "model": "llama-3-8b", "card": "rtx-4090-24gb", "quant": None, "mix": "ShareGPT", "people": 32}
THERE = ("model", "card", "quant", "mix", "people")          # settings of the card; the others are of this machine
MOST_REQUESTS, MOST_PEOPLE, LARGEST = 64, 512, 2**30
PEOPLE = (1, 2, 4, 8, 16, 32, 64, 128, 256)                  # of a curve
CONTEXT = 2048                                               # tokens of the longest sequence on a card
PACE = 10.0                                                  # tokens a second that a reader should not have to wait for
MIXES = {"ShareGPT": "chats: prompts of 161 and answers of 338 tokens in the mean",
         "Alpaca": "short questions: 19 and 58 tokens", "one prefix": "the same 341 tokens before each of Alpaca's questions"}


# ---- here -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Here:
    """Requests to the small model. `arrivals`; `memory`: bytes of KV cache, in `blocks` of `each` bytes; `serving`: how they
    are served; `runs`: {policy: what the scheduler makes of them, its seconds being steps}, exact."""

    arrivals: tuple[Arrival, ...]
    memory: int
    each: int
    serving: Serving
    runs: dict[str, Simulation]

    @property
    def blocks(self) -> int:
        return self.serving.blocks

    @property
    def run(self) -> Simulation:
        """By the policy that is chosen."""
        return self.runs[self.serving.policy]

    @property
    def made(self) -> int:
        """Tokens of all answers."""
        return sum(one.output for one in self.arrivals)

    @property
    def table(self) -> Table:
        """The policies side by side."""
        return Table([{"policy": policy, "steps": len(run.history), "texts at once": f"{run.over_time('running'):.1f}",
                       "most blocks": max(m.used for m in run.history), "of them wasted": f"{run.wasted_share:.0%}",
                       "padded rows": f"{1 - run.computing_share:.0%}", "preempted": run.preemptions}
                      for policy, run in self.runs.items()])


def serving_of(arrivals, blocks: int, sequences: int, policy: str, share: bool) -> Serving:
    """How an engine of these settings serves them."""
    return Serving(blocks, sequences, policy, reserved(arrivals) if policy == "static" else None,
                   share and policy == "paged", max(ROWS, sequences), SIZE)


def _here(policy, requests, rate, prefix, share, sequences, memory) -> Here:
    if policy not in POLICIES:
        raise LabError(f"policy is {policy!r:.40}; it is one of {', '.join(POLICIES)}")
    if not isinstance(share, bool):
        raise LabError(f"share is {share!r:.40}; it is True or False")
    requests = checked_integer("requests", requests, 1, MOST_REQUESTS, f"give how many, 1 to {MOST_REQUESTS}")
    sequences = checked_integer("sequences", sequences, 1, ROWS, f"give how many run at once at most, 1 to {ROWS}")
    prefix = checked_integer("prefix", prefix, 0, 1024, "give how many tokens all prompts begin with, 0 to 1,024")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1000):
        raise LabError(f"rate is {rate!r:.40}; give requests a second, up to 1,000, or None for all at once")
    given, arrivals = parse_bytes(memory), tuple(arriving(requests, prefix, rate))
    each, most = bytes_of_block(model_spec(SMALL_MODEL)), reserved(arrivals)
    if given > LARGEST:
        raise LabError(f"memory is {format_bytes(given)}; give {format_bytes(LARGEST)} at most: it is really allocated")
    if given < most // SIZE * each:
        raise LabError(f"memory is {format_bytes(given)}, room for {given // each * SIZE:,} tokens, and the longest request "
                       f"has {longest(arrivals):,} with its answer; give {format_bytes(most // SIZE * each)} at least")
    ways = {one: serving_of(arrivals, given // each, sequences, one, share) for one in POLICIES}
    return Here(arrivals, given, each, ways[policy], {one: counted(arrivals, way) for one, way in ways.items()})


# ---- on a card --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Point:
    """So many people who each ask again as soon as they have their answer. tokens: a second, of all of them; each: seconds a
    token after the first, first: seconds to the first token, medians; normalized: latency over the answer's tokens, mean;
    running, waiting: texts, and wasted: share of the reserved cache that holds nothing, means over time."""

    people: int
    tokens: float
    each: float
    first: float
    normalized: float
    running: float
    waiting: float
    wasted: float


def point_of(run: Simulation, people: int, steady: bool = True) -> Point:
    """A run in these numbers. steady: throughput and what is held while there is always one who asks next; a run's end, when
    fewer and fewer are there, is left out."""
    until = max(one.arrived for one in run.requests) if steady else 0.0
    kept = [step for step in run.history if step.at < until] or list(run.history)
    seconds, used = sum(step.seconds for step in kept), sum(step.used * step.seconds for step in kept) * run.size
    running, waiting, wasted = (sum(getattr(step, what) * step.seconds for step in kept) for what in
                                ("running", "waiting", "wasted"))
    tokens = sum(step.logits for step in kept) / seconds if until else run.tokens_per_second
    return Point(people, tokens, run.percentile("each", 50), run.percentile("first_seconds", 50), run.mean("normalized"),
                 running / seconds, waiting / seconds, wasted / used if used else 0.0)


@dataclass(frozen=True, eq=False)
class There:
    """A model on a card, its weights in `quant`. `bands`: the point of the chosen number of people at the low end of speed,
    best, high; `static`: the same by padded batches of whole contexts, best. All modelled."""

    spec: ModelSpec
    quant: str
    setup: Setup
    mix: str
    people: int
    bands: tuple[Point, Point, Point]
    static: Point

    @property
    def point(self) -> Point:
        return self.bands[1]

    @property
    def times(self) -> float:
        """Throughput over that of static batches."""
        return self.point.tokens / self.static.tokens

    def bands_at(self, people: int) -> tuple[Point, Point, Point]:
        """The same of another number of people."""
        return tuple(point(self.setup, self.mix, people, "paged", band) for band in BANDS)

    @cached_property
    def curve(self) -> tuple[tuple[Point, Point, Point], ...]:
        """Of each of PEOPLE; it takes seconds."""
        return tuple(map(self.bands_at, PEOPLE))

    @cached_property
    def ways(self) -> dict[str, Point]:
        """Ways to serve as many people at the same memory."""
        return {way: point(self.setup, self.mix, self.people, way, "best") for way in WAYS}

    def bears(self, pace: float = PACE) -> tuple[int, int, int]:
        """How many people get `pace` tokens a second at least, waiting included (mean normalized latency): the most of PEOPLE,
        at the low end of speed, best, high; 0 where not even one does."""
        return tuple(max((row[at].people for row in self.curve if row[at].normalized <= 1 / pace), default=0)
                     for at in range(3))

    @property
    def table(self) -> Table:
        """The curve, a row a number of people."""
        return Table([{"people": f"{best.people}", "tokens/s": f"{best.tokens:,.0f} ({low.tokens:,.0f} to {high.tokens:,.0f})",
                       "for each": f"{1 / best.each:.0f}", "first token": format_seconds(best.first),
                       "at once": f"{best.running:.0f}", "wasted": f"{best.wasted:.1%}"} for low, best, high in self.curve])


def mixed(mix: str, count: int) -> list[Arrival]:
    """Requests of one of MIXES."""
    if mix == "one prefix":
        return shared_prefix(count, PREFIXES[1])
    return drawn(count, *{"ShareGPT": SHAREGPT, "Alpaca": ALPACA}[mix])


@lru_cache(maxsize=4096)
def point(setup: Setup, mix: str, people: int, way: str, band: str) -> Point:
    """One simulation. Raises LabError."""
    return point_of(serve(setup, mixed(mix, min(max(32, 3 * people), people + 192)), way, clients=people, band=band), people)


def _there(model, card, quant, mix, people) -> There:
    if mix not in MIXES:
        raise LabError(f"mix is {mix!r:.40}; it is one of {', '.join(MIXES)}")
    people = checked_integer("people", people, 1, MOST_PEOPLE, f"give how many ask at once, 1 to {MOST_PEOPLE}")
    if not card or not isinstance(card, (str, list, tuple)):
        raise LabError("many people at a larger model are modelled on a card of the catalogue: choose one")
    cards = [gpu(one) for one in ([card] if isinstance(card, str) else card)]
    report = fit(model, cards, quant=quant, context=CONTEXT, engine="vllm")
    made = setup_of(report)
    bands = tuple(point(made, mix, people, "paged", band) for band in BANDS)
    return There(report.spec, report.settings.quant, made, mix, people, bands, point(made, mix, people, "static", "best"))


# ---- the state --------------------------------------------------------------------------------------------------------

class ServingState(settable(DEFAULTS)):
    """The settings as traits; `here` and `there` follow, and in words `answer` and `error`.

    Here, the small model on this machine. policy: "paged", "static" (padded batches of whole contexts) or "alone". requests:
    how many; rate: how many a second (None: all at once); prefix: tokens that all prompts begin with; share: whether these are
    kept once; sequences: texts that run at once, at most; memory: of the KV cache, bytes or words. There: model, card (or a
    list of cards), quant (None: vLLM's usual), mix: one of MIXES; people, who each ask again as soon as they have their answer.
    A value that cannot be used leaves the last good ones in place and says why in `error`; several changes in `update(...)` are
    followed once.
    """

    here = t.Instance(Here, allow_none=True, read_only=True)
    there = t.Instance(There, allow_none=True, read_only=True)
    answer = t.Unicode(read_only=True)
    error = t.Unicode(read_only=True)

    def __init__(self, **settings):
        """Raises LabError for settings that cannot be used: there are no last good ones yet."""
        self._asked = {}
        super().__init__(**self._known(settings))
        self._follow()
        if self.here is None:
            raise LabError(self.error)

    @t.observe(*DEFAULTS)
    def _follow(self, _=None) -> None:
        asked, before = {name: getattr(self, name) for name in DEFAULTS}, self._asked
        if asked == before:                  # changes made together arrive one by one, all of them in place
            return
        if before and asked["model"] != before["model"] and asked["quant"] == before["quant"]:
            asked["quant"] = None
        self._asked = asked
        mine = {name: value for name, value in asked.items() if name not in THERE}
        theirs = {name: asked[name] for name in THERE}
        try:
            here, there = self.here, self.there
            if here is None or self.error or any(mine[name] != before.get(name) for name in mine):
                here = _here(**mine)
            if there is None or self.error or any(theirs[name] != before.get(name) for name in theirs):
                there = _there(**theirs)
        except LabError as error:
            self.set_trait("error", str(error))
            return
        with self.hold_trait_notifications():
            self.quant = asked["quant"]
            for name, value in {"error": "", "here": here, "there": there,
                                "answer": f"{here_words(here)} {there_words(there)}"}.items():
                self.set_trait(name, value)


# ---- in words ---------------------------------------------------------------------------------------------------------

def here_words(here: Here) -> str:
    """What the scheduler makes of the requests."""
    run, other = here.run, here.runs["static" if here.serving.policy != "static" else "paged"]
    return (f"{_many(len(here.arrivals), 'request')} in {here.blocks} blocks of {SIZE} tokens ({format_bytes(here.memory)} of "
            f"KV cache), {NAMES[run.policy]}: {_steps(run)}; {NAMES[other.policy]}: {_steps(other)}. Exact, counted without "
            "the model.")


def _steps(run: Simulation) -> str:
    return (f"{len(run.history)} steps, {run.over_time('running'):.1f} texts at once, {run.wasted_share:.0%} of what they "
            "reserve holds nothing")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


NAMES = {"paged": "paged", "static": "static padded batches", "alone": "one by one"}


def there_words(there: There) -> str:
    """What a card does for so many people."""
    low, best, high = there.bands
    waits = f", of whom {best.waiting:.0f} wait for room" if best.waiting >= 0.05 * best.people else ""
    return (f"{there.setup.title}, {_people(there.people)} asking{waits}: {best.tokens:,.0f} tokens/s ({low.tokens:,.0f} to "
            f"{high.tokens:,.0f}), {1 / best.each:.0f} for each, the first after {format_seconds(best.first)}; "
            f"{there.times:.1f} times what static padded batches give. Modelled.")


def _people(count: int) -> str:
    return "1 person" if count == 1 else f"{count} people"


def bears_words(there: There, pace: float = PACE) -> str:
    """How many people one card serves."""
    low, best, high = there.bears(pace)
    if not best:
        return f"{there.setup.title} gives not even one person {pace:g} tokens/s: modelled."
    tried = ", the most that were tried" if best == PEOPLE[-1] else ""
    return (f"{there.setup.title} serves {_people(best)} ({low} to {high}) at {pace:g} tokens/s or more for each, waiting "
            f"included{tried}: modelled.")
