"""A Hugging Face style hub, read by range requests: a model's shape from a few hundred kilobytes, nothing downloaded.

Everything is bounded, because a server may be broken or hostile: each wait, each answer's size, the pace of a slow
answer, the number of redirects and pages. The token goes to the hub itself and to no host it redirects to.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HOME` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub.
"""

import contextlib
import difflib
import functools
import http.client
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from .errors import BadFile, UnknownName, Unreachable
from .units import KIB, MIB, format_bytes

if TYPE_CHECKING:
    from .gguf import GGUFFile

PUBLIC_HUB = "https://huggingface.co"
WAIT = 10.0             # seconds for a connection, and for the next byte of an answer
PATIENCE = 30.0         # seconds an answer may fall behind PACE (its headers too) before it is given up
PACE = 16 * KIB         # bytes/s: slower than this for PATIENCE seconds is a drip, not a download
PAUSE = 0.5             # seconds before the first retry
RETRIES = 2
REDIRECTS = 5
JSON_LIMIT = 16 * MIB
HEADER_LIMIT = 100 * 10**6      # bytes of a safetensors header, the limit of the safetensors library itself
PAGES = 200
SHARDS = 1000

_FIRST_BLOCK, _BLOCK, _KEPT_LIMIT, _READ_LIMIT = 256 * KIB, MIB, 64 * MIB, 256 * MIB
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_NETWORKLESS = "without a network, give a GGUF file, a folder with a config.json, or a name from llmlab.models()"


class HubFile(NamedTuple):
    """A file of a repository. `digest` is what its bytes hash to: sha256 (64 digits) for large files, which the hub
    keeps in LFS, git's blob sha1 (40 digits) for small ones, "" where the server does not say."""

    path: str
    size: int
    digest: str


def endpoint() -> str:
    """The hub's address, without a slash at its end: `HF_ENDPOINT`, else the public hub. Raises Unreachable."""
    address = (os.environ.get("HF_ENDPOINT") or PUBLIC_HUB).strip().rstrip("/")
    if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", address) or _origin(address) is None:
        raise Unreachable(f"HF_ENDPOINT is {address[:80]!r}, not an address like {PUBLIC_HUB}; correct it or unset it")
    return address


