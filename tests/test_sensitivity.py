"""What tensors' types cost: gradients against differences, what is measured against `divergence`, mixes against brute force."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import runtime_models
import torch

from llmlab import load, quality
from llmlab.errors import BadFile, LabError, UnknownName
from llmlab.formats import FORMATS
from llmlab.kernels import pack
from llmlab.quality import fisher, knapsack, sensitivities, swapping
from llmlab.quality.knapsack import Option
from llmlab.quality.sensitivities import Cost, Sensitivity

CONTEXT = 32
IDS = np.random.default_rng(3).integers(3, runtime_models.VOCAB, CONTEXT * 4)
TYPES = ("Q4_0", "Q5_0", "Q8_0")
TENSORS = ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_v.weight", "blk.1.attn_k.weight", "blk.1.ffn_down.weight",
           "output.weight")


def made(folder, case, mix="F32"):
    path = folder / f"{case}-{mix}.gguf"
    runtime_models.make(case, path, mix)
    return load(path, device="cpu", dtype="float32")[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return made(tmp_path_factory.mktemp("models"), "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return made(tmp_path_factory.mktemp("models"), "llama-tied")


@pytest.fixture(scope="module")
def found(model):
    return quality.sensitivity(model, IDS, TYPES, measure=True, context=CONTEXT, progress=False)


# ---- second order -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("which", ["model", "tied"])
def test_gradients_are_those_of_differences(which, request):
    """Along its own gradient a matrix changes the drawn tokens' log-likelihood by the gradient's length: heads that are
    interleaved, and a table that is both embedding and output, among them."""
    model = request.getfixturevalue(which)
    ids, rows = torch.from_numpy(IDS[:CONTEXT])[None], slice(CONTEXT // 2, CONTEXT - 1)
    found = swapping.matrices(model)
    parts = fisher.passed_back(model, ids, rows, found, torch.Generator().manual_seed(7))
    with torch.inference_mode():
        chances = model(ids).logits[0, rows].softmax(-1)
    drawn = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(7))

    def likelihood(matrix, change):
        weights = swapping.numbers(matrix.packed) + change
        packed = pack(weights.view(torch.uint8).reshape(len(weights), -1), "F32", "reference", torch.float32, matrix.name)
        with swapping.swapped(matrix, packed), torch.inference_mode():
            return float(model(ids).logits[0, rows].double().log_softmax(-1).gather(1, drawn).sum())

    assert parts.keys() == found.keys()
    for name, several in parts.items():
        gradient = fisher.gradient(several, found[name].packed.shape)
        length = float(gradient.norm())
        step = gradient * (0.002 / length)
        slope = (likelihood(found[name], step) - likelihood(found[name], -step)) / 0.004
        assert slope == pytest.approx(length, rel=0.02), name


def test_what_is_predicted_is_near_what_is_measured(found):
    assert found.correlation() > 0.95
    ratios = [one.predicted / one.measured for one in found.costs if one.type == "Q8_0"]
    assert 0.5 < np.median(ratios) < 2 and len(ratios) == 16


def test_the_fisher_of_more_text_is_a_sum():
    assert fisher.Fisher().cost("x", torch.ones(2, 2)) is None
    second = fisher.Fisher()
    one, two = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
    second.parts, second.tokens = [{"x": [fisher.Part(one, two)]}, {"x": [fisher.Part(two, one)]}], 5
    # gradients [[3, -1], [6, -2]] and [[3, 6], [-1, -2]]: squares 18, 37, 37, 8
    assert second.cost("x", torch.tensor([[1.0, 0.0], [2.0, 0.5]])) == pytest.approx((18 + 4 * 37 + 8 / 4) / 10)
    looked_up = fisher.Part(one, None, torch.tensor([1]))
    assert fisher.gradient([looked_up, looked_up], (3, 2)).tolist() == [[0, 0], [2, 4], [0, 0]]


# ---- measuring ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tensor", TENSORS)
def test_a_measured_cost_is_the_divergence_of_a_model_with_that_tensor_changed(model, found, tensor):
    twin = quality.in_types(model, {tensor: "Q4_0"})
    known = quality.divergence(twin, model, IDS, CONTEXT, chunks=2, progress=False).mean_kld.value
    one = next(one for one in found.costs if (one.tensor, one.type) == (tensor, "Q4_0"))
    assert one.measured == pytest.approx(known, rel=1e-3) and known > 0


def test_costs_fall_with_bits_and_bytes_are_the_files(model, found):
    for name in found.elements:
        four, five, eight = (next(c for c in found.costs if (c.tensor, c.type) == (name, type)) for type in TYPES)
        assert four.measured > five.measured > eight.measured >= 0 and four.error > five.error > eight.error
        assert five.bytes == FORMATS["Q5_0"].bytes(found.elements[name])
    assert found.tokens == 2 * (CONTEXT // 2 - 1) and len(found.costs) == 3 * 16
    everything = dict.fromkeys(found.elements, "Q4_0")
    assert found.bytes(everything) == sum(one.bytes for one in found.costs if one.type == "Q4_0")
    assert found.predicted(everything) == pytest.approx(sum(one.measured for one in found.costs if one.type == "Q4_0"))
    assert found.bytes({}) == 4 * sum(found.elements.values())


def test_the_model_is_as_it_was(model, found):
    assert all(matrix.packed.format == "F32" for matrix in swapping.matrices(model).values())
    assert not any("forward" in vars(layer) for layer in swapping.layers_of(model))
    assert not any(module._forward_hooks for module in model.modules())


def test_an_embedding_that_is_the_output_is_changed_in_both_places(tied):
    matrix = swapping.matrices(tied)["token_embd.weight"]
    assert len(matrix.places) == 2
    twin = quality.in_types(tied, {"token_embd.weight": "Q8_0"})
    assert {value.format for module in twin.modules() for value in vars(module).values()
            if getattr(value, "name", "") == "token_embd.weight"} == {"Q8_0"}


def test_experts_are_measured_and_not_predicted(tmp_path):
    model = made(tmp_path, "mixtral")
    stack = "blk.1.ffn_up_exps.weight"
    asked = dict(context=CONTEXT, progress=False, tensors=[stack, "blk.0.attn_v.weight"])
    found = quality.sensitivity(model, IDS, ["Q4_0", "Q8_0"], **asked)
    assert next(one for one in found.costs if one.tensor == stack).predicted is None
    with pytest.raises(LabError, match="blk.1.ffn_up_exps.weight in Q4_0 is neither predicted .* nor measured"):
        quality.best_mix(found, 10**9)
    found = quality.sensitivity(model, IDS, ["Q4_0", "Q8_0"], measure="Q4_0", **asked)
    four, eight = (found.cost(stack, type) for type in ("Q4_0", "Q8_0"))
    assert 0 < eight < four / 50                  # carried over by the square of the errors
    assert quality.best_mix(found, 10**9).types == {stack: "Q8_0", "blk.0.attn_v.weight": "Q8_0"}


def test_importance_goes_to_the_quantizer_tensor_by_tensor(model):
    name = "blk.0.ffn_up.weight"
    matters = np.linspace(0.01, 9, 256, dtype=np.float32)
    plain, weighed = (quality.sensitivity(model, IDS, ["Q4_0"], tensors=[name], importance=importance, context=CONTEXT,
                                          progress=False).costs[0] for importance in (None, {name: matters}))
    assert weighed.error != plain.error
    with pytest.raises(LabError, match="7 numbers for blk.0.ffn_up.weight, which has 256 columns"):
        quality.in_types(model, {name: "Q4_0"}, {name: np.ones(7, np.float32)})


# ---- what is known of a tensor ------------------------------------------------------------------------------

def by_hand(*costs, stored=("F16", 400)):
    names = dict.fromkeys(cost.tensor for cost in costs)
    return Sensitivity("m.gguf", 32, 2, 30, costs, dict.fromkeys(names, 200), dict.fromkeys(names, stored))


def test_a_cost_is_measured_or_carried_over_from_the_nearest_type():
    found = by_hand(Cost("a", "Q4_0", 100, 0.08, 0.010, 0.012), Cost("a", "Q5_0", 120, 0.04, 0.0025),
                    Cost("a", "Q8_0", 180, 0.005, 0.00004, 0.00002), Cost("a", "Q6_K", 150, 0.008, 0.0001),
                    Cost("b", "Q4_0", 100, 0.08, 0.5), Cost("c", "Q4_0", 1, 0.1, None, 0.4), Cost("c", "Q5_0", 2, 0.05, None))
    assert found.cost("a", "Q4_0") == 0.012
    assert found.cost("a", "Q5_0") == pytest.approx(0.0025 * 1.2)
    assert found.cost("a", "Q6_K") == pytest.approx(0.0001 / 2)
    assert found.cost("b", "Q4_0") == 0.5
    assert found.cost("c", "Q5_0") == pytest.approx(0.1)
    assert math.isnan(found.correlation())
    assert [row["tensor"] for row in found.table("Q4_0")] == ["b", "c", "a"]
    assert found.table("Q4_0")[0]["per MiB saved"] == pytest.approx(0.5 / 300 * 2**20)
    assert "3 matrices, 7 tensors and types, 3 of them measured over 30 tokens" in repr(found)
    with pytest.raises(LabError, match="a in Q2_K was not looked at; there are Q4_0, Q5_0"):
        found.cost("a", "Q2_K")


def test_kept_in_a_file(found, tmp_path):
    found.save(tmp_path / "s.json")
    assert quality.read_sensitivity(tmp_path / "s.json") == found
    for text in ("", "[]", "{}", '{"format": "other"}', (tmp_path / "s.json").read_text()[:-20]):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(BadFile, match="holds no sensitivities"):
            quality.read_sensitivity(tmp_path / "bad.json")
    with pytest.raises(LabError, match="cannot be written"):
        found.save(tmp_path / "no" / "s.json")


def test_what_was_found_is_found_again(model, tied, tmp_path, monkeypatch):
    cache, asked = tmp_path / "c.json", dict(context=CONTEXT, progress=False, tensors=["blk.0.attn_v.weight"])
    first = quality.sensitivity(model, IDS, ["Q4_0"], cache=cache, **asked)
    measured = quality.sensitivity(model, IDS, ["Q4_0"], measure=True, cache=cache, **asked)
    assert first.costs[0].measured is None and measured.costs[0].measured > 0
    quality.sensitivity(model, IDS[::-1].copy(), ["Q4_0"], cache=cache, **asked)
    quality.sensitivity(model, IDS, ["Q4_0"], cache=cache, effort="high", **asked)
    quality.sensitivity(tied, IDS, ["Q4_0"], cache=cache, **asked)
    assert len(json.loads(cache.read_text())) == 4

    def never(*_):
        raise AssertionError("this was known")

    monkeypatch.setattr(sensitivities, "blocks_in", never)
    assert quality.sensitivity(model, IDS, ["Q4_0"], measure=True, cache=cache, **asked) == measured
    cache.write_text('{"x": [{"tensor": 1}]}')
    with pytest.raises(BadFile, match="no cache of sensitivities"):
        quality.sensitivity(model, IDS, ["Q4_0"], cache=cache, **asked)


def test_it_can_be_stopped(model):
    calls = iter([False, False, True])
    found = quality.sensitivity(model, IDS, ["Q8_0"], context=CONTEXT, progress=False, stopped=lambda: next(calls, True))
    assert len(found.costs) <= 2


@pytest.mark.parametrize(("change", "says"), [
    (dict(types=["Q9_9"]), "'Q9_9' is no type that can be written"),
    (dict(types=["Q4_0"], measure="Q8_0"), "measure names 'Q8_0'"),
    (dict(types=[]), "no matrix has rows that divide into blocks of no type"),
    (dict(tensors=["blk.9.x"]), "'blk.9.x' is no matrix of this model"),
    (dict(context=100), "give more text"),
    (dict(model=SimpleNamespace()), "only a model that llmlab.load made"),
])
def test_bad_input_is_one_clear_line(model, change, says):
    asked = dict(model=model, tokens=IDS, types=["Q4_0"], context=CONTEXT, progress=False) | change
    with pytest.raises(LabError, match=says) as raised:
        quality.sensitivity(asked.pop("model"), asked.pop("tokens"), asked.pop("types"), **asked)
    assert "\n" not in str(raised.value)


def test_other_types_for_a_model(model):
    assert quality.in_types(model, {"output_norm.weight": "F32"}) is not model
    with pytest.raises(UnknownName, match="'blk.7.attn_q.weight' is no matrix"):
        quality.in_types(model, {"blk.7.attn_q.weight": "Q4_0"})
    twin = quality.in_types(model, {"output.weight": "Q4_0"})
    assert [m.packed.format for m in swapping.matrices(twin).values()].count("F32") == 15
    assert swapping.matrices(twin)["blk.0.attn_q.weight"].packed is swapping.matrices(model)["blk.0.attn_q.weight"].packed


# ---- a mix within a budget ----------------------------------------------------------------------------------

def brute(items, budget):
    return min((sum(o.cost for o in choice) for choice in itertools.product(*items.values())
                if sum(o.bytes for o in choice) <= budget), default=None)


def random_items(rng, most=7):
    scales = rng.choice([1, 0.01, 1e-6], most)
    return {f"i{i}": [Option(f"o{j}", int(rng.integers(1, 60)), float(rng.random() * scales[i]))
                      for j in range(rng.integers(1, 5))] for i in range(rng.integers(1, most))}


@pytest.mark.parametrize("seed", range(60))
def test_the_choice_is_the_best_there_is(seed):
    rng = np.random.default_rng(seed)
    items = random_items(rng)
    least, most = (sum(end(o.bytes for o in options) for options in items.values()) for end in (min, max))
    budget = int(rng.integers(least, most + 2))
    found = knapsack.choose(items, budget)
    picked = [next(o for o in items[name] if o.name == option) for name, option in found.picked.items()]
    assert found.exact and found.bytes == sum(o.bytes for o in picked) <= budget
    assert found.cost == pytest.approx(sum(o.cost for o in picked)) == pytest.approx(brute(items, budget))


def test_where_too_many_are_left_the_gap_is_said(monkeypatch):
    rng = np.random.default_rng(1)
    items = {str(i): [Option(str(j), int(rng.integers(1, 1000)), float(rng.random())) for j in range(6)] for i in range(40)}
    whole = knapsack.choose(items, 8000)
    monkeypatch.setattr(knapsack, "MOST", 2)
    rough = knapsack.choose(items, 8000)
    assert whole.exact and whole.bound == whole.cost
    assert not rough.exact and rough.bound <= whole.cost <= rough.cost and rough.bytes <= 8000


@pytest.mark.parametrize(("items", "budget", "says"), [
    ({"a": [Option("x", 10, 1.0)]}, 9, "smallest choice takes 10 bytes"),
    ({"a": []}, 9, "a has nothing to be chosen from"),
    ({"a": [Option("x", 1, math.nan)]}, 9, "a as x costs nan"),
])
def test_choices_that_there_are_not(items, budget, says):
    with pytest.raises(LabError, match=says):
        knapsack.choose(items, budget)


def test_a_mix_is_better_than_one_type_at_its_bytes(model, found):
    """Three types by tensor against Q5_0 throughout, run: the sum of costs is a prediction, the divergence is not."""
    flat = dict.fromkeys(found.elements, "Q5_0")
    best = quality.best_mix(found, found.bytes(flat))
    assert best.proven and best.bytes == found.bytes(best.types) <= found.bytes(flat)
    assert best.predicted == pytest.approx(found.predicted(best.types)) and best.predicted < found.predicted(flat)
    ours, theirs = (quality.divergence(quality.in_types(model, types), model, IDS, CONTEXT, chunks=2, progress=False)
                    .mean_kld.value for types in (best.types, flat))
    assert ours < theirs and sum(best.counts().values()) == 16
    assert quality.best_mix(found, 10**9).predicted == pytest.approx(found.predicted(dict.fromkeys(flat, "Q8_0")))


def test_groups_get_one_type_and_names_are_in_an_order_that_patterns_allow(found):
    flat = dict.fromkeys(found.elements, "Q5_0")
    grouped = quality.best_mix(found, found.bytes(flat), groups=lambda name: name.rpartition(".")[0].rpartition(".")[2])
    for part in ("attn_q", "ffn_down"):
        assert grouped.types[f"blk.0.{part}.weight"] == grouped.types[f"blk.1.{part}.weight"]
    alone = quality.best_mix(found, found.bytes(flat))
    assert alone.predicted <= grouped.predicted
    names = list(alone.types)
    for at, name in enumerate(names):       # the first name found in another is its own
        assert next(one for one in names if one in name) == name, at
    only = quality.best_mix(found, found.bytes(flat), types=["Q4_0", "Q8_0"])
    assert set(only.types.values()) <= {"Q4_0", "Q8_0"}


def test_what_no_type_divides_stays_as_it_is():
    found = by_hand(Cost("a", "Q4_0", 100, 0.1, 0.1))
    found.elements["odd"], found.stored["odd"] = 10, ("F16", 32)
    best = quality.best_mix(found, 132)
    assert best.types == {"odd": "F16", "a": "Q4_0"} and best.bytes == 132
