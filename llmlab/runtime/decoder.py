"""The lean decoder: the main architectures run from a GGUF's packed weights, one text at a time, without transformers.

Few operations a layer, matrices with the same input fused, a cache with room to grow, of plain numbers or of packed pages. It
is the memory that `generating.stream` reads on from.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from ..errors import LabError
from ..gguf import GGUFFile, read_gguf
from ..gguf.words import show_path
from ..kernels import Packed, rows
from ..kernels.arithmetic import multiply_in
from ..kernels.packing import STRATEGIES
from ..memory import cache_types, checked_integer
from . import recalling, rope
from .cache import LayerCache, cells_of
from .generating import out_of_memory, same_beginning, usable_context, whole
from .graphing import Step
from .heap import give_back
from .keys import Keys
from .layers import Attend, LayerShape, Remember, block, norm, project, turn
from .tensors import GGUFSource
from .weights import Turning, Weights, read

__all__ = ["Decoder", "LayerShape", "block"]

_PIECE = 512             # tokens read at once at most: what a layer holds meanwhile grows with them
_ROOM = 256              # cells of the first cache


def multiply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """x [tokens, cols] times packed weights -> [tokens, rows], without the checks of `kernels.linear`."""
    return packed.kernels[0].matmul(x)


class Decoder:
    """A model that reads tokens and says what comes next.

    tokens: what was read, but for what `shift` has `dropped` after the first `kept` (None: it never did). context: most tokens
    it may hold; trained: what the model was trained with. dtype: in which matrices are multiplied. kv: the types of keys and
    values, None for plain numbers. path, architecture: of the file. why: what was chosen for the weights, in a line.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype, context: int | None = None, file: GGUFFile | None = None,
                 kv: str | tuple[str, str] | None = None, sinks: int = 0, recent: int = 0, rotate: bool = False):
        self.weights, self.dtype, self.trained = weights, dtype, weights.trained
        self.context = usable_context(context, weights.trained)
        if kv is None and (sinks or recent or rotate):
            raise LabError("sinks, recent and rotate are about a cache of packed pages; give kv, such as kv='q8_0'")
        self.kv = kv if kv is None else cache_types(kv)
        self.sinks, self.recent, self.rotate = sinks, recent, rotate
        self._reserved = context is not None        # a packed cache has all its room at once where somebody said how much
        self.file = file
        self.path, self.architecture = (file.paths[0], file.architecture) if file else ("", "")
        self.device = weights.embedding.device
        # A token's layers as one CUDA graph; by torch.compile.
        self.graphed, self.fused = self.device.type == "cuda" and kv is None, False
        self.cache_dtype = multiply_in(dtype, self.device.type)
        self.compiled, self.multiply = None, multiply
        self.lock = threading.RLock()       # one text at a time: whoever goes on with one holds it
        packed = weights.packed()
        self._files = file.sources if file and any(matrix.mapped for matrix in packed) else ()
        reasons = Counter((p.strategy, p.why) for p in packed)
        told = [f"{count} of {len(packed)} matrices {way} ({why})" for (way, why), count in reasons.most_common(3)]
        self.strategy = " + ".join(way for way, _ in Counter(p.strategy for p in packed).most_common())
        self.why = "; ".join([*[weights.chosen] * bool(weights.chosen), *told])
        self.forget()

    @classmethod
    def open(cls, path: str | os.PathLike | GGUFFile, dtype: torch.dtype | None = None, strategy: str = "auto",
             context: int | None = None, device: torch.device | str = "cpu", compile: bool = False,
             progress: Callable[[str], None] | None = None, kv: str | tuple[str, str] | None = None, sinks: int = 0,
             recent: int = 0, rotate: bool = False) -> "Decoder":
        """The decoder of a GGUF (the first file of a sharded set). `strategy` as in `llmlab.load`; without a `dtype` that which
        the device multiplies quickest in. `compile`: compiled for this processor, or as without it where that cannot be, which
        `why` says; `progress` is told what is compiled. `kv`: the cache in one of `memory.CACHE_TYPES`, or a pair of them for
        keys and values, as packed pages that are never unpacked whole (None: as plain numbers, in the dtype attention is
        quickest in); with it `sinks`, `recent` and `rotate` as `cache.LayerCache` has them, and a `context` that is given is
        reserved at once. Raises LabError (BadFile for a damaged file) with one line naming the thing and the remedy."""
        if strategy not in STRATEGIES:
            raise LabError(f"strategy is {str(strategy)[:40]!r}; give one of {', '.join(STRATEGIES)}")
        file = path if isinstance(path, GGUFFile) else read_gguf(path)
        shown = show_path(file.paths[0])
        if file.is_projector:
            raise LabError(f"{shown} is the projector of a model, not a model; give the model's own file")
        dtype = dtype or _quick(torch.device(device))
        source, keys = GGUFSource(file), Keys(file.metadata, file.architecture, shown)
        if not compile or torch.device(device).type == "cuda":      # a card's own kernels stay; what lies between them is fused
            found = cls(read(source, keys, dtype, strategy, device), dtype, context, file, kv, sinks, recent, rotate)
            found.fused = compile
            return found
        from .compiled import NotCompiled, compiled
        try:
            if sinks or recent:
                raise NotCompiled("tokens in full precision lie beside a packed cache")
            weights, made = compiled(source, keys, dtype, strategy, torch.device(device), progress,
                                     None if kv is None else cache_types(kv), rotate, context)
        except NotCompiled as error:
            found = cls.open(file, dtype, strategy, context, device, kv=kv, sinks=sinks, recent=recent, rotate=rotate)
            found.why = f"not compiled: {error}; {found.why}"
            return found
        found = cls(weights, torch.float32, context, file, kv, rotate=rotate)
        found.compiled, found.multiply, found.why, found.strategy = made, made.multiply, made.why, "compiled"
        for part in file.sources:       # all of it was read once, to be laid out anew
            part.let_go()
        give_back()
        return found

    @property
    def resident_bytes(self) -> int:
        """What the weights hold once all of them have run, pages of the mapped file among it; without the cache."""
        return self.weights.bytes + (self.compiled.bytes if self.compiled else 0)

    # ---- the memory ----------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Empty it."""
        self.tokens: list[int] = []
        self.cells, self.caches, self.tables, self.step = 0, [], [], None
        self.dropped: list[int] = []
        self.kept: int | None = None
        self.long = False      # whether by the angles for longer texts
        if self.kv:
            self.caches = self._packed_caches()

    def keep(self, tokens: list[int]) -> int:
        """Drop what is not the beginning of `tokens`; how many of them need not be read again (never all: the last one's
        logits are wanted). Where `shift` has dropped some, `tokens` are to have them."""
        gone, kept = len(self.dropped), self.kept or 0
        same = same_beginning(self.tokens[:kept] + self.dropped + self.tokens[kept:] if gone else self.tokens, tokens)
        if self._is_long(len(tokens)) != self.long or not self._goes_on_from(same):
            self.forget()
            return 0
        with whole(self):
            for cache in self.caches if self.kv else ():
                cache.crop(same)
            del self.tokens[same - gone:]
        return same

    def shift(self, keep: int = 0) -> int:
        """Make room without reading anything anew: of the tokens after the first `keep` the older half is dropped, as llama.cpp
        does; returns how many. The rest stays as and where it is; the first `keep` are turned by RoPE to lie just before it,
        because whatever they say they are looked at (StreamingLLM, arXiv 2309.17453); of packed pages that takes as many
        `sinks`. What follows is not what it would be had the rest alone been read: that was read with what is dropped in view.
        Raises LabError where there is nothing to drop, for another number than the last time, and as `check_shift` does."""
        self.check_shift(keep)
        if self.kept not in (None, keep):
            raise LabError(f"the first {keep:,} tokens are to stay, and it was {self.kept:,} before; keep those, or begin anew")
        with self.lock:
            count = (len(self.tokens) - keep) // 2
            if count < 1:
                raise LabError(f"{len(self.tokens):,} tokens were read and the first {keep:,} are to stay; there is nothing to "
                               "drop")
            with whole(self), torch.no_grad():
                self._shift(keep, count)
            return count

    def check_shift(self, keep: int) -> None:
        """Raises LabError where `shift` cannot keep so many first tokens."""
        checked_integer("keep", keep, 0, 2**31 - 1, "give a whole number of tokens, from 0 up")
        if self.context is not None and keep > self.context - 2:
            raise LabError(f"the first {keep:,} tokens are to stay and the context holds {self.context:,}; keep fewer")
        if self.kv and keep > self.sinks:
            raise LabError(f"the first {keep:,} tokens are to stay, and {self.sinks:,} lie in full precision; open the decoder "
                           f"with sinks={keep}")

    def save(self, path: str | os.PathLike) -> None:
        """Write what was read and its cache to a file, whole or not at all, so that `recall` need not read it again. Raises
        LabError where it cannot be written."""
        with self.lock:
            recalling.save(self, path)

    def recall(self, path: str | os.PathLike) -> int:
        """Go on from what `save` wrote, in place of what was read; how many tokens that are. The logits that follow are those
        that would have followed then. Raises LabError for a file of another model, of another kind of cache, or of more tokens
        than the context holds, and BadFile for one that is damaged; what was read before then stays."""
        with self.lock, recalling.Saved(self, path) as saved:
            with whole(self):
                saved.restore()
            return len(self.tokens)

    @property
    def cache_bytes(self) -> int:
        """What keys and values hold now, measured; of packed pages what is near among it."""
        return sum(cache.bytes if self.kv else cache.nbytes for cache in self.caches)

    def read(self, tokens: list[int]) -> torch.Tensor:
        """Read `tokens` after what was read before; the logits after the last of them, [vocabulary] in float32. Raises
        LabError where memory does not suffice, for a token that is none, and BadFile where the file changed meanwhile."""
        with self.lock:
            return self._read(tokens, 1)[0]

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Read `tokens` after what was read before; the logits after each of them, [tokens, vocabulary] in float32. Raises as
        `read` does."""
        with self.lock:
            return self._read(tokens, len(tokens))

    # ---- inside --------------------------------------------------------------------------------------------------

    def _packed_caches(self) -> list[LayerCache]:
        widest, made = max(shape.window for shape in self.weights.shapes), []
        try:
            for shape in self.weights.shapes:
                room = cells_of(self.context, widest if shape.window else 0)
                made.append(LayerCache(self.kv, shape.kv_heads, shape.head_dim, shape.head_dim, window=shape.window,
                                       cells=room if self._reserved else 1, capacity=room, sinks=self.sinks,
                                       recent=self.recent, rotate=self.rotate, device=self.device))
        except RuntimeError as error:
            if out_of_memory(error):
                raise LabError(f"memory does not suffice for a cache of {self.context:,} tokens; give a smaller context or a "
                               "narrower kv") from None
            raise
        return made

    def _goes_on_from(self, length: int) -> bool:
        """Whether the first so many tokens can be gone on from: where some were dropped those are gone, and rings of packed
        cells may have lost what is looked back on."""
        if self.dropped and length < len(self.dropped) + self.kept:
            return False
        return not self.kv or all(cache.holds(length) for cache in self.caches)

    def _shift(self, keep: int, count: int) -> None:
        held, first = len(self.tokens), len(self.dropped) + keep
        for cache, shape, turning in zip(self.caches, self.weights.shapes, self.weights.turning, strict=True):
            on = partial(self._turned, shape=shape, turning=self.weights.turnings[turning], by=count)
            if self.kv:
                cache.drop(first, first + count)
                if keep:
                    cache.move(keep, count, on)
            else:
                if keep:
                    cache[0, :, :keep] = on(cache[0, :, :keep].float()).to(cache.dtype)
                cache[:, :, keep:held - count] = cache[:, :, keep + count:held].clone()
        self.dropped += self.tokens[keep:keep + count]
        del self.tokens[keep:keep + count]
        self.kept, self.step = keep, None
        self._make_tables()

    def _turned(self, keys: torch.Tensor, shape: LayerShape, turning: Turning, by: int) -> torch.Tensor:
        """keys [..., head_dim] float32, turned on by so many positions."""
        frequencies = turning.long[0] if self.long and turning.long else turning.frequencies
        x = keys.reshape(-1, 1, shape.head_dim).clone()
        turn(x, shape, *rope.table(frequencies, 1.0, by, by + 1, turning.pairs))
        return x.view(keys.shape)

    @torch.no_grad()        # not in inference mode: what comes out may be written to and learned from
    def _read(self, tokens: list[int], wanted: int) -> torch.Tensor:
        """The logits after the last `wanted` tokens."""
        if not tokens:
            raise LabError("there is nothing to read; give one token at least")
        if self.context is not None and (many := len(self.tokens) + len(tokens)) > self.context:
            raise LabError(f"the text would be {many:,} tokens, the context holds {self.context:,}; shorten it or begin anew")
        for file in self._files:
            file.check_in_place()
        with whole(self):
            if self._is_long(len(self.dropped) + len(self.tokens) + len(tokens)) != self.long:
                tokens = self.tokens + tokens       # what was read was turned by other angles: read it again
                self.forget()
                self.long = self._is_long(len(tokens))
            found, first = [], len(tokens) - wanted
            for start in range(0, len(tokens), _PIECE):
                piece = tokens[start:start + _PIECE]
                x = self._layers(piece, len(self.tokens) + len(tokens) - start)
                self.tokens += piece
                if start + len(piece) > first:
                    found.append(self._head(x[max(0, first - start):]))
            return found[0] if len(found) == 1 else torch.cat(found)

    def _layers(self, tokens: list[int], ahead: int) -> torch.Tensor:
        """x [tokens, width] after the last layer; `ahead`: how many cells will be wanted."""
        start, count, weights = len(self.tokens), len(tokens), self.weights
        stop = start + count
        self.grow(ahead)
        x = rows(weights.embedding, torch.tensor(tokens, device=self.device), self.dtype).float()
        if weights.scale != 1.0:
            x = (x.to(self.dtype) * weights.scale).float()
        if count == 1 and self.graphed:
            if self.step is None:
                self.step = Step(weights, self.caches, self.tables, multiply, x, start, self.fused)
            return self.step(x, start)
        tables = [(cos[start:stop], sin[start:stop]) for cos, sin in self.tables]
        if count == 1 and start and self.compiled:
            place = start + len(self.dropped) if self.kv else start
            return self.compiled.token(x, self.caches, [tables[turning] for turning in weights.turning], place)
        masks: dict[int, torch.Tensor | None] = {}
        at = torch.arange(start, stop, device=self.device).add_(len(self.dropped)) if self.kv else None
        for layer, shape, turning, cache in zip(weights.layers, weights.shapes, weights.turning, self.caches, strict=True):
            if self.kv:
                x = block(x, layer, shape, self.multiply, _packed(cache, at, shape, layer.get("sinks")), *tables[turning])
                continue
            first = max(0, start + 1 - shape.window) if shape.window else 0

            def remember(new, cache=cache, first=first):
                cache.narrow(2, start, count).copy_(new)
                return cache.narrow(2, first, stop - first).unbind()

            if count > 1 and shape.window not in masks:
                masks[shape.window] = _mask(start, stop, first, shape.window, self.device)
            x = block(x, layer, shape, self.multiply, remember, *tables[turning], masks.get(shape.window))
        return x

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        head, softcap = self.weights.head, self.weights.softcap
        if self.compiled and x.shape[0] == 1:
            return self.compiled.logits(x)
        logits = project(norm(x, head, "norm").to(self.dtype), head, "output", self.multiply).float()
        return torch.tanh(logits / softcap) * softcap if softcap else logits

    def grow(self, cells: int) -> None:
        """Room for so many cells: twice as many as there are, so that what is there is copied seldom."""
        if cells <= self.cells:
            return
        before, after = len(self.tokens), max(cells, 2 * self.cells, _ROOM)
        if self.context is not None:
            after = max(cells, min(after, self.context))
        if self.kv:                     # its pages grow by themselves
            self.cells = after
            self._make_tables()
            return
        self.cells, old, self.caches, self.tables, self.step = 0, self.caches, [], [], None
        for number, shape in enumerate(self.weights.shapes):
            larger = torch.empty(2, shape.kv_heads, after, shape.head_dim, dtype=self.cache_dtype, device=self.device)
            if self.compiled:       # packages take cells in one piece
                larger = larger.view(2, after, shape.kv_heads, shape.head_dim).transpose(1, 2)
            if before:
                larger[:, :, :before] = old[number][:, :, :before]
                old[number] = None
            self.caches.append(larger)
        self.cells = after
        self._make_tables()

    def _make_tables(self) -> None:
        """Cosines and sines, by the number of a token that is there: what was dropped counts for positions as it did."""
        self.tables, first = [], len(self.dropped)
        for turning in self.weights.turnings:
            found = turning.long if self.long and turning.long else (turning.frequencies, turning.scale)
            self.tables.append(rope.table(*found, first, first + self.cells, turning.pairs))

    def _is_long(self, tokens: int) -> bool:
        """Whether a text of so many tokens goes by the factors for longer ones."""
        return any(turning.limit is not None and tokens > turning.limit for turning in self.weights.turnings)


def _packed(cache: LayerCache, at: torch.Tensor, shape: LayerShape, sinks: torch.Tensor | None) -> Remember:
    """What `layers.block` remembers tokens at positions `at` int [n] with, in packed pages."""
    def remember(new: torch.Tensor) -> Attend:
        cache.append(*new[:, None].unbind(), at)
        return lambda q: cache.attend(q.transpose(0, 1)[None], at, scale=shape.scale, softcap=shape.softcap,
                                      sinks=sinks)[0].transpose(0, 1)

    return remember


def _mask(start: int, stop: int, first: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [tokens, cells]: whether the token of a row looks at the cell of a column; cells begin at `first`."""
    rows = torch.arange(start, stop, device=device)[:, None]
    cells = torch.arange(first, stop, device=device)
    return (cells <= rows) & (cells > rows - window) if window else cells <= rows


def _quick(device: torch.device) -> torch.dtype:
    """The dtype that matrices are quickest multiplied in."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return multiply_in(torch.bfloat16, device.type)
