"""What is asked of the small model here: requests of ShareGPT-like lengths made small, which may begin alike, and their texts;
and what the scheduler makes of them, counted in steps without the model."""

from collections.abc import Sequence

from ..memory import cache_bytes
from ..quality.corpus import text
from ..runtime.engine import SIZE
from ..shapes import ModelSpec
from ..simulating import Load, Serving, Simulation
from ..workloads import SHAREGPT, Arrival, shared_prefix

SCALE = 0.05                 # of ShareGPT's lengths: some seconds on a processor
SEED = 3
ROWS = 256                   # tokens of a step at most
KV = "f32"                   # what the engine keeps keys and values in
_READ = 40_000               # characters of the book that prompts are taken from


def arriving(count: int, prefix: int = 0, rate: float | None = None) -> list[Arrival]:
    """`count` requests; the first `prefix` tokens of all prompts are the same. rate: a second in the mean, None: all at
    once. Raises LabError."""
    return shared_prefix(count, prefix, prompt=SHAREGPT[0], output=SHAREGPT[1], seed=SEED, scale=SCALE, rate=rate)


def prompts(words, arrivals: Sequence[Arrival]) -> list[list[int]]:
    """Tokens of these lengths out of a book: its beginning as the prefix, then each from another place."""
    ids = words(text()[:_READ], add_special_tokens=False)["input_ids"]
    most = max((one.shared for one in arrivals), default=0)
    own, apart = ids[most:], max(1, (len(ids) - most) // max(1, len(arrivals)))
    return [ids[:one.shared] + [own[(number * apart + at) % len(own)] for at in range(one.prompt - one.shared)]
            for number, one in enumerate(arrivals)]


def longest(arrivals: Sequence[Arrival]) -> int:
    """Tokens of the longest prompt with its answer."""
    return max(one.prompt + one.output for one in arrivals)


def reserved(arrivals: Sequence[Arrival]) -> int:
    """Tokens that a static batch reserves for each: the longest there will be (nobody knows beforehand), in whole blocks."""
    return -(-longest(arrivals) // SIZE) * SIZE


def bytes_of_block(spec: ModelSpec) -> int:
    """Of one block of SIZE tokens in all layers, exact."""
    return cache_bytes(spec, SIZE, KV, engine="transformers").kv


class _Step:
    """Every step counts one."""

    window = 0

    def seconds(self, load: Load, band: int = 1) -> float:
        return 1.0


def counted(arrivals: Sequence[Arrival], serving: Serving) -> Simulation:
    """What the scheduler does with these if all are there at once: its "seconds" are steps. Which text runs when, and which
    blocks it holds, does not depend on the model, so this is exact. Raises LabError."""
    return serving.simulated([_at_once(one) for one in arrivals], _Step())


def _at_once(one: Arrival) -> Arrival:
    return Arrival(0.0, one.prompt, one.output, one.shared, one.group, one.number)
