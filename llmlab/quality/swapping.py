"""A loaded model's matrices by their tensors' names, each quantized anew from the weights as they were loaded."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..errors import LabError, UnknownName
from ..formats import FORMATS, quantize
from ..formats.encoders import ENCODERS
from ..kernels import Packed, dense, pack
from ..runtime.model import PackedModel


@dataclass(frozen=True, eq=False)
class Matrix:
    """A packed tensor of a model: what it holds, and every (module, attribute) that multiplies by it or looks rows up in it
    (two where the embedding is the output matrix, too)."""

    name: str
    packed: Packed
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def elements(self) -> int:
        return self.packed.rows * self.packed.cols * len(self.packed)

    def bytes(self, type: str) -> int:
        return FORMATS[type].bytes(self.elements)

    def fits(self, type: str) -> bool:
        """Whether its rows divide into blocks of that type."""
        return self.packed.cols % FORMATS[type].block == 0


def matrices(model: PackedModel) -> dict[str, Matrix]:
    """All of a model's packed tensors by name, in the order of its modules. Raises LabError for a model that is not packed."""
    if not isinstance(model, PackedModel):
        raise LabError("only a model that llmlab.load made from a GGUF holds tensors by their names; load one (an F16, BF16 or "
                       "F32 file, so that what is quantized is the original)")
    found: dict[str, tuple[Packed, list]] = {}
    for module in model.modules():
        for part, value in vars(module).items():
            if isinstance(value, Packed):
                found.setdefault(value.name, (value, []))[1].append((module, part))
    return {name: Matrix(name, packed, tuple(places)) for name, (packed, places) in found.items()}


def check_types(types, name: str = "types") -> None:
    """Raises LabError for a type that nobody writes."""
    for type in types:
        if type not in ENCODERS:
            raise UnknownName(f"{name}: {str(type)[:40]!r} is no type that can be written; there are {', '.join(ENCODERS)}")


def blocks_in(matrix: Matrix, type: str, importance: Mapping | None = None, effort: str = "normal") -> torch.Tensor:
    """The matrix in `type`: uint8 [rows, row_bytes], or [experts, rows, row_bytes], an expert at a time; with its row of an
    importance matrix where there is one. Raises LabError naming the tensor."""
    packed = matrix.packed
    matters = None
    if importance is not None and matrix.name in importance:
        matters = torch.as_tensor(importance[matrix.name])
        if matters.numel() != packed.cols * len(packed):
            raise LabError(f"the importance matrix has {matters.numel()} numbers for {matrix.name}, which has {packed.cols} "
                           f"columns{f' x {len(packed)} experts' if len(packed) > 1 else ''}: it was made of another model")
        matters = matters.reshape(len(packed), packed.cols)
    parts = []
    for expert, kernel in enumerate(packed.kernels):
        try:
            parts.append(quantize(kernel.dense(torch.float32), type, None if matters is None else matters[expert], effort))
        except LabError as error:
            raise LabError(f"{matrix.name}: {error}") from None
    return parts[0] if packed.experts is None else torch.stack(parts)


def packed_in(matrix: Matrix, type: str, blocks: torch.Tensor, strategy: str | None = None) -> Packed:
    """Blocks of that type as what takes the matrix's place."""
    packed = matrix.packed
    return pack(blocks, type, strategy or packed.strategy, packed.dtype, matrix.name, False, packed.device)


@contextmanager
def swapped(matrix: Matrix, packed: Packed):
    """The model multiplies by `packed` while it lasts."""
    try:
        for module, part in matrix.places:
            setattr(module, part, packed)
        yield
    finally:
        for module, part in matrix.places:
            setattr(module, part, matrix.packed)


def in_types(model: PackedModel, types: Mapping[str, str], importance: Mapping | None = None, effort: str = "normal",
             progress: Callable[[int, int], object] | None = None) -> PackedModel:
    """A copy of a packed model with tensors in other types ({tensor name: type}, `llmlab.mix`'s answer among them); everything
    that is not named, or has that type, is shared with the model. What is quantized are the weights as `model` holds them.

    Names of tensors that are no matrices (norms) are passed over. Raises LabError for a name the model does not have among its
    matrices while it is one of a matrix, a type nobody writes, and rows that do not divide.
    """
    check_types(types.values())
    found = matrices(model)
    if unknown := [name for name in types if name not in found and types[name] not in ("F32", "F16", "BF16")]:
        raise UnknownName(f"{str(unknown[0])[:80]!r} is no matrix of this model; there are {', '.join(list(found)[:3])}, ...")
    asked = [(found[name], type) for name, type in types.items() if name in found and type != found[name].packed.format]
    twin = copy.deepcopy(model)
    own = dict(zip(model.modules(), twin.modules(), strict=True))
    for at, (matrix, type) in enumerate(asked, 1):
        made = packed_in(matrix, type, blocks_in(matrix, type, importance, effort))
        for module, part in matrix.places:
            setattr(own[module], part, made)
        if progress:
            progress(at, len(asked))
    if loaded := getattr(model, "llmlab", None):
        twin.llmlab = replace(loaded, resident_bytes=twin.get_memory_footprint(),
                              why=f"{len(asked)} matrices quantized anew; {loaded.why}")
    return twin


def numbers(packed: Packed) -> torch.Tensor:
    """float32 [rows, cols] or [experts, rows, cols]."""
    return dense(packed, torch.float32)


def layer_of(name: str) -> int:
    """The block a tensor belongs to, -1 for none."""
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def layers_of(model: PackedModel) -> Iterator[nn.Module]:
    """The model's blocks in order, none where they are not where transformers keeps them."""
    yield from getattr(model.base_model, "layers", ())
