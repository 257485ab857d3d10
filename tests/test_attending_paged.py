"""Attention through block tables beside the plainest attention on the same cells, and the same bits whoever else is there."""

import pytest
import torch
from paged_texts import DIM, SIZE, WAYS, Texts, asked, pool, random, wanted

from llmlab.kernels.attending_paged import RUN, Side, attend_each, attend_runs, flat, runs
from llmlab.kernels.pages import Pages
from llmlab.memory import CACHE_TYPES

TYPES = list(CACHE_TYPES)


def ones(texts, way, group, kv_heads=3, compiled=False, dim=DIM):
    """What the last token of each text finds, alone and beside the others, and what it should."""
    heads, scale, given = kv_heads * group, dim ** -0.5, asked(way, kv_heads * group)
    q = random(len(texts.lengths), heads, dim, seed=group) * 2
    window = given.pop("window", 0)

    def found(some):
        looked = runs([texts.blocks[i] for i in some], [texts.lengths[i] - 1 for i in some], texts.size, window)
        if not compiled:
            return attend_runs(q[some], *texts.both, looked, scale=scale, **given)
        mine = torch.nn.functional.pad(q[some], (0, 0, 0, 0, 0, max(0, 2 - len(some))))
        sides = [Side.of(one.type, iter(flat(one))) for one in texts.both]
        return attend_each(mine, *sides, looked, scale=scale, **given)[:len(some)]

    everyone = range(len(texts.lengths))
    true = torch.cat([wanted(texts, i, q[i:i + 1], texts.lengths[i] - 1, scale, window, **given) for i in everyone])
    return found(list(everyone)), torch.cat([found([i]) for i in everyone]), true


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("compiled", [False, True])
def test_tokens_of_many_texts(kind, way, compiled):
    texts = Texts(kind)
    for group in (3, 5) if compiled else (1, 3, 4, 5):
        together, alone, true = ones(texts, way, group, compiled=compiled)
        assert (together.double() - true).abs().max() < 2e-6 * true.abs().max()
        if not compiled:
            assert torch.equal(together, alone)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_for_keys_and_for_values(kind):
    other = "q8_0" if kind != "q8_0" else "q5_1"
    for kinds in ((kind, other), (other, kind)):
        texts = Texts(kinds)
        for compiled in (False, True):
            together, _, true = ones(texts, "plain", 3, compiled=compiled)
            assert (together.double() - true).abs().max() < 2e-6 * true.abs().max()


def test_work_grows_with_the_blocks_in_use():
    tables = [list(range(100)), [100], [101, 102]]
    looked = runs(tables, [1599, 3, 20], SIZE)
    assert len(looked.owner) == 25 + 1 + 1 + 1      # the longest has 25 runs, the others one each, and one is spare
    near = runs(tables, [1599, 3, 20], SIZE, window=30)
    assert len(near.owner) == 4
    assert (near.hidden == 0).sum() == 30 + 4 + 21
    assert (looked.hidden == 0).sum() == 1600 + 4 + 21
    assert looked.table.shape == (28, RUN)


@pytest.mark.parametrize("kind", TYPES)
def test_a_pool_holds_what_pages_hold(kind):
    x = random(2, 40, DIM)
    pages = Pages(kind, 1, 2, DIM, 40)
    pages.write(torch.arange(40), x[None])
    for keys, narrow in ((True, True), (False, True), (False, False)):
        held = pool(kind, keys, 5, kv_heads=2, narrow=narrow)
        held.write(torch.tensor([4, 1, 3]).repeat_interleave(SIZE)[:40], torch.arange(SIZE).repeat(3)[:40], x)
        found = held.numbers(torch.tensor([4, 1, 3]))
        found = found.permute(1, 0, 3, 2) if keys else found.transpose(0, 1)
        assert torch.equal(found.flatten(1, 2)[:, :40], pages.numbers()[0].permute(1, 0, 3, 2).flatten(1, 2)[:, :40])
        assert held.bytes == 5 * SIZE * pages.bytes // pages.cells


@pytest.mark.parametrize("kind", ["f32", "f16", "fp8", "q8_0", "q4_1"])
def test_what_is_no_number_stays_with_its_text(kind):
    held = pool(kind, True, 2)
    x = torch.full((3, 1, DIM), float("nan"))
    x[0], x[1] = float("inf"), -1e30
    held.write(torch.tensor([1]), torch.tensor([5]), x)
    assert held.numbers(torch.tensor([0, 1])).isfinite().all()
