"""Experts that come one by one: the same logits to the bit with any number of slots, hits counted as a plain simulation counts
them, prompts that leave the hot ones alone, and faults after which the next pass works."""

import contextlib
import functools
import gc
import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_models import VOCAB, make

from llmlab.errors import BadFile, LabError
from llmlab.gguf import read_gguf, write_gguf
from llmlab.offload import hits
from llmlab.offload.budget import OverBudget
from llmlab.offload.experts import expert_bytes
from llmlab.offload.opening import open_decoder
from llmlab.offload.pieces import PAGE
from llmlab.offload.placement import Placement
from llmlab.offload.store import in_place, write_store
from llmlab.runtime.decoder import Decoder

READ = torch.randint(3, VOCAB, (70,), generator=torch.Generator().manual_seed(1)).tolist()
CUTS = (0, 40, 41, 42, 43, 44, 70)        # a prompt, tokens, and more at once
MIXTURES = ("mixtral", "qwen2moe", "qwen3moe", "gpt-oss")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The path of a case, made once; "fused": the experts' gate and up as one tensor."""
    @functools.cache
    def get(name: str, mix: str = "mixed", **changes):
        path = tmp_path_factory.mktemp("experts") / f"{name}-{mix}.gguf"
        if name == "fused":
            fuse(get("qwen3moe", mix, **changes), path)
        else:
            make(name, path, mix, **changes)
        return path

    return get


def fuse(path, to) -> None:
    file, tensors = read_gguf(path), []
    for name, info in file.tensors.items():
        if "ffn_up_exps" in name:
            continue
        data, shape = file.data(name), info.shape
        if "ffn_gate_exps" in name:
            other = name.replace("gate", "up")
            halves = [np.asarray(file.data(one)).reshape(shape[2], -1) for one in (name, other)]
            name, shape = name.replace("gate", "gate_up"), (shape[0], 2 * shape[1], shape[2])
            data = np.concatenate(halves, 1)
        tensors.append((name, shape, info.type, data.tobytes()))
    write_gguf(to, file.typed_metadata(), tensors)


class Streamed:
    """An offloaded decoder. `choices`: (layer, experts, counts, tokens) as they were fetched; `brought`: the experts that were
    asked for. load: what is called in place of the cache's own way to bring one, which it is given."""

    def __init__(self, path, slots: int, where: dict | None = None, dtype=torch.float32, load=None, store=None):
        placement = Placement(where or {}, expert_slots=slots, context=128)
        self.decoder = open_decoder(path, placement, dtype=dtype, store=store)
        self.cache, self.trace, self.choices, self.brought = self.decoder.experts, self.decoder.trace, [], []
        bring = load(self.cache._load) if load else self.cache._load
        self.cache._load = lambda piece, into: self.brought.append(piece.name) or bring(piece, into)
        self.layers = self.decoder.weights.layers.all
        for number, layer in enumerate(self.layers):
            layer["fetch"] = functools.partial(self._fetch, number, layer["fetch"])

    def _fetch(self, number, fetch, wanted, chosen):
        counts = [int((chosen == expert).sum()) for expert in wanted]
        self.choices.append((number, list(wanted), counts, len(chosen)))
        return fetch(wanted, chosen)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.decoder.close()

    def logits(self, tokens=READ, cuts=CUTS):
        self.decoder.forget()
        return pieces(self.decoder, tokens, cuts)


def pieces(decoder, tokens, cuts):
    return torch.cat([decoder.logits(tokens[a:b]) for a, b in zip(cuts, cuts[1:], strict=False) if tokens[a:b]])


def plain(path, tokens=READ, cuts=CUTS, dtype=torch.float32):
    return pieces(Decoder.open(path, dtype=dtype, strategy="compact"), tokens, cuts)


