"""A report in words: the answer, how far to trust it, what would fit instead, how fast."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .errors import LabError
from .overhead import desktop
from .settings import LADDERS
from .units import MIB, format_bytes, format_seconds

if TYPE_CHECKING:
    from .fitting import Device, Report

_SAYS = {"fits": "fits", "may spill": "may or may not fit", "does not fit": "does not fit"}


def answer(r: "Report") -> str:
    """The verdict, the bytes it rests on, and what becomes of what does not fit."""
    s = r.settings
    what = f"{r.spec.title} in {s.quant} with {s.context:,} token{'s' if s.context > 1 else ''} of context"
    if not r.cards:
        host = r.devices["host"]
        where = f"{format_bytes(host.capacity, 1)} of RAM" if host.capacity else "RAM"
        if not r.fits:
            where += f", of which the system keeps {format_bytes(host.capacity - host.free)}"
        more = f", and takes {format_bytes(host.returned)} more where there is room" if host.returned else ""
        return (f"{what} {_SAYS[r.verdict]} {'' if r.fits else 'in '}{where}: it needs {format_bytes(host.needed)}{more}."
                f"{_beyond(r)}")
    names = _listed([card.name for card in r.cards])
    host, cards = r.devices["host"], r.lent
    if not r.partial and host.verdict == "does not fit" and all(d.verdict != "does not fit" for d in cards):
        return (f"{what} does not fit the RAM beside {names}: {format_bytes(host.needed)} of {format_bytes(host.free)} there, "
                f"{r.gpu_layers} of {r.layers} layers on the card{_s(r)}.{_beyond(r)}")
    if r.partial:
        whole = r.whole
        need = whole.lent
        text = (f"{what} does not fit {names}: it needs {format_bytes(sum(d.used for d in need))}, and there are "
                f"{format_bytes(sum(d.free for d in need))}.")
        if host.verdict == "does not fit":
            return (f"{text} With the rest in RAM it does not fit either: {format_bytes(host.needed)} of "
                    f"{format_bytes(host.free)} there.{_beyond(r)}")
        if not r.gpu_layers:
            return f"{text} Not one layer goes on the card{_s(r)}.{_held_by_others(whole)}{_beyond(r)}"
        goes = "layers goes" if r.gpu_layers == 1 else "layers go"
        return (f"{text} {r.gpu_layers} of {r.layers} {goes} on the card{_s(r)}, {format_bytes(r.total('weights', 'host'))} of "
                f"weights stay in RAM.{_held_by_others(whole)}{_beyond(r)}")
    text = f"{what} {_SAYS[r.verdict]} {names}: {_sum(cards)}"
    if r.verdict == "may spill":
        text += _where_it_is_lent(r, cards) or f"{_range(cards)}{_why_it_may_spill(r, cards)}"
    in_ram = r.total("weights", "host")
    if r.gpu_layers < r.layers:
        text += f", {r.gpu_layers} of {r.layers} layers on the card{_s(r)}, {format_bytes(in_ram)} of weights in RAM"
    elif r.n_cpu_moe and r.spec.experts:
        text += f", the experts of {_blocks(r.n_cpu_moe)} in RAM ({format_bytes(in_ram)} of weights)"
    return f"{text}.{_pool(r)}{_held_by_others(r)}{_beyond(r)}"


def _blocks(n: int) -> str:
    return f"{n} block{'s' if n != 1 else ''}"


def _range(cards: "Sequence[Device]") -> str:
    """The range of the card on which it is closest."""
    d = max((d for d in cards if d.verdict == "may spill"), key=lambda d: d.high - d.free, default=None)
    return f", between {format_bytes(d.low)} and {format_bytes(d.high)}" if d else ""


def _where_it_is_lent(r: "Report", cards: "Sequence[Device]") -> str:
    """What a chip must be lent of the RAM it shares, where that alone decides."""
    spills = [(card, d) for card, d in zip(r.cards, cards, strict=True) if d.verdict == "may spill"]
    kept = [(card.reserved, d) for card, d in spills if card.unified and card.free is None]
    if not kept or len(kept) < len(spills) or any(d.high - high + low > d.free for (low, _, high), d in kept):
        return ""
    most = max(d.high + best - high for (_, best, high), d in kept)
    return f"; it fits where the system lets the card have {format_bytes(most)}"


def _why_it_may_spill(r: "Report", cards: "Sequence[Device]") -> str:
    """What decides, where it can be named: a desktop on the card; other programs are named apart."""
    spills = [(card, d) for card, d in zip(r.cards, cards, strict=True) if d.verdict == "may spill"]
    shown = [desktop(card, r.settings.display) for card, _ in spills]
    if spills and all(part and d.high - part.high <= d.free for part, (_, d) in zip(shown, spills, strict=True)):
        return f"; it fits unless a desktop on the card takes up to {format_bytes(max(p.high for p in shown), 0)}"
    if any(reserved.starts != "fits" for reserved in r.reserved):
        most = max(r.reserved, key=lambda reserved: reserved.requested - reserved.free_at_start[0])
        return (f"; vLLM starts only where the {format_bytes(most.requested, 1)} it reserves are free, and there may be "
                f"{format_bytes(max(most.free_at_start[0], 0), 1)}")
    return ""


def _pool(r: "Report") -> str:
    """What vLLM's reservation leaves for pages."""
    if not r.reserved or r.verdict == "does not fit":
        return ""
    least = min(r.reserved, key=lambda reserved: reserved.concurrent)
    each = r.settings.context // r.settings.sequences
    return (f" vLLM reserves {r.settings.share:.0%} of the card{_s(r)}, which leaves {format_bytes(least.pool[1])} for KV "
            f"pages: {least.concurrent:.1f} requests of {each:,} tokens at once.")


