"""The shell command: what it prints, what it refuses, and that it never imports torch."""

import json
import subprocess
import sys

import pytest
import tiny_chat

from llmlab.cli import main
from llmlab.evaluation import Evaluation, Outcome, evaluate


def run(capsys, *argv):
    status = main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_fit_in_words_and_json(capsys):
    status, out, _ = run(capsys, "fit", "llama-3-8b", "--gpu", "rtx-3060-12gb")
    assert status == 0 and out.startswith("Llama 3 8B in Q4_K_M") and "modelled" in out and "exact" in out
    status, out, _ = run(capsys, "fit", "llama-3-8b", "--gpu", "rtx-3060-12gb", "--context", "4096", "--kv", "q8_0,q4_0",
                         "--json")
    said = json.loads(out)
    assert said["fits"] and said["devices"]["gpu0"]["kv_cache"] == 32 * 1024 * 4096 * (34 + 18) // 32
    _, out, _ = run(capsys, "fit", "llama-3-70b", "--gpu", "rtx-3090-24gb", "--gpu", "rtx-3090-24gb", "--json")
    assert set(json.loads(out)["devices"]) == {"gpu0", "gpu1", "host"}
    _, out, _ = run(capsys, "fit", "smollm2-135m", "--gpu", "none", "--host", "8 GiB", "--json")
    assert set(json.loads(out)["devices"]) == {"host"}


def test_size_and_mix(capsys):
    _, out, _ = run(capsys, "size", "llama-3-8b", "IQ4_XS", "--json")
    assert json.loads(out) == {"tensor_bytes": 4476526592, "bits_per_weight": pytest.approx(4.4597, abs=1e-4),
                               "needs_importance": False}
    _, out, _ = run(capsys, "size", "llama-3-8b", "IQ4_XS", "--importance", "--json")
    assert json.loads(out)["tensor_bytes"] < 4476526592
    _, out, _ = run(capsys, "mix", "llama-3-8b", "Q4_K_M", "--json")
    assert json.loads(out)["output.weight"] == "Q6_K"
    _, out, _ = run(capsys, "size", "llama-3-8b", "IQ2_M")
    assert "importance matrix" in out


def test_what_fits_a_card(capsys):
    status, out, _ = run(capsys, "fits", "rtx-3060-12gb", "--context", "4k", "--kv", "q8_0,q4_0")
    lines = out.splitlines()
    assert status == 0 and "pairs fit whole with 4,096 tokens" in lines[0]
    assert lines[1].split() == ["model", "params", "rtx-3060-12gb"]
    assert len(lines) > 90 and any(line.split()[:1] == ["llama-3-8b"] and "Q8_0" in line for line in lines)
    _, out, _ = run(capsys, "fits", "rtx-3060-12gb", "rtx-4090-24gb", "--json")
    rows = json.loads(out)
    assert {"model", "params", "rtx-3060-12gb", "rtx-4090-24gb"} == set(rows[0])
    assert next(r for r in rows if r["model"] == "deepseek-v3")["rtx-3060-12gb"] is None


def test_what_lies_beside_and_how_much_vllm_reserves(capsys):
    _, out, _ = run(capsys, "fit", "qwen2.5-7b", "--gpu", "rtx-3060-12gb", "--draft", "qwen2.5-0.5b", "--draft-quant", "Q8_0",
                    "--projector", "1 GiB", "--display", "none", "--json")
    gpu = json.loads(out)["devices"]["gpu0"]
    assert gpu["projector"] > 2**30 and gpu["draft"] > 3e8 and gpu["draft_cache"] == 8192 * 12288
    _, out, _ = run(capsys, "fit", "llama-3-8b", "--gpu", "rtx-4090-24gb", "--engine", "vllm", "--quant", "BF16",
                    "--utilization", "0.8", "--display", "none")
    assert "vLLM reserves 80% of the card" in out
    _, out, _ = run(capsys, "fit", "qwen3-30b-a3b", "--gpu", "rtx-3060-12gb", "--n-cpu-moe", "auto")
    assert "the experts of" in out
    _, out, _ = run(capsys, "fit", "glm-4.5-air", "--gpu", "rtx-pro-6000-blackwell-96gb", "--mtp", "--json")
    assert json.loads(out)["devices"]["gpu0"]["mtp"] > 0


