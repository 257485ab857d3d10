"""Opening and closing: fifty times over nothing is left; what goes wrong in the middle is one line, and the next call works."""

import functools
import gc
import os
import re
import shutil
import threading

import pytest
import tiny_chat
import torch
from runtime_models import VOCAB, make

import llmlab
from llmlab.errors import BadFile, LabError
from llmlab.gguf import read_gguf
from llmlab.offload import reading
from llmlab.offload.budget import Budget, OverBudget
from llmlab.offload.opening import open_decoder
from llmlab.offload.pieces import HEAD
from llmlab.offload.placement import Placement
from llmlab.offload.store import write_store
from llmlab.runtime import decoder as decoders
from llmlab.runtime.decoder import Decoder
from llmlab.runtime.generating import Options, stream

CONTEXT = 128
TOKENS = torch.randint(3, VOCAB, (30,), generator=torch.Generator().manual_seed(1)).tolist()
STREAMED = Placement({"blk.1": "ram", "blk.2": "device"}, 2, context=CONTEXT)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    @functools.cache
    def get(name: str = "llama"):
        path = tmp_path_factory.mktemp("opening") / f"{name}.gguf"
        make(name, path, "few", num_hidden_layers=5)
        return path, Decoder.open(path, dtype=torch.float32, strategy="compact", context=CONTEXT).logits(TOKENS)

    return get


@pytest.fixture
def file(made, tmp_path):
    """A copy that may be damaged, and what is expected of it."""
    path, expected = made()
    return shutil.copy(path, tmp_path / "model.gguf"), expected


def opened(path, placement=STREAMED, **settings):
    return open_decoder(path, placement, **{"dtype": torch.float32, **settings})


def said(error: type, path, **settings) -> str:
    """What opening raises, as text: the exception itself would keep what its frames look at."""
    with pytest.raises(error) as caught:
        opened(path, **settings)
    text = str(caught.value)
    del caught
    gc.collect()        # its frames are in a circle with it
    return text


def held() -> tuple[int, int]:
    """Threads and descriptors of this process."""
    return threading.active_count(), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


# ---- nothing is left -----------------------------------------------------------------------------------------

def test_fifty_times_nothing_is_left(made):
    path, _ = made()
    opened(path).close()
    gc.collect()            # what tests before this one left
    before = held()
    for time in range(50):
        decoder = opened(path)
        decoder.read(TOKENS[:3])
        if time % 3:
            decoder.close()
        del decoder         # one that nobody closed goes too
        assert held() == before


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux tells what is resident")
def test_memory_comes_back(made):
    path, _ = made()
    large = Placement(dict.fromkeys(("blk.0", "blk.1", "blk.2", "blk.3", "blk.4", HEAD), "device"), context=CONTEXT)

    def once():
        with opened(path, large) as decoder:
            decoder.read(TOKENS)

    for _ in range(3):
        once()
    before = resident()
    for _ in range(20):
        once()
    assert resident() - before < 3 * 2**20       # of 20 times 3 MiB


def test_an_opening_that_fails_leaves_nothing(file, monkeypatch):
    path, _ = file
    opened(path).close()
    gc.collect()
    before, budget = held(), Budget("20 MiB")
    placements = (Placement({"blk.99": "device"}), Placement({"blk.0": "tape"}), Placement(slots=0), Placement(kv="ssd"),
                  Placement(readers=0, context=CONTEXT), Placement(layout="rows"))
    for error, faulty in ((OverBudget, {"budget": Budget(1000)}), *((LabError, {"placement": one}) for one in placements)):
        assert said(error, path, **faulty).count("\n") == 0
        assert held() == before
    with monkeypatch.context() as patch:
        patch.setattr("llmlab.offload.opening.Handing", lambda *_: 1 / 0)
        said(ZeroDivisionError, path, budget=budget)
    assert held() == before and not budget.lines
    opened(path, budget=budget).close()


