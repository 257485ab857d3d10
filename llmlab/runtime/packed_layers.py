"""One layer of a transformers cache, its keys and values in packed pages; handed on to attention is the layer itself."""

import copy

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin

from ..errors import LabError
from ..kernels.attending import attention
from ..kernels.pages import BLOCK, PAGE, Pages, cell_type
from ..units import align
from .cache import BATCH, LayerCache, cells_of
from .masks import Mask


class PackedLayer(CacheLayerMixin):
    """One layer's keys and values. `cache`: a LayerCache (`Latent` for MLA), None until the first tokens come. `length`: of
    the texts, padding among it. `window`: tokens a query looks back, 0 for all. `ruled`: whether positions and window say who
    looks at whom. `shared`: whether later layers look at these cells too.

    What `update` brings is laid into pages as attention begins: only then is it known which of the tokens are padding.
    """

    is_croppable = True

    def __init__(self, kv: tuple[str, str], window: int = 0, sinks: int = 0, recent: int = 0, rotate: bool = False,
                 shared: bool = False, latent: int = 0, ruled: bool = True):
        super().__init__()
        self.kv, self.window, self.shared, self.latent, self.ruled = kv, window, shared, latent, ruled
        self.near = {"sinks": sinks, "recent": recent, "rotate": rotate}
        self.is_sliding = bool(window)
        self.reset()

    def reset(self) -> None:
        self.cache, self.length, self.is_initialized, self.batch_size = None, 0, False, -1
        self.waiting = None         # keys and values that came and are not laid down
        self.real = None            # bool [batch, length] of texts with padding: which tokens are none of it

    @property
    def bytes(self) -> int:
        self._lay(None)
        return self.cache.bytes if self.cache else 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        device, other = key_states.device, value_states.shape[-1]
        if self.latent and heads == 1 and dim == self.latent:
            self.cache = Latent(self.kv[0], dim, other, batch, device)
        else:
            self.cache = Texts(self.kv, heads, dim, other, batch=batch, window=self.window, device=device,
                               capacity=self._usual if self.window else None, **self.near)
        self.batch_size, self.is_initialized = batch, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple["Handed", "Handed"]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, count, _ = key_states.shape
        if batch != self.batch_size:
            raise LabError(f"the cache holds {self.batch_size} texts and {batch} are to be gone on with; begin a new cache, or "
                           "choose from this one with batch_select_indices or batch_repeat_interleave")
        self._lay(None)
        self._settle()
        self.waiting = key_states.detach().float(), value_states.detach().float()
        self.length += count
        handed = Handed(self)
        return handed, handed

    def attend(self, q: torch.Tensor, mask, **how) -> torch.Tensor:
        """q [batch, heads, n, key_dim] of the newest tokens -> [batch, heads, n, value_dim] float32. `mask`: a `Mask`, or bool
        [batch or 1, 1 or heads, n, tokens] whose last column is the last token, or None."""
        told = isinstance(mask, Mask)
        self._lay(mask if told else None)
        if told and not (self.ruled and mask.plain and mask.window in (0, self.window)):
            how["mask"] = self._of_cells(mask.pairs, mask.first)
        elif not told and mask is not None:
            how["mask"] = self._of_cells(mask, self.length - mask.shape[-1])
        found = self.cache.attend(q, self.at, **how)
        if not self.shared:
            self._settle()
        return found

    def _lay(self, mask: Mask | None) -> None:
        """Lay what is waiting into pages, at the positions that its texts have without their padding."""
        if self.waiting is None:
            return
        keys, values = self.waiting
        self.waiting = None
        first, last = self.length - keys.shape[2], self.length
        self.length = first         # if they are not what the cache can go on with it stays as it was
        if self.real is None and (mask is None or not mask.padded):
            self.at = torch.arange(first, last, device=keys.device)
        else:
            real = self._real(mask, first, last, keys.device)
            self.at = real[:, first:].cumsum(1) + real[:, :first].sum(1, keepdim=True) - 1
            self.at.masked_fill_(~real[:, first:], -1)
            self.real = real
        if self.window:
            if last - first > BATCH:
                self.cache.resize(cells_of(2**40, self.window + last - first))      # all they look at, until they have
            self.cache.grow(min(last, self.cache.capacity))
        self.cache.append(keys, values, self.at)
        self.length = last

    def _real(self, mask: Mask | None, first: int, last: int, device) -> torch.Tensor:
        """bool [batch, last]: which tokens are no padding, by what was said before and is said now."""
        before = self.real if self.real is not None else torch.ones(self.batch_size, first, dtype=torch.bool, device=device)
        if mask is None or mask.said is None:
            return nn.functional.pad(before, (0, last - first), value=True)
        said = nn.functional.pad(mask.said, (0, max(0, last - mask.said.shape[1])))[:, :last].to(device)
        if not torch.equal(said[:, :first], before):
            raise LabError("the attention mask says otherwise than before which tokens in the cache are padding; give the mask "
                           "of the whole texts, from their first token on")
        return said

    @property
    def _usual(self) -> int:
        """Cells of a window's ring from token to token."""
        return cells_of(2**40, self.window)

    def _settle(self) -> None:
        """Back to a window's cells, after a long piece of text."""
        if self.window and self.is_initialized and self.cache.capacity > self._usual:
            self.cache.resize(self._usual)

    def _of_cells(self, pairs: torch.Tensor, first: int) -> torch.Tensor:
        """bool [batch, 1 or heads, n, tokens from number `first` on] -> the same by cells."""
        numbers = self.cache.numbers()
        known = (numbers >= first) & (numbers < first + pairs.shape[-1]) & (self.cache.positions >= 0)
        return pairs[..., (numbers - first).clamp(0, pairs.shape[-1] - 1)] & known[:, None, None]

    # ---- what generating asks of a layer ---------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.window or -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = max(self.length - self.window + 1, 0) if self.window else 0
        return self.length + query_length - first, first

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; of a sliding layer not more than the batch that it has room for beside its window, as what
        they pushed out is gone."""
        if not tokens_to_remove or not self.is_initialized:
            return
        self.check_crop(tokens_to_remove)
        length = max(0, self.length + tokens_to_remove)
        if self.real is not None:
            self.real = self.real[:, :length]
            self.cache.crop(length, self.real.sum(1, keepdim=True))
        else:
            self.cache.crop(length)
        self.length = length

    def can_crop(self, tokens_to_remove: int) -> bool:
        """Whether what would then be looked at is still there."""
        self._lay(None)
        return not self.is_initialized or self.cache.holds(max(0, self.length + tokens_to_remove))

    def check_crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise LabError(f"crop({tokens_to_remove}): give minus the number of tokens to forget, as transformers 5 does")
        if not self.can_crop(tokens_to_remove):
            raise LabError(f"a sliding layer of {self.window} tokens goes back {BATCH} at most, and {-tokens_to_remove} are to "
                           "be forgotten; begin a new cache")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if not self.is_initialized:
            return
        self._lay(None)
        indices = torch.as_tensor(indices, device=self.cache.keys.device)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.cache.select(indices)
        self.batch_size = len(indices)
        self.real = self.real if self.real is None else self.real[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(max(0, self.batch_size)).repeat_interleave(repeats))

    def offload(self) -> None:
        raise LabError("a packed cache stays where its model is; it is small already")

    prefetch = offload


class Handed:
    """What `update` gives in place of keys and of values: the layer. Whoever takes it for a tensor is told so."""

    def __init__(self, layer: PackedLayer):
        self.layer = layer

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise _taken(name)

    def __getitem__(self, index):
        raise _taken("[...]")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise _taken(getattr(function, "__name__", str(function)))


def _taken(what: str) -> LabError:
    return LabError(f"keys and values in this cache stay packed, and something asks them for {what!r:.40}: either the model's "
                    "attention is not set to 'llmlab' (PackedCache(model) does it), or the model computes with keys itself "
                    "and needs transformers' DynamicCache")


# ---- where it lies -------------------------------------------------------------------------------------------

class Texts(LayerCache):
    """A layer's cache whose texts can be chosen among, and whose ring can be moved into another."""

    def numbers(self) -> torch.Tensor:
        """int64 [cells], which token lies in each, negative where none does."""
        cells, last = torch.arange(self.cells, device=self.device), self._unpacked - 1
        if self.capacity is None:
            return cells.masked_fill(cells > last, -1)
        return last - (last - cells) % self.capacity

    def select(self, texts: torch.Tensor) -> None:
        """Only these texts, in this order; one may come again."""
        self.batch = len(texts)
        self.keys, self.values = _chosen(self.keys, texts), _chosen(self.values, texts)
        if self.positions.shape[0] > 1:
            self.positions = self.positions[texts]
        if self.near is not None:
            self.near = tuple(t[texts] if t.ndim == 4 or t.shape[0] > 1 else t for t in self.near)

    def crop(self, length: int, limits: torch.Tensor | None = None) -> None:
        """`limits` [batch, 1]: the positions to forget from, of texts that each have their own."""
        if limits is not None:
            for positions in self._all_positions():
                positions.masked_fill_(positions >= limits, -1)
        super().crop(length)

    def resize(self, capacity: int) -> None:
        """Into a ring of so many cells, as the blocks are; what does not fit is the oldest."""
        numbers = self.numbers()
        kept = (numbers >= max(0, self._unpacked - capacity)).nonzero().flatten()
        numbers, old = numbers[kept], (self.keys, self.values, self.positions)
        self.capacity = capacity
        self._lowest = max(self._lowest, self._unpacked - capacity)
        cells, room = self.cell(numbers), min(capacity, align(max(self.length, 1), PAGE))
        self.keys, self.values = (Pages(x.type.name, x.batch, x.heads, x.head_dim, room, x.device) for x in old[:2])
        for new, before in zip((self.keys, self.values), old[:2], strict=True):
            new.set_blocks(cells, before.blocks(kept))
        self.positions = old[2].new_full((old[2].shape[0], room), -1)
        self.positions[:, cells] = old[2][:, kept]


