"""What the drivers say about the cards: nvidia-smi, /sys of amdgpu and Intel, sysctl on Apple, a Jetson's device tree.

No library of a driver is loaded and nothing is started on a card. Every file is read below `root`, so that a test can
lay out another computer.
"""

import csv
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from . import catalog
from .errors import UnknownName
from .units import GIB, MIB

_SECONDS = 3.0  # a healthy driver answers in well under one; a wedged one never does


def read(path: Path) -> str:
    """The text of a small file of /proc or /sys; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def run(*command: str) -> subprocess.CompletedProcess | None:
    """None where the program is not there or does not answer in time."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS,
                              stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None


def integer(path: Path) -> int | None:
    text = read(path)
    return int(text) if text.isdigit() else None


@dataclass(frozen=True)
class _Seen:
    """A card as its driver reports it. Bytes; None where the driver does not say."""

    name: str
    vendor: str
    total: int | None
    free: int | None
    index: str = ""
    uuid: str = ""
    driver: str = ""
    split: bool = False  # MIG is on


def cards(root: Path, ram: int, available: int) -> tuple[tuple[catalog.Gpu, ...], str, list[tuple[str, str]]]:
    """Every card found, the NVIDIA driver's version ("" if none), and what there is to say about cards that fail."""
    seen, notes = _jetson(root, ram), []
    if not seen:
        seen, notes = _nvidia(root)
    seen += _apple(ram, available) if sys.platform == "darwin" else _drm(root)
    found = []
    for each in seen:
        card = _known(each)
        if card.unified and card.vendor != "AMD":  # an AMD driver counts the shared part itself
            card = replace(card, memory=ram)
            # Linux has already left out what an NVIDIA chip's firmware keeps; elsewhere the system sets a limit.
            limit = ram if card.vendor == "NVIDIA" else ram - card.reserved[1]
            card = replace(card, free=min(available, limit) if each.free is None else each.free)
        if math.isnan(card.bandwidth):
            notes.append((card.name, "not in the catalogue: its memory is live, its speed cannot be predicted; "
                                     "add a row to data/gpus.csv"))
        found.append(card)
    return tuple(found), next((each.driver for each in seen if each.driver), ""), notes


def _known(seen: _Seen) -> catalog.Gpu:
    """The catalogue's facts about a card, by name and by memory where the name fits several, with live numbers.

    A card that is not in the catalogue gets what the driver says and a bandwidth of NaN.
    """
    live = {key: value for key, value in (("memory", seen.total), ("free", seen.free)) if value is not None}
    size = (seen.total or 0) / GIB
    names = [seen.name]
    # Drivers show up to an eighth less than the box says (error correction, firmware).
    names += [f"{seen.name} {gib}GB" for gib in range(math.floor(size), math.ceil(size * 1.125) + 1) if gib]
    for name in names:
        try:
            return replace(catalog.gpu(name), **live)
        except UnknownName:
            pass
    return catalog.Gpu(
        id=re.sub(r"[^a-z0-9]+", "-", seen.name.lower()).strip("-"), name=seen.name, vendor=seen.vendor,
        generation="unknown", kind="unknown", year=0, memory=seen.total or 0, memory_type="unknown", bus_bits=0,
        bandwidth=math.nan, unified=seen.total is None, free=seen.free, source="the driver")


def _smi(root: Path) -> str | None:
    """nvidia-smi's path; under WSL it lies where PATH may not look."""
    own = root / "usr/lib/wsl/lib/nvidia-smi"
    return shutil.which("nvidia-smi") or (str(own) if own.exists() else None)


_SMI_FIELDS = ("index", "uuid", "name", "memory.total", "memory.free", "driver_version", "mig.mode.current")


