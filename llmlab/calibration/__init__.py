"""Measures this machine once, in under half a minute, and stores what it found: RAM, multiplication by type, cards, disk.

Each part has a share of the time and stops when it is spent; what a part leaves, the next ones have; what was not
reached is said in `skipped`. An interrupted run stores nothing, so the calibration before it stays.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from .. import calibrated
from ..calibrated import Calibration, Figure
from ..errors import LabError
from . import disk

if TYPE_CHECKING:
    from ..hardware import Machine

SECONDS = 25.0
LEAST_SECONDS = 1.0
_SHARES = {"ram": 1.0, "multiply": 2.5, "cards": 5.0, "disk": 2.5}  # of what time is left when each begins
_CARD = (sys.executable, "-m", "llmlab.calibration.card")
_KEPT = ("llmlab", "python", "torch", "numpy", "NVIDIA driver")  # versions that the rates may depend on
_START = 3.0  # seconds that torch takes to come up in a process of its own
_GRACE = 10.0  # seconds that a card's process may take past its share: a driver may take long to wake


def calibrate(machine: "Machine", seconds: float = SECONDS, progress: Callable[[float, str], None] | bool | None = None,
              store: bool = True) -> Calibration:
    """Measures `machine`, which must be this computer, in about `seconds` (at least 1; at most some 5 more).

    progress(done, text) is called with the share done; None shows a bar in a notebook and lines on stderr elsewhere,
    False nothing. Where another process is calibrating this machine, waits for it and takes what it stored.
    Raises LabError for a time that is no time.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not LEAST_SECONDS <= seconds <= 3600:
        raise LabError(f"seconds is {str(seconds)[:40]}; give a number from {LEAST_SECONDS:.0f} to 3600; usual: {SECONDS:.0f}")
    facts = machine.facts
    with _shown(progress) as say:
        if not store:
            return _measure(machine, facts, float(seconds), say)
        before = calibrated.read(facts)[0]
        with _alone(say) as waited:
            if waited and (fresh := calibrated.read(facts)[0]) and fresh != before:  # else the other one was stopped
                say(1.0, "another process has just calibrated this machine")
                return fresh
            found = _measure(machine, facts, float(seconds), say)
            try:
                calibrated.store(found)
            except OSError as error:
                say(1.0, f"not stored: {calibrated.folder()}: {error.strerror or error}; set LLMLAB_CACHE to a folder that "
                         "can be written")
            return found


def _measure(machine: "Machine", facts: dict, seconds: float, say) -> Calibration:
    began, load, others = time.perf_counter(), _load(), _Others()
    end = began + seconds
    say(0.0, "starting torch")
    parts = _parts(machine)
    figures: list[Figure] = []
    skipped: list[tuple[str, str]] = []
    whole = left = sum(_SHARES[name] for name in parts)
    for name, part in parts.items():
        share = max((end - time.perf_counter()) * _SHARES[name] / left, seconds / 20)  # late, a part is short but not left out
        before, left = whole - left, left - _SHARES[name]

        def report(done: float, text: str, before=before, mine=_SHARES[name]):
            say((before + min(1.0, done) * mine) / whole, text)

        found, missed = part(share, report)
        figures, skipped = figures + found, skipped + missed
    took = time.perf_counter() - began
    busy = others.mean()
    say(1.0, f"done in {took:.0f} s")
    return Calibration(
        machine_id=calibrated.machine_id(facts), date=datetime.now().astimezone().isoformat(timespec="seconds"),
        seconds=round(took, 2), versions={name: machine.versions[name] for name in _KEPT if name in machine.versions},
        facts=facts, cores=machine.cpu.threads, load=load, others=busy, figures=tuple(figures), skipped=tuple(skipped))


def _parts(machine: "Machine") -> dict[str, Callable]:
    """Each part as part(seconds, say) -> (figures, skipped), in the order they are measured."""
    import torch

    from . import rates
    usable, room = machine.cpu.usable, min(machine.ram_available, psutil.virtual_memory().available)

    def quiet(call, *given):
        """Without gradients, and without moving the caller's random numbers."""
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            return call(*given)

    threads = tuple(sorted({1, min(machine.cpu.cores, usable), usable}))
    parts: dict[str, Callable] = {
        "ram": lambda seconds, say: quiet(rates.ram, threads, room, seconds, say),
        "multiply": lambda seconds, say: quiet(rates.multiply, "cpu", "cpu", rates.TYPES, usable, room, seconds, say)}
    if machine.cards:
        parts["cards"] = lambda seconds, say: _cards(machine, seconds, say)
    home = machine.disks[0]
    parts["disk"] = lambda seconds, say: disk.measure(Path(home.path), home.kind, seconds, say)
    return parts


# -- cards, in a process of their own ----------------------------------------------------------------------------------


