"""How fast things are: a card's memory and arithmetic, a processor's RAM, links and disks, as low, usual and high.

A band here never spans more than a factor of two: whatever is added up from such bands spans no more either. What was
measured on a machine takes the place of what its class usually does.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from .calibrated import Calibration
from .catalog import Gpu, links
from .errors import LabError
from .hardware import Machine

Band = tuple[float, float, float]


def banded(rate: float, shares: Band) -> Band:
    low, best, high = shares
    return rate * low, rate * best, rate * high


# ---- cards ----------------------------------------------------------------------------------------------------------

class Kind(NamedTuple):
    """What cards of one kind reach under llama.cpp's backend for them. Set by the rows of tests/golden/speeds.csv marked
    "fit"; the fast ends also by builds of late 2025, which start kernels about twice as fast as those of 2024. The other
    rows check."""

    stream: Band       # share of the memory's peak bandwidth at which weights are read
    launch: Band       # seconds from one kernel to the next: launch, drain, and work that is not reading
    unpack: Band       # share of the single-precision rate at which quantized weights are unpacked
    prefill: Band      # operations on a prompt's weights, over the single-precision rate


# CUDA with graphs, and without, as in 2024, at the low end. A prompt's matrices run on tensor cores, at up to twice the
# single-precision rate: unpacking the weights beside them is what bounds it, not the tensor cores.
CUDA = Kind((0.68, 0.87, 0.98), (2.2e-6, 1.6e-6, 1.1e-6), (0.70, 1.0, 1.4), (1.20, 1.70, 2.40))
# the same beside HBM: more bandwidth a multiprocessor than one row's kernels ask for, and tensor cores to spare
CUDA_HBM = CUDA._replace(stream=(0.48, 0.66, 0.95), prefill=(1.6, 2.2, 3.2))
# Vulkan or HIP: RDNA of 2022 and later
VULKAN = Kind((0.58, 0.78, 0.96), (4.4e-6, 3.1e-6, 2.2e-6), (0.70, 1.0, 1.4), (0.50, 0.70, 1.00))
METAL = Kind((0.60, 0.76, 0.92), (4.8e-6, 3.4e-6, 2.4e-6), (0.47, 0.67, 0.94), (0.45, 0.64, 0.90))
_KINDS = {"NVIDIA": CUDA, "AMD": VULKAN, "Intel": VULKAN, "Apple": METAL}

CACHE = (0.45, 0.65, 0.90)            # share of peak bandwidth at which flash attention reads a cache; and without it
CACHE_PLAIN = (0.26, 0.37, 0.52)
ATTEND = (0.40, 0.55, 0.80)           # operations of attention over a prompt, over the single-precision rate; and without
ATTEND_PLAIN = (0.22, 0.31, 0.44)
# Shares of a card's dense half-precision rate that plain half matrices of many rows reach under vLLM, and the attention of a
# prompt. From the rows of data/measured_serving.csv marked "fit": a card whose arithmetic is far ahead of its memory reaches
# less of it.
HALF = (0.46, 0.62, 0.84)
HALF_HOPPER = (0.27, 0.37, 0.50)
HALF_ATTEND = (0.13, 0.18, 0.25)
EIGHT_BITS = 1.5                      # times that with fp8 weights and activations, on cards that have fp8
FOUR_BITS = 0.92                      # and with 4-bit weights, which are unpacked to half precision
SPILL = (2.5e9, 3.6e9, 5.0e9)         # bytes per second from Windows' shared memory: less than pageable PCIe (6 in links.csv)
CROSS = (60e-6, 45e-6, 30e-6)         # seconds to hand one token's activations from card to host or back
USUAL_LINK = 12e9                     # bytes per second where a card's link is not in the catalogue (PCIe 3.0 x16)
PLAIN = 1.2                           # times `Kind.prefill` where nothing has to be unpacked
LINK = (0.55, 0.85, 1.05)             # of the card's link, as copies of pinned memory were measured, for weights sent over

# Unpacking a weight, in single-precision operations: masks, shifts, table look-ups, scales. Fitted as `Kind`, but for the
# order, which is that of the kernels' own inner loops.
UNPACK = {"F32": 4, "F16": 4, "BF16": 4, "Q8_0": 8, "Q4_0": 12, "Q4_1": 12, "Q5_0": 16, "Q5_1": 16, "MXFP4": 16, "NVFP4": 16,
          "IQ4_NL": 18, "IQ4_XS": 18, "Q2_K": 20, "Q3_K": 20, "Q4_K": 20, "Q5_K": 22, "Q6_K": 22, "IQ3_XXS": 25, "IQ3_S": 25,
          "IQ2_XXS": 25, "IQ2_XS": 25, "IQ2_S": 25, "IQ1_S": 25, "IQ1_M": 25, "TQ1_0": 16, "TQ2_0": 12}
USUAL_UNPACK = 20


def kind_of(card: Gpu) -> Kind:
    if card.vendor == "NVIDIA" and card.memory_type.startswith("HBM"):
        return CUDA_HBM
    return _KINDS.get(card.vendor, VULKAN)


def arithmetic(card: Gpu) -> float | None:
    """Instructions per second: single-precision operations; Volta, Turing and the chips with HBM issue integer work
    beside them."""
    if not card.fp32_flops:
        return card.fp16_flops
    beside = card.vendor == "NVIDIA" and (card.memory_type.startswith("HBM") or (card.capability or "").startswith("7."))
    return card.fp32_flops * (2 if beside else 1)


def halves(card: Gpu, quant: str) -> Band | None:
    """Operations per second of many rows times half-precision, fp8 or 4-bit weights, as vLLM reaches them; None where the
    card's rates are not known."""
    if not (plain := _half(card)):
        return None
    faster = EIGHT_BITS if quant == "FP8" and card.fp8 else FOUR_BITS if quant.endswith("INT4") else 1.0
    return banded(plain * faster, HALF_HOPPER if card.generation == "Hopper" else HALF)


