"""Tokens against llama.cpp itself: its own vocabulary files with their expected tokens, and texts nobody would write."""

import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from llama_engine import llama_cpp
from llama_vocabulary import live

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from make_vocabulary_golden import GOLDEN, golden
from vocabularies import SPLITS, cases, put

from llmlab.gguf import Array, read_gguf, write_gguf
from llmlab.sources import fetch
from llmlab.vocabulary import tokenizer_of
from llmlab.vocabulary.splits import NAMES

pytestmark = pytest.mark.peers

# Vocabulary files of the source distribution that a model we run could have. Those of BERT and T5 have other kinds.
FILES = ("aquila", "baichuan", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "gpt-neox",
         "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder")
BETWEEN = "\n__ggml_vocab_test__\n"  # llama.cpp's own separator in those files

WORDS = ("the and Hello world don't I'M we'Re it'S 1234567 3.14 foo_bar() ΑΒΓ привет мир שלום 你好世界 こんにちは 안녕 हिन्दी "
         "ไทย çalış naïve Zürich ﬁ <0x41> <0xE4> ▁ ▁▁ http://x.y/z?q=1 😀 👩‍👩‍👧 e\u0301 ſ K İ ǅ ª ² ½ Ⅷ 𝟘 "
         "١٢٣ ''' -- --- ==== ..... {} [] != => <| |> <s> </s>").split()
SPACES = (" ", "  ", "   ", "\n", "\n\n", "\n \n", "\r\n", "\t", "\t\t", " \t ", "\u3000", "\xa0", "\u2003 ", "\x85", "\x0b",
          "\u2028", " \n\n\n ", "        ")
SCRIPTS = ((0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F),
           (0x1100, 0x11FF), (0x2000, 0x206F), (0x2100, 0x218F), (0x2190, 0x22FF), (0x2460, 0x24FF), (0x3000, 0x30FF),
           (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xF900, 0xFB06), (0xFE00, 0xFE0F), (0xFF00, 0xFFEF), (0x10000, 0x10FFF),
           (0x16100, 0x16DFF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x20100), (1, 0x1F), (0x7F, 0x9F),
           (0xE0000, 0xE007F))


def some_text(dice: random.Random, special: list[str]) -> str:
    """Words, runs, digits, spaces, letters of many scripts, code points of none, special tokens."""
    parts = []
    for _ in range(dice.randint(1, 14)):
        parts.append(dice.choice((
            lambda: dice.choice(WORDS),
            lambda: dice.choice(WORDS),
            lambda: dice.choice(SPACES) * dice.choice((1, 1, 1, 2, 3, 5)),
            lambda: dice.choice(SPACES),
            lambda: "".join(chr(dice.randint(*ends)) for ends in [dice.choice(SCRIPTS)] * dice.randint(1, 6)),
            lambda: "".join(chr(dice.randint(*ends)) for ends in [dice.choice(SCRIPTS)] * dice.randint(1, 6)),
            lambda: "".join(chr(point) for _ in range(4) if not 0xD800 <= (point := dice.randint(1, 0x10FFFF)) < 0xE000),
            lambda: dice.choice(("a", "=", "-", " ", "*", "ab", "ha", "s", ".", "\n", "\t", "の")) * dice.randint(2, 40),
            lambda: str(dice.randint(0, 10 ** dice.randint(1, 14))),
            lambda: dice.choice(special) if special else "",
        ))())
    return "".join(parts)


def compare(path, count: int, seed: int, strip: bool = False) -> None:
    """`count` texts in four ways each. `strip`: without spaces beyond ASCII, which Phi-3's own tokenizer takes away after a
    special token (and we with it), and llama.cpp leaves."""
    tokenizer = tokenizer_of(read_gguf(path))
    special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    dice = random.Random(seed)
    with live(path) as peer:
        for _ in range(count):
            text = some_text(dice, special)
            if strip:
                text = text.translate({ord(space): "" for space in "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
                                       + "".join(map(chr, range(0x2000, 0x200B))) + "\x1c\x1d\x1e\x1f"})
            for add in (False, True):
                for parse in (False, True):
                    ours = tokenizer(text, add_special_tokens=add, split_special_tokens=not parse)["input_ids"]
                    assert ours == peer.tokens(text, add, parse), (text, add, parse)
        for number in range(0, peer.count, 1 + peer.count // 20000):
            piece = peer.piece(number)  # for letters that stand for no byte it has a marker where we have the letters
            assert tokenizer.piece(number) == piece or piece.startswith(b"[UNK_BYTE_0x"), number
        assert list(tokenizer.stop_ids) == [number for number in range(peer.count) if peer.ends(number)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """models/ of llama.cpp, out of llama-cpp-python's source distribution, which pip has built from and keeps in its cache."""
    folder = tmp_path_factory.mktemp("sources")
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python",
                           "--dest", str(folder), f"llama-cpp-python=={llama_cpp.__version__}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip could not download llama-cpp-python's source distribution: {done.stderr[-300:]}")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        for member in archive:
            name = Path(member.name).name
            if name.startswith("ggml-vocab-") and member.isfile():
                (folder / name).write_bytes(archive.extractfile(member).read())
    return folder


def test_golden_data_is_what_llama_cpp_says():
    stored = json.loads(GOLDEN.read_text())
    assert json.loads(json.dumps(golden())) == {name: case for name, case in stored.items() if name != "made with"}


@pytest.mark.parametrize("name", FILES)
def test_vocabulary_files_of_llama_cpp(name, sources):
    path = sources / f"ggml-vocab-{name}.gguf"
    if (inputs := path.with_suffix(".gguf.inp")).exists():
        tokenizer = tokenizer_of(read_gguf(path))
        texts = inputs.read_bytes().decode().split(BETWEEN)
        lines = path.with_suffix(".gguf.out").read_text().split("\n")
        expected = [[int(number) for number in line.split()] for line in lines[:len(texts)]]
        assert len(texts) >= 46 and len(lines) >= len(texts)
        for text, ids in zip(texts, expected, strict=True):
            assert tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids, text
    compare(path, 40, seed=len(name), strip=name == "phi-3")


def test_pieces_by_score_in_a_vocabulary_of_262144(sources, tmp_path):
    """Gemma 3's kind: Gemma 4's tokens without merges, with scores as SentencePiece gives them."""
    file = read_gguf(sources / "ggml-vocab-gemma-4.gguf")
    kinds = file.metadata["tokenizer.ggml.token_type"].values()
    metadata = {key: value for key, value in file.typed_metadata().items() if key != "tokenizer.ggml.merges"}
    metadata |= {"general.architecture": "gemma3", "tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": (
        "array:float32", [-float(number) if kind == 1 else 0.0 for number, kind in enumerate(kinds)])}
    write_gguf(tmp_path / "gemma.gguf", metadata, [])
    assert isinstance(metadata["tokenizer.ggml.tokens"], Array)
    compare(tmp_path / "gemma.gguf", 100, seed=3)


def test_texts_nobody_would_write_in_a_real_file():
    compare(fetch("smollm2-135m", progress=False), 400, seed=1)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"gemma4", "granite-embed-multi-311m", "sarvam-moe"}))
def test_every_name_of_a_rule(name, tmp_path):
    compare(put(tmp_path, cases()["bpe gpt-2"] | {"tokenizer.ggml.pre": name}), 15, seed=sorted(NAMES).index(name))


@pytest.mark.parametrize("name", [name for name in cases() if name.removeprefix("bpe ") not in SPLITS])
def test_small_vocabularies(name, tmp_path):
    compare(put(tmp_path, cases()[name]), 100, seed=7, strip="phi-3" in name)
