"""What a card loses to everything that is not the model: driver, context, libraries, several cards' messages, a desktop.

Each part has an interval and a reason, from the rows of data/overheads.csv; a context that was measured on this computer
takes the place of the modelled one.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .catalog import Gpu, Overhead, gpu, overheads
from .memory import Term, modelled
from .units import MIB

_KERNELS = 100 * MIB          # kernels that are loaded as they are first used: what separates rows of one card
_POOL = (0, 16 * MIB, 64 * MIB)          # llama.cpp's own pool: a prompt's activations in 8 bits, and cuBLAS's workspace
_OTHER_CONTEXT = {"AMD": (100 * MIB, 400 * MIB, 900 * MIB, "HIP context (one card measured, 783 MiB; Vulkan's is smaller)"),
                  "Apple": (16 * MIB, 100 * MIB, 512 * MIB, "Metal's own buffers (nobody measured them)")}
_NCCL = (150 * MIB, 230 * MIB, 740 * MIB)       # row nccl-1rank-3090 less the context it includes
_DESKTOP_KINDS = ("desktop", "laptop")


@dataclass(frozen=True, slots=True)
class Part:
    """One use of a card's memory beside the model, bytes."""

    name: str
    low: int
    best: int
    high: int
    measured: bool = False
    inside: bool = False          # of what vLLM reserves for itself; the rest must fit beside it
    hidden: bool = False          # not in the memory that CUDA shows

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.name} {_mib(self.best)}"
        return f"{self.name} {_mib(self.best)} ({self.low / MIB:.0f} to {self.high / MIB:.0f})"


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB"


class Measured(NamedTuple):
    """What a calibration found on a card, in bytes: the context with its kernels, and cuBLAS's workspace (None: not known)."""

    context: int
    workspace: int | None = None


def overhead_term(card: Gpu, device: str, engine: str = "llama.cpp", cards: int = 1, display: str | bool | None = None,
                  measured: Measured | None = None) -> Term:
    """The sum of `parts` as one term; its `why` lists them."""
    name, bytes, kind, low, high, why = _sum(card, engine, cards, display, measured)
    return Term(name, device, bytes, kind, low, high, why)


@lru_cache(maxsize=2048)
def _sum(card: Gpu, engine: str, cards: int, display: str | bool | None, measured: Measured | None) -> tuple:
    found = parts(card, engine, cards, display, measured)
    low, best, high = (sum(getattr(p, what) for p in found) for what in ("low", "best", "high"))
    term = modelled("overhead", "", best, low, high, ", ".join(map(str, found)))
    kind = "measured" if found and all(p.measured or not p.best for p in found) else "modelled"
    return term.name, term.bytes, kind, term.low, term.high, term.why


@lru_cache(maxsize=2048)
def parts(card: Gpu, engine: str = "llama.cpp", cards: int = 1, display: str | bool | None = None,
          measured: Measured | None = None) -> tuple[Part, ...]:
    """What a card loses beside the model.

    `cards`: how many work together. `display`: what shows its picture through this card: None not known, False nothing,
    "linux" or "windows" a desktop of that system. `measured`: what this computer's calibration found. A live card's
    free memory already leaves out what the driver keeps and what other programs use.
    """
    found = [_context(card, measured), *_libraries(card, engine, cards, measured)]
    if card.free is None:
        found += [_kept(card, display), *([shown] if (shown := desktop(card, display)) else [])]
    return tuple(p for p in found if p.high)


def _context(card: Gpu, measured: Measured | None) -> Part:
    """Driver context and kernels: measured here, else a row about the card, the nearest of its generation, the range."""
    if measured is not None:
        return Part("context measured on this computer", *[measured.context] * 3, True)
    if card.vendor in _OTHER_CONTEXT and not (rows := _about(card)):
        low, best, high, name = _OTHER_CONTEXT[card.vendor]
        return Part(name, low, best, high)
    span = overheads()["ctx-bare-range"]
    rows = _about(card)
    if rows:
        best = max(int(row.value) for row in rows)
        return Part("context, measured on such a card,", min(int(row.low) for row in rows), best, best + _KERNELS)
    like = _nearest(card)
    if like is None:
        return Part("context, the range of cards measured,", int(span.low), int(span.value), int(span.high))
    row, other = like
    best = int(row.value)
    return Part(f"context, as on a {other.name},", min(int(span.low), best), best, max(int(span.high), best + _KERNELS))


