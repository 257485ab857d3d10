"""The vocabulary of a folder as a GGUF's `tokenizer.*` keys: tokens, kinds, scores or merges, special ids, chat template.

Three kinds are found: SentencePiece's tokenizer.model; a tokenizer.json with byte-level BPE, whose way to cut a text is found
by trying (cutting.py); and one that was made of a SentencePiece model, whose scores its merges tell.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import BadFile, LabError
from ..gguf.words import show, show_path
from .cutting import cut_named
from .pieces import BYTE, CONTROL, NORMAL, UNUSED, USER, Piece, read_pieces
from .tensor_files import read_json

_KEY = "tokenizer.ggml."
_SPACE = "▁"
_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "sep": "seperator_token_id",
        "pad": "padding_token_id", "cls": "cls_token_id", "mask": "mask_token_id"}
_ADDED_SCORE, _NO_SCORE = -1000.0, -10000.0
_NO_SPACE_FIRST = ("gemma", "gemma2", "gemma3", "gemma3_text")


def words(folder: Path, config: Mapping[str, Any], count: int, shown: str) -> dict[str, Any]:
    """The keys, as `write_gguf` takes them; `count`: rows of the embedding, as many as there are to be tokens.

    Raises BadFile where there is no tokenizer or it cannot be read, LabError for one of another kind.
    """
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    rich = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    where = show_path(str(folder / "tokenizer.json"))
    spaced = settings.get("add_prefix_space")
    if (folder / "tokenizer.model").is_file():
        pieces = _added(_sized(read_pieces(folder / "tokenizer.model"), count), folder, settings, rich, shown)
        found = _scored(pieces)
    elif not rich:
        raise BadFile(f"{shown} has neither a tokenizer.json nor a tokenizer.model; download one into it, or save it there "
                      "with transformers: tokenizer.save_pretrained(folder)")
    else:
        model = _model(rich, where)
        vocabulary, merges = _vocabulary(model, where), _merges(model, where)
        if model.get("byte_fallback"):
            pieces = _added(_sized(_by_merges(vocabulary, merges), count), folder, settings, rich, shown)
            found = _scored(pieces)
            spaced = _prepends(rich) if spaced is None else spaced
        else:
            pieces = _added(_sized(_plain(vocabulary), count), folder, settings, rich, shown)
            found = {_KEY + "model": "gpt2", _KEY + "pre": cut_named(folder / "tokenizer.json", model),
                     **_tokens(pieces), _KEY + "merges": ("array:string", [_line(pair) for pair in merges])}
    if config.get("model_type") in _NO_SPACE_FIRST and found[_KEY + "model"] == "llama":
        spaced = False
    if isinstance(spaced, bool):
        found[_KEY + "add_space_prefix"] = spaced
    return found | _special(config, settings, rich, len(pieces)) | _templates(folder, settings)


# ---- tokens ---------------------------------------------------------------------------------------------------

def _model(rich: Mapping[str, Any], where: str) -> dict[str, Any]:
    model = rich.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise LabError(f"{where} is a vocabulary of the kind {show(str(kind))}, which no model that llmlab converts has; "
                       "convert it with llama.cpp's convert_hf_to_gguf.py and give the GGUF")
    return model


def _vocabulary(model: Mapping[str, Any], where: str) -> dict[str, int]:
    found = model.get("vocab")
    if not isinstance(found, dict) or not found or not all(type(i) is int and i >= 0 for i in found.values()):
        raise BadFile(f"{where} has no vocabulary; download it again")
    return found


def _merges(model: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    found = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in model.get("merges") or ()]
    if any(len(one) != 2 or not all(isinstance(part, str) for part in one) for one in found):
        raise BadFile(f"{where} has a merge that is not two pieces; download it again")
    return found


def _line(pair: tuple[str, str]) -> str:
    """Two pieces in one line; a space inside a piece is written as byte-level letters write it."""
    return " ".join(part.replace(" ", "Ġ") for part in pair)


def _plain(vocabulary: Mapping[str, int]) -> list[Piece]:
    return _placed({number: Piece(text, 0.0, NORMAL) for text, number in vocabulary.items()})


def _by_merges(vocabulary: Mapping[str, int], merges: list[tuple[str, str]]) -> list[Piece]:
    """Pieces with scores that join them in the order of the merges: SentencePiece joins the pair whose whole scores highest."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    last, found = len(ranks), {}
    for text, number in vocabulary.items():
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            found[number] = Piece(text, 0.0, BYTE)
        else:
            found[number] = Piece(text, -float(ranks.get(text, last)), NORMAL)
    return _placed(found)


