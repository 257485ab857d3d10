"""The timeline of a stream: a row for each reader, for copies, for waiting and computing; passes begin at the dotted lines.

A bar is an event; where there are more than a page draws, those that no gap of a pixel parts are one, paler for the gaps.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import plotly.graph_objects as go

from ..offload.trace import Event, Trace
from ..units import format_bytes, format_rate
from .live import Chart
from .style import BLUE, GREEN, GREY, ORANGE, PINK, SKY, layout

TRACKS = {"read": ("reading", BLUE), "copy": ("copying", SKY), "wait": ("waiting", ORANGE), "compute": ("computing", GREEN),
          "write": ("writing", PINK)}
MOST = 2000              # bars drawn
PASSES = 3               # shown where nobody says how many seconds
LINES = 100              # beginnings of passes that are shown at most
EVERY = 0.25             # seconds between two pictures while following
_AXIS = {"size": 13}
PIXELS = 1000            # that a timeline is wide, about


class Bar(NamedTuple):
    """One event, or `count` of them with `seconds` altogether."""

    start: float
    end: float
    count: int
    bytes: int
    seconds: float
    what: str


def trace_figure(trace: Trace, seconds: float | None = None) -> go.Figure:
    """The last `seconds` of a trace, or its last passes."""
    return go.Figure(trace_picture(trace, seconds))


def trace_picture(trace: Trace, seconds: float | None = None, most: int = MOST) -> dict:
    """{"data", "layout"}: milliseconds from the left edge. Traces, always the same: one a kind of event, and where passes
    begin. At most `most` bars, the last ones."""
    events, first, last = _window(trace, seconds)
    bars = _bars(events, first, last, most)
    if sum(map(len, bars.values())) >= most:       # earlier ones may have been left out
        first = max(first, min(found[0].start for found in bars.values() if found))
    lanes = list(bars)
    rows = {lane: row for row, lane in enumerate(lanes)}
    begun = [(what, when) for what, when in trace.marks if first <= when <= last][-LINES:]
    return {
        "data": [*(_kind(kind, {rows[lane]: found for lane, found in bars.items() if lane[0] == kind}, first)
                   for kind in TRACKS), _begun(begun, first, len(lanes))],
        "layout": layout(height=100 + 34 * max(3, len(lanes)), barmode="overlay", bargap=0.25, hovermode="closest",
                         xaxis={"tickformat": ",", "range": [0, max(1e-3, last - first) * 1e3], "title": {
                             "text": "milliseconds, measured", "font": _AXIS, "standoff": 4}},
                         yaxis={"automargin": True, "showgrid": False, "zeroline": False, "tickvals": list(rows.values()),
                                "ticktext": _names(lanes), "range": [max(3, len(lanes)) - 0.5, -0.5]}),
    }


class Timeline(Chart):
    """The timeline of a trace on a page: `update` shows what has happened since, `following` does so by itself."""

    def __init__(self, trace: Trace, seconds: float | None = None):
        self.trace, self.seconds, self._shown, self._lock = trace, seconds, trace.count, threading.Lock()
        super().__init__(trace_picture(trace, seconds), "a timeline of reading, copying, waiting and computing")

    def update(self) -> None:
        """Show the present state, where it is another."""
        with self._lock:
            now = self.trace.count
            if now != self._shown:
                self._shown = now
                self.present(trace_picture(self.trace, self.seconds))

    @contextmanager
    def following(self, every: float = EVERY) -> Iterator["Timeline"]:
        """Update while the block runs, and once more at its end."""
        over = threading.Event()

        def follow() -> None:
            while not over.wait(every):
                self.update()

        thread = threading.Thread(target=follow, daemon=True, name="llmlab timeline")
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()
            self.update()


def _window(trace: Trace, seconds: float | None) -> tuple[list[Event], float, float]:
    """Events that are shown, and from when to when."""
    events = trace.events
    last = max((event.end for event in events), default=0.0)
    first = min((event.start for event in events), default=0.0)
    if seconds is not None:
        first = max(first, last - seconds)
    elif passes := trace.passes[-PASSES:]:
        first = max(first, passes[0].start)
    return [event for event in events if event.end > first], first, last


def _names(lanes: list[tuple[str, str]]) -> list[str]:
    """"reading 1", "reading 2", "computing": a number where several tracks do the same."""
    found, tracks = [], {kind: [lane for lane in lanes if lane[0] == kind] for kind in TRACKS}
    for lane in lanes:
        same = tracks[lane[0]]
        found.append(TRACKS[lane[0]][0] + (f" {same.index(lane) + 1}" if len(same) > 1 else ""))
    return found


def _bars(events: list[Event], first: float, last: float, most: int) -> dict[tuple[str, str], list[Bar]]:
    """Of each kind on each track, kinds in their order, tracks by name."""
    found: dict[tuple[str, str], list[Bar]] = {}
    for event in sorted(events, key=lambda event: event.start):
        start = max(event.start, first)
        found.setdefault((event.kind, event.track), []).append(
            Bar(start, event.end, 1, event.bytes, event.end - start, event.what))
    if len(events) > most:
        found = {lane: _joined(bars, (last - first) / PIXELS) for lane, bars in found.items()}
        latest = sorted((bar.start for bars in found.values() for bar in bars), reverse=True)
        if len(latest) > most:
            found = {lane: [bar for bar in bars if bar.start > latest[most]] for lane, bars in found.items()}
    order = list(TRACKS)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def _joined(bars: list[Bar], gap: float) -> list[Bar]:
    """Neighbours no further apart than a gap as one."""
    found: list[Bar] = []
    for bar in bars:
        if found and bar.start - found[-1].end <= gap:
            one = found[-1]
            found[-1] = Bar(one.start, max(one.end, bar.end), one.count + bar.count, one.bytes + bar.bytes,
                            one.seconds + bar.seconds, one.what)
        else:
            found.append(bar)
    return found


def _kind(kind: str, rows: dict[int, list[Bar]], first: float) -> dict:
    label, colour = TRACKS[kind]
    bars = [(row, bar) for row, found in rows.items() for bar in found]
    return {"type": "bar", "orientation": "h", "name": label, "showlegend": bool(bars),
            "y": [row for row, _ in bars], "base": [round((bar.start - first) * 1e3, 4) for _, bar in bars],
            "x": [round((bar.end - bar.start) * 1e3, 4) for _, bar in bars],
            "marker": {"color": colour, "line": {"width": 0}, "opacity": [_share(bar) for _, bar in bars]},
            "customdata": [_words(bar) for _, bar in bars],
            "hovertemplate": f"<b>{label}</b> %{{customdata}}<extra></extra>"}


def _share(bar: Bar) -> float:
    """How much of a bar is events."""
    return 1.0 if bar.count == 1 else round(max(0.25, min(1.0, bar.seconds / max(1e-12, bar.end - bar.start))), 2)


def _words(bar: Bar) -> str:
    many = f" and {bar.count - 1:,} after it, together" if bar.count > 1 else ""
    said = [f"{bar.what}{many}", f"{bar.seconds * 1e3:.2f} ms"]
    if bar.bytes:
        said += [format_bytes(bar.bytes), *([format_rate(bar.bytes / bar.seconds)] if bar.seconds > 0 else ())]
    return ", ".join(said).replace("<", "&lt;")


def _begun(marks: list[tuple[str, float]], first: float, rows: int) -> dict:
    """Dotted lines where passes begin."""
    x = [at for _, when in marks for at in ((when - first) * 1e3, (when - first) * 1e3, None)]
    return {"type": "scatter", "mode": "lines", "name": "a pass begins", "showlegend": bool(marks), "x": x,
            "y": [-0.5, max(3, rows) - 0.5, None] * len(marks), "line": {"color": GREY, "width": 1, "dash": "dot"},
            "customdata": [name for what, _ in marks for name in (what, what, "")],
            "hovertemplate": "%{customdata} begins<extra></extra>"}
