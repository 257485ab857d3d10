"""llmlab's decoder beside llama.cpp and others on the same files: what was reached, what is wanted, how exact it stays.

    python tests/bench/bench_decoder.py [--quants Q4_0,Q4_K_M] [--strategy LIST] [--rounds N] [--quick] [--save] [--json FILE]

Runs `llmlab bench` on a written llama of the 1B class in several quants and on SmolLM2, each with llama.cpp in the same rounds,
then prints a line for each kind of work: the strategy that did best, the bytes it held, its speed as a multiple of the peer's
(median of the rounds; of the fastest rounds), what is asked for at least and aimed at, and the KL divergence from float32.
--save keeps everything in results/. Nothing here fails for being slow. Needs the extra `peers`.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
for folder in (TOP, TOP / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import billion  # noqa: E402

import llmlab  # noqa: E402
from llmlab.benching import Bench, bench  # noqa: E402
from llmlab.benching.result import DECODE, PREFILL, Lane  # noqa: E402
from llmlab.catalog import Table  # noqa: E402
from llmlab.units import format_bytes  # noqa: E402

pytestmark = pytest.mark.bench

QUANTS = ("Q4_0", "Q4_1", "Q4_K_M", "IQ4_XS", "Q3_K_S", "Q6_K", "Q8_0")
SMOL = "SmolLM2 Q4_1"
STRATEGIES = "fast,compact,compiled,compiled-compact"
DEEP = ("Q4_K_M", SMOL)  # also after 4096 tokens
WANTED = (               # work, files, strategies, beside whom, at least, aimed at
    (DECODE, ("Q4_0", "Q4_1"), "fast", "llama.cpp", 0.9, 1.2),
    (DECODE, ("Q4_K_M",), "fast", "llama.cpp", 0.8, 1.2),
    (DECODE, ("IQ4_XS", "Q3_K_S", "Q6_K", "Q8_0"), "fast", "llama.cpp", 0.5, 1.0),
    (DECODE, QUANTS, "compact", "llama.cpp", 0.3, 0.8),
    (PREFILL, ("Q4_0", "Q4_K_M"), "fast", "llama.cpp", 1.2, 1.8),
    (PREFILL, ("IQ4_XS", "Q3_K_S"), "fast", "llama.cpp", 0.8, 1.1),
    (DECODE, (SMOL,), "fast", "llama.cpp", 0.6, 1.0),
    (PREFILL, (SMOL,), "fast", "llama.cpp", 1.5, 4.0),
    (DECODE, (SMOL,), "fast", "transformers", 10.0, 20.0),
)


def race(quants=QUANTS, strategies: str = STRATEGIES, smol: bool = True, say=lambda text: None, **settings) -> dict[str, Bench]:
    """{file: what came of it}, each 1B file written for its own race and gone after it."""
    found = {}
    for quant in quants:
        with tempfile.TemporaryDirectory() as folder:
            path = billion.write(Path(folder) / f"llama-1b-{quant}.gguf", quant)
            deep = {} if quant in DEEP or "deep" in settings else {"deep": 0}
            found[quant] = bench(path, peers="llama.cpp", strategies=strategies,
                                 progress=lambda text, quant=quant: say(f"{quant}: {text}"), **settings | deep)
    if smol:
        found[SMOL] = bench(llmlab.fetch("smollm2-135m", progress=False), peers="llama.cpp,transformers,nf4,bf16",
                            strategies=f"{strategies},modules", progress=lambda text: say(f"{SMOL}: {text}"), **settings)
    return found


def compact(lane: Lane) -> bool:
    return "compact" in lane.name


def rows(found: dict[str, Bench]) -> list[dict]:
    """A row for each kind of work and file that ran."""
    made = []
    for work, files, strategy, peer, least, aim in WANTED:
        for file in files:
            if file not in found:
                continue
            run = found[file]
            ran = [(ratio, lane) for lane in run.lanes if lane.ours and not lane.name.startswith("modules")
                   and (strategy == "fast" or compact(lane)) and (ratio := run.ratio(lane, work, peer))]
            if not ran:
                continue
            ratio, lane = max(ran, key=lambda one: one[0].median)
            made.append({"work": f"{work} {file}", "asked": strategy, "did best": lane.name, "resident": lane.resident,
                         "x file": lane.resident and lane.resident / run.file_bytes, "tokens/s": lane.rate(work),
                         "beside": peer, "median": ratio.median, "fastest": ratio.best, "at least": least, "aim": aim,
                         "": "" if ratio.median >= aim else "below aim" if ratio.median >= least else "BELOW",
                         "KLD": lane.kld_decode if work == DECODE else lane.kld_prefill})
    return made


def table(made: list[dict]) -> Table:
    return Table(made, {"resident": format_bytes, "KLD": "{:.1e}".format, "tokens/s": "{:.1f}".format}
                 | dict.fromkeys(("x file", "median", "fastest"), "{:.2f}".format))


def target(found: dict[str, Bench]) -> Path:
    """results/decoder-<date>-<processor>.json"""
    one = next(iter(found.values()))
    name = re.sub(r"[^a-z0-9]+", "-", one.processor.lower()).strip("-")
    return Path(__file__).parent / "results" / f"decoder-{one.date[:10]}-{name}-{one.cores}-cores.json"


def kept(found: dict[str, Bench]) -> dict:
    """Everything, as JSON has it: what ran it, the rows, every race. No paths."""
    one = next(iter(found.values()))
    return {"date": one.date, "processor": one.processor, "cores": one.cores, "features": one.features,
            "versions": one.versions, "rows": rows(found),
            "races": {file: run.to_dict() | {"path": Path(run.path).name} for file, run in found.items()}}


def test_beside_llama_cpp(capsys):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; install the extra `peers`")
    found = race(("Q4_0",), "fast,compact", quick=True)
    made = rows(found)
    assert {row["work"] for row in made} >= {"decode Q4_0", "prefill Q4_0", f"decode {SMOL}"}
    with capsys.disabled():
        print(f"\n{table(made)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quants", default=",".join(QUANTS), help="of the written model; none: SmolLM2 alone")
    parser.add_argument("--strategy", default=STRATEGIES)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--deep", type=int, help="context after which is written again (4096 for some of them; 0: not)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-smol", action="store_true", help="the written model alone")
    parser.add_argument("--save", action="store_true", help="keep it in results/")
    parser.add_argument("--json", type=Path, help="keep it there")
    asked = parser.parse_args()
    settings = {name: value for name in ("threads", "rounds", "deep") if (value := getattr(asked, name)) is not None}
    quants = () if asked.quants == "none" else tuple(asked.quants.split(","))
    found = race(quants, asked.strategy, not asked.no_smol, lambda text: print(text, file=sys.stderr, flush=True),
                 quick=asked.quick, **settings)
    for run in found.values():
        print(f"{run!r}\n")
    print(table(rows(found)))
    for place in (asked.json, target(found) if asked.save else None):
        if place:
            place.write_text(json.dumps(kept(found), indent=1) + "\n")
            print(f"kept in {place}")


if __name__ == "__main__":
    main()
