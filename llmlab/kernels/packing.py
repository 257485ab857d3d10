"""The one door: blocks of a GGUF tensor in, a packed matrix out, by the strategy asked for."""

import torch

from ..errors import LabError
from .arithmetic import check_dtype
from .choosing import choose, kernel, recipe
from .compact import Compact
from .packed import Packed
from .reference import Reference
from .viewing import as_blocks, is_mapped

STRATEGIES = ("auto", "compact", "fast", "reference")


def pack(blocks, format: str, strategy: str = "auto", dtype: torch.dtype = torch.float32, name: str = "weights",
         mapped: bool | None = None, device: torch.device | str | None = None, leave: bool = True) -> Packed:
    """Packs uint8 [rows, row_bytes], or a stack [experts, rows, row_bytes], of `format` for inputs of `dtype`.

    `blocks` is a tensor or a numpy array, mapped and read-only or not; it is kept, not copied. `mapped` says whether its
    bytes are pages of a file (None: found out where the object knows). Strategies: "compact" keeps nothing else; "fast"
    adds what makes this machine quicker, stated in `.why` and `.bytes`; "reference" unpacks the whole matrix at every
    use; "auto" takes "fast" where there is room for it. `device`: where it is multiplied (None: where the blocks are). The
    blocks are copied there, unless what "fast" makes there does without them and `leave` allows it (looking rows up would
    fetch them from where they stayed). Raises LabError naming the tensor.
    """
    if strategy not in STRATEGIES:
        raise LabError(f"{name}: {str(strategy)[:40]!r} is no strategy; there are {', '.join(STRATEGIES)}")
    check_dtype(dtype, name)
    mapped = is_mapped(blocks) if mapped is None else mapped
    blocks, cols = as_blocks(blocks, format, name)
    device = _exact(torch.device(device)) if device else blocks.device
    stack = blocks if blocks.ndim == 3 else blocks[None]
    chosen = ""
    if strategy == "auto":
        strategy, _, chosen = choose([(format, stack.shape[0] * stack.shape[1] * cols)], dtype, device)
        chosen += "; "
    there = stack.to(device)
    if strategy == "reference":
        why, kernels = "the whole matrix is unpacked at every use", [Reference(part, format, cols) for part in there]
    elif strategy == "compact":
        why, kernels = "GGUF bytes, a chunk of rows unpacked at a time", [Compact(part, format, cols) for part in there]
    else:
        plan = recipe(format, dtype, device)
        why, kernels = plan.why, [kernel(plan, part, format, cols, dtype) for part in there]
    if there is not stack:
        if leave and kernels and all(made.LEAVES for made in kernels):
            for made, part in zip(kernels, stack, strict=True):
                made.blocks = part
        else:
            blocks, mapped = there if blocks.ndim == 3 else there[0], False
    return Packed(name=name, format=format, strategy=strategy, rows=stack.shape[1], cols=cols,
                  experts=stack.shape[0] if blocks.ndim == 3 else None, dtype=dtype, why=chosen + why, blocks=blocks,
                  kernels=tuple(kernels), is_mapped=mapped)


def _exact(device: torch.device) -> torch.device:
    """The device with its number, as tensors on it have it."""
    return torch.empty(0, device=device).device
