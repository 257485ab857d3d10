"""Endpoint against real servers on this computer: what it asks, what goes wrong, that its key stays where it lies, its cap."""

import copy
import io
import json
import logging
import pickle
import subprocess
import sys
import threading
import time
import traceback

import pytest
from endpoint_server import HELLO, answer, far_server
from server_clients import alone, serving, tiny

import llmlab
from llmlab import Endpoint, LabError
from llmlab.endpoints import CallFailed, Ledger, Price
from llmlab.endpoints.addresses import checked_url
from llmlab.endpoints.spending import amount_of

SECRET = "sk-Zq7-verysecret-0123456789abcdef"


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Spending of these tests is written elsewhere; no switch of the environment counts."""
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLMLAB_TEST_KEY", SECRET)
    for name in ("LLMLAB_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def far():
    with far_server() as server:
        yield server


def endpoint(far, **settings) -> Endpoint:
    return Endpoint(far.url, "m", **{"wait": 0.01, "timeout": 5.0} | settings)


def kind_of(call) -> str:
    with pytest.raises(CallFailed) as caught:
        call()
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value)
    return caught.value.kind


# ---- asking -----------------------------------------------------------------------------------------------------------

def test_llmlab_serve_is_asked_as_it_answers(tmp_path_factory):
    path = tiny(tmp_path_factory)
    with serving(path, name="tiny") as server:
        near = Endpoint(server.base_url, "tiny", price=(1, 2))
        found = near.chat("hello", max_tokens=12, chances=5)
        assert near.models() == ["tiny"] and near.healthy() and near.here
        assert found.text == str(found) == alone(path, HELLO, 12) and found.finish == "length"
        assert found.completion_tokens == 12 == len(found.chances) and found.cost == pytest.approx(
            (found.prompt_tokens + 2 * 12) / 1e6)
        assert all(len(one.top) == 5 and one.logprob == max(one.top) for one in found.chances)
        pieces = list(near.stream(HELLO, max_tokens=12))
        assert "".join(pieces) == found.text and len(pieces) > 1
        assert len(near.chat("hello", max_tokens=4, temperature=1.0, n=3, seed=1).texts) == 3
        near.close()
        assert near.chat("hello", max_tokens=12).text == found.text
    assert not Endpoint(server.base_url, "tiny").healthy()


def test_only_what_was_asked_goes_out(far, monkeypatch):
    """No account of the environment's, no version of ours, no description of this computer."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other-key-of-the-environment")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-mine")
    endpoint(far).chat(HELLO)
    asked, = far.asked
    assert {name.lower() for name in asked.headers} == {
        "host", "content-type", "content-length", "accept", "accept-encoding", "connection", "user-agent"}
    assert asked.json == {"model": "m", "messages": HELLO, "max_tokens": 256, "temperature": 0.0}
    assert asked.headers["User-Agent"] == "llmlab" and "mine" not in str(asked.headers)


def test_a_preview_is_what_is_sent_to_the_byte(far):
    near = endpoint(far, key="env:LLMLAB_TEST_KEY")
    messages = [{"role": "user", "content": 'é "quoted" \u2028 \U0001f600'}]
    shown = near.preview(messages, max_tokens=7, stop=["x"])
    assert far.connections == 0
    found = near.chat(messages, max_tokens=7, stop=["x"])
    asked, = far.asked
    assert asked.body == shown.body and found.bytes_out == len(shown.body)
    assert shown.url == far.url + "/chat/completions" and shown.headers["authorization"] == "[key]"
    sent = {name.lower(): value for name, value in asked.headers.items()}
    assert sent == shown.headers | {"authorization": f"Bearer {SECRET}"}


@pytest.mark.parametrize(("given", "found"), [
    ("https://api.example.com", "https://api.example.com/v1"), ("https://api.example.com/v1/", "https://api.example.com/v1"),
    ("http://localhost:8080", "http://localhost:8080/v1"), ("http://[::1]:9/v1", "http://[::1]:9/v1"),
    ("https://a.example/x/chat/completions", "https://a.example/x"), (" https://A.example/api ", "https://a.example/api")])
def test_addresses_are_put_in_order(given, found):
    assert checked_url(given) == found


