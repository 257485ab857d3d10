"""What a token costs after a long context: the quantized KV cache beside torch's attention, transformers' and llama.cpp's.

    python tests/bench/bench_cache.py [--only attention,smol,1b] [--types f16,q8_0,q4_0] [--contexts 1024,2048,4096,8192]
                                      [--quant Q4_K_M] [--rounds 3] [--new 12] [--threads N] [--read] [--save] [--json FILE]

*attention*: that of one token in one layer, alone: packed pages, beside llama.cpp's flash attention over the same blocks and
beside `scaled_dot_product_attention` over plain numbers, called as transformers calls it ("sdpa f16") and with the queries of a
group as rows of one matrix ("folded"), which reads each number once; everyone has so many layers' caches in turn that they come
from memory. *smol*, *1b*: whole tokens of SmolLM2 and of a written llama of the 1B class, after each of the contexts: llmlab's
decoder with each type of cache, llama.cpp with the same, and transformers with the caches that it quantizes (quanto, hqq), in
processes of their own that take turns. Every ratio is of seconds in one run, theirs over ours: above 1 llmlab is quicker. Of a
round the fastest token counts; the table has the median of the rounds' ratios and the ratio of the fastest of all. Contexts are
laid down as copies of some tokens that were read, which takes nobody more or less time; --read reads all of them. Nothing here
fails for being slow.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
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
import torch  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

import llmlab  # noqa: E402
from llmlab import kernels, machine  # noqa: E402
from llmlab.calibration.rates import last_cache  # noqa: E402
from llmlab.catalog import Table  # noqa: E402
from llmlab.errors import LabError  # noqa: E402
from llmlab.formats import FORMATS  # noqa: E402
from llmlab.kernels import attending_once  # noqa: E402
from llmlab.kernels import pages as paging  # noqa: E402
from llmlab.kernels.attending_once import Side, attend_once, side  # noqa: E402
from llmlab.kernels.pages import PAGE  # noqa: E402
from llmlab.memory import CACHE_TYPES  # noqa: E402
from llmlab.runtime import compiling as packaging  # noqa: E402
from llmlab.runtime.compiling import settle  # noqa: E402
from llmlab.shapes import model_spec  # noqa: E402

pytestmark = pytest.mark.bench

TYPES = ("f16", "q8_0", "q4_0")
CONTEXTS = (1024, 2048, 4096, 8192)
SHAPES = {"1b": (8, 4, 64), "smol": (3, 3, 64)}          # KV heads, queries of each, numbers of a head
BITS = {"q4_0": ("quanto-4", "hqq-4"), "q4_1": ("quanto-4", "hqq-4"), "iq4_nl": ("quanto-4", "hqq-4"), "q8_0": ("hqq-8",)}
SDPA = "sdpa f16"        # keys and values in float16, torch's own attention
LONG, PEER = 8192, 4096  # contexts at which something is asked for
READ = 256               # tokens that are read before a context is laid down
FLUSH = 128              # tokens after which transformers quantizes a cache anew (QuantizedCache's residual_length)
PACKAGES = {"llama.cpp": ("llama_cpp", "llama-cpp-python"), "quanto": ("optimum.quanto", "optimum-quanto"),
            "hqq": ("hqq", "hqq"), "transformers": ("transformers", "transformers")}


# ---- attention alone --------------------------------------------------------------------------------------------

def turns(works: dict, rounds: int) -> dict[str, list[float]]:
    """{name: seconds of each round}: works are lists of calls, of each round the fastest call counts; all take turns, each
    round beginning with another one, after one that does not count."""
    names, found = list(works), {name: [] for name in works}
    for turn in range(rounds + 1):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            took = []
            for call in works[name]:
                begin = time.perf_counter()
                call()
                took.append(time.perf_counter() - begin)
            if turn:
                found[name].append(min(took))
    return found


def copies(size: int) -> int:
    """How many caches of so many bytes do not fit into the processor's own."""
    return max(2, -(-2 * (last_cache() or 2**25) // size))


def plain(heads: int, group: int, head_dim: int, cells: int, dtype: torch.dtype, folded: bool) -> tuple[list, int]:
    """Calls of torch's attention of one token over plain numbers, and the bytes each reads."""
    q, size = torch.randn(1, heads * group, 1, head_dim).to(dtype), 2 * heads * cells * head_dim * dtype.itemsize
    caches = [torch.randn(2, 1, heads, cells, head_dim).to(dtype) for _ in range(copies(size))]
    if folded:
        rows = q.view(1, heads, group, head_dim)
        return [lambda kv=kv: scaled_dot_product_attention(rows, *kv) for kv in caches], size
    return [lambda kv=kv: scaled_dot_product_attention(q, *kv, enable_gqa=True) for kv in caches], size


def packed(type: str, heads: int, group: int, head_dim: int, cells: int, threads: int, compiled: bool) -> dict:
    """{way: (calls, bytes)} over caches of a type: llmlab's over pages, compiled and not, and llama.cpp's over the same blocks
    as it lays them."""
    q, where = torch.randn(1, heads * group, 1, head_dim), torch.arange(cells)
    positions, at, caches = where[None].int(), torch.tensor([[cells - 1]], dtype=torch.int32), []
    while not caches or len(caches) < copies(sum(pages.bytes for pages in caches[0])):
        sides = [kernels.Pages(type, 1, heads, head_dim, cells) for _ in range(2)]
        for pages in sides:
            pages.write(where, torch.randn(1, heads, cells, head_dim))
        caches.append(sides)
    size = sum(pages.bytes for pages in caches[0])
    found = {f"{type} eager": [lambda kv=kv: kernels.attention(q, *kv, positions, at, scale=head_dim ** -0.5) for kv in caches]}
    if compiled:
        found[type] = [once(q.view(heads, group, head_dim), positions, kv) for kv in caches]
    if here("llama_cpp") and type != "fp8":
        from llama_attention import Layer
        number = FORMATS[CACHE_TYPES[type]].id
        sides = ([pages.blocks(where)[0].transpose(0, 1) for pages in kv] for kv in caches)
        found[f"llama.cpp {type}"] = [Layer(q[0, :, 0], *kv, number, threads) for kv in sides]
    return {way: (calls, size) for way, calls in found.items()}


def once(q: torch.Tensor, positions: torch.Tensor, kv: list[kernels.Pages]):
    """A call of one token's attention as the compiled decoder has it: q [kv_heads, group, head_dim] at the last position, which
    looks at the cells before it and at a key and value of its own."""
    known, own = kv[0].type, torch.zeros(2, q.shape[0], q.shape[2])

    def run(q, own, seen, at, shifts, *tensors):
        left = iter(tensors)
        sides = [Side.of(known, left) for _ in range(2)]
        return (attend_once(q, own.unbind(), *sides, seen, at, shifts, scale=q.shape[-1] ** -0.5, settle=settle),)

    def tensors(count: int) -> list[torch.Tensor]:
        seen = positions[:, :count * PAGE].view(count, PAGE).view(torch.float32)
        return [q, own, seen, positions[0, count * PAGE - 1:count * PAGE].clone(), attending_once.shifts(),
                *(tensor for pages in kv for tensor in side(pages, count).tensors)]

    some, all_of_them = [tensor.clone() for tensor in tensors(2)], tensors(kv[0].pages)      # copies: a compiler is not told
    dynamic = {2: {0: "pages"}} | {i: {0: "pages"} for i in range(5, len(some))}             # that some are the same memory
    made = packaging.package(run, some, f"attention {known} {tuple(q.shape)}", (attending_once, paging, once), dynamic, say)
    return lambda: made(*all_of_them)


def bandwidth() -> tuple[list, int]:
    """Calls of a sum over more than the processor's own caches hold, and its bytes."""
    data = torch.ones(copies(4) * 4)
    return [data.sum] * 2, data.nbytes


@torch.inference_mode()
def attention(types, contexts, rounds: int, threads: int, compiled: bool, shapes=tuple(SHAPES)) -> list[dict]:
    """A row for each shape and context: {"shape", "context", "bytes": {way: that one call reads}, "seconds": {way: of each
    round}}; "bandwidth" is the way that only reads."""
    found = []
    for shape in shapes:
        heads, group, head_dim = SHAPES[shape]
        for cells in contexts:
            say(f"attention {shape}, {cells:,} cells")
            works = {"bandwidth": bandwidth(), SDPA: plain(heads, group, head_dim, cells, torch.float16, False)}
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                works[f"folded {str(dtype)[6:]}"] = plain(heads, group, head_dim, cells, dtype, True)
            for type in types:
                works |= packed(type, heads, group, head_dim, cells, threads, compiled)
            found.append({"shape": shape, "context": cells, "bytes": {way: size for way, (_, size) in works.items()},
                          "seconds": turns({way: calls for way, (calls, _) in works.items()}, rounds)})
    return found


# ---- whole tokens -----------------------------------------------------------------------------------------------

@dataclass
class Racer:
    """One that takes part: `module` of llmlab.benching and what its process is asked to do; what came of it."""

    name: str
    module: str
    job: dict
    most: int = 2**31        # contexts beyond it are not asked of it
    child: Child | None = None
    failed: str | None = None
    about: dict = field(default_factory=dict)
    filled: dict[int, float] = field(default_factory=dict)          # context -> seconds of laying it down
    seconds: dict[int, list[float]] = field(default_factory=dict)   # context -> the fastest token of each round

    def ask(self, do: str, **more) -> dict:
        """The answer; {} and out where there is none."""
        try:
            return self.child.ask(do, **more)
        except LabError as error:
            self.failed = str(error)
            self.child.close()
            return {}


def ours(types, compiled: bool, modules: bool) -> list[Racer]:
    way = "compiled" if compiled else "decoder"
    lean = {"way": way, "strategy": "fast", "dtype": None}
    found = [Racer("llmlab plain", "lean", lean)]
    found += [Racer(f"llmlab {type}", "lean", lean | {"kv": [type, type]}) for type in types]
    some = [type for type in types if modules and type in BITS]
    return found + [Racer(f"modules {type}", "dense", {"way": "packed", "kv": [type, type]}) for type in some]


def peers(types, quantized: bool) -> list[Racer]:
    found = [Racer(f"llama.cpp {type}", "llama", {"kv": [type, type]}) for type in types]
    if quantized:
        found.append(Racer(SDPA, "dense", {"way": "packed", "dtype": "float16"}))
        held = list(dict.fromkeys(kv for type in types for kv in BITS.get(type, ())))
        found += [Racer(f"{kv} {'packed' if way == 'packed' else 'float32'}", "dense", {"way": way, "kv": kv}, PEER)
                  for kv in held for way in ("transformers", "packed")]
    for racer in found:
        engine = re.split("[ -]", racer.name)[0]
        needs = [PACKAGES[name] for name in (engine, "transformers" if racer.module == "dense" else engine) if name in PACKAGES]
        for package, install in needs:
            if not here(package):
                racer.failed = f"{install} is not installed: pip install {install}"
    return found


def here(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:                # of a.b where there is no a
        return False


def race(path: Path, racers: list[Racer], contexts, rounds: int, new: int, threads: int, read: bool = False) -> list[Racer]:
    """Everyone opened in a process of its own; at each context all take turns at writing `new` tokens, one at a time."""
    spec = model_spec(str(path))
    tokens = [8 + n * 7919 % (spec.vocab - 8) for n in range(max(contexts))]
    with ExitStack() as stack:
        for racer in racers:
            if racer.failed:
                continue
            say(f"opening {racer.name}")
            racer.child = Child(racer.name, racer.module, threads)
            stack.callback(racer.child.close)
            job = racer.job | {"path": str(path), "threads": threads, "born": time.time(), "context": max(contexts)}
            racer.about = racer.ask("open", job=job).get("about", {})
        for context in contexts:
            depth = context - rounds * new         # after all rounds it is what was asked for
            running = [racer for racer in racers if not racer.failed and context <= racer.most]
            for racer in running:
                say(f"{context:,} tokens into {racer.name}")
                took = (racer.ask("fill", tokens=tokens[:depth], room=max(contexts)) if read else
                        racer.ask("deepen", tokens=tokens[:READ], depth=depth))
                racer.filled[context] = took.get("seconds")
            for turn in range(rounds):
                start = turn % max(1, len(running))
                for racer in running[start:] + running[:start]:
                    if not racer.failed and (took := racer.ask("write", tokens=tokens[:new], after=None)):
                        racer.seconds.setdefault(context, []).append(min(took["each"]))
    return racers


# ---- what follows -----------------------------------------------------------------------------------------------

def ratio(theirs: list[float], mine: list[float]) -> tuple[float, float]:
    """(median of the rounds' ratios, ratio of the fastest); above 1 `mine` is quicker."""
    return median(a / b for a, b in zip(theirs, mine, strict=False)), min(theirs) / min(mine)


def fastest(seconds: dict[int, list[float]]) -> dict[int, float]:
    return {context: min(took) for context, took in seconds.items()}


def crossover(theirs: dict[int, float], mine: dict[int, float]) -> str:
    """From which context on `mine` is quicker, in words: seconds at the contexts measured, straight lines between them."""
    gains = [(context, theirs[context] - mine[context]) for context in sorted(mine) if context in theirs]
    if not gains:
        return ""
    slower = [n for n, (_, gain) in enumerate(gains) if gain < 0]
    if not slower:
        return f"quicker from {gains[0][0]:,} on, the shortest measured"
    if slower[-1] == len(gains) - 1:
        return f"not quicker at {gains[-1][0]:,}, the longest measured"
    (before, lost), (after, gain) = gains[slower[-1]:slower[-1] + 2]
    return f"quicker from about {before + (after - before) * -lost / (gain - lost):,.0f} on"


def attention_table(rows: list[dict]) -> Table:
    """Milliseconds of one token in one layer, the fastest, and the share of the bandwidth that this is."""
    made = []
    for row in rows:
        best = {way: min(took) for way, took in row["seconds"].items()}
        rate = row["bytes"]["bandwidth"] / best.pop("bandwidth")
        made += [{"shape": row["shape"], "context": row["context"], "way": way, "MB": row["bytes"][way] / 1e6, "ms": took * 1e3,
                  "of bandwidth": row["bytes"][way] / took / rate} for way, took in best.items()]
    return Table(made, {"MB": "{:.2f}".format, "ms": "{:.2f}".format, "of bandwidth": "{:.0%}".format})


def token_table(racers: list[Racer]) -> Table:
    """Milliseconds of the fastest token after each context."""
    contexts = sorted({context for racer in racers for context in racer.seconds})
    rows = []
    for racer in racers:
        took = {f"{context:,}": min(racer.seconds[context]) * 1e3 if context in racer.seconds else None for context in contexts}
        rows.append({"": racer.name} | took | {"why not": racer.failed and racer.failed[:90]})
    return Table(rows, {f"{context:,}": "{:.1f}".format for context in contexts})


def wanted(found: dict) -> list[dict]:
    """A line for each pair that is compared at the longest context both have, and what is asked for at least, if anything."""
    rows = []

    def add(what: str, beside: str, theirs: dict, mine: dict, least: float | None = None, asked: int = LONG,
            anew: float = 0.0) -> None:
        if not (both := set(theirs) & set(mine)):
            return
        at = max(both)
        least = least if at >= asked else None
        middle, best = ratio(theirs[at], mine[at])
        rows.append({"what": what, "context": at, "beside": beside, "median": middle, "fastest": best, "at least": least,
                     "": "BELOW" if least and best < least else "", "and": crossover(*map(fastest, (theirs, mine))) if not anew
                     else f"{(min(theirs[at]) + anew) / min(mine[at]):.2f} with {anew * 1e3:.0f} ms more, a token's share of "
                     f"quantizing all anew every {FLUSH}"})

    for shape in dict.fromkeys(row["shape"] for row in found.get("attention", ())):
        ways: dict[str, dict[int, list]] = {}
        for row in found["attention"]:
            for way, took in row["seconds"].items() if row["shape"] == shape else ():
                ways.setdefault(way, {})[row["context"]] = took
        for way in (way for way in ways if way.split(" ")[0] in CACHE_TYPES):
            for beside, *least in ((SDPA, 1.0), ("folded float16", 1.0), ("folded bfloat16",), ("folded float32",),
                                   (f"llama.cpp {way.split(' ')[0]}", 0.8)):
                add(f"attention {shape} {way}", beside, ways.get(beside, {}), ways[way], *least)
    for model in ("smol", "1b"):
        racers = {racer.name: racer for racer in found.get(model, ())}
        for name, mine in racers.items():
            way, type = name.split(" ")
            if way not in ("llmlab", "modules") or type not in CACHE_TYPES:
                continue
            what = f"token {model} {type}" + ", in transformers" * (way == "modules")
            for beside, *least in (("llmlab plain",), ("llmlab f16",), (SDPA, 1.0), (f"llama.cpp {type}", 0.8)):
                if beside in racers and beside != name and (way == "llmlab" or beside == SDPA):
                    add(what, beside, racers[beside].seconds, mine.seconds, *least)
            for other in racers.values():
                if other.name.split(" ")[0] in BITS.get(type, ()) and other.seconds:
                    anew = other.filled[max(other.seconds)] / FLUSH        # none of the tokens timed did it
                    add(what, other.name, other.seconds, mine.seconds, 5.0, PEER, anew)
    return rows


def ratios(found: dict) -> Table:
    return Table(wanted(found), dict.fromkeys(("median", "fastest"), "{:.2f}".format))


def show(found: dict) -> None:
    print(f"{found['date']}, {found['processor']}, {found['capability']}, {found['threads']} threads, load "
          f"{found['load'][0]:.1f} before and {found['load'][1]:.1f} after")
    if rows := found.get("attention"):
        print(f"\nattention of one token in one layer, ms\n{attention_table(rows)}")
    for model in ("smol", "1b"):
        if model in found:
            print(f"\n{model}: whole tokens, ms\n{token_table(found[model])}")
            for racer in found[model]:
                if racer.failed:
                    print(f"{racer.name} is out: {racer.failed}")
    print(f"\ntheirs over ours\n{ratios(found)}")


def kept(found: dict) -> dict:
    """Everything, as JSON has it. No paths."""
    names = ("name", "job", "about", "failed", "filled", "seconds")
    races = {model: [{name: getattr(racer, name) for name in names} for racer in found[model]]
             for model in ("smol", "1b") if model in found}
    return found | races | {"wanted": wanted(found)}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(only, types, contexts, rounds: int, new: int, threads: int, quant: str, compiled: bool = True,
            read: bool = False) -> dict:
    torch.set_num_threads(threads)
    here, load = machine(), os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found = {"date": str(date.today()), "processor": here.cpu.name, "cores": here.cpu.cores, "threads": threads,
             "capability": torch.backends.cpu.get_cpu_capability(), "versions": here.versions, "waiting": waiting()}
    if "attention" in only:
        found["attention"] = attention(types, contexts, rounds, threads, compiled)
    if "smol" in only:
        racers = ours(types, compiled, True) + peers(types, True)
        found["smol"] = race(llmlab.fetch("smollm2-135m", progress=False), racers, contexts, rounds, new, threads, read)
    if "1b" in only:
        with tempfile.TemporaryDirectory() as folder:
            path = billion.write(Path(folder) / "llama-1b.gguf", quant)
            racers = ours(types, compiled, False) + peers(types, False)
            found["1b"] = race(path, racers, contexts, rounds, new, threads, read)
    return found | {"load": (load, os.getloadavg()[0] if hasattr(os, "getloadavg") else None)}


# ---- as tests ---------------------------------------------------------------------------------------------------

SMALL = billion.CONFIG | {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512, "num_attention_heads": 4,
                          "num_key_value_heads": 2, "vocab_size": 512}


def test_attention_alone():
    rows = attention(("f16", "q8_0", "q4_0"), (256, 512), 2, 1, False, ("smol",))
    assert [row["context"] for row in rows] == [256, 512]
    assert all(len(took) == 2 and min(took) > 0 for row in rows for took in row["seconds"].values())
    print(f"\n{attention_table(rows)}\n{ratios({'attention': rows})}")


def test_whole_tokens(tmp_path):
    path = billion.write(tmp_path / "small.gguf", "Q8_0", SMALL)
    racers = race(path, ours(("q8_0",), False, True) + peers(("q8_0",), True), (512, 1024), 2, 3, 1)
    print(f"\n{token_table(racers)}\n{ratios({'smol': racers})}")
    for racer in racers:
        assert racer.failed is None or "not installed" in racer.failed, (racer.name, racer.failed)
        assert racer.failed or [len(took) for took in racer.seconds.values()] == [2, 2]


def test_what_is_laid_down_takes_as_long_as_what_was_read(tmp_path):
    """...and says where it is quicker."""
    path = billion.write(tmp_path / "small.gguf", "Q8_0", SMALL)
    for read in (False, True):
        racers = race(path, ours(("q8_0",), False, False)[1:] + peers(("q8_0",), False), (2048,), 2, 4, 1, read)
        print(f"\nread: {read}\n{token_table(racers)}")
    assert crossover({1024: 2.0, 2048: 4.0}, {1024: 3.0, 2048: 3.0}) == "quicker from about 1,536 on"
    assert crossover({1024: 2.0}, {1024: 1.0}) == "quicker from 1,024 on, the shortest measured"
    assert crossover({1024: 2.0}, {1024: 3.0}) == "not quicker at 1,024, the longest measured"


def target(found: dict) -> Path:
    """results/cache-<date>-<processor>.json"""
    name = re.sub(r"[^a-z0-9]+", "-", found["processor"].lower()).strip("-")
    return Path(__file__).parent / "results" / f"cache-{found['date']}-{name}-{found['cores']}-cores.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="attention,smol,1b")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    parser.add_argument("--quant", default="Q4_K_M", help="of the written model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=12, help="tokens of a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-compile", action="store_true", help="the decoder as it is without a compiler")
    parser.add_argument("--read", action="store_true", help="read the contexts, all of them: minutes each")
    parser.add_argument("--save", action="store_true", help="keep it in results/")
    parser.add_argument("--json", type=Path, help="keep it there")
    asked = parser.parse_args()
    found = measure(asked.only.split(","), asked.types.split(","), [int(n) for n in asked.contexts.split(",")], asked.rounds,
                    asked.new, asked.threads, asked.quant, not asked.no_compile, asked.read)
    show(found)
    for place in (asked.json, target(found) if asked.save else None):
        if place:
            place.write_text(json.dumps(kept(found), indent=1) + "\n")
            print(f"kept in {place}")


if __name__ == "__main__":
    main()
