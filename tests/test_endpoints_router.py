"""The router between two real servers: what stays, what leaves, why; limits that hold whatever is asked; falling back."""

import json
import math
import os
import pickle
import random
import threading
from fractions import Fraction

import numpy as np
import pytest
from endpoint_server import HELLO, answer, far_server
from server_clients import alone, serving, tiny

import llmlab
from llmlab import Endpoint, LabError, router
from llmlab.endpoints import REASONS, Decision, Ledger, Log, Rule, recorded, recorded_curve, route_curve
from llmlab.endpoints.allowing import Share
from llmlab.endpoints.calibrating import calibrated
from llmlab.endpoints.replies import Chance
from llmlab.endpoints.signals import agreed, entropy
from llmlab.intervals import wilson

QUESTIONS = ("hello", "one two", "What is it?", "abc", "why not", "tell me more", "go on", "x y z", "and then", "stop it")


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    for name in ("LLMLAB_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def near(path):
    with serving(path, name="tiny") as server:
        yield Endpoint(server.base_url, "tiny")


@pytest.fixture
def far():
    with far_server() as server:
        yield server


def made(near, far, **settings):
    """Everything goes out unless the settings say otherwise."""
    remote = {name: settings.pop(name) for name in ("price", "retries", "timeout", "key") if name in settings}
    remote = Endpoint(far.url, "m", **{"retries": 0, "timeout": 5, "wait": 0.01} | remote)
    return router(near, remote, **{"threshold": -1.0, "at_most": None} | settings)


def ask(route, question="hello", **settings):
    return route.ask(question, **{"max_tokens": 6} | settings)


# ---- here or there ----------------------------------------------------------------------------------------------------

def test_what_is_sure_stays_and_what_is_unsure_leaves(path, near, far):
    stays = ask(made(near, far, threshold=99.0))
    assert stays.text == alone(path, HELLO, 6) == str(stays) and stays.note == "" and far.connections == 0
    one = stays.decision
    assert (one.where, one.reason, one.bytes_out, one.cost) == ("local", "sure", 0, 0.0) and 0 < one.signal < 99
    leaves = ask(made(near, far, price=(1, 2)))
    two, asked = leaves.decision, far.asked[0]
    assert leaves.text == "hi" and (two.where, two.reason) == ("remote", "unsure") and two.bytes_out == len(asked.body)
    assert two.cost == pytest.approx(20 / 1e6) and two.seconds >= two.local_seconds > 0
    assert str(two).startswith("remote: the local model is unsure; ") and "nothing left" in str(one)


@pytest.mark.parametrize("kind", ["endpoint", "server", "engine", "decoder", "path"])
def test_who_answers_here_may_be_given_in_any_form(path, near, far, kind):
    with serving(path, name="tiny") as server:
        given = {"endpoint": near, "server": server, "engine": server.engine, "path": str(path),
                 "decoder": llmlab.decoder(path, dtype="float32")}[kind]
        with made(given, far, threshold=99.0) as route:
            found = ask(route)
    assert found.decision.where == "local" and len(found.text) > 0
    if kind != "path":                       # opened in the dtype that is quickest here, which may say something else
        assert found.text == alone(path, HELLO, 6)
        assert found.decision.signal == pytest.approx(ask(made(near, far, threshold=99.0)).decision.signal, abs=1e-3)


@pytest.mark.parametrize("unsure", ["entropy", "logprob", "agreement"])
def test_signals_grow_with_doubt(near, far, unsure):
    route = made(near, far, unsure=unsure, threshold=99.0)
    found = [ask(route, one).decision.signal for one in QUESTIONS[:4]]
    assert all(math.isfinite(one) and one >= 0 for one in found) and len(set(found)) > (1 if unsure != "agreement" else 0)


def test_the_numbers_of_doubt():
    assert entropy(Chance(0.0, (0.0, -9999.0))) == 0
    assert entropy(Chance(-0.7, (math.log(0.5), math.log(0.5)))) == pytest.approx(math.log(2))
    assert entropy(Chance(-0.7, (math.log(0.5),))) == pytest.approx(math.log(2))            # the rest counts as one
    assert agreed(("Paris.", "paris", "Rome", "PARIS!", "Oslo")) == ("Paris.", 0.6)


def test_a_server_that_tells_no_chances_is_told_so(far):
    with pytest.raises(LabError, match="agreement"):
        ask(made(Endpoint(far.url, "m"), far))
    assert ask(made(Endpoint(far.url, "m"), far, unsure="agreement", threshold=0.5)).decision.signal == 0


def test_rules(near, far):
    route = made(near, far, unsure=Rule(("contract",), longer=100), threshold=None)
    assert ask(route, "Read my Contract").decision.reason == "rule" and ask(route, "contractor").decision.reason == "sure"
    assert ask(route, "x" * 101).decision.where == "remote"
    own = made(near, far, unsure=lambda messages: len(messages) > 1, threshold=None)
    assert ask(own).decision.where == "local" and ask(own, HELLO * 2).decision.where == "remote"
    with pytest.raises(LabError, match="failed .ZeroDivisionError"):
        ask(made(near, far, unsure=lambda messages: 1 / 0, threshold=None))


# ---- limits -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("share", ["0.1", "0.07", "0.333", "0.5", "1", "0"])
@pytest.mark.parametrize("burst", [1, 5])
def test_a_share_holds_for_any_stream(share, burst):
    """Everything wanted at once, nothing for long and then everything, and by chance: after each question, in each window."""
    draw, exact = random.Random(0), Fraction(share)
    streams = ([True] * 500, [False] * 300 + [True] * 300, [draw.random() < 0.3 for _ in range(500)],
               ([True] * 20 + [False] * 50) * 8)
    for wanted in streams:
        bucket, calls = Share(share, burst), [0]
        for one in wanted:
            bucket.asked()
            calls.append(calls[-1] + (one and bucket.take()))
            assert calls[-1] <= exact * (len(calls) - 1)
        for width in (1, 7, 50, 200):
            assert all(calls[at + width] - calls[at] <= exact * width + burst for at in range(len(calls) - width))
        if all(wanted) and burst > 1:
            assert calls[-1] == int(exact * len(wanted))           # and what is allowed may be used


def test_a_share_holds_when_everything_is_unsure(near, far):
    route = made(near, far, at_most="30 %")
    where = [ask(route, one) for one in QUESTIONS]
    assert sum(one.decision.where == "remote" for one in where) == 3 == len(far.asked)
    kept = next(one for one in where if one.decision.where == "local")
    assert kept.decision.reason == "share" and kept.note == f"answered here: {REASONS['share']}"
    assert route.answer.startswith("Of 10 questions 7 stayed here and 3 went out (30%; at most 30% of the questions)")
    assert "7 that should have gone out were answered here" in route.answer


def test_a_share_holds_between_threads(near, far):
    route = made(near, far, at_most=0.25, unsure=lambda messages: True)
    threads = [threading.Thread(target=lambda: [ask(route) for _ in range(5)]) for _ in range(4)]
    [one.start() for one in threads]
    [one.join() for one in threads]
    assert len(far.asked) <= 5 and len(route.decisions) == 20


def test_so_many_a_month_hold_for_all_routers(near, far):
    routes = [made(near, far, at_most="3 per month", unsure=lambda messages: True) for _ in range(2)]
    found = [ask(routes[at % 2]).decision.reason for at in range(6)]
    assert found == ["rule"] * 3 + ["month"] * 3 and len(far.asked) == 3


def test_calibration_lets_no_more_than_the_share_through(near, far):
    route = made(near, far, at_most=0.3, threshold=None)
    with pytest.raises(LabError, match="calibrate"):
        ask(route)
    found = route.calibrate(QUESTIONS, max_tokens=6)
    assert found.share == 0.3 and found.low < 0.3 < found.high and far.connections == 0
    assert sum(one > route.threshold for one in found.signals) == 3
    assert found.answer.startswith("Of 10 questions 30% lie above") and "11% to 60%" in found.answer
    signals = [ask(route, one).decision for one in QUESTIONS]
    assert [one.signal for one in signals] == pytest.approx(found.signals)
    month = made(near, far, at_most="50 per month", threshold=None)
    with pytest.raises(LabError, match="a_month"):
        month.calibrate(QUESTIONS)
    assert month.calibrate(QUESTIONS, a_month=500, max_tokens=6).share == 0.1


@pytest.mark.parametrize(("signals", "share", "above"), [
    (range(10), 0.1, 1), (range(10), 0.19, 1), (range(10), 0.0, 0), (range(10), 1.0, 10), ([1.0] * 10, 0.5, 0),
    ([1, 1, 2, 2], 0.5, 2), ([1, 2, math.inf], 0.34, 1), (range(100), 0.07, 7)])
def test_thresholds(signals, share, above):
    found = calibrated(list(signals), share)
    assert sum(one > found.threshold for one in signals) == above and found.share == above / len(found.signals)


def test_wilsons_interval():
    """Against the published example (Newcombe 1998): 81 of 263 gives 0.2553 to 0.3662; 0 of 20 0 to 0.1611."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


def test_the_threshold_follows_what_is_asked(near, far):
    """Calibrated on the wrong questions, it finds the share again."""
    route, draw, wanted = made(near, far, at_most=0.2, threshold=None, adapt=0.05), np.random.default_rng(0), []
    route.calibrate_to(draw.normal(0, 1, 100).tolist())
    for one in draw.normal(3, 1, 2000):
        wanted.append(one > route.threshold)
        route._follow(one)
    assert np.mean(wanted[:50]) > 0.6 and np.mean(wanted[-1000:]) == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize("settings", [
    {"at_most": 2}, {"at_most": -0.1}, {"at_most": "many"}, {"at_most": "200"}, {"at_most": "1.5 per month"}, {"at_most": True},
    {"at_most": math.nan}, {"cap": 5}, {"unsure": "feeling"}, {"threshold": "x"}, {"redact": ("names",)},
    {"at_most": 0.1, "burst": 0}, {"unsure": "agreement", "samples": 1}])
def test_settings_that_are_refused(near, far, settings):
    with pytest.raises(LabError) as caught:
        made(near, far, **settings)
    assert "\n" not in str(caught.value)


def test_who_cannot_be_asked(far):
    remote = Endpoint(far.url, "m")
    for local in (3, None, object(), (1, 2)):
        with pytest.raises(LabError, match="local is nothing that answers"):
            router(local, remote)
    with pytest.raises(LabError, match="remote is no Endpoint"):
        router(remote, far.url)


# ---- what leaves ------------------------------------------------------------------------------------------------------

PRIVATE = "Mail anna.b@example.org from 192.168.1.7, see /home/anna/plan.txt"


def test_a_preview_is_what_leaves_to_the_byte(near, far):
    route = made(near, far)
    shown = route.preview(PRIVATE, max_tokens=6, stop=["anna.b@example.org"])
    assert far.connections == 0 and shown.redactions == 3
    assert shown.marked == ("user: Mail {anna.b@example.org -> [EMAIL_1]} from {192.168.1.7 -> [IP_1]}, see "
                            "{/home/anna/plan.txt -> [PATH_1]}\n")
    found = ask(route, PRIVATE, stop=["anna.b@example.org"])
    asked, = far.asked
    assert asked.body == shown.body and found.decision.bytes_out == len(shown.body) and found.decision.redactions == 3
    assert b"anna" not in asked.body and b"192.168" not in asked.body


def test_placeholders_come_back(near, far):
    far.always = lambda asked: answer(f"I wrote to {asked.json['messages'][0]['content'].split()[1]}, not to [EMAIL_2].")
    assert ask(made(near, far), PRIVATE).text == "I wrote to anna.b@example.org, not to [EMAIL_2]."


def test_hooks_and_none(near, far):
    ask(made(near, far, redact=(lambda text: text.replace("Anna", "somebody"),)), "Anna a@b.example")
    ask(made(near, far, redact=()), "Anna a@b.example")
    assert [asked.json["messages"][0]["content"] for asked in far.asked] == ["somebody a@b.example", "Anna a@b.example"]
    found = ask(made(near, far, redact=(lambda text: None,)))
    assert found.decision.reason == "redaction" and len(far.asked) == 2 and "nothing leaves" in found.note


def test_nothing_leaves_offline(near, far, monkeypatch):
    route = made(near, far)
    route.offline = True
    assert ask(route).decision.reason == "offline"
    route.offline = False
    monkeypatch.setenv("LLMLAB_OFFLINE", "1")
    found = ask(route)
    assert found.decision.reason == "offline" and "switched off" in found.note and far.connections == 0
    monkeypatch.delenv("LLMLAB_OFFLINE")
    assert ask(route).decision.where == "remote" and far.connections == 1


@pytest.mark.parametrize(("does", "reason"), [
    ((500, {}, {}), "server"), ((429, {}, {"Retry-After": "9999"}), "busy"), ((400, {"error": {"message": "no"}}, {}),
                                                                              "refused"),
    ("hang up", "network"), (b"?", "answer"), (1.0, "timeout")])
def test_where_the_call_fails_the_local_answer_is_given(path, near, far, does, reason):
    far.always = does if does != 1.0 else answer()
    far.does = [does] if does == 1.0 else []
    wait = 0.3 if does == 1.0 else 20.0
    found = ask(made(near, far, timeout=wait))
    assert found.text == alone(path, HELLO, 6) and found.decision.where == "local" and found.decision.reason == reason
    assert found.note.startswith(f"answered here: {REASONS[reason]}") and found.decision.bytes_out == len(far.asked[0].body)
    rule = ask(made(near, far, timeout=wait, unsure=lambda messages: True)) if does != 1.0 else found
    assert rule.text == found.text and rule.decision.reason == reason


def test_a_call_that_brings_no_words_leaves_the_local_answer(path, near, far):
    far.always = answer("  ")
    found = ask(made(near, far, price=(1, 2)))
    assert found.text == alone(path, HELLO, 6) and "no words (stop)" in found.note
    assert found.decision.where == "remote" and found.decision.cost == pytest.approx(20 / 1e6)       # it was asked, and paid


def test_no_network_at_all(path, near, far, monkeypatch):
    gone = type(far)("http://127.0.0.1:9/v1")
    found = ask(made(near, gone))
    assert found.text == alone(path, HELLO, 6) and found.decision.reason == "network"
    monkeypatch.delenv("NOT_THERE", raising=False)
    assert ask(made(near, far, key="env:NOT_THERE")).decision.reason == "key" and far.connections == 0


def test_the_cap_holds_and_the_answer_comes_from_here(near, far):
    far.always = answer(written=60)
    route = made(near, far, price=(0, 1000), cap="0.2 per month")
    found = [ask(route, max_tokens=100).decision for _ in range(4)]
    assert [one.reason for one in found] == ["unsure", "unsure", "cap", "cap"] and len(far.asked) == 2
    assert route.remote.ledger.month().spent == pytest.approx(0.12) and "for 0.120000" in route.answer
    other = made(near, far, price=(0, 1000), cap=0.2)
    assert ask(other, max_tokens=100).decision.reason == "cap"          # one purse for both


def test_where_nothing_answers_here_the_question_may_go_out(far):
    route = made(Endpoint("http://127.0.0.1:9/v1", "m", retries=0), far)
    found = ask(route)
    assert found.text == "hi" and found.decision.reason == "no local answer" and found.decision.signal is None
    route.offline = True
    with pytest.raises(LabError, match="nobody answers"):
        ask(route)


def test_a_question_too_long_for_here_may_go_out(path, far):
    with made(llmlab.decoder(path, dtype="float32"), far) as route:
        assert ask(route, "long " * 300).decision.reason == "no local answer" and ask(route).decision.reason == "unsure"
        with pytest.raises(LabError, match="chances is not set here"):
            ask(route, chances=3)


@pytest.mark.parametrize("settings", [{"at_most": "5 per month"}, {"cap": 1}])
def test_no_answer_is_lost_over_a_ledger_that_cannot_be_read(path, near, far, settings):
    route = made(near, far, price=(1, 1), **settings)
    route.remote.ledger.path.parent.mkdir(parents=True, exist_ok=True)
    route.remote.ledger.path.write_text("[1")
    found = ask(route)
    assert found.text == alone(path, HELLO, 6) and found.decision.reason == "count" and not far.asked
    assert found.note.startswith(f"answered here: {REASONS['count']} (") and "remove it to count from zero" in found.note


def test_no_answer_is_lost_over_what_may_not_be_sent(path, near, far):
    found = ask(made(near, far, price=(1, 1), cap=1), [*HELLO, {"role": "assistant", "content": "x", "audio": {"id": "1"}}])
    assert found.decision.reason == "count" and found.text and not far.asked


def test_no_answer_is_lost_over_a_log_that_cannot_be_written(near, far, tmp_path):
    route = made(near, far, log=tmp_path / "sub" / "log.jsonl")
    route.log.path.unlink()
    route.log.path.mkdir()
    found = ask(route)
    assert found.text == "hi" and "cannot be written" in found.note and len(route.decisions) == 1 == len(far.asked)


def test_offline_asks_no_other_computer_to_answer_here(far, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it tried"))
    elsewhere = Endpoint("http://192.0.2.1/v1", "m", allow_http=True, retries=0, timeout=0.1)
    for settings in ({}, {"unsure": lambda messages: False}):
        with pytest.raises(LabError, match="offline and .* is another computer"):
            ask(made(elsewhere, far, offline=True, **settings))
    with pytest.raises(LabError, match="offline"):
        made(elsewhere, far, offline=True, at_most=0.5).calibrate(QUESTIONS)


def test_a_placeholder_is_in_no_setting_either(near, far):
    route = made(near, far)
    shown = route.preview("a@b.example", stop=["[EMAIL_1]", "c@b.example"]).body
    assert b'"content":"[EMAIL_2]"' in shown and b'["[EMAIL_1]","[EMAIL_3]"]' in shown


def test_the_caps_of_a_router_are_its_own(near, far):
    remote = Endpoint(far.url, "m", price=(1, 1))
    assert router(near, remote, cap=3).remote.cap == 3 and remote.cap is None


# ---- what is written down ---------------------------------------------------------------------------------------------

def test_the_log_has_every_decision_and_no_text(near, far, tmp_path):
    far.does = [(400, {"error": {"message": "you wrote: secret words"}}, {})]
    route = made(near, far, log=tmp_path / "sub" / "log.jsonl")
    for question in ("secret words", "secret words", "others"):
        ask(route, question)
    text = route.log.path.read_text()
    assert "secret" not in text and "words" not in text and '"hi"' not in text and len(text.splitlines()) == 3
    read = route.log.read()
    assert [one.reason for one in read] == ["refused", "unsure", "unsure"] and read == route.decisions
    assert read[0].digest == read[1].digest != read[2].digest and route.log.path.stat().st_mode & 0o077 == 0
    with open(route.log.path, "a") as file:
        file.write('{"at": 1, "whe')
    assert len(Log(route.log.path).read()) == 3
    ask(made(near, far, log=tmp_path / "texts.jsonl", log_texts=True), "secret words")
    said = json.loads((tmp_path / "texts.jsonl").read_text())
    assert said["messages"] == [{"role": "user", "content": "secret words"}] and said["text"] == "hi"
    with pytest.raises(LabError, match="cannot be written"):
        ask(made(near, far, log=tmp_path))


def test_a_log_is_read_by_its_lines_and_no_others(tmp_path):
    """Texts may hold what Unicode calls a line's end; a crash may cut a line off, in the middle of a letter too."""
    log = Log(tmp_path / "log.jsonl", texts=True)
    one = Decision(1.0, "local", "sure", "x", 0.5, 1.0)
    log.add(one, [{"role": "user", "content": 'a\u2028b\x85c\x0cd {"at": 3}'}], "\u2029")
    line = log.path.read_bytes()
    log.path.write_bytes(line + line[:-5])
    log.add(one, HELLO, "x")
    log.path.write_bytes(log.path.read_bytes() + "\u00e9".encode()[:1])
    assert log.read() == [one, one]


def test_many_write_one_log(near, far, tmp_path):
    routes = [made(near, far, log=tmp_path / "log.jsonl", unsure=lambda messages: True) for _ in range(4)]
    threads = [threading.Thread(target=lambda one=one: [ask(one) for _ in range(5)]) for one in routes]
    [one.start() for one in threads]
    [one.join() for one in threads]
    assert len(Log(tmp_path / "log.jsonl").read()) == 20


def test_the_key_is_in_nothing_that_is_written_or_shown(near, far, tmp_path, monkeypatch, capsys):
    secret = "sk-Zq7-verysecret-0123456789abcdef"
    monkeypatch.setenv("LLMLAB_TEST_KEY", secret)
    far.does = [(401, {"error": {"message": f"no: {secret}"}}, {}), answer(f"it is {secret}")]
    route = made(near, far, key="env:LLMLAB_TEST_KEY", price=(1, 1), cap=1, log=tmp_path / "log.jsonl", log_texts=True)
    found = [ask(route), ask(route)]
    shown = [route.preview("hello"), *found, route, route.table, route.answer, route.to_frame().to_string(),
             [vars(one) for one in route.decisions], pickle.dumps(route.decisions), vars(route), vars(route.remote)]
    print(*shown)
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert far.asked[1].headers["Authorization"] == f"Bearer {secret}" and len(files) >= 2
    said = capsys.readouterr()
    assert secret not in "".join([said.out, said.err, *files, *map(repr, shown)]) and "[key]" in found[1].text


def test_decisions_are_a_table(near, far):
    route = made(near, far)
    assert route.answer == "Nothing was asked yet." and repr(route.table) == "(no rows)"
    ask(route)
    assert list(route.table[0]) == ["where", "reason", "unsure", "threshold", "bytes out", "redacted", "cost", "seconds"]
    assert route.to_frame().shape == (1, 15) and "price that is not known" in route.answer


# ---- what it is worth -------------------------------------------------------------------------------------------------

def test_a_curve_by_hand():
    found = route_curve([1, 0, 0, 1], [1, 1, 0, 0], [0.1, 0.9, 0.5, 0.2], [1, 2, 3, 4])
    assert found.quality.tolist() == [0.5, 0.75, 0.75, 0.5, 0.5] and found.oracle.tolist() == [0.5, 0.75, 0.75, 0.75, 0.5]
    assert found.cost.tolist() == [0, 0.5, 1.25, 2.25, 2.5] and found.by_chance.tolist() == [0.5] * 5
    assert (found.local, found.remote, found.at(0.5), found.gained) == (0.5, 0.5, 2, pytest.approx(2 / 3))
    same = route_curve([0, 1, 0], [1, 1, 1], [1, 1, 1])
    assert same.quality == pytest.approx(same.by_chance) and same.gained == pytest.approx(0)
    assert route_curve([0, 1], [1, 1], [1, 0]).gained == 1
    for wrong in (([], [], []), ([1], [1, 2], [1]), ([1], [1], [1], [1, 2])):
        with pytest.raises(LabError):
            route_curve(*wrong)


def test_the_recorded_pair():
    """The remote is better, and no signal worse than chance, in what is recorded; luck is told beside it."""
    rows = recorded()
    assert len(rows) >= 80 and len({one.question for one in rows}) >= 80
    for name in ("entropy", "logprob", "agreement"):
        found = recorded_curve(name)
        assert found.remote > found.local and found.gained > -found.luck and found.cost[-1] > 0 and name in found.answer
        assert 0.03 < found.luck < 0.2 and found.gained < 1
        assert len(found.to_table()) == 6
    with pytest.raises(LabError, match="not recorded"):
        recorded_curve("luck")


def test_the_face_has_it():
    assert llmlab.router is router and os.path.basename(Ledger.named("a b/c").path) == "a-b-c.json"