class Latent:
    """What an MLA layer keeps: one row a token, [latent, turned key], of which the latent is the value too."""

    capacity = None

    def __init__(self, type: str, rank: int, turned: int, batch: int, device):
        self.rank, self.keys, self.length = rank, Pages(type, batch, 1, rank + turned, PAGE, device), 0
        self.positions = torch.full((1, PAGE), -1, dtype=torch.int32, device=device)

    @property
    def bytes(self) -> int:
        return self.keys.bytes

    def append(self, latent: torch.Tensor, turned: torch.Tensor, positions: torch.Tensor) -> None:
        first, self.length = self.length, self.length + latent.shape[2]
        if (more := self.length - self.keys.cells) > 0:
            self.keys.grow(self.length)
            self.positions = nn.functional.pad(self.positions, (0, align(more, PAGE)), value=-1)
        if positions.ndim > self.positions.shape[0]:
            self.positions = self.positions.repeat(self.keys.batch, 1)
        cells = torch.arange(first, self.length, device=self.keys.device)
        self.keys.write(cells, torch.cat([latent, turned], -1))
        self.positions[:, cells] = positions.to(torch.int32)

    def attend(self, q: torch.Tensor, at: torch.Tensor, **how) -> torch.Tensor:
        """q [batch, heads, n, rank + turned] -> [batch, heads, n, rank], still latent."""
        return attention(q, self.keys, _first(self.keys, self.rank), self.positions, at.view(-1, at.shape[-1]), **how)

    def numbers(self) -> torch.Tensor:
        cells = torch.arange(self.keys.cells, device=self.keys.device)
        return cells.masked_fill(cells >= self.length, -1)

    def holds(self, length: int) -> bool:
        return True

    def crop(self, length: int, limits: torch.Tensor | None = None) -> None:
        self.positions.masked_fill_(self.positions >= (length if limits is None else limits), -1)
        self.length = length

    def select(self, texts: torch.Tensor) -> None:
        self.keys = _chosen(self.keys, texts)
        if self.positions.shape[0] > 1:
            self.positions = self.positions[texts]


