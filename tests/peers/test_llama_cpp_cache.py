"""The bytes of KV cache and recurrent state are those that llama.cpp prints as it makes a context."""

import re
from contextlib import ExitStack

import pytest
from llama_engine import TYPES, context_log, llama_cpp, loaded
from tiny_gguf import write_tiny
from tiny_models import tiny_spec

from llmlab.errors import LabError
from llmlab.memory import cache_bytes
from llmlab.units import MIB

pytestmark = pytest.mark.peers

PRINTED = 0.0051 * MIB       # sizes are printed in MiB with two decimals
SHAPES = {                   # name: (tiny model, changes); few blocks, for caches may be long
    "llama": ("llama", {"num_hidden_layers": 4}),
    "llama-odd": ("llama", {"num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 96}),
    "llama-40": ("llama-odd-40", {"num_hidden_layers": 2}),
    "llama-4x40": ("llama", {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 40}),
    "phi3": ("phi3", {"num_hidden_layers": 3}),
    "gemma2": ("gemma2", {"num_hidden_layers": 7, "sliding_window": 1000}),
    "gemma3": ("gemma3", {"num_hidden_layers": 8, "sliding_window": 512}),
    "gemma3n": ("gemma3n", {}),
    "gemma4": ("gemma4", {}),
    "gemma4-uneven": ("gemma4-k-eq-v", {"num_key_value_heads": 4}),
    "gpt-oss": ("gpt-oss", {"num_hidden_layers": 6}),
    "llama4": ("llama4", {"num_hidden_layers": 8}),
    "cohere2": ("cohere2", {"num_hidden_layers": 8}),
    "olmo3": ("olmo3", {"num_hidden_layers": 8}),
    "step35": ("step35", {}),
    "deepseek3": ("deepseek3", {"num_hidden_layers": 5}),
    "glm4moe-mtp": ("glm4moe-mtp", {"num_hidden_layers": 4}),
    "qwen3next": ("qwen3next", {"num_hidden_layers": 8}),
    "qwen35": ("qwen35", {}),
    "qwen35moe": ("qwen35moe", {}),
    "granitehybrid": ("granitehybrid", {}),
    "nemotron_h": ("nemotron_h", {}),
    "nemotron_h_moe": ("nemotron_h_moe", {}),
    "lfm2": ("lfm2", {"hidden_size": 1024, "head_dim": 256}),
    "lfm2moe": ("lfm2moe", {}),
    "falcon-h1": ("falcon-h1", {}),
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {}),
}

SETTINGS = [  # model, context, then what differs from the defaults
    ("llama", 8192, {}),
    ("llama", 1, {}),
    ("llama", 257, {}),
    ("llama", 5000, {"kv": "q8_0"}),
    ("llama", 16384, {"kv": "q4_0"}),
    ("llama", 16384, {"kv": "q4_1"}),
    ("llama", 16384, {"kv": "q5_0"}),
    ("llama", 16384, {"kv": "q5_1"}),
    ("llama", 16384, {"kv": "iq4_nl"}),
    ("llama", 8192, {"kv": "bf16"}),
    ("llama", 8192, {"kv": "f32"}),
    ("llama", 12000, {"kv": ("q8_0", "q4_0")}),
    ("llama", 12000, {"kv": ("f16", "q5_1")}),
    ("llama", 12000, {"kv": ("q8_0", "f16"), "flash_attention": False}),
    ("llama", 8192, {"flash_attention": False}),
    ("llama", 8192, {"sequences": 4}),
    ("llama", 8192, {"sequences": 4, "unified": True}),
    ("llama", 1000, {"sequences": 3}),
    ("llama", 10001, {"sequences": 7}),
    ("llama-odd", 9999, {}),
    ("llama-odd", 9999, {"kv": "q5_1", "sequences": 2}),
    ("phi3", 8192, {}),
    ("gemma2", 16384, {}),
    ("gemma2", 16384, {"swa_full": True}),
    ("gemma2", 3000, {"ubatch": 128}),
    ("gemma2", 3000, {"sequences": 2, "ubatch": 256}),
    ("gemma2", 9000, {"sequences": 2, "unified": True}),
    ("gemma2", 700, {}),
    ("gemma3", 32768, {}),
    ("gemma3", 32768, {"ubatch": 128, "kv": "q8_0"}),
    ("gemma3", 32768, {"ubatch": 1}),
    ("gemma3", 32768, {"sequences": 4}),
    ("gemma3", 32768, {"sequences": 4, "unified": True, "kv": ("q4_0", "iq4_nl")}),
    ("gemma3", 5000, {"swa_full": True, "sequences": 2, "flash_attention": False}),
    ("gemma3n", 8192, {}),
    ("gemma3n", 8192, {"swa_full": True, "kv": "q8_0"}),
    ("gemma4", 8192, {}),
    ("gemma4", 8192, {"flash_attention": False}),
    ("gemma4", 8192, {"sequences": 2, "kv": "q8_0"}),
    ("gemma4-uneven", 8192, {}),
    ("gemma4-uneven", 8192, {"flash_attention": False}),
    ("gemma4-uneven", 8192, {"flash_attention": False, "swa_full": True, "kv": ("q8_0", "f32")}),
    ("gpt-oss", 16384, {}),
    ("gpt-oss", 16384, {"ubatch": 2048}),
    ("gpt-oss", 16384, {"sequences": 4, "unified": True}),
    ("llama4", 16384, {}),
    ("cohere2", 9000, {"sequences": 2}),
    ("olmo3", 9000, {}),
    ("step35", 9000, {}),
    ("deepseek3", 16384, {}),
    ("deepseek3", 16384, {"kv": "q8_0", "sequences": 2}),
    ("deepseek3", 16384, {"flash_attention": False}),
    ("glm4moe-mtp", 8192, {}),
    ("qwen3next", 8192, {"sequences": 2}),
    ("qwen35", 8192, {}),
    ("qwen35", 8192, {"sequences": 4, "kv": "q8_0"}),
    ("qwen35", 8192, {"sequences": 4, "unified": True}),
    ("qwen35moe", 4097, {"flash_attention": False}),
    ("granitehybrid", 8192, {}),
    ("granitehybrid", 8192, {"sequences": 4}),
    ("nemotron_h", 8192, {"sequences": 2}),
    ("nemotron_h_moe", 8192, {"flash_attention": False}),
    ("lfm2", 8192, {"sequences": 16}),
    ("lfm2moe", 8192, {"sequences": 8, "kv": "q4_0"}),
    ("falcon-h1", 8192, {"sequences": 4}),
    ("mamba", 8192, {"sequences": 16}),
    ("mamba2", 8192, {"sequences": 3}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (spec, llama_model), each made and loaded once."""
    folder = tmp_path_factory.mktemp("tiny")
    with ExitStack() as stack:
        made = {}

        def get(name: str):
            if name not in made:
                base, changes = SHAPES[name]
                spec = tiny_spec(base, **changes)
                write_tiny(spec, folder / f"{name}.gguf")
                made[name] = spec, stack.enter_context(loaded(folder / f"{name}.gguf"))
            return made[name]

        yield get


def engine_settings(context: int, kv="f16", sequences: int = 1, ubatch: int = 512, flash_attention: bool = True,
                    swa_full: bool = False, unified: bool = False) -> dict:
    """Our settings as llama_context_params; all of them said, for their defaults are not the command line's."""
    k, v = (kv, kv) if isinstance(kv, str) else kv
    return {"n_ctx": context, "n_batch": 2048, "n_ubatch": ubatch, "n_seq_max": sequences, "type_k": TYPES[k],
            "type_v": TYPES[v], "flash_attn_type": int(flash_attention), "swa_full": swa_full, "kv_unified": unified,
            "n_threads": 1}


def label(case) -> str:
    name, context, changes = case
    return "-".join([name, str(context), *(f"{k}={v if isinstance(v, str) else '+'.join(v) if isinstance(v, tuple) else v}"
                                            for k, v in changes.items())])


@pytest.mark.parametrize("case", SETTINGS, ids=label)
def test_cache_and_state_are_what_llama_cpp_prints(case, models):
    name, context, changes = case
    spec, model = models(name)
    told = context_log(model, **engine_settings(context, **changes))
    assert told is not None, "llama.cpp made no context"
    ours = cache_bytes(spec, context, changes.get("kv", "f16"), **{k: v for k, v in changes.items() if k != "kv"})
    check(told, ours)
    assert sum(told.kv_buffers) * MIB == pytest.approx(ours.kv, abs=2 * PRINTED)
    assert sum(told.recurrent_buffers) * MIB == pytest.approx(ours.recurrent, abs=PRINTED)


def check(told, ours) -> None:
    """One context's log against our CacheBytes. A wrong number of cells, layers, heads or bits is far beyond the rounding."""
    full = [line for line in told.caches if line.cells * line.streams == ours.cells] if told.caches else []
    assert len(told.caches) <= 2
    if len(told.caches) == 2:                             # full layers are printed first
        base, sliding = told.caches
        assert sliding.cells * sliding.streams == ours.cells_sliding
        assert sliding.total * MIB == pytest.approx(ours.sliding, abs=PRINTED)
        assert sliding.layers == sum(1 for one in ours.by_layer if one) - base.layers
    else:
        assert ours.sliding == 0
    if told.caches:
        base = told.caches[0]
        assert full and base.cells * base.streams == ours.cells
        assert base.total * MIB == pytest.approx(ours.full, abs=PRINTED)
        assert base.k + base.v == pytest.approx(base.total, abs=0.011)
    else:
        assert ours.kv == 0
    assert sum(total for total, _, _ in told.recurrent) * MIB == pytest.approx(ours.recurrent, abs=PRINTED)


@pytest.mark.parametrize("name,context,changes", [
    ("llama", 131072, {"sequences": 4}), ("llama-odd", 100001, {"kv": ("q5_0", "q4_1")}),
    ("gemma3", 131072, {"sequences": 8, "unified": True}), ("gpt-oss", 131072, {"kv": "q8_0"}),
    ("deepseek3", 131072, {"kv": "q4_0"}), ("qwen35", 262144, {"sequences": 64}), ("nemotron_h", 99999, {"sequences": 32}),
    ("gemma4-uneven", 131072, {"flash_attention": False})])
def test_long_contexts_without_allocating(name, context, changes, tmp_path):
    """llama.cpp plans a context without reserving it; at this length a byte more per cell and layer shows."""
    base, shape = SHAPES[name]
    spec = tiny_spec(base, **shape)
    write_tiny(spec, tmp_path / "tiny.gguf")
    with loaded(tmp_path / "tiny.gguf", no_alloc=True, load_mode=0) as model:
        told = context_log(model, **engine_settings(context, **changes))
    assert told is not None
    ours = cache_bytes(spec, context, changes.get("kv", "f16"), **{k: v for k, v in changes.items() if k != "kv"})
    assert ours.kv > 4 * MIB
    check(told, ours)


@pytest.mark.parametrize("name,changes", [
    ("llama", {"kv": ("f16", "q8_0"), "flash_attention": False}),
    ("llama", {"kv": "q4_0", "flash_attention": False}),
    ("gemma2", {"kv": "iq4_nl", "flash_attention": False}),
    ("llama-40", {"kv": "q8_0"}),
    ("llama-40", {"kv": ("f16", "q5_1")}),
    ("llama-40", {"kv": "f16"}),
    ("llama-4x40", {"kv": ("q8_0", "f16")}),
    ("llama-4x40", {"kv": ("q8_0", "f16"), "flash_attention": False}),      # whole rows divide, that is enough there
    ("deepseek3", {"kv": "q8_0", "flash_attention": False}),
    ("deepseek3", {"kv": ("q8_0", "f16")}),                                  # one tensor holds both
    ("qwen35", {"kv": "q8_0", "flash_attention": False}),
    ("mamba", {"kv": "q8_0", "flash_attention": False}),
    ("llama", {"kv": ("q8_0", "f32"), "flash_attention": False}),
])
def test_what_llama_cpp_refuses_we_refuse(name, changes, models):
    spec, model = models(name)
    theirs = context_log(model, **engine_settings(4096, **changes)) is not None
    try:
        cache_bytes(spec, 4096, changes["kv"], flash_attention=changes.get("flash_attention", True))
        ours = True
    except LabError as error:
        assert "\n" not in str(error)
        ours = False
    assert theirs == ours, f"llama.cpp {'makes' if theirs else 'refuses'} this cache"


def test_llama_cpp_rounds_the_context_as_we_do(models):
    """Cells are what llama_n_ctx says, for many contexts and sequence counts."""
    spec, model = models("llama")
    for context in (1, 256, 300, 513, 1023, 4095, 6000):
        for sequences in (1, 2, 3, 5):
            if sequences > context:
                continue
            for unified in (False, True):
                told = context_log(model, **engine_settings(context, sequences=sequences, unified=unified))
                cells = int(re.search(r"n_ctx\s+= (\d+)", told.text)[1])
                assert cells == cache_bytes(spec, context, sequences=sequences, unified=unified).cells, (
                    context, sequences, unified)


def test_more_than_two_dozen_settings():
    assert len({label(case) for case in SETTINGS}) == len(SETTINGS) >= 25
    assert llama_cpp.llama_context_default_params().swa_full        # the library's default, not the command line's
