"""Packed matrices: every format by every strategy against gguf-py's numbers, any shape, bad input, what is held in memory."""

import json
import os
import subprocess
import sys
import warnings
from copy import deepcopy
from functools import cache
from threading import Thread
from time import sleep

import kernel_checks as checks
import numpy as np
import pytest
import torch
from kernel_checks import COLS, ROWS, blocks, error, exact, kernel, runnable
from torch.nn import functional

from llmlab import formats, kernels
from llmlab.errors import LabError
from llmlab.formats import BY_ID, FORMATS, registry
from llmlab.kernels import arithmetic, choosing, codes, compact, int4, nibbles, scratch, unpacking

HALVES = (torch.float16, torch.bfloat16)


# -- exact enough ---------------------------------------------------------------------------------------------------


def capabilities() -> dict[str, bool]:
    """What ATEN_CPU_CAPABILITY may ask for, and whether this processor has it."""
    return {"default": True, "avx2": torch.cpu._is_avx2_supported(), "avx512": torch.cpu._is_avx512_supported()}


@cache
def errors_under(capability: str) -> dict:
    if torch.backends.cpu.get_cpu_capability().lower() == capability:
        return checks.every_way()
    done = subprocess.run([sys.executable, checks.__file__], capture_output=True, text=True,
                          env=os.environ | {"ATEN_CPU_CAPABILITY": capability})
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["capability"].lower() == capability
    return answer["errors"]


