"""Figures of advice: quality against memory and against speed with their frontiers, generations told apart; old against new; a
tenth of the memory."""

from collections.abc import Sequence

import plotly.graph_objects as go

from ..advice import Choice
from ..advice.generations import SHARE, Match
from ..units import GIB
from .advice_state import Look, quality_words, speed_words
from .style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, YELLOW, layout

AGES = (("to 2023", "2023-12", GREY, "circle"), ("early 2024", "2024-06", PINK, "square"),
        ("late 2024", "2024-12", ORANGE, "diamond"), ("early 2025", "2025-06", SKY, "triangle-up"),
        ("late 2025", "2025-12", BLUE, "star"), ("since 2026", "", GREEN, "cross"))
"""Half years: a name, the last month, a colour and a marker."""
AXES = {"GiB": "GiB in all, memory beside weights and cache modelled", "speed": "tokens/s with the context full, modelled"}
ANSWERS = {"ahead": (GREEN, "triangle-up"), "behind": (RED, "x"), "too near": (GREY, "circle")}
REACHED = {"yes": (GREEN, "triangle-up"), "no": (RED, "x"), "too near": (GREY, "circle")}
WIDE, HIGH = 460, 330             # pixels that a chart has at least, for names that shall not lie on each other


def advice_figure(look: Look, against: str = "GiB") -> go.Figure:
    """Quality to expect against "GiB" or "speed": each model's first choice and the frontier."""
    return go.Figure(advice_picture(look, against))


def advice_picture(look: Look, against: str = "GiB", chosen: Choice | None = None) -> dict:
    """{"data", "layout"} of advice_figure. Traces: the frontier, a trace for each of AGES, the chosen one. What is expected
    below the last model's first choice is left out: it is there only because it is small. First choices have their range."""
    bottom = min((c.quality[1] for c in look.advice.leaders), default=0)
    frontier = [c for c in (look.by_size if against == "GiB" else look.by_speed) if c.quality[1] >= bottom]

    def cost(c: Choice) -> float:
        return c.bytes / GIB if against == "GiB" else c.decode

    shown = [c for c in look.shown if c.quality[1] >= bottom and (against == "GiB" or c.decode)]
    everything = [*shown, *([chosen] if chosen and (against == "GiB" or chosen.decode) else [])]
    top, right = max((c.quality[2] for c in everything), default=100), max(map(cost, everything), default=10)
    least = min((c.quality[0] for c in look.advice.leaders), default=0)
    least = max(least, bottom - 0.4 * (top - bottom))
    room = 0.08 * (top - least) or 1
    span = (0, 1.08 * right), (least - room, top + room)
    first = set(map(id, look.advice.leaders))
    names = _named(everything[::-1], frontier, cost, span)
    return {
        "data": [{"type": "scatter", "mode": "lines", "name": "frontier", "x": [cost(c) for c in frontier],
                  "y": [c.quality[1] for c in frontier], "hoverinfo": "skip",
                  "line": {"color": GREY, "width": 1.5, "dash": "dot", "shape": "hv" if against == "GiB" else "linear"}},
                 *(_aged(at, [c for c in shown if _age(c) == at], cost, names, first) for at in range(len(AGES))),
                 {"type": "scatter", "mode": "markers", "name": "chosen", "x": [cost(c) for c in everything[len(shown):]],
                  "y": [c.quality[1] for c in everything[len(shown):]], "hoverinfo": "skip", "showlegend": False,
                  "marker": {"symbol": "circle-open", "size": 20, "color": RED, "line": {"width": 2}}}],
        "layout": layout(height=400, margin={"l": 12, "r": 16, "t": 56, "b": 44},
                         xaxis={"title": {"text": AXES[against], "font": {"size": 13}, "standoff": 4}, "range": list(span[0])},
                         yaxis={"automargin": True, "nticks": 8, "range": list(span[1]),
                                "title": {"text": f"{look.advice.setting.benchmark.name} to expect", "font": {"size": 13},
                                          "standoff": 4}}),
    }


def _age(c: Choice) -> int:
    return next(at for at, (_, last, *_) in enumerate(AGES) if not last or c.entry.release[:7] <= last)


def _aged(at: int, choices: Sequence[Choice], cost, names: set[int], first: set[int]) -> dict:
    name, _, colour, symbol = AGES[at]
    ranges = [c.quality if id(c) in first else (c.quality[1],) * 3 for c in choices]
    return {"type": "scatter", "mode": "markers+text", "name": name, "showlegend": bool(choices),
            "x": [cost(c) for c in choices], "y": [c.quality[1] for c in choices],
            "text": [c.entry.name if id(c) in names else "" for c in choices], "textposition": "bottom center",
            "textfont": {"size": 11, "color": GREY},
            "marker": {"color": colour, "symbol": symbol, "opacity": 1, "line": {"width": 0},
                       "size": [10 if id(c) in first else 6 for c in choices]},
            "error_y": {"type": "data", "symmetric": False, "color": colour, "thickness": 1, "width": 3,
                        "array": [high - best for _, best, high in ranges],
                        "arrayminus": [best - low for low, best, _ in ranges]},
            "customdata": [f"<b>{c.entry.name}</b>, {c.entry.release}, {c.quant}<br>{quality_words(c)}<br>"
                           f"{c.bytes / GIB:.1f} GiB, {speed_words(c)} tokens/s<br>{c.placement}" for c in choices],
            "hovertemplate": "%{customdata}<extra></extra>"}


