"""Engines that answer many requests at once, each in a process of its own: the child of bench_serving.

`python serving_engines.py ENGINE` reads a command a line, as llmlab/benching/child.py does. A request is {"at": seconds after
the beginning, "prompt": tokens, "output": how many tokens are to be made, whichever they are}; what came of it is {"at",
"first", "last": seconds after the beginning, "tokens"}. Clocks are read here, beside the work; nobody streams, so that nobody
is slowed by whoever listens.
"""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from llmlab.benching.child import obey

PATIENCE = 300.0         # seconds until a server is there


class Ours:
    """llmlab's engine, with the policy in the job: "paged", "static" or "alone"."""

    def __init__(self, job: dict):
        import torch

        from llmlab.runtime.engine import Engine
        from llmlab.runtime.generating import Options
        from llmlab.starting import decoder

        torch.set_num_threads(job["threads"])
        self._options = lambda tokens: Options(temperature=0, max_tokens=tokens)
        model, words = decoder(job["path"], "cpu", job["dtype"])
        words.stop_ids = ()                    # a token that ends a turn is one like others here
        self.engine = Engine(model, words, memory=job["memory"], kv=job["kv"], sequences=job["sequences"], rows=job["rows"],
                              policy=job["policy"], context=job["context"], share=False, compile=True, progress=say)
        self.about = {"why": f"cache in {job['kv']}, {self.engine.why}", "kv_bytes": self.engine.cache.bytes,
                      "blocks": self.engine.blocks.count, "context": self.engine.context}
        self.watch = os.getpid()

    def serve(self, requests: list[dict]) -> list[dict]:
        self.engine.history.clear()
        begin, jobs = time.perf_counter(), []
        for request in requests:
            wait(begin + request["at"])
            at = time.perf_counter() - begin
            jobs.append((at, self.engine.submit(request["prompt"], self._options(request["output"]))))
        answers = [(at, job.result()) for at, job in jobs]
        return [{"at": at, "first": at + answer.first_seconds, "last": at + answer.seconds, "tokens": answer.tokens}
                for at, answer in answers]

    def told(self) -> dict:
        """What only it can tell: every step it took."""
        return {"steps": [step._asdict() for step in self.engine.history], "counters": asdict(self.engine.counters)}

    def close(self) -> None:
        self.engine.close()


class Alone:
    """llmlab's compiled decoder, as one person uses it: one request after another."""

    def __init__(self, job: dict):
        import torch

        from llmlab.starting import decoder
        torch.set_num_threads(job["threads"])
        self._model, _ = decoder(job["path"], "cpu", job["dtype"], compile=True, progress=say)
        self.about = {"why": f"one after another; {self._model.why}", "kv_bytes": None}
        self.watch = os.getpid()

    def serve(self, requests: list[dict]) -> list[dict]:
        begin, made = time.perf_counter(), []
        for request in requests:
            wait(begin + request["at"])
            self._model.forget()
            new = [int(self._model.read(request["prompt"]).argmax())]
            first = time.perf_counter()
            while len(new) < request["output"]:
                new.append(int(self._model.read(new[-1:]).argmax()))
            made.append({"at": request["at"], "first": first - begin, "last": time.perf_counter() - begin, "tokens": new})
        return made

    def told(self) -> dict:
        return {}

    def close(self) -> None:
        pass


