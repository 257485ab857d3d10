"""Perplexity: how many tokens a model hesitates between, on average, when it reads a text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import exp

import numpy as np
import torch

from . import passes, statistics
from .corpus import CONTEXT, Tokens, amount, as_tokens, scored, tokens_of


@dataclass(frozen=True, repr=False)
class Perplexity:
    """exp of the mean negative log-likelihood of the scored tokens: measured, on one text, at one context.

    `value` and `standard_error` are llama-perplexity's "Final estimate"; `tokens` were scored, of `chunks` chunks of `context`
    tokens; `nll` is the mean negative log-likelihood a token, in nats, and `per_chunk` the same of each chunk.
    """

    value: float
    standard_error: float
    nll: float
    tokens: int
    chunks: int
    context: int
    per_chunk: tuple[float, ...]
    model: str

    @property
    def running(self) -> tuple[float, ...]:
        """The perplexity after each chunk, as llama-perplexity prints it on its way: [1]18.0774,[2]23.3734, …"""
        return tuple(exp(total / n) for n, total in enumerate(accumulate(self.per_chunk), 1))

    def __repr__(self) -> str:
        return (f"{self.model}: perplexity {self.value:.4f} ± {self.standard_error:.5f} "
                f"(measured: {amount(self.tokens, self.chunks, self.context)})")


def perplexity(model: Callable, tokenizer, text: str | Tokens | Sequence[int] | None = None, context: int = CONTEXT, *,
               chunks: int | None = None, progress: bool = True, stopped: Callable[[], bool] = lambda: False) -> Perplexity:
    """A model's perplexity on a text, as `llama-perplexity -c CONTEXT --chunks CHUNKS` defines it.

    The text is cut in chunks of `context` tokens (what is left over is dropped), each read on its own with the vocabulary's
    BOS as its first token where it adds one; the second half of each is scored, so that every scored token has at least half
    a context before it. Logits take 256 MiB at a time at most, whatever the vocabulary and the context: a long chunk is read in
    pieces, if the model has a cache.

    `model` is called with ids [1, context] and answers with `.logits` [1, context, vocabulary]; `text` is a string, token
    ids (`tokenizer` may then be None) or None for `quality.text()`; `stopped` is asked after every chunk, and the figures are
    then those of the chunks so far. Logits count as they come: load a model with dtype="float32" for figures to hold against
    llama-perplexity's, whose own are float32 throughout.

    Raises LabError: text shorter than two chunks, ids outside the vocabulary, logits that are not numbers.
    """
    from tqdm.auto import tqdm

    tokens = tokens_of(tokenizer, text) if text is None or isinstance(text, str) else as_tokens(text)
    count, found, memory = tokens.count(context, chunks), [], (passes.Held(), passes.Held())
    with passes.evaluated(model), tqdm(total=count, desc="perplexity", unit="chunk", disable=not progress) as bar:
        for index in range(count):
            found.append(_nll(model, tokens, index, context, *memory))
            bar.set_postfix_str(f"{exp(np.concatenate(found).mean()):.4f}", refresh=False)
            bar.update()
            if stopped():
                break
    nll = statistics.mean(np.concatenate(found))
    whole = statistics.exponential(nll)
    return Perplexity(whole.value, whole.error, nll.value, sum(map(len, found)), len(found), context,
                      tuple(float(one.mean()) for one in found), passes.name_of(model))


def _nll(model: Callable, tokens: Tokens, index: int, context: int, held: passes.Held, spare: passes.Held) -> np.ndarray:
    """Negative log-likelihood of each scored token of a chunk, float64 [scored]."""
    out, targets = [], next_tokens(tokens, index, context)
    for rows in passes.logits(model, tokens.chunk(index, context), f"chunk {index + 1}", held):
        wanted = targets[sum(map(len, out)):][:len(rows)]
        out.append(-pick(passes.log_probabilities(rows, spare), wanted).cpu().numpy())
    return np.concatenate(out)


def next_tokens(tokens: Tokens, index: int, context: int) -> torch.Tensor:
    """The tokens a chunk's scored positions have to predict, int64 [scored]."""
    rows = scored(context)
    return torch.from_numpy(tokens.ids[index * context:(index + 1) * context][rows.start + 1:rows.stop + 1])


def pick(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """rows[i, wanted[i]], [rows]. Raises LabError if a wanted token is outside the vocabulary."""
    passes.within(wanted.numpy(), rows.shape[-1])
    return rows.gather(1, wanted.to(rows.device)[:, None])[:, 0]