def test_closed_it_says_so_and_twice_is_no_harm(made):
    path, _ = made()
    decoder = opened(path)
    decoder.read(TOKENS)
    decoder.close()
    decoder.close()
    for use in (lambda: decoder.read([1]), lambda: decoder.logits([1]), lambda: decoder.read_each([1, 2]), decoder.shift,
                lambda: decoder.keep([1, 2]), decoder.forget, lambda: decoder.save("/dev/null")):
        with pytest.raises(LabError, match="closed; open the model again"):
            use()


# ---- faults --------------------------------------------------------------------------------------------------

def test_a_file_that_changes_is_said_and_the_next_load_works(file):
    path, expected = file
    with opened(path) as decoder:
        decoder.read(TOKENS[:3])
        os.utime(path, (1, 1))
        for _ in range(2):
            with pytest.raises(BadFile, match="has changed since it was opened"):
                decoder.read([5])
    with opened(path) as decoder:
        assert torch.equal(decoder.logits(TOKENS), expected)


@pytest.mark.parametrize("how", ["shorter", "gone", "another"])
def test_a_file_that_vanishes_is_said_and_the_next_load_works(file, how):
    path, expected = file
    whole = open(path, "rb").read()
    with opened(path) as decoder:
        decoder.read(TOKENS[:3])
        if how == "shorter":
            os.truncate(path, len(whole) // 2)
        else:
            os.unlink(path)
            if how == "another":
                open(path, "wb").write(b"GGUF" + bytes(5000))
        with pytest.raises(BadFile, match="changed|does not exist"):
            decoder.read([5])
    open(path, "wb").write(whole)
    with opened(path) as decoder:
        assert torch.equal(decoder.logits(TOKENS), expected)


def test_a_reader_that_fails_is_said_and_the_next_call_works(file, monkeypatch):
    path, expected = file
    with opened(path) as decoder:
        for error, text in ((OSError(5, "Input/output error"), "Input/output error"), (MemoryError("none left"), "none left"),
                            (ZeroDivisionError(), "ZeroDivisionError")):
            with monkeypatch.context() as patch:
                patch.setattr(reading, "_read_at", lambda *_, error=error: (_ for _ in ()).throw(error))
                with pytest.raises(LabError, match=text) as caught:
                    for _ in range(9):
                        decoder.read([5])
                assert "\n" not in str(caught.value)
            assert decoder.tokens == []         # all of it or nothing
            assert torch.equal(decoder.logits(TOKENS), expected)
            decoder.forget()


def test_a_copy_that_fails_is_said_and_the_next_call_works(made, monkeypatch):
    path, expected = made()
    with opened(path) as decoder:
        with monkeypatch.context() as patch:
            patch.setattr("llmlab.offload.moving.np.copyto", lambda *_: 1 / 0)
            with pytest.raises(LabError, match="bringing blk.1 failed"):
                for _ in range(9):
                    decoder.read([5])
        assert torch.equal(decoder.logits(TOKENS), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("DefaultCPUAllocator: not enough memory"), ValueError("?")])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_an_interrupt_in_the_middle_of_a_pass_leaves_nothing_half_done(made, monkeypatch, error, name):
    path, expected = made(name)
    with opened(path) as decoder:
        for layer in range(5):
            with monkeypatch.context() as patch:
                patch.setattr(decoders, "block", failing(decoders.block, layer, error))
                with pytest.raises(BaseException):  # noqa: B017
                    decoder.read(TOKENS)
            assert decoder.tokens == []
            assert torch.equal(decoder.logits(TOKENS), expected)
            decoder.forget()


def failing(work, call: int, error):
    """The same, but that one of the calls raises."""
    calls = iter(range(99))

    def called(*given):
        if next(calls) == call:
            raise error
        return work(*given)

    return called


def test_an_interrupt_while_it_waits(made, monkeypatch):
    path, expected = made()
    with opened(path) as decoder:
        real = reading._read_at
        with monkeypatch.context() as patch:
            patch.setattr(reading, "_read_at", lambda *given: (threading.Event().wait(0.2), real(*given))[1])
            timer = threading.Timer(0.1, __import__("_thread").interrupt_main)
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                for _ in range(99):
                    decoder.read([5])
            timer.join()
        decoder.forget()
        assert torch.equal(decoder.logits(TOKENS), expected)


