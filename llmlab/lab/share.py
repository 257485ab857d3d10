"""A configuration as a short string that people can read, paste and keep.

    llmlab:llama-3-8b@rtx-3060-12gb?quant=Q4_K_M&context=16384&kv=q8_0

model@card?settings. The model is an id of the catalogue, `file:NAME` (a file that llmlab finds on the reader's own
computer by its name) or `hub:OWNER/REPO`; the card an id, several ids with commas, `this-machine` or `none`. Quant and
context are always there; of the other settings those that differ from OMITTED, which never changes: a string means the
same when a default of `fit` is another. Reading one opens no path.
"""

import re
from pathlib import Path
from urllib.parse import quote, unquote

from .. import catalog
from ..errors import LabError
from ..fitting import Report
from ..sources import find_local
from ..units import format_bytes, parse_bytes

OMITTED = {
    "cards": 1, "kv": "f16", "engine": "llama.cpp", "gpu_layers": "auto", "n_cpu_moe": 0, "split": None, "host": None,
    "sequences": 1, "batch": 2048, "ubatch": 512, "flash_attention": True, "importance": False, "swa_full": False,
    "unified": False, "display": None, "utilization": None, "projector": None, "draft": None, "draft_quant": None, "mtp": False,
}
LONGEST = 500
_START, _THIS_MACHINE = "llmlab:", "this machine"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_FILE = re.compile(r"[A-Za-z0-9][^/\\\x00-\x1f\x7f]{0,199}")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,99}/[A-Za-z0-9][\w.-]{0,99}(:[A-Za-z0-9_]{1,30})?", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+ -]{0,60}")


# ---- writing ------------------------------------------------------------------------------------------------

def write(settings: dict, report: Report) -> str:
    """The string of these settings, of which `report` came. Raises LabError where it would not bring them back."""
    spec = report.spec
    named = {"quant": None if report.settings.quant == spec.stored else report.settings.quant,
             "context": report.settings.context}
    other = {name: value for name, value in settings.items() if name not in ("model", "card", *named)}
    named |= {name: value for name, value in other.items() if value != OMITTED.get(name)}
    said = "&".join(f"{name}={_said(name, value)}" for name, value in named.items() if value is not None)
    text = f"{_START}{_model_said(spec, settings['model'])}@{_card_said(settings['card'])}{f'?{said}' * bool(said)}"
    if len(text) > LONGEST:
        raise LabError(f"this configuration takes {len(text)} characters to say; a shared one has {LONGEST} at most")
    return text


def _model_said(spec, asked) -> str:
    if spec.source == "catalogue":
        return spec.name
    if spec.path and _FILE.fullmatch(Path(spec.path).name):
        return f"file:{quote(Path(spec.path).name)}"
    if spec.source == "hub" and isinstance(asked, str) and _HUB.fullmatch(asked):
        return f"hub:{asked}"
    raise LabError(f"{spec.title[:60]} was given as an object, which a string cannot carry; give a name of the catalogue")


def _card_said(card) -> str:
    if card is None:
        return "none"
    if card == _THIS_MACHINE:
        return "this-machine"
    cards = card if isinstance(card, (list, tuple)) else [card]
    if not cards or any(isinstance(c, catalog.Gpu) and c.free is not None for c in cards):
        raise LabError("a live card cannot be shared; choose 'this machine', or the card's name")
    return ",".join(catalog.gpu(c).id for c in cards)


def _said(name: str, value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)) and value:
        return ",".join(_said(name, one) for one in value)
    if isinstance(value, (int, float)):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if name in ("host", "projector"):
        value = str(value).replace(" ", "")
    if not (isinstance(value, str) and _WORD.fullmatch(value)):
        raise LabError(f"{name} is {value!r:.60}, which a shared configuration cannot carry")
    return quote(value)


# ---- reading ------------------------------------------------------------------------------------------------

def read(text: str) -> dict:
    """The settings of a shared string, by name, for FitState. Raises LabError in one line for anything that is none."""
    text = text.strip() if isinstance(text, str) else ""
    if not text.lower().startswith(_START) or len(text) > LONGEST:
        raise LabError(f"{_short(text)} is no shared configuration; one looks like "
                       f"{_START}llama-3-8b@rtx-3060-12gb?context=8192")
    place, _, query = text[len(_START):].partition("?")
    model, at, card = place.partition("@")
    if not at:
        raise LabError(f"{_short(text)} names no card; write model@card, or model@none")
    settings = {"model": _model(unquote(model)), "card": _card(unquote(card))}
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        if name in settings:
            raise LabError(f"{_short(name)} stands there twice")
        if name not in OMITTED and name not in ("quant", "context"):
            raise LabError(f"{_short(name)} is no setting that this llmlab knows; a newer one may have written it")
        settings[name] = _value(name, unquote(value))
    return OMITTED | settings


def _model(text: str) -> str:
    kind, _, name = text.partition(":")
    if kind == "file" and _FILE.fullmatch(name):
        if found := find_local(name):
            return str(found.path)
        raise LabError(f"no file called {_short(name)} is among the models on this computer; llmlab.fetch brings one, or give "
                       "a model of the catalogue")
    if kind == "hub" and _HUB.fullmatch(name) and not Path(name).exists():
        return name
    if not _ID.fullmatch(text):
        raise LabError(f"{_short(text)} is no model that a shared configuration can name; llmlab.models() lists what is known")
    return catalog.entry(text).id


def _card(text: str):
    if text in ("none", "this-machine"):
        return {"none": None, "this-machine": _THIS_MACHINE}[text]
    cards = [catalog.gpu(name).id for name in text.split(",")]
    return cards if len(cards) > 1 else cards[0]


def _value(name: str, text: str):
    """yes and no, numbers, words; several with commas."""
    if "," in text:
        return tuple(_value(name, part) for part in text.split(","))
    if text in ("yes", "no"):
        return text == "yes"
    if re.fullmatch(r"\d{1,9}", text, re.ASCII):
        return int(text)
    if re.fullmatch(r"\d{1,9}\.\d{1,9}", text, re.ASCII):
        return float(text)
    if not _WORD.fullmatch(text):
        raise LabError(f"{name} is {_short(text)}, which no shared configuration says")
    if name == "draft":                      # a model's name may be a path, and so may a projector's
        return catalog.entry(text).id
    if name == "projector":
        return format_bytes(parse_bytes(text), 9)
    return text


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
