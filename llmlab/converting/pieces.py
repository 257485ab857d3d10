"""The pieces of a tokenizer.model: SentencePiece's protocol buffer read as far as a vocabulary needs it.

Fields by their numbers in sentencepiece_model.proto: ModelProto has pieces (1) and trainer_spec (2); a piece has its text (1),
score (2) and type (3); the trainer's model_type (3) is 1 for unigram, 2 for BPE.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import BadFile, LabError
from ..gguf.words import show_path

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_MOST = 64 * 2**20      # bytes; Gemma's has 4 MB
_BPE = 2


class Piece(NamedTuple):
    """One entry of a vocabulary; `kind` as tokenizer.ggml.token_type has it."""

    text: str
    score: float
    kind: int


def read_pieces(path: Path) -> list[Piece]:
    """All pieces in order. Raises BadFile for a damaged file, LabError for one that is not joined pair by pair."""
    try:
        data = path.read_bytes() if path.stat().st_size <= _MOST else b""
        found, trained = [], 1
        for number, value in _fields(data):
            if number == 1:
                found.append(_piece(value))
            elif number == 2:
                trained = dict(_fields(value)).get(3, 1)
    except (OSError, ValueError, IndexError, TypeError, struct.error) as error:
        raise BadFile(f"{show_path(str(path))} is no SentencePiece model or is cut short ({error}); download it "
                      "again") from None
    if not found:
        raise BadFile(f"{show_path(str(path))} holds no pieces; download it again")
    if trained != _BPE:
        raise LabError(f"{show_path(str(path))} is a unigram vocabulary, which no model that llmlab converts has; convert it "
                       "with llama.cpp's convert_hf_to_gguf.py and give the GGUF")
    return found


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
    kind = fields.get(3, NORMAL)
    # What a model's makers defined is a piece like others here: which of them are special the tokenizer's settings say.
    return Piece(fields.get(1, b"").decode(), score, NORMAL if kind == USER else kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a message: integers as they are, everything else as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(data):
            raise ValueError("a field is longer than the file")
        yield number, data[at:at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number without end")
