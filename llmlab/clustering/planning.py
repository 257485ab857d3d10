"""The plan: a model over hosts. `fit_hosts` builds it out of a fit, the messages between hosts, and the links they take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..catalog import Gpu, Link, Table
from ..errors import LabError
from ..fitting import Device, fit
from ..memory import Term, Weights, cache_bytes, known_engine, weights
from ..placing import assignment, free_bytes, request
from ..rates import banded
from ..reserving import Reservation, check_parallel, reservations, vllm_terms
from ..settings import Settings, check
from ..shapes import ModelSpec, model_spec
from ..speed import Part, Speed, speed
from ..units import GIB
from . import stages, wire
from .hosts import Host, inside, named_hosts, network_of
from .wire import Traffic

LINE = (0.70, 0.90, 1.0)           # share of the network's measured rate that one connection's messages reach
WAIT = (1.4, 1.0, 0.7)             # times its round trip
RESULT = 1                         # rounds of vLLM's last stage: the token goes back to where it is scheduled
_FIT = ("sequences", "batch", "ubatch", "flash_attention", "importance", "swa_full", "unified", "display", "utilization",
        "gpu_layers")


@dataclass(frozen=True)
class HostsPlan:
    """A model over hosts. Devices are called "head/gpu0", "worker1/gpu0", ..., and "head/RAM".

    `layers`: which blocks lie on which device, `output` where the logits are made. `verdict` as a fit's: all of it on the
    cards. `traffic`: what one generated token takes, by host; with llama.cpp between the head and each worker, with vLLM what
    each host sends and receives. `prompt_traffic`: the same of a prompt as long as a sequence's context. `loading`: weights
    over the network once (vLLM's hosts read their own copies). `speed` is one sequence's, alone. Where not all of it fits the
    cards, `partial`, and the first blocks stay in the head's RAM.
    """

    spec: ModelSpec
    hosts: tuple[Host, ...]
    link: Link
    settings: Settings
    terms: tuple[Term, ...]
    devices: dict[str, Device]
    layers: dict[str, range]
    output: str
    verdict: str
    speed: Speed
    traffic: dict[str, Traffic]
    prompt_traffic: dict[str, Traffic]
    loading: dict[str, Traffic]
    loading_again: dict[str, Traffic]
    gpu_layers: int
    partial: bool = False
    n_cpu_moe: int = 0                        # a plan over hosts keeps no experts apart
    share: int = 1                            # vLLM: cards that share each block
    reserved: tuple[Reservation, ...] = ()

    @property
    def fits(self) -> bool:
        return self.verdict == "fits"

    @property
    def engine(self) -> str:
        return self.settings.engine

    @property
    def cards(self) -> tuple[Gpu, ...]:
        """The cards in the engine's order: llama.cpp's RPC devices come before the head's own."""
        return tuple(card for _, card in _in_order(self.hosts, self.engine))

    def total(self, name: str, device: str | None = None) -> int:
        """Bytes of the terms of that name, on one device or on all."""
        return sum(t.bytes for t in self.terms if t.name == name and device in (None, t.device))

    @property
    def network_share(self) -> float:
        """The share of a generated token's usual time that the network takes."""
        total = sum(p.seconds[1] for p in self.speed.parts)
        return sum(p.seconds[1] for p in self.speed.parts if p.what == "network") / total if total else 0.0

    @property
    def loading_seconds(self) -> tuple[float, float, float]:
        """Seconds until the workers have their weights over the network: fast, usual, slow; all leave by the head's line."""
        bytes = sum(t.bytes for t in self.loading.values())
        slow, usual, fast = banded(self.link.rate, LINE)
        return bytes / fast, bytes / usual, bytes / slow

    @cached_property
    def answer(self) -> str:
        """The verdict, where the layers lie, what travels, how fast: a few sentences."""
        from .saying import answer
        return answer(self)

    @cached_property
    def table(self) -> Table:
        """A row a device: its layers, memory in GiB, verdict; traffic stands in `traffic_table`."""
        rows = []
        for name, d in self.devices.items():
            blocks = self.layers.get(name, range(0))
            rows.append({"device": name, "what": d.title, "blocks": f"{blocks[0]} to {blocks[-1]}" if blocks else "",
                         "output": "yes" if name == self.output else "", "weights": self.total("weights", name) / GIB,
                         "kv_cache": self.total("kv_cache", name) / GIB, "used": d.used / GIB, "free": d.free / GIB,
                         "verdict": d.verdict})
        return Table(rows, dict.fromkeys(("weights", "kv_cache", "used", "free"), "{:.2f}".format))

    @cached_property
    def traffic_table(self) -> Table:
        """A row a host: bytes it is sent and sends back for a token, for a prompt, and as it loads."""
        return Table([{"host": host, "token to": self.traffic[host].sent, "token from": self.traffic[host].received,
                       "rounds": self.traffic[host].rounds, "prompt to": self.prompt_traffic[host].sent,
                       "prompt from": self.prompt_traffic[host].received, "loading": self.loading[host].bytes}
                      for host in self.traffic], dict.fromkeys(
                          ("token to", "token from", "prompt to", "prompt from", "loading"), "{:,.0f}".format))

    def to_frame(self):
        """`table` as a pandas DataFrame. Raises LabError where pandas is not installed."""
        return self.table.to_frame()

    def command(self, engine: str | None = None, addresses: Sequence[str] | None = None):
        """What to start on each host, in order: a string with `.notes`. engine: "llama.cpp" or "vllm", the plan's own.

        addresses: of the hosts, the head's first; None: names to replace. Raises LabError for another engine than the plan's.
        """
        from .commands import command
        return command(self, engine, addresses)

    def to_dict(self) -> dict:
        """What `llmlab hosts --json` prints."""
        def bytes_of(traffic: dict[str, Traffic]) -> dict:
            return {host: {"sent": round(t.sent), "received": round(t.received)} for host, t in traffic.items()}
        return {"model": self.spec.name, "quant": self.settings.quant, "engine": self.engine, "verdict": self.verdict,
                "fits": self.fits, "network": self.link.name, "gpu_layers": self.gpu_layers, "cards_of_a_block": self.share,
                "devices": {name: {"title": d.title, "capacity": d.capacity, "free": d.free, "used": d.used,
                                   "verdict": d.verdict, "blocks": [blocks.start, blocks.stop], "output": name == self.output}
                            for name, d in self.devices.items() for blocks in [self.layers.get(name, range(0))]},
                "traffic": bytes_of(self.traffic), "prompt_traffic": bytes_of(self.prompt_traffic),
                "loading": bytes_of(self.loading), "loading_seconds": self.loading_seconds, "network_share": self.network_share,
                "speed": {"decode_tps": self.speed.decode_tps, "prefill_tps": self.speed.prefill_tps}}

    def __repr__(self) -> str:
        return f"<hosts: {self.answer}>"


def fit_hosts(spec, hosts, network: str | float | Link = "eth-1g", quant: str | None = None, context: int = 8192,
              kv: str | tuple[str, str] = "f16", engine: str = "llama.cpp", split=None, host=None,
              round_trip: float | None = None, bridge: str | None = None, **settings) -> HostsPlan:
    """A model over several hosts: `llmlab.fit_hosts`.

    >>> llmlab.fit_hosts("llama-3-70b", [["rtx-3090-24gb"] * 2, ["rtx-3090-24gb"] * 2], network="eth-10g").answer

    spec: a ModelSpec or anything llmlab.model takes. hosts: a list of cards for each host, the head first (for llama.cpp it may
    have none; a Machine is its cards). network: an id of data/links.csv ("eth-1g", "eth-10g", "wifi6-2x2"), or a rate such as
    "9.4 Gb/s"; round_trip: seconds of a small message and its answer, where it was measured. engine: "llama.cpp" (its RPC) or
    "vllm" (on Ray). split: one share a card, llama.cpp's order: the workers' cards, then the head's. host: the head's RAM.
    bridge: what joins the cards of a host where it is not their slots ("nvlink3-bridge-3090"). settings: sequences, batch,
    ubatch, flash_attention, importance, swa_full, unified, display, utilization, gpu_layers, as in `llmlab.fit`.
    Raises LabError in one line for anything that cannot be.
    """
    spec, hosts, link = model_spec(spec), named_hosts(hosts), network_of(network, round_trip)
    unknown = sorted(set(settings) - set(_FIT))
    if unknown:
        raise LabError(f"{unknown[0]!r} is no setting over hosts; there are {', '.join(_FIT)}")
    engine = known_engine(engine)
    asked = {"quant": quant, "context": context, "kv": kv, "engine": engine, **settings}
    if engine == "llama.cpp":
        return _by_rpc(spec, hosts, link, {**asked, "split": split, "host": host})
    if engine == "vllm":
        if split is not None or host is not None:
            raise LabError("vLLM deals layers out by itself and keeps nothing in RAM; leave split and host out")
        return _by_stages(spec, hosts, link, asked, bridge)
    raise LabError(f"{engine} runs on one host here; choose engine='llama.cpp' or 'vllm'")


def _in_order(hosts: Sequence[Host], engine: str) -> list[tuple[str, Gpu]]:
    """(device name, card) in the engine's order."""
    ordered = [*hosts[1:], hosts[0]] if engine == "llama.cpp" else hosts
    return [(f"{host.name}/gpu{i}", card) for host in ordered for i, card in enumerate(host.cards)]


def _owners(hosts: Sequence[Host], engine: str) -> list[int]:
    """The number of each card's host, the head's 0."""
    ordered = [*range(1, len(hosts)), 0] if engine == "llama.cpp" else range(len(hosts))
    return [i for i in ordered for _ in hosts[i].cards]


# ---- llama.cpp's RPC ------------------------------------------------------------------------------------------------

def _by_rpc(spec: ModelSpec, hosts: tuple[Host, ...], link: Link, asked: dict) -> HostsPlan:
    order, owner = _in_order(hosts, "llama.cpp"), _owners(hosts, "llama.cpp")
    report = fit(spec, [card for _, card in order], **asked)
    s, names = report.settings, {f"gpu{i}": name for i, (name, _) in enumerate(order)} | {"host": "head/RAM"}
    where = tuple(assignment(spec, report.cards, s, report.gpu_layers))
    w, each = weights(spec, s.quant, s.importance), max(s.context // s.sequences, 1)
    token = wire.decode(spec, request(s), where, owner, each)
    whole = wire.prompt(spec, request(s), where, owner, each, min(s.micro, each))
    first, again = (wire.loading(spec, w, where, owner, cached) for cached in (False, True))
    parts, prompt_parts = _network_parts(hosts, link, token, 1), _network_parts(hosts, link, whole, each)
    return HostsPlan(
        spec, hosts, link, s, _renamed(report.terms, names), _devices(report.devices, names),
        _blocks(where, names, len(spec.layers)), names[f"gpu{where[-1]}"] if where[-1] >= 0 else "head/RAM", report.verdict,
        _spoken(report.speed, names).joined(parts, prompt_parts), *(_by_host(hosts, t) for t in (token, whole, first, again)),
        report.gpu_layers, report.partial)


def _network_parts(hosts: Sequence[Host], link: Link, traffic: Sequence[Traffic], tokens: int) -> list[Part]:
    """What each worker's messages take of one of `tokens` tokens."""
    parts = []
    for host, t in zip(hosts, traffic, strict=False):
        if t.bytes:
            rates = banded(link.rate, LINE)
            seconds = tuple((t.bytes / rate + t.rounds * link.round_trip * wait) / tokens
                            for rate, wait in zip(rates, WAIT, strict=True))
            parts.append(Part(f"{link.name} to {host.name}", "network", t.bytes / tokens, seconds))
    return parts


def _by_host(hosts: Sequence[Host], traffic: Sequence[Traffic]) -> dict[str, Traffic]:
    """By name; of RPC the workers alone, for all of it is the head's too."""
    return {host.name: t for host, t in zip(hosts, traffic, strict=False) if host.name != "head"}


# ---- vLLM on Ray ----------------------------------------------------------------------------------------------------

def _by_stages(spec: ModelSpec, hosts: tuple[Host, ...], link: Link, asked: dict, bridge: str | None) -> HostsPlan:
    if not hosts[0].cards:
        raise LabError("the head has no cards; vLLM wants one on every host: name a host with cards first")
    s = check(spec, {"gpu_layers": "auto", "n_cpu_moe": 0, "split": None, "sequences": 1, "batch": 2048, "ubatch": 512,
                     "flash_attention": True, "importance": False, "swa_full": False, "unified": False, **asked})
    order, owner = _in_order(hosts, "vllm"), _owners(hosts, "vllm")
    cards = tuple(card for _, card in order)
    share, count = stages.parallel(spec, hosts)
    check_parallel(spec, cards[:share])
    dealt = stages.stages_of(spec, share, count)
    w, c = weights(spec, s.quant, s.importance), _cache(spec, s)
    terms = vllm_terms(spec, cards, s, c, stages=tuple(dealt[i // share] for i in range(len(cards))) if count > 1 else ())
    reserved = reservations(cards, s, terms)
    names = {f"gpu{i}": name for i, (name, _) in enumerate(order)} | {"host": "head/RAM"}
    devices = {}
    for i, card in enumerate(cards):
        mine = [t for t in terms if t.device == f"gpu{i}"]
        used = (sum(getattr(t, what) for t in mine) for what in ("bytes", "low", "high"))
        devices[f"gpu{i}"] = Device(f"gpu{i}", card.name, card.memory, reserved[i].room(free_bytes(card)), *used)
    verdicts = [d.verdict for d in devices.values()] + [r.starts for r in reserved]
    verdict = next(v for v in ("does not fit", "may spill", "fits") if v in verdicts)
    each = max(s.context // s.sequences, 1)
    teams = tuple(cards[i * share:(i + 1) * share] for i in range(count))
    stage_names = [names[f"gpu{i * share}"].split("/")[0] for i in range(count)]
    pace = _stage_speed(spec, s, w, c, dealt, teams, stage_names)
    token, whole = (stages.traffic(spec, owner, share, len(hosts), tokens) for tokens in (1, each))
    links = [inside(team, bridge) for team in teams]
    pace = pace.joined(
        [*stages.exchange_parts(spec, stage_names, dealt, links, 1), *_hop_parts(hosts, link, token, 1)],
        [*stages.exchange_parts(spec, stage_names, dealt, links, min(s.batch, each)), *_hop_parts(hosts, link, whole, each)])
    nothing = {host.name: Traffic() for host in hosts}
    layers = {names[f"gpu{i}"]: range(dealt[i // share].first, dealt[i // share].last) for i in range(len(cards))}
    return HostsPlan(
        spec, hosts, link, s, _renamed(terms, names), _devices(devices, names), layers, names[f"gpu{len(cards) - share}"],
        verdict, pace, *({host.name: t for host, t in zip(hosts, traffic, strict=True)} for traffic in (token, whole)),
        nothing, nothing, len(spec.layers) + 1, share=share, reserved=reserved)


def _cache(spec: ModelSpec, s: Settings):
    return cache_bytes(spec, s.context, s.kv, engine=s.engine, sequences=s.sequences, ubatch=s.batch,
                       flash_attention=s.flash_attention, swa_full=s.swa_full, unified=s.unified)


def _stage_speed(spec: ModelSpec, s: Settings, w: Weights, c, dealt: Sequence[stages.Stage],
                 teams: tuple[tuple[Gpu, ...], ...], names: Sequence[str]) -> Speed:
    where = [i for i, stage in enumerate(dealt) for _ in range(stage.first, stage.last)] + [len(dealt) - 1]
    found = speed(spec, s, w, c, tuple(map(stages.slowest, teams)), where, teams=teams)
    return _spoken(found, {f"gpu{i}": name for i, name in enumerate(names)})


def _hop_parts(hosts: Sequence[Host], link: Link, traffic: Sequence[Traffic], tokens: int) -> list[Part]:
    """What the hidden state takes from host to host, and the token's way back."""
    hops, bytes = sum(t.rounds for t in traffic), sum(t.sent for t in traffic)
    if not hops:
        return []
    seconds = tuple((bytes / rate + (hops + RESULT) * link.round_trip * wait) / tokens
                    for rate, wait in zip(banded(link.rate, LINE), WAIT, strict=True))
    return [Part(link.name, "network", bytes / tokens, seconds)]


# ---- names ----------------------------------------------------------------------------------------------------------

def _renamed(terms: Sequence[Term], names: dict[str, str]) -> tuple[Term, ...]:
    return tuple(replace(t, device=names[t.device]) for t in terms)


def _devices(devices: dict[str, Device], names: dict[str, str]) -> dict[str, Device]:
    return {names[name]: replace(d, name=names[name]) for name, d in devices.items()}


def _spoken(pace: Speed, names: dict[str, str]) -> Speed:
    def named(parts: Sequence[Part]) -> tuple[Part, ...]:
        return tuple(replace(p, device=names.get(p.device, p.device)) if p.device != "host" else p for p in parts)
    return replace(pace, parts=named(pace.parts), prefill_parts=named(pace.prefill_parts))


def _blocks(where: Sequence[int], names: dict[str, str], count: int) -> dict[str, range]:
    """The blocks of each device, which lie together."""
    found = {}
    for i, at in enumerate(where[:count]):
        name = names["host" if at < 0 else f"gpu{at}"]
        found[name] = range(found[name].start if name in found else i, i + 1)
    return found