def half_attention(card: Gpu) -> Band | None:
    """The same of attention over a prompt."""
    return banded(plain, HALF_ATTEND) if (plain := _half(card)) else None


def _half(card: Gpu) -> float:
    """Cards without tensor cores may be quicker in single precision, and are then used so."""
    return max(card.fp16_flops or 0.0, card.fp32_flops or 0.0)


# ---- hosts ----------------------------------------------------------------------------------------------------------

CHANNEL = 8                               # bytes wide
STREAM = (0.40, 0.57, 0.80)               # share of RAM's peak at which llama.cpp reads weights on the processor: public runs
                                          # reach 0.43 (a Ryzen 8840U) to 0.76 (a Threadripper 3970X)
MEASURED_STREAM = (0.65, 0.82, 1.0)       # of what all cores together were measured to stream
MEASURED_MATMUL = (0.35, 0.50, 0.70)      # of the fastest type's rate: quantized blocks, and all that is no matrix
CORE_MATMUL = (0.065e12, 0.09e12, 0.13e12)    # operations a second a core on a prompt: the same runs, 0.05 to 0.09e12
WIDE = 2.0                                # times that with AVX-512 or VNNI: 0.16 to 0.33e12 a core, measured on one machine
CORE_WEIGHTS = 2.3e10                     # weights a second a core unpacks while it reads: two cores, measured
SLOW_WEIGHTS = {"Q2_K": 0.8, "Q3_K": 0.8, "IQ4_XS": 0.8, "IQ4_NL": 0.9, "F16": 0.6, "BF16": 0.6, "F32": 0.3, "Q8_0": 0.7,
                "IQ3_XXS": 0.35, "IQ3_S": 0.35, "IQ2_XXS": 0.35, "IQ2_XS": 0.35, "IQ2_S": 0.35, "IQ1_S": 0.5, "IQ1_M": 0.5}
SINGLE = ("Q4_1", "Q5_1")                 # formats that llama.cpp has no tiled product of on a processor
CORE_BAND = (0.75, 1.0, 1.4)
MAPPED = (0.7e9, 1.0e9, 1.4e9)            # bytes per second of a file mapped and read in order, over and over
MAPPED_EXPERTS = (0.32e9, 0.45e9, 0.64e9)     # and of experts, here and there: page faults (data/links.csv, 0.445 measured)


@dataclass(frozen=True, slots=True)
class Rates:
    """What a host and, where they were measured, its cards deliver. Bytes or operations per second.

    `ram`: weights read by the processor; `matmul`: its arithmetic on a prompt. `peak`: what RAM could give at most, None
    where it is not known. `day`: of the calibration these come from, None where they are of a class.
    """

    ram: Band
    matmul: Band
    cores: int
    words: str
    peak: float | None = None
    day: str | None = None
    mapped: Band | None = None
    stream: tuple[Band | None, ...] = ()          # by card, as the next two
    link: tuple[Band | None, ...] = ()
    card_matmul: tuple[Band | None, ...] = ()

    def card(self, measured: str, index: int) -> Band | None:
        found = getattr(self, measured)
        return found[index] if index < len(found) else None


def _cpu_matmul(cores: int, wide: bool = False) -> Band:
    return banded(cores * (WIDE if wide else 1.0), CORE_MATMUL)


USUAL = Rates((25e9, 36e9, 50e9), _cpu_matmul(8), 8,
              "RAM not named, taken for a desktop's: two channels, DDR4-2666 to DDR5-5600")
"""A desktop of eight cores: DDR4-2666 to DDR5-5600 as `STREAM` reads them."""

_RAM = re.compile(r"(lp)?ddr([345])x?(?:[-\s]?(\d{3,6}))?", re.IGNORECASE)
_CHANNELS = re.compile(r"\b(single|dual|quad|six|eight|twelve|\d{1,2})(?:[- ]?(?:channels?|ch))?\b", re.IGNORECASE)
_CORES = re.compile(r"\b(\d{1,3})[- ]cores?\b", re.IGNORECASE)
_COUNTS = {"single": 1, "dual": 2, "quad": 4, "six": 6, "eight": 8, "twelve": 12}
_USUAL_SPEED = {"3": 1600, "4": 3200, "5": 5600}


