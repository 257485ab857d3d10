"""The tokenizer a file's vocabulary makes: transformers' own class, with exact bytes for every token and bounded templates."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import transformers

from ..errors import LabError
from ..gguf import GGUFFile
from ..gguf.words import show_path
from .building import SPACE, adds_bos, adds_space, build
from .reading import BYTE, CONTROL, NORMAL, UNKNOWN, USER, Vocabulary, read_vocabulary

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_CONTINUE = "\u2063continued here\u2063"  # marks where the last message ends; invisible separators, so nobody's own text


def tokenizer_of(gguf: GGUFFile) -> "PreTrainedTokenizerFast":
    """A transformers tokenizer from a GGUF file's own vocabulary, token for token as llama.cpp's; chat templates included.

    `.stop_ids`: tokens that end a turn. `.piece(id)`: a token's bytes. `.notes`: what a reader should know, a line each.
    Raises BadFile or LabError, in one line that names file and key, for a vocabulary that is missing, damaged or unknown.
    """
    return PreTrainedTokenizerFast(read_vocabulary(gguf))


def stop_tokens(gguf: GGUFFile) -> tuple[int, ...]:
    """Ids of the tokens that end a turn: the file's eos, eot and eom, and those whose text is known to (llama.cpp's rule)."""
    return read_vocabulary(gguf).stops


class _Kept:
    """A tokenizer that transformers keeps without copying it (it copies by way of JSON: seconds for a long vocabulary)."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __deepcopy__(self, memo):
        return self.tokenizer


class BoundedTemplates:
    """What makes a transformers tokenizer fill in its chat templates in a bounded process. `file`: where they come from."""

    file: str

    def apply_chat_template(self, conversation, tools=None, documents=None, chat_template=None,
                            add_generation_prompt=False, continue_final_message=False, **options):
        """As transformers' method; the template is filled in by a bounded process. Raises LabError where the file has none."""
        known = inspect.signature(super().apply_chat_template).parameters
        ours = {name: value for name, value in options.items() if name in known}
        variables = {name: value for name, value in options.items() if name not in known}
        chat_template = self._template(chat_template, tools)
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        texts = [self._render(chat_template, list(messages), tools, documents, add_generation_prompt, continue_final_message,
                              variables) for messages in (conversation if batched else [conversation])]
        if ours.get("return_assistant_tokens_mask") or ours.get("sanitize_control_tokens"):
            # These need to know where in the text something came from; the template has just shown that it ends.
            return super().apply_chat_template(conversation, tools, documents, chat_template, add_generation_prompt,
                                               continue_final_message, **options)
        done = [[{"role": "user", "content": text}] for text in texts]
        return super().apply_chat_template(done if batched else done[0], chat_template="{{ messages[0]['content'] }}", **ours)

    def _template(self, wanted: str | None, tools) -> str:
        """The template by that name or text; without one the default, or the one for tools where there are tools."""
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        if wanted is not None:
            return named.get(wanted) or wanted
        found = tools is not None and named.get("tool_use") or named.get("default")
        if not found:
            raise LabError(f"{show_path(self.file)} has no chat template"
                           + (f" but {', '.join(name for name in named if name != 'default')}" if len(named) > 1 else "")
                           + "; give plain text instead of messages, or a chat_template")
        return found

    def _render(self, template, messages, tools, documents, prompt, go_on, variables) -> str:
        from .templates import render

        if not messages:
            raise LabError("the conversation is empty; give at least one message")
        if go_on and prompt:
            raise LabError("give either continue_final_message or add_generation_prompt, not both")
        messages = [{key: value for key, value in _plain(message).items() if value is not None} for message in messages]
        if go_on:
            _mark_end(messages[-1], go_on if isinstance(go_on, str) else "content")
        schemas = tools and [tool if isinstance(tool, Mapping) else transformers.utils.get_json_schema(tool) for tool in tools]
        values = {name: str(token) for name, token in self.special_tokens_map.items() if isinstance(token, str)}
        values |= _plain(variables) | {"messages": messages, "tools": _plain(schemas) or None, "documents": _plain(documents),
                                       "add_generation_prompt": prompt}
        text = render(template, values, self.file)
        if not go_on:
            return text
        at = text.rfind(_CONTINUE)
        if at < 0:
            raise LabError(f"{show_path(self.file)}: its chat template does not show the last message; it cannot be continued")
        return text[:at]


