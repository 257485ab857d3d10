"""This computer, as it is now: cards, RAM, disks, versions, what is free, and what is missing and what that means.

Nothing here imports torch: cards come from `drivers`, versions from the installed packages' metadata. A card that the
catalogue knows carries its facts, with live `memory` and `free`.
"""

import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import socket
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from html import escape
from pathlib import Path

import psutil

from . import calibrated, catalog, drivers, places
from .calibrated import Calibration
from .errors import LabError
from .units import GIB, format_bytes

_ROOT = Path("/")


@dataclass(frozen=True)
class Cpu:
    """The processor. `usable` logical cores are those this process may run on (affinity and container quota)."""

    name: str
    cores: int  # physical
    threads: int  # logical
    usable: int
    features: tuple[str, ...]  # of those that decide how fast quantized matrices are multiplied


@dataclass(frozen=True)
class Disk:
    """Where `path` lies. Bytes. kind: "nvme" | "ssd" | "hdd" | "virtual" | "network" | "memory" | "unknown"."""

    path: str
    total: int
    free: int
    kind: str


@dataclass(frozen=True)
class Machine:
    """One computer at one moment. Bytes."""

    name: str
    system: str
    wsl: bool
    cpu: Cpu
    ram_total: int
    ram_available: int  # what a program can take now without swapping; a container's limit is respected
    ram_limit: int | None  # the container's limit, where it is below the RAM
    swap_total: int
    cards: tuple[catalog.Gpu, ...]
    disks: tuple[Disk, ...]
    versions: dict[str, str] = field(hash=False)
    torch_build: str | None  # "cpu", "cuda 13.0", "rocm 6.4"; None without torch
    missing: tuple[tuple[str, str], ...]  # (name, what it means here)
    calibration: Calibration | None = field(default=None, hash=False)  # what calibrate() measured, here or before
    calibration_note: str | None = None  # why a stored calibration is not this machine's, or cannot be read

    @property
    def facts(self) -> dict:
        """What a calibration belongs to; another card, driver, processor or RAM, and it is another machine's."""
        return calibrated.machine_facts(self.cpu.name, self.cpu.cores, self.cpu.usable, self.ram_limit or self.ram_total,
                                        (card.name for card in self.cards), self.versions.get("NVIDIA driver", ""))

    def calibrate(self, seconds: float = 25.0, progress=None, store: bool = True) -> Calibration:
        """Measures this computer in some 25 seconds, 30 at most: RAM, multiplication by type, copies to cards, cold
        reads of the disk. Stored in llmlab's cache, where `machine()` finds it, and set here as `calibration`.

        progress(done, text) is called with the share done; None shows a bar in a notebook and lines on stderr elsewhere,
        False nothing. Interrupted, nothing changes. Raises LabError where torch is missing or `seconds` is no time.
        """
        try:
            from . import calibration
        except ImportError as error:
            raise LabError(f"calibrating needs {error.name or 'torch'}, which is not installed; pip install torch") from error
        found = calibration.calibrate(self, seconds, progress, store)
        object.__setattr__(self, "calibration", found)  # the one thing that a machine learns while it is looked at
        object.__setattr__(self, "calibration_note", None)
        return found

    @property
    def unified(self) -> bool:
        """A card shares its memory with the CPU."""
        return any(card.unified for card in self.cards)

    @property
    def answer(self) -> str:
        """The machine in one sentence."""
        cards = " and ".join(f"{c.name} ({_free_of(c.free, c.memory)})" for c in self.cards) or "no graphics card"
        ram = _free_of(self.ram_available, self.ram_limit or self.ram_total)
        return f"{cards}; {ram} of RAM; {self.cpu.name}, {_cores(self.cpu)}."

    def to_dict(self) -> dict:
        """Plain values for JSON; what is not known is None."""
        plain = asdict(replace(self, calibration=None))
        return _jsonable(plain | {"calibration": self.calibration and self.calibration.to_dict()})


