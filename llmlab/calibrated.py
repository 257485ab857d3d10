"""What was measured of this machine once: rates as low, best, high, with their conditions; kept in llmlab's cache.

Plain Python: `calibration` measures and stores, `hardware.machine()` reads back. A file that is not of this version, of
this machine, or whole is left alone, and why is said.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from html import escape
from pathlib import Path
from typing import NamedTuple

from . import places
from .units import format_bytes, format_rate

VERSION = 1
SPREAD = 1.5  # high over low of a rate; on an idle machine the same work repeats within a few per cent


class Rate(NamedTuple):
    """The slowest, the median and the fastest round; bytes or operations per second (`Figure.unit` says which)."""

    low: float
    best: float
    high: float


@dataclass(frozen=True)
class Figure:
    """One thing measured, over `rounds` rounds: the slowest, the median and the fastest.

    part "ram": bytes per second that `threads` threads stream from RAM.
    part "decode": bytes of weights per second that a one-row multiplication reads, by type (`name`).
    part "matmul": operations (two a multiply-add) per second at 512 rows on a 4096-wide matrix, by type.
    part "copy": bytes per second, `name` "h2d_pinned", "d2h_pinned", "h2d_pageable", "d2h_pageable" or "d2d" (bytes
    copied, each read and written); to another card "p2p_gpu1".
    part "memory": bytes per second that a card reads from its own memory.
    part "context": bytes of a card taken by one process: `name` "context" before any work, "kernels" that the first
    multiplication loads, "workspace" that cuBLAS keeps.
    part "disk": bytes per second, `name` "buffered", "direct" or "mmap", `threads` at once; `cold` where the page cache
    held none of it before the read (None: could not be seen), `resident` the largest share that it held.
    part "together": share of the disk's reading that hides behind computing (`calibration.together`).
    """

    part: str
    device: str  # "cpu", "gpu0", ..., "disk"
    name: str
    low: float
    best: float
    high: float
    unit: str  # "B/s", "op/s", "B" or "share"
    rounds: int
    how: str
    threads: int | None = None
    cold: bool | None = None
    resident: float | None = None

    @property
    def rate(self) -> Rate:
        return Rate(self.low, self.best, self.high)

    @property
    def method(self) -> str:
        """How a disk was read: "buffered", "direct" (O_DIRECT) or "mmap"."""
        return self.name

    @property
    def words(self) -> str:
        """`"31.2 GB/s (29.8 to 31.9)"`."""
        low, best, high = (_amount(value, self.unit) for value in self.rate)
        return best if low == high else f"{best} ({low.split()[0]} to {high})"


def _amount(value: float, unit: str) -> str:
    if unit == "B":
        return format_bytes(value)
    if unit == "share":
        return f"{value:.0%}"
    if unit == "B/s":
        return format_rate(value) if value >= 1e8 else f"{value / 1e6:.1f} MB/s"
    return f"{value / 1e12:.2f} TOP/s" if value >= 1e12 else f"{value / 1e9:.1f} GOP/s"


_DECODE_ORDER = ("int4", "int8", "bfloat16", "float16", "float32")
_TITLES = {"ram": "RAM read", "decode": "one row times weights, bytes read", "matmul": "up to 512 rows times weights",
           "copy": "copy", "memory": "card memory read", "context": "card memory taken", "disk": "disk read",
           "together": "disk read hidden behind computing"}


@dataclass(frozen=True)
class Calibration:
    """This machine as measured on `date`. Every figure is measured; `skipped` says what was not, and why.

    `load` is the load average before the run (None where the system keeps none), `others` how many cores other
    processes kept busy during it, both of all `cores` (logical ones) of the computer.
    """

    machine_id: str
    date: str  # ISO 8601, with the zone
    seconds: float  # how long it took
    versions: dict[str, str]
    facts: dict  # what the machine id is made of
    cores: int
    load: float | None
    others: float | None
    figures: tuple[Figure, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    version: int = field(default=VERSION)

    def find(self, part: str, device: str = "cpu", name: str | None = None, threads: int | None = None) -> Figure | None:
        """The figure asked for; of several (thread counts) the one with the most threads. None where not measured."""
        found = [f for f in self.figures if f.part == part and f.device == device and (name is None or f.name == name)
                 and (threads is None or f.threads == threads)]
        return max(found, key=lambda f: f.threads or 0, default=None)

    @property
    def ram_read(self) -> Rate | None:
        """Bytes per second that all usable threads together stream from RAM."""
        found = self.find("ram")
        return found and found.rate

    @property
    def decode_bytes(self) -> Rate | None:
        """Bytes of weights per second that the int4 operation reads for one row; the int8 one where int4 has none."""
        return next((self.decode[name] for name in _DECODE_ORDER if name in self.decode), None)

    @property
    def decode(self) -> dict[str, Rate]:
        """Bytes of weights per second on the CPU for one row, by type: "int4", "int8", "bfloat16", ..."""
        return self.rates("decode")

    @property
    def matmul(self) -> dict[str, Rate]:
        """Operations per second on the CPU at 512 rows, by type; `rates("matmul", "gpu0")` has a card's."""
        return self.rates("matmul")

    def rates(self, part: str, device: str = "cpu") -> dict[str, Rate]:
        """{name: rate} of one part of one device."""
        return {f.name: f.rate for f in self.figures if f.part == part and f.device == device}

    @property
    def copies(self) -> dict[tuple[int, str], Rate]:
        """Bytes per second: {(0, "h2d_pinned"): rate, ...}; cards are numbered as in `Machine.cards`."""
        return {(_index(f.device), f.name): f.rate for f in self.figures if f.part == "copy"}

    @property
    def device_bandwidth(self) -> dict[int, Rate]:
        """Bytes per second that each card reads from its own memory."""
        return {_index(f.device): f.rate for f in self.figures if f.part == "memory"}

    @property
    def context_bytes(self) -> dict[str, int]:
        """Bytes that one process takes of a card before it allocates anything, with the first kernels loaded; by the
        name of the card in `Machine.cards`."""
        names, found = self.facts.get("cards", []), {}
        for f in self.figures:
            if f.part == "context" and f.name in ("context", "kernels") and _index(f.device) < len(names):
                name = names[_index(f.device)]
                found.setdefault(name, {}).setdefault(f.device, []).append(f.best)
        return {name: round(max(map(sum, devices.values()))) for name, devices in found.items()}

    @property
    def workspace_bytes(self) -> dict[str, int]:
        """Bytes of the workspace that cuBLAS keeps in one process, by the name of the card."""
        names = self.facts.get("cards", [])
        return {names[_index(f.device)]: round(f.best) for f in self.figures
                if f.part == "context" and f.name == "workspace" and _index(f.device) < len(names)}

    @property
    def disk(self) -> tuple[Figure, ...]:
        """Reads of the disk that holds llmlab's cache, by method and threads."""
        return tuple(f for f in self.figures if f.part == "disk")

    @property
    def hidden(self) -> float:
        """Share of the disk's reading that hides behind computing; all of it where that was not measured."""
        found = self.find("together", "disk")
        return found.best if found else 1.0

    @property
    def busy(self) -> str | None:
        """Why these figures may be too low: other work beside the run, or rounds that differ. None if neither."""
        if self.others is not None and self.others > self.cores / 4:
            return f"measured while the machine was busy: other processes kept {self.others:.1f} of {self.cores} cores busy"
        if self.load is not None and self.load > self.cores / 2:
            return f"measured while the machine was busy: a load of {self.load:.1f} on {self.cores} cores before the run"
        wide = [f for f in self.figures if f.part in ("ram", "decode", "matmul", "memory") and f.high > SPREAD * f.low]
        if wide:
            worst = max(wide, key=lambda f: f.high / f.low)
            return (f"measured while the machine was busy, or on one that varies: rounds of the same work differ by "
                    f"{worst.high / worst.low:.1f} times ({_label(worst)})")
        return None

    @property
    def day(self) -> str:
        return self.date[:10]

    @property
    def answer(self) -> str:
        """One or two sentences."""
        parts = []
        if ram := self.find("ram"):
            parts.append(f"RAM is read at {format_rate(ram.best)} by {ram.threads} thread{'s' * (ram.threads != 1)}")
        if rate := self.decode_bytes:
            name = next(n for n in _DECODE_ORDER if n in self.decode)
            parts.append(f"one row of {name} reads {format_rate(rate.best)} of weights")
        if self.matmul:
            name = max(self.matmul, key=lambda n: self.matmul[n].best)
            parts.append(f"{name} multiplies at {_amount(self.matmul[name].best, 'op/s')}")
        for index, rate in self.device_bandwidth.items():
            link = self.copies.get((index, "h2d_pinned"))
            parts.append(f"card {index} reads its memory at {format_rate(rate.best)}"
                         + (f" and is sent {format_rate(link.best)}" if link else ""))
        if self.disk:
            fast = max((f for f in self.disk if f.cold), key=lambda f: f.best, default=None)
            parts.append(f"the disk gives {_amount(fast.best, 'B/s')} cold ({fast.name}, {fast.threads} "
                         f"thread{'s' * (fast.threads != 1)})" if fast else "the disk could not be read cold")
        text = f"Measured {self.day}: {', '.join(parts) or 'nothing'}."
        return f"{text} {self.busy[0].upper()}{self.busy[1:]}." if self.busy else text

    def lines(self) -> list[str]:
        """Every figure, a line for those that differ in type, thread count or direction alone; then what was skipped."""
        groups: dict[tuple, list[str]] = {}
        for f in self.figures:
            many = f.part in ("ram", "disk")
            title = f"{_title(f)}{f', {f.name}' if f.part == 'disk' else ''}{_state(f)}"
            groups.setdefault((f.part, f.device, title), []).append(f"{_threads(f) if many else f.name} {f.words}")
        return ([f"{title}: {', '.join(cells)}" for (_, _, title), cells in groups.items()]
                + [f"not measured: {name}: {why}" for name, why in self.skipped])

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, figure, kind of truth, conditions), a row a figure."""
        return [(_label(f), f.words, "measured", _conditions(f)) for f in self.figures]

    @property
    def table(self) -> str:
        """The rows as text, what was skipped below."""
        rows = [("what", "median (slowest to fastest)", "kind", "conditions"), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
                 for row in rows]
        return "\n".join(lines + [f"not measured: {name}: {why}" for name, why in self.skipped])

    def to_dict(self) -> dict:
        """Plain values for JSON, and what `calibrated.read` reads back; `answer` and `busy` beside them."""
        return asdict(self) | {"figures": [asdict(f) for f in self.figures], "skipped": [list(s) for s in self.skipped],
                               "answer": self.answer, "busy": self.busy}

    def __repr__(self) -> str:
        return f"{self.answer}\n{self.table}"

    def _repr_html_(self) -> str:
        rows = "".join("<tr>" + "".join(f'<td style="text-align:left">{escape(cell)}</td>' for cell in row) + "</tr>"
                       for row in [*self.rows(), *((n, "not measured", "", why) for n, why in self.skipped)])
        return f"<p>{escape(self.answer)}</p><table>{rows}</table>"


def _index(device: str) -> int:
    return int(device.removeprefix("gpu"))


def _threads(f: Figure) -> str:
    return f"{f.threads} thread{'s' * (f.threads != 1)}"


def _title(f: Figure) -> str:
    return f"{'' if f.device in ('cpu', 'disk') else f'{f.device} '}{_TITLES[f.part]}"


def _label(f: Figure) -> str:
    name = "" if f.part in ("ram", "memory") else f", {f.name}"
    return f"{_title(f)}{name}{f', {_threads(f)}' if f.threads else ''}"


def _state(f: Figure) -> str:
    """Cold or warm, and what the page cache held, of a read of a disk."""
    if f.part != "disk":
        return ""
    state = {True: ", cold", False: ", warm", None: ", cold or warm (cannot be seen here)"}[f.cold]
    return state if f.resident is None else f"{state} ({f.resident:.1%} of it in the page cache before)"


def _conditions(f: Figure) -> str:
    return f"{_state(f)[2:]}; {f.how}" if f.part == "disk" else f.how


# -- which machine, and where its file lies ----------------------------------------------------------------------------


def machine_facts(cpu: str, cores: int, usable: int, ram: int, cards: Iterable[str], driver: str) -> dict:
    """What decides the rates and does not name the computer. RAM in GiB: a new kernel keeps a few MiB more or less."""
    return {"cpu": cpu, "cores": cores, "usable": usable, "ram_gib": round(ram / 2**30), "cards": list(cards),
            "driver": driver}


def machine_id(facts: dict) -> str:
    """16 hexadecimal digits; another card, driver, processor or RAM gives others."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def folder() -> Path:
    return places.cache() / "calibration"


