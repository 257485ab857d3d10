"""Quantizing to uneven, few and floating-point levels, and bitsandbytes' formats: which bytes, how near to the best."""

import hashlib

import make_quantizing_golden as golden
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab import formats
from llmlab.errors import LabError
from llmlab.formats import FORMATS, bnb

torch = pytest.importorskip("torch")
from llmlab.formats.encoders import fp4, iq4, ternary  # noqa: E402
from llmlab.formats.encoders.levels import Levels, both_sides, counted, inverse_of  # noqa: E402

# sha256 of what llama.cpp's C writes for golden.numbers(), without and with the importances (tests/peers compares live).
THEIRS = {
    "IQ4_NL": ("0eed665fabdd2463", "5af90bfe96137641"),
    "IQ4_XS": ("97ccec0ae9a0f6cd", "511ccbfe3042c45d"),
    "MXFP4": ("772a5920cef7eb35", "772a5920cef7eb35"),
    "NVFP4": ("7debdf247bcafab5", "7debdf247bcafab5"),
    "TQ1_0": ("b83ea6f087d5e1a1", "b83ea6f087d5e1a1"),
    "TQ2_0": ("f7a5c61b33bbc7ce", "f7a5c61b33bbc7ce"),
    "Q1_0": ("986e6f111a2b37a9", "986e6f111a2b37a9"),
    "Q2_0": ("18b3ad75acc7853a", "18b3ad75acc7853a"),
}
NAMES = (*THEIRS, "NF4", "FP4")
FLOAT16_SCALES = ("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0")
COLS = 1024


def normal(rows: int = 8, cols: int = COLS, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, cols)) * 0.02).astype(np.float32)


def heavy(rows: int = 8, cols: int = COLS, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(3, (rows, cols)) * 0.02).astype(np.float32)


def importances(cols: int = COLS) -> np.ndarray:
    rng = np.random.default_rng(7)
    return (rng.standard_normal(cols) ** 2 * np.exp(rng.standard_normal(cols)) + 1e-6).astype(np.float32)


def errors(weights: np.ndarray, name: str, importance: np.ndarray | None, effort: str) -> np.ndarray:
    """The squared error of each block, by the importances where given."""
    blocks = formats.quantize(weights, name, importance, effort)
    off = (formats.dequantize(blocks, name).numpy().astype(np.float64) - weights) ** 2
    return (off if importance is None else off * importance).reshape(-1, FORMATS[name].block).sum(1)


@pytest.mark.parametrize("name", THEIRS)
def test_bytes_are_llama_cpps(name):
    weights, importance = golden.numbers()
    ours = [hashlib.sha256(formats.quantize(weights, name, given).numpy().tobytes()).hexdigest()[:16]
            for given in (None, importance)]
    assert tuple(ours) == THEIRS[name]


# ---- the search that takes longer -------------------------------------------------------------------------

# The error that is left, at most, of the usual search's: of normal weights alone, and with importances.
LEFT = {"IQ4_NL": (0.95, 0.88), "IQ4_XS": (0.95, 0.88), "MXFP4": (0.97, 0.96), "NVFP4": (0.8, 0.6), "TQ1_0": (0.35, 0.35),
        "TQ2_0": (0.35, 0.35), "Q1_0": (1.0, 0.98), "Q2_0": (0.3, 0.25), "NF4": (0.9, 0.65), "FP4": (0.9, 0.65)}


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_longer_search_errs_less_in_every_block(name, weighed):
    importance = importances() if weighed else None
    for weights, most in ((normal(), LEFT[name][weighed]), (heavy(), 1), (normal() * 10.0 ** (np.arange(8)[:, None] - 6), 1)):
        usual, longer = (errors(weights.astype(np.float32), name, importance, effort) for effort in ("normal", "high"))
        assert (longer <= usual * 1.0001).all()
        assert longer.sum() <= most * usual.sum()
        if (name, weighed) != ("Q1_0", False):      # a mean magnitude is the best there is
            assert longer.sum() < usual.sum()


