"""Small safetensors folders of the families that are converted: random weights saved by transformers, vocabularies learned
here; those of SentencePiece written as it would."""

import json
import struct
from pathlib import Path

import runtime_models
import vocabularies
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
_QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NEMO = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
         r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# How the tokenizer.json of these families cut text, as published, by the name a GGUF has for it: a rule (none: GPT-2's own),
# whether every digit stands alone, whether whole words are taken.
CUTS = {"qwen2": (_QWEN, False, False), "llama-bpe": (_QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1), False, True),
        "gpt-2": (None, False, False), "smollm": (None, True, False), "tekken": (_NEMO, False, True)}


def byte_level(cut: str = "qwen2", size: int = 600) -> Tokenizer:
    """A byte-level BPE that cuts as one of CUTS, learned from a few lines of text."""
    rule, digits, whole = CUTS[cut]
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    parts = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    parts += [pre_tokenizers.Split(Regex(rule), "isolated")] if rule else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        *parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule is None)])
    tokenizer.decoder = decoders.ByteLevel()
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([*vocabularies.TEXTS, vocabularies.SAMPLE], trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (
        "<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return tokenizer


def begins(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """The same, every text begun with a token."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, tokenizer.token_to_id(token))])
    return tokenizer


def of_sentencepiece(prepend: bool = True) -> Tokenizer:
    """What transformers makes of a SentencePiece vocabulary: merges of its pieces, spaces as ▁, bytes for what has no piece."""
    data = vocabularies.spm()
    tokens, scores = data["tokenizer.ggml.tokens"][1], data["tokenizer.ggml.scores"][1]
    kinds = data["tokenizer.ggml.token_type"][1]
    pieces = {token: number for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
              if kind in (vocabularies.NORMAL, vocabularies.BYTE, vocabularies.UNKNOWN) or token in ("<s>", "</s>")}
    normal = [token for number, token in enumerate(tokens) if kinds[number] == vocabularies.NORMAL]
    merges = [(token[:cut], token[cut:]) for token in sorted(normal, key=lambda token: -scores[pieces[token]])
              for cut in range(1, len(token)) if token[:cut] in pieces and token[cut:] in pieces]
    tokenizer = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepend else spaces
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prepend else undo)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    return begins(tokenizer, "<s>")


def sentencepiece_model(data: dict) -> bytes:
    """The bytes of a tokenizer.model with the pieces of a GGUF's metadata; trained as BPE."""
    def field(number: int, value: bytes) -> bytes:
        return bytes([number << 3 | 2]) + _varint(len(value)) + value

    columns = (data[f"tokenizer.ggml.{name}"][1] for name in ("tokens", "scores", "token_type"))
    pieces = (field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score)
              + (b"" if kind == 1 else bytes([3 << 3]) + _varint(kind)) for text, score, kind in zip(*columns, strict=True))
    numbers = {3: 2, 4: len(data["tokenizer.ggml.tokens"][1]), 35: 1}      # BPE, so many pieces, bytes for what has none
    trainer = field(1, b"corpus.txt") + b"".join(_varint(number << 3) + _varint(value) for number, value in numbers.items())
    return b"".join(field(1, piece) for piece in pieces) + field(2, trainer)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


_ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CASES = runtime_models.CASES | {
    "mistral": runtime_models.Case("llama", "mistral", {"sliding_window": 4096, "head_dim": 64}),
}


def folder(path: Path, name: str, tokenizer: Tokenizer | bytes | None = None, dtype=None, shard: str = "5GB", **changes):
    """Save a model of a case with a vocabulary to a folder; returns the model, its weights as saved. `tokenizer`: of the
    tokenizers library, or the bytes of a tokenizer.model."""
    tokenizer = byte_level() if tokenizer is None else tokenizer
    count = len(vocabularies.spm()["tokenizer.ggml.tokens"][1]) if isinstance(tokenizer, bytes) else tokenizer.get_vocab_size()
    case = CASES[name]
    model = runtime_models.random_model(case, **{"vocab_size": count, "bos_token_id": 1, "eos_token_id": 2} | changes)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(path, max_shard_size=shard)
    if isinstance(tokenizer, bytes):
        (path / "tokenizer.model").write_bytes(tokenizer)
        settings = {**_ENDS, "add_bos_token": True, "add_eos_token": False,
                    "added_tokens_decoder": {str(number): {"content": text, "special": True}
                                             for number, text in enumerate(("<unk>", "<s>", "</s>"))}}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        known = _ENDS if tokenizer.token_to_id("<s>") is not None else {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **known).save_pretrained(path)
    return model.float()
