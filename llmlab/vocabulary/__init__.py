"""Tokenizers from the vocabulary inside a GGUF file, token for token as llama.cpp's, and its chat templates.

`reading` checks what the file says, `splits` knows how text is cut into words, `building` makes the tokenizer, `pieces` spells
tokens, `chats` writes conversations in templates, which `templates` fills in where they can do no harm; `words` is all of it
without transformers, `tokens` what transformers sees of it.
"""

from .chats import bounded
from .words import Words, stop_tokens, tokenizer_of, words_of

__all__ = ["Words", "bounded", "stop_tokens", "tokenizer_of", "words_of"]
