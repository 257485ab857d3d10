"""Text to tokens and back by a file's own vocabulary: all that generating needs, in a tenth of a second."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..gguf import GGUFFile
from .building import adds_bos, build
from .chats import chat_texts, is_batch
from .pieces import Pieces
from .reading import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from .tokens import PreTrainedTokenizerFast

NAMED = ("bos", "eos", "unk", "sep", "pad", "mask")     # special tokens that templates and others ask for by name


def words_of(gguf: GGUFFile) -> "Words":
    """A tokenizer from a GGUF file's own vocabulary, token for token as llama.cpp's; it needs no transformers.

    Raises BadFile or LabError, in one line that names file and key, for a vocabulary that is missing, damaged or unknown.
    """
    return Words(read_vocabulary(gguf))


def tokenizer_of(gguf: GGUFFile) -> "PreTrainedTokenizerFast":
    """The same as a transformers tokenizer, which can do all that others can.

    `.stop_ids`: tokens that end a turn. `.piece(id)`: a token's bytes. `.notes`: what a reader should know, a line each.
    Raises as `words_of` does.
    """
    from .tokens import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(words_of(gguf))


def stop_tokens(gguf: GGUFFile) -> tuple[int, ...]:
    """Ids of the tokens that end a turn: the file's eos, eot and eom, and those whose text is known to (llama.cpp's rule)."""
    return read_vocabulary(gguf).stops


class Encoded(dict):
    """{"input_ids": ids}, as transformers' tokenizers answer; `.input_ids` is the same."""

    @property
    def input_ids(self) -> list:
        return self["input_ids"]


class Words:
    """A vocabulary with the names that a transformers tokenizer has for the same things.

    `stop_ids`: tokens that end a turn. `notes`: what a reader should know, a line each. `chat_template`: the file's, a dict
    by name where it has several, None where it has none. `special_tokens_map`: {"eos_token": "<|im_end|>", ...};
    `eos_token`, `eos_token_id` and so on are None where the file names none. `model_max_length`: tokens of context, or None.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.tokenizer, self.notes = build(vocabulary)
        self.pieces, self.file, self.stop_ids = Pieces(vocabulary), vocabulary.file, vocabulary.stops
        self.model_max_length = vocabulary.context
        self.adds_bos, self.adds_eos = adds_bos(vocabulary), vocabulary.flags.get("add_eos_token", False)
        names = vocabulary.templates
        self.chat_template = names.get("default") if set(names) <= {"default"} else names
        ids = {name: vocabulary.ids.get(name) for name in NAMED}
        texts = {name: None if number is None else vocabulary.tokens[number] for name, number in ids.items()}
        self.special_tokens_map = {f"{name}_token": text for name, text in texts.items() if text is not None}
        self.bos_token_id, self.eos_token_id = ids["bos"], ids["eos"]
        self.bos_token, self.eos_token = texts["bos"], texts["eos"]

    def __len__(self) -> int:
        return len(self.pieces)

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True, split_special_tokens: bool = False,
                 verbose: bool = True) -> Encoded:
        """{"input_ids": tokens} of a text, or of several. add_special_tokens: what the vocabulary puts before and after every
        text. split_special_tokens: nothing in the text is taken for a special token. verbose: there is nothing to tell."""
        self.tokenizer.encode_special_tokens = split_special_tokens
        found = self.tokenizer.encode_batch([text] if isinstance(text, str) else list(text),
                                            add_special_tokens=add_special_tokens)
        ids = [one.ids for one in found]
        return Encoded(input_ids=ids[0] if isinstance(text, str) else ids)

    def decode(self, tokens: int | Iterable[int], skip_special_tokens: bool = False,
               clean_up_tokenization_spaces: bool = False) -> str:
        """The text of tokens, to the byte; nothing is ever cleaned up."""
        ids = map(int, tokens if isinstance(tokens, Iterable) else [tokens])
        return self.pieces.text(number for number in ids if not (skip_special_tokens and self.is_special(number)))

    def piece(self, number: int) -> bytes:
        """The bytes a token stands for; of a special one its name. It may be part of a character, so join before decoding."""
        return self.pieces.piece(number)

    def is_special(self, number: int) -> bool:
        """Whether a token is no part of a text: of beginnings, ends, roles."""
        return self.pieces.is_special(number)

    def get_added_vocab(self) -> dict[str, int]:
        """Tokens that are found in a text before it is cut into words: special ones and user-defined ones."""
        return {token.content: number for number, token in sorted(self.tokenizer.get_added_tokens_decoder().items())}

    def apply_chat_template(self, conversation: Sequence[Mapping], tools=None, documents=None, chat_template: str | None = None,
                            add_generation_prompt: bool = False, continue_final_message: bool | str = False,
                            tokenize: bool = True, **variables: Any) -> "str | list[str] | Encoded":
        """The text of messages ({"role", "content"}), or with `tokenize` its tokens; several conversations give several.
        The template is filled in by a bounded process. Raises LabError where the file has none."""
        texts = chat_texts(self, conversation, tools, documents, chat_template, add_generation_prompt, continue_final_message,
                           variables)
        found = texts if is_batch(conversation) else texts[0]
        return self(found, add_special_tokens=False) if tokenize else found
