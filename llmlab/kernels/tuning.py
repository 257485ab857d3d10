"""Tuning: what was measured to be quicker here, remembered on disk, so that the next process need not measure again.

A choice belongs to what it was measured on: the processor, its instructions, the threads and torch, or the card, its driver's
CUDA and torch. One file for each of those, in llmlab's cache; a damaged one, or one of something else, counts for nothing and
is written anew. `LLMLAB_TUNING=off` neither reads nor writes files; `forget()` deletes them.
"""

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from threading import RLock

import torch

from .. import hardware, places

VERSION = 1         # another one where a measurement changes what it measures
_known: dict[tuple, int] = {}
_lock = RLock()     # one measurement at a time: two would slow each other; a measurement may ask for another


def remembered(measure: Callable[..., int]) -> Callable[..., int]:
    """A function that measures a whole number, or yes or no, of what its arguments say (numbers, dtypes, devices): its
    answers are kept for this process and, by machine and arguments, on disk. `__wrapped__` measures."""
    kind = measure.__annotations__["return"]

    @wraps(measure)
    def answer(*args):
        device = _device(args)
        key = (device, torch.get_num_threads(), measure, *(arg for arg in args if not isinstance(arg, torch.device)))
        found = _known.get(key)
        if found is None:
            with _lock:
                name = ", ".join([f"{measure.__module__.rpartition('.')[2]}.{measure.__qualname__}", *map(_word, args)])
                found = _known.get(key)
                if found is None:
                    found = _read(device).get(name)
                if type(found) is not kind:
                    found = measure(*args)
                    _write(device, name, found)
                _known[key] = found
        return found

    return answer


def forget() -> None:
    """Deletes what is remembered, on disk and in this process: everything is measured again when it is next needed."""
    _known.clear()
    with contextlib.suppress(OSError):
        for path in folder().iterdir():
            path.unlink()


def folder() -> Path:
    return places.cache() / "tuning"


def facts(device: torch.device) -> dict:
    """What a choice belongs to; with anything else of it, it is measured again."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return {"card": card.name, "capability": f"{card.major}.{card.minor}", "units": card.multi_processor_count,
                "cuda": torch.version.cuda or torch.version.hip, "torch": torch.__version__}
    return {"processor": _processor(), "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(), "torch": torch.__version__}


@cache
def _processor() -> str:
    return hardware.machine().cpu.name


def _device(args: tuple) -> torch.device:
    device = next((arg for arg in args if isinstance(arg, torch.device)), torch.device("cpu"))
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _word(value) -> str:
    return value.type if isinstance(value, torch.device) else str(value).removeprefix("torch.")


def _off() -> bool:
    return os.environ.get("LLMLAB_TUNING", "").lower() in ("off", "0", "no", "false")


def _path(about: dict) -> Path:
    return folder() / f"{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}.json"


def _read(device: torch.device) -> dict[str, int]:
    """The choices on disk; none where the file is missing, damaged, of another version or of something else."""
    if _off():
        return {}
    about = facts(device)
    try:
        held = json.loads(_path(about).read_text(encoding="utf-8"))
        good = held["version"] == VERSION and held["facts"] == about and isinstance(held["choices"], dict)
        return held["choices"] if good else {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _write(device: torch.device, name: str, value: int) -> None:
    """Adds one choice to what is there; whole or not at all, and where the cache cannot be written to, not at all."""
    if _off():
        return
    about = facts(device)
    target = _path(about)
    part = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        choices = _read(device) | {name: value}
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(json.dumps({"version": VERSION, "facts": about, "choices": choices}, indent=1) + "\n",
                            encoding="utf-8")
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