def path_of(identity: str) -> Path:
    return folder() / f"{identity}.json"


def store(calibration: Calibration) -> Path:
    """Writes the file whole or not at all; the last of several writers wins. Raises OSError."""
    target = path_of(calibration.machine_id)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(calibration.to_dict(), file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return target


def read(facts: dict) -> tuple[Calibration | None, str | None]:
    """The stored calibration of the machine with these facts; else None and, where a file is there, why not."""
    path = path_of(machine_id(facts))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None, _others(facts)
    except (OSError, UnicodeDecodeError) as error:
        return None, f"{path} cannot be read ({getattr(error, 'strerror', None) or 'not text'}) and is ignored"
    try:
        return _parse(json.loads(text), facts), None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        reason = str(error) if isinstance(error, _Unusable) else "it is not what llmlab wrote"
        return None, f"{path} is ignored: {reason}"


class _Unusable(ValueError):
    """A stored file that this version does not take; the text says why."""


def _parse(value, facts: dict) -> Calibration:
    if not isinstance(value, dict) or "figures" not in value:
        raise _Unusable("it is not what llmlab wrote")
    if value.get("version") != VERSION:
        raise _Unusable(f"it is of version {str(value.get('version'))[:20]}, this llmlab writes version {VERSION}")
    if value["machine_id"] != machine_id(facts) or value["facts"] != facts:
        raise _Unusable("it was measured on another machine")
    figures = tuple(_figure(each) for each in value["figures"])
    skipped = tuple((str(name), str(why)) for name, why in value["skipped"])
    date = str(value["date"])
    datetime.fromisoformat(date)
    numbers = {}
    for name in ("seconds", "load", "others"):
        number = value[name]
        if number is not None or name == "seconds":
            number = _number(number, name)
        numbers[name] = number
    if not isinstance(value["cores"], int) or value["cores"] < 1:
        raise _Unusable("its cores is no count")
    versions = {str(k): str(v) for k, v in value["versions"].items()}
    return Calibration(machine_id=value["machine_id"], date=date, versions=versions, facts=facts, cores=value["cores"],
                       figures=figures, skipped=skipped, **numbers)


_PARTS = {"ram": "B/s", "decode": "B/s", "matmul": "op/s", "copy": "B/s", "memory": "B/s", "context": "B", "disk": "B/s",
          "together": "share"}


def _figure(value: dict) -> Figure:
    figure = Figure(**{f.name: value[f.name] for f in fields(Figure)})
    what = f"its figure {str(figure.part)[:20]} {str(figure.name)[:20]}"
    low, best, high = (_number(x, what) for x in figure.rate)
    if not low <= best <= high or (figure.unit not in ("B", "share") and low <= 0) or (
            figure.unit == "share" and not 0 <= low <= high <= 1):
        raise _Unusable(f"{what} is no rate from low to high")
    texts = all(isinstance(x, str) for x in (figure.part, figure.device, figure.name, figure.unit, figure.how))
    if not texts or _PARTS.get(figure.part) != figure.unit:
        raise _Unusable(f"{what} has another unit or part than llmlab writes")
    if figure.device not in ("cpu", "disk") and not (figure.device[:3] == "gpu" and figure.device[3:].isdecimal()):
        raise _Unusable(f"{what} is of no device")
    if figure.cold not in (True, False, None) or not isinstance(figure.rounds, int):
        raise _Unusable(f"{what} is not what llmlab wrote")
    if not (figure.threads is None or isinstance(figure.threads, int)):
        raise _Unusable(f"{what} has no count of threads")
    if figure.resident is not None:
        _number(figure.resident, what)
    return figure


def _number(value, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise _Unusable(f"{what} is no number")
    return value


def _others(facts: dict) -> str | None:
    """What to say where the same computer was measured with other cards, drivers or cores."""
    names = {"cores": "cores", "usable": "usable cores", "ram_gib": "RAM", "cards": "cards", "driver": "driver"}
    with contextlib.suppress(OSError):
        for path in sorted(folder().glob("*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
                old = json.loads(path.read_text(encoding="utf-8"))["facts"]
                changed = [word for key, word in names.items() if old[key] != facts[key]]
                if old["cpu"] == facts["cpu"] and changed:
                    return f"the stored calibration is of this processor with other {' and '.join(changed)}"
    return None
