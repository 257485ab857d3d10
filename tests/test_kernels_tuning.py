"""What is measured once and remembered: by whom, for what machine, and what a damaged or foreign file counts for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmlab.kernels import tuning


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    monkeypatch.delenv("LLMLAB_TUNING", raising=False)
    monkeypatch.setattr(tuning, "_known", {})


def counting(answers):
    """A remembered function and the list of what it was asked while it measured."""
    asked = []

    def measure(dtype: torch.dtype, passes: int) -> int:
        asked.append((dtype, passes))
        return answers

    return tuning.remembered(measure), asked


def fresh_process(monkeypatch):
    monkeypatch.setattr(tuning, "_known", {})


def files() -> list[Path]:
    return sorted(tuning.folder().iterdir()) if tuning.folder().is_dir() else []


def test_measured_once_in_a_process_and_on_a_machine(monkeypatch):
    tokens, asked = counting(32)
    for _ in range(3):
        assert tokens(torch.bfloat16, 1) == 32
    fresh_process(monkeypatch)
    assert tokens(torch.bfloat16, 1) == 32 and asked == [(torch.bfloat16, 1)]
    assert tokens(torch.bfloat16, 2) == tokens(torch.float16, 1) == 32 and len(asked) == 3
    held = json.loads(files()[0].read_text())
    assert len(files()) == 1 and len(held["choices"]) == 3 and held["facts"]["threads"] == torch.get_num_threads()
    assert any(name.endswith("measure, bfloat16, 2") for name in held["choices"])
    assert tokens.__wrapped__(torch.bfloat16, 1) == 32 and len(asked) == 4


def test_another_machine_measures_for_itself(monkeypatch):
    tokens, asked = counting(8)
    tokens(torch.bfloat16, 1)
    fresh_process(monkeypatch)
    monkeypatch.setattr(tuning, "_processor", lambda: "another one")
    tokens(torch.bfloat16, 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        tokens(torch.bfloat16, 1)       # in the same process
    finally:
        torch.set_num_threads(threads)
    assert len(asked) == len(files()) == 3


@pytest.mark.parametrize("spoil", [
    lambda text: text[:40], lambda text: "", lambda text: "[" * 100000, lambda text: "null", lambda text: '{"version": 1}',
    lambda text: text.replace('"version": 1', '"version": 0'), lambda text: text.replace('"threads"', '"Threads"'),
    lambda text: text.replace(": 16", ': "16"'), lambda text: text.replace(": 16", ": true"),
    lambda text: text.replace(": 16", ": 1e9"),
    lambda text: json.dumps(json.loads(text) | {"choices": [1]})])
def test_a_damaged_or_foreign_file_is_written_anew(monkeypatch, spoil):
    tokens, asked = counting(16)
    tokens(torch.bfloat16, 1)
    whole = files()[0].read_text()
    files()[0].write_text(spoil(whole))
    fresh_process(monkeypatch)
    assert tokens(torch.bfloat16, 1) == 16 and len(asked) == 2
    assert len(files()) == 1 and files()[0].read_text() == whole


def test_a_file_that_is_no_text(monkeypatch):
    tokens, asked = counting(16)
    tokens(torch.bfloat16, 1)
    files()[0].write_bytes(b"\xff\xfe\x00")
    fresh_process(monkeypatch)
    assert tokens(torch.bfloat16, 1) == 16 and len(asked) == 2


def test_yes_and_no_are_no_numbers(monkeypatch):
    @tuning.remembered
    def either(passes: int) -> bool:
        return passes > 1

    assert either(1) is False and either(2) is True
    fresh_process(monkeypatch)
    assert either(1) is False and either(2) is True
    path = files()[0]
    path.write_text(path.read_text().replace("false", "0"))
    fresh_process(monkeypatch)
    assert either(1) is False


def test_turned_off_and_forgotten(monkeypatch):
    tokens, asked = counting(16)
    monkeypatch.setenv("LLMLAB_TUNING", "off")
    tokens(torch.bfloat16, 1)
    assert files() == []
    monkeypatch.setenv("LLMLAB_TUNING", "")
    fresh_process(monkeypatch)
    tokens(torch.bfloat16, 1)
    assert len(files()) == 1
    monkeypatch.setenv("LLMLAB_TUNING", "off")
    fresh_process(monkeypatch)
    tokens(torch.bfloat16, 1)
    assert len(asked) == 3
    tuning.forget()
    assert files() == [] and tokens(torch.bfloat16, 1) == 16 and len(asked) == 4
    tuning.forget()     # nothing there is no fault


def test_a_cache_that_cannot_be_written_to(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "file"))
    tokens, asked = counting(16)
    assert tokens(torch.bfloat16, 1) == tokens(torch.bfloat16, 1) == 16 and len(asked) == 1


def test_a_measurement_may_ask_for_another():
    tokens, asked = counting(4)

    @tuning.remembered
    def outer(passes: int) -> int:
        return tokens(torch.float16, passes) + 1

    assert outer(3) == 5 and asked == [(torch.float16, 3)]
    assert sum(len(json.loads(path.read_text())["choices"]) for path in files()) == 2


def test_a_failed_measurement_is_not_remembered():
    tries = []

    @tuning.remembered
    def fails(passes: int) -> int:
        tries.append(passes)
        if len(tries) == 1:
            raise RuntimeError("out of memory")
        return 1

    with pytest.raises(RuntimeError):
        fails(1)
    assert fails(1) == 1 and files()


def test_the_card_without_a_number_is_the_one_in_use(monkeypatch):
    class Card:
        name, major, minor, multi_processor_count = "Card", 8, 0, 108

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    asked = []

    @tuning.remembered
    def quick(device: torch.device, passes: int) -> bool:
        asked.append(device)
        return True

    assert quick(torch.device("cuda"), 1) and quick(torch.device("cuda:1"), 1) and asked == [torch.device("cuda")]
    fresh_process(monkeypatch)
    assert quick(torch.device("cuda:0"), 1) and len(asked) == 1     # the same kind of card
    held = json.loads(files()[0].read_text())
    assert held["facts"]["card"] == "Card" and held["facts"]["capability"] == "8.0"


def test_a_second_process_does_not_measure():
    """The choices that the kernels make, by two processes one after the other; the second may not time anything."""
    text = ("import torch\nfrom llmlab.kernels import arithmetic, int4\n{}\n"
            "print([int4.tokens(torch.bfloat16, passes) for passes in (1, 2)], arithmetic.multiply_in(torch.float16, 'cpu'))")
    forbid = "def no(*a, **k): raise SystemExit('measured again')\narithmetic.quicker = int4.quicker = no"
    top = str(Path(__file__).parents[1])
    answers = []
    for more in ("", forbid):
        done = subprocess.run([sys.executable, "-c", text.format(more)], capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": top})
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert answers[0] == answers[1]