@dataclass(frozen=True)
class Doctor:
    """What this computer is, what is free now, what is missing and what that means: text, HTML or a dict."""

    machine: Machine
    users: tuple[int, ...] | None  # processes computing on each NVIDIA card now; None where nvidia-smi does not say
    models: tuple[str, ...]  # model files found in the caches of this computer
    stores: str = ""  # of weights laid out anew, in words

    def sections(self) -> list[tuple[str, str]]:
        """The report, a (label, text) a line."""
        m = self.machine
        lines = [("system", m.system + (" (Windows, through WSL)" if m.wsl else "")),
                 ("CPU", ", ".join(filter(None, (m.cpu.name, _cores(m.cpu), " ".join(m.cpu.features))))),
                 ("RAM", _ram(m))]
        lines += [("card", self._card(at, card)) for at, card in enumerate(m.cards)] or [("card", "none found")]
        lines += [("disk", f"{d.path}: {_free_of(d.free, d.total)} ({d.kind})") for d in m.disks]
        build = {"torch": f" ({m.torch_build})" if m.torch_build else ""}
        lines.append(("versions", ", ".join(f"{k} {v}{build.get(k, '')}" for k, v in m.versions.items())))
        lines.append(("models", f"{len(self.models)} found on this computer" if self.models else
                      "none on this computer yet: llmlab fetch smollm2-135m gets a small one (98 MB)"))
        lines += [("stores", self.stores)] * bool(self.stores)
        lines += self._calibrated()
        return lines + [("missing", f"{name}: {meaning}") for name, meaning in m.missing]

    def _calibrated(self) -> list[tuple[str, str]]:
        m, found = self.machine, self.machine.calibration
        how = "llmlab doctor --calibrate, or machine.calibrate(), measures it in half a minute"
        if not found:
            return [("measured", f"{m.calibration_note or 'nothing of this machine yet'}; {how}")]
        lines = [("measured", found.answer)]
        changed = [f"{name} {found.versions[name]}" for name in ("torch", "NVIDIA driver")
                   if name in found.versions and found.versions[name] != m.versions.get(name)]
        if changed:
            lines.append(("measured", f"with {' and '.join(changed)}, not what is here now; {how}"))
        return lines + [("measured", line) for line in found.lines()]

    def _card(self, at: int, card: catalog.Gpu) -> str:
        used = ""
        if self.users and at < len(self.users) and self.users[at]:
            used = f", {self.users[at]} process{'es' * (self.users[at] > 1)} computing on it"
        return f"{card.name}: {_free_of(card.free, card.memory)}{', shared with the CPU' * card.unified}{used}"

    def to_dict(self) -> dict:
        return self.machine.to_dict() | {"card_processes": self.users and list(self.users),
                                         "models": list(self.models), "stores": self.stores}

    def __repr__(self) -> str:
        return "\n".join(f"{label:<9} {text}" for label, text in self.sections())

    def _repr_html_(self) -> str:
        rows = "".join(f'<tr><th style="text-align:left">{escape(label)}</th>'
                       f'<td style="text-align:left">{escape(text)}</td></tr>' for label, text in self.sections())
        return f"<table>{rows}</table>"


def machine() -> Machine:
    """This computer now: a few milliseconds, and nvidia-smi's own time where there is an NVIDIA driver.

    A card that does not answer, a driver that does not fit, a package that is not there: each is a line in `missing`,
    never an error.
    """
    limits = _control_group(_ROOT)
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    limit = limits.memory if limits.memory and limits.memory < memory.total else None
    available = ram_available()
    cards, driver, notes = drivers.cards(_ROOT, memory.total, available)
    versions, build = _versions() | ({"NVIDIA driver": driver} if driver else {}), _torch_build()
    disks = _disks(_ROOT, (places.cache(), Path.cwd(), Path.home()))
    cpu = _cpu(_ROOT, limits.cpus)
    here = Machine(
        name=socket.gethostname(), system=_system(), wsl=_is_wsl(_ROOT), cpu=cpu, ram_total=memory.total,
        ram_available=available, ram_limit=limit, swap_total=swap.total, cards=cards, disks=disks,
        versions=versions, torch_build=build,
        missing=tuple(notes + _lacking(cards, notes, versions, build, disks, cpu)))
    found, note = calibrated.read(here.facts)
    return replace(here, calibration=found, calibration_note=note)


