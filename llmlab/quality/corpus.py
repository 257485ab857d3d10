"""The text that is scored, as token ids cut into chunks the way llama-perplexity cuts them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .. import places
from ..errors import LabError

CONTEXT = 512  # llama-perplexity's, and what published figures are made with


@cache
def text() -> str:
    """The text llmlab ships to measure on: the first eight chapters of Alice's Adventures in Wonderland, 97,133 bytes of
    ASCII in the public domain (data/README.md says from where). The same bytes on every machine, so that figures compare;
    but a book every model has read, so they say nothing beside figures of another text."""
    return (places.folder("data") / "alice.txt").read_bytes().decode("ascii")


@dataclass(frozen=True, eq=False)
class Tokens:
    """A text's token ids, int64 [n], and the id that stands at the head of every chunk (None: the vocabulary adds none)."""

    ids: np.ndarray
    bos: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def count(self, context: int, chunks: int | None = None) -> int:
        """How many whole chunks of `context` tokens there are, at most `chunks`. Raises LabError where llama-perplexity
        gives up: below two chunks."""
        if not isinstance(context, int) or context < 3:
            raise LabError(f"a context of {context!r:.40} tokens scores none: give a whole number from 3 up; published figures "
                           f"take {CONTEXT}")
        if chunks is not None and (not isinstance(chunks, int) or chunks < 1):
            raise LabError(f"chunks={chunks!r:.40}: score 1 chunk or more, or None for the whole text")
        if len(self.ids) < 2 * context:
            less = f" or a context of at most {len(self.ids) // 2}" if len(self.ids) >= 6 else ""
            raise LabError(f"the text has {len(self.ids)} tokens, and a context of {context} takes at least {2 * context}: "
                           f"give more text{less}")
        return min(chunks or len(self.ids), len(self.ids) // context)

    def chunk(self, index: int, context: int) -> np.ndarray:
        """What the model reads for chunk `index`: int64 [context], its first token replaced by `bos` where there is one."""
        ids = self.ids[index * context:(index + 1) * context].copy()
        if self.bos is not None:
            ids[0] = self.bos
        return ids


def scored(context: int) -> slice:
    """The positions of a chunk whose next token is scored: the second half, which has context to read, less the last."""
    return slice(context // 2, context - 1)


def amount(tokens: int, chunks: int, context: int) -> str:
    """How much was scored, in words."""
    return f"{tokens:,} tokens in {chunks} chunk{'s' if chunks > 1 else ''} of {context}"


def tokens_of(tokenizer, source: str | None = None) -> Tokens:
    """A text (None: `text()`) as llama-perplexity reads it: one BOS before it where the vocabulary adds one, and none of
    the text taken for special tokens. `tokenizer` is a transformers tokenizer, such as `llmlab.load` gives.

    Raises LabError if the text is empty or no string, or there is no tokenizer.
    """
    source = text() if source is None else source
    if not isinstance(source, str) or not source:
        raise LabError(f"text is a string to score, not {'an empty one' if source == '' else type(source).__name__}")
    if tokenizer is None:
        raise LabError("a text takes a tokenizer to read, and this model's file has none: give token ids")
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and list(tokenizer("a").input_ids)[:1] != [bos]:
        bos = None  # known, but not added: SmolLM2 and Qwen
    ids = tokenizer(source, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    return Tokens(np.array(([] if bos is None else [bos]) + list(ids), dtype=np.int64), bos)


def as_tokens(tokens: "Tokens | Sequence[int]") -> Tokens:
    """`tokens_of`'s answer, or plain ids (list, array or tensor, [n] or [1, n]), which get no BOS at each chunk's head."""
    if isinstance(tokens, Tokens):
        return tokens
    if isinstance(tokens, str):
        raise LabError("divergence takes token ids: quality.tokens_of(tokenizer, text) makes them from a text")
    ids = np.asarray(tokens.tolist() if hasattr(tokens, "tolist") else tokens)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise LabError(f"tokens are whole numbers [n], not {ids.dtype} {list(ids.shape)}")
    return Tokens(ids.astype(np.int64))
