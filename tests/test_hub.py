import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import time
import tracemalloc

import httpx
import pytest
from hub_server import HubServer
from hypothesis import given
from hypothesis import strategies as st

from llmlab import hub
from llmlab.errors import BadFile, LabError, UnknownName, Unreachable
from llmlab.gguf import read_gguf, write_gguf
from llmlab.hub import client, headers, listing


@pytest.fixture
def server(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    # A proxy that nobody answers at: loopback must not go through it.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(client, "PAUSE", 0.01)
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def put(server, path: str, data: bytes | str = b"") -> None:
    target = server.folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data.encode() if isinstance(data, str) else data)


def put_gguf(server, path: str, metadata: dict | None = None, tensors: int = 2, grow_to: int = 0, start: int = 0):
    target = server.folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(target, {"general.architecture": "llama", "llama.block_count": 2} | (metadata or {}),
               [(f"t{start + i}", (64, 4), "F32", bytes([i + 1]) * 1024) for i in range(tensors)])
    if grow_to:
        os.truncate(target, grow_to)


def safetensors(shapes: dict[str, tuple[str, list[int]]]) -> bytes:
    table = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, (dtype, shape) in shapes.items()}
    header = json.dumps({"__metadata__": {"format": "pt"}} | table).encode()
    return struct.pack("<Q", len(header)) + header + bytes(64)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert isinstance(error.value, LabError) and "\n" not in text and len(text) < 400
    return text


def test_a_gguf_header_costs_under_one_percent_of_the_file(server):
    put_gguf(server, "o/big/model.gguf", grow_to=200_000_000)
    remote = hub.open_gguf("o/big", "model.gguf")
    local = read_gguf(server.folder / "o/big/model.gguf")
    assert remote.metadata == local.metadata and remote.file_bytes == 200_000_000
    assert list(remote.tensors.values()) == list(local.tensors.values())
    assert 0 < server.sent["cdn"] < 200_000_000 * 0.01


def test_reader_returns_the_bytes_of_the_file_and_on_the_way_forward_none_twice(server):
    data = os.urandom(5_000_000)
    put(server, "o/r/x.gguf", data)
    reader = hub.RangeReader("o/r", "x.gguf")
    assert reader.size == len(data) and reader.name == "o/r/x.gguf"
    for offset, length in ((0, 8), (8, 300_000), (300_008, 0), (300_008, 2_000_000), (2_300_000, 20), (2_300_020, 2_699_980)):
        assert reader.read(offset, length) == data[offset:offset + length]
    assert server.sent["cdn"] == len(data) and len(server.requests("cdn")) == 4
    for offset, length in ((4_999_999, 1), (7, 100), (0, 5_000_000), (10, 4_000_000)):      # and back again
        assert reader.read(offset, length) == data[offset:offset + length]
    with pytest.raises(BadFile) as error:
        reader.read(4_999_999, 2)
    assert "ends at byte 5000000" in one_line(error)


def test_connections_are_kept_and_the_signed_address_is_used_again(server, monkeypatch):
    put(server, "o/r/x.gguf", bytes(8_000_000))
    opened, original = [], socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: opened.append(a) or original(*a, **k))
    reader = hub.RangeReader("o/r", "x.gguf")
    for offset in range(0, 8_000_000, 2_000_000):
        reader.read(offset, 10)
    assert len(server.requests("hub")) == 1 and len(server.requests("cdn")) == 4
    assert len(opened) == 2     # one to each host


def test_an_expired_signed_address_is_renewed(server):
    put(server, "o/r/x.gguf", bytes(3_000_000))
    reader = hub.RangeReader("o/r", "x.gguf")
    reader._url = f"{server.cdn}/expired"
    assert reader.read(2_000_000, 5) == bytes(5)


