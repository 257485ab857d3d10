"""Which tokens of which sequences one pass over the model computes: continuous batching over a pool of blocks.

Every step asks anew (Orca's iteration-level scheduling; vLLM, arXiv 2309.06180): whoever writes an answer gets a row, what is
left of a budget of rows goes to prompts in the order they came, a long one in several chunks, and a sequence that ended leaves
at once. Admission is by free blocks. Where blocks run out the one that came last goes back to the queue with what it wrote, and
is read again later: the one that came first always gets on, so everyone does.

The order of calls, all from one thread (an engine hands cancels of other threads to its own): `step`, then whatever computes
it, then `done` (or `failed`), and again. `add`, `cancel` and `fork` may be called at any time, between `step` and `done` too:
no block is handed out but in `step`, so one that a cancel gives back is not written by another before that step has ended.
"""

from bisect import insort
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter
from typing import NamedTuple

from ..errors import LabError
from .blocks import Blocks, Copy, NoBlocks, Table

POLICIES = ("paged", "static", "alone")
_AHEAD = 2          # blocks for each text to grow into: see _due
_ids = count(1)
_order = attrgetter("order")


@dataclass(slots=True, eq=False)
class Sequence:
    """One text that is being written. prompt: token ids; most: new tokens at most; arrived: when, in the caller's seconds.

    tokens: prompt and new ones; they stay when the sequence is preempted. table: its blocks while it runs. state: "waiting"
    (preempted ones wait too), "running", "ended". reused: tokens that were in the cache when it was first read. preempted: how
    often it went back to the queue. order: who goes first, the lower.
    """

    prompt: list[int]
    most: int
    arrived: float = 0.0
    id: int = field(default_factory=lambda: next(_ids))
    tokens: list[int] = field(init=False)
    table: Table | None = field(default=None, init=False)
    state: str = field(default="waiting", init=False)
    reused: int = field(default=0, init=False)
    preempted: int = field(default=0, init=False)
    order: tuple[int, ...] = field(default=(), init=False)
    chain: list[bytes] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self):
        self.tokens = list(self.prompt)

    @property
    def new(self) -> list[int]:
        return self.tokens[len(self.prompt):]

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are in the cache, or will be when the present step ends."""
        return self.table.length if self.table is not None else 0

    @property
    def left(self) -> int:
        """Tokens to be computed before the next one is known: 1 while an answer is written."""
        return len(self.tokens) - self.computed


class Piece(NamedTuple):
    """Rows of one step: the sequence's tokens from number `first` on, `count` of them, which see themselves and all before.

    last: the next token is wanted, so logits of the last row. blocks: those of all first + count tokens, a list of its own.
    """

    sequence: Sequence
    first: int
    count: int
    last: bool
    blocks: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens[self.first:self.first + self.count]


@dataclass(frozen=True)
class Step:
    """What to compute next: copies of blocks first, then the rows of all pieces (a sequence has one at most), those of one row
    first. padded: rows that a padded batch computes for nothing; only "static" has any."""

    pieces: list[Piece]
    copies: list[Copy]
    padded: int = 0

    @property
    def rows(self) -> int:
        """Rows of the pieces, without padded ones."""
        return sum(piece.count for piece in self.pieces)


class _Plan:
    """A step while it is put together. left: rows of the budget; writing: the keys of blocks that prompts write in it."""

    def __init__(self, rows: int):
        self.left, self.pieces, self.copies, self.writing = rows, {}, {}, set()


class Scheduler:
    """Sequences over a pool of blocks. rows: most rows of a step; sequences: most that run at once; context: most tokens of one
    text (None: what the pool holds). ahead: blocks that admission leaves for each text to grow into: with fewer more run at
    once, with more fewer are preempted. answers: whether a text that begins with another's prompt and answer shares the answer
    too.

    policy: "paged" as this module says. "static", what came before, at the same memory: each sequence reserves `context`
    tokens, as many as fit start together, prompts padded on the left to the longest; one that ended keeps its blocks and its
    (padded) row until all have, then the next batch starts; nothing is shared. "alone": as "paged", one after another.
    preemptions: how many there were. Raises LabError for what cannot work.
    """

    def __init__(self, blocks: Blocks, rows: int = 256, sequences: int = 64, policy: str = "paged", context: int | None = None,
                 ahead: int = _AHEAD, answers: bool = True):
        if policy not in POLICIES:
            raise LabError(f"policy is {policy!r}; it is one of {', '.join(POLICIES)}")
        if sequences < 1 or rows < sequences:
            raise LabError(f"a step of {rows} rows for {sequences} sequences: each takes one, so give at least as many rows, "
                           "and both from 1 up")
        if context is not None and context < 2:
            raise LabError(f"a context of {context} tokens has no room for a prompt and an answer; give it from 2 up")
        self.blocks, self.rows, self.policy, self.ahead, self.answers = blocks, rows, policy, ahead, answers
        cells = blocks.count * blocks.size
        self.longest = min(cells, context or cells)         # tokens of one text
        self.sequences = 1 if policy == "alone" else sequences
        if policy == "static":
            if context is None:
                raise LabError('policy "static" reserves the whole context for each sequence; say how long it is (context=)')
            self.sequences = min(sequences, blocks.count // -(-context // blocks.size))
            if not self.sequences:
                raise LabError(f"a context of {context:,} tokens does not fit into {cells:,} cells; give the cache more memory "
                               "or take a shorter context")
        self._waiting: list[Sequence] = []      # both in order
        self._running: list[Sequence] = []
        self._batch: list[Sequence] = []        # of "static": those that ended, too
        self._orders = count()
        self._open: Step | None = None
        self.preemptions = 0

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        return tuple(self._running)

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def most(self, prompt: int) -> int:
        """New tokens that can follow a prompt of so many; 0 or less where it is too long itself."""
        return self.longest - prompt

    def add(self, sequence: Sequence) -> None:
        """The sequence waits for its turn. Raises LabError where it could never be served, however long it waited."""
        if sequence.order or sequence.state != "waiting":
            raise LabError(f"sequence {sequence.id} was added before; make a new one")
        if not sequence.prompt or sequence.most < 1:
            raise LabError(f"a prompt of {len(sequence.prompt)} tokens and {sequence.most} new ones; give at least 1 of each")
        most = self.most(len(sequence.prompt))
        if most < 1:
            raise LabError(f"the prompt has {len(sequence.prompt):,} tokens, and prompt and answer together have room for "
                           f"{self.longest:,}; shorten it, or give the cache more memory or context")
        if sequence.most > most:
            raise LabError(f"after a prompt of {len(sequence.prompt):,} tokens there is room for {most:,} new ones, and "
                           f"{sequence.most:,} are asked for; ask for fewer, or give the cache more memory or context")
        sequence.order = (next(self._orders),)
        insort(self._waiting, sequence, key=_order)

    def cancel(self, sequence: Sequence) -> None:
        """The sequence ends here, wherever it stands; its blocks are back at once ("static": when its batch has ended). A token
        that a running step computes for it is dropped. Nothing happens to one that has ended."""
        if sequence.state == "waiting" and sequence.order:
            self._waiting.remove(sequence)
        self._end(sequence)

    def fork(self, sequence: Sequence, n: int) -> list[Sequence]:
        """n answers instead of one: n - 1 more sequences, which share all blocks until they write different tokens.

        Between `step` and `done`, when the logits after the prompt are there, `done` takes a first token for each. The fork of
        a text that is not all computed, or one that finds no place to run (in "static" none does), waits, before all that came
        later, and then shares full blocks as everyone does. Raises LabError where there is nothing to fork.
        """
        if n < 1 or sequence.state == "ended" or not sequence.order:
            raise LabError(f"sequence {sequence.id} cannot give {n} answers: "
                           + ("ask for 1 or more" if n < 1 else "fork it after add and before it ends"))
        return [self._fork(sequence) for _ in range(n - 1)]

    def step(self) -> Step | None:
        """What to compute next; None where nothing waits or runs. Must be followed by `done` or `failed`."""
        if self._open is not None:
            raise LabError("a step is still running; call done or failed with it first")
        self._open = self._padded_step() if self.policy == "static" else self._paged_step()
        return self._open

    def done(self, step: Step, new: Mapping[Sequence, int], ended: Collection[Sequence] = ()) -> list[Sequence]:
        """The step is computed. new: the next token of every sequence whose piece was `last`, and of their forks; ended: those
        that end with it (one that ends by a token which is no part of its answer needs none). Returns all that ended now, those
        that have `most` new tokens among them. Sequences cancelled meanwhile may be in both, and are passed over.
        """
        self._close(step)
        ended = dict.fromkeys(ended)        # a set in order
        for piece in step.pieces:
            if piece.sequence.state == "running" and self.policy != "static":
                self.blocks.filled(piece.sequence.table, piece.sequence.tokens)
        for sequence, token in new.items():
            if sequence.state != "ended":
                sequence.tokens.append(token)
        ending = [s for s in {**ended, **new}
                  if s.state != "ended" and (s in ended or len(s.tokens) - len(s.prompt) >= s.most)]
        for sequence in ending:
            self.cancel(sequence)
        if stuck := [s.id for s in self._running if not s.left]:
            raise LabError(f"sequences {stuck} got neither a next token nor an end; give each of them one")
        return ending

    def failed(self, step: Step) -> list[Sequence]:
        """The step could not be computed: its sequences end, with those that were forked meanwhile and run, and nothing it was
        to write is kept. Returns those that ended."""
        self._close(step)
        pieces = {piece.sequence for piece in step.pieces}
        ending = [s for s in self._running if s in pieces or not s.left]
        for sequence in ending:
            self._end(sequence)
        return ending

    def owners(self) -> list[int]:
        """Per block: 0 free, -1 cached, else the id of the sequence that holds it, of several the one that came first."""
        owners = [0] * self.blocks.count
        for block in self.blocks.cached():
            owners[block] = -1
        for sequence in reversed(self._batch or self._running):
            for block in sequence.table.blocks:
                owners[block] = sequence.id
        return owners

    # -- paged --

    def _paged_step(self) -> Step | None:
        plan = _Plan(self.rows)
        prompts = []
        for sequence in self.running:
            if sequence.left > 1:
                prompts.append(sequence)
            elif sequence.state == "running":       # and not preempted by one before it
                self._place(plan, sequence, 1)
        for sequence in prompts:
            if sequence.state == "running" and plan.left:
                self._read(plan, sequence)
        self._admit(plan)
        if not plan.pieces:
            if not self.idle:
                raise NoBlocks("no sequence gets on: blocks are held by tables that are none of this scheduler's; release them")
            return None
        return Step([*plan.pieces.values()], [copy for copies in plan.copies.values() for copy in copies])

    def _admit(self, plan: _Plan) -> None:
        """First come, first served: while there are rows, places, and blocks for the whole text and for those who run."""
        blocks = self.blocks
        if not self._waiting or not plan.left or len(self._running) >= self.sequences:
            return
        promised = sum(self._due(sequence, sequence.table) for sequence in self._running)
        while self._waiting and plan.left and len(self._running) < self.sequences:
            sequence = self._waiting[0]
            table = blocks.begin(sequence.tokens, sequence.chain, None if self.answers else len(sequence.prompt))
            if self._running and self._due(sequence, table) + promised > blocks.available:
                blocks.release(table)
                return
            del self._waiting[0]
            self._run(sequence, table)
            sequence.reused += table.length if not sequence.preempted else 0
            self._read(plan, sequence)
            promised += self._due(sequence, table)

    def _due(self, sequence: Sequence, table: Table) -> int:
        """Blocks the sequence takes before long: for the rest of its text, and `ahead` to write into if it may write as many.

        Room to grow is what keeps admission from preempting. ShareGPT-like lengths (means 161 and 338) in 364 blocks, modelled:
        with none 41 % of all tokens are computed again, with 1 % of the pool (vLLM's watermark) 37 %, with 1, 2, 3, 4 blocks a
        sequence 21, 12, 7, 4 %, in 0.5, 3, 5, 6 % more steps; in 1456 blocks 20, 13, and 4, 1, 0, 0 %.
        """
        writes = min(self.ahead * self.blocks.size, sequence.most - len(sequence.tokens) + len(sequence.prompt))
        return self.blocks.missing(table, len(sequence.tokens) - table.length + writes)

    def _read(self, plan: _Plan, sequence: Sequence) -> None:
        """The next chunk of a text. A block that another writes in this very step is waited for: the next step shares it."""
        blocks, table, tokens = self.blocks, sequence.table, sequence.tokens
        found = blocks.reuse(table, tokens)
        sequence.reused += found if not sequence.preempted else 0
        at, inside = divmod(table.length, blocks.size)
        sharable = not inside and table.length + blocks.size < len(tokens)
        if plan.writing and sharable and blocks.key(table, tokens, at) in plan.writing:
            return
        stop = self._place(plan, sequence, min(sequence.left, plan.left))
        if blocks.share:
            keys = (blocks.key(table, tokens, number) for number in range(at, -(-stop // blocks.size)))
            plan.writing.update(key for key in keys if key is not None)

    def _place(self, plan: _Plan, sequence: Sequence, rows: int) -> int:
        """A piece of so many rows, or as many as there are blocks for. Where there are none those who came later go back to the
        queue; the last of all sits this step out. Returns the number of tokens that are computed after it."""
        blocks, table = self.blocks, sequence.table
        while not (room := blocks.room(table)) and self._running[-1] is not sequence:
            self._preempt(plan, self._running[-1])
        rows, first = min(rows, room), table.length
        if rows > 0:
            plan.copies[sequence] = blocks.extend(table, rows)
            plan.pieces[sequence] = Piece(sequence, first, rows, not sequence.left, blocks.covering(table))
            plan.left -= rows
        return table.length

    def _preempt(self, plan: _Plan, sequence: Sequence) -> None:
        piece = plan.pieces.pop(sequence, None)
        plan.copies.pop(sequence, None)
        plan.left += piece.count if piece else 0
        self.blocks.release(sequence.table)
        sequence.table, sequence.state = None, "waiting"
        sequence.preempted += 1
        self.preemptions += 1
        self._running.remove(sequence)
        insort(self._waiting, sequence, key=_order)

    # -- static --

    def _padded_step(self) -> Step | None:
        """Columns of a batch that is padded on the left: all prompts end in one step, and then all write a token a step."""
        if not self._batch:
            for sequence in self._waiting[:self.sequences]:
                table = Table()
                self.blocks.reserve(table, self.longest)
                self._run(sequence, table)
            self._batch = list(self._running)
            del self._waiting[:len(self._batch)]
        if not self._running:
            return None
        ahead = max(sequence.left for sequence in self._running)
        columns = min(ahead, max(1, self.rows // len(self._batch)))
        pieces = []
        for sequence in self._running:
            rows, first = sequence.left - (ahead - columns), sequence.computed
            if rows > 0:
                self.blocks.extend(sequence.table, rows)
                pieces.append(Piece(sequence, first, rows, not sequence.left, self.blocks.covering(sequence.table)))
        return Step(pieces, [], columns * len(self._batch) - sum(piece.count for piece in pieces))

    # -- both --

    def _run(self, sequence: Sequence, table: Table) -> None:
        sequence.table, sequence.state, sequence.chain = table, "running", table.chain
        insort(self._running, sequence, key=_order)

    def _fork(self, sequence: Sequence) -> Sequence:
        fork = Sequence(sequence.prompt, sequence.most, sequence.arrived)
        fork.tokens, fork.chain = list(sequence.tokens), list(sequence.chain)
        fork.order = (*sequence.order, next(self._orders))
        runs = sequence.state == "running" and sequence.left < 2 and self.policy != "static"
        if runs and len(self._running) < self.sequences:
            fork.reused = min(sequence.computed, len(sequence.prompt))
            self._run(fork, self.blocks.fork(sequence.table))
        else:
            insort(self._waiting, fork, key=_order)
        return fork

    def _end(self, sequence: Sequence) -> None:
        if sequence.state == "running":
            self._running.remove(sequence)
            if self.policy != "static":
                self._release([sequence])
            else:
                self.blocks.empty(sequence.table)
        sequence.state = "ended"
        if self._batch and not self._running:
            self._release(self._batch)
            self._batch = []

    def _release(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self.blocks.release(sequence.table)
            sequence.table = None

    def _close(self, step: Step) -> None:
        if step is not self._open:
            raise LabError("this step is not the one that runs; each is done once, before the next")
        self._open = None
