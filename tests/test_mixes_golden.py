"""Types of every tensor of a dozen large models in 33 file types, as llama.cpp's own snapshots have them."""

import pytest
from golden_types import contract, differences, exceptions, expand, golden, spec_of

from llmlab.memory import mix_of

CELLS = 164_934


@pytest.mark.parametrize("name", golden()["models"])
def test_every_cell(name):
    model = golden()["models"][name]
    spec = spec_of(model)
    cells, wrong = 0, []
    for quant, coded in model["types"].items():
        count, lines = differences(spec, mix_of(spec, quant), coded["default"], exceptions(coded))
        cells += count
        wrong += [f"{quant}: {line}" for line in lines]
    assert not wrong, f"{len(wrong)} cells differ:\n" + "\n".join(wrong[:30])
    assert cells == model["cells"]


def test_golden_is_whole():
    models = golden()["models"]
    assert len(models) == 12
    assert all(len(model["types"]) == 33 for model in models.values())
    assert sum(model["cells"] for model in models.values()) == CELLS


def test_a_wrong_cell_is_noticed():
    model = golden()["models"]["qwen3-14b"]
    spec = spec_of(model)
    coded = model["types"]["Q4_K_M"]
    chosen = mix_of(spec, "Q4_K_M")
    chosen["blk.0.ffn_down.weight"] = "Q4_K"
    _, lines = differences(spec, chosen, coded["default"], exceptions(coded))
    assert lines == ["blk.0.ffn_down.weight is Q6_K, we say Q4_K"]


@pytest.mark.parametrize("blocks", [[0], [0, 1], [0, 2], [0, 1, 2, 5, 8, 11, 60], [3, 7, 11, 12, 13, 40, 41], list(range(80))])
def test_ranges_come_back(blocks):
    assert expand(contract(blocks)) == blocks