def test_token_goes_to_the_hub_and_to_no_other_host(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.token = "hf_secret"
    put_gguf(server, "o/r/x.gguf")
    hub.open_gguf("o/r", "x.gguf")
    hub.list_files("o/r")
    assert {sent.get("Authorization") for _, _, _, sent in server.requests("hub")} == {"Bearer hf_secret"}
    assert server.requests("cdn")
    for _, _, path, sent in server.requests("cdn"):
        assert "hf_secret" not in path + str(sent)


@pytest.mark.parametrize("target, asked", [("https://cdn.example/x", 2), ("http://hub.example/x", 1)])
def test_token_stays_behind_and_https_is_never_left(monkeypatch, target, asked):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    seen = []

    def answer(request):
        seen.append(request)
        return httpx.Response(302, headers={"Location": target}) if len(seen) == 1 else httpx.Response(
            200, stream=httpx.ByteStream(b"[]"))

    one = hub.Client()
    one._http = httpx.Client(transport=httpx.MockTransport(answer))
    if asked == 2:
        assert hub.tree("o/r", client=one) == []
    else:
        with pytest.raises(Unreachable) as error:
            hub.tree("o/r", client=one)
        assert "not followed" in one_line(error)
    assert ["hf_secret" in str(request.headers.get("Authorization")) for request in seen] == [True, False][:asked]


def test_a_token_or_an_address_that_cannot_be_sent_is_one_clear_line(server, monkeypatch):
    put(server, "o/r/x.gguf", b"1")
    server.endless_pages, server.next_page = True, "/api/\x7f"
    with pytest.raises(Unreachable) as error:
        hub.list_files("o/r")
    assert "cannot be sent" in one_line(error) and len(server.requests()) == 1
    for secret in ("hf_ü", "hf_\n_x"):
        monkeypatch.setenv("HF_TOKEN", secret)
        with pytest.raises(Unreachable) as error:
            hub.list_files("o/r")
        assert secret not in one_line(error) and len(server.requests()) == 1


def test_a_proxy_that_cannot_be_used_is_named(server, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "nonsense://somewhere")
    with pytest.raises(Unreachable) as error:
        hub.list_files("o/r")
    assert "ALL_PROXY" in one_line(error) and not server.requests()


def test_token_file_is_read_and_can_be_switched_off(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert hub.token() is None
    (tmp_path / "token").write_text("hf_file\n")
    assert hub.token() == "hf_file"
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert hub.token() is None
    monkeypatch.setenv("HF_TOKEN", "hf_env")
    assert hub.token() == "hf_env"


def test_file_list_is_followed_over_pages(server):
    for number in range(7):
        put(server, f"o/r/folder/{number}.json", "{}")
    put(server, "o/r/x.gguf", b"12345")
    server.page = 3
    assert hub.list_files("o/r") == [(f"folder/{n}.json", 2) for n in range(7)] + [("x.gguf", 5)]
    assert len(hub.tree("o/r")[-1].digest) == 64 and len(hub.tree("o/r")[0].digest) == 40


def test_config_is_read(server):
    put(server, "o/r/config.json", '{"model_type": "llama"}')
    assert hub.read_json("o/r") == {"model_type": "llama"}
    with pytest.raises(UnknownName) as error:
        hub.read_json("o/r", "nothing.json")
    assert "o/r/nothing.json" in one_line(error)


def test_sharded_gguf_headers_are_joined(server):
    for number in range(3):
        put_gguf(server, f"o/r/q/m-{number + 1:05d}-of-00003.gguf", tensors=2, start=2 * number, metadata={
            "split.no": ("uint16", number), "split.count": ("uint16", 3), "split.tensors.count": ("int32", 6)})
    whole = hub.open_gguf("o/r", "q/m-00001-of-00003.gguf")
    assert list(whole.tensors) == [f"t{i}" for i in range(6)] and whole.tensors["t5"].shard == 2


@pytest.mark.parametrize("name, count, kind", [("m-00001-of-60000.gguf", 60_000, BadFile), ("m.gguf", 3, BadFile),
                                               ("m-00001-of-00003.gguf", 3, UnknownName)])
def test_sets_that_cannot_be_read_whole(server, name, count, kind):
    put_gguf(server, f"o/r/{name}", {"split.no": ("uint16", 0), "split.count": ("uint16", count)})
    with pytest.raises(kind) as error:
        hub.open_gguf("o/r", name)
    assert "m" in one_line(error) and len(server.requests("hub")) <= 2


def test_safetensors_headers_single_and_sharded(server):
    put(server, "o/one/model.safetensors", safetensors({"a": ("BF16", [4, 8]), "scalar": ("F32", [])}))
    assert hub.safetensors_headers("o/one") == {"a": ("BF16", (4, 8)), "scalar": ("F32", ())}
    names = [f"model-{i:05d}-of-00012.safetensors" for i in range(12)]
    for i, name in enumerate(names):
        put(server, f"o/many/{name}", safetensors({f"w{i}": ("F8_E4M3", [i + 1])}))
    index = {"weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    put(server, "o/many/model.safetensors.index.json", json.dumps(index))
    assert hub.safetensors_headers("o/many") == {f"w{i}": ("F8_E4M3", (i + 1,)) for i in range(12)}


@pytest.mark.parametrize("data", [
    struct.pack("<Q", 2**63), struct.pack("<Q", 99_000_000) + b"{}", struct.pack("<Q", 2) + b"[]",
    struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 14) + b'{"a": [1, 2]} ', b"short", b"",
    struct.pack("<Q", 9000) + b'{"a":' * 1500 + b" " * 1500,
    safetensors({"a": ("F32", [-1])}), safetensors({"a": ("F32", [1e9])}), safetensors({"a": (3, [1])}),
    safetensors({"a": ("F32", [1] * 99)}), safetensors({"a": ("F32", [True])}),
])
def test_hostile_safetensors_header_is_one_clear_line(server, data):
    put(server, "o/r/model.safetensors", data)
    with pytest.raises(BadFile) as error:
        hub.safetensors_headers("o/r")
    assert "o/r/model.safetensors" in one_line(error)


@pytest.mark.parametrize("index", [
    "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../../x"}}', "{", "[" * 99999,
    json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(2000)}})])
