"""The next token out of a model's logits: for one text or for many at once; and its text, up to where it ends."""

import copy
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..errors import LabError

_PENALIZED = 64          # the last tokens that a repeat penalty looks at (llama.cpp: penalty_last_n)
_UNFINISHED = 16         # tokens after which text that is still no UTF-8 is handed out as it is
_FEW = 512               # so many tokens are sorted in no time
_PART = 256              # neighbouring tokens whose chances are summed first
_STEPS = 2048            # of the score, by which tokens are counted
_NEVER = -9999.0         # how OpenAI writes the logarithm of no chance, which JSON has no word for


@dataclass(frozen=True)
class Options:
    """How the next token is chosen, and when to end. Defaults are those of llama.cpp's tools (common.h).

    temperature: 0 takes the likeliest token each time. top_k: only so many of the likeliest (0: all). top_p: only the
    likeliest that together have this share (1: all). min_p: only those at least this share as likely as the likeliest
    (0: all). repeat_penalty: above 1 makes tokens of the last 64 less likely (1: off). seed: the same seed gives the same
    text (None: a new one each time). max_tokens: most new tokens (None: to the end of the turn or of the context).
    stop: texts that end the answer; they are not part of it. shift: what happens when the context is full. None: the answer
    ends; a number: of what was read the older half is dropped but for the first so many tokens, again and again, and a prompt
    may be longer than the context too (a lean decoder can; llama.cpp's --context-shift and --keep). Raises LabError, naming the
    option.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    shift: int | None = None

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(one, str) and one for one in stop):
            raise LabError(f"stop is {stop!r:.60}; give texts that are not empty")
        object.__setattr__(self, "stop", tuple(stop))
        for name, whole, low, high, says in _RANGES:
            value = getattr(self, name)
            if value is None and name in ("seed", "max_tokens", "shift"):
                continue
            right = isinstance(value, int) or not whole and isinstance(value, float) and math.isfinite(value)
            if not right or isinstance(value, bool) or not low <= value <= high:
                raise LabError(f"{name} is {value!r:.40}; give {says}")


_RANGES = (              # option, whether it is whole, lowest, highest, what to give
    ("temperature", False, 0, 100, "a number from 0 (always the likeliest token) up to 100; 0.8 is common"),
    ("top_k", True, 0, 2**31 - 1, "a whole number of tokens; 0 is all of them"),
    ("top_p", False, 1e-6, 1, "a share above 0 and up to 1; 1 is all tokens"),
    ("min_p", False, 0, 1, "a share from 0 (all tokens) to 1"),
    ("repeat_penalty", False, 0.01, 100, "a number around 1, such as 1.1; 1 is no penalty"),
    ("seed", True, 0, 2**63 - 1, "a whole number from 0 up, or none for a new one each time"),
    ("max_tokens", True, 1, 2**31 - 1, "a whole number from 1 up, or none for no limit"),
    ("shift", True, 0, 2**31 - 1, "how many first tokens stay when the context is full, from 0 up, or none to end there"),
)


class Constraint(Protocol):
    """What may come next in a text of a certain form; `runtime.constraining` makes them.

    ended: the form is whole and nothing can follow but an end of turn, so a text may end without waiting for one.
    """

    @property
    def ended(self) -> bool: ...

    def allowed(self) -> torch.Tensor | None:
        """bool [tokens], of the processor: which may come next; None for any. A model may have more logits than there are
        tokens: the further ones may not come. Raises LabError where nothing may."""

    def take(self, token: int) -> None:
        """This one came. Raises LabError where it could not."""

    def fork(self) -> "Constraint":
        """One that goes on from here by itself."""


class Chooser:
    """Chooses a text's next tokens by the options, in llama.cpp's order: bias, penalties, mask, top k, top p, min p,
    temperature, draw.

    It belongs to one text: it goes through its own random numbers, and tells its mask each token it chose. mask: what may come
    (None: anything). bias: {token: number added to its logit}, as OpenAI's logit_bias (a token that the model has no logit for
    is passed over). presence_penalty, frequency_penalty: as OpenAI's, of the new tokens: the first is taken off the logit of
    each token that came, the second as often as it came. `seed`: what it draws with, None where it is greedy. Raises LabError
    for a number that is none.
    """

    def __init__(self, options: Options | None = None, *, mask: Constraint | None = None,
                 bias: Mapping[int, float] | None = None, presence_penalty: float = 0.0, frequency_penalty: float = 0.0):
        self.options, self.mask = options or Options(), mask
        for name, value in (("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)):
            if not _number(value):
                raise LabError(f"{name} is {value!r:.40}; give a number, such as 0.5; 0 is no penalty")
        self._presence, self._frequency = presence_penalty, frequency_penalty
        self._biased = self._biases = None
        if bias:
            for token, value in bias.items():
                if not isinstance(token, int) or isinstance(token, bool) or token < 0 or not _number(value):
                    raise LabError(f"logit_bias has {token!r:.40}: {value!r:.40}; give a token's number and what to add to its "
                                   "logit, such as -100 to ban it")
            self._biased, self._biases = torch.tensor(list(bias)), torch.tensor([float(one) for one in bias.values()])
        self.seed = None
        if self.options.temperature > 0:
            self.seed = secrets.randbelow(2**32) if self.options.seed is None else self.options.seed
            self._random = torch.Generator().manual_seed(self.seed)  # of the processor: the same draws on every device

    def fork(self) -> "Chooser":
        """One that will draw the same numbers, and leaves them here."""
        other = copy.copy(self)
        if self.seed is not None:
            other._random = torch.Generator()
            other._random.set_state(self._random.get_state())
        if self.mask is not None:
            other.mask = self.mask.fork()
        return other

    def several(self, count: int) -> list["Chooser"]:
        """One for each of so many answers; they share the bias. Each draws by a seed of its own: the first by that of the
        options, the next by the next, or each by a new one where the options have none."""
        found = [self.fork() for _ in range(count)]
        for at, one in enumerate(found):
            if self.seed is not None and (at or self.options.seed is None):
                one.seed = secrets.randbelow(2**32) if self.options.seed is None else (self.seed + at) % 2**63
                one._random.manual_seed(one.seed)
        return found

    @property
    def ended(self) -> bool:
        """Whether nothing can follow what was chosen: the mask's form is whole."""
        return self.mask is not None and self.mask.ended

    def __call__(self, logits: torch.Tensor, prompt: list[int], new: list[int]) -> int:
        """The token after `prompt` and `new`, of logits [vocabulary]. Raises LabError where they are no numbers."""
        token = choose_each([self], logits[None], [prompt], [new])[0]
        if isinstance(token, LabError):
            raise token
        return token

    @property
    def changes(self) -> bool:
        """Whether logits change before it looks for the likeliest."""
        return (self.mask is not None or self._biased is not None or self.options.repeat_penalty != 1
                or bool(self._presence or self._frequency))

    def change(self, scores: torch.Tensor, prompt: list[int], new: list[int]) -> None:
        """Bias, penalties and mask, into logits [vocabulary] themselves."""
        if self._biased is not None:
            known = self._biased < len(scores)
            scores.index_add_(0, self._biased[known].to(scores.device), self._biases[known].to(scores))
        if (penalty := self.options.repeat_penalty) != 1:
            tokens = torch.tensor((prompt[-_PENALIZED:] + new)[-_PENALIZED:], dtype=torch.long, device=scores.device)
            found = scores[tokens]      # made less likely (Keskar et al. 2019): divided, or multiplied below 0
            scores[tokens] = torch.where(found < 0, found * penalty, found / penalty)
        if new and (self._presence or self._frequency):
            tokens, counts = torch.tensor(new, device=scores.device).unique(return_counts=True)
            scores[tokens] -= self._presence + self._frequency * counts
        if self.mask is not None and (allowed := self.mask.allowed()) is not None:
            count = min(len(allowed), len(scores))
            scores[:count].masked_fill_(~allowed[:count].to(scores.device), -torch.inf)
            scores[count:] = -torch.inf


