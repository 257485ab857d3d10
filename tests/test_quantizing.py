"""Numbers -> blocks: llama.cpp's bytes, whatever the chunks and threads; odd weights, bad input, what a longer search buys."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab import formats
from llmlab.errors import LabError, UnknownName
from llmlab.formats import FORMATS, quantizing
from llmlab.formats.encoders import ENCODERS, encodes, searching

torch = pytest.importorskip("torch")
import make_quantizing_golden as golden  # noqa: E402

NAMES = sorted(ENCODERS)
BLOCKY = [name for name in NAMES if FORMATS[name].block > 1]
OURS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
SEARCHED = tuple(name for name in OURS if name != "Q8_0")
COLS = 512


def normal(rows: int = 8, cols: int = COLS, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, cols)) * 0.02).astype(np.float32)


def importances(cols: int = COLS) -> np.ndarray:
    return (np.random.default_rng(7).random(cols) ** 3 + 1e-3).astype(np.float32)


def read(blocks, name: str) -> np.ndarray:
    return formats.dequantize(blocks, name).numpy()


def error(blocks, name: str, weights: np.ndarray, importance: np.ndarray | None = None) -> float:
    off = (read(blocks, name).astype(np.float64) - weights) ** 2
    return (off if importance is None else off * importance).sum()


@pytest.mark.parametrize("weighed", ["plain", "weighed"])
@pytest.mark.parametrize("name", golden.NAMES)
def test_bytes_are_llama_cpps(name, weighed):
    weights, importance = golden.numbers()
    theirs = base64.b64decode(json.loads(golden.GOLDEN.read_text())[name][weighed])
    ours = formats.quantize(weights, name, importance if weighed == "weighed" else None)
    assert ours.numpy().tobytes() == theirs


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_threads_change_nothing(name, monkeypatch):
    """Whole, and two rows at a time by three threads."""
    weights, importance = normal(5), importances()
    whole = formats.quantize(weights, name, importance)
    assert whole.dtype == torch.uint8 and whole.shape == (5, FORMATS[name].bytes(COLS))
    monkeypatch.setattr(quantizing, "CHUNK", 2 * COLS)
    steps, threads = [], torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(formats.quantize(weights, name, importance, progress=lambda *at: steps.append(at)), whole)
    finally:
        torch.set_num_threads(threads)
    assert steps == [(2, 5), (4, 5), (5, 5)]
    assert np.array_equal(weights, normal(5)), "the weights were written to"


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q4_K", "Q3_K"])
def test_a_longer_search_finds_the_same_in_other_company(name):
    weights, importance = normal(3), importances()
    whole = formats.quantize(weights, name, importance, "high")
    assert torch.equal(torch.stack([formats.quantize(row, name, importance, "high") for row in weights]), whole)


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q3_K"])
def test_shapes_and_kinds_of_input_change_nothing(name):
    weights, importance = normal(12), importances()
    whole = formats.quantize(weights, name, importance)
    assert torch.equal(torch.stack([formats.quantize(row, name, importance) for row in torch.from_numpy(weights)]), whole)
    assert torch.equal(formats.quantize(weights.reshape(3, 4, COLS), name, torch.from_numpy(importance)).view(12, -1), whole)
    columns = torch.from_numpy(weights.T.copy()).t()
    assert not columns.is_contiguous() and torch.equal(formats.quantize(columns, name, importance), whole)
    assert torch.equal(formats.quantize(weights[::-1], name, importance), whole.flip(0))
    assert torch.equal(formats.quantize(weights.astype(">f4"), name, importance), whole)
    frozen = weights.copy()
    frozen.flags.writeable = False
    assert torch.equal(formats.quantize(frozen, name, importance), whole)
    assert torch.equal(formats.quantize(torch.nn.Parameter(torch.from_numpy(weights)), name, importance), whole)
    assert torch.equal(formats.quantize(weights.astype(np.float64), name, importance.astype(np.float64)), whole)
    with torch.inference_mode():
        assert torch.equal(formats.quantize(torch.from_numpy(weights), name, importance), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_1", "Q4_K", "Q6_K"])
def test_other_dtypes_are_their_numbers(name, dtype):
    weights = torch.from_numpy(normal()).to(dtype)
    assert torch.equal(formats.quantize(weights, name), formats.quantize(weights.float(), name))


@pytest.mark.parametrize("name", BLOCKY)
def test_a_block_is_the_same_alone_and_among_others(name):
    """One block: sums of a single column must be added in the same order."""
    known = FORMATS[name]
    weights, importance = normal(2, known.block), importances(known.block)
    together = formats.quantize(weights, name, importance)
    assert torch.equal(torch.stack([formats.quantize(row, name, importance) for row in weights]), together)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_types_are_rounded(name):
    weights = normal() * 1e3
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
    assert torch.equal(formats.quantize(weights, name).view(dtype), torch.from_numpy(weights).to(dtype))


@pytest.mark.parametrize(("name", "most"), [
    ("Q8_0", 0.008), ("Q6_K", 0.023), ("Q5_K", 0.045), ("Q5_1", 0.045), ("Q5_0", 0.05), ("Q4_K", 0.085), ("Q4_1", 0.09),
    ("Q4_0", 0.1), ("Q3_K", 0.19), ("Q2_K", 0.33)])
@pytest.mark.parametrize("importance", [None, importances()])
def test_the_error_is_what_so_many_bits_allow(name, most, importance):
    weights = normal(16)
    assert 0 < (error(formats.quantize(weights, name, importance), name, weights) / (weights ** 2).sum()) ** 0.5 < most


# ---- odd weights ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("effort", ["normal", "high"])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", BLOCKY)
def test_odd_rows_stay_finite_and_near(name, weighed, effort):
    if not weighed and name.startswith(("IQ1", "IQ2")):
        with pytest.raises(LabError, match="importance"):
            formats.quantize(normal(1), name, effort=effort)
        return
    rows = normal(12)
    rows[0] = 0
    rows[1] = -0.0
    rows[2] = 0
    rows[2, 5] = 3
    rows[3], rows[4] = 0.5, -0.25
    rows[5] *= 1e-38
    rows[6] = 1e-45
    rows[7] *= 1e4
    rows[8, ::3] = 0
    rows[9, : COLS // 2] = 0
    rows[10] = np.where(np.arange(COLS) % 2, 0.03, -0.03)
    found = read(formats.quantize(rows, name, importances() if weighed else None, effort), name)
    assert np.isfinite(found).all()
    sized = name not in ("Q1_0", "Q2_0")       # types without a zero, or with one sign's levels only
    if sized:
        assert (found[:2] == 0).all()
    size = np.abs(rows).max(1, keepdims=True)
    assert (np.abs(found - rows) <= 2 * size + 1e-7).all()


def test_one_far_weight_keeps_its_size():
    rows = np.zeros((2, 256), np.float32)
    rows[0, 7], rows[1, 7] = 5, -5
    for name in OURS:
        found = read(formats.quantize(rows, name), name)
        assert abs(found[0, 7] - 5) < 0.2 and abs(found[1, 7] + 5) < 0.2, name
        assert (abs(np.delete(found, 7, 1)) < 0.01).all(), name


@pytest.mark.parametrize("name", ["F16", *OURS])
def test_what_a_float16_scale_cannot_hold_is_an_error_and_no_infinity(name):
    rows = normal(5)
    rows[3, 40] = 3e9
    with pytest.raises(LabError, match=rf"^{name}: weight 40 of row 3 is 3e\+09; .*Store this tensor as BF16 or F32"):
        formats.quantize(rows, name)
    with pytest.raises(LabError, match="weight 40 of row 3"):
        formats.quantize(rows, name, importances())
    rows[3, 40] = 6e4 if name == "F16" else 4e5
    assert torch.isfinite(formats.dequantize(formats.quantize(rows, name), name)).all()


def test_numbers_beyond_bfloat16_are_an_error():
    with pytest.raises(LabError, match="BF16: weight 2 of row 0"):
        formats.quantize(np.float32([[0, 1, 3.4028e38]]), "BF16")


@given(st.integers(0, 2 ** 32 - 1), st.sampled_from(OURS), st.booleans(), st.integers(-120, 40))
@settings(max_examples=40, deadline=None)
def test_whatever_the_bits_blocks_are_finite(seed, name, weighed, power):
    """Any floats of a range that fits: signs, subnormals and repeats included."""
    rng = np.random.default_rng(seed)
    rows = np.ldexp(rng.choice([0, 1, 1, 1], (2, 256)) * rng.uniform(-1, 1, (2, 256)),
                    power + rng.integers(-30, 1, (2, 256))).clip(-6e4, 6e4).astype(np.float32)
    found = read(formats.quantize(rows, name, importances(256) if weighed else None), name)
    assert np.isfinite(found).all()
    # Of scales below 6e-5 float16 has but whole steps of 6e-8, times a block scale up to 63 and a code up to 31.
    assert (np.abs(found - rows) <= np.abs(rows).max() * 1.01 + 3e-8 * 63 * 32).all()


# ---- importances ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SEARCHED)
def test_importances_lower_the_error_where_they_lie(name):
    weights, importance = normal(16), importances()
    importance[::4] *= 100
    with_them = error(formats.quantize(weights, name, importance), name, weights, importance)
    assert with_them < error(formats.quantize(weights, name), name, weights, importance)


# ---- a longer search ------------------------------------------------------------------------------------

def counted(name: str, weights: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """What the usual search of a type counts an error for: squares times this."""
    x = weights.astype(np.float64)
    legacy = name[-2:] in ("_0", "_1")
    squares = (x ** 2).mean(1, keepdims=True) if legacy else np.repeat((x ** 2).reshape(len(x), -1, 256).mean(2), 256, 1)
    if importance is not None:
        weighed = importance * np.sqrt((1 if legacy or name == "Q2_K" else 2) * squares + x ** 2)
        return np.broadcast_to(importance, x.shape) if name == "Q6_K" else weighed
    if name in ("Q4_K", "Q5_K"):
        return np.repeat(np.sqrt((x ** 2).reshape(len(x), -1, 32).mean(2)), 32, 1) + abs(x)
    return np.ones_like(x) if legacy else abs(x) if name == "Q2_K" else x ** 2


@pytest.mark.parametrize("tails", [None, 3])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_high_effort_lowers_the_error_in_the_same_bytes(name, weighed, tails):
    """What the search counts by at least 1 %: in blocks of 32 squares times importances, which lowers the divergence further
    than what the usual search counts, elsewhere just that; without importances the plain squares too."""
    weights = normal(12)
    if tails is not None:
        weights = (np.random.default_rng(3).standard_t(tails, weights.shape) * 0.02).astype(np.float32)
    importance = importances() if weighed else None
    usual, high = (formats.quantize(weights, name, importance, effort) for effort in ("normal", "high"))
    assert high.shape == usual.shape
    count = importance if weighed and name[-2:] in ("_0", "_1") else counted(name, weights, importance)
    before, after = (((read(blocks, name) - weights.astype(np.float64)) ** 2) for blocks in (usual, high))
    assert (after * count).sum() < 0.99 * (before * count).sum()
    if not weighed:
        assert after.sum() < before.sum()


# ---- bad input ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["F32", "Q4_0", "Q4_K"])
def test_no_number_is_an_error_with_its_place(name, bad):
    weights = normal(9)
    weights[7, 300] = bad
    with pytest.raises(LabError, match=rf"^{name}: weight 300 of row 7 is {bad}"):
        formats.quantize(weights, name)


def test_sums_beyond_floats_are_no_error():
    weights = np.full((1, 32), 3e38, np.float32)
    assert torch.equal(formats.quantize(weights, "F32").view(torch.float32), torch.from_numpy(weights))


@pytest.mark.parametrize(("call", "said"), [
    (lambda w: formats.quantize(w, "Q4_K", np.ones(511)), r"importance is \[511\] for rows of 512 weights.*another model"),
    (lambda w: formats.quantize(w, "Q4_K", np.ones((8, 512))), r"importance is \[8, 512\]"),
    (lambda w: formats.quantize(w, "Q4_K", -np.ones(512)), r"importance 0 is -1.0; finite numbers from zero on"),
    (lambda w: formats.quantize(w, "Q4_K", np.where(np.arange(512) == 9, np.nan, 1)), r"importance 9 is nan"),
    (lambda w: formats.quantize(w, "Q4_K", "much"), r"importance is str; 512 numbers are needed"),
    (lambda w: formats.quantize(w[:, :128], "Q4_K"), r"rows of 128 weights do not divide into blocks of 256.*smaller blocks"),
    (lambda w: formats.quantize(torch.tensor(3.0), "Q4_0"), r"rows of 0 weights"),
    (lambda w: formats.quantize(w.astype(np.int32), "Q4_0"), r"weights are int32; a tensor of floating point"),
    (lambda w: formats.quantize(torch.ones(2, 32, dtype=torch.uint8), "Q4_0"), r"weights are torch.uint8"),
    (lambda w: formats.quantize([[0.5] * 32], "Q4_0"), r"weights are list"),
    (lambda w: formats.quantize(w, "Q8_K"), r"Q8_K cannot be written.*there are .*Q4_K"),
    (lambda w: formats.quantize(w, "Q4_0", effort="extreme"), r"effort is 'extreme'; there are 'normal' and 'high'"),
])
def test_bad_input_is_one_clear_line(call, said):
    with pytest.raises(LabError, match=said) as caught:
        call(normal())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Q4_K_M", "q4_0", None])
def test_unknown_types_are_named(name):
    with pytest.raises(UnknownName, match=f"{name!r}"[1:-1] if name else "None"):
        formats.quantize(normal(), name)


def test_nothing_is_fine():
    assert formats.quantize(torch.empty(0, 512), "Q4_K").shape == (0, 288)
    assert formats.quantize(torch.empty(3, 0), "Q4_0").shape == (3, 0)


def test_a_type_has_one_encoder():
    with pytest.raises(ValueError, match="two encoders of Q4_0"):
        encodes("Q4_0")(lambda x, importance, effort: x)


def test_an_exception_of_the_progress_stops_the_work(monkeypatch):
    monkeypatch.setattr(quantizing, "CHUNK", COLS)

    def stop(done, rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        formats.quantize(normal(64), "Q8_0", progress=stop)


# ---- the arithmetic underneath --------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(32, 1), (32, 2), (16, 3), (32, 1000), (16, 8, 5)])
def test_sums_are_made_in_order(shape):
    terms = torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    total = terms[0].clone()
    for row in terms[1:]:
        total += row
    assert torch.equal(searching.in_order(terms), total)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [(32, 1), (32, 2), (16, 3), (16, 9), (32, 1000), (8, 4096)])
def test_sums_of_products_are_made_in_order(shape, exact, monkeypatch):
    if not exact:
        monkeypatch.setattr(searching, "_rounds_products", lambda: False)
    one, two, three = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    assert np.array_equal(searching._products(one, two), searching._sum(one * two))
    assert np.array_equal(searching._products(one, two, three), searching._sum(one * two * three))


def test_roots_are_rounded_once():
    x = torch.rand(10_000)
    assert np.array_equal(searching.root_(x.clone()).numpy(), np.sqrt(x.numpy().astype(np.float64)).astype(np.float32))


def test_the_first_of_the_largest_is_taken():
    x = torch.tensor([[1., -2, -0., 3], [-1, 2, 0, -3], [0.5, 1, -0., 1]])
    found = searching.largest(x)
    assert found.tolist() == [1, -2, 0, 3] and not torch.signbit(found[2])
    assert torch.equal(searching.largest(x.t().contiguous(), 1), found)
