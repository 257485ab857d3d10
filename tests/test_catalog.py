"""data/ against itself, and the names people type against data/."""

import builtins
import csv
import dataclasses
import json
import re
import subprocess
import sys
import types

import pytest

from llmlab import catalog
from llmlab.errors import LabError, UnknownName
from llmlab.places import folder
from llmlab.units import GIB, MIB

SLUG = re.compile(r"[a-z0-9]+(?:[.\-_][a-z0-9]+)*")  # kebab-case; points in versions, "_" joins cards in overheads


def table(name: str) -> list[dict]:
    with open(folder("data") / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def model_rows() -> list[dict]:
    return json.loads((folder("data") / "models.json").read_text(encoding="utf-8"))


def cards() -> list[catalog.Gpu]:
    return [catalog.gpu(row["id"]) for row in catalog.gpus()]


def number(text: str) -> float | None:
    return float(text) if text else None


# -- the files ------------------------------------------------------------------------------------------------------


def test_nothing_is_missing():
    assert len(catalog.entries()) == 99 and len(catalog.models()) == 99
    assert len(catalog.gpus()) == 171
    assert len(catalog.links()) == 100
    assert len(catalog.overheads()) == 109
    assert [len(table(name)) for name in ("quality_llama3_8b.csv", "measured_speeds.csv", "benchmark_scores.csv")] \
        == [34, 66, 692]
    assert len(catalog.scores()) == 692 and len(catalog.mmlu_by_quant()) == len(table("mmlu_by_quant_llama3.csv")) == 33


def test_ids_are_unique_and_kebab_case():
    for rows in (model_rows(), *map(table, ("gpus.csv", "links.csv", "overheads.csv"))):
        ids = [row["id"] for row in rows]
        assert len(ids) == len(set(ids))
        assert [i for i in ids if not SLUG.fullmatch(i)] == []


def test_every_row_has_a_source():
    for path in sorted(folder("data").glob("*.csv")):
        assert [row for row in table(path.name) if len(row["source"]) < 3] == [], path.name
    for row in model_rows():
        assert row["source"] and row["license_source"] and row["languages_strengths_source"], row["id"]
        assert row["published"] is None or row["published"]["source"], row["id"]
        assert ("rope_scaling" in row["config"]) == bool(row.get("rope_scaling_source")), row["id"]


def test_no_row_has_more_or_fewer_cells_than_its_header():
    for path in folder("data").glob("*.csv"):
        for row in table(path.name):
            assert None not in row and None not in row.values(), (path.name, row)


def test_published_counts_are_the_total_and_what_else_they_hold():
    unexplained = {}
    for entry in catalog.entries().values():
        if entry.published is None:
            assert entry.verified in ("read-only", "file-size"), entry.id
            continue
        parts = entry.params_total + entry.published["includes"]
        assert entry.published["params"] - parts == entry.published["diff"], entry.id
        if entry.published["diff"]:
            unexplained[entry.id] = entry.published["diff"]
            assert entry.verified == "read-only" and entry.note, entry.id
    assert unexplained == {"kimi-k2": 3416}


def test_model_counts_agree_with_one_another():
    for entry in catalog.entries().values():
        config = entry.config
        rows = entry.params_embedding
        assert rows >= config["vocab_size"] * config["hidden_size"], entry.id
        if not config.get("hidden_size_per_layer_input"):
            assert rows == config["vocab_size"] * config["hidden_size"], entry.id
        assert entry.params_head == (0 if config["tie_word_embeddings"] else rows), entry.id
        assert (entry.params_experts > 0) == bool(config.get("num_experts")), entry.id
        assert rows + entry.params_head + entry.params_experts < entry.params_total, entry.id
        if entry.params_experts:
            idle = entry.params_experts * (1 - config["num_experts_per_tok"] / config["num_experts"])
            assert entry.params_active <= entry.params_total - idle, entry.id
        else:  # a dense model leaves only the input embeddings alone
            read = entry.params_total - (entry.params_embedding if entry.params_head else 0)
            assert entry.params_active <= read, entry.id
            if not config.get("hidden_size_per_layer_input"):
                assert entry.params_active == read, entry.id
        assert len(config.get("layer_types", range(config["num_hidden_layers"]))) == config["num_hidden_layers"]
        assert config["num_attention_heads"] % config["num_key_value_heads"] == 0, entry.id


def test_gguf_files_hold_what_the_notes_say():
    for entry in catalog.entries().values():
        if entry.gguf_elements is not None:
            extra = int(entry.gguf_extra.split(":")[0]) if entry.gguf_extra else 0
            assert entry.gguf_elements == entry.params_total + extra, entry.id
    separate = [e.id for e in catalog.entries().values() if e.gguf_separate_output]
    assert separate == ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b"]
    for name in separate:
        entry = catalog.entry(name)
        assert entry.params_head == 0
        assert entry.gguf_elements - entry.params_total == entry.config["vocab_size"] * entry.config["hidden_size"]


def test_rope_factors_are_there_where_gguf_files_carry_them():
    scaled = {e.id: e.config["rope_scaling"] for e in catalog.entries().values() if "rope_scaling" in e.config}
    assert set(scaled) == {"llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "llama-3.2-1b", "llama-3.2-3b",
                           "llama-3.3-70b", "llama-4-scout", "phi-3.5-mini", "phi-4-mini"}
    for name, scaling in scaled.items():
        config, entry = catalog.entry(name).config, catalog.entry(name)
        turned = int(config["head_dim"] * config.get("partial_rotary_factor", 1)) // 2
        if scaling.get("rope_type") == "llama3":
            assert scaling["original_max_position_embeddings"] == 8192 and scaling["factor"] in (8, 16, 32)
            tensors = {"": turned}
        else:
            assert scaling["type"] == "longrope"
            tensors = {"short_factor": len(scaling["short_factor"]), "long_factor": len(scaling["long_factor"])}
            assert set(tensors.values()) == {turned} == {48}
            assert all(f >= 1 for kind in tensors for f in scaling[kind])
        if entry.gguf_elements is not None:  # a second witness: the elements counted in published GGUF files
            assert entry.gguf_elements - entry.params_total == sum(tensors.values()), name


def test_aliases_and_names_lead_to_one_model_each():
    seen: dict[str, str] = {}
    for entry in catalog.entries().values():
        for name in (entry.id, entry.name, entry.hub_id, *entry.aliases):
            assert catalog.entry(name) is entry, (name, entry.id, catalog.entry(name).id)
            key = catalog._key(name)
            assert seen.setdefault(key, entry.id) == entry.id, name


# Vendor figures that round: bus x rate is more than 1.5 % away, and the row says so.
ROUNDED = {"apple-m1-pro-16c", "apple-m1-max-32c", "apple-m1-ultra-64c", "apple-m2-10c", "apple-m2-pro-19c",
           "apple-m2-max-38c", "apple-m2-ultra-76c", "apple-m3-10c", "apple-m3-pro-18c", "apple-m3-max-30c",
           "apple-m3-max-40c"}


def test_bandwidth_follows_from_bus_and_rate():
    off = set()
    for row in table("gpus.csv"):
        computed = int(row["bus_bits"]) / 8 * float(row["data_rate_gbps"])
        assert computed == pytest.approx(float(row["bw_calc_gbs"]), rel=0.002), row["id"]
        if abs(computed / float(row["bandwidth_gbs"]) - 1) > 0.015:
            off.add(row["id"])
            assert "rounded" in row["note"], row["id"]
            assert computed == pytest.approx(float(row["bandwidth_gbs"]), rel=0.025), row["id"]
    assert off == ROUNDED


def test_cards_are_plausible():
    for row, card in zip(table("gpus.csv"), cards(), strict=True):
        assert row["id"] == card.id
        assert GIB <= card.memory <= 512 * GIB and card.memory % GIB == 0, card.id
        assert 2015 <= card.year <= 2027 and 30e9 < card.bandwidth < 1e13, card.id
        assert card.memory == float(row["vram_gib"]) * GIB
        size = re.search(r"-(\d+)gb$", card.id)
        assert size is None or int(size[1]) * GIB == card.memory, card.id
        options = [float(o) for o in row["memory_options_gib"].split("|") if o]
        assert not options or card.memory / GIB in options, card.id
        assert card.bandwidth_measured is None or 0.5 < card.bandwidth_measured / card.bandwidth <= 1, card.id
        assert {row["fp8"], row["bf16"], row["unified_memory"]} <= {"yes", "no"}, card.id
        assert (card.capability is not None) == (card.vendor == "NVIDIA"), card.id
        if card.capability:
            generation = float(card.capability)
            assert card.bf16 == (generation >= 8.0) and card.fp8 == (generation >= 8.9), card.id
        if card.launch_usd:
            assert row["price_source"], card.id
        assert (card.pcie_gen is None) == (card.pcie_lanes is None)


def test_rates_keep_measured_estimated_and_theoretical_apart():
    for link in catalog.links().values():
        assert link.measured is None or link.estimated is None, link.id
        assert link.rate, link.id
        for rate in (link.measured, link.estimated):
            assert rate is None or link.theoretical is None or rate <= link.theoretical, link.id
        assert link.measured is None or link.how, f"{link.id}: measured, but not how"
    assert catalog.links()["pcie4-x16"].rate == 25.5e9
    assert catalog.links()["pcie3-x8"].measured is None and catalog.links()["pcie3-x8"].estimated == 6.2e9


def test_pcie_rates_follow_from_the_standard():
    lanes = {"2": 5e9 * 8 / 10 / 8, "3": 8e9 * 128 / 130 / 8, "4": 16e9 * 128 / 130 / 8, "5": 32e9 * 128 / 130 / 8}
    checked = 0
    for link in catalog.links().values():
        if match := re.match(r"pcie(\d)-x(\d+)", link.id):
            assert link.theoretical == pytest.approx(lanes[match[1]] * int(match[2]), rel=0.006), link.id
            checked += 1
    assert checked >= 13


def test_ram_rates_follow_from_channels_and_rate():
    checked = 0
    for link in catalog.links().values():
        if match := re.match(r"ddr\d-(\d{4})-(dual|quad|\d+ch|\d+x\d+ch)", link.id):
            ways = {"dual": 2, "quad": 4}.get(match[2])
            if ways is None:
                ways = 1
                for part in re.findall(r"\d+", match[2]):
                    ways *= int(part)
            assert link.theoretical == pytest.approx(int(match[1]) * 1e6 * 8 * ways, rel=0.01), link.id
            checked += 1
    assert checked >= 20


def test_overheads_are_ranges_in_one_unit():
    ids = {card.id for card in cards()}
    for row in catalog.overheads().values():
        assert row.low <= row.value <= row.high, row.id
        assert row.unit in ("bytes", "fraction", "x"), row.id
        assert row.basis in ("measured", "derived", "constant", "unverified"), row.id
        assert set(row.cards) <= ids, row.id
        assert row.unit != "fraction" or 0 < row.value < 1, row.id
        assert row.name != "same" and "UNVERIFIED" not in row.source or row.basis == "unverified", row.id
    assert catalog.overheads()["rsv-rtx-4090"].value == 484 * MIB
    assert catalog.overheads()["torch-min-block"].value == 512


def test_text_stands_alone():
    """No source or note points to a file that only its collector had."""
    for path in (path for path in folder("data").rglob("*") if path.is_file()):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"fit_truth|speed_truth|fit_anchors|find_string|held-out|code[- ]corpus", text), path.name


