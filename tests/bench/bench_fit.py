"""How long the first question takes: one fit, the whole catalogue's map, the shell; and what others answer to it.

    python tests/bench/bench_fit.py [--json FILE]

Prints minimum and median of interleaved repeats, and ratios. Nothing here fails for being slow.
Peers that are not installed beside this Python (hf-mem, accelerate, llmfit) are named and left out.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
for folder in (TOP, TOP / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import gguf_raw  # noqa: E402
from hub_server import HubServer  # noqa: E402

import llmlab  # noqa: E402
from llmlab import catalog, fitting, memory, shapes  # noqa: E402
from llmlab.formats import mixes  # noqa: E402
from llmlab.gguf import read_gguf  # noqa: E402

pytestmark = pytest.mark.bench

BARS = {"fit": 1e-3, "map": 2.0, "shell": 0.5}      # seconds: what is aimed at, printed beside what is measured

FITS = {  # what is asked, on which cards, with which settings
    "llama-3-8b on one 12 GB card": ("llama-3-8b", ["rtx-3060-12gb"], {}),
    "llama-3-70b on one 24 GB card, part of it": ("llama-3-70b", ["rtx-4090-24gb"], {}),
    "llama-3-70b on two 24 GB cards, split 1:1": ("llama-3-70b", ["rtx-3090-24gb"] * 2, {"split": (1, 1)}),
    "gemma-3-27b on one 24 GB card": ("gemma-3-27b", ["rtx-3090-24gb"], {}),
    "qwen3-30b-a3b on one 12 GB card, experts in RAM": ("qwen3-30b-a3b", ["rtx-3060-12gb"], {"n_cpu_moe": 48}),
    "deepseek-v3 on one 24 GB card, part of it": ("deepseek-v3", ["rtx-4090-24gb"], {}),
    "nemotron-3-nano-30b-a3b (hybrid) on one 16 GB card": ("nemotron-3-nano-30b-a3b", ["rtx-4060-ti-16gb"], {}),
}


# ---- measuring ----------------------------------------------------------------------------------------------


def rounds(calls: dict[str, Callable[[], Callable]], times: int | dict[str, int]) -> dict[str, dict]:
    """Seconds of each call, all of them once a round: {name: {min, median, repeats}}.

    `calls[name]()` prepares, untimed, and gives what is timed.
    """
    times = times if isinstance(times, dict) else dict.fromkeys(calls, times)
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(max(times.values())):
        for name, prepare in calls.items():
            if turn < times[name]:
                call = prepare()
                start = time.perf_counter()
                call()
                took[name].append(time.perf_counter() - start)
    return {name: {"min": min(t), "median": statistics.median(t), "repeats": len(t)} for name, t in took.items()}


def machine() -> dict:
    """What was measured on; no name of it."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {"llmlab": llmlab.__version__, "python": platform.python_version()}
    for name in ("hf-mem", "accelerate", "llmfit", "torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"date": date.today().isoformat(), "cpu": cpu, "cores": os.cpu_count(), "system": platform.system(),
            "load_before": load(), "versions": versions}


def load() -> float | None:
    """Processes that wanted to run, mean of the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


# ---- one fit ------------------------------------------------------------------------------------------------


def forget() -> None:
    """Empties what rules remember; the catalogue stays, and what a spec remembers is on the spec."""
    for module in (memory, fitting, mixes):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    catalog._reserved.cache_clear()


def fit_calls(spec, cards: list, settings: dict) -> dict[str, Callable[[], Callable]]:
    """Four ways to ask one question, by what has been asked before."""
    ask = partial(llmlab.fit, spec, cards, **settings)
    contexts = iter(range(1024, 2**24, 256))

    def new_model():
        forget()
        return partial(llmlab.fit, replace(spec), cards, **settings)     # a copy: nothing is remembered about it

    def new_quant():
        ask()                           # what belongs to the model alone is known
        table = spec.__dict__["_remembered"]
        for key in [key for key in table if key[0].__name__ in ("types", "weights")]:
            del table[key]
        return ask

    def new_context():
        ask()
        return partial(ask, context=next(contexts))

    def same_again():
        ask()
        return ask
    return {"new model": new_model, "new quant": new_quant, "new context": new_context, "same again": same_again}


def bench_fits(real: Path | None, times: int = 60) -> list[dict]:
    asked = {name: (llmlab.model(model), [llmlab.gpu(c) for c in cards], settings)
             for name, (model, cards, settings) in FITS.items()}
    if real:
        asked["SmolLM2-135M, the real GGUF, on one 12 GB card"] = (llmlab.model(real), [llmlab.gpu("rtx-3060-12gb")], {})
    calls = {(name, how): call for name, question in asked.items() for how, call in fit_calls(*question).items()}
    took = rounds(calls, times)
    found = []
    for name, question in asked.items():
        report = llmlab.fit(question[0], question[1], **question[2])
        found.append({"what": name, "verdict": report.verdict, "gpu_layers": report.gpu_layers, "layers": report.layers,
                      "tensors": len(report.spec.tensors), "seconds": {h: took[n, h] for n, h in took if n == name}})
    return found


# ---- the map and the shell ----------------------------------------------------------------------------------

MAP = """
import json, time
start = time.perf_counter()
import llmlab
found = llmlab.fit_map()
print(json.dumps({"seconds": time.perf_counter() - start, "models": len(found.models), "cards": len(found.cards),
                  "answer": found.answer}))
