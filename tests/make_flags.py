"""Makes tests/golden/flags.json: the options, fields and values that engines really have, read from their own sources.

Run as `python tests/make_flags.py [name=folder ...]` after an engine moved on; `name` is llama-cpp-python (its unpacked source
distribution), vllm (its unpacked wheel) or lmstudio (npm's @lmstudio/sdk, unpacked). What is not named is downloaded by pip or
npm into a temporary folder: 76 MB, 340 MB and 1 MB. Nothing is installed or imported.
"""

import ast
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent / "golden" / "flags.json"

# Programs that no registry carries, read in their public sources and pages.
READ = {
    "ollama environment": {
        "source": "ollama/ollama envconfig/config.go, AsMap",
        "names": ["OLLAMA_CONTEXT_LENGTH", "OLLAMA_FLASH_ATTENTION", "OLLAMA_GPU_OVERHEAD", "OLLAMA_KEEP_ALIVE",
                  "OLLAMA_KV_CACHE_TYPE", "OLLAMA_LLM_LIBRARY", "OLLAMA_LOAD_TIMEOUT", "OLLAMA_MAX_LOADED_MODELS",
                  "OLLAMA_MAX_QUEUE", "OLLAMA_MODELS", "OLLAMA_NUM_PARALLEL", "OLLAMA_SCHED_SPREAD"]},
    "ollama cache types": {"source": "ollama/ollama fs/ggml/ggml.go, SupportsKVCacheType", "names": ["f16", "q8_0", "q4_0"]},
    "lms load": {
        "source": "lmstudio-ai/lms src/subcommands/load.ts; lmstudio.ai/docs/cli/load",
        "names": ["--gpu", "--context-length", "--parallel", "--ttl", "--identifier", "--estimate-only", "--yes"]},
    "ray start": {
        "source": "ray 2.60.0, ray/scripts/scripts.py, start (a test holds it against a ray that is installed)",
        "names": ["--address", "--block", "--disable-usage-stats", "--head", "--node-ip-address", "--num-cpus", "--num-gpus",
                  "--port", "--resources"]},
    "lms import": {"source": "lmstudio.ai/docs/cli/local-models/import",
                   "names": ["--user-repo", "--yes", "--copy", "--hard-link", "--symbolic-link", "--dry-run"]},
}


def download(name: str, folder: Path) -> Path:
    """The unpacked package."""
    if name == "lmstudio":
        subprocess.run(["npm", "pack", "--silent", "@lmstudio/sdk"], cwd=folder, check=True, capture_output=True)
    else:
        sdist = name == "llama-cpp-python"
        more = ["--no-binary", name] if sdist else ["--only-binary", name, "--platform", "manylinux_2_28_x86_64",
                                                    "--python-version", "3.12"]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *more, "--dest", folder, name],
                       check=True)
    [file] = folder.iterdir()
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder, [n for n in archive.namelist() if n.endswith((".py", "METADATA"))])
        return folder
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def version(text: str) -> str:
    """What a package's metadata says it is."""
    return re.search(r'^Version: (\S+)|"version": "([^"]+)"', text, re.MULTILINE).group(1, 2)[0 if "Version: " in text else 1]


# ---- llama.cpp ------------------------------------------------------------------------------------------------------

def llama_cpp(folder: Path) -> dict:
    """common/arg.cpp: for every option whether it takes a value, which programs have it (none named: all) and which do not;
    and the values of some."""
    source = folder / "vendor" / "llama.cpp"
    text = (source / "common" / "arg.cpp").read_text(encoding="utf-8")
    options = {}
    for block in re.split(r"\badd_opt\(common_arg\(", text)[1:]:
        names = re.match(r"\s*((?:\{[^{}]*\},\s*)+)", block)
        if not names:
            continue
        found = re.findall(r'"(--?[^"]+)"', names[1])
        handler = re.search(r"\[[^\]]*\]\(common_params &\s*\w*(?:, ([^)]*))?\)", block)      # its second argument is the value
        value = handler and handler[1] and "bool" not in handler[1]
        examples = re.search(r"set_examples\((\{[^}]*\}|\w+)\)", block.split("\n    ));")[0])
        programs = sorted(set(re.findall(r"LLAMA_EXAMPLE_(\w+)", examples[1]))) if examples else []
        if examples and examples[1] == "mmproj_examples":
            programs = ["CLI", "MTMD", "SERVER", "TTS"]
        excluded = re.search(r"set_excludes\(\{([^}]*)\}", block.split("\n    ));")[0])
        left_out = sorted(set(re.findall(r"LLAMA_EXAMPLE_(\w+)", excluded[1]))) if excluded else []
        for name in found:
            if name.startswith("--"):
                options[name] = {"value": bool(value), "programs": programs, "not": left_out}
    cache_types = re.search(r"kv_cache_types = \{([^}]*)\}", text)[1]
    speculative = (source / "common" / "speculative.cpp").read_text(encoding="utf-8")
    quantize = (source / "tools" / "quantize" / "quantize.cpp").read_text(encoding="utf-8")
    convert = (source / "convert_hf_to_gguf.py").read_text(encoding="utf-8")
    rpc = source / "tools" / "rpc"
    return {
        "version": version((folder / "PKG-INFO").read_text(encoding="utf-8")), "source": "llama-cpp-python, vendor/llama.cpp",
        "options": options,
        "choices": {
            "--cache-type-k": [t.lower() for t in re.findall(r"GGML_TYPE_(\w+)", cache_types)],
            "--split-mode": re.search(r'"--split-mode"\}, "\{([^}]*)\}"', text)[1].split(","),
            "--flash-attn": re.search(r'"--flash-attn" \}, "\[([^\]]*)\]"', text)[1].split("|"),
            "--fit": re.search(r'"--fit" \}, "\[([^\]]*)\]"', text)[1].split("|"),
            "--spec-type": re.findall(r'^    \{"([a-z0-9-]+)",\s+COMMON_SPECULATIVE_TYPE', speculative, re.MULTILINE)},
        "rpc server": [re.search(r"set\(TARGET ([\w-]+)\)", (rpc / "CMakeLists.txt").read_text(encoding="utf-8"))[1],
                       *sorted(set(re.findall(r'arg == "(--\w+)"', (rpc / "rpc-server.cpp").read_text(encoding="utf-8"))))],
        "llama-quantize": sorted(set(re.findall(r'"(--[a-z-]+)"', quantize))),
        "convert_hf_to_gguf.py": sorted(set(re.findall(r'"(--[a-z-]+)"', convert))),
        "outtypes": re.findall(r'"(\w+)"', re.search(r'"--outtype".*?choices=\[([^\]]*)\]', convert, re.DOTALL)[1])}


