"""vLLM's reservation and its pages, against its rules worked out by hand and what it logs."""

from dataclasses import replace

import pytest

from llmlab import catalog
from llmlab.errors import LabError
from llmlab.fitting import fit
from llmlab.memory import cache_bytes, loaded_bytes, weights
from llmlab.overhead import Measured
from llmlab.reserving import reservations, shard_bytes
from llmlab.shapes import model_spec
from llmlab.units import GIB, MIB
from llmlab.wording import hint


def vllm(model="llama-3-8b", card="rtx-4090-24gb", quant="BF16", **more):
    return fit(model, card, quant=quant, engine="vllm", **{"display": False, **more})


def test_the_pool_is_what_the_reservation_leaves():
    report = vllm()
    (reserved,) = report.reserved
    card = report.cards[0]
    assert reserved.requested == int(0.92 * (card.memory - card.reserved[1]))
    weights_, compute = (report.total(name, "gpu0") for name in ("weights", "compute"))
    assert 0 < reserved.requested - weights_ - compute - reserved.pool[1] < 0.4 * GIB        # libraries of its own
    assert reserved.concurrent == pytest.approx(reserved.pool[1] / report.total("kv_cache"))
    assert reserved.pool[0] < reserved.pool[1] < reserved.pool[2]


def test_utilization_moves_the_pool_and_nothing_else():
    low, high = vllm(utilization=0.8), vllm(utilization=0.95)
    card = low.cards[0]
    assert high.reserved[0].pool[1] - low.reserved[0].pool[1] == pytest.approx(0.15 * (card.memory - card.reserved[1]), abs=2)
    assert low.terms == high.terms and vllm(utilization=0.5).verdict == "does not fit"
    assert "reserves 80%" in low.answer and f"{low.reserved[0].concurrent:.1f} requests of 8,192 tokens" in low.answer


def test_a_card_in_use_is_refused():
    """vLLM raises where less is free than it reserves, however much the model needs (v1/worker/utils.py request_memory)."""
    busy = replace(catalog.gpu("rtx-4090-24gb"), free=18 * GIB)
    report = vllm("qwen2.5-0.5b", busy)
    assert report.reserved[0].starts == "does not fit" == report.verdict
    said = hint(report)
    share = float(said.split("utilization=")[1].split(")")[0])
    assert 0.5 < share < 0.75 and vllm("qwen2.5-0.5b", busy, utilization=share).fits


def test_a_desktop_may_keep_it_from_starting():
    assert vllm("qwen2.5-0.5b", "rtx-4080-16gb").fits
    report = vllm("qwen2.5-0.5b", "rtx-4080-16gb", display=None)
    assert report.verdict == "may spill" and "starts only where" in report.answer and "utilization=" in hint(report)


