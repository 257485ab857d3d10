"""What people ask of a server: how long prompts and answers are, when they come, and what they share.

Traces of real conversations are seldom at hand, so these are drawn: log-normal lengths whose means are published ones,
arrivals of a Poisson process, from a fixed seed. From the paper on PagedAttention (Kwon et al. 2023, arXiv 2309.06180, section
6.1 and figure 11): ShareGPT's prompts have 161.31 tokens in the mean and its answers 337.99, Alpaca's 19.31 and 58.45; arrivals
are Poisson; a prefix that requests share has 80 tokens (one example) or 341 (five; section 6.4). Made up: that lengths are
log-normal, how widely they spread, that a prompt's length says nothing of its answer's, and the longest (1,024 of a prompt and
1,024 of an answer; the paper's models hold 2,048 tokens in all). The words are none at all: `Arrival.tokens` are numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import NormalDist

from .errors import LabError
from .memory import checked_integer

SHAREGPT, ALPACA = (161.31, 337.99), (19.31, 58.45)       # mean tokens of a prompt and of an answer: figure 11
SPREAD = (1.2, 0.9)                # sigma of the logarithms: long tails, as the figure's; made up
LONGEST = (1024, 1024)             # tokens, made up
PREFIXES = (80, 341)               # tokens shared by the requests of section 6.4: one example, and five
_MOST = 10**6                      # requests, and tokens of one
_SHARED = 1 << 40                  # keeps a prefix's random numbers apart from a request's own


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it comes in seconds, tokens of its prompt and of its answer. The first `shared` tokens of the prompt
    are those of all requests of the same `group`; `number` tells its other tokens from other requests'."""

    at: float
    prompt: int
    output: int
    shared: int = 0
    group: int = 0
    number: int = 0

    def tokens(self, vocab: int = 32000, first: int = 0) -> list[int]:
        """The prompt as numbers from `first` up to `vocab`, the same every time: the group's, then its own."""
        own = Random(self.number)
        prefix = Random(_SHARED + self.group)
        span = vocab - first
        return [first + int(prefix.random() * span) for _ in range(self.shared)] + [
            first + int(own.random() * span) for _ in range(self.prompt - self.shared)]


def sharegpt_like(count: int, seed: int = 0, scale: float = 1.0, rate: float | None = None) -> list[Arrival]:
    """`count` requests with the mean lengths of ShareGPT's, times `scale` (for models of a short context; the longest shrink
    along). `rate`: requests per second; None: all are there from the start. Raises LabError."""
    return drawn(count, *SHAREGPT, seed=seed, scale=scale, rate=rate)


def alpaca_like(count: int, seed: int = 0, scale: float = 1.0, rate: float | None = None) -> list[Arrival]:
    """`count` requests with the mean lengths of Alpaca's; the rest as `sharegpt_like`."""
    return drawn(count, *ALPACA, seed=seed, scale=scale, rate=rate)


def drawn(count: int, prompt: float, output: float, *, seed: int = 0, scale: float = 1.0, rate: float | None = None,
          spread: tuple[float, float] = SPREAD, longest: tuple[int, int] = LONGEST) -> list[Arrival]:
    """Requests of log-normal lengths with these means, cut at `longest` tokens; the means are those after cutting. Lengths are
    drawn evenly over the distribution (stratified), so that few requests have its mean and its tail too. Raises LabError for a
    mean that cutting cannot leave, and for numbers that are none."""
    count = checked_integer("count", count, 0, _MOST, f"give how many requests, 0 to {_MOST:,}")
    if not 0 < scale < math.inf:
        raise LabError(f"scale is {scale!r:.40}; give what lengths are multiplied by, like 0.25")
    shuffled = Random(seed)
    lengths = [_lengths(count, mean * scale, sigma, max(round(most * scale), 1), shuffled)
               for mean, sigma, most in zip((prompt, output), spread, longest, strict=True)]
    found = [Arrival(0.0, p, o, number=_number(seed, i)) for i, (p, o) in enumerate(zip(*lengths, strict=True))]
    return timed(found, rate, seed)


def even(count: int, prompt: int, output: int, *, seed: int = 0, rate: float | None = None) -> list[Arrival]:
    """Requests that are all of the same lengths, as benchmarks of random tokens send them."""
    count = checked_integer("count", count, 0, _MOST, f"give how many requests, 0 to {_MOST:,}")
    prompt = checked_integer("prompt", prompt, 1, _MOST, "give how many tokens, 1 at least")
    output = checked_integer("output", output, 1, _MOST, "give how many tokens, 1 at least")
    return timed([Arrival(0.0, prompt, output, number=_number(seed, i)) for i in range(count)], rate, seed)


def shared_prefix(count: int, prefix: int = PREFIXES[1], groups: int = 1, *, seed: int = 0, scale: float = 1.0,
                  rate: float | None = None, prompt: float = ALPACA[0], output: float = ALPACA[1]) -> list[Arrival]:
    """Requests in `groups` that each begin with the same `prefix` tokens, a system's instructions or examples, and then ask
    something of their own (`prompt` and `output`: mean tokens, Alpaca's). Groups take turns at random."""
    groups = checked_integer("groups", groups, 1, _MOST, "give how many different prefixes there are, 1 at least")
    prefix = checked_integer("prefix", prefix, 0, _MOST, "give how many tokens requests share, 0 at least")
    chosen = Random(seed + 1)
    return [replace(one, prompt=one.prompt + prefix, shared=prefix, group=_number(seed, chosen.randrange(groups)))
            for one in drawn(count, prompt, output, seed=seed, scale=scale, rate=rate)]


def _number(seed: int, index: int) -> int:
    return seed * _MOST + index


def timed(arrivals: Sequence[Arrival], rate: float | None, seed: int = 0) -> list[Arrival]:
    """The same requests as a Poisson process brings them, `rate` a second: the gaps are exponential. None: as they are."""
    if rate is None:
        return list(arrivals)
    if not 0 < rate < math.inf:
        raise LabError(f"rate is {rate!r:.40}; give requests per second, or None for all at once")
    gaps, now, found = Random(f"arrivals {seed}"), 0.0, []
    for one in arrivals:
        now += gaps.expovariate(rate)
        found.append(replace(one, at=now))
    return found


def _lengths(count: int, mean: float, sigma: float, most: int, random: Random) -> list[int]:
    """Whole numbers from 1 to `most`, log-normal with this mean after cutting, in random order."""
    if not count:
        return []
    if not 1 <= mean < most:
        raise LabError(f"lengths of {mean:.4g} tokens in the mean, at most {most}: give a mean from 1 to below the longest, "
                       "or another scale")
    normal = [NormalDist().inv_cdf((i + random.random()) / count) for i in range(count)]
    random.shuffle(normal)

    def cut(middle: float) -> list[int]:
        return [min(max(round(math.exp(middle + sigma * one)), 1), most) for one in normal]

    low, high = math.log(mean) - 4 * sigma * sigma, math.log(most) + 4 * sigma      # of the median's logarithm
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(cut(middle)) < mean * count else (low, middle)
    return cut(high)