def test_an_evaluation_is_printed_saved_and_set_beside_another(capsys, tmp_path):
    model = str(tiny_chat.write(tmp_path / "tiny.gguf"))
    task, saved = tmp_path / "own.jsonl", str(tmp_path / "saved.json")
    task.write_text("\n".join(json.dumps({"id": f"c-{at}", "kind": "choice", "prompt": f"{at}:", "choices": [" yes", " no"],
                                          "answer": at % 2}) for at in range(4)))
    status, out, _ = run(capsys, "evaluate", model, "--tasks", str(task), "--save", saved)
    assert status == 0 and out.startswith("tiny.gguf, measured: own ") and "of 4 (" in out and "seconds" in out
    status, out, _ = run(capsys, "evaluate", model, "--tasks", str(task), "--limit", "3", "--beside", saved, "--json")
    said = json.loads(out)
    assert status == 0 and said["scores"]["own"]["n"] == 3 and len(said["outcomes"]) == 3
    assert said["beside"]["lost"] == said["beside"]["gained"] == 0 and said["beside"]["left_out"] == 1
    assert "3 items" in run(capsys, "evaluate", model, "--tasks", str(task), "--limit", "3", "--beside", saved)[1]


@pytest.fixture
def elsewhere(tmp_path):
    """An evaluation of other items by the names of these: of coding and of needles."""
    path = tmp_path / "elsewhere.json"
    outcomes = tuple(Outcome(task, "x-1", "choice", "0", True) for task in ("coding", "needles"))
    Evaluation("b.gguf", "by hand", outcomes).save(path)
    return str(path)


def test_an_evaluation_to_be_lost_is_not_begun(capsys, tmp_path, elsewhere):
    """The model is not there, and nothing asks for it yet."""
    (tmp_path / "file").write_text("")
    for more, says in ((["--tasks", "english", "--limit", "2", "--beside", elsewhere], "its tasks are 'coding, needles'"),
                       (["--tasks", "coding", "--beside", elsewhere], "no item of what is to be asked"),     # another version
                       (["--tasks", "needles", "--save", str(tmp_path)], "is a folder"),
                       (["--tasks", "needles", "--save", ""], "is a folder"),
                       (["--tasks", "needles", "--save", "/dev/null"], "is a device"),
                       *((["--tasks", "needles", "--save", str(tmp_path / name)], "cannot be written")
                         for name in ("no folder/e.json", "file/e.json", "long" * 64))):
        status, out, err = run(capsys, "evaluate", "gone.gguf", *more)
        assert (status, out) == (2, "") and says in err and "gone" not in err and err.count("\n") == 1
    assert sorted(one.name for one in tmp_path.iterdir()) == ["elsewhere.json", "file"]


def test_an_evaluation_is_saved_and_shown_whatever_it_cannot_be_set_beside(capsys, tmp_path, elsewhere):
    model, saved = str(tiny_chat.write(tmp_path / "tiny.gguf")), tmp_path / "saved.json"
    asked = ["evaluate", model, "--tasks", "needles", "--limit", "1", "--save", str(saved), "--beside", elsewhere]
    for more in ([], ["--json"]):
        status, out, err = run(capsys, *asked, *more)
        assert status == 2 and "asked no item alike" in err and Evaluation.load(saved).scores["needles"].n == 1
        assert json.loads(out)["scores"]["needles"]["n"] == 1 if more else out.startswith("tiny.gguf, measured: needles ")
        saved.unlink()


def test_an_evaluation_is_shown_where_its_place_went_away_meanwhile(capsys, tmp_path, monkeypatch):
    model, place = str(tiny_chat.write(tmp_path / "tiny.gguf")), tmp_path / "place"
    monkeypatch.setattr("llmlab.evaluation.evaluate", lambda *given, **more: (place.rmdir(), evaluate(*given, **more))[1])
    place.mkdir()
    status, out, err = run(capsys, "evaluate", model, "--tasks", "needles", "--limit", "1", "--save", str(place / "e.json"))
    assert status == 2 and "cannot be written" in err and out.startswith("tiny.gguf, measured: needles ")


def test_thousands_of_tokens_may_be_written_k(capsys):
    _, out, _ = run(capsys, "fit", "llama-3-8b", "--gpu", "rtx-3060-12gb", "--context", "32k", "--json")
    assert json.loads(out)["devices"]["gpu0"]["kv_cache"] == 4 * 2**30
    _, out, _ = run(capsys, "gpus", "3060")
    assert "rtx-3060-12gb" in out and "rtx-4060" not in out


