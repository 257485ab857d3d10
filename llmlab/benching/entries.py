"""Who can take part: llmlab's own ways to run a GGUF, and the peers; what each needs and whether it is here."""

from dataclasses import dataclass
from importlib.util import find_spec

from ..catalog import nearest
from ..errors import LabError, UnknownName
from ..units import GIB, format_bytes

PEERS = {  # name -> (the packages it needs, what it runs)
    "llama.cpp": (("llama_cpp",), "llama.cpp through llama-cpp-python, repacking weights as it does by itself"),
    "transformers": (("transformers", "gguf"), "transformers' own loading of the GGUF, all weights unpacked, in float32"),
    "nf4": (("bitsandbytes",), "bitsandbytes NF4, made of the unpacked weights"),
    "bf16": (("transformers",), "the unpacked weights in bfloat16"),
}
STRATEGIES = ("auto", "fast", "compact", "reference")
DTYPES = ("float32", "bfloat16", "float16")
USUAL = ("fast", "compact", "compiled", "modules")
QUICK = ("fast", "compact", "modules")
REFERENCE = "reference"                  # every matrix unpacked to float32 at each use, in transformers' own modules
_ALIASES = {"llama": "llama.cpp", "llamacpp": "llama.cpp", "llama-cpp": "llama.cpp", "hf": "transformers", "dense": "bf16",
            "bitsandbytes": "nf4"}
_SPARE = GIB // 2                        # left free for everything else


@dataclass(frozen=True)
class Entry:
    """One that takes part. `module` of this package runs it: "llama", "dense" or "lean"; the rest is what it is asked to do.

    `ours`: whether it is llmlab's. `way`: "decoder" (the lean one), "compiled", "modules" (`llmlab.load`), or the peer's name.
    """

    name: str
    module: str
    way: str
    strategy: str = ""
    dtype: str | None = None

    @property
    def ours(self) -> bool:
        return self.module == "lean"

    def job(self) -> dict:
        return {"name": self.name, "way": self.way, "strategy": self.strategy, "dtype": self.dtype}


def ours(names: tuple[str, ...]) -> list[Entry]:
    """Entries of strategies: [modules-|compiled-]STRATEGY[@DTYPE]; "modules" is modules-auto, "compiled" compiled-fast.
    Raises UnknownName."""
    return [_own(name) for name in dict.fromkeys(names)]


def _own(name: str) -> Entry:
    what, at, dtype = name.strip().lower().partition("@")
    way, _, strategy = what.rpartition("-")
    if what in ("modules", "compiled"):
        way, strategy = what, "auto" if what == "modules" else "fast"
    if way not in ("", "modules", "compiled") or strategy not in STRATEGIES:
        known = [*STRATEGIES, *(f"{way}-{one}" for way in ("compiled", "modules") for one in STRATEGIES), "compiled", "modules"]
        near = nearest(what, known)
        raise UnknownName(f"{name!r:.60} is no strategy; " + (f"did you mean {' or '.join(near)}? " if near else "")
                          + f"There are {', '.join(STRATEGIES)}, each also with modules- or compiled- before it and, such as "
                          "@float32, a dtype after it")
    if at and dtype not in DTYPES:
        raise UnknownName(f"{dtype!r:.40} is no dtype; there are {', '.join(DTYPES)}")
    return Entry(name.strip().lower(), "lean", way or "decoder", strategy, dtype or None)


def peers(names: tuple[str, ...]) -> list[Entry]:
    """Entries of peers. Raises UnknownName."""
    found = []
    for name in dict.fromkeys(_ALIASES.get(n.strip().lower(), n.strip().lower()) for n in names):
        if name not in PEERS:
            near = nearest(name, PEERS)
            raise UnknownName(f"{name!r:.60} is no peer; " + (f"did you mean {' or '.join(near)}? " if near else "")
                              + f"There are {', '.join(PEERS)}, and none for none of them")
        found.append(Entry(name, "llama" if name == "llama.cpp" else "dense", name))
    return found


def missing(entry: Entry) -> str | None:
    """Which package it lacks, in words; None where all are here."""
    if entry.ours:
        return None
    for package in PEERS[entry.way][0]:
        if not find_spec(package):
            install = {"llama_cpp": "llama-cpp-python (built from source: some minutes)"}.get(package, package)
            return f"{package} is not installed: pip install {install}"
    return None


def need(entry: Entry, file_bytes: int, weights: int) -> int:
    """Bytes it takes at the most while it loads, roughly: a file of `file_bytes` with `weights` numbers. What is mapped is not
    counted: the system can take it back."""
    if entry.way == "transformers":
        return 8 * weights                 # float32 numbers, and once more as they are placed
    if entry.way == "bf16":
        return 2 * weights
    if entry.way == "nf4":
        return weights                     # half a byte each, embedding and output two bytes
    if entry.strategy in ("compact", "reference"):
        return file_bytes // 4 if entry.way != "compiled" else file_bytes * 5 // 4
    return 2 * file_bytes                  # repacked, or codes of a byte


def room(entry: Entry, file_bytes: int, weights: int, free: int) -> str | None:
    """Why there is no room for it in `free` bytes; None where there is."""
    asked = need(entry, file_bytes, weights)
    if asked <= free - _SPARE:
        return None
    return f"it takes about {format_bytes(asked)} and {format_bytes(max(0, free))} are free"


def split(text: str | tuple | list | None, usual: tuple[str, ...], what: str) -> tuple[str, ...]:
    """Names from "a,b", a sequence, None (the usual ones) or "none". Raises LabError for an empty list."""
    if text is None:
        return usual
    names = tuple(n for n in (text.split(",") if isinstance(text, str) else text) if str(n).strip())
    if not names:
        raise LabError(f"{what} is empty; name some, such as {','.join(usual)}, or none")
    return () if [str(n).strip().lower() for n in names] == ["none"] else tuple(map(str, names))
