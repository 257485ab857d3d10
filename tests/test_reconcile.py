"""Predicted against measured: the tracker, the rows and words of a check, transformers run for real, and what cannot be."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
import transformers

import llmlab
from llmlab import hardware, probes, reconcile
from llmlab.activations import peaks
from llmlab.catalog import gpu
from llmlab.errors import BadFile, LabError
from llmlab.gguf import write_gguf
from llmlab.probes import llama, whole
from llmlab.probes.tracker import Tracker, storage_bytes
from llmlab.reconcile import Check, Row, measured
from llmlab.shapes import from_config, from_gguf
from llmlab.units import MIB

transformers.logging.set_verbosity_error()
CONFIG = {"model_type": "llama", "vocab_size": 500, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
          "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def spec():
    return from_config(CONFIG, "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of random weights in bfloat16."""
    path = tmp_path_factory.mktemp("checkpoint")
    config = dict(CONFIG)
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


# ---- the tracker --------------------------------------------------------------------------------------------------

def test_the_tracker_counts_what_is_alive():
    given = torch.ones(1000)
    with Tracker([given]) as tracker:
        assert tracker.live == tracker.peak == 4000
        a = given + 1                      # 8000
        view = a[10:]
        del a                              # the view holds the storage
        assert tracker.live == 8000
        b = view.double()                  # 8000 + 7920
        b.mul_(2)
        assert tracker.live == 8000 + 7920
        del view, b
        assert tracker.live == 4000 and tracker.peak == 15920 and tracker.at == "aten._to_copy.default"
        tracker.reset()
        assert tracker.peak == 4000
        (given + 1) * (given + 2)          # both sums and their product
        assert tracker.peak == 16000 and tracker.live == 4000


def test_storages_count_once():
    x = torch.zeros(100)
    assert storage_bytes([x, x[3:], x.view(10, 10), torch.zeros(5)]) == 420


# ---- rows and words -----------------------------------------------------------------------------------------------

def row(predicted, low, high, got, kind="modelled", **more) -> Row:
    return Row("compute", "host", predicted, kind, low, high, got, "somehow", "because", **more)


def test_a_row_says_how_far_off():
    assert row(110, 100, 120, 100).error == pytest.approx(0.1) and row(110, 100, 120, 100).within
    assert not row(110, 105, 120, 100).within and row(110, 105, 120, 100, tolerance=5).within
    assert row(100.004, 100.004, 100.004, 100, "exact", tolerance=0.005).error == 0
    assert row(1, 1, 1, None).error is None and row(1, 1, 1, None).within is None
    assert row(None, 0, 0, 7).error is None and row(None, 0, 0, 7).within is None
    assert row(0, 0, 0, 0).error is None and row(0, 0, 0, 0).within


def test_a_check_in_words_tables_and_json(spec):
    report = llmlab.fit(spec, None, quant="F32", context=256, host="4 GiB")
    good = Row("weights", "host", 2 * MIB, "exact", 2 * MIB, 2 * MIB, 2 * MIB, "printed", "why")
    speed = Row("decode", "all", 50.0, "modelled", 40, 60, 45.0, "timed", "why", unit="tokens/s")
    check = Check(report, None, "llama.cpp", (good, row(3 * MIB, 2 * MIB, 4 * MIB, 4 * MIB), speed), {})
    assert check.answer == ("llama.cpp used 6.00 MiB where 5.00 MiB was predicted, 16.7% less. Every exact term agrees, and "
                            "every modelled one is in its band.")
    assert "45.0 tokens/s" in repr(check.table) and "-25.0%" in repr(check.table) and "<table>" in check._repr_html_()
    assert check.row("weights").measured == 2 * MIB and check.answer in repr(check)
    with pytest.raises(LabError, match="no output on host was compared; there are weights on host"):
        check.row("output")
    assert json.loads(json.dumps(check.to_dict()))["rows"][1]["within"] is True
    bad = Check(report, None, "llama.cpp", (row(3 * MIB, 2 * MIB, 4 * MIB, 5 * MIB), replace(good, measured=3 * MIB)), {})
    assert ("Outside: compute on the host is 5.00 MiB where 2.00 MiB to 4.00 MiB was predicted; weights on the host is "
            "3.00 MiB where 2.00 MiB was called exact.") in bad.answer


