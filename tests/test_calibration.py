"""This machine, measured in small: real rounds with little time; files that are broken, runs that are interrupted."""

import dataclasses
import errno
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llmlab import calibrated, hardware
from llmlab.calibrated import Calibration, Figure
from llmlab.errors import LabError
from llmlab.units import GIB, MIB

torch = pytest.importorskip("torch")
from llmlab import calibration  # noqa: E402
from llmlab.calibration import card, disk, rates, timing  # noqa: E402


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def quiet(done, text):
    pass


def made(facts=None, **changes) -> Calibration:
    """A calibration as if measured: 8 threads, one card."""
    facts = facts or calibrated.machine_facts("A CPU", 8, 8, 32 * GIB, ["RTX 3060"], "550")
    figures = (
        Figure("ram", "cpu", "read", 2e10, 2.1e10, 2.2e10, "B/s", 5, "a sum", threads=1),
        Figure("ram", "cpu", "read", 4e10, 4.4e10, 4.5e10, "B/s", 5, "a sum", threads=8),
        Figure("decode", "cpu", "int8", 1e10, 1.1e10, 1.2e10, "B/s", 5, "one row", threads=8),
        Figure("matmul", "cpu", "bfloat16", 4e11, 5e11, 5.1e11, "op/s", 5, "512 rows", threads=8),
        Figure("matmul", "gpu0", "fp8", 4e13, 5e13, 5.1e13, "op/s", 5, "512 rows"),
        Figure("memory", "gpu0", "read", 3e11, 3.3e11, 3.4e11, "B/s", 5, "a sum"),
        Figure("copy", "gpu0", "h2d_pinned", 2e10, 2.4e10, 2.5e10, "B/s", 5, "256 MiB"),
        Figure("context", "gpu0", "context", 2e8, 2e8, 2e8, "B", 1, "seen"),
        Figure("context", "gpu0", "kernels", 1e8, 1e8, 1e8, "B", 1, "seen"),
        Figure("context", "gpu0", "workspace", 8e6, 8e6, 8e6, "B", 1, "seen"),
        Figure("disk", "disk", "buffered", 1e9, 2e9, 3e9, "B/s", 3, "a file", threads=1, cold=True, resident=0.0),
        Figure("disk", "disk", "mmap", 5e9, 6e9, 7e9, "B/s", 3, "a file", threads=4, cold=False, resident=1.0))
    return Calibration(**dict(
        machine_id=calibrated.machine_id(facts), date="2026-11-22T10:00:00+00:00", seconds=25.0, versions={"torch": "2.13"},
        facts=facts, cores=8, load=0.1, others=0.0, figures=figures, skipped=(("gpu0 int4", "too old"),)) | changes)