def _first(pages: Pages, numbers: int) -> Pages:
    """The first numbers of each head: the same memory, seen as narrower pages."""
    seen = copy.copy(pages)
    rows = numbers // BLOCK if pages.type.format else numbers
    seen.head_dim, seen.codes = numbers, pages.codes[:, :, :, :rows]
    seen.scales = None if pages.scales is None else pages.scales[:, :, :, :rows]
    seen.minimums = None if pages.minimums is None else pages.minimums[:, :, :, :rows]
    return seen


def _chosen(pages: Pages, texts: torch.Tensor) -> Pages:
    """Some texts' pages, in that order."""
    made = copy.copy(pages)
    made.batch = len(texts)
    made.codes, made.scales, made.minimums = (
        t if t is None else t.index_select(0, texts) for t in (pages.codes, pages.scales, pages.minimums))
    return made


def check_latent(rank: int, kv: tuple[str, str], sinks: int, recent: int, rotate: bool) -> None:
    if sinks or recent or rotate:
        raise LabError("sinks, recent and rotate are not for layers that keep one latent row (MLA); leave them out")
    if kv[0] != kv[1]:
        raise LabError(f"an MLA layer keeps one latent row for K and V; give both the same cache type, not {kv}")
    if cell_type(kv[0]).format and rank % BLOCK:
        raise LabError(f"a {kv[0]} cache needs rows of a multiple of {BLOCK} numbers, and the latent has {rank}; choose f16")
