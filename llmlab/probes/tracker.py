"""Live tensor bytes, operation by operation: a dispatch mode that follows every storage from its first tensor to its end.

It sees what torch allocates as tensors. What an operation takes inside itself (attention on the CPU, packed matrices of
oneDNN, the matrix that bitsandbytes unpacks) is not counted; resident memory shows it.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Tracker(TorchDispatchMode):
    """Counts bytes of storages made inside the mode, and those of `known` tensors that lived before it.

    `live` now, `peak` at the most, `at` the operation that made the peak. With `trace`, `log` lists (operation, live after).
    """

    def __init__(self, known=(), device: str | None = None, trace: bool = False):
        super().__init__()
        self.device, self.log = device, [] if trace else None
        self.live = self.peak = 0
        self.at = "before"
        self._seen: dict[int, weakref.ref] = {}
        for tensor in known:
            self._count(tensor)
        self.peak = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self._count, result)
        if self.log is not None:
            self.log.append((str(func), self.live))
        if self.live > self.peak:
            self.peak, self.at = self.live, str(func)
        return result

    def reset(self) -> None:
        """Let the peak count from now on."""
        self.peak, self.at = self.live, "before"

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device is not None and tensor.device.type != self.device or tensor.device.type == "meta":
            return tensor
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return tensor
        size = storage.nbytes()
        self.live += size

        def gone(_, key=key, size=size):
            self._seen.pop(key, None)
            self.live -= size
        self._seen[key] = weakref.ref(storage, gone)
        return tensor


def storage_bytes(tensors) -> int:
    """Bytes of the distinct storages of some tensors: views and tied tables once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
