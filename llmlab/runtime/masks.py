"""What transformers says about a mask, kept until it is known whether one of every pair of tokens must be made."""

from functools import cached_property

import torch
from transformers.masking_utils import eager_mask, sdpa_mask


class Mask:
    """What transformers says about a mask, before one is made. Layers of a kind share it through one forward pass.

    plain: whether it is causal, of a `window` (0: none) and of padding alone. said: bool [batch, tokens], which are no padding,
    or None. first: the number of the first token that queries may look at."""

    def __init__(self, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True,
                 local_size: int | None = None, kv_offset: int = 0, **more):
        self.said = None if attention_mask is None else attention_mask.bool()
        self.plain, self.window, self.first = allow_is_causal_skip, local_size or 0, kv_offset
        self.asked = {**more, "attention_mask": attention_mask, "kv_offset": kv_offset, "local_size": local_size}

    @cached_property
    def padded(self) -> bool:
        return self.said is not None and not bool(self.said.all())

    @cached_property
    def pairs(self) -> torch.Tensor:
        """bool [batch, 1, queries, tokens from `first` on]"""
        return sdpa_mask(**{**self.asked, "allow_is_bidirectional_skip": False}, allow_is_causal_skip=False)

    def __getitem__(self, index) -> torch.Tensor:
        """A model that cuts its mask, or asks it for anything else a tensor has, gets the one of every pair."""
        return self.pairs[index]

    def __getattr__(self, name: str):
        if name.startswith("_") or name not in dir(torch.Tensor):
            raise AttributeError(name)
        return getattr(self.pairs, name)

    def for_tensors(self, eager: bool) -> torch.Tensor | None:
        """As transformers' own functions would have made it."""
        return eager_mask(**self.asked) if eager else sdpa_mask(**self.asked, allow_is_causal_skip=self.plain)


def asked_mask(attention_mask=None, **asked) -> Mask:
    """transformers' mask function: what it was asked for. A model within a model may ask with what it was given."""
    return attention_mask if isinstance(attention_mask, Mask) else Mask(attention_mask, **asked)
