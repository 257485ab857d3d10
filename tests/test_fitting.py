"""Placement, verdicts, words and the inverse questions of fit()."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmlab
from llmlab import catalog
from llmlab.errors import LabError
from llmlab.fitting import QUANT_LADDER, fit
from llmlab.formats.mixes import MIXES
from llmlab.hardware import machine
from llmlab.memory import cache_bytes, output_bytes, weights
from llmlab.shapes import from_config, model_spec
from llmlab.units import GIB, MIB
from llmlab.wording import hint


def test_the_buffers_llama_cpp_prints_for_llama_3_8b():
    report = fit("llama-3-8b", "rtx-3060-12gb", context=8192)
    assert round(report.total("weights", "gpu0") / MIB, 2) == 4403.49      # CUDA0 model buffer, public log
    assert round(report.total("weights", "host") / MIB, 2) == 281.81       # CPU model buffer
    assert report.total("kv_cache", "gpu0") == 1024 * MIB and report.gpu_layers == 33
    assert round(report.total("output", "host") / MIB, 2) == 0.49


def test_every_byte_is_somewhere():
    """Weights over all devices are the file's tensors, and a tied table twice once the output is on a card."""
    for name, quant in (("llama-3-8b", "Q4_K_M"), ("qwen3-4b", "Q6_K"), ("qwen3-30b-a3b", "Q4_K_M"), ("gemma-3-27b", "Q4_0")):
        spec = model_spec(name)
        w = weights(spec, quant)
        for layers in (0, 1, 7, 10**6):
            report = fit(spec, ["rtx-4090-24gb"] * 2, quant=quant, gpu_layers=layers, n_cpu_moe=5)
            padding = report.total("weights") - w.padded - (w.tied if layers else 0)
            assert 0 <= padding < w.padded // 1000
            assert report.total("kv_cache") == cache_bytes(spec, 8192).kv


def test_the_output_goes_first_and_layers_follow_from_the_back():
    one = fit("llama-3-8b", "rtx-3060-12gb", gpu_layers=1)
    w = weights(model_spec("llama-3-8b"), "Q4_K_M")
    assert one.total("weights", "gpu0") == w.output and one.total("kv_cache", "gpu0") == 0
    two = fit("llama-3-8b", "rtx-3060-12gb", gpu_layers=2)
    assert two.total("weights", "gpu0") == w.output + w.by_layer[31] and two.total("kv_cache", "gpu0") == 32 * MIB
    none = fit("llama-3-8b", "rtx-3060-12gb", gpu_layers=0)
    assert none.total("weights", "gpu0") == 0 and none.total("weights", "host") == w.padded


def test_experts_stay_on_the_host_where_asked():
    spec = model_spec("qwen3-30b-a3b")
    w = weights(spec, "Q4_K_M")
    whole, some = (fit(spec, "rtx-3060-12gb", gpu_layers=49, n_cpu_moe=n) for n in (0, 10))
    assert whole.total("weights", "gpu0") - some.total("weights", "gpu0") == sum(w.experts_by_layer[:10])
    assert not whole.fits and fit(spec, "rtx-3060-12gb", gpu_layers=49, n_cpu_moe=48).fits


def test_experts_go_to_ram_only_as_far_as_they_must():
    for name, card, context in (("qwen3-30b-a3b", "rtx-3060-12gb", 8192), ("qwen3-30b-a3b", "rtx-4060-ti-16gb", 32768),
                                ("gpt-oss-120b", "rtx-4090-24gb", 16384), ("glm-4.5-air", ["rtx-3090-24gb"] * 2, 8192)):
        auto = fit(name, card, context=context, n_cpu_moe="auto")
        n = auto.n_cpu_moe
        assert auto.fits and 0 < n <= len(auto.spec.blocks) and auto.gpu_layers == auto.layers
        assert auto.terms == fit(name, card, context=context, n_cpu_moe=n).terms
        assert n == 1 or not fit(name, card, context=context, n_cpu_moe=n - 1).fits
        assert auto.settings.n_cpu_moe == "auto" and auto.with_(context=context * 2).n_cpu_moe >= n
        assert f"experts of {n} block" in auto.answer
    assert fit("qwen3-30b-a3b", "h100-sxm5-80gb", n_cpu_moe="auto").n_cpu_moe == 0
    assert fit("llama-3-8b", "rtx-3060-12gb", n_cpu_moe="auto").n_cpu_moe == 0
    assert fit("qwen3-30b-a3b", None, n_cpu_moe="auto", host="64 GiB").n_cpu_moe == 0


