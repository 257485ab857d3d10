"""What a panel says beside its chart: a report's speed, and what else would fit, in words."""

from ..fitting import QUANT_LADDER, Report
from ..units import format_bytes

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


def trust(report: Report) -> str:
    """How much of the memory is counted and how much is modelled, on the cards or, without any, in RAM."""
    where = [d for name, d in report.devices.items() if (name != "host") == bool(report.cards)]
    names = {d.name for d in where}
    exact = sum(t.bytes for t in report.terms if t.device in names and t.kind == "exact")
    low, high, used = (sum(getattr(d, what) for d in where) for what in ("low", "high", "used"))
    place = "in RAM" if not report.cards else "on the card" if len(where) == 1 else f"on {len(where)} cards"
    return (f"Memory {place}: {format_bytes(exact)} exact, {format_bytes(used - exact)} modelled; "
            f"between {format_bytes(low)} and {format_bytes(high)} in all.")


def hint(report: Report) -> str:
    """The nearest settings that would fit: the longest context as it is, the most faithful quant as it is."""
    now = report.settings
    # "auto" fits where all layers fit: asking for all of them spares the search for a split, at every step
    whole = report.with_(gpu_layers=report.layers) if now.gpu_layers == "auto" else report
    context, quant = whole.largest_context(), whole.best_quant()
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
