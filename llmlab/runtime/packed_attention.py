"""The attention "llmlab" of transformers' interface: on packed pages where a cache hands them on, else as transformers' own."""

import sys

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..errors import LabError
from .gradients import without_gradients
from .masks import Mask, asked_mask
from .packed_layers import Handed, Latent

NAME = "llmlab"


def attend(module: nn.Module, query: torch.Tensor, key, value, attention_mask=None, dropout: float = 0.0,
           scaling: float | None = None, softcap: float | None = None, s_aux: torch.Tensor | None = None, **more):
    """transformers' attention function: query [batch, heads, n, head_dim] -> ([batch, n, heads, value_dim], None)."""
    if not isinstance(key, Handed):
        return _with_tensors(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap,
                             s_aux=s_aux, **more)
    who = type(module).__name__
    if module.training and torch.is_grad_enabled():
        raise LabError("gradients do not pass a packed cache; train without one (use_cache=False)")
    if more.get("position_bias") is not None:
        raise LabError(f"{who} adds a bias by position, which a packed cache has no place for; use transformers' DynamicCache")
    if more.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise LabError(f"{who} looks ahead, which a packed cache cannot; use transformers' DynamicCache")
    if more.get("output_attentions"):
        raise LabError("attention on a packed cache never holds its shares; for output_attentions use transformers' "
                       "DynamicCache")
    mask = _bool(attention_mask, who) if isinstance(attention_mask, torch.Tensor) else attention_mask
    layer = key.layer
    found = _attended(module, query, layer, mask, scaling, softcap or 0.0, s_aux)
    return found.transpose(1, 2).to(query.dtype).contiguous(), None


@without_gradients
def _attended(module: nn.Module, query: torch.Tensor, layer, mask, scaling: float | None, softcap: float,
              sinks: torch.Tensor | None) -> torch.Tensor:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    back = None
    if isinstance(layer.cache, Latent):
        query, back = _into_latent(module, query)
    found = layer.attend(query, mask, scale=scale, softcap=softcap, sinks=sinks)
    return found if back is None else torch.einsum("bhnr,hvr->bhnv", found, back.float())


def _bool(mask: torch.Tensor, who: str) -> torch.Tensor:
    """A mask that was handed to the model whole."""
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    if not bool((seen | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise LabError(f"the mask given to {who} adds numbers of its own to the scores; with a packed cache give a bool mask")
    return seen


def _with_tensors(module: nn.Module, query, key, value, mask, softcap=None, s_aux=None, **more):
    """Without a packed cache: as sdpa does it, or as the model's own eager attention where sdpa cannot."""
    eager = softcap is not None or s_aux is not None
    if isinstance(mask, Mask):
        mask = mask.for_tensors(eager)
    if not eager:
        return AttentionInterface._global_mapping["sdpa"](module, query, key, value, mask, **more)
    own = sys.modules[type(module).__module__].eager_attention_forward
    extra = {name: given for name, given in (("softcap", softcap), ("s_aux", s_aux)) if given is not None}
    return own(module, query, key, value, mask, **extra, **more)


def _into_latent(module: nn.Module, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MLA without expanding a cached row (DeepSeek-V2, arXiv 2405.04434, section 2.1.2): the queries times what would have
    expanded the keys, [batch, heads, n, rank + turned], and what expands the values found, [heads, value_dim, rank]."""
    plain, turned = query.split([query.shape[-1] - module.qk_rope_head_dim, module.qk_rope_head_dim], -1)
    expand = module.kv_b_proj
    weight = expand.weight if type(expand) is nn.Linear else expand(
        torch.eye(module.kv_lora_rank, dtype=query.dtype, device=query.device)).T
    keys, values = weight.unflatten(0, (query.shape[1], -1)).split([plain.shape[-1], module.v_head_dim], 1)
    return torch.cat([torch.einsum("bhnk,hkr->bhnr", plain, keys), turned], -1), values


def attend_packed(model: nn.Module) -> None:
    """Set a transformers model's attention to "llmlab" (of a model of several parts that of the text). Raises LabError where it
    has none that can be set."""
    config, text = model.config, model.config.get_text_config(decoder=True)
    if text._attn_implementation != NAME:
        part = next((name for name in config.sub_configs if getattr(config, name, None) is text), None)
        model.set_attn_implementation({part: NAME} if part else NAME)
    if text._attn_implementation != NAME:
        raise LabError(f"{type(model).__name__} computes attention in its own code, not through transformers' interface; use "
                       "transformers' DynamicCache")
    for kind in {type(module) for module in model.modules() if hasattr(type(module), "expand_kv")}:
        _let_latents_through(kind)


def _let_latents_through(kind: type) -> None:
    """MLA's own code expands what comes from the cache; what is packed passes by it as it is."""
    own = kind.expand_kv
    if getattr(own, "packed", False):
        return

    def expand_kv(self, latent, turned, *more):
        return (latent, turned) if isinstance(latent, Handed) else own(self, latent, turned, *more)

    expand_kv.packed = True
    kind.expand_kv = expand_kv


def register() -> None:
    """Make "llmlab" known to transformers. Again and again is as good as once."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, asked_mask)


register()
