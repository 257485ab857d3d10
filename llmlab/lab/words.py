"""What a panel says beside its chart: a report's speed, and what else would fit, in words."""

from ..fitting import QUANT_LADDER, Report

Rates = tuple[float, float, float]


def rate(rates: Rates) -> str:
    """`"52 tokens/s (39 to 63)"`: the best guess and its band."""
    low, best, high = (f"{r:,.0f}" if r >= 10 else f"{r:.1f}" for r in rates)
    return f"{best} tokens/s ({low} to {high})"


def speed(report: Report) -> str:
    """Modelled speed with its band, the context full; "" where a card's rates are not known."""
    said = [f"{what} about {rate(rates)}" for what, rates in (
        ("decode", report.speed.decode_tps), ("prefill", report.speed.prefill_tps)) if rates]
    return f"Speed, modelled: {', '.join(said)}." if said else ""


def hint(report: Report) -> str:
    """The nearest settings that would fit: the longest context as it is, the most faithful quant as it is."""
    context, quant = report.largest_context(), report.best_quant()
    now = report.settings
    if report.fits:
        more = [f"{context:,} tokens of context"] if context > now.context else []
        more += [f"{quant} at this context"] if quant and _rank(quant) < _rank(now.quant) else []
        return f"There is room for {' or for '.join(more)}." if more else ""
    ways = [f"with at most {context:,} tokens of context"] if context else []
    ways += [f"in {quant}"] if quant else []
    if ways:
        return f"It would fit for certain {' or '.join(ways)}."
    return "No quant and no context is small enough for this to fit whole."


def _rank(quant: str) -> int:
    return QUANT_LADDER.index(quant) if quant in QUANT_LADDER else 0
