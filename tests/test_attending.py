"""Attention on packed pages beside the plainest attention on the unpacked cache: within 1e-5 of it, whatever is asked."""

from dataclasses import dataclass

import pytest
import torch

from llmlab.kernels import Pages, attending, attention, scratch
from llmlab.kernels.attending import reference_attention
from llmlab.memory import CACHE_TYPES

TYPES = list(CACHE_TYPES)
LIMIT = 1e-5


@dataclass
class Cache:
    """Keys, values and positions, and the first two as numbers: [batch, heads, cells, head_dim]."""

    keys: Pages
    values: Pages
    positions: torch.Tensor

    def numbers(self) -> list[torch.Tensor]:
        return [pages.numbers().permute(0, 2, 1, 4, 3).flatten(2, 3) for pages in (self.keys, self.values)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cache(kinds: str | tuple[str, str], cells: int, *, batch: int = 1, heads: int = 2, dims: tuple[int, int] = (64, 64),
          room: int = 0) -> Cache:
    """Positions 0 to cells - 1 in order."""
    k, v = (kinds, kinds) if isinstance(kinds, str) else kinds
    keys, values = Pages(k, batch, heads, dims[0], room or cells), Pages(v, batch, heads, dims[1], room or cells)
    at = torch.arange(cells)
    keys.write(at, random(batch, heads, cells, dims[0], seed=1))
    values.write(at, random(batch, heads, cells, dims[1], seed=2) + 0.3)
    positions = torch.full((1, keys.cells), -1, dtype=torch.int32)
    positions[:, :cells] = at
    return Cache(keys, values, positions)


def looks(positions: torch.Tensor, at: torch.Tensor, window: int = 0) -> torch.Tensor:
    """bool [batch, 1, n, cells]"""
    cells, own = positions[:, None, None].long(), at[:, None, :, None].long()
    found = (cells >= 0) & (cells <= own)
    return found & (cells > own - window) if window else found


def off(found: torch.Tensor, true: torch.Tensor) -> float:
    """The largest error beside the largest number there is."""
    assert found.shape == true.shape and found.dtype == torch.float32
    return float((found.double() - true).abs().max() / true.abs().max().clamp(min=1e-30))


def check(held: Cache, q: torch.Tensor, at: torch.Tensor, *, window: int = 0, mask: torch.Tensor | None = None,
          **given) -> None:
    keys, values = held.numbers()
    found = attention(q, held.keys, held.values, held.positions, at, window=window, mask=mask, **given)
    where = looks(held.positions, at, window) if mask is None else mask
    assert off(found, reference_attention(q, keys, values, where, **given)) < LIMIT


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_one_query_and_some(name, group):
    held = cache(name, 700, room=1024)
    for at in ([699], [300], [0], [650, 651, 699]):
        check(held, random(1, 2 * group, len(at), 64, seed=5), torch.tensor([at]), scale=0.125)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256, 512])
def test_widths_of_heads(head_dim):
    for name in TYPES if head_dim % 32 == 0 else ("f32", "f16", "bf16", "fp8"):
        held = cache(name, 300, heads=1, dims=(head_dim, head_dim))
        check(held, random(1, 4, 1, head_dim, seed=5), torch.tensor([[299]]), scale=head_dim ** -0.5)
        check(held, random(1, 4, 9, head_dim, seed=5), torch.arange(291, 300)[None], scale=head_dim ** -0.5)


@pytest.mark.parametrize(("k", "v"), [("q8_0", "q4_0"), ("f16", "q8_0"), ("q5_1", "fp8"), ("iq4_nl", "q4_1"), ("q5_0", "bf16")])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (64, 96), (576, 512)])
def test_keys_and_values_of_other_types_and_widths(k, v, dims):
    held = cache((k, v), 400, heads=1, dims=dims)
    for n in (1, 40):
        check(held, random(1, 8, n, dims[0], seed=5), torch.arange(400 - n, 400)[None], scale=dims[0] ** -0.5)


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q5_1", "f16"])
@pytest.mark.parametrize("window", [1, 5, 100, 256, 5000])
def test_windows(name, window):
    held = cache(name, 900)
    for at in ([899], [10], list(range(500, 560)), [0, 899]):
        check(held, random(1, 4, len(at), 64, seed=5), torch.tensor([at]), window=window, scale=0.125)


