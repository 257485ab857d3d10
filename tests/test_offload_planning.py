"""The planner: what it decides keeps to its budgets and can be opened; what it predicts follows from bytes and rates."""

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runtime_models import make

import llmlab
from llmlab import plan
from llmlab.cli import main
from llmlab.errors import LabError, UnknownName
from llmlab.exports import Command
from llmlab.gguf import read_gguf
from llmlab.kernels.words import layout as laid
from llmlab.memory import size_of
from llmlab.offload import aside, budget, caching, shaping, words
from llmlab.offload.arranging import taking_turns
from llmlab.offload.opening import open_decoder
from llmlab.offload.outlining import outline
from llmlab.offload.pieces import pieces_of
from llmlab.offload.planned_export import WRITERS
from llmlab.offload.ways import CLASSES, drive_named, next_drive
from llmlab.runtime.decoder import Decoder, quick_dtype
from llmlab.units import GB, GIB, MIB, align

TOP = Path(__file__).resolve().parent.parent
FLAGS = json.loads((TOP / "tests" / "golden" / "flags.json").read_text(encoding="utf-8"))
DESK = {"gpu": "rtx-4090-24gb", "host": "16 GiB DDR5-6000", "drive": "gen4"}


# ---- what the arithmetic of SSD bandwidth allows: a 70B model on a 24 GB card, as aiDAPTIV+ promises ------------------

def test_llama_3_70b_on_a_24_gb_card_is_bound_by_what_is_read_for_each_token():
    p = plan("llama-3-70b", quant="Q4_K_M", kernels="tuned", **DESK)
    found, tiers = p.predict(), p.arrangement
    weights = size_of("llama-3-70b", "Q4_K_M").tensor_bytes
    assert p.used("device") <= 24 * GIB and p.used("ram") <= 14 * GIB
    assert weights * 0.95 < sum(t.bytes for t in p.terms if t.name == "weights") < weights      # the embedding is in no tier
    read = found.times.moved["ssd"]
    assert read > 7e9 and tiers.on("ssd") > 10
    # no arrangement writes faster than the drive reads what is on it
    assert found.decode[2] <= p.site.drive.rate[2] / read and found.decode[1] <= 5.9 * GB / read
    assert 0.3 < found.decode[1] < 1 and found.binds == ("SSD", pytest.approx(1.0, abs=0.05))
    assert "SSD-bound" in p.answer and "Llama 3 70B" in p.answer
    assert any("hot" in line and "does not wear" in line for line in p.warnings)


def test_without_ram_all_that_is_not_on_the_card_is_read_and_a_faster_drive_is_as_much_faster():
    slow = plan("llama-3-70b", quant="Q4_K_M", kernels="tuned", **DESK, ram_budget="2 GiB")
    fast = slow.with_(drive="gen5")
    ratio = fast.site.drive.rate[1] / slow.site.drive.rate[1]
    assert fast.predict().decode[1] / slow.predict().decode[1] == pytest.approx(ratio, rel=0.05)
    assert slow.predict().decode[1] == pytest.approx(slow.site.drive.rate[1] / slow.predict().times.moved["ssd"], rel=0.05)
    mapped = slow.with_(mapped=True)
    assert mapped.predict().decode[1] < 0.3 * slow.predict().decode[1]         # page faults
    assert any("page faults" in line for line in mapped.warnings) and not mapped.placement.direct


# ---- budgets ---------------------------------------------------------------------------------------------------------

MODELS = ("llama-3-8b", "qwen3-30b-a3b", "gpt-oss-20b", "gemma-3-12b", "smollm2-135m", "qwen2.5-32b", "mixtral-8x7b")


def test_what_is_planned_keeps_to_its_budgets():
    generator, planned = random.Random(4), 0
    for _ in range(40):
        model, gpu = generator.choice(MODELS), generator.choice(("none", "rtx-3060-12gb", "rtx-4090-24gb"))
        asked = {"gpu": gpu, "gpu_budget": int(generator.uniform(0.3, 16) * GIB),
                 "ram_budget": int(generator.uniform(0, 12) * GIB), "context": generator.choice((512, 4096, 16384)),
                 "kv": generator.choice(("f16", "q8_0")), "drive": "gen3",
                 "host": "64 GiB", "slots": generator.choice((None, None, 1, 3))}
        try:
            p = plan(model, **asked)
        except LabError as error:
            assert "at least" in str(error)
            continue
        planned += 1
        assert p.used("device") <= p.site.device and p.used("ram") <= max(p.site.ram * 1.011, 1)
        found = p.predict()
        for band in (found.decode, found.prefill):
            assert 0 < band[0] <= band[1] <= band[2] <= 2 * band[0] * (1 + 1e-9)
        low, high = min(found.times.usual[1:]), sum(found.times.usual[1:])
        assert low <= found.times.usual.seconds <= high * (1 + 1e-9)
    assert planned > 20


