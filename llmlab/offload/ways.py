"""Where an offloaded model would run and how its bytes travel there: a card or a part of RAM, a link, a drive; from what was
measured here, or from data/ for machines that are not here."""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from .. import catalog, hardware
from ..calibrated import Figure
from ..catalog import Gpu, Link, gpu, links, unknown
from ..errors import LabError, UnknownName
from ..overhead import Measured, overhead_term
from ..rates import MAPPED, MAPPED_EXPERTS, USUAL, USUAL_LINK, Band, Rates, banded, beside, host_named, of_machine
from ..units import GB, GIB, format_rate, parse_bytes
from .costs import COPIED, FLASH, HEAD, IN_RAM, SATA, drive_band, reading_rate

RESERVE = 2 * GIB           # RAM the system itself keeps
UNLIMITED = 2**50           # bytes: of RAM beside a card that is not here, where nobody says how much there is
READERS = 8                 # with which the drives of data/links.csv were measured
USUAL_DRIVE = "nvme-gen4-class"
CLASSES = {"nvme": "nvme-gen4-class", "ssd": "nvme-gen4-class", "gen3": "nvme-gen3-class", "gen4": "nvme-gen4-class",
           "gen5": "nvme-gen5-class", "qlc": "nvme-qlc-class", "sata": "sata3-class", "hdd": "hdd-7200",
           "usb": "usb3-gen2-ssd", "wsl": "nvme-wsl2", "wsl2": "nvme-wsl2", "virtual": "cloud-virtio-disk"}
# a drive that was not measured, by hardware.Disk.kind
_HERE = {"nvme": "nvme-gen4-class", "ssd": "sata3-class", "hdd": "hdd-7200", "virtual": "cloud-virtio-disk"}
_RATE = re.compile(r"\s*(\d*\.?\d+)\s*(gb|mb)\s*/\s*s\s*", re.IGNORECASE)
FASTER = ("hdd-7200", "sata3-class", "nvme-qlc-class", "nvme-gen3-class", "nvme-gen4-class", "nvme-gen5-class", "nvme-raid0-2x")
"""Classes of drives, each faster than the one before."""


@dataclass(frozen=True)
class Drive:
    """A drive and how it is read. Bytes per second, slow, usual, fast: `rate` of layers one after another, `scattered` of
    experts here and there. `readers` threads, past the page cache where `direct`; `mapped`: by page faults instead. `kind`:
    "measured" here, on `day`, else "modelled". `hidden`: share of its reading that costs a processor nothing which computes
    with all its threads meanwhile."""

    name: str
    rate: Band
    scattered: Band
    readers: int
    direct: bool
    mapped: bool = False
    kind: str = "modelled"
    day: str | None = None
    hidden: float = 1.0

    @property
    def words(self) -> str:
        how = "mapped" if self.mapped else f"{self.readers} reader{'s' * (self.readers != 1)}"
        said = f"{self.name}, {format_rate(self.rate[1])} ({self.rate[0] / GB:.2g} to {self.rate[2] / GB:.2g}), {how}"
        return f"{said}, measured on {self.day}" if self.day else said


@dataclass(frozen=True)
class Site:
    """Where it would run. `card`: None where the processor is the device and its memory a part of RAM. Bytes: `device` and
    `ram` there is room for in all, `overhead` what of the device is lost to context and driver (low, usual, high). `link`:
    bytes per second to the device from RAM. `rates`: of the host. `here`: it is the machine that was named, none that is made
    up. `lanes`: 32-bit numbers in a register of the processor.
    """

    card: Gpu | None
    rates: Rates
    drive: Drive
    link: Band
    device: int
    ram: int
    overhead: tuple[int, int, int] = (0, 0, 0)
    overhead_kind: str = "modelled"
    here: bool = False
    lanes: int = 8

    @property
    def title(self) -> str:
        return self.card.name if self.card else "the processor"

    @property
    def limited(self) -> bool:
        """Whether it is known how much RAM there is."""
        return self.ram < UNLIMITED // 2

    @property
    def shared(self) -> bool:
        """The device's memory is RAM: nothing is gained by a copy of a layer beside it."""
        return self.card is None or self.card.unified


