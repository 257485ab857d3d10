"""The lean decoder and the file's own words: what they say is what transformers' modules say, and what they need is less."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_chat
import torch

import llmlab
from llmlab.errors import BadFile, LabError, UnknownName
from llmlab.gguf import read_gguf
from llmlab.runtime.conversing import Conversation
from llmlab.runtime.generating import Options, stream
from llmlab.starting import decoder, gguf_of, refusal

TOP = Path(__file__).resolve().parents[1]
SAY = [{"role": "user", "content": "How are you?"}]
SAMPLED = {"temperature": 1.2, "top_k": 0, "max_tokens": 40}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tiny_chat.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def both(file):
    """(decoder, words), (model, tokenizer) in float32."""
    return decoder(file, "cpu", "float32"), llmlab.load(file, "cpu", "float32")


def text(engine, ask, **options) -> str:
    return "".join(stream(*engine, ask, Options(**options)))


def test_the_file_is_the_tiny_model(both):
    own = tiny_chat.model(), tiny_chat.tokenizer()
    for engine in both:
        assert text(engine, SAY, temperature=0, max_tokens=40) == text(own, SAY, temperature=0, max_tokens=40)


@pytest.mark.parametrize("options", [
    {"temperature": 0, "max_tokens": 60}, {"seed": 1, "max_tokens": 60}, {"seed": 2, **SAMPLED}, {"seed": 3, **SAMPLED},
    {"seed": 4, "repeat_penalty": 1.3, **SAMPLED}, {"seed": 5, "stop": "e", **SAMPLED}])
def test_the_same_seed_gives_the_same_text(both, options):
    """Greedy and sampled, of messages and of plain text: what is drawn does not depend on who multiplies."""
    for ask in (SAY, "Once upon a time"):
        lean, modules = (text(engine, ask, **options) for engine in both)
        assert lean == modules


def test_a_conversation_is_the_same_and_remembered(both):
    (lean, words), modules = both
    lean.forget()
    talks = [Conversation(lean, words), Conversation(*modules)]
    for said in ("one", "two", "three"):
        answers = ["".join(talk.answer(said, Options(seed=6, max_tokens=20))) for talk in talks]
        assert answers[0] == answers[1]
        kept = [talk.stats.reused_tokens for talk in talks]
        assert kept[0] == kept[1] and (kept[0] > 20) == (said != "one")
    assert talks[0].saved() == talks[1].saved()
    talks[0].clear()
    assert lean.tokens == []


def test_a_decoder_is_its_own_memory(both):
    (lean, words), _ = both
    lean.forget()
    list(stream(lean, words, "Once upon", Options(temperature=0, max_tokens=3)))
    again = stream(lean, words, "Once upon a time", Options(temperature=0, max_tokens=3))
    assert "".join(again) and again.stats.reused_tokens == len("Once upon")
    shorter = Conversation(lean, words, context=100).memory
    assert shorter.context == 100 and shorter.tokens is lean.tokens
    with pytest.raises(LabError, match="context is 1,000, and this decoder was opened with 512; open it with more"):
        Conversation(lean, words, context=1000)
    assert Conversation(lean, words, context=512).memory is lean


def test_the_context_asked_for_is_kept(file):
    lean, words = decoder(file, "cpu", context=40)
    got = stream(lean, words, "x" * 30, Options(seed=1))
    assert "".join(got) is not None and (got.stats.ended != "context full" or got.stats.tokens == 10)
    with pytest.raises(LabError, match="the prompt is 41 tokens and the context holds 40; .* trained with 512"):
        stream(lean, words, "x" * 41)
    with pytest.raises(LabError, match="was trained with 512"):
        decoder(file, context=513)


def test_a_real_model_by_name():
    lean, words = decoder(llmlab.fetch("smollm2-135m", progress=False), dtype=torch.float32)
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    assert text((lean, words), ask, temperature=0, max_tokens=20) == "The capital of France is Paris."


def test_nothing_heavy_is_imported(file):
    """What makes it start in a part of the time: named here, for seconds depend on the machine."""
    code = ("import json, sys; from llmlab.cli import main; import llmlab; seen = [set(sys.modules)]\n"
            "main(['run', sys.argv[1], '-p', 'How are you?', '--system', 'Be brief.', '-n', '5', '-s', '1']); "
            "print(json.dumps([sorted({'torch', 'numpy', 'transformers', 'jinja2', 'tokenizers', 'torch._inductor', "
            "'torch._dynamo', 'accelerate', 'bitsandbytes', 'pandas', 'IPython', 'psutil'} & one) "
            "for one in (*seen, set(sys.modules))]))")
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True, cwd=TOP)
    before, after = json.loads(done.stdout.splitlines()[-1])
    assert before == [] and after == ["numpy", "psutil", "tokenizers", "torch"], done.stderr
    assert done.stderr.startswith("llama by the lean decoder, ")


def test_a_file_without_words(tmp_path):
    gone = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type")
    file = tiny_chat.write(tmp_path / "bare.gguf", **dict.fromkeys(gone))
    lean, words = decoder(file, "cpu")
    assert words is None and lean.read([1, 2, 3]).shape == (259,)
    with pytest.raises(LabError, match="has no vocabulary"):
        stream(lean, words, "x")


def test_what_it_cannot_run_is_said(tmp_path):
    other = tiny_chat.write(tmp_path / "other.gguf", **{"general.architecture": "mamba"})
    assert "is a 'mamba' model" in refusal(read_gguf(other))
    with pytest.raises(LabError, match="is a 'mamba' model, which llmlab does not run packed"):
        decoder(other)
    projector = tiny_chat.write(tmp_path / "projector.gguf", **{"general.type": "mmproj"})
    with pytest.raises(LabError, match="projector.gguf is the projector of a model"):
        decoder(projector)
    with pytest.raises(LabError, match="is a folder, and the lean decoder reads GGUF files"):
        decoder(tmp_path)
    assert gguf_of(tmp_path) is None and refusal(read_gguf(tiny_chat.write(tmp_path / "tiny.gguf"))) == ""


def test_what_is_no_file_is_said(tmp_path):
    with pytest.raises(UnknownName, match="'no-such-model' is no file and no model on this computer"):
        gguf_of("no-such-model")
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(BadFile, match=r"text\.gguf"):
        gguf_of(tmp_path / "text.gguf")
    for wrong in (5, None, "a\0b"):
        with pytest.raises(LabError, match="is not a path|is no file"):
            gguf_of(wrong)
