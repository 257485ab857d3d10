"""Hosts on one machine: llama.cpp's RPC servers and a head, each in a network namespace of its own, and what passes between.

Where this process may not make namespaces (or there is no `ip`), the servers listen on loopback behind a proxy that counts.
Counted is what TCP carries: of a namespace's interface, its bytes less the 66 of headers of each packet (Ethernet, IPv4, TCP
with timestamps), and less what TCP sent once more, as it does for packets that were lost or seemed so.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = 66
PORT = 50052


def namespaces() -> bool:
    """Whether network namespaces and the cables between them can be made here."""
    if not all(map(shutil.which, ("ip", "ss", "unshare", "nsenter"))):
        return False
    make = "ip link add name near0 type veth peer name far0 && ip link set near0 up && nsenter -t $$ -n true"
    return subprocess.run(["unshare", "-n", "sh", "-c", make], capture_output=True).returncode == 0


class Program:
    """A child that says "ready", then answers a line with a line."""

    def __init__(self, stack: ExitStack, apart: bool, name: str, *words: str):
        command = [sys.executable, str(HERE / name), *words]
        self.log = open(os.devnull, "w")
        self.process = subprocess.Popen([*["unshare", "-n"] * apart, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.log, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        stack.callback(self.end)
        assert self.process.stdout.readline().strip() == "ready", f"{name} did not start"

    def say(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def ask(self, line: str) -> dict:
        self.say(line)
        answer = self.process.stdout.readline()
        assert answer, f"the program ended over {line!r}"
        return json.loads(answer)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.log.close()


class Proxy:
    """Passes one connection on to a port of loopback, and counts."""

    def __init__(self, stack: ExitStack, target: int):
        self.target, self.sent, self.received = target, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        stack.callback(self.listener.close)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                return
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pass, args=(near, far, "sent"), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, "received"), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, name: str) -> None:
        try:
            while data := source.recv(1 << 20):
                setattr(self, name, getattr(self, name) + len(data))
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass


class Head:
    """The head's program; `ask` also says what went to each worker and came back meanwhile. `cables`: their ends in namespaces,
    as (process, name)."""

    def __init__(self, program: Program, counters, cables: list[tuple[int, str]] | None = None):
        self.program, self.counters, self.cables = program, counters, cables or []

    def ask(self, line: str) -> tuple[dict, list[tuple[int, int]]]:
        before = self.counters()
        answer = self.program.ask(line)
        after = None
        while after != (after := self.counters()):         # what waits for no answer is still on its way
            time.sleep(0.1)
        return answer, [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)]


@contextmanager
def hosts(workers: int, model: Path, context: int, shares: str = "1,1", apart: bool | None = None, cache: str | None = None):
    """A `Head` with so many workers, connected. apart: in namespaces (None: where they can be made). 0 workers: none at all."""
    apart = namespaces() if apart is None else apart
    with ExitStack() as stack:
        if not workers:
            yield Head(Program(stack, False, "rpc_client.py", str(model), str(context), "1"), list)
            return
        build = _in_namespaces if apart else _behind_proxies
        head = build(stack, workers, [str(model), str(context), shares], [cache] * bool(cache))
        head.program.ask("connect")
        yield head


def _in_namespaces(stack: ExitStack, workers: int, words: list[str], cache: list[str]) -> Head:
    client = Program(stack, True, "rpc_client.py", *words, *(f"10.0.{i}.2:{PORT}" for i in range(workers)))
    head = client.process.pid
    cables, workers_at = [], []
    _quiet(head)
    for i in range(workers):
        server = Program(stack, True, "rpc_server.py", f"10.0.{i}.2:{PORT}", *cache)
        worker = server.process.pid
        _quiet(worker)
        subprocess.run(["ip", "link", "add", "name", f"worker{i}", "netns", str(head), "type", "veth",
                        "peer", "name", "head", "netns", str(worker)], check=True)
        for pid, name, address in ((head, f"worker{i}", f"10.0.{i}.1/24"), (worker, "head", f"10.0.{i}.2/24")):
            inside = ["nsenter", "-t", str(pid), "-n", "ip"]
            subprocess.run([*inside, "link", "set", name, "addrgenmode", "none", "up"], check=True)
            subprocess.run([*inside, "addr", "add", address, "dev", name], check=True)
            cables.append((pid, name))
        workers_at.append(worker)
        server.say("go")
        _wait_for(["nsenter", "-t", str(worker), "-n"], PORT)

    def counters() -> list[tuple[int, int]]:
        rows = dict(line.split(":") for line in Path(f"/proc/{head}/net/dev").read_text().splitlines() if ":" in line)
        found = []
        for i, worker in enumerate(workers_at):
            numbers = [int(word) for word in {name.strip(): row for name, row in rows.items()}[f"worker{i}"].split()]
            found.append((numbers[8] - HEADERS * numbers[9] - _again(head, f"10.0.{i}.2"),
                          numbers[0] - HEADERS * numbers[1] - _again(worker, f"10.0.{i}.1")))
        return found

    return Head(client, counters, cables)


def _quiet(process: int) -> None:
    """No probes sent twice while the other end computes, no headers that grow where a packet was lost."""
    less = "cd /proc/sys/net/ipv4 && echo 0 > tcp_early_retrans; echo 0 > tcp_sack"
    subprocess.run(["nsenter", "-t", str(process), "-n", "sh", "-c", less], capture_output=True)


def _again(process: int, peer: str) -> int:
    """Bytes that open connections from this namespace to a peer sent more than once."""
    inside = ["nsenter", "-t", str(process), "-n", "ss", "--no-header", "--tcp", "--info", "dst", peer]
    found = subprocess.run(inside, check=True, capture_output=True, text=True).stdout
    return sum(map(int, re.findall(r"bytes_retrans:(\d+)", found)))


def _behind_proxies(stack: ExitStack, workers: int, words: list[str], cache: list[str]) -> Head:
    proxies = []
    for _ in range(workers):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = Program(stack, False, "rpc_server.py", f"127.0.0.1:{port}", *cache)
        server.say("go")
        _wait_for([], port)
        proxies.append(Proxy(stack, port))
    client = Program(stack, False, "rpc_client.py", *words, *(f"127.0.0.1:{proxy.port}" for proxy in proxies))
    return Head(client, lambda: [(proxy.sent, proxy.received) for proxy in proxies])


def _wait_for(inside: list[str], port: int) -> None:
    """Until somebody listens, at most 20 seconds; asked without connecting, for a server takes one head at a time."""
    code = ("import pathlib, sys, time\n"
            "want = f'{int(sys.argv[1]):04X}'\n"
            "for _ in range(200):\n"
            "    rows = [row.split() for row in pathlib.Path('/proc/net/tcp').read_text().splitlines()[1:]]\n"
            "    if any(row[1].endswith(':' + want) and row[3] == '0A' for row in rows): sys.exit()\n"
            "    time.sleep(0.1)\n"
            "sys.exit('nobody listens')\n")
    subprocess.run([*inside, sys.executable, "-c", code, str(port)], check=True)