@pytest.mark.parametrize("given", [
    "ftp://a.example", "a.example", "", None, "https://", "https://user:pw@a.example/v1", "https://a.example/v1?key=1",
    "http://a.example/v1", "http://192.168.0.4:8080", "http://localhost.example", "https://a b", "https://[::1", "https://a:x"])
def test_addresses_that_are_refused(given):
    with pytest.raises(LabError) as caught:
        Endpoint(given, "m")
    assert "\n" not in str(caught.value) and "pw" not in str(caught.value)


def test_plain_http_can_be_allowed():
    assert not Endpoint("http://192.168.0.4:8080", "m", allow_http=True).here


@pytest.mark.parametrize("settings", [
    {"model": ""}, {"price": 3}, {"price": (1, -1)}, {"price": "ab"}, {"cap": 5}, {"price": (1, 1), "cap": "much"},
    {"price": Price(1, -1)}, {"price": Price(float("nan"), 1)}, {"price": (1, 1), "cap": "1,5 per month"},
    {"price": (1, 1), "cap": ""}, {"timeout": 0}, {"timeout": float("inf")},
    {"retries": -1}, {"retries": 1.5}, {"wait": -1}, {"limit": "tokens"}])
def test_settings_that_are_refused(settings):
    with pytest.raises(LabError) as caught:
        Endpoint("http://127.0.0.1:1", **{"model": "m"} | settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("messages", "settings"), [
    ([], {}), (3, {}), ([{"content": "x"}], {}), ("x", {"max_tokens": 0}), ("x", {"stream": True}), ("x", {"model": "other"}),
    ("x", {"nonsense": 1}), ("x", {"n": -1000}), ("x", {"n": 0}), ("x", {"n": 1.5}), ("half \ud800", {}),
    ("x", {"temperature": float("nan")}), ([{"role": "user", "content": iter(["x"])}], {}), ("x", {"stop": object()}),
    ("x", {"extra_headers": {"Authorization": "x"}})])
def test_what_cannot_be_asked(far, messages, settings):
    with pytest.raises(LabError) as caught:
        endpoint(far).chat(messages, **settings)
    assert not isinstance(caught.value, CallFailed) and not far.asked


# ---- what goes wrong --------------------------------------------------------------------------------------------------

def test_what_another_attempt_cures_is_tried_again(far):
    far.does = [(500, {}, {}), "hang up", (429, {}, {"Retry-After": "0.05"})]
    found = endpoint(far, retries=3).chat(HELLO)
    assert found.text == "hi" and found.attempts == 4 == len(far.asked) and found.bytes_out == 4 * len(far.asked[0].body)


def test_it_waits_as_long_as_the_server_says_or_gives_up(far):
    far.does = [(429, {}, {"Retry-After": "0.3"})]
    began = time.monotonic()
    endpoint(far).chat(HELLO)
    assert time.monotonic() - began >= 0.3
    far.does = [(429, {}, {"Retry-After": "3600"})]
    assert kind_of(lambda: endpoint(far, retries=5).chat(HELLO)) == "busy" and len(far.asked) == 3


@pytest.mark.parametrize(("does", "kind", "times"), [
    ((500, {}, {}), "server", 3), ((503, {}, {}), "server", 3), ((429, {}, {}), "busy", 3), ("hang up", "network", 3),
    ((400, {"error": {"message": "no"}}, {}), "refused", 1), ((401, {"error": {"message": f"bad {SECRET}"}}, {}), "refused", 1),
    ((307, {}, {"Location": "http://127.0.0.1:9/v1"}), "refused", 1), (b"no json", "answer", 1), (b"{}", "answer", 1),
    (b'{"choices": []}', "answer", 1), (b'{"choices": [{"message": {"content": 3}}]}', "answer", 1), (b"[1]", "answer", 1)])
def test_what_goes_wrong_has_a_kind_and_a_line(far, does, kind, times):
    far.always = does
    assert kind_of(lambda: endpoint(far, key="env:LLMLAB_TEST_KEY").chat(HELLO)) == kind
    assert len(far.asked) == times


