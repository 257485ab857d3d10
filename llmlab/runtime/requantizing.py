"""A packed model's twin: its block matrices rounded into another format, everything else shared."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from ..errors import LabError
from ..formats.toy import Toy
from ..kernels import Packed, pack
from ..retyping import check_widths, is_block_matrix
from .model import PackedModel


def requantized(model: PackedModel, toy: Toy, stopped: Callable[[], bool] = lambda: False,
                done: Callable[[int, int], object] = lambda at, of: None) -> PackedModel:
    """A copy of a packed model whose matrices inside the blocks are rounded to `toy`; embedding, output matrix, norms and
    biases are the model's own, and its memory too. What is rounded are the weights as `model` holds them.

    The copy runs by the strategies its model runs by. `done(at, of)` after each matrix; `stopped()` true ends it with a
    LabError. Raises LabError for a model that is not packed, and for a width that does not divide, naming the matrix.
    """
    if not isinstance(model, PackedModel):
        raise LabError("only a model that llmlab.load made from a GGUF holds packed weights that can be rounded again")
    format, found = toy.format, list(_matrices(model))
    check_widths(((packed.name, packed.cols) for _, _, packed in found), format)
    twin = copy.deepcopy(model)
    modules, made = dict(twin.named_modules()), {}
    for at, (module, part, packed) in enumerate(found, 1):
        if stopped():
            raise LabError("stopped while the weights were rounded")
        if id(packed) not in made:
            made[id(packed)] = pack(_rounded(packed, toy), format.name, packed.strategy, packed.dtype, packed.name, False)
        setattr(modules[module], part, made[id(packed)])
        done(at, len(found))
    twin.config._name_or_path = twin.name_or_path = f"{model.name_or_path} in {format.name}"
    if loaded := getattr(model, "llmlab", None):
        twin.llmlab = replace(loaded, path=twin.name_or_path, resident_bytes=twin.get_memory_footprint(),
                              why=f"block matrices rounded to {format.name}; {loaded.why}")
    return twin


def _matrices(model: nn.Module) -> Iterator[tuple[str, str, Packed]]:
    """(module, attribute, packed) of everything packed inside the blocks."""
    for name, module in model.named_modules():
        yield from ((name, part, value) for part, value in vars(module).items()
                    if isinstance(value, Packed) and is_block_matrix(value.name, value.shape))


def _rounded(packed: Packed, toy: Toy) -> torch.Tensor:
    """Blocks of the toy format, uint8 [rows, row_bytes] or [experts, rows, row_bytes]; an expert at a time."""
    parts = [toy.quantize(kernel.dense(torch.float32)) for kernel in packed.kernels]
    return parts[0] if packed.experts is None else torch.stack(parts)
