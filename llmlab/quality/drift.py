"""Divergence: how far a model's answers lie from a reference's, token by token, on the same text."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, nan, sqrt
from typing import NamedTuple

import numpy as np
import torch

from ..catalog import Table
from ..errors import LabError
from . import passes, statistics
from .corpus import CONTEXT, Tokens, amount, as_tokens
from .likelihood import next_tokens, pick
from .references import Reference, read_reference
from .statistics import Estimate

PERCENTILES = (99.9, 99, 95, 90, 50, 10, 5, 1, 0.1)


@dataclass(frozen=True, eq=False, repr=False)
class Divergence:
    """A model against its reference, as `llama-perplexity --kl-divergence` defines every figure; all measured.

    By scored token, float64 [tokens]: `kld` (nats), `nll` and `reference_nll` (negative log-likelihood), `dp` (probability of
    the right token less the reference's) and `same` (bool: both like the same token best). The properties sum them up.
    """

    model: str
    reference: str
    context: int
    chunks: int
    kld: np.ndarray
    nll: np.ndarray
    reference_nll: np.ndarray
    dp: np.ndarray
    same: np.ndarray

    @property
    def tokens(self) -> int:
        """How many tokens were scored."""
        return len(self.kld)

    @property
    def mean_kld(self) -> Estimate:
        """Mean Kullback-Leibler divergence of the model's distribution from the reference's, in nats."""
        return statistics.mean(self.kld)

    @property
    def median_kld(self) -> float:
        return self.kld_percentile(50)

    @property
    def p99_kld(self) -> float:
        return self.kld_percentile(99)

    @property
    def max_kld(self) -> float:
        return float(self.kld.max())

    @property
    def top1(self) -> Estimate:
        """The share of tokens where both models like the same token best, 0 to 1."""
        share = float(self.same.mean())
        return Estimate(share, sqrt(share * (1 - share) / (self.tokens - 1)) if self.tokens > 1 else nan)

    @property
    def mean_dp(self) -> Estimate:
        """Mean change of the right token's probability, as a share: below 0 where the model knows less."""
        return statistics.mean(self.dp)

    @property
    def rms_dp(self) -> Estimate:
        """Root mean square of that change: how much a token's probability wanders, either way."""
        square = statistics.mean(np.square(self.dp))
        root = sqrt(square.value)
        return Estimate(root, 0.5 / root * square.error if root else 0.0)

    @property
    def perplexity(self) -> Estimate:
        return statistics.exponential(statistics.mean(self.nll))

    @property
    def reference_perplexity(self) -> Estimate:
        return statistics.exponential(statistics.mean(self.reference_nll))

    @property
    def log_ratio(self) -> Estimate:
        """ln(perplexity / the reference's). Both read the same text, so this is far surer than either."""
        a, b = statistics.mean(self.nll), statistics.mean(self.reference_nll)
        return Estimate(a.value - b.value, sqrt(max(0.0, a.error**2 + b.error**2 - 2 * self._covariance)))

    @property
    def ratio(self) -> Estimate:
        """Perplexity over the reference's: 1.028 is 2.8 % worse."""
        return statistics.exponential(self.log_ratio)

    @property
    def difference(self) -> Estimate:
        """Perplexity less the reference's."""
        a, b = self.perplexity, self.reference_perplexity
        together = a.value * b.value * self._covariance
        return Estimate(a.value - b.value, sqrt(max(0.0, a.error**2 + b.error**2 - 2 * together)))

    @property
    def correlation(self) -> float:
        """Of the two models' negative log-likelihoods, -1 to 1."""
        spread = statistics.mean(self.nll).error * statistics.mean(self.reference_nll).error
        return self._covariance / spread if spread else nan

    def kld_percentile(self, percent: float) -> float:
        """KL divergence that `percent` of the tokens lie below, in nats."""
        return statistics.percentile(np.sort(self.kld), percent)

    def dp_percentile(self, percent: float) -> float:
        """Change of the right token's probability that `percent` of the tokens lie below, as a share."""
        return statistics.percentile(np.sort(self.dp), percent)

    @property
    def per_chunk(self) -> tuple[float, ...]:
        """Mean KL divergence of each chunk."""
        return tuple(float(part.mean()) for part in self.kld.reshape(self.chunks, -1))

    @property
    def _covariance(self) -> float:
        return statistics.covariance(self.nll, self.reference_nll)

    def to_dict(self) -> dict:
        """Every figure by name; an estimate is {"value", "error"}. Without the arrays by token."""
        def plain(value):
            return {"value": value.value, "error": value.error} if isinstance(value, Estimate) else value

        names = ("model", "reference", "context", "chunks", "tokens", "perplexity", "reference_perplexity", "ratio",
                 "log_ratio", "difference", "correlation", "mean_kld", "median_kld", "p99_kld", "max_kld", "top1", "mean_dp",
                 "rms_dp")
        return {name: plain(getattr(self, name)) for name in names} | {
            "kld_percentiles": {str(at): self.kld_percentile(at) for at in PERCENTILES},
            "dp_percentiles": {str(at): self.dp_percentile(at) for at in PERCENTILES}}

    def table(self) -> Table:
        """A row a figure, in llama-perplexity's order."""
        def row(name, value, spec, scale=1.0, unit=""):
            error = f"± {value.error * scale:{spec}}" if isinstance(value, Estimate) else ""
            plain = value.value if isinstance(value, Estimate) else value
            return {"figure": name, "measured": f"{plain * scale:{spec}}{unit}", "error": error}

        return Table([
            row("perplexity", self.perplexity, ".4f"), row("the reference's", self.reference_perplexity, ".4f"),
            row("ratio", self.ratio, ".5f"), row("mean KLD", self.mean_kld, ".4g"), row("maximum KLD", self.max_kld, ".4g"),
            *(row(f"{at:g} % KLD" if at != 50 else "median KLD", self.kld_percentile(at), ".4g") for at in PERCENTILES[:5]),
            row("mean Δp", self.mean_dp, ".3f", 100, " %"), row("RMS Δp", self.rms_dp, ".3f", 100, " %"),
            row("same top token", self.top1, ".3f", 100, " %")])

    def __repr__(self) -> str:
        return (f"{self.model} against {self.reference}: KLD {self.mean_kld:.4g} (99 %: {self.p99_kld:.4g}), same top token "
                f"{self.top1.value:.2%}, perplexity x {self.ratio.value:.5f} "
                f"(measured: {amount(self.tokens, self.chunks, self.context)})")


def divergence(model: Callable, reference: Callable | Reference | str | os.PathLike,
               tokens: Tokens | Sequence[int] | None = None, context: int | None = None, *, chunks: int | None = None,
               progress: bool = True, stopped: Callable[[], bool] = lambda: False) -> Divergence:
    """How far a model lies from a reference on a text, as `llama-perplexity --kl-divergence` defines it.

    `reference` is another model with the same vocabulary, or log-probabilities once kept by `quality.save_reference` (or by
    llama-perplexity itself), or the path of such a file, which also brings tokens and context. `tokens` is
    `quality.tokens_of(tokenizer, text)`, or plain ids, which get no BOS. Chunks, scored half and memory are as in
    `perplexity`; `context` is 512 unless given. Against a model every token of the vocabulary counts; 16-bit references
    leave out what has a probability below e^-16, as llama-perplexity does.

    Raises LabError: other vocabulary, a reference made on other tokens or another context, text shorter than two chunks,
    logits that are not numbers.
    """
    from tqdm.auto import tqdm

    if isinstance(reference, (str, os.PathLike)):
        reference = read_reference(reference)
    if isinstance(reference, Reference):
        tokens, context, count = _of_reference(reference, tokens, context, chunks)
    else:
        if tokens is None:
            raise LabError("tokens is missing: quality.tokens_of(tokenizer) makes them from the text llmlab ships")
        tokens, context = as_tokens(tokens), context or CONTEXT
        count = tokens.count(context, chunks)
    memory = (passes.Held(), passes.Held(), passes.Held())
    found, models = [], [model] if isinstance(reference, Reference) else [model, reference]
    with passes.evaluated(*models), tqdm(total=count, desc="divergence", unit="chunk", disable=not progress) as bar:
        for index in range(count):
            found.append(_chunk(model, reference, tokens, index, context, memory))
            bar.set_postfix_str(f"KLD {np.concatenate([one.kld for one in found]).mean():.4g}", refresh=False)
            bar.update()
            if stopped():
                break
    columns = ByToken(*map(np.concatenate, zip(*found, strict=True)))
    name = reference.model if isinstance(reference, Reference) else passes.name_of(reference)
    return Divergence(passes.name_of(model), name, context, len(found), **columns._asdict())


class ByToken(NamedTuple):
    """What `Divergence` keeps by token."""

    kld: np.ndarray
    nll: np.ndarray
    reference_nll: np.ndarray
    dp: np.ndarray
    same: np.ndarray


def _of_reference(reference: Reference, tokens, context, chunks) -> tuple[Tokens, int, int]:
    """Tokens, context and number of chunks of a saved reference, after what the caller said agrees with it."""
    if context not in (None, reference.context):
        raise LabError(f"{reference.path} was made with a context of {reference.context}, not {context}: leave context out")
    if chunks is not None and not 1 <= chunks <= reference.chunks:
        raise LabError(f"{reference.path} has {reference.chunks} chunks, and chunks={chunks} was asked")
    count = chunks or reference.chunks
    if tokens is None:
        return reference.tokens, reference.context, count
    given, kept = as_tokens(tokens), reference.tokens
    length = count * reference.context
    if len(given) < length or not np.array_equal(given.ids[:length], kept.ids[:length]):
        shorter = min(length, len(given))
        same = np.append(given.ids[:shorter] == kept.ids[:shorter], False)
        at = int(same.argmin())
        raise LabError(f"{reference.path} was made on other tokens (the first that differs is number {at + 1}): take its own "
                       "(leave tokens out), or make a new reference")
    if given.bos != kept.bos:
        if kept.bos is not None:
            raise LabError(f"{reference.path} was made with token {kept.bos} at each chunk's head, and these tokens have "
                           f"{'none' if given.bos is None else given.bos}: take its own (leave tokens out)")
        kept = given  # llama.cpp's files do not say it
    return kept, reference.context, count


def _chunk(model, reference, tokens: Tokens, index: int, context: int, memory: tuple[passes.Held, ...]) -> ByToken:
    """Every figure by token of one chunk."""
    ids, targets, out = tokens.chunk(index, context), next_tokens(tokens, index, context), []
    for rows, base in _together(model, reference, ids, index, memory):
        wanted = targets[sum(len(part.kld) for part in out):][:len(rows)]
        out.append(compare(rows, base, wanted, getattr(reference, "least", -inf), memory[2]))
    return ByToken(*map(np.concatenate, zip(*out, strict=True)))


def _together(model, reference, ids: np.ndarray, index: int,
              memory: tuple[passes.Held, ...]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of log-probabilities of the same positions, float64 [rows, vocabulary]; the reference's second."""
    mine, held, spare = memory
    where = f"chunk {index + 1}"
    saved = isinstance(reference, Reference)
    theirs = reference.rows(index, held, spare) if saved else passes.logits(reference, ids, f"{where} of the reference", held)
    for rows, base in zip(passes.logits(model, ids, where, mine), theirs, strict=True):
        if rows.shape[-1] != base.shape[-1]:
            raise LabError(f"the model's vocabulary has {rows.shape[-1]} tokens and the reference's {base.shape[-1]}: "
                           "only models that share a tokenizer can be compared token by token")
        base = base.to(rows.device)
        yield passes.log_probabilities(rows, spare), base if saved else passes.log_probabilities(base, spare)


def compare(rows: torch.Tensor, base: torch.Tensor, wanted: torch.Tensor, least: float, spare: passes.Held) -> ByToken:
    """Figures by token from log-probabilities; what the reference gives a log-probability of `least` or less adds nothing.
    `rows` are written over."""
    nll, base_nll = -pick(rows, wanted), -pick(base, wanted)
    same = rows.argmax(dim=-1) == base.argmax(dim=-1)
    apart = torch.sub(base, rows, out=rows)
    apart *= torch.exp(base, out=spare(*base.shape, base.device))
    kld = apart.masked_fill_(base <= least, 0).sum(dim=-1)
    dp = (-nll).exp() - (-base_nll).exp()
    return ByToken(*(column.cpu().numpy() for column in (kld, nll, base_nll, dp, same)))
