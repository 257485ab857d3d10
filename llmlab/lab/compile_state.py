"""CompileState: three ways to run one model, their tokens taken apart, and the race against other engines, in a thread."""

from pathlib import Path

import torch
import traitlets as t

from ..benching import Bench, bench
from ..catalog import Table
from ..errors import LabError
from ..gguf import GGUFFile, read_gguf
from ..hardware import ram_available
from ..kernels.packing import STRATEGIES
from ..loading import load
from ..roofline import Ceilings, Op, Profile, ceilings, profiles
from ..runtime.compiling import NotPackaged
from ..runtime.decoder import Decoder
from ..runtime.generating import Memory
from ..units import format_bytes, format_rate
from .background import Background, Stopped
from .quantization_state import path_of
from .settable import settable

EAGER, LEAN, COMPILED = WAYS = ("eager", "lean", "compiled")
ABOUT = {EAGER: "the modules of transformers, as llmlab.load makes them", LEAN: "llmlab's own decoder, in plain torch",
         COMPILED: "the lean decoder's layers, compiled for this processor"}
CONTEXTS = (16, 64, 256, 1024)
CLAIM = 1.3              # "up to 30 % faster": MLC, of compiling for the specific hardware
SETTINGS = {"file": None, "strategy": "auto", "context": 64, "way": LEAN}


