"""Fast mode: what lies in RAM is computed there. On a processor nothing changes but that nothing is copied; with another
arithmetic, as beside a card, logits deviate by what is said, and prompts are computed exactly."""

import functools

import pytest
import torch
from runtime_models import VOCAB, make

from llmlab.errors import LabError
from llmlab.gguf import read_gguf
from llmlab.kernels import pack
from llmlab.offload.aside import Aside, Deviation, in_ram
from llmlab.offload.budget import Budget, OverBudget, total
from llmlab.offload.choosing import opened
from llmlab.offload.opening import look, open_decoder
from llmlab.offload.pieces import HEAD, pieces_of
from llmlab.offload.placement import Placement
from llmlab.runtime.decoder import Decoder, multiply, multiply_each

CONTEXT = 128
TOKENS = torch.randint(3, VOCAB, (70,), generator=torch.Generator().manual_seed(1)).tolist()
FEW = TOKENS[:5]
SAME, OTHER = Aside(torch.float32), Aside(torch.bfloat16)      # the processor's arithmetic is the device's; is another


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The path of a case, and what the ordinary decoder says, both made once."""
    @functools.cache
    def get(name: str = "llama", mix: str = "mixed", kv: str | None = None, layers: int = 5):
        path = tmp_path_factory.mktemp("aside") / f"{name}-{mix}.gguf"
        make(name, path, mix, num_hidden_layers=layers)
        return path, said(Decoder.open(path, dtype=torch.float32, strategy="compact", context=CONTEXT, kv=kv))

    return get


def said(decoder: Decoder) -> list[torch.Tensor]:
    """Logits of many tokens at once, of single ones after them, of some more, of a text begun with single ones."""
    decoder.forget()
    found = [decoder.logits(TOKENS), *(decoder.read([token]) for token in FEW), decoder.logits(TOKENS[:9])]
    decoder.forget()
    return [*found, torch.stack([decoder.read([token]) for token in FEW])]


def same(decoder: Decoder, expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(said(decoder), expected, strict=True))


def placed(path, **settings) -> Placement:
    """Every other piece in RAM, the head among them."""
    names = [*pieces_of(read_gguf(path))]
    where = dict.fromkeys(names[::2], "ram") | {HEAD: "ram"}
    return Placement(where, **{"slots": 2, "expert_slots": 2, "context": CONTEXT, "mode": "fast", **settings})


def fast(path, aside: Aside | None = None, budget=None, **settings):
    return open_decoder(path, placed(path, **settings), budget, dtype=torch.float32, aside=aside)


def copies(decoder) -> set[str]:
    decoder.parts.settle()
    return {event.what for event in decoder.trace.events if event.kind == "copy"}


# ---- on a processor --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "slots"), [("llama", 1), ("gemma3", 2), ("qwen3moe", 3)])
def test_on_a_processor_logits_are_the_same_and_nothing_is_copied(tiny, name, slots):
    path, expected = tiny(name)
    with fast(path, slots=slots) as decoder:
        assert same(decoder, expected) and same(decoder, expected)
        assert not copies(decoder) and decoder.trace.totals()["read"].count
        assert not any(thread.name == "copier" for thread, _ in decoder.parts.mover.threads)
        assert decoder.deviation(FEW) == Deviation(len(FEW), kind="exact")


def test_with_a_packed_cache_in_ram_too(tiny):
    path, expected = tiny("gemma3", "mixed", "q8_0")
    for aside in (None, SAME):
        with fast(path, aside, kv_types="q8_0", kv="ram") as decoder:
            assert same(decoder, expected)


def test_no_slot_is_needed_for_what_is_computed_in_ram(tiny):
    path, _ = tiny()
    pieces = pieces_of(read_gguf(path))
    everything = dict.fromkeys(pieces, "ram")
    with open_decoder(path, Placement(everything, 2, context=CONTEXT, mode="fast"), dtype=torch.float32) as decoder:
        lines = {line.what: line.bytes for line in decoder.budget.lines}
        assert "slots" not in lines and lines["layers in RAM"] == sum(piece.bytes for piece in pieces.values())
        assert decoder.parts.slots.bytes == 0 and len(decoder.read(FEW))
        assert decoder.strategy == "compact in fast mode"
        assert decoder.why.startswith("fast mode: RAM layers computed where they lie; the same arithmetic here")


# ---- beside another device -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "slots"), [("llama", 1), ("llama", 2), ("llama", 3), ("gemma3", 2), ("qwen3moe", 2)])
def test_few_tokens_there_and_many_here_with_one_arithmetic(tiny, name, slots):
    """Passes of both kinds in turn, through the same slots."""
    path, expected = tiny(name)
    with fast(path, SAME, slots=slots) as decoder:
        assert same(decoder, expected) and same(decoder, expected)
        assert copies(decoder)


def test_another_arithmetic_deviates_for_few_tokens_alone(tiny):
    path, expected = tiny()
    with fast(path, OTHER) as decoder:
        found = said(decoder)
        assert torch.equal(found[0], expected[0])           # a prompt of 70 comes to the device
        for one, other in zip(found[1:], expected[1:], strict=True):
            assert not torch.equal(one, other) and (one - other).abs().max() < 0.1 * other.abs().max()
        assert same(decoder, found)                         # and always in the same way
        assert "in bfloat16 by the processor, for up to 31 tokens at once; logits deviate" in decoder.why
        assert decoder.strategy == "compact in fast mode"


def test_what_is_computed_in_ram_is_copied_for_prompts_alone(tiny):
    path, _ = tiny()
    in_ram = {name for name, tier in placed(path).where.items() if tier == "ram"}
    with fast(path, SAME, slots=1) as decoder:
        decoder.read(TOKENS)
        assert copies(decoder) == in_ram
        decoder.trace.clear()
        for token in FEW:
            decoder.read([token])
        decoder.read_each(TOKENS[:40])
        assert not copies(decoder)
        assert {event.what for event in decoder.trace.events if event.kind == "read"} == {"blk.1", "blk.3"}


def test_what_is_read_is_read_ahead_through_all_slots(tiny):
    """Though layers in RAM lie between those that are read."""
    path, _ = tiny()
    with fast(path, SAME) as decoder:
        decoder.read([5])
        assert {order.piece.name for order in decoder.parts.slots._orders} == {"blk.1", "blk.3"}


@pytest.mark.parametrize(("name", "kv"), [("llama", None), ("llama", "q8_0"), ("qwen3moe", None)])
def test_reading_each_is_reading_one_after_another(tiny, name, kv):
    """Of more tokens than are few, too, so that guesses change nothing."""
    path, _ = tiny(name)
    with fast(path, OTHER, kv_types=kv) as decoder:
        decoder.read(TOKENS[:30])
        expected = torch.stack([decoder.read([token]) for token in TOKENS[30:]])
        decoder.forget()
        decoder.read(TOKENS[:30])
        assert torch.equal(decoder.read_each(TOKENS[30:]), expected)


def test_experts_in_ram_are_used_there(tiny):
    path, _ = tiny("qwen3moe")
    experts = {name: "ram" for name in pieces_of(read_gguf(path)) if ".expert." in name}
    for aside in (None, SAME):
        placement = Placement(experts, 2, expert_slots=2, context=CONTEXT, mode="fast")
        with open_decoder(path, placement, dtype=torch.float32, aside=aside) as decoder:
            for token in FEW:
                decoder.read([token])
            stats = decoder.experts.stats()
            assert stats.total.wanted == stats.total.pinned > 0 and stats.bytes == 0 and not copies(decoder)
            decoder.read(TOKENS)
            assert bool(copies(decoder)) == (aside is not None)
            slots = [line.bytes for line in decoder.budget.lines if line.what == "expert slots"]
            assert slots == ([] if aside is None else [sum(slot.nbytes for slot in decoder.experts._slots)])


def test_a_matrix_in_ram_is_multiplied_in_its_own_dtype():
    generator = torch.Generator().manual_seed(0)
    packed = pack(torch.randint(0, 60, (48, 34), generator=generator, dtype=torch.uint8), "Q8_0", "compact", torch.float32)
    x = torch.randn(3, 32, generator=generator)
    there = in_ram(packed, OTHER)
    expected = multiply(x.bfloat16(), packed).float()
    assert multiply(x, there).dtype == torch.float32 and torch.equal(multiply(x, there), expected)
    assert torch.equal(multiply_each(x, there), torch.cat([multiply(row, there) for row in x.split(1)]))
    assert in_ram(packed, None) is packed and in_ram(7, OTHER) == 7 and "in RAM, in bfloat16" in there.why


# ---- how far -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_the_deviation_is_what_two_decoders_differ_by(tiny, name):
    path, _ = tiny(name)
    exact = Decoder.open(path, dtype=torch.float32, strategy="compact", context=CONTEXT)
    theirs = torch.stack([exact.read([token]) for token in TOKENS[:12]]).double()
    with fast(path, OTHER) as decoder:
        found = decoder.deviation(TOKENS[:12])
        ours = torch.stack([decoder.read([token]) for token in TOKENS[:12]]).double()
        assert found.most == float((ours - theirs).abs().max()) > 0 and found.tokens == 12
        kld = torch.nn.functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True)
        assert found.kld == pytest.approx(float(kld.sum(-1).mean()), rel=1e-6)
        assert found.worst == pytest.approx(float(kld.sum(-1).max()), rel=1e-6)
        assert "logits deviate by" in str(found) and "(measured)" in str(found)
        assert decoder.experts is None or decoder.experts.few == OTHER.few
        assert not any("logits" in line.what for line in decoder.budget.lines)
    with fast(path, SAME) as decoder:
        assert decoder.deviation(FEW) == Deviation(len(FEW))
    with fast(path, OTHER, mode="exact") as decoder, pytest.raises(LabError, match="exact mode"):
        decoder.deviation(FEW)


# ---- budgets, names ----------------------------------------------------------------------------------------------------

def test_budgets_count_what_is_held(tiny):
    path, expected = tiny()
    looked = look(read_gguf(path), placed(path), torch.float32, aside=SAME)
    lines = looked.needs(placed(path))
    working = next(line for line in lines if line.what == "workspace in RAM")
    assert working.tier == "ram" and working.kind == "modelled"
    budget = Budget(total(lines), total(lines, "ram"))
    with fast(path, SAME, budget) as decoder:
        assert torch.equal(torch.stack([decoder.read([token]) for token in FEW]), expected[-1])
        assert next(line.bytes for line in decoder.budget.lines if line.what == "slots") == decoder.parts.slots.bytes
    with pytest.raises(OverBudget, match="in RAM"):
        fast(path, SAME, Budget(None, total(lines, "ram") - 1))


def test_by_a_budget_and_by_a_plan(tiny):
    path, expected = tiny()
    file = read_gguf(path)
    least = total(look(file, Placement(context=CONTEXT), torch.float32).least(Placement(context=CONTEXT)))
    with opened(file, Budget(least, "64 MiB"), dtype=torch.float32, context=CONTEXT, mode="fast",
                device=torch.device("cpu")) as decoder:
        assert "fast mode: RAM layers" in decoder.why and set(decoder.placement.where.values()) == {"ram"}
        assert same(decoder, expected) and not copies(decoder)
    with opened(file, least, dtype=torch.float32, context=CONTEXT, mode="fast", device=torch.device("cpu")) as decoder:
        assert "nothing lies in RAM" in decoder.why and decoder.strategy == "compact"
    plan = type("Plan", (), {"placement": placed(path)})()
    with opened(file, plan=plan, dtype=torch.float32, device=torch.device("cpu")) as decoder:
        assert decoder.placement.mode == "fast"
    with pytest.raises(LabError, match="mode is 'quick'; give one of exact, fast"):
        opened(file, "1 GiB", dtype=torch.float32, context=CONTEXT, mode="quick", device=torch.device("cpu"))


def test_where_a_plan_fills_ram_to_the_brim_a_piece_makes_room_for_the_work(tiny, monkeypatch):
    from llmlab.offload import choosing

    path, expected = tiny()
    file, placement = read_gguf(path), placed(path)
    monkeypatch.setattr(choosing, "look", functools.partial(look, aside=SAME))
    monkeypatch.setattr(choosing, "open_decoder", functools.partial(open_decoder, aside=SAME))
    full = look(file, placement, torch.float32).needs(placement)
    pieces = pieces_of(file)
    monkeypatch.setattr("llmlab.offload.budget.workspace_in_ram", lambda *_: pieces[HEAD].bytes // 2)
    with opened(file, Budget(None, total(full, "ram")), placement, dtype=torch.float32, device=torch.device("cpu")) as decoder:
        gone = [name for name, tier in placement.where.items() if decoder.placement.tier(name) != tier]
        assert gone == [HEAD] and same(decoder, expected)
