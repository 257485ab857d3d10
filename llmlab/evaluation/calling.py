"""Function calling: what a model is told, and whether what it wrote is the right call.

Prompt and reader are the server's, so what is measured is what a client of `llmlab serve` would get with tool_choice "auto" and
nothing held to a grammar. The first call counts.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jsonschema
import referencing

from ..errors import LabError
from ..runtime.generating import has_template, prompt_tokens
from ..server.calls import Reader
from ..server.dialects import system_text
from ..server.refusals import Refusal
from ..server.tools import Tool, Tools, conversation_tokens, known_dialect, tools_of

TOLD = {        # how tools were described
    "template": "tools in the model's chat template",
    "instruction": "tools in an instruction with their schemas, because the model's chat template knows none",
    "text": "tools in plain text with their schemas, because the model has no chat template"}
RIGHT = ("right call", "rightly no call")


class _Any:
    """Every name: a call of a function that nobody offered is a call, and a wrong one."""

    def __contains__(self, name) -> bool:
        return True


def checked_tools(given: Any) -> Tools:
    """OpenAI's definitions, as the server checks them. Raises LabError."""
    try:
        tools = tools_of(given)
    except Refusal as refusal:
        raise LabError(refusal.message) from None
    if tools is None:
        raise LabError("tools is empty; give one function at least")
    return tools


def validator(tool: Tool) -> Callable[[Mapping], str]:
    """What says, in a line, why arguments do not fit a tool's schema; "" where they do. Raises LabError for a schema that is
    none, as what it returns does for a $ref that leads nowhere."""
    kind = jsonschema.validators.validator_for(tool.parameters, jsonschema.Draft202012Validator)
    try:
        kind.check_schema(tool.parameters)
    except jsonschema.SchemaError as error:
        raise LabError(f"the parameters of {tool.name!r} are no JSON schema: {error.message[:80]}") from None
    checks = kind(tool.parameters, registry=referencing.Registry())         # which opens no address that a $ref names

    def fault(arguments: Mapping) -> str:
        try:
            first = jsonschema.exceptions.best_match(checks.iter_errors(arguments))
        except referencing.exceptions.Unresolvable as error:
            raise LabError(f"the parameters of {tool.name!r} refer to {error.ref!r:.60}, which is not there") from None
        except RecursionError:
            return "it never ends, or is nested too deep"
        except (OverflowError, ValueError) as error:        # such as multipleOf of an infinite number
            return f"a number that cannot be checked ({' '.join(str(error).split())[:80]})"
        return "" if first is None else " ".join(first.message.split())[:120]

    return fault


def way_of(words) -> str:
    """How a model is told of tools: one of TOLD."""
    return "template" if known_dialect(words) else "instruction" if has_template(words) else "text"


def call_prompt(words, messages: Sequence[Mapping], tools: Tools) -> list[int]:
    """The prompt: by a template that knows tools, else with the schemas in an instruction; without any template as plain text
    of turns. Raises LabError where the template refuses the conversation."""
    try:
        if has_template(words):
            return conversation_tokens(words, list(messages), tools)
    except Refusal as refusal:
        raise LabError(refusal.message) from None
    turns = [f"{one['role'].capitalize()}: {one['content']}" for one in messages]
    return prompt_tokens(words, "\n\n".join([system_text([one.described for one in tools.tools]), *turns, "Assistant:"]))


class Calls:
    """Reads one answer as it comes; `done` is true from the moment its first call is whole."""

    def __init__(self, words, tools: Tools):
        self._reader: Reader = tools.reader(words, _Any())
        self.done = False

    def add(self, text: str, token: int | None) -> bool:
        if token is None:
            self._reader.add(text)
            self._reader.end()
        else:
            self._reader.add(text, token)
        self.done = bool(self._reader.calls) and _object(self._reader.calls[0]["function"]["arguments"]) is not None
        return self.done

    @property
    def call(self) -> tuple[str, str] | None:
        """The first call's name and its arguments, as text; None where there is none."""
        if not self._reader.calls:
            return None
        function = self._reader.calls[0]["function"]
        return function["name"], function["arguments"]

    @property
    def content(self) -> str:
        return self._reader.content


def verdict(call: tuple[str, str] | None, content: str, tools: Tools, name: str | None, arguments: Mapping[str, Any],
            accept: Mapping[str, Sequence]) -> str:
    """What an answer was: one of RIGHT, or what is wrong with it, in words."""
    if call is None:
        if _attempt(content):
            return "no call that parses"
        if name is None:
            return "rightly no call" if content.strip() else "nothing said"
        return "no call"
    if name is None:
        return "a call where no tool fits"
    said, text = call
    given, known = _object(text), {one.name: one for one in tools.tools}
    if given is None:
        return "no call that parses"
    if said not in known:
        return "a function that is not there"
    if validator(known[said])(given):
        return "arguments that break the schema"
    if said != name:
        return "the wrong function"
    for at in set(given) | set(arguments):
        allowed = [*([arguments[at]] if at in arguments else []), *accept.get(at, ())]
        if at not in given or not any(same(given[at], one) for one in allowed):
            return "wrong arguments"
    return "right call"


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same but for case and spaces of texts; 5 is 5.0, and true is not 1."""
    if isinstance(one, str) and isinstance(other, str):
        return " ".join(one.casefold().split()) == " ".join(other.casefold().split())
    if isinstance(one, dict) and isinstance(other, dict):
        return set(one) == set(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _attempt(content: str) -> bool:
    """Whether words hold what was to be a call: a mark, or an object with a name and arguments."""
    return any(mark in content for mark in ("<tool_call>", "[TOOL_CALLS]", "<function=", "<|python_tag|>")) or (
        '"name"' in content and any(f'"{key}"' in content for key in ("arguments", "parameters")))


def _object(text: str) -> dict | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
