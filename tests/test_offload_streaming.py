"""Wherever a model's layers live, and through however many slots they come, its logits are the same bits."""

import functools
from collections import Counter

import pytest
import torch
from runtime_models import CASES, MIXES, VOCAB, make

from llmlab.errors import LabError
from llmlab.gguf import read_gguf
from llmlab.offload.moving import Mover, Order
from llmlab.offload.opening import open_decoder
from llmlab.offload.pieces import HEAD, PAGE, Extent, Piece, pieces_of
from llmlab.offload.placement import Placement
from llmlab.offload.reading import buffer
from llmlab.offload.slots import Slots, slot_bytes
from llmlab.offload.trace import Trace
from llmlab.runtime.decoder import Decoder

CONTEXT = 128
TOKENS = torch.randint(3, VOCAB, (70,), generator=torch.Generator().manual_seed(1)).tolist()
FEW = TOKENS[:5]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The path of a case in a mix, and what the ordinary decoder says, both made once."""
    @functools.cache
    def get(name: str = "llama", mix: str = "mixed", kv: str | None = None, **changes):
        path = tmp_path_factory.mktemp("streaming") / f"{name}-{mix}.gguf"
        make(name, path, mix, **changes)
        return path, said(Decoder.open(path, dtype=torch.float32, strategy="compact", context=CONTEXT, kv=kv))

    return get


def said(decoder: Decoder) -> list[torch.Tensor]:
    """Logits of many tokens at once, of single ones after them, and of a text begun with single ones."""
    decoder.forget()
    found = [decoder.logits(TOKENS), *(decoder.read([token]) for token in FEW)]
    decoder.forget()
    return [*found, torch.stack([decoder.read([token]) for token in FEW])]


def same(decoder: Decoder, expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(said(decoder), expected, strict=True))


def where(path, kind: str) -> dict[str, str]:
    names = list(pieces_of(read_gguf(path)))
    if kind == "mixed":
        return {name: ("ssd", "device", "ram")[number % 3] for number, name in enumerate(names)}
    return dict.fromkeys(names, kind)


# ---- exactness -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CASES)
def test_every_architecture_gives_the_same_bits_wherever_its_layers_live(tiny, name):
    path, expected = tiny(name)
    for kind, slots, direct in (("device", 1, False), ("ssd", 2, True), ("mixed", 1, False)):
        placement = Placement(where(path, kind), slots, expert_slots=2, direct=direct, context=CONTEXT)
        with open_decoder(path, placement, dtype=torch.float32) as decoder:
            assert same(decoder, expected), (kind, slots)


@pytest.mark.parametrize("kind", ["device", "ram", "ssd", "mixed"])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("direct", [False, True])
def test_tiers_slots_and_ways_to_read_change_nothing(tiny, kind, slots, direct):
    path, expected = tiny(num_hidden_layers=5)
    with open_decoder(path, Placement(where(path, kind), slots, direct=direct, readers=3, context=CONTEXT),
                      dtype=torch.float32) as decoder:
        assert same(decoder, expected)
        assert same(decoder, expected)          # and again, with what lies in the slots by then


@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_gives_the_same_bits(tiny, mix):
    path, expected = tiny("qwen3", mix)         # its output is the embedding
    with open_decoder(path, Placement(where(path, "mixed"), 2, context=CONTEXT), dtype=torch.float32) as decoder:
        assert same(decoder, expected)


@pytest.mark.parametrize("kv", ["q8_0", "f16"])
def test_a_packed_cache_too(tiny, kv):
    path, expected = tiny("gemma3", "Q8_0", kv)
    with open_decoder(path, Placement(slots=2, context=CONTEXT, kv_types=kv), dtype=torch.float32) as decoder:
        assert same(decoder, expected)


@pytest.mark.parametrize("kv", [None, "q8_0"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_cache_in_ram_too(tiny, name, kv):
    path, expected = tiny(name, "Q8_0", kv)
    placement = Placement(where(path, "mixed"), 2, context=CONTEXT, kv_types=kv, kv="ram")
    with open_decoder(path, placement, dtype=torch.float32) as decoder:
        assert same(decoder, expected)
        lines = {(line.tier, line.what): line.bytes for line in decoder.budget.lines}
        tables = sum(tensor.nbytes for pair in decoder.tables for tensor in pair)
        assert lines["device", "KV cache's turns"] == decoder._turns.bytes + tables
        assert lines["ram", "KV cache"] == sum(t.nbytes for cache in decoder.caches for t in (cache.tensors if kv else [cache]))


def test_half_precision_too(tiny):
    path, _ = tiny()
    expected = said(Decoder.open(path, dtype=torch.bfloat16, strategy="compact", context=CONTEXT))
    with open_decoder(path, Placement(where(path, "mixed"), 2, context=CONTEXT), dtype=torch.bfloat16) as decoder:
        assert same(decoder, expected)


# ---- several tokens, each layer once -------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt-oss", "phi3-longrope", "qwen2", "qwen3", "starcoder2"])
@pytest.mark.parametrize("kv", [None, "q8_0"])
def test_reading_each_is_reading_one_after_another(tiny, name, kv):
    path, _ = tiny(name)
    ordinary = Decoder.open(path, dtype=torch.float32, strategy="compact", context=CONTEXT, kv=kv)
    ordinary.read(TOKENS[:60])
    expected = torch.stack([ordinary.read([token]) for token in TOKENS[60:]])
    after = ordinary.read([7])
    with open_decoder(path, Placement(slots=2, expert_slots=2, context=CONTEXT, kv_types=kv), dtype=torch.float32) as streamed:
        for decoder in (ordinary, streamed):
            decoder.forget()
            decoder.read(TOKENS[:60])
            assert torch.equal(decoder.read_each(TOKENS[60:]), expected)        # phi3's text becomes a long one on the way
            assert torch.equal(decoder.read([7]), after)
            assert decoder.tokens == [*TOKENS, 7]


def test_reading_each_from_nothing(tiny):
    path, expected = tiny()
    decoder = Decoder.open(path, dtype=torch.float32, strategy="compact")
    assert torch.equal(decoder.read_each(FEW), expected[-1])
    with pytest.raises(LabError, match="nothing to read"):
        decoder.read_each([])


def test_reading_each_asks_for_each_layer_once(tiny):
    path, _ = tiny(num_hidden_layers=5)
    with open_decoder(path, Placement(slots=2, context=CONTEXT), dtype=torch.float32) as decoder:
        decoder.read(FEW)
        decoder.parts.settle()
        before = decoder.trace.totals()["read"].bytes
        decoder.read_each(FEW)
        decoder.parts.settle()
        several = decoder.trace.totals()["read"].bytes - before
        decoder.read([3])
        decoder.parts.settle()
        one = decoder.trace.totals()["read"].bytes - before - several
    assert several == one > 0


# ---- what is brought, and when -------------------------------------------------------------------------------

def test_each_pass_reads_what_does_not_stay_and_no_more(tiny):
    path, _ = tiny(num_hidden_layers=5)
    pieces, placed = pieces_of(read_gguf(path)), {"blk.1": "device", "blk.3": "ram"}
    with open_decoder(path, Placement(placed, 2, context=CONTEXT), dtype=torch.float32) as decoder:
        decoder.read(FEW)
        decoder.parts.settle()
        decoder.trace.clear()
        for token in FEW:
            decoder.read([token])
        decoder.parts.settle()
        reads = Counter(event.what for event in decoder.trace.events if event.kind == "read")
        totals = decoder.trace.totals()
    assert reads["blk.4"] == reads["head"] == len(FEW)
    assert len(FEW) <= reads["blk.0"] + 1 and reads["blk.0"] <= len(FEW)     # the first was read before, the next one is by now
    assert set(reads) == {"blk.0", "blk.2", "blk.4", "head"}
    assert totals["copy"].bytes == len(FEW) * pieces["blk.3"].bytes
    assert totals["compute"].count == len(FEW) * 6
    assert len(decoder.trace.passes) == len(FEW)


def test_a_prompt_in_pieces_reads_the_head_once(tiny, monkeypatch):
    from llmlab.runtime import decoder as decoders

    monkeypatch.setattr(decoders, "_PIECE", 16)
    path, _ = tiny(num_hidden_layers=5)
    expected = Decoder.open(path, dtype=torch.float32, strategy="compact").read(TOKENS)
    with open_decoder(path, Placement(slots=2, context=CONTEXT), dtype=torch.float32) as decoder:
        assert torch.equal(decoder.read(TOKENS), expected)
        decoder.parts.settle()
        reads = [event.what for event in decoder.trace.events if event.kind == "read"]
    assert reads.count("head") == 1 and reads.count("blk.2") == 5


def test_the_next_layers_are_read_while_one_computes(tiny):
    path, _ = tiny(num_hidden_layers=5)
    with open_decoder(path, Placement(slots=3, context=CONTEXT), dtype=torch.float32) as decoder:
        decoder.read(TOKENS)
        handing = iter(decoder.weights.layers)
        next(handing)
        orders = [order.piece.name for order in decoder.parts.slots._orders]
        assert orders == ["blk.0", "blk.1", "blk.2"]
        next(handing)
        assert [order.piece.name for order in decoder.parts.slots._orders] == ["blk.3", "blk.1", "blk.2"]
        handing.close()
        decoder.parts.settle()


def test_across_the_end_of_a_pass_the_next_one_is_begun(tiny):
    path, _ = tiny(num_hidden_layers=5)
    with open_decoder(path, Placement(slots=2, context=CONTEXT), dtype=torch.float32) as decoder:
        decoder.read([5])
        assert {order.piece.name for order in decoder.parts.slots._orders} == {"blk.0", "blk.1"}


def test_as_many_slots_as_pieces_are_filled_once(tiny):
    path, expected = tiny()
    with open_decoder(path, Placement(slots=9, context=CONTEXT), dtype=torch.float32) as decoder:
        assert same(decoder, expected)
        decoder.parts.settle()
        names = {event.what for event in decoder.trace.events if event.kind == "read"}
        assert decoder.trace.totals()["read"].count == len(names)


# ---- slots by themselves -------------------------------------------------------------------------------------

def piece(name: str, bytes: int) -> Piece:
    return Piece(name, bytes, (), (Extent(0, 0, bytes, 0),))


def test_a_slot_is_as_large_as_the_largest_of_its_own():
    pieces = [piece("blk.0", 3 * PAGE), piece("blk.1", PAGE), piece("blk.2", 2 * PAGE), piece(HEAD, 5 * PAGE)]
    assert slot_bytes(pieces, 2) == [3 * PAGE, 5 * PAGE]
    assert slot_bytes(pieces, 3) == [5 * PAGE, PAGE, 2 * PAGE]
    assert slot_bytes(pieces, 9) == [3 * PAGE, PAGE, 2 * PAGE, 5 * PAGE]


@pytest.fixture
def held():
    """A mover whose pieces are all in RAM, each full of its number."""
    made = {name: buffer(PAGE).fill_(number) for number, name in enumerate(["blk.0", "blk.1", "blk.2", "blk.3", HEAD])}
    mover = Mover(None, dict(made), torch.device("cpu"), [], Trace())
    yield mover
    mover.close()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_every_step_finds_its_piece(held, count):
    pieces = [piece(name, PAGE) for name in held.held]
    slots = Slots(pieces, count, 5, buffer, held, Trace())
    for head in (True, False, True, True, False):
        for step in range(5 if head else 4):
            slots.turn(step, head)
            assert slots.buffers[pieces[step].name].unique().tolist() == [step]
        slots.rest()


def test_a_pass_that_is_broken_off_leaves_the_next_one_right(held):
    pieces = [piece(name, PAGE) for name in held.held]
    slots = Slots(pieces, 2, 5, buffer, held, Trace())
    for broken in range(5):
        for step in range(broken):
            slots.turn(step)
        slots.settle()
        for step in range(5):
            slots.turn(step)
            assert slots.buffers[pieces[step].name].unique().tolist() == [step]


def test_an_order_that_was_never_begun_is_begun_when_things_are_settled(held, monkeypatch):
    """As an interrupt between two lines would leave it."""
    pieces = [piece(name, PAGE) for name in held.held]
    slots = Slots(pieces, 2, 5, buffer, held, Trace())
    with monkeypatch.context() as patch:
        patch.setattr(held, "bring", lambda order: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            slots.turn(0)
    slots.settle()
    slots.turn(0)
    assert slots.buffers["blk.0"].unique().tolist() == [0]


def test_closed_it_tells_whoever_waits(held):
    held.close()
    order = Order(piece("blk.0", PAGE), buffer(PAGE))
    held.bring(order)
    with pytest.raises(LabError, match="closed"):
        order.wait()
