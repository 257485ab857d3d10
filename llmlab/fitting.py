"""What fits: weights, cache, compute and overhead on each device, the verdict, and which layers go where.

llmlab.fit() builds a Report; the inverse questions (largest context, best quant) ask it again with other settings.
Everything is arithmetic over cached shapes: a report takes well under a millisecond.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from . import catalog, hardware
from .catalog import Gpu
from .errors import LabError, UnknownName
from .formats.mixes import MIXES, find_mix
from .memory import (
    CONTEXT_OVERHEAD,
    REPACKED,
    CacheBytes,
    Term,
    Weights,
    cache_bytes,
    cache_types,
    check_settings,
    compute_bytes,
    default_quant,
    exact,
    host_compute_bytes,
    loaded_bytes,
    modelled,
    output_bytes,
    weights,
)
from .shapes import ModelSpec, model_spec
from .speed import Speed, speed
from .units import MIB, format_bytes, parse_bytes

HOST_RESERVE = 2 * 1024 * MIB     # RAM the system itself keeps, where the host is a hypothetical one
DESKTOP_DISPLAY = 850 * MIB       # a desktop's own use of its card, usual; data/overheads.csv disp-linux-desktop
QUANT_LADDER = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_L", "Q3_K_M", "IQ3_M", "Q3_K_S",
                "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
"""From faithful to desperate: what best_quant() tries, in this order."""


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
class Settings:
    """Everything a report depends on besides the model and the cards."""

    quant: str
    context: int = 8192
    kv: tuple[str, str] = ("f16", "f16")
    engine: str = "llama.cpp"
    gpu_layers: int | str = "auto"
    n_cpu_moe: int = 0
    split: tuple[float, ...] | None = None
    sequences: int = 1
    batch: int = 2048
    ubatch: int = 512
    flash_attention: bool = True
    importance: bool = False
    swa_full: bool = False
    unified: bool = False


@dataclass(frozen=True)
class Report:
    """Whether a model fits, device by device, term by term.

    `gpu_layers` counts as llama.cpp does: blocks, and the output as one more. `terms` are exact or modelled and say so.
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
        """The same question with other settings: `report.with_(context=32768)`."""
        changes = _checked(self.spec, {**self.settings.__dict__, **changes})
        return _report(self.spec, self.cards, changes, self.host)

    # ---- the inverse questions --------------------------------------------------------------------------

    def largest_context(self) -> int:
        """The longest context, a multiple of 256, with which this still gets its verdict "fits" (0: none does).

        Searched up to the context the model was trained for, all layers where `gpu_layers` says.
        """
        top = max(self.spec.context_train or self.settings.context, 256) // 256
        low, high = 0, top
        while low < high:
            middle = (low + high + 1) // 2
            if self.with_(context=middle * 256).fits:
                low = middle
            else:
                high = middle - 1
        return low * 256

    def best_quant(self, ladder: Sequence[str] = QUANT_LADDER) -> str | None:
        """The first quant of `ladder` with which this fits, or None.

        Quants that cannot hold the model's widths are passed over.
        """
        for quant in ladder:
            try:
                if self.with_(quant=quant).fits:
                    return quant
            except LabError:
                continue
        return None

    # ---- in words, figures and tables -------------------------------------------------------------------

    @cached_property
    def answer(self) -> str:
        """One or two sentences: the verdict, what it rests on, and what to do."""
        return _answer(self)

    def figure(self):
        """A stacked bar a device, against its capacity (plotly)."""
        from .lab.figures import fit_figure
        return fit_figure(self)

    def to_frame(self):
        """The terms as a pandas DataFrame. Raises LabError where pandas is not installed."""
        return self.table.to_frame()

    @cached_property
    def table(self) -> catalog.Table:
        """The terms as rows."""
        return catalog.Table([{"device": t.device, "term": t.name, "GiB": round(t.bytes / 2**30, 3), "kind": t.kind,
                               "why": t.why} for t in self.terms])

    def to_dict(self) -> dict:
        """What `llmlab fit --json` prints."""
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


