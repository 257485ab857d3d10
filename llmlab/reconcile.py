"""Predicted against measured: run what a report is about, lay both side by side, term by term.

llama.cpp prints its own buffers; transformers' tensors are counted as they are made and freed. Both run in a process of
their own (`probes`), so that a crash is one line and the peaks are theirs alone.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from . import hardware, probes
from .activations import ITEM, attention, prompt_tokens
from .catalog import Table
from .errors import BadFile, LabError
from .fitting import Report
from .probes.llama import on_host
from .shapes import ModelSpec, model_spec
from .units import MIB, format_bytes

PRINTED = 0.00501 * MIB       # llama.cpp prints MiB with two decimals
PROMPT, WRITTEN = 512, 16     # tokens of a timed run
_WHOLE = ("resident", "loading")        # rows about the process as a whole: no terms, and in no sum


@dataclass(frozen=True, slots=True)
class Row:
    """One thing predicted and measured, in bytes (`unit` "bytes") or tokens per second ("tokens/s").

    `kind` is how it was predicted, "exact" or "modelled" between `low` and `high`. `measured` is None where `how` says why it
    could not be; `predicted` is None for what only shows once it runs. `within`: an exact one agrees to `tolerance`, a
    modelled one is in its band; None where nothing can be said.
    """

    term: str
    device: str
    predicted: float | None
    kind: str
    low: float
    high: float
    measured: float | None
    how: str
    why: str
    unit: str = "bytes"
    tolerance: float = 0.0

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured, 0 where they differ by no more than can be measured; None where one is missing."""
        if not self.measured or self.predicted is None:
            return None
        off = self.predicted - self.measured
        return off / self.measured if abs(off) > self.tolerance else 0.0

    @property
    def within(self) -> bool | None:
        if self.measured is None or self.predicted is None or self.term in _WHOLE:
            return None
        return self.low - self.tolerance <= self.measured <= self.high + self.tolerance

    def to_dict(self) -> dict:
        return asdict(self) | {"error": self.error, "within": self.within}


@dataclass(frozen=True)
class Check:
    """What a report predicted and what this computer then showed. `ran` says what was run; `facts` holds the rest measured."""

    report: Report
    path: str | None
    ran: str
    rows: tuple[Row, ...]
    facts: dict

    @property
    def bytes(self) -> tuple[Row, ...]:
        """The rows that are memory, each counted once in a sum."""
        return tuple(r for r in self.rows if r.unit == "bytes" and r.term not in _WHOLE)

    def row(self, term: str, device: str = "host") -> Row:
        """One row. Raises LabError where there is none."""
        for row in self.rows:
            if (row.term, row.device) == (term, device):
                return row
        raise LabError(f"no {term} on {device} was compared; there are "
                       f"{', '.join(f'{r.term} on {r.device}' for r in self.rows)}")

    @cached_property
    def answer(self) -> str:
        """One or two sentences: how far prediction was from measurement, and which terms left their band."""
        both = [r for r in self.bytes if r.measured is not None and r.predicted is not None]
        predicted, measured = sum(r.predicted for r in both), sum(r.measured for r in both)
        off = f", {abs(predicted - measured) / measured:.1%} {'more' if predicted > measured else 'less'}" if (
            measured and abs(predicted - measured) / measured >= 5e-4) else ", the same to a tenth of a per cent"
        said = f"{self.ran} used {format_bytes(measured)} where {format_bytes(predicted)} was predicted{off}."
        wrong = [r for r in both if not r.within]
        if not wrong:
            return said + " Every exact term agrees, and every modelled one is in its band."
        return said + " Outside: " + "; ".join(
            f"{_words(r.term)} on {_device(r.device)} is {format_bytes(r.measured)} where "
            + (f"{format_bytes(r.predicted)} was called exact" if r.kind == "exact" else
               f"{format_bytes(r.low)} to {format_bytes(r.high)} was predicted") for r in wrong) + "."

    def figure(self):
        """Predicted with its band beside measured, a bar a term (plotly)."""
        from .lab.figures import measured_figure
        return measured_figure(self)

    @cached_property
    def table(self) -> Table:
        """The rows as text: sizes in MiB, speeds in tokens per second."""
        return Table({"device": r.device, "term": r.term, "predicted": _shown(r, r.predicted), "band": _band(r),
                      "measured": _shown(r, r.measured), "error": "" if r.error is None else f"{r.error:+.1%}",
                      "within": {True: "yes", False: "no", None: ""}[r.within], "measured by": r.how, "why": r.why}
                     for r in self.rows)

    def to_frame(self):
        """The rows as a pandas DataFrame of plain numbers. Raises LabError where pandas is not installed."""
        return Table(r.to_dict() for r in self.rows).to_frame()

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return {"model": self.report.spec.name, "engine": self.report.settings.engine, "path": self.path, "answer": self.answer,
                "rows": [r.to_dict() for r in self.rows], "facts": self.facts}

    def __repr__(self) -> str:
        return f"<measured: {self.answer}>"

    def _repr_html_(self) -> str:
        from html import escape
        return f"<p>{escape(self.answer)}</p>{self.table._repr_html_()}"