@pytest.mark.parametrize("dtype", list(checks.LIMIT), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("asked", ["default", "avx2", "avx512"])
def test_every_format_by_every_strategy(asked, dtype):
    have = [name for name, there in capabilities().items() if there]
    found = errors_under(asked if asked in have else have[-1])[str(dtype)[6:]]
    if asked not in have:
        print(f"this processor has no {asked}: done with {have[-1]}")
    assert list(found) == runnable() and {"Q4_K", "Q6_K", "IQ4_XS", "MXFP4", "BF16"} < set(found)
    far = {(name, strategy): worst for name, row in found.items() for strategy, worst in row.items()
           if not worst < checks.LIMIT[dtype]}
    assert far == {}
    assert all({"reference", "compact", "fast"} <= set(row) for row in found.values())
    assert dtype == torch.float32 or sum("codes" in row for row in found.values()) > 20


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("strategy", ["compact", "codes"])
@pytest.mark.parametrize("direct", [True, False])
def test_half_precision_multiplied_as_it_is_or_in_float32(monkeypatch, dtype, strategy, direct):
    for module in (compact, codes):
        monkeypatch.setattr(module, "multiply_in", lambda given, kind: given if direct else torch.float32)
    for format in ("Q4_K", "Q6_K", "F16"):
        if packed := kernel(format, strategy, dtype):
            x = torch.randn(5, COLS).to(dtype).requires_grad_()
            y = kernels.linear(x, packed)
            gradient, = torch.autograd.grad(y, x, y.detach())
            true = x.detach().double() @ exact(format).T
            assert error(y.detach(), true) < checks.LIMIT[dtype]
            assert error(gradient, y.detach().double() @ exact(format)) < checks.LIMIT[dtype]


def test_the_reference_is_torchs_linear_on_the_numbers():
    x = torch.randn(3, COLS)
    packed = kernels.pack(blocks("Q5_K"), "Q5_K", "reference")
    assert torch.equal(kernels.linear(x, packed), functional.linear(x, exact("Q5_K").float()))


@pytest.mark.parametrize("strategy", ["reference", "compact", "codes", "int4"])
@pytest.mark.parametrize("format", ["Q4_K", "Q8_0", "Q3_K", "BF16"])
def test_rows_and_all_of_it_bit_for_bit(format, strategy):
    packed = kernel(format, strategy, torch.bfloat16)
    if packed is None:
        return
    weights = exact(format).float()
    assert torch.equal(kernels.dense(packed, torch.float32), weights)
    index = torch.tensor([[66, 0, 3], [3, 65, 1]])
    for integers in (index, index.int(), index[0, 0], index[:0]):
        assert torch.equal(kernels.rows(packed, integers, torch.float32), weights[integers.long()])
    assert kernels.rows(packed, index).dtype == kernels.dense(packed).dtype == torch.bfloat16


@pytest.mark.parametrize("strategy", ["reference", "compact", "codes"])
def test_the_gradient_in_float64(strategy):
    packed = kernel("Q4_K", strategy, torch.float64, 9)
    x = torch.randn(2, 3, COLS, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    true = functional.linear(x, kernels.dense(packed, torch.float64), bias)
    y, g = kernels.linear(x, packed, bias), torch.randn(2, 3, 9, dtype=torch.float64)
    mine, theirs = torch.autograd.grad(y, (x, bias), g), torch.autograd.grad(true, (x, bias), g)
    for a, b in zip((y.detach(), *mine), (true.detach(), *theirs), strict=True):
        assert error(a, b) < (1e-14 if strategy != "codes" else 2e-7)       # codes keep their offsets in float32
    with torch.no_grad():
        assert not kernels.linear(x, packed).requires_grad


# -- inputs of any shape --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["reference", "compact", "codes", "int4"])
@pytest.mark.parametrize("format", ["Q4_K", "IQ4_XS", "Q6_K", "F32"])
def test_inputs_of_any_shape(monkeypatch, format, strategy):
    monkeypatch.setattr(int4, "tokens", lambda dtype, passes: 64)
    packed = kernel(format, strategy, torch.bfloat16)
    if packed is None:
        return
    weights = exact(format)
    whole = torch.randn(COLS, 6, 4).bfloat16()
    for x in (whole[:, 0, 0], whole.permute(2, 1, 0), whole[:, :1].transpose(0, 2), whole[:, 0, :1].T.expand(3, COLS),
              whole.permute(1, 2, 0)[::2, 1:3], torch.randn(2, 1, 1, 3, 2 * COLS).bfloat16()[..., ::2]):
        y = kernels.linear(x, packed)
        assert y.shape == (*x.shape[:-1], ROWS) and y.dtype == x.dtype and y.is_contiguous()
        assert error(y, x.double() @ weights.T) < 5e-3
    for shape in ((0, COLS), (2, 0, COLS)):
        x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
        y = kernels.linear(x, packed)
        assert y.shape == (*shape[:-1], ROWS)
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_bias_autocast_and_other_types_than_packed_for():
    packed = kernels.pack(blocks("Q4_0"), "Q4_0", "fast", torch.bfloat16)
    x, bias = torch.randn(3, COLS), torch.randn(ROWS)
    true = x.double() @ exact("Q4_0").T + bias
    assert error(kernels.linear(x, packed, bias), true) < 2e-6
    assert error(kernels.linear(x.half(), packed, bias.half()), true) < 2e-3
    for strategy in ("reference", "compact", "fast"):
        packed = kernels.pack(blocks("Q4_0"), "Q4_0", strategy)
        with torch.autocast("cpu", torch.bfloat16):
            y = kernels.linear(x, packed, bias)
        assert y.dtype == torch.bfloat16 and error(y, true) < 1e-2


def test_in_inference_mode_and_out_of_it_by_turns():
    scratch.release()
    packed, x = kernels.pack(blocks("Q5_0"), "Q5_0", "compact"), torch.randn(2, COLS)
    with torch.inference_mode():
        first = kernels.linear(x, packed)
    x.requires_grad_()
    y = kernels.linear(x, packed)
    y.sum().backward()
    assert torch.equal(y, first) and x.grad is not None


def test_threads_have_their_own_scratch():
    packed, faults = kernels.pack(blocks("Q4_K"), "Q4_K", "compact"), []

    def work(seed):
        x = torch.randn(3, COLS, generator=torch.Generator().manual_seed(seed))
        for _ in range(20):
            if error(kernels.linear(x, packed), x.double() @ exact("Q4_K").T) > 2e-6:
                faults.append(seed)

    exact("Q4_K")
    threads = [Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


# -- experts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["reference", "compact", "fast"])
def test_a_stack_of_experts(strategy):
    stack = blocks("MXFP4", 3 * 5).view(3, 5, -1)
    weights = exact("MXFP4", 3 * 5).view(3, 5, COLS)
    packed = kernels.pack(stack, "MXFP4", strategy, torch.bfloat16, "blk.0.ffn_up_exps.weight")
    x = torch.randn(4, COLS).bfloat16()
    assert packed.shape == (3, 5, COLS) and len(packed) == 3
    assert torch.equal(kernels.dense(packed, torch.float32), weights.float())
    for expert in range(3):
        y = kernels.linear(x, packed, expert=expert)
        assert error(y, x.double() @ weights[expert].T) < 5e-3
        assert torch.equal(kernels.linear(x, packed[expert]), y)
        assert torch.equal(kernels.rows(packed, torch.tensor([4]), torch.float32, expert=expert), weights[expert, 4:].float())
        assert packed[expert].bytes * 3 == packed.bytes
        assert packed[expert].blocks.data_ptr() == stack[expert].data_ptr()
    for wrong in (lambda: packed[3], lambda: kernels.linear(x, packed), lambda: packed[0][0], lambda: packed[-1]):
        with pytest.raises(LabError, match="blk.0.ffn_up_exps.weight"):
            wrong()


# -- what is held ---------------------------------------------------------------------------------------------------


def test_compact_keeps_the_mapped_bytes_and_nothing_else(tmp_path):
    data = blocks("Q4_K", 2048, 2048)
    (tmp_path / "blocks").write_bytes(data.numpy().tobytes())
    mapped = np.memmap(tmp_path / "blocks", np.uint8, "r").reshape(data.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = kernels.pack(mapped, "Q4_K", "compact")
        fast = kernels.pack(mapped, "Q4_K", "fast")
    assert packed.blocks.data_ptr() == mapped.ctypes.data
    assert (packed.bytes, packed.mapped) == (0, data.nbytes)
    assert fast.mapped == data.nbytes and fast.bytes == fast.kernels[0].bytes() > 2048 * 2048 / 2
    x = torch.randn(1, 2048)
    true = x.double() @ exact("Q4_K", 2048, 2048).T
    del mapped, data
    assert error(kernels.linear(x, packed), true) < 2e-6 and error(kernels.linear(x, fast), true) < 2e-6
    owned = kernels.pack(blocks("Q4_K"), "Q4_K", "compact")
    assert (owned.bytes, owned.mapped) == (blocks("Q4_K").nbytes, 0)
    told = kernels.pack(blocks("Q4_K"), "Q4_K", "compact", mapped=True)
    assert (told.bytes, told.mapped) == (0, blocks("Q4_K").nbytes)
    stored = torch.UntypedStorage.from_file(str(tmp_path / "blocks"), shared=True, nbytes=1152 * 64)
    assert kernels.pack(torch.tensor([], dtype=torch.uint8).set_(stored).view(64, 1152), "Q4_K", "compact").mapped == 1152 * 64


def test_scratch_is_shared_and_bounded():
    scratch.release()
    matrices = [kernels.pack(blocks(format, 1500, 2048), format, "compact") for format in ("Q4_0", "Q6_K", "IQ3_S")]
    x = torch.randn(2, 2048)
    for packed in matrices:
        kernels.linear(x, packed)
    held = scratch.held()
    assert 0 < held <= 4 * scratch.CPU_WEIGHTS
    for packed in matrices:
        assert error(kernels.linear(x, packed), x.double() @ exact(packed.format, 1500, 2048).T) < 2e-6
    assert scratch.held() == held
    scratch.release()
    assert scratch.held() == 0


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("format", ["Q4_1", "Q6_K", "IQ4_XS", "MXFP4", "TQ2_0"])
@pytest.mark.parametrize("strategy", ["compact", "fast", "reference"])
def test_torchs_default_dtype_changes_nothing(format, strategy, default):
    x, before = torch.randn(3, COLS), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        packed = kernels.pack(blocks(format), format, strategy)
        y = kernels.linear(x, packed)
    finally:
        torch.set_default_dtype(before)
    assert packed.bytes == kernels.pack(blocks(format), format, strategy).bytes and y.dtype == torch.float32
    assert error(y, x.double() @ exact(format).T) < 2e-6


def test_copies_share_what_is_packed():
    packed = kernels.pack(blocks("Q4_K"), "Q4_K", "compact")
    assert deepcopy({"weight": packed})["weight"] is packed


def test_a_width_beyond_the_scratch_is_done_row_by_row(monkeypatch):
    monkeypatch.setattr(scratch, "CPU_WEIGHTS", 300)
    x = torch.randn(2, COLS)
    for strategy in ("compact", "codes"):
        assert error(kernels.linear(x, kernel("Q4_K", strategy, torch.float32)), x.double() @ exact("Q4_K").T) < 2e-6


@pytest.mark.parametrize("strategy", ["codes", "int4"])
def test_what_fast_says_it_holds_is_what_it_was_chosen_by(strategy):
    for format in ("Q4_0", "Q4_K", "Q5_K", "IQ4_XS", "Q6_K", "Q2_K"):
        packed = kernel(format, strategy, torch.bfloat16, 64)
        if packed is not None:
            known = levels = unpacking.levels(format)
            bits = nibbles.bits(known, torch.bfloat16) if strategy == "int4" else codes.bits(levels)
            assert packed.kernels[0].bytes() * 8 == bits * 64 * COLS


def test_int4_is_laid_down_in_tiles_as_in_one(monkeypatch):
    for format in ("Q4_K", "Q5_K"):
        whole = int4.Int4(blocks(format, 200), format, COLS, torch.bfloat16)
        monkeypatch.setattr(scratch, "CPU_WEIGHTS", 64 * COLS)
        tiled = int4.Int4(blocks(format, 200), format, COLS, torch.bfloat16)
        monkeypatch.undo()
        assert torch.equal(whole.nibbles, tiled.nibbles) and torch.equal(whole.scales, tiled.scales)


# -- the choice -----------------------------------------------------------------------------------------------------


def test_auto_goes_by_the_memory_that_is_free(monkeypatch):
    need = codes.bits(unpacking.levels("Q4_K")) * ROWS * COLS / 8
    for free, strategy in ((2 * need, "fast"), (2 * need - 1, "compact")):
        monkeypatch.setattr(choosing, "free_memory", lambda device, free=free: int(free))
        packed = kernels.pack(blocks("Q4_K"), "Q4_K")
        assert packed.strategy == strategy and "free" in packed.why and "KiB" in packed.why
    choice = kernels.choose([("Q4_K", ROWS * COLS), ("F32", 10**12)])
    assert (choice.strategy, choice.bytes) == ("compact", 0) and "more than half" in choice.why
    monkeypatch.setattr(choosing, "free_memory", lambda device: 2**40)
    choice = kernels.choose([("Q4_K", ROWS * COLS), ("F32", 10**12)])
    assert (choice.strategy, choice.bytes) == ("fast", int(need))
    assert kernels.choose([("F32", 10), ("F16", 10)]).strategy == "compact"


def test_fast_goes_by_what_is_quick_here(monkeypatch):
    monkeypatch.setattr(int4, "tokens", lambda dtype, passes: 0)
    slow = kernels.pack(blocks("Q4_K"), "Q4_K", "fast", torch.bfloat16)
    assert isinstance(slow.kernels[0], codes.Codes) and "byte a weight" in slow.why
    monkeypatch.setattr(int4, "tokens", lambda dtype, passes: 4)
    quick = kernels.pack(blocks("Q4_K"), "Q4_K", "fast", torch.bfloat16)
    assert isinstance(quick.kernels[0], int4.Int4) and "up to 4 tokens" in quick.why
    used = []
    monkeypatch.setattr(compact.Compact, "chunks", lambda self, dtype: used.append(dtype) or iter(()))
    kernels.linear(torch.randn(4, COLS).bfloat16(), quick)
    assert not used
    kernels.linear(torch.randn(5, COLS).bfloat16(), quick)
    assert used


def test_the_measurements_answer_and_are_taken_once(monkeypatch):
    assert int4.tokens.__wrapped__(torch.float32, 1) == 0
    once = int4.tokens(torch.bfloat16, 1)
    assert once in (0, *int4.TRIED)
    monkeypatch.setattr(int4, "quicker", lambda work, other, times: len(work().T) == 512 and len(work()) <= 32)
    assert int4.tokens.__wrapped__(torch.bfloat16, 1) == 32
    assert int4.tokens.__wrapped__(torch.bfloat16, 4) == (once // 4 or 1)
    monkeypatch.setattr(int4, "quicker", lambda work, other, times: False)
    assert [int4.tokens.__wrapped__(torch.bfloat16, passes) for passes in (1, 2, 4)] == [0, 0, 0]
    monkeypatch.undo()
    for dtype in HALVES:
        assert arithmetic.multiply_in(dtype, "cpu") in (dtype, torch.float32)
        monkeypatch.setattr(arithmetic, "quicker", lambda *args: pytest.fail("measured again"))
        arithmetic.multiply_in(dtype, "cpu")
        monkeypatch.undo()
    assert arithmetic.multiply_in(torch.bfloat16, "cuda") == torch.bfloat16
    assert arithmetic.multiply_in(torch.float64, "cpu") == torch.float64


def test_the_quicker_of_two_is_found():
    turns = []
    assert arithmetic.quicker(lambda: turns.append("a"), lambda: (turns.append("b"), sleep(0.002)))
    assert not arithmetic.quicker(lambda: sleep(0.002), lambda: None)
    assert turns[:6] == ["a", "b"] * 3


def test_a_new_format_runs_packed_with_no_edit():
    def unpack(data):
        return registry.Unpacked(data[:, 2:].view(torch.int8) >> 5, data[:, :2].contiguous().view(torch.float16).float())

    formats.register("TOY3", 987, 64, 66, "toy", unpack)
    try:
        for strategy in ("auto", "reference", "compact", "fast"):
            packed = kernels.pack(blocks("TOY3"), "TOY3", strategy)
            x = torch.randn(3, COLS)
            assert error(kernels.linear(x, packed), x.double() @ formats.dequantize(blocks("TOY3"), "TOY3").double().T) < 2e-6
        assert "TOY3" in runnable()
    finally:
        del FORMATS["TOY3"], BY_ID[987]


def test_codes_that_no_random_block_shows_are_not_cut_off(monkeypatch):
    """A format whose blocks hold other codes than a thousand random ones may not be packed into too few bits."""
    narrow = unpacking.levels("Q4_0")._replace(high=3)
    monkeypatch.setattr(int4, "levels", lambda type: narrow)
    with pytest.raises(LabError, match="Q4_0 blocks hold codes beyond -8 to 3"):
        kernel("Q4_0", "int4", torch.bfloat16)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "says"), [
    (lambda b: (b, "Q9_K"), "'Q9_K' is no block format; there are .*Q4_K"),
    (lambda b: (b, None), "is no block format"),
    (lambda b: (b, "Q8_K"), "Q8_K cannot be dequantized"),
    (lambda b: (b[:, :-1], "Q4_K"), "a row of 287 bytes is cut short; a block is 144 bytes"),
    (lambda b: (b.float(), "Q4_K"), "uint8., not float32"),
    (lambda b: (b[0], "Q4_K"), "uint8 .rows, row_bytes."),
    (lambda b: (b[:, :0], "Q4_K"), "not .67, 0."),
    (lambda b: (b.numpy().astype("f4"), "Q4_K"), "uint8., not float32"),
    (lambda b: ([1, 2], "Q4_K"), "uint8., not list"),
    (lambda b: (b, "Q4_K", "quickest"), "'quickest' is no strategy; there are auto, compact"),
    (lambda b: (b, "Q4_K", "fast", torch.int8), "not in torch.int8"),
])
def test_what_cannot_be_packed(given, says):
    with pytest.raises(LabError, match=rf"blk\.7\.attn_v\.weight.*{says}"):
        kernels.pack(*given(blocks("Q4_K")), name="blk.7.attn_v.weight")


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda p: kernels.linear(torch.randn(2, COLS + 1), p), r"\(2, 513\).* must be 512"),
    (lambda p: kernels.linear(torch.tensor(1.0), p), "must be 512"),
    (lambda p: kernels.linear(torch.ones(2, COLS, dtype=torch.int64), p), "not in torch.int64"),
    (lambda p: kernels.linear(torch.ones(2, COLS, device="meta"), p), "is on meta, the packed weights are on cpu"),
    (lambda p: kernels.rows(p, torch.tensor([0, ROWS])), f"no row {ROWS} of {ROWS}"),
    (lambda p: kernels.rows(p, torch.tensor([-1])), "no row -1"),
    (lambda p: kernels.rows(p, torch.tensor([0.5])), "not by torch.float32"),
    (lambda p: kernels.dense(p, torch.int32), "not in torch.int32"),
    (lambda p: kernels.linear(torch.randn(2, COLS), p, expert=0), "one matrix"),
])
def test_what_cannot_be_multiplied(wrong, says):
    packed = kernels.pack(blocks("Q4_K"), "Q4_K", "compact", name="output.weight")
    with pytest.raises(LabError, match=f"output.weight.*{says}"):
        wrong(packed)


