"""HybridState: a router live: what would leave, what was decided, and how much a share of calls buys."""

import math

import traitlets as t

from ..endpoints import Calibration, Curve, Decision, Leaving, Redactor, Router, router
from ..endpoints.allowing import Share, allowance_of
from ..endpoints.signals import NAMES, signal_of
from ..endpoints.spending import amount_of
from ..errors import LabError
from ..units import format_bytes
from .background import Background, Stopped
from .settable import settable

QUESTION = "I am anna.b@example.org and sit at 192.168.1.7. What is the capital of Kenya?"
QUESTIONS = ("What is the capital of France?", "What is the capital of Kenya?", "What is 7 + 5?", "What is 17 * 12?",
             "Who wrote 1984?", "What do bees make?", "Which planet is the largest?", "What is the opposite of ancient?")
SAYS = "Answer in a few words. "
SETTINGS = {"question": QUESTION, "unsure": "entropy", "share": 0.3, "cap": None, "redact": True, "offline": False}
BURST = 3


class HybridState(settable(SETTINGS), Background):
    """A router between `local` and `remote`, as `llmlab.router` takes them, and its settings as traits.

    question: what is asked next; `leaving` is what would leave for it. unsure: "entropy", "logprob" or "agreement". share: of
    the questions that may go out. cap: the most a month may cost (None: no cap). redact: whether what looks private is taken
    out. offline: nothing goes out. questions: asked by `calibrate`. curve: quality against the share of calls, of a pair that
    was measured. A value that cannot be used leaves the last good ones in place and says why in `problem`.

    `start()` and `start_calibrating()` begin and return at once, `ask(text)` and `calibrate()` wait; `end()` ends what is under
    way. `decisions`, `text` and `note` follow. Raises LabError for settings that cannot be used.
    """

    leaving = t.Instance(Leaving, allow_none=True, read_only=True)
    calibration = t.Instance(Calibration, allow_none=True, read_only=True)
    decisions = t.Tuple(read_only=True)
    text = t.Unicode(read_only=True)
    note = t.Unicode(read_only=True)
    problem = t.Unicode(read_only=True)

    def __init__(self, local, remote, questions=QUESTIONS, curve: Curve | None = None, max_tokens: int = 16, says: str = SAYS,
                 log=None, **settings):
        self.questions, self.curve, self.max_tokens, self.says = tuple(questions), curve, max_tokens, says
        self.router: Router = router(local, remote, at_most=SETTINGS["share"], cap=remote.cap, log=log)
        self._signals: dict[str, tuple[float, ...]] = {}
        self._good: dict = {}
        super().__init__()
        self.update(**({"cap": remote.cap} | settings))
        self._follow()
        if self.problem:
            raise LabError(self.problem)

    @t.observe(*SETTINGS)
    def _follow(self, _=None) -> None:
        asked = {name: getattr(self, name) for name in SETTINGS}
        try:
            if asked != self._good:
                self._take(asked)
        except LabError as error:
            self.set_trait("problem", str(error))
            return
        self._good = asked
        self.set_trait("problem", "")

    def _take(self, asked: dict) -> None:
        """Put the settings into the router, all of them or none."""
        if not isinstance(asked["question"], str) or not asked["question"].strip():
            raise LabError("there is no question; type one")
        for name in ("redact", "offline"):
            if not isinstance(asked[name], bool):
                raise LabError(f"{name} is {asked[name]!r:.40}; it is True or False")
        if asked["unsure"] not in NAMES:
            raise LabError(f"unsure is {asked['unsure']!r:.40}; give one of {', '.join(NAMES)}")
        if self.running and any(asked[name] != self._good.get(name) for name in ("unsure", "redact", "share")):
            raise LabError("something is being asked; end that or wait for it first")
        route, cap = self.router, None if asked["cap"] in (None, "") else amount_of(asked["cap"])
        if cap is not None and route.remote.price is None:
            raise LabError("a cap needs prices to count with: give the remote Endpoint price=(input, output)")
        allowance = route.allowance
        if asked["share"] != self._good.get("share"):
            allowance = allowance_of(asked["share"], route.remote.ledger, BURST)
            if not isinstance(allowance, Share):
                raise LabError(f"share is {asked['share']!r:.40}; give a part of all questions, 0 to 1")
        route.signal, route.allowance, route.remote.cap = signal_of(asked["unsure"]), allowance, cap
        route.redactor, route.offline = Redactor() if asked["redact"] else Redactor(()), asked["offline"]
        self._recalibrate(asked["unsure"])
        self.set_trait("leaving", route.preview(self.says + asked["question"], max_tokens=self.max_tokens))

    def _recalibrate(self, unsure: str) -> None:
        """The threshold of signals that are known already; without them there is none."""
        known = self._signals.get(unsure)
        self.router.threshold = None
        self.set_trait("calibration", self.router.calibrate_to(known) if known else None)

    # ---- in words -----------------------------------------------------------------------------------------------

    @property
    def answer(self) -> str:
        """What stayed, what left and what it cost; and the last question's decision."""
        if self.problem or self.error:
            return self.problem or self.error
        last = f" The last one: {said_of(self.decisions[-1])}." if self.decisions else ""
        return f"{self.router.answer}{last}"

    @property
    def leaves(self) -> str:
        """What would leave, in words."""
        shown, there = self.leaving, self.router.remote.base_url
        things = f"{shown.redactions} thing{'s' * (shown.redactions != 1)} taken out of it"
        return (f"Were this called out for, {format_bytes(len(shown.body))} would go to {there}, {things}; "
                f"{'nothing does: calling out is switched off' if self._good['offline'] else 'to the byte what is shown'}.")

    # ---- running ------------------------------------------------------------------------------------------------

    def start(self, question: str | None = None) -> None:
        """Ask, and return at once. Raises LabError while something runs, and for what cannot be asked."""
        if question is not None:
            self._ready()
            self.question = question
        self._ready()
        if self.router.threshold is None:
            raise LabError("there is no threshold yet: calibrate first")
        self._set(error="", progress="Asking.", running=True)
        self._begin("hybrid", self._through, "asking", self._ask, self._good["question"])

    def ask(self, question: str | None = None) -> str:
        """Ask, wait, and return what the router gave. Raises LabError where it went wrong."""
        self.start(question)
        self._finish()
        return self.text

    def start_calibrating(self) -> None:
        """Ask the local model the questions, and return at once; nothing goes out. Raises LabError while something runs."""
        self._ready()
        self._set(error="", progress="Calibrating.", running=True)
        self._begin("hybrid", self._through, "calibrating", self._calibrate)

    def calibrate(self) -> str:
        """The same, waited for; what came of it in words."""
        self.start_calibrating()
        self._finish()
        if self.calibration is None:
            raise LabError("calibrating was stopped")
        return self.calibration.answer

    def _ready(self) -> None:
        if self.running:
            raise LabError("something is being asked; end that or wait for it first")
        if self.problem:
            raise LabError(self.problem)

    def _ask(self, question: str) -> None:
        found = self.router.ask(self.says + question, max_tokens=self.max_tokens)
        self._set(text=found.text.strip(), note=found.note, decisions=tuple(self.router.decisions))

    def _calibrate(self) -> None:
        def said(count: int) -> None:
            self._say(f"Calibrating: {count} of {len(self.questions)} questions asked here.")
            if self._stopping.is_set():
                raise Stopped
        found = self.router.calibrate([self.says + one for one in self.questions], progress=said, max_tokens=self.max_tokens)
        self._signals[self._good["unsure"]] = found.signals
        self.set_trait("calibration", found)


def said_of(decision: Decision) -> str:
    """Where it was answered and why, without times."""
    how = "" if decision.signal is None or decision.threshold is None or not math.isfinite(decision.signal) else \
        f" ({decision.signal:.2f} against {decision.threshold:.2f})"
    cost = "" if not decision.cost else f", cost {decision.cost:.6f}"
    left = f"{format_bytes(decision.bytes_out)} left" if decision.bytes_out else "nothing left"
    return f"answered {'here' if decision.where == 'local' else 'there'}, {decision.why}{how}; {left}{cost}"
