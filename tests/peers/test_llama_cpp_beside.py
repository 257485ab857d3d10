"""Multi-token prediction as llama.cpp loads it: the blocks' bytes, the drafting context's cache and buffer."""

import re

import pytest
from llama_engine import context_log, llama_cpp, loaded, log
from tiny_gguf import write_tiny
from tiny_models import tiny_spec

from llmlab.fitting import fit
from llmlab.gguf import read_gguf
from llmlab.memory import mtp_cache, weights
from llmlab.shapes import from_gguf
from llmlab.units import MIB

pytestmark = pytest.mark.peers

_MTP_CONTEXT = 1            # LLAMA_CONTEXT_TYPE_MTP


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("mtp") / "mtp.gguf"
    write_tiny(tiny_spec("glm4moe-mtp", vocab_size=8192, hidden_size=1024, num_attention_heads=16), path)
    return path


def mapped(path, **settings) -> float:
    """MiB of the file that llama.cpp maps as weights: from the first tensor it loads to the last."""
    log()
    params = llama_cpp.llama_model_default_params()
    for name, value in {"n_gpu_layers": 0, "use_extra_bufts": False, **settings}.items():
        setattr(params, name, value)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    said = log()
    assert model, said[-400:]
    llama_cpp.llama_model_free(model)
    return float(re.search(r"CPU_Mapped model buffer size =\s+([\d.]+) MiB", said)[1])


def test_the_blocks_are_loaded_where_asked(path):
    spec = from_gguf(read_gguf(path))
    w = weights(spec, spec.stored)                    # the block lies last in the file
    assert mapped(path, load_mtp=True) - mapped(path) == pytest.approx(w.by_layer[-1] / MIB, abs=0.015)
    with_, plain = (fit(spec, None, host="8 GiB", context=4096, mtp=m) for m in (True, False))
    assert with_.total("mtp") == w.by_layer[-1] + mtp_cache(spec, 4096) and plain.total("mtp") == 0
    assert with_.total("weights") == plain.total("weights")


@pytest.mark.parametrize("context", [512, 4096, 9000, 16384])
@pytest.mark.parametrize("outputs", [1, 0])
def test_the_drafting_context(context, outputs, path):
    spec = from_gguf(read_gguf(path))
    with loaded(path, load_mtp=True) as model:
        told = context_log(model, n_ctx=context, n_batch=2048, n_ubatch=512, ctx_type=_MTP_CONTEXT, swa_full=False,
                           n_outputs_max=outputs)
    assert round(mtp_cache(spec, context) / MIB, 2) == told.caches[0].total and told.caches[0].layers == 1
    term = next(t for t in fit(spec, None, host="8 GiB", context=context, mtp=True).terms if t.name == "draft_compute")
    printed = told.compute["CPU"] * MIB
    assert term.low <= printed <= term.high + 0.01 * MIB
    if outputs:
        assert 0.75 < term.bytes / printed < 1.3
