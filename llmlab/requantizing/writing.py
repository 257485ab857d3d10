"""The quantized file: each tensor read, encoded and written a piece of rows at a time, in the order of the plan."""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from ..errors import LabError
from ..formats import quantize
from ..formats.encoders import EFFORTS
from ..gguf import write_gguf
from ..gguf.words import show, show_path
from .matrices import Matrix, read_matrix
from .planning import Plan, Row, mix_named, plan_of
from .sources import NUMBERS, Source, open_source

PIECE = 1 << 24      # weights read and encoded at a time: 64 MiB of float32


def quantize_gguf(source: str | os.PathLike, target: str | os.PathLike, quant: str, importance=None, *,
                  types: Mapping[str, str] | None = None, allow_requantize: bool = False, effort: str = "normal",
                  progress: Callable[[float, str], object] | None = None) -> Plan:
    """Write a model as a GGUF in a quant (`"Q4_K_M"`), types, keys and order as llama-quantize has them.

    `source`: a GGUF (of a sharded set the first), or a folder with config.json, safetensors and tokenizer of the llama,
    mistral, mixtral, qwen2, qwen3 and gemma families, which is converted on the way. `importance`: what `llmlab.importance`
    returns, a file of it, or a mapping from tensor names to mean squared inputs [cols] ([experts, cols]).

    `types`: a mix of one's own, from patterns to types: `{"attn_v": "Q6_K", r"blk\\.(0|1)\\.ffn_down": "Q5_K"}`. A pattern is
    searched in a tensor's name; of several that are found the first counts, as with llama-quantize's --tensor-type; what none
    finds follows `quant`. `"keep"` is as in the source. So `{"": "Q4_K"}` is its --pure, `{"^output.weight": "keep"}` its
    --leave-output-tensor. Where rows do not divide into blocks its fallback is taken, and what it never quantizes (norms,
    routers) stays. `llmlab.requantizing.planned` says what would be written, with exact sizes.

    `effort`: "normal" searches as llama.cpp does, "high" longer for less error in the same formats. `progress(share, text)`
    is called as tensors are done. A piece of a tensor at a time is in memory. Tensors that are quantized already raise unless
    `allow_requantize`, but for Q8_0 that is to be smaller. Returns the plan that was carried out.

    Raises LabError, in one line that names tensor and file, for whatever cannot be done. The target gets its name only when
    it is complete: until then, and after an error, whatever was there before stays.
    """
    if effort not in EFFORTS:
        raise LabError(f"effort is {str(effort)[:40]!r}; give one of {', '.join(EFFORTS)}")
    mix = mix_named(quant)
    opened = open_source(source, mix)
    _check_target(target, opened)
    matrix = read_matrix(importance, opened)
    plan = plan_of(opened, mix, matrix, types)
    _check_allowed(plan, allow_requantize)
    told = _Told(plan, progress)
    write_gguf(target, plan.metadata, ((row.name, row.shape, row.type, partial(_tensor, opened, row, matrix, effort, told))
                                       for row in plan.rows), plan.alignment)
    return plan


def _check_target(target: str | os.PathLike, source: Source) -> None:
    try:
        same = any(os.path.exists(target) and os.path.samefile(target, path) for path in source.paths)
    except (TypeError, ValueError):
        raise LabError(f"{show(str(target))} is not a path; give the path of the file to write") from None
    if same:
        raise LabError(f"{show_path(os.fsdecode(target))} is what is to be quantized; give the target another name")


def _check_allowed(plan: Plan, allow_requantize: bool) -> None:
    if plan.unimportant:
        row = next(row for row in plan.rows if row.name == plan.unimportant[0])
        raise LabError(f"{plan.source}: {row.name} in {row.type} would be garbage without an importance matrix; make one with "
                       "llmlab.importance and give it, or choose a wider quant, such as IQ3_S or Q2_K")
    if plan.requantized and not allow_requantize:
        row = next(row for row in plan.rows if row.name == plan.requantized[0])
        raise LabError(f"{plan.source}: {row.name} is quantized to {row.stored} already, and making {row.type} of that adds "
                       "one error to another; give the original in F16 or BF16, or allow_requantize=True (--allow-requantize)")


class _Told:
    """Tells how far it is, by weights."""

    def __init__(self, plan: Plan, progress: Callable[[float, str], object] | None):
        self.progress, self.all, self.weights = progress, sum(row.elements for row in plan.rows), 0

    def __call__(self, row: Row, weights: int) -> None:
        self.weights += weights
        if self.progress is not None:
            change = row.type if row.type == row.stored else f"{row.stored} -> {row.type}"
            self.progress(self.weights / self.all, f"{row.name} {change}")


def _tensor(source: Source, row: Row, matrix: Matrix | None, effort: str, told: _Told) -> Iterator[Any]:
    """The bytes of one tensor of the target, in pieces."""
    if row.type == row.stored:
        _check_stored(source, row)
        yield from source.stored(row.name)
        told(row, row.elements)
    else:
        cols, rows = row.shape[0], row.shape[1] if len(row.shape) > 1 else 1
        important = matrix and matrix.values.get(row.name)
        step = max(1, PIECE // cols)
        for expert in range(row.elements // cols // rows):
            here = None if important is None else torch.from_numpy(important[expert])
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                numbers = source.numbers(row.name, expert * rows + start, expert * rows + stop)
                _check_finite(numbers, row.name, source.shown, expert * rows + start)
                yield _encoded(numbers, row, here, effort, source.shown).view(-1).numpy()
                told(row, numbers.numel())
    source.done(row.name)


def _encoded(numbers: torch.Tensor, row: Row, importance: torch.Tensor | None, effort: str, shown: str) -> torch.Tensor:
    """float32 [rows, cols] -> uint8 [rows, row_bytes]."""
    try:
        return quantize(numbers, row.type, importance, effort)
    except LabError as error:
        raise LabError(f"{shown}: tensor {row.name}: {error}") from None


def _check_stored(source: Source, row: Row) -> None:
    """Numbers that are copied are looked at too; blocks are as whoever made them made them."""
    if row.type not in NUMBERS:
        return
    cols, rows = row.shape[0], row.elements // row.shape[0]
    step = max(1, PIECE // cols)
    for start in range(0, rows, step):
        _check_finite(source.numbers(row.name, start, min(start + step, rows)), row.name, source.shown, start)


def _check_finite(numbers: torch.Tensor, name: str, shown: str, first: int) -> None:
    """Raises LabError for NaN and infinity. The sum tells of both in one pass; only where it is odd is each looked at."""
    if not numbers.sum().isfinite() and not (fine := numbers.isfinite()).all():
        at, column = (int(i) for i in (~fine).nonzero()[0])
        raise LabError(f"{shown}: tensor {name} has {numbers[at, column]} in row {first + at}, column {column}; the file is "
                       "damaged, or training went wrong: download or convert it again")
