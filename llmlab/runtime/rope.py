"""How positions turn Q and K: from a GGUF's rope keys to transformers' `rope_parameters`, and from those to angles.

GGUF has rope.freq_base, rope.dimension_count and rope.scaling.{type, factor, original_context_length, ...}; Llama 3's scaling
is a tensor instead, `rope_freqs.weight`, by which each frequency is divided (see `divide`); Phi-3's long and short factors
are two.
"""

import math
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
    for name in ("inv_freq", "original_inv_freq"):
        getattr(rotary, name).copy_(divided(getattr(rotary, name), factors, where))


def divided(frequencies: torch.Tensor, factors: torch.Tensor, where: str) -> torch.Tensor:
    """Frequencies by the factors of `rope_freqs.weight`. Raises BadFile where there are not as many."""
    if frequencies.shape != factors.shape:
        raise BadFile(f"{where}: tensor 'rope_freqs.weight' has {factors.numel()} factors for {frequencies.numel()} "
                      "frequencies; download it again or convert the model again")
    return frequencies / factors.to(frequencies.device)


def frequencies(rope: dict, head_dim: int, trained: int, long: bool = False) -> tuple[torch.Tensor, float]:
    """(radians a position for each pair of numbers, float32; what cosine and sine are multiplied by) of `rope_parameters`.

    `trained`: tokens of context the model was trained with. `long`: by Phi-3's factors for longer texts. The formulas are those
    of YaRN (arXiv 2309.00071, section 3) and LongRoPE (arXiv 2402.13753), as transformers' modeling_rope_utils.py has them.
    """
    turned, base, kind = int(head_dim * rope.get("partial_rotary_factor", 1.0)), rope["rope_theta"], rope["rope_type"]
    powers = base ** (torch.arange(0, turned, 2, dtype=torch.int64).float() / turned)
    factor, first = rope.get("factor"), rope.get("original_max_position_embeddings")
    if kind == "linear":
        return 1.0 / powers / factor, 1.0
    if kind == "longrope":
        stretch = trained / first
        scale = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(first))
        by = torch.tensor(rope["long_factor" if long else "short_factor"], dtype=torch.float32)
        return 1.0 / (by * powers), rope.get("attention_factor", scale)
    if kind == "yarn":
        low, high = (turned * math.log(first / (turns * 2 * math.pi)) / (2 * math.log(base))
                     for turns in (rope.get("beta_fast", 32), rope.get("beta_slow", 1)))
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, turned - 1)
        ramp = ((torch.arange(turned // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)).clamp(0, 1)
        scale = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1
        return ramp / (factor * powers) + (1 - ramp) / powers, rope.get("attention_factor", scale)
    return 1.0 / powers, 1.0


def table(frequencies: torch.Tensor, scale: float, start: int, stop: int, pairs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of positions `start` to `stop`, each float32 [positions, 1, turned]: a number of a head turned is
    cos * itself + sin * the other of its pair, so the sine of the first of each is negative.

    `pairs`: pairs are neighbours; else one of each lies in either half.
    """
    angles = torch.arange(start, stop, device=frequencies.device).float()[:, None] * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    if pairs:
        return cos.repeat_interleave(2, -1)[:, None], torch.stack([-sin, sin], -1).flatten(-2)[:, None]
    return torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]
