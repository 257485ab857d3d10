"""In which type to multiply: a half-precision product is taken in float32 where this processor is quicker at that.

Only the input and the result are half precision then; the weights and the sums are more exact than a half-precision
matmul's. A processor without bfloat16 instructions is several times slower in bfloat16 than in float32, one with them
several times faster, and nothing but a measurement says so for every processor and library.
"""

from collections.abc import Callable
from time import perf_counter

import torch

from ..errors import LabError
from .tuning import remembered

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_dtype(dtype: torch.dtype, name: str) -> None:
    """Raises LabError where `dtype` is none that packed weights can be multiplied in."""
    if dtype not in FLOATS:
        raise LabError(f"{name}: packed weights are multiplied in float32, float16, bfloat16 or float64, not in {dtype}")


def multiply_in(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The type in which a matmul of `dtype` inputs is done: itself, or float32 where that is measured to be quicker."""
    if device_type != "cpu" or dtype in (torch.float32, torch.float64):
        return dtype
    return dtype if as_it_is(dtype) else torch.float32


@remembered
def as_it_is(dtype: torch.dtype) -> bool:
    """Whether a matmul of `dtype` inputs is quicker here than one in float32. Measured, once on a machine."""
    return quicker(_matmul(dtype), _matmul(torch.float32))


def _matmul(dtype: torch.dtype, tokens: int = 32, rows: int = 256, cols: int = 1024) -> Callable[[], object]:
    x, weights = torch.ones(tokens, cols, dtype=dtype), torch.ones(rows, cols, dtype=dtype)
    return lambda: torch.mm(x, weights.T)


def quicker(work: Callable[[], object], other: Callable[[], object], times: int = 20,
            wait: Callable[[], object] = lambda: None) -> bool:
    """Whether `work` takes less time than `other`: the best of each in rounds by turns, so that short work finds quiet
    moments on a busy machine; fewer rounds where the answer is plain. `wait` waits for work that was only started."""
    took = [float("inf"), float("inf")]
    with torch.inference_mode():
        work(), other(), wait()
        for done in range(times):
            for i, run in enumerate((work, other)):
                start = perf_counter()
                run()
                wait()
                took[i] = min(took[i], perf_counter() - start)
            if done >= 4 and max(took) > 3 * min(took):
                break
    return took[0] < took[1]