def token() -> str | None:
    """The user's access token: `HF_TOKEN`, else the file that `hf auth login` writes, else None."""
    if given := (os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or "").strip():
        return given
    if _true("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return None
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token").read_text()[:4096].strip() or None
    return None


def check_repo(repo: str) -> str:
    """`repo` if it can be a repository's name (`owner/name`). Raises UnknownName."""
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or len(repo) > 200:
        raise UnknownName(f"{repo[:120]!r} is not a hub name; it looks like 'owner/repo'")
    return repo


def is_safe_path(path: str) -> bool:
    """Whether a name that a repository lists stays inside its folder, on any system."""
    return (len(path) <= 1024 and not re.search(r'[\\:\x00-\x1f*?"<>|]', path)
            and not any(part in ("", ".", "..") for part in path.split("/")))


def file_url(repo: str, file: str, revision: str = "main") -> str:
    """Where the bytes of `file` are."""
    return f"{endpoint()}/{check_repo(repo)}/resolve/{quote(revision, safe='')}/{quote(file)}"


def list_files(repo: str, revision: str = "main", client: "Client | None" = None) -> list[tuple[str, int]]:
    """(path, bytes) of every file in a repository. Raises UnknownName, Unreachable, BadFile."""
    return [(file.path, file.size) for file in tree(repo, revision, client)]


def tree(repo: str, revision: str = "main", client: "Client | None" = None) -> list[HubFile]:
    """Every file in a repository with its size and hash. Raises UnknownName, Unreachable, BadFile."""
    client = client or Client()
    url = f"{endpoint()}/api/models/{check_repo(repo)}/tree/{quote(revision, safe='')}?recursive=true"
    files: list[HubFile] = []
    for _ in range(PAGES):
        answer = client.open(url, repo)
        page, following = _parse_json(answer.read(JSON_LIMIT), f"{repo}'s file list"), answer.headers.get("Link", "")
        if not isinstance(page, list):
            raise BadFile(f"{repo}'s file list is not a list; is {endpoint()} a Hugging Face hub?")
        for entry in page:
            if isinstance(entry, dict) and entry.get("type") == "file" and (file := _hub_file(entry, repo)):
                files.append(file)
        link = re.search(r'<([^<>]+)>\s*;\s*rel="?next"?', following)
        if not link:
            return files
        url = urljoin(url, link[1])
        if _origin(url) != _origin(endpoint()):
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
    return HubFile(path, size, digest if _DIGEST.fullmatch(digest) else "")


def read_json(repo: str, file: str = "config.json", revision: str = "main", client: "Client | None" = None) -> Any:
    """What the JSON file says. Raises UnknownName (no such file), Unreachable, BadFile."""
    what = f"{repo}/{file}"
    return _parse_json((client or Client()).open(file_url(repo, file, revision), what).read(JSON_LIMIT), what)


def _parse_json(data: bytes, what: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{what} is not JSON ({type(error).__name__})") from None


def open_gguf(repo: str, file: str, revision: str = "main") -> "GGUFFile":
    """The header of a GGUF file on the hub (of a sharded set, given its first file: all headers), by range requests.

    Raises UnknownName, Unreachable, BadFile.
    """
    from .gguf import join_shards, read_header, shard_names

    client = Client()
    try:
        first = read_header(RangeReader(repo, file, revision, client))
        if first.shards > SHARDS:
            raise BadFile(f"{repo}/{file} claims to be one of {first.shards} files; more than {SHARDS} are not read")
        if first.shards == 1:
            return first
        folder, _, name = file.rpartition("/")
        others = [f"{folder}/{other}".lstrip("/") for other in shard_names(name, first.shards)[1:]]
        return join_shards([first, *(read_header(RangeReader(repo, other, revision, client)) for other in others)])
    finally:
        client.close()


def safetensors_headers(repo: str, revision: str = "main") -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor name: (dtype as safetensors writes it, shape)} of a repository, of all its shards.

    Reads each file's header by range: 8 bytes of length (little endian), then JSON (the safetensors format).
    Raises UnknownName, Unreachable, BadFile.
    """
    client = Client()
    try:
        with contextlib.closing(RangeReader(repo, "model.safetensors", revision, client)) as reader:
            return _safetensors_header(reader)
    except UnknownName:
        index = read_json(repo, "model.safetensors.index.json", revision, client)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(v, str) and is_safe_path(v) for v in weights.values()):
        raise BadFile(f"{repo}/model.safetensors.index.json has no weight_map of file names")
    names = sorted(set(weights.values()))
    if len(names) > SHARDS:
        raise BadFile(f"{repo} claims {len(names)} safetensors shards; more than {SHARDS} are not read")
    from concurrent.futures import ThreadPoolExecutor

    def headers(mine: list[str]) -> dict:
        own, found = Client(), {}
        for name in mine:
            with contextlib.closing(RangeReader(repo, name, revision, own)) as reader:
                found |= _safetensors_header(reader)
        return found

    lanes = min(8, len(names)) or 1     # one keep-alive client a lane: an answer is one redirect and one read
    with ThreadPoolExecutor(lanes) as pool:
        merged: dict[str, tuple[str, tuple[int, ...]]] = {}
        for found in pool.map(headers, [names[lane::lanes] for lane in range(lanes)]):
            merged |= found
    return merged


def _safetensors_header(reader: "RangeReader") -> dict[str, tuple[str, tuple[int, ...]]]:
    length = int.from_bytes(reader.read(0, 8), "little")
    if length > min(HEADER_LIMIT, reader.size - 8):
        raise BadFile(f"{reader.name} claims a header of {length} bytes; it is not a safetensors file")
    header = _parse_json(reader.read(8, length), f"the header of {reader.name}")
    if not isinstance(header, dict):
        raise BadFile(f"the header of {reader.name} is not a table")
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        if not isinstance(dtype, str) or not isinstance(shape, list) or len(shape) > 8 or not all(
                type(n) is int and 0 <= n < 2**48 for n in shape):
            raise BadFile(f"{reader.name}: tensor {name[:60]!r} has no dtype or no shape")
        found[name] = (dtype, tuple(shape))
    return found


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


class RangeReader:
    """A remote file read in pieces: `.name`, `.size`, `.read(offset, length)`; counts `.bytes_read` and `.requests`.

    The first 256 KiB come at once, later pieces in blocks of 1 MiB or what is asked for, and the blocks are kept (64
    MiB of them): no byte is fetched twice. Raises UnknownName, Unreachable, BadFile.
    """

    def __init__(self, repo: str, file: str, revision: str = "main", client: "Client | None" = None):
        self.name, self.size = f"{repo}/{file}", 0
        self._origin = self._url = file_url(repo, file, revision)
        self._client, self._own = client or Client(), client is None
        self._counts = self._client.requests, self._client.bytes_read
        self._blocks: list[tuple[int, bytes]] = []
        self._lock = threading.Lock()
        self._fetch(0, 1)

    @property
    def requests(self) -> int:
        return self._client.requests - self._counts[0]

    @property
    def bytes_read(self) -> int:
        return self._client.bytes_read - self._counts[1]

    def close(self) -> None:
        self._blocks.clear()
        if self._own:
            self._client.close()

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`. Raises BadFile where the file ends before, and Unreachable."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise BadFile(f"{self.name} ends at byte {self.size}, but bytes {offset} to {offset + length} are needed; "
                          "it is truncated or damaged")
        if length > _READ_LIMIT:
            raise BadFile(f"{self.name}: {format_bytes(length)} in one piece is more than a header holds")
        with self._lock:
            pieces, end = [], offset + length
            while offset < end:
                start, block = self._find(offset) or self._fetch(offset, end - offset)
                piece = block[offset - start:end - start]
                pieces.append(piece)
                offset += len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _find(self, offset: int) -> tuple[int, bytes] | None:
        for start, block in reversed(self._blocks):
            if start <= offset < start + len(block):
                return start, block
        return None

    def _fetch(self, offset: int, least: int) -> tuple[int, bytes]:
        stop = min(offset + max(_BLOCK, least), self.size) if self._blocks else _FIRST_BLOCK
        for start, _ in self._blocks:               # never the same byte twice
            if offset < start < stop:
                stop = start
        # The signed address a redirect gave is used again until it expires; then the hub is asked for another.
        try:
            answer = self._client.open(self._url, self.name, offset, stop)
        except (UnknownName, Unreachable):
            if self._url == self._origin:
                raise
            answer = self._client.open(self._origin, self.name, offset, stop)
        if answer.total is None:
            answer.close()
            raise Unreachable(f"the server of {self.name} does not do range requests, so its header cannot be read "
                              f"alone; download the whole file with llmlab fetch {self.name}")
        if self._blocks and answer.total != self.size:
            answer.close()
            raise Unreachable(f"{self.name} changed while it was read; try again")
        self._url, self.size = answer.url, answer.total
        block = answer.read(stop - offset)
        if not block and self.size:
            raise Unreachable(f"{self.name}: the server sent an empty range")
        self._blocks.append((offset, block))
        while len(self._blocks) > 1 and sum(len(data) for _, data in self._blocks) > _KEPT_LIMIT:
            self._blocks.pop(0)
        return offset, block


class Client:
    """Keep-alive connections to the hub and to where it redirects; counts `.requests` and `.bytes_read`.

    Not for several threads at once: give each its own.
    """

    def __init__(self):
        self.requests = self.bytes_read = 0
        self._idle: dict[tuple[str, str, int], tuple[http.client.HTTPConnection, str, dict]] = {}

    def close(self) -> None:
        for connection, _, _ in self._idle.values():
            connection.close()
        self._idle.clear()

    def open(self, url: str, what: str, start: int | None = None, stop: int | None = None) -> "Answer":
        """GET `url`, bytes `start` to `stop` (exclusive) where given, redirects followed. The body is not read yet.

        Raises UnknownName (not there), Unreachable (everything else), always about `what`.
        """
        require_online(what)
        digest = ""
        for _ in range(REDIRECTS + 1):
            answer = self._ask(url, what, start, stop)
            # The hub names the hash where it redirects; what the last host says of itself counts only without that.
            answer.digest = digest = digest or answer.digest
            if answer.status not in (301, 302, 303, 307, 308):
                answer.check(what, start, stop)
                return answer
            answer.close()
            try:
                target = urljoin(url, answer.headers.get("Location") or "")
            except ValueError:
                target = ""
            if _origin(target) is None or _origin(target)[0] not in ("https", _origin(url)[0]):
                raise Unreachable(f"{what}: {_host(url)} redirects to an address that is not followed")
            url = target
        raise Unreachable(f"{what}: {_host(url)} redirects in circles (more than {REDIRECTS} times)")

    def _ask(self, url: str, what: str, start: int | None, stop: int | None) -> "Answer":
        headers = {"User-Agent": "llmlab", "Accept": "*/*", "Accept-Encoding": "identity"}
        if start is not None:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        if _origin(url) == _origin(endpoint()) and (secret := token()):
            headers["Authorization"] = f"Bearer {secret}"
        for attempt in range(RETRIES + 1):
            last = attempt == RETRIES
            try:
                answer = self._once(url, headers)
            except _Final as error:
                raise Unreachable(f"{what}: {_host(url)} cannot be reached ({error}); {_NETWORKLESS}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                if last:
                    reason = _reason(error)
                    raise Unreachable(f"{what}: {_host(url)} does not answer ({reason}); {_NETWORKLESS}") from None
            else:
                if last or answer.status not in (408, 429, 500, 502, 503, 504):
                    return answer
                answer.close()
            time.sleep(PAUSE * attempt * 2)
        raise AssertionError("the last attempt returns or raises")

    def _once(self, url: str, headers: dict) -> "Answer":
        parts, origin = urlsplit(url), _origin(url)
        kept = self._idle.pop(origin, None) or _connection(*origin)
        connection, prefix, extra = kept
        target = prefix + (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.requests += 1
        if connection.sock is None:
            try:
                connection.connect()
            except (OSError, http.client.HTTPException, ValueError) as error:   # trying again at once would not help
                connection.close()
                raise _Final(_reason(error)) from None
        guard = _Guard(connection.sock)
        try:
            connection.request("GET", target, headers=headers | extra)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException, ValueError):
            if not guard.late:
                guard.stop()
                connection.close()
                raise
        if guard.late:      # http.client takes headers that were cut for whole ones
            connection.close()
            raise _Final("it answers too slowly")
        return Answer(self, url, kept, guard, response)


class _Final(Exception):
    """A failure that another attempt would only repeat."""


class Answer:
    """One answer of a server, its body not read yet: `.status`, `.headers`, `.url`, `.first`, `.total`, `.digest`.

    `.first` is the position of the body's first byte in the file; `.total` the file's bytes, None where the server
    ignored the range or none was asked for; `.digest` the hash that the hub gives for the file, "" for none.
    """

    def __init__(self, client: Client, url: str, kept: tuple, guard: "_Guard", response: http.client.HTTPResponse):
        self._client, self._kept, self._guard, self._response = client, kept, guard, response
        self.url, self.status, self.headers = url, response.status, response.headers
        self.first, self.total, self._what, self._expected = 0, None, _host(url), response.length
        tag = response.headers.get("X-Linked-Etag") or response.headers.get("ETag") or ""
        tag = tag.removeprefix("W/").strip('"')
        self.digest = tag if _DIGEST.fullmatch(tag) else ""

    def close(self) -> None:
        """Done: the connection is kept if the whole body was read."""
        self._guard.stop()
        if self._response.isclosed() and self._kept[0].sock is not None:
            self._client._idle[_origin(self.url)] = self._kept
        else:
            self._kept[0].close()

    def check(self, what: str, start: int | None, stop: int | None) -> None:
        """Raise what an error status means; read Content-Range."""
        self._what = what
        if self.status == 416 and start == 0:       # an empty file has no first byte
            self.total, self._expected = 0, 0
            return
        if self.status not in (200, 206):
            self._refuse(what)
        if self.headers.get("Content-Encoding", "identity").lower() != "identity":
            self.close()
            raise Unreachable(f"{what}: {_host(self.url)} sends a packed answer that was not asked for")
        if self.status == 206:
            stated = self.headers.get("Content-Range", "").strip()
            match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", stated)
            first, last, total = map(int, match.groups()) if match else (-1, -1, -1)
            if start is None or first != start or last != min(stop, total) - 1 or last < first:
                self.close()
                raise Unreachable(f"{what}: {_host(self.url)} sent another range than was asked for "
                                  f"({stated[:60]!r})")
            self.first, self.total, self._expected = first, total, last - first + 1

    def _refuse(self, what: str) -> None:
        self.close()
        code, host = self.headers.get("X-Error-Code", ""), _host(self.url)
        if code == "GatedRepo":
            page = f"{endpoint()}/{'/'.join(what.split('/')[:2])}"
            raise Unreachable(f"{what} is gated: accept its licence at {page}, then set HF_TOKEN to your access token")
        if code == "RepoNotFound" or (self.status == 401 and not code and not token()):
            raise UnknownName(f"{what}: {host} has no such model, or it is private (then set HF_TOKEN)")
        if code == "EntryNotFound":
            raise UnknownName(f"{what}: the repository has no such file")
        if code == "RevisionNotFound":
            raise UnknownName(f"{what}: the repository has no such revision")
        if self.status in (401, 403):
            raise Unreachable(f"{what}: {host} refuses access ({self.status}); set HF_TOKEN to one that may read it")
        if self.status in (404, 410):
            raise UnknownName(f"{what}: not found at {host}")
        if self.status == 429:
            raise Unreachable(f"{what}: {host} wants fewer requests (429); wait a minute, or set HF_TOKEN")
        raise Unreachable(f"{what}: {host} answered with error {self.status}; try again later")

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes, at most 1 MiB at a time. Raises Unreachable where it stops early, stalls or drips."""
        done = 0
        try:
            while self._expected is None or done < self._expected:
                chunk = self._response.read1(min(MIB, self._expected - done) if self._expected is not None else MIB)
                if not chunk:
                    break
                done += len(chunk)
                self._client.bytes_read += len(chunk)
                self._guard.credit(len(chunk))
                yield chunk
            if self._response.length == 0:
                self._response.read()       # read1 does not close at the end, and only then can the connection be kept
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = "it sends too slowly" if self._guard.late else _reason(error)
            raise Unreachable(f"{self._what}: {_host(self.url)} broke off ({reason}); try again") from None
        finally:
            self.close()
        if self._guard.late or (self._expected is not None and done < self._expected):
            reason = "it sends too slowly" if self._guard.late else f"{done} of {self._expected} bytes came"
            raise Unreachable(f"{self._what}: {_host(self.url)} broke off ({reason}); try again")

    def read(self, limit: int) -> bytes:
        """The whole body. Raises BadFile where it is longer than `limit` bytes, and Unreachable."""
        too_long = f"{self._what}: the answer of {_host(self.url)} is longer than the {format_bytes(limit)} it may have"
        if self._expected is not None and self._expected > limit:
            self.close()
            raise BadFile(too_long)
        data = bytearray()
        with contextlib.closing(self.chunks()) as chunks:
            for chunk in chunks:
                data += chunk
                if len(data) > limit:
                    raise BadFile(too_long)
        return bytes(data)


class _Guard:
    """Shuts a socket that falls behind PACE for PATIENCE seconds: a socket's own timeout starts anew at every byte."""

    def __init__(self, sock: socket.socket):
        self.late, self._sock, self._done = False, sock, threading.Event()
        self._until = time.monotonic() + PATIENCE
        threading.Thread(target=self._watch, daemon=True, name="llmlab-hub-guard").start()

    def credit(self, size: int) -> None:
        self._until = min(time.monotonic() + PATIENCE, self._until + size / PACE)

    def stop(self) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(max(0.01, self._until - time.monotonic())):
            if time.monotonic() >= self._until:
                self.late = True
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)    # not SSLSocket's: another thread reads
                return