@pytest.mark.parametrize("weighed", [False, True])
def test_iq4_nls_longer_search_is_as_good_as_trying_every_float16(weighed):
    weights, importance = normal(1, 256), importances(256)
    x = torch.from_numpy(weights).view(-1, 1, 32).permute(2, 1, 0).contiguous()
    counts = counted(x, torch.from_numpy(importance) if weighed else None)
    far = x.abs().amax(0)
    first, last = (int(size.half().view(torch.int16)) for size in (far.min() / 300, far.max() / 50))
    sizes = torch.arange(first, last + 1, dtype=torch.int16).view(torch.float16).float()
    every = torch.cat([sizes, -sizes])[:, None].expand(-1, x.shape[-1])
    best = iq4.TABLE.errors(x.expand(-1, len(every), -1), counts.expand(-1, len(every), -1), every).amin(0)
    found = errors(weights, "IQ4_NL", importance if weighed else None, "high")
    assert found.sum() < 1.005 * float(best.sum())


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_ternarys_longer_search_is_the_best_there_is(name):
    """Against every float16 scale that could be."""
    weights, importance = heavy(1, 256), importances(256)
    best = np.inf
    for scale in np.arange(1, 0x7C00, dtype=np.int16).view(np.float16).astype(np.float64):
        if 1e-3 < scale <= np.abs(weights).max():
            off = np.minimum(np.abs(weights), np.abs(np.abs(weights) - scale))
            best = min(best, (off ** 2 * importance).sum())
    assert errors(weights, name, importance, "high")[0] <= best * (1 + 1e-6)


def test_a_longer_search_leaves_what_is_exact():
    rng = np.random.default_rng(0)
    ternary_weights = (rng.integers(-1, 2, (4, 512)) * 0.375).astype(np.float32)
    for name in ("TQ1_0", "TQ2_0", "Q2_0"):
        for effort in ("normal", "high"):
            assert errors(ternary_weights, name, None, effort).sum() == 0
    signs = (rng.integers(0, 2, (4, 512)) * 2.0 - 1).astype(np.float32)
    assert errors(signs, "Q1_0", importances(512), "high").sum() == 0
    floats = np.array(fp4.LEVELS, np.float32)[rng.integers(0, 16, (4, 512))]
    floats[:, ::16] = 12
    for name in ("MXFP4", "NVFP4"):
        assert errors(floats, name, None, "high").sum() == 0


# ---- odd weights ------------------------------------------------------------------------------------------

@given(st.integers(0, 2 ** 32 - 1), st.sampled_from(NAMES), st.booleans(), st.sampled_from(["normal", "high"]),
       st.integers(-120, 40))
@settings(max_examples=60, deadline=None)
def test_whatever_the_weights_numbers_stay_near(seed, name, weighed, effort, power):
    """Zeros, repeats, signs, subnormals, one far weight, importances of zero: nothing is infinite, or off by twice its size."""
    rng = np.random.default_rng(seed)
    rows = np.ldexp(rng.choice([0, 1, 1, 1], (3, 256)) * rng.uniform(-1, 1, (3, 256)), power + rng.integers(-30, 1, (3, 256)))
    rows[1] = rows[1, 0]
    rows[2] = 0
    rows[2, seed % 256] = 2.0 ** power
    rows = rows.clip(-6e4, 6e4).astype(np.float32)
    importance = (rng.random(256) * rng.integers(0, 2, 256)).astype(np.float32) if weighed else None
    found = formats.dequantize(formats.quantize(rows, name, importance, effort), name).numpy()
    assert np.isfinite(found).all()
    counts = importance > 0 if weighed else np.ones(256, bool)
    size = np.abs(rows).max(1, keepdims=True)
    assert (np.abs(found - rows)[:, counts] <= 2.01 * size + 6.2e-8 * 127).all()