def test_quality_is_one_table():
    rows = table("quality_llama3_8b.csv")
    base = {round(float(row["perplexity"]) - float(row["delta_perplexity"]), 4) for row in rows}
    assert base == {6.2316}
    for row in rows:
        if row["bits_per_weight"]:
            gib = catalog.entry("llama-3-8b").params_total * float(row["bits_per_weight"]) / 8 / GIB
            fits = -0.006 < float(row["gib"]) - gib < 0.018  # rounding, and the file's header above the weights
            assert fits != ("disagree" in row["note"]), row


def test_measured_quality_is_one_table():
    rows, read = table("quality_smollm2_135m.csv"), catalog.measured_quality()
    base = {round(float(row["perplexity"]) / float(row["ratio"]), 2) for row in rows}
    assert max(base) - min(base) < 0.02 and len(rows) == len(read)       # one original, whatever was measured against it
    assert {("Q8_0", False), ("Q4_K_M", False)} <= set(read)
    stored = sum(int(row["bytes"]) * 8 / float(row["bits_per_weight"]) for row in rows) / len(rows)
    for row, one in zip(rows, read.values(), strict=True):
        assert int(row["bytes"]) * 8 / one.bits == pytest.approx(stored, rel=0.01)      # the same weights in each, and a header
        assert 0 < one.error < one.mean_kld < one.p99_kld and one.loss == pytest.approx(float(row["ratio"]) - 1)
        assert sum(int(part.split()[0]) for part in one.note.split(", ")) == 211, row      # matrices, by their types
        if one.what.startswith("mix at "):
            assert one.bytes <= read[one.what.removeprefix("mix at ").removesuffix(" high"), True].bytes * 1.001
        assert (one.tokens_per_second is None) == (not one.timed)
    assert min(read.values(), key=lambda one: one.mean_kld).what.startswith("Q8_0")