def this_machine() -> Machine:
    """The same, looked at once, and again after it was calibrated."""
    try:
        stored = calibrated.folder().stat().st_mtime_ns
    except OSError:
        stored = 0
    return _machine_since(stored)


@lru_cache(maxsize=1)
def _machine_since(stored: int) -> Machine:
    return machine()


def ram_available() -> int:
    """Bytes a program can take now without swapping; a container's limit is respected."""
    limits, memory = _control_group(_ROOT), psutil.virtual_memory()
    within = limits.memory is not None and 0 < limits.memory < memory.total
    return max(0, min(memory.available, limits.memory - limits.used) if within else memory.available)


def doctor() -> Doctor:
    """The report of `machine()`, with who uses the cards and which model files lie in this computer's caches."""
    from . import sources
    from .offload import kept

    here = machine()
    nvidia = [card for card in here.cards if card.vendor == "NVIDIA"]
    users = drivers.card_users(_ROOT) if nvidia else None
    if users and len(users) != len(nvidia):  # hidden or split cards: whose process it is cannot be said
        users = None
    return Doctor(here, users, tuple(str(found.path) for found in sources.local_models()), kept.told(kept.stores()))


# -- words ----------------------------------------------------------------------------------------------------------


def _free_of(free: int | None, total: int) -> str:
    return f"{format_bytes(total)}" if free is None else f"{format_bytes(free)} free of {format_bytes(total)}"


def _cores(cpu: Cpu) -> str:
    text = f"{cpu.cores} core{'s' * (cpu.cores != 1)}"
    if cpu.threads != cpu.cores:
        text += f", {cpu.threads} threads"
    return text + (f", {cpu.usable} usable here" if cpu.usable < cpu.threads else "")


def _ram(m: Machine) -> str:
    text = _free_of(m.ram_available, m.ram_limit or m.ram_total)
    if m.ram_limit:
        text += f" (a container's limit; the computer has {format_bytes(m.ram_total)})"
    return text + (f", {format_bytes(m.swap_total)} of swap" if m.swap_total else ", no swap")


def _jsonable(value):
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- system, CPU, memory limits -------------------------------------------------------------------------------------


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    release = re.match(r"[\d.]*\d", platform.release())
    return f"{platform.system()} {release[0] if release else platform.release()} {platform.machine()}"


def _is_wsl(root: Path) -> bool:
    return "microsoft" in drivers.read(root / "proc/version").lower()


