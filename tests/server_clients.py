"""A tiny server in a thread, and who asks it: OpenAI's own client, and plain HTTP."""

import contextlib
import json
import socket
import time

import httpx
import openai
import tiny_chat

import llmlab
from llmlab.runtime.generating import stream
from llmlab.runtime.sampling import Options

HELLO = [{"role": "user", "content": "hello"}]


@contextlib.contextmanager
def serving(path, **settings):
    """A server of the tiny model on a free port."""
    settings = {"dtype": "float32", "memory": "8 MiB"} | settings
    with llmlab.serve(path, port=0, background=True, progress=lambda said: None, **settings) as server:
        yield server


def tiny(tmp_path_factory, **changes):
    """The tiny model as a file."""
    return tiny_chat.write(tmp_path_factory.mktemp("model") / "tiny.gguf", **changes)


def client(server, key: str = "none", **settings) -> openai.OpenAI:
    """Loopback goes through no proxy, whatever the environment says."""
    return openai.OpenAI(base_url=server.base_url, api_key=key, max_retries=0,
                         http_client=openai.DefaultHttpxClient(trust_env=False), **settings)


def http(server, **settings) -> httpx.Client:
    return httpx.Client(base_url=server.url, trust_env=False, timeout=30, **settings)


def alone(path, messages_or_text, count: int, **options) -> str:
    """What the decoder says by itself, one text at a time, greedily."""
    decoder, words = llmlab.decoder(path, dtype="float32")
    return "".join(stream(decoder, words, messages_or_text, Options(temperature=0, max_tokens=count, **options)))


def idle(server, seconds: float = 20) -> bool:
    """Whether everything ended within so many seconds and no block is anybody's."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.engine.idle() and not server.service.gate.inside and not server.engine.usage().used:
            return True
        time.sleep(0.01)
    return False


def raw(server, data: bytes, seconds: float = 10) -> bytes:
    """Everything a server says to some bytes, until it closes or is silent."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        found = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while piece := connection.recv(65536):
                found += piece
        return found


def begun(server, body: dict, path: str = "/v1/chat/completions") -> socket.socket:
    """A request that was sent, its answer not read."""
    port, data = int(server.url.rpartition(":")[2]), json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection
