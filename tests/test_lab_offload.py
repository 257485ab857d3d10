"""The offload panel without a browser: settings, words, figures from known numbers, arithmetic by hand, running, stopping."""

import json
import threading
from dataclasses import replace

import pytest

import llmlab
from llmlab import LabError
from llmlab.gguf import read_gguf
from llmlab.lab import offload_larger, offload_run
from llmlab.lab.offload_boxes import lever_words, settings_of
from llmlab.lab.offload_claim import allowed, alone, by_drive, by_quant, needed, worn
from llmlab.lab.offload_figures import (
    ahead_picture,
    blocks,
    checked_picture,
    drives_picture,
    logarithmic,
    speed_picture,
    tiers_picture,
)
from llmlab.lab.offload_panel import OffloadExplorer
from llmlab.lab.offload_presets import PRESETS, drives
from llmlab.lab.offload_run import Ahead, RunState, Try, placed, told
from llmlab.lab.offload_state import DEFAULTS, OffloadState, nice, shown, smallest, whole
from llmlab.offload.pieces import PAGE, pieces_of
from llmlab.runtime.decoder import Decoder
from llmlab.units import GIB, MIB, parse_bytes

CONFIG = {**offload_larger.CONFIG, "hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 512,
          "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
HERE = {"card": None, "ram": None, "drive": None, "context": 64, "way": "gguf"}


@pytest.fixture
def state():
    return OffloadState()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(offload_larger.larger(CONFIG, tmp_path_factory.mktemp("offload") / "tiny.gguf"))


@pytest.fixture
def small(tiny):
    """A tiny model, its device with room for about half of it."""
    state = OffloadState(model=tiny, **HERE)
    least, most = smallest(state.plan), whole(state.plan)
    state.update(gpu_budget=least + (most - least) * 2 // 3, ram_budget=0)
    assert state.error == "" and state.plan.streamed
    return state


def tried(predicted: tuple[float, float, float], measured: float, **more) -> Try:
    return Try("12 stay", 100 * MIB, predicted, measured, 24, 0.25, 40 * MIB, binds="SSD 91%", **more)


# ---- settings ---------------------------------------------------------------------------------------------------------


def test_the_look_is_the_plan(state):
    plan = llmlab.plan("llama-3-70b", gpu="rtx-4090-24gb", host="16 GB DDR4-3200", drive="gen4", context=4096, kernels="tuned")
    assert state.plan.placement == plan.placement and state.answer == plan.answer == state.plan.answer
    assert state.plan.predict().decode == plan.predict().decode
    state.update(gpu_budget="12 GiB", ram_budget="4 GiB", kv="q8_0")
    then = plan.with_(gpu_budget="12 GiB", ram_budget="4 GiB", kv="q8_0")
    assert state.plan.placement == then.placement and "modelled; SSD-bound at" in state.answer
    assert state.look.curve[0][0] == smallest(state.plan) and state.look.curve[-1][0] == 24 * GIB
    rates = [band[1] for _, band in state.look.curve]
    assert rates == sorted(rates) and rates[-1] > 2 * rates[0]


def test_more_ram_moves_layers_from_the_drive(state):
    counts = []
    for ram in ("4 GiB", "8 GiB", "12 GiB"):
        state.ram_budget = ram
        counts.append([state.plan.arrangement.on(tier) for tier in ("device", "ram", "ssd")])
    assert all(sum(count) == 81 for count in counts) and counts[0][1] < counts[1][1] < counts[2][1]
    assert counts[0][2] > counts[1][2] > counts[2][2]


@pytest.mark.parametrize(("setting", "value", "said"), [
    ("gpu_budget", "1 GiB", "1.00 GiB are too little"), ("model", "llama-9", "'llama-9'"), ("card", "rtx-1", "'rtx-1'"),
    ("drive", "floppy", "'floppy'"), ("gpu_budget", "much", "'much'"), ("context", 0, "context is 0"),
    ("slots", 0, "slots is 0"), ("kv", "q9", "'q9' is no cache type"), ("quant", "Q9", "'Q9'"),
    ("mode", "quick", "mode is 'quick'"), ("resident", -1, "-1"),
    ("way", "paper", "way is 'paper'; give one of gguf, words, tuned"),
])
def test_what_cannot_be_used_is_said_and_the_last_good_stays(state, setting, value, said):
    before, answer = state.look, state.answer
    setattr(state, setting, value)
    assert said in state.error and "\n" not in state.error and state.look is before and state.answer == answer
    with pytest.raises(LabError):
        OffloadState(**{setting: value})
    state.update(**{setting: DEFAULTS[setting]})
    assert state.error == "" and state.answer == answer


def test_a_name_that_is_no_setting_is_refused(state):
    with pytest.raises(LabError, match="'disk' is no setting; there are model, quant, card, ram, drive, gpu_budget"):
        state.update(disk="gen4")


def test_another_model_or_card_begins_without_budgets(state):
    state.update(gpu_budget="12 GiB", ram_budget="4 GiB", quant="Q3_K_S")
    state.card = "rtx-3060-12gb"
    assert (state.gpu_budget, state.ram_budget, state.quant) == (None, None, "Q3_K_S")
    state.gpu_budget = "8 GiB"
    state.update(model="mixtral-8x7b", ram_budget="6 GiB")
    assert (state.gpu_budget, state.ram_budget, state.quant) == (None, parse_bytes("6 GiB") and "6 GiB", None)


def test_budgets_to_choose_from(state):
    device, ram = state.look.device, state.look.ram
    assert device[-1] == 24 * GIB and smallest(state.plan) <= device[0] < smallest(state.plan) + GIB and len(device) < 70
    assert ram[-1] == state.plan.site.ram and len(ram) < 70
    for size in (device[0], device[-1]):
        state.gpu_budget = size
        assert state.error == "" and state.plan.site.device == size
    for size in (ram[0], ram[-1]):
        state.ram_budget = size
        assert state.error == "" and shown(state.look.ram, size) == size
    assert nice(3, 3 + 10 * MIB, 10) == tuple(range(MIB, 11 * MIB + 1, MIB))
    assert nice(0, 24 * GIB, 60)[:2] == (0, 500 * MIB) and len(nice(0, 24 * GIB, 60)) < 64


def test_what_can_be_run_here(state, tiny):
    assert "another computer" in state.hindrance and state.unable.startswith("It cannot be run: ")
    state.update(model="llama-3-8b", **HERE)
    assert "no file of this model" in state.hindrance and not state.here
    state.model = tiny
    assert state.here and state.unable == "" and state.plan.shape.exact
    state.way = "tuned"
    assert "nothing here computes as llama.cpp does" in state.unable


# ---- figures ----------------------------------------------------------------------------------------------------------


def test_every_layer_is_a_block_in_its_tier(state):
    plan, found = state.plan, blocks(state.plan)
    for row, (tier, kind) in enumerate((("device", "device"), ("ram", "ram"), ("ssd", "ssd")), 1):
        mine = [block for block in found if block.row == row and block.kind == kind]
        assert len(mine) == plan.arrangement.on(tier) > 0
        assert sum(block.bytes for block in found if block.row == row) == pytest.approx(
            sum(term.bytes for term in plan.terms if term.device == tier))
    whole_pass = [block for block in found if block.row == 0]
    assert len(whole_pass) == 81 and sum(block.bytes for block in whole_pass) == plan.shape.bytes
    assert [block.kind for block in whole_pass] == list(plan.arrangement.tiers)
    assert sum(block.kind == "slots" for block in found) == plan.arrangement.slots


def test_experts_are_blocks_too():
    plan = OffloadState(model="mixtral-8x22b", quant="Q4_K_M", ram="64 GB DDR5-6000").plan
    found = [block for block in blocks(plan) if block.kind == "experts"]
    by_row = [sum(block.bytes for block in found if block.row == row) for row in range(4)]
    assert by_row[1] == plan.arrangement.expert_slots * plan.shape.largest_expert
    assert by_row[2] + by_row[3] == sum(layer.experts * layer.expert for layer in plan.shape.layers)
    assert by_row[0] == sum(layer.used * layer.payload for layer in plan.shape.layers)
    assert any("2 of layer 0's 8 experts" in block.words for block in found)


def test_the_figures_keep_their_traces(state, small):
    looks = [state.look]
    for change in ({"ram_budget": "4 GiB"}, {"ram": "64 GB DDR5-6000"}, {"card": "rtx-6000-ada-48gb"},
                   {"model": "mixtral-8x7b"}):
        state.update(**change)
        assert state.error == ""
        looks.append(state.look)
    looks.append(small.look)
    assert {len(tiers_picture(look)["data"]) for look in looks} == {8}
    one = tried((1.0, 2.0, 3.0), 2.5)
    assert {len(speed_picture(look, tries, running)["data"]) for look in looks for tries in ((), (one,))
            for running in (None, 2.0)} == {5}
    budget = tiers_picture(looks[0])["data"][-1]
    assert budget["x"][0] == 24.0 and tiers_picture(small.look)["layout"]["yaxis"]["ticktext"][2] == "RAM<br>none"


def test_speed_against_the_budget(state):
    state.gpu_budget = "12 GiB"
    band, line, now, measured, running = speed_picture(state.look, (tried((1, 2, 3), 2.5),), 0.7)["data"]
    low, best, high = state.plan.predict().decode
    assert (now["x"], now["y"]) == ([12.0], [best]) and line["y"] == [rate[1] for _, rate in state.look.curve]
    assert now["error_y"]["array"] == [high - best] and now["error_y"]["arrayminus"] == [best - low]
    assert measured["x"] == [100 / 1024] and measured["y"] == [2.5] and running["y"] == [0.7]
    assert len(band["x"]) == 2 * len(line["x"])


@pytest.mark.parametrize(("values", "ticks"), [([0.3, 0.6], [0.3, 0.4, 0.5, 0.6]), ([1, 20], [1, 2, 5, 10, 20]),
                                               ([0.01, 3], [0.01, 0.03, 0.1, 0.3, 1, 3]), ([], [1])])
def test_ticks_are_round_and_few(values, ticks):
    assert logarithmic(values, "x")["tickvals"] == pytest.approx(ticks)


def test_predicted_beside_measured():
    tries = (tried((8, 10, 12), 11), tried((8, 10, 12), 7), tried((1, 2, 3), 2.1, saved=True))
    _, near, here, saved = checked_picture(tries)["data"]
    assert (here["x"], here["y"], saved["y"]) == ([10, 10], [11, 7], [2.1])
    assert near["y"][1] / near["x"][1] == pytest.approx(1.15) and near["y"][-1] / near["x"][-1] == pytest.approx(0.85)
    assert len(checked_picture(())["data"]) == 4


def test_reading_ahead_is_drawn_by_slots():
    working, waiting = ahead_picture((Ahead(1, 0.1, 0.06), Ahead(2, 0.07, 0.01)))["data"]
    assert working["x"] == pytest.approx([40, 60]) and waiting["x"] == pytest.approx([60, 10])
    assert len(ahead_picture(())["data"]) == 2


# ---- an SSD as VRAM ---------------------------------------------------------------------------------------------------


def test_the_arithmetic_of_a_drive_by_hand(state):
    then = alone(state.plan)
    left = then.shape.bytes - sum(layer.bytes for layer, tier in zip(then.shape.layers, then.arrangement.tiers, strict=True)
                                  if tier == "device")
    best = then.site.drive.rate[1]
    assert then.arrangement.on("ram") == 0 and then.predict().times.moved["ssd"] == left
    assert then.predict().decode[1] == pytest.approx(best / left, rel=0.02)          # nothing but the drive counts
    said = allowed(state.plan)
    assert f"each token reads {left / GIB:.2f} GiB from the drive" in said and "0.2" in said and "modelled" in said
    assert f"{left * 10 / 1e9:,.0f} GB/s" in needed(state.plan)
    steps = 600e12 / (70.553706496e9 * 14)
    assert f"after some {steps:,.0f} steps" in worn(state.plan) and "0.99 TB" in worn(state.plan)


def test_faster_drives_and_fewer_bits_go_faster(state):
    rows = by_drive(state.plan)
    rates = [row.decode[1] for row in rows]
    assert rates == sorted(rates) and rows[-1].name == "no drive: the rest in RAM" and len(rows) == 8
    table = list(by_quant(state.plan))
    assert [row["weights in"] for row in table][:2] == ["F16", "Q8_0"] and table[0]["tokens/s, modelled"].startswith("0.04")
    assert drives_picture(rows)["data"][0]["x"] == rates


def test_what_fits_needs_no_drive(small):
    state = OffloadState(model="llama-3-8b", quant="Q4_K_M")
    assert "no drive is needed" in allowed(state.plan) and needed(state.plan) == ""
    rows = by_drive(small.plan)
    assert len(rows) == 7 and [row["weights in"] for row in by_quant(small.plan)] == [small.plan.quant]


# ---- running ----------------------------------------------------------------------------------------------------------


def test_it_runs_within_its_budgets_as_the_plain_decoder_does(small, tiny):
    run = RunState(small, tokens=6)
    said = run.run()
    [one] = run.tries
    assert one.tokens == 6 and one.measured > 0 and "measured over 6 tokens" in said and "predicted" in said
    # the file's last page is a part of one; and what is read ahead at the end belongs to a pass that does not come
    ahead = small.plan.arrangement.slot_bytes / 6
    assert one.read == pytest.approx(small.plan.predict().times.moved["ssd"], abs=PAGE + ahead)
    assert 0 <= one.waited <= 1
    assert small.resident and small.plan.resident == small.resident and "Computing alone was measured" in small.paced
    assert run.trace.totals()["compute"].count == 6 * len(small.plan.shape.layers)
    assert run.near() == (one,) and len(run.table) == 1 and "1 placement" in run.checked
    plain = Decoder.open(read_gguf(tiny), strategy="compact", context=64, kv=("f16", "f16"))
    found = [int(plain.read([*offload_run.PLAIN]).argmax())]
    for _ in range(6):
        found.append(int(plain.read([found[-1]]).argmax()))
    assert run.found == found and run.text == ""             # random weights have no vocabulary


def test_fast_mode_is_labelled_and_compared(small):
    small.update(ram_budget="64 MiB", mode="fast")
    run = RunState(small, tokens=3)
    said = run.run()
    assert small.plan.arrangement.on("ram") and run.tries[0].words.count("fast mode") == 1
    assert "In fast mode: RAM layers computed where they lie; logits deviate by nothing" in said
    assert "copy" not in run.trace.totals() and run.key()["mode"] == "fast"


def test_nothing_is_left_behind(small):
    run, before = RunState(small, tokens=2), threading.active_count()
    for _ in range(2):
        run.run()
    assert threading.active_count() == before and len(run.tries) == 2


def test_a_budget_that_is_too_small_for_the_decoder_is_said(small, monkeypatch):
    made = small.plan
    monkeypatch.setattr(OffloadState, "plan", property(lambda self: replace(made, site=replace(made.site, device=4096),
                                                                            resident=1.0)))
    run = RunState(small)
    with pytest.raises(LabError, match="the budget has 4.00 KiB"):
        run.run()
    assert not run.running and "the budget has" in run.answer and run.tries == ()


def test_slots_are_compared_in_the_same_places(small):
    run = RunState(small)
    before = threading.active_count()
    said = run.run_ahead()
    assert threading.active_count() == before
    assert [one.slots for one in run.ahead] == [1, 2, 3] and all(0 <= one.waiting <= one.seconds for one in run.ahead)
    assert said.endswith("measured.") and "1 slot" in said and "3 slots" in said
    where = [offload_run.replace_slots(small.plan, slots).placement for slots in (1, 2)]
    assert where[0].where == where[1].where and [one.slots for one in where] == [1, 2]


def test_it_is_stopped_and_begun_again(small, monkeypatch):
    run, reached = RunState(small, tokens=400), threading.Event()
    small.update(context=512)
    paced = run._paced
    monkeypatch.setattr(run, "_paced", lambda made: (reached.set(), paced(made))[1])
    run.start()
    assert reached.wait(60)
    for again in (run.start, run.start_ahead):
        with pytest.raises(LabError, match="a model is running; end that or wait for it first"):
            again()
    run.end()
    assert run.wait(60) and (run.progress, run.error, run.tries) == ("Stopped.", "", ())
    run.update(tokens=3)
    run.run()
    assert len(run.tries) == 1 and run.progress == ""


@pytest.mark.parametrize(("settings", "said"), [
    ({"prompt": " "}, "there is nothing to continue"), ({"tokens": 1}, "tokens is 1; give how many"),
    ({"tokens": True}, "tokens is True"),
])
def test_what_cannot_be_run_is_said(small, settings, said):
    with pytest.raises(LabError, match=said):
        RunState(small, **settings).start()


def test_another_computer_is_not_run(state):
    with pytest.raises(LabError, match="It cannot be run: this is another computer"):
        RunState(state).start()
    with pytest.raises(LabError, match="'card' is no setting of a run"):
        RunState(state, card=1)


def test_all_of_it_on_the_device_reads_nothing_ahead(small):
    small.update(gpu_budget=None, ram_budget=None)
    with pytest.raises(LabError, match="all of it stays on the device"):
        RunState(small).start_ahead()


def test_what_goes_wrong_is_a_line(small, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("it broke")
    monkeypatch.setattr(offload_run, "open_decoder", broken)
    run = RunState(small)
    with pytest.raises(LabError, match="Something is wrong in llmlab itself: RuntimeError: it broke"):
        run.run()
    assert not run.running


def test_what_a_bench_kept_is_drawn_beside(state, tmp_path):
    run, row = RunState(state), {"layout": "gguf", "budget": 100 * MIB, "stay": 8, "low": 8.0, "predicted": 10.0, "high": 12.0,
                                 "measured": 9.0, "rounds": [9.0], "binds": "SSD"}
    (tmp_path / "kept.json").write_text(json.dumps({"placements": [row, {**row, "measured": 13.0}]}))
    run.recall(tmp_path / "kept.json")
    assert [one.words for one in run.tries] == ["gguf, 8 stay, 100.0 MiB"] * 2 and run.checked.startswith(
        "Of 2 placements 1 landed in the band, 1 within 15%") and run.answer == "Nothing was run yet."
    assert checked_picture(run.tries)["data"][3]["y"] == [9.0, 13.0] and run.near() == ()
    (tmp_path / "other.json").write_text('{"placements": [{}]}')
    for name, said in (("other.json", "holds no placements"), ("none.json", "cannot be read")):
        with pytest.raises(LabError, match=said):
            run.recall(tmp_path / name)


def test_what_llmlab_ships_is_drawn_too(state):
    run = RunState(state)
    run.recall()
    assert len(run.tries) >= 8 and all(one.saved and one.measured > 0 for one in run.tries)
    assert all(one.predicted[0] <= one.predicted[1] <= one.predicted[2] for one in run.tries) and run.near() == ()


def test_a_try_in_words():
    inside, slow, fast = (tried((8, 10, 12), rate) for rate in (9, 7, 13))
    assert [one.verdict for one in (inside, slow, fast)] == ["in the band", "slower than the band", "faster than the band"]
    assert inside.off == pytest.approx(-0.1)
    assert told(inside) == ("9 tokens/s measured over 24 tokens; 10 tokens/s (8 to 12) predicted: in the band, -10% from the "
                            "middle. A token read 40.00 MiB from the drive and waited for 25% of its time: measured.")
    assert "Computing alone took 1.40 times what" in told(tried((8, 10, 12), 7, slowed=1.4))
    assert told(tried((8, 10, 12), 9, slowed=1.1)) == told(inside)


def test_placements_in_a_few_words(state):
    a = state.plan.arrangement
    assert placed(state.plan) == f"{a.on('device')} stay, {a.on('ram')} RAM, {a.on('ssd')} SSD, {a.slots} slots, 24.0 GiB"


def test_a_larger_model_is_written_once(tmp_path):
    config = CONFIG | {"num_hidden_layers": 2}
    path = offload_larger.larger(config, tmp_path / "models" / "larger.gguf")
    file = read_gguf(path)
    assert [*pieces_of(file)] == ["blk.0", "blk.1", "head"] and file.tensors["blk.0.attn_q.weight"].type == "Q4_0"
    logits = Decoder.open(file, strategy="compact").read([1, 2, 3])
    assert logits.isfinite().all() and logits.std() > 0
    before = path.stat().st_mtime_ns
    assert offload_larger.larger(config, path) == path and path.stat().st_mtime_ns == before


def test_a_larger_model_wants_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(offload_larger.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**20})())
    with pytest.raises(LabError, match=r"a larger model takes .* and of the disk only 1.00 MiB are free"):
        offload_larger.larger(path=tmp_path / "larger.gguf")
    assert [*tmp_path.iterdir()] == []


# ---- the panel --------------------------------------------------------------------------------------------------------


def test_widgets_and_state_are_one():
    panel = OffloadExplorer(ram_budget="8 GiB")
    assert (panel.model.value, panel.card.value, panel.drive.value, panel.ram.value) == (
        "llama-3-70b", "rtx-4090-24gb", "gen4", "16 GB DDR4-3200")
    assert panel.answer == panel.state.answer and repr(panel) == f"<{panel.answer}>" and panel.answer[:40] in panel.said.html
    assert panel.device.value == 24 * GIB and panel.host.value == 8 * GIB
    panel.device.index = len(panel.device.options) // 2
    assert panel.state.gpu_budget == panel.device.value == panel.state.plan.site.device
    panel.mode.value = "fast"
    assert panel.state.plan.mode == "fast" == panel.state.plan.placement.mode and "Fast mode" in panel.said.html
    panel.mode.value = "exact"
    panel.host.index = 0
    assert panel.state.error == "" and panel.state.plan.site.ram == panel.host.value
    panel.slots.value = 1
    assert panel.state.plan.arrangement.slots == 1
    panel.drive.value = "sata3-class"
    assert "SATA" in panel.said.html and panel.state.drive == "sata3-class"
    panel.state.gpu_budget = "1 GiB"
    assert "are too little" in panel.said.html and "are too little" in panel.answer
    assert panel.start.disabled and panel.stop.disabled and "another computer" in panel.ran.html


def test_presets_can_all_be_pressed(monkeypatch, tiny):
    panel, made = OffloadExplorer(), []
    for preset, button in zip(PRESETS, panel.children[0].children, strict=True):
        if not preset.label.startswith("run here"):
            button.click()
            assert panel.state.error == "" and button.description == preset.label
            made.append(panel.state.answer)
    assert len(set(made)) == len(made) == 5
    next(preset for preset in PRESETS if "SmolLM2" in preset.label).apply(panel.state)
    assert panel.state.here and panel.state.plan.streamed and panel.state.plan.site.ram == 0 and not panel.start.disabled


def test_drives_are_offered_once():
    offered = drives("gen4")
    values = [value for _, value in offered]
    assert len(values) == len(set(values)) > 20 and "gen4" in values and "nvme-gen4-class" not in values
    assert all(isinstance(llmlab.plan("llama-3-8b", gpu="rtx-4090-24gb", drive=value).site.drive.name, str)
               for value in values if value)


def test_folds_show_what_they_say(small):
    panel = OffloadExplorer()
    box = panel.unfold("levers")
    steps = panel.state.plan.levers()
    assert len(box.rows.rows) == len(steps) > 5 and box.words.html.startswith("Now ")
    first = next(row for row in box.rows.rows if row["action"])
    box.rows._on_action(first["key"])
    assert panel.state.error == "" and panel.state.answer.split()[0] in first["cells"][2]
    claim = panel.unfold("an SSD as VRAM")
    assert "aiDAPTIV" in claim.words.html
    export = panel.unfold("for other engines")
    panel.state.update(**DEFAULTS)
    assert "--override-tensor" in export.text.text
    export.engine.value = "accelerate"
    assert export.text.text == str(panel.state.plan.export("accelerate"))
    assert len(claim.rows.rows) == 6 and len(claim.chart.figure.data[0].x) == 8
    assert "each lever is pulled alone" in lever_words(panel.state.plan, panel.state.plan.levers())


def test_levers_as_settings():
    assert settings_of({"quant": "Q3_K_M"}) == {"quant": "Q3_K_M"}
    assert settings_of({"spec": "llama-3.1-8b", "quant": None}) == {"model": "llama-3.1-8b", "quant": None}
    assert settings_of({"drive": "sata3-class", "mapped": False, "readers": None}) == {"drive": "sata3-class"}
    assert settings_of({"drafted": 4, "accepted": 0.6}) == {} and settings_of({"mode": "fast"}) == {"mode": "fast"}


def test_a_run_is_shown(small):
    panel = OffloadExplorer(small)
    check, ahead = panel.unfold("predicted against measured"), panel.unfold("reading ahead")
    assert panel.timeline.layout.display == "none" and "Press run" in panel.ran.html and "Nothing was run" in check.words.html
    panel.tokens.value = 8
    panel.run.update(prompt="Once")
    assert panel.prompt.value == "Once" and panel.run.tokens == 8
    panel.run.run()
    assert "tokens/s, measured:" in panel.ran.html and panel.timeline.layout.display is None
    assert list(panel.speed.figure.data[3].y) == [panel.run.tries[0].measured] and len(check.rows.rows) == 1
    assert any(len(trace.x) for trace in panel.timeline.figure.data)
    panel.run.run_ahead()
    assert ahead.words.html.startswith("Reading ahead") and len(ahead.chart.figure.data[0].x) == 3
    small.update(gpu_budget=None)
    assert "Press run" not in panel.ran.html and not panel.start.disabled
