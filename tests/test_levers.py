"""Levers: each row is what the report would be after its change; prices, order, and what is published."""

import json
import math

import pytest

import llmlab
from llmlab import catalog, cli
from llmlab.errors import LabError
from llmlab.fitting import fit
from llmlab.levers import HARM, KV_LADDER, cheapest, levers, remedies

REPORTS = {
    "fits": ("llama-3-8b", "rtx-3060-12gb", {}),
    "fits with room to spend": ("qwen3-4b", "rtx-4090-24gb", {"kv": "q8_0", "quant": "Q5_K_M"}),
    "too long": ("llama-3-8b", "rtx-3060-12gb", {"context": 131072}),
    "experts": ("qwen3-30b-a3b", "rtx-3060-12gb", {"context": 32768}),
    "two cards": ("llama-3-70b", ["rtx-4090-24gb"] * 2, {"kv": "q8_0", "context": 65536}),
    "many switches": ("gemma-3-12b", "rtx-3060-12gb", {"swa_full": True, "flash_attention": False, "sequences": 4,
                                                       "context": 65536, "gpu_layers": 30}),
    "host": ("llama-3-70b", None, {"host": "32 GiB"}),
    "nowhere": ("llama-3-70b", "rtx-2060-6gb", {"host": "8 GiB", "context": 1_000_000}),
    "beside": ("qwen3-8b", "rtx-3060-12gb", {"draft": "qwen3-0.6b", "projector": "850 MiB", "context": 40960}),
    "vllm": ("llama-3-8b", "rtx-3060-12gb", {"engine": "vllm", "quant": "FP8", "sequences": 4, "context": 32768}),
    "transformers": ("llama-3-8b", "rtx-3060-12gb", {"engine": "transformers", "quant": "BF16", "flash_attention": False}),
}


@pytest.fixture(scope="module", params=REPORTS)
def report(request):
    model, gpu, asked = REPORTS[request.param]
    return fit(model, gpu, **asked)


def test_each_row_is_what_the_report_would_be(report):
    found = levers(report)
    assert len(found) >= 3
    whole = report.with_(gpu_layers=report.layers) if report.partial else report
    for row in found:
        after = report.with_(**row.change)
        assert after.verdict == row.verdict and after.fits == row.fits
        if not after.partial and not report.partial:
            assert report.devices[row.device].needed - after.devices[row.device].needed == row.saves
            assert report.devices["host"].needed - after.devices["host"].needed == row.saves_host
        for band, name in ((row.decode, "decode_tps"), (row.prefill, "prefill_tps")):
            now, then = getattr(report.speed, name), getattr(after.speed, name)
            assert (band is None) == (not now or not then)
            if band:
                near = 0.25 if after.partial else 1e-9      # with how many layers is then told from the bytes of one
                assert band[1] == pytest.approx(then[1] / now[1], rel=near) and band[0] <= band[1] <= band[2]
    bounded = [d for d in whole.devices.values() if d.capacity]
    assert {row.device for row in found} == {max(bounded, key=lambda d: (d.high - d.returned) / d.free).name}


def test_the_order_and_the_prices(report):
    found = list(levers(report))
    if not report.fits:
        helping = [row.fits for row in found]
        assert helping.index(False) == sum(helping) if any(helping) else True
    for first, second in zip(found, found[1:], strict=False):
        same = (first.fits, first.saves > 0) == (second.fits, second.saves > 0)
        if same and not report.fits and first.fits and None not in (first.price, second.price):
            assert first.price <= second.price
    for row in found:
        assert (row.price is None) == (row.kld is None)
        if row.price is not None:
            assert row.price >= HARM * row.kld + row.lost - 1e-12
        assert row.lost == pytest.approx(_given_up(report, row))


def _given_up(report, row) -> float:
    if "sequences" in row.change:
        return 1 - row.change["sequences"] / report.settings.sequences
    return max(0.0, 1 - row.change.get("context", math.inf) / report.settings.context) if "context" in row.change else 0.0