def test_pages_of_a_sliding_window():
    """Gemma 3 12B: 8 full layers and 40 that slide over 1024; groups of 8 layers, none of them filled up. A request keeps
    the window, two batches under way and one page more (SlidingWindowSpec)."""
    spec = model_spec("gemma-3-12b")
    row = 2 * 2 * spec.blocks[0].kv_heads * spec.blocks[0].key_dim
    window = spec.blocks[0].window
    pages = -(-min(window - 1 + 2 * 2048, 32768) // 16) + 1
    expected = row * (8 * 32768 + 40 * 16 * pages)
    assert cache_bytes(spec, 32768, engine="vllm", ubatch=2048).kv == expected
    short = cache_bytes(spec, 1000, engine="vllm", ubatch=2048)
    assert short.kv == row * (8 * 1008 + 40 * 1024)        # the one page more even where the window holds all of it


@pytest.mark.parametrize("name, context, bytes", [
    ("gemma-3-12b", 1000, 401604608), ("gemma-3-12b", 8192, 2219835392), ("gemma-3-12b", 32768, 3830448128),
    ("gemma-3-27b", 1000, 585891840), ("gemma-3-27b", 8192, 3195535360), ("gemma-3-27b", 32768, 5208801280),
    ("gemma-3-4b", 8192, 798883840), ("gpt-oss-20b", 1000, 49938432), ("gpt-oss-20b", 32768, 909508608),
    ("gpt-oss-120b", 8192, 458293248), ("gemma-2-9b", 8192, 2821324800), ("gemma-2-9b", 32768, 7049183232),
    ("olmo-3-7b", 8192, 4301258752), ("llama-3-8b", 32768, 4294967296)])
def test_what_vllm_itself_asks_for(name, context, bytes):
    """What vLLM 0.33's own planning (get_kv_cache_groups and each group's max_memory_usage_bytes, pages of 16, two batches of
    2048 tokens under way) returned for one request of that length."""
    assert cache_bytes(model_spec(name), context, engine="vllm", ubatch=2048).kv == bytes


def test_groups_of_layers_are_filled_up():
    """Gemma 3 27B: 10 full layers and 52 that slide, so 6 groups of 10 slide: 8 layers of none."""
    spec = model_spec("gemma-3-27b")
    full = sum(1 for b in spec.blocks if not b.window)
    sliding = len(spec.blocks) - full
    row = 4 * spec.blocks[0].kv_heads * spec.blocks[0].key_dim
    pages = -(-(spec.blocks[0].window - 1 + 4096) // 16) + 1
    c = cache_bytes(spec, 65536, engine="vllm", ubatch=2048)
    assert (full, sliding) == (10, 52) and c.kv == row * (10 * 65536 + 60 * 16 * pages) == sum(c.by_layer)


def test_several_cards_hold_shards():
    spec = model_spec("llama-3-70b")
    report = vllm(spec, ["h100-sxm5-80gb"] * 2, "BF16")
    matrices = sum(size for t, size in zip(spec.tensors, weights(spec, "BF16").bytes, strict=True) if len(t.shape) > 1)
    vectors = loaded_bytes(spec, "BF16") - matrices
    assert report.total("weights", "gpu0") == report.total("weights", "gpu1") == shard_bytes(spec, "BF16", 2)
    assert shard_bytes(spec, "BF16", 2) == matrices // 2 + vectors
    assert report.total("kv_cache", "gpu0") * 2 == cache_bytes(spec, 8192, engine="vllm").kv
    assert "NCCL" in next(t.why for t in report.terms if t.name == "overhead")


def test_heads_are_repeated_where_there_are_fewer_than_cards():
    spec = model_spec("qwen2.5-0.5b")                # 14 heads of queries, 2 of keys and values
    two, seven = (vllm(spec, ["rtx-4090-24gb"] * n) for n in (2, 7))
    assert two.total("kv_cache", "gpu0") == seven.total("kv_cache", "gpu0") == cache_bytes(spec, 8192, engine="vllm").kv // 2
    with pytest.raises(LabError, match="14 heads"):
        vllm(spec, ["rtx-4090-24gb"] * 4)


@pytest.mark.parametrize("given", [0, 1.5, "lots", True, -0.5, float("nan"), "1e400"])
def test_no_share(given):
    with pytest.raises(LabError, match="utilization"):
        vllm(utilization=given)


def test_only_vllm_reserves():
    with pytest.raises(LabError, match="vLLM's reservation"):
        fit("llama-3-8b", "rtx-4090-24gb", utilization=0.9)
    assert vllm().with_(engine="llama.cpp", quant="Q4_K_M").reserved == ()


def test_measured_non_torch_memory_and_graphs_lie_inside():
    """`non_torch_memory takes 0.20GiB` on 24 GB cards, 0.33 on a 5090; free at start 22.93 of 23.56 GiB on a 3090 of
    eight: 0.63 GiB of context and NCCL (logs quoted in data/overheads.csv's sources)."""
    (reserved, *_) = vllm("llama-3-70b", ["rtx-3090-24gb"] * 8, "AWQ_INT4").reserved
    card = catalog.gpu("rtx-3090-24gb")
    low, _, high = reserved.free_at_start
    assert low <= card.memory - card.reserved[1] - 0.63 * GIB <= high


def test_a_measured_context_counts_in_the_reservation_as_in_the_terms():
    card = catalog.gpu("rtx-3090-24gb")
    report = fit("llama-3-8b", card, engine="vllm", quant="AWQ_INT4")
    outside = [reservations((card,), report.settings, list(report.terms), (found,))[0].outside
               for found in (Measured(200 * MIB), Measured(500 * MIB))]
    assert outside[1] - outside[0] == 300 * MIB