def fit(spec, gpu=None, quant: str | None = None, context: int = 8192, kv: str | tuple[str, str] = "f16",
        engine: str = "llama.cpp", gpu_layers: int | str = "auto", n_cpu_moe: int = 0, split=None, host=None,
        sequences: int = 1, batch: int = 2048, ubatch: int = 512, flash_attention: bool = True, importance: bool = False,
        swa_full: bool = False, unified: bool = False) -> Report:
    """Will it fit? `llmlab.fit`.

    spec: a ModelSpec or anything llmlab.model takes. gpu: a card, its name, a list of them, a Machine (its cards and its
    RAM), or None for the host alone. quant None: as stored in a GGUF, Q4_K_M for a config. host: RAM in bytes
    or words ("32 GiB"); None: this computer's where gpu is None or a Machine, otherwise unlimited, as llama.cpp treats it.
    context is what all sequences share. Raises LabError in one line for anything that cannot be.
    """
    spec = model_spec(spec)
    cards, ram = _cards(gpu)
    if host is not None:
        ram = parse_bytes(host)
    given = dict(quant=quant, context=context, kv=kv, engine=engine, gpu_layers=gpu_layers, n_cpu_moe=n_cpu_moe, split=split,
                 sequences=sequences, batch=batch, ubatch=ubatch, flash_attention=flash_attention, importance=importance,
                 swa_full=swa_full, unified=unified)
    return _report(spec, cards, _checked(spec, given), ram)


def _cards(gpu) -> tuple[tuple[Gpu, ...], int | None]:
    """Cards, and the RAM that comes with them (None: unlimited)."""
    if gpu is None:
        return (), _this_ram()
    if isinstance(gpu, hardware.Machine):
        return gpu.cards, _usable_ram(gpu)
    if isinstance(gpu, (list, tuple)):
        return tuple(catalog.gpu(g) for g in gpu), None
    return (catalog.gpu(gpu),), None


@cache
def _this_ram() -> int:
    return _usable_ram(hardware.machine())


def _usable_ram(machine: hardware.Machine) -> int:
    """RAM of a computer in bytes, or what its container allows."""
    return min(machine.ram_total, machine.ram_limit or machine.ram_total)


def _checked(spec: ModelSpec, given: dict) -> Settings:
    """Settings that make sense, or LabError; ubatch is no larger than batch, as llama.cpp has it."""
    check_settings(given["context"], given["sequences"], given["batch"], given["ubatch"])
    quant = default_quant(spec, given["quant"])
    if quant != spec.stored:
        quant = find_mix(quant).name
        _belongs(MIXES[quant].engine, quant, given["engine"])
    layers, count = given["gpu_layers"], len(spec.layers) + 1
    if layers != "auto" and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 0):
        raise LabError(f"gpu_layers is {layers!r:.40}; give 'auto' or a number from 0 to {count} (blocks, and the output)")
    moe = given["n_cpu_moe"]
    if isinstance(moe, bool) or not isinstance(moe, int) or moe < 0:
        raise LabError(f"n_cpu_moe is {moe!r:.40}; give how many blocks keep their experts on the host, 0 to {count - 1}")
    split = given["split"]
    if split is not None:
        try:
            split = tuple(float(part) for part in split)
        except (TypeError, ValueError):
            split = ()
        if not split or min(split) < 0 or not 0 < sum(split) < float("inf"):
            raise LabError(f"split is {given['split']!r:.60}; give one share a card, like (3, 1)")
    return Settings(**{**given, "quant": quant, "ubatch": min(given["ubatch"], given["batch"]), "kv": cache_types(given["kv"]), "split": split,
                       "gpu_layers": layers if layers == "auto" else min(layers, count)})


