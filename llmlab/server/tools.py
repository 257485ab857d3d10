"""Tools a model may call: described to it by its chat template or in a system text, and its answer held to their JSON schemas.

For a request: `tools_of` checks what was asked, `conversation_tokens` writes the prompt, with calls and results of earlier
turns, `Tools.mask` goes into the Chooser, and `Tools.reader` gives content and calls out of the answer, in OpenAI's shape.
"""

import hashlib
import json
import os
import re
import weakref
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import LabError
from ..runtime.constraining import ANY_OBJECT, LONGEST, SPACES, Form, Later, constraint, faults
from ..runtime.generating import has_template, prompt_tokens
from ..runtime.sampling import Constraint
from ..vocabulary.chats import template_of
from .calls import Reader
from .dialects import ALL, HERMES, LLAMA, QWEN_CODER, Dialect, call_text, grammar, system_text
from .refusals import Refusal

MOST = 128               # tools, as OpenAI allows
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_PROBE = "llmlab_probe"
_STARTS = {LLAMA: (re.compile(rb'\A\s*(?:<\|python_tag\|>)?\s*\{\s*"name"\s*:\s*"'), b'{"name": "')}
_known = weakref.WeakKeyDictionary()        # of a tokenizer: its template's dialect


@dataclass(frozen=True)
class Tool:
    """A function: parameters is the JSON schema of its arguments, an object's. strict: the schema is followed to the letter;
    otherwise keywords that cannot be followed are passed over."""

    name: str
    parameters: Mapping
    description: str | None = None
    strict: bool = False

    @property
    def described(self) -> dict:
        """OpenAI's form of it, which chat templates take."""
        function = {"name": self.name} | ({"description": self.description} if self.description else {})
        return {"type": "function", "function": function | {"parameters": dict(self.parameters)}}


@dataclass(frozen=True)
class Answer:
    """JSON that an answer must be where it calls nothing: OpenAI's response_format. lenient: keywords that cannot be followed
    are passed over."""

    schema: Mapping
    lenient: bool = False

    @property
    def written(self) -> dict:
        return _written(self.schema, self.lenient)


@dataclass(frozen=True)
class Tools:
    """The tools of a request. choice: "auto", "required", or the name of the one that must be called. several: more than one
    call may come (OpenAI's parallel_tool_calls)."""

    tools: tuple[Tool, ...]
    choice: str = "auto"
    several: bool = True

    @property
    def offered(self) -> tuple[Tool, ...]:
        """Those that may be called."""
        return tuple(one for one in self.tools if self.choice in ("auto", "required", one.name))

    @property
    def forced(self) -> bool:
        return self.choice != "auto"

    def mask(self, words, answer: Answer | None = None) -> Constraint | None:
        """What holds an answer to the tools: calls from the first token on where one must come; for "auto" nothing until the
        dialect's opening is written, and from there on a call. `answer`: from the first token on calls, or JSON of that form.
        None where nothing can (Qwen3-Coder's dialect, by itself). One for each answer: fork it. Raises Refusal for a schema
        that cannot be followed, and for an `answer` that could not be told from a call."""
        dialect = known_dialect(words) or HERMES
        if dialect is QWEN_CODER and not self.forced and answer is None:
            return None
        if answer is not None and (self.forced or not dialect.opening):
            why = "tool_choice asks for a call" if self.forced else "this model's calls are JSON too, without a mark before it"
            raise Refusal(f"response_format is for answers that are no calls, and {why}; leave response_format or tools out.",
                          param="response_format")
        written = partial(grammar, dialect, special=_special(words, dialect), opened=not self.forced and answer is None,
                          several=self.several and self.choice in ("auto", "required"), answer=answer and answer.written)
        schemas = {tool.name: _written(tool.parameters, not tool.strict) for tool in self.offered}

        def made(schemas: Mapping[str, Mapping]) -> Form:
            try:
                return constraint(words, written(schemas=schemas), "lark")
            except LabError as error:
                raise Refusal(f"tools{' and response_format' if answer else ''}: {error}", param="tools") from None

        try:                            # all at once: a trial takes a process
            form = made(schemas)
        except Refusal:
            if not (loosened := self._loosened(answer)):
                raise
            form = made(schemas | loosened)
        if self.forced or answer is not None:
            return form
        opening = re.compile(re.escape(dialect.opening).encode())
        return Later(words, form, *_STARTS.get(dialect, (opening, b"")))

    def _loosened(self, answer: Answer | None) -> dict[str, Mapping]:
        """Of tools whose schema cannot be followed, and need not be: any object. Raises Refusal for one that must be."""
        tools = self.offered
        asked = [(tool.parameters, not tool.strict) for tool in tools] + ([(answer.schema, answer.lenient)] if answer else [])
        wrong = faults(asked)
        for tool, fault in zip(tools, wrong, strict=False):
            if fault and tool.strict:
                place = f"tools[{self.tools.index(tool)}].function.parameters"
                raise Refusal(f"{place}: {fault}", param=place)
        if answer and wrong[-1]:
            raise Refusal(wrong[-1], param="response_format")
        return {tool.name: _written(ANY_OBJECT, True) for tool, fault in zip(tools, wrong, strict=False) if fault}

    def reader(self, words, names: Container[str] | None = None) -> Reader:
        """What reads one answer. names: of functions that a call may be of (None: those offered)."""
        dialect = known_dialect(words) or HERMES
        marks = {number: text for text, number in _special(words, dialect).items()}
        names = {one.name for one in self.offered} if names is None else names
        return Reader(dialect, names, {one.name: one.parameters for one in self.offered}, marks)


