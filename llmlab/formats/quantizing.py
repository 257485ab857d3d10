"""Numbers -> blocks: checked, cut into chunks of rows, each given to the type's encoder, by as many threads as torch has."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import LabError, UnknownName
from . import dequantizing
from .registry import FORMATS, Format

if TYPE_CHECKING:
    import numpy
    import torch

CHUNK = 1 << 19     # weights a thread gets at a time: enough that calls cost little; searches take fewer of them at a time


def quantize(weights: torch.Tensor | numpy.ndarray, type: str, importance: torch.Tensor | numpy.ndarray | None = None,
             effort: str = "normal", progress: Callable[[int, int], None] | None = None) -> torch.Tensor:
    """The blocks that stand for `weights`: [..., cols] of any float dtype, a tensor or an array -> uint8 [..., row_bytes].

    `importance`, [cols] or None, is how much each column matters (an importance matrix's row: mean squared inputs); it is
    used as llama.cpp uses it. `effort="normal"` chooses scales as llama.cpp does, `"high"` searches longer for blocks of the
    same format with a smaller error. `progress(rows done, rows)` is called as chunks are finished. Memory beside the result is
    bounded, whatever the tensor. The work is the processor's, also for weights on another device; the result goes back there.

    Raises UnknownName for a type that is not known, and LabError for one that nobody writes, rows that do not divide into
    blocks, weights or importances that are not finite (with their row), importances of another length or below zero, and
    weights too large for the type's float16 scales (llama.cpp writes infinite ones).
    """
    import torch

    from .encoders import EFFORTS
    from .encoders.searching import TooLarge
    known, encoder = _encoder(type)
    if effort not in EFFORTS:
        raise LabError(f"effort is {effort!r:.40}; there are {' and '.join(map(repr, EFFORTS))}")
    rows = _as_rows(weights, known)
    matters = None if importance is None else _as_importance(importance, rows.shape[1], known)
    width = known.bytes(rows.shape[1])
    out = dequantizing._empty((len(rows), width), torch.uint8, torch.device("cpu"))
    step = max(1, CHUNK // max(rows.shape[1], 1))
    inference = torch.is_inference_mode_enabled()       # a thread has its own, and must write what was made in this one's

    def work(start: int) -> int:
        with torch.inference_mode(inference), torch.no_grad():
            chunk = _numbers(rows[start:start + step], start, known)
            try:
                out[start:start + step] = encoder(chunk, matters, effort)
            except TooLarge as error:
                raise LabError(_too_large(chunk, start, known, str(error))) from None
        return len(chunk)

    dequantizing._roomy()
    starts, threads = range(0, len(rows), step) if width else (), torch.get_num_threads()
    several = min(threads, len(starts)) > 1
    done = 0
    for count in dequantizing._pool(threads).map(work, starts) if several else map(work, starts):
        done += count
        if progress:
            progress(done, len(rows))
    return out.view(*weights.shape[:-1], width).to(rows.device)


def _encoder(type: str):
    from .encoders import ENCODERS
    known = FORMATS.get(type) if isinstance(type, str) else None
    if known is None:
        raise UnknownName(f"{str(type)[:60]!r} is no block format; there are {', '.join(ENCODERS)}")
    if known.name not in ENCODERS:
        raise LabError(f"{known.name} cannot be written: nobody made an encoder for it; there are {', '.join(ENCODERS)}")
    return known, ENCODERS[known.name]


def _as_rows(weights: torch.Tensor | numpy.ndarray, known: Format) -> torch.Tensor:
    """[..., cols] as a tensor [rows, cols] of its own dtype; neither copied (where strides allow) nor written."""
    import numpy
    import torch
    if isinstance(weights, numpy.ndarray) and weights.dtype.kind == "f":
        try:
            weights = torch.from_numpy(weights if weights.flags.writeable else numpy.asarray(dequantizing._Writable(weights)))
        except (TypeError, ValueError):     # turned round, of another byte order, or wider than torch has
            weights = torch.from_numpy(weights.astype(numpy.float32))
    if not isinstance(weights, torch.Tensor) or not weights.is_floating_point():
        said = getattr(weights, "dtype", weights.__class__.__name__)
        raise LabError(f"{known.name}: weights are {said}; a tensor of floating point numbers is needed")
    if weights.ndim == 0 or weights.shape[-1] % known.block:
        width = weights.shape[-1] if weights.ndim else 0
        raise LabError(f"{known.name}: rows of {width} weights do not divide into blocks of {known.block}; "
                       "store this tensor in a type with smaller blocks, as F16")
    return weights.detach().reshape(weights.shape[:-1].numel(), weights.shape[-1])


def _as_importance(importance: torch.Tensor | numpy.ndarray, cols: int, known: Format) -> torch.Tensor:
    import torch
    try:
        found = torch.as_tensor(importance).detach().to("cpu", torch.float32).contiguous()
    except (TypeError, ValueError, RuntimeError):
        raise LabError(f"{known.name}: importance is {importance.__class__.__name__}; {cols} numbers are needed") from None
    if found.shape != (cols,):
        raise LabError(f"{known.name}: importance is {list(found.shape)} for rows of {cols} weights; one number a column is "
                       "needed. Is it another model's?")
    if not (found.isfinite() & (found >= 0)).all():
        at = int((~(found.isfinite() & (found >= 0))).nonzero()[0])
        raise LabError(f"{known.name}: importance {at} is {float(found[at])}; finite numbers from zero on are needed")
    return found


def _numbers(chunk: torch.Tensor, start: int, known: Format) -> torch.Tensor:
    """The chunk as float32, contiguous; where it is that already the caller's own memory, so encoders write elsewhere.

    Raises LabError where a number is none.
    """
    import torch
    numbers = chunk.to("cpu", torch.float32).contiguous()
    if not numbers.sum().isfinite() and not numbers.isfinite().all():      # the sum first: one pass, and it finds all
        row, column = map(int, (~numbers.isfinite()).nonzero()[0])
        raise LabError(f"{known.name}: weight {column} of row {start + row} is {float(chunk[row, column])}, which no block can "
                       "stand for; is the file damaged, or was the model trained to nothing?")
    return numbers


def _too_large(chunk: torch.Tensor, start: int, known: Format, why: str) -> str:
    row, column = divmod(int(chunk.abs().argmax()), chunk.shape[1])
    return (f"{known.name}: weight {column} of row {start + row} is {float(chunk[row, column]):.6g}; {why}. "
            "Store this tensor as BF16 or F32")
