"""Figures of quantization: a block's weights before and after, a tensor's errors, published and measured quality by size."""

from math import ceil, log2

import numpy as np
import plotly.graph_objects as go

from ..catalog import Quality, measured_quality, quality
from ..units import GIB, format_bytes
from .quantization_state import Look
from .style import BLUE, GREEN, GREY, ORANGE, RED, layout

MOST_LEVELS = 64         # as lines in a chart; more would be a grey area
SIZES = {"bits": "bits per weight", "bytes": "GiB of Llama 3 8B's file"}
DAMAGES = {"loss": "perplexity above f16's, %", "mean_kld": "mean KL divergence, nats"}
_NAMED = {("Q8_0", False), ("Q6_K", False), ("Q5_K_M", False), ("Q4_K_M", False), ("Q4_0", False), ("IQ4_XS", True),
          ("Q3_K_S", False), ("Q3_K_M", True), ("IQ3_XXS", True), ("Q2_K", False), ("IQ2_XS", True), ("IQ1_S", True)}


def values_picture(look: Look) -> dict:
    """{"data", "layout"}: the levels the toy format has, each weight of the block, and what it becomes."""
    at = look.start + np.arange(len(look.original))
    x, y = [], []
    for start, stop, levels in look.levels:
        if len(levels) <= MOST_LEVELS:
            for level in levels.tolist():
                x += [start - 0.5, stop - 0.5, None]
                y += [level, level, None]
    small = 6 if len(at) <= 64 else 4
    return {
        "data": [
            {"type": "scatter", "mode": "lines", "name": f"levels of {look.toy.name}", "x": x, "y": y, "hoverinfo": "skip",
             "line": {"color": GREY, "width": 0.6}, "opacity": 0.7, "connectgaps": False},
            {"type": "scatter", "mode": "markers", "name": f"as stored in {look.format.name}", "x": at, "y": look.original,
             "marker": {"color": BLUE, "size": small + 2, "symbol": "circle-open", "line": {"width": 2}},
             "hovertemplate": "<b>weight %{x}</b> as stored %{y:.6g}<extra></extra>"},
            {"type": "scatter", "mode": "markers", "name": "rounded", "x": at, "y": look.rounded,
             "marker": {"color": ORANGE, "size": small, "symbol": "circle"},
             "hovertemplate": "<b>weight %{x}</b> rounded %{y:.6g}<extra></extra>"}],
        "layout": layout(height=300, margin={"l": 12, "r": 16, "t": 40, "b": 40},
                         xaxis={"title": {"text": "weight of the row", "font": {"size": 13}, "standoff": 4},
                                "range": [look.start - 1, look.start + len(at)], "zeroline": False, "showgrid": False},
                         yaxis={"automargin": True, "nticks": 7}),
    }


def errors_picture(look: Look) -> dict:
    """{"data", "layout"}: how many weights are how far off, in shares of the RMS weight."""
    error = look.error
    scale = error.rms or 1.0
    middle, width = (error.edges[1:] + error.edges[:-1]) / 2 / scale, (error.edges[1] - error.edges[0]) / scale
    reach = 2.0 ** ceil(log2(max(error.edges[-1] / scale, 2**-10)))
    return {
        "data": [{"type": "bar", "name": "weights", "x": middle, "y": error.counts / error.weights * 100, "width": width,
                  "marker": {"color": BLUE, "line": {"width": 0}}, "showlegend": False,
                  "hovertemplate": "%{x:.3f} RMS weights off: %{y:.2f} %<extra></extra>"}],
        "layout": layout(height=240, margin={"l": 12, "r": 16, "t": 16, "b": 40},
                         xaxis={"range": [-reach, reach], "nticks": 9,
                                "title": {"text": "error, in RMS weights of the tensor", "font": {"size": 13}, "standoff": 4}},
                         yaxis={"automargin": True, "nticks": 5, "rangemode": "tozero",
                                "title": {"text": "% of the weights", "font": {"size": 13}, "standoff": 4}}),
    }


def quality_figure(size: str = "bits", damage: str = "loss") -> go.Figure:
    """Published quality of Llama 3 8B by quant: size ("bits", "bytes") along, damage ("loss", "mean_kld") up, logarithmic."""
    return go.Figure(quality_picture(size, damage))