def test_a_server_that_is_silent_or_not_there(far):
    far.does = [2.0, answer()]
    assert kind_of(lambda: endpoint(far, timeout=0.2, retries=0).chat(HELLO)) == "timeout"
    assert kind_of(lambda: Endpoint("http://127.0.0.1:9", "m", retries=0).chat(HELLO)) == "network"


def test_a_stream_that_breaks_off_says_so(far):
    far.always = answer("one two three") | {"cut": 2}
    got = []
    assert kind_of(lambda: got.extend(endpoint(far).stream(HELLO))) == "network"
    assert "".join(got) == "one two "


def events(*said: dict) -> bytes:
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"".join(f"data: {json.dumps(head | one)}\n\n".encode() for one in said)


def piece(text: str, ended=None, **more) -> dict:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": ended}]} | more


def test_a_stream_that_just_ends_was_broken_off_and_counts_in_full(far):
    far.always = events(piece("one "), piece("two "))
    near, got = endpoint(far, price=(1, 1), cap=1), []
    assert kind_of(lambda: got.extend(near.stream(HELLO))) == "network" and got == ["one ", "two "]
    assert near.ledger.month().spent > 256e-6
    far.always = events(piece("one "), piece("two", "stop"))
    assert "".join(near.stream(HELLO)) == "one two"


def test_a_stream_that_counts_as_it_goes_and_is_left_counts_in_full(far):
    """vLLM tells with each piece what it took so far; what it writes after we left it bills all the same."""
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    far.always = events(piece("one ", usage=usage), piece("two", "stop", usage=usage))
    near = endpoint(far, price=(1, 1), cap=1)
    pieces = near.stream(HELLO)
    next(pieces)
    pieces.close()
    assert near.ledger.month().spent > 256e-6


@pytest.mark.parametrize("size", [1, 5, 33])
def test_a_key_that_comes_back_in_pieces_is_not_told(far, size):
    text = f"your key is {SECRET}, {SECRET[:9]} and {SECRET[:3]}"
    parts = [text[at:at + size] for at in range(0, len(text), size)]
    far.always = events(*map(piece, parts[:-1]), piece(parts[-1], "stop"))
    got = "".join(endpoint(far, key="env:LLMLAB_TEST_KEY").stream(HELLO))
    assert got == text.replace(SECRET, "[key]")


def test_nothing_leaves_this_computer_when_it_is_switched_off(monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("it tried"))
    for name in ("LLMLAB_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
        assert kind_of(lambda: Endpoint("https://api.example.com", "m").chat(HELLO)) == "offline"
        monkeypatch.delenv(name)


# ---- keys -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given", [SECRET, "env:" + SECRET, "env:sk_0123456789abcdef", "hf_0123456789", "keyring:x", "", 3,
                                   b"x", "bearer " + SECRET, "env:", "keyring:/", "ENV:X", "env:A B"])
def test_a_key_itself_is_refused_and_not_repeated(given):
    with pytest.raises(LabError) as caught:
        Endpoint("https://api.example.com", "m", key=given)
    said = "".join(traceback.format_exception(caught.value))
    assert "never the key itself" in str(caught.value) and "\n" not in str(caught.value)
    assert SECRET not in said and "0123456789" not in str(caught.value)


def test_a_key_that_is_not_there(far, monkeypatch):
    monkeypatch.delenv("LLMLAB_TEST_KEY")
    assert kind_of(lambda: endpoint(far, key="env:LLMLAB_TEST_KEY").chat(HELLO)) == "key" and far.connections == 0
    monkeypatch.setenv("LLMLAB_TEST_KEY", "two\nlines")
    assert kind_of(lambda: endpoint(far, key="env:LLMLAB_TEST_KEY").chat(HELLO)) == "key"


def test_a_key_of_the_keyring(far, monkeypatch):
    import keyring
    from keyring.backend import KeyringBackend

    class Own(KeyringBackend):
        priority = 1

        def get_password(self, service, username):
            return SECRET if (service, username) == ("llm", "me") else None

        def set_password(self, service, username, password):
            raise NotImplementedError

    before = keyring.get_keyring()
    keyring.set_keyring(Own())
    try:
        endpoint(far, key="keyring:llm/me").chat(HELLO)
        assert far.asked[0].headers["Authorization"] == f"Bearer {SECRET}"
        assert kind_of(lambda: endpoint(far, key="keyring:llm/you").chat(HELLO)) == "key"
    finally:
        keyring.set_keyring(before)
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(CallFailed, match="pip install keyring"):
        endpoint(far, key="keyring:llm/me").chat(HELLO)