@pytest.mark.parametrize("effort", ["normal", "high"])
@pytest.mark.parametrize("name", FLOAT16_SCALES)
def test_what_no_scale_can_hold_is_an_error(name, effort):
    rows = normal(4)
    for far in (3e9, 1e25, 3e38):
        rows[2, 77] = far
        with pytest.raises(LabError, match="weight 77 of row 2 is .* Store this tensor as BF16 or F32"):
            formats.quantize(rows, name, effort=effort)


def test_mxfp4_spans_what_floats_do():
    for far in (3e38, 1e25, 1e-30):
        rows = np.full((1, 32), far, np.float32)
        for effort in ("normal", "high"):
            out = formats.dequantize(formats.quantize(rows, "MXFP4", effort=effort), "MXFP4").numpy()
            assert (abs(out / rows - 1) < 0.26).all()


# ---- levels -----------------------------------------------------------------------------------------------

def test_the_nearest_level_is_found_to_the_last_bit():
    """llama.cpp compares x - lower with upper - x in float32, and takes the upper one where they are equal."""
    levels = np.array(iq4.LEVELS, np.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    x = np.concatenate([np.nextafter(middles, np.float32(-1e9)), middles, np.nextafter(middles, np.float32(1e9)),
                        levels, np.linspace(-400, 400, 4001), [0, -0.0, 1e-30, 3e38, -3e38]]).astype(np.float32)
    expected = []
    for number in x:
        upper = int(np.searchsorted(levels, number, side="right"))
        if upper in (0, 16):
            expected.append(min(upper, 15))
        else:
            expected.append(upper - 1 if number - levels[upper - 1] < levels[upper] - number else upper)
    one = torch.ones(1)
    assert iq4.TABLE.codes(torch.from_numpy(x)[:, None], one)[:, 0].tolist() == expected
    assert iq4.TABLE.nearest(torch.from_numpy(x)[:, None], one)[:, 0].tolist() == levels[expected].tolist()


def test_fractions_are_levels_too():
    table = Levels((-0.5, 0.1, 0.25), fineness=1 << 10)
    x = torch.tensor([[-9.0], [-0.21], [-0.19], [0.17], [0.18], [2.0]])
    assert table.codes(x, torch.ones(1))[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert table.errors(x[1:4], torch.ones(3, 1), torch.ones(1)).item() == pytest.approx(0.29 ** 2 * 2 + 0.07 ** 2)


def test_places_reach_from_one_to_the_other():
    places = both_sides(2, 5)
    assert min(map(abs, places)) == 2 and max(places) >= 5 and abs(sum(places)) < 1e-9
    assert all(high / low < 1.07 for low, high in zip(sorted(p for p in places if p > 0)[:-1],
                                                      sorted(p for p in places if p > 0)[1:], strict=True))
    assert inverse_of(torch.tensor([0.0, 4.0])).tolist() == [0, 0.25]


def test_importances_lie_with_their_columns():
    x, importance = torch.arange(2 * 128.0).view(2, 128), torch.arange(128.0)
    for groups in (1, 2):
        laid = x.view(-1, groups, 32).permute(2, 1, 0)
        assert torch.equal(counted(laid, importance), laid % 128)
    columns = x.view(-1, 64).t()
    assert torch.equal(counted(columns, importance), columns % 128)


def test_mxfp4s_scale_is_a_rounded_logarithms():
    """Just below a power of two the logarithm rounds up to it: the farther from 1, the sooner."""
    def byte(number: float) -> int:
        return int(fp4._exponents(torch.tensor([number]))[0])

    for power in (-60, -9, 0, 1, 30, 100):
        assert byte(2.0 ** power) == byte(1.5 * 2.0 ** power) == 125 + power
        assert byte(np.nextafter(np.float32(2.0 ** power), np.float32(0))) == 125 + power - (power in (0, 1))
    assert byte(0.0) == 0 and byte(3.4e38) == 252
    assert all(byte(2.0 ** power) != 255 for power in range(-149, 128))


def test_eight_bit_floats_are_rounded_as_llama_cpp_rounds():
    every = torch.arange(0x7F, dtype=torch.uint8)
    values = 2 * fp4.e4m3(torch.device("cpu"))[every.int()]
    kept = values < 248
    assert torch.equal(fp4._as_e4m3(values)[kept], every[kept])
    middle = (values[8:0x76] + values[9:0x77]) / 2
    assert torch.equal(fp4._as_e4m3(middle), every[9:0x77]), "halves go up"
    assert fp4._as_e4m3(torch.tensor([248.0, 300.0, 1e9, 0.0, 2.0 ** -11, 2.0 ** -10])).tolist() == [0x7E] * 3 + [0, 0, 1]


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_between_two_four_bit_floats_the_smaller_is_taken(name):
    rows = np.zeros((1, 64), np.float32)
    rows[0, ::16] = 6
    rows[0, 1:15] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5]
    out = formats.dequantize(formats.quantize(rows, name), name)[0, 1:15].tolist()
    assert out == [0, 0.5, 1, 1.5, 2, 3, 4, 0, -0.5, -1, -1.5, -2, -3, -4]


def test_ternary_digits_come_back():
    rng = np.random.default_rng(0)
    digits = rng.integers(-1, 2, (5, 512)).astype(np.float32)
    digits[:, ::256] = 1
    for name in ("TQ1_0", "TQ2_0"):
        assert np.array_equal(formats.dequantize(formats.quantize(digits, name), name).numpy(), digits)
    halves = torch.tensor([[1.0, 0.5, np.nextafter(np.float32(0.5), np.float32(0)), -0.5, 0.25]])
    assert ternary._digits(halves, torch.ones(1)).tolist() == [[2, 2, 1, 0, 1]], "a half goes away from zero"


# ---- bitsandbytes -----------------------------------------------------------------------------------------

SHAPES = ((64, 1024), (130, 70), (1024,), (5, 2), (3, 65), (1, 1))      # the second, fourth and later end in half a run


def odd_tensors():
    rng = np.random.default_rng(0)
    far = torch.zeros(8, 64)
    far[3, 7] = -2
    yield from (far, torch.zeros(4, 128), torch.full((4, 128), 1e-42), torch.full((4, 128), -3.0))
    yield torch.from_numpy(rng.integers(-12, 13, (64, 512)) / 12).float()       # borders, and levels themselves


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_bitsandbytes_own(kind, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    rng = np.random.default_rng(1)
    tensors = [torch.from_numpy(rng.standard_t(3, shape)).to(dtype) for shape in SHAPES
               for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    for weights in (*tensors, *odd_tensors()):
        for blocksize in (32, 64, 4096):
            packed, state = functional.quantize_4bit(weights, blocksize=blocksize, quant_type=kind, compress_statistics=nested)
            ours = bnb.quantize_4bit(weights, kind, blocksize, nested)
            said = (weights.shape, weights.dtype, blocksize)
            assert torch.equal(ours.packed, packed.view(-1)) and torch.equal(ours.maxima, state.absmax), said
            if nested:
                assert torch.equal(ours.nested.maxima, state.state2.absmax), said
                assert torch.equal(ours.nested.table, state.state2.code) and torch.equal(ours.nested.offset, state.offset), said


def test_eight_bits_are_bitsandbytes_own():
    functional = pytest.importorskip("bitsandbytes.functional")
    rng = np.random.default_rng(1)
    for weights in (torch.from_numpy(rng.standard_t(3, (65, 130))), torch.randn(7, 1).bfloat16(), *odd_tensors()):
        codes, maxima, _ = functional.int8_vectorwise_quant(weights.half())
        ours = bnb.quantize_int8(weights)
        assert torch.equal(ours[0], codes) and torch.equal(ours[1], maxima)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_reads_what_a_longer_search_found(kind):
    functional = pytest.importorskip("bitsandbytes.functional")
    weights, importance = torch.from_numpy(heavy()), torch.from_numpy(importances())
    found = bnb.quantize_4bit(weights, kind, importance=importance, effort="high")
    theirs = functional.dequantize_4bit(found.packed.view(-1, 1), functional.QuantState(
        found.maxima, weights.shape, functional.get_4bit_type(kind, device="cpu"), 64, kind, torch.float32))
    assert torch.equal(theirs, bnb.dequantize_4bit(*found[:2], kind, weights.shape))
    usual = bnb.quantize_4bit(weights, kind)
    before = ((bnb.dequantize_4bit(*usual[:2], kind, weights.shape) - weights) ** 2 * importance).sum()
    assert ((theirs - weights) ** 2 * importance).sum() < 0.8 * before


@pytest.mark.parametrize("name", ["NF4", "FP4"])
def test_blocks_hold_what_the_tensors_do(name):
    weights = normal()
    blocks = formats.quantize(weights, name)
    parts = bnb.quantize_4bit(torch.from_numpy(weights), name)
    assert torch.equal(blocks.view(-1, 36)[:, 4:].reshape(-1), parts.packed)
    assert torch.equal(blocks.view(-1, 36)[:, :4].contiguous().view(torch.float32).view(-1), parts.maxima)
    assert torch.equal(formats.dequantize(blocks, name), bnb.dequantize_4bit(*parts[:2], name, weights.shape))


def test_chunks_change_nothing(monkeypatch):
    weights, importance = torch.from_numpy(heavy(5, 200)), torch.from_numpy(importances(200))
    def all_ways():
        for kind, size, effort in (("nf4", 64, "normal"), ("fp4", 96, "high"), ("nf4", 5, "high")):
            yield from bnb.quantize_4bit(weights, kind, size, importance=importance, effort=effort)[:2]
        yield from bnb.quantize_int8(weights)

    whole = list(all_ways())
    monkeypatch.setattr(bnb, "CHUNK", 128)
    assert all(torch.equal(one, other) for one, other in zip(all_ways(), whole, strict=True))


def test_double_quantization_comes_back():
    weights = torch.from_numpy(normal(64))
    packed, maxima, nested = bnb.quantize_4bit(weights, "nf4", nested=True)
    once = bnb.quantize_4bit(weights, "nf4")
    assert maxima.dtype == torch.uint8 and maxima.numel() == weights.numel() // 64
    off = bnb.dequantize_4bit(packed, maxima, "nf4", weights.shape, nested=nested) - weights
    plain = bnb.dequantize_4bit(*once[:2], "nf4", weights.shape) - weights
    assert off.norm() < 1.01 * plain.norm()


def test_eight_bits_come_back():
    weights = torch.from_numpy(heavy())
    codes, maxima = bnb.quantize_int8(weights)
    assert (bnb.dequantize_int8(codes, maxima) - weights).abs().amax(1).le(maxima / 127 * 0.51 + 1e-4).all()


@pytest.mark.parametrize(("call", "says"), [
    (lambda w: bnb.quantize_4bit(w, "nf5"), "'nf5' is no four-bit kind"),
    (lambda w: bnb.quantize_4bit(w, "nf4", 0), "a run of 0 weights"),
    (lambda w: bnb.quantize_4bit(w, "nf4", effort="most"), "effort is 'most'"),
    (lambda w: bnb.quantize_4bit(w, "nf4", importance=torch.ones(9)), r"importance is \[9\] for rows of 64"),
    (lambda w: bnb.quantize_4bit(w / 0, "fp4"), "weight 0 is inf"),
    (lambda w: bnb.quantize_int8(w[0]), r"weights are \[64\]; a matrix"),
    (lambda w: bnb.quantize_int8(w * 1e6), r"weight 0 of row 0 is 1000000.0; finite numbers up to 65504"),
    (lambda w: bnb.quantize_int8(w * torch.nan), "weight 0 of row 0 is nan"),
])
def test_bad_input_is_named(call, says):
    with pytest.raises(LabError, match=says) as caught:
        call(torch.ones(4, 64))
    assert "\n" not in str(caught.value)
