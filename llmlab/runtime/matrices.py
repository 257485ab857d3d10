"""The matrices that many rows are multiplied by, as is quickest for them, and so that no row's numbers depend on the others.

A text alone is bound by the bytes of its weights, so they stay packed. Sixteen rows and more are bound by arithmetic, and what
unpacking costs comes on top: where memory allows the weights are numbers here, side by side where they have the same input.

A library takes other ways for few rows than for many, and its sums then differ in their last bits. So rows are filled up to the
next number of them that is multiplied as many are; which numbers those are is measured, once on a machine. (MKL on AVX2: with
one thread 4 and more; with two, which share the rows out, 4, 8, 12 and more.) Few rows are bound by bytes again, and compiled
code multiplies them by packed weights where that gives the same bits, see `few`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from .. import hardware
from ..kernels import Packed, dense, rows, words
from ..kernels.tuning import remembered
from ..kernels.words import Words
from ..units import GIB, format_bytes
from .decoder import Decoder
from .few import SHARE, Both, Few
from .layers import LayerShape, Matmul
from .weights import Weights

_FEW = 64                               # numbers of rows up to this are measured each
_MORE = (65, 77, 96, 130, 200, 255)     # and of those beyond it these: where one differs all are filled up to multiples of it
_MANY = 256                             # rows that the others are compared with
_MEASURED = *range(1, _FEW + 1), *_MORE
_EVEN = 32                              # numbers of a row that what lies between matrices takes at once: so many rows are alike
_ROWS = 1024                            # of a matrix it is measured with, at most


class Matrices:
    """A decoder's weights for many rows. `shapes`, `turning`, `handed` and `last` as `Weights` has them, `multiply` as
    `layers.block` takes it, in `dtype`.

    numbers: whether they are held as plain numbers (None: where there is room for them beside `reserved` bytes). compile: few
    rows are multiplied by compiled code where that is quicker; made once on a machine, of which `progress` is told. bytes: what
    they take then. alike: numbers of rows that are multiplied as many are, of those measured (None on a card, where it is not
    looked for). why: what was chosen, in a line.
    """

    def __init__(self, decoder: Decoder, numbers: bool | None = None, reserved: int = 0, compile: bool = False,
                 progress: Callable[[str], None] | None = None):
        weights = decoder.weights
        self.weights, self.dtype, self.turning = weights, decoder.dtype, weights.turning
        self.vocabulary, self.bytes, self._table = weights.embedding.rows, 0, None
        dtype = decoder.cache_dtype
        wanted = sum(one.rows * one.cols for one in _matrices(weights)) * dtype.itemsize
        free = _free(decoder.device) - reserved - GIB
        stays = type(weights) is Weights        # layers that come and go are not ours to keep
        if stays and (wanted <= free if numbers is None else numbers):
            self.dtype, self.bytes, self.multiply = dtype, wanted, _multiply
            made = [_as_numbers(layer, shape, dtype) for layer, shape in zip(weights.layers, weights.shapes, strict=True)]
            layers, self.shapes = [layer for layer, _ in made], [shape for _, shape in made]
            head = {name: _numbers(value, dtype) for name, value in weights.head.items()}
            self.handed, self.last = lambda head=True: layers, lambda: head
            if weights.head["output"] is weights.embedding:
                self._table = head["output"]
            self.why = f"matrices as {_name(dtype)} numbers in {format_bytes(wanted)}"
        else:
            self.shapes, self.handed, self.last, self.multiply = weights.shapes, weights.handed, weights.last, decoder.multiply
            self.why = decoder.why
            if stays and numbers is None:
                self.why = f"{format_bytes(wanted)} for numbers are not free; {self.why}"
        self.alike, self.few = None, 0
        if decoder.device.type == "cpu":
            kinds = {(min(one.rows, _ROWS), one.cols) for one in _matrices(weights)}
            self.alike = [n for n in _MEASURED if all(_numbers_alike(*kind, dtype) >> n & 1 for kind in kinds)]
        if self.alike is not None and any(shape.experts for shape in self.shapes):      # each gets as many rows as chose it
            self.multiply = partial(_filled_up, self.multiply, self.even)
        elif compile and self.bytes and self.alike and dtype == torch.float32 and SHARE * wanted <= free - wanted:
            if not any(one.cols % _EVEN for one in _matrices(weights)):
                self._take_few(layers, head, progress)

    def _take_few(self, layers: list[dict], head: dict, progress: Callable[[str], None] | None) -> None:
        """Few rows are multiplied by codes from now on."""
        parts = [*zip(layers, self.weights.layers, self.weights.shapes, strict=True), (head, self.weights.head, None)]
        few = Few([(part[name], [before[one] for one in names]) for part, before, shape in parts
                   for name, names in _under(before, shape).items()], self.even, progress)
        self.why = f"{self.why}; {few.why}"
        if few.found:
            for part, _, _ in parts:
                part.update({name: few.found[id(value)] for name, value in part.items() if id(value) in few.found})
            self.bytes, self.few, self.multiply = self.bytes + few.bytes, few.most, partial(_few_or_many, self._filled)

    def even(self, count: int) -> int:
        """So many rows, filled up."""
        return count if count <= self.few else self._filled(count)

    def _filled(self, count: int) -> int:
        if self.alike is None:
            return count
        if count > _FEW and self.alike[-len(_MORE):] == list(_MORE):
            return count
        return next((n for n in self.alike if count <= n <= _FEW), -(-count // _FEW) * _FEW)

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """[n, width] float32, what goes into the first layer."""
        weights = self.weights
        x = rows(weights.embedding, ids, self.dtype) if self._table is None else self._table.index_select(0, ids)
        return x.float() if weights.scale == 1.0 else (x.to(self.dtype) * weights.scale).float()


def _multiply(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, matrix.T)


def _filled_up(multiply: Matmul, even: Callable[[int], int], x: torch.Tensor, matrix) -> torch.Tensor:
    """The same for any number of rows."""
    many = even(count := len(x))
    return multiply(x, matrix) if many == count else multiply(torch.cat([x, x[:1].expand(many - count, -1)]), matrix)[:count]


def _few_or_many(even: Callable[[int], int], x: torch.Tensor, matrix: torch.Tensor | Both) -> torch.Tensor:
    """Few rows by codes where the matrix has some; more by numbers, filled up."""
    if isinstance(matrix, Both):
        if (found := matrix.few(x)) is not None:
            return found
        matrix = matrix.numbers
    return _filled_up(_multiply, even, x, matrix)


def _as_numbers(layer: dict, shape: LayerShape, dtype: torch.dtype) -> tuple[dict, LayerShape]:
    """A layer's matrices as numbers, those with the same input under one another."""
    layer = {name: _numbers(value, dtype) for name, value in layer.items()}
    names = _joined(shape)
    for group in (names for names in names.values() if len(names) > 1):
        parts, biases = [layer.pop(name) for name in group], [layer.pop(f"{name}.bias", None) for name in group]
        layer["_".join(group)] = torch.cat(parts)
        if any(bias is not None for bias in biases):
            layer[f"{'_'.join(group)}.bias"] = torch.cat([part.new_zeros(len(part)) if bias is None else bias.to(dtype)
                                                          for part, bias in zip(parts, biases, strict=True)])
    fused = {kind: ("_".join(group),) if group else getattr(shape, kind) for kind, group in names.items()}
    return layer, replace(shape, dtype=dtype, **fused)


