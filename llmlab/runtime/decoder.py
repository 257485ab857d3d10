"""The lean decoder: the main architectures run from a GGUF's packed weights, one text at a time, without transformers.

Few operations a layer, matrices with the same input fused, a cache with room to grow, of plain numbers or of packed pages. It
is the memory that `generating.stream` reads on from.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..errors import LabError
from ..gguf import GGUFFile, read_gguf
from ..gguf.words import show_path
from ..kernels import Packed, rows
from ..kernels.arithmetic import multiply_in
from ..kernels.compact import Compact
from ..kernels.packing import STRATEGIES
from ..memory import cache_types, checked_integer
from . import recalling, rope
from .cache import LayerCache, cells_of
from .generating import out_of_memory, same_beginning, usable_context, whole
from .gradients import without_gradients
from .graphing import Step
from .heap import give_back
from .keys import Keys
from .layers import Attend, LayerShape, Matmul, Remember, block, norm, one, project, turn
from .tensors import GGUFSource
from .weights import Turning, Weights, read

if TYPE_CHECKING:
    from .compiled import Compiled

__all__ = ["Decoder", "LayerShape", "block"]

_PIECE = 512             # tokens read at once at most: what a layer holds meanwhile grows with them
_ROOM = 256              # cells of the first cache


def multiply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """x [tokens, cols] times packed weights -> [tokens, rows], without the checks of `kernels.linear`."""
    return packed.kernels[0].matmul(x)


def multiply_each(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """The same for each token, to the bit as `multiply` gives it alone."""
    kernel = packed.kernels[0]
    if isinstance(kernel, Compact):
        return kernel.matmul_each(x)
    return torch.cat([kernel.matmul(row.clone()) for row in x.split(1)])


class Decoder:
    """A model that reads tokens and says what comes next.

    tokens: what was read, but for what `shift` has `dropped` after the first `kept` (None: it never did). context: most tokens
    it may hold; trained: what the model was trained with. dtype: in which matrices are multiplied. kv: the types of keys and
    values, None for plain numbers. fixed: whether room for a whole context is there from the beginning, and stays.
    cache_device: where the cache lies. path, architecture: of the file. why: what was chosen for the weights, in a line.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype, context: int | None = None, file: GGUFFile | None = None,
                 kv: str | tuple[str, str] | None = None, sinks: int = 0, recent: int = 0, rotate: bool = False,
                 fixed: bool = False, compiled: "Compiled | None" = None, cache_device: torch.device | None = None):
        self.weights, self.dtype, self.trained = weights, dtype, weights.trained
        self.context = usable_context(context, weights.trained)
        if kv is None and (sinks or recent or rotate):
            raise LabError("sinks, recent and rotate are about a cache of packed pages; give kv, such as kv='q8_0'")
        self.kv = kv if kv is None else cache_types(kv)
        self.sinks, self.recent, self.rotate, self.fixed = sinks, recent, rotate, fixed
        self._reserved = context is not None        # a packed cache has all its room at once where somebody said how much
        self.file = file
        self.path, self.architecture = (file.paths[0], file.architecture) if file else ("", "")
        self.device = weights.embedding.device
        self.cache_device = cache_device or self.device
        # A token's layers as one CUDA graph; by torch.compile.
        self.graphed, self.fused = self.device.type == "cuda" and kv is None, False
        self.cache_dtype = multiply_in(dtype, self.device.type)
        self.compiled, self.multiply = compiled, compiled.multiply if compiled else multiply
        self.cells, self.caches = 0, []
        self.lock = threading.RLock()       # one text at a time: whoever goes on with one holds it
        packed = weights.packed()
        self._files = file.sources if file and any(matrix.mapped for matrix in packed) else ()
        reasons = Counter((p.strategy, p.why) for p in packed)
        told = [f"{count} of {len(packed)} matrices {way} ({why})" for (way, why), count in reasons.most_common(3)]
        self.strategy = " + ".join(way for way, _ in Counter(p.strategy for p in packed).most_common())
        self.why = "; ".join([*[weights.chosen] * bool(weights.chosen), *told])
        if compiled:
            self.strategy, self.why = "compiled", compiled.why
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
        dtype = dtype or quick_dtype(torch.device(device))
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
        found = cls(weights, torch.float32, context, file, kv, rotate=rotate, compiled=made)
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
        self.tables, self.step = [], None
        self.dropped: list[int] = []
        self.kept: int | None = None
        self.long = False      # whether by the angles for longer texts
        if self.kv or not self.fixed:
            self.cells, self.caches = 0, []
        if self.kv:
            self.caches = self._packed_caches()
        if self.fixed:
            self.grow(self.context)
            self.tables = []        # they go by what `recall` or a longer text says next

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
            with whole(self):
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

    def read_each(self, tokens: list[int]) -> torch.Tensor:
        """Read `tokens` after what was read before; the logits after each of them, [tokens, vocabulary] in float32. They are to
        the bit those of reading one at a time, and each layer is wanted only once: token after token goes through it. Raises
        as `read` does."""
        with self.lock:
            return self._read_each(tokens)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _packed_caches(self) -> list[LayerCache]:
        widest, made = max(shape.window for shape in self.weights.shapes), []
        try:
            for shape in self.weights.shapes:
                room = cells_of(self.context, widest if shape.window else 0)
                made.append(LayerCache(self.kv, shape.kv_heads, shape.head_dim, shape.head_dim, window=shape.window,
                                       cells=room if self._reserved else 1, capacity=room, sinks=self.sinks,
                                       recent=self.recent, rotate=self.rotate, device=self.cache_device))
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

    @without_gradients
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
        x = keys.reshape(-1, 1, shape.head_dim).to(self.device, copy=True)
        turn(x, shape, *rope.table(frequencies, 1.0, by, by + 1, turning.pairs))
        return x.view(keys.shape).to(keys.device)

    @without_gradients        # not in inference mode: what comes out may be written to and learned from
    def _read(self, tokens: list[int], wanted: int) -> torch.Tensor:
        """The logits after the last `wanted` tokens."""
        self._check(tokens)
        with whole(self):
            if self._is_long(len(self.dropped) + len(self.tokens) + len(tokens)) != self.long:
                tokens = self.tokens + tokens       # what was read was turned by other angles: read it again
                self.forget()
                self.long = self._is_long(len(tokens))
            found, first = [], len(tokens) - wanted
            for start in range(0, len(tokens), _PIECE):
                piece = tokens[start:start + _PIECE]
                asked = start + len(piece) > first
                x = self._layers(piece, len(self.tokens) + len(tokens) - start, asked)
                self.tokens += piece
                if asked:
                    found.append(self._head(x[max(0, first - start):]))
            return found[0] if len(found) == 1 else torch.cat(found)

    @without_gradients
    def _read_each(self, tokens: list[int]) -> torch.Tensor:
        self._check(tokens)
        start, many = len(self.tokens), len(tokens)
        if many == 1 or self.graphed or self._is_long(len(self.dropped) + start + many) != self.long:
            return torch.cat([self._read([token], 1) for token in tokens])
        if self.compiled and not start:     # the first token of all goes the way of many
            return torch.cat([self._read(tokens[:1], 1), self._read_each(tokens[1:])])
        with whole(self):
            self.grow(start + many)
            xs = [self._embedded([token]) for token in tokens]      # each in memory of its own, as it is when read alone
            if self.compiled:
                xs = self._compiled(torch.cat(xs), start).split(1)
            elif any(shape.experts for shape in self.weights.shapes):
                steps = [self._step(start + at, 1) for at in range(many)]
                for layer, *rest in self._through(start + many):
                    for at, step in enumerate(steps):
                        xs[at] = step(xs[at], layer, *rest)
            else:
                x, step = torch.cat(xs), self._each(start, many)
                for layer, *rest in self._through(start + many):
                    x = step(x, layer, *rest)
                self.tokens += tokens
                return self._head(x, multiply_each)
            self.tokens += tokens
            return torch.cat([self._head(x) for x in xs])

    def _check(self, tokens: list[int]) -> None:
        """Raises LabError and BadFile where these cannot be read now."""
        if not tokens:
            raise LabError("there is nothing to read; give one token at least")
        if self.context is not None and (many := len(self.tokens) + len(tokens)) > self.context:
            raise LabError(f"the text would be {many:,} tokens, the context holds {self.context:,}; shorten it or begin anew")
        for file in self._files:
            file.check_in_place()

    def _embedded(self, tokens: list[int]) -> torch.Tensor:
        """[tokens, width] float32, what goes into the first layer."""
        weights = self.weights
        x = rows(weights.embedding, torch.tensor(tokens, device=self.device), self.dtype).float()
        return x if weights.scale == 1.0 else (x.to(self.dtype) * weights.scale).float()

    def _through(self, stop: int, head: bool = True) -> Iterator[tuple[dict, LayerShape, int, torch.Tensor | LayerCache]]:
        """The layers as they are handed out, with their shapes, turnings and caches; the text will be of `stop` tokens."""
        weights = self.weights
        return zip(weights.handed(head), weights.shapes, weights.turning, self.caches, strict=True)

    def _layers(self, tokens: list[int], ahead: int, head: bool) -> torch.Tensor:
        """x [tokens, width] after the last layer; `ahead`: how many cells will be wanted; `head`: whether logits follow."""
        start, count = len(self.tokens), len(tokens)
        self.grow(ahead)
        x = self._embedded(tokens)
        if count == 1 and self.graphed:
            if self.step is None:
                self.step = Step(self.weights, self.caches, self.tables, multiply, x, start, self.fused)
            return self.step(x, start)
        if count == 1 and start and self.compiled:
            return self._compiled(x, start)
        step = self._step(start, count)
        for layer, *rest in self._through(start + count, head):
            x = step(x, layer, *rest)
        return x

    def _compiled(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """x [n, width] of the tokens from number `start`, 1 at least, after the last layer, as each is when it comes alone."""
        tables = [(cos[start:start + len(x)], sin[start:start + len(x)]) for cos, sin in self.tables]
        place = start + len(self.dropped) if self.kv else start
        return self.compiled.tokens(x, self.caches, [tables[turning] for turning in self.weights.turning], place)

    def _step(self, start: int, count: int) -> Callable[..., torch.Tensor]:
        """What takes `count` tokens from number `start` on through one layer after another."""
        stop, masks = start + count, {}
        tables = [(cos[start:stop], sin[start:stop]) for cos, sin in self.tables]
        at = torch.arange(start, stop, device=self.device).add_(len(self.dropped)) if self.kv else None

        def packed(x: torch.Tensor, layer: dict, shape: LayerShape, turning: int, cache: LayerCache) -> torch.Tensor:
            return block(x, layer, shape, self.multiply, _packed(cache, at, shape, layer.get("sinks")), *tables[turning])

        def plain(x: torch.Tensor, layer: dict, shape: LayerShape, turning: int, cache: torch.Tensor) -> torch.Tensor:
            first = max(0, start + 1 - shape.window) if shape.window else 0

            def remember(new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                cache.narrow(2, start, count).copy_(new)
                return cache.narrow(2, first, stop - first).unbind()

            if count > 1 and shape.window not in masks:
                masks[shape.window] = _mask(start, stop, first, shape.window, self.device)
            return block(x, layer, shape, self.multiply, remember, *tables[turning], masks.get(shape.window))

        return packed if self.kv else plain

    def _each(self, start: int, count: int) -> Callable[..., torch.Tensor]:
        """What takes `count` tokens from number `start` on through one layer after another as each goes alone, to the bit: its
        matrices are unpacked once for all of them, and each looks at what was before it."""
        tables = [(cos[start:start + count], sin[start:start + count]) for cos, sin in self.tables]
        places = torch.arange(start, start + count, device=self.device).add_(len(self.dropped)).split(1)

        def step(x: torch.Tensor, layer: dict, shape: LayerShape, turning: int, cache) -> torch.Tensor:
            sinks = layer.get("sinks")

            def alone(at: int, new: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
                if self.kv:
                    return _packed(cache, places[at], shape, sinks)(new)(q)
                cache.narrow(2, start + at, 1).copy_(new)
                first = max(0, start + at + 1 - shape.window) if shape.window else 0
                keys, values = cache.narrow(2, first, start + at + 1 - first).unbind()
                q = q[0].mul(shape.scale).view(shape.kv_heads, -1, shape.head_dim).to(keys.dtype)
                return one(q, keys, values, shape, None, sinks).view(1, shape.heads, -1)

            def remember(new: torch.Tensor) -> Attend:
                return lambda q: torch.cat([alone(at, new[:, :, at:at + 1], q[at:at + 1]) for at in range(count)])

            return block(x, layer, shape, multiply_each, remember, *tables[turning])

        return step

    def _head(self, x: torch.Tensor, multiply: Matmul | None = None) -> torch.Tensor:
        head, softcap = self.weights.last(), self.weights.softcap
        if self.compiled and x.shape[0] == 1:
            return self.compiled.logits(x)
        logits = project(norm(x, head, "norm").to(self.dtype), head, "output", multiply or self.multiply).float()
        return torch.tanh(logits / softcap) * softcap if softcap else logits

    def grow(self, cells: int) -> None:
        """Room for so many cells: twice as many as there are, so that what is there is copied seldom."""
        if cells <= self.cells:
            if not self.tables:
                self._make_tables()
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
            larger = torch.empty(2, shape.kv_heads, after, shape.head_dim, dtype=self.cache_dtype, device=self.cache_device)
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


def quick_dtype(device: torch.device) -> torch.dtype:
    """The dtype that matrices are quickest multiplied in."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return multiply_in(torch.bfloat16, device.type)
