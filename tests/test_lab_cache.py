"""The cache panel without a browser: what a token costs by hand, words, figures from known numbers, heat maps, measuring."""

import json
import threading

import numpy as np
import pytest
import runtime_models
import torch

import llmlab
from llmlab import LabError, catalog
from llmlab.formats import dequantize, quantize
from llmlab.lab import cache_measuring
from llmlab.lab.cache_boxes import quality_words
from llmlab.lab.cache_costs import ARCHITECTURES, SHOWN, architecture, cost, curves, steps, suited
from llmlab.lab.cache_figures import (
    channels_picture,
    heat_picture,
    measured_picture,
    memory_picture,
    quality_picture,
    speed_picture,
    tokens_picture,
)
from llmlab.lab.cache_heat import Heat, HeatState, heat
from llmlab.lab.cache_measuring import MeasureState, Point
from llmlab.lab.cache_panel import CacheExplorer
from llmlab.lab.cache_state import CacheState
from llmlab.memory import cache_bytes
from llmlab.roofline import Ceilings
from llmlab.units import GIB

Q8, Q4 = 34 / 32, 18 / 32          # bytes a number


@pytest.fixture(scope="module")
def llama():
    return llmlab.model("llama-3.1-8b")


@pytest.fixture
def state():
    return CacheState()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "tiny.gguf"
    runtime_models.make("llama", path, "Q8_0")
    return str(path)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


# ---- what a token costs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "kv", "first", "further", "state"), [
    ("llama-2-7b", ("f16", "f16"), 2 * 32 * 32 * 128 * 2, None, 0),
    ("llama-3.1-8b", ("q8_0", "q4_0"), 32 * 8 * 128 * (Q8 + Q4), None, 0),
    ("deepseek-v2-lite", ("q8_0", "q4_0"), 27 * 576 * Q8, None, 0),
    ("gemma-3-12b", ("f16", "f16"), 48 * 8 * 512 * 2, 8 * 8 * 512 * 2, 0),
    ("qwen3.5-9b", ("q4_0", "q4_0"), 8 * 4 * 512 * Q4, None, 52_690_944),
    ("gemma-4-e2b", ("f16", "f16"), (12 * 512 + 3 * 1024) * 2, 3 * 1024 * 2, 0),
])
def test_a_token_costs_what_it_does_by_hand(model, kv, first, further, state):
    spec = llmlab.model(model)
    found = cost(spec, 8192, kv)
    assert (found.first, found.further, found.kinds["state"]) == (first, further or first, state)
    whole = cache_bytes(spec, 8192, found.kv)
    assert found.bytes == whole.kv + whole.recurrent and found.each == found.bytes / 8192
    assert cost(spec, 512, kv).further == first
    assert cost(spec, 8192 + 256, kv).bytes - found.bytes == 256 * found.further


def test_tokens_in_sixteen_bits_lie_beside_the_packed_ones(llama):
    assert cost(llama, 8192, ("q8_0", "q8_0"), kept=100).beside == 100 * 32 * 8 * 256 * 2
    gemma = llmlab.model("gemma-3-12b")
    assert cost(gemma, 8192, ("q4_0", "q4_0"), kept=4).beside == 4 * 48 * 8 * 512 * 2


def test_each_architecture_is_called_what_it_is():
    assert {name: architecture(llmlab.model(model)) for name, model in ARCHITECTURES.items()} == {
        name: name for name in ARCHITECTURES}
    assert architecture(llmlab.model("falcon-7b")) == "MQA"
    assert suited(llmlab.model("deepseek-v2-lite"), ("q8_0", "f16")) == ("q8_0", "q8_0")


def test_curves_are_the_fits(llama):
    card = llmlab.gpu("rtx-3060-12gb")
    found = curves(llama, card, "Q4_K_M", ("q8_0", "q4_0"), steps(llama))
    assert [one.kv for one in found] == [*SHOWN, ("q8_0", "q4_0")] and found[0].contexts == steps(llama)
    report = llmlab.fit(llama, card, quant="Q4_K_M", kv="q8_0", context=16384)
    at = found[1].contexts.index(16384)
    assert found[1].speed[at] == report.speed.decode_tps and found[1].bytes[at] == report.total("kv_cache")
    assert found[1].longest == report.largest_context() > found[0].longest
    assert llmlab.fit(llama, card, quant="Q4_K_M", kv="q8_0", context=found[1].longest).fits
    assert found[1].longest_bytes == cache_bytes(llama, found[1].longest, "q8_0").kv


