"""From messages to the text that a chat template makes of them: which template, what it may see, where the text ends."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import LabError
from ..gguf.words import show_path

_CONTINUE = "\u2063continued here\u2063"  # marks where the last message ends; invisible separators, so nobody's own text


def chat_texts(words, conversation: Sequence, tools=None, documents=None, chat_template: str | None = None,
               add_generation_prompt: bool = False, continue_final_message: bool | str = False,
               variables: Mapping[str, Any] | None = None) -> list[str]:
    """The texts of a conversation (one), or of several, in the template of `words`, filled in by a bounded process.

    words: a tokenizer with `chat_template`, `special_tokens_map` and `file`, which messages name. chat_template: another
    template, or the name of one of its own. variables: what else the template is to see. Raises LabError where there is no
    template, no message, or no text that can be continued.
    """
    template = template_of(words, chat_template, tools)
    return [_text(words, template, list(messages), tools, documents, add_generation_prompt, continue_final_message,
                  variables or {}) for messages in (conversation if is_batch(conversation) else [conversation])]


def is_batch(conversation: Sequence) -> bool:
    """Whether these are several conversations and not the messages of one."""
    return bool(conversation) and not isinstance(conversation[0], Mapping)


def template_of(words, wanted: str | None, tools) -> str:
    """The template by that name or text; without one the default, or the one for tools where there are tools."""
    named = words.chat_template if isinstance(words.chat_template, dict) else {"default": words.chat_template}
    if wanted is not None:
        return named.get(wanted) or wanted
    found = tools is not None and named.get("tool_use") or named.get("default")
    if not found:
        raise LabError(f"{show_path(words.file)} has no chat template"
                       + (f" but {', '.join(name for name in named if name != 'default')}" if len(named) > 1 else "")
                       + "; give plain text instead of messages, or a chat_template")
    return found


class BoundedTemplates:
    """What makes a transformers tokenizer fill in its chat templates in a bounded process. `file`: where they come from."""

    file: str

    def apply_chat_template(self, conversation, tools=None, documents=None, chat_template=None,
                            add_generation_prompt=False, continue_final_message=False, **options):
        """As transformers' method; the template is filled in by a bounded process. Raises LabError where the file has none."""
        known = inspect.signature(super().apply_chat_template).parameters
        ours = {name: value for name, value in options.items() if name in known}
        variables = {name: value for name, value in options.items() if name not in known}
        texts = chat_texts(self, conversation, tools, documents, chat_template, add_generation_prompt, continue_final_message,
                           variables)
        if ours.get("return_assistant_tokens_mask") or ours.get("sanitize_control_tokens"):
            # These need to know where in the text something came from; the template has just shown that it ends.
            return super().apply_chat_template(conversation, tools, documents, template_of(self, chat_template, tools),
                                               add_generation_prompt, continue_final_message, **options)
        done = [[{"role": "user", "content": text}] for text in texts]
        return super().apply_chat_template(done if is_batch(conversation) else done[0],
                                           chat_template="{{ messages[0]['content'] }}", **ours)


def bounded(tokenizer, file: str):
    """The same transformers tokenizer, of a class of the same name whose chat templates can do no harm."""
    kind = type(tokenizer)
    shown = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    tokenizer.__class__ = type(kind.__name__, (BoundedTemplates, kind), shown)
    tokenizer.file = file
    return tokenizer


def _text(words, template, messages, tools, documents, prompt, go_on, variables) -> str:
    from .templates import render

    if not messages:
        raise LabError("the conversation is empty; give at least one message")
    if go_on and prompt:
        raise LabError("give either continue_final_message or add_generation_prompt, not both")
    messages = [{key: value for key, value in _plain(message).items() if value is not None} for message in messages]
    if go_on:
        _mark_end(messages[-1], go_on if isinstance(go_on, str) else "content")
    values = {name: str(token) for name, token in words.special_tokens_map.items() if isinstance(token, str)}
    values |= _plain(variables) | {"messages": messages, "tools": _plain(tools and list(map(_schema, tools))) or None,
                                   "documents": _plain(documents), "add_generation_prompt": prompt}
    text = render(template, values, words.file)
    if not go_on:
        return text
    at = text.rfind(_CONTINUE)
    if at < 0:
        raise LabError(f"{show_path(words.file)}: its chat template does not show the last message; it cannot be continued")
    return text[:at]


def _schema(tool) -> Mapping:
    """A tool as JSON schema; a Python function is described by transformers, which knows how."""
    if isinstance(tool, Mapping):
        return tool
    from transformers.utils import get_json_schema

    return get_json_schema(tool)


def _mark_end(message: dict, key: str) -> None:
    content = message.get(key)
    if isinstance(content, list):
        texts = [part for part in content if isinstance(part, dict) and "text" in part]
        if texts:
            texts[-1]["text"] += _CONTINUE
            return
    if not isinstance(content, str):
        raise LabError(f"the last message has no text under {key!r} that could be continued")
    message[key] = content + _CONTINUE


def _plain(value: Any) -> Any:
    """What a template may see of a value: JSON's kinds, and of anything else its type's name."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"