def test_where_even_the_dense_part_is_too_large_all_experts_and_some_layers_stay_in_ram():
    report = fit("deepseek-v3", "rtx-3060-12gb", n_cpu_moe="auto")
    assert report.verdict == "does not fit" and report.partial and report.n_cpu_moe == len(report.spec.blocks)
    assert 0 < report.gpu_layers < report.layers
    device = report.devices["gpu0"]
    assert device.high <= device.free


def test_a_given_split_puts_on_each_card_what_it_says_and_each_is_judged():
    cards = ["rtx-4090-24gb", "gtx-1060-6gb"]
    even = fit("qwen2.5-32b", cards, split=(1, 1))
    assert even.verdict == "does not fit" and even.partial and even.gpu_layers < even.layers
    forced = fit("qwen2.5-32b", cards, split=(1, 1), gpu_layers=65)
    assert forced.devices["gpu0"].verdict == "fits" and forced.devices["gpu1"].verdict == "does not fit"
    assert forced.verdict == "does not fit" and not forced.partial
    by_memory = fit("qwen2.5-32b", cards, gpu_layers=65)
    first, second = (by_memory.total("weights", f"gpu{i}") for i in (0, 1))
    assert first > 3 * second


def test_uneven_free_memory_sets_the_split():
    card = catalog.gpu("rtx-3090-24gb")
    busy = fit("llama-3-70b", [replace(card, free=23 * GIB), replace(card, free=8 * GIB)], gpu_layers=81, quant="IQ2_M")
    first, second = (busy.total("weights", f"gpu{i}") for i in (0, 1))
    assert 2.2 < first / second < 3.6
    none = fit("llama-3-70b", [card, replace(card, free=0)], gpu_layers=20)
    assert none.total("weights", "gpu1") == 0


def test_several_cards_share_by_the_split():
    report = fit("llama-3-70b", ["rtx-3090-24gb", "rtx-3060-12gb"], split=(3, 1), gpu_layers=81)
    first, second = (report.total("weights", f"gpu{i}") for i in (0, 1))
    assert 2.5 < first / second < 3.5
    even = fit("llama-3-70b", ["rtx-3090-24gb"] * 2)
    assert even.fits and abs(even.total("weights", "gpu0") / even.total("weights", "gpu1") - 1) < 0.05


def test_a_tied_table_is_on_both_sides_of_the_link():
    spec = model_spec("qwen3-4b")
    w = weights(spec, "Q4_K_M")
    on_card, on_host = (fit(spec, "rtx-3060-12gb", gpu_layers=n) for n in (37, 0))
    assert on_card.total("weights", "host") == w.embedding and on_card.total("weights", "gpu0") >= w.padded
    assert on_host.total("weights", "host") == w.padded


def test_multi_token_prediction_blocks_are_not_loaded():
    spec = model_spec("glm-4.5-air")
    w = weights(spec, "Q4_K_M")
    report = fit(spec, ["rtx-pro-6000-blackwell-96gb"] * 2)
    assert w.padded - report.total("weights") > w.by_layer[-1] * 0.99


