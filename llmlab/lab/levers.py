"""Levers in the words of a panel: rows of texts, and a sentence."""

from ..fitting import Report
from ..levers import Levers
from ..units import format_bytes


def rows(levers: Levers) -> list[dict]:
    """A row a lever: from what to what, bytes freed, what then becomes of it, speed over now, what is known of quality."""
    return [{"lever": one.name, "from": one.before, "to": one.after, "frees": _freed(one.saves),
             "in RAM": _freed(one.saves_host), "then it": one.verdict, "decode": _times(one.decode),
             "prefill": _times(one.prefill), "quality": one.quality} for one in levers]


def words(report: Report, levers: Levers) -> str:
    """What the table is about."""
    fitting = [one for one in levers if one.fits]
    if report.fits:
        return "It fits. A step of each setting, what it frees on the fullest device, and what it costs (speed is modelled):"
    if not fitting:
        return "No single step makes it fit. What each would free on the fullest device, and cost (speed is modelled):"
    one = fitting[0]
    return (f"{len(fitting)} of these make it fit, first {one.name} {one.after} instead of {one.before}. What each frees on "
            "the fullest device, and costs (speed is modelled):")


def _freed(size: int) -> str:
    return "" if not size else f"{'+' if size > 0 else '−'}{format_bytes(abs(size))}"


def _times(band) -> str:
    return "" if band is None else f"× {band[1]:.2f}"
