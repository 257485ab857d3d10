"""What people measured of vLLM's throughput, beside what the simulation says: data/measured_serving.csv, row by row."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

from ..catalog import Table
from ..places import folder
from ..rates import Band
from ..workloads import Arrival, drawn, even
from .costs import Setup, setup
from .events import BANDS, simulate_setup

CONTEXT = 2048         # of ShareGPT's requests: vLLM's tool leaves out what is longer in all
# Of its requests' lengths: the last of 200 answers ended after 24.5 s on one card and 15.0 s on another, at 35 and 15 ms a
# token, so it had some 500 tokens; answers vary less than `workloads.SPREAD` says.
SPREAD = (1.2, 0.6)


@dataclass(frozen=True)
class Published:
    """One row. measure: "requests/s", or "s/token" (seconds a token after the first, mean or median); value: what was measured.
    lengths: "even", or "sharegpt" (drawn around the mean lengths). clients, rate: how requests
    came, the last `span` seconds after the first where that is known; neither: all at once. use: "fit" where constants of
    `costs` come from it, "check" otherwise."""

    id: str
    use: str
    model: str
    quant: str
    cards: str
    lengths: str
    requests: int
    prompt: float
    output: float
    clients: int | None
    rate: float | None
    span: float | None
    rows: int | None
    sequences: int | None
    utilization: float | None
    measure: str
    value: float
    kind: str
    source: str
    note: str

    def setup(self) -> Setup:
        """The model on its cards."""
        longest = CONTEXT if self.lengths == "sharegpt" else max(round(self.prompt) + round(self.output), CONTEXT)
        return setup(self.model, self.cards.split("|"), self.quant, longest, utilization=self.utilization, rows=self.rows,
                     sequences=self.sequences)

    def arrivals(self) -> list[Arrival]:
        """Requests as they were sent; one draw's luck, whether they come sooner or later in all, does not count."""
        if self.lengths == "even":
            found = even(self.requests, round(self.prompt), round(self.output), rate=self.rate)
        else:
            found = drawn(self.requests, self.prompt, self.output, rate=self.rate, spread=SPREAD)
        if not self.rate:
            return found
        longer = (self.span or self.requests / self.rate) / found[-1].at
        return [replace(one, at=one.at * longer) for one in found]

    def simulated(self) -> Band:
        """The same measure by simulation: at the low end of speed, best, at the high end."""
        asked, served = self.arrivals(), self.setup()
        runs = [simulate_setup(served, asked, clients=self.clients, band=band) for band in BANDS]
        return tuple(run.requests_per_second if self.measure == "requests/s" else run.mean("each") for run in runs)

    def inside(self, band: Band) -> bool:
        """Whether what was measured lies within the simulation's band."""
        return min(band) <= self.value <= max(band)


@cache
def published() -> tuple[Published, ...]:
    """All rows."""
    with open(folder("data") / "measured_serving.csv", newline="", encoding="utf-8") as file:
        return tuple(_row(row) for row in csv.DictReader(file))


def _row(row: dict) -> Published:
    def number(name: str, type):
        return type(row[name]) if row[name] else None
    words = ("id", "use", "model", "quant", "cards", "lengths", "measure", "kind", "source", "note")
    return Published(
        **{name: row[name] for name in words},
        **{name: number(name, int) for name in ("requests", "clients", "rows", "sequences")},
        **{name: number(name, float) for name in ("prompt", "output", "rate", "span", "utilization", "value")})


def beside_published(rows: Iterable[Published] | None = None) -> Table:
    """What was measured and what is simulated, a row each; it takes seconds a row."""
    found = []
    for one in published() if rows is None else rows:
        low, best, high = band = one.simulated()
        found.append({"id": one.id, "use": one.use, "model": one.model, "quant": one.quant, "cards": one.cards,
                      "measure": one.measure, "measured": one.value, "low": low, "best": best, "high": high,
                      "inside": one.inside(band), "measured / best": one.value / best, "source": one.source})
    return Table(found, dict.fromkeys(("measured", "low", "best", "high"), "{:.4g}".format) | {
        "measured / best": "{:.2f}".format, "inside": lambda yes: "yes" if yes else "no"})
