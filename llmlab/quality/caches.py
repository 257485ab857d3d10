"""What a KV cache's type costs: a model with its keys and values rounded against the same model with exact ones.

Weights and arithmetic are the same on both sides, so that nothing differs but the cache. Every token is scored, at whatever
depth it stands: whether errors grow with the context is part of the answer.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import torch

from ..catalog import Table
from ..errors import LabError
from ..formats import FORMATS
from ..gguf import GGUFFile, read_gguf
from ..memory import CACHE_TYPES, cache_types, checked_integer
from ..runtime.decoder import Decoder
from ..vocabulary import words_of
from . import passes, statistics
from .corpus import Tokens, as_tokens, tokens_of
from .drift import ByToken, Divergence, compare

PIECE = 256     # tokens read at once: what a piece's logits of two models take is 400 MB at a vocabulary of 128k
DEPTHS = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class CacheSettings:
    """How a cache is kept. k, v: types of keys and values, as in `memory.CACHE_TYPES`. rotate: keys, values and queries times a
    Hadamard matrix. recent, sinks: the last and the first so many tokens in float16, whatever the types."""

    k: str
    v: str
    rotate: bool = False
    recent: int = 0
    sinks: int = 0

    def __post_init__(self):
        for name, kind in zip("kv", cache_types((self.k, self.v)), strict=True):
            object.__setattr__(self, name, kind)
        for name in ("recent", "sinks"):
            checked_integer(name, getattr(self, name), 0, 2**31 - 1, "give a whole number of tokens, from 0 up")

    @classmethod
    def of(cls, kv: "str | Sequence[str] | CacheSettings") -> "CacheSettings":
        """From "q8_0", a pair for K and V, or settings as they are. Raises UnknownName."""
        return kv if isinstance(kv, cls) else cls(*cache_types(kv))

    @property
    def bits(self) -> float:
        """Bits a number, K and V averaged; of tokens that are not kept in float16."""
        formats = [FORMATS[CACHE_TYPES[kind]] for kind in (self.k, self.v)]
        return sum(8 * known.block_bytes / known.block for known in formats) / 2

    def __str__(self) -> str:
        more = [f"{getattr(self, name)} {name}" for name in ("recent", "sinks") if getattr(self, name)]
        return ", ".join([self.k if self.k == self.v else f"{self.k}/{self.v}", *["rotated"] * self.rotate, *more])


@dataclass(frozen=True, eq=False, repr=False)
class CacheDivergence(Divergence):
    """A model with one kind of cache against itself with another, as `Divergence` has it, but of all tokens of each chunk: the
    arrays by token hold context - 1 positions of one chunk after another."""

    cache: CacheSettings

    def by_depth(self, edges: Sequence[int] = DEPTHS) -> Table:
        """Figures of the tokens at positions `edges[i]` up to `edges[i + 1]`, a row each, as far as the context reaches: mean
        KLD and its standard error in nats, the KLD that 99 % lie below, the share with the same token best."""
        position = np.arange(self.tokens) % (self.context - 1)
        rows = []
        for first, last in zip(edges, [*edges[1:], inf], strict=True):
            here = (position >= first) & (position < last)
            if here.any():
                kld = statistics.mean(self.kld[here])
                rows.append({"from": first, "to": min(last, self.context), "tokens": int(here.sum()), "mean_kld": kld.value,
                             "error": kld.error, "p99_kld": statistics.percentile(np.sort(self.kld[here]), 99),
                             "top1": float(self.same[here].mean())})
        return Table(rows, {"mean_kld": "{:.3g}".format, "error": "{:.2g}".format, "p99_kld": "{:.3g}".format,
                            "top1": "{:.2%}".format})


def cache_divergence(model: str | os.PathLike | GGUFFile | Decoder, kv: str | Sequence[str] | CacheSettings,
                     tokens: Tokens | Sequence[int] | None = None, context: int = 2048, *, rotate: bool = False,
                     recent: int = 0, sinks: int = 0, chunks: int | None = None, against: str | Sequence[str] = "f32",
                     progress: bool = True, stopped: Callable[[], bool] = lambda: False) -> CacheDivergence:
    """What the answers of a GGUF's model lose by a cache of `kv` ("q8_0", or a pair for K and V), measured against the same
    model with a cache of `against`.

    `model`: a path, or the decoder of `llmlab.decoder`, whose text stays as it is; for figures that hold beside others let it
    multiply in float32, as a path does. `rotate`, `recent`, `sinks` as in `CacheSettings`, which `kv` may also be. `tokens`,
    `context`, `chunks`: as in `quality.divergence` (None: the text llmlab ships, all of it), but every token of a chunk is
    scored, so that `by_depth` can tell what a longer context costs. Several kinds at once: `cache_divergences`.

    Raises LabError: text shorter than two chunks, a cache that these heads cannot have, logits that are not numbers.
    """
    settings = kv if isinstance(kv, CacheSettings) else CacheSettings(*cache_types(kv), rotate, recent, sinks)
    return cache_divergences(model, [settings], tokens, context, chunks=chunks, against=against, progress=progress,
                             stopped=stopped)[0]


def cache_divergences(model: str | os.PathLike | GGUFFile | Decoder, caches: Iterable[str | Sequence[str] | CacheSettings],
                      tokens: Tokens | Sequence[int] | None = None, context: int = 2048, *, chunks: int | None = None,
                      against: str | Sequence[str] = "f32", progress: bool = True,
                      stopped: Callable[[], bool] = lambda: False) -> list[CacheDivergence]:
    """`cache_divergence` of several kinds of cache, in their order, side by side on one reading of the reference. The weights
    are there once; each kind has its own cache."""
    from tqdm.auto import tqdm

    caches = [CacheSettings.of(one) for one in caches]
    if not caches:
        raise LabError("there is no cache to measure; give one type at least, such as 'q8_0'")
    base = reader(model, CacheSettings.of(against), context)
    tokens = _tokens_of(base) if tokens is None else as_tokens(tokens)
    count, others = tokens.count(context, chunks), [reader(base, one, context) for one in caches]
    found, held = [[] for _ in caches], passes.Held()
    with torch.inference_mode(), tqdm(total=count * (context - 1), desc="divergence", unit="token",
                                      disable=not progress) as bar:
        for index in range(count):
            for part in _chunk(base, others, tokens, index, context, held):
                for kept, one in zip(found, part, strict=True):
                    kept.append(one)
                bar.set_postfix_str(", ".join(f"{one}: {np.mean(np.concatenate([part.kld for part in kept])):.3g}"
                                              for one, kept in zip(caches, found, strict=True)), refresh=False)
                bar.update(len(part[0].kld))
            if stopped():
                count = index + 1
                break
    name = os.path.basename(base.path)
    return [CacheDivergence(f"{name} with a cache of {one}", CacheSettings.of(against).k, context, count,
                            **ByToken(*map(np.concatenate, zip(*kept, strict=True)))._asdict(), cache=one)
            for one, kept in zip(caches, found, strict=True)]


def reader(model: str | os.PathLike | GGUFFile | Decoder, settings: CacheSettings, context: int | None = None) -> Decoder:
    """A decoder with such a cache, empty: of a path one that multiplies in float32, of a decoder one of the same weights."""
    given = {"kv": (settings.k, settings.v), "sinks": settings.sinks, "recent": settings.recent, "rotate": settings.rotate}
    if not isinstance(model, Decoder):
        return Decoder.open(model, torch.float32, "compact", context, **given)
    if model.compiled:
        raise LabError("a compiled decoder keeps its cache in plain numbers; open one without compile=True, or give the path")
    return Decoder(model.weights, model.dtype, context, read_gguf(model.path) if model.path else None, **given)


def _tokens_of(decoder: Decoder) -> Tokens:
    """The text llmlab ships, in the words of a decoder's file."""
    if not decoder.path:
        raise LabError("tokens is missing, and this decoder has no file to read a vocabulary from: give token ids")
    return tokens_of(words_of(read_gguf(decoder.path)))