def reached(root) -> str:
    """Everything that can be reached from an object by its attributes, items and exceptions, as text."""
    seen, ahead, said = set(), [root], []
    while ahead:
        one = ahead.pop()
        if id(one) in seen or isinstance(one, (type, type(sys))):
            continue
        seen.add(id(one))
        if isinstance(one, (str, bytes)):
            said.append(str(one))
        elif isinstance(one, dict):
            ahead += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            ahead += one
        elif hasattr(one, "__dict__") and not callable(one):
            said.append(f"{one!r}")
            ahead += vars(one).values()
        if isinstance(one, BaseException):
            ahead += [one.__cause__, one.__context__, one.args]
    assert len(seen) > 10
    return "\n".join(said)


@pytest.mark.parametrize("does", [answer(f"your key is {SECRET}"), (401, {"error": {"message": f"wrong: {SECRET}"}}, {}),
                                  (500, {"error": SECRET}, {}), "hang up", b"no json", 2.0])
def test_the_key_is_nowhere_but_in_the_request(far, does):
    far.always, said = does, io.StringIO()
    if does == 2.0:
        far.does, far.always = [does], answer()
    handler, root = logging.StreamHandler(said), logging.getLogger()
    loggers = [logging.getLogger(name) for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2", "")]
    levels = [one.level for one in loggers]
    root.addHandler(handler)
    for one in loggers:
        one.setLevel(1)
    near = endpoint(far, key="env:LLMLAB_TEST_KEY", timeout=0.3 if does == 2.0 else 20.0, retries=1, price=(1, 1), cap=1)
    caught, text = None, ""
    try:
        text = near.chat(HELLO).text + "".join(near.stream(HELLO))
    except LabError as error:
        caught = error
    finally:
        root.removeHandler(handler)
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
    assert any(asked.headers["Authorization"] == f"Bearer {SECRET}" for asked in far.asked)
    trace = "".join(traceback.format_exception(caught)) if caught else ""
    everything = "\n".join([repr(near), str(near), reached((near, caught)), trace, text, said.getvalue(),
                            str(pickle.dumps(near)), str(vars(copy.copy(near))), near.ledger.path.read_text()])
    assert "chat/completions" in said.getvalue() and SECRET not in everything and "verysecret" not in everything
    assert pickle.loads(pickle.dumps(near)).key == near.key


# ---- the cap ----------------------------------------------------------------------------------------------------------

def test_a_call_is_settled_by_what_the_server_counts(far):
    near = endpoint(far, price=(2, 10), cap="5 per month")
    found = near.chat(HELLO, max_tokens=50)
    assert found.cost == pytest.approx((10 * 2 + 5 * 10) / 1e6)
    month = near.ledger.month()
    assert month.spent == pytest.approx(found.cost) and month.reserved == 0


@pytest.mark.parametrize(("does", "counted"), [
    ((500, {}, {}), False), ((504, {}, {}), True), ((429, {}, {}), False), ((401, {}, {}), False), ("hang up", True),
    (2.0, True), (b"no json", True), (answer(usage=None), True), (answer(read=-5, written=-10**9), True)])
def test_what_nobody_counts_is_taken_at_its_worst(far, does, counted):
    far.does = [does]
    near = endpoint(far, price=(2, 10), cap=5, retries=0, timeout=0.3 if does == 2.0 else 20.0)
    worst = near.worst(near.body(HELLO)) / 1e9
    assert worst > 256 * 10 / 1e6
    try:
        near.chat(HELLO)
    except CallFailed as failed:
        assert failed.cost == pytest.approx(worst * counted)
    assert near.ledger.month().counted == pytest.approx(worst * counted)


def test_a_stream_that_is_left_counts_in_full(far):
    far.always = answer("one two three")
    near = endpoint(far, price=(2, 10), cap=5)
    worst = near.worst(near.body(HELLO)) / 1e9
    pieces = near.stream(HELLO)
    next(pieces)
    assert near.ledger.month().reserved == pytest.approx(worst, rel=0.2)
    pieces.close()
    assert near.ledger.month().spent == pytest.approx(worst, rel=0.2) and not near.ledger.month().reserved
    list(near.stream(HELLO))
    assert near.ledger.month().spent < 1.3 * worst


def test_nothing_is_asked_past_the_cap(far):
    near = endpoint(far, price=(2, 10), cap=0.004)
    near.chat(HELLO)
    calls = len(far.asked)
    assert kind_of(lambda: near.chat(HELLO, max_tokens=100_000)) == "cap" and len(far.asked) == calls
    assert kind_of(lambda: list(near.stream(HELLO, max_tokens=100_000))) == "cap" and len(far.asked) == calls
    with pytest.raises(LabError, match="only text"):
        near.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a.example"}}]}])
    near.ledger.path.write_text("[1")
    with pytest.raises(LabError, match="cannot be read"):
        near.chat(HELLO)
    assert len(far.asked) == calls


@pytest.mark.parametrize(("messages", "settings"), [
    ([{"role": "user", "content": {"type": "image_url", "image_url": {"url": "https://a.example"}}}], {}),
    ([{"role": "assistant", "audio": {"id": "a"}}], {}), ("x", {"service_tier": "priority"}), ("x", {"modalities": ["audio"]}),
    ("x", {"prediction": {"type": "content", "content": "x"}}), ("x", {"web_search_options": {}}),
    ("x", {"tools": [{"type": "web_search"}]})])
def test_with_a_cap_nothing_goes_that_is_billed_by_other_counts(far, messages, settings):
    assert kind_of(lambda: endpoint(far, price=(1, 1), cap=1).chat(messages, **settings)) == "count" and not far.asked
    endpoint(far, price=(1, 1)).chat(messages, **settings)


def test_where_nobody_is_nothing_was_sent_and_nothing_is_spent():
    near = Endpoint("http://127.0.0.1:9", "m", price=(1, 1), cap=1, wait=0.01)
    with pytest.raises(CallFailed, match="cannot be reached, 3 times") as caught:
        near.chat(HELLO)
    assert caught.value.kind == "network" and caught.value.bytes_out == 0 == caught.value.cost
    assert near.ledger.month().counted == 0


@pytest.mark.parametrize(("given", "amount"), [("1,500 per month", 1500), ("1_500", 1500), ("0.5 a month", 0.5), (".5", 0.5)])
def test_amounts(given, amount):
    assert amount_of(given) == amount


def test_an_answer_is_not_lost_where_its_cost_cannot_be_written(far, tmp_path):
    near = endpoint(far, price=(1, 1), cap=1, ledger=tmp_path / "spent.json")

    def spoil(asked):
        near.ledger.path.write_text("[1")
        return answer()
    far.always = spoil
    assert near.chat(HELLO).text == "hi"
    assert kind_of(lambda: near.chat(HELLO)) == "count" and len(far.asked) == 1


def test_a_ledger_where_nothing_can_be_written_lets_nothing_out(far, tmp_path):
    (tmp_path / "file").write_text("")
    near = endpoint(far, price=(1, 1), cap=1, ledger=tmp_path / "file" / "spent.json")
    assert kind_of(lambda: near.chat(HELLO)) == "count" and not far.asked


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"x": {"spent": 0, "calls": 0, "open": {}}}', '{"2026-11": {}}',
                                  '{"2026-11": {"spent": -1, "calls": 0, "open": {}}}',
                                  '{"2026-11": {"spent": 0, "calls": NaN, "open": {}}}',
                                  '{"2026-11": {"spent": 0, "calls": 0, "open": []}}'])
