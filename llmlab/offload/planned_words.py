"""A plan in words: the answer, what a token waits for, what to look out for."""

from typing import TYPE_CHECKING

from ..units import GB, format_bytes, format_rate, format_seconds
from .arranging import Times

if TYPE_CHECKING:
    from ..memory import Term
    from ..rates import Band
    from .planning import Plan, Prediction

SAYS = {"SSD": "SSD-bound", "link": "link-bound", "compute": "compute-bound", "KV": "bound by the KV cache in RAM"}


def by_way(p: "Plan", times: Times) -> dict[str, float]:
    """Usual seconds of one pass that each way is busy, most first; last those in which the device waits."""
    passed = times.usual
    kv = times.moved["kv"] / p.site.link[1]
    found = {"SSD": passed.drive, "link": passed.link - kv, "compute": passed.device, "KV": kv}
    found = {way: took for way, took in sorted(found.items(), key=lambda item: -item[1]) if took > 0}
    return {**(found or {"compute": 0.0}), "waiting": passed.waiting}


def number(value: float) -> str:
    """`"0.083"`, `"2.4"`, `"31"`."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def rate(band: "Band") -> str:
    """`"2.4 tokens/s (1.9 to 3.1)"`."""
    low, best, high = map(number, band)
    return f"{best} tokens/s ({low} to {high})"


def binding(p: "Prediction") -> str:
    """`"SSD-bound at 91 %"`."""
    way, share = p.binds
    return f"{SAYS[way]} at {share:.0%}".replace("%", " %")


def span(term: "Term", unit: int) -> str:
    return "" if term.low == term.high else f"{term.low / unit:.2f} to {term.high / unit:.2f}"


def answer(p: "Plan") -> str:
    """What lives where, what that gives, and what binds."""
    found, a = p.predict(), p.arrangement
    what = f"{p.spec.title} in {p.quant} with {p.context:,} tokens of context"
    where = "in the part of RAM that is the device" if p.site.card is None else f"on {p.site.title}"
    if not p.streamed and a.kv == "device":
        return (f"{what} stays whole {where}: {format_bytes(p.used('device'))} of {format_bytes(p.site.device)}. "
                f"{_rates(p)}, modelled; nothing has to be moved.")
    layers = f"{a.on('device')} of {len(a.tiers)} layers stay {where}"
    rest = [f"{a.on(tier)} {verb}" for tier, verb in (("ram", "come from RAM"), ("ssd", "from the SSD")) if a.on(tier)]
    text = f"{what}: {layers}" + (f", {' and '.join(rest)}" if rest else "")
    if p.shape.experts and not a.resident_experts:
        text += (f"; of {p.shape.experts:,} experts {a.expert_slots:,} have a slot there"
                 f"{f' and {a.ram_experts:,} are in RAM' if a.ram_experts else ''}, which holds "
                 f"{found.times.hits[1]:.0%} of those a token wants".replace("%", " %"))
    text += "; the KV cache is in RAM" if a.kv == "ram" else ""
    drafts = f" with {p.drafted} drafted tokens a pass, {p.accepted:.0%} right".replace("%", " %") if p.drafted else ""
    return f"{text}. {_rates(p)}{drafts}, modelled; {binding(found)}."


def _rates(p: "Plan") -> str:
    found = p.predict()
    return f"Decode about {rate(found.decode)}, prefill {rate(found.prefill)}"


def why(p: "Plan", times: Times) -> str:
    """What one pass moves and computes, and what the band rests on."""
    passed, m = times.usual, times.moved
    parts = []
    if m["ssd"]:
        parts.append(f"reads {format_bytes(m['ssd'])} from {p.site.drive.name} in {format_seconds(passed.drive)}")
    if m["ram"] + m["kv"]:
        parts.append(f"takes {format_bytes(m['ram'] + m['kv'])} from RAM")
    if passed.link and not p.site.shared:
        parts.append(f"sends {format_bytes(passed.link * p.site.link[1])} over the link in {format_seconds(passed.link)}")
    parts.append(f"computes for {format_seconds(passed.device)}")
    text = f"One token {', '.join(parts)}; together {format_seconds(passed.seconds)}, for some of it happens at once"
    drive = p.site.drive
    if m["ssd"]:
        text += f". {drive.name[0].upper()}{drive.name[1:]} is taken to give {drive.rate[0] / GB:.2g} to "
        text += f"{drive.rate[2] / GB:.2g} GB/s"
        text += f", measured on {drive.day}" if drive.day else ", modelled"
    if p.shape.experts and not p.arrangement.resident_experts and p.hits is None:
        low, best, high = times.hits
        text += f". Of the experts wanted {low:.0%} to {high:.0%} are taken to be in the cache, {best:.0%} usually"
        text = text.replace("%", " %")
    return f"{text}."


def warnings(p: "Plan") -> tuple[str, ...]:
    """Heat, wear, page faults, RAM: a line each."""
    found, drive = [], p.site.drive
    times = p.predict().times
    if times.moved["ssd"]:
        share = min(times.usual.drive / times.usual.seconds, 1.0)
        if share > 0.5:
            rate = times.moved["ssd"] / times.usual.seconds
            found.append(f"The drive reads {format_rate(rate)} for as long as text is written. Reading does not wear it, but "
                         "it gets hot, and a hot drive slows down: look at its temperature, and give it a heat sink.")
        if drive.mapped:
            found.append("Read by page faults, which wait for each other: readers of their own are several times faster.")
        if drive.rate[1] < 0.3 * GB:
            found.append("A turning disk or a slow cloud disk: an SSD would be ten times faster.")
    if p.layout == "words":
        from .planning import WEAR
        size = p.shape.bytes
        found.append(f"A store of {format_bytes(size)} is written once, {size / WEAR:.3%} of what a drive of 1 TB is promised "
                     "to take (600 TB: Samsung's data sheet of the 990 PRO); it is read from then on.".replace("%", " %"))
    if p.site.ram and p.used("ram") > 0.9 * p.site.ram and p.asked.get("ram_budget") is None and not p.site.shared:
        found.append("RAM is used to the brim: a system that begins to swap writes to the drive, which wears it. Leave it some "
                     "with ram_budget.")
    if p.shape.experts and not p.arrangement.resident_experts and p.hits is None:
        found.append("How often a wanted expert is in the cache depends on the text; it is modelled here. Measure it and give "
                     "hits=.")
    if p.mode == "fast" and p.arrangement.on("ram") and p.site.card is not None:    # else it is the same processor
        found.append("Fast mode: layers in RAM are computed by the processor, whose logits differ a little.")
    if p.spec.context_train and p.context > p.spec.context_train:
        found.append(f"The model was trained for {p.spec.context_train:,} tokens; beyond that its answers decay.")
    return tuple(found)
