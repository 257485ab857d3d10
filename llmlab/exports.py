"""A report as the command, the settings file or the code that gives exactly this configuration in an engine.

Every name written here exists: tests hold the options against lists read from the engines themselves (tests/golden/flags.json,
made by tests/make_flags.py) and run the Python. What an engine has no word for is said in a note, never invented. Shell
text is for POSIX shells. The versions read: llama.cpp as in llama-cpp-python 0.3.36, transformers 5, vLLM 0.33, LM Studio's
SDK 2.0, Ollama's runner (llama.go: num_batch is the ubatch, num_ctx is for each of OLLAMA_NUM_PARALLEL requests).
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from shlex import quote
from typing import TYPE_CHECKING

from . import catalog
from .errors import LabError, UnknownName
from .formats import FORMATS
from .memory import CACHE_TYPES
from .placing import free_bytes
from .units import MIB

if TYPE_CHECKING:
    from .fitting import Report


class Command(str):
    """Text to run, a string like any other; `engine`, and `notes`: one line each on what it cannot say or needs first.

    The notes stand in the text too, as comments.
    """

    engine: str
    notes: tuple[str, ...]

    def __new__(cls, text: str, engine: str, notes: tuple[str, ...] = ()) -> "Command":
        self = super().__new__(cls, text)
        self.engine, self.notes = engine, tuple(notes)
        return self

    def __getnewargs__(self):
        return str(self), self.engine, self.notes

    @property
    def text(self) -> str:
        """The text as a plain string."""
        return str.__str__(self)

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        from html import escape
        return f"<pre>{escape(self.text)}</pre>"


def command(report: "Report", engine: str | None = None) -> Command:
    """What gives this configuration in `engine`: "llama.cpp" (llama-server), "llama-cli", "llama-cpp-python", "ollama",
    "lmstudio", "vllm" or "transformers"; None: the report's own engine.

    Raises UnknownName for another engine, and LabError with the remedy where the engine cannot run the quant at all.
    """
    name = report.settings.engine if engine is None else engine
    if not isinstance(name, str) or name not in WRITERS:
        raise UnknownName(f"{str(name)[:40]!r} is no engine; there are {', '.join(WRITERS)}")
    home, write = WRITERS[name]
    notes: list[str] = []
    text = write(_as(report, home, notes), notes)
    notes = tuple(dict.fromkeys(map(_one_line, notes)))
    mark = "//" if name == "lmstudio" else "#"
    return Command("".join(f"{mark} {note}\n" for note in notes) + text, name, notes)


def _as(r: "Report", engine: str, notes: list[str]) -> "Report":
    """The same question asked of `engine`, which may lack some of llama.cpp's settings."""
    if r.settings.engine == engine:
        return r
    lost: dict = {"utilization": None} if r.settings.utilization else {}
    if engine != "llama.cpp":
        for name, default in ALONE.items():
            if getattr(r.settings, name) != default:
                lost[name] = default
                notes.append(f"Not the same: {TITLES[engine]} is not asked for {name}.")
    found = r.with_(engine=engine, **lost)
    if found.verdict != "fits":
        notes.append(f"In {TITLES[engine]} this {'may spill' if found.verdict == 'may spill' else 'does not fit'}: "
                     f"report.with_(engine={engine!r}) says more.")
    return found


ALONE = {"gpu_layers": "auto", "n_cpu_moe": 0, "split": None, "projector": None, "draft": None, "draft_quant": None,
         "mtp": False}
"""Settings that only llama.cpp has here, and what they are where nobody set them."""


def _one_line(text: str) -> str:
    """A path in a note may hold anything; a comment ends with its line."""
    return " ".join(text.split())


# ---- which file -----------------------------------------------------------------------------------------------------

def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "model"


def _file_name(r: "Report") -> str:
    """What the GGUF of this model and quant would be called."""
    name = r.spec.title.split("/")[-1]
    return f"{_slug(name)}-{r.settings.quant}.gguf"


def _checkpoint(r: "Report", notes: list[str]) -> str:
    """The safetensors checkpoint: a folder or a hub name."""
    spec = r.spec
    if spec.path and spec.source == "config":
        return os.path.abspath(os.path.dirname(spec.path))
    if spec.source == "hub" and not spec.stored:
        return spec.name
    if spec.source == "catalogue":
        return catalog.entry(spec.name).hub_id
    notes.append(f"Put the folder or the hub name of the checkpoint for {_slug(spec.title)!r}: only its shapes are known here.")
    return _slug(spec.title)