# -- the real thing, in small ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One real calibration of five seconds, and all that was said meanwhile."""
    folder, said = tmp_path_factory.mktemp("cache"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMLAB_CACHE", str(folder))
        here, before = hardware.machine(), (torch.get_num_threads(), torch.get_rng_state())
        assert here.calibration is None and here.calibration_note is None
        found = here.calibrate(5, progress=lambda done, text: said.append((done, text)))
        yield SimpleNamespace(found=found, here=here, said=said, folder=folder, again=hardware.machine(),
                              report=hardware.doctor(), before=before)


def test_this_machine_is_measured(run):
    found = run.found
    assert found.ram_read and found.find("ram", threads=1) and found.matmul["float32"] and found.decode["float32"]
    assert found.disk or any(name == "disk" for name, _ in found.skipped)
    assert found.cores == run.here.cpu.threads and found.versions["torch"] == torch.__version__
    for figure in found.figures:
        assert 0 <= figure.low <= figure.best <= figure.high and figure.rounds >= 1 and figure.how
        assert figure.low > 0 or figure.part == "together"      # nothing may hide behind computing, for a moment
    # Every type and method is either there or said to be missing.
    said = " ".join(name + why for name, why in found.skipped)
    assert all(kind in found.matmul or kind in said for kind in rates.TYPES)
    assert all(any(f.method == method for f in found.disk) or "disk" in said for method in disk.METHODS)


def test_it_is_stored_and_read_back(run):
    assert run.again.calibration == run.found == run.here.calibration
    assert [p.name for p in (run.folder / "calibration").iterdir() if not p.name.endswith("lock")] == [
        f"{run.found.machine_id}.json"]
    assert json.loads(json.dumps(run.again.to_dict(), allow_nan=False))["calibration"]["answer"] == run.found.answer
    text = repr(run.report)
    assert run.found.day in text and "RAM read" in text and "llmlab doctor --calibrate" not in text
    assert run.report.to_dict()["calibration"]["figures"][0]["part"] == "ram"


def test_progress_only_grows_and_ends(run):
    shares = [done for done, _ in run.said]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert {"RAM", "CPU", "disk"} <= {text.partition(":")[0] for _, text in run.said}


def test_the_caller_s_threads_and_random_numbers_are_as_before(run):
    threads, state = run.before
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.gpu
def test_the_cards_are_measured(cache):
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    found = hardware.machine().calibrate(20, progress=False)
    assert found.device_bandwidth[0].best > found.copies[0, "h2d_pinned"].best > 0
    assert found.rates("matmul", "gpu0")["float16"].best > found.matmul["float32"].best
    assert all(50 * MIB < size < 3 * GIB for size in found.context_bytes.values()) and found.context_bytes


# -- rates -------------------------------------------------------------------------------------------------------------


def test_rounds_stop_in_time_and_are_at_least_three():
    calls = []
    assert len(timing.rounds(lambda: calls.append(1), 10.0)) == timing.MOST == len(calls) - 1  # the first is not counted
    assert len(timing.rounds(lambda: time.sleep(0.01), 0.03)) == 3
    assert len(timing.rounds(lambda: time.sleep(0.02), 0.0)) == 1  # three times too slow: what there is
    assert timing.rate(6.0, [1.0, 3.0, 2.0]) == (2.0, 3.0, 6.0)


@pytest.fixture
def one_second(monkeypatch):
    """Every round takes a second, so that a rate is the work that was counted."""
    def rounds(call, seconds, least=3, most=9):
        call()
        return [1.0]

    monkeypatch.setattr(timing, "rounds", rounds)
    monkeypatch.setattr(rates, "rounds", rounds)


def test_the_work_is_counted_right(one_second, monkeypatch):
    monkeypatch.setattr(rates, "_matrices", lambda device, room, one: 2)
    figures, skipped = rates.multiply("cpu", "cpu", ("float32", "int4"), 1, GIB, 60.0, quiet)
    work = {(f.part, f.name): f.best for f in figures}
    assert skipped == [] and all(f.threads == 1 for f in figures)
    assert work["matmul", "float32"] == work["matmul", "int4"] == 2 * 512 * 4096 * 4096
    assert work["decode", "float32"] == 2 * 4 * 4096 * 4096
    assert work["decode", "int4"] == 2 * 4096 * 4096 * (1 / 2 + 2 * 2 / rates.GROUP)  # a scale and a zero of 2 bytes a group


def test_a_slow_type_is_measured_with_fewer_rows_and_that_is_said():
    class Slow:
        def input(self, rows):
            return torch.empty(rows, 1)

        def __call__(self, x, weights):
            time.sleep(len(x) * 1e-4)  # 51 ms for 512 rows

    figure = rates._many("cpu", "cpu", "int8", Slow(), (), "slow", 1, 1, 0.1)
    assert figure.how.startswith("128 rows (512 would take too long)")
    assert 0.4 < figure.best / (2 * 4096 * 4096 / 1e-4) <= 1


@pytest.mark.parametrize("error", [RuntimeError("no kernel\nstack"), NotImplementedError("no kernel"),
                                   AttributeError("no kernel"), rates.NotHere("no kernel")])
def test_an_operation_that_is_not_there_is_skipped_with_a_reason(monkeypatch, error):
    def refuse(device, height):
        raise error

    monkeypatch.setitem(rates._PREPARE, "int4", refuse)
    figures, skipped = rates.multiply("cpu", "cpu", ("int4",), 1, GIB, 1.0, quiet)
    assert figures == [] and skipped[0][0] == "cpu int4" and skipped[0][1].endswith("no kernel")


def test_ram_is_read_by_each_number_of_threads_where_there_is_enough():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        figures, skipped = rates.ram((1, 2), 4 * GIB, 0.2, quiet)
        assert {f.name for f in rates.multiply("cpu", "cpu", ("float32", "int4"), 1, 4 * GIB, 1.0, quiet)[0]} >= {"float32"}
    finally:
        torch.set_default_dtype(before)
    assert [f.threads for f in figures] == [1, 2] and skipped == []
    assert all(1e8 < f.low for f in figures) and "of float32" in figures[0].how
    figures, skipped = rates.ram((1,), 100 * MIB, 0.2, quiet)
    assert figures == [] and "too little" in skipped[0][1]
    figures, skipped = rates.multiply("cpu", "cpu", rates.TYPES, 1, 100 * MIB, 1.0, quiet)
    assert figures == [] and "100.00 MiB of memory are free" in skipped[0][1]


def test_the_last_cache_is_counted_once_a_group_of_cores(tmp_path):
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3")):
        for index, level, size in ((0, 1, "32K"), (3, 3, "16M")):
            place = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            place.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (place / name).write_text(f"{text}\n")
    if sys.platform != "darwin":
        assert rates.last_cache(tmp_path) == 32 * MIB and rates.last_cache(tmp_path / "no") is None


# -- the disk ----------------------------------------------------------------------------------------------------------


def cold_place(folder: Path) -> bool:
    """Whether a file here can leave the page cache: not so on tmpfs, nor where the system has no call for it."""
    path = folder / "probe"
    path.write_bytes(bytes(MIB))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    share = disk.drop(str(path), MIB)
    path.unlink()
    return share is not None and share < disk.COLD


def test_the_disk_is_read_by_every_method(tmp_path):
    figures, skipped = disk.measure(tmp_path, "unknown", 1.5, quiet, most=32 * MIB)
    *figures, hidden = figures
    assert (hidden.part, hidden.unit) == ("together", "share") and 0 <= hidden.low <= hidden.best <= hidden.high <= 1
    assert hidden.how.startswith("buffered, ") or hidden.how.startswith("direct, ")
    assert {(f.method, f.threads) for f in figures} | {
        (m, t) for m in disk.METHODS for t in disk.THREADS if any(m in name + why for name, why in skipped)} == {
        (m, t) for m in disk.METHODS for t in disk.THREADS}
    assert list((tmp_path / "calibration").iterdir()) == []
    for f in figures:
        assert f.low > 0 and (f.cold is None) == (f.resident is None)
        assert f.resident is None or f.cold == (f.resident < disk.COLD)
    if cold_place(tmp_path):
        assert all(f.cold for f in figures)


def test_however_late_one_read_is_done_and_the_others_named(tmp_path):
    (figure,), skipped = disk.measure(tmp_path, "unknown", 0.0, quiet)
    assert (figure.method, figure.threads, figure.rounds) == ("buffered", 1, 1) and "a file of 4.00 MiB" in figure.how
    assert "mmap, 8 threads" in dict(skipped)["disk"]


@pytest.mark.skipif(os.name != "posix", reason="mincore is a POSIX thing")
def test_what_is_in_the_page_cache_is_seen(tmp_path):
    path, cold = tmp_path / "file", cold_place(tmp_path)
    path.write_bytes(bytes(8 * MIB))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        assert disk.residency(file.fileno(), 8 * MIB) == 1.0
        assert disk.drop(str(path), 8 * MIB) == (0.0 if cold else 1.0)
        file.read(MIB)
        assert 0.1 < disk.residency(file.fileno(), 8 * MIB) < 0.9 or not cold


def model(folder: Path, size: int) -> Path:
    path = folder / "models" / "x" / "y.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(random.Random(1).randbytes(size))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


def test_a_model_that_is_there_is_read_instead_and_left_as_it_is(tmp_path):
    path = model(tmp_path, 17 * MIB + 5)
    before = path.read_bytes()
    figures, _ = disk.measure(tmp_path, "nvme", 0.6, quiet, most=16 * MIB)
    assert figures and all("a model of 17.00 MiB; nvme disk" in f.how for f in figures)
    assert path.read_bytes() == before and not (tmp_path / "calibration").exists()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="only where a page cache can be emptied")
