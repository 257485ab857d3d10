"""An SSD as more VRAM: what Phison's aiDAPTIV+ promises, and what a drive's rate allows for the model at hand."""

from dataclasses import dataclass

from ..catalog import Table, links
from ..errors import LabError
from ..offload.arranging import RING
from ..offload.planned_words import number, rate
from ..offload.planning import WEAR, Plan
from ..offload.shaping import shape_of
from ..rates import Band
from ..units import GB, MIB, TB, format_bytes, format_count, format_rate, format_seconds

DRIVES = ("hdd-7200", "sata3-class", "nvme-qlc-class", "nvme-gen3-class", "nvme-gen4-class", "nvme-gen5-class", "nvme-raid0-2x")
QUANTS = ("F16", "Q8_0", "Q6_K", "Q4_K_M", "Q3_K_S", "IQ2_XXS")
ADAM, UPDATED = 12, 2        # bytes a weight: in float32 itself and two moments, in 16 bits to compute with ("ZeRO", 2020)
PROMISE = ("Phison's aiDAPTIV+ uses an SSD as more VRAM. In March 2024 one workstation with four cards was shown that "
           "fine-tuned a 70B model, for which Phison counts 1.4 TB of VRAM on 24 cards; cheaper, and slower, as Phison says "
           "(Tom's Hardware).")


@dataclass(frozen=True)
class Driven:
    """A drive, and decoding with everything on it that the device does not hold: modelled."""

    name: str
    decode: Band
    words: str


def alone(made: Plan, **changes) -> Plan:
    """The plan with no more RAM than reads pass through, so that all that is not on the device comes from the drive."""
    shape = shape_of(made.spec, changes.get("quant", made.quant), made.importance)
    ring = 0 if made.site.shared else RING * max(shape.largest_expert, *(one.bytes for one in shape.layers)) + MIB
    return made.with_(**{"ram_budget": ring, **changes})


def by_drive(made: Plan) -> tuple[Driven, ...]:
    """The same model and device with each class of drives, and with all the rest in RAM."""
    found = []
    for drive in DRIVES:
        then = alone(made, drive=drive)
        name = links()[drive].name.partition(" (")[0]
        found.append(Driven(name, then.predict().decode, f"{name}, {format_rate(then.site.drive.rate[1])}: "
                                                         f"{rate(then.predict().decode)}, modelled"))
    if not made.site.shared:
        then = made.with_(ram_budget=made.shape.bytes * 2)
        found.append(Driven("no drive: the rest in RAM", then.predict().decode,
                            f"over the link at {format_rate(then.site.link[1])}: {rate(then.predict().decode)}, modelled"))
    return tuple(found)


def by_quant(made: Plan) -> Table:
    """A row a quant: bytes of weights, what of them stays, what each token reads from the drive, and how fast that is."""
    rows = []
    for quant in QUANTS if made.spec.source != "gguf" else (made.quant,):
        try:
            then = alone(made, quant=quant)
        except LabError:
            continue
        found = then.predict()
        moved = found.times.moved["ssd"]
        rows.append({"weights in": quant, "take": format_bytes(then.shape.bytes),
                     "not on the device": format_bytes(then.streamed), "a token reads": format_bytes(moved),
                     "at the drive's rate": format_seconds(moved / then.site.drive.rate[1]),
                     "tokens/s, modelled": band(found.decode), "a prompt": band(found.prefill)})
    return Table(rows)


def band(found: Band) -> str:
    """`"2.4 (1.9 to 3.1)"`."""
    return rate(found).replace(" tokens/s", "")


def allowed(made: Plan) -> str:
    """What arithmetic allows, in a few sentences."""
    then = alone(made)
    found, drive = then.predict(), then.site.drive
    moved = found.times.moved["ssd"]
    if not moved:
        return f"{made.spec.title} in {made.quant} stays whole on {made.site.title}: no drive is needed."
    best = drive.rate[1]
    text = (f"But one token of an answer reads every weight once. Of {format_bytes(then.shape.bytes)} in {then.quant} "
            f"{format_bytes(then.streamed)} find no room on {_place(then)}, so each token reads {format_bytes(moved)} from the "
            f"drive, at {format_rate(best)} {format_seconds(moved / best)}: {rate(found.decode)} if RAM holds none of it, "
            "modelled.")
    at_once = min(512, then.context)
    return (f"{text} A prompt's {at_once:,} tokens take one pass together, so it is read at {rate(found.prefill)}: what is "
            "slow for a chat is quick enough for training, which reads thousands of tokens a pass.")


def _place(made: Plan) -> str:
    return made.site.title if made.site.card is not None else "the device"


def worn(made: Plan) -> str:
    """What training in full would write."""
    weights = made.spec.params
    step = weights * (ADAM + UPDATED)
    return (f"Training all {format_count(weights)} weights with Adam writes {ADAM + UPDATED} bytes a weight back for each "
            f"step, where none of it stays in memory: {_amount(step)}. A drive of 1 TB that promises {WEAR / TB:.0f} TB of "
            f"writing is worn after some {WEAR / step:,.0f} steps. Running a model only reads, which wears nothing. Modelled.")


def _amount(size: float) -> str:
    return f"{size / TB:.2g} TB" if size >= 0.1 * TB else f"{size / GB:.2g} GB"


def needed(made: Plan, tokens: float = 10.0) -> str:
    """Which rate would do for so many tokens a second."""
    then = alone(made)
    moved = then.predict().times.moved["ssd"]
    if not moved:
        return ""
    return (f"For {number(tokens)} tokens/s the drive would have to give {moved * tokens / GB:,.0f} GB/s; "
            f"{format_rate(then.site.drive.rate[1])} is what it is taken to give.")
