"""Every model of the catalogue at its full size: llama-quantize's dry run names the same type for each tensor.

A dry run reads a header and no weights, so that a file with a hole in it will do.
"""

import os
import re
import zlib

import pytest
from llama_engine import importance_of, log, quantize
from test_llama_cpp_mix import QUANTS
from tiny_gguf import write_hollow

from llmlab.catalog import entries
from llmlab.errors import LabError
from llmlab.memory import mix_of, size_of, tensor_bytes
from llmlab.shapes import model_spec

pytestmark = [pytest.mark.peers, pytest.mark.slow]

SHARE = 12      # of all combinations, one in so many a model; LLMLAB_PEERS_ALL=1 for all
_LINE = re.compile(r"\]\s+(\S+)\s+- \[[^\]]*\], type =\s*(\w+), size = [^\n]*?(?:\((\w+)\))?\n")


def combinations(name: str) -> list[tuple[str, bool]]:
    every = [(quant, importance) for quant in QUANTS if quant != "F32" for importance in (False, True)]
    return [one for one in every if one == ("Q4_K_M", False) or os.environ.get("LLMLAB_PEERS_ALL")
            or zlib.crc32(f"{name}{one}".encode()) % SHARE == 0]


@pytest.mark.parametrize("name", entries())
def test_dry_run_at_full_size(name, tmp_path):
    spec = model_spec(name)
    source = tmp_path / "hollow.gguf"
    write_hollow(spec, source)
    matrix = importance_of(spec.tensors)
    for quant, importance in combinations(name):
        done = quantize(source, tmp_path / "none.gguf", quant, matrix if importance else None, dry_run=True)
        said = log()
        if not done:                       # a width that has no fallback
            with pytest.raises(LabError):
                mix_of(spec, quant, importance)
            continue
        theirs = {tensor: (new or old).upper() for tensor, old, new in _LINE.findall(said)}
        ours = mix_of(spec, quant, importance)
        assert theirs == ours, (quant, importance)
        size = size_of(spec, quant, importance)
        total = sum(tensor_bytes(theirs[t.name], t.shape) for t in spec.tensors)
        assert size.bits_per_weight == total * 8 / size.elements
        assert float(re.search(r"quant size\s+=\s+([\d.]+) MiB", said)[1]) == pytest.approx(total / 2**20, abs=0.0051)
        if not importance:
            assert size.needs_importance == ("will require an imatrix" in said), quant
