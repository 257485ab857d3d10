"""The router: answers here, and calls out only where the local model is unsure and everything else allows it."""

import copy
import difflib
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..catalog import Table
from ..errors import LabError
from ..units import format_bytes
from .addresses import switched_off
from .allowing import PerMonth, Share, allowance_of
from .calibrating import Calibration, calibrated
from .calling import Endpoint, Preview
from .deciding import REASONS, Decision, Log, digest_of, table_of
from .near import near_of
from .redacting import BUILT_IN, Redactor, Vault, texts_of
from .replies import CallFailed, Reply
from .sending import as_json
from .signals import signal_of
from .spending import amount_of


@dataclass(frozen=True)
class Routed:
    """An answer and the decision behind it. note: "" where it is the answer that was wanted, else why it is another."""

    text: str
    decision: Decision
    note: str = ""

    def __str__(self) -> str:
        return f"{self.text}\n[{self.note}]" if self.note else self.text


@dataclass(frozen=True)
class Leaving:
    """What would leave for a question. sent: method, address, headers and body, to the byte. pieces: the question's texts as
    (text, None) where they leave as they are, and (text, replacement) where they do not."""

    sent: Preview
    pieces: tuple[tuple[str, str | None], ...]
    redactions: int

    @property
    def body(self) -> bytes:
        return self.sent.body

    @property
    def marked(self) -> str:
        """The texts, what is taken out beside what leaves instead: {anna@example.org -> [EMAIL_1]}."""
        return "".join(text if other is None else f"{{{text} -> {other}}}" for text, other in self.pieces)

    def __str__(self) -> str:
        return f"{format_bytes(len(self.body))} to {self.sent.url}, {self.redactions} redacted: {self.marked}"


def router(local, remote: Endpoint, *, unsure: str | Callable = "entropy", at_most: float | str | None = 0.1, cap=None,
           threshold: float | None = None, redact: Iterable = tuple(BUILT_IN), log: str | os.PathLike | None = None,
           log_texts: bool = False, offline: bool = False, burst: int = 3, adapt: float = 0.0, same: Callable | None = None,
           samples: int = 5) -> "Router":
    """A Router between `local` and `remote`.

    local: who answers first: an Endpoint, a server of `llmlab.serve(..., background=True)`, an engine, what `llmlab.decoder`
    gives, or a GGUF's path. remote: an Endpoint. unsure: "entropy", "logprob", "agreement" (of `samples` drawn answers,
    compared by `same`), a `Rule`, or a function of the messages. at_most: of the questions that may go out, a share like 0.1
    or "10 %" (`burst` of them in a row), or "200 per month"; None: no limit. It holds, whatever is asked. threshold: a signal
    above it goes out; `calibrate` finds it; `adapt` moves it with what is asked, by that part of the signals' spread each time
    (0.02 is gentle). cap: the most a month may cost, as an Endpoint's. redact: names of BUILT_IN, and functions from text to
    text; () sends everything as it is. log: a file of JSON lines, with `log_texts` with questions and answers. offline: nothing
    goes out; so does LLMLAB_OFFLINE=1. Raises LabError.
    """
    return Router(local, remote, unsure, at_most, cap, threshold, redact, log, log_texts, offline, burst, adapt, same, samples)