# ---- state and words ------------------------------------------------------------------------------------------------


def test_the_answer_follows_the_settings(state):
    assert state.answer.startswith(
        "32,768 tokens of Llama 3.1 8B take 4.00 GiB in f16, 33% of GeForce RTX 3060 12GB: exact. A token costs 128.00 KiB: "
        "exact. GQA, layers: 32 full; each that attends keeps 8 KV heads × (128 + 128) numbers a token. Beside 4.58 GiB of "
        "weights in Q4_K_M ")
    for kind in ("exact", "the rest modelled", "modelled for llama.cpp"):
        assert kind in state.answer
    state.update(kv=("q8_0", "q4_0"), sinks=4, recent=128)
    assert "take 1.64 GiB in K q8_0, V q4_0 (16.50 MiB of it kept in 16 bits)" in state.answer
    state.model = "gemma-3-12b"
    assert "while windows fill, 26.00 KiB with 32,768 behind it: exact. Sliding window, layers: 8 full + 40 sl" in state.answer
    state.update(model="qwen3.5-9b", recent=0, sinks=0)
    assert "; 50.25 MiB of state whatever the context" in state.answer and "8 full + 24 recurrent" in state.answer
    state.update(model="deepseek-v2-lite", kv=("q4_0", "f16"))
    assert (state.k, state.v, state.kv) == ("q4_0", "q4_0", ("q4_0", "q4_0"))


@pytest.mark.parametrize(("setting", "value", "said"), [
    ("context", 0, "context is 0"), ("k", "q9", "'q9' is no cache type"), ("model", "llama-9", "'llama-9'"),
    ("card", "rtx-1", "'rtx-1'"), ("recent", -1, "recent is -1; give how many tokens"), ("quant", "Q9", "'Q9'"),
    ("k", "fp8", "llama.cpp has no fp8 cache"), ("sinks", True, "sinks is True"),
])
def test_what_cannot_be_used_is_said_and_the_last_good_stays(state, setting, value, said):
    before, answer = state.look, state.answer
    setattr(state, setting, value)
    assert said in state.error and "\n" not in state.error and state.look is before and state.answer == answer
    with pytest.raises(LabError, match="."):
        CacheState(**{setting: value})
    state.update(**{setting: getattr(CacheState(), setting)})
    assert state.error == ""


def test_a_name_that_is_no_setting_is_refused(state):
    with pytest.raises(LabError, match="'contxt' is no setting; there are model, context, k, v, recent"):
        state.update(contxt=3)


