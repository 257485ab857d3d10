"""Small GGUFs to take apart: random bytes in a model's tensors, dense or with experts, whole or in a set; and the bytes that a
piece should have, by way of GGUFFile.data."""

from pathlib import Path

import numpy as np

from llmlab.gguf import GGUFFile, read_gguf, write_gguf
from llmlab.gguf.layout import tensor_bytes

WIDTH = 256
KINDS = ("dense", "tied", "experts", "set")


def write(folder: Path, kind: str = "dense", layers: int = 3, scale: int = 1, seed: int = 0) -> GGUFFile:
    """`scale`: rows of the feed-forward matrices, by 320."""
    rng = np.random.default_rng(seed)
    tensors = list(_tensors(kind, layers, scale))

    def entries(some):
        return [(name, shape, type, rng.bytes(tensor_bytes(shape, type))) for name, shape, type in some]

    about = {"general.architecture": "llama", "llama.block_count": layers}
    if kind != "set":
        write_gguf(folder / f"{kind}.gguf", about, entries(tensors))
        return read_gguf(folder / f"{kind}.gguf")
    middle = len(tensors) // 2
    for number, some in enumerate((tensors[:middle], tensors[middle:])):
        split = {"split.no": ("uint16", number), "split.count": ("uint16", 2), "split.tensors.count": ("int32", len(tensors))}
        write_gguf(folder / f"set-{number + 1:05d}-of-00002.gguf", {**about, **split}, entries(some))
    return read_gguf(folder / "set-00001-of-00002.gguf")


def _tensors(kind: str, layers: int, scale: int):
    wide = 320 * scale
    yield "token_embd.weight", (WIDTH, 96), "Q8_0"
    yield "rope_freqs.weight", (16,), "F32"
    for layer in range(layers):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (WIDTH,), "F32"
        yield f"{block}.attn_q.weight", (WIDTH, WIDTH), "Q4_K"
        yield f"{block}.attn_k.weight", (WIDTH, 64), "Q6_K"
        yield f"{block}.attn_v.weight", (WIDTH, 64), "F16"
        yield f"{block}.attn_q.bias", (WIDTH,), "F32"
        if kind == "experts":
            yield f"{block}.ffn_gate_inp.weight", (WIDTH, 5), "F32"
            yield f"{block}.ffn_gate_exps.weight", (WIDTH, wide, 5), "Q4_0"
            yield f"{block}.ffn_up_exps.weight", (WIDTH, wide, 5), "Q5_1"
            yield f"{block}.ffn_down_exps.weight", (wide, WIDTH, 5), "Q8_0"
            yield f"{block}.ffn_down_exps.bias", (WIDTH, 5), "F32"
        else:
            yield f"{block}.ffn_up.weight", (WIDTH, wide), "Q4_0"
            yield f"{block}.ffn_down.weight", (wide, WIDTH), "Q8_0"
        yield f"{block}.ffn_norm.weight", (WIDTH,), "F32"
    yield "output_norm.weight", (WIDTH,), "F32"
    if kind != "tied":
        yield "output.weight", (WIDTH, 96), "Q6_K"


def wanted(file: GGUFFile, piece, tensor) -> bytes:
    """What a tensor of a piece holds."""
    data = file.data(tensor.name)
    if piece.expert is None:
        return data.tobytes()
    each = len(data) // file.tensors[tensor.name].shape[-1]
    return data[piece.expert * each:(piece.expert + 1) * each].tobytes()


def matches(file: GGUFFile, piece, raw: bytes) -> bool:
    """Whether a buffer holds a piece."""
    return bool(piece.tensors) and all(raw[tensor.offset:tensor.offset + tensor.bytes] == wanted(file, piece, tensor)
                                       for tensor in piece.tensors)
