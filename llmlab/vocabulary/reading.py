"""What a GGUF file says of its vocabulary (`tokenizer.*`), checked: every token, its kind, scores, merges, special ids."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import BadFile
from ..gguf import Array, GGUFFile
from ..gguf.words import show, show_path

# Kinds of tokens as tokenizer.ggml.token_type has them (llama.cpp's llama_token_type).
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PREFIX = "tokenizer.ggml."

# Special token -> its keys, the second of two being an older name.
_IDS = {"bos": ("bos_token_id", "cls_token_id"), "eos": ("eos_token_id",), "eot": ("eot_token_id",), "eom": ("eom_token_id",),
        "unk": ("unknown_token_id",), "sep": ("seperator_token_id",), "pad": ("padding_token_id",), "mask": ("mask_token_id",),
        "fim_pre": ("fim_pre_token_id", "prefix_token_id"), "fim_suf": ("fim_suf_token_id", "suffix_token_id"),
        "fim_mid": ("fim_mid_token_id", "middle_token_id"), "fim_pad": ("fim_pad_token_id",),
        "fim_rep": ("fim_rep_token_id",), "fim_sep": ("fim_sep_token_id",)}
_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "bert": {"bos": 101, "unk": 100, "sep": 102, "pad": 0, "mask": 103},
                "t5": {"eos": 1, "unk": 2, "pad": 0}}
_MOST_TOKENS = 4_000_000  # sixteen times the largest published vocabulary


@dataclass(frozen=True)
class Vocabulary:
    """A file's vocabulary. `kinds` int32 [tokens], `scores` float32 [tokens] or None, `merges` pairs in order of rank, `ids` of
    special tokens by name (bos, eos, ...), `stops`: ids that end a turn, `templates`: chat templates by name."""

    file: str
    architecture: str
    name: str
    model: str
    pre: str
    tokens: list[str]
    index: dict[str, int] = field(repr=False)
    kinds: np.ndarray = field(repr=False)
    scores: np.ndarray | None = field(repr=False)
    merges: list[tuple[str, str]] | None = field(repr=False)
    ids: dict[str, int]
    stops: tuple[int, ...]
    flags: dict[str, bool]
    templates: dict[str, str] = field(repr=False)
    charsmap: bytes | None = field(repr=False)
    context: int | None

    def fail(self, key: str, problem: str) -> BadFile:
        return bad(self.file, key, problem)


def bad(file: str, key: str, problem: str) -> BadFile:
    return BadFile(f"{show_path(file)}: {key} {problem}; download the file again or convert the model again")


def read_vocabulary(gguf: GGUFFile) -> Vocabulary:
    """The vocabulary of a file. Raises BadFile, in one line that names file and key, for whatever cannot be used."""
    reader = _Reader(gguf.paths[0], gguf.metadata)
    model = reader.value("model", str, None)
    if not model:
        raise BadFile(f"{show_path(reader.file)} has no tokenizer.ggml.model, so it holds no vocabulary; "
                      "give the model's own file, or convert the model again")
    tokens = reader.strings("tokens")
    if tokens is None:
        raise bad(reader.file, PREFIX + "tokens", "is missing")
    tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
    index = {token: number for number, token in enumerate(tokens)}
    if len(index) != len(tokens):
        second = next(number for number, token in enumerate(tokens) if index[token] != number)
        raise bad(reader.file, PREFIX + "tokens", f"has {show(tokens[second])} twice, as {second} and {index[tokens[second]]}")
    kinds = reader.numbers("token_type", ("int32", "uint32"), len(tokens))
    kinds = np.full(len(tokens), NORMAL, np.int32) if kinds is None else kinds.astype(np.int32)
    scores = reader.numbers("scores", ("float32", "int32"), len(tokens))
    if scores is not None:
        scores = scores.astype(np.float32)
        if not np.isfinite(scores).all():
            raise bad(reader.file, PREFIX + "scores", f"has {scores[~np.isfinite(scores)][0]} for a token")
    ids = {name: number for name, number in _DEFAULT_IDS.get(model, {}).items() if number < len(tokens)}
    ids |= {name: number for name in _IDS if (number := reader.token_id(_IDS[name], len(tokens))) is not None}
    stops = _mark_special(tokens, index, kinds, ids)
    flags = {name: reader.value(name, bool, None)
             for name in ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces")}
    architecture = gguf.metadata.get("general.architecture", "")
    context = gguf.metadata.get(f"{architecture}.context_length")
    name = str(gguf.metadata.get("general.name", ""))
    return Vocabulary(reader.file, architecture, name, model, reader.value("pre", str, ""), tokens, index,
                      kinds, scores, reader.merges(), ids, stops,
                      {name: flag for name, flag in flags.items() if flag is not None}, _templates(reader),
                      reader.charsmap(), context if type(context) is int and context > 0 else None)


class _Reader:
    """Values of one file's metadata, held to their types."""

    def __init__(self, file: str, metadata: Mapping[str, Any]):
        self.file, self.metadata = file, metadata

    def value(self, key: str, kind: type, default: Any) -> Any:
        value = self.metadata.get(PREFIX + key, default)
        if value is not default and type(value) is not kind:
            raise bad(self.file, PREFIX + key, f"is {show(repr(value))}, not a {kind.__name__}")
        return value

    def token_id(self, keys: tuple[str, ...], count: int) -> int | None:
        for key in keys:
            number = self.metadata.get(PREFIX + key)
            if number is None:
                continue
            if type(number) is not int or not 0 <= number < count:
                raise bad(self.file, PREFIX + key, f"is {show(repr(number))}, and there are tokens 0 to {count - 1}")
            return number
        return None

    def strings(self, key: str) -> list[str] | None:
        """An array of strings; read in one pass over its bytes, a quarter of the time that walking takes."""
        array = self._array(key, ("string",))
        if array is None or not isinstance(array, Array):
            return None if array is None else list(array)
        if array.count > _MOST_TOKENS:
            raise bad(self.file, PREFIX + key, f"has {array.count} items, more than any model")
        data, unpack, found, here = b"".join(array.raw()), struct.Struct("<Q").unpack_from, [], 0
        try:
            for _ in range(array.count):
                start = here + 8
                here = start + unpack(data, here)[0]
                found.append(data[start:here].decode())
        except UnicodeDecodeError:
            raise bad(self.file, PREFIX + key,
                      f"has item {len(found)}, {data[start:here][:20]!r}, which is not UTF-8") from None
        return found

    def numbers(self, key: str, types: tuple[str, ...], count: int) -> np.ndarray | None:
        """An array of one number a token."""
        array = self._array(key, types)
        if array is None:
            return None
        if len(array) != count:
            raise bad(self.file, PREFIX + key, f"has {len(array)} items for {count} tokens")
        if isinstance(array, Array):
            return np.frombuffer(b"".join(array.raw()), np.dtype(array.type).newbyteorder("<"))
        return np.array(array)

    def merges(self) -> list[tuple[str, str]] | None:
        lines = self.strings("merges")
        if lines is None:
            return None
        lines = list(dict.fromkeys(lines))  # of two equal ones the first counts
        cuts = [line.find(" ", 1) for line in lines]
        for number, (line, cut) in enumerate(zip(lines, cuts, strict=True)):
            if not 0 < cut < len(line) - 1:
                raise bad(self.file, PREFIX + "merges", f"has item {number}, {show(line)}, which is not two pieces and a space")
        return [(line[:cut], line[cut + 1:]) for line, cut in zip(lines, cuts, strict=True)]

    def charsmap(self) -> bytes | None:
        """Normalizing rules in SentencePiece's compiled form."""
        array = self._array("precompiled_charsmap", ("uint8", "int8"))
        if array is None:
            return None
        data = b"".join(array.raw()) if isinstance(array, Array) else bytes(number & 255 for number in array)
        if data and (len(data) < 4 or int.from_bytes(data[:4], "little") + 4 >= len(data)):
            raise bad(self.file, PREFIX + "precompiled_charsmap", "ends before its table does")
        return data

    def _array(self, key: str, types: tuple[str, ...]) -> Array | tuple | None:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            return None
        if isinstance(value, Array):
            right = value.type in types
        else:  # a short one is held as a tuple, its stored type gone: what it holds tells
            item = {"string": str}.get(types[0], (int, float))
            right = isinstance(value, tuple) and all(isinstance(one, item) and not isinstance(one, bool) for one in value)
        if not right:
            raise bad(self.file, PREFIX + key, f"is not an array of {' or '.join(types)}")
        return value


