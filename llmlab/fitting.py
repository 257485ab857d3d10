"""What fits: a report of every device, the verdict, and the inverse questions asked of it.

llmlab.fit() builds a Report; the inverse questions (largest context, best quant) ask it again with other settings.
Everything is arithmetic over remembered shapes: a report takes well under a millisecond.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from . import catalog, hardware, wording
from .beside import anything, beside_terms, rows_drafted
from .catalog import Gpu
from .errors import LabError
from .memory import Term, cache_bytes, weights
from .overhead import Measured, overhead_term
from .placing import NOWHERE, Here, assignment, free_bytes, placed_terms, whole_terms
from .rates import USUAL, Rates, host_named, of_machine
from .reserving import Reservation, check_parallel, reservations, vllm_terms
from .searching import Question, fewest_experts_out, most_layers
from .settings import LADDERS, Settings, check, ladder, quants_to_try
from .shapes import ModelSpec, model_spec
from .speed import Speed, speed
from .units import GIB, parse_bytes

QUANT_LADDER = LADDERS["llama.cpp"]
HOST_RESERVE = 2 * GIB            # RAM the system itself keeps
MOST_HOST = 2**60                 # bytes; more RAM than anyone has, and still a number that prints


@dataclass(frozen=True, slots=True)
class Device:
    """One device of a report, bytes. `free` is what this model may use; `low` and `high` bound `used`.

    `returned`: of `used`, pages of the file that are not read again once their tensors are laid out anew; the system takes
    them back where it needs them, so they decide nothing.
    """

    name: str
    title: str
    capacity: int
    free: int
    used: int
    low: int
    high: int
    returned: int = 0

    @property
    def needed(self) -> int:
        """Bytes that have to be there: `used` without what is `returned`."""
        return self.used - self.returned

    @property
    def verdict(self) -> str:
        if self.high - self.returned <= self.free:
            return "fits"
        return "may spill" if self.low - self.returned <= self.free else "does not fit"


@dataclass(frozen=True)
class Report:
    """Whether a model fits, device by device, term by term.

    `gpu_layers` counts as llama.cpp does: blocks, and the output as one more. `terms` are exact or modelled and say so.
    `verdict` answers for what was asked: with gpu_layers "auto" all of the model on the cards; where that does not fit,
    `gpu_layers` is how much of it goes there and `partial` is true. `n_cpu_moe` is how many blocks keep their experts in
    RAM, settled where it was asked as "auto". `host` is RAM in bytes, None: no limit. `machine`: the very computer, where the
    question named one. `reserved`: what vLLM reserves of each card.
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
    n_cpu_moe: int = 0
    machine: "hardware.Machine | None" = None
    reserved: tuple[Reservation, ...] = ()
    rates: Rates = USUAL

    @property
    def fits(self) -> bool:
        return self.verdict == "fits"

    @property
    def layers(self) -> int:
        """Blocks and the output: the most gpu_layers there can be."""
        return len(self.spec.layers) + 1

    @property
    def lent(self) -> tuple[Device, ...]:
        """The cards' devices; of a chip that shares its RAM without what the system keeps from it: no need of the model's."""
        devices = []
        for i, card in enumerate(self.cards):
            d, kept = self.devices[f"gpu{i}"], card.reserved[1] if card.unified and card.free is None else 0
            devices.append(replace(d, used=d.used - kept, low=d.low - kept, high=d.high - kept, free=d.free - kept))
        return tuple(devices)

    @property
    def beyond_training(self) -> int:
        """Tokens of a sequence's context beyond what the model was trained for (llama.cpp's n_ctx_train); 0: none."""
        trained = self.spec.context_train
        return max(self.settings.context // self.settings.sequences - trained, 0) if trained else 0

    def total(self, name: str, device: str | None = None) -> int:
        """Bytes of the terms of that name, on one device or on all."""
        return sum(t.bytes for t in self.terms if t.name == name and device in (None, t.device))

    def with_(self, **changes) -> "Report":
        """The same question with other settings: `report.with_(context=32768)`. Raises LabError as `fit`."""
        host, rates = self.host, self.rates
        if "host" in changes:
            host, named = _host(changes.pop("host"))
            rates = named or rates
        if "draft" in changes:
            changes.setdefault("draft_quant", None)          # the quant was the former draft's
        s = check(self.spec, {**self.settings.__dict__, **changes})
        return _report(self.spec, self.cards, s, host, self.machine, rates)

    @cached_property
    def whole(self) -> "Report":
        """The same with every layer on the cards where that was left open: it fits where this fits, and searches nothing."""
        left_open = self.cards and self.settings.engine == "llama.cpp" and self.settings.gpu_layers == "auto"
        return self.with_(gpu_layers=self.layers) if left_open else self

    # ---- the inverse questions --------------------------------------------------------------------------

    def largest_context(self) -> int:
        """The longest context, a multiple of 256, with which this fits (0: none does).

        Searched up to the context the model was trained for, times the sequences that share it.
        """
        return self._largest_context

    @cached_property
    def _largest_context(self) -> int:
        whole, n = self.whole, self.settings.sequences
        low, high = -(-n // 256), max(self.spec.context_train or self.settings.context, 256) * n // 256
        if not whole.with_(context=low * 256).fits:
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            if whole.with_(context=middle * 256).fits:
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
        return self._best_quant if quants is None else self._first_that_fits(ladder(quants))

    @cached_property
    def _best_quant(self) -> str | None:
        return self._first_that_fits(LADDERS[self.settings.engine])

    def _first_that_fits(self, tried: Sequence[str]) -> str | None:
        if self.settings.engine == "llama.cpp":
            tried = quants_to_try(self.spec, tried)
        whole = self.whole
        for quant in tried:
            try:
                if whole.with_(quant=quant).fits:
                    return quant
            except LabError:
                continue
        return None

    def levers(self):
        """What one more step of each lever buys in bytes and costs in speed and published quality: `llmlab.levers.Levers`,
        a table of rows whose `change` goes into `with_`. Those that make it fit come first, the cheapest of them first."""
        from .levers import levers
        return levers(self)

    def command(self, engine: str | None = None):
        """The command, settings file or code that gives exactly this in `engine`: a string with `.notes`.

        engine: "llama.cpp", "llama-cli", "llama-cpp-python", "ollama", "lmstudio", "vllm", "transformers"; None: the
        report's own. Raises LabError for an engine that cannot run it.
        """
        from .exports import command
        return command(self, engine)

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
        """What `llmlab fit --json` prints. A host capacity of 0 is RAM without a limit.

        Only where they say something: "n_cpu_moe", "beyond_training", and "reserved" for each card of vLLM.
        """
        s = self.settings
        keys = {"host": ("weights", "repacked", "kv_cache", "recurrent", "compute", "output")}
        devices = {}
        for name, device in self.devices.items():
            wanted = keys.get(name, ("weights", "kv_cache", "recurrent", "compute", "overhead"))
            more = dict.fromkeys(t.name for t in self.terms if t.device == name and t.name not in wanted and t.bytes)
            devices[name] = {"capacity": device.capacity, **{key: self.total(key, name) for key in (*wanted, *more)}}
        w = weights(self.spec, s.quant, s.importance)
        said = {"n_cpu_moe": self.n_cpu_moe, "beyond_training": self.beyond_training,
                "reserved": [{"requested": r.requested, "pool": r.pool, "concurrent": r.concurrent} for r in self.reserved]}
        return {"model": self.spec.name, "quant": s.quant, "verdict": self.verdict, "fits": self.fits,
                "tensor_bytes": w.padded, "file_bytes": self.file_bytes, "devices": devices, "gpu_layers": self.gpu_layers,
                **{name: value for name, value in said.items() if value},
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
        engine: str = "llama.cpp", gpu_layers: int | str = "auto", n_cpu_moe: int | str = 0, split=None, host=None,
        sequences: int = 1, batch: int = 2048, ubatch: int = 512, flash_attention: bool = True, importance: bool = False,
        swa_full: bool = False, unified: bool = False, display: str | bool | None = None, utilization: float | None = None,
        projector=None, draft=None, draft_quant: str | None = None, mtp: bool = False) -> Report:
    """Will it fit? `llmlab.fit`.

    >>> llmlab.fit("llama-3-8b", "rtx-3060-12gb", quant="Q4_K_M", context=16384, kv="q8_0").answer

    spec: a ModelSpec or anything llmlab.model takes. gpu: a card, its name, a list of them, a Machine (its cards and its
    RAM), or None for the host alone. quant None: as stored in a GGUF, Q4_K_M for a config. host: RAM in bytes or words
    ("32 GiB", "96 GB DDR5-4800", "DDR4-3200 quad, 10 cores": which RAM it is decides the speed); None: this computer's where
    gpu is None or a Machine, otherwise unlimited, as llama.cpp treats it.
    kv: a cache type, or a pair for K and V. n_cpu_moe: blocks whose experts stay in RAM, or "auto": as few as let the rest
    fit. split: one share a card. context is what all sequences share. gpu_layers "auto" asks whether all of it fits the
    cards, and says how many layers go there where it does not.
    display: whether a card also shows the desktop: False, "linux", "windows", None where that is not known. utilization:
    the share of a card that vLLM reserves (0.92). projector: the model's mmproj GGUF, or its size. draft: a model that
    drafts for this one, in draft_quant; mtp: draft with the model's own multi-token-prediction blocks.
    Raises LabError in one line for anything that cannot be.
    """
    spec = model_spec(spec)
    return place(gpu, host).fit(spec, check(spec, dict(
        quant=quant, context=context, kv=kv, engine=engine, gpu_layers=gpu_layers, n_cpu_moe=n_cpu_moe, split=split,
        sequences=sequences, batch=batch, ubatch=ubatch, flash_attention=flash_attention, importance=importance,
        swa_full=swa_full, unified=unified, display=display, utilization=utilization, projector=projector, draft=draft,
        draft_quant=draft_quant, mtp=mtp)))


@dataclass(frozen=True)
class Place:
    """Where models are to run: cards, bytes of RAM (None: no limit), the computer where it is a certain one, and what its RAM
    delivers."""

    cards: tuple[Gpu, ...]
    host: int | None
    machine: "hardware.Machine | None"
    rates: Rates

    @cached_property
    def room(self) -> int:
        """Bytes on all cards together that are certainly a model's under llama.cpp: what is free, less what lies beside."""
        here = _here(self.machine, self.cards)
        return sum(free_bytes(card) - overhead_term(card, "", cards=len(self.cards), measured=here.measured_on(card)).high
                   for card in self.cards)

    def fit(self, spec: ModelSpec, settings: Settings) -> Report:
        """The report of settings that were checked."""
        return _report(spec, self.cards, settings, self.host, self.machine, self.rates)


def place(gpu=None, host=None) -> Place:
    """What `fit` takes as `gpu` and `host`. Raises LabError."""
    cards, ram, machine = _cards(gpu)
    rates = of_machine(machine) if machine else USUAL
    if host is not None:
        ram, named = _host(host)
        rates = named or rates
    return Place(cards, ram, machine, rates)


def _host(given) -> tuple[int | None, Rates | None]:
    """RAM in bytes (None: no limit), and what it delivers where the words say which RAM it is."""
    if given is None:
        return None, None
    size, rates = host_named(given) if isinstance(given, str) else (given, None)
    if size is None:
        return None, rates
    ram = parse_bytes(size)
    if not 0 < ram <= MOST_HOST:
        raise LabError(f"host is {str(given)[:40]!r}; give how much RAM there is, like '32 GiB'")
    return ram, rates


def _cards(gpu) -> tuple[tuple[Gpu, ...], int | None, hardware.Machine | None]:
    """Cards, the RAM that comes with them (None: no limit), and the computer where it is a certain one."""
    if isinstance(gpu, hardware.Machine):
        return gpu.cards, _usable_ram(gpu), gpu
    if gpu is None or (isinstance(gpu, (list, tuple)) and not gpu) or isinstance(gpu, str) and gpu.strip().lower() == "none":
        return (), _usable_ram(hardware.this_machine()), hardware.this_machine()
    if isinstance(gpu, (list, tuple)):
        return tuple(catalog.gpu(g) for g in gpu), None, None
    return (catalog.gpu(gpu),), None, None


def _usable_ram(machine: hardware.Machine) -> int:
    """RAM of a computer in bytes, or what its container allows."""
    return min(machine.ram_total, machine.ram_limit or machine.ram_total)


# ---- one report ---------------------------------------------------------------------------------------------

def _report(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, host: int | None,
            machine: hardware.Machine | None = None, rates: Rates = USUAL) -> Report:
    if s.split is not None and len(s.split) != len(cards):
        raise LabError(f"split names {len(s.split)} shares for {len(cards)} cards; give one each")
    if host and any(card.unified and card.free is None and card.memory > host for card in cards):   # sold with less
        cards = tuple(replace(card, memory=host) if card.unified and card.memory > host else card for card in cards)
    w = weights(spec, s.quant, s.importance)
    c = cache_bytes(spec, s.context, s.kv, engine=s.engine, sequences=s.sequences,
                    ubatch=s.batch if s.engine == "vllm" else s.micro, flash_attention=s.flash_attention,
                    swa_full=s.swa_full, unified=s.unified, drafted=rows_drafted(spec, s))
    ask = Question(spec, cards, s, w, c, host, machine, _here(machine, cards), rates)
    everything = len(spec.layers) + 1
    if s.engine != "llama.cpp":
        return _judged(ask, everything if cards else 0, _whole(ask))
    wanted = 0 if not cards else everything if s.gpu_layers == "auto" else s.gpu_layers
    if s.n_cpu_moe == "auto":
        ask = ask.with_experts_out(fewest_experts_out(ask, wanted))
    report = None if s.gpu_layers == "auto" and ask.surely_too_large(wanted) else _judged(ask, wanted, _placed(ask, wanted))
    if report is None or s.gpu_layers == "auto" and any(
            d.verdict == "does not fit" for name, d in report.devices.items() if name != "host"):
        most = most_layers(ask)
        report = _judged(ask, most, _placed(ask, most), partial=True)
    return report if s.n_cpu_moe != "auto" else replace(report, settings=s)


def _here(machine: hardware.Machine | None, cards: tuple[Gpu, ...]) -> Here:
    """What is known of the very computer: its processor, and the contexts its calibration measured."""
    if machine is None:
        return NOWHERE
    if machine.calibration is None:
        return Here(machine.cpu.features)
    contexts, workspaces = machine.calibration.context_bytes, machine.calibration.workspace_bytes
    return Here(machine.cpu.features, tuple((c.name, Measured(contexts[c.name], workspaces.get(c.name)))
                                            for c in cards if c.name in contexts))


def _placed(ask: Question, layers: int) -> list[Term]:
    compute = ask.compute(layers, ask.s.n_cpu_moe)
    terms = placed_terms(ask.spec, ask.cards, ask.s, ask.w, ask.c, layers, ask.here, compute)
    return terms + beside_terms(ask.spec, ask.cards, ask.s, layers) if anything(ask.s) else terms


def _whole(ask: Question) -> list[Term]:
    if ask.s.engine == "vllm":
        check_parallel(ask.spec, ask.cards)
        return vllm_terms(ask.spec, ask.cards, ask.s, ask.c, ask.measured)
    return whole_terms(ask.spec, ask.cards, ask.s, ask.c, ask.here)


def _judged(ask: Question, gpu_layers: int, terms: list[Term], partial: bool = False) -> Report:
    spec, cards, s = ask.spec, ask.cards, ask.s
    sums = {f"gpu{i}": [0, 0, 0] for i in range(len(cards))} | {"host": [0, 0, 0]}
    for t in terms:
        mine = sums[t.device]
        mine[0] += t.bytes
        mine[1] += t.low
        mine[2] += t.high
    reserved = reservations(cards, s, terms, ask.measured) if s.engine == "vllm" else ()
    devices = {}
    for i, card in enumerate(cards):
        free = reserved[i].room(free_bytes(card)) if reserved else free_bytes(card)
        devices[f"gpu{i}"] = Device(f"gpu{i}", card.name, card.memory, free, *sums[f"gpu{i}"])
    twice = ask.w.tied if gpu_layers else 0
    held, copied = (sum(t.low for t in terms if t.device == "host" and t.name == name) for name in ("weights", "repacked"))
    devices["host"] = _host_device(cards, devices, ask.host, (*sums["host"], min(held, copied)), twice)
    verdicts = [d.verdict for d in devices.values()] + [r.starts for r in reserved]
    # a partial report says how much goes on the cards; the question was whether all of it does
    verdict = "does not fit" if partial else next(v for v in ("does not fit", "may spill", "fits") if v in verdicts)
    return Report(spec, cards, s, tuple(terms), devices, gpu_layers, verdict, _speed(ask, gpu_layers, devices), ask.host,
                  partial, s.n_cpu_moe, ask.machine, reserved, ask.rates)


def _host_device(cards: tuple[Gpu, ...], on_cards: dict[str, Device], host: int | None, sums: tuple[int, int, int, int],
                 twice: int) -> Device:
    """RAM: what the system leaves of it; where a card shares it, also less what the model holds as card memory.

    `sums`: bytes used, their low and high, and what is returned. `twice`: bytes of a table that is both embedding and output.
    Metal and the CPU map the same pages of the file.
    """
    shared = next((i for i, card in enumerate(cards) if card.unified), None)
    if shared is not None:
        card, device = cards[shared], on_cards[f"gpu{shared}"]
        capacity = min(card.memory, host or card.memory)
        # what the system keeps from the card is still RAM; the rest of what the card holds is not
        mine = device.used - (card.reserved[1] if card.free is None else 0) - (twice if card.vendor == "Apple" else 0)
        return Device("host", "RAM (the same memory)", capacity, max(capacity - min(HOST_RESERVE, capacity // 8) - mine, 0),
                      *sums)
    if host is None:
        return Device("host", "RAM", 0, max(sums), *sums)
    return Device("host", "RAM", host, left_to_models(host), *sums)


def left_to_models(host: int) -> int:
    """Bytes of RAM without what the system itself keeps."""
    return max(host - min(HOST_RESERVE, host // 8), 0)


def _speed(ask: Question, gpu_layers: int, devices: dict[str, Device]) -> Speed:
    """How fast it goes with the blocks where they lie, and what a device is too small for."""
    where = assignment(ask.spec, ask.cards, ask.s, gpu_layers)
    over = tuple(max(0, d.used - d.free) for name, d in devices.items() if name != "host")
    host = devices["host"]
    short = max(0, host.needed - host.free) if host.capacity else 0
    return speed(ask.spec, ask.s, ask.w, ask.c, ask.cards, where, ask.rates, over, short)


__all__ = ["Device", "Place", "QUANT_LADDER", "Report", "fit", "left_to_models", "place"]
