"""The paged cache: every row of a mixed step finds what its text's own plain cache gives, whatever else is in the step."""

import pytest
import torch

from llmlab import shapes as model_shapes
from llmlab.errors import LabError, UnknownName
from llmlab.kernels.pages import Pages
from llmlab.memory import CACHE_TYPES, cache_bytes
from llmlab.runtime import layers, paged
from llmlab.runtime.layers import LayerShape
from llmlab.runtime.paged import PagedCache, Part, block_bytes

SIZE = 16
PLAIN = LayerShape(heads=6, kv_heads=2, head_dim=64, turned=64, pairs=False, scale=0.125, dtype=torch.float32)
SHAPES = {
    "plain": PLAIN,
    "window": LayerShape(6, 2, 64, 64, False, 0.125, torch.float32, window=24),
    "capped": LayerShape(6, 2, 64, 64, False, 0.125, torch.float32, softcap=4.0, window=70),
    "one kv head": LayerShape(4, 1, 32, 32, False, 0.2, torch.float32),
    "as many kv heads": LayerShape(3, 3, 16, 16, False, 0.25, torch.float32),
}
# What each text has before the step, and how many tokens it reads in it.
STEP = ((0, 5), (40, 1), (100, 1), (16, 1), (30, 70), (0, 1), (128, 3), (260, 1))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tables(lengths, seed=0):
    """Blocks anywhere for texts of these lengths, and how many there are."""
    needed = [-(-length // SIZE) for length in lengths]
    order = torch.randperm(sum(needed) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
    return [[order.pop() for _ in range(count)] for count in needed], sum(needed) + 2


def rounded(x, kind):
    """x [kv_heads, n, head_dim] as a cache of that type holds it."""
    pages = Pages(kind, 1, x.shape[0], x.shape[2], x.shape[1])
    pages.write(torch.arange(x.shape[1]), x[None])
    return pages.numbers()[0].permute(1, 0, 3, 2).flatten(1, 2)[:, :x.shape[1]]


def plainly(q, new, first, shape, sinks, kinds):
    """What the tokens of a text from `first` on find by `layers`' own attention over [2, kv_heads, all, head_dim]."""
    keys, values = (rounded(x, kind) for x, kind in zip(new, kinds, strict=True))
    q = q.mul(shape.scale).view(len(q), shape.kv_heads, -1, shape.head_dim)
    place, cells = torch.arange(first, first + len(q))[:, None], torch.arange(keys.shape[1])
    mask = (cells <= place) & (cells > place - shape.window if shape.window else True)
    return layers.many(q, keys, values, shape, mask, sinks).reshape(-1, shape.heads, shape.head_dim)


class Run:
    """Texts of STEP read into a cache: first what is before the step, then the step."""

    def __init__(self, shape, kv="f32", sinks=None, compile=False):
        self.shape, self.sinks = shape, sinks
        self.news = [random(2, shape.kv_heads, first + count, shape.head_dim, seed=7 + i)
                     for i, (first, count) in enumerate(STEP)]
        self.qs = [random(count, shape.heads, shape.head_dim, seed=70 + i) * 3 for i, (_, count) in enumerate(STEP)]
        self.tables, blocks = tables([sum(one) for one in STEP])
        self.cache = PagedCache([shape], blocks, SIZE, kv, compile=compile, sinks=sinks is not None)
        for i, (first, _) in enumerate(STEP):
            if first:
                self.read([Part(self.tables[i], 0, first)], self.news[i][:, :, :first], None)

    def read(self, parts, new, q):
        attend = self.cache.remember(0, self.cache.look(parts), self.shape, self.sinks)(new)
        return attend(q) if q is not None else None

    def step(self, some):
        parts = [Part(self.tables[i], *STEP[i]) for i in some]
        found = self.read(parts, torch.cat([self.news[i][:, :, STEP[i][0]:] for i in some], 2),
                          torch.cat([self.qs[i] for i in some]))
        return dict(zip(some, found.split([STEP[i][1] for i in some]), strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_a_mixed_step_is_what_each_text_finds_alone(name):
    shape = SHAPES[name]
    for sinks in (None, torch.linspace(-1, 2, shape.heads)):
        run = Run(shape, sinks=sinks)
        together = run.step(range(len(STEP)))
        turned = run.step([7, 1, 4, 0, 6, 2, 3, 5])
        for i, (first, _) in enumerate(STEP):
            assert torch.equal(together[i], run.step([i])[i]) and torch.equal(together[i], turned[i])
            wanted = plainly(run.qs[i], run.news[i], first, shape, sinks, ("f32", "f32"))
            assert (together[i] - wanted).abs().max() < 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("kv", ["f16", "bf16", "q8_0", "q4_0", ("q8_0", "q5_1"), ("f16", "iq4_nl")])
def test_narrow_caches_hold_what_is_rounded_once(kv):
    run = Run(PLAIN, kv)
    together, kinds = run.step(range(len(STEP))), (kv, kv) if isinstance(kv, str) else kv
    for i, (first, _) in enumerate(STEP):
        wanted = plainly(run.qs[i], run.news[i], first, PLAIN, None, kinds)
        assert (together[i] - wanted).abs().max() < 3e-6 * wanted.abs().max()
        assert torch.equal(together[i], run.step([i])[i])


def test_one_token_is_what_a_plain_cache_of_one_text_gives():
    run = Run(PLAIN)
    for i, (_, count) in enumerate(STEP):
        if count == 1:
            q = run.qs[i].mul(PLAIN.scale).view(PLAIN.kv_heads, -1, PLAIN.head_dim)
            wanted = layers.one(q, *run.news[i], PLAIN, None, None).view(1, PLAIN.heads, -1)
            assert (run.step([i])[i] - wanted).abs().max() < 2e-6 * wanted.abs().max()


@pytest.mark.parametrize(("kv", "name", "sinks"), [
    ("f32", "plain", None), (("q8_0", "q5_1"), "capped", torch.linspace(-1, 2, 6))], ids=["f32", "q8_0 and q5_1"])
def test_compiled(kv, name, sinks):
    shape = SHAPES[name]
    run = Run(shape, kv, sinks, compile=True)
    assert run.cache.why == "one-token queries look by compiled code"
    together, turned, kinds = run.step(range(len(STEP))), run.step([7, 1, 4, 0, 6, 2, 3, 5]), (kv,) * 2 if kv == "f32" else kv
    for i, (first, _) in enumerate(STEP):
        wanted = plainly(run.qs[i], run.news[i], first, shape, sinks, kinds)
        assert (together[i] - wanted).abs().max() < 3e-6 * wanted.abs().max()
        assert torch.equal(together[i], turned[i]) and torch.equal(together[i], run.step([i])[i])


def test_a_prompt_comes_out_the_same_however_it_is_cut():
    blocks, many = tables([130])
    new, q, found = random(2, 2, 130, 64, seed=1), random(130, 6, 64, seed=2), []
    for stops in ((130,), (1, 2, 65, 129, 130), (64, 130)):
        cache, parts = PagedCache([PLAIN], many, SIZE), []
        for first, stop in zip((0, *stops), stops, strict=False):
            part = Part(blocks[0], first, stop - first, prompt=True)
            attend = cache.remember(0, cache.look([part]), PLAIN)(new[:, :, first:stop])
            parts.append(attend(q[first:stop]))
        found.append(torch.cat(parts))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_long_texts_go_apart_from_short_ones():
    assert paged._groups([3, 1, 2]) == [[0, 1, 2]] and paged._groups([]) == []
    assert paged._groups([900, *[5] * 20]) == [[*range(1, 21)], [0]]
    counts = [1, 2, 70, 3000, 4, *[1] * 40]
    groups = paged._groups(counts)
    assert sorted(at for group in groups for at in group) == list(range(45)) and len(groups) > 1
    for group in groups:
        assert max(counts[at] for at in group) * len(group) <= paged._UNEVEN * sum(counts[at] for at in group)
    lengths = [2500, *[9] * 20]
    blocks, many = tables(lengths)
    cache = PagedCache([PLAIN], many, SIZE)
    news = [random(2, 2, length, 64, seed=i) for i, length in enumerate(lengths)]
    for new, some in zip(news, blocks, strict=True):
        cache.remember(0, cache.look([Part(some, 0, new.shape[2] - 1)]), PLAIN)(new[:, :, :-1])
    q, parts = random(21, 6, 64), [Part(some, length - 1, 1) for some, length in zip(blocks, lengths, strict=True)]
    look = cache.look(parts)
    assert len(look.alike()) == 2
    found = cache.remember(0, look, PLAIN)(torch.cat([new[:, :, -1:] for new in news], 2))(q)
    for i, part in enumerate(parts):
        assert torch.equal(found[i], cache.remember(0, cache.look([part]), PLAIN)(news[i][:, :, -1:])(q[i:i + 1])[0])


def test_texts_share_blocks():
    run = Run(PLAIN)
    first = run.step([2])[2]
    other = Part(run.tables[2][:-1] + [run.tables[1][-1]], *STEP[2])      # the same beginning, its last block its own
    run.cache.copy([(run.tables[2][-1], run.tables[1][-1])])
    new = run.news[2][:, :, -1:].repeat(1, 1, 2, 1)
    found = run.read([Part(run.tables[2], *STEP[2]), other], new, run.qs[2].repeat(2, 1, 1))
    assert torch.equal(found[0], first[0]) and torch.equal(found[1], first[0])


def test_copies_reach_all_layers_and_read_before_they_write():
    kinds = [PLAIN, SHAPES["window"], SHAPES["one kv head"]]
    for kv in ("f32", "q4_0"):
        cache = PagedCache(kinds, 6, SIZE, kv)
        for pools in cache.layers:
            for pool in pools:
                pool.write(torch.arange(6).repeat_interleave(SIZE), torch.arange(SIZE).repeat(6),
                           random(pool.heads, 6 * SIZE, pool.head_dim))
        before = [[t.clone() for t in pool.tensors] for pools in cache.layers for pool in pools]
        cache.copy([(0, 3), (3, 5)])
        cache.copy([])
        after = [pool.tensors for pools in cache.layers for pool in pools]
        for old, new in zip(before, after, strict=True):
            for one, other in zip(old, new, strict=True):
                assert torch.equal(other, one[torch.tensor([0, 1, 2, 0, 4, 3])])


@pytest.mark.parametrize("kv", [*CACHE_TYPES, ("q8_0", "q4_0")])
def test_bytes_are_exact(kv):
    shapes = [PLAIN, PLAIN, SHAPES["one kv head"]]
    cache = PagedCache(shapes, 7, SIZE, kv)
    held = {t.data_ptr(): t.nbytes for pools in cache.layers for pool in pools for t in pool.tensors}
    assert cache.bytes == sum(held.values()) == 7 * cache.block_bytes
    assert cache.block_bytes == block_bytes(shapes, SIZE, kv)


@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0", "q4_0", "q5_1", "iq4_nl"])
def test_as_many_bytes_as_the_model_of_memory_says(kv):
    spec = model_shapes.model_spec("smollm2-135m")
    shapes = [LayerShape(9, layer.kv_heads, layer.key_dim, 64, True, 0.125, torch.float32) for layer in spec.layers]
    cells = 512
    assert block_bytes(shapes, SIZE, kv) * cells // SIZE == cache_bytes(spec, cells, kv).kv


def test_what_cannot_be_is_said():
    with pytest.raises(UnknownName):
        PagedCache([PLAIN], 4, kv="q9_0")
    with pytest.raises(LabError, match="multiple of 32 numbers"):
        PagedCache([SHAPES["as many kv heads"]], 4, kv="q8_0")
    with pytest.raises(LabError, match="multiple of 4 cells"):
        PagedCache([PLAIN], 4, 6, kv="q8_0")
    with pytest.raises(LabError, match="blocks is 0"):
        PagedCache([PLAIN], 0)
    cache = PagedCache([PLAIN], 4, SIZE)
    for parts, said in (([Part([0], 0, 17)], "17 tokens"), ([Part([0], 16, 1)], "do not fit"),
                        ([Part([4], 0, 1)], "no block 4"), ([Part([-1], 0, 1)], "no block -1"),
                        ([Part([0], 0, 0)], "0 tokens"), ([], "nothing to read")):
        with pytest.raises(LabError, match=said):
            cache.look(parts)
    with pytest.raises(LabError, match="no block 9"):
        cache.copy([(0, 9)])