"""

TORCH = """
import contextlib, io, json, sys
from llmlab.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    main(sys.argv[1:])
print(json.dumps({"torch": "torch" in sys.modules, "numpy": "numpy" in sys.modules, "modules": len(sys.modules)}))
"""


class Trees:
    """Two copies of the package: one whose bytecode was kept by an earlier run, one without any."""

    def __init__(self, folder: Path):
        self.kept, self.none = folder / "kept", folder / "none"
        for tree in (self.kept, self.none):
            for name in ("llmlab", "data", "notebooks"):
                shutil.copytree(TOP / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))

    def run(self, arguments: list[str], kept: bool = True, **environment: str) -> str:
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | environment
        if not kept:
            env["PYTHONDONTWRITEBYTECODE"] = "1"
        done = subprocess.run(arguments, cwd=self.kept if kept else self.none, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)[:300]}: {done.stderr[-600:]}")
        return done.stdout


def bench_map(trees: Trees, times: int = 7) -> dict:
    entries = [llmlab.model(name) for name in catalog.entries()]
    inside: list[float] = []

    def process():
        inside.append(json.loads(trees.run([sys.executable, "-c", MAP]))["seconds"])

    def everything_new():
        forget()
        shapes._catalogued.cache_clear()
        return llmlab.fit_map

    def sizes_new():
        forget()
        return partial(llmlab.fit_map, [replace(spec) for spec in entries])

    def same_again():
        llmlab.fit_map()
        return llmlab.fit_map
    answer = json.loads(trees.run([sys.executable, "-c", MAP]))          # and the bytecode is kept
    took = rounds({"a fresh process": lambda: process, "shapes and sizes new": lambda: everything_new(),
                   "sizes new": sizes_new, "same again": same_again}, times)
    took["a fresh process, without Python's own start"] = {
        "min": min(inside), "median": statistics.median(inside), "repeats": len(inside)}
    return {"models": answer["models"], "cards": answer["cards"], "answer": answer["answer"], "seconds": took}


def bench_shell(trees: Trees, real: Path | None, wide: Path, times: int = 15) -> dict:
    def asked(model) -> list[str]:
        return [sys.executable, "-m", "llmlab", "fit", str(model), "--gpu", "rtx-3060-12gb", "--json"]
    models = {"llama-3-8b": "llama-3-8b", **({"SmolLM2-135M, the real GGUF": real} if real else {}),
              "a GGUF header with 151,936 tokens": wide}
    calls = {"python -c pass": ([sys.executable, "-c", "pass"], True),
             "python -c 'import argparse, json'": ([sys.executable, "-c", "import argparse, json"], True)}
    for name, model in models.items():
        calls[f"llmlab fit {name}"] = asked(model), True
        calls[f"llmlab fit {name}, no bytecode"] = asked(model), False
    answers = {name: json.loads(trees.run(asked(model))) for name, model in models.items()}
    took = rounds({name: lambda a=a, kept=kept: partial(trees.run, a, kept) for name, (a, kept) in calls.items()}, times)
    loaded = json.loads(trees.run([sys.executable, "-c", TORCH, *asked("llama-3-8b")[3:]]))
    return {"seconds": took, "loaded": loaded, "answers": {n: a["verdict"] for n, a in answers.items()},
            "wide_header_bytes": read_gguf(wide).header_bytes}


# ---- files for the peers ------------------------------------------------------------------------------------


def write_gguf(path: Path, spec, quant: str, file_type: int, merges: int, whole: bool) -> Path:
    """A GGUF header with the model's shapes, formats and as many tokens; `whole`: and a hole where the data would lie."""
    raw, arch = gguf_raw, spec.architecture
    pairs = [raw.pair("general.architecture", raw.STRING, raw.text(arch)),
             raw.pair("general.file_type", raw.UINT32, raw.u32(file_type))]
    for key, value in spec.metadata.items():
        kind, code = (raw.FLOAT32, "<f") if isinstance(value, float) else (raw.UINT32, "<I")
        pairs.append(raw.pair(f"{arch}.{key}", kind, struct.pack(code, value)))
    vocab = spec.vocab
    words = b"".join(raw.text(f"tok{n}") for n in range(vocab))
    joined = b"".join(raw.text(f"m{n % 1000} e{n}") for n in range(merges))
    pairs += [raw.pair("tokenizer.ggml.model", raw.STRING, raw.text("gpt2")),
              raw.pair("tokenizer.ggml.tokens", raw.ARRAY, raw.array(raw.STRING, vocab, words)),
              raw.pair("tokenizer.ggml.token_type", raw.ARRAY,
                       raw.array(raw.INT32, vocab, struct.pack(f"<{vocab}i", *[1] * vocab))),
              raw.pair("tokenizer.ggml.merges", raw.ARRAY, raw.array(raw.STRING, merges, joined))]
    kinds = {"F32": 0, "F16": 1, "Q4_K": 12, "Q6_K": 14}
    tensors, offset = [], 0
    sizes = memory.weights(spec, quant)
    for tensor, type, size in zip(spec.tensors, sizes.types, sizes.bytes, strict=True):
        tensors.append(raw.tensor(tensor.name, tensor.shape, kinds[type], offset))
        offset += -(-size // 32) * 32
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw.file(tuple(pairs), tuple(tensors)))
    if whole:
        os.truncate(path, path.stat().st_size + offset)
    return path