def tools_of(given: Any, choice: Any = None, several: bool = True) -> Tools | None:
    """OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`, checked; None where nothing can be called: no tools, or the
    choice "none" (the model then is not told of them). Raises Refusal, naming the parameter."""
    tools = _tools(given)
    if choice is None or choice in ("none", "auto"):
        return None if choice == "none" or not tools else Tools(tools, "auto", several)
    if not tools:
        raise Refusal("tool_choice is only allowed when tools are given.", param="tool_choice")
    if choice == "required":
        return Tools(tools, "required", several)
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type", "function") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise Refusal('tool_choice is none that is known here; give "none", "auto", "required", or '
                      '{"type": "function", "function": {"name": ...}}.', param="tool_choice")
    if name not in {one.name for one in tools}:
        raise Refusal(f"tool_choice names {name[:64]!r}, which is not among the tools.", param="tool_choice")
    return Tools(tools, name, several)


def conversation_tokens(words, messages: Sequence[Mapping], tools: Tools | None = None) -> list[int]:
    """The prompt of a conversation in tokens, as `generating.prompt_tokens`, with tools and with what earlier turns called.

    messages: as OpenAI's, contents as text. A template that knows tools gets them; otherwise they are described in the system
    message (in the first user's, where the template refuses that), and calls and results are written into the text. Raises
    Refusal for a result of a call that nobody made, LabError where the template refuses the conversation.
    """
    called = any(one.get("tool_calls") or one["role"] == "tool" for one in messages)
    if not tools and not called:
        return prompt_tokens(words, list(messages))
    _check_results(messages)
    dialect = known_dialect(words)
    if dialect:
        return _prompt(words, _for_template(messages, dialect), tools and [one.described for one in tools.tools])
    plain = _as_text(messages)
    if not tools:
        return _prompt(words, plain)
    text = system_text([one.described for one in tools.tools])
    try:
        return _prompt(words, _with_first(plain, "system", text))
    except LabError:
        return _prompt(words, _with_first(plain, "user", text))


def known_dialect(words) -> Dialect | None:
    """How a tokenizer's chat template has tools called; None where it knows none, or in a way that is not known here: found
    out by giving it a tool and a call, and reading that back."""
    if not has_template(words):
        return None
    template = template_of(words, None, [])
    known = _known.setdefault(words, {})
    if template not in known:
        try:
            known[template] = _found_out(words)
        except Exception:                   # a template is a program by strangers: whatever it raises, it takes no tools
            known[template] = None
    return known[template]


def _found_out(words) -> Dialect | None:
    tool = Tool(_PROBE, ANY_OBJECT | {"properties": {"key": {"type": "string"}}}, _PROBE).described
    asked = [{"role": "user", "content": "?"}]
    call = {"id": "abcdefgh1", "type": "function", "function": {"name": _PROBE, "arguments": {"key": "value"}}}
    before = words.apply_chat_template(asked, tools=[tool], tokenize=False, add_generation_prompt=True)
    after = words.apply_chat_template([*asked, {"role": "assistant", "content": "", "tool_calls": [call]}], tools=[tool],
                                      tokenize=False)
    if _PROBE not in before:
        return None
    text = after[len(os.path.commonprefix([before, after])):]
    for dialect in ALL:
        reader = Reader(dialect, {_PROBE}, {_PROBE: tool["function"]["parameters"]}, strict=True)
        reader.add(text)
        reader.end()
        if [json.loads(one["function"]["arguments"]) for one in reader.calls] == [{"key": "value"}]:
            return dialect
    return None


def _tools(given: Any) -> tuple[Tool, ...]:
    if given is None:
        return ()
    if not isinstance(given, list) or len(given) > MOST:
        raise Refusal(f"tools is not a list of up to {MOST}.", param="tools")
    tools = tuple(_tool(one, f"tools[{at}]") for at, one in enumerate(given))
    names = [one.name for one in tools]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Refusal(f"tools has {min(twice)!r} twice.", param="tools")
    try:
        size = len(json.dumps([one.described for one in tools]))
    except RecursionError:
        raise Refusal("tools nest too deep.", param="tools") from None
    if size > LONGEST:
        raise Refusal(f"tools are {size:,} characters of JSON; up to {LONGEST:,} are read.", param="tools")
    return tools