def _words(term: str) -> str:
    return term.replace("_", " ").replace("kv", "KV")


def _device(name: str) -> str:
    return "the host" if name == "host" else name


def _shown(row: Row, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / MIB:,.2f} MiB" if row.unit == "bytes" else f"{value:,.1f} tokens/s"


def _band(row: Row) -> str:
    if row.predicted is None or row.low == row.high:
        return ""
    scale = MIB if row.unit == "bytes" else 1
    return f"{row.low / scale:,.1f} to {row.high / scale:,.1f}"


def measured(report: Report, file=None, *, timeout: float | None = None) -> Check:
    """Run what `report` is about on this computer and lay predicted and measured side by side: `llmlab.measured`.

    file: a GGUF for llama.cpp; for transformers a folder of safetensors, a GGUF (which it unpacks) or None, which fills
    the shapes with random numbers. The settings are the report's, all of them. `timeout` in seconds stops a run that takes
    longer. Raises LabError (the engine is not installed, the report is for a card that is not here, the RAM is too small,
    the engine failed) and BadFile (the file is missing or holds another model).
    """
    if not isinstance(report, Report):
        raise LabError(f"measured() takes a report of llmlab.fit, not {type(report).__name__}")
    engine = report.settings.engine
    if engine not in _ENGINES:
        raise LabError(f"{engine} cannot be measured from here; measure a report with engine='llama.cpp' or 'transformers'")
    if timeout is not None and not (isinstance(timeout, (int, float)) and 0 < timeout < math.inf):
        raise LabError(f"timeout is {str(timeout)[:40]!r}; give seconds, like 60, or leave it out")
    here = hardware.machine()
    cards = _cards_here(report, here)
    path = None if file is None else _path(file)
    return _ENGINES[engine](report, path, cards, here, timeout)


def _path(file) -> Path:
    try:
        path = Path(file).expanduser()
    except (TypeError, RuntimeError):            # no path, or the home of somebody who is not here
        path = None
    if path is None or not path.exists():
        raise BadFile(f"{str(file)!r:.200} is not there; give a model's path, such as llmlab.fetch('smollm2-135m') returns")
    return path


def _cards_here(report: Report, here: hardware.Machine) -> list[int]:
    """Which of this computer's cards the report is about, in its order."""
    found: list[int] = []
    for card in report.cards:
        at = next((i for i, live in enumerate(here.cards) if live.id == card.id and i not in found), None)
        if at is None:
            has = " and ".join(c.name for c in here.cards) or "no graphics card"
            raise LabError(f"the report is for {card.name}, and this computer has {has}; to measure here, fit with gpu=None or "
                           "gpu=llmlab.machine()")
        found.append(at)
    return found


