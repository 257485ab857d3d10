"""Tokenizers from the vocabulary inside a GGUF file, token for token as llama.cpp's, and its chat templates.

`reading` checks what the file says, `splits` knows how text is cut into words, `building` makes the tokenizer, `tokens` is what
transformers sees of it, `templates` fills in chat templates where they can do no harm.
"""

from .tokens import bounded, stop_tokens, tokenizer_of

__all__ = ["bounded", "stop_tokens", "tokenizer_of"]
