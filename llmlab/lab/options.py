"""What a panel's widgets offer, as (label, value) pairs: models, cards, quants by size, contexts, cache types."""

from functools import lru_cache

from .. import catalog
from ..errors import LabError
from ..fitting import QUANT_LADDER
from ..levers import UTILIZATIONS
from ..memory import size_of
from ..shapes import ModelSpec
from ..sources import local_models
from ..units import format_bytes, format_count
from .engines import CACHES, quant_names
from .state import THIS_MACHINE

Options = list[tuple[str, object]]
NOTHING = ""      # stands for None: a list of ipywidgets shows an empty line for that, whatever its label


def models() -> Options:
    """What lies on this computer, then the catalogue, a family together."""
    here = [(f"here: {m.name} · {format_bytes(m.bytes)}", str(m.path)) for m in local_models() if m.kind != "projector"]
    families = list(dict.fromkeys(e.family for e in catalog.entries().values()))
    listed = sorted(catalog.entries().values(), key=lambda e: families.index(e.family))
    return here + [(f"{e.name} · {format_count(e.params_total)}", e.id) for e in listed]


def cards() -> Options:
    """This machine, its RAM alone, then the catalogue."""
    rows = map(catalog.gpu, (row["id"] for row in catalog.gpus()))
    return [("this machine, as it is now", THIS_MACHINE), ("no card: this machine's RAM alone", NOTHING)] + [
        (f"{c.name} · {format_bytes(c.memory, 0)}" if not _says_memory(c) else c.name, c.id) for c in rows]


def _says_memory(card: catalog.Gpu) -> bool:
    return card.name.replace(" ", "").endswith(format_bytes(card.memory, 0).replace(" GiB", "GB"))


def caches(engine: str) -> Options:
    """The KV cache types an engine has."""
    return [(name if isinstance(name, str) else "K {}, V {}".format(*name), name) for name in CACHES[engine]]


@lru_cache(maxsize=64)
def quants(spec: ModelSpec, engine: str = "llama.cpp") -> tuple[tuple[str, str], ...]:
    """The engine's quants that can hold the model, largest first; a GGUF's own is named."""
    sizes = []
    for name in quant_names(engine, spec.stored):
        try:
            sizes.append(size_of(spec, name))
        except LabError:
            continue
    sizes.sort(key=lambda s: (-s.tensor_bytes, s.quant))
    return tuple((" · ".join((s.quant, format_bytes(s.tensor_bytes), f"{s.bits_per_weight:.2f} bits",
                              *["as stored"] * (s.quant == spec.stored),
                              *["needs an importance matrix"] * s.needs_importance)), s.quant) for s in sizes)


def contexts(spec: ModelSpec, also: int) -> Options:
    """Powers of two and what lies halfway, from 512 to twice the context the model was trained for; and `also`."""
    trained = spec.context_train or 4096
    steps = {n for k in range(9, 32) for n in (2**k, 3 * 2 ** (k - 1)) if n <= 2 * trained}
    steps |= {512, trained, 2 * trained, also}
    return [(f"{n:,}", n) for n in sorted(steps)]


def matching(options: Options, text: str) -> Options:
    """Those whose label or value has every word of `text` in it."""
    words = text.casefold().split()
    return [(label, value) for label, value in options if all(word in f"{label} {value}".casefold() for word in words)]


def shares(split) -> str:
    """A split as one types it."""
    return ",".join(f"{share:g}" for share in split) if isinstance(split, (tuple, list)) else split or ""


def memory(size) -> str:
    """A size as one types it, or a name; "" for none given."""
    return "" if size is None else format_bytes(size) if isinstance(size, (int, float)) else str(size)


def utilizations() -> Options:
    """Shares of a card that vLLM may reserve; nothing given: its own."""
    return [("as vLLM does by itself", NOTHING), *((f"{share:.2f}", share) for share in UTILIZATIONS)]


@lru_cache(maxsize=64)
def drafts(spec: ModelSpec) -> tuple[tuple[str, str], ...]:
    """No draft, or a model of the catalogue with the same vocabulary and at most half the weights."""
    def vocab(entry) -> int:
        config = entry.config
        return config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 0

    fit = [e for e in catalog.entries().values() if 2 * e.params_total <= spec.params and abs(vocab(e) - spec.vocab) <= 128]
    return (("none", NOTHING), *((f"{e.name} · {format_count(e.params_total)}", e.id) for e in fit))


# ---- the map ------------------------------------------------------------------------------------------------

def families() -> Options:
    """All of the catalogue, or a family of it."""
    return [("all models", "all"), *named(dict.fromkeys(e.family for e in catalog.entries().values()))]


def map_contexts(also: int) -> Options:
    """Powers of two from 512 to 2^20, and `also`."""
    return [(f"{n:,}", n) for n in sorted({2**k for k in range(9, 21)} | {also})]


def floors() -> Options:
    """Steps of llama.cpp's ladder, any at all first."""
    return [(f"any quant, down to {QUANT_LADDER[-1]}", QUANT_LADDER[-1]),
            *((f"{quant} or better", quant) for quant in QUANT_LADDER[:-1])]


def named(names) -> Options:
    """Names that stand for themselves."""
    return [(name, name) for name in names]
