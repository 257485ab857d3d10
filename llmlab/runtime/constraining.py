"""Text that must have a form: JSON that follows a schema, a regular expression, a grammar; which tokens may come next.

The work is llguidance's (github.com/guidance-ai/llguidance): an Earley parser over a lexer of regular expressions' derivatives,
walked through the trie of all tokens. Here are the vocabularies it gets, the bounds for forms that strangers ask for, and the
mask of a step.
"""

import copy
import json
import re
import subprocess
import sys
import weakref
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

import torch

from ..errors import LabError
from . import constraint_worker

KINDS = ("json_schema", "regex", "lark", "gbnf")
ANY_OBJECT = {"type": "object"}
LONGEST = 200_000        # characters of a form; OpenAI allows a schema 120,000 of names and values
_SECONDS = 20.0          # of waiting for a trial: a busy computer starts processes slowly
# Between a JSON text's parts: nothing, a space, or a new line with its indent. More is what small models lose themselves in.
SPACES = r"[ ]?|\n[ \t]{0,32}"
# llguidance's own are for its authors' services: a twentieth of a second a step instead, and memory below 100 MB.
_LIMITS = {"initial_lexer_fuel": 100_000, "step_lexer_fuel": 100_000, "step_max_items": 50_000, "max_lexer_states": 20_000,
           "max_grammar_size": 200_000, "max_items_in_row": 2000, "verbose_errors": False}
_ENDED = "working it out takes too much time or memory"
_SEEN = 256              # bytes of a text in which an opening is looked for
_known = weakref.WeakKeyDictionary()        # llguidance's view of a vocabulary takes a second to make: one a tokenizer


def constraint(words, form: str | Mapping | bool, kind: str = "json_schema", *, lenient: bool = False,
               ends: Iterable[int] | None = None) -> "Form":
    """What keeps a text to a form; it goes into a Chooser as `mask`, one a text (`fork` makes more).

    words: `llmlab.vocabulary`'s, or a fast tokenizer of transformers. form: a JSON schema as a dict or as JSON text, or "json"
    for any object; by kind "regex" a regular expression (of Rust's regex: no look-around, the whole text must match), "lark" a
    grammar as llguidance writes it, "gbnf" one as llama.cpp does. lenient: of a schema passes over keywords that cannot be
    followed; otherwise they are an error. ends: tokens that may end the text (None: those of `words`).

    Raises LabError, in one line, for a form that is none, contradicts itself, uses what cannot be followed, is larger than
    LONGEST characters, or takes more than a bounded trial of time and memory.
    """
    if kind not in KINDS:
        raise LabError(f"a form's kind is {kind!r:.40}; give one of {', '.join(KINDS)}")
    grammar = grammar_of(form, kind, lenient)
    vocabulary = _vocabulary(words, None if ends is None else tuple(sorted(set(ends))))
    return Form(vocabulary, grammar, kind)


class FormError(LabError):
    """A form cannot be followed, or not from where its text has come to: it asks for too much, or for nothing that can be."""


def grammar_of(form: str | Mapping | bool, kind: str = "json_schema", lenient: bool = False) -> str:
    """A form as llguidance's own grammar, tried within bounds. Raises LabError as `constraint` does."""
    grammar = _converted(form, kind, lenient)
    try:
        problem, = _trial(grammar)
    except _TooMuch:
        problem = _ENDED
    if problem:
        raise _refused(kind, problem)
    return grammar


def faults(schemas: Iterable[tuple[Mapping, bool]]) -> list[str]:
    """What is wrong with each of several JSON schemas, in a line, or nothing; (schema, lenient) each. All are tried together
    within the bounds of one trial: what it does not get to asks for too much."""
    found, grammars = [], {}
    for at, (schema, lenient) in enumerate(schemas):
        found.append("")
        try:
            grammars[at] = _converted(schema, "json_schema", lenient)
        except LabError as error:
            found[at] = str(error)
    try:
        said = _trial(*grammars.values()) if grammars else ()
    except _TooMuch as ended:
        said = ended.found
    for at, problem in zip_longest(grammars, said, fillvalue=_ENDED):
        found[at] = str(_refused("json_schema", problem)) if problem else ""
    return found


