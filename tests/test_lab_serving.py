"""The serving panel without a browser: settings, words, what is counted by hand, an engine looked at while it works, real runs
beside simulated ones, figures, running, stopping."""

import threading
import time

import pytest
import tiny_chat
import torch

import llmlab
from llmlab import LabError
from llmlab.gguf import read_gguf
from llmlab.lab import serving_asking
from llmlab.lab.serving_asking import KV, SIZE, arriving, bytes_of_block, counted, longest, prompts, reserved
from llmlab.lab.serving_boxes import SETUPS
from llmlab.lab.serving_figures import (
    REQUESTS,
    along_picture,
    code,
    people_picture,
    points_of,
    pool_picture,
    race_picture,
    sharing_picture,
)
from llmlab.lab.serving_panel import PRESETS, ServingExplorer
from llmlab.lab.serving_run import (
    KEPT,
    QUEUED,
    READING,
    WRITING,
    Frame,
    Held,
    ServingRun,
    Span,
    Told,
    held,
    load_words,
    race_words,
    sharing_words,
)
from llmlab.lab.serving_state import DEFAULTS, PEOPLE, ServingState, bears_words, point_of
from llmlab.runtime.decoder import Decoder
from llmlab.runtime.engine import Engine
from llmlab.runtime.paged import block_bytes
from llmlab.runtime.sampling import Options
from llmlab.simulating import Serving, learnt, measured, simulate
from llmlab.vocabulary import words_of
from llmlab.workloads import Arrival, even


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(decoder, words) of a tiny model whose turns do not end."""
    file = read_gguf(tiny_chat.write(tmp_path_factory.mktemp("serving") / "tiny.gguf"))
    words = words_of(file)
    words.stop_ids = ()
    return Decoder.open(file, torch.float32, "compact"), words


@pytest.fixture
def state():
    return ServingState()


@pytest.fixture
def run(state, tiny):
    """Runs with the tiny model in place of the small one."""
    made = ServingRun(state)
    made._held = tiny
    return made


class Slow:
    """A decoder's engine step takes as long as `go` is not set."""

    def __init__(self, monkeypatch):
        self.go, self.reached, compute = threading.Event(), threading.Event(), Engine._compute

        def held_up(engine, step):
            if len(engine.history) > 2:
                self.reached.set()
                self.go.wait(30)
            return compute(engine, step)

        monkeypatch.setattr(Engine, "_compute", held_up)


# ---- what is asked ----------------------------------------------------------------------------------------------------

def test_requests_begin_alike_and_go_on_apart(tiny):
    arrivals = arriving(8, 32)
    texts = prompts(tiny[1], arrivals)
    assert [len(text) for text in texts] == [one.prompt for one in arrivals] and longest(arrivals) <= reserved(arrivals)
    assert len({tuple(text[:32]) for text in texts}) == 1 and len({tuple(text) for text in texts}) == 8
    assert reserved(arrivals) % SIZE == 0 and reserved(arrivals) - longest(arrivals) < SIZE
    apart = prompts(tiny[1], arriving(8))
    assert [one.output for one in arriving(8)] == [one.output for one in arrivals] and len({tuple(t) for t in apart}) == 8
    assert [one.at for one in arriving(4)] == [0.0] * 4 and arriving(4, rate=2.0)[3].at > 0


def test_a_block_of_the_small_model_is_as_large_as_the_engine_makes_it():
    decoder, _ = llmlab.decoder(llmlab.fetch("smollm2-135m"), strategy="compact")
    assert bytes_of_block(llmlab.model("smollm2-135m")) == block_bytes(decoder.weights.shapes, SIZE, KV) == (
        30 * 2 * 3 * 64 * 4 * 16)


