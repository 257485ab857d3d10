"""How positions turn Q and K: from a GGUF's rope keys to transformers' `rope_parameters`.

GGUF has rope.freq_base, rope.dimension_count and rope.scaling.{type, factor, original_context_length, ...}; Llama 3's scaling
is a tensor instead, `rope_freqs.weight`, by which each frequency is divided (see `divide`); Phi-3's long and short factors
are two.
"""

from collections.abc import Callable

import torch
from torch import nn

from ..errors import BadFile, LabError
from .keys import Keys

KINDS = ("none", "linear", "yarn", "longrope")


def parameters(keys: Keys, head_dim: int, partial: bool = False) -> dict:
    """transformers' rope_parameters of the layers with global attention; llama.cpp's defaults where the file says nothing.

    `partial`: whether the architecture can leave a part of each head unturned. Raises BadFile, LabError.
    """
    found = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base", 10000.0)}
    turned = keys.number("rope.dimension_count", head_dim, high=head_dim)
    if partial:
        found["partial_rotary_factor"] = turned / head_dim
    elif turned != head_dim:
        raise keys.bad("rope.dimension_count", turned, f"{head_dim}, the length of a key")
    kind = keys.raw("rope.scaling.type", "linear")
    if kind not in KINDS:
        raise LabError(f"{keys.file} scales positions by {str(kind)[:40]!r}, which llmlab does not know; it knows "
                       f"{', '.join(KINDS)}. Run it with llama.cpp")
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 1.0))
    if kind == "linear" and factor != 1.0:
        found |= {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        found |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings":
                  keys.number("rope.scaling.original_context_length", keys.number("context_length"))}
        for name in ("beta_fast", "beta_slow"):
            if keys.has(f"rope.scaling.yarn_{name}"):
                found[name] = keys.real(f"rope.scaling.yarn_{name}")
        if keys.has("rope.scaling.yarn_attn_factor"):
            found["attention_factor"] = keys.real("rope.scaling.yarn_attn_factor")
    return found


def longrope(keys: Keys, read: Callable[[str], torch.Tensor | None]) -> dict:
    """Phi-3's: one list of factors up to the context it was first trained on, another beyond. {} where the file has none."""
    long, short = read("rope_factors_long.weight"), read("rope_factors_short.weight")
    if long is None or short is None:
        return {}
    found = {"rope_type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist(),
             "original_max_position_embeddings": keys.number("rope.scaling.original_context_length")}
    if keys.has("rope.scaling.attn_factor"):
        found["attention_factor"] = keys.real("rope.scaling.attn_factor")
    return found


def divide(rotary: nn.Module, factors: torch.Tensor, where: str) -> None:
    """Divide a rotary embedding's frequencies by the factors of `rope_freqs.weight`, as llama.cpp does. Raises BadFile."""
    if rotary.inv_freq.shape != factors.shape:
        raise BadFile(f"{where}: tensor 'rope_freqs.weight' has {factors.numel()} factors for {rotary.inv_freq.numel()} "
                      "frequencies; download it again or convert the model again")
    for name in ("inv_freq", "original_inv_freq"):
        getattr(rotary, name).div_(factors.to(rotary.inv_freq.device))
