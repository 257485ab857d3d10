"""What "fast" makes of a format on a device, and whether there is room for it."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..formats import FORMATS
from ..formats.plain import STORED
from ..hardware import ram_available
from ..units import format_bytes
from . import codes, int4, nibbles, numbers, tinygemm
from .compact import Compact
from .unpacking import Levels, levels

SHARE = 0.5     # of what is free: the rest is for the cache, the file's pages and everything else
CARD_SHARE = 0.8    # of what is free on a card: the blocks stay behind then, where they are


class Recipe(NamedTuple):
    """A kernel for one format: what makes it, the bits a weight it holds besides the blocks, and why."""

    kind: str       # "int4" | "tinygemm" | "codes" | "numbers" | "compact"
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
    if device.type == "cuda" and format not in STORED and dtype in (torch.bfloat16, torch.float16):
        return _on_a_card(format, known, dtype, device)
    if known is None:
        held = "numbers already" if format in STORED else "codes that are no integers"
        return Recipe("compact", 0.0, f"{format} holds {held}: GGUF bytes, a chunk of rows at a time")
    count = nibbles.passes(known)
    most = int4.tokens(dtype, count) if count and device.type == "cpu" else 0
    if most:
        kind = str(dtype).removeprefix("torch.")
        return Recipe("int4", nibbles.bits(known, dtype),
                      f"torch's 4-bit matmul in {kind}, {_times(count)}, scales of {known.group} weights rounded to {kind}, "
                      f"quicker here up to {most} tokens; GGUF bytes beyond")
    return _as_codes(known)


def _on_a_card(format: str, known: Levels | None, dtype: torch.dtype, device: torch.device) -> Recipe:
    """For half precision on a card: tensor cores fed with nibbles, numbers, or codes, whichever is measured to be quicker."""
    count, unfit = nibbles.passes(known), tinygemm.why_not(dtype, device)
    most = tinygemm.tokens(device, count) if count and not unfit else 0
    if most:
        return Recipe("tinygemm", nibbles.bits(known, dtype),
                      f"torch's 4-bit matmul for cards, {_times(count)}, scales of {known.group} weights rounded to bfloat16, "
                      f"quicker here up to {most} tokens; unpacked to numbers beyond")
    if known is not None and codes.beat_numbers(device, dtype):
        return _as_codes(known)
    why = "its codes are no integers" if known is None else (
        f"its groups of {known.group} fit no nibbles" if not count else unfit or "nibbles were slower here")
    kind = str(dtype).removeprefix("torch.")
    return Recipe("numbers", 8.0 * dtype.itemsize, f"{format} unpacked once to numbers in {kind}: {why}")


def _as_codes(known: Levels) -> Recipe:
    return Recipe("codes", codes.bits(known), f"a byte a weight and float32 scales for every {known.group}")


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def kernel(recipe: Recipe, blocks: torch.Tensor, format: str, cols: int, dtype: torch.dtype) -> Compact:
    """Makes it."""
    if recipe.kind == "int4":
        return int4.Int4(blocks, format, cols, dtype)
    if recipe.kind == "tinygemm":
        return tinygemm.TinyGemm(blocks, format, cols)
    if recipe.kind == "numbers":
        return numbers.Numbers(blocks, format, cols, dtype)
    return codes.Codes(blocks, format, cols) if recipe.kind == "codes" else Compact(blocks, format, cols)


def choose(tensors: Iterable[tuple[str, int]], dtype: torch.dtype = torch.float32,
           device: torch.device | str = "cpu") -> Choice:
    """Whether matrices given as (format, number of weights) are better packed "fast" or "compact", all of them together.

    "fast" where what it holds besides the packed bytes takes at most half of the memory that is free now; of a card's, where
    it takes their place, four fifths.
    """
    device, need = torch.device(device), 0.0
    for format, count in tensors:
        if format in FORMATS:       # pack names the tensor whose format is unknown
            need += recipe(format, dtype, device).bits * count / 8
    if not need:
        return Choice("compact", 0, "nothing here gets quicker by more memory")
    free, share = free_memory(device), CARD_SHARE if device.type == "cuda" else SHARE
    says = f"{format_bytes(need)} more where {format_bytes(free)} are free"
    if need <= share * free:
        return Choice("fast", int(need), f"{says}: room for speed")
    return Choice("compact", 0, f"fast would take {says}: more than {'half' if share == SHARE else 'four fifths'}")


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken now on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return ram_available()
