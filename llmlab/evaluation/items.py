"""Items of a task, read from JSON lines; a line that is not what it should be is refused, by file and number.

data/tasks/NAME.jsonl holds one item a line, of three kinds: `Choice` (texts whose likelihood is compared), `Exact` (a short
answer, written greedily), `Call` (a function to be called, or none).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadFile, LabError, UnknownName
from ..gguf.words import show_path
from ..memory import checked_integer
from ..places import folder
from .matching import number_of

if TYPE_CHECKING:
    from .outcomes import Outcome

TASKS = ("coding", "tools", "reasoning", "english", "russian")      # as the table shows them; others follow by name
NEEDLES, LM_EVAL = "needles", "lm_eval:"    # what is no file of items: the task, and the beginning of lm-eval-harness's
TOKENS = 24             # of an exact answer, where an item does not say
MATCHES = ("number", "text")
_LONGEST = 10_000_000   # bytes of a file


@dataclass(frozen=True)
class Item:
    """What every item has. digest: of all that it says, so that two evaluations know whether they were asked the same."""

    id: str
    digest: str

    @property
    def chance(self) -> float:
        """The share that guessing gets right: 0 where there is nothing to guess from."""
        return 0.0


@dataclass(frozen=True)
class Choice(Item):
    """prompt: read first. choices: texts that may follow it, with their leading space. answer: the right one's index."""

    prompt: str
    choices: tuple[str, ...]
    answer: int

    kind = "choice"

    @property
    def chance(self) -> float:
        return 1 / len(self.choices)


@dataclass(frozen=True)
class Exact(Item):
    """prompt: what is asked. answers: each of them right. match: "number" or "text", see `matching`. tokens: most that are
    written."""

    prompt: str
    answers: tuple[str, ...]
    match: str
    tokens: int = TOKENS

    kind = "exact"


@dataclass(frozen=True)
class Call(Item):
    """messages: a conversation. tools: OpenAI's definitions. name, arguments: the right call; name None: none fits, and words
    are right. accept: other values of an argument; of one that the right call lacks: values it may have."""

    messages: tuple[Mapping, ...]
    tools: tuple[Mapping, ...]
    name: str | None
    arguments: Mapping[str, Any]
    accept: Mapping[str, tuple]

    kind = "call"


def shipped() -> tuple[str, ...]:
    """The names of the tasks that come with llmlab."""
    found = {path.stem for path in (folder("data") / "tasks").glob("*.jsonl")}
    return tuple(sorted(found, key=lambda name: (TASKS.index(name) if name in TASKS else len(TASKS), name)))


def names_of(tasks: str | os.PathLike | Sequence[str | os.PathLike] | None) -> list[str | os.PathLike]:
    """The tasks that are meant, each once; None: all that come with llmlab, and needles. Raises LabError."""
    if tasks is None:
        return [*shipped(), NEEDLES]
    names = [tasks] if isinstance(tasks, (str, os.PathLike)) else tasks
    if (not isinstance(names, (list, tuple)) or not names
            or not all(isinstance(one, (str, os.PathLike)) and str(one).strip() for one in names)):
        raise LabError(f"tasks is {tasks!r:.60}; give names, such as 'coding', or paths of .jsonl files")
    if len({called(one) for one in names}) < len(names):
        raise LabError(f"tasks has one of {', '.join(map(called, names))[:80]} twice")
    return list(names)


def called(task: str | os.PathLike) -> str:
    """What a task is called: a file's stem, else its name."""
    return Path(task).stem if str(task).endswith(".jsonl") else str(task)


def check_tasks(tasks, limit: int | None = None) -> None:
    """Raises LabError where one is not there or damaged, and for a limit that is none; those of lm-eval-harness are not looked
    at."""
    check_limit(limit)
    for name in names_of(tasks):
        if name != NEEDLES and not str(name).startswith(LM_EVAL):
            task_items(name)


def may_share(tasks, limit: int | None, outcomes: Iterable["Outcome"]) -> bool:
    """Whether one of `outcomes` may be of an item that these tasks ask. Needles are made with the model's vocabulary and
    lm-eval's items come with their data, so of these only the names say something. Raises as `check_tasks` does."""
    theirs = {(one.task, one.id, one.digest) for one in outcomes}
    for name in names_of(tasks):
        if str(name).startswith(LM_EVAL):           # a group's tasks have names of their own
            found = any(task.startswith(LM_EVAL) for task, _, _ in theirs)
        elif name == NEEDLES:
            found = any(task == NEEDLES for task, _, _ in theirs)
        else:
            found = any((called(name), one.id, one.digest) in theirs for one in task_items(name)[:limit])
        if found:
            return True
    return False


def check_limit(limit: int | None) -> None:
    """Raises LabError for what is no number of items."""
    if limit is not None:
        checked_integer("limit", limit, 1, 2**31 - 1, "give a whole number of items, from 1 up")


def task_items(task: str | os.PathLike) -> tuple[Item, ...]:
    """The items of a shipped task, or of a .jsonl file. Raises UnknownName, BadFile."""
    if str(task).endswith(".jsonl"):
        return read_items(task)
    if task not in shipped():
        raise UnknownName(f"there is no task {str(task)[:60]!r}; there are {', '.join([*shipped(), NEEDLES])}, or give a "
                          ".jsonl file of your own")
    return read_items(folder("data") / "tasks" / f"{task}.jsonl")


