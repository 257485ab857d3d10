"""Reference: the whole matrix as numbers, then torch's own linear. Slow, obvious, what the others are held against."""

import torch
from torch.nn import functional

from .compact import Compact


class Reference(Compact):
    """One matrix as blocks; every use unpacks all of it."""

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.dense(x.dtype))

    def transposed(self, g: torch.Tensor) -> torch.Tensor:
        return g @ self.dense(g.dtype)