def quality_picture(size: str = "bits", damage: str = "loss") -> dict:
    """{"data", "layout"} of quality_figure. Traces: without and with an importance matrix."""
    rows = [row for row in quality().values() if getattr(row, damage)]          # f16 itself has lost nothing: no logarithm
    return {
        "data": [_points([row for row in rows if row.importance is with_matrix], size, damage, *looks) for with_matrix, *looks
                 in ((False, "plain", BLUE, "circle"), (True, "with an importance matrix", ORANGE, "diamond"))],
        "layout": _axes(size, damage),
    }


def rates_figure(damage: str = "mean_kld") -> go.Figure:
    """SmolLM2 135M as measured, quants (also of a longer search) and mixes by measurement, and Llama 3 8B as published: bits a
    weight along, damage ("mean_kld", "loss") up, logarithmic; hovering says how fast. Two models on two texts: shapes compare,
    heights do not."""
    return go.Figure(rates_picture(damage))


def rates_picture(damage: str = "mean_kld") -> dict:
    """{"data", "layout"} of rates_figure. Traces: SmolLM2's quants without and with an importance matrix, its mixes (with one),
    what a longer search makes of all these at the same bytes, Llama 3 8B."""
    ours = [row for row in measured_quality().values() if getattr(row, damage) > 0]     # the rest have no logarithm
    longer, usual = ([row for row in ours if row.what.endswith(" high") is high] for high in (True, False))
    quants, mixes = ([row for row in usual if row.what.startswith("mix") is mixed] for mixed in (False, True))
    published = [row for row in quality().values() if getattr(row, damage) and row.what != "F16"]
    return {
        "data": [_points([row for row in quants if not row.importance], "bits", damage, "SmolLM2 135M", BLUE, "circle",
                         _NAMED - {("Q2_K", False)}),               # as large as Q3_K_S here, and the same
                 _points([row for row in quants if row.importance], "bits", damage, "with an importance matrix", ORANGE,
                         "diamond", set()),
                 _points(mixes, "bits", damage, "mixes by measurement", GREEN, "star",
                         {(row.what, True) for row in mixes}, "bottom center"),
                 _points(longer, "bits", damage, "longer search", RED, "triangle-down", set()),
                 _points(published, "bits", damage, "Llama 3 8B, published", GREY, "circle-open",
                         _NAMED - {("Q2_K", False), ("Q3_K_S", False), ("Q4_0", False)}, "bottom left")],
        "layout": _axes("bits", damage),
    }


def _axes(size: str, damage: str) -> dict:
    return layout(height=440, margin={"l": 12, "r": 16, "t": 40, "b": 44},
                  xaxis={"title": {"text": SIZES[size], "font": {"size": 13}, "standoff": 4}, "rangemode": "normal"},
                  yaxis={"type": "log", "automargin": True, "dtick": 1, "exponentformat": "none",
                         "title": {"text": DAMAGES[damage], "font": {"size": 13}, "standoff": 4}})


def _points(rows: list[Quality], size: str, damage: str, name: str, colour: str, symbol: str,
            named: set[tuple[str, bool]] = _NAMED, position: str = "") -> dict:
    x = np.array([getattr(row, size) for row in rows]) / (GIB if size == "bytes" else 1)
    return {
        "type": "scatter", "mode": "markers+text", "name": name, "x": x,
        "y": np.array([getattr(row, damage) for row in rows]) * (100 if damage == "loss" else 1),
        "text": [row.what if (row.what, row.importance) in named else "" for row in rows],
        "textposition": position or ("top right" if symbol == "circle" else "bottom left"),
        "textfont": {"size": 11, "color": GREY}, "marker": {"color": colour, "symbol": symbol, "size": 8},
        "customdata": [f"{row.what}{', importance matrix' if row.importance else ''}<br>{row.bits:.2f} bits, "
                       f"{format_bytes(row.bytes)}<br>perplexity {row.loss:+.2%}, KLD {row.mean_kld:.4g}"
                       + (f"<br>{row.tokens_per_second:.0f} tokens/s" if row.tokens_per_second else "") for row in rows],
        "hovertemplate": "%{customdata}<extra></extra>"}
