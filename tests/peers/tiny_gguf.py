"""A GGUF that llama.cpp loads, from a spec alone: every tensor that the spec names."""

import os
import zlib

import gguf
import numpy as np

from llmlab.formats import FORMATS
from llmlab.gguf import write_gguf
from llmlab.memory import tensor_bytes
from llmlab.shapes import ModelSpec, Tensor
from llmlab.units import align

_ROPE_SECTIONS = [8, 8, 8, 0]
# What a loader insists on beyond what sizes depend on; the values do not matter for bytes.
_EXTRA = {
    "cohere2": {"logit_scale": 0.25},
    "granite": {"logit_scale": 8.0},
    "granitehybrid": {"logit_scale": 8.0},
    "granitemoe": {"logit_scale": 8.0},
    "qwen35": {"rope.dimension_sections": _ROPE_SECTIONS},
    "qwen35moe": {"rope.dimension_sections": _ROPE_SECTIONS},
    "step35": {"rope.freq_base_swa": 10000.0},
    "minimax-m2": {"expert_gating_func": 2},
    "llama4": {"expert_gating_func": 2},
    "deepseek2": {"expert_gating_func": 2, "expert_weights_scale": 1.0},
    "gemma4": {"embedding_length_per_layer_input": 0},
    "lfm2moe": {"expert_gating_func": 2},
    "glm4moe": {"expert_gating_func": 2, "expert_weights_scale": 1.0, "expert_weights_norm": True},
}
_FLAGS = ("attention.sliding_window_pattern", "attention.recurrent_layers")
_FILE_TYPE = {"F32": 0, "F16": 1, "BF16": 32}


def write_tiny(spec: ModelSpec, path, dtype: str = "F16") -> None:
    """Write `spec` with weights in `dtype` ("F32", "F16" or "BF16"); types that a converter fixes are kept (no half
    precision where it writes float32 throughout).

    Without a vocabulary: llama.cpp takes its size from the metadata. The same spec gives the same bytes.
    """
    metadata = _metadata(spec, _FILE_TYPE[dtype])
    types = [dtype if dtype == "F32" else t.type or dtype for t in spec.tensors]
    write_gguf(path, metadata, [(t.name, t.shape, type, _numbers(t, type))
                                for t, type in zip(spec.tensors, types, strict=True)])


def write_hollow(spec: ModelSpec, path, types: tuple[str, ...] = ()) -> None:
    """Write a header of `spec` in F16, or in a type for each tensor, and for the tensors a hole: a file of full size that
    takes no room on the disk.

    llama.cpp reads no weights in a dry run. By gguf-py, for our own writer writes every byte.
    """
    writer = gguf.GGUFWriter(path, spec.architecture)
    for key, value in _metadata(spec, _FILE_TYPE["F16"]).items():
        if key == "general.architecture":
            continue
        if isinstance(value, tuple):
            writer.add_array(key, value[1])
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if value < 2**32 else gguf.GGUFValueType.UINT64)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    hole = 0
    for t, name in zip(spec.tensors, types or [t.type or "F16" for t in spec.tensors], strict=True):
        type, size = gguf.GGMLQuantizationType[name], tensor_bytes(name, t.shape)
        shape = t.shape if name in ("F32", "F16") else (FORMATS[name].bytes(t.shape[0]), *t.shape[1:])
        kind = np.dtype(np.float16 if shape == t.shape else np.uint8)
        writer.add_tensor_info(t.name, shape[::-1], kind, size, raw_dtype=type)
        hole += align(size, 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.flush()
    writer.close()
    os.truncate(path, align(os.path.getsize(path), 32) + hole)


def _metadata(spec: ModelSpec, file_type: int) -> dict:
    metadata = {"general.architecture": spec.architecture, "general.name": spec.name,
                "general.file_type": file_type, "tokenizer.ggml.model": "no_vocab"}
    for key, value in {**_EXTRA.get(spec.architecture, {}), **spec.metadata}.items():
        metadata[f"{spec.architecture}.{key}"] = _stored(key, value)
    return metadata


def _stored(key: str, value):
    """A metadata value as write_gguf takes it: int32 for lists, as the converter writes them, so that 0 may occur."""
    if not isinstance(value, (list, tuple)):
        return value
    return ("array:bool", [bool(v) for v in value]) if key in _FLAGS else ("array:int32", [int(v) for v in value])


def _numbers(tensor: Tensor, type: str):
    """A callable that makes the bytes of one tensor: numbers around 0 (around 1 for norms), seeded by its name.

    Only the first rows have any; the rest is zero, which the slow quantizers pass over at once.
    """
    width, name = tensor.shape[0], tensor.name
    filled = min(tensor.elements, 4 * width)

    def make() -> bytes:
        values = np.zeros(tensor.elements, dtype=np.float32)
        values[:filled] = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(filled, dtype=np.float32) * 0.02
        if "norm" in name:
            values += 1
        if type == "F32":
            return values.tobytes()
        if type == "F16":
            return values.astype(np.float16).tobytes()
        if type == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        raise ValueError(f"{name} is fixed to {type}, which tiny files do not write")

    return make
