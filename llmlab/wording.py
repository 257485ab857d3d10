"""A report in words: the answer, how far to trust it, what would fit instead, how fast."""

from typing import TYPE_CHECKING

from .errors import LabError
from .settings import LADDERS
from .units import format_bytes

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
        return f"{what} {_SAYS[r.verdict]} {'' if r.fits else 'in '}{where}: it needs {format_bytes(host.used)}.{_beyond(r)}"
    names = _listed([card.name for card in r.cards])
    host, cards = r.devices["host"], [d for name, d in r.devices.items() if name != "host"]
    if not r.partial and host.verdict == "does not fit" and all(d.verdict != "does not fit" for d in cards):
        return (f"{what} does not fit the RAM beside {names}: {format_bytes(host.used)} of {format_bytes(host.free)} there, "
                f"{r.gpu_layers} of {r.layers} layers on the card{_s(r)}.{_beyond(r)}")
    if r.partial:
        whole = r.with_(gpu_layers=r.layers)
        need = [d for name, d in whole.devices.items() if name != "host"]
        text = (f"{what} does not fit {names}: it needs {format_bytes(sum(d.used for d in need))}, and there are "
                f"{format_bytes(sum(d.free for d in need))}.")
        if host.verdict == "does not fit":
            return (f"{text} With the rest in RAM it does not fit either: {format_bytes(host.used)} of "
                    f"{format_bytes(host.free)} there.{_beyond(r)}")
        if not r.gpu_layers:
            return f"{text} Not one layer goes on the card{_s(r)}.{_beyond(r)}"
        goes = "layer goes" if r.gpu_layers == 1 else "layers go"
        return (f"{text} {r.gpu_layers} of {r.layers} {goes} on the card{_s(r)}, {format_bytes(r.total('weights', 'host'))} of "
                f"weights stay in RAM.{_beyond(r)}")
    text = f"{what} {_SAYS[r.verdict]} {names}: {_sum(cards)}"
    fullest = max(cards, key=lambda d: d.used / max(d.free, 1))
    if r.verdict == "may spill":
        text += f", between {format_bytes(fullest.low)} and {format_bytes(fullest.high)}"
    in_ram = r.total("weights", "host")
    if r.gpu_layers < r.layers:
        text += f", {r.gpu_layers} of {r.layers} layers on the card{_s(r)}, {format_bytes(in_ram)} of weights in RAM"
    elif r.settings.n_cpu_moe and r.spec.experts:
        text += f", {format_bytes(in_ram)} of weights in RAM"
    return f"{text}.{_beyond(r)}"


def _sum(cards: "list[Device]") -> str:
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
    trained = r.spec.context_train
    if trained and r.settings.context // r.settings.sequences > trained:
        return f" The model was trained for {trained:,} tokens; beyond that its answers decay."
    return ""


def trust(r: "Report") -> str:
    """How much of the memory is counted and how much is modelled, on the cards or, without any, in RAM."""
    where = [d for name, d in r.devices.items() if (name != "host") == bool(r.cards)]
    names = {d.name for d in where}
    counted = sum(t.bytes for t in r.terms if t.device in names and t.kind == "exact")
    low, high, used = (sum(getattr(d, what) for d in where) for what in ("low", "high", "used"))
    place = "in RAM" if not r.cards else "on the card" if len(where) == 1 else f"on {len(where)} cards"
    return (f"Memory {place}: {format_bytes(counted)} exact, {format_bytes(used - counted)} modelled; "
            f"between {format_bytes(low)} and {format_bytes(high)} in all.")


def speed(r: "Report") -> str:
    """Modelled speed with its band; "" where a card's rates are not known."""
    said = [f"{what} about {_rate(rates)}{where}" for what, rates, where in (
        ("decode", r.speed.decode_tps, " with the context full"), ("prefill", r.speed.prefill_tps, "")) if rates]
    return f"Speed, modelled: {', '.join(said)}." if said else ""


def _rate(rates: tuple[float, float, float]) -> str:
    """`"52 tokens/s (39 to 63)"`: the best guess and its band."""
    low, best, high = (f"{r:,.0f}" if r >= 10 else f"{r:.1f}" for r in rates)
    return f"{best} tokens/s ({low} to {high})"


def hint(r: "Report") -> str:
    """The nearest settings that would fit for certain, or what more there is room for."""
    now = r.settings
    # "auto" fits where all layers fit: asking for all of them spares the search for a split, at every step
    whole = r.with_(gpu_layers=r.layers) if now.gpu_layers == "auto" and now.engine == "llama.cpp" else r
    context, quant = whole.largest_context(), whole.best_quant()
    all_trained = context and context >= r.spec.context_train * now.sequences // 256 * 256
    if r.fits:
        more = [f"{context:,} tokens of context{', all it was trained for' if all_trained else ''}"] if (
            context > now.context) else []
        more += [f"{quant} at this context"] if quant and _rank(r, quant) < _rank(r, now.quant) else []
        return f"There is room for {' or for '.join(more)}." if more else ""
    ways = []
    if now.engine == "llama.cpp" and now.kv == ("f16", "f16") and _fits(whole, kv="q8_0"):
        ways.append("with the KV cache in q8_0")
    if blocks := _experts_in_ram(whole):
        ways.append(f"with the experts of {blocks} blocks in RAM")
    if context and context < now.context:
        ways.append(f"with the {context:,} tokens of context it was trained for" if all_trained
                    else f"with at most {context:,} tokens of context")
    if quant and quant != now.quant:
        ways.append(f"in {quant}{', which costs much quality' if quant.startswith(('IQ1', 'IQ2', 'Q2')) else ''}")
    if ways:
        return f"It would fit for certain {', '.join(ways[:-1])}{' or ' if len(ways) > 1 else ''}{ways[-1]}."
    return "No quant and no context is small enough for this to fit whole."


def _fits(r: "Report", **changes) -> bool:
    try:
        return r.with_(**changes).fits
    except LabError:
        return False


def _experts_in_ram(r: "Report") -> int:
    """The fewest blocks whose experts must stay in RAM for the rest to fit the cards; 0 where that is no way."""
    count = len(r.spec.blocks)
    if not (r.cards and r.spec.experts and r.settings.engine == "llama.cpp") or not _fits(r, n_cpu_moe=count):
        return 0
    low, high = r.settings.n_cpu_moe, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(r, n_cpu_moe=middle) else (middle + 1, high)
    return high


def _rank(r: "Report", quant: str) -> int:
    ladder = LADDERS[r.settings.engine]
    return ladder.index(quant) if quant in ladder else 0
