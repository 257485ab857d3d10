"""One chunk through one model: its logits at the scored positions, a few rows at a time, in bounded memory."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from ..errors import LabError
from .corpus import scored

LOGITS = 2**26  # numbers a model is asked for at once (256 MiB of float32): a longer chunk is read in pieces, through its cache
WORKING = 2**19  # numbers worked on at once (4 MiB of float64)


class Held:
    """Memory for `rows_at_once` rows of float64 that are written over again and again: allocators do not give back blocks
    of this size reliably, and a run makes tens of thousands of them."""

    def __init__(self):
        self._kept = torch.empty(0, 0)

    def __call__(self, count: int, vocabulary: int, device: torch.device) -> torch.Tensor:
        """[count, vocabulary], holding anything; valid until the next call."""
        if self._kept.shape[-1] != vocabulary or self._kept.device != device:
            self._kept = torch.empty(rows_at_once(vocabulary), vocabulary, dtype=torch.float64, device=device)
        return self._kept[:count]


def rows_at_once(vocabulary: int) -> int:
    """How many positions are worked on at once; the same for two models, so that their rows meet."""
    return max(1, WORKING // vocabulary)


def logits(model: Callable, ids: np.ndarray, where: str, held: Held) -> Iterator[torch.Tensor]:
    """The model's logits at the scored positions of a chunk, in order, as pieces float64 [rows, vocabulary] that lie in `held`.

    `ids` is int64 [context]; `where` names the chunk in errors. Raises LabError on logits of another shape and on NaN.
    """
    if not callable(model):
        raise LabError(f"{model!r:.60} is no model; give what llmlab.load returned first, or another callable that has logits")
    within(ids, _vocabulary(model) or ids.max() + 1)
    for piece in _pieces(model, torch.from_numpy(ids)[None].to(getattr(model, "device", "cpu")), scored(len(ids))):
        if piece.device.type == "mps":
            piece = piece.cpu()  # has no float64
        step = rows_at_once(piece.shape[-1])
        for start in range(0, len(piece), step):
            rows = piece[start:start + step]
            part = held(*rows.shape, rows.device).copy_(rows)
            if not part.amax(dim=-1).isfinite().all():
                raise LabError(f"{where}: the model's logits are not numbers (NaN or infinite): its weights are damaged, or "
                               "too large for its dtype")
            yield part
        del piece, rows  # before the next one is made


def log_probabilities(rows: torch.Tensor, spare: Held) -> torch.Tensor:
    """log softmax of float64 [rows, vocabulary], in place; `spare` is written to."""
    rows -= rows.amax(dim=-1, keepdim=True)
    rows -= torch.exp(rows, out=spare(*rows.shape, rows.device)).sum(dim=-1, keepdim=True).log()
    return rows


@contextmanager
def evaluated(*models):
    """Dropout off and no gradients while it lasts; afterwards each model is as it was."""
    training = [model for model in models if getattr(model, "training", False)]
    for model in training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for model in training:
            model.train()


def within(ids: np.ndarray, vocabulary: int) -> None:
    """Raises LabError if an id is not in the vocabulary."""
    if ids.min() < 0 or ids.max() >= vocabulary:
        wrong = ids[(ids < 0) | (ids >= vocabulary)][0]
        raise LabError(f"the text has token {wrong}, and the model's vocabulary {vocabulary} tokens: use the tokenizer that "
                       "belongs to the model")


def name_of(model) -> str:
    """What to call a model: its file, its hub name, else its own or its class's."""
    loaded = getattr(model, "llmlab", None)
    named = getattr(loaded, "path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return (str(named).replace("\\", "/").rstrip("/").rpartition("/")[2] if named
            else getattr(model, "__name__", type(model).__name__))


def _pieces(model, ids: torch.Tensor, rows: slice) -> Iterator[torch.Tensor]:
    known = inspect.signature(getattr(model, "forward", model)).parameters
    vocabulary = _vocabulary(model) or 1
    if {"past_key_values", "use_cache", "logits_to_keep"} <= set(known) and (rows.stop - rows.start) * vocabulary > LOGITS:
        step = rows_at_once(vocabulary) * max(1, LOGITS // (rows_at_once(vocabulary) * vocabulary))
        cache = model(ids[:, :rows.start], use_cache=True, logits_to_keep=1).past_key_values
        for start in range(rows.start, rows.stop, step):
            part = ids[:, start:min(start + step, rows.stop)]
            out = model(part, past_key_values=cache, use_cache=True)
            cache, found = out.past_key_values, [_checked(out, part.shape[1])]
            del out
            yield found.pop()  # nothing here holds it while the next one is made
        return
    asked = {"use_cache": False} if "use_cache" in known else {}
    if "logits_to_keep" in known:  # the first half's are never looked at
        kept = ids.shape[1] - rows.start
        yield _checked(model(ids, logits_to_keep=kept, **asked), kept)[:-1]
    else:
        yield _checked(model(ids, **asked), ids.shape[1])[rows]


def _vocabulary(model) -> int | None:
    """As the model's config says it; None where it has none."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "vocab_size", None)


def _checked(out, positions: int) -> torch.Tensor:
    """The answer's logits as [positions, vocabulary]."""
    found = getattr(out, "logits", out)
    if not isinstance(found, torch.Tensor) or tuple(found.shape[:-1]) not in ((1, positions), (positions,)):
        what = f"{type(found).__name__} {list(getattr(found, 'shape', ()))}".removesuffix(" []")
        raise LabError(f"the model returned {what}, not .logits [1, {positions}, vocabulary] for these {positions} positions")
    return found.reshape(positions, -1)