class CompileState(settable(SETTINGS), Background):
    """Where the time of a token goes, by each of three ways to run a model.

    file: a GGUF's path, a model of `llmlab.local_models()`, None for the small model llmlab uses everywhere. strategy: of the
    weights, as in `llmlab.load`; the compiled way lays them out in its own. context: tokens that were read before. way: whose
    operations are shown. Measured: `profiles` {way: Profile} and `ceilings`; `race` beside other engines. `notes` say why a
    way was not measured, `progress` what is being done.

    `start()` returns at once, `run()` waits and returns the answer; compiled code that is not on disk is made only where
    `compile=True` asks for it, once for a processor, in a minute or so. `start_race()`, `run_race()` are the same of the race.
    `end()` ends what is under way. Raises LabError for settings that cannot be used.
    """

    profiles = t.Dict(read_only=True)
    ceilings = t.Instance(Ceilings, allow_none=True, read_only=True)
    notes = t.Dict(read_only=True)
    race = t.Instance(Bench, allow_none=True, read_only=True)
    problem = t.Unicode(read_only=True)      # what is wrong with the settings

    def __init__(self, **settings):
        """Raises LabError for settings that cannot be used."""
        self._good, self._file, self._readers, self._held = dict(SETTINGS), None, {}, None
        super().__init__()
        self.update(**settings)
        if self.problem:
            raise LabError(self.problem)
        if self._file is None:
            self._follow()

    @t.observe(*SETTINGS)
    def _follow(self, _=None) -> None:
        """Take over what can be used; what was measured of something else is no longer shown."""
        asked = {name: getattr(self, name) for name in SETTINGS}
        try:
            file = self._checked(**asked)
        except LabError as error:
            self.set_trait("problem", str(error))
            return
        old = self._file is None or [*file.paths] != [*self._file.paths]
        if old or any(asked[name] != self._good[name] for name in ("strategy", "context")):
            if self.running:
                self.end()
            self._set(profiles={}, notes={}, error="", progress="", **{"race": None} if old else {})
        self._good, self._file = asked, file
        self.set_trait("problem", "")

    def _checked(self, file, strategy, context, way) -> GGUFFile:
        for name, value, known in (("strategy", strategy, STRATEGIES), ("way", way, WAYS)):
            if value not in known:
                raise LabError(f"{name} is {value!r:.40}; give one of {', '.join(known)}")
        if isinstance(context, bool) or not isinstance(context, int) or not 2 <= context <= 2**20:
            raise LabError(f"context is {context!r:.40}; give how many tokens were read before, 2 at least")
        if self._file is not None and file == self._good["file"]:
            return self._file
        found = read_gguf(path_of(file))
        if found.is_projector:
            raise LabError(f"{Path(found.paths[0]).name} is the projector of a model, not a model; give the model's own file")
        return found

    # ---- in words ---------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The file's name."""
        return Path(self._file.paths[0]).name

    @property
    def readers(self) -> dict[str, Decoder | Memory]:
        """{way: what was measured, and can be read with}. Raises LabError before that."""
        if not self.profiles:
            raise LabError("nothing was opened yet; run() opens the ways and measures them")
        return {way: self._readers[way] for way in self.profiles}

    @property
    def shown(self) -> Profile | None:
        """Of the way that is looked at."""
        return self.profiles.get(self._good["way"])

    @property
    def answer(self) -> str:
        """What came of it in words, or what is wrong."""
        if self.problem or self.error or not self.profiles:
            return self.problem or self.error or "Nothing was measured yet."
        ways = [way for way in WAYS if way in self.profiles]
        rates = _and([f"{self.profiles[way].rate:.3g} tokens/s {way} ({self.fraction(way):.0%} of the roofline)"
                      for way in ways])
        said = f"After {self._good['context']:,} tokens {self.name} writes {rates}. {self.verdict}"
        return f"{said} All measured, in the same minute."

    @property
    def verdict(self) -> str:
        """Whether compiling brings the 30 %."""
        if COMPILED not in self.profiles:
            return f"The compiled way was not measured: {self.notes.get(COMPILED, 'it was stopped')}."
        times = {way: self.times(COMPILED, way) for way in (LEAN, EAGER) if way in self.profiles}
        said = " and ".join(f"{value:.2f} times as fast as {way}" for way, value in times.items())
        gain = times.get(LEAN, times.get(EAGER, 1.0)) - 1
        there = ("the 30 % are there, and more" if gain > CLAIM - 1 else f"{gain:+.0%}, less than 30" if gain >= 0 else
                 "compiling does not help here")
        return f"Compiled is {said}: {there}."

    def times(self, one: str, other: str) -> float:
        """How many times as fast one way is as another. Raises LabError where either was not measured."""
        for way in (one, other):
            if way not in self.profiles:
                raise LabError(f"{way} was not measured; {self.notes.get(way, 'run() measures it')}")
        return self.profiles[other].seconds / self.profiles[one].seconds

    def fraction(self, way: str) -> float:
        """Of the roofline: the least time a token's bytes and operations take here, over the time it took."""
        return self.profiles[way].fraction(self.ceilings)

    @property
    def allowed(self) -> str:
        """What the machine allows, in words."""
        found = self.ceilings
        return (f"This machine allows {format_rate(found.bandwidth)} from memory and {found.flops / 1e9:,.0f} GFLOP/s "
                f"[measured: {found.how}].") if found else "Nothing was measured yet."

    @property
    def table(self) -> Table:
        """The operations of the way that is looked at, the longest first."""
        ops = sorted(self.shown.ops if self.shown else (), key=lambda op: -op.seconds)
        whole = sum(op.seconds for op in ops)
        return Table([op_row(op, whole, self.ceilings) for op in ops])

    # ---- running ----------------------------------------------------------------------------------------

    def start(self, compile: bool = False) -> None:
        """Begin to measure, and return at once. Raises LabError while something runs, and for settings that cannot be used."""
        self._ready()
        self._set(error="", progress="", running=True)
        self._begin("compile", self._through, "measuring", self._measure, dict(self._good), self._file, compile)

    def run(self, compile: bool = False) -> str:
        """Start, wait, and return the answer. Raises LabError where something went wrong."""
        self.start(compile)
        self._finish()
        return self.answer

    def start_race(self) -> None:
        """Begin `llmlab bench --quick`, and return at once. Raises LabError while something runs."""
        self._ready()
        self._set(error="", progress="", running=True)
        self._begin("race", self._through, "measuring", self._race, self._file)

    def run_race(self) -> Bench:
        """Start the race, wait, and return what came of it. Raises LabError where something went wrong."""
        before = self.race
        self.start_race()
        self._finish()
        if self.race is before:
            raise LabError("the race was stopped")
        return self.race

    def _ready(self) -> None:
        if self.running:
            raise LabError("something is being measured; end that or wait for it first")
        if self.problem:
            raise LabError(self.problem)

    def _measure(self, asked: dict, file: GGUFFile, compile: bool) -> None:
        if self._held != (held := (file.paths, asked["strategy"])):
            self._readers, self._held = {}, held
        notes = {}
        for way in WAYS:
            self._say(f"Opening the {way} way.")
            if way not in self._readers:
                try:
                    self._readers[way] = self._open(way, file, asked["strategy"], compile)
                except LabError as why:
                    notes[way] = str(why)
        if not self._readers:
            raise LabError(next(iter(notes.values())))
        self._say("Measuring what this machine allows.")
        before = ceilings()
        self._say(f"Reading {asked['context']:,} tokens, then measuring some more.")
        found = profiles(self._readers, asked["context"], stopped=self._stopping.is_set)
        if found is None:
            raise Stopped
        after = ceilings()                   # of a machine that does other work as well, the better moment
        best = Ceilings(max(before.bandwidth, after.bandwidth), max(before.flops, after.flops), after.how)
        self._set(ceilings=best, notes=notes, profiles=found)

    def _open(self, way: str, file: GGUFFile, strategy: str, compile: bool) -> Decoder | Memory:
        if way == EAGER:
            return Memory(load(file.paths[0], device="cpu", strategy=strategy)[0])
        if way == LEAN:
            return Decoder.open(file, strategy=strategy)
        need, free = file.file_bytes * (8 if strategy == "fast" else 5) // 4, ram_available()
        if need > free:
            raise LabError(f"its weights as words take up to {format_bytes(need)}, and {format_bytes(free)} are free")

        def said(text: str) -> None:
            self._say(f"{text[:1].upper()}{text[1:]}: half a minute or more.")
            if not compile:
                raise NotPackaged("it must be compiled for this processor first, once, which takes a minute or two")

        found = Decoder.open(file, strategy=strategy, compile=True, progress=said)
        if found.compiled is None:
            raise LabError(found.why.split(";")[0].removeprefix("not compiled: "))
        return found

    def _race(self, file: GGUFFile) -> None:
        ways = ("fast", "compact", *(["compiled"] if COMPILED in self._readers else []), "modules")
        found = bench(file.paths[0], strategies=ways, threads=torch.get_num_threads(), quick=True,
                      progress=lambda text: self._say(f"{text[:1].upper()}{text[1:]}."))
        self.set_trait("race", found)


def op_row(op: Op, whole: float, limits: Ceilings) -> dict:
    """An operation as a row of texts."""
    floor = limits.floor(op)
    return {"operation": op.name, "calls": op.calls, "reads": format_bytes(op.bytes) if op.bytes else "",
            "operations": f"{op.flops / 1e6:,.1f} M" if op.flops else "",
            "per byte": f"{op.flops / op.bytes:.2f}" if op.bytes and op.flops else "", "ms": f"{op.seconds * 1e3:.2f}",
            "of the token": f"{op.seconds / whole:.0%}", "at least ms": f"{floor * 1e3:.2f}" if floor else "",
            "of the roofline": f"{floor / op.seconds:.0%}" if floor else ""}


def _and(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
