"""Files quantized: which types, which bytes, which keys, how large; and that what cannot be done leaves nothing behind."""

import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import runtime_models

import llmlab
from llmlab import formats, requantizing
from llmlab.cli import main
from llmlab.errors import LabError, UnknownName
from llmlab.gguf import read_gguf, write_gguf
from llmlab.memory import mix_of
from llmlab.quality import Importance
from llmlab.requantizing import planned, quantize_gguf, writing
from llmlab.shapes import model_spec

TOP = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Small models by name and type of their matrices, each written once."""
    known, folder = {}, tmp_path_factory.mktemp("sources")

    def make(name="llama", mix="F16"):
        path = folder / f"{name}-{mix}.gguf"
        if path not in known:
            runtime_models.make(name, path, mix, intermediate_size=256)
            known[path] = path
        return path

    return make


def rewritten(source, target, change, metadata=None):
    """A copy of a GGUF with some tensors changed: `change(name, float32 or bytes)` gives the bytes to write."""
    file = read_gguf(source)
    write_gguf(target, file.typed_metadata() | (metadata or {}), [
        (t.name, t.shape, t.type, change(t.name, file.data(t.name).copy())) for t in file.tensors.values()])
    return target


def encoded(file, name: str, type: str, importance=None) -> np.ndarray:
    """What a tensor should become: its numbers, taken apart and encoded in one go."""
    info = file.tensors[name]
    rows = file.data(name).reshape(-1, formats.FORMATS[info.type].bytes(info.shape[0]))
    return formats.quantize(formats.dequantize(rows, info.type), type, importance).numpy().ravel()


# ---- what is written ------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "mix", "quant"), [
    ("llama", "F32", "Q4_K_M"), ("llama", "F16", "Q4_0"), ("mixtral", "F16", "Q5_K_S"), ("gemma3", "F32", "Q8_0"),
    ("llama", "Q8_0", "Q5_1"), ("llama-wide-heads", "F16", "Q6_K")])
def test_types_bytes_and_size_are_as_the_mix_says(sources, tmp_path, name, mix, quant):
    source, target = sources(name, mix), tmp_path / "out.gguf"
    plan = quantize_gguf(source, target, quant)
    before, after = read_gguf(source), read_gguf(target)
    assert {t.name: t.type for t in after.tensors.values()} == mix_of(model_spec(source), quant)
    assert plan.file_bytes == target.stat().st_size and plan.tensor_bytes == after.tensor_bytes
    for row in plan.rows:
        expected = before.data(row.name) if row.type == row.stored else encoded(before, row.name, row.type)
        assert np.array_equal(after.data(row.name), expected), row.name
    assert list(after.tensors) == [t.name for t in model_spec(source).tensors]      # llama-quantize's order: block, then name


def test_metadata_comes_along_with_what_llama_quantize_sets_at_its_end(sources, tmp_path):
    source = rewritten(sources(), tmp_path / "in.gguf", lambda name, data: data, {
        "general.file_type": ("uint32", 1), "z.many": ("array:string", [f"token {i}" for i in range(5000)]),
        "z.signed": ("int8", -3), "z.wide": ("float64", 0.1)})
    quantize_gguf(source, tmp_path / "out.gguf", "Q4_K_S")
    before, after = read_gguf(source), read_gguf(tmp_path / "out.gguf")
    kept = [key for key in before.metadata if key != "general.file_type"]
    assert list(after.metadata) == [*kept, "general.quantization_version", "general.file_type"]
    assert after.metadata["general.file_type"] == 14 and after.metadata["general.quantization_version"] == 2
    assert all(after.types[key] == before.types[key] for key in kept)
    assert after.metadata["z.many"].values() == before.metadata["z.many"].values()
    assert model_spec(tmp_path / "out.gguf").stored == "Q4_K_S"


def test_another_alignment_stays(sources, tmp_path):
    source = rewritten(sources(), tmp_path / "in.gguf", lambda name, data: data, {"general.alignment": ("uint32", 128)})
    plan = quantize_gguf(source, tmp_path / "out.gguf", "Q5_1")
    file = read_gguf(tmp_path / "out.gguf")
    assert file.alignment == 128 and plan.file_bytes == file.file_bytes and plan.tensor_bytes == file.tensor_bytes


def test_a_sharded_set_becomes_one_file(sources, tmp_path):
    file = read_gguf(sources())
    names, parts = list(file.tensors), []
    for number, share in enumerate((names[:7], names[7:])):
        parts.append(tmp_path / f"m-{number + 1:05d}-of-00002.gguf")
        metadata = {"split.no": ("uint16", number), "split.count": ("uint16", 2), "split.tensors.count": ("int32", len(names))}
        write_gguf(parts[-1], (file.typed_metadata() if number == 0 else {}) | metadata,
                   [(name, file.tensors[name].shape, file.tensors[name].type, file.data(name)) for name in share])
    quantize_gguf(parts[0], tmp_path / "set.gguf", "Q4_0")
    quantize_gguf(sources(), tmp_path / "whole.gguf", "Q4_0")
    assert (tmp_path / "set.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    with pytest.raises(LabError, match="is what is to be quantized"):
        quantize_gguf(parts[0], parts[1], "Q4_0")


def test_pieces_of_rows_give_the_same(sources, tmp_path, monkeypatch):
    source = sources("mixtral")
    quantize_gguf(source, tmp_path / "whole.gguf", "Q5_1")
    monkeypatch.setattr(writing, "PIECE", 100 * 256 + 1)
    quantize_gguf(source, tmp_path / "pieces.gguf", "Q5_1")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


def test_progress_tells_shares_and_tensors(sources, tmp_path):
    told = []
    quantize_gguf(sources(), tmp_path / "out.gguf", "Q4_0", progress=lambda share, text: told.append((share, text)))
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and shares[-1] == 1 and len(told) == 21
    assert "blk.0.attn_k.weight F16 -> Q4_0" in [text for _, text in told]


def test_high_effort_is_nearer_at_the_same_size(sources, tmp_path):
    plan = quantize_gguf(sources(), tmp_path / "normal.gguf", "IQ4_NL")
    quantize_gguf(sources(), tmp_path / "high.gguf", "IQ4_NL", effort="high")
    source = read_gguf(sources())
    def error(path):
        file, total = read_gguf(path), 0.0
        for row in plan.rows:
            if row.type == "IQ4_NL":
                numbers = [formats.dequantize(f.data(row.name), f.tensors[row.name].type) for f in (file, source)]
                total += float((numbers[0] - numbers[1]).square().sum())
        return total
    assert (tmp_path / "high.gguf").stat().st_size == (tmp_path / "normal.gguf").stat().st_size
    assert error(tmp_path / "high.gguf") < 0.99 * error(tmp_path / "normal.gguf")


# ---- mixes of one's own ---------------------------------------------------------------------------------------

def test_patterns_choose_types_and_the_first_that_is_found_counts(sources):
    types = {r"blk\.1\.attn_v": "Q8_0", "attn_v": "q6_k", "^output.weight": "keep", "ffn_(up|gate)": "Q5_K"}
    found = {row.name: row.type for row in planned(sources(), "Q4_K_M", types=types).rows}
    assert (found["blk.0.attn_v.weight"], found["blk.1.attn_v.weight"], found["output.weight"]) == ("Q6_K", "Q8_0", "F16")
    assert found["blk.0.ffn_up.weight"] == found["blk.1.ffn_gate.weight"] == "Q5_K"
    assert found["blk.0.attn_norm.weight"] == "F32" and found["token_embd.weight"] == "Q4_K"
    pure = {row.type for row in planned(sources(), "Q4_K_M", types={"": "Q4_K"}).rows}
    assert pure == {"F32", "Q4_K"}


def test_a_type_that_does_not_divide_falls_back(sources):
    """Rows of 384 weights are no whole blocks of 256."""
    found = {row.name: row.type for row in planned(sources("llama-wide-heads"), "Q8_0", types={"attn_output": "Q4_K"}).rows}
    assert found["blk.0.attn_output.weight"] == "Q5_0"


def test_chosen_layers_are_not_counted(sources, tmp_path):
    """Q4_K_S widens the first four of attn_v; one that is chosen otherwise does not count, as in llama-quantize."""
    def widened(types):
        rows = planned(many, "Q4_K_S", types=types).rows
        return [row.name.split(".")[1] for row in rows if "attn_v" in row.name and row.type == "Q5_K"]
    many = tmp_path / "many.gguf"
    runtime_models.make("llama", many, "F16", num_hidden_layers=6)
    assert widened(None) == ["0", "1", "2", "3"]
    assert widened({r"blk\.(0|2)\.attn_v": "Q6_K"}) == ["1", "3", "4", "5"]


def test_the_plan_is_the_file_before_it_is_written(sources, tmp_path):
    plan = planned(sources(), "Q5_K_M", types={"ffn_down": "IQ4_NL"})
    quantize_gguf(sources(), tmp_path / "out.gguf", "Q5_K_M", types={"ffn_down": "IQ4_NL"})
    file = read_gguf(tmp_path / "out.gguf")
    assert plan.file_bytes == file.file_bytes and {r.name: r.bytes for r in plan.rows} == {
        t.name: t.bytes for t in file.tensors.values()}
    elements = sum(t.elements for t in file.tensors.values())
    assert plan.bits_per_weight == 8 * sum(t.bytes for t in file.tensors.values()) / elements
    assert f"{plan.file_bytes:,} bytes (exact)" in plan.answer and "F16" in repr(plan.table)


# ---- importance -----------------------------------------------------------------------------------------------

def importance_of(source, seed=0, but=()) -> Importance:
    rng, sums = np.random.default_rng(seed), {}
    for t in read_gguf(source).tensors.values():
        if len(t.shape) > 1 and "norm" not in t.name and not any(part in t.name for part in but):
            sums[t.name] = rng.random((t.shape[2] if len(t.shape) > 2 else 1, t.shape[0])).astype(np.float32) ** 4 * 100
    return Importance(sums, {name: np.full(len(one), 100) for name, one in sums.items()}, chunks=3, datasets=("wiki.txt",))


def test_importance_reaches_each_tensor_and_expert(sources, tmp_path):
    source = sources("mixtral")
    matrix = importance_of(source)
    plan = quantize_gguf(source, tmp_path / "out.gguf", "Q4_K_M", matrix)
    before, after = read_gguf(source), read_gguf(tmp_path / "out.gguf")
    name, type = "blk.1.ffn_up_exps.weight", next(row.type for row in plan.rows if row.name == "blk.1.ffn_up_exps.weight")
    cols, rows, experts = before.tensors[name].shape
    expected = [formats.quantize(formats.dequantize(part, "F16"), type, matrix[name][expert]).numpy()
                for expert, part in enumerate(before.data(name).reshape(experts, rows, 2 * cols))]
    assert np.array_equal(after.data(name), np.stack(expected).ravel())
    assert not np.array_equal(after.data(name), encoded(before, name, type))
    name = "blk.0.attn_k.weight"
    assert np.array_equal(after.data(name), encoded(before, name, after.tensors[name].type, matrix[name]))
    assert [(key, value) for key, value in after.metadata.items() if "imatrix" in key] == [
        ("quantize.imatrix.dataset", "wiki.txt"), ("quantize.imatrix.entries_count", len(matrix)),
        ("quantize.imatrix.chunks_count", 3)]


def test_importance_from_a_file_says_which(sources, tmp_path):
    matrix = importance_of(sources())
    matrix.save(tmp_path / "imatrix.gguf")
    quantize_gguf(sources(), tmp_path / "file.gguf", "IQ4_XS", str(tmp_path / "imatrix.gguf"))
    quantize_gguf(sources(), tmp_path / "memory.gguf", "IQ4_XS", matrix)
    one, two = read_gguf(tmp_path / "file.gguf"), read_gguf(tmp_path / "memory.gguf")
    assert one.metadata["quantize.imatrix.file"] == str(tmp_path / "imatrix.gguf")[:127]
    assert all(np.array_equal(one.data(name), two.data(name)) for name in one.tensors)
    keys = ("file", "dataset", "entries_count", "chunks_count")
    assert list(one.metadata)[-4:] == [f"quantize.imatrix.{key}" for key in keys]


def test_importance_that_lacks_a_tensor_does_without_where_it_can(sources, tmp_path):
    matrix = importance_of(sources(), but=("ffn_up",))
    quantize_gguf(sources(), tmp_path / "out.gguf", "Q4_K_S", matrix)
    before, after = read_gguf(sources()), read_gguf(tmp_path / "out.gguf")
    assert np.array_equal(after.data("blk.0.ffn_up.weight"), encoded(before, "blk.0.ffn_up.weight", "Q4_K"))
    with pytest.raises(LabError, match=r"blk.0.ffn_up.weight in Q2_K would be garbage without an importance matrix"):
        quantize_gguf(sources(), tmp_path / "low.gguf", "Q2_K_S", matrix)


@pytest.mark.parametrize(("matrix", "says"), [
    ({}, "is empty"),
    ({"blk.7.attn_k.weight": np.ones(256)}, "of another model: it has 'blk.7.attn_k.weight', which"),
    ({"blk.0.attn_k.weight": np.ones(255)}, "has 255 numbers for blk.0.attn_k.weight, and .* needs 256"),
    ({"blk.0.attn_k.weight": np.full(256, np.nan)}, "has nan for blk.0.attn_k.weight"),
    ({"blk.0.attn_k.weight": np.full(256, -1.0)}, "has -1.0 for blk.0.attn_k.weight"),
    ({"blk.0.attn_k.weight": "x"}, "has no numbers for blk.0.attn_k.weight"),
    (7, "importance is int; give what llmlab.importance returns"),
    ("nowhere.gguf", "nowhere.gguf"),
])
def test_importance_that_cannot_be_used(sources, tmp_path, matrix, says):
    refused(says, sources(), tmp_path / "out.gguf", "Q4_K_M", matrix)


# ---- bad input ------------------------------------------------------------------------------------------------

def refused(says: str, source, target, *arguments, kind=LabError, **options) -> None:
    """quantize_gguf raises, in one line, and leaves nothing of the target."""
    before = sorted(os.listdir(target.parent)) if target.parent.is_dir() else []
    with pytest.raises(kind, match=says) as error:
        quantize_gguf(source, target, *arguments, **options)
    assert "\n" not in str(error.value)
    assert not target.parent.is_dir() or sorted(os.listdir(target.parent)) == before


@pytest.mark.parametrize(("arguments", "options", "says"), [
    (("Q4_K_X",), {}, "'Q4_K_X' is not a quant; did you mean Q4_K_[SM]"),
    (("NF4",), {}, "NF4 is made by transformers"),
    (("Q4_0",), {"effort": "higher"}, "effort is 'higher'; give one of normal, high"),
    (("Q4_0",), {"types": {"attn_w": "Q8_0"}}, "no tensor has 'attn_w' in its name"),
    (("Q4_0",), {"types": {"attn_(v": "Q8_0"}}, "'attn_\\(v' is no pattern"),
    (("Q4_0",), {"types": {"attn_v": "Q4_K_M"}}, "'Q4_K_M' for 'attn_v' is no type .*a quant is a recipe"),
    (("IQ3_XXS",), {}, "blk.0.attn_k.weight in IQ2_S would be garbage without an importance matrix"),
    (("Q2_K_S",), {}, "in Q2_K would be garbage without an importance matrix"),
])
def test_settings_that_cannot_be(sources, tmp_path, arguments, options, says):
    refused(says, sources(), tmp_path / "out.gguf", *arguments, **options)


def test_places_that_cannot_be(sources, tmp_path):
    source = shutil.copy(sources(), tmp_path / "in.gguf")
    refused("is what is to be quantized; give the target another name", source, Path(source), "Q4_0")
    os.link(source, tmp_path / "same.gguf")
    refused("is what is to be quantized", source, tmp_path / "same.gguf", "Q4_0")
    refused("is not a regular file", source, tmp_path, "Q4_0")
    refused("is not a folder; make it first", source, tmp_path / "nowhere" / "out.gguf", "Q4_0")
    refused("is no file and no model on this computer", tmp_path / "nothing.gguf", tmp_path / "out.gguf", "Q4_0")
    (tmp_path / "empty").mkdir()
    refused("has no safetensors; give a .gguf, or a folder", tmp_path / "empty", tmp_path / "out.gguf", "Q4_0")


def test_what_is_quantized_already_is_refused_unless_allowed(sources, tmp_path):
    source, target = sources("llama", "few"), tmp_path / "out.gguf"
    refused("ffn_down.weight is quantized to Q6_K already|is quantized to Q4_0 already", source, target, "Q8_0")
    plan = planned(source, "Q8_0")
    assert plan.requantized and all("attn_v" not in name for name in plan.requantized)
    assert quantize_gguf(source, target, "Q8_0", allow_requantize=True).requantized == plan.requantized
    # Q8_0 is near enough to its original to start from, on the way down alone.
    assert not planned(sources("llama", "Q8_0"), "Q4_K_M").requantized
    refused("is quantized to Q8_0 already", sources("llama", "Q8_0"), tmp_path / "up.gguf", "F16")
    assert not planned(sources("llama", "Q8_0"), "Q8_0").requantized


@pytest.mark.parametrize(("name", "at", "value", "says"), [
    ("blk.1.ffn_up.weight", 300, float("nan"), "tensor blk.1.ffn_up.weight has nan in row 1, column 44"),
    ("blk.0.attn_q.weight", 65535, float("-inf"), "tensor blk.0.attn_q.weight has -inf in row 255, column 255"),
    ("blk.1.attn_norm.weight", 5, float("inf"), "tensor blk.1.attn_norm.weight has inf in row 0, column 5"),
])
def test_numbers_that_are_none_are_named(sources, tmp_path, monkeypatch, name, at, value, says):
    def spoil(tensor, data):
        if tensor == name:
            data.view(np.float32)[at] = value
        return data
    source = rewritten(sources("llama", "F32"), tmp_path / "in.gguf", spoil)
    monkeypatch.setattr(writing, "PIECE", 256 * 100)
    refused(f"in.gguf: {says}; the file is damaged", source, tmp_path / "out.gguf", "Q8_0")


def test_numbers_too_large_for_float16(sources, tmp_path):
    def grow(tensor, data):
        if tensor == "blk.1.ffn_up.weight":
            data.view(np.float32)[7] = 1e6
        return data
    source = rewritten(sources("llama", "F32"), tmp_path / "in.gguf", grow)
    refused("in.gguf: tensor blk.1.ffn_up.weight: F16: weight 7 of row 0 is 1e\\+06", source, tmp_path / "out.gguf", "F16")


def test_a_full_disk(sources, tmp_path, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        refused("cannot be written .*free some space", sources(), tmp_path / "out.gguf", "Q4_0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 500, 500))
    refused("needs .* and its disk has 500 B free", sources(), tmp_path / "out.gguf", "Q4_0")


def test_a_killed_process_leaves_nothing_under_the_name(sources, tmp_path):
    target = tmp_path / "out.gguf"
    target.write_bytes(b"what was there before")
    code = f"""
