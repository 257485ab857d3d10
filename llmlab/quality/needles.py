"""Needle in a haystack: facts hidden in a long text at several depths, and whether a model with some cache still finds them.

Several needles lie in one text, which is read once and asked about as often as there are needles; the numbers of the others
are the wrong answers that a right one must beat.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import torch

from ..catalog import Table
from ..errors import LabError
from ..gguf import GGUFFile, read_gguf
from ..memory import checked_integer
from ..runtime.decoder import Decoder
from ..runtime.generating import has_template, prompt_tokens
from ..vocabulary import words_of
from .caches import CacheSettings, reader
from .corpus import text as shipped

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CITIES = ("Paris", "Rome", "London", "Berlin", "Madrid", "Vienna", "Cairo", "Tokyo", "Oslo", "Lisbon", "Athens", "Dublin")
NAMES = ("Oscar", "Martha", "Hugo", "Clara", "Felix", "Rosa", "Victor", "Nina", "Walter", "Helen", "Arthur", "Emma")
KINDS = {   # what is hidden: how it is said, asked, and how the answer begins
    "number": ("The magic number of {city} is {answer}.", "What is the magic number of {city}?",
               "The magic number of {city} is"),
    "name": ("The name of the mayor of {city} is {answer}.", "What is the name of the mayor of {city}?",
             "The name of the mayor of {city} is")}


@dataclass(frozen=True)
class Needle:
    """One fact. depth: where its sentence lies, 0 (the beginning) to 1. answer: what it says. question, lead: how it is asked
    for, and how an answer begins. wrong: what the other needles say."""

    depth: float
    sentence: str
    question: str
    lead: str
    answer: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Haystack:
    """A text with needles in it; tokens: how many the text has."""

    text: str
    tokens: int
    needles: tuple[Needle, ...]

    def prompt(self, words, needle: Needle) -> list[int]:
        """Tokens of the text and a question, in the model's chat template where it has one, and how the answer begins."""
        asked = f"{self.text}\n\n{needle.question}"
        if has_template(words):
            return prompt_tokens(words, [{"role": "user", "content": asked}]) + _tokens(words, needle.lead)
        return prompt_tokens(words, f"{asked}\n\n{needle.lead}")

    def answer(self, words, needle: Needle) -> list[int]:
        """Tokens of the right answer where it stands after a prompt. Raises LabError where they cannot be told from it."""
        return _after(words, needle.lead, needle.answer)


@dataclass(frozen=True)
class Search:
    """Whether one needle was found, measured. found: greedy generation goes on with the answer. log_likelihood: of the answer,
    in nats, all its tokens together; margin: where the wrong answers part from it, how far its token lies above the likeliest
    wrong one's, in nats (inf where there are none)."""

    needle: Needle
    found: bool
    log_likelihood: float
    margin: float

    @property
    def preferred(self) -> bool:
        """Whether the right answer is preferred to every wrong one."""
        return self.margin > 0


@dataclass(frozen=True, repr=False)
class Needles:
    """What a model with one kind of cache found in a number of haystacks; all measured."""

    model: str
    cache: CacheSettings
    length: int
    kind: str
    searches: tuple[Search, ...]

    @property
    def found(self) -> float:
        """The share of needles that greedy generation finds, 0 to 1."""
        return float(np.mean([one.found for one in self.searches]))

    @property
    def preferred(self) -> float:
        """The share whose right answer is preferred to all wrong ones."""
        return float(np.mean([one.preferred for one in self.searches]))

    @property
    def log_likelihood(self) -> float:
        """Mean log-likelihood of the right answers, in nats."""
        return float(np.mean([one.log_likelihood for one in self.searches]))

    @property
    def margin(self) -> float:
        """Mean log-odds of the right answer against the likeliest wrong one, in nats."""
        return float(np.mean([one.margin for one in self.searches]))

    def by_depth(self) -> Table:
        """The same for each depth, a row each."""
        rows = []
        for depth in sorted({one.needle.depth for one in self.searches}):
            part = Needles(self.model, self.cache, self.length, self.kind,
                           tuple(one for one in self.searches if one.needle.depth == depth))
            rows.append({"depth": depth, "needles": len(part.searches), "found": part.found, "preferred": part.preferred,
                         "log_likelihood": part.log_likelihood, "margin": part.margin})
        return Table(rows, {"depth": "{:.0%}".format, "found": "{:.0%}".format, "preferred": "{:.0%}".format,
                            "log_likelihood": "{:.2f}".format, "margin": "{:.2f}".format})

    def __repr__(self) -> str:
        return (f"{self.model} with a cache of {self.cache}: {self.found:.0%} of {len(self.searches)} needles found in "
                f"{self.length} tokens, {self.preferred:.0%} preferred, log-likelihood {self.log_likelihood:.2f}, margin "
                f"{self.margin:.2f} nats (measured)")


