"""One GET at a time from a hub. httpx does the HTTP: connections, TLS, proxies, redirects, which drop the token.

Added here is what it leaves open, because a server may be broken or hostile: ranges are held to what was asked for,
an answer has a size and a pace it must keep (httpx's own timeouts start anew at every byte), errors are one line.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub.
"""

import contextlib
import functools
import os
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from ..errors import BadFile, UnknownName, Unreachable
from ..units import KIB, format_bytes

if TYPE_CHECKING:
    import httpx

PUBLIC_HUB = "https://huggingface.co"
WAIT = 10.0             # seconds for a connection, and for the next byte of an answer
PATIENCE = 30.0         # seconds an answer may fall behind PACE (its headers too) before it is given up
PACE = 16 * KIB         # bytes/s: slower than this for PATIENCE seconds is a drip, not a download
PAUSE = 0.5             # seconds before the first retry
RETRIES = 2
REDIRECTS = 5

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NETWORKLESS = "without a network, give a GGUF file, a folder with a config.json, or a name from llmlab.models()"


def endpoint() -> str:
    """The hub's address, without a slash at its end: `HF_ENDPOINT`, else the public hub. Raises Unreachable."""
    address = (os.environ.get("HF_ENDPOINT") or PUBLIC_HUB).strip().rstrip("/")
    if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", address) or origin(address) is None:
        raise Unreachable(f"HF_ENDPOINT is {address[:80]!r}, not an address like {PUBLIC_HUB}; correct it or unset it")
    return address


