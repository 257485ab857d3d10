"""Codebook types, IQ1 to IQ3: llama.cpp's bytes, the lists its search is made of, and a longer search that leaves less."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab import formats
from llmlab.errors import LabError
from llmlab.formats import FORMATS
from llmlab.formats.grids import CODEBOOKS

torch = pytest.importorskip("torch")
import make_quantizing_golden  # noqa: E402
import make_quantizing_grids_golden as golden  # noqa: E402

from llmlab.formats.encoders import closest, codebooks  # noqa: E402

NAMES = ("IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M")
NEEDY = NAMES[2:]
SEVEN_SIGNS = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS")
LISTS = {"IQ3_XXS": 2, "IQ3_S": 3, "IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ1": 3}     # iq2xs_init_impl, iq3xs_init_impl
CPU = torch.device("cpu")
COLS = 512


def numbers(kind: str = "normal", rows: int = 6) -> np.ndarray:
    rng = np.random.default_rng(3)
    found = rng.standard_t(3, (rows, COLS)) if kind == "heavy tails" else rng.standard_normal((rows, COLS))
    return (found * 0.02).astype(np.float32)


def importances() -> np.ndarray:
    return (np.random.default_rng(7).random(COLS) ** 3 + 1e-3).astype(np.float32)


def read(blocks, name: str) -> np.ndarray:
    return formats.dequantize(blocks, name).numpy()


def errors(blocks, name: str, weights: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Of each row the squared error, weighted."""
    off = (read(blocks, name).astype(np.float64) - weights) ** 2
    return (off if importance is None else off * importance).sum(1)


@pytest.mark.parametrize("name, weighed", golden.CASES)
def test_bytes_are_llama_cpps(name, weighed):
    weights, importance = make_quantizing_golden.numbers()
    theirs = base64.b64decode(json.loads(golden.GOLDEN.read_text())[golden.key(name, weighed)])
    assert formats.quantize(weights, name, importance if weighed else None).numpy().tobytes() == theirs


@pytest.mark.parametrize("effort", ["normal", "high"])
@pytest.mark.parametrize("name", NEEDY)
def test_so_few_bits_need_importances(name, effort):
    with pytest.raises(LabError, match=rf"^{name} needs an importance matrix"):
        formats.quantize(numbers(rows=1), name, effort=effort)


