"""The compiled decoder's parts: weights as words, and for each kind of layer one package that takes a token through it.

Layers of one kind (the same shapes and layouts) share a package; their weights are its arguments, so they may lie anywhere, and
be handed out one layer after another. Many tokens at once go layer by layer as always, and each matrix is unpacked in pieces by
a package of its own, because a matmul of numbers is quicker then than one of codes.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from weakref import WeakKeyDictionary

import torch

from .. import hardware
from ..errors import LabError
from ..kernels import Packed, attending_once, dense, pages, scratch, words
from ..kernels.attending_once import Side, attend_once, encoded, lay, place, side
from ..kernels.pages import PAGE, CellType, cell_type
from ..kernels.words import Layout, Words
from ..units import GIB
from . import layers
from .cache import LayerCache, cells_of, hadamard
from .compiling import NotPackaged, Package, machine, package, settle
from .generating import usable_context
from .keys import Keys
from .layers import LayerShape, block, norm, project
from .tensors import Source
from .unlocked import unlocked
from .weights import Weights, read

Matrix = Words | torch.Tensor       # a format that cannot lie as words is numbers, float32
Signature = tuple[tuple[str, object], ...]
_BEFORE = 300           # tokens before the one that a package is tried with


class NotCompiled(LabError):
    """Why a model cannot be compiled here."""


def compiled(source: Source, keys: Keys, dtype: torch.dtype, strategy: str, device: torch.device,
             progress: Callable[[str], None] | None = None,
             kv: tuple[str, str] | None = None, rotate: bool = False,
             context: int | None = None) -> tuple[Weights, "Compiled"]:
    """A source's weights as words, and the packages that run them. `dtype`: in which many tokens at once are multiplied; one
    alone is in float32. `strategy` "compact" keeps them within 1.15 of the file's bytes, "fast" lays them out as is quickest,
    "auto" does where there is room. `kv`, `rotate`, `context`: of a cache of packed pages. Raises NotCompiled, and what
    `weights.read` raises."""
    if strategy not in ("auto", "fast", "compact"):
        raise NotCompiled(f"strategy {strategy!r} is there to compare with, and is never compiled")
    found = compilable(source, keys, device, kv, context)
    try:
        small = strategy == "compact" or strategy == "auto" and _quick_bytes(found) > hardware.ram_available() - GIB
        made = Compiled(laid_out(found, small), dtype, progress, small, kv, rotate)
    except NotPackaged as error:
        raise NotCompiled(str(error)) from error
    # The embedding is looked up row by row; nothing else of the file is read again.
    return made.weights, made


def compilable(source: Source, keys: Keys, device: torch.device, kv: tuple[str, str] | None = None,
               context: int | None = None) -> Weights:
    """A source's weights as they are before they are laid out; nothing of its matrices is read. Raises as `compiled` does."""
    if device.type != "cpu":
        raise NotCompiled("this is for processors; a card's layers run as one CUDA graph")
    found = read(source, keys, torch.float32, "compact", device)
    if any(shape.experts for shape in found.shapes):
        raise NotCompiled("which experts a token takes is known only when it comes")
    if kv is not None and cells_of(usable_context(context, found.trained)) <= PAGE:
        raise NotCompiled(f"a packed cache of {PAGE} cells at most is not for compiled code: give a context of more than "
                          f"{PAGE} tokens, or no kv")
    return found