def test_a_damaged_ledger_lets_nothing_out(far, tmp_path, text):
    (tmp_path / "spent.json").write_text(text)
    near = endpoint(far, price=(1, 1), cap=1, ledger=tmp_path / "spent.json")
    assert kind_of(lambda: near.chat(HELLO)) == "count" and not far.asked
    assert (tmp_path / "spent.json").read_text() == text


def test_a_clock_that_goes_back_opens_no_purse_again(tmp_path):
    now = [40 * 86400.0]
    ledger = Ledger(tmp_path / "a.json", clock=lambda: now[0])
    ledger.settle(ledger.reserve(10**9, 1), 10**9)
    assert ledger.count(1)
    now[0] = 0.0
    with pytest.raises(LabError, match="1970-02"):
        ledger.reserve(1, 1)
    assert not ledger.count(1) and ledger.month().spent == 1


def test_a_call_on_the_edge_of_two_months_is_settled_where_it_was_reserved(tmp_path):
    """The clock is read once: between two looks a month may end."""
    ticks = iter([31 * 86400.0 - 1] + [31 * 86400.0] * 9)
    ledger = Ledger(tmp_path / "a.json", clock=lambda: next(ticks))
    ledger.settle(ledger.reserve(10**9, 1), 10**8)
    assert json.loads(ledger.path.read_text())["1970-01"] == {"spent": 10**8, "calls": 0, "open": {}}


