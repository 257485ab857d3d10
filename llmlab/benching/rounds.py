"""The race: everyone opened in a process of its own, then all take turns, several rounds; at the end, how exact each is."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from .. import hardware
from ..errors import LabError
from ..gguf import read_gguf
from ..gguf.words import show_path
from ..memory import cache_bytes, default_quant
from ..shapes import ModelSpec, model_spec
from ..speed import reading
from ..stores import place_of
from . import entries
from .children import Child, waiting
from .entries import Entry
from .result import DECODE, DEEP, PREFILL, Bench, Lane

ROUNDS, PROMPT, NEW, DEPTH = 5, 512, 64, 4096
AFTER = 8                # tokens of context before those that are written one at a time
ENOUGH = 30.0            # seconds of one kind of work after which one sits out its further rounds
LONG = 150.0             # seconds beyond which a long context is not read in
STEP = 10.0              # seconds that one round of writing may take; a slow one writes fewer tokens
SCORED, SINGLY = 128, 32     # tokens that are held against the reference; the last of them read one at a time


@dataclass(frozen=True)
class Settings:
    """What is run: `prompt` tokens read at once, `new` written one at a time, the same after `deep` tokens (0: not)."""

    threads: int
    rounds: int
    prompt: int
    new: int
    deep: int
    scored: int
    singly: int


@dataclass
class _Racer:
    """One that takes part, as the race goes on."""

    entry: Entry
    child: Child | None = None
    opened: dict = field(default_factory=dict)
    found: dict = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {PREFILL: [], DECODE: [], DEEP: []})
    new: int = 0
    failed: str | None = None
    notes: list[str] = field(default_factory=list)


def bench(path: str | os.PathLike, *, peers: str | tuple | None = None, strategies: str | tuple | None = None,
          threads: int | None = None, rounds: int | None = None, prompt: int | None = None, new: int | None = None,
          deep: int | None = None, quick: bool = False, progress: Callable[[str], None] | None = None) -> Bench:
    """How fast this computer runs a GGUF file, by llmlab's ways and by other engines, in the same minutes.

    Each is loaded in a process of its own and kept there; then all take turns, `rounds` times (5): a prompt of `prompt`
    tokens (512) is read, `new` tokens (64) are written one at a time, and as many after `deep` tokens (4096; 0: not). All get
    the same tokens and `threads` threads (as many as there are cores). Seconds are wall-clock, of the work alone. How far each
    one's logits lie from float32's is measured on some tokens of the text llmlab ships (random tokens for a file without a
    vocabulary). `peers` and `strategies` are names as in "llama.cpp,transformers" or "fast,compact@bfloat16", "none" for
    none; what is not installed or has no room is a line in the answer. `quick`: two short rounds beside llama.cpp alone.
    `progress(text)` is called with what is done next.

    Raises LabError (UnknownName, BadFile) for a file that is none or damaged, a name that is unknown, a number that cannot be.
    """
    place = _place(path)
    file = read_gguf(place)
    if file.is_projector:
        raise LabError(f"{show_path(str(place))} is the projector of a model, not a model; give the model's own file")
    spec = model_spec(str(place))
    ours = entries.ours(entries.split(strategies, entries.QUICK if quick else entries.USUAL, "--strategy"))
    others = entries.peers(entries.split(peers, ("llama.cpp",) if quick else tuple(entries.PEERS), "--peers"))
    if not ours + others:
        raise LabError("nobody takes part: name a strategy or a peer")
    settings = _settings(spec, threads, rounds, prompt, new, deep, quick)
    say = progress or (lambda text: None)
    racers = [_Racer(entry) for entry in others[:1] + ours + others[1:]]
    with _Race(Path(file.paths[0]), spec, file.file_bytes, settings, racers, say) as race:
        race.run()
        return race.result()


def _place(path: str | os.PathLike) -> Path:
    """The file that is meant, by its path or by a name that `llmlab.local_models()` lists. Raises LabError."""
    found = place_of(path)
    if found.is_dir():
        raise LabError(f"{show_path(str(found))} is a folder; bench takes a .gguf file, which every engine here can read")
    return found


def _settings(spec: ModelSpec, threads, rounds, prompt, new, deep, quick: bool) -> Settings:
    cpu = hardware.machine().cpu
    usual = max(1, min(cpu.cores or cpu.usable, cpu.usable))
    threads = _number("threads", usual if threads is None else threads, 1, 1024)
    rounds = _number("rounds", (2 if quick else ROUNDS) if rounds is None else rounds, 1, 1000)
    trained = spec.context_train or 2**31
    prompt = _number("prompt", min(128 if quick else PROMPT, trained) if prompt is None else prompt, 1, trained)
    new = _number("new", min(16 if quick else NEW, max(1, trained - AFTER)) if new is None else new, 1, trained - AFTER)
    asked = deep is not None
    deep = _number("deep", deep if asked else 0 if quick else DEPTH, 0, trained)
    if deep and deep + rounds * new > trained:
        if asked:
            raise LabError(f"deep={deep} and {rounds} rounds of {new} more tokens go beyond the {trained:,} that this model "
                           "was trained for; give less")
        deep = 0
    scored = min(SCORED // 2 if quick else SCORED, trained)
    return Settings(threads, rounds, prompt, new, deep, scored, min(SINGLY // 2 if quick else SINGLY, scored // 2))


def _number(name: str, value, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise LabError(f"{name} is {value!r:.40}; give a whole number from {low} to {high:,}")
    return value


def token_bytes(spec: ModelSpec, depth: int) -> float:
    """Bytes that one token at least has to read after `depth` others: every matrix once (of the experts those that are used)
    as it lies in the file, and a cache in float16. Exact."""
    read = reading(spec, default_quant(spec, None))
    cache = cache_bytes(spec, depth, "f16", engine="transformers") if depth else None
    return read.dense[0][-1] + read.experts[0][-1] + read.output.bytes + (cache.kv + cache.recurrent if cache else 0)


class _Race:
    """One run of `bench`: its children live as long as the `with` block."""

    def __init__(self, path: Path, spec: ModelSpec, file_bytes: int, settings: Settings, racers: list[_Racer], say):
        self.path, self.spec, self.file_bytes = path, spec, file_bytes
        self.settings, self.racers, self.say = settings, racers, say
        self.ruler: Child | None = None
        self.bandwidth: list[float] = []
        self.scored_on = ""
        self._numbers = _numbers(spec.vocab, max(settings.prompt, settings.deep, settings.scored) + settings.new)

    def __enter__(self) -> "_Race":
        self._began, self._load, self._others = datetime.now().astimezone(), _load(), _Others()
        return self

    def __exit__(self, *_) -> None:
        for child in (self.ruler, *(racer.child for racer in self.racers)):
            if child:
                child.close()

    # ---- the stages -----------------------------------------------------------------------------------------

    def run(self) -> None:
        self.ruler = Child("bandwidth", "ruler", self.settings.threads)
        self.ruler.ask("open", job=self._job(free=hardware.ram_available()))
        for racer in self.racers:
            self._open(racer)
        self._take_turns()
        for racer in self._running():
            with self._or_out(racer):
                racer.found |= racer.child.ask("memory")
        if self.settings.deep:
            self._take_turns_deep()
        self._busy = self._others.mean(self._children())
        self._score()

    def _open(self, racer: _Racer) -> None:
        entry = racer.entry
        self.say(f"opening {entry.name}")
        free = hardware.ram_available()
        racer.failed = entries.missing(entry) or entries.room(entry, self.file_bytes, self.spec.params, free)
        if racer.failed:
            return
        racer.child = Child(entry.name, entry.module, self.settings.threads)
        with self._or_out(racer):
            racer.opened = racer.child.ask("open", job=self._job(**entry.job()))
            racer.found["first_s"] = racer.opened["since_s"] + racer.child.ask("read", tokens=self._numbers[:AFTER])["seconds"]
            racer.child.ask("read", tokens=self._numbers[:min(64, self.settings.prompt)])       # kernels chosen, caches warm
            a_token = min(racer.child.ask("write", tokens=self._numbers[:2], after=self._numbers[:AFTER])["seconds"] / 2
                          for _ in range(2))
            racer.new = max(min(4, self.settings.new), min(self.settings.new, int(STEP / max(a_token, 1e-9))))

    def _take_turns(self) -> None:
        some = self._numbers
        for turn in range(self.settings.rounds):
            self.say(f"round {turn + 1} of {self.settings.rounds}")
            self.bandwidth.append(self.ruler.ask("bandwidth")["rate"])
            for racer in self._in_turn(turn, PREFILL):
                with self._or_out(racer):
                    took = racer.child.ask("read", tokens=some[:self.settings.prompt])["seconds"]
                    racer.seconds[PREFILL].append(took / self.settings.prompt)
            for racer in self._in_turn(turn, DECODE):
                with self._or_out(racer):
                    took = racer.child.ask("write", tokens=some[AFTER:AFTER + racer.new], after=some[:AFTER])["seconds"]
                    racer.seconds[DECODE].append(took / racer.new)

    def _take_turns_deep(self) -> None:
        s, some, deep = self.settings, self._numbers, []
        for racer in self._running():
            would = min(racer.seconds[PREFILL]) * s.deep
            if would > LONG:
                racer.notes.append(f"reading {s.deep:,} tokens would take it {would:.0f} s, so it was not asked for more there")
                continue
            self.say(f"{racer.entry.name} reads {s.deep:,} tokens")
            with self._or_out(racer):
                took = racer.child.ask("fill", tokens=some[:s.deep], room=max(s.deep + s.rounds * s.new, s.scored))["seconds"]
                racer.found["deep_prefill"] = took / s.deep
                deep.append(racer)
        for turn in range(s.rounds):
            self.say(f"round {turn + 1} of {s.rounds} after {s.deep:,} tokens")
            self.bandwidth.append(self.ruler.ask("bandwidth")["rate"])
            for racer in self._in_turn(turn, DEEP):
                if racer in deep:
                    with self._or_out(racer):
                        took = racer.child.ask("write", tokens=some[:racer.new], after=None)["seconds"]
                        racer.seconds[DEEP].append(took / racer.new)

    def _score(self) -> None:
        """Each one's logits beside those of the reference, which runs last, when nothing is timed any more."""
        s = self.settings
        if not self._running():
            return
        self.say("the float32 reference")
        child = Child("reference", "lean", s.threads)
        with tempfile.TemporaryDirectory() as folder:
            kept = str(Path(folder) / "logits.npy")
            try:
                child.ask("open", job=self._job(name="reference", way="modules", strategy=entries.REFERENCE, dtype="float32"))
                text = child.ask("text", count=s.scored)["tokens"]
                tokens = text or self._numbers[:s.scored]
                self.scored_on = f"{len(tokens)} tokens of the text llmlab ships" if text else f"{len(tokens)} random tokens"
                child.ask("keep", tokens=tokens, path=kept)
            except LabError as error:
                self.scored_on = f"nothing: the reference failed ({error})"
                return
            finally:
                child.close()
            for racer in self._running():
                self.say(f"how exact {racer.entry.name} is")
                with self._or_out(racer, "could not be held against the reference: "):
                    steps = max(1, min(s.singly, len(tokens) // 2, int(2 * STEP / max(min(racer.seconds[DECODE]), 1e-9))))
                    racer.found |= racer.child.ask("compare", tokens=tokens, steps=steps, path=kept)

    # ---- small things ---------------------------------------------------------------------------------------

    def _job(self, **more) -> dict:
        s = self.settings
        return {"path": str(self.path), "threads": s.threads, "born": time.time(),
                "context": max(s.prompt, AFTER + s.new, s.scored), **more}

    def _running(self) -> list[_Racer]:
        return [racer for racer in self.racers if racer.child and not racer.failed]

    def _in_turn(self, turn: int, work: str) -> list[_Racer]:
        """Who runs this round: each round begins with another one, and who has had enough sits out."""
        running = [racer for racer in self._running() if not (took := racer.seconds[work])
                   or sum(took) * (self.settings.prompt if work == PREFILL else racer.new) < ENOUGH]
        start = turn % len(running) if running else 0
        return running[start:] + running[:start]

    @contextlib.contextmanager
    def _or_out(self, racer: _Racer, what: str = "") -> Iterator[None]:
        """What one cannot do ends its part and nobody else's."""
        try:
            yield
        except LabError as error:
            if what and racer.child.alive:
                racer.notes.append(f"{what}{error}")
                return
            racer.failed = f"{what}{error}"
            racer.child.close()
            racer.child = None

    def _children(self) -> list[Child]:
        return [child for child in (self.ruler, *(racer.child for racer in self.racers)) if child]

    def result(self) -> Bench:
        s, here = self.settings, hardware.machine()
        calibrated = here.calibration and here.calibration.ram_read
        return Bench(
            path=str(self.path), model=self.spec.title, quant=default_quant(self.spec, None), file_bytes=self.file_bytes,
            token_bytes=token_bytes(self.spec, AFTER + s.new // 2),
            deep_bytes=token_bytes(self.spec, s.deep + s.rounds * s.new // 2) if s.deep else None,
            bandwidth=tuple(self.bandwidth), calibrated=calibrated and calibrated.best, threads=s.threads, rounds=s.rounds,
            prompt=s.prompt, new=s.new, deep=s.deep, scored_on=self.scored_on, date=self._began.isoformat(timespec="seconds"),
            processor=here.cpu.name, cores=here.cpu.cores, features=here.cpu.features,
            versions=here.versions,
            waiting=waiting(), load=(self._load, _load()), others=self._busy,
            lanes=tuple(map(_lane, self.racers)))


def _lane(racer: _Racer) -> Lane:
    about, found = racer.opened.get("about", {}), racer.found
    return Lane(
        name=racer.entry.name, ours=racer.entry.ours, dtype=about.get("dtype", ""), why=about.get("why", ""),
        seconds={work: tuple(took) for work, took in racer.seconds.items()}, new=racer.new,
        import_s=racer.opened.get("import_s"), load_s=racer.opened.get("load_s"), first_s=found.get("first_s"),
        resident=found.get("resident"), peak=found.get("peak"), held=about.get("held"), deep_prefill=found.get("deep_prefill"),
        kld_prefill=found.get("kld_prefill"), kld_decode=found.get("kld_decode"), top1=found.get("top1"),
        failed=racer.failed, notes=tuple(racer.notes))


def _numbers(vocabulary: int, count: int) -> list[int]:
    """Tokens that look like nothing: the same each time, most of the vocabulary among them, none of its first few."""
    first = min(8, vocabulary - 1)
    return [first + i * 7919 % (vocabulary - first) for i in range(count)]


def _load() -> float | None:
    """Processes that wanted to run, mean of the last minute; None on Windows, which keeps no such mean."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


class _Others:
    """How many cores other programs keep busy from now on: the processor time of all, less our own and our children's."""

    def __init__(self):
        self._began, self._start = time.perf_counter(), self._all() - self._mine([])

    @staticmethod
    def _all() -> float:
        import psutil
        times = psutil.cpu_times()
        return times.user + times.system + sum(getattr(times, name, 0.0) for name in ("nice", "irq", "softirq", "steal"))

    @staticmethod
    def _mine(children: list[Child]) -> float:
        own = os.times()
        return (own.user + own.system + own.children_user + own.children_system
                + sum(child.cpu_seconds() for child in children))

    def mean(self, children: list[Child]) -> float:
        busy = self._all() - self._mine(children) - self._start
        return round(max(0.0, busy / max(1e-3, time.perf_counter() - self._began)), 2)
