"""What lives where, under budgets, so that a token takes the fewest seconds: candidates are laid out, timed and compared.

A byte that is resident saves a byte that is moved for every token, whichever layer it belongs to: so as many bytes as fit stay
on the device, and of the rest as many as fit in RAM. They are spread evenly over the pass, for then the drive has something to
read while resident layers compute. Experts are wanted seldom: what room is left holds a cache of them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..errors import LabError
from ..rates import Band
from ..units import MIB, format_bytes
from .costs import Pass, Stage, bounds, costing, expected, schedule, seconds, touched, within_two
from .shaping import Layer, Shape, Work
from .ways import Site

SLOTS = (2, 3, 4, 6, 1)         # in this order: of two that take about as long the first
GAIN = 0.02                     # by which a later candidate must be faster
RING = 2                        # parts of pinned memory that files are read into on their way to a card


@dataclass(frozen=True)
class Needs:
    """Bytes that any arrangement needs beside weights: on the device always, and the cache, wherever it is. turns: on the
    device where the cache is in RAM, the rooms that its layers take turns in. aside: in RAM, workspace of what is computed
    there."""

    small: int
    workspace: tuple[int, int, int]
    overhead: tuple[int, int, int]
    cache: int
    state: int
    turns: int = 0
    aside: int = 0

    def on_device(self, kv: str | None) -> int:
        """What a cache that lies there takes of the device."""
        return self.turns if kv == "ram" else self.cache

    @property
    def fixed(self) -> int:
        """Without the cache, high estimate."""
        return self.small + self.workspace[2] + self.overhead[2] + self.state


@dataclass(frozen=True)
class Arrangement:
    """Where everything is. tiers: of each layer's own matrices, in the order of the pass, the head last. Experts are all always
    on the device (`resident_experts`), or in its cache of `expert_slots`, with so many of them in RAM. Bytes of all slots, and
    of the pinned ring."""

    tiers: tuple[str, ...]
    slots: int
    kv: str
    expert_slots: int
    ram_experts: int
    resident_experts: bool
    slot_bytes: int
    ring_bytes: int

    def on(self, tier: str) -> int:
        """How many layers have their own matrices there."""
        return self.tiers.count(tier)


def slot_bytes(layers: Sequence[Layer], slots: int) -> int:
    """Bytes of all slots that these layers take turns in: the k-th always has slot k % slots, as large as the largest of its
    own."""
    return sum(max(layer.bytes for layer in layers[slot::slots]) for slot in range(min(slots, len(layers))))


def spread(many: int, of: int) -> list[int]:
    """So many places of a row, evenly spaced."""
    return [(2 * k + 1) * of // (2 * many) for k in range(min(many, of))]


# ---- what fits -------------------------------------------------------------------------------------------------------

def arrangements(shape: Shape, needs: Needs, site: Site, slots: int | None = None,
                 kv: str | None = None) -> Iterator[Arrangement]:
    """What can be, each filling its budgets; `slots` and `kv` as asked for, None: whatever is best."""
    room = site.device - needs.fixed
    places = (kv,) if kv else ("device", "ram") if needs.cache and not site.shared else ("device",)
    for place in places:
        device, ram = room - needs.on_device(place), site.ram - needs.aside - needs.cache * (place == "ram")
        if device < 0 or ram < 0:
            continue
        if shape.bytes <= device:
            yield Arrangement(("device",) * len(shape.layers), 1, place, 0, 0, True, 0, 0)
            return
        for count in (slots,) if slots else SLOTS:
            yield from _filled(shape, site, device, ram, count, place)


def _filled(shape: Shape, site: Site, device: int, ram: int, slots: int, kv: str) -> Iterator[Arrangement]:
    experts, largest = shape.experts, shape.largest_expert
    seen = set()
    for head in (True, False):                                   # the head resident, and not
        room = device - least_expert_slots(shape) * largest
        many = _most(lambda n, head=head: sum(_split(shape, head, n, slots)[1:]), len(shape.layers) - 1, room)
        if many is None:
            continue
        streamed, resident, turns = _split(shape, head, many, slots)
        count = min((device - resident - turns) // largest, experts) if largest else 0
        whole = bool(experts) and count >= experts
        ring = 0 if site.shared else RING * shape.largest         # what comes from the drive passes through it
        kept = _most(lambda n, head=head, many=many: _beside(shape, head, many, n)[1], len(streamed), ram - ring)
        if kept is None:
            continue
        in_ram, held = _beside(shape, head, many, kept)
        beside = min((ram - ring - held) // largest, experts) if experts and not whole else 0
        if (in_ram, many, head, count, beside) not in seen:
            seen.add((in_ram, many, head, count, beside))
            tiers = tuple("ram" if i in in_ram else "ssd" if i in streamed else "device" for i in range(len(shape.layers)))
            yield Arrangement(tiers, slots, kv, 0 if whole else count, beside, whole, turns, ring)


def _most(needed: Callable[[int], int], most: int, room: int) -> int | None:
    """The largest number up to `most` for which what is needed has room; None where there is none."""
    if needed(0) > room:
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= room else (low, middle - 1)
    return low


@lru_cache(maxsize=8192)
def _split(shape: Shape, head: bool, many: int, slots: int) -> tuple[frozenset[int], int, int]:
    """So many blocks resident, evenly spread, and the head or not: which layers take turns, bytes of those that do not, and of
    the slots."""
    last = len(shape.layers) - 1
    stay = set(spread(many, last)) | ({last} if head else set())
    turns = [i for i, layer in enumerate(shape.layers) if i not in stay and layer.bytes]
    return (frozenset(turns), sum(shape.layers[i].bytes for i in stay), slot_bytes([shape.layers[i] for i in turns], slots))


@lru_cache(maxsize=8192)
def _beside(shape: Shape, head: bool, many: int, kept: int) -> tuple[frozenset[int], int]:
    """So many of those that take turns in RAM, evenly spread: which, and their bytes."""
    turns = sorted(_split(shape, head, many, 1)[0])
    ours = frozenset(turns[k] for k in spread(kept, len(turns)))
    return ours, sum(shape.layers[i].bytes for i in ours)


def least_expert_slots(shape: Shape) -> int:
    """Experts that must have room at once: those that one token uses in one layer."""
    return max((layer.used for layer in shape.layers), default=0)


def least(shape: Shape, needs: Needs, kv: str | None = None, slots: int = 1) -> int:
    """Bytes of the device that any arrangement takes at least."""
    streamed = [layer for layer in shape.layers if layer.bytes]
    experts = least_expert_slots(shape) * shape.largest_expert
    return needs.fixed + needs.on_device(kv) + slot_bytes(streamed, slots or 1) + experts


def too_little(shape: Shape, needs: Needs, site: Site, kv: str | None, slots: int | None) -> LabError:
    """What to say when nothing fits: how much is the least, and what would change it."""
    ring = 0 if site.shared else RING * shape.largest
    ram = ring + needs.aside + needs.cache * (kv == "ram")
    if site.ram < ram and site.device >= least(shape, needs, kv or "ram"):
        return LabError(f"{format_bytes(site.ram)} of RAM are too little for what reads pass through on their way to the card "
                        f"({RING} times the largest piece, {format_bytes(shape.largest)})" + (
                            f", the KV cache ({format_bytes(needs.cache)})" if kv == "ram" else "") + (
                            f", workspace ({format_bytes(needs.aside)})" if needs.aside else "") +
                        f": give at least {-(-ram // MIB)} MiB of RAM")
    kv = "ram" if kv is None and not site.shared and needs.turns < needs.cache <= site.ram else kv
    need = least(shape, needs, kv, slots or 1)
    largest = max(shape.layers, key=lambda layer: layer.bytes)
    parts = [f"a slot for the largest piece ({largest.name}, {format_bytes(largest.bytes)})"]
    if shape.experts:
        parts.append(f"{least_expert_slots(shape)} experts of {format_bytes(shape.largest_expert)}")
    if needs.cache and kv == "ram":
        parts.append(f"the rooms that the KV cache takes turns in ({format_bytes(needs.turns)})")
    elif needs.cache:
        parts.append(f"the KV cache ({format_bytes(needs.cache)})")
    parts.append(f"workspace ({format_bytes(needs.workspace[2])})")
    if needs.overhead[2]:
        parts.append(f"what {site.title} loses to its driver ({format_bytes(needs.overhead[2])})")
    return LabError(f"{format_bytes(site.device)} are too little for {', '.join(parts)}: give {site.title} at least "
                    f"{-(-need // MIB)} MiB, or shorten the context, take a smaller cache type or a harder quant")


# ---- how long a pass takes -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Times:
    """A pass three times: with slow, usual and fast rates; `hits` of experts the same way (1 where there are none)."""

    slow: Pass
    usual: Pass
    fast: Pass
    hits: Band
    moved: dict[str, float]          # bytes of a usual pass: "ssd", "ram", "kv"

    @property
    def seconds(self) -> Band:
        return within_two(self.slow.seconds, self.usual.seconds, self.fast.seconds)


def hit_rates(shape: Shape, a: Arrangement, measured: float | None = None) -> Band:
    """Shares of the experts that a token wants which are on the device: few, usual, many."""
    if not shape.experts or a.resident_experts:
        return 1.0, 1.0, 1.0
    if measured is not None:
        return measured, measured, measured
    some = next(layer for layer in shape.layers if layer.experts)
    return expected(some.experts, some.used, a.expert_slots, sum(1 for layer in shape.layers if layer.experts))


def missing(shape: Shape, layer: Layer, a: Arrangement, hit: float, tokens: float) -> float:
    """Bytes of the experts of a layer that so many tokens want and the cache lacks. A few tokens want popular ones, many want
    nearly all, of which no more than the slots can be there."""
    if tokens <= 1:
        return layer.used * (1 - hit) * layer.payload
    want = touched(layer.experts, layer.used, tokens)
    share = want / layer.experts
    return want * (1 - hit * (1 - share) - a.expert_slots / shape.experts * share) * layer.payload


def taking_turns(shape: Shape, a: Arrangement, fast: bool = False) -> frozenset[int]:
    """Which layers are brought anew for each pass: those that share a slot. One that has a slot to itself stays in it."""
    away = [i for i, tier in enumerate(a.tiers) if tier != "device" and shape.layers[i].bytes and not (fast and tier == "ram")]
    return frozenset(i for k, i in enumerate(away) if len(away) > k % a.slots + a.slots)


def stages_of(shape: Shape, a: Arrangement, site: Site, work: Sequence[Work], end: int, hit: float, tokens: int = 1,
              fast: bool = False, passes: float = 1.0) -> list[Stage]:
    """The stages of a pass with rates of one end (0 slow, 1 usual, 2 fast). tokens: of a prompt, read at once, which `work` is
    of already. passes: tokens that go through each layer one after another while it is there (speculation)."""
    drive, apart, link = site.drive.rate[end], site.drive.scattered[end], site.link[end]
    in_ram = a.ram_experts / shape.experts if shape.experts else 0.0
    found = []
    turns = taking_turns(shape, a, fast)
    for place, (layer, tier, mine) in enumerate(zip(shape.layers, a.tiers, work, strict=True)):
        streams, here = place in turns, fast and tier == "ram"    # computed where it is, by the processor
        read = layer.bytes / drive if streams and tier == "ssd" else 0.0
        copy = layer.bytes / link if streams and (tier == "ram" or not site.shared) else 0.0
        before = (mine.dense[end] + mine.attention[end]) * passes
        done = before + mine.experts[end] * passes
        if here:
            done = before = mine.host[end] * passes
        missed = fetched = 0.0
        if layer.experts and not a.resident_experts:
            size = missing(shape, layer, a, hit, tokens * passes)
            missed = size * (1 - in_ram) / apart
            fetched = size * (1 - in_ram * fast if not site.shared else in_ram * (not fast)) / link
            if fast:                                              # those in RAM stay there
                done += size * in_ram / site.rates.ram[end]
        if a.kv == "ram" and not site.shared:
            fetched += mine.cache / link
        found.append(Stage(read, copy, done, streams, before, missed, fetched))
    return found


def timed(shape: Shape, a: Arrangement, site: Site, work: Sequence[Work], hits: float | None = None, tokens: int = 1,
          fast: bool = False, passes: float = 1.0, hidden: float = 1.0) -> Times:
    """All three ends of a pass. `hidden`: share of what the drive and the device do at once that costs neither anything."""
    rates = hit_rates(shape, a, hits)
    runs = [costing(schedule(stages_of(shape, a, site, work, end, rates[end], tokens, fast, passes), a.slots), hidden)
            for end in range(3)]
    return Times(*runs, rates, moved(shape, a, work, rates[1], site, tokens, fast, passes))


def moved(shape: Shape, a: Arrangement, work: Sequence[Work], hit: float, site: Site, tokens: int = 1, fast: bool = False,
          passes: float = 1.0) -> dict[str, float]:
    """Bytes of one pass: read from the drive, taken from RAM, and of the cache in RAM."""
    found = {"ssd": 0.0, "ram": 0.0, "kv": 0.0}
    in_ram = a.ram_experts / shape.experts if shape.experts else 0.0
    turns = taking_turns(shape, a, fast)
    for place, (layer, tier, mine) in enumerate(zip(shape.layers, a.tiers, work, strict=True)):
        if place in turns:
            found[tier] += layer.bytes
        if layer.experts and not a.resident_experts:
            size = missing(shape, layer, a, hit, tokens * passes)
            found["ssd"] += size * (1 - in_ram)
            found["ram"] += size * in_ram * (not fast)
        if a.kv == "ram" and not site.shared:
            found["kv"] += mine.cache
    return found


def best(candidates: Iterable[Arrangement], shape: Shape, site: Site, work: Sequence[Work], hits: float | None = None,
         fast: bool = False, tokens: int = 1) -> Arrangement | None:
    """The arrangement whose pass, of so many tokens, takes the fewest usual seconds; one that comes later must be faster by
    `GAIN`."""
    found, fewest = None, float("inf")
    for one in candidates:
        stages = stages_of(shape, one, site, work, 1, hit_rates(shape, one, hits)[1], tokens, fast)
        if bounds(stages)[0] >= fewest * (1 - GAIN):
            continue
        took = schedule(stages, one.slots).seconds
        if took < fewest * (1 - GAIN):
            found, fewest = one, took
    return found


__all__ = ["Arrangement", "Needs", "Times", "arrangements", "best", "least", "seconds", "timed", "too_little"]
