"""What a fit depends on besides the model and the cards, checked once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from .errors import LabError
from .formats.mixes import MIXES, find_mix
from .memory import cache_types, check_settings, checked_integer, default_quant, known_engine, weights
from .shapes import ModelSpec


@dataclass(frozen=True)
class Settings:
    """Settings that make sense together; `check` makes them. Names as in `llmlab.fit`."""

    quant: str
    context: int = 8192
    kv: tuple[str, str] = ("f16", "f16")
    engine: str = "llama.cpp"
    gpu_layers: int | str = "auto"
    n_cpu_moe: int = 0
    split: tuple[float, ...] | None = None
    sequences: int = 1
    batch: int = 2048
    ubatch: int = 512
    flash_attention: bool = True
    importance: bool = False
    swa_full: bool = False
    unified: bool = False

    @property
    def micro(self) -> int:
        """Tokens of one graph: llama.cpp takes no ubatch larger than the batch."""
        return min(self.ubatch, self.batch)


def check(spec: ModelSpec, given: Mapping) -> Settings:
    """Settings from what was asked, or LabError with one line that names what cannot be and the remedy."""
    unknown = set(given) - {field.name for field in fields(Settings)}
    if unknown:
        raise LabError(f"{sorted(unknown)[0]!r} is no setting; there are {', '.join(f.name for f in fields(Settings))}")
    check_settings(given["context"], given["sequences"], given["batch"], given["ubatch"])
    engine, count = known_engine(given["engine"]), len(spec.layers) + 1
    quant = default_quant(spec, given["quant"])
    if quant != spec.stored:
        quant = find_mix(quant).name
    _belongs(MIXES[quant].engine if quant in MIXES else "llama.cpp", quant, engine)
    layers = given["gpu_layers"]
    if not isinstance(layers, str) or layers != "auto":
        layers = min(count, checked_integer("gpu_layers", layers, 0, 10**9,
                                            f"give 'auto' or a number from 0 to {count} (blocks, and the output)"))
    moe = checked_integer("n_cpu_moe", given["n_cpu_moe"], 0, 10**9,
                          f"give how many blocks keep their experts on the host, 0 to {count - 1}")
    split = _split(given["split"])
    if engine != "llama.cpp" and (layers != "auto" or moe or split):
        named = "gpu_layers" if layers != "auto" else "n_cpu_moe" if moe else "split"
        raise LabError(f"{engine} has no {named}: it loads a model whole; leave it out, or engine='llama.cpp'")
    whole = {name: int(given[name]) for name in ("context", "sequences", "batch", "ubatch")}
    switches = {name: bool(given[name]) for name in ("flash_attention", "importance", "swa_full", "unified")}
    return Settings(quant=quant, kv=cache_types(given["kv"]), engine=engine, gpu_layers=layers, n_cpu_moe=moe, split=split,
                    **whole, **switches)


def _split(given) -> tuple[float, ...] | None:
    """Shares of several cards: (3, 1), or "3,1"."""
    if given is None:
        return None
    try:
        shares = tuple(float(part) for part in (given.split(",") if isinstance(given, str) else given))
    except (TypeError, ValueError, OverflowError):
        shares = ()
    if not shares or min(shares) < 0 or not all(map(math.isfinite, shares)) or not sum(shares):
        raise LabError(f"split is {given!r:.60}; give one share a card, like (3, 1)")
    return shares


def _belongs(made_for: str, quant: str, engine: str) -> None:
    floating = quant in ("F32", "F16", "BF16")
    if engine == "llama.cpp" and made_for != "llama.cpp":
        raise LabError(f"llama.cpp cannot run {quant}; choose Q4_K_M, or engine={made_for!r}")
    if engine == "transformers" and made_for != "transformers" and not floating:
        raise LabError(f"transformers unpacks {quant} to 16 bits; choose NF4, INT8 or BF16, or engine='llama.cpp'")
    if engine == "vllm" and made_for != "vllm" and not floating:
        raise LabError(f"vLLM does not run {quant} well; choose AWQ_INT4, FP8 or BF16, or engine='llama.cpp'")


LADDERS = {
    "llama.cpp": ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_L", "Q3_K_M", "IQ3_M",
                  "Q3_K_S", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
    "transformers": ("BF16", "INT8", "NF4", "NF4_DQ"),
    "vllm": ("BF16", "FP8", "GPTQ_INT4", "AWQ_INT4"),
}
"""From faithful to desperate, by engine: what best_quant() tries, in this order."""


def quants_to_try(spec: ModelSpec, quants: tuple[str, ...]) -> tuple[str, ...]:
    """The quants a model can sensibly have: all of them, or as a file is stored or was published, and what is smaller."""
    first = spec.stored or spec.published
    if first is None:
        return quants
    most = weights(spec, first, False).padded
    return first, *(q for q in quants if q != first and _padded(spec, q) < most)


def _padded(spec: ModelSpec, quant: str) -> float:
    try:
        return weights(spec, quant, False).padded
    except LabError:
        return math.inf


def ladder(quants) -> tuple[str, ...]:
    """The quants' own names, or LabError where one is none."""
    if isinstance(quants, str) or not hasattr(quants, "__iter__"):
        raise LabError(f"a ladder is a list of quants, like ('Q8_0', 'Q4_K_M'), not {quants!r:.40}")
    return tuple(find_mix(quant).name for quant in quants)
