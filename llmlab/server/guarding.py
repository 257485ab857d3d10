"""Who may ask: the API key, the names this server goes by, and web pages of other places."""

import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import LabError
from .refusals import Refusal

OPEN = frozenset({"/health"})           # asked by whatever watches over the server, which has no key
_LOCAL = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this computer reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def checked_key(key: str | None) -> str | None:
    """A key that can be sent in a header. Raises LabError."""
    if key is not None and (not isinstance(key, str) or not key or not all("!" <= letter <= "~" for letter in key)):
        raise LabError("the API key is empty or has other characters than ASCII's visible ones; give letters and digits")
    return key


class Guard:
    """Lets a request through to `app` that names this server, comes from no strange web page and has the key.

    A web page may have its own name point to 127.0.0.1 (DNS rebinding) and then read what a local server answers: on a loopback
    address the Host header must be one of its names or of `hosts` ("*": any). A browser sends what a page of another place
    posts, though that page may not read the answer: a request with an Origin must come from this server's own or from one of
    `origins` ("*": any).
    """

    def __init__(self, app: ASGIApp, host: str, key: str | None = None, hosts: tuple[str, ...] = (),
                 origins: tuple[str, ...] = ()):
        self._app, self._origins = app, origins
        self._key = None if key is None else _digest(key)
        self._hosts = {_bare(one) for one in (*_LOCAL, host, *hosts)} if is_loopback(host) and "*" not in hosts else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(Headers(scope=scope), scope["path"])
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> Refusal | None:
        host = headers.get("host", "")
        if self._hosts is not None and _bare(_name_in(host)) not in self._hosts:
            return Refusal("This server answers on this computer by its own names only; start it with --allow-host and the "
                           "name you gave, if that is meant to reach it.", 403, code="unknown_host")
        origin = headers.get("origin")
        if origin is not None and "*" not in self._origins and origin not in self._origins and not _same(origin, host):
            return Refusal("Web pages of another place may not ask this server; start it with --cors and the page's origin, if "
                           "they are to.", 403, code="unknown_origin")
        if self._key is not None and path not in OPEN:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), self._key):
                return Refusal("Incorrect API key provided; send it as Authorization: Bearer KEY." if given else
                               "You didn't provide an API key; send it as Authorization: Bearer KEY.", 401,
                               code="invalid_api_key", headers={"WWW-Authenticate": "Bearer", "Connection": "close"})
        return None


def _digest(key: str) -> bytes:
    """Of one length whatever the key's, so that comparing takes the same time."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _name_in(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _bare(host: str) -> str:
    return host.lower().strip("[]").removesuffix(".")


def _same(origin: str, host: str) -> bool:
    """Whether a page of `origin` was served by this server itself."""
    try:
        return bool(host) and urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False
