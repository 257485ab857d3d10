"""MeasureState: the small model run on this machine with each cache type at a few contexts: bytes and seconds, beside what they
were predicted to be."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import traitlets as t

from ..catalog import Table
from ..errors import LabError
from ..fitting import fit
from ..gguf import GGUFFile, read_gguf
from ..memory import cache_bytes, cache_types
from ..rates import Band
from ..roofline import Ceilings, ceilings
from ..runtime.decoder import Decoder
from ..shapes import ModelSpec, model_spec
from ..units import format_bytes, format_rate
from .background import Background, Stopped
from .cache_costs import Pair, kv_words
from .quantization_state import path_of
from .settable import settable

TOKENS = 8                  # timed at each context, the quickest counts
PIECE = 256                 # cells filled at once, so that it can be stopped
CONTEXTS, MOST = (256, 1024, 4096), 2**17
MOST_TYPES = 6              # that a chart tells apart
SETTINGS = {"file": None, "contexts": CONTEXTS, "types": ("f16", "q8_0", "q4_0")}


@dataclass(frozen=True)
class Point:
    """One cache type with its context full. seconds: of a token, measured. bytes: what the cache held, measured; predicted:
    what `memory.cache_bytes` says, exact. modelled: llama.cpp's tokens/s on this machine (low, best, high), None where not
    known."""

    kv: Pair
    context: int
    seconds: float
    bytes: int
    predicted: int
    modelled: Band | None


class MeasureState(settable(SETTINGS), Background):
    """file: a GGUF's path, None for the small model llmlab uses everywhere. contexts: tokens that lie behind the timed ones,
    as noise (see `fill`); multiples of 256, so that every cell is in use. types: cache types, or pairs for K and V. Measured:
    `points`, growing while `running`; `ceilings` of the machine.

    `start()` returns at once, `run()` waits and returns the answer, `end()` ends it. Raises LabError for settings that cannot
    be used.
    """

    WHOSE = " of a measurement"
    points = t.Tuple(read_only=True)
    ceilings = t.Instance(Ceilings, allow_none=True, read_only=True)

    def __init__(self, **settings):
        super().__init__()
        self.update(**settings)

    # ---- in words -----------------------------------------------------------------------------------------------

    @property
    def answer(self) -> str:
        """What came of it in words, or what is wrong."""
        if self.error or not self.points:
            return self.error or "Nothing was measured yet."
        last = max(point.context for point in self.points)
        said = ", ".join(f"{1 / point.seconds:.3g} tokens/s in {kv_words(point.kv)}" for point in self.points
                         if point.context == last)
        return f"{self.memory_answer} With {last:,} tokens behind it, it writes {said}: measured with llmlab's lean decoder."

    @property
    def memory_answer(self) -> str:
        """Whether memory is as predicted."""
        off = [point for point in self.points if point.bytes != point.predicted]
        if not off:
            return (f"The cache held what was predicted, to the byte, at each of {len(self.points)} measurements, up to "
                    f"{format_bytes(max(point.bytes for point in self.points))}.")
        worst = max(off, key=lambda point: abs(point.bytes - point.predicted))
        return (f"The cache held {worst.bytes:,} bytes in {kv_words(worst.kv)} with {worst.context:,} tokens, and "
                f"{worst.predicted:,} were predicted.")

    @property
    def allowed(self) -> str:
        """What the machine allows, in words."""
        return (f"This machine reads {format_rate(self.ceilings.bandwidth)} [measured: {self.ceilings.how}]: at least what the "
                "dashed lines take." if self.ceilings else "")

    @property
    def table(self) -> Table:
        """Memory and speed, measured beside predicted."""
        return Table([{"cache": kv_words(point.kv), "context": f"{point.context:,}", "bytes measured": f"{point.bytes:,}",
                       "predicted": f"{point.predicted:,}", "tokens/s measured": f"{1 / point.seconds:.3g}",
                       "the context adds": _ms(self.added(point)), "at least": _ms(self.least(point)),
                       "llama.cpp, modelled": "{1:.3g} ({0:.3g} to {2:.3g})".format(*point.modelled) if point.modelled else ""}
                      for point in self.points])

    def first(self, kv: Pair) -> Point:
        """The shortest context that was measured in a type."""
        return min((point for point in self.points if point.kv == kv), key=lambda point: point.context)

    def added(self, point: Point) -> float:
        """Seconds a token takes more than with the shortest context."""
        return point.seconds - self.first(point.kv).seconds

    def least(self, point: Point) -> float:
        """Seconds that reading the cache's further bytes takes at least here."""
        return (point.bytes - self.first(point.kv).bytes) / self.ceilings.bandwidth if self.ceilings else 0.0

    # ---- running ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin, and return at once. Raises LabError while it runs, and for settings that cannot be used."""
        if self.running:
            raise LabError("something is being measured; end that or wait for it first")
        kvs, contexts = list(dict.fromkeys(map(cache_types, self.types))), sorted(set(self.contexts))
        for n in contexts:
            if isinstance(n, bool) or not isinstance(n, int) or not 256 <= n <= MOST or n % 256:
                raise LabError(f"a context is {n!r:.40}; give multiples of 256, up to {MOST:,}")
        if not contexts or not 1 <= len(kvs) <= MOST_TYPES:
            raise LabError(f"{len(kvs)} cache types and {len(contexts)} contexts are to be measured; give 1 to {MOST_TYPES} "
                           "types, and a context")
        file = read_gguf(path_of(self.file))
        self._set(error="", points=(), progress="Measuring what this machine allows.", running=True)
        self._begin("cache", self._through, "measuring a cache", self._measure, file, kvs, contexts)

    def run(self) -> str:
        """Start, wait, and return the answer. Raises LabError where something went wrong."""
        self.start()
        self._finish()
        return self.answer

    def _measure(self, file: GGUFFile, kvs: list[Pair], contexts: list[int]) -> None:
        self.set_trait("ceilings", ceilings())
        spec = model_spec(file.paths[0])
        for n in contexts:
            for kv in kvs:
                self._say(f"{kv_words(kv)}, {n:,} tokens: opening the model.")
                self.set_trait("points", (*self.points, self._point(file, spec, kv, n)))

    def _point(self, file: GGUFFile, spec: ModelSpec, kv: Pair, context: int) -> Point:
        reader = Decoder.open(file, strategy="compact", dtype=torch.float32, context=context, kv=kv)
        for done in fill(reader, context - TOKENS):
            self._say(f"{kv_words(kv)}, {context:,} tokens: {done:,} cells filled.")
        tokens = range(2, 2 + TOKENS)
        took = []
        for token in tokens:
            if self._stopping.is_set():
                raise Stopped
            begun = time.perf_counter()
            reader.read([token])
            took.append(time.perf_counter() - begun)
        return Point(kv, context, min(took), reader.cache_bytes, cache_bytes(spec, context, kv).kv,
                     _modelled(spec, kv, context))


@torch.no_grad()
def fill(reader: Decoder, count: int) -> Iterator[int]:
    """Lay noise into the first `count` cells of a lean decoder that has read nothing, PIECE at a time; how many there are
    after each. A token takes as long to look at them as at a text's, and a text takes minutes to be read."""
    random = torch.Generator().manual_seed(1)
    for start in range(0, count, PIECE):
        at = torch.arange(start, min(start + PIECE, count))
        for cache in reader.caches:
            noise = [torch.randn(1, side.heads, len(at), side.head_dim, generator=random)
                     for side in (cache.keys, cache.values)]
            cache.append(*noise, at)
        reader.tokens += at.tolist()
        yield len(reader.tokens)


@lru_cache(maxsize=64)
def _modelled(spec: ModelSpec, kv: Pair, context: int) -> Band | None:
    return fit(spec, None, context=context, kv=kv).speed.decode_tps


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