def test_steps_are_counted_by_hand():
    two = [Arrival(5.0, 3, 2, number=1), Arrival(9.0, 20, 4, number=2)]           # when they come does not count
    run = counted(two, Serving(8, 4))
    assert [m.rows for m in run.history] == [23, 2, 1, 1] and run.seconds == 4
    assert [m.used for m in run.history] == [3, 3, 2, 2] and run.history[0].wasted == 3 * 16 - 23
    static = counted(two, Serving(8, 4, "static", context=32))
    assert [m.used for m in static.history] == [4] * 4 and [m.padded for m in static.history] == [17, 0, 1, 1]


# ---- settings ---------------------------------------------------------------------------------------------------------

def test_the_state_says_what_was_counted_and_modelled(state):
    here, there = state.here, state.there
    assert here.blocks == 16 * 2**20 // here.each == 22 and here.made == sum(one.output for one in here.arrivals)
    assert len(here.runs["alone"].history) == here.made          # one at a time: a step a token, each prompt in one
    assert f"paged: {len(here.run.history)} steps" in state.answer and "Exact, counted" in state.answer
    assert "Llama 3 8B" in state.answer and state.answer.endswith("Modelled.")
    low, best, high = there.bands
    assert low.tokens < best.tokens < high.tokens and there.times == best.tokens / there.static.tokens > 2
    assert best.wasted < 0.04 and 0.6 < there.ways["reserved"].wasted         # the paper: under 4 %, and 60 to 80
    state.policy = "static"
    assert state.here.run is state.here.runs["static"] and "static padded batches: " in state.answer
    assert state.there is there                                  # what is asked here changes nothing there
    state.people = 64
    assert state.there.point.tokens > best.tokens and state.there.point.each > best.each


def test_a_prefix_is_held_once(state):
    state.update(prefix=64)
    once = state.here.run
    state.share = False
    apart = state.here.run
    assert once.reused == 64 * 15 and apart.reused == 0 and len(once.history) <= len(apart.history)
    state.policy = "static"
    assert state.here.serving.share is False and state.here.serving.context == reserved(state.here.arrivals)


@pytest.mark.parametrize(("setting", "value", "said"), [
    ("policy", "magic", "policy is 'magic'; it is one of paged, static, alone"),
    ("requests", -1, "requests is -1; give how many"), ("requests", 0, "requests is 0"),
    ("requests", True, "requests is True"), ("requests", "many", "'many'"),
    ("sequences", 0, "sequences is 0"), ("prefix", -16, "prefix is -16"), ("rate", 0, "rate is 0"), ("rate", "fast", "'fast'"),
    ("memory", "2 MiB", "room for 32 tokens, and the longest request has"), ("memory", "much", "'much'"),
    ("memory", -5, "-5 is not a size"), ("memory", "2 GiB", "give 1.00 GiB at most"), ("share", "yes", "share is 'yes'"),
    ("model", "llama-9", "'llama-9'"), ("card", "rtx-1", "'rtx-1'"), ("card", None, "choose one"), ("card", 7, "choose one"),
    ("quant", "Q9", "'Q9'"), ("mix", "poems", "mix is 'poems'"), ("people", 0, "people is 0"),
    ("people", 10**6, "people is 1000000"), ("model", "llama-3-70b", "room for 0 tokens"),
])
def test_what_cannot_be_used_is_said_and_the_last_good_stays(state, setting, value, said):
    here, there, answer = state.here, state.there, state.answer
    setattr(state, setting, value)
    assert said in state.error and "\n" not in state.error and len(state.error) < 400
    assert (state.here, state.there, state.answer) == (here, there, answer)
    with pytest.raises(LabError):
        ServingState(**{setting: value})
    state.update(**DEFAULTS)
    assert state.error == "" and state.answer == answer


def test_a_name_that_is_no_setting_is_refused(state):
    with pytest.raises(LabError, match="'batch' is no setting; there are policy, requests, rate"):
        state.update(batch=3)


def test_another_model_begins_in_its_usual_quant(state):
    state.quant = "AWQ_INT4"
    assert "AWQ_INT4" in state.answer
    state.update(model="llama-2-13b", card="a100-sxm4-40gb")
    assert state.error == "" and state.quant is None and "Llama 2 13B" in state.answer


