"""Commands for other engines: every name is one the engine has, every value is the report's, and the Python runs."""

import copy
import json
import logging
import pickle
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmlab
from llmlab.errors import LabError, UnknownName
from llmlab.exports import LMSTUDIO_CACHES, OLLAMA_CACHES, WRITERS, Command
from llmlab.fitting import fit
from llmlab.memory import types
from llmlab.shapes import from_config, model_spec

GOLDEN = json.loads((Path(__file__).parent / "golden" / "flags.json").read_text(encoding="utf-8"))
LLAMA = GOLDEN["llama-cpp-python"]

REPORTS = {
    "one card": ("llama-3-8b", "rtx-3060-12gb", {}),
    "asymmetric": ("llama-3-8b", "rtx-3060-12gb", {"kv": ("q8_0", "q4_0"), "context": 16384, "sequences": 4, "unified": True}),
    "two cards": ("llama-3-8b", ["rtx-3060-12gb", "rtx-4090-24gb"], {"quant": "BF16"}),
    "shares": ("qwen3-30b-a3b", ["rtx-3060-12gb"] * 2, {"split": (3, 1), "n_cpu_moe": 40, "ubatch": 1024}),
    "host": ("gemma-3-12b", None, {"swa_full": True, "flash_attention": False, "kv": ("q5_1", "bf16"), "host": "64 GiB"}),
    "part": ("llama-3-70b", "rtx-4090-24gb", {"batch": 256, "ubatch": 512}),
    "experts": ("qwen3-30b-a3b", "rtx-3060-12gb", {"n_cpu_moe": "auto"}),
    "draft": ("qwen3-8b", "rtx-4090-24gb", {"draft": "qwen3-0.6b", "projector": "850 MiB"}),
    "few layers": ("llama-3-8b", "rx-7900-xtx-24gb", {"gpu_layers": 12, "kv": "iq4_nl", "importance": True}),
}
LLAMA_ENGINES = [name for name, (home, _) in WRITERS.items() if home == "llama.cpp"]


def report_of(name: str):
    model, gpu, asked = REPORTS[name]
    return fit(model, gpu, **asked)


def run_by_a_shell(text: str, folder: Path) -> list[tuple[dict[str, str], list[str]]]:
    """The programs that bash starts, each with OLLAMA_ variables it sees and its words."""
    stub = "n=0\n" + "".join(
        f'{name}() {{ n=$((n + 1)); env | grep ^OLLAMA_ > "$n.env"; printf "%s\\0" {name} "$@" > "$n.words"; }}\n'
        for name in ("llama-server", "llama-cli", "ollama", "vllm"))
    subprocess.run(["bash", "-uc", stub + text], cwd=folder, check=True, env={"PATH": "/usr/bin:/bin"})
    calls = []
    for file in sorted(folder.glob("*.words")):
        environment = dict(line.split("=") for line in file.with_suffix(".env").read_text().splitlines())
        calls.append((environment, file.read_bytes().decode().split("\0")[:-1]))
        file.unlink()
    return calls


def llama_arguments(text: str, folder: Path) -> dict[str, str | bool]:
    """{option: value} of a llama.cpp command, each checked against the options llama.cpp has."""
    [(_, [program, *words])] = run_by_a_shell(text, folder)
    example = {"llama-server": "SERVER", "llama-cli": "CLI"}[program]
    found: dict[str, str | bool] = {}
    while words:
        name = words.pop(0)
        option = LLAMA["options"][name]
        assert not option["programs"] or {"COMMON", example} & set(option["programs"]), f"{program} has no {name}"
        assert example not in option["not"] and name not in found
        found[name] = words.pop(0) if option["value"] else True
    for name, same_as in (("--cache-type-k",) * 2, ("--cache-type-v", "--cache-type-k"), *(
            (n, n) for n in ("--split-mode", "--flash-attn", "--fit", "--spec-type"))):
        assert found.get(name) in (None, *LLAMA["choices"][same_as])
    return found