# /proc/cpuinfo's words -> ours, where they differ
_FEATURES = {"f16c": "f16c", "avx": "avx", "avx2": "avx2", "avx_vnni": "avx_vnni", "avx512f": "avx512f",
             "avx512_vnni": "avx512_vnni", "avx512_bf16": "avx512_bf16", "amx_int8": "amx_int8", "amx_bf16": "amx_bf16",
             "asimd": "neon", "neon": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve"}


_APPLE_FEATURES = {"asimddp": "FEAT_DotProd", "i8mm": "FEAT_I8MM", "bf16": "FEAT_BF16"}


def _cpu(root: Path, quota: float | None) -> Cpu:
    text = drivers.read(root / "proc/cpuinfo")
    fields: dict[str, str] = {}
    for key, value in re.findall(r"^([^:\n]+?)\s*:[ \t]*(.*)$", text, re.MULTILINE):
        fields.setdefault(key, value)
    words = (fields.get("flags") or fields.get("Features") or "").split()
    name = fields.get("model name") or fields.get("Model") or drivers.read(root / "proc/device-tree/model")
    if sys.platform == "darwin":
        name = drivers.sysctl("machdep.cpu.brand_string") or name
        if not words and platform.machine() == "arm64":
            words = ["asimd", *(word for word, said in _APPLE_FEATURES.items()
                                if drivers.sysctl(f"hw.optional.arm.{said}").strip() == "1")]
    threads = psutil.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads
    if quota:
        usable = min(usable, math.ceil(quota))
    return Cpu(name=" ".join(name.split()) or platform.processor() or platform.machine(),
               cores=psutil.cpu_count(logical=False) or threads, threads=threads, usable=max(1, usable),
               features=tuple(dict.fromkeys(ours for theirs, ours in _FEATURES.items() if theirs in words)))


@dataclass(frozen=True)
class _Limits:
    memory: int | None = None
    used: int = 0
    cpus: float | None = None


def _control_group(root: Path) -> _Limits:
    """The tightest memory limit and CPU quota on the way up this process's control groups, v2 or v1.

    `used` is what the limit counts less the page cache that is given back first (inactive_file).
    """
    memory, used, cpus = None, 0, None
    for line in drivers.read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        names = controllers.split(",")
        if controllers and "memory" not in names and "cpu" not in names:
            continue
        mount = root / "sys/fs/cgroup" / controllers
        group = mount / path.strip("/")
        # Inside a container the path is often the host's; the mount itself is then the container's group.
        for place in (group, *(p for p in group.parents if p.is_relative_to(mount))):
            v2, v1 = drivers.integer(place / "memory.max"), drivers.integer(place / "memory.limit_in_bytes")
            limit = v2 or v1
            if limit and (memory is None or limit < memory):
                usage = drivers.integer(place / ("memory.current" if v2 else "memory.usage_in_bytes")) or 0
                caches = re.findall(r"^(?:total_)?inactive_file (\d+)$", drivers.read(place / "memory.stat"), re.M)
                memory, used = limit, max(0, usage - max(map(int, caches), default=0))
            quota, period = (drivers.read(place / "cpu.max").split() + ["", ""])[:2]
            if not quota:
                quota, period = drivers.read(place / "cpu.cfs_quota_us"), drivers.read(place / "cpu.cfs_period_us")
            if quota.isdigit() and period.isdigit() and int(period):
                cpus = min(cpus or math.inf, int(quota) / int(period))
    return _Limits(memory, used, cpus)


# -- disks ----------------------------------------------------------------------------------------------------------

_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "ceph", "glusterfs", "lustre", "fuse.sshfs",
            "afpfs", "webdav"}


def _disks(root: Path, paths: tuple[Path, ...]) -> tuple[Disk, ...]:
    """One a file system, named by the first path that lies on it; a folder not made yet counts as its parent."""
    found: dict[int, Disk] = {}
    for path in paths:
        place = next(p for p in (path, *path.absolute().parents) if p.exists())
        device = place.stat().st_dev
        if device not in found:
            usage = shutil.disk_usage(place)
            found[device] = Disk(str(path), usage.total, usage.free, _disk_kind(root, place.resolve(), device))
    return tuple(found.values())


def _disk_kind(root: Path, place: Path, device: int) -> str:
    if sys.platform == "darwin":
        return "nvme" if platform.machine() == "arm64" else "unknown"  # every Apple-silicon Mac has one
    if not hasattr(os, "major"):
        return "unknown"
    source, kind = _mount(root, place)
    if kind in _NETWORK:
        return "network"
    if kind in ("tmpfs", "ramfs"):
        return "memory"
    block = root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    if not block.exists():  # btrfs and overlays invent device numbers; the mount names the real one
        block = root / "sys/class/block" / Path(source).name
    block = block.resolve()
    for where in (block, block.parent):  # a partition has its queue one folder up
        if spins := drivers.read(where / "queue/rotational"):
            if where.name.startswith(("vd", "xvd")):
                return "virtual"  # says 1 or 0 whatever lies below
            return "nvme" if where.name.startswith("nvme") else "hdd" if spins == "1" else "ssd"
    return "unknown"