def test_how_many_people_a_card_bears(state):
    there = state.there
    curve = [best.tokens for _, best, _ in there.curve]
    assert [row[1].people for row in there.curve] == list(PEOPLE) and len(there.table) == len(PEOPLE)
    assert curve[0] == pytest.approx(1 / there.curve[0][1].each, rel=0.02) and curve[:7] == sorted(curve[:7])
    low, best, high = there.bears()
    assert 8 <= low <= best <= high and there.bears(60.0)[1] == 0 and there.bears(1.0)[1] == 256
    assert f"serves {best} people ({low} to {high}) at 10 tokens/s" in bears_words(there)
    assert "not even one person 60 tokens/s" in bears_words(there, 60.0)


def test_throughput_is_that_of_a_busy_server():
    class One:
        window = 0

        def seconds(self, load, band=1):
            return 1.0

    run = simulate(even(8, 4, 10), One(), 100, clients=2)
    assert point_of(run, 2).tokens == pytest.approx(2.0) and point_of(run, 2).running == pytest.approx(2 * 0.9)
    late = simulate([*even(3, 4, 5), Arrival(0.0, 4, 25, number=9)], One(), 100, clients=2)
    assert point_of(late, 2).tokens > point_of(late, 2, steady=False).tokens == late.tokens_per_second
    assert point_of(simulate(even(2, 4, 5), One(), 100), 2).tokens == 2.0         # nobody asks next: all of it


# ---- an engine looked at ----------------------------------------------------------------------------------------------

def test_a_view_agrees_with_itself_at_any_moment(tiny):
    decoder, words = tiny
    with Engine(decoder, words, memory="80 KiB", sequences=6) as engine:
        assert engine.view().texts == () and set(engine.view().owners) == {0}
        jobs = [engine.submit(list(words(f"{n} " * (8 + 4 * n))["input_ids"]), Options(temperature=0, max_tokens=60))
                for n in range(6)]
        states, seen, before = set(), 0, 0.0
        while not engine.idle():
            view = engine.view()
            assert view.at > before and len(view.owners) == view.usage.total
            before, seen = view.at, seen + 1
            taken = {block for text in view.texts for block in text.blocks}
            assert {at for at, owner in enumerate(view.owners) if owner > 0} == taken and len(taken) == view.usage.used
            assert sum(owner == -1 for owner in view.owners) == view.usage.cached
            for text in view.texts:
                assert (text.job in jobs and text.cells <= len(text.blocks) * SIZE
                        and text.cells <= text.prompt + text.new and bool(text.blocks) == (text.state != "waiting"))
                states.add(text.state)
            time.sleep(0.001)
        assert states == {"waiting", "reading", "writing"} and seen > 10
        assert all(len(job.result().tokens) == 60 for job in jobs)
        assert engine.view().texts == () and max(engine.view().owners) <= 0
        assert all(0 <= step.wasted <= step.used * SIZE for step in engine.history)
        assert any(step.wasted for step in engine.history) and engine.history[-1].wasted == 0


def test_wasted_cells_are_what_the_scheduler_counts(tiny):
    """The same requests, the same blocks: the engine's own records and the simulation's."""
    asked = [Arrival(0.0, 20, 12, number=n) for n in range(3)]
    decoder, words = tiny
    texts = prompts(words, asked)
    with Engine(decoder, words, memory="2 MiB", share=False, sequences=1) as engine:
        answers = [(0.0, engine.submit(text, Options(temperature=0, max_tokens=12)).result()) for text in texts]
        found = measured(answers, engine.history, engine.blocks, "paged")
    said = simulate(asked, type("One", (), {"window": 0, "seconds": lambda *_: 1.0})(), 100, sequences=1)
    assert [(m.rows, m.logits) for m in found.history] == [(m.rows, m.logits) for m in said.history]
    # one looks after a step and one during it: each request's last step has freed its blocks by then
    assert [m.wasted for m in found.history if m.used] == [m.wasted for m in said.history if m not in said.history[11::12]]