# ---- what goes on working ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kv", [None, "q8_0"])
def test_saving_recalling_and_shifting_go_on_working(made, tmp_path, kv):
    path, _ = made()
    ordinary = Decoder.open(path, dtype=torch.float32, strategy="compact", context=CONTEXT, kv=kv)
    placement = Placement({"blk.1": "ram"}, 2, context=CONTEXT, kv_types=kv)
    with opened(path, placement) as decoder:
        for one in (ordinary, decoder):
            one.read(TOKENS)
            one.shift()
        decoder.save(tmp_path / "text")
        after = decoder.read([9])
        assert torch.equal(after, ordinary.read([9]))
        decoder.forget()
        assert decoder.recall(tmp_path / "text") == 15
        assert torch.equal(decoder.read([9]), after)
        assert decoder.keep([*decoder.dropped, *decoder.tokens[:5], 3]) and torch.isfinite(decoder.read([3])).all()


def test_a_text_longer_than_the_context_is_refused_as_ever(made):
    path, _ = made()
    with opened(path) as decoder, pytest.raises(LabError, match="the context holds 128"):
        decoder.read(TOKENS * 5)


def test_from_a_store_the_same(made, tmp_path):
    path, expected = made()
    with opened(path, store=write_store(read_gguf(path), tmp_path)) as decoder:
        assert torch.equal(decoder.logits(TOKENS), expected)
        os.utime(next(tmp_path.glob("*.store")), (1, 1))
        with pytest.raises(BadFile, match="has changed"):
            decoder.read([5])


def test_it_says_where_everything_is(made):
    path, _ = made()
    with opened(path) as decoder:
        assert decoder.why.startswith("of 6 pieces 1 stay, 1 come from RAM, 4 come from SSD through 2 slots; ")
        assert decoder.strategy == "compact" and "device: " in repr(decoder.budget) and "ram: " in repr(decoder.budget)
    path, _ = made("mixtral")
    with opened(path, Placement({"blk.1.expert.2": "device"}, expert_slots=3, context=CONTEXT)) as decoder:
        assert "; of 20 experts 1 stay, the others share 3 slots" in decoder.why
        decoder.read(TOKENS)
        assert decoder.experts.stats().total.wanted


# ---- the public face -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    path = tmp_path_factory.mktemp("talking") / "chat.gguf"
    tiny_chat.write(path)
    return path


def test_the_same_text_under_a_budget(talking):
    expected, (ordinary, words) = None, llmlab.decoder(talking, strategy="compact", dtype="float32", device="cpu", context=128)
    for decoder in (ordinary, llmlab.decoder(talking, budget="40 MiB", dtype="float32", device="cpu", context=128)[0],
                    llmlab.decoder(talking, plan=Placement(slots=1, context=128), dtype="float32", device="cpu")[0]):
        text = "".join(stream(decoder, words, "once", Options(temperature=0, max_tokens=12)))
        expected = text if expected is None else expected
        assert text == expected
        if decoder is not ordinary:
            decoder.close()


def test_load_under_a_budget_is_a_transformers_model(talking):
    plain, tokenizer = llmlab.load(talking, dtype="float32", device="cpu", strategy="compact")
    model, _ = llmlab.load(talking, dtype="float32", device="cpu", budget="40 MiB")
    ids = tokenizer("once upon", return_tensors="pt")
    asked = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**ids, **asked), plain.generate(**ids, **asked))
    assert model.trace is model.decoder.trace and model.trace.totals()["compute"].count
    assert model.llmlab.resident_bytes == model.decoder.resident_bytes <= 40 * 2**20
    assert re.search("of .* pieces .* stay", model.llmlab.why)
    model.decoder.close()
    with pytest.raises(LabError, match="closed"):
        model.generate(**ids, **asked)


def test_a_folder_has_no_budget(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LabError, match="for GGUF files"):
        llmlab.load(tmp_path, budget="1 GiB")
