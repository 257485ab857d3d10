"""Compute buffers: the allocator's own rules, what llama.cpp printed on cards (golden), and what logs in public show."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.catalog import entries, gpu
from llmlab.graphs import FAMILIES, Request, compute_buffers, compute_terms, family_of, representatives
from llmlab.graphs.allocator import compile_plan
from llmlab.graphs.ggml import Dim, Graph, symbol, value
from llmlab.graphs.scheduler import schedule
from llmlab.memory import weights
from llmlab.placing import assignment
from llmlab.settings import Settings
from llmlab.shapes import ModelSpec, from_config, model_spec
from llmlab.units import KIB, MIB

GOLDEN = json.loads((Path(__file__).parent / "golden" / "llama_cpp_compute.json").read_text(encoding="utf-8"))
PRINTED = 0.0051 * MIB         # sizes are printed in MiB with two decimals


def buffers(name, request, gpu_layers=None, cards=0, split=None, n_cpu_moe=0, quant="Q4_K_M", **more):
    spec = model_spec(name)
    pretended = (gpu("rtx-3060-12gb"),) * cards
    where = assignment(spec, pretended, Settings(quant, split=split), min(gpu_layers, len(spec.layers) + 1)) if cards else ()
    return compute_buffers(spec, request, tuple(where), n_cpu_moe, cards, weights(spec, quant), **more)


# ---- sizes with symbols ---------------------------------------------------------------------------------------

def test_dims_are_numbers_times_symbols():
    t, n = symbol("t"), symbol("n")
    assert 6 * t * n is n * (2 * t) * 3 and 6 * t // 2 is 3 * t and 6 * t * n // (3 * t) is 2 * n
    assert 4 * t // t == 4 // 1 and not isinstance(4 * t // t, Dim)
    assert value(6 * t * n, {"t": 5, "n": 7}) == 210 and repr(6 * t) == "6*t"
    with pytest.raises(ValueError, match="multiple"):
        (3 * t) // 2
    with pytest.raises(ValueError, match="not in list"):
        t // n


# ---- the allocator --------------------------------------------------------------------------------------------

def measured(g: Graph, **values):
    nodes, leaves = schedule(g, 0, values)
    return compile_plan(g, nodes, leaves, 0).measure(values)[0]


def chain(g: Graph, *sizes):
    """A chain of operators of so many KiB each, none in place."""
    cur = g.input((256, sizes[0]), "f32", "input")
    for i, size in enumerate(sizes[1:]):
        g.label = f"step {i}"
        cur = g.op("mul_mat", (256, size), "f32", cur)
    g.expand(cur)
    return cur


def test_two_neighbours_of_a_chain_live_at_once():
    g = Graph()
    chain(g, 4, 8, 2, 16)
    peak = measured(g)
    # 4 and 8 end at 12; the 2 goes into the hole of the 4, and the 16 behind it, where the 8 was and beyond
    assert peak.bytes == (2 + 16) * KIB
    assert peak.held[0] == ("step 2", -1, 16 * KIB)


def test_best_fit_takes_the_smallest_hole_and_the_end_last():
    g = Graph()
    x = g.input((256, 1), "f32", "x")
    large, gap, small, wall = (g.op("mul_mat", (256, n), "f32", x) for n in (8, 1, 4, 1))
    g.label = "sum"
    for tensor in (large, gap, small, wall):
        g.expand(tensor)
    freed = g.op("concat", (256, 1), "f32", large, small)       # its own 1 KiB, then holes of 8 and 4
    g.expand(freed)
    late = g.op("mul_mat", (256, 4), "f32", freed)              # fits the hole of 4, not the one of 8
    g.expand(late)
    last = g.op("mul_mat", (256, 8), "f32", late)
    g.expand(g.op("concat", (256, 1), "f32", last, g.op("concat", (256, 1), "f32", gap, wall)))
    assert measured(g).bytes == (1 + 8 + 1 + 4 + 1) * KIB        # x and the four: all that came later found its hole


def test_an_operator_overwrites_its_source_unless_another_needs_it():
    def peak(operator, again: bool, shape=(256, 8)):
        g = Graph()
        cur = g.op("mul_mat", (256, 8), "f32", g.input((256, 1), "f32", "x"))
        made = g.op(operator, shape, "f32", cur)
        g.expand(made)
        if again:
            g.expand(g.op("mul_mat", (256, 1), "f32", made, cur))
        return measured(g).bytes
    assert peak("scale", False) == (1 + 8) * KIB
    assert peak("scale", True) == (1 + 8 + 8) * KIB          # then something of 1 KiB, where x was
    assert peak("norm", False) == (1 + 8 + 8) * KIB          # not every operator may
    assert peak("scale", False, shape=(128, 16)) == (1 + 8 + 8) * KIB      # nor with another layout


def test_views_keep_their_source_and_are_never_overwritten():
    g = Graph()
    source = g.op("mul_mat", (256, 8), "f32", g.input((256, 1), "f32", "x"))
    g.expand(g.scale(g.reshape(source, 512, 4)))
    assert measured(g).bytes == (1 + 8 + 8) * KIB


def test_outputs_and_inputs_nobody_reads_stay():
    g = Graph()
    g.expand(g.input((256, 3), "f32", "unused"))
    kept = g.op("mul_mat", (256, 4), "f32", g.input((256, 1), "f32", "x"))
    kept.output = True
    g.expand(g.op("mul_mat", (256, 2), "f32", g.scale(kept)))
    assert measured(g).bytes == (3 + 1 + 4 + 4 + 2) * KIB


def test_sizes_are_aligned():
    g = Graph()
    g.expand(g.op("mul_mat", (1, 1), "f32", g.input((1, 1), "f32", "x")))
    assert measured(g).bytes == 64          # two of 4 bytes, 32 each


def test_symbols_that_follow_from_others():
    g = Graph()
    chunks = g.symbol("chunks", "-(-t // 64)")
    g.expand(g.op("mul_mat", (256, chunks), "f32", g.input((256, 1), "f32", "x")))
    assert [measured(g, t=t).bytes for t in (64, 65)] == [2 * KIB, 3 * KIB]


# ---- layers that repeat ---------------------------------------------------------------------------------------

@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=4), st.integers(1, 20),
       st.lists(st.sampled_from("abc"), max_size=3))
@settings(deadline=None)
def test_a_repeating_pattern_is_kept_four_times(pattern, times, tail):
    kinds = [*pattern * times, *tail, "last"]
    kept, turns = representatives(kinds)
    assert kept == sorted(set(kept)) and kept[0] == 0 and kept[-1] == len(kinds) - 1
    left_out = set(range(len(kinds))) - set(kept)
    for one, two, last, more in turns:         # between the third turn and the last, only what repeats
        period = two - one
        between = range(two + period, last)
        assert len(between) == more * period > 0 and left_out >= set(between)
        assert all(kinds[i] == kinds[i - period] for i in range(one, last + period))
        left_out -= set(between)
    assert not left_out
    assert times < 5 or turns


@pytest.mark.parametrize("name", ["llama-3.2-1b", "gemma-3-1b", "deepseek-v2-lite", "command-r-35b", "smollm3-3b",
                                  "gpt-oss-20b", "granite-4.0-h-tiny", "qwen3.5-0.8b", "gemma-4-e2b", "lfm2-1.2b"])
def test_the_few_layers_give_what_all_give(name):
    layers = len(model_spec(name).layers)
    for request in (Request(9000, 300, flash=False), Request(8192, 64, kv=("q8_0", "q8_0"), sequences=3)):
        for gpu_layers, cards, moe in ((0, 0, 0), (99, 1, 99), (layers // 2, 1, 0), (99, 2, 0)):
            few, every = (buffers(name, request, gpu_layers, cards, n_cpu_moe=moe, whole=whole) for whole in (False, True))
            assert [p.bytes for p in (*few.cards, few.host)] == [p.bytes for p in (*every.cards, every.host)], (
                request, gpu_layers, cards, moe)


# ---- against llama.cpp ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted({row["model"] for row in GOLDEN["rows"]}))
def test_cards_hold_what_llama_cpp_plans(name):
    """To the printed 0.01 MiB, for cards and host alike."""
    for row in (row for row in GOLDEN["rows"] if row["model"] == name):
        ubatch, split = row.get("ubatch", 512), row.get("split")
        request = Request(row["context"], ubatch, row.get("flash", True), tuple(row.get("kv", ("f16", "f16"))),
                          row.get("sequences", 1))
        found = buffers(name, request, row["gpu_layers"], len(split or [1]), split and tuple(split), row.get("n_cpu_moe", 0),
                        GOLDEN["quant"], cuda=False)
        ours = [peak.bytes for peak in (*found.cards, found.host)]
        assert ours == pytest.approx([mib * MIB for mib in (*row["cards"], row["host"])], abs=PRINTED), row


def test_golden_covers_cards_splits_and_experts():
    rows = GOLDEN["rows"]
    assert len(rows) >= 450 and len({row["model"] for row in rows}) >= 34
    assert any(len(row["cards"]) == 3 for row in rows) and sum("n_cpu_moe" in row for row in rows) >= 30


def held(peak, label: str) -> int:
    """Bytes of the named tensors at the peak."""
    found = sum(bytes for name, _, bytes in peak.held if name == label)
    assert found, (label, peak.held)
    return found


def test_printed_by_llama_3_8b_in_2024():
    """Rows C1 and C2 of the log collection: 2024 builds, no flash attention, all layers on one card.

    The host of those builds had no room for embeddings given in place of tokens (February 2025) and no indices of the
    cells that K and V go to (July 2025); the card had no copies of the latter.
    """
    short = buffers("llama-3-8b", Request(512, flash=False), 99, 1)
    long = buffers("llama-3-8b", Request(8192, flash=False), 99, 1)
    assert short.cards[0].bytes == pytest.approx(258.50 * MIB, abs=PRINTED)
    indices = held(long.cards[0], "a copy of cells of V") + held(long.cards[0], "a copy of cells of K")
    assert long.cards[0].bytes - indices == pytest.approx(560.00 * MIB, abs=PRINTED)
    for found, printed in ((short, 9.01), (long, 24.01)):
        newer = held(found.host, "cells of V") + held(found.host, "cells of K") + 4 * 512 * 4096
        assert found.host.bytes - newer == pytest.approx(printed * MIB, abs=PRINTED)


def test_printed_by_builds_of_2025():
    """Rows C4, C5 and C7: builds between February 2025 and today's kept one activation more beside the logits.

    C4's host is a fork's, with a float32 mask; C5's host (197.49 MiB) is of a modified build at a context nobody noted.
    """
    moe = buffers("qwen3-30b-a3b", Request(32768), 99, 1)
    dense = buffers("qwen2.5-3b", Request(4096), 99, 1)
    hosted = buffers("qwen2.5-3b", Request(4096), 0, 1)
    assert moe.cards[0].bytes + 4 * 512 * 2048 == pytest.approx(304.75 * MIB, abs=PRINTED)
    assert dense.cards[0].bytes + 4 * 512 * 2048 == pytest.approx(304.75 * MIB, abs=PRINTED)
    assert hosted.cards[0].bytes + 4 * 512 * 2048 == pytest.approx(548.18 * MIB, abs=PRINTED)
    indices = held(moe.host, "cells of V") + held(moe.host, "cells of K")
    mask = held(moe.host, "attention mask")          # float16 today, twice that in float32
    assert moe.host.bytes - indices - 4 * 512 * 2048 + mask == pytest.approx(68.01 * MIB, abs=PRINTED)


def test_a_quantized_cache_is_unpacked_behind_cudas_attention():
    request = Request(32768, kv=("q8_0", "q8_0"))
    spec = model_spec("llama-3-8b")
    planned, real = (buffers("llama-3-8b", request, 99, 1, cuda=cuda) for cuda in (False, True))
    unpacked = 2 * 32768 * spec.layers[0].kv_heads * (spec.layers[0].key_dim + spec.layers[0].value_dim)
    long = buffers("llama-3-8b", Request(2**20, 64, kv=("q8_0", "q8_0")), 99, 1)
    assert held(long.cards[0], "attention and the cache it unpacks") == 32 * unpacked + 4 * 64 * spec.width
    assert real.cards[0].bytes == planned.cards[0].bytes          # here the logits are larger still
    assert real.host.bytes == planned.host.bytes


# ---- as terms -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", entries())
def test_every_model_has_terms_that_say_what_fills_them(name):
    spec = model_spec(name)
    w = weights(spec, "Q4_K_M")
    count = len(spec.layers)
    for where, cards, moe in (([-1] * (count + 1), [], 0),
                              ([-1] * (count // 2) + [0] * (count + 1 - count // 2), [gpu("rtx-4090")], 2)):
        terms = compute_terms(spec, Request(8192), where, moe, cards, w)
        assert [t.device for t in terms] == [*(f"gpu{i}" for i in range(len(cards))), "host"]
        for t in terms:
            assert 0 < t.low <= t.bytes <= t.high and "512 tokens" in t.why and t.kind == "modelled"
            older = 4 * 512 * spec.width if "builds of 2025" in t.why else 0
            assert (t.high <= max(1.021 * t.bytes, t.bytes + older)) == family_of(spec).verified


def test_metal_is_given_more_room_than_cuda():
    spec = model_spec("llama-3-8b")
    here, there = (compute_terms(spec, Request(8192), [0] * 33, 0, [gpu(name)], weights(spec, "Q4_K_M"))[0]
                   for name in ("rtx-4090", next(r["id"] for r in _apple())))
    assert here.bytes == there.bytes and there.high > here.high and "other kernels" in there.why


def _apple():
    from llmlab.catalog import gpus
    return [row for row in gpus() if gpu(row["id"]).vendor == "Apple"]


def test_a_host_weight_is_copied_in_the_size_it_has():
    """In the order in which somebody might compare quants: what one of them needs is not remembered for another."""
    small, large = (buffers("llama-3.1-8b", Request(8192), 10, 1, quant=quant).cards[0].bytes for quant in ("Q4_K_M", "Q8_0"))
    copied = {quant: held(buffers("llama-3.1-8b", Request(8192), 0, 1, quant=quant).cards[0], "a copy of output")
              for quant in ("Q4_K_M", "Q8_0")}
    assert copied["Q4_K_M"] == 128256 * 4096 // 256 * 210 and copied["Q8_0"] == 128256 * 4096 // 32 * 34     # Q6_K in the first
    assert small <= large


def test_fewer_logits_make_a_smaller_buffer():
    every, few = buffers("qwen3-0.6b", Request(8192)), buffers("qwen3-0.6b", Request(8192, outputs=4))
    assert held(every.host, "logits") == 512 * 151936 * 4
    assert few.host.bytes < every.host.bytes / 4


def test_an_unknown_architecture_is_outlined():
    spec = model_spec("llama-3.2-1b")
    strange = ModelSpec("strange", "no-such-thing", spec.metadata, spec.layers, spec.tensors, "gguf")
    found = compute_buffers(strange, Request(4096))
    assert not found.verified
    assert found.host.bytes == pytest.approx(compute_buffers(spec, Request(4096)).host.bytes, rel=0.05)


def test_a_file_that_lacks_tensors_is_outlined_too():
    spec = model_spec("llama-3.2-1b")
    broken = ModelSpec("broken", "llama", spec.metadata, spec.layers,
                       tuple(t for t in spec.tensors if "attn_q" not in t.name), "gguf")
    assert not family_of(broken).verified
    assert compute_buffers(broken, Request(4096)).host.bytes > 0


def test_every_model_of_the_catalogue_has_its_architectures_graph():
    assert [name for name in entries() if family_of(model_spec(name)) is not FAMILIES[model_spec(name).architecture]] == []


@given(st.sampled_from(["llama-3.2-1b", "gemma-3-1b", "deepseek-v2-lite", "gpt-oss-20b"]), st.integers(1, 2**17),
       st.integers(1, 4096), st.booleans(), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_any_request_has_buffers(name, context, ubatch, flash, sequences):
    found = buffers(name, Request(max(context, sequences), ubatch, flash, sequences=sequences), 99, 1)
    assert found.cards[0].bytes > 0 and found.host.bytes > 0
    assert sum(bytes for *_, bytes in found.cards[0].held) <= found.cards[0].bytes


def test_from_a_config_of_ones_own():
    spec = from_config({"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                        "num_attention_heads": 2, "vocab_size": 100, "max_position_embeddings": 64}, "mine")
    assert compute_buffers(spec, Request(64)).host.bytes > 0