def test_a_longer_search_is_better_at_the_same_bytes():
    """With an importance matrix; without one 510 tokens hardly tell the two apart."""
    read, seen = catalog.measured_quality(), 0
    for (name, matrix), one in read.items():
        if name.endswith(" high"):
            usual = read.get((name.removesuffix(" high"), matrix)) or read[name.removesuffix(" high"), False]
            assert one.note == usual.note and abs(one.bytes - usual.bytes) < 1000, name
            assert one.mean_kld < usual.mean_kld + (0 if matrix else usual.error), name
            seen += 1
    assert seen


def test_measured_kv_quality_is_one_table():
    rows, read = table("kv_quality_smollm2_135m.csv"), catalog.measured_kv_quality()
    assert {row["context"] for row in rows} <= {"1024", "4096"} and {("q8_0", "q8_0"), ("q8_0", "q4_0")} <= set(read)
    base = {}
    for row in rows:
        base.setdefault(row["context"], set()).add(round(float(row["perplexity"]) / float(row["ratio"]), 2))
        assert 0 < float(row["mean_kld_error"]) < float(row["mean_kld"]) < float(row["p99_kld"])
        reached = [float(row[f"kld_to_{edge}"]) for edge in (512, 1024, 2048, 4096) if row[f"kld_to_{edge}"]]
        assert len(reached) == {"1024": 2, "4096": 4}[row["context"]] and int(row["tokens"]) == int(row["context"]) - 1
        assert min(reached) <= float(row["mean_kld"]) <= max(reached)
    assert all(max(found) - min(found) < 0.02 for found in base.values())       # one reference, whatever was held against it
    settings = {(row["rotate"] == "True", int(row["recent"]), int(row["sinks"]), int(row["context"])) for row in rows}
    kept = [one for each in settings for one in catalog.measured_kv_quality(*each).values()]
    assert len(kept) == len(rows) == len({(*one.what.split(", "), len(one.by_depth)) for one in kept})
    both, keys, values = (read[pair] for pair in (("q4_0", "q4_0"), ("q4_0", "q8_0"), ("q8_0", "q4_0")))
    assert both.bits == 4.5 and keys.bits == values.bits == 6.5 and keys.mean_kld > 5 * values.mean_kld    # keys matter more
    assert catalog.measured_kv_quality(context=77) == {}


