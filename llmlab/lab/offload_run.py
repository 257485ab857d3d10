"""RunState: the plan of an OffloadState carried out on this machine: text, a trace, tokens per second beside the predicted."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import traitlets as t

from ..catalog import Table
from ..errors import LabError
from ..gguf import read_gguf
from ..gguf.words import show_path
from ..hardware import ram_available
from ..offload.budget import Budget
from ..offload.opening import Offloaded, open_decoder
from ..offload.planned_words import number, rate
from ..offload.planning import Plan
from ..offload.trace import Trace
from ..places import folder
from ..rates import Band
from ..units import format_bytes, format_seconds
from ..vocabulary import words_of
from .background import PAUSE, Background, Stopped
from .offload_state import OffloadState, whole
from .settable import settable

SETTINGS = {"prompt": "The capital of France is", "tokens": 24}
MOST = 512
PACED = 6                    # tokens by which computing is measured, the first of them for warming up
PLAIN = (1, 2, 3, 4)         # a prompt where there is no vocabulary
SLOTS = (1, 2, 3)
CLOSE = 0.15                 # how near a prediction is to be
COMPARED = 8                 # tokens on which fast mode is compared with the exact mode
ROUNDS, EACH = 2, 4          # of the race between slots: how often each is opened, and tokens timed each time


@dataclass(frozen=True)
class Try:
    """One placement that was run: `predicted` tokens/s (low, best, high), modelled; `measured` over `tokens` of them. device:
    the budget in bytes. waited: share of the time that computing stood still for a layer, read: bytes a token read from the
    drive, slowed: how many times as long computing took as alone just before, all measured. settings: those that were asked.
    deviated: of fast mode, by how much its logits did. saved: it comes from a bench."""

    words: str
    device: int
    predicted: Band
    measured: float
    tokens: int = 0
    waited: float | None = None
    read: float | None = None
    slowed: float | None = None
    binds: str = ""
    settings: dict | None = None
    deviated: str = ""
    saved: bool = False

    @property
    def inside(self) -> bool:
        """Whether it landed in the band."""
        return self.predicted[0] <= self.measured <= self.predicted[2]

    @property
    def off(self) -> float:
        """How far from what was predicted, as a share of that."""
        return self.measured / self.predicted[1] - 1

    @property
    def verdict(self) -> str:
        """In words."""
        if self.inside:
            return "in the band"
        return "faster than the band" if self.measured > self.predicted[2] else "slower than the band"


@dataclass(frozen=True)
class Ahead:
    """A token with so many slots, seconds: median, and what of it was waiting for a layer. Measured."""

    slots: int
    seconds: float
    waiting: float

    @property
    def working(self) -> float:
        return self.seconds - self.waiting


class RunState(settable(SETTINGS), Background):
    """prompt: what is continued; tokens: by how many at most, greedily. Runs the plan of `state` as it is when it starts, its
    budgets enforced; `text` and `rate` (tokens/s so far) grow while `running`, `trace` has what happened, `tries` what was
    measured, `ahead` what reading ahead is worth.

    `start()` returns at once, `run()` waits and returns the answer; `start_ahead()` and `run_ahead()` are the same with 1, 2
    and 3 slots in turn. `end()` ends what is under way. Raises LabError for settings that cannot be used.
    """

    WHOSE = " of a run"
    text = t.Unicode(read_only=True)
    rate = t.Float(0.0, read_only=True)
    tries = t.Tuple(read_only=True)
    ahead = t.Tuple(read_only=True)
    found = t.List(read_only=True)           # tokens of the last run
    planned = t.Instance(Plan, allow_none=True, read_only=True)      # what is run, or was

    def __init__(self, state: OffloadState, **settings):
        self.state, self.trace, self._pace = state, Trace(), None
        super().__init__()
        self.update(**settings)

    # ---- in words -----------------------------------------------------------------------------------------------

    @property
    def answer(self) -> str:
        """What came of the last one in words, or what is wrong."""
        mine = [one for one in self.tries if not one.saved]
        if self.error or not mine:
            return self.error or "Nothing was run yet."
        return told(mine[-1])

    @property
    def ahead_answer(self) -> str:
        """What reading ahead is worth, or what is wrong."""
        if self.error or len(self.ahead) < 2:
            return self.error or "Not measured yet."
        one, best = self.ahead[0], min(self.ahead[1:], key=lambda found: found.waiting)
        gained = (one.waiting - best.waiting) / one.seconds
        said = ", ".join(f"{found.slots} slot{'s' * (found.slots > 1)} {format_seconds(found.seconds)}, "
                         f"{found.waiting / found.seconds:.0%} of it waiting" for found in self.ahead)
        worth = (f"Reading ahead saves {format_seconds(one.waiting - best.waiting)} of waiting, {gained:.0%} of a token"
                 if gained >= 0.01 else "Reading ahead saves no waiting that could be measured")
        return f"{worth}. A token with {said}: measured."

    @property
    def table(self) -> Table:
        """What was tried, predicted beside measured."""
        return Table([{"placement": one.words, "predicted tokens/s": rate(one.predicted).replace(" tokens/s", ""),
                       "measured": number(one.measured), "off": f"{one.off:+.0%}", "": one.verdict,
                       "binds, predicted": one.binds, "waiting, measured": "" if one.waited is None else f"{one.waited:.0%}",
                       "from": "a bench" if one.saved else "here"} for one in self.tries])

    @property
    def checked(self) -> str:
        """How near predictions were, in words."""
        if not self.tries:
            return "Nothing was run yet: each run becomes a point, what was predicted beside what was measured."
        close, inside = (sum(map(test, self.tries)) for test in (lambda one: abs(one.off) <= CLOSE, lambda one: one.inside))
        return (f"Of {len(self.tries)} placement{'s' * (len(self.tries) > 1)} {inside} landed in the band, {close} within "
                f"{CLOSE:.0%} of its middle: measured against modelled.")

    def recall(self, path: str | os.PathLike | None = None) -> None:
        """Add the placements that tests/bench/bench_offload.py measured and kept at `path`; None: those that llmlab ships, of
        another computer. Raises LabError where it is no such file."""
        path = folder("data") / "measured_placements.json" if path is None else path
        shown = show_path(str(path))
        try:
            rows = json.loads(Path(path).read_text(encoding="utf-8"))["placements"]
            found = tuple(Try(f"{row['layout']}, {row['stay']} stay, {format_bytes(row['budget'], 1)}", row["budget"],
                              (row["low"], row["predicted"], row["high"]), row["measured"], binds=row["binds"], saved=True)
                          for row in rows)
        except OSError as error:
            raise LabError(f"{shown} cannot be read ({error.strerror or error})") from None
        except (ValueError, KeyError, TypeError):
            raise LabError(f"{shown} holds no placements that a bench measured: give what bench_offload.py --save "
                           "wrote") from None
        self.set_trait("tries", (*self.tries, *found))

    def near(self) -> tuple[Try, ...]:
        """The tries that differ from the present settings in the device's budget at most."""
        now = self.key()
        return tuple(one for one in self.tries if one.settings == now)

    def key(self) -> dict:
        return {name: getattr(self.state, name) for name in self.state.SETTINGS if name not in ("gpu_budget", "resident")}

    # ---- running ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin, and return at once. Raises LabError while something runs, and for what cannot be run."""
        made = self._ready()
        self._set(error="", text="", rate=0.0, planned=made, progress="Opening the model.", running=True)
        self._begin("offload", self._through, "running an offloaded model", self._run, made, self.key())

    def run(self) -> str:
        """Start, wait, and return the answer. Raises LabError where something went wrong."""
        self.start()
        self._finish()
        return self.answer

    def start_ahead(self) -> None:
        """Begin to compare 1, 2 and 3 slots with the same layers resident, and return at once. Raises as `start`."""
        made = self._ready()
        if not made.streamed:
            raise LabError("all of it stays on the device: give it a smaller budget, so that there is something to read ahead")
        most = _roomy(made)
        self._set(error="", ahead=(), planned=most, progress="Opening the model.", running=True)
        self._begin("offload slots", self._through, "comparing slots", self._race, most)

    def run_ahead(self) -> str:
        """Start, wait, and return the answer. Raises LabError where something went wrong."""
        self.start_ahead()
        self._finish()
        return self.ahead_answer

    def _ready(self) -> Plan:
        if self.running:
            raise LabError("a model is running; end that or wait for it first")
        if self.state.hindrance:
            raise LabError(self.state.unable)
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise LabError("there is nothing to continue; type a text first")
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or not 2 <= self.tokens <= MOST:
            raise LabError(f"tokens is {self.tokens!r:.40}; give how many new ones, 2 to {MOST}")
        return self.state.plan

    @contextmanager
    def _opened(self, made: Plan, budget: Budget | None = None) -> Iterator[Offloaded]:
        """The decoder of a plan within its budgets, and nothing left of it afterwards."""
        self.trace.clear()
        budget = budget or Budget(made.site.device, made.site.ram)
        device = "cpu" if made.site.card is None else "cuda"
        with open_decoder(made.spec.path, made.placement, budget, device=device, trace=self.trace,
                          progress=lambda said: self._say(f"{said[:1].upper()}{said[1:]}.")) as decoder:
            yield decoder

    def _paced(self, made: Plan) -> Plan:
        """The plan with what computing takes here just now, measured with all of it on the device, where there is memory for
        that; the OffloadState then knows it too. Where `resident` was given that is believed."""
        everything = whole(made)
        if made.resident not in (None, self._pace) or made.site.card is not None or everything > ram_available() / 2:
            return made
        self._say("Measuring what computing takes, with all of it on the device.")
        held = made.with_(gpu_budget=everything, ram_budget=0)
        with self._opened(held, Budget()) as decoder:
            decoder.read([*PLAIN])
            took = []
            for _ in range(PACED):
                begun = time.perf_counter()
                decoder.read([5])
                took.append(time.perf_counter() - begun)
                self._say(self.progress)
        pace = self._pace = 1 / median(took[1:])
        if self.state.plan is made:              # nobody has changed the settings meanwhile
            self.state.update(resident=pace)
            made = self.state.plan
        else:
            made = made.with_(resident=pace)
        self.set_trait("planned", made)
        return made

    def _run(self, made: Plan, key: dict) -> None:
        made = self._paced(made)
        file = read_gguf(made.spec.path)
        words = words_of(file) if file.metadata.get("tokenizer.ggml.tokens") else None
        prompt = words(self.prompt)["input_ids"] if words else [*PLAIN]
        with self._opened(made) as decoder:
            most = min(self.tokens, decoder.context - len(prompt))
            if most < 2:
                raise LabError(f"the prompt is {len(prompt)} tokens and the context {decoder.context}: give a longer context")
            deviated = ""
            if made.mode == "fast":
                self._say("Measuring by how much logits deviate in fast mode.")
                deviated = str(decoder.deviation(prompt[:COMPARED]))
            self._say(f"Reading the prompt, {len(prompt)} tokens.")
            token = int(decoder.read(prompt).argmax())
            self.trace.clear()                   # what is shown and added up is the writing
            found, spent, last = [token], 0.0, time.perf_counter()
            for _ in range(most):
                begun = time.perf_counter()
                token = int(decoder.read([token]).argmax())
                spent += time.perf_counter() - begun
                found.append(token)
                if time.perf_counter() - last > PAUSE or len(found) <= 2:
                    last = time.perf_counter()
                    self._show(words, found, spent)
                if self._stopping.is_set():
                    raise Stopped
            self._show(words, found, spent)
            tried = replace(_tried(made, key, len(found) - 1, spent, self.trace), deviated=deviated)
            self.set_trait("tries", (*self.tries, tried))

    def _show(self, words, found: list[int], spent: float) -> None:
        self._say(f"{len(found) - 1} tokens, {(len(found) - 1) / spent:.3g} tokens/s so far.")
        self._set(found=[*found], text=words.decode(found) if words else "", rate=(len(found) - 1) / spent)

    def _race(self, made: Plan) -> None:
        took: dict[int, list[tuple[float, float]]] = {slots: [] for slots in SLOTS if slots <= made.arrangement.slots}
        for turn in range(ROUNDS):
            for slots in took if turn % 2 == 0 else [*took][::-1]:
                self._say(f"{slots} slot{'s' * (slots > 1)}, round {turn + 1} of {ROUNDS}.")
                with self._opened(replace_slots(made, slots)) as decoder:
                    decoder.read([*PLAIN])
                    for _ in range(EACH):
                        begun = time.perf_counter()
                        decoder.read([5])
                        end = time.perf_counter()
                        took[slots].append((end - begun, self.trace.busy("wait", begun, end)))
                        self._say(self.progress)
                self.set_trait("ahead", tuple(Ahead(slots, median(s for s, _ in each), median(w for _, w in each))
                                              for slots, each in took.items() if each))