def test_tables_and_doctor(capsys):
    for command in ("models", "gpus", "doctor"):
        status, out, _ = run(capsys, command)
        assert status == 0 and len(out.splitlines()) > 4
        status, out, _ = run(capsys, command, "--json")
        assert status == 0 and json.loads(out)


def test_doctor_calibrates_first_when_asked(capsys, monkeypatch, tmp_path):
    from llmlab import hardware
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    calibrate, asked = hardware.Machine.calibrate, []

    def quickly(self, seconds=25.0, progress=None, store=True):
        asked.append(progress)
        return calibrate(self, 1, progress, store)

    monkeypatch.setattr(hardware.Machine, "calibrate", quickly)
    status, out, err = run(capsys, "doctor", "--calibrate", "--json")
    assert status == 0 and json.loads(out)["calibration"]["answer"].startswith("Measured ") and err == ""
    status, out, _ = run(capsys, "doctor")
    assert status == 0 and "RAM is read at" in out and len(asked) == 1
    asked[0](0.5, "RAM")
    assert capsys.readouterr() == ("", "")
    asked[0](1.0, "not stored: no space")
    assert capsys.readouterr().err == "llmlab: not stored: no space\n"


@pytest.mark.parametrize("argv, says", [
    (["fit", "lama-3-8b"], "did you mean"), (["fit", "llama-3-8b", "--gpu", "rtx-9999"], "rtx"),
    (["fit", "llama-3-8b", "--context", "-5"], "context"), (["size", "llama-3-8b", "Q4_Z"], "Q4_"),
    (["fit", "gone.gguf"], "gone.gguf"), (["fit", "llama-3-8b", "--gpu-layers", "many"], "gpu_layers"),
    (["fit"], "MODEL"), (["fit", "llama-3-8b", "--jsn"], "--jsn"), (["nosuch"], "nosuch"), (["size", "a", "b", "c"], "'c'"),
    (["fit", "llama-3-8b", "--gpu-layers=--5"], "gpu_layers"),
    (["fit", "llama-3-8b", "--gpu", "none", "--gpu", "none"], "none"),
    (["fit", "llama-3-8b", "--host", "-8GiB"], "what begins with '-' is none"),
    (["fit", "llama-3-8b", "--host", "0"], "host"), (["fit", "llama-3-8b", "--host", "9" * 400], "size"),
    (["fit", "/dev/zero"], "regular file"), (["fit", "llama-3-8b", "--context", "lots"], "context"),
    (["fit", "llama-3-8b", "--n-cpu-moe", "some"], "n_cpu_moe"), (["fits", "rtx-9999"], "rtx"), (["fits", "--kv", "q9"], ""),
    (["fit", "llama-3-8b", "--gpu", "3090", "--display", "beos"], "display"),
    (["fit", "llama-3-8b", "--gpu", "3090", "--utilization", "2"], "utilization"),
    (["fit", "llama-3-8b", "--gpu", "3090", "--projector", "gone.gguf"], "gone.gguf"),
    (["fit", "llama-3-8b", "--gpu", "3090", "--mtp"], "multi-token"),
    (["evaluate", "smollm2-135m", "--tasks", "juggling"], "needles"), (["evaluate", "gone.gguf", "--tasks", "needles"], "gone"),
    (["evaluate", "smollm2-135m", "--tasks", "needles", "--beside", "gone.json"], "gone.json"),
    (["evaluate", "gone.gguf", "--tasks", ","], "tasks is ['', '']; give names"),
    (["evaluate", "gone.gguf", "--tasks", "needles", "--limit", "0"], "limit is 0; give a whole number of items, from 1 up"),
    (["fetch", "llama-3-8b"], "catalogue"), (["fit", "llama-3-8b", "--quant", "Q9"], "Q4_K_M")])
def test_bad_input_gets_one_line_and_status_2(capsys, argv, says):
    status, out, err = run(capsys, *argv)
    assert status == 2 and out == "" and err.startswith("llmlab: ") and says in err and err.count("\n") == 1


def test_no_command_imports_torch():
    code = ("import sys; from llmlab.cli import main; main(['fit', 'llama-3-8b', '--gpu', 'rtx-3060-12gb', '--json']);"
            "bad = {'torch', 'transformers', 'plotly', 'ipywidgets', 'numpy'} & set(sys.modules);"
            "sys.exit(f'imported {bad}' if bad else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "llmlab", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("llmlab ")
