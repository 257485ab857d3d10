"""One changed matrix after another, each run by itself: what is the same every time is kept."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ..kernels import Packed
from ..runtime.model import PackedModel
from . import passes
from .swapping import Matrix, layer_of, layers_of, swapped


class Runs:
    """Measures one changed matrix after another: the model's own answers, and what goes into each block, are kept."""

    def __init__(self, model: PackedModel, read: list[np.ndarray]):
        self.model, self.read, self.layers = model, read, list(layers_of(model))
        self.kept: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        self.held, self.spare = passes.Held(), passes.Held()

    def kld(self, matrix: Matrix, packed: Packed) -> float:
        """Mean KL divergence in nats a token with `packed` in the matrix's place."""
        if not self.kept:
            self.kept = [self._own(ids) for ids in self.read]
        first, total, count = layer_of(matrix.name), 0.0, 0
        if first < 0:       # the output matrix comes after all blocks, an embedding before them
            first = len(self.layers) if matrix.name == "output.weight" else 0
        with swapped(matrix, packed):
            for at, (ids, (own, inputs)) in enumerate(zip(self.read, self.kept, strict=True)):
                with _from_block(self.layers, first, inputs):
                    start = 0
                    where = f"chunk {at + 1} with {matrix.name} in {packed.format}"
                    for rows in passes.logits(self.model, ids, where, self.held):
                        rows = passes.log_probabilities(rows, self.spare)
                        base = own[start:start + len(rows)]
                        total += float((base.exp() * (base - rows)).sum())
                        start += len(rows)
                    count += start
        return total / count

    def _own(self, ids: np.ndarray) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(log-probabilities float64 [scored, vocabulary], what goes into each block and out of the last)."""
        inputs: list[torch.Tensor] = []

        def listen(module, args, kwargs, output):
            if not inputs:
                inputs.append(args[0] if args else kwargs["hidden_states"])
            inputs.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_hook(listen, with_kwargs=True) for layer in self.layers]
        try:
            rows = [passes.log_probabilities(part, self.spare).clone()
                    for part in passes.logits(self.model, ids, "the model's own answer", self.held)]
        finally:
            for hook in hooks:
                hook.remove()
        # Logits of a long chunk come in pieces, through a cache: then a block's inputs are several, and nothing is skipped.
        return torch.cat(rows), inputs if len(inputs) == len(self.layers) + 1 else []


@contextmanager
def _from_block(layers: list, first: int, inputs: list[torch.Tensor]) -> Iterator[None]:
    """The blocks before `first` give what they gave before, without being run."""
    skipped = layers[:first] if inputs else []
    try:
        for layer, kept in zip(skipped, inputs[1:], strict=False):
            layer.forward = lambda *_, kept=kept, **__: kept
        yield
    finally:
        for layer in skipped:
            del layer.forward
