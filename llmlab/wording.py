"""A report in one or two sentences."""

from typing import TYPE_CHECKING

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
        text = f"{what} does not fit {names}: it needs {_sum(need)}."
        if host.verdict == "does not fit":
            return f"{text} With what does not go on the card{_s(r)} in RAM it does not fit either.{_beyond(r)}"
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