def test_hostile_index_is_one_clear_line(server, index):
    put(server, "o/r/model.safetensors.index.json", index)
    with pytest.raises(BadFile) as error:
        hub.safetensors_headers("o/r")
    assert "o/r" in one_line(error)


def test_a_server_without_ranges_is_refused_and_its_body_not_read(server):
    put_gguf(server, "o/r/x.gguf", grow_to=60_000_000)
    server.ignore_range = True
    with pytest.raises(Unreachable) as error:
        hub.RangeReader("o/r", "x.gguf")
    assert "range" in one_line(error)
    time.sleep(0.1)
    assert server.sent["cdn"] < 20_000_000      # what fits in socket buffers, not the file


def test_a_wrong_range_is_refused(server):
    put(server, "o/r/x.gguf", bytes(1000))
    server.wrong_range = True
    with pytest.raises(Unreachable) as error:
        hub.RangeReader("o/r", "x.gguf")
    assert "another range" in one_line(error)


def test_server_errors_are_tried_again_and_then_told(server):
    put(server, "o/r/config.json", "{}")
    server.errors = [503, 500]
    assert hub.read_json("o/r") == {}
    server.errors = [500] * 3
    with pytest.raises(Unreachable) as error:
        hub.read_json("o/r")
    assert "500" in one_line(error) and len(server.requests()) == 6
    server.errors = [429] * 3
    with pytest.raises(Unreachable) as error:
        hub.read_json("o/r")
    assert "HF_TOKEN" in one_line(error)


def test_a_body_cut_short_is_told(server):
    put(server, "o/r/x.gguf", bytes(400_000))
    server.cut_after = [1000]
    with pytest.raises(Unreachable) as error:
        hub.RangeReader("o/r", "x.gguf")
    assert "broke off" in one_line(error)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://127.0.0.1:notaport/", "http://",
                                    "//", "http://[bad/", "gopher:x", "/a b", "http://exa mple/"])
def test_strange_redirects_are_not_followed(server, target):
    put(server, "o/r/x.gguf", b"1234")
    server.redirect_to = target
    with pytest.raises(LabError) as error:
        hub.RangeReader("o/r", "x.gguf")
    assert "o/r/x.gguf" in one_line(error) and len(server.requests()) <= 1 + client.REDIRECTS


def test_endless_redirects_and_pages_end(server, monkeypatch):
    put(server, "o/r/x.gguf", b"1234")
    server.redirect_forever = True
    with pytest.raises(Unreachable) as error:
        hub.RangeReader("o/r", "x.gguf")
    assert "circles" in one_line(error) and len(server.requests()) == client.REDIRECTS + 1
    monkeypatch.setattr(listing, "PAGES", 5)
    server.endless_pages = True
    with pytest.raises(Unreachable) as error:
        hub.list_files("o/r")
    assert "pages" in one_line(error)
    server.next_page = f"{server.cdn}/api/models/o/r/tree/main"
    with pytest.raises(Unreachable) as error:
        hub.list_files("o/r")
    assert "another host" in one_line(error) and not server.requests("cdn")


def test_gigantic_json_is_refused_before_it_is_read(server):
    put(server, "o/r/x.gguf", b"1234")
    server.huge_json = 2**40
    tracemalloc.start()
    with pytest.raises(BadFile) as error:
        hub.list_files("o/r")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "longer than" in one_line(error) and peak < 8 * 2**20


@pytest.mark.parametrize("text", ["", "[", "{}", '[{"type": "file"}]', '[{"type": "file", "path": "x", "size": -1}]',
                                  '[{"type": "file", "path": "x", "size": true}]', "[" * 100_000, "NaN", "\xff",
                                  '[{"type": "file", "path": 1, "size": 1}]',
                                  '[{"type": "file", "path": "x", "size": 1e400}]'])
