"""A server from its first line to its last: the socket, the model, uvicorn in a thread, and a stop that lets answers end."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue

import uvicorn

from ..errors import LabError
from ..memory import checked_integer
from ..runtime.engine import Engine
from ..starting import decoder, gguf_of, refusal
from .app import app_of
from .guarding import checked_key, is_loopback
from .limits import Gate, Limits
from .listening import listening, protocol_of
from .service import READY, STOPPING, Service
from .sizing import cache_bytes

_CLOSING = 5.0           # seconds that connections get to close once nothing is being answered


def serve(path: str | os.PathLike | Engine, port: int = 8080, host: str = "127.0.0.1", *, name: str | None = None,
          api_key: str | None = None, memory: str | int | None = None, kv: str | tuple[str, str] | None = None,
          context: int | None = None, sequences: int = 64, strategy: str = "auto", compile: bool = False, device=None,
          dtype=None, limits: Limits | None = None, hosts: tuple[str, ...] = (), origins: tuple[str, ...] = (),
          background: bool = False, exact: bool = False, progress: Callable[[str], None] | None = None) -> "Server | None":
    """Answer OpenAI's API with a GGUF, many requests at once, until Ctrl-C; with `background` a `Server` that runs in a thread.

    `path`, `strategy`, `compile`, `device`, `dtype`: as `llmlab.decoder` takes them; an `Engine` that is there already is
    served too, and left open. `port`: 0 is any that is free. `name`: what clients call the model (None: as it was named here,
    or the file's name); asking for another one is a 404. `memory`: of the KV cache of all requests together ("2 GiB"; None:
    four whole contexts, or a quarter of what is free). `kv`: its type, or a pair for keys and values (None: f32 on a processor,
    f16 on a card). `context`: most tokens of a request and its answer (None: as trained). `sequences`: answers made at once;
    more wait, as `limits` says. `exact`: an answer that comes again, in a conversation's next request, is read anew, so that
    what follows is the same to the bit whatever was asked before; otherwise its keys and values are taken as they were written.

    Without `api_key` it answers this computer only: on another `host` one is needed. `hosts`: further names it goes by,
    `origins`: of web pages that may ask it (CORS). `progress` is told what happens (None: standard error).

    The first Ctrl-C or SIGTERM takes no more requests, lets running answers end (`limits.stop_seconds`), then closes; a second
    one ends at once. Raises LabError, in one line, for a file that cannot be served, a port that is taken, a host without a
    key.
    """
    limits, tell = limits or Limits(), progress or _tell
    key = checked_key(api_key)
    if key is None and not is_loopback(host):
        raise LabError(f"host {str(host)[:100]!r} can be reached from other computers, so an API key is needed: give "
                       "--api-key or LLMLAB_API_KEY (api_key= in Python), or leave the host at 127.0.0.1")
    there = isinstance(path, Engine)
    file = None if there else _file(path)
    name = _name(name, path.decoder.path if there else str(path))
    checked_integer("sequences", sequences, 1, 4096, "give a whole number of answers made at once, such as 64")
    service = Service(name, limits, Gate(sequences + limits.waiting))
    server = Server(service, listening(host, port), host, app_of(service, host, key, hosts, origins), own=not there)
    try:
        if not there:
            tell(f"loading {name} ...")
        server.begin(path if there else _engine(file, memory, kv, context, sequences, strategy, compile, device, dtype, exact,
                                                     tell))
        tell(f"{name} is served at {server.base_url}; {service.engine.why}")
        if background:
            return server
        tell("Ctrl-C stops it")
        server.wait(tell)
    except BaseException:
        server.close(0)
        raise


def _file(path: str | os.PathLike):
    """The GGUF, its header read. Raises LabError where it cannot be served."""
    file = gguf_of(path)
    if file is None:
        raise LabError(f"{Path(path).name[:100]} is a folder, and llmlab serve reads GGUF files; llmlab quantize makes one")
    if why := refusal(file):
        raise LabError(why)
    if not file.metadata.get("tokenizer.ggml.tokens"):
        raise LabError("this model's file has no vocabulary, so text cannot be made into tokens; give a file that has one")
    return file


def _engine(file, memory, kv, context, sequences, strategy, compile, device, dtype, exact, tell) -> Engine:
    made, words = decoder(file, device, dtype, strategy, context, compile, tell)
    kv = kv or ("f32" if made.device.type == "cpu" else "f16")
    return Engine(made, words, memory=cache_bytes(made, kv) if memory is None else memory, kv=kv, sequences=sequences,
                  rows=max(256, sequences), answers=not exact)


def _name(name: str | None, path: str) -> str:
    """What clients call the model: that name, else the one it was asked for by, of a file its own. Raises LabError for a name
    that is none."""
    found = name if name is not None else Path(path).stem if os.path.exists(path) else path
    if not isinstance(found, str) or not found.strip() or len(found) > 200 or not found.isprintable():
        raise LabError(f"name is {found!r:.60}; give a short text, such as the model's own name")
    return found


def _tell(said: str) -> None:
    print(f"llmlab: {said}", file=sys.stderr, flush=True)


class Server:
    """A server that runs. `url` is where, `base_url` what OpenAI's clients are given. `close`, or leaving `with`, stops it."""

    def __init__(self, service: Service, socket, host: str, app, own: bool):
        self.service, self._own, self._closed = service, own, False
        port = socket.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self.base_url = f"{self.url}/v1"
        self._signals: SimpleQueue = SimpleQueue()
        limits = service.limits
        self._uvicorn = uvicorn.Server(uvicorn.Config(
            app, http=protocol_of(limits.body_seconds), ws="none", loop="asyncio", lifespan="off", log_config=None,
            log_level="error", access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=60,
            limit_concurrency=limits.connections, timeout_graceful_shutdown=int(_CLOSING)))
        self._thread = threading.Thread(target=self._uvicorn.run, args=([socket],), name="llmlab server", daemon=True)
        self._thread.start()
        while not self._uvicorn.started:
            if not self._thread.is_alive():
                raise LabError(f"the server could not begin at {self.url}; what uvicorn wrote says why")
            time.sleep(0.005)

    def __repr__(self) -> str:
        return f"<llmlab server of {self.service.name} at {self.base_url}: {self.service.stands}>"

    @property
    def engine(self) -> Engine:
        return self.service.engine

    def begin(self, engine: Engine) -> None:
        """Answer, from now on."""
        self.service.engine, self.service.standing = engine, READY

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def wait(self, tell: Callable[[str], None] = _tell) -> None:
        """Until somebody presses Ctrl-C or sends SIGTERM; then close. In the main thread of a program."""
        with self._hearing():
            while self._thread.is_alive() and not self._signalled(0.5):
                pass
            if self.service.gate.answers:
                tell(f"stopping: {self.service.gate.answers} answers are being made, for "
                     f"{self.service.limits.stop_seconds:g} s at most; Ctrl-C again ends them")
            self.close()

    def close(self, seconds: float | None = None) -> None:
        """Take no more requests, let running answers end for so many seconds (None: as the limits say), then end. Twice is
        fine."""
        if self._closed:
            return
        self.service.standing = STOPPING
        self._until_idle(self.service.limits.stop_seconds if seconds is None else seconds, stoppable=True)
        for talk in list(self.service.talks):
            talk.cancel()
        self._until_idle(_CLOSING)                  # they say so to their clients, after the step that is computed
        self._uvicorn.should_exit = True
        self._thread.join()
        if self._own and self.service.engine is not None:
            self.service.engine.close()
        self._closed = True

    def _until_idle(self, seconds: float, stoppable: bool = False) -> None:
        until = time.monotonic() + seconds
        while self.service.gate.inside and time.monotonic() < until:
            if stoppable and self._signalled(0.02):
                return
            if not stoppable:
                time.sleep(0.02)

    def _signalled(self, seconds: float) -> bool:
        with contextlib.suppress(Empty):
            self._signals.get(timeout=seconds)
            return True
        return False

    @contextlib.contextmanager
    def _hearing(self):
        """SIGINT and SIGTERM are put into the queue; at the third the program ends as it would without us."""
        heard = (signal.SIGINT, signal.SIGTERM)
        before = {one: signal.getsignal(one) for one in heard}
        times = []

        def hear(number, frame):
            times.append(number)
            self._signals.put(number)
            if len(times) > 1:
                for one in heard:
                    signal.signal(one, before[one])

        for one in heard:
            signal.signal(one, hear)
        try:
            yield
        finally:
            for one in heard:
                signal.signal(one, before[one])
