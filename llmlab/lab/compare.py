"""Two configurations side by side: what differs in settings, bytes, verdict and speed; as rows and in words."""

from dataclasses import dataclass, field, fields

from ..fitting import Report
from ..settings import Settings
from ..shapes import ModelSpec
from ..units import format_bytes
from .style import TERMS


@dataclass(frozen=True)
class Kept:
    """A configuration that was set aside as A: its settings by name, and its report."""

    settings: dict = field(hash=False)
    report: Report


def rows(a: Report, b: Report) -> list[dict]:
    """What differs between A and B, a row each: what, A, B, and the change from A to B where it is a number."""
    return [*_settings(a, b), *_bytes(a, b), *_results(a, b)]


def _settings(a: Report, b: Report) -> list[dict]:
    said = [("model", a.spec.title, b.spec.title), ("cards", _cards(a), _cards(b))]
    said += [(one.name, _value(getattr(a.settings, one.name, None)), _value(getattr(b.settings, one.name, None)))
             for one in fields(Settings)]
    if a.cards or b.cards:
        said.append(("layers on the cards", f"{a.gpu_layers} of {a.layers}", f"{b.gpu_layers} of {b.layers}"))
    return [_row(name, one, other) for name, one, other in said if one != other]


def _bytes(a: Report, b: Report) -> list[dict]:
    found = []
    for name, (label, _) in TERMS.items():
        one, other = a.total(name), b.total(name)
        if one != other:
            found.append(_row(label, format_bytes(one), format_bytes(other), _more(one, other)))
    for where, label in (("cards", "in all, on the cards"), ("host", "in all, in RAM")):
        one, other = used(a, where), used(b, where)
        if one != other:
            found.append(_row(label, format_bytes(one), format_bytes(other), _more(one, other)))
    return found


def _results(a: Report, b: Report) -> list[dict]:
    found = [_row("verdict", a.verdict, b.verdict)]
    for label, one, other in (("decode", a.speed.decode_tps, b.speed.decode_tps),
                              ("prefill", a.speed.prefill_tps, b.speed.prefill_tps)):
        if one and other and one != other:
            found.append(_row(f"{label}, modelled", _rate(one), _rate(other), f"× {_times(one, other)}"))
    return found


def _row(what: str, one: str, other: str, change: str = "") -> dict:
    return {"what": what, "A": one, "now": other, "change": change}


def words(a: Report, b: Report) -> str:
    """One or two sentences."""
    settings, where = _settings(a, b), "cards" if a.cards and b.cards else None
    if not settings:
        return "A and the present configuration are the same."
    text = "Against A: " + ", ".join("{what} {now} instead of {A}".format(**row) for row in settings[:4])
    text += f" and {len(settings) - 4} more" if len(settings) > 4 else ""
    one, other = used(a, where), used(b, where)
    place = "on the cards" if where else "of memory"
    size = f"as much {place}" if one == other else (
        f"{format_bytes(abs(other - one))} {'more' if other > one else 'less'} {place}")
    speeds = a.speed.decode_tps, b.speed.decode_tps
    speed = f", decode {_as_fast(*speeds)} (modelled)" if all(speeds) else ""
    verdict = f"as before it {_says(b)}" if a.verdict == b.verdict else f"A {_says(a)}, this {_says(b)}"
    return f"{text}. {size[0].upper()}{size[1:]}{speed}; {verdict}."


def used(r: Report, where: str | None = None) -> int:
    """Bytes needed on the "cards", on the "host", or in all."""
    return sum(d.needed for name, d in r.devices.items() if where is None or (name == "host") == (where == "host"))


def _says(r: Report) -> str:
    return {"may spill": "may or may not fit"}.get(r.verdict, r.verdict)


def _cards(r: Report) -> str:
    names = [card.name for card in r.cards]
    return ", ".join(f"{names.count(n)} × {n}" if names.count(n) > 1 else n for n in dict.fromkeys(names)) or "none"


def _value(value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (tuple, list)):
        parts = [_value(one) for one in value]
        return parts[0] if len(set(parts)) == 1 else ", ".join(parts)
    return "none" if value is None else (value.title if isinstance(value, ModelSpec) else str(value))[:60]


def _more(one: int, other: int) -> str:
    return f"{'+' if other > one else '−'}{format_bytes(abs(other - one))}"


def _rate(rates: tuple[float, float, float]) -> str:
    return f"{rates[1]:,.0f} tokens/s" if rates[1] >= 10 else f"{rates[1]:.1f} tokens/s"


def _as_fast(one, other) -> str:
    return "about as fast" if 0.95 <= other[1] / one[1] <= 1.05 else f"{_times(one, other)} times as fast"


def _times(one, other) -> str:
    return f"{other[1] / one[1]:.2g}" if one[1] else "?"
