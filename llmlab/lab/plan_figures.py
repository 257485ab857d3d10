"""Figures of a plan: what lives in which tier, against its budget, and what a pass's seconds go to. Numbers in, plotly out."""

import plotly.graph_objects as go

from ..offload.planned_words import binding, rate
from ..offload.planning import Plan
from ..units import GIB, format_bytes, format_seconds
from .style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, TERMS, YELLOW, layout

ROWS = ("device", "ram", "ssd")
WHAT = {**TERMS, "slots": ("slots", SKY), "experts": ("cache of experts", GREEN), "small": ("norms and the like", PINK),
        "staging": ("pinned ring", YELLOW), "compute": ("workspace", "#44AA99")}
WAYS = {"SSD": ("reading the SSD", RED), "link": ("link to the device", ORANGE), "KV": ("KV cache from RAM", YELLOW),
        "compute": ("computing", BLUE)}
HEIGHT = 430


def plan_figure(plan: Plan) -> go.Figure:
    """A bar a tier, stacked by what takes the bytes, against its budget; below, a bar for each way a pass's seconds go."""
    return go.Figure(plan_picture(plan))


def plan_picture(plan: Plan) -> dict:
    """{"data", "layout"} of plan_figure. Its traces are the same whatever it shows: one for each of `WHAT`, the budgets, the
    seconds by way, and the whole pass with its band."""
    found = plan.predict()
    names = {"device": plan.site.title, "ram": "RAM", "ssd": "SSD"}
    room = {"device": plan.site.device, "ram": plan.site.ram}
    sizes = {tier: plan.used(tier) for tier in ROWS}
    near = [size for size in room.values() if size < 4 * max(sizes.values())]      # a budget far beyond the bars is not drawn
    longest = max([*sizes.values(), *near, 1])
    total = found.times.usual.seconds
    slow, _, fast = (found.tokens_a_pass / r for r in found.decode)
    ways = list(WAYS)
    return {
        "data": [*(_bar(plan, name) for name in WHAT), _budgets(room, longest),
                 {"type": "bar", "orientation": "h", "name": "seconds a pass", "showlegend": False, "xaxis": "x2",
                  "yaxis": "y2", "y": [0, 1, 2, 3], "x": [found.seconds.get(way, 0.0) for way in ways],
                  "marker": {"color": [WAYS[way][1] for way in ways]},
                  "text": [f"{format_seconds(found.seconds[way])}, {min(found.seconds[way] / total, 1):.0%}".replace("%", " %")
                           if found.seconds.get(way) else "" for way in ways],
                  "textposition": "outside", "cliponaxis": False, "hovertemplate": "%{text} of a pass<extra></extra>"},
                 {"type": "scatter", "mode": "markers", "name": "a pass, with its band (modelled)", "xaxis": "x2",
                  "yaxis": "y2", "x": [total], "y": [4],
                  "marker": {"symbol": "line-ns-open", "size": 16, "color": GREY, "line": {"width": 3}},
                  "error_x": {"type": "data", "symmetric": False, "array": [max(slow - total, 0)], "color": GREY, "width": 6,
                              "arrayminus": [max(total - fast, 0)], "thickness": 2},
                  "hovertemplate": f"{rate(found.decode)}, {binding(found)}<extra></extra>"}],
        "layout": layout(
            barmode="stack", bargap=0.35, height=HEIGHT,
            xaxis={"domain": [0, 1], "anchor": "y", "range": [0, 1.06 * longest / GIB], "fixedrange": True,
                   "title": {"text": "GiB", "font": {"size": 13}, "standoff": 4}},
            yaxis={"domain": [0.55, 1], "anchor": "x", "tickvals": [0, 1, 2], "range": [2.5, -0.5], "automargin": True,
                   "fixedrange": True, "showgrid": False, "zeroline": False,
                   "ticktext": [f"{_plain(names[tier])}<br>{format_bytes(sizes[tier])}" for tier in ROWS]},
            xaxis2={**_second(), "anchor": "y2", "range": [0, 1.25 * max(slow, *found.seconds.values())], "fixedrange": True,
                    "title": {"text": "seconds of one pass: these overlap", "font": {"size": 13}, "standoff": 4}},
            yaxis2={**_second(), "domain": [0, 0.36], "anchor": "x2", "tickvals": [0, 1, 2, 3, 4], "range": [4.6, -0.6],
                    "ticktext": [*(WAYS[way][0] for way in ways), "in all"], "automargin": True, "fixedrange": True,
                    "showgrid": False, "zeroline": False},
            uniformtext={"minsize": 10, "mode": "hide"}),
    }


def _second() -> dict:
    """The look of axes that `style.layout` does not name."""
    from .style import GRID
    return {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID}


def _bar(plan: Plan, name: str) -> dict:
    terms = [next((t for t in plan.terms if t.name == name and t.device == tier), None) for tier in ROWS]
    label, colour = WHAT[name]
    return {
        "type": "bar", "orientation": "h", "name": label, "y": [0, 1, 2], "x": [t.bytes / GIB if t else 0 for t in terms],
        "marker": {"color": colour, "line": {"width": 0}}, "showlegend": any(t and t.bytes for t in terms),
        "text": [f"{t.bytes / GIB:.2f}" if t and t.bytes else "" for t in terms], "textposition": "inside", "textangle": 0,
        "insidetextanchor": "middle", "constraintext": "inside",
        "customdata": [f"{format_bytes(t.bytes)}, {t.kind}<br>{_plain(t.why)}" if t else "" for t in terms],
        "hovertemplate": f"<b>{label}</b> %{{customdata}}<extra></extra>"}


def _budgets(room: dict[str, int], longest: int) -> dict:
    """What the device and RAM may hold: a line across each row; none where it lies far beyond the bars."""
    x, y, said = [], [], []
    for row, tier in enumerate(ROWS[:2]):
        at = room[tier] / GIB if room[tier] <= longest else None
        x += [at, at, None]
        y += [row - 0.42, row + 0.42, None]
        said += [format_bytes(room[tier])] * 2 + [""]
    return {"type": "scatter", "mode": "lines", "name": "budget", "x": x, "y": y, "customdata": said, "connectgaps": False,
            "line": {"color": RED, "width": 3}, "hovertemplate": "<b>budget</b> %{customdata}<extra></extra>"}


def _plain(text: str) -> str:
    """Text that plotly will not read as markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
