"""Hosts, their cards and what joins them, from what a person writes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .. import catalog
from ..catalog import Gpu, Link
from ..errors import LabError, UnknownName
from ..hardware import Machine
from ..units import GB

MOST_WORKERS = 16              # GGML_RPC_MAX_SERVERS of ggml-rpc.h
GOODPUT = 1448 / 1538          # TCP payload of a line's rate at MTU 1500
ROUND_TRIP = 180e-6            # seconds where a network is given by its rate alone


@dataclass(frozen=True)
class Host:
    """One computer: the head, on which the program is started, or a worker."""

    name: str                  # "head", "worker1", ...
    cards: tuple[Gpu, ...]

    def __repr__(self) -> str:
        return f"<{self.name}: {', '.join(card.name for card in self.cards) or 'no cards'}>"


def named_hosts(given) -> tuple[Host, ...]:
    """Hosts from a list of lists of cards (a name, a Gpu or a Machine will do for a host); the first is the head.

    Raises LabError where there are none, or a worker has no cards.
    """
    if isinstance(given, (str, Gpu, Machine)) or not isinstance(given, Sequence) or not given:
        raise LabError('hosts is a list of hosts, each a list of cards: [["rtx-4090-24gb"] * 2, ["rtx-3090-24gb"]]')
    if len(given) > MOST_WORKERS + 1:
        raise LabError(f"{len(given)} hosts; llama.cpp's RPC takes {MOST_WORKERS} servers beside the head, as does this plan")
    hosts = tuple(Host(f"worker{i}" if i else "head", _cards(cards)) for i, cards in enumerate(given))
    bare = next((host.name for host in hosts[1:] if not host.cards), None)
    if bare:
        raise LabError(f"{bare} has no cards; leave it out, or name its cards")
    if not any(host.cards for host in hosts):
        raise LabError("no host has a card; llmlab.fit(spec, None) answers for a processor alone")
    return hosts


def _cards(given) -> tuple[Gpu, ...]:
    if isinstance(given, Machine):
        return given.cards
    if given is None or isinstance(given, str) and given.strip().lower() == "none":
        return ()
    if isinstance(given, (list, tuple)):
        return tuple(catalog.gpu(card) for card in given)
    return (catalog.gpu(given),)


def network_of(given, round_trip: float | None = None) -> Link:
    """The link between hosts: its id in data/links.csv ("eth-10g", also "ethernet-10g", "10GbE"), a Link, or a rate in words
    ("9.4 Gb/s" is what the line says, "1.1 GB/s" what a copy was measured at). round_trip: seconds of a small message and its
    answer, where it was measured (`ping` shows milliseconds).

    Raises UnknownName, or LabError for a rate or a time that cannot be.
    """
    found = given if isinstance(given, Link) else _by_name(given) or _by_rate(given)
    if found is None:
        known = [link.id for link in catalog.links().values() if link.kind == "network"]
        raise UnknownName(f"no network called {given!r:.40}; there are {', '.join(known)}, or give a rate such as '9.4 Gb/s'")
    if not found.rate:
        raise LabError(f"no rate is known of {found.name}; give one, such as '9.4 Gb/s'")
    if round_trip is not None:
        if isinstance(round_trip, bool) or not isinstance(round_trip, (int, float)) or not 0 < round_trip < 10:
            raise LabError(f"round_trip is {round_trip!r:.40}; give seconds, like 0.0002")
        return replace(found, round_trip=float(round_trip))
    return found if found.round_trip else replace(found, round_trip=ROUND_TRIP)


def _by_name(given) -> Link | None:
    if not isinstance(given, str):
        return None
    known = catalog.links()
    text = given.strip().lower()
    if text in known and known[text].kind != "ram":
        return known[text]
    short = re.fullmatch(r"(?:(?:eth|ethernet|lan)?[\s-]*([\d.]+)\s*-?g(?:be|bit|b|bps)?(?:[\s-]*ethernet)?)", text)
    if short:
        return known.get(f"eth-{short[1]}g")
    return known["wifi6-2x2"] if re.fullmatch(r"wi-?fi(?:[\s-]*6)?", text) else None


def _by_rate(given) -> Link | None:
    """A link from a rate: bits are the line's, bytes what arrives."""
    rate, name = None, ""
    if isinstance(given, str) and (found := re.fullmatch(r"\s*([\d.]+)\s*([MG])(b|B|bit|bits)/s\s*", given)):
        try:
            number = float(found[1])
        except ValueError:
            return None
        scale = (GB if found[2] == "G" else GB / 1000) * (1 if found[3] == "B" else GOODPUT / 8)
        rate, name = number * scale, given.strip()
    elif isinstance(given, (int, float)) and not isinstance(given, bool):
        rate, name = float(given), f"{given / GB:.3g} GB/s"
    if rate is None or not 1e3 < rate < 1e13:
        return None
    return Link("given", "network", name, None, rate, None, "given", "given")


def inside(cards: Sequence[Gpu], bridge: str | None) -> Link | None:
    """What joins the cards of one host: the slowest card's slot, or the named link of data/links.csv (an NVLink bridge)."""
    if bridge is not None:
        found = catalog.links().get(str(bridge))
        if found is None or found.kind != "pcie":
            known = [link.id for link in catalog.links().values() if link.kind == "pcie"]
            raise catalog.unknown("link", bridge, known, "data/links.csv")
        return found
    slots = [card.link for card in cards if card.link and card.link.rate]
    return min(slots, key=lambda link: link.rate) if slots else None
