"""How much one server takes: bytes of a request, requests at once, seconds; and the count of those that are inside."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import LabError
from ..memory import checked_integer
from ..units import MIB, parse_bytes
from .refusals import too_busy

_LATELY = 60.0             # seconds that say how fast requests end at present


@dataclass(frozen=True)
class Limits:
    """What a server takes. body: bytes of a request's body (also "4 MiB"). waiting: answers that may wait besides those that
    run. choices: answers one request may ask for. seconds: the longest a request may take. body_seconds: within which its body
    must be there, or its headers. send_seconds: how long a client may take to read what is sent. stop_seconds: what running
    answers get to end when the server stops. connections: open at once. Raises LabError, naming the limit."""

    body: int | str = 4 * MIB
    waiting: int = 64
    choices: int = 128
    seconds: float = 600.0
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    stop_seconds: float = 30.0
    connections: int = 1024

    def __post_init__(self):
        object.__setattr__(self, "body", parse_bytes(self.body))
        for name, least in (("body", 1024), ("waiting", 0), ("choices", 1), ("connections", 1)):
            checked_integer(name, getattr(self, name), least, 2**40, f"give a whole number, from {least:,} up")
        for name in ("seconds", "body_seconds", "send_seconds", "stop_seconds"):
            value = getattr(self, name)
            right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not right or not (0 if name == "stop_seconds" else 0.01) <= value <= 10**7:
                raise LabError(f"{name} is {value!r:.40}; give seconds, such as {Limits.__dataclass_fields__[name].default:g}")


class Gate:
    """Lets so many answers in at once, of all requests together; the others are told when to come again. inside: places that
    are taken; answers: of them those of answers, the others are of requests that are still being read."""

    def __init__(self, room: int):
        self.room, self.inside, self.answers = room, 0, 0
        self._left: deque[tuple[float, int]] = deque()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While a request is read, which takes a place and makes no answer yet. Raises as `admitted`."""
        with self._in(1):
            yield

    @contextlib.contextmanager
    def admitted(self, answers: int) -> Iterator[None]:
        """While the answers of a request are being made. Raises Refusal, 429 with Retry-After, where there is no room."""
        with self._in(answers):
            self.answers += answers
            try:
                yield
                self._left.append((time.monotonic(), answers))      # not where they were refused after all
            finally:
                self.answers -= answers
                self._forget()

    @contextlib.contextmanager
    def _in(self, places: int) -> Iterator[None]:
        if self.inside + places > self.room:
            raise too_busy(self.patience())
        self.inside += places
        try:
            yield
        finally:
            self.inside -= places

    def patience(self) -> int:
        """Seconds after which half of the answers inside will have left, at the pace of the last minute; 1 to 60."""
        self._forget()
        left = sum(count for _, count in self._left)
        return max(1, min(60, math.ceil(self.answers / 2 * _LATELY / left))) if left else 5

    def _forget(self) -> None:
        while self._left and self._left[0][0] < time.monotonic() - _LATELY:
            self._left.popleft()
