"""HeatState: keys and values of a real text, one head of one layer, as they are and as a quantized cache gives them back."""

from dataclasses import dataclass, field

import numpy as np
import torch
import traitlets as t

from ..errors import LabError
from ..gguf import read_gguf
from ..kernels import Pages
from ..runtime.cache import turned
from ..starting import decoder
from .background import Background, said_of
from .quantization_state import path_of
from .settable import settable

TEXT = ("Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
        "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it.")
MOST_TOKENS = 96            # that are read, and drawn
SIDES = ("K", "V")
PACKED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
PLACE = {"text": TEXT, "side": "K", "layer": 0, "head": 0, "rotated": False}


@dataclass(frozen=True, eq=False)
class Heat:
    """One head's numbers, float32 [tokens, channels]: `original` as the cache was given them (rotated, where it rotates),
    `kept` as it gives them back in `type`.

    error: root mean square of what was lost, over that of the numbers. peak: the largest channel's (`channel`) root mean square
    over that of all; an outlier among 32 numbers that share a scale leaves fewer levels to the others. bits: of a number, with
    its scale.
    """

    original: np.ndarray = field(repr=False)
    kept: np.ndarray = field(repr=False)
    type: str
    rotated: bool
    error: float
    peak: float
    channel: int
    bits: float


def heat(x: torch.Tensor, type: str, rotated: bool = False) -> Heat:
    """x [tokens, channels] through a cache in `type` and out again. Raises LabError where its blocks do not fit."""
    x, kept, bits = through(x[None], type, rotated)
    x, kept = x[0], kept[0]
    rms = x.square().mean().sqrt().clamp(min=1e-30)
    channels = x.square().mean(0).sqrt()
    return Heat(x.numpy(), kept.numpy(), type, rotated, float(_lost(x[None], kept[None])[0]), float(channels.max() / rms),
                int(channels.argmax()), bits)


def through(x: torch.Tensor, type: str, rotated: bool = False) -> tuple[torch.Tensor, torch.Tensor, float]:
    """x [heads, tokens, channels] -> (the same in float32, rotated where that is asked; what a cache in `type` makes of it;
    bits a number). Raises LabError where blocks do not fit."""
    x = turned(x) if rotated else x.float()
    heads, tokens, channels = x.shape
    pages = Pages(type, 1, heads, channels, tokens)
    pages.write(torch.arange(tokens), x[None])
    kept = pages.numbers()[0].permute(1, 0, 3, 2).flatten(1, 2)[:, :tokens]
    return x, kept, 8 * pages.bytes / (pages.cells * heads * channels)