def _belongs(made_for: str, quant: str, engine: str) -> None:
    floating = quant in ("F32", "F16", "BF16")
    if engine == "llama.cpp" and made_for != "llama.cpp":
        raise LabError(f"llama.cpp cannot run {quant}; choose Q4_K_M, or engine={made_for!r}")
    if engine == "transformers" and made_for != "transformers" and not floating:
        raise LabError(f"transformers unpacks {quant} to 16 bits; choose NF4, INT8 or BF16, or engine='llama.cpp'")
    if engine == "vllm" and made_for == "llama.cpp" and not floating:
        raise LabError(f"vLLM runs {quant} only experimentally; choose AWQ_INT4, FP8 or BF16, or engine='llama.cpp'")


# ---- one report ---------------------------------------------------------------------------------------------

def _report(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, host: int | None) -> Report:
    w = weights(spec, s.quant, s.importance)
    c = cache_bytes(spec, s.context, s.kv, engine=s.engine, sequences=s.sequences, ubatch=s.ubatch,
                    flash_attention=s.flash_attention, swa_full=s.swa_full, unified=s.unified)
    if s.split is not None and len(s.split) != len(cards):
        raise LabError(f"split names {len(s.split)} shares for {len(cards)} cards; give one each")
    if s.engine != "llama.cpp" and cards:
        place = len(spec.layers) + 1
        return _judged(spec, cards, s, w, c, host, place, _loaded_whole(spec, cards, s, c))
    if not cards:
        return _judged(spec, cards, s, w, c, host, 0, _placed(spec, cards, s, w, c, 0))
    if s.gpu_layers != "auto":
        return _judged(spec, cards, s, w, c, host, s.gpu_layers, _placed(spec, cards, s, w, c, s.gpu_layers))
    everything = len(spec.layers) + 1
    whole = _judged(spec, cards, s, w, c, host, everything, _placed(spec, cards, s, w, c, everything))
    if whole.verdict != "does not fit":
        return whole
    low, high = 0, everything - 1
    room = [_free(card) - overhead_high(card) for card in cards]
    while low < high:
        middle = (low + high + 1) // 2
        if all(need <= space for need, space in zip(_needs(spec, cards, s, w, c, middle), room, strict=True)):
            low = middle
        else:
            high = middle - 1
    partly = _judged(spec, cards, s, w, c, host, low, _placed(spec, cards, s, w, c, low))
    return replace(partly, verdict="does not fit")   # the question was whether all of it goes on the cards


def _free(card: Gpu) -> int:
    """Bytes a model may use: what is free on a live card, all of a catalogued one (overhead is its own term)."""
    return card.memory if card.free is None else card.free


def _assignment(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, gpu_layers: int) -> list[int]:
    """The card of each block and, last, of the output; -1 is the host. llama.cpp's rule: the last layers first, spread
    over the cards by the cumulative split (free memory where none is given)."""
    count = len(spec.layers)
    first = max(count + 1 - gpu_layers, 0)
    active = min(gpu_layers, count + 1)
    if len(cards) == 1:
        return [-1] * first + [0] * (count + 1 - first)
    shares = s.split or tuple(_free(card) for card in cards)
    total, cumulative, running = sum(shares) or 1, [], 0.0
    for share in shares:
        running += share
        cumulative.append(running / total)
    def card_of(i: int) -> int:
        at = (i - first) / active
        return next((k for k, edge in enumerate(cumulative) if at < edge), len(cards) - 1)
    return [card_of(i) if i >= first else -1 for i in range(count + 1)]