def test_hostile_file_list_is_one_clear_line(server, monkeypatch, text):
    put(server, "o/r/list", text.encode("latin-1"))
    url = hub.file_url("o/r", "list")
    original = hub.Client.open
    monkeypatch.setattr(hub.Client, "open", lambda self, _, what, *rest: original(self, url, what, *rest))
    with pytest.raises(BadFile) as error:
        hub.list_files("o/r")
    assert "o/r" in one_line(error)


def test_files_with_names_that_leave_the_folder_are_not_listed(server, monkeypatch):
    names = ["../x", "/etc/x", "a/../../x", "a//b", "c:\\x", "a\\..\\x", "", ".", "a\nb", "x" * 2000, "good/x.gguf"]
    put(server, "o/r/list", json.dumps([{"type": "file", "path": name, "size": 1} for name in names]))
    url, original = hub.file_url("o/r", "list"), hub.Client.open
    monkeypatch.setattr(hub.Client, "open", lambda self, _, what, *rest: original(self, url, what, *rest))
    assert [path for path, _ in hub.list_files("o/r")] == ["good/x.gguf"]


@pytest.mark.parametrize("switch", ["drip", "drip_headers"])
def test_a_dripping_server_is_given_up(server, monkeypatch, switch):
    put(server, "o/r/x.gguf", bytes(400_000))
    monkeypatch.setattr(client, "PATIENCE", 0.5)
    setattr(server, switch, 0.02)       # 10,000 bytes of it: 200 s, were it not given up
    with pytest.raises(Unreachable) as error:
        hub.RangeReader("o/r", "x.gguf")
    assert "slowly" in one_line(error)
    assert len(server.requests()) <= 2      # and not tried again


def test_a_silent_server_is_given_up(server, monkeypatch):
    monkeypatch.setattr(client, "WAIT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(Unreachable) as error:
            hub.read_json("o/r")
    assert "no answer in time" in one_line(error)


def test_offline_is_one_clear_line(server, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    with pytest.raises(Unreachable) as error:
        hub.read_json("o/r")
    assert "cannot be reached" in one_line(error) and "GGUF file" in one_line(error)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Unreachable) as error:
        hub.open_gguf("o/r", "x.gguf")
    assert "HF_HUB_OFFLINE" in one_line(error) and not server.requests()


@pytest.mark.parametrize("cause, words", [
    (socket.gaierror(-2, "Name or service not known"), "name is not found"),
    (ssl.SSLCertVerificationError(1, "[SSL] certificate verify failed: self-signed (_ssl.c:1)"), "SSL_CERT_FILE"),
    (OSError(113, "No route to host"), "No route to host")])
def test_why_there_is_no_connection_is_said(server, monkeypatch, cause, words):
    def fail(*_, **__):
        raise cause

    cause.verify_message = "self-signed certificate"
    monkeypatch.setattr(socket, "create_connection", fail)
    with pytest.raises(Unreachable) as error:
        hub.read_json("o/r")
    assert words in one_line(error) and "cannot be reached" in one_line(error)


@pytest.mark.parametrize("address", ["localhost:8000", "file:///tmp", "http://", "http://h:99999x/", "https://a b"])
def test_a_wrong_endpoint_is_named(monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(Unreachable) as error:
        hub.list_files("o/r")
    assert "HF_ENDPOINT" in one_line(error)


def test_gated_missing_and_private(server, monkeypatch):
    put_gguf(server, "o/gated/x.gguf")
    server.gated = {"o/gated"}
    with pytest.raises(Unreachable) as error:
        hub.open_gguf("o/gated", "x.gguf")
    assert "licence" in one_line(error) and "HF_TOKEN" in one_line(error) and "/o/gated" in one_line(error)
    with pytest.raises(UnknownName) as error:
        hub.list_files("o/absent")
    assert "o/absent" in one_line(error) and "HF_TOKEN" in one_line(error)
    server.token = "another"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(Unreachable) as error:
        hub.list_files("o/gated")
    assert "HF_TOKEN" in one_line(error) and "hf_wrong" not in one_line(error)


@pytest.mark.parametrize("repo", ["", "a b/c", "../x", "a/../b", "a/b/c", "-a/b", "a/b?x=1", "a/b#c", "a/b\n",
                                  "a\\b/c", "a/" + "b" * 300])
def test_strange_repository_names_are_refused(server, repo):
    with pytest.raises(UnknownName) as error:
        hub.list_files(repo)
    one_line(error)
    assert not server.requests()


def test_names_people_write():
    parse = hub.parse_name
    assert parse("o/r") == ("o/r", "", "")
    assert parse(" o/r:Q4_K_M ") == ("o/r", "Q4_K_M", "")
    assert parse("o/r/sub/x.gguf") == ("o/r", "", "sub/x.gguf")
    assert parse("https://huggingface.co/o/r") == parse("hf.co/o/r/") == ("o/r", "", "")
    assert parse("https://huggingface.co/o/r/blob/main/x.gguf?download=true") == ("o/r", "", "x.gguf")
    assert parse("https://huggingface.co/o/r/tree/main") == ("o/r", "", "")
    for wrong in ("gpt2", "", "/", "o/", "/r", "o/r:Q4/x.gguf", "o/r/../x", "http://elsewhere.example/o/r", "o/r:a b",
                  "a/b\0"):
        with pytest.raises(UnknownName):
            parse(wrong)


@given(st.text(max_size=60) | st.from_regex(r"[\w.-]*/[\w.-]*[:/]?[^\n]*"))
def test_any_text_is_a_name_or_a_clear_error(text):
    try:
        name = hub.parse_name(text)
    except UnknownName as error:
        assert "\n" not in str(error)
    else:
        assert client.check_repo(name.repo) == name.repo and "/" in name.repo
        assert not name.file or hub.is_safe_path(name.file)


class Bytes:
    """What RangeReader is to a header's reader, over bytes."""

    def __init__(self, data: bytes):
        self.name, self.size, self._data = "some/file", len(data), data

    def read(self, offset, length):
        if offset + length > self.size:
            raise BadFile("past the end")
        return self._data[offset:offset + length]


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                           lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
                           max_leaves=12)
entries = st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), json_values, max_size=4)


