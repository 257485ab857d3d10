"""OffloadState: a model, a card, RAM and a drive, and budgets; where every piece then lives, and how fast that would be."""

from collections.abc import Sequence
from dataclasses import dataclass

import traitlets as t

from .. import hardware
from ..errors import LabError
from ..hardware import Machine
from ..offload.arranging import RING, least
from ..offload.planned_words import number
from ..offload.planning import Plan, plan
from ..offload.shaping import WAYS
from ..rates import Band
from ..shapes import ModelSpec, model_spec
from ..units import GIB, MIB
from .settable import settable
from .state import THIS_MACHINE

POINTS = 12                  # of a curve
STOPS = 60                   # of a slider, at most
DEFAULTS = {"model": "llama-3-70b", "quant": None, "card": "rtx-4090-24gb", "ram": "16 GB DDR4-3200", "drive": "gen4",
            "gpu_budget": None, "ram_budget": None, "context": 4096, "kv": "f16", "slots": None, "mode": "exact",
            "way": "tuned", "resident": None}
_FOLLOWING = {"model": ("quant", "gpu_budget", "ram_budget", "resident"), "card": ("gpu_budget", "ram_budget", "resident"),
              "ram": ("ram_budget",), "way": ("resident",), "kv": ("resident",), "context": ("resident",)}


@dataclass(frozen=True, eq=False)
class Look:
    """What follows from the settings. `curve`: (bytes of the device, decoding tokens/s) with all else as it is, rising:
    modelled. `device`, `ram`: the budgets that a reader may choose from, bytes."""

    plan: Plan
    curve: tuple[tuple[int, Band], ...]
    device: tuple[int, ...]
    ram: tuple[int, ...]


class OffloadState(settable(DEFAULTS)):
    """The settings as traits; `look` follows, and in words `answer` and `error`.

    model: what llmlab.model takes. card: a card's id, "this machine", or None for this computer's processor, whose "device" is
    a part of its RAM. ram: in words ("64 GB DDR5-6000"), None: this computer's. drive: what `llmlab.plan` takes, None: this
    computer's. gpu_budget, ram_budget: bytes or words, None: all there is. quant, context, kv, slots, mode, resident: as in
    `llmlab.plan`. way: how it is computed, "gguf" by llmlab as the file has it, "words" by compiled code (on processors),
    "tuned" as quickly as llama.cpp does. Another model or card begins without budgets. A value that cannot be used leaves the
    last good look in place and says why in `error`; several changes in `update(...)` make one look.
    """

    look = t.Instance(Look, allow_none=True, read_only=True)
    answer = t.Unicode(read_only=True)
    error = t.Unicode(read_only=True)

    def __init__(self, **settings):
        """Raises LabError for settings that cannot be used: there is no last good look yet."""
        self._asked = self._read = self._here = self._curve = None
        super().__init__(**self._known(settings))
        self._follow()
        if self.look is None:
            raise LabError(self.error)

    @property
    def plan(self) -> Plan:
        """The present one."""
        return self.look.plan

    @property
    def here(self) -> bool:
        """Whether it can be run: a GGUF that is on this computer, on this computer."""
        return not self.hindrance

    @property
    def hindrance(self) -> str:
        """Why it cannot be run here; "" where it can."""
        asked = self._good
        if asked["card"] not in (THIS_MACHINE, None) or asked["ram"] is not None or asked["drive"] is not None:
            return "this is another computer: choose this machine as card, RAM and drive"
        if not (self.plan.spec.source == "gguf" and self.plan.spec.path):
            return "there is no file of this model: choose one that is here"
        if asked["way"] == "tuned":
            return "nothing here computes as llama.cpp does: choose one of llmlab's own ways"
        return ""

    @property
    def paced(self) -> str:
        """Where computing was measured: how fast."""
        pace = self.plan.resident
        return f"Computing alone was measured: {number(pace)} tokens/s where all of it stays." if pace else ""

    @property
    def unable(self) -> str:
        """The same as a sentence."""
        return f"It cannot be run: {self.hindrance}." if self.hindrance else ""

    def _named(self, asked: dict) -> dict:
        """What `llmlab.plan` is asked."""
        if asked["way"] not in WAYS:
            raise LabError(f"way is {str(asked['way'])[:40]!r}; give one of {', '.join(WAYS)}")
        card = asked["card"]
        if self._here is None:
            self._here = hardware.machine()
        found = {"machine": self._here, "drive": asked["drive"], "host": asked["ram"], "gpu": card,
                 **{name: asked[name] for name in ("gpu_budget", "ram_budget", "context", "kv", "quant", "slots", "mode",
                                                "resident")},
                 "layout": "words" if asked["way"] == "words" else "gguf",
                 "kernels": "tuned" if asked["way"] == "tuned" else "own"}
        if card == THIS_MACHINE or card is None and not self._here.cards:
            found["gpu"] = None
        elif card is None:
            found["gpu"] = "none"
        elif asked["ram"] is None:
            found["host"] = _ram(self._here)
        return found

    @t.observe(*DEFAULTS)
    def _follow(self, _=None) -> None:
        asked, before = {name: getattr(self, name) for name in DEFAULTS}, self._asked
        if asked == before:                  # changes made together arrive one by one, all of them in place
            return
        if before:
            asked = _consequences(asked, before)
        self._asked = asked
        if not before or asked["card"] != before["card"]:
            self._here = None                # what is free now is looked up once, when the machine is chosen
        try:
            made = plan(self._spec(asked["model"]), **self._named(asked))
            look = Look(made, self._curved(made, asked), *_stops(made))
        except LabError as error:
            self.set_trait("error", str(error))
            return
        self._good = asked
        with self.hold_trait_notifications():
            for name, value in asked.items():
                setattr(self, name, value)
            for name, value in {"error": "", "look": look, "answer": made.answer}.items():
                self.set_trait(name, value)

    def _spec(self, model) -> ModelSpec:
        if self._read is None or self._read[0] is not model:
            self._read = model, model_spec(model)
        return self._read[1]

    def _curved(self, made: Plan, asked: dict) -> tuple[tuple[int, Band], ...]:
        """Decoding against the device's budget; made anew where anything but that has changed."""
        key = {name: value for name, value in asked.items() if name != "gpu_budget"}
        if self._curve is None or self._curve[0] != key:
            self._curve = key, curve(made)
        return self._curve[1]