@torch.inference_mode()
def choose_each(choosers: Sequence[Chooser], logits: torch.Tensor, prompts: Sequence[list[int]],
                news: Sequence[list[int]]) -> list[int | LabError]:
    """What each chooser takes of its row of logits [choosers, vocabulary], float32: the very token that it would take alone,
    with few operations for all of them. prompts, news: the tokens before, by row. A row whose logits are no numbers, or whose
    mask lets nothing come, has its LabError in the token's place; the others are none the worse for it.
    """
    scores, found = logits, [None] * len(choosers)
    changing = [at for at, one in enumerate(choosers) if one.changes]
    if changing:
        scores = logits.clone()
    for at in changing:
        try:
            choosers[at].change(scores[at], prompts[at], news[at])
        except LabError as error:
            found[at] = error
    kinds: dict[tuple, list[int]] = {}
    for at, one in enumerate(choosers):
        if found[at] is None:
            kinds.setdefault(_kind(one.options, scores.shape[-1]), []).append(at)
    for (choose, count), rows in kinds.items():
        asked = [choosers[at] for at in rows]
        tokens = choose(scores if len(rows) == len(scores) else scores[rows], asked, count)
        for at, one, token in zip(rows, asked, tokens, strict=True):
            found[at] = _told(one, token)
    return found


