"""What a decoder holds is counted before it is there, what is counted is what is held, and too little is said with a number."""

import functools
import re
from dataclasses import replace

import pytest
import torch
from runtime_models import VOCAB, make

from llmlab.errors import LabError
from llmlab.gguf import read_gguf
from llmlab.offload import opening
from llmlab.offload.budget import Budget, OverBudget, total
from llmlab.offload.choosing import SHORTEST, chosen, opened, take_draft
from llmlab.offload.opening import look, open_decoder
from llmlab.offload.pieces import HEAD, pieces_of
from llmlab.offload.placement import Placement
from llmlab.runtime.decoder import Decoder
from llmlab.units import MIB, format_bytes, parse_bytes

CONTEXT = 256
TOKENS = torch.randint(3, VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    @functools.cache
    def get(name: str = "llama", **changes):
        path = tmp_path_factory.mktemp("budget") / f"{name}.gguf"
        make(name, path, "few", **changes)
        return read_gguf(path)

    return get


# ---- by itself -----------------------------------------------------------------------------------------------

def test_what_is_taken_is_counted_and_given_back():
    budget = Budget("1 MiB", ram=100)
    budget.take("device", "slots", 1000)
    budget.take("device", "slots", 24)
    budget.take("ram", "layers", 100)
    assert budget.used == {"device": 1024, "ram": 100}
    assert [tuple(line) for line in budget.lines] == [("device", "slots", 1024, "exact"), ("ram", "layers", 100, "exact")]
    budget.give_back("device", "slots", 1000)
    budget.give_back("ram", "layers")
    assert budget.used == {"device": 24, "ram": 0}
    with pytest.raises(OverBudget, match=r"^more would take 1\.00 MiB and of the budget of 1\.00 MiB \(on the device\) "
                                         r"1023\.98 KiB are left; "):
        budget.take("device", "more", MIB)
    with pytest.raises(OverBudget, match="in RAM"):
        budget.take("ram", "more", 101)
    assert budget.used == {"device": 24, "ram": 0} and budget.most == {"device": 1024, "ram": 100}


def test_what_is_lent_comes_back_whatever_happens():
    budget = Budget(10)
    with pytest.raises(ZeroDivisionError), budget.lent("device", "logits", 10):
        assert budget.used["device"] == 10
        _ = 1 / 0
    assert budget.used["device"] == 0 and not budget.lines


def test_without_limits_all_is_counted_too():
    budget = Budget()
    budget.take("device", "layers", 2**60)
    assert budget.used["device"] == 2**60


def test_a_size_is_a_size():
    with pytest.raises(LabError, match="is not a size"):
        Budget("much")


# ---- what a decoder takes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kv", [None, "q8_0", ("f16", "q4_0")])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_what_is_counted_is_what_is_held(tiny, name, kv):
    file = tiny(name)
    pieces = pieces_of(file)
    where = {HEAD: "device", "blk.1": "ram", "blk.0.expert.1": "device", "blk.1.expert.0": "ram"}
    placement = Placement({name: tier for name, tier in where.items() if name in pieces}, 1, expert_slots=3, context=CONTEXT,
                          kv_types=kv)
    with open_decoder(file, placement, dtype=torch.float32) as decoder:
        lines = {line.what: line.bytes for line in decoder.budget.lines}
        assert decoder.resident_bytes == sum(lines.values())
        assert lines["layers that stay"] == pieces[HEAD].bytes and lines["layers in RAM"] == pieces["blk.1"].bytes
        assert lines["slots"] == decoder.parts.slots.bytes
        decoder.read(TOKENS)
        held = [tensor for cache in decoder.caches for tensor in (cache.tensors if kv else [cache])]
        tables = [tensor for pair in decoder.tables for tensor in pair]
        assert lines["KV cache"] == sum(tensor.nbytes for tensor in held + tables)
        small = {id(value): value.nbytes for part in (*decoder.weights.layers.all, decoder.weights.head)
                 for value in part.values() if isinstance(value, torch.Tensor)}
        assert lines["small tensors"] == sum(small.values())
        if decoder.experts:
            slots = sum(slot.nbytes for slot in decoder.experts._slots)
            assert lines["expert slots"] == slots and lines["experts in RAM"] == pieces["blk.1.expert.0"].bytes
            assert lines["experts that stay"] == pieces["blk.0.expert.1"].bytes
        caches = [t.data_ptr() for t in held]
        decoder.forget()
        decoder.read(TOKENS)
        if kv is None:          # room for the whole context is there from the beginning
            assert [t.data_ptr() for t in decoder.caches] == caches
        budget = decoder.budget
    assert not budget.lines


def test_the_workspace_is_what_is_allocated(tiny):
    """The most that is live at once, as torch's profiler counts it, beside the logits that are handed out."""
    from llmlab.kernels import scratch

    file = tiny()
    with open_decoder(file, Placement(slots=2, context=512), dtype=torch.float32) as decoder:
        said = next(line for line in decoder.budget.lines if line.what == "workspace")
        for count in (1, 400):
            decoder.forget()
            scratch.release()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as watched:
                decoder.read((TOKENS * 10)[:count])
            now = most = 0
            for event in watched.profiler.kineto_results.events():
                if event.name() == "[memory]":
                    now += event.nbytes()
                    most = max(most, now)
            assert 0 < most < said.bytes
    assert said.kind == "modelled" and said.bytes < 20 * most


def test_logits_of_many_tokens_are_counted_too(tiny):
    file = tiny()
    placement = Placement(slots=2, context=CONTEXT)
    need = total(look(file, placement, torch.float32).needs(placement))
    with open_decoder(file, placement, budget=need + 30 * VOCAB * 8, dtype=torch.float32) as decoder:
        assert len(decoder.logits(TOKENS[:30])) == 30
        with pytest.raises(OverBudget, match="^logits of 40 tokens would take .* ask for those of fewer tokens at once"):
            decoder.logits(TOKENS)
        assert len(decoder.tokens) == 30        # nothing was read
        decoder.read(TOKENS)


def test_logits_of_guesses_are_counted_until_their_tokens_have_come(tiny):
    file = tiny()
    placement = Placement(slots=2, context=CONTEXT)
    need, row = total(look(file, placement, torch.float32).needs(placement)), 4 * VOCAB

    def guesses(decoder) -> int:
        return sum(line.bytes for line in decoder.budget.lines if line.what == "logits of guesses")

    with open_decoder(file, placement, budget=need + 14 * row, dtype=torch.float32) as decoder:
        decoder.read(TOKENS[:9])
        assert not guesses(decoder)
        decoder.read_each(TOKENS[:8])
        assert guesses(decoder) == 7 * row
        with pytest.raises(OverBudget, match="^logits of 9 tokens would take"):
            decoder.read_each(TOKENS[:9])
        decoder.read_each(TOKENS[:4])
        assert guesses(decoder) == 3 * row
        decoder.read([5])
        assert not guesses(decoder) and decoder.budget.used["device"] == need
        decoder.read_each(TOKENS[:8])
        budget = decoder.budget
    assert not budget.lines


def test_a_draft_is_counted_and_the_model_takes_what_is_left(tiny):
    file, draft = tiny(num_hidden_layers=6), Decoder.open(tiny().paths[0], dtype=torch.float32, strategy="compact")
    placement = Placement({}, 1, context=CONTEXT)
    least = total(look(file, placement, torch.float32).least(placement))
    alone = Budget()
    take_draft(alone, draft, CONTEXT)
    line, = alone.lines
    draft.read(TOKENS * 6)
    tables = sum(tensor.nbytes for pair in draft.tables for tensor in pair)
    assert draft.context == CONTEXT == draft.cells and line.what == "the draft" and line.kind == "modelled"
    grown = draft.cache_bytes + tables
    assert draft.resident_bytes + grown <= line.bytes < draft.resident_bytes + 2 * grown
    budget = Budget(least + line.bytes + MIB)
    take_draft(budget, draft, CONTEXT)
    with opened(file, budget, dtype=torch.float32, context=CONTEXT, device=torch.device("cpu")) as decoder:
        assert "the draft" in {line.what for line in decoder.budget.lines} and len(decoder.read(TOKENS))
        assert decoder.budget.used["device"] <= least + line.bytes + MIB
    with pytest.raises(OverBudget, match="^the draft would take .* or a smaller draft$"):
        take_draft(Budget(MIB), draft)


# ---- too little ----------------------------------------------------------------------------------------------

def test_too_little_is_said_with_the_least_and_what_to_change(tiny):
    file = tiny()
    placement = Placement({HEAD: "device", "blk.0": "device"}, 2, context=CONTEXT)
    looked = look(file, placement, torch.float32)
    need, least = total(looked.needs(placement)), total(looked.least(placement))
    assert least < need
    with pytest.raises(OverBudget, match="let fewer layers stay, or use fewer slots"):
        open_decoder(file, placement, budget=need - 1, dtype=torch.float32)
    with pytest.raises(OverBudget) as caught:
        open_decoder(file, replace(placement, context=512), budget=MIB, dtype=torch.float32)
    text = str(caught.value)
    assert "the budget has 1.00 MiB; the least for a context of 512 is" in text and "\n" not in text
    assert "kv=" not in text        # of so few tokens unpacking pages takes more than they save
    open_decoder(file, placement, budget=need, dtype=torch.float32).close()
    open_decoder(file, replace(placement, where={}, slots=1), budget=least, dtype=torch.float32).close()


def test_what_is_proposed_works(tiny):
    file = tiny(max_position_embeddings=32768)
    with pytest.raises(OverBudget) as caught:
        open_decoder(file, Placement(context=32768), budget=MIB, dtype=torch.float32)
    text, more = str(caught.value), 16 * 1024       # sizes are said in hundredths of a MiB
    for what, change in ((r"for a context of 32,768 is ", {}), (r"a context of 512 \(", {"context": 512}),
                         (r"kv='q8_0' \(", {"kv_types": "q8_0"})):
        size = parse_bytes(re.search(what + r"([\d.]+ MiB)", text)[1])
        placement = replace(Placement(slots=1, context=32768), **change)
        open_decoder(file, placement, budget=size + more, dtype=torch.float32).close()
        with pytest.raises(OverBudget):
            open_decoder(file, placement, budget=size - more, dtype=torch.float32)


def test_ram_has_its_own(tiny):
    file = tiny()
    placement = Placement({"blk.0": "ram"}, context=CONTEXT)
    with pytest.raises(OverBudget, match="in RAM"):
        open_decoder(file, placement, Budget(None, "4 KiB"), dtype=torch.float32)


def test_ram_that_is_too_little_for_what_reads_pass_through_is_said_of_ram(tiny):
    """On the way to a card. What would change nothing is not proposed, and a context not shortened in vain."""
    file = tiny(max_position_embeddings=4096)
    placement = Placement(context=4096)
    looked = look(file, placement, torch.float32)._replace(device=torch.device("cuda"))
    ring = total(looked.least(placement), "ram")
    assert ring == 2 * max(piece.bytes for piece in pieces_of(file).values())
    text = opening._too_little(looked, placement, {}, looked.needs(placement), "ram", MIB // 4)
    assert re.search(r"takes [\d.]+ \w+ in RAM \(staging ring .*the budget has 256\.00 KiB; the least for a context of 4,096 "
                     rf"is {format_bytes(ring)}: give that, or a file that is quantized harder$", text)
    cached = replace(placement, kv="ram")
    assert "a context of 512" in opening._too_little(looked, cached, {}, looked.needs(cached), "ram", MIB // 4)


# ---- choosing ------------------------------------------------------------------------------------------------

def test_what_is_chosen_fits_and_more_budget_keeps_more(tiny):
    file, before = tiny(num_hidden_layers=6), -1
    expected = None
    smallest = total(look(file, Placement(context=CONTEXT), torch.float32).least(Placement(context=CONTEXT)))
    for size in range(smallest, smallest + 4 * MIB, 400_000):
        placement = chosen(file, Budget(size), CONTEXT, dtype=torch.float32)
        stay = sum(tier == "device" for tier in placement.where.values())
        assert stay >= before
        before = stay
        if size > smallest + MIB and stay == len(pieces_of(file)):
            break
    assert stay == len(pieces_of(file))
    for budget in (smallest, size):
        with opened(file, budget, dtype=torch.float32, context=CONTEXT) as decoder:
            found = decoder.read(TOKENS)
            expected = found if expected is None else expected
            assert torch.equal(found, expected) and decoder.budget.used["device"] <= budget


def test_layers_that_stay_are_spread(tiny):
    file = tiny(num_hidden_layers=6)
    pieces = pieces_of(file)
    placement = Placement(slots=2, context=CONTEXT, where={HEAD: "device"})
    need = total(look(file, placement, torch.float32).needs(placement)) + 3 * (pieces["blk.0"].bytes + 4096)
    assert sorted(chosen(file, Budget(need), CONTEXT, dtype=torch.float32).where) == ["blk.1", "blk.3", "blk.5", HEAD]


def test_of_a_mixture_experts_share_what_is_left(tiny):
    file = tiny("mixtral")
    pieces = pieces_of(file)
    experts = [piece for piece in pieces.values() if piece.expert is not None]
    placement = Placement(dict.fromkeys(("blk.0", "blk.1", HEAD), "device"), context=CONTEXT, expert_slots=4)
    need = total(look(file, placement, torch.float32).needs(placement))
    found = chosen(file, Budget(need), CONTEXT, dtype=torch.float32)
    assert found.expert_slots == 4 and not any(".expert." in name for name in found.where)
    found = chosen(file, Budget(need + sum(piece.bytes for piece in experts)), CONTEXT, dtype=torch.float32)
    assert sum(".expert." in name for name in found.where) == len(experts)


def test_where_nobody_says_how_long_the_context_follows_the_budget(tiny):
    file = tiny(max_position_embeddings=8192)
    assert chosen(file, Budget(), dtype=torch.float32).context == 4096
    short = chosen(file, Budget("24 MiB"), dtype=torch.float32)
    assert SHORTEST <= short.context < 4096
    with opened(file, "24 MiB", dtype=torch.float32) as decoder:
        assert decoder.context == short.context


def test_a_plan_is_a_placement_or_has_one(tiny):
    file = tiny()
    plan = type("Plan", (), {"placement": Placement({HEAD: "device"}, 1, context=CONTEXT)})()
    for given in (plan, plan.placement):
        with opened(file, plan=given, dtype=torch.float32) as decoder:
            assert decoder.placement == plan.placement and decoder.context == CONTEXT
    with opened(file, plan=plan, dtype=torch.float32, context=64, kv="q8_0") as decoder:
        assert decoder.context == 64 and decoder.kv == ("q8_0", "q8_0")
    with pytest.raises(LabError, match="plan is 'soon'"):
        opened(file, plan="soon")
    with pytest.raises(LabError, match="strategy is 'fast'"):
        opened(file, "1 GiB", strategy="fast")


def test_what_cannot_be_compiled_runs_all_the_same_and_says_why(tiny):
    for file, settings, says in ((tiny("mixtral"), {}, "which experts a token takes"),
                                 (tiny(), {"kv": "q8_0", "sinks": 2}, "no tokens in full precision")):
        with opened(file, "1 GiB", dtype=torch.float32, compile=True, context=CONTEXT, **settings) as decoder:
            assert decoder.why.startswith("not compiled: ") and says in decoder.why and decoder.strategy == "compact"
            decoder.read(TOKENS)


def test_an_ordinary_decoder_grows_as_it_did(tiny):
    decoder = Decoder.open(tiny().paths[0], dtype=torch.float32, strategy="compact")
    assert decoder.cache_bytes == 0
    decoder.read(TOKENS)
    assert decoder.cells == 256 and decoder.cache_bytes > 0
    decoder.forget()
    assert decoder.cache_bytes == 0
