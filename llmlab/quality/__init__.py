"""What a model's answers are worth, measured as llama.cpp's `llama-perplexity` does: perplexity, and drift from a reference.

`perplexity(model, tokenizer, text)` and `divergence(model, reference, tokens)` take any callable that returns `.logits`.
`sensitivity(model, tokens, types)` says what each tensor's type costs, and `best_mix` which types cost least within a budget.
`importance(model, tokenizer, text)` says which columns of a model's matrices matter, as llama.cpp's `llama-imatrix` does.
`cache_divergence(model, kv)` says what a type of KV cache costs, `find_needles(model, kv)` whether facts in a long text are
still found with it.
"""

from .budgets import BestMix, best_mix
from .caches import CacheDivergence, CacheSettings, cache_divergence, cache_divergences
from .corpus import Tokens, text, tokens_of
from .drift import Divergence, divergence
from .imatrix import Importance, read_importance
from .likelihood import Perplexity, perplexity
from .needles import Haystack, Needle, Needles, Search, find_needles, haystack
from .off_grid import unrounded
from .references import Reference, read_reference, save_reference
from .rounding import rounded_activations
from .sensitivities import Sensitivity, read_sensitivity, sensitivity
from .statistics import Estimate
from .swapping import in_types
from .weighing import importance

__all__ = ["BestMix", "CacheDivergence", "CacheSettings", "Divergence", "Estimate", "Haystack", "Importance", "Needle",
           "Needles", "Perplexity", "Reference", "Search", "Sensitivity", "Tokens", "best_mix", "cache_divergence",
           "cache_divergences", "divergence", "find_needles", "haystack", "importance", "in_types", "perplexity",
           "read_importance", "read_reference", "read_sensitivity", "rounded_activations", "save_reference", "sensitivity",
           "text", "tokens_of", "unrounded"]
