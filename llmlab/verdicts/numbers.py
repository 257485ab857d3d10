"""Numbers of claims, by the way each comes about. What follows from shapes, rates and tables is computed anew every time; what
somebody measured is kept with the claim.

A way takes what data/claims.json says beside its name and gives figures by suffix: {"way": "fit", ...} named "13b" gives
"13b.card", "13b.verdict", "13b.speed" and so on; a way with one figure gives it under the name itself.
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache

from .. import catalog
from ..advice.published import setting_scores
from ..endpoints.curves import recorded_curve
from ..errors import LabError
from ..fitting import Report, fit
from ..memory import size_of
from ..offload.planned_words import rate
from ..offload.planning import Plan, plan
from ..places import folder
from ..shapes import model_spec
from ..units import format_bytes

KINDS = ("exact", "measured", "published", "modelled")     # of a ratio the later one counts
DAYS = 365.25 / 12                                          # of a month


@dataclass(frozen=True)
class Figure:
    """A number (or a word: a verdict of `fit`), as text too."""

    value: float | str
    text: str
    kind: str
    source: str


Figures = dict[str, Figure]


def figures(numbers: Mapping[str, Mapping]) -> Figures:
    """All figures of a claim by name, in the order of the file: a ratio may use those before it. Raises LabError."""
    found: Figures = {}
    for name, asked in numbers.items():
        asked = dict(asked)
        try:
            way = WAYS[asked.pop("way")]
            made = way(found, **asked) if way is _ratio else way(**asked)
        except (KeyError, TypeError, StopIteration) as error:
            raise LabError(f"data/claims.json: number {name!r}: {type(error).__name__} {error}") from None
        found |= {f"{name}.{suffix}" if suffix else name: figure for suffix, figure in made.items()}
    return found


def _fit(model: str, gpu: str | list[str], quant: str | None = None, **settings) -> Figures:
    """card: bytes on the cards with everything there that was not asked to be elsewhere; layers: of it on the cards."""
    report = _report(model, gpu if isinstance(gpu, str) else tuple(gpu), quant, **settings)
    call = f"llmlab.fit({model!r}, {gpu!r}, quant={quant!r}{''.join(f', {k}={v!r}' for k, v in settings.items())})"
    card = sum(device.needed for name, device in report.whole.devices.items() if name != "host")
    said = {"verdict": (report.verdict, report.verdict), "card": (card, format_bytes(card)),
            "layers": (report.gpu_layers, f"{report.gpu_layers} of {report.layers}"),
            "speed": (report.speed.decode_tps[1], rate(report.speed.decode_tps))}
    return {suffix: Figure(*pair, "modelled", call) for suffix, pair in said.items()} | {
        "ram": _bytes(report.devices["host"].needed, "modelled", call)}


@cache
def _report(model: str, gpu: str | tuple[str, ...], quant: str | None, **settings) -> Report:
    return fit(model, list(gpu) if isinstance(gpu, tuple) else gpu, quant=quant, **settings)


def _longest(model: str, gpu: str, quant: str, **settings) -> Figures:
    """The longest context that fits the card, tokens."""
    found = _report(model, gpu, quant, **settings).largest_context()
    return {"": Figure(found, f"{found:,}", "modelled", f"llmlab.fit({model!r}, {gpu!r}, quant={quant!r}).largest_context()")}


def _best(model: str, gpu: str | list[str], **settings) -> Figures:
    """The best quant that fits the cards."""
    found = _report(model, gpu if isinstance(gpu, str) else tuple(gpu), None, **settings).best_quant()
    return {"": Figure(found, found, "modelled", f"llmlab.fit({model!r}, {gpu!r}).best_quant()")}


def _size(model: str, quant: str) -> Figures:
    found, call = size_of(model_spec(model), quant), f"llmlab.size({model!r}, {quant!r})"
    return {"": _bytes(found.tensor_bytes, "exact", call), "gb": Figure(
        found.tensor_bytes / 1e9, f"{found.tensor_bytes / 1e9:.2f} GB", "exact", call),
        "bits": Figure(found.bits_per_weight, f"{found.bits_per_weight:.2f}", "exact", call)}


def _quality(quant: str, importance: bool = False) -> Figures:
    """Of Llama 3 8B: loss, the perplexity over f16's less 1; kld, the mean divergence."""
    found = catalog.quality()[quant, importance]
    where = f"data/quality_llama3_8b.csv, {quant}{' with an importance matrix' * importance} ({found.source})"
    return {"loss": Figure(found.loss, _text(found.loss, "+.1%"), "published", where),
            "kld": Figure(found.mean_kld, f"{found.mean_kld:.3f}", "published", where)}


def _smollm2(quant: str) -> Figures:
    """Of SmolLM2 135M, without importances: the perplexity over the original's less 1, and one standard error of it."""
    row = next(row for row in _rows("quality_smollm2_135m.csv") if (row["quant"], row["imatrix"]) == (quant, "None"))
    loss, error = float(row["ratio"]) - 1, float(row["ratio_error"])
    return {"": Figure(loss, f"{100 * loss:+.1f} ± {100 * error:.1f} %", "measured",
                       f"data/quality_smollm2_135m.csv, {quant} ({row['source']})")}


def _mmlu(model: str, quant: str) -> Figures:
    found = catalog.mmlu_by_quant()[model, quant]
    return {"": Figure(found, f"{found:.1f}", "published", f"data/mmlu_by_quant_llama3.csv, {model} {quant}")}


