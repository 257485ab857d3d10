"""What is spent, by month, kept on disk: the most a call can cost is reserved before it is made and settled after it.

A file for all processes, changed under a lock and put in place whole, so that a crash leaves it as it was before or after. What
was reserved and never settled counts as spent: nobody knows whether the call was billed. Money is whole billionths, rounded up.
"""

import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from filelock import FileLock

from .. import places
from ..errors import BadFile, LabError

NANO = 10**9
_MONTH = re.compile(r"[0-9]{4}-(?:0[1-9]|1[0-2])")
_PER_MONTH = re.compile(r"\s*((?:\d{1,3}(?:,\d{3})+|[\d_]*)(?:\.\d+)?)\s*(?:(?:per|a|/)\s*month)?\s*", re.IGNORECASE)


class OverCap(LabError):
    """The month's cap leaves no room for another call."""


@dataclass(frozen=True)
class Price:
    """Per million tokens, in any one currency, of what is read and of what is written."""

    input: float
    output: float

    def nano(self, read: int, written: int) -> int:
        """What so many tokens cost at most, in billionths."""
        return math.ceil((Fraction(str(self.input)) * read + Fraction(str(self.output)) * written) * NANO / 10**6)


def price_of(given) -> Price | None:
    """(input, output) per million tokens. Raises LabError."""
    if given is None:
        return given
    given = (given.input, given.output) if isinstance(given, Price) else given
    try:
        pair = tuple(float(one) for one in given)
    except (TypeError, ValueError):
        pair = ()
    if len(pair) != 2 or not all(math.isfinite(one) and one >= 0 for one in pair) or isinstance(given, str):
        raise LabError(f"price is {given!r:.40}; give (input, output) for a million tokens, like (0.15, 0.60)")
    return Price(*pair)


def amount_of(given, what: str = "cap") -> float:
    """A number, or "5 per month". Raises LabError."""
    found = _PER_MONTH.fullmatch(given) if isinstance(given, str) else None
    try:
        value = float(found[1].replace(",", "").replace("_", "")) if found else float(given)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(given, bool) or not math.isfinite(value) or value < 0:
        raise LabError(f"{what} is {given!r:.40}; give an amount a month, like 5 or '5 per month'")
    return value


@dataclass(frozen=True)
class Month:
    """spent: settled, in the currency. reserved: not settled, of calls that are being made or were cut off. calls: those
    counted against a router's `N per month`, and no others."""

    spent: float
    reserved: float
    calls: int

    @property
    def counted(self) -> float:
        """What the cap sees."""
        return self.spent + self.reserved


class Ledger:
    """The file. `clock`: seconds since 1970."""

    def __init__(self, path: str | os.PathLike, clock: Callable[[], float] = time.time):
        # One file has one lock, by whatever name and from wherever it is given.
        self.path, self._clock = Path(path).expanduser().resolve(), clock

    @classmethod
    def named(cls, name: str) -> "Ledger":
        """In llmlab's cache, one for each name."""
        return cls(places.cache() / "spending" / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name)[:100]}.json")

    def __repr__(self) -> str:
        return f"<spending in {self.path.name}>"

    def month(self) -> Month:
        """What this month, in UTC, has seen so far. Raises BadFile."""
        months = self._read()
        found = months.get(self._now(months), _empty())
        return Month(found["spent"] / NANO, sum(found["open"].values()) / NANO, found["calls"])

    def reserve(self, amount: int, cap: float) -> str:
        """Set `amount` aside; a name to settle it by. Raises OverCap where the month would pass `cap` with it."""
        most = math.floor(Fraction(str(cap)) * NANO)
        with self._changing() as (which, month):
            taken = month["spent"] + sum(month["open"].values())
            if taken + amount > most:
                raise OverCap(f"a call may cost up to {amount / NANO:.6f}, and {max(most - taken, 0) / NANO:.6f} of {cap:g} "
                              f"are left in {which}; raise the cap, or wait for the next month")
            name = f"{which}/{secrets.token_hex(8)}"
            month["open"][name] = amount
        return name

    def settle(self, name: str, amount: int) -> None:
        """What the call did cost; 0 where it was not made."""
        with self._changing(name.partition("/")[0]) as (_, month):
            if name in month["open"]:           # twice is once
                del month["open"][name]
                month["spent"] += amount

    def count(self, most: int | None = None) -> bool:
        """Count a call, unless the month has `most` already; whether it was counted."""
        with self._changing() as (_, month):
            fits = most is None or month["calls"] < most
            month["calls"] += fits
        return fits

    # ---- the file -----------------------------------------------------------------------------------------------

    def _now(self, months: dict) -> str:
        """The month by the clock, or a later one that was written already: a clock set back opens no purse again."""
        return max(time.strftime("%Y-%m", time.gmtime(self._clock())), *months, "")

    def _read(self) -> dict:
        try:
            months = json.loads(self.path.read_text(encoding="utf-8"))
            for name, month in months.items():
                counts = (month["spent"], month["calls"], *month["open"].values())
                if not _MONTH.fullmatch(name) or not all(type(one) is int and one >= 0 for one in counts):
                    raise ValueError
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            pass
        else:
            return months
        raise BadFile(f"{self.path.name}, where spending is written down, cannot be read, so nothing more is spent; look at "
                      "it, or remove it to count from zero")

    @contextmanager
    def _changing(self, which: str | None = None) -> Iterator[tuple[str, dict]]:
        """A month and its name, to change; written when nothing was raised. Raises BadFile, LabError."""
        wrong = ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                months = self._read()
                which = which or self._now(months)
                yield which, months.setdefault(which, _empty())
                self._write(months)
        except OSError as error:
            wrong = error.strerror or type(error).__name__
        if wrong:
            raise LabError(f"{self.path.name}, where spending is written down, cannot be written ({wrong}), so nothing more is "
                           "spent; make room for it, or give another ledger=")

    def _write(self, months: dict) -> None:
        part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        try:
            with open(part, "w", encoding="utf-8") as file:
                json.dump(months, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)


def _empty() -> dict:
    return {"spent": 0, "calls": 0, "open": {}}