def _converted(form: str | Mapping | bool, kind: str, lenient: bool) -> str:
    from llguidance import LLMatcher, grammar_from

    try:
        if kind == "json_schema":
            options = {"whitespace_pattern": SPACES, "lenient": lenient}
            grammar = LLMatcher.grammar_from_json_schema(_schema(form), overrides=options)
        elif not isinstance(form, str):
            raise LabError(f"a form of kind {kind} is {form!r:.40}; give text")
        else:
            _check_size(form)
            grammar = grammar_from(kind, form)
    except LabError:
        raise
    except RecursionError:
        raise LabError(f"{_NAMES[kind]} nests too deep; make it flatter") from None
    except Exception as error:      # TypeError of json, ValueError of llguidance, whatever the reader of grammars raises
        raise _refused(kind, error) from None
    return grammar


class Form:
    """A text of a form, as far as it has come. It is a `sampling.Constraint`."""

    def __init__(self, vocabulary: "_Vocabulary", grammar: str, kind: str):
        from llguidance import LLMatcher, LLParserLimits

        self._vocabulary, self._kind = vocabulary, kind
        self._matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
        self._check()

    @property
    def ended(self) -> bool:
        """Whether the form is whole and nothing can follow but an end."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def whole(self) -> bool:
        """Whether the text could end here."""
        return self._matcher.is_accepting()

    def allowed(self) -> torch.Tensor:
        """bool [tokens]: which may come next. Raises FormError where none may, and where finding out takes too much."""
        found = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) != 0
        self._check()
        found = found[:self._vocabulary.count]
        if not found.any():
            raise FormError(f"nothing can come next that {_NAMES[self._kind]} allows and the vocabulary can write")
        return found

    def take(self, token: int) -> None:
        """`token` came. Raises FormError where it could not."""
        if token >= self._vocabulary.count or not self._matcher.consume_token(token):
            self._check()
            raise FormError(f"token {token} is not what {_NAMES[self._kind]} allows next")

    def piece(self, token: int) -> bytes:
        """The bytes of a token, of a special one its name."""
        return self._vocabulary.tokenizer.decode_bytes([token]) if token < self._vocabulary.count else b""

    def take_text(self, text: bytes) -> bool:
        """Bytes came; whether they could. What could not is not taken."""
        tokens = self._vocabulary.tokenizer.tokenize_bytes(text)
        return self._matcher.validate_tokens(tokens) == len(tokens) and self._matcher.consume_tokens(tokens)

    def fork(self) -> "Form":
        """One that goes on from here by itself."""
        other = object.__new__(Form)
        other._vocabulary, other._kind, other._matcher = self._vocabulary, self._kind, self._matcher.deep_copy()
        return other

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refused(self._kind, self._matcher.get_error())


class Later:
    """Any text until an opening comes in it, and from there on a form. It is a `sampling.Constraint`.

    opening: looked for in the text's bytes, special tokens by their names (a pattern that begins with \\A looks at the
    beginning alone). fed: what the form is given for the opening; what came after it in the same token is given too, and where
    the form does not take that, the text stays free.
    """

    def __init__(self, words, form: Form, opening: re.Pattern[bytes], fed: bytes = b""):
        self._piece = words.piece if hasattr(words, "piece") else form.piece
        self._form, self._opening, self._fed = form, opening, fed
        self._seen, self._begun = b"", None

    @property
    def ended(self) -> bool:
        return self._begun is not None and self._begun.ended

    def allowed(self) -> torch.Tensor | None:
        return self._begun and self._begun.allowed()

    def take(self, token: int) -> None:
        if self._begun is not None:
            self._begun.take(token)
            return
        first = self._opening.pattern.startswith(rb"\A")
        if first and len(self._seen) > _SEEN:
            return
        self._seen += self._piece(token)
        found = self._opening.search(self._seen)
        if found:
            rest, begun = self._fed + self._seen[found.end():], self._form.fork()
            self._seen = self._seen[found.end():]
            if not rest or begun.take_text(rest):
                self._begun = begun
        elif not first:
            self._seen = self._seen[-_SEEN:]

    def fork(self) -> "Later":
        other = copy.copy(self)
        other._begun = self._begun and self._begun.fork()
        return other


_NAMES = {"json_schema": "the JSON schema", "regex": "the regular expression", "lark": "the grammar", "gbnf": "the grammar"}


def _schema(form: str | Mapping | bool) -> str:
    """A JSON schema as text."""
    if isinstance(form, str) and form != "json":
        _check_size(form)
        form = json.loads(form)
    form = ANY_OBJECT if form == "json" else {} if form is True else form
    if form is False:
        raise LabError("the JSON schema is false, and nothing fits that")
    if not isinstance(form, Mapping):
        raise LabError(f"the JSON schema is a {type(form).__name__}; give an object")
    text = json.dumps(dict(form))
    _check_size(text)
    return text


def _check_size(text: str) -> None:
    if len(text) > LONGEST:
        raise LabError(f"the form has {len(text):,} characters; give one of up to {LONGEST:,}")


def _refused(kind: str, problem: Exception | str) -> FormError:
    said = " ".join(str(problem).replace("<non-verbose/>", "").split())[:300]
    return FormError(f"{_NAMES[kind]} cannot be followed: {said}")


class _TooMuch(Exception):
    """A trial was ended by its bounds. found: what it said before, of the first grammars."""

    def __init__(self, found: tuple[str, ...]):
        self.found = found


@lru_cache(256)
def _trial(*grammars: str) -> tuple[str, ...]:
    """What is wrong with each grammar, or nothing: tried in one process that time and memory are bounded for. Raises _TooMuch,
    which is not remembered: in a quieter moment the same ones may do."""
    # A special token that a grammar names by its number is any special token of the trial's own small vocabulary.
    grammars = [re.sub(r"<\[\d+\]>", "<[257]>", grammar) for grammar in grammars]
    task = json.dumps({"grammars": grammars, "limits": _LIMITS})
    try:
        # -I: nothing of the current folder is imported.
        said = subprocess.run([sys.executable, "-I", str(Path(constraint_worker.__file__))], input=task.encode(),
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=_SECONDS).stdout
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
    *lines, _ = said.split(b"\n")       # of one that was killed, by us or by its limits, there are fewer than there should be
    found = tuple(json.loads(line)["error"] for line in lines)
    if len(found) < len(grammars):
        raise _TooMuch(found)
    return found


class _Vocabulary:
    """llguidance's view of a vocabulary: what every token is in bytes, which are special, which end a text."""

    def __init__(self, words, ends: tuple[int, ...] | None):
        from llguidance import LLTokenizer

        ends = ends_of(words) if ends is None else ends
        if not hasattr(words, "piece"):
            from llguidance.hf import from_tokenizer

            self.count = max(words.get_vocab().values()) + 1
            self.tokenizer = from_tokenizer(words, eos_token=list(ends) or None)
            return
        self.count = len(words)
        self.tokenizer = LLTokenizer(_Spelled(words, ends), n_vocab=self.count + (not ends),
                                     eos_token=list(ends) or [self.count])


