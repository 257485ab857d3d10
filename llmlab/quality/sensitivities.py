"""What each tensor's type costs in quality: predicted by a pass back through the model, measured by changing one at a time."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log, nan
from pathlib import Path

import numpy as np
import torch

from ..catalog import Table
from ..errors import BadFile, LabError
from ..formats import FORMATS, dequantize
from ..gguf.words import show_path
from ..memory import GGUF_ALIGNMENT
from ..runtime.model import PackedModel
from ..units import align
from . import passes
from .corpus import Tokens, as_tokens, tokens_of
from .fisher import Fisher, fisher_of
from .one_changed import Runs
from .remembered import Remembered, identity, write_whole
from .swapping import Matrix, blocks_in, check_types, matrices, packed_in

CONTEXT, CHUNKS = 256, 2
FORMAT = "llmlab-sensitivity-1"


@dataclass(frozen=True)
class Cost:
    """One tensor in one type, everything else as it was. `bytes` exact, padded as in a file. `error`: root mean square of the
    rounding over that of the weights, exact. `predicted`: mean KL divergence in nats a token, modelled (see fisher.py; None for
    stacks of experts). `measured`: the same by running the model; None where that was not asked for."""

    tensor: str
    type: str
    bytes: int
    error: float
    predicted: float | None
    measured: float | None = None


@dataclass(frozen=True, repr=False)
class Sensitivity:
    """The costs of a model's tensors, on `tokens` scored positions of a text; `model` its file, `elements` and `stored` (type
    and bytes) of each matrix as it was loaded."""

    model: str
    context: int
    chunks: int
    tokens: int
    costs: tuple[Cost, ...]
    elements: dict[str, int]
    stored: dict[str, tuple[str, int]]

    def cost(self, tensor: str, type: str) -> float | None:
        """The best that is known of it, nats a token: as measured; else as predicted, corrected by what measuring found of the
        tensor in the type nearest in error; else as predicted. None where there is neither."""
        own = [one for one in self.costs if one.tensor == tensor]
        one = next((one for one in own if one.type == type), None)
        if one is None:
            raise LabError(f"{tensor} in {type} was not looked at; there are "
                           f"{', '.join(one.type for one in own) or 'no types of that tensor'}")
        if one.measured is not None:
            return max(one.measured, 0.0)
        known = [other for other in own if other.measured is not None and other.error > 0]
        if not known:
            return one.predicted
        near = min(known, key=lambda other: abs(log(other.error / max(one.error, 1e-12))))
        expected = one.predicted / near.predicted if one.predicted is not None and near.predicted else None
        return max(near.measured, 0.0) * (expected if expected is not None else (one.error / near.error) ** 2)

    def bytes(self, types: Mapping[str, str]) -> int:
        """What these tensors take in a mix ({tensor: type}, `llmlab.mix`'s answer among them), padded as in a file: exact.
        Those that it does not name stay as they are stored."""
        return sum(align(FORMATS[types[name]].bytes(count), GGUF_ALIGNMENT) if name in types else self.stored[name][1]
                   for name, count in self.elements.items())

    def predicted(self, types: Mapping[str, str]) -> float:
        """The sum of the costs of a mix, nats a token: modelled. Raises LabError for a type that was not looked at."""
        return sum(self.cost(name, types[name]) or 0.0 for name in self.elements
                   if name in types and types[name] != self.stored[name][0])

    def correlation(self) -> float:
        """Of the ranks of predicted and measured costs where there are both (Spearman's), -1 to 1; nan below three."""
        both = [(one.predicted, one.measured) for one in self.costs if None not in (one.measured, one.predicted)]
        if len(both) < 3:
            return nan
        ranks = [np.argsort(np.argsort(column)) for column in zip(*both, strict=True)]
        return float(np.corrcoef(*ranks)[0, 1])

    def table(self, type: str | None = None) -> Table:
        """A row a tensor and type (or of one type), the dearest first: nats a token, also for each MiB that the type saves."""
        rows = []
        for one in self.costs:
            cost, saved = self.cost(one.tensor, one.type), self.stored[one.tensor][1] - one.bytes
            if type in (None, one.type):
                each = cost / saved * 2**20 if cost is not None and saved > 0 else None
                rows.append((-(cost or 0.0), {
                    "tensor": one.tensor, "type": one.type, "bytes": one.bytes, "error": one.error, "predicted": one.predicted,
                    "measured": one.measured, "per MiB saved": each}))
        nats = "{:.3g}".format
        return Table([row for _, row in sorted(rows, key=lambda pair: pair[0])],
                     {"bytes": "{:,}".format, "error": "{:.2%}".format, "predicted": nats, "measured": nats,
                      "per MiB saved": nats})

    def __repr__(self) -> str:
        measured = sum(one.measured is not None for one in self.costs)
        told = f", rank correlation of predicted and measured {self.correlation():.2f}" if measured > 2 else ""
        return (f"{self.model}: {len(self.elements)} matrices, {len(self.costs)} tensors and types, {measured} of them "
                f"measured over {self.tokens} tokens{told}")

    def save(self, path: str | os.PathLike) -> None:
        """As JSON, whole or not at all."""
        write_whole(Path(path), json.dumps({"format": FORMAT} | asdict(self)) + "\n")


def read_sensitivity(path: str | os.PathLike) -> Sensitivity:
    """What `save` wrote. Raises BadFile."""
    try:
        told = json.loads(Path(path).read_text())
        if told.pop("format") != FORMAT:
            raise ValueError("of another kind")
        told["costs"] = tuple(Cost(**one) for one in told["costs"])
        told["stored"] = {name: (type, size) for name, (type, size) in told["stored"].items()}
        return Sensitivity(**told)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFile(f"{show_path(str(path))} holds no sensitivities ({str(error)[:100]}); Sensitivity.save writes such a "
                      "file") from None


def sensitivity(model: PackedModel, tokens: Tokens | Sequence[int] | None, types: Iterable[str], *, tokenizer=None,
                measure: bool | str | Iterable[str] = False, tensors: Iterable[str] | None = None,
                importance: Mapping | None = None, effort: str = "normal", context: int = CONTEXT, chunks: int = CHUNKS,
                cache: str | os.PathLike | None = None, progress: bool = True,
                stopped: Callable[[], bool] = lambda: False) -> Sensitivity:
    """What it costs to have each matrix of a model in each of `types`, all others as they are.

    `model`: what `llmlab.load` made of a GGUF, best in float32 and of F16, BF16 or F32, because what is quantized are the
    weights as it holds them. `tokens`: `quality.tokens_of(tokenizer, text)`; None takes the text llmlab ships, with
    `tokenizer`. The first `chunks` of `context` tokens are read, their second halves scored. Every type is predicted; `measure`
    names those that are run as well (True: all; one, such as "Q4_0", corrects what is predicted of the others). Types whose
    blocks do not divide a tensor's rows are passed over there. `tensors`: these only. `importance` and `effort` go to the
    quantizer. `cache`: a JSON file of what was found before, with the same model, text and settings; it grows as it goes.

    A measured cost takes one run from the tensor's block on, what lies before it is kept. Of SmolLM2 (135 M weights, 211
    matrices) eleven types were predicted in 106 s and one measured in 1000 s, on one core of a busy machine. Raises LabError:
    no matrix fits, text too short, types nobody writes.
    """
    from tqdm.auto import tqdm

    types = list(dict.fromkeys(types))
    check_types(types)
    run = set(types) if measure is True else {measure} if isinstance(measure, str) else set(measure or ())
    if extra := run - set(types):
        raise LabError(f"measure names {sorted(extra)[0]!r:.40}, which is not among types: {', '.join(types)}")
    tokens = tokens_of(tokenizer) if tokens is None else as_tokens(tokens)
    count = tokens.count(context, chunks)
    found = matrices(model)
    wanted = _wanted(found, tensors)
    read = [tokens.chunk(index, context) for index in range(count)]
    work = [(matrix, type) for matrix in wanted for type in types if matrix.fits(type)]
    if not work:
        raise LabError(f"no matrix has rows that divide into blocks of {', '.join(types) or 'no type'}; give types of smaller "
                       "blocks, as Q4_0")
    store = Remembered(cache, identity(FORMAT, found, read, importance, effort))
    costs, second = [], None
    with passes.evaluated(model), tqdm(total=len(work), desc="sensitivity", unit="tensor", disable=not progress) as bar:
        runs = Runs(model, read)
        try:
            for matrix, type in work:
                if stopped():
                    break
                known = store.get(matrix.name, type)
                if known is None or (known["measured"] is None and type in run):
                    if second is None:
                        with torch.inference_mode(False):
                            second = fisher_of(model, read, found)
                    known = asdict(_one(matrix, type, second, runs if type in run else None, importance, effort))
                    store.put(known)
                costs.append(Cost(**known))
                bar.update()
        finally:        # an interruption loses nothing
            store.write()
    return Sensitivity(passes.name_of(model), context, count, count * (context - 1 - context // 2), tuple(costs),
                       {matrix.name: matrix.elements for matrix in wanted},
                       {matrix.name: (matrix.packed.format, _padded(matrix, matrix.packed.format)) for matrix in wanted})


def _wanted(found: Mapping[str, Matrix], tensors: Iterable[str] | None) -> list[Matrix]:
    if tensors is None:
        return list(found.values())
    asked = list(tensors)
    if missing := [name for name in asked if name not in found]:
        raise LabError(f"{str(missing[0])[:80]!r} is no matrix of this model; there are {', '.join(list(found)[:4])}, ...")
    return [found[name] for name in asked]


def _padded(matrix: Matrix, type: str) -> int:
    return align(matrix.bytes(type), GGUF_ALIGNMENT)


def _one(matrix: Matrix, type: str, second: Fisher, runs: Runs | None, importance: Mapping | None, effort: str) -> Cost:
    blocks = blocks_in(matrix, type, importance, effort)
    error = squares = 0.0
    predicted = None
    for expert, kernel in enumerate(matrix.packed.kernels):
        original = kernel.dense(torch.float32)
        off = dequantize(blocks if matrix.packed.experts is None else blocks[expert], type).sub_(original)
        error += float(off.square().sum(dtype=torch.float64))
        squares += float(original.square().sum(dtype=torch.float64))
        predicted = second.cost(matrix.name, off) if matrix.packed.experts is None else None
    measured = runs.kld(matrix, packed_in(matrix, type, blocks, "reference")) if runs else None
    return Cost(matrix.name, type, _padded(matrix, type), (error / squares) ** 0.5 if squares else 0.0, predicted, measured)
