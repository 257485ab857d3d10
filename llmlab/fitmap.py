"""The whole catalogue at once: for every model and card, the best quant with which all of it fits."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from . import catalog
from .catalog import Gpu
from .errors import LabError
from .fitting import QUANT_LADDER
from .graphs import Request, compute_high
from .memory import cache_bytes, cache_types, card_bytes, check_settings
from .overhead import overhead_term
from .settings import ladder as checked_ladder
from .settings import quants_to_try
from .shapes import ModelSpec, model_spec, remembered
from .units import format_count


@dataclass(frozen=True, repr=False)
class FitMap:
    """`best[i][j]`: the most faithful quant of `ladder` with which model i fits card j, or None."""

    models: tuple[ModelSpec, ...]
    cards: tuple[Gpu, ...]
    context: int
    kv: tuple[str, str]
    ladder: tuple[str, ...]
    best: tuple[tuple[str | None, ...], ...]

    def count(self) -> int:
        """Pairs that fit in some quant."""
        return sum(quant is not None for row in self.best for quant in row)

    @property
    def answer(self) -> str:
        """The map in one sentence."""
        pairs = len(self.models) * len(self.cards)
        def many(n: int, what: str) -> str:
            return f"{n} {what}{'s' if n != 1 else ''}"
        return (f"{self.count():,} of {pairs:,} pairs fit whole with {self.context:,} tokens of context: "
                f"{many(len(self.models), 'model')} on {many(len(self.cards), 'card')}.")

    @property
    def table(self) -> catalog.Table:
        """A row a model, smallest first, and a column a card: the quant, empty where none fits."""
        names = [card.id for card in self.cards]
        return catalog.Table(({"model": spec.name, "params": spec.params, **dict(zip(names, row, strict=True))}
                              for spec, row in zip(self.models, self.best, strict=True)), {"params": format_count})

    def to_frame(self):
        """The table as a pandas DataFrame. Raises LabError where pandas is not installed."""
        return self.table.to_frame()

    def __repr__(self) -> str:
        return f"<map: {self.answer}>"

    def figure(self):
        """A heat map, models by cards (plotly)."""
        from .lab.figures import map_figure
        return map_figure(self)


def fit_map(models: Iterable | None = None, cards: Iterable | None = None, context: int = 8192,
            kv: str | tuple[str, str] = "f16", ladder: tuple[str, ...] = QUANT_LADDER, ubatch: int = 512) -> FitMap:
    """Best quant that fits, for every model on every card: `llmlab.fit_map`.

    The same arithmetic as `fit` under llama.cpp with all layers on one card, and the same verdict "fits".
    models None: the catalogue; cards None: all of the catalogue. Models are ordered by size, cards by memory.
    """
    check_settings(context, ubatch=ubatch)
    types, ladder = cache_types(kv), checked_ladder(ladder)
    specs = sorted((model_spec(m) for m in (catalog.entries() if models is None else models)), key=lambda s: s.params)
    found = [row["id"] for row in catalog.gpus()] if cards is None else cards
    chosen = sorted((catalog.gpu(c) for c in found), key=lambda c: c.memory)
    room = [(c.memory if c.free is None else c.free) - overhead_term(c, "").high for c in chosen]
    makers = {card.vendor: card for card in chosen}      # buffers differ by whose kernels they are, not by card
    rows, refused = [], []
    for spec in specs:
        try:
            needs = _needs(spec, context, types, ladder, ubatch)
        except LabError as error:            # a cache that this model cannot keep in those types: it fits no card
            refused.append(error)
            rows.append((None,) * len(chosen))
            continue
        working = dict(zip(makers, _working(spec, Request(context, ubatch, kv=types), tuple(makers.values())), strict=True))
        quants = [quant for quant, _ in needs]
        least = [-need for need in accumulate((need for _, need in needs), min)]       # a step of the ladder may need more
        rows.append(tuple(quants[at] if (at := bisect_left(least, working[card.vendor] - space)) < len(quants) else None
                          for card, space in zip(chosen, room, strict=True)))
    if specs and len(refused) == len(specs):
        raise refused[0]
    return FitMap(tuple(specs), tuple(chosen), context, types, ladder, tuple(rows))


@remembered
def _working(spec: ModelSpec, request: Request, cards: tuple[Gpu, ...]) -> list[int]:
    """The compute buffers of the whole model on each card; a slider that comes back finds them here."""
    return compute_high(spec, request, cards)


def _needs(spec: ModelSpec, context: int, kv: tuple[str, str], ladder: tuple[str, ...], ubatch: int) -> list[tuple[str, int]]:
    """(quant, bytes of weights, cache and state on a card) for each quant the model's widths allow."""
    cache = cache_bytes(spec, context, kv, ubatch=ubatch)
    beside = cache.kv + cache.recurrent
    found = []
    for quant in quants_to_try(spec, ladder):
        try:
            found.append((quant, card_bytes(spec, quant) + beside))
        except LabError:
            continue
    return found