def _named(choices: Sequence[Choice], first: Sequence[Choice], cost, span) -> set:
    """Which are named: the frontier's first, then others, as far as no name lies on another or outside; each model once."""
    (left, right), (bottom, top) = span
    boxes, found, models = [], set(), set()
    for c in [*choices[:1], *reversed(first), *choices]:
        x, y = (cost(c) - left) / (right - left) * WIDE, (c.quality[1] - bottom) / (top - bottom) * HIGH
        half = 3.6 * len(c.entry.name) + 4
        box = x - half, x + half, y - 26, y - 6
        free = all(box[1] < a or b < box[0] or box[3] < low or high < box[2] for a, b, low, high in boxes)
        if free and box[0] > -20 and box[1] < WIDE and box[2] > 0 and c.model not in models:
            boxes.append(box)
            found.add(id(c))
            models.add(c.model)
    return found


# ---- two claims -----------------------------------------------------------------------------------------------------

def against_picture(found: Sequence[Match]) -> dict:
    """{"data", "layout"}: a row a comparison; the newer one's lead, with what chance does to it. Traces: one for each of
    ANSWERS."""
    rows = list(found)
    title = "the newer one's lead: points, or wins in 100 beyond half"
    return {
        "data": [_compared(word, look, [(at, m) for at, m in enumerate(rows) if m.verdict.startswith(word)])
                 for word, look in ANSWERS.items()],
        "layout": _rows_layout([f"{m.smaller.name}: {m.setting.benchmark.name}" for m in rows], title, 0),
    }


def _compared(word: str, look: tuple[str, str], rows: list[tuple[int, Match]]) -> dict:
    colour, symbol = look
    leads = [m.lead for _, m in rows]
    return {"type": "scatter", "mode": "markers", "name": word, "showlegend": bool(rows), "y": [at for at, _ in rows],
            "x": [best for _, best, _ in leads],
            "error_x": {"type": "data", "symmetric": False, "array": [high - best for _, best, high in leads],
                        "arrayminus": [best - low for low, best, _ in leads], "color": colour, "thickness": 1.5, "width": 4},
            "marker": {"color": colour, "symbol": symbol, "size": 10},
            "customdata": [f"{m}<br>{m.bytes[1] / GIB:.1f} GiB to {m.bytes[0] / GIB:.1f}<br>{m.setting.source[:60]}"
                           for _, m in rows],
            "hovertemplate": "%{customdata}<extra></extra>"}


def tenths_picture(found: Sequence[Match]) -> dict:
    """{"data", "layout"}: a row a setting; the share of the large model's score that the small one has. Traces: one for each of
    REACHED."""
    rows = sorted(found, key=lambda m: m.share[1])
    return {
        "data": [_shared(word, look, [(at, m) for at, m in enumerate(rows) if m.reached.startswith(word)])
                 for word, look in REACHED.items()],
        "layout": _rows_layout([f"{m.smaller.name}: {m.setting.benchmark.name}" for m in rows],
                               "share of the large one's score, %", 100 * SHARE),
    }


def _shared(word: str, look: tuple[str, str], rows: list[tuple[int, Match]]) -> dict:
    colour, symbol = look
    names = {"yes": f"{SHARE:.0%} reached", "no": "not reached", "too near": "too near to tell"}
    return {"type": "scatter", "mode": "markers", "name": names[word], "showlegend": bool(rows), "y": [at for at, _ in rows],
            "x": [min(100 * m.share[1], 120) for _, m in rows],
            "error_x": {"type": "data", "array": [100 * (m.share[2] - m.share[1]) for _, m in rows], "color": colour,
                        "thickness": 1.5, "width": 3},
            "marker": {"color": colour, "symbol": symbol, "size": 9},
            "customdata": [f"{m.smaller.name} {m.share[1]:.0%} of {m.larger.name}<br>{m.setting.name}<br>"
                           f"{m.part:.0%} of its bytes" for _, m in rows],
            "hovertemplate": "%{customdata}<extra></extra>"}


def _rows_layout(names: list[str], title: str, line: float) -> dict:
    return layout(height=110 + 19 * len(names), margin={"l": 12, "r": 16, "t": 40, "b": 44},
                  xaxis={"title": {"text": title, "font": {"size": 13}, "standoff": 4}, "nticks": 8, "zeroline": False},
                  yaxis={"automargin": True, "tickvals": list(range(len(names))), "ticktext": names, "showgrid": False,
                         "zeroline": False, "range": [len(names) - 0.4, -0.6], "tickfont": {"size": 11}},
                  shapes=[{"type": "line", "x0": line, "x1": line, "y0": 0, "y1": 1, "yref": "paper",
                           "line": {"color": YELLOW, "width": 2, "dash": "dash"}}])
