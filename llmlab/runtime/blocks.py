"""The KV cache as fixed blocks: who holds which, which texts share one, what is kept for later, counted to the cell.

A sequence's keys and values lie in blocks of 16 cells anywhere in one pool; its table lists them in order (PagedAttention,
arXiv 2309.06180). A block that is full is known by a hash chained over all tokens up to its end, so a text that begins alike
takes it instead of computing it again. Whoever writes into a partly filled block that others hold copies it first. A block
that nobody holds but whose text is known stays as long as there is room; the one longest unused goes first.

Every operation costs the blocks it touches, never the pool. Nothing here is safe for several threads: one thread calls all.
"""

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from ..errors import LabError

_DIGEST = 16        # bytes of a block's hash; tokens are compared too, so a collision costs a miss and nothing else


class NoBlocks(LabError):
    """Too few blocks are free or cached for what was asked; nothing was changed."""


class Copy(NamedTuple):
    """All cells of block `source`, of all layers, go to block `target` before the step writes anything.

    Of a step's copies no two have one target. Done in their order, or all read before the first is written: both are right.
    """

    source: int
    target: int


@dataclass(slots=True, eq=False)
class Table:
    """Where one sequence's keys and values lie: token i in cell i % size of blocks[i // size].

    length: tokens that are written or will be when the present step ends. chain: hashes of the text's full blocks, as far as
    they were needed; known: how many of `blocks` are known by their hashes or need not be. read: tokens that are read as a
    prompt, where those after it, which are written one by one, are to be found by nobody but the same text (None: by all).
    """

    blocks: list[int] = field(default_factory=list)
    length: int = 0
    chain: list[bytes] = field(default_factory=list)
    known: int = 0
    read: int | None = None


@dataclass(frozen=True)
class Usage:
    """The pool at one moment, exact.

    Blocks: total == used + cached + free; used: somebody holds it; cached: nobody does, but its text is known; free: neither.
    Cells of used blocks: reserved == written + wasted; written: each cell that a sequence still needs, once. tokens: the
    lengths of all tables; shared, what sharing saved, is what they have more than was written.
    """

    size: int
    total: int
    used: int
    cached: int
    free: int
    tokens: int
    written: int

    @property
    def reserved(self) -> int:
        return self.used * self.size

    @property
    def wasted(self) -> int:
        return self.reserved - self.written

    @property
    def wasted_share(self) -> float:
        """Reserved cells that hold nothing, from 0 to 1; 0 where nothing is reserved. (The paper's figure 2: 1 - this.)"""
        return self.wasted / self.reserved if self.used else 0.0

    @property
    def shared(self) -> int:
        """Cells that would be written once more if no two tables shared a block."""
        return self.tokens - self.written