def bounded(tokenizer, file: str):
    """The same tokenizer, of a class of the same name whose chat templates can do no harm."""
    kind = type(tokenizer)
    shown = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    tokenizer.__class__ = type(kind.__name__, (BoundedTemplates, kind), shown)
    tokenizer.file = file
    return tokenizer


class PreTrainedTokenizerFast(BoundedTemplates, transformers.PreTrainedTokenizerFast):
    """transformers' class under its own name, so that a folder it saves itself to can be loaded by any transformers."""

    def __init__(self, vocabulary: Vocabulary):
        tokenizer, notes = build(vocabulary)
        options = {"model_max_length": vocabulary.context} if vocabulary.context else {}
        super().__init__(tokenizer_object=_Kept(tokenizer), clean_up_tokenization_spaces=False, **options)
        self.notes, self.stop_ids, self.file = notes, vocabulary.stops, vocabulary.file
        self._texts, self._kinds = vocabulary.tokens, vocabulary.kinds.tolist()
        self._letters = None if _raw(vocabulary) else _bytes_of_letters()
        self._space, self._pieces = adds_space(vocabulary), {}
        # Set afterwards: given to __init__, an ordinary token would become a special one that no text may hold.
        for name in ("bos", "eos", "unk", "sep", "pad", "mask"):
            if name in vocabulary.ids:
                setattr(self, f"{name}_token", vocabulary.tokens[vocabulary.ids[name]])
        self._add_bos_token, self._add_eos_token = adds_bos(vocabulary), vocabulary.flags.get("add_eos_token", False)
        if vocabulary.templates:
            names = vocabulary.templates
            self.chat_template = names["default"] if list(names) == ["default"] else names

    def piece(self, number: int) -> bytes:
        """The bytes a token stands for; of a special one its name. It may be part of a character, so join before decoding."""
        found = self._pieces.get(number)
        if found is None:
            found = self._pieces[number] = self._spelled(number)
        return found

    def _spelled(self, number: int) -> bytes:
        if not 0 <= number < len(self._texts):  # a model may have more rows than its vocabulary has tokens
            return self.added_tokens_decoder[number].content.encode() if number in self.added_tokens_decoder else b""
        text, kind = self._texts[number], self._kinds[number]
        if kind in (CONTROL, UNKNOWN, USER):
            return text.encode()
        if kind == BYTE:
            return bytes.fromhex(text[3:5]) if _BYTE.fullmatch(text) else text.encode()
        if kind != NORMAL:
            return b""
        if self._letters is None:
            return text.replace(SPACE, " ").encode()
        return b"".join(self._letters.get(letter) or letter.encode() for letter in text)

    def is_special(self, number: int) -> bool:
        """Whether a token is no part of a text: of beginnings, ends, roles."""
        known = 0 <= number < len(self._kinds)
        return self._kinds[number] in (CONTROL, UNKNOWN) if known else number in self.all_special_ids

    def _decode(self, token_ids, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None,
                **ignored: Any) -> str:
        ids = token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids
        ids = [ids] if isinstance(ids, int) else [int(number) for number in ids]
        if skip_special_tokens:
            ids = [number for number in ids if not self.is_special(number)]
        data = b"".join(map(self.piece, ids))
        if self._space and ids and not self.is_special(ids[0]):
            data = data.removeprefix(b" ")  # the one that encoding put before the text
        text = data.decode(errors="replace")
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text


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


def _raw(vocabulary: Vocabulary) -> bool:
    """Whether tokens are written as they are, with ▁ for a space, and not in letters that each stand for a byte."""
    return vocabulary.model != "gpt2" or vocabulary.pre in ("gemma4", "granite-embed-multi-311m", "sarvam-moe")


def _bytes_of_letters() -> dict[str, bytes]:
    """The letters that GPT-2's byte-level vocabularies write bytes with: printable ones as themselves, others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return ({chr(byte): bytes([byte]) for byte in printable}
            | {chr(0x100 + place): bytes([byte]) for place, byte in enumerate(others)})
