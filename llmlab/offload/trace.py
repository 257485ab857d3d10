"""What a stream did and when: reads, copies, waits, computing and writes, each with its seconds and bytes, and sums over them.

A trace keeps the last events alone, so that it may run along for days; its totals are of all of them. Everything is measured.
"""

import contextlib
import json
import os
import secrets
import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable
from html import escape
from operator import itemgetter
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from ..catalog import Table
from ..errors import LabError
from ..gguf.words import show_path
from ..units import MB, format_bytes, format_rate, format_seconds

KINDS = ("read", "copy", "wait", "compute", "write")
Span = tuple[float, float]


class Event(NamedTuple):
    """`kind` of KINDS, `what` it was about (a piece), from `start` to `end` in seconds of time.perf_counter, the `bytes` that
    were moved, and the `track` it happened on: the name of the thread, or a name that was given, such as a CUDA stream's."""

    kind: str
    what: str
    start: float
    end: float
    bytes: int
    track: str

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Total(NamedTuple):
    """Of all events of a kind: how many, their seconds (those at the same time count each) and bytes."""

    count: int
    seconds: float
    bytes: int


class Pass(NamedTuple):
    """From the moment it was marked until the last computing in it ended, seconds of time.perf_counter."""

    what: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Trace:
    """Events of several threads, the last `most` of them and as many marks.

    Adding one takes about a microsecond. `busy`, `overlap`, `rate`, `passes` and `table` are of the events that are kept.
    """

    def __init__(self, most: int = 20_000):
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise LabError(f"most is {most!r:.40}; give a whole number of events to keep, from 1 up")
        self.most, self._lock = most, threading.Lock()
        self.clear()

    # ---- what happens --------------------------------------------------------------------------------------------

    def add(self, kind: str, what: str, start: float, end: float, bytes: int = 0, track: str | None = None) -> None:
        """One thing that happened, seconds of time.perf_counter. Raises LabError for a kind that is none of KINDS."""
        event = kind, what, start, end, bytes, track or threading.current_thread().name        # a plain tuple is made quicker
        with self._lock:
            try:
                sums = self._sums[kind]
            except KeyError:
                raise LabError(f"{kind!r:.40} is no kind of event; there are {', '.join(KINDS)}") from None
            sums[0] += 1
            sums[1] += end - start
            sums[2] += bytes
            self._events.append(event)

    def span(self, kind: str, what: str, bytes: int = 0) -> "Timing":
        """`with trace.span("read", "blk.3", size):` adds what the block took, also where it raises. Its `bytes` may be set
        inside the block, where they are known later."""
        return Timing(self, kind, what, bytes)

    def mark(self, what: str) -> None:
        """A pass begins now: "token 5"."""
        now = perf_counter()
        with self._lock:
            self._marks.append((what, now))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._events: deque[tuple] = deque(maxlen=self.most)
            self._marks: deque[tuple[str, float]] = deque(maxlen=self.most)
            self._sums = {kind: [0, 0.0, 0] for kind in KINDS}

    # ---- what happened -------------------------------------------------------------------------------------------

    @property
    def events(self) -> tuple[Event, ...]:
        """Those that are kept, as they ended."""
        with self._lock:
            return tuple(map(Event._make, self._events))

    @property
    def marks(self) -> tuple[tuple[str, float], ...]:
        """(what, when) of the passes that began, seconds of time.perf_counter."""
        with self._lock:
            return tuple(self._marks)

    @property
    def count(self) -> int:
        """Events that were added, those not kept among them."""
        with self._lock:
            return sum(sums[0] for sums in self._sums.values())

    def totals(self) -> dict[str, Total]:
        """{kind: Total} of every event since the beginning, kinds that happened alone."""
        with self._lock:
            return {kind: Total(*sums) for kind, sums in self._sums.items() if sums[0]}

    def busy(self, kind: str, start: float = float("-inf"), end: float = float("inf")) -> float:
        """Seconds, from `start` to `end`, in which anything of a kind went on: what several threads did at once counts once."""
        return _length(_cut(_merged(self._spans(kind)), start, end))

    def overlap(self, kind: str, other: str, start: float = float("-inf"), end: float = float("inf")) -> float:
        """Seconds in which both kinds went on."""
        return _length(_cut(_both(_merged(self._spans(kind)), _merged(self._spans(other))), start, end))

    def rate(self, kind: str = "read", start: float = float("-inf"), end: float = float("inf")) -> float | None:
        """Bytes a second while anything of a kind went on, of the events that lie from `start` to `end`; None where there are
        none."""
        events = [event for event in self.events if event.kind == kind and event.start >= start and event.end <= end]
        seconds = _length(_merged((event.start, event.end) for event in events))
        return sum(event.bytes for event in events) / seconds if seconds > 0 else None

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Those that were marked and whose events are kept, the one under way as far as it has come."""
        with self._lock:
            events, marks = tuple(map(Event._make, self._events)), tuple(self._marks)
            whole = len(events) == sum(sums[0] for sums in self._sums.values())
        return _passes(events, marks, whole)

    def table(self, last: int | None = 20) -> Table:
        """A row a pass, the last ones (None: all): milliseconds in which there was reading, copying, waiting, computing; of
        the reading the share at the same time as computing; bytes that arrived in it, and their rate."""
        events, passes = self.events, self.passes
        arrived = {kind: sorted((e.end, e.bytes) for e in events if e.kind == kind) for kind in ("read", "copy")}
        merged = {kind: _merged((e.start, e.end) for e in events if e.kind == kind) for kind in KINDS}
        hidden = _both(merged["read"], merged["compute"])
        rows = []
        for one in passes[-last:] if last is not None else passes:
            spent = {kind: _length(_cut(merged[kind], one.start, one.end)) for kind in KINDS}
            moved = {kind: sum(size for _, size in ends[bisect_right(ends, one.start, key=itemgetter(0)):
                                                         bisect_right(ends, one.end, key=itemgetter(0))])
                     for kind, ends in arrived.items()}
            reading, waited = spent["read"], spent["wait"]
            rows.append({
                "pass": one.what, "ms": one.seconds * 1e3, "read ms": reading * 1e3, "copy ms": spent["copy"] * 1e3,
                "wait ms": waited * 1e3, "compute ms": spent["compute"] * 1e3,
                "hidden": _length(_cut(hidden, one.start, one.end)) / reading if reading else None,
                "read": moved["read"], "copied": moved["copy"], "GB/s": moved["read"] / reading / 1e9 if reading else None})
        return Table(rows, dict.fromkeys(("ms", "read ms", "copy ms", "wait ms", "compute ms"), "{:.1f}".format)
                     | {"hidden": "{:.0%}".format, "GB/s": "{:.2f}".format}
                     | dict.fromkeys(("read", "copied"), lambda size: f"{size / MB:.1f} MB" if size else ""))

    @property
    def answer(self) -> str:
        """One or two sentences: what a pass took and what of it was waiting, what was read and how fast."""
        events = self.events
        if not events:
            return "Nothing has happened yet."
        passes, said = self.passes, []
        if passes:
            whole = sum(one.seconds for one in passes)
            waits, reads = (_merged(_of(events, kind)) for kind in ("wait", "read"))
            waited = sum(_length(_cut(waits, one.start, one.end)) for one in passes)
            read = sum(_length(_cut(reads, one.start, one.end)) for one in passes)
            said.append(f"{len(passes)} pass{'es' * (len(passes) != 1)} of {format_seconds(whole / len(passes))}, "
                        f"{waited / whole:.0%} of it waiting and {read / whole:.0%} with reading going on")
        totals = self.totals()
        if read := totals.get("read"):
            rate = self.rate("read")
            hidden = self.overlap("read", "compute") / max(self.busy("read"), 1e-12)
            said.append(f"{format_bytes(read.bytes)} read in {read.count:,} reads"
                        + (f" at {format_rate(rate)}, {hidden:.0%} of it while something was computed" if rate else ""))
        for kind, done in (("copy", "copied"), ("write", "written")):
            if (total := totals.get(kind)) and total.bytes:
                rate = self.rate(kind)
                said.append(f"{format_bytes(total.bytes)} {done}" + f" at {format_rate(rate)}" * bool(rate))
        return "; ".join(said or [f"{self.count:,} events"]) + " [measured]."

    def figure(self, seconds: float | None = None):
        """The timeline of the last `seconds`, or of the last passes (plotly)."""
        from ..lab.trace_figures import trace_figure
        return trace_figure(self, seconds)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the events that are kept as a Chrome trace, whole or not at all; chrome://tracing and ui.perfetto.dev show it.
        Raises LabError where it cannot be written."""
        target = Path(path)
        part = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.part")
        try:
            with part.open("w", encoding="utf-8") as file:
                json.dump(chrome(self.events, self.marks), file, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except OSError as error:
            raise LabError(f"{show_path(str(target))} cannot be written ({error.strerror or error}); check its folder and the "
                           "room on its disk") from None
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
        return target

    def _spans(self, kind: str) -> list[Span]:
        if kind not in KINDS:
            raise LabError(f"{kind!r:.40} is no kind of event; there are {', '.join(KINDS)}")
        return _of(self.events, kind)

    def __len__(self) -> int:
        return len(self._events)

    def __bool__(self) -> bool:
        return True                            # an empty one is one

    def __repr__(self) -> str:
        table = self.table(5)
        return self.answer + (f"\n{table}" if table else "")

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.answer)}</p>{self.table()._repr_html_() if self.passes else ''}"


