"""What a change of weights costs, to second order, from one pass back through the model: no type has to be tried.

For a small change d of the weights the mean KL divergence is d' F d / 2 nats a token, F the Fisher information: the mean square
of the gradient of log p(t), for tokens t drawn from the model's own answer at each scored position. Drawn independently,
the gradient of the sum over positions has the same expected square as the sum of squares; and of F only the diagonal is kept,
because rounding errors of neighbours have little to do with each other. Summed up over some 100,000 weights, the square of
the gradient of one draw a chunk says enough.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from ..errors import LabError
from ..runtime.model import PackedModel
from ..runtime.modules import PackedEmbedding, PackedLinear
from .corpus import scored
from .swapping import Matrix


class Part(NamedTuple):
    """What a matrix read and what came back to its answer, for one chunk: the gradient is `back`' @ `inputs`.

    `back` [tokens, rows] and `inputs` [tokens, cols]; of a look-up `inputs` is None, `back` [tokens, cols], `ids` [tokens] the
    rows. Far smaller than a gradient of every weight, which is made when it is asked for."""

    back: torch.Tensor
    inputs: torch.Tensor | None
    ids: torch.Tensor | None = None


class Fisher:
    """`parts` by chunk and tensor, over `tokens` scored positions. Stacks of experts have none."""

    def __init__(self):
        self.parts: list[dict[str, list[Part]]] = []
        self.tokens = 0
        self._last: tuple[str, torch.Tensor | None] = "", None

    def cost(self, name: str, error: torch.Tensor) -> float | None:
        """Mean KL divergence, nats a token, that `error` [rows, cols] on the weights comes to; modelled. None where nothing is
        known of that tensor."""
        if self._last[0] != name:
            self._last = name, self._squares(name, error.shape)
        squares = self._last[1]
        return None if squares is None else float((error.square() * squares).sum(dtype=torch.float64)) / (2 * self.tokens)

    def _squares(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The squared gradients, summed over chunks, float32 [rows, cols]."""
        found = None
        for chunk in self.parts:
            if name in chunk:
                square = gradient(chunk[name], shape).square_()
                found = square if found is None else found.add_(square)
        return found


def gradient(parts: list[Part], shape: tuple[int, ...]) -> torch.Tensor:
    """Of the drawn tokens' log-likelihood in one chunk, float32 [rows, cols]; a table that is both embedding and output has
    two parts."""
    made = torch.zeros(shape, device=parts[0].back.device)
    for back, inputs, ids in parts:
        if ids is None:
            made.addmm_(back.T, inputs)
        else:
            made.index_add_(0, ids, back)
    return made


def fisher_of(model: PackedModel, chunks: list[np.ndarray], found: Mapping[str, Matrix], seed: int = 0,
              stopped: Callable[[], bool] = lambda: False) -> Fisher:
    """Of the chunks' scored halves (int64 [context] each), one draw a chunk. What every matrix reads and what comes back to its
    answer is kept. Raises LabError where the gradients are no numbers."""
    out, generator = Fisher(), torch.Generator().manual_seed(seed)
    for ids in chunks:
        if stopped():
            break
        rows = scored(len(ids))
        out.parts.append(passed_back(model, torch.from_numpy(ids)[None].to(model.device), rows, found, generator))
        out.tokens += rows.stop - rows.start
    return out


def passed_back(model: PackedModel, ids: torch.Tensor, rows: slice, found: Mapping[str, Matrix],
                generator: torch.Generator) -> dict[str, list[Part]]:
    """One chunk [1, context] through the model and back, from tokens drawn at the scored `rows`."""
    places = {id(module): matrix.name for matrix in found.values() for module, _ in matrix.places}
    read: list[tuple[PackedLinear, torch.Tensor, torch.Tensor]] = []
    looked_up: list[tuple[PackedEmbedding, torch.Tensor]] = []

    def listen(module, inputs, output):
        output.retain_grad()
        read.append((module, inputs[0].detach(), output))

    def begin(module, inputs, output):
        output = output.detach().requires_grad_()       # gradients go back as far as here
        looked_up.append((module, output))
        return output

    hooks = [module.register_forward_hook(begin if isinstance(module, PackedEmbedding) else listen)
             for module in model.modules() if isinstance(module, (PackedLinear, PackedEmbedding))]
    try:
        with torch.enable_grad():
            logits = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - rows.start).logits[0, :-1].float()
            chances = logits.detach().softmax(-1).cpu()
            if not bool(chances.isfinite().all()):
                raise LabError("the model's logits are not numbers (NaN or infinite): its weights are damaged, or too large "
                               "for its dtype")
            drawn = torch.multinomial(chances, 1, generator=generator).to(logits.device)
            logits.log_softmax(-1).gather(1, drawn).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    parts: dict[str, list[Part]] = {}
    for module, x, y in read:
        back = y.grad.reshape(-1, y.shape[-1]).float()
        if module.heads:        # rows of the file are interleaved within heads: modules.in_order undone
            back = back.unflatten(-1, (module.heads, 2, -1)).transpose(-1, -2).flatten(-3)
        parts.setdefault(places[id(module)], []).append(Part(back, x.reshape(-1, x.shape[-1]).float()))
    for module, y in looked_up:
        back = y.grad.reshape(-1, y.shape[-1]).float() * module.scale
        parts.setdefault(places[id(module)], []).append(Part(back, None, ids.reshape(-1)))
    if not all(bool(part.back.isfinite().all()) for several in parts.values() for part in several):
        raise LabError("the gradients of this model are not numbers: load it with dtype='float32'")
    return parts
