"""A decision: where a question was answered and why, what left this machine for it and what that cost; and the log of them."""

import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..catalog import Table
from ..errors import LabError
from ..units import format_bytes, format_seconds

SALT = secrets.token_bytes(16)           # of this process: a hash of a short question could be guessed otherwise
REASONS = {
    "sure": "the local model is sure enough", "unsure": "the local model is unsure", "rule": "a rule says so",
    "share": "unsure, but the share of calls is used up", "month": "unsure, but the month's calls are used up",
    "cap": "unsure, but the spending cap is reached", "count": "unsure, but what is spent cannot be counted",
    "offline": "unsure, but calling out is switched off", "network": "unsure, but the network failed",
    "timeout": "unsure, but the server did not answer in time", "server": "unsure, but the server failed",
    "busy": "unsure, but the server is busy",
    "refused": "unsure, but the server refused", "answer": "unsure, but the server sent no answer",
    "key": "unsure, but there is no key",
    "redaction": "unsure, but redaction failed, so nothing may leave",
    "no local answer": "the local model gave no answer",
}

_BEGINS = b'{"at": '                     # a line of the log; within a text the quotes would be escaped


@dataclass(frozen=True)
class Decision:
    """where: "local" or "remote", whose answer was given. reason: one of REASONS; why: in words. signal: how unsure (None: not
    asked), beside the threshold. bytes_out: of bodies sent, with every attempt, whatever came of them. redactions: things
    taken out of what left. cost: in the currency of the prices (None: not known). seconds: in all, `local_seconds` of them
    here. digest: of the question, by a key that this process alone has."""

    at: float
    where: str
    reason: str
    why: str
    signal: float | None
    threshold: float | None
    bytes_out: int = 0
    redactions: int = 0
    cost: float | None = 0.0
    attempts: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float = 0.0
    local_seconds: float = 0.0
    digest: str = ""

    def __str__(self) -> str:
        paid = "" if not self.cost else f", cost {self.cost:.6f}"
        left = f"{format_bytes(self.bytes_out)} left" if self.bytes_out else "nothing left"
        return f"{self.where}: {self.why}; {left}{paid}, {format_seconds(self.seconds)}"


def digest_of(messages: list[dict]) -> str:
    """Of a question: the same one has the same, and nobody can guess it."""
    said = json.dumps(messages, sort_keys=True, default=str).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(said, key=SALT, digest_size=8).hexdigest()


def table_of(decisions: Iterable[Decision]) -> Table:
    """Decisions, a row each."""
    rows = [{"where": one.where, "reason": one.reason, "unsure": one.signal, "threshold": one.threshold,
             "bytes out": one.bytes_out, "redacted": one.redactions, "cost": one.cost, "seconds": one.seconds}
            for one in decisions]
    return Table(rows, {"unsure": "{:.3f}".format, "threshold": "{:.3f}".format, "cost": "{:.6f}".format,
                        "seconds": "{:.2f}".format})


class Log:
    """Decisions as JSON lines. Each is appended in one write, so that several processes may share a file. Texts are written
    only where `texts` asks for it."""

    def __init__(self, path: str | os.PathLike, texts: bool = False):
        self.path, self.texts = Path(path).expanduser(), texts

    def checked(self) -> "Log":
        """Itself, where it can be written: that is known before anything is paid for. Raises LabError."""
        self._append(b"")
        return self

    def add(self, decision: Decision, messages: list[dict], text: str) -> None:
        """Raises LabError where it cannot be written."""
        said = {name: _finite(value) for name, value in asdict(decision).items()}
        if self.texts:
            said |= {"messages": messages, "text": text}
        self._append(json.dumps(said, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n")

    def _append(self, line: bytes) -> None:
        wrong = ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                if os.write(file, line) < len(line):
                    raise OSError(errno.ENOSPC, "no space for a line")
            finally:
                os.close(file)
        except OSError as error:
            wrong = error.strerror or type(error).__name__
        if wrong:
            raise LabError(f"the log {self.path.name[:80]} cannot be written ({wrong}); give another file")

    def read(self) -> list[Decision]:
        """The decisions in it; a line that a crash cut off is left out, and the one that was written onto it is not."""
        names, found = {field.name for field in fields(Decision)}, []
        # Lines end in \n and nothing else: texts may hold what Unicode calls a line's end.
        for line in self.path.read_bytes().split(b"\n") if self.path.exists() else ():
            try:
                said = json.loads(line[max(line.rfind(_BEGINS), 0):])
                found.append(Decision(**{name: value for name, value in said.items() if name in names}))
            except (ValueError, TypeError, AttributeError):
                continue
        return found


def _finite(value):
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
