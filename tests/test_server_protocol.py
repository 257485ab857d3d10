"""What a server checks before it does anything: bytes, JSON, requests, keys, hosts; and how it counts."""

import math

import pytest
from starlette.datastructures import Headers

from llmlab.errors import LabError
from llmlab.server import Limits, metrics
from llmlab.server.bodies import object_of
from llmlab.server.guarding import Guard, checked_key, is_loopback
from llmlab.server.limits import Gate
from llmlab.server.protocol import Chat, Completion, request_of
from llmlab.server.refusals import Refusal

CHAT = {"model": "a", "messages": [{"role": "user", "content": "b"}]}


# ---- bodies -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("body", "says"), [
    (b"", "Expecting value"), (b"{", "Expecting"), (b"[]", "no object"), (b"null", "no object"), (b'"a"', "no object"),
    (b'{"a": NaN}', "NaN is no number"), (b'{"a": -Infinity}', "no number"), (b'{"a": 1e999}', "too large"),
    (b'{"a": ' + b"9" * 5000 + b"}", "JSON"), (b'{"a": "\xff"}', "no UTF-8"), (b'{"a": "\\ud800"}', "surrogate"),
    (b'{"\\udc00": 1}', "surrogate"), (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "100 levels"),
    (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "100 levels"), (b'{"a": 1} {"b": 2}', "Extra data"), (b"\xef\xbb\xbf{}", "JSON"),
])
def test_bodies_that_are_no_object(body, says):
    with pytest.raises(Refusal, match=says) as refusal:
        object_of(body)
    assert refusal.value.status == 400 and len(refusal.value.message) < 400 and "\n" not in refusal.value.message


def test_bodies_that_are_one():
    assert object_of('{"a": ["ä", 1.5, -3, null, {"b": true}], "c": "\\ud83d\\ude00"}'.encode()) == {
        "a": ["ä", 1.5, -3, None, {"b": True}], "c": "\U0001f600"}
    deep = b'{"a":' * 90 + b"1" + b"}" * 90
    assert object_of(deep)


# ---- requests -----------------------------------------------------------------------------------------------------

def test_null_is_as_if_it_were_not_there():
    found = request_of(Chat, CHAT | {"temperature": None, "stop": None, "tools": None, "anything": None, "n": None})
    assert (found.temperature, found.stop, found.tools, found.n) == (1.0, [], None, 1)


