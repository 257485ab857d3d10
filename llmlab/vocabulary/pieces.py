"""What tokens stand for: the exact bytes of each, and the text of several."""

import re
from collections.abc import Callable, Iterable

from .building import SPACE, adds_space
from .reading import BYTE, CONTROL, NORMAL, UNKNOWN, USER, Vocabulary

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class Pieces:
    """The tokens of a vocabulary as bytes and text."""

    def __init__(self, vocabulary: Vocabulary):
        self._texts, self._kinds = vocabulary.tokens, vocabulary.kinds.tolist()
        self._letters = None if _raw(vocabulary) else _bytes_of_letters()
        self._space, self._known = adds_space(vocabulary), {}

    def __len__(self) -> int:
        return len(self._texts)

    def piece(self, number: int) -> bytes:
        """The bytes a token stands for; of a special one its name, of one beyond the vocabulary nothing. It may be part of a
        character, so join before decoding."""
        found = self._known.get(number)
        if found is None:
            found = self._known[number] = self._spelled(number)
        return found

    def is_special(self, number: int) -> bool:
        """Whether a token is no part of a text: of beginnings, ends, roles."""
        return 0 <= number < len(self._kinds) and self._kinds[number] in (CONTROL, UNKNOWN)

    def text(self, numbers: Iterable[int], piece: Callable[[int], bytes] | None = None) -> str:
        """The text of tokens, without the space that encoding put before it; U+FFFD for bytes that are no text. `piece`:
        spells them in place of ours, where there are more than the vocabulary has."""
        numbers = list(numbers)
        data = b"".join(map(piece or self.piece, numbers))
        if self._space and numbers and not self.is_special(numbers[0]):
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def _spelled(self, number: int) -> bytes:
        if not 0 <= number < len(self._texts):  # a model may have more rows than its vocabulary has tokens
            return b""
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


def _raw(vocabulary: Vocabulary) -> bool:
    """Whether tokens are written as they are, with ▁ for a space, and not in letters that each stand for a byte."""
    return vocabulary.model != "gpt2" or vocabulary.pre in ("gemma4", "granite-embed-multi-311m", "sarvam-moe")


def _bytes_of_letters() -> dict[str, bytes]:
    """The letters that GPT-2's byte-level vocabularies write bytes with: printable ones as themselves, others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return ({chr(byte): bytes([byte]) for byte in printable}
            | {chr(0x100 + place): bytes([byte]) for place, byte in enumerate(others)})