def _enough_ram(report: Report, here: hardware.Machine, needed: float) -> None:
    if needed > here.ram_available:
        raise LabError(f"{report.spec.title} with these settings needs {format_bytes(needed)} of RAM and "
                       f"{format_bytes(here.ram_available)} are free now; close something, or shorten the context")


def _same_model(report: Report, file: ModelSpec, path: Path) -> None:
    """Raise BadFile unless the file holds the model of the report, tensor by tensor."""
    mine, theirs = report.spec, file
    if mine.architecture != theirs.architecture:
        raise BadFile(f"{path.name} is a {theirs.architecture} model and the report is about {mine.title}, "
                      f"{mine.architecture}; fit the file itself: llmlab.fit(path, ...)")

    def shapes(spec: ModelSpec) -> dict[str, tuple]:
        return {t.name: t.shape for t in spec.tensors if not t.name.startswith("rope_") and not spec.is_mtp(t)}
    one, other = shapes(mine), shapes(theirs)
    if one != other:
        name = next(n for n in sorted(one.keys() | other.keys()) if one.get(n) != other.get(n))
        raise BadFile(f"{path.name} is another model than the report's {mine.title} ({len(other)} tensors and {len(one)}; "
                      f"{name} is {other.get(name, 'not there')} and {one.get(name, 'not there')}); fit the file itself: "
                      "llmlab.fit(path, ...)")


# ---- rows ---------------------------------------------------------------------------------------------------------

def _predicted(report: Report) -> dict[tuple[str, str], list]:
    """(term, device) -> [bytes, low, high, kind, why], terms of one name and device added up."""
    found: dict[tuple[str, str], list] = {}
    for t in report.terms:
        if (key := (t.name, t.device)) in found:
            mine = found[key]
            found[key] = [mine[0] + t.bytes, mine[1] + t.low, mine[2] + t.high,
                          "exact" if mine[3] == t.kind == "exact" else "modelled", f"{mine[4]}; {t.why}"]
        else:
            found[key] = [t.bytes, t.low, t.high, t.kind, t.why]
    return found


def _memory_rows(report: Report, seen: dict[tuple[str, str], tuple[float | None, str]],
                 tolerance: Callable[[str], float]) -> list[Row]:
    """A row for each term of the report, and for what was measured beside it; nothing on either side is no row."""
    rows = []
    predicted = _predicted(report)
    for (name, device), (size, low, high, kind, why) in predicted.items():
        got, how = seen.get((name, device), (None, "not seen from outside"))
        if size or high or got:
            rows.append(Row(name, device, size, kind, low, high, got, how, why, tolerance=tolerance(name)))
    rows += [Row(name, device, 0, "exact", 0, 0, got, how, "nothing of this was predicted", tolerance=tolerance(name))
             for (name, device), (got, how) in seen.items() if (name, device) not in predicted and got]
    return rows


def _speed_rows(report: Report, run: dict) -> list[Row]:
    """Speeds beside the band for what the cache held then, which is less than the report's full context."""
    held = run["prompt"] + run["written"]
    s = report.settings
    changes = {"gpu_layers": report.gpu_layers} if s.engine == "llama.cpp" else {}
    try:
        speed = report.with_(context=max(min(held * s.sequences, s.context), s.sequences), **changes).speed
    except LabError:
        speed = report.speed
    rows = []
    busy = f", on a busy machine (load {run['others']:.1f})" if run.get("others", 0) > (os.cpu_count() or 1) / 2 else ""
    for name, rates, got, what in (
            ("prefill", speed.prefill_tps, run["prefill_tps"], f"a prompt of {run['prompt']} tokens, the weights in memory"),
            ("decode", speed.decode_tps, run["decode_tps"], f"{run['written']} tokens after {run['prompt']}")):
        if got:
            low, best, high = rates or (0.0, None, 0.0)
            rows.append(Row(name, "all", best, "modelled", low, high, got, what + busy, f"for {held} tokens in the cache",
                            unit="tokens/s"))
    return rows


