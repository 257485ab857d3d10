"""What "fast" makes of a format on a device, and whether there is room for it."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..formats import FORMATS
from ..formats.plain import STORED
from ..hardware import ram_available
from ..units import format_bytes
from . import codes, int4
from .compact import Compact
from .unpacking import levels

SHARE = 0.5     # of what is free: the rest is for the cache, the file's pages and everything else


class Recipe(NamedTuple):
    """A kernel for one format: what makes it, the bits a weight it holds besides the blocks, and why."""

    kind: str       # "int4" | "codes" | "compact"
    bits: float
    why: str


class Choice(NamedTuple):
    """A strategy, the bytes it holds besides the packed ones, and why."""

    strategy: str
    bytes: int
    why: str


def recipe(format: str, dtype: torch.dtype, device: torch.device) -> Recipe:
    """What makes this format quick here, for inputs of `dtype`."""
    known = levels(format)
    if known is None:
        held = "numbers already" if format in STORED else "codes that are no integers"
        return Recipe("compact", 0.0, f"{format} holds {held}: GGUF bytes, a chunk of rows at a time")
    count = int4.passes(known)
    most = int4.tokens(dtype, count) if count and device.type == "cpu" else 0
    if most:
        words = "once" if count == 1 else "twice" if count == 2 else f"{count} times"
        kind = str(dtype).removeprefix("torch.")
        return Recipe("int4", int4.bits(known, dtype),
                      f"torch's 4-bit matmul in {kind}, {words}, scales of {known.group} weights rounded to {kind}, quicker "
                      f"here up to {most} tokens; GGUF bytes beyond")
    return Recipe("codes", codes.bits(known), f"a byte a weight and float32 scales for every {known.group}")


def kernel(recipe: Recipe, blocks: torch.Tensor, format: str, cols: int, dtype: torch.dtype) -> Compact:
    """Makes it."""
    if recipe.kind == "int4":
        return int4.Int4(blocks, format, cols, dtype)
    return codes.Codes(blocks, format, cols) if recipe.kind == "codes" else Compact(blocks, format, cols)


def choose(tensors: Iterable[tuple[str, int]], dtype: torch.dtype = torch.float32,
           device: torch.device | str = "cpu") -> Choice:
    """Whether matrices given as (format, number of weights) are better packed "fast" or "compact", all of them together.

    "fast" where what it holds besides the packed bytes takes at most half of the memory that is free now.
    """
    device, need = torch.device(device), 0.0
    for format, count in tensors:
        if format in FORMATS:       # pack names the tensor whose format is unknown
            need += recipe(format, dtype, device).bits * count / 8
    if not need:
        return Choice("compact", 0, "nothing here gets quicker by more memory")
    free = free_memory(device)
    says = f"{format_bytes(need)} more where {format_bytes(free)} are free"
    if need <= SHARE * free:
        return Choice("fast", int(need), f"{says}: room for speed")
    return Choice("compact", 0, f"fast would take {says}: more than half")


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken now on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return ram_available()