def test_a_model_that_somebody_has_mapped_is_left_for_a_file_that_is_cold(tmp_path):
    path, cold = model(tmp_path, 16 * MIB), cold_place(tmp_path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as area:
        held = np.frombuffer(area, np.uint8)
        held[::mmap.PAGESIZE].sum()
        assert disk.drop(str(path), 16 * MIB) > 0.9
        figures, _ = disk.measure(tmp_path, "unknown", 0.6, quiet, most=16 * MIB)
        del held
    assert figures and all("a file of" in f.how and f.cold == cold for f in figures if f.part == "disk")


def test_where_the_page_cache_cannot_be_emptied_reads_are_called_warm(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    figures, skipped = disk.measure(tmp_path, "unknown", 0.6, quiet, most=16 * MIB)
    assert figures and "no call that empties" in dict(skipped)["disk, cold"]
    if os.name == "posix":
        assert all(f.cold is False and f.resident > 0.9 for f in figures if f.part == "disk")
        assert "warm (100.0% of it in the page cache before)" in made(figures=tuple(figures)).lines()[0]
    monkeypatch.setattr(disk, "residency", lambda descriptor, size: None)
    figures, _ = disk.measure(tmp_path, "unknown", 0.3, quiet, most=16 * MIB)
    assert all(f.cold is None for f in figures) and "cannot be seen" in made(figures=tuple(figures)).table


def test_every_byte_is_read_once_a_round(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * MIB))
    for method in ("buffered", "mmap"):
        read, took, at = disk._round(str(path), method, 3, 4 * MIB, MIB, 2, 60.0)
        assert (read, at) == (4 * MIB, 2) and took > 0  # it began at the third chunk and went round the end
    read, _, at = disk._round(str(path), "buffered", 2, 4 * MIB, MIB, 0, 0.0)
    assert read == at * MIB == 2 * MIB  # out of time: one chunk a thread


def test_tmpfs_is_no_disk(tmp_path):
    figures, ((name, why),) = disk.measure(tmp_path, "memory", 1.0, quiet)
    assert figures == [] and name == "disk" and "lies in RAM" in why


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.os, "fsync", full)
    figures, ((_, why),) = disk.measure(tmp_path, "ssd", 1.0, quiet, most=16 * MIB)
    assert figures == [] and "is full; free some" in why and "\n" not in why
    assert list((tmp_path / "calibration").iterdir()) == []
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * MIB))
    figures, ((_, why),) = disk.measure(tmp_path, "ssd", 1.0, quiet)
    assert figures == [] and "100.00 MiB free" in why


