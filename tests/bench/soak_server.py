"""llmlab serve for minutes on end: chats, completions, streams, schemas, clients that leave, prompts that are too long, bodies
that are none; memory and blocks as time goes by.

    python tests/bench/soak_server.py --minutes 10 [--model smollm2-135m] [--clients 8] [--json FILE]

The tiny model of the tests unless another is named. At the end: whether blocks are nobody's again, whether every answer that
was to be the same each time was, and the memory's growth after the first fifth of the time, in bytes an hour: allocators settle
first, then a leak shows as a slope. The clients live in the same process, so what they hold is counted with it.
"""

import argparse
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import llmlab  # noqa: E402
from llmlab.server import Limits  # noqa: E402
from llmlab.units import format_bytes  # noqa: E402

SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}, "warm": {"type": "boolean"}},
          "required": ["city", "warm"], "additionalProperties": False}


class Client:
    """One who asks for one thing after another. `same`: the first answer to each question that has one answer."""

    def __init__(self, server, name: str, seed: int, counts: Counter, same: dict):
        self.server, self.name, self.chance, self.counts, self.same = server, name, random.Random(seed), counts, same
        self.http = httpx.Client(base_url=server.url, trust_env=False, timeout=120)

    def run(self, until: float) -> None:
        kinds = (self.chat, self.completion, self.stream, self.schema, self.leave, self.too_long, self.noise)
        while time.monotonic() < until:
            kind = self.chance.choices(kinds, (4, 4, 4, 1, 3, 1, 1))[0]
            try:
                kind()
                self.counts[kind.__name__] += 1
            except Exception as error:
                self.counts[f"failed: {kind.__name__}: {type(error).__name__} {error!s:.80}"] += 1

    def prompt(self) -> str:
        return f"Question {self.chance.randrange(12)}: " + "tell me more about it. " * (self.chance.randrange(4))

    def ask(self, path: str, **body) -> dict:
        answer = self.http.post(path, json={"model": self.name, "temperature": 0, "max_tokens": 24} | body)
        answer.raise_for_status()
        return answer.json()

    def check(self, question: str, text: str) -> None:
        if self.same.setdefault(question, text) != text:
            self.counts["answers that changed"] += 1

    def chat(self) -> None:
        prompt = self.prompt()
        found = self.ask("/v1/chat/completions", messages=[{"role": "user", "content": prompt}], logprobs=True, top_logprobs=3)
        self.check(f"chat {prompt}", found["choices"][0]["message"]["content"])

    def completion(self) -> None:
        prompt = self.prompt()
        found = self.ask("/v1/completions", prompt=prompt, n=self.chance.randint(1, 3))
        for choice in found["choices"]:
            self.check(prompt, choice["text"])

    def stream(self) -> None:
        prompt = self.prompt()
        body = {"model": self.name, "temperature": 0, "max_tokens": 24, "prompt": prompt, "stream": True}
        with self.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
        self.check(prompt, "".join(json.loads(line)["choices"][0]["text"] for line in lines))

    def schema(self) -> None:
        format = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA}}
        self.ask("/v1/chat/completions", messages=[{"role": "user", "content": self.prompt()}], response_format=format,
                 temperature=1.0)

    def leave(self) -> None:
        body = json.dumps({"model": self.name, "prompt": self.prompt(), "max_tokens": 200, "n": 2,
                           "stream": self.chance.random() < 0.5}).encode()
        with socket.create_connection(("127.0.0.1", int(self.server.url.rpartition(":")[2])), timeout=10) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            time.sleep(self.chance.random() * 0.3)

    def too_long(self) -> None:
        answer = self.http.post("/v1/completions", json={"model": self.name, "prompt": "far too long " * 20_000})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded", answer.text

    def noise(self) -> None:
        answer = self.http.post("/v1/completions", content=self.chance.randbytes(200))
        assert answer.status_code == 400, answer.text


def soak(path, minutes: float, clients: int) -> dict:
    """Everybody asks for so many minutes; figures every so often, and at the end."""
    counts, same, rows, process = Counter(), {}, [], psutil.Process()
    with llmlab.serve(path, port=0, background=True, name="soaked", dtype="float32", memory="64 MiB", sequences=16,
                      limits=Limits(waiting=256)) as server:
        begin = time.monotonic()
        until, every = begin + 60 * minutes, max(2.0, 60 * minutes / 20)
        asking = [Client(server, "soaked", seed, counts, same) for seed in range(clients)]
        threads = [threading.Thread(target=one.run, args=(until,), daemon=True) for one in asking]
        for thread in threads:
            thread.start()
        print(" minutes      memory  threads   used  cached   free  answers    tokens")
        while True:
            now, usage, done = time.monotonic() - begin, server.engine.usage(), server.engine.counters
            memory = process.memory_info().rss
            rows.append({"minutes": now / 60, "bytes": memory, "threads": process.num_threads(), "used": usage.used,
                         "cached": usage.cached, "free": usage.free, "answers": done.ended, "tokens": done.made})
            print(f"{now / 60:8.2f} {format_bytes(memory):>11} {rows[-1]['threads']:8} {usage.used:6} {usage.cached:7} "
                  f"{usage.free:6} {done.ended:8,} {done.made:9,}", flush=True)
            if time.monotonic() >= until:
                break
            time.sleep(min(every, max(0.05, until - time.monotonic())))
        for thread in threads:
            thread.join(120)
        waited = time.monotonic()
        while not server.engine.idle() and time.monotonic() < waited + 60:
            time.sleep(0.05)
        usage, total = server.engine.usage(), server.engine.blocks.count
        return {"rows": rows, "requests": dict(counts), "used_blocks": usage.used,
                "lost_blocks": total - usage.used - usage.cached - usage.free, "open": server.service.gate.inside,
                "changed": counts["answers that changed"], "growth_bytes_per_hour": slope(rows)}


def slope(rows: list[dict]) -> float:
    """Bytes an hour by least squares, of the rows after the first fifth."""
    late = [row for row in rows if row["minutes"] >= rows[-1]["minutes"] / 5]
    times, sizes = [row["minutes"] / 60 for row in late], [row["bytes"] for row in late]
    middle = sum(times) / len(times)
    spread = sum((one - middle) ** 2 for one in times)
    return sum((one - middle) * size for one, size in zip(times, sizes, strict=True)) / spread if spread else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model", help="GGUF, or smollm2-135m (default: the tests' tiny model)")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--json", metavar="FILE")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if a.model is None:
            import tiny_chat
            a.model = tiny_chat.write(Path(folder) / "tiny.gguf")
        found = soak(a.model, a.minutes, a.clients)
    print(f"\nrequests: {', '.join(f'{name} {count:,}' for name, count in sorted(found['requests'].items()))}")
    print(f"blocks in use at the end: {found['used_blocks']}, lost: {found['lost_blocks']}; answers inside: {found['open']}; "
          f"answers that changed: {found['changed']}")
    first, last = (next(row for row in rows if row["minutes"] >= found["rows"][-1]["minutes"] / 5)
                   for rows in (found["rows"], found["rows"][-1:]))
    print(f"memory after a fifth of the time {format_bytes(first['bytes'])}, at the end {format_bytes(last['bytes'])}; slope "
          f"{found['growth_bytes_per_hour'] / 2**20:+.1f} MiB an hour [measured]")
    if a.json:
        Path(a.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