def test_a_check_as_a_frame(spec):
    pytest.importorskip("pandas")
    report = llmlab.fit(spec, None, quant="F32", context=256, host="4 GiB")
    frame = Check(report, None, "llama.cpp", (row(3, 2, 4, 4), row(1, 1, 1, 1, "exact")), {}).to_frame()
    assert list(frame["measured"]) == [4, 1] and list(frame["within"]) == [True, True]


def test_terms_of_one_name_and_device_are_one_row(spec):
    report = llmlab.fit(spec, None, quant="F32", context=256, host="4 GiB")
    twice = replace(report, terms=report.terms + tuple(t for t in report.terms if t.name == "weights"))
    rows = reconcile._memory_rows(twice, {("weights", "host"): (1.0, "x"), ("surprise", "host"): (5, "y")}, lambda name: 0)
    assert sum(r.term == "weights" for r in rows) == 1 and rows[0].predicted == 2 * report.total("weights")
    assert next(r for r in rows if r.term == "surprise").within is False


# ---- transformers, for real ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    {"quant": "BF16", "context": 256}, {"quant": "F32", "context": 300, "sequences": 2, "flash_attention": False}])
def test_transformers_uses_what_was_predicted(spec, folder, changes, monkeypatch):
    """A folder and random weights, sdpa and eager; in this process, for the imports are done."""
    monkeypatch.setattr(probes, "ask", lambda engine, job, timeout=None: whole.run(job))
    report = llmlab.fit(spec, None, engine="transformers", host="8 GiB", **changes)
    check = measured(report, folder if changes["quant"] == "BF16" else None)
    assert check.row("weights").error == 0 and check.row("kv_cache").error == 0
    assert abs(check.row("compute").error) < 0.01 and check.row("compute").within
    assert all(r.within is not False for r in check.bytes) and "Every exact term agrees" in check.answer
    assert check.row("resident").measured > 0 and check.row("decode", "all").measured > 0


def test_in_a_process_of_its_own(spec):
    report = llmlab.fit(spec, None, quant="F32", engine="transformers", context=64, host="8 GiB")
    check = llmlab.measured(report, timeout=300)
    assert check.row("weights").error == 0 and abs(check.row("compute").error) < 0.03
    assert check.row("loading").measured >= check.row("weights").measured
    assert "bar" in {trace.type for trace in check.figure().data}
    with pytest.raises(LabError, match="longer than 0.01 s"):
        measured(report, timeout=0.01)


def test_a_busy_machine_is_named_beside_its_speeds(spec, monkeypatch):
    run = {"prompt": 8, "written": 4, "prefill_tps": 10.0, "decode_tps": 5.0}
    report = llmlab.fit(spec, None, context=256)
    for load, said in ((0.0, False), (1000.0, True)):
        rows = reconcile._speed_rows(report, run | {"others": load})
        assert [("busy machine (load 1000.0)" in row.how) for row in rows] == [said, said]


@pytest.mark.parametrize("quant", ["NF4", "INT8"])
def test_bitsandbytes_lies_in_its_band(spec, folder, quant, monkeypatch):
    """What its operations take inside themselves is no tensor here: the rest is what we count, and the band spans both."""
    monkeypatch.setattr(probes, "ask", lambda engine, job, timeout=None: whole.run(job))
    report = llmlab.fit(spec, None, quant=quant, engine="transformers", context=200, host="8 GiB")
    check = measured(report, folder)
    seen = max(p.bytes for p in peaks(spec, quant, 199, 1, True, False, False)) - report.total("kv_cache")
    assert check.row("weights").error == 0 and check.row("compute").within
    assert check.row("compute").measured == pytest.approx(seen, rel=0.01)