# ---- llama.cpp ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("engine", ["llama.cpp", "llama-cli"])
def test_llama_cpp_gets_what_the_report_counts(name, engine, tmp_path):
    report = report_of(name)
    s = report.settings
    found = llama_arguments(report.command(engine), tmp_path)
    server = engine == "llama.cpp"
    assert found["--ctx-size"] == str(s.context) and found["--fit"] == "off"
    assert (found["--batch-size"], found["--ubatch-size"]) == (str(s.batch), str(s.ubatch))
    assert (found["--cache-type-k"], found["--cache-type-v"]) == s.kv
    assert found["--flash-attn"] == ("on" if s.flash_attention else "off")
    assert found["--gpu-layers"] == str(report.gpu_layers)
    assert found.get("--n-cpu-moe") == (str(report.n_cpu_moe) if report.n_cpu_moe else None)
    assert found.get("--swa-full", False) == s.swa_full
    assert found.get("--parallel") == (str(s.sequences) if server else None)
    assert found.get("--kv-unified", False) == (s.unified and server)
    assert found.get("--no-kv-unified", False) == (not s.unified and server)
    assert found.get("--device") == (None if report.cards else "none")
    if len(report.cards) > 1:
        shares = [float(share) for share in found["--tensor-split"].split(",")]
        given = s.split or [card.memory for card in report.cards]
        assert [x / sum(shares) for x in shares] == pytest.approx([x / sum(given) for x in given], rel=1e-7)


def test_what_lies_beside_the_model(tmp_path):
    found = llama_arguments(report_of("draft").command(), tmp_path)
    assert (found["--spec-type"], found["--spec-draft-model"]) == ("draft-simple", "Qwen3-0.6B-Q4_K_M.gguf")
    assert found["--mmproj"] == "mmproj.gguf" and found["--spec-draft-ngl"] == "all" and "--spec-draft-device" not in found
    report = fit("qwen3-8b", None, draft="qwen3-0.6b", projector="850 MiB", host="64 GiB")
    found = llama_arguments(report.command(), tmp_path)
    assert found["--spec-draft-device"] == "none" and found["--no-mmproj-offload"] is True
    names = [e for e in llmlab.catalog.entries() if any(layer.mtp for layer in model_spec(e).layers)]
    found = llama_arguments(fit(names[0], None, mtp=True, host="4 TiB").command(), tmp_path)
    assert found["--spec-type"] == "draft-mtp" and "--spec-draft-model" not in found


def test_all_of_llama_s_aliases_write_the_same():
    report = report_of("one card")
    assert report.command() == report.command("llama.cpp") == report.command("llama-server") != report.command("llama-cli")