@pytest.mark.parametrize("name", ["q8_0", "q4_1", "iq4_nl", "f16"])
def test_rings_and_holes(name):
    """Cells in any order, later positions over earlier ones, and cells that hold nothing."""
    held = cache(name, 768)
    order = torch.randperm(768, generator=torch.Generator().manual_seed(1)) + 4000
    order[100:130] = -1
    order[256:512] = -1
    held.positions = order[None].int()
    for window in (0, 300):
        check(held, random(1, 4, 1, 64, seed=5), torch.tensor([[4900]]), window=window, scale=0.125)
        check(held, random(1, 4, 50, 64, seed=6), torch.arange(4300, 4350)[None], window=window, scale=0.125)


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "bf16"])
@pytest.mark.parametrize("n", [1, 33])
def test_sinks_and_soft_capping(name, n):
    held, q, at = cache(name, 600), 3 * random(1, 6, n, 64, seed=5), torch.arange(600 - n, 600)[None]
    check(held, q, at, scale=0.125, softcap=2.0)
    check(held, q, at, scale=0.125, sinks=random(6, seed=9) * 5)
    check(held, q, at, scale=0.125, sinks=random(6, seed=9) * 5, softcap=3.0, window=70)


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("n", [1, 20])
def test_masks_by_hand(heads, n):
    held = cache("q8_0", 500, batch=2)
    mask = torch.rand(2, heads, n, 512, generator=torch.Generator().manual_seed(3)) < 0.3
    mask[..., 500:] = False
    mask[1, :, 0] = False       # looks nowhere
    check(held, random(2, 8, n, 64, seed=5), torch.zeros(1, n, dtype=torch.long), mask=mask, scale=0.125)


@pytest.mark.parametrize("name", ["q8_0", "q5_0", "f16"])
@pytest.mark.parametrize("n", [1, 17])
def test_a_batch_of_different_lengths(name, n):
    held = cache(name, 800, batch=3)
    lengths = torch.tensor([[800], [40], [300]])
    held.positions = torch.where(torch.arange(1024) < lengths, torch.arange(1024), -1).int()
    at = lengths - n + torch.arange(n)
    check(held, random(3, 4, n, 64, seed=5), at, scale=0.125)
    check(held, random(3, 4, n, 64, seed=5), at, scale=0.125, window=64)
    left = torch.arange(1024) - (800 - lengths)      # padded on the left: the texts end in the same cell
    held.positions = torch.where((left >= 0) & (torch.arange(1024) < 800), left, -1).int()
    check(held, random(3, 4, n, 64, seed=5), at, scale=0.125)


def test_queries_that_look_nowhere_find_zeros():
    held = cache("q4_0", 300)
    q, at = random(1, 4, 3, 64), torch.tensor([[-1, 5, -1]])
    for given in ({}, {"sinks": torch.ones(4)}, {"window": 9}):
        found = attention(q, held.keys, held.values, held.positions, at, **given)
        assert not found[:, :, [0, 2]].any() and found[:, :, 1].all()
        held_empty = Cache(held.keys, held.values, torch.full_like(held.positions, -1))
        found = attention(q, held.keys, held.values, held_empty.positions, at, **given)
        assert found.shape == (1, 4, 3, 64) and not found.any()
        one = attention(q[:, :, :1], held.keys, held.values, held_empty.positions, at[:, :1], **given)
        assert not one.any()


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "f16"])
def test_scores_that_are_far_apart(name):
    held = cache(name, 600)
    check(held, 300 * random(1, 4, 1, 64, seed=5), torch.tensor([[599]]), scale=1.0)
    check(held, 300 * random(1, 4, 5, 64, seed=5), torch.arange(595, 600)[None], scale=1.0)


@pytest.mark.parametrize("name", ["q8_0", "q5_1", "f16"])
@pytest.mark.parametrize("window", [0, 90])
def test_a_text_in_chunks_is_the_text_at_once(name, window):
    x = random(3, 1, 2, 700, 64)
    whole, parts = (Cache(*(Pages(name, 1, 2, 64, 768) for _ in range(2)), torch.full((1, 768), -1, dtype=torch.int32))
                    for _ in range(2))

    def read(held: Cache, first: int, last: int) -> torch.Tensor:
        at = torch.arange(first, last)
        held.keys.write(at, x[1, :, :, first:last])
        held.values.write(at, x[2, :, :, first:last])
        held.positions[:, at] = at.int()
        return attention(x[0, :, :, first:last], held.keys, held.values, held.positions, at[None], scale=0.125, window=window)

    found = torch.cat([read(parts, a, b) for a, b in ((0, 200), (200, 201), (201, 600), (600, 700))], 2)
    assert off(found, read(whole, 0, 700).double()) < 2e-6


