"""llama.cpp's RPC over two workers on this machine: bytes beside the plan's, and what a slower network makes of the time.

    python tests/bench/bench_rpc.py [--json FILE] [--rates 0,1000,100]

Head and workers are in network namespaces; `tc` holds the cables to a rate in Mb/s, each way (0: as they are). Seconds of
loading, of a prompt and of a token, the fastest of several, beside those the plan gives to the network alone: what a slower
cable adds should be near what the plan says it adds. SmolLM2; the workers compute on the processor, one thread each.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
for folder in (TOP, TOP / "tests" / "peers"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from rpc_hosts import hosts, namespaces  # noqa: E402

import llmlab  # noqa: E402

pytestmark = pytest.mark.bench

PROMPT, TOKENS, CONTEXT = 250, 40, 2048


def shaped(head, rate: int) -> None:
    """Hold both cables to a rate, both ways."""
    for pid, name in head.cables:
        inside = ["nsenter", "-t", str(pid), "-n", "tc", "qdisc", "add", "dev", name, "root"]
        subprocess.run([*inside, "tbf", "rate", f"{rate}mbit", "burst", "128kb", "latency", "400ms"], check=True)


def run(file: Path, rate: int) -> dict:
    """What one network makes of it: bytes to and from each worker, seconds."""
    card = llmlab.gpu("rtx-3090-24gb")
    plan = llmlab.fit_hosts(file, [[], [card], [card]], context=CONTEXT, split=(1, 1), batch=512,
                            network=f"{rate or 10000} Mb/s")
    row = {"rate": rate}
    with hosts(2, file, CONTEXT, apart=True) as head:
        if rate:
            shaped(head, rate)
        for line in ("load", "context", f"prompt {PROMPT}", "decode 1"):
            start = time.perf_counter()
            _, row[line] = head.ask(line)
            row[f"{line}: seconds"] = time.perf_counter() - start
        answer, counted = head.ask(f"decode {TOKENS}")
    row["token"] = [[sent / TOKENS, received / TOKENS] for sent, received in counted]
    row["token: seconds"] = min(answer["seconds"])
    row["planned loading"] = [t.bytes for t in plan.loading.values()]
    row["planned loading: seconds"] = plan.loading_seconds
    row["planned token"] = [[t.sent, t.received] for t in plan.traffic.values()]
    row["planned token: network seconds"] = sum(t.bytes for t in plan.traffic.values()) / plan.link.rate
    return row


def measure(rates: list[int]) -> list[dict]:
    file = llmlab.fetch("smollm2-135m", progress=False)
    return [run(file, rate) for rate in rates]


def test_rpc(capsys):
    if not namespaces():
        pytest.skip("no network namespaces here")
    with capsys.disabled():
        show(measure([0, 100]))


def show(rows: list[dict]) -> None:
    print(f"{'Mb/s':>6} {'loading':>9} {'planned':>17} {'token':>9} {'network of it, planned':>23}")
    for row in rows:
        fast, _, slow = row["planned loading: seconds"]
        print(f"{row['rate'] or 'none':>6} {row['load: seconds']:>8.2f}s {fast:>7.2f} to {slow:>5.2f}s "
              f"{1e3 * row['token: seconds']:>7.1f}ms {1e3 * row['planned token: network seconds']:>21.1f}ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--rates", default="0,1000,100")
    asked = parser.parse_args()
    rows = measure([int(rate) for rate in asked.rates.split(",")])
    show(rows)
    if asked.json:
        machine = llmlab.machine()
        Path(asked.json).write_text(json.dumps({
            "date": date.today().isoformat(), "processor": machine.cpu.name, "cores": machine.cpu.cores,
            "llama-cpp-python": "0.3.36", "model": "SmolLM2-135M-Instruct Q4_1", "prompt": PROMPT, "tokens": TOKENS,
            "load": os.getloadavg(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