def test_a_ledger_is_one_by_any_name(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    monkeypatch.chdir(tmp_path)
    first, link = Ledger("a.json"), Ledger(tmp_path / "link.json")
    first.settle(first.reserve(10**9, 1), 10**9)
    monkeypatch.chdir(tmp_path / "sub")
    assert first.month().spent == 1
    with pytest.raises(LabError):
        link.reserve(1, 1)


SPENDING = """
import sys, threading
from llmlab import Endpoint, LabError
near = Endpoint(sys.argv[1], "m", price=(0, 1000), cap=1, ledger=sys.argv[2], retries=0)
def ask():
    for _ in range(6):
        try:
            near.chat("hello", max_tokens=100)
        except LabError:
            pass
threads = [threading.Thread(target=ask) for _ in range(4)]
[one.start() for one in threads]
[one.join() for one in threads]
"""


def test_two_processes_with_threads_never_pass_the_cap(far, tmp_path):
    """Answers of 60 tokens cost 0.06 each, at worst 0.1: 48 are asked for, the cap is 1."""
    far.always = answer(read=10, written=60)
    ledger = tmp_path / "spent.json"
    command = [sys.executable, "-c", SPENDING, far.url, str(ledger)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for one in running:
        assert one.communicate(timeout=120)[1] == ""
    month = Ledger(ledger).month()
    assert month.reserved == 0 and month.spent == pytest.approx(0.06 * len(far.asked))
    assert month.spent <= 1 and len(far.asked) >= 15      # the cap lets 15 or 16 through, whoever comes first


CUT_OFF = """
import os, sys, threading
from llmlab import Endpoint
near = Endpoint(sys.argv[1], "m", price=(0, 1000), cap=1, ledger=sys.argv[2])
threading.Timer(0.4, lambda: os._exit(3)).start()
near.chat("hello", max_tokens=100)
"""


def test_a_process_that_dies_in_a_call_has_spent_its_worst(far, tmp_path):
    far.does = [30.0]
    done = subprocess.run([sys.executable, "-c", CUT_OFF.replace("0.4", "5.0"), far.url, tmp_path / "spent.json"], timeout=60)
    assert done.returncode == 3 and len(far.asked) == 1
    assert Ledger(tmp_path / "spent.json").month().reserved == pytest.approx(0.1)


def test_a_month_ends(tmp_path):
    now = [0.0]
    ledger = Ledger(tmp_path / "a.json", clock=lambda: now[0])
    name = ledger.reserve(10**9, 1)
    with pytest.raises(LabError):
        ledger.reserve(1, 1)
    now[0] = 40 * 86400.0
    assert ledger.month().counted == 0
    ledger.settle(name, 5 * 10**8)
    ledger.settle(name, 5 * 10**8)
    assert ledger.month().counted == 0 and json.loads(ledger.path.read_text())["1970-01"]["spent"] == 5 * 10**8
    assert [ledger.count(2) for _ in range(3)] == [True, True, False]
    threads = [threading.Thread(target=ledger.count) for _ in range(8)]
    [one.start() for one in threads]
    [one.join() for one in threads]
    assert ledger.month().calls == 10


def test_the_face_has_it():
    assert llmlab.Endpoint is Endpoint
