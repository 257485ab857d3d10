"""Files that are what their source says: checked by hash, placed whole, and remembered until they change."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from . import places
from .errors import BadFile, LabError
from .units import MIB, format_bytes


def is_verified(path: Path, size: int, digest: str) -> bool:
    """Whether `path` is that very file. Hashes it once; afterwards a stamp answers until the file changes."""
    try:
        now = path.stat()
    except OSError:
        return False
    if now.st_size != size:
        return False
    if recall(path) == _stamp(now, digest):
        return True
    if digest_of(path, digest) != digest:
        return False
    remember(path, digest)
    return True


def _stamp(now: os.stat_result, digest: str) -> list:
    return [digest, now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino]


def stamp_path(path: Path) -> Path:
    return places.cache() / "verified" / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]}.json"


def recall(path: Path) -> list | None:
    with contextlib.suppress(OSError, ValueError):
        stamp = json.loads(stamp_path(path).read_text())
        return stamp if isinstance(stamp, list) and len(stamp) == 5 and isinstance(stamp[0], str) else None
    return None


def remember(path: Path, digest: str) -> None:
    with contextlib.suppress(OSError):      # a cache that cannot be written costs time, not the answer
        stamp = stamp_path(path)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        fresh = stamp.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(_stamp(path.stat(), digest)))
        os.replace(fresh, stamp)


def digest_of(path: Path, like: str) -> str:
    """The hash of a file: sha256, or for the 40 digits of a git blob (the hub's small files) sha1 as git does it."""
    def hasher():
        if len(like) == 40:
            return hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        return hashlib.sha256()

    with path.open("rb") as file:
        return hashlib.file_digest(file, hasher).hexdigest()


def place(part: Path, target: Path, size: int, digest: str, what: str) -> Path:
    """Give the complete file `part` the name `target` if size and hash are right, else delete it. Raises BadFile."""
    if part.stat().st_size != size or digest_of(part, digest) != digest:
        part.unlink()
        raise BadFile(f"{what} came, and it is not the file that was expected (size or hash differ); nothing was kept; "
                      "fetch again")
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    remember(target, digest)
    return target


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process at a time brings `target`; the others wait and then find it there."""
    import filelock
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=1)
    except filelock.Timeout:
        print(f"another process is fetching {target.name}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def require_room(folder: Path, need: int) -> None:
    need += 64 * MIB
    free = shutil.disk_usage(folder).free
    if free < need:
        raise LabError(f"{folder} has {format_bytes(free)} free and the download needs {format_bytes(need)}; free "
                       "some, or set LLMLAB_CACHE to a folder on a bigger disk")
