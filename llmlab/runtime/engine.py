"""The engine: many texts at once by one decoder, each step all of those that run together, on a thread of its own.

Whoever asks talks to that thread through a queue, and hears from it through a job's. What the scheduler knows changes in that
thread alone; others look at it while it is held still.
"""

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import NamedTuple

import torch

from ..errors import LabError
from ..units import format_bytes, parse_bytes
from . import batching
from .batching import Batcher
from .blocks import Blocks, Usage
from .decoder import Decoder
from .generating import check_tokenizer, end_tokens, out_of_memory, usable_context
from .jobs import Answer, Event, Job
from .matrices import Matrices
from .paged import PagedCache, Part, block_bytes
from .sampling import Chooser, Logprobs, Options, Stops, Words, choose_each, logprobs
from .scheduling import Piece, Scheduler, Sequence, Step

SIZE = 16              # tokens of a block
_HISTORY = 10_000       # steps that are remembered
_END = ("end", None)


class Record(NamedTuple):
    """One step, measured. at: when it began, seconds since the engine was made. seconds: it took, `computing` of them the
    model. rows: tokens read; padded: rows computed for nothing beside them; logits: texts whose next token was wanted; cells:
    of the cache, looked at by each part together. running, waiting: texts after it; used, cached, free: blocks after it;
    wasted: cells of used blocks that hold nothing then."""

    at: float
    seconds: float
    computing: float
    rows: int
    padded: int
    logits: int
    cells: int
    running: int
    waiting: int
    used: int
    cached: int
    free: int
    wasted: int


class Seen(NamedTuple):
    """A text at one moment. job: whose; number: by which `owners` calls it; state: "waiting" (one that was preempted too),
    "reading" its text, or "writing"; prompt, new: its tokens; cells: of them in the cache, `reused` of the prompt's were there
    before; preempted: how often; blocks: those it holds, in the order of its tokens."""

    job: Job
    number: int
    state: str
    prompt: int
    new: int
    cells: int
    reused: int
    preempted: int
    blocks: tuple[int, ...]


class View(NamedTuple):
    """An engine at one moment, `at` seconds after it was made. texts: those that run, then those that wait; owners: as
    `Engine.owners` has them; usage: of the blocks, exact."""

    at: float
    texts: tuple[Seen, ...]
    owners: tuple[int, ...]
    usage: Usage


@dataclass
class Counters:
    """What an engine has done since it was made. requests: asked for; ended: of them, and those of these that failed. read:
    tokens of prompts, those read anew after a preemption among them; made: new tokens; reused: tokens that were in the cache
    already. rows: computed, and padded ones beside them. seconds: of all steps; computing: of them the model's."""

    requests: int = 0
    ended: int = 0
    failed: int = 0
    read: int = 0
    made: int = 0
    reused: int = 0
    steps: int = 0
    rows: int = 0
    padded: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    computing: float = 0.0


@dataclass(eq=False)
class _Text:
    """What the engine's thread knows of a job."""

    job: Job
    sequence: Sequence
    options: Options
    chooser: Chooser
    logprobs: int | None
    asked: float = field(default_factory=time.perf_counter)
    others: "list[_Text]" = field(default_factory=list)     # those that fork off once the prompt is read
    new: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    told: list[Logprobs] = field(default_factory=list)
    first: float | None = None
    words: Words | None = None
    stops: Stops | None = None

    @property
    def prompt(self) -> list[int]:
        return self.sequence.prompt

    def say(self, token: int | None, text: str, found: Logprobs | None = None) -> None:
        self.pieces.append(text)
        self.job.say(Event(token, text, found))

    def answer(self, ended: str) -> Answer:
        """The whole of it, what was held back told first."""
        if self.words is not None and not self.stops.found:
            text = self.stops.pass_on(self.words.rest())
            ended = "stop string" if self.stops.found else ended
            if text := text + self.stops.rest():
                self.say(None, text)
        sequence = self.sequence
        return Answer("".join(self.pieces), tuple(self.new), ended, len(self.prompt), min(sequence.reused, len(self.prompt)),
                      self.first, time.perf_counter() - self.asked, sequence.preempted, self.chooser.seed,
                      None if self.logprobs is None else tuple(self.told))