def _placed(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, w: Weights, c: CacheBytes, gpu_layers: int) -> list[Term]:
    """The terms of a llama.cpp run with that many layers on the cards."""
    count = len(spec.layers)
    where = _assignment(spec, cards, s, gpu_layers) if gpu_layers else [-1] * (count + 1)
    n = len(cards)
    held, cache, state = [0] * (n + 1), [0] * (n + 1), [0] * (n + 1)      # the last is the host
    for i, layer in enumerate(spec.layers):
        if layer.mtp:
            continue                     # in the file, not loaded unless drafting is on
        at = where[i]
        bytes = w.by_layer[i]
        if at >= 0 and i < s.n_cpu_moe:
            held[n] += w.experts_by_layer[i]
            bytes -= w.experts_by_layer[i]
        held[at] += bytes + (w.card_padding[i] if at >= 0 else 0)
        cache[at] += c.by_layer[i]
        state[at] += c.recurrent_by_layer[i]
    output_at = where[count]
    held[n] += w.embedding
    held[output_at] += w.output + w.card_padding[count] if output_at >= 0 else w.output - w.tied
    terms = []
    for i, card in enumerate(cards):
        device = f"gpu{i}"
        terms.append(exact("weights", device, held[i], "tensors of its layers, each padded as the file and the card pad it"))
        terms.append(exact("kv_cache", device, cache[i], _cache_why(spec, s, c)))
        if c.recurrent:
            terms.append(exact("recurrent", device, state[i], "float32 state of recurrent layers, a row a sequence"))
        if gpu_layers:
            terms.append(_compute_term(spec, s, w, device, with_output=i == output_at, output_on_host=output_at < 0,
                                       experts_on_host=s.n_cpu_moe > 0))
        terms.append(_overhead_term(card, device))
    terms.append(exact("weights", "host", held[n], "embedding, and the layers that stay in RAM (mapped from the file)"))
    terms.append(exact("kv_cache", "host", cache[n], _cache_why(spec, s, c)))
    if c.recurrent:
        terms.append(exact("recurrent", "host", state[n], "float32 state of recurrent layers, a row a sequence"))
    terms.append(_host_compute_term(spec, s, bool(cards and gpu_layers)))
    terms.append(exact("output", "host", output_bytes(spec, s.sequences), "logits, float32, one row a sequence"))
    if not cards and (copies := _repackable(spec, w)):
        terms.append(modelled("repacked", "host", 0, 0, copies,
                              "copies that the CPU backend may lay out for its kernels; the processor decides"))
    return terms


def overhead_high(card: Gpu) -> int:
    """The most bytes of a card that are not a model's to use."""
    return _overhead_term(card, "").high


def compute_high(spec: ModelSpec, context: int, ubatch: int) -> int:
    """The high estimate of the compute buffer on a card that holds the whole model, flash attention on."""
    return int(compute_bytes(spec, context, ubatch) * 1.1)


def _needs(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, w: Weights, c: CacheBytes, gpu_layers: int) -> list[int]:
    """Bytes, high estimate, that `gpu_layers` put on each card beside its overhead: the sums of `_placed`, cheaper."""
    count = len(spec.layers)
    if not gpu_layers:
        return [0] * len(cards)
    where = _assignment(spec, cards, s, gpu_layers)
    need = [0] * len(cards)
    for i in range(max(count + 1 - gpu_layers, 0), count):
        if not spec.layers[i].mtp:
            need[where[i]] += w.by_layer[i] + w.card_padding[i] + c.by_layer[i] + c.recurrent_by_layer[i] - (
                w.experts_by_layer[i] if i < s.n_cpu_moe else 0)
    if where[count] >= 0:
        need[where[count]] += w.output + w.card_padding[count]
    return [n + _compute_term(spec, s, w, "", k == where[count], where[count] < 0, s.n_cpu_moe > 0).high
            for k, n in enumerate(need)]


def _cache_why(spec: ModelSpec, s: Settings, c: CacheBytes) -> str:
    cells = f"{c.cells} cells" + (f", {c.cells_sliding} in sliding layers" if c.sliding else "")
    return f"{cells}, K {s.kv[0]}, V {s.kv[1]}"


def _repackable(spec: ModelSpec, w: Weights) -> int:
    return sum(size for tensor, type, size in zip(spec.tensors, w.types, w.bytes, strict=True)
               if type in REPACKED and len(tensor.shape) == 2 and tensor.name != "token_embd.weight")