def _gguf(r: "Report", notes: list[str]) -> tuple[str, str]:
    """(hub repository or "", path) of the GGUF to load. Where there is none yet, its name, and notes on how to make it."""
    spec, quant = r.spec, r.settings.quant
    if spec.stored == quant and spec.path:
        if spec.source != "hub":
            return "", os.path.abspath(spec.path)
        owner, repo, file = spec.path.split("/", 2)
        return f"{owner}/{repo}", file
    target = _file_name(r)
    imatrix = "--imatrix imatrix.gguf " if r.settings.importance else ""
    if spec.stored:
        source = quote(spec.path or "")
        again = "" if spec.stored in ("F32", "F16", "BF16") else "--allow-requantize "
        notes.append(f"Make the file first: llama-quantize {imatrix}{again}{source} {target} {quant}")
    else:
        full = target.replace(f"-{quant}.gguf", f"-{spec.dtype}.gguf")
        where = f"a copy of {_checkpoint(r, [])}" if spec.source in ("catalogue", "hub") else "the model's folder"
        convert = (f"convert_hf_to_gguf.py FOLDER --outtype {spec.dtype.lower()} --outfile "
                   f"{target if quant == spec.dtype else full} (FOLDER: {where})")
        made = "" if quant == spec.dtype else f", then llama-quantize {imatrix}{full} {target} {quant}"
        notes.append(f"Put the path of your GGUF, or make it: {convert}{made}")
    return "", target


def _projector(r: "Report", notes: list[str]) -> str:
    """The projector's file: only its name is known, or its size."""
    name = r.settings.projector.name
    notes.append("Put the path of the projector's GGUF (mmproj).")
    return name if name.endswith(".gguf") else "mmproj.gguf"


def _draft(r: "Report", notes: list[str]) -> tuple[str, str]:
    """(hub name or "", path) of the draft model's GGUF."""
    draft, quant = r.settings.draft, r.settings.draft_quant
    if draft.stored == quant and draft.path:
        if draft.source != "hub":
            return "", os.path.abspath(draft.path)
        return f"{'/'.join(draft.path.split('/', 2)[:2])}:{quant}", ""
    notes.append("Put the path of the draft's GGUF.")
    return "", f"{_slug(draft.title.split('/')[-1])}-{quant}.gguf"


# ---- llama.cpp ------------------------------------------------------------------------------------------------------

def _split(r: "Report") -> list[str]:
    """The shares of the cards as float32 reads them back: as given, or by the memory the report counts with."""
    shares = r.settings.split or tuple(free_bytes(card) / MIB for card in r.cards)
    return [f"{share:.9g}" for share in shares]


COMPILED = ({"f16"}, {"bf16"}, {"q8_0"}, {"q4_0"})
"""K and V types (equal) for which llama.cpp's CUDA builds have flash attention: GGML_CUDA_FA_QUANTS in ggml/CMakeLists.txt."""


def kernel_missing(r: "Report") -> bool:
    """Whether CUDA builds as released lack flash attention for these cache types."""
    s = r.settings
    return s.flash_attention and set(s.kv) not in COMPILED and any(card.vendor == "NVIDIA" for card in r.cards)


def _kernels(r: "Report", notes: list[str]) -> None:
    s = r.settings
    if kernel_missing(r):
        notes.append(f"CUDA builds have no flash attention for K {s.kv[0]} and V {s.kv[1]} unless built with "
                     "-DGGML_CUDA_FA_QUANTS=all: without it they convert both to f16 at every step, slowly.")


