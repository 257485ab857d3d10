"""What a server does at its bounds: too much, too slow, the wrong place, no key; loading, stopping, clients that go away."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from server_clients import HELLO, begun, client, http, idle, raw, serving, tiny

import llmlab
from llmlab.cli import main
from llmlab.errors import LabError
from llmlab.runtime import constraining
from llmlab.runtime.sampling import Chooser
from llmlab.server import Limits
from llmlab.server.app import app_of
from llmlab.server.limits import Gate
from llmlab.server.service import Service
from llmlab.server.streaming import Events

LONG = {"model": "tiny", "messages": HELLO, "temperature": 0, "logit_bias": {"256": -100}}      # to the end of the context


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def server(path):
    with serving(path, limits=Limits(body="64 KiB", body_seconds=0.5)) as server:
        yield server


def outcomes(server) -> dict[tuple[str, str], int]:
    return {tuple(labels.values()): count for _, labels, count in server.service.outcomes.samples()}


# ---- sizes and seconds --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(server, chunked):
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "a" * 100_000}]}).encode()
    with http(server) as plain:
        answer = plain.post("/v1/chat/completions", content=iter([body[:50_000], body[50_000:]]) if chunked else body)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
        assert plain.get("/health").status_code == 200


def test_a_body_that_does_not_come(server):
    begin = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
    assert raw(server, begin).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("pieces", [[b""], [b"POST /v1/chat/comp"],
                                    [b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /h"]])
def test_headers_that_do_not_come(server, pieces):
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as connection:
        for piece in pieces:
            connection.sendall(piece)
            if piece.endswith(b"\r\n\r\n"):
                assert connection.recv(10_000).startswith(b"HTTP/1.1 200")
        while connection.recv(10_000):          # to the end: closed by the server, or a TimeoutError
            pass


def test_lengths_that_are_none(server):
    for length in ("-5", "abc", "9" * 30, "1_0"):
        begin = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
        said = raw(server, begin.encode() + b"{}", 2)
        assert said.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413")), said


def test_an_answer_that_takes_too_long(path):
    with serving(path, limits=Limits(seconds=0.05)) as server, http(server) as plain:
        answer = plain.post("/v1/chat/completions", json=LONG)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        assert answer.headers["x-should-retry"] == "false"
        with client(server) as ask, pytest.raises(openai.APIError, match="not complete after"):
            list(ask.chat.completions.create(**LONG, stream=True))
        assert idle(server) and outcomes(server) == {("chat", "timeout"): 2}


def test_more_requests_than_may_wait(path):
    with serving(path, sequences=1, limits=Limits(waiting=1)) as server, http(server) as plain:
        first, second = begun(server, LONG | {"n": 1}), begun(server, LONG)
        until = time.monotonic() + 10
        while server.service.gate.inside < 2 and time.monotonic() < until:
            time.sleep(0.005)
        answer = plain.post("/v1/chat/completions", json=LONG)
        if server.service.gate.inside:              # the two may have ended meanwhile on a quick computer
            assert answer.status_code == 429 and answer.json()["error"]["code"] == "rate_limit_exceeded"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        for one in (first, second):
            one.close()
        assert idle(server)
        assert plain.post("/v1/chat/completions", json=LONG | {"max_tokens": 2}).status_code == 200
        assert plain.post("/v1/chat/completions", json=LONG | {"n": 3}).status_code == 400


def test_requests_with_schemas_do_not_hold_up_the_others(tmp_path_factory, monkeypatch):
    """However long the forms of some take to be tried: who asks for none is answered meanwhile."""
    run, begun_, go = constraining.subprocess.run, threading.Semaphore(0), threading.Event()

    def waits(*given, **more):
        begun_.release()
        assert go.wait(60)
        return run(*given, **more)

    path = tiny(tmp_path_factory, **{"llama.context_length": 2048})        # tools are described, in tokens of one letter
    with serving(path) as server, http(server) as plain, ThreadPoolExecutor(6) as pool:
        monkeypatch.setattr(constraining.subprocess, "run", waits)
        schema = {"type": "object", "properties": {"held up": {"type": "integer"}}}
        format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        tools = [{"type": "function", "function": {"name": "a", "parameters": schema}}]
        heavy = [pool.submit(plain.post, "/v1/chat/completions", json=LONG | {"max_tokens": 2} | form)
                 for form in ({"response_format": format}, {"tools": tools, "tool_choice": "required"}) * 3]
        try:
            assert begun_.acquire(timeout=30) and begun_.acquire(timeout=30)
            for _ in range(3):
                answer = plain.post("/v1/chat/completions", json=LONG | {"max_tokens": 2})
                assert answer.status_code == 200
        finally:
            go.set()
        assert [one.result(60).status_code for one in heavy] == [200] * 6


def test_choosers_are_made_once_and_not_where_everyone_waits(path, monkeypatch):
    """A bias of a whole vocabulary for many answers takes a while: not in the thread of the event loop."""
    made, init, fork = [], Chooser.__init__, Chooser.fork

    def init_seen(self, *given, **more):
        made.append(("made", threading.current_thread().name))
        init(self, *given, **more)

    def fork_seen(self):
        made.append(("forked", threading.current_thread().name))
        return fork(self)

    monkeypatch.setattr(Chooser, "__init__", init_seen)
    monkeypatch.setattr(Chooser, "fork", fork_seen)
    with serving(path) as server, http(server) as plain:
        answer = plain.post("/v1/chat/completions", json=LONG | {"n": 5, "max_tokens": 2, "temperature": 1, "logit_bias": {
            str(token): -1 for token in range(259)}})
        assert len(answer.json()["choices"]) == 5
    assert [what for what, _ in made] == ["made"] + ["forked"] * 5
    assert all(thread.startswith("llmlab-preparing") for _, thread in made)


# ---- clients that go away -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_answers(path, stream):
    with serving(path) as server:
        connection = begun(server, LONG | {"stream": stream, "n": 8})
        if stream:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        else:
            until = time.monotonic() + 10
            while not server.engine.counters.made and time.monotonic() < until:
                time.sleep(0.002)
        connection.close()
        assert idle(server)
        assert outcomes(server) == {("chat", "cancelled"): 1} and server.engine.counters.made < 8 * 400


def test_a_client_that_reads_nothing_is_left():
    closed = []

    async def pieces():
        while True:
            yield b"data"

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        if message.get("body"):
            await asyncio.sleep(60)

    start = time.monotonic()
    asyncio.run(Events(pieces(), 0.05, lambda: closed.append(True))({"type": "http"}, receive, send))
    assert closed == [True] and time.monotonic() - start < 30


# ---- who may ask --------------------------------------------------------------------------------------------------

def test_a_key_is_needed_elsewhere_than_on_loopback(path):
    with pytest.raises(LabError, match="API key is needed"):
        llmlab.serve(path, port=0, host="0.0.0.0")
    with serving(path, host="0.0.0.0", api_key="secret") as server:
        port = server.url.rpartition(":")[2]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as plain:
            assert plain.get("/v1/models").status_code == plain.get("/metrics").status_code == 401
            assert plain.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
            assert plain.get("/health").status_code == 200
            assert plain.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_the_clients_key(path):
    with serving(path, api_key="secret") as server:
        with client(server, "secret") as ask:
            assert ask.models.list().data
        with client(server, "other") as ask, pytest.raises(openai.AuthenticationError):
            ask.models.list()


def test_rebinding_and_web_pages(server):
    with http(server) as plain:
        assert plain.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
        assert plain.post("/v1/completions", json=body, headers={"Origin": "https://evil.example"}).status_code == 403
        preflight = plain.options("/v1/completions", headers={"Origin": "https://evil.example",
                                                              "Access-Control-Request-Method": "POST"})
        assert preflight.status_code == 403 and "access-control-allow-origin" not in preflight.headers


def test_pages_that_may_ask(path):
    with serving(path, origins=("https://page.example",), hosts=("lab.example",), api_key="k") as server, http(server) as plain:
        asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization,content-type"}
        preflight = plain.options("/v1/completions", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        headers = {"Origin": "https://page.example", "Authorization": "Bearer k", "Host": "lab.example"}
        answer = plain.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1}, headers=headers)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://page.example"


# ---- how it stands ------------------------------------------------------------------------------------------------

def test_while_the_model_is_loaded_it_says_so():
    service = Service("tiny", Limits(), Gate(4))

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(app_of(service, "127.0.0.1"))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as plain:
            found = [await plain.get("/health"), await plain.get("/v1/models"),
                     await plain.post("/v1/completions", json={"model": "tiny", "prompt": "a"})]
            metrics = await plain.get("/metrics")
        assert found[0].json() == {"status": "loading"} and "being loaded" in found[2].json()["error"]["message"]
        return [one.status_code for one in found] + [metrics.status_code]

    assert asyncio.run(ask()) == [503, 503, 503, 200]


def test_an_engine_that_has_ended_is_told(path):
    with serving(path) as server, http(server) as plain:
        assert plain.get("/health").json() == {"status": "ok"}
        server.engine.close()
        assert plain.get("/health").status_code == 503
        assert plain.post("/v1/chat/completions", json=LONG).status_code == 503


def test_what_is_counted(path):
    with serving(path) as server, http(server) as plain:
        for _ in range(2):
            assert plain.post("/v1/chat/completions", json=LONG | {"max_tokens": 5}).status_code == 200
        assert plain.post("/v1/chat/completions", json=LONG | {"n": -1}).status_code == 400
        assert plain.post("/v1/completions", content=b"{").status_code == 400
        answer = plain.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert lines['llmlab_requests_total{endpoint="chat",outcome="ok"}'] == "2"
    assert lines['llmlab_requests_total{endpoint="chat",outcome="refused"}'] == "1"
    assert lines['llmlab_requests_total{endpoint="completions",outcome="refused"}'] == "1"
    assert lines["llmlab_tokens_made_total"] == "10" and lines["llmlab_running"] == lines["llmlab_waiting"] == "0"
    assert lines["llmlab_first_token_seconds_count"] == lines['llmlab_first_token_seconds_bucket{le="+Inf"}'] == "2"
    assert float(lines["llmlab_step_seconds_total"]) >= float(lines["llmlab_computing_seconds_total"]) > 0
    blocks = [int(lines[f'llmlab_blocks{{state="{state}"}}']) for state in ("used", "cached", "free")]
    assert blocks[0] == 0 and sum(blocks) == server.engine.blocks.count


# ---- beginning and ending -----------------------------------------------------------------------------------------

def test_a_port_that_is_taken(path):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(LabError, match="is taken"):
        llmlab.serve(path, port=taken.getsockname()[1], background=True)


@pytest.mark.parametrize("settings", [{"port": 70000}, {"port": "a"}, {"host": "no.such.host.invalid", "api_key": "k"},
                                      {"sequences": 0}, {"name": ""}, {"memory": "1 B"}, {"memory": "much"}, {"kv": "f99"},
                                      {"context": 1}, {"strategy": "odd"}, {"api_key": ""}])
def test_settings_that_cannot_be(path, settings):
    with pytest.raises(LabError) as error:
        llmlab.serve(path, **{"port": 0, "background": True, "progress": lambda said: None} | settings)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_served(tmp_path, tmp_path_factory, capsys):
    assert main(["serve", str(tmp_path / "none.gguf"), "--port", "0"]) == 2
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert main(["serve", str(tiny(tmp_path_factory)), "--port", "0", "--host", "0.0.0.0"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(line.startswith("llmlab: ") for line in said) and "LLMLAB_API_KEY" in said[2]


def test_what_cannot_be_served_is_one_line_and_no_traceback(path, tmp_path, capsys):
    whole = path.read_bytes()
    for name, data in (("half.gguf", whole[:len(whole) // 2]), ("begun.gguf", whole[:1000]), ("magic.gguf", whole[:4]),
                       ("empty.gguf", b""), ("other.gguf", b"PK" + whole)):
        (tmp_path / name).write_bytes(data)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wrong = [[str(tmp_path / name)] for name in ("half.gguf", "begun.gguf", "magic.gguf", "empty.gguf", "other.gguf")]
        wrong += [["no-such-model"], ["owner/no-such-repo"], [str(path), "--api-key", ""],
                  [str(path), "--port", str(taken.getsockname()[1])]]
        for words in wrong:
            assert main(["serve", *(["--port", "0"] if "--port" not in words else []), *words]) == 2, words
            said, = capsys.readouterr().err.splitlines()
            assert said.startswith("llmlab: ") and len(said) < 500 and "Traceback" not in said, said
        assert f"port {taken.getsockname()[1]} is taken" in said


def test_a_command_whose_port_is_taken_says_so_and_fails(path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = subprocess.run([sys.executable, "-m", "llmlab", "serve", str(path), "--port", str(taken.getsockname()[1])],
                              capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1) and "is taken" in done.stderr


def test_an_empty_key_is_none_in_the_environment_and_wrong_as_an_option(path, monkeypatch, capsys):
    """An option was meant; a variable that is empty is one that nobody set. (The port ends both.)"""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = ["serve", str(path), "--port", str(taken.getsockname()[1])]
        assert main([*command, "--api-key", ""]) == 2 and "API key is empty" in capsys.readouterr().err
        monkeypatch.setenv("LLMLAB_API_KEY", "")
        assert main(command) == 2 and "is taken" in capsys.readouterr().err


def ending(server, **body):
    """A stream that has begun, read on in a thread: (the thread, what it has read)."""
    connection, found = begun(server, LONG | {"stream": True} | body), []
    found.append(connection.recv(100))

    def read() -> None:
        while piece := connection.recv(65536):
            found.append(piece)

    thread = threading.Thread(target=read)
    thread.start()
    return thread, found


def test_stopping_lets_answers_end_and_takes_no_more(path):
    with serving(path, context=128, limits=Limits(stop_seconds=300)) as server, http(server) as plain:
        thread, found = ending(server)
        closing = threading.Thread(target=server.close)
        closing.start()
        while server.service.standing != "stopping":
            time.sleep(0.001)
        if server.service.gate.inside:
            assert plain.post("/v1/chat/completions", json=LONG).status_code == 503
        closing.join()
        thread.join()
        assert b"data: [DONE]" in b"".join(found) and b'"finish_reason":"length"' in b"".join(found)
        with pytest.raises(httpx.ConnectError):
            plain.get("/health")


def test_a_stop_does_not_wait_for_ever(path):
    with serving(path, limits=Limits(stop_seconds=0)) as server:
        thread, found = ending(server, n=8)
        server.close()
        thread.join()
        assert b"[DONE]" not in b"".join(found) and b"The server is stopping." in b"".join(found)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_gracefully_and_twice_at_once(path, times):
    before = signal.getsignal(signal.SIGINT)
    with serving(path, context=128, limits=Limits(stop_seconds=300)) as server:
        thread, found = ending(server, n=8)

        def press() -> None:
            for _ in range(times):
                time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGINT)

        presser = threading.Thread(target=press)
        presser.start()
        server.wait(lambda said: None)
        presser.join()
        thread.join()
    assert (b"[DONE]" in b"".join(found)) == (times == 1)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_command_ends_on_sigterm(path):
    environment = os.environ | {"LLMLAB_API_KEY": "secret"}
    command = [sys.executable, "-m", "llmlab", "serve", str(path), "--port", "0", "--context", "64", "--memory", "1 MiB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            said = [process.stderr.readline(), process.stderr.readline()]
            url = said[1].partition(" is served at ")[2].partition(";")[0]
            assert url.startswith("http://127.0.0.1:") and url.endswith("/v1"), said
            assert httpx.get(f"{url}/models", trust_env=False).status_code == 401
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, process.stderr.read()
        finally:
            process.kill()


def test_llmlab_itself_imports_no_server():
    code = "import llmlab, llmlab.cli, sys; print({'starlette', 'uvicorn', 'pydantic', 'fastapi', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
