"""A layer's cache: what each token finds in it is what the formula says of what was laid down, whatever way it was read."""

import pytest
import torch

from llmlab.errors import LabError, UnknownName
from llmlab.kernels.attending import reference_attention
from llmlab.kernels.pages import Pages
from llmlab.memory import CACHE_TYPES
from llmlab.runtime.cache import LayerCache, cells_of, hadamard, turned

HEADS, KV, DIM, WIDE = 4, 2, 64, 96


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(type: str, x: torch.Tensor) -> torch.Tensor:
    """x [batch, heads, n, dim] as it is after quantizing."""
    pages = Pages(type, x.shape[0], x.shape[1], x.shape[3], x.shape[2])
    pages.write(torch.arange(x.shape[2]), x)
    return pages.numbers().permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, :x.shape[2]]


def wanted(kv, q, keys, values, *, window=0, sinks=0, recent=0, rotate=False, softcap=0.0, scores=None, first=0):
    """Every token from `first` on beside all before it: those among `sinks` or the last `recent` rounded to float16, the rest
    quantized."""
    if rotate:
        q, keys, values = turned(q), turned(keys), turned(values)
    near = [x.half().float() if sinks + recent else x for x in (keys, values)]
    far = [packed(type, x) for type, x in zip(kv, near, strict=True)]
    n = keys.shape[2]
    found = []
    for at in range(first, n):
        place = torch.arange(n)
        full = ((place < sinks) | (place > at - recent))[:, None]
        k, v = (torch.where(full, a, b) for a, b in zip(near, far, strict=True))
        mask = (place <= at) & (place > at - window if window else place >= 0)
        one = q[:, :, at - first:at - first + 1]
        found.append(reference_attention(one, k, v, mask[None, None, None], 0.125, softcap, scores))
    found = torch.cat(found, 2)
    return turned(found) if rotate else found


def read(cache, q, keys, values, cuts, softcap=0.0, scores=None):
    """All tokens in pieces that begin at `cuts`."""
    found, n = [], keys.shape[2]
    for start, stop in zip(cuts, [*cuts[1:], n], strict=True):
        at, rows = torch.arange(start, stop), slice(start, stop)
        cache.append(keys[:, :, rows], values[:, :, rows], at)
        found.append(cache.attend(q[:, :, rows], at, scale=0.125, softcap=softcap, sinks=scores))
    return torch.cat(found, 2)


def worst(found, exact) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


