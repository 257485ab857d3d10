"""The claims as data/claims.json states them: parts that a number decides, and the verdict that people agreed on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from ..errors import LabError
from ..places import folder
from ..units import parse_bytes

VERDICTS = ("true", "true, with a condition", "half true", "false", "not shown here")
BOUNDS = ("at_least", "at_most", "is")


@dataclass(frozen=True)
class Part:
    """One thing a claim says, decided by one number against bounds: a number, a size like "8 GiB", a word for `is_`. `number`
    is None where nobody has it.

    `beyond`: what the claim does not say and readers take from it; where only such parts fail, that is the claim's condition.
    `holds`: what people saw when they wrote the claim's sentence.
    """

    says: str
    number: str | None
    holds: bool | None
    at_least: float | None = None
    at_most: float | None = None
    is_: str | None = None
    beyond: bool = False

    def decided(self, value: float | str) -> bool:
        """Whether the number keeps within the bounds."""
        if self.is_ is not None:
            return value == self.is_
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    bound: str = ""         # "at most 8 GiB", as the file has it


@dataclass(frozen=True)
class Claim:
    """A claim in our words. `numbers`: how each comes about, by name; `answer`: the sentence, with {names} of numbers in it;
    `verdict`: the reviewed one, which `claims()` judges anew."""

    id: str
    claim: str
    origin: str
    notebook: str
    verdict: str
    parts: tuple[Part, ...]
    numbers: Mapping[str, Mapping] = field(hash=False)
    answer: str


@cache
def stated() -> tuple[Claim, ...]:
    """Every claim, in the order of the file. Raises LabError, with the claim's id, where one is not written as it should be."""
    said = json.loads((folder("data") / "claims.json").read_text(encoding="utf-8"))
    return tuple(_claim(one, said["origin"]) for one in said["claims"])


def _claim(one: dict, origin: str) -> Claim:
    try:
        parts = tuple(_part(dict(part)) for part in one["parts"])
        claim = Claim(one["id"], one["claim"], one.get("origin", origin), one["notebook"], one["verdict"], parts,
                      one["numbers"], one["answer"])
    except (KeyError, TypeError) as error:
        raise LabError(f"data/claims.json: {one.get('id', '?')}: {error}") from None
    if claim.verdict not in VERDICTS:
        raise LabError(f"data/claims.json: {claim.id}: {claim.verdict!r} is none of {', '.join(VERDICTS)}")
    return claim


def _part(part: dict) -> Part:
    bounds = {name: part.pop(name) for name in BOUNDS if name in part}
    if not bounds and part["number"] is not None:
        raise KeyError(f"{part['says']!r} has no bound")
    text = " and ".join(f"{name.replace('_', ' ')} {value}" for name, value in bounds.items())
    values = {name: parse_bytes(value) if isinstance(value, str) and name != "is" else value for name, value in bounds.items()}
    if "is" in values:
        values["is_"] = values.pop("is")
    return Part(**part, **values, bound=text)
