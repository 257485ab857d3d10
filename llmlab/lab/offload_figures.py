"""Figures of an offloaded model: every layer as a block where it lives, tokens per second against the budget, predicted beside
measured, and what reading ahead is worth. Numbers in, plotly out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..offload.planned_words import number
from ..offload.planning import Plan, spread_over
from ..units import GIB, MIB, format_bytes
from .offload_claim import Driven
from .offload_run import CLOSE, Ahead, Try
from .offload_state import Look
from .style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, YELLOW, layout

TIERS = {"device": ("stays on the device", BLUE), "ram": ("comes from RAM", GREEN), "ssd": ("comes from the SSD", ORANGE)}
BESIDE = {"slots": ("slots they take turns in", SKY), "experts": ("experts", PINK), "kv": ("KV cache", YELLOW),
          "other": ("workspace, small tensors, driver", "#999999")}
PASS, DEVICE, RAM, SSD = range(4)          # rows
FAR = 1.3                                  # a budget that lies further out than so many times the longest row is not drawn
_AXIS = {"size": 13}
_ROWS = {"device": DEVICE, "ram": RAM, "ssd": SSD}


@dataclass(frozen=True)
class Block:
    """A part of a row."""

    kind: str            # of TIERS or BESIDE
    row: int
    bytes: float
    words: str


def blocks(plan: Plan) -> list[Block]:
    """What is drawn, row by row, each from left to right: what one token reads in the order of the pass, then the tiers."""
    a, shape = plan.arrangement, plan.shape
    found = []
    for layer, tier in zip(shape.layers, a.tiers, strict=True):
        name = _title(layer.name)
        if layer.bytes:
            found.append(Block(tier, PASS, layer.bytes, f"{name}, {TIERS[tier][0]}"))
            found.append(Block(tier, _ROWS[tier], layer.bytes, name))
        if layer.experts:
            found.append(Block("experts", PASS, layer.used * layer.payload,
                               f"{layer.used} of {name}'s {layer.experts} experts"))
    return [*found, *_beside(plan)]


def _beside(plan: Plan) -> list[Block]:
    """What is not a layer."""
    a, shape = plan.arrangement, plan.shape
    found = []
    if a.slot_bytes:
        found += [Block("slots", DEVICE, a.slot_bytes / a.slots, f"slot {k + 1} of {a.slots}") for k in range(a.slots)]
    if a.expert_slots:
        found.append(Block("experts", DEVICE, a.expert_slots * shape.largest_expert,
                           f"{a.expert_slots:,} slots for {shape.experts:,} experts"))
    in_ram = spread_over(shape, a.ram_experts)
    for layer in shape.layers if shape.experts else ():
        name = _title(layer.name)
        beside = in_ram.get(layer.name, 0)
        for row, count in ((DEVICE, layer.experts),) if a.resident_experts else ((RAM, beside), (SSD, layer.experts - beside)):
            found.append(Block("experts", row, count * layer.expert, f"{count} of {name}'s {layer.experts} experts"))
    for term in plan.terms:
        row = _ROWS[term.device]
        if term.name == "kv_cache":
            found.append(Block("kv", row, term.bytes, f"KV cache, {term.why}, {term.kind}"))
        elif term.name not in ("weights", "slots", "experts"):
            found.append(Block("other", row, term.bytes, f"{term.name.replace('_', ' ')}: {term.why}, {term.kind}"))
    return [block for block in found if block.bytes]


def tiers_picture(look: Look) -> dict:
    """{"data", "layout"}: a row for the pass and one for each tier, layers as blocks in GiB or MiB; vertical lines are budgets.
    Traces, always the same: a kind of block each, and the budgets."""
    plan = look.plan
    unit, name = scale(max(plan.shape.bytes, plan.used("device")))
    ends, placed = [0.0] * 4, {kind: [] for kind in (*TIERS, *BESIDE)}
    for block in blocks(plan):
        placed[block.kind].append((block, ends[block.row]))
        ends[block.row] += block.bytes
    longest = max(ends)
    gap = longest / 900                                       # about a pixel
    titles = {PASS: "one token,<br>in order", DEVICE: _plain(plan.site.title), RAM: "RAM", SSD: "SSD"}
    room = {row: size for row, size in ((DEVICE, plan.site.device), (RAM, plan.site.ram)) if size}
    return {
        "data": [*(_kind(*about, placed[kind], gap, unit) for kind, about in (*TIERS.items(), *BESIDE.items())),
                 _budgets(room, longest, unit)],
        "layout": layout(height=420, barmode="overlay", bargap=0.3, margin={"l": 12, "r": 16, "t": 64, "b": 44},
                         hovermode="closest",
                         xaxis={"range": [0, 1.03 * _furthest(room, longest) / unit], "nticks": 9, "title": {
                             "text": f"{name}: each block is a layer", "font": _AXIS, "standoff": 4}},
                         yaxis={"automargin": True, "showgrid": False, "zeroline": False, "tickvals": list(titles),
                                "range": [3.5, -0.5],
                                "ticktext": [f"{titles[row]}<br>{_of(end, room.get(row))}" for row, end in enumerate(ends)]}),
    }


def _of(size: float, room: int | None) -> str:
    return f"{format_bytes(size)} of<br>{format_bytes(room)}" if room else format_bytes(size) if size else "none"


def _furthest(room: dict[int, int], longest: float) -> float:
    return max([longest, *(size for size in room.values() if size <= FAR * longest)])


def _kind(label: str, colour: str, found: list[tuple[Block, float]], gap: float, unit: int) -> dict:
    return {"type": "bar", "orientation": "h", "name": label, "showlegend": bool(found),
            "y": [block.row for block, _ in found], "width": 0.72, "base": [at / unit for _, at in found],
            "x": [max(block.bytes - gap, 0.6 * block.bytes) / unit for block, _ in found],
            "marker": {"color": colour, "line": {"width": 0}},
            "customdata": [f"{_plain(block.words)}, {format_bytes(block.bytes)}" for block, _ in found],
            "hovertemplate": "%{customdata}<extra></extra>"}


def _budgets(room: dict[int, int], longest: float, unit: int) -> dict:
    shown = {row: size / unit for row, size in room.items() if size <= FAR * longest}
    return {"type": "scatter", "mode": "lines", "name": "budget", "showlegend": bool(shown), "connectgaps": False,
            "x": [x for size in shown.values() for x in (size, size, None)],
            "y": [y for row in shown for y in (row - 0.45, row + 0.45, None)], "line": {"color": RED, "width": 3},
            "hoverinfo": "skip"}


def _title(name: str) -> str:
    return "the head" if name == "head" else f"layer {name.removeprefix('blk.')}"


def scale(size: float) -> tuple[int, str]:
    """(bytes, name) of the unit that sizes like this one are drawn in."""
    return (GIB, "GiB") if size >= GIB else (MIB, "MiB")


# ---- tokens per second -----------------------------------------------------------------------------------------------

def speed_picture(look: Look, tries: Sequence[Try] = (), running: float | None = None) -> dict:
    """{"data", "layout"}: decoding tokens/s against the device's budget, logarithmic. Traces: the band, its middle, now (with
    its band), measured (`tries`: those with the same settings but for that budget), and what is being measured."""
    plan = look.plan
    at, band = plan.site.device, plan.predict().decode
    sizes = [size for size, _ in look.curve]
    at = min(at, sizes[-1]) if sizes else at
    unit, name = scale(max([*sizes, at]))
    x = [size / unit for size in sizes]
    bands = [one for _, one in look.curve]
    rates = [*band, *(rate for one in bands for rate in one), *(one.measured for one in tries), *([running] if running else [])]
    return {
        "data": [{"type": "scatter", "mode": "lines", "name": "predicted range", "x": x + x[::-1], "fill": "toself",
                  "y": [one[2] for one in bands] + [one[0] for one in bands[::-1]], "fillcolor": "rgba(0,114,178,.22)",
                  "line": {"width": 0}, "hoverinfo": "skip", "showlegend": bool(x)},
                 {"type": "scatter", "mode": "lines", "name": "predicted", "x": x, "y": [one[1] for one in bands],
                  "line": {"color": BLUE, "width": 2},
                  "hovertemplate": f"%{{x:.2f}} {name}: %{{y:.3g}} tokens/s, modelled<extra></extra>"},
                 {"type": "scatter", "mode": "markers", "name": "now, predicted", "x": [at / unit], "y": [band[1]],
                  "marker": {"symbol": "circle-open", "size": 13, "color": BLUE, "line": {"width": 3}},
                  "error_y": {"type": "data", "symmetric": False, "array": [band[2] - band[1]],
                              "arrayminus": [band[1] - band[0]], "color": BLUE, "thickness": 2, "width": 8},
                  "hovertemplate": "now: %{y:.3g} tokens/s, modelled<extra></extra>"},
                 {"type": "scatter", "mode": "markers", "name": "measured", "x": [one.device / unit for one in tries],
                  "y": [one.measured for one in tries], "showlegend": bool(tries),
                  "marker": {"symbol": "x", "size": 10, "color": RED},
                  "hovertemplate": "%{x:.2f} " + name + ": %{y:.3g} tokens/s, measured<extra></extra>"},
                 {"type": "scatter", "mode": "markers", "name": "running", "x": [at / unit] if running else [],
                  "y": [running] if running else [], "showlegend": bool(running),
                  "marker": {"symbol": "diamond", "size": 12, "color": ORANGE},
                  "hovertemplate": "so far: %{y:.3g} tokens/s, measured<extra></extra>"}],
        "layout": layout(height=310, margin={"l": 12, "r": 16, "t": 48, "b": 44},
                         xaxis={"nticks": 8, "range": _wide(x, at / unit), "title": {
                             "text": f"{name} for {_plain(plan.site.title)}", "font": _AXIS, "standoff": 4}},
                         yaxis=logarithmic(rates, "tokens/s")),
    }


def _wide(x: list[float], at: float) -> list[float]:
    low, high = min([*x, at]), max([*x, at])
    return [low - 0.03 * (high - low), high + 0.03 * (high - low)] if high > low else [0.9 * low, 1.1 * low]


def logarithmic(values: Sequence[float], title: str) -> dict:
    """An axis over these with round numbers at its ticks."""
    known = [value for value in values if value and value > 0] or [1.0]
    low, high = math.log10(min(known)) - 0.08, math.log10(max(known)) + 0.08
    wide = high - low
    steps = (1,) if wide > 3.2 else (1, 3) if wide > 1.5 else (1, 2, 5) if wide > 0.8 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [step * 10.0 ** power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return {"type": "log", "range": [low, high], "automargin": True, "tickmode": "array", "tickvals": ticks,
            "ticktext": [f"{tick:g}" for tick in ticks], "title": {"text": title, "font": _AXIS, "standoff": 4}}


def checked_picture(tries: Sequence[Try]) -> dict:
    """{"data", "layout"}: measured against predicted tokens/s, both logarithmic. Traces: equality, 15 % beside it on either
    side, the tries with their bands, those measured in a bench, if there are any."""
    rates = [rate for one in tries for rate in (*one.predicted, one.measured)] or [1.0, 10.0]
    low, high = 0.85 * min(rates), 1.18 * max(rates)
    both = [low, high]
    return {
        "data": [{"type": "scatter", "mode": "lines", "name": "as predicted", "x": both, "y": both, "hoverinfo": "skip",
                  "line": {"color": GREY, "width": 1}},
                 {"type": "scatter", "mode": "lines", "name": f"{CLOSE:.0%} off", "hoverinfo": "skip",
                  "x": [*both, None, *both], "y": [low * (1 + CLOSE), high * (1 + CLOSE), None, low * (1 - CLOSE),
                                                   high * (1 - CLOSE)], "line": {"color": GREY, "width": 1, "dash": "dot"}},
                 _tried([one for one in tries if not one.saved], "tried here", RED, "x"),
                 _tried([one for one in tries if one.saved], "from a bench", BLUE, "circle")],
        "layout": layout(height=380, margin={"l": 12, "r": 16, "t": 44, "b": 44},
                         xaxis=logarithmic(both, "tokens/s, predicted"), yaxis=logarithmic(both, "tokens/s, measured")),
    }


def _tried(tries: list[Try], label: str, colour: str, symbol: str) -> dict:
    return {"type": "scatter", "mode": "markers", "name": label, "x": [one.predicted[1] for one in tries],
            "y": [one.measured for one in tries], "showlegend": bool(tries),
            "marker": {"symbol": symbol, "size": 10, "color": colour},
            "error_x": {"type": "data", "symmetric": False, "array": [one.predicted[2] - one.predicted[1] for one in tries],
                        "arrayminus": [one.predicted[1] - one.predicted[0] for one in tries], "color": colour, "thickness": 1,
                        "width": 4},
            "customdata": [_plain(one.words) for one in tries],
            "hovertemplate": "%{customdata}<br>%{y:.3g} tokens/s measured, %{x:.3g} predicted<extra></extra>"}


def ahead_picture(found: Sequence[Ahead]) -> dict:
    """{"data", "layout"}: a token's milliseconds by how many slots there are, waiting apart: measured."""
    return {
        "data": [{"type": "bar", "orientation": "h", "name": label, "marker": {"color": colour, "line": {"width": 0}},
                  "y": list(range(len(found))), "x": [1e3 * getattr(one, field) for one in found],
                  "hovertemplate": f"<b>{label}</b> %{{x:.1f}} ms, measured<extra></extra>"}
                 for label, colour, field in (("computing, and the rest", GREEN, "working"),
                                              ("waiting for a layer", ORANGE, "waiting"))],
        "layout": layout(height=120 + 44 * max(len(found), 1), barmode="stack", bargap=0.35,
                         xaxis={"rangemode": "tozero", "nticks": 8, "title": {
                             "text": "milliseconds a token, median, measured", "font": _AXIS, "standoff": 4}},
                         yaxis={"automargin": True, "showgrid": False, "zeroline": False, "tickvals": list(range(len(found))),
                                "range": [max(len(found), 1) - 0.5, -0.5],
                                "ticktext": [f"{one.slots} slot{'s' * (one.slots > 1)}" for one in found]}),
    }


