"""What comes back of a call: an answer with what it took, or why there is none, in one line without the key."""

from dataclasses import dataclass

from ..errors import Unreachable


@dataclass(frozen=True)
class Chance:
    """A token of an answer: the natural logarithm of its chance, and those of the likeliest tokens at its place."""

    logprob: float
    top: tuple[float, ...] = ()


@dataclass(frozen=True)
class Reply:
    """An answer. texts: of all choices, `text` the first. prompt_tokens, completion_tokens: as the server counts them (None: it
    did not say). cost: in the currency of the prices, of every attempt (None: the price is not known). seconds: wall clock,
    with retries. bytes_out: of request bodies that were sent. attempts: requests made. chances: of the first choice's tokens,
    where they were asked for. finish: why it ended."""

    texts: tuple[str, ...]
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = None
    seconds: float = 0.0
    bytes_out: int = 0
    attempts: int = 1
    chances: tuple[Chance, ...] | None = None
    finish: str | None = None

    @property
    def text(self) -> str:
        return self.texts[0]

    def __str__(self) -> str:
        return self.text


NETWORK, TIMEOUT, SERVER, BUSY, REFUSED, ANSWER, CAP, COUNT, OFFLINE, KEY = KINDS = (
    "network", "timeout", "server", "busy", "refused", "answer", "cap", "count", "offline", "key")


class CallFailed(Unreachable):
    """A call that gave no answer. kind: one of KINDS. bytes_out: of bodies that were sent all the same; cost: what is counted
    as spent for it; attempts: requests made."""

    def __init__(self, said: str, kind: str, bytes_out: int = 0, cost: float | None = None, attempts: int = 0):
        super().__init__(said)
        self.kind, self.bytes_out, self.cost, self.attempts = kind, bytes_out, cost, attempts

    def __reduce__(self):
        return type(self), (str(self), self.kind, self.bytes_out, self.cost, self.attempts)


def reply_of(found) -> Reply:
    """OpenAI's object as a Reply. Raises ValueError where it is none: a server may send anything."""
    choices = getattr(found, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise ValueError("no choices")
    texts = [getattr(getattr(choice, "message", None), "content", None) for choice in choices]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise ValueError("no text")
    told = getattr(getattr(choices[0], "logprobs", None), "content", None)
    chances = None if told is None else tuple(
        Chance(float(one.logprob), tuple(float(other.logprob) for other in one.top_logprobs or ())) for one in told)
    return Reply(tuple(text or "" for text in texts), *counts_of(found), chances=chances,
                 finish=getattr(choices[0], "finish_reason", None))


def counts_of(found) -> tuple[int | None, int | None]:
    """Tokens read and written, as far as a server counts them; less than nothing is no count."""
    usage = getattr(found, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    return tuple(one if type(one) is int and one >= 0 else None for one in counts)


def piece_of(chunk) -> tuple[str, str | None]:
    """What a piece of a stream adds to the first choice, and why that ended (None: it goes on)."""
    choices = getattr(chunk, "choices", None)
    if not choices or choices[0].index != 0:
        return "", None
    return choices[0].delta.content or "", choices[0].finish_reason