def test_a_slow_disk_gets_a_smaller_file(tmp_path, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(disk.os, "fsync", lambda descriptor: (time.sleep(0.2), fsync(descriptor)))
    figures, _ = disk.measure(tmp_path, "hdd", 1.2, quiet)
    assert figures and all("a file of 8.00 MiB" in f.how or "a file of 4.00 MiB" in f.how for f in figures)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    figures, ((_, why),) = disk.measure(tmp_path / "file", "ssd", 1.0, quiet)
    assert figures == [] and "file" in why


def test_a_file_system_without_direct_reads_is_measured_without(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_no_direct", lambda path: "this file system refuses O_DIRECT (Invalid argument)")
    figures, skipped = disk.measure(tmp_path, "ssd", 0.8, quiet, most=16 * MIB)
    assert {f.method for f in figures if f.part == "disk"} == {"buffered", "mmap"} and skipped[0] == (
        "disk, direct", "this file system refuses O_DIRECT (Invalid argument)")


def test_a_read_that_fails_in_a_thread_is_said(tmp_path, monkeypatch):
    def broken(holder, chunk):
        def touch(offset):
            raise OSError(errno.EIO, "Input/output error")
        return touch

    monkeypatch.setattr(disk, "_toucher", broken)
    figures, ((_, why),) = disk.measure(tmp_path, "ssd", 0.8, quiet, most=16 * MIB)
    assert figures == [] and "Input/output error" in why
    assert list((tmp_path / "calibration").iterdir()) == []


def test_a_named_file_goes_too_where_the_system_has_none_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.sys, "platform", "other")
    figures, _ = disk.measure(tmp_path, "ssd", 0.6, quiet, most=16 * MIB)
    assert figures and list((tmp_path / "calibration").iterdir()) == []
    left, young = (tmp_path / "calibration" / f".reading-{name}" for name in ("old", "young"))
    left.write_text("killed")
    young.write_text("somebody's")
    os.utime(left, (1, 1))
    disk.measure(tmp_path, "ssd", 0.6, quiet, most=16 * MIB)
    assert list((tmp_path / "calibration").iterdir()) == [young]


@pytest.mark.skipif(sys.platform != "linux", reason="files without a name are Linux's")
@pytest.mark.parametrize("step", ["writing", "buffered"])
def test_a_killed_process_leaves_nothing(tmp_path, step):
    code = ("import sys, time; from pathlib import Path; from llmlab.calibration import disk\n"
            "def say(done, text):\n    print(text, flush=True)\n    time.sleep(0.01)\n"
            f"disk.measure(Path({str(tmp_path)!r}), 'ssd', 30.0, say, most=64 * 2**20)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                          cwd=Path(__file__).parent.parent) as child:
        assert any(step in line for line in child.stdout)
        child.send_signal(signal.SIGKILL)
    assert list((tmp_path / "calibration").iterdir()) == []


# -- interrupted, twice at once, stored --------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["RAM", "CPU: bfloat16", "disk: writing", "disk: buffered, 2"])
def test_an_interrupted_run_leaves_the_calibration_before_it(cache, at, monkeypatch):
    if at.startswith("disk"):  # come to it in time
        monkeypatch.setattr(rates, "ram", lambda *given: ([], []))
        monkeypatch.setattr(rates, "multiply", lambda *given: ([], []))
    here = hardware.machine()
    before = made(here.facts)
    path = calibrated.store(before)
    text = path.read_bytes()

    def stop(done, said):
        if said.startswith(at):
            raise KeyboardInterrupt

    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        here.calibrate(2, progress=stop)
    assert path.read_bytes() == text and hardware.machine().calibration == before
    assert {p.name for p in path.parent.iterdir()} <= {path.name, ".lock"}
    assert torch.get_num_threads() == threads
    with calibration._alone(quiet) as waited:
        assert not waited  # the lock is free again


@pytest.mark.parametrize("stopped", [False, True])
def test_the_second_of_two_waits_and_takes_what_the_first_stored(cache, monkeypatch, stopped):
    here = hardware.machine()
    old, new, own = (made(here.facts, seconds=seconds) for seconds in (1.0, 2.0, 3.0))
    calibrated.store(old)
    monkeypatch.setattr(calibration, "_measure", lambda *given: own)
    held, said = threading.Event(), []

    def first():
        with calibration._alone(quiet):
            held.set()
            while not said:  # until the second one waits
                time.sleep(0.01)
            if not stopped:
                calibrated.store(new)

    one = threading.Thread(target=first)
    one.start()
    held.wait()
    found = here.calibrate(2, progress=lambda done, text: said.append(text))
    one.join()
    assert found == (own if stopped else new) == hardware.machine().calibration and "waiting for it" in said[0]


def test_many_writers_and_readers_never_see_half_a_file(cache):
    here, wrong, stop = hardware.machine(), [], threading.Event()
    calibrated.store(made(here.facts))

    def write(seconds):
        while not stop.is_set():
            calibrated.store(made(here.facts, seconds=seconds))

    def read():
        for _ in range(60):
            found, note = calibrated.read(here.facts)
            if found is None or found.seconds not in (1.0, 2.0, 25.0):
                wrong.append(note)
        stop.set()

    workers = [threading.Thread(target=write, args=(s,)) for s in (1.0, 2.0)] + [threading.Thread(target=read)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == [] and len(list(calibrated.folder().iterdir())) == 1


def test_a_cache_that_cannot_be_written_costs_what_is_kept_not_the_answer(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "file" / "x"))
    monkeypatch.setattr(rates, "ram", lambda *given: (list(made().figures[:2]), []))
    monkeypatch.setattr(rates, "multiply", lambda *given: ([], []))
    here, said = hardware.machine(), []
    found = here.calibrate(2, progress=lambda done, text: said.append(text))
    assert found == here.calibration and found.ram_read and dict(found.skipped)["disk"]
    assert "not stored" in said[-1] and "LLMLAB_CACHE" in said[-1]
    assert hardware.machine().calibration is None


@pytest.mark.parametrize("change", [
    lambda d: "", lambda d: "{", lambda d: "[]", lambda d: "null", lambda d: "\x00" * 100, lambda d: "[" * 100_000,
    lambda d: json.dumps(d)[:-40], lambda d: json.dumps(d | {"version": 99}), lambda d: json.dumps(d | {"machine_id": "x"}),
    lambda d: json.dumps(d | {"figures": 3}), lambda d: json.dumps(d | {"figures": [{}]}),
    lambda d: json.dumps(d | {"date": "x"}), lambda d: json.dumps(d | {"cores": "many"}),
    lambda d: json.dumps(d | {"load": "high"}),
    lambda d: json.dumps(d | {"versions": []}), lambda d: json.dumps(d | {"skipped": [["x"]]}),
    *(lambda d, edit=edit: json.dumps(d | {"figures": [d["figures"][0] | edit]}) for edit in (
        {"low": -1}, {"low": float("nan")}, {"high": 1.0}, {"best": "fast"}, {"unit": "GB/s"}, {"part": "x"}, {"threads": "2"},
        {"device": "gpuX"}, {"name": None}, {"cold": "yes"}, {"rounds": None}, {"low": True}, {"resident": -1},
        {"how": 5}, {"high": float("inf")}, {"low": 0}, {"device": "tpu0"}))])
def test_a_broken_file_is_ignored_and_the_doctor_says_so(cache, change):
    here = hardware.machine()
    path = calibrated.store(made(here.facts))
    path.write_text(change(json.loads(path.read_text())))
    again = hardware.machine()
    assert again.calibration is None and str(path) in again.calibration_note and "ignored" in again.calibration_note
    report = dict(hardware.Doctor(again, None, ()).sections())
    assert again.calibration_note in report["measured"] and "llmlab doctor --calibrate" in report["measured"]


def test_bytes_changed_anywhere_never_raise(cache):
    facts, chance = hardware.machine().facts, random.Random(2)
    path = calibrated.store(made(facts))
    whole = path.read_bytes()
    for _ in range(400):
        text = bytearray(whole)
        for _ in range(chance.choice((1, 3, 30))):
            text[chance.randrange(len(text))] = chance.randrange(256)
        path.write_bytes(text)
        found, note = calibrated.read(facts)
        assert (found is None) == (note is not None)
        if found:
            assert found.table and found.answer and found.to_dict()


def test_another_card_is_another_machine(cache):
    facts = calibrated.machine_facts("A CPU", 8, 8, 32 * GIB, ["RTX 3060"], "550")
    calibrated.store(made(facts))
    assert calibrated.read(facts) == (made(facts), None)
    assert calibrated.read(facts | {"cards": ["RTX 3090"], "driver": "560"}) == (
        None, "the stored calibration is of this processor with other cards and driver")
    assert calibrated.read(facts | {"cpu": "B"}) == (None, None)
    # What a new kernel keeps of the RAM for itself does not make it one.
    assert calibrated.machine_facts("A CPU", 8, 8, 32 * GIB - 50 * MIB, ["RTX 3060"], "550") == facts


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "10", True, None, 1e9])
def test_a_time_that_is_none_is_refused(cache, seconds):
    with pytest.raises(LabError, match="give a number from 1"):
        hardware.machine().calibrate(seconds)


