"""A reference model's log-probabilities kept in a file, so that many models can be held against one that was run once.

The file is safetensors: `tokens` int32, and for every scored position either `log_probs` float32, or the 16-bit codes
llama-perplexity keeps (`codes`, with `floor` and `scale` a position: log p = floor + scale * code). Also read: the files that
`llama-perplexity --kl-divergence-base` writes (layout: tools/perplexity/perplexity.cpp in llama.cpp).
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import numpy as np
import torch

from ..errors import BadFile, LabError
from ..units import format_bytes
from . import passes
from .corpus import CONTEXT, Tokens, as_tokens, scored

SPAN = 16  # nats below the best token that 16 bits cover
MAGIC = b"_logits_"
FORMAT = "llmlab-reference-1"


@dataclass(frozen=True, eq=False)
class Reference:
    """Saved log-probabilities: of which model, on which tokens, how cut. `read_reference` and `save_reference` make them."""

    path: Path
    model: str
    tokens: Tokens = field(repr=False)
    context: int
    chunks: int
    vocabulary: int
    precision: str  # "16-bit" | "float32"
    _data: Callable = field(repr=False)  # chunk index -> (codes or log_probs, floor, scale)

    @property
    def least(self) -> float:
        """The log-probability below which llama-perplexity leaves a token out of the divergence: 16 bits do not reach it."""
        return -inf if self.precision == "float32" else -float(SPAN)

    def rows(self, index: int, held: passes.Held, spare: passes.Held) -> Iterator[torch.Tensor]:
        """Log-probabilities at the scored positions of a chunk, in pieces float64 [rows, vocabulary] that lie in `held`; as
        many rows each as `passes.logits` gives."""
        values, floor, scale = self._data(index)
        step = passes.rows_at_once(self.vocabulary)
        for start in range(0, len(values), step):
            part = slice(start, start + step)
            rows = held(len(values[part]), self.vocabulary, torch.device("cpu"))
            rows.numpy()[:] = values[part]
            if self.precision == "float32":
                # Each rounded to float32, they do not sum up to 1; made to, so that a model's divergence from itself is 0.
                yield passes.log_probabilities(rows, spare)
            else:
                yield rows.mul_(torch.from_numpy(scale[part, None])).add_(torch.from_numpy(floor[part, None]))


def save_reference(model: Callable, tokens: Tokens | Sequence[int], path: str | os.PathLike, context: int = CONTEXT, *,
                   chunks: int | None = None, precision: str = "16-bit", name: str | None = None,
                   progress: bool = True) -> Reference:
    """Runs a model over a text and keeps its log-probabilities, context/2 - 1 rows of `vocabulary` numbers a chunk (2 or 4
    bytes each: a text of 100 kB takes 1.2 GB at a vocabulary of 49,152). The file appears whole or not at all.

    `tokens` is `quality.tokens_of`'s answer or ids; `precision` is "16-bit" (llama-perplexity's own, within 1.3e-4 nats) or
    "float32". Raises LabError: text too short, no room on the disk, a folder that is not there.
    """
    from tqdm.auto import tqdm

    if precision not in ("16-bit", "float32"):
        raise LabError(f'precision is "16-bit" or "float32", not {precision!r}')
    path, tokens = Path(path), as_tokens(tokens)
    count, part = tokens.count(context, chunks), path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            with passes.evaluated(model), tqdm(total=count, desc="reference", unit="chunk", disable=not progress) as bar:
                sides, held, spare = [], passes.Held(), passes.Held()
                for index in range(count):
                    for rows in passes.logits(model, tokens.chunk(index, context), f"chunk {index + 1}", held):
                        if not file.tell():
                            vocabulary = rows.shape[-1]
                            file.write(_header(tokens, context, count, vocabulary, precision, name or passes.name_of(model)))
                            _room(path, count * (scored(context).stop - scored(context).start) * vocabulary, precision)
                            file.write(tokens.ids[:count * context].astype("<i4").tobytes())
                        values, *side = _encoded(passes.log_probabilities(rows, spare), precision)
                        file.write(values.tobytes())
                        sides.append(side)
                    bar.update()
            for column in zip(*sides, strict=True):
                file.write(np.concatenate(column).tobytes())
        os.replace(part, path)
    except OSError as error:
        raise LabError(f"cannot write the reference {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return read_reference(path)


def read_reference(path: str | os.PathLike, bos: int | None = None) -> Reference:
    """Opens a reference that `save_reference` or `llama-perplexity --kl-divergence-base` wrote; nothing but its header is
    read yet. `bos`: for the latter, which does not say it, the token at each chunk's head where the vocabulary adds one.

    Raises BadFile if it is neither, or damaged.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(len(MAGIC))
    except OSError as error:
        raise BadFile(f"cannot read the reference {path}: {error.strerror or error}") from error
    return _read_llama(path, bos) if start == MAGIC else _read_own(path)


