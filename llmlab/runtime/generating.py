"""Text from a model, piece by piece, with a memory of what was read before."""

import contextlib
import inspect
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import LabError
from ..units import format_seconds
from .sampling import Chooser, Options, Stops, Words
from .speculating import Ahead, proposer_of

ENDS = ("end of turn", "stop string", "limit", "stopped", "context full")
_CHUNK = 256             # prompt tokens read at once: between two chunks a reader can stop
_OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory", re.IGNORECASE)    # torch's words


@dataclass(frozen=True)
class Stats:
    """One answer, measured. Seconds are wall-clock; a rate is None where there is too little to measure.

    prompt_tokens: the whole prompt. reused_tokens: those of them that were in the memory already. tokens: of the answer,
    without the one that ended the turn. first_seconds: from the question to the first token. prompt_rate: tokens per second
    of the part that was read. rate: tokens per second after the first. ended: one of ENDS. seed: what was drawn with.
    passes: over the model after the prompt's. proposed, accepted: tokens that a draft guessed and that were read with others,
    and those of them that came; None without a draft.
    """

    prompt_tokens: int
    reused_tokens: int
    tokens: int
    first_seconds: float | None
    prompt_rate: float | None
    rate: float | None
    ended: str
    seed: int | None
    passes: int = 0
    proposed: int | None = None
    accepted: int | None = None

    @property
    def tokens_a_pass(self) -> float | None:
        """Tokens that a pass over the model brought, after the first; None where there was no pass."""
        return 1 + (self.accepted or 0) / self.passes if self.passes else None

    def __str__(self) -> str:
        kept = f", {self.reused_tokens:,} of them from memory" if self.reused_tokens else ""
        said = [f"{self.prompt_tokens:,} prompt {_plural('token', self.prompt_tokens)}{kept}"
                + (f" ({self.prompt_rate:.1f} tokens/s)" if self.prompt_rate else "")]
        if self.first_seconds is not None:
            said.append(f"first token after {format_seconds(self.first_seconds)}")
        rate = f" ({self.rate:.1f} tokens/s)" if self.rate else ""
        said.append(f"{self.tokens:,} new {_plural('token', self.tokens)}{rate}")
        if self.proposed is not None:
            said.append(f"{self.accepted:,} of {self.proposed:,} guesses right"
                        + (f", {self.tokens_a_pass:.2f} tokens a pass" if self.passes else ""))
        return f"{'; '.join(said)}; {self.ended} [measured]"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


class Reader(Protocol):
    """What `stream` reads with: the Memory of a transformers model, or a lean decoder, which remembers by itself. `tokens`:
    read so far; `context`: most it may hold; `trained`: what it was trained for; the methods are Memory's. A lean decoder has
    `shift`, `check_shift`, `kept` and `read_each`, too."""

    tokens: list[int]
    context: int | None
    trained: int | None

    def forget(self) -> None: ...

    def keep(self, tokens: list[int]) -> int: ...

    def read(self, tokens: list[int]) -> torch.Tensor: ...

    def logits(self, tokens: list[int]) -> torch.Tensor: ...


def memory_of(model, context: int | None = None) -> Reader:
    """What remembers for `model`. Raises LabError for a context it cannot have."""
    untouched = getattr(model, "untouched", None) if not hasattr(model, "get_base_model") else None
    if untouched and untouched():           # a transformers model with a compiled decoder
        model = model.decoder
    if not hasattr(model, "keep"):
        return Memory(model, context)
    if context in (None, model.context):
        return model
    if isinstance(context, int) and context > model.context:
        raise LabError(f"context is {context:,}, and this decoder was opened with {model.context:,}; open it with more")
    return Shorter(model, usable_context(context, model.trained))


class Shorter:
    """A decoder of which less is used than it could hold."""

    def __init__(self, decoder: Reader, context: int):
        self.decoder, self.context, self.trained = decoder, context, decoder.trained
        self.forget, self.keep, self.read, self.logits = decoder.forget, decoder.keep, decoder.read, decoder.logits
        self.shift, self.check_shift, self.read_each = decoder.shift, decoder.check_shift, decoder.read_each

    @property
    def tokens(self) -> list[int]:
        return self.decoder.tokens

    @property
    def kept(self) -> int | None:
        return self.decoder.kept