def test_without_torch_the_remedy_is_named(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmlab.calibration", None)
    monkeypatch.delattr(sys.modules["llmlab"], "calibration")
    with pytest.raises(LabError, match="pip install torch"):
        hardware.machine().calibrate()


# -- what is said ------------------------------------------------------------------------------------------------------


def test_what_others_read_of_it():
    found = made()
    assert found.ram_read == (4e10, 4.4e10, 4.5e10) and found.decode_bytes == (1e10, 1.1e10, 1.2e10)
    assert found.matmul == {"bfloat16": (4e11, 5e11, 5.1e11)} and found.rates("matmul", "gpu0").keys() == {"fp8"}
    assert found.copies == {(0, "h2d_pinned"): (2e10, 2.4e10, 2.5e10)} and found.device_bandwidth[0].best == 3.3e11
    assert found.context_bytes == {"RTX 3060": 300_000_000} and found.workspace_bytes == {"RTX 3060": 8_000_000}
    assert [(f.method, f.threads, f.cold) for f in found.disk] == [("buffered", 1, True), ("mmap", 4, False)]
    assert found.find("ram", threads=1).best == 2.1e10 and found.find("ram", threads=3) is None
    assert "44.0 GB/s by 8 threads" in found.answer and "2.0 GB/s cold (buffered, 1 thread)" in found.answer
    assert "2026-11-22" in found.answer and found.answer.count(". ") == 0
    assert "cold (0.0% of it in the page cache before)" in found.table and "measured" in found.table
    assert any(line.startswith("disk read, mmap, warm (100.0%") for line in found.lines())
    assert "gpu0 int4: too old" in found.table and "<td" in found._repr_html_()


def test_a_card_s_part_may_be_missing():
    empty = made(figures=(), facts={"cards": []})
    assert (empty.ram_read, empty.decode_bytes, empty.matmul, empty.copies, empty.context_bytes, empty.disk) == (
        None, None, {}, {}, {}, ())
    assert empty.answer == "Measured 2026-11-22: nothing."


@pytest.mark.parametrize(("changes", "says"), [
    ({"others": 3.0}, "other processes kept 3.0 of 8 cores busy"), ({"load": 4.5}, "load of 4.5 on 8 cores"),
    ({"figures": (Figure("ram", "cpu", "read", 1e10, 1.5e10, 2e10, "B/s", 3, "", threads=8),)}, "differ by 2.0 times")])
def test_a_busy_machine_is_said(changes, says):
    assert made().busy is None and made(load=None, others=None).busy is None
    assert says in made(**changes).busy and says in made(**changes).answer


def test_other_versions_than_those_measured_with_are_said():
    here = dataclasses.replace(hardware.machine(), calibration=made(versions={"torch": "1.0"}))
    assert "with torch 1.0, not what is here now" in repr(hardware.Doctor(here, None, ()))


def test_progress_in_a_terminal_is_a_line_a_step(capsys):
    with calibration._shown(None) as say:
        for done, text in ((0.0, "RAM: 1"), (0.01, "RAM: 2"), (0.12, "RAM: 2"), (0.13, "CPU: int4"), (1.0, "done")):
            say(done, text)
    assert capsys.readouterr().err.split("\n") == [
        "calibrating   0%  RAM: 1", "calibrating  12%  RAM: 2", "calibrating  13%  CPU: int4", "calibrating 100%  done", ""]
    with calibration._shown(False) as say:
        say(0.5, "x")
    assert capsys.readouterr().err == ""


def test_progress_in_a_notebook_is_a_bar(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel="a kernel")))
    with calibration._shown(None) as say:
        say(0.25, "RAM: 1 thread")
        bar = say.__closure__[0].cell_contents
        assert bar.n == 25 and "RAM: 1 thread" in bar.desc
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert calibration._notebook_bar() is None


