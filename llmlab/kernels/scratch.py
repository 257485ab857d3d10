"""One reused buffer for each thread, device, stream and dtype: unpacked weights live here for the length of one multiplication.

Every matrix shares it, so what a model holds besides its packed bytes does not grow with the number of matrices.
"""

import threading

import torch

# 4 MiB of float32: in a third-level cache, and large enough that a dozen small operations a chunk are mostly work. On two
# cores with 32 MiB of cache half of it was 15 to 40 % slower, twice of it up to 25 % quicker.
CPU_WEIGHTS = 1 << 20
GPU_WEIGHTS = 1 << 23      # a card hides the launches of a dozen small kernels only behind larger pieces

_local = threading.local()


def rows_at_once(cols: int, device: torch.device) -> int:
    """How many rows of `cols` weights are unpacked together: one at least, a multiple of 16 where there are as many."""
    rows = max(1, (CPU_WEIGHTS if device.type == "cpu" else GPU_WEIGHTS) // max(1, cols))
    return rows if rows < 16 else rows // 16 * 16


def borrow(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A [rows, cols] view of this thread's buffer, its contents undefined; the next call takes it back."""
    held = _local.__dict__.setdefault("buffers", {})
    key = device, dtype, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    buffer = held.get(key)
    if buffer is None or buffer.numel() < rows * cols:
        with torch.inference_mode(False):      # one that is made in inference mode could not be written to outside
            buffer = held[key] = torch.empty(rows * cols, dtype=dtype, device=device)
    return buffer[:rows * cols].view(rows, cols)


def held() -> int:
    """Bytes of this thread's buffers."""
    return sum(buffer.nbytes for buffer in _local.__dict__.get("buffers", {}).values())


def release() -> None:
    """Gives this thread's buffers back."""
    _local.__dict__.pop("buffers", None)
