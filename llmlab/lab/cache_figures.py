"""Figures of the KV cache: what a token costs by architecture, bytes and speed against context, the numbers themselves."""

import numpy as np

from .. import catalog
from ..catalog import Quality
from ..units import GIB, KIB, format_bytes
from .cache_costs import KINDS, SHOWN, Cost, Curve, kv_words
from .cache_heat import Heat
from .cache_measuring import MeasureState
from .cache_state import Look
from .style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, layout

LAYERS = {"full": ("full attention", ORANGE), "latent": ("latent row", GREEN), "sliding": ("sliding window", SKY),
          "state": ("recurrent state", PINK), "beside": ("kept in 16 bits", BLUE)}
LINES = {("f16", "f16"): (BLUE, "solid"), ("q8_0", "q8_0"): (ORANGE, "dash"), ("q5_1", "q5_1"): (SKY, "dashdot"),
         ("q4_0", "q4_0"): (GREEN, "dot")}
CHOSEN = PINK, "longdash"
_AXIS = {"size": 13}


def tokens_picture(look: Look) -> dict:
    """{"data", "layout"}: bytes a token by architecture at this context, stacked by kind of layer; the chosen model's in full
    colour. Text beside each bar: one token more, and all of them."""
    rows = [(name, found) for name, found in look.beside.items() if isinstance(found, Cost)]
    costs = [found for _, found in rows]
    longest = max(found.each for found in costs) / KIB
    return {
        "data": [_kind(name, costs, look.cost) for name in LAYERS],
        "layout": layout(height=100 + 46 * len(rows), barmode="stack", bargap=0.4, margin={"l": 12, "r": 16, "t": 40, "b": 44},
                         xaxis={"range": [0, longest * 1.04], "nticks": 8, "title": {
                             "text": f"KiB a token, averaged over {look.cost.context:,}", "font": _AXIS, "standoff": 4}},
                         yaxis={"automargin": True, "showgrid": False, "zeroline": False, "tickvals": list(range(len(rows))),
                                "range": [len(rows) - 0.5, -0.5],
                                "ticktext": [f"{name}: {_plain(one.spec.title)}<br>{format_bytes(one.bytes)}, "
                                             f"{format_bytes(one.each, 1)} a token" for name, one in rows]}),
    }


def _kind(name: str, costs: list[Cost], chosen: Cost) -> dict:
    label, colour = LAYERS[name]
    bytes = [one.kinds[name] if name in KINDS else one.beside for one in costs]
    return {"type": "bar", "orientation": "h", "name": label, "y": list(range(len(costs))),
            "x": [size / one.context / KIB for size, one in zip(bytes, costs, strict=True)],
            "marker": {"color": colour, "line": {"width": 0}, "opacity": [1 if one is chosen else 0.55 for one in costs]},
            "showlegend": any(bytes),
            "customdata": [f"{format_bytes(size)} in {one.layers.get(name) or 'all'} layers" for size, one in
                           zip(bytes, costs, strict=True)],
            "hovertemplate": f"<b>{label}</b> %{{x:.2f}} KiB a token, %{{customdata}}, exact<extra></extra>"}


def memory_picture(look: Look) -> dict:
    """{"data", "layout"}: GiB of cache against context, both logarithmic. Traces: each type shown, the chosen one where it is
    none of them, where each stops to fit, the card's memory, now."""
    ends = [one for one in _distinct(look.curves) if one.longest]
    capacity = sum(card.memory for card in look.report.cards) or next(iter(look.report.devices.values())).capacity
    first, last = look.curves[-1].contexts[0], look.curves[-1].contexts[-1]
    sizes = [size for one in look.curves if one for size in one.bytes]
    y = [np.log10(min(sizes) / GIB) - 0.1, np.log10(max(*sizes, capacity) / GIB) + 0.15]
    return {
        "data": [*_lines(look, lambda one: np.array(one.bytes) / GIB, "%{y:.3f} GiB, exact"),
                 {"type": "scatter", "mode": "markers", "name": "longest that fits",
                  "x": [one.longest for one in ends], "y": [one.longest_bytes / GIB for one in ends],
                  "marker": {"symbol": "x", "size": 9, "color": RED}, "showlegend": bool(ends),
                  "customdata": [f"{one.longest:,} tokens in {kv_words(one.kv)}, {format_bytes(one.longest_bytes)}"
                                 for one in ends],
                  "hovertemplate": "%{customdata}: the longest that fits for certain, modelled<extra></extra>"},
                 {"type": "scatter", "mode": "lines", "name": "the card" if look.report.cards else "RAM",
                  "x": [first, last] if capacity else [], "y": [capacity / GIB] * 2 if capacity else [], "hoverinfo": "skip",
                  "line": {"color": RED, "width": 2}, "showlegend": bool(capacity)},
                 _now([look.cost.context], [look.cost.bytes / GIB], format_bytes(look.cost.bytes))],
        "layout": layout(height=380, margin={"l": 12, "r": 16, "t": 64, "b": 44}, xaxis=_contexts(first, last),
                         yaxis={"type": "log", "range": y, "automargin": True, "dtick": 1, "exponentformat": "none",
                                "title": {"text": "cache, GiB", "font": _AXIS, "standoff": 4}}),
    }


