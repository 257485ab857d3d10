"""Figures of a token taken apart: each operation under the roofline, and the milliseconds of each way side by side."""

import numpy as np

from ..roofline import ATTENTION, EMBEDDING, SMALL, Ceilings, Op, Profile
from .compile_state import WAYS
from .style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, YELLOW, layout

OPS = {  # operation -> (colour, marker)
    "qkv": (BLUE, "circle"), ATTENTION: (RED, "x"), "out": (SKY, "square"), "gate, up": (ORANGE, "diamond"),
    "down": (YELLOW, "triangle-up"), "experts": ("#882255", "star"), "layers": ("#AA4499", "hexagon"),
    "output": (GREEN, "triangle-down"), EMBEDDING: (PINK, "cross"), SMALL: ("#999999", "circle-open"),
}
WIDE = (-0.5, 2.0)       # operations a byte, as powers of ten: what decoding does, and where multiplying becomes the limit


def roofline_picture(shown: Profile | None, limits: Ceilings | None) -> dict:
    """{"data", "layout"}: operations per byte along, operations per second up, both logarithmic; the roof, then a trace for
    each kind of operation."""
    x = np.logspace(*WIDE, 101)
    roof = np.minimum(x * limits.bandwidth, limits.flops) / 1e9 if limits else np.array([])
    top = np.log10(limits.flops / 1e9) + 0.3 if limits else 3
    return {
        "data": [{"type": "scatter", "mode": "lines", "name": "what the machine allows", "x": x if limits else [], "y": roof,
                  "line": {"color": GREY, "width": 2}, "hovertemplate": "%{y:.1f} GFLOP/s at %{x:.2f} a byte<extra></extra>"},
                 *(_point(name, shown, limits) for name in OPS)],
        "layout": layout(height=340, margin={"l": 12, "r": 16, "t": 56, "b": 44},
                         xaxis={"type": "log", "range": list(WIDE), "dtick": 1, "exponentformat": "none",
                                "title": {"text": "operations per byte read", "font": {"size": 13}, "standoff": 4}},
                         yaxis={"type": "log", "range": [top - 4, top], "dtick": 1, "automargin": True,
                                "exponentformat": "none", "title": {"text": "GFLOP/s", "font": {"size": 13}, "standoff": 4}}),
    }


def _point(name: str, shown: Profile | None, limits: Ceilings | None) -> dict:
    ops = [op for op in _of(name, shown) if op.bytes and op.flops]
    colour, symbol = OPS[name]
    return {"type": "scatter", "mode": "markers", "name": name, "x": [op.flops / op.bytes for op in ops],
            "y": [op.flops / op.seconds / 1e9 for op in ops], "showlegend": bool(ops),
            "marker": {"color": colour, "symbol": symbol, "size": 11},
            "customdata": [f"{op.name}: {op.bytes:,} bytes, {op.flops:,} operations, {op.seconds * 1e3:.3f} ms; "
                           f"{limits.floor(op) / op.seconds:.0%} of the roofline" for op in ops],
            "hovertemplate": "%{customdata}<extra></extra>"}


def time_picture(found: dict[str, Profile]) -> dict:
    """{"data", "layout"}: a token's milliseconds by operation, a bar for each way, named with its tokens per second."""
    ways = list(reversed(WAYS))
    whole = [1e3 * sum(op.seconds for op in found[way].ops) if way in found else 0 for way in ways]
    said = [f"{way}: {found[way].rate:.3g} tokens/s" if way in found else f"{way}: not measured" for way in ways]
    return {
        "data": [_bar(name, found, ways) for name in OPS],
        "layout": layout(height=240, barmode="stack", bargap=0.35, margin={"l": 12, "r": 16, "t": 56, "b": 44},
                         xaxis={"title": {"text": "ms of a token", "font": {"size": 13}, "standoff": 4}, "nticks": 8,
                                "range": [0, 1.02 * max(whole) or 100]},
                         yaxis={"automargin": True, "showgrid": False, "zeroline": False, "tickvals": list(range(len(ways))),
                                "ticktext": said if found else ways}),
    }


def _bar(name: str, found: dict[str, Profile], ways: list[str]) -> dict:
    seconds = [sum(op.seconds for op in _of(name, found.get(way))) for way in ways]
    return {"type": "bar", "orientation": "h", "name": name, "y": list(range(len(ways))),
            "x": [1e3 * one for one in seconds],
            "marker": {"color": OPS[name][0], "line": {"width": 0}}, "showlegend": any(seconds),
            "hovertemplate": f"<b>{name}</b> %{{x:.3f}} ms<extra></extra>"}


def _of(name: str, shown: Profile | None) -> list[Op]:
    """The operations of this kind; compiled layers may be of several."""
    return [op for op in shown.ops if op.name == name or name == "layers" and op.name.startswith("layers ")] if shown else []
