"""From the bytes of a request to the JSON object they say, within bounds: whatever else they are is refused in one line."""

import asyncio
import json
import math

from starlette.requests import ClientDisconnect, Request

from .limits import Limits
from .refusals import Refusal

_DEEP = 100              # levels of lists and objects: no conversation, tool or schema needs as many
_CLOSE = {"Connection": "close"}     # the rest of what is not read must not be taken for the next request


async def body_of(request: Request, limits: Limits) -> bytes:
    """A request's body. Raises Refusal: 413 where it is too large, 408 where it does not come."""
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdecimal() or len(length) > 18 or int(length) > limits.body:
        raise _too_large(limits)
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body:
                    raise _too_large(limits)
                parts.append(part)
    except TimeoutError:
        raise Refusal(f"The request's body was not there after {limits.body_seconds:g} s.", 408, code="timeout",
                      headers=_CLOSE) from None
    except ClientDisconnect:
        raise Refusal("The client went away.", 499) from None
    return b"".join(parts)


def _too_large(limits: Limits) -> Refusal:
    return Refusal(f"The request's body is larger than {limits.body:,} bytes, the most this server reads.", 413,
                   code="request_too_large", headers=_CLOSE)


def object_of(body: bytes) -> dict:
    """The JSON object of a body. Raises Refusal for what is none, for numbers that are no numbers or endless, for text that is
    no Unicode, and for what is nested too deep."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_number, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise _no_json(f"byte {error.start:,} is no UTF-8") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:          # whatever JSON says is wrong, and whole numbers of thousands of digits
        raise _no_json(str(error)[:200]) from None
    if not isinstance(found, dict):
        raise _no_json("it is no object")
    _check(found)
    return found


def _no_number(text: str):
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is too large")
    return value


def _check(found: dict) -> None:
    """Depth and text of everything inside, level by level."""
    level = [found]
    for _ in range(_DEEP):
        inner = []
        for one in level:
            if isinstance(one, dict):
                inner += one.keys()
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str) and not _is_text(one):
                raise _no_json("a text has half of a surrogate pair")
        level = inner
        if not level:
            return
    raise _too_deep()


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_json(why: str) -> Refusal:
    return Refusal(f"The request's body is no JSON that can be read: {why}.", code="invalid_json")


def _too_deep() -> Refusal:
    return Refusal(f"The request's body is nested more than {_DEEP} levels deep.", code="invalid_json")
