"""What was in the way of a call, from whatever OpenAI's client raised; and how long the server asks to wait."""

import math
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from ..errors import LabError
from .keys import scrubbed
from .replies import ANSWER, BUSY, NETWORK, REFUSED, SERVER, TIMEOUT
from .wiring import http_library

_SAID = 200                  # characters of a server's own words that are repeated


@dataclass(frozen=True)
class Failure:
    """kind: one of replies.KINDS; said: in words, after the server's name; answered: the server itself said no; unsent:
    there was no connection, so nothing left; after: seconds it asks to wait."""

    kind: str
    said: str
    answered: bool = False
    unsent: bool = False
    after: float | None = None


def failure_of(error: BaseException, secret: str | None = None) -> Failure | None:
    """None where it is nothing of the call's: Ctrl-C, or a LabError about what was asked."""
    import openai

    http = http_library()
    if isinstance(error, LabError) or not isinstance(error, Exception):
        return None
    if any(isinstance(one, (http.ConnectError, http.ConnectTimeout, http.PoolTimeout)) for one in (error, error.__cause__)):
        return Failure(NETWORK, "cannot be reached", unsent=True)
    if isinstance(error, (openai.APITimeoutError, http.TimeoutException)):
        return Failure(TIMEOUT, "did not answer in time")
    if isinstance(error, openai.APIStatusError):
        return _status(error, secret)
    if isinstance(error, (openai.APIConnectionError, http.TransportError)):
        return Failure(NETWORK, "cannot be reached, or hung up")
    if isinstance(error, openai.APIError) and not isinstance(error, openai.APIResponseValidationError):
        return Failure(SERVER, f"said: {_line(error, secret)}", answered=True)      # an error in the middle of a stream
    return Failure(ANSWER, f"sent what is no answer ({type(error).__name__})")


def _status(error, secret: str | None) -> Failure:
    status = error.status_code
    if 300 <= status < 400:
        return Failure(REFUSED, f"points to another address ({status}), which is not followed; give that one", answered=True)
    kind = BUSY if status == 429 else SERVER if status >= 500 or status == 408 else REFUSED
    says = {BUSY: "is busy (429)", SERVER: f"failed ({status})", REFUSED: f"refused ({status}): {_line(error, secret)}"}[kind]
    # A gateway does not know whether the model behind it went on: nor do we.
    return Failure(kind, says, status not in (408, 502, 504), after=retry_after(error.response.headers))


def _line(error, secret: str | None) -> str:
    """A server's own words, in a line, without the key."""
    return " ".join(scrubbed(str(getattr(error, "message", "") or "no reason given"), secret).split())[:_SAID]


def retry_after(headers) -> float | None:
    """Seconds, from a number or a date."""
    given = (headers.get("retry-after") or "").strip()
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(given).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