def test_needles_are_found_less_with_fewer_bits():
    rows = table("kv_needles_smollm2_135m.csv")
    mean = {}
    for row in rows:
        assert 0 <= float(row["found"]) <= 1 and 0 <= float(row["depth"]) <= 1 and int(row["needles"]) >= 1
        mean.setdefault(tuple(row[name] for name in ("k", "v", "rotate", "recent", "sinks", "length")), []).append(
            float(row["log_likelihood"]))
    plain = {key[0]: sum(found) / len(found) for key, found in mean.items() if key[0] == key[1] and key[2] == "False"}
    assert len({len(found) for found in mean.values()}) == 1 and plain["q4_0"] < plain["f32"] < 0


def test_scores_name_models_by_id():
    rows = table("benchmark_scores.csv")
    assert len({row["model_id"] for row in rows} - set(catalog.entries())) == 19  # others' models, for comparison
    assert all(0 <= float(row["score"]) <= 2000 for row in rows)


def test_speeds_say_what_kind_of_truth_they_are():
    assert {row["kind"] for row in table("measured_speeds.csv")} == {"measured", "claimed", "derived"}


# -- memory nobody gets, and links ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "visible"), [  # MiB the driver showed CUDA, from the sources of overheads.csv
    ("rtx-4090-24gb", 24080), ("rtx-3090-24gb", 24124), ("rtx-3070-8gb", 7816), ("rtx-4070-laptop-8gb", 7805),
    ("tesla-t4-16gb", 14909), ("h100-sxm5-80gb", 81121), ("b200-sxm-180gb", 182633), ("l40s-48gb", 45599),
    ("rtx-pro-6000-blackwell-96gb", 97247), ("dgx-spark-gb10-128gb", 124549), ("rx-7900-xtx-24gb", 24517)])