def test_a_gguf_is_unpacked(tmp_path, monkeypatch):
    """transformers reads our own writer's file; the parameters are those we count."""
    spec = from_config({**CONFIG, "tie_word_embeddings": True}, "tiny")
    metadata = {"general.architecture": "llama", "general.name": "tiny", "general.file_type": 0,
                "tokenizer.ggml.model": "gpt2",
                **{f"llama.{k}": v for k, v in spec.metadata.items()}}
    path = tmp_path / "tiny.gguf"
    write_gguf(path, metadata, [(t.name, t.shape, "F32", lambda n=t.elements: bytes(4 * n)) for t in spec.tensors])
    monkeypatch.setattr(probes, "ask", lambda engine, job, timeout=None: whole.run(job))
    report = llmlab.fit(path, None, quant="BF16", engine="transformers", context=64, host="8 GiB")
    check = measured(report, path)
    assert check.row("weights").error == 0 and abs(check.row("compute").error) < 0.01


@pytest.mark.gpu
def test_transformers_on_a_card(spec):
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    report = llmlab.fit(spec, llmlab.machine(), quant="BF16", engine="transformers", context=512)
    check = measured(report)
    assert check.row("weights", "gpu0").error == 0 and check.row("kv_cache", "gpu0").error == 0
    assert check.row("overhead", "gpu0").measured > 50 * MIB


# ---- llama.cpp's words --------------------------------------------------------------------------------------------

LOG = """load_tensors:   CPU_Mapped model buffer size =    92.10 MiB
load_tensors:        CUDA0 model buffer size =   100.00 MiB
load_tensors:        CUDA1 model buffer size =    50.00 MiB
load_tensors:   CPU_REPACK model buffer size =    10.00 MiB
llama_context:  CUDA_Host  output buffer size =     0.19 MiB
llama_kv_cache:      CUDA0 KV buffer size =   180.00 MiB
llama_kv_cache:      CUDA0 KV buffer size =    20.00 MiB
llama_memory_recurrent:      CUDA1 RS buffer size =     3.00 MiB
sched_reserve:      CUDA0 compute buffer size =   1.00 MiB
sched_reserve:      CUDA0 compute buffer size =   164.01 MiB
sched_reserve:  CUDA_Host compute buffer size =    17.13 MiB
"""


def test_printed_buffers_in_our_words():
    run = {"buffers": llama._buffers(LOG), "tensors": 99 * MIB, "mapped": False, "used": [700 * MIB, None]}
    seen = {key: round(size / MIB, 2) for key, (size, _) in reconcile._llama_seen(run, [0, 1]).items() if size}
    assert seen == {("weights", "host"): 102.1, ("weights", "gpu0"): 100, ("weights", "gpu1"): 50,
                    ("output", "host"): 0.19, ("kv_cache", "gpu0"): 200, ("recurrent", "gpu1"): 3,
                    ("compute", "gpu0"): 164.01, ("compute", "host"): 17.13,
                    ("overhead", "gpu0"): round(700 - 100 - 200 - 164.01, 2)}
    mapped = reconcile._llama_seen(run | {"mapped": True, "used": []}, [1, 0])
    assert mapped["weights", "host"][0] == 99 * MIB and mapped["repacked", "host"][0] == 10 * MIB
    assert mapped["weights", "gpu0"][0] == 50 * MIB and mapped["weights", "gpu1"][0] == 100 * MIB     # the cards' own numbers


@pytest.fixture
def gguf(tmp_path, spec):
    metadata = {"general.architecture": "llama", "general.name": "tiny", "general.file_type": 0,
                "tokenizer.ggml.model": "no_vocab", **{f"llama.{k}": v for k, v in spec.metadata.items()}}
    path = tmp_path / "tiny.gguf"
    write_gguf(path, metadata, [(t.name, t.shape, "F32", lambda n=t.elements: bytes(4 * n)) for t in spec.tensors])
    return path