# ---- the lists -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, distances", LISTS.items())
def test_lists_hold_the_nearest_points(name, distances):
    known, book = codebooks.places(name, distances, CPU), CODEBOOKS[name]
    base, width = len(book.levels), book.width
    points = np.array([[book.levels.index(value) for value in point] for point in book.points()])
    own = (points * base ** np.arange(width)).sum(1)
    assert (known.code[own].numpy() == np.arange(len(points))).all() and (known.count[own] == 0).all()
    assert int((known.code >= 0).sum()) == len(points)
    off = np.nonzero(known.code.numpy() < 0)[0]
    for place in np.random.default_rng(1).choice(off, 40, replace=False):
        far = ((points - place // base ** np.arange(width) % base) ** 2).sum(1)
        order = np.argsort(far, kind="stable")
        wanted = order[far[order] <= np.unique(far)[distances - 1]]
        first, count = int(known.first[place]), int(known.count[place])
        assert known.near[first:first + count].tolist() == wanted.tolist()


@pytest.mark.parametrize("name", ["IQ3_S", "IQ2_XS"])
def test_the_best_of_a_list_is_found(name):
    """Beside a plain loop in double precision: where the places' points are none, the listed one of the least error."""
    known = codebooks.places(name, LISTS[name], CPU)
    rng = np.random.default_rng(2)
    shape = known.width, 4, 50
    x, weight = rng.random(shape).astype(np.float32), (rng.random(shape) + 0.1).astype(np.float32)
    scale = (rng.random((3, 50)) * 0.1 + 0.05).astype(np.float32)
    runs = codebooks.Runs(*map(torch.from_numpy, (x, weight, weight)))
    code, own = codebooks.codes(known, runs, torch.from_numpy(1 / scale), torch.from_numpy(scale))
    values = known.values.numpy().astype(np.float64)
    seen = 0
    for run, each, block in np.ndindex(4, 3, 50):
        level = np.rint((x[:, run, block] / scale[each, block] - 1) / 2).clip(0, known.levels - 1).astype(int)
        place = int((level * known.levels ** np.arange(known.width)).sum())
        assert bool(own[run, each, block]) == (known.code[place] >= 0)
        if own[run, each, block]:
            assert code[run, each, block] == known.code[place]
            continue
        first, count = int(known.first[place]), int(known.count[place])
        listed = known.near[first:first + count].numpy()
        off = (weight[:, run, block, None] * (scale[each, block] * values[:, listed] - x[:, run, block, None]) ** 2).sum(0)
        assert off[list(listed).index(int(code[run, each, block]))] <= off.min() * (1 + 1e-5)
        seen += 1
    assert seen > 100


# ---- signs -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("effort", ["normal", "high"])
@pytest.mark.parametrize("name", SEVEN_SIGNS)
def test_one_sign_of_eight_gives_way_where_minuses_are_odd(name, effort):
    weights, importance = numbers(), importances()
    wrong = (np.signbit(read(formats.quantize(weights, name, importance, effort), name)) != np.signbit(weights)).reshape(-1, 8)
    odd = (weights.reshape(-1, 8) < 0).sum(1) % 2 == 1
    assert (wrong.sum(1) == odd).all() and 0.3 < odd.mean() < 0.7
    cost = (weights ** 2 * importance).reshape(-1, 8)
    assert (cost * wrong).sum(1)[odd].mean() < 0.1 * cost.mean(1)[odd].mean()


@pytest.mark.parametrize("effort", ["normal", "high"])
@pytest.mark.parametrize("name", ["IQ3_S", "IQ2_S"])
def test_every_weight_keeps_its_sign(name, effort):
    weights = numbers()
    assert (np.signbit(read(formats.quantize(weights, name, importances(), effort), name)) == np.signbit(weights)).all()


@pytest.mark.parametrize("name, effort", [*((name, "normal") for name in NAMES), ("IQ3_S", "high")])
def test_a_block_of_zeros_leaves_the_others_in_their_place(name, effort):
    """In IQ3_S ggml writes what follows a block of 32 zeros one block too early."""
    weights, importance = numbers(), importances()
    before = errors(formats.quantize(weights, name, importance, effort), name, weights, importance)
    weights[:, 32:64] = 0
    after = errors(formats.quantize(weights, name, importance, effort), name, weights, importance)
    assert (after < 1.2 * before).all()


# ---- the longer search -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["IQ3_XXS", "IQ2_S"])
def test_the_closest_of_all_points_is_found(name):
    points = closest.values(name, CPU)
    rng = np.random.default_rng(4)
    x = rng.standard_normal((len(points), 3, 40)).astype(np.float32)
    weight, scale = rng.random(x.shape).astype(np.float32), (rng.random(40) * 0.1).astype(np.float32)
    found = closest.closest(points, *map(torch.from_numpy, (x, weight, scale))).numpy()
    off = ((scale[:, None] * points.numpy().astype(np.float64)[:, None, None] - x[..., None]) ** 2 * weight[..., None]).sum(0)
    assert (np.take_along_axis(off, found[..., None], 2)[..., 0] <= off.min(2) + 1e-5 * (weight * x * x).sum(0)).all()


@pytest.mark.parametrize("kind", ["normal", "heavy tails"])
@pytest.mark.parametrize("name, weighed", golden.CASES)
def test_a_longer_search_leaves_less(name, weighed, kind):
    """Less in every row, and in all at most 0.9 of the normal search's error, in the same bytes."""
    weights, importance = numbers(kind), importances() if weighed else None
    normal = errors(formats.quantize(weights, name, importance), name, weights, importance)
    high = errors(formats.quantize(weights, name, importance, "high"), name, weights, importance)
    assert (high < normal).all() and high.sum() < 0.9 * normal.sum()


@pytest.mark.parametrize("name", NAMES)
def test_a_longer_search_is_never_worse(name):
    """Not in a single superblock, however odd the weights."""
    weights, importance = numbers(rows=12), importances()
    weights[0], weights[1, ::3], weights[2] = 0, 0, 0.5
    weights[3, 5], weights[4] = 3, np.where(np.arange(COLS) % 2, 0.03, -0.03)
    weights[5] *= 1e-6
    weights[6] *= 1e-9
    weights[7, 256:] = 0
    importance[::5] = 0
    found = [read(formats.quantize(weights, name, importance, effort), name) for effort in ("normal", "high")]
    normal, high = (((of.astype(np.float64) - weights) ** 2 * importance).reshape(12, -1, 256).sum(2) for of in found)
    assert (high <= normal * (1 + 1e-6)).all()


@given(st.integers(0, 2 ** 32 - 1), st.sampled_from(NAMES), st.sampled_from(["normal", "high"]), st.integers(-120, 10))
@settings(max_examples=20, deadline=None)
def test_whatever_the_bits_blocks_are_finite_and_near(seed, name, effort, power):
    rng = np.random.default_rng(seed)
    rows = np.ldexp(rng.choice([0, 1, 1, 1], (2, 256)) * rng.uniform(-1, 1, (2, 256)), power + rng.integers(-30, 1, (2, 256)))
    rows = rows.astype(np.float32)
    importance = (rng.random(256) * rng.choice([0, 1, 1], 256)).astype(np.float32)
    blocks = formats.quantize(rows, name, importance, effort)
    assert blocks.shape == (2, FORMATS[name].block_bytes)
    found = read(blocks, name)
    assert np.isfinite(found).all() and (abs(found) <= 3 * abs(rows).max(1, keepdims=True) + 1e-6).all()