class Timing:
    """One event while it happens."""

    __slots__ = ("_trace", "_kind", "_what", "_start", "bytes")

    def __init__(self, trace: Trace, kind: str, what: str, bytes: int):
        self._trace, self._kind, self._what, self.bytes = trace, kind, what, bytes

    def __enter__(self) -> "Timing":
        self._start = perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self._trace.add(self._kind, self._what, self._start, perf_counter(), self.bytes)


def chrome(events: Iterable[Event], marks: Iterable[tuple[str, float]] = ()) -> dict:
    """A Chrome trace ("Trace Event Format"): complete events in microseconds since the first of all, each track a thread of its
    own, passes as instants across all of them."""
    events, marks = list(events), list(marks)
    zero = min([event.start for event in events] + [when for _, when in marks], default=0.0)
    tracks = {track: number for number, track in enumerate(dict.fromkeys(event.track for event in events), 1)}
    process, made = os.getpid(), []
    for track, number in tracks.items():
        made.append({"ph": "M", "name": "thread_name", "pid": process, "tid": number, "args": {"name": track}})
    for event in events:
        more = {"bytes": event.bytes} if event.bytes else {}
        if event.bytes and event.seconds > 0:
            more["GB/s"] = round(event.bytes / event.seconds / 1e9, 3)
        made.append({"ph": "X", "name": event.what, "cat": event.kind, "pid": process, "tid": tracks[event.track],
                     "ts": _micro(event.start - zero), "dur": _micro(event.seconds), "args": {"kind": event.kind, **more}})
    made += [{"ph": "i", "s": "p", "name": what, "cat": "pass", "pid": process, "tid": 0, "ts": _micro(when - zero)}
             for what, when in marks]
    return {"traceEvents": made, "displayTimeUnit": "ms"}


