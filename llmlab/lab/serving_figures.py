"""Figures of serving many at once: whose each block of the pool is, requests along time, policies side by side, throughput and
waiting against the number of people. Numbers in, plotly out."""

from collections.abc import Mapping, Sequence

from ..simulating import Beside, Simulation
from ..units import format_seconds
from .offload_figures import logarithmic
from .serving_run import KEPT, PREEMPTED, QUEUED, READING, WRITING, Frame, Held, Ran, tail
from .serving_state import NAMES, Point, point_of
from .style import BLUE, FAINT, GREEN, GREY, GRID, ORANGE, PINK, RED, SKY, YELLOW, layout

REQUESTS = (BLUE, ORANGE, GREEN, RED, PINK, "#882255", "#44AA99", "#999933")     # the ninth begins again with the first
SHADES = (1.0, 0.62, 0.25)                   # a block that is full, partly written, reserved and empty
FREE, CACHED, SHARED = range(3)
STATES = {QUEUED: ("queued", "#999999"), READING: ("reading the prompt", ORANGE), WRITING: ("writing", GREEN),
          PREEMPTED: ("preempted", RED), KEPT: ("ended, its blocks still held", PINK)}
COLUMNS = (17, 34, 68)
_AXIS = {"size": 13}
_FAINT = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID}        # of a second pair of axes
_BARE = {"showgrid": False, "zeroline": False, "showticklabels": False}


def _tinted(colour: str, alpha: float) -> str:
    return colour if alpha == 1 else "rgba({},{},{},{})".format(*(int(colour[at:at + 2], 16) for at in (1, 3, 5)), alpha)


_COLOURS = (FAINT, YELLOW, SKY, *(_tinted(colour, shade) for shade in SHADES for colour in REQUESTS))
_SCALE = [[at / len(_COLOURS), colour] for edge, colour in enumerate(_COLOURS) for at in (edge, edge + 1)]


def code(block: Held, size: int = 16) -> int:
    """Which of the colours a block has."""
    if block.whose <= 0:
        return CACHED if block.whose else FREE
    if block.holders > 1:
        return SHARED
    shade = 0 if block.cells >= size else 1 if block.cells else 2
    return SHARED + 1 + shade * len(REQUESTS) + (block.whose - 1) % len(REQUESTS)


def _said(number: int, block: Held, size: int) -> str:
    if block.whose <= 0:
        return f"block {number}: {'cached, its text is known' if block.whose else 'free'}"
    whose = f"{block.holders} requests" if block.holders > 1 else f"request {block.whose}"
    return f"block {number}: {whose}, {block.cells} of {size} cells written"


