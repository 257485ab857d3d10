"""How much goes on the cards: the most layers, the fewest experts in RAM."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from .beside import anything, beside_needs
from .catalog import Gpu
from .hardware import Machine
from .memory import CacheBytes, Term, Weights
from .overhead import Measured, overhead_term
from .placing import Here, Sums, buffers, card_held, free_bytes, sums
from .rates import Rates
from .settings import Settings
from .shapes import ModelSpec


@dataclass(frozen=True)
class Question:
    """All that a report follows from."""

    spec: ModelSpec
    cards: tuple[Gpu, ...]
    s: Settings
    w: Weights
    c: CacheBytes
    host: int | None
    machine: Machine | None
    here: Here
    rates: Rates

    @property
    def measured(self) -> tuple[Measured | None, ...]:
        """What this computer's calibration found on each card."""
        return tuple(map(self.here.measured_on, self.cards))

    @cached_property
    def room(self) -> list[int]:
        """Bytes of each card that are certainly the model's."""
        n, s = len(self.cards), self.s
        return [free_bytes(card) - overhead_term(card, "", s.engine, n, s.display, found).high
                for card, found in zip(self.cards, self.measured, strict=True)]

    @cached_property
    def sums(self) -> Sums:
        """What the layers hold, running."""
        return sums(self.spec, self.w, self.c)

    @cached_property
    def _known(self) -> dict[tuple[int, int], list[Term]]:
        return {}

    def with_experts_out(self, n_cpu_moe: int) -> "Question":
        """The same question with that many blocks' experts in RAM; what is known stays known."""
        asked = replace(self, s=self.settings(n_cpu_moe))
        asked.__dict__.update(_known=self._known, sums=self.sums)
        return asked

    def settings(self, n_cpu_moe: int) -> Settings:
        return self.s if n_cpu_moe == self.s.n_cpu_moe else replace(self.s, n_cpu_moe=n_cpu_moe)

    def compute(self, layers: int, n_cpu_moe: int) -> list[Term]:
        """The compute buffers, laid out once for each placement that is looked at."""
        key = layers, n_cpu_moe
        if key not in self._known:
            self._known[key] = buffers(self.spec, self.cards, self.settings(n_cpu_moe), self.w, layers)
        return self._known[key]

    def working(self, layers: int, n_cpu_moe: int) -> list[int]:
        """Bytes of each card, high estimate, that are neither weights nor cache: compute buffers, and what lies beside."""
        found = [term.high for term in self.compute(layers, n_cpu_moe)[:-1]]             # the last is the host's
        if anything(self.s):
            more = beside_needs(self.spec, self.cards, self.settings(n_cpu_moe), layers)
            found = [a + b for a, b in zip(found, more, strict=True)]
        return found

    @property
    def guess(self) -> list[int]:
        """About what `working` will be with layers or experts in RAM: the largest of them sent over, activations, logits.
        Only how soon a search ends depends on it."""
        tokens, blocks = min(self.s.context, self.s.micro), self.spec.blocks
        widest = max(b.ff or b.expert_ff * b.experts_used + b.shared_ff for b in blocks)
        sent = self.w.largest_expert or max(self.w.by_layer) // 3
        each = sent + 4 * tokens * (2 * widest + 2 * self.spec.width)
        return [each] * (len(self.cards) - 1) + [max(each, 4 * tokens * (self.spec.vocab + 2 * self.spec.width))]

    def surely_too_large(self, layers: int) -> bool:
        """Whether weights and cache alone are more than a card has free."""
        held = card_held(self.spec, self.cards, self.s, self.sums, layers)
        return any(size > free_bytes(card) for size, card in zip(held, self.cards, strict=True))

    def fits(self, layers: int, n_cpu_moe: int, working: list[int] | None = None) -> bool:
        """Whether that many layers fit the cards for certain; `working` taken for granted where it is given."""
        held = card_held(self.spec, self.cards, self.settings(n_cpu_moe), self.sums, layers)
        if any(size > room for size, room in zip(held, self.room, strict=True)):
            return False
        working = self.working(layers, n_cpu_moe) if working is None else working
        return all(a + b <= room for a, b, room in zip(held, working, self.room, strict=True))


def fewest_experts_out(ask: Question, layers: int) -> int:
    """The fewest blocks whose experts must stay in RAM for the rest to fit; all of them where that is not enough."""
    if not ask.cards or not ask.spec.experts or ask.fits(layers, 0):
        return 0
    count = len(ask.spec.blocks)
    return count - _largest(count - 1, lambda n, working=None: ask.fits(layers, count - n, working),
                            lambda n: ask.working(layers, count - n), ask.guess, 0)


def most_layers(ask: Question) -> int:
    """The most layers that fit the cards for certain, short of all of them."""
    moe = ask.s.n_cpu_moe
    # on several cards the shares shift with one layer more: more may fit where fewer do not
    return _largest(len(ask.spec.layers), lambda n, working=None: ask.fits(n, moe, working), lambda n: ask.working(n, moe),
                    ask.guess, 2 * len(ask.cards) if len(ask.cards) > 1 else 0)


def _largest(most: int, fits: Callable, working: Callable, guess: list[int], further: int) -> int:
    """The largest n up to `most` that fits, 0 where none does; `further`: how far beyond it to look for another.

    Working buffers take time to lay out and hardly depend on n: the first search takes a guess for granted, each further one
    those of the answer before it, until the answer stays.
    """
    def search(taken: list[int] | None) -> int:
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle, taken) else (low, middle - 1)
        return low

    found = search(guess)
    for _ in range(4):
        before, found = found, search(working(found))
        if found == before:
            break
    else:
        while found and not fits(found):
            found -= 1
    near = working(found)
    return next((n for n in range(min(most, found + further), found, -1) if fits(n, near) and fits(n)), found)