def _roomy(made: Plan) -> Plan:
    """With as many slots as are compared, and have room. Raises LabError where there is none to read ahead into."""
    for slots in SLOTS[:0:-1]:
        try:
            return made.with_(slots=slots)
        except LabError:
            continue
    raise LabError("the device has no room for a second slot: give it a larger budget")


def replace_slots(made: Plan, slots: int) -> Plan:
    """The same layers in the same places with other slots, at most as many."""
    turns = sum(1 for tier in made.arrangement.tiers if tier != "device")
    return replace(made, arrangement=replace(made.arrangement, slots=min(slots, turns)))


def _tried(made: Plan, key: dict, tokens: int, spent: float, trace: Trace) -> Try:
    total = trace.totals()
    found = made.predict()
    way, share = found.binds
    slowed = trace.busy("compute") / tokens * made.resident if made.resident else None
    return Try(placed(made), made.site.device, found.decode, tokens / spent, tokens, min(trace.busy("wait") / spent, 1.0),
               total["read"].bytes / tokens if "read" in total else 0.0, slowed, f"{way} {share:.0%}", key)


def placed(made: Plan) -> str:
    """A placement in a few words: `"12 stay, 9 RAM, 10 SSD, 2 slots, 80.00 MiB"`."""
    a = made.arrangement
    parts = [f"{a.on('device')} stay", *(f"{a.on(tier)} {tier.upper()}" for tier in ("ram", "ssd") if a.on(tier))]
    if made.streamed:
        parts.append(f"{a.slots} slot{'s' * (a.slots > 1)}")
    if made.mode == "fast":
        parts.append("fast mode")
    return f"{', '.join(parts)}, {format_bytes(made.site.device, 1)}"


def told(one: Try) -> str:
    """What came of a try."""
    said = (f"{number(one.measured)} tokens/s measured over {one.tokens} tokens; {rate(one.predicted)} predicted: "
            f"{one.verdict}, {one.off:+.0%} from the middle.")
    if one.read:
        said += f" A token read {format_bytes(one.read)} from the drive and waited for {one.waited:.0%} of its time: measured."
    if one.deviated:
        said += f" In {one.deviated}."
    if one.slowed and abs(one.slowed - 1) > CLOSE:
        said += (f" Computing alone took {one.slowed:.2f} times what it had taken just before: this computer does other work "
                 "too, and no prediction can know that.")
    return said