def read_items(path: str | os.PathLike) -> tuple[Item, ...]:
    """The items of a file, in order. Raises BadFile, naming file and line, for one that cannot be used."""
    shown, path = show_path(str(path)), Path(path)
    try:
        if path.stat().st_size > _LONGEST:
            raise BadFile(f"{shown} is larger than {_LONGEST:,} bytes; a task is a short text file")
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"{shown} cannot be read: {getattr(error, 'strerror', None) or 'it is no UTF-8'}") from None
    items: dict[str, Item] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = item_of(_object(line))
            if item.id in items:
                raise LabError(f"the id {item.id!r} is there twice")
        except LabError as error:
            raise BadFile(f"{shown}, line {number}: {error}") from None
        items[item.id] = item
    if not items:
        raise BadFile(f"{shown} has no items; give one JSON object a line")
    return tuple(items.values())


def item_of(row: Mapping) -> Item:
    """One item of a line's JSON. Raises LabError, saying what is wrong."""
    kind = row.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise LabError(f"kind is {kind!r:.40}; there are {', '.join(_KINDS)}")
    make, needed, optional = _KINDS[kind]
    needed, optional = needed | {"id", "kind"}, optional | {"topic"}
    if wrong := sorted(needed - set(row)):
        raise LabError(f"{wrong[0]!r} is missing")
    if wrong := sorted(set(row) - needed - optional):
        raise LabError(f"{wrong[0]!r:.60} is none of {', '.join(sorted(needed | optional))}")
    if "topic" in row:
        _text(row, "topic")
    told = json.dumps({name: row[name] for name in sorted(row) if name != "topic"}, sort_keys=True, ensure_ascii=False)
    return make(row, id=_text(row, "id"), digest=hashlib.sha256(told.encode("utf-8", "replace")).hexdigest()[:12])


def _object(line: str) -> Mapping:
    def once(pairs):
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name is there twice")
        return dict(pairs)

    try:
        row = json.loads(line, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise LabError(f"it is no JSON ({str(error)[:80]})") from None
    if not isinstance(row, dict):
        raise LabError("it is no JSON object")
    return row


def _choice(row: Mapping, **head) -> Choice:
    choices, answer = _texts(row, "choices", 2), row["answer"]
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise LabError(f"answer is {answer!r:.40}; give the right choice's index, 0 to {len(choices) - 1}")
    return Choice(prompt=_text(row, "prompt"), choices=choices, answer=answer, **head)


def _exact(row: Mapping, **head) -> Exact:
    answers, match, tokens = _texts(row, "answers", 1), row["match"], row.get("tokens", TOKENS)
    if match not in MATCHES:
        raise LabError(f"match is {match!r:.40}; there are {', '.join(MATCHES)}")
    if match == "number" and all(number_of(one) is None for one in answers):
        raise LabError("match is 'number', and none of the answers has one")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 1 <= tokens <= 4096:
        raise LabError(f"tokens is {tokens!r:.40}; give a whole number from 1 to 4096")
    return Exact(prompt=_text(row, "prompt"), answers=answers, match=match, tokens=tokens, **head)


def _call(row: Mapping, **head) -> Call:
    messages, accept, expected = row["messages"], row.get("accept", {}), row["expected"]
    if not isinstance(messages, list) or not messages:
        raise LabError("messages is no list of messages")
    for one in messages:
        if (not isinstance(one, dict) or set(one) != {"role", "content"} or not isinstance(one["content"], str)
                or one["role"] not in ("system", "user", "assistant")):
            raise LabError(f"{str(one)[:60]!r} is no message; give a role (system, user, assistant) and a content")
    if messages[-1]["role"] != "user":
        raise LabError("the last message is not the user's")
    schemas = _schemas(row["tools"])
    if not isinstance(accept, dict) or not all(isinstance(one, list) and one for one in accept.values()):
        raise LabError("accept is no object of lists of other values, by argument")
    name, arguments = None, {}
    if expected is not None:
        if not isinstance(expected, dict) or set(expected) != {"name", "arguments"} or not isinstance(expected["arguments"],
                                                                                                      dict):
            raise LabError("expected is neither null nor an object of name and arguments")
        name, arguments = expected["name"], expected["arguments"]
        if not isinstance(name, str) or name not in schemas:
            raise LabError(f"expected names {name!r:.60}, which is not among the tools")
        for given in (arguments, *(arguments | {at: value} for at, values in accept.items() for value in values)):
            if fault := schemas[name](given):
                raise LabError(f"the expected call does not fit the tool's own schema: {fault}")
    elif accept:
        raise LabError("accept is of a call's arguments, and expected is null")
    return Call(messages=tuple(messages), tools=tuple(row["tools"]), name=name, arguments=arguments,
                accept={at: tuple(values) for at, values in accept.items()}, **head)


def _schemas(tools) -> dict:
    """What checks arguments, by the tool's name."""
    from .calling import checked_tools, validator  # torch from here on

    tools = checked_tools(tools)
    return {one.name: validator(one) for one in tools.tools}


def _text(row: Mapping, name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise LabError(f"{name} is {value!r:.40}; give a text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise LabError(f"{name} holds half a character (a lone surrogate)") from None
    return value


def _texts(row: Mapping, name: str, least: int) -> tuple[str, ...]:
    values = row[name]
    if not isinstance(values, list) or len(values) < least:
        raise LabError(f"{name} is no list of {least} texts or more")
    found = tuple(_text({name: value}, name) for value in values)
    if len(set(found)) < len(found):
        raise LabError(f"{name} holds the same text twice")
    return found


_KINDS = {      # kind: what makes it, what it must have, what it may have
    "choice": (_choice, {"prompt", "choices", "answer"}, set()),
    "exact": (_exact, {"prompt", "answers", "match"}, {"tokens"}),
    "call": (_call, {"messages", "tools", "expected"}, {"accept"})}
