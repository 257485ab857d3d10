"""Stores that were written: of which GGUF each is, whether that is there, and that only those go which somebody asks for."""

import json
import os
import shutil

import pytest
from offload_files import write

import llmlab
from llmlab import cli
from llmlab.errors import LabError, UnknownName
from llmlab.gguf import read_gguf
from llmlab.offload import kept, store
from llmlab.offload.kept import remove, stores, told
from llmlab.offload.store import kept_store, open_store, write_store


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two stores in llmlab's cache, and the GGUF of each."""
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    files = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        files.append(write(folder, "dense"))
        write_store(files[-1])
    return files


def states() -> dict[str, str]:
    return {os.path.basename(os.path.dirname(one.source)): one.state for one in stores()}


def test_a_store_knows_its_gguf_and_what_became_of_it(here, tmp_path):
    assert states() == {"one": "used", "two": "used"}
    assert [one.bytes for one in stores()] == [one.path.stat().st_size for one in stores()]
    os.utime(here[0].paths[0], (1, 1))
    os.unlink(here[1].paths[0])
    assert states() == {"one": "changed", "two": "gone"}
    kept_store(read_gguf(here[0].paths[0]))         # written anew
    assert states() == {"one": "used", "two": "gone"}


def test_what_may_be_on_a_disk_that_is_not_mounted_is_not_gone(here, tmp_path, monkeypatch):
    away = shutil.move(tmp_path / "one", tmp_path / "elsewhere")
    assert states()["one"] == "away"
    os.mkdir(tmp_path / "one")              # an empty mount point, of another disk than the file was on
    real = os.stat
    monkeypatch.setattr(kept.os, "stat", lambda path, *given, **named: type("Stat", (), {"st_dev": -1})()
                        if str(path) == str(tmp_path / "one") else real(path, *given, **named))
    assert states()["one"] == "away" and remove("gone") == [] and len(stores()) == 2
    monkeypatch.undo()
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    assert states()["one"] == "gone"        # of the same disk
    os.rmdir(tmp_path / "one")
    shutil.move(away, tmp_path / "one")
    assert states() == {"one": "used", "two": "used"}


def test_only_what_is_asked_for_is_removed(here, capsys):
    os.unlink(here[1].paths[0])
    assert "1 of no use any more, as the GGUF is gone: llmlab stores --remove gone frees" in told(stores())
    assert "stores" in dict(llmlab.doctor().sections()) and "--remove gone" in repr(llmlab.doctor())
    assert len(stores()) == 2               # telling removes nothing
    gone = remove("gone")
    assert [one.state for one in gone] == ["gone"] and not gone[0].path.exists() and states() == {"one": "used"}
    open_store(stores()[0].path, here[0]).verify()
    assert "--remove" not in told(stores()) and remove("gone") == []
    with pytest.raises(UnknownName, match="there is no store 'none'"):
        remove("none")
    assert cli.main(["stores"]) == 0 and "its GGUF is here" in capsys.readouterr().out
    assert cli.main(["stores", "--json"]) == 0 and json.loads(capsys.readouterr().out)[0]["state"] == "used"
    assert cli.main(["stores", "--remove", stores()[0].path.name]) == 0 and "1 removed" in capsys.readouterr().out
    assert stores() == [] and told([]) == "" and "stores" not in dict(llmlab.doctor().sections())
    assert cli.main(["stores"]) == 0 and "none in" in capsys.readouterr().out


def test_those_of_an_older_version_and_those_that_are_not_whole(here, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(store, "_sources", lambda file: None)
        write_store(here[0])
    os.truncate(next(one.path for one in stores() if one.source.startswith(str(tmp_path / "two"))), 5000)
    assert sorted(one.state for one in stores()) == ["damaged", "unknown"]
    assert "2 not whole, or of a GGUF that is not known or not found now" in told(stores()) and remove("gone") == []
    assert open_store(next(one.path for one in stores() if one.state == "unknown"), here[0]).pieces


def test_what_cannot_be_removed_is_said(here, monkeypatch):
    monkeypatch.setattr(kept.Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(LabError, match=r"cannot be removed \(Permission denied\)"):
        remove(stores())
