"""Text from a model, piece by piece: sampling, stop strings, and a memory of what was read before."""

import contextlib
import inspect
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import LabError
from ..units import format_seconds

ENDS = ("end of turn", "stop string", "limit", "stopped", "context full")
_CHUNK = 256             # prompt tokens read at once: between two chunks a reader can stop
_PENALIZED = 64          # the last tokens that a repeat penalty looks at (llama.cpp: penalty_last_n)
_OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory", re.IGNORECASE)    # torch's words
_UNFINISHED = 16         # tokens after which text that is still no UTF-8 is handed out as it is


@dataclass(frozen=True)
class Options:
    """How the next token is chosen, and when to end. Defaults are those of llama.cpp's tools (common.h).

    temperature: 0 takes the likeliest token each time. top_k: only so many of the likeliest (0: all). top_p: only the
    likeliest that together have this share (1: all). min_p: only those at least this share as likely as the likeliest
    (0: all). repeat_penalty: above 1 makes tokens of the last 64 less likely (1: off). seed: the same seed gives the same
    text (None: a new one each time). max_tokens: most new tokens (None: to the end of the turn or of the context).
    stop: texts that end the answer; they are not part of it. shift: what happens when the context is full. None: the answer
    ends; a number: of what was read the older half is dropped but for the first so many tokens, again and again, and a prompt
    may be longer than the context too (a lean decoder can; llama.cpp's --context-shift and --keep). Raises LabError, naming the
    option.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    shift: int | None = None

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(one, str) and one for one in stop):
            raise LabError(f"stop is {stop!r:.60}; give texts that are not empty")
        object.__setattr__(self, "stop", tuple(stop))
        for name, whole, low, high, says in _RANGES:
            value = getattr(self, name)
            if value is None and name in ("seed", "max_tokens", "shift"):
                continue
            right = isinstance(value, int) or not whole and isinstance(value, float) and math.isfinite(value)
            if not right or isinstance(value, bool) or not low <= value <= high:
                raise LabError(f"{name} is {value!r:.40}; give {says}")


_RANGES = (              # option, whether it is whole, lowest, highest, what to give
    ("temperature", False, 0, 100, "a number from 0 (always the likeliest token) up to 100; 0.8 is common"),
    ("top_k", True, 0, 2**31 - 1, "a whole number of tokens; 0 is all of them"),
    ("top_p", False, 1e-6, 1, "a share above 0 and up to 1; 1 is all tokens"),
    ("min_p", False, 0, 1, "a share from 0 (all tokens) to 1"),
    ("repeat_penalty", False, 0.01, 100, "a number around 1, such as 1.1; 1 is no penalty"),
    ("seed", True, 0, 2**63 - 1, "a whole number from 0 up, or none for a new one each time"),
    ("max_tokens", True, 1, 2**31 - 1, "a whole number from 1 up, or none for no limit"),
    ("shift", True, 0, 2**31 - 1, "how many first tokens stay when the context is full, from 0 up, or none to end there"),
)


@dataclass(frozen=True)
class Stats:
    """One answer, measured. Seconds are wall-clock; a rate is None where there is too little to measure.

    prompt_tokens: the whole prompt. reused_tokens: those of them that were in the memory already. tokens: of the answer,
    without the one that ended the turn. first_seconds: from the question to the first token. prompt_rate: tokens per second
    of the part that was read. rate: tokens per second after the first. ended: one of ENDS. seed: what was drawn with.
    """

    prompt_tokens: int
    reused_tokens: int
    tokens: int
    first_seconds: float | None
    prompt_rate: float | None
    rate: float | None
    ended: str
    seed: int | None

    def __str__(self) -> str:
        kept = f", {self.reused_tokens:,} of them from memory" if self.reused_tokens else ""
        said = [f"{self.prompt_tokens:,} prompt {_plural('token', self.prompt_tokens)}{kept}"
                + (f" ({self.prompt_rate:.1f} tokens/s)" if self.prompt_rate else "")]
        if self.first_seconds is not None:
            said.append(f"first token after {format_seconds(self.first_seconds)}")
        rate = f" ({self.rate:.1f} tokens/s)" if self.rate else ""
        said.append(f"{self.tokens:,} new {_plural('token', self.tokens)}{rate}")
        return f"{'; '.join(said)}; {self.ended} [measured]"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


class Reader(Protocol):
    """What `stream` reads with: the Memory of a transformers model, or a lean decoder, which remembers by itself. `tokens`:
    read so far; `context`: most it may hold; `trained`: what it was trained for; the methods are Memory's. A lean decoder has
    `shift`, `check_shift` and `kept`, too."""

    tokens: list[int]
    context: int | None
    trained: int | None

    def forget(self) -> None: ...

    def keep(self, tokens: list[int]) -> int: ...

    def read(self, tokens: list[int]) -> torch.Tensor: ...


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
        self.forget, self.keep, self.read = decoder.forget, decoder.keep, decoder.read
        self.shift, self.check_shift = decoder.shift, decoder.check_shift

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
        last_only = "logits_to_keep" in inspect.signature(_inner(model).forward).parameters
        self._last = {"logits_to_keep": 1} if last_only else {}
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
        ids = torch.tensor([tokens], device=self.model.device)
        with whole(self), torch.inference_mode():
            logits = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **self._last).logits[0, -1]
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
           stopped: Callable[[], bool] | None = None, memory: Reader | None = None) -> "Stream":
    """The answer of `model` (transformers' or a lean decoder), as an iterator of text pieces; `.stats` when it has ended.

    messages_or_text: messages ({"role", "content"}) go through the tokenizer's chat template; a text is continued as it
    is. stopped: asked before each token; true ends the answer. memory: what to read on from; kept between turns, only what
    is new is read. Raises LabError where there is no template, nothing to read, or more than the context holds.
    """
    return Stream(model, tokenizer, messages_or_text, options or Options(), stopped,
                  memory_of(model) if memory is None else memory)


class Stream:
    """See `stream`. `text` is what has come so far; `stats` is None until the end; `close()` ends it early."""

    def __init__(self, model, tokenizer, messages_or_text, options, stopped, memory):
        self.text, self.stats, self.memory = "", None, memory
        self._tokenizer, self._options, self._stopped = tokenizer, options, stopped or (lambda: False)
        check_tokenizer(tokenizer)
        self._ends = end_tokens(model, tokenizer)
        named = tokenizer.get_added_vocab()
        self._stop_ids = {named[one] for one in options.stop if one in named}
        self._prompt = prompt_tokens(tokenizer, messages_or_text)
        self._choose = _Chooser(options)
        _check_room(len(self._prompt), memory, options.shift)
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
            words, stops = _Words(self._tokenizer, prompt), _Stops(self._options.stop)
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
                    return
                if len(new) == self._options.max_tokens:
                    ended = "limit"
                    break
                if self._options.shift is None and memory.context is not None and len(prompt) + len(new) >= memory.context:
                    ended = "context full"
                    break
                self._make_room(1)
                logits = memory.read([token])
            text = stops.pass_on(words.rest())
            if stops.found:
                ended = "stop string"
            if text := text + stops.rest():
                yield text
        finally:
            self.stats = Stats(len(prompt), reused, len(new), clock.first, clock.rate_of_prompt(len(prompt) - reused),
                               clock.rate(), ended, self._choose.seed)

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


def prompt_tokens(tokenizer, messages_or_text: list[dict] | str) -> list[int]:
    """The tokens of a text (with what the tokenizer puts before every text), or of messages in the chat template (which
    writes that itself). Raises LabError where there is no template."""
    if isinstance(messages_or_text, str):
        return list(tokenizer(_unicode(messages_or_text), verbose=False)["input_ids"])
    if not isinstance(messages_or_text, (list, tuple)):
        raise LabError(f"there is no prompt in {messages_or_text!r:.60}; give a text or a list of messages")
    if not has_template(tokenizer):
        raise LabError("this model's file has no chat template; give a text to continue instead of messages")
    try:
        text = tokenizer.apply_chat_template(messages_or_text, tokenize=False, add_generation_prompt=True)
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


class _Chooser:
    """Chooses the next token by the options, in llama.cpp's order: penalty, top k, top p, min p, temperature, draw."""

    def __init__(self, options: Options):
        self._options = options
        self.seed = None
        if options.temperature > 0:
            self.seed = secrets.randbelow(2**32) if options.seed is None else options.seed
            self._random = torch.Generator().manual_seed(self.seed)  # of the processor: the same draws on every device

    @torch.inference_mode()
    def __call__(self, logits: torch.Tensor, prompt: list[int], new: list[int]) -> int:
        options, scores = self._options, logits
        if options.repeat_penalty != 1:
            scores = _penalized(scores, (prompt[-_PENALIZED:] + new)[-_PENALIZED:], options.repeat_penalty)
        if options.temperature == 0:
            best = scores.argmax()
            if not torch.isfinite(scores[best]):
                raise _no_numbers()
            return int(best)
        # All that follows looks at the shortlist alone: sorting 150,000 scores for each token would cost more than that.
        many = len(scores)
        scores, tokens = (one.cpu() for one in scores.topk(min(options.top_k or many, many)))      # the likeliest first
        if not torch.isfinite(scores[0]):
            raise _no_numbers()
        if options.top_p < 1:
            scores = _top_p(scores, options.top_p)
        if options.min_p > 0:
            scores = scores.masked_fill(scores.softmax(-1) < options.min_p * scores.softmax(-1)[0], -torch.inf)
        chances = ((scores - scores[0]) / options.temperature).softmax(-1)
        return int(tokens[torch.multinomial(chances, 1, generator=self._random)])


def _penalized(scores: torch.Tensor, tokens: list[int], penalty: float) -> torch.Tensor:
    """Scores [vocabulary] with those of `tokens` made less likely (Keskar et al. 2019): divided, or multiplied below 0."""
    tokens = torch.tensor(tokens, dtype=torch.long, device=scores.device)
    found = scores[tokens]
    return scores.index_put((tokens,), torch.where(found < 0, found * penalty, found / penalty))


def _top_p(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Sorted scores, those cut off at -inf that the likeliest do without to have this share; the likeliest always stays."""
    rest = scores.softmax(-1).flip(-1).cumsum(-1).flip(-1)       # of a token and all less likely ones
    cut = rest <= 1 - share
    cut[0] = False
    return scores.masked_fill(cut, -torch.inf)


def _no_numbers() -> LabError:
    return LabError("the model's logits are not numbers; its file may be damaged, or its numbers too large for float16: "
                    "load it with dtype=torch.float32")


class _Words:
    """Tokens as text, a piece at a time. A character may take several tokens, and whether a token begins with a space is
    seen only beside the one before: so each piece is what a few tokens more make of the text of those before."""

    def __init__(self, tokenizer, prompt: list[int]):
        self._tokenizer, self._new = tokenizer, []
        self._before = next((prompt[-n:] for n in range(1, 9) if "\ufffd" not in self._decode(prompt[-n:])), [])

    def add(self, token: int) -> str:
        self._new.append(token)
        text = self._text()
        if text.endswith("\ufffd") and len(self._new) < _UNFINISHED:
            return ""
        return self._done(text)

    def rest(self) -> str:
        """What is still held back."""
        return self._done(self._text()) if self._new else ""

    def _text(self) -> str:
        return self._decode(self._before + self._new)[len(self._decode(self._before)):]

    def _done(self, text: str) -> str:
        if text:                         # a special token has none, and would hide the space that follows
            self._before, self._new = self._new, []
        return text

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Stops:
    """Passes text on up to the first stop string, and holds back an end that may become one."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops, self._held, self.found = stops, "", False

    def pass_on(self, text: str) -> str:
        text, self._held = self._held + text, ""
        places = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if places:
            self.found = True
            return text[:min(places)]
        longest = max((n for stop in self._stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
                      default=0)
        self._held = text[len(text) - longest:]
        return text[:len(text) - longest]

    def rest(self) -> str:
        """What is still held back: it became no stop string."""
        return "" if self.found else self._held


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
