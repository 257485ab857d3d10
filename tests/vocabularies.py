"""Small vocabularies learned here from a few lines of text, as GGUF files: what llama.cpp makes of them is golden data."""

from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

from llmlab.gguf import write_gguf

SAMPLE = (
    "The quick brown fox jumps over the lazy dog. The dog's ears don't move; they're asleep, I'm sure it'll wake up!\n"
    "In 1984 and 2024, 1234567 people read 3.14159 books; 100% of them (or so) said: \"We've SEEN it.\"  def f(x):\n"
    "\treturn x ** 2\n"
    "    for i in range(10):\n"
    "        print(i, end=\"\\n\")\n"
    "\n"
    "\n"
    "Über die Straße läuft ein süßer Igel. L'été, c'est déjà fini: où ça?\n"
    "Быстрая лиса прыгает через ленивую собаку. Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. नमस्ते दुनिया। "
    "สวัสดีชาวโลก\n"
    "敏捷的棕色狐狸跳过懒狗。你好，世界！こんにちは世界。カタカナ 안녕하세요 세계. -------- ======== ........ aaaaaaa "
    "hahaha 😀😀 👩\u200d👩\u200d👧\n"
    "the the the and and of of to in is that it was for on are as with his they at be this have from or one had by "
    "word but not"
)

TEXTS = (
    "'Sabc'Tabc.\n\n\n'Sabc'Tabc.\n\n\nx", "$1234$1234 %5678%5678",
    "", " ", "   ", "Hello, world!", "  The quick brown fox ", "don't I'LL we'Re you'VE IT'S 'tis o'clock",
    "x = 1234567; y=3.14159e-10", "def f(x):\n\treturn x ** 2\n\n\n    # done\r\n\r\n", "a\n \n  \n\tb \t \n",
    "naïve Zürich été ﬁ ſ K İ ǅ", "Быстрая лиса, ПРИВЕТ мир 2024г.", "你好，世界！敏捷的狐狸123只",
    "こんにちは カタカナ ー々〆 안녕하세요", "नमस्ते दुनिया ก็ไทย שלום مرحبا١٢٣",
    "😀👩\u200d👩\u200d👧🏽 ️\u200d\u200b\u2060", "\xa0\u2003\u3000 \x85\u2028x\u3000", "½ ² Ⅷ ٣ 𝟘𝟙𝟚𝟛 ①②",
    "-------- == --=-- .... !?!?  ((()))", "aaaaaaaaaaaaaa hahahahahaha ||||||||", "\x01\x02\x1f\x7f\x80\x9f",
    "<0x41><0xE4> ▁▁ ▁a <unk> <s>", "\U0001fae8\U00016d40\ua7cb \U000e0041\U0010ffff",
    "a<|end|>b <|end|>\n<|end|><|end|> c", "<tool>x</tool>  <tool> <|begin|>the dog<|end|",
    "the\t\tdog\t\t\tfox    of        the", "http://example.org/a_b?c=1&d=%20#e",
    "AbcDEF camelCaseWordsHERE McDonald's USA's", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠀀𠀁豈 Ⅻ㎏ ﷽",
)
# One name of every rule; SPM is the kind without.
SPLITS = ("default", "gpt-2", "starcoder", "falcon", "llama3", "jais-2", "minicpm5", "qwen2", "qwen35", "ufakzeka",
          "bailingmoe", "seed-coder", "laguna", "exaone-moe", "deepseek-llm", "deepseek-coder", "deepseek-v3", "spark2_5",
          "youtu", "tekken", "gpt-4o", "granite-embed-multi-97m", "tiny_aya", "afmoe", "superbpe", "kimi-k2", "chameleon",
          "poro-chat", "viking", "smollm", "command-r")
_SPECIAL = ("<|begin|>", "<|end|>", "<tool>", "\t\t", "<unk>")
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TEMPLATE = ("{% for m in messages %}{{ '<|begin|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|begin|>assistant\n' }}{% endif %}")


