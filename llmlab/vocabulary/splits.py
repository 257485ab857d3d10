r"""Pre-tokenizers: how a byte-level BPE vocabulary cuts text into words before it merges, by `tokenizer.ggml.pre`.

A word is what no merge reaches across, so two rules that differ in one letter give other tokens. The names and rules are those
of llama.cpp (llama-vocab.cpp and unicode.cpp in llama-cpp-python 0.3.36), quirks included: `'S` is cut off as `'s` is only in
some, and letters beyond ASCII are upper and lower case at once. Each rule cuts what the one before it left, and what no rule
matches stays as it lies between two matches.
"""

import re
from dataclasses import dataclass

# Code points that Unicode 16 gave a category: tokenizers' regular expressions know them, llama.cpp's tables (15.1) do not.
_NEWER = ("0897 1b4e-1b4f 1b7f 1c89-1c8a 2427-2429 31e4-31e5 a7cb-a7cd a7da-a7dc 105c0-105f3 10d40-10d65 10d69-10d85 "
          "10d8e-10d8f 10ec2-10ec4 10efc 11380-11389 1138b 1138e 11390-113b5 113b7-113c0 113c2 113c5 113c7-113ca 113cc-113d5 "
          "113d7-113d8 113e1-113e2 116d0-116e3 11bc0-11be1 11bf0-11bf9 11f5a 13460-143fa 16100-16139 16d40-16d79 18cff "
          "1cc00-1ccf9 1cd00-1ceb3 1e5d0-1e5fa 1e5ff 1f8b2-1f8bb 1f8c0-1f8c1 1fa89 1fa8f 1fabe 1fac6 1fadc 1fadf 1fae9 "
          "1fbcb-1fbef")

_SHORT = r"'(?:[stmd]|re|ve|ll)"                                   # it's, don't, I'm, I'd, we're, I've, you'll
_SHORT_ANY = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_SPACES = r"\s+(?!\S)|\s+"                                          # the last space of several stays with the word after it
_LINES = r"\s*[\r\n]+|" + _SPACES
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"                                 # a sign or space before letters belongs to them
_MARKED = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_ASCII_SIGN = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_CHINESE_JAPANESE = r"[一-龥぀-ゟ゠-ヿ]+"
_WIDE = r"[一-龥ࠀ-一가-\x{d7ff}&&[^\s]]+"
_HAN = (r"㐀-䶿一-鿿\x{f900}-\x{faff}\x{20000}-\x{2a6df}\x{2a700}-\x{2b73f}\x{2b740}-\x{2b81f}\x{2b820}-\x{2ebef}"
        r"\x{2f800}-\x{2fa1f}")
_GREEK_CYRILLIC_LATIN = (
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386 388-38a 38c 38e-3a1 "
    "3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a "
    "1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 "
    "1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 "
    "212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d "
    "a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 "
    "104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943")

_PUNCTUATION = "21-2f 3a-7e ff01-ff0f ff1a-ff5e 2018-201f 3001-3002"


def _points(ranges: str) -> str:
    """Code points as one writes them in a [class]."""
    return "".join("-".join(rf"\x{{{point}}}" for point in ends.split("-")) for ends in ranges.split())


def _cased(letters: str, end: str = f"(?:{_SHORT_ANY})?") -> str:
    """Words as o200k cuts them, capitals before small letters; `letters` beyond a-z and A-Z are both."""
    upper, lower = f"[{letters}&&[^a-z]]", f"[{letters}&&[^A-Z]]"
    return rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{end}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{end}"


def _three_from_the_right(before: str = r"[^\p{N}]*") -> str:
    """1234567 as 1 234 567; what stands before the digits goes with the first of them (llama.cpp's afmoe rule)."""
    return rf"{before}\p{{N}}{{1,3}}(?=(?:\p{{N}}{{3}})*(?!\p{{N}}))"


_GPT2 = rf"{_SHORT}| ?\p{{L}}+| ?\p{{N}}+|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_SHORT_ANY}|{_WORD}|\p{{N}}|{_SIGNS}[\r\n]*|{_LINES}"
_DEEPSEEK3 = rf"{_ASCII_SIGN}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+"
_NOT_THESE = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CASCADE = "".join(rf"\s{{{2 ** power}}}(?!\S)|" for power in range(9, 1, -1))