def _llama_options(r: "Report", notes: list[str], server: bool) -> list[list[str]]:
    """llama.cpp's options, grouped by line. Defaults are written out too: environment variables may change them, and the
    programs' own differ (llama-server takes four slots and a shared cache, and --fit changes whatever is not set)."""
    s = r.settings
    repo, path = _gguf(r, notes)
    lines = [["--hf-repo", repo, "--hf-file", path] if repo else ["--model", path]]
    slots = ["--parallel", str(s.sequences), "--kv-unified" if s.unified else "--no-kv-unified"] if server else []
    lines += [["--ctx-size", str(s.context), *slots],
              ["--batch-size", str(s.batch), "--ubatch-size", str(s.ubatch)],
              ["--flash-attn", "on" if s.flash_attention else "off", "--cache-type-k", s.kv[0], "--cache-type-v", s.kv[1],
               *["--swa-full"] * s.swa_full]]
    lines.append(["--gpu-layers", str(r.gpu_layers)] + _devices(r))
    if r.n_cpu_moe:
        lines.append(["--n-cpu-moe", str(r.n_cpu_moe)])
    if s.projector:
        lines.append(["--mmproj", _projector(r, notes), *["--no-mmproj-offload"] * (not r.cards)])
    elif repo:
        lines.append(["--no-mmproj"])            # --hf-repo fetches and loads one by itself
    if s.draft:
        named, file = _draft(r, notes)
        lines.append(["--spec-type", "draft-simple", *(["--spec-draft-hf", named] if named else ["--spec-draft-model", file]),
                      "--spec-draft-ngl", "all" if r.cards else "0", *["--spec-draft-device", "none"] * (not r.cards)])
    if s.mtp:
        lines.append(["--spec-type", "draft-mtp"])
    lines.append(["--fit", "off", "--cache-ram", "0", "--ctx-checkpoints", "0"])
    return lines


def _devices(r: "Report") -> list[str]:
    if not r.cards:
        return ["--device", "none"]
    if len(r.cards) == 1:
        return ["--split-mode", "none", "--main-gpu", "0"]
    return ["--split-mode", "layer", "--tensor-split", ",".join(_split(r))]


def llama_server(r: "Report", notes: list[str], servers: Sequence[str] = ()) -> str:
    """The line that starts llama-server; `servers`: RPC servers as host:port, whose devices come before the own cards."""
    _kernels(r, notes)
    notes.append("--cache-ram 0 and --ctx-checkpoints 0 keep RAM as predicted; without them llama-server remembers earlier "
                 "prompts in up to 8 GiB.")
    rpc = [["--rpc", ",".join(servers)]] if servers else []
    return _shell(["llama-server"], rpc + _llama_options(r, notes, server=True))


def _llama_cli(r: "Report", notes: list[str]) -> str:
    _kernels(r, notes)
    if r.settings.sequences > 1:
        notes.append(f"Not the same: llama-cli takes one sequence, not {r.settings.sequences}; llama-server takes more.")
    return _shell(["llama-cli"], _llama_options(r, notes, server=False))


def _shell(program: list[str], lines: list[list[str]]) -> str:
    return " \\\n  ".join(" ".join(map(quote, line)) for line in [program, *lines]) + "\n"


def _llama_python(r: "Report", notes: list[str]) -> str:
    s = r.settings
    _kernels(r, notes)
    missing = {"sequences": s.sequences > 1, "n_cpu_moe": r.n_cpu_moe, "projector": s.projector, "draft": s.draft, "mtp": s.mtp}
    for name, asked in missing.items():
        if asked:
            notes.append(f"Not the same: llama-cpp-python's Llama has no setting for {name}; llama-server has.")
    repo, path = _gguf(r, notes)
    if not r.cards:
        notes.append("In a build with a card, set CUDA_VISIBLE_DEVICES= (empty) to leave the card alone.")
    arguments = {
        "n_gpu_layers": r.gpu_layers,
        "split_mode": f"llama_cpp.LLAMA_SPLIT_MODE_{'LAYER' if len(r.cards) > 1 else 'NONE'}" if r.cards else None,
        "tensor_split": f"[{', '.join(_split(r))}]" if len(r.cards) > 1 else None,
        "n_ctx": s.context, "n_batch": s.batch, "n_ubatch": s.micro, "flash_attn": s.flash_attention, "swa_full": s.swa_full,
        "type_k": _ggml(s.kv[0]), "type_v": _ggml(s.kv[1])}
    made = (f"llama_cpp.Llama.from_pretrained(\n    {repo!r},\n    filename={path!r},\n" if repo else
            f"llama_cpp.Llama(\n    {path!r},\n")
    told = "".join(f"    {name}={value},\n" for name, value in arguments.items() if value is not None)
    return f'import llama_cpp\n\nllm = {made}{told})\nprint(llm("Once upon a time", max_tokens=32)["choices"][0]["text"])\n'