# ---- exactness ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*MIXTURES, "fused"])
def test_logits_are_the_same_to_the_bit_with_any_number_of_slots(tiny, name):
    path = tiny(name, "Q8_0" if name == "fused" else "mixed")
    wanted = plain(path)
    for slots in (1, 3, 100):
        with Streamed(path, slots) as streamed:
            assert torch.equal(streamed.logits(), wanted)
            assert torch.equal(streamed.logits(cuts=CUTS[:5]), wanted[:43])         # warm
            stats = streamed.cache.stats()
            assert stats.slots == min(slots, 8) and set(stats.layers) == {0, 1}
            assert stats.total.loads == (8 if slots >= 8 else stats.total.loads)        # each once, where all have room


@pytest.mark.parametrize(("mix", "dtype"), [("F16", torch.float32), ("Q8_0", torch.bfloat16), ("mixed", torch.float16)])
def test_numbers_and_half_precision_too(tiny, mix, dtype):
    path = tiny("mixtral", mix)
    wanted = plain(path, dtype=dtype)
    for slots in (1, 3):
        with Streamed(path, slots, dtype=dtype) as streamed:
            assert torch.equal(streamed.logits(), wanted)


def test_from_a_store_too(tiny, tmp_path):
    """Where all experts of a layer lie alike, so that what looks at a slot is made once."""
    path = tiny("qwen2moe")
    store = write_store(read_gguf(path), tmp_path)
    with Streamed(path, 3, store=store) as streamed:
        assert torch.equal(streamed.logits(), plain(path))
        cache, views = streamed.cache, []
        for expert in (1, 2):
            cache._begin(0, (0, expert))
            cache._wait(0)
            views.append(cache._views[0][1])
        assert views[0] is views[1]


def test_more_experts_than_any_slot(tiny):
    """12 of which a token takes 5: fewer slots than one token wants, and about as many as a prompt does."""
    path = tiny("qwen3moe", "Q8_0", num_experts=12, num_experts_per_tok=5)
    wanted = plain(path)
    for slots in (1, 4, 7, 24):
        with Streamed(path, slots) as streamed:
            assert torch.equal(streamed.logits(), wanted)


def test_tokens_read_each_by_itself_are_those_of_one_at_a_time(tiny):
    path = tiny("qwen3moe")
    wanted = plain(path, cuts=(0, *range(40, 71)))
    with Streamed(path, 3) as streamed:
        first = streamed.decoder.logits(READ[:40])
        assert torch.equal(torch.cat([first, streamed.decoder.read_each(READ[40:])]), wanted)


# ---- what stays, what goes ---------------------------------------------------------------------------------------

class Simulation:
    """The cache again, as plainly as it can be said; what it expects of each expert is `hits.Rates`' to say."""

    def __init__(self, layers, experts, slots):
        self.held, self.rates = [None] * slots, hits.Rates(layers, experts)
        self.wanted = self.hits = self.loads = 0

    def until(self, now, key):
        return self.rates.until(now, *np.array(key)[:, None])[0]

    def serve(self, layer, wanted, counts, tokens):
        self.rates.chose(layer, wanted, counts, tokens)
        queue = [(layer, expert) for expert in wanted]
        self.wanted += len(queue)
        if tokens == 1:
            queue = [key for key in queue if key in self.held] + [key for key in queue if key not in self.held]
        loads, begun = 0, 0         # queue[:begun] are there or on their way
        for turn in range(len(queue)):
            while begun < len(queue):
                if queue[begun] not in self.held:
                    free = [key for key in self.held if key not in queue[turn:]]
                    later = [key for key in queue[begun + 1:] if key in self.held]
                    if None in free:
                        goes = None
                    elif free:
                        goes = max(free, key=lambda key: self.until(layer, key))
                    elif later and begun - turn < hits.AT_ONCE:
                        goes = later[-1]
                    else:
                        break
                    self.held[self.held.index(goes)] = queue[begun]
                    loads += 1
                begun += 1
            assert queue[turn] in self.held
        self.loads += loads
        self.hits += len(queue) - loads