# ---- blocks as they are seen ------------------------------------------------------------------------------------------

def test_blocks_are_told_apart(tiny):
    decoder, words = tiny
    text = list(words("the same beginning for both, of more than two blocks")["input_ids"])
    with Engine(decoder, words, memory="160 KiB") as engine:
        jobs = [engine.submit([*text, *more], Options(temperature=0, max_tokens=400)) for more in ([1], [2, 3])]
        view = engine.view()
        while not (len(view.texts) == 2 and all(one.new > 3 for one in view.texts)):
            view = engine.view()
        blocks = held(view, {one.number: at for at, one in enumerate(view.texts, 1)})
        for job in jobs:
            job.cancel()
        [job.result() for job in jobs]
    shared = len(text) // SIZE
    assert sum(one.holders == 2 for one in blocks) == shared and all(one.cells == SIZE for one in blocks if one.holders == 2)
    assert {one.whose for one in blocks} == {0, 1, 2}
    assert sum(one.cells for one in blocks) == sum(one.cells for one in view.texts) - shared * SIZE == view.usage.written
    after = held(engine.view(), {})
    assert sum(one.whose == -1 for one in after) == engine.usage().cached > 0


def test_every_block_has_its_colour():
    assert [code(Held(0, 0, 0)), code(Held(-1, 0, 16)), code(Held(3, 2, 16))] == [0, 1, 2]
    full, partly, empty = (code(Held(3, 1, cells)) for cells in (16, 7, 0))
    assert (full, partly - full, empty - full) == (5, len(REQUESTS), 2 * len(REQUESTS))
    assert code(Held(3 + len(REQUESTS), 1, 16)) == full
    frame = Frame(1.0, (Held(1, 1, 16), Held(1, 1, 3), Held(2, 2, 16), Held(-1, 0, 16), Held(0, 0, 0)), (), (
        Told(1, WRITING, 10, 0, 9, 2, 0), Told(2, KEPT, 1, 0, 0, 1, 0)))
    picture = pool_picture(frame, 5)
    assert [row[:5] for row in picture["data"][0]["z"]] == [[3, 11, 2, 1, 0]]
    assert picture["data"][0]["customdata"][0][:3] == ["block 0: request 1, 16 of 16 cells written",
                                                       "block 1: request 1, 3 of 16 cells written",
                                                       "block 2: 2 requests, 16 of 16 cells written"]
    shown = {trace["name"] for trace in picture["data"][1:] if trace["showlegend"]}
    assert shown == {"free", "cached", "shared by several", "request 1", "paler: partly written"}
    for count in (1, 22, 90, 400):
        assert len(pool_picture(None, count)["data"]) == len(picture["data"])
        assert sum(one is not None for row in pool_picture(None, count)["data"][0]["z"] for one in row) == count


def test_requests_along_time():
    spans = (Span(1, QUEUED, 0.0, 0.5), Span(1, READING, 0.5, 0.7), Span(2, WRITING, 0.1, 0.9))
    found = along_picture(Frame(1.0, (), spans, ()), 2)
    by = {trace["name"]: (trace["y"], trace["base"], trace["x"]) for trace in found["data"] if trace["y"]}
    assert by == {"queued": ([1], [0.0], [0.5]), "reading the prompt": ([1], [0.5], [0.2]), "writing": ([2], [0.1], [0.8])}
    assert len(along_picture(None, 12)["data"]) == len(found["data"]) == 5


# ---- running ----------------------------------------------------------------------------------------------------------

