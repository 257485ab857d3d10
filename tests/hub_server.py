"""A small Hugging Face hub on loopback: serves a folder (owner/repo/files) in the hub's address layout, with faults.

Large files (`.gguf`, `.safetensors`) are redirected to a second port, as the hub redirects to its CDN, with the sha256
in X-Linked-Etag; small ones are served where they are, with git's blob hash as ETag.
"""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class HubServer:
    """`with HubServer(folder) as hub:` then `hub.url` is an HF_ENDPOINT. Attributes are the switches for faults.

    `seen` holds (which host, method, path, headers) of every request; `sent` the body bytes each host sent.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.seen: list[tuple[str, str, str, dict]] = []
        self.sent: Counter[str] = Counter()
        self.gated: set[str] = set()    # repositories that want a licence accepted
        self.token = ""                 # where set, the hub wants exactly this one
        self.page = 1000                # entries of one page of a file list
        self.ignore_range = False
        self.wrong_range = False
        self.redirect_forever = False
        self.redirect_to = ""           # where large files are redirected instead
        self.cut_after: list[int] = []  # the next file answers end after this many body bytes
        self.errors: list[int] = []     # the next answers of the hub have these statuses
        self.corrupt = False            # flips a bit of every large file
        self.drip = 0.0                 # seconds between the bytes of a body
        self.drip_headers = 0.0
        self.huge_json = 0              # bytes that a JSON answer claims to have
        self.endless_pages = False
        self.next_page = ""             # what the Link header of a file list says instead
        self.digests: dict[str, str] = {}   # path -> the hash the file list names instead

    def __enter__(self) -> "HubServer":
        self._servers = [_serve(self, "hub"), _serve(self, "cdn")]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)
        return self

    def __exit__(self, *_):
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def requests(self, host: str | None = None) -> list[tuple[str, str, str, dict]]:
        return [request for request in self.seen if host in (None, request[0])]


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith((".gguf", ".safetensors"))


_sha256: dict[tuple, str] = {}


def sha256(path: Path) -> str:
    key = path, path.stat().st_mtime_ns, path.stat().st_size
    if key not in _sha256:
        with path.open("rb") as file:
            _sha256[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _sha256[key]


def _serve(hub: HubServer, role: str) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            hub.seen.append((role, self.command, self.path, dict(self.headers)))
            try:
                self.answer()
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def answer(self):
            path = unquote(urlsplit(self.path).path)
            if role == "hub" and hub.errors:
                return self.refuse(hub.errors.pop(0), "")
            if role == "cdn":
                return self.file(hub.folder / path.lstrip("/"))
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.refuse(401, "")
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
                return self.tree(match[1])
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self.resolve(match[1], match[3])
            return self.refuse(404, "")

        def tree(self, repo: str):
            top = hub.folder / repo
            if not top.is_dir():
                return self.refuse(401, "RepoNotFound")
            entries = [{"type": "directory", "path": "a-folder", "oid": "0" * 40, "size": 0}]
            for path in sorted(top.rglob("*")):
                if path.is_file():
                    name, size = path.relative_to(top).as_posix(), path.stat().st_size
                    if is_large(name):
                        digest = hub.digests.get(name, sha256(path))
                        more = {"oid": "1" * 40, "lfs": {"oid": digest, "size": size, "pointerSize": 134}}
                    else:
                        more = {"oid": hub.digests.get(name, git_blob(path.read_bytes()))}
                    entries.append({"type": "file", "path": name, "size": size, **more})
            start = int((re.search(r"cursor=(\d+)", self.path) or [0, 0])[1])
            headers = {"Content-Type": "application/json"}
            if start + hub.page < len(entries) or hub.endless_pages:
                here = f"{hub.url}{urlsplit(self.path).path}"
                following = hub.next_page or f"{here}?recursive=true&cursor={start + hub.page}"
                headers["Link"] = f'<{following}>; rel="next"'
            self.body(json.dumps(entries[start:start + hub.page]).encode(), headers)

        def resolve(self, repo: str, name: str):
            path = hub.folder / repo / name
            if not (hub.folder / repo).is_dir():
                return self.refuse(401, "RepoNotFound")
            if repo in hub.gated:
                return self.refuse(401, "GatedRepo")
            if hub.redirect_forever:
                return self.redirect(f"{hub.url}{self.path}")
            if not path.is_file():
                return self.refuse(404, "EntryNotFound")
            if is_large(name):
                return self.redirect(hub.redirect_to or f"{hub.cdn}/{repo}/{name}?signature=abc", {
                    "X-Linked-Etag": f'"{hub.digests.get(name, sha256(path))}"', "X-Repo-Commit": "c" * 40,
                    "X-Linked-Size": str(path.stat().st_size)})
            return self.file(path, {"ETag": f'"{git_blob(path.read_bytes())}"', "X-Repo-Commit": "c" * 40})

        def file(self, path: Path, headers: dict | None = None):
            if not path.is_file():
                return self.refuse(404, "")
            size, headers = path.stat().st_size, dict(headers or {})
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, stop, status = 0, size, 200
            if match and not hub.ignore_range:
                start, stop, status = int(match[1]), min(int(match[2]) + 1, size), 206
                if start >= size:
                    return self.refuse(416, "")
                shown = start + 1 if hub.wrong_range else start
                headers["Content-Range"] = f"bytes {shown}-{stop - 1}/{size}"
            with path.open("rb") as file:
                file.seek(start)
                data = bytearray(file.read(stop - start))
            if hub.corrupt and is_large(path.name):
                data[len(data) // 2] ^= 1
            self.body(bytes(data), headers, status)

        def redirect(self, target: str, headers: dict | None = None):
            self.body(b"moved", {"Location": target, **(headers or {})}, 302)

        def refuse(self, status: int, code: str):
            self.body(b"no", {"X-Error-Code": code} if code else {}, status)

        def body(self, data: bytes, headers: dict, status: int = 200):
            length = len(data)
            if hub.huge_json and headers.get("Content-Type") == "application/json":
                length = hub.huge_json
            cut = hub.cut_after.pop(0) if hub.cut_after and role == "cdn" else None
            if hub.drip_headers:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                for _ in range(10_000):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(hub.drip_headers)
            self.send_response(status)
            for name, value in ({"Content-Length": str(length)} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.drip:
                for byte in data[:10_000]:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(hub.drip)
            data = data if cut is None else data[:cut]
            for start in range(0, len(data), 65536):
                hub.sent[role] += len(data[start:start + 65536])     # first: who has the last byte may count at once
                self.wfile.write(data[start:start + 65536])
            if cut is not None:
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_):     # a client that hangs up is what some tests are about
            pass

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server