def test_reserved_is_what_the_drivers_showed(name, visible):
    card = catalog.gpu(name)
    low, best, high = card.reserved
    assert low <= best <= high
    assert (card.memory - best) / MIB == pytest.approx(visible, abs=2)


def test_the_rule_for_other_cards_covers_the_rows_it_was_made_from():
    seen = 0
    for row in catalog.overheads().values():
        if row.category == "reserved-framebuffer":
            for card in map(catalog.gpu, row.cards):
                if not card.unified:
                    low, best, high = catalog._framebuffer(card, [])
                    assert low <= row.value <= high and abs(best - row.value) < 200 * MIB, row.id
                    seen += 1
    assert seen >= 13


def test_ecc_takes_a_sixteenth_of_gddr_in_data_centres():
    for row in ("vis-tesla-t4", "vis-a10", "vis-l4", "vis-l40s"):
        overhead = catalog.overheads()[row]
        for card in map(catalog.gpu, overhead.cards):
            assert 1 - overhead.value / card.memory == pytest.approx(catalog._ECC, abs=0.001), row
    assert catalog.gpu("a40-48gb").reserved[1] > 3 * GIB  # no row of its own: the rule


def test_every_card_leaves_room():
    for card in cards():
        low, best, high = card.reserved
        assert 0 <= low <= best <= high < 0.6 * card.memory, card.id
        assert card.unified or best < 0.11 * card.memory, card.id


def test_links_of_cards():
    assert catalog.gpu("rtx-4060-8gb").link.id == "pcie4-x8"
    assert catalog.gpu("apple-m4-10c").link is None
    assert all(card.link for card in cards() if card.pcie_gen)


