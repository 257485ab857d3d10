"""The facts in data/, by name: models, cards, links, overheads; a misspelt name is answered with the nearest ones.

Everything is read on first use and kept; importing this module reads nothing.
"""

import csv
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

from .errors import LabError, UnknownName
from .places import folder
from .units import GB, GIB, MIB, format_bytes, format_count, format_rate

_LONGEST_NAME = 200  # characters of a name that are looked at: difflib is quadratic, and messages stay one line


@dataclass(frozen=True)
class Link:
    """A way bytes travel: PCIe, a disk, RAM, a network. Rates in bytes per second, None where not known; `round_trip` of a
    network: seconds of a small message and its answer, None where not known."""

    id: str
    kind: str  # "pcie" | "nvme" | "sata" | "ram" | "network"
    name: str
    theoretical: float | None
    measured: float | None
    estimated: float | None  # scaled or recalled, nobody measured it
    how: str
    source: str
    round_trip: float | None = None

    @property
    def rate(self) -> float | None:
        """The best knowledge there is: measured, else estimated, else theoretical (which nothing reaches)."""
        return self.measured or self.estimated or self.theoretical


@dataclass(frozen=True)
class Overhead:
    """A constant somebody measured, derived or read: `value` and its range in bytes where `unit` is "bytes"."""

    id: str
    category: str
    name: str
    scope: str
    value: float
    low: float
    high: float
    unit: str  # "bytes" | "fraction" | "x"
    basis: str  # "measured" | "derived" | "constant" | "unverified"
    conditions: str
    source: str
    note: str
    cards: tuple[str, ...] = ()  # ids in gpus.csv this row is about; empty: not about single cards


@dataclass(frozen=True)
class Quality:
    """How far a model's answers drift: perplexity (None where not published) and mean KL divergence. Of Llama 3 8B on the
    wikitext-2 test, or of SmolLM2 135M as `measured_quality` says.

    `what` is a quant, one of a longer search ("Q4_K_M high": effort="high"), "mix at Q4_K_M", or the cache types "q8_0/q4_0" of
    K and V. Figures compare within one table only; None where nothing was published.
    """

    what: str
    importance: bool  # quantized with an importance matrix
    perplexity: float | None
    mean_kld: float
    source: str
    note: str
    bits: float | None  # a weight; or a cached value, K and V averaged
    bytes: int | None  # of the file, published to 0.01 GiB; None for a cache
    rms_dp: float | None  # root mean square change of the right token's probability, as a share
    loss: float | None  # perplexity over that of the table's f16, less 1: 0.028 is 2.8 % worse
    error: float | None = None  # of mean_kld, one standard error
    p99_kld: float | None = None  # of a hundred tokens one drifts further
    tokens_per_second: float | None = None  # written one at a time by the lean decoder, uncompiled
    timed: str = ""  # where and when: processor, threads, date
    by_depth: tuple[tuple[int, float], ...] = ()  # of a cache: (position a token stands before, mean_kld from the last such on)


@dataclass(frozen=True)
class Score:
    """A published score. Compare only within one `setting` and `source`."""

    model: str  # an id of the catalogue, or of a model that is not in it
    benchmark: str
    score: float
    setting: str
    source: str


