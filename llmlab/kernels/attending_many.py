"""Attention of many queries on packed pages: some pages unpacked once for all of them, torch's flash attention over what they
stand for, and one piece's result joined to the others' by what its scores sum to.

For a prompt arithmetic is what takes time, and torch's own loop over blocks does it at nearly the rate of a matmul; a page is
unpacked once a prompt piece instead of once for every 256 rows. The workspace is bounded: some pages' numbers.
"""

import torch

from . import scratch
from .attending_once import LANES
from .pages import PAGE, Pages
from .raising import unpacked

ROOM = 1 << 19          # numbers of each side that are unpacked at once: 2 MiB, as one query's attention has it
TOKENS = 64             # queries that share a mask: those of a piece that some cells are hidden from
LEAST = 64              # rows (queries of all heads of a group) from which this is quicker than page by page
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def suits(q: torch.Tensor, keys: Pages, values: Pages) -> bool:
    """Whether there are queries enough, on a processor, and heads that torch's function takes."""
    rows = q.shape[1] // keys.heads * q.shape[2]
    return q.device.type == "cpu" and rows >= LEAST and keys.head_dim == values.head_dim


def attend_many(q: torch.Tensor, keys: Pages, values: Pages, positions: torch.Tensor, at: torch.Tensor, *, scale: float,
                window: int = 0, sinks: torch.Tensor | None = None,
                beside: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """As `attending.attention` has it, where `suits` says so, without a mask by hand and without soft-capping."""
    batch, heads, n, head_dim = q.shape
    group = heads // keys.heads
    rows = q.float().view(batch, keys.heads, group, n, head_dim)
    merged = _Merged(batch, keys.heads, group, n, head_dim)
    first_at, last_at = at.amin(0), at.amax(0)
    starts = range(0, n, TOKENS)
    spans = [(int(first_at[s:s + TOKENS].min()), int(last_at[s:s + TOKENS].max())) for s in starts]

    def look(k: torch.Tensor, v: torch.Tensor, cells: torch.Tensor) -> None:
        """k, v [batch, kv_heads, m, head_dim], `cells` int [batch or 1, m]: their positions."""
        low, high = int(cells.min()), int(cells.max())
        known = [_sees_all(low, high, *span, window) for span in spans]
        if all(known):
            merged.add(slice(0, n), *_flash(rows.flatten(2, 3), k, v, scale=scale))
            return
        for start, all_of_them, span in zip(starts, known, spans, strict=True):
            some = slice(0, k.shape[2]) if all_of_them else _seen(cells, *span, window)
            part, mask = slice(start, min(start + TOKENS, n)), None
            if some is None:
                continue
            if not all_of_them:
                place, seen = at[:, part, None], cells[:, None, some]
                looks = (seen <= place).logical_and_(seen >= 0)
                if window:
                    looks.logical_and_(seen > place - window)
                mask = torch.zeros(looks.shape).masked_fill_(~looks, float("-inf"))
                mask = mask[:, None].expand(-1, group, -1, -1).reshape(mask.shape[0], 1, -1, mask.shape[-1])
            queries = rows[:, :, :, part].flatten(2, 3)
            found, total = _flash(queries, k[:, :, some], v[:, :, some], attn_mask=mask, scale=scale)
            if mask is not None:        # of a row that looks nowhere the function says 0, not the logarithm of it
                total.masked_fill_(mask.amax(-1).isneginf(), float("-inf"))
            merged.add(part, found, total)

    step = max(1, ROOM // (batch * keys.heads * head_dim * PAGE))
    top = int(last_at.max())
    seen = ((positions >= 0) & (positions <= top)).any(0)
    if window:
        seen &= (positions > int(first_at.min()) - window).any(0)
    pages = seen.view(-1, PAGE).any(1).nonzero().flatten().tolist()
    for first in range(pages[0], pages[-1] + 1, step) if pages else ():
        last = min(first + step, pages[-1] + 1)
        *both, buffer = scratch.borrow(3, batch * keys.heads * (last - first) * PAGE * head_dim, torch.float32, q.device)
        look(*(_laid(side, first, last, room, buffer) for side, room in zip((keys, values), both, strict=True)),
             positions[:, first * PAGE:last * PAGE])
    if beside is not None and beside[0].shape[2]:
        look(beside[0].float(), beside[1].float(), beside[2])
    return merged.result(None if sinks is None else sinks.float().view(1, keys.heads, group, 1)).view(batch, heads, n, -1)


def _sees_all(low: int, high: int, first: int, last: int, window: int) -> bool:
    """Whether queries at positions from `first` to `last` all look at all cells of positions from `low` to `high`."""
    return low >= 0 and high <= first and (not window or low > last - window)


def _seen(cells: torch.Tensor, first: int, last: int, window: int) -> slice | None:
    """Of cells [batch or 1, m] those between the first and the last that any query at `first` to `last` looks at."""
    found = (cells >= 0) & (cells <= last)
    if window:
        found &= cells > first - window
    found = found.any(0).nonzero()
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else None


def _laid(pages: Pages, first: int, last: int, room: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """What some pages stand for, one cell after another: [batch, heads, cells, head_dim], in `room`; `buffer` is as large."""
    shape = pages.batch, pages.heads, last - first, PAGE, pages.head_dim
    found = room.view(shape)
    numbers, _, _ = unpacked(pages, first, last, buffer, False)           # [batch, pages, heads, head_dim, 256]
    if pages.type.format:       # byte 4 w + i of a row is cell 64 i + w
        found.unflatten(3, (LANES, -1)).permute(0, 2, 1, 5, 4, 3).copy_(numbers.unflatten(-1, (-1, LANES)))
    else:
        found.permute(0, 2, 1, 4, 3).copy_(numbers)
    return found.flatten(2, 3)


class _Merged:
    """What is found so far: [batch, kv_heads, group, n, head_dim], and the logarithm of what its scores sum to."""

    def __init__(self, *shape: int):
        self.found = torch.zeros(shape)
        self.total = torch.full(shape[:-1], float("-inf"))

    def add(self, part: slice, found: torch.Tensor, total: torch.Tensor) -> None:
        held, before = self.found[:, :, :, part], self.total[:, :, :, part]
        found, total = found.view(held.shape), total.view(before.shape)
        both = torch.logaddexp(before, total)
        held.lerp_(found, (total - both).exp_().nan_to_num_(0.0)[..., None])       # -inf - -inf where nobody looked yet
        before.copy_(both)

    def result(self, sinks: torch.Tensor | None) -> torch.Tensor:
        if sinks is None:
            return self.found
        return self.found * torch.sigmoid(self.total - sinks)[..., None]       # e^total / (e^total + e^sink)