def site(machine=None, card=None, host=None, drive=None, readers: int | None = None, mapped: bool = False,
         device_budget: int | None = None, ram_budget: int | None = None) -> Site:
    """The site that is meant. machine: a Machine, None for this one. card: a card, its name, "none" for the processor, None:
    the first of the machine, which is then this computer's. host: RAM in words or bytes. drive: as `drive_named` has it.
    Budgets in bytes, None: all there is. Raises LabError for what cannot be."""
    real = machine if machine is not None else hardware.this_machine()
    if isinstance(card, (list, tuple)):
        if len(card) != 1:
            raise LabError("a plan is for one device; name one card, or 'none' for the processor")
        card = card[0]
    if isinstance(card, str) and card.strip().lower() == "none":
        chosen = None
    elif card is not None:
        chosen = gpu(card)
    else:
        chosen = real.cards[0] if real.cards else None
    rates, ram = of_machine(real), min(real.ram_total, real.ram_limit or real.ram_total)
    elsewhere = chosen is not None and chosen.free is None
    if elsewhere:
        rates, ram = USUAL, UNLIMITED                     # somebody else's computer: a desktop, with as much RAM as it takes
    if host is not None:
        size, named = host_named(host) if isinstance(host, str) else (host, None)
        rates = named or USUAL
        ram = parse_bytes(size) if size is not None else ram if chosen is None else UNLIMITED
    if chosen is not None:
        rates = beside((chosen,), rates)
    made_up = elsewhere or host is not None
    if drive is None and not made_up:
        found = drive_here(real, readers, mapped)
    else:
        found = drive_named(USUAL_DRIVE if drive is None else drive, readers, mapped)
    if chosen is None or chosen.unified:
        made = _processor(chosen, rates, found, ram, device_budget, ram_budget)
    else:
        made = _beside_host(chosen, real, rates, found, ram, device_budget, ram_budget)
    return replace(made, here=not made_up, lanes=16 if "avx512f" in real.cpu.features else 8)