# What is one rule here may go by several names, see NAMES.
_RULES: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "starcoder": (r"\p{N}", _GPT2),
    "falcon": (r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "llama3": (rf"{_SHORT_ANY}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|{_LINES}",),
    "jais-2": (rf"{_SHORT_ANY}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*|\s*[\r\n]+|{_CASCADE}\s{{1,2}}(?!\S)|\s",),
    "minicpm5": (r"\p{N}{1,3}", rf"{_SHORT_ANY}|{_WORD}|\p{{N}}+|{_SIGNS}[\r\n]*|{_LINES}"),
    "qwen2": (_QWEN2,),
    "qwen35": (rf"{_SHORT_ANY}|{_MARKED}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}",),
    "ufakzeka": (rf"{_WORD}|\p{{N}}|{_SIGNS}[\r\n]*|{_LINES}",),
    "bailingmoe": (rf"{_SHORT_ANY}|{_WORD}|\p{{N}}|{_SIGNS}[\r\n]*|\s*[\r\n]|{_SPACES}",),
    "seed-coder": (rf"{_SHORT_ANY}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}",),
    "laguna": (r"[^\n]+|\n+", _QWEN2),
    "exaone-moe": (rf"{_SHORT_ANY}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|{_SIGNS}[\r\n/]?"
                   rf"|\s*[\r\n]|{_SPACES}",),
    "deepseek-llm": (r"[\r\n]", rf"\s?[{_points(_GREEK_CYRILLIC_LATIN)}]+", rf"\s?[{_points(_PUNCTUATION)}]+", r"\s+\z", _WIDE,
                     r"\p{N}+"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _WIDE, r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", _CHINESE_JAPANESE, rf"{_DEEPSEEK3}[\r\n]*|{_LINES}"),
    "spark2_5": (r"\p{N}{1,3}", _CHINESE_JAPANESE, rf"{_DEEPSEEK3}|[\r\n]|{_SPACES}", r"\p{N}"),
    "youtu": (r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _CHINESE_JAPANESE,
              rf"{_MARKED}(?:{_SHORT_ANY})?|\p{{N}}|{_SIGNS}[\r\n/]*|{_LINES}"),
    "tekken": (_cased(r"\p{L}", "") + rf"|\p{{N}}|{_SIGNS}[\r\n/]*|{_LINES}",),
    "gpt-4o": (_cased(r"\p{L}") + rf"|\p{{N}}{{1,3}}|{_SIGNS}[\r\n/]*|{_LINES}",),
    "granite-embed-multi-97m": (_cased(r"\p{L}\p{M}") + rf"|\p{{N}}{{1,3}}|{_SIGNS}[\r\n/]*|{_LINES}",),
    "tiny_aya": (_three_from_the_right(), rf"{_MARKED}(?:{_SHORT_ANY})?|\p{{N}}{{1,3}}|{_SIGNS}[\r\n/]*|{_LINES}"),
    "afmoe": (_three_from_the_right(), r"[一-鿿㐀-䶿豈-\x{faff}぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-\x{d7af}ᄀ-ᇿ]+",
              rf"{_DEEPSEEK3}[\r\n]*|{_LINES}"),
    "superbpe": (r"\p{N}+", r"[0-9]{1,3}(?=(?:[0-9]{3})*(?![0-9]))"),
    "kimi-k2": (rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+(?:{_SHORT_ANY})?|\p{{N}}{{1,3}}|{_SIGNS}[\r\n]*"
                rf"|{_LINES}",),
    "chameleon": ("<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  ", r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", _GPT2),
    "poro-chat": (_NOT_THESE,),
    "viking": (_NOT_THESE, r"\p{N}"),
    "gemma4": (r"[^\n]+|\n+",),
}

# Rule -> the values of tokenizer.ggml.pre that mean it.
_NAMES = {
    "default": "default",
    "gpt-2": "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code "
             "roberta-bpe mpt olmo jais exaone4 trillion granite-docling",
    "starcoder": "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
    "falcon": "falcon",
    "llama3": "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe chatglm-bpe glm4 "
              "glm5",
    "jais-2": "jais-2",
    "minicpm5": "minicpm5",
    "qwen2": "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open megrez grok-2",
    "qwen35": "qwen35",
    "ufakzeka": "ufakzeka",
    "bailingmoe": "bailingmoe bailingmoe2 llada-moe",
    "seed-coder": "seed-coder",
    "laguna": "laguna",
    "exaone-moe": "exaone-moe",
    "deepseek-llm": "deepseek-llm",
    "deepseek-coder": "deepseek-coder",
    "deepseek-v3": "deepseek-v3 hunyuan-dense hy_v4 joyai-llm",
    "spark2_5": "spark2_5",
    "youtu": "youtu",
    "tekken": "tekken",
    "gpt-4o": "gpt-4o llama4 kanana2 talkie minimax-m2",
    "granite-embed-multi-97m": "granite-embed-multi-97m",
    "tiny_aya": "tiny_aya cohere2moe",
    "afmoe": "afmoe",
    "superbpe": "superbpe",
    "kimi-k2": "kimi-k2",
    "chameleon": "chameleon",
    "poro-chat": "poro-chat bloom gpt3-finnish",
    "viking": "viking",
    "gemma4": "gemma4 granite-embed-multi-311m sarvam-moe",
}
# A word that is a token as it stands is not merged up from its letters.
_WHOLE = set("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano minicpm5 youtu glm4 glm5 tekken "
             "granite-embed-multi-97m".split())
_BEGINS = set("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken chameleon gemma4 "
              "granite-embed-multi-311m".split())


@dataclass(frozen=True)
class Split:
    """How text is cut: `rules` one after the other; `whole`: a word that is a token is taken as it is; `bos`: a text begins
    with the token of beginnings unless the file says otherwise; `raw`: pieces are UTF-8 with ▁ for a space, not byte-level
    letters."""

    rules: tuple[str, ...]
    whole: bool
    bos: bool
    raw: bool


NAMES = {name: rule for rule, names in _NAMES.items() for name in names.split()}


def split_of(name: str) -> Split | None:
    """The cut that a value of tokenizer.ggml.pre means; None for one that is not known."""
    if name not in NAMES:
        return None
    rule = NAMES[name]
    return Split(tuple(map(_as_known_then, _RULES[rule])), name in _WHOLE, name in _BEGINS, rule == "gemma4")


def _as_known_then(rule: str) -> str:
    newer = _points(_NEWER)
    return re.sub(r"\\p\{\w+\}", lambda found: f"[{found[0]}&&[^{newer}]]", rule)
