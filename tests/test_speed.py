"""Speed: against what people measured, against what physics allows, and the bands' own promises."""

import csv
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

import llmlab
from llmlab import catalog, fit
from llmlab.memory import cache_bytes, weights
from llmlab.rates import USUAL
from llmlab.speed import reading, speed
from llmlab.units import GB

HERE = Path(__file__).resolve().parent
MEASURED = {row["id"]: row for row in csv.DictReader((HERE.parent / "data" / "measured_speeds.csv").open(encoding="utf-8"))}
OTHERS = list(csv.DictReader((HERE / "golden" / "speeds.csv").open(encoding="utf-8")))

@pytest.fixture(autouse=True)
def nothing_measured(tmp_path, monkeypatch):
    """What was measured of the computer that runs the tests says nothing of those that people wrote about."""
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))


# ---- data/measured_speeds.csv, groups A (all on the card), B (card and processor), C (experts on the processor) ------

SOON = 512        # tokens of context: these speeds were taken soon after the start
QUAD = "DDR4-3200 quad, 10 cores"        # an i9-10900X: four channels
CODESTRAL = {     # not in the catalogue; its config.json
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 6144, "num_hidden_layers": 56,
    "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 16384, "vocab_size": 32768,
    "max_position_embeddings": 32768, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
ALL = {"gpu_layers": 99}
AUTO = {"gpu_layers": "auto", "context": 4096}      # what fits, as the tools that measured chose it

# row -> [(tokens per second as the row says them, model, cards, quant, settings)]; a pair is a range the row gives
SAYS_ENOUGH = {
    "A1": [(70.94, "llama-3-8b", "rtx-3070-8gb", "Q4_K_M", ALL)],
    "A3": [(106.22, "llama-3-8b", "rtx-4080-16gb", "Q4_K_M", ALL), (40.29, "llama-3-8b", "rtx-4080-16gb", "F16", ALL)],
    "A5": [(127.74, "llama-3-8b", "rtx-4090-24gb", "Q4_K_M", ALL), (54.34, "llama-3-8b", "rtx-4090-24gb", "F16", ALL)],
    "A6": [(16.29, "llama-3-70b", ["rtx-3090-24gb"] * 2, "Q4_K_M", ALL),
           (19.06, "llama-3-70b", ["rtx-4090-24gb"] * 2, "Q4_K_M", ALL)],
    "A9": [(83.96, "gpt-oss-20b", "rtx-3060-12gb", "MXFP4_MOE", ALL),
           (79.14, "gpt-oss-20b", "rtx-3060-12gb", "MXFP4_MOE", ALL)],
    "A10": [(105.3, "llama-3.1-8b", "rtx-5070-12gb", "Q4_K_M", ALL)],
    "A12": [(17.6, "qwen3.8-27b", "rtx-4060-ti-16gb", "Q4_0", ALL)],      # 4 bits of 27 B are its 14.8 GB
    "A13": [(47.2, "llama-3.1-8b", "rtx-4060-laptop-8gb", "Q4_K_M", ALL)],
    "B1": [(26.1, "gemma-3-12b", "rtx-2080-8gb", "Q4_K_M", {"gpu_layers": 44, "host": QUAD})],
    "B3": [(16.7, "phi-4", "rtx-2080-8gb", "Q4_K_M", {"gpu_layers": 32, "host": QUAD})],
    "B5": [(23.7, "gemma-2-9b", "rtx-2080-8gb", "Q4_K_M", {"gpu_layers": 36, "host": QUAD})],
    "B7": [(5.05, CODESTRAL, "rtx-2080-8gb", "Q4_K_M", AUTO | {"host": QUAD}),
           (3.89, "gemma-2-27b", "rtx-2080-8gb", "Q4_K_M", AUTO | {"host": QUAD})],
    "B8": [(7.61, "mistral-small-3-24b", "rtx-5070-12gb", "Q4_K_M", AUTO)],
    "B10": [(4.42, "qwen3-32b", "rtx-5070-12gb", "Q4_K_M", AUTO), (4.09, "qwen2.5-coder-32b", "rtx-5070-12gb", "Q4_K_M", AUTO)],
    "B11": [(5.3, "qwen2.5-14b", "rtx-4060-laptop-8gb", "Q4_K_M", AUTO)],
    "B12": [(3.10, "llama-3.1-70b", "rtx-4090-24gb", "Q4_K_M", AUTO | {"host": "DDR5"})],      # a 7900X takes no other
    "B14": [(4.2, "qwen3.8-27b", "rtx-5060-laptop-8gb", "IQ4_XS", {"gpu_layers": 25})],
    "B18": [(11.09, "qwen3-30b-a3b", "rtx-5070-12gb", "Q3_K_M", ALL)],
    "C3": [(49.6, "deepseek-v2-lite", "rtx-2080-8gb", "Q4_K_M", ALL | {"n_cpu_moe": 16, "host": QUAD})],
    "C5": [(64, "gpt-oss-20b", "rtx-3060-12gb", "MXFP4_MOE", ALL | {"n_cpu_moe": 2, "context": 16384})],
    # the card of C6 is not named: whichever it is, nine tenths of the time are the processor's
    "C6": [(18.0, "gpt-oss-120b", "rtx-3090-24gb", "MXFP4_MOE", ALL | {"n_cpu_moe": 36, "host": "DDR5"}),
           (25.6, "gpt-oss-120b", "rtx-3090-24gb", "MXFP4_MOE", ALL | {"n_cpu_moe": 36, "host": "DDR5"})],
    "C7": [((14, 15), "gpt-oss-120b", None, "MXFP4_MOE", {"host": "DDR5, 8 cores"})],
    "C8": [((10, 17), "gpt-oss-120b", ["rtx-3090-24gb"] * 2, "MXFP4_MOE", ALL | {"n_cpu_moe": 26, "host": "64 GB DDR4"})],
    "C9": [(108, "gpt-oss-120b", ["rtx-5090-32gb"] * 2, "MXFP4_MOE", ALL | {"n_cpu_moe": 3})],
}
LEFT_OUT = {
    "A7": "out of memory: the verdict is checked instead",
    "B13": "neither the quant nor the card nor the split is said",
    "B15": "the RTX PRO 3000 Laptop is not in the catalogue",
    "B16": "the card is not named",
    "B17": "how much spilled is not said",
    "B19": "reads its weights from a disk: checked below, by its rate",
    "C10": "another engine (ik_llama.cpp) and its own formats",
    "C11": "another engine (ktransformers); the llama.cpp figure beside it names no split",
    "C12": "another engine (ktransformers)",
    "C13": "another engine (ktransformers), and swap",
    "C14": "a fork that reads experts by DMA",
    "C15": "the model is not named",
    "C16": "another engine (ds4)",
    "C17": "another engine, several requests at once",
}


def ask(model, cards, quant, settings):
    return fit(model, cards, quant=quant, **{"context": SOON, **settings}).speed


def inside(measured, band) -> bool:
    """A figure, or the middle of a range."""
    middle = math.sqrt(measured[0] * measured[1]) if isinstance(measured, tuple) else measured
    return band[0] <= middle <= band[2]


def test_every_row_of_groups_a_b_and_c_is_asked_or_says_too_little():
    assert set(SAYS_ENOUGH) | set(LEFT_OUT) == {name for name in MEASURED if name[0] in "ABC"}
    assert not set(SAYS_ENOUGH) & set(LEFT_OUT)
    for name, cases in SAYS_ENOUGH.items():       # the figures are the row's own
        said = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", MEASURED[name]["tokens_per_second"])}
        asked = {float(n) for case in cases for n in (case[0] if isinstance(case[0], tuple) else (case[0],))}
        assert asked <= said, name


def test_most_measured_speeds_lie_in_their_band():
    missed = {}
    for name, cases in SAYS_ENOUGH.items():
        for measured, *question in cases:
            band = ask(*question).decode_tps
            assert band[2] <= 2 * band[0], (name, band)
            if not inside(measured, band):
                missed[name] = (measured, band)
    assert len(missed) <= 0.2 * len(SAYS_ENOUGH), missed


def test_what_ran_out_of_memory_does_not_fit():
    for card in ("rtx-3090-24gb", "rtx-4090-24gb"):
        assert fit("llama-3-70b", card, quant="Q4_K_M", context=SOON).verdict == "does not fit"


# ---- other people's measurements: constants were fitted on those marked "fit", the others are a check -----------------

def measured_elsewhere(row):
    """The report's band for a row of tests/golden/speeds.csv, and the row's figure."""
    engine = row["engine"] or "llama.cpp"
    settings = {"context": int(row["context"]), "engine": engine, "flash_attention": row["flash"] != "no"}
    if row["cards"] and engine == "llama.cpp":
        settings["gpu_layers"] = int(row["gpu_layers"] or 999)
    for name in ("n_cpu_moe", "ubatch"):
        if row[name]:
            settings[name] = int(row[name])
    if "ubatch" in settings:
        settings["batch"] = max(settings["ubatch"], 2048)
    if row["host"] or not row["cards"]:
        settings["host"] = f"512 GB {row['host']}"
    report = fit(row["model"], row["cards"].split("|") if row["cards"] else None, quant=row["quant"], **settings)
    band = report.speed.decode_tps if row["test"] == "decode" else report.speed.prefill_tps
    return band, float(row["tokens_per_second"])


def share_inside(rows) -> float:
    hits = [band[0] <= figure <= band[2] for band, figure in map(measured_elsewhere, rows)]
    return sum(hits) / len(hits)


@pytest.mark.parametrize(("use", "test", "since", "least"), [
    ("fit", "decode", 2024, 0.88), ("fit", "prefill", 2024, 0.88), ("check", "decode", 0, 0.8), ("check", "decode", 2024, 0.8),
    ("check", "prefill", 2024, 0.8)])
def test_other_peoples_measurements(use, test, since, least):
    """Prefill is held to builds since 2024: in June 2024 llama.cpp got kernels that multiply quantized weights on int8
    tensor cores (ggml-org/llama.cpp #7676, #7860), and a prompt went up to twice as fast."""
    rows = [r for r in OTHERS if r["use"] == use and r["test"] == test and int(r["year"]) >= since]
    assert len(rows) >= 18
    assert share_inside(rows) >= least


def test_the_usual_guess_is_not_one_sided():
    """Half of what was measured is faster and half slower than the best guess, within a few per cent."""
    rows = [r for r in OTHERS if r["test"] == "decode" and int(r["year"]) >= 2024]
    ratios = sorted(figure / band[1] for band, figure in map(measured_elsewhere, rows))
    assert 0.88 < ratios[len(ratios) // 2] < 1.12


# ---- what the bands promise --------------------------------------------------------------------------------------------

CASES = [("llama-3-8b", "Q4_K_M", {}), ("smollm2-135m", "Q8_0", {}), ("gpt-oss-20b", "MXFP4_MOE", {"n_cpu_moe": 6}),
         ("gemma-3-27b", "IQ3_XXS", {"gpu_layers": 20}), ("deepseek-v2-lite", "Q4_K_M", {"n_cpu_moe": 9, "gpu_layers": 20}),
         ("qwen3.5-9b", "Q6_K", {"gpu_layers": 3}), ("llama-3-70b", "Q2_K", {"gpu_layers": 99, "host": "32 GB"}),
         ("qwen3-30b-a3b", "Q4_K_M", {"context": 32768, "sequences": 4}), ("granite-4.0-h-tiny", "Q4_K_M", {}),
         ("llama-3-8b", "BF16", {"engine": "transformers"}), ("llama-3-8b", "NF4", {"engine": "transformers"}),
         ("llama-3-8b", "FP8", {"engine": "vllm"})]


@pytest.mark.parametrize(("model", "quant", "settings"), CASES)
def test_no_band_is_wider_than_a_factor_of_two(model, quant, settings):
    for card in [row["id"] for row in catalog.gpus()] + [None]:
        settings = settings if card or "engine" in settings else {k: v for k, v in settings.items() if k == "context"}
        said = fit(model, card, quant=quant, **settings).speed
        for band in (said.decode_tps, said.prefill_tps):
            if band is not None:
                assert 0 < band[0] <= band[1] <= band[2] <= 2 * band[0] * (1 + 1e-9), (card, band)


@pytest.mark.parametrize(("model", "quant"), [("llama-3-8b", "Q4_K_M"), ("llama-3-8b", "F16"), ("gemma-2-2b", "Q8_0"),
                                              ("qwen3-30b-a3b", "Q4_K_M"), ("smollm2-135m", "IQ4_XS")])
def test_nothing_is_faster_than_memory_can_be_read(model, quant):
    """The floor of seconds: every byte a token needs, once, at the card's peak bandwidth; nothing is cached at the start."""
    spec = llmlab.model(model)
    for row in catalog.gpus():
        card = catalog.gpu(row["id"])
        report = fit(spec, card, quant=quant, context=4096, gpu_layers=999)
        if report.verdict == "fits" and report.speed.decode_tps:
            start, full = weights(spec, quant).active, cache_bytes(spec, 4096).full
            _, best, high = report.speed.decode_tps
            assert high <= card.bandwidth / start and best <= card.bandwidth / (start + full), card.id
    host = fit(spec, None, quant=quant, context=4096, host="256 GB DDR5-5600").speed
    assert host.decode_tps[2] <= 2 * 5600e6 * 8 / weights(spec, quant).active


def test_more_bandwidth_is_never_slower():
    card = catalog.gpu("rtx-3060-12gb")
    rates = [fit("llama-3-8b", replace(card, bandwidth=bandwidth * GB), context=4096).speed.decode_tps
             for bandwidth in (50, 150, 360, 720, 1500, 4000)]
    for slower, faster in zip(rates, rates[1:], strict=False):
        assert all(a <= b for a, b in zip(slower, faster, strict=True))
    rams = [fit("llama-3-70b", "rtx-3060-12gb", host=ram).speed.decode_tps
            for ram in ("DDR4-2133", "DDR4-3200", "DDR5-6000", "DDR5-6400 quad", "DDR5-4800 12 channels")]
    assert all(a[1] < b[1] for a, b in zip(rams, rams[1:], strict=False))


@pytest.mark.parametrize("model", ["llama-3-8b", "gemma-3-12b", "gpt-oss-20b", "qwen3.5-9b"])
def test_more_layers_on_the_card_are_never_slower(model):
    spec = llmlab.model(model)
    rates = [fit(spec, "rtx-4090-24gb", gpu_layers=n, context=2048).speed.decode_tps[1] for n in range(len(spec.layers) + 2)]
    # the first layer moved brings a hand-over with it, and no more than that
    assert all(1 / b - 1 / a < 1.5e-4 for a, b in zip(rates, rates[1:], strict=False))
    assert rates[-1] == max(rates) and rates[-1] > 5 * rates[0]


def test_fewer_experts_on_the_host_are_never_slower():
    rates = [fit("gpt-oss-20b", "rtx-4090-24gb", n_cpu_moe=n, context=2048).speed.decode_tps[1] for n in range(25)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("model", ["llama-3-8b", "gemma-3-12b", "deepseek-v2-lite", "qwen3.5-9b"])
def test_a_longer_context_is_never_faster(model):
    for card in ("rtx-4090-24gb", None):
        said = [fit(model, card, context=n, host="512 GB").speed for n in (256, 1024, 4096, 8192, 32768, 131072)]
        for name in ("decode_tps", "prefill_tps"):
            best = [getattr(s, name)[1] for s in said]
            if name == "prefill_tps":
                best = best[1:]           # below a full ubatch, a longer prompt shares what is paid once a batch
            assert best == sorted(best, reverse=True), (name, card, best)


FAMILIES = (("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"), ("Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"),
            ("Q5_K_S", "Q4_K_S", "Q3_K_S"), ("IQ3_S", "IQ3_XXS"), ("IQ2_S", "IQ2_XS", "IQ2_XXS"))


def test_fewer_bits_of_a_family_are_never_slower_on_a_card():
    for row in catalog.gpus():
        for family in FAMILIES:
            rates = [fit("llama-3-8b", row["id"], quant=q, context=512, gpu_layers=99).speed.decode_tps for q in family]
            if all(rates):
                assert all(a[1] <= b[1] * 1.0001 for a, b in zip(rates, rates[1:], strict=False)), (row["id"], family)


# ---- the pieces ----------------------------------------------------------------------------------------------------------

def test_a_token_reads_its_experts_by_share_and_the_table_once():
    """All blocks together are what the memory room counts as read; the experts by 4 of 32."""
    for name in ("llama-3-8b", "gpt-oss-20b", "gemma-2-2b"):
        spec = llmlab.model(name)
        quant = "MXFP4_MOE" if name == "gpt-oss-20b" else "Q4_K_M"
        r = reading(spec, quant)
        total = r.dense[0][-1] + r.experts[0][-1] + r.output.bytes
        assert total == pytest.approx(weights(spec, quant).active, rel=1e-3)
    spec = llmlab.model("gpt-oss-20b")
    r = reading(spec, "MXFP4_MOE")
    assert r.held[-1] == pytest.approx(8 * r.experts[0][-1], rel=1e-9)


def test_sliding_layers_read_their_window_only():
    """gemma 3 12B: one layer in six sees everything; the others 1024 cells, however long the context."""
    spec = llmlab.model("gemma-3-12b")
    def cache(context):
        return next(p.amount for p in fit(spec, "rtx-4090-24gb", context=context).speed.parts if p.what == "cache")
    per_cell = 2 * 2 * 8 * 256
    assert cache(8192) == pytest.approx(per_cell * (8 * 8192 + 40 * 1024), rel=1e-6)
    assert cache(16384) - cache(8192) == pytest.approx(per_cell * 8 * 8192, rel=1e-6)


def test_parts_add_up_by_device():
    said = fit("llama-3-70b", ["rtx-3090-24gb"] * 2, quant="Q4_K_M", gpu_layers=70, context=4096).speed
    assert set(said.seconds) == {"gpu0", "gpu1", "host"}
    assert sum(said.seconds.values()) == pytest.approx(1 / said.decode_tps[1])
    first = said.first_token
    assert first[0] < first[1] < first[2]
    assert first[1] == pytest.approx(4096 / said.prefill_tps[1] + 1 / said.decode_tps[1])


def test_cards_in_a_row_take_turns_and_vllm_shares_every_block():
    one = fit("llama-3-8b", "rtx-4090-24gb", quant="Q4_K_M", context=SOON).speed.decode_tps[1]
    two = fit("llama-3-8b", ["rtx-4090-24gb"] * 2, quant="Q4_K_M", context=SOON).speed.decode_tps[1]
    assert two == pytest.approx(one, rel=0.05)
    alone = fit("qwen3-14b", "h100-sxm5-80gb", quant="BF16", engine="vllm", context=SOON).speed.decode_tps[1]
    shared = fit("qwen3-14b", ["h100-sxm5-80gb"] * 2, quant="BF16", engine="vllm", context=SOON).speed.decode_tps[1]
    assert 1.3 * alone < shared < 2 * alone


def test_ram_that_is_named_decides():
    unnamed = fit("llama-3-70b", "rtx-3090-24gb", quant="Q4_K_M")
    assert "RAM not named" in unnamed.speed.why and unnamed.host is None
    named = fit("llama-3-70b", "rtx-3090-24gb", quant="Q4_K_M", host="96 GB DDR5-6000")
    assert named.host == 96 * GB and "DDR5-6000, 2 channels" in named.speed.why
    assert named.speed.decode_tps[1] > unnamed.speed.decode_tps[1]
    assert named.with_(context=1024).rates == named.rates                # kept
    assert named.with_(host="64 GB").rates == named.rates                # more RAM of the same kind
    assert "DDR4-3200, 4 channels" in named.with_(host="DDR4-3200 quad").speed.why
    assert "RAM" not in fit("llama-3-8b", "rtx-3090-24gb").speed.why


def test_what_spills_goes_over_the_link():
    """Windows lends a card RAM; elsewhere the load fails. Either way nobody is told that it runs at full speed."""
    over = fit("qwen3-30b-a3b", "rtx-5070-12gb", quant="Q3_K_M", gpu_layers=99, context=SOON)
    held = fit("qwen3-30b-a3b", "rtx-4090-24gb", quant="Q3_K_M", gpu_layers=99, context=SOON)
    assert over.verdict == "does not fit" and held.verdict == "fits"
    assert over.speed.decode_tps[2] < held.speed.decode_tps[0] / 4
    assert "as Windows allows" in over.speed.why


def test_weights_that_ram_cannot_hold_come_from_the_disk_again_and_again():
    """LLaMA 30B, 20 GB on a laptop of 16 GB: a token in 20 seconds (B19); here a 20 GB file of the same kind."""
    said = fit("codellama-34b", None, quant="Q4_0", context=SOON, host="16 GB").speed
    assert said.decode_tps[0] < float(MEASURED["B19"]["tokens_per_second"].split()[0]) < said.decode_tps[2]
    assert "again from disk" in said.why
    sparse = fit("gpt-oss-120b", None, quant="MXFP4_MOE", context=SOON, host="32 GB").speed
    assert sparse.decode_tps[1] > 3 * said.decode_tps[1]        # only the experts that are not there


def test_transformers_waits_for_python_and_bitsandbytes_longer():
    plain = fit("llama-3-8b", "rtx-4090-24gb", quant="BF16", engine="transformers", context=SOON).speed
    packed = fit("llama-3-8b", "rtx-4090-24gb", quant="NF4", engine="transformers", context=SOON).speed
    llama = fit("llama-3-8b", "rtx-4090-24gb", quant="BF16", context=SOON).speed
    assert packed.decode_tps[1] < plain.decode_tps[1] < llama.decode_tps[1]
    assert "blocks of Python modules" in packed.why


def test_a_card_without_rates_has_no_speed():
    card = replace(catalog.gpu("rtx-3060-12gb"), bandwidth=math.nan)
    report = fit("llama-3-8b", card)
    assert report.speed.decode_tps is None and report.speed.prefill_tps is None
    assert report.speed.why == "" and report.speed.first_token is None and report.speed.seconds == {}
    half = fit("llama-3-8b", replace(catalog.gpu("rtx-3060-12gb"), fp32_flops=None, fp16_flops=None)).speed
    assert half.decode_tps and half.prefill_tps is None and half.first_token is None


def test_sequences_share_a_context_and_each_reads_its_own():
    one = fit("llama-3-8b", "rtx-4090-24gb", context=4096).speed
    four = fit("llama-3-8b", "rtx-4090-24gb", context=16384, sequences=4).speed
    assert four.decode_tps[1] == pytest.approx(one.decode_tps[1], rel=1e-3)


def test_speed_is_said_with_what_bounds_it():
    why = fit("llama-3-8b", "rtx-3060-12gb", quant="Q4_K_M", context=SOON).speed
    assert why.why.startswith("One token reads 4.30 GiB of weights on gpu0 (")
    assert why.prefill_why.startswith("One token of a prompt takes 14 GFLOP on gpu0 (")


def test_the_bare_function_needs_no_report():
    spec = llmlab.model("llama-3-8b")
    report = fit(spec, "rtx-3060-12gb", quant="Q4_K_M")
    s = report.settings
    said = speed(spec, s, weights(spec, "Q4_K_M"), cache_bytes(spec, s.context), report.cards, [0] * 33, USUAL)
    assert said == report.speed
