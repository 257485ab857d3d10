"""A configuration as a string: it comes back as it was, and what is none gives one clear line."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmlab
from llmlab.errors import LabError
from llmlab.lab import FitExplorer, FitState, share
from llmlab.lab.state import DEFAULTS, THIS_MACHINE


def test_it_can_be_read():
    state = FitState(model="qwen2.5-7b", card="rtx-4060-ti-16gb", quant="IQ4_XS", context=32768, kv=("q8_0", "q4_0"))
    assert state.share() == "llmlab:qwen2.5-7b@rtx-4060-ti-16gb?quant=IQ4_XS&context=32768&kv=q8_0,q4_0"
    assert FitState().share() == "llmlab:llama-3-8b@rtx-3060-12gb?quant=Q4_K_M&context=8192"
    assert FitState(card=None).share().startswith("llmlab:llama-3-8b@none?")
    assert FitState(card=THIS_MACHINE).share().startswith("llmlab:llama-3-8b@this-machine?")
    several = FitState(card=["3090", "rtx-4090-24gb"], split=(3, 1), host="32 GiB").share()
    assert "@rtx-3090-24gb,rtx-4090-24gb?" in several and "&split=3,1&host=32GiB" in several


def test_a_string_means_the_same_when_a_default_changes():
    """What a string leaves out is written down in OMITTED. A default of `fit` that changes must not change it: then the
    strings name that setting from now on, and this test is told so."""
    assert {name: DEFAULTS[name] for name in share.OMITTED} == share.OMITTED
    assert set(share.OMITTED) | {"model", "card", "quant", "context"} == set(DEFAULTS)


CONFIGURATIONS = st.fixed_dictionaries({
    "model": st.sampled_from(["llama-3-8b", "mixtral-8x22b", "qwen3-next-80b-a3b", "gemma-3-12b"]),
    "card": st.sampled_from([None, "rtx-3060-12gb", "a100-pcie-40gb", ["rtx-3090-24gb", "rtx-4090-24gb"]]),
    "engine": st.just("llama.cpp")}, optional={
    "quant": st.sampled_from([None, "Q8_0", "IQ4_XS", "Q2_K"]), "context": st.integers(256, 200_000),
    "kv": st.sampled_from(["f16", "q8_0", ("q8_0", "q4_0"), ["f16", "q8_0"]]), "cards": st.integers(1, 16),
    "gpu_layers": st.one_of(st.just("auto"), st.integers(0, 99)), "n_cpu_moe": st.integers(0, 60),
    "sequences": st.integers(1, 16), "batch": st.sampled_from([64, 2048]), "ubatch": st.integers(1, 4096),
    "importance": st.booleans(), "swa_full": st.booleans(), "unified": st.booleans(),
    "host": st.sampled_from([None, "32 GiB", "64GB", 2**34])})


@settings(max_examples=60, deadline=None)
@given(CONFIGURATIONS)
def test_it_comes_back_as_it_was(asked):
    state = FitState(**asked)
    text = state.share()
    back = FitState.from_shared(text)
    assert back.report.terms == state.report.terms and back.report.settings == state.report.settings
    assert back.report.cards == state.report.cards and back.report.host == state.report.host
    assert back.share() == text and len(text) <= share.LONGEST and text.isascii()


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_other_engines_come_back(engine):
    state = FitState()
    state.engine = engine
    assert FitState.from_shared(state.share()).answer == state.answer


HOSTILE = [
    "", "llmlab:", "llmlab:@", "http://x", "llama-3-8b@rtx-3060-12gb", "llmlab:llama-3-8b", "llmlab:gpt-9@rtx-3060-12gb",
    "llmlab:llama-3-8b@rtx-9999", "llmlab:llama-3-8b@rtx-3060-12gb?colour=red", "llmlab:llama-3-8b@none?context=1&context=2",
    "llmlab:llama-3-8b@none?context=" + "9" * 400, "llmlab:llama-3-8b@none?context=99999999999",
    "llmlab:llama-3-8b@none?context=-1", "llmlab:llama-3-8b@none?context=1e9", "llmlab:llama-3-8b@none?context=NaN",
    "llmlab:llama-3-8b@none?context=", "llmlab:llama-3-8b@none?model=x", "llmlab:llama-3-8b@none?report=x",
    "llmlab:llama-3-8b@none?__class__=x",
    "llmlab:/etc/passwd@none", "llmlab:%2Fetc%2Fpasswd@none", "llmlab:../x.gguf@none", "llmlab:x.gguf@none", "llmlab:~@none",
    "llmlab:file:/etc/passwd@none", "llmlab:file:..%2Fx.gguf@none", "llmlab:file:nowhere.gguf@none", "llmlab:hub:../x@none",
    "llmlab:hub:a/b/c.gguf@none", "llmlab:llama-3-8b@none?draft=/etc/passwd", "llmlab:llama-3-8b@none?draft=x.gguf",
    "llmlab:llama-3-8b@none?projector=/etc/x.gguf", "llmlab:<script>alert(1)</script>@none", "llmlab:llama-3-8b@<b>x</b>",
    "llmlab:llama-3-8b@none?quant=<img src=x onerror=alert(1)>", "llmlab:llama-3-8b@none?kv=f16,f16,f16",
    "llmlab:llama-3-8b@rtx-3060-12gb?cards=999", "llmlab:llama-3-8b@none?sequences=0", "llmlab:llama-3-8b@none?quant=%00",
    "llmlab:llama-3-8b@none?flash_attention=no&kv=q8_0", "llmlab:" + "a" * 10_000, "llmlab:llama-3-8b@" + "rtx-3090-24gb," * 30,
    "llmlab:llama-3-8b@none?\nquant=Q8_0", None, 3]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: str(t)[:40])
def test_what_is_none_gives_one_line(text, tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LabError) as caught:
        FitState.from_shared(text)
    said = str(caught.value)
    assert said and "\n" not in said and len(said) < 500 and "GGUF" not in said.replace("GGUF;", "")


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_at_all_is_a_configuration_or_one_line(head, tail):
    for text in (head, f"llmlab:{head}", f"llmlab:{head}@{tail}", f"llmlab:llama-3-8b@none?{head}={tail}"):
        try:
            share.read(text)
        except LabError as error:
            assert str(error) and "\n" not in str(error)


def test_a_shared_string_opens_no_path(tmp_path, monkeypatch):
    """A folder or a file of the name of a model is not looked at."""
    monkeypatch.chdir(tmp_path)
    for folder in ("some-model", "owner/repo"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    with pytest.raises(LabError, match="unknown|no model|some-model"):
        share.read("llmlab:some-model@none")
    with pytest.raises(LabError, match="can name"):
        share.read("llmlab:hub:owner/repo@none")
    assert share.read("llmlab:hub:owner/other@none")["model"] == "owner/other"


def test_a_file_is_shared_by_its_name(tmp_path, monkeypatch):
    path = llmlab.fetch("smollm2-135m", progress=False)
    state = FitState(model=str(path))
    text = state.share()
    assert text == f"llmlab:file:{path.name}@rtx-3060-12gb?context=8192" and str(path.parent) not in text
    assert FitState.from_shared(text).answer == state.answer


def test_what_a_string_cannot_carry_is_said():
    with pytest.raises(LabError, match="object"):
        FitState(model=llmlab.shapes.from_config(dict(llmlab.model("smollm2-135m").config), "mine")).share()


def test_the_last_good_configuration_is_shared_while_something_is_wrong():
    state = FitState()
    state.kv = "x"
    assert state.error and FitState.from_shared(state.share()).answer == state.answer


def test_a_panel_opens_one():
    panel = FitExplorer("llmlab:qwen2.5-7b@rtx-4090-24gb?quant=Q8_0&context=4096")
    assert "Qwen2.5 7B in Q8_0 with 4,096 tokens" in panel.answer
    box = panel.unfold("share and save")
    assert box.shared.text == panel.state.share()
    box.paste.value = "llmlab:llama-2-13b@rtx-4060-8gb?quant=Q3_K_S&context=2048"
    box.paste._handle_custom_msg({"event": "submit"}, [])
    assert "Llama 2 13B in Q3_K_S" in panel.answer and panel.state.share() == box.shared.text and not box.paste.value
    box.paste.value = "llmlab:<img src=x onerror=alert(1)>@none"
    box.paste._handle_custom_msg({"event": "submit"}, [])
    assert "&lt;img" in panel.said.html and "<img" not in panel.said.html and "Llama 2 13B" in panel.answer
