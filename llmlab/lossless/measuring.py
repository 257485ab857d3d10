"""What is in the bits of real weights: the entropy of their signs, exponents and mantissas, and the size that allows."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import erf, frexp, log2, prod, sqrt
from pathlib import Path

import numpy as np
import torch

from ..catalog import Table
from ..errors import BadFile, LabError
from ..gguf import read_gguf
from ..gguf.words import show_path
from ..stores import place_of
from .coding import LAYOUTS, words_of

ONCE = 1 << 22          # weights counted at a time
_BY_NAME = {layout.name: layout for layout in LAYOUTS.values()}


@dataclass(frozen=True)
class Entropy:
    """Bits a weight that the fields of a tensor's floats hold, by how often each value occurs in it: measured, order 0.

    `sign` of 1 bit, `exponent` of 8 (F16: 5), `mantissa` of 7 (F16: 10, F32: 23, of which the lower 16 are taken as a field
    of their own). `source` is what the file stores, where `type` is not: "F32" weights rounded to BF16, or "Q4_1", whose
    numbers were made by a quantizer and not by training.
    """

    name: str
    type: str
    elements: int
    sign: float
    exponent: float
    mantissa: float
    source: str = ""

    @property
    def stored(self) -> int:
        """Bits a weight as a plain float."""
        return _BY_NAME[self.type].bits + _BY_NAME[self.type].rest

    @property
    def bits(self) -> float:
        """The floor of a code of the exponents alone: their entropy, and every other bit as it is."""
        return self.exponent + _BY_NAME[self.type].rest

    @property
    def ratio(self) -> float:
        """That floor over the plain float."""
        return self.bits / self.stored

    @property
    def all_bits(self) -> float:
        """What coding every field would come to: how little signs and mantissas would add."""
        return self.sign + self.exponent + self.mantissa


@dataclass(frozen=True, repr=False)
class Entropies:
    """One `Entropy` a tensor, and `total`, where every tensor has a code of its own (means weighted by elements)."""

    name: str
    tensors: tuple[Entropy, ...]
    left_out: int           # tensors that are no floats, or of a type that was not asked for

    @property
    def total(self) -> Entropy:
        count = sum(one.elements for one in self.tensors)

        def mean(part: str) -> float:
            return sum(getattr(one, part) * one.elements for one in self.tensors) / count

        sources = {one.source for one in self.tensors}
        return Entropy(self.name, self.tensors[0].type, count, mean("sign"), mean("exponent"), mean("mantissa"),
                       " and ".join(sorted(sources - {""})))

    @property
    def bytes(self) -> int:
        """Of all tensors with their exponents coded at the floor."""
        return round(sum(one.bits * one.elements for one in self.tensors) / 8)

    @property
    def stored_bytes(self) -> int:
        """Of the same as plain floats."""
        return sum(one.stored * one.elements for one in self.tensors) // 8

    def table(self) -> Table:
        """A row a tensor and the whole last; bits a weight."""
        rows = [{"tensor": one.name, "type": f"{one.type} of {one.source}" if one.source else one.type,
                 "weights": one.elements, "sign": one.sign, "exponent": one.exponent, "mantissa": one.mantissa,
                 "floor": one.bits, "of plain": one.ratio} for one in (*self.tensors, self.total)]
        bits = "{:.3f}".format
        return Table(rows, {"weights": "{:,}".format, "sign": bits, "exponent": bits, "mantissa": bits, "floor": bits,
                            "of plain": "{:.1%}".format})

    def __repr__(self) -> str:
        total = self.total
        made = f" (of {total.source})" if total.source else ""
        return (f"{self.name}: {total.elements:,} weights in {total.type}{made}: exponents hold {total.exponent:.3f} bits, "
                f"signs {total.sign:.3f}, mantissas {total.mantissa:.3f}; with exponents coded {total.bits:.3f} bits a weight "
                f"instead of {total.stored}, {total.ratio:.1%} (measured; the floor of such a code)")


def entropy(tensor: torch.Tensor, name: str = "weights", source: str = "") -> Entropy:
    """Of a tensor of bfloat16, float16 or float32. Raises LabError for another dtype, and where there are no weights."""
    layout = LAYOUTS.get(tensor.dtype) if isinstance(tensor, torch.Tensor) else None
    if layout is None or not tensor.numel():
        raise LabError(f"{name}: a tensor of bfloat16, float16 or float32 with weights in it has exponents, not "
                       f"{getattr(tensor, 'dtype', type(tensor).__name__)} {list(getattr(tensor, 'shape', ()))}")
    words, wide = words_of(tensor), layout.words is np.uint32
    high, low = np.zeros(1 << 16, np.int64), np.zeros(1 << 16, np.int64)
    for start in range(0, len(words), ONCE):
        part = words[start:start + ONCE]
        high += _counted(part >> 16 if wide else part)
        if wide:
            low += _counted(part & 0xFFFF)
    mantissa = layout.mantissa - 16 * wide
    by_field = high.reshape(2, 1 << layout.bits, 1 << mantissa)
    return Entropy(name, layout.name, len(words), _entropy(by_field.sum((1, 2))), _entropy(by_field.sum((0, 2))),
                   _entropy(by_field.sum((0, 1))) + (_entropy(low) if wide else 0.0), source)


def measure(model: "str | os.PathLike | Mapping[str, torch.Tensor]", type: str | None = None,
            dequantized: bool = False) -> Entropies:
    """The entropies of a model's weights: of a .safetensors file, a folder of them, a .gguf, a name that `llmlab.load` takes,
    or of tensors by name.

    `type` "BF16" (or "F16", "F32") rounds each tensor to it first; None takes each as it is stored. Tensors of a GGUF that are
    quantized are left out, unless `dequantized`: then their numbers are measured, which are what a quantizer made of the
    weights and not the weights (SmolLM2's 16 levels a block of Q4_1 happen to come within 0.01 bits of trained weights).

    Raises LabError where there is nothing to measure.
    """
    if type is not None and type not in _BY_NAME:
        raise LabError(f"type is {str(type)[:40]!r}; give one of {', '.join(_BY_NAME)}")
    if isinstance(model, Mapping):
        shown, found = "weights", ((name, tensor, "") for name, tensor in model.items())
    else:
        place = place_of(model, "a .gguf or .safetensors file, or of a folder of them")
        shown = place.name
        found = _of_gguf(place, dequantized) if place.suffix == ".gguf" else _of_safetensors(place)
    rows, left_out = [], 0
    for name, tensor, source in found:
        if tensor is None or tensor.dtype not in LAYOUTS or not tensor.numel():
            left_out += 1
            continue
        kept = LAYOUTS[tensor.dtype].name
        if type not in (None, kept):
            tensor, source = tensor.to(_BY_NAME[type].dtype), source or kept
        rows.append(entropy(tensor, name, source))
    if not rows:
        raise LabError(f"{shown} holds no floats to measure: its {left_out} tensors are quantized or no numbers; "
                       "dequantized=True measures a GGUF's quantized tensors as numbers")
    return Entropies(shown, tuple(sorted(rows, key=lambda one: -one.elements)), left_out)


def of_gaussian(sigma: float = 1.0, type: str = "BF16") -> float:
    """Bits of the exponents of normally distributed weights of that standard deviation, rounded to nearest: exact to the
    float's own range (5 bits of F16 end where small weights turn denormal).

    The exponent is e where |w| lies in [2^e, 2^(e+1)), both moved down by the half step that rounding takes: a normal
    variable lies in there with a probability of erf's difference. It depends on sigma through its place between two powers
    of two alone, and hardly on that.
    """
    if not (isinstance(sigma, (int, float)) and 0 < sigma < float("inf")) or type not in _BY_NAME:
        raise LabError(f"sigma is {sigma!r:.40} and type {type!r:.40}; give a standard deviation above 0 and one of "
                       f"{', '.join(_BY_NAME)}")
    layout = _BY_NAME[type]
    bias, down = (1 << layout.bits - 1) - 1, 1 - 2.0 ** -(layout.mantissa + 2)
    first, last = 1 - bias, min(bias, frexp(sigma)[1] + 6)

    def below(power: int) -> float:
        return erf(2.0 ** power * down / sigma / sqrt(2))

    edges = [0.0, *(below(power) for power in range(max(first, frexp(sigma)[1] - 60), last + 1)), 1.0]
    return -sum(p * log2(p) for a, b in zip(edges, edges[1:], strict=False) if (p := b - a) > 0)


def _counted(words: np.ndarray) -> np.ndarray:
    """How often each of 2^16 values occurs."""
    return torch.bincount(torch.from_numpy(words.astype(np.int32)), minlength=1 << 16).numpy()


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return abs(float((shares * np.log2(shares)).sum()))


def _of_safetensors(place: Path) -> Iterator[tuple[str, torch.Tensor, str]]:
    for path in shards(place):
        with opened(path) as file:
            for name in file.keys():        # no mapping: it cannot be gone through itself
                yield name, file.get_tensor(name), ""


def _of_gguf(place: Path, dequantized: bool) -> Iterator[tuple[str, "torch.Tensor | None", str]]:
    from ..formats import dequantize
    file = read_gguf(place)
    for name, tensor in file.tensors.items():
        plain = tensor.type in _BY_NAME
        if not plain and (not dequantized or not tensor.type.startswith(("Q", "IQ", "TQ", "MX"))):
            yield name, None, ""
            continue
        blocks = file.data(name).reshape(-1, tensor.bytes // prod(tensor.shape[1:])) if tensor.bytes else file.data(name)
        numbers = dequantize(blocks, tensor.type, _BY_NAME[tensor.type].dtype if plain else torch.float32)
        yield name, numbers if plain else numbers.bfloat16(), "" if plain else tensor.type


def shards(place: Path) -> list[Path]:
    """The safetensors files of a path. Raises BadFile where there is none."""
    found = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not found:
        raise BadFile(f"{show_path(str(place))} holds no .safetensors file; give a folder that does, or a .gguf")
    return found


def opened(path: Path):
    """A safetensors file, its tensors mapped. Raises BadFile."""
    from safetensors import SafetensorError, safe_open
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise BadFile(f"{show_path(str(path))} is no whole safetensors file: {error}") from None


