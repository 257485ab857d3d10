"""How many questions may go out: a share of them, or so many a month. Both hold whatever is asked, in whatever order."""

import math
import re
import threading
from fractions import Fraction

from ..errors import LabError
from .spending import Ledger, amount_of

_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*(?:of\s+(?:all\s+)?(?:calls|questions))?\s*", re.IGNORECASE)


class Share:
    """A bucket: each question puts `share` of a call into it, up to `burst` calls, and a call takes one out.

    It begins empty, so after n questions at most share x n calls were made, for every n; and of any w questions in a row at
    most share x w + burst. Counted in fractions, without rounding.
    """

    reason = "share"

    def __init__(self, share, burst: int = 3):
        self.share, self.burst = Fraction(str(share)), burst
        self._held, self._lock = Fraction(0), threading.Lock()
        self.questions = self.calls = 0

    def __repr__(self) -> str:
        return f"at most {100 * float(self.share):.3g}% of the questions"

    def asked(self) -> None:
        """Another question is there."""
        with self._lock:
            self.questions += 1
            self._held = min(self._held + self.share, Fraction(max(self.burst, 1)))

    def take(self) -> bool:
        """Whether it may go out; then it counts."""
        with self._lock:
            if self._held < 1:
                return False
            self._held -= 1
            self.calls += 1
            return True


class PerMonth:
    """So many calls a calendar month (UTC), of all processes that share the ledger."""

    reason = "month"

    def __init__(self, most: int, ledger: Ledger):
        self.most, self.ledger = most, ledger

    def __repr__(self) -> str:
        return f"at most {self.most:,} calls a month"

    def asked(self) -> None:
        """Nothing: months do not grow with questions."""

    def take(self) -> bool:
        return self.ledger.count(self.most)


class Unlimited:
    """Every question that should go out may."""

    reason = ""

    def __repr__(self) -> str:
        return "as many as are wanted"

    def asked(self) -> None:
        pass

    def take(self) -> bool:
        return True


def allowance_of(at_most, ledger: Ledger, burst: int) -> Share | PerMonth | Unlimited:
    """0.1 or "10 %" is a share, "200 per month" a number of calls, None no limit. Raises LabError."""
    if at_most is None:
        return Unlimited()
    if isinstance(burst, bool) or not isinstance(burst, int) or not 1 <= burst <= 10**6:
        raise LabError(f"burst is {burst!r:.40}; give how many calls may come in a row, 1 at least")
    found = _SHARE.fullmatch(at_most) if isinstance(at_most, str) else None
    if found or isinstance(at_most, (int, float)) and not isinstance(at_most, bool):
        share = Fraction(found[1]) / 100 if found else Fraction(str(at_most)) if math.isfinite(at_most) else Fraction(-1)
        if not 0 <= share <= 1:
            raise LabError(f"at_most is {at_most!r:.40}; a share lies between 0 and 1; a number of calls is '200 per month'")
        return Share(share, burst)
    if not isinstance(at_most, str) or "month" not in at_most.lower():
        raise LabError(f"at_most is {at_most!r:.40}; give a share like 0.1 or '10 %', or '200 per month'")
    most = amount_of(at_most, "at_most")
    if most != int(most):
        raise LabError(f"at_most is {at_most!r:.40}; calls are whole: '200 per month'")
    return PerMonth(int(most), ledger)