@settings(max_examples=20, deadline=None)
@given(name=st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_any_path_comes_through_the_shell(name, tmp_path_factory):
    folder = tmp_path_factory.mktemp("path")
    spec = model_spec("llama-3-8b")
    path = f"/models/{name}.gguf"
    held = replace_path(spec, path)
    assert llama_arguments(fit(held, "rtx-3060-12gb").command(), folder)["--model"] == path


def replace_path(spec, path: str):
    """As if the model had been read from a GGUF there."""
    held = [replace(t, type=type) for t, type in zip(spec.tensors, types(spec, "Q4_K_M"), strict=True)]
    return replace(spec, path=path, source="gguf", stored="Q4_K_M", tensors=tuple(held))


def test_a_file_on_the_hub_is_named_as_such(tmp_path):
    spec = replace(replace_path(model_spec("llama-3-8b"), "owner/repo/Q4/a file-Q4_K_M-00001-of-00002.gguf"), source="hub")
    report = fit(spec, "rtx-3060-12gb")
    found = llama_arguments(report.command(), tmp_path)
    assert (found["--hf-repo"], found["--hf-file"]) == ("owner/repo", "Q4/a file-Q4_K_M-00001-of-00002.gguf")
    assert found["--no-mmproj"] is True and "--model" not in found
    assert "FROM hf.co/owner/repo:Q4_K_M\n" in report.command("ollama")
    assert "Llama.from_pretrained(\n    'owner/repo',\n    filename='Q4/a file" in report.command("llama-cpp-python")


def test_a_file_that_does_not_exist_yet_comes_with_its_recipe():
    for text in (report_of("few layers").command().notes, fit(replace_path(model_spec("llama-3-8b"), "/m/it's.gguf"), None,
                                                             quant="IQ4_XS", importance=True, host="64 GiB").command().notes):
        [recipe] = [note for note in text if "llama-quantize" in note]
        assert "--imatrix imatrix.gguf" in recipe
        for program in ("llama-quantize", "convert_hf_to_gguf.py"):
            after = recipe.partition(program)[2].split(", then")[0]
            assert set(re.findall(r"--[a-z-]+", after)) <= set(LLAMA[program]), recipe
        kind = re.search(r"--outtype (\w+)", recipe)
        assert kind is None or kind[1] in LLAMA["outtypes"]
    assert "'/m/it'\"'\"'s.gguf'" in recipe and "--allow-requantize" in recipe


def test_pairs_without_a_cuda_kernel_are_said():
    warned = [any("GGML_CUDA_FA_QUANTS" in n for n in fit("llama-3-8b", card, kv=kv, flash_attention=flash).command().notes)
              for card, kv, flash in (("rtx-3060-12gb", "q8_0", True), ("rtx-3060-12gb", ("q8_0", "q4_0"), True),
                                      ("rtx-3060-12gb", "q5_1", True), ("rx-7900-xtx-24gb", "q5_1", True),
                                      ("rtx-3060-12gb", ("q8_0", "f16"), False))]
    assert warned == [False, True, True, False, False]


# ---- Ollama ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", REPORTS)
def test_ollama(name, tmp_path):
    report = report_of(name)
    s, text = report.settings, report.command("ollama")
    [(environment, serve), (_, create), (_, start)] = run_by_a_shell(text, tmp_path)
    assert serve == ["ollama", "serve"] and set(environment) <= set(GOLDEN["ollama environment"]["names"])
    assert environment["OLLAMA_NUM_PARALLEL"] == str(s.sequences)
    assert environment["OLLAMA_FLASH_ATTENTION"] == str(int(s.flash_attention))
    assert ("OLLAMA_SCHED_SPREAD" in environment) == (len(report.cards) > 1)
    assert environment["OLLAMA_KV_CACHE_TYPE"] in OLLAMA_CACHES
    assert create[1] == "create" and create[3:] == ["-f", "Modelfile"] and start[1:] == ["run", create[2]]
    [source, *lines] = (tmp_path / "Modelfile").read_text().splitlines()
    parameters = dict(line.removeprefix("PARAMETER ").split(" ") for line in lines)
    assert source.startswith("FROM ./") and set(parameters) <= set(GOLDEN["ollama"]["parameters"])
    assert parameters == {name: str(value) for name, value in (
        ("num_ctx", s.context // s.sequences), ("num_batch", s.micro), ("num_gpu", report.gpu_layers))}


def test_ollama_says_what_it_cannot():
    notes = " ".join(report_of("shares").command("ollama").notes)
    assert "no setting for n_cpu_moe" in notes and "no setting for split" in notes
    for kv, nearest in ((("q8_0", "q4_0"), "q8_0"), (("q5_1", "q5_1"), "q8_0"), (("bf16", "bf16"), "f16"),
                        (("f32", "f16"), "f16"), (("q4_0", "q4_0"), "q4_0")):
        text = fit("llama-3-8b", "rtx-3060-12gb", kv=kv).command("ollama")
        assert f"OLLAMA_KV_CACHE_TYPE={nearest} " in text
        assert any("one cache type" in note for note in text.notes) == (kv != (nearest, nearest))
    assert list(OLLAMA_CACHES) == GOLDEN["ollama cache types"]["names"]
    with pytest.raises(LabError, match="line break"):
        fit(replace_path(model_spec("llama-3-8b"), "/a\nb.gguf"), None, host="64 GiB").command("ollama")


# ---- LM Studio ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", REPORTS)
def test_lmstudio(name):
    report = report_of(name)
    s, text = report.settings, report.command("lmstudio")
    config = json.loads(re.search(r"config: (\{.*\}),\n\}\);", text, re.DOTALL)[1])
    known = GOLDEN["lmstudio"]
    assert set(config) <= set(known["config"]) and set(config["gpu"]) <= set(known["gpu"])
    assert config["gpu"].get("splitStrategy", "evenly") in known["split strategies"]
    for ratio in (config["gpu"]["ratio"], config["gpu"].get("numCpuExpertLayersRatio", 0)):
        assert ratio in known["ratios"] or 0 <= ratio <= 1
    assert set(LMSTUDIO_CACHES) == set(known["cache types"])
    assert config["llamaKCacheQuantizationType"] in LMSTUDIO_CACHES and config["autoFit"] is False
    assert config["contextLength"] * (1 if s.unified else s.sequences) == s.context
    assert (config["evalBatchSize"], config["physicalBatchSize"]) == (s.batch, s.micro)
    assert all(line.startswith("//") for line in text.splitlines()[:len(text.notes)])
    flags = re.search(r"`lms load ([^`]*)`", " ".join(text.notes))[1]
    assert set(re.findall(r"--[a-z-]+", flags)) <= set(GOLDEN["lms load"]["names"])
    assert "--copy" in GOLDEN["lms import"]["names"] and "lms import --copy" in " ".join(text.notes)
    asked = {"shares": "no shares", "host": "no bf16 cache", "few layers": "12 of 33"}.get(name)
    assert asked is None or any(asked in note for note in text.notes)


# ---- vLLM -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("gpu", "asked", "expected"), [
    ("rtx-4090-24gb", {"quant": "BF16"}, {
        "--dtype": "bfloat16", "--kv-cache-dtype": "auto", "--gpu-memory-utilization": "0.92"}),
    ("rtx-4090-24gb", {"quant": "FP8", "kv": "fp8", "sequences": 4}, {
        "--quantization": "fp8", "--kv-cache-dtype": "fp8", "--max-model-len": "2048", "--max-num-seqs": "4"}),
    (["rtx-4090-24gb"] * 2, {"quant": "F16", "batch": 4096}, {
        "--dtype": "float16", "--tensor-parallel-size": "2", "--max-num-batched-tokens": "4096"}),
    ("rtx-4090-24gb", {"quant": "AWQ_INT4", "utilization": 0.8}, {"--gpu-memory-utilization": "0.8"}),
])
def test_vllm(gpu, asked, expected, tmp_path):
    text = fit("llama-3-8b", gpu, engine="vllm", **asked).command()
    [(_, [_, serve, model, *words])] = run_by_a_shell(text, tmp_path)
    found = dict(zip(words[::2], words[1::2], strict=True))
    assert serve == "serve" and model == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert set(found) <= set(GOLDEN["vllm"]["options"]) and expected.items() <= found.items()
    for name, choices in GOLDEN["vllm"]["choices"].items():
        assert found.get(name) in (None, *choices)
    assert any("checkpoint in AWQ" in note for note in text.notes) == ("AWQ" in asked["quant"])


def test_vllm_says_what_it_cannot():
    text = fit("llama-3-8b", "rtx-4090-24gb", engine="vllm", quant="BF16", kv="q8_0").command()
    assert "no cache of K q8_0 and V q8_0" in text
    text = fit("llama-3-8b", "rtx-4090-24gb", quant="F16", gpu_layers=20).command("vllm")
    assert "Not the same: vLLM is not asked for gpu_layers." in text.notes
    with pytest.raises(LabError, match="no GGUF"):
        fit(replace_path(model_spec("llama-3-8b"), "/m.gguf"), "rtx-4090-24gb", quant="BF16").command("vllm")


# ---- transformers ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder as save_pretrained leaves it: a model of two layers, a tokenizer of a few words."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("a folder's") / 'with "quotes"'
    config = transformers.AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, bos_token_id=0, eos_token_id=1, max_position_embeddings=128)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<s>", "</s>", "Once", "upon", "a", "time", "[UNK]"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("asked", "dtype", "attention"), [
    ({"quant": "F32", "kv": "f32"}, "float32", "sdpa"),
    ({"quant": "BF16", "flash_attention": False, "sequences": 2}, "bfloat16", "eager"),
    ({"quant": "NF4_DQ", "kv": "f32"}, "float32", "sdpa"), ({"quant": "INT8", "kv": "f32"}, "float32", "sdpa")])