WAYS = {"plain": {}, "window": {"window": 20}, "sinks": {"sinks": 4}, "recent": {"recent": 16},
        "both": {"sinks": 3, "recent": 10}, "rotated": {"rotate": True},
        "all": {"window": 20, "sinks": 3, "recent": 10, "rotate": True}, "wide recent": {"window": 20, "recent": 35}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kv", [("q8_0", "q4_0"), ("f16", "q5_1"), ("iq4_nl", "fp8")])
def test_what_is_found_is_the_formula(kv, way):
    """Read at once, in pieces and token by token: the very same, and that of every pair in float64."""
    n, given = 70, WAYS[way]
    q, keys, values = random(1, HEADS, n, DIM), random(1, KV, n, DIM, seed=1), random(1, KV, n, WIDE, seed=2)
    exact = wanted(kv, q, keys, values, **given)
    for cuts in ([0], [0, 1, 2, 25, 60, 61], list(range(n))):
        cache = LayerCache(kv, KV, DIM, WIDE, cells=1, **given)
        assert worst(read(cache, q, keys, values, cuts), exact) < 1e-5
        assert cache.length == n and cache.cells == 256


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_a_ring_of_cells_is_written_again_and_again(softcap):
    """A window of 40 in a ring of 256, read for five rounds in pieces up to what it holds; against all cells kept."""
    n, given, kv = 1300, {"window": 40, "recent": 8}, ("q8_0", "q8_0")
    q, keys, values = random(1, HEADS, n, DIM), random(1, KV, n, DIM, seed=1), random(1, KV, n, DIM, seed=2)
    scores, cuts = random(HEADS), [0, 200, 401, 402, 600, 800, 1000, 1200]
    ring = LayerCache(kv, KV, DIM, DIM, capacity=256, **given)
    found = read(ring, q, keys, values, cuts, softcap, scores)
    whole = read(LayerCache(kv, KV, DIM, DIM, **given), q, keys, values, cuts, softcap, scores)
    assert ring.cells == 256 and worst(found, whole) < 1e-6
    last = wanted(kv, q[:, :, -50:], keys, values, softcap=softcap, scores=scores, first=n - 50, **given)
    assert worst(found[:, :, -50:], last) < 1e-5
    with pytest.raises(LabError, match="300 tokens at once are more than a window of 40"):
        ring.append(keys[:, :, :300], values[:, :, :300], torch.arange(n, n + 300))
    full = LayerCache(kv, KV, DIM, DIM, capacity=256)
    with pytest.raises(LabError, match="holds 256 tokens and 300 would be in it"):
        full.append(keys[:, :, :300], values[:, :, :300], torch.arange(300))
    assert full.length == 0


def test_texts_of_different_lengths_side_by_side():
    """Shorter ones begin with tokens that are none; each finds what it finds alone, its own sinks and last tokens among it."""
    lengths, n, kv, given = (90, 33), 90, ("q8_0", "q4_1"), {"sinks": 3, "recent": 20, "window": 60}
    q, keys, values = random(2, HEADS, n, DIM), random(2, KV, n, DIM, seed=1), random(2, KV, n, DIM, seed=2)
    positions = torch.stack([torch.arange(n) - (n - length) for length in lengths]).clamp(min=-1)
    cache, found = LayerCache(kv, KV, DIM, DIM, batch=2, **given), []
    for rows in (slice(0, 70), slice(70, 89), slice(89, 90)):
        cache.append(keys[:, :, rows], values[:, :, rows], positions[:, rows])
        found.append(cache.attend(q[:, :, rows], positions[:, rows], scale=0.125))
    found = torch.cat(found, 2)
    for text, length in enumerate(lengths):
        alone = [x[text:text + 1, :, n - length:] for x in (q, keys, values)]
        assert worst(found[text:text + 1, :, n - length:], wanted(kv, *alone, **given)) < 1e-5


@pytest.mark.parametrize("given", [{}, {"recent": 30}, {"sinks": 5, "recent": 30}, {"window": 40}])
def test_cropped_it_goes_on_as_if_nothing_else_had_been_read(given):
    n, kv = 120, ("q8_0", "q8_0")
    q, keys, values = random(1, HEADS, n, DIM), random(1, KV, n, DIM, seed=1), random(1, KV, n, DIM, seed=2)
    cache, other = LayerCache(kv, KV, DIM, DIM, **given), random(1, KV, 60, DIM, seed=3)
    read(cache, q[:, :, :100], keys[:, :, :100], values[:, :, :100], [0])
    before = [t.clone() for t in cache.tensors]
    for crop in (100, 90):
        cache.crop(crop)
        assert cache.length == crop
    cache.append(other, other, torch.arange(90, 150))
    cache.crop(90)
    at = torch.arange(90, n)
    cache.append(keys[:, :, 90:], values[:, :, 90:], at)
    found = cache.attend(q[:, :, 90:], at, scale=0.125)
    if not given.get("recent"):
        assert worst(found, wanted(kv, q, keys, values, **given)[:, :, 90:]) < 1e-5
    else:           # of the last tokens before the crop those stay as they are that were so then
        assert worst(found, wanted(kv, q, keys, values, **given)[:, :, 90:]) < 0.02
    assert len(before) == len(cache.tensors)
    if "sinks" not in given:
        cache.crop(0)
        assert worst(read(cache, q, keys, values, [0, 7]), wanted(kv, q, keys, values, **given)) < 1e-5


def test_a_ring_knows_what_it_still_holds():
    cache = LayerCache("q8_0", KV, DIM, DIM, window=40, capacity=256)
    x = random(1, KV, 200, DIM)
    cache.append(x, x, torch.arange(200))
    assert all(cache.holds(length) for length in (0, 1, 100, 200))
    cache.append(x, x, torch.arange(200, 400))              # 0 to 143 are written over
    assert cache.holds(400) and cache.holds(183) and not cache.holds(182) and not cache.holds(0)
    cache.crop(300)
    assert cache.holds(183) and not cache.holds(182)        # written over, they do not come back
    assert LayerCache("q8_0", KV, DIM, DIM, capacity=256).holds(0)


@pytest.mark.parametrize("type", CACHE_TYPES)
def test_bytes_are_the_blocks(type):
    """What it holds is cells times blocks, and two bytes a number of what stays in full precision."""
    from llmlab.formats import FORMATS
    cache = LayerCache((type, "q4_0"), KV, DIM, WIDE, cells=300, sinks=4, recent=28)
    row = KV * (FORMATS[CACHE_TYPES[type]].bytes(DIM) + FORMATS["Q4_0"].bytes(WIDE))
    assert cache.cells == 512 and cache.bytes == 512 * row + 2 * 32 * KV * (DIM + WIDE)
    assert sum(t.nbytes for t in cache.tensors) == cache.bytes + 4 * (512 + 32)
    cache.grow(513)
    assert cache.cells == 768 and cache.bytes == 768 * row + 2 * 32 * KV * (DIM + WIDE)


def test_it_grows_no_further_than_it_may():
    cache = LayerCache("q4_0", KV, DIM, DIM, cells=1, capacity=700)
    rooms = []
    for start in range(0, 700, 100):
        x = random(1, KV, 100, DIM, seed=start)
        cache.append(x, x, torch.arange(start, start + 100))
        rooms.append(cache.cells)
    assert rooms == [256, 256, 512, 512, 512, 768, 768]
    assert [cells_of(*one) for one in ((700,), (1,), (700, 100), (4096, 100), (4096, 1024))] == [768, 256, 768, 768, 1536]


def test_tokens_dropped_and_moved():
    """Those in the middle are gone, those after stay as they are, the first lie just before them and are turned as far."""
    n, kv, keep, gone = 100, ("q8_0", "q8_0"), 4, 50
    q, keys, values = random(1, HEADS, n, DIM), random(1, KV, n, DIM, seed=1), random(1, KV, n, DIM, seed=2)
    for rotate in (False, True):
        cache = LayerCache(kv, KV, DIM, DIM, sinks=4, rotate=rotate)
        read(cache, q, keys, values, [0])
        before = cache.keys.codes.clone()
        cache.drop(keep, keep + gone)
        cache.move(keep, gone, lambda x: 2 * x)     # any linear change will do
        assert torch.equal(before, cache.keys.codes) and cache.near[2].tolist() == [[50, 51, 52, 53]]
        one = random(1, HEADS, 1, DIM, seed=9)
        cache.append(keys[:, :, :1], values[:, :, :1], torch.tensor([n]))
        found = cache.attend(one, torch.tensor([n]), scale=0.125)
        left = [*range(keep), *range(keep + gone, n), 0]
        k, v = keys[:, :, left].clone(), values[:, :, left]
        k[:, :, :keep] *= 2
        if rotate:
            k, v, one = turned(k), turned(v), turned(one)
        k, v = (torch.cat([x[:, :, :keep].half().float(), packed("q8_0", x[:, :, keep:])], 2) for x in (k, v))
        exact = reference_attention(one, k, v, torch.ones(1, 1, 1, len(left), dtype=torch.bool), 0.125)
        assert worst(found, turned(exact.float()) if rotate else exact) < 1e-3      # 2 x and its rounding
    with pytest.raises(LabError, match="5 first tokens are to stay and 4 lie in full precision"):
        cache.move(5, 1, lambda x: x)


def test_rotation_is_its_own_inverse_and_spreads_what_stands_out():
    for size in (32, 64, 96, 80, 128, 7):
        x = random(3, size)
        assert torch.allclose(turned(turned(x)), x, atol=1e-5) and torch.allclose(turned(x).norm(), x.norm())
    assert torch.allclose(hadamard(64) @ hadamard(64).T, torch.eye(64), atol=1e-6) and torch.equal(hadamard(8), hadamard(8).T)
    x = random(1, 1, 200, DIM)
    x[..., 5] += 30                             # keys have such channels
    error = (packed("q4_0", x) - x).norm()
    assert (turned(packed("q4_0", turned(x))) - x).norm() < 0.7 * error


def test_what_cannot_be_is_one_line():
    with pytest.raises(LabError, match="a q8_0 cache needs heads of a multiple of 32 numbers, and here they have 80"):
        LayerCache("q8_0", KV, 80, 80)
    with pytest.raises(UnknownName, match="'q3' is no cache type"):
        LayerCache("q3", KV, DIM, DIM)
    for wrong in (-1, 2.5, True):
        with pytest.raises(LabError, match="recent is"):
            LayerCache("q8_0", KV, DIM, DIM, recent=wrong)
        with pytest.raises(LabError, match="sinks is"):
            LayerCache("q8_0", KV, DIM, DIM, sinks=wrong)
    cache, x = LayerCache("q8_0", KV, DIM, DIM, recent=4), random(1, KV, 3, DIM)
    cache.append(x, x, torch.arange(3))
    with pytest.raises(LabError, match="a mask names cells of pages"):
        cache.attend(x, torch.arange(3), mask=torch.ones(1, 1, 3, 256, dtype=torch.bool))
