"""A KV cache in RAM: each layer's comes to the device ahead of its turn and goes back, traced, the same to the bit; what goes
wrong on the way is one line, and the next call works."""

import functools
import threading

import pytest
import torch
from runtime_models import VOCAB, make

from llmlab.errors import LabError
from llmlab.gguf import read_gguf
from llmlab.offload import caching
from llmlab.offload.budget import Budget, total
from llmlab.offload.caching import Turns, room_bytes
from llmlab.offload.opening import look, open_decoder
from llmlab.offload.placement import Placement
from llmlab.offload.trace import Trace
from llmlab.runtime import decoder as decoders
from llmlab.runtime.decoder import Decoder

CONTEXT = 128
TOKENS = torch.randint(3, VOCAB, (70,), generator=torch.Generator().manual_seed(1)).tolist()
IN_RAM = Placement({f"blk.{number}": "device" for number in range(5)}, 2, context=CONTEXT, kv="ram")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    @functools.cache
    def get(name: str = "llama"):
        path = tmp_path_factory.mktemp("caching") / f"{name}.gguf"
        make(name, path, "few", num_hidden_layers=5)
        return path, Decoder.open(path, dtype=torch.float32, strategy="compact", context=CONTEXT).read(TOKENS)

    return get


def opened(path, budget=None):
    return open_decoder(path, IN_RAM, budget, dtype=torch.float32)


def cached(decoder) -> list:
    return [event for event in decoder.trace.events if event.kind == "copy" and event.what.startswith("kv ")]


def test_what_comes_and_goes_is_traced(tiny):
    path, _ = tiny()
    with opened(path) as decoder:
        decoder.read(TOKENS[:20])
        decoder.trace.clear()
        decoder.read([5])
        found, shape = cached(decoder), decoder.weights.shapes[0]
        cell = 2 * shape.kv_heads * shape.head_dim * 4
        assert {event.track for event in found} == {"cacher"}
        for number in range(5):         # there, and what is new of it back
            assert [event.bytes for event in found if event.what == f"kv blk.{number}"] == [20 * cell, cell]


def test_of_a_window_what_it_reaches_comes(tiny):
    path, _ = tiny("gemma3")
    with opened(path) as decoder:
        decoder.read(TOKENS[:-1])
        decoder.trace.clear()
        assert torch.equal(decoder.read(TOKENS[-1:]), alone(path))
        windows = [shape.window for shape in decoder.weights.shapes]
        assert any(0 < window < 69 for window in windows)
        for number, (window, shape) in enumerate(zip(windows, decoder.weights.shapes, strict=True)):
            cell = 2 * shape.kv_heads * shape.head_dim * 4
            first = next(event for event in cached(decoder) if event.what == f"kv blk.{number}")
            assert first.bytes == (min(69, window - 1) if window else 69) * cell


def alone(path) -> torch.Tensor:
    """The last token's logits, read alone."""
    decoder = Decoder.open(path, dtype=torch.float32, strategy="compact", context=CONTEXT)
    decoder.read(TOKENS[:-1])
    return decoder.read(TOKENS[-1:])


def test_the_next_layers_cache_is_on_its_way_while_one_computes(tiny, monkeypatch):
    path, _ = tiny()
    with opened(path) as decoder:
        decoder.read(TOKENS[:9])
        begun = []
        real = decoders.block
        monkeypatch.setattr(decoders, "block", lambda *given: begun.append(len(decoder._turns._brought)) or real(*given))
        decoder.read([5])
        assert begun == [2, 3, 4, 5, 5]


def test_where_there_is_room_for_one_it_comes_when_it_is_wanted(tiny):
    path, expected = tiny()
    looked = look(read_gguf(path), IN_RAM, torch.float32)
    ahead, plain = (total(looked.needs(IN_RAM, rooms=rooms)) for rooms in (2, 1))
    assert plain < ahead
    for size, rooms in ((ahead, 2), (plain, 1)):
        with opened(path, Budget(size)) as decoder:
            assert torch.equal(decoder.read(TOKENS), expected)
            assert len(decoder._turns.rooms) == rooms
            tables = sum(tensor.nbytes for pair in decoder.tables for tensor in pair)
            lines = {line.what: line.bytes for line in decoder.budget.lines}
            assert lines["KV cache's turns"] == decoder._turns.bytes + tables


