"""An answer that is sent as it comes, as server-sent events; and a client that goes away, or does not read, ends it.

https://html.spec.whatwg.org/multipage/server-sent-events.html is the source of the format.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
STILL_THERE = b": still there\n\n"          # a comment, which clients pass over and proxies count as life
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no")]

Found = TypeVar("Found")


class Gone(Exception):
    """The client has gone away, or reads nothing."""


def event(value: dict) -> bytes:
    """One event with a JSON value."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


async def unless_gone(receive: Receive, work: Awaitable[Found]) -> Found:
    """What `work` gives; cancelled, and Gone raised, where the client goes away meanwhile. The request's body must have been
    read."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events:
    """A response of events. pieces: what is sent; seconds: what a client may take to read a piece; close: called at the end,
    however it comes."""

    def __init__(self, pieces: AsyncGenerator[bytes, None], seconds: float, close: Callable[[], None]):
        self._pieces, self._seconds, self._close = pieces, seconds, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(Gone):
                await unless_gone(receive, self._send_all(send))
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        async with contextlib.aclosing(self._pieces) as pieces:
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": _HEADERS})
            async for piece in pieces:
                await self._send(send, {"type": "http.response.body", "body": piece, "more_body": True})
            await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: dict) -> None:
        try:
            async with asyncio.timeout(self._seconds):      # wait_for may swallow a cancellation, before Python 3.12
                await send(message)
        except (TimeoutError, OSError):
            raise Gone from None