def _processor(card: Gpu | None, rates: Rates, drive: Drive, ram: int, device_budget: int | None,
               ram_budget: int | None) -> Site:
    """RAM is both: the device has what the budget names, and the RAM tier what is left, none where no budget is."""
    usable = max(ram - min(RESERVE, ram // 8), 0)
    if card is not None:
        usable = (card.memory if card.free is None else card.free) - card.reserved[1]
    device = device_budget if device_budget is not None else max(usable - (ram_budget or 0), 0)
    rest = max(usable - device, 0) if device_budget is not None and card is None else 0
    rest = rest if ram_budget is None else ram_budget
    return Site(card, rates, drive, banded(rates.ram[1], IN_RAM), device, rest)


def _beside_host(card: Gpu, real, rates: Rates, drive: Drive, ram: int, device_budget: int | None,
                 ram_budget: int | None) -> Site:
    measured = None
    live = card.free is not None
    if live and real.calibration is not None and card.name in real.calibration.context_bytes:
        measured = Measured(real.calibration.context_bytes[card.name], real.calibration.workspace_bytes.get(card.name))
    term = overhead_term(card, "device", "transformers", 1, None if live else False, measured)
    have = card.free if live else card.memory
    device = min(have, device_budget) if device_budget is not None else have
    rest = ram_budget if ram_budget is not None else max(ram - min(RESERVE, ram // 8), 0)
    copy = real.calibration.copies.get((0, "h2d_pinned")) if live and real.calibration else None
    link = banded(copy.best, COPIED) if copy else banded(card.link.rate if card.link and card.link.rate else USUAL_LINK, COPIED)
    return Site(card, rates, drive, link, device, rest, (term.low, term.bytes, term.high), term.kind)


# ---- drives ----------------------------------------------------------------------------------------------------------

def drive_named(named: str | float, readers: int | None = None, mapped: bool = False) -> Drive:
    """A drive of data/links.csv by id or name ("samsung-980-pro"), a class ("nvme", "gen4", "sata", "hdd"), or a rate ("5.9
    GB/s", or bytes a second). Raises UnknownName and LabError."""
    if isinstance(named, (int, float)) and not isinstance(named, bool) or isinstance(named, str) and _RATE.fullmatch(named):
        rate = float(named) if not isinstance(named, str) else _spelled(named)
        if not 1e5 <= rate <= 1e12:
            raise LabError(f"drive is {str(named)[:40]!r}; give what it reads in a second, like '5.9 GB/s'")
        return _drive(f"a drive of {format_rate(rate) if rate >= 1e8 else f'{rate / 1e6:.0f} MB/s'}", rate, True,
                      HEAD if rate < 0.3e9 else FLASH, readers, mapped)
    found = _link(named)
    rate = found.rate
    fault = found.id.startswith("nvme-mmap")
    return _drive(found.name, found.theoretical if fault else rate, bool(found.measured or found.estimated),
                  HEAD if "hdd" in found.id else SATA if found.kind == "sata" else FLASH, readers, mapped or fault)


def _spelled(text: str) -> float:
    number, unit = _RATE.fullmatch(text).groups()
    return float(number) * (GB if unit.lower() == "gb" else GB / 1000)


@lru_cache(maxsize=256)
def _link(named: str) -> Link:
    drives = {name: link for name, link in links().items() if link.kind in ("nvme", "sata") and link.rate}
    if not isinstance(named, str):
        raise unknown("drive", named, drives, "data/links.csv")
    key = named.strip().lower()
    if key in CLASSES or key in drives:
        return drives[CLASSES.get(key, key)]
    words = set(re.findall(r"[a-z0-9]+", key))
    close = [link for link in drives.values()
             if words and words <= set(re.findall(r"[a-z0-9]+", f"{link.id} {link.name}".lower()))]
    if len(close) == 1:
        return close[0]
    if close:
        raise UnknownName(f"{named.strip()[:40]} may be {', '.join(link.id for link in close[:6])}: say which")
    raise unknown("drive", named, [*drives, *CLASSES], "data/links.csv")


def _drive(name: str, rate: float, measured: bool, wait: float, readers: int | None, mapped: bool) -> Drive:
    """From one figure, by as many readers as it takes (None), as many as are asked for, or by page faults."""
    count = max(1, readers) if readers is not None else 1 if wait == HEAD else READERS
    band = drive_band(rate, measured)
    if wait == HEAD:                                      # the head goes to a piece once, whoever reads it
        whole, apart = band, tuple(reading_rate(r, 1, wait, 16e6) for r in band)
    else:
        whole = apart = tuple(reading_rate(r, count, wait) for r in band)
    if mapped:
        whole, apart = (tuple(map(min, band, faults)) for band, faults in ((whole, MAPPED), (apart, MAPPED_EXPERTS)))
    return Drive(name, whole, apart, count, not mapped and wait == FLASH, mapped)


def drive_here(machine, readers: int | None = None, mapped: bool = False) -> Drive:
    """The drive of this computer as calibration measured it cold, by the method and threads that were fastest, or with as many
    `readers` as are asked for; that of its class where it was not measured."""
    found = machine.calibration
    cold = [f for f in found.disk if f.cold] if found else []
    cold = [f for f in cold if (f.method == "mmap") == mapped and (readers is None or f.threads == readers)] or (
        [] if mapped else [f for f in cold if f.method != "mmap"])
    if not cold:
        kind = machine.disks[0].kind if machine.disks else "unknown"
        drive = drive_named(_HERE.get(kind, USUAL_DRIVE), readers, mapped)
        return replace(drive, name=f"this drive, not measured, taken for {drive.name}")
    best = max(cold, key=lambda f: f.best * _streamed(f))
    low, high = max(0.75 * best.best, min(best.low, 0.92 * best.best)), min(1.1 * best.best, max(best.high, 1.03 * best.best))
    wide = tuple(rate * _streamed(best) for rate in (low, best.best, high))
    return Drive(f"this drive ({best.method})", wide, wide, best.threads or 1, best.method == "direct", mapped, "measured",
                 found.day, found.hidden)


def _streamed(read: Figure) -> float:
    """The share of what calibration reads that pieces reach with as many threads: a reader hands on what it has read, and one
    alone leaves the drive idle meanwhile (tests/bench/bench_reading.py: 0.91, 0.98 and 0.99 with 1, 2 and 4)."""
    return 1.0 if read.method == "mmap" else 0.91 if read.threads == 1 else 0.98


# ---- what would be faster -------------------------------------------------------------------------------------------

def next_drive(drive: Drive) -> str | None:
    """The next class of drives that is clearly faster than this one; None where there is none."""
    return next((name for name in FASTER if (links()[name].rate or 0) > 1.3 * drive.rate[1]), None)


def next_memory(card: Gpu) -> int | None:
    """The next larger memory that cards come with, in bytes."""
    sizes = sorted({round(g["memory"] / GIB) for g in catalog.gpus() if g["kind"] == "desktop"})
    return next((size * GIB for size in sizes if size * GIB > 1.2 * card.memory), None)


__all__ = ["Drive", "Site", "drive_here", "drive_named", "next_drive", "next_memory", "site"]
