"""A model that is larger than the small one, written once where there is disk to spare: random weights, so that it says nothing
sensible, but takes the memory and the time that a real one would."""

import shutil
from pathlib import Path

import numpy as np
import torch

from .. import memory, places
from ..errors import LabError
from ..formats import quantize
from ..gguf import write_gguf
from ..shapes import from_config
from ..units import format_bytes

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16,
          "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
          "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False}
QUANT = "Q4_0"
SPARE = 4                # times the file's bytes that must be free
_SAMPLE = 4096           # rows of numbers that are quantized, and then repeated


def place() -> Path:
    """Where it lies, or would."""
    return places.cache() / "models" / f"llmlab-random-0.8B.{QUANT}.gguf"


def larger(config: dict = CONFIG, path: Path | None = None) -> Path:
    """The file, written in some seconds where it is not there yet. Raises LabError where the disk has no room to spare."""
    path = path or place()
    if path.is_file():
        return path
    spec = from_config(config, "llmlab-random-0.8b")
    types = memory.types(spec, QUANT)
    size = sum(memory.tensor_bytes(type, tensor.shape) for tensor, type in zip(spec.tensors, types, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < SPARE * size:
        raise LabError(f"a larger model takes {format_bytes(size)}, and of the disk only {format_bytes(free)} are free; make "
                       "room, or stay with the small one")
    blocks = {type: _blocks(type) for type in set(types) if type != "F32"}
    fields = {f"{spec.architecture}.{key}": value for key, value in spec.metadata.items()}
    write_gguf(path, {"general.architecture": spec.architecture, "general.name": "llmlab random 0.8B",
                      "tokenizer.ggml.model": "no_vocab", **fields},
               [(tensor.name, tensor.shape, type, lambda tensor=tensor, type=type: _data(tensor, type, blocks))
                for tensor, type in zip(spec.tensors, types, strict=True)])
    return path


def _blocks(type: str) -> np.ndarray:
    """Bytes of a sample of numbers as a trained model's are spread."""
    random = torch.randn(_SAMPLE, 256, generator=torch.Generator().manual_seed(1)) * 0.02
    return quantize(random, type).numpy().reshape(-1).view(np.uint8)


def _data(tensor, type: str, blocks: dict[str, np.ndarray]) -> bytes:
    if type == "F32":
        return np.ones(tensor.elements, np.float32).tobytes()
    size, sample = memory.tensor_bytes(type, tensor.shape), blocks[type]
    return np.tile(sample, -(-size // len(sample)))[:size].tobytes()

