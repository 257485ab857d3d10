"""Attention straight on packed pages: some pages at a time, with a running maximum and sum, never the whole cache unpacked.

Codes of some pages become float32 numbers in a buffer that a cache of the processor holds, and are multiplied there. For few
queries they stay without their scales: a block's scale is applied to what a query has summed up over the block (K), or to the
shares before they meet the codes (V), a multiplication for 32 numbers instead of one for each. What is scored of a page lies
as the page does: [batch, pages, kv_heads, rows, 256], a row being one query of one head of the group.
"""

from collections.abc import Iterator

import torch

from . import scratch
from .attending_many import attend_many, suits
from .pages import BLOCK, PAGE, Pages, as_bytes_lie, in_order
from .raising import unpacked

NUMBERS = 1 << 19       # numbers of K or V unpacked at once: 2 MiB. From 1 << 17 to 1 << 20 all is alike within 10 %
SCORES = 1 << 20        # scores held at once
ROWS = 256              # queries of a head group that are computed together
FEW = 16                # rows up to which scales are applied to sums, not to numbers
NOWHERE = torch.finfo(torch.float32).min


class Merged:
    """What attention has found so far: for each query the largest score, the sum of shares and of what they brought.

    most, total: [batch, kv_heads, rows, 1]; found: [batch, kv_heads, rows, head_dim]; all float32.
    """

    def __init__(self):
        self.most = self.total = self.found = None

    def add(self, scores: torch.Tensor, bring) -> None:
        """scores [batch, pages, kv_heads, rows, cells], -inf where a query does not look, which become shares in their place;
        `bring(shares)` -> [batch, kv_heads, rows, head_dim]."""
        most = scores.amax(-1, keepdim=True).amax(1).clamp_(min=NOWHERE)
        if self.most is not None:
            most = torch.maximum(most, self.most)
        shares = scores.sub_(most[:, None]).exp_()
        total, found = shares.sum(-1, keepdim=True).sum(1), bring(shares)
        if self.most is not None:
            less = (self.most - most).exp_()
            total, found = total.addcmul_(self.total, less), found.addcmul_(self.found, less)
        self.most, self.total, self.found = most, total, found

    def result(self, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """`sinks` [batch, kv_heads, rows, 1]: scores that take a share and bring nothing. A query that looks nowhere finds
        zeros."""
        total = self.total
        if sinks is not None:
            total = total + (sinks - self.most).exp()
        return self.found / total.clamp(min=torch.finfo(torch.float32).tiny)


def attention(q: torch.Tensor, keys: Pages, values: Pages, positions: torch.Tensor, at: torch.Tensor, *, scale: float = 1.0,
              window: int = 0, softcap: float = 0.0, sinks: torch.Tensor | None = None, mask: torch.Tensor | None = None,
              beside: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """q [batch, heads, n, head_dim] against packed keys and values -> the same shape [..., value_dim], float32.

    positions: int [batch or 1, cells] of the cells, -1 where there is nothing; at: int [batch or 1, n] of the queries. A query
    looks at cells with 0 <= position <= its own, and of them, with a `window`, only at the last so many; `mask`, bool
    [batch or 1, 1 or heads, n, cells], takes the place of both. softcap: scores are bent to stay below it (0: not). sinks:
    [heads], scores that take a share and bring nothing. beside: (keys, values, positions) of cells in full precision that are
    looked at besides, [batch, kv_heads, m, head_dim] twice and int [batch or 1, m], or bool [batch or 1, n, m]: who looks at
    which, which a `mask` asks for. Grouped queries: heads are a multiple of the pages' heads. Memory beside the result is
    bounded, however long the cache.
    """
    if mask is None and not softcap and suits(q, keys, values):
        return attend_many(q, keys, values, positions, at, scale=scale, window=window, sinks=sinks, beside=beside)
    batch, heads, n, head_dim = q.shape
    kv_heads, group = keys.heads, heads // keys.heads
    out = torch.empty(batch, heads, n, values.head_dim, dtype=torch.float32, device=q.device)
    step = max(1, min(n, ROWS // group, SCORES // (batch * heads * PAGE)))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        part, place = q[:, :, rows].to(torch.float32).mul(scale), at[:, rows, None]
        count = part.shape[2]
        part = part.reshape(batch, kv_heads, group * count, head_dim)
        merged = Merged()

        def hidden(cells: torch.Tensor, place=place) -> torch.Tensor:
            """bool [batch, count, cells]: where nobody looks."""
            cells = cells[:, None]
            found = (cells < 0).logical_or(cells > place)
            return found.logical_or_(cells <= place - window) if window else found

        def bent(scores: torch.Tensor, where: torch.Tensor, count=count) -> torch.Tensor:
            """The same scores, -inf `where` bool [batch, pages, 1 or kv_heads, 1 or group, count, cells] has it."""
            if softcap:
                scores.div_(softcap).tanh_().mul_(softcap)
            scores.unflatten(3, (group, count)).masked_fill_(where, float("-inf"))
            return scores

        if mask is None:
            low, high = (positions[0], positions[0]) if positions.shape[0] == 1 else positions.aminmax(dim=0)
            seen = (high >= 0).logical_and(low <= place.max())
            if window:
                seen.logical_and_(high > place.min() - window)
        else:
            seen = mask[:, :, rows].flatten(0, 2).any(0)
        for first, last in _runs(seen, batch * heads * count):
            cells = slice(first * PAGE, last * PAGE)
            if mask is None:
                where = hidden(positions[:, cells])[:, None, None]
            else:
                where = ~_by_group(mask[:, :, rows, cells], kv_heads)
            where = where.unflatten(-1, (-1, PAGE)).movedim(-2, 1)      # [batch, pages, 1 or kv_heads, 1 or group, count, 256]
            turned = bool(keys.type.format)
            scores, buffer = _room(batch, last - first, kv_heads, group * count, max(keys.head_dim, values.head_dim), q.device)
            _score(part, keys, first, last, scores, buffer)
            bent(scores, as_bytes_lie(where) if turned else where)

            def bring(shares, first=first, last=last, turned=turned, buffer=buffer):
                if turned != bool(values.type.format):
                    shares = in_order(shares) if turned else as_bytes_lie(shares)
                return _bring(shares, values, first, last, buffer)

            merged.add(scores, bring)
        if beside is not None:
            near, brought, cells = beside
            where = ~cells[:, rows] if cells.dtype == torch.bool else hidden(cells)
            scores = bent((part @ near.float().mT)[:, None], where[:, None, None, None])
            merged.add(scores, lambda shares, brought=brought: shares[:, 0] @ brought.float())
        if merged.most is None:
            out[:, :, rows] = 0
            continue
        sink = None if sinks is None else sinks.float().repeat_interleave(count).view(1, kv_heads, -1, 1)
        out[:, :, rows] = merged.result(sink).view(batch, heads, count, -1)
    return out


def _by_group(mask: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """bool [batch, 1 or heads, n, cells] -> [batch, 1 or kv_heads, 1 or group, n, cells]."""
    return mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, -1))


def _runs(seen: torch.Tensor, rows: int) -> Iterator[tuple[int, int]]:
    """(first, last) of pages that any query looks at, of `seen` bool [cells], as many at once as `SCORES` has room for."""
    pages = seen.view(-1, PAGE).any(1).nonzero().flatten().tolist()
    if pages:
        step = max(1, SCORES // (rows * PAGE))
        for first in range(pages[0], pages[-1] + 1, step):
            yield first, min(first + step, pages[-1] + 1)


def _room(batch: int, pages: int, kv_heads: int, rows: int, head_dim: int,
          device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores [batch, pages, kv_heads, rows, 256], room for unpacked numbers, a page's at least, and for what few rows make of
    each block): one borrowed buffer, as memory that is new each time costs more than the work on it."""
    scores = batch * pages * kv_heads * rows * PAGE
    numbers = max(NUMBERS, batch * kv_heads * head_dim * PAGE)
    whole = scratch.borrow(1, scores + numbers + (numbers // BLOCK * rows if rows <= FEW else 0), torch.float32, device)[0]
    return whole[:scores].view(batch, pages, kv_heads, rows, PAGE), whole[scores:]


def _pieces(first: int, last: int, pages: Pages, few: bool) -> Iterator[tuple[int, int]]:
    """Runs of pages that are unpacked together: for many rows one page, so that a query need not be laid out for each."""
    step = max(1, NUMBERS // (pages.batch * pages.heads * pages.head_dim * PAGE)) if few else 1
    return ((page, min(page + step, last)) for page in range(first, last, step))


def _score(q: torch.Tensor, keys: Pages, first: int, last: int, scores: torch.Tensor, buffer: torch.Tensor) -> None:
    """q [batch, kv_heads, rows, head_dim] times the keys of some pages, into `scores` [batch, pages, kv_heads, rows, 256];
    cells lie as bytes do where the keys are of a quantized type."""
    batch, kv_heads, rows, head_dim = q.shape
    few, known = rows <= FEW, keys.type
    blocks, sums = q, None
    if few and known.format:
        blocks = q.unflatten(-1, (-1, BLOCK)).transpose(2, 3)       # [batch, kv_heads, blocks, rows, 32]
        sums = blocks.sum(-1).transpose(2, 3)                       # [batch, kv_heads, rows, blocks]
    for page, end in _pieces(first, last, keys, few):
        numbers, scale, shift = unpacked(keys, page, end, buffer, few)
        into, count = scores[:, page - first:end - first], end - page
        laid = blocks[:, None].expand(-1, count, *blocks.shape[1:]).reshape(-1, *blocks.shape[-2:])
        if scale is None:
            if into.is_contiguous():
                torch.bmm(laid, numbers.view(-1, head_dim, PAGE), out=into.view(-1, rows, PAGE))
            else:
                into.copy_(torch.bmm(laid, numbers.view(-1, head_dim, PAGE)).view(into.shape))
            continue
        found = _after(numbers, buffer, rows)
        torch.bmm(laid, numbers.view(-1, BLOCK, PAGE), out=found)
        torch.sum(found.view(batch, count, kv_heads, -1, rows, PAGE).mul_(scale[..., None, :]), 3, out=into)
        if shift is not None:
            into += sums[:, None] @ shift


def _bring(shares: torch.Tensor, values: Pages, first: int, last: int, buffer: torch.Tensor) -> torch.Tensor:
    """shares [batch, pages, kv_heads, rows, 256] times the values of some pages -> [batch, kv_heads, rows, head_dim]."""
    batch, _, kv_heads, rows, _ = shares.shape
    few, total = rows <= FEW, 0
    for page, end in _pieces(first, last, values, few):
        numbers, scale, shift = unpacked(values, page, end, buffer, few)
        some, count = shares[:, page - first:end - first], end - page
        if scale is None:
            found = torch.bmm(some.reshape(-1, rows, PAGE), numbers.view(-1, values.head_dim, PAGE).mT)
            found = found.view(batch, count, kv_heads, rows, -1).sum(1)
        else:
            weighed = _after(numbers, buffer, rows)
            torch.mul(some[:, :, :, None], scale[..., None, :], out=weighed.view(batch, count, kv_heads, -1, rows, PAGE))
            found = torch.bmm(weighed, numbers.view(-1, BLOCK, PAGE).mT)
            found = found.view(batch, count, kv_heads, -1, rows, BLOCK).sum(1)
            if shift is not None:
                found += (some @ shift.mT).sum(1).transpose(2, 3)[..., None]
            found = found.transpose(2, 3).flatten(3)
        total = found if page == first else total.add_(found)
    return total


def _after(numbers: torch.Tensor, buffer: torch.Tensor, rows: int) -> torch.Tensor:
    """[blocks, rows, 256] of the buffer, behind the unpacked numbers."""
    count = numbers.numel() // BLOCK * rows
    return buffer[numbers.numel():numbers.numel() + count].view(-1, rows, PAGE)


def reference_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float = 1.0,
                        softcap: float = 0.0, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """The same in the plainest way, all at once in float64: q [batch, heads, n, head_dim], keys and values [batch, kv_heads,
    cells, head_dim] as they are after unpacking, mask bool [batch, 1 or heads, n, cells] -> [batch, heads, n, head_dim]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = q.double() @ keys.mT * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    shares = scores.softmax(-1).nan_to_num(0.0)
    return shares[..., :keys.shape[2]] @ values
