"""A model that is asked: how likely texts are after a prompt, and what it writes after one, reading no token twice.

The floor of a choice is its prompt once and each choice's tokens but the last, every pass over all weights; so a prompt stays
in the cache while its choices come and go, and items that begin alike share what they have in common.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from ..errors import LabError
from ..runtime.generating import check_tokenizer, end_tokens, memory_of, prompt_tokens
from ..runtime.sampling import Words


@dataclass(frozen=True)
class Likelihood:
    """Of a text after another. value: log-likelihood in nats, all tokens together. greedy: whether each token was the likeliest
    one. tokens: how many."""

    value: float
    greedy: bool
    tokens: int


class Asked:
    """A model (transformers' or a lean decoder) and its words. What it had read is forgotten.

    read: tokens that went through the model so far. Raises LabError where there is no vocabulary, and for what is no model or
    no tokenizer.
    """

    def __init__(self, model, words):
        _check_both(model, words)
        self.model, self.words, self.memory = model, words, memory_of(model)
        self.ends, self.read = end_tokens(model, words), 0
        self.memory.forget()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else reads meanwhile, dropout is off, and afterwards the memory is empty."""
        training = getattr(self.model, "training", False)
        if training:
            self.model.eval()
        with getattr(self.memory, "lock", nullcontext()):
            try:
                yield
            finally:
                self.memory.forget()
                if training:
                    self.model.train()

    def pair(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        """Tokens of a prompt and of what follows it, cut as lm-eval cuts them: spaces at the prompt's end belong to what
        follows, both are written as one text, and what follows is what that has beyond the prompt's own tokens."""
        bare = prompt.rstrip()
        first = prompt_tokens(self.words, bare)
        rest = prompt_tokens(self.words, prompt + text)[len(first):]
        if not first or not rest:
            raise LabError(f"{text[:40]!r} has no tokens of its own after {prompt[-20:]!r} in this vocabulary")
        return first, rest

    def likelihoods(self, prompt: Sequence[int], targets: Sequence[Sequence[int]]) -> list[Likelihood]:
        """How likely each of `targets` is after `prompt`. Raises LabError where the context does not hold them, and for logits
        that are no numbers."""
        prompt, longest = list(prompt), max(map(len, targets))
        self._check_room(len(prompt) + longest - 1)
        first = self._after(prompt)[None]
        found = []
        for target in targets:
            rows = first
            if len(target) > 1:
                same = self.memory.keep([*prompt, target[0]])       # all of the prompt, where the cache still has it
                ahead = [*prompt, *target[:-1]][same:]
                logits = self._logits(ahead)[1 - len(target):]
                rows = torch.cat([first, _log_softmax(logits)])
            tokens = torch.tensor(target, device=rows.device)
            likely = rows.gather(1, tokens[:, None])[:, 0]
            found.append(Likelihood(float(likely.sum()), bool((rows.argmax(-1) == tokens).all()), len(target)))
        return found

    def writes(self, prompt: Sequence[int], most: int,
               done: Callable[[str, int | None], bool] = lambda piece, token: False) -> str:
        """What it writes after a prompt, the likeliest token each time: to the end of its turn, `most` tokens, a full context,
        or until `done`, told each piece of text and the token it came with. Raises LabError as `likelihoods` does."""
        prompt = list(prompt)
        self._check_room(len(prompt) + 1)
        words, text = Words(self.words, prompt), ""
        logits, context = self._after(prompt), self.memory.context
        for count in range(1, most + 1):
            token = int(logits.argmax())
            if token in self.ends:
                break
            piece = words.add(token)
            text += piece
            if done(piece, token) or count == most or context is not None and len(prompt) + count >= context:
                break
            self.read += 1
            logits = self._checked(self.memory.read([token]))
        rest = words.rest()
        done(rest, None)
        return text + rest

    def _after(self, prompt: list[int]) -> torch.Tensor:
        """Log-probabilities float64 [vocabulary] of what follows."""
        ahead = prompt[self.memory.keep(prompt):]
        self.read += len(ahead)
        return _log_softmax(self._checked(self.memory.read(ahead)))

    def _logits(self, tokens: list[int]) -> torch.Tensor:
        self.read += len(tokens)
        return self._checked(self.memory.logits(tokens))

    def _checked(self, logits: torch.Tensor) -> torch.Tensor:
        if not logits.amax(-1).isfinite().all():
            raise LabError("the model's logits are not numbers (NaN or infinite): its weights are damaged, or too large for "
                           "its dtype")
        return logits

    def _check_room(self, tokens: int) -> None:
        if self.memory.context is not None and tokens > self.memory.context:
            raise LabError(f"it takes {tokens:,} tokens and the model's context holds {self.memory.context:,}; leave it out, "
                           "or give a larger context")


def _check_both(model, words) -> None:
    remedy = "give both that llmlab.decoder or llmlab.load returns, with a star: *llmlab.decoder('smollm2-135m')"
    if not hasattr(model, "keep") and not hasattr(model, "config"):         # a lean decoder's, a transformers model's
        raise LabError(f"{'None' if model is None else f'a {type(model).__name__}'} is no model; {remedy}")
    check_tokenizer(words)
    if not callable(words) or not hasattr(words, "decode"):
        raise LabError(f"a {type(words).__name__} is no tokenizer; {remedy}")


def _log_softmax(rows: torch.Tensor) -> torch.Tensor:
    return (rows.cpu() if rows.device.type == "mps" else rows).double().log_softmax(-1)     # mps has no float64
