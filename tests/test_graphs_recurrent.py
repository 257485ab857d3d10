"""Compute buffers of recurrent models and of Gemma's shared caches: what llama.cpp printed, and how states travel."""

import json
from pathlib import Path

import pytest

from llmlab.catalog import gpu
from llmlab.graphs import Request, compute_buffers, family_of
from llmlab.graphs.allocator import Plan
from llmlab.graphs.ggml import HOST, Graph, Tensor
from llmlab.graphs.parts import At, Builder, Setup
from llmlab.graphs.recurrent import Recurrence
from llmlab.memory import weights
from llmlab.placing import assignment
from llmlab.settings import Settings
from llmlab.shapes import from_config, model_spec
from llmlab.units import MIB

GOLDEN = json.loads((Path(__file__).parent / "golden" / "llama_cpp_compute_recurrent.json").read_text(encoding="utf-8"))
PRINTED = 0.0051 * MIB         # sizes are printed in MiB with two decimals


def spec_of(name):
    config = GOLDEN["configs"].get(name)
    return model_spec(name) if config is None else from_config(config, name)


def planned(spec, row):
    split = row.get("split")
    cards = len(split or [1])
    where = assignment(spec, (gpu("rtx-3060-12gb"),) * cards, Settings(GOLDEN["quant"], split=split and tuple(split)),
                       min(row["gpu_layers"], len(spec.layers) + 1))
    request = Request(row["context"], row.get("ubatch", 512), row.get("flash", True), tuple(row.get("kv", ("f16", "f16"))),
                      row.get("sequences", 1))
    return compute_buffers(spec, request, tuple(where), row.get("n_cpu_moe", 0), cards, weights(spec, GOLDEN["quant"]),
                           cuda=False)


# ---- against llama.cpp ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted({row["model"] for row in GOLDEN["rows"]}))
def test_cards_and_host_hold_what_llama_cpp_plans(name):
    """To the printed 0.01 MiB."""
    spec = spec_of(name)
    assert family_of(spec).verified
    for row in (row for row in GOLDEN["rows"] if row["model"] == name):
        found = planned(spec, row)
        ours = [peak.bytes for peak in (*found.cards, found.host)]
        assert ours == pytest.approx([mib * MIB for mib in (*row["cards"], row["host"])], abs=PRINTED), row