@pytest.mark.parametrize("slots", [1, 2, 4, 6, 9, 16])
def test_hits_are_those_of_a_plain_simulation(tiny, slots):
    path = tiny("qwen3moe", "Q8_0", num_experts=12, num_experts_per_tok=3, num_hidden_layers=2)
    with Streamed(path, slots) as streamed:
        streamed.logits(cuts=(0, 20, *range(21, 60), 70))
        plainly = Simulation(2, 12, slots)
        for choice in streamed.choices:
            plainly.serve(*choice)
        stats = streamed.cache.stats()
        assert stats.total.wanted == plainly.wanted and stats.total.loads == plainly.loads > 0
        assert stats.total.hits == plainly.hits and 0 <= stats.total.rate <= 1
        assert stats.bytes == sum(streamed.cache.pieces[layer, 0].bytes * found.loads for layer, found in stats.layers.items())
        assert f"{stats.total.rate:.0%}" in stats.answer and "measured" in stats.answer


def test_pinned_experts_are_always_there(tiny):
    path = tiny("qwen3moe", "Q8_0", num_experts=12, num_experts_per_tok=3)
    wanted, stay = plain(path), {"blk.0.expert.1": "device", "blk.0.expert.7": "device", "blk.1.expert.0": "device"}
    with Streamed(path, 2, stay) as streamed:
        before = streamed.cache.stats()
        assert before.bytes == 0 and before.total.wanted == 0 and "No expert" in before.answer
        assert torch.equal(streamed.logits(), wanted)
        assert streamed.brought and not set(streamed.brought) & set(stay)
        found = streamed.cache.stats().layers
        chosen = [(layer, expert) for layer, experts, _, _ in streamed.choices for expert in experts]
        assert found[0].pinned == chosen.count((0, 1)) + chosen.count((0, 7)) and found[1].pinned == chosen.count((1, 0))
        assert found[0].hits + found[0].loads + found[0].pinned == sum(layer == 0 for layer, _ in chosen)
    everything = dict.fromkeys(in_place(read_gguf(path)).pieces, "device")
    with Streamed(path, 0, everything) as streamed:
        assert torch.equal(streamed.logits(), wanted) and streamed.cache.stats().bytes == 0
    with pytest.raises(LabError, match="give one slot at least"):
        Streamed(path, 0, stay)


def test_bytes_are_known_before(tiny):
    path = tiny("gpt-oss")
    pieces = in_place(read_gguf(path)).pieces
    each = {name: piece.bytes for name, piece in pieces.items() if piece.expert is not None}
    where = {"blk.0.expert.0": "device", "blk.0.expert.1": "ram", "blk.1.expert.3": "ram", "blk.1": "device"}
    found = expert_bytes(pieces, Placement(where, expert_slots=3))
    free = [size for name, size in each.items() if name != "blk.0.expert.0"]
    assert found == {"experts that stay": each["blk.0.expert.0"], "expert slots": 3 * max(free),
                     "experts in RAM": each["blk.0.expert.1"] + each["blk.1.expert.3"]}
    assert expert_bytes(pieces, Placement({}, expert_slots=1000))["expert slots"] == len(each) * max(each.values())


def test_experts_in_ram_are_copied(tiny):
    path = tiny("gpt-oss")
    ram = {f"blk.{layer}.expert.{expert}": "ram" for layer in (0, 1) for expert in (0, 2, 3)}
    with Streamed(path, 2, ram) as streamed:
        assert torch.equal(streamed.logits(), plain(path))
        events = [event for event in streamed.trace.events if ".expert." in event.what]
        copied, read = ({event.what for event in events if event.kind == kind} for kind in ("copy", "read"))
        assert copied <= set(ram) and copied and read and sum(
            event.bytes for event in events if event.kind in ("copy", "read")) == streamed.cache.stats().bytes + sum(
            streamed.cache.pieces[layer, expert].bytes for layer in (0, 1) for expert in (0, 2, 3))


