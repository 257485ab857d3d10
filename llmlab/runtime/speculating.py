"""Several tokens a pass: the next ones are guessed, read together, and taken back from the first that is wrong.

A pass over a model that comes through a link costs what the link moves, however many tokens it is for. `Decoder.read_each`
gives for each of several tokens the very logits that reading it alone gives, and what the options draw from those is the text;
a guess only decides what was read beforehand. So the text is the same, token for token, greedy or drawn, whatever is guessed
(Leviathan et al. 2023, arXiv 2211.17192, accept by chance instead and keep the distribution, not the text of a seed).
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from ..errors import LabError
from ..memory import checked_integer
from ..units import format_bytes

MOST = 128              # tokens guessed at once at most: a ring of packed cells has room for 512 beside its window
_LATELY = 9             # passes whose seconds count
_FADES = 0.8            # what a guess counts for, a pass with guesses later
_FORGETS = 0.97         # and a pass without later
_HOPE = (1.0, 0.5)      # right and wrong guesses that are taken for granted before there were any
_NEXT_COSTS = 0.25      # of a pass of one token: another one in it, before that was measured
_CATCH_UP = 256         # tokens that a draft reads between two passes, so that an answer can be stopped there

Draw = Callable[[torch.Tensor, list[int]], int]      # logits, tokens guessed before -> what the options would take of them


class Proposer(Protocol):
    """Guesses what comes next. count: most tokens at once. free: a guess costs nothing, so that one can be made only to see
    whether it would have been right. pace: how many are wanted; None for always `count`."""

    count: int
    free: bool
    pace: "Pace | None"

    def check(self, memory, tokenizer) -> None:
        """Raises LabError where it cannot guess for them."""

    def propose(self, tokens: list[int], most: int, draw: Draw) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, all there are so far."""


class Pace:
    """How many tokens to guess: as many as bring the most tokens a second.

    Of n guesses, each right with the same chance p, a pass has (1 - p^(n + 1)) / (1 - p) tokens (Leviathan et al. 2023,
    equation 1). p is the share that was right lately, a guess counting for a fifth less with each pass that had some since;
    what a pass of one token takes here, and each further one in it, are medians of the last passes, guessing included. Where a
    token more costs as much as a pass, nothing is guessed; what was not tried for long is forgotten, and tried again.
    """

    def __init__(self):
        self._right = self._wrong = 0.0
        self._fades = _FORGETS
        self._one, self._next, self._guess = (deque(maxlen=_LATELY) for _ in range(3))

    def many(self, most: int) -> int:
        """How many guesses pay, of up to `most`."""
        if not self._one:                   # the first pass shows what one takes
            return 0
        one = _median(self._one)
        further = (_median(self._next) if self._next else _NEXT_COSTS * one) + (_median(self._guess) if self._guess else 0.0)
        share = self.share
        return max(range(most + 1), key=lambda n: (1 - share ** (n + 1)) / (one + n * further))

    @property
    def share(self) -> float:
        """Of guesses, those expected to be right."""
        return (self._right + _HOPE[0]) / (self._right + self._wrong + sum(_HOPE))

    def judged(self, right: bool) -> None:
        """A guess was this."""
        self._fades = _FADES
        if right:
            self._right += 1
        else:
            self._wrong += 1

    def passed(self, guesses: int, seconds: float, guessing: float) -> None:
        """A pass with so many guesses took so long, and `guessing` them before it."""
        self._right, self._wrong, self._fades = self._right * self._fades, self._wrong * self._fades, _FORGETS
        if not guesses:
            self._one.append(seconds)
            return
        self._guess.append(guessing / guesses)
        if self._one:
            self._next.append(max(0.0, seconds - _median(self._one)) / guesses)


class PromptLookup:
    """Guesses that a text goes on as it did where its last tokens stood before (prompt lookup decoding, Saxena 2023): good at
    summaries, edits of code and whatever repeats itself, and free.

    most, least: of the last tokens so many are looked up, as many as are found; where they stood several times, the last time
    counts. count: most tokens guessed. steady: always as many. Raises LabError for numbers that cannot be.
    """

    free = True

    def __init__(self, most: int = 4, least: int = 2, count: int = 16, steady: bool = False):
        self.most = checked_integer("most", most, 1, 64, "give how many of the last tokens are looked up, from 1 to 64")
        self.least = checked_integer("least", least, 1, self.most, f"give a whole number from 1 to {self.most}, which is most")
        self.count, self.pace = _count(count), None if steady else Pace()
        self._tokens: list[int] = []
        self._bytes = bytearray()           # the same, four bytes each: searched a hundred times as quickly

    def __str__(self) -> str:
        return "prompt lookup"

    def check(self, memory, tokenizer) -> None:
        """Any model will do."""

    def propose(self, tokens: list[int], most: int, draw: Draw | None = None) -> list[int]:
        known = len(self._tokens)
        if tokens[:known] != self._tokens:
            self._tokens, self._bytes, known = [], bytearray(), 0
        self._tokens += tokens[known:]
        self._bytes += b"".join(token.to_bytes(4, "little") for token in tokens[known:])
        for count in range(min(self.most, len(tokens) - 1), self.least - 1, -1):
            if at := self._after(count):
                # What follows may reach the text's own end: from there it goes on repeating itself.
                return [tokens[at + i % (len(tokens) - at)] for i in range(min(most, self.count))]
        return []

    def _after(self, count: int) -> int:
        """The token after the last place where the last `count` stood before; 0 where they did not."""
        wanted, end = self._bytes[-4 * count:], len(self._bytes) - 1
        while (at := self._bytes.rfind(wanted, 0, end)) % 4:
            if at < 0:
                return 0
            end = at + len(wanted) - 1
        return at // 4 + count


