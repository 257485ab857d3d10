"""Texts in pools of blocks, and what the plainest attention finds in them."""

import torch

from llmlab.kernels import pools
from llmlab.kernels.attending import reference_attention
from llmlab.kernels.pages import Pages, cell_type
from llmlab.kernels.pools import Pool

SIZE, DIM = 16, 64
LENGTHS = (1, 16, 17, 65, 200, 64, 350)         # cells each text has written
WAYS = {"plain": {}, "window": {"window": 40}, "capped": {"softcap": 5.0}, "sinks": {"sinks": True},
        "all": {"window": 33, "softcap": 3.0, "sinks": True}}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pool(kind, keys, blocks, kv_heads=3, dim=DIM, size=SIZE, narrow=True):
    known = cell_type(kind)
    return Pool(known, keys, [torch.zeros(blocks, *shape, dtype=dtype)
                              for shape, dtype in pools.shapes(known, keys, kv_heads, dim, size, narrow)])


class Texts:
    """Texts of some lengths in pools, their blocks anywhere; beside them what their cells stand for, [2, kv_heads, n, dim]."""

    def __init__(self, kinds, lengths=LENGTHS, kv_heads=3, dim=DIM, size=SIZE, seed=1):
        kinds = (kinds, kinds) if isinstance(kinds, str) else kinds
        needed = [-(-length // size) for length in lengths]
        order = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
        self.lengths, self.size = lengths, size
        self.both = [pool(kind, not side, len(order), kv_heads, dim, size) for side, kind in enumerate(kinds)]
        for one in self.both:       # what others left behind must not matter
            one.write(torch.arange(len(order)).repeat_interleave(size), torch.arange(size).repeat(len(order)),
                      random(kv_heads, len(order) * size, dim, seed=9) * 50)
        self.blocks, self.numbers = [], []
        for text, (length, count) in enumerate(zip(lengths, needed, strict=True)):
            blocks = [order.pop() for _ in range(count)]
            x = random(2, kv_heads, length, dim, seed=100 + text)
            place = torch.arange(length)
            for one, side in zip(self.both, x, strict=True):
                one.write(torch.tensor(blocks)[place // size], place % size, side)
            self.blocks.append(blocks)
            rounded = []
            for kind, side in zip(kinds, x, strict=True):
                pages = Pages(kind, 1, kv_heads, dim, length)
                pages.write(place, side[None])
                rounded.append(pages.numbers()[0].permute(1, 0, 3, 2).flatten(1, 2)[:, :length])
            self.numbers.append(rounded)


def asked(way, heads):
    return {**WAYS[way], **({"sinks": torch.linspace(-1, 3, heads)} if "sinks" in WAYS[way] else {})}


def wanted(texts, text, q, first, scale, window=0, softcap=0.0, sinks=None):
    """q [n, heads, dim] of a text's tokens from `first` on."""
    place, cells = torch.arange(first, first + len(q))[:, None], torch.arange(texts.lengths[text])
    mask = (cells <= place) & (cells > place - window if window else True)
    found = reference_attention(q.transpose(0, 1)[None], *(x[None] for x in texts.numbers[text]), mask[None, None], scale,
                                softcap, sinks)
    return found[0].transpose(0, 1)
