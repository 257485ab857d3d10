"""AdviceState: a card, a task and limits; the ranked choices that follow, the frontiers, and the one that was chosen."""

from dataclasses import dataclass

import traitlets as t

from .. import hardware
from ..advice import Advice, Choice, best
from ..advice.answer import Unknown, pace, points
from ..catalog import Table
from ..errors import LabError
from ..units import GIB
from .settable import settable
from .state import THIS_MACHINE

DEFAULTS = {"card": "rtx-3060-12gb", "host": None, "task": "coding", "context": 8192, "min_speed": 5.0,
            "quality_floor": None, "languages": None, "license": None, "setting": None, "chosen": None}
ASKED = tuple(name for name in DEFAULTS if name != "chosen")
KINDS = ("Scores are published; what a quant costs of them is measured on other models and modelled for this one; weights and "
         "cache are exact; other memory and speed are modelled.")


@dataclass(frozen=True, eq=False)
class Look:
    """What follows from the settings. `advice`: every choice, ranked; `by_size`, `by_speed`: those than which no other is
    better and as small, or as quick, cheapest first."""

    advice: Advice
    by_size: tuple[Choice, ...]
    by_speed: tuple[Choice, ...]

    @property
    def shown(self) -> tuple[Choice, ...]:
        """What is drawn: each model's first choice, and the frontiers."""
        return tuple({key_of(one): one for one in (*self.advice.leaders, *self.by_size, *self.by_speed)}.values())


class AdviceState(settable(DEFAULTS)):
    """The settings as traits; `look` follows, and in words `answer` and `error`.

    card: a card's id, "this machine", or None for this computer's RAM alone; host: RAM beside it (None: this computer's, or
    32 GiB beside a card that is only named; one that shares its RAM has what it is sold with). task, context, min_speed,
    quality_floor, languages, license, setting: as llmlab.best takes them. chosen: a model's id, or (model, quant, (K, V)), of
    which `choice` is to be got and run; None: the first. A value that cannot be used leaves the last good look in place
    and says why in `error`; several changes in `update(...)` make one.
    """

    look = t.Instance(Look, allow_none=True, read_only=True)
    answer = t.Unicode(read_only=True)
    error = t.Unicode(read_only=True)

    def __init__(self, **settings):
        """Raises LabError for settings that cannot be used: there is no last good look yet."""
        self._asked = self._here = None
        super().__init__(**self._known(settings))
        self._follow()
        if self.look is None:
            raise LabError(self.error)

    @property
    def advice(self) -> Advice:
        return self.look.advice

    @property
    def choice(self) -> Choice | None:
        """The one that was chosen while it keeps to the limits, else the first; None where there is none."""
        found = self.look.advice.choices
        return next((one for one in found if self.chosen in (one.model, key_of(one))), found[0] if found else None)

    @property
    def table(self) -> Table:
        """A row a model, in its first choice, as the panel shows them."""
        return Table(map(row_of, self.look.advice.leaders))

    @property
    def unknown(self) -> Table:
        """A row a model that the setting does not score."""
        return Table(map(unknown_row, self.look.advice.unknown))

    @t.observe(*ASKED)
    def _follow(self, _=None) -> None:
        asked, before = {name: getattr(self, name) for name in ASKED}, self._asked or {}
        if asked == before:                  # changes made together arrive one by one, all of them in place
            return
        if before and asked["task"] != before["task"]:
            asked |= {name: None for name in ("setting", "quality_floor") if asked[name] == before[name]}   # of another task
        elif before and asked["setting"] != before["setting"] and asked["quality_floor"] == before["quality_floor"]:
            asked["quality_floor"] = None    # points of another kind
        self._asked = asked
        if asked["card"] != before.get("card"):
            self._here = None                # what is free now is looked up once, when the machine is chosen
        try:
            found = best(self._where(asked["card"]), **{name: asked[name] for name in ASKED if name != "card"})
        except LabError as error:
            self.set_trait("error", str(error))
            return
        look = Look(found, tuple(found.frontier("GiB")), tuple(found.frontier("speed")))
        with self.hold_trait_notifications():
            for name in ("setting", "quality_floor"):
                setattr(self, name, asked[name])
            for name, value in {"error": "", "look": look, "answer": f"{found.answer} {KINDS}"}.items():
                self.set_trait(name, value)

    def _where(self, card):
        if card == THIS_MACHINE:
            card = self._here = self._here or hardware.machine()
        return card


def key_of(choice: Choice) -> tuple:
    """What a choice is told by."""
    return choice.model, choice.quant, choice.kv


# ---- in rows and words ----------------------------------------------------------------------------------------------

def row_of(c: Choice) -> dict:
    """A choice as a row of texts."""
    return {"model": c.entry.name, "from": c.entry.release, "quant": c.quant, "KV cache": "/".join(dict.fromkeys(c.kv)),
            "placement": c.placement, "GiB": f"{c.bytes / GIB:.1f}", "tokens/s": speed_words(c),
            "score to expect": quality_words(c), "why": _why(c), "what would change that": c.changes}


def _why(c: Choice) -> str:
    """Where the score comes from."""
    if c.lost[1] < 0.05:
        return f"{points(c.published[1])} published"
    cache = "" if c.kv == ("f16", "f16") else f", {'/'.join(dict.fromkeys(c.kv))}"
    return f"{points(c.published[1])} less {points(c.lost[1])} for {c.quant}{cache}"


def unknown_row(one: Unknown) -> dict:
    """A model without a score, as a row of texts."""
    rate = one.report.speed.decode_tps
    scores = "; ".join(f"{points(s.scores[one.model][1])} in {s.name}" for s in one.elsewhere[:2])
    return {"model": one.entry.name, "from": one.entry.release, "quant that fits": one.report.settings.quant,
            "tokens/s": pace(rate[1]) if rate else "not known", "score here": "unknown",
            "scored elsewhere": scores or "nowhere that is known here"}


def quality_words(c: Choice) -> str:
    """"83.1 (76.4 to 88.0)"."""
    low, best, high = c.quality
    return f"{points(best)} ({points(low)} to {points(high)})"


def speed_words(c: Choice) -> str:
    """Usual, and its range."""
    if not c.speed:
        return "not known"
    low, best, high = c.speed
    return f"{pace(best)} ({pace(low)} to {pace(high)})"


def left_out_words(look: Look) -> str:
    """What is not ranked, and why."""
    advice = look.advice
    failed = ", ".join(f"{count} by {limit}" for limit, count in advice.refused.items() if count)
    text = f"Of {advice.looked_at} models {len(advice.leaders)} are ranked"
    if advice.unknown:
        text += f"; {len(advice.unknown)} fit and have no score in this setting: unknown, not zero"
    return f"{text}; left out: {failed}." if failed else f"{text}."


def source_words(look: Look) -> str:
    """Whose scores they are."""
    s = look.advice.setting
    chance = "95 % of chance counted" if s.sampled else "chance not counted"
    return f"Scores: {s.name}, {s.source}, {s.date}; {chance}."