def _cards(machine: "Machine", seconds: float, say) -> tuple[list[Figure], list[tuple[str, str]]]:
    build = machine.torch_build or "cpu"
    vendor = {"cuda": "NVIDIA", "rocm": "AMD"}.get(build.split()[0])
    own = [index for index, card in enumerate(machine.cards) if card.vendor == vendor]
    skipped = [("cards", f"this torch ({build}) cannot compute on {card.name}, so it was not measured")
               for index, card in enumerate(machine.cards) if index not in own]
    if not own:
        return [], skipped
    # PCI_BUS_ID: torch counts the cards as nvidia-smi does. The package may be on no path but this process's own.
    top = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                        "PYTHONPATH": os.pathsep.join(filter(None, (top, os.environ.get("PYTHONPATH"))))}
    said = _run([*_CARD, f"{max(2.0, seconds - _START):.2f}"], env, seconds + _GRACE, say)
    if isinstance(said, str):
        return [], [*skipped, ("cards", said)]
    if said["cards"] != len(own):
        skipped.append(("cards", f"torch sees {said['cards']} of the {len(own)} {vendor} cards here"))
    return _renamed([Figure(**each) for each in said["figures"]], own), [*skipped, *map(tuple, said["skipped"])]


def _renamed(figures: list[Figure], own: list[int]) -> list[Figure]:
    """torch's numbers of cards as those of `Machine.cards`; figures of no card there, and of no number, are left out."""
    names = {f"gpu{at}": f"gpu{index}" for at, index in enumerate(own)}
    found = []
    for f in figures:
        kind, between, other = f.name.partition("p2p_")
        if f.device in names and (not between or other in names) and all(map(math.isfinite, f.rate)):
            found.append(replace(f, device=names[f.device], name=kind + between + (names[other] if between else other)))
    return found


def _run(command: list[str], env: dict, seconds: float, say) -> dict | str:
    """The last result that the command prints, as a dict, with why it is the last one in its "skipped" if it ended early;
    without any result, why. Its steps go to `say`."""
    try:
        child = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 text=True, errors="replace")
    except OSError as error:
        return f"no process could be started for them ({error.strerror or error})"
    late, words, result = threading.Event(), [], None

    def stop():
        late.set()
        child.kill()

    alarm = threading.Timer(seconds, stop)
    listener = threading.Thread(target=lambda: words.extend(child.stderr.readlines()[-20:]), daemon=True)
    alarm.start()
    listener.start()
    try:
        for line in child.stdout:
            value = _object(line)
            if "done" in value:
                say(value["done"], value["text"])
            elif {"figures", "skipped", "cards"} <= value.keys():
                result = value
        code = child.wait()
    finally:
        alarm.cancel()
        child.kill()
        child.wait()
        listener.join()
        child.stdout.close()
        child.stderr.close()
    why = next((line.strip()[:200] for line in reversed(words) if line.strip()), f"code {code}")
    why = f"they did not end in {seconds:.0f} s" if late.is_set() else f"their process ended early: {why}"
    if result is None:
        return why
    return result if code == 0 else result | {"skipped": [*result["skipped"], ("cards", why)]}


def _object(line: str) -> dict:
    with contextlib.suppress(ValueError):
        value = json.loads(line)
        if isinstance(value, dict):
            return value
    return {}


# -- conditions --------------------------------------------------------------------------------------------------------


def _load() -> float | None:
    """Processes that wanted to run, mean of the last minute; None on Windows, which keeps no such mean."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


class _Others:
    """How many cores other processes keep busy from now on: the CPU time of all less our own and our children's."""

    def __init__(self):
        self._began, self._start = time.perf_counter(), self._seconds()

    @staticmethod
    def _seconds() -> float:
        all_, mine = psutil.cpu_times(), os.times()
        busy = all_.user + all_.system + sum(getattr(all_, name, 0.0) for name in ("nice", "irq", "softirq", "steal"))
        return busy - (mine.user + mine.system + mine.children_user + mine.children_system)

    def mean(self) -> float:
        return round(max(0.0, (self._seconds() - self._start) / max(1e-3, time.perf_counter() - self._began)), 2)


@contextlib.contextmanager
def _alone(say):
    """One process at a time measures and stores; gives True where another one was at it. Never fails for the lock."""
    import filelock
    waited, lock = False, None
    try:
        calibrated.folder().mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(calibrated.folder() / ".lock")
        try:
            lock.acquire(timeout=0.2)
        except filelock.Timeout:
            waited = True
            say(0.0, "another process is calibrating this machine; waiting for it")
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(timeout=120)
    except (OSError, NotImplementedError):
        lock = None  # a folder that cannot be written, a file system without locks
    try:
        yield waited
    finally:
        if lock:
            lock.release()


# -- progress ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _shown(progress):
    """The callable that shows progress; what it is made of is closed afterwards."""
    if progress is False:
        yield lambda done, text: None
    elif callable(progress):
        yield progress
    elif bar := _notebook_bar():
        def say(done: float, text: str):
            bar.n = round(100 * done)
            bar.set_description_str(text, refresh=True)

        try:
            yield say
        finally:
            bar.close()
    else:
        yield _lines()


def _notebook_bar():
    """tqdm's bar where this runs in a notebook's kernel and tqdm is there; None elsewhere."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if not hasattr(shell, "kernel"):  # a terminal's IPython has none
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}")


def _lines():
    """A line on stderr for each tenth done and each new part."""
    shown = [-1, ""]

    def say(done: float, text: str):
        step, part = int(done * 10), text.partition(":")[0]
        if [step, part] != shown:
            shown[:] = [step, part]
            print(f"calibrating {done:4.0%}  {text}", file=sys.stderr, flush=True)

    return say


__all__ = ["Calibration", "calibrate"]