@dataclass(frozen=True)
class Gpu:
    """A card (or a chip with shared memory). Bytes, bytes per second, operations per second, watts, dollars."""

    id: str
    name: str
    vendor: str
    generation: str
    kind: str  # "desktop" | "laptop" | "workstation" | "datacenter" | "igpu" | "apple"
    year: int
    memory: int  # as sold; see `reserved` for what programs do not get of it
    memory_type: str
    bus_bits: int
    bandwidth: float
    bandwidth_measured: float | None = None
    fp16_flops: float | None = None  # dense, fp32 accumulate
    fp32_flops: float | None = None
    int8_ops: float | None = None  # dense
    fp8: bool = False
    bf16: bool = False
    capability: str | None = None  # CUDA compute capability
    pcie_gen: int | None = None
    pcie_lanes: int | None = None
    tdp_w: float | None = None
    launch_usd: float | None = None
    unified: bool = False  # shares its memory with the CPU
    source: str = ""
    note: str = ""
    free: int | None = None  # bytes free now: a live card only

    @property
    def reserved(self) -> tuple[int, int, int]:
        """Bytes of `memory` no program gets (low, best, high): ECC, the driver's framebuffer, a unified-memory limit.

        From the rows of overheads.csv about this card, else from the rule that fits the rows of its class.
        """
        return _reserved(self)

    @property
    def link(self) -> Link | None:
        """The PCIe slot the card can fill, None where it has none or it is not known."""
        return links().get(f"pcie{self.pcie_gen}-x{self.pcie_lanes}")


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue. Parameters count elements of the text decoder, a tied embedding once."""

    id: str
    name: str
    hub_id: str
    family: str
    architecture: str  # llama.cpp's name
    params_total: int
    params_active: int  # touched per generated token
    params_embedding: int
    params_head: int  # 0 where tied
    params_experts: int  # all routed experts
    params_mtp: int  # multi-token-prediction block, not in the total
    release: str  # "2024-04"
    license: str
    languages: str
    strengths: tuple[str, ...]
    config: dict = field(hash=False)  # Hugging Face field names; data/README.md names the others
    aliases: tuple[str, ...]
    published: dict | None = field(hash=False)  # params, includes, diff, source: the count the publisher shows
    kv_bytes_per_token_f16: int  # in layers whose cache grows with the context; window not applied
    source: str
    verified: str  # "file-size" | "params-count" | "read-only"
    note: str = ""
    gguf_elements: int | None = None  # of the published GGUF files, where counted
    gguf_extra: str | None = None  # what they hold beside the config's tensors
    gguf_separate_output: bool = False  # the publisher's GGUF files hold an output matrix although the config ties it
    gguf_vocab_size: int | None = None  # rows in GGUF files, where the config says another number


# -- names ----------------------------------------------------------------------------------------------------------


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The `count` of `names` most like `name`, best first: those that begin with it, then by likeness (difflib)."""
    key, known = _key(str(name)[:_LONGEST_NAME]), {}
    for each in names:
        known.setdefault(_key(each), each)
    if not key:
        return []
    begins = sorted((k for k in known if k.startswith(key)), key=len)[:count]
    alike = difflib.get_close_matches(key, known, n=count, cutoff=0.5)
    return [known[k] for k in dict.fromkeys(begins + alike)][:count]


def unknown(kind: str, name: object, names: Iterable[str], listing: str) -> UnknownName:
    """The error for a name that is not known: one line, with the nearest names, or where all of them are listed."""
    if not isinstance(name, str) or not name.strip():
        return UnknownName(f"{_short(name)} is not a {kind} name; {listing} lists them")
    close = nearest(name, names)
    if not close:
        return UnknownName(f"no {kind} called {_short(name)}; {listing} lists them")
    return UnknownName(f"no {kind} called {_short(name)}; did you mean {_or(close)}?")


def _short(name: object) -> str:
    text = repr(name[:_LONGEST_NAME]) if isinstance(name, (str, bytes)) else f"{name!r:.100}"
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:56] + "..."