@pytest.mark.parametrize("body,words", [
    ("raise ImportError('no')", "needs llama-cpp-python, which is not installed: pip install"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", f"signal {signal.SIGSEGV.value}"),
    ("import os, sys; print('out of cheese', file=sys.stderr); os._exit(3)", "exit code 3.*out of cheese"),
    ("raise RuntimeError('libcuda is\\nnot there')", "llama.cpp failed: RuntimeError: libcuda is not there")])
def test_an_engine_that_is_missing_or_breaks_is_one_line(gguf, tmp_path, monkeypatch, body, words):
    (tmp_path / "llama_cpp.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("PYTHONFAULTHANDLER", raising=False)
    with pytest.raises(LabError, match=words) as caught:
        measured(llmlab.fit(gguf, None, context=256, host="8 GiB"), gguf)
    assert "\n" not in str(caught.value)


# ---- what cannot be measured --------------------------------------------------------------------------------------

def fails(message: str, *arguments, of=LabError, **more) -> None:
    with pytest.raises(of, match=message) as caught:
        measured(*arguments, **more)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_measured_says_so(spec, gguf, tmp_path, monkeypatch):
    ask = lambda *arguments, **more: pytest.fail("it was run")          # noqa: E731
    monkeypatch.setattr(probes, "ask", ask)
    report = llmlab.fit(gguf, None, context=256, host="8 GiB")
    fails("takes a report of llmlab.fit, not str", "llama")
    fails("vllm cannot be measured", llmlab.fit(spec, None, engine="vllm", quant="BF16", host="8 GiB"))
    absent = "gtx-1060-6gb" if hardware.machine().cards else "rtx-3060-12gb"
    fails("this computer has .*fit with gpu=None", llmlab.fit(gguf, absent), gguf)
    fails("give measured.. a GGUF", report)
    fails("is not there", report, tmp_path / "none.gguf", of=BadFile)
    fails("'3' is not there", report, 3, of=BadFile)
    for never in ("soon", 0, -1, float("nan"), float("inf")):
        with pytest.raises(LabError, match="timeout is .*give seconds"):
            measured(report, gguf, timeout=never)
    other = from_config({**CONFIG, "hidden_size": 256}, "other")
    fails("another model than the report's other", llmlab.fit(other, None, quant="F32", host="8 GiB"), gguf, of=BadFile)
    qwen = from_config({**CONFIG, "model_type": "qwen2"}, "q")
    fails("llama model and the report is about", llmlab.fit(qwen, None, quant="F32", host="8 GiB"), gguf, of=BadFile)
    fails("stored in F32 and the report is about Q8_0", llmlab.fit(gguf, None, quant="Q8_0", host="8 GiB"), gguf, of=BadFile)
    fails("give its file", llmlab.fit(gguf, None, quant="F32", engine="transformers", host="8 GiB"))
    fails("made from a folder of safetensors", llmlab.fit(spec, None, quant="NF4", engine="transformers", host="8 GiB"))
    fails("only through another package", llmlab.fit(spec, None, quant="BF16", kv="q8_0", engine="transformers", host="8 GiB"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    whole_report = llmlab.fit(spec, None, quant="BF16", engine="transformers", host="8 GiB")
    fails("holds no safetensors", whole_report, tmp_path, of=BadFile)
    fails("is no GGUF", llmlab.fit(spec, None, quant="F32", host="8 GiB"), tmp_path / "config.json", of=BadFile)
    here = replace(hardware.machine(), ram_available=MIB)
    monkeypatch.setattr(hardware, "machine", lambda: here)
    fails("needs .* of RAM and 1.00 MiB are free", report, gguf)
    fails("of RAM", llmlab.fit(spec, None, quant="BF16", engine="transformers", host="8 GiB"))


def test_a_card_that_is_here_is_found_in_its_order(spec, monkeypatch):
    live = [replace(gpu(name), free=8 << 30) for name in ("rtx-3060-12gb", "rtx-3090-24gb", "rtx-3060-12gb")]
    here = replace(hardware.machine(), cards=tuple(live))
    report = llmlab.fit(spec, [live[1], live[0], live[2]], quant="F16")
    assert reconcile._cards_here(report, here) == [1, 0, 2]


def test_the_file_is_what_the_report_knows(gguf):
    from llmlab.gguf import read_gguf
    report = llmlab.fit(gguf, None, context=256, host="8 GiB")
    reconcile._same_model(report, from_gguf(read_gguf(gguf)), gguf)
    assert os.path.samefile(report.spec.path, gguf)
