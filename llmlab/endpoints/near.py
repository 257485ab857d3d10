"""A model in this process, asked as an Endpoint is: the same `chat`, without a server between."""

import math
import time
from collections.abc import Callable

from ..errors import LabError
from .replies import REFUSED, CallFailed, Chance, Reply

_MEMORY = "64 MiB"       # of the KV cache of a decoder that is given without an engine


class Near:
    """Over an engine. Raises LabError for what it cannot be asked."""

    def __init__(self, engine, name: str = ""):
        self.engine, self.model, self.here = engine, name, True

    def __repr__(self) -> str:
        return f"<a model in this process{f': {self.model}' if self.model else ''}>"

    def chat(self, messages, *, max_tokens: int = 256, temperature: float = 0.0, chances: int | None = None, n: int = 1,
             seed: int | None = None, stop=(), **more) -> Reply:
        """As Endpoint.chat. Raises CallFailed where there is no answer, LabError for a setting that is not among these."""
        from ..runtime.generating import prompt_tokens
        from ..runtime.sampling import Options

        if more:
            raise LabError(f"a model in this process takes no {sorted(more)[0]!r:.40}; serve it with llmlab.serve for that")
        began, words = time.monotonic(), self.engine.words
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        tokens = prompt_tokens(words, messages)
        options = Options(temperature=temperature, top_k=0, top_p=1.0, min_p=0.0, seed=seed, max_tokens=max_tokens, stop=stop)
        answers, wrong = [], ""
        try:
            answers = [job.result() for job in self.engine.submit_several(tokens, n, options, logprobs=chances)]
        except LabError as error:            # too long a question, or an engine that has ended
            wrong = str(error)
        if wrong:
            raise CallFailed(wrong, REFUSED)
        told = answers[0].logprobs
        return Reply(tuple(one.text for one in answers), len(tokens), sum(len(one.tokens) for one in answers), 0.0,
                     time.monotonic() - began, 0, 1, None if told is None else tuple(
                         Chance(one.logprob, tuple(chance for _, chance in one.top if chance > -math.inf)) for one in told),
                     answers[0].ended)


def near_of(local) -> tuple[object, Callable[[], None]]:
    """Who answers here, and what ends it where it was begun here: an Endpoint, a running Server, an Engine, `llmlab.decoder`'s
    (decoder, words), or the path of a GGUF. Raises LabError."""
    from ..runtime.decoder import Decoder
    from ..runtime.engine import Engine
    from .calling import Endpoint

    if isinstance(local, (Endpoint, Near)):
        return local, lambda: None
    if isinstance(getattr(local, "engine", local), Engine):
        return Near(getattr(local, "engine", local)), lambda: None
    if isinstance(local, str) or hasattr(local, "__fspath__"):
        from ..starting import decoder

        local = decoder(local)
    if isinstance(local, tuple) and len(local) == 2 and isinstance(local[0], Decoder):
        engine = Engine(*local, memory=_MEMORY)
        return Near(engine), engine.close
    raise LabError("local is nothing that answers; give an Endpoint, llmlab.serve(..., background=True), "
                   "llmlab.decoder(file), or a GGUF's path")
