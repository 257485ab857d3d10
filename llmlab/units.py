"""Bytes, rates and seconds: read from words and written in words, in one place.

GiB is 2**30 bytes, GB is 10**9; rates (GB/s) count in 10**9.
"""

import re

from .errors import LabError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12

_UNITS = {"b": 1, "": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB, "kb": KB, "mb": MB, "gb": GB, "tb": TB,
          "k": KIB, "m": MIB, "g": GIB, "t": TIB}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)


def align(size: int, to: int) -> int:
    """Round `size` up to a multiple of `to` (both in the same unit)."""
    return -(-size // to) * to


def parse_bytes(text: str | int | float) -> int:
    """Bytes from `"8 GiB"`, `"512MB"`, `"24g"` (binary, as llama.cpp and torch read it) or a plain number.

    Raises LabError for anything else, and for negative or non-finite numbers.
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        if not 0 <= text < 2**80:
            raise LabError(f"{str(text)[:40]} is not a size; give bytes, or words like '8 GiB'")
        return int(text)
    match = _SIZE.fullmatch(str(text))
    if not match or match[2].lower() not in _UNITS or len(match[1]) > 20:
        raise LabError(f"{text!r:.60} is not a size; give bytes, or words like '8 GiB' or '512 MB'")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_bytes(size: float, digits: int = 2) -> str:
    """`"4.58 GiB"`: the largest binary unit that leaves at least one before the point."""
    for unit, scale in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size) >= scale:
            return f"{size / scale:.{digits}f} {unit}"
    return f"{size:.0f} B"


def format_count(count: float) -> str:
    """`"8.03 B"` parameters, `"134.5 M"`: powers of 1000, three significant digits and a bit."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(count) >= scale:
            value = count / scale
            return f"{value:.{2 if value < 100 else 1}f} {unit}"
    return f"{count:.0f}"


def format_rate(bytes_per_second: float) -> str:
    """`"360.0 GB/s"`."""
    return f"{bytes_per_second / GB:.1f} GB/s"


def format_seconds(seconds: float) -> str:
    """`"12 ms"`, `"3.4 s"`, `"2 min 10 s"`, `"1 h 04 min"`."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
