"""What a decoder has read, and its KV cache, as a file: a long prompt is paid once.

The file is safetensors: `tokens` int32, for each layer the cells in use, as blocks in llama.cpp's own layout or as plain
numbers, and last `checksum`, the SHA-256 of all bytes before it.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..errors import BadFile, LabError
from ..gguf import GGUFFile
from ..gguf.words import show_path
from ..gguf.writing import write_whole

if TYPE_CHECKING:
    from .decoder import Decoder

FORMAT = "llmlab-memory-1"
_DTYPES = {torch.int32: "I32", torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_KNOWN = {name: dtype for dtype, name in _DTYPES.items()}
_HASH = 32              # bytes of the checksum
_PIECE = 1 << 22        # bytes read at once to check it
_HEADER_LIMIT = 1 << 24
_SAMPLE = 64            # bytes of each tensor that tell a model from another of the same shapes


class _Part(NamedTuple):
    """One tensor of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


# ---- writing ---------------------------------------------------------------------------------------------------------

def save(decoder: "Decoder", path: str | os.PathLike) -> None:
    """See `Decoder.save`."""
    if not decoder.tokens:
        raise LabError("nothing was read yet, so there is nothing to save; read a text first")
    target = _path(path)
    stands, parts = [], [_part(name, torch.tensor(tokens, dtype=torch.int32))
                         for name, tokens in (("tokens", decoder.tokens), ("dropped", decoder.dropped))]
    for number, cache in enumerate(decoder.caches):
        if decoder.kv:
            numbers, tensors = cache.saved()
            stands.append(numbers)
            parts += [_Part(f"{number}.{name}", *rest) for name, *rest in tensors]
        else:
            parts.append(_part(f"{number}.cells", cache[:, :, :len(decoder.tokens)]))
    parts.sort(key=lambda part: -part.dtype.itemsize)       # so that each lies where its type may
    about = _about(decoder) | {"kept": json.dumps(decoder.kept), "long": str(decoder.long), "stands": json.dumps(stands)}
    entries, end = {}, 0
    for name, dtype, shape, size in [*((part.name, part.dtype, part.shape, part.bytes) for part in parts),
                                     ("checksum", torch.uint8, (_HASH,), _HASH)]:
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": about, **entries}).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    write_whole(target, _hashed(header, parts), len(header) + end)


