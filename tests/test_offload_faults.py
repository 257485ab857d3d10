"""Whatever goes wrong while a model streams: one clear error, nothing half-done, the next call is right, nothing stays behind.

The parts have their own faults in their own tests (store, reading, experts); here it is the whole, fifty times over.
"""

import contextlib
import gc
import os
import random
import re
import signal
import sys
import threading
import time
from pathlib import Path

import billion
import numpy as np
import pytest
import runtime_models
import torch

from llmlab.errors import BadFile, LabError
from llmlab.gguf import read_gguf
from llmlab.offload import moving, opening, reading
from llmlab.offload.opening import open_decoder
from llmlab.offload.pieces import PAGE
from llmlab.offload.placement import Placement
from llmlab.offload.store import open_store, write_store
from llmlab.runtime.decoder import Decoder

LINUX = os.path.isdir("/proc/self/fd")
needs_proc = pytest.mark.skipif(not LINUX, reason="reads /proc")
SMALL = billion.CONFIG | {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 512, "num_attention_heads": 4,
                          "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128}
TOKENS = [11, 47, 203, 5, 99]
EXPERTS = [f"blk.{layer}.expert.{expert}" for layer in range(2) for expert in range(4)]
PLACES = {
    "ssd": Placement({"blk.1": "device"}, 1, readers=1, context=64),
    "mixed": Placement({"blk.0": "device", "blk.2": "ram", "blk.4": "ram"}, 2, readers=3, direct=True, context=64),
    "experts": Placement(dict.fromkeys(EXPERTS[::2], "ram"), 2, expert_slots=3, context=64)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    runtime_models.make("mixtral", folder / "experts.gguf", "Q8_0")
    return {"layers": billion.write(folder / "layers.gguf", "Q8_0", SMALL), "experts": folder / "experts.gguf"}


@pytest.fixture(scope="module")
def right(files):
    """What the ordinary decoder says."""
    return {name: says(Decoder.open(path, strategy="compact", context=64)) for name, path in files.items()}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 16 * PAGE)


def file_of(name: str) -> str:
    return "experts" if name == "experts" else "layers"


def says(model) -> torch.Tensor:
    """The logits of the same text again, from its beginning: after a prompt and after a token more."""
    model.forget()
    return torch.stack([model.read(TOKENS), model.read([7])])


def held() -> tuple[int, int]:
    """Descriptors and threads."""
    return len(os.listdir("/proc/self/fd")) if LINUX else 0, threading.active_count()


def anonymous() -> int:
    """MiB of memory that is this process's own."""
    if not LINUX:
        return 0
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) // 1024


def no_more(before: tuple[int, int]) -> bool:
    """Whether no more is held than before, once the garbage is gone."""
    if any(now > then for now, then in zip(held(), before, strict=True)):
        gc.collect()
    return all(now <= then for now, then in zip(held(), before, strict=True))


@pytest.fixture(autouse=True)
def nothing_left():
    before = held()
    yield
    assert no_more(before), (held(), before)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


class Nth:
    """Calls `plain` but for the n-th call from `arm` on, which calls `instead` first. Threads may call it."""

    def __init__(self, plain, instead):
        self.plain, self.instead, self.left, self.lock = plain, instead, None, threading.Lock()

    def arm(self, n: int | None) -> None:
        self.left = n

    def __call__(self, *given, **more):
        with self.lock:
            now = self.left == 0
            if self.left is not None:
                self.left -= 1
        if now:
            self.instead()
        return self.plain(*given, **more)


def broken() -> None:
    raise RuntimeError("broken")


def unreadable() -> None:
    raise OSError(5, "Input/output error")


def interrupt() -> None:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


