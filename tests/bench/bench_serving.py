"""Many requests at once: llmlab's paged engine beside static batches, one after another, transformers and llama.cpp's server.

    python tests/bench/bench_serving.py [--count 64] [--scale 0.25] [--seed 0] [--rate R] [--memory "128 MiB"] [--kv f32]
                                        [--dtype D] [--sequences 48] [--rows 256] [--rounds 3] [--threads N]
                                        [--only NAMES] [--quick] [--save] [--json FILE]

SmolLM2 135M, everyone in a process of its own, the same requests: lengths as those of ShareGPT (`llmlab.workloads`), made
smaller by `--scale`, all there at the beginning or at a mean `--rate` a second; greedy, ends ignored, so that everyone makes
as many tokens. Everyone's cache has the same bytes. Each round opens everyone anew, another one first. Ratios above 1 mean
that llmlab's paged engine is quicker. Then the same requests are simulated, what a step takes learnt from the paged engine's.
Nothing here fails for being slow. Needs the extra `peers`; llama.cpp's server is built the first time (llama_server.py).
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import date
from itertools import zip_longest
from math import ceil
from pathlib import Path
from statistics import fmean, median, quantiles

import pytest

TOP = Path(__file__).resolve().parents[2]
for folder in (TOP, TOP / "tests", TOP / "tests" / "bench"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import limited  # noqa: E402
import llama_server  # noqa: E402
import psutil  # noqa: E402

import llmlab  # noqa: E402
from llmlab import machine  # noqa: E402
from llmlab.benching.children import Child, waiting  # noqa: E402
from llmlab.catalog import Table  # noqa: E402
from llmlab.errors import LabError  # noqa: E402
from llmlab.gguf import read_gguf  # noqa: E402
from llmlab.quality import text  # noqa: E402
from llmlab.simulating import fit_cost, simulate  # noqa: E402
from llmlab.units import MIB, format_bytes, parse_bytes  # noqa: E402
from llmlab.vocabulary import words_of  # noqa: E402
from llmlab.workloads import Arrival, sharegpt_like  # noqa: E402

pytestmark = pytest.mark.bench

ENGINES = Path(__file__).resolve().with_name("serving_engines.py")
BLOCK = 16               # cells
FAR = 0.15               # that a simulation may be off
PAGED, STATIC, ALONE = "llmlab paged", "llmlab static", "llmlab one by one"
DECODER, SERVER, LLAMA = "llmlab decoder", "llmlab server", "llama.cpp server"
DTYPES = ("float32", "bfloat16")
NAMES = (PAGED, STATIC, ALONE, DECODER, SERVER, *(f"transformers {dtype}" for dtype in DTYPES), LLAMA)


# ---- everyone in a process of its own -------------------------------------------------------------------------------

class Served(Child):
    """A process of serving_engines.py, watched from outside."""

    def __init__(self, name: str, engine: str, threads: int):
        path = os.pathsep.join(filter(None, (str(TOP), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)} | waiting()
        self.name, self._words, self._watched = name, tempfile.TemporaryFile(), None
        self._process = subprocess.Popen([sys.executable, str(ENGINES), engine], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=self._words, env=environment, text=True, encoding="utf-8", errors="replace")

    def open(self, job: dict) -> dict:
        opened = self.ask("open", job=job)
        self._watched = opened.pop("watch")
        return opened

    def serve(self, requests: list[dict]) -> dict:
        """What came of the requests, with the processor seconds that it took and the most bytes resident meanwhile."""
        with contextlib.suppress(OSError):
            Path(f"/proc/{self._watched}/clear_refs").write_text("5")      # from here on the peak is this run's
        before = self._cpu()
        made = self.ask("serve", requests=requests)
        return made | {"cpu": self._cpu() - before, "peak": limited.status(self._watched).get("VmHWM")}

    def _cpu(self) -> float:
        try:
            times = psutil.Process(self._watched).cpu_times()
        except psutil.Error:                   # it died, and its answer will say so
            return 0.0
        return times.user + times.system


@dataclass
class Racer:
    """One that takes part; what came of it: a dict a round."""

    name: str
    engine: str
    job: dict
    failed: str | None = None
    about: dict = field(default_factory=dict)
    rounds: list[dict] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [one["seconds"] for one in self.rounds]

    @property
    def tokens(self) -> list[list[int]]:
        """Of each request, of the first round."""
        return [one["tokens"] for one in self.rounds[0]["requests"]]


def race(racers: list[Racer], requests: list[dict], rounds: int) -> list[Racer]:
    """All take turns, each round beginning with another one, everyone opened anew and warmed up by a few short requests."""
    warm = [{"at": 0.0, "prompt": one["prompt"][:24], "output": 4} for one in requests[:3]]
    for turn in range(rounds):
        start = turn % len(racers)
        for racer in racers[start:] + racers[:start]:
            if racer.failed:
                continue
            say(f"round {turn + 1}: {racer.name}")
            child = Served(racer.name, racer.engine, racer.job["threads"])
            try:
                opened = child.open(racer.job)
                racer.about = opened["about"]
                child.serve(warm)
                racer.rounds.append(child.serve(requests) | {"load": load(), "open": opened["seconds"]})
                say(f"round {turn + 1}: {racer.name}: {racer.rounds[-1]['seconds']:.1f} s")
                child.ask("close")
            except LabError as error:
                racer.failed = str(error)
                say(f"{racer.name}: {error}")
            finally:
                child.close()
    return racers


def requests_of(path: Path, arrivals: list[Arrival]) -> list[dict]:
    """Prompts of the arrivals' lengths from the text llmlab ships, each beginning at another place of it."""
    ids = words_of(read_gguf(path))(text(), add_special_tokens=False)["input_ids"]
    apart = max(1, len(ids) // len(arrivals))
    return [{"at": one.at, "prompt": [ids[(number * apart + at) % len(ids)] for at in range(one.prompt)], "output": one.output}
            for number, one in enumerate(arrivals)]


def racers_of(names, path: Path, longest: int, memory: int, kv: str, sequences: int, rows: int, threads: int,
              dtype: str | None) -> list[Racer]:
    """Those of `NAMES` that are asked for."""
    job = {"path": str(path), "threads": threads, "memory": memory}
    ours = job | {"dtype": dtype, "kv": kv, "sequences": sequences, "rows": rows, "context": None}
    found = [Racer(PAGED, "ours", ours | {"policy": "paged"}),
             # what a static batch reserves: the longest request there will be, which nobody can know beforehand
             Racer(STATIC, "ours", ours | {"policy": "static", "context": BLOCK * ceil(longest / BLOCK)}),
             Racer(ALONE, "ours", ours | {"policy": "alone"}), Racer(DECODER, "alone", job | {"dtype": dtype}),
             Racer(SERVER, "served", ours | {"policy": "paged"})]
    found += [Racer(f"transformers {dtype}", "transformers", job | {"dtype": dtype, "page": BLOCK, "rows": rows,
                                                                    "sequences": sequences}) for dtype in DTYPES]
    if LLAMA in names:
        shape = read_gguf(path).metadata
        width = shape["llama.embedding_length"] // shape["llama.attention.head_count"]
        cell = 2 * 2 * shape["llama.block_count"] * shape["llama.attention.head_count_kv"] * width      # two bytes a number
        llama = Racer(LLAMA, "llama", job | {"slots": sequences, "cells": memory // cell, "kv": "f16",
                                             "kv_bytes": memory // cell * cell})
        try:
            llama.job["program"] = str(llama_server.build(say))
        except LabError as error:
            llama.failed = str(error)
        found.append(llama)
    return [racer for racer in found if racer.name in names]


# ---- what follows -----------------------------------------------------------------------------------------------

def latencies(made: list[dict], requests: list[dict]) -> dict:
    """Of all requests, mean and 95th percentile: seconds from a request's coming to its first token, and milliseconds of each
    token after it. Nothing where an engine does not say when the first one came."""
    if any(one["first"] is None for one in made):
        return dict.fromkeys(("first s", "p95", "ms/token", "p95 ms"))
    first = [one["first"] - one["at"] for one in made]
    each = [1e3 * (one["last"] - one["first"]) / (request["output"] - 1)
            for one, request in zip(made, requests, strict=True) if request["output"] > 1]
    return {"first s": fmean(first), "p95": p95(first), "ms/token": fmean(each), "p95 ms": p95(each)}


def p95(values: list[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def ratio(other: Racer, ours: Racer) -> dict:
    """How many times as quick ours is: the median of the rounds, and the best of each."""
    pairs = [theirs / mine for theirs, mine in zip(other.seconds, ours.seconds, strict=False)]
    return {"median": median(pairs), "best": min(other.seconds) / min(ours.seconds),
            "processors": median(one["cpu"] for one in other.rounds) / median(one["cpu"] for one in ours.rounds)}


def agreement(one: list[list[int]], other: list[list[int]]) -> dict:
    """How alike answers are: the share of requests whose tokens are all the same, and of tokens before the first other one."""
    same = [next((at for at, (a, b) in enumerate(zip_longest(x, y)) if a != b), len(x))
            for x, y in zip(one, other, strict=True)]
    return {"requests": fmean(alike == len(x) for alike, x in zip(same, one, strict=True)),
            "tokens": sum(same) / sum(map(len, one))}


def simulated(racers: list[Racer], arrivals: list[Arrival]) -> list[dict]:
    """llmlab's policies without the model, what a step takes fitted to the paged engine's: tokens a second beside those that
    were measured, and what becomes of the cache's cells, which the scheduler alone decides (means over time). Raises LabError
    where too few steps were measured."""
    ran = {racer.job["policy"]: racer for racer in racers if racer.engine == "ours" and racer.rounds}
    cost, rows = fit_cost([step for one in ran["paged"].rounds for step in one["steps"]]), []
    for policy, racer in ran.items():
        job, about = racer.job, racer.about
        run = simulate(arrivals, cost, about["blocks"], BLOCK, job["rows"], job["sequences"], policy, context=about["context"],
                       share=False)
        measured = median(sum(one.output for one in arrivals) / seconds for seconds in racer.seconds)
        rows.append({"policy": policy, "simulated": run.tokens_per_second, "measured": measured,
                     "ratio": run.tokens_per_second / measured,
                     "": "OFF" if abs(run.tokens_per_second / measured - 1) > FAR else "", "running": run.over_time("running"),
                     "cells": about["blocks"] * BLOCK, "reserved": run.over_time("used") * BLOCK / (about["blocks"] * BLOCK),
                     "wasted": run.wasted_share, "padded rows": 1 - run.computing_share, "preempted": run.preemptions,
                     "fitted": cost.why})
    return rows


def race_table(racers: list[Racer], requests: list[dict]) -> Table:
    made, read, rows = sum(one["output"] for one in requests), sum(len(one["prompt"]) for one in requests), []
    for racer in (one for one in racers if one.rounds):
        seconds = median(racer.seconds)
        turn = min(racer.rounds, key=lambda one: abs(one["seconds"] - seconds))        # the median round
        rows.append({"": racer.name, "tokens/s": made / seconds, "best": made / min(racer.seconds),
                     "with prompts": (made + read) / seconds, "requests/s": len(requests) / seconds,
                     **latencies(turn["requests"], requests), "processor s": turn["cpu"],
                     "peak MiB": turn["peak"] and turn["peak"] / MIB,
                     "cache MiB": racer.about.get("kv_bytes") and racer.about["kv_bytes"] / MIB})
    return Table(rows, dict.fromkeys(("tokens/s", "best", "with prompts", "ms/token", "p95 ms", "processor s"), "{:.1f}".format)
                 | dict.fromkeys(("requests/s", "first s", "p95"), "{:.2f}".format)
                 | dict.fromkeys(("peak MiB", "cache MiB"), "{:.0f}".format))


def wanted(found: dict) -> list[dict]:
    """What is asked for, and what came: a line each, "BELOW" where it did not."""
    ran, rows = {racer.name: racer for racer in found["race"] if racer.rounds}, []
    peers = [ran[name] for name in NAMES if name in ran and name.startswith("transformers")]
    quickest = min(peers, key=lambda one: median(one.seconds), default=None)
    for name, other, least, more in (
            (PAGED, STATIC, 2.0, "the same bytes of cache"), (PAGED, ALONE, None, "the engine, one after another"),
            (PAGED, DECODER, None, "compiled, one after another"),
            (PAGED, quickest and quickest.name, 1.0, "its continuous batching, the quicker dtype"),
            (PAGED, LLAMA, None, "that one over HTTP"), (SERVER, LLAMA, None, "both over HTTP")):
        if name in ran and other in ran:
            quicker = ratio(ran[other], ran[name])
            below = least is not None and quicker["median"] < least
            rows.append({"what": f"{name} beside {other}", **quicker, "at least": least, "": "BELOW" if below else "",
                         "and": more})
    return rows


def show(found: dict) -> None:
    requests = found["requests"]
    made, read = sum(one["output"] for one in requests), sum(len(one["prompt"]) for one in requests)
    print(f"{found['date']}, {found['processor']}, {found['threads']} threads, load {found['load'][0]:.1f} before and "
          f"{found['load'][1]:.1f} after")
    arriving = f"{found['rate']} a second" if found["rate"] else "all at once"
    print(f"{found['model']}: {len(requests)} requests, {arriving}; {read:,} tokens of prompts, {made:,} made; the longest "
          f"{found['longest']:,}; caches of {format_bytes(found['memory'])}\n{race_table(found['race'], requests)}")
    for racer in found["race"]:
        print(f"{racer.name}: {racer.failed or racer.about.get('why', '')}")
    if rows := found["agreement"]:
        print("\n" + str(Table([{"": name, **row} for name, row in rows.items()],
                               dict.fromkeys(("requests", "tokens"), "{:.1%}".format))))
    if rows := found["simulated"]:
        print(f"\nsimulated. {rows[0]['fitted']}")
        print(Table([{name: value for name, value in row.items() if name != "fitted"} for row in rows],
                    dict.fromkeys(("simulated", "measured", "running"), "{:.1f}".format) | {"ratio": "{:.2f}".format}
                    | dict.fromkeys(("reserved", "wasted", "padded rows"), "{:.1%}".format)))
    if rows := wanted(found):
        print("\n" + str(Table(rows, dict.fromkeys(("median", "best", "processors", "at least"), "{:.2f}".format))))


def kept(found: dict) -> dict:
    """Everything, as JSON has it, but for paths and tokens."""
    def turn(one: dict) -> dict:
        return {key: value for key, value in one.items() if key not in ("requests", "steps")} | {
            "requests": [[made[name] and round(made[name], 3) for name in ("at", "first", "last")] for made in one["requests"]]}

    race = [{"name": racer.name, "failed": racer.failed, "about": racer.about, "rounds": [turn(one) for one in racer.rounds],
             "settings": {key: value for key, value in racer.job.items() if key not in ("path", "program")}}
            for racer in found["race"]]
    requests = [[one["at"], len(one["prompt"]), one["output"]] for one in found["requests"]]
    return found | {"race": race, "requests": requests, "wanted": wanted(found)}


def load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(names=NAMES, count: int = 64, scale: float = 0.25, seed: int = 0, rate: float | None = None,
            memory: int = 128 * MIB, kv: str = "f32", dtype: str | None = None, sequences: int = 48, rows: int = 256,
            rounds: int = 3, threads: int | None = None) -> dict:
    here, before, threads = machine(), load(), threads or os.cpu_count()
    path = llmlab.fetch("smollm2-135m", progress=False)
    arrivals = sharegpt_like(count, seed=seed, scale=scale, rate=rate)
    requests = requests_of(path, arrivals)
    longest = max(len(one["prompt"]) + one["output"] for one in requests)
    racers = race(racers_of(names, path, longest, memory, kv, sequences, rows, threads, dtype), requests, rounds)
    ran = {racer.name: racer for racer in racers if racer.rounds}
    told = [name for name in ran if PAGED in ran and name not in (PAGED, SERVER)]        # whose tokens are known
    alike = {name: agreement(ran[PAGED].tokens, ran[name].tokens) for name in told}
    try:
        steps = simulated(racers, arrivals) if PAGED in ran else []
    except LabError as error:
        say(f"not simulated: {error}")
        steps = []
    return {"date": str(date.today()), "processor": here.cpu.name, "cores": here.cpu.cores, "threads": threads,
            "versions": here.versions, "waiting": waiting(), "model": path.name, "scale": scale, "seed": seed, "rate": rate,
            "memory": memory, "requests": requests, "longest": longest, "race": racers, "agreement": alike,
            "simulated": steps,
            "load": (before, load())}


# ---- as tests ---------------------------------------------------------------------------------------------------

QUICK = {"count": 12, "scale": 0.1, "memory": 16 * MIB, "sequences": 8, "rounds": 1}


def test_everyone_makes_as_many_tokens(capsys):
    """Who is here answers all requests in full; ours with the same tokens whoever is beside them."""
    names = [name for name in NAMES if name != LLAMA or llama_server.target().is_file()]
    found = measure(names, **QUICK)
    with capsys.disabled():
        show(found)
    assert [racer.failed for racer in found["race"]] == [None] * len(names)
    for racer in found["race"]:
        assert [len(tokens) for tokens in racer.tokens] == [one["output"] for one in found["requests"]]
    assert found["agreement"][STATIC]["tokens"] == found["agreement"][ALONE]["tokens"] == 1
    assert json.loads(json.dumps(kept(found)))["wanted"]


def target(found: dict) -> Path:
    """results/serving-<date>-<processor>.json"""
    name = re.sub(r"[^a-z0-9]+", "-", found["processor"].lower()).strip("-")
    return Path(__file__).parent / "results" / f"serving-{found['date']}-{name}-{found['cores']}-cores.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=64, help="requests")
    parser.add_argument("--scale", type=float, default=0.25, help="of their lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, help="requests a second; all at once unless it is given")
    parser.add_argument("--memory", default="128 MiB", help="for each one's cache")
    parser.add_argument("--kv", default="f32", help="type of llmlab's cache")
    parser.add_argument("--dtype", help="in which llmlab multiplies (default: what this processor multiplies well)")
    parser.add_argument("--sequences", type=int, default=48, help="that run together at most; llama.cpp's slots")
    parser.add_argument("--rows", type=int, default=256, help="tokens of a step at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", default=",".join(NAMES), help="who takes part")
    parser.add_argument("--quick", action="store_true", help="a dozen short requests, once")
    parser.add_argument("--save", action="store_true", help="keep it in results/")
    parser.add_argument("--json", type=Path, help="keep it there")
    asked = parser.parse_args()
    names = [name.strip() for name in asked.only.split(",")]
    if wrong := [name for name in names if name not in NAMES]:
        parser.error(f"{wrong[0]!r} is nobody; there are {', '.join(NAMES)}")
    given = {"count": asked.count, "scale": asked.scale, "memory": parse_bytes(asked.memory), "sequences": asked.sequences,
             "rounds": asked.rounds}
    found = measure(names, **(QUICK if asked.quick else given), seed=asked.seed, rate=asked.rate, kv=asked.kv,
                    dtype=asked.dtype, rows=asked.rows, threads=asked.threads)
    show(found)
    for place in (asked.json, target(found) if asked.save else None):
        if place:
            place.write_text(json.dumps(kept(found), indent=1) + "\n")
            print(f"kept in {place}")


if __name__ == "__main__":
    main()