def test_requests_are_served_and_followed(run, state, tiny):
    frames = []
    run.observe(lambda change: frames.append(change["new"]), "frame")
    threads = threading.active_count()
    said = run.run()
    assert threading.active_count() == threads and said == run.answer and said.endswith("measured.")
    found, arrivals = run.ran.found, state.here.arrivals
    assert found.kind == "measured" and repr(found).startswith("<measured, paged: 16 requests")
    assert sorted((one.prompt, one.output) for one in found.requests) == sorted((a.prompt, a.output) for a in arrivals)
    assert all(0 <= one.first_seconds <= one.latency for one in found.requests)
    assert found.reused == state.here.run.reused == 32 * 15 and f"{found.reused} tokens of prompts were there" in said
    assert sum(m.logits for m in found.history) == state.here.made
    last = run.frame
    assert [one.request for one in last.requests] == list(range(1, 17)) and {one.state for one in last.requests} == {"done"}
    assert len(last.blocks) == state.here.blocks and all(one.text for one in last.requests)
    for one in range(1, 17):
        mine = [span for span in last.spans if span.request == one]
        assert mine and all(a.end == b.start and a.state != b.state for a, b in zip(mine, mine[1:], strict=False))
    decoder, words = tiny
    for told, text, arrival in zip(last.requests, prompts(words, arrivals), arrivals, strict=True):
        decoder.forget()                                         # in company as alone
        new = [int(decoder.read(text).argmax())]
        while len(new) < arrival.output:
            new.append(int(decoder.read(new[-1:]).argmax()))
        assert told.text == words.decode(new, skip_special_tokens=True)


def test_static_batches_keep_what_has_ended(run, state):
    state.update(policy="static", requests=6)
    frames = []
    run.observe(lambda change: frames.append(change["new"]), "frame")
    run.run()
    assert {span.state for span in run.frame.spans} >= {WRITING, KEPT}
    assert run.ran.serving.context == reserved(state.here.arrivals) and not run.ran.found.reused
    assert [one.rows for one in run.ran.found.history if one.padded] and run.ran.found.wasted_share > 0.5


def test_they_come_when_they_say(run, state):
    state.update(requests=4, rate=20.0)
    run.run()
    came = sorted(one.arrived for one in run.ran.found.requests)
    assert all(at >= one.at for at, one in zip(came, state.here.arrivals, strict=True)) and came[-1] > came[0]


def test_policies_are_compared_in_the_same_memory(run, state):
    said = run.run_race()
    assert list(run.race) == ["paged", "static", "alone"] and said == run.race_answer == race_words(run.race)
    assert len({(one.found.blocks, one.arrivals) for one in run.race.values()}) == 1
    assert all(one.shared == 0 for one in run.race["paged"].arrivals) and not run.race["paged"].found.reused
    paged, static, alone = (run.race[one].found for one in run.race)
    assert len(alone.history) == state.here.made > len(static.history) > len(paged.history)
    assert static.wasted_share > 0.5 > paged.wasted_share and static.computing_share < 1 == paged.computing_share
    assert "times static padded batches" in said and "(the paper: 60 to 80 %, and under 4)" in said
    assert [one.new for one in run.beside] == [False, True, True]
    for one in run.beside:                      # the scheduler is the same; who came in time for the first step is luck
        assert len(one.predicted.history) == pytest.approx(len(one.measured.history), abs=3)
        assert one.off == pytest.approx(one.measured.tokens_per_second / one.predicted.tokens_per_second - 1)
    assert len(run.beside_table) == len(run.race_table) == 3
    assert list(race_picture(run.race, run.beside)["data"][0]["x"]) == [paged.tokens_per_second, static.tokens_per_second,
                                                                       alone.tokens_per_second]
    assert len(race_picture({})["data"]) == 5
    run.run_race(("static",))
    assert list(run.race) == ["paged", "static"]


def test_more_at_once_are_measured_and_predicted(run):
    assert run.predicted == {} and run.cost is None
    said = run.run_load((4, 1))
    assert [one.serving.clients for one in run.load] == [1, 4] and said == load_words(run.load)
    assert max(m.running for m in run.load[0].found.history) <= 1 and max(m.running for m in run.load[1].found.history) <= 4
    predicted = run.predicted
    assert set(predicted) == {1, 2, 4, 8, 16, 32} and learnt(run.load[0].found, run.load[1].found) == run.cost
    assert all(len(predicted[n].requests) == min(2 * n, n + 4) for n in predicted)
    points = points_of(predicted)
    picture = people_picture([(one, one, one) for one in points], points_of({n.serving.clients: n.found for n in run.load}))
    assert picture["data"][1]["x"] == [1, 2, 4, 8, 16, 32] and picture["data"][2]["x"] == [1, 4]
    assert {len(one["data"]) for one in (picture, people_picture(()), people_picture((), now=points[0]))} == {8}
    assert [row["at once"] for row in run.load_table] == [1, 4]


