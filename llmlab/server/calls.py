"""Calls of tools out of an answer as it comes: the text before them, then each call's name and its arguments, in pieces."""

import json
import re
import secrets
from collections.abc import Container, Mapping
from typing import Any

from .dialects import HERMES, Dialect

_ONE_VALUE = re.compile(r"<parameter=([\w.-]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_BARE = re.compile(r'(?:```(?:json|xml)?\s*)?(?=\{\s*"name")')     # a call without its marks, in a fence of code or not
_BARE_HEADS = tuple(fence + '{"name"' for fence in ("", "```", "```json", "```xml"))
_LONGEST_HEAD = 4096     # characters in which a call's name must have come to be told before its end


class Reader:
    """Reads an answer in a dialect, in pieces however cut. `add` and `end` give what OpenAI's streams call deltas, dicts with
    "content" or "tool_calls"; `calls` and `content` are the whole so far.

    A call's first delta has its index, id, type and name, those after it pieces of its arguments, as JSON text; what is not in
    the usual order, or no JSON (Qwen3-Coder's), comes whole in one delta. White space around calls is dropped. What looks like
    a call and is none, or is of a function nobody offered, is content. names: of the functions. schemas: of their arguments,
    by name, for values that are not JSON. marks: {token: text} of special tokens that the answer's text is without. strict:
    else Hermes' calls may lack their marks where the answer begins with them, in a fence of code or not; Qwen2.5 Coder writes
    them so, whatever its template says, and llama.cpp takes them.
    """

    def __init__(self, dialect: Dialect, names: Container[str], schemas: Mapping[str, Mapping] | None = None,
                 marks: Mapping[int, str] | None = None, strict: bool = False):
        self.calls: list[dict] = []
        self.content = ""
        self._dialect, self._names, self._schemas, self._marks = dialect, names, schemas or {}, marks or {}
        self._rest, self._deltas = "", []
        self._do = self._first if dialect is HERMES and not strict else self._text
        self._bare = False      # the call lacks its marks
        self._began, self._scan = "", _Scan()
        self._looked = 0        # letters of the rest that the scan has seen

    def add(self, text: str, token: int | None = None) -> list[dict]:
        """The deltas that a piece of text brings, with the token it came with."""
        self._rest += self._marks.get(token, "") + text
        while self._do(False):
            pass
        return self._told()

    def end(self) -> list[dict]:
        """The deltas of what was held back."""
        while self._do(True):
            pass
        return self._told()

    @property
    def message(self) -> dict:
        """OpenAI's message of an answer that has ended: content is None where there is none beside calls."""
        found: dict[str, Any] = {"role": "assistant", "content": self.content or (None if self.calls else "")}
        return found | ({"tool_calls": self.calls} if self.calls else {})

    def _told(self) -> list[dict]:
        told, self._deltas = self._deltas, []
        return told

    # ---- states: each reads what it can of the rest, and says whether there is more to be done ------------------------

    def _first(self, last: bool) -> bool:
        """Where a call without its marks may begin."""
        text = self._rest.lstrip()
        found = _BARE.match(text)
        if found:
            self._began = self._rest[:len(self._rest) - len(text)] + found[0]
            self._rest, self._do, self._bare = text[found.end():], self._head, True
            return True
        begun = re.sub(r"\s", "", text)
        if not last and any(head.startswith(begun) for head in _BARE_HEADS):
            return False
        self._do = self._text
        return True

    def _text(self, last: bool) -> bool:
        if not self._dialect.opening:
            return self._whole(last)
        opening, text = self._dialect.opening, self._rest
        at = text.find(opening)
        if at >= 0:
            self._say(text[:at].rstrip())
            self._rest, self._began, self._do = text[at + len(opening):], text[len(text[:at].rstrip()):at] + opening, self._head
            return True
        keep = len(text) if last else len(text) - _begun(text, opening)
        if not last or self.calls:
            keep = len(text[:keep].rstrip())
        self._say(text[:keep])
        self._rest = "" if last else text[keep:]
        return False

    def _whole(self, last: bool) -> bool:
        """An answer that is a call from its first letter, or none."""
        text = self._rest.lstrip().removeprefix("<|python_tag|>").lstrip()
        if text.startswith("{"):
            self._began, self._rest, self._do = self._rest[:len(self._rest) - len(text)], text, self._head
            return True
        if text and not "<|python_tag|>".startswith(text) or last:
            self._do = self._plain
            return True
        return False

    def _plain(self, last: bool) -> bool:
        self._say(self._rest)
        self._rest = ""
        return False

    def _head(self, last: bool) -> bool:
        """After an opening: the call's name."""
        text, dialect = self._rest, self._dialect
        if dialect.listed and not self._began.endswith("["):
            found = re.match(r"\s*\[", text)
            if found:
                self._began, self._rest = self._began + found[0], text[found.end():]
                return True
            return False if not text.strip() and not last else self._no_call()
        if dialect.values and not re.match(r"\s*\{", text):
            return self._marked(last)
        found = self._matched(text)
        if found and found["name"] in self._names:
            self._call(found["name"])
            self._rest, self._do, self._scan, self._looked = text[found.end():], self._arguments, _Scan(), 0
            return True
        if found:
            return self._no_call()
        return self._at_once(last)

    def _matched(self, text: str) -> re.Match | None:
        if len(text) > _LONGEST_HEAD:
            return None
        # JSON in marks that other things are said to stand in: Hermes' head, which is what such a model is held to.
        head = HERMES.head if self._dialect.values else self._dialect.head
        return head.match(text)

    def _arguments(self, last: bool) -> bool:
        end = self._scan.end(self._rest)
        piece, self._rest = self._rest[:end], self._rest[len(self._rest) if end is None else end:]
        if piece:
            self.calls[-1]["function"]["arguments"] += piece
            self._deltas.append({"tool_calls": [{"index": len(self.calls) - 1, "function": {"arguments": piece}}]})
        if end is None:
            return False
        self._do = self._tail
        return True

    def _tail(self, last: bool) -> bool:
        """After a call's arguments: to its end."""
        dialect, text = self._dialect, self._rest
        if self._bare:
            found = re.match(r"\s*\}\s*(```\s*|(?=[^`\s]))", text)
            if found or last:
                self._rest, self._do, self._bare = text[found.end():] if found else "", self._first, False
                return True
            return False
        if dialect.listed:
            found = re.match(r"[^{}\[\]]*\}\s*(,|\])", text)
            if found:
                self._rest, self._do = text[found.end():], self._head if found[1] == "," else self._text
                self._began = "["
                return True
        elif dialect.closing:
            at, next_one = text.find(dialect.closing), text.find(dialect.opening)
            if next_one >= 0 and not 0 <= at < next_one:        # the closing was left out
                self._rest, self._do = text[next_one:], self._text
                return True
            if at >= 0:
                self._rest, self._do = text[at + len(dialect.closing):], self._text
                return True
        elif dialect.opening:
            self._do = self._text
            return True
        else:
            found = re.match(r"\s*\}\s*;?\s*", text)
            if found and (last or found.end() < len(text)):
                self._rest = text[found.end():]
                self._do = self._head if self._rest.startswith("{") else self._plain
                self._began = ""
                return True
        if last:
            self._rest = ""
        return False

    def _at_once(self, last: bool) -> bool:
        """A call whose parts come in another order: when it is whole."""
        text = self._rest
        start = len(text) - len(text.lstrip())
        if not text.strip():
            return self._no_call() if last else False
        if text[start] != "{":
            waits = self._dialect.head.pattern != HERMES.head.pattern and not last and len(text) <= _LONGEST_HEAD
            return False if waits else self._no_call()
        if self._looked == 0:
            self._scan, self._looked = _Scan(), start
        end, looked = self._scan.end(text[self._looked:]), self._looked
        if end is None:
            self._looked = len(text)
            return self._no_call() if last else False
        name, arguments = _read(text[start:looked + end])
        if name not in self._names:
            return self._no_call()
        self._call(name, arguments)
        self._rest, self._do, self._looked = "}" + text[looked + end:], self._tail, 0
        return True

    def _marked(self, last: bool) -> bool:
        """A call whose arguments are marked one by one."""
        at = self._rest.find(self._dialect.closing)
        if at < 0:
            return self._no_call() if last else False
        text, found = self._rest[:at], self._dialect.head.match(self._rest[:at])
        if not found or found["name"] not in self._names:
            return self._no_call()
        kinds = self._schemas.get(found["name"], {}).get("properties", {})
        values = {name: _value(text, kinds.get(name, {})) for name, text in _ONE_VALUE.findall(text)}
        self._call(found["name"], json.dumps(values, ensure_ascii=False))
        self._rest, self._do = self._rest[at + len(self._dialect.closing):], self._text
        return True

    def _no_call(self) -> bool:
        """It is text after all: what it began with is said, and the rest read on."""
        self._say(self._began)
        self._looked, self._bare = 0, False
        self._do = self._text if self._dialect.opening else self._plain
        return True

    # ---- what is said -------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        if not self.content:
            text = text.lstrip() if self.calls else text
        if text:
            self.content += text
            self._deltas.append({"content": text})

    def _call(self, name: str, arguments: str = "") -> None:
        call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": arguments}}
        self.calls.append(call)
        self._deltas.append({"tool_calls": [{"index": len(self.calls) - 1} | call | {"function": dict(call["function"])}]})


class _Scan:
    """Where a JSON object that comes in pieces ends."""

    def __init__(self):
        self._depth, self._quoted, self._escaped = 0, False, False

    def end(self, text: str) -> int | None:
        """The place after its last brace in this piece; None where it goes on."""
        for at, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = letter == "\\", letter != '"'
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return None


def _read(text: str) -> tuple[str | None, str]:
    """The name and the arguments, as JSON text, of a call that is one JSON object; (None, "") where it is none."""
    try:
        value = json.loads(text)
        inner = value.get("function")
        value = inner if isinstance(inner, dict) else value
        name = value.get("name", inner)
        arguments = next((value[key] for key in ("arguments", "parameters", "args") if key in value), {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if isinstance(name, str) and isinstance(arguments, dict):
            return name, json.dumps(arguments, ensure_ascii=False)
    except (ValueError, AttributeError, RecursionError):
        pass
    return None, ""


def _value(text: str, schema: Mapping) -> Any:
    """A value that was written between marks: JSON, but for what the schema says is text."""
    kinds = schema.get("type", "string") if isinstance(schema, dict) else "string"
    if kinds == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _begun(text: str, mark: str) -> int:
    """How many letters at a text's end may be the beginning of a mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
