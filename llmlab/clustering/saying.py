"""A plan over hosts in a few sentences."""

from typing import TYPE_CHECKING

from ..units import format_bytes, format_seconds

if TYPE_CHECKING:
    from .planning import HostsPlan

_SAYS = {"fits": "fits", "may spill": "may or may not fit", "does not fit": "does not fit"}


def answer(p: "HostsPlan") -> str:
    """The verdict, what decides it, what travels, how fast, and what loading takes."""
    s = p.settings
    cards = {name: d for name, d in p.devices.items() if name != "head/RAM"}
    text = (f"{p.spec.title} in {s.quant} with {s.context:,} token{'s' if s.context > 1 else ''} of context {_SAYS[p.verdict]} "
            f"{_hosts(p)}")
    taken = f"{format_bytes(sum(d.used for d in cards.values()))} of {format_bytes(sum(d.free for d in cards.values()))}"
    after = _travels(p) + _speed(p) + _loading(p)
    worst = next((d for verdict in ("does not fit", "may spill") for d in p.devices.values() if d.verdict == verdict), None)
    if p.partial:
        rest = "the rest stays in the head's RAM"
        return f"{text}. {p.gpu_layers} of {len(p.spec.layers) + 1} layers go on the cards ({taken}), {rest}.{after}"
    text += f": {taken}."
    if worst:
        text += f" {worst.name} decides: it needs {format_bytes(worst.used)} of {format_bytes(worst.free)}."
    elif not p.fits:
        text += " vLLM may find less free on a card than the share it reserves; a smaller utilization starts."
    return text + after


def _hosts(p: "HostsPlan") -> str:
    said = []
    for host in p.hosts:
        names = dict.fromkeys(card.name for card in host.cards)
        counted = " and ".join(f"{n} {name}" if (n := sum(c.name == name for c in host.cards)) > 1 else name for name in names)
        said.append(f"{counted or 'no card'} ({host.name})")
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"


def _travels(p: "HostsPlan") -> str:
    if len(p.hosts) == 1:
        return ""
    if p.engine == "vllm":
        stages = len(p.devices) // p.share
        sent = sum(t.sent for t in p.traffic.values())
        return (f" {stages} stage{'s' if stages > 1 else ''} of {p.share} card{'s' if p.share > 1 else ''}; a token takes "
                f"{format_bytes(sent)} over {p.link.name} ({_share(p)} of its time).")
    each = "; ".join(f"{format_bytes(t.sent)} to {host} and {format_bytes(t.received)} back" for host, t in p.traffic.items())
    return f" A token takes {each} over {p.link.name}: {_share(p)} of its time."


def _share(p: "HostsPlan") -> str:
    return f"{p.network_share:.0%}" if p.network_share >= 0.01 else "less than 1 %"


def _speed(p: "HostsPlan") -> str:
    decode, prefill = p.speed.decode_tps, p.speed.prefill_tps
    if not decode:
        return ""
    text = f" Between {decode[0]:.3g} and {decode[2]:.3g} tokens per second"
    return f"{text}, a prompt at {prefill[0]:.3g} to {prefill[2]:.3g}." if prefill else f"{text}."


def _loading(p: "HostsPlan") -> str:
    bytes = sum(t.bytes for t in p.loading.values())
    if not bytes:
        return ""
    again = sum(t.bytes for t in p.loading_again.values())
    fast, _, slow = p.loading_seconds
    return (f" Loading sends {format_bytes(bytes)} over the network once, {format_seconds(fast)} to {format_seconds(slow)} at "
            f"{p.link.rate / 1e6:,.0f} MB/s; workers started with --cache are sent {format_bytes(again)} the next time.")
