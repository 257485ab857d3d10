"""Figures from results: numbers in, plotly out. A fit's figure keeps its traces whatever it shows, to be changed in place."""

import math
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from ..fitmap import FitMap
from ..fitting import QUANT_LADDER, Device, Report
from ..units import GIB, MIB, format_bytes, format_count
from .style import BLUE, FAINT, GREY, GRID, ORANGE, RED, TERMS, layout

if TYPE_CHECKING:
    from ..reconcile import Check

ROW, FRAME = 66, 100       # pixels: a device, and everything around the devices


def fit_figure(report: Report) -> go.Figure:
    """A bar a device, stacked by term, against its capacity."""
    return go.Figure(fit_picture(report))


def fit_picture(report: Report, kept: Report | None = None) -> dict:
    """{"data", "layout"} of fit_figure. Its traces: one a term, the modelled range, the capacity, what is free.

    `kept`: another report, whose devices stand below as A, paler.
    """
    shown = [(report, device) for device in report.devices.values()]
    shown += [(kept, device) for device in kept.devices.values()] if kept else []
    devices = [device for _, device in shown]
    rows = list(range(len(devices)))
    longest = max(max(d.capacity, d.high) for d in devices) / GIB
    return {
        "data": [*(_bar(shown, report, name, longest * GIB / 200) for name in TERMS), _band(devices, rows),
                 _mark("capacity", [d.capacity or None for d in devices], "solid"),
                 _mark("free for a model", [d.free if d.free < d.capacity else None for d in devices], "dot")],
        "layout": layout(
            barmode="stack", bargap=0.35, height=FRAME + ROW * len(devices),
            xaxis={"range": [0, _round_up(longest * 1.06)], "fixedrange": True,
                   "title": {"text": "GiB", "font": {"size": 13}, "standoff": 4}},
            yaxis={"tickvals": rows, "ticktext": [_row_name(d, "" if r is report else "A: ") for r, d in shown],
                   "range": [len(rows) - 0.5, -0.5],
                   "automargin": True, "fixedrange": True, "showgrid": False, "zeroline": False},
            uniformtext={"minsize": 10, "mode": "hide"}),
    }


def _row_name(device, whose: str) -> str:
    of = f" of {format_bytes(device.capacity, 1)}" if device.capacity else ""
    return f"{whose}{_plain(device.title)}<br>{format_bytes(device.needed)}{of}"


def _bar(shown: list[tuple[Report, Device]], present: Report, name: str, seen: float) -> dict:
    terms = [next((t for t in report.terms if t.name == name and t.device == device.name), None) for report, device in shown]
    label, colour = TERMS[name]
    kind = next((t.kind for t in terms if t), "exact")
    return {
        "type": "bar", "orientation": "h", "name": label if kind == "exact" else f"{label} ({kind})",
        "y": list(range(len(shown))),
        "x": [t.bytes / GIB if t else 0 for t in terms],
        "text": [f"{t.bytes / GIB:.2f}" if t and t.bytes else "" for t in terms],
        "textposition": "inside", "insidetextanchor": "middle", "textangle": 0, "constraintext": "inside",
        "customdata": [_hover(t) if t else "" for t in terms],
        "hovertemplate": f"<b>{label}</b> %{{customdata}}<extra></extra>",
        "showlegend": any(t and t.high > seen for t in terms),
        "marker": {"color": colour, "line": {"width": 0}, "opacity": [1 if report is present else 0.6 for report, _ in shown]},
    }


def _hover(term) -> str:
    size = f"{format_bytes(term.bytes)} ({term.bytes:,} bytes), {term.kind}"
    if term.low != term.high:
        size += f", {format_bytes(term.low)} to {format_bytes(term.high)}"
    return f"{size}<br>{_plain(term.why)}"


