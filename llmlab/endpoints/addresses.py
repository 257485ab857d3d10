"""Where an endpoint is: an address checked once, whether it is this computer, and whether anything may leave at all."""

import ipaddress
import os
from urllib.parse import urlsplit, urlunsplit

from ..errors import LabError

OFFLINE = "LLMLAB_OFFLINE"
_HUB_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def checked_url(given, allow_http: bool = False) -> str:
    """An address as OpenAI's client takes it: scheme, host, path, without a slash at the end; a bare host gets /v1.

    Raises LabError for anything that is no http(s) address, for one with a key or a query in it, and for plain http to
    another computer unless `allow_http`.
    """
    text = given.strip() if isinstance(given, str) else ""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise LabError("base_url is no address; give one like https://api.example.com/v1") from None
    if parts.scheme not in ("http", "https") or not host or not text.isprintable() or " " in text:
        raise LabError("base_url is no http(s) address; give one like https://api.example.com/v1 or http://127.0.0.1:8080")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise LabError('base_url holds more than an address; give https://host/v1, and the key as key="env:NAME"')
    if parts.scheme == "http" and not is_here(host) and not allow_http:
        raise LabError(f"http to {host[:100]} is read by everybody on the way; give https, or allow_http=True for a network of "
                       "your own")
    shown = f"[{host}]" if ":" in host else host
    path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions").rstrip("/")
    return urlunsplit((parts.scheme, shown if port is None else f"{shown}:{port}", path or "/v1", "", ""))


def is_here(host: str) -> bool:
    """Whether an address is this computer's own and nobody else's."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def switched_off(here: bool) -> str:
    """The variable that forbids a call, or "". LLMLAB_OFFLINE forbids each call out; the hub's switches those that leave this
    computer (`here` false)."""
    return next((name for name in (OFFLINE, *(() if here else _HUB_OFFLINE)) if _on(name)), "")


def _on(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")
