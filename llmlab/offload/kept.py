"""Stores that lie in llmlab's cache: which GGUF each was written of, and whether that is still there.

A store whose GGUF is gone will never be used again. It is removed only where somebody says so: the GGUF may be on a disk that
is not mounted just now, and writing the store again takes its time.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadFile, LabError, UnknownName
from ..gguf.words import show, show_path
from ..units import format_bytes
from .store import folder_of, read_index

STATES = {"used": "its GGUF is here", "changed": "its GGUF was written to since; the store will be written again",
          "gone": "its GGUF was removed", "away": "the folder of its GGUF is not there now, or on another disk",
          "unknown": "of an older llmlab, which did not say of which GGUF", "damaged": "it is not whole"}
USELESS = ("gone",)          # which `llmlab stores --remove gone` removes


@dataclass(frozen=True)
class Kept:
    """A store: its file, bytes of it, the (first) file it was written of ("" where that is not known), and one of STATES."""

    path: Path
    bytes: int
    source: str
    state: str


def stores(folder: str | os.PathLike | None = None) -> list[Kept]:
    """All in a folder, or in llmlab's cache, the largest first."""
    found = []
    for path in folder_of(folder).glob("*.store"):
        try:
            size = path.stat().st_size
        except OSError:         # removed meanwhile
            continue
        found.append(Kept(path, size, *_state(path)))
    return sorted(found, key=lambda one: (-one.bytes, one.path))


def _state(path: Path) -> tuple[str, str]:
    """The source of a store, and its state."""
    try:
        index = read_index(path)[1]
    except (BadFile, OSError, ValueError):
        return "", "damaged"
    if not (sources := index.get("sources")):
        return "", "unknown"
    found = {_looked(source, origin) for source, origin in zip(sources, index["origin"], strict=True)}
    return sources[0]["path"], next(state for state in ("away", "gone", "changed", "used") if state in found)


def _looked(source: dict, origin: dict) -> str:
    try:
        now = os.stat(source["path"])
        return "used" if (now.st_size, now.st_mtime_ns) == (origin["bytes"], origin["changed_ns"]) else "changed"
    except OSError:
        pass
    try:        # an empty mount point is a folder too, of another disk
        return "gone" if os.stat(os.path.dirname(source["path"])).st_dev == source["disk"] else "away"
    except OSError:
        return "away"


def remove(which: str | Iterable[Kept], folder: str | os.PathLike | None = None) -> list[Kept]:
    """Remove stores: "gone" for those that are of no use any more, a store's file name, or some of `stores()`. Those that were
    removed. Raises UnknownName where there is none of that name, LabError where one cannot be removed."""
    if isinstance(which, str):
        there = stores(folder)
        asked = [one for one in there if one.state in USELESS] if which == "gone" else [
            one for one in there if which in (one.path.name, str(one.path))]
        if which != "gone" and not asked:
            raise UnknownName(f"there is no store {show(which)}; llmlab stores lists them")
    else:
        asked = list(which)
    for one in asked:
        try:
            one.path.unlink(missing_ok=True)
        except OSError as error:
            raise LabError(f"{show_path(str(one.path))} cannot be removed ({error.strerror or error}); close what uses "
                           "it") from None
    return asked


def told(found: list[Kept]) -> str:
    """In a line for `llmlab doctor`; "" where there are none."""
    if not found:
        return ""
    text = f"{len(found)} of weights laid out anew, {format_bytes(sum(one.bytes for one in found))}"
    for states, says in ((USELESS, "of no use any more, as the GGUF is gone: llmlab stores --remove gone frees {}"),
                         (("away", "unknown", "damaged"), "not whole, or of a GGUF that is not known or not found now, {}: "
                          "llmlab stores lists them")):
        some = [one for one in found if one.state in states]
        if some:
            text += f"; {len(some)} {says.format(format_bytes(sum(one.bytes for one in some)))}"
    return text