def _band(devices, rows: list[int]) -> dict:
    return {
        "type": "scatter", "mode": "markers", "name": "range", "y": [row + 0.4 for row in rows],
        "x": [d.used / GIB for d in devices],
        "marker": {"symbol": "line-ns-open", "size": 12, "color": GREY, "line": {"width": 2}},
        "error_x": {"type": "data", "symmetric": False, "array": [(d.high - d.used) / GIB for d in devices],
                    "arrayminus": [(d.used - d.low) / GIB for d in devices], "color": GREY, "thickness": 2, "width": 6},
        "customdata": [f"{format_bytes(d.low)} to {format_bytes(d.high)}" for d in devices],
        "hovertemplate": "<b>range of all of it</b> %{customdata}<extra></extra>",
    }


def _mark(name: str, sizes: list[int | None], dash: str) -> dict:
    """A vertical line across each device's row: a scatter line that breaks between rows."""
    x, y, said = [], [], []
    for row, size in enumerate(sizes):
        at = None if size is None else size / GIB
        x += [at, at, None]
        y += [row - 0.42, row + 0.42, None]
        said += [format_bytes(size) if size else ""] * 2 + [""]
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "customdata": said, "connectgaps": False,
            "line": {"color": RED, "width": 3, "dash": dash}, "showlegend": any(s is not None for s in sizes),
            "hovertemplate": f"<b>{name}</b> %{{customdata}}<extra></extra>"}


def _round_up(value: float) -> float:
    """Two significant digits, upwards: an axis that stands still while a bar grows."""
    step = 10 ** (math.floor(math.log10(value)) - 1) if value > 0 else 1
    return math.ceil(value / step) * step


