"""Toy formats, what rounding costs, and the quantization panel without a browser."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import llmlab
from llmlab import catalog
from llmlab.errors import LabError
from llmlab.formats import FORMATS, dequantize
from llmlab.formats.looking import take_apart
from llmlab.formats.toy import BITS, BLOCKS, SCALES, Toy
from llmlab.kernels import linear, pack
from llmlab.lab import quantization_figures
from llmlab.lab.quantization_boxes import quality_words
from llmlab.lab.quantization_figures import errors_picture, quality_picture, rates_picture, values_picture
from llmlab.lab.quantization_panel import QuantizationExplorer
from llmlab.lab.quantization_state import QuantizationState
from llmlab.lab.quantization_twin import TwinState
from llmlab.quality.weights import weight_error
from llmlab.retyping import as_stored, is_block_matrix, retyped

TOYS = [Toy(bits, block, zero, scale) for bits in BITS for block in (8, 32, 96) for zero in (False, True) for scale in SCALES]


@pytest.fixture(autouse=True)
def formats_as_before():
    """Toys that a test makes are known to no other."""
    before = dict(FORMATS)
    yield
    for name in set(FORMATS) - set(before):
        del FORMATS[name]


@pytest.fixture(scope="module")
def file():
    return llmlab.fetch("smollm2-135m")


@pytest.fixture(scope="module")
def state(file):
    return QuantizationState(file=str(file), tensor="blk.0.attn_q.weight")


@pytest.fixture
def panel(file):
    return QuantizationExplorer(str(file), tensor="blk.0.attn_q.weight")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 0.1


# ---- toy formats --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
def test_every_weight_is_within_half_a_level_and_every_byte_is_shown(toy):
    weights = noise(3, 192)
    blocks = toy.quantize(weights)
    known = toy.format
    assert blocks.shape == (3, 192 // toy.block * known.block_bytes) and known.bits == known.block_bytes * 8 / toy.block
    back, found = dequantize(blocks, toy.name), toy.unpack(blocks.view(-1, known.block_bytes))
    error = (back - weights).view(-1, toy.block).abs()
    # Symmetric levels have none for the end that is opposite to the farthest weight: one level is missed there; a scale or
    # minimum in float16 is off by up to 2^-11 of itself, and as many codes later by that many times as much.
    reach = found.scale.abs() * (0.5 + (not toy.minimum)) + weights.abs().max() * 2 ** -10
    assert (error <= reach).all()
    parts = take_apart(blocks[0, :known.block_bytes].contiguous(), toy.name)
    assert bytes.fromhex(" ".join(part.bytes for part in parts)) == bytes(blocks[0, :known.block_bytes].tolist())
    assert all(part.values for part in parts)
    assert np.allclose(parts[-1].values["weights"], back[0, :toy.block].numpy())


def test_a_toy_laid_out_as_q4_1_or_q4_0_says_what_that_says():
    block = torch.randint(0, 256, (50, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    block[:, 0], block[:, 1] = 0xF0, 0x0F        # every block has code 0 and code 15
    head = torch.tensor([0.02, -0.11], dtype=torch.float16).view(torch.uint8).expand(50, 4)
    weights = dequantize(torch.cat([head, block], 1), "Q4_1")
    toy = Toy(4, 32, True, "F16")
    assert torch.equal(dequantize(toy.quantize(weights), toy.format.name), weights)
    q4_0 = dequantize(torch.cat([head[:, :2], block], 1), "Q4_0")
    toy = Toy(4, 32, False, "F16")
    assert torch.equal(dequantize(toy.quantize(q4_0), toy.format.name), q4_0)


def test_a_toy_is_multiplied_by_like_any_other_format():
    weights, x = noise(64, 192), noise(2, 192)
    for toy in (Toy(3, 32), Toy(8, 8, True, "F32"), Toy(5, 96, False, "E8M0")):
        blocks = toy.quantize(weights)
        expected = x @ dequantize(blocks, toy.format.name).T
        for strategy in ("compact", "fast", "reference"):
            assert torch.allclose(linear(x, pack(blocks, toy.name, strategy)), expected, atol=1e-5), (toy.name, strategy)


def test_zeros_large_numbers_and_what_is_none():
    for toy in (Toy(minimum=False), Toy(minimum=True), Toy(scale="E8M0", minimum=False)):
        assert (dequantize(toy.quantize(torch.zeros(1, 32)), toy.format.name) == 0).all()
        with pytest.raises(LabError, match="no numbers"):
            toy.quantize(torch.full((1, 32), torch.nan))
    with pytest.raises(LabError, match="too large for a float16"):
        Toy().quantize(torch.full((1, 32), 1e6))
    assert torch.equal(dequantize(Toy(scale="F32").quantize(torch.full((1, 32), 1e6)), Toy(scale="F32").format.name),
                       torch.full((1, 32), 1e6))
    with pytest.raises(LabError, match="rows of 30 weights do not divide"):
        Toy().quantize(torch.zeros(1, 30))


@pytest.mark.parametrize(("wrong", "words"), [({"bits": 9}, "bits is 9"), ({"bits": True}, "bits is True"),
                                              ({"bits": 4.0}, "4.0"), ({"block": 33}, "block size is 33"),
                                              ({"scale": "F8"}, "scale is 'F8'"), ({"minimum": 1}, "minimum is 1")])
def test_what_is_no_format_is_refused(wrong, words):
    with pytest.raises(LabError, match=words):
        Toy(**wrong)


def test_a_name_means_one_layout():
    names = {Toy(b, k, m, s).name for b in BITS for k in BLOCKS for m in (False, True) for s in SCALES}
    assert len(names) == len(BITS) * len(BLOCKS) * 2 * len(SCALES)
    assert Toy().format == Toy().format == FORMATS["TOY4_32M_F16"]


# ---- errors and sizes ---------------------------------------------------------------------------------------

def test_the_error_of_rounding():
    found = weight_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    assert (found.weights, found.largest, found.unchanged) == (2, 0.5, 0.5)
    assert found.relative_rms == pytest.approx(0.5 / 5) and found.rms == pytest.approx((25 / 2) ** 0.5)
    assert found.counts.sum() == 2 and found.counts[-1] == 1 and found.counts[len(found.counts) // 2] == 1
    errors = noise(4000)
    mine = weight_error(torch.zeros(4000), errors)
    numpy = np.histogram(errors.numpy(), mine.edges)[0]
    assert np.abs(mine.counts - numpy).max() <= 2 and mine.counts.sum() == 4000        # the edges themselves are rounded
    for pair in ((torch.zeros(2), torch.zeros(3)), (torch.zeros(0), torch.zeros(0))):
        with pytest.raises(LabError, match="as many originals"):
            weight_error(*pair)
    assert weight_error(torch.zeros(3), torch.zeros(3)).relative_rms == 0


def test_sizes_are_those_of_llmlab_size(file):
    spec = llmlab.model(str(file))
    assert as_stored(spec).tensor_bytes == llmlab.size(spec).tensor_bytes
    assert retyped(spec, FORMATS["Q4_1"]) == as_stored(spec), "what it is stored in already"
    grown = retyped(spec, FORMATS["Q8_0"]).tensor_bytes - as_stored(spec).tensor_bytes
    assert grown == sum(t.elements for t in spec.tensors if is_block_matrix(t.name, t.shape)) // 32 * (34 - 20)
    with pytest.raises(LabError, match="blk.0.attn_k.weight is 576 weights wide.*blocks of 128"):
        retyped(spec, Toy(block=128).format)
    with pytest.raises(LabError, match="no GGUF"):
        retyped(llmlab.model("llama-3-8b"), FORMATS["Q8_0"])
    assert not any(is_block_matrix(*one) for one in (("token_embd.weight", (5, 5)), ("blk.0.attn_norm.weight", (5,)),
                                                     ("blk.0.ffn_gate_inp.weight", (5, 5)), ("blk.0.attn_q.bias", (5,))))


# ---- the state ----------------------------------------------------------------------------------------------

def test_a_look_is_what_the_file_holds(file):
    from llmlab.gguf import read_gguf
    state = QuantizationState(file=str(file), tensor="blk.3.ffn_up.weight", row=7, block=2)
    gguf = read_gguf(file)
    row = gguf.data("blk.3.ffn_up.weight").reshape(1536, -1)[7]
    look = state.look
    assert look.start == 64 and bytes.fromhex(" ".join(part.bytes for part in look.parts)) == row[40:60].tobytes()
    weights = dequantize(row[None].copy(), "Q4_1")
    assert np.array_equal(look.original, weights[0, 64:96].numpy())
    assert np.array_equal(look.rounded, dequantize(Toy(minimum=False).quantize(weights), look.toy.name)[0, 64:96].numpy())
    whole = dequantize(gguf.data("blk.3.ffn_up.weight").reshape(1536, -1).copy(), "Q4_1").double()
    back = dequantize(Toy(minimum=False).quantize(whole), look.toy.name).double()
    assert look.error.relative_rms == pytest.approx(float((back - whole).norm() / whole.norm()), rel=1e-5) and look.of == 1
    assert state.places() == (1536, 18)
    levels = look.levels[0][2]
    assert len(levels) == 16 and np.isin(look.rounded, levels.astype(np.float32)).all()


def test_the_toy_of_the_files_own_layout_changes_nothing(state):
    state.update(bits=4, minimum=True, block_size=32, scale="F16")
    assert state.look.error.unchanged == 1 and "comes back to the bit" in state.answer
    assert state.look.size.tensor_bytes == state.look.stored_size.tensor_bytes
    state.update(minimum=False)


@pytest.mark.parametrize(("setting", "value", "words"), [
    ("bits", 9, "bits is 9"), ("row", 576, "has no row 576; there are 576"), ("block", 18, "no block 18; there are 18"),
    ("row", "x", "no row 'x'"), ("tensor", "nothing", "'nothing' is no matrix"), ("block_size", 7, "block size is 7"),
    ("block_size", 256, "do not divide"), ("file", "nowhere.gguf", "nowhere.gguf does not exist"), ("file", 5, "file is 5")])
def test_what_cannot_be_used_is_said_and_the_last_good_stays(state, setting, value, words):
    good, before = state.look, getattr(state, setting)
    setattr(state, setting, value)
    assert words in state.error and state.look is good
    setattr(state, setting, before)
    assert not state.error


def test_settings_are_checked(state, file):
    with pytest.raises(LabError, match="'heat' is no setting"):
        state.update(heat=1)
    with pytest.raises(LabError, match="bits is 1"):
        QuantizationState(file=str(file), bits=1)


def test_another_tensor_is_looked_at_from_its_start_where_the_place_is_not_there(state):
    state.update(tensor="token_embd.weight", row=40_000, block=3)
    assert state.look.of < 0.05 and "evenly spread" in state.answer
    state.tensor = "blk.0.attn_q.weight"
    assert (state.row, state.block, state.error) == (0, 3, "")
    state.update(block=0)


def test_a_scale_that_no_width_divides_by_is_said_where_the_size_stands(file):
    state = QuantizationState(file=str(file), tensor="blk.0.ffn_down.weight", block_size=128)
    assert state.look.size is None and "blk.0.attn_k.weight is 576 weights wide" in state.answer
    with pytest.raises(LabError, match="576 weights wide"):
        TwinState(state).start()


# ---- figures ------------------------------------------------------------------------------------------------

def test_figures_hold_what_was_looked_at(state):
    picture = values_picture(state.look)
    assert np.array_equal(picture["data"][1]["y"], state.look.original)
    assert np.array_equal(picture["data"][2]["y"], state.look.rounded)
    assert {y for y in picture["data"][0]["y"] if y is not None} == set(state.look.levels[0][2].tolist())
    bars = errors_picture(state.look)
    assert sum(bars["data"][0]["y"]) == pytest.approx(100)
    low, high = bars["layout"]["xaxis"]["range"]
    assert low <= min(bars["data"][0]["x"]) and max(bars["data"][0]["x"]) <= high


@pytest.mark.parametrize("damage", ["loss", "mean_kld"])
@pytest.mark.parametrize("size", ["bits", "bytes"])
def test_published_quality_is_drawn_as_published(size, damage):
    plain, matrix = quality_picture(size, damage)["data"]
    points = len(plain["x"]) + len(matrix["x"])
    assert points == len(catalog.quality()) - (damage == "loss")        # f16 itself has lost nothing
    at = [text.partition("<br>")[0] for text in matrix["customdata"]].index("IQ4_XS, importance matrix")
    row = catalog.quality()["IQ4_XS", True]
    assert matrix["y"][at] == pytest.approx(row.loss * 100 if damage == "loss" else row.mean_kld)
    assert matrix["x"][at] == pytest.approx(row.bits if size == "bits" else row.bytes / 2**30)
    assert "Q4_K_M 4.89 bits +2.8%" in quality_words()


@pytest.mark.parametrize("damage", ["loss", "mean_kld"])
def test_measured_quality_is_drawn_beside_the_published(damage):
    plain, matrix, mixes, longer, published = rates_picture(damage)["data"]
    ours = [row for row in catalog.measured_quality().values() if getattr(row, damage) > 0]
    assert sum(len(trace["x"]) for trace in (plain, matrix, mixes, longer)) == len(ours)
    assert len(published["x"]) == len(catalog.quality()) - 1        # f16 itself is no point
    assert all(text.startswith("mix at ") for text in mixes["text"])
    at = [text.partition("<br>")[0] for text in plain["customdata"]].index("Q4_K_M")
    row = catalog.measured_quality()["Q4_K_M", False]
    assert plain["x"][at] == row.bits and plain["text"][at] == "Q4_K_M"
    assert plain["y"][at] == pytest.approx(row.loss * 100 if damage == "loss" else row.mean_kld)
    assert all(" high" in text.partition("<br>")[0] for text in longer["customdata"])


def test_a_chart_says_how_fast_where_that_was_measured(monkeypatch):
    rows = catalog.measured_quality() | {("Q4_K_M", False): replace(catalog.measured_quality()["Q4_K_M", False],
                                                                     tokens_per_second=81.6)}
    monkeypatch.setattr(quantization_figures, "measured_quality", lambda: rows)
    plain = rates_picture("mean_kld")["data"][0]["customdata"]
    assert [text.endswith("<br>82 tokens/s") for text in plain if text.startswith("Q4_K_M<br>")] == [True]


# ---- the panel ----------------------------------------------------------------------------------------------

def test_the_panel_and_its_state_move_each_other(panel):
    panel.bits.value, panel.block_size.value = 3, 64
    assert (panel.state.bits, panel.state.block_size, panel.state.toy.name) == (3, 64, "TOY3_64_F16")
    assert "TOY3_64_F16" in panel.said.html and "TOY3_64_F16" in panel.answer
    assert np.array_equal(panel.values.figure.data[2].y, panel.state.look.rounded)
    panel.state.update(tensor="token_embd.weight", minimum=True, scale="E8M0", row=5)
    widgets = panel.tensor, panel.minimum, panel.scale, panel.row
    assert [one.value for one in widgets] == ["token_embd.weight", True, "E8M0", 5]
    assert panel.row.max == 49151 and [row["cells"][0] for row in panel.parts.rows] == [
        "scale", "codes", "codes", "scales", "weights"]
    panel.state.bits = 12
    assert "bits is 12" in panel.said.html and panel.answer.startswith("bits is 12") and panel.bits.value == 3
    panel.state.bits = 4
    assert "bits is 12" not in panel.said.html


def test_a_file_is_opened_by_its_path_or_said_to_be_none(panel, file):
    enter(panel.file, "nowhere.gguf")
    assert "does not exist" in panel.said.html and panel.state.look and panel.state.file == str(file)
    enter(panel.file, "smollm2-135m")
    assert not panel.state.error and panel.file.placeholder == file.name


def enter(text, words):
    text.value = words
    text._handle_msg({"content": {"data": {"method": "custom", "content": {"event": "submit"}}}, "buffers": []})


def test_folds_show_published_quality(panel):
    box = panel.unfold("published quality")
    box.size.value, box.damage.value = "bytes", "mean_kld"
    assert box.chart.figure.layout.yaxis.title.text == "mean KL divergence, nats" and "wikitext-2" in box.words.html


# ---- two models ---------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_two_models_side_by_side(panel):
    """What runs is what was predicted, to the byte; what it says is text; the twin of the file's own layout says the same."""
    twin, box, seen = panel.twin, panel.unfold("run it"), []
    twin.observe(lambda change: seen.append(change["new"]), "texts")
    panel.state.update(bits=4, minimum=True)
    twin.update(tokens=4, prompt="What is the capital of France?")
    answer = twin.run()
    assert "the same." in answer and twin.drift.max_kld == 0 and "KLD 0, measured" in answer
    model, made = twin.models
    assert made.get_memory_footprint() > 0 and model.llmlab.path in made.llmlab.path
    held = sum(one.blocks.nbytes for _, one in made.packed()) + sum(one.nbytes for one in made.parameters())
    assert held == panel.state.look.size.tensor_bytes

    panel.state.update(minimum=False, bits=3)
    assert "KLD" in twin.run() and twin.drift.mean_kld.value > 0.5
    assert twin.models[0] is model and twin.models[1] is not made, "the model is loaded once, a twin made for each format"
    assert len([pair for pair in seen if any(pair)]) >= 2, "the texts grew"
    assert [talk.turns[0][0] for talk in box.talks] == ["as stored in Q4_1", "in TOY3_32_F16"]
    assert box.talks[0].turns[0][1] == twin.texts[0] and not box.start.disabled and box.stop.disabled

    box.start.click()
    with pytest.raises(LabError, match="are running"):
        twin.start()
    box.stop.click()
    assert twin.wait(60) and twin.progress == "Stopped." and not twin.error


@pytest.mark.parametrize(("wrong", "words"), [({"tokens": 0}, "tokens is 0"), ({"prompt": " "}, "nothing to continue")])
def test_a_run_that_cannot_be_is_refused(state, wrong, words):
    twin = TwinState(state, **wrong)
    with pytest.raises(LabError, match=words):
        twin.start()
    assert twin.answer == "Nothing was run yet."
    with pytest.raises(LabError, match="nothing was run yet"):
        _ = twin.models
    with pytest.raises(LabError, match="'heat' is no setting"):
        twin.update(heat=1)