def _header(tokens: Tokens, context: int, chunks: int, vocabulary: int, precision: str, model: str) -> bytes:
    positions = scored(context).stop - scored(context).start
    entries, end = {}, 0
    wanted = [("tokens", "I32", [chunks * context])]
    if precision == "float32":
        wanted += [("log_probs", "F32", [chunks, positions, vocabulary])]
    else:
        wanted += [("codes", "U16", [chunks, positions, vocabulary]), ("floor", "F32", [chunks, positions]),
                   ("scale", "F32", [chunks, positions])]
    for name, kind, shape in wanted:
        begin, end = end, end + int(np.prod(shape)) * (2 if kind == "U16" else 4)
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    about = {"format": FORMAT, "model": model, "context": str(context), "bos": "" if tokens.bos is None else str(tokens.bos),
             "precision": precision}
    text = json.dumps({"__metadata__": about, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _room(path: Path, numbers: int, precision: str) -> None:
    needed, free = numbers * (4 if precision == "float32" else 2), shutil.disk_usage(path.absolute().parent).free
    if needed > free:
        raise LabError(f"the reference {path} takes {format_bytes(needed)} and {format_bytes(free)} are free there: give fewer "
                       "chunks or another folder")


def _encoded(log_probs: torch.Tensor, precision: str) -> tuple[np.ndarray, ...]:
    """float64 [rows, vocabulary] as what is stored: (log_probs,), or (codes, floor [rows], scale [rows]); written over."""
    if precision == "float32":
        return (log_probs.float().cpu().numpy().astype("<f4", copy=False),)
    best = log_probs.amax(dim=-1)
    floor = torch.maximum(log_probs.amin(dim=-1), best - SPAN)
    scale = (best - floor) / 65535
    inverse = torch.where(scale > 0, 1 / scale, 0)
    codes = log_probs.sub_(floor[:, None]).mul_(inverse[:, None]).round_().clamp_(0, 65535)
    return (codes.cpu().numpy().astype("<u2"), *(side.cpu().numpy().astype("<f4") for side in (floor, scale)))


def _read_own(path: Path) -> Reference:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "np")
        about, names = file.metadata() or {}, set(file.keys())
        if about.get("format") != FORMAT:
            raise BadFile(f"{path} is no reference of log-probabilities: quality.save_reference writes one")
        exact = about["precision"] == "float32"
        values = file.get_slice("log_probs" if exact else "codes")
        chunks, positions, vocabulary = values.get_shape()
        context, bos = int(about["context"]), int(about["bos"]) if about["bos"] else None
        ids = file.get_tensor("tokens").astype(np.int64)
    except (SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, LabError):
            raise
        raise BadFile(f"{path} is no whole reference of log-probabilities: {error}") from error
    rows = scored(context)
    if len(ids) != chunks * context or positions != rows.stop - rows.start or not (exact or {"floor", "scale"} <= names):
        raise BadFile(f"{path}: its parts do not belong together: {len(ids)} tokens, {chunks} chunks of {context}")

    def data(index: int) -> tuple:
        sides = () if exact else (file.get_slice("floor")[index], file.get_slice("scale")[index])
        return values[index], *(sides or (None, None))

    return Reference(path, about["model"], Tokens(ids, bos), context, chunks, vocabulary, about["precision"], data)


def _read_llama(path: Path, bos: int | None) -> Reference:
    start = len(MAGIC) + 12
    with open(path, "rb") as file:
        head = file.read(start)
        if len(head) < start:
            raise BadFile(f"{path} ends inside its header: write it anew with llama-perplexity")
        context, vocabulary, chunks = struct.unpack("<Iii", head[len(MAGIC):])
        rows, width = scored(context), 2 * ((vocabulary + 1) // 2) + 4  # floor and scale lie before each row's codes
        positions, begin = rows.stop - rows.start, start + 4 * chunks * context
        expected = begin + 2 * chunks * positions * width
        if min(context - 2, vocabulary, chunks) < 1 or path.stat().st_size != expected:
            raise BadFile(f"{path} has {path.stat().st_size} bytes and its header asks for {expected}: it is damaged or was "
                          "interrupted; write it anew with llama-perplexity")
        ids = np.frombuffer(file.read(4 * chunks * context), dtype="<i4").astype(np.int64)

    def data(index: int) -> tuple:
        stored = np.fromfile(path, "<u2", positions * width, offset=begin + 2 * index * positions * width)
        stored = stored.reshape(positions, width)
        sides = stored[:, :4].copy().view("<f4")
        return stored[:, 4:4 + vocabulary], sides[:, 1], sides[:, 0]

    return Reference(path, path.name, Tokens(ids, bos), context, chunks, vocabulary, "16-bit", data)
