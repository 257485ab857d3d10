"""llama.cpp as the peer for vocabularies: a file's vocabulary alone, its tokens and their bytes."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_engine import llama_cpp


class Live:
    def __init__(self, vocabulary):
        self.vocabulary = vocabulary
        self.count = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def tokens(self, text: str, add: bool, parse: bool) -> list[int]:
        """`add`: what stands before and after a text; `parse`: control tokens inside the text are found."""
        data = text.encode()
        room = 2 * len(data) + 16
        buffer = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.vocabulary, data, len(data), buffer, room, add, parse)
        assert count >= 0, count
        return list(buffer[:count])

    def piece(self, number: int) -> bytes:
        buffer = ctypes.create_string_buffer(1024)
        count = llama_cpp.llama_token_to_piece(self.vocabulary, number, buffer, 1024, 0, True)
        return buffer.raw[:count]

    def ends(self, number: int) -> bool:
        return llama_cpp.llama_vocab_is_eog(self.vocabulary, number)


@contextmanager
def live(path: str | Path) -> Iterator[Live]:
    options = llama_cpp.llama_model_default_params()
    options.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    assert model, path
    try:
        yield Live(llama_cpp.llama_model_get_vocab(model))
    finally:
        llama_cpp.llama_model_free(model)
