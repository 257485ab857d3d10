"""The short way from a file to its first token: the lean decoder and the file's own words, without transformers."""

import os
from collections.abc import Callable

from .errors import LabError
from .gguf import GGUFFile, read_gguf
from .gguf.words import show_path
from .stores import place_of


def decoder(path: str | os.PathLike | GGUFFile, device=None, dtype=None, strategy: str = "auto", context: int | None = None,
            compile: bool = False, progress: Callable[[str], None] | None = None, kv: str | tuple[str, str] | None = None,
            sinks: int = 0, recent: int = 0, rotate: bool = False, plan=None, budget=None, mode: str | None = None):
    """(decoder, words) of a GGUF on this computer: what `llmlab.load` gives, without transformers and in a part of its time.

    `path`: a .gguf (the first file of a sharded set), or the name of a model that `llmlab.local_models()` lists.
    `decoder.read(tokens)` gives the logits of the next token; `words(text)["input_ids"]` and `words.decode(tokens)` are text
    to tokens and back, `words` None where the file has no vocabulary. `runtime.generating.stream(decoder, words, text)` and
    `runtime.conversing.Conversation(decoder, words)` take them as they take a model and its tokenizer. `device`, `strategy`:
    as in `llmlab.load`. `dtype`: in which matrices are multiplied (None: in which that is quickest here). `context`: most
    tokens it may hold (None: as trained). `compile`: for this processor, once, or as without it where that cannot be, which
    `decoder.why` says; `progress` is told what is compiled. `kv`: the KV cache's type, "q8_0", or one for keys and one for
    values, ("q8_0", "q4_0"); None is plain numbers. With it the first `sinks` and the last `recent` tokens stay in float16,
    and `rotate` multiplies by a Hadamard matrix, so that no number stands out.

    A model that is larger than memory: `budget` ("300 MiB", bytes, or an `offload.budget.Budget` for device and RAM) is what
    may be held, cache and workspace among it; as many layers as it has room for stay, the others are brought for each pass.
    `plan`: what `llmlab.plan` gives, or an `offload.placement.Placement`: which layers those are; `context` and `kv` then are
    the plan's unless they are given, else a third of the budget's. Strategy is "compact"; with `compile` weights are laid out
    anew first, in a file in llmlab's cache. `mode` "fast" computes layers that lie in RAM there (None: the plan's, else
    "exact"): beside a card by the processor, and logits then deviate, as `decoder.deviation(tokens)` measures. The decoder has
    a `trace` and a `budget`, and `close()` ends it. Raises OverBudget, saying what the least is.

    Raises LabError, in one line, where the decoder does not know the architecture; `llmlab.load` may.
    """
    file = path if isinstance(path, GGUFFile) else gguf_of(path)
    if file is None:
        raise LabError(f"{show_path(str(path))} is a folder, and the lean decoder reads GGUF files; llmlab.load runs folders")
    if why := refusal(file):
        raise LabError(why)
    from .loading import _device, _dtype
    from .runtime.decoder import Decoder
    from .vocabulary import words_of

    asked, (device, _) = device, _device(device, file.tensor_bytes)
    words = words_of(file) if file.metadata.get("tokenizer.ggml.tokens") else None
    dtype = dtype and _dtype(dtype, device)[0]
    if plan is not None or budget is not None:
        from .offload.choosing import opened

        return opened(file, budget, plan, strategy, dtype, asked and device, context, compile, progress, kv, mode, sinks=sinks,
                      recent=recent, rotate=rotate), words
    if mode is not None:
        raise LabError(f"mode={str(mode)[:40]!r} is about layers that do not fit: give a budget or a plan with it")
    return Decoder.open(file, dtype, strategy, context, device, compile, progress, kv, sinks, recent, rotate), words


def gguf_of(path: str | os.PathLike) -> GGUFFile | None:
    """The file that is meant, its header read; None for a folder. Raises UnknownName for a name that is no model here, and
    BadFile for a file that is no GGUF or is damaged."""
    place = place_of(path)
    return None if place.is_dir() else read_gguf(place)


def refusal(file: GGUFFile) -> str:
    """Why the lean decoder cannot run a file; "" where it can."""
    from .runtime.families import family_of
    from .runtime.keys import Keys

    shown = show_path(file.paths[0])
    if file.is_projector:
        return f"{shown} is the projector of a model, not a model; give the model's own file"
    try:
        family_of(Keys(file.metadata, file.architecture, shown))
    except LabError as error:
        return str(error)
    return ""