@pytest.mark.parametrize("model, card, quant, verdict", [
    ("llama-3-8b", "rtx-3060-12gb", "Q4_K_M", "fits"), ("llama-3-8b", "rtx-3060-12gb", "F16", "does not fit"),
    ("llama-2-13b", "rtx-4090-24gb", "Q8_0", "fits"), ("llama-3-70b", "rtx-4090-24gb", "Q4_K_M", "does not fit"),
    ("qwen2.5-7b", "rtx-4060-ti-16gb", "IQ4_XS", "fits"), ("llama-3-70b", "h100-sxm5-80gb", "Q4_K_M", "fits"),
    ("deepseek-v3", "h100-sxm5-80gb", "IQ1_S", "does not fit")])
def test_verdicts_nobody_doubts(model, card, quant, verdict):
    report = fit(model, card, quant=quant)
    assert report.verdict == verdict and report.fits == (verdict == "fits")


def test_in_between_it_may_spill():
    card = catalog.gpu("rtx-3060-12gb")
    whole = fit("llama-3-8b", card)
    used = whole.devices["gpu0"]
    for free, verdict in ((used.high, "fits"), (used.high - 1, "may spill"), (used.low, "may spill"),
                          (used.low - 1, "does not fit")):
        shrunk = replace(card, memory=free)
        report = fit("llama-3-8b", shrunk)
        # what the driver keeps may depend on the size; compare through the report's own numbers
        d = report.devices["gpu0"]
        if (d.high, d.low) == (used.high, used.low):
            assert report.verdict == verdict


def test_a_live_card_is_judged_by_what_is_free():
    card = catalog.gpu("rtx-3060-12gb")
    assert fit("llama-3-8b", replace(card, free=11 * GIB)).fits
    assert fit("llama-3-8b", replace(card, free=4 * GIB)).verdict == "does not fit"


def test_auto_puts_as_many_layers_as_fit_and_no_more():
    report = fit("llama-3-70b", "rtx-4090-24gb")
    device = report.devices["gpu0"]
    assert report.verdict == "does not fit" and 20 < report.gpu_layers < 81 and device.high <= device.free
    assert fit("llama-3-70b", "rtx-4090-24gb", gpu_layers=report.gpu_layers).fits
    more = fit("llama-3-70b", "rtx-4090-24gb", gpu_layers=report.gpu_layers + 1).devices["gpu0"]
    assert more.high > more.free


def test_the_host_alone():
    report = fit("smollm2-135m", None, host="4 GiB")
    assert report.fits and set(report.devices) == {"host"} and report.gpu_layers == 0
    assert fit("llama-3-70b", None, host="16 GiB").verdict == "does not fit"
    assert report.devices["host"].capacity == 4 * GIB
    assert "of which the system keeps 2.00 GiB: it needs" in fit("llama-3-70b", None, host="16 GiB").answer


def test_pages_that_were_laid_out_anew_decide_nothing():
    report = fit("llama-3-8b", replace(machine(), cards=(), cpu=replace(machine().cpu, features=("avx2",))), host="8 GiB")
    host, copies = report.devices["host"], report.total("repacked")
    assert copies > 3 * GIB and host.returned == copies and host.needed == host.used - copies
    assert host.used > host.free and report.fits and "RAM: it needs 5.84 GiB, and takes 3.13 GiB more" in report.answer
    assert not report.with_(quant="Q8_0").fits and report.with_(quant="Q8_0").devices["host"].returned == 0
    assert fit("llama-3-8b", "rtx-3060-12gb", gpu_layers=10, host="8 GiB").devices["host"].returned == 0


def test_terms_say_what_they_are():
    report = fit("qwen3.5-9b", "rtx-3060-12gb", context=4096)
    kinds = {t.name: t.kind for t in report.terms}
    assert kinds == {"weights": "exact", "kv_cache": "exact", "recurrent": "exact", "compute": "modelled",
                     "overhead": "modelled", "output": "exact"}
    for t in report.terms:
        assert t.why and t.low <= t.bytes <= t.high and (t.kind != "exact" or t.low == t.high)
    assert sum(t.bytes for t in report.terms if t.device == "gpu0") == report.devices["gpu0"].used


