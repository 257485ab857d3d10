"""How models write that they call a tool: a dialect a family, and the grammar that keeps to it.

Read in the published templates of Qwen2.5 and Hermes 2 Pro (Hermes), Llama 3.1 to 3.3, Mistral Nemo, Mistral Small 3.2,
functionary v3.1 and Qwen3-Coder. A template that knows tools in yet another dialect is treated as one that knows none: tools
are then described in a system text, in the manner of Hermes.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NAMED = r'\s*\{\s*"name"\s*:\s*"(?P<name>[\w.-]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'


@dataclass(frozen=True)
class Dialect:
    """opening: what a call, or a list of them, begins with; empty where the whole answer is one. head: what comes before a
    call's arguments, with its `name`. closing: what ends it, or separates it from the next. listed: calls stand in a JSON
    array behind one opening. several: whether more than one call can follow another. values: arguments are not JSON but marked
    one by one. arguments: the key they go by."""

    name: str
    opening: str
    head: re.Pattern
    closing: str = ""
    listed: bool = False
    several: bool = True
    values: bool = False
    arguments: str = "arguments"
    short_ids: bool = False             # its templates take only ids of nine letters and digits

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that a vocabulary may have as special tokens, which decoding leaves out."""
        return tuple(one for one in (self.opening, self.closing, "[ARGS]", "[CALL_ID]", "<|python_tag|>") if one)


HERMES = Dialect("hermes", "<tool_call>", re.compile(_NAMED), "</tool_call>")
LLAMA = Dialect("llama", "", re.compile(_NAMED), several=False, arguments="parameters")
MISTRAL = Dialect("mistral", "[TOOL_CALLS]", re.compile(_NAMED), listed=True, short_ids=True)
MISTRAL_ARGS = Dialect("mistral-args", "[TOOL_CALLS]", short_ids=True, head=re.compile(
    r"\s*(?P<name>[\w.-]+?)\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\]\s*(?=\{)"))
FUNCTIONARY = Dialect("functionary", "<function=", re.compile(r"(?P<name>[\w.-]+)>\s*(?=\{)"), "</function>")
QWEN_CODER = Dialect("qwen-coder", "<tool_call>", re.compile(r"\s*<function=(?P<name>[\w.-]+)>"), "</tool_call>", values=True)


ALL = (HERMES, QWEN_CODER, MISTRAL, MISTRAL_ARGS, FUNCTIONARY, LLAMA)


def grammar(dialect: Dialect, schemas: Mapping[str, Mapping], special: Mapping[str, int], several: bool, opened: bool,
            answer: Mapping | None = None) -> str:
    """Calls in a dialect, for llguidance, in its form of Lark's language.

    schemas: of the arguments, by the tool's name. special: tokens by their text that are no part of a text. several: more than
    one call may come. opened: the opening (of Llama's: up to the name) was written already. answer: the schema of JSON that may
    come instead of calls; not in Llama's, whose calls begin as any JSON does. Qwen3-Coder's are written as Hermes' are: its own
    marks hold values that are no JSON.
    """
    def mark(text: str) -> str:
        return f"<[{special[text]}]>" if text in special else json.dumps(text, ensure_ascii=False)

    calls = [_call(dialect, mark, name, at) for at, name in enumerate(schemas)]
    rules = [f"call: {' | '.join(f'call_{at}' for at in range(len(calls)))}"]
    rules += [f"call_{at}: {call}" for at, call in enumerate(calls)]
    rules += [f"args_{at}: %json {json.dumps(schema)}" for at, schema in enumerate(schemas.values())]
    opening = f"{mark(dialect.opening)} " if dialect.opening else ""
    first, many = "" if opened else opening, several and dialect.several
    if dialect.listed:
        body, more = '" "? "[" call {} "]"', '(", " call)*'
        start = first + body.format(more if many else "")
    elif dialect.closing and dialect is not FUNCTIONARY:
        one = f'"\\n"? call "\\n" {mark(dialect.closing)}'
        start = first + one + (f' ("\\n" {opening}{one})*' if many else "")
    else:
        start = f"{first}call" + (f" ({opening}call)*" if many else "")
    if answer is not None:
        rules += [f"calls: {start}", f"answer: %json {json.dumps(answer)}"]
        start = "calls | answer"
    return "\n".join([f"start: {start}", *rules])


def _call(dialect: Dialect, mark, name: str, at: int) -> str:
    if dialect is MISTRAL_ARGS:
        return f"{mark(name)} {mark('[ARGS]')} args_{at}"
    if dialect is FUNCTIONARY:
        return f'{mark(name + ">")} args_{at} {mark(dialect.closing)}'
    head = json.dumps('{"name": "' + name + f'", "{dialect.arguments}": ')
    return f'{head} args_{at} "}}"'


def system_text(tools: Sequence[Mapping]) -> str:
    """What tells a model of tools whose template does not, in the manner of Hermes; ours in wording."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return ("# Tools\n\nThese functions can be called, each described by a JSON schema:\n"
            f"<tools>\n{listed}\n</tools>\n\n"
            "To call one, write a JSON object with its name and its arguments, and nothing else, within these tags:\n"
            '<tool_call>\n{"name": "the function\'s name", "arguments": {"the argument\'s name": "its value"}}\n</tool_call>\n'
            "What it gives back comes in the next message, within <tool_response> tags.")


def call_text(name: str, arguments: str) -> str:
    """A call that was made, as `system_text` asks for it. arguments: JSON."""
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'