def test_too_small_a_budget_says_how_much_is_the_least():
    with pytest.raises(LabError, match="at least") as caught:
        plan("llama-3-8b", gpu="none", gpu_budget="300 MiB", host="8 GiB", drive="gen4", quant="Q4_K_M")
    assert "KV cache" in str(caught.value) and "slot" in str(caught.value) and "\n" not in str(caught.value)
    number, unit = re.search(r"at least ([\d.]+) (\w+)", str(caught.value)).groups()
    least = f"{number} {unit}"
    p = plan("llama-3-8b", gpu="none", gpu_budget=least, host="8 GiB", drive="gen4", quant="Q4_K_M")
    assert p.arrangement.slots == 1 and p.arrangement.on("device") == 0
    with pytest.raises(LabError):
        plan("llama-3-8b", gpu="none", gpu_budget=p.site.device - 8 * MIB, host="8 GiB", drive="gen4", quant="Q4_K_M")


@pytest.mark.parametrize("change", [{"ram_budget": 20 * GIB}, {"gpu": "rtx-5090-32gb"}, {"drive": "gen5"}, {"quant": "IQ4_XS"},
                                    {"context": 1024}, {"drafted": 3, "accepted": 0.8}])
def test_more_of_anything_is_never_slower(change):
    now = plan("llama-3-70b", quant="Q4_K_M", kernels="tuned", **DESK)
    assert now.with_(**change).predict().decode[1] > 0.97 * now.predict().decode[1]


def test_a_layer_that_has_a_slot_to_itself_is_brought_once():
    p = plan("llama-3-8b", gpu="none", gpu_budget="4 GiB", ram_budget=0, host="8 GiB", drive="gen4", context=512)
    a, layers = p.arrangement, p.shape.layers
    assert p.predict().times.moved["ssd"] == sum(one.bytes for one, tier in zip(layers, a.tiers, strict=True) if tier == "ssd")
    few = replace(a, tiers=("ssd",) * 3 + ("device",) * (len(layers) - 3), slots=2)      # one slot has 0 and 2, one 1 alone
    assert taking_turns(p.shape, few) == {0, 2} and not taking_turns(p.shape, replace(few, slots=3))
    assert taking_turns(p.shape, replace(few, slots=1)) == {0, 1, 2}


def test_experts_are_cached_and_hits_can_be_given():
    p = plan("qwen3-30b-a3b", gpu="rtx-3060-12gb", host="8 GiB DDR4-3200", drive="gen3", kernels="tuned")
    a, found = p.arrangement, p.predict()
    assert a.expert_slots > 1000 and a.on("device") == len(a.tiers) and 0 < found.times.hits[0] < found.times.hits[2] < 1
    assert p.with_(hits=0.95).predict().decode[1] > found.decode[1] > p.with_(hits=0.2).predict().decode[1]
    assert any("hits=" in line for line in p.warnings) and not any("hits=" in line for line in p.with_(hits=0.9).warnings)
    whole = p.with_(gpu="rtx-4090-24gb")
    assert whole.arrangement.resident_experts and not whole.streamed and whole.predict().binds[0] == "compute"
    # a prompt wants nearly all experts: most of what is missing is read for each batch of it
    assert found.prefill_times.moved["ssd"] + found.prefill_times.moved["ram"] > 0.3 * p.shape.bytes


def test_a_plan_for_prompts_and_one_for_answers():
    answers = plan("llama-3-70b", quant="Q4_K_M", kernels="tuned", **DESK)
    prompts = answers.with_(goal="prefill")
    assert prompts.predict().prefill[1] >= 0.99 * answers.predict().prefill[1]
    assert answers.predict().decode[1] >= 0.97 * prompts.predict().decode[1]
    # a batch of a prompt moves the weights once
    found = answers.predict()
    assert found.prefill[1] == pytest.approx(512 / found.first_token) and found.first_token > 0.9 / found.decode[1]


