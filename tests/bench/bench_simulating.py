"""Simulated serving beside what people measured, the claims of the paper on PagedAttention, and how long a simulation takes.

    python tests/bench/bench_simulating.py [--only V1,V2,...] [--claims] [--json FILE]

Every row of data/measured_serving.csv with the simulation's band, and how many lie inside; `--claims`: the rates of requests
that paged and reserving servers bear at the same latency, as the paper compares them. Modelled throughout; the seconds a
simulation takes are this processor's. Nothing here fails for being wrong or slow.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

from llmlab.catalog import Table  # noqa: E402
from llmlab.simulating import bearable_rate, beside_published, compare_policies, setup, simulate_setup  # noqa: E402
from llmlab.simulating.published import published  # noqa: E402
from llmlab.workloads import alpaca_like, sharegpt_like  # noqa: E402

pytestmark = pytest.mark.bench

CLAIMS = (("llama-2-13b", "a100-sxm4-40gb", None), ("llama-3-8b", "rtx-4090-24gb", None),
          ("llama-3-70b", ("h100-sxm5-80gb",) * 2, "FP8"))


def rows(only: tuple[str, ...] = ()) -> Table:
    """Every row, or some, beside its simulation; printed as they come."""
    found = []
    for one in published():
        if not only or one.id in only:
            found += beside_published([one])
            print({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in found[-1].items()
                   if name != "source"}, flush=True)
    for use in ("fit", "check"):
        mine = [row for row in found if row["use"] == use]
        print(f"{use}: {sum(row['inside'] for row in mine)} of {len(mine)} inside the band")
    return Table(found)


def claims(count: int = 300) -> list[dict]:
    """What paging is worth, in throughput with all requests there at once and in the rate that is borne."""
    found = []
    for model, cards, quant in CLAIMS:
        on = setup(model, list(cards) if isinstance(cards, tuple) else cards, quant)
        for name, asked in (("ShareGPT-like", sharegpt_like(count)), ("Alpaca-like", alpaca_like(count))):
            print(f"\n{name}\n{compare_policies(on, asked)}", flush=True)
            rates = {way: bearable_rate(on, asked, way) for way in ("paged", "reserved", "static")}
            over = [f"over {way} {rates['paged'] / rates[way]:.2f}" for way in ("reserved", "static") if rates[way]]
            print(f"requests a second borne at 0.5 s a token: {rates}; paged {', '.join(over)}", flush=True)
            found.append({"model": on.title, "requests": name, **rates})
    return found


def simulation_time() -> float:
    """Processor seconds of 500 requests of a 70B model on two cards, the least of three."""
    on, asked, seconds = setup("llama-3-70b", ["h100-sxm5-80gb"] * 2, "FP8"), sharegpt_like(500), []
    for _ in range(3):
        start = time.process_time()
        run = simulate_setup(on, asked)
        seconds.append(time.process_time() - start)
    print(f"500 requests of {on.title}: {len(run.history):,} steps simulated in {min(seconds):.2f} s of processor time")
    return min(seconds)


def test_simulating():
    rows(("V4", "V5"))
    simulation_time()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows by id, with commas")
    parser.add_argument("--claims", action="store_true", help="the paper's claims instead of the rows")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    given = parser.parse_args()
    result = {"seconds": simulation_time()}
    if given.claims:
        result["claims"] = claims()
    else:
        result["rows"] = list(rows(tuple(filter(None, given.only.split(",")))))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))
