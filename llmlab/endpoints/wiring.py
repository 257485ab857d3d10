"""OpenAI's client made for one address: what its requests carry, how long they wait, and what would leave without sending it.

The key is put into a request's headers as it is sent and taken out when it is over: no client, log line or exception holds it.
Of the headers the client would send of its own (its version, this system's, names of accounts from the environment) none goes.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module

from .keys import HIDDEN

_KEPT = ("host", "content-type", "content-length", "transfer-encoding", "accept", "accept-encoding", "connection")
_CANNED = {"id": "preview", "object": "chat.completion", "created": 0, "model": "preview", "choices": []}


@cache
def http_library():
    """The httpx that the installed openai is built on: httpx, or from its version 3 httpx2."""
    import openai

    bases = openai.DefaultHttpxClient.__mro__
    return import_module(next(base.__module__ for base in bases if base.__name__ == "Client").partition(".")[0])


class Wire:
    """`client` is OpenAI's own. `sent()`: bytes of bodies this thread has sent since `signing` began."""

    def __init__(self, url: str, here: bool, timeout: float, record: bool = False):
        import openai

        http, self._calls = http_library(), threading.local()
        waits = http.Timeout(timeout, connect=min(timeout, 10.0))
        self.recorded = []
        transport = {"transport": _recorder(http, self.recorded)} if record else {}
        # Loopback goes through no proxy, whatever the environment says. A redirect would hand the question to somebody else.
        inner = http.Client(auth=_signer(http, self._calls), timeout=waits, trust_env=not here, follow_redirects=False,
                            **transport)
        self.close = weakref.finalize(self, inner.close)        # by whoever is done, or when nobody holds it any more
        self.client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=waits, http_client=inner)

    @contextmanager
    def signing(self, secret: str | None) -> Iterator[None]:
        """Requests of this thread carry `secret` meanwhile."""
        self._calls.secret, self._calls.sent = secret, 0
        try:
            yield
        finally:
            self._calls.secret = None

    def sent(self) -> int:
        return getattr(self._calls, "sent", 0)


def _signer(http, calls):
    class Signer(http.Auth):
        requires_request_body = True

        def auth_flow(self, request):
            for name in [name for name in request.headers if name.lower() not in _KEPT]:
                del request.headers[name]
            request.headers["User-Agent"] = "llmlab"
            if secret := getattr(calls, "secret", None):
                request.headers["Authorization"] = f"Bearer {secret}"
            calls.sent = getattr(calls, "sent", 0) + len(request.content)
            try:
                yield request
            finally:
                request.headers.pop("Authorization", None)

    return Signer()


def _recorder(http, recorded: list):
    class Recorder(http.BaseTransport):
        """Keeps what would be sent, and sends nothing."""

        def handle_request(self, request):
            headers = {name: HIDDEN if name.lower() == "authorization" else value for name, value in request.headers.items()}
            recorded.append((request.method, str(request.url), headers, request.read()))
            return http.Response(200, json=_CANNED)

    return Recorder()