def test_a_live_card_is_a_catalogue_card_with_free_bytes():
    card = dataclasses.replace(catalog.gpu("4090"), free=20 * GIB)
    assert card.free == 20 * GIB and card.reserved == catalog.gpu("4090").reserved and catalog.gpu(card) is card


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "found"), [
    ("llama-3-8b", "llama-3-8b"), ("llama3-8b", "llama-3-8b"), ("Llama 3:8B", "llama-3-8b"),
    ("llama-3-8b-instruct", "llama-3-8b"), ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
    ("Meta-Llama-3-8B-Instruct", "llama-3-8b"), ("llama3.1:8b", "llama-3.1-8b"), ("mixtral-8x22b", "mixtral-8x22b"),
    ("MIXTRAL_8X7B", "mixtral-8x7b"), ("qwen2.5:7b", "qwen2.5-7b"), ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b"),
    ("gemma3:4b", "gemma-3-4b"), ("mistral", "mistral-7b-v0.3"), ("phi4", "phi-4"), ("gpt-oss:20b", "gpt-oss-20b"),
    ("deepseek-r1:671b", "deepseek-r1"), ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m")])
def test_models_by_the_names_people_type(name, found):
    assert catalog.entry(name).id == found


@pytest.mark.parametrize(("name", "offered"), [
    ("lama-3-8b", "llama-3-8b"), ("llama-38b", "llama-3-8b"), ("qwen3-4", "qwen3-4b"), ("mixtrel-8x7b", "mixtral-8x7b"),
    ("deepseek", "deepseek-v3"), ("someone/llama-3-8b", "llama-3-8b"), ("gemma-3-4", "gemma-3-4b")])
def test_a_misspelt_model_is_answered_with_the_nearest(name, offered):
    with pytest.raises(UnknownName, match="did you mean") as caught:
        catalog.entry(name)
    assert offered in str(caught.value) and str(caught.value).count(",") <= 1


@pytest.mark.parametrize(("name", "found"), [
    ("rtx-3060-12gb", "rtx-3060-12gb"), ("RTX 3060 12GB", "rtx-3060-12gb"), ("3060 12gb", "rtx-3060-12gb"),
    ("4090", "rtx-4090-24gb"), ("rtx4090", "rtx-4090-24gb"), ("NVIDIA GeForce RTX 4090", "rtx-4090-24gb"),
    ("rtx-3090ti", "rtx-3090-ti-24gb"), ("NVIDIA GeForce RTX 4070 Laptop GPU", "rtx-4070-laptop-8gb"),
    ("Tesla T4", "tesla-t4-16gb"), ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"), ("A6000", "rtx-a6000-48gb"),
    ("NVIDIA H100 80GB HBM3", "h100-sxm5-80gb"), ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada-48gb"),
    ("7900 XTX", "rx-7900-xtx-24gb"), ("AMD Radeon RX 7900 XTX", "rx-7900-xtx-24gb"), ("b580", "arc-b580-12gb"),
    ("Strix Halo", "strix-halo-ryzen-ai-max-395-128gb"), ("m1", "apple-m1-8c")])
def test_cards_by_the_names_people_type(name, found):
    assert catalog.gpu(name).id == found


def test_every_card_is_found_by_its_id_and_its_name():
    for card in cards():
        assert catalog.gpu(card.id) is card and catalog.gpu(card.name) is card


@pytest.mark.parametrize(("name", "variants"), [
    ("rtx 3060", ["rtx-3060-8gb", "rtx-3060-12gb"]), ("3080", ["rtx-3080-10gb", "rtx-3080-12gb"]),
    ("NVIDIA GeForce RTX 4060 Ti", ["rtx-4060-ti-8gb", "rtx-4060-ti-16gb"]),
    ("h100", ["h100-pcie-80gb", "h100-sxm5-80gb", "h100-nvl-94gb"]), ("M4 Max", ["apple-m4-max-32c"])])
def test_a_card_with_variants_names_them(name, variants):
    with pytest.raises(UnknownName, match="comes as .*: say which") as caught:
        catalog.gpu(name)
    assert all(variant in str(caught.value) for variant in variants)


@pytest.mark.parametrize(("name", "offered"), [
    ("rtx-4091", "rtx-4090-24gb"), ("rtx 9070", "rx-9070-16gb"), ("gtx 4090", "rtx-4090-24gb"),
    ("orin nano", "jetson-orin-nano-8gb"), ("rtx", "rtx-")])
def test_a_misspelt_card_is_answered_with_the_nearest(name, offered):
    with pytest.raises(UnknownName, match="did you mean") as caught:
        catalog.gpu(name)
    assert offered in str(caught.value)


@pytest.mark.parametrize("call", [catalog.entry, catalog.gpu, catalog.models, catalog.gpus])
@pytest.mark.parametrize("name", ["", "   ", "-", 7, 0.5, True, b"llama-3-8b", ["llama-3-8b"], {}, "x" * 10_000,
                                  "4090" * 3000, "a\nb", "\x00", "é" * 300, "rtx-" * 50])
def test_a_name_that_is_none_gets_one_short_line(call, name):
    with pytest.raises(UnknownName) as caught:
        call(name)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)
    assert isinstance(caught.value, LabError)


