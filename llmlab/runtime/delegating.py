"""A transformers model that hands what it can to a compiled decoder: one text at a time, logits and nothing else.

Everything else (several texts, hidden states, gradients, adapters, hooks inside) goes through transformers' own modules over
the same file, uncompiled. The cache is the list of tokens read: the decoder keeps keys and values, and reads again what
another text has overwritten meanwhile.
"""

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import LabError
from .decoder import Decoder


class DecoderCache(Cache):
    """What a decoder has read for one text."""

    def __init__(self, decoder: Decoder):
        super().__init__(layers=[])
        self.decoder, self.tokens = decoder, []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return len(self.tokens)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return len(self.tokens) + query_length, 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.decoder.context

    def crop(self, max_length: int) -> None:
        """To so many tokens, or by so many where negative."""
        del self.tokens[max_length:]

    def reset(self) -> None:
        self.tokens = []

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if len(beam_idx) != 1:
            raise LabError("a compiled decoder reads one text at a time; for beams load the model without compile=True")

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return False

    def read(self, tokens: list[int], every: bool) -> torch.Tensor:
        """Logits after each of `tokens`, or after the last, [n, vocabulary]."""
        decoder, whole = self.decoder, self.tokens + tokens
        with decoder.lock:
            known = min(decoder.keep(whole), len(self.tokens))
            if known < len(decoder.tokens):             # logits are wanted that were given already
                known = min(known, decoder.keep(whole[:known + 1]))
            if missing := self.tokens[known:]:
                decoder.read(missing)
            found = decoder.logits(tokens) if every else decoder.read(tokens)[None]
        self.tokens = whole
        return found

    def __deepcopy__(self, memo) -> "DecoderCache":
        """The same text, to be gone on with in another way."""
        made = DecoderCache(self.decoder)
        made.tokens = list(self.tokens)
        return made


class Delegating:
    """Mixed into a packed model whose `decoder` is compiled."""

    decoder: Decoder

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, logits_to_keep=0, **kwargs):
        mine = isinstance(past_key_values, DecoderCache)
        if self._can(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, kwargs):
            cache = past_key_values if mine else DecoderCache(self.decoder)
            tokens = input_ids[0].tolist()
            one = isinstance(logits_to_keep, int) and logits_to_keep == 1
            logits = cache.read(tokens, not one)
            if not one:
                logits = logits[-logits_to_keep:] if isinstance(logits_to_keep, int) else logits[logits_to_keep]
            keep = self.config.use_cache if use_cache is None else use_cache
            return CausalLMOutputWithPast(logits=logits[None], past_key_values=cache if mine or keep else None)
        if mine:
            raise LabError("a compiled decoder's cache goes on with one text's tokens alone (no padding, hidden states, "
                           "attentions or adapters); start with a cache of transformers' own, or load without compile=True")
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                               past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache,
                               logits_to_keep=logits_to_keep, **kwargs)

    def _can(self, ids, mask, positions, cache, embeds, labels, kwargs) -> bool:
        if ids is None or embeds is not None or labels is not None or ids.shape[0] != 1 or not ids.shape[1]:
            return False
        if self.training or kwargs.get("return_dict") is False or self._tells_more(kwargs.get):
            return False
        if mask is not None and (mask.ndim != 2 or not bool(mask.all())):
            return False
        if positions is not None:
            before = len(cache.tokens) if isinstance(cache, DecoderCache) else 0
            if positions.flatten().tolist() != list(range(before, before + ids.shape[1])):
                return False
        if isinstance(cache, DecoderCache):
            return ids.shape[1] == 1 or self.untouched()
        return cache is None and self.untouched()

    def _tells_more(self, asked) -> bool:
        """Whether more than logits is wanted, by arguments or by the configuration."""
        return any((getattr(self.config, name, False) if (said := asked(name)) is None else said)
                   for name in ("output_hidden_states", "output_attentions"))

    def untouched(self) -> bool:
        """Whether the modules are those that were loaded, nothing in them learns, and nobody listens inside."""
        return parts(self) == self._parts

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs):
        mask, one = model_kwargs.get("attention_mask"), generation_config.num_return_sequences in (None, 1)
        if (generation_mode in ("greedy_search", "sample") and batch_size == 1 and one
                and generation_config.use_cache is not False and generation_config.cache_implementation is None
                and model_kwargs.get("past_key_values") is None and (mask is None or bool(mask.all()))
                and not self._tells_more(lambda name: getattr(generation_config, name, None)) and self.untouched()):
            model_kwargs["past_key_values"] = DecoderCache(self.decoder)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, *args,
                                                     **kwargs)

    def __reduce_ex__(self, protocol):
        """A copy is the packed model alone: a decoder is one place, and its text is one text."""
        make, args, state, *more = super().__reduce_ex__(protocol)
        return make, args, {k: v for k, v in state.items() if k not in ("decoder", "_parts")}, *more


def delegate(model: nn.Module, decoder: Decoder) -> nn.Module:
    """The same packed model, now with a decoder to hand on to."""
    kind = type(model)
    model.__class__ = type(kind.__name__, (Delegating, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
    model.decoder, model._parts = decoder, parts(model)
    return model


def parts(model: nn.Module) -> tuple:
    """What tells whether anything in a model was exchanged, changed, is listened to or learns."""
    modules = list(model.modules())[1:]
    hooks = [hook for m in modules for kind in (m._forward_hooks, m._forward_pre_hooks) for hook in kind.values()]
    return (tuple(map(id, modules)), any("forward" in vars(m) for m in modules), sum(not _own(hook) for hook in hooks),
            tuple((p.requires_grad, 0 if p.is_inference() else p._version) for p in model.parameters()))


def _own(hook) -> bool:
    """transformers listens in its modules from the first time that hidden states are asked for, and stays."""
    return (getattr(getattr(hook, "func", hook), "__module__", None) or "").startswith("transformers.")