def test_transformers_code_runs(tiny, capsys, asked, dtype, attention):
    report = fit(tiny, None, engine="transformers", context=32, host="8 GiB", **asked)
    code, there = report.command(), {}
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)      # INT8 in float32 warns at every multiplication
    exec(compile(code, "exported", "exec"), there)
    model = there["model"]
    assert str(model.dtype) == f"torch.{dtype}" and model.config._attn_implementation == attention
    assert there["tokens"].shape[0] == report.settings.sequences and there["tokens"].shape[1] <= 32 // report.settings.sequences
    quantization = getattr(model.config, "quantization_config", None)
    assert (quantization is not None) == (asked["quant"] not in ("F32", "BF16"))
    if asked["quant"] == "NF4_DQ":
        assert quantization.bnb_4bit_quant_type == "nf4" and quantization.bnb_4bit_use_double_quant
    if asked["quant"] == "INT8":
        assert quantization.load_in_8bit
    assert not [note for note in code.notes if "Not the same" in note] and capsys.readouterr().out.startswith("[")


def test_transformers_says_what_it_cannot():
    text = fit("llama-3-8b", "rtx-4090-24gb", quant="BF16", kv="q8_0").command("transformers")
    assert "keeps K and V in bfloat16, not in q8_0" in text
    held = replace_path(model_spec("llama-3-8b"), "/m/x.gguf")
    text = fit(held, "rtx-4090-24gb", engine="transformers", quant="BF16").command()
    assert "    gguf_file='x.gguf',\n" in text and "name = '/m'" in text and "unpacks the Q4_K_M file to bfloat16" in text
    assert "    quantization_config=GgufConfig(dequantize=True),\n" in text
    assert hasattr(pytest.importorskip("transformers"), "GgufConfig")
    with pytest.raises(LabError, match="safetensors checkpoint"):
        fit(held, "rtx-4090-24gb", engine="transformers", quant="NF4").command()
    assert '"balanced"' in fit("llama-3-8b", ["rtx-4090-24gb"] * 2, engine="transformers", quant="BF16").command()