def _about(card: Gpu) -> list[Overhead]:
    return [row for row in overheads().values() if row.category == "cuda-context" and card.id in row.cards]


def _nearest(card: Gpu) -> tuple[Overhead, Gpu] | None:
    """The measured card of the same generation whose rate is nearest: a context grows with the multiprocessors."""
    found = [(row, gpu(id)) for row in overheads().values() if row.category == "cuda-context" for id in row.cards]
    found = [(row, other) for row, other in found if other.generation == card.generation and other.fp32_flops]
    if not found or not card.fp32_flops or card.vendor != "NVIDIA":
        return None
    return min(found, key=lambda pair: (abs(pair[1].fp32_flops - card.fp32_flops), -pair[0].value))


def _libraries(card: Gpu, engine: str, cards: int, measured: Measured | None) -> list[Part]:
    """Workspaces of the matrix libraries, what an allocator rounds up, and the buffers of cards that talk.

    A measured context was taken with a first multiplication: what a prompt takes beyond that is in the high end."""
    if engine == "llama.cpp":
        low, best, high = (0, 0, _POOL[2]) if measured else _POOL
        return [Part("llama.cpp's pool", low, best, high)] if card.vendor in ("NVIDIA", "AMD") else []
    found = [_workspace(card, measured), Part("torch's segments of 2 and 20 MiB", 2 * MIB, 22 * MIB, 64 * MIB, inside=True)]
    if engine == "vllm":
        row = overheads()["vllm-nontorch-new"]
        found.append(Part("kernels vLLM loads", int(row.low), int(row.value), int(row.high), inside=True))
        if cards > 1:
            found.append(Part("NCCL's buffers", *_NCCL))
    return found


def _workspace(card: Gpu, measured: Measured | None) -> Part:
    rows = overheads()
    if measured and measured.workspace is not None:
        return Part("cuBLAS workspace measured on this computer", *[measured.workspace] * 3, True, inside=True)
    if card.vendor == "AMD":
        blas, lt = rows["hipblas-ws"], rows["hipblaslt-ws"]
        return Part("hipBLAS workspaces", int(blas.low), int(blas.value + lt.value), int(blas.high + lt.value),
                    inside=True)
    row = rows[{"Hopper": "cublas-ws-hopper", "Blackwell": "cublas-ws-blackwell"}.get(card.generation, "cublas-ws-default")]
    lt = rows["cublaslt-ws"]
    return Part("cuBLAS workspaces", int(row.low), int(row.value + lt.value), int(row.high + lt.high), inside=True)


def _kept(card: Gpu, display: str | bool | None) -> Part:
    """What the driver or the system keeps. Under Windows torch and llama.cpp see all of a card; the desktop uses it."""
    if display == "windows" and card.vendor == "NVIDIA" and not card.unified:
        return Part("kept by the driver", 0, 0, 0, hidden=True)
    what = "beyond what the system lets a model have" if card.unified else "kept by the driver"
    return Part(what, *card.reserved, hidden=True)


def desktop(card: Gpu, display: str | bool | None) -> Part | None:
    """What a desktop takes of a card of the catalogue; None where that is no question.

    Where it is not known whether there is one, from nothing to a usual one.
    """
    if card.unified or card.free is not None or (display is None and card.kind not in _DESKTOP_KINDS):
        return None
    if display is None:
        return Part("a desktop on the same card", 0, 0, int(overheads()["disp-linux-desktop"].value))
    row = overheads()[{False: "disp-linux-headless"}.get(display, f"disp-{display}-desktop")]
    name = "no desktop" if display is False else f"a {display.capitalize()} desktop on the same card"
    return Part(name, int(row.low), int(row.value), int(row.high))
