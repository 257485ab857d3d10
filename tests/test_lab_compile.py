"""The compile panel without a browser: settings, words, figures from known numbers, measuring, stopping, what is missing."""

import pytest
import runtime_models

from llmlab import LabError
from llmlab.lab import compile_state
from llmlab.lab.compile_figures import OPS, roofline_picture, time_picture
from llmlab.lab.compile_panel import CompileExplorer
from llmlab.lab.compile_state import WAYS, CompileState
from llmlab.roofline import Ceilings, Op, Profile
from llmlab.runtime import compiled, compiling

LIMITS = Ceilings(bandwidth=10e9, flops=40e9, how="of nothing")


def one(seconds: float, *ops: Op) -> Profile:
    return Profile(ops or (Op("qkv", 2, 10_000_000, 32_000_000, 0.6 * seconds), Op("small operations", 3, 0, 0, 0.4 * seconds)),
                   seconds, 64, "")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("compile") / "tiny.gguf"
    runtime_models.make("llama", path, "Q8_0")
    return str(path)


@pytest.fixture
def state(tiny):
    return CompileState(file=tiny, context=8)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """An empty cache, and packages that are the functions themselves, made in no time."""
    made = []

    def package(function, tensors, name, sources, dynamic=None, progress=None):
        if name not in made:
            compiling.compiler()
            progress("compiling the layer for this machine, once")
            made.append(name)
        return lambda *tensors: function(*tensors)

    monkeypatch.setattr(compiling, "compiler", lambda: "c++")
    monkeypatch.setattr(compiled, "package", package)


def known(state, **profiles) -> CompileState:
    """A state that measured these."""
    state._set(ceilings=LIMITS, profiles=profiles)
    return state


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "value", "said"), [
    ("strategy", "quick", "strategy is 'quick'; give one of auto, compact, fast, reference"),
    ("way", "jit", "way is 'jit'; give one of eager, lean, compiled"), ("context", 1, "context is 1; give how many"),
    ("context", True, "context is True; give how many"), ("context", "64", "context is '64'; give how many"),
    ("file", "nowhere.gguf", "nowhere.gguf does not exist"), ("file", 7, "file is 7; give the path"),
])
def test_what_cannot_be_used_is_said_and_the_last_good_stays(state, tiny, setting, value, said):
    setattr(state, setting, value)
    assert said in state.answer and "\n" not in state.answer and state.name == "tiny.gguf"
    with pytest.raises(LabError, match="."):
        state.start()
    setattr(state, setting, {"file": tiny, "strategy": "auto", "way": "lean", "context": 8}[setting])
    assert state.answer == "Nothing was measured yet."
    with pytest.raises(LabError, match="."):
        CompileState(**{"file": tiny, setting: value})


def test_a_name_that_is_no_setting_is_refused(state):
    with pytest.raises(LabError, match="'contxt' is no setting; there are file, strategy, context, way"):
        state.update(contxt=3)


def test_what_was_measured_of_something_else_is_no_longer_shown(state):
    known(state, lean=one(0.01)).way = "eager"
    assert state.profiles and state.shown is None
    state.strategy = "compact"
    assert state.profiles == {} and state.answer == "Nothing was measured yet."


# ---- in words, from known numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("lean", "said"), [
    (0.030, "3.00 times as fast as lean and 10.00 times as fast as eager: the 30 % are there, and more."),
    (0.012, "1.20 times as fast as lean and 10.00 times as fast as eager: +20%, less than 30."),
    (0.008, "0.80 times as fast as lean and 10.00 times as fast as eager: compiling does not help here."),
])
def test_the_verdict_follows_the_numbers(state, lean, said):
    known(state, eager=one(0.1), lean=one(lean), compiled=one(0.01))
    assert state.verdict == f"Compiled is {said}"
    # 10 MB over 10 GB/s is 1 ms, 32 M operations over 40 GFLOP/s 0.8 ms
    assert state.answer.startswith("After 8 tokens tiny.gguf writes 10 tokens/s eager (1% of the roofline), ")
    assert "and 100 tokens/s compiled (10% of the roofline)." in state.answer and state.answer.endswith("in the same minute.")


def test_what_was_not_measured_is_said(state):
    known(state, lean=one(0.03))._set(notes={"compiled": "no C++ compiler was found"})
    assert state.verdict == "The compiled way was not measured: no C++ compiler was found."
    with pytest.raises(LabError, match="compiled was not measured; no C"):
        state.times("compiled", "lean")


def test_the_table_has_the_longest_first(state):
    rows = list(known(state, lean=one(0.01)).table)
    assert [row["operation"] for row in rows] == ["qkv", "small operations"]
    columns = ("per byte", "ms", "of the token", "at least ms", "of the roofline")
    assert [rows[0][column] for column in columns] == ["3.20", "6.00", "60%", "1.00", "17%"]
    assert rows[1]["of the roofline"] == rows[1]["reads"] == ""


