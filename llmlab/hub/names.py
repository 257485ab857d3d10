"""What a person writes for a model on the hub, and which GGUF of a repository it means."""

import difflib
import re
from typing import NamedTuple

from ..errors import UnknownName
from .client import check_repo
from .listing import HubFile, is_safe_path


class HubName(NamedTuple):
    """What a person writes for a model on the hub: `owner/repo`, `owner/repo:Q4_K_M` or `owner/repo/file.gguf`."""

    repo: str
    quant: str = ""
    file: str = ""

    def __str__(self) -> str:
        return self.repo + (f":{self.quant}" if self.quant else "") + (f"/{self.file}" if self.file else "")


def parse_name(text: str) -> HubName:
    """Reads a hub name; the address of a model's page, as copied from a browser, will do. Raises UnknownName."""
    name = re.sub(r"^(https?://)?(www\.)?(huggingface\.co|hf\.co)/", "", text.strip()).strip("/")
    name = re.sub(r"^([^/]+/[^/]+)/(?:blob|resolve|tree)/[^/]+/?", r"\1/", name).split("?")[0].rstrip("/")
    repo, quant, file = re.fullmatch(r"([^/:]*/?[^/:]*)(?::([\w.-]+))?/?(.*)", name, re.DOTALL).groups()
    if (quant and file) or (file and not is_safe_path(file)) or "/" not in repo:
        raise UnknownName(f"{text[:120]!r} is not a hub name; write 'owner/repo', 'owner/repo:Q4_K_M' "
                          "or 'owner/repo/file.gguf'")
    return HubName(check_repo(repo), quant or "", file or "")


def gguf_sets(files: list[HubFile]) -> dict[str, list[HubFile]]:
    """{name without .gguf and shard number: its files in order}: models only, no projectors, no importance matrices."""
    sets: dict[str, list[HubFile]] = {}
    for file in sorted(files):
        name = file.path.rsplit("/", 1)[-1].lower()
        if name.endswith(".gguf") and not re.search(r"mmproj|imatrix", name):
            sets.setdefault(re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", file.path, flags=re.IGNORECASE), []).append(file)
    return sets


def pick_gguf(name: HubName, files: list[HubFile]) -> list[HubFile]:
    """The files of the GGUF that `name` means; [] where the repository has none. Raises UnknownName with choices."""
    sets = gguf_sets(files)
    if name.file:
        for group in sets.values():
            if any(file.path == name.file for file in group):
                return group
        found = [file for file in files if file.path == name.file]
        if not found:
            near = difflib.get_close_matches(name.file, [file.path for file in files], 3, 0)
            raise UnknownName(f"{name.repo} has no file {name.file}; nearest: {', '.join(near) or 'it is empty'}")
        return found
    matches = _matches(name.quant, sets) if name.quant else list(sets)
    if len(matches) == 1:
        return sets[matches[0]]
    if not sets and not name.quant:
        return []
    labels = sorted({_label(key, sets) for key in (matches or sets)})
    problem = f"has several GGUFs for {name}" if matches else f"has no GGUF {name.quant}"
    more = f" and {len(labels) - 30} more" if len(labels) > 30 else ""
    raise UnknownName(f"{name.repo} {problem}; choose one: {', '.join(labels[:30]) or 'none there'}{more}")


def _matches(quant: str, sets: dict) -> list[str]:
    wanted = re.compile(rf"(^|[-._/]){re.escape(quant)}($|[-./])", re.IGNORECASE)
    found = [key for key in sets if wanted.search(key)]
    # Q4_K_M is also found in UD-Q4_K_M and in i1-Q4_K_M: the plain one is meant.
    return [key for key in found if len(key) == min(map(len, found))]


def _label(key: str, sets: dict) -> str:
    """How to ask for one set: `:Q4_K_M` where that says it, else its file."""
    quant = re.search(r"[-._/]((?:UD-|i1-)?(?:I?Q\d\w*|TQ\d_\d|MXFP4\w*|BF16|F16|F32))$", key, re.IGNORECASE)
    return f":{quant[1]}" if quant and _matches(quant[1], sets) == [key] else f"/{sets[key][0].path}"