# ---- vLLM -----------------------------------------------------------------------------------------------------------

def literal(path: Path, name: str) -> list[str]:
    """The strings of `name = Literal[...]`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        target = getattr(node, "target", None) or (getattr(node, "targets", None) or [None])[0]
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and getattr(target, "id", "") == name:
            return [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    raise LookupError(name)


def vllm(folder: Path) -> dict:
    """vllm/engine/arg_utils.py: every option that `vllm serve` hands to the engine, and choices from the config classes."""
    package = folder / "vllm"
    tree = ast.parse((package / "engine" / "arg_utils.py").read_text(encoding="utf-8"))
    options = {argument.value for node in ast.walk(tree) if isinstance(node, ast.Call)
               and getattr(node.func, "attr", "") == "add_argument" for argument in node.args
               if isinstance(argument, ast.Constant) and str(argument.value).startswith("--")}
    metadata = next(folder.glob("vllm-*.dist-info/METADATA")).read_text(encoding="utf-8")
    return {"version": version(metadata), "source": "vllm/engine/arg_utils.py", "options": sorted(options),
            "choices": {"--kv-cache-dtype": literal(package / "config" / "cache.py", "CacheDType"),
                        "--dtype": literal(package / "config" / "model.py", "ModelDType"),
                        "--quantization": literal(package / "model_executor" / "layers" / "quantization" / "__init__.py",
                                                  "QuantizationMethods")}}


# ---- LM Studio, Ollama ----------------------------------------------------------------------------------------------

def lmstudio(folder: Path) -> dict:
    """dist/index.d.ts: the fields of a load configuration, and the values of its enumerations."""
    text = (folder / "dist" / "index.d.ts").read_text(encoding="utf-8")

    def fields(what: str) -> list[str]:
        body = re.search(rf"declare (?:interface|type) {what}\b[^{{]*\{{\n(.*?)\n\}}", text, re.DOTALL)[1]
        return re.findall(r"^    (\w+)\??: ", re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL), re.MULTILINE)

    def choices(what: str) -> list[str]:
        return re.findall(r'"([^"]+)"', re.search(rf"declare type {what} = ([^;]*);", text)[1])

    return {"version": version((folder / "package.json").read_text(encoding="utf-8")), "source": "npm @lmstudio/sdk",
            "config": fields("LLMLoadModelConfig"), "gpu": fields("GPUSetting"),
            "cache types": choices("LLMLlamaCacheQuantizationType"), "split strategies": choices("LLMSplitStrategy"),
            "ratios": choices("LLMLlamaAccelerationOffloadRatio")}


def ollama(folder: Path) -> dict:
    """ollama/_types.py of the Python client: what a Modelfile's PARAMETER may name."""
    tree = ast.parse((folder / "ollama" / "_types.py").read_text(encoding="utf-8"))
    [options] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Options"]
    metadata = next(folder.glob("ollama-*.dist-info/METADATA")).read_text(encoding="utf-8")
    return {"version": version(metadata), "source": "the Python client's Options",
            "parameters": [node.target.id for node in options.body if isinstance(node, ast.AnnAssign)]}


READERS = {"llama-cpp-python": llama_cpp, "vllm": vllm, "lmstudio": lmstudio, "ollama": ollama}


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    found: dict = dict(READ)
    for name, read in READERS.items():
        if name in given:
            found[name] = read(Path(given[name]))
            continue
        with tempfile.TemporaryDirectory() as folder:
            found[name] = read(download(name, Path(folder)))
    GOLDEN.write_text(_compact(found), encoding="utf-8")


def _compact(found: dict) -> str:
    """A line for each list and option, so that a diff says what changed."""
    text = json.dumps(found, indent=1)
    flat = re.sub(r"\[[^\[\]{}]*\]|\{[^\[\]{}]*\}", lambda m: " ".join(m[0].split()), text)
    return re.sub(r'\{\s+"value"[^{}]*\}', lambda m: " ".join(m[0].split()), flat) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