class Blocks:
    """A pool of `count` blocks of `size` cells (tokens). share: whether texts that begin alike share their full blocks, and
    blocks stay known when nobody holds them; `fork` shares in any case. Raises LabError for a pool that holds nothing.
    """

    def __init__(self, count: int, size: int = 16, share: bool = True):
        if count < 1 or size < 1:
            raise LabError(f"a pool of {count} blocks of {size} tokens holds nothing; give it more memory")
        self.count, self.size, self.share = count, size, share
        self._holders = [0] * count                         # tables that list the block
        self._written = [0] * count                         # of its cells, 0 where nobody holds it
        self._key: list[bytes | None] = [None] * count      # what it is known by
        self._text: list[list[int] | None] = [None] * count
        self._known: dict[bytes, int] = {}                  # hash -> block
        self._cached: OrderedDict[int, None] = OrderedDict()    # the longest unused first
        self._free = [*range(count - 1, -1, -1)]            # the next one to be given last
        self._tokens = self._cells = 0                      # sums for usage

    @property
    def available(self) -> int:
        """Blocks that can be had: free ones, and cached ones that would be forgotten."""
        return len(self._free) + len(self._cached)

    def begin(self, tokens: list[int], chain: list[bytes] | None = None, read: int | None = None) -> Table:
        """A table that holds every known block `tokens` begin with, but never all of `tokens`: what follows the last is wanted.

        chain: the chain of an earlier table of the same text, which may have grown since; it saves hashing it again. read: as
        `Table` has it.
        """
        table = Table(chain=[] if chain is None else chain, read=read)
        self.reuse(table, tokens)
        return table

    def reuse(self, table: Table, tokens: list[int]) -> int:
        """Go on in a table whose blocks are all full by blocks that became known meanwhile. Returns how many tokens that is."""
        before, size = table.length, self.size
        if not self.share or before != len(table.blocks) * size:
            return 0
        while table.length + size < len(tokens):
            at = len(table.blocks)
            block = self._known.get(self.key(table, tokens, at))
            if block is None or self._text[block] != tokens[at * size:(at + 1) * size]:
                break
            if not self._holders[block]:
                del self._cached[block]
                self._written[block] = size
                self._cells += size
            self._holders[block] += 1
            table.blocks.append(block)
            table.length += size
            table.known = at + 1
        self._tokens += table.length - before
        return table.length - before

    def key(self, table: Table, tokens: list[int], at: int) -> bytes | None:
        """What the block number `at` of a text is known by; None where the text does not fill it or nothing is shared."""
        size, chain = self.size, table.chain
        if not self.share or (at + 1) * size > len(tokens):
            return None
        for number in range(len(chain), at + 1):
            text = array("q", tokens[number * size:(number + 1) * size]).tobytes()
            if table.read is not None and number == table.read // size:     # from here on another text, if others go on so
                text += b"read %d" % table.read
            chain.append(blake2b((chain[-1] if chain else b"") + text, digest_size=_DIGEST).digest())
        return chain[at]

    def missing(self, table: Table, count: int) -> int:
        """Blocks that must be available for `count` more tokens, the copy of a shared one among them."""
        return max(0, -(-(table.length + count) // self.size) - len(table.blocks)) + (count > 0 and self._copies(table))

    def room(self, table: Table) -> int:
        """How many more tokens the table could take now."""
        available = self.available
        if self._copies(table):
            if not available:
                return 0
            available -= 1
        return (len(table.blocks) + available) * self.size - table.length

    def extend(self, table: Table, count: int) -> list[Copy]:
        """Room for `count` more tokens, which are to be written in the coming step. Returns the copies (none or one) to be made
        before. Raises NoBlocks where there are too few blocks; then nothing is changed."""
        at, inside = divmod(table.length, self.size)
        end, copies = table.length + count, []
        if (copied := count > 0 and self._copies(table)) or end > len(table.blocks) * self.size:
            self._check(self.missing(table, count))
            if copied:
                source, target = table.blocks[at], self._take()
                self._holders[source] -= 1
                self._written[target] = inside
                self._cells += inside
                table.blocks[at] = target
                copies.append(Copy(source, target))
            self._grow(table, end)
        for number in range(at, -(-end // self.size)):
            block, written = table.blocks[number], min(self.size, end - number * self.size)
            self._cells += written - self._written[block]
            self._written[block] = written
        self._tokens += count
        table.length = end
        return copies

    def reserve(self, table: Table, cells: int) -> None:
        """Blocks for `cells` tokens in all, written or not. Raises NoBlocks where they are too few; then nothing is changed."""
        self._check(max(0, -(-cells // self.size) - len(table.blocks)))
        self._grow(table, cells)

    def filled(self, table: Table, tokens: list[int]) -> None:
        """The table's tokens are written: its full blocks can be shared from now on. tokens: the whole text, or more of it.

        Where two tables wrote the same text side by side the first one's blocks are known; the other's stay its own, and are
        free once it ends.
        """
        if not self.share:
            return
        size = self.size
        for at in range(table.known, table.length // size):
            key, block = self.key(table, tokens, at), table.blocks[at]
            if key not in self._known and self._key[block] is None:
                self._known[key], self._key[block] = block, key
                self._text[block] = tokens[at * size:(at + 1) * size]
        table.known = max(table.known, table.length // size)

    def fork(self, table: Table) -> Table:
        """Another table of the same tokens in the same blocks; whoever goes on first in a partly filled block copies it."""
        blocks = table.blocks[:-(-table.length // self.size)]       # none that are only reserved
        for block in blocks:
            self._holders[block] += 1
        self._tokens += table.length
        return Table(blocks, table.length, list(table.chain), table.known, table.read)

    def empty(self, table: Table) -> None:
        """What the table holds is not needed any more, but its blocks, which are its own, stay reserved."""
        for block in table.blocks:
            self._cells -= self._written[block]
            self._written[block] = 0
        self._tokens -= table.length
        table.length = 0

    def release(self, table: Table) -> None:
        """The table's blocks go back, the last first: the end of a text is forgotten before what it begins with. Once more does
        nothing."""
        for block in reversed(table.blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                self._cells -= self._written[block]
                self._written[block] = 0
                if self._key[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
        self._tokens -= table.length
        table.blocks, table.length, table.known = [], 0, 0

    def covering(self, table: Table) -> list[int]:
        """The blocks that the table's tokens lie in, a list of its own."""
        return table.blocks[:-(-table.length // self.size)]

    def holders(self) -> list[int]:
        """Per block: how many tables hold it."""
        return list(self._holders)

    def cached(self) -> tuple[int, ...]:
        """The blocks that nobody holds and whose text is known, the longest unused first."""
        return tuple(self._cached)

    def usage(self) -> Usage:
        free, cached = len(self._free), len(self._cached)
        return Usage(self.size, self.count, self.count - free - cached, cached, free, self._tokens, self._cells)

    def _copies(self, table: Table) -> bool:
        """Whether the next token would go into a block that others hold too."""
        return table.length % self.size > 0 and self._holders[table.blocks[table.length // self.size]] > 1

    def _check(self, needed: int) -> None:
        if needed > self.available:
            raise NoBlocks(f"{needed:,} more blocks of {self.size} tokens are needed and {self.available:,} of {self.count:,} "
                           "can be had; end a sequence first, or give the cache more memory")

    def _grow(self, table: Table, cells: int) -> None:
        while len(table.blocks) * self.size < cells:
            table.blocks.append(self._take())

    def _take(self) -> int:
        block = self._free.pop() if self._free else self._evict()
        self._holders[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._known[self._key[block]]
        self._key[block] = self._text[block] = None
        return block