def letters() -> list[str]:
    """The 256 letters of a byte-level vocabulary, in the order of bytes."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def learn(words: list[list[str]], count: int) -> list[tuple[str, str]]:
    """The `count` most frequent pairs, joined one after the other; ties go to the first in the alphabet."""
    merges = []
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at:at + 2] = ["".join(best)]
                at += 1
    return merges


@cache
def _byte_merges() -> tuple[tuple[str, str], ...]:
    """Learned from the texts themselves, words not kept apart: wherever a rule cuts, it keeps something from being joined."""
    alphabet = letters()
    texts = [text for text in TEXTS if not any(word in text for word in _SPECIAL)]
    return tuple(learn([[alphabet[byte] for byte in text.encode()] for text in (*texts, *SAMPLE.splitlines())], 900))


def bpe(pre: str | None = "gpt-2", **changes) -> dict:
    """Metadata of a byte-level vocabulary of 256 letters and 900 merges, five special tokens at its end."""
    merges = _byte_merges()
    tokens = list(dict.fromkeys([*letters(), *("".join(pair) for pair in merges)]))  # two pairs may make one token
    kinds = [NORMAL] * len(tokens) + [CONTROL, CONTROL, USER, USER, UNKNOWN]
    known = len(tokens)
    return _metadata("gpt2", pre, [*tokens, *_SPECIAL], kinds, {
        "tokenizer.ggml.merges": ("array:string", [" ".join(pair) for pair in merges]),
        "tokenizer.ggml.bos_token_id": ("uint32", known), "tokenizer.ggml.eos_token_id": ("uint32", known + 1)} | changes)


@cache
def _pieces() -> tuple[list[str], list[str]]:
    """Pieces in the order in which they were learned, and letters."""
    text = "▁" + SAMPLE.replace(" ", "▁")
    words = [list(word) for word in text.replace("▁", " ▁").replace("\n", " ").split(" ") if word]
    singles = sorted({letter for word in words for letter in word})
    return ["".join(pair) for pair in learn(words, 300)], singles


def spm(**changes) -> dict:
    """Metadata of a SentencePiece-like vocabulary: <unk>, <s>, </s>, 256 bytes, letters, 300 pieces by score, three of ours."""
    pieces, singles = _pieces()
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *singles,
              "<|end|>", "<|endoftext|>", "<tool>", "unused"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(pieces) + len(singles)), CONTROL, CONTROL, USER, UNUSED]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces) + len(singles))] + [-1000.0] * 4
    return _metadata("llama", "default", tokens, kinds, {
        "tokenizer.ggml.scores": ("array:float32", scores), "tokenizer.ggml.bos_token_id": ("uint32", 1),
        "tokenizer.ggml.eos_token_id": ("uint32", 2), "tokenizer.ggml.unknown_token_id": ("uint32", 0)} | changes)


def _metadata(model: str, pre: str | None, tokens: list[str], kinds: list[int], more: dict) -> dict:
    pairs = {"general.architecture": "llama", "general.name": "small", "llama.context_length": ("uint32", 512),
             "tokenizer.ggml.model": model, "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": ("array:string", tokens),
             "tokenizer.ggml.token_type": ("array:int32", kinds), "tokenizer.chat_template": TEMPLATE} | more
    return {key: value for key, value in pairs.items() if value is not None}


def cases() -> dict[str, dict]:
    """Every vocabulary with golden data, by name."""
    found = {f"bpe {pre}": bpe(pre) for pre in SPLITS}
    found["bpe without pre"] = bpe(None)
    found["bpe begins and ends"] = bpe("gpt-2", **{"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True})
    found["bpe without some bytes"] = _without(bpe("gpt-2"), {letters()[byte] for byte in (0x20, 0x61, 0xC3, 0xF0)})
    found["spm"] = spm()
    found["spm without space"] = spm(**{"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_eos_token": True})
    found["spm without beginning"] = spm(**{"tokenizer.ggml.add_bos_token": False})
    found["spm phi-3"] = spm(**{"general.name": "Phi-3 mini"})
    return found


def _without(metadata: dict, gone: set[str]) -> dict:
    """The same vocabulary less some letters and what was made of them."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"][1], metadata["tokenizer.ggml.token_type"][1]
    kept = [place for place, token in enumerate(tokens) if kinds[place] != NORMAL or not set(token) & gone]
    merges = [line for line in metadata["tokenizer.ggml.merges"][1] if not set(line) - {" "} & gone]
    ids = {key: ("uint32", kept.index(metadata[key][1])) for key in metadata if key.endswith("_token_id")}
    return metadata | ids | {"tokenizer.ggml.tokens": ("array:string", [tokens[place] for place in kept]),
                             "tokenizer.ggml.token_type": ("array:int32", [kinds[place] for place in kept]),
                             "tokenizer.ggml.merges": ("array:string", merges)}


def put(folder: Path, metadata: dict, name: str = "vocabulary.gguf") -> Path:
    path = folder / name
    write_gguf(path, metadata, [])
    return path
