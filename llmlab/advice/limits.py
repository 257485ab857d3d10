"""Limits that the catalogue answers: languages a model was made for, and its licence."""

import re
from collections.abc import Iterable

from .. import catalog
from ..catalog import Entry
from ..errors import LabError

LANGUAGES = {
    "ar": "arabic", "bn": "bengali", "cs": "czech", "de": "german", "el": "greek", "en": "english", "es": "spanish",
    "fa": "persian", "fi": "finnish", "fr": "french", "he": "hebrew", "hi": "hindi", "hu": "hungarian", "id": "indonesian",
    "it": "italian", "ja": "japanese", "ko": "korean", "nl": "dutch", "pl": "polish", "pt": "portuguese", "ro": "romanian",
    "ru": "russian", "sv": "swedish", "th": "thai", "tl": "tagalog", "tr": "turkish", "uk": "ukrainian", "vi": "vietnamese",
    "zh": "chinese"}
MANY = 20            # a model "of 29+ languages" is taken to speak any of those above; `unnamed` says which are only counted
OPEN = ("Apache-2.0", "MIT")           # licence="open": what the Open Source Initiative approved


def languages(asked: str | Iterable[str] | None) -> tuple[str, ...]:
    """Codes of languages from codes or English names: "ru", "Russian", "en,ru", ["en", "Russian"]. Raises LabError."""
    if asked is None:
        return ()
    given = asked.split(",") if isinstance(asked, str) else list(asked) if isinstance(asked, Iterable) else [asked]
    names = {name: code for code, name in LANGUAGES.items()}
    found = []
    for one in given:
        word = one.strip().casefold() if isinstance(one, str) else one
        if word not in LANGUAGES and word not in names:
            raise catalog.unknown("language", one, [*names, *LANGUAGES], f"llmlab.best: {', '.join(LANGUAGES)};")
        found.append(names.get(word, word))
    return tuple(dict.fromkeys(found))


def speaks(entry: Entry, codes: Iterable[str]) -> bool | None:
    """Whether a model's maker names all these languages; None where only how many there are is said, and they are many."""
    if set(codes) <= _named(entry):
        return True
    counted = [int(number) for number in re.findall(r"(\d+)\+? languages", entry.languages.casefold())]
    return None if counted and max(counted) >= MANY else False


def unnamed(entry: Entry, codes: Iterable[str]) -> str:
    """What is to be said of a model of which only how many languages is told: "Finnish taken to be among its 29+ languages"."""
    missing = [LANGUAGES[code].capitalize() for code in codes if code not in _named(entry)]
    counted = re.search(r"\d+\+? languages", entry.languages)
    return f"{' and '.join(missing)} taken to be among its {counted[0]}" if missing and counted else ""


def _named(entry: Entry) -> set[str]:
    """The codes its maker names."""
    said = entry.languages.casefold()
    return {code for code, name in LANGUAGES.items() if name in said or re.search(rf"\b{code}\b", said)}


def licences(asked: str | Iterable[str] | None) -> tuple[str, ...]:
    """Licences of the catalogue by how they begin ("apache", ["MIT", "Llama"]), or the open ones by "open"; (): any."""
    if asked is None:
        return ()
    given = asked.split(",") if isinstance(asked, str) else list(asked) if isinstance(asked, Iterable) else [asked]
    known = sorted({entry.license for entry in catalog.entries().values()})
    found: list[str] = []
    for one in given:
        if not isinstance(one, str) or not one.strip():
            raise LabError(f"license is {one!r:.40}; give how one begins, like 'Apache', or 'open' for {' and '.join(OPEN)}")
        word = one.strip().casefold()
        chosen = OPEN if word == "open" else [name for name in known if name.casefold().startswith(word)]
        if not chosen:
            raise catalog.unknown("licence", one, [*known, "open"], "llmlab.models()")
        found += chosen
    return tuple(dict.fromkeys(found))