def test_a_beginning_is_kept_once_or_by_each(run, state):
    state.prefix = 64
    said = run.run_sharing()
    once, apart = run.sharing[True].found, run.sharing[False].found
    assert said == sharing_words(run.sharing) and once.reused == 64 * 15 and apart.reused == 0
    assert "the same 64 tokens" in said and f"{64 * 15} tokens were not read again" in said
    rows = list(run.sharing_table)
    assert rows[0]["tokens read"] + 64 * 15 == rows[1]["tokens read"] == sum(one.prompt for one in state.here.arrivals)
    lines = sharing_picture(run.sharing)["data"]
    assert len(lines) == len(sharing_picture({})["data"]) == 4 and len(lines[0]["x"]) == len(once.history)
    state.prefix = 8
    with pytest.raises(LabError, match="nothing is shared: give a prefix of 16 tokens or more, and two requests"):
        run.start_sharing()


def test_a_card_is_simulated(run, state):
    assert run.run_card() == bears_words(state.there) and run.card is state.there


def test_it_is_stopped_in_the_middle_and_begun_again(run, monkeypatch):
    slow, threads = Slow(monkeypatch), threading.active_count()
    run.start()
    assert slow.reached.wait(30)
    for again in (run.start, run.start_race, run.start_load, run.start_sharing, run.start_card):
        with pytest.raises(LabError, match="requests are being served; end that or wait for it first"):
            again()
    run.end()
    slow.go.set()
    assert run.wait(30) and (run.progress, run.error, run.ran) == ("Stopped.", "", None)
    assert threading.active_count() == threads
    assert run.run() and run.progress == "" and len(run.ran.found.requests) == 16


def test_what_cannot_be_run_is_said(run, state, monkeypatch):
    for ask, said in ((lambda: run.start_load(()), "nobody asks"), (lambda: run.start_load((0,)), "at once is 0"),
                      (lambda: run.start_load((64,)), "at once is 64"),
                      (lambda: run.start_race(("magic",)), "policy is 'magic'")):
        with pytest.raises(LabError, match=said):
            ask()
        assert not run.running
    state.memory = "1 MiB"
    with pytest.raises(LabError, match="and the longest request has"):
        run.start()
    state.update(**DEFAULTS)

    def broken(*_):
        raise RuntimeError("it broke")
    monkeypatch.setattr(Engine, "_compute", broken)
    with pytest.raises(LabError, match="a step of the engine failed"):
        run.run()
    assert not run.running and "it broke" in run.error == run.answer