@lru_cache(maxsize=256)
def ram_named(words: str) -> Rates | None:
    """The rates of a host in words: "DDR5-6000", "DDR4-3200 quad, 10 cores", "LPDDR5-6400", or an id of data/links.csv.
    None where the words name none. Raises LabError for a speed or channels there are none of."""
    cores, words = _CORES.search(words), _SIZE.sub("", words)
    if cores:
        known = ram_named(_CORES.sub("", words)) or USUAL
        if not (count := int(cores[1])):
            raise LabError(f"{words.strip()[:40]!r} is no host; a processor has at least one core")
        return replace(known, cores=count, matmul=_cpu_matmul(count))
    link = links().get(words.strip().lower())
    if link is not None and link.kind == "ram":
        peak = link.theoretical or link.rate / STREAM[1]
        return replace(USUAL, ram=_within(peak), peak=peak, words=link.name)
    found = _RAM.search(words)
    if not found:
        return None
    speed = int(found[3] or (6400 if found[1] and found[2] == "5" else _USUAL_SPEED[found[2]]))
    count = _CHANNELS.search(words[found.end():])
    channels = 2 if not count else _COUNTS.get(count[1].lower()) or int(count[1])
    if not 800 <= speed <= 12800 or not 1 <= channels <= 24:
        raise LabError(f"{words.strip()[:40]!r} is no RAM; say it like 'DDR5-6000', or 'DDR4-3200 quad' for four channels")
    name = f"{found[1] or ''}ddr{found[2]}-{speed}".upper()
    peak = speed * 1e6 * CHANNEL * channels
    plural = "s" if channels > 1 else ""
    return replace(USUAL, ram=_within(peak), peak=peak, words=f"{name}, {channels} channel{plural}")


MOST_WORDS = 100
_SIZE = re.compile(r"(?<![\w-])\d*\.?\d+\s*(?:[kmgt]i?b|[kmgt])\b", re.IGNORECASE)


def host_named(words: str) -> tuple[str | None, Rates | None]:
    """(how much RAM, which RAM) from "96 GB DDR5-4800", "DDR4-3200 quad", "64 GiB"; None for what is not said."""
    rates = ram_named(words) if len(words) <= MOST_WORDS else None
    if rates is None:
        return words, None
    size = _SIZE.search(words)
    return size and size[0], rates


def _within(peak: float) -> Band:
    return banded(peak, STREAM)


UNIFIED = (0.35, 0.50, 0.70)              # of a shared memory's bandwidth, what the processor alone draws


def beside(cards: tuple[Gpu, ...], rates: Rates) -> Rates:
    """The host's rates beside these cards: memory shared with a card is that card's memory."""
    shared = next((card for card in cards if card.unified), None)
    if shared is None or rates.day or rates.peak:
        return rates
    return replace(rates, ram=banded(shared.bandwidth, UNIFIED), peak=shared.bandwidth, words=f"memory of {shared.name}")


def of_machine(machine: Machine) -> Rates:
    """The rates of a computer: measured where it was calibrated, else of a class, by its cores."""
    wide = any(name.startswith(("avx512", "avx_vnni", "amx")) for name in machine.cpu.features)
    cores = max(1, min(machine.cpu.cores or machine.cpu.usable, machine.cpu.usable))
    plain = replace(USUAL, cores=cores, matmul=_cpu_matmul(cores, wide),
                    words="RAM of this machine not measured, taken for a desktop's: two channels, DDR4-2666 to DDR5-5600")
    found = machine.calibration
    return plain if found is None else _measured(plain, found, len(machine.cards))


def _measured(plain: Rates, c: Calibration, cards: int) -> Rates:
    changes: dict = {"day": c.day}
    if c.ram_read:
        changes |= {"ram": banded(c.ram_read.best, MEASURED_STREAM), "peak": c.ram_read.high, "words": "RAM as measured"}
    if c.matmul:
        # llama.cpp's kernels multiply in 8-bit integers, which torch does slowly on many processors: a class is the least
        rate = banded(max(rate.best for rate in c.matmul.values()), MEASURED_MATMUL)
        changes["matmul"] = max(rate, plain.matmul)
    mapped = [f for f in c.disk if f.method == "mmap" and f.cold]
    if mapped:
        changes["mapped"] = banded(max(f.rate.best for f in mapped), (0.75, 1.0, 1.4))
    bandwidth, copies = c.device_bandwidth, c.copies
    changes["stream"] = tuple(bandwidth.get(i) and banded(bandwidth[i].best, (0.82, 0.93, 1.0)) for i in range(cards))
    changes["link"] = tuple(copies.get((i, "h2d_pinned")) and banded(copies[i, "h2d_pinned"].best, LINK) for i in range(cards))
    if c.busy:                  # other programs had their share of it: no less than machines of its class give
        changes |= {name: tuple(map(max, changes[name], getattr(plain, name))) for name in ("ram", "matmul") if name in changes}
        changes |= {"peak": None, "words": "RAM as measured while the machine was busy, and no less than a usual desktop's "
                                           "(measure again when it is idle)"}
    return replace(plain, **changes)
