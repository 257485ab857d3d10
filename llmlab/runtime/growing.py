"""A KV cache with room to grow: transformers' own copies all keys and values for each token, which a long context feels."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 256              # tokens of room made at once, at least; beyond that an eighth of what is there


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, [batch, heads, tokens, width], at the beginning of a larger tensor."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write new keys and values behind those there are; views of all of them."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._room = [self.keys, self.values] = [key_states[..., :0, :], value_states[..., :0, :]]
        before, new = self.get_seq_length(), key_states.shape[-2]
        found = []
        for at, (states, old) in enumerate(((key_states, self.keys), (value_states, self.values))):
            if self._room[at].shape[-2] < before + new or self._room[at].shape[0] != states.shape[0]:
                many = before + new + max(_ROOM, (before + new) // 8)
                larger = states.new_empty(*states.shape[:-2], many, states.shape[-1])
                if before:
                    larger[..., :before, :] = old
                self._room[at] = larger
            self._room[at][..., before:before + new, :] = states
            found.append(self._room[at][..., :before + new, :])
        self.keys, self.values = found
        return self.keys, self.values


def growing_cache(config) -> DynamicCache:
    """transformers' cache for a model of this config, its plain layers with room to grow; windows are as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