# ---- llama.cpp ----------------------------------------------------------------------------------------------------

_KINDS = {"model": "weights", "KV": "kv_cache", "RS": "recurrent", "compute": "compute", "output": "output"}


def _llama(report: Report, path: Path | None, cards: list[int], here: hardware.Machine, timeout: float | None) -> Check:
    s = report.settings
    if path is None:
        raise LabError("llama.cpp runs a file; give measured() a GGUF, such as llmlab.fetch('smollm2-135m') returns")
    file = model_spec(path)
    if file.stored is None:
        raise BadFile(f"{path} is no GGUF; llama.cpp runs nothing else. For this folder fit with engine='transformers'")
    _same_model(report, file, path)
    if s.quant != file.stored:
        raise BadFile(f"{path.name} is stored in {file.stored} and the report is about {s.quant}; fit the file itself: "
                      "llmlab.fit(path, ...), or make the quant first")
    if beside := [name for name in ("projector", "draft", "mtp") if getattr(s, name)]:
        raise LabError(f"a {beside[0]} beside the model cannot be measured yet; measure the report without it")
    _enough_ram(report, here, report.devices["host"].used)
    job = {"engine": "llama.cpp", "path": file.path or str(path), "cards": cards, "gpu_layers": report.gpu_layers,
           "n_cpu_moe": report.n_cpu_moe, "split": s.split, "context": s.context, "batch": s.batch, "ubatch": s.ubatch,
           "kv": s.kv,
           "flash_attention": s.flash_attention, "swa_full": s.swa_full, "unified": s.unified, "sequences": s.sequences,
           "threads": here.cpu.usable, "prompt": PROMPT, "written": WRITTEN}
    run = probes.ask("llama", job, timeout)
    seen = _llama_seen(run, cards)
    rows = _memory_rows(report, seen, lambda name: 2 * PRINTED)
    rows.append(Row("resident", "host", None, "modelled", 0, 0, run["resident"],
                    "most resident memory of the process, less what it had before loading",
                    "pages of the terms above that a short prompt never touched do not count; code and tokenizer do"))
    return Check(report, str(path), "llama.cpp", tuple(rows + _speed_rows(report, run)), run)


def _llama_seen(run: dict, cards: list[int]) -> dict[tuple[str, str], tuple[float | None, str]]:
    """What llama.cpp printed, in our names: {(term, device): (bytes, how)}. A buffer is named after its card: CUDA1."""
    sums: dict[tuple[str, str], float] = {}
    names: dict[tuple[str, str], list[str]] = {}
    for name, kind, size in run["buffers"]:
        number = re.search(r"\d+", name)
        at = int(number[0]) if number else 0
        device = "host" if on_host(name) else f"gpu{cards.index(at) if at in cards else 0}"
        term = "repacked" if name == "CPU_REPACK" else _KINDS[kind]
        sums[term, device] = sums.get((term, device), 0) + size
        names.setdefault((term, device), []).append(name)
    seen = {key: (size, f"printed by llama.cpp ({', '.join(dict.fromkeys(names[key]))})") for key, size in sums.items()}
    if not run["mapped"]:            # read, not mapped: what is repacked is no copy
        both = sum(seen.pop((term, "host"), (0, ""))[0] for term in ("weights", "repacked"))
        seen["weights", "host"] = (both, "printed by llama.cpp, the file read and not mapped")
        seen["repacked", "host"] = (None, "there is no copy where the file is read and not mapped")
    elif ("repacked", "host") in seen:       # the mapped range leaves out repacked tensors at its ends
        seen["weights", "host"] = (run["tensors"], "bytes of the tensors that llama.cpp mapped (llama_model_size)")
    for i, at in enumerate(cards):
        used = run["used"][at] if at < len(run["used"]) else None
        if used is not None:
            buffers = sum(size for (_, device), (size, _) in seen.items() if device == f"gpu{i}")
            seen["overhead", f"gpu{i}"] = (max(used - buffers, 0), "free memory of the card before and after, less the buffers")
    for term in ("weights", "kv_cache", "recurrent", "repacked", "output"):        # what is not printed is not there
        for device in ("host", *(f"gpu{i}" for i in range(len(cards)))):
            seen.setdefault((term, device), (0, "llama.cpp prints none"))
    return seen


