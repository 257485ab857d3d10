"""What one server shares between its requests: the engine, how the server stands, its limits, what it has counted."""

import hashlib
import time
from dataclasses import dataclass, field
from functools import cached_property

from ..runtime.engine import Engine
from . import metrics
from .limits import Gate, Limits
from .metrics import Counts, Histogram
from .refusals import not_ready

LOADING, READY, STOPPING = "loading", "ok", "stopping"
_SAID = {LOADING: "The model is still being loaded.", STOPPING: "The server is stopping."}


@dataclass
class Service:
    """name: the model's, as clients ask for it. engine: None until it is loaded. standing: one of LOADING, READY, STOPPING, or
    what went wrong. created: seconds since 1970."""

    name: str
    limits: Limits
    gate: Gate
    engine: Engine | None = None
    standing: str = LOADING
    talks: set = field(default_factory=set)         # those that are going on
    created: int = field(default_factory=lambda: int(time.time()))
    outcomes: Counts = field(default_factory=lambda: Counts("endpoint", "outcome"))
    first: Histogram = field(default_factory=lambda: Histogram(metrics.FIRST))
    each: Histogram = field(default_factory=lambda: Histogram(metrics.EACH))
    whole: Histogram = field(default_factory=lambda: Histogram(metrics.WHOLE))

    @cached_property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: another one where the same seed may give another text."""
        decoder = self.engine.decoder
        said = f"{decoder.path} {decoder.strategy} {decoder.dtype} {self.engine.cache.kv} {self.engine.batcher.why}"
        return f"fp_{hashlib.blake2b(said.encode('utf-8', 'replace'), digest_size=5).hexdigest()}"

    @property
    def stands(self) -> str:
        """How the server stands now; an engine whose thread has ended is one that failed."""
        if self.standing == READY and not self.engine._thread.is_alive():
            return "The engine has ended; start the server again."
        return self.standing

    def check(self) -> None:
        """Raises Refusal, 503, where no request can be taken."""
        if (stands := self.stands) != READY:
            raise not_ready(_SAID.get(stands, stands))

    def ended(self, answer) -> None:
        """Count how quick an `Answer` was."""
        self.whole.add(answer.seconds)
        if answer.first_seconds is not None:
            self.first.add(answer.first_seconds)
            if len(answer.tokens) > 1:
                self.each.add((answer.seconds - answer.first_seconds) / (len(answer.tokens) - 1))

    def text(self) -> str:
        """Everything that was counted, for Prometheus."""
        lines = [metrics.family("llmlab_requests_total", "counter", "Requests that ended, by how.", self.outcomes.samples()),
                 metrics.one("llmlab_answers", "gauge", "Answers being made or waiting.", self.gate.answers),
                 metrics.family("llmlab_first_token_seconds", "histogram", "From the question to the first token.",
                                self.first.samples()),
                 metrics.family("llmlab_token_seconds", "histogram", "For each token after the first, the mean of an answer.",
                                self.each.samples()),
                 metrics.family("llmlab_answer_seconds", "histogram", "From the question to the end.", self.whole.samples())]
        if self.engine is not None:
            lines += self._of_engine()
        return "".join(lines)

    def _of_engine(self) -> list[str]:
        engine, usage, counters = self.engine, self.engine.usage(), self.engine.counters
        last = engine.history[-1] if engine.history and not engine.idle() else None
        running, waiting = (last.running, last.waiting) if last else (0, 0)
        states = [("", {"state": name}, getattr(usage, name)) for name in ("used", "cached", "free")]
        return [metrics.one("llmlab_running", "gauge", "Answers being made.", running),
                metrics.one("llmlab_waiting", "gauge", "Answers that wait.", waiting),
                metrics.family("llmlab_blocks", "gauge", "Blocks of the KV cache.", states),
                metrics.one("llmlab_cache_bytes", "gauge", "Bytes of the KV cache.", engine.cache.bytes),
                *(metrics.one(f"llmlab_{name}_total", "counter", says, getattr(counters, field))
                  for name, field, says in _COUNTERS)]


_COUNTERS = (("tokens_read", "read", "Prompt tokens read, those read again after a preemption among them."),
             ("tokens_made", "made", "New tokens."),
             ("tokens_reused", "reused", "Prompt tokens that were in the cache already."),
             ("steps", "steps", "Steps of the engine."), ("rows", "rows", "Tokens that went through the model."),
             ("preemptions", "preemptions", "Answers that gave their blocks away and were read anew."),
             ("step_seconds", "seconds", "Seconds of all steps."), ("computing_seconds", "computing", "Seconds of the model."))