class Memory:
    """The tokens a model has read and their KV cache, so that a conversation is not read again from its beginning.

    model: a transformers model. context: most tokens it may hold; None is what the model was trained with. Raises LabError
    for a context that is none, or longer than that.
    """

    def __init__(self, model, context: int | None = None):
        self.model, self.trained = model, trained_context(model)
        self.context = usable_context(context, self.trained)
        self._some = "logits_to_keep" in inspect.signature(_inner(model).forward).parameters
        self.forget()

    def forget(self) -> None:
        """Empty it."""
        from .growing import growing_cache  # transformers from here on
        from .packed_cache import PackedCache

        self.tokens: list[int] = []
        kv = getattr(self.model, "kv", None)
        self._cache = PackedCache(self.model.config, kv) if kv else growing_cache(self.model.config)

    def keep(self, tokens: list[int]) -> int:
        """Drop what is not the beginning of `tokens`; how many of them need not be read again (never all: the last one's
        logits are wanted)."""
        same = same_beginning(self.tokens, tokens)
        drop = len(self.tokens) - same
        if drop and same and all(_shortens(layer, drop) for layer in self._cache.layers):
            with whole(self):
                self._cache.crop(-drop)
                del self.tokens[same:]
        elif drop:
            self.forget()
        return len(self.tokens)

    def read(self, tokens: list[int]) -> torch.Tensor:
        """Read `tokens` after what was read before; the logits after the last of them, [vocabulary] in float32. Raises
        LabError where memory does not suffice."""
        return self._read(tokens, 1)[0]

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Read `tokens` after what was read before; the logits after each of them, [tokens, vocabulary] in float32. Raises as
        `read` does."""
        return self._read(tokens, len(tokens))

    def _read(self, tokens: list[int], wanted: int) -> torch.Tensor:
        """The logits after the last `wanted` tokens."""
        ids, asked = torch.tensor([tokens], device=self.model.device), {"logits_to_keep": wanted} if self._some else {}
        with whole(self), torch.inference_mode():
            logits = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **asked).logits[0, -wanted:]
            self.tokens += tokens
            return logits.float()


@contextlib.contextmanager
def whole(memory: Reader) -> Iterator[None]:
    """Either all layers of a memory change or none remembers anything: Ctrl-C may come between two of them. Too little memory
    is a LabError."""
    read = len(memory.tokens)
    try:
        yield
    except BaseException as error:
        memory.forget()
        if out_of_memory(error):
            raise LabError(f"memory does not suffice to go on after {read:,} tokens; begin a new conversation, give a "
                           "smaller context, or a smaller model") from None
        raise


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's for too little memory."""
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def same_beginning(read: list[int], tokens: list[int]) -> int:
    """How many of the tokens read need not be read again: never all of `tokens`, the last one's logits are wanted."""
    pairs = zip(read, tokens[:-1], strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(read), len(tokens) - 1))


def usable_context(asked: int | None, trained: int | None) -> int | None:
    """Most tokens a memory may hold: those asked for, or what the model was trained with. Raises LabError."""
    if asked is None:
        return trained
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 2:
        raise LabError(f"context is {asked!r:.40}; give a whole number of tokens, from 2 up")
    if trained is not None and asked > trained:
        raise LabError(f"context is {asked:,} tokens; this model was trained with {trained:,}, give that or less")
    return asked


def trained_context(model) -> int | None:
    """Tokens of context the model was trained with; None where neither its file nor its config says."""
    known = getattr(getattr(model, "llmlab", None), "context", None)
    return known or getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _inner(model):
    """The transformers model inside an adapter's wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _shortens(layer, drop: int) -> bool:
    """Whether a layer's cache can forget so many tokens: a window that has moved on has not kept what lies before."""
    if not getattr(layer, "is_croppable", True):
        return False
    if hasattr(layer, "can_crop"):
        return layer.can_crop(-drop)
    return not getattr(layer, "is_sliding", False) or layer.get_seq_length() < layer.sliding_window


def stream(model, tokenizer, messages_or_text: list[dict] | str, options: Options | None = None,
           stopped: Callable[[], bool] | None = None, memory: Reader | None = None, draft=None) -> "Stream":
    """The answer of `model` (transformers' or a lean decoder), as an iterator of text pieces; `.stats` when it has ended.

    messages_or_text: messages ({"role", "content"}) go through the tokenizer's chat template; a text is continued as it
    is. stopped: asked before each token; true ends the answer. memory: what to read on from; kept between turns, only what
    is new is read. draft: what guesses tokens for a lean decoder, which reads them together; the text stays the same. "lookup"
    looks in the text so far; a small model's decoder, or the (decoder, words) of `llmlab.decoder`, guesses by itself; and so
    does a proposer of `runtime.speculating`, which goes on from one text to the next with what it learned. Raises LabError
    where there is no template, nothing to read, more than the context holds, and a draft that cannot guess for this model.
    """
    memory = memory_of(model) if memory is None else memory
    return Stream(model, tokenizer, messages_or_text, options or Options(), stopped, memory, draft)