def _told(chooser: Chooser, token: int | None) -> int | LabError:
    """The token, once its mask knows of it; None is one that could not be chosen."""
    if token is None:
        return _no_numbers(chooser.mask is not None)
    try:
        if chooser.mask is not None:
            chooser.mask.take(token)
        return token
    except LabError as error:
        return error


def _kind(options: Options, many: int) -> tuple:
    """How a row is chosen, and of how many of the likeliest: rows that agree in both go through together."""
    if options.temperature == 0:
        return _likeliest, 0
    if options.top_k == 0 and (many > _FEW or options.top_p == 1 and options.min_p == 0):
        return _of_all, 0
    return _of_some, options.top_k


def _likeliest(scores: torch.Tensor, choosers: Sequence[Chooser], count: int) -> list[int | None]:
    best = scores.argmax(-1, keepdim=True)
    sound = scores.gather(-1, best).isfinite()
    return [token if good else None for (token,), (good,) in zip(best.tolist(), sound.tolist(), strict=True)]


def _of_some(scores: torch.Tensor, choosers: Sequence[Chooser], count: int) -> list[int | None]:
    """Drawn from the `count` likeliest (0: all), less what top p and min p cut off."""
    many = scores.shape[-1]
    return _draw(*scores.topk(min(count or many, many)), choosers)


def _of_all(scores: torch.Tensor, choosers: Sequence[Chooser], count: int) -> list[int | None]:
    """Drawn from the whole vocabulary, less what top p and min p cut off, unsorted: by one random number the first token that
    the sum of chances reaches it at; looked for among sums of parts, then in one of them.

    A row at a time, which stays in the processor's cache, and by NumPy: torch would share each of these small operations among
    its threads, and on a busy computer wait for every one of them (32 rows of 49,152: 260 ms in place of 4).
    """
    rows = scores.float().cpu().numpy()
    with np.errstate(over="ignore", under="ignore"):        # of a temperature near 0: no chance
        return [_of_row(row, row.max(), one) for row, one in zip(rows, choosers, strict=True)]