def _lost(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[heads]: root mean square of the error over that of the numbers."""
    return ((kept - x).square().mean((-2, -1)) / x.square().mean((-2, -1)).clamp(min=1e-30)).sqrt()


class HeatState(settable(PLACE), Background):
    """Where one looks as traits; `heat` follows once the model has read the text.

    text: what it reads (its first 96 tokens). side: "K" or "V". layer, head: KV head. rotated: by a Hadamard matrix before it
    is quantized. The types are those of a CacheState, `caches`. `start()` reads in a thread, `run()` reads and returns the
    answer.
    """

    WHOSE = " of a heat map"
    heat = t.Instance(Heat, allow_none=True, read_only=True)
    tokens = t.List(t.Unicode(), read_only=True)         # those that were read

    def __init__(self, caches, file=None, **settings):
        """file: a GGUF's path, None for the small model llmlab uses everywhere. Raises LabError for a name that is no
        setting."""
        self._caches, self._file, self._reader, self._numbers = caches, file, None, None
        super().__init__()
        self.update(**settings)
        caches.observe(self._follow, ["look"])

    @property
    def shape(self) -> tuple[int, int]:
        """How many layers and KV heads there are; (0, 0) before a text was read."""
        return tuple(self._numbers.shape[1:3]) if self._numbers is not None else (0, 0)

    @property
    def type(self) -> str:
        """The cache type of the side that is looked at."""
        return self._caches.kv[SIDES.index(self.side)]

    @property
    def answer(self) -> str:
        """What is seen in words, or what is wrong."""
        if self.error or self.heat is None:
            return self.error or "No text was read yet."
        found = self.heat
        where = f"{'Keys' if self.side == 'K' else 'Values'} of layer {self.layer}, KV head {self.head}"
        turned = " rotated" if found.rotated else ""
        return (f"{where}{turned}, {len(self.tokens)} tokens: channel {found.channel} is {found.peak:.1f} times as large as "
                f"all channels are (RMS). In {found.type}, {found.bits:.3g} bits a number, they come back {found.error:.2%} "
                "off (RMS error over RMS): measured.")

    def errors(self, side: str = "K") -> dict[str, tuple[float, float]]:
        """{cache type: (relative error as they are, rotated)}, median over all layers and heads. Raises LabError before a text
        was read."""
        if self._numbers is None:
            raise LabError("no text was read yet; run() reads it")
        found = self._numbers[SIDES.index(side)].flatten(0, 1)
        return {type: tuple(float(_lost(*through(found, type, turned)[:2]).median()) for turned in (False, True))
                for type in PACKED}

    def extreme(self) -> tuple[int, int]:
        """(layer, head) whose largest channel stands out the most, of this side."""
        if self._numbers is None:
            raise LabError("no text was read yet; run() reads it")
        squares = self._numbers[SIDES.index(self.side)].square().mean(-2)
        return divmod(int((squares.amax(-1) / squares.mean(-1)).argmax()), squares.shape[1])

    # ---- reading ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to read, and return at once. Raises LabError while it reads, and for a text without words."""
        if self.running:
            raise LabError("a text is being read; wait for it first")
        if not isinstance(self.text, str) or not self.text.strip():
            raise LabError("there is nothing to read; type a text first")
        self._set(error="", progress="Opening the model.", running=True)
        self._begin("heat", self._work, self.text)

    def run(self) -> str:
        """Read, wait, and return the answer. Raises LabError where something went wrong."""
        self.start()
        self._finish()
        return self.answer

    def _work(self, text: str) -> None:
        error = ""
        try:
            self._read(text)
        except Exception as wrong:
            error = said_of(wrong, "reading a text")
        finally:
            self._set(error=error, running=False, progress="")
            self._follow()

    def _read(self, text: str) -> None:
        if self._reader is None:
            file = read_gguf(path_of(self._file))
            self._reader = decoder(file, strategy="compact", dtype="float32", context=MOST_TOKENS)
        reader, words = self._reader
        if words is None:
            raise LabError("this file has no vocabulary, so there is no text to read")
        asked = words(text)["input_ids"][:MOST_TOKENS]
        self.set_trait("progress", f"Reading {len(asked)} tokens.")
        reader.forget()
        reader.read(asked)
        self._numbers = keys_and_values(reader)
        self.set_trait("tokens", [words.decode([one]) for one in asked])

    @t.observe("side", "layer", "head", "rotated")
    def _follow(self, _=None) -> None:
        if self._numbers is None or self.running:
            return
        layers, heads = self.shape
        try:
            if self.side not in SIDES:
                raise LabError(f"side is {self.side!r:.40}; give K or V")
            for name, most in (("layer", layers), ("head", heads)):
                at = getattr(self, name)
                if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < most:
                    raise LabError(f"there is no {name} {at!r:.40}; there are {most}, from 0")
            found = heat(self._numbers[SIDES.index(self.side), self.layer, self.head], self.type, bool(self.rotated))
        except LabError as wrong:
            self.set_trait("error", str(wrong))
            return
        self._set(error="", heat=found)


def keys_and_values(reader) -> torch.Tensor:
    """What a lean decoder remembers: float32 [2, layers, kv_heads, tokens, head_dim]. Raises LabError where its layers differ
    in shape."""
    count = len(reader.tokens)
    found = [one[:, :, :count].float() for one in reader.caches]
    if len({tuple(one.shape) for one in found}) > 1:
        raise LabError("layers of different heads cannot be looked at side by side; take another model")
    return torch.stack(found, 1)