@pytest.mark.parametrize("kinds", ["q8_0", "q5_1", "fp8", ("q8_0", "f16"), ("f16", "q4_0")])
@pytest.mark.parametrize("window", [0, 333])
def test_many_queries_together_or_page_by_page(monkeypatch, kinds, window):
    """Two ways of the same: pages unpacked once for all queries, and once for some rows of them. Positions in no order."""
    held = cache(kinds, 1024, batch=2)
    shuffled = torch.randperm(1024, generator=torch.Generator().manual_seed(1))
    held.positions = torch.stack([torch.arange(1024), shuffled]).int()
    held.positions[:, 700:710] = -1
    at = torch.stack([torch.arange(600, 790), torch.arange(400, 590).flip(0)])
    q, near = random(2, 6, 190, 64, seed=5), (random(2, 2, 9, 64, seed=3), random(2, 2, 9, 64, seed=4))
    beside = (*near, torch.tensor([[0, 1, 2, 790, 600, 650, 2000, -1, 5]], dtype=torch.int32))
    sinks = random(6, seed=9)
    check(held, q, at, window=window, scale=0.125, sinks=sinks)
    given = {"window": window, "scale": 0.125, "sinks": sinks, "beside": beside}
    together = attention(q, held.keys, held.values, held.positions, at, **given)
    assert attending.suits(q, held.keys, held.values)
    monkeypatch.setattr(attending, "suits", lambda *_: False)
    assert off(attention(q, held.keys, held.values, held.positions, at, **given), together.double()) < LIMIT


@pytest.mark.parametrize("n", [1, 30])
def test_cells_in_full_precision_beside_the_pages(n):
    held, near = cache("q4_0", 500), 40
    keys, values = random(1, 2, near, 64, seed=11).half(), random(1, 2, near, 64, seed=12).half()
    places = torch.arange(500, 500 + near, dtype=torch.int32)[None]
    places[0, 7] = -1
    q, at = random(1, 4, n, 64, seed=5), torch.arange(540 - n, 540)[None]
    for window in (0, 20, 100):
        found = attention(q, held.keys, held.values, held.positions, at, scale=0.125, window=window,
                          beside=(keys, values, places))
        all_keys, all_values = (torch.cat([a, b.float()], 2) for a, b in zip(held.numbers(), (keys, values), strict=True))
        where = looks(torch.cat([held.positions, places], 1), at, window)
        assert off(found, reference_attention(q, all_keys, all_values, where, 0.125)) < LIMIT
        # said by hand, for pages and for what lies beside them
        by_hand = attention(q, held.keys, held.values, held.positions, at, scale=0.125, mask=where[..., :512],
                            beside=(keys, values, where[:, 0, :, 512:]))
        assert off(by_hand, found.double()) < LIMIT


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_queries_of_other_dtypes(dtype):
    held, q = cache("q8_0", 300), random(1, 4, 2, 64, seed=5).to(dtype)
    check(held, q, torch.tensor([[298, 299]]), scale=0.125)


def test_inference_mode_and_strided_queries():
    held = cache("q4_1", 300)
    q = random(1, 3, 8, 64, seed=5).transpose(1, 2)      # [1, 8, 3, 64] as a decoder has it
    with torch.inference_mode():
        inside = attention(q, held.keys, held.values, held.positions, torch.tensor([[100, 200, 299]]), scale=0.125)
    outside = attention(q, held.keys, held.values, held.positions, torch.tensor([[100, 200, 299]]), scale=0.125)
    assert torch.equal(inside, outside)
    check(held, q, torch.tensor([[100, 200, 299]]), scale=0.125)


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "f16"])
@pytest.mark.parametrize("n", [1, 64])
def test_memory_beside_the_result_is_bounded(name, n):
    """The most that is held at once does not grow with the cells, but for a few bytes of each."""
    def most(cells: int) -> int:
        held = cache(name, cells, heads=4, dims=(64, 64))
        q, at = random(1, 16, n, 64), torch.arange(cells - n, cells)[None]
        scratch.release()
        attention(q, held.keys, held.values, held.positions, at)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            attention(q, held.keys, held.values, held.positions, at)
        now = peak = 0
        events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        assert peak
        return peak + scratch.held()

    short, long = most(2048), most(8192)
    unpacked = 2 * 8192 * 4 * 64 * 4
    print(f"{name} {n}: {short / 1e6:.1f} MB, {long / 1e6:.1f} MB; unpacked it would be {unpacked / 1e6:.1f} MB")
    # Of one query all scores are held (16 heads x 4 bytes a cell), and who looks where; of many some queries' at a time.
    assert long < 1.2 * short + 8192 * (16 * 4 + 16)
    assert long < unpacked


@pytest.mark.gpu
@pytest.mark.parametrize("name", TYPES)
def test_on_a_card(name):
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    held = cache(name, 700, room=1024)
    moved = Cache(*(Pages(name, 1, 2, 64, 1024, "cuda") for _ in range(2)), held.positions.cuda())
    at = torch.arange(1024)
    moved.keys.set_blocks(at.cuda(), held.keys.blocks(at).cuda())
    moved.values.set_blocks(at.cuda(), held.values.blocks(at).cuda())
    for n in (1, 40):
        q, places = random(1, 8, n, 64, seed=5), torch.arange(700 - n, 700)[None]
        found = attention(q.cuda(), moved.keys, moved.values, moved.positions, places.cuda(), scale=0.125)
        true = reference_attention(q, *held.numbers(), looks(held.positions, places), 0.125)
        assert off(found.cpu(), true) < LIMIT