def _score(model: str, benchmark: str, source: str, setting: str = "") -> Figures:
    """The one published score whose source and setting have these words."""
    rows = [row for row in catalog.scores() if (row.model, row.benchmark) == (model, benchmark)
            and source in row.source and setting in row.setting]
    if len(rows) != 1:
        raise LabError(f"data/claims.json: {len(rows)} scores of {model} for {benchmark} in {source!r}, {setting!r}")
    return {"": Figure(rows[0].score, f"{rows[0].score:g}", "published",
                       f"data/benchmark_scores.csv, {model} {benchmark} ({rows[0].setting}; {rows[0].source})")}


def _shares(model: str, beside: str, source: str, reach: float) -> Figures:
    """A model's score over another's in every setting of a source that scores both on a scale of 100: count of them, reached
    (how many have `reach`), least, most."""
    found = sorted(scores[model][1] / scores[beside][1] for scores in setting_scores(source) if {model, beside} <= set(scores))
    if not found:
        raise LabError(f"data/claims.json: no setting of {source!r} scores both {model} and {beside}")
    where = f"data/benchmark_scores.csv, {model} over {beside} ({source})"
    reached = sum(share >= reach for share in found)
    said = {"count": (len(found), str(len(found))), "reached": (reached, str(reached)),
            "least": (found[0], _text(found[0], ".0%")), "most": (found[-1], _text(found[-1], ".0%"))}
    return {suffix: Figure(*pair, "published", where) for suffix, pair in said.items()}


def _plan(model: str, **settings) -> Figures:
    """decode and prefill, tokens per second; drive: bytes each token reads from it; rate: of the drive for ten tokens/s."""
    made: Plan = plan(model, **settings)
    found, call = made.predict(), f"llmlab.plan({model!r}{''.join(f', {k}={v!r}' for k, v in settings.items())})"
    moved = found.times.moved["ssd"]
    said = {"decode": (found.decode[1], rate(found.decode)), "prefill": (found.prefill[1], rate(found.prefill)),
            "drive": (moved, format_bytes(moved)), "wanted": (moved * 10, f"{moved * 10 / 1e9:,.0f} GB/s")}
    return {suffix: Figure(*pair, "modelled", call) for suffix, pair in said.items()}


def _saved(value: float, file: str, at: str, kind: str = "measured", shown: str = ".2f", median: bool = False) -> Figures:
    """Of a saved result of tests/bench, which a plain install lacks, or of what a notebook printed, which people run anew: the
    value is kept here, and a test compares. `at`: where in the file, "wanted[what=a beside b].median", or a notebook's words
    with {} for the number; median: of all numbers there."""
    return {"": Figure(value, _text(value, shown), kind, f"{file}, {'median of ' * median}{at}")}


def _speed(id: str) -> Figures:
    """Tokens per second somebody saw, where the row of data/measured_speeds.csv is a plain number."""
    row = {row["id"]: row for row in _rows("measured_speeds.csv")}[id]
    return {"": Figure(float(row["tokens_per_second"]), row["tokens_per_second"], "published",
                       f"data/measured_speeds.csv, {id}: {row['model']}, {row['hardware']} ({row['source']})")}


def _routed(signal: str, reach: float) -> Figures:
    """Of the recorded questions that a small model here and a larger one there answered: local and remote, the shares that are
    right; sent and oracle, the least share to send out for `reach` of the larger one's, by doubt and by an oracle."""
    curve = recorded_curve(signal)
    enough = reach * curve.remote - 1e-9
    least = [float(curve.share[(found >= enough).argmax()]) for found in (curve.quality, curve.oracle)]
    said = dict(zip(("local", "remote", "sent", "oracle"), (curve.local, curve.remote, *least), strict=True))
    return {name: Figure(value, _text(value, ".0%"), "measured", f"data/hybrid_routing.csv, by {signal}")
            for name, value in said.items()}


def _price(gpu: str) -> Figures:
    """US dollars at launch."""
    usd = catalog.gpu(gpu).launch_usd
    return {"": Figure(usd, f"{usd:.0f} USD", "published", f"data/gpus.csv, {gpu}, launch_usd")}


def _months(first: str, last: str, steps: int, source: str) -> Figures:
    """Mean months between things of which so many came after the first."""
    found = (date.fromisoformat(last) - date.fromisoformat(first)).days / DAYS / steps
    return {"": Figure(found, f"{found:.1f}", "published", source)}


def _ratio(found: Figures, of: str, over: str, shown: str = ".2f") -> Figures:
    one, other = found[of], found[over]
    kind = max(one.kind, other.kind, key=KINDS.index)
    value = one.value / other.value
    return {"": Figure(value, _text(value, shown), kind, f"{one.source}; over {other.source}")}


def _text(value: float, shown: str) -> str:
    return format(value, shown).replace("%", " %")


def _bytes(size: int, kind: str, source: str) -> Figure:
    return Figure(size, format_bytes(size), kind, source)


@cache
def _rows(file: str) -> tuple[dict, ...]:
    with open(folder("data") / file, newline="", encoding="utf-8") as text:
        return tuple(csv.DictReader(text))


WAYS: dict[str, Callable[..., Figures]] = {
    "fit": _fit, "longest": _longest, "best": _best, "size": _size, "quality": _quality, "smollm2": _smollm2, "mmlu": _mmlu,
    "score": _score, "shares": _shares, "plan": _plan, "saved": _saved, "speed": _speed, "price": _price, "months": _months,
    "routed": _routed, "ratio": _ratio}