@pytest.mark.parametrize("call", [catalog.entry, catalog.gpu])
def test_none_is_no_name(call):
    with pytest.raises(UnknownName, match="None is not a"):
        call(None)


def test_nearest_is_for_any_list():
    assert catalog.nearest("Q4_K_N", ["Q4_K_M", "Q4_K_S", "Q8_0"])[0] in ("Q4_K_M", "Q4_K_S")
    assert catalog.nearest("iq4", ["Q4_K", "IQ4_XS", "IQ4_NL", "Q8_0"])[:2] == ["IQ4_XS", "IQ4_NL"]
    assert catalog.nearest("zzzz", ["Q4_K"]) == [] and catalog.nearest("", ["Q4_K"]) == []


# -- tables ---------------------------------------------------------------------------------------------------------


def test_tables_are_lists_of_dicts():
    rows = catalog.models("Llama 3.1")
    assert [row["id"] for row in rows] == ["llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"] and len(rows) == 3
    assert rows[0]["params"] == 8_030_261_248 and rows[0]["context"] == 131072
    assert isinstance(rows[1:], catalog.Table) and len(rows[1:]) == 2
    assert len(catalog.models("llama")) == 12 and rows == list(rows)
    assert {row["vendor"] for row in catalog.gpus("nvidia")} == {"NVIDIA"} and len(catalog.gpus("nvidia")) == 113


def test_tables_show_themselves_as_aligned_text():
    lines = repr(catalog.models("Llama 3.1")).splitlines()
    assert len(lines) == 4 and lines[0].split()[:3] == ["id", "family", "release"]
    assert lines[1].index("2024-07") == lines[3].index("2024-07")
    assert "8.03 B" in lines[1] and "131,072" in lines[1]
    assert "24 GiB  1008.0 GB/s" in repr(catalog.gpus("NVIDIA"))
    assert repr(catalog.Table([])) == "(no rows)"


def test_tables_show_themselves_as_escaped_html():
    html = catalog.Table([{"id": "<b>", "size": 3}, {"id": "x & y", "size": None}])._repr_html_()
    assert "&lt;b&gt;" in html and "x &amp; y" in html and "<b>" not in html
    assert html.count("<tr>") == 3 and 'text-align:right">3<' in html


def test_to_frame_needs_pandas(monkeypatch):
    real = builtins.__import__

    def without_pandas(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(LabError, match="pip install pandas"):
        catalog.models().to_frame()


def test_to_frame_hands_pandas_the_plain_values(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=list))
    frame = catalog.models("Llama 3.1").to_frame()
    assert frame[0]["params"] == 8_030_261_248 and list(frame[0])[:2] == ["id", "family"]


@pytest.mark.parametrize(("call", "wanted", "offered"), [
    (catalog.models, "lama", "Llama"), (catalog.models, "qwen-3xx", "Qwen3"), (catalog.gpus, "nvida", "NVIDIA")])
def test_a_family_or_vendor_there_is_none_of(call, wanted, offered):
    with pytest.raises(UnknownName, match=f"called '{wanted}'; did you mean .*{offered}"):
        call(wanted)


def test_importing_reads_nothing_and_needs_nothing():
    code = ("import sys, builtins\nopened = []\nreal = builtins.open\n"
            "builtins.open = lambda *a, **k: (opened.append(a[0]), real(*a, **k))[1]\n"
            "import llmlab.catalog as c\nassert not opened, opened\n"
            "assert not {'torch', 'numpy', 'pandas', 'ipywidgets'} & set(sys.modules)\n"
            "c.entry('llama-3-8b'); c.entry('qwen3-4b')\nassert len(opened) == 1, opened\n")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder("data").parent, timeout=60)
