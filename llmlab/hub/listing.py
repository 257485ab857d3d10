"""What a repository holds: its files with sizes and hashes, and what its JSON files say."""

import json
import re
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin

from ..errors import BadFile, Unreachable
from ..units import MIB
from .client import DIGEST, Client, check_repo, endpoint, file_url, origin

JSON_LIMIT = 16 * MIB
PAGES = 200


class HubFile(NamedTuple):
    """A file of a repository. `digest` is what its bytes hash to: sha256 (64 digits) for large files, which the hub
    keeps in LFS, git's blob sha1 (40 digits) for small ones, "" where the server does not say."""

    path: str
    size: int
    digest: str


def is_safe_path(path: str) -> bool:
    """Whether a name that a repository lists stays inside its folder, on any system."""
    return (len(path) <= 1024 and not re.search(r'[\\:\x00-\x1f*?"<>|]', path)
            and not any(part in ("", ".", "..") for part in path.split("/")))


def list_files(repo: str, revision: str = "main", client: Client | None = None) -> list[tuple[str, int]]:
    """(path, bytes) of every file in a repository. Raises UnknownName, Unreachable, BadFile."""
    return [(file.path, file.size) for file in tree(repo, revision, client)]


def tree(repo: str, revision: str = "main", client: Client | None = None) -> list[HubFile]:
    """Every file in a repository with its size and hash. Raises UnknownName, Unreachable, BadFile."""
    client = client or Client()
    url = f"{endpoint()}/api/models/{check_repo(repo)}/tree/{quote(revision, safe='')}?recursive=true"
    files: list[HubFile] = []
    for _ in range(PAGES):
        answer = client.open(url, repo)
        page, following = parse_json(answer.read(JSON_LIMIT), f"{repo}'s file list"), answer.headers.get("Link", "")
        if not isinstance(page, list):
            raise BadFile(f"{repo}'s file list is not a list; is {endpoint()} a Hugging Face hub?")
        for entry in page:
            if isinstance(entry, dict) and entry.get("type") == "file" and (file := _hub_file(entry, repo)):
                files.append(file)
        link = re.search(r'<([^<>]+)>\s*;\s*rel="?next"?', following)
        if not link:
            return files
        url = urljoin(url, link[1])
        if origin(url) != origin(endpoint()):
            raise Unreachable(f"{repo}'s file list goes on at another host; that is not followed")
    raise Unreachable(f"{repo}'s file list has more than {PAGES} pages; give a file: '{repo}/name.gguf'")


def _hub_file(entry: dict, repo: str) -> HubFile | None:
    lfs = entry.get("lfs") if isinstance(entry.get("lfs"), dict) else {}
    size, path = lfs.get("size", entry.get("size")), entry.get("path")
    digest = str(lfs.get("oid") or entry.get("oid") or "").removeprefix("sha256:").lower()
    if not isinstance(path, str) or type(size) is not int or not 0 <= size < 2**50:
        raise BadFile(f"{repo}'s file list has an entry without a name or a size ({str(entry)[:80]})")
    if not is_safe_path(path):
        return None
    return HubFile(path, size, digest if DIGEST.fullmatch(digest) else "")


def read_json(repo: str, file: str = "config.json", revision: str = "main", client: Client | None = None) -> Any:
    """What the JSON file says. Raises UnknownName (no such file), Unreachable, BadFile."""
    what = f"{repo}/{file}"
    return parse_json((client or Client()).open(file_url(repo, file, revision), what).read(JSON_LIMIT), what)


def parse_json(data: bytes, what: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{what} is not JSON ({type(error).__name__})") from None
