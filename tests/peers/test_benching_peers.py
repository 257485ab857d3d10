"""The race with the real peers in it: each runs, and its logits are those of the same model."""

import json

import pytest
from llama_engine import listen, llama_cpp
from runtime_models import make

from llmlab import LabError
from llmlab.benching import bench, llama
from llmlab.benching.result import DECODE, DEEP, PREFILL
from llmlab.cli import main

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def raced(smollm2):
    return bench(smollm2, peers="llama.cpp,transformers", strategies="fast", rounds=2, prompt=32, new=4, deep=64)


def test_each_runs_in_every_round(raced):
    for lane in raced.lanes:
        assert lane.failed is None, (lane.name, lane.failed)
        assert [len(lane.seconds[work]) for work in (PREFILL, DECODE, DEEP)] == [2, 2, 2]
    assert raced.lane("llama.cpp").why.startswith(f"llama-cpp-python {llama_cpp.__version__}")
    beside = raced.ratio(raced.lane("transformers"), DECODE)
    assert beside.low <= beside.median <= beside.high and "x llama.cpp" in str(raced.speeds)


def test_all_read_the_same_text_with_the_same_model(raced):
    """llama.cpp rounds activations to 8 bits; transformers in float32 is the reference again, by another way to load."""
    assert raced.scored_on == "128 tokens of the text llmlab ships"
    llama, whole, fast = map(raced.lane, ("llama.cpp", "transformers", "fast"))
    assert 1e-5 < llama.kld_prefill < 0.05 and 1e-5 < llama.kld_decode < 0.05 and llama.top1 > 0.8
    assert abs(whole.kld_prefill) < 1e-8 and abs(whole.kld_decode) < 1e-8
    near = 1e-8 if fast.dtype == "float32" else 0.01        # bfloat16 where the processor is quick with it
    assert abs(fast.kld_prefill) < near and abs(fast.kld_decode) < near


def test_llama_cpp_holds_about_the_file(raced, smollm2):
    size = smollm2.stat().st_size
    assert 0.5 * size < raced.lane("llama.cpp").resident < 3 * size
    assert raced.lane("transformers").resident > 3 * size                    # every weight unpacked to float32


def test_a_file_a_peer_cannot_run_is_a_line(tmp_path, capsys):
    path = tmp_path / "experts.gguf"
    make("mixtral", path, mix="Q8_0")
    assert main(["bench", str(path), "--peers", "bf16", "--strategy", "none", "--rounds", "1", "--prompt", "8", "--new", "2",
                 "--deep", "0", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["lanes"][0]["failed"].startswith("its experts stay packed") and "nobody could run it" in plain["answer"]


@pytest.fixture
def in_this_process():
    """What is said to an engine opened here goes to the other tests again."""
    yield
    listen()


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("kv", [None, ["q8_0", "q4_0"]])
def test_a_context_laid_down_in_llama_cpp(smollm2, kv):
    """Its state written by us and taken by it: as many cells as were read change nothing; more are more."""
    engine = llama.open({"path": str(smollm2), "threads": 1, "context": 512, "kv": kv})
    tokens = list(range(100, 140))
    engine.read(tokens)
    told = engine.scores([7])
    engine.forget()
    engine.read(tokens)
    engine.deepen(len(tokens))
    assert abs(engine.scores([7]) - told).max() < 1e-4
    engine.forget()
    engine.read(tokens)
    engine.deepen(300)
    last = llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(engine._context), 0)
    assert last == 299 and abs(engine.scores([7]) - told).max() > 1e-2


def test_a_cache_type_that_llama_cpp_has_not(smollm2):
    with pytest.raises(LabError, match="no cache in fp8"):
        llama.open({"path": str(smollm2), "threads": 1, "context": 64, "kv": ["fp8", "fp8"]})