def haystack(words, length: int, depths: Sequence[float] = DEPTHS, kind: str = "number", seed: int = 0,
             text: str | None = None) -> Haystack:
    """A text of at most `length` tokens with a needle at each of `depths` (0 to 1); the same for the same seed.

    `words`: a tokenizer, such as `llmlab.decoder` gives. `kind`: what is hidden, a "number" of five digits or a "name". `text`:
    the hay (None: what llmlab ships), whole sentences of it from one that the seed chooses; a needle lies between two.

    Raises LabError for another kind, for depths that are none or more than there are cities, where `text` is too short.
    """
    if kind not in KINDS:
        raise LabError(f"kind is {str(kind)[:40]!r}; there are {', '.join(KINDS)}")
    depths = tuple(map(float, depths))
    if not 1 <= len(depths) <= len(CITIES) or not all(0 <= depth <= 1 for depth in depths):
        raise LabError(f"depths are {str(depths)[:80]}; give 1 to {len(CITIES)} numbers from 0 to 1")
    checked_integer("length", length, 1, 2**31 - 1, "give a whole number of tokens")
    checked_integer("seed", seed, 0, 2**63 - 1, "give a whole number from 0 up")
    random = np.random.default_rng([seed, length])
    cities = random.permutation(CITIES)[:len(depths)]
    answers = _numbers(random, len(depths)) if kind == "number" else random.permutation(NAMES)[:len(depths)].tolist()
    said, asked, lead = KINDS[kind]
    needles = tuple(Needle(depth, said.format(city=city, answer=answer), asked.format(city=city), lead.format(city=city),
                           answer, tuple(other for other in answers if other != answer))
                    for depth, city, answer in zip(depths, cities, answers, strict=True))
    hay = _sentences(shipped() if text is None else text)
    start = int(random.integers(len(hay)))
    hay = [*hay[start:], *hay[:start]]
    counts = np.cumsum([len(_tokens(words, " " + sentence)) for sentence in hay])
    room = length - sum(len(_tokens(words, " " + needle.sentence)) for needle in needles)
    many = int(np.searchsorted(counts, room, side="right"))
    if room < 0 or many == len(hay):
        raise LabError(f"{length:,} tokens {'do not hold the needles' if room < 0 else 'are more than the text has'}; give "
                       f"{'more' if room < 0 else 'fewer, or a longer text'}")
    whole = counts[many - 1] if many else 0
    parts, at = [], 0
    for needle in sorted(needles, key=lambda needle: needle.depth):
        upto = int(np.searchsorted(counts[:many], needle.depth * whole))
        upto = many if needle.depth == 1 else upto
        parts += [*hay[at:upto], needle.sentence]
        at = max(at, upto)
    joined = " ".join([*parts, *hay[at:many]])
    return Haystack(joined, len(_tokens(words, joined)), needles)


def find_needles(model: str | os.PathLike | GGUFFile | Decoder, kv: str | Sequence[str] | CacheSettings = "f32",
                 length: int = 1024, depths: Sequence[float] = DEPTHS, *, kind: str = "number", trials: int = 3, seed: int = 0,
                 text: str | None = None, words=None) -> Needles:
    """How many needles a GGUF's model finds with a cache of `kv` ("q8_0", a pair for K and V, or `CacheSettings`), in `trials`
    haystacks of `length` tokens with one at each of `depths`.

    `model`: a path, or the decoder of `llmlab.decoder`, which keeps its own text. The answer is begun for the model ("The magic
    number of Paris is"), so that it need not find words. A small model finds few, so ask first what a cache of f32 reaches; the
    log-likelihood of the answers says more than how many were found. `words`: its tokenizer (None: the file's). Raises LabError
    as `haystack` does, and where the context is too short.
    """
    checked_integer("trials", trials, 1, 10**6, "give a whole number of haystacks")
    settings = CacheSettings.of(kv)
    decoder = reader(model, settings)
    if words is None:
        if not decoder.path:
            raise LabError("words is missing, and this decoder has no file to read a vocabulary from: give a tokenizer")
        words = words_of(read_gguf(decoder.path))
    searches = []
    with torch.inference_mode():
        for trial in range(trials):
            hay = haystack(words, length, depths, kind, seed + trial, text)
            searches += [_search(decoder, words, hay, needle) for needle in hay.needles]
            decoder.forget()
    return Needles(os.path.basename(decoder.path), settings, length, kind, tuple(searches))


def _search(decoder: Decoder, words, hay: Haystack, needle: Needle) -> Search:
    """One question, of which only what differs from the one before is read."""
    prompt, right = hay.prompt(words, needle), hay.answer(words, needle)
    if ahead := prompt[decoder.keep(prompt):-1]:
        decoder.read(ahead)
    rows = decoder.logits([prompt[-1], *right[:-1]]).double().log_softmax(-1)
    tokens = torch.tensor(right, device=rows.device)
    likely = rows.gather(1, tokens[:, None])[:, 0]
    margin = inf
    for wrong in (_after(words, needle.lead, other) for other in needle.wrong):
        if at := [place for place, pair in enumerate(zip(right, wrong, strict=False)) if pair[0] != pair[1]]:
            margin = min(margin, float(likely[at[0]] - rows[at[0], wrong[at[0]]]))
    return Search(needle, bool((rows.argmax(-1) == tokens).all()), float(likely.sum()), margin)


def _after(words, before: str, text: str) -> list[int]:
    """The tokens of a text where it stands after another."""
    first, both = _tokens(words, before), _tokens(words, f"{before} {text}")
    if both[:len(first)] != first:
        raise LabError(f"this vocabulary joins {before[-20:]!r} and {text!r} to one token; give other needles")
    return both[len(first):]


def _tokens(words, text: str) -> list[int]:
    return list(words(text, add_special_tokens=False, verbose=False)["input_ids"])


def _sentences(text: str) -> list[str]:
    """Sentences and lines of a text, in order."""
    found = [part.strip() for line in text.splitlines() for part in line.replace(". ", ".\n").splitlines()]
    if not (found := [part for part in found if part]):
        raise LabError("the text for the haystack is empty")
    return found


def _numbers(random: np.random.Generator, count: int) -> list[str]:
    """Numbers of five digits that all begin with another digit."""
    return [f"{first}{random.integers(10**4):04d}" if count <= 9 else str(random.integers(10**4, 10**5))
            for first in (random.permutation(9)[:count] + 1 if count <= 9 else range(count))]