# ---- in the middle of a pass ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PLACES)
def test_fifty_faults_in_the_middle_of_a_pass(files, right, monkeypatch, name):
    """A reader that raises, a disk that fails, a copy that raises, computing that raises, an interrupt: at any chunk, piece or
    product."""
    chosen, place = random.Random(name), PLACES[name]
    faults = {"a reader raises": Nth(reading._read_at, broken), "the disk fails": Nth(reading._read_at, unreadable),
              "an interrupt": Nth(reading._read_at, interrupt)}
    copies = Nth(np.copyto, broken)

    class Numpy:
        copyto = copies

    with open_decoder(files[file_of(name)], place) as model:
        expected = right[file_of(name)]
        assert torch.equal(says(model), expected)
        computing = Nth(model.multiply, broken)
        model.multiply = computing
        stops = Nth(computing, interrupt)
        before, memory, seen = None, 0, {}
        for turn in range(54):
            if turn == 4:                      # the first ones warm things up
                before, memory = held(), anonymous()
            fault = (*faults, "a copy raises", "computing raises", "an interrupt while computing")[turn % 6]
            nth = {"a copy raises": copies, "computing raises": computing, "an interrupt while computing": stops}.get(fault)
            with monkeypatch.context() as patch:
                if fault in faults:
                    nth = faults[fault]
                    patch.setattr(reading, "_read_at", nth)
                elif fault == "a copy raises":
                    patch.setattr(moving, "np", Numpy)
                elif fault == "an interrupt while computing":
                    patch.setattr(model, "multiply", stops)
                nth.arm(chosen.randrange(8))
                outcome = "fine"
                try:
                    says(model)
                    time.sleep(0)              # a signal that came last is seen here
                except (LabError, KeyboardInterrupt) as error:
                    outcome, text = type(error).__name__, str(error)
                    assert "\n" not in text and len(text) < 400
                    assert model.tokens == []  # all or nothing
                except RuntimeError as error:
                    outcome = f"{error}"
                finally:
                    nth.arm(None)
            seen.setdefault(fault, set()).add(outcome)
            if outcome == "fine":              # it may have come when the next pass was begun ahead: whoever needs that is told
                with contextlib.suppress(LabError):
                    says(model)
            assert torch.equal(says(model), expected), (turn, fault, outcome)
        assert no_more(before) and anonymous() - memory < 16
    assert seen["computing raises"] <= {"broken", "fine"} and "KeyboardInterrupt" in seen["an interrupt while computing"]
    assert "LabError" in seen["a reader raises"] and "BadFile" in seen["the disk fails"]
    assert "KeyboardInterrupt" in seen["an interrupt"] and (name == "ssd" or "LabError" in seen["a copy raises"])


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that interrupt")
@pytest.mark.parametrize("name", ["mixed", "experts"])
def test_fifty_interrupts_at_any_moment(files, right, name, monkeypatch):
    """By a timer, wherever Python is just then: once, or as somebody does who presses the keys again and again."""
    chosen, place, left, ignored = random.Random(name), PLACES[name], 0, []
    # One that comes while Python deletes an object is said and ignored, whoever wrote the code; pytest takes the next one,
    # which finds its hook at work, for a failure.
    monkeypatch.setattr(sys, "unraisablehook", lambda said: ignored.append(said.exc_type))

    def press(_, frame):
        nonlocal left
        while frame is not None and frame.f_code is not says.__code__:         # the test itself is not to be interrupted
            frame = frame.f_back
        if left and frame is not None:
            left -= 1
            raise KeyboardInterrupt

    plain = signal.signal(signal.SIGALRM, press)
    try:
        with open_decoder(files[file_of(name)], place) as model:
            expected = right[file_of(name)]
            assert torch.equal(says(model), expected)
            start = time.perf_counter()
            says(model)
            took, interrupted, before = time.perf_counter() - start, 0, held()
            for turn in range(50):
                left = chosen.choice((1, 1, 3, 5))
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + chosen.random() * took, chosen.choice((1e-4, 1e-3, 5e-3)))
                try:
                    says(model)
                except KeyboardInterrupt:
                    interrupted += 1
                left = 0
                assert torch.equal(says(model), expected), turn
            assert interrupted >= 10 and no_more(before) and set(ignored) <= {KeyboardInterrupt}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, plain)