def pool_picture(frame: Frame | None, count: int, size: int = 16) -> dict:
    """{"data", "layout"}: the pool's blocks row by row, each in the colour of whose it is, exact. Traces, always the same: the
    blocks, and what a legend needs."""
    blocks = frame.blocks if frame else (Held(0, 0, 0),) * count
    wide = next((n for n in COLUMNS if 5 * n >= len(blocks)), COLUMNS[-1])
    rows = -(-len(blocks) // wide)
    codes = [code(block, size) for block in blocks] + [None] * (rows * wide - len(blocks))
    words = [_said(at, block, size) for at, block in enumerate(blocks)] + [""] * (rows * wide - len(blocks))
    whose = {(block.whose - 1) % len(REQUESTS) for block in blocks if block.whose > 0 and block.holders < 2}
    partly, empty = (any(one is not None and SHARED < one and (one - 3) // len(REQUESTS) == shade for one in codes)
                     for shade in (1, 2))
    kinds = [("free", FAINT, FREE in codes), ("cached", YELLOW, CACHED in codes), ("shared by several", SKY, SHARED in codes),
             *((f"request {at + 1}" + (", ..." if len(frame.requests) > len(REQUESTS) + at else "") if frame else "", colour,
                at in whose) for at, colour in enumerate(REQUESTS)),
             ("paler: partly written", _tinted(GREY, SHADES[1]), partly), ("palest: empty", _tinted(GREY, SHADES[2]), empty)]
    return {
        "data": [{"type": "heatmap", "z": [codes[at * wide:(at + 1) * wide] for at in range(rows)], "zmin": -0.5,
                  "zmax": len(_COLOURS) - 0.5, "colorscale": _SCALE, "showscale": False, "xgap": 2, "ygap": 2, "name": "blocks",
                  "customdata": [words[at * wide:(at + 1) * wide] for at in range(rows)],
                  "hovertemplate": "%{customdata}<extra></extra>"},
                 *({"type": "scatter", "mode": "markers", "x": [None], "y": [None], "name": name or "request",
                    "showlegend": there, "hoverinfo": "skip",
                    "marker": {"symbol": "square", "size": 11, "color": colour, "line": {"width": 1, "color": GREY}}}
                   for name, colour, there in kinds)],
        "layout": layout(height=96 + 26 * rows, margin={"l": 12, "r": 16, "t": 58, "b": 30},
                         xaxis={**_BARE, "range": [-0.5, wide - 0.5], "title": {
                             "text": f"the pool: {len(blocks)} blocks of {size} tokens", "font": _AXIS, "standoff": 4}},
                         yaxis={**_BARE, "range": [rows - 0.5, -0.5]}),
    }


def along_picture(frame: Frame | None, count: int) -> dict:
    """{"data", "layout"}: a row a request, what it did when, measured. Traces: one a state."""
    spans = frame.spans if frame else ()
    each = 22 if count <= 16 else 11
    last = max(tail(spans), frame.at if frame else 1.0)
    step = 1 if count <= 16 else 4
    return {
        "data": [{"type": "bar", "orientation": "h", "name": label, "width": 0.74,
                  "showlegend": any(span.state == state for span in spans),
                  "y": [span.request for span in spans if span.state == state],
                  "base": [round(span.start, 3) for span in spans if span.state == state],
                  "x": [round(span.end - span.start, 3) for span in spans if span.state == state],
                  "marker": {"color": colour, "line": {"width": 0}},
                  "hovertemplate": f"request %{{y}}: {label}, %{{x:.2f}} s, measured<extra></extra>"}
                 for state, (label, colour) in STATES.items()],
        "layout": layout(height=104 + each * count, barmode="overlay", margin={"l": 12, "r": 16, "t": 40, "b": 44},
                         xaxis={"range": [0, max(last, 0.5)], "nticks": 9, "title": {
                             "text": "seconds, measured", "font": _AXIS, "standoff": 4}},
                         yaxis={"automargin": True, "showgrid": False, "zeroline": False, "range": [count + 0.5, 0.5],
                                "tickvals": list(range(1, count + 1, step)),
                                "ticktext": [f"request {at}" for at in range(1, count + 1, step)]}),
    }


# ---- policies ---------------------------------------------------------------------------------------------------------

def race_picture(race: Mapping[str, Ran], beside: Sequence[Beside] = ()) -> dict:
    """{"data", "layout"}: each policy's tokens/s, and what became of the pool's cells, in the mean over time. Traces: measured,
    predicted; written, wasted, not reserved."""
    names, runs = [NAMES[one] for one in race], [one.found for one in race.values()]
    said = {one.name: one.predicted.tokens_per_second for one in beside}
    rows = list(range(len(names)))
    reserved = [run.over_time("used") / run.blocks for run in runs]
    wasted = [part * run.wasted_share for part, run in zip(reserved, runs, strict=True)]
    cells = (("holds keys and values", BLUE, [a - b for a, b in zip(reserved, wasted, strict=True)]),
             ("reserved, holds nothing", ORANGE, wasted), ("not reserved", FAINT, [1 - a for a in reserved]))
    axis = {"automargin": True, "showgrid": False, "zeroline": False, "range": [max(len(rows), 1) - 0.5, -0.5],
            "tickvals": rows}
    return {
        "data": [{"type": "bar", "orientation": "h", "name": "measured", "y": rows,
                  "x": [run.tokens_per_second for run in runs], "marker": {"color": GREEN, "line": {"width": 0}},
                  "width": 0.6, "showlegend": bool(rows), "hovertemplate": "%{x:.1f} tokens/s, measured<extra></extra>"},
                 {"type": "scatter", "mode": "markers", "name": "predicted", "x": [said.get(name) for name in names], "y": rows,
                  "marker": {"symbol": "diamond", "size": 11, "color": RED}, "showlegend": bool(said),
                  "hovertemplate": "%{x:.1f} tokens/s, predicted by what steps took<extra></extra>"},
                 *({"type": "bar", "orientation": "h", "name": name, "y": rows, "x": [100 * part for part in parts],
                    "xaxis": "x2", "yaxis": "y2", "marker": {"color": colour, "line": {"width": 0}}, "width": 0.6,
                    "showlegend": bool(rows), "hovertemplate": f"{name}: %{{x:.0f}} % of the pool, measured<extra></extra>"}
                   for name, colour, parts in cells)],
        "layout": layout(height=130 + 40 * max(len(rows), 1), barmode="stack", margin={"l": 12, "r": 24, "t": 58, "b": 44},
                         xaxis={"domain": [0, 0.46], "rangemode": "tozero", "nticks": 6, "title": {
                             "text": "tokens/s", "font": _AXIS, "standoff": 4}},
                         xaxis2={**_FAINT, "domain": [0.54, 1], "anchor": "y2", "range": [0, 100], "nticks": 6,
                                 "showgrid": False, "title": {
                                     "text": "% of the cache's cells, mean over time", "font": _AXIS, "standoff": 4}},
                         yaxis={**axis, "ticktext": names}, yaxis2={**_FAINT, **axis, "anchor": "x2", "showticklabels": False}),
    }


# ---- people -----------------------------------------------------------------------------------------------------------

def points_of(runs: Mapping[int, Simulation]) -> list[Point]:
    """Runs by how many were at once, as points."""
    return [point_of(run, n, steady=False) for n, run in runs.items()]


def people_picture(curve: Sequence[tuple[Point, Point, Point]], found: Sequence[Point] = (), now: Point | None = None,
                   kind: str = "modelled") -> dict:
    """{"data", "layout"}: against how many ask at once: all tokens a second; and what one waits for a token, and for the first.
    curve: (low, best, high); found: measured; now: what is chosen. Traces: the band, the curve, measured, now; then both
    waits, and both measured."""
    best, x = [row[1] for row in curve], [row[1].people for row in curve]
    here, at = [one.people for one in found], [now] if now else []
    every = x + here or [1, 8]
    rates = [one.tokens for row in curve for one in row] + [one.tokens for one in found]
    waits = [wait for one in [*best, *found, *at] for wait in (one.each, one.first)]
    ticks = {"type": "log", "tickvals": sorted(set(every)), "ticktext": [f"{n}" for n in sorted(set(every))],
             "title": {"text": "people at once", "font": _AXIS, "standoff": 4}}
    return {
        "data": [{"type": "scatter", "mode": "lines", "name": "range", "x": x + x[::-1], "fill": "toself",
                  "y": [row[2].tokens for row in curve] + [row[0].tokens for row in curve[::-1]],
                  "fillcolor": "rgba(0,114,178,.22)", "line": {"width": 0}, "hoverinfo": "skip",
                  "showlegend": any(row[0].tokens != row[2].tokens for row in curve)},
                 _line(kind, x, [one.tokens for one in best], BLUE, f"%{{x}} at once: %{{y:,.3g}} tokens/s, {kind}"),
                 _marks("measured", here, [one.tokens for one in found], RED, "%{x} at once: %{y:.3g} tokens/s, measured"),
                 {**_marks("now", [one.people for one in at], [one.tokens for one in at], BLUE,
                           "%{x} at once: %{y:,.4g} tokens/s, " + kind),
                  "marker": {"symbol": "circle-open", "size": 13, "color": BLUE, "line": {"width": 3}}},
                 _second(_line("seconds for a token", x, [one.each for one in best], GREEN,
                               f"%{{x}} at once: a token every %{{y:.3g}} s, {kind}")),
                 _second(_line("to the first token", x, [one.first for one in best], ORANGE,
                               f"%{{x}} at once: the first token after %{{y:.3g}} s, {kind}", "dash")),
                 _second(_marks("", here, [one.each for one in found], GREEN,
                                "%{x} at once: a token every %{y:.3g} s, measured")),
                 _second(_marks("", here, [one.first for one in found], ORANGE,
                                "%{x} at once: the first token after %{y:.3g} s, measured"))],
        "layout": layout(height=340, margin={"l": 12, "r": 16, "t": 58, "b": 44}, hovermode="closest",
                         xaxis={**ticks, "domain": [0, 0.44]}, xaxis2={**_FAINT, **ticks, "domain": [0.56, 1], "anchor": "y2"},
                         yaxis={"rangemode": "tozero", "range": [0, 1.08 * max(rates, default=1)], "automargin": True,
                                "nticks": 6, "title": {"text": "tokens/s, all together", "font": _AXIS, "standoff": 4}},
                         yaxis2={**_FAINT, **logarithmic(waits, "seconds"), "anchor": "x2", "automargin": False}),
    }


def _line(name: str, x: list, y: list, colour: str, said: str, dash: str = "solid") -> dict:
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "showlegend": bool(x),
            "line": {"color": colour, "width": 2, "dash": dash}, "hovertemplate": f"{said}<extra></extra>"}


def _marks(name: str, x: list, y: list, colour: str, said: str) -> dict:
    return {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "showlegend": bool(x and name),
            "marker": {"symbol": "x", "size": 9, "color": colour}, "hovertemplate": f"{said}<extra></extra>"}


def _second(trace: dict) -> dict:
    return {**trace, "xaxis": "x2", "yaxis": "y2"}


# ---- a prompt that all begin with -------------------------------------------------------------------------------------

def sharing_picture(sharing: Mapping[bool, Ran]) -> dict:
    """{"data", "layout"}: blocks in use along time, where what all begin with is kept once and where each keeps it; dots where
    the first token came in the mean. Traces: two each, once first."""
    return {
        "data": [trace for share, name, colour in ((True, "kept once", BLUE), (False, "kept by each", ORANGE))
                 for trace in _used(sharing.get(share), name, colour)],
        "layout": layout(height=280, margin={"l": 12, "r": 16, "t": 40, "b": 44},
                         xaxis={"rangemode": "tozero", "nticks": 9, "title": {
                             "text": "seconds, measured", "font": _AXIS, "standoff": 4}},
                         yaxis={"rangemode": "tozero", "automargin": True, "nticks": 6, "title": {
                             "text": "blocks in use", "font": _AXIS, "standoff": 4}}),
    }


def _used(ran: Ran | None, name: str, colour: str) -> list[dict]:
    steps = ran.found.history if ran else ()
    x = [step.at + step.seconds - steps[0].at for step in steps]
    first = ran.found.mean("first_seconds") if ran else None
    at = next((step.used for step, when in zip(steps, x, strict=True) if when >= first), 0) if ran else None
    return [{"type": "scatter", "mode": "lines", "name": name, "x": x, "y": [step.used for step in steps],
             "line": {"color": colour, "width": 2, "shape": "hv"}, "showlegend": bool(ran),
             "hovertemplate": f"{name}: %{{y}} blocks after %{{x:.2f}} s, measured<extra></extra>"},
            {"type": "scatter", "mode": "markers", "name": f"{name}: first tokens", "x": [first] if ran else [],
             "y": [at] if ran else [], "marker": {"color": colour, "size": 11}, "showlegend": False,
             "hovertemplate": f"{name}: the first token after {format_seconds(first) if ran else ''} in the mean, measured"
                              "<extra></extra>"}]
