"""The cards' 4-bit matmul: what is handed to it, by the layout its public source has, worked out on the CPU; on a card, itself.

`lay` and `multiplied` stand in for the two operators, one from how they pack (ATen's int4mm.cu), the other from how a tensor
core takes its operand (PTX, mma.m16n8k16, fragment B). They are registered as the operators' CPU kernels, so that the code
under test runs as it is and torch checks the arguments.
"""

import sys
from pathlib import Path

import kernel_checks as checks
import pytest
import torch
from kernel_checks import COLS, ROWS, blocks, error, exact

from llmlab import formats, kernels
from llmlab.errors import LabError
from llmlab.kernels import arithmetic, choosing, codes, compact, nibbles, numbers, packing, scratch, tinygemm
from llmlab.kernels.unpacking import levels
from llmlab.runtime.decoder import Decoder

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import bench_gpu as bench

BF16 = torch.bfloat16
MEASURE = tinygemm.tokens
FITTING = [name for name in checks.runnable() if nibbles.planes(levels(name))]


def lay(pairs: torch.Tensor, inner: int) -> torch.Tensor:
    """Bytes uint8 [rows, width / 2] as words int32 [rows / 8, width / (16 * inner), 32, inner / 2]."""
    assert pairs.dtype == torch.uint8 and pairs.is_contiguous() and inner in (2, 4, 8)
    rows, width = pairs.shape[0], pairs.shape[1] * 2
    assert rows % 8 == 0 and width % (16 * inner) == 0
    tile, outer, lane, word = torch.meshgrid(*map(torch.arange, (rows // 8, width // (16 * inner), 32, inner // 2)),
                                             indexing="ij")
    first = (outer * inner + 2 * word) * 8 + lane % 4       # of the byte that a lane takes from the first of two tiles
    found = torch.zeros(first.shape, dtype=torch.int64)
    for i, step in enumerate((0, 4, 8, 12)):
        byte = pairs[tile * 8 + lane // 4, first + step].long()
        found |= (byte >> 4) << 4 * i | (byte & 15) << 16 + 4 * i
    return (found - (found >> 31 << 32)).int()


def taken(words: torch.Tensor) -> torch.Tensor:
    """The nibbles [rows, width] as lanes hold them: register r of tile t has, for row lane / 4, columns 8 r + 2 (lane % 4) and
    the next one, the first in its low half."""
    tiles, outers, _, wide = words.shape
    inner, found = 2 * wide, torch.full((tiles * 8, outers * wide * 32), -1, dtype=torch.int32)
    tile, outer, lane, word = torch.meshgrid(*map(torch.arange, words.shape), indexing="ij")
    for t in range(2):
        for r in range(2):
            for half in range(2):
                column = (outer * inner + 2 * word + t) * 16 + 8 * r + 2 * (lane % 4) + half
                found[tile * 8 + lane // 4, column] = words >> (16 * half + 4 * (2 * t + r)) & 15
    assert int(found.min()) >= 0        # no column without a nibble
    return found


def weights(words: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    """What the operator multiplies by: one multiplication and addition, rounded to bfloat16 once."""
    codes = taken(words)
    both = scales.double().repeat_interleave(group, 0).transpose(0, 1)
    return ((codes - 8) * both[..., 0] + both[..., 1]).to(BF16)


def multiplied(x, words, group, scales):
    assert x.dtype == scales.dtype == BF16 and words.dtype == torch.int32 and group in (32, 64, 128, 256)
    assert x.is_contiguous() and words.is_contiguous() and x.ndim == 2 and words.ndim == 4
    inner = 2 * words.shape[3]
    assert words.shape[1] == x.shape[1] // (inner * 16) and x.shape[1] % group == 0
    assert scales.is_contiguous() and scales.shape == (x.shape[1] // group, words.shape[0] * 8, 2)
    return (x.double() @ weights(words, group, scales).double().T).float().to(BF16)


@pytest.fixture
def operators(monkeypatch):
    library = torch.library.Library("aten", "IMPL")
    library.impl("_convert_weight_to_int4pack", lay, "CPU")
    library.impl("_weight_int4pack_mm", multiplied, "CPU")
    monkeypatch.setattr(tinygemm, "tokens", lambda device, passes: max(checks.TOKENS))
    yield
    library._destroy()


def pack(format, rows=ROWS, cols=COLS, device="cpu"):
    data = blocks(format, rows, cols).to(device)
    return tinygemm.TinyGemm(data, format, exact(format, rows, cols).shape[1])


# -- the layout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [2, 4, 8])
def test_what_is_packed_is_what_lanes_take(inner):
    nibbles = torch.randint(0, 16, (24, 256), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    words = lay(tinygemm.as_pairs(nibbles), inner)
    assert torch.equal(taken(words), nibbles)
    meta = torch.ops.aten._convert_weight_to_int4pack(tinygemm.as_pairs(nibbles).to("meta"), inner)
    assert words.shape == meta.shape and words.dtype == meta.dtype


def test_the_even_column_is_in_the_high_half():
    assert tinygemm.as_pairs(torch.tensor([[1, 2, 15, 0]], dtype=torch.int32)).tolist() == [[0x12, 0xF0]]


def test_inner_tiles_divide_the_width():
    assert [tinygemm.inner_tiles(width) for width in (4096, 14336, 64 * 3, 32 * 5, 32)] == [8, 8, 4, 2, 2]


@pytest.mark.parametrize("format", FITTING)
def test_the_weights_laid_down_are_the_formats(operators, format):
    """Read back by the layout, planes and halves added up: the weights but for scales and sums rounded to bfloat16."""
    made, true = pack(format), exact(format)
    width, run = true.shape[1], made.group // made.halves
    total = torch.zeros(ROWS, width // run // made.halves, made.halves, run, dtype=torch.float64)
    for half in range(made.halves):
        found = weights(made.nibbles, made.group, made.by_half[half]).double()[:ROWS]
        total[:, :, half] = found.view(ROWS, made.planes, width).sum(1).view(total.shape)[:, :, half]
    true = true.view(ROWS, -1, run)
    off = (total.view(true.shape) - true).abs() / true.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    assert error(total.view(true.shape), true) < 4e-3
    # scale, zero and each plane's sum lose half a unit in the eighth bit
    assert float(off.max()) < 6 * 2.0**-9 * made.planes
    assert int(taken(made.nibbles)[ROWS:].max()) == 0


@pytest.mark.parametrize("rows", [9, 200])
@pytest.mark.parametrize("format", ["Q4_0", "Q4_K", "Q5_K", "Q3_K", "Q2_K", "Q6_K", "TQ2_0", "IQ4_XS"])
def test_many_tokens_by_numbers_out_of_the_nibbles(operators, monkeypatch, format, rows):
    monkeypatch.setattr(scratch, "CPU_WEIGHTS", 64 * COLS)
    monkeypatch.setattr(compact, "multiply_in", lambda given, device: given)
    made, true = pack(format, rows), exact(format, rows)
    made.blocks = made.blocks[:0]       # they are not read
    for words in (made.nibbles[:3], made.nibbles):
        true_nibbles = taken(words)
        assert torch.equal(tinygemm.taken(words, torch.full(true_nibbles.shape, -1)), true_nibbles)
    found = torch.cat([weights.clone() for _, weights in made.chunks(BF16)])
    assert found.dtype == BF16 and error(found, true) < 4e-3
    x = torch.randn(made.limit + 1, COLS, generator=torch.Generator().manual_seed(0)).to(BF16)
    g = torch.randn(3, rows, generator=torch.Generator().manual_seed(0)).to(BF16)
    assert error(made.matmul(x), x.double() @ true.T) < checks.LIMIT[BF16]
    assert error(made.transposed(g), g.double() @ true) < checks.LIMIT[BF16]


# -- exact enough ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FITTING)
def test_every_format_that_fits(operators, monkeypatch, format):
    made, true = pack(format), exact(format)
    used = []
    monkeypatch.setattr(compact.Compact, "matmul", lambda self, x: used.append(x))
    for count in checks.TOKENS:
        x = torch.randn(count, true.shape[1], generator=torch.Generator().manual_seed(count)).to(BF16)
        y = made.matmul(x)
        assert y.shape == (count, ROWS) and y.dtype == BF16 and y.is_contiguous()
        assert error(y, x.double() @ true.T) < checks.LIMIT[BF16]
    assert not used


@pytest.mark.parametrize("cols", [32, 96, 160, 192, 544])
@pytest.mark.parametrize("format", ["Q4_0", "Q8_0", "Q5_1"])
def test_any_width_of_blocks(operators, format, cols):
    made, true = pack(format, 9, cols), exact(format, 9, cols)
    x = torch.randn(3, cols, generator=torch.Generator().manual_seed(0)).to(BF16)
    assert error(made.matmul(x), x.double() @ true.T) < checks.LIMIT[BF16]


def test_beyond_its_tokens_and_for_other_types_by_the_blocks(operators):
    made, true = pack("Q4_K"), exact("Q4_K")
    torch.manual_seed(0)
    for x in (torch.randn(65, COLS).to(BF16), torch.randn(1, COLS), torch.randn(2, COLS).half()):
        y = made.matmul(x)
        assert y.dtype == x.dtype and error(y, x.double() @ true.T) < checks.LIMIT[x.dtype]
    assert torch.equal(made.dense(torch.float32), true.float())
    assert torch.equal(made.take(torch.tensor([3, 66]), torch.float32), true[[3, 66]].float())
    g = torch.randn(2, ROWS).to(BF16)
    assert error(made.transposed(g), g.double() @ true) < checks.LIMIT[BF16]
    assert made.matmul(torch.empty(0, COLS, dtype=BF16)).shape == (0, ROWS)


def test_a_matrix_without_rows(operators):
    none = tinygemm.TinyGemm(torch.empty(0, 288, dtype=torch.uint8), "Q4_K", COLS)
    assert none.matmul(torch.randn(2, COLS).to(BF16)).shape == (2, 0)


def test_laid_down_in_tiles_as_in_one(operators, monkeypatch):
    for format in ("Q4_K", "Q5_K"):
        whole = pack(format, 200)
        monkeypatch.setattr(scratch, "CPU_WEIGHTS", 64 * COLS)
        tiled = pack(format, 200)
        monkeypatch.setattr(scratch, "CPU_WEIGHTS", 1 << 20)
        assert torch.equal(whole.nibbles, tiled.nibbles) and torch.equal(whole.scales, tiled.scales)


def test_what_it_holds_is_what_it_was_chosen_by(operators):
    for format in ("Q4_0", "Q4_K", "Q5_K", "IQ4_XS", "Q3_K"):
        assert pack(format, 64).bytes() * 8 == nibbles.bits(levels(format), BF16) * 64 * COLS
    made = choosing.kernel(choosing.Recipe("numbers", 16, ""), blocks("Q6_K"), "Q6_K", COLS, BF16)
    assert made.bytes() * 8 == 16 * ROWS * COLS


def test_codes_that_no_random_block_shows_are_not_cut_off(operators, monkeypatch):
    monkeypatch.setattr(tinygemm, "levels", lambda type: levels("Q4_0")._replace(high=3))
    with pytest.raises(LabError, match="Q4_0 blocks hold codes beyond -8 to 3"):
        pack("Q4_0")


@pytest.mark.parametrize("format", ["Q4_K", "Q3_K", "IQ4_XS"])
def test_a_cards_tensors_go_through_torchs_own_checks(operators, format):
    """Shapes, types and devices of every step on a card, as torch's fake tensors see them."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    made = pack(format)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made.nibbles = torch.empty_like(made.nibbles, device="cuda")
        made.by_half = tuple(torch.empty_like(half, device="cuda") for half in made.by_half)
        made.only = None if made.only is None else torch.empty_like(made.only, device="cuda")
        y = made.matmul(torch.empty(1, COLS, dtype=BF16, device="cuda"))
    assert y.device.type == "cuda" and y.shape == (1, ROWS) and y.dtype == BF16


@pytest.mark.parametrize("quant", ["Q4_K_M", "IQ4_XS", "Q3_K_S"])
def test_a_model_by_it_diverges_as_little_as_on_a_processor(operators, monkeypatch, tmp_path, quant):
    """Every token's logits by the stand-ins, one by one and many at once, against float32."""
    shape = {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 384}
    bench.write_model(tmp_path / "model.gguf", bench.LLAMA_3_8B | shape, quant)
    text = list(range(3, 15))
    true = Decoder.open(tmp_path / "model.gguf", torch.float32, "compact").logits(text)
    kinds = {name: "tinygemm" if nibbles.passes(levels(name)) in (1, 2) else "numbers" for name in FITTING}
    monkeypatch.setattr(packing, "recipe", lambda format, *asked: choosing.Recipe(kinds[format], 0.0, kinds[format]))
    ours = Decoder.open(tmp_path / "model.gguf", BF16, "fast")
    assert {type(packed.kernels[0]) for _, _, packed in bench.matrices(ours)} >= {tinygemm.TinyGemm, numbers.Numbers}
    read, plain = {}, weights       # out of the layout once: it is the same at every token

    def once(words, group, scales):
        where = words.data_ptr(), scales.data_ptr()
        if where not in read:
            read[where] = plain(words, group, scales)
        return read[where]

    monkeypatch.setattr(sys.modules[__name__], "weights", once)
    assert bench.divergence(ours, true, text) < 1e-4
    monkeypatch.setattr(tinygemm.TinyGemm, "chunks", None)      # many tokens, and still nothing is unpacked
    ours.forget()
    p, q = (logits.double().log_softmax(-1) for logits in (true, ours.logits(text)))
    assert float((p.exp() * (p - q)).sum(-1).max()) < 1e-4


# -- codes and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(checks.LIMIT), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", ["codes", "numbers"])
@pytest.mark.parametrize("format", ["Q4_K", "Q6_K", "IQ4_XS", "Q5_1", "IQ1_M"])
def test_codes_as_a_card_does_them_and_numbers(monkeypatch, kind, format, dtype):
    for module in (codes, compact):
        monkeypatch.setattr(module, "multiply_in", lambda given, device: given)
    made = choosing.kernel(choosing.Recipe(kind, 0.0, ""), blocks(format), format, COLS, dtype)
    if kind == "codes":
        assert not made.in_one
        made.in_one = True
    true = exact(format)
    for count in checks.TOKENS:
        x = torch.randn(count, COLS, generator=torch.Generator().manual_seed(count)).to(dtype)
        y, g = made.matmul(x), torch.randn(count, ROWS, generator=torch.Generator().manual_seed(count)).to(dtype)
        assert y.dtype == dtype and error(y, x.double() @ true.T) < checks.LIMIT[dtype]
        assert error(made.transposed(g), g.double() @ true) < checks.LIMIT[dtype]
    assert torch.equal(made.dense(torch.float32), true.float())


def test_numbers_serve_other_types_by_the_blocks():
    made = choosing.kernel(choosing.Recipe("numbers", 0.0, ""), blocks("Q6_K"), "Q6_K", COLS, BF16)
    x = torch.randn(2, COLS)
    assert error(made.matmul(x), x.double() @ exact("Q6_K").T) < 2e-6


def test_blocks_that_are_seldom_read_stay_behind(monkeypatch):
    """torch's meta device stands for a card: what is multiplied by is there, the blocks are where they were."""
    data = blocks("Q6_K")
    for kind, stays in (("numbers", True), ("codes", True), ("compact", False)):
        monkeypatch.setattr(packing, "recipe", lambda *asked, kind=kind: choosing.Recipe(kind, 0.0, "asked for by a test"))
        packed = kernels.pack(data, "Q6_K", "fast", BF16, mapped=True, device="meta")
        there = packed.kernels[0].blocks.device.type
        assert packed.device.type == "meta" and packed.blocks.device.type == there == ("cpu" if stays else "meta")
        assert packed.is_mapped == stays and packed.mapped == (data.nbytes if stays else 0)
        for dtype in (BF16, torch.float32):
            x = torch.empty(3, COLS, dtype=dtype, device="meta")
            y = packed.kernels[0].matmul(x)
            assert y.shape == (3, ROWS) and y.device.type == "meta" and packed.kernels[0].transposed(y).shape == x.shape
        assert kernels.dense(packed).device.type == "meta"
        assert packed.to("meta") is packed
    monkeypatch.setattr(packing, "recipe", lambda *asked: choosing.Recipe("numbers", 0.0, "asked for by a test"))
    near, index = kernels.pack(data, "Q6_K", "fast", BF16, device="meta", leave=False), torch.tensor([[0, 1]]).to("meta")
    assert near.blocks.device.type == "meta" and kernels.rows(near, index, torch.float32).shape == (1, 2, COLS)
    stack = kernels.pack(blocks("Q6_K", 6).view(3, 2, -1), "Q6_K", "compact", BF16, device="meta")
    assert stack.device.type == stack.blocks.device.type == stack[1].kernels[0].blocks.device.type == "meta"
    there = kernels.pack(data, "Q6_K", "compact").to("meta")
    assert there.device.type == "meta" and there.blocks.device.type == "meta" and not there.is_mapped


@pytest.mark.parametrize("strategy", ["compact", "fast"])
def test_every_format_comes_apart_on_another_device(strategy):
    """No step mixes in a tensor that lies elsewhere, nor asks what a number is: a card would have to be waited for."""
    for format in checks.runnable():
        packed = kernels.pack(blocks(format), format, strategy, BF16, device="meta")
        x = torch.empty(3, packed.cols, dtype=BF16, device="meta")
        y = packed.kernels[0].matmul(x)
        assert y.device.type == "meta" and packed.kernels[0].transposed(y).shape == x.shape


def test_what_stayed_behind_is_read_from_there():
    made = choosing.kernel(choosing.Recipe("numbers", 0.0, ""), blocks("Q6_K"), "Q6_K", COLS, BF16)
    index = torch.tensor([66, 0, 3])
    assert torch.equal(made.take(index, BF16), exact("Q6_K")[index].to(BF16))
    assert torch.equal(made.take(index, torch.float32), exact("Q6_K")[index].float())


# -- the choice -----------------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """A card whose operator is quick for one and two passes; what it is asked is answered without one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(tinygemm, "tokens", lambda device, passes: 64 if passes < 4 else 0)
    monkeypatch.setattr(codes, "beat_numbers", lambda device, dtype: False)
    return torch.device("cuda")


@pytest.mark.parametrize(("format", "kind", "bits", "says"), [
    ("Q4_K", "tinygemm", 5, "once, scales of 32 weights rounded to bfloat16, quicker here up to 64 tokens"),
    ("Q4_0", "tinygemm", 5, "once"), ("Q3_K", "tinygemm", 6, "twice"), ("IQ4_XS", "tinygemm", 10, "twice"),
    ("Q8_0", "tinygemm", 10, "twice"), ("Q6_K", "numbers", 16, "Q6_K unpacked once to numbers in bfloat16: nibbles were slow"),
    ("NF4", "numbers", 16, "no integers"), ("F16", "compact", 0, "numbers already")])
def test_a_cards_recipes(card, format, kind, bits, says):
    plan = choosing.recipe(format, BF16, card)
    assert (plan.kind, plan.bits) == (kind, bits) and says in plan.why


def test_a_card_that_cannot_or_need_not(card, monkeypatch):
    assert choosing.recipe("Q4_K", torch.float32, card).kind == "codes"
    half = choosing.recipe("Q4_K", torch.float16, card)
    assert half.kind == "numbers" and "bfloat16 alone" in half.why
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    old = choosing.recipe("Q4_K", BF16, card)
    assert old.kind == "numbers" and "compute capability 8.0" in old.why
    monkeypatch.setattr(codes, "beat_numbers", lambda device, dtype: True)
    assert choosing.recipe("Q6_K", BF16, card).kind == "codes"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in tinygemm.why_not(BF16, card) and "no card" in tinygemm.why_not(BF16, torch.device("cpu"))


def test_room_on_a_card(card, monkeypatch):
    """What takes the blocks' place there may take more of the memory than what lies beside them."""
    need = 5 * 4096 * 4096 / 8
    for free, strategy in ((need / 0.79, "fast"), (need / 0.81, "compact")):
        monkeypatch.setattr(choosing, "free_memory", lambda device, free=free: int(free))
        choice = kernels.choose([("Q4_K", 4096 * 4096)], BF16, card)
        assert choice.strategy == strategy
    assert "more than four fifths" in choice.why


def test_how_many_tokens_are_measured(operators, monkeypatch):
    """The work that is timed, by the operators' stand-ins and on a small matrix; where it was quick, more tokens are tried."""
    monkeypatch.setattr(tinygemm, "SHAPE", (64, 128))
    measure, asked = MEASURE.__wrapped__, []
    for most, passes, says in ((0, 1, 0), (1, 1, 16), (64, 2, 64), (10**6, 1, 512)):
        asked.clear()

        def answer(work, other, times, wait, most=most):
            assert work().shape == other().shape and work().shape[1] == 64
            asked.append(len(work()))
            return asked[-1] <= most

        monkeypatch.setattr(tinygemm, "quicker", answer)
        assert measure(torch.device("cpu"), passes) == says
        assert asked == [count for count in tinygemm.TRIED if count <= most] + [c for c in tinygemm.TRIED if c > most][:1]


def test_codes_are_measured_against_numbers(monkeypatch):
    monkeypatch.setattr(codes, "SHAPE", (64, 128))
    for faster in (True, False):
        def answer(work, other, times, wait, faster=faster):
            assert work().shape == other().shape == (1, 64) and work().dtype == BF16
            return faster
        monkeypatch.setattr(codes, "quicker", answer)
        assert codes.beat_numbers.__wrapped__(torch.device("cpu"), BF16) is faster


# -- a card ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_operators_are_what_their_source_says():
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    if why := tinygemm.why_not(BF16, torch.device("cuda")):
        pytest.skip(f"no GPU for it: {why}")
    random = torch.Generator().manual_seed(0)
    for inner in (2, 4, 8):
        pairs = torch.randint(0, 256, (64, 512), dtype=torch.uint8, generator=random)
        words = torch.ops.aten._convert_weight_to_int4pack(pairs.cuda(), inner)
        assert torch.equal(words.cpu(), lay(pairs, inner))
        for group in (32, 64, 128, 256):
            scales, x = (torch.randn(shape, generator=random).to(BF16) for shape in ((1024 // group, 64, 2), (3, 1024)))
            y = torch.ops.aten._weight_int4pack_mm(x.cuda(), words, group, scales.cuda())
            assert error(y.cpu(), multiplied(x, words.cpu(), group, scales).double()) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["tinygemm", "codes", "numbers"])
def test_every_way_on_a_card(monkeypatch, kind):
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    if kind == "tinygemm" and (why := tinygemm.why_not(BF16, torch.device("cuda"))):
        pytest.skip(f"no GPU for it: {why}")
    monkeypatch.setattr(tinygemm, "tokens", lambda device, passes: max(checks.TOKENS))
    for format in FITTING:
        data, true = blocks(format).cuda(), exact(format)
        made = choosing.kernel(choosing.Recipe(kind, 0.0, ""), data, format, true.shape[1], BF16)
        for count in checks.TOKENS:
            x = torch.randn(count, true.shape[1], device="cuda").to(BF16)
            assert error(made.matmul(x).cpu(), x.cpu().double() @ true.T) < checks.LIMIT[BF16], (format, count)


@pytest.mark.gpu
def test_what_is_chosen_on_a_card():
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    for format in ("Q4_K", "Q6_K", "IQ4_XS", "Q3_K", "Q8_0"):
        packed = kernels.pack(blocks(format).cuda(), format, "fast", BF16)
        print(packed.why)
        assert packed.bytes > blocks(format).nbytes and formats.FORMATS[format]
    assert arithmetic.multiply_in(BF16, "cuda") == BF16