def _or(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _key(name: str) -> str:
    """Case and punctuation gone, but for one point between two digits: "Llama 3-8B" and "llama3:8b" are "llama3.8b"."""
    parts = re.findall(r"[a-z0-9]+", name.casefold())
    key = parts[0] if parts else ""
    for part in parts[1:]:
        key += "." + part if key[-1].isdigit() and part[0].isdigit() else part
    return key


# -- models ---------------------------------------------------------------------------------------------------------


@cache
def entries() -> dict[str, Entry]:
    """Every model, by id."""
    with open(folder("data") / "models.json", encoding="utf-8") as file:
        return {row["id"]: _entry(row) for row in json.load(file)}


def _entry(row: dict) -> Entry:
    counts = row["params"]
    return Entry(
        **{name: row[name] for name in ("id", "name", "hub_id", "family", "architecture", "release", "license",
                                        "languages", "config", "published", "kv_bytes_per_token_f16", "source",
                                        "verified")},
        **{name: row[name] for name in ("note", "gguf_elements", "gguf_extra", "gguf_separate_output",
                                        "gguf_vocab_size") if name in row},
        **{f"params_{name}": counts[name] for name in ("total", "active", "embedding", "head", "experts")},
        params_mtp=counts.get("mtp", 0), strengths=tuple(row["strengths"]), aliases=tuple(row["aliases"]))


@cache
def _model_keys() -> dict[str, Entry]:
    keys: dict[str, Entry] = {}
    for each in entries().values():
        for name in (each.id, each.name, each.hub_id, each.hub_id.split("/")[-1], *each.aliases):
            keys.setdefault(_key(name), each)
    return keys


def entry(name: str) -> Entry:
    """A model by id, name, alias or hub id; case, punctuation and a trailing "-instruct" are forgiven.

    Raises UnknownName with the nearest ids.
    """
    if isinstance(name, str) and len(name) <= _LONGEST_NAME and (key := _key(name)):
        for form in (key, re.sub(r"(instruct|chat|it|hf)$", "", key)):
            if form in _model_keys():
                return _model_keys()[form]
    raise unknown("model", name, entries(), "llmlab.models()")


# -- cards ----------------------------------------------------------------------------------------------------------

_MAKERS = {"nvidia", "geforce", "amd", "radeon", "intel", "arc", "rtx", "gtx", "rx", "tesla", "quadro", "instinct",
           "apple"}
_ENDINGS = {"gpu", "graphics", "generation"}


def _rows(name: str) -> list[dict]:
    with open(folder("data") / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _number(text: str, scale: float = 1) -> float | None:
    return float(text) * scale if text else None


def _whole(text: str) -> int | None:
    return int(text) if text else None


@cache
def _cards() -> dict[str, Gpu]:
    return {row["id"]: _card(row) for row in _rows("gpus.csv")}


def _card(row: dict) -> Gpu:
    return Gpu(
        **{name: row[name] for name in ("id", "name", "vendor", "generation", "kind", "source", "note")},
        year=int(row["year"]), memory=int(float(row["vram_gib"]) * GIB), memory_type=row["vram_type"],
        bus_bits=int(row["bus_bits"]), bandwidth=float(row["bandwidth_gbs"]) * GB,
        bandwidth_measured=_number(row["bw_measured_gbs"], GB), fp16_flops=_number(row["fp16_tflops"], 1e12),
        fp32_flops=_number(row["fp32_tflops"], 1e12), int8_ops=_number(row["int8_tops"], 1e12),
        fp8=row["fp8"] == "yes", bf16=row["bf16"] == "yes", capability=row["cuda_capability"] or None,
        pcie_gen=_whole(row["pcie_gen"]), pcie_lanes=_whole(row["pcie_lanes"]), tdp_w=_number(row["tdp_w"]),
        launch_usd=_number(row["launch_usd"]), unified=row["unified_memory"] == "yes")


def _words(name: str) -> list[str]:
    apart = re.sub(r"\b(rtx|gtx|rx)(?=\d)", r"\1 ", name.casefold())  # "rtx4090"
    return re.findall(r"[a-z0-9.]+", apart)


def _bare(name: str) -> list[str]:
    """The words of a card's name without makers, series and the like: "NVIDIA GeForce RTX 4090" is ["4090"]."""
    words = _words(name)
    while len(words) > 1 and words[0] in _MAKERS:
        words = words[1:]
    while len(words) > 1 and words[-1] in _ENDINGS:
        words = words[:-1]
    return words


def _of_maker(card: Gpu, words: list[str]) -> bool:
    """Whether the makers and series among `words` are this card's: no RTX 9070, no GTX 4090."""
    return _MAKERS.intersection(words) <= {*_words(card.id), *_words(card.name), card.vendor.casefold()}


@cache
def _card_keys() -> dict[str, list[Gpu]]:
    """Every way to say a card -> the cards it may mean; memory or core count may be left out where one is left."""
    keys: dict[str, list[Gpu]] = {}
    for row, card in zip(_rows("gpus.csv"), _cards().values(), strict=True):
        words = _bare(card.id)
        short = [w for w in words if not re.fullmatch(r"\d+(gb|c)", w)]
        named = [w for w in _bare(card.name) if not re.fullmatch(r"\d+gb", w)]
        for form in (card.id, card.name, *filter(None, row["aliases"].split("|")), " ".join(words), " ".join(short),
                     " ".join(named)):
            cards = keys.setdefault(_key(form), [])
            if card not in cards:
                cards.append(card)
    return keys


def gpu(name: "str | Gpu") -> Gpu:
    """A card by id, by its name or by what its driver calls it ("4090", "RTX 3060 12GB", "NVIDIA GeForce RTX 4090").

    Raises UnknownName with the nearest ids, or with the variants where the name fits several cards.
    """
    if isinstance(name, Gpu):
        return name
    if isinstance(name, str) and len(name) <= _LONGEST_NAME and (words := _bare(name)):
        keys = _card_keys()
        cards = keys.get(_key(name)) or keys.get(_key(" ".join(words)))
        if not cards:  # "a100" begins a100-pcie-40gb and others, word by word
            cards = [c for c in _cards().values() if _bare(c.id)[:len(words)] == words]
        cards = [c for c in cards if _of_maker(c, _words(name))]
        if len(cards) == 1:
            return cards[0]
        if cards:
            more = f" and {len(cards) - 8} more" if len(cards) > 8 else ""
            variants = ", ".join(c.id for c in cards[:8])
            raise UnknownName(f"{name.strip()} comes as {variants}{more}: say which")
    raise unknown("card", name, _cards(), "llmlab.gpus()")


# What a class of cards keeps back where no row of overheads.csv is about the card; tests hold these to the rows.
_ECC = 1 / 16  # of GDDR on data-centre boards, where ECC is on as shipped: T4, A10, L4, L40S all show 15/16
_NVIDIA_FRAMEBUFFER = (210 * MIB, 390 * MIB, 560 * MIB)  # drivers of 2021; of 2025; and, per GiB of memory, in 2025:
_NVIDIA_PER_GIB = 2 * MIB
_OTHER_FRAMEBUFFER = (0, 64 * MIB, 128 * MIB)  # RX 7900 XTX 59 MiB, Arc A750 64 MiB
_UNIFIED = {  # shares of memory: Apple's working-set limit, Jetson's and GB10's carve-outs, half of RAM elsewhere
    "Apple": (0.16, 0.25, 1 / 3), "NVIDIA": (0.04, 0.07, 0.10), "AMD": (0.03, 0.5, 0.5), "Intel": (0.03, 0.5, 0.5)}


@lru_cache(maxsize=512)  # a live card's free bytes change, and with them its key
def _reserved(card: Gpu) -> tuple[int, int, int]:
    about = [row for row in overheads().values() if card.id in row.cards]
    if card.unified:
        return _reserved_unified(card, about)
    # What nvidia-smi leaves out of the size on the box, and what CUDA leaves out of that. Elsewhere the row about the
    # card is the runtime's own total.
    missing = sorted(card.memory - int(row.value) for row in about if row.category == "visible-total")
    if card.vendor != "NVIDIA" and missing:
        return missing[0], missing[-1], missing[-1]
    if not missing and card.kind == "datacenter" and card.memory_type.startswith("GDDR"):
        missing = [int(_ECC * card.memory)]
    low, best, high = _framebuffer(card, [row for row in about if row.category == "reserved-framebuffer"])
    missing = missing or [0]
    return missing[0] + low, missing[-1] + best, missing[-1] + high


def _framebuffer(card: Gpu, rows: list[Overhead]) -> tuple[int, int, int]:
    if card.vendor != "NVIDIA":
        return _OTHER_FRAMEBUFFER
    grown = card.memory // GIB * _NVIDIA_PER_GIB
    low, best, high = _NVIDIA_FRAMEBUFFER[0], *(size + grown for size in _NVIDIA_FRAMEBUFFER[1:])
    if not rows:
        return low, best, high
    row = rows[0]
    if row.low < row.high:
        return int(row.low), int(row.value), int(row.high)
    seen = int(row.value)  # by one driver; others keep less or more
    return min(low, seen), seen, max(best, seen)


def _reserved_unified(card: Gpu, about: list[Overhead]) -> tuple[int, int, int]:
    low, best, high = (int(share * card.memory) for share in _UNIFIED[card.vendor])
    if card.vendor == "Apple" and card.memory <= 36 * GIB:
        best = high
    for row in about:
        if row.category in ("visible-total", "unified-memory-limit") and row.unit == "bytes" and row.value < card.memory:
            best = card.memory - int(row.value)
    return min(low, best), best, max(high, best)


# -- links and overheads --------------------------------------------------------------------------------------------


@cache
def links() -> dict[str, Link]:
    """Every link, by id: "pcie4-x16", "nvme-gen4-class", "ddr5-6000-dual", "eth-1g"."""
    return {row["id"]: Link(
        row["id"], row["kind"], row["name"], _number(row["theoretical_gbs"], GB), _number(row["measured_gbs"], GB),
        _number(row["estimated_gbs"], GB), row["how_measured"], row["source"],
        _number(row["round_trip_us"], 1e-6)) for row in _rows("links.csv")}


@cache
def overheads() -> dict[str, Overhead]:
    """Every overhead, by id; memory in bytes."""
    return {row["id"]: _overhead(row) for row in _rows("overheads.csv")}


def _overhead(row: dict) -> Overhead:
    scale = {"MiB": MIB, "GiB": GIB, "bytes": 1}.get(row["unit"])
    value, low, high = (float(row[name] or row["value"]) * (scale or 1) for name in ("value", "low", "high"))
    return Overhead(
        **{name: row[name] for name in ("id", "category", "name", "scope", "basis", "conditions", "source", "note")},
        value=value, low=min(low, value), high=max(high, value), unit="bytes" if scale else row["unit"],
        cards=tuple(filter(None, row["cards"].split("|"))))


# -- published quality ----------------------------------------------------------------------------------------------


@cache
def quality() -> dict[tuple[str, bool], Quality]:
    """Llama 3 8B by (quant, importance matrix or not): {("Q4_K_M", False): Quality}."""
    published = _rows("quality_llama3_8b.csv")
    f16 = next(float(row["perplexity"]) for row in published if row["quant"] == "f16")
    weights = entry("llama-3-8b").params_total
    rows = [_quality(row["quant"].upper(), row["imatrix"] != "None", row, f16, row["bits_per_weight"],
                     int(float(row["gib"]) * GIB)) for row in published]
    rows = [row if row.bits else replace(row, bits=round(row.bytes * 8 / weights, 2)) for row in rows]
    return {(row.what, row.importance): row for row in rows}


@cache
def measured_quality() -> dict[tuple[str, bool], Quality]:
    """SmolLM2 135M by (quant, importance matrix or not), measured by tests/bench/bench_rates.py: {("Q4_K_M", False): Quality}.

    "Q4_K_M high" has the same types, their blocks found by the longer search. The original are the weights of its quantized
    file moved off their grid (`quality.unrounded`), and its rows of 576 weights do not divide into blocks of 256: most tensors
    of a K quant are in the fallback types that `note` counts.
    """
    return {(row["quant"], row["imatrix"] != "None"): Quality(
        row["quant"], row["imatrix"] != "None", float(row["perplexity"]), float(row["mean_kld"]), row["source"], row["note"],
        float(row["bits_per_weight"]), int(row["bytes"]), float(row["rms_delta_p_percent"]) / 100, float(row["ratio"]) - 1,
        float(row["mean_kld_error"]), float(row["p99_kld"]), _number(row["tokens_per_second"]), row["timed"])
        for row in _rows("quality_smollm2_135m.csv")}


@cache
def kv_quality() -> dict[tuple[str, str], Quality]:
    """Llama 3 8B in f16 by (K type, V type): {("q8_0", "q8_0"): Quality}."""
    rows = _rows("kv_quality_llama3_8b.csv")
    f16 = next(float(row["perplexity"]) for row in rows if row["k"] == row["v"] == "f16")
    return {(row["k"], row["v"]): _quality(f"{row['k']}/{row['v']}", False, row, f16, row["bits_per_value"], None)
            for row in rows}


@cache
def measured_kv_quality(rotate: bool = False, recent: int = 0, sinks: int = 0,
                        context: int = 1024) -> dict[tuple[str, str], Quality]:
    """SmolLM2 135M Instruct by (K type, V type), measured by tests/bench/bench_cache_quality.py against a cache of f32:
    {("q8_0", "q4_0"): Quality}.

    Of caches that are rotated, that keep `recent` and `sinks` tokens in f16 besides, and read chunks of `context`: 1024, some
    4096; empty where nothing was measured. Every token of a chunk is scored. Heads of 64 numbers in a small model: what a type
    loses here is more than larger models lose; the order and the ratios say more than the figures.
    """
    wanted = {"rotate": str(bool(rotate)), "recent": str(recent), "sinks": str(sinks), "context": str(context)}
    found = {}
    for row in _rows("kv_quality_smollm2_135m.csv"):
        if all(row[name] == value for name, value in wanted.items()):
            depths = ((int(name.rpartition("_")[2]), _number(value)) for name, value in row.items()
                      if name.startswith("kld_to_"))
            what = ", ".join([f"{row['k']}/{row['v']}", *["rotated"] * rotate, *[f"{recent} recent"] * (recent > 0),
                              *[f"{sinks} sinks"] * (sinks > 0)])
            found[row["k"], row["v"]] = Quality(
                what, False, float(row["perplexity"]), float(row["mean_kld"]), row["source"], row["note"],
                float(row["bits_per_value"]), None, float(row["rms_delta_p_percent"]) / 100, float(row["ratio"]) - 1,
                float(row["mean_kld_error"]), float(row["p99_kld"]),
                by_depth=tuple((edge, kld) for edge, kld in depths if kld is not None))
    return found


@cache
def scores() -> tuple[Score, ...]:
    """Every published score."""
    return tuple(Score(row["model_id"], row["benchmark"], float(row["score"]), row["setting"], row["source"])
                 for row in _rows("benchmark_scores.csv"))


@cache
def mmlu_by_quant() -> dict[tuple[str, str], float]:
    """MMLU of Llama 3 Instruct by (model id, quant), percent, measured once for all: {("llama-3-8b", "Q4_K_M"): 64.64}."""
    return {(row["model_id"], row["quant"]): float(row["mmlu"]) for row in _rows("mmlu_by_quant_llama3.csv")}


def _quality(what: str, importance: bool, row: dict, f16: float, bits: str, size: int | None) -> Quality:
    perplexity = _number(row["perplexity"])
    return Quality(what, importance, perplexity, float(row["mean_kld"]), row["source"], row["note"], _number(bits), size,
                   _number(row["rms_delta_p_percent"], 0.01), perplexity and perplexity / f16 - 1)


def published_quality(of: str = "weights") -> "Table":
    """Llama 3 8B's published quality as a table, best first: by quant, or of="cache" by cache types of K and V.

    `loss` is the perplexity over f16's, less 1; bits that nobody published follow from the size. Raises UnknownName.
    """
    tables = {"weights": quality, "cache": kv_quality}
    if of not in tables:
        raise UnknownName(f'published_quality(of={of!r}): there are of="weights" and of="cache"')
    rows = sorted(tables[of]().values(), key=lambda row: row.mean_kld)
    columns = ("what", "importance", "bits", "bytes", "perplexity", "loss", "mean_kld", "rms_dp")
    dropped = () if of == "weights" else ("importance", "bytes")
    return Table(({name: getattr(row, name) for name in columns if name not in dropped} for row in rows),
                 {"bits": "{:.2f}".format, "bytes": format_bytes, "perplexity": "{:.4f}".format, "loss": "{:+.2%}".format,
                  "mean_kld": "{:.6f}".format, "rms_dp": "{:.2%}".format})


# -- tables ---------------------------------------------------------------------------------------------------------


class Listed(Sequence):
    """Things in an order that are shown as a table, `table`, which each kind has its own of."""

    def __init__(self, rows: Sequence):
        self._rows = tuple(rows)

    def __getitem__(self, index):
        return self._some(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def _some(self, rows: Sequence) -> "Listed":
        """So many of them, of the same kind."""
        return type(self)(rows)

    def to_frame(self):
        """The table as a pandas DataFrame. Raises LabError where pandas is not installed."""
        return self.table.to_frame()

    def __repr__(self) -> str:
        return repr(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


class Table(Sequence):
    """Rows of one kind: a list of dicts that shows itself as aligned text, or as HTML in a notebook."""

    def __init__(self, rows: Iterable[Mapping], shown: Mapping[str, Callable] | None = None):
        """`shown`: how to write a column's values; the rows keep the plain numbers."""
        self._rows, self._shown = [dict(row) for row in rows], dict(shown or {})

    def __getitem__(self, index):
        return Table(self._rows[index], self._shown) if isinstance(index, slice) else self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict]:
        return iter(self._rows)

    def __eq__(self, other) -> bool:
        return self._rows == list(other) if isinstance(other, (Table, list)) else NotImplemented

    __hash__ = None

    def texts(self) -> tuple[list[str], list[list[str]]]:
        """Columns, and of each row the texts that are shown."""
        columns = list(self._rows[0]) if self._rows else []
        return columns, [[self._text(column, row[column]) for column in columns] for row in self._rows]

    def _text(self, column: str, value) -> str:
        if value is None:
            return ""
        if column in self._shown:
            return self._shown[column](value)
        return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

    def _right(self, column: str) -> bool:
        """Numbers stand to the right."""
        return any(isinstance(row[column], (int, float)) for row in self._rows)

    def __repr__(self) -> str:
        columns, cells = self.texts()
        if not cells:
            return "(no rows)"
        widths = [max(map(len, texts)) for texts in zip(columns, *cells, strict=True)]
        right = [self._right(column) for column in columns]
        padded = (("  ".join(text.rjust(width) if to_right else text.ljust(width)
                             for text, width, to_right in zip(line, widths, right, strict=True)))
                  for line in (columns, *cells))
        return "\n".join(line.rstrip() for line in padded)

    def _repr_html_(self) -> str:
        from html import escape

        columns, cells = self.texts()
        align = [' style="text-align:right"' if self._right(column) else ' style="text-align:left"'
                 for column in columns]
        head = "".join(f"<th{a}>{escape(t)}</th>" for t, a in zip(columns, align, strict=True))
        body = "".join("<tr>" + "".join(f"<td{a}>{escape(t)}</td>" for t, a in zip(line, align, strict=True)) + "</tr>"
                       for line in cells)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def to_frame(self):
        """A pandas DataFrame of the plain values. Raises LabError where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise LabError("a data frame needs pandas: pip install pandas") from None
        return pandas.DataFrame(self._rows)


def models(family: str | None = None) -> Table:
    """The models of the catalogue as a table; `family` keeps those whose family begins so ("qwen3", "Llama 3.1"), or
    with a word of their id ("coder").

    Raises UnknownName for a family there is none of.
    """
    rows = _chosen(entries().values(), "family", family, "llmlab.models()")
    return Table(({"id": e.id, "family": e.family, "release": e.release, "params": e.params_total,
                   "active": e.params_active, "context": e.config["max_position_embeddings"],
                   "architecture": e.architecture, "license": e.license, "strengths": e.strengths} for e in rows),
                 {"params": format_count, "active": format_count, "context": "{:,}".format})


def gpus(vendor: str | None = None) -> Table:
    """The cards of the catalogue as a table; `vendor` keeps one maker's, or the cards with that in their name ("3060").

    Raises UnknownName for a maker there is none of.
    """
    rows = _chosen(_cards().values(), "vendor", vendor, "llmlab.gpus()")
    return Table(({"id": g.id, "vendor": g.vendor, "generation": g.generation, "kind": g.kind, "year": g.year,
                   "memory": g.memory, "bandwidth": g.bandwidth, "fp16": g.fp16_flops, "tdp": g.tdp_w} for g in rows),
                 {"memory": lambda size: format_bytes(size, 0), "bandwidth": format_rate, "tdp": "{:.0f} W".format,
                  "fp16": lambda flops: f"{flops / 1e12:.1f} TFLOPS"})


def _chosen(rows: Iterable, column: str, wanted: object, listing: str) -> list:
    rows = list(rows)
    if wanted is None:
        return rows
    key = _key(wanted) if isinstance(wanted, str) and len(wanted) <= _LONGEST_NAME else ""
    chosen = [row for row in rows if key and _key(getattr(row, column)).startswith(key)] or [
        row for row in rows if key and any(part.startswith(key) for part in row.id.split("-"))]
    if not chosen:
        raise unknown(column, wanted, {getattr(row, column) for row in rows}, listing)
    return chosen