class Engine:
    """Answers many requests at once from one decoder's weights, with a cache of `memory` for all of their keys and values.

    words: the tokenizer. kv: the cache's type, or a pair for keys and values. sequences: texts that run at once, rows: tokens
    read in a step, at most. share: texts that begin alike share what was read; answers: and what was written, so that a chat
    goes on from there. An answer is computed token by token and a prompt together, which differs in the last bits (some 1e-6
    in a logit): without `answers` a text's numbers do not depend on what was asked before, to the bit. policy: "paged", or to
    compare with "static" (padded batches of whole contexts) and "alone". context: most tokens of a text (None: what the decoder
    and the memory allow). compile: whether texts look at the cache, and a few rows are multiplied, by compiled code (None:
    where the decoder is compiled); the first time it takes a minute or more, and `progress` is told.

    It ends with `close`, when nobody has it any more, and at the interpreter's end. Raises LabError where the memory
    does not suffice, saying the least that does.
    """

    def __init__(self, decoder: Decoder, words, *, memory: str | int = "256 MiB", kv: str | tuple[str, str] = "f32",
                 sequences: int = 64, rows: int = 256, share: bool = True, policy: str = "paged", context: int | None = None,
                 compile: bool | None = None, progress: Callable[[str], None] | None = None, answers: bool = True):
        check_tokenizer(words)
        self.decoder, self.words = decoder, words
        longest = batching.longest(decoder)
        self.context = min(usable_context(context, decoder.context) or longest, longest)
        shapes, given = decoder.weights.shapes, parse_bytes(memory)
        each = block_bytes(shapes, SIZE, kv)
        if given < 2 * each:
            raise LabError(f"memory is {format_bytes(given)}, and a block of {SIZE} tokens takes {format_bytes(each)}; give "
                           f"{2 * each:,} bytes at least")
        self.blocks = Blocks(given // each, SIZE, share)
        self._scheduler = Scheduler(self.blocks, rows, sequences, policy, self.context, answers=answers)
        self.longest = self._scheduler.longest      # tokens of one text, its answer among them
        self.answers = answers
        compile = (decoder.compiled is not None or decoder.fused) if compile is None else compile
        sinks = any("sinks" in layer for layer in decoder.weights.each())
        self.cache = PagedCache(shapes, self.blocks.count, SIZE, kv, decoder.cache_device, compile, sinks, progress)
        self.batcher = Batcher(decoder, self.cache, Matrices(decoder, None, self.cache.bytes, compile, progress))
        self._ends, self._named = end_tokens(decoder, words), words.get_added_vocab()
        self.history: deque[Record] = deque(maxlen=_HISTORY)
        self._counters, self._began = Counters(), time.perf_counter()
        self._texts: dict[Sequence, _Text] = {}
        self._jobs: dict[Job, _Text] = {}       # those among them that wait for another to read their prompt, too
        self._lock = threading.Lock()       # held while the scheduler changes, and by those who look at it meanwhile
        self._asked, self._closed = 0, False
        self._orders: SimpleQueue = SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(weakref.ref(self), self._orders), name="llmlab engine",
                                        daemon=True)
        weakref.finalize(self, self._orders.put, _END).atexit = False
        _ENGINES.add(self)
        self._thread.start()

    @property
    def why(self) -> str:
        """What was chosen, in a line."""
        usage = f"{self.blocks.count:,} blocks of {self.blocks.size} tokens in {format_bytes(self.cache.bytes)}"
        return f"{usage}; {self.cache.why}; {self.batcher.why}"

    # ---- asking -------------------------------------------------------------------------------------------------

    def submit(self, tokens: list[int], options: Options | None = None, *, chooser: Chooser | None = None,
               logprobs: int | None = None) -> Job:
        """Ask for what follows `tokens`. chooser: chooses instead of the options' own. logprobs: how many of the likeliest
        each event tells with the chosen one's (None: nothing). Raises LabError for a prompt that is empty or too long."""
        return self._ask(tokens, options, [chooser], logprobs)[0]

    def submit_several(self, tokens: list[int], count: int, options: Options | None = None, *,
                       choosers: Many[Chooser] | None = None, logprobs: int | None = None) -> list[Job]:
        """The same prompt, read once, for `count` answers that go on from it, each with a seed of its own: the first with that
        of the options, the next with the next. choosers: one for each answer, instead of those. Raises LabError."""
        options = options or Options()
        if count < 1 or choosers is not None and len(choosers) != count:
            given = "" if choosers is None else f" by {len(choosers)} choosers"
            raise LabError(f"{count} answers{given}; ask for 1 at least, with a chooser for each or none")
        if choosers is None:
            choosers = Chooser(options).several(count)
        return self._ask(tokens, options, choosers, logprobs)

    def _ask(self, tokens, options, choosers, logprobs) -> list[Job]:
        options = options or Options()
        self.check(tokens, options)
        texts = []
        for chooser in choosers:
            room = self.longest - len(tokens)
            sequence = Sequence(list(tokens), min(options.max_tokens or room, room))
            texts.append(_Text(Job(self._cancel), sequence, options, chooser or Chooser(options), logprobs))
        first, *first.others = texts
        with self._lock:
            self._asked += len(texts)
        self._order("begin", first)
        return [text.job for text in texts]

    def check(self, tokens: list[int], options: Options) -> None:
        """Raises LabError where so many tokens can never be read here, or the options ask for what is not done here."""
        if self._closed:
            raise _closed()
        if not tokens:
            raise LabError("there is nothing to read; give a text or messages that are not empty")
        if options.shift is not None:
            raise LabError("going on past the context (shift) is for one text at a time, llmlab.decoder; leave shift out")
        if len(tokens) >= self.longest:
            what = "context" if self.longest == self.context else "cache"
            raise LabError(f"the prompt is {len(tokens):,} tokens, and the {what} holds {self.longest:,} of a prompt and its "
                           f"answer; shorten it, or give the engine a larger {'context' if what == 'context' else 'memory'}")
        if not all(isinstance(one, int) and 0 <= one < self.batcher.matrices.vocabulary for one in tokens):
            raise LabError(f"tokens are whole numbers from 0 to {self.batcher.matrices.vocabulary - 1:,}; another model's "
                           "tokenizer may have made these")

    def _order(self, *order) -> None:
        self._orders.put(order)
        if self._closed:        # the thread may have looked for orders for the last time
            self._refuse()

    def _cancel(self, job: Job) -> None:
        self._order("cancel", job)

    # ---- looking ------------------------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """What was done so far."""
        with self._lock:
            going = [text.sequence for text in self._texts.values()]
            return replace(self._counters, reused=self._counters.reused + sum(one.reused for one in going),
                           preemptions=self._counters.preemptions + sum(one.preempted for one in going))

    def usage(self) -> Usage:
        """How the cache's blocks are used now, exact."""
        with self._lock:
            return self.blocks.usage()

    def owners(self) -> list[int]:
        """Whose each block is: 0 nobody's, -1 kept because its beginning may come again, else the number of a text that runs
        (of several that share it the first)."""
        with self._lock:
            return self._scheduler.owners()

    def view(self) -> View:
        """What each text does and holds now, from whatever thread; what was asked for only just may still be missing."""
        with self._lock:
            scheduler = self._scheduler
            texts = [self._texts[one] for one in (*scheduler.running, *scheduler.waiting) if one in self._texts]
            return View(time.perf_counter() - self._began, tuple(_seen(text) for text in texts), tuple(scheduler.owners()),
                        self.blocks.usage())

    def idle(self) -> bool:
        """Whether nothing runs, waits, or was just asked for."""
        with self._lock:
            return self._asked == self._counters.ended or not self._thread.is_alive()

    # ---- ending -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End: what runs or waits is stopped after the step that is being computed. Twice is fine."""
        self._closed = True
        self._orders.put(_END)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    # ---- in the thread ------------------------------------------------------------------------------------------

    def _turn(self, order: tuple | None) -> bool:
        """Orders, then a step; whether there may be another."""
        try:
            with self._lock:
                while order is not None:
                    self._obey(*order)
                    order = None
                    with suppress(Empty):
                        order = self._orders.get_nowait()
                step = None if self._closed else self._scheduler.step()
            if step is not None:
                self._run(step)
            return step is not None
        except Exception as error:      # none that a step may have: whatever it is, nobody waits for ever
            self._fail(list(self._texts.values()), error)
            return True

    def _obey(self, what: str, of: "_Text | Job | None") -> None:
        if what == "begin":
            self._begin(of)
        elif what == "cancel" and (text := self._jobs.get(of)) is not None:
            self._drop(text)
            self._finish(text, text.answer("stopped"))

    def _begin(self, text: _Text) -> None:
        group = [text, *text.others]
        self._counters.requests += len(group)
        try:
            self._scheduler.add(text.sequence)
        except LabError as error:
            for one in group:
                self._finish(one, error)
            return
        self._texts[text.sequence] = text
        self._jobs |= {one.job: one for one in group}

    def _drop(self, text: _Text) -> None:
        """A text comes no further. Of several of a prompt that is still being read the next one takes the first one's place."""
        del self._jobs[text.job]
        if self._texts.get(text.sequence) is not text:
            next(first for first in self._texts.values() if text in first.others).others.remove(text)
        elif text.others:
            other, *rest = text.others
            # Exchanged: what was reused and preempted is counted once, of the one that goes on.
            other.sequence, text.sequence, other.others = text.sequence, other.sequence, rest
            self._texts[other.sequence] = other
        else:
            del self._texts[text.sequence]
            self._scheduler.cancel(text.sequence)

    def _finish(self, text: _Text, outcome: Answer | Exception) -> None:
        counters = self._counters
        counters.ended += 1
        counters.failed += isinstance(outcome, Exception)
        counters.reused += text.sequence.reused
        counters.preemptions += text.sequence.preempted
        text.job.end(outcome)

    def _fail(self, texts: list[_Text], error: Exception) -> None:
        """What went wrong ends these, and none else."""
        error = _failure(error)
        for text in [one for first in texts for one in (first, *first.others)]:
            if text.job in self._jobs:
                with self._lock:
                    self._drop(text)
                    self._finish(text, error)

    def _run(self, step: Step) -> None:
        start, texts = time.perf_counter(), [self._texts[piece.sequence] for piece in step.pieces]
        forks: list[_Text] = []
        try:
            logits = self._compute(step)
            computing = time.perf_counter() - start
            asked = [text for text, piece in zip(texts, step.pieces, strict=True) if piece.last]
            asked, logits = self._forked(asked, logits, forks)
            found = choose_each([text.chooser for text in asked], logits, [text.prompt for text in asked],
                                [text.new for text in asked])
            ended = {}
            for text, token, scores in zip(asked, found, logits, strict=True):
                if how := token if isinstance(token, LabError) else self._told(text, token, scores):
                    ended[text] = how
        except Exception as error:      # memory that does not suffice, a file that changed: the next step may go well
            with self._lock:
                self._scheduler.failed(step)
            self._fail(texts + forks, error)
            return
        with self._lock:
            self._scheduler.done(step, {text.sequence: token for text, token in zip(asked, found, strict=True)
                                        if not isinstance(token, LabError)}, {text.sequence for text in ended})
            for text in ended:
                del self._texts[text.sequence], self._jobs[text.job]
            self._record(step, start, computing, len(asked))
        for text, how in ended.items():
            try:
                outcome = how if isinstance(how, LabError) else text.answer(how)
            except Exception as error:      # the last of its text is no text
                outcome = _failure(error)
            with self._lock:
                self._finish(text, outcome)

    def _compute(self, step: Step) -> torch.Tensor:
        """The logits after each piece that is the last of its text."""
        self.cache.copy(step.copies)
        tokens, parts, wanted = [], [], []
        for piece in step.pieces:
            cut = _parts(piece)
            parts += cut
            tokens += [piece.sequence.tokens[part.first:part.first + part.count] for part in cut]
            wanted += [False] * (len(cut) - 1) + [piece.last]
        return self.batcher.read(tokens, parts, wanted, step.padded)

    def _forked(self, asked: list[_Text], logits: torch.Tensor, forks: list[_Text]) -> tuple[list[_Text], torch.Tensor]:
        """Those whose next token is wanted, and the logits of each: where a prompt of several answers was read now, these, who
        are told to `forks`."""
        if not any(text.others for text in asked):
            return asked, logits
        found, rows = [], []
        with self._lock:
            for row, text in enumerate(asked):
                others, text.others = text.others, []
                for other, sequence in zip(others, self._scheduler.fork(text.sequence, 1 + len(others)), strict=True):
                    other.sequence = sequence
                    self._texts[sequence] = other
                forks += others
                found += [text, *others]
                rows += [row] * (1 + len(others))
        return found, logits[torch.tensor(rows, device=logits.device)]

    def _told(self, text: _Text, token: int, scores: torch.Tensor) -> str | None:
        """A token came: say so. How the text ended with it, None where it goes on."""
        if text.first is None:
            text.first = time.perf_counter() - text.asked
            text.words, text.stops = Words(self.words, text.prompt), Stops(text.options.stop)
        if token in self._ends:
            return "end of turn"
        if any(self._named.get(stop) == token for stop in text.options.stop):
            return "stop string"
        found = None if text.logprobs is None else logprobs(scores, token, text.logprobs)
        if found is not None:
            text.told.append(found)
        text.new.append(token)
        text.say(token, text.stops.pass_on(text.words.add(token)), found)
        if text.stops.found:
            return "stop string"
        if text.chooser.ended:
            return "end of turn"
        if len(text.new) < text.sequence.most:
            return None
        return "limit" if len(text.new) == text.options.max_tokens else "context full"

    def _record(self, step: Step, start: float, computing: float, logits: int) -> None:
        counters, pieces, usage, now = self._counters, step.pieces, self.blocks.usage(), time.perf_counter()
        rows = step.rows
        counters.steps += 1
        counters.rows += rows
        counters.padded += step.padded
        counters.made += logits
        counters.read += rows - sum(_writes(piece) for piece in pieces)
        counters.seconds += now - start
        counters.computing += computing
        self.history.append(Record(start - self._began, now - start, computing, rows, step.padded, logits,
                                   sum(piece.first + piece.count for piece in pieces), len(self._scheduler.running),
                                   len(self._scheduler.waiting), usage.used, usage.cached, usage.free,
                                   usage.wasted))

    def _stop(self) -> None:
        """All that runs or waits ends where it is."""
        for text in list(self._jobs.values()):
            with self._lock:
                self._drop(text)
                self._finish(text, text.answer("stopped"))
        self._refuse()

    def _refuse(self) -> None:
        with suppress(Empty):
            while True:
                what, of = self._orders.get_nowait()
                for text in (of, *of.others) if what == "begin" else ():
                    text.job.end(_closed())
        self._orders.put(_END)      # the thread may still wait for the one that was taken here


