"""What must not leave: found in texts, replaced by placeholders, and put back in the answer. The names stay on this machine.

What is built in finds patterns, not meaning: a name or an address in prose goes through. Hooks of your own, text -> text, run
before it.
"""

import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import LabError
from .sending import as_json

_EMAIL = re.compile(r"[\w.%+'-]{1,64}@(?:[\w-]{1,63}\.){1,8}(?:xn--[A-Za-z0-9-]{2,59}|[^\W\d_]{2,24})")
# Digits in groups, as people write telephone numbers: a + or a 0 at the front, or (area), and 7 to 15 digits.
_PHONE = re.compile(r"(?<![\w.])(?:\+\d{1,3}[ ./-]?|\(?0\d{0,4}\)?[ ./-]?|\(\d{2,5}\)[ ./-]?|\d{3}[ .-](?=\d{3}[ .-]\d{4}\b))"
                    r"(?:\(?\d{1,5}\)?[ ./-]?){1,5}\d{2,}(?![\w])")
_IP = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:]|\.\d)")
_CARD = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?![\w])")
_SECRET = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bhf_[A-Za-z0-9]{20,}"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bglpat-[\w-]{16,}|\bA(?:KIA|SIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*")
_SAID = re.compile(r"(?i)\b(?:password|passwd|pwd|secret|token|api[_-]?key|access[_-]?key|authorization)\b[\"']?\s*"
                   r"(?:=|:|is)\s*(?:bearer\s+)?[\"']?(?P<value>[^\s\"',;]{6,})")
_LONG = re.compile(r"(?<![\w/+-])[A-Za-z0-9+/_-]{32,}={0,2}(?![\w/+-])")
_PATH = re.compile(r"(?:/(?:home|Users|root)\b|\b[A-Za-z]:\\{1,2}Users\\|~/)[^\s\"'<>|:;,)\]]*")

_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,31}")
_WORD = re.compile(r"[a-z_]{1,24}")

Span = tuple[int, int]


def _matches(pattern: re.Pattern, right: Callable[[str], bool] = bool) -> Callable[[str], Iterator[Span]]:
    return lambda text: (found.span() for found in pattern.finditer(text) if right(found[0]))


def luhn(text: str) -> bool:
    """Whether digits are a card number's: the sum, every other one doubled, ends in 0."""
    digits = [int(letter) for letter in reversed(text) if letter.isdigit()]
    total = sum(digits[::2]) + sum(sum(divmod(2 * one, 10)) for one in digits[1::2])
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and total % 10 == 0


def _is_phone(text: str) -> bool:
    return 7 <= sum(map(str.isdigit, text)) <= 15


def _is_address(text: str) -> bool:
    try:
        return not ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


def _is_random(text: str) -> bool:
    """Letters of both cases and digits, or hex: no word and no path has them all."""
    kinds = (any(map(str.isupper, text)), any(map(str.islower, text)), any(map(str.isdigit, text)))
    hexadecimal = re.fullmatch(r"[0-9a-fA-F]{32,}", text) and any(map(str.isdigit, text))
    return bool(hexadecimal) or all(kinds) and text.count("/") < 3


def _secrets(text: str) -> Iterator[Span]:
    yield from _matches(_SECRET)(text)
    yield from (found.span("value") for found in _SAID.finditer(text))
    yield from _matches(_LONG, _is_random)(text)


def _paths(text: str) -> Iterator[Span]:
    yield from _matches(_PATH)(text)
    home = str(Path.home())
    if len(home) > 1:
        yield from (found.span() for found in re.finditer(re.escape(home) + r"(?![\w])[^\s\"'<>|:;,)\]]*", text))
    user = os.environ.get("USER") or os.environ.get("USERNAME") or ""
    if len(user) > 3 and user != "root":
        yield from (found.span() for found in re.finditer(rf"\b{re.escape(user)}\b", text))


BUILT_IN: dict[str, Callable[[str], Iterable[Span]]] = {        # where two overlap, the earlier one names it
    "secrets": _secrets, "emails": _matches(_EMAIL), "paths": _paths, "ips": _matches(_IP, _is_address),
    "cards": _matches(_CARD, luhn), "phones": _matches(_PHONE, _is_phone),
}
_CALLED = {"secrets": "SECRET", "emails": "EMAIL", "paths": "PATH", "ips": "IP", "cards": "CARD", "phones": "PHONE"}


