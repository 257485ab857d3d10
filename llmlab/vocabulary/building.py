"""From a vocabulary to a tokenizer of the `tokenizers` library that cuts text token for token as llama.cpp does."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import LabError
from ..gguf.words import show, show_path
from .reading import CONTROL, PREFIX, UNKNOWN, USER, Vocabulary
from .splits import NAMES, Split, split_of

SPACE = "▁"
KNOWN = ("gpt2", "gemma4", "llama")
# Hundreds of times what published vocabularies have; a hostile one could keep a processor busy for days.
_MOST_WORK, _MOST_SPECIAL = 3 * 10**9, 8_000_000  # letters of a token squared, summed (Gemma: 10**7); letters of special tokens


def build(vocabulary: Vocabulary) -> tuple[Tokenizer, tuple[str, ...]]:
    """A tokenizer and notes on it. Raises LabError for a vocabulary of a kind that is not known, or that contradicts itself."""
    if vocabulary.model in ("gpt2", "gemma4"):
        tokenizer, notes = _bpe(vocabulary)
    elif vocabulary.model == "llama":
        tokenizer, notes = _spm(vocabulary), ()
    else:
        raise LabError(f"{show_path(vocabulary.file)}: {PREFIX}model is {show(vocabulary.model)}, a kind of vocabulary llmlab "
                       f"does not know; it knows {', '.join(KNOWN)}")
    tokenizer.add_tokens(_added(vocabulary))
    tokenizer.post_processor = _ends(vocabulary)
    return tokenizer, notes


def adds_bos(vocabulary: Vocabulary) -> bool:
    """Whether a text begins with the token of beginnings."""
    if vocabulary.model == "gemma4" or vocabulary.pre in ("gemma4", "granite-embed-multi-311m"):
        return True
    split = split_of(vocabulary.pre) if vocabulary.model == "gpt2" else None
    return vocabulary.flags.get("add_bos_token", vocabulary.model == "llama" or split is not None and split.bos)


def adds_space(vocabulary: Vocabulary) -> bool:
    """Whether a space is put before a text, and taken away from what is decoded."""
    return vocabulary.flags.get("add_space_prefix", vocabulary.model == "llama")


def _bpe(vocabulary: Vocabulary) -> tuple[Tokenizer, tuple[str, ...]]:
    split, notes = _split(vocabulary)
    if vocabulary.merges is None:
        raise vocabulary.fail(PREFIX + "merges", "is missing")
    index = vocabulary.index
    try:
        model = models.BPE(index, vocabulary.merges, ignore_merges=split.whole, byte_fallback=split.raw)
    except Exception as error:  # whatever tokenizers raises; most likely a merge of pieces that are no tokens
        raise vocabulary.fail(PREFIX + "merges", _bad_merge(vocabulary) or f"cannot be used ({error})") from None
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in split.rules]
    if split.raw:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        letters = pre_tokenizers.ByteLevel.alphabet()
        cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        # A byte that has no token is lost, and nothing is joined across it; the model alone would join across.
        if missing := "".join(rf"\x{{{ord(letter):x}}}" for letter in letters if letter not in index):
            cuts.append(pre_tokenizers.Split(Regex(f"[{missing}]"), "removed"))
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    return tokenizer, notes


def _bad_merge(vocabulary: Vocabulary) -> str:
    for left, right in vocabulary.merges:
        missing = [piece for piece in (left, right, left + right) if piece not in vocabulary.index]
        if missing:
            return f"joins {show(left)} and {show(right)}, and {show(missing[0])} is not in {PREFIX}tokens"
    return ""


def _split(vocabulary: Vocabulary) -> tuple[Split, tuple[str, ...]]:
    name = "gemma4" if vocabulary.model == "gemma4" else vocabulary.pre
    if not name:
        return split_of("default"), (f"the file has no {PREFIX}pre: text is cut by llama.cpp's default, which may not be how "
                                     "this model learned it",)
    split = split_of(name)
    if split is None:
        import difflib

        near = difflib.get_close_matches(name, NAMES, 1)
        nearest = f" (the nearest it knows is {near[0]})" if near else ""
        raise LabError(f"{show_path(vocabulary.file)}: {PREFIX}pre is {show(name)}, a way to cut text into words that llmlab "
                       f"does not know{nearest}; it knows {', '.join(sorted(NAMES))}")
    return split, ()


def _spm(vocabulary: Vocabulary) -> Tokenizer:
    if vocabulary.scores is None:
        raise vocabulary.fail(PREFIX + "scores", "is missing")
    if sum(len(token) ** 2 for token in vocabulary.tokens) > _MOST_WORK:
        raise vocabulary.fail(PREFIX + "tokens", f"has tokens of {max(map(len, vocabulary.tokens))} letters, beyond any")
    unknown = vocabulary.tokens[vocabulary.ids["unk"]] if "unk" in vocabulary.ids else None
    tokenizer = Tokenizer(models.BPE(vocabulary.index, _pairs(vocabulary), unk_token=unknown, byte_fallback=True))
    spaces = normalizers.Replace(" ", SPACE)
    undo = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if adds_space(vocabulary):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def _pairs(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Merges that do what SentencePiece does with scores: of all neighbours whose joined text is a token, those with the
    highest score are joined first. So each way to cut a token into two tokens is a merge, in the order of their scores."""
    index, tokens = vocabulary.index, vocabulary.tokens
    in_order = [tokens[number] for number in (-vocabulary.scores).argsort(kind="stable").tolist()]
    return [(token[:cut], token[cut:]) for token in in_order for cut in range(1, len(token))
            if token[:cut] in index and token[cut:] in index]


def _added(vocabulary: Vocabulary) -> list[AddedToken]:
    """Tokens that are found in a text before it is cut: the user-defined ones always, the others (special) when asked for."""
    name = vocabulary.name.lower()
    # What Microsoft's tokenizer.json says of these tokens and GGUF has no key for; llama.cpp goes by the name, too. It takes
    # away ASCII's white space after them, we any, as the model's own tokenizer.
    strip = "phi-3" in name or "phi3" in name
    keep = {"<unk>", "<s>", "<|endoftext|>"}
    found, letters = [], 0
    for kind in (UNKNOWN, CONTROL, USER):
        for number in (vocabulary.kinds == kind).nonzero()[0].tolist():
            text = vocabulary.tokens[number]
            letters += len(text)
            if letters > _MOST_SPECIAL:
                raise vocabulary.fail(PREFIX + "token_type", f"makes special tokens of {_MOST_SPECIAL} letters, beyond any")
            found.append(AddedToken(text, special=kind != USER, normalized=False, rstrip=strip and text not in keep))
    return found


def _ends(vocabulary: Vocabulary) -> processors.TemplateProcessing:
    """What is put before and after a text where special tokens are asked for."""
    before, after, named = "", "", []
    for name, wanted in (("bos", adds_bos(vocabulary)), ("eos", vocabulary.flags.get("add_eos_token", False))):
        if wanted and name in vocabulary.ids:
            number = vocabulary.ids[name]
            named.append({"id": name, "ids": [number], "tokens": [vocabulary.tokens[number]]})
            before, after = ("bos ", after) if name == "bos" else (before, " eos")
    # Of a pair the second text has its own beginning, as llama.cpp's rerankers join them.
    return processors.TemplateProcessing(single=f"{before}$A{after}", pair=f"{before}$A{after} {before}$B:1{after}",
                                         special_tokens=named)