class _Spelled:
    """What LLTokenizer asks for."""

    is_tokenizer_wrapper, bos_token_id = True, None

    def __init__(self, words, ends: tuple[int, ...]):
        self._words = words
        self.tokens = [words.piece(number) for number in range(len(words))]
        self.special_token_ids = [number for number in range(len(words)) if words.is_special(number)]
        if not ends:                # it needs one: a token that no model has
            self.special_token_ids.append(len(self.tokens))
            self.tokens.append(b"<|no end|>")
        self.eos_token_id = min(ends, default=len(self.tokens) - 1)
        self._special = set(self.special_token_ids)
        self._numbers = {piece: number for number, piece in enumerate(self.tokens) if piece and number not in self._special}
        self._longest = max(map(len, self._numbers), default=0)

    def __call__(self, text: str) -> list[int]:
        """A text that must come next, in the tokens that the model would write it in. One that a vocabulary cuts otherwise in
        the middle of a text (SentencePiece puts a space before it) is cut behind a letter of its own."""
        data = text.encode()
        for before in ("", "\x02"):
            tokens = self._words(before + text, add_special_tokens=False)["input_ids"]
            pieces = [self.tokens[token] for token in tokens]
            while before and pieces and before.encode() not in pieces[0]:
                del pieces[0], tokens[0]
            found = tokens[len(before):]
            if b"".join(pieces[len(before):]) == data and not self._special.intersection(found):
                return found
        return self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token each time; of a byte that has none nothing."""
        found, at = [], 0
        while at < len(data):
            size = next((n for n in range(min(self._longest, len(data) - at), 0, -1) if data[at:at + n] in self._numbers), 0)
            found += [self._numbers[data[at:at + size]]] if size else []
            at += size or 1
        return found


def ends_of(words) -> tuple[int, ...]:
    """Tokens of a tokenizer that end a turn."""
    known = getattr(words, "stop_ids", None)
    if known is None:
        known = [] if words.eos_token_id is None else [words.eos_token_id]
    return tuple(sorted(set(known)))


def _vocabulary(words, ends: tuple[int, ...] | None) -> _Vocabulary:
    made = _known.setdefault(words, {})
    if ends not in made:
        made[ends] = _Vocabulary(words, ends)
    return made[ends]
