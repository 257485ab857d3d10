"""What is handed in to be packed: bytes that are there already, looked at and not copied, and whose they are."""

import mmap

import numpy as np
import torch

from ..errors import LabError
from ..formats.dequantizing import as_bytes, find


def as_blocks(blocks: "torch.Tensor | np.ndarray", format: str, name: str) -> tuple[torch.Tensor, int]:
    """The blocks as a uint8 tensor [rows, row_bytes] or [experts, rows, row_bytes] on the same memory, and the width in
    weights.

    Raises LabError naming the tensor for a format that is unknown or that nobody can unpack, for anything but bytes, and
    for rows that are no whole number of blocks, or none.
    """
    try:
        known = find(format)
        data = as_bytes(blocks, known)
    except LabError as fault:
        raise LabError(f"{name}: {fault}") from fault
    if data.ndim not in (2, 3) or not data.shape[-1]:
        raise LabError(f"{name}: packed weights are uint8 [rows, row_bytes] or [experts, rows, row_bytes], "
                       f"not {list(data.shape)}")
    data = data if data.stride(-1) == 1 else data.contiguous()
    return data, data.shape[-1] // known.block_bytes * known.block


def is_mapped(blocks: "torch.Tensor | np.ndarray") -> bool:
    """Whether the bytes are pages of a mapped file, as far as the object knows: numpy arrays do, of tensors only those
    over a storage that was mapped by `from_file(shared=True)`."""
    if isinstance(blocks, torch.Tensor):
        return blocks.device.type == "cpu" and bool(blocks.untyped_storage().filename)
    while blocks is not None:
        if isinstance(blocks, (np.memmap, mmap.mmap)):
            return True
        blocks = blocks.obj if isinstance(blocks, memoryview) else getattr(blocks, "base", None)
    return False