def token() -> str | None:
    """The user's access token: `HF_TOKEN`, else the file that `hf auth login` writes, else None."""
    # Not huggingface_hub's get_token: it reads the environment once, when it is imported.
    if given := (os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or "").strip():
        return given
    if _true("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return None
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(os.environ.get("HF_TOKEN_PATH") or hf_home() / "token").read_text()[:4096].strip() or None
    return None


def hf_home() -> Path:
    """Hugging Face's folder: `HF_HOME`, else in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface").expanduser()


def check_repo(repo: str) -> str:
    """`repo` if it can be a repository's name (`owner/name`). Raises UnknownName."""
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or len(repo) > 200:
        raise UnknownName(f"{repo[:120]!r} is not a hub name; it looks like 'owner/repo'")
    return repo


def file_url(repo: str, file: str, revision: str = "main") -> str:
    """Where the bytes of `file` are."""
    return f"{endpoint()}/{check_repo(repo)}/resolve/{quote(revision, safe='')}/{quote(file)}"


def origin(url: str) -> tuple[str, str, int] | None:
    """(scheme, host, port) of a web address, None for anything else."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        return (parts.scheme, parts.hostname, port) if parts.hostname else None
    except (ValueError, KeyError):
        return None


class Client:
    """Connections to the hub and to where it redirects, kept alive; several threads may share it."""

    def __init__(self):
        import httpx

        self._sockets: list[socket.socket] = []
        direct = dict.fromkeys(("all://127.0.0.1", "all://localhost", "all://[::1]"))   # no proxy to this computer
        try:
            self._http = httpx.Client(timeout=WAIT, verify=_tls(), mounts=direct, headers={
                "User-Agent": "llmlab", "Accept-Encoding": "identity"})
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise Unreachable(f"the proxy that this system names cannot be used ({_reason(error)}); correct or unset "
                              "HTTP_PROXY, HTTPS_PROXY and ALL_PROXY") from None
        self.close = weakref.finalize(self, self._http.close)   # by whoever is done, or when nobody holds it any more

    def open(self, url: str, what: str, start: int | None = None, stop: int | None = None) -> "Answer":
        """GET `url`, bytes `start` to `stop` (exclusive) where given, redirects followed. The body is not read yet.

        Raises UnknownName (not there), Unreachable (everything else), always about `what`.
        """
        import httpx

        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            if _true(name):
                raise Unreachable(f"{what}: {name} is set, so the hub is not asked; unset it; {_NETWORKLESS}")
        headers = {} if start is None else {"Range": f"bytes={start}-{stop - 1}"}
        if origin(url) == origin(endpoint()) and (secret := token()):
            headers["Authorization"] = f"Bearer {secret}"       # httpx takes it out where a redirect leaves the hub
        try:
            request = self._http.build_request("GET", url, headers=headers, extensions={"trace": self._trace})
        except (httpx.InvalidURL, ValueError) as error:
            raise Unreachable(f"{what}: its address or HF_TOKEN has what cannot be sent ({_reason(error)})") from None
        digest = ""
        for _ in range(REDIRECTS + 1):
            response = self._ask(request, what)
            # The hub names the hash where it redirects; what the last host says of itself counts only without that.
            tag = response.headers.get("X-Linked-Etag") or response.headers.get("ETag") or ""
            tag = tag.removeprefix("W/").strip('"')
            digest = digest or (tag if DIGEST.fullmatch(tag) else "")
            following = response.next_request
            if following is None:
                return Answer(response, what, start, stop, digest)
            response.close()
            if request.url.scheme == "https" != following.url.scheme:
                raise Unreachable(f"{what}: {request.url.host} redirects to an address that is not followed")
            request = following
        raise Unreachable(f"{what}: {request.url.host} redirects in circles (more than {REDIRECTS} times)")

    def _ask(self, request: "httpx.Request", what: str) -> "httpx.Response":
        """One answer without its body; tried again where that may help."""
        import httpx

        host = request.url.host or "the server"
        for attempt in range(RETRIES + 1):
            time.sleep(PAUSE * attempt)
            late = threading.Event()
            watch = threading.Timer(PATIENCE, self._hang_up, [late])
            watch.daemon = True
            watch.start()
            try:
                response = self._http.send(request, stream=True)
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                if late.is_set() or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError
                                               | httpx.UnsupportedProtocol):    # trying again would not help
                    reason = "it answers too slowly" if late.is_set() else _reason(error)
                    raise Unreachable(f"{what}: {host} cannot be reached ({reason}); {_NETWORKLESS}") from None
                if attempt == RETRIES:
                    raise Unreachable(f"{what}: {host} does not answer ({_reason(error)}); {_NETWORKLESS}") from None
                continue
            finally:
                watch.cancel()
            if attempt == RETRIES or response.status_code not in (408, 429, 500, 502, 503, 504):
                return response
            response.close()
        raise AssertionError("the last attempt returns or raises")

    def _trace(self, event: str, info: dict) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._sockets.append(info["return_value"].get_extra_info("socket"))

    def _hang_up(self, late: threading.Event) -> None:
        late.set()
        for sock in list(self._sockets):      # all of them: which one is late httpx does not say
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)      # not SSLSocket's: another thread reads


class Answer:
    """One answer of a server, its body not read yet.

    `.first` is the position of the body's first byte in the file; `.total` the file's bytes, None where the server
    ignored the range or none was asked for; `.digest` the hash that the hub gives for the file, "" for none.
    """

    def __init__(self, response: "httpx.Response", what: str, start: int | None, stop: int | None, digest: str):
        self._response, self._what, self._host = response, what, response.url.host
        self.url, self.headers, self.digest = str(response.url), response.headers, digest
        self.first, self.total = 0, None
        length = self.headers.get("Content-Length", "")
        self._expected = int(length) if re.fullmatch(r"\d{1,18}", length) else None
        try:
            self._check(start, stop)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._response.close()

    def _check(self, start: int | None, stop: int | None) -> None:
        """Raise what an error status means; read Content-Range."""
        status = self._response.status_code
        if status == 416 and start == 0:        # an empty file has no first byte
            self.total = self._expected = 0
            return
        if status not in (200, 206):
            raise _refusal(self._what, self._host, status, self.headers.get("X-Error-Code", ""))
        if self.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Unreachable(f"{self._what}: {self._host} sends a packed answer that was not asked for")
        if status == 206:
            stated = self.headers.get("Content-Range", "").strip()
            match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", stated)
            first, last, total = map(int, match.groups()) if match else (-1, -1, -1)
            if start is None or first != start or last != min(stop, total) - 1 or last < first:
                raise Unreachable(f"{self._what}: {self._host} sent another range than was asked for ({stated[:60]!r})")
            self.first, self.total, self._expected = first, total, last - first + 1

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes. Raises Unreachable where it stops early, stalls, drips or does not end."""
        import httpx

        done, until = 0, time.monotonic() + PATIENCE
        try:
            for chunk in self._response.iter_raw() if self._expected != 0 else ():
                now, done = time.monotonic(), done + len(chunk)
                if now > until or (self._expected is not None and done > self._expected):
                    raise self._broken("it sends too slowly" if now > until else "it sends more than it said")
                until = min(now + PATIENCE, until + len(chunk) / PACE)
                yield chunk
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise self._broken(_reason(error)) from None
        finally:
            self.close()
        if self._expected is not None and done < self._expected:
            raise self._broken(f"{done} of {self._expected} bytes came")

    def _broken(self, reason: str) -> Unreachable:
        return Unreachable(f"{self._what}: {self._host} broke off ({reason}); try again")

    def read(self, limit: int) -> bytes:
        """The whole body. Raises BadFile where it is longer than `limit` bytes, and Unreachable."""
        data = bytearray()
        with contextlib.closing(self.chunks()) as chunks:
            while (self._expected or len(data)) <= limit:
                if (chunk := next(chunks, None)) is None:
                    return bytes(data)
                data += chunk
        self.close()
        raise BadFile(f"{self._what}: the answer of {self._host} is longer than the {format_bytes(limit)} it may have")


def _refusal(what: str, host: str, status: int, code: str) -> UnknownName | Unreachable:
    """What an error status and the hub's own error code mean."""
    if code == "GatedRepo":
        page = f"{endpoint()}/{'/'.join(what.split('/')[:2])}"
        return Unreachable(f"{what} is gated: accept its licence at {page}, then set HF_TOKEN to your access token")
    if code == "RepoNotFound" or (status == 401 and not code and not token()):
        return UnknownName(f"{what}: {host} has no such model, or it is private (then set HF_TOKEN)")
    if code == "EntryNotFound":
        return UnknownName(f"{what}: the repository has no such file")
    if code == "RevisionNotFound":
        return UnknownName(f"{what}: the repository has no such revision")
    if status in (401, 403):
        return Unreachable(f"{what}: {host} refuses access ({status}); set HF_TOKEN to one that may read it")
    if status in (404, 410):
        return UnknownName(f"{what}: not found at {host}")
    if status == 429:
        return Unreachable(f"{what}: {host} wants fewer requests (429); wait a minute, or set HF_TOKEN")
    return Unreachable(f"{what}: {host} answered with error {status}; try again later")


def _true(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "on", "yes", "true")


@functools.cache
def _tls() -> ssl.SSLContext:
    """Certificates of certifi and of this system, where a company's own are."""
    import httpx

    context = httpx.create_ssl_context()
    context.load_default_certs()
    if bundle := os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE"):
        with contextlib.suppress(OSError):
            context.load_verify_locations(bundle)
    return context


def _reason(error: BaseException) -> str:
    import httpx

    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    while inner := error.__cause__ or error.__context__:    # httpx and httpcore wrap what the socket said
        error = inner
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}; set SSL_CERT_FILE to your network's bundle"
    if isinstance(error, socket.gaierror):
        return "its name is not found; is there a network?"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:100]
