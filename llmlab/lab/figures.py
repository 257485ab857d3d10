"""Figures from results: numbers in, plotly out. A figure keeps its traces whatever it shows, so that it can be updated."""

import math

import plotly.graph_objects as go

from ..fitmap import FitMap
from ..fitting import Report
from ..units import GIB, format_bytes, format_count
from .style import FAINT, GREY, GRID, RED, TERMS, layout

ROW, FRAME = 74, 104       # pixels: a device, and everything around the devices


def fit_figure(report: Report) -> go.Figure:
    """A bar a device, stacked by term, against its capacity."""
    return go.Figure(fit_picture(report))


def fit_picture(report: Report) -> dict:
    """{"data", "layout"} of fit_figure. Its traces: one a term, the modelled range, the capacity, what is free."""
    devices = list(report.devices.values())
    rows = list(range(len(devices)))
    longest = max(max(d.capacity, d.high) for d in devices) / GIB
    return {
        "data": [*(_bar(report, name, rows) for name in TERMS), _band(devices, rows),
                 _mark("capacity", [d.capacity or None for d in devices], rows, "solid"),
                 _mark("free for a model", [d.free if d.capacity and d.free != d.capacity else None for d in devices], rows, "dot")],
        "layout": layout(
            barmode="stack", bargap=0.35, height=FRAME + ROW * len(devices),
            xaxis={"range": [0, _round_up(longest * 1.06)], "title": {"text": "GiB"}, "fixedrange": True},
            yaxis={"tickvals": rows, "ticktext": [_row_name(d) for d in devices], "range": [len(rows) - 0.5, -0.5],
                   "automargin": True, "fixedrange": True, "showgrid": False, "zeroline": False},
            uniformtext={"minsize": 10, "mode": "hide"}),
    }


def _row_name(device) -> str:
    of = f" of {format_bytes(device.capacity, 1)}" if device.capacity else ""
    return f"{_plain(device.title)}<br>{format_bytes(device.used)}{of}"


def _bar(report: Report, name: str, rows: list[int]) -> dict:
    found = {t.device: t for t in report.terms if t.name == name}
    terms = [found.get(device) for device in report.devices]
    label, colour = TERMS[name]
    kind = next((t.kind for t in terms if t), "exact")
    return {
        "type": "bar", "orientation": "h", "name": f"{label} ({kind})", "y": rows,
        "x": [t.bytes / GIB if t else 0 for t in terms],
        "text": [f"{t.bytes / GIB:.2f}" if t and t.bytes else "" for t in terms],
        "textposition": "inside", "insidetextanchor": "middle", "textangle": 0, "constraintext": "inside",
        "customdata": [_hover(t) if t else "" for t in terms],
        "hovertemplate": f"<b>{label}</b> %{{customdata}}<extra></extra>",
        "showlegend": any(t and t.high for t in terms),
        "marker": {"color": colour, "line": {"width": 0},
                   "pattern": {"shape": "" if kind == "exact" else "/", "fgcolor": "rgba(255,255,255,.55)", "size": 7}},
    }


def _hover(term) -> str:
    size = f"{format_bytes(term.bytes)} ({term.bytes:,} bytes), {term.kind}"
    if term.low != term.high:
        size += f", {format_bytes(term.low)} to {format_bytes(term.high)}"
    return f"{size}<br>{_plain(term.why)}"


def _band(devices, rows: list[int]) -> dict:
    return {
        "type": "scatter", "mode": "markers", "name": "range of the modelled part", "y": rows,
        "x": [d.used / GIB for d in devices],
        "marker": {"symbol": "line-ns-open", "size": 12, "color": GREY, "line": {"width": 2}},
        "error_x": {"type": "data", "symmetric": False, "array": [(d.high - d.used) / GIB for d in devices],
                    "arrayminus": [(d.used - d.low) / GIB for d in devices], "color": GREY, "thickness": 2, "width": 6},
        "customdata": [f"{format_bytes(d.used)}, between {format_bytes(d.low)} and {format_bytes(d.high)}" for d in devices],
        "hovertemplate": "<b>all of it</b> %{customdata}<extra></extra>",
    }


def _mark(name: str, sizes: list[int | None], rows: list[int], dash: str) -> dict:
    """A vertical line across each device's row: a scatter line that breaks between rows."""
    x, y, said = [], [], []
    for row, size in zip(rows, sizes, strict=True):
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


def map_figure(found: FitMap) -> go.Figure:
    """A heat map, models by cards: the most faithful quant with which all of it fits; blank where none does."""
    rank = {quant: len(found.ladder) - at for at, quant in enumerate(found.ladder)}
    names = [_plain(f"{m.title} · {format_count(m.params)}") for m in found.models]
    cards = [_plain(f"{c.name} · {format_bytes(c.memory, 0)}") for c in found.cards]
    groups: dict[int, list[int]] = {}
    for at, card in enumerate(found.cards):
        groups.setdefault(round(card.memory / GIB), []).append(at)
    edges = [{"type": "line", "x0": members[0] - 0.5, "x1": members[0] - 0.5, "y0": -0.5, "y1": len(names) - 0.5,
              "line": {"color": GRID, "width": 1}} for members in list(groups.values())[1:]]
    figure = go.Figure(go.Heatmap(
        z=[[rank.get(quant) for quant in row] for row in found.best],
        text=[[quant or "does not fit in any" for quant in row] for row in found.best],
        customdata=None, colorscale="Cividis", zmin=1, zmax=len(rank), hoverongaps=True, xgap=0, ygap=1,
        hovertemplate="%{y}<br>%{meta}<br><b>%{text}</b><extra></extra>",
        colorbar={"tickvals": list(rank.values()), "ticktext": list(rank), "title": {"text": "best quant"}, "thickness": 14,
                  "len": min(1, 460 / max(12 * len(names), 1)) if len(names) > 40 else 1, "y": 1, "yanchor": "top", "outlinewidth": 0,
                  "tickfont": {"size": 11}}))
    return figure, cards, edges
