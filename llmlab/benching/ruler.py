"""What all are held against: how fast this machine reads its memory, measured in turns with them."""

import time

from .dense import set_threads

_LEAST, _MOST = 2**28, 2**30   # bytes
_TIMES = 4               # readings a round: one alone may meet other work


def prepare(job: dict) -> None:
    set_threads(job)


def warm(job: dict) -> None:
    """Nothing: its memory is nobody's question."""


class open:
    """A buffer of eight times the last cache, read by a sum and by a matrix times a vector, as a calibration does."""

    def __init__(self, job: dict):
        import torch

        from ..calibration.rates import WIDTH, last_cache
        size = min(max(8 * (last_cache() or 0), _LEAST), _MOST, max(_LEAST // 8, job["free"] // 8)) // 2**20 * 2**20
        self._buffer = torch.ones(size // 4)
        self._matrix, self._vector = self._buffer.view(-1, WIDTH), torch.ones(WIDTH)
        self.about = {"dtype": "float32", "held": size, "why": f"{size // 2**20} MiB read by a sum and a matrix times a vector"}

    def rate(self) -> float:
        """Bytes a second of the better of the two, the fastest of some readings."""
        def seconds(work) -> float:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        works = (self._buffer.sum, lambda: self._matrix @ self._vector) * _TIMES
        return self._buffer.nbytes / min(map(seconds, works))