class Stream:
    """See `stream`. `text` is what has come so far; `stats` is None until the end; `close()` ends it early."""

    def __init__(self, model, tokenizer, messages_or_text, options, stopped, memory, draft=None):
        self.text, self.stats, self.memory = "", None, memory
        self._tokenizer, self._options, self._stopped = tokenizer, options, stopped or (lambda: False)
        check_tokenizer(tokenizer)
        self._ends = end_tokens(model, tokenizer)
        named = tokenizer.get_added_vocab()
        self._stop_ids = {named[one] for one in options.stop if one in named}
        self._prompt = prompt_tokens(tokenizer, messages_or_text)
        self._choose = Chooser(options)
        _check_room(len(self._prompt), memory, options.shift)
        proposer = proposer_of(draft, memory, tokenizer)
        self._ahead, self._passes = proposer and Ahead(memory, proposer), 0
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.text += piece
        return piece

    def close(self) -> None:
        """End the answer here; `stats` says so."""
        self._pieces.close()

    def _run(self) -> Iterator[str]:
        clock, memory, prompt = _Clock(), self.memory, self._prompt
        if self._options.shift is not None and memory.kept not in (None, self._options.shift):
            memory.forget()                 # what was dropped there does not come back
        reused, ended, new = memory.keep(prompt), "stopped", []
        try:
            logits = self._read_prompt(prompt[reused:])
            if logits is None:
                return
            clock.read()
            words, stops = Words(self._tokenizer, prompt), Stops(self._options.stop)
            while not self._stopped():
                token = self._choose(logits, prompt, new)
                clock.token()
                if token in self._ends or token in self._stop_ids:
                    ended = "end of turn" if token in self._ends else "stop string"
                    break
                new.append(token)
                text = stops.pass_on(words.add(token))
                if text:
                    yield text
                if stops.found:
                    ended = "stop string"
                    break
                if len(new) == self._options.max_tokens:
                    ended = "limit"
                    break
                if self._options.shift is None and memory.context is not None and len(prompt) + len(new) >= memory.context:
                    ended = "context full"
                    break
                logits = self._after(new)
            if self._ahead:
                self._ahead.take_back(prompt + new)
            if not stops.found:
                text = stops.pass_on(words.rest())
                if stops.found:
                    ended = "stop string"
                if text := text + stops.rest():
                    yield text
        finally:
            guessed = (self._ahead.proposed, self._ahead.accepted) if self._ahead else (None, None)
            self.stats = Stats(len(prompt), reused, len(new), clock.first, clock.rate_of_prompt(len(prompt) - reused),
                               clock.rate(), ended, self._choose.seed, self._passes, *guessed)

    def _after(self, new: list[int]) -> torch.Tensor:
        """The logits after the last of `new`, the answer so far."""
        if not self._ahead:
            self._make_room(1)
            self._passes += 1
            return self.memory.read(new[-1:])
        said = self._prompt + new
        if (logits := self._ahead.known(said)) is not None:
            return logits
        self._make_room(1)
        choose = self._choose.fork()        # what a draft says is drawn with the numbers that will be drawn with here
        logits = self._ahead.read(said, self._left(new), lambda logits, found: choose(logits, self._prompt, new + found),
                                  self._ends | self._stop_ids)
        self._passes = self._ahead.passes
        return logits

    def _left(self, new: list[int]) -> int:
        """How many tokens may come after the next one."""
        options, context, limits = self._options, self.memory.context, [2**31]
        if options.max_tokens is not None:
            limits.append(options.max_tokens - len(new))
        if options.shift is None and context is not None:
            limits.append(context - len(self._prompt) - len(new))
        return min(limits) - 1

    def _read_prompt(self, tokens: list[int]) -> torch.Tensor | None:
        logits, context, shift = None, self.memory.context, self._options.shift
        step = _CHUNK if shift is None or context is None else min(_CHUNK, (context - shift) // 2)
        for start in range(0, len(tokens), step):
            if self._stopped():
                return None
            part = tokens[start:start + step]
            self._make_room(len(part))
            logits = self.memory.read(part)
        return logits

    def _make_room(self, tokens: int) -> None:
        """For so many more, by dropping older ones where the options say so."""
        memory, shift = self.memory, self._options.shift
        while shift is not None and memory.context is not None and len(memory.tokens) + tokens > memory.context:
            memory.shift(shift)


def _check_room(tokens: int, memory: Reader, shift: int | None) -> None:
    if not tokens:
        raise LabError("there is nothing to read; give a text or messages that are not empty")
    if shift is not None:
        if not hasattr(memory, "check_shift"):
            raise LabError("going on past the context (shift) is for a lean decoder, llmlab.decoder; leave shift out")
        memory.check_shift(shift)
        if memory.context is not None and shift > memory.context - 2:
            raise LabError(f"the first {shift:,} tokens are to stay and the context holds {memory.context:,}; keep fewer")
        return
    if memory.context is not None and tokens >= memory.context:
        larger = memory.trained is not None and memory.trained > max(tokens, memory.context)
        remedy = (f"shorten it, or give a larger context (this model was trained with {memory.trained:,})" if larger else
                  "shorten it or begin a new conversation: this model was not trained for more")
        raise LabError(f"the prompt is {tokens:,} tokens and the context holds {memory.context:,}; {remedy}")


def check_tokenizer(tokenizer) -> None:
    """Raises LabError where there is none: a file without a vocabulary gives a model alone."""
    if tokenizer is None:
        raise LabError("this model's file has no vocabulary, so text cannot be made into tokens; give a file that has one, or "
                       "another tokenizer of the same model")


def has_template(tokenizer) -> bool:
    """Whether the tokenizer knows how its model wants a conversation written."""
    return bool(getattr(tokenizer, "chat_template", None))


def prompt_tokens(tokenizer, messages_or_text: list[dict] | str, tools: list[dict] | None = None) -> list[int]:
    """The tokens of a text (with what the tokenizer puts before every text), or of messages in the chat template (which
    writes that itself). tools: functions for a template that knows them. Raises LabError where there is no template."""
    if isinstance(messages_or_text, str):
        return list(tokenizer(_unicode(messages_or_text), verbose=False)["input_ids"])
    if not isinstance(messages_or_text, (list, tuple)):
        raise LabError(f"there is no prompt in {messages_or_text!r:.60}; give a text or a list of messages")
    if not has_template(tokenizer):
        raise LabError("this model's file has no chat template; give a text to continue instead of messages")
    try:
        text = tokenizer.apply_chat_template(messages_or_text, tools=tools, tokenize=False, add_generation_prompt=True)
    except LabError:
        raise
    except Exception as error:           # a folder's template is a program by strangers: it fails in any way
        from jinja2 import TemplateError
        if isinstance(error, TemplateError):         # such as "System role not supported"
            raise LabError(f"the chat template refuses this conversation: {_one_line(error)}") from None
        raise LabError(f"the chat template fails on this conversation ({type(error).__name__}: {_one_line(error)}); give a "
                       "text instead of messages, or another template") from None
    return list(tokenizer(_unicode(text), add_special_tokens=False, verbose=False)["input_ids"])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _unicode(text: str) -> str:
    """A shell hands over bytes that are no UTF-8 as lone surrogates, which no tokenizer takes: "?" in their place."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def end_tokens(model, tokenizer) -> set[int]:
    """Tokens that end a turn: `stop_ids` of a tokenizer from a GGUF, else those that the model and the tokenizer name."""
    if (known := getattr(tokenizer, "stop_ids", None)) is not None:
        return set(known)
    named = [getattr(getattr(model, "generation_config", None), "eos_token_id", None), tokenizer.eos_token_id]
    if hasattr(model, "config"):
        named.append(model.config.get_text_config().eos_token_id)
    return {token for one in named if one is not None for token in (one if isinstance(one, (list, tuple)) else [one])}


class _Clock:
    """When the prompt was read, when the first token came, and the last."""

    def __init__(self):
        self._began = time.perf_counter()
        self._read = self._first = self._last = None
        self._count = 0

    def read(self) -> None:
        self._read = time.perf_counter()

    def token(self) -> None:
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self._count += 1

    @property
    def first(self) -> float | None:
        return self._first and self._first - self._began

    def rate_of_prompt(self, tokens: int) -> float | None:
        return tokens / (self._read - self._began) if self._read and self._read > self._began else None

    def rate(self) -> float | None:
        return (self._count - 1) / (self._last - self._first) if self._count > 1 and self._last > self._first else None