import time, llmlab
def told(share, text):
    if share > 0.4:
        print("half", flush=True)
        time.sleep(60)
llmlab.quantize_gguf({str(sources())!r}, {str(target)!r}, "Q4_0", progress=told)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=TOP, text=True)
    assert child.stdout.readline() == "half\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert target.read_bytes() == b"what was there before"
    quantize_gguf(sources(), target, "Q4_0")
    assert read_gguf(target).metadata["general.file_type"] == 2


def test_a_file_that_shrinks_under_us_is_an_error(sources, tmp_path):
    source = shutil.copy(sources(), tmp_path / "in.gguf")
    def cut(share, text):
        if share < 0.5:
            os.truncate(source, 1000)
            os.utime(source, (time.time() + 5, time.time() + 5))
    refused("has changed since it was opened", source, tmp_path / "out.gguf", "Q4_0", progress=cut)


def test_a_model_that_is_none(tmp_path):
    (tmp_path / "in.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    refused("has no general.architecture|no token_embd", tmp_path / "in.gguf", tmp_path / "out.gguf", "Q4_0")


# ---- the shell ------------------------------------------------------------------------------------------------

def run(capsys, *argv):
    status = main([str(one) for one in argv])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_writes_and_plans(sources, tmp_path, capsys):
    target = tmp_path / "out.gguf"
    status, out, _ = run(capsys, "quantize", sources(), target, "Q4_K_M", "--dry-run", "--type", "attn_v=Q8_0")
    assert status == 0 and not target.exists()
    assert re.search(r"blk.0.attn_v.weight +256 x 128 +F16 +Q8_0 +34,816", out) and "bytes (exact)" in out
    planned_bytes = int(re.search(r"the file has ([\d,]+) bytes", out)[1].replace(",", ""))
    status, out, _ = run(capsys, "quantize", sources(), target, "Q4_K_M", "--type", "attn_v=Q8_0", "--type", "attn_v=Q6_K",
                         "--json")
    said = json.loads(out)
    assert status == 0 and said["file_bytes"] == planned_bytes == target.stat().st_size
    row = next(row for row in said["tensors"] if row["tensor"] == "blk.0.attn_v.weight")
    assert row == {"tensor": "blk.0.attn_v.weight", "shape": [256, 128], "from": "F16", "to": "Q8_0", "bytes": 34816}


def test_the_command_says_what_is_wrong_in_one_line(sources, tmp_path, capsys):
    for argv, says in ((("Q4_K_M", "--type", "attn_v"), "is no PATTERN=TYPE"), (("Q4",), "is not a quant"),
                       (("Q4_0", "--importance", tmp_path / "no.gguf"), "cannot read the importance matrix")):
        status, out, err = run(capsys, "quantize", sources(), tmp_path / "out.gguf", *argv)
        assert status == 2 and not out and says in err and err.count("\n") == 1


def test_it_is_public_and_unknown_names_say_so():
    assert llmlab.quantize_gguf is requantizing.quantize_gguf
    with pytest.raises(UnknownName):
        planned("no-such-model", "Q4_0")