def test_kv_in_ram_is_sent_for_each_token():
    p = plan("llama-3-8b", gpu="rtx-3060-12gb", gpu_budget="6 GiB", host="32 GiB", drive="gen4", context=32768, kv_tier="ram",
             kernels="tuned")
    assert p.placement.kv == "ram" and p.predict().times.moved["kv"] == 32768 * 131072
    assert p.predict().seconds["KV"] == pytest.approx(32768 * 131072 / p.site.link[1])
    assert "KV" in p.predict().seconds and "KV cache is in RAM" in p.answer


def test_fast_mode_computes_in_place_what_lies_in_ram():
    exact = plan("llama-3-70b", gpu="rtx-3060-12gb", host="64 GiB DDR5-6000", drive="gen4", quant="Q4_K_M", kernels="tuned")
    fast = exact.with_(mode="fast")
    assert exact.arrangement.on("ssd") == 0 and fast.predict().times.moved["ram"] == 0
    assert fast.predict().decode[1] > exact.predict().decode[1]               # RAM reads faster than the link
    assert any("differ" in line for line in fast.warnings)


def test_a_store_is_written_once_and_says_what_that_wears():
    p = plan("llama-3-8b", gpu="none", gpu_budget="3 GiB", host="8 GiB", drive="gen4", layout="words", quant="Q4_K_M")
    assert any("written once" in line and "600 TB" in line for line in p.warnings) and p.placement.layout == "words"


def test_the_pace_of_the_device_can_be_given_as_measured():
    p = plan("llama-3-8b", gpu="none", gpu_budget="6 GiB", ram_budget=0, host="16 GiB", drive="20 GB/s", context=512,
             quant="Q4_K_M", resident=4.0)
    assert not p.streamed and p.predict().decode[1] == pytest.approx(4.0)
    assert p.predict().decode[2] < 1.2 * p.predict().decode[0]
    some = p.with_(gpu_budget="3 GiB")
    assert 0.5 < some.predict().decode[1] <= 4.001
    compiled, plain = (p.with_(resident=None, layout=layout).predict().decode[1] for layout in ("words", "gguf"))
    assert compiled > plain