def _part(name: str, tensor: torch.Tensor) -> _Part:
    return _Part(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _hashed(header: bytes, parts: list[_Part]) -> Iterator[bytes | np.ndarray]:
    """The bytes of the file in order, and at the end what they hash to."""
    found = hashlib.sha256(header)
    yield header
    for part in parts:
        data = part.make().contiguous().cpu().view(torch.uint8).numpy().reshape(-1)
        found.update(data)
        if data.size:
            yield data
    yield found.digest()


# ---- reading ---------------------------------------------------------------------------------------------------------

class Saved:
    """A file that `save` wrote, found whole and fit for this decoder; a context, in which it stays open. Raises LabError and
    BadFile as `Decoder.recall` does."""

    def __init__(self, decoder: "Decoder", path: str | os.PathLike):
        self.decoder, target = decoder, _path(path)
        self.shown = show_path(target)
        try:
            self.file = open(target, "rb")
        except OSError as error:
            raise BadFile(f"{self.shown} cannot be read ({error.strerror}); check the path") from None
        try:
            self.about, self.entries, self.start = self._header()
            self._check_whole()
            self._check_fit()
            self.tokens = self.tensor("tokens").tolist()
            if decoder.context is not None and len(self.tokens) > decoder.context:
                raise LabError(f"{self.shown} holds {len(self.tokens):,} tokens and the context {decoder.context:,}; open the "
                               "decoder with more")
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> "Saved":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def restore(self) -> None:
        """Into the decoder, in place of what it has read."""
        decoder, about, stands = self.decoder, self.about, json.loads(self.about["stands"])
        decoder.forget()
        decoder.dropped, decoder.kept = self.tensor("dropped").tolist(), json.loads(about["kept"])
        decoder.long = about["long"] == "True"
        decoder.grow(len(self.tokens))
        for number, cache in enumerate(decoder.caches):
            if decoder.kv:
                cache.restore(stands[number], lambda name, number=number: self.tensor(f"{number}.{name}"))
            else:
                cache[:, :, :len(self.tokens)] = self.tensor(f"{number}.cells").to(cache.device)
        decoder.tokens = self.tokens

    def tensor(self, name: str) -> torch.Tensor:
        entry = self.entries[name]
        begin, end = entry["data_offsets"]
        data, dtype = bytearray(end - begin), _KNOWN[entry["dtype"]]
        self.file.seek(self.start + begin)
        if self.file.readinto(data) != len(data):
            raise BadFile(f"{self.shown} was cut short while it was read; save it again")
        return torch.frombuffer(data, dtype=dtype).view(entry["shape"]) if data else torch.empty(entry["shape"], dtype=dtype)

    def _header(self) -> tuple[dict[str, str], dict[str, dict], int]:
        """What the file says of itself, its tensors, and where their bytes begin."""
        try:
            length, = struct.unpack("<Q", self.file.read(8))
            entries = json.loads(self.file.read(length)) if length < _HEADER_LIMIT else {}
            about = entries.pop("__metadata__")
            if about["format"] != FORMAT:
                raise ValueError
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            raise BadFile(f"{self.shown} is no memory that a decoder saved whole; decoder.save writes one") from None
        return about, entries, 8 + length

    def _check_whole(self) -> None:
        left, found = os.fstat(self.file.fileno()).st_size - _HASH, hashlib.sha256()
        self.file.seek(0)
        while left > 0 and (piece := self.file.read(min(left, _PIECE))):
            found.update(piece)
            left -= len(piece)
        if left or self.file.read() != found.digest():
            raise BadFile(f"{self.shown} is cut short or damaged: its checksum is another; save it again")

    def _check_fit(self) -> None:
        """Whether it is of this model and this kind of cache."""
        for name, value in _about(self.decoder).items():
            if (theirs := self.about[name]) == value:
                continue
            if name == "model":
                raise LabError(f"{self.shown} was read by another model than {show_path(self.decoder.path)}; open that one, or "
                               "read the text again")
            raise LabError(f"{self.shown} has {name}={theirs} and this decoder {name}={value}; open it alike, or read the text "
                           "again")


# ---- whose it is -----------------------------------------------------------------------------------------------------

def _about(decoder: "Decoder") -> dict[str, str]:
    """What must agree between a file and the decoder that takes it."""
    kv = ",".join(decoder.kv) if decoder.kv else f"none ({str(decoder.cache_dtype).removeprefix('torch.')})"
    return {"format": FORMAT, "model": fingerprint(decoder.file), "kv": kv, "sinks": str(decoder.sinks),
            "recent": str(decoder.recent), "rotate": str(decoder.rotate)}


def fingerprint(file: GGUFFile | None) -> str:
    """What tells a model from others, wherever its file lies: SHA-256 of its hyperparameters, its tensors' names, shapes and
    types, and some bytes out of the middle of each."""
    found = hashlib.sha256()
    if file is None:
        return found.hexdigest()
    values = {key: value for key, value in file.metadata.items() if isinstance(value, (int, float, str, bool))}
    found.update(json.dumps(sorted(values.items())).encode())
    for name, tensor in file.tensors.items():
        middle = tensor.bytes // 2
        found.update(f"{name} {tensor.type} {tensor.shape}".encode())
        found.update(file.data(name)[middle:middle + _SAMPLE])
    return found.hexdigest()


def _path(path: str | os.PathLike) -> str:
    try:
        return os.path.realpath(os.path.expanduser(os.fsdecode(path)))
    except (TypeError, ValueError):
        raise LabError(f"{str(path)[:60]!r} is not a path; give the path of a file") from None