def test_a_budget_counts_them(tiny):
    path = tiny("qwen2moe")
    with open_decoder(path, Placement(expert_slots=3, context=128)) as decoder:
        lines = {line.what: line.bytes for line in decoder.budget.lines}
        held = lines["expert slots"]
        assert held == 3 * max(piece.bytes for piece in decoder.experts.pieces.values())
        assert held == sum(slot.nbytes for slot in decoder.experts._slots)
        enough = sum(lines.values())
    with open_decoder(path, Placement(expert_slots=3, context=128), budget=enough) as decoder:
        decoder.read(READ[:5])
    with pytest.raises(OverBudget, match="the least is"):
        open_decoder(path, Placement(expert_slots=4, context=128), budget=enough)
    for slots in (0, -1, 1.5):
        with pytest.raises(LabError, match="expert_slots"):
            open_decoder(path, Placement(expert_slots=slots))


def test_reads_go_on_while_experts_are_used(tiny):
    """With two slots a prompt's next expert is on its way while one is used."""
    with Streamed(tiny("mixtral"), 2) as streamed:
        fetch, seen = streamed.layers[0]["fetch"], streamed.brought
        handed = fetch([0, 1, 2, 3], torch.tensor([[0, 1], [2, 3], [0, 3]]))
        assert seen == ["blk.0.expert.0", "blk.0.expert.1"]         # before anything is asked for
        assert next(handed) == 0 and len(seen) == 2
        assert next(handed) == 1 and seen[2:] == ["blk.0.expert.2"]
        assert next(handed) == 2 and seen[3:] == ["blk.0.expert.3"]
        assert next(handed) == 3 and next(handed, None) is None
        alone = fetch([1, 3], torch.tensor([[3, 1]]))       # 3 is there: it need not wait
        assert seen[4:] == ["blk.0.expert.1"] and list(alone) == [3, 1]


def test_what_is_waited_for_and_read_is_in_the_trace(tiny):
    with Streamed(tiny("mixtral"), 2) as streamed:
        streamed.logits()
        stats, events = streamed.cache.stats(), [event for event in streamed.trace.events if ".expert." in event.what]
        assert sum(event.bytes for event in events if event.kind == "read") == stats.bytes
        waits = [event.seconds for event in events if event.kind == "wait"]
        assert waits and sum(waits) == pytest.approx(stats.waited)


# ---- the policy itself -------------------------------------------------------------------------------------------

@given(st.integers(1, 6), st.integers(1, 4), st.lists(st.tuples(
    st.integers(0, 3), st.sets(st.integers(0, 7), min_size=1), st.integers(1, 9)), max_size=12),
    st.sets(st.tuples(st.integers(0, 3), st.integers(0, 7)), max_size=3))
@settings(max_examples=150, deadline=None)
def test_every_expert_gets_its_turn_and_keeps_its_slot(slots, layers, turns, pinned):
    """Whatever is asked of however few slots: nothing waits forever, and what is used lies where it was brought."""
    directory = hits.Directory(layers, 8, slots, frozenset(pinned))
    inside = {}
    for layer, wanted, tokens in turns:
        layer, wanted, used = layer % layers, sorted(wanted), []
        for what, expert, slot in directory.serve(layer, wanted, [1] * len(wanted), tokens):
            if what == "load":
                assert (layer, expert) not in pinned and 0 <= slot < slots
                inside[slot] = layer, expert
            else:
                used.append(expert)
                assert (slot is None) == ((layer, expert) in pinned)
                assert slot is None or inside[slot] == (layer, expert)
        assert sorted(used) == wanted and (tokens == 1 or used == wanted)
        assert directory.held == {key: slot for slot, key in inside.items()}
    assert all(one.hits >= 0 for one in directory.found)


