"""Headers of remote model files, GGUF and safetensors, by range requests."""

import contextlib
from typing import TYPE_CHECKING

from ..errors import BadFile, UnknownName, Unreachable
from ..units import KIB, MIB
from .client import Client, file_url
from .listing import is_safe_path, parse_json, read_json

if TYPE_CHECKING:
    from ..gguf import GGUFFile

HEADER_LIMIT = 100 * 10**6      # bytes of a safetensors header, the limit of the safetensors library itself
SHARDS = 1000
_FIRST_BLOCK, _BLOCK = 256 * KIB, MIB


def open_gguf(repo: str, file: str, revision: str = "main") -> "GGUFFile":
    """The header of a GGUF file on the hub (of a sharded set, given its first file: all headers), by range requests.

    Raises UnknownName, Unreachable, BadFile.
    """
    from ..gguf import join_shards, read_header, shard_names

    with contextlib.closing(Client()) as client:
        first = read_header(RangeReader(repo, file, revision, client))
        if first.shards > SHARDS:
            raise BadFile(f"{repo}/{file} claims to be one of {first.shards} files; more than {SHARDS} are not read")
        if first.shards == 1:
            return first
        folder, _, name = file.rpartition("/")
        others = [f"{folder}/{other}".lstrip("/") for other in shard_names(name, first.shards)[1:]]
        return join_shards([first, *(read_header(RangeReader(repo, other, revision, client)) for other in others)])


def safetensors_headers(repo: str, revision: str = "main") -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor name: (dtype as safetensors writes it, shape)} of a repository, of all its shards.

    Reads each file's header by range: 8 bytes of length (little endian), then JSON (the safetensors format).
    Raises UnknownName, Unreachable, BadFile.
    """
    from concurrent.futures import ThreadPoolExecutor

    with contextlib.closing(Client()) as client:
        try:
            return _safetensors_header(RangeReader(repo, "model.safetensors", revision, client))
        except UnknownName:
            index = read_json(repo, "model.safetensors.index.json", revision, client)
        weights = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weights, dict) or not all(isinstance(v, str) and is_safe_path(v) for v in weights.values()):
            raise BadFile(f"{repo}/model.safetensors.index.json has no weight_map of file names")
        names = sorted(set(weights.values()))
        if len(names) > SHARDS:
            raise BadFile(f"{repo} claims {len(names)} safetensors shards; more than {SHARDS} are not read")
        merged: dict[str, tuple[str, tuple[int, ...]]] = {}
        with ThreadPoolExecutor(8) as pool:
            for found in pool.map(lambda name: _safetensors_header(RangeReader(repo, name, revision, client)), names):
                merged |= found
        return merged


def _safetensors_header(reader: "RangeReader") -> dict[str, tuple[str, tuple[int, ...]]]:
    length = int.from_bytes(reader.read(0, 8), "little")
    if length > min(HEADER_LIMIT, reader.size - 8):
        raise BadFile(f"{reader.name} claims a header of {length} bytes; it is not a safetensors file")
    header = parse_json(reader.read(8, length), f"the header of {reader.name}")
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


class RangeReader:
    """A remote file read in pieces, front to back: `.name`, `.size`, `.read(offset, length)`.

    The first 256 KiB come at once, then blocks of 1 MiB or what is asked for; the last block is kept.
    Raises UnknownName, Unreachable, BadFile.
    """

    def __init__(self, repo: str, file: str, revision: str = "main", client: Client | None = None):
        self.name, self.size = f"{repo}/{file}", -1
        self._hub = self._url = file_url(repo, file, revision)
        self._client = client or Client()
        self._start, self._block = 0, self._fetch(0, _FIRST_BLOCK)

    def close(self) -> None:
        self._client.close()

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`. Raises BadFile where the file ends before, and Unreachable."""
        end = offset + length
        if end > self.size:
            raise BadFile(f"{self.name} ends at byte {self.size}, but bytes {offset} to {end} are needed; "
                          "it is truncated or damaged")
        here, held = offset - self._start, b""
        if 0 <= here < len(self._block):
            held = self._block[here:here + length]
        if len(held) < length:
            self._start = offset + len(held)
            self._block = self._fetch(self._start, min(max(end, self._start + _BLOCK), self.size))
            held += self._block[:end - self._start]
        return held

    def _fetch(self, offset: int, stop: int) -> bytes:
        # The signed address a redirect gave is used again until it expires; then the hub is asked for another.
        try:
            answer = self._client.open(self._url, self.name, offset, stop)
        except (UnknownName, Unreachable):
            if self._url == self._hub:
                raise
            answer = self._client.open(self._hub, self.name, offset, stop)
        with contextlib.closing(answer):
            if answer.total is None:
                raise Unreachable(f"the server of {self.name} does not do range requests, so its header cannot be read "
                                  f"alone; download the whole file with llmlab fetch {self.name}")
            if self.size not in (-1, answer.total):
                raise Unreachable(f"{self.name} changed while it was read; try again")
            self._url, self.size = answer.url, answer.total
            return answer.read(stop - offset)