def test_a_matrix_without_rows():
    for strategy in ("reference", "compact", "fast"):
        for dtype in checks.LIMIT:
            none = kernels.pack(torch.empty(0, 288, dtype=torch.uint8), "Q4_K", strategy, dtype)
            assert kernels.linear(torch.randn(2, COLS).to(dtype), none).shape == (2, 0)


# -- a card ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(checks.LIMIT), ids=lambda dtype: str(dtype)[6:])
def test_on_a_card(dtype):
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    for format in runnable():
        weights = exact(format)
        for strategy in ("reference", "compact", "fast"):
            packed = kernels.pack(blocks(format), format, strategy, dtype).to("cuda")
            assert packed.device.type == "cuda" and packed.to("cuda") is packed and packed.bytes >= blocks(format).nbytes
            for count in checks.TOKENS:
                x = torch.randn(count, COLS, device="cuda").to(dtype).requires_grad_()
                y = kernels.linear(x, packed)
                gradient, = torch.autograd.grad(y, x, y.detach())
                assert error(y.detach().cpu(), x.detach().cpu().double() @ weights.T) < checks.LIMIT[dtype]
                assert error(gradient.cpu(), y.detach().cpu().double() @ weights) < checks.LIMIT[dtype]
            assert torch.equal(kernels.rows(packed, torch.tensor([5, 0], device="cuda"), torch.float32).cpu(),
                               weights[[5, 0]].float())
    assert kernels.pack(blocks("Q4_K").cuda(), "Q4_K").why


def test_to_the_device_where_it_is_already():
    packed = kernels.pack(blocks("Q4_K"), "Q4_K", "compact")
    assert packed.to("cpu") is packed and "Q4_K [67, 512]" in repr(packed)