def _plain(text: str) -> str:
    """Text that plotly will not read as markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def measured_figure(check: "Check") -> go.Figure:
    """Predicted beside measured, a pair of bars a term: the prediction with its band, and how far it was off."""
    rows = [row for row in check.bytes if row.predicted]
    several = len({row.device for row in rows}) > 1
    at = list(range(len(rows)))
    predicted = {
        "type": "bar", "orientation": "h", "name": "predicted, with its band", "y": at, "width": 0.38, "offset": -0.4,
        "x": [row.predicted / MIB for row in rows], "marker": {"color": BLUE},
        "error_x": {"type": "data", "symmetric": False, "color": GREY, "thickness": 2, "width": 5,
                    "array": [max(row.high - row.predicted, 0) / MIB for row in rows],
                    "arrayminus": [max(row.predicted - row.low, 0) / MIB for row in rows]},
        "customdata": [f"{format_bytes(row.predicted)}, {row.kind}<br>{_plain(row.why)}" for row in rows],
        "hovertemplate": "<b>predicted</b> %{customdata}<extra></extra>"}
    measured = {
        "type": "bar", "orientation": "h", "name": "measured", "y": at, "width": 0.38, "offset": 0.02,
        "x": [None if row.measured is None else row.measured / MIB for row in rows], "marker": {"color": ORANGE},
        "text": ["" if row.measured is None else format_bytes(row.measured) for row in rows], "textposition": "auto",
        "constraintext": "inside",
        "customdata": [f"{format_bytes(row.measured or 0)}<br>{_plain(row.how)}" for row in rows],
        "hovertemplate": "<b>measured</b> %{customdata}<extra></extra>"}
    return go.Figure({"data": [predicted, measured], "layout": layout(
        barmode="overlay", height=FRAME + 58 * len(rows),
        xaxis={"title": {"text": "MiB", "font": {"size": 13}, "standoff": 4}, "rangemode": "tozero"},
        yaxis={"tickvals": at, "ticktext": [_compared(row, several) for row in rows], "range": [len(rows) - 0.5, -0.5],
               "automargin": True, "showgrid": False, "zeroline": False})})


def _compared(row, several: bool) -> str:
    name = TERMS.get(row.term, (row.term.replace("_", " "),))[0] + (f", {row.device}" if several else "")
    return _plain(name) + ("<br>not measured" if row.error is None else f"<br>off by {row.error:+.1%}")


_AS_WIDE_AS = {"MXFP4_MOE": "IQ4_XS"}      # not on the ladder, but the best of models published so: 4.25 bits as well


def map_figure(found: FitMap) -> go.Figure:
    """A heat map, models by cards: the most faithful quant with which all of it fits; empty where none does."""
    return go.Figure(map_picture(found))


def map_picture(found: FitMap) -> dict:
    """{"data", "layout"} of map_figure."""
    ladder = QUANT_LADDER if set(found.ladder) <= set(QUANT_LADDER) else found.ladder      # a colour stays a quant's own
    steps = len(ladder)
    rank = {quant: steps - at for at, quant in enumerate(ladder)}            # the last of the ladder is 1
    shade = rank | {quant: rank[like] for quant, like in _AS_WIDE_AS.items() if like in rank}
    models = [_plain(f"{m.title} · {format_count(m.params)}") for m in found.models]
    cards = [_plain(f"{c.name}, {format_bytes(c.memory, 0)}") for c in found.cards]
    groups: dict[int, list[int]] = {}
    for at, card in enumerate(found.cards):
        groups.setdefault(round(card.memory / GIB), []).append(at)
    edges = [{"type": "line", "xref": "x", "yref": "paper", "x0": at[0] - 0.5, "x1": at[0] - 0.5, "y0": 0, "y1": 1,
              "line": {"color": GRID, "width": 1}} for at in groups.values()]
    wide = {size: at for size, at in groups.items() if len(at) >= 0.02 * len(cards)}      # room for a label
    return {
        "data": [{
            "type": "heatmap", "x": list(range(len(cards))), "y": list(range(len(models))),
            # arrays, not lists: plotly looks at each value of a list, which takes longer than all the rest
            "z": np.array([[shade.get(quant, 0) for quant in row] for row in found.best]),
            "text": np.array([[quant or "no quant fits" for quant in row] for row in found.best]),
            "customdata": np.array([[f"{model}<br>{card}" for card in cards] for model in models]),
            "hovertemplate": "%{customdata}<br><b>%{text}</b><extra></extra>", "ygap": 1,
            "zmin": -0.5, "zmax": steps + 0.5,                 # 0, where none fits, is the paper's colour
            "colorscale": [[at / (steps + 1), _shade((k - 1) / max(steps - 1, 1)) if k else "rgba(0,0,0,0)"]
                           for k in range(steps + 1) for at in (k, k + 1)],
            "colorbar": {"tickvals": list(rank.values()), "ticktext": list(rank), "thickness": 14, "outlinewidth": 0,
                         "lenmode": "pixels", "len": 20 * steps + 20, "y": 1, "yanchor": "top",
                         "tickfont": {"size": 11}, "title": {"text": "best quant", "font": {"size": 13}}},
        }],
        "layout": layout(
            shapes=edges, height=max(13 * len(models), 20 * steps + 60) + 90, plot_bgcolor=FAINT,
            xaxis={"side": "top", "tickvals": [sum(at) / len(at) for at in wide.values()],
                   "ticktext": [str(size) for size in wide], "showgrid": False, "zeroline": False,
                   "ticklabeloverflow": "allow",
                   "title": {"text": "memory of the card, GiB", "font": {"size": 13}, "standoff": 6}},
            yaxis={"tickvals": list(range(len(models))), "ticktext": models, "tickfont": {"size": 10},
                   "ticklabeloverflow": "allow",          # otherwise each of a hundred labels is measured at every change
                   "automargin": True, "range": [-0.5, len(models) - 0.5], "showgrid": False, "zeroline": False},
            margin={"l": 12, "r": 12, "t": 64, "b": 12}),
    }


_CIVIDIS = ((24, 76, 142), (66, 92, 128), (102, 112, 118), (149, 143, 120), (200, 184, 102), (254, 232, 56))
"""Cividis (Nuñez, Anderton and Renslow, 2018) in six stops, its dark end lifted so that it shows on a dark page."""


def _shade(share: float) -> str:
    at = min(int(share * (len(_CIVIDIS) - 1)), len(_CIVIDIS) - 2)
    part = share * (len(_CIVIDIS) - 1) - at
    mixed = (round(a + part * (b - a)) for a, b in zip(_CIVIDIS[at], _CIVIDIS[at + 1], strict=True))
    return f"rgb({','.join(map(str, mixed))})"
