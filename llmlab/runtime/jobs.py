"""A job: one text that an engine makes, as those who asked for it see it, from whatever thread.

What it says goes through queues written in C: who waits wakes at once, and a Ctrl-C that comes while somebody waits leaves no
lock behind that others need.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from .sampling import Logprobs

_NAP = 1.0      # seconds of one wait at most: on Windows an interrupt is seen only between waits


@dataclass(frozen=True)
class Event:
    """A token that came, and the text that became certain with it: none where a character or a stop string may go on. What was
    held back to the last comes by itself, without a token. logprobs: where they were asked for."""

    token: int | None
    text: str
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Answer:
    """One text when it has ended. Seconds are wall-clock, from when it was asked for, measured.

    tokens: of the answer, without the one that ended the turn. ended: one of `generating.ENDS`. reused_tokens: of the prompt's
    those that were in the cache already. first_seconds: to the first token, None where there was none. preempted: how often
    it gave its blocks away and was read anew. seed: what was drawn with, None where nothing was. logprobs: of `tokens`, where
    they were asked for.
    """

    text: str
    tokens: tuple[int, ...]
    ended: str
    prompt_tokens: int
    reused_tokens: int
    first_seconds: float | None
    seconds: float
    preempted: int = 0
    seed: int | None = None
    logprobs: tuple[Logprobs, ...] | None = None


class Job:
    """Iterate it for Events as they come, or wait for `result`. What goes wrong is raised by both, as a LabError."""

    def __init__(self, cancel: Callable[["Job"], None]):
        self._cancel, self._events = cancel, SimpleQueue()
        self._outcome: Answer | Exception | None = None
        self._bells: list[SimpleQueue] = []

    def __iter__(self) -> "Job":
        return self

    def __next__(self) -> Event:
        while True:
            outcome = self._outcome         # looked at first: all that was said before it is in the queue by then
            try:
                event = self._events.get_nowait() if outcome else self._events.get(timeout=_NAP)
            except Empty:
                if isinstance(outcome, Exception):
                    raise outcome.with_traceback(None) from outcome.__cause__
                if outcome:
                    raise StopIteration from None
                continue
            if event is not None:
                return event

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._outcome is not None

    def result(self, timeout: float | None = None) -> Answer:
        """The whole answer, when it has ended. Raises TimeoutError after so many seconds, the job going on."""
        bell, until = SimpleQueue(), None if timeout is None else time.monotonic() + timeout
        self._bells.append(bell)
        try:
            while self._outcome is None:
                left = _NAP if until is None else min(_NAP, until - time.monotonic())
                if left <= 0:
                    raise TimeoutError(f"the answer has not ended within {timeout:g} seconds")
                with suppress(Empty):
                    bell.get(timeout=left)
        finally:
            self._bells.remove(bell)
        if isinstance(self._outcome, Exception):
            raise self._outcome.with_traceback(None) from self._outcome.__cause__
        return self._outcome

    def cancel(self) -> None:
        """End it here: after the step that is being computed its blocks are free, and what came so far is the answer."""
        if self._outcome is None:
            self._cancel(self)

    # ---- for the engine -----------------------------------------------------------------------------------------

    def say(self, event: Event) -> None:
        """Hand an event to who iterates."""
        self._events.put(event)

    def end(self, outcome: Answer | Exception) -> None:
        """Nothing more comes. The first outcome stays."""
        if self._outcome is None:
            self._outcome = outcome
            self._events.put(None)
            for bell in list(self._bells):
                bell.put(None)
