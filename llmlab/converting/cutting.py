"""How a byte-level tokenizer cuts text into words, found by trying: which of the ways that llama.cpp knows cuts as it does.

A vocabulary's file says how in regular expressions of its own, a GGUF by a name (`tokenizer.ggml.pre`). Every name's rule is
tried on a text in which no two rules cut alike.
"""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from ..errors import BadFile, LabError
from ..gguf import GGUFFile
from ..gguf.words import show, show_path
from ..vocabulary import words_of
from ..vocabulary.splits import NAMES, split_of

# Of names that mean the same the one that most models have.
_FIRST = ("llama-bpe", "qwen2", "gpt-2", "smollm", "tekken", "gpt-4o", "deepseek-llm", "deepseek-coder", "deepseek-v3",
          "falcon", "starcoder")
# Two rules as their makers have them; to llama.cpp letters beyond ASCII are upper and lower case at once.
_UPPER, _LOWER, _SHORT = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SIGN, _ENDS = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PUBLISHED = {name: rf"{_SIGN}{_UPPER}*{_LOWER}+{short}|{_SIGN}{_UPPER}+{_LOWER}*{short}|{digits}|{_ENDS}"
              for name, short, digits in (("tekken", "", r"\p{N}"), ("gpt-4o", _SHORT, r"\p{N}{1,3}"))}
PROBE = ("I'm sure they've SEEN it: WE'LL, don't, it'S, you'RE, 'tis o'clock.\n\n\n  Next line\r\n\r\n\tdef f(x):\n"
         "        return x ** 2 # done   \n \n 1 12 123 1234 12345 1234567 3.14159 10,000 x2 v1.2.3 2024г. ½² ٣٤\n"
         "Über naïve Ça été Straße ÉCOLE McDonald's USA's camelCaseWordsHERE snake_case $100 50% a/b c\\d e@f.org "
         "http://a.org/x?y=1&z=2#t ((())) [[]] {{}} <<>> !!! ??? ... ---- ==== ~~~ ``` \"quoted\" '''a''' /// ;;; :::\n"
         "Быстрая ЛИСА прыгает. Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم ١٢٣. नमस्ते दुनिया। สวัสดีชาวโลก ກຂຄ កាន់តែ "
         "敏捷的棕色狐狸123只跳过懒狗。你好，世界！こんにちは カタカナ ー々 안녕하세요 세계 ㄱㄴ ㄅㄆ！…“”—：；，、\n"
         "😀 👩\u200d👩\u200d👧 🦊🦊 \u200b\xa0\u3000 \x1c x  y   z    w     v        u                \n"
         "end\n\n the   \t  last /\n//\n!\n\n")


def cut_named(path: Path, model: dict[str, Any]) -> str:
    """The name of the rule by which the tokenizer in a tokenizer.json cuts text. Raises LabError where none does."""
    tokenizer = _tokenizer(path)
    if tokenizer.pre_tokenizer is None:
        raise LabError(f"{show_path(str(path))} does not cut text into words, and a GGUF has no name for that; convert it with "
                       "llama.cpp's convert_hf_to_gguf.py and give the GGUF")
    wanted, whole = _pieces(tokenizer.pre_tokenizer), bool(model.get("ignore_merges"))
    for name in sorted(NAMES, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name)):
        split = split_of(name)
        ways = [split.rules, *([(_PUBLISHED[name],)] if name in _PUBLISHED else [])]
        if split.whole == whole and not split.raw and any(_pieces(_cutter(rules)) == wanted for rules in ways):
            return name
    raise LabError(f"{show_path(str(path))} cuts text into words in a way that no name of tokenizer.ggml.pre means, as far as "
                   "llmlab knows; convert it with llama.cpp's convert_hf_to_gguf.py and give the GGUF")


def check_tokens(file: GGUFFile, path: Path) -> None:
    """Raises LabError where the vocabulary of a GGUF gives other tokens than the tokenizer.json that it was made of: one that
    changes letters first, say, or joins by rules that no scores express."""
    tokenizer = _tokenizer(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Beyond ASCII llama.cpp's rules for byte-level vocabularies are known to differ here and there.
    text = PROBE if file.metadata.get("tokenizer.ggml.model") == "llama" else "".join(filter(str.isascii, PROBE))
    expected = tokenizer.encode(text, add_special_tokens=False)
    found = words_of(file)(text, add_special_tokens=False)["input_ids"]
    if expected.ids != found:
        pairs = zip(expected.ids, found, expected.offsets, strict=False)
        start = next((offsets[0] for ours, theirs, offsets in pairs if ours != theirs), 0)
        raise LabError(f"{show_path(str(path))} makes other tokens of {show(text[max(start - 10, 0):start + 20])} than a GGUF "
                       "with its vocabulary would; llmlab knows no way to say in a GGUF what it does")


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:      # whatever tokenizers raises
        raise BadFile(f"{show_path(str(path))} cannot be read by tokenizers ({str(error)[:100]}); download it again") from None


def _cutter(rules: tuple[str, ...]):
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(rule), "isolated") for rule in rules),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pieces(cutter) -> list[str]:
    return [piece for piece, _ in cutter.pre_tokenize_str(PROBE)]
