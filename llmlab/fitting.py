"""What fits: a report of every device, the verdict, and the inverse questions asked of it.

llmlab.fit() builds a Report; the inverse questions (largest context, best quant) ask it again with other settings.
Everything is arithmetic over remembered shapes: a report takes well under a millisecond.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from . import catalog, hardware, wording
from .catalog import Gpu
from .errors import LabError
from .memory import CacheBytes, Term, Weights, cache_bytes, weights
from .placing import card_needs, free_bytes, overhead_high, placed_terms, whole_terms
from .settings import LADDERS, Settings, check, ladder, quants_to_try
from .shapes import ModelSpec, model_spec
from .speed import Speed, speed
from .units import GIB, parse_bytes

QUANT_LADDER = LADDERS["llama.cpp"]
HOST_RESERVE = 2 * GIB            # RAM the system itself keeps
MOST_HOST = 2**60                 # bytes; more RAM than anyone has, and still a number that prints


@dataclass(frozen=True, slots=True)
class Device:
    """One device of a report, bytes. `free` is what this model may use; `low` and `high` bound `used`."""

    name: str
    title: str
    capacity: int
    free: int
    used: int
    low: int
    high: int

    @property
    def verdict(self) -> str:
        if self.high <= self.free:
            return "fits"
        return "may spill" if self.low <= self.free else "does not fit"


@dataclass(frozen=True)
class Report:
    """Whether a model fits, device by device, term by term.

    `gpu_layers` counts as llama.cpp does: blocks, and the output as one more. `terms` are exact or modelled and say so.
    `verdict` answers for what was asked: with gpu_layers "auto" all of the model on the cards; where that does not fit,
    `gpu_layers` is how much of it goes there and `partial` is true. `host` is RAM in bytes, None: no limit.
    """

    spec: ModelSpec
    cards: tuple[Gpu, ...]
    settings: Settings
    terms: tuple[Term, ...]
    devices: dict[str, Device]
    gpu_layers: int
    verdict: str
    speed: Speed
    host: int | None = None
    partial: bool = False

    @property
    def fits(self) -> bool:
        return self.verdict == "fits"

    @property
    def layers(self) -> int:
        """Blocks and the output: the most gpu_layers there can be."""
        return len(self.spec.layers) + 1

    def total(self, name: str, device: str | None = None) -> int:
        """Bytes of the terms of that name, on one device or on all."""
        return sum(t.bytes for t in self.terms if t.name == name and device in (None, t.device))

    def with_(self, **changes) -> "Report":
        """The same question with other settings: `report.with_(context=32768)`. Raises LabError as `fit`."""
        host = _host(changes.pop("host")) if "host" in changes else self.host
        return _report(self.spec, self.cards, check(self.spec, {**self.settings.__dict__, **changes}), host)

    # ---- the inverse questions --------------------------------------------------------------------------

    def largest_context(self) -> int:
        """The longest context, a multiple of 256, with which this fits (0: none does).

        Searched up to the context the model was trained for, times the sequences that share it.
        """
        n = self.settings.sequences
        low, high = -(-n // 256), max(self.spec.context_train or self.settings.context, 256) * n // 256
        if not self.with_(context=low * 256).fits:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            if self.with_(context=middle * 256).fits:
                low = middle
            else:
                high = middle - 1
        return low * 256

    def best_quant(self, quants: Sequence[str] | None = None) -> str | None:
        """The first quant of the engine's ladder, or of `quants`, with which this fits; None where none does.

        Quants that cannot hold the model's widths are passed over, and so are those larger than a GGUF already is or the
        checkpoint was published in (MXFP4 for gpt-oss).
        Raises LabError for a name that is no quant.
        """
        tried = LADDERS[self.settings.engine] if quants is None else ladder(quants)
        if self.settings.engine == "llama.cpp":
            tried = quants_to_try(self.spec, tried)
        for quant in tried:
            try:
                if self.with_(quant=quant).fits:
                    return quant
            except LabError:
                continue
        return None

    # ---- in words, figures and tables -------------------------------------------------------------------

    @cached_property
    def answer(self) -> str:
        """One or two sentences: the verdict, what it rests on, and what becomes of the rest."""
        return wording.answer(self)

    def figure(self):
        """A stacked bar a device, against its capacity (plotly)."""
        from .lab.figures import fit_figure
        return fit_figure(self)

    def to_frame(self):
        """The terms as a pandas DataFrame. Raises LabError where pandas is not installed."""
        return self.table.to_frame()

    @cached_property
    def table(self) -> catalog.Table:
        """The terms as rows, and a sum for each device; those of no bytes are left out."""
        rows = []
        for name, device in self.devices.items():
            rows += [{"device": name, "term": t.name, "GiB": t.bytes / GIB, "range": _range(t.low, t.high),
                      "kind": t.kind, "why": t.why} for t in self.terms if t.device == name and (t.bytes or t.high)]
            rows.append({"device": name, "term": "in all", "GiB": device.used / GIB, "range": _range(device.low, device.high),
                         "kind": "", "why": f"{device.title}, {_has(device)}"})
        return catalog.Table(rows, {"GiB": "{:.2f}".format})

    def to_dict(self) -> dict:
        """What `llmlab fit --json` prints. A host capacity of 0 is RAM without a limit."""
        s = self.settings
        keys = {"host": ("weights", "repacked", "kv_cache", "recurrent", "compute", "output")}
        devices = {}
        for name, device in self.devices.items():
            wanted = keys.get(name, ("weights", "kv_cache", "recurrent", "compute", "overhead"))
            devices[name] = {"capacity": device.capacity, **{key: self.total(key, name) for key in wanted}}
        w = weights(self.spec, s.quant, s.importance)
        return {"model": self.spec.name, "quant": s.quant, "verdict": self.verdict, "fits": self.fits,
                "tensor_bytes": w.padded, "file_bytes": self.file_bytes, "devices": devices, "gpu_layers": self.gpu_layers,
                "speed": {"decode_tps": self.speed.decode_tps, "prefill_tps": self.speed.prefill_tps}}

    @property
    def file_bytes(self) -> int | None:
        """Bytes of the GGUF, header too; None where the header cannot be known."""
        if self.spec.header_bytes is None:
            return None
        if self.settings.quant == self.spec.stored:
            return self.spec.file_bytes
        return self.spec.header_bytes + weights(self.spec, self.settings.quant, self.settings.importance).padded

    def __repr__(self) -> str:
        return f"<fit: {self.answer}>"


def _range(low: int, high: int) -> str:
    return "" if low == high else f"{low / GIB:.2f} to {high / GIB:.2f}"


def _has(device: Device) -> str:
    return f"which has {device.capacity / GIB:.2f} GiB" if device.capacity else "no limit given"


def fit(spec, gpu=None, quant: str | None = None, context: int = 8192, kv: str | tuple[str, str] = "f16",
        engine: str = "llama.cpp", gpu_layers: int | str = "auto", n_cpu_moe: int = 0, split=None, host=None,
        sequences: int = 1, batch: int = 2048, ubatch: int = 512, flash_attention: bool = True, importance: bool = False,
        swa_full: bool = False, unified: bool = False) -> Report:
    """Will it fit? `llmlab.fit`.

    >>> llmlab.fit("llama-3-8b", "rtx-3060-12gb", quant="Q4_K_M", context=16384, kv="q8_0").answer

    spec: a ModelSpec or anything llmlab.model takes. gpu: a card, its name, a list of them, a Machine (its cards and its
    RAM), or None for the host alone. quant None: as stored in a GGUF, Q4_K_M for a config. host: RAM in bytes
    or words ("32 GiB"); None: this computer's where gpu is None or a Machine, otherwise unlimited, as llama.cpp treats it.
    kv: a cache type, or a pair for K and V. n_cpu_moe: blocks whose experts stay in RAM. split: one share a card.
    context is what all sequences share. gpu_layers "auto" asks whether all of it fits the cards, and says how many
    layers go there where it does not. Raises LabError in one line for anything that cannot be.
    """
    spec = model_spec(spec)
    cards, ram = _cards(gpu)
    if host is not None:
        ram = _host(host)
    return _report(spec, cards, check(spec, dict(
        quant=quant, context=context, kv=kv, engine=engine, gpu_layers=gpu_layers, n_cpu_moe=n_cpu_moe, split=split,
        sequences=sequences, batch=batch, ubatch=ubatch, flash_attention=flash_attention, importance=importance,
        swa_full=swa_full, unified=unified)), ram)


def _host(given) -> int | None:
    """RAM in bytes; None: no limit."""
    if given is None:
        return None
    ram = parse_bytes(given)
    if not 0 < ram <= MOST_HOST:
        raise LabError(f"host is {str(given)[:40]!r}; give how much RAM there is, like '32 GiB'")
    return ram


def _cards(gpu) -> tuple[tuple[Gpu, ...], int | None]:
    """Cards, and the RAM that comes with them (None: no limit)."""
    if isinstance(gpu, hardware.Machine):
        return gpu.cards, _usable_ram(gpu)
    if gpu is None or (isinstance(gpu, (list, tuple)) and not gpu):
        return (), _this_ram()
    if isinstance(gpu, str) and gpu.strip().lower() == "none":
        return (), _this_ram()
    if isinstance(gpu, (list, tuple)):
        return tuple(catalog.gpu(g) for g in gpu), None
    return (catalog.gpu(gpu),), None


@cache
def _this_ram() -> int:
    return _usable_ram(hardware.machine())


def _usable_ram(machine: hardware.Machine) -> int:
    """RAM of a computer in bytes, or what its container allows."""
    return min(machine.ram_total, machine.ram_limit or machine.ram_total)


# ---- one report ---------------------------------------------------------------------------------------------

def _report(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, host: int | None) -> Report:
    if s.split is not None and len(s.split) != len(cards):
        raise LabError(f"split names {len(s.split)} shares for {len(cards)} cards; give one each")
    w = weights(spec, s.quant, s.importance)
    c = cache_bytes(spec, s.context, s.kv, engine=s.engine, sequences=s.sequences, ubatch=s.micro,
                    flash_attention=s.flash_attention, swa_full=s.swa_full, unified=s.unified)
    everything = len(spec.layers) + 1
    if s.engine != "llama.cpp":
        return _judged(spec, cards, s, w, c, host, everything if cards else 0, whole_terms(spec, cards, s, c))
    wanted = 0 if not cards else everything if s.gpu_layers == "auto" else s.gpu_layers
    report = _judged(spec, cards, s, w, c, host, wanted, placed_terms(spec, cards, s, w, c, wanted))
    on_cards = [d for name, d in report.devices.items() if name != "host"]
    if s.gpu_layers != "auto" or all(d.verdict != "does not fit" for d in on_cards):
        return report
    most = _most_layers(spec, cards, s, w, c)
    return _judged(spec, cards, s, w, c, host, most, placed_terms(spec, cards, s, w, c, most), partial=True)


def _most_layers(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, w: Weights, c: CacheBytes) -> int:
    """The most layers that fit the cards for certain, short of all of them."""
    room = [free_bytes(card) - overhead_high(card) for card in cards]

    def fit_in(layers: int) -> bool:
        return all(need <= space for need, space in zip(card_needs(spec, cards, s, w, c, layers), room, strict=True))

    low, high = 0, len(spec.layers)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fit_in(middle) else (low, middle - 1)
    if len(cards) > 1:      # with one layer more the shares shift: more may fit where fewer do not
        return next((n for n in range(len(spec.layers), low, -1) if fit_in(n)), low)
    return low


def _judged(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, w: Weights, c: CacheBytes, host: int | None,
            gpu_layers: int, terms: list[Term], partial: bool = False) -> Report:
    sums = {f"gpu{i}": [0, 0, 0] for i in range(len(cards))} | {"host": [0, 0, 0]}
    for t in terms:
        mine = sums[t.device]
        mine[0] += t.bytes
        mine[1] += t.low
        mine[2] += t.high
    devices = {}
    for i, card in enumerate(cards):
        devices[f"gpu{i}"] = Device(f"gpu{i}", card.name, card.memory, free_bytes(card), *sums[f"gpu{i}"])
    devices["host"] = _host_device(cards, devices, host, sums["host"], terms)
    verdicts = [d.verdict for d in devices.values()]
    # a partial report says how much goes on the cards; the question was whether all of it does
    verdict = "does not fit" if partial else next(v for v in ("does not fit", "may spill", "fits") if v in verdicts)
    return Report(spec, cards, s, tuple(terms), devices, gpu_layers, verdict, _speed(spec, cards, s, w, terms), host, partial)


def _host_device(cards: tuple[Gpu, ...], on_cards: dict[str, Device], host: int | None, sums: list[int],
                 terms: list[Term]) -> Device:
    """RAM: what the system leaves of it; where a card shares it, also less what the model holds as card memory."""
    shared = next((i for i, card in enumerate(cards) if card.unified), None)
    if shared is not None:
        card, device = cards[shared], on_cards[f"gpu{shared}"]
        capacity = min(card.memory, host or card.memory)
        mine = device.used - next(t.bytes for t in terms if t.name == "overhead" and t.device == device.name)
        return Device("host", "RAM (the same memory)", capacity, max(capacity - min(HOST_RESERVE, capacity // 8) - mine, 0),
                      *sums)
    if host is None:
        return Device("host", "RAM", 0, max(sums), *sums)
    return Device("host", "RAM", host, max(host - min(HOST_RESERVE, host // 8), 0), *sums)


def _speed(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, w: Weights, terms: list[Term]) -> Speed:
    """Bytes a token reads on each device: its weights by the active share, and its whole cache (the context full)."""
    held = {t.device: t.bytes for t in terms if t.name == "weights"}
    cached: dict[str, int] = {}
    for t in terms:
        if t.name in ("kv_cache", "recurrent"):
            cached[t.device] = cached.get(t.device, 0) + t.bytes
    host_held = max(held.get("host", 0) - w.embedding, 0)
    all_held = sum(v for k, v in held.items() if k != "host") + host_held or 1
    active = {k: w.active * (host_held if k == "host" else v) // all_held for k, v in held.items()}
    on_cards = tuple(active.get(f"gpu{i}", 0) + cached.get(f"gpu{i}", 0) for i in range(len(cards)))
    return speed(cards, on_cards, active.get("host", 0) + cached.get("host", 0), spec.params_active, host_held / all_held,
                 host_held, s.micro)


__all__ = ["Device", "QUANT_LADDER", "Report", "fit"]