def test_a_model_whose_heads_are_no_blocks_keeps_to_plain_numbers(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 160, "vocab_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 320, "max_position_embeddings": 4096}))
    state = CacheState(model=str(path), context=1024)
    assert [one is None for one in state.look.curves] == [False, True, True, True, False]
    assert "take 1.25 MiB in f16" in state.answer and state.look.cost.first == 2 * 2 * 2 * 80 * 2
    state.update(kv="q8_0")
    assert "a K cache in q8_0 needs heads of a multiple of 32" in state.error
    assert len(tokens_picture(state.look)["data"]) == 5


def test_the_ram_alone_is_a_card_too():
    state = CacheState(model="smollm2-135m", card=None, context=2048)
    assert "2,048 tokens of SmolLM2 135M take 45.00 MiB in f16" in state.answer
    assert memory_picture(state.look)["data"][6]["name"] == "RAM"


# ---- figures --------------------------------------------------------------------------------------------------------


def test_this_machine_is_a_card_too(state):
    state.card = "this machine"
    assert not state.error and "longest context that fits" in state.answer
    state.context = 4096
    assert not state.error and state.answer.startswith("4,096 tokens")


def test_the_figures_show_the_numbers(state):
    look = state.look
    bars = tokens_picture(look)["data"]
    whole = [sum(trace["x"][at] for trace in bars) for at in range(5)]
    assert whole == pytest.approx([512, 128, 30.375, cost(llmlab.model("gemma-3-12b"), 32768, ("f16", "f16")).each / 1024,
                                   cost(llmlab.model("qwen3.5-9b"), 32768, ("f16", "f16")).each / 1024])
    lines = {trace["name"]: trace for trace in memory_picture(look)["data"]}
    at = lines["q8_0"]["x"].index(32768)
    assert lines["q8_0"]["y"][at] * GIB == cost(look.spec, 32768, ("q8_0", "q8_0")).bytes
    assert lines["now"]["y"] == [4.0] and lines["the card"]["y"] == [12.0, 12.0]
    assert list(lines["longest that fits"]["x"]) == [one.longest for one in look.curves[:4]]
    speed = {trace["name"]: trace for trace in speed_picture(look)["data"]}
    assert speed["f16"]["y"][at] == look.report.speed.decode_tps[1] == speed["now"]["y"][0]
    assert speed["f16"]["line"]["width"] > speed["q8_0"]["line"]["width"]


def test_a_figure_keeps_its_traces_whatever_it_shows(state):
    pictures = (tokens_picture, memory_picture, speed_picture)
    counts = [len(picture(state.look)["data"]) for picture in pictures]
    for change in ({"model": "deepseek-v2-lite"}, {"kv": ("q8_0", "q4_0")}, {"recent": 64}, {"card": None}, {"kv": "f16"}):
        state.update(**change)
        assert state.error == "" and [len(picture(state.look)["data"]) for picture in pictures] == counts
    assert "q8_0, some in 16 bits" in str(memory_picture(CacheState(k="q8_0", v="q8_0", recent=64).look))


def test_curves_reach_the_present_context():
    found = CacheState(model="llama-2-7b", context=32768).look
    assert found.curves[0].contexts[-1] == 32768 and steps(found.spec)[-1] == 8192
    assert memory_picture(found)["data"][-1]["x"] == [32768]


def test_quality_is_what_was_published_and_measured():
    published, ours, _ = quality_picture()["data"]
    assert dict(zip(published["text"], published["y"], strict=True))["q8_0"] == catalog.kv_quality()["q8_0", "q8_0"].mean_kld
    assert dict(zip(ours["text"], ours["y"], strict=True))["K q4_0, V q8_0"] == catalog.measured_kv_quality()[
        "q4_0", "q8_0"].mean_kld
    assert "q8_0 0.00098; K q8_0, V q4_0 0.0051; q4_0 0.036" in quality_words() and "SmolLM2 135M, measured" in quality_words()


# ---- heat maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_what_comes_back_is_the_format_s(type):
    x = noise(300, 64)
    found = heat(x, type)
    back = dequantize(quantize(x, type.upper()), type.upper())
    assert np.array_equal(found.kept, back.numpy()) and np.array_equal(found.original, x.numpy())
    assert found.error == pytest.approx(float((back - x).square().mean().sqrt() / x.square().mean().sqrt()))
    assert found.bits == {"q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5}[type]


def test_a_rotation_takes_an_outlier_away():
    x = noise(100, 64)
    x[:, 7] *= 10
    plain, turned = heat(x, "q4_0"), heat(x, "q4_0", rotated=True)
    assert plain.channel == 7 and plain.peak > 5 > 2 > turned.peak
    assert turned.error < 0.6 * plain.error
    # it loses nothing itself: lengths stay, and in 16 bits nearly everything comes back
    assert np.linalg.norm(turned.original, axis=1) == pytest.approx(x.norm(dim=1).numpy(), rel=1e-5)
    assert heat(x, "f16", rotated=True).error < 1e-3


def test_the_heat_map_shows_three_maps():
    x = noise(5, 64)
    found = heat(x, "q4_0")
    maps = heat_picture(found, ["a", "b", "c", "<d>", "e"])["data"]
    assert np.array_equal(maps[2]["z"], maps[1]["z"] - maps[0]["z"]) and maps[0]["zmax"] == maps[1]["zmax"] > maps[2]["zmax"]
    assert "&lt;d" in maps[0]["customdata"][3][0]
    assert len(heat_picture(None)["data"]) == 3
    bars = channels_picture(found)["data"]
    assert bars[0]["y"] == pytest.approx(np.sqrt((x.numpy() ** 2).mean(0)), rel=1e-5)


def test_keys_of_a_real_text_follow_the_panel():
    panel = CacheExplorer(context=8192)
    box = panel.unfold("inside the cache")
    assert "press read" in box.words.html and box.layer.disabled and panel.heat.answer == "No text was read yet."
    with pytest.raises(LabError, match="no text was read yet"):
        panel.heat.errors()
    panel.heat.text = "Alice was beginning to get very tired of sitting by her sister on the bank."
    said = panel.heat.run()
    assert panel.heat.shape == (30, 3) and "in f16, 16 bits a number" in said.lower() and said in box.words.html
    panel.state.update(kv=("q4_0", "q8_0"))
    assert panel.heat.heat.type == "q4_0" and 0.05 < panel.heat.heat.error < 0.3
    box.outlier.click()
    assert (panel.heat.layer, panel.heat.head) == panel.heat.extreme() == (box.layer.value, box.head.value)
    before = panel.heat.heat
    box.rotated.value = True
    assert panel.heat.heat.rotated and panel.heat.heat.error < 0.7 * before.error and " rotated" in panel.heat.answer
    shown = box.maps.figure.data[1].z
    assert np.array_equal(np.array(shown), panel.heat.heat.kept)
    box.side.value = "V"
    assert panel.heat.heat.type == "q8_0" and panel.heat.answer.startswith("Values of layer")
    errors = panel.heat.errors()
    assert all(turned < plain for plain, turned in errors.values())
    panel.heat.layer = 30
    assert panel.heat.answer == "there is no layer 30; there are 30, from 0"
    panel.heat.layer = 2
    assert panel.heat.error == ""
    panel.heat.text = " "
    with pytest.raises(LabError, match="nothing to read"):
        panel.heat.start()


# ---- measuring ------------------------------------------------------------------------------------------------------


def known(*points: Point) -> MeasureState:
    state = MeasureState()
    state._set(points=points, ceilings=Ceilings(10e9, 40e9, "of nothing"))
    return state


def point(kv: str, context: int, seconds: float, bytes: int, predicted: int | None = None) -> Point:
    return Point((kv, kv), context, seconds, bytes, bytes if predicted is None else predicted, (1.0, 2.0, 3.0))


def test_a_measurement_in_words_from_known_numbers():
    state = known(point("f16", 256, 0.010, 1_000_000), point("q8_0", 256, 0.010, 500_000),
                  point("f16", 1024, 0.012, 4_000_000), point("q8_0", 1024, 0.011, 2_000_000))
    assert state.answer == (
        "The cache held what was predicted, to the byte, at each of 4 measurements, up to 3.81 MiB. With 1,024 tokens behind "
        "it, it writes 83.3 tokens/s in f16, 90.9 tokens/s in q8_0: measured with llmlab's lean decoder.")
    row = state.table[2]
    assert (row["the context adds"], row["at least"], row["llama.cpp, modelled"]) == ("2.00 ms", "0.30 ms", "2 (1 to 3)")
    off = known(point("f16", 256, 0.01, 1000, 1001))
    assert "held 1,000 bytes in f16 with 256 tokens, and 1,001 were predicted" in off.answer
    traces = measured_picture(state)["data"]
    assert traces[0]["x"] == [256, 1024] and traces[0]["y"] == pytest.approx([10, 12])
    assert traces[1]["y"] == pytest.approx([10, 10.3]) and len(traces) == len(measured_picture(MeasureState())["data"])


def test_first_and_last_tokens_in_sixteen_bits_take_what_was_predicted(tiny):
    reader, _ = llmlab.decoder(tiny, context=512, kv=("q8_0", "q4_0"), sinks=4, recent=60)
    list(cache_measuring.fill(reader, 300))
    logits = reader.read([5, 6, 7])
    assert torch.isfinite(logits).all() and len(reader.tokens) == 303
    assert reader.cache_bytes == cost(llmlab.model(tiny), 512, ("q8_0", "q4_0"), kept=64).bytes


@pytest.mark.parametrize(("settings", "said"), [
    ({"contexts": (100,)}, "a context is 100; give multiples of 256"), ({"types": ("q9",)}, "'q9' is no cache type"),
    ({"contexts": ()}, "0 contexts are to be measured"), ({"contexts": (256, True)}, "a context is True"),
    ({"file": "nowhere.gguf"}, "nowhere.gguf does not exist"),
])
def test_what_cannot_be_measured_is_said(settings, said):
    state = MeasureState(**settings)
    with pytest.raises(LabError, match=said.replace("(", r"\(")):
        state.start()
    assert not state.running


def test_bytes_measured_are_bytes_predicted(tiny, monkeypatch):
    monkeypatch.setattr(cache_measuring, "ceilings", lambda: Ceilings(10e9, 40e9, "of nothing"))
    state = MeasureState(file=tiny, contexts=(512, 256), types=("f16", ("q8_0", "q4_0"), "q5_1"))
    said = state.run()
    assert "to the byte, at each of 6 measurements" in said and [p.context for p in state.points] == [256] * 3 + [512] * 3
    spec = llmlab.model(tiny)
    assert [p.bytes for p in state.points] == [cache_bytes(spec, p.context, p.kv).kv for p in state.points]
    assert len(state.table) == 6 and all(p.seconds > 0 and p.modelled for p in state.points)


def test_it_is_stopped_and_begun_again(tiny, monkeypatch):
    state, asked = MeasureState(file=tiny, contexts=(256,), types=("f16", "q8_0")), threading.Event()
    monkeypatch.setattr(cache_measuring, "ceilings", lambda: asked.wait(60) and Ceilings(10e9, 40e9, "of nothing"))
    state.start()
    with pytest.raises(LabError, match="something is being measured"):
        state.start()
    state.end()
    asked.set()
    assert state.wait(60) and (state.progress, state.error, state.points) == ("Stopped.", "", ())
    monkeypatch.setattr(cache_measuring, "ceilings", lambda: Ceilings(10e9, 40e9, "of nothing"))
    state.run()
    assert len(state.points) == 2 and state.progress == ""


def test_what_goes_wrong_is_a_line(tiny, monkeypatch):
    def broken():
        raise RuntimeError("it broke")
    monkeypatch.setattr(cache_measuring, "ceilings", broken)
    with pytest.raises(LabError, match="Something is wrong in llmlab itself: RuntimeError: it broke"):
        MeasureState(file=tiny).run()


# ---- the panel ------------------------------------------------------------------------------------------------------


def test_widgets_and_state_are_one():
    panel = CacheExplorer("gemma-3-12b", kv="q8_0", context=16384)
    assert (panel.model.value, panel.k.value, panel.v.value, panel.context.value) == ("gemma-3-12b", "q8_0", "q8_0", 16384)
    assert panel.state.answer.partition(": exact.")[0] in panel.said.html and repr(panel) == f"<{panel.answer}>"
    panel.k.value = "q4_0"
    assert panel.state.kv == ("q4_0", "q8_0") and "K q4_0, V q8_0" in panel.said.html
    panel.context.value = 32768
    assert panel.state.look.cost.context == 32768 and panel.memory.figure.data[-1].x[0] == 32768
    panel.longest.click()
    assert panel.state.context == panel.state.look.longest == panel.context.value and panel.longest.disabled
    panel.state.model = "deepseek-v2-lite"
    assert panel.v.disabled and panel.v.value == "q4_0" and len(panel.rows.rows) == 5
    panel.state.model = "smollm2-135m"
    assert not panel.v.disabled and panel.rows.rows[-1]["cells"][0] == "GQA, chosen"
    panel.state.k = "q9"
    assert "is no cache type" in panel.said.html and "is no cache type" in panel.answer
    with pytest.raises(LabError, match="'depth' is no setting of a heat map"):
        panel.heat.update(depth=3)


def test_the_measurement_is_shown(tiny, monkeypatch):
    panel = CacheExplorer()
    box = panel.unfold("measure")
    assert "press measure" in box.words.html and box.stop.disabled and box.types.value == "f16, q8_0, q4_0"
    box.contexts.value = "256 to 1,024"
    assert panel.measure.contexts == (256, 512, 1024)
    monkeypatch.setattr(cache_measuring, "ceilings", lambda: Ceilings(10e9, 40e9, "of nothing"))
    panel.measure.update(file=tiny, types=("q8_0", "f16"), contexts=(256,))
    assert box.types.value == "as set in code"
    panel.measure.run()
    assert "to the byte" in box.words.html and len(box.rows.rows) == 2 and list(box.chart.figure.data[0].x) == [256]
    assert isinstance(panel.heat, HeatState) and panel.heat.heat is None and Heat
