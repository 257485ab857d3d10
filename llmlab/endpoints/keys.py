"""Keys: an endpoint knows where its key lies, never what it is. It is read for each request, and put into that request alone.

"env:NAME" is an environment variable, "keyring:service/user" the system's keyring. Anything else is refused, in words that do
not repeat it: a key in a notebook is a key in every copy of the notebook.
"""

import os
import re
from dataclasses import dataclass

from ..errors import LabError

HIDDEN = "[key]"
_REMEDY = 'give "env:NAME" (an environment variable) or "keyring:service/user", never the key itself'
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
# What keys begin with: a key after "env:" is no name of a variable, though it may look like one.
_KEYS = re.compile(r"(?i)^(sk|pk|rk|hf|ghp|gho|gsk|xai|r8)[-_]|^AIza|^AKIA")


@dataclass(frozen=True)
class KeySource:
    """kind: "env" or "keyring". where: the variable, or "service/user". `read()` is the key; nothing here holds it."""

    kind: str
    where: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.where}"

    def read(self) -> str:
        """The key. Raises LabError where it is not there, naming the place."""
        found = os.environ.get(self.where, "") if self.kind == "env" else self._from_keyring()
        found = (found or "").strip()
        if not found:
            remedy = f"export {self.where}=... in the shell that starts JupyterLab" if self.kind == "env" else \
                f"python -m keyring set {self.where.replace('/', ' ', 1)}"
            raise LabError(f"there is no key in {self}; {remedy}")
        if not all("!" <= letter <= "~" for letter in found):
            raise LabError(f"the key in {self} has other characters than ASCII's visible ones; set it again")
        return found

    def _from_keyring(self) -> str | None:
        try:
            import keyring
        except ImportError:
            raise LabError(f"{self} needs the package keyring: pip install keyring, or name a variable: env:NAME") from None
        wrong = ""
        try:
            return keyring.get_password(*self.where.split("/", 1))
        except Exception as error:           # a backend's own: none there, locked, refused
            wrong = type(error).__name__
        raise LabError(f"the keyring did not give {self} ({wrong}); unlock it, or name a variable: env:NAME")


def key_source(given) -> KeySource | None:
    """What `key=` means. Raises LabError, not repeating what was given."""
    if given is None or isinstance(given, KeySource):
        return given
    kind, colon, where = given.partition(":") if isinstance(given, str) else ("", "", "")
    if kind == "env" and colon and _NAME.fullmatch(where) and not _KEYS.match(where):
        return KeySource(kind, where)
    service, slash, user = where.partition("/")
    if kind == "keyring" and slash and service.strip() and user.strip() and where.isprintable() and len(where) <= 200:
        return KeySource(kind, where)
    raise LabError(f"key names no place where a key lies; {_REMEDY}")


def scrubbed(text: str, secret: str | None) -> str:
    """A text of a server's, without the key it was given."""
    return text.replace(secret, HIDDEN) if secret else text


class Scrubbing:
    """The same of a text that comes in pieces: what may be the beginning of the key waits for what follows."""

    def __init__(self, secret: str | None):
        self.secret, self._held = secret, ""

    def add(self, piece: str) -> str:
        """What can be told now."""
        if not self.secret:
            return piece
        text = scrubbed(self._held + piece, self.secret)
        waits = next((at for at in range(min(len(text), len(self.secret) - 1), 0, -1) if self.secret.startswith(text[-at:])), 0)
        self._held = text[len(text) - waits:]
        return text[:len(text) - waits]

    def rest(self) -> str:
        """What waited, when nothing follows."""
        held, self._held = self._held, ""
        return held
