"""llmlab.load: every kind of path, what was chosen and why, safetensors with and without bitsandbytes, and what it costs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runtime_models import CASES, VOCAB, divergence, make, random_model

import llmlab
from llmlab import loading
from llmlab.errors import BadFile, LabError, UnknownName
from llmlab.gguf import read_gguf, write_gguf
from llmlab.vocabulary import tokenizer_of

TOP = Path(__file__).resolve().parent.parent
TOKENS = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(path, reference) of a tiny llama."""
    path = tmp_path_factory.mktemp("loading") / "tiny.gguf"
    return path, make("llama", path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A safetensors folder, and the model saved in it."""
    path, model = tmp_path_factory.mktemp("loading") / "folder", random_model(CASES["llama"])
    model.save_pretrained(path)
    return path, model


# ---- GGUF ----------------------------------------------------------------------------------------------------

def test_what_was_chosen_is_told(tiny):
    model, tokenizer = llmlab.load(tiny[0], device="cpu")
    told = model.llmlab
    assert (told.path, told.architecture, told.context) == (str(tiny[0]), "llama", 512)
    assert told.file_bytes == tiny[0].stat().st_size and told.resident_bytes == model.get_memory_footprint()
    assert told.dtype == str(model.dtype).removeprefix("torch.") and told.dtype in told.why
    assert set(told.strategy.split(" + ")) <= {"compact", "fast"} and "on cpu, as asked" in told.why
    assert tokenizer is None and model.name_or_path == str(tiny[0])        # this file has no vocabulary
    assert model.generation_config.eos_token_id == 2 and model.config.bos_token_id == 1


@pytest.mark.parametrize("strategy", ["compact", "reference", "fast"])
def test_a_strategy_is_kept_to(tiny, strategy):
    model, _ = llmlab.load(tiny[0], strategy=strategy, dtype="bf16", device="cpu")
    chosen = {packed.strategy for _, packed in model.packed()}
    assert strategy in chosen <= {strategy, "compact"}          # an embedding that is only looked up stays compact
    assert model.dtype == torch.bfloat16 and "bfloat16, as asked" in model.llmlab.why


def test_compact_holds_the_file_and_little_else(tiny):
    model, _ = llmlab.load(tiny[0], strategy="compact", device="cpu")
    assert all(packed.bytes == 0 and packed.mapped for _, packed in model.packed())
    assert model.llmlab.resident_bytes < tiny[0].stat().st_size


@pytest.mark.parametrize("free", [10**12, 0])
def test_auto_follows_the_memory_that_is_free(tiny, monkeypatch, free):
    from llmlab.kernels import choosing
    monkeypatch.setattr(choosing, "free_memory", lambda device: free)
    model, _ = llmlab.load(tiny[0], dtype="float32", device="cpu")
    assert ("fast" in model.llmlab.strategy) == bool(free)
    assert ("room for speed" if free else "more than half") in model.llmlab.why


@torch.no_grad()
def test_a_set_of_files_is_one_model(tiny, tmp_path):
    path, reference = tiny
    file = read_gguf(path)
    tensors = [(n, t.shape, t.type, file.data(n).tobytes()) for n, t in file.tensors.items()]
    half = len(tensors) // 2
    names = [tmp_path / f"tiny-0000{i}-of-00002.gguf" for i in (1, 2)]
    for number, (name, part) in enumerate(zip(names, (tensors[:half], tensors[half:]), strict=True)):
        split = {"split.no": ("uint16", number), "split.count": ("uint16", 2), "split.tensors.count": ("int32", len(tensors))}
        write_gguf(name, {**(file.typed_metadata() if not number else {}), **split}, part)
    model, _ = llmlab.load(names[0], device="cpu", dtype="float32")
    assert divergence(reference(TOKENS).logits, model(TOKENS).logits) < 1e-7
    assert model.llmlab.file_bytes == sum(name.stat().st_size for name in names)
    with pytest.raises(BadFile, match="is file 2 of a set of 2; open the first"):
        llmlab.load(names[1])
    os.remove(names[1])
    with pytest.raises(BadFile, match="tiny-00002-of-00002.gguf is missing"):
        llmlab.load(names[0])


@torch.no_grad()
@pytest.mark.parametrize("change", ["deleted", "another in its place", "cut short", "written over"])
def test_a_file_that_changes_under_a_loaded_model(tiny, tmp_path, change):
    path, other = tmp_path / "live.gguf", tmp_path / "other.gguf"
    path.write_bytes(tiny[0].read_bytes())
    other.write_bytes(b"GGUF")
    model, _ = llmlab.load(path, device="cpu", strategy="compact")
    before = model(TOKENS).logits
    if change in ("deleted", "another in its place"):
        os.remove(path) if change == "deleted" else os.replace(other, path)
        assert torch.equal(model(TOKENS).logits, before)
        return
    if change == "cut short":
        os.truncate(path, 4096)                 # touching a page beyond would end the process
    else:
        os.utime(path, ns=(0, 0))
    with pytest.raises(BadFile, match="live.gguf has changed since it was opened"):
        model(TOKENS)


@pytest.mark.parametrize(("settings", "says"), [
    ({"strategy": "clever"}, "strategy is 'clever'; give one of auto, compact, fast, reference"),
    ({"dtype": "int8"}, "dtype 'int8' is not one of float32, bfloat16, float16"),
    ({"quant": "nf4"}, "quant='nf4' is for safetensors folders"),
    ({"device": "abacus"}, "device 'abacus' cannot be used here"),
    ({"device": "meta"}, "device 'meta' cannot be used here"),
])
def test_what_cannot_be_is_said(tiny, settings, says):
    with pytest.raises(LabError, match=re.escape(says)):
        llmlab.load(tiny[0], **settings)


def test_a_name_that_is_not_here_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    with pytest.raises(UnknownName, match=r"'no-such-model' is no file and no model on this computer; fetch it first"):
        llmlab.load("no-such-model")
    for name in ("", "x" * 5000):
        with pytest.raises(UnknownName, match="is no file and no model on this computer") as caught:
            llmlab.load(name)
        assert len(str(caught.value)) < 400
    with pytest.raises(LabError, match="is not a path"):
        llmlab.load(None)


def test_a_name_that_is_here_is_found(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    (tmp_path / "models" / "me" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "me" / "mine" / "mine-Q4_K_M.gguf").write_bytes(tiny[0].read_bytes())
    assert llmlab.load("me/mine:Q4_K_M", device="cpu")[0].llmlab.path.endswith("mine-Q4_K_M.gguf")


def test_a_projector_is_no_model(tmp_path):
    path = tmp_path / "mmproj.gguf"
    write_gguf(path, {"general.architecture": "clip"}, [("v.weight", (4,), "F32", bytes(16))])
    with pytest.raises(LabError, match="is the projector of a model"):
        llmlab.load(path)


def test_without_a_fast_bfloat16_activations_are_float32(monkeypatch):
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has, raising=False)
        assert loading._dtype(None, torch.device("cpu"))[0] == dtype


# ---- safetensors ---------------------------------------------------------------------------------------------

@torch.no_grad()
def test_a_folder_is_transformers_own(folder):
    path, saved = folder
    model, tokenizer = llmlab.load(path, dtype="float32", device="cpu")
    assert tokenizer is None and type(model) is type(saved) and not model.training
    assert torch.allclose(model(TOKENS).logits, saved(TOKENS).logits, atol=1e-6)
    assert (model.llmlab.strategy, model.llmlab.architecture, model.llmlab.context) == ("dense", "llama", 512)
    assert model.llmlab.resident_bytes == pytest.approx(model.llmlab.file_bytes, rel=0.01)


@pytest.mark.parametrize(("quant", "share", "limit"), [("nf4", 0.36, 1.0), ("nf4-double", 0.35, 1.0), ("INT8", 0.45, 0.05)])
@torch.no_grad()
def test_bitsandbytes_by_transformers_own_config(folder, quant, share, limit):
    """float32 in the file: the matrices of a layer shrink to 4 and 8 bits and their scales, embedding and output stay."""
    path, saved = folder
    dtype = None if quant == "INT8" else "float32"
    model, _ = llmlab.load(path, quant=quant, dtype=dtype, device="cpu")
    told = model.llmlab
    assert told.strategy == quant.lower() and "by bitsandbytes" in told.why
    assert told.resident_bytes < share * told.file_bytes
    assert 0 < divergence(saved(TOKENS).logits, model(TOKENS).logits.float()) < limit
    if quant == "nf4-double":
        assert told.resident_bytes < llmlab.load(path, quant="nf4", dtype="float32", device="cpu")[0].llmlab.resident_bytes


def test_a_folders_template_is_bounded_too(folder, tmp_path):
    """Loaded as transformers loads it, saved again by its own name; a template that reaches out or never ends is one line."""
    path, _ = folder
    shutil.copytree(path, tmp_path / "model")
    real = tokenizer_of(read_gguf(llmlab.fetch("smollm2-135m")))
    real.save_pretrained(tmp_path / "model")
    _, tokenizer = llmlab.load(tmp_path / "model")
    say = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(say, tokenize=False) == real.apply_chat_template(say, tokenize=False)
    for template in ("{{ messages.__class__.__mro__ }}", "{% for i in range(10**9) %}{% endfor %}"):
        tokenizer.chat_template = template
        with pytest.raises(LabError) as told:
            tokenizer.apply_chat_template(say, tokenize=False)
        assert "model" in str(told.value) and "\n" not in str(told.value)
    tokenizer.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/tokenizer_config.json").read_text())["tokenizer_class"]


def test_folders_that_cannot_be_used(folder, tmp_path):
    path, _ = folder
    for settings, says in (({"quant": "q4"}, "quant='q4' is not one of"), ({"strategy": "fast"}, "is for GGUF files")):
        with pytest.raises(LabError, match=says):
            llmlab.load(path, **settings)
    with pytest.raises(BadFile, match="it has no safetensors; give a .gguf, or a folder with both; pickles are never read"):
        llmlab.load(tmp_path)
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(BadFile, match="it has no safetensors"):
        llmlab.load(tmp_path)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(BadFile, match="give one of its files, a.gguf"):
        llmlab.load(tmp_path)
    data = (path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-1000])
    with pytest.raises(BadFile, match="transformers cannot load it"):
        llmlab.load(tmp_path, device="cpu")


def test_a_folder_that_lacks_a_tensor_says_which(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    path, _ = folder
    state = load_file(path / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    with pytest.raises(BadFile, match="lacks the tensor 'model.norm.weight'"):
        llmlab.load(tmp_path, device="cpu")


def test_code_in_a_folder_is_not_run(folder, tmp_path):
    config = json.loads((folder[0] / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "model.safetensors").write_bytes((folder[0] / "model.safetensors").read_bytes())
    with pytest.raises(BadFile, match="transformers cannot load it"):
        llmlab.load(tmp_path, device="cpu")
    assert not (tmp_path / "ran").exists()


# ---- what it costs -------------------------------------------------------------------------------------------

COST = """
import ctypes, gc, json, sys
import torch, llmlab

def resident(peak=False):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024

def run(path):
    model, _ = llmlab.load(path, strategy=sys.argv[3], dtype="float32", device="cpu")
    loaded = resident(), resident(peak=True)
    with torch.inference_mode():
        model(torch.arange(3, 67)[None], logits_to_keep=1, use_cache=False)
    return model, loaded

run(sys.argv[1])                    # what the libraries take once
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = resident()
model, (after, peak) = run(sys.argv[2])
gc.collect()
slack = resident()
ctypes.CDLL(None).malloc_trim(0)    # what the C library keeps free for later is not the model's
print(json.dumps({"held": model.llmlab.resident_bytes, "file": model.llmlab.file_bytes, "resident": resident() - before,
                  "with what malloc keeps": slack - before, "loaded": after - before, "peak of loading": peak - before}))
"""


def cost(warm: Path, path: Path, strategy: str) -> dict[str, int]:
    """Bytes of resident memory that loading and one forward pass of 64 tokens add to a fresh process."""
    done = subprocess.run([sys.executable, "-c", COST, warm, path, strategy], capture_output=True, text=True, cwd=TOP,
                          env=os.environ | {"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="no GPU, and no /proc: resident memory is read from it")
def test_what_a_model_takes_is_what_it_says(tiny, tmp_path_factory):
    """A model of 60 MB, wide, so that what Python holds for modules is little beside it; bench_loading.py has a real one."""
    path = tmp_path_factory.mktemp("cost") / "wide.gguf"
    make("llama", path, "F16", hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=2)
    found = cost(tiny[0], path, "compact")
    assert found["resident"] < 1.15 * found["file"] and found["peak of loading"] < 1.3 * found["resident"], found
    assert found["held"] == pytest.approx(found["resident"], rel=0.15), found