def _ggml(cache: str) -> str:
    """The library names every cache type but bf16, which is 30 in ggml.h."""
    return "30" if cache == "bf16" else f"llama_cpp.GGML_TYPE_{cache.upper()}"


# ---- Ollama ---------------------------------------------------------------------------------------------------------

OLLAMA_CACHES = ("f16", "q8_0", "q4_0")      # fs/ggml/ggml.go, SupportsKVCacheType; most faithful first


def _ollama(r: "Report", notes: list[str]) -> str:
    s = r.settings
    name = _slug(f"{r.spec.title.split('/')[-1]}-{s.quant}").lower()
    repo, path = _gguf(r, notes)
    if "\n" in path or "\r" in path:
        raise LabError("a Modelfile cannot name a path with a line break in it; rename the file")
    source = f"hf.co/{repo}:{s.quant}" if repo else path if os.path.isabs(path) else f"./{path}"
    cache = _nearest(s.kv, OLLAMA_CACHES, "Ollama", notes)
    missing = {"n_cpu_moe": r.n_cpu_moe, "split": s.split, "swa_full": s.swa_full, "unified": s.unified and s.sequences > 1,
               "projector": s.projector, "draft": s.draft, "mtp": s.mtp}
    notes += [f"Not the same: Ollama has no setting for {what}." for what, value in missing.items() if value]
    if s.micro * s.sequences != s.batch:
        notes.append(f"Ollama's batch is num_batch times the requests at once: {s.micro * s.sequences}, not {s.batch}.")
    modelfile = [f"FROM {source}", f"PARAMETER num_ctx {s.context // s.sequences}", f"PARAMETER num_batch {s.micro}",
                 f"PARAMETER num_gpu {r.gpu_layers}"]
    environment = {"OLLAMA_FLASH_ATTENTION": int(s.flash_attention), "OLLAMA_KV_CACHE_TYPE": cache,
                   "OLLAMA_NUM_PARALLEL": s.sequences}
    if len(r.cards) > 1:
        environment["OLLAMA_SCHED_SPREAD"] = 1
    serve = " ".join(f"{key}={value}" for key, value in environment.items())
    return (f"# the server, in a terminal of its own; one that runs already does not see these:\n{serve} ollama serve\n\n"
            "# the model:\ncat > Modelfile <<'EOF'\n" + "\n".join(modelfile) +
            f"\nEOF\nollama create {name} -f Modelfile\nollama run {name}\n")


def _nearest(kv: tuple[str, str], known: tuple[str, ...], engine: str, notes: list[str]) -> str:
    """One type for K and V: the smallest of `known` that holds no less than either."""
    if kv[0] == kv[1] and kv[0] in known:
        return kv[0]
    needed = max(map(_bits, kv))
    found = min((name for name in known if _bits(name) >= needed), key=_bits, default=known[0])
    notes.append(f"Not the same: {engine} has one cache type for K and V, of {', '.join(known)}: {found} instead of "
                 f"K {kv[0]} and V {kv[1]}.")
    return found


def _bits(cache: str) -> float:
    format = FORMATS[CACHE_TYPES[cache]]
    return format.block_bytes * 8 / format.block


# ---- LM Studio ------------------------------------------------------------------------------------------------------

