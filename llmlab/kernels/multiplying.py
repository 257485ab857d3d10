"""What is done with a packed matrix: multiply (differentiable to the input), look rows up, unpack it whole."""

import torch
from torch.autograd.function import once_differentiable

from ..errors import LabError
from .arithmetic import check_dtype
from .packed import Packed


class _Multiply(torch.autograd.Function):
    """y = x W^T for a W that never changes: the gradient goes to x alone."""

    @staticmethod
    def forward(ctx, x, kernel):
        ctx.kernel = kernel
        return kernel.matmul(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return ctx.kernel.transposed(g), None


def linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None, expert: int | None = None) -> torch.Tensor:
    """x [..., cols] times the packed weights [rows, cols], plus `bias` [rows] -> [..., rows] in x.dtype.

    Differentiable to x and bias; under autocast x is cast first, as by torch's own linear. `expert` picks one matrix of a
    packed stack. Raises LabError where the width or the device differs, x is not floating point, or a stack is given
    without an expert.
    """
    packed = one(packed, expert)
    check_dtype(x.dtype, packed.name)
    if x.ndim == 0 or x.shape[-1] != packed.cols:
        raise LabError(f"{packed.name}: the input is {tuple(x.shape)}, but its last dimension must be {packed.cols}, the "
                       f"width of the packed [{packed.rows}, {packed.cols}]")
    if x.device != packed.device:
        raise LabError(f"{packed.name}: the input is on {x.device}, the packed weights are on {packed.device}; move one of "
                       "them (Packed.to)")
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            return _linear(x, packed, None if bias is None else bias.to(x.dtype))
    return _linear(x, packed, bias)


def _linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    kernel, flat = packed.kernels[0], x.reshape(-1, packed.cols)
    if torch.is_grad_enabled() and x.requires_grad:
        y = _Multiply.apply(flat, kernel)
    else:
        y = kernel.matmul(flat)
    return (y if bias is None else y + bias).view(*x.shape[:-1], packed.rows)


def rows(packed: Packed, index: torch.Tensor, dtype: torch.dtype | None = None, expert: int | None = None) -> torch.Tensor:
    """The weights' rows at `index` (integers of any shape) -> [..., cols] in `dtype` (packed.dtype); an embedding lookup.

    Only these rows are unpacked. Raises LabError for an index that is not integer or lies outside 0 <= i < rows.
    """
    packed, dtype = one(packed, expert), dtype or packed.dtype
    check_dtype(dtype, packed.name)
    if index.dtype not in (torch.int64, torch.int32):
        raise LabError(f"{packed.name}: rows are looked up by int64 or int32, not by {index.dtype}")
    flat = index.reshape(-1)
    if flat.device.type == "cpu" and flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < packed.rows:
        wrong = flat[(flat < 0) | (flat >= packed.rows)][0]
        raise LabError(f"{packed.name}: there is no row {int(wrong)} of {packed.rows}")
    return packed.kernels[0].take(flat.to(packed.device), dtype).view(*index.shape, packed.cols)


def dense(packed: Packed, dtype: torch.dtype | None = None) -> torch.Tensor:
    """All the weights as numbers: [rows, cols], or [experts, rows, cols] of a stack, in `dtype` (packed.dtype)."""
    dtype = dtype or packed.dtype
    check_dtype(dtype, packed.name)
    parts = [kernel.dense(dtype) for kernel in packed.kernels]
    return parts[0] if packed.experts is None else torch.stack(parts)


def one(packed: Packed, expert: int | None) -> Packed:
    """The matrix itself, or one of a stack."""
    if expert is not None:
        return packed[expert]
    if packed.experts is not None:
        raise LabError(f"{packed.name} is a stack of {packed.experts} matrices; say which one (expert=)")
    return packed
