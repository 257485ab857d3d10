"""Rows of many texts through the layers together: one multiplication a matrix for all of them, each looking at its own cells.

A row's numbers do not depend on which rows are beside it: rows are filled up to sizes that are multiplied alike (see
`matrices`), and what a text looks at is its own alone.
"""

from collections.abc import Sequence

import torch

from ..errors import LabError
from . import rope
from .decoder import Decoder
from .gradients import without_gradients
from .layers import Remember, block, norm, project
from .matrices import Matrices
from .paged import PagedCache, Part

_ROOM = 1024            # positions of the first tables of angles


class Batcher:
    """Reads many texts' next tokens together, into a paged cache. The decoder lends its weights; its own text is left alone.

    context: most tokens of a text. why: in which way matrices are multiplied, in a line.
    """

    def __init__(self, decoder: Decoder, cache: PagedCache, matrices: Matrices | None = None):
        self.decoder, self.cache = decoder, cache
        self.matrices = matrices or Matrices(decoder)
        self.context, self.why = longest(decoder), self.matrices.why
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._positions = 0

    @without_gradients
    def read(self, tokens: Sequence[list[int]], parts: Sequence[Part], wanted: Sequence[bool], padded: int = 0) -> torch.Tensor:
        """Each part's `tokens`, as many as it counts -> the logits after the last token of the parts that are `wanted`,
        [wanted, vocabulary] in float32. `padded`: rows more that are multiplied for nothing, as batches of a fixed shape have
        them. Raises LabError for a token that is none, or a text longer than the context."""
        with self.decoder.lock:
            return self._read(tokens, parts, wanted, padded)

    def _read(self, tokens, parts, wanted, padded) -> torch.Tensor:
        device = self.decoder.device
        if (stop := max(part.first + part.count for part in parts)) > self.context:
            raise LabError(f"a text would be {stop:,} tokens, {self.context:,} can be read; shorten it")
        rows = sum(part.count for part in parts)
        many = self.matrices.even(rows + padded)
        # Rows beyond those of the parts are the first one's again: numbers like any others.
        ids = [token for some in tokens for token in some]
        places = [at for part in parts for at in range(part.first, part.first + part.count)]
        ids, places = (torch.tensor(one + one[:1] * (many - rows), device=device) for one in (ids, places))
        turns = [(cos.index_select(0, places), sin.index_select(0, places)) for cos, sin in self._angles(stop)]
        look, matrices = self.cache.look(parts), self.matrices
        x = matrices.embedded(ids)
        for number, (weights, shape, turning) in enumerate(zip(matrices.handed(any(wanted)), matrices.shapes, matrices.turning,
                                                               strict=True)):
            remember = self.cache.remember(number, look, shape, weights.get("sinks"))
            if many > rows:
                remember = _of_first(rows, remember, x)
            x = block(x, weights, shape, matrices.multiply, remember, *turns[turning])
        return self._logits(x, parts, wanted)

    def _logits(self, x: torch.Tensor, parts, wanted) -> torch.Tensor:
        last, at = [], -1
        for part, want in zip(parts, wanted, strict=True):
            at += part.count
            if want:
                last.append(at)
        if not last:
            return x.new_empty(0, self.matrices.vocabulary)
        count = len(last)
        last += last[:1] * (self.matrices.even(count) - count)
        head, softcap = self.matrices.last(), self.decoder.weights.softcap
        x = norm(x[torch.tensor(last, device=x.device)], head, "norm").to(self.matrices.dtype)
        logits = project(x, head, "output", self.matrices.multiply)[:count].float()
        return torch.tanh(logits / softcap) * softcap if softcap else logits

    def _angles(self, stop: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Cosines and sines of the first `stop` positions at least, a pair for each way of turning."""
        if stop > self._positions:
            self._positions = min(self.context, max(2 * self._positions, stop, _ROOM))
            self._tables = [rope.table(one.frequencies, one.scale, 0, self._positions, one.pairs)
                            for one in self.decoder.weights.turnings]
        return self._tables


def longest(decoder: Decoder) -> int:
    """Most tokens of a text that is read with others: where longer texts go by other angles (Phi-3's long factors), a text that
    grew longer would have to be read again, so there it is as many as go by the first."""
    limits = [turning.limit for turning in decoder.weights.turnings if turning.limit is not None]
    return min([decoder.context, *limits])


def _of_first(rows: int, remember: Remember, x: torch.Tensor) -> Remember:
    """Only the first rows are remembered and look; the others find nothing."""
    def first(new: torch.Tensor):
        attend = remember(new[:, :, :rows])

        def look(q: torch.Tensor) -> torch.Tensor:
            found = q.new_zeros(q.shape)
            found[:rows] = attend(q[:rows])
            return found

        return look

    return first
