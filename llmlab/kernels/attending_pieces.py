"""Attention of a text's next tokens over its blocks: a prompt's piece has queries enough for torch's own flash attention.

Positions are cut into tiles and cells into stretches, always at the same places, and a tile is computed whole: what a token
finds is the same to the bit however its text came in pieces, and whatever else is read in the same step.
"""

from functools import cache
from math import lcm

import torch

from . import scratch
from .attending_once import NOWHERE
from .pools import Pool

ROOM = 1 << 19          # numbers of each side that are gathered at once: 2 MiB
TILE = 64               # positions whose queries go together
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_piece(q: torch.Tensor, keys: Pool, values: Pool, blocks: torch.Tensor, first: int, *, scale: float, window: int = 0,
                 softcap: float = 0.0, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """q [n, heads, head_dim] of a text's tokens from position `first` on, all of them in `blocks` int64 -> what each finds, the
    same shape, float32. window: tokens that a token looks back on, itself among them (0: all). softcap: scores are bent to stay
    below it (0: not). sinks: [heads], scores that take a share and bring nothing. What is gathered at once is bounded, however
    long the text.
    """
    n, heads, head_dim = q.shape
    kv_heads, size, last = keys.heads, keys.size, len(blocks) - 1
    low, high = first // TILE, -(-(first + n) // TILE)
    whole = q.new_zeros(high - low, TILE, kv_heads, heads // kv_heads, head_dim, dtype=torch.float32)
    rows = slice(first - low * TILE, first - low * TILE + n)
    torch.mul(q, scale, out=whole.view(-1, heads, head_dim)[rows])
    whole = whole.permute(0, 2, 3, 1, 4).contiguous()           # [tiles, kv_heads, group, TILE, head_dim]
    found: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(whole)
    begin = max(0, low * TILE + 1 - window) if window else 0
    step = lcm(TILE, size)
    step *= max(1, ROOM // (kv_heads * head_dim * step))
    room = scratch.borrow(2, kv_heads * head_dim * step, torch.float32, q.device)
    look = _plainly if softcap or q.device.type != "cpu" else _by_flash
    for start in range(begin // step * step, high * TILE, step):
        stop, base = min(start + step, high * TILE), max(start, begin // size * size)
        # Blocks that the text does not have yet are its last one again: nobody sees them.
        some = blocks[torch.arange(base // size, -(-stop // size), device=blocks.device).clamp(max=last)]
        k = keys.numbers(some, room[0]).permute(1, 0, 3, 2).flatten(1, 2)                # [kv_heads, cells, head_dim]
        v = values.numbers(some, room[1]).transpose(0, 1).flatten(1, 2)
        for tile in range(max(low, start // TILE), high):
            place = tile * TILE
            left, right = max(start, place + 1 - window) if window else start, min(stop, place + TILE)
            if left < right:
                cells = slice(left - base, right - base)
                new = look(whole[tile - low], k[:, cells], v[:, cells], _hidden(place, left, right, window, q.device), softcap)
                found[tile - low] = _merged(found[tile - low], new)
    found, total = (torch.stack(one) for one in zip(*found, strict=True))
    if sinks is not None:
        found = found * torch.sigmoid(total - sinks.float().view(kv_heads, -1, 1))[..., None]   # e^total / (e^total + e^sink)
    return found.permute(0, 3, 1, 2, 4).reshape(-1, heads, head_dim)[rows]


def _hidden(place: int, left: int, right: int, window: int, device: torch.device) -> torch.Tensor | None:
    """Of the tile that begins at position `place` and cells from `left` to `right`: float32 [TILE, cells], -inf where a query
    does not look, or None where all look at all."""
    if not window:
        if right <= place:
            return None
        hidden = torch.zeros(TILE, right - left, device=device)         # the tile's own cells are the last
        hidden[:, -TILE:] = _triangle(device)
        return hidden
    at, cells = torch.arange(place, place + TILE, device=device)[:, None], torch.arange(left, right, device=device)
    return torch.zeros(TILE, right - left, device=device).masked_fill_((cells > at) | (cells <= at - window), float("-inf"))


@cache
def _triangle(device: torch.device) -> torch.Tensor:
    return torch.full((TILE, TILE), float("-inf"), device=device).triu_(1)


def _by_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None,
              softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """q [kv_heads, group, TILE, head_dim], scaled -> what it finds, and the logarithm of what its scores sum to."""
    k, v = (one[:, None].expand(-1, q.shape[1], -1, -1) for one in (k, v))
    found, total = _flash(q, k, v, attn_mask=None if hidden is None else hidden[None, None], scale=1.0)
    if hidden is not None:          # of a query that looks nowhere the function says 0, not the logarithm of it
        total.masked_fill_(hidden.amax(1) < 0, float("-inf"))
    return found, total


def _plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None,
             softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on any device, and with softcap."""
    scores = torch.bmm(q.flatten(1, 2), k.mT)
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(*q.shape[:-1], -1)
    if hidden is not None:
        scores.add_(hidden)
    total = scores.logsumexp(-1)
    shares = scores.sub_(total.clamp(min=NOWHERE)[..., None]).exp_()
    return torch.bmm(shares.flatten(1, 2), v).view(q.shape), total


def _merged(held: tuple[torch.Tensor, torch.Tensor] | None,
            new: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two stretches of cells as one."""
    if held is None:
        return new
    both = torch.logaddexp(held[1], new[1])
    return held[0].lerp(new[0], (new[1] - both).exp_().nan_to_num_(0.0)[..., None]), both      # -inf - -inf: nobody looked yet