def test_json_has_the_promised_shape():
    said = json.loads(json.dumps(fit("llama-3-8b", "rtx-3060-12gb").to_dict()))
    assert set(said) == {"model", "quant", "verdict", "fits", "tensor_bytes", "file_bytes", "devices", "gpu_layers", "speed"}
    assert set(said["devices"]["gpu0"]) == {"capacity", "weights", "kv_cache", "recurrent", "compute", "overhead"}
    assert set(said["devices"]["host"]) == {"capacity", "weights", "repacked", "kv_cache", "recurrent", "compute", "output"}
    assert said["file_bytes"] is None and said["tensor_bytes"] == 4912898048 and len(said["speed"]["decode_tps"]) == 3


def test_json_says_more_only_where_there_is_more():
    moe = fit("qwen3-30b-a3b", "rtx-3060-12gb", n_cpu_moe="auto").to_dict()
    assert moe["n_cpu_moe"] > 0 and "reserved" not in moe and "beyond_training" not in moe
    served = json.loads(json.dumps(fit("llama-3-8b", "rtx-4090-24gb", engine="vllm", quant="BF16", context=16384).to_dict()))
    assert served["beyond_training"] == 8192 and set(served["reserved"][0]) == {"requested", "pool", "concurrent"}


def test_another_draft_has_its_own_quant():
    report = fit("qwen2.5-7b", "rtx-3090-24gb", draft="qwen2.5-0.5b", draft_quant="Q8_0")
    assert report.with_(draft="qwen2.5-1.5b").settings.draft_quant == "Q4_K_M"
    assert report.with_(draft=None).total("draft") == 0 and report.with_(context=4096).settings.draft_quant == "Q8_0"


def test_largest_context_is_the_largest():
    report = fit("llama-3.1-8b", "rtx-3060-12gb")
    largest = report.largest_context()
    assert 32768 < largest < 131072 and largest % 256 == 0
    assert report.with_(context=largest).fits and not report.with_(context=largest + 256).fits
    assert fit("llama-3-70b", "rtx-3060-12gb").largest_context() == 0
    assert fit("smollm2-135m", "rtx-4090-24gb").largest_context() == 8192      # all it was trained for


def test_best_quant_is_the_first_that_fits():
    report = fit("llama-2-13b", "rtx-3060-12gb", context=4096)
    best = report.best_quant()
    assert report.with_(quant=best).fits
    assert not any(report.with_(quant=q).fits for q in QUANT_LADDER[:QUANT_LADDER.index(best)])
    assert fit("deepseek-v3", "rtx-3060-12gb").best_quant() is None


def test_words():
    assert fit("llama-3-8b", "rtx-3060-12gb").answer == (
        "Llama 3 8B in Q4_K_M with 8,192 tokens of context fits GeForce RTX 3060 12GB: 6.23 GiB of 12.00 GiB.")
    assert "layers go on the card" in fit("llama-3-70b", "rtx-4090-24gb").answer
    assert "trained for 8,192" in fit("llama-3-8b", "rtx-4090-24gb", context=16384).answer
    assert "2 x GeForce RTX 3090" in fit("llama-3-70b", ["rtx-3090-24gb"] * 2).answer


@pytest.mark.parametrize("settings, says", [
    (dict(quant="Q4_Z"), "Q4_"), (dict(quant=""), "Q4_K_M"), (dict(context=-1), "context"), (dict(context="8k"), "context"),
    (dict(gpu_layers=-1), "gpu_layers"), (dict(gpu_layers="all"), "gpu_layers"), (dict(n_cpu_moe=-1), "n_cpu_moe"),
    (dict(split=(1, 2, 3)), "split"), (dict(split="x"), "split"), (dict(split=(0,)), "split"), (dict(host="lots"), "size"),
    (dict(host=-1), "size"), (dict(engine="exllama"), "engine"), (dict(quant="NF4"), "llama.cpp"),
    (dict(quant="Q4_K_M", engine="transformers"), "transformers"), (dict(ubatch=0), "ubatch"),
    (dict(sequences=0), "sequences")])
