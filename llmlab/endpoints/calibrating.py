"""The threshold: from questions like those to come, so that at most a share of them is unsure enough to go out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import LabError
from ..intervals import wilson


@dataclass(frozen=True)
class Calibration:
    """threshold: a signal above it goes out. share: of the questions that did, `low` to `high` of those to come, 95 %
    (Wilson), if they are like these. signals: of each, in the order they were asked."""

    threshold: float
    share: float
    low: float
    high: float
    signals: tuple[float, ...]

    @property
    def answer(self) -> str:
        """In words."""
        return (f"Of {len(self.signals)} questions {self.share:.0%} lie above {self.threshold:.3g}; of others like them "
                f"{self.low:.0%} to {self.high:.0%} will (95 %).")

    @property
    def spread(self) -> float:
        """Of the middle half of the signals."""
        known = sorted(one for one in self.signals if math.isfinite(one))
        return known[(3 * len(known)) // 4] - known[len(known) // 4] if known else 0.0


def calibrated(signals: Sequence[float], share: float) -> Calibration:
    """The least threshold above which at most `share` of the signals lie. Raises LabError where there are too few."""
    known = sorted(signals)
    if len(known) < 2:
        raise LabError(f"{len(known)} questions calibrate nothing; give 20 or more that are like those to come")
    above = math.floor(share * len(known) + 1e-9)
    threshold = known[-above - 1] if above < len(known) else -math.inf
    out = sum(one > threshold for one in known)
    return Calibration(threshold, out / len(known), *wilson(out, len(known)), tuple(signals))