class Transformers:
    """transformers' own continuous batching (paged attention cache, scheduler) on the numbers of the GGUF."""

    def __init__(self, job: dict):
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(job["threads"])
        place, dtype = Path(job["path"]), getattr(torch, job["dtype"])
        self._model = AutoModelForCausalLM.from_pretrained(place.parent, gguf_file=place.name, local_files_only=True,
                                                           dtype=dtype, attn_implementation="sdpa").eval()
        config = self._model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cell = 2 * config.num_hidden_layers * config.num_key_value_heads * width * dtype.itemsize
        page = job["page"]
        settings = {"page_size": page, "num_blocks": job["memory"] // (cell * page), "max_batch_tokens": job["rows"],
                    "max_requests_per_batch": job["sequences"], "allow_block_sharing": False} | job.get("more", {})
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._manager = self._model.init_continuous_batching(generation, ContinuousBatchingConfig(**settings))
        self._manager.warmup()
        self._manager.start()
        self.about = {"why": f"transformers {transformers.__version__}, continuous batching in {job['dtype']}, sdpa, "
                             f"{settings['num_blocks']:,} blocks of {page}", "kv_bytes": settings["num_blocks"] * page * cell,
                      "settings": settings}
        self.watch = os.getpid()

    def serve(self, requests: list[dict]) -> list[dict]:
        begin, ids = time.perf_counter(), []
        for request in requests:
            wait(begin + request["at"])
            ids.append((self._manager.add_request(request["prompt"], max_new_tokens=request["output"], eos_token_id=-1,
                                                  record_timestamps=True), time.perf_counter() - begin))
        found = {}
        while len(found) < len(ids):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                found[result.request_id] = result
            elif result is None and not self._manager.is_running():
                raise RuntimeError("its thread ended; what it was asked is lost")
        return [{"at": at, "first": found[name].timestamps[0] - begin, "last": found[name].timestamps[-1] - begin,
                 "tokens": found[name].generated_tokens} for name, at in ids]

    def told(self) -> dict:
        return {}

    def close(self) -> None:
        self._manager.stop(block=True, timeout=10)


class Served:
    """A server in a process of its own, kept busy over HTTP by so many connections; a request is sent once there is one free,
    and room for so many cells."""

    path: str                # of its answers

    def begin(self, command: list, address: str, connections: int, cells: float) -> None:
        """Start it, and wait until it answers. Raises RuntimeError with its last words where it does not."""
        self._address, self._connections, self._cells = address, connections, cells
        self._words = tempfile.TemporaryFile()
        self._process = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL, stdout=self._words,
                                         stderr=subprocess.STDOUT)
        self.watch = self._process.pid
        try:
            self._until_ready()
        except BaseException:
            self.close()
            raise

    def asked(self, request: dict) -> dict:
        """The body that asks for a request."""
        raise NotImplementedError

    def told_of(self, answer: dict, last: float) -> dict:
        """{"first", "tokens"} of an answer that came `last` seconds after the beginning, as far as it says so."""
        raise NotImplementedError

    def serve(self, requests: list[dict]) -> list[dict]:
        return asyncio.run(self._serve(requests))

    async def _serve(self, requests: list[dict]) -> list[dict]:
        import httpx
        room, begin = Room(self._connections, self._cells), time.perf_counter()
        limits = httpx.Limits(max_connections=self._connections, max_keepalive_connections=self._connections)
        async with httpx.AsyncClient(base_url=self._address, timeout=None, limits=limits, trust_env=False) as client:

            async def answer(request: dict) -> dict:
                try:
                    took = await client.post(self.path, json=self.asked(request))
                    last, told = time.perf_counter() - begin, took.json()
                finally:
                    await room.give(len(request["prompt"]) + request["output"])
                if took.status_code != 200:
                    raise RuntimeError(f"it answered {took.status_code}: {str(told)[:200]}")
                return {"at": request["at"], "last": last, **self.told_of(told, last)}

            begun = []
            for request in requests:
                await asyncio.sleep(max(0.0, begin + request["at"] - time.perf_counter()))
                await room.take(len(request["prompt"]) + request["output"])
                begun.append(asyncio.create_task(answer(request)))
            return await asyncio.gather(*begun)

    def told(self) -> dict:
        return {}

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def said(self) -> str:
        """What it wrote so far."""
        self._words.seek(0)
        return self._words.read().decode("utf-8", "replace")

    def _until_ready(self) -> None:
        import httpx
        with httpx.Client(base_url=self._address, trust_env=False, timeout=5.0) as client:
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                if self._process.poll() is not None:
                    lines = [line for line in self.said().splitlines() if line.strip()]
                    raise RuntimeError(f"the server ended by itself: {(lines or ['it said nothing'])[-1][:200]}")
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("/health").status_code == 200:
                        return
                time.sleep(0.05)
        raise RuntimeError(f"the server was not ready after {PATIENCE:.0f} s")