def _compute_term(spec: ModelSpec, s: Settings, w: Weights, device: str, with_output: bool, output_on_host: bool,
                  experts_on_host: bool) -> Term:
    full = compute_bytes(spec, s.context, s.ubatch, s.flash_attention, s.sequences)
    least = 4 * min(s.context, s.ubatch) * 2 * spec.width
    copied = w.output if output_on_host else 0
    experts = w.largest_expert if experts_on_host else 0
    best = (full if with_output or output_on_host else max(least, full - 4 * min(s.context, s.ubatch) * spec.vocab)) + copied
    why = "worst graph of one ubatch: logits and activations, closed form"
    if copied:
        why += "; and the output matrix, copied to the card for large batches"
    return modelled("compute", device, best, min(least, best), max(best * 1.1, best + experts), why)


def _host_compute_term(spec: ModelSpec, s: Settings, beside_card: bool) -> Term:
    if beside_card:
        best = host_compute_bytes(spec, s.context, s.ubatch)
        return modelled("compute", "host", best, best * 0.9, best * 1.1, "mask and input of one ubatch, pinned")
    best = compute_bytes(spec, s.context, s.ubatch, s.flash_attention, s.sequences)
    return modelled("compute", "host", best, best * 0.9, best * 1.15, "worst graph of one ubatch, closed form")


def _overhead_term(card: Gpu, device: str) -> Term:
    """CUDA context; and for a catalogued card what the driver keeps and a desktop may use (a live card's free memory
    already leaves those out)."""
    low, best, high = CONTEXT_OVERHEAD
    if card.free is not None:
        return modelled("overhead", device, best, low, high, "driver context and kernels")
    kept_low, kept, kept_high = card.reserved
    display = DESKTOP_DISPLAY if card.kind in ("desktop", "laptop") and not card.unified else 0
    return modelled("overhead", device, best + kept, low + kept_low, high + kept_high + display,
                    "driver context and kernels, memory the driver keeps; at most also a desktop's own use")


def _loaded_whole(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, c: CacheBytes) -> list[Term]:
    """transformers and vLLM: everything on the cards, shared out evenly by layers."""
    n = len(cards)
    total = loaded_bytes(spec, s.quant)
    tokens = s.context if s.engine == "transformers" else min(s.context, max(s.batch, 2048))
    widest = max((b.ff or b.expert_ff * b.experts_used + b.shared_ff for b in spec.blocks), default=0)
    activations = 2 * tokens * (2 * widest + 6 * spec.width) + 4 * spec.vocab * s.sequences
    terms = []
    for i, card in enumerate(cards):
        device = f"gpu{i}"
        def share(bytes: int, i: int = i) -> int:
            return bytes * (i + 1) // n - bytes * i // n
        terms += [exact("weights", device, share(total), f"as {s.engine} holds them"),
                  exact("kv_cache", device, share(c.kv), _cache_why(spec, s, c))]
        if c.recurrent:
            terms.append(exact("recurrent", device, share(c.recurrent), "float32 state of recurrent layers, a row a sequence"))
        terms.append(modelled("compute", device, activations, activations * 0.5, activations * 2,
                              f"activations of {tokens} prompt tokens and one row of logits, in 16 bits"))
        terms.append(_overhead_term(card, device))
    terms.append(exact("weights", "host", 0, "nothing stays in RAM once loaded"))
    return terms


