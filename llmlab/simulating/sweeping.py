"""Questions asked of many simulations: how throughput and latency go with load, what paging is worth, which load is
bearable."""

from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

from ..catalog import Table
from ..errors import LabError
from ..workloads import Arrival, timed
from .costs import Setup
from .events import BANDS, Simulation, simulate, simulate_setup

WAYS = ("paged", "reserved", "static", "alone")
"""Ways to serve at the same memory. "reserved": sequences come and go as in "paged", but each reserves the longest context in
one piece (the paper's "Orca (Max)"); the others as `runtime.scheduling.Scheduler` has them."""

_LEAST = 1e-4            # of the highest rate: requests this far apart do not meet, and a rate below it is none
_SHOWN = {"requests/s": "{:.3g}".format, "tokens/s": "{:,.0f}".format, "first token s": "{:.3g}".format,
          "first token p99 s": "{:.3g}".format, "s per token": "{:.4f}".format, "latency s": "{:.3g}".format,
          "latency p99 s": "{:.3g}".format, "running": "{:.1f}".format, "wasted": "{:.1%}".format, "rate": "{:.3g}".format,
          "times static": "{:.2f}".format, "tokens/s low": "{:,.0f}".format, "tokens/s high": "{:,.0f}".format}


def serve(setup: Setup, arrivals: Many[Arrival], way: str = "paged", *, clients: int | None = None, band: str = "best",
          share: bool = True) -> Simulation:
    """One run in one of WAYS. Raises LabError."""
    if way not in WAYS:
        raise LabError(f"way is {way!r:.30}; it is one of {', '.join(WAYS)}")
    if way != "reserved":
        return simulate_setup(setup, arrivals, way, clients=clients, band=band, share=share)
    size = -(-setup.context // setup.size) * setup.size
    cells = setup.blocks[BANDS.index(band)] * setup.size
    return simulate(arrivals, setup.cost, cells // size, size, setup.rows, setup.sequences, context=setup.context, share=False,
                    clients=clients, band=band)


@dataclass(frozen=True, repr=False)
class Policies:
    """The same requests served in several ways with the same memory. `runs`: way -> Simulation, modelled."""

    title: str
    runs: dict[str, Simulation]

    def times(self, way: str = "paged", over: str = "static") -> float:
        """Throughput in requests per second of one way over another's."""
        return self.runs[way].requests_per_second / self.runs[over].requests_per_second

    @property
    def table(self) -> Table:
        slowest = self.runs.get("static")
        return Table(({"way": way, **run.row(), **({"times static": self.times(way)} if slowest else {})}
                      for way, run in self.runs.items()), _SHOWN)

    def __repr__(self) -> str:
        return f"{self.title}, modelled\n{self.table!r}"

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def compare_policies(setup: Setup, arrivals: Many[Arrival], ways: Iterable[str] = WAYS, *, clients: int | None = None,
                     band: str = "best") -> Policies:
    """What paging is worth: the same requests in several ways, at the same memory. Raises LabError."""
    return Policies(setup.title, {way: serve(setup, arrivals, way, clients=clients, band=band) for way in ways})


def throughput_of(setup: Setup, arrivals: Many[Arrival], *, clients: Iterable[int] = (), rates: Iterable[float] = (),
                  way: str = "paged", bands: bool = False, seed: int = 0) -> Table:
    """Throughput and latency against load, a row each: for numbers of `clients` that each ask again as soon as they have their
    answer, or for `rates` of requests a second that come when they will (Poisson). bands: with the low and high end of tokens a
    second. Raises LabError."""
    loads = [("clients", n, arrivals, n) for n in clients] + [("rate", r, timed(arrivals, r, seed), None) for r in rates]
    if not loads:
        raise LabError("throughput_of takes clients=(1, 2, 4, ...) or rates=(0.5, 1, ...)")
    rows = []
    for name, value, asked, at_once in loads:
        row = {name: value, **serve(setup, asked, way, clients=at_once).row()}
        if bands:
            row |= {f"tokens/s {band}": serve(setup, asked, way, clients=at_once, band=band).tokens_per_second
                    for band in ("low", "high")}
        rows.append(row)
    return Table(rows, _SHOWN)


def bearable_rate(setup: Setup, arrivals: Many[Arrival], way: str = "paged", *, normalized: float = 0.5, seed: int = 0,
                  band: str = "best") -> float:
    """The highest rate of requests a second at which their mean normalized latency (seconds over tokens of the answer) stays
    below `normalized`, to about 2 %: what the paper on PagedAttention compares systems at. Never above what is served when all
    are there at once: the queue would grow for ever, whatever a short trace shows of it. 0.0 where no rate is bearable: a
    request that is alone takes longer already (or nothing can be served at all). Raises LabError."""
    def bears(rate: float) -> bool:
        return serve(setup, timed(arrivals, rate, seed), way, band=band).mean("normalized") <= normalized

    most = serve(setup, [replace(a, at=0.0) for a in arrivals], way, band=band).requests_per_second
    if not most or serve(setup, arrivals, way, clients=1, band=band).mean("normalized") > normalized:
        return 0.0
    if bears(most):
        return most
    low, high = 0.0, most
    while high - low > 0.02 * high and high > _LEAST * most:
        middle = (low + high) / 2
        low, high = (middle, high) if bears(middle) else (low, middle)
    return low