def test_one_step_each_way_and_the_first_that_fits():
    report = fit(*REPORTS["too long"][:2], context=131072)
    rows = {(row.name, row.after): row for row in report.levers()}
    assert rows["kv", "q8_0"].verdict == "does not fit" and rows["kv", "q4_1"].fits and rows["kv", "q4_0"].fits
    assert rows["kv", "q4_1"].kld is None and rows["kv", "q4_0"].kld == pytest.approx(0.0365 - 0.000189)
    assert ("kv", "q5_1") not in rows and not report.with_(kv="q5_0").fits
    assert rows["context", "65,536"].lost == 0.5
    largest = report.with_(gpu_layers=33).largest_context()
    assert rows["context", f"{largest:,}"].fits
    assert rows["gpu_layers", str(report.gpu_layers)].fits and ("gpu_layers", "32") not in rows
    assert rows["quant", "Q4_K_S"].saves > 0 > rows["quant", "Q5_K_S"].saves
    assert rows["ubatch", "256"].saves > 0 > rows["ubatch", "1024"].saves


def test_every_useful_direction_is_there():
    def names(key):
        model, gpu, asked = REPORTS[key]
        return {row.name for row in fit(model, gpu, **asked).levers()}
    llama = {"quant", "kv", "context", "ubatch"}
    assert llama | {"gpu_layers", "swa_full", "flash_attention", "sequences"} <= names("many switches")
    [switched] = [row for row in fit(*REPORTS["many switches"][:2], **REPORTS["many switches"][2]).levers() if row.name == "kv"]
    assert switched.change == {"kv": ("q8_0", "f16")}               # V stays: without flash attention it must
    assert llama | {"gpu_layers", "n_cpu_moe"} <= names("experts") and llama <= names("host")
    assert {"draft", "projector"} <= names("beside")
    assert {"quant", "kv", "context", "batch", "utilization", "sequences"} <= names("vllm")
    assert {"quant", "context", "flash_attention"} <= names("transformers")
    assert not {"kv", "ubatch", "gpu_layers"} & names("transformers") and not {"gpu_layers", "n_cpu_moe"} & names("host")


def test_partial_settings_step_both_ways():
    rows = {row.after: row for row in fit("llama-3-8b", "rtx-3060-12gb", gpu_layers=20).levers() if row.name == "gpu_layers"}
    assert set(rows) == {"19", "21"} and rows["19"].saves > 0 > rows["21"].saves
    rows = {row.after: row for row in fit("qwen3-30b-a3b", "rtx-4090-24gb", n_cpu_moe=10).levers() if row.name == "n_cpu_moe"}
    assert set(rows) == {"9", "11"} and rows["11"].saves > 0 and rows["11"].saves_host < 0


def test_fewer_requests_keep_their_context():
    [row] = [row for row in fit("llama-3-8b", "rtx-3060-12gb", sequences=4, context=8192).levers() if row.name == "sequences"]
    assert row.change == {"sequences": 3, "context": 6144} and row.lost == 0.25


# ---- published quality ----------------------------------------------------------------------------------------------

def test_quality_is_the_table_s_difference():
    rows = {(row.name, row.after): row for row in fit("llama-3-8b", "rtx-3060-12gb").levers()}
    down, matrix, cache = rows["quant", "Q4_K_S"], rows["importance", "matrix"], rows["kv", "q8_0"]
    assert down.kld == pytest.approx(0.043136 - 0.031273) and "+0.093 perplexity (Llama 3 8B, wikitext-2)" in down.quality
    assert matrix.kld == pytest.approx(0.028152 - 0.031273) and cache.kld == pytest.approx(0.000980 - 0.000189)
    assert rows["ubatch", "256"].kld == 0 and rows["ubatch", "256"].quality == "same answers"


def test_with_a_matrix_the_rows_with_one_are_compared():
    rows = {(row.name, row.after): row for row in fit("llama-3-8b", "rtx-3060-12gb", importance=True).levers()}
    assert rows["quant", "Q4_K_S"].kld == pytest.approx(0.031951 - 0.028152) and ("importance", "matrix") not in rows
    rows = [row for row in fit("llama-3-70b", "rtx-4090-24gb").levers() if row.name == "quant" and row.fits]
    assert all("with an importance matrix" in row.quality for row in rows if row.after.startswith("IQ"))