def _placed(found: Mapping[int, Piece]) -> list[Piece]:
    return [found.get(number) or Piece(f"[PAD{number}]", _NO_SCORE, UNUSED) for number in range(max(found) + 1)]


def _sized(pieces: list[Piece], count: int) -> list[Piece]:
    """As many as the embedding has rows; those without a token get a name that no text has."""
    return pieces[:count] + [Piece(f"[PAD{number}]", _NO_SCORE, UNUSED) for number in range(len(pieces), count)]


def _added(pieces: list[Piece], folder: Path, settings: Mapping[str, Any], rich: Mapping[str, Any], shown: str) -> list[Piece]:
    """With the tokens that were added to the vocabulary, by whichever file names them."""
    pieces = list(pieces)
    for number, text, special in _named(folder, settings, rich):
        if not 0 <= number < len(pieces):
            raise BadFile(f"{shown}: token {show(text)} is number {number}, and the embedding has {len(pieces)} rows; the "
                          "tokenizer is of another model")
        kind = CONTROL if special or _looks_special(text) else USER
        pieces[number] = Piece(text if kind != USER else text.replace(_SPACE, " "), _ADDED_SCORE, kind)
    seen: dict[str, int] = {}
    for number, piece in enumerate(pieces):      # one token in two places cannot be found by its text
        if seen.setdefault(piece.text, number) != number:
            pieces[number] = Piece(f"[PAD{number}]", _NO_SCORE, UNUSED)
    return pieces


def _named(folder: Path, settings: Mapping[str, Any], rich: Mapping[str, Any]) -> Iterable[tuple[int, str, bool]]:
    """(number, text, whether special) of the added tokens."""
    path = folder / "added_tokens.json"
    found = {number: (text, False) for text, number in (read_json(path) if path.is_file() else {}).items()}
    try:
        found |= {one["id"]: (one["content"], bool(one.get("special"))) for one in rich.get("added_tokens") or ()}
        found |= {int(number): (one["content"], bool(one.get("special")))
                  for number, one in (settings.get("added_tokens_decoder") or {}).items()}
        return [(int(number), str(text), special) for number, (text, special) in sorted(found.items())]
    except (TypeError, KeyError, ValueError, AttributeError):
        raise BadFile(f"{show_path(str(folder))}: the added tokens of its tokenizer cannot be read; download it "
                      "again") from None


def _looks_special(text: str) -> bool:
    """Some makers do not say of their control tokens that they are special (Command-R, DeepSeek Coder, Gemma 1 and 2)."""
    return (text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or text.startswith("<|") and text.endswith("|>")
            or text.startswith("<｜") and text.endswith("｜>") or text.startswith("<unused") and text.endswith(">"))


def _tokens(pieces: list[Piece]) -> dict[str, Any]:
    return {_KEY + "tokens": ("array:string", [piece.text for piece in pieces]),
            _KEY + "token_type": ("array:int32", [piece.kind for piece in pieces])}


def _scored(pieces: list[Piece]) -> dict[str, Any]:
    tokens = _tokens(pieces)
    return {_KEY + "model": "llama", _KEY + "pre": "default", _KEY + "tokens": tokens.pop(_KEY + "tokens"),
            _KEY + "scores": ("array:float32", [piece.score for piece in pieces]), **tokens}


