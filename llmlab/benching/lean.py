"""llmlab's own: the lean decoder, compiled or not, and the transformers modules of `llmlab.load`. One protocol, a memory."""

import numpy as np

from ..errors import LabError
from . import dense


def prepare(job: dict) -> None:
    """Import what loading needs."""
    if job["way"] == "modules":
        from .. import loading  # noqa: F401
        from ..runtime import generating  # noqa: F401
        dense.prepare(job)
    else:
        from ..runtime import decoder  # noqa: F401
        dense.set_threads(job)


def warm(job: dict) -> None:
    if job["way"] == "modules":
        dense.warm(job)
    else:
        dense.warm_torch()


def open(job: dict):
    return _Modules(job) if job["way"] == "modules" else _Decoder(job)


class _Decoder:
    """`runtime.decoder.Decoder`."""

    def __init__(self, job: dict):
        from ..loading import DTYPES
        from ..runtime.decoder import Decoder
        wanted, made, dtype = job["way"] == "compiled", [], job["dtype"] and DTYPES[job["dtype"]]
        self._memory = memory = Decoder.open(job["path"], dtype=dtype, strategy=job["strategy"], compile=wanted,
                                             progress=made.append, kv=job.get("kv"))
        if wanted and not memory.compiled:     # what runs instead is a strategy of its own name
            raise LabError(memory.why.partition(";")[0])
        again = "; compiled just now, the next start takes it from the disk" if made else ""
        self.about = {"dtype": str(memory.dtype).removeprefix("torch."), "held": memory.resident_bytes,
                      "why": memory.why + again}

    def room(self, tokens: int) -> None:
        self._memory.forget()                  # it grows as it reads

    def forget(self) -> None:
        self._memory.forget()

    def deepen(self, tokens: int) -> None:
        """As if so many tokens had been read: keys and values of those that were, over and over."""
        import torch
        memory, read = self._memory, len(self._memory.tokens)
        memory.grow(tokens)
        for cache in memory.caches:
            if memory.kv:
                sides = [_numbers(pages, read) for pages in (cache.keys, cache.values)]
            for start in range(read, tokens, read):
                stop = min(start + read, tokens)
                if memory.kv:
                    cache.append(*(side[:, :, :stop - start] for side in sides), torch.arange(start, stop))
                else:
                    cache[:, :, start:stop] = cache[:, :, :stop - start]
        memory.tokens += [0] * (tokens - read)

    def read(self, tokens: list[int]) -> int:
        return int(self._memory.read(tokens).argmax())

    def scores(self, tokens: list[int]) -> np.ndarray:
        if len(tokens) == 1:                   # as it writes
            return self._memory.read(tokens)[None].numpy()
        return self._memory.logits(tokens).numpy()


def _numbers(pages, count: int):
    """The first `count` cells of a text, [1, kv_heads, count, head_dim]."""
    from ..kernels.pages import PAGE
    found = pages.numbers(0, -(-count // PAGE))
    return found.permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, :count]


class _Modules:
    """`llmlab.load` and `generating.Memory`."""

    def __init__(self, job: dict):
        from ..loading import load
        from ..runtime.generating import Memory
        model, self._tokenizer = load(job["path"], device="cpu", dtype=job["dtype"], strategy=job["strategy"])
        self._memory = Memory(model)
        loaded = model.llmlab
        self.about = {"dtype": loaded.dtype, "held": loaded.resident_bytes, "why": loaded.why}

    def text(self, count: int) -> list[int] | None:
        """The first tokens of the text llmlab ships; None without a vocabulary."""
        from ..quality import text, tokens_of
        return self._tokenizer and tokens_of(self._tokenizer, text()).ids[:count].tolist()

    def room(self, tokens: int) -> None:
        self._memory.forget()

    def forget(self) -> None:
        self._memory.forget()

    def read(self, tokens: list[int]) -> int:
        return int(self._memory.read(tokens).argmax())

    def scores(self, tokens: list[int]) -> np.ndarray:
        import torch
        if len(tokens) == 1:
            return self._memory.read(tokens)[None].numpy()
        if self._memory.tokens:
            raise LabError("logits of many tokens are asked of an empty memory")
        with torch.inference_mode():
            found = self._memory.model(input_ids=torch.tensor([tokens])).logits[0].float().numpy()
        self._memory.read(tokens)              # so that single ones can follow
        return found
