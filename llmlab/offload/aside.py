"""Fast mode: what lies in RAM is multiplied there, by the processor, and does not come to the device for a token.

On a processor that is the same arithmetic over the same bytes without a copy. Beside a card it is another: x goes to RAM, is
multiplied as the processor does it, and comes back, so that logits differ a little; `Offloaded.deviation` measures by how much.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..kernels import Packed
from ..kernels.compact import Compact

# Tokens of a pass up to which x is sent to a matrix and not the matrix to x, as llama.cpp has it (op_offload_min_batch_size).
FEW = 31


@dataclass(frozen=True)
class Aside:
    """How the processor multiplies for another device. dtype: in which; few: tokens of a pass for which it does, at most."""

    dtype: torch.dtype
    few: int = FEW


class InRam(Compact):
    """A matrix in RAM for inputs that are on another device, or of another dtype."""

    def __init__(self, blocks: torch.Tensor, type: str, cols: int, dtype: torch.dtype):
        super().__init__(blocks, type, cols)
        self.dtype, self.own = dtype, Compact(blocks, type, cols)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return self._there(self.own.matmul, x)

    def matmul_each(self, x: torch.Tensor) -> torch.Tensor:
        return self._there(self.own.matmul_each, x)

    def _there(self, multiply: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return multiply(x.to(self.device, self.dtype)).to(x.device, x.dtype)


def in_ram(value, aside: Aside | None):
    """A matrix over a buffer in RAM as it is multiplied there; whatever else stays as it is."""
    if aside is None or not isinstance(value, Packed):
        return value
    return replace(value, kernels=(InRam(value.blocks, value.format, value.cols, aside.dtype),),
                   why=f"multiplied where it lies, in RAM, in {_name(aside.dtype)}")


def label(aside: Aside | None) -> str:
    """What is said of a decoder in fast mode."""
    if aside is None:
        return "fast mode: RAM layers computed where they lie; the same arithmetic here, so logits are those of the exact mode"
    return (f"fast mode: RAM layers computed where they lie, in {_name(aside.dtype)} by the processor, for up to {aside.few} "
            "tokens at once; logits deviate from the exact mode's (decoder.deviation measures by how much)")


@dataclass(frozen=True)
class Deviation:
    """Logits of fast mode beside those of the exact mode, of the same text read token after token: measured (of the same
    arithmetic: exact, nothing). most: largest difference of a logit; kld: mean Kullback-Leibler divergence in nats of a
    token's chances, worst: the largest; same: share of tokens after which the same one is likeliest."""

    tokens: int
    most: float = 0.0
    kld: float = 0.0
    worst: float = 0.0
    same: float = 1.0
    kind: str = "measured"

    @classmethod
    def of(cls, fast: torch.Tensor, exact: torch.Tensor) -> "Deviation":
        """Both [tokens, vocabulary]."""
        fast, exact = fast.double(), exact.double()
        ours, theirs = fast.log_softmax(-1), exact.log_softmax(-1)
        kld = (theirs.exp() * (theirs - ours)).sum(-1).clamp_min(0)
        return cls(len(fast), float((fast - exact).abs().max()), float(kld.mean()), float(kld.max()),
                   float((fast.argmax(-1) == exact.argmax(-1)).double().mean()))

    def __str__(self) -> str:
        if self.kind == "exact":
            return "fast mode: RAM layers computed where they lie; logits deviate by nothing: the same arithmetic (exact)"
        return (f"fast mode: RAM layers computed where they lie; logits deviate by {self.most:.2g} at most, mean KLD "
                f"{self.kld:.2g} nats, the same token likeliest after {self.same:.0%} of {self.tokens} (measured)")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
