"""Blocks of the KV cache: what a table reads is its own text, whatever was shared, copied or forgotten; and counts add up."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from paged_cells import Cells, check_blocks, written

from llmlab.errors import LabError
from llmlab.runtime import blocks as module
from llmlab.runtime.blocks import Blocks, Copy, NoBlocks, Table, Usage


def filled(blocks: Blocks, tokens: list[int]) -> Table:
    """A table of all `tokens`, written."""
    table = blocks.begin(tokens)
    blocks.extend(table, len(tokens) - table.length)
    blocks.filled(table, tokens)
    return table


def test_a_text_that_begins_alike_shares_its_full_blocks():
    blocks = Blocks(10, size=4)
    one = filled(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    other = blocks.begin([1, 2, 3, 4, 5, 6, 7, 8, 5, 5])
    assert other.length == 8 and other.blocks == one.blocks[:2]
    assert blocks.begin([1, 2, 3, 4, 0, 0, 0, 0, 0]).blocks == one.blocks[:1]
    assert blocks.begin([0, 2, 3, 4, 5, 6, 7, 8, 9]).blocks == []       # alike from the second block on is not alike
    assert blocks.usage() == Usage(size=4, total=10, used=3, cached=0, free=7, tokens=9 + 8 + 4, written=9)
    assert blocks.usage().shared == 12 and blocks.usage().wasted == 3 and blocks.usage().wasted_share == 0.25


def test_never_all_of_a_text_is_found():
    blocks = Blocks(10, size=4)
    filled(blocks, [1, 2, 3, 4, 5, 6, 7, 8])
    assert blocks.begin([1, 2, 3, 4, 5, 6, 7, 8]).length == 4
    assert blocks.begin([1, 2, 3, 4, 5, 6, 7, 8, 9]).length == 8


def test_only_what_is_written_is_shared():
    blocks, text = Blocks(10, size=4), list(range(12))
    table = blocks.begin(text)
    blocks.extend(table, 6)
    assert blocks.begin(text).length == 0                               # a step is still to write it
    blocks.filled(table, text)
    assert blocks.begin(text).length == 4                               # its second block holds 2 of 4


def test_a_table_goes_on_in_blocks_that_became_known():
    blocks, text = Blocks(10, size=4), list(range(20))
    late = blocks.begin(text)
    one = filled(blocks, text)
    assert blocks.reuse(late, text) == 16 and late.blocks == one.blocks[:4] and blocks.reuse(late, text) == 0
    blocks.extend(late, 1)
    blocks.filled(one, text)
    assert blocks.reuse(late, text) == 0                                # it stands in the middle of a block of its own
    check_blocks(blocks, [one, late])


def test_what_was_written_twice_is_known_once():
    blocks, text = Blocks(10, size=4), list(range(9))
    one, other = blocks.begin(text), blocks.begin(text)
    for table in (one, other):
        blocks.extend(table, 9)
    blocks.filled(other, text)
    blocks.filled(one, text)
    assert blocks.begin(text).blocks == other.blocks[:2]
    blocks.release(one)
    assert blocks.usage().cached == 0 and blocks.usage().free == 7


def test_without_sharing_nothing_is_known():
    blocks = Blocks(4, size=4, share=False)
    table = filled(blocks, [1] * 9)
    assert blocks.begin([1] * 9).length == 0 and blocks.key(Table(), [1] * 9, 0) is None
    blocks.release(table)
    assert blocks.usage().free == 4


def test_released_blocks_stay_known_and_the_longest_unused_go_first_from_their_end():
    blocks = Blocks(7, size=2)
    a, b, c = [1, 1, 1, 1, 1], [2, 2, 2], [3, 3, 3]
    tables = [filled(blocks, text) for text in (a, b, c)]
    for table in tables[:2]:
        blocks.release(table)
    blocks.release(tables[2])
    assert (blocks.usage().used, blocks.usage().cached, blocks.usage().free) == (0, 4, 3)
    again = blocks.begin(a)                                             # used again: a's are now the youngest
    blocks.release(again)
    taken = Table()
    blocks.extend(taken, 8)                                             # the free ones and b's
    assert [blocks.begin(text).length for text in (a, b, c)] == [4, 0, 2]
    blocks.release(taken)
    filled(blocks, b)
    assert blocks.begin(b).length == 2                                  # what was forgotten can be known again


def test_the_end_of_a_text_is_forgotten_before_its_beginning():
    blocks, text = Blocks(4, size=2), [1, 2, 3, 4, 5, 6, 7]
    blocks.release(filled(blocks, text))
    blocks.extend(Table(), 4)
    assert blocks.begin(text).length == 4


def test_a_fork_copies_the_block_it_shares_and_the_last_holder_writes_in_place():
    blocks, text = Blocks(10, size=4), [1, 2, 3, 4, 5, 6]
    one = filled(blocks, text)
    two, three = blocks.fork(one), blocks.fork(one)
    last = one.blocks[1]
    assert blocks.missing(one, 1) == blocks.missing(two, 2) == 1 and blocks.missing(one, 0) == 0
    assert blocks.usage() == Usage(4, 10, used=2, cached=0, free=8, tokens=18, written=6)
    first = blocks.extend(one, 1)
    assert first == [Copy(last, one.blocks[1])] and one.blocks[1] != last
    second = blocks.extend(three, 1)
    assert second == [Copy(last, three.blocks[1])]
    assert blocks.extend(two, 1) == [] and two.blocks[1] == last
    assert one.blocks[0] == two.blocks[0] == three.blocks[0]
    assert blocks.usage() == Usage(4, 10, used=4, cached=0, free=6, tokens=21, written=4 + 3 * 3)
    for table in (one, two, three):
        blocks.release(table)
    assert blocks.usage().used == 0 and blocks.usage().tokens == 0


def test_a_fork_at_the_end_of_a_block_copies_nothing():
    blocks = Blocks(10, size=4)
    one = filled(blocks, [1, 2, 3, 4])
    two = blocks.fork(one)
    assert blocks.extend(one, 1) == blocks.extend(two, 1) == [] and one.blocks[1] != two.blocks[1]


def test_the_parent_may_go_before_its_fork():
    blocks = Blocks(4, size=4)
    one = filled(blocks, [1, 2, 3, 4, 5, 6])
    two = blocks.fork(one)
    blocks.release(one)
    assert blocks.usage().used == 2 and blocks.extend(two, 1) == []


def test_too_few_blocks_change_nothing():
    blocks = Blocks(3, size=4)
    one = filled(blocks, [1, 2, 3, 4, 5, 6])
    two = blocks.fork(one)
    before = blocks.usage(), list(one.blocks), one.length
    for count in (1 + 2 + 4, 100):
        with pytest.raises(NoBlocks, match=r"more blocks of 4 tokens are needed and 1 of 3 can be had; end a sequence first"):
            blocks.extend(one, count)
    with pytest.raises(NoBlocks):
        blocks.reserve(two, 13)
    assert (blocks.usage(), one.blocks, one.length) == before
    assert blocks.room(one) == 2 == blocks.room(two)
    blocks.extend(one, 2)
    assert blocks.room(one) == 0 and blocks.room(two) == 2              # the block is its own now


def test_room_is_what_extend_takes():
    blocks = Blocks(3, size=4)
    table = Table()
    assert blocks.room(table) == 12
    blocks.extend(table, 5)
    assert blocks.room(table) == 7 and blocks.missing(table, 3) == 0 and blocks.missing(table, 7) == 1
    blocks.extend(table, 7)
    other = blocks.fork(table)
    assert blocks.room(table) == 0 == blocks.room(other)


def test_reserved_blocks_are_wasted_until_they_are_written_and_again_when_they_are_not_needed():
    blocks, table = Blocks(4, size=4), Table()
    blocks.reserve(table, 13)
    assert blocks.usage().reserved == blocks.usage().wasted == 16 and blocks.usage().wasted_share == 1
    blocks.extend(table, 6)
    assert blocks.usage().written == 6 and len(table.blocks) == 4 and len(blocks.covering(table)) == 2
    fork = blocks.fork(table)
    assert len(fork.blocks) == 2                                        # nothing that is only reserved
    blocks.release(fork)
    blocks.empty(table)
    assert blocks.usage() == Usage(4, 4, used=4, cached=0, free=0, tokens=0, written=0)
    blocks.release(table)
    assert blocks.usage().free == 4 and blocks.usage().wasted_share == 0


def test_released_twice_is_released_once():
    blocks = Blocks(4, size=4)
    one = filled(blocks, [1] * 6)
    blocks.release(one)
    blocks.release(one)
    check_blocks(blocks, [])


def test_what_was_written_is_found_by_the_same_text_alone_where_it_is_to_be():
    """Its numbers were computed token by token, and a prompt's together: in their last bits they differ."""
    blocks, text = Blocks(20, size=4), list(range(20))
    for read in (6, 8):
        table = blocks.begin(text, read=read)
        blocks.extend(table, 20 - table.length)
        blocks.filled(table, text)
        blocks.release(table)
        assert blocks.begin(text, read=read).length == 16                   # the text again, as after a preemption
        assert blocks.begin(text, read=7).length == 4                       # whose prompt was another
        assert blocks.begin([*text, 1], read=21).length == read // 4 * 4     # a prompt that goes on from there
    assert blocks.begin([*text, 1]).length == 8


