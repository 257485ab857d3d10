"""Endpoint: one server that speaks OpenAI's API, near or far, asked with OpenAI's own client, within a cap, with retries."""

import math
import random
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from ..errors import LabError
from .addresses import checked_url, is_here, switched_off
from .failing import Failure, failure_of
from .keys import Scrubbing, key_source, scrubbed
from .replies import BUSY, CAP, COUNT, KEY, NETWORK, OFFLINE, SERVER, TIMEOUT, CallFailed, Reply, counts_of, piece_of, reply_of
from .sending import as_json, beside_text
from .spending import NANO, Ledger, OverCap, amount_of, price_of
from .wiring import Wire

_AGAIN = {NETWORK, TIMEOUT, SERVER, BUSY}    # what another attempt may cure
_TEMPLATE = 512              # tokens that a chat template may add to what is sent, at most
_LONGEST_WAIT = 8.0          # seconds between two attempts
_PATIENCE = 60.0             # seconds of Retry-After that are waited for
_OWN = ("model", "messages", "stream", "stream_options", "extra_body", "extra_headers", "extra_query", "timeout")


@dataclass(frozen=True)
class Preview:
    """What a call would send, to the byte. The key is not read for it: in `headers` its place says so."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes


class Endpoint:
    """A model on a server: vLLM, llama.cpp, Ollama, `llmlab serve`, a cloud.

    `Endpoint("https://api.example.com/v1", model="large", key="env:EXAMPLE_KEY", price=(0.15, 0.60), cap="5 per month")`

    base_url: its address; a bare host gets /v1. key: where the key lies, "env:NAME" or "keyring:service/user", never the key.
    price: (input, output) for a million tokens, in any currency; None: not known. cap: the most a month may cost, in the same
    currency, of all processes that share `ledger` (None: a file of this address in llmlab's cache); what a call can cost at
    most is reserved before it is made. timeout: seconds of silence before a call is given up. retries: attempts after the
    first, where the network, a timeout, a 5xx or a 429 was in the way, `wait` seconds apart, doubling, by chance up to half
    less, or as the server's Retry-After says. limit: what the server calls the most tokens of an answer. allow_http: plain http
    to another computer. Raises LabError.
    """

    def __init__(self, base_url: str, model: str, *, key: str | None = None, price=None, cap=None, ledger=None,
                 timeout: float = 60.0, retries: int = 2, wait: float = 0.5, allow_http: bool = False,
                 limit: str = "max_tokens"):
        self.base_url = checked_url(base_url, allow_http)
        self.here = is_here(urlsplit(self.base_url).hostname)
        if not isinstance(model, str) or not model.strip() or not model.isprintable():
            raise LabError(f"model is {model!r:.40}; give the name that the server has for it: models() lists them")
        self.model, self.key, self.price = model, key_source(key), price_of(price)
        self.cap = None if cap is None else amount_of(cap)
        if self.cap is not None and self.price is None:
            raise LabError("a cap needs prices to count with: give price=(input, output) for a million tokens; (0, 0) is free")
        for name, value, least in (("timeout", timeout, 0.01), ("wait", wait, 0.0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
                raise LabError(f"{name} is {value!r:.40}; give seconds")
        if isinstance(retries, bool) or not isinstance(retries, int) or not 0 <= retries <= 10:
            raise LabError(f"retries is {retries!r:.40}; give how many more attempts, 0 to 10")
        if limit not in ("max_tokens", "max_completion_tokens"):
            raise LabError(f"limit is {limit!r:.40}; give 'max_tokens' or 'max_completion_tokens'")
        self.timeout, self.retries, self.wait, self.limit = float(timeout), retries, float(wait), limit
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger) if ledger else Ledger.named(
            urlsplit(self.base_url).netloc)
        self._wire = None

    def __repr__(self) -> str:
        key = f", key={str(self.key)!r}" if self.key else ""
        return f"Endpoint({self.base_url!r}, model={self.model!r}{key})"

    def __getstate__(self) -> dict:
        return {**vars(self), "_wire": None}

    # ---- asking -------------------------------------------------------------------------------------------------

    def chat(self, messages, *, max_tokens: int = 256, temperature: float = 0.0, chances: int | None = None, **more) -> Reply:
        """What the model answers to `messages`, a text or OpenAI's list. chances: how many of the likeliest tokens are told
        at each place (up to 20; None: none). more: what OpenAI's chat takes besides: n, seed, stop, tools, response_format...

        Raises CallFailed, whose `kind` says what was in the way, when the attempts are used up; LabError for what cannot be
        asked.
        """
        body = self.body(messages, max_tokens=max_tokens, temperature=temperature, chances=chances, **more)
        done = self._through(body, lambda wire: reply_of(self._create(wire, body)))
        return self._finished(done, done.found)

    def stream(self, messages, *, max_tokens: int = 256, temperature: float = 0.0, **more) -> Generator[str, None, Reply]:
        """The answer in pieces, as it comes; the generator's value is its Reply. Nothing is asked again once it has begun."""
        body = self.body(messages, max_tokens=max_tokens, temperature=temperature, **more)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        return self._pieces(body)

    def body(self, messages, *, max_tokens: int = 256, temperature: float = 0.0, chances: int | None = None, **more) -> dict:
        """What is asked, as OpenAI's client takes it. Raises LabError."""
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        if not isinstance(messages, (list, tuple)) or not messages or not all(
                isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages):
            raise LabError('messages is no conversation; give a text, or [{"role": "user", "content": "..."}]')
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise LabError(f"max_tokens is {max_tokens!r:.40}; give how long an answer may be, 1 at least")
        for name in more:
            if name in _OWN or name in ("max_tokens", "max_completion_tokens"):
                raise LabError(f"{name} is not set here: the endpoint does, or stream()")
        many = more.get("n")
        if many is not None and (isinstance(many, bool) or not isinstance(many, int) or many < 1):
            raise LabError(f"n is {many!r:.40}; give how many answers, 1 at least")
        told = {} if chances is None else {"logprobs": True, "top_logprobs": chances}
        return as_json({"model": self.model, "messages": messages, self.limit: max_tokens, "temperature": temperature,
                        **told, **more})

    def preview(self, messages, **settings) -> Preview:
        """What `chat` of the same would send, by the same client, to the byte. Nothing leaves."""
        return self.written(self.body(messages, **settings))

    def written(self, body: dict) -> Preview:
        """A body as the client writes it."""
        wire = Wire(self.base_url, self.here, self.timeout, record=True)
        try:
            with wire.signing("x" if self.key else None):
                self._create(wire, body)
        finally:
            wire.close()
        return Preview(*wire.recorded[0])

    def models(self) -> list[str]:
        """The names the server has. Raises CallFailed."""
        return self._through(None, lambda wire: sorted(one.id for one in wire.client.models.list().data)).found

    def healthy(self) -> bool:
        """Whether it answers, and has the model; asked once, without retries."""
        try:
            return self.model in self._once().models()
        except LabError:
            return False

    def close(self) -> None:
        """Let go of the connections; the next call makes new ones."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    def worst(self, body: dict) -> int:
        """What a call can cost at most, in billionths: no tokenizer makes more tokens of a text than it has bytes."""
        return self.price.nano(len(self.written(body).body) + _TEMPLATE, body[self.limit] * int(body.get("n") or 1))

    # ---- one attempt and the next -------------------------------------------------------------------------------

    def _once(self) -> "Endpoint":
        other = object.__new__(type(self))
        vars(other).update(vars(self), retries=0, timeout=min(self.timeout, 5.0), _wire=None)
        return other

    def _wired(self) -> Wire:
        if self._wire is None:
            self._wire = Wire(self.base_url, self.here, self.timeout)
        return self._wire

    def _through(self, body: dict | None, work: Callable) -> "_Through":
        """`work(wire)` until it succeeds, each attempt within the cap. Raises CallFailed."""
        wire, done = self._wired(), _Through()
        for attempt in range(self.retries + 1):
            self._check()
            done.secret = self._secret()
            done.held, failed = self._reserved(body, done), None
            done.attempts += 1
            with wire.signing(done.secret):
                try:
                    done.found = work(wire)
                except BaseException as error:
                    failed = failure_of(error, done.secret)
                    if failed is None:               # Ctrl-C, or what cannot be asked: what was reserved stays so
                        raise
            sent = 0 if failed is not None and failed.unsent else wire.sent()
            done.sent += sent
            if failed is None:
                return done
            # An error that the server itself told is not billed, nor is what never left; of anything else nobody knows.
            self._settle(done, 0 if failed.answered or not sent else done.most)
            if failed.kind not in _AGAIN or attempt == self.retries or (failed.after or 0) > _PATIENCE:
                break
            time.sleep(failed.after if failed.after is not None else
                       min(self.wait * 2 ** attempt, _LONGEST_WAIT) * random.uniform(0.5, 1.0))
        raise self._failed(failed, done)

    def _check(self) -> None:
        if not self.here and (name := switched_off(self.here)):
            raise CallFailed(f"{name} is set, so {self._host} is not asked; unset it to call out", OFFLINE)

    def _secret(self) -> str | None:
        said = ""
        try:
            return self.key.read() if self.key else None
        except LabError as error:
            said = str(error)
        raise CallFailed(said, KEY)

    def _reserved(self, body: dict | None, done: "_Through") -> str | None:
        """The reservation's name, `done.most` its size; None where nothing is paid or nothing is capped."""
        if body is None or self.price is None:
            return None
        if self.cap is not None and (other := beside_text(body)):
            raise CallFailed(f"with a cap only text can be sent: what {other!r} costs is not known before; leave it out, or "
                             "give an Endpoint without a cap", COUNT, done.sent, done.spent / NANO, done.attempts)
        done.most, said, kind = self.worst(body), "", CAP
        if self.cap is None:
            return None
        try:
            return self.ledger.reserve(done.most, self.cap)
        except OverCap as error:
            said = f"the cap is reached: {error}"
        except LabError as error:
            said, kind = str(error), COUNT
        raise CallFailed(said, kind, done.sent, done.spent / NANO, done.attempts)

    def _settle(self, done: "_Through", amount: int) -> None:
        done.spent += amount
        if done.held is not None:
            with suppress(LabError):         # an answer is not lost over it: what was reserved stays so, and the next call says
                self.ledger.settle(done.held, amount)

    def _finished(self, done: "_Through", reply: Reply) -> Reply:
        """A reply with what all attempts took; without a count of tokens the worst is taken as its cost."""
        if self.price is not None:
            counted = reply.prompt_tokens is not None and reply.completion_tokens is not None
            self._settle(done, self.price.nano(reply.prompt_tokens, reply.completion_tokens) if counted else done.most)
        return replace(reply, texts=tuple(scrubbed(text, done.secret) for text in reply.texts), bytes_out=done.sent,
                       cost=None if self.price is None else done.spent / NANO, attempts=done.attempts,
                       seconds=time.monotonic() - done.began)

    def _failed(self, failed: Failure, done: "_Through", where: str = "") -> CallFailed:
        tries = f", {done.attempts} times" if done.attempts > 1 else ""
        return CallFailed(f"{self._host} {failed.said}{tries}{where}", failed.kind, done.sent,
                          None if self.price is None else done.spent / NANO, done.attempts)

    @property
    def _host(self) -> str:
        return urlsplit(self.base_url).netloc

    def _create(self, wire: Wire, body: dict):
        wrong = ""
        try:
            return wire.client.chat.completions.create(**body)
        except TypeError as error:
            wrong = str(error).rpartition("()")[2].strip()
        raise LabError(f"OpenAI's client cannot send this: {wrong[:200]}")

    def _pieces(self, body: dict) -> Generator[str, None, Reply]:
        """What is cut off, by the reader or by the network, counts in full."""
        done = self._through(body, lambda wire: self._create(wire, body))
        texts, usage, ended, whole, failed, clean = [], (None, None), None, False, None, Scrubbing(done.secret)
        try:
            for chunk in done.found:
                text, why = piece_of(chunk)
                texts.append(text)
                usage, ended = counts_of(chunk) if chunk.usage else usage, why or ended
                if piece := clean.add(text):
                    yield piece
            # A connection that is closed looks like an end: one that is meant says so, or what it took.
            whole = ended is not None or usage != (None, None)
            if not whole:
                failed = Failure(NETWORK, "hung up")
            if piece := clean.rest():
                yield piece
        except Exception as error:
            failed, whole = failure_of(error, done.secret), False
        finally:
            reply = self._finished(done, Reply(("".join(texts),), *(usage if whole else (None, None)), finish=ended))
            done.found.close()
        if failed is not None:
            raise self._failed(failed, done, ", in the middle of an answer")
        return reply


@dataclass
class _Through:
    """What attempts have come to. most: what the last can cost; spent: by all, in billionths."""

    began: float = field(default_factory=time.monotonic)
    found: object = None
    held: str | None = None
    secret: str | None = field(default=None, repr=False)
    most: int = 0
    spent: int = 0
    sent: int = 0
    attempts: int = 0