def _judged(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, w: Weights, c: CacheBytes, host: int | None,
            gpu_layers: int, terms: list[Term]) -> Report:
    sums: dict[str, list[int]] = {}
    for t in terms:
        mine = sums.setdefault(t.device, [0, 0, 0])
        mine[0] += t.bytes
        mine[1] += t.low
        mine[2] += t.high
    devices = {}
    for i, card in enumerate(cards):
        used, low, high = sums[f"gpu{i}"]
        devices[f"gpu{i}"] = Device(f"gpu{i}", card.name, card.memory, _free(card), used, low, high)
    used, low, high = sums["host"]
    unlimited = host is None
    capacity = 0 if unlimited else host
    free = used + high if unlimited else max(host - min(HOST_RESERVE, host // 8), 0)
    devices["host"] = Device("host", "RAM", capacity, free, used, low, high)
    verdicts = [d.verdict for d in devices.values()]
    verdict = next(v for v in ("does not fit", "may spill", "fits") if v in verdicts)
    return Report(spec, cards, s, tuple(terms), devices, gpu_layers, verdict, _speed(spec, cards, s, w, terms), host)


def _speed(spec: ModelSpec, cards: tuple[Gpu, ...], s: Settings, w: Weights, terms: list[Term]) -> Speed:
    """Bytes a token reads on each device: its weights by the active share, and its whole cache (the context full)."""
    held = {t.device: t.bytes for t in terms if t.name == "weights"}
    cache = {}
    for t in terms:
        if t.name in ("kv_cache", "recurrent"):
            cache[t.device] = cache.get(t.device, 0) + t.bytes
    host_held = max(held.get("host", 0) - w.embedding, 0)
    all_held = sum(v for k, v in held.items() if k != "host") + host_held or 1
    active = {k: w.active * (host_held if k == "host" else v) // all_held for k, v in held.items()}
    on_cards = tuple(active.get(f"gpu{i}", 0) + cache.get(f"gpu{i}", 0) for i in range(len(cards)))
    return speed(cards, on_cards, active.get("host", 0) + cache.get("host", 0), spec.params_active, host_held / all_held)


# ---- words --------------------------------------------------------------------------------------------------

def _answer(r: Report) -> str:
    s = r.settings
    what = f"{r.spec.title} in {s.quant} with {s.context:,} tokens of context"
    if not r.cards:
        d = r.devices["host"]
        where = f"this computer's {format_bytes(d.capacity, 1)} of RAM" if d.capacity else "RAM"
        return f"{what} {_says(r.verdict)} {where}: it needs {format_bytes(d.used)}.{_beyond(r)}"
    names = " and ".join(_grouped([c.name for c in r.cards]))
    fullest = max((d for k, d in r.devices.items() if k != "host"), key=lambda d: d.used / max(d.free, 1))
    if r.verdict == "does not fit" and s.gpu_layers == "auto" and s.engine == "llama.cpp":
        need = r.with_(gpu_layers=r.layers)
        used = sum(d.used for k, d in need.devices.items() if k != "host")
        have = sum(d.free for k, d in need.devices.items() if k != "host")
        text = f"{what} does not fit {names}: it needs {format_bytes(used)} of {format_bytes(have)}."
        kept = format_bytes(r.total("weights", "host"))
        text += (f" {r.gpu_layers} of {r.layers} layers go on the card, {kept} of weights stay in RAM." if r.gpu_layers
                 else " Not one layer goes on the card.")
        return text + _beyond(r)
    text = f"{what} {_says(r.verdict)} {names}: {format_bytes(fullest.used)} of {format_bytes(fullest.free)}"
    if r.verdict == "may spill":
        text += f", between {format_bytes(fullest.low)} and {format_bytes(fullest.high)}"
    if r.gpu_layers < r.layers:
        text += f", {r.gpu_layers} of {r.layers} layers on the card, {format_bytes(r.total('weights', 'host'))} in RAM"
    return f"{text}.{_beyond(r)}"


def _says(verdict: str) -> str:
    return {"fits": "fits", "may spill": "may or may not fit", "does not fit": "does not fit"}[verdict]


def _grouped(names: list[str]) -> list[str]:
    return [f"{names.count(n)} x {n}" if names.count(n) > 1 else n for n in dict.fromkeys(names)]


def _beyond(r: Report) -> str:
    trained = r.spec.context_train
    if trained and r.settings.context // r.settings.sequences > trained:
        return f" The model was trained for {trained:,} tokens; beyond that its answers decay."
    return ""


__all__ = ["Device", "QUANT_LADDER", "Report", "Settings", "UnknownName", "fit"]
