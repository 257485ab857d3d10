"""A sweep as a picture: one column of its table along, another up, a line for each value of a third."""

import math
from numbers import Real

from ..errors import LabError
from ..sweeps import Sweep
from .style import BLUE, GREEN, ORANGE, PINK, RED, SKY, layout

COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, PINK)
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "star", "x")


def sweep_picture(sweep: Sweep, x: str, y: str, by: str | None = None, logarithmic: bool = False) -> dict:
    """{"data", "layout"}: a trace for each value of the parameter `by`, whatever is done yet; the points that are.

    Raises LabError where `x` or `by` is no parameter.
    """
    for name in filter(None, (x, by)):
        if any(name not in point for point in sweep.points):
            raise LabError(f"{name!r} is no parameter of {sweep.name}; it has {', '.join(sweep.points[0])}")
    rows = list(sweep.table)
    lines = list(dict.fromkeys(str(point[by]) if by else "" for point in sweep.points))
    of = {line: [row for row in rows if (str(row[by]) if by else "") == line and _drawn(row.get(y))] for line in lines}
    along = [point[x] for point in sweep.points]
    numbers = all(isinstance(value, Real) for value in along)
    if numbers:
        of = {line: sorted(found, key=lambda row: row[x]) for line, found in of.items()}
    axis = {"range": _span(along)} if numbers else {"type": "category", "categoryarray": list(dict.fromkeys(map(str, along))),
                                                    "categoryorder": "array"}
    return {
        "data": [{"type": "scatter", "mode": "lines+markers", "name": line, "showlegend": bool(by),
                  "x": [row[x] if numbers else str(row[x]) for row in found], "y": [float(row[y]) for row in found],
                  "line": {"color": COLOURS[at % len(COLOURS)], "width": 2},
                  "marker": {"symbol": SYMBOLS[at % len(SYMBOLS)], "size": 8}} for at, (line, found) in enumerate(of.items())],
        "layout": layout(height=340, xaxis={**axis, "title": {"text": x, "font": {"size": 13}, "standoff": 4}},
                         yaxis={"type": "log" if logarithmic else "linear", "automargin": True,
                                "title": {"text": y, "font": {"size": 13}, "standoff": 4}})}


def _drawn(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _span(values: list) -> list[float]:
    """From the least to the most, and a little around it."""
    low, high = float(min(values)), float(max(values))
    around = (high - low or abs(high) or 1) * 0.04
    return [low - around, high + around]