class Router:
    """See `router`. `ask(messages)` answers, `decisions` says where and why; `preview(messages)` shows what would leave."""

    def __init__(self, local, remote, unsure, at_most, cap, threshold, redact, log, log_texts, offline, burst, adapt, same,
                 samples):
        if not isinstance(remote, Endpoint):
            raise LabError('remote is no Endpoint; give llmlab.Endpoint("https://...", model="...", key="env:NAME")')
        remote = copy.copy(remote)           # the cap may be set here, and whoever gave it goes on with theirs
        if cap is not None:
            if remote.price is None:
                raise LabError("a cap needs prices to count with: give the remote Endpoint price=(input, output)")
            remote.cap = amount_of(cap)
        for name, value in (("threshold", threshold), ("adapt", adapt)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value)):
                raise LabError(f"{name} is {value!r:.40}; give a number")
        self.signal = signal_of(unsure, same, samples)
        self.remote, self.redactor = remote, Redactor(redact)
        self.allowance = allowance_of(at_most, remote.ledger, burst)
        self.threshold = 0.5 if threshold is None and self.signal.rule else threshold
        self.log = None if log is None else Log(log, log_texts).checked()
        self.offline, self.adapt = bool(offline), float(adapt)
        self.calibration: Calibration | None = None
        self.decisions: list[Decision] = []
        self._lock = threading.Lock()
        self.local, self._end = near_of(local)

    def __repr__(self) -> str:
        return f"<router: {self.local!r}, else {self.remote!r}; {self.signal.name}, {self.allowance!r}>"

    def __enter__(self) -> "Router":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Let go of what was begun for it."""
        self._end()
        self.remote.close()

    # ---- before -------------------------------------------------------------------------------------------------

    def calibrate(self, questions: Iterable, *, a_month: int | None = None, progress: Callable[[int], None] | None = None,
                  **settings) -> Calibration:
        """Ask the local model these, and put the threshold where at most `at_most` of them lie above it. a_month: how many
        questions a month has, where `at_most` is so many a month. Nothing goes out. Raises LabError."""
        share = float(self.allowance.share) if isinstance(self.allowance, Share) else None
        if isinstance(self.allowance, PerMonth):
            if isinstance(a_month, bool) or not isinstance(a_month, int) or a_month < 1:
                raise LabError("at_most is so many calls a month: give a_month, how many questions a month has")
            share = min(self.allowance.most / a_month, 1.0)
        if share is None:
            raise LabError("there is no limit to calibrate to; give at_most, or a threshold")
        signals = []
        for at, one in enumerate(questions):
            messages = _conversation(one)
            signals.append(self.signal.judged(messages) if self.signal.rule else
                           self.signal.answered(self._nearby(), messages, settings)[1])
            if progress is not None:
                progress(at + 1)
        return self.calibrate_to(signals, share)

    def calibrate_to(self, signals, share: float | None = None) -> Calibration:
        """The same from signals that are known."""
        share = float(self.allowance.share) if share is None and isinstance(self.allowance, Share) else share
        if share is None:
            raise LabError("there is no share to calibrate to; give one")
        self.calibration = calibrated(signals, share)
        self.threshold = self.calibration.threshold
        return self.calibration

    def preview(self, messages, **settings) -> Leaving:
        """What would leave, were this asked and called out for: the same bytes. Nothing leaves. Raises LabError."""
        messages, vault = _conversation(messages), Vault()
        sent, more = self._outgoing(messages, settings, vault)
        pieces = []
        for before, after in zip(messages, sent, strict=True):
            pieces += _differences(_text(before), _text(after))
        return Leaving(self.remote.preview(sent, **more), tuple(pieces), len(vault) + vault.changed)

    # ---- asking -------------------------------------------------------------------------------------------------

    def ask(self, messages, **settings) -> Routed:
        """Answer here, or there where the local model is unsure and it is allowed. settings: as Endpoint.chat's, for both.

        Where the call fails the local answer is given, and `note` says so. Raises LabError where neither answers, where there
        is no threshold yet, and for settings that cannot be used.
        """
        if self.threshold is None:
            raise LabError("there is no threshold yet: calibrate(questions), or give threshold=")
        for name in {"chances", "n"} & settings.keys():
            raise LabError(f"{name} is not set here: the signal does; ask the endpoints for more than one answer")
        messages, began = _conversation(messages), time.monotonic()
        self.allowance.asked()
        reply, signal, missing = self._here(messages, settings)
        here = time.monotonic() - began
        wanted = missing != "" or signal > self.threshold
        self._follow(signal)
        far, reason, failed, vault = None, "sure", None, Vault()
        if wanted:
            far, reason, failed = self._there(messages, settings, vault)
        if far is None and reply is None:
            if missing:
                raise LabError(f"nobody answers: {missing}; and of the call: {REASONS[reason].removeprefix('unsure, but ')}")
            reply = self._nearby().chat(messages, **settings)
            here += reply.seconds
        if missing and far is not None:
            reason = "no local answer"
        taken = far or failed
        # What a server says of a failure may quote the question: it is for who asked, and no part of what is written down.
        said = REASONS[reason] if failed is None else f"{REASONS[reason]} ({failed})"
        decision = Decision(time.time(), "local" if far is None else "remote", reason, REASONS[reason],
                            None if missing else signal, self.threshold, bytes_out=taken.bytes_out if taken else 0,
                            redactions=len(vault) + vault.changed if taken and taken.bytes_out else 0,
                            cost=taken.cost if taken else 0.0, attempts=taken.attempts if taken else 0,
                            prompt_tokens=far.prompt_tokens if far else None,
                            completion_tokens=far.completion_tokens if far else None,
                            seconds=time.monotonic() - began, local_seconds=here, digest=digest_of(messages))
        wordless = far is not None and reply is not None and not far.text.strip()      # calls of tools alone, a filter
        text = vault.restore(far.text) if far and not wordless else reply.text
        unwritten = self._remember(decision, messages, text)
        notes = ("" if far or reason == "sure" else f"answered here: {said}",
                 f"the call brought no words ({far.finish or 'no reason given'}); this is the local answer" if wordless else "",
                 unwritten)
        return Routed(text, decision, "; ".join(filter(None, notes)))

    def _here(self, messages: list[dict], settings: dict) -> tuple[Reply | None, float, str]:
        """(the local answer, how unsure it is, what was in the way)."""
        if self.signal.rule:
            return None, self.signal.judged(messages), ""
        try:
            return *self.signal.answered(self._nearby(), messages, settings), ""
        except CallFailed as error:
            return None, math.inf, str(error)

    def _nearby(self):
        """Who answers first; offline only where that is this computer."""
        if self.offline and not self.local.here:
            raise CallFailed(f"the router is offline and {self.local!r} is another computer; give a model of this one",
                             "offline")
        return self.local

    def _there(self, messages: list[dict], settings: dict, vault: Vault) -> tuple[Reply | None, str, LabError | None]:
        """(the remote answer, the reason, what was in the way)."""
        if self.offline or switched_off(True):
            return None, "offline", None
        try:
            sent, more = self._outgoing(messages, settings, vault)
        except LabError as error:
            failed = CallFailed(str(error), "refused")
            return None, "redaction", failed
        try:
            may = self.allowance.take()
        except LabError as error:            # the ledger's: who cannot count calls makes none
            return None, "count", CallFailed(str(error), "count")
        if not may:
            return None, self.allowance.reason, None
        try:
            found = self.remote.chat(sent, **more)
        except CallFailed as error:
            return None, error.kind, error
        return found, "rule" if self.signal.rule else "unsure", None

    def _outgoing(self, messages: list[dict], settings: dict, vault: Vault) -> tuple[list[dict], dict]:
        both = texts_of([as_json(messages), as_json(settings)])          # a placeholder may occur in neither
        return self.redactor.messages(messages, vault, both), self.redactor.anything(settings, vault, both)

    def _follow(self, signal: float) -> None:
        """Move the threshold so that the share of signals above it comes to what is allowed (Robbins and Monro's way)."""
        if not self.adapt or self.calibration is None or not isinstance(self.allowance, Share):
            return
        with self._lock:
            over = float(signal > self.threshold) - float(self.allowance.share)
            self.threshold += self.adapt * self.calibration.spread * over

    def _remember(self, decision: Decision, messages: list[dict], text: str) -> str:
        """What was in the way of the log: no answer is lost over it."""
        with self._lock:
            self.decisions.append(decision)
        try:
            if self.log is not None:
                self.log.add(decision, messages, text)
        except LabError as error:
            return str(error)
        return ""

    # ---- in words -----------------------------------------------------------------------------------------------

    @property
    def table(self) -> Table:
        """The decisions, a row each."""
        return table_of(self.decisions)

    def to_frame(self):
        """The decisions as a pandas DataFrame. Raises LabError where pandas is not installed."""
        return Table([vars(one) for one in self.decisions]).to_frame()

    @property
    def answer(self) -> str:
        """What stayed, what left, what it cost."""
        made = self.decisions
        if not made:
            return "Nothing was asked yet."
        out = [one for one in made if one.where == "remote"]
        kept = sum(one.where == "local" and one.reason != "sure" for one in made)
        costs = [one.cost for one in made]
        cost = "at a price that is not known" if None in costs else f"for {sum(costs):.6f}"
        held = f"; {kept} that should have gone out {'was' if kept == 1 else 'were'} answered here" if kept else ""
        share = f"{len(out) / len(made):.0%}; {self.allowance!r}"
        return (f"Of {len(made)} questions {len(made) - len(out)} stayed here and {len(out)} went out ({share}): "
                f"{format_bytes(sum(one.bytes_out for one in made))} left {cost}{held}.")


def _conversation(messages) -> list[dict]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, (list, tuple)) or not messages or not all(isinstance(one, dict) for one in messages):
        raise LabError('that is no question; give a text, or [{"role": "user", "content": "..."}]')
    return [dict(one) for one in messages]


def _text(message: dict) -> str:
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    said = [one if isinstance(one, str) else str(one.get("text", "")) if isinstance(one, dict) else "" for one in parts]
    return f"{message.get('role', '')}: {' '.join(said)}\n"


def _differences(before: str, after: str) -> list[tuple[str, str | None]]:
    """A text in pieces, word by word: those that stay as they are, and what stands for the others."""
    old, new = (re.findall(r"\[\w+\]|\w+|\s+|[^\w\s]", text) for text in (before, after))
    found = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        found.append(("".join(old[a:b]), None if kind == "equal" else "".join(new[c:d])))
    return found
