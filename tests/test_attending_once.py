"""One token's attention over packed pages gives what `attention` gives, and lays down the bytes that `Pages` does."""

import pytest
import torch

from llmlab.kernels import attending_once
from llmlab.kernels.attending import attention
from llmlab.kernels.attending_once import attend_once, encoded, lay, place, power, side
from llmlab.kernels.pages import PAGE, Pages
from llmlab.runtime.compiling import package, settle

TYPES = ("f32", "f16", "bf16", "fp8", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
HEADS, DIM, BEFORE = 2, 64, 299
WAYS = {"plain": {}, "capped in a window": {"softcap": 5.0, "window": 100}, "sinks": {"sinks": True}}


def filled(types, tokens=BEFORE, heads=HEADS, dim=DIM, pages=2):
    """Pages of keys and of values of so many tokens, their positions, and the key and value of one more."""
    seeded = torch.Generator().manual_seed(3)
    new = torch.randn(2, 1, heads, tokens + 1, dim, generator=seeded)
    both = [Pages(kind, 1, heads, dim, pages * PAGE) for kind in types]
    for one, x in zip(both, new, strict=True):
        one.write(torch.arange(tokens), x[:, :, :tokens])
    positions = torch.full((pages * PAGE,), -1, dtype=torch.int32)
    positions[:tokens] = torch.arange(tokens)
    return both, positions, new[:, 0, :, tokens].contiguous()


def step(types, scale, given, settle=lambda value: value):
    """Attention of a token and the laying down of it, of flat tensors."""
    known = [Pages(kind, 1, HEADS, DIM, PAGE).type for kind in types]

    def once(q, new, positions, at, cell, shifts, *tensors):
        left = iter(tensors)
        sides = [attending_once.Side.of(kind, left) for kind in known]
        laid = [encoded(x, kind, settle) for x, kind in zip(new.unbind(), known, strict=True)]
        found = attend_once(q, tuple(one.numbers for one in laid), *sides, positions, at, shifts, scale=scale, settle=settle,
                            **given)
        for one, of in zip(laid, sides, strict=True):
            lay(one, of, cell)
        return (found,)

    return once


def arguments(q, new, both, positions, at):
    count = both[0].pages
    return [q, new, positions.view(-1, PAGE).view(torch.float32), torch.tensor([at], dtype=torch.int32), place(at),
            attending_once.shifts(), *(tensor for pages in both for tensor in side(pages, count).tensors)]


def expected(q, new, types, given):
    both, positions, _ = filled(types)
    for pages, x in zip(both, new, strict=True):
        pages.write(torch.tensor([BEFORE]), x[None, :, None])
    positions[BEFORE] = BEFORE
    found = attention(q.view(1, -1, 1, DIM), *both, positions[None], torch.tensor([[BEFORE]]), scale=DIM ** -0.5, **given)
    return both, found.view(q.shape)


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_found_and_laid_down(kind):
    types = kind, "q8_0" if kind != "q8_0" else "q5_1"
    for group in (1, 2, 3, 4, 5, 8):
        for way in WAYS.values():
            given = {**way, **({"sinks": torch.linspace(-1, 3, HEADS * group)} if "sinks" in way else {})}
            q = torch.randn(HEADS, group, DIM, generator=torch.Generator().manual_seed(group)) * 2
            for order in (types, types[::-1]):
                both, positions, new = filled(order)
                found, = step(order, DIM ** -0.5, given)(*arguments(q, new, both, positions, BEFORE))
                after, wanted = expected(q, new, order, given)
                assert (found - wanted).abs().max() < 1e-5
                for pages, other in zip(both, after, strict=True):
                    assert all(torch.equal(one.view(torch.uint8), two.view(torch.uint8))
                               for one, two in zip(pages.tensors, other.tensors, strict=True))


def test_the_first_token_finds_its_own_value():
    both, positions, new = filled(("q8_0", "q4_0"), tokens=0)
    found, = step(("q8_0", "q4_0"), 1.0, {})(*arguments(torch.randn(HEADS, 3, DIM), new, both, positions, 0))
    assert torch.equal(found, both[1].numbers(0, 1)[0, 0, :, None, :, 0].expand(-1, 3, -1))


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in ("f32", "f16", "bf16")])
def test_bytes_are_those_of_pages(kind):
    """Also where halves are met exactly, blocks are zero, two numbers are equally far from it, or they are tiny or large."""
    seeded = torch.Generator().manual_seed(5)
    x = torch.randn(6, PAGE, DIM, generator=seeded) * 10.0 ** torch.arange(-38, 4, 7.0)[:, None, None]
    x[3] = (torch.randn(PAGE, DIM, generator=seeded) * 9).round() / 4
    x[4, ::3], x[4, 1::3, ::2] = 0, -0.0
    for numbers in x:
        pages = Pages(kind, 1, 1, DIM, PAGE)
        pages.write(torch.arange(PAGE), numbers[None, None])
        laid = encoded(numbers, pages.type)
        parts = [*(half[..., None].view(torch.uint8) for half in laid.halves), laid.bytes.view(torch.uint8)]
        found = torch.cat(parts, -1).flatten(1)
        # codes of blocks whose scale is none are nobody's business
        counts = torch.cat([*(half[..., None] for half in laid.halves), laid.halves[0][..., None]], -1).ne(0).any(-1).all(-1) \
            if laid.halves else torch.ones(PAGE, dtype=torch.bool)
        assert torch.equal(found[counts], pages.blocks(torch.arange(PAGE))[0, 0][counts])
        assert torch.allclose(laid.numbers, pages.numbers()[0, 0, 0].T, rtol=1e-6, atol=0)


def test_power():
    x = torch.linspace(-126, 0, 100_001)
    assert (power(x).double() / 2.0 ** x.double() - 1).abs().max() < 3e-7


def test_compiled_it_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    types, given = ("q5_0", "iq4_nl"), {"window": 280, "softcap": 20.0}
    q = torch.randn(HEADS, 3, DIM, generator=torch.Generator().manual_seed(1)) * 3
    both, positions, new = filled(types)
    ready = arguments(q, new, both, positions, BEFORE)
    dynamic = {2: {0: "pages"}, **{i: {0: "pages"} for i in range(6, len(ready))}}
    # what it is traced with must not be seen to share memory
    made = package(step(types, DIM ** -0.5, given, settle), [t.clone() for t in ready], "once", [attending_once, step], dynamic)
    after, wanted = expected(q, new, types, given)
    assert (made(*ready)[0] - wanted).abs().max() < 1e-5
    for pages, other in zip(both, after, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(pages.tensors, other.tensors, strict=True))
    # more pages than it was traced with, two of them with nothing in them
    grown, positions, _ = filled(types, pages=4)
    assert (made(*arguments(q, new, grown, positions, BEFORE))[0] - wanted).abs().max() < 1e-5
