"""The process of one that takes part: reads a command a line from stdin, does it, answers with a line of JSON.

`python -m llmlab.benching.child MODULE`. A command says what to time; the clock is read here, beside the work.
"""

import json
import sys
import time
from importlib import import_module
from itertools import pairwise

from ..errors import LabError
from ..probes import peak_resident, reset_peak, resident
from .children import MARK

CHUNK = 512              # tokens that a long prompt is read at once: llama.cpp's ubatch


class Commands:
    """What a child can be asked. An engine is what `open(job)` of its module gives: `read(tokens)` reads them after what was
    read and answers with the likeliest next token, `scores(tokens)` gives the logits after each of them, float32 [tokens,
    vocabulary], `forget()` empties its memory, `room(tokens)` makes place for so many; `about` says what it is."""

    def __init__(self, module: str):
        self._module, self.engine, self._base = module, None, 0

    def open(self, job: dict) -> dict:
        """Load, after something small was run that loads what code is loaded late, so that its bytes are not the model's.
        Seconds: of the imports, of loading, and since the process was asked for (but for the something small)."""
        start = time.perf_counter()
        module = import_module(f"{__package__}.{self._module}")
        module.prepare(job)
        imported = time.perf_counter()
        module.warm(job)
        reset_peak()
        self._base, begin = resident(), time.perf_counter()
        self.engine = module.open(job)
        loaded = time.perf_counter()
        since = time.time() - job["born"] - (begin - imported)
        return {"import_s": imported - start, "load_s": loaded - begin, "since_s": since, "about": self.engine.about}

    def read(self, tokens: list[int]) -> dict:
        """One prompt into an empty memory: seconds until its next token is known."""
        self.engine.forget()
        start = time.perf_counter()
        self.engine.read(tokens)
        return {"seconds": time.perf_counter() - start}

    def write(self, tokens: list[int], after: list[int] | None) -> dict:
        """Tokens one at a time, after a few others in an empty memory (`after` None: after whatever was read)."""
        if after is not None:
            self.engine.forget()
            self.engine.read(after)
        times = [time.perf_counter()]
        for token in tokens:
            self.engine.read([token])
            times.append(time.perf_counter())
        return {"seconds": times[-1] - times[0], "each": [after - before for before, after in pairwise(times)]}

    def fill(self, tokens: list[int], room: int) -> dict:
        """A long prompt into an empty memory that has room for more."""
        self.engine.room(room)
        start = time.perf_counter()
        for at in range(0, len(tokens), CHUNK):
            self.engine.read(tokens[at:at + CHUNK])
        return {"seconds": time.perf_counter() - start}

    def deepen(self, tokens: list[int], depth: int) -> dict:
        """Memory as after `depth` tokens, with little reading: `tokens` are read and the engine then lays down the like of
        them; seconds are of that alone."""
        self.engine.forget()
        self.engine.read(tokens)
        start = time.perf_counter()
        self.engine.deepen(depth)
        return {"seconds": time.perf_counter() - start}

    def memory(self) -> dict:
        """Bytes by which this process grew since it had imported everything: now, and at the most."""
        return {"resident": max(0, resident() - self._base), "peak": max(0, (peak_resident() or self._base) - self._base)}

    def text(self, count: int) -> dict:
        """The first tokens of the text llmlab ships; None where the model's file has no vocabulary."""
        return {"tokens": self.engine.text(count)}

    def keep(self, tokens: list[int], path: str) -> dict:
        """Write the logits after each token to a file, for `compare`."""
        import numpy as np
        self.engine.forget()
        np.save(path, self.engine.scores(tokens))
        return {}

    def compare(self, tokens: list[int], steps: int, path: str) -> dict:
        """KL divergence (nats a token, mean) of this engine from logits that were kept: of tokens read together, and of the
        last `steps`, read one at a time after them; and the share of tokens whose likeliest next one is the same."""
        import numpy as np
        reference = np.load(path, mmap_mode="r")
        self.engine.forget()
        cut = len(tokens) - steps
        together = self.engine.scores(tokens[:cut])
        singly = np.concatenate([self.engine.scores([token]) for token in tokens[cut:]]) if steps else together[:0]
        many, same = divergence(reference[:cut], together)
        few, also = divergence(reference[cut:], singly)
        return {"kld_prefill": float(many.mean()), "kld_decode": float(few.mean()) if steps else None,
                "top1": float((same.sum() + also.sum()) / len(tokens))}

    def bandwidth(self) -> dict:
        return {"rate": self.engine.rate()}


def divergence(reference, logits):
    """Kullback-Leibler divergence in nats of each row of logits from the reference's, and whether both like the same token
    best: float64 [rows], bool [rows]. In float64. Raises LabError where the vocabularies differ."""
    import numpy as np

    def log_softmax(rows):
        rows = np.asarray(rows, np.float64)
        rows = rows - rows.max(-1, keepdims=True)
        return rows - np.log(np.exp(rows).sum(-1, keepdims=True))

    if reference.shape != logits.shape:
        raise LabError(f"its logits are {list(logits.shape)} and the reference's {list(reference.shape)}")
    p, q = log_softmax(reference), log_softmax(logits)
    return (np.exp(p) * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)


def obey(commands) -> None:
    """Each line of standard input is an order, {"do": a method of `commands`, and what it takes}; what that returns, or raises,
    is a line of the answer."""
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(commands, order.pop("do"))(**order)
        except Exception as error:             # whatever an engine raises is a line for the parent
            answer = {"error": str(error) if isinstance(error, LabError) else
                      f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no reason given'}"}
        print("\n" + MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    obey(Commands(sys.argv[1]))