def _templates(reader: _Reader) -> dict[str, str]:
    """Chat templates by name; the one without a name is "default"."""
    found = {}
    for key, value in reader.metadata.items():
        name = key.removeprefix("tokenizer.chat_template")
        if name == key or name and not name.startswith("."):
            continue
        if not isinstance(value, str):
            raise bad(reader.file, key, "is not a string")
        if value.strip():
            found[name[1:] or "default"] = value
    return found


# llama.cpp finds these tokens by their text where a file does not name them, and takes them for control tokens whatever the
# file says (llama-vocab.cpp, "auto-detect special tokens by text").
_TURN_ENDS = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
              "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
              "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["}
_BY_TEXT = {
    "fim_pre": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
                "<|prefix|>"),
    "fim_suf": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
                "<|suffix|>"),
    "fim_mid": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
                "<|middle|>"),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",)}
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # gpt-oss: part of what the model says


def _mark_special(tokens: list[str], index: dict[str, int], kinds: np.ndarray, ids: dict[str, int]) -> tuple[int, ...]:
    """Corrects `kinds` and `ids` as llama.cpp does; the ids of tokens at which to stop."""
    for name, texts in _BY_TEXT.items():
        if name not in ids:
            found = [index[text] for text in texts if text in index]
            if found:
                ids[name] = found[0]
                kinds[found[0]] = CONTROL
    stops = {ids[name] for name in ("fim_pad", "fim_rep", "fim_sep") if name in ids}
    by_text = {index[text] for text in _TURN_ENDS if text in index}
    kinds[list(by_text)] = CONTROL
    for text in _ALWAYS_SHOWN:
        if text in index:
            kinds[index[text]] = USER
    stops |= by_text | {ids[name] for name in ("eos", "eot", "eom") if name in ids}
    said = {tokens[number] for number in stops}
    if "<|end|>" in said and ({"<|return|>", "<|call|>"} <= said or "<|flush|>" in said and said & {"<|call|>", "<|calls|>"}
                              or {"<|return|>", "<|calls|>"} <= said):
        stops.discard(index["<|end|>"])  # it ends a part of an answer there, not the turn
        kinds[index["<|end|>"]] = USER
    if "</s>" in said and said & {"<|tool_response>", "<|plamo:eos|>"}:
        stops.discard(index["</s>"])
        kinds[index["</s>"]] = NORMAL
    return tuple(sorted(stops))
