"""What a panel's widgets offer, as (label, value) pairs: models, cards, quants by size, contexts, cache types."""

from functools import lru_cache

from .. import catalog
from ..errors import LabError
from ..formats.mixes import MIXES
from ..memory import CACHE_TYPES, size_of
from ..shapes import ModelSpec
from ..sources import local_models
from ..units import format_bytes, format_count
from .state import THIS_MACHINE

Options = list[tuple[str, object]]

CACHES: Options = [(name, name) for name in CACHE_TYPES if name != "fp8"] + [("K q8_0, V q4_0", ("q8_0", "q4_0"))]


def models() -> Options:
    """What lies on this computer, then the catalogue, a family together."""
    here = [(f"here: {m.name} · {format_bytes(m.bytes)}", str(m.path)) for m in local_models() if m.kind != "projector"]
    families = list(dict.fromkeys(e.family for e in catalog.entries().values()))
    listed = sorted(catalog.entries().values(), key=lambda e: families.index(e.family))
    return here + [(f"{e.name} · {format_count(e.params_total)}", e.id) for e in listed]


def cards() -> Options:
    """This machine, its RAM alone, then the catalogue."""
    rows = map(catalog.gpu, (row["id"] for row in catalog.gpus()))
    return [("this machine, as it is now", THIS_MACHINE), ("no card: this machine's RAM alone", None)] + [
        (f"{c.name} · {format_bytes(c.memory, 0)}" if not _says_memory(c) else c.name, c.id) for c in rows]


def _says_memory(card: catalog.Gpu) -> bool:
    return card.name.replace(" ", "").endswith(format_bytes(card.memory, 0).replace(" GiB", "GB"))


@lru_cache(maxsize=64)
def quants(spec: ModelSpec) -> tuple[tuple[str, str], ...]:
    """llama.cpp's quants that can hold the model, largest first; a GGUF's own is named."""
    names = {name for name, mix in MIXES.items() if mix.engine == "llama.cpp"} | ({spec.stored} - {None})
    sizes = []
    for name in names:
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