def _of_row(row: np.ndarray, top: np.float32, chooser: Chooser) -> int | None:
    options, padded = chooser.options, -(-len(row) // _PART) * _PART
    if not np.isfinite(top):
        return None
    chances = np.zeros(padded, np.float32)
    inside = chances[:len(row)]
    np.subtract(row, top, out=inside)
    cut = max(np.log(np.float32(options.min_p)) if options.min_p > 0 else -np.inf,
              _cut(inside, options.top_p) if options.top_p < 1 else -np.inf)
    stays = inside >= cut
    inside /= np.float32(_heat(options))
    np.exp(inside, out=inside)
    inside *= stays
    parts = chances.reshape(-1, _PART).sum(-1, dtype=np.float64)
    reached = parts.cumsum()
    drawn = torch.rand(1, generator=chooser._random, dtype=torch.float64).item() * reached[-1]
    at = min(int(reached.searchsorted(drawn, side="right")), len(parts) - 1)
    inside = chances[at * _PART:(at + 1) * _PART].astype(np.float64)
    place = int((inside.cumsum() + (reached[at] - parts[at])).searchsorted(drawn, side="right"))
    if place == len(inside):                # the last bit of a sum: the last that has a chance
        place = int(inside.nonzero()[0][-1])
    return at * _PART + place


def _cut(below: np.ndarray, share: float) -> float:
    """The score, counted from the highest down, of the last of the likeliest that together have this share (equal ones stay
    together): by sums over steps of the score, and by sorting inside one step."""
    chances = np.exp(below)
    total = chances.sum(dtype=np.float64)
    # What is less likely than an equal part of what is left out is left out all together, and takes the last step.
    lowest = math.log((1 - share) * total / len(below))
    steps = np.minimum(below * np.float32(_STEPS / lowest), np.float32(_STEPS)).astype(np.intp)
    reached = np.bincount(steps, chances, _STEPS + 1).cumsum()
    at = int(reached.searchsorted(share * total))
    if at > _STEPS:                         # the last bit of a sum: all of them
        return -np.inf
    inside = -np.sort(-below[steps == at])
    sums = np.exp(inside, dtype=np.float64).cumsum() + (reached[at - 1] if at else 0)
    return inside[min(int(sums.searchsorted(share * total)), len(inside) - 1)]


def _draw(scores: torch.Tensor, tokens: torch.Tensor, choosers: Sequence[Chooser]) -> list[int | None]:
    """Of scores [rows, some], the likeliest first, and their tokens."""
    scores, tokens, options = scores.cpu(), tokens.cpu(), [one.options for one in choosers]
    sound = scores[:, 0].isfinite().tolist()
    if any(one.top_p < 1 for one in options):
        rest = scores.softmax(-1).flip(-1).cumsum(-1).flip(-1)      # of a token and all less likely ones
        # Cut off is what the likeliest do without to have their share; the likeliest always stays.
        cut = rest <= _column([1 - one.top_p if one.top_p < 1 else -1.0 for one in options])
        cut[:, 0] = False
        scores = scores.masked_fill(cut, -torch.inf)
    if any(one.min_p > 0 for one in options):
        chances = scores.softmax(-1)
        scores = scores.masked_fill(chances < _column([one.min_p for one in options]) * chances[:, :1], -torch.inf)
    chances = ((scores - scores[:, :1]) / _column([_heat(one) for one in options])).softmax(-1)
    return [int(tokens[at, torch.multinomial(chances[at], 1, generator=one._random)]) if sound[at] else None
            for at, one in enumerate(choosers)]


def _heat(options: Options) -> float:
    return max(options.temperature, 1e-30)      # float32 has no number much nearer to 0


def _column(numbers: list[float]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None]


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _no_numbers(masked: bool) -> LabError:
    if masked:
        return LabError("the model's logits are not numbers, or give no chance to anything that the asked form lets come next")
    return LabError("the model's logits are not numbers; its file may be damaged, or its numbers too large for float16: "
                    "load it with dtype=torch.float32")


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of the chances that the model itself gave: of its logits as they are, before bias, penalties, mask,
    cuts and temperature (as vLLM's raw logprobs). token: the chosen one. top: (token, logarithm) of the likeliest, those
    first; the chosen one need not be among them. No chance at all is -9999, as OpenAI writes it."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def logprobs(logits: torch.Tensor, token: int, top: int = 0) -> Logprobs:
    """Of logits [vocabulary]: how likely `token` was, and the `top` likeliest."""
    total = logits.logsumexp(-1)
    scores, tokens = logits.topk(min(top, len(logits)))
    found = (torch.cat([logits[token, None], scores]) - total).clamp_(min=_NEVER).tolist()
    return Logprobs(token, found[0], tuple(zip(tokens.tolist(), found[1:], strict=True)))


class Words:
    """Tokens as text, a piece at a time. A character may take several tokens, and whether a token begins with a space is
    seen only beside the one before: so each piece is what a few tokens more make of the text of those before."""

    def __init__(self, tokenizer, prompt: list[int]):
        self._tokenizer, self._new = tokenizer, []
        self._before = next((prompt[-n:] for n in range(1, 9) if "\ufffd" not in self._decode(prompt[-n:])), [])

    def add(self, token: int) -> str:
        self._new.append(token)
        text = self._text()
        if text.endswith("\ufffd") and len(self._new) < _UNFINISHED:
            return ""
        return self._done(text)

    def rest(self) -> str:
        """What is still held back."""
        return self._done(self._text()) if self._new else ""

    def _text(self) -> str:
        return self._decode(self._before + self._new)[len(self._decode(self._before)):]

    def _done(self, text: str) -> str:
        if text:                         # a special token has none, and would hide the space that follows
            self._before, self._new = self._new, []
        return text

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Stops:
    """Passes text on up to the first stop string, and holds back an end that may become one."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops, self._held, self.found = stops, "", False

    def pass_on(self, text: str) -> str:
        text, self._held = self._held + text, ""
        places = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if places:
            self.found = True
            return text[:min(places)]
        longest = max((n for stop in self._stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
                      default=0)
        self._held = text[len(text) - longest:]
        return text[:len(text) - longest]

    def rest(self) -> str:
        """What is still held back: it became no stop string."""
        return "" if self.found else self._held
