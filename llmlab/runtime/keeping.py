"""A transformers model that keeps its keys and values packed unless it is given another cache.

`forward` and `generate` begin with a PackedCache where transformers would begin with a DynamicCache; whatever is asked for by
name (a cache, `use_cache=False`, `cache_implementation`) is done as asked, and what learns keeps numbers.
"""

from functools import cache, wraps
from inspect import signature

import torch
from torch import nn

from .packed_cache import PackedCache


class Keeping:
    """Mixed into a transformers model. `kv`: the cache types of keys and of values."""

    kv: tuple[str, str]

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if (model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False
                and generation_config.cache_implementation is None):
            model_kwargs["past_key_values"] = PackedCache(self.config, self.kv)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _keeps(self, use_cache: bool | None) -> bool:
        """Whether a forward pass that was given no cache is to begin a packed one."""
        wanted = getattr(self.config.get_text_config(decoder=True), "use_cache", False) if use_cache is None else use_cache
        learns = torch.is_grad_enabled() and (self.training or any(p.requires_grad for p in self.parameters()))
        return bool(wanted) and not learns

    def __reduce_ex__(self, protocol):
        """A copy keeps packed too."""
        kind = type(self).__bases__[1]
        make, args, *more = super().__reduce_ex__(protocol)
        return _again, (make, tuple(kind if a is type(self) else a for a in args)), *more


def keep_packed(model: nn.Module, kv: tuple[str, str]) -> nn.Module:
    """The same model, which keeps its keys and values in these types. Raises LabError where it cannot."""
    PackedCache(model, kv)
    model.__class__, model.kv = _keeping(type(model)), kv
    return model


def _again(make, args):
    made = make(*args)
    made.__class__ = _keeping(type(made))
    return made


@cache
def _keeping(kind: type) -> type:
    place = [*signature(kind.forward).parameters].index("past_key_values") - 1

    @wraps(kind.forward)
    def forward(self, *args, **kwargs):
        given = args[place] if len(args) > place else kwargs.get("past_key_values")
        if given is None and len(args) <= place and self._keeps(kwargs.get("use_cache")):
            kwargs["past_key_values"] = PackedCache(self.config, self.kv)
        return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (Keeping, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__, "forward": forward})