# ---- it can be carried out -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    found = {}
    for name in ("llama", "qwen3moe"):
        path = folder / f"{name}.gguf"
        make(name, path, "mixed", num_hidden_layers=6)
        found[name] = path
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_a_placement_names_the_pieces_of_the_file_and_fits_what_a_decoder_takes(files, name):
    path = files[name]
    file, device = read_gguf(path), torch.device("cpu")
    whole = plan(path, gpu="none", gpu_budget="2 GiB", context=256, drive="1 GB/s", host="8 GiB")
    assert set(whole.placement.where) == set(pieces_of(file)) and not whole.streamed
    assert whole.shape.exact and whole.shape.bytes == sum(
        layer.experts * layer.expert + layer.bytes for layer in whole.shape.layers)
    least = whole.used("device") - int(0.6 * whole.shape.bytes)
    for size, ram in ((least, 0), (least + whole.shape.bytes // 4, whole.shape.bytes // 4)):
        p = plan(path, gpu="none", gpu_budget=size, ram_budget=ram, context=256, drive="1 GB/s", host="8 GiB")
        assert p.streamed and set(p.placement.where) <= set(pieces_of(file))
        like = outline(file, pieces_of(file), quick_dtype(device), device)
        lines = budget.needs(like, pieces_of(file), p.placement, quick_dtype(device), device)
        taken = {tier: budget.total(lines, tier) for tier in ("device", "ram")}
        assert taken["device"] <= size and taken["ram"] <= ram, (lines, p.table)
        assert taken["device"] > 0.6 * size                                    # the budget is used
        with open_decoder(file, p.placement, budget.Budget(size, ram or None)) as opened:
            plain = Decoder.open(path, strategy="compact", context=256, kv="f16")
            assert torch.equal(opened.read([1, 5, 9, 2, 7]), plain.read([1, 5, 9, 2, 7]))


@pytest.mark.parametrize("kv", [None, "q8_0"])
@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_a_cache_in_ram_and_fast_mode_are_counted_as_a_decoder_takes_them(files, name, kv):
    path, device = files[name], torch.device("cpu")
    file = read_gguf(path)
    pieces, ways = pieces_of(file), dict(gpu="none", ram_budget="1 GiB", context=256, drive="1 GB/s", host="8 GiB", kv=kv,
                                         kv_tier="ram")
    with pytest.raises(LabError, match="takes turns in") as refused:
        plan(path, gpu_budget="1 MiB", **ways)
    least = int(re.search(r"at least (\d+) MiB", str(refused.value))[1])
    p = plan(path, gpu_budget=f"{least} MiB", **ways)
    like = outline(file, pieces, quick_dtype(device), device)
    lines = {(line.tier, line.what): line.bytes for line in
             budget.needs(like, pieces, p.placement, quick_dtype(device), device)}
    terms = {(term.device, term.name): term.bytes for term in p.terms}
    tables = budget.table_bytes(like, p.placement)
    for said, taken in ((terms["ram", "kv_cache"], lines["ram", "KV cache"] + tables),
                        (terms["device", "kv_turns"], lines["device", "KV cache's turns"] - tables)):
        assert said == taken if kv else said >= taken       # plain numbers are as wide as this processor likes
    card = plan(path, **ways | {"gpu": "rtx-3060-12gb", "gpu_budget": "2 GiB"}, mode="fast")
    assert card.needs.aside == budget.workspace_in_ram(like, aside.Aside(torch.float32)) and plan(path, **ways).needs.aside == 0
    assert (shaping.TURNS, shaping.FEW) == (caching.ROOMS, aside.FEW)


def test_what_compiled_code_takes_is_counted_as_it_is_laid_out(tmp_path):
    path = tmp_path / "small.gguf"
    make("llama", path, "small", hidden_size=288, num_attention_heads=9, num_key_value_heads=3)     # rows of no whole tiles
    made = words.piece_bytes(read_gguf(path))
    p = plan(path, gpu="none", gpu_budget="64 MiB", layout="words", context=512)
    assert {layer.name: layer.bytes for layer in p.shape.layers} == made
    for type, bytes in shaping.WORDS.items():
        for lanes, cols in ((8, 256), (8, 2816), (16, 1536), (16, 2816)) if type != "F32" else ():
            known = laid(type, lanes, True)
            taken = align(cols, shaping.LANE * lanes * (2 if type in shaping.PAIRED else 1)) * bytes
            assert taken == pytest.approx(known.bits_per_weight(cols) * cols / 8), (type, lanes, cols)
    for model, asked in (("qwen3-30b-a3b", {"gpu": "none"}), ("llama-3-8b", {"gpu": "rtx-3060-12gb"}),
                         ("llama-3-8b", {"gpu": "none", "quant": "IQ3_XXS"})):
        with pytest.raises(LabError, match="layout|lay out"):
            plan(model, layout="words", **asked)


def test_a_shape_gives_the_placement_that_its_file_would_have(files):
    path = files["llama"]
    spec = llmlab.model(str(path))
    real, shaped = plan(path, gpu="none", gpu_budget="200 MiB", context=256, drive="1 GB/s", host="8 GiB"), None
    shaped = plan(spec, gpu="none", gpu_budget="200 MiB", context=256, drive="1 GB/s", host="8 GiB", quant="Q8_0")
    assert set(real.placement.where) == set(shaped.placement.where) and not shaped.shape.exact
    sizes = [layer.bytes for layer in shaped.shape.layers]
    assert np.all(np.array(sizes) % 4096 == 0) and min(sizes) > 0


def test_a_cache_of_plain_numbers_is_what_a_decoder_keeps_by_itself(files):
    path = files["llama"]
    p = plan(path, gpu="none", gpu_budget="64 MiB", context=256, drive="1 GB/s", host="8 GiB", kv=None)
    assert p.placement.kv_types is None and p.kv == ("f32", "f32")
    with open_decoder(path, p.placement, p.site.device) as opened:
        plain = Decoder.open(path, strategy="compact", context=256)
        assert torch.equal(opened.read([3, 1, 4, 1, 5]), plain.read([3, 1, 4, 1, 5]))


# ---- the machine -----------------------------------------------------------------------------------------------------

def calibrated_machine():
    """This computer with a calibration of round figures."""
    from llmlab.calibrated import Calibration, Figure

    def figure(part, name, best, unit="B/s", threads=None, cold=None):
        device = "disk" if part == "disk" else "cpu"
        return Figure(part, device, name, 0.95 * best, best, 1.05 * best, unit, 3, "a test", threads, cold)

    figures = (figure("ram", "", 30e9, threads=2), figure("matmul", "float32", 1e11, "op/s"),
               figure("disk", "buffered", 2e9, threads=1, cold=True), figure("disk", "direct", 3e9, threads=4, cold=True),
               figure("disk", "buffered", 9e9, threads=4, cold=False), figure("disk", "mmap", 0.8e9, threads=1, cold=True))
    found = Calibration("0" * 16, "2026-11-01T00:00:00+00:00", 20.0, {}, {}, 2, 0.0, 0.0, figures)
    return replace(llmlab.machine(), calibration=found, cards=(), ram_total=16 * GIB, ram_limit=None)


def test_a_calibrated_machine_is_planned_with_what_was_measured():
    machine = calibrated_machine()
    p = plan("llama-3-8b", machine, gpu_budget="2 GiB", ram_budget=0, context=512, quant="Q4_K_M")
    drive = p.site.drive
    assert drive.kind == "measured" and drive.rate[1] == 0.98 * 3e9 and (drive.readers, drive.direct) == (4, True)
    assert p.placement.readers == 4 and p.placement.direct and "2026-11-01" in p.predict().why
    assert plan("llama-3-8b", machine, "2 GiB", 0, 512, mapped=True).site.drive.rate[1] == 0.8e9
    assert plan("llama-3-8b", machine, "2 GiB", 0, 512, readers=1).site.drive.rate[1] == 0.91 * 2e9
    assert plan("llama-3-8b", machine, "2 GiB", 0, 512, drive="hdd").site.drive.kind == "modelled"
    # what is not asked for is what the machine has: RAM, less what the system keeps, is the device
    assert plan("llama-3-8b", machine).site.device == 14 * GIB and p.site.here
    assert not plan("llama-3-8b", machine, host="8 GiB").site.here and not plan("llama-3-8b", gpu="rtx-3060-12gb").site.here


def test_what_of_reading_costs_the_processor_is_counted_where_it_computes():
    from llmlab.calibrated import Figure

    machine = calibrated_machine()
    share = Figure("together", "disk", "hidden", 0.1, 0.25, 0.4, "share", 5, "a test", 2)
    slowed = replace(machine, calibration=replace(machine.calibration, figures=(*machine.calibration.figures, share)))

    for layout in ("gguf", "words"):
        one, other = (plan("llama-3-8b", here, "2 GiB", 0, 512, quant="Q4_K_M", gpu="none", layout=layout).predict().times.usual
                      for here in (machine, slowed))
        assert other.seconds - one.seconds == pytest.approx(0.75 * (one.drive + one.device - one.seconds)) and one.drive
    one, other = (plan("llama-3-8b", here, "2 GiB", "1 GiB", 512, gpu="rtx-3060-12gb") for here in (machine, slowed))
    assert one.predict().decode == other.predict().decode       # a card has its own


def test_beside_a_card_that_is_not_here_there_is_as_much_ram_as_it_takes():
    p = plan("llama-3-70b", gpu="rtx-4090-24gb", quant="Q4_K_M")
    assert p.arrangement.on("ssd") == 0 and not p.site.limited and p.to_dict()["ram_budget"] is None
    with pytest.raises(LabError, match="of RAM are too little"):
        plan("llama-3-70b", gpu="rtx-4090-24gb", ram_budget="100 MiB")


# ---- drives ----------------------------------------------------------------------------------------------------------

def test_drives_by_name_class_and_rate():
    assert drive_named("gen4").rate[1] == pytest.approx(0.92 * 5.9 * GB) == drive_named("nvme-gen4-class").rate[1]
    assert drive_named("Samsung 980 PRO").name.startswith("Samsung 980 PRO") and drive_named("samsung-980-pro").readers == 8
    assert drive_named("2.5 GB/s").rate[1] == pytest.approx(2.3 * GB)
    assert drive_named(2.5e9).rate == drive_named("2.5 GB/s").rate
    assert drive_named("wd-sn770").rate[2] / drive_named("wd-sn770").rate[0] == pytest.approx(2)       # only promised
    disk = drive_named("hdd")
    assert disk.readers == 1 and not disk.direct and disk.scattered[1] < disk.rate[1] < 0.2 * GB
    assert drive_named("gen4", readers=1).rate[1] < drive_named("gen4").rate[1]
    for name in CLASSES:
        band = drive_named(name).rate
        assert band[0] <= band[1] <= band[2] <= 2 * band[0] * (1 + 1e-9)
    assert next_drive(drive_named("hdd")) == "sata3-class" and next_drive(drive_named("900 GB/s")) is None


@pytest.mark.parametrize(("asked", "says"), [
    ({"drive": "samsung"}, "say which"), ({"drive": "flopy"}, "drive"), ({"drive": "0 GB/s"}, "GB/s"),
    ({"drive": True}, "drive"),
    ({"mode": "slow"}, "mode"), ({"kv_tier": "ssd"}, "kv_tier"), ({"slots": 0}, "slots"), ({"readers": 0}, "readers"),
    ({"drafted": -1}, "drafted"), ({"accepted": 2}, "accepted"), ({"hits": "many"}, "hits"), ({"layout": "rows"}, "layout"),
    ({"goal": "both"}, "goal"), ({"resident": 0}, "resident"),
    ({"kernels": "fast"}, "kernels"), ({"gpu_budget": "much"}, "size"),
    ({"quant": "NF4"}, "Q4_K_M"),
    ({"gpu_budget": "2000000 TiB"}, "gpu_budget"), ({"context": 0}, "context"), ({"kv": "q9"}, "cache type"),
    ({"gpu": ["rtx-3060-12gb"] * 2}, "one device"), ({"gpu": "rtx-9999"}, "rtx"), ({"quant": "Q9"}, "Q9")])
def test_what_cannot_be_is_one_line(asked, says):
    with pytest.raises(LabError) as caught:
        plan("llama-3-8b", **{**DESK, **asked})
    assert says in str(caught.value) and "\n" not in str(caught.value)


# ---- levers ----------------------------------------------------------------------------------------------------------

def test_levers_are_ranked_and_can_be_pulled():
    p = plan("llama-3-70b", quant="Q4_K_M", kernels="tuned", **DESK)
    found = p.levers()
    assert [step.times for step in found] == sorted((step.times for step in found), reverse=True)
    assert {"quant", "RAM", "VRAM", "drive", "context", "KV cache", "drafts", "model"} <= {step.name for step in found}
    for step in found:
        then = p.with_(**step.change).predict()
        assert then.decode == pytest.approx(step.decode) and step.times == pytest.approx(then.decode[1] / p.predict().decode[1])
        assert step.times > 1
    assert "tokens/s" in repr(found) and "<table>" in found._repr_html_() and len(found[:2]) == 2
    assert "no lever makes a token quicker" in repr(found[:0]) and "no lever makes" in found[:0]._repr_html_()
    assert "layout" in {step.name for step in plan("llama-3-8b", gpu="none", gpu_budget="3 GiB", host="16 GiB").levers()}
    drafts = next(step for step in found if step.name == "drafts")
    assert "same answers" in drafts.costs and drafts.times == pytest.approx((1 - 0.6**5) / 0.4, rel=0.05)   # the drive binds


# ---- exports ---------------------------------------------------------------------------------------------------------

def options(text: str) -> list[str]:
    return [word for word in re.sub(r"^#.*$", "", text, flags=re.M).replace("\\\n", " ").split() if word.startswith("--")]


@pytest.mark.parametrize("asked", [
    ("llama-3-70b", DESK), ("qwen3-30b-a3b", {"gpu": "rtx-3060-12gb", "host": "8 GiB", "drive": "gen3"}),
    ("llama-3-8b", {"gpu": "none", "gpu_budget": "3 GiB", "host": "8 GiB", "drive": "sata"}),
    ("llama-3-8b", {**DESK, "kv_tier": "ram"})])
def test_exports_use_options_that_exist(asked):
    model, settings = asked
    p = plan(model, quant="Q4_K_M", **settings)
    for engine in WRITERS:
        command = p.export(engine)
        assert isinstance(command, Command) and command.engine == engine
        assert all(f"# {note}" in command for note in command.notes)
        if engine == "llama.cpp":
            assert set(options(command)) <= set(FLAGS["llama-cpp-python"]["options"]), command
        if engine == "vllm":
            assert set(options(command)) <= set(FLAGS["vllm"]["options"]), command
    with pytest.raises(UnknownName):
        p.export("ollama")


def test_llama_cpp_keeps_the_same_layers_on_the_card():
    p = plan("llama-3-70b", quant="Q4_K_M", **DESK)
    pattern = re.search(r"--override-tensor '?(.*?)=CPU", p.export("llama.cpp"))[1]
    away = {i for i in range(80) if re.search(pattern, f"blk.{i}.ffn_down.weight")}
    assert away == {i for i, tier in enumerate(p.arrangement.tiers[:-1]) if tier != "device"} and 0 < len(away) < 80
    assert "--gpu-layers 81" in p.export("llama.cpp")
    moe = plan("qwen3-30b-a3b", gpu="rtx-3060-12gb", host="32 GiB", drive="gen3")
    count = int(re.search(r"--n-cpu-moe (\d+)", moe.export("llama.cpp"))[1])
    assert count == pytest.approx(48 * (1 - moe.arrangement.expert_slots / moe.shape.experts), abs=1)


def test_accelerate_gets_a_map_of_every_module():
    p = plan("llama-3-70b", quant="Q4_K_M", **DESK)
    text = p.export("accelerate").text
    found: dict = {}
    exec(text[text.index("device_map"):text.index("model = ")], found)          # a dict of plain values
    device_map = found["device_map"]
    tiers = {"device": 0, "ram": "cpu", "ssd": "disk"}
    assert [device_map[f"model.layers.{i}"] for i in range(80)] == [tiers[tier] for tier in p.arrangement.tiers[:80]]
    assert {"model.embed_tokens", "model.norm", "lm_head"} <= set(device_map) and "offload_folder" in text
    assert int(re.search(r"--cpu-offload-gb (\d+)", p.export("vllm"))[1]) * GIB >= p.streamed


# ---- how it shows itself ---------------------------------------------------------------------------------------------

def test_tables_figure_and_json():
    p = plan("llama-3-70b", quant="Q4_K_M", **DESK)
    said = p.to_dict()
    assert json.loads(json.dumps(said))["layers"] == {tier: p.arrangement.on(tier) for tier in ("device", "ram", "ssd")}
    assert sum(said["layers"].values()) == 81 and len(p.table) > 8
    assert "<table>" in p._repr_html_() and repr(p).startswith("<plan: Llama 3 70B") and "decode" in repr(p.predict())
    figure, other = p.figure(), plan("qwen3-30b-a3b", gpu="rtx-3060-12gb", host="8 GiB", drive="gen3").figure()
    assert [trace.name for trace in figure.data] == [trace.name for trace in other.data]
    bars = {trace.name: trace.x for trace in figure.data if trace.type == "bar"}
    assert bars["weights"] == tuple(sum(t.bytes for t in p.terms if (t.name, t.device) == ("weights", tier)) / GIB
                                    for tier in ("device", "ram", "ssd"))
    for name, kind in {(t.name, t.kind) for t in p.terms}:
        assert name and kind in ("exact", "modelled", "measured")


def test_the_shell_says_the_same(capsys):
    asked = ["plan", "llama-3-70b", "--gpu", "rtx-4090-24gb", "--host", "16 GiB DDR5-6000", "--drive", "gen4",
             "--quant", "Q4_K_M"]
    p = plan("llama-3-70b", quant="Q4_K_M", **DESK)
    assert main(asked) == 0 and p.answer in capsys.readouterr().out
    assert main([*asked, "--json"]) == 0 and json.loads(capsys.readouterr().out) == json.loads(json.dumps(p.to_dict()))
    assert main([*asked, "--command", "llama.cpp"]) == 0 and capsys.readouterr().out == p.export("llama.cpp")
    assert main([*asked, "--gpu-budget", "1MiB"]) == 2 and "at least" in capsys.readouterr().err


def test_planning_imports_no_torch():
    code = ("import sys, llmlab;"
            "p = llmlab.plan('llama-3-8b', gpu='rtx-3060-12gb', gpu_budget='4 GiB', drive='gen4', host='8 GiB');"
            "p.predict(), p.answer, p.levers(), p.export('vllm'), p.placement;"
            "print(sorted({'torch', 'transformers', 'plotly', 'pandas'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TOP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
