"""What an offloaded model is asked about first: each a button of the panel; and the lists that its widgets offer."""

from collections.abc import Callable
from dataclasses import dataclass

from ..catalog import links
from ..offload.ways import FASTER
from ..units import format_bytes
from .offload_larger import larger
from .offload_state import DEFAULTS, OffloadState
from .options import NOTHING, Options
from .quantization_state import path_of

MACHINES = ("8 GB DDR4-3200", "16 GB DDR4-3200", "32 GB DDR4-3200", "32 GB DDR5-6000", "64 GB DDR5-6000", "96 GB DDR5-6000",
            "128 GB DDR5-6000")
SLOTS = (1, 2, 3, 4, 6, 8)
HERE = {"card": None, "ram": None, "drive": None, "quant": None, "slots": None, "mode": "exact", "kv": "f16",
        "way": "gguf"}
SHARE = 0.4              # of what lies between the least and all of it, where a model is to be run here


@dataclass(frozen=True)
class Preset:
    """A button's words, and what it does to a state."""

    label: str
    why: str
    apply: Callable[[OffloadState], None]


def _there(label: str, why: str, **settings) -> Preset:
    return Preset(label, why, lambda state: state.update(**{**DEFAULTS, **settings}))


def _here(label: str, why: str, context: int, path: Callable[[], object]) -> Preset:
    def apply(state: OffloadState) -> None:
        state.update(**HERE, model=str(path()), context=context, gpu_budget=None, ram_budget=None)
        if not state.error:
            least, *_, most = state.look.device
            budget = least + int(SHARE * (most - least))
            state.update(gpu_budget=min(state.look.device, key=lambda size: abs(size - budget)), ram_budget=0)

    return Preset(label, why, apply)


PRESETS = (
    _there("70B on 24 GB", "Llama 3 70B in Q4_K_M on an RTX 4090, 16 GB of RAM, a Gen4 drive: all three tiers at work"),
    _there("in 16 bits", "the same as it was published, in F16", quant="F16"),
    _there("with 64 GB of RAM", "the same with RAM enough for all that does not fit the card", ram="64 GB DDR5-6000"),
    _there("8x22B, experts", "Mixtral 8x22B: a token needs two of eight experts a layer", model="mixtral-8x22b", quant="Q4_K_M",
           ram="64 GB DDR5-6000"),
    _there("30B-A3B on 12 GB", "Qwen3 30B-A3B on an RTX 3060 12GB with 16 GB of RAM: small experts", model="qwen3-30b-a3b",
           quant="Q4_K_M", card="rtx-3060-12gb"),
    _here("run here: SmolLM2", "the small real model on this computer's processor, its device a part of RAM that is too small",
          256, lambda: path_of(None)),
    _here("run here: 0.8B", "a larger model of random weights; about 500 MB are written to llmlab's cache the first time", 512,
          larger),
)


def drives(now: str | None) -> Options:
    """This machine's, classes of drives from slow to fast, those that are sold."""
    known = links()
    sold = sorted((one for one in known.values() if one.kind in ("nvme", "sata") and one.rate and one.id not in FASTER),
                  key=lambda one: one.name)
    offered = [("this machine's", NOTHING), *((_words(known[name]), name) for name in FASTER),
               *((_words(one), one.id) for one in sold)]
    short = {"gen4": "nvme-gen4-class", "gen3": "nvme-gen3-class", "gen5": "nvme-gen5-class", "sata": "sata3-class"}
    return [(label, now if value == short.get(now) else value) for label, value in offered]


def _words(link) -> str:
    return f"{link.name.partition(' (')[0]} · {link.rate / 1e9:.2g} GB/s"


def machines() -> Options:
    """This machine's RAM, and usual ones."""
    return [("this machine's", NOTHING), *((one, one) for one in MACHINES)]


def sizes(found) -> Options:
    """Budgets as a slider shows them."""
    return [(format_bytes(size), size) for size in found]


def slots() -> Options:
    return [("as many as is best", NOTHING), *((f"{n}" + (": nothing is read ahead" if n == 1 else ""), n) for n in SLOTS)]
