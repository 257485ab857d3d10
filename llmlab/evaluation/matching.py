"""Whether a text that a model wrote is the answer: by its number, or by its words."""

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal

# Not the 2 of H2O; thousands in groups of three (1,234 or 1 234), decimals after a point or a comma (3.14 or 3,14).
_GROUPED = r"\d{1,3}(?:[,\u00a0\u202f]\d{3})+(?!\d)(?:\.\d+)?"
_NUMBER = re.compile(rf"(?<![^\W\d_])(?<!\d[.,])(?:(?<!\w)[-+])?(?:{_GROUPED}|\d+(?:[.,]\d+)?)")


def number_of(line: str) -> Decimal | None:
    """The last number of a line; None where it has none."""
    found = _NUMBER.findall(line.replace("\u2212", "-"))
    if not found:
        return None
    text = found[-1]
    grouped = re.fullmatch(rf"[-+]?{_GROUPED}", text)
    return Decimal(re.sub(r"[,\u00a0\u202f]", "", text) if grouped else text.replace(",", "."))


def folded(text: str) -> str:
    """Without case, punctuation and more than one space; ё is е."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("ё", "е")
    kept = "".join(" " if unicodedata.category(one)[0] in "PZC" or one == "`" else one for one in text)
    return " ".join(kept.split())


def line_of(text: str, match: str) -> str:
    """The line that counts: the first that has a number, or the first that has words; "" where there is none."""
    has = (lambda line: number_of(line) is not None) if match == "number" else folded
    return next((line.strip() for line in text.splitlines() if has(line)), "")


def whole(text: str, match: str) -> bool:
    """Whether the line that counts has ended, so that nothing that follows can change it."""
    ended, _, _ = text.rpartition("\n")
    return bool(line_of(ended, match))


def matches(text: str, answers: Iterable[str], match: str) -> bool:
    """Whether a text is one of the answers. "number": the last number of its first line that has one is an answer's, or its
    first line is an answer in words. "text": its first line is an answer; case, punctuation and spaces do not count."""
    answers = list(answers)
    said = folded(line_of(text, "text"))
    if said and said in map(folded, answers):
        return True
    found = number_of(line_of(text, "number")) if match == "number" else None
    return found is not None and found in [number for one in answers if (number := number_of(one)) is not None]