def drives_picture(rows: Sequence[Driven]) -> dict:
    """{"data", "layout"}: tokens/s by drive, with their bands, and what one reads at."""
    return {
        "data": [{"type": "scatter", "mode": "markers", "name": "decode, modelled", "y": list(range(len(rows))),
                  "x": [one.decode[1] for one in rows], "marker": {"symbol": "circle", "size": 11, "color": BLUE},
                  "error_x": {"type": "data", "symmetric": False, "array": [one.decode[2] - one.decode[1] for one in rows],
                              "arrayminus": [one.decode[1] - one.decode[0] for one in rows], "color": BLUE, "thickness": 3,
                              "width": 6},
                  "customdata": [_plain(one.words) for one in rows],
                  "hovertemplate": "%{customdata}<extra></extra>"},
                 {"type": "scatter", "mode": "lines", "name": "as fast as one reads aloud", "x": [READING] * 2,
                  "y": [-0.5, len(rows) - 0.5], "line": {"color": GREY, "width": 1, "dash": "dot"}, "hoverinfo": "skip"}],
        "layout": layout(height=110 + 34 * max(len(rows), 1), margin={"l": 12, "r": 16, "t": 40, "b": 44},
                         xaxis=logarithmic([READING, *(rate for one in rows for rate in one.decode)], "tokens/s"),
                         yaxis={"automargin": True, "showgrid": False, "zeroline": False, "tickvals": list(range(len(rows))),
                                "range": [len(rows) - 0.5, -0.5], "ticktext": [
                                    f"{_plain(one.name)}: {number(one.decode[1])}" for one in rows]}),
    }


READING = 4.0            # tokens a second: some 180 words a minute, 1.3 tokens a word


def _plain(text: str) -> str:
    """Text that plotly will not read as markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