def require_online(what: str) -> None:
    """Raise Unreachable where the user has switched the hub off."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if _true(name):
            raise Unreachable(f"{what}: {name} is set, so the hub is not asked; unset it; {_NETWORKLESS}")


def _true(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "on", "yes", "true")


def _connection(scheme: str, host: str, port: int) -> tuple[http.client.HTTPConnection, str, dict]:
    """(a connection, what goes before the path, extra headers): direct, or through the user's proxy."""
    proxy = "" if host in _LOOPBACK or proxy_bypass(host) else getproxies().get(scheme, "")
    secure = {"context": _tls()} if scheme == "https" else {}
    make = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    if not proxy:
        return make(host, port, timeout=WAIT, **secure), "", {}
    parts = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    extra = {}
    if parts.username:
        import base64
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        extra["Proxy-Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    connection = make(parts.hostname or "", parts.port or 80, timeout=WAIT, **secure)
    if scheme == "https":
        connection.set_tunnel(host, port, headers=extra)
        return connection, "", {}
    return connection, f"http://{host}" + (f":{port}" if port != 80 else ""), extra


@functools.cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if bundle and os.path.isfile(bundle):
        context.load_verify_locations(bundle)
    elif not context.get_ca_certs() and not os.environ.get("SSL_CERT_FILE"):
        with contextlib.suppress(ImportError):      # a Python without the system's certificates (macOS installers)
            import certifi
            context.load_verify_locations(certifi.where())
    return context


def _origin(url: str) -> tuple[str, str, int] | None:
    """(scheme, host, port) of a web address, None for anything else."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        return (parts.scheme, parts.hostname, port) if parts.hostname else None
    except (ValueError, KeyError):
        return None


def _host(url: str) -> str:
    """The host of an address, for messages: without a path, a signature or a login."""
    return (_origin(url) or ("", "the server", 0))[1]


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}; set SSL_CERT_FILE to your network's bundle"
    if isinstance(error, socket.gaierror):
        return "its name is not found; is there a network?"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:100]
