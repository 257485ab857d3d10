"""A transformers cache whose keys and values stay packed: the layers' pages go to attention as they are, never to the model.

`update` appends and hands the layer on in place of tensors; the attention registered as "llmlab" meets it there and works on
the pages. Which cells a query looks at follows from positions; a mask of every pair is made only where a model asks for more
than causal attention, windows and padding.
"""

from torch import nn
from transformers import Cache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from ..errors import LabError
from ..kernels.pages import Pages
from ..memory import cache_types, checked_integer
from .packed_attention import attend_packed
from .packed_layers import PackedLayer, check_latent

_AFRESH = ("dummy", "linear_attention", "conv")         # layers without keys and values stay transformers' own
_PACKED = ("full_attention", "sliding_attention", "chunked_attention")


class PackedCache(Cache):
    """Keys and values of a transformers model in a cache type of llama.cpp's: `past_key_values` of `generate` and `forward`.

    `model`: the model, whose attention is set to "llmlab" (`model.set_attn_implementation("sdpa")` undoes it; without a packed
    cache "llmlab" attends as sdpa or eager do), or only its configuration. `kv`: a type of `memory.CACHE_TYPES` or a pair for
    K and V. `sinks`, `recent`: of each text so many first and last tokens stay in float16 beside the pages. `rotate`: keys,
    values and queries are turned by a Hadamard matrix, which spreads outliers. One cache is one batch of texts.

    Layers of a sliding window hold its cells and 512 more, full layers whole pages of 256, MLA layers one latent row a token:
    `bytes` is what `memory.cache_bytes` says for so many tokens (less where a checkpoint declares a window that llama.cpp does
    not keep to, as Mistral's first did). Blocks lie along a head in the model's own order, which for Llama's family is not
    llama.cpp's (RoPE by halves, not by neighbours): as many bytes, rounded together with other numbers. Nothing that was
    written is quantized again. Gradients do not pass. Raises LabError: an unknown type, heads that are no multiple of 32, a
    model whose own code computes with cached keys (sparse attention with an indexer, layers that are recurrent and attend at
    once).
    """

    def __init__(self, model, kv: str | tuple[str, str] = "q8_0", *, sinks: int = 0, recent: int = 0, rotate: bool = False):
        config = getattr(model, "config", model)
        self.kv = cache_types(kv)
        settings = {"kv": self.kv, "rotate": bool(rotate)}
        for name, count in (("sinks", sinks), ("recent", recent)):
            settings[name] = checked_integer(name, count, 0, 2**20, "give a number of tokens, 0 for none")
        super().__init__(layers=_layers(config.get_text_config(decoder=True), settings))
        if isinstance(model, nn.Module):
            attend_packed(model)

    @property
    def bytes(self) -> int:
        """What keys and values hold, exactly (recurrent states are not among them)."""
        return sum(layer.bytes for layer in self.packed)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many of the last tokens, given as a number below 0: in all layers or, with a LabError, in none."""
        for layer in self.packed:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    @property
    def packed(self) -> list[PackedLayer]:
        """The layers that have keys and values of their own."""
        return [layer for layer in self.layers if isinstance(layer, PackedLayer)]


def _layers(config, settings: dict) -> list:
    types, more = get_layer_types_and_kwargs(config)
    modes = getattr(config, "kv_sharing_modes", None) or [None] * len(types)
    made = []
    for number, (type, own, mode, part) in enumerate(zip(types, more, modes, config.per_layer_config, strict=True)):
        if type in _AFRESH:
            made.append(DYNAMIC_LAYER_TYPE_MAPPING[type](**own))
            continue
        if type not in _PACKED:
            raise LabError(f"layer {number} of a {config.model_type} model is {type!r:.60}, and a packed cache has none of "
                           "that kind; run it with transformers' DynamicCache")
        if mode == "store" and settings["recent"]:
            raise LabError(f"layers of a {config.model_type} model share keys, which goes with recent=0 only")
        latent, dim = getattr(part, "kv_lora_rank", None) or 0, getattr(part, "head_dim", None)
        for kv in settings["kv"] if dim and not latent else ():
            Pages(kv, 1, 1, dim, 0)         # says what does not divide into blocks
        if latent:
            check_latent(latent, **settings)
        made.append(PackedLayer(window=own.get("sliding_window") or 0, shared=mode == "store", latent=latent,
                                ruled=type != "chunked_attention", **settings))
    return made