def _joined(shape: LayerShape) -> dict[str, tuple[str, ...]]:
    """The names of those that have the same input."""
    return {"inputs": shape.inputs, "ff": () if shape.experts else shape.ff, "shared": shape.shared}


def _under(layer: dict, shape: LayerShape | None) -> dict[str, tuple[str, ...]]:
    """By the name it has as numbers, what each matrix of a layer, or of the head, is made of."""
    groups = list(_joined(shape).values()) if shape else []
    taken = {name for names in groups for name in names}
    alone = [(name,) for name, value in layer.items() if isinstance(value, (Packed, Words)) and name not in taken]
    return {"_".join(names): names for names in groups + alone if names}


def _numbers(value, dtype: torch.dtype):
    """A matrix, or each of a stack, as numbers; anything else as it is."""
    if isinstance(value, tuple) and not isinstance(value, Words):
        return tuple(_numbers(one, dtype) for one in value)
    if isinstance(value, Packed):
        return dense(value, dtype)
    if isinstance(value, Words):
        known = value.layout
        found = words.unpack(value, words.shifts(known), dtype).view(value.rows, -1, words.RUN, known.lanes)
        return found.transpose(2, 3).flatten(1)[:, :value.cols].contiguous()
    return value


def _matrices(weights: Weights) -> Iterator[Packed | Words]:
    """All that rows are multiplied by; the embedding only where it is the output too."""
    for part in (*weights.each(), weights.head):
        for value in part.values():
            for one in value if isinstance(value, tuple) and not isinstance(value, Words) else (value,):
                if isinstance(one, (Packed, Words)):
                    yield one


@remembered
def _numbers_alike(rows: int, cols: int, dtype: torch.dtype) -> int:
    """The sum of 2^n for numbers n of rows of x that are multiplied by a matrix [rows, cols] as many are, to the bit. Many
    rows are looked at: 16 bits hide most differences of sums, so that one may be the same by chance."""
    random = torch.Generator().manual_seed(0)
    x, matrix = (torch.randn(many, cols, generator=random).to(dtype) for many in (_MANY, rows))
    y = torch.mm(x, matrix.T)
    return sum(1 << n for n in _MEASURED if all(torch.equal(torch.mm(x[at:at + n].clone(), matrix.T), y[at:at + n])
                                                for at in range(0, max(n, _FEW) - n + 1, n)))


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else hardware.ram_available()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