def _tool(given: Any, place: str) -> Tool:
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or given.get("type", "function") != "function":
        raise Refusal(f'{place} is no function; give {{"type": "function", "function": {{"name": ...}}}}.', param=place)
    name, about, strict = function.get("name"), function.get("description"), function.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Refusal(f"{place}.function.name must be up to 64 letters, digits, underscores and dashes.",
                      param=f"{place}.function.name")
    if about is not None and not isinstance(about, str):
        raise Refusal(f"{place}.function.description is no text.", param=f"{place}.function.description")
    if strict is not None and not isinstance(strict, bool):
        raise Refusal(f"{place}.function.strict is neither true nor false.", param=f"{place}.function.strict")
    schema = function.get("parameters")
    if schema is None:                  # OpenAI: leaving parameters out is an empty list of them
        schema = ANY_OBJECT | {"properties": {}, "additionalProperties": False}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise Refusal(f"{place}.function.parameters must be a JSON schema of an object.", param=f"{place}.function.parameters")
    return Tool(name, {"type": "object"} | dict(schema), about or None, bool(strict))


def _written(schema: Mapping, lenient: bool) -> dict:
    """A schema as it stands in a grammar."""
    return dict(schema) | {"x-guidance": {"lenient": lenient, "whitespace_pattern": SPACES}}


def _special(words, dialect: Dialect) -> dict[str, int]:
    """A dialect's marks that are special tokens of the vocabulary, which decoding leaves out."""
    added = words.get_added_vocab()
    special = words.is_special if hasattr(words, "is_special") else set(words.all_special_ids).__contains__
    return {text: added[text] for text in dialect.marks if text in added and special(added[text])}


# ---- the conversation ---------------------------------------------------------------------------------------------


def _prompt(words, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
    return prompt_tokens(words, messages, tools=tools)


def _check_results(messages: Sequence[Mapping]) -> None:
    """Every result answers a call of the assistant's turn before it."""
    called: set[str] = set()
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            called = {call.get("id") for call in message.get("tool_calls") or ()}
        elif message["role"] != "tool":
            called = set()
        elif message.get("tool_call_id") not in called:
            place = f"messages[{at}]"
            raise Refusal(f"{place}: a message of role 'tool' must answer one of the tool_calls of the assistant before it, by "
                          "tool_call_id.", param=place)


def _for_template(messages: Sequence[Mapping], dialect: Dialect) -> list[dict]:
    """As templates want them: arguments as values, each result with its function's name, ids in a form they take."""
    found, names = [], {}
    for message in messages:
        message = dict(message)
        if calls := message.get("tool_calls"):
            names |= {call.get("id"): call["function"]["name"] for call in calls}
            message["tool_calls"] = [{"id": _id(call.get("id"), dialect), "type": "function",
                                      "function": {"name": call["function"]["name"],
                                                   "arguments": _value(call["function"].get("arguments"))}} for call in calls]
        if message["role"] == "tool":
            message.setdefault("name", names.get(message.get("tool_call_id"), ""))
            message["tool_call_id"] = _id(message.get("tool_call_id"), dialect)
        found.append(message)
    return found


def _value(arguments: Any) -> Any:
    """Arguments that came as JSON text; what is none stays the text it is."""
    try:
        return json.loads(arguments) if arguments else {}
    except (ValueError, RecursionError):
        return arguments


def _id(given: str | None, dialect: Dialect) -> str:
    """A call's id; of Mistral's nine letters and digits, the same for the same id."""
    given = given or ""
    if not dialect.short_ids or _SHORT_ID.fullmatch(given):
        return given
    return hashlib.blake2b(given.encode("utf-8", "replace"), digest_size=8).hexdigest()[:9]


def _as_text(messages: Sequence[Mapping]) -> list[dict]:
    """Calls and results as text of assistant and user, results of one turn in one message."""
    found: list[dict] = []
    for before, message in zip([None, *messages], messages, strict=False):
        role, text = message["role"], message.get("content") or ""
        if calls := message.get("tool_calls"):
            made = [call_text(call["function"]["name"], call["function"].get("arguments") or "{}") for call in calls]
            text = "\n".join([text, *made] if text else made)
        if role == "tool":
            text = f"<tool_response>\n{text}\n</tool_response>"
            if before is not None and before["role"] == "tool":
                found[-1]["content"] += f"\n{text}"
                continue
            role = "user"
        found.append({"role": role, "content": text})
    return found


def _with_first(messages: list[dict], role: str, text: str) -> list[dict]:
    """The text in front of the first message, where that is of this role, else in a message before it. (A template that takes
    no system message has what that said in the user's.)"""
    if role == "user" and messages[0]["role"] == "system":
        text, messages = f"{messages[0]['content']}\n\n{text}", messages[1:]
    if messages and messages[0]["role"] == role:
        order = (messages[0]["content"], text) if role == "system" else (text, messages[0]["content"])
        return [{"role": role, "content": "\n\n".join(order)}, *messages[1:]]
    return [{"role": role, "content": text}, *messages]