class Draft:
    """Guesses what a small lean decoder with the same vocabulary would say: with its logits in place of the model's, and the
    same random numbers.

    decoder: it goes on with one text, so give it to one conversation at a time. words: its tokenizer (None: of its file).
    count: most tokens guessed; steady: always as many. A text longer than its context it reads from the last half context on.
    Raises LabError for a decoder that is none, and one without a vocabulary.
    """

    free = False

    def __init__(self, decoder, words=None, count: int = 8, steady: bool = False):
        if not hasattr(decoder, "keep") or not hasattr(decoder, "read"):
            raise LabError(f"a {type(decoder).__name__} cannot guess; give a lean decoder, llmlab.decoder")
        if words is None and getattr(decoder, "file", None) is not None:
            from ..vocabulary import words_of
            words = words_of(decoder.file)
        if words is None:
            raise LabError("the draft's file has no vocabulary, so its tokens may mean anything; give a file that has one")
        self.decoder, self.words = decoder, words
        self.count, self.pace = _count(count), None if steady else Pace()
        self._first = self._length = 0      # where what it has read begins in the text, and how long that was
        self._checked, self._size = None, 0

    def __str__(self) -> str:
        return f"a draft ({self.decoder.architecture}, {format_bytes(self.decoder.resident_bytes)} beside the model)"

    def check(self, memory, tokenizer) -> None:
        """Raises LabError for a model with another vocabulary: up to the shorter's end, which may be padded, tokens are to
        have the same numbers."""
        if getattr(memory, "decoder", memory) is self.decoder:
            raise LabError("the draft is the model itself, and it has one memory; open a smaller one")
        if self._checked is tokenizer:
            return
        own, other = _numbers(self.words), _numbers(tokenizer)
        self._size = min(max(own.values(), default=-1), max(other.values(), default=-1)) + 1
        wrong = [token for token, number in {*own.items()} ^ {*other.items()} if number < self._size]
        if wrong:
            raise LabError(f"the draft has another vocabulary than the model ({len(own):,} and {len(other):,} tokens; "
                           f"{wrong[0]!r:.40} is not the same); give a smaller model of the same family")
        self._checked = tokenizer

    def propose(self, tokens: list[int], most: int, draw: Draw) -> list[int]:
        decoder, most = self.decoder, min(most, self.count)
        if len(tokens) < self._length:
            self._first = 0                 # another text
        self._length = len(tokens)
        if decoder.context is not None and len(tokens) - self._first + most > decoder.context:
            most = min(most, decoder.context // 4)
            self._first = len(tokens) - decoder.context // 2
        text = tokens[self._first:]
        known = decoder.keep(text)
        if max(text[known:]) >= self._size:
            return []
        logits, found = decoder.read(text[known:known + _CATCH_UP]), []
        while known + _CATCH_UP >= len(text) and len(found) < most:
            if found:
                logits = decoder.read(found[-1:])
            token = draw(logits, found)
            if token >= self._size:
                break
            found.append(token)
        return found


def proposer_of(draft, memory, tokenizer) -> Proposer | None:
    """What guesses: "lookup", a proposer, a lean decoder, or the (decoder, words) of `llmlab.decoder`; None for nothing.
    Raises LabError for what cannot guess for a memory and a tokenizer."""
    if draft is None:
        return None
    if not hasattr(memory, "read_each"):
        raise LabError("guessing tokens (draft) is for a lean decoder, llmlab.decoder; leave draft out")
    if recent := getattr(getattr(memory, "decoder", memory), "recent", 0):
        raise LabError(f"wrong guesses are taken back, and of the last {recent:,} tokens in full precision (recent) those that "
                       "they pushed out would not come back; leave out draft, or recent")
    if isinstance(draft, str):
        if draft != "lookup":
            raise LabError(f"draft is {draft[:60]!r}; give 'lookup', or a small model's decoder, llmlab.decoder(...)")
        draft = PromptLookup()
    elif isinstance(draft, tuple) and len(draft) == 2:
        draft = Draft(*draft)
    elif not hasattr(draft, "propose"):
        draft = Draft(draft)
    draft.check(memory, tokenizer)
    return draft


class Ahead:
    """Reads a text token after token with a lean decoder, and each time what `proposer` guesses comes next with it.

    proposed, accepted: tokens guessed and read, and those of them that came. passes: over the model.
    """

    def __init__(self, memory, proposer: Proposer):
        self.memory, self.proposer = memory, proposer
        self.proposed = self.accepted = self.passes = 0
        self._held: deque[tuple[int, torch.Tensor]] = deque()     # guesses that were read, and the logits after each
        self._untried: int | None = None                          # a guess that was not
        self._said = 0                                            # tokens of the text whose logits were given out
        self._room = MOST                                         # guesses that there was room for at once

    def known(self, said: list[int]) -> torch.Tensor | None:
        """The logits after the last of `said`, all tokens so far, where its guess was right; None where it is to be read, and
        then what was guessed is taken back."""
        pace, token = self.proposer.pace, said[-1]
        if self._untried is not None and pace:
            pace.judged(self._untried == token)
        self._untried = None
        if not self._held:
            return None
        guess, logits = self._held[0]
        if pace:
            pace.judged(guess == token)
        if guess != token:
            self.take_back(said)
            return None
        self._held.popleft()
        self.accepted, self._said = self.accepted + 1, len(said)
        return logits.clone()       # of its own: nothing then holds those of all guesses while the next pass makes others

    def read(self, said: list[int], most: int, draw: Draw, ends: set[int]) -> torch.Tensor:
        """Read the last of `said`, and up to `most` guesses with it, none from the first of `ends` on; the logits after it."""
        proposer, pace = self.proposer, self.proposer.pace
        most = max(0, min(most, proposer.count, spare(self.memory), self._room))
        many, began = (pace.many(most) if pace else most), time.perf_counter()
        guesses = proposer.propose(said, max(many, 1), draw) if many or most and proposer.free else []
        guesses = guesses[:next((at for at, token in enumerate(guesses) if token in ends), len(guesses))]
        if not many and guesses:
            self._untried = guesses[0]
        guesses, guessed = guesses[:many], time.perf_counter()
        logits, guesses = self._read(said[-1], guesses)
        if pace:
            pace.passed(len(guesses), time.perf_counter() - guessed, guessed - began)
        self.passes, self.proposed, self._said = self.passes + 1, self.proposed + len(guesses), len(said)
        self._held.extend(zip(guesses, logits[1:], strict=True))
        return logits[0].clone() if guesses else logits[0]

    def _read(self, token: int, guesses: list[int]) -> tuple[torch.Tensor, list[int]]:
        """The logits after a token and each of the guesses; of fewer of these where a budget has no room for so many."""
        while guesses:
            held = len(self.memory.tokens)
            try:
                return self.memory.read_each([token, *guesses]), guesses
            except LabError:
                if len(self.memory.tokens) != held:     # not before it began: what was read is gone
                    raise
                self._room = len(guesses) // 2
                guesses = guesses[:self._room]
        return self.memory.read([token])[None], guesses

    def take_back(self, said: list[int]) -> None:
        """What was read beyond the text is read no more."""
        if self._held:
            self._held.clear()
            self.memory.keep([*said[:self._said], -1])       # no token is -1, and the last one is never kept


def spare(memory) -> int:
    """How many tokens can be read beyond the next one and taken back, so that nothing tells that they were read.

    Not beyond the context; not into cells that the next token alone would not make room for, as a CUDA graph looks at all
    there are; not past the text from which on positions turn by other angles (Phi-3); none where the last tokens stay in
    full precision (`recent`): what those pushed out would not come back.
    """
    decoder = getattr(memory, "decoder", memory)
    count = len(decoder.tokens) + 1
    place = len(decoder.dropped) + count
    limits = [0 if decoder.recent else MOST]
    if memory.context is not None:
        limits.append(memory.context - count)
    if not decoder.kv and count <= decoder.cells:
        limits.append(decoder.cells - count)
    limits += [turning.limit - place for turning in decoder.weights.turnings if turning.limit is not None
               and place <= turning.limit]
    return max(0, min(limits))


def _median(numbers: deque[float]) -> float:
    return sorted(numbers)[len(numbers) // 2]


def _count(count: int) -> int:
    return checked_integer("count", count, 1, MOST, f"give how many tokens are guessed at most, from 1 to {MOST}")


def _numbers(words) -> dict[str, int]:
    """Tokens by how they are spelled."""
    return words.get_vocab() if hasattr(words, "get_vocab") else words.tokenizer.get_vocab()
