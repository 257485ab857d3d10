"""The lean decoder: the main architectures run from a GGUF's packed weights, one text at a time, without transformers.

Few operations a layer, matrices with the same input fused, a cache with room to grow. It is the memory that
`generating.stream` reads on from.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable

import torch

from ..errors import LabError
from ..gguf import GGUFFile, read_gguf
from ..gguf.words import show_path
from ..kernels import Packed, rows
from ..kernels.arithmetic import multiply_in
from ..kernels.packing import STRATEGIES
from . import rope
from .generating import same_beginning, usable_context, whole
from .graphing import Step
from .heap import give_back
from .keys import Keys
from .layers import LayerShape, block, norm, project
from .tensors import GGUFSource
from .weights import Weights, read

__all__ = ["Decoder", "LayerShape", "block"]

_PIECE = 512             # tokens read at once at most: what a layer holds meanwhile grows with them
_ROOM = 256              # cells of the first cache


def multiply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """x [tokens, cols] times packed weights -> [tokens, rows], without the checks of `kernels.linear`."""
    return packed.kernels[0].matmul(x)


class Decoder:
    """A model that reads tokens and says what comes next.

    tokens: what was read. context: most tokens it may hold; trained: what the model was trained with. dtype: in which matrices
    are multiplied. path, architecture: of the file. why: what was chosen for the weights, in a line.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype, context: int | None = None, file: GGUFFile | None = None):
        self.weights, self.dtype, self.trained = weights, dtype, weights.trained
        self.context = usable_context(context, weights.trained)
        self.path, self.architecture = (file.paths[0], file.architecture) if file else ("", "")
        self.device = weights.embedding.device
        self.graphed, self.fused = self.device.type == "cuda", False    # a token's layers as one CUDA graph; by torch.compile
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
             progress: Callable[[str], None] | None = None) -> "Decoder":
        """The decoder of a GGUF (the first file of a sharded set). `strategy` as in `llmlab.load`; without a `dtype` that which
        the device multiplies quickest in. `compile`: compiled for this processor, or as without it where that cannot be, which
        `why` says; `progress` is told what is compiled. Raises LabError (BadFile for a damaged file) with one line naming the
        thing and the remedy."""
        if strategy not in STRATEGIES:
            raise LabError(f"strategy is {str(strategy)[:40]!r}; give one of {', '.join(STRATEGIES)}")
        file = path if isinstance(path, GGUFFile) else read_gguf(path)
        shown = show_path(file.paths[0])
        if file.is_projector:
            raise LabError(f"{shown} is the projector of a model, not a model; give the model's own file")
        dtype = dtype or _quick(torch.device(device))
        source, keys = GGUFSource(file), Keys(file.metadata, file.architecture, shown)
        if not compile or torch.device(device).type == "cuda":      # a card's own kernels stay; what lies between them is fused
            found = cls(read(source, keys, dtype, strategy, device), dtype, context, file)
            found.fused = compile
            return found
        from .compiled import NotCompiled, compiled
        try:
            weights, made = compiled(source, keys, dtype, strategy, torch.device(device), progress)
        except NotCompiled as error:
            found = cls.open(file, dtype, strategy, context, device)
            found.why = f"not compiled: {error}; {found.why}"
            return found
        found = cls(weights, torch.float32, context, file)
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
        self._long = False      # whether by the angles for longer texts

    def keep(self, tokens: list[int]) -> int:
        """Drop what is not the beginning of `tokens`; how many of them need not be read again (never all: the last one's
        logits are wanted)."""
        same = same_beginning(self.tokens, tokens)
        if self._is_long(len(tokens)) != self._long:
            self.forget()
        del self.tokens[same:]
        return len(self.tokens)

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
            if (long := self._is_long(len(self.tokens) + len(tokens))) != self._long:
                tokens = self.tokens + tokens       # what was read was turned by other angles: read it again
                self.forget()
                self._long = long
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
        self._grow(ahead)
        x = rows(weights.embedding, torch.tensor(tokens, device=self.device), self.dtype).float()
        if weights.scale != 1.0:
            x = (x.to(self.dtype) * weights.scale).float()
        if count == 1 and self.graphed:
            if self.step is None:
                self.step = Step(weights, self.caches, self.tables, multiply, x, start, self.fused)
            return self.step(x, start)
        tables = [(cos[start:stop], sin[start:stop]) for cos, sin in self.tables]
        if count == 1 and start and self.compiled:
            return self.compiled.token(x, self.caches, [tables[turning] for turning in weights.turning], start)
        masks: dict[int, torch.Tensor | None] = {}
        for layer, shape, turning, cache in zip(weights.layers, weights.shapes, weights.turning, self.caches, strict=True):
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

    def _grow(self, cells: int) -> None:
        """Room for so many cells: twice as many as there are, so that what is there is copied seldom."""
        if cells <= self.cells:
            return
        before, after = len(self.tokens), max(cells, 2 * self.cells, _ROOM)
        if self.context is not None:
            after = max(cells, min(after, self.context))
        self.cells, old, self.caches, self.tables, self.step = 0, self.caches, [], [], None
        for number, shape in enumerate(self.weights.shapes):
            larger = torch.empty(2, shape.kv_heads, after, shape.head_dim, dtype=self.cache_dtype, device=self.device)
            if self.compiled:       # packages take cells in one piece
                larger = larger.view(2, after, shape.kv_heads, shape.head_dim).transpose(1, 2)
            if before:
                larger[:, :, :before] = old[number][:, :, :before]
                old[number] = None
            self.caches.append(larger)
        for turning in self.weights.turnings:
            found = turning.long if self._long and turning.long else (turning.frequencies, turning.scale)
            self.tables.append(rope.table(*found, 0, after, turning.pairs))
        self.cells = after

    def _is_long(self, tokens: int) -> bool:
        """Whether a text of so many tokens goes by the factors for longer ones."""
        return any(turning.limit is not None and tokens > turning.limit for turning in self.weights.turnings)


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
