"""A model larger than the memory it may use: llmlab's stream beside llama.cpp on the mapped file and accelerate's disk offload.

    python tests/bench/bench_offload.py [--only race,disk,ram,placements] [--model 2b] [--quant Q8_0] [--limit 1GiB]
                                        [--rounds 3] [--new 3] [--threads N] [--folder DIR] [--save] [--json FILE]
                                        [--shown FILE]

*race*: whole tokens of a written llama (1.9 B weights, `WIDE`), everyone in a process of its own inside a memory group of the
system (cgroup) of the same size, page cache counted; each round opens everyone anew, nothing of the files in the page cache.
accelerate runs the same numbers in bfloat16. Bytes are what the system read from the disk for that process. *disk*: pieces are
read into slots beside what calibration reads of the same file, in turns. *ram*: layers are copied from RAM into slots beside
a plain copy. *placements*: tokens per second that the plan predicts and that were measured. Ratios above 1 mean that
llmlab is quicker. Nothing here fails for being slow.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from statistics import median

import pytest

TOP = Path(__file__).resolve().parents[2]
for folder in (TOP, TOP / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from llmlab.benching.children import Child, waiting  # noqa: E402

os.environ |= waiting()                        # before torch starts its threads

import billion  # noqa: E402
import limited  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import llmlab  # noqa: E402
from llmlab import machine  # noqa: E402
from llmlab.calibration import disk  # noqa: E402
from llmlab.catalog import Table  # noqa: E402
from llmlab.errors import LabError  # noqa: E402
from llmlab.formats import dequantize  # noqa: E402
from llmlab.gguf import GGUFFile, read_gguf  # noqa: E402
from llmlab.offload.opening import Offloaded, open_decoder  # noqa: E402
from llmlab.offload.pieces import pieces_of  # noqa: E402
from llmlab.offload.placement import Placement  # noqa: E402
from llmlab.offload.planning import Plan  # noqa: E402
from llmlab.offload.reading import buffer  # noqa: E402
from llmlab.units import MIB, format_bytes, parse_bytes  # noqa: E402

pytestmark = pytest.mark.bench

ENGINES = Path(__file__).resolve().with_name("offload_engines.py")
WIDE = billion.CONFIG | {"hidden_size": 2560, "num_hidden_layers": 24, "intermediate_size": 8192, "num_attention_heads": 20,
                         "num_key_value_heads": 4, "vocab_size": 8192}
MODELS = {"1b": billion.CONFIG, "2b": WIDE}
SPARE = 384 * MIB        # of the limit: Python, torch and what reading through the page cache takes
SPARE_PEER = 640 * MIB   # the same with transformers, and the layer that accelerate moves
CONTEXT = 512            # tokens that there is room for
BOUND = 0.7              # share of what the disk gives, from which on it is what binds


# ---- everyone in a process of its own, inside a limit ---------------------------------------------------------------

class Limited(Child):
    """A process of offload_engines.py, inside a memory group where there is one."""

    def __init__(self, name: str, engine: str, threads: int, inside: limited.Group | None):
        command = [sys.executable, str(ENGINES), engine]
        if inside:
            command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(inside.procs), *command]
        path = os.pathsep.join(filter(None, (str(TOP), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)} | waiting()
        self.name, self._words = name, tempfile.TemporaryFile()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words,
                                         env=environment, text=True, encoding="utf-8", errors="replace")


@dataclass
class Racer:
    """One that takes part; what came of it: a dict a round, as `offload_engines.Commands.write` gives it."""

    name: str
    engine: str
    job: dict
    files: list[str]         # whose pages are dropped before it runs
    failed: str | None = None
    about: dict = field(default_factory=dict)
    rounds: list[dict] = field(default_factory=list)
    likeliest: dict = field(default_factory=dict)

    @property
    def seconds(self) -> list[float]:
        """Of the median token of each round: one that has to wait for the disk has no lucky one."""
        return [median(one["each"]) for one in self.rounds]

    @property
    def moved(self) -> float:
        """Bytes a token, of the median round."""
        return median(one["moved"] / len(one["each"]) for one in self.rounds)


def race(racers: list[Racer], limit: int | None, rounds: int, new: int, threads: int) -> list[Racer]:
    """All take turns, each round beginning with another one, everyone opened anew; `limit` None: no group."""
    tokens = [8 + n * 79 % 200 for n in range(3 + new)]
    for turn in range(rounds):
        start = turn % len(racers)
        for racer in racers[start:] + racers[:start]:
            if racer.failed:
                continue
            say(f"round {turn + 1}: {racer.name}")
            for file in racer.files:
                disk.drop(file, os.path.getsize(file))
            with limited.group(limit) if limit else contextlib.nullcontext() as group:
                child = Limited(racer.name, racer.engine, threads, group)
                try:
                    opened = child.ask("open", job=racer.job | {"threads": threads, "context": CONTEXT})
                    racer.about = opened["about"]
                    racer.likeliest = child.ask("likeliest", tokens=tokens[:3])
                    found = child.ask("write", tokens=tokens[3:])
                    racer.rounds.append(found | {"open": opened["seconds"], "group_peak": group and group.peak})
                    child.ask("close")
                except LabError as error:
                    killed = f"; the system killed {group.kills} for memory" if group and group.kills else ""
                    racer.failed = f"{error}{killed}"
                finally:
                    child.close()
    return racers


def prepare(racer: Racer, threads: int) -> None:
    """Open it once without a limit: what is laid out anew and compiled for this model is then there."""
    say(f"opening {racer.name} for the first time")
    child = Limited(racer.name, racer.engine, threads, None)
    try:
        opened = child.ask("open", job=racer.job | {"threads": threads, "context": CONTEXT})
        child.ask("likeliest", tokens=[8, 9])
        racer.files = sorted({*racer.files, *opened["about"]["read_from"]})
    except LabError as error:
        racer.failed = str(error)
    finally:
        child.close()


def sixteen(file: GGUFFile, folder: Path) -> Path:
    """The numbers of a llama's GGUF in bfloat16 as transformers keeps them: a safetensors file, written a tensor at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = {key.partition(".")[2]: value for key, value in file.metadata.items()}
    heads, kv_heads = keys["attention.head_count"], keys["attention.head_count_kv"]
    (folder / "config.json").write_text(json.dumps(WIDE | {
        "dtype": "bfloat16", "hidden_size": keys["embedding_length"], "num_hidden_layers": keys["block_count"],
        "intermediate_size": keys["feed_forward_length"], "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": file.tensors["token_embd.weight"].shape[1]}))
    parts = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
             **{f"attn_{one}": f"self_attn.{one}_proj" for one in "qkv"},
             **{f"ffn_{one}": f"mlp.{one}_proj" for one in ("gate", "up", "down")}}
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    header, at = {}, 0
    for name, tensor in file.tensors.items():
        stem = name.removesuffix(".weight").split(".")
        new = whole[stem[0]] if stem[0] in whole else f"model.layers.{stem[1]}.{parts[stem[2]]}"
        size = 2 * tensor.elements
        header[f"{new}.weight"] = {"dtype": "BF16", "shape": tensor.shape[::-1], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in file.tensors.items():
            raw = torch.frombuffer(bytearray(file.sources[tensor.shard].read(tensor.offset, tensor.bytes)), dtype=torch.uint8)
            rows = tensor.shape[1] if len(tensor.shape) > 1 else 1
            numbers = dequantize(raw.view(rows, -1), tensor.type, dtype=torch.float32)
            if ".attn_q." in name or ".attn_k." in name:       # a Llama's GGUF has what turns together side by side
                count = heads if ".attn_q." in name else kv_heads
                numbers = numbers.view(count, -1, 2, numbers.shape[-1]).transpose(1, 2).reshape(numbers.shape)
            out.write(numbers.bfloat16().view(torch.int16).numpy().tobytes())
        out.flush()
        os.fsync(out.fileno())
    return folder


def racers_of(path: Path, folder: Path, limit: int, method: str, readers: int) -> list[Racer]:
    """llmlab in each layout, llama.cpp, accelerate."""
    file, how = read_gguf(path), {"readers": readers, "direct": method == "direct"}
    ours = {"path": str(path), "budget": limit - SPARE, "reading": how}
    found = [Racer(f"llmlab {layout}", "ours", ours | {"layout": layout}, [str(path)]) for layout in ("gguf", "words")]
    found.append(Racer("llama.cpp mmap", "llama", {"path": str(path)}, [str(path)]))
    layer = 2 * sum(t.elements for t in file.tensors.values() if t.name.startswith("blk.0."))
    ends = 2 * sum(t.elements for t in file.tensors.values() if not t.name.startswith("blk."))
    resident = min(file.metadata[f"{file.architecture}.block_count"], max(0, (limit - SPARE_PEER - ends) // layer - 1))
    say("writing the numbers in 16 bits")
    weights = sixteen(file, folder / "sixteen")
    found.append(Racer("accelerate disk", "accelerate", {"path": str(weights), "resident": resident,
                                                         "folder": str(folder / "offload")},
                       [str(weights / "model.safetensors")]))
    return found


# ---- the disk and RAM alone -----------------------------------------------------------------------------------------

def streamed(model: Offloaded, kind: str) -> float:
    """Bytes a second of a pass without computing: every piece brought into its slot, in order, as fast as they come."""
    slots = model.parts.slots
    slots.settle()
    model.trace.clear()
    start = time.perf_counter()
    for step in range(len(model.weights.shapes) + 1):
        slots.turn(step)
    slots.rest()                               # what it begins of the next pass counts too
    slots.settle()
    took = time.perf_counter() - start
    return model.trace.totals()[kind].bytes / took


def disk_turns(path: Path, rounds: int, threads=(1, 2, 4), slots: int = 3) -> list[dict]:
    """The stream beside calibration's own reading of the same file, in turns, both cold: a row a method and thread count,
    {"method", "threads", "calibration": bytes a second of each round, "pieces": the same}."""
    file, size, found = read_gguf(path), os.path.getsize(path), []
    chunk = disk._chunk(str(path), size)
    for method in ("buffered", "direct"):
        for number in threads:
            row = {"method": method, "threads": number, "calibration": [], "pieces": [], "cold": True}
            with open_decoder(file, Placement({}, slots, readers=number, direct=method == "direct", context=CONTEXT)) as model:
                for _ in range(rounds):
                    row["cold"] &= (disk.drop(str(path), size) or 0) < disk.COLD
                    read, took, _ = disk._round(str(path), method, number, size, chunk, 0, 3600.0)
                    row["calibration"].append(read / took)
                    row["cold"] &= (disk.drop(str(path), size) or 0) < disk.COLD
                    row["pieces"].append(streamed(model, "read"))
            found.append(row)
    return found


def ram_turns(path: Path, rounds: int) -> dict:
    """Layers from RAM beside plain copies of the same buffers, one after another, in turns: bytes a second of each round."""
    file = read_gguf(path)
    pieces = list(pieces_of(file).values())
    found = {"copy": [], "layers": []}
    with open_decoder(file, Placement(dict.fromkeys((piece.name for piece in pieces), "ram"), 2, context=CONTEXT)) as model:
        held, into = list(model.parts.mover.held.values()), buffer(max(piece.bytes for piece in pieces))
        for turn in range(5 * rounds + 1):     # the first does not count
            start = time.perf_counter()
            for one in held:
                np.copyto(into[:one.nbytes].numpy(), one.numpy())
            took, rate = time.perf_counter() - start, streamed(model, "copy")
            if turn:
                found["copy"].append(sum(one.nbytes for one in held) / took)
                found["layers"].append(rate)
    return found


# ---- predicted against measured -------------------------------------------------------------------------------------

def placements(path: Path, count: int, rounds: int, new: int, threads: int, group: bool, stores: set[str],
               layouts=("gguf", "words")) -> list[dict]:
    """Plans in each layout for so many budgets from the least to all of it, predicted and then run, each inside a limit:
    {"layout", "budget", "stay": pieces on the device, "low", "predicted", "high", "measured", "rounds": tokens per second of
    each, "resident": what all of it on the device gave just before, which the prediction knows, "unmeasured": what is predicted
    without that, "binds"}. `stores`: files that it has written."""
    found = []

    def ran(name: str, plan: Plan, limit: int | None) -> Racer:
        racer = Racer(name, "ours", {"path": str(path), "placement": asdict(plan.placement)}, [str(path)])
        if plan.layout == "words":
            prepare(racer, threads)
            stores.update({*racer.files} - {str(path)})
        race([racer], limit if group else None, rounds, new, threads)
        if racer.failed:
            say(f"{racer.name}: {racer.failed}")
        return racer

    here = machine()
    for layout in layouts:
        say(f"calibrating, before {layout}")
        lately = replace(here, calibration=here.calibrate(progress=False, store=False))     # other hours, other rates
        about = {"machine": lately, "gpu": "none", "ram_budget": 0, "context": CONTEXT,
                 "layout": layout}      # the rest is on the disk
        whole = llmlab.plan(str(path), **about)
        pieces = [layer.bytes for layer in whole.shape.layers]
        least = whole.needs.fixed + whole.needs.cache + 2 * max(pieces)
        for step in range(count):
            budget = int(least + step / count * sum(pieces))
            resident = ran(f"{layout}, all of it", whole, None)        # what computing takes in this very minute
            if resident.failed:
                continue
            plan = llmlab.plan(str(path), gpu_budget=budget, resident=1 / median(resident.seconds), **about)
            racer = ran(f"{layout} {format_bytes(budget)}", plan, budget + SPARE)
            if racer.failed:
                continue
            low, predicted, high = plan.predict().decode
            found.append({"layout": layout, "budget": budget, "stay": racer.about["placed"].get("device", 0),
                          "low": low, "predicted": predicted, "high": high, "measured": 1 / median(racer.seconds),
                          "rounds": [1 / seconds for seconds in racer.seconds], "resident": 1 / median(resident.seconds),
                          "unmeasured": llmlab.plan(str(path), gpu_budget=budget, **about).predict().decode,
                          "binds": plan.predict().binds[0]})
    return found


# ---- what follows -----------------------------------------------------------------------------------------------

def bound(racer: Racer, cold: float, threads: int) -> tuple[str, float, float]:
    """(what binds, share of the disk's rate, share of the processors' time): "disk" where the bytes it moved took most of the
    time at the rate that calibration had cold, "processor" where its threads were busy, "neither" where both waited. By its
    trace ours may be "computing" most of the time though others had the processors: "processor" too."""
    seconds, cpu = sum(sum(one["each"]) for one in racer.rounds), sum(one["cpu"] for one in racer.rounds)
    disk_share = sum(one["moved"] for one in racer.rounds) / seconds / cold
    cpu_share = cpu / seconds / threads
    if any(one["trace"] for one in racer.rounds):
        computing = sum(one["trace"]["busy"]["compute"] for one in racer.rounds) / seconds
        if computing >= BOUND > disk_share:
            return "processor", disk_share, cpu_share
    most = max(disk_share, cpu_share)
    return ("neither" if most < BOUND else "disk" if disk_share >= cpu_share else "processor"), disk_share, cpu_share


def race_table(racers: list[Racer], cold: float, threads: int) -> Table:
    rows = []
    for racer in (one for one in racers if one.rounds):
        by, disk_share, cpu_share = bound(racer, cold, threads)
        seconds, ours = median(racer.seconds), racer.rounds[-1]["trace"]
        rows.append({"": racer.name, "s/token": seconds, "best": min(racer.seconds), "GB/token": racer.moved / 1e9,
                     "GB/s": racer.moved / seconds / 1e9, "of cold": disk_share, "processors": cpu_share, "bound by": by,
                     "peak MiB": max((one["group_peak"] or one["peak"]) for one in racer.rounds) / MIB,
                     "reading": ours and ours["busy"]["read"] / sum(racer.rounds[-1]["each"]),
                     "waiting": ours and ours["busy"]["wait"] / sum(racer.rounds[-1]["each"]),
                     "open s": min(one["open"] for one in racer.rounds)})
    return Table(rows, dict.fromkeys(("s/token", "best"), "{:.3f}".format)
                 | dict.fromkeys(("GB/token", "GB/s"), "{:.2f}".format)
                 | dict.fromkeys(("of cold", "processors", "reading", "waiting"), "{:.0%}".format)
                 | {"peak MiB": "{:.0f}".format, "open s": "{:.1f}".format})


def paired(row: dict) -> float:
    """The median of each round's ratio."""
    return median(ours / theirs for ours, theirs in zip(row["pieces"], row["calibration"], strict=True))


def wanted(found: dict) -> list[dict]:
    """What is asked for, and what came: a line each, "BELOW" where it did not."""
    rows = []

    def add(what: str, value: float, least: float, more: str = "") -> None:
        rows.append({"what": what, "ratio": value, "at least": least, "": "BELOW" if value < least else "", "and": more})

    if racers := {racer.name: racer for racer in found.get("race", ()) if racer.rounds}:
        threads, cold = found["threads"], found["cold"]
        for name, racer in racers.items():
            if not name.startswith("llmlab"):
                continue
            by = bound(racer, cold, threads)[0]
            if other := racers.get("accelerate disk"):
                add(f"{name} beside accelerate", median(other.seconds) / median(racer.seconds),
                    other.moved / max(1, racer.moved), "the ratio of bytes moved is asked for")
            if other := racers.get("llama.cpp mmap"):
                add(f"{name} beside llama.cpp", median(other.seconds) / median(racer.seconds), 1 / 1.5,
                    f"bound by: {by}; llama.cpp by: {bound(other, cold, threads)[0]}; "
                    f"{other.moved / max(1, racer.moved):.2f} times as many bytes moved there")
    if disks := found.get("disk"):
        best = max(disks, key=lambda row: median(row["calibration"]))
        add(f"pieces from the disk beside calibration ({best['method']}, {best['threads']} threads)",
            paired(best), 0.9,
            f"median of {len(best['pieces'])} pairs; of the best of each {max(best['pieces']) / max(best['calibration']):.2f}")
    if ram := found.get("ram"):
        add("layers from RAM beside plain copies, best of each", max(ram["layers"]) / max(ram["copy"]), 0.9,
            f"of the medians {median(ram['layers']) / median(ram['copy']):.2f}")
    if places := found.get("placements"):
        good = [row for row in places if abs(row["predicted"] / row["measured"] - 1) <= 0.15]
        add(f"placements of {len(places)} predicted within 15 %", len(good) / len(places), 1.0,
            ", ".join(f"{row['predicted'] / row['measured']:.2f}" for row in places))
    return rows


def show(found: dict) -> None:
    print(f"{found['date']}, {found['processor']}, {found['threads']} threads, load {found['load'][0]:.1f} before and "
          f"{found['load'][1]:.1f} after")
    if "race" in found:
        kept = format_bytes(found["limit"]) if found["group"] else f"not kept ({found['why']})"
        print(f"\n{found['model']}: file {format_bytes(found['file'])}, limit {kept}, cold {found['cold'] / 1e9:.2f} GB/s "
              f"({found['cold_how']})\n{race_table(found['race'], found['cold'], found['threads'])}")
        for racer in found["race"]:
            print(f"{racer.name}: {racer.failed or racer.about.get('why', '')}"
                  + (f"; {racer.about['placed']}, {racer.about['slots']} slots, {racer.about['readers']} readers"
                     f"{', direct' * racer.about['direct']}" if "placed" in racer.about else "")
                  + (f"; likeliest {racer.likeliest['tokens'][:3]}" if racer.likeliest else ""))
    if rows := found.get("disk"):
        table = [{"method": row["method"], "threads": row["threads"], "cold": row["cold"],
                  "calibration GB/s": max(row["calibration"]) / 1e9, "pieces GB/s": max(row["pieces"]) / 1e9,
                  "median of pairs": paired(row)} for row in rows]
        print("\nthe disk: best of each\n" + str(Table(table, dict.fromkeys(
            ("calibration GB/s", "pieces GB/s", "median of pairs"), "{:.2f}".format))))
    if ram := found.get("ram"):
        print(f"\nRAM: layers {max(ram['layers']) / 1e9:.1f} GB/s, plain copies {max(ram['copy']) / 1e9:.1f} GB/s")
    if places := found.get("placements"):
        print("\nplacements: tokens per second\n" + str(Table(
            [{key: value for key, value in row.items() if key != "rounds"} for row in places],
            dict.fromkeys(("predicted", "low", "high", "measured", "resident"), "{:.2f}".format)
            | {"budget": format_bytes, "unmeasured": lambda band: f"{band[0]:.2f} to {band[2]:.2f}"})))
    if rows := wanted(found):
        print("\n" + str(Table(rows, dict.fromkeys(("ratio", "at least"), "{:.2f}".format))))


def kept(found: dict) -> dict:
    """Everything, as JSON has it. No paths."""
    hidden = ("job", "files")
    race = [{key: value for key, value in asdict(racer).items() if key not in hidden} for racer in found.get("race", ())]
    for row in race:
        row["about"].pop("read_from", None)
    return found | ({"race": race} if race else {}) | {"wanted": wanted(found)}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cold(path: Path, seconds: float) -> tuple[float, str, int]:
    """(bytes a second, method, threads) of the best way to read that calibration has for this file: the median of its rounds,
    cold. Not mapped: a stream does not."""
    figures, _ = disk._read_all(str(path), os.path.getsize(path), "the model", time.perf_counter() + seconds, lambda *_: None)
    best = max((figure for figure in figures if figure.cold and figure.name != "mmap"), key=lambda figure: figure.best)
    return best.best, best.name, best.threads


def group_or_not(limit: int) -> tuple[bool, str]:
    """Whether the system keeps a limit here, and why not."""
    try:
        with limited.group(limit):
            return True, ""
    except limited.NoGroup as why:
        return False, str(why)


def measure(only, quant: str, limit: int, rounds: int, new: int, threads: int, place: Path | None = None,
            config: dict = WIDE, budgets: int = 5) -> dict:
    torch.set_num_threads(threads)
    here, load = machine(), os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    group, why = group_or_not(limit)
    found = {"date": str(date.today()), "processor": here.cpu.name, "cores": here.cpu.cores, "threads": threads,
             "versions": here.versions, "waiting": waiting(), "limit": limit, "group": group, "why": why}
    stores: set[str] = set()
    try:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            say(f"writing a model in {quant}")
            path = billion.write(Path(folder) / f"llama-{quant}.gguf", quant, config)
            found |= {"model": f"llama, {config['num_hidden_layers']} layers, {config['hidden_size']} wide, {quant}",
                      "file": os.path.getsize(path)}
            if "disk" in only:
                say("the disk, in turns")
                found["disk"] = disk_turns(path, rounds)
            if "ram" in only:
                say("RAM, in turns")
                found["ram"] = ram_turns(path, rounds)
            if "placements" in only:
                if here.calibration is None:
                    say("calibrating this machine")
                    here.calibrate()
                found["placements"] = placements(path, budgets, rounds, new, threads, group, stores)
            if "race" in only:
                say("the disk, as calibration reads it")
                found["cold"], method, readers = cold(path, 20.0)
                found["cold_how"] = f"{method}, {readers} threads"
                racers = racers_of(path, Path(folder), limit, method, readers)
                for racer in racers[:2]:
                    prepare(racer, threads)
                    stores |= {*racer.files} - {str(path)}
                found["race"] = race(racers, limit if group else None, rounds, new, threads)
    finally:
        for store in stores:                   # it lies in llmlab's cache, and is of a model that nobody wants again
            Path(store).unlink(missing_ok=True)
    return found | {"load": (load, os.getloadavg()[0] if hasattr(os, "getloadavg") else None)}


# ---- as tests ---------------------------------------------------------------------------------------------------

SMALL = billion.CONFIG | {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 512, "num_attention_heads": 4,
                          "num_key_value_heads": 2, "vocab_size": 512}


def test_everyone_says_the_same(tmp_path):
    """All engines run the same numbers: their likeliest tokens are the same, bfloat16's nearly."""
    found = measure(("race", "disk", "ram", "placements"), "Q8_0", 1024 * MIB, 1, 2, 1, tmp_path, SMALL, 2)
    show(found)
    assert len(found["race"]) >= 3 and [racer.failed for racer in found["race"]] == [None] * len(found["race"])
    first = found["race"][0].likeliest
    for racer in found["race"]:
        assert len(racer.rounds) == 1 and len(racer.rounds[0]["each"]) == 2
        assert racer.likeliest["tokens"][0] == first["tokens"][0]
        assert np.allclose(racer.likeliest["logits"], first["logits"], rtol=0.05)
    assert json.loads(json.dumps(kept(found)))["wanted"] and len(found["placements"]) == 4


def target(found: dict) -> Path:
    """results/offload-<date>-<processor>.json"""
    name = re.sub(r"[^a-z0-9]+", "-", found["processor"].lower()).strip("-")
    return Path(__file__).parent / "results" / f"offload-{found['date']}-{name}-{found['cores']}-cores.json"


def shown(found: dict) -> str:
    """What the notebook draws beside its own."""
    about = {name: found[name] for name in ("date", "processor", "cores", "model")}
    names = "layout", "budget", "stay", "low", "predicted", "high", "measured", "binds"
    rows = [{name: round(row[name], 4) if isinstance(row[name], float) else row[name] for name in names}
            for row in kept(found)["placements"]]
    return json.dumps(about | {"limit": found["limit"], "placements": rows}, indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="race,disk,ram,placements")
    parser.add_argument("--model", choices=MODELS, default="2b", help="that is written")
    parser.add_argument("--quant", default="Q8_0", help="of the written model")
    parser.add_argument("--limit", default="1GiB", help="memory that each process may use, page cache counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=3, help="tokens of a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; room for the file in 16 bits too")
    parser.add_argument("--save", action="store_true", help="keep it in results/")
    parser.add_argument("--json", type=Path, help="keep it there")
    parser.add_argument("--shown", type=Path, help="keep the placements there, as data/measured_placements.json has them")
    asked = parser.parse_args()
    found = measure(asked.only.split(","), asked.quant, parse_bytes(asked.limit), asked.rounds, asked.new, asked.threads,
                    asked.folder, MODELS[asked.model])
    show(found)
    for place in (asked.json, target(found) if asked.save else None):
        if place:
            place.write_text(json.dumps(kept(found), indent=1) + "\n")
            print(f"kept in {place}")
    if asked.shown:
        asked.shown.write_text(shown(found))


if __name__ == "__main__":
    main()
