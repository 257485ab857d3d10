"""What each engine has to offer a panel: its quants, its cache types, and the settings that mean something to it."""

from ..errors import LabError
from ..formats.mixes import MIXES
from ..memory import CACHE_TYPES, size_of
from ..settings import LADDERS
from ..shapes import ModelSpec

ENGINES = tuple(LADDERS)
FLOATING = ("F32", "F16", "BF16")

CACHES = {
    "llama.cpp": (*(name for name in CACHE_TYPES if name != "fp8"), ("q8_0", "q4_0")),
    "transformers": ("f16", "bf16", "f32"),
    "vllm": ("f16", "bf16", "fp8"),
}

CONTROLS = {
    "llama.cpp": {"gpu_layers", "n_cpu_moe", "split", "batch", "ubatch", "flash_attention", "importance", "swa_full", "unified",
                  "projector", "draft", "draft_quant", "mtp"},
    "transformers": {"flash_attention"},
    "vllm": {"batch", "utilization"},
}
"""The settings beyond model, quant, context, KV cache, cards and sequences that change what an engine does."""


def quant_names(engine: str, stored: str | None) -> set[str]:
    """The quants an engine runs; under llama.cpp every mix there is, and a file's own."""
    if engine != "llama.cpp":
        return set(LADDERS[engine])
    return {name for name, mix in MIXES.items() if mix.engine == engine} | ({stored} - {None})


def nearest_quant(spec: ModelSpec, quant: str | None, engine: str) -> str | None:
    """What to run under `engine` instead of `quant`: None (its default) under llama.cpp, else the next in size."""
    if engine == "llama.cpp":
        return None
    def far(name: str) -> float:
        try:
            return abs(size_of(spec, name).tensor_bytes - size_of(spec, quant or spec.stored or "Q4_K_M").tensor_bytes)
        except LabError:
            return float("inf")
    return min(LADDERS[engine], key=far)


def suited(spec: ModelSpec, asked: dict, before: dict, usual: dict) -> dict:
    """`asked` after a change of engine: what only the engine before could do goes back to what is `usual`.

    A setting that was changed together with the engine stays: it was meant.
    """
    engine, changed = asked["engine"], dict(asked)
    if engine not in CONTROLS:
        return asked
    for name in set().union(*CONTROLS.values()) - CONTROLS[engine]:
        if name in asked and asked[name] == before[name]:
            changed[name] = usual[name]
    if asked["kv"] == before["kv"] and asked["kv"] not in CACHES[engine] and (engine != "llama.cpp" or "fp8" in asked["kv"]):
        changed["kv"] = usual["kv"]
    if asked["quant"] == before["quant"] and not _runs(engine, asked["quant"]):
        changed["quant"] = nearest_quant(spec, asked["quant"], engine)
    return changed


def _runs(engine: str, quant: str | None) -> bool:
    if engine == "llama.cpp":
        return quant is None or quant not in MIXES or MIXES[quant].engine == engine
    return quant in FLOATING or quant in LADDERS[engine]