def test_blocks_that_had_to_make_room_are_known_no_more():
    blocks = Blocks(5, size=4)
    held = filled(blocks, [2] * 5)
    blocks.release(filled(blocks, [1] * 9))
    other = Table()
    blocks.reserve(other, 12)               # all there are besides: what nobody holds goes
    blocks.release(other)
    assert blocks.begin([1] * 9).length == 0 and blocks.usage().free == 3 and blocks.begin([2] * 9).blocks == held.blocks[:1]


def test_a_collision_of_hashes_is_a_miss(monkeypatch):
    monkeypatch.setattr(module, "blake2b", lambda data, digest_size: type("Same", (), {"digest": lambda self: b"same"})())
    blocks = Blocks(10, size=2)
    tables = [filled(blocks, text) for text in ([1, 2, 3], [4, 5, 6], [4, 5, 4, 5, 6])]
    assert len({table.blocks[0] for table in tables}) == 3
    assert blocks.begin([1, 2, 9]).blocks == tables[0].blocks[:1] and blocks.begin([4, 5, 9]).blocks == []
    for table in tables:
        blocks.release(table)


def test_tokens_may_be_any_64_bit_number():
    blocks = Blocks(4, size=2)
    filled(blocks, [-1, 2**40, 5])
    assert blocks.begin([-1, 2**40, 7]).length == 2