class Compiled:
    """What a `Decoder` calls for one token, and its `multiply` for many. `bytes`: of all matrices, as they are laid out."""

    def __init__(self, weights: Weights, dtype: torch.dtype, progress: Callable[[str], None] | None = None,
                 small: bool = False, kv: tuple[str, str] | None = None, rotate: bool = False, unlock: bool = False):
        """weights: as `laid_out` gives them (`small`: how they were). They are asked for by `handed` and `last`, one of each
        kind here and all of them once for each pass, so layers may take turns in the same memory. unlock: other threads, which
        bring the next layers, run on while a package does. The rest as in `compiled`. Raises NotPackaged."""
        self._types, self._rotate = kv and tuple(cell_type(name) for name in kv), rotate
        self._shifts, self._held = attending_once.shifts(), WeakKeyDictionary()
        self.dtype, self.progress, self.softcap = dtype, progress or (lambda said: None), weights.softcap
        self.weights, self.layers, self.shapes = weights, weights.each(), weights.shapes
        self._unpackers: dict[Layout, Package] = {}
        kinds = [(_signature(layer), shape) for layer, shape in zip(self.layers, self.shapes, strict=True)]
        packages: dict[tuple, Package] = {}
        many = len(set(kinds))
        for layer, kind in zip(weights.handed(False), kinds, strict=True):
            if kind not in packages:
                found = self._step(layer, kind[1])
                packages[kind] = unlock and unlocked(found.path) or found
                self._unpack(layer)
            if len(packages) == many:
                break       # layers that are read from a disk are asked for only as long as there is something new
        self._steps: list[tuple[Callable, int]] = [(packages[kind], kind[1].window) for kind in kinds]
        self.head = weights.last()
        found = self._last()
        self._logits = unlock and unlocked(found.path) or found
        self._unpack(self.head)
        matrices = [value for part in (*self.layers, self.head) for value in part.values() if isinstance(value, Words)]
        self._flats: list[tuple[dict | None, list[torch.Tensor]]] = [(None, [])] * (len(self._steps) + 1)
        bits = sorted({matrix.layout.bits for matrix in matrices})
        scales = "the file's own scales" if small else "float32 scales"
        self.bytes = sum(matrix.bytes for matrix in matrices)
        told = f"{many} {'kind' if many == 1 else 'kinds'} of layer"
        self.why = (f"compiled for {machine()}: {len(matrices)} matrices as words of {' and '.join(map(str, bits))} bits with "
                    f"{scales}, {told}; many tokens at once in {str(dtype).removeprefix('torch.')}")

    def tokens(self, x: torch.Tensor, caches: list[torch.Tensor] | list[LayerCache],
               tables: list[tuple[torch.Tensor, torch.Tensor]], start: int) -> torch.Tensor:
        """x [n, width] float32 of the tokens from `start` (1 at least) on -> the same after all layers. To the bit what they
        give one at a time, but each layer takes all of them before the next is asked for. caches: [2, kv_heads, cells,
        head_dim] of each, cell after cell in memory, or packed pages; tables: their cosines and sines [n, 1, turned]."""
        through, places = self._through_packed if self._types else self._through, {}
        for number, (weights, held, (cos, sin)) in enumerate(zip(self.weights.handed(), caches, tables, strict=True)):
            one = partial(through, *self._steps[number], self._tensors(number, weights), held, places)
            if len(x) == 1:
                x = one(start, x, cos, sin)
            else:
                x = torch.cat([one(start + at, x[at:at + 1], cos[at:at + 1], sin[at:at + 1]) for at in range(len(x))])
        return x

    def _through(self, step: Callable, window: int, tensors: list[torch.Tensor], held: torch.Tensor, places: dict,
                 position: int, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """One token through one layer."""
        first = max(0, min(position - 1, position + 1 - window)) if window else 0
        if position - first not in places:
            places[position - first] = torch.tensor([position - first])
        keys, values = held[:, :, first:position + 1].transpose(1, 2).unbind()
        return step(x, keys, values, places[position - first], cos, sin, *tensors)[0]

    def _through_packed(self, step: Callable, window: int, tensors: list[torch.Tensor], held: LayerCache, places: dict,
                        position: int, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        held.grow(2 * PAGE)         # sizes that may change are two at least
        cell = held.next_cell()
        if (position, cell) not in places:
            places[position, cell] = torch.tensor([position], dtype=torch.int32), place(cell)
        x = step(x, cos, sin, *places[position, cell], self._shifts, *self._pages(held), *tensors)[0]
        held.count_one()
        return x

    def _tensors(self, number: int, weights: dict) -> list[torch.Tensor]:
        """A layer's, or of number -1 the head's, as its package takes them: found once for each dict."""
        if self._flats[number][0] is not weights:
            self._flats[number] = weights, _flat(weights)
        return self._flats[number][1]

    def _pages(self, cache: LayerCache) -> list[torch.Tensor]:
        """What a layer's package is given of its cache: the pages in use, two at least."""
        count = max(2, min(cache.length // PAGE + 1, cache.cells // PAGE))
        before, found = self._held.get(cache, ((), ()))
        now = count, *(tensor.data_ptr() for tensor in cache.tensors)
        if before != now:
            positions = cache.positions[0, :count * PAGE].view(count, PAGE)
            found = [positions.view(torch.float32), positions, *side(cache.keys, count).tensors,
                     *side(cache.values, count).tensors]
            if self._rotate:
                found.append(hadamard(cache.keys.head_dim & -cache.keys.head_dim))
            self._held[cache] = now, found
        return found

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, width] -> [1, vocabulary] float32."""
        return self._logits(x, *self._tensors(-1, self.weights.last()))[0]

    def multiply(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """x [tokens, cols] float32 times a matrix -> [tokens, rows]: what `layers.block` wants, for many tokens."""
        if isinstance(matrix, torch.Tensor):
            return torch.mm(x, matrix.T)
        unpack, tensors = self._unpackers[matrix.layout], matrix.tensors
        shifts, columns = words.shifts(matrix.layout), words.Columns(x.to(self.dtype), matrix.layout)
        y = columns.x.new_empty(x.shape[0], matrix.rows)
        step = max(2, scratch.rows_at_once(matrix.tensors[0].shape[1] * matrix.layout.tile, x.device))
        for start in range(0, matrix.rows, step):
            start = min(start, max(0, matrix.rows - 2))         # a package takes two rows at least
            part = slice(start, start + step)
            columns.times(unpack(*(t[part] for t in tensors), shifts)[0], y[:, part])
        return y.float()

    @contextlib.contextmanager
    def watched(self, watch: Callable[[str, Callable, dict, int | None], Callable]) -> Iterator[None]:
        """While it lasts, what `watch(name, package, weights, number)` gives is called in place of each package: "layers" (or
        "layers 1", "layers 2" where there are several kinds) with the layer's number, and "output" with None."""
        steps, logits = self._steps, self._logits
        kinds = list(dict.fromkeys(id(step) for step, _ in steps))
        names = {kind: f"layers {at}" if len(kinds) > 1 else "layers" for at, kind in enumerate(kinds, 1)}
        self._steps = [(watch(names[id(step)], step, layer, number), window)
                       for number, (layer, (step, window)) in enumerate(zip(self.layers, steps, strict=True))]
        self._logits = watch("output", logits, self.head, None)
        try:
            yield
        finally:
            self._steps, self._logits = steps, logits

    # ---- packages ------------------------------------------------------------------------------------------------

    def _step(self, layer: dict, shape: LayerShape) -> Package:
        signature, width = _signature(layer), layer["attn_norm"].shape[-1]
        token, turned = torch.linspace(-1, 1, width)[None], torch.ones(1, 1, shape.turned)
        if self._types:
            held = self._example(shape)
            paged = range(6, 6 + len(held) - self._rotate)
            example = [token, turned, turned.clone(), torch.tensor([_BEFORE], dtype=torch.int32), place(_BEFORE), self._shifts,
                       *held]
            return package(_one_packed_token(signature, shape, self._types, self._rotate), example + _flat(layer),
                           f"layer {signature} {shape} {self._types} {self._rotate}",
                           (words, layers, attending_once, pages, _one_packed_token, *_COMMON),
                           {i: {0: "pages"} for i in paged}, self.progress)
        cells = torch.zeros(4, shape.kv_heads, shape.head_dim)
        example = [token, cells, cells.clone(), torch.tensor([3]), turned, turned.clone()]
        return package(_one_token(signature, shape), example + _flat(layer), f"layer {signature} {shape}",
                       (words, layers, _one_token, *_COMMON), {1: {0: "cells"}, 2: {0: "cells"}}, self.progress)

    def _example(self, shape: LayerShape) -> list[torch.Tensor]:
        """Pages with `_BEFORE` tokens; a compiler must not know that some tensors are the same memory, and need not."""
        cache = LayerCache(tuple(known.name for known in self._types), shape.kv_heads, shape.head_dim, shape.head_dim,
                           cells=2 * PAGE)
        some = torch.linspace(-1, 1, 2 * shape.kv_heads * _BEFORE * shape.head_dim).sin_()
        cache.append(*some.view(2, 1, shape.kv_heads, _BEFORE, -1).unbind(), torch.arange(_BEFORE))
        return [tensor.clone() for tensor in self._pages(cache)]

    def _last(self) -> Package:
        signature, softcap = _signature(self.head), self.softcap

        def last(x, *tensors):
            head = _rebuilt(signature, tensors)
            found = project(norm(x, head, "norm"), head, "output", _Multiplying())
            return (torch.tanh(found / softcap) * softcap if softcap else found,)

        width = self.head["norm"].shape[-1]
        return package(last, [torch.linspace(-1, 1, width)[None], *_flat(self.head)], f"head {signature} {softcap}",
                       (words, norm, project, Compiled._last, *_COMMON), None, self.progress)

    def _unpack(self, weights: dict) -> None:
        """Packages that unpack these matrices, where there are none."""
        for matrix in weights.values():
            if isinstance(matrix, Words) and matrix.layout not in self._unpackers:
                self._unpackers[matrix.layout] = self._unpacker(matrix)

    def _unpacker(self, matrix: Words) -> Package:
        known, dtype = matrix.layout, self.dtype

        def unpack(*tensors):
            *held, shifts = tensors
            return (words.unpack(Words(known, 0, 0, tuple(held)), shifts, dtype),)

        pairs = known.held == "bytes"
        # Sizes that may change are two at least; small scales are held for pairs of tiles, everything else for each.
        tensors = [t[:2, :1].expand(-1, 2 if pairs and i == 1 else 2 + 2 * pairs, *t.shape[2:]).contiguous()
                   for i, t in enumerate(matrix.tensors)]
        dynamic = {i: {0: "rows", 1: "2*pairs" if pairs and i != 1 else "pairs"} for i in range(len(tensors))}
        return package(unpack, [*tensors, words.shifts(known)], f"unpacking_of_{known.bits}_bits {known} {dtype}",
                       (words.unpack, words.shifts, Compiled._unpacker), dynamic, self.progress)


def _one_token(signature: Signature, shape: LayerShape) -> Callable:
    """A layer as a function of flat tensors, for one token."""
    def step(x, keys, values, at, cos, sin, *tensors):
        def remember(new):
            for cells, found in zip((keys, values), new.transpose(1, 2), strict=True):
                cells.index_put_((at,), found)
            return keys.transpose(0, 1), values.transpose(0, 1)

        return (block(x, _rebuilt(signature, tensors), shape, _Multiplying(), remember, cos, sin),)

    return step


def _one_packed_token(signature: Signature, shape: LayerShape, types: tuple[CellType, CellType], rotate: bool) -> Callable:
    """A layer as a function of flat tensors, for one token, which is laid into packed pages."""
    def step(x, cos, sin, at, cell, shifts, seen, positions, *tensors):
        left = iter(tensors)
        sides = [Side.of(known, left) for known in types]
        matrix = next(left) if rotate else None
        weights = _rebuilt(signature, left)

        def rotated(x):
            return x if matrix is None else (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)

        def remember(new):
            new = rotated(new[:, :, 0])
            laid = [encoded(one, known, settle) for one, known in zip(new.unbind(), types, strict=True)]

            def attend(q):
                q = q.view(shape.kv_heads, -1, shape.head_dim)
                found = attend_once(rotated(q), tuple(one.numbers for one in laid), *sides, seen, at, shifts,
                                    scale=shape.scale, softcap=shape.softcap, window=shape.window, sinks=weights.get("sinks"),
                                    settle=settle)
                for one, of in zip(laid, sides, strict=True):
                    lay(one, of, cell)
                positions[cell[:1], cell[1:2]] = at
                return rotated(found).flatten(0, 1)[None]

            return attend

        return (block(x, weights, shape, _Multiplying(), remember, cos, sin),)

    return step


class _Multiplying:
    """x [1, cols] times a matrix while a function is traced; each input is arranged once for each layout."""

    def __init__(self):
        self.arranged: list[tuple] = []

    def __call__(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        if isinstance(matrix, torch.Tensor):
            return torch.mm(x, matrix.T)
        found = next((found for before, known, found in self.arranged if before is x and known == matrix.layout), None)
        if found is None:
            found = tuple(settle(part) for part in words.arrange(x[0], matrix.layout))
            self.arranged.append((x, matrix.layout, found))
        return words.multiply(found, matrix)[None]


def _quick_bytes(weights: Weights) -> float:
    """What the matrices hold when they are laid out as is quickest."""
    found = 0.0
    for part in (*weights.layers, weights.head):
        for matrix in (value for value in part.values() if isinstance(value, Packed)):
            known = words.layout(matrix.format)
            found += matrix.rows * matrix.cols * (known.bits_per_weight(matrix.cols) / 8 if known else 4)
    return found


# ---- laying out -------------------------------------------------------------------------------------------------

Lay = Callable[[Packed, bool], Matrix]


def laid_out(weights: Weights, small: bool = False, lay: Lay | None = None) -> Weights:
    """All matrices of weights that were read by "compact" as words, those with the same input fused; the embedding stays as it
    is. `lay`: what to make of a matrix, `lay_out` or `described`. Raises NotCompiled."""
    made = [laid_out_layer(layer, shape, small, lay) for layer, shape in zip(weights.layers, weights.shapes, strict=True)]
    return replace(weights, layers=tuple(layer for layer, _ in made), shapes=tuple(shape for _, shape in made),
                   head=each_laid_out(weights.head, small, lay))


def laid_out_layer(layer: dict, shape: LayerShape, small: bool = False, lay: Lay | None = None) -> tuple[dict, LayerShape]:
    """One layer of it, and its shape."""
    return _fused(each_laid_out(layer, small, lay), shape)


def lay_out(matrix: Packed, small: bool = False) -> Matrix:
    """A matrix as words, or as numbers where its codes are none. Raises NotCompiled where those would be too large."""
    known = _layout(matrix.format, small)
    return words.lay_out(matrix.blocks, matrix.format, matrix.cols, known) if known else dense(matrix, torch.float32)


def described(matrix: Packed, small: bool = False) -> Matrix:
    """What `lay_out` would give, without its numbers: tensors on torch's "meta" device. Nothing of the file is read."""
    known = _layout(matrix.format, small)
    if known is None:
        return torch.empty(matrix.rows, matrix.cols, device="meta")
    return Words(known, matrix.rows, matrix.cols, tuple(torch.empty(matrix.rows, *shape, device="meta") for shape in
                                                        _shapes(matrix.format, matrix.cols, matrix.blocks.shape[1], known)))


def each_laid_out(weights: dict, small: bool = False, lay: Lay | None = None) -> dict:
    """Matrices of a layer, or of the head, each by itself."""
    lay = lay or lay_out
    return {name: lay(value, small) if isinstance(value, Packed) else value for name, value in weights.items()}


def _layout(format: str, small: bool) -> Layout | None:
    """None: as numbers. Raises NotCompiled where those would be too large."""
    found = words.layout(format, None, small)
    if found is None and small and format != "F32":
        raise NotCompiled(f"no way is known to lay {format} as words within {words.ROOM:.2f} of the file")
    return found


@cache
def _shapes(format: str, cols: int, bytes: int, known: Layout) -> list[torch.Size]:
    """What a row of so many bytes becomes, laid out."""
    row = torch.zeros(1, bytes, dtype=torch.uint8)
    return [part.shape[1:] for part in words.lay_out(row, format, cols, known).tensors]


def _fused(weights: dict, shape: LayerShape) -> tuple[dict, LayerShape]:
    """Matrices with the same input and layout under one another."""
    weights, names = dict(weights), {}
    for kind in ("inputs", "ff"):
        groups: list[list[str]] = []
        for name in getattr(shape, kind):
            if groups and _alike(weights[groups[-1][-1]], weights[name]):
                groups[-1].append(name)
            else:
                groups.append([name])
        for group in groups:
            if len(group) > 1:
                joined = "_".join(group)
                parts, biases = [weights.pop(name) for name in group], [weights.pop(f"{name}.bias", None) for name in group]
                weights[joined] = _stacked(parts)
                if any(bias is not None for bias in biases):
                    weights[f"{joined}.bias"] = torch.cat([torch.zeros(part.rows) if bias is None else bias
                                                           for part, bias in zip(parts, biases, strict=True)])
        names[kind] = tuple("_".join(group) for group in groups)
    return weights, replace(shape, **names)


def _alike(one: Matrix, other: Matrix) -> bool:
    return isinstance(one, Words) and isinstance(other, Words) and one.layout == other.layout


def _stacked(parts: list[Words]) -> Words:
    first = parts[0]
    return Words(first.layout, sum(part.rows for part in parts), first.cols,
                 tuple(torch.cat(tensors) for tensors in zip(*(part.tensors for part in parts), strict=True)))


# ---- weights as flat tensors ------------------------------------------------------------------------------------

def _signature(weights: dict) -> Signature:
    """What of the weights is no tensor: in the order of names, for words their layout and size, for numbers themselves."""
    def one(value):
        if isinstance(value, Words):
            return value.layout, value.rows, value.cols
        return "tensor" if isinstance(value, torch.Tensor) else value

    return tuple((name, one(weights[name])) for name in sorted(weights))


def _flat(weights: dict) -> list[torch.Tensor]:
    found = []
    for name in sorted(weights):
        value = weights[name]
        found += value.tensors if isinstance(value, Words) else [value] if isinstance(value, torch.Tensor) else []
    return found


def _rebuilt(signature: Signature, tensors: Iterable[torch.Tensor]) -> dict:
    left, found = iter(tensors), {}
    for name, kind in signature:
        if isinstance(kind, tuple):
            known, rows, cols = kind
            found[name] = Words(known, rows, cols, tuple(next(left) for _ in range(words.parts(known))))
        else:
            found[name] = next(left) if kind == "tensor" else kind
    return found


_COMMON = (_Multiplying, _signature, _flat, _rebuilt, settle)       # of every package's source
