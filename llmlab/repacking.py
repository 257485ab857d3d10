"""Which weights llama.cpp's CPU backend lays out anew for its kernels, and so holds beside the mapped file.

The rule is that of ggml at llama-cpp-python 0.3.36 (ggml-cpu/repack.cpp, amx/amx.cpp; llama-model.cpp: which buffers are
asked first). It depends on the processor's instruction set, as a build for that processor sees it.
"""

from .architectures import Tensor
from .catalog import Gpu
from .formats import FORMATS
from .memory import GGUF_ALIGNMENT, Term, exact, modelled, weights
from .shapes import ModelSpec, remembered
from .units import align

# (all of these features, {format: rows must be a multiple of}), asked in this order
_RULES = (
    (("avx2",), {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8, "MXFP4": 8}),
    (("avx512f",), {"Q2_K": 8}),
    (("neon", "dotprod"), {"Q4_0": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8, "IQ4_NL": 4, "MXFP4": 4, "Q8_0": 4, "Q1_0": 4}),
)
# Formats that Intel's matrix tiles take: (columns a multiple of, bytes added to each block)
_TILES = {"Q4_0": (32, 0), "Q4_1": (32, 0), "Q8_0": (32, 4), "Q4_K": (256, 4), "Q5_K": (256, 4), "Q6_K": (256, 0),
          "IQ4_XS": (256, 2), "F16": (16, 0)}
_USUAL = {"another PC": ("avx2",), "a PC with AVX-512": ("avx2", "avx512f"), "an ARM computer": ("neon", "dotprod"),
          "a PC with AMX": ("avx2", "avx512f", "avx512_vnni", "amx_int8")}
_INPUT = ("token_embd.", "per_layer_token_embd.", "position_embd.")
_READ_BY_ROW = (".ssm_conv1d", ".shortconv.conv", ".ffn_exp_probs_b")


def repacked_term(spec: ModelSpec, quant: str, importance: bool, cards: tuple[Gpu, ...], on_host: list[bool],
                  features: tuple[str, ...] | None) -> Term | None:
    """The copies llama.cpp makes of weights that stay in RAM; None where it makes none.

    `on_host`: for each block and, last, the output, whether it stays there. `features`: of the processor, None where it is
    not known which. Beside a card whose driver lends pinned memory (CUDA, HIP, Vulkan, SYCL: all but Metal) llama.cpp asks
    for that first and copies nothing.
    """
    if any(card.vendor != "Apple" for card in cards) or not any(on_host):
        return None
    if features is None and cards:
        features = ("neon", "dotprod")
    if features is not None:
        bytes = _of(spec, quant, importance, tuple(features), on_host)
        named = " ".join(f for f in ("amx_int8", "avx512f", "avx2", "dotprod", "neon") if f in features) or "no wide vectors"
        why = (f"copies of matrices laid out for this processor ({named}), beside the mapped file; the system takes back that "
               "file's pages of them where it needs room")
        return exact("repacked", "host", bytes, why) if bytes else None
    found = {name: _of(spec, quant, importance, known, on_host) for name, known in _USUAL.items()}
    if not any(found.values()):
        return None
    most = max(found, key=found.get)
    return modelled("repacked", "host", found["another PC"], 0, found[most],
                    f"copies of matrices laid out for the processor's kernels: none without AVX2, all on {most}")


def _of(spec: ModelSpec, quant: str, importance: bool, features: tuple[str, ...], on_host: list[bool]) -> int:
    by_layer, output = copies(spec, quant, importance, features)
    return sum(size for size, here in zip(by_layer, on_host, strict=False) if here) + (output if on_host[-1] else 0)


@remembered
def copies(spec: ModelSpec, quant: str, importance: bool, features: tuple[str, ...]) -> tuple[tuple[int, ...], int]:
    """(bytes by block, bytes of the output) of the copies a processor with these features has made."""
    by_layer, output = [0] * len(spec.layers), 0
    for tensor, type in zip(spec.tensors, weights(spec, quant, importance).types, strict=True):
        if tensor.layer >= 0 and spec.layers[tensor.layer].mtp or not _multiplied(tensor, spec.tied):
            continue
        size = align(_copy(type, tensor, features), GGUF_ALIGNMENT)
        if tensor.layer >= 0:
            by_layer[tensor.layer] += size
        elif tensor.name.startswith(("per_layer_model_proj.",)):      # lives with block 0, as llama.cpp has it
            by_layer[0] += size
        else:
            output += size
    return tuple(by_layer), output


def _multiplied(tensor: Tensor, tied: bool) -> bool:
    """Whether a matrix product reads it: no vectors, no tables read by row. A tied table is multiplied as the output."""
    if tensor.name == "token_embd.weight":
        return tied
    return len(tensor.shape) > 1 and not tensor.name.startswith(_INPUT) and not any(p in tensor.name for p in _READ_BY_ROW)


def _copy(type: str, tensor: Tensor, features: tuple[str, ...]) -> int:
    """Bytes of the copy of one tensor, 0 where there is none."""
    columns, rows = tensor.shape[:2]
    experts = "_exps." in tensor.name
    if {"amx_int8", "avx512_vnni"} <= set(features) and not experts and type in _TILES:
        unit, added = _TILES[type]
        if rows % 32 == 0 and columns % unit == 0:
            return FORMATS[type].bytes(tensor.elements) + tensor.elements // FORMATS[type].block * added
    if len(tensor.shape) != (3 if experts else 2) or rows == 1 or (experts and tensor.shape[2] == 1):
        return 0
    for needed, formats in _RULES:
        if type in formats and set(needed) <= set(features) and rows % formats[type] == 0:
            return FORMATS[type].bytes(tensor.elements)
    return 0
