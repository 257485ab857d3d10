"""What a server has done and is doing, in Prometheus' text format (version 0.0.4): counters, gauges, histograms.

https://prometheus.io/docs/instrumenting/exposition_formats/ is the source of the format.
"""

import math
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Seconds. Tokens come within milliseconds from a card and within a second from a slow processor; a first token waits its turn.
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Histogram:
    """How often a value was at most so much. bounds: rising; above the last there is +Inf."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self._counts, self._sum, self._lock = bounds, [0] * (len(bounds) + 1), 0.0, threading.Lock()

    def add(self, value: float) -> None:
        with self._lock:
            self._counts[bisect_left(self.bounds, value)] += 1
            self._sum += value

    def samples(self) -> Iterable[tuple[str, dict[str, str], float]]:
        """(suffix, labels, value) of each line."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        below = 0
        for bound, count in zip((*self.bounds, math.inf), counts, strict=True):
            below += count
            yield "_bucket", {"le": _number(bound)}, below
        yield "_sum", {}, total
        yield "_count", {}, below


class Counts:
    """Counters by labels, which come as they are first counted."""

    def __init__(self, *labels: str):
        self.labels, self._counts, self._lock = labels, {}, threading.Lock()

    def add(self, *values: str) -> None:
        with self._lock:
            self._counts[values] = self._counts.get(values, 0) + 1

    def samples(self) -> Iterable[tuple[str, dict[str, str], float]]:
        with self._lock:
            found = sorted(self._counts.items())
        for values, count in found:
            yield "", dict(zip(self.labels, values, strict=True)), count


def family(name: str, kind: str, says: str, samples: Iterable[tuple[str, Mapping[str, str], float]]) -> str:
    """The lines of one metric. kind: counter, gauge or histogram; samples: (suffix, labels, value)."""
    lines = [f"# HELP {name} {_escaped(says, quotes=False)}", f"# TYPE {name} {kind}"]
    for suffix, labels, value in samples:
        inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{name}{suffix}{{{inside}}} {_number(value)}" if inside else f"{name}{suffix} {_number(value)}")
    return "\n".join(lines) + "\n"


def one(name: str, kind: str, says: str, value: float) -> str:
    """The lines of a metric that is a single number."""
    return family(name, kind, says, [("", {}, value)])


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else repr(float(value))


def _escaped(text: str, quotes: bool = True) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r'\"') if quotes else text
