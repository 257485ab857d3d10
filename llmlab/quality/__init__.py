"""What a model's answers are worth, measured as llama.cpp's `llama-perplexity` does: perplexity, and drift from a reference.

`perplexity(model, tokenizer, text)` and `divergence(model, reference, tokens)` take any callable that returns `.logits`.
"""

from .corpus import Tokens, text, tokens_of
from .drift import Divergence, divergence
from .likelihood import Perplexity, perplexity
from .references import Reference, read_reference, save_reference
from .rounding import rounded_activations
from .statistics import Estimate

__all__ = ["Divergence", "Estimate", "Perplexity", "Reference", "Tokens", "divergence", "perplexity", "read_reference",
           "rounded_activations", "save_reference", "text", "tokens_of"]
