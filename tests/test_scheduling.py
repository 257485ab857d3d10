"""Continuous batching: whatever comes, goes, is cancelled or preempted, each answer is what it would have been alone."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paged_cells import Cells, Model, check_blocks, serve

from llmlab.errors import LabError
from llmlab.runtime.blocks import Blocks, NoBlocks, Table
from llmlab.runtime.scheduling import POLICIES, Scheduler, Sequence, Step

MODEL = Model()


def scheduler(count: int, size: int = 4, share: bool = True, **settings) -> tuple[Scheduler, Cells]:
    blocks = Blocks(count, size, share)
    return Scheduler(blocks, **{"rows": 16, "sequences": 8, "ahead": 0, **settings}), Cells(blocks)


def added(to: Scheduler, *texts: tuple[list[int], int]) -> list[Sequence]:
    sequences = [Sequence(prompt, most) for prompt, most in texts]
    for sequence in sequences:
        to.add(sequence)
    return sequences


def pieces(step: Step) -> list[tuple[int, int, bool]]:
    return [(first, count, last) for _, first, count, last, _ in step.pieces]


def text(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(3), k=count)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("count", [8, 12, 100])
def test_every_answer_is_what_it_is_alone(policy, share, count):
    able, cells = scheduler(count, share=share, policy=policy, context=32)
    rng = random.Random(count)
    sequences = added(able, *[(text(rng.randrange(9), rng.randrange(1, 20)), rng.randrange(1, 13)) for _ in range(40)])
    serve(able, cells, MODEL)
    for sequence in sequences:
        assert sequence.new == MODEL.alone(sequence.prompt, sequence.most) and sequence.state == "ended"
    if policy == "paged":
        assert (able.preemptions > 0) == (count < 100)
        assert able.preemptions == sum(sequence.preempted for sequence in sequences)
        assert any(sequence.reused for sequence in sequences) == share
    else:
        assert able.preemptions == 0


def test_answers_first_then_prompts_in_chunks_in_the_order_they_came():
    able, cells = scheduler(100, rows=10, sequences=4)
    a, b = added(able, (text(1, 3), 9), (text(2, 21), 9))
    step = able.step()
    assert pieces(step) == [(0, 3, True), (0, 7, False)] and step.rows == 10 and step.padded == 0
    able.done(step, cells.compute(step, MODEL))
    c, = added(able, (text(3, 5), 9))
    step = able.step()
    assert pieces(step) == [(3, 1, True), (7, 9, False)] and c.state == "waiting"
    able.done(step, cells.compute(step, MODEL))
    step = able.step()
    assert pieces(step) == [(4, 1, True), (16, 5, True), (0, 4, False)]
    assert [piece.sequence for piece in step.pieces] == [a, b, c] and able.running == (a, b, c)
    assert step.pieces[1].tokens == b.prompt[16:]
    assert (a.computed, a.left, b.computed, b.left, c.left) == (5, 0, 21, 0, 1)
    able.done(step, cells.compute(step, MODEL))
    step = able.step()
    assert pieces(step) == [(5, 1, True), (21, 1, True), (4, 1, True)]


def test_no_more_than_so_many_run_at_once():
    able, cells = scheduler(100, rows=100, sequences=3)
    added(able, *[(text(i, 4), 4) for i in range(7)])
    step = able.step()
    assert len(step.pieces) == 3 and len(able.waiting) == 4
    able.done(step, cells.compute(step, MODEL), ended=[able.running[1]])
    assert [piece.sequence.id for piece in able.step().pieces] == [s.id for s in able.running] and len(able.running) == 3


def test_a_waiting_text_is_admitted_when_all_of_it_has_room_and_none_overtakes_it():
    able, cells = scheduler(6, rows=8, sequences=8)                     # 24 cells
    a, b, c = added(able, (text(1, 6), 6), (text(2, 17), 2), (text(3, 1), 1))
    step = able.step()
    assert [piece.sequence for piece in step.pieces] == [a] and able.waiting == (b, c)
    able.done(step, cells.compute(step, MODEL), ended=[a])
    step = able.step()
    assert [piece.sequence for piece in step.pieces] == [b]             # all rows are b's
    able.done(step, cells.compute(step, MODEL))
    step = able.step()
    assert pieces(step) == [(8, 8, False)]
    able.done(step, cells.compute(step, MODEL))
    assert [piece.sequence for piece in able.step().pieces] == [b, c]


def test_what_running_prompts_still_need_is_not_given_away():
    able, cells = scheduler(8, rows=12, sequences=8)
    a, b, c = added(able, (text(1, 20), 4), (text(2, 3), 4), (text(3, 9), 4))
    step = able.step()
    assert pieces(step) == [(0, 12, False)]                             # a holds 3 of 8 blocks and will need 2 more
    able.done(step, cells.compute(step, MODEL))
    step = able.step()
    assert pieces(step) == [(12, 8, True), (0, 3, True)] and able.waiting == (c,)
    able.done(step, cells.compute(step, MODEL))
    assert able.step() and c.state == "waiting"                         # a and b took the blocks that c would need


def test_admission_leaves_room_to_grow_so_that_fewer_go_back():
    rng = random.Random(0)
    texts = [(text(rng.random(), rng.randrange(1, 30)), rng.randrange(1, 60)) for _ in range(60)]
    rows = {}
    for ahead in (0, 2, 4):
        able, cells = scheduler(30, rows=32, sequences=16, ahead=ahead, share=False)
        sequences, steps = added(able, *texts), []
        serve(able, cells, MODEL, steps)
        rows[ahead] = sum(step.rows for step in steps)
        assert all(s.new == MODEL.alone(s.prompt, s.most) for s in sequences)
    assert rows[0] > 1.2 * rows[2] and rows[2] > rows[4] >= sum(len(prompt) + most - 1 for prompt, most in texts)


def test_room_to_grow_is_no_more_than_may_be_written():
    able, _ = scheduler(6, ahead=2)
    a, b, c = added(able, (text(1, 8), 1), (text(2, 8), 9), (text(3, 1), 1))
    able.step()
    assert able.running == (a,) and b.state == "waiting"                # 3 blocks for a, and 4 for b
    able, _ = scheduler(6, ahead=2)
    a, b, c = added(able, (text(1, 7), 1), (text(2, 8), 9), (text(3, 1), 1))
    able.step()
    assert able.running == (a, b) and c.state == "waiting"              # 2 and 4, and none is left for c


def test_where_blocks_run_out_the_last_goes_back_with_what_it_wrote():
    able, cells = scheduler(6, rows=16, sequences=8)
    a, b, c = added(able, (text(1, 8), 12), (text(2, 8), 12), (text(3, 17), 1))
    while not able.preemptions:
        step = able.step()
        if not able.preemptions:
            able.done(step, cells.compute(step, MODEL))
    assert (a.state, b.state, b.table, b.preempted) == ("running", "waiting", None, 1)
    assert len(b.tokens) > 8 and b.tokens[:8] == b.prompt and [p.sequence for p in step.pieces] == [a]
    assert able.waiting == (b, c)                                       # before those that came later
    written = len(b.tokens)
    able.done(step, cells.compute(step, MODEL))
    assert b.computed == 0 and len(b.tokens) == written
    serve(able, cells, MODEL)
    assert a.new == MODEL.alone(a.prompt, 12) and b.new == MODEL.alone(b.prompt, 12) and a.preempted == 0
    assert b.reused == 0                                                # what it finds of its own later is no gift


def test_a_preempted_text_finds_its_own_blocks_again():
    able, cells = scheduler(7, rows=32, sequences=2)
    a, b = added(able, (text(1, 12), 8), (text(2, 11), 4))
    steps = []
    serve(able, cells, MODEL, steps)
    assert b.preempted == 1
    again = [piece for step in steps for piece in step.pieces if piece.sequence is b and piece.count > 1]
    assert again[0].first == 0 and again[1].first > 0                   # not from the beginning


def test_the_last_of_all_sits_out_rather_than_lose_what_it_has():
    able, cells = scheduler(4, rows=16, sequences=8)
    a, b = added(able, (text(1, 7), 3), (text(2, 4), 4))
    step = able.step()
    able.done(step, cells.compute(step, MODEL))
    step = able.step()                                                  # b takes the last block
    able.done(step, cells.compute(step, MODEL))
    step = able.step()                                                  # a needs one: b goes
    assert [piece.sequence for piece in step.pieces] == [a] and b.preempted == 1
    able.done(step, cells.compute(step, MODEL))
    serve(able, cells, MODEL)
    able, cells = scheduler(4, rows=16, sequences=8)
    a, b = added(able, (text(1, 5), 4), (text(2, 4), 5))
    step = able.step()
    able.done(step, cells.compute(step, MODEL))
    holder = Table()
    able.blocks.reserve(holder, 4)                                      # somebody else takes the last block
    step = able.step()
    assert [piece.sequence for piece in step.pieces] == [a] and (b.state, b.preempted) == ("running", 0)
    able.done(step, cells.compute(step, MODEL))
    able.blocks.release(holder)
    step = able.step()
    assert [piece.sequence for piece in step.pieces] == [a, b]


def test_texts_that_begin_alike_and_come_together_are_computed_once():
    able, cells = scheduler(100, rows=100, sequences=8)
    common = text(1, 20)
    sequences = added(able, *[([*common, *text(i, 5)], 3) for i in range(5)], (text(9, 6), 3))
    step = able.step()
    assert pieces(step) == [(0, 25, True), (0, 6, True)]                # the last one is another text: it does not wait
    assert all(sequence.state == "running" for sequence in sequences)
    able.done(step, cells.compute(step, MODEL))
    step = able.step()
    assert pieces(step) == [(25, 1, True), (6, 1, True), *[(20, 5, True)] * 4]
    assert [sequence.reused for sequence in sequences] == [0, 20, 20, 20, 20, 0]
    able.done(step, cells.compute(step, MODEL))
    assert able.blocks.usage().shared == 4 * 20
    serve(able, cells, MODEL)


def test_a_text_follows_a_long_one_it_begins_like_chunk_by_chunk():
    able, cells = scheduler(100, rows=10, sequences=4)
    common = text(1, 40)
    a, b = added(able, ([*common, 1], 2), ([*common, 2, 2], 2))
    steps = []
    serve(able, cells, MODEL, steps)
    assert sum(piece.count for step in steps for piece in step.pieces if piece.sequence is b) == 2 + 1
    assert b.reused == 40 and len(steps) <= 6


def test_without_sharing_nobody_waits_for_another():
    able, _ = scheduler(100, rows=100, share=False)
    added(able, (text(1, 20), 2), (text(1, 20), 2))
    assert pieces(able.step()) == [(0, 20, True), (0, 20, True)]


def test_the_next_turn_of_a_talk_is_found():
    able, cells = scheduler(100, rows=100)
    first, = added(able, (text(1, 11), 6))
    serve(able, cells, MODEL)
    second, = added(able, (first.tokens + text(2, 4), 3))
    serve(able, cells, MODEL)
    assert second.reused == 16                                          # 17 were kept; the last new one was never computed


def test_n_answers_share_the_prompt_until_they_differ():
    able, cells = scheduler(100, rows=100)
    one, = added(able, (text(1, 10), 4))
    step = able.step()
    new = cells.compute(step, MODEL)
    forks = able.fork(one, 4)
    assert len(forks) == 3 and able.running == (one, *forks)
    ended = able.done(step, new | {fork: at % 3 for at, fork in enumerate(forks)})
    assert ended == [] and able.blocks.usage().used == 3 and able.blocks.usage().shared == 3 * 10
    step = able.step()
    assert len(step.copies) == 3 and pieces(step) == [(10, 1, True)] * 4
    able.done(step, cells.compute(step, MODEL))
    assert able.blocks.usage().used == 2 + 4
    serve(able, cells, MODEL)
    assert one.new == MODEL.alone(one.prompt, 4)
    for at, fork in enumerate(forks):
        assert fork.new == [at % 3, *MODEL.alone([*fork.prompt, at % 3], 3)] and fork.reused == 10


def test_an_answer_forks_in_its_middle():
    able, cells = scheduler(100, rows=100)
    one, = added(able, (text(1, 10), 6))
    for _ in range(3):
        step = able.step()
        able.done(step, cells.compute(step, MODEL))
    fork, = able.fork(one, 2)
    serve(able, cells, MODEL)
    assert fork.new == one.new == MODEL.alone(one.prompt, 6)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_fork_without_a_place_waits_before_those_that_came_later(policy):
    able, cells = scheduler(100, rows=100, sequences=2, policy=policy, context=20)
    one, other = added(able, (text(1, 10), 4), (text(2, 3), 3))
    last, = added(able, (text(3, 3), 3))
    step = able.step()
    new = cells.compute(step, MODEL)
    forks = able.fork(one, 3)
    assert able.waiting == ((*forks, other, last) if policy == "alone" else (*forks, last))
    able.done(step, new | dict.fromkeys(forks, 2))
    serve(able, cells, MODEL)
    for fork in forks:
        assert fork.new == [2, *MODEL.alone([*fork.prompt, 2], 3)]
    assert other.new == MODEL.alone(other.prompt, 3) and last.new == MODEL.alone(last.prompt, 3)


def test_a_text_that_waits_or_is_half_read_can_fork():
    able, cells = scheduler(100, rows=8)
    one, = added(able, (text(1, 20), 3))
    early = able.fork(one, 2)
    step = able.step()
    able.done(step, cells.compute(step, MODEL))
    half = able.fork(one, 2)
    assert half[0].state == "waiting"                                   # or it would compute the rest once more
    serve(able, cells, MODEL)
    for sequence in (one, *early, *half):
        assert sequence.new == MODEL.alone(one.prompt, 3)
    assert early[0].reused == half[0].reused == 16


def test_cancelled_wherever_it_stands():
    able, cells = scheduler(20, rows=12, sequences=3)
    a, b, c, d = added(able, (text(1, 6), 9), (text(2, 6), 9), (text(3, 20), 9), (text(4, 5), 9))
    able.cancel(d)                                                      # waiting, never admitted
    step = able.step()
    able.cancel(b)                                                      # its step runs
    assert b.table is None and b.state == "ended"
    new = cells.compute(step, MODEL)
    assert b in new
    assert able.done(step, new) == [] and b.new == []
    step = able.step()
    able.done(step, cells.compute(step, MODEL))
    able.cancel(c)                                                      # half read
    able.cancel(c)
    able.cancel(a)
    assert able.idle and able.step() is None and able.blocks.usage().used == 0
    check_blocks(able.blocks, [])


def test_cancelled_when_preempted():
    able, cells = scheduler(6, rows=16)
    a, b = added(able, (text(1, 8), 12), (text(2, 8), 12))
    while not b.preempted:
        step = able.step()
        able.done(step, cells.compute(step, MODEL))
    able.cancel(b)
    serve(able, cells, MODEL)
    assert a.new == MODEL.alone(a.prompt, 12) and 0 < len(b.new) < 12


def test_what_a_cancelled_step_was_to_write_is_not_known():
    able, cells = scheduler(20, rows=100)
    a, = added(able, (text(1, 9), 2))
    step = able.step()
    able.cancel(a)
    able.done(step, {})
    b, = added(able, (text(1, 9), 2))
    serve(able, cells, MODEL)
    assert b.reused == 0


def test_a_fork_outlives_the_one_it_came_from():
    able, cells = scheduler(20, rows=100)
    a, = added(able, (text(1, 9), 3))
    step = able.step()
    new = cells.compute(step, MODEL)
    fork, = able.fork(a, 2)
    able.cancel(a)
    able.done(step, new | {fork: 1})
    serve(able, cells, MODEL)
    assert a.new == [] and fork.new == [1, *MODEL.alone([*fork.prompt, 1], 2)]


def test_a_step_that_failed_ends_its_own_and_no_others():
    able, cells = scheduler(20, rows=8, sequences=2)
    a, b, c = added(able, (text(1, 5), 3), (text(2, 9), 3), (text(3, 5), 3))
    step = able.step()
    assert able.failed(step) == [a, b] and able.blocks.usage().used == 0 == able.blocks.usage().cached
    serve(able, cells, MODEL)
    assert c.new == MODEL.alone(c.prompt, 3) and a.new == b.new == []


def test_forks_of_a_step_that_failed_end_too_where_they_share_what_it_wrote():
    able, cells = scheduler(20, rows=8, sequences=2)
    a, = added(able, (text(1, 5), 3))
    step = able.step()
    running, waiting = able.fork(a, 3)
    assert able.failed(step) == [a, running] and able.running == () and able.waiting == (waiting,)
    serve(able, cells, MODEL)
    assert waiting.new == MODEL.alone(a.prompt, 3)


def test_an_end_without_a_token_an_end_with_one_and_the_most():
    able, cells = scheduler(20, rows=100)
    a, b, c = added(able, (text(1, 5), 3), (text(2, 5), 3), (text(3, 5), 1))
    step = able.step()
    new = cells.compute(step, MODEL)
    assert able.done(step, {b: new[b], c: new[c]}, [a, b]) == [a, b, c]
    assert (a.new, b.new, c.new) == ([], [new[b]], [new[c]]) and able.idle


def test_static_batches_start_together_pad_and_keep_their_blocks_till_the_last_has_ended():
    able, cells = scheduler(10, rows=8, sequences=8, policy="static", context=20)       # 5 blocks each: two at once
    a, b, c = added(able, (text(1, 3), 1), (text(2, 7), 4), (text(3, 4), 2))
    steps = []
    for _ in range(6):
        step = able.step()
        steps.append((pieces(step), step.rows, step.padded))
        able.done(step, cells.compute(step, MODEL))
        if len(steps) == 3:
            usage = able.blocks.usage()
    assert steps == [([(0, 4, False)], 4, 4),                           # a's 3 tokens and 4 of padding, 4 columns a step
                     ([(0, 3, True), (4, 3, True)], 6, 0),
                     ([(7, 1, True)], 1, 1), ([(8, 1, True)], 1, 1), ([(9, 1, True)], 1, 1),
                     ([(0, 4, True)], 4, 0)]
    assert (usage.used, usage.written) == (10, 8)                       # a's are reserved still, what they hold is not needed
    assert able.owners()[:5].count(c.id) + able.owners()[5:].count(c.id) == 5
    serve(able, cells, MODEL)
    assert [s.new for s in (a, b, c)] == [MODEL.alone(s.prompt, s.most) for s in (a, b, c)]


def test_static_cancels_end_a_batch_too():
    able, cells = scheduler(10, rows=8, sequences=8, policy="static", context=20)
    a, b, c = added(able, (text(1, 3), 9), (text(2, 7), 9), (text(3, 4), 2))
    step = able.step()
    able.cancel(b)
    assert able.blocks.usage().used == 10
    able.done(step, cells.compute(step, MODEL))
    step = able.step()
    assert pieces(step) == [(0, 3, True)] and step.padded == 3
    able.cancel(a)
    assert able.blocks.usage().used == 0
    able.done(step, cells.compute(step, MODEL))
    serve(able, cells, MODEL)
    assert c.new == MODEL.alone(c.prompt, 2)


def test_alone_is_one_after_another():
    able, cells = scheduler(100, rows=10, policy="alone")
    added(able, (text(1, 12), 3), (text(2, 3), 2))
    steps = []
    serve(able, cells, MODEL, steps)
    assert [pieces(step) for step in steps] == [[(0, 10, False)], [(10, 2, True)], [(12, 1, True)], [(13, 1, True)],
                                                [(0, 3, True)], [(3, 1, True)]]


def test_owners_name_the_one_that_came_first():
    able, cells = scheduler(6, rows=100)
    a, b = added(able, (text(1, 9), 2), ([*text(1, 8), 0, 0], 4))
    for _ in range(2):
        step = able.step()
        able.done(step, cells.compute(step, MODEL))
    assert a.state == "ended" and able.owners().count(b.id) == 3
    serve(able, cells, MODEL)
    assert sorted(set(able.owners())) == [-1, 0]


def test_paged_wastes_little_where_static_wastes_most():
    rng = random.Random(0)
    texts = [(text(rng.random(), min(400, 1 + int(rng.lognormvariate(4.2, 1)))), min(400, 1 + int(rng.lognormvariate(5, 0.9))))
             for _ in range(120)]
    wasted = {}
    for policy in ("paged", "static"):
        able = Scheduler(Blocks(1000), rows=256, sequences=64, policy=policy, context=1000)
        added(able, *texts)
        reserved = empty = 0
        while step := able.step():
            usage = able.blocks.usage()
            reserved, empty = reserved + usage.reserved, empty + usage.wasted
            able.done(step, {piece.sequence: 0 for piece in step.pieces if piece.last})
        wasted[policy] = empty / reserved
    assert wasted["paged"] < 0.06 and wasted["static"] > 0.6, wasted


@pytest.mark.parametrize(("given", "said"), [
    (dict(policy="orca"), "policy is 'orca'; it is one of paged, static, alone"),
    (dict(rows=4, sequences=8), "a step of 4 rows for 8 sequences"),
    (dict(sequences=0), "for 0 sequences"),
    (dict(context=1), "a context of 1 tokens has no room"),
    (dict(policy="static"), r"say how long it is \(context=\)"),
    (dict(policy="static", context=41), "a context of 41 tokens does not fit into 40 cells"),
])
def test_what_cannot_work_is_said(given, said):
    with pytest.raises(LabError, match=said):
        scheduler(10, **given)


@pytest.mark.parametrize(("prompt", "most", "said"), [
    (0, 3, "a prompt of 0 tokens and 3 new ones; give at least 1 of each"),
    (3, 0, "a prompt of 3 tokens and 0 new ones"),
    (40, 1, "the prompt has 40 tokens, and prompt and answer together have room for 40; shorten it"),
    (30, 11, "after a prompt of 30 tokens there is room for 10 new ones, and 11 are asked for; ask for fewer"),
])
def test_what_could_never_be_served_is_refused_at_once(prompt, most, said):
    able, _ = scheduler(10)
    with pytest.raises(LabError, match=said):
        added(able, ([1] * prompt, most))
    assert able.idle and able.most(30) == 10


def test_what_just_fits_is_served_however_little_there_is():
    for policy in POLICIES:
        able, cells = scheduler(10, policy=policy, context=40)
        sequences = added(able, *[(text(i, 30), 10) for i in range(4)])
        serve(able, cells, MODEL)
        assert all(s.new == MODEL.alone(s.prompt, 10) for s in sequences)


def test_calls_out_of_order_are_said():
    able, cells = scheduler(10)
    a, = added(able, ([1, 2], 3))
    with pytest.raises(LabError, match="was added before"):
        able.add(a)
    with pytest.raises(LabError, match="fork it after add"):
        able.fork(Sequence([1], 1), 2)
    with pytest.raises(LabError, match="ask for 1 or more"):
        able.fork(a, 0)
    assert able.fork(a, 1) == []
    step = able.step()
    with pytest.raises(LabError, match="a step is still running"):
        able.step()
    with pytest.raises(LabError, match="not the one that runs"):
        able.done(Step([], []), {})
    with pytest.raises(LabError, match="neither a next token nor an end"):
        able.done(step, {})
    able.cancel(a)
    with pytest.raises(LabError, match="before it ends"):
        able.fork(a, 2)
    holder = Table()
    able.blocks.reserve(holder, 40)
    added(able, ([1, 2], 3))
    with pytest.raises(NoBlocks, match="held by tables that are none of this scheduler's"):
        able.step()


class Traffic(RuleBasedStateMachine):
    """Texts are added, cancelled and forked at any moment, also while their step runs, and some steps fail."""

    @initialize(seed=st.integers(0, 10**9), policy=st.sampled_from(["paged", "paged", "static", "alone"]), share=st.booleans())
    def start(self, seed, policy, share):
        rng = self.rng = random.Random(seed)        # sizes evenly, where hypothesis likes small ones, which fill no pool
        size, count, sequences = rng.randrange(2, 5), rng.randrange(8, 20), rng.randrange(1, 8)
        self.able, self.cells = scheduler(
            count, size, share, policy=policy, context=rng.randrange(count * size // 3, count * size + 1), sequences=sequences,
            ahead=rng.choice([0, 0, 1, 2]), rows=rng.randrange(sequences, 3 * sequences + 8))
        self.open, self.all, self.expected = None, [], {}

    @rule(texts=st.integers(1, 6))
    def add(self, texts):
        begin = self.rng.choices(range(2), k=self.rng.randrange(10))
        for _ in range(texts):
            prompt = [*begin, *self.rng.choices(range(2), k=self.rng.randrange(1, 8))]
            sequence = Sequence(prompt, self.rng.randrange(1, 20))
            if sequence.most > self.able.most(len(prompt)):
                with pytest.raises(LabError):
                    self.able.add(sequence)
                continue
            self.able.add(sequence)
            self.all.append(sequence)
            self.expected[sequence] = MODEL.alone(prompt, sequence.most)

    @precondition(lambda self: self.all)
    @rule()
    def cancel(self):
        self.able.cancel(self.rng.choice(self.all))

    @precondition(lambda self: self.open is None)
    @rule(steps=st.integers(1, 8))
    def run(self, steps):
        while steps and not self.able.idle:
            steps -= 1
            self.step()
            if self.open is not None:
                self.done(False)

    @precondition(lambda self: self.open is not None)
    @rule(n=st.integers(2, 4))
    def fork_in_a_step(self, n):
        """As for n answers: each fork of one whose next token is there gets one of its own."""
        sequence = self.rng.choice([*self.new])
        if sequence.state == "ended":
            return
        for fork in self.able.fork(sequence, n):
            token = self.new[fork] = self.rng.randrange(3)
            tokens = [*fork.tokens, token]
            left = fork.most - len(tokens) + len(fork.prompt)
            self.expected[fork] = tokens[len(fork.prompt):] + MODEL.alone(tokens, left)
            self.all.append(fork)

    @precondition(lambda self: self.open is None and any(s.state != "ended" for s in self.all))
    @rule(n=st.integers(2, 4))
    def fork_between_steps(self, n):
        sequence = self.rng.choice([s for s in self.all if s.state != "ended"])
        for fork in self.able.fork(sequence, n):
            self.expected[fork] = self.expected[sequence]
            self.all.append(fork)

    @precondition(lambda self: self.open is None and not self.able.idle)
    @rule()
    def begin_a_step(self):
        self.step()

    def step(self):
        before = self.able.running
        step = self.able.step()
        assert (step is None) == self.able.idle
        if step is not None:
            assert step.rows <= self.able.rows and len(step.pieces) <= self.able.sequences
            assert len({piece.sequence for piece in step.pieces}) == len(step.pieces)
            if self.able.policy != "static":
                served = {piece.sequence for piece in step.pieces}
                assert served and served.issuperset(before[:1])     # who came first always gets on, so all are served in time
            for line in (self.able.waiting, self.able.running):
                assert list(line) == sorted(line, key=lambda sequence: sequence.order)
            new = self.cells.compute(step, MODEL)
            if new:
                self.open, self.new = step, new
            else:
                self.able.done(step, {})

    @precondition(lambda self: self.open is not None)
    @rule(failed=st.sampled_from([True, *[False] * 9]))
    def done(self, failed):
        step, self.open = self.open, None
        if failed:
            ended = self.able.failed(step)
            for sequence in self.all:       # a fork that waits never got the token that was meant for it
                if sequence.state == "waiting" and sequence in self.new:
                    self.expected[sequence] = sequence.new + MODEL.alone(sequence.tokens, sequence.most - len(sequence.new))
        else:
            ended = self.able.done(step, self.new)
            assert all(s.new == self.expected[s] for s in ended)
        assert all(s.state == "ended" and s.table is None or self.able.policy == "static" for s in ended)

    @invariant()
    def blocks_add_up(self):
        if hasattr(self, "able"):
            held = self.able._batch or self.able.running
            check_blocks(self.able.blocks, [sequence.table for sequence in held])
            assert len(self.able.running) <= self.able.sequences
            owners = self.able.owners()
            assert [o == -1 for o in owners].count(True) == self.able.blocks.usage().cached

    @invariant()
    def nobody_writes_anything_else(self):
        for sequence in getattr(self, "all", []):
            assert self.expected[sequence][:len(sequence.new)] == sequence.new

    def teardown(self):
        if hasattr(self, "able"):
            if self.open is not None:
                self.done(False)
            serve(self.able, self.cells, MODEL)
            assert all(s.state == "ended" and s.table is None for s in self.all)


Traffic.TestCase.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
test_whatever_comes_and_goes = Traffic.TestCase