def test_a_prompt_counts_as_its_tokens_one_by_one():
    once, each = hits.Rates(2, 4), hits.Rates(2, 4)
    once.chose(1, [0, 3], [50, 50], 50)
    for _ in range(50):
        each.chose(1, [0, 3], [1, 1], 1)
    assert np.allclose(once.averages, each.averages) and not once.averages[:, 0].any()
    assert once.averages[0, 1, 0] > 0.999 and once.averages[-1, 1, 0] == pytest.approx(1 - 0.5 ** (50 / hits.LIVES[-1]))


def test_whoever_is_chosen_again_and_whoever_is_a_favourite_is_expected_soon():
    """The same averages, and weights that the text decides: last choices where it repeats itself, favourites where not."""
    rng = np.random.default_rng(0)
    again, favourites = hits.Rates(1, 16), hits.Rates(1, 16)
    for token in range(400):
        again.chose(0, [token // 20 % 16], [1], 1)
        favourites.chose(0, [rng.choice(16, p=np.r_[0.4, np.full(15, 0.04)])], [1], 1)
    shares = [one.weights[0] / one.weights.sum() for one in (again, favourites)]
    assert shares[0] > 0.6 and shares[1] < 0.2
    layers, experts = np.zeros(16, dtype=int), np.arange(16)
    assert again.until(0, layers, experts).argmin() == 399 // 20 % 16
    assert favourites.until(0, layers, experts).argmin() == 0


def zipf(experts, used, layers, skew, tokens, seed=0):
    rng = np.random.default_rng(seed)
    popular = -skew * np.log(np.argsort(rng.random((layers, experts)), -1) + 1.0)
    return [np.sort(np.argpartition(-(popular + rng.gumbel(size=popular.shape)), used - 1, -1)[:, :used], -1).tolist()
            for _ in range(tokens)]


def measured(passes, experts, slots):
    """Of the second half."""
    half = len(passes) // 2
    before, after = hits.replay(passes[:half], experts, slots), hits.replay(passes, experts, slots)
    wanted, loads = (sum(getattr(one, name) for one in after.found) - sum(getattr(one, name) for one in before.found)
                     for name in ("wanted", "loads"))
    return 1 - loads / wanted


@pytest.mark.parametrize("skew", [0.0, 0.7, 1.2])
def test_expected_hits_are_those_that_come(skew):
    experts, used, layers = 32, 4, 6
    passes = zipf(experts, used, layers, skew, 200)
    for slots in (8, 24, 48, 144):
        expected, found = hits.expected_hits(experts, used, slots, skew, layers), measured(passes, experts, slots)
        assert found == pytest.approx(expected, abs=0.06), (slots, expected, found)


def test_expected_hits_at_the_ends():
    assert hits.expected_hits(8, 2, 0) == 0.0 and hits.expected_hits(8, 2, 8) == 1.0
    assert hits.expected_hits(8, 2, 64, layers=8) == 1.0 and hits.expected_hits(8, 8, 4, 1.0) < 0.5
    rising = [hits.expected_hits(64, 8, slots, 1.0, 4) for slots in range(0, 257, 16)]
    assert rising == sorted(rising)
    assert hits.expected_hits(64, 8, 32, 1.5) > hits.expected_hits(64, 8, 32, 0.5) > hits.expected_hits(64, 8, 32)


def test_fewer_slots_than_a_pass_wants_still_find_some():
    """Where an LRU finds nothing: layers in turn are a cyclic scan."""
    passes = zipf(32, 4, 8, 1.0, 200)
    assert measured(passes, 32, 16) > 0.2        # a pass wants 32

    held, found = [], 0
    for layers in passes:
        for layer, wanted in enumerate(layers):
            for expert in wanted:
                found += (layer, expert) in held
                held = [key for key in held if key != (layer, expert)][-15:] + [(layer, expert)]
    assert found == 0


def test_a_prompt_does_not_flush_what_is_hot():
    """It wants every expert of every layer; afterwards the text's favourites are nearly all there."""
    directory, hot = hits.Directory(4, 16, 24), [1, 5, 9]
    for _ in range(50):
        for layer in range(4):
            list(directory.serve(layer, hot))
    for layer in range(4):
        list(directory.serve(layer, list(range(16)), [8 if expert in hot else 2 for expert in range(16)], 50))
    before = sum(one.loads for one in directory.found)
    for layer in range(4):
        list(directory.serve(layer, hot))
    assert sum(one.loads for one in directory.found) - before <= 2


# ---- faults ------------------------------------------------------------------------------------------------------

class Failing:
    """One of the experts that are brought does not come."""

    def __init__(self, at: int, how: str):
        self.at, self.how, self.count = at, how, 0

    def __call__(self, bring):
        def begin(piece, into):
            self.count += 1
            if self.count == self.at and self.how == "refused":
                raise LabError("the readers are busy; try again")
            ticket = bring(piece, into)
            return Broken(ticket, self.how) if self.count == self.at else ticket
        return begin


class Broken:
    def __init__(self, ticket, how):
        self.ticket, self.how, self.done = ticket, how, False

    def wait(self):
        self.ticket.wait()
        raise KeyboardInterrupt if self.how == "interrupted" else BadFile("m.gguf cannot be read (Input/output error)")

    def cancel(self):
        self.ticket.cancel()


@pytest.mark.parametrize("how", ["refused", "broken", "interrupted"])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_after_a_read_that_fails_the_next_pass_works(tiny, how, slots):
    path = tiny("mixtral")
    wanted = plain(path, cuts=(0, 70))
    for at in (1, 3):
        with Streamed(path, slots, load=Failing(at, how)) as streamed:
            with pytest.raises(KeyboardInterrupt if how == "interrupted" else LabError):
                streamed.decoder.logits(READ)
            assert streamed.decoder.tokens == []
            assert torch.equal(streamed.logits(cuts=(0, 70)), wanted)


def test_an_error_in_the_middle_of_using_them(tiny):
    """What was on its way then is not taken for there."""
    path = tiny("mixtral")
    wanted = plain(path)
    with Streamed(path, 4) as streamed:
        handed = streamed.layers[0]["fetch"]([0, 1, 2, 3], torch.tensor([[0, 1], [2, 3]]))
        next(handed)
        del handed
        assert torch.equal(streamed.logits(), wanted)


def test_a_file_that_changes_meanwhile(tiny, tmp_path):
    path = tmp_path / "changing.gguf"
    path.write_bytes(tiny("mixtral").read_bytes())
    with Streamed(path, 2) as streamed:
        wanted = streamed.logits()
        touched, bring = [], streamed.cache._load

        def load(piece, into):      # what looks before a pass has looked
            touched or os.utime(path, ns=(1, 1))
            touched.append(piece)
            return bring(piece, into)

        streamed.cache._load = load
        with pytest.raises(BadFile, match=r"changing\.gguf"):
            streamed.logits()
    with Streamed(path, 2) as streamed:
        assert torch.equal(streamed.logits(), wanted)


def test_nothing_is_left_behind(tiny):
    path = tiny("mixtral")

    def now():
        gc.collect()
        with open("/proc/self/maps") as maps:
            return threading.active_count(), len(os.listdir("/proc/self/fd")), sum(path.name in line for line in maps)

    def once(number):
        with Streamed(path, 1 + number % 4, load=Failing(3, "broken") if number % 2 else None) as streamed, \
                contextlib.suppress(BadFile):
            streamed.decoder.logits(READ[:12])

    once(0), once(1)
    before = now()
    for number in range(50):
        once(number)
    assert now() == before


def test_slots_begin_on_pages(tiny):
    with Streamed(tiny("gpt-oss"), 3) as streamed:
        streamed.logits()
        assert all(slot.data_ptr() % PAGE == 0 for slot in streamed.cache._slots)
