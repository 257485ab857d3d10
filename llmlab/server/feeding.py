"""From the engine's jobs, which a thread waits for, to the event loop, which waits for everyone."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Sequence

from .refusals import out_of_time

_QUIET = 10.0            # seconds without a token after which a stream says that it is still there


class Feed:
    """What the jobs of one request bring, as it comes: `async for happened in feed` gives lists of (which job, event), an
    exception in an event's place where the job failed, None where it ended; an empty list where nothing came for a while.

    It ends with the last job. `cancel` ends all of them. Raises Refusal where it takes longer than `seconds`.
    """

    def __init__(self, jobs: Sequence, seconds: float):
        self.jobs = jobs
        self._open, self._seconds, self._deadline = len(jobs), seconds, time.monotonic() + seconds
        self._loop, self._came = asyncio.get_running_loop(), asyncio.Event()
        self._lock, self._happened = threading.Lock(), []
        for at, job in enumerate(jobs):
            threading.Thread(target=self._listen, args=(at, job), name="llmlab-feed", daemon=True).start()

    def cancel(self) -> None:
        """End what is not ended."""
        if self._open:
            for job in self.jobs:
                job.cancel()

    def __aiter__(self) -> "Feed":
        return self

    async def __anext__(self) -> list[tuple[int, object]]:
        if not self._open:
            raise StopAsyncIteration
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise out_of_time(self._seconds)
        try:
            async with asyncio.timeout(min(left, _QUIET)):
                await self._came.wait()
        except TimeoutError:
            return []
        self._came.clear()
        with self._lock:
            happened, self._happened = self._happened, []
        self._open -= sum(event is None or isinstance(event, Exception) for _, event in happened)
        return happened

    def _listen(self, at: int, job) -> None:
        """In a thread of the job's own: it waits there, and the loop is told."""
        outcome = None
        try:
            for event in job:
                self._tell(at, event)
        except Exception as error:          # the engine's, whatever it is: who waits must hear of it
            outcome = error
        self._tell(at, outcome)

    def _tell(self, at: int, event) -> None:
        with self._lock:
            first = not self._happened
            self._happened.append((at, event))
        if first:                           # what follows before it is heard is heard with it
            with contextlib.suppress(RuntimeError):         # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._came.set)