@given(st.binary(max_size=200) | st.dictionaries(st.text(max_size=8), entries | json_values, max_size=4).map(
    lambda table: (lambda text: struct.pack("<Q", len(text)) + text)(json.dumps(table).encode())))
def test_any_safetensors_header_is_read_or_refused(data):
    try:
        found = headers._safetensors_header(Bytes(data))
    except BadFile as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(dtype, str) and all(0 <= n < 2**48 for n in shape) for dtype, shape in found.values())


def test_the_gguf_that_a_name_means():
    def pick(name, *paths):
        return [file.path for file in hub.pick_gguf(hub.parse_name(name), [hub.HubFile(p, 9, "") for p in paths])]

    paths = ("m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-UD-Q4_K_M.gguf", "m-IQ4_XS.gguf", "m.f16.gguf", "mmproj-m-f16.gguf",
             "README.md", "Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf", "m.imatrix.gguf")
    assert pick("o/r:q4_k_m", *paths) == ["m-Q4_K_M.gguf"]
    assert pick("o/r:UD-Q4_K_M", *paths) == ["m-UD-Q4_K_M.gguf"]
    assert pick("o/r:F16", *paths) == ["m.f16.gguf"]
    assert pick("o/r:Q8_0", *paths) == list(paths[7:9])
    assert pick("o/r/Q8_0/m-Q8_0-00002-of-00002.gguf", *paths) == list(paths[7:9])
    assert pick("o/r/mmproj-m-f16.gguf", *paths) == ["mmproj-m-f16.gguf"]
    assert pick("o/r", "only.gguf", "mmproj-x.gguf", "config.json") == ["only.gguf"]
    assert pick("o/r", "model.safetensors", "config.json") == []
    for name, hint in (("o/r", ":Q4_K_S"), ("o/r:Q4", ":Q4_K_M"), ("o/r:Q4_K", ":UD-Q4_K_M"),
                       ("o/r/m-Q4_K_N.gguf", "m-Q4_K_M.gguf"), ("o/r:4_XS", ":IQ4_XS")):
        with pytest.raises(UnknownName) as error:
            pick(name, *paths)
        assert hint in one_line(error)


def test_a_proxy_is_used_for_other_hosts(server, monkeypatch):
    put(server, "o/r/config.json", "{}")
    host = server.url.removeprefix("http://")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    monkeypatch.setenv("http_proxy", f"http://me:pass%20word@{host}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert hub.read_json("o/r") == {}
    (_, _, path, sent), = server.requests()
    assert path == "http://hub.example/o/r/resolve/main/config.json" and sent["Host"] == "hub.example"
    assert sent["Proxy-Authorization"] == "Basic bWU6cGFzcyB3b3Jk"


def test_import_is_light():
    code = """import sys, llmlab.hub, llmlab.sources
print([name for name in ("torch", "requests", "httpx", "numpy", "huggingface_hub", "tqdm") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
