"""What to start on each host, in order, for exactly this plan."""

import re
from collections.abc import Sequence
from shlex import quote
from typing import TYPE_CHECKING

from ..errors import LabError
from ..exports import TITLES, Command, llama_server, vllm_serve

if TYPE_CHECKING:
    from .planning import HostsPlan

RPC_PORT, RAY_PORT = 50052, 6379        # what rpc-server and Ray take by themselves


def command(p: "HostsPlan", engine: str | None = None, addresses: Sequence[str] | None = None) -> Command:
    """The commands of every host, in the order to start them, the head's last; notes as comments above.

    addresses: of the hosts in their private network, the head's first. Raises LabError for another engine than the plan's
    (memory and split are that engine's), or addresses that cannot be.
    """
    name = p.engine if engine is None else engine
    if name not in ("llama.cpp", "vllm"):
        raise LabError(f"{str(name)[:40]!r} runs on no several hosts here; there are llama.cpp (RPC) and vllm (Ray)")
    if name != p.engine:
        raise LabError(f"this plan is {TITLES[p.engine]}'s; llmlab.fit_hosts(..., engine={name!r}) makes another")
    notes: list[str] = []
    at = _addresses(p, addresses, notes)
    text = _rpc(p, at, notes) if name == "llama.cpp" else _ray(p, at, notes)
    notes = [" ".join(note.split()) for note in dict.fromkeys(notes)]
    return Command("".join(f"# {note}\n" for note in notes) + text, name, tuple(notes))


def _addresses(p: "HostsPlan", given: Sequence[str] | None, notes: list[str]) -> dict[str, str]:
    """An address for each host."""
    names = [host.name for host in p.hosts]
    if given is None:
        found = {name: f"{name.upper()}_ADDRESS" for name in names}
        notes.append(f"Put the hosts' addresses in their private network for {', '.join(found.values())}.")
        return found
    if isinstance(given, str) or len(given) != len(names):
        said = given if isinstance(given, str) else ", ".join(map(str, given))
        raise LabError(f"addresses is {said[:60]!r}; give one for each of {', '.join(names)}")
    wrong = next((a for a in given if not isinstance(a, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", a)), None)
    if wrong is not None:
        raise LabError(f"{str(wrong)[:60]!r} is no address; give an IPv4 address or a host's name, without a port")
    twice = next((a for at, a in enumerate(given) if a.lower() in {other.lower() for other in given[:at]}), None)
    if twice is not None:
        raise LabError(f"{twice!r:.60} is the address of two hosts; give each its own")
    named = next((a for a in given[1:] if not re.fullmatch(r"(\d{1,3}\.){3}\d{1,3}", a)), None)
    if named is not None and p.engine == "llama.cpp":
        raise LabError(f"{named!r:.60} is no IPv4 address, and ggml-rpc-server listens on nothing else; give one like 10.0.0.2")
    return dict(zip(names, given, strict=True))


def _rpc(p: "HostsPlan", at: dict[str, str], notes: list[str]) -> str:
    workers = p.hosts[1:]
    text = "".join(
        f"# on {host.name}: {_cards(host)}\n"
        f"ggml-rpc-server --host {quote(at[host.name])} --port {RPC_PORT} --cache\n\n" for host in workers)
    if workers:
        notes.append("llama.cpp's RPC is neither encrypted nor authenticated, and a server runs what it is sent: a private "
                     "network only, never an open one.")
        notes.append("A worker serves one head at a time. The same version of llama.cpp on every host, built with "
                     "-DGGML_RPC=ON (older ones call it rpc-server); --cache keeps large tensors on the "
                     "worker's disk, so that they travel once.")
    servers = [f"{at[host.name]}:{RPC_PORT}" for host in workers]
    return f"{text}# on head: {_cards(p.hosts[0])}\n{llama_server(p, notes, servers)}"


def _ray(p: "HostsPlan", at: dict[str, str], notes: list[str]) -> str:
    head, workers = p.hosts[0], p.hosts[1:]
    notes.append("Ray runs whatever reaches its ports: a private network only. The same versions of Python, Ray and vLLM, and "
                 "the checkpoint at the same path, on every host.")
    notes.append("VLLM_HOST_IP tells vLLM which of a host's addresses to use; where NCCL takes the wrong interface, set "
                 "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME on every host before ray start.")
    if p.share == 1 and len(p.cards) > len(p.hosts):
        notes.append("The hosts' numbers of cards and the model's heads have no common divisor: every card is a stage.")
    start = (f"# on head: {_cards(head)}\nexport VLLM_HOST_IP={quote(at['head'])}\nray start --head --node-ip-address "
             f"{quote(at['head'])} --port {RAY_PORT} --num-gpus {len(head.cards)}\n\n")
    for host in workers:
        start += (f"# on {host.name}: {_cards(host)}\nexport VLLM_HOST_IP={quote(at[host.name])}\nray start --address "
                  f"{quote(at['head'])}:{RAY_PORT} --node-ip-address {quote(at[host.name])} --num-gpus {len(host.cards)}\n\n")
    return f"{start}# on head again, when `ray status` shows {len(p.cards)} GPUs:\n{vllm_serve(p, notes, p.share)}"


def _cards(host) -> str:
    return ", ".join(card.name for card in host.cards) or "no card"
