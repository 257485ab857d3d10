"""Which layers stay where there is a budget and no plan: as many as there is room for, evenly spread among those that do not.

A reader that is never idle is what a pass waits for least, and it is idle while many layers that stay follow each other.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from ..errors import LabError
from ..gguf import GGUFFile
from ..hardware import ram_available
from ..runtime.decoder import Decoder
from ..runtime.generating import usable_context
from .budget import Budget, total
from .opening import Looked, Offloaded, look, open_decoder
from .pieces import HEAD
from .placement import Placement

CONTEXT = 4096          # tokens, where nobody says how many: up to this, half and half again until the cache takes no more
CACHE_SHARE = 1 / 3     # than this of the budget, and there is room for the rest
SHORTEST = 512
RAM_SHARE = 0.7         # of what is free, for layers that a card does not hold


def opened(file: GGUFFile, budget=None, plan=None, strategy: str = "auto", dtype: torch.dtype | None = None,
           device: torch.device | None = None, context: int | None = None, compile: bool = False,
           progress: Callable[[str], None] | None = None, kv: str | tuple[str, str] | None = None, mode: str | None = None,
           **near) -> Offloaded:
    """The decoder of a GGUF under a budget (bytes, words or a `Budget`), or by a plan (`llmlab.plan`'s, or a `Placement`), in
    which `context`, `kv` and `mode` take the place of the plan's own where they are given. `device`: None is a card where there
    is one. `mode`: "exact", or "fast", which computes what lies in RAM there.
    `near`: sinks, recent, rotate. The rest, and errors, as in `llmlab.decoder`."""
    if strategy not in ("auto", "compact"):
        raise LabError(f"strategy is {str(strategy)[:40]!r}; with a budget or a plan weights are held as 'compact' has them")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if budget is None and (site := getattr(plan, "site", None)) is not None and site.here:
        budget = Budget(site.device, site.ram)
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    if context is not None:
        usable_context(context, file.metadata.get(f"{file.architecture}.context_length"))
    if not compile:
        return _opened(file, budget, plan, None, dtype, device, context, progress, kv, mode, near)
    from ..runtime.compiled import NotCompiled
    try:
        return _opened(file, budget, plan, "words", dtype, device, context, progress, kv, mode, near)
    except NotCompiled as error:
        found = _opened(file, budget, plan, "gguf", dtype, device, context, progress, kv, mode, near)
        found.why = f"not compiled: {error}; {found.why}"
        return found


def _opened(file: GGUFFile, budget: Budget, plan, layout: str | None, dtype, device, context, progress, kv, mode,
            near) -> Offloaded:
    """`layout`: None is the plan's."""
    if plan is None:
        placement = chosen(file, budget, context, kv, dtype, device, layout or "gguf", progress, mode or "exact", **near)
    else:
        placement = getattr(plan, "placement", plan)
        if not isinstance(placement, Placement):
            raise LabError(f"plan is {str(plan)[:60]!r}; give what llmlab.plan gives, or an offload.placement.Placement")
        changes = {"context": context, "kv_types": kv, "layout": layout, "mode": mode}
        placement = replace(placement, **{name: value for name, value in changes.items() if value is not None})
        if placement.mode == "fast" and budget.limits["ram"] is not None:
            placement = _with_workspace(placement, look(file, placement, dtype, device, None, progress, **near), budget, near)
    return open_decoder(file, placement, budget, dtype, device, progress=progress, **near)


def chosen(file: GGUFFile, budget: Budget, context: int | None = None, kv: str | tuple[str, str] | None = None,
           dtype: torch.dtype | None = None, device: torch.device | str = "cpu", layout: str = "gguf",
           progress: Callable[[str], None] | None = None, mode: str = "exact", **near) -> Placement:
    """A placement within what a budget has left: two slots, then the head, layers, and slots of experts, as many as fit; on a
    card, and in fast mode where the budget has RAM, the rest in RAM, as far as that goes. Where nothing fits it is the least
    there is, which `open_decoder` then refuses by name. Raises as `open_decoder` does."""
    made = Placement(slots=2, readers=2, context=context or CONTEXT, kv_types=kv, layout=layout, mode=mode)
    looked = look(file, made, dtype, device, None, progress, **near)
    experts = [piece.name for piece in looked.store.pieces.values() if piece.expert is not None]
    made = replace(made, context=min(made.context, looked.like.trained), expert_slots=min(len(experts), 1))

    def fits(placement: Placement, share: float = 1.0, tiers: tuple[str, ...] = ("device", "ram")) -> bool:
        lines = looked.needs(placement, **near)
        cache = [line for line in lines if line.what == "KV cache"]
        return all(total(lines, tier) <= left and total(cache, tier) <= share * left
                   for tier, limit in budget.limits.items() if limit is not None and tier in tiers
                   for left in [limit - budget.used[tier]])

    least = replace(made, slots=1)
    while context is None and made.context > SHORTEST and not fits(least, CACHE_SHARE, ("device",)):
        made, least = replace(made, context=made.context // 2), replace(least, context=made.context // 2)
    if not fits(made):
        return _rest_in_ram(least, looked, budget)
    layers = [piece.name for piece in looked.store.pieces.values() if piece.expert is None and piece.name != HEAD]
    if fits(with_head := replace(made, where={HEAD: "device"})):
        made = with_head
    stay = _most(len(layers), lambda count: fits(_staying(made, layers, count)))
    made = _staying(made, layers, stay)
    if experts:
        if fits(all_stay := replace(made, where=made.where | dict.fromkeys(experts, "device"), expert_slots=0)):
            return all_stay
        made = replace(made, expert_slots=1 + _most(len(experts) - 1, lambda more: fits(replace(made, expert_slots=1 + more))))
    return _rest_in_ram(made, looked, budget)


def take_draft(budget: Budget, draft: Decoder, context: int | None = None) -> None:
    """Set aside what a decoder that guesses tokens holds beside the model: its weights, and its cache, which from now on is of
    so many tokens at most (None: of as many as a model is given where nobody says). To be done before the model is opened,
    which takes what is left. Raises OverBudget where there is too little."""
    most = draft.context = min(draft.trained, context if isinstance(context, int) else CONTEXT)
    cells = sum(2 * shape.kv_heads * shape.head_dim * draft.cache_dtype.itemsize + 2 * 4 * shape.turned
                for shape in draft.weights.shapes)
    budget.take("device", "the draft", draft.resident_bytes + most * cells, "modelled",
                "give a larger budget, or a smaller draft")


def _with_workspace(placement: Placement, looked: Looked, budget: Budget, near: dict) -> Placement:
    """With room in RAM for what is computed there: of what lies there the last pieces are read from the disk instead, no more
    than that takes."""
    lines = looked.needs(placement, **near)
    over = total(lines, "ram") - (budget.limits["ram"] - budget.used["ram"])
    where, working = dict(placement.where), sum(line.bytes for line in lines if line.what == "workspace in RAM")
    for piece in [*looked.store.pieces.values()][::-1] if 0 < over <= working else ():
        if over > 0 and where.get(piece.name) == "ram":
            where[piece.name] = "ssd"
            over -= piece.bytes
    return replace(placement, where=where)


def _staying(placement: Placement, layers: list[str], count: int) -> Placement:
    """`count` of the layers stay, evenly spread."""
    stay = {layers[(2 * number + 1) * len(layers) // (2 * count)] for number in range(count)}
    return replace(placement, where={**placement.where, **dict.fromkeys(stay, "device")})


def _most(limit: int, fits) -> int:
    """The largest number up to `limit` that fits, where 0 does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _rest_in_ram(placement: Placement, looked: Looked, budget: Budget) -> Placement:
    """What a card does not hold; a processor's own memory is the device already."""
    limit = budget.limits["ram"]
    if looked.device.type == "cpu" and (limit is None or placement.mode == "exact"):
        return placement
    left = int(RAM_SHARE * ram_available()) if limit is None else limit - budget.used["ram"]
    left -= total(looked.needs(placement), "ram")
    where = dict(placement.where)
    for piece in looked.store.pieces.values():
        if piece.name not in where and piece.bytes <= left:
            where[piece.name] = "ram"
            left -= piece.bytes
    return replace(placement, where=where)
