"""Memory that the C library keeps after it was freed: packing leaves holes, resident until they are given back."""

import ctypes
import sys
from functools import cache


def give_back() -> bool:
    """Return freed memory to the system where the C library can (glibc's malloc_trim); whether any was returned."""
    trim = _trim()
    return bool(trim and trim(0))


@cache
def _trim():
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
