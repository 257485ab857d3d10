"""A llama of the 1B class (0.85 B weights) in any quant, written in seconds: random blocks whose numbers are like a model's.

What is in the blocks takes no engine more or less time; their numbers are of mean 0 and of the usual size, and the output's
norm makes the distribution of the next token as peaked as a real model's, so that a distance between engines says something.
No vocabulary.
"""

import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

from llmlab import memory, shapes
from llmlab.formats import FORMATS, dequantize
from llmlab.gguf import write_gguf

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16,
          "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
          "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False}
SIZE = 0.02              # standard deviation of the weights
PEAKED = 4.0             # what the last norm multiplies by


def write(path: str | Path, quant: str, config: dict = CONFIG, **more) -> Path:
    """The GGUF of `config` in `quant`, each tensor in the type that llama.cpp's quantizer would give it; `more` of its
    metadata, such as a vocabulary."""
    path, spec = Path(path), shapes.from_config(config, "llama-1b")
    fields = {f"{spec.architecture}.{key}": value for key, value in spec.metadata.items()}
    write_gguf(path, {"general.architecture": spec.architecture, "general.name": f"llama-1b {quant}",
                      "tokenizer.ggml.model": "no_vocab", **fields, **more},
               [(tensor.name, tensor.shape, type, lambda tensor=tensor, type=type: _bytes(tensor, type))
                for tensor, type in zip(spec.tensors, memory.types(spec, quant), strict=True)])
    return path


def _bytes(tensor, type: str) -> bytes:
    if type == "F32":
        return np.full(tensor.elements, PEAKED if tensor.name == "output_norm.weight" else 1.0, np.float32).tobytes()
    known = FORMATS[type]
    return blocks(type, tensor.elements // known.block, zlib.crc32(tensor.name.encode())).tobytes()


def blocks(type: str, count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, block_bytes]: random codes, and scales that make their numbers' mean about 0 and deviation SIZE."""
    return _scaled(type, count, seed, _scales(type))


def _scaled(type: str, count: int, seed: int, values: tuple[float, ...]) -> np.ndarray:
    known = FORMATS[type]
    raw = np.frombuffer(bytearray(np.random.default_rng(seed).bytes(count * known.block_bytes)), np.uint8)
    raw = raw.reshape(count, known.block_bytes)
    for field, value in zip(_halves(type), values, strict=True):
        raw[:, field.start:field.stop] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    return raw


def _halves(type: str) -> list:
    """The scales of a block, and its minimum where it has one."""
    return [field for field in FORMATS[type].fields if "float16" in field.what and field.stop - field.start == 2]


@cache
def _scales(type: str) -> tuple[float, ...]:
    """What to write there: numbers are linear in them."""
    def numbers(*values: float) -> torch.Tensor:
        return dequantize(torch.from_numpy(_scaled(type, 4096, 1, values)), type).double()

    many = len(_halves(type))
    if many == 2:
        first, second = numbers(1.0, 0.0), numbers(0.0, 1.0)
        other = -float(first.mean() / second.mean())
        by = SIZE / float((first + other * second).std())
        return by, by * other
    return (SIZE / float(numbers(1.0).std()),)