def test_hardware_reads_a_calibration_without_torch(cache):
    calibrated.store(made(hardware.machine().facts))
    code = ("import sys, llmlab.hardware as h; m = h.machine();"
            "print(m.calibration.day, repr(h.doctor())[:0], {'torch', 'numpy', 'filelock'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.stdout.strip() == "2026-11-22  set()", done.stderr


# -- cards, without one ------------------------------------------------------------------------------------------------

GOOD = {"figures": [dataclasses.asdict(f) for f in made().figures if f.device == "gpu0"], "skipped": [["gpu0 fp8", "old"]],
        "cards": 1}


def cards(*vendors, build="cuda 13.0"):
    named = tuple(SimpleNamespace(vendor=v, name=f"{v} card") for v in vendors)
    return SimpleNamespace(cards=named, torch_build=build)


def answering(monkeypatch, code: str):
    monkeypatch.setattr(calibration, "_CARD", (sys.executable, "-c", code))


def test_what_the_cards_process_prints_is_taken(monkeypatch):
    answering(monkeypatch, "import os; print('noise'); print('{\"done\": 0.5, \"text\": \"gpu0: copies\"}');"
                           f"assert os.environ['CUDA_DEVICE_ORDER'] == 'PCI_BUS_ID'; print({json.dumps(GOOD)!r})")
    said = []
    figures, skipped = calibration._cards(cards("NVIDIA"), 5.0, lambda done, text: said.append((done, text)))
    assert tuple(figures) == tuple(f for f in made().figures if f.device == "gpu0")
    assert skipped == [("gpu0 fp8", "old")] and said == [(0.5, "gpu0: copies")]
    figures, skipped = calibration._cards(cards("NVIDIA", "AMD", build="rocm 6.4"), 5.0, quiet)
    assert {f.device for f in figures} == {"gpu1"} and "cannot compute on NVIDIA card" in skipped[0][1]
    _, skipped = calibration._cards(cards("NVIDIA", "NVIDIA"), 5.0, quiet)
    assert ("cards", "torch sees 1 of the 2 NVIDIA cards here") in skipped


@pytest.mark.parametrize(("code", "says"), [
    ("raise SystemExit('CUDA error: out of memory')", "CUDA error: out of memory"), ("import sys; sys.exit(3)", "code 3"),
    ("print('[]'); print('{}')", "ended early")])
def test_a_cards_process_that_fails_is_a_reason(monkeypatch, code, says):
    answering(monkeypatch, code)
    figures, ((name, why),) = calibration._cards(cards("NVIDIA"), 5.0, quiet)
    assert figures == [] and name == "cards" and says in why


@pytest.mark.parametrize("first", ["", GOOD])
def test_a_cards_process_that_hangs_is_given_up_and_what_it_found_is_kept(monkeypatch, first):
    answering(monkeypatch, f"import time; print({json.dumps(first)!r}, flush=True); time.sleep(60)")
    monkeypatch.setattr(calibration, "_GRACE", -4.2)
    figures, skipped = calibration._cards(cards("NVIDIA"), 5.0, quiet)
    assert skipped[-1] == ("cards", "they did not end in 1 s") and len(figures) == len(GOOD["figures"]) * bool(first)


def test_a_torch_that_cannot_use_the_card_says_so():
    assert calibration._cards(cards("NVIDIA", build="cpu"), 5.0, quiet) == (
        [], [("cards", "this torch (cpu) cannot compute on NVIDIA card, so it was not measured")])


def test_the_cards_process_answers_without_a_card():
    done = subprocess.run([*calibration._CARD, "2"], capture_output=True, text=True, cwd=Path(__file__).parent.parent,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "figures": [], "skipped": [["cards", "torch can use no card here"]], "cards": 0}


@pytest.fixture
def pretend(monkeypatch):
    """The code for cards, run on the CPU: two "cards" of one name with 512 MiB free."""
    monkeypatch.setattr(card, "_device", lambda index: "cpu")
    monkeypatch.setattr(card, "_wait", lambda index: None)
    monkeypatch.setattr(card, "_free", lambda index: GIB // 2)
    monkeypatch.setattr(card.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(card.torch.cuda, "get_device_name", lambda index: "Twin")
    monkeypatch.setattr(card, "CARD_TYPES", ("float32",))


def test_copies_and_rates_of_two_cards_of_one_name(pretend, monkeypatch):
    monkeypatch.setattr(card, "_context", lambda index: ([], [("context", "not here")]))
    said, saved = [], []
    card.measure(1.0, lambda done, text: said.append(done), lambda *given: saved.append(given))
    figures, skipped = saved[-1]
    have = {(f.device, f.part, f.name) for f in figures}
    for device, other in (("gpu0", "gpu1"), ("gpu1", "gpu0")):
        assert {(device, "copy", name) for name in ("d2d", "h2d_pageable", "d2h_pageable", f"p2p_{other}")} <= have
        assert {(device, "memory", "read"), (device, "matmul", "float32"), (device, "decode", "float32")} <= have
    assert all(f.low > 0 for f in figures) and said == sorted(said)
    assert any("a second Twin" in why for _, why in skipped)
    if not torch.cuda.is_available():  # pinning needs a driver, and its absence is said
        assert ("gpu0 pinned copies" in dict(skipped)) != (("gpu0", "copy", "h2d_pinned") in have)


POPEN = subprocess.Popen


def context(monkeypatch, free: list[int], code: str | None = None):
    child = code or ("import sys\nprint('{\"reserved\": 2097152}', flush=True); sys.stdin.readline()\n"
                     "print('{\"reserved\": 23068672, \"workspace\": 8519680}', flush=True); sys.stdin.readline()")
    left = iter(free)
    monkeypatch.setattr(card.subprocess, "Popen", lambda command, **more: POPEN([sys.executable, "-c", child], **more))
    monkeypatch.setattr(card, "_free", lambda index: next(left))
    figures, skipped = card._context(0)
    return {f.name: f.rate for f in figures}, skipped


def test_what_a_first_context_takes_is_seen_from_outside(pretend, monkeypatch):
    # 300 MiB with 2 MiB of torch's in it; then 60 MiB more, of which torch reserves 20
    found, skipped = context(monkeypatch, [8000 * MIB, 7700 * MIB, 7640 * MIB, 7999 * MIB])
    assert skipped == [] and found["context"] == (297 * MIB, 298 * MIB, 299 * MIB)  # 1 MiB did not come back
    assert found["kernels"] == (39 * MIB, 40 * MIB, 41 * MIB) and found["workspace"] == (8519680,) * 3
    found, ((_, why),) = context(monkeypatch, [8000 * MIB, 7700 * MIB, 7640 * MIB, 7000 * MIB])
    assert found == {} and "other programs" in why
    found, ((_, why),) = context(monkeypatch, [8000 * MIB] * 4, "raise SystemExit(1)")
    assert found == {} and "failed" in why
