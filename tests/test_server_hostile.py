"""Whatever is sent, llmlab serve says what is wrong with it, loses nothing and goes on: made-up bodies, noise, clients that
leave."""

import concurrent.futures
import contextlib
import json
import random

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_clients import HELLO, alone, begun, http, idle, raw, serving, tiny

from llmlab.server import Limits


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def server(path):
    """Small, so that whatever is asked for is short."""
    with serving(path, context=48, limits=Limits(choices=3, body="256 KiB")) as server:
        yield server


@pytest.fixture(scope="module")
def plain(server):
    with http(server) as plain:
        yield plain


KEYS = st.text(max_size=10) | st.sampled_from(["type", "role", "content", "function", "name", "schema", "json_schema", "text",
                                               "parameters", "$ref"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20) | st.sampled_from(["<|im_end|>", "\x00", "user", "tool", "none", "auto", "json_object", "text"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)
NAMES = st.text(max_size=10) | st.sampled_from([
    "messages", "prompt", "n", "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_tokens",
    "max_completion_tokens", "seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "logit_bias",
    "presence_penalty", "frequency_penalty", "response_format", "tools", "tool_choice", "parallel_tool_calls", "echo",
    "best_of", "suffix", "user", "model"])


def check(answer: httpx.Response) -> None:
    """An answer, or an error object that says in a line what is wrong with the request."""
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"} and "Traceback" not in error["message"]
        assert error["message"] and len(error["message"]) < 1000
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n"), answer.text


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(wrong=st.dictionaries(NAMES, JSON, max_size=4), chat=st.booleans())
def test_made_up_parameters_get_an_answer_or_an_error(plain, wrong, chat):
    good = {"model": "tiny", "max_tokens": 2} | ({"messages": HELLO} if chat else {"prompt": "a"})
    body = json.dumps(good | wrong).encode()
    check(plain.post("/v1/chat/completions" if chat else "/v1/completions", content=body))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(body=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_made_up_bodies_get_an_error(plain, body):
    answer = plain.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    check(answer)


FUNCTION = st.fixed_dictionaries({"name": st.text(max_size=4), "arguments": st.text(max_size=5)})
CALL = st.fixed_dictionaries({"id": st.text(max_size=3), "type": st.just("function"), "function": FUNCTION})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "king"])},
    optional={"content": st.text(max_size=8) | JSON, "tool_call_id": st.text(max_size=3), "name": st.text(max_size=3),
              "tool_calls": st.lists(CALL, max_size=2)})


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(messages=st.lists(MESSAGE, min_size=1, max_size=4))
def test_made_up_conversations_get_an_answer_or_an_error(plain, messages):
    check(plain.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, "max_tokens": 1}))


@pytest.mark.parametrize("body", [
    b"{" * 200_000, b"[" * 200_000, b'{"model":' * 20_000, b"\x00" * 1000, b'{"a":"' + b"\\" * 1001,
    b'{"model":"tiny","prompt":"a","seed":' + b"1" * 10_000 + b"}", b'{"model":"tiny","prompt":"a","top_p":1e-99999}'])
def test_bodies_that_are_meant_to_hurt(plain, body):
    check(plain.post("/v1/completions", content=body))


@pytest.mark.parametrize("data", [
    b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"A" * 100_000, b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /%ff%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"])
def test_noise_is_no_request(server, plain, data):
    said = raw(server, data, 3)
    assert not said or said.startswith(b"HTTP/1.1 4"), said[:200]
    assert plain.get("/health").json() == {"status": "ok"}


def test_nothing_is_left_of_all_that(server):
    assert idle(server)


# ---- two hundred requests -----------------------------------------------------------------------------------------

def test_two_hundred_requests_some_of_which_leave(path):
    """Random cancels, disconnects and prompts that are too long: no block is lost, every other answer is what it is alone."""
    chance = random.Random(0)
    prompts = ["".join(chance.choices("abcdefgh ", k=chance.randint(4, 120))) for _ in range(8)]
    expected = {prompt: alone(path, prompt, 24) for prompt in prompts}
    with serving(path, memory="640 KiB", sequences=12, limits=Limits(waiting=64)) as server, http(server) as plain:
        def one(number: int) -> str:
            kind, prompt = number % 5, prompts[number % 8]
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}
            if kind == 3:                       # leaves, sooner or later, with several answers and a stream
                connection = begun(server, body | {"max_tokens": 300, "n": 2, "stream": number % 2 == 0,
                                                   "logit_bias": {"256": -100}}, "/v1/completions")
                connection.settimeout(30)
                with contextlib.suppress(OSError):
                    connection.recv(number * 20)
                connection.close()
                return "left"
            if kind == 4:
                answer = plain.post("/v1/completions", json=body | {"prompt": "a" * chance.randint(600, 3000)})
                assert answer.json()["error"]["code"] == "context_length_exceeded"
                return "too long"
            if kind == 2:
                with plain.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
                    text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in answer.iter_lines()
                                   if line.startswith("data: {"))
            else:
                text = plain.post("/v1/completions", json=body).json()["choices"][0]["text"]
            assert text == expected[prompt]
            return "right"

        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            found = list(pool.map(one, range(200)))
        assert found.count("right") == 120 and found.count("left") == found.count("too long") == 40
        assert idle(server)
        usage = server.engine.usage()
        assert (usage.used, usage.cached + usage.free) == (0, server.engine.blocks.count)
        assert server.engine.counters.reused > 0 and not server.service.talks
