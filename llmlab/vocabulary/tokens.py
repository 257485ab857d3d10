"""A file's vocabulary as transformers' own class: the same words, exact bytes for every token and bounded templates."""

from collections.abc import Mapping
from typing import Any

import transformers

from .chats import BoundedTemplates
from .words import Words


class _Kept:
    """A tokenizer that transformers keeps without copying it (it copies by way of JSON: seconds for a long vocabulary)."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __deepcopy__(self, memo):
        return self.tokenizer


class PreTrainedTokenizerFast(BoundedTemplates, transformers.PreTrainedTokenizerFast):
    """transformers' class under its own name, so that a folder it saves itself to can be loaded by any transformers."""

    def __init__(self, words: Words):
        options = {"model_max_length": words.model_max_length} if words.model_max_length else {}
        super().__init__(tokenizer_object=_Kept(words.tokenizer), clean_up_tokenization_spaces=False, **options)
        self.notes, self.stop_ids, self.file, self._pieces = words.notes, words.stop_ids, words.file, words.pieces
        # Set afterwards: given to __init__, an ordinary token would become a special one that no text may hold.
        for name, text in words.special_tokens_map.items():
            setattr(self, name, text)
        self._add_bos_token, self._add_eos_token = words.adds_bos, words.adds_eos
        if words.chat_template is not None:
            self.chat_template = words.chat_template

    def piece(self, number: int) -> bytes:
        """The bytes a token stands for; of a special one its name. It may be part of a character, so join before decoding."""
        if number >= len(self._pieces) and (added := self.added_tokens_decoder.get(number)):
            return added.content.encode()
        return self._pieces.piece(number)

    def is_special(self, number: int) -> bool:
        """Whether a token is no part of a text: of beginnings, ends, roles."""
        return self._pieces.is_special(number) if number < len(self._pieces) else number in self.all_special_ids

    def _decode(self, token_ids, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None,
                **ignored: Any) -> str:
        ids = token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids
        ids = [ids] if isinstance(ids, int) else [int(number) for number in ids]
        if skip_special_tokens:
            ids = [number for number in ids if not self.is_special(number)]
        text = self._pieces.text(ids, self.piece)
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text