def test_no_model_and_nothing_to_fetch_it_with_is_a_line(state, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("LLMLAB_OFFLINE", "1")
    run = ServingRun(state)
    with pytest.raises(LabError) as caught:
        run.run()
    assert "\n" not in str(caught.value) and "llmlab itself" not in str(caught.value) and not run.running


def test_the_small_model_is_served(state, monkeypatch):
    """SmolLM2 itself, as a reader meets it."""
    monkeypatch.setattr(serving_asking, "SCALE", 0.02)
    state.update(requests=3, prefix=16)
    state.memory = "8 MiB"
    run = ServingRun(state)
    run.run()
    assert [one.state for one in run.frame.requests] == ["done"] * 3 and all(one.text.strip() for one in run.frame.requests)
    assert run.ran.found.reused == 32


# ---- the panel --------------------------------------------------------------------------------------------------------

def test_widgets_and_state_are_one():
    panel = ServingExplorer(requests=8)
    assert (panel.policy.value, panel.requests.value, panel.memory.value) == ("paged", 8, 16 * 2**20)
    assert panel.answer == panel.state.answer and repr(panel) == f"<{panel.answer}>"
    assert "8 requests in 22 blocks" in panel.said.html
    panel.policy.value, panel.prefix.value = "static", 64
    assert panel.state.here.serving.policy == "static" and panel.state.prefix == 64
    panel.memory.index = len(panel.memory.options) - 1
    assert panel.state.here.memory == panel.memory.value == 128 * 2**20
    panel.rate.value = 2.0
    assert panel.state.rate == 2.0
    panel.rate.value = ""
    assert panel.state.rate is None
    panel.state.requests = 7
    assert panel.requests.value == 7
    panel.state.requests = -1
    assert "requests is -1" in panel.said.html and panel.answer.startswith("requests is -1")
    panel.start.click()
    assert "requests is -1" in panel.said.html and not panel.run.running
    panel.state.requests = 4
    assert panel.state.error == "" and "requests is" not in panel.said.html


def test_presets_can_all_be_pressed():
    panel, made = ServingExplorer(), []
    for (label, _, _), button in zip(PRESETS, panel.children[0].children, strict=True):
        button.click()
        assert panel.state.error == "" and button.description == label
        made.append((panel.state.here.serving, panel.state.here.arrivals))
    assert len(set(made)) == len(made) == 6


def test_folds_show_what_they_say(tiny):
    panel = ServingExplorer(prefix=64)
    panel.run._held = tiny
    race, load, sharing, card = (panel.unfold(title) for title in panel.folds.buttons)
    for box in (race, load, sharing):
        assert box.words.html.startswith("Not measured yet") and box.chart.layout.display == "none" and box.stop.disabled
    panel.run.run_race()
    assert len(race.rows.rows) == len(race.beside.rows) == 3 and race.words.html.startswith("Paged, ")
    panel.run.run_load((1, 2))
    assert load.words.html.startswith("2 at once get ") and len(load.rows.rows) == 2
    panel.run.run_sharing()
    assert sharing.words.html.startswith("All 16 prompts") and len(sharing.rows.rows) == 2
    assert card.chart.layout.display == "none" and "32 people asking" in card.words.html
    panel.run.run_card()
    assert "serves " in card.words.html and len(card.rows.rows) == len(PEOPLE) and len(card.ways.rows) == 4
    assert card.chart.layout.display is None and card.people.value == 32
    for _, settings in SETUPS[1:]:
        panel.state.update(**{"quant": None, **settings})
        assert panel.state.error == "" and card.model.value == settings["model"] and card.card.value == settings["card"]
        assert card.chart.layout.display == "none"       # what was simulated is of another card
    card.people.value = 8
    assert panel.state.there.people == 8


def test_a_run_is_shown(tiny):
    panel = ServingExplorer(requests=6)
    panel.run._held = tiny
    assert "Press serve" in panel.ran.html and panel.rows.rows == []
    panel.run.run()
    assert "6 requests, paged: " in panel.ran.html and len(panel.rows.rows) == 6
    assert sum(len(trace.x) for trace in panel.along.figure.data) > 6 and not panel.start.disabled
    codes = {one for row in panel.pool.figure.data[0].z for one in row if one is not None}
    assert codes == {0, 1}                    # all is free again, or known
    panel.state.memory = "24 MiB"             # of another pool nothing was seen yet
    assert {one for row in panel.pool.figure.data[0].z for one in row if one is not None} == {0} and panel.rows.rows == []


def test_a_panel_closed_in_the_middle_of_a_run_lets_go(tiny, monkeypatch):
    slow, panel = Slow(monkeypatch), ServingExplorer()
    panel.run._held = tiny
    panel.run.start()
    assert slow.reached.wait(30)
    panel.close()
    slow.go.set()
    assert panel.run.wait(30) and panel.run.progress == "Stopped." and panel.run.error == ""
