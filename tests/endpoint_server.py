"""A server of OpenAI's API that does as it is told: answers, fails, waits, hangs up; and writes down what it was sent."""

import contextlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HELLO = [{"role": "user", "content": "hello"}]


def answer(text: str = "hi", read: int = 10, written: int = 5, **more) -> dict:
    """A chat completion, as JSON."""
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None,
                         "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}} | more


@dataclass
class Asked:
    path: str
    headers: dict
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)


@dataclass
class Far:
    """`does`: what comes next, each once, then `always`: a dict is an answer, (status, dict, headers) a refusal, a number
    seconds to wait before the next, bytes a body as it is, "hang up" an end without an answer, and a function of the
    request any of these. `asked`: requests that came; `connections`: how many were made."""

    url: str
    always: object = field(default_factory=answer)
    does: list = field(default_factory=list)
    asked: list = field(default_factory=list)
    connections: int = 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    far: Far

    def get_request(self):
        found = super().get_request()
        self.far.connections += 1
        return found

    def handle_error(self, request, client_address):
        pass                        # clients that hang up are meant to


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._say(200, json.dumps({"object": "list", "data": [
            {"id": "m", "object": "model", "created": 1, "owned_by": "x"}]}).encode())

    def do_POST(self):
        far = self.server.far
        asked = Asked(self.path, dict(self.headers), self.rfile.read(int(self.headers["Content-Length"])))
        far.asked.append(asked)
        what = far.does.pop(0) if far.does else far.always
        while callable(what) or isinstance(what, (int, float)):
            if callable(what):
                what = what(asked)
            else:
                time.sleep(what)
                what = far.does.pop(0) if far.does else far.always
        if what == "hang up":
            self.close_connection = True
        elif isinstance(what, bytes):
            self._say(200, what)
        elif isinstance(what, tuple):
            status, body, headers = what
            self._say(status, json.dumps(body).encode(), headers)
        elif asked.json.get("stream"):
            self._stream(what)
        else:
            self._say(200, json.dumps(what).encode())

    def _stream(self, what: dict):
        text, said = what["choices"][0]["message"]["content"], []
        for piece in text.split(" "):
            said.append({"choices": [{"index": 0, "delta": {"content": f"{piece} "}, "finish_reason": None}]})
        said.append({"choices": [], "usage": what["usage"]})
        head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        events = [f"data: {json.dumps(head | one)}\n\n" for one in said] + ["data: [DONE]\n\n"]
        if what.get("cut"):
            events = events[:what["cut"]]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        if what.get("cut"):
            self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write("".join(events).encode())
        self.close_connection = True

    def _say(self, status: int, body: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def far_server(host: str = "127.0.0.1"):
    """One that runs, as a Far."""
    server = _Server((host, 0), _Handler)
    server.far = Far(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.far
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
