"""Copies of weights for a processor's kernels: which processor, which tensors; the numbers are llama.cpp's (tests/peers)."""

from dataclasses import replace

from llmlab import catalog
from llmlab.fitting import fit
from llmlab.formats import FORMATS
from llmlab.hardware import machine
from llmlab.memory import weights
from llmlab.repacking import copies
from llmlab.shapes import model_spec

PC, ARM, AMX = ("avx", "avx2"), ("neon", "dotprod", "i8mm"), ("avx2", "avx512f", "avx512_vnni", "amx_int8")


def total(name: str, quant: str, features: tuple[str, ...]) -> int:
    by_layer, output = copies(model_spec(name), quant, False, features)
    return sum(by_layer) + output


def test_by_instruction_set():
    spec = model_spec("llama-3-8b")
    blocks = sum(weights(spec, "Q4_0").by_layer)
    norms = sum(4 * t.elements for t in spec.tensors if len(t.shape) == 1 and t.layer >= 0)
    assert total("llama-3-8b", "Q4_0", PC) == blocks - norms                     # the output is Q6_K: not on a PC
    assert total("llama-3-8b", "Q4_0", ARM) == blocks - norms + FORMATS["Q6_K"].bytes(4096 * 128256)
    assert total("llama-3-8b", "Q8_0", PC) == 0 < total("llama-3-8b", "Q8_0", ARM)
    assert total("llama-3-8b", "Q2_K", PC) < total("llama-3-8b", "Q2_K", (*PC, "avx512f"))
    assert total("llama-3-8b", "Q4_0", ()) == total("llama-3-8b", "F16", PC) == 0


def test_matrix_tiles_take_more_and_pad_it():
    """amx/mmq.cpp get_row_size: Q8_0 keeps an int32 a block more; float16 goes as it is."""
    spec = model_spec("llama-3-8b")
    matrices = [t for t in spec.tensors if len(t.shape) == 2 and t.name != "token_embd.weight"]
    assert total("llama-3-8b", "Q8_0", AMX) == sum(t.elements // 32 * (34 + 4) for t in matrices)
    assert total("llama-3-8b", "F16", AMX) == sum(2 * t.elements for t in matrices)
    experts = sum(weights(model_spec("qwen3-30b-a3b"), "Q8_0").experts_by_layer)
    assert 0 < total("qwen3-30b-a3b", "Q8_0", AMX) < experts / 10                # tiles multiply no experts


def test_here_it_is_exact_and_elsewhere_an_interval():
    here = next(t for t in fit("llama-3-8b", None, quant="Q4_0").terms if t.name == "repacked")
    assert here.kind == "exact" and here.bytes == total("llama-3-8b", "Q4_0", machine().cpu.features)
    another = replace(machine(), cards=(), cpu=replace(machine().cpu, features=()))
    assert fit("llama-3-8b", another, quant="Q4_0").total("repacked") == 0


def test_beside_a_card_nothing_is_copied_but_beside_metal():
    for name in ("rtx-3060-12gb", "rx-7900-xtx-24gb", "arc-b580-12gb"):
        assert fit("llama-3-8b", name, quant="Q4_0", gpu_layers=10).total("repacked") == 0
    some = fit("llama-3-8b", "apple-m4-max-40c", quant="Q4_0", gpu_layers=10)
    by_layer, _ = copies(model_spec("llama-3-8b"), "Q4_0", False, ("neon", "dotprod"))
    assert some.total("repacked", "host") == sum(by_layer[:23])
    assert fit("llama-3-8b", catalog.gpu("apple-m4-max-40c"), quant="Q4_0").total("repacked") == 0