def test_the_figures_show_the_numbers():
    lean = one(0.01)
    several = one(0.02, Op("layers 1", 2, 1000, 2000, 0.004), Op("layers 2", 2, 1000, 2000, 0.006),
                  Op("output", 1, 10, 20, 0.01))
    bars = {trace["name"]: trace["x"] for trace in time_picture({"lean": lean, "compiled": several})["data"]}
    at = list(reversed(WAYS))
    assert bars["qkv"] == pytest.approx([0, 6, 0]) and bars["layers"] == pytest.approx([10, 0, 0]) and at[0] == "compiled"
    assert [sum(x[at.index(way)] for x in bars.values()) for way in ("lean", "compiled")] == pytest.approx([10, 20])
    named = time_picture({"lean": lean})["layout"]["yaxis"]["ticktext"]
    assert named == ["compiled: not measured", "lean: 100 tokens/s", "eager: not measured"]
    picture = {trace["name"]: trace for trace in roofline_picture(several, LIMITS)["data"]}
    assert picture["layers"]["x"] == [2, 2] and picture["output"]["y"] == pytest.approx([20 / 0.01 / 1e9])
    roof = picture["what the machine allows"]
    assert max(roof["y"]) == pytest.approx(40) and roof["y"][0] == pytest.approx(roof["x"][0] * 10)
    assert "33% of the roofline" not in str(picture) and not picture["qkv"]["showlegend"]
    empty, full = roofline_picture(None, None)["data"], roofline_picture(lean, LIMITS)["data"]
    assert [t["name"] for t in empty] == [t["name"] for t in full] and len(full) == 1 + len(OPS)     # LiveFigure needs the same


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_the_ways_are_measured_and_the_panel_follows(tiny, here, monkeypatch):
    monkeypatch.setattr(compile_state, "ceilings", lambda: LIMITS)
    panel = CompileExplorer(file=tiny, context=8)
    assert "press measure" in panel.said.html and panel.start.disabled is False and panel.stop.disabled is True
    said = panel.state.run()
    assert list(panel.state.profiles) == ["eager", "lean"] and "it must be compiled for this processor first" in said
    said = panel.state.run(compile=True)
    assert list(panel.state.profiles) == list(WAYS) == list(panel.state.readers) and "Compiled is" in said
    assert said.partition(". ")[0] in panel.said.html and "10.0 GB/s" in panel.said.html and panel.start.disabled is False
    lean, whole = {trace["name"]: trace["x"][1] for trace in panel.times.figure.data}, panel.state.profiles["lean"].ops
    assert sum(lean.values()) == pytest.approx(1e3 * sum(op.seconds for op in whole))
    panel.way.value = "compiled"
    assert {row["cells"][0] for row in panel.rows.rows} == {op.name for op in panel.state.profiles["compiled"].ops}
    tokens = {way: int(reader.read([5, 6, 7]).argmax()) for way, reader in panel.state.readers.items()}
    assert len(set(tokens.values())) == 1


def test_no_compiler_is_a_line_and_the_others_are_measured(state, here, monkeypatch):
    def none():
        raise compiling.NotPackaged("no C++ compiler was found (g++ or clang++); install one")
    monkeypatch.setattr(compiling, "compiler", none)
    monkeypatch.setattr(compile_state, "ceilings", lambda: LIMITS)
    state.run(compile=True)
    assert list(state.profiles) == ["eager", "lean"]
    assert state.verdict == ("The compiled way was not measured: no C++ compiler was found (g++ or clang++).")


def test_what_was_never_compiled_is_said_and_not_made(state, monkeypatch, tmp_path):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(compile_state, "ceilings", lambda: LIMITS)
    monkeypatch.setattr(compiling, "compiler", lambda: "c++")
    state.run()
    assert list(state.profiles) == ["eager", "lean"] and not list(tmp_path.rglob("*.pt2"))
    assert state.verdict == ("The compiled way was not measured: it must be compiled for this processor first, once, which "
                             "takes a minute or two.")


def test_it_is_stopped_and_begun_again(state, here, monkeypatch):
    monkeypatch.setattr(compile_state, "ceilings", lambda: LIMITS)
    monkeypatch.setattr(compile_state, "profiles", lambda *_, stopped: state.end() or None)
    state.start(compile=True)
    with pytest.raises(LabError, match="something is being measured"):
        state.start()
    assert state.wait(60) and (state.progress, state.error, state.profiles) == ("Stopped.", "", {})
    with pytest.raises(LabError, match="nothing was opened yet"):
        _ = state.readers
    monkeypatch.setattr(compile_state, "profiles", lambda readers, *_, **__: {way: one(0.01) for way in readers})
    state.run()
    assert set(state.profiles) == set(WAYS) and state.progress == ""


def test_what_goes_wrong_is_a_line(state, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("it broke")
    monkeypatch.setattr(compile_state, "profiles", broken)
    monkeypatch.setattr(compile_state, "ceilings", lambda: LIMITS)
    with pytest.raises(LabError, match="Something is wrong in llmlab itself: RuntimeError: it broke"):
        state.run()
    assert not state.running


def test_a_context_with_no_room_is_a_line(state):
    state.context = 512
    with pytest.raises(LabError, match="context is 512 tokens, and this model has room for 512; give less"):
        state.run()


def test_what_takes_more_memory_than_is_free_is_not_made(state, monkeypatch):
    monkeypatch.setattr(compile_state, "ram_available", lambda: 1000)
    with pytest.raises(LabError, match="its weights as words take up to .* and 1000 B are free"):
        state._open("compiled", state._file, "auto", False)


def test_the_race_is_the_bench(state, tiny, monkeypatch):
    asked = []

    def bench(path, progress, **more):
        asked.append((path, more))
        progress("opening fast")
        assert state.progress == "Opening fast."
        return None if len(asked) > 1 else (_ for _ in ()).throw(LabError("nobody takes part"))
    monkeypatch.setattr(compile_state, "bench", bench)
    with pytest.raises(LabError, match="nobody takes part"):
        state.run_race()
    assert asked[0][0] == tiny and asked[0][1]["quick"] is True and asked[0][1]["strategies"] == ("fast", "compact", "modules")
    with pytest.raises(LabError, match="the race was stopped"):
        state.run_race()


def test_the_fold_shows_the_race(tiny):
    panel = CompileExplorer(file=tiny)
    box = panel.unfold("beside other engines")
    assert "llmlab bench FILE" in box.words.html and box.table.value == "" and box.stop.disabled
