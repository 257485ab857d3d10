"""Where each tensor of the GGUF lies in a checkpoint, and what is done to its rows on the way.

runtime/families.py has the names the other way round, and what the converter changes: rows of Q and K interleaved for
llama.cpp's rope, 1 added to Gemma's norms. Experts are stacked, gate and up of several in one parameter taken apart.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..architectures import Tensor
from ..errors import BadFile, LabError
from ..gguf.words import show
from ..runtime.families import FAMILIES, TOP, Family
from .tensor_files import TensorFiles, check_floating

# model_type -> the family whose names it has; Gemma 1 is Llama's names with Gemma's norms.
_ALIKE = {"llama": "llama", "mistral": "llama", "mixtral": "llama with experts", "qwen2": "qwen2", "qwen3": "qwen3",
          "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma2": "gemma2", "gemma3": "gemma3", "gemma3_text": "gemma3"}
KNOWN = (*_ALIKE, "gemma")
# The experts of a block: names of gate, up and down of one, by a number; and of parameters that hold them all.
_SINGLE = ({"gate": "block_sparse_moe.experts.{}.w1.weight", "up": "block_sparse_moe.experts.{}.w3.weight",
            "down": "block_sparse_moe.experts.{}.w2.weight"},
           {part: f"mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")})
_STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_ALSO = {"mlp.gate": "block_sparse_moe.gate"}      # Mixtral's router, as its authors called it
_NOT_TEXT = ("vision", "visual", "audio", "multi_modal_projector", "mm_projector")


@dataclass(frozen=True)
class Origin:
    """`names`: the checkpoint's tensors, one an expert where there are several. `heads`: so many heads whose rows are
    interleaved (0: none). `shift`: added. `stacked`: experts lie in one tensor, and in each their rows begin at `first`.
    `made`: the numbers themselves, where a checkpoint has none."""

    names: tuple[str, ...] = ()
    heads: int = 0
    shift: float = 0.0
    stacked: bool = False
    first: int = 0
    made: torch.Tensor | None = None


def family_named(model_type: str, where: str) -> Family:
    """Raises LabError for a family that is not converted."""
    if model_type == "gemma":
        llama = FAMILIES["llama"]
        return Family("gemma", llama.config, llama.block, norm_shift=1.0)
    if model_type not in _ALIKE:
        raise LabError(f"{where} is a {show(str(model_type))} model, and llmlab converts {', '.join(KNOWN)}; convert it with "
                       "llama.cpp's convert_hf_to_gguf.py and give the GGUF")
    return FAMILIES[_ALIKE[model_type]]


def origins(tensors: tuple[Tensor, ...], family: Family, files: TensorFiles, fields: Mapping[str, Any],
            shown: str) -> dict[str, Origin]:
    """The origin of every tensor of a GGUF. Raises BadFile where the checkpoint lacks one, has one of another shape, or has one
    that the GGUF would have no place for."""
    names = {_plain(name): name for name in files.entries if not any(part in name for part in _NOT_TEXT)}
    heads = {"attn_q": fields["num_attention_heads"], "attn_k": fields.get("num_key_value_heads") or
             fields["num_attention_heads"]} if "self_attn.q_proj" in family.interleaved else {}
    modules = {stem: module for module, stem in family.block.items()}
    found = {}
    for tensor in tensors:
        if tensor.name == "rope_freqs.weight":
            found[tensor.name] = Origin(made=llama3_factors(fields, tensor.shape[0]))
        elif "_exps." in tensor.name:
            found[tensor.name] = _experts(tensor, names, shown)
        else:
            found[tensor.name] = _one(tensor, modules, family, heads, names, shown)
        _check(tensor, found[tensor.name], files, shown)
    used = {name for origin in found.values() for name in origin.names}
    tied = "output.weight" not in found
    left = [name for plain, name in names.items() if name not in used and not plain.endswith("rotary_emb.inv_freq")
            and not (tied and plain == "lm_head.weight")]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise BadFile(f"{shown} has the tensor {show(left[0])}{more}, for which a GGUF of this model has no place; is it a "
                      "model with an adapter, or a quantized one? give the plain checkpoint")
    return found


def _plain(name: str) -> str:
    """A tensor's name as the plain causal model has it: multimodal and headless ones have other prefixes."""
    for prefix in ("model.language_model.", "language_model.model.", "language_model."):
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            return name if name.startswith("lm_head.") else "model." + name
    return "model." + name if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


