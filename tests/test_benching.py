"""The race beside other engines: who takes part, what is said of who cannot, what follows from the seconds, the command."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from runtime_models import divergence as reference_divergence
from runtime_models import make

from llmlab import LabError
from llmlab.benching import Bench, bench, child, dense, entries, lean, rounds
from llmlab.benching.children import Child
from llmlab.benching.result import DECODE, DEEP, PREFILL, Lane
from llmlab.cli import main
from llmlab.runtime.decoder import quick_dtype
from llmlab.shapes import model_spec


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    make("llama", path, mix="Q8_0")
    return path


@pytest.fixture(scope="module")
def raced(tiny):
    """One real race."""
    said = []
    found = bench(tiny, peers="nf4,bf16", strategies="fast", threads=1, rounds=2, prompt=48,
                  new=4, deep=96, progress=said.append)
    return found, said


# ---- the race itself ----------------------------------------------------------------------------------------

def test_everyone_runs_in_turn(raced):
    found, said = raced
    assert [lane.name for lane in found.lanes] == ["nf4", "fast", "bf16"]
    for lane in found.lanes:
        assert lane.failed is None, (lane.name, lane.failed)
        assert [len(lane.seconds[work]) for work in (PREFILL, DECODE, DEEP)] == [2, 2, 2] and lane.new == 4
        assert min(sum(lane.seconds.values(), ())) > 0 and lane.load_s > 0 and lane.first_s > lane.load_s
        assert 0 < lane.resident <= lane.peak and lane.held > 0
    assert len(found.bandwidth) == 4 and min(found.bandwidth) > 0
    assert "round 2 of 2" in said and "how exact bf16 is" in said


def test_who_is_exact_and_who_is_not(raced):
    exact = {lane.name: (lane.kld_prefill, lane.kld_decode) for lane in raced[0].lanes}
    quick = quick_dtype(torch.device("cpu"))                 # bfloat16 where the processor multiplies it, AVX-512 BF16
    assert all(abs(kld) < (1e-8 if quick == torch.float32 else 0.05) for kld in exact["fast"]), exact["fast"]
    assert all(1e-8 < kld < 0.05 for kld in exact["bf16"]), exact["bf16"]
    assert min(exact["nf4"]) > 10 * max(exact["bf16"])       # four bits of a few levels lose far more than a shorter fraction
    assert raced[0].scored_on == "128 random tokens"         # the file has no vocabulary
    assert f"torch.{raced[0].lane('fast').dtype}" == str(quick) and raced[0].lane("bf16").dtype == "bfloat16"


def test_what_is_printed_and_kept(raced):
    found, _ = raced
    text = repr(found)
    for part in ("prefill 48", "decode 4", "decode at 96", "KLD decode", "of roofline", "[exact]", "measured", "nf4"):
        assert part in text, part
    assert "llama.cpp" not in str(found.speeds)              # which did not run, so nothing is beside it
    assert "<table>" in found._repr_html_()
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["lanes"][1]["tokens_per_second"]["decode"] == pytest.approx(1 / min(found.lane("fast").seconds[DECODE]))
    assert plain["answer"] == found.answer and "[measured]" in found.answer and "of what memory allows" in found.answer


# ---- what follows from seconds ------------------------------------------------------------------------------

def lane(name: str, decode: tuple, prefill: tuple = (), ours: bool = False, **more) -> Lane:
    return Lane(name, ours, "float32", "because", {PREFILL: prefill, DECODE: decode, DEEP: ()}, 4, 1.0, 1.0, 2.0, 2**20, 2**21,
                None, None, None, None, None, **more)


def of(*lanes: Lane) -> Bench:
    return Bench("m.gguf", "M", "Q4_0", 2**20, 10e6, None, (1e9, 2e9), None, 2, 3, 512, 64, 0, "", "2026-01-01T00:00:00", "CPU",
                 2, (), {}, {}, (0.5, None), 0.1, lanes)


def test_ratios_are_of_rounds_run_together():
    peer, mine = lane("llama.cpp", (0.10, 0.40, 0.20), (0.01,)), lane("fast", (0.05, 0.20, 0.50), (0.02,), ours=True)
    found = of(peer, mine)
    assert found.ratio(mine, DECODE) == pytest.approx((2.0, 2.0, 0.4, 2.0))      # best, median, low, high
    assert found.ratio(mine, PREFILL).median == 0.5 and found.ratio(mine, DEEP) is None
    assert mine.rate(DECODE) == 20 and mine.usual(DECODE) == 5
    assert found.ceiling == 200 and found.roofline(mine) == pytest.approx(0.1)   # 10 MB a token at 2 GB/s: 200 tokens/s
    assert "2.00 (2.00)" in str(found.speeds) and "2.00 times as fast as llama.cpp" in found.answer
    assert of(mine).ratio(mine, DECODE) is None


def test_who_failed_is_a_line_and_no_row():
    found = of(lane("fast", (0.1,), ours=True), replace(lane("nf4", ()), failed="no room", load_s=None),
               lane("bf16", (0.2,), failed="stopped (signal 11)", notes=("slow",)))
    assert "nf4" not in str(found.speeds) and "bf16" in str(found.speeds)
    assert "nf4: did not take part: no room" in found.lines and "bf16: fell out: stopped (signal 11); slow" in found.lines
    assert of(replace(lane("fast", ()), failed="x")).answer == "M in Q4_0: nobody could run it."


def test_bytes_of_a_token_are_those_of_its_matrices(tiny):
    spec = model_spec(str(tiny))
    every = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512) + 320 * 256      # the embedding is looked up, the output read
    norms = 4 * 256 * (2 * 2 + 1)
    assert rounds.token_bytes(spec, 0) == pytest.approx(every * 34 / 32 + norms, abs=4 * 256)
    assert rounds.token_bytes(spec, 100) - rounds.token_bytes(spec, 0) == 100 * 2 * 2 * 128 * 2


def test_divergence_is_that_of_float64():
    torch.manual_seed(0)
    a, b = torch.randn(5, 40), torch.randn(5, 40)
    kld, same = child.divergence(a.numpy(), b.numpy())
    assert kld.max() == pytest.approx(reference_divergence(a, b)) and same.tolist() == (a.argmax(1) == b.argmax(1)).tolist()
    assert np.abs(child.divergence(a.numpy(), a.numpy())[0]).max() == 0
    with pytest.raises(LabError, match="5, 39"):
        child.divergence(a.numpy(), b.numpy()[:, 1:])


# ---- children -----------------------------------------------------------------------------------------------

def test_a_child_that_dies_is_one_line(tiny):
    one = Child("x", "lean", 1)
    job = {"path": str(tiny), "way": "decoder", "strategy": "compact", "dtype": None, "threads": 1, "context": 64, "born": 0.0}
    try:
        one.ask("open", job=job)
        with pytest.raises(LabError, match="there is no row 99999"):
            one.ask("read", tokens=[99999])
        assert one.ask("read", tokens=[1, 2])["seconds"] > 0         # an error is an answer; it lives on
        with pytest.raises(LabError, match="not compiled: strategy 'reference' is there to compare with"):
            one.ask("open", job=job | {"way": "compiled", "strategy": "reference"})
        os.kill(one._process.pid, 9)
        with pytest.raises(LabError, match="was killed, as the system does when memory runs out"):
            one.ask("read", tokens=[1, 2])
        assert not one.alive
    finally:
        one.close()


class Acted:
    """A child that answers as one would: `slow` seconds a token; "dies" at the command it is told to."""

    dies: dict = {}
    slow = 0.001
    asked: list = []

    def __init__(self, name, module, threads):
        self.name, self.alive = name, True

    def ask(self, do, **more):
        self.asked.append((self.name, do))
        if self.dies.get(self.name) == do:
            self.alive = False
            raise LabError("stopped (signal 11)")
        took = self.slow * len(more.get("tokens") or ())
        return {"open": {"import_s": 1.0, "load_s": 1.0, "since_s": 2.0, "about": {"dtype": "float32", "why": "so", "held": 7}},
                "bandwidth": {"rate": 1e9}, "memory": {"resident": 10, "peak": 20}, "text": {"tokens": list(range(128))},
                "keep": {}, "compare": {"kld_prefill": 0.1, "kld_decode": 0.2, "top1": 0.9}}.get(do, {"seconds": took})

    def cpu_seconds(self):
        return 0.0

    def close(self):
        self.alive = False


@pytest.fixture
def acted(monkeypatch):
    monkeypatch.setattr(rounds, "Child", Acted)
    monkeypatch.setattr(Acted, "asked", [])
    monkeypatch.setattr(Acted, "dies", {})
    monkeypatch.setattr(entries, "find_spec", lambda name: object())
    return Acted


def test_all_take_turns_and_each_round_begins_with_another(acted, tiny):
    found = bench(tiny, strategies="fast,compact", peers="llama.cpp", rounds=3, prompt=8, new=2, deep=16)
    order = [name for name, do in acted.asked if do == "read"][6:]                # each opened with two reads
    assert order == ["llama.cpp", "fast", "compact", "fast", "compact", "llama.cpp", "compact", "llama.cpp", "fast"]
    assert found.lane("fast").rate(PREFILL) == pytest.approx(1000) and found.ratio(found.lane("fast"), DEEP).median == 1.0
    assert found.lane("fast").first_s == pytest.approx(2.008) and found.lane("compact").kld_decode == 0.2
    assert found.scored_on == "128 tokens of the text llmlab ships"
    assert acted.asked.count(("fast", "fill")) == 1 and acted.asked[-1] == ("compact", "compare")


def test_one_that_falls_out_ends_nobody_elses_part(acted, tiny):
    acted.dies.update({"llama.cpp": "open", "compact": "write", "fast": "fill", "modules": "compare"})
    found = bench(tiny, strategies="fast,compact,modules,auto", peers="llama.cpp", rounds=2, prompt=8, new=2, deep=16)
    failed = {lane.name: lane.failed for lane in found.lanes}
    assert failed == {"llama.cpp": "stopped (signal 11)", "compact": "stopped (signal 11)", "fast": "stopped (signal 11)",
                      "modules": "could not be held against the reference: stopped (signal 11)", "auto": None}
    assert found.lane("fast").seconds[DECODE] and not found.lane("fast").seconds[DEEP]
    assert found.lane("modules").seconds[DEEP] and found.lane("auto").kld_decode == 0.2
    assert "compact: fell out: stopped (signal 11)" in found.lines
    assert "llama.cpp: did not take part: stopped (signal 11)" in found.lines


def test_without_a_reference_the_seconds_stay(acted, tiny):
    acted.dies["reference"] = "open"
    found = bench(tiny, strategies="fast", peers="none", rounds=1, prompt=8, new=2, deep=0)
    assert found.scored_on == "nothing: the reference failed (stopped (signal 11))"
    assert found.lane("fast").seconds[DECODE] and found.lane("fast").kld_decode is None


def test_a_slow_one_does_less(acted, tiny, monkeypatch):
    monkeypatch.setattr(acted, "slow", 4.0)                    # seconds a token
    found = bench(tiny, strategies="fast", peers="none", rounds=3, prompt=8, new=16, deep=64)
    one = found.lane("fast")
    assert one.new == 4                                        # of the 16: a round of writing is to take ten seconds
    assert len(one.seconds[PREFILL]) == 1 and len(one.seconds[DECODE]) == 2 and not one.seconds[DEEP]
    assert one.notes == ("reading 64 tokens would take it 256 s, so it was not asked for more there",)


# ---- who takes part -----------------------------------------------------------------------------------------

def test_names():
    asked = ("Fast", "compiled", "modules-compact@float16", "modules")
    names = [(e.name, e.way, e.strategy, e.dtype) for e in entries.ours(asked)]
    assert names == [("fast", "decoder", "fast", None), ("compiled", "compiled", "fast", None),
                     ("modules-compact@float16", "modules", "compact", "float16"), ("modules", "modules", "auto", None)]
    assert [e.name for e in entries.peers(("llama", "LLAMA.CPP", "dense"))] == ["llama.cpp", "bf16"]
    assert entries.split(None, ("a",), "x") == ("a",) and entries.split("none", ("a",), "x") == ()
    with pytest.raises(LabError, match="did you mean fast"):
        entries.ours(("fats",))
    with pytest.raises(LabError, match="'int8' is no dtype"):
        entries.ours(("fast@int8",))
    with pytest.raises(LabError, match="no peer.*llama.cpp, transformers, nf4, bf16"):
        entries.peers(("vllm",))


def test_what_is_missing_or_has_no_room_is_said(acted, tiny, monkeypatch):
    monkeypatch.setattr(entries, "find_spec", lambda name: None if name == "llama_cpp" else object())
    monkeypatch.setattr(rounds.hardware, "ram_available", lambda: 2**29 + 2**20)
    found = bench(tiny, peers="llama.cpp,transformers", strategies="compact", rounds=1, prompt=8, new=2, deep=0)
    assert found.lane("llama.cpp").failed.startswith("llama_cpp is not installed: pip install llama-cpp-python")
    assert found.lane("transformers").failed == "it takes about 10.26 MiB and 513.00 MiB are free"
    assert found.lane("compact").seconds[PREFILL]


# ---- what is refused ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "says"), [
    (["--threads", "0"], "threads is 0; give a whole number from 1"),
    (["--rounds", "0"], "rounds is 0"),
    (["--prompt", "lots"], "prompt is 'lots'"),
    (["--prompt", "4k"], "prompt is 4096; give a whole number from 1 to 512"),
    (["--deep", "512"], "go beyond the 512 that this model was trained for"),
    (["--strategy", "quick"], "'quick' is no strategy"),
    (["--peers", "vllm"], "'vllm' is no peer"),
    (["--peers", "none", "--strategy", "none"], "nobody takes part"),
    (["--strategy", ","], "--strategy is empty"),
])
def test_refused(tiny, capsys, words, says):
    assert main(["bench", str(tiny), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and len(err.splitlines()) == 1, err


def test_files_that_are_none(tiny, tmp_path, capsys):
    (tmp_path / "cut.gguf").write_bytes(tiny.read_bytes()[:5000])
    (tmp_path / "no.gguf").write_bytes(b"hello" * 100)
    for name, says in (("nowhere.gguf", "is no file and no model on this computer"), ("cut.gguf", "cut.gguf"),
                       ("no.gguf", "no.gguf"), (".", "is a folder")):
        assert main(["bench", str(tmp_path / name), "--json"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and says in err and len(err.splitlines()) == 1, err


def test_the_command_prints_whole_json(acted, tiny, capsys):
    assert main(["bench", str(tiny), "--quick", "--json"]) == 0
    out, err = capsys.readouterr()
    plain = json.loads(out)
    assert [lane["name"] for lane in plain["lanes"]] == ["llama.cpp", "fast", "compact", "modules"]
    assert plain["lanes"][1]["beside_llama_cpp"]["decode"]["median"] == 1.0 and "round 1 of 2" in err
    assert (plain["rounds"], plain["deep"], plain["prompt"], plain["quant"]) == (2, 0, 128, "Q8_0")
    assert main(["bench", str(tiny), "--quick"]) == 0
    assert "writes 1000.0 tokens/s" in capsys.readouterr().out


def test_the_parent_stays_light(tiny):
    """What it held would be missing to the others."""
    code = ("import sys; from llmlab.cli import main; "
            f"main(['bench', {str(tiny)!r}, '--deep', '9999']); "
            "print(sorted({'torch', 'transformers', 'llama_cpp'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]" and "deep is 9999" in done.stderr


# ---- contexts that nobody read ------------------------------------------------------------------------------

@pytest.mark.parametrize("kv", [None, "q8_0"])
def test_a_laid_down_context_repeats_what_was_read(tiny, kv):
    engine = lean.open({"path": str(tiny), "way": "decoder", "strategy": "compact", "dtype": "float32", "kv": kv})
    engine.read(list(range(1, 41)))
    engine.deepen(300)
    memory = engine._memory
    assert len(memory.tokens) == 300 and engine.read([5]) >= 0 and len(memory.tokens) == 301
    for cache in memory.caches:
        for side in (cache.keys, cache.values) if kv else cache:
            cells = lean._numbers(side, 300)[0] if kv else side
            assert cells[:, :40].abs().max() > 0
            assert torch.equal(cells[:, 40:300], cells[:, torch.arange(260) % 40]), kv


def test_a_laid_down_context_of_a_packed_transformers_cache(tiny):
    engine = dense.open({"path": str(tiny), "way": "packed", "kv": ["q8_0", "q4_0"]})
    engine.read([1, 2, 3])
    engine.deepen(300)
    assert engine._cache.get_seq_length() == 300 and engine.read([4]) >= 0 and engine._cache.get_seq_length() == 301
    assert "q8_0" in engine.about["why"] and engine._cache.kv == ("q8_0", "q4_0")


def test_each_token_that_was_written_has_its_seconds(tiny):
    found = Child("fast", "lean", 1)
    try:
        found.ask("open", job={"path": str(tiny), "threads": 1, "born": 0.0, "way": "decoder", "strategy": "compact",
                               "dtype": None, "kv": ["q8_0", "q8_0"]})
        assert found.ask("deepen", tokens=[1, 2, 3], depth=64)["seconds"] > 0
        took = found.ask("write", tokens=[4, 5, 6], after=None)
        assert len(took["each"]) == 3 and abs(sum(took["each"]) - took["seconds"]) < 1e-6
    finally:
        found.close()
