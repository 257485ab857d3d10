"""What came of a race: seconds of every round, and what follows from them: rates, ratios round by round, tables."""

from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from statistics import median
from typing import NamedTuple

from ..catalog import Table
from ..units import MIB, format_bytes, format_rate

PREFILL, DECODE, DEEP = "prefill", "decode", "deep"
PEER = "llama.cpp"


class Ratio(NamedTuple):
    """How many times as fast as another. `best`: of both one's fastest rounds; `median`, `low`, `high`: of the rounds in which
    both ran, one after the other."""

    best: float
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Lane:
    """One that took part; all measured.

    `seconds` a token, by work ("prefill", "decode", "deep"), a number a round; `new`: tokens a round of decode. `import_s`,
    `load_s`: of the code and of the file. `first_s`: from the start of the process to its first token after a short prompt.
    `resident`, `peak`: bytes by which its process grew since its code was there (pages of the mapped file among them), after
    the rounds without a long context; `held`: what it says it holds. `kld_prefill`, `kld_decode`: mean KL divergence from the
    float32 reference, nats, of tokens read together and one at a time; `top1`: share of tokens with the same likeliest next
    one. `failed`: why it could not take part, or not to the end.
    """

    name: str
    ours: bool
    dtype: str
    why: str
    seconds: dict[str, tuple[float, ...]]
    new: int
    import_s: float | None
    load_s: float | None
    first_s: float | None
    resident: int | None
    peak: int | None
    held: int | None
    deep_prefill: float | None
    kld_prefill: float | None
    kld_decode: float | None
    top1: float | None
    failed: str | None = None
    notes: tuple[str, ...] = ()

    def rate(self, work: str) -> float | None:
        """Tokens per second of the fastest round."""
        return 1 / min(self.seconds[work]) if self.seconds[work] else None

    def usual(self, work: str) -> float | None:
        """Tokens per second of the median round."""
        return 1 / median(self.seconds[work]) if self.seconds[work] else None