def test_a_copy_that_fails_is_said_and_the_next_call_works(tiny, monkeypatch):
    path, expected = tiny()
    with opened(path) as decoder:
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(caching.np, "copyto", lambda *_: 1 / 0)
                with pytest.raises(LabError, match=r"bringing kv blk\.\d failed \(ZeroDivisionError: .*try again$"):
                    decoder.read([5])
            assert decoder.tokens == []
            assert torch.equal(decoder.read(TOKENS), expected)
            decoder.forget()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("?")])
def test_what_breaks_off_a_pass_leaves_nothing_half_done(tiny, monkeypatch, error):
    path, expected = tiny()
    with opened(path) as decoder:
        for layer in (0, 2, 4):
            calls, real = iter(range(99)), decoders.block
            with monkeypatch.context() as patch:
                patch.setattr(decoders, "block", lambda *given, stop=layer, calls=calls, real=real:
                              (_ for _ in ()).throw(error) if next(calls) == stop else real(*given))
                with pytest.raises(BaseException):  # noqa: B017
                    decoder.read(TOKENS)
            assert decoder.tokens == [] and torch.equal(decoder.read(TOKENS), expected)
            decoder.forget()


@pytest.mark.parametrize("kv", [None, "q8_0"])
def test_guesses_and_shifts_go_on_working(tiny, kv):
    path, _ = tiny("gemma3")
    ordinary = Decoder.open(path, dtype=torch.float32, strategy="compact", context=CONTEXT, kv=kv)
    placement = Placement({"blk.1": "ram"}, 2, context=CONTEXT, kv="ram", kv_types=kv)
    found = []
    with open_decoder(path, placement, dtype=torch.float32) as decoder:
        for one in (ordinary, decoder):
            one.read(TOKENS[:40])
            logits = [one.read_each(TOKENS[40:50])]
            one.keep(TOKENS[:45])
            logits.append(one.read_each(TOKENS[44:60]))
            one.shift()
            logits += [one.read([9])[None], one.logits(TOKENS[:5])]
            found.append(torch.cat(logits))
    assert torch.equal(*found)


def test_no_thread_is_left(tiny):
    path, _ = tiny()
    before = threading.active_count()
    with opened(path) as decoder:
        decoder.read([5])
        assert any(thread.name == "cacher" for thread in threading.enumerate())
    decoder = opened(path)
    decoder.read([5])
    del decoder         # nobody closed it
    assert threading.active_count() == before


def test_rooms_by_themselves():
    """Two kinds of layers in turn: each kind has its own rooms, and what is written in them is at home afterwards."""
    homes = [torch.full((2, 1, cells, 4), float(number)) for number, cells in enumerate((8, 16, 8, 16, 8))]
    turns = Turns(torch.device("cpu"), Trace())
    try:
        for filled in (0, 3, 5):
            turns.start(homes, [0] * 5, filled)
            for number, home in enumerate(homes):
                room = turns.begin(number)
                assert room.data_ptr() != home.data_ptr() and torch.equal(room[:, :, :filled], home[:, :, :filled])
                room[:, :, filled:filled + 2] = 10.0 * filled + number
                turns.end(number, filled, filled + 2)
            turns.finish()
            assert all((home[:, :, filled:filled + 2] == 10.0 * filled + number).all() for number, home in enumerate(homes))
        assert len(turns.rooms) == 4 and turns.bytes == room_bytes(homes) == 2 * (homes[0].nbytes + homes[1].nbytes)
        assert room_bytes(homes[:2]) == homes[0].nbytes + homes[1].nbytes == room_bytes(homes, 1)
    finally:
        turns.close()
        turns.close()