def _seen(text: _Text) -> Seen:
    sequence = text.sequence
    new = len(sequence.tokens) - len(sequence.prompt)
    runs = "writing" if new and sequence.left < 2 else "reading"
    return Seen(text.job, sequence.id, runs if sequence.state == "running" else "waiting", len(sequence.prompt), new,
                sequence.computed, sequence.reused, sequence.preempted, tuple(sequence.table.blocks) if sequence.table else ())


def _writes(piece: Piece) -> bool:
    """Whether its row is that of a token which was just made."""
    return piece.count == 1 and piece.first >= len(piece.sequence.prompt)


def _parts(piece: Piece) -> list[Part]:
    """A prompt's tokens together, and those that were made one by one, as they were when they came: what is read anew after a
    preemption is then the same to the bit."""
    stop = piece.first + piece.count
    cut = min(max(piece.first, len(piece.sequence.prompt)), stop)
    together = [Part(piece.blocks, piece.first, cut - piece.first, True)] if cut > piece.first else []
    return together + [Part(piece.blocks, at, 1) for at in range(cut, stop)]


def _failure(error: Exception) -> LabError:
    """What those are told who waited for what failed."""
    if isinstance(error, LabError):
        return error
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    found = LabError("memory does not suffice for this step; ask for less at once, or give the cache less" if
                     out_of_memory(error) else f"a step of the engine failed ({said}); ask again")
    found.__cause__ = error
    return found


def _closed() -> LabError:
    return LabError("this engine is closed; make another")


# ---- the thread -------------------------------------------------------------------------------------------------

def _serve(engine: weakref.ref, orders: SimpleQueue) -> None:
    """Orders and steps, for as long as somebody has the engine and has not closed it. While there is nothing to do nobody here
    has it."""
    busy = False
    while True:
        order = None
        with suppress(Empty):
            order = orders.get(block=not busy)
        found = engine()
        if found is None:
            return
        try:
            busy = found._turn(order)
        except BaseException:       # such as a panic of a library written in Rust: nobody is to wait for a thread that is gone
            found._closed = True
            found._stop()
            raise
        if found._closed:
            found._stop()
            return
        del found


_ENGINES: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that is in the middle of torch when the interpreter ends takes the process down with it."""
    for engine in list(_ENGINES):
        engine.close()