def _consequences(asked: dict, before: dict) -> dict:
    """What else changes with a setting, where it was not changed too."""
    asked = dict(asked)
    for name, others in _FOLLOWING.items():
        if asked[name] != before[name]:
            asked |= {other: None for other in others if asked[other] == before[other]}
    return asked


def _ram(machine: Machine) -> int:
    return min(machine.ram_total, machine.ram_limit or machine.ram_total)


# ---- budgets ---------------------------------------------------------------------------------------------------------

def whole(made: Plan) -> int:
    """Bytes of the device with which everything stays there, high estimate."""
    return made.needs.fixed + made.needs.cache + made.shape.bytes


def smallest(made: Plan) -> int:
    """Bytes of the device that are needed at least."""
    apart = not made.site.shared and made.needs.cache <= made.site.ram
    return least(made.shape, made.needs, "ram" if apart else None)


def nice(low: int, high: int, most: int = STOPS) -> tuple[int, ...]:
    """Round sizes from `low` up to the first that is `high` at least, `most` or so of them."""
    steps = [k * unit for unit in (MIB // 4, MIB, 10 * MIB, 100 * MIB, GIB, 10 * GIB) for k in (1, 2, 4, 5)]
    step = next((one for one in sorted(steps) if (high - low) / one <= most), 50 * GIB)
    return tuple(range(-(-low // step) * step, -(-high // step) * step + 1, step))


def _stops(made: Plan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Budgets to choose from, on the device and in RAM, what is now among them."""
    everything, site = whole(made), made.site
    card = everything if site.card is None else site.card.memory if site.card.free is None else site.card.free
    device = [*nice(smallest(made), card)]
    if site.card is not None:
        device = [*(size for size in device if size < card), card]
    machine_ram = site.ram if made.asked["ram_budget"] is None and not site.shared else made.with_(ram_budget=None).site.ram
    ring = 0 if site.shared else RING * max(made.shape.largest_expert, *(layer.bytes for layer in made.shape.layers))
    needed = made.shape.bytes + (0 if site.shared else made.needs.cache + ring)
    top = needed if site.shared else min(needed, machine_ram)
    ram = [size for size in nice(ring, top) if size < top or size == 0] + [top] * (top > 0)
    return tuple(sorted({*device, min(site.device, device[-1])})), tuple(sorted({*ram, min(site.ram, ram[-1])}))


def curve(made: Plan, points: int = POINTS) -> tuple[tuple[int, Band], ...]:
    """(bytes of the device, decoding tokens/s), from the least that does to all of it, or the card's memory."""
    low, card = smallest(made), made.site.card
    high = whole(made) if card is None else min(whole(made), card.memory)
    sizes = sorted({low + (high - low) * k // (points - 1) for k in range(points)} if high > low else {low})
    found = []
    for size in sizes:
        try:
            found.append((size, made.with_(gpu_budget=size).predict().decode))
        except LabError:             # the least is an estimate to some pages
            continue
    return tuple(found)


def shown(sizes: Sequence[int], now: int) -> int:
    """Of the budgets to choose from the one that is now."""
    return min(sizes, key=lambda size: abs(size - now))