def test_what_is_not_published_is_said_and_has_no_price():
    rows = [row for row in fit("llama-3-8b", "rtx-3060-12gb", kv="q8_0").levers() if row.after == "q5_1"]
    assert [(row.quality, row.kld, row.price) for row in rows] == [
        ("not published here; slow in CUDA builds as released", None, None)]
    [row] = [row for row in fit("llama-3-8b", "rx-7900-xtx-24gb", kv="q8_0").levers() if row.after == "q5_1"]
    assert row.quality == "not published here"
    rows = [row for row in fit("llama-3-8b", "rtx-4090-24gb", quant="BF16").levers() if row.name == "quant"]
    assert rows and all(row.kld is None for row in rows)            # the table's f16 is no measure of bf16


def test_the_data_s_own_claims():
    quality, f16 = catalog.quality(), catalog.quality()["F16", False]
    for (quant, _), row in quality.items():
        if row.mean_kld > 0.028:
            assert 0.8 < math.log(row.perplexity / f16.perplexity) / row.mean_kld < 1.15 or quant.startswith("IQ1"), row
    assert len(quality) == 34 and ("IQ4_XS", True) in quality
    cache = catalog.kv_quality()
    assert cache["f16", "f16"].mean_kld < cache["q8_0", "q8_0"].mean_kld < cache["q8_0", "q4_0"].mean_kld < cache[
        "q4_0", "q4_0"].mean_kld
    assert all(row.source for row in (*quality.values(), *cache.values()))
    assert {cache for pair in catalog.kv_quality() for cache in pair} <= set(KV_LADDER)


# ---- asked for the way out ------------------------------------------------------------------------------------------

def test_remedies_are_the_levers_that_make_it_fit(report):
    found = remedies(report)
    assert [row.change for row in found] == [row.change for row in levers(report) if row.fits and not report.fits]
    assert cheapest(report) == next(iter(found), None)
    for row in found:
        assert report.with_(**row.change).fits


def test_a_single_lever_may_not_be_enough():
    report = fit("llama-3-70b", None, context=131072, host="8 GiB")
    assert not remedies(report) and cheapest(report) is None and report.levers()


def test_the_table(report):
    found = report.levers()
    assert len(found.table) == len(found) and found[:2].table == found.table[:2]
    assert repr(found) == repr(found.table) and found._repr_html_().startswith("<table>") and "lever" in repr(found)
    with pytest.raises(LabError):
        report.with_(**{**found[0].change, "nonsense": 1})


def test_the_table_turns_into_a_frame():
    pytest.importorskip("pandas")
    found = fit("llama-3-8b", "rtx-3060-12gb").levers()
    assert list(found.to_frame()["lever"]) == [row.name for row in found]


def test_from_a_shell(capsys):
    asked = ["fit", "llama-3-8b", "--gpu", "rtx-3060-12gb", "--context", "128k"]
    assert cli.main([*asked, "--levers"]) == 0
    assert "saves GiB" in capsys.readouterr().out
    assert cli.main([*asked, "--levers", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["levers"]
    assert rows[0]["verdict"] == "fits" and rows[0]["change"] and rows[0]["saves"] > 0
    assert cli.main([*asked, "--command", "llama.cpp"]) == 0
    assert "llama-server \\\n" in capsys.readouterr().out
    assert cli.main([*asked, "--command", "ollama", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["engine"] == "ollama" and "num_ctx 131072" in said["text"]
    assert cli.main([*asked, "--command", "nonsense"]) == 2
    assert capsys.readouterr().err.startswith("llmlab: 'nonsense' is no engine; there are llama.cpp")


def test_llmlab_offers_it():
    assert llmlab.fit("llama-3-8b", "rtx-3060-12gb").levers()[0].change