def _one(tensor: Tensor, modules: dict[str, str], family: Family, heads: dict[str, int], names: dict[str, str],
         shown: str) -> Origin:
    stem, _, end = tensor.bare.removeprefix(".").rpartition(".")
    if tensor.layer < 0:
        module = {known: module for module, known in TOP.items()}.get(stem)
        wanted = [f"{module}.{end}"]
    else:
        module = modules.get(stem)
        wanted = [f"model.layers.{tensor.layer}.{one}.{end}" for one in (module, _ALSO.get(module)) if one]
    name = next((names[one] for one in wanted if one in names), None)
    if module is None or name is None:
        raise BadFile(f"{shown} lacks the tensor {show(wanted[0] if module else tensor.name)}; download it again")
    is_norm = stem.endswith("norm") and end == "weight"
    return Origin((name,), heads.get(stem, 0), family.norm_shift if is_norm else 0.0)


def _experts(tensor: Tensor, names: dict[str, str], shown: str) -> Origin:
    """gate, up or down of all experts of a block."""
    part = tensor.bare.removeprefix(".ffn_").partition("_exps")[0]
    block, count = f"model.layers.{tensor.layer}.", tensor.shape[2]
    for single in _SINGLE:
        wanted = [block + single[part].format(expert) for expert in range(count)]
        if wanted[0] in names:
            missing = [name for name in wanted if name not in names]
            if missing:
                raise BadFile(f"{shown} lacks the tensor {show(missing[0])}; download it again")
            return Origin(tuple(names[name] for name in wanted))
    stacked = block + _STACKED[part == "down"]
    if stacked not in names:
        raise BadFile(f"{shown} lacks the tensor {show(block + _SINGLE[1][part].format(0))}; download it again")
    return Origin((names[stacked],), stacked=True, first=tensor.shape[1] if part == "up" else 0)


def _check(tensor: Tensor, origin: Origin, files: TensorFiles, shown: str) -> None:
    """Shapes and dtypes of what was found."""
    shape = tensor.shape[::-1]
    if origin.stacked:
        double = 2 if "_down_" not in tensor.name else 1
        shape = (shape[0], double * shape[1], shape[2])
    elif "_exps." in tensor.name:
        shape = shape[1:]
    for name in origin.names:
        entry = files.entries[name]
        check_floating(entry, name, shown)
        cut = tensor.name == "token_embd.weight" and entry.shape[0] > shape[0] and entry.shape[1:] == shape[1:]
        if entry.shape != shape and not cut and not (len(shape) == 1 and entry.shape == (1, *shape)):
            raise BadFile(f"{shown}: tensor {show(name)} is {list(entry.shape)}, and config.json says {list(shape)}; one of "
                          "them is of another model")


def read(origin: Origin, files: TensorFiles, tensor: Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows of a tensor of the GGUF, float32 [stop - start, cols]; those of the second expert follow those of the first."""
    if origin.made is not None:
        return origin.made[None].clone()
    rows = tensor.shape[1] if len(tensor.shape) > 1 else 1
    parts = []
    while start < stop:
        expert, row = divmod(start, rows)
        until = min(stop - expert * rows, rows)
        parts.append(_rows(origin, files, expert, row, until, rows))
        start += until - row
    found = parts[0] if len(parts) == 1 else torch.cat(parts)
    return found + origin.shift if origin.shift else found


def _rows(origin: Origin, files: TensorFiles, expert: int, start: int, stop: int, rows: int) -> torch.Tensor:
    if origin.stacked:
        return files.rows(origin.names[0], origin.first + start, origin.first + stop, expert)
    name = origin.names[expert if len(origin.names) > 1 else 0]
    if not origin.heads:
        return files.rows(name, start, stop)
    if len(files.entries[name].shape) == 1:      # a bias: its numbers are what rows are elsewhere
        return interleave(files.rows(name, 0, 1)[0], origin.heads)[None]
    size = rows // origin.heads
    first = start // size * size                 # whole heads, for a row's other half lies in the same one
    last = -(-stop // size) * size
    return interleave(files.rows(name, first, last), (last - first) // size)[start - first:stop - first]


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Of each head the second half's rows between the first's: rope turns neighbours in llama.cpp, halves in transformers."""
    return rows.view(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def llama3_factors(fields: Mapping[str, Any], count: int) -> torch.Tensor:
    """float32 [count]: what Llama 3.1's scaling divides each frequency by (transformers' modeling_rope_utils.py,
    "llama3"): nothing for short waves, `factor` for those longer than the context it was first trained on, and between."""
    rope = fields["rope_parameters"]
    factor, first = rope.get("factor", 8.0), rope.get("original_max_position_embeddings", 8192)
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    powers = rope.get("rope_theta", 10000.0) ** (torch.arange(0, 2 * count, 2, dtype=torch.float32) / (2 * count))
    wave = 2 * math.pi / (1.0 / powers)
    smooth = (first / wave - low) / (high - low)
    found = 1 / ((1 - smooth) / factor + smooth)
    return torch.where(wave < first / high, 1.0, torch.where(wave > first / low, float(factor), found))
