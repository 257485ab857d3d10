"""How unsure the local model is of its answer: a number that grows with doubt, from what it tells beside the answer.

"entropy": of each token's place, in nats, the mean (of the likeliest tokens that are told; the rest counts as one, so it is
a lower bound). "logprob": minus the mean logarithm of the chances of the tokens written. "agreement": self-consistency, the
share of several drawn answers that differ from the most common one. Or a rule: a `Rule`, or a function of the messages.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import LabError
from .replies import Chance, Reply

TOLD = 20                # likeliest tokens that are told at each place: as many as OpenAI's API has
_SAMPLES, _WARMTH = 5, 0.8


def entropy(chance: Chance) -> float:
    """Of one place, in nats."""
    shares = [math.exp(one) for one in chance.top]
    rest = 1.0 - sum(shares)
    return -sum(one * math.log(one) for one in (*shares, rest) if one > 1e-12)


def plain(text: str) -> str:
    """An answer as answers are compared: its words, without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def agreed(texts, same: Callable[[str], str] = plain) -> tuple[str, float]:
    """(the first of the answers that most agree on, the share that does)."""
    said = [same(text) for text in texts]
    best, count = Counter(said).most_common(1)[0]
    return texts[said.index(best)], count / len(said)


@dataclass(frozen=True)
class Rule:
    """Call out where one of `words` occurs in what is asked (whole words, whatever their case), or where it is `longer` than
    so many characters."""

    words: tuple[str, ...] = ()
    longer: int | None = None

    def __call__(self, messages: list[dict]) -> bool:
        text = "\n".join(_asked(messages))
        return any(re.search(rf"(?i)(?<!\w){re.escape(word)}(?!\w)", text) for word in self.words) or (
            self.longer is not None and len(text) > self.longer)


def _asked(messages: list[dict]):
    for one in messages:
        content = one.get("content")
        for part in content if isinstance(content, list) else [content]:
            yield part if isinstance(part, str) else str(part.get("text", "")) if isinstance(part, dict) else ""


@dataclass(frozen=True)
class Signal:
    """name: as decisions tell it. rule: asked before the model is, instead of it. same, samples: of "agreement"."""

    name: str
    rule: Callable[[list[dict]], bool | float] | None = None
    same: Callable[[str], str] = plain
    samples: int = _SAMPLES

    def judged(self, messages: list[dict]) -> float:
        """What the rule says: 1 for out, 0 for here, or a number of its own."""
        wrong = ""
        try:
            return float(self.rule(messages))
        except Exception as error:
            wrong = type(error).__name__
        raise LabError(f"the rule {self.name!r} failed ({wrong}); it takes messages and returns True, False or a number")

    def answered(self, local, messages: list[dict], settings: dict) -> tuple[Reply, float]:
        """The local answer and how unsure it is. Raises LabError where the server does not tell chances."""
        if self.name == "agreement":
            drawn = {"temperature": _WARMTH, "seed": 0} | {k: v for k, v in settings.items() if k != "temperature"}
            reply = local.chat(messages, n=self.samples, **drawn)
            text, share = agreed(reply.texts, self.same)
            return Reply(**{**vars(reply), "texts": (text, *reply.texts)}), 1.0 - share
        reply = local.chat(messages, chances=TOLD, **settings)
        if reply.chances is None:
            raise LabError(f"the local server tells no chances of its tokens, which {self.name!r} needs; choose "
                           "unsure='agreement' or a rule")
        if not reply.chances:
            return reply, math.inf                       # it said nothing
        told = [entropy(one) if self.name == "entropy" else -one.logprob for one in reply.chances]
        return reply, sum(told) / len(told)


NAMES = ("entropy", "logprob", "agreement")


def signal_of(unsure, same: Callable[[str], str] | None = None, samples: int = _SAMPLES) -> Signal:
    """From a name, a rule or a function. Raises LabError."""
    if isinstance(unsure, Signal):
        return unsure
    if callable(unsure):
        return Signal(getattr(unsure, "__name__", type(unsure).__name__.lower()), unsure)
    if unsure not in NAMES:
        raise LabError(f"unsure is {unsure!r:.40}; give {', '.join(NAMES)}, a Rule, or a function of the messages")
    if isinstance(samples, bool) or not isinstance(samples, int) or not 2 <= samples <= 64:
        raise LabError(f"samples is {samples!r:.40}; give how many answers are drawn, 2 to 64")
    return Signal(unsure, same=same or plain, samples=samples)
