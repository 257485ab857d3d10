"""Figures of a router: quality against the share of calls, and each question's doubt against the threshold."""

import math

from ..endpoints import Curve, Decision
from .style import BLUE, GREEN, GREY, ORANGE, RED, layout

_LINES = (("an oracle", "oracle", GREEN, "dot"), ("by the signal", "quality", BLUE, "solid"),
          ("by chance", "by_chance", GREY, "dash"))


def curve_picture(curve: Curve | None, share: float) -> dict:
    """{"data", "layout"}: how many answers are right by the share of calls sent out, and where the slider stands."""
    data = []
    for name, which, colour, dash in _LINES:
        quality = getattr(curve, which) if curve else []
        data.append({"type": "scatter", "mode": "lines", "name": name if name != "by the signal" or not curve else
                     f"by {curve.signal}", "x": [100 * one for one in curve.share] if curve else [],
                     "y": [100 * one for one in quality], "line": {"color": colour, "dash": dash, "width": 2},
                     "customdata": [1000 * one for one in curve.cost] if curve else [],
                     "hovertemplate": f"{name}: %{{y:.0f}} % right with %{{x:.0f}} % sent out"
                                      + (", %{customdata:.4f} for 1,000 questions" if which == "quality" else "")
                                      + "<extra></extra>"})
    k = curve.at(share) if curve else 0
    data.append({"type": "scatter", "mode": "markers", "name": "at most", "x": [100 * curve.share[k]] if curve else [],
                 "y": [100 * curve.quality[k]] if curve else [], "marker": {"color": RED, "size": 13, "symbol": "diamond"},
                 "hovertemplate": "%{y:.0f} % right with %{x:.0f} % sent out<extra></extra>"})
    return {"data": data, "layout": layout(
        height=300, margin={"l": 60, "r": 16, "t": 56, "b": 48},
        xaxis={"title": {"text": "% of the questions sent out", "standoff": 4}, "range": [-2, 102]},
        yaxis={"title": {"text": "% right", "standoff": 4}, "nticks": 6})}


def decisions_picture(decisions: tuple[Decision, ...], threshold: float | None) -> dict:
    """{"data", "layout"}: a mark for each question, its doubt; those above the line should go out."""
    known = [(at, one) for at, one in enumerate(decisions, 1) if one.signal is not None and math.isfinite(one.signal)]
    groups = (("answered here", BLUE, "circle", lambda one: one.where == "local" and one.reason == "sure"),
              ("went out", ORANGE, "triangle-up", lambda one: one.where == "remote"),
              ("held back", RED, "x", lambda one: one.where == "local" and one.reason != "sure"))
    data = []
    for name, colour, symbol, belongs in groups:
        found = [(at, one) for at, one in known if belongs(one)]
        data.append({"type": "scatter", "mode": "markers", "name": name, "x": [at for at, _ in found],
                     "y": [one.signal for _, one in found], "marker": {"color": colour, "symbol": symbol, "size": 11},
                     "customdata": [one.why for _, one in found],
                     "hovertemplate": "question %{x}: %{y:.3f}, %{customdata}<extra></extra>"})
    there = threshold is not None and math.isfinite(threshold)
    last = max(len(decisions), 5) + 0.5
    data.append({"type": "scatter", "mode": "lines", "name": "threshold", "x": [0.5, last] if there else [],
                 "y": [threshold] * 2 if there else [], "line": {"color": GREY, "dash": "dash"}, "hoverinfo": "skip"})
    return {"data": data, "layout": layout(
        height=240, margin={"l": 60, "r": 16, "t": 56, "b": 48},
        xaxis={"title": {"text": "question", "standoff": 4}, "range": [0.5, last], "dtick": 1 if last < 20 else None},
        yaxis={"title": {"text": "unsure", "standoff": 4}, "rangemode": "tozero", "nticks": 6})}