def _nvidia(root: Path) -> tuple[list[_Seen], list[tuple[str, str]]]:
    """NVIDIA cards by nvidia-smi, or why there are none although one is there."""
    program = _smi(root)
    if not program:
        if _on_bus(root, "0x10de"):
            return [], [("NVIDIA driver", "an NVIDIA card is there but nvidia-smi is not: install the driver; "
                                          "until then everything runs on the CPU")]
        return [], []
    result = run(program, f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits")
    if result and "is not a valid field" in result.stdout + result.stderr:  # drivers before 450 know no MIG
        result = run(program, f"--query-gpu={','.join(_SMI_FIELDS[:-1])}", "--format=csv,noheader,nounits")
    if result is None:
        return [], [("NVIDIA driver", f"nvidia-smi did not answer in {_SECONDS:.0f} s; the driver may be wedged: "
                                      "restart the computer")]
    if result.returncode:
        reason = " ".join((result.stdout + " " + result.stderr).split())[:200] or f"code {result.returncode}"
        return [], [("NVIDIA driver", f"nvidia-smi failed, so no card can be used: {reason}")]
    seen, notes = _nvidia_rows(result.stdout)
    if any(card.split for card in seen):
        listing = run(program, "-L")
        seen, more = _instances(seen, listing.stdout if listing else "")
        notes += more
    return _visible(seen, notes, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _nvidia_rows(text: str) -> tuple[list[_Seen], list[tuple[str, str]]]:
    """Cards from nvidia-smi's CSV. Memory is in MiB; "[N/A]" is no number (chips that share the CPU's memory)."""
    seen, notes = [], []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) < 6:
            if row:
                notes.append(("NVIDIA card", f"nvidia-smi said {' '.join(row)[:200]!r}, which is no card"))
            continue
        index, uuid, name, total, free, driver = (cell.strip() for cell in row[:6])
        if "lost" in total.lower() or "error" in total.lower():
            notes.append((name, f"the driver reports {total}: the card cannot be used until the computer restarts"))
            continue
        seen.append(_Seen(name, "NVIDIA", _mib(total), _mib(free), index, uuid, driver,
                          split=len(row) > 6 and row[6].strip() == "Enabled"))
    return seen, notes


def _mib(text: str) -> int | None:
    return int(text) * MIB if text.isdigit() else None


def _instances(seen: list[_Seen], listing: str) -> tuple[list[_Seen], list[tuple[str, str]]]:
    """A card that MIG splits, replaced by its instances as `nvidia-smi -L` lists them.

    "MIG 1g.10gb Device 0: (UUID: MIG-...)": the profile names its memory in GB, a little less than it has.
    """
    parts: dict[str, list[_Seen]] = {}
    owner = None
    for line in listing.splitlines():
        if gpu := re.match(r"GPU (\d+):", line):
            owner = next((card for card in seen if card.index == gpu[1]), None)
        part = re.match(r"\s+MIG (\S+?\.(\d+)gb\S*)\s+Device\s+\d+: \(UUID: (MIG-[^)]+)\)", line)
        if part and owner:
            size = int(part[2]) * 10**9
            parts.setdefault(owner.index, []).append(
                replace(owner, total=size, free=None, uuid=part[3], split=False))
    whole, notes = [], []
    for card in seen:
        if not card.split:
            whole.append(card)
        elif card.index in parts:
            whole += parts[card.index]
            notes.append((f"{card.name} in parts", "MIG splits this card; a program gets one instance, of at least the "
                          "memory shown here, and its bandwidth is a share of the card's"))
        else:
            notes.append((card.name, "MIG is on and no instance is made, so no program can use this card"))
    return whole, notes


def _visible(seen: list[_Seen], notes: list, choice: str | None) -> tuple[list[_Seen], list[tuple[str, str]]]:
    """The cards that CUDA_VISIBLE_DEVICES leaves (indices or UUIDs; the first unknown one ends the list)."""
    if choice is None or not seen:
        return seen, notes
    left: list[_Seen] = []
    for wanted in filter(None, (part.strip() for part in choice.split(","))):
        found = [c for c in seen if c.index == wanted or (not wanted.isdigit() and c.uuid.startswith(wanted))]
        if not found:
            break
        left += found[:1]
    if len(left) < len(seen):
        notes = [*notes, ("hidden cards", f"CUDA_VISIBLE_DEVICES={choice!r} leaves {len(left)} of {len(seen)} cards")]
    return left, notes


def card_users(root: Path) -> tuple[int, ...] | None:
    """How many processes compute on each NVIDIA card, in nvidia-smi's order."""
    program = _smi(root)
    cards = program and run(program, "--query-gpu=uuid", "--format=csv,noheader")
    users = program and run(program, "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader")
    if not cards or not users or cards.returncode or users.returncode:
        return None
    lines = [line.split(",")[0].strip() for line in users.stdout.splitlines()]
    return tuple(lines.count(uuid.strip()) for uuid in cards.stdout.splitlines())


def _on_bus(root: Path, vendor: str) -> bool:
    """A display controller (PCI class 3) of this vendor is there, driver or not."""
    return any(read(device / "vendor") == vendor and read(device / "class").startswith("0x03")
               for device in root.glob("sys/bus/pci/devices/*"))


def _drm(root: Path) -> list[_Seen]:
    """AMD and Intel cards from /sys: amdgpu reports its memory, Intel's drivers only which card it is."""
    seen = []
    for device in sorted(root.glob("sys/class/drm/card[0-9]*/device")):
        if "-" in device.parent.name:  # card0-HDMI-A-1 is a plug
            continue
        vendor = read(device / "vendor")
        if vendor == "0x1002" and (total := integer(device / "mem_info_vram_total")):
            used = integer(device / "mem_info_vram_used") or 0
            name, card = _named(_amd_names(root, device), total)
            if card or total >= 2 * GIB:  # less is the display part of a desktop processor
                each = _Seen(name, "AMD", total, max(0, total - used))
                seen.append(_with_shared(device, each) if card and card.unified else each)
        elif vendor == "0x8086":
            name, card = _named(_pci_names(root, device), None)
            if card:  # else the graphics inside an older processor: nothing to run a model on
                seen.append(_Seen(name, "Intel", None if card.unified else card.memory, None))
    return seen


def _named(names: list[str], total: int | None) -> tuple[str, catalog.Gpu | None]:
    """The name, of those one chip is sold under, whose card the catalogue has and whose memory is nearest `total`."""
    known = []
    for name in names:
        try:
            known.append((name, catalog.gpu(name)))
        except UnknownName:
            pass
    if not known:
        return names[0] if names else "graphics", None
    return min(known, key=lambda pair: abs(pair[1].memory - (total or pair[1].memory)))


def _with_shared(device: Path, seen: _Seen) -> _Seen:
    """An APU's graphics take from the carve-out and, past it, from RAM that the driver maps (GTT)."""
    shared, used = integer(device / "mem_info_gtt_total") or 0, integer(device / "mem_info_gtt_used") or 0
    return replace(seen, total=seen.total + shared, free=seen.free + max(0, shared - used))


def _amd_names(root: Path, device: Path) -> list[str]:
    """The name in libdrm's table (device id, revision, name), else those in the PCI list, else the bare id."""
    number, revision = read(device / "device")[2:], read(device / "revision")[2:]
    table = read(root / "usr/share/libdrm/amdgpu.ids")
    found = re.search(rf"^{number},\s*{revision},\s*(.+)$", table, re.MULTILINE | re.IGNORECASE)
    return [found[1].strip()] if found else _pci_names(root, device) or [f"AMD graphics {number}"]


def _pci_names(root: Path, device: Path) -> list[str]:
    """What the PCI list calls a chip: "Navi 31 [Radeon RX 7900 XT/7900 XTX]" is sold under two names."""
    vendor, number = read(device / "vendor")[2:], read(device / "device")[2:]
    for place in ("usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids"):
        block = re.search(rf"^{vendor} .*\n((?:[\t#].*\n?)*)", read(root / place), re.MULTILINE)
        if block and (line := re.search(rf"^\t{number}  (.+)$", block[1], re.MULTILINE)):
            return [name.replace(" Graphics", "").strip() for name in line[1].split("[")[-1].rstrip("]").split("/")]
    return []


def _jetson(root: Path, ram: int) -> list[_Seen]:
    """A Jetson names itself in its device tree; several are sold with different memories."""
    model = read(root / "proc/device-tree/model")
    if "jetson" not in model.lower():
        return []
    words = set(re.findall(r"[a-z0-9]+", model.lower()))
    ids = [row["id"] for row in catalog.gpus("NVIDIA") if row["id"].startswith("jetson-")]
    fits = [catalog.gpu(i) for i in ids if {w for w in i.split("-") if not re.fullmatch(r"\d+gb", w)} <= words]
    # The module's own words: "orin nano super 8gb" before "orin nano 8gb", then the smallest that holds this RAM.
    fits = sorted((c for c in fits if c.memory >= ram), key=lambda c: (-len(c.id.split("-")), c.memory))
    return [_Seen(fits[0].id if fits else model, "NVIDIA", None if fits else ram, None)]


def sysctl(name: str) -> str:
    result = run("sysctl", "-n", name)
    return result.stdout.strip() if result and not result.returncode else ""


def _apple(ram: int, available: int) -> list[_Seen]:
    """The graphics of an Apple chip: RAM up to the limit that iogpu.wired_limit_mb sets, else the system's share."""
    chip = sysctl("machdep.cpu.brand_string")
    if not chip.startswith("Apple"):
        return []
    listing = run("ioreg", "-rc", "AGXAccelerator", "-d", "1")
    cores = re.search(r'"gpu-core-count"\s*=\s*(\d+)', listing.stdout if listing else "")
    wired = sysctl("iogpu.wired_limit_mb")
    free = min(available, int(wired) * MIB) if wired.isdigit() and int(wired) else None
    return [_Seen(_apple_id(chip, int(cores[1]) if cores else 0), "Apple", ram, free)]


def _apple_id(chip: str, cores: int) -> str:
    """The catalogue's card for a chip: same name, nearest number of cores; the chip's own name if there is none."""
    stem = chip.lower().replace(" ", "-") + "-"
    known = {int(m[1]): row["id"] for row in catalog.gpus("Apple")
             if (m := re.fullmatch(re.escape(stem) + r"(\d+)c", row["id"]))}
    return known[min(known, key=lambda count: (abs(count - cores), count))] if known else chip