LMSTUDIO_CACHES = ("f32", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")     # LLMLlamaCacheQuantizationType


def _lmstudio(r: "Report", notes: list[str]) -> str:
    s, blocks = r.settings, len(r.spec.blocks)
    repo, path = _gguf(r, notes)
    key = _slug(os.path.basename(path).removesuffix(".gguf")).lower()
    config: dict = {"contextLength": s.context if s.unified else s.context // s.sequences, "autoFit": False}
    gpu: dict = {"ratio": "off" if not r.gpu_layers else "max" if r.gpu_layers == r.layers else
                 round(r.gpu_layers / r.layers, 4)}
    if 0 < r.gpu_layers < r.layers:
        notes.append(f"LM Studio takes a share of the layers, {gpu['ratio']} for {r.gpu_layers} of {r.layers}; see its count.")
    if r.n_cpu_moe:
        gpu["numCpuExpertLayersRatio"] = "max" if r.n_cpu_moe >= blocks else round(r.n_cpu_moe / blocks, 4)
    if len(r.cards) > 1:
        gpu["splitStrategy"] = "evenly"
        if len({*_split(r)}) > 1:
            notes.append(f"Not the same: LM Studio splits evenly or fills one card first, no shares of {','.join(_split(r))}.")
    kv = [cache if cache in LMSTUDIO_CACHES else "f16" for cache in s.kv]
    if kv != list(s.kv):
        notes.append("Not the same: LM Studio has no bf16 cache; f16 is as large.")
    config |= {"gpu": gpu, "offloadKVCacheToGpu": bool(r.cards), "maxParallelPredictions": s.sequences,
               "useUnifiedKvCache": s.unified, "evalBatchSize": s.batch, "physicalBatchSize": s.micro,
               "flashAttention": s.flash_attention, "llamaKCacheQuantizationType": kv[0], "llamaVCacheQuantizationType": kv[1]}
    if s.draft:
        named, file = _draft(r, notes)
        config |= {"speculativeDraftSimple": True,
                   "speculativeDraftModel": named or _slug(os.path.basename(file).removesuffix(".gguf")).lower()}
        notes.append("Put the draft's key as `lms ls` prints it.")
    if s.mtp:
        config["speculativeDraftMtp"] = True
    if s.swa_full:
        notes.append("Not the same: LM Studio has no setting for swa_full.")
    if s.projector:
        notes.append("LM Studio loads a projector that lies beside the model by itself.")
    flags = f"lms load {quote(key)} --gpu {gpu['ratio']} --context-length {config['contextLength']} --parallel {s.sequences}"
    first = f"lms get {repo}" if repo else f"lms import --copy {quote(path)}"
    notes += [f"First: {first}; and put its key as `lms ls` prints it.",
              f"`{flags}` sets as much as lms has flags for; the rest has none, so: npm install @lmstudio/sdk, save this as "
              "load.mjs, node load.mjs"]
    return (f'import {{ LMStudioClient }} from "@lmstudio/sdk";\n\nconst client = new LMStudioClient();\n'
            f"await client.llm.load({json.dumps(key)}, {{\n  config: {_indented(config)},\n}});\n")


def _indented(config: Mapping) -> str:
    return json.dumps(config, indent=2).replace("\n", "\n  ")


# ---- vLLM -----------------------------------------------------------------------------------------------------------

TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def vllm_serve(r: "Report", notes: list[str], share: int = 0) -> str:
    """The line that starts vLLM's server; `share`: over several hosts, the cards that share a block (the rest are stages)."""
    s, spec = r.settings, r.spec
    if spec.stored:
        raise LabError(f"vLLM 0.33 loads no GGUF; give the model's checkpoint (its hub name or folder) instead of {spec.title}")
    if not r.cards:
        notes.append("vLLM on a processor is another build (its CPU wheel).")
    dtype = s.quant if s.quant in TORCH else spec.dtype
    lines = [[_checkpoint(r, notes)], ["--dtype", TORCH[dtype]]]
    if s.quant == "FP8":
        lines[-1] += ["--quantization", "fp8"]
    elif s.quant not in TORCH:
        notes.append(f"Put the name of a checkpoint in {s.quant.split('_')[0]}: vLLM reads from its config how it is quantized "
                     "and quantizes none so itself.")
    lines += [["--max-model-len", str(s.context // s.sequences), "--max-num-seqs", str(s.sequences)],
              ["--max-num-batched-tokens", str(max(s.batch, s.sequences))]]
    lines.append(["--kv-cache-dtype", _vllm_cache(s.kv, dtype, notes)])
    if share:
        lines.append(["--tensor-parallel-size", str(share), "--pipeline-parallel-size", str(len(r.cards) // share),
                      "--distributed-executor-backend", "ray"])
    elif len(r.cards) > 1:
        lines.append(["--tensor-parallel-size", str(len(r.cards))])
    lines.append(["--gpu-memory-utilization", f"{s.share:g}"])
    if not s.flash_attention:
        notes.append("vLLM chooses its attention kernels itself: flash_attention=False has no counterpart.")
    return _shell(["vllm", "serve"], lines).replace("vllm serve \\\n  ", "vllm serve ", 1)


def _vllm_cache(kv: tuple[str, str], dtype: str, notes: list[str]) -> str:
    if kv == ("fp8", "fp8"):
        return "fp8"
    own = dtype.lower()
    if any(_bits(cache) != _bits(own) for cache in kv):
        notes.append(f"Not the same: vLLM has no cache of K {kv[0]} and V {kv[1]}; it keeps both in {own}, the model's own.")
    return "auto"


# ---- transformers ---------------------------------------------------------------------------------------------------

def _transformers(r: "Report", notes: list[str]) -> str:
    s, spec = r.settings, r.spec
    if spec.stored and s.quant not in TORCH:
        raise LabError(f"bitsandbytes makes {s.quant} of a safetensors checkpoint; give its hub name or folder, not a GGUF")
    dtype = s.quant if s.quant in TORCH else spec.dtype
    if s.quant == "INT8" and dtype == "BF16":
        dtype = "F16"                            # what bitsandbytes multiplies in: it casts, and warns at every step, otherwise
    arguments = {"dtype": f"torch.{TORCH[dtype]}",
                 "device_map": '"cpu"' if not r.cards else '{"": 0}' if len(r.cards) == 1 else '"balanced"',
                 "attn_implementation": '"sdpa"' if s.flash_attention else '"eager"'}
    extra = ""
    if s.quant not in TORCH:
        extra = ", BitsAndBytesConfig"
        arguments["quantization_config"] = _bitsandbytes(s.quant, TORCH[dtype])
    if any(_bits(cache) != _bits(dtype.lower()) for cache in s.kv):
        notes.append(f"Not the same: transformers keeps K and V in {TORCH[dtype]}, not in {' and '.join(dict.fromkeys(s.kv))}.")
    if spec.stored:
        repo, path = _stored_file(r)
        name, file = (repo, path) if repo else os.path.split(path)
        told = {"gguf_file": repr(file)}
        extra = ", GgufConfig"
        arguments["quantization_config"] = "GgufConfig(dequantize=True)"     # blocks stay packed where it has kernels for them
        notes.append(f"This unpacks the {spec.stored} file to {TORCH[dtype]} as it loads, as counted. An older "
                     "transformers without GgufConfig always does: leave that out there.")
    else:
        name, told = _checkpoint(r, notes), {}
    loads = "".join(f"    {key}={value},\n" for key, value in (told | arguments).items())
    tokens = "".join(f", {key}={value}" for key, value in told.items())
    return (f"import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer{extra}\n\n"
            f"name = {name!r}\ntokenizer = AutoTokenizer.from_pretrained(name{tokens})\n"
            f"model = AutoModelForCausalLM.from_pretrained(\n    name,\n{loads})\n"
            f'prompts = ["Once upon a time"] * {s.sequences}\n'
            'inputs = tokenizer(prompts, return_tensors="pt").to(model.device)\n'
            f"tokens = model.generate(**inputs, max_length={s.context // s.sequences}, use_cache=True)\n"
            "print(tokenizer.batch_decode(tokens, skip_special_tokens=True))\n")


def _stored_file(r: "Report") -> tuple[str, str]:
    """(hub repository or "", path) of the GGUF the model was read from, whatever quant is asked for."""
    if r.spec.source == "hub":
        owner, repo, file = r.spec.path.split("/", 2)
        return f"{owner}/{repo}", file
    return "", os.path.abspath(r.spec.path)


def _bitsandbytes(quant: str, dtype: str) -> str:
    if quant == "INT8":
        return "BitsAndBytesConfig(load_in_8bit=True)"
    kind, _, double = quant.partition("_")
    return (f'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{kind.lower()}", '
            f"bnb_4bit_use_double_quant={bool(double)}, bnb_4bit_compute_dtype=torch.{dtype})")


WRITERS: dict[str, tuple[str, Callable[["Report", list[str]], str]]] = {
    "llama.cpp": ("llama.cpp", llama_server), "llama-server": ("llama.cpp", llama_server),
    "llama-cli": ("llama.cpp", _llama_cli), "llama-cpp-python": ("llama.cpp", _llama_python),
    "ollama": ("llama.cpp", _ollama), "lmstudio": ("llama.cpp", _lmstudio), "vllm": ("vllm", vllm_serve),
    "transformers": ("transformers", _transformers)}
"""What command() knows: the engine whose count a report must be of, and what writes the text."""

TITLES = {"llama.cpp": "llama.cpp", "vllm": "vLLM", "transformers": "transformers"}

__all__ = ["Command", "TITLES", "WRITERS", "command", "kernel_missing", "llama_server", "vllm_serve"]