@dataclass(frozen=True)
class Bench:
    """One file on this computer; everything measured but `file_bytes`, `token_bytes` and `deep_bytes` (what one token has to
    read after a short context and after `deep` tokens), which are exact. `bandwidth`: bytes a second that this machine's memory
    gave, once a round; `calibrated`: what its calibration has. `waiting`: how threads wait for each other, as environment
    variables. `load`: processes that wanted to run, before and after; `others`: cores that other programs kept busy."""

    path: str
    model: str
    quant: str
    file_bytes: int
    token_bytes: float
    deep_bytes: float | None
    bandwidth: tuple[float, ...]
    calibrated: float | None
    threads: int
    rounds: int
    prompt: int
    new: int
    deep: int
    scored_on: str
    date: str
    processor: str
    cores: int
    features: tuple[str, ...]
    versions: dict[str, str]
    waiting: dict[str, str]
    load: tuple[float | None, float | None]
    others: float
    lanes: tuple[Lane, ...]

    def lane(self, name: str) -> Lane | None:
        """One that took part, by name; None where it did not."""
        return next((lane for lane in self.lanes if lane.name == name), None)

    def ratio(self, lane: Lane, work: str, to: str = PEER) -> Ratio | None:
        """How many times as fast as `to`; None where either did not run."""
        other = self.lane(to)
        mine, theirs = lane.seconds[work], other.seconds[work] if other else ()
        if not mine or not theirs:
            return None
        pairs = [b / a for a, b in zip(mine, theirs, strict=False)]
        return Ratio(min(theirs) / min(mine), median(pairs), min(pairs), max(pairs))

    def roofline(self, lane: Lane, work: str = DECODE) -> float | None:
        """The fastest round's share of what memory allows: the bytes a token has to read, over the best bandwidth seen here."""
        bytes = self.deep_bytes if work == DEEP else self.token_bytes
        rate = lane.rate(work)
        return rate * bytes / max(self.bandwidth) if rate and bytes and self.bandwidth else None

    @property
    def ceiling(self) -> float | None:
        """Tokens per second that the bandwidth would allow."""
        return max(self.bandwidth) / self.token_bytes if self.bandwidth else None

    @cached_property
    def answer(self) -> str:
        """One or two sentences."""
        ran = [lane for lane in self.lanes if lane.seconds[DECODE]]
        mine = [lane for lane in ran if lane.ours]
        if not mine:
            return f"{self.model} in {self.quant}: {'nothing of llmlab ran' if ran else 'nobody could run it'}."
        best = max(mine, key=lambda lane: lane.rate(DECODE))
        said = (f"{self.model} in {self.quant}: {best.name} writes {best.rate(DECODE):.1f} tokens/s, "
                f"{self.roofline(best):.0%} of what memory allows")
        if ratio := self.ratio(best, DECODE):
            said += f", {ratio.median:.2f} times as fast as llama.cpp (median of the rounds)"
        if prompt := self.ratio(best, PREFILL):
            said += f"; prompts {prompt.median:.2f} times"
        return f"{said} [measured]."

    @property
    def speeds(self) -> Table:
        """Tokens per second of the fastest round, beside llama.cpp's: of the fastest rounds, and the median of all rounds."""
        names = {PREFILL: f"prefill {self.prompt}", DECODE: f"decode {self.new}", DEEP: f"decode at {self.deep}"}
        if not self.deep:
            del names[DEEP]
        beside = bool(self.lane(PEER) and self.lane(PEER).seconds[DECODE])
        rows = []
        for lane in self.lanes:
            if not any(lane.seconds.values()):
                continue
            row = {"tokens/s": lane.name, "dtype": lane.dtype}
            for work, name in names.items():
                row[name] = lane.rate(work)
                if beside:
                    row[_TIMES[work]] = self.ratio(lane, work)
            rows.append(row | {"of roofline": self.roofline(lane)})
        shown = dict.fromkeys(names.values(), "{:.1f}".format) | {"of roofline": "{:.0%}".format}
        return Table(rows, shown | dict.fromkeys(_TIMES.values(), lambda r: f"{r.best:.2f} ({r.median:.2f})"))

    @property
    def costs(self) -> Table:
        """Seconds to begin, bytes held, and the distance from the float32 reference."""
        rows = [{"": lane.name, "first token s": lane.seconds[PREFILL] and min(lane.seconds[PREFILL]) * self.prompt or None,
                 "cold s": lane.first_s, "load s": lane.load_s, "resident": lane.resident, "peak": lane.peak,
                 "x file": lane.resident and lane.resident / self.file_bytes, "KLD prompt": lane.kld_prefill,
                 "KLD decode": lane.kld_decode, "same top": lane.top1}
                for lane in self.lanes if any(lane.seconds.values())]
        seconds = dict.fromkeys(("first token s", "cold s", "load s"), "{:.2f}".format)
        return Table(rows, seconds | dict.fromkeys(("resident", "peak"), lambda size: f"{size / MIB:.0f} MiB")
                     | dict.fromkeys(("KLD prompt", "KLD decode"), "{:.1e}".format)
                     | {"x file": "{:.2f}".format, "same top": "{:.1%}".format})

    @property
    def lines(self) -> list[str]:
        """What the tables rest on, and who did not take part and why."""
        rate = f"{format_rate(max(self.bandwidth))} read here in the same rounds" if self.bandwidth else "no bandwidth"
        if self.calibrated:
            rate += f" ({format_rate(self.calibrated)} when this machine was calibrated)"
        busy = ", ".join(f"{load:.1f}" for load in self.load if load is not None)
        found = [f"{self.processor}, {self.threads} threads, {self.rounds} rounds in turns"
                 + (f"; load {busy} before and after" if busy else "") + f"; other programs kept {self.others:.1f} cores busy"
                 + "".join(f"; {name}={value}" for name, value in self.waiting.items()),
                 f"rates and times: the fastest round; beside llama.cpp: of the fastest rounds (median of the rounds). "
                 f"Roofline: {format_bytes(self.token_bytes)} a token [exact] over {rate}"
                 + (f" = {self.ceiling:.1f} tokens/s" if self.ceiling else ""),
                 f"first token: after {self.prompt} tokens; cold: from the start of the process to a first token. "
                 f"File: {format_bytes(self.file_bytes)} [exact]. KLD in nats against float32, "
                 f"on {self.scored_on or 'nothing'}; all measured"]
        for lane in self.lanes:
            said = "; ".join(filter(None, (lane.failed and f"did not take part: {lane.failed}" if lane.load_s is None else
                                           lane.failed and f"fell out: {lane.failed}", *lane.notes,
                                           None if lane.failed else lane.why)))
            found.append(f"{lane.name}: {said}")
        return found

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        plain = asdict(self)
        for lane, row in zip(self.lanes, plain["lanes"], strict=True):
            row |= {"tokens_per_second": {work: lane.rate(work) for work in lane.seconds},
                    "median_tokens_per_second": {work: lane.usual(work) for work in lane.seconds},
                    "beside_llama_cpp": {work: (ratio := self.ratio(lane, work)) and ratio._asdict() for work in lane.seconds},
                    "roofline": {work: self.roofline(lane, work) for work in (DECODE, DEEP)}}
        return plain | {"answer": self.answer, "ceiling": self.ceiling}

    def __repr__(self) -> str:
        return "\n".join([self.answer, str(self.speeds), "", str(self.costs), "", *self.lines])

    def _repr_html_(self) -> str:
        lines = "".join(f"<li>{escape(line)}</li>" for line in self.lines)
        return f"<p>{escape(self.answer)}</p>{self.speeds._repr_html_()}{self.costs._repr_html_()}<ul>{lines}</ul>"


# three columns of one name: told apart by a space that is not seen
_TIMES = {PREFILL: "x llama.cpp", DECODE: "x llama.cpp ", DEEP: "x llama.cpp  "}