def _micro(seconds: float) -> float:
    return round(seconds * 1e6, 3)


# ---- spans of time: sorted and disjoint once they are merged ------------------------------------------------------------

def _of(events: Iterable[Event], kind: str) -> list[Span]:
    return [(event.start, event.end) for event in events if event.kind == kind]


def _merged(spans: Iterable[Span]) -> list[Span]:
    found: list[list[float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return [(start, end) for start, end in found]


def _both(some: list[Span], others: list[Span]) -> list[Span]:
    found, i, j = [], 0, 0
    while i < len(some) and j < len(others):
        start, end = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if start < end:
            found.append((start, end))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return found


def _cut(spans: list[Span], start: float, end: float) -> list[Span]:
    inside = spans[bisect_right(spans, start, key=itemgetter(1)):bisect_left(spans, end, key=itemgetter(0))]
    return [(max(first, start), min(last, end)) for first, last in inside]


def _length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)


def _passes(events: tuple[Event, ...], marks: tuple[tuple[str, float], ...], whole: bool) -> tuple[Pass, ...]:
    """A pass ends with the last computing that began in it: readers may go on with what the next one needs, and whoever asked
    may think before the next. Left out are passes without any, and where not the `whole` is kept those that may lack some."""
    if not events or not marks:
        return ()
    oldest, found, at = float("-inf") if whole else min(event.start for event in events), [], 0
    computing = sorted(_of(events, "compute") or ((event.start, event.end) for event in events))
    for (what, start), (_, limit) in zip(marks, (*marks[1:], ("", float("inf"))), strict=True):
        end = start
        while at < len(computing) and computing[at][0] < limit:
            if computing[at][0] >= start:
                end = max(end, min(computing[at][1], limit))
            at += 1
        if end > start >= oldest:
            found.append(Pass(what, start, end))
    return tuple(found)
