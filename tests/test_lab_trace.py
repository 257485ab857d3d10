"""The timeline: rows, bars where events were, as many as a page draws; it follows what happens."""

import threading
import time

import pytest

from llmlab.lab.style import GREEN
from llmlab.lab.trace_figures import MOST, TRACKS, Timeline, trace_figure, trace_picture
from llmlab.offload.trace import Trace


def filled(passes: int = 2, layers: int = 3) -> Trace:
    """Layers of 10 ms each: two readers, and what computes waits for them first."""
    trace = Trace()
    for number in range(passes):
        begin = 100.0 + number
        trace._marks.append((f"token {number}", begin))
        for layer in range(layers):
            at = begin + layer * 0.01
            trace.add("read", f"blk.{layer}", at, at + 0.006, 6_000_000, "reader 0")
            trace.add("read", f"blk.{layer}", at + 0.001, at + 0.006, 5_000_000, "reader 1")
            trace.add("wait", f"blk.{layer}", at, at + 0.006, track="main")
            trace.add("compute", f"blk.{layer}", at + 0.006, at + 0.01, track="main")
    return trace


def of(picture: dict, name: str) -> dict:
    return next(one for one in picture["data"] if one["name"] == name)


def test_bars_lie_where_events_were():
    picture = trace_picture(filled(1))
    assert picture["layout"]["yaxis"]["ticktext"] == ["reading 1", "reading 2", "waiting", "computing"]
    reading, computing = of(picture, "reading"), of(picture, "computing")
    assert reading["y"] == [0, 0, 0, 1, 1, 1] and computing["y"] == [3, 3, 3] and computing["marker"]["color"] == GREEN
    assert reading["base"] == pytest.approx([0, 10, 20, 1, 11, 21]) and reading["x"] == pytest.approx([6] * 3 + [5] * 3)
    assert computing["base"] == pytest.approx([6, 16, 26]) and computing["x"] == pytest.approx([4, 4, 4])
    assert reading["customdata"][0] == "blk.0, 6.00 ms, 5.72 MiB, 1.0 GB/s" and computing["customdata"][2] == "blk.2, 4.00 ms"
    assert picture["layout"]["xaxis"]["range"] == pytest.approx([0, 30])
    assert of(picture, "a pass begins")["x"] == [0, 0, None]


def test_the_last_passes_or_the_last_seconds_are_shown():
    trace = filled(10)
    picture = trace_picture(trace)
    assert len(of(picture, "computing")["x"]) == 3 * 3 and picture["layout"]["xaxis"]["range"][1] == pytest.approx(2030)
    picture = trace_picture(trace, 0.02)
    assert of(picture, "computing")["base"] == pytest.approx([6, 16]) and len(of(picture, "a pass begins")["x"]) == 0
    assert all(base >= 0 for one in picture["data"] for base in one.get("base", ()))
    without = Trace()
    without.add("read", "blk.0", 1.0, 2.0)
    assert of(trace_picture(without), "reading")["x"] == [1000]


def test_many_events_are_few_bars_paler_for_their_gaps():
    trace = filled(1, 2500)                                     # 25 s: each gap is less than a pixel wide
    picture = trace_picture(trace)
    reading, computing = of(picture, "reading"), of(picture, "computing")
    assert reading["y"] == [0, 1] and computing["y"] == [3] and sum(len(one["x"]) for one in picture["data"][:5]) == 4
    assert computing["base"] == pytest.approx([6]) and computing["x"] == pytest.approx([24994])
    assert computing["marker"]["opacity"] == [0.4] and reading["marker"]["opacity"] == [0.6, 0.5]
    assert computing["customdata"] == ["blk.0 and 2,499 after it, together, 10000.00 ms"]
    assert "14.65 GB" not in reading["customdata"][0] and reading["customdata"][0].endswith("13.97 GiB, 1.0 GB/s")
    assert of(trace_picture(filled(1, 100)), "computing")["marker"]["opacity"] == [1.0] * 100


def test_no_more_bars_than_a_page_draws_the_last_ones():
    trace = Trace()
    for n in range(10):
        trace.add("compute", f"blk.{n}", n * 0.01, n * 0.01 + 1e-6)
    for n in range(900):                                        # gaps of more than a pixel between all of them
        trace.add("read", "", n * 0.01, n * 0.01 + 1e-6)
    picture = trace_picture(trace, most=500)
    drawn = [one for one in picture["data"] if one["type"] == "bar" and one["x"]]
    assert sum(len(one["x"]) for one in trace_picture(trace)["data"] if one["type"] == "bar") == 910
    assert [one["name"] for one in drawn] == ["reading"] and len(drawn[0]["x"]) == 500 <= MOST
    assert drawn[0]["base"][0] == 0 and picture["layout"]["xaxis"]["range"] == pytest.approx([0, 4990.001])
    assert len(of(trace_picture(trace, 0.5), "reading")["x"]) == 50


def test_traces_stay_the_same_whatever_happened():
    empty, full = trace_picture(Trace()), trace_picture(filled())
    assert [one["name"] for one in empty["data"]] == [one["name"] for one in full["data"]]
    assert not any(one["showlegend"] for one in empty["data"]) and not of(full, "copying")["showlegend"]
    assert len(trace_figure(filled()).data) == len(full["data"]) and len(filled().figure(0.5).data) == len(full["data"])


def test_both_themes_can_read_it():
    shown = trace_picture(filled())["layout"]
    assert shown["paper_bgcolor"] == "rgba(0,0,0,0)" and shown["template"] is None
    assert len({colour for _, colour in TRACKS.values()}) == len(TRACKS)


def test_a_name_is_no_markup():
    trace = Trace()
    trace.add("read", "<b>blk", 0.0, 1.0)
    assert of(trace_picture(trace), "reading")["customdata"] == ["&lt;b>blk, 1000.00 ms"]


def test_the_timeline_follows():
    trace = Trace()
    timeline = Timeline(trace)
    assert len(timeline.figure.data[0].x or ()) == 0 and "timeline" in repr(timeline)
    with timeline.following(0.01):
        trace.add("read", "blk.0", 1.0, 2.0, 8, "reader 0")
        end = time.monotonic() + 10
        while not len(timeline.figure.data[0].x or ()) and time.monotonic() < end:
            time.sleep(0.005)
        assert list(timeline.figure.data[0].x) == [1000]
        trace.add("compute", "blk.0", 2.0, 2.5)
    assert list(timeline.figure.data[3].x) == [500] and list(timeline.figure.layout.yaxis.ticktext) == ["reading", "computing"]
    assert "llmlab timeline" not in [thread.name for thread in threading.enumerate()]
    sent = []
    timeline.present = sent.append
    timeline.update()                                           # nothing new, nothing sent
    trace.add("read", "blk.1", 2.0, 3.0, 8, "reader 0")
    timeline.update()
    assert len(sent) == 1