@pytest.mark.parametrize(("count", "size"), [(0, 16), (-1, 16), (4, 0)])
def test_an_empty_pool_is_refused(count, size):
    with pytest.raises(LabError, match="holds nothing; give it more memory"):
        Blocks(count, size)


class Pool(RuleBasedStateMachine):
    """Texts come, grow, fork and go in any order; the cells behind each table are always its own text's."""

    tables = Bundle("tables")
    words = st.lists(st.integers(0, 1), min_size=1, max_size=9)     # few words: texts begin alike often

    @initialize(count=st.integers(4, 20), size=st.sampled_from([2, 3, 4]), share=st.booleans())
    def pool(self, count, size, share):
        self.blocks = Blocks(count, size, share)
        self.cells = Cells(self.blocks)
        self.texts: dict[Table, list[int]] = {}

    @rule(target=tables, text=words)
    def begin(self, text):
        table = self.blocks.begin(text)
        assert table.length < len(text) and table.length == len(table.blocks) * self.blocks.size
        self.texts[table] = text[:table.length]
        self.extend(table, text[table.length:])
        return table

    @rule(table=tables, words=words)
    def write(self, table, words):
        self.extend(table, words)

    def extend(self, table, words):
        before, missing, room = self.blocks.usage(), self.blocks.missing(table, len(words)), self.blocks.room(table)
        assert (missing <= self.blocks.available) == (len(words) <= room)
        if len(words) > room:
            with pytest.raises(NoBlocks):
                self.blocks.extend(table, len(words))
            assert self.blocks.usage() == before
            return
        available = self.blocks.available
        self.cells.copy(self.blocks.extend(table, len(words)))
        assert available - self.blocks.available == missing
        text = self.texts[table] = self.texts[table] + words
        first = len(text) - len(words)
        self.cells.write(table.blocks, first, written(text)[first:])
        self.blocks.filled(table, text)

    @rule(table=tables, words=words)
    def reuse(self, table, words):
        text = self.texts[table] + words
        self.blocks.reuse(table, text)
        self.texts[table] = text[:table.length]

    @rule(target=tables, table=tables, one=words, other=words)
    def fork(self, table, one, other):
        fork = self.blocks.fork(table)
        self.texts[fork] = self.texts[table]
        self.extend(table, one[:4])
        self.extend(fork, other[:4])
        return fork

    @rule(table=consumes(tables))
    def release(self, table):
        self.blocks.release(table)
        assert table.blocks == [] and table.length == 0
        del self.texts[table]

    @invariant()
    def every_cell_is_its_own_text(self):
        for table, text in getattr(self, "texts", {}).items():
            assert table.length == len(text) and self.cells.read(table.blocks, len(text)) == written(text)

    @invariant()
    def the_counts_add_up(self):
        if hasattr(self, "blocks"):
            check_blocks(self.blocks, list(self.texts))

    def teardown(self):
        for table in getattr(self, "texts", {}):
            self.blocks.release(table)
        if hasattr(self, "blocks"):
            check_blocks(self.blocks, [])


Pool.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
test_texts_that_come_grow_fork_and_go = Pool.TestCase