@dataclass
class Vault:
    """What was replaced in one question: {placeholder: what it stands for}. It is never sent, logged or shown by `repr`."""

    held: dict[str, str] = field(default_factory=dict, repr=False)
    changed: int = 0             # texts that hooks changed

    def __len__(self) -> int:
        return len(self.held)

    def restore(self, text: str) -> str:
        """An answer with what the placeholders stand for."""
        if not self.held:
            return text
        return re.sub("|".join(map(re.escape, self.held)), lambda found: self.held[found[0]], text)


class Redactor:
    """Which of BUILT_IN, and hooks. `Redactor(("emails", my_function))`; Raises LabError for a name that is none."""

    def __init__(self, what: Iterable[str | Callable[[str], str]] = tuple(BUILT_IN)):
        what = (what,) if isinstance(what, str) or callable(what) else tuple(what or ())
        for one in what:
            if not callable(one) and one not in BUILT_IN:
                raise LabError(f"redact has {one!r:.40}; give {', '.join(BUILT_IN)}, or a function from text to text")
        self.hooks = tuple(one for one in what if callable(one))
        self.kinds = tuple(kind for kind in BUILT_IN if kind in what)

    def __repr__(self) -> str:
        return f"Redactor({', '.join((*self.kinds, *(getattr(hook, '__name__', 'a hook') for hook in self.hooks)))})"

    def messages(self, messages: list[dict], vault: Vault, taken: str = "") -> list[dict]:
        """The same conversation without what must not leave: every text in it, however deep. Raises LabError where a hook
        fails or gives no text, and for objects that cannot be looked through: then nothing may leave. taken: as text()'s."""
        messages = as_json(messages)
        taken = "\n".join((texts_of(messages), taken))
        return self._inside(messages, vault, taken)

    def anything(self, value, vault: Vault, taken: str = ""):
        """The same of what else goes along."""
        value = as_json(value)
        return self._inside(value, vault, "\n".join((texts_of(value), taken)))

    def text(self, text: str, vault: Vault, taken: str = "") -> str:
        """One text without what must not leave. taken: in which placeholders may not occur."""
        for hook in self.hooks:
            text = self._hooked(hook, text, vault)
        spans: list[tuple[int, int, str]] = []
        for kind in self.kinds:
            for start, end in BUILT_IN[kind](text):
                # Of two that overlap neither leaves in part: they are one, and the earlier one names it.
                over = [one for one in spans if start < one[1] and end > one[0]]
                if over:
                    start, end = min(start, *(one[0] for one in over)), max(end, *(one[1] for one in over))
                    spans = [one for one in spans if one not in over]
                if start < end:
                    spans.append((start, end, over[0][2] if over else kind))
        names = {value: name for name, value in vault.held.items()}
        pieces, at = [], 0
        for start, end, kind in sorted(spans):
            found = text[start:end]
            if found not in names:
                names[found] = _free(_CALLED[kind], vault, taken + text)
                vault.held[names[found]] = found
            pieces += [text[at:start], names[found]]
            at = end
        return "".join([*pieces, text[at:]])

    def _hooked(self, hook: Callable[[str], str], text: str, vault: Vault) -> str:
        wrong, found = "", None
        try:
            found = hook(text)
        except Exception as error:
            wrong = f" ({type(error).__name__})"
        if not isinstance(found, str):
            called = getattr(hook, "__name__", "hook")
            raise LabError(f"the redaction {called!r} gave no text{wrong}, so nothing leaves; mend it")
        vault.changed += found != text
        return found

    def _inside(self, value, vault: Vault, taken: str):
        if isinstance(value, str):
            return self.text(value, vault, taken)
        if isinstance(value, list):
            return [self._inside(one, vault, taken) for one in value]
        if isinstance(value, dict):
            return {self._name(name, vault, taken): one if _is_word_of_the_api(name, one) else self._inside(one, vault, taken)
                    for name, one in value.items()}
        return value

    def _name(self, name: str, vault: Vault, taken: str) -> str:
        """A field's own name stays; what else stands there, say an address in a table, does not."""
        return name if _FIELD.fullmatch(name) else self.text(name, vault, taken)


def _is_word_of_the_api(name: str, value) -> bool:
    return name in ("type", "role") and isinstance(value, str) and bool(_WORD.fullmatch(value))


def texts_of(value) -> str:
    """Every text in a value, however deep, each a line."""
    if isinstance(value, str):
        return value
    parts = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return "\n".join(map(texts_of, parts))


def _free(called: str, vault: Vault, text: str) -> str:
    """A placeholder that stands for nothing yet and that nobody wrote."""
    at = 1 + sum(name.startswith(f"[{called}_") for name in vault.held)
    while (name := f"[{called}_{at}]") in text or name in vault.held:
        at += 1
    return name
