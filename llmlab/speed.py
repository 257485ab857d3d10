"""What each thing takes in seconds: what one token reads and multiplies, over what each device delivers. All modelled.

A token goes through the blocks one after another, so the devices' seconds add up. On a card: bytes over its memory's
bandwidth or the unpacking of weights, whichever is longer; and a few microseconds a kernel. On the host: bytes over what
RAM gives the processor, or unpacking by its cores. Where work passes between card and host: a hand-over. Each of these
is known within a factor of two (`rates`), so their sum is too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from .architectures import Layer
from .catalog import Gpu
from .memory import CacheBytes, Weights, weights
from .rates import (
    ATTEND,
    ATTEND_PLAIN,
    CACHE,
    CACHE_PLAIN,
    CORE_BAND,
    CORE_WEIGHTS,
    CROSS,
    LINK,
    MAPPED,
    MAPPED_EXPERTS,
    PLAIN,
    SINGLE,
    SLOW_WEIGHTS,
    SPILL,
    UNPACK,
    USUAL,
    USUAL_LINK,
    USUAL_UNPACK,
    Band,
    Rates,
    arithmetic,
    banded,
    beside,
    half_attention,
    halves,
    kind_of,
)
from .settings import Settings
from .shapes import ModelSpec, remembered
from .units import GB, format_bytes, format_seconds

HOST_KERNEL = (8e-6, 5.7e-6, 4e-6)        # seconds an operation of the graph on the processor: threads wait for each other
EXPERT_PREFILL = 0.45                     # of a dense matrix's rate: a prompt's tokens spread over the experts
PYTHON = (0.80e-3, 0.58e-3, 0.42e-3)      # seconds a block of transformers' modules: 10 to 15 ms for 30 of them, measured
PYTHON_TIMES = {"NF4": 2.2, "NF4_DQ": 2.4, "FP4": 2.2, "INT8": 4.0}     # more and smaller kernels a matrix (bitsandbytes)
WHOLE = (0.70, 0.86, 0.98)                # share of bandwidth at which vLLM's and torch's kernels read weights
CAPTURED = (2.4e-6, 1.8e-6, 1.2e-6)       # seconds a kernel in vLLM's CUDA graphs


# ---- what one token reads -------------------------------------------------------------------------------------------

class Work(NamedTuple):
    """What one token asks of a device: `bytes` of weights; `unpack`: single-precision operations to unpack them on a
    card; `units`: weights, those of slow formats counted more, on a processor; `weights` multiplied, and of these `single`:
    those that a processor unpacks anew for every token of a prompt; `kernels`."""

    bytes: float = 0
    unpack: float = 0
    units: float = 0
    weights: float = 0
    single: float = 0
    kernels: float = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """Work by block, as running sums: entry i is that of the blocks before i. Experts by the share a token uses."""

    dense: tuple[tuple[float, ...], ...]      # a row a field of Work
    experts: tuple[tuple[float, ...], ...]
    held: tuple[float, ...]                   # bytes of all experts
    output: Work
    attention: tuple[float, ...]              # operations of one token with one cell, in layers that see everything
    windowed: tuple[float, ...]               # and in those with a window
    window: int


def _between(sums: tuple[tuple[float, ...], ...], first: int, last: int) -> Work:
    a, b, c, d, e, f = sums
    return Work(a[last] - a[first], b[last] - b[first], c[last] - c[first], d[last] - d[first], e[last] - e[first],
                f[last] - f[first])


@remembered
def reading(spec: ModelSpec, quant: str, importance: bool = False) -> Reading:
    """What one token reads of each block."""
    w, shape = weights(spec, quant, importance), _shape(spec)
    count = len(spec.layers)
    slots = 2 * count + 1                     # of each block what is always read, then its experts; last the output
    bytes, unpack, units, single, held = ([0.0] * slots for _ in range(5))
    for (slot, share, elements, matrix), type, size in zip(shape.tensors, w.types, w.bytes, strict=True):
        if slot < 0:
            continue
        bytes[slot] += size * share
        held[slot] += size
        unpack[slot] += elements * UNPACK.get(type, USUAL_UNPACK)
        units[slot] += elements / SLOW_WEIGHTS.get(type, 1.0)
        if type in SINGLE and matrix:
            single[slot] += elements
    rows = (bytes, unpack, units, shape.weights, single, shape.kernels)
    return Reading(tuple(_running(row[:count]) for row in rows), tuple(_running(row[count:-1]) for row in rows),
                   _running(held[count:-1]), Work(*(row[-1] for row in rows)), shape.attention, shape.windowed, shape.window)


class _Shape(NamedTuple):
    """What follows from the shapes alone. tensors: (slot of `reading` or -1, share used, elements used, matrix)."""

    tensors: tuple[tuple[int, float, float, bool], ...]
    weights: list[float]
    kernels: list[float]
    attention: tuple[float, ...]
    windowed: tuple[float, ...]
    window: int


@remembered
def _shape(spec: ModelSpec) -> _Shape:
    count = len(spec.layers)
    counted, kernels, tensors = [0.0] * (2 * count + 1), [0.0] * (2 * count + 1), []
    head = "token_embd.weight" if spec.tied else "output.weight"
    for tensor in spec.tensors:
        slot, share = -1, 1.0
        if tensor.layer >= 0 and not spec.layers[tensor.layer].mtp:
            slot = tensor.layer
            if "_exps." in tensor.name:
                block = spec.layers[slot]
                slot, share = count + slot, block.experts_used / block.experts
        elif tensor.name == head:
            slot = 2 * count
        matrix = len(tensor.shape) > 1 and tensor.name.endswith(".weight")
        elements = tensor.elements * share
        if slot >= 0:
            counted[slot] += elements * matrix
            kernels[slot] += 2 if matrix else 1       # an input is quantized, then multiplied; a bias or norm is one
        tensors.append((slot, share, elements, matrix))
    for i, block in enumerate(spec.layers):
        if not block.mtp:
            kernels[i] += _kernels(block)
    full = [_per_cell(b) if b.attends and not b.window and not b.mtp else 0.0 for b in spec.layers]
    windowed = [_per_cell(b) if b.attends and b.window and not b.mtp else 0.0 for b in spec.layers]
    return _Shape(tuple(tensors), counted, kernels, _running(full), _running(windowed),
                  max((b.window for b in spec.layers), default=0))


def _kernels(block: Layer) -> int:
    """Kernels of a block that multiply no matrix: rotation, cache, attention and its merge, activation, two sums; the
    choice of experts; a recurrence; what a latent cache is projected, copied and joined by."""
    return 3 + 6 * block.attends + 6 * bool(block.experts) + 8 * (block.mixer == "recurrent") + 24 * (block.mixer == "mla")


def _per_cell(block: Layer) -> int:
    return 2 * block.heads * (block.key_dim + block.value_dim)


def _running(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(accumulate(values, initial=0.0))


# ---- seconds --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Part:
    """One thing that one token waits for, in seconds: slow, usual, fast. `amount`: bytes, or how many."""

    device: str
    what: str          # "weights", "unpacking", "cache", "kernels", "python", "hand-over", "shared memory", "disk", "network",
                       # "exchange"
    amount: float
    seconds: Band


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second: (low, best, high), modelled. None where the catalogue lacks a card's rates.

    `decode_tps`: low and best with the context full, high while it is still empty (at most twice the low); `prefill_tps` the
    mean over a prompt as long as the context. `parts`: what one generated token waits for, by device; `prefill_parts`: what
    one token of the prompt does.
    """

    decode_tps: Band | None
    prefill_tps: Band | None
    parts: tuple[Part, ...] = ()
    prefill_parts: tuple[Part, ...] = ()
    context: int = 0
    rates: Rates = USUAL

    @property
    def seconds(self) -> dict[str, float]:
        """Usual seconds of one generated token on each device."""
        return _by_device(self.parts)

    @property
    def start_tps(self) -> Band | None:
        """Tokens per second (low, best, high) while the context is still empty: nothing cached to read."""
        return _per_second([p for p in self.parts if p.what != "cache"]) if self.decode_tps else None

    @property
    def first_token(self) -> Band | None:
        """Seconds until the first token after a prompt as long as the context: fast, usual, slow."""
        if not self.decode_tps or not self.prefill_tps:
            return None
        return tuple(self.context / p + 1 / d for p, d in zip(self.prefill_tps[::-1], self.decode_tps[::-1], strict=True))

    def joined(self, parts: Sequence[Part], prompt_parts: Sequence[Part]) -> "Speed":
        """The same with more to wait for; `prompt_parts` for one token of a prompt. Unknown stays unknown."""
        if not self.decode_tps:
            return self
        parts, prompt = (*self.parts, *parts), (*self.prefill_parts, *prompt_parts)
        return replace(self, decode_tps=_decode(parts), parts=parts, prefill_parts=prompt,
                       prefill_tps=_per_second(prompt) if self.prefill_tps else None)

    @property
    def mostly(self) -> str:
        """What a generated token waits for longest, and what the band rests on: one sentence."""
        if not self.parts:
            return ""
        total, longest = sum(self.seconds.values()), max(self.parts, key=lambda p: p.seconds[1])
        text = f"A token mostly {_said(longest).rpartition(' (')[0]}: {longest.seconds[1] / total:.0%} of its time"
        if longest.device == "host" and longest.what in ("weights", "unpacking"):
            return f"{text}; {self._ram()}"
        return f"{text}; rates measured here on {self.rates.day}." if self.rates.day and any(self.rates.stream) else f"{text}."

    @property
    def why(self) -> str:
        """What bounds the decode speed, and what the band rests on."""
        if not self.parts:
            return ""
        total = sum(self.seconds.values())
        several = len(self.seconds) > 1
        shares = ", ".join(f"{seconds / total:.0%} of the time on {_place(device)}" for device, seconds in sorted(
            self.seconds.items(), key=lambda item: -item[1]) if seconds > 0.005 * total)
        longest = sorted((p for p in self.parts if p.seconds[1] > 0.04 * total), key=lambda p: -p.seconds[1])
        text = f"One token {'; '.join(map(_said, longest[:4]))}."
        if several and shares:
            text += f" {shares[0].upper()}{shares[1:]}."
        if any(p.device == "host" and p.what in ("weights", "unpacking") for p in longest):
            text += f" {self._ram()}"
        elif self.rates.day and any(self.rates.stream):
            text += f" Rates measured here on {self.rates.day}."
        return text

    @property
    def prefill_why(self) -> str:
        """What bounds the prefill speed."""
        merged: dict[tuple[str, str], Part] = {}
        for p in self.prefill_parts:          # a card multiplies its own blocks and those of the host
            q = merged.get((p.device, p.what))
            merged[p.device, p.what] = p if q is None else Part(
                p.device, p.what, p.amount + q.amount, tuple(map(sum, zip(p.seconds, q.seconds, strict=True))))
        total = sum(p.seconds[1] for p in merged.values())
        longest = sorted((p for p in merged.values() if p.seconds[1] > 0.08 * total), key=lambda p: -p.seconds[1])
        return f"One token of a prompt {'; '.join(map(_said, longest[:3]))}." if longest else ""

    def _ram(self) -> str:
        r = self.rates
        text = f"{r.words}: {r.ram[0] / GB:.0f} to {r.ram[2] / GB:.0f} GB/s as weights are read"
        return f"{text}, measured on {r.day}." if r.day else f"{text}."