class Llama(Served):
    """llama.cpp's server. Its cache is one pool for all slots; it refuses what does not fit into that, so no more is sent than
    there is room for."""

    path = "/completion"

    def __init__(self, job: dict):
        port = free_port()
        command = [job["program"], "--model", job["path"], "--host", "127.0.0.1", "--port", port, "--parallel", job["slots"],
                   "--ctx-size", job["cells"], "--kv-unified", "--cont-batching", "--threads", job["threads"],
                   "--threads-batch", job["threads"], "--cache-type-k", job["kv"], "--cache-type-v", job["kv"],
                   "--cache-ram", 0, "--no-cache-prompt", "--offline", "--fit", "off", *job.get("more", ())]
        self.begin(command, f"http://127.0.0.1:{port}", job["slots"], job["cells"])
        self.about = {"why": f"over HTTP; {job['slots']} slots, one pool of {job['cells']:,} cells in {job['kv']}",
                      "kv_bytes": job["kv_bytes"]}

    def asked(self, request: dict) -> dict:
        return {"prompt": request["prompt"], "n_predict": request["output"], "ignore_eos": True, "temperature": 0,
                "samplers": ["top_k"], "top_k": 1, "cache_prompt": False, "return_tokens": True}

    def told_of(self, answer: dict, last: float) -> dict:
        return {"first": last - answer["timings"]["predicted_ms"] / 1e3, "tokens": answer["tokens"]}


class OursServed(Served):
    """llmlab's server, the engine in it as `Ours` has it."""

    path = "/v1/completions"

    def __init__(self, job: dict):
        port = free_port()
        self.begin([sys.executable, __file__, "serve", json.dumps(job | {"port": port})], f"http://127.0.0.1:{port}",
                   job["sequences"], float("inf"))
        self.about = {"why": "over HTTP", "kv_bytes": None}

    def asked(self, request: dict) -> dict:
        return {"model": "model", "prompt": request["prompt"], "max_tokens": request["output"], "temperature": 0}

    def told_of(self, answer: dict, last: float) -> dict:
        return {"first": None, "tokens": [None] * answer["usage"]["completion_tokens"]}


def serving(job: dict) -> None:
    """llmlab's server until it is ended."""
    from llmlab.server import serve
    serve(Ours(job).engine, port=job["port"], name="model")


class Room:
    """Slots and cells that are free on a server."""

    def __init__(self, slots: int, cells: float):
        self._slots, self._cells, self._changed = slots, cells, asyncio.Condition()

    async def take(self, cells: int) -> None:
        """A slot and so many cells, once they are free."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._slots and self._cells >= cells)
            self._slots, self._cells = self._slots - 1, self._cells - cells

    async def give(self, cells: int) -> None:
        async with self._changed:
            self._slots, self._cells = self._slots + 1, self._cells + cells
            self._changed.notify_all()


ENGINES = {"ours": Ours, "served": OursServed, "alone": Alone, "transformers": Transformers, "llama": Llama}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait(until: float) -> None:
    time.sleep(max(0.0, until - time.perf_counter()))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Commands:
    def __init__(self, name: str):
        self._name, self.engine = name, None

    def open(self, job: dict) -> dict:
        start = time.perf_counter()
        self.engine = ENGINES[self._name](job)
        return {"seconds": time.perf_counter() - start, "about": self.engine.about, "watch": self.engine.watch}

    def serve(self, requests: list[dict]) -> dict:
        """All of them; seconds from the first one's coming to the last one's last token, and what came of each, in order."""
        start = time.perf_counter()
        made = self.engine.serve(requests)
        return {"seconds": time.perf_counter() - start, "requests": made, **self.engine.told()}

    def close(self) -> dict:
        self.engine.close()
        return {}


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serving(json.loads(sys.argv[2]))
    else:
        obey(Commands(sys.argv[1]))