# ---- all of them ----------------------------------------------------------------------------------------------------

def test_a_model_known_by_its_shapes_alone_is_asked_for():
    spec = from_config(dict(model_spec("llama-3-8b").config), "mine")
    text = fit(spec, "rtx-4090-24gb", engine="transformers", quant="BF16").command()
    assert any("only its shapes are known" in note for note in text.notes)


def test_a_command_is_a_string_that_remembers():
    text = report_of("one card").command()
    assert isinstance(text, str) and text == text.text == str(text) == repr(text) and type(text.text) is str
    for twin in (copy.copy(text), copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert twin == text and (twin.engine, twin.notes) == ("llama.cpp", text.notes)
    assert Command("a < b", "llama.cpp")._repr_html_() == "<pre>a &lt; b</pre>"


@pytest.mark.parametrize("engine", WRITERS)
def test_notes_are_comments_whatever_a_path_holds(engine, tmp_path):
    home = WRITERS[engine][0]
    spec = replace_path(model_spec("llama-3-8b"), "/m/new\nrm -rf oops.gguf")
    quant = "Q6_K" if home == "llama.cpp" else "BF16"
    try:
        text = fit(spec, "rtx-4090-24gb", engine=home, quant=quant).command(engine)
    except LabError as error:
        assert engine == "vllm" and "\n" not in str(error)
        return
    assert text.notes and all("\n" not in note for note in text.notes)
    assert not [line for line in text.splitlines() if line.startswith("rm")]


def test_what_cannot_run_is_one_line():
    for model, asked, engine, says in (
            ("llama-3-8b", {}, "vllm", "AWQ_INT4"), ("llama-3-8b", {}, "transformers", "NF4"),
            ("llama-3-8b", {"engine": "transformers", "quant": "NF4"}, "ollama", "cannot run NF4")):
        with pytest.raises(LabError, match=says) as caught:
            fit(model, "rtx-4090-24gb", **asked).command(engine)
        assert "\n" not in str(caught.value)
    for wrong in ("llama", "", 7, None.__class__, ["vllm"]):
        with pytest.raises(UnknownName, match="is no engine; there are llama.cpp"):
            fit("llama-3-8b", "rtx-4090-24gb").command(wrong)


def test_another_engine_s_verdict_is_said():
    report = llmlab.fit("llama-3-70b", "rtx-4090-24gb", quant="F16")
    assert any("In vLLM this does not fit" in note for note in report.command("vllm").notes)
    assert fit("llama-3-8b", "rtx-4090-24gb", engine="vllm", quant="F16").command("llama.cpp").startswith("#")
