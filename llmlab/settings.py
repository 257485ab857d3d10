"""What a fit depends on besides the model and the cards, checked once."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields

from .catalog import overheads
from .errors import LabError
from .formats.mixes import MIXES, find_mix
from .memory import cache_types, check_settings, checked_integer, default_quant, known_engine, weights
from .projectors import Projector, projector
from .shapes import ModelSpec, model_spec

MOST_VOCAB_APART = 128        # rows by which a draft's vocabulary may differ from its model's (llama.cpp)


@dataclass(frozen=True)
class Settings:
    """Settings that make sense together; `check` makes them. Names as in `llmlab.fit`."""

    quant: str
    context: int = 8192
    kv: tuple[str, str] = ("f16", "f16")
    engine: str = "llama.cpp"
    gpu_layers: int | str = "auto"
    n_cpu_moe: int | str = 0
    split: tuple[float, ...] | None = None
    sequences: int = 1
    batch: int = 2048
    ubatch: int = 512
    flash_attention: bool = True
    importance: bool = False
    swa_full: bool = False
    unified: bool = False
    display: str | bool | None = None
    utilization: float | None = None
    projector: Projector | None = None
    draft: ModelSpec | None = None
    draft_quant: str | None = None
    mtp: bool = False

    @property
    def micro(self) -> int:
        """Tokens of one graph: llama.cpp takes no ubatch larger than the batch."""
        return min(self.ubatch, self.batch)

    @property
    def share(self) -> float:
        """The share of a card that vLLM reserves: its gpu_memory_utilization."""
        return self.utilization or overheads()["vllm-util"].value


def check(spec: ModelSpec, given: Mapping) -> Settings:
    """Settings from what was asked, or LabError with one line that names what cannot be and the remedy."""
    unknown = set(given) - {field.name for field in fields(Settings)}
    if unknown:
        raise LabError(f"{sorted(unknown)[0]!r} is no setting; there are {', '.join(f.name for f in fields(Settings))}")
    check_settings(given["context"], given["sequences"], given["batch"], given["ubatch"])
    engine, count = known_engine(given["engine"]), len(spec.layers) + 1
    quant = default_quant(spec, given["quant"], engine)
    if quant != spec.stored:
        quant = find_mix(quant).name
    _belongs(MIXES[quant].engine if quant in MIXES else "llama.cpp", quant, engine)
    layers = given["gpu_layers"]
    if not isinstance(layers, str) or layers != "auto":
        layers = min(count, checked_integer("gpu_layers", layers, 0, 10**9,
                                            f"give 'auto' or a number from 0 to {count} (blocks, and the output)"))
    moe = given["n_cpu_moe"]
    if not isinstance(moe, str) or moe != "auto":
        moe = checked_integer("n_cpu_moe", moe, 0, 10**9,
                              f"give 'auto', or how many blocks keep their experts on the host, 0 to {count - 1}")
    split = _split(given["split"])
    beside = _beside(spec, given)
    _only_llama_cpp(engine, {"gpu_layers": layers != "auto", "n_cpu_moe": moe, "split": split, **beside})
    whole = {name: int(given[name]) for name in ("context", "sequences", "batch", "ubatch")}
    switches = {name: bool(given[name]) for name in ("flash_attention", "importance", "swa_full", "unified")}
    return Settings(quant=quant, kv=cache_types(given["kv"]), engine=engine, gpu_layers=layers, n_cpu_moe=moe, split=split,
                    display=_display(given.get("display")), utilization=_utilization(given.get("utilization"), engine),
                    **whole, **switches, **beside)


def _only_llama_cpp(engine: str, asked: Mapping) -> None:
    """Raise LabError where another engine is asked for what only llama.cpp has."""
    named = next((name for name, value in asked.items() if value), None)
    if engine != "llama.cpp" and named:
        remedy = "it loads a model whole; leave it out" if named in ("gpu_layers", "n_cpu_moe", "split") else "leave it out"
        raise LabError(f"{engine} has no {named} here: {remedy}, or engine='llama.cpp'")


def _beside(spec: ModelSpec, given: Mapping) -> dict:
    """What lies in memory beside the model: a projector, a draft model in its own quant, multi-token prediction."""
    found = {"projector": None, "draft": None, "draft_quant": None, "mtp": bool(given.get("mtp"))}
    if given.get("projector") is not None:
        found["projector"] = projector(given["projector"])
    if found["mtp"] and not any(layer.mtp for layer in spec.layers):
        raise LabError(f"{spec.name} has no multi-token-prediction blocks; leave mtp out, or draft with a smaller model")
    if given.get("draft") is None:
        if given.get("draft_quant") is not None:
            raise LabError("draft_quant is the quant of a draft model; name one with draft")
        return found
    draft = model_spec(given["draft"])
    if found["mtp"]:
        raise LabError("a draft model and multi-token prediction do the same; choose draft or mtp")
    if abs(draft.vocab - spec.vocab) > MOST_VOCAB_APART:
        raise LabError(f"{draft.name} has a vocabulary of {draft.vocab:,} and {spec.name} one of {spec.vocab:,}; "
                       "choose a draft of the same family")
    quant = default_quant(draft, given.get("draft_quant"))
    quant = quant if quant == draft.stored else find_mix(quant).name
    _belongs(MIXES[quant].engine if quant in MIXES else "llama.cpp", quant, "llama.cpp")
    return {**found, "draft": draft, "draft_quant": quant}


def _display(given) -> str | bool | None:
    """Whether a card also shows the desktop: None not known, False no, "linux" or "windows"; True: as on this computer."""
    if given is None or given is False:
        return given
    name = ("windows" if sys.platform == "win32" else "linux") if given is True else str(given).strip().lower()
    if name not in ("linux", "windows"):
        raise LabError(f"display is {str(given)[:40]!r}; give False, 'linux' or 'windows', or leave it out")
    return name


def _utilization(given, engine: str) -> float | None:
    """The share of a card that vLLM reserves."""
    if given is None:
        return None
    try:
        share = float(given)
    except (TypeError, ValueError, OverflowError):
        share = 0.0
    if isinstance(given, bool) or not 0 < share <= 1:
        raise LabError(f"utilization is {str(given)[:40]!r}; give the share of a card that vLLM may take, like 0.9")
    if engine != "vllm":
        raise LabError(f"utilization is vLLM's reservation; leave it out with {engine}, or engine='vllm'")
    return share


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