# ---- transformers -------------------------------------------------------------------------------------------------

def _whole(report: Report, path: Path | None, cards: list[int], here: hardware.Machine, timeout: float | None) -> Check:
    s, spec = report.settings, report.spec
    if len(cards) > 1:
        raise LabError("transformers over several cards cannot be measured yet; measure a report for one card")
    if {*s.kv} - {"f32", "f16", "bf16"}:
        raise LabError(f"transformers keeps a {s.kv[0]} cache only through another package; measure a report with kv='f16'")
    quant = s.quant if s.quant not in ITEM else None
    if path is not None:
        _same_model(report, model_spec(path), path)
        if path.is_dir() and not any(path.glob("*.safetensors")):
            raise BadFile(f"{path} holds no safetensors; give a folder of them, a GGUF, or no file for random weights")
    elif spec.config is None:
        raise LabError(f"{spec.title} has no config to fill with random numbers; give its file or folder")
    if quant and (path is None or path.is_file()):
        raise LabError(f"{quant} is made from a folder of safetensors as it loads; give one, or measure BF16")
    if not cards:
        _enough_ram(report, here, report.devices["host"].used + 2**28)
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[spec.dtype if quant else s.quant]
    job = {"engine": "transformers", "path": None if path is None else str(path), "cards": cards, "quant": quant,
           "config": None if spec.config is None else dict(spec.config), "dtype": dtype,
           "attention": attention(spec, s.flash_attention), "batch": s.sequences,
           "tokens": prompt_tokens(s.context, s.sequences), "written": WRITTEN, "threads": here.cpu.usable}
    run = probes.ask("whole", job, timeout)
    device = "gpu0" if cards else "host"
    peak = max(run["prefill"], run["decode"])
    step = "prefill" if run["prefill"] >= run["decode"] else "decode"
    counter = "torch's allocator" if cards else "tensors followed as they come and go"
    seen = {("weights", device): (run["weights"], "storages of the parameters"),
            ("kv_cache", device): (run["cache"], "storages of keys and values, the context full"),
            ("recurrent", device): (run["state"], "storages of the states"),
            ("compute", device): (peak - run["cache"] - run["state"],
                                  f"{counter}: the peak of the {step}, in {run[f'{step}_at']}, less the cache")}
    if cards and run["used"][cards[0]] is not None:
        seen["overhead", device] = (max(run["used"][cards[0]] - run["reserved"], 0),
                                    "free memory of the card before and after, less what torch reserved")
    # scales and tables that are no parameters: a few numbers a layer
    rows = _memory_rows(report, seen, lambda name: 1e-4 * run["weights"] if name == "weights" and quant else 0.0)
    if not cards:
        growth = sum(t.bytes for t in report.terms if t.name in ("kv_cache", "recurrent", "compute"))
        rows.append(Row("resident", "host", growth, "modelled", growth, growth, run["resident"],
                        "most resident memory while it runs, less what it had once loaded",
                        "cache and compute; beside tensors it holds what kernels take inside (packed matrices, attention) and "
                        "what the allocator keeps"))
    rows.append(Row("loading", "host", None, "modelled", 0, 0, run["load"], "most resident memory while loading, less before",
                    "the checkpoint's mapped pages count beside the parameters; the system takes them back"))
    timed = run | {"prompt": job["tokens"], "written": WRITTEN}
    return Check(report, None if path is None else str(path), "transformers", tuple(rows + _speed_rows(report, timed)), run)


_ENGINES = {"llama.cpp": _llama, "transformers": _whole}

__all__ = ["Check", "Row", "measured"]
