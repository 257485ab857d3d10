"""The golden types are those of llama.cpp's own snapshots, and ours are too, cell by cell."""

import os

import pytest
from llama_snapshots import VERSION, NotBrought, download, encode, golden, snapshots, spec_of

from llmlab.memory import mix_of

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    try:
        return snapshots(download(tmp_path_factory.mktemp("sdist")))
    except NotBrought as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


def test_golden_is_what_llama_cpp_ships(real):
    assert VERSION in golden()["source"]
    assert {name: encode(sections) for name, sections in real.items()} == {
        name: model["types"] for name, model in golden()["models"].items()}


def test_every_cell(real):
    """Without the golden form between."""
    from golden_types import differences
    cells = 0
    for name, sections in real.items():
        spec = spec_of(golden()["models"][name])
        for quant, (default, other) in sections.items():
            count, lines = differences(spec, mix_of(spec, quant), default, other)
            assert not lines, f"{name} {quant}: {len(lines)} differ: {lines[:10]}"
            cells += count
    assert cells == sum(model["cells"] for model in golden()["models"].values())