def _prepends(rich: Mapping[str, Any]) -> bool:
    """Whether a space is put before every text."""
    parts = json.dumps([rich.get("normalizer"), rich.get("pre_tokenizer")])
    return '"Prepend"' in parts or '"prepend_scheme": "first"' in parts or '"prepend_scheme": "always"' in parts or (
        '"Metaspace"' in parts and '"add_prefix_space": true' in parts)


# ---- special tokens, chat templates ---------------------------------------------------------------------------

def _special(config: Mapping[str, Any], settings: Mapping[str, Any], rich: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Ids by the tokenizer's settings, else by config.json; what is put before and after a text by the post-processor."""
    numbers = {one.get("content"): one.get("id") for one in rich.get("added_tokens") or () if isinstance(one, dict)}
    numbers |= {one.get("content"): int(number) for number, one in (settings.get("added_tokens_decoder") or {}).items()}
    texts = {name: _text(settings.get(f"{name}_token")) for name in _IDS}
    adds = _ends(rich, texts)
    for name in ("bos", "eos"):
        if isinstance(settings.get(f"add_{name}_token"), bool):
            adds.setdefault(name, settings[f"add_{name}_token"])
    if rich:
        adds.setdefault("bos", False)      # said, for llama.cpp would begin some vocabularies' texts with it unasked
    ids = {}
    inner = config.get("text_config")
    for name, key in _IDS.items():
        for number in (numbers.get(texts[name]) if texts[name] else None, config.get(f"{name}_token_id"),
                       inner.get(f"{name}_token_id") if isinstance(inner, dict) else None):
            if type(number) is int and 0 <= number < count:
                ids[_KEY + key] = ("uint32", number)
                break
    return ids | {f"{_KEY}add_{name}_token": adds[name] for name in ("bos", "eos") if name in adds}


def _text(token: Any) -> str | None:
    """A token in the settings: its text, or an object that has it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _ends(rich: Mapping[str, Any], texts: dict[str, str | None]) -> dict[str, bool]:
    """Whether the post-processor puts bos before and eos after a text; `texts` learns of one that the settings do not name."""
    processor = rich.get("post_processor")
    found: dict[str, bool] = {}
    for one in (processor.get("processors") or [processor]) if isinstance(processor, dict) else ():
        if one.get("type") == "ByteLevel":
            found = {"bos": False, "eos": False} | found
        elif one.get("type") == "TemplateProcessing" and len(single := one.get("single") or []) > 1:
            for name, part in (("bos", single[0]), ("eos", single[-1])):
                text = (part.get("SpecialToken") or {}).get("id")
                if text:
                    texts[name] = texts[name] or text
                    found[name] = text == texts[name]
    return found


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template, and others by their names."""
    given = settings.get("chat_template")
    if given is None:
        given = _template_files(folder)
    if isinstance(given, str):
        return {"tokenizer.chat_template": given}
    named = {"".join(c if c.isascii() and c.isalnum() else "_" for c in str(one.get("name", ""))): one.get("template")
             for one in given or () if isinstance(one, dict) and isinstance(one.get("template"), str)}
    others = [name for name in named if name and name != "default"]
    found = {"tokenizer.chat_templates": ("array:string", others)} if others else {}
    found |= {f"tokenizer.chat_template.{name}": named[name] for name in others}
    return found | ({"tokenizer.chat_template": named["default"]} if "default" in named else {})


def _template_files(folder: Path) -> str | list[dict[str, str]] | None:
    main, more = folder / "chat_template.jinja", sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if main.is_file():
        text = main.read_text("utf-8")
        return [{"name": "default", "template": text}, *({"name": path.stem, "template": path.read_text("utf-8")}
                                                         for path in more)] if more else text
    if (folder / "chat_template.json").is_file():
        return read_json(folder / "chat_template.json").get("chat_template")
    return None
