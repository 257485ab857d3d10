"""Reading pieces from a cold file, beside what calibration measures of the same file with the same method and threads.

    python tests/bench/bench_reading.py [--json FILE] [--size MIB] [--piece MIB] [--chunk MIB ...] [--at FOLDER]

Two buffers take turns, as slots do: while one piece is waited for the next is on its way. Rounds of both sides alternate, so
that other work on the machine meets both; medians are printed, and of the rounds' ratios too. Nothing fails for being slow.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
if str(TOP) not in sys.path:
    sys.path.insert(0, str(TOP))

import numpy as np  # noqa: E402

import llmlab  # noqa: E402
from llmlab import places  # noqa: E402
from llmlab.calibration import disk  # noqa: E402
from llmlab.gguf.local import LocalFile  # noqa: E402
from llmlab.offload import reading  # noqa: E402
from llmlab.offload.pieces import Extent, Piece  # noqa: E402
from llmlab.units import GB, GIB, MIB  # noqa: E402

pytestmark = pytest.mark.bench

ROUNDS, SIZE, PIECE = 5, 1024 * MIB, 48 * MIB
THREADS = (1, 2, 4)


def pieces(size: int, each: int) -> list[Piece]:
    """A file as layers that lie one after another."""
    return [Piece(f"blk.{number}", each, (), (Extent(0, start, min(each, size - start), 0),))
            for number, start in enumerate(range(0, size, each))]


Rate = tuple[float, float]          # bytes per second of the clock, and of the processor


def rate(bytes: int, start: float, used: float) -> Rate:
    return bytes / (time.perf_counter() - start), bytes / max(1e-3, time.process_time() - used)


def ours(path: str, layers: list[Piece], threads: int, direct: bool) -> Rate:
    """Opening the file and starting the threads is not in it, as calibration leaves out its own."""
    buffers = [reading.buffer(layers[0].bytes) for _ in range(2)]
    for buffer in buffers:
        buffer.fill_(1)         # pages are there, as those of slots are after the first pass
    with reading.Readers([LocalFile.look(path)], threads, direct) as readers:
        if readers.why:
            raise SystemExit(readers.why)
        start, used = time.perf_counter(), time.process_time()
        tickets = [readers.fetch(layer, buffer) for layer, buffer in zip(layers, buffers, strict=False)]
        for number in range(len(layers)):
            tickets[number].wait()
            if number + 2 < len(layers):
                tickets.append(readers.fetch(layers[number + 2], buffers[number % 2]))
        return rate(sum(layer.extents[0].bytes for layer in layers), start, used)


def measure(size: int = SIZE, piece: int = PIECE, chunks: tuple[int, ...] = (), folder: Path | None = None,
            rounds: int = ROUNDS) -> dict:
    folder = folder or places.cache()
    folder.mkdir(parents=True, exist_ok=True)
    chunks = chunks or (reading.CHUNK,)
    cases: dict[str, dict[str, list[Rate]]] = {}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = str(Path(name) / "file")
        with open(path, "wb") as file:
            block = np.random.default_rng(0).bytes(32 * MIB)
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        chunk, refused, warm = disk._chunk(path, size), disk._no_direct(path), 0.0
        layers = pieces(size, piece)
        for method in ("buffered", *(() if refused else ("direct",))):
            for threads in THREADS:
                case = cases[f"{method}, {threads} threads"] = {}
                for turn in range(rounds):
                    sides = ["calibration", *chunks]
                    for side in sides[turn % len(sides):] + sides[:turn % len(sides)]:
                        warm = max(warm, disk.drop(path, size) or 0.0)
                        if side == "calibration":
                            start, used = time.perf_counter(), time.process_time()
                            found = rate(disk._round(path, method, threads, size, chunk, 0, 600.0)[0], start, used)
                        else:
                            reading.CHUNK = side
                            found = ours(path, layers, threads, method == "direct")
                        case.setdefault(side if isinstance(side, str) else f"readers, {side / MIB:g} MiB", []).append(found)
    here = llmlab.machine()
    return {"date": date.today().isoformat(), "cpu": here.cpu.name, "cores": here.cpu.usable, "load": os.getloadavg()[0],
            "in_the_page_cache_before": warm, "direct": refused or "taken", "bytes": size, "piece": piece,
            "calibration_chunk": chunk, "cases": cases}


def show(found: dict) -> None:
    print(f"{found['date']}, {found['cpu']}, {found['cores']} cores, load {found['load']:.1f}; a cold file of "
          f"{found['bytes'] / MIB:.0f} MiB in pieces of {found['piece'] / MIB:.0f}; O_DIRECT: {found['direct']}; at most "
          f"{found['in_the_page_cache_before']:.2%} in the page cache before; calibration reads "
          f"{found['calibration_chunk'] / MIB:g} MiB at once")
    for case, sides in found["cases"].items():
        print(case)
        base = [each[0] for each in sides["calibration"]]
        for side, both in sides.items():
            rates, busy = [each[0] for each in both], statistics.median(GIB / each[1] for each in both)
            ratio = statistics.median(mine / its for mine, its in zip(rates, base, strict=True))
            print(f"  {side:<20} {statistics.median(rates) / GB:6.2f} GB/s ({min(rates) / GB:.2f} to {max(rates) / GB:.2f}), "
                  f"{busy:.2f} s of the processor a GiB"
                  + ("" if side == "calibration" else f"   of calibration's: {ratio:.2f} (medians "
                     f"{statistics.median(rates) / statistics.median(base):.2f}, best {max(rates) / max(base):.2f})"))


def test_readers_beside_calibration():
    show(measure())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--size", type=int, default=SIZE // MIB, help="MiB of the file")
    parser.add_argument("--piece", type=int, default=PIECE // MIB, help="MiB of a piece")
    parser.add_argument("--chunk", type=float, nargs="*", default=[], help="MiB read at once")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--at", type=Path, help="folder on the disk to read from")
    asked = parser.parse_args()
    result = measure(asked.size * MIB, asked.piece * MIB, tuple(int(each * MIB) for each in asked.chunk), asked.at,
                     asked.rounds)
    show(result)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