def write_checkpoint(folder: Path, spec, shards: int = 4) -> Path:
    """config.json, index and safetensors headers of a Llama in bf16; the data is left out, no peer reads it."""
    c = spec.config
    width, ff, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    tensors = {"model.embed_tokens.weight": (c["vocab_size"], width)}
    for i in range(c["num_hidden_layers"]):
        block = {"self_attn.q_proj": (q, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
                 "self_attn.o_proj": (width, q), "mlp.gate_proj": (ff, width), "mlp.up_proj": (ff, width),
                 "mlp.down_proj": (width, ff), "input_layernorm": (width,), "post_attention_layernorm": (width,)}
        tensors |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    tensors |= {"model.norm.weight": (width,)}
    if not c["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (c["vocab_size"], width)
    folder.mkdir(parents=True, exist_ok=True)
    where, names = {}, list(tensors)
    each = -(-len(names) // shards)
    for k in range(shards):
        file, header, offset = f"model-{k + 1:05}-of-{shards:05}.safetensors", {}, 0
        for name in names[each * k:each * (k + 1)]:
            size = 2
            for n in tensors[name]:
                size *= n
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [offset, offset + size]}
            offset, where[name] = offset + size, file
        text = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    plain = {k: v for k, v in c.items() if k != "count_as"}
    (folder / "config.json").write_text(json.dumps(plain | {"architectures": ["LlamaForCausalLM"]}))
    return folder


# ---- peers --------------------------------------------------------------------------------------------------

# hf-mem asks https://huggingface.co, fixed in its source; its requests are sent to a hub on loopback instead.
HF_MEM = """
import sys
import httpx2
address, get = sys.argv.pop(1), httpx2.AsyncClient.get
def here(self, url, **more):
    return get(self, str(url).replace("https://huggingface.co", address), **more)
httpx2.AsyncClient.get = here
from hf_mem.cli import main
main()
"""

# accelerate looks the repository up on the hub before it reads the config; that look-up is answered here.
ACCELERATE = """
import json, sys, types
from accelerate.commands import estimate
estimate.verify_on_hub = lambda *_: types.SimpleNamespace(library_name="transformers", config={})
asked = estimate.estimate_command_parser().parse_args([sys.argv[1], "--dtypes", sys.argv[2]])
print(json.dumps(estimate.gather_data(asked)[0][2]))
"""


TRUTHS = {  # bytes of all tensors, and of the cache for 8,192 tokens in 16 bits
    "Llama 3 8B, Q4_K_M": (4_912_898_048, 2**30, "a published file without its header; 2 x 8 heads x 128 x 32 layers"),
    "Llama 3 8B, bf16": (16_060_522_496, 2**30, "8,030,261,248 elements in 16 bits"),
    "SmolLM2-135M, Q4_1 GGUF": (96_576_768, 188_743_680, "as gguf-py reads it; llama.cpp prints 92.10 and 180.00 MiB"),
}


def _llmlab(printed: str) -> dict:
    answer = json.loads(printed)
    sums = {name: sum(d.get(name, 0) for d in answer["devices"].values())
            for name in ("weights", "kv_cache", "compute", "overhead", "output", "recurrent")}
    return {"weights": sums["weights"], "kv": sums["kv_cache"], "compute": sums["compute"], "overhead": sums["overhead"],
            "total": sum(sums.values())}


def _hf_mem(printed: str) -> dict:
    answer = json.loads(printed[printed.index("{"):])
    return {"weights": answer["memory"], "kv": answer["kv_cache"], "total": answer["total_memory"]}


def _accelerate(printed: str) -> dict:
    size = int(float(printed.strip().splitlines()[-1]))
    return {"weights": size, "total": size}


def _llmfit(printed: str) -> dict:
    """Its figures called GB: weights in 10^9 (8.03e9 weights in F16 are 16.06), the cache in 2^30 (8,192 tokens are 1.0)."""
    answer = json.loads(printed)
    cache = next(a["kv_cache_gb"] for a in answer["kv_alternatives"] if a["kv_quant"] == "fp16")
    least = answer["run_paths"][0]["minimum"]["vram_gb"]
    fixed = least - answer["disk_size_gb"] - cache
    weights, kv, overhead = int(answer["disk_size_gb"] * 1e9), int(cache * 2**30), int(fixed * 1e9)
    return {"weights": weights, "kv": kv, "overhead": overhead, "total": weights + kv + overhead}


def _here(module: str) -> bool:
    from importlib.util import find_spec
    return find_spec(module) is not None


def llmfit_program() -> str | None:
    beside = Path(sys.executable).parent / "llmfit"
    return str(beside) if beside.exists() else shutil.which("llmfit")


def peers(trees: Trees, hub: HubServer, real: Path | None) -> Iterable[tuple[str, str, str, Callable[[], str], Callable]]:
    """(question, tool, settings, what to run, how to read it)."""
    quant, bf16, smol = TRUTHS
    python, spec = sys.executable, llmlab.model("llama-3-8b")
    repos = hub.folder / "bench"
    write_checkpoint(repos / "llama-3-8b", spec)
    local = write_gguf(hub.folder / "local" / "llama-3-8b.Q4_K_M.gguf", spec, "Q4_K_M", 15, 280_147, whole=True)
    write_gguf(repos / "llama-3-8b-GGUF" / local.name, spec, "Q4_K_M", 15, 280_147, whole=False)
    small = hub.folder / "local" / "smollm2-135m"
    small.mkdir(parents=True)
    config = llmlab.model("smollm2-135m").config
    (small / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    if real:
        (repos / "smollm2-135m-GGUF").mkdir(parents=True)
        shutil.copyfile(real, repos / "smollm2-135m-GGUF" / real.name)

    def own(*arguments: str) -> Callable[[], str]:
        return partial(trees.run, [python, "-m", "llmlab", "fit", *arguments, "--json"], HF_ENDPOINT=hub.url)

    yield quant, "llmlab", "from its catalogue, RTX 3060 12GB", own("llama-3-8b", "--gpu", "rtx-3060-12gb"), _llmlab
    yield quant, "llmlab", "from a GGUF, 128,256 tokens", own(str(local), "--gpu", "rtx-3060-12gb"), _llmlab
    whole = "--quant", "BF16", "--engine", "transformers", "--gpu", "rtx-3090-24gb"
    yield bf16, "llmlab", "from its catalogue, RTX 3090, transformers", own("llama-3-8b", *whole), _llmlab
    yield bf16, "llmlab", "the hub's config.json, the same", own("bench/llama-3-8b", *whole), _llmlab
    if real:
        yield smol, "llmlab", "the file, on the host", own(str(real), "--gpu", "none"), _llmlab
        yield smol, "llmlab", "the hub's header, on the host", own("bench/smollm2-135m-GGUF", "--gpu", "none"), _llmlab

    if _here("hf_mem"):
        def hf_mem(repo: str, *more: str) -> Callable[[], str]:
            return partial(trees.run, [python, "-c", HF_MEM, hub.url, "--model-id", f"bench/{repo}", "--experimental",
                                       "--max-model-len", "8192", "--json-output", *more])
        says = "the hub's headers, --max-model-len 8192"
        yield quant, "hf-mem", says, hf_mem("llama-3-8b-GGUF", "--gguf-file", local.name), _hf_mem
        yield bf16, "hf-mem", says, hf_mem("llama-3-8b"), _hf_mem
        if real:
            yield smol, "hf-mem", says, hf_mem("smollm2-135m-GGUF", "--gguf-file", real.name), _hf_mem
    if _here("accelerate") and _here("transformers"):
        def accelerate(folder: Path, dtype: str) -> Callable[[], str]:
            return partial(trees.run, [python, "-c", ACCELERATE, str(folder), dtype], HF_HUB_OFFLINE="1")
        yield quant, "accelerate", "a local config, int4 (nearest)", accelerate(repos / "llama-3-8b", "int4"), _accelerate
        yield bf16, "accelerate", "a local config, float16", accelerate(repos / "llama-3-8b", "float16"), _accelerate
        if real:
            yield smol, "accelerate", "a local config, int4 (nearest)", accelerate(small, "int4"), _accelerate
    if program := llmfit_program():
        def llmfit(model: str, quant: str) -> Callable[[], str]:
            return partial(trees.run, [program, "--no-dashboard", "--memory", "24G", "--json", "plan", model,
                                       "--context", "8192", "--quant", quant])
        meta = "meta-llama/Meta-Llama-3-8B-Instruct"
        yield quant, "llmfit", "its database, plan --quant Q4_K_M", llmfit(meta, "Q4_K_M"), _llmfit
        yield bf16, "llmfit", "its database, plan --quant F16", llmfit(meta, "F16"), _llmfit
        if real:
            instruct = "HuggingFaceTB/SmolLM2-135M-Instruct"
            yield smol, "llmfit", "its database, Q4_K_M (knows no Q4_1)", llmfit(instruct, "Q4_K_M"), _llmfit


def bench_peers(trees: Trees, folder: Path, real: Path | None, times: int = 9) -> dict:
    with HubServer(folder / "hub") as hub:
        asked = list(peers(trees, hub, real))
        answers = [read(run()) for _, _, _, run, read in asked]      # also keeps the bytecode, and warms the disk
        names = {i: f"{question}|{tool}|{settings}" for i, (question, tool, settings, _, _) in enumerate(asked)}
        repeats = {names[i]: 4 if asked[i][1] == "accelerate" else times for i in names}    # it takes seconds
        took = rounds({names[i]: lambda run=asked[i][3]: run for i in names}, repeats)
    rows = [{"question": asked[i][0], "tool": asked[i][1], "settings": asked[i][2], "answer": answers[i],
             "seconds": took[names[i]]} for i in names]
    if program := llmfit_program():
        everything = [program, "--no-dashboard", "--memory", "24G", "--json", "fit", "-n", "1000000"]
        models = len(json.loads(trees.run(everything))["models"])
        catalogue = {"tool": "llmfit", "what": f"{models:,} models on one card, fresh process",
                     "seconds": rounds({"all": lambda: partial(trees.run, everything)}, 7)["all"]}
    else:
        catalogue = None
    missing = [name for name, there in (("hf-mem", _here("hf_mem")), ("accelerate", _here("accelerate")),
                                        ("llmfit", bool(llmfit_program()))) if not there]
    return {"rows": rows, "catalogue": catalogue, "missing": missing}


# ---- showing ------------------------------------------------------------------------------------------------


def ms(seconds: dict) -> str:
    return f"{1e3 * seconds['min']:9.3f} {1e3 * seconds['median']:9.3f}"


def show(result: dict) -> None:
    about = result["machine"]
    print(f"\n{about['cpu']}, {about['cores']} cores, {about['system']}, {about['date']}, load {about['load_before']} before "
          f"and {about['load_after']} after; {', '.join(f'{k} {v}' for k, v in about['versions'].items())}")
    print("milliseconds: minimum and median of interleaved repeats; 'of the bar': minimum over what is aimed at")

    print(f"\none fit (bar {1e3 * BARS['fit']:g} ms){'':43}minimum    median  of the bar")
    for row in result["fits"]:
        print(f"  {row['what']}: {row['verdict']}, {row['gpu_layers']} of {row['layers']} layers, {row['tensors']} tensors")
        for how, took in row["seconds"].items():
            print(f"    {how:50} {ms(took)}  {took['min'] / BARS['fit']:8.2f} x")

    print(f"\nthe map, {result['map']['models']} models x {result['map']['cards']} cards (bar {BARS['map']:g} s)")
    for how, took in result["map"]["seconds"].items():
        print(f"    {how:50} {ms(took)}  {took['min'] / BARS['map']:8.2f} x")
    if other := result["peers"]["catalogue"]:
        print(f"    {other['tool'] + ', ' + other['what']:50} {ms(other['seconds'])}")

    print(f"\nthe shell, whole processes, --gpu rtx-3060-12gb --json (bar {BARS['shell']:g} s)")
    for what, took in result["shell"]["seconds"].items():
        print(f"    {what:58.58} {ms(took)}  {took['min'] / BARS['shell']:8.2f} x")
    loaded = result["shell"]["loaded"]
    print(f"    modules loaded: {loaded['modules']}; torch: {loaded['torch']}; numpy: {loaded['numpy']}")

    print("\nhow much memory, 8,192 tokens, 16-bit cache; MB of 10^6 bytes; whole processes, 'x': minimum over llmlab's first")
    for question, (weights, kv, source) in TRUTHS.items():
        rows = [row for row in result["peers"]["rows"] if row["question"] == question]
        if not rows:
            continue
        base = rows[0]["seconds"]["min"]
        print(f"  {question}: weights {weights:,} bytes, cache {kv:,} bytes ({source})")
        print(f"    {'':58} {'weights':>18} {'cache':>18} {'compute':>8} {'overhead':>8} {'total':>8} "
              f"{'min ms':>9} {'median':>9} {'x':>6}")
        for row in rows:
            a = row["answer"]
            print(f"    {row['tool'] + ', ' + row['settings']:58.58} {against(a.get('weights'), weights)} "
                  f"{against(a.get('kv'), kv)} {mb(a.get('compute'))} {mb(a.get('overhead'))} {mb(a.get('total'))} "
                  f"{ms(row['seconds'])} {row['seconds']['min'] / base:6.1f}")
    if result["peers"]["missing"]:
        print(f"  not installed here, left out: {', '.join(result['peers']['missing'])}")


def mb(bytes: int | None) -> str:
    return f"{'-':>8}" if bytes is None else f"{bytes / 1e6:8.1f}"


def against(bytes: int | None, truth: int) -> str:
    """An answer beside the truth."""
    if bytes is None:
        return f"{'-':>18}"
    return f"{mb(bytes)} {'exact' if bytes == truth else f'{100 * (bytes / truth - 1):+.2f} %':>9}"


def measure() -> dict:
    about = machine()
    try:
        real = llmlab.fetch("smollm2-135m")
    except llmlab.LabError as error:
        print(f"without the real GGUF: {error}")
        real = None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wide = write_gguf(folder / "wide.gguf", llmlab.model("qwen3-8b"), "Q4_K_M", 15, 151_387, whole=True)
        trees = Trees(folder)
        result = {"machine": about, "fits": bench_fits(real), "map": bench_map(trees),
                  "shell": bench_shell(trees, real, wide), "peers": bench_peers(trees, folder, real)}
    about["load_after"] = load()
    return result


def test_bench_fit():
    result = measure()
    show(result)
    assert not result["shell"]["loaded"]["torch"]
    for row in result["peers"]["rows"]:
        if row["tool"] == "llmlab":
            assert (row["answer"]["weights"], row["answer"]["kv"]) == TRUTHS[row["question"]][:2], row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measures fit, map and shell, beside their peers.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    arguments = parser.parse_args()
    measured = measure()
    show(measured)
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")
