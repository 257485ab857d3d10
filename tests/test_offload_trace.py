"""The trace: sums that are right whatever overlaps, bounds that hold, threads that do not disturb each other, its file."""

import json
import threading
import time

import pytest

from llmlab.errors import LabError
from llmlab.offload.trace import KINDS, Event, Pass, Trace, chrome


def filled() -> Trace:
    """Two passes of two layers: two readers at once, the second layer's reading hidden behind the first one's computing."""
    trace = Trace()
    trace._marks += [("token 1", 10.0), ("token 2", 20.0)]
    for start in (10.0, 20.0):
        trace.add("read", "blk.0", start, start + 2, 100, "reader 0")
        trace.add("read", "blk.0", start + 1, start + 3, 100, "reader 1")
        trace.add("wait", "blk.0", start, start + 3, track="main")
        trace.add("compute", "blk.0", start + 3, start + 5, track="main")
        trace.add("read", "blk.1", start + 3, start + 6, 300, "reader 0")
        trace.add("wait", "blk.1", start + 5, start + 6, track="main")
        trace.add("compute", "blk.1", start + 6, start + 8, track="main")
    return trace


def test_what_overlaps_counts_once():
    trace = filled()
    assert trace.busy("read") == 2 * 6 and trace.busy("wait") == 2 * 4 and trace.busy("compute") == 2 * 4
    assert trace.overlap("read", "compute") == trace.overlap("compute", "read") == 2 * 2
    assert trace.busy("copy") == trace.overlap("copy", "read") == 0
    assert trace.busy("read", 11.5, 14.0) == 2.5 and trace.busy("read", 16.0, 20.0) == 0
    assert trace.overlap("read", "compute", 14.0, 30.0) == 1 + 2
    assert trace.rate("read") == 1000 / 12 and trace.rate("read", 10.0, 13.0) == 200 / 3 and trace.rate("copy") is None


def test_totals_count_every_thread():
    totals = filled().totals()
    assert totals["read"] == (6, 14.0, 1000) and totals["compute"] == (4, 8.0, 0) and "copy" not in totals
    assert totals["read"].bytes == 1000


def test_overlaps_are_those_that_a_fine_ruler_finds():
    import random
    chosen, trace = random.Random(7), Trace()
    events = []
    for _ in range(300):
        start = chosen.randrange(2000)
        events.append((chosen.choice(("read", "compute")), start, start + chosen.randrange(30)))
        trace.add(events[-1][0], "", *map(float, events[-1][1:]))
    read, computing = ({tick for k, start, end in events if k == kind for tick in range(start, end)} for kind in KINDS[::3])
    assert trace.busy("read") == len(read) and trace.busy("compute") == len(computing)
    assert trace.overlap("read", "compute") == len(read & computing) > 0
    assert trace.overlap("read", "compute", 500, 777) == len(read & computing & set(range(500, 777)))


def test_passes_end_with_their_last_computing():
    trace = filled()
    trace.add("read", "blk.0", 28.5, 31.0, 100, "reader 0")        # of a third pass that nobody has asked for yet
    assert trace.passes == (Pass("token 1", 10.0, 18.0), Pass("token 2", 20.0, 28.0))
    rows = trace.table()
    assert [row["pass"] for row in rows] == ["token 1", "token 2"] and len(trace.table(last=1)) == 1
    first = rows[0]
    assert (first["ms"], first["read ms"], first["wait ms"], first["compute ms"]) == (8000, 6000, 4000, 4000)
    assert first["read"] == 500 and first["hidden"] == 1 / 3 and first["GB/s"] == 500 / 6 / 1e9 and first["copied"] == 0
    assert "token 2" in repr(trace) and "token 2" in trace._repr_html_()
    assert "2 passes of 8.0 s, 50% of it waiting and 75% with reading going on" in trace.answer and "[measured]" in trace.answer


def test_an_empty_one_says_so():
    trace = Trace()
    assert trace.events == trace.passes == () and trace.totals() == {} and trace.rate() is None
    assert trace.answer == "Nothing has happened yet." and trace.answer in trace._repr_html_()
    trace.mark("token 1")
    assert trace.passes == () and repr(trace) and trace