def others(r: "Report") -> int:
    """Bytes of the live cards that other programs hold now, beyond what a driver keeps."""
    return sum(max(card.memory - card.free - card.reserved[2], 0) for card in r.cards if card.free is not None
               and not card.unified)


def _held_by_others(r: "Report") -> str:
    """Other programs, where without them the verdict would be another."""
    held = others(r)
    if r.fits or held < 100 * MIB:
        return ""
    more = all(d.high <= d.free + max(card.memory - card.free - card.reserved[2], 0)
               for card, d in zip(r.cards, r.devices.values(), strict=False) if card.free is not None)
    return f" Other programs hold {format_bytes(held)} of the card{_s(r)} now{'; without them it fits' if more else ''}."


def _sum(cards: "Sequence[Device]") -> str:
    """What the cards hold of what they have; of several also the fullest."""
    text = f"{format_bytes(sum(d.used for d in cards))} of {format_bytes(sum(d.free for d in cards))}"
    if len(cards) > 1:
        fullest = max(cards, key=lambda d: d.used / max(d.free, 1))
        text += f" (most on {fullest.name}: {format_bytes(fullest.used)} of {format_bytes(fullest.free)})"
    return text


def _s(r: "Report") -> str:
    return "s" if len(r.cards) > 1 else ""


def _listed(names: list[str]) -> str:
    grouped = [f"{names.count(n)} x {n}" if names.count(n) > 1 else n for n in dict.fromkeys(names)]
    return grouped[0] if len(grouped) == 1 else f"{', '.join(grouped[:-1])} and {grouped[-1]}"


def _beyond(r: "Report") -> str:
    if not r.beyond_training:
        return ""
    stretched = stretch(r.spec)
    return (f" The model was trained for {r.spec.context_train:,} tokens{f' ({stretched})' if stretched else ''}; beyond that "
            "its answers decay.")


def stretch(spec) -> str:
    """How a model's positions were stretched to reach its context: "rope scaled 8-fold, llama3"; "" where they were not."""
    kind, factor = spec.metadata.get("rope.scaling.type"), spec.metadata.get("rope.scaling.factor")
    if not kind and spec.config:
        given = spec.config.get("rope_scaling") or spec.config.get("rope_parameters") or {}
        kind = given.get("rope_type") or given.get("type") if hasattr(given, "get") else None
        factor = given.get("factor") if kind else None
    if kind in (None, "none", "default"):
        return ""
    return f"rope scaled {factor:g}-fold, {kind}" if isinstance(factor, (int, float)) else f"rope scaled, {kind}"


def trust(r: "Report") -> str:
    """How much of the memory is counted and how much is modelled, on the cards or, without any, in RAM."""
    where = [d for name, d in r.devices.items() if (name != "host") == bool(r.cards)]
    names = {d.name for d in where}
    counted = sum(t.bytes for t in r.terms if t.device in names and t.kind == "exact")
    low, high, used = (sum(getattr(d, what) for d in where) for what in ("low", "high", "used"))
    place = "in RAM" if not r.cards else "on the card" if len(where) == 1 else f"on {len(where)} cards"
    measured = sum(t.bytes for t in r.terms if t.device in names and t.kind == "measured")
    text = (f"Memory {place}: {format_bytes(counted)} exact, {format_bytes(used - counted - measured)} modelled"
            f"{f', {format_bytes(measured)} measured' if measured else ''}; "
            f"between {format_bytes(low)} and {format_bytes(high)} in all.")
    if r.cards and r.verdict != "fits" and _on_windows(r):
        text += (" Under Windows the driver moves what is too much to RAM it calls shared GPU memory: no error, but many times "
                 "slower.")
    return text


