"""Commands against the engines: llama.cpp's own argument parser reads the line, llama-cpp-python loads what its code says."""

import ctypes
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest
from llama_engine import TYPES, log

import llmlab

pytestmark = pytest.mark.peers

LIBRARY = next((path for place in ("lib", "llama_cpp/lib") for path in
                [Path(llama_cpp.__file__).parent.parent / place / "libllama-common.so"] if path.exists()), None)
CLI, SERVER = 5, 12      # enum llama_example of common/common.h; options of one and not the other tell whether they still are

# Reads arguments with llama.cpp's common_params_to_map, as the presets of llama-server do: unknown options and missing values
# end the process. The result is a std::map, of which the empty one is five words that point at themselves.
READ = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
read = next(getattr(library, name) for name in sys.argv[2].split() if hasattr(library, name))
words = [word.encode() for word in sys.argv[4:]]
argv = (ctypes.c_char_p * (len(words) + 1))(*words)
room = (ctypes.c_uint64 * 6)()
head = ctypes.addressof(room) + 8
room[3] = room[4] = head
read.restype = ctypes.c_bool
sys.exit(not read(len(words), argv, int(sys.argv[3]), ctypes.byref(room)))
"""
NAMED = ("_Z20common_params_to_mapiPPc13llama_exampleRSt3mapI10common_argNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
         "St4lessIS3_ESaISt4pairIKS3_S9_EEE")


def read(program: int, words: list[str]) -> subprocess.CompletedProcess:
    """What llama.cpp's parser makes of a command line, in a process of its own."""
    assert LIBRARY, "llama-cpp-python came without libllama-common.so"
    return subprocess.run([sys.executable, "-c", READ, LIBRARY, NAMED, str(program), *words], capture_output=True, text=True,
                          env=os.environ | {"LD_LIBRARY_PATH": str(LIBRARY.parent), "GGML_NO_BACKTRACE": "1"})


def words_of(command: str) -> list[str]:
    """The arguments a shell hands to the program, its name first."""
    text = "".join(f'{name}() {{ printf "%s\\0" {name} "$@"; }}\n' for name in ("llama-server", "llama-cli")) + command
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


REPORTS = [
    ("llama-3-8b", "rtx-3060-12gb", {"kv": ("q8_0", "q4_0"), "context": 16384, "sequences": 2}),
    ("gpt-oss-20b", ["rtx-3060-12gb", "rtx-4090-24gb"], {"n_cpu_moe": 3, "split": (3, 1), "unified": True, "sequences": 4}),
    ("gemma-3-12b", None, {"swa_full": True, "flash_attention": False, "kv": ("q8_0", "bf16"), "batch": 64, "ubatch": 96}),
    ("llama-3-8b", "rtx-3060-12gb", {"gpu_layers": 12, "kv": "iq4_nl"}),
]


@pytest.mark.parametrize("which", range(len(REPORTS)))
@pytest.mark.parametrize(("engine", "program"), [("llama.cpp", SERVER), ("llama-cli", CLI)])
def test_llama_cpp_reads_the_line(which, engine, program):
    model, gpu, settings = REPORTS[which]
    done = read(program, words_of(llmlab.fit(model, gpu, **settings).command(engine)))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("card", "task"), [("rtx-3060-12gb", "coding"), ("rtx-4060-8gb", "reasoning")])
def test_llama_cpp_reads_every_recommended_line(card, task):
    choices = llmlab.best(card, task=task).leaders
    assert len(choices) > 4
    for choice in choices:
        done = read(SERVER, words_of(choice.command("llama.cpp")))
        assert done.returncode == 0, (choice.command("llama.cpp"), done.stderr)


@pytest.mark.parametrize(("program", "words", "says"), [
    (SERVER, ["--no-such-option"], "invalid argument"), (SERVER, ["--ctx-size"], "expected value"),
    (CLI, ["--kv-unified"], "invalid argument"), (CLI, ["--server-base", "x"], ""), (SERVER, ["--server-base", "x"], "invalid"),
])
def test_the_parser_bites(program, words, says):
    done = read(program, ["llama", *words])
    assert (done.returncode != 0) == bool(says) and says in done.stderr, done.stderr


def test_the_golden_list_is_of_the_installed_version():
    golden = json.loads((Path(__file__).parent.parent / "golden" / "flags.json").read_text())["llama-cpp-python"]
    assert golden["version"] == llama_cpp.__version__, "run tests/make_flags.py"
    options = golden["options"]
    options.pop("--control-vector-layer-range")      # takes two values, which this reader of llama.cpp's refuses
    for program, number in (("SERVER", SERVER), ("CLI", CLI)):
        words = [program]
        for name, option in options.items():
            if program not in option["not"] and (not option["programs"] or {program, "COMMON"} & set(option["programs"])):
                words += [name, *["1"] * option["value"]]
        done = read(number, words)
        assert len(words) > 200 and done.returncode == 0, done.stderr


