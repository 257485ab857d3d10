"""What every strategy must do for every format: said once, for the tests of this process and of others with fewer instructions.

`python tests/kernel_checks.py` checks everything under the instructions that ATEN_CPU_CAPABILITY allows and prints the largest
errors as JSON.
"""

import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

if str(Path(__file__).parents[1]) not in sys.path:      # run as a script, of a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

from llmlab import formats, kernels
from llmlab.formats import FORMATS
from llmlab.kernels import choosing, int4, nibbles
from llmlab.kernels.unpacking import levels

ROWS, COLS = 67, 512
TOKENS = (1, 2, 7, 64)
LIMIT = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
STRATEGIES = ("reference", "compact", "fast")


def runnable() -> list[str]:
    """The formats that can be packed, new ones too."""
    return [name for name, layout in FORMATS.items() if layout.unpack or name in ("F32", "F16", "BF16")]


@cache
def blocks(format: str, rows: int = ROWS, cols: int = COLS) -> torch.Tensor:
    """Blocks of random bytes whose weights are of a size that half precision can hold: uint8 [rows, row_bytes]."""
    layout, random = FORMATS[format], torch.Generator().manual_seed(1)
    need, cols = rows * cols // layout.block, -(-cols // layout.block) * layout.block
    if layout.unpack is None:
        numbers = torch.randn(rows, cols, generator=random)
        return numbers.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[format]).view(torch.uint8)
    noise = torch.randint(0, 256, (20000, layout.block_bytes), dtype=torch.uint8, generator=random)
    size = formats.dequantize(noise, format).abs().amax(1)
    good = noise[(size > 0.05) & (size < 20)]       # a NaN is neither
    assert len(good) > 20, f"{format}: nearly all random blocks are infinite, zero or huge"
    return good[torch.randint(0, len(good), (need,), generator=random)].view(rows, -1)


@cache
def exact(format: str, rows: int = ROWS, cols: int = COLS) -> torch.Tensor:
    """The weights of `blocks` as gguf-py has them where it knows the format, in float64."""
    import gguf
    data = blocks(format, rows, cols)
    try:
        return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[format]).copy()).double()
    except (KeyError, NotImplementedError):
        return formats.dequantize(data, format).double()


def error(y: torch.Tensor, true: torch.Tensor) -> float:
    """Relative Frobenius distance."""
    return float((y.double() - true).norm() / true.norm())


def kernel(format: str, strategy: str, dtype: torch.dtype, rows: int = ROWS, cols: int = COLS):
    """A matrix packed by a strategy, or by a way of being fast whether or not it is quick here; None where it does not fit."""
    data = blocks(format, rows, cols)
    if strategy in STRATEGIES:
        return kernels.pack(data, format, strategy, dtype)
    known = levels(format)
    if known is None or strategy == "int4" and not (nibbles.planes(known) and dtype in (torch.float16, torch.bfloat16)):
        return None
    packed = kernels.pack(data, format, "compact", dtype)
    made = choosing.kernel(choosing.Recipe(strategy, 0.0, "asked for by a test"), data, format, packed.cols, dtype)
    return replace(packed, strategy="fast", kernels=(made,))


def errors(format: str, dtype: torch.dtype) -> dict[str, float]:
    """The worst of a format's results by strategy: matmuls of 1 to 64 tokens and the gradient to the input. Where "fast" is
    one of two ways (as `every_way` has it, int4), the other is there too."""
    weights, worst = exact(format), {}
    for strategy in (*STRATEGIES, *(["codes"] if kernel(format, "int4", dtype) else [])):
        packed = kernel(format, strategy, dtype)
        for count in TOKENS if packed else ():
            x = torch.randn(count, weights.shape[1], generator=torch.Generator().manual_seed(count)).to(dtype)
            x.requires_grad_()
            y = kernels.linear(x, packed)
            assert y.dtype == dtype and y.shape == (count, ROWS)
            g = torch.randn(count, ROWS, generator=torch.Generator().manual_seed(count)).to(dtype)
            gradient, = torch.autograd.grad(y, x, g)
            found = max(error(y.detach(), x.detach().double() @ weights.T), error(gradient, g.double() @ weights))
            worst[strategy] = max(worst.get(strategy, 0.0), found)
    return worst


def every_way() -> dict:
    """{dtype: {format: {strategy: error}}}, with every way of being fast tried, whatever is measured to be quick here."""
    measured, int4.tokens = int4.tokens, lambda dtype, passes: 0 if dtype == torch.float32 else max(TOKENS)
    try:
        return {str(dtype)[6:]: {name: errors(name, dtype) for name in runnable()} for dtype in LIMIT}
    finally:
        int4.tokens = measured


if __name__ == "__main__":
    print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability(), "errors": every_way()}))