@pytest.mark.parametrize(("given", "prompts"), [
    ("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), (["a", [1]], ["a", [1]])])
def test_prompts(given, prompts):
    assert request_of(Completion, {"model": "a", "prompt": given}).prompt == prompts


@pytest.mark.parametrize("given", [[], [[]], [True], [1.5], [["a"]], {}, 5, [None], [1, "a"]])
def test_prompts_that_are_none(given):
    with pytest.raises(Refusal) as refusal:
        request_of(Completion, {"model": "a", "prompt": given})
    assert refusal.value.param == "prompt"


def test_a_missing_model_and_missing_messages():
    with pytest.raises(Refusal, match="you must provide a model") as refusal:
        request_of(Chat, {"messages": CHAT["messages"]})
    assert refusal.value.param == "model"
    with pytest.raises(Refusal, match="missing") as refusal:
        request_of(Chat, {"model": "a"})
    assert refusal.value.param == "messages" and refusal.value.code == "missing_required_parameter"


def test_best_of_as_many_as_n_is_n():
    assert request_of(Completion, {"model": "a", "prompt": "b", "n": 2, "best_of": 2}).n == 2
    with pytest.raises(Refusal, match="best_of is not supported"):
        request_of(Completion, {"model": "a", "prompt": "b", "n": 1, "best_of": 2})


# ---- who asks -----------------------------------------------------------------------------------------------------

async def _app(scope, receive, send):
    raise AssertionError("not asked")


def refused(guard: Guard, path: str = "/v1/models", **headers) -> int | None:
    """The status a request with these headers is refused with."""
    found = guard._refusal(Headers({name.replace("_", "-"): text for name, text in headers.items()}), path)
    return found and found.status


@pytest.mark.parametrize(("host", "status"), [
    ("localhost:8080", None), ("LOCALHOST", None), ("127.0.0.1:8080", None), ("[::1]:8080", None), ("localhost.:1", None),
    ("evil.example:8080", 403), ("localhost.evil.example", 403), ("", 403), ("127.0.0.1.evil.example", 403), ("[::2]", 403)])
def test_a_local_server_answers_to_its_own_names_only(host, status):
    assert refused(Guard(_app, "127.0.0.1"), host=host) == status


def test_other_names_and_other_addresses():
    assert refused(Guard(_app, "127.0.0.1", hosts=("lab.example",)), host="lab.example:80") is None
    assert refused(Guard(_app, "127.0.0.1", hosts=("*",)), host="evil.example") is None
    assert refused(Guard(_app, "0.0.0.0", key="k"), host="any.example", authorization="Bearer k") is None


@pytest.mark.parametrize(("origin", "status"), [
    ("http://localhost:8080", None), ("http://localhost:3000", 403), ("null", 403), ("https://evil.example", 403),
    ("http://[", 403)])
def test_web_pages_of_other_places_are_refused(origin, status):
    assert refused(Guard(_app, "127.0.0.1"), host="localhost:8080", origin=origin) == status
    assert refused(Guard(_app, "127.0.0.1", origins=("*",)), host="localhost:8080", origin=origin) is None
    assert refused(Guard(_app, "127.0.0.1", origins=(origin,)), host="localhost:8080", origin=origin) is None


@pytest.mark.parametrize(("given", "status"), [
    ("Bearer secret", None), ("bearer secret ", None), ("Bearer Secret", 401), ("Bearer ", 401), ("secret", 401), ("", 401),
    ("Basic secret", 401), ("Bearer secret2", 401), ("Bearer \xff", 401)])
def test_keys(given, status):
    guard = Guard(_app, "127.0.0.1", key="secret")
    assert refused(guard, host="localhost", authorization=given) == status
    assert refused(guard, "/health", host="localhost", authorization=given) is None
    assert refused(guard, "/metrics", host="localhost", authorization=given) == status


@pytest.mark.parametrize("key", ["", "a b", "ä", "a\n", 5])
def test_keys_that_cannot_be_sent(key):
    with pytest.raises(LabError, match="API key"):
        checked_key(key)


def test_loopback():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "a.example", ""))


# ---- limits -------------------------------------------------------------------------------------------------------

def test_limits_are_checked():
    assert Limits(body="2 MiB").body == 2 * 2**20 and Limits(stop_seconds=0).stop_seconds == 0
    for wrong in ({"body": 5}, {"body": "much"}, {"waiting": -1}, {"waiting": "a"}, {"seconds": 0}, {"seconds": math.nan},
                  {"send_seconds": True}, {"choices": 0}, {"connections": None}):
        name, = wrong
        with pytest.raises(LabError, match=name if name != "body" else "body|size"):
            Limits(**wrong)


def test_a_gate_lets_so_many_in():
    gate = Gate(3)
    with gate.admitted(2):
        with pytest.raises(Refusal) as refusal, gate.admitted(2):
            pass
        assert refusal.value.status == 429 and 1 <= int(refusal.value.headers["Retry-After"]) <= 60 and gate.inside == 2
        with gate.admitted(1):
            assert gate.inside == 3
    assert gate.inside == 0 and 1 <= gate.patience() <= 60


def test_when_to_come_again_goes_by_answers_that_ended():
    """Not by requests that were read or refused: where six left within a minute, half of three leave in 15 seconds."""
    gate = Gate(10)
    with gate.admitted(3):
        for _ in range(100):
            with pytest.raises(Refusal), gate.reading():
                raise Refusal("no such parameter")
            with pytest.raises(Refusal), gate.admitted(1):
                raise Refusal("the engine cannot take it")
        assert gate.patience() == 5 and (gate.inside, gate.answers) == (3, 3)       # nobody has left yet
        with gate.admitted(6):
            pass
        with gate.reading():
            assert gate.patience() == 15 and (gate.inside, gate.answers) == (4, 3)
    assert gate.inside == gate.answers == 0


# ---- metrics ------------------------------------------------------------------------------------------------------

def test_a_histogram_counts_up_to_each_bound():
    histogram = metrics.Histogram((0.1, 1))
    for value in (0.05, 0.1, 0.5, 7):
        histogram.add(value)
    assert metrics.family("a", "histogram", "b", histogram.samples()) == (
        '# HELP a b\n# TYPE a histogram\na_bucket{le="0.1"} 2\na_bucket{le="1"} 3\na_bucket{le="+Inf"} 4\n'
        'a_sum 7.65\na_count 4\n')


def test_labels_are_escaped():
    counts = metrics.Counts("how")
    counts.add('a "b"\\\n')
    counts.add('a "b"\\\n')
    assert metrics.family("a", "counter", "b\nc", counts.samples()) == (
        '# HELP a b\\nc\n# TYPE a counter\na{how="a \\"b\\"\\\\\\n"} 2\n')


def test_a_single_number():
    assert metrics.one("a", "gauge", "b", 0.25).endswith("\na 0.25\n")
    assert metrics.one("a", "gauge", "b", 3.0).endswith("\na 3\n")