@pytest.mark.parametrize("name", ["gemma-4-e4b", "granite-4.0-h-micro", "nemotron-nano-9b-v2", "qwen3.5-27b"])
def test_the_few_layers_give_what_all_give_on_several_cards(name):
    spec = model_spec(name)
    count = len(spec.layers)
    for cards, gpu_layers in ((2, 99), (3, 99), (2, count // 2)):
        where = tuple(assignment(spec, (gpu("rtx-3060-12gb"),) * cards, Settings("Q4_K_M"), min(gpu_layers, count + 1)))
        few, every = (compute_buffers(spec, Request(8192), where, 0, cards, weights(spec, "Q4_K_M"), whole=whole)
                      for whole in (False, True))
        assert [p.bytes for p in (*few.cards, few.host)] == [p.bytes for p in (*every.cards, every.host)], (cards, gpu_layers)


def test_golden_covers_every_recurrent_architecture():
    rows = GOLDEN["rows"]
    families = {spec_of(row["model"]).architecture for row in rows}
    assert families == {"qwen3next", "qwen35", "qwen35moe", "granitehybrid", "nemotron_h", "nemotron_h_moe", "lfm2", "lfm2moe",
                        "gemma4", "gemma3n", "mamba", "mamba2", "falcon-h1"}
    for key in ("flash", "kv", "split", "sequences", "n_cpu_moe"):
        assert sum(key in row for row in rows) >= 15
    assert {row["context"] for row in rows} >= {512, 8192, 65536}
    assert {row.get("ubatch", 512) for row in rows} >= {64, 512, 2048}


# ---- states ---------------------------------------------------------------------------------------------------

def built(name, sequences=1):
    spec = spec_of(name)
    setup = Setup(sequences=sequences, streams=sequences)
    ats = [At(b.index, b, HOST, HOST, b is spec.blocks[-1]) for b in spec.blocks]
    return spec, family_of(spec).build(Builder(spec, setup, ats, HOST))


@pytest.mark.parametrize("name", ["qwen3.5-0.8b", "granite-4.0-h-micro", "lfm2-1.2b", "nemotron-3-nano-4b"])
def test_every_recurrent_layer_reads_and_writes_its_states(name):
    spec, g = built(name, sequences=3)
    states = [leaf for leaf in g.leaves if "of the sequences" in leaf.label]
    kept = [b.conv_state for b in spec.blocks if b.conv_state] + [b.ssm_state for b in spec.blocks if b.ssm_state]
    assert sorted(leaf.shape[0] for leaf in states) == sorted(kept) and all(leaf.shape[1] == 3 for leaf in states)
    written = [node.root for node in g.nodes if node.op == "cpy" and node.root in states and node.size()]
    assert sorted(map(id, written)) == sorted(map(id, states))
    assert not any(leaf.weight or leaf.input for leaf in states)


def test_a_scan_gives_all_tokens_and_a_state_a_sequence():
    """ggml_ssm_scan and ggml_gated_delta_net put the new states behind their results."""
    spec, g = built("granite-4.0-h-micro", sequences=2)
    scan = next(node for node in g.nodes if node.op == "ssm_scan")
    inner, state = spec.metadata["ssm.inner_size"], spec.metadata["ssm.state_size"]
    assert bytes_of(g, scan, t=7) == 4 * inner * 2 * (7 + state)
    spec, g = built("qwen3.5-4b", sequences=2)
    net = next(node for node in g.nodes if node.op == "gated_delta_net")
    assert bytes_of(g, net, t=7) == 4 * (2 * 7 * 4096 + 2 * spec.layers[0].ssm_state)


def bytes_of(g: Graph, tensor: Tensor, **values) -> int:
    for name, text in g.derived.items():
        values[name] = eval(text, {}, values)
    return eval(str(tensor.size()), {}, values)


def test_a_convolution_starts_from_the_columns_before_it():
    spec, g = built("lfm2-1.2b", sequences=2)
    whole = next(node for node in g.nodes if node.op == "concat")
    assert bytes_of(g, whole, t=10) == 4 * (2 + 10) * spec.width * 2
    kept = next(node for node in g.nodes if node.op == "cpy" and node.size() and "convolution" in node.root.label)
    assert bytes_of(g, kept.src[0], t=10) == 4 * ((2 * spec.width - 1) * 12 + 2)          # rows with gaps, as ggml_nbytes says


def test_a_tensor_of_no_bytes_leaves_a_block_that_keeps_its_neighbours_apart():
    """llama.cpp copies the empty rest of rs_s_copy to each card; ggml-alloc frees it into the midst of a free block."""
    def top(empty: bool) -> int:
        a, nothing, b, c, d, large = range(6)
        allocated = [(0, slot, 1 if slot == nothing else 0) for slot in (a, nothing, b, c, d) if empty or slot != nothing]
        freed = [(~0, slot, 1 if slot == nothing else 0) for slot in (b, a, nothing, c, d) if empty or slot != nothing]
        steps = [*allocated, *freed, (0, large, 2)]
        return Plan(1, steps, [("", -1)] * 6, compile("(128, 0, 640)", "<sizes>", "eval"), ()).measure({})[0].bytes
    assert top(empty=False) == 640             # all are free again, and one block
    assert top(empty=True) == 4 * 128 + 640    # the four end where the endless block begins, but are not joined to it


def test_recurrent_inputs_are_shared_by_all_layers():
    _, g = built("qwen3.5-0.8b", sequences=4)
    orders = [leaf for leaf in g.leaves if leaf.label == "states' order"]
    assert [leaf.shape[0] for leaf in orders] == [4]
    positions = [leaf for leaf in g.leaves if leaf.label == "positions"]
    assert [str(leaf.shape[0]) for leaf in positions] == ["16*t"]          # MRoPE: four a token


def test_states_of_a_layer_lie_on_its_card():
    spec = model_spec("lfm2-1.2b")
    ats = [At(b.index, b, 0, 0, False) for b in spec.blocks]
    r = Recurrence(Builder(spec, Setup(), ats, 0))
    stored = r.stored(ats[0], "convolution", spec.layers[0].conv_state)
    assert stored.place == 0 and stored.size() == 4 * spec.layers[0].conv_state
    r.read(stored)
    assert {node.root for node in r.g.nodes if node.op in ("scale", "cpy")} == {stored}


# ---- shared caches --------------------------------------------------------------------------------------------

def test_gemma_4_layers_read_the_last_cache_of_their_kind():
    spec, g = built("gemma-4-e2b")
    caches = {leaf.at if leaf.at >= 0 else leaf: leaf for leaf in g.leaves if leaf.label == "K cache"}
    own = len(spec.blocks) - spec.metadata["attention.shared_kv_layers"]
    assert len(caches) == own == sum(b.owns_kv for b in spec.blocks)
    readers = {}
    for node in g.nodes:
        if node.op == "flash_attn_ext":
            readers.setdefault(id(node.src[1].root), []).append(node.at)
    shared = sorted(layers for layers in readers.values() if len(layers) > 1)
    windowed = [b.index for b in spec.blocks if b.index >= own and b.window]
    assert shared == sorted([[own - 2, *windowed], [own - 1, *(i for i in range(own, len(spec.blocks)) if i not in windowed)]])


def test_gemma_4_scales_each_experts_output():
    spec, g = built("gemma-4-26b-a4b")
    scales = [leaf for leaf in g.leaves if leaf.label == "ffn_down_exps's scale"]
    assert len(scales) == len(spec.blocks)
    assert all(leaf.shape[0] == spec.experts for leaf in scales)