def test_the_last_are_kept_and_the_totals_are_of_all():
    trace = Trace(most=10)
    for n in range(25):
        trace.mark(f"token {n}")
        trace.add("read", f"blk.{n}", float(n), n + 0.5, 4)
    assert [event.what for event in trace.events] == [f"blk.{n}" for n in range(15, 25)]
    assert len(trace.marks) == 10 and trace.count == 25
    assert trace.totals()["read"] == (25, 12.5, 100) and trace.busy("read") == 5.0
    trace.clear()
    assert trace.events == trace.marks == () and trace.totals() == {} and trace.count == 0


def test_passes_that_may_lack_events_are_left_out():
    trace = Trace(most=6)
    for start in (0.0, 10.0, 20.0):
        trace._marks.append((f"token {start:.0f}", start))
        for n in range(4):
            trace.add("compute", f"blk.{n}", start + n + 0.5, start + n + 1)
    assert [one.what for one in trace.passes] == ["token 20"]


def test_spans_are_timed_and_their_bytes_may_come_late():
    trace = Trace()
    with trace.span("copy", "blk.3", 10) as span:
        time.sleep(0.01)
        span.bytes += 5
    with pytest.raises(ZeroDivisionError), trace.span("read", "blk.4"):
        raise ZeroDivisionError
    one, other = trace.events
    assert (one.kind, one.what, one.bytes, one.track) == ("copy", "blk.3", 15, threading.current_thread().name)
    assert one.seconds >= 0.01 and other.what == "blk.4"


def test_an_unknown_kind_and_a_bad_bound_are_refused():
    trace = Trace()
    with pytest.raises(LabError, match="'reed' is no kind of event; there are read, copy"):
        trace.add("reed", "blk.0", 0.0, 1.0)
    with pytest.raises(LabError, match="no kind of event"):
        trace.busy("reads")
    for most in (0, -1, 2.5, True, None):
        with pytest.raises(LabError, match="most is"):
            Trace(most=most)
    assert trace.count == 0


def test_threads_add_at_once_and_nothing_is_lost():
    trace, together = Trace(most=100_000), threading.Barrier(4)

    def work(number: int) -> None:
        together.wait()
        for n in range(2000):
            trace.add(KINDS[n % 5], f"{number}", n, n + 1, 1)
            if n % 100 == 0:
                trace.mark(f"{number} {n}")
                assert trace.table() is not None

    threads = [threading.Thread(target=work, args=(n,), name=f"worker {n}") for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trace.count == len(trace.events) == 8000 and sum(total.bytes for total in trace.totals().values()) == 8000
    for number in range(4):
        mine = [event for event in trace.events if event.track == f"worker {number}"]
        assert [event.start for event in mine] == list(range(2000)) and {event.what for event in mine} == {f"{number}"}
    assert len(trace.marks) == 80


def test_the_file_is_a_chrome_trace(tmp_path):
    trace = filled()
    path = trace.save(tmp_path / "trace.json")
    assert [one.name for one in tmp_path.iterdir()] == ["trace.json"] and path == tmp_path / "trace.json"
    found = json.loads(path.read_text())["traceEvents"]
    names = {one["tid"]: one["args"]["name"] for one in found if one["ph"] == "M"}
    assert sorted(names.values()) == ["main", "reader 0", "reader 1"]
    complete = [one for one in found if one["ph"] == "X"]
    assert len(complete) == 14 and all(one["dur"] >= 0 and one["ts"] >= 0 for one in complete)
    second = complete[1]
    assert names[second["tid"]] == "reader 1" and (second["name"], second["cat"]) == ("blk.0", "read")
    assert (second["ts"], second["dur"], second["args"]["bytes"]) == (1e6, 2e6, 100)
    assert [(one["name"], one["ts"]) for one in found if one["ph"] == "i"] == [("token 1", 0.0), ("token 2", 10e6)]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    trace, path = filled(), tmp_path / "trace.json"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(LabError, match=r"trace.json cannot be written \(No space left on device\)"):
        trace.save(path)
    assert path.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["trace.json"]
    with pytest.raises(LabError, match="check its folder"):
        trace.save(tmp_path / "nowhere" / "trace.json")


def test_nothing_makes_an_empty_file(tmp_path):
    assert chrome(()) == {"traceEvents": [], "displayTimeUnit": "ms"}
    assert json.loads(Trace().save(tmp_path / "t.json").read_text())["traceEvents"] == []
    assert Event("read", "x", 1.0, 3.5, 5, "t").seconds == 2.5