def _chunk(base: Decoder, others: list[Decoder], tokens: Tokens, index: int, context: int, held: passes.Held):
    """Figures by token of one chunk, for each of `others`, piece by piece."""
    ids = tokens.chunk(index, context)
    wanted = torch.from_numpy(tokens.ids[index * context + 1:(index + 1) * context])
    passes.within(ids, base.weights.embedding.rows)
    for one in (base, *others):
        one.forget()
    for start in range(0, context - 1, PIECE):
        piece, targets = ids[start:min(start + PIECE, context - 1)].tolist(), wanted[start:start + PIECE]
        theirs, spare = base.logits(piece).double(), passes.Held()
        steps = [slice(at, at + passes.rows_at_once(theirs.shape[-1]))
                 for at in range(0, len(piece), passes.rows_at_once(theirs.shape[-1]))]
        for step in steps:
            passes.log_probabilities(theirs[step], held)
        yield [_compared(one.logits(piece), theirs, targets, steps, held, spare) for one in others]


def _compared(mine: torch.Tensor, theirs: torch.Tensor, targets: torch.Tensor, steps: list[slice], held: passes.Held,
              rows: passes.Held) -> ByToken:
    """Figures by token from a model's logits and the reference's log-probabilities, some rows at a time."""
    found = []
    for step in steps:
        part = rows(*mine[step].shape, mine.device).copy_(mine[step])
        if not part.amax(-1).isfinite().all():
            raise LabError("the model's logits are not numbers (NaN or infinite): its keys or values are too large for the "
                           "cache's type, or its weights are damaged")
        found.append(compare(passes.log_probabilities(part, held), theirs[step], targets[step], -inf, held))
    return ByToken(*map(np.concatenate, zip(*found, strict=True)))
