"""TwinState: the real model beside its twin in the toy format: both answer, then how far they lie apart is measured."""

import time

import torch
import traitlets as t

from ..errors import LabError
from ..formats.toy import Toy
from ..loading import load
from ..quality import Divergence, divergence, tokens_of
from ..runtime.generating import Options, Stream, has_template, stream
from ..runtime.requantizing import requantized
from .background import PAUSE, Background, said_of
from .quantization_state import QuantizationState
from .settable import Settable

CONTEXT, CHUNKS = 256, 2         # of the measurement: 254 tokens are scored, some seconds on two cores
PROMPT = "What is the capital of France?"
MOST_TOKENS = 512


class TwinState(Settable, Background):
    """`prompt` is answered by the model of a QuantizationState and by its twin, whose block matrices are in the toy format (or
    continued, where there is no chat template), token by token in turn: `texts` (of the model, of the twin) grow while
    `running`; then `drift` is measured. `progress` says what is being done, `toy` which format the twin is in.

    Greedy and in float32, so that nothing but the weights differs. `run()` is all of it in code; `start()` returns at once,
    `end()` ends it. Raises LabError for settings that cannot be used.
    """

    SETTINGS, WHOSE = ("prompt", "tokens"), " of a run"
    prompt = t.Unicode(PROMPT)
    tokens = t.Any(24)
    texts = t.Tuple(t.Unicode(), t.Unicode(), default_value=("", ""), read_only=True)
    toy = t.Instance(Toy, allow_none=True, read_only=True)
    drift = t.Instance(Divergence, allow_none=True, read_only=True)

    def __init__(self, quantization: QuantizationState, **settings):
        self._quantization, self._loaded, self._twin = quantization, None, None
        self._asked = ""
        super().__init__()
        self.update(**settings)

    @property
    def models(self) -> tuple:
        """(model, twin) of the last run, as transformers models. Raises LabError before it."""
        if self._loaded is None or self._twin is None:
            raise LabError("nothing was run yet; run() makes both models")
        return self._loaded[1], self._twin[1]

    @property
    def asked(self) -> str:
        """The text that was given to both."""
        return self._asked

    @property
    def answer(self) -> str:
        """What came of it in words, or what is wrong."""
        if self.error or self.toy is None:
            return self.error or "Nothing was run yet."
        model, twin = (text.strip() for text in self.texts)
        other = "the same." if model == twin else f"“{twin}”"
        said = f"Asked “{self._asked}”, the model says as stored: “{model}” In {self.toy.name}: {other}"
        return f"{said} {drift_words(self.drift)}" if self.drift else said

    # ---- running ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin, and return at once. Raises LabError while it runs, and for settings that cannot be used."""
        if self.running:
            raise LabError("the two are running; end that or wait for it first")
        if not self.prompt.strip():
            raise LabError("there is nothing to continue; type a text first")
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or not 1 <= self.tokens <= MOST_TOKENS:
            raise LabError(f"tokens is {self.tokens!r:.40}; give how many new ones, 1 to {MOST_TOKENS}")
        if self._quantization.look.size is None:
            raise LabError(self._quantization.look.size_problem)
        self._asked = self.prompt
        self._set(error="", texts=("", ""), drift=None, toy=self._quantization.toy, progress="", running=True)
        self._begin("twin", self._work, self.prompt, self.toy, self.tokens)

    def run(self) -> str:
        """Start, wait, and return the answer. Raises LabError where something went wrong."""
        self.start()
        self._finish()
        return self.answer

    def _work(self, prompt: str, toy: Toy, tokens: int) -> None:
        error, done = "", False
        try:
            done = self._both(prompt, toy, tokens)
        except Exception as wrong:
            error = said_of(wrong, "two models ran")
        finally:
            stopped = self._stopping.is_set() and not done
            self._set(error="" if stopped else error, running=False, progress="Stopped." if stopped else "")

    def _both(self, prompt: str, toy: Toy, tokens: int) -> bool:
        """Whether it came to its end."""
        model, tokenizer = self._model()
        twin = self._made(model, toy)
        options = Options(temperature=0, max_tokens=tokens)
        asked = [{"role": "user", "content": prompt}] if has_template(tokenizer) else prompt
        self._stream([stream(one, tokenizer, asked, options, self._stopping.is_set) for one in (model, twin)])
        if self._stopping.is_set():
            return False
        read = iter(range(1, CHUNKS + 1))

        def between() -> bool:
            self.set_trait("progress", f"Measuring how far they lie apart: {next(read)} of {CHUNKS} pieces of text.")
            return self._stopping.is_set()

        self.set_trait("progress", f"Measuring how far they lie apart: {CHUNKS} pieces of {CONTEXT} tokens.")
        found = divergence(twin, model, tokens_of(tokenizer), CONTEXT, chunks=CHUNKS, progress=False, stopped=between)
        if self._stopping.is_set():
            return False
        self.set_trait("drift", found)
        return True

    def _model(self):
        """The model of the file that is looked at, loaded once."""
        path = self._quantization.gguf.paths[0]
        if self._loaded is None or self._loaded[0] != path:
            self.set_trait("progress", "Loading the model.")
            self._loaded = self._twin = None     # never two models at once
            model, tokenizer = load(path, dtype=torch.float32)
            if tokenizer is None:
                raise LabError("this file has no vocabulary, so there is no text to continue")
            self._loaded = path, model, tokenizer
        return self._loaded[1:]

    def _made(self, model, toy: Toy):
        """The twin in `toy`, made once."""
        if self._twin is None or self._twin[0] != toy:
            self._twin = None
            shown = time.monotonic()

            def done(at: int, of: int) -> None:
                nonlocal shown
                if time.monotonic() - shown >= PAUSE:
                    self.set_trait("progress", f"Rounding the weights: {at} of {of} matrices.")
                    shown = time.monotonic()
            self._twin = toy, requantized(model, toy, self._stopping.is_set, done)
        return self._twin[1]

    def _stream(self, streams: list[Stream]) -> None:
        """Both go on in turn, so that they are seen side by side."""
        self.set_trait("progress", "Writing.")
        coming, shown = list(streams), 0.0
        while coming:
            for one in list(coming):
                if next(one, None) is None:
                    coming.remove(one)
            if time.monotonic() - shown >= PAUSE or not coming:
                self.set_trait("texts", tuple(one.text for one in streams))
                shown = time.monotonic()


def drift_words(found: Divergence) -> str:
    """How far the twin lies from its model, in words; standard errors beside, as only some hundred tokens were scored."""
    if found.max_kld == 0:
        return f"Over {found.tokens} tokens both give every token the same probability, to the bit: KLD 0, measured."
    ratio, kld = found.ratio, found.mean_kld
    return (f"KLD {kld.value:.3g} ± {kld.error:.1g}, the same likeliest token {found.top1.value:.0%} of the time, perplexity "
            f"{found.perplexity.value:.1f} instead of {found.reference_perplexity.value:.1f} ({ratio.value - 1:+.1%} ± "
            f"{ratio.error:.1%}): measured over {found.tokens} tokens.")