def test_settings_that_cannot_be_are_refused_in_one_line(settings, says):
    if settings == dict(quant=""):
        settings = dict(quant=" ")
    with pytest.raises(LabError, match=says) as refused:
        fit("llama-3-8b", "rtx-3060-12gb", **settings)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


def test_other_engines():
    nf4 = fit("llama-3-8b", "rtx-3060-12gb", quant="NF4", engine="transformers")
    assert nf4.fits and nf4.total("weights", "host") == 0
    assert fit("llama-3-8b", "rtx-4090-24gb", quant="BF16", engine="vllm").total("weights", "gpu0") > 14 * GIB
    assert fit("llama-3-8b", "rtx-4090-24gb", quant="AWQ_INT4", engine="vllm", kv="fp8").fits


@given(st.sampled_from(["llama-3-8b", "qwen3-30b-a3b", "gemma-3-12b", "deepseek-v2-lite", "qwen3.5-9b"]),
       st.sampled_from([q for q, m in MIXES.items() if m.engine == "llama.cpp" and not q.startswith(("Q1_", "Q2_0"))]),
       st.integers(1, 131072), st.sampled_from(["f16", "q8_0", "q4_0"]), st.integers(0, 90),
       st.lists(st.sampled_from(["rtx-3060-12gb", "rtx-4090-24gb", "gtx-1060-6gb"]), max_size=3))
@settings(max_examples=200, deadline=None)
def test_nothing_is_lost_whatever_the_placement(name, quant, context, kv, layers, cards):
    spec = model_spec(name)
    report = fit(spec, cards or None, quant=quant, context=context, kv=kv, gpu_layers=layers, host="64 GiB")
    c = cache_bytes(spec, context, kv)
    assert report.total("kv_cache") == c.kv and report.total("recurrent") == c.recurrent
    assert report.total("output") == output_bytes(spec)
    assert report.gpu_layers <= len(spec.layers) + 1
    assert report.verdict in ("fits", "may spill", "does not fit") and report.answer


def test_unified_memory_is_one_memory():
    moe = fit("qwen3-30b-a3b", "jetson-orin-nx-16gb", n_cpu_moe=48)           # 3 GiB as card memory, 16 as RAM, 16 in all
    assert moe.verdict == "does not fit" and moe.devices["host"].verdict == "does not fit"
    whole = fit("qwen3-30b-a3b", "jetson-orin-nx-16gb")
    assert whole.verdict == "does not fit" and "either" in whole.answer
    assert fit("llama-3-8b", "jetson-orin-nx-16gb").fits


@given(st.sampled_from(["llama-3-8b", "gemma-3-12b", "qwen3-30b-a3b", "smollm2-135m"]),
       st.sampled_from([row["id"] for row in catalog.gpus() if catalog.gpu(row["id"]).unified]),
       st.integers(512, 65536), st.integers(0, 60), st.sampled_from([None, "8 GiB", "16 GiB", "48 GiB"]))