# ---- llama-cpp-python -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small real model, in a folder whose name wants quoting."""
    path = tmp_path_factory.mktemp("small") / "a folder's \"name\"" / "tiny llama.gguf"
    path.parent.mkdir()
    path.symlink_to(llmlab.fetch("smollm2-135m"))
    return path


def test_every_keyword_is_one_of_llama():
    keywords = set(inspect.signature(llama_cpp.Llama.__init__).parameters)
    for model, gpu, settings in REPORTS:
        code = llmlab.fit(model, gpu, **settings).command("llama-cpp-python")
        written = set(re.findall(r"^    (\w+)=", code, re.MULTILINE))
        assert written and written <= keywords, written - keywords
        for name in re.findall(r"llama_cpp\.(\w+)", code):
            assert hasattr(llama_cpp, name), name


@pytest.mark.parametrize("settings", [{"context": 512, "kv": ("q8_0", "q4_0"), "ubatch": 64, "batch": 256},
                                      {"context": 256, "kv": "bf16", "flash_attention": False}])
def test_the_code_runs_and_gives_what_it_says(small, settings):
    report = llmlab.fit(small, None, **settings)
    code = report.command("llama-cpp-python")
    log()
    there = {}
    exec(code.replace('print(llm("Once upon a time", max_tokens=32)["choices"][0]["text"])', ""), there)
    llm, s = there["llm"], report.settings
    params = llm.context_params
    assert llm.n_ctx() == settings["context"] and params.n_ubatch == min(s.micro, s.context) and not params.swa_full
    assert (params.type_k, params.type_v) == (TYPES[s.kv[0]], TYPES[s.kv[1]])
    assert params.flash_attn_type == int(s.flash_attention)
    llm.close()


# ---- the whole parser, where llama.cpp's headers are ----------------------------------------------------------------

PROBE = """
#include "arg.h"
#include <cstdio>
int main(int argc, char ** argv) {
    common_params p;
    if (!common_params_parse(argc, argv, p, LLAMA_EXAMPLE_SERVER)) return 1;
    printf("n_ctx %d n_batch %d n_ubatch %d n_parallel %d ", p.n_ctx, p.n_batch, p.n_ubatch, p.n_parallel);
    printf("unified %d flash %d k %d v %d ", p.kv_unified, (int) p.flash_attn_type, p.cache_type_k, p.cache_type_v);
    printf("swa_full %d ngl %d fit %d devices %zu ", p.swa_full, p.n_gpu_layers, p.fit_params, p.devices.size());
    printf("share0 %.9g share1 %.9g", p.tensor_split[0], p.tensor_split[1]);
}
"""

if source := os.environ.get("LLAMA_CPP_SOURCE"):      # a folder with llama.cpp's sources of the installed version
    @pytest.fixture(scope="module")
    def probe(tmp_path_factory):
        folder = tmp_path_factory.mktemp("probe")
        (folder / "probe.cpp").write_text(PROBE)
        places = [f"-I{source}/{where}" for where in ("common", "include", "ggml/include", "vendor")]
        subprocess.run(["c++", "-std=c++17", "probe.cpp", *places, f"-L{LIBRARY.parent}", "-lllama-common", "-lllama", "-lggml",
                        "-lggml-base", "-o", "probe"], cwd=folder, check=True)
        return folder / "probe"

    @pytest.mark.parametrize("which", range(len(REPORTS)))
    def test_llama_server_would_start_with_exactly_these_settings(probe, which):
        model, gpu, settings = REPORTS[which]
        report = llmlab.fit(model, gpu, **settings)
        s = report.settings
        done = subprocess.run([probe, *words_of(report.command())[1:]], capture_output=True, text=True,
                              env=os.environ | {"LD_LIBRARY_PATH": str(LIBRARY.parent)})
        assert done.returncode == 0, done.stderr
        words = done.stdout.split()
        got = {name: float(value) for name, value in zip(words[::2], words[1::2], strict=True)}
        shares = [got.pop("share0"), got.pop("share1")]
        assert got == {
            "n_ctx": s.context, "n_batch": s.batch, "n_ubatch": s.ubatch, "n_parallel": s.sequences, "unified": s.unified,
            "flash": s.flash_attention, "k": TYPES[s.kv[0]], "v": TYPES[s.kv[1]], "swa_full": s.swa_full,
            "ngl": report.gpu_layers, "fit": 0, "devices": not report.cards}      # "none" is one empty device
        if len(report.cards) > 1:
            given = s.split or [card.memory / 2**20 for card in report.cards]
            assert shares == [ctypes.c_float(share).value for share in given]