def speed_picture(look: Look) -> dict:
    """{"data", "layout"}: tokens/s of decoding with the context full against context, modelled. Traces: the chosen type's band,
    each type shown, the chosen one where it is none of them, now."""
    chosen, known = look.curves[-1], look.report.speed.decode_tps
    at = [(n, band) for n, band in zip(chosen.contexts, chosen.speed, strict=True) if band]
    x = [n for n, _ in at]
    top = max((band[1] for one in look.curves if one for band in one.speed if band), default=1)
    return {
        "data": [{"type": "scatter", "mode": "lines", "name": f"range of {kv_words(chosen.kv)}", "x": x + x[::-1],
                  "y": [min(band[2], top * 1.3) for _, band in at] + [band[0] for _, band in at[::-1]], "fill": "toself",
                  "fillcolor": "rgba(128,128,128,.18)", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": bool(at)},
                 *_lines(look, lambda one: [band[1] if band else None for band in one.speed],
                         "%{y:.3g} tokens/s, modelled"),
                 _now([look.cost.context] if known else [], [known[1]] if known else [],
                      f"{known[1]:.3g} tokens/s" if known else "")],
        "layout": layout(height=380, margin={"l": 12, "r": 16, "t": 64, "b": 44},
                         xaxis=_contexts(chosen.contexts[0], chosen.contexts[-1]),
                         yaxis={"range": [0, top * 1.15], "automargin": True, "nticks": 7,
                                "title": {"text": "decode, tokens/s (modelled)", "font": _AXIS, "standoff": 4}}),
    }


def _lines(look: Look, values, said: str) -> list[dict]:
    """A line a type; the chosen one is the thick one, of its own where it is none of those shown."""
    chosen = look.curves[-1]
    pairs = [pair for pair in SHOWN if pair != chosen.kv or chosen.bytes != _same(look, pair)]
    found = []
    for pair, one in zip(SHOWN, look.curves[:-1], strict=True):
        colour, dash = LINES[pair]
        found.append(_line(one, kv_words(pair), values, said, colour, dash, 2 if pair in pairs else 4))
    own = chosen if len(pairs) == len(SHOWN) else None
    name = f"{kv_words(chosen.kv)}{', some in 16 bits' * (chosen.kv in SHOWN)}" if own else "as chosen"
    return [*found, _line(own, name, values, said, *CHOSEN, 4)]


def _same(look: Look, pair) -> tuple[int, ...] | None:
    return next((one.bytes for one in look.curves[:-1] if one and one.kv == pair), None)


def _line(one: Curve | None, name: str, values, said: str, colour: str, dash: str, width: int) -> dict:
    return {"type": "scatter", "mode": "lines", "name": name, "x": one.contexts if one else [], "y": values(one) if one else [],
            "line": {"color": colour, "width": width, "dash": dash}, "showlegend": one is not None,
            "hovertemplate": f"<b>{name}</b> %{{x:,}} tokens: {said}<extra></extra>"}


def _now(x: list, y: list, said: str) -> dict:
    return {"type": "scatter", "mode": "markers", "name": "now", "x": x, "y": y, "showlegend": bool(x),
            "marker": {"symbol": "circle-open", "size": 13, "color": GREY, "line": {"width": 3}},
            "hovertemplate": f"%{{x:,}} tokens: {said}<extra></extra>"}


def _distinct(curves: tuple[Curve | None, ...]) -> list[Curve]:
    return list({(one.kv, one.bytes): one for one in curves if one}.values())


def _contexts(first: int, last: int) -> dict:
    """A logarithmic axis of tokens, named in powers of two."""
    ticks = [2**k for k in range(9, 32) if first <= 2**k <= last]
    ticks = ticks[(len(ticks) - 1) % 2::2] if len(ticks) > 7 else ticks
    return {"type": "log", "range": [np.log10(first) - 0.03, np.log10(last) + 0.03], "tickvals": ticks,
            "ticktext": [f"{n // 1024}K" if n >= 1024 else str(n) for n in ticks],
            "title": {"text": "context, tokens", "font": _AXIS, "standoff": 4}}


def _plain(text: str) -> str:
    """Text that plotly will not read as markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


# ---- the numbers themselves -------------------------------------------------------------------------------------------

_DIVERGING = [[0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1, "#b2182b"]]
"""Blue to red by white (ColorBrewer's RdBu), told apart with any kind of colour vision."""
MAPS = ("as given", "as it comes back", "the error")


def heat_picture(found: Heat | None, tokens: list[str] | tuple = ()) -> dict:
    """{"data", "layout"}: three heat maps side by side, a row a cell, a column a channel: the numbers as the cache was given
    them, as it gives them back, and the difference, on a scale of its own."""
    empty = np.zeros((1, 1))
    original, kept = (found.original, found.kept) if found else (empty, empty)
    most, lost = float(np.abs(original).max()) or 1.0, float(np.abs(kept - original).max()) or 1.0
    names = [f"{at}: {_plain(text)!r}" for at, text in enumerate(tokens)] or [""]
    maps = ((original, most), (kept, most), (kept - original, lost))
    panes = [(0.0, 0.27), (0.30, 0.57), (0.68, 0.95)]
    more = {}
    for at, (start, stop) in enumerate(panes):
        number = str(at + 1) if at else ""
        more[f"xaxis{number}"] = {"domain": [start, stop], "anchor": f"y{number}", "showgrid": False, "zeroline": False,
                                  "nticks": 5, "title": {"text": f"{MAPS[at]}, by channel", "font": _AXIS, "standoff": 4}}
        more[f"yaxis{number}"] = {"anchor": f"x{number}", "autorange": "reversed", "showgrid": False, "zeroline": False,
                                  "automargin": True, "nticks": 8, "showticklabels": at == 0,
                                  "title": {"text": "cell (token)" if at == 0 else "", "font": _AXIS, "standoff": 4}}
    return {
        "data": [{"type": "heatmap", "z": z, "zmin": -top, "zmax": top, "colorscale": _DIVERGING, "showscale": at > 0,
                  "xaxis": f"x{at + 1 if at else ''}", "yaxis": f"y{at + 1 if at else ''}", "name": MAPS[at],
                  "colorbar": {"x": panes[at][1] + 0.005, "thickness": 10, "outlinewidth": 0, "tickfont": {"size": 11},
                               "nticks": 5},
                  "customdata": np.array([[name] * z.shape[1] for name in names]) if len(names) == len(z) else empty,
                  "hovertemplate": f"{MAPS[at]}: channel %{{x}}, cell %{{customdata}}: %{{z:.4g}}<extra></extra>"}
                 for at, (z, top) in enumerate(maps)],
        "layout": layout(height=420, margin={"l": 12, "r": 12, "t": 16, "b": 44}, **more),
    }


def channels_picture(found: Heat | None) -> dict:
    """{"data", "layout"}: root mean square of each channel of the numbers and of their error, which blocks of 32 share."""
    original = found.original if found else np.zeros((1, 1))
    lost = found.kept - found.original if found else original
    def rms(x):
        return np.sqrt(np.square(x).mean(0))
    x = np.arange(original.shape[1])
    return {
        "data": [{"type": "bar", "name": "numbers", "x": x, "y": rms(original), "marker": {"color": BLUE, "line": {"width": 0}},
                  "hovertemplate": "channel %{x}: %{y:.4g} RMS<extra></extra>"},
                 {"type": "bar", "name": "error", "x": x, "y": rms(lost), "marker": {"color": RED, "line": {"width": 0}},
                  "hovertemplate": "channel %{x}: error %{y:.4g} RMS<extra></extra>"}],
        "layout": layout(height=200, barmode="overlay", bargap=0.15, margin={"l": 12, "r": 12, "t": 40, "b": 44},
                         xaxis={"nticks": 9, "showgrid": False, "zeroline": False,
                                "title": {"text": "channel of the head", "font": _AXIS, "standoff": 4}},
                         yaxis={"automargin": True, "nticks": 4, "title": {"text": "RMS", "font": _AXIS, "standoff": 4}}),
    }


def quality_picture() -> dict:
    """{"data", "layout"}: mean KL divergence against bits a number, logarithmic. Traces: Llama 3 8B as published; SmolLM2
    135M as measured here. Two models on two texts: shapes compare, heights do not."""
    published = [row for row in catalog.kv_quality().values() if row.bits]
    ours, rotated = (list(catalog.measured_kv_quality(rotate=turned).values()) for turned in (False, True))
    return {
        "data": [_points(published, "Llama 3 8B, published", BLUE, "circle", {row.what for row in published}),
                 _points(ours, "SmolLM2 135M, measured", ORANGE, "diamond", _NAMED),
                 _points(rotated, "rotated", GREEN, "star", set())],
        "layout": layout(height=380, margin={"l": 12, "r": 24, "t": 40, "b": 44},
                         xaxis={"title": {"text": "bits a number, K and V averaged", "font": _AXIS, "standoff": 4},
                                "range": [3.5, 18]},
                         yaxis={"type": "log", "automargin": True, "dtick": 1, "exponentformat": "none",
                                "title": {"text": "mean KL divergence, nats", "font": _AXIS, "standoff": 4}}),
    }


_BESIDE = {"f16/q8_0": "bottom right", "q5_1/q5_1": "bottom left"}      # whose words would lie on a neighbour's
_NAMED = {"q8_0/q8_0", "q5_1/q5_1", "q4_0/q4_0", "q8_0/q4_0", "q4_0/q8_0"}


def _points(rows: list[Quality], name: str, colour: str, symbol: str, named: set[str]) -> dict:
    return {
        "type": "scatter", "mode": "markers+text", "name": name, "x": [row.bits for row in rows],
        "y": [row.mean_kld for row in rows], "showlegend": bool(rows),
        "text": [_pair(row.what) if row.what in named else "" for row in rows],
        "textposition": [_BESIDE.get(row.what, "top right") for row in rows],
        "textfont": {"size": 11, "color": GREY}, "marker": {"color": colour, "symbol": symbol, "size": 9},
        "customdata": [f"{name}: K and V in {row.what}, {row.bits:.3g} bits, KLD {row.mean_kld:.4g}" for row in rows],
        "hovertemplate": "%{customdata}<extra></extra>"}


def _pair(what: str) -> str:
    key, _, value = what.partition("/")
    return key if key == value else f"K {key}, V {value}"


# ---- measured ---------------------------------------------------------------------------------------------------------

MARKS = ((BLUE, "circle"), (ORANGE, "diamond"), (GREEN, "triangle-down"), (SKY, "square"), (PINK, "star"), (RED, "x"))


def measured_picture(state: MeasureState) -> dict:
    """{"data", "layout"}: milliseconds of a token against context: measured, and the least that the cache's further bytes take
    at what this machine reads. Traces: two for each of MARKS, in the order of the types."""
    points = state.points
    longest = max((point.context for point in points), default=1024)
    slowest = max((point.seconds for point in points), default=0.1)
    return {
        "data": [trace for at, mark in enumerate(MARKS) for trace in _measured(at, state, *mark)],
        "layout": layout(height=320, margin={"l": 12, "r": 16, "t": 40, "b": 44},
                         xaxis={"range": [0, 1.05 * longest], "nticks": 9,
                                "title": {"text": "context, tokens", "font": _AXIS, "standoff": 4}},
                         yaxis={"range": [0, 1.15e3 * slowest], "automargin": True, "nticks": 6,
                                "title": {"text": "ms a token, measured", "font": _AXIS, "standoff": 4}}),
    }


def _measured(at: int, state: MeasureState, colour: str, symbol: str) -> list[dict]:
    kinds = list(dict.fromkeys(point.kv for point in state.points))
    points = [point for point in state.points if kinds.index(point.kv) == at]
    x, name = [point.context for point in points], kv_words(points[0].kv) if points else str(at)
    return [{"type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": [1e3 * point.seconds for point in points],
             "line": {"color": colour, "width": 2}, "marker": {"color": colour, "symbol": symbol, "size": 10},
             "showlegend": bool(points),
             "customdata": [f"{point.context:,} tokens in {name}: {point.seconds * 1e3:.2f} ms, {format_bytes(point.bytes)}"
                            for point in points],
             "hovertemplate": "%{customdata}, measured<extra></extra>"},
            {"type": "scatter", "mode": "lines", "name": f"{name}, at least", "x": x, "showlegend": False, "hoverinfo": "skip",
             "y": [1e3 * (state.first(point.kv).seconds + state.least(point)) for point in points],
             "line": {"color": colour, "width": 1, "dash": "dash"}}]