def _mount(root: Path, place: Path) -> tuple[str, str]:
    """(source, file system) of the mount that `place` lies on; mountinfo's fields are in proc(5)."""
    best, answer = -1, ("", "")
    for line in drivers.read(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(), right.split()
        if len(fields) < 5 or len(tail) < 2:
            continue
        point = re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), fields[4])
        if len(point) >= best and place.is_relative_to(point):
            best, answer = len(point), (tail[1], tail[0])
    return answer


# -- versions and what is missing -----------------------------------------------------------------------------------

_PACKAGES = ("llmlab", "torch", "transformers", "bitsandbytes", "numpy", "safetensors", "jupyterlab", "ipywidgets",
             "plotly", "anywidget", "nbval", "llama-cpp-python")


def _versions() -> dict[str, str]:
    """Installed versions by package, Python's first; packages that are not there are left out."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions


def _torch_build() -> str | None:
    """What torch was built for, read from its version.py without importing it."""
    found = importlib.util.find_spec("torch")
    if not found or not found.origin:
        return None
    text = drivers.read(Path(found.origin).with_name("version.py"))
    for name, label in (("cuda", "cuda"), ("hip", "rocm"), ("xpu", "xpu")):
        if value := re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)", text, re.MULTILINE):
            return f"{label} {value[1]}"
    return "mps" if sys.platform == "darwin" and platform.machine() == "arm64" else "cpu"


# What a package is for, and so what its absence means.
_MEANING = {
    "torch": "nothing can be run or measured; fits are still predicted",
    "transformers": "models cannot be loaded or measured; fits are still predicted",
    "bitsandbytes": "NF4 and INT8 are predicted, not measured",
    "jupyterlab": "llmlab lab cannot start; the shell and Python work",
    "ipywidgets": "there are no panels; the shell and Python work",
    "plotly": "there are no charts; answers come as words and tables",
    "anywidget": "charts do not stay live in notebooks",
    "nbval": "notebooks cannot be checked",
    "llama-cpp-python": "no live comparison with llama.cpp (pip install 'llmlab[peers]')",
}
# The oldest driver branch that runs programs built for a CUDA release (NVIDIA's CUDA compatibility table).
_CUDA_DRIVER = {11: 450, 12: 525, 13: 580}
_LOW_DISK = 10 * GIB  # two 7B models at four bits


def _lacking(cards, notes, versions: dict, build: str | None, disks, cpu: Cpu) -> list[tuple[str, str]]:
    missing = []
    if not cards and not notes:
        missing.append(("graphics card", "everything here runs on the CPU; fits are predicted for the cards you pick"))
    wanted = {"NVIDIA": "cuda", "AMD": "rocm", "Intel": "xpu"}
    for vendor in dict.fromkeys(card.vendor for card in cards):
        need = wanted.get(vendor)
        if need and build and not build.startswith(need):
            missing.append((f"torch for {vendor}", f"torch is a {build} build but an {vendor} card is there: llmlab "
                            f"predicts for the card and runs on the CPU until a {need} build of torch is installed"))
    cuda, driver = re.match(r"cuda (\d+)", build or ""), versions.get("NVIDIA driver", "").split(".")[0]
    if cuda and driver.isdigit() and int(driver) < _CUDA_DRIVER.get(int(cuda[1]), 0):
        missing.append(("newer NVIDIA driver", f"torch is built for {build}, which needs driver "
                        f"{_CUDA_DRIVER[int(cuda[1])]} or newer; {versions['NVIDIA driver']} is here, so torch "
                        "runs on the CPU"))
    missing += [(name, f"not installed: {meaning}") for name, meaning in _MEANING.items() if name not in versions]
    if platform.machine() in ("x86_64", "AMD64") and cpu.features and "avx2" not in cpu.features:
        missing.append(("AVX2", "this CPU lacks it: quantized models run several times slower on it"))
    missing += [("disk space", f"{d.path} has {format_bytes(d.free)} free; a 7B model takes 4 to 8 GiB")
                for d in disks[:1] if d.free < _LOW_DISK]
    return missing