def _on_windows(r: "Report") -> bool:
    return r.settings.display == "windows" or bool(r.machine and (r.machine.wsl or r.machine.system.startswith("Windows")))


def speed(r: "Report") -> str:
    """Modelled speed with its band and what takes longest; "" where a card's rates are not known."""
    decode, prefill, start, first = r.speed.decode_tps, r.speed.prefill_tps, r.speed.start_tps, r.speed.first_token
    if not decode:
        return ""
    begins = f", {_plain(start[1])} at its start" if start[1] > 1.05 * decode[1] else ""
    low, best, high = map(_plain, decode)
    said = [f"decode about {best} tokens/s with the context full{begins} ({low} to {high})"]
    if prefill:
        said.append(f"prefill about {_rate(prefill)}")
    wait = f"; a prompt that fills the context takes {format_seconds(first[1])} to the first token" if first else ""
    return f"Speed, modelled: {', '.join(said)}{wait}. {r.speed.mostly}".strip()


def _rate(rates: tuple[float, float, float]) -> str:
    """`"52 tokens/s (39 to 63)"`: the best guess and its band."""
    low, best, high = map(_plain, rates)
    return f"{best} tokens/s ({low} to {high})"


def _plain(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def hint(r: "Report") -> str:
    """The nearest settings that would fit for certain, or what more there is room for."""
    now = r.settings
    whole = r.whole
    context, quant = whole.largest_context(), whole.best_quant()
    all_trained = context and context >= r.spec.context_train * now.sequences // 256 * 256
    if r.fits:
        if now.n_cpu_moe == "auto" and r.n_cpu_moe:
            return ""                    # there is room for more only by moving more experts to RAM
        more = [f"{context:,} tokens of context{_together(r)}{', all it was trained for' if all_trained else ''}"] if (
            context > now.context) else []
        more += [f"{quant} at this context"] if quant and _rank(r, quant) < _rank(r, now.quant) else []
        return f"There is room for {' or for '.join(more)}." if more else ""
    ways = []
    if share := _share_that_starts(r):
        reserving = f"reserving {share:.0%} of the card{_s(r)} (utilization={share:g})"
        if _fits(r, utilization=share):
            ways.append(reserving)
        elif not quant and (smaller := r.with_(utilization=share).best_quant()):
            ways.append(f"in {smaller}, {reserving}")
    if now.engine == "llama.cpp" and now.kv == ("f16", "f16") and _fits(whole, kv="q8_0"):
        ways.append("with the KV cache in q8_0")
    if blocks := _experts_in_ram(whole):
        ways.append(f"with the experts of {blocks} of {len(r.spec.blocks)} blocks in RAM")
    if context and context < now.context:
        ways.append(f"with the {context:,} tokens of context{_together(r)} it was trained for" if all_trained
                    else f"with at most {context:,} tokens of context{_together(r)}")
    if quant and quant != now.quant:
        ways.append(f"in {quant}{', which costs much quality' if quant.startswith(('IQ1', 'IQ2', 'Q2')) else ''}")
    if ways:
        return f"It would fit for certain {', '.join(ways[:-1])}{' or ' if len(ways) > 1 else ''}{ways[-1]}."
    return "No quant and no context is small enough for this to fit whole."


def _together(r: "Report") -> str:
    """Whose context it is, where several requests share one."""
    return f" for {r.settings.sequences} requests together" if r.settings.sequences > 1 else ""


def _fits(r: "Report", **changes) -> bool:
    try:
        return r.with_(**changes).fits
    except LabError:
        return False


def _share_that_starts(r: "Report") -> float:
    """The largest share, in whole percent, with which vLLM starts for certain; 0 where it does so now, or with none."""
    if all(reserved.starts == "fits" for reserved in r.reserved):
        return 0
    least = min(reserved.free_at_start[0] / reserved.requested for reserved in r.reserved)
    share = int(r.settings.share * least * 100) / 100
    return max(share, 0)


def _experts_in_ram(r: "Report") -> int:
    """The fewest blocks whose experts must stay in RAM for the rest to fit the cards; 0 where that is no way."""
    if not (r.cards and r.spec.experts and r.settings.engine == "llama.cpp") or r.settings.n_cpu_moe == "auto":
        return 0
    found = r.with_(n_cpu_moe="auto")
    return found.n_cpu_moe if found.fits and found.n_cpu_moe > r.n_cpu_moe else 0


def _rank(r: "Report", quant: str) -> int:
    ladder = LADDERS[r.settings.engine]
    return ladder.index(quant) if quant in ladder else 0