# ---- opening and closing --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["mixed", "experts"])
def test_fifty_openings_that_go_wrong(files, right, monkeypatch, name):
    """Memory that is not there, a thread that does not start, a reader that raises, an interrupt: wherever it happens, nothing
    stays, and the next opening works."""
    chosen, place, path = random.Random(name), PLACES[name], files[file_of(name)]
    with open_decoder(path, place) as model:
        model.read(TOKENS)
    starts, reads = threading.Thread.start, reading._read_at
    before, memory, failed = None, 0, {}
    for turn in range(54):
        if turn == 4:
            before, memory = held(), anonymous()
        fault = ("memory", "a thread", "a reader raises", "an interrupt")[turn % 4]
        with monkeypatch.context() as patch:
            if fault == "memory":
                nth = Nth(reading.buffer, lambda: (_ for _ in ()).throw(LabError("the system gives no buffer of 5 bytes")))
                patch.setattr(opening, "buffer", nth)
            elif fault == "a thread":
                nth = Nth(starts, lambda: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
                patch.setattr(threading.Thread, "start", lambda thread, nth=nth: nth(thread))
            else:
                nth = Nth(reads, broken if fault == "a reader raises" else interrupt)
                patch.setattr(reading, "_read_at", nth)
            nth.arm(chosen.randrange(5))
            try:
                with open_decoder(path, place):
                    time.sleep(0.001)          # an interrupt that came last is seen here
            except (LabError, KeyboardInterrupt) as error:
                assert "\n" not in str(error)
                failed[fault] = failed.get(fault, 0) + 1
    assert no_more(before) and anonymous() - memory < 16
    assert set(failed) == {"memory", "a thread", "a reader raises", "an interrupt"}
    with open_decoder(path, place) as model:
        assert torch.equal(says(model), right[file_of(name)])


@needs_proc
def test_fifty_models_opened_and_closed_leave_nothing(files, right):
    """By `close`, as a context, forgotten, forgotten with a layer handed out, twice."""
    memory, before = 0, None
    for turn in range(54):
        if turn == 4:
            before, memory = held(), anonymous()
        model = open_decoder(files["layers"], PLACES["mixed"])
        assert torch.equal(model.read(TOKENS), right["layers"][0])
        if turn % 4 == 0:
            model.close()
            model.close()
        elif turn % 4 == 1:
            with model:
                pass
        elif turn % 4 == 2:
            handed = iter(model.weights.layers)
            next(handed)
            del handed
        del model
    assert no_more(before) and anonymous() - memory < 16


def test_who_closes_while_another_reads_harms_nobody(files):
    for turn in range(10):
        model, outcome = open_decoder(files["layers"], PLACES["ssd"]), []

        def work(model=model, outcome=outcome):
            try:
                for _ in range(200):
                    model.read([7])
                    if len(model.tokens) > 50:
                        model.forget()
            except Exception as wrong:
                outcome.append(wrong)

        reader = threading.Thread(target=work)
        reader.start()
        time.sleep(0.003 * turn)
        model.close()
        reader.join(20)
        assert not reader.is_alive() and [type(error) for error in outcome] in ([], [LabError]), outcome
        with pytest.raises(LabError, match="closed"):
            model.read(TOKENS)


# ---- the file -------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def copied(path: Path, folder: Path):
    """A file of its own, and its bytes."""
    mine, data = folder / "mine.gguf", path.read_bytes()
    mine.write_bytes(data)
    yield mine, data
    mine.unlink(missing_ok=True)


@pytest.mark.parametrize("change", ["cut", "gone", "overwritten", "replaced"])
def test_a_file_that_changes_under_a_running_model(files, right, tmp_path, monkeypatch, change):
    """Before a pass and in the middle of one: an error that names the file, no crash; and the next load works."""
    for middle in (False, True):
        with copied(files["layers"], tmp_path) as (path, data):
            def spoil(path=path, data=data):
                if change == "cut":
                    os.truncate(path, len(data) // 2)
                elif change == "gone":
                    path.unlink()
                elif change == "overwritten":
                    with open(path, "r+b") as file:
                        file.seek(len(data) // 2)
                        file.write(bytes(1000))
                else:
                    other = path.with_suffix(".new")
                    other.write_bytes(data[::-1])
                    os.replace(other, path)

            nth = Nth(reading._read_at, spoil)
            monkeypatch.setattr(reading, "_read_at", nth)
            with open_decoder(path, PLACES["ssd"]) as model:
                assert torch.equal(says(model), right["layers"])
                if middle:
                    nth.arm(3)
                else:
                    spoil()
                with pytest.raises(BadFile, match=r"mine\.gguf") as error:
                    says(model)
                assert "\n" not in str(error.value)
                nth.arm(None)
                with pytest.raises(BadFile, match=r"mine\.gguf"):
                    model.read([7])            # it stays an error: what it held of the file is not to be trusted
            monkeypatch.setattr(reading, "_read_at", nth.plain)
            path.write_bytes(data)
            with open_decoder(path, PLACES["ssd"]) as model:
                assert torch.equal(says(model), right["layers"])


# ---- the store ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PLACES)
def test_a_flipped_bit_is_an_error_wherever_its_piece_lives(files, right, tmp_path, name):
    """In any piece that is read, on any tier: nothing wrong is computed with. Written anew all is well."""
    file, place, chosen = read_gguf(files[file_of(name)]), PLACES[name], random.Random(name)
    store = write_store(file, tmp_path)
    with open_decoder(file, place, store=store) as model:
        assert torch.equal(says(model), right[file_of(name)])
        read = sorted({event.what for event in model.trace.events if event.kind == "read"})
    for damaged in chosen.sample(read, 4):
        piece = store.pieces[damaged]
        tensor = chosen.choice(piece.tensors)
        flip(store.path, piece.extents[0].offset + tensor.offset + chosen.randrange(tensor.bytes), 1 << chosen.randrange(8))
        with pytest.raises(BadFile, match=f"{re.escape(store.path.name)}.*{damaged}"), \
                open_decoder(file, place, store=open_store(store.path, file)) as model:
            says(model)
        store = write_store(file, tmp_path)
    with open_decoder(file, place, store=store) as model:
        assert torch.equal(says(model), right[file_of(name)])


def flip(path: Path, at: int, bits: int) -> None:
    """Change some bits of a byte."""
    with open(path, "r+b") as raw:
        raw.seek(at)
        byte = raw.read(1)[0]
        raw.seek(at)
        raw.write(bytes([byte ^ bits]))


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on file sizes here")
def test_a_disk_that_is_full_while_weights_are_laid_out_anew(files, tmp_path):
    """What compiled code takes: an error that names the file, nothing left, and with more room it is there."""
    import resource

    from llmlab.offload import words
    file, limits = read_gguf(files["layers"]), resource.getrlimit(resource.RLIMIT_FSIZE)
    before, size = held(), sum(words.piece_bytes(file).values())
    for share in (0.01, 0.3, 0.9, 1.0):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), limits[1]))
            with pytest.raises(LabError, match=r"layers.*\.store cannot be written .*free some space"):
                words.kept(file, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == [] and no_more(before)
    words.kept(file, tmp_path).verify()


def test_a_file_that_is_none_or_damaged_leaves_nothing_open(files, tmp_path):
    data, path = files["layers"].read_bytes(), tmp_path / "damaged.gguf"
    for size in (0, 10, 1000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(LabError, match=r"damaged\.gguf"):
            open_decoder(path, PLACES["ssd"])
    with pytest.raises(LabError):
        open_decoder(tmp_path / "nowhere.gguf", PLACES["ssd"])
    assert read_gguf(files["layers"]).sources