@settings(max_examples=60, deadline=None)
def test_one_memory_is_not_spent_twice(name, card, context, layers, host):
    """Where a chip shares its RAM and the report says it fits, both sums together leave the system its part."""
    report = fit(name, card, context=context, gpu_layers=layers, host=host)
    card_, ram = report.devices["gpu0"], report.devices["host"]
    twice = weights(report.spec, "Q4_K_M").tied if report.cards[0].vendor == "Apple" and report.gpu_layers else 0
    held = card_.used - report.cards[0].reserved[1] + ram.needed - twice
    assert card_.capacity == ram.capacity
    if host:
        assert ram.capacity <= int(host.split()[0]) * GIB
    if report.fits:
        assert held <= ram.capacity - min(2 * GIB, ram.capacity // 8)


@given(st.sampled_from(["llama-3-8b", "qwen3-30b-a3b", "gemma-3-27b", "qwen3.5-9b"]), st.integers(1, 40), st.integers(1, 8),
       st.sampled_from(["llama.cpp", "vllm", "transformers"]), st.sampled_from([0, "auto", 7]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_more_memory_never_makes_it_worse(name, size, more, engine, moe, live):
    ranks = {"does not fit": 0, "may spill": 1, "fits": 2}
    card = catalog.gpu("rtx-4090-24gb")
    quant = {"llama.cpp": "Q4_K_M", "vllm": "AWQ_INT4", "transformers": "NF4"}[engine]
    sizes = [replace(card, free=gib * GIB) if live else replace(card, id="x", memory=gib * GIB) for gib in (size, size + more)]
    small, large = (fit(name, one, quant=quant, engine=engine, n_cpu_moe=moe if engine == "llama.cpp" else 0) for one in sizes)
    assert ranks[small.verdict] <= ranks[large.verdict]
    assert small.gpu_layers <= large.gpu_layers and small.n_cpu_moe >= large.n_cpu_moe or engine != "llama.cpp"
    for report in (small, large):
        for device in report.devices.values():
            mine = [t for t in report.terms if t.device == device.name]
            assert [sum(getattr(t, what) for t in mine) for what in ("low", "bytes", "high")] == [
                device.low, device.used, device.high]


def test_a_card_with_no_layers_still_computes():
    """llama.cpp copies the output matrix over for large batches: 548.18 MiB printed for a Qwen2.5 3B with no layer there, by
    a build that kept one more row of activations (see test_graphs)."""
    report = fit("qwen2.5-3b", "gtx-1660-ti-6gb", gpu_layers=0, context=4096)
    assert round((report.total("compute", "gpu0") + 4 * 512 * 2048) / MIB, 2) == 548.18
    compute = next(t for t in report.terms if (t.name, t.device) == ("compute", "gpu0"))
    assert compute.low <= 548.18 * MIB <= compute.high


def test_per_layer_embeddings_split_as_llama_cpp_splits_them():
    """Gemma's per-layer table stays on the host; its projection runs with block 0 (llama-arch.cpp: a repeating tensor)."""
    spec = model_spec("gemma-4-e2b")
    report = fit(spec, "rtx-3060-12gb", gpu_layers=99)
    w = weights(spec, "Q4_K_M")
    size = {t.name: b for t, b in zip(spec.tensors, w.bytes, strict=True)}
    assert report.total("weights", "host") == size["token_embd.weight"] + size["per_layer_token_embd.weight"]


def test_prefill_is_never_slower_than_decode():
    for row in catalog.gpus():
        rates = fit("llama-3-8b", row["id"], quant="Q4_0", context=2048, gpu_layers=99).speed
        if rates.decode_tps and rates.prefill_tps:
            assert rates.prefill_tps[1] > rates.decode_tps[1], row["id"]


def test_a_prompt_is_multiplied_on_the_card_though_its_weights_lie_in_ram():
    """19 GiB over PCIe 4.0 for every 512 tokens take about a second: hundreds of tokens a second, not a handful."""
    low, best, high = fit("llama-3-70b", "rtx-3090-24gb").speed.prefill_tps
    assert 50 < low < best < high < 700
    alone = fit("llama-3-70b", None, host="64 GiB").speed.prefill_tps
    assert alone[1] < 10


def test_more_sequences_share_a_longer_context():
    report = fit("llama-3-8b", "h100-sxm5-80gb", sequences=32)
    assert report.largest_context() > 8192 * 4 and report.largest_context() <= 8192 * 32
    assert fit("llama-3-8b", "rtx-3060-12gb", context=4096, sequences=512).largest_context() == 0


def test_each_engine_has_its_own_ladder():
    assert fit("llama-3-8b", "rtx-3060-12gb", quant="NF4", engine="transformers").best_quant() == "NF4"
    assert fit("llama-3-8b", "rtx-4080-16gb", quant="AWQ_INT4", engine="vllm", display=False).best_quant() == "FP8"
    with pytest.raises(LabError, match="zz"):
        fit("llama-3-8b", "rtx-3060-12gb").best_quant(["zz"])
    with pytest.raises(LabError, match="ladder"):
        fit("llama-3-8b", "rtx-3060-12gb").best_quant("Q4_K_M")


def test_a_model_is_not_unpacked_to_seem_more_faithful():
    """gpt-oss was published in MXFP4: no larger quant says more."""
    report = fit("gpt-oss-20b", "rtx-4060-ti-16gb")
    assert report.best_quant() == "MXFP4_MOE" and fit("gpt-oss-20b", "h100-sxm5-80gb").best_quant() == "MXFP4_MOE"


def test_hints_are_true():
    for name, card, context in (("llama-3-8b", "rtx-3060-12gb", 65536), ("qwen3-30b-a3b", "rtx-3060-12gb", 16384),
                                ("llama-3-70b", "rtx-3090-24gb", 8192)):
        report = fit(name, card, context=context)
        said = hint(report)
        whole = report.with_(gpu_layers=report.layers)
        if "q8_0" in said:
            assert whole.with_(kv="q8_0").fits
        if blocks := re.search(r"experts of (\d+) blocks", said):
            n = int(blocks[1])
            assert whole.with_(n_cpu_moe=n).fits and not whole.with_(n_cpu_moe=n - 1).fits
        assert "at most 8,192" not in said          # the context a model was trained for is no limit of memory
    assert "it was trained for" in hint(fit("llama-3-8b", "rtx-3060-12gb", context=65536))
    assert "experts" in hint(fit("qwen3-30b-a3b", "rtx-3060-12gb", context=16384))


def test_the_table_adds_up():
    report = fit("llama-3-70b", "rtx-4090-24gb")
    rows = list(report.table)
    for device in report.devices:
        mine = [row for row in rows if row["device"] == device]
        assert mine[-1]["term"] == "in all"
        assert abs(sum(row["GiB"] for row in mine[:-1]) - mine[-1]["GiB"]) < 1e-6


def test_what_is_short_is_named():
    assert "RAM beside" in fit("llama-3-70b", "rtx-3060-12gb", gpu_layers=10, host="16 GiB").answer
    assert fit("llama-3-8b", "rtx-3060-12gb", host="1 GiB").gpu_layers == 33
    assert "in RAM" in fit("qwen3-30b-a3b", "rtx-3060-12gb", n_cpu_moe=48).answer


def test_whole_numbers_of_any_kind():
    numpy = pytest.importorskip("numpy")
    assert fit("llama-3-8b", "rtx-3060-12gb", context=numpy.int64(4096), gpu_layers=numpy.int32(5)).settings.context == 4096


def test_nothing_is_kept_when_a_model_is_gone():
    import gc
    import weakref
    spec = from_config(dict(catalog.entry("llama-3-8b").config), "passing")
    fit(spec, "rtx-3060-12gb").best_quant()
    gone = weakref.ref(spec)
    del spec
    gc.collect()
    assert gone() is None


def test_the_face():
    assert llmlab.fit("llama-3-8b", "rtx-3060-12gb").fits
    assert llmlab.size(llmlab.model("llama-3-8b"), "IQ4_XS").tensor_bytes == 4476526592
    assert llmlab.mix(llmlab.model("llama-3-8b"), "Q8_0")["token_embd.weight"] == "Q8_0"
    assert llmlab.gpu("rtx-4090-24gb").memory == 24 * GIB
    with pytest.raises(AttributeError, match="llmlab has no"):
        getattr(llmlab, "nothing")  # noqa: B009


def test_the_quant_nobody_names_is_one_the_engine_runs():
    """llama.cpp: as stored, or Q4_K_M; the others take the checkpoint as it is."""
    assert [fit("llama-3-8b", "rtx-4090-24gb", engine=engine).settings.quant for engine in ("llama.cpp", "transformers", "vllm")
            ] == ["Q4_K_M", "BF16", "BF16"]
