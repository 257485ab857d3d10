"""A paged cache whose cells say which text they belong to, and a model that answers from them: a wrong block shows."""

from dataclasses import dataclass

from llmlab.runtime.blocks import Blocks, Copy
from llmlab.runtime.scheduling import Scheduler, Sequence, Step


@dataclass(frozen=True)
class Model:
    """The next token is a function of all cells of a text, so of every block of it. vocabulary: small, so that texts meet."""

    vocabulary: int = 3

    def next(self, cells: list[int]) -> int:
        return hash(tuple(cells)) % self.vocabulary

    def alone(self, prompt: list[int], most: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(most):
            tokens.append(self.next(written(tokens)))
        return tokens[len(prompt):]


def written(tokens: list[int]) -> list[int]:
    """What each token's cell holds: keys and values depend on all tokens before."""
    cells, before = [], 0
    for token in tokens:
        before = hash((before, token))
        cells.append(before)
    return cells


class Cells:
    """The pool: per block a list of cells, None where nothing was ever written."""

    def __init__(self, blocks: Blocks):
        self.size = blocks.size
        self.pool: list[list[int | None]] = [[None] * blocks.size for _ in range(blocks.count)]

    def copy(self, copies: list[Copy]) -> None:
        assert len({target for _, target in copies}) == len(copies)
        for source, target in copies:
            self.pool[target] = list(self.pool[source])

    def write(self, blocks: list[int], first: int, texts: list[int]) -> None:
        for at, text in enumerate(texts, first):
            self.pool[blocks[at // self.size]][at % self.size] = text

    def read(self, blocks: list[int], count: int) -> list[int | None]:
        return [self.pool[blocks[at // self.size]][at % self.size] for at in range(count)]

    def compute(self, step: Step, model: Model) -> dict[Sequence, int]:
        """The next token of every piece that wants one; what each piece finds in its blocks must be its own text."""
        self.copy(step.copies)
        for sequence, first, count, _, blocks in step.pieces:
            assert count > 0 and len(blocks) == -(-(first + count) // self.size)
            self.write(blocks, first, written(sequence.tokens)[first:first + count])
        new = {}
        for sequence, first, count, last, blocks in step.pieces:
            cells = self.read(blocks, first + count)
            assert cells == written(sequence.tokens)[:first + count], f"sequence {sequence.id} reads another text"
            assert last == (first + count == len(sequence.tokens))
            if last:
                new[sequence] = model.next(cells)
        return new


def check_blocks(blocks: Blocks, tables: list) -> None:
    """What must hold at any moment, counted again from the tables, which are all there are."""
    usage, holders, listed = blocks.usage(), [0] * blocks.count, {}
    for table in tables:
        assert len(set(table.blocks)) == len(table.blocks) and table.length <= len(table.blocks) * blocks.size
        for at, block in enumerate(table.blocks):
            holders[block] += 1
            listed[block] = max(listed.get(block, 0), min(blocks.size, max(0, table.length - at * blocks.size)))
    cached = blocks.cached()
    assert blocks.holders() == holders and len(set(cached)) == len(cached) and not any(holders[block] for block in cached)
    assert usage.total == blocks.count == usage.used + usage.cached + usage.free
    assert usage.used == len(listed) and usage.cached == len(cached) and blocks.available == usage.cached + usage.free
    assert usage.tokens == sum(table.length for table in tables)
    assert usage.written == sum(listed.values()) and usage.shared == usage.tokens - usage.written >= 0
    assert usage.reserved == usage.used * blocks.size == usage.written + usage.wasted and usage.wasted >= 0


def serve(scheduler: Scheduler, cells: Cells, model: Model, steps: list[Step] | None = None) -> int:
    """Runs till nothing waits, checking all the way. Returns how many steps that took."""
    taken = 0
    while (step := scheduler.step()) is not None:
        check_blocks(scheduler.blocks, [s.table for s in (scheduler._batch or scheduler.running)])
        if steps is not None:
            steps.append(step)
        scheduler.done(step, cells.compute(step, model))
        taken += 1
    assert scheduler.idle and scheduler.blocks.usage().used == 0
    return taken