def _by_device(parts: tuple[Part, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in parts:
        found[part.device] = found.get(part.device, 0.0) + part.seconds[1]
    return found


def _place(device: str) -> str:
    return "the processor" if device == "host" else device


def _said(p: Part) -> str:
    usual = p.seconds[1]
    took = f"{usual * 1e3:.3g} ms" if usual < 1 else format_seconds(usual)
    return {
        "weights": f"reads {format_bytes(p.amount)} of weights on {_place(p.device)} ({took})",
        "unpacking": f"unpacks {p.amount / 1e9:.2g} billion weights on {_place(p.device)} ({took})",
        "cache": f"reads {format_bytes(p.amount)} of cache on {_place(p.device)} ({took})",
        "kernels": f"starts {p.amount:.0f} kernels on {_place(p.device)} ({took})",
        "python": f"runs {p.amount:.0f} blocks of Python modules ({took})",
        "hand-over": f"passes between card and processor {p.amount:.0f} times ({took})",
        "shared memory": f"reads {format_bytes(p.amount)} that does not fit {p.device} over the link, as Windows allows "
                         f"and other systems do not ({took})",
        "disk": f"reads {format_bytes(p.amount)} again from disk, for RAM cannot hold it ({took})",
        "multiplying": f"takes {p.amount / 1e9:.3g} GFLOP on {_place(p.device)} ({took})",
        "attention": f"takes {p.amount / 1e9:.2g} GFLOP of attention on {_place(p.device)} ({took})",
        "network": f"waits for {format_bytes(p.amount)} over {p.device} ({took})",
        "exchange": f"waits for sums of {format_bytes(p.amount)} between the cards of {p.device} ({took})",
        "sending": f"waits for its share of {format_bytes(p.amount)} sent to the card for every batch ({took})",
    }[p.what]


def speed(spec: ModelSpec, s: Settings, w: Weights, c: CacheBytes, cards: tuple[Gpu, ...], where: Sequence[int],
          rates: Rates = USUAL, over: Sequence[int] = (), short: int = 0, teams: tuple[tuple[Gpu, ...], ...] = ()) -> Speed:
    """How fast one sequence goes, alone, where block i lies on card `where[i]` (-1: the host), the output last.

    over: bytes by which each card is overfull; short: bytes of the host's share that its RAM cannot hold. teams: for vLLM,
    the cards that work on every block of a stage together; `where` then counts stages, and the parts' devices do.
    """
    if any(not card.bandwidth or math.isnan(card.bandwidth) for card in cards):
        return Speed(None, None, context=s.context, rates=rates)
    rates = beside(cards, rates) if cards else rates
    r = reading(spec, s.quant, s.importance)
    each = max(s.context // s.sequences, 1)
    if s.engine != "llama.cpp":
        where, over, short = where if teams else [0 if cards else -1] * (len(spec.layers) + 1), (), 0
    if s.engine == "vllm" and cards:
        teams = teams or (cards,)
        cards = tuple(min(team, key=lambda card: card.bandwidth) for team in teams)
    places = _placed(r, s, c, where, len(cards))
    for i, team in enumerate(teams):
        places[i] = _shared(places[i], len(team))
    parts, prompt, known = [], [], True
    for i, place in enumerate(places[:-1]):
        if place.kernels:
            parts += _card_parts(cards[i], i, place, s, rates, over[i] if i < len(over) and not cards[i].unified else 0)
            mine = _card_prompt(cards[i], i, place, s, rates, each)
            prompt += mine or ()
            known = known and mine is not None
    host = places[-1]
    parts += _host_parts(host, s, rates, short)
    if host.crossings:
        parts.append(Part("host", "hand-over", host.crossings, _times(host.crossings, CROSS)))
    mine = _host_prompt(host, cards, s, rates, each, short)
    prompt += mine or ()
    if s.engine == "transformers":
        parts = _eager(parts, len(spec.blocks), s.quant, bool(cards))
    return Speed(_decode(parts), _per_second(prompt) if known and mine is not None else None, tuple(parts), tuple(prompt),
                 each, rates)


class _Place(NamedTuple):
    """What one token asks of one device. `cache` in bytes; `attention` in operations at the middle of a prompt."""

    dense: Work
    experts: Work
    output: Work       # its matrix: read for every token generated, of a prompt only for the last
    held: float
    cache: float
    attention: float
    crossings: int

    @property
    def kernels(self) -> float:
        return self.dense.kernels + self.experts.kernels + self.output.kernels


def _placed(r: Reading, s: Settings, c: CacheBytes, where: Sequence[int], cards: int) -> list[_Place]:
    """By card, and last the host. The blocks of a device lie together, the host's first."""
    count = len(where) - 1
    each = max(s.context // s.sequences, 1)
    seen = min(r.window, each) * s.sequences / c.cells_sliding if c.cells_sliding else 1.0
    found, moe = [], min(s.n_cpu_moe, count)
    for device in (*range(cards), -1):
        try:
            first = where.index(device, 0, count)
            last = first + where.count(device) - (where[count] == device)
        except ValueError:
            first = last = 0
        dense, experts = _between(r.dense, first, last), _between(r.experts, first, last)
        held = r.held[last] - r.held[first]
        crossings = 0
        if device >= 0:                     # experts of the first blocks stay with the host
            away = min(max(moe, first), last)
            experts, held = _between(r.experts, away, last), r.held[last] - r.held[away]
        elif cards:
            from_card = [i for i in range(last, moe) if r.held[i + 1] > r.held[i]]
            if from_card:
                more = _between(r.experts, last, moe)
                experts, held = _added(experts, more), held + r.held[moe] - r.held[last]
            crossings = 2 * len(from_card) + (0 < last < count) + (last == count and where[count] >= 0) + (
                last < count and where[count] < 0)
        full = windowed = 0
        if last > first:
            cached = c.by_layer[first:last]
            if r.windowed[last] > r.windowed[first]:
                windowed = sum(b for i, b in enumerate(cached, first) if r.windowed[i + 1] > r.windowed[i])
            full = sum(cached) - windowed
        read = (full + windowed * seen) / s.sequences + 2 * sum(c.recurrent_by_layer[first:last]) / s.sequences
        half = each / 2
        attention = (r.attention[last] - r.attention[first]) * half + (
            r.windowed[last] - r.windowed[first]) * min(half, r.window)
        found.append(_Place(dense, experts, r.output if where[count] == device else Work(), held, read, attention, crossings))
    return found


def _added(*works: Work) -> Work:
    return Work(*map(sum, zip(*works, strict=True)))


def _shared(place: _Place, n: int) -> _Place:
    """One card's share where all cards work on every block (tensor parallel): an n-th of the work, as many kernels, and
    two exchanges a block."""
    def part(work: Work) -> Work:
        return Work(*(value / n for value in work[:-1]), work.kernels)
    return place._replace(dense=part(place.dense), experts=part(place.experts), output=part(place.output),
                          held=place.held / n, cache=place.cache / n, attention=place.attention / n)


def _times(amount: float, each: Band) -> Band:
    return amount * each[0], amount * each[1], amount * each[2]


def _over(amount: float, rate: Band) -> Band:
    return amount / rate[0], amount / rate[1], amount / rate[2]


def _per_second(parts: Sequence[Part]) -> Band | None:
    slow = usual = fast = 0.0
    for part in parts:
        a, b, c = part.seconds
        slow, usual, fast = slow + a, usual + b, fast + c
    return (1 / slow, 1 / usual, 1 / fast) if fast else None


def _decode(parts: Sequence[Part]) -> Band | None:
    """From the slow end with the cache full to the fast end before anything is cached: an answer is written in between."""
    full, empty = _per_second(parts), _per_second([p for p in parts if p.what != "cache"])
    return full and empty and (full[0], full[1], min(empty[2], 2 * full[0]))


def _stream(card: Gpu, i: int, s: Settings, rates: Rates) -> Band:
    kind = kind_of(card)
    return rates.card("stream", i) or banded(card.bandwidth, kind.stream if s.engine == "llama.cpp" else WHOLE)


def _card_parts(card: Gpu, i: int, place: _Place, s: Settings, rates: Rates, over: int) -> list[Part]:
    device, kind = f"gpu{i}", kind_of(card)
    work = _added(place.dense, place.experts, place.output)
    stream = _stream(card, i, s, rates)
    read = work.bytes
    parts = []
    if over > 0:
        held = place.dense.bytes + place.output.bytes + place.held + place.cache
        away = min(over / held, 1.0) * read if held else 0.0
        read -= away
        parts.append(Part(device, "shared memory", away, _over(away, SPILL)))
    seconds, what, amount = _over(read, stream), "weights", read
    rate = arithmetic(card)
    if rate and s.engine == "llama.cpp":
        unpack = _over(work.unpack, banded(rate, kind.unpack))
        if unpack[1] > seconds[1]:
            what, amount = "unpacking", work.weights
        seconds = tuple(map(max, seconds, unpack))
    parts.append(Part(device, what, amount, seconds))
    if place.cache:
        share = CACHE if s.flash_attention else CACHE_PLAIN
        parts.append(Part(device, "cache", place.cache, _over(place.cache, banded(card.bandwidth, share))))
    launch = kind.launch if s.engine == "llama.cpp" else CAPTURED
    parts.append(Part(device, "kernels", work.kernels, _times(work.kernels, launch)))
    return parts


def _host_parts(place: _Place, s: Settings, rates: Rates, short: int) -> list[Part]:
    work = _added(place.dense, place.experts, place.output)
    if not work.bytes and not place.cache:
        return []
    read, parts = work.bytes, []
    if short > 0:                          # what every token reads stays in RAM as long as there are experts to drop
        always = place.dense.bytes + place.output.bytes
        away = place.experts.bytes * min(short / place.held, 1.0) if place.held else 0.0
        if short > place.held:             # read in order over and over: what is kept is never what comes next
            away += always
        rate = rates.mapped or (MAPPED_EXPERTS if place.held else MAPPED)
        read -= away
        parts.append(Part("host", "disk", away, _over(away, rate)))
    seconds, what, amount = _over(read, rates.ram), "weights", read
    unpack = _over(work.units, banded(rates.cores * CORE_WEIGHTS, CORE_BAND))
    if unpack[1] > seconds[1]:
        what, amount = "unpacking", work.weights
    parts.append(Part("host", what, amount, tuple(map(max, seconds, unpack))))
    if place.cache:
        parts.append(Part("host", "cache", place.cache, _over(place.cache, rates.ram)))
    parts.append(Part("host", "kernels", work.kernels, _times(work.kernels, HOST_KERNEL)))
    return parts


def _eager(parts: list[Part], blocks: int, quant: str, cards: bool) -> list[Part]:
    """transformers starts every kernel from Python: while a card works it is not waited for, a processor does both."""
    python = _times(blocks * PYTHON_TIMES.get(quant, 1.0), PYTHON)
    if not cards:
        return [p for p in parts if p.what != "kernels"] + [Part("host", "python", blocks, python)]
    working = [p for p in parts if p.what != "kernels"]
    gpu = [sum(p.seconds[k] for p in working) for k in range(3)]
    wait = tuple(max(0.0, p - g) for p, g in zip(python, gpu, strict=True))
    return working + [Part("host", "python", blocks, wait)] if any(wait) else working


def _card_prompt(card: Gpu, i: int, place: _Place, s: Settings, rates: Rates, context: int) -> list[Part] | None:
    """Seconds of a card for one token of a prompt; None where its arithmetic is not known."""
    if not (plain := card.fp32_flops or card.fp16_flops):
        return None
    device, kind, tokens = f"gpu{i}", kind_of(card), min(s.micro, context)
    faster = PLAIN if s.quant in ("F16", "BF16", "F32") else 1.0
    whole = s.engine != "llama.cpp"            # plain half matrices, on tensor cores where there are any
    multiply = halves(card, s.quant) if whole else banded(plain * faster, kind.prefill)
    work = 2 * (place.dense.weights + place.experts.weights / EXPERT_PREFILL)
    parts = [Part(device, "multiplying", 2 * (place.dense.weights + place.experts.weights), _over(work, multiply))]
    if place.attention:
        attend = (half_attention(card) if whole and s.flash_attention
                  else banded(plain, ATTEND if s.flash_attention else ATTEND_PLAIN))
        parts.append(Part(device, "attention", place.attention, _over(place.attention, attend)))
    read = place.dense.bytes + place.held
    parts.append(Part(device, "weights", read / tokens, _over(read / tokens, _stream(card, i, s, rates))))
    launch = kind.launch if s.engine == "llama.cpp" else CAPTURED
    parts.append(Part(device, "kernels", place.kernels / tokens, _times(place.kernels / tokens, launch)))
    return parts


def _host_prompt(place: _Place, cards: tuple[Gpu, ...], s: Settings, rates: Rates, context: int,
                 short: int) -> list[Part] | None:
    """Seconds of the host for one token of a prompt: worked on there, or sent to a card for every batch where that is
    faster. That is llama.cpp's op offload, from 32 tokens on; attention goes along, for the scheduler hands what lies
    between a card's matrices to the card too (ggml-backend.cpp, "expand gpu")."""
    count = place.dense.weights + place.experts.weights
    if not count:
        return []
    tokens = min(s.micro, context)
    parts = []
    if short > 0:                          # a batch reads all of them, and from the disk those that RAM cannot hold
        away = (min(short, place.held) if place.held else place.dense.bytes) / tokens
        parts.append(Part("host", "disk", away, _over(away, rates.mapped or MAPPED)))
    single = place.dense.single + place.experts.single
    multiplied = tuple(map(sum, zip(_over(2 * (count - single), rates.matmul),
                                    _over(single, banded(rates.cores * CORE_WEIGHTS, CORE_BAND)), strict=True)))
    here = [Part("host", "multiplying", 2 * count, multiplied)]
    if place.attention:
        here.append(Part("host", "attention", place.attention, _over(place.attention, rates.matmul)))
    if not cards or tokens < 32 or s.engine != "llama.cpp":
        return parts + here
    card = cards[0]
    if not (plain := card.fp32_flops or card.fp16_flops):
        return None
    link = rates.card("link", 0) or banded(card.link.rate if card.link and card.link.rate else USUAL_LINK, LINK)
    moved = place.dense.bytes + place.held + place.cache / 2          # half the cache: that of the middle of the prompt
    work = 2 * (place.dense.weights + place.experts.weights / EXPERT_PREFILL)
    attend = banded(plain, ATTEND if s.flash_attention else ATTEND_PLAIN)
    there = [Part("host", "sending", moved, _over(moved / tokens, link)),
             Part("gpu0", "multiplying", 2 * count, _over(work, banded(plain, kind_of(card).prefill))),
             Part("gpu0", "attention", place.attention, _over(place.attention, attend))]
    return parts + min(here, there, key=lambda way: sum(p.seconds[1] for p in way))
